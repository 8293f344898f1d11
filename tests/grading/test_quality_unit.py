"""Unit 10 takes right answers of every style, gives points for half of one, and trains a model."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from answers import earned, full_marks, right, stub, unit_module
from torch import Tensor

from kvlearn.grading import check, find_exercise
from kvlearn.study.quality import statistics

pytestmark = pytest.mark.answers

CHECKS = unit_module("10_quality", "checks")


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


# 10.1


def by_take_along(batches: Any, token_bytes: Tensor) -> Any:
    bits, sizes = [], []
    for logits, tokens, start, length in batches:
        x = logits.double().numpy()
        x = x - x.max(-1, keepdims=True)
        logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
        for b, row in enumerate(tokens.numpy()):
            for p in range(1, len(row)):
                if start[b] <= p < length[b]:
                    bits.append(-logp[b, p - 1, row[p]] / np.log(2))
                    sizes.append(int(token_bytes[row[p]]))
    return [np.float32(2.0 ** np.mean(bits)), np.sum(bits) / np.sum(sizes)]


@pytest.mark.parametrize("answer", [by_take_along, CHECKS.quality_reference, CHECKS.library_quality])
def test_perplexity_may_be_summed_in_any_way(answer: Any) -> None:
    assert full_marks("10.1", answer)


def test_perplexity_alone_earns_six_of_seven() -> None:
    (quality,) = ours("10.1")
    assert earned(check("10.1", lambda *args: (quality(*args)[0], math.nan))) == [1, 1, 1, 2, 1, 0]
    assert earned(check("10.1", lambda *args: torch.tensor(quality(*args)).flip(0))) == [0] * 6


# 10.2


def by_weights(losses: Tensor, mask: Tensor, edges: Any, same_rows: bool = False) -> Any:
    """Sums of weighted losses, in fp64, with NaN replaced before."""
    position = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    if same_rows:
        position[position.amax(1) < edges[-1] - 1] = -1
    bucket = torch.bucketize(position, torch.tensor(edges), right=True) - 1
    clean = losses.nan_to_num(0.0).double()
    sums = [clean[bucket == i].sum() for i in range(len(edges) - 1)]
    counts = [int((bucket == i).sum()) for i in range(len(edges) - 1)]
    return torch.stack(sums) / torch.tensor(counts), counts


def in_numpy(losses: Tensor, mask: Tensor, edges: Any, same_rows: bool = False) -> Any:
    means, counts = CHECKS.position_reference(losses, mask, edges, same_rows)
    return np.array(means), np.array(counts)


@pytest.mark.parametrize("answer", [by_weights, in_numpy, CHECKS.position_reference])
def test_positions_may_be_counted_in_any_way(answer: Any) -> None:
    assert full_marks("10.2", answer)


def test_half_of_10_2() -> None:
    (positions,) = ours("10.2")

    def all_rows(losses: Tensor, mask: Tensor, edges: Any, same_rows: bool = False) -> Any:
        return positions(losses, mask, edges)

    assert earned(check("10.2", all_rows)) == [1, 2, 1, 1, 0]
    assert earned(check("10.2", lambda *args, **more: (positions(*args, **more)[0], [0]))) == [1, 2, 0, 0, 2]


# 10.3


def by_places(batch: int, n_pairs: int, length: int, n_keys: int, n_values: int, generator: Any) -> Any:
    """Python's own random numbers, seeded by the generator; places drawn until each query is behind its
    pair."""
    rng = random.Random(int(torch.randint(2**40, (), generator=generator)))
    rows, asked, answers = [], [], []
    for _ in range(batch):
        while True:
            row = [0] * length
            pieces = [(2, p) for p in range(n_pairs)] + [(1, p) for p in range(n_pairs)]
            pieces += [(1, -1)] * (length - 3 * n_pairs)
            rng.shuffle(pieces)
            keys = rng.sample(range(1, n_keys + 1), n_pairs)
            values = rng.sample(range(n_keys + 1, n_keys + n_values + 1), n_pairs)
            at, pair_at, query_at = 0, {}, {}
            for size, p in pieces:
                if p >= 0:
                    (pair_at if size == 2 else query_at)[p] = at
                    row[at : at + size] = [keys[p], values[p]][:size]
                at += size
            late = [p for p in query_at if query_at[p] < pair_at[p]]
            if len(late) <= 1:
                break
        for p in late:  # exchange the two
            row = mended(row, pair_at, query_at, p)
        rows.append(row)
        order = sorted(query_at, key=query_at.__getitem__)
        asked.append([query_at[p] for p in order])
        answers.append([values[p] for p in order])
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(asked), torch.tensor(answers)


def mended(row: list[int], pair_at: dict[int, int], query_at: dict[int, int], p: int) -> list[int]:
    """The row with pair and query p exchanged; what lies between moves one place on."""
    q, s = query_at[p], pair_at[p]
    row = [*row[:q], row[s], row[s + 1], *row[q + 1 : s], row[s], *row[s + 2 :]]
    for places in (pair_at, query_at):
        for other, at in places.items():
            places[other] = at + 1 if q < at < s else at
    pair_at[p], query_at[p] = q, s + 1
    return row


def by_walking(tokens: Tensor, asked: Tensor, answers: Tensor, n_keys: int) -> Any:
    good = []
    for row, places, wanted in zip(tokens.numpy(), asked, answers, strict=True):
        fine = True
        for place, want in zip(places.tolist(), wanted.tolist(), strict=True):
            key = row[place]
            is_key = 0 < key <= n_keys
            behind = [s for s in range(len(row) - 1) if is_key and row[s] == key and row[s + 1] > n_keys]
            fine &= len(behind) == 1 and behind[0] < place and row[behind[0] + 1] == want
            fine &= int((row == want).sum()) == 1
        good.append(bool(fine))
    return good


def test_a_recall_batch_may_be_made_and_proved_in_any_way() -> None:
    assert full_marks("10.3", by_places, by_walking)
    assert full_marks("10.3", by_places, lambda *args: torch.tensor(by_walking(*args)).long())


def test_each_half_of_10_3_earns_its_own() -> None:
    make, prove = ours("10.3")
    assert earned(check("10.3", make, stub)) == [1, 2, 1, 0, 0, 0, 0]
    assert earned(check("10.3", stub, prove)) == [0, 0, 0, 1, 1, 1, 1]
    assert earned(check("10.3", make, lambda tokens, *_: torch.ones(len(tokens)) > 0))[3:] == [0] * 4


# 10.4


def by_statistics(losses: Any, other: Any, t95: Any) -> Any:
    def clean(runs: Any) -> Any:
        return {s: None if loss is None or loss != loss else loss for s, loss in runs.items()}

    values = statistics.paired_values(clean(losses), clean(other))
    found = statistics.paired_difference(values)
    return list(found[1:]) if found else (values[0], float("-inf"), np.inf)


def in_numpy_too(losses: Any, other: Any, t95: Any) -> Any:
    seeds = sorted(set(losses) & set(other))
    d = np.array([losses[s] for s in seeds], dtype=float) - np.array([other[s] for s in seeds], dtype=float)
    d = d[np.isfinite(d)]
    if len(d) == 1:
        return np.array([d[0], -np.inf, np.inf])
    half = t95[len(d) - 1] * np.std(d, ddof=1) / len(d) ** 0.5
    return np.array([d.mean(), d.mean() - half, d.mean() + half])


def by_counting(a: Tensor, b: Tensor, tokens: Tensor, picks: Tensor) -> Any:
    """How often each text was drawn, as a matrix."""
    counts = torch.zeros(len(picks), len(a), dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=torch.float64)
    )
    values = (counts @ (a - b).double()) / (counts @ tokens.double())
    return np.percentile(values.numpy(), [2.5, 97.5])


def in_words(low: float, high: float, margin: float) -> str:
    if not low <= 0 <= high:
        return "worse" if low > 0 else "better"
    return "cannot tell" if low < -margin or high > margin else "tie"


def test_intervals_may_be_computed_in_any_way() -> None:
    assert full_marks("10.4", in_numpy_too, by_counting, in_words)
    assert full_marks("10.4", in_numpy_too, CHECKS.resampled, CHECKS.library_verdict)


def test_each_part_of_10_4_earns_its_own() -> None:
    interval, bootstrap, verdict = ours("10.4")
    assert earned(check("10.4", interval, stub, stub)) == [1, 1, 1, 0, 0, 0, 0]
    assert earned(check("10.4", stub, bootstrap, stub)) == [0, 0, 0, 1, 1, 0, 0]
    assert earned(check("10.4", stub, stub, verdict)) == [0, 0, 0, 0, 0, 1, 2]
    assert earned(check("10.4", by_statistics, bootstrap, verdict))[:3] == [0, 0, 0]


# 10.5


def front_by_sweep(rows: Any, n_tokens: int) -> Any:
    """From small to large: a row stays if it is better than all smaller ones, or the equal of one that
    stays."""
    kept: list[Any] = []
    size = {row["name"]: CHECKS.bytes_at(row, n_tokens) for row in rows}
    for row in sorted((r for r in rows if r["loss"] is not None), key=lambda r: (size[r["name"]], r["loss"])):
        last = (kept[-1]["loss"], size[kept[-1]["name"]]) if kept else (math.inf, 0)
        if row["loss"] < last[0] or (row["loss"], size[row["name"]]) == last:
            kept.append(row)
    return tuple(row["name"] for row in kept)


def test_a_front_may_be_swept_and_names_may_be_sets() -> None:
    _, alike, _ = ours("10.5")
    assert full_marks("10.5", front_by_sweep, lambda *args: set(alike(*args)), CHECKS.take_reference)


def test_each_part_of_10_5_earns_its_own() -> None:
    front, alike, take = ours("10.5")
    assert earned(check("10.5", front, stub, stub)) == [1, 1, 1, 0, 0]
    assert earned(check("10.5", stub, alike, take)) == [0, 0, 0, 2, 2]
    assert earned(check("10.5", lambda *args: front(*args)[::-1], alike, lambda *_: None)) == [0, 0, 0, 2, 0]


# 10.6


def test_faults_may_be_a_list_with_a_name_twice_in_no_order() -> None:
    (faults,) = ours("10.6")
    assert full_marks("10.6", lambda *args: sorted(faults(*args), reverse=True))
    assert full_marks("10.6", lambda *args: tuple(faults(*args)))


def test_a_constant_earns_nothing_and_one_name_its_own_points() -> None:
    (faults,) = ours("10.6")
    assert earned(check("10.6", lambda *_: set())) == [0] * 8
    assert earned(check("10.6", lambda *_: set(CHECKS.FAULTS))) == [0] * 8
    for i, name in enumerate(CHECKS.FAULTS):
        want = [0] * 8
        want[i] = 2 if name == "reported" else 1
        assert earned(check("10.6", lambda *args, name=name: faults(*args) & {name})) == want


def test_the_example_of_10_6_is_as_the_task_says() -> None:
    (faults,) = ours("10.6")
    space: dict[str, Any] = {}
    for cell in find_exercise("10.6").set_up:
        exec(cell, space)
    assert faults(space["example_claim"], space["example_runs"]) == {"tuning", "reported"}


# 10.7


def short_rows(n_tokens: int, longest: int) -> Any:
    return np.array([n_tokens // (4 * longest), 4, longest])


def trapezoid(step: int, steps: int) -> Tensor:
    return torch.tensor(0.01 * min(1.0, (step + 1) / 8, max((steps - step) / (steps / 2), 0.05)))


def by_loops(grads: list[Tensor]) -> list[Tensor]:
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
    factor = 1.0 if norm <= 0.5 else 0.5 / norm
    return [factor * g for g in grads]


def in_place(grads: list[Tensor]) -> list[Tensor]:
    norm = torch.cat([g.flatten() for g in grads]).norm()
    for g in grads:
        g.mul_(min(1.0, 2.0 / float(norm + 1e-9)))
    return grads


def of_layers(name: str, weight: Tensor) -> Any:
    return np.float64(0.01) if name.startswith("layers") and weight.dim() == 2 else 0


def test_recipes_of_every_style_earn_the_functions_without_parts() -> None:
    for recipe in (
        (short_rows, trapezoid, of_layers, by_loops),
        (lambda n, longest: [n // (8 * longest), 8, longest], trapezoid, of_layers, in_place),
    ):
        assert earned(check("10.7", *recipe)) == [1, 1, 1, 2, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.xdist_group("10.7")
def test_a_recipe_as_good_has_all_points_and_a_bad_one_loses_the_last() -> None:
    assert earned(check_whole(short_rows, trapezoid, of_layers, by_loops)) == [1, 1, 1, 2, 1, 1, 2]
    layout, rate, decay, clip = ours("10.7")
    assert earned(check_whole(layout, lambda *args: rate(*args) / 30, decay, clip)) == [1, 1, 1, 2, 1, 1, 0]


def check_whole(*recipe: Any) -> Any:
    """The check with the answers to the other exercises in the notebook."""
    names = {
        name: answer
        for source in ("10.1", "10.2", "10.4")
        for name, answer in zip(find_exercise(source).answers, ours(source), strict=True)
    }
    return check("10.7", *recipe, notebook=names)
