"""The study of quality: its plan, its runs and how they resume, what it evaluates, how it compares."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvlearn.cli import app
from kvlearn.measure import provenance as provenance_module
from kvlearn.measure import results
from kvlearn.measure.provenance import machine
from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.study import TrainConfig, corpus
from kvlearn.study.evaluation import spread_windows
from kvlearn.study.quality import (
    CPU,
    ConversionRun,
    LanguageRun,
    OutOfTime,
    Part,
    RecallRun,
    Session,
    TrainingText,
    best_recall,
    by_position,
    compare,
    evaluate_language,
    far_loss,
    matched,
    memory,
    parts,
    progress,
    recorded,
    repetition_slices,
    run_part,
    slice_losses,
    tiers,
    visible_difference,
)
from kvlearn.study.quality import plan as plan_module
from kvlearn.study.quality import run as run_module
from kvlearn.study.quality.evaluate import COMMON, NGRAM, ngrams, repeat_distance
from kvlearn.study.quality.plan import TIER_A, Budget, unallocated
from kvlearn.study.quality.report import (
    conversion_table,
    language_table,
    plan_table,
    recall_table,
    speed_table,
)
from kvlearn.study.quality.run import Clock, blew_up, close, execute, find, resolve
from kvlearn.study.tasks import Needle
from kvlearn.study.text import Corpus

TINY = Budget(
    ModelConfig(d_model=32, n_layers=4, n_heads=8, d_ff=96),
    TrainConfig(steps=8, batch=2, length=64, warmup=2),
    n_windows=6,
)
SHORT = LanguageRun("tiny", "full", 2, 1e-3, 0)
FULL = LanguageRun("tiny", "full", 8, 1e-3, 0)
PROVENANCE = {
    "date": "2026-01-01",
    "commit": None,
    "dirty": None,
    "machine": machine(),
    "cores": 1,
    "threads": 1,
    "memory": 1,
    "read_bandwidth_measured": 1,
    "gpu": None,
    "versions": {},
}


def text(seed: int, length: int = 3000) -> torch.Tensor:
    return torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def new_session(folder: Path, *, sources: str = "ours", **changes: Any) -> Session:
    parts = Corpus(text(0), text(1), text(2), "made here")
    session = Session(folder / "runs", folder / "results", text=parts, sources=sources, **changes)
    session.__dict__["provenance"] = {**PROVENANCE, "sources": sources}
    session.__dict__["other_texts"] = {"prose": text(3)}
    return session


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan_module.BUDGETS, "tiny", TINY)
    tasks: Any = {"tiny": {"needle": (Needle(1, 12, 4, 4, 4), 1)}}
    monkeypatch.setattr(plan_module, "TASKS", {**plan_module.TASKS, **tasks})


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part(*runs: Any) -> Part:
    return Part("cpu", "A", 1, "a part", tuple(runs))


# --- the plan


def test_every_design_has_the_parameters_of_full_attention() -> None:
    wanted = unallocated(CPU.model).n_parameters
    for name in CPU.designs:
        assert unallocated(CPU.shape(name)).n_parameters == pytest.approx(wanted, rel=0.006), name


def test_a_design_that_is_too_large_without_an_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="has more parameters than"):
        matched(replace(CPU.model, d_ff=32), (Spec("mamba2", d_state=128),))


def test_designs_that_are_compared_at_equal_cache_bytes_store_them() -> None:
    groups = CPU.equal_cache()
    quarter = next(group for group in groups if "gqa-4x" in group)
    assert {"mhc-4x", "window", "gated-delta", "mamba2", "linear", "mla-4x"} <= {*quarter}
    assert {"gqa-8x", "mhc-8x"} <= {*next(group for group in groups if "gqa-8x" in group)}
    stored = {name: memory(unallocated(CPU.shape(name)), 256)[0]["stored"] for name in ("full", *quarter)}
    assert all(stored[name] == pytest.approx(stored["full"] / 4, rel=0.05) for name in quarter)
    lengths = [line["length"] for line in memory(unallocated(CPU.shape("full")), 8192)]
    assert lengths == [8192, 4096, 32_768], "the trained length comes first"


def test_tier_a_has_eight_designs_two_rates_three_seeds_and_three_million_tokens() -> None:
    runs = [run for found in parts("cpu", "A") for run in found.runs]
    final = [run for run in runs if run.lr is None]
    assert {run.design for run in runs} == {*TIER_A}
    assert len(TIER_A) == 8
    assert parts("cpu", "A")[0].runs[-1].design == "full"
    for design in TIER_A:
        rates = [run for run in runs if run.design == design and run.lr is not None]
        seeds = [run.seed for run in final if run.design == design]
        assert len(rates) == len({run.lr for run in rates}) == 2
        assert seeds == list(range(5 if design == "full" else 3))
        assert all(4 * short.n_steps == run.n_steps for short in rates for run in final)
    assert all(run.n_steps * CPU.training.batch * CPU.training.length >= 3_000_000 for run in final)


@pytest.mark.parametrize("preset", ["minutes", "cpu", "gpu"])
def test_every_rate_is_tried_before_it_is_chosen_and_no_run_is_twice_in_a_tier(preset: str) -> None:
    for tier in tiers(preset):
        tried, seen = set[str](), set[Any]()
        for found in parts(preset, tier):
            for run in found.runs:
                assert run not in seen, (tier, run)
                seen.add(run)
                if run.lr is None:
                    assert len(run.candidates) > 1
                    assert all(candidate.name in tried for candidate in run.candidates), run
                else:
                    tried.add(run.name)


def test_an_unknown_preset_or_tier_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="preset: expected one of"):
        tiers("huge")
    with pytest.raises(ValueError, match="tier: expected one of"):
        parts("cpu", "E")


# --- what is evaluated


def test_no_window_that_evaluates_is_in_the_training_text() -> None:
    whole = corpus()
    train = bytes(whole.train.numpy())
    trained_on = TrainingText(whole.train)
    for held_out in (whole.valid, whole.test):
        windows = spread_windows(held_out, CPU.training.length, CPU.n_windows)
        kept = trained_on.without_copies(windows)
        assert 0.98 * len(windows) < len(kept) < len(windows)  # some code is in two files
        assert not [window for window in kept.tolist() if bytes(window) in train]


@given(st.lists(st.integers(0, 1), min_size=NGRAM, max_size=60))
def test_the_distance_of_a_repeated_ngram_is_that_to_the_last_time_it_occurred(tokens: list[int]) -> None:
    found = repeat_distance(ngrams(torch.tensor([tokens])))[0].tolist()
    for i, distance in enumerate(found):
        earlier = [j for j in range(i) if tokens[j : j + NGRAM] == tokens[i : i + NGRAM]]
        assert distance == (i - earlier[-1] if earlier else 0)


def test_ngrams_are_counted_as_they_occur() -> None:
    train = torch.tensor(list(b"abcdefgh" + b"abcdefgh" + b"\xff" * 9), dtype=torch.uint8)
    counts = TrainingText(train).counts
    windows = torch.tensor([list(b"abcdefgh"), list(b"\xff" * 8), list(b"hgfedcba")])
    assert counts(ngrams(windows)[:, -1]).tolist() == [2, 2, 0]
    with pytest.raises(ValueError, match="text: expected at least 8 bytes"):
        TrainingText(train[:7])


def test_slices_tell_near_from_far_and_leave_out_what_is_known_by_heart() -> None:
    name, filler = b"zqxjkvbw", bytes(range(128, 160))
    known = b"12345678"
    window = torch.tensor([list(name + known + name + filler + known + name)])
    trained_on = TrainingText(torch.tensor(list(known * (COMMON + 1)), dtype=torch.uint8))
    slices = repetition_slices(window, trained_on, far=20)
    targets = {key: set(mask[0].nonzero()[:, 0].add(1).tolist()) for key, mask in slices.items()}
    ends = {"first": 7, "second": 23, "third": 71}  # where the name ends
    assert ends["first"] in targets["new"]
    assert targets["near"] == {ends["second"]}
    assert ends["third"] in targets["far"]
    assert 15 in targets["other"]  # the first end of ``known``, and its second
    assert 63 in targets["other"]
    assert sum(map(len, targets.values())) == window.shape[1] - 1
    losses = torch.arange(71.0)[None]
    found = slice_losses(losses, slices)
    assert found["near"] == {"loss": 22.0, "tokens": 1}
    assert sum(item["tokens"] for item in found.values()) == 71


def test_positions_are_kept_in_buckets_that_double() -> None:
    losses = torch.arange(40.0).expand(3, 40)
    found = by_position(losses)
    assert [(item["from"], item["to"]) for item in found] == [(0, 8), (8, 16), (16, 32), (32, 40)]
    assert [item["loss"] for item in found] == [3.5, 11.5, 23.5, 35.5]
    assert sum(item["loss"] * (item["to"] - item["from"]) for item in found) / 40 == losses.mean()


def test_the_evaluation_is_the_mean_loss_also_in_longer_contexts() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=16, n_layers=1, n_heads=2)).eval()
    found = evaluate_language(model, text(1), TrainingText(text(0)), length=32, n_windows=8, far=8)
    windows = spread_windows(text(1), 32, 8)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
        )
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert [item["length"] for item in found["longer"]] == [64, 128]
    assert sum(item["tokens"] for item in found["slices"].values()) == 8 * 32


# --- runs


@pytest.mark.usefixtures("_one_thread")
def test_a_run_that_was_stopped_goes_on_to_the_same_row(tmp_path: Path) -> None:
    whole = execute(FULL, new_session(tmp_path / "whole"))
    late = new_session(tmp_path / "stopped", deadline=time.monotonic() - 1)
    for done in (1, 2, 3):  # each call makes one step, and keeps it
        with pytest.raises(OutOfTime, match=f"stopped after {done} of 8 steps"):
            execute(FULL, late)
    resumed = execute(FULL, new_session(tmp_path / "stopped"))
    for row in (whole, resumed):
        row["provenance"].pop("date")
        assert row.pop("tokens_per_s") * row.pop("seconds_per_step") == pytest.approx(2 * 64)
    assert resumed == whole
    assert len(whole["first_losses"]) == 8
    assert whole["loss"] == pytest.approx(math.log(256), abs=0.5)


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(run_part(part(SHORT), new_session(tmp_path)))
    monkeypatch.setattr(run_module, "execute", lambda *_: pytest.fail("the run is repeated"))
    (tmp_path / "runs").rename(tmp_path / "lost")  # results alone are enough
    assert list(run_part(part(SHORT), new_session(tmp_path))) == first
    (file,) = results.load("quality", tmp_path / "results")
    assert file.rows == first
    assert file.rows[0]["provenance"]["sources"] == "ours"


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("same", [True, False])
def test_a_row_of_other_sources_counts_if_its_losses_come_out_again(tmp_path: Path, same: bool) -> None:
    theirs = new_session(tmp_path, sources="theirs")
    row = execute(SHORT, theirs)
    if not same:
        row["first_losses"][1] += 0.01
    elsewhere = {**PROVENANCE, "machine": "another-machine"}
    results.save("quality", "…", [row], elsewhere, tmp_path / "results")
    ours = new_session(tmp_path)
    found = find(SHORT, ours.rows(), ours)
    assert (found == row) if same else (found is None)
    (known,) = json.loads((tmp_path / "runs" / "reproduced.json").read_text()).values()
    assert known is same
    assert find(replace(SHORT, seed=1), ours.rows(), ours) is None


def test_losses_are_equal_to_a_thousandth_and_none_are_no_evidence() -> None:
    assert close([1.0, 2.0], [1.0009, 2.0])
    assert not close([1.0, 2.0], [1.0011, 2.0])
    assert not close([1.0], [1.0, 2.0])
    assert not close([], [])


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    session = new_session(tmp_path)
    row = execute(SHORT, session)
    assert find(SHORT, [row], session) is row
    row["settings"]["n_windows"] += 1
    assert find(SHORT, [row], session) is None


def test_parts_side_by_side_keep_each_others_rows_and_a_new_row_replaces_the_old(tmp_path: Path) -> None:
    one, other = new_session(tmp_path), new_session(tmp_path)
    one.record([{"run": "a", "kind": "language", "loss": 1.0}])
    other.record([{"run": "b", "kind": "language", "loss": 2.0}])
    one.record([{"run": "a", "kind": "language", "loss": 3.0}, {"run": "speed", "kind": "speed"}])
    rows = recorded(tmp_path / "results")
    assert [(row["run"], row["loss"]) for row in rows] == [("b", 2.0), ("a", 3.0)]


def test_a_diverging_run_is_a_row_without_a_loss(tmp_path: Path) -> None:
    run = replace(FULL, lr=1e30)
    (row,) = run_part(part(run), new_session(tmp_path))
    assert row["loss"] is None
    assert "diverged" in row["diverged"]
    assert recorded(tmp_path / "results") == [row]
    assert run_module.first_losses(run, new_session(tmp_path)) == row["first_losses"]
    assert compare([row], "tiny")[0].summary.mean is None
    assert blew_up([2.0] * 40 + [3.1] * 20)
    assert not blew_up([5.0] * 20 + [2.0] * 20 + [2.9] * 20)


def test_a_rate_is_the_one_with_the_lowest_loss_and_waits_for_all(tmp_path: Path) -> None:
    session = new_session(tmp_path)
    low, high = (replace(SHORT, lr=lr) for lr in (1e-3, 1e-2))
    run = LanguageRun("tiny", "full", 8, None, 0, (low, high))
    row = execute(low, session)
    rows = [
        {**row, "run": candidate.name, "settings": json.loads(json.dumps(candidate.settings())), "loss": loss}
        for candidate, loss in ((low, None), (high, 5.0))
    ]
    assert resolve(run, rows, session).lr == 1e-2
    rows[0]["loss"] = 4.0
    assert resolve(run, rows, session).lr == 1e-3
    with pytest.raises(ValueError, match=f"expected a finished run {high.name}"):
        resolve(run, rows[:1], session)


def test_no_run_is_begun_after_the_deadline(tmp_path: Path) -> None:
    session = new_session(tmp_path, deadline=time.monotonic() - 1)
    with pytest.raises(OutOfTime, match="not begun"):
        list(run_part(part(SHORT), session))
    assert recorded(tmp_path / "results") == []


def test_a_clock_ends_after_its_steps_and_gives_the_median() -> None:
    clock = Clock(steps=3)
    assert [clock(done) for done in (1, 2, 3)] == [False, False, True]
    clock.times = [0.0, 10.0, 11.0, 12.0, 99.0]
    assert clock.seconds_per_step == 1.0
    assert Clock(deadline=time.monotonic() - 1)(1)


def test_a_recall_run_has_accuracy_bytes_and_longer_texts(tmp_path: Path) -> None:
    first = RecallRun("needle", "linear-8", 1e-2, 0, steps=25, preset="tiny")
    second = replace(first, lr=None, seed=1, candidates=(first,))
    rows = list(run_part(part(first, second), new_session(tmp_path)))
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["state_bytes"] == 4 * 8 * 33  # K · (V + 1) numbers in fp32
    assert [beyond["length"] for beyond in rows[0]["longer"]] == [24, 48]
    assert 0 <= rows[0]["accuracy"] <= 1
    assert run_module.first_losses(first, new_session(tmp_path)) == rows[0]["first_losses"]
    assert best_recall(rows, "tiny") == {("needle", "linear-8"): rows}
    assert best_recall(rows) == {}
    assert len(recall_table(rows, "tiny").rows) == 1


def test_a_conversion_keeps_the_loss_before_and_after_on_each_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CONVERSION_WINDOWS", 2)
    monkeypatch.setattr(run_module.Costs, "__call__", lambda *_: 1.0)
    run = ConversionRun("gqa-2-mean", 0.0004, 1e-3, 0)
    (row,) = run_part(part(run), new_session(tmp_path))
    assert row["steps"] == run.n_steps == 1
    for when in ("base", "before", "after"):
        assert {*row[when]} == {"sympy", "prose"}
    assert row["before"]["prose"]["loss"] != row["after"]["prose"]["loss"]
    assert row["loss"] == row["after"]["sympy"]["loss"]
    assert len(conversion_table([row]).rows) == 1
    diverged = {**row, "seed": 1, "diverged": "the training loss rose", "loss": None}
    assert list(conversion_table([row, diverged]).columns[3].cells) == ["1, 1 diverged"]


def test_a_conversion_whose_loss_is_not_finite_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ConversionRun("gqa-2-mean", 0.0004, 1e-3, 0)
    session = new_session(tmp_path)
    found = iter([{"sympy": {"loss": 1.0}, "prose": {"loss": loss}} for loss in (1.0, math.nan)])
    session.__dict__["base_losses"] = {}
    monkeypatch.setattr(Session, "losses", lambda *_: next(found))
    row = execute(run, session)
    assert (row["loss"], row["diverged"]) == (None, "the loss on held-out text is not finite")
    session.record([row])


def test_a_loss_that_is_not_finite_in_longer_contexts_can_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        return {"loss": 1.0, "longer": [{"length": 128, "loss": math.nan}]}

    monkeypatch.setattr(run_module, "evaluate_language", evaluate)
    (row,) = run_part(part(SHORT), new_session(tmp_path))
    assert (row["loss"], row["longer"][0]["loss"]) == (1.0, None)
    assert recorded(tmp_path / "results") == [row]


# --- comparing


def rows_of(losses: dict[str, dict[int, float | None]]) -> list[dict[str, Any]]:
    """Rows of the whole budget at 0.002, and short ones that chose this rate over 0.006."""
    found = []
    for design, by_seed in losses.items():
        for lr, steps, seed, loss in (
            (0.002, 375, 0, 2.0),
            (0.006, 375, 0, 2.1),
            (0.006, 1500, 0, 0.1),
            *((0.002, 1500, seed, loss) for seed, loss in by_seed.items()),
        ):
            found.append(
                {
                    "run": f"language-cpu-{design}-{steps}-lr{lr:g}-seed{seed}",
                    "kind": "language",
                    "budget": "cpu",
                    "design": design,
                    "lr": lr,
                    "seed": seed,
                    "settings": {"training": {"steps": steps}},
                    "loss": loss,
                    "slices": None if loss is None else {"far": {"loss": 2 * loss}},
                }
            )
    return found


def test_designs_are_compared_with_full_attention_seed_by_seed() -> None:
    rows = rows_of(
        {
            "full": {0: 1.00, 1: 1.10, 2: 1.20, 3: 1.15, 4: 1.05},
            "worse": {0: 1.10, 1: 1.21, 2: 1.29},
            "alike": {0: 1.01, 1: 1.09, 2: 1.20},
            "broken": {0: 1.30, 1: None, 2: 1.50},
        }
    )
    found = {item.design: item for item in compare(rows)}
    assert found["full"].lr == 0.002
    assert found["full"].summary.n == 5
    assert found["full"].pooled is None
    worse, alike, broken = (found[name] for name in ("worse", "alike", "broken"))
    assert worse.difference is not None
    assert worse.pooled is not None
    assert worse.difference.mean == worse.pooled.mean == pytest.approx(0.1)
    assert not worse.difference.tie
    assert alike.pooled is not None
    assert alike.pooled.tie
    assert (broken.summary.n, broken.summary.diverged) == (2, 1)
    assert broken.summary.mean == pytest.approx(1.4)
    assert broken.pooled is not None
    assert broken.pooled.n == 2
    far = {item.design: item for item in compare(rows, value=far_loss)}
    assert far["worse"].difference is not None
    assert far["worse"].difference.mean == pytest.approx(0.2)
    visible = visible_difference(rows)
    assert visible is not None
    assert visible_difference(rows, n_seeds=12) == pytest.approx(visible / 2)
    assert visible_difference(rows_of({"full": {0: 1.0}})) is None
    assert len(language_table(rows).rows) == 4


def test_a_rate_that_has_just_begun_does_not_hide_the_seeds_of_another() -> None:
    """Tier D tries more rates: until the best has its three seeds, the comparison is that of tier A."""
    rows = rows_of({"full": {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.1, 4: 1.0}, "worse": {0: 1.1, 1: 1.2, 2: 1.3}})
    best = rows_of({"full": {}})[0]
    rows.append({**best, "run": "short", "lr": 0.012, "loss": 1.9})
    long = {**best, "lr": 0.012, "settings": {"training": {"steps": 1500}}}
    for seed, rate in ((0, 0.002), (1, 0.002), (2, 0.012)):
        rows.append({**long, "run": f"long {seed}", "seed": seed, "loss": 0.9 + 0.1 * seed})
        full, worse = compare(rows)
        assert full.lr == rate
        assert full.summary.n == (5 if rate == 0.002 else 3)
        assert worse.pooled is not None


def test_recall_of_another_preset_is_another_task() -> None:
    def row(preset: str, accuracy: float) -> dict[str, Any]:
        about = {"kind": "recall", "task": "needle-1", "design": "full", "lr": 0.01, "seed": 0}
        name = f"recall-{preset}-needle-1-full-lr0.01-seed0"
        return {**about, "run": name, "loss": 1 - accuracy, "accuracy": accuracy}

    cpu, gpu = row("cpu", 1.0), row("gpu", 0.5)
    for preset, only in (("cpu", cpu), ("gpu", gpu)):
        assert best_recall([gpu, cpu], preset) == {("needle-1", "full"): [only]}


def test_a_run_of_two_machines_counts_once(tmp_path: Path) -> None:
    for name, date, loss in (("b-machine", "2026-01-02", 2.0), ("a-machine", "2026-01-01", 1.0)):
        where = {**PROVENANCE, "machine": name, "date": date}
        row = {"run": "a", "kind": "recall", "loss": loss, "provenance": where}
        results.save("quality", "…", [row], where, tmp_path / "results")
    assert [row["loss"] for row in recorded(tmp_path / "results")] == [2.0]
    assert [row["loss"] for row in new_session(tmp_path).rows()] == [1.0, 2.0], "any may be of our sources"


def test_short_runs_alone_are_not_taken_for_the_whole_budget() -> None:
    rows = rows_of({"full": {}, "gqa-4x": {}})
    short = [row for row in rows if row["settings"]["training"]["steps"] < 1500]
    assert len(short) == 4
    assert compare(short) == []
    assert visible_difference(short) is None


def test_what_has_not_run_yet_is_known_without_running_it() -> None:
    rows = rows_of({"full": {0: 1.0, 1: 1.0}})
    first, second, *_ = (item for item in progress(rows) if item.tier == "A")
    assert (first.done, first.total) == (4, 7)
    assert (second.done, second.total) == (0, 14)
    assert {item.tier for item in progress(rows)} == {"A", "B", "C", "D"}


def test_recorded_speeds_keep_their_bars() -> None:
    rows = [row for file in results.load("quality") for row in file.rows if "times_full" in row]
    rows = [row for row in rows if row["budget"] == "cpu"]
    if not rows:
        pytest.skip("no speeds are recorded yet: kvlearn study quality --calibrate")
    assert {row["design"] for row in rows} == {*CPU.designs}
    assert {row["run"]: row["times_full"] for row in rows if row["times_full"] > row["bar"]} == {}


def test_by_the_recorded_speeds_no_part_takes_more_than_an_hour(tmp_path: Path) -> None:
    costs = run_module.Costs(Session(tmp_path))
    for tier in tiers("cpu"):
        for each in parts("cpu", tier):
            timed = [costs(run) for run in each.runs if run.cost_key in costs.known]
            assert len(timed) > 0.8 * len(each.runs)
            assert sum(timed) / len(timed) * len(each.runs) <= 3600, f"{tier}{each.number}: {each.title}"


def test_rows_are_kept_where_the_machine_has_other_cores_than_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(tmp_path)
    session.record([{"run": "first", "kind": "recall"}])
    monkeypatch.setattr(provenance_module, "cores", lambda: 1)
    session.record([{"run": "second", "kind": "recall"}])
    assert [row["run"] for row in recorded(tmp_path / "results")] == ["first", "second"]
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_a_calibration_times_each_design_beside_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(SHORT, design="moba")
    monkeypatch.setattr(run_module, "parts", lambda *_: [part(SHORT, slow)])
    monkeypatch.setattr(run_module, "tiers", lambda _: {"A": ""})
    taken = {"full": 0.5, "moba": 1.25}
    monkeypatch.setattr(run_module, "step_seconds", lambda run, *_: taken[run.design])
    session = new_session(tmp_path)
    rows = list(run_module.calibrate("cpu", session))
    assert [(row["design"], row["times_full"], row["tokens_per_s"]) for row in rows] == [
        ("full", 1.0, 2 * 64 / 0.5),
        ("moba", 2.5, 2 * 64 / 1.25),
    ]
    session.record(rows)
    (tmp_path / "runs").rename(tmp_path / "lost")
    monkeypatch.setattr(run_module, "step_seconds", lambda *_: pytest.fail("it is recorded"))
    costs = run_module.Costs(session)
    assert (costs(slow), costs(replace(FULL, lr=None))) == (2 * 1.25, 8 * 0.5)
    assert recorded(tmp_path / "results") == []
    assert len(speed_table(rows).rows) == 2


# --- the command


def test_the_plan_is_listed_with_its_cost_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module.Costs, "__call__", lambda *_: 600.0)
    monkeypatch.setattr(run_module, "execute", lambda *_: pytest.fail("the list runs nothing"))
    shown = CliRunner().invoke(app, ["study", "quality", "--tier", "C", "--list"], catch_exceptions=False)
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.output.splitlines()]
    assert [line[-1] for line in lines if line[:1] == ["C"]] == ["120"] * 4
    assert any(line[:1] == ["all"] and line[-1] == "480" for line in lines)


def test_a_sum_of_minutes_that_are_not_known_is_not_known() -> None:
    shown = plan_table([*parts("cpu", "C"), *parts("gpu", "A")[:1]], [60.0] * 4 + [None], [])
    assert [*shown.columns[-1].cells] == [*4 * ["1"], "–", "–"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recall", "--tier", "A"], "belong to the study quality"),
        (["quality", "--tier", "E", "--list"], "tier: expected one of"),
        (["quality", "--tier", "A", "--part", "99"], "part: expected one that --list shows, got 99"),
        (["quality", "--preset", "huge"], "preset: expected one of"),
    ],
)
def test_options_that_name_nothing_are_refused(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["study", *arguments])
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.replace("│", " ").split())
