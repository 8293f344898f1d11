"""Converting, training on and measuring on the way; what was forgotten; whether learned routing pays."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from kvlearn.cli import app
from kvlearn.measure import results
from kvlearn.model import Decoder, ModelConfig, Spec, convert
from kvlearn.study import (
    Conversion,
    Point,
    TrainConfig,
    convert_and_uptrain,
    corpus,
    other_texts,
    report,
    study_conversions,
    study_routing,
    train,
    train_and_measure,
)
from kvlearn.study.conversion import MASK_RUNS, RUNS
from kvlearn.study.other_text import paragraphs
from kvlearn.study.routing import compare

SMALL = ModelConfig(d_model=24, n_layers=2, n_heads=4, head_dim=6, d_ff=32)
ROUTED = [Spec("routed", n_kv_heads=2)]
PROVENANCE = {
    "date": "2026-01-01",
    "commit": None,
    "dirty": None,
    "machine": "some-machine",
    "cores": 2,
    "memory": 1,
    "read_bandwidth_measured": 1,
    "gpu": None,
    "versions": {},
}


def text(line: bytes = b"def f(x): return x + 1\n") -> Tensor:
    return torch.tensor(list(line * 200), dtype=torch.uint8)


HELD_OUT = {"code": text()[1000:], "prose": text(b"the second of two kinds of text\n")}
SETTINGS: dict[str, Any] = {
    "text": text(),
    "held_out": HELD_OUT,
    "seen": 8000,
    "share": 0.3,
    "batch": 4,
    "length": 20,
    "lr": 3e-3,
    "n_windows": 6,
    "progress": False,
}


@pytest.fixture(scope="module")
def base() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SMALL)
    train(model, text(), TrainConfig(steps=60, batch=4, length=20, lr=1e-2, warmup=5), progress=False)
    return model


def uptrain(base: Decoder, layers: Any = ROUTED, init: str = "mean", **changes: Any) -> Conversion:
    return convert_and_uptrain(base, layers, init, **{**SETTINGS, **changes})


def test_one_call_converts_and_trains_on_a_share_of_the_tokens(base: Decoder) -> None:
    result = uptrain(base)
    assert result.model.mixers[0].name == "routed"
    assert [result.curve[0].step, result.curve[-1].step] == [0, 30]  # 0.3 · 8000 tokens, 80 per step
    assert [point.tokens for point in result.curve] == [80 * point.step for point in result.curve]
    assert [point.step for point in result.curve] == sorted({point.step for point in result.curve})
    assert set(result.curve[0].windows) == set(HELD_OUT)
    assert result.curve[-1].loss("code") < result.curve[0].loss("code")
    assert not result.model.training
    assert base.mixers[0].name == "full"


def test_the_curve_begins_with_the_converted_model_and_ends_with_the_returned_one(base: Decoder) -> None:
    random_state = torch.get_rng_state()
    result = uptrain(base)
    again = train_and_measure(
        result.model, text(), TrainConfig(1, 4, 20), held_out=HELD_OUT, at=[], n_windows=6, progress=False
    )
    assert again[0].windows == result.curve[-1].windows
    assert torch.equal(torch.get_rng_state(), random_state)
    untouched = uptrain(base, share=0.01)
    assert untouched.curve[0].windows == result.curve[0].windows


def test_the_model_is_measured_in_evaluation_mode_and_trained_in_training_mode() -> None:
    torch.manual_seed(0)
    model, seen = Decoder(SMALL), list[tuple[str, bool]]()
    model.norm.register_forward_hook(lambda *_: seen.append(("forward", model.training)))

    def at_step(_: int) -> None:
        seen.append(("measured", model.training))

    train(model, text(), TrainConfig(2, 4, 20), at_step=at_step, progress=False)
    assert seen == [("forward", True), ("measured", False)] * 2
    assert not model.training


def test_what_a_layer_draws_in_training_follows_from_seed_and_step() -> None:
    """So that a run that goes on draws what it would have drawn; and nobody else's draws change."""
    histories = []
    for before in (1, 2):
        torch.manual_seed(0)
        model = Decoder(SMALL)
        model.norm.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
        torch.manual_seed(before)
        random_state = torch.get_rng_state()
        histories.append(train(model, text(), TrainConfig(3, 4, 20), progress=False))
        assert torch.equal(torch.get_rng_state(), random_state)
    assert histories[0] == histories[1]


