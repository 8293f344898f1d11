"""Unit 05 takes right answers of every style, agrees with the course's mechanisms, and says what is wrong."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import earned, full_marks, names, right, unit_module
from torch import Tensor

from kvlearn.attention import MixtureOfBlockAttention, SparseAttention
from kvlearn.attention.core import split_heads
from kvlearn.attention.patterns import (
    bigbird,
    live_tokens,
    longformer,
    n_slots,
    parse,
    sparse_transformer,
    sparse_transformer_fixed,
)
from kvlearn.grading import check, find_exercise

pytestmark = pytest.mark.answers

CHECKS = unit_module("05_sparse_attention", "checks")
IDS = [f"05.{n}" for n in range(1, 8)]


# Right answers of other styles


def strided_by_loops(n: int, stride: int) -> Tensor:
    return torch.tensor(
        [[j <= i and (i - j < stride or (i - j) % stride == 0) for j in range(n)] for i in range(n)]
    )


def fixed_by_columns(n: int, block: int, summary: int) -> Tensor:
    mask = torch.block_diag(*[torch.ones(block, block)] * -(-n // block))[:n, :n].bool()
    for place in range(block - summary, block):
        mask[:, place::block] = True
    return mask.tril()


def union_by_running_sums(q: Tensor, k: Tensor, v: Tensor, blocks: list[list[int]], block: int) -> Tensor:
    """Block by block, with a running maximum: no list is ever joined."""
    outs, keys, values = [], k.split(block, 2), v.split(block, 2)
    for own, rows in enumerate(q.split(block, 2)):
        best = torch.full_like(rows[..., :1], -torch.inf)
        top, bottom = torch.zeros_like(rows), torch.zeros_like(best)
        for c in sorted(blocks[own]):
            scores = rows @ keys[c].mT / q.shape[-1] ** 0.5
            if c == own:
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(hidden, -torch.inf)
            new = torch.maximum(best, scores.amax(-1, keepdim=True))
            exp, keep = (scores - new).exp(), (best - new).exp()
            top, bottom, best = top * keep + exp @ values[c], bottom * keep + exp.sum(-1, keepdim=True), new
        outs.append(top / bottom)
    return torch.cat(outs, 2)


def union_query_by_query(q: Tensor, k: Tensor, v: Tensor, blocks: list[list[int]], block: int) -> Tensor:
    out = torch.empty_like(q)
    for i in range(q.shape[2]):
        seen = [s for c in blocks[i // block] for s in range(c * block, (c + 1) * block) if s <= i]
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, i], k[:, :, seen]) / q.shape[-1] ** 0.5
        out[:, :, i] = torch.einsum("bhs,bhsd->bhd", F.softmax(scores, -1), v[:, :, seen])
    return out


def kept_by_last_reader(mask: Tensor) -> Tensor:
    last = [max(column.nonzero().flatten().tolist(), default=-1) for column in mask.T]
    return torch.tensor([[j <= t <= last[j] for j in range(len(mask))] for t in range(len(mask))])


def slots_by_free_list(mask: Tensor) -> int:
    """As a cache would: take a free slot or a new one, give it back after the last reader."""
    free: list[int] = []
    taken: dict[int, int] = {}
    n = 0
    for t in range(len(mask)):
        if mask[:, t].any():
            taken[t] = free.pop() if free else n
            n = max(n, taken[t] + 1)
        free += [taken.pop(j) for j in list(taken) if not mask[t + 1 :, j].any()]
    return n


def select_by_topk(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """Block of queries by block, topk over the candidates; ties broken by a shift too small for anything
    else."""
    B, H, T, _ = q.shape
    picked = torch.zeros(B, H, T, -(-T // block), dtype=torch.bool)
    for own in range(picked.shape[-1]):
        rows = slice(own * block, (own + 1) * block)
        picked[:, :, rows, own] = True
        n = min(own, n_blocks - 1)
        if n:
            means = torch.stack([k[:, :, c * block : (c + 1) * block].mean(2) for c in range(own)], 2)
            scores = (q[:, :, rows] @ means.mT).double() - 1e-9 * torch.arange(own)
            picked[:, :, rows].scatter_(-1, scores.topk(n, dim=-1).indices, True)
    return picked


def select_with_the_own_one_in_front(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The own block at +∞ takes one of n_blocks places; a place at −∞ is none."""
    T = q.shape[2]
    n = -(-T // block)
    filled = torch.cat((k, k.new_zeros(*k.shape[:2], n * block - T, k.shape[3])), 2)
    scores = torch.einsum("bhtd,bhnd->bhtn", q, filled.unflatten(2, (n, block)).mean(3))
    own, c = (torch.arange(T) // block)[:, None], torch.arange(n)
    scores = torch.where(c < own, scores, torch.where(c == own, torch.inf, -torch.inf))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(-1)
    return (place < n_blocks) & (scores > -torch.inf)


def select_query_by_query(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    picked = torch.zeros(*q.shape[:3], (q.shape[2] + block - 1) // block, dtype=torch.bool)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        own = i // block
        scores = [float(q[b, h, i] @ k[b, h, c * block : (c + 1) * block].mean(0)) for c in range(own)]
        for c in [own, *sorted(range(own), key=lambda c: -scores[c])[: n_blocks - 1]]:
            picked[b, h, i, c] = True
    return picked


def union_by_logsumexp(q: Tensor, k: Tensor, v: Tensor, blocks: list[list[int]], block: int) -> Tensor:
    rows = []
    for i, query in enumerate(q.split(1, dim=2)):
        seen = [s for c in blocks[i // block] for s in range(c * block, min((c + 1) * block, i + 1))]
        scores = torch.einsum("bhtd,bhsd->bhts", query, k[:, :, seen]) / q.shape[3] ** 0.5
        rows.append((scores - scores.logsumexp(-1, keepdim=True)).exp() @ v[:, :, seen])
    return torch.cat(rows, 2)


def step_head_by_head(q, k, v, keys, values, means, block, n_blocks):  # type: ignore[no-untyped-def]
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    S = keys.shape[2]
    own = (S - 1) // block
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            order = sorted(range(own), key=lambda c: -float(q[b, h, 0] @ means[b, h, c]))
            chosen = [*sorted(order[: n_blocks - 1]), own]
            seen = torch.cat([torch.arange(c * block, min((c + 1) * block, S)) for c in chosen])
            out[b, h] = F.scaled_dot_product_attention(q[b, h], keys[b, h, seen], values[b, h, seen])
    if S % block == 0:
        means = torch.cat([means, keys.unflatten(2, (-1, block)).mean(3)[:, :, -1:]], 2)
    return [out, keys, values, means]


def bytes_by_positions(config: dict[str, Any], n: int) -> dict[str, Any]:
    size = 2 * config["kv_heads"] * config["head_dim"] * config["number_bytes"]
    if config["kind"] == "full":
        return {"stored": np.int64(n * size), "read": torch.tensor(n * size)}
    if config["kind"] == "longformer":
        both = sum(p < config["n_global"] or n - 1 - p < config["window"] for p in range(n)) * size
        return {"stored": both, "read": both}
    if config["kind"] == "bigbird":
        block = config["block"]
        own = (n - 1) // block
        must = {c for c in range(own) if c < config["n_global"] or own - c <= config["n_window"]}
        whole = min(len(must) + config["n_random"], own)
        return {"stored": n * size, "read": (whole * block + (n - own * block)) * size, "more": None}
    index = n * (config["index_dim"] * config["index_bytes"] + config["scale_bytes"])
    return {"stored": n * size + index, "read": min(config["top_k"], n) * size + index}


OTHER_STYLES = [
    ("05.1", (strided_by_loops, fixed_by_columns)),
    ("05.3", (union_by_running_sums,)),
    ("05.3", (union_query_by_query,)),
    ("05.3", (union_by_logsumexp,)),
    ("05.4", (kept_by_last_reader, slots_by_free_list)),
    ("05.5", (select_by_topk,)),
    ("05.5", (select_with_the_own_one_in_front,)),
    ("05.5", (select_query_by_query,)),
    ("05.6", (step_head_by_head,)),
    ("05.7", (bytes_by_positions,)),
]


@pytest.mark.parametrize(("exercise", "answers"), OTHER_STYLES)
def test_a_right_answer_in_another_style_earns_full_marks(exercise: str, answers: tuple[Any, ...]) -> None:
    assert full_marks(exercise, *answers)


def test_every_sentence_of_the_same_meaning_is_right() -> None:
    def longformer_by_name(window: int, n_global: int) -> str:
        return f"global(at={tuple(range(n_global))})|local(size = {window}) | local(1)"

    def bigbird_in_another_order(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
        near = f"local({block}, block={block}) | local({(n_window + 1) * block}, {block})"
        wide = f"global(first={block}) | global({n_global * block})"
        return f"random({n_random}, {block}, {n_global}, {n_window}, {seed}) | {wide} | {near}"

    assert full_marks("05.2", longformer_by_name, bigbird_in_another_order)


# The exercises ask for the course's own results


def test_the_masks_are_those_of_the_pattern_language() -> None:
    for n, size, summary in ((11, 3, 1), (17, 5, 2), (4, 6, 3)):
        assert torch.equal(CHECKS.classic_strided(n, size), sparse_transformer(size).mask(n))
        assert torch.equal(CHECKS.fixed(n, size, summary), sparse_transformer_fixed(size, summary).mask(n))


def test_our_sentences_mean_the_courses_longformer_and_bigbird() -> None:
    write_longformer, write_bigbird = right(find_exercise("05.2"))
    assert parse(write_longformer(5, 2)) == longformer(5, 2)
    assert parse(write_bigbird(4, 2, 1, 3, 9)) == bigbird(4, 3, n_window=2, n_global=1, seed=9)


@pytest.mark.parametrize(
    "sentence", ["local(4)", "local(2) | strided(5)", "local(3) | global(at=(6,))", "fixed(4, 1)"]
)
def test_what_is_kept_is_what_the_courses_slot_allocation_keeps(sentence: str) -> None:
    pattern = parse(sentence)
    kept = CHECKS.kept(pattern.mask(19))
    assert kept.sum(1).tolist() == live_tokens(pattern, 19).tolist()
    assert int(kept.sum(1).max()) == n_slots(pattern, 19)


def test_what_is_selected_is_what_moba_selects() -> None:
    layer = MixtureOfBlockAttention(24, 3, block=4, n_blocks=3, rope=None)
    x = torch.randn(2, 22, 24)
    q, k = split_heads(layer.q_proj(x), 3), split_heads(layer.k_proj(x), 3)
    assert torch.equal(CHECKS.select_reference(q, k, 4, 3), layer.selected_blocks(x))


def test_the_bytes_are_those_of_the_courses_mechanism() -> None:
    sizes = {"query_heads": 6, "kv_heads": 2, "head_dim": 8, "number_bytes": 4}
    window = {**sizes, "kind": "longformer", "window": 20, "n_global": 3}
    blocks = {**sizes, "kind": "bigbird", "block": 8, "n_window": 2, "n_global": 1, "n_random": 2}
    for config, pattern in ((window, longformer(20, 3)), (blocks, bigbird(8, 2, n_window=2))):
        layer = SparseAttention(48, 6, n_kv_heads=2, pattern=pattern)
        for n in (1, 5, 19, 22, 26, 45, 103):
            count = CHECKS.cache_bytes_count(config, n)
            assert count["read"] == layer.read_bytes(n)
            if config["kind"] == "longformer":
                assert count["stored"] == layer.cache_bytes(n)


# The worked examples of the tasks


def test_the_examples_of_the_tasks_are_true() -> None:
    strided_mask, fixed_mask = right(find_exercise("05.1"))
    rows = [
        mask[i].nonzero().flatten().tolist()
        for mask in (strided_mask(8, 3), fixed_mask(8, 3, 1))
        for i in (6, 7)
    ]
    assert rows == [[0, 3, 4, 5, 6], [1, 4, 5, 6, 7], [2, 5, 6], [2, 5, 6, 7]]

    sentences = [
        write(*given)
        for write, given in zip(right(find_exercise("05.2")), ((3, 2), (2, 1, 1, 1, 7)), strict=True)
    ]
    seen = [parse(s).mask(10)[i].nonzero().flatten().tolist() for s, i in zip(sentences, (6, 9), strict=True)]
    assert seen == [[0, 1, 4, 5, 6], [0, 1, 2, 3, 6, 7, 8, 9]]

    (attend,) = right(find_exercise("05.3"))
    v = torch.arange(6.0).reshape(1, 1, 6, 1)
    out = attend(torch.ones_like(v), torch.zeros_like(v), v, [[0], [1], [2, 0]], 2).flatten()
    assert out.tolist() == pytest.approx([0, 0.5, 2, 2.5, 5 / 3, 2.5])

    tokens_to_keep, slots = right(find_exercise("05.4"))
    mask = parse("local(2) | global(at=(3,))").mask(6)
    assert [row.nonzero().flatten().tolist() for row in tokens_to_keep(mask)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4], [3, 4, 5]
    ]  # fmt: skip
    assert slots(mask) == 4


def test_the_examples_of_selection_are_true() -> None:
    (choose,) = right(find_exercise("05.5"))
    k = torch.tensor([1.0, 3, -4, 0, 5, 1, 2]).reshape(1, 1, 7, 1)
    q = torch.ones_like(k)
    picked = [[c for c in range(4) if row[c]] for row in choose(q, k, 2, 2)[0, 0]]
    assert (picked[6], picked[5], picked[:2]) == ([2, 3], [0, 2], [[0], [0]])
    assert choose(-q, k, 2, 2)[0, 0, 6].tolist() == [False, True, False, True]

    (step,) = right(find_exercise("05.6"))
    keys, values = k[:, :, :5], torch.arange(5.0).reshape(1, 1, 5, 1)
    one = torch.ones(1, 1, 1, 1)
    means = torch.tensor([2.0, -2]).reshape(1, 1, 2, 1)
    out, keys, values, means = step(one, one, 5 * one, keys, values, means, 2, 2)
    weights = torch.tensor([1.0, 3, 5, 1]).softmax(0)
    assert float(out) == pytest.approx(float(weights @ torch.tensor([0.0, 1, 4, 5])), rel=1e-5)
    assert means.flatten().tolist() == [2, -2, 3]
    *_, means = step(one, one, one, keys, values, means, 2, 2)
    assert means.flatten().tolist() == [2, -2, 3]


def test_the_example_of_bytes_is_true() -> None:
    (count,) = right(find_exercise("05.7"))
    sizes = {"query_heads": 6, "kv_heads": 2, "head_dim": 4, "number_bytes": 2}
    designs: list[dict[str, Any]] = [
        {"kind": "full"},
        {"kind": "longformer", "window": 16, "n_global": 4},
        {"kind": "bigbird", "block": 8, "n_window": 1, "n_global": 1, "n_random": 2},
        {"kind": "indexed", "top_k": 10, "index_dim": 6, "index_bytes": 1, "scale_bytes": 4},
    ]
    counted = [tuple(count({**sizes, **design}, 100).values()) for design in designs]
    assert counted == [(3200, 3200), (640, 640), (3200, 1152), (4200, 1320)]


# Differences without effect on the score


def test_the_courses_own_patterns_earn_nothing() -> None:
    score = check(
        "05.2",
        lambda w, g: str(longformer(w, g)),
        lambda b, w, g, r, s: str(bigbird(b, r, n_window=w, n_global=g, seed=s)),
    )
    assert float(score) == 0
    assert "calls kvlearn.attention.patterns.longformer" in score.message
    score = check(
        "05.1", lambda n, s: sparse_transformer(s).mask(n), lambda n, b, s: parse(f"fixed({b}, {s})").mask(n)
    )
    assert float(score) == 0
    assert "kvlearn.attention.patterns.sparse_transformer" in score.message


def test_pytorchs_attention_earns_nothing_in_the_block_softmax() -> None:
    def ready_made(q: Tensor, k: Tensor, v: Tensor, blocks: list[list[int]], block: int) -> Tensor:
        outs = []
        for own, rows in enumerate(q.split(block, 2)):
            at = torch.cat([torch.arange(q.shape[2]).split(block)[c] for c in blocks[own]])
            mask = at <= torch.arange(q.shape[2]).split(block)[own][:, None]
            outs.append(F.scaled_dot_product_attention(rows, k[:, :, at], v[:, :, at], attn_mask=mask))
        return torch.cat(outs, 2)

    score = check("05.3", ready_made)
    assert float(score) == 0
    assert "calls torch's scaled_dot_product_attention" in score.message


@pytest.mark.parametrize("exercise", IDS)
def test_an_answer_that_returns_nothing_is_not_called_a_known_mistake(exercise: str) -> None:
    score = check(exercise, *[lambda *a, **k: None] * len(find_exercise(exercise).answers))
    assert float(score) == 0
    assert score.mistakes == ()


# Half right


def test_masks_of_numbers_lose_the_point_for_the_form_alone() -> None:
    strided, fixed = right(find_exercise("05.1"))
    score = check("05.1", lambda *a: strided(*a).int(), lambda *a: fixed(*a)[None].float())
    assert earned(score) == [0, 1, 1, 1, 1, 1]
    score = check("05.1", lambda *a: strided(*a).numpy(), lambda *a: fixed(*a).numpy())
    assert earned(score) == [0, 1, 1, 1, 1, 1]
    (choose,) = right(find_exercise("05.5"))
    assert earned(check("05.5", lambda *a: choose(*a).long())) == [0, 1, 1, 1, 1, 1]


def test_a_seed_of_ones_own_is_not_called_a_missing_draw() -> None:
    write_longformer, write_bigbird = right(find_exercise("05.2"))
    score = check("05.2", write_longformer, lambda b, w, g, r, seed: write_bigbird(b, w, g, r, 7))
    assert earned(score) == [1, 1, 1, 0, 0]
    assert names(score) == ["the seed left out, or always the same"]


def test_a_part_of_a_sentence_earns_its_points() -> None:
    write_longformer, _ = right(find_exercise("05.2"))

    def near_alone(block: int, n_window: int, *others: int) -> str:
        return f"local({(n_window + 1) * block}, block={block})"

    score = check("05.2", write_longformer, near_alone)
    assert earned(score) == [1, 1, 0, 0, 0]
    assert "a word global(…)" in score.rows[2].expected


def test_a_sentence_that_cannot_be_read_is_shown_with_the_reason() -> None:
    _, write_bigbird = right(find_exercise("05.2"))
    score = check("05.2", lambda w, g: f"window({w}) | global({g})", write_bigbird)
    assert earned(score) == [0, 1, 1, 2, 1]
    assert "cannot be read" in score.message
    assert "'window'" in score.message
    score = check("05.2", lambda w, g: f"local({w} | global({g})", write_bigbird)
    assert "not understood" in score.message


def test_hiding_nan_does_not_make_a_dense_product_sparse() -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor, blocks: list[list[int]], block: int) -> Tensor:
        N = q.shape[2]
        seen = torch.tensor(
            [[j <= i and j // block in blocks[i // block] for j in range(N)] for i in range(N)]
        )
        scores = (q @ k.nan_to_num().mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v.nan_to_num()

    score = check("05.3", dense)
    assert earned(score) == [1, 2, 1, 0, 1]
    assert "N = 64" in score.rows[3].came


def test_slots_are_graded_apart_from_what_is_kept() -> None:
    _, slots = right(find_exercise("05.4"))
    assert earned(check("05.4", lambda mask: mask.T, slots)) == [0, 0, 0, 1, 1]


def test_a_state_that_is_wrong_leaves_the_points_for_the_output() -> None:
    (step,) = right(find_exercise("05.6"))
    score = check("05.6", lambda *given: (step(*given)[0], *given[3:6]))
    assert earned(score) == [0, 1, 0, 1, 1, 1]


def test_inputs_changed_in_place_are_noticed() -> None:
    (choose,) = right(find_exercise("05.5"))
    (attend,) = right(find_exercise("05.3"))

    def first(change: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *others: (change(x), then(x, *others))[1]

    assert earned(check("05.5", first(lambda q: q.mul_(2), choose)))[0] == 0
    assert "changed in place" in check("05.3", first(lambda q: q.add_(1e-6), attend)).rows[0].came


# Wrong answers that are not in the catalogue still get a message that helps


def test_an_unknown_mistake_is_told_by_place_and_number() -> None:
    strided, fixed = right(find_exercise("05.1"))
    score = check("05.1", lambda n, s: strided(n, s + 1), fixed)
    assert "strided" in score.message
    assert "elements differ" in score.message

    (count,) = right(find_exercise("05.7"))
    score = check("05.7", lambda c, n: {k: v + 1 for k, v in count(c, n).items()})
    assert "full, N = " in score.message
    assert names(score) == []

    (choose,) = right(find_exercise("05.5"))
    score = check("05.5", lambda q, k, block, n: choose(q, k.roll(block, 2), block, n))
    assert "elements differ" in score.message or "pick other blocks" in score.message


def test_two_mistakes_at_once_are_both_named() -> None:
    def mask(n: int, stride: int) -> Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        return (j <= i) & ((i - j < stride) | (j % stride == 0))

    def fixed(n: int, block: int, summary: int) -> Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        return (j <= i) & ((i // block == j // block) | (j % block == block - 1))

    assert set(names(check("05.1", mask, fixed))) == {
        "the stride counted from 0",
        "one summary token per block",
    }
