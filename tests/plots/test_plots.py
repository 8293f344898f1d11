"""Figures are drawn from data, and the data are right."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from test_measurement_pictures import BYTES
from test_measurement_pictures import ROWS as DECODE
from test_quality import rows_of, tier_a
from test_verdict_pictures import FINDINGS, RECORDED

from kvlearn import plots
from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED
from kvlearn.kernels.stages import STAGES
from kvlearn.kernels.trace import Trace, trace
from kvlearn.measure import DEVICES, MODELS, Quartiles, Roofline, Work, cache_bytes, read_bytes, weights_bytes
from kvlearn.model import Decoder, ModelConfig
from kvlearn.parallel import Layout, Plan
from kvlearn.parallel.simulate import Shape
from kvlearn.plots.serving import FREE, BlockState
from kvlearn.serving import Attack, Mix, Noise, simulate
from kvlearn.study import recall
from kvlearn.verdict import METHODS, Evidence, Finding, Verdict, recommend

GIB = 1024**3
SOME = Quartiles(0.002, 0.001, 0.003, 5)


def kernel_traces() -> dict[str, Trace]:
    """Of three stages, at small sizes."""
    if not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs Triton's interpreter")
    q, k, v = torch.ones(1, 4, 8), torch.ones(1, 2, 128, 8), torch.ones(1, 2, 128, 8)
    traces = {}
    for name in ("v0", "v2", "v3"):
        with trace(k=k, v=v) as traces[name]:
            STAGES[name].decode(q, k, v, 128)
    return traces


def recorded(*runs: str) -> list[dict[str, Any]]:
    """Rows as ``kvlearn study convert`` keeps them: the loss falls by 0.5 from a start of 2, 3 …"""
    return [
        {
            "run": run,
            "tokens": tokens,
            "losses": {
                text: {"loss": 2 + i - tokens / 2000, "error": 0.1} for text in ("sympy", "networkx", "prose")
            },
        }
        for i, run in enumerate(runs)
        for tokens in (0, 1000)
    ]


def sink_rows() -> list[dict[str, Any]]:
    """Rows as ``kvlearn study sinks`` keeps them."""
    return [
        {"run": run, "variant": variant, "first_token_weight": 0.5, "by_position": 32 * [loss]}
        for run in ("as trained", "sink planted")
        for loss, variant in enumerate(("full", "window", "window, 1 sink kept"), start=1)
    ]


def window_rows() -> list[dict[str, Any]]:
    """Rows as ``kvlearn bench window`` keeps them, of one design."""
    design = {"name": "window", "family": "sliding"}
    spread = {"q1": 0.9, "q3": 1.1, "n": 5}
    rows: list[dict[str, Any]] = []
    for length in (1024, 2048):
        rows.append({**design, "what": "prefill_time", "length": length, "measured": 1.0, **spread})
        rows.append({**design, "what": "prefill_memory", "length": length, "measured": length})
    fitted = ({"what": f"prefill_{quantity}_exponent"} for quantity in ("time", "memory"))
    return [*rows, *({**design, **what, "measured": 1.0, **spread} for what in fitted)]


def recall_rows() -> list[dict[str, Any]]:
    """Rows as ``kvlearn study recall`` keeps them, of one design between the upper and the lower bound."""
    return [
        {
            "design": design,
            "run": design,
            "n_pairs": 8,
            "state_bytes": size,
            "training": {"lr": 0.01},
            "seed": 0,
            "accuracy": accuracy,
            "seconds": 1.0,
        }
        for design, size, accuracy in (("full", 9000, 1.0), ("short_conv", 0, 0.1), ("linear", 512, 0.6))
    ]


def recall_run() -> recall.Run:
    """A run of two points, of a model that was not trained."""
    model = Decoder(ModelConfig(d_model=8, n_layers=1, n_heads=1))
    return recall.Run(model, [recall.Point(20, 3.0, 0.1), recall.Point(40, 1.0, 0.6)], 0.9, 0.7, 5.0)


def attack_rows() -> list[dict[str, Any]]:
    """Rows of the leak as ``kvlearn bench serving`` keeps them."""
    found = asdict(Attack(20, fields=0.5, prompts=0.1, chance=0.1, requests=33, seconds=1.0))
    return [{"channel": "hits", "salted": salted, **found} for salted in (False, True)]


def noise_rows() -> list[dict[str, Any]]:
    """Rows of noise as ``kvlearn bench serving`` keeps them."""
    return [
        {"epsilon": epsilon, "probes": 1, **asdict(Noise(0.5, 0.1, delay=1 / epsilon, saved=1.0))}
        for epsilon in (1.0, 10.0)
    ]


PICTURES = {
    "cache_growth": lambda: plots.cache_growth(MODELS["Llama 3.1 8B"]),
    "bytes_per_token": lambda: plots.bytes_per_token(list(MODELS.values())),
    "cache_saves": lambda: plots.cache_saves(5),
    "loss_curve": lambda: plots.loss_curve([5.0, 4.0, 3.5, 3.2], uniform=5.5),
    "step_times": lambda: plots.step_times([64, 128], {"with a cache": [SOME, SOME]}),
    "on_the_roofline": lambda: plots.on_the_roofline(
        Roofline(1e11, 2e10), {"prefill": (Work(1e9, 1e7), SOME), "decode": (Work(1e6, 2e6), SOME)}
    ),
    "time_per_token": lambda: plots.time_per_token(
        {"your parts": {9: 0.2, 10: 0.002, 11: 0.003}, "none": {}}
    ),
    "loss_by_position": lambda: plots.loss_by_position(
        {"right": np.ones(64), "wrong": 2 * np.ones(64)}, chunk=32
    ),
    "access_pattern": lambda: plots.access_pattern(kernel_traces()),
    "achieved_bandwidth": lambda: plots.achieved_bandwidth(
        [("kernel", 1e6, SOME), ("kernel", 1e9, SOME), ("SDPA flash", 1e9, SOME)],
        bandwidth=4e12,
        t_fixed=5e-6,
        bar=(0.9, 15e-6),
    ),
    "splits": plots.splits,
    "pools": lambda: plots.pools(
        {"MHA": range(8), "routed": torch.tensor([2, 0, 2, 1, 2, 2, 0, 2]), "pair": 2 * [[0, 0, 1, 1]]}
    ),
    "across_layers": lambda: plots.across_layers(
        [0, 1, 2, 1, 2, 1], ["window", "window", "full"] * 2, stored=[8, 8, 1024, 0, 0, 0], title="A stack"
    ),
    "stored_and_read": lambda: plots.stored_and_read(
        [{"name": "full", "stored": 4096, "read": 4096}, {"name": "pairs", "stored": 1024, "read": 2048}]
    ),
    "conversion_curves": lambda: plots.conversion_curves(
        {
            text: {"mean": [(0, 2.0, 0.1), (1e6, 1.5, 0.1)], "control": [(0, 1.2, 0.1), (1e6, 1.1, 0.1)]}
            for text in ("Python", "prose")
        },
        control="control",
        base={"Python": 1.2, "prose": 2.5},
    ),
    "uptraining": lambda: plots.uptraining(recorded("full", "pool"), {"pool": "mean"}),
    "squeeze": plots.squeeze,
    "path_flops": lambda: plots.path_flops(
        [1, 64],
        {"naive": [4e9, 5e9], "absorbed": [1e8, 6e9]},
        {"naive": [SOME, SOME], "absorbed": [SOME]},
        crossover=48,
    ),
    "spectrum": lambda: plots.spectrum(
        {"as they are": {"keys before RoPE": [8.0, 1.0, 1.0, 0.0], "keys after RoPE": torch.ones(4)}}
    ),
    "loss_over_rank": lambda: plots.loss_over_rank(
        {"SVD": [(8, 2.0, 0.1), (16, 1.5, 0.1)], "random": [(8, 6.0, 0.1), (16, 5.5, 0.1)]}, base=1.2
    ),
    "rope_on_latent": lambda: plots.rope_on_latent(
        {"decoupled RoPE": np.ones(8), "RoPE on the latent": np.cos(np.arange(8.0))}
    ),
    "ring": lambda: plots.ring(3, n_sinks=1, n_tokens=6),
    "cone": lambda: plots.cone([3, None], n_tokens=8),
    "influence": lambda: plots.influence({"full": ([1, 2], [1.0, 0.1])}, reaches={"full": 4}),
    "beyond_the_window": lambda: plots.beyond_the_window(sink_rows(), window=16),
    "layer_stripes": lambda: plots.layer_stripes([MODELS["Jamba v0.1"], MODELS["Gemma 4 E2B"]]),
    "block_pool": lambda: plots.block_pool([[BlockState("private", "ann"), FREE]]),
    "waste": lambda: plots.waste({16: simulate(Mix(), 20, 4096, sharing="none")}),
    "leak": lambda: plots.leak(attack_rows()),
    "noise_and_leak": lambda: plots.noise_and_leak(noise_rows()),
    "gallery": lambda: plots.gallery({"window": "local(4)", "strided": "strided(3)"}, n_tokens=12, block=4),
    "lifetimes": lambda: plots.lifetimes({"window": "local(4)", "strided": "strided(3)"}, n_tokens=12),
    "timetable": lambda: plots.timetable({"striped": Plan(Layout(16, 4, "striped"))}),
    "exposed_communication": lambda: plots.exposed_communication(
        Shape(n_heads=8, n_kv_heads=2, head_dim=16), 1e12, world=2, lengths=(64, 4096)
    ),
    "scaling": lambda: plots.scaling(window_rows()),
    "state_memory": plots.state_memory,
    "recall_curves": lambda: plots.recall_curves({"full": recall_run(), "delta": recall_run()}),
    "recall_over_state": lambda: plots.recall_over_state(recall_rows()),
    "loss_over_bytes": lambda: plots.loss_over_bytes(tier_a()),
    "pareto": lambda: plots.pareto(tier_a()),
    "above_by_position": lambda: plots.above_by_position(tier_a()),
    "recall_over_bytes": lambda: plots.recall_over_bytes(rows_of("B")),
    "recall_over_length": lambda: plots.recall_over_length(
        [row for row in rows_of("B") if row["task"] in ("mqar-8", "needle-1", "induction")]
    ),
    "converted": lambda: plots.converted(rows_of("C")),
    "touched_bytes": lambda: plots.touched_bytes(BYTES),
    "decode_times": lambda: plots.decode_times({"one thread": DECODE}),
    "predicted_and_measured": lambda: plots.predicted_and_measured({"one thread": DECODE}),
    "rooflines": lambda: plots.rooflines([DEVICES["H200"]], {"gqa": Work(4e9, 1e9)}),
    "what_pays": lambda: plots.what_pays({"one user": {"gqa": {"T4": 1.2, "H100": 1.5}}}),
    "dollars": lambda: plots.dollars({"gqa": [(1024, 0.5), (2048, 1.0)]}),
    "verdict_board": lambda: plots.verdict_board(
        [Finding(claim, Evidence(Verdict.HOLDS, "", "note")) for claim in METHODS] + FINDINGS
    ),
    "recommendation": lambda: plots.recommendation(
        recommend("Llama 3.1 8B", 32_768, 64, "A100 80 GB", records=RECORDED)
    ),
    "decisions": lambda: plots.decisions({"A100 80 GB": {(1024, 1): "as it is", (2048, 4): "latents"}}),
    "selections": lambda: plots.selections({"head 0": np.tri(8, dtype=bool)}, title="Chosen"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_png_with_words_for_who_cannot_see_it(name: str) -> None:
    picture = PICTURES[name]()
    data, metadata = picture._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == metadata["image/png"]["alt"] == picture.alt
    assert len(picture.alt) > 60
    assert picture.data
    assert len(data["image/png"]) < 100_000


def test_every_picture_of_the_course_is_tested_here() -> None:
    assert {name for name in plots.__all__ if name[0].islower()} == set(PICTURES)


def test_the_same_picture_twice_is_the_same_file() -> None:
    assert plots.cache_saves(5).png() == plots.cache_saves(5).png()


def test_the_ground_is_transparent_for_either_theme() -> None:
    from io import BytesIO

    from matplotlib.image import imread

    pixels = imread(BytesIO(plots.cache_saves(5).png()))
    assert pixels[0, 0, 3] == 0


def test_the_cache_saves_all_but_the_last_row() -> None:
    assert plots.cache_saves(12).data["scores"] == {"without": 78, "with": 12}


def test_the_growth_of_the_cache_is_the_formulas() -> None:
    model = MODELS["Llama 3.1 8B"]
    data = plots.cache_growth(model, batch=16, card_bytes=80e9).data
    longest = data["longest"]
    assert data["weights"] == weights_bytes(model) / GIB
    assert data["cache"][-1] == cache_bytes(model, 65_536, batch=16) / GIB
    assert weights_bytes(model) + cache_bytes(model, longest, batch=16) <= 80e9
    assert weights_bytes(model) + cache_bytes(model, int(longest * 1.05), batch=16) > 80e9


def test_the_bars_are_sorted_and_stored_is_not_read() -> None:
    data = plots.bytes_per_token(list(MODELS.values()), length=32_768).data
    assert data["stored"] == sorted(data["stored"], reverse=True)
    at = data["models"].index("Gemma 4 E2B")
    assert data["read"][at] == read_bytes(MODELS["Gemma 4 E2B"], 32_768) / GIB > data["stored"][at]


def test_the_access_pattern_is_what_was_read() -> None:
    data = PICTURES["access_pattern"]().data
    assert [panel["times_the_floor"] for panel in data.values()] == [3, 1, 1]
    assert (data["v0"]["often"][:2, :128] == 2).all()
    assert not data["v0"]["often"][:2, 128:].any()
    assert data["v2"]["often"].shape == (2, 2 * 128)
    assert data["v3"]["merging"].tolist() == 4 * [False] + 4 * [True]


def test_the_floor_of_the_bandwidth_never_passes_the_memorys() -> None:
    data = PICTURES["achieved_bandwidth"]().data
    floor, bar = data["curves"].values()
    assert (bar < floor).all()
    assert (floor < 4e12).all()
    assert data["best"] == {"kernel": pytest.approx(1e9 / 0.002), "SDPA flash": pytest.approx(1e9 / 0.002)}


def test_one_program_too_many_starts_a_second_wave() -> None:
    ends = plots.splits((1, 8, 9), n_kv_heads=2, n_tiles=72, multiprocessors=16, overhead=0).data["ends"]
    assert ends == {1: 72, 8: 9, 9: 16}


def test_one_split_is_not_called_splits() -> None:
    picture = PICTURES["splits"]()
    assert "1 split, done at 89; 8 splits, done at 12" in picture.alt
    titles = [panel.get_title(loc="left") for panel in picture.figure.axes]
    assert titles == ["1 split: 2 programs", "8 splits: 16 programs", "11 splits: 22 programs"]


def test_the_program_that_merges_in_v5_is_marked_where_its_workspace_is_traced() -> None:
    if not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs Triton's interpreter")
    from kvlearn.kernels.stages.v5 import new_workspace

    q, k, v = torch.ones(1, 4, 8), torch.ones(1, 2, 128, 8), torch.ones(1, 2, 128, 8)
    workspace = new_workspace(1, 4, 8, n_splits=2, device=q.device)
    with trace(k=k, v=v, part=workspace.part) as reads:
        STAGES["v5"].decode(q, k, v, torch.tensor([128], dtype=torch.int32), workspace=workspace)
    picture = plots.access_pattern({"v5": reads})
    assert picture.data["v5"]["merging"].tolist() == [False, True, False, True]
    assert "v5: 4 programs read 1 times the bytes needed, 2 of them merge" in picture.alt


def test_the_roofline_shows_what_was_achieved() -> None:
    achieved = PICTURES["on_the_roofline"]().data["achieved"]
    assert achieved == {"prefill": pytest.approx(1e9 / 0.002), "decode": pytest.approx(1e6 / 0.002)}


def test_recorded_uptraining_is_drawn_as_recorded() -> None:
    curves = plots.uptraining(recorded("full", "pool"), {"pool": "mean"}, texts=["prose"]).data["curves"]
    assert curves == {
        "prose": {
            "mean": [(0, 3.0, 0.1), (1000, 2.5, 0.1)],
            "full, trained on": [(0, 2.0, 0.1), (1000, 1.5, 0.1)],
        }
    }


def test_runs_that_were_not_recorded_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"names: expected one of .*'pool'.*; got 'pond'"):
        plots.uptraining(recorded("full", "pool"), {"pond": "mean"})


def test_the_prompts_step_is_not_drawn_as_a_tokens() -> None:
    curves = PICTURES["time_per_token"]().data["curves"]
    assert list(curves) == ["your parts"]
    lengths, ms = curves["your parts"]
    assert (list(lengths), list(ms)) == ([10, 11], [2, 3])