def test_another_seed_sees_other_batches_than_the_base_model_did(
    base: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    module = sys.modules["kvlearn.study.training"]
    real = module.windows

    def watched(*arguments: Any, seed: int, step: int) -> Tensor:
        seen.append(seed)
        return real(*arguments, seed=seed, step=step)

    monkeypatch.setattr(module, "windows", watched)
    uptrain(base, seed=0, share=0.01)
    assert 0 not in seen  # the base model's


def test_an_interrupted_run_goes_on_to_the_same_curve(
    base: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uptrain(base)
    module, done = sys.modules["kvlearn.study.training"], list[int]()
    real = module._step

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 17:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uptrain(base, checkpoint=tmp_path / "run.pt")
    monkeypatch.setattr(module, "_step", real)
    resumed = uptrain(base, checkpoint=tmp_path / "run.pt")
    assert [point.windows for point in resumed.curve] == [point.windows for point in whole.curve]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(module, "_step", None)  # finished: nothing is trained again
    assert uptrain(base, checkpoint=tmp_path / "run.pt").curve[1:] == resumed.curve[1:]


@pytest.mark.slow
def test_so_does_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_conversion as t\n"
        "t.torch.set_num_threads(1); t.torch.manual_seed(0)\n"
        "t.uptrain(t.Decoder(t.SMALL), share=3.0, checkpoint=sys.argv[1])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path), str(Path(__file__).parent)])
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(torch.load(path, weights_only=True)["history"]) < 300

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Decoder(SMALL)
    whole, resumed = uptrain(model, share=3.0), uptrain(model, share=3.0, checkpoint=path)
    torch.set_num_threads(threads)
    assert [point.windows for point in resumed.curve] == [point.windows for point in whole.curve]


def test_a_checkpoint_of_another_conversion_is_refused(base: Decoder, tmp_path: Path) -> None:
    """Weights of the same shape and all settings alike: only what the run began with differs."""
    uptrain(base, init="mean", share=0.01, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is of another run: its origin"):
        uptrain(base, init="first", share=0.01, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is of another run: its origin"):
        uptrain(base, init="mean", share=0.01, n_windows=5, checkpoint=tmp_path / "run.pt")


def test_a_share_of_less_than_a_step_is_refused(base: Decoder) -> None:
    for share in (0.0, -1.0, 0.001):
        with pytest.raises(ValueError, match="share: expected at least a step of 4 x 20 tokens"):
            uptrain(base, share=share)


def test_a_difference_of_two_models_is_surer_than_the_loss_of_either() -> None:
    hard = [1.0, 2.0, 3.0, 4.0]
    ours, theirs = (Point(1, 1, 0.0, {"code": values}) for values in ([x + 0.1 for x in hard], hard))
    assert ours.loss("code") == pytest.approx(2.6)
    assert ours.error("code") == pytest.approx((5 / 3 / 4) ** 0.5)  # variance 5/3 over n - 1, of 4 windows
    assert ours.excess(theirs, "code") == pytest.approx((0.1, 0.0))


def test_a_study_has_a_row_a_point_beside_the_control(
    base: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {
        "full": (["full"], "first"),
        "pooled": ([Spec("gqa", n_kv_heads=1)], "random"),
        "near": ([Spec("window", window=5)], "first"),
    }
    rows = [row for run in study_conversions(base, runs, folder=tmp_path, **SETTINGS) for row in run]
    control, pooled, near = ([row for row in rows if row["run"] == name] for name in runs)
    assert [row["step"] for row in control] == [row["step"] for row in pooled]
    for row, beside in zip(pooled, control, strict=True):
        assert beside["losses"]["code"]["excess"] == 0
        difference = row["losses"]["code"]["loss"] - beside["losses"]["code"]["loss"]
        assert row["losses"]["code"]["excess"] == pytest.approx(difference)
    assert pooled[0]["losses"]["code"]["excess"] > 0
    assert [row["bytes_stored_per_token"] for row in (control[0], pooled[0])] == [192, 48]
    for row in (control[0], pooled[0], near[0]):
        tokens = 5 if row is near[0] else row["training"]["length"]
        assert row["bytes_stored_at_length"] == tokens * row["bytes_stored_per_token"]
        assert row["bytes_read_at_length"] == tokens * row["bytes_read_per_token"]
    assert results.read(results.save("convert", "x", rows, PROVENANCE, tmp_path)).rows == rows

    console = Console(record=True, width=40)
    report.show(report.conversion_table(rows), console)
    assert f"{pooled[-1]['losses']['prose']['excess']:.3f} ±" in console.export_text()

    monkeypatch.setattr(
        sys.modules["kvlearn.study.training"], "_step", None
    )  # a finished run is not repeated
    again = [row for run in study_conversions(base, runs, folder=tmp_path, **SETTINGS) for row in run]
    assert [row["losses"] for row in again] == [row["losses"] for row in rows]


def test_every_run_of_the_study_converts_a_model_of_the_base_models_shape() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=128, n_layers=4, n_heads=8, d_ff=32))
    stored = {}
    for name, (layers, init) in RUNS.items():
        converted = convert(model, layers, init=init, tokens=text()[None, :300].long())
        stored[name] = converted.table(1, dtype=torch.bfloat16)[-1]["stored"]
    assert next(iter(RUNS)) == "full"  # the control comes first
    assert stored.pop("full") == 2048
    for name, n_bytes in stored.items():
        assert (
            n_bytes
            == {"gqa-2": 512, "gqa-1": 256, "routed": 512, "pairs": 1024, "mhc": 256}[
                next(kind for kind in ("gqa-2", "gqa-1", "routed", "pairs", "mhc") if name.startswith(kind))
            ]
        )


def test_the_other_texts_are_python_and_english_that_the_corpus_does_not_hold() -> None:
    texts = {name: some.numpy().tobytes() for name, some in other_texts().items()}
    assert b"def shortest_path(" in texts["networkx"]
    prose = texts["prose"]
    assert b"shortest path" in prose
    assert b">>>" not in prose
    assert len(prose) > 300_000
    seen = corpus().train.numpy().tobytes()
    some = [paragraph for paragraph in prose.split(b"\n\n") if len(paragraph) > 200][::50]
    assert len(some) > 10
    assert not any(paragraph in seen for paragraph in some)


def test_another_text_is_not_taken_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kvlearn.study.other_text"]
    monkeypatch.setattr(module, "CHECKSUM", "0" * 64)
    with pytest.raises(RuntimeError, match=r"files of networkx at .* not those of version 3\.6\.1"):
        module.other_texts.__wrapped__()


def test_paragraphs_are_the_running_text_of_docstrings() -> None:
    running = [
        "A graph is a set of nodes and a set of edges that join two nodes each, and",
        "may carry whatever else one wants to say about them.",
    ]
    listed = [f"    {line}" for line in running]
    docstring = [
        "Short.",
        "",
        *running,
        "",
        *listed,
        "",
        "Parameters",
        "----------",
        "x : int",
        "",
        ">>> f()",
    ]
    source = ["def f():", '    """', *(f"    {line}" for line in docstring), '    """']
    assert paragraphs("\n".join(source)) == ["\n".join(running)]


def test_the_routing_study_compares_kinds_of_one_seed(tmp_path: Path) -> None:
    rows = list(
        study_routing(
            SMALL,
            TrainConfig(steps=4, batch=2, length=16),
            seeds=(0, 1),
            text=text(),
            held_out=HELD_OUT["prose"],
            n_windows=4,
            folder=tmp_path,
            progress=False,
        )
    )
    assert [(row["run"], row["seed"]) for row in rows[:5]] == [
        ("full", 0),
        ("gqa", 0),
        ("routed", 0),
        ("token_routed", 0),
        ("mqa", 0),
    ]
    same = [row["bytes_stored_per_token"] for row in rows if row["run"] in ("gqa", "routed", "token_routed")]
    assert len(same) == 6
    assert len(set(same)) == 1
    assert [len(row["routes"]) for row in rows[:5]] == [0, 0, 2, 0, 0]
    assert results.read(results.save("routing", "x", rows, PROVENANCE, tmp_path)).rows == rows
    console = Console(record=True, width=40, force_terminal=True)
    report.show(report.routing_table(rows), console)
    shown = console.export_text()
    assert "token_routed" in shown
    assert "…" not in shown


def test_routing_is_compared_seed_by_seed() -> None:
    losses = {"gqa": (1.0, 2.0, 3.0), "routed": (1.1, 2.1, 3.1)}
    rows = [
        {"run": run, "seed": seed, "loss": loss}
        for run, some in losses.items()
        for seed, loss in enumerate(some)
    ]
    numbers = compare(rows)
    assert numbers["gqa"]["loss"] == pytest.approx((2.0, 3**-0.5))
    assert numbers["routed"]["above_gqa"] == pytest.approx((0.1, 0.0))


def test_the_command_prints_the_table_and_records_the_rows(
    base: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(runs: Any, folder: Path) -> Iterator[list[dict[str, Any]]]:
        asked.append((runs, folder.name))
        return study_conversions(base, {"full": (["full"], "first")}, folder=tmp_path, **SETTINGS)

    asked: list[tuple[Any, str]] = []
    monkeypatch.setattr("kvlearn.study.study_conversions", tiny)
    monkeypatch.setattr("kvlearn.measure.provenance.collect_provenance", lambda: PROVENANCE)
    monkeypatch.setattr("kvlearn.measure.results.results_folders", lambda: [tmp_path])
    told = CliRunner().invoke(app, ["study", "convert"])
    assert told.exit_code == 0
    assert "192 B" in told.output
    assert not list(tmp_path.glob("*.json"))
    assert "recorded in" in CliRunner().invoke(app, ["study", "convert", "--record"]).output
    recorded = results.read(tmp_path / "convert-some-machine.json")
    assert recorded.command == "kvlearn study convert --record"
    assert recorded.rows[0]["training"]["lr"] == SETTINGS["lr"]
    CliRunner().invoke(app, ["study", "window_quality"])
    assert asked == [(RUNS, "convert"), (RUNS, "convert"), (MASK_RUNS, "window_quality")]


def test_only_studies_with_rows_can_be_recorded() -> None:
    refused = CliRunner().invoke(app, ["study", "speed", "--record"])
    assert refused.exit_code == 2
    said = " ".join(refused.output.replace("│", " ").split())  # the box may break a line
    assert "only convert, routing, window_quality, sinks, recall have rows" in said
