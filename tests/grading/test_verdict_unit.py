"""Unit 13 takes right answers of every style, gives points for half of one, and shows a learner's course."""

import itertools
import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import earned, full_marks, right, stub, unit_module

from kvlearn import workbench
from kvlearn.attention import REGISTRY
from kvlearn.grading import NotWritten, certificate, check, exercises, find_exercise
from kvlearn.measure.cache_size import cache_bytes, read_bytes
from kvlearn.measure.cost import Load, dollars_per_million, users_per_device
from kvlearn.measure.devices import DEVICES
from kvlearn.measure.models import MODELS

pytestmark = pytest.mark.answers

CHECKS = unit_module("13_verdict", "checks")
MODEL = find_exercise("13.7")


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


# 13.1


def test_bytes_may_be_counted_by_arrays_and_verdicts_by_two_questions() -> None:
    def bytes_per_user(config: Any, context: int) -> Any:
        try:
            one = 2 * config["kv_heads"] * config["head_dim"] * config["bytes_per_number"]
            numbers = np.arange(config["layers"]) + 1
        except (KeyError, TypeError):
            return None
        kept = np.full(len(numbers), context)
        if "window" in config:
            local = numbers % config.get("global_every", len(numbers) + 1) != 0
            kept[local] = np.minimum(kept[local], config["window"])
        read = np.minimum(kept, config.get("top_k", context))
        return [kept.sum() * one, torch.tensor(int(read.sum() * one))]

    def judge(claim: Any) -> str:
        pair = bytes_per_user(claim["config"], claim["context"])
        base = claim["baseline"] and bytes_per_user(claim["baseline"], claim["context"])
        if pair is None or (claim["saving"] is not None and not base):
            return "cannot be checked"
        fits = []
        for i, new in enumerate(map(float, pair)):
            off = 0 if claim["gb_per_user"] is None else claim["gb_per_user"] / (new / 1e9) - 1
            gap = 0 if claim["saving"] is None else claim["saving"] - (1 - new / float(base[i]))
            fits.append(abs(off) <= 0.05 and abs(gap) <= 0.02)
        return "holds" if fits[0] else "holds for what is read" if fits[1] else "does not hold"

    assert full_marks("13.1", bytes_per_user, judge)
    assert earned(check("13.1", bytes_per_user, stub)) == [1, 1, 1, 1, 0, 0, 0, 0]
    assert earned(check("13.1", stub, judge)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert earned(check("13.1", bytes_per_user, lambda claim: "holds"))[4:] == [1, 0, 0, 0]


@pytest.mark.parametrize("name", ["Llama 3.1 405B", "Mistral 7B v0.1"])
def test_a_real_model_has_the_courses_bytes(name: str) -> None:
    shape = MODELS[name]
    config = {"layers": shape.n_layers, "kv_heads": shape.n_kv_heads, "head_dim": shape.head_dim}
    config |= {"bytes_per_number": 2}
    if shape.layer(0).window:
        config["window"] = shape.layer(0).window
    want = cache_bytes(shape, 32_768), read_bytes(shape, 32_768)
    assert ours("13.1")[0](config, 32_768) == want


# 13.2


def test_readings_may_be_found_by_rounding() -> None:
    _, settled, question = ours("13.2")

    def readings(text: str, config: Any) -> Any:
        number, unit = text.split()
        digits = Decimal(number).as_tuple().exponent
        found = []
        for heads, layers, bits, amount, base in itertools.product(*CHECKS.OPTIONS.values()):
            if base == 1000 and len(unit) == 3:
                continue
            size = CHECKS.bytes_of(config, heads, layers, bits, amount)
            value = Fraction(size) / base ** {"K": 1, "M": 2, "G": 3}[unit[0]]
            if round(value, -int(digits)) == Fraction(number):
                found.append(dict(zip(CHECKS.OPTIONS, (heads, layers, bits, amount, base), strict=True)))
        return tuple(reversed(found))

    assert full_marks("13.2", readings, settled, question)
    assert earned(check("13.2", readings, stub, stub)) == [1, 1, 1, 1, 1, 0, 0, 0]
    assert earned(check("13.2", lambda *_: [], settled, question)) == [0, 0, 0, 0, 0, 1, 1, 1]


def test_the_articles_number_for_405b_has_no_reading_with_the_published_config() -> None:
    """128 GiB at 32K is what 128 layers and 64 heads give; the real model has neither."""
    readings, settled, _ = ours("13.2")
    real = {"layers": 126, "shared_layers": 0, "query_heads": 128, "kv_heads": 8, "head_dim": 128}
    real |= {"context": 32_768, "batch": 1}
    assert readings("128 GiB", real) == []
    found = readings("128 GiB", {**real, "layers": 128, "kv_heads": 64})
    assert {(each["heads"], each["bits"]) for each in found} == {("KV", 16), ("query", 8)}
    assert settled(readings("15.75 GiB", real))["heads"] == "KV"


# 13.3


def test_an_experiment_may_use_numpy() -> None:
    def smallest(spread: float, n: int, t95: Any, t80: Any) -> Any:
        return np.float64(spread) * n**-0.5 * sum(each.get(n - 1) for each in (t95, t80))

    def seeds(spread: float, difference: float, t95: Any, t80: Any) -> Any:
        n = 2
        while smallest(spread, n, t95, t80) > difference:
            n += 1
            if n > 31:
                return None
        return np.int64(n)

    def experiment(claim: Any, measure: Any, t95: Any, t80: Any) -> Any:
        n = seeds(claim["spread"], claim["difference"], t95, t80)
        if n is None:
            return [0, "undecided"]
        found = np.array([measure(int(seed)) for seed in reversed(range(n))], dtype=float)
        found = found[~np.isnan(found)] - claim["at_most"]
        if len(found) > 1:
            half = t95[len(found) - 1] * found.std(ddof=1) / len(found) ** 0.5
            if abs(found.mean()) > half:
                return n, "refuted" if found.mean() > 0 else "supported"
        return n, "undecided"

    assert full_marks("13.3", smallest, seeds, experiment)
    assert earned(check("13.3", smallest, stub, stub)) == [2, 0, 0, 0, 0, 0, 0]
    assert earned(check("13.3", smallest, seeds, lambda *a: (0, "undecided"))) == [2, 1, 1, 0, 0, 1, 0]


def test_a_planned_experiment_detects_what_it_was_planned_for() -> None:
    """Four in five, and it refutes a true claim in at most one of forty; simulated."""
    _, seeds, experiment = ours("13.3")
    spread, difference, n_trials = 0.01, 0.012, 600
    generator = np.random.default_rng(3)
    claim = {"at_most": 0.02, "difference": difference, "spread": spread}
    n = seeds(spread, difference, CHECKS.T95, CHECKS.T80)
    rates = []
    for true in (claim["at_most"], claim["at_most"] + difference):
        values = generator.normal(true, spread, (n_trials, n))
        found = [experiment(claim, row.__getitem__, CHECKS.T95, CHECKS.T80)[1] for row in values]
        rates.append(found.count("refuted") / n_trials)
    assert rates[0] < 0.05
    assert 0.7 < rates[1] < 0.92


# 13.4


def test_a_table_may_be_computed_per_token() -> None:
    def users(model: Any, gpu: Any, given: Any) -> Any:
        room = Fraction(gpu["memory"]) * (1 - Fraction(given["reserve"])) - Fraction(model["weights"])
        return max(np.int64(0), np.int64(math.floor(room / Fraction(model["cache"]))))

    def dollars(model: Any, gpu: Any, given: Any) -> Any:
        n = int(users(model, gpu, given))
        if n < 1:
            return float("inf")
        memory = (model["weights"] / n + model["cache"]) / gpu["bandwidth"]
        per_token = np.array([memory, model["flops"] / gpu["flops"]])
        return torch.tensor(per_token).max() / given["reached"] / given["busy"] * gpu["price"] * 1e6 / 3600

    def factor(model: Any, gpu: Any, given: Any, ratio: float) -> Any:
        most = ratio * dollars(model, gpu, given)
        prices = (dollars({**model, "cache": model["cache"] / k}, gpu, given) for k in range(1, 1025))
        return next((k for k, price in enumerate(prices, 1) if price <= most), None)

    _, _, _, decisive = ours("13.4")
    assert full_marks("13.4", users, dollars, factor, decisive)
    assert earned(check("13.4", users, dollars, stub, stub)) == [1, 1, 1, 1, 0, 0, 0]
    assert earned(check("13.4", stub, stub, factor, decisive)) == [0, 0, 0, 0, 2, 1, 1]


def test_the_price_is_that_of_the_course() -> None:
    load, device = Load.of(MODELS["Llama 3.1 8B"], 32_768), DEVICES["A100 80 GB"]
    model = {"weights": load.weights, "cache": load.stored, "flops": load.flops}
    gpu = {"memory": device.memory, "bandwidth": device.bandwidth, "flops": device.peak, "price": 2.0}
    given = {"reserve": 0.1, "reached": 0.6, "busy": 0.5}
    users, dollars, _, _ = ours("13.4")
    assert users(model, gpu, given) == users_per_device(load, device.memory)
    want = dollars_per_million(load, device, 2.0, efficiency=0.6, busy=0.5)
    assert dollars(model, gpu, given) == pytest.approx(want, rel=0.01)  # a step writes a little, too


# 13.5


def test_a_table_may_be_read_with_numpy() -> None:
    def baseline(rows: Any, name: str) -> Any:
        most = next(row["bytes"] for row in rows if row["name"] == name)
        fair = sorted(
            (np.mean(list(row["losses"].values())), row["name"])
            for row in rows
            if row["kind"] == "baseline" and row["bytes"] <= most
        )
        return fair[0][1] if fair else None

    def verdicts(rows: Any, names: Any, quantile: Any) -> Any:
        table, found = {row["name"]: row["losses"] for row in rows}, {}
        against = [baseline(rows, name) for name in names]
        for name, other in zip(names, against, strict=True):
            if other is None:
                found[name] = "no baseline"
                continue
            both = sorted(set(table[name]) & set(table[other]))
            d = np.array([table[name][seed] - table[other][seed] for seed in both])
            found[name] = "undecided"
            if len(d) > 1:
                t = -quantile(0.025 / (len(names) - against.count(None)), len(d) - 1)
                statistic = d.mean() / (d.std(ddof=1) / len(d) ** 0.5)
                if abs(statistic) > t:
                    found[name] = "supported" if statistic < 0 else "refuted"
        return found

    assert full_marks("13.5", lambda m, level: -math.expm1(m * math.log1p(-level)), baseline, verdicts)
    assert earned(check("13.5", stub, baseline, stub)) == [0, 1, 1, 0, 0, 0]
    assert earned(check("13.5", stub, stub, verdicts)) == [0, 0, 0, 2, 2, 1]


# 13.7


def notebook(**changes: Any) -> dict[str, Any]:
    """The names of a solved notebook, and these in place of some."""
    return dict(zip(MODEL.answers, ours("13.7"), strict=True)) | changes


def points(**changes: Any) -> list[float]:
    names = notebook(**changes)
    return earned(check("13.7", *(names[each] for each in MODEL.answers), notebook=names))


def test_the_board_may_be_computed_by_torch() -> None:
    def entry(m: Any, full: Any, texts: Any, length: int) -> Any:
        ours, theirs = [m.losses(x) for x in texts], [full.losses(x) for x in texts]
        d = torch.stack([(a - b).mean() for a, b in zip(ours, theirs, strict=True)])
        return {
            "bytes": Fraction(m.nbytes(length)) / length,
            "loss": torch.cat(ours).mean(),
            "excess": d.mean(),
            "error": d.std() / len(d) ** 0.5,
        }

    def front(board: Any) -> Any:
        best, names = math.inf, []
        ordered = sorted(board, key=lambda name: (board[name]["bytes"], board[name]["loss"]))
        for name in ordered:
            loss, same = board[name]["loss"], names and board[names[-1]] == board[name]
            if loss < best or (same and loss == best):
                names.append(name)
                best = loss
        return names

    assert points(entry=entry) == [1] * 8
    assert points(entry=entry, assemble=stub, front=stub) == [1, 1, 1, 0, 0, 0, 0, 0]
    assert points(entry=stub, assemble=stub)[5:] == [1, 1, 0]


def test_no_point_depends_on_other_units() -> None:
    assert earned(check("13.7", *ours("13.7"), notebook={})) == [1] * 8
    assert not any(requirement.reads_answers for requirement in MODEL.requirements)


SMALL = ("full", "08 ring of 2", "09 blocks")


@pytest.fixture
def small_course(monkeypatch: pytest.MonkeyPatch) -> None:
    """A course of a few mechanisms, on short texts."""
    monkeypatch.setattr(CHECKS, "LENGTH", 64)
    monkeypatch.setattr(CHECKS, "COURSE", {name: CHECKS.COURSE[name] for name in SMALL})
    monkeypatch.setattr(CHECKS, "OURS", {"gqa, 2 heads": CHECKS.OURS["gqa, 2 heads"]})


def test_the_course_on_one_board(small_course: None) -> None:
    shown = workbench.compare("13.7", notebook())
    rows = {name: values for name, *values in shown.rows}
    per_token = 4 * 2 * 8 * 16 * 4
    assert float(rows["full"][0].replace(",", "")) == per_token
    assert float(rows["08 ring of 2"][0].replace(",", "")) == per_token / 2
    shared = 0.75 / 8 + 0.25  # three quarters are stored once for eight users
    assert float(rows["09 blocks"][0].replace(",", "")) == pytest.approx(per_token * shared, rel=0.01)
    assert float(rows["gqa, 2 heads"][0].replace(",", "")) == per_token / 4
    assert rows["full"][1] == rows["08 ring of 2"][1] == rows["09 blocks"][1], "they are exact"
    assert float(rows["gqa, 2 heads"][1]) > float(rows["full"][1])
    whose = {part.name: part.why for part, _ in shown.parts}
    assert whose["entry"] == ""
    assert whose["full"] == "this is not your copy in work/"
    assert len(shown.picture.data["points"]) == 4
    assert "kvlearn&#x27;s (this is not your copy in work/)" in shown._repr_mimebundle_()["text/html"]


def test_every_mechanism_of_the_course_is_of_a_unit_that_ends_in_your_model() -> None:
    sources = {source for source, _, _ in CHECKS.COURSE.values()}
    assert sources == {name for name, each in exercises().items() if each.wiring} - {"13.7"}
    for source, names, _ in CHECKS.COURSE.values():
        assert set(names) <= set(find_exercise(source).answers)
    assert set(REGISTRY) >= {"gqa", "window", "mhc"}


@pytest.mark.parametrize("make", [CHECKS.hybrid, CHECKS.configured])
def test_a_choice_of_the_learner_becomes_a_decoder(make: Callable[..., Any]) -> None:
    source, names, _ = next(each for each in CHECKS.COURSE.values() if each[2] is make)
    made = make(CHECKS.collected(source, names)[0])
    full = CHECKS.of_decoder(workbench.base_model())
    assert 0 < made.nbytes(512) < full.nbytes(512)
    text = CHECKS.base_texts(1, 80)[0]
    assert made.losses(text).shape == (79,)
    assert bool(made.losses(text).isfinite().all())


def test_a_board_is_kept_in_the_learners_copy_alone(
    small_course: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / ".kvlearn").mkdir(parents=True)
    (work / "13_verdict").mkdir()
    monkeypatch.setenv("KVLEARN_WORK", str(work))
    workbench.compare("13.7", notebook())
    assert certificate.read_points(work) is None
    monkeypatch.chdir(work / "13_verdict")
    workbench.compare("13.7", notebook(front=stub))
    assert certificate.read_points(work) is None, "13.7 is not solved"
    workbench.compare("13.7", notebook())
    board = certificate.read_points(work)
    assert board is not None
    assert (board.exercise, len(board.points)) == ("13.7", 4)
    assert json.loads(certificate.file_of(work).read_text())["schema"] == 1
    with pytest.raises(NotWritten, match="there is no 01_full_attention in work/ yet"):
        CHECKS.solved_answers("13.7", "01.9")
