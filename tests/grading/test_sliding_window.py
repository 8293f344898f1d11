"""Unit 04 takes right answers of every style, and tells a learner what is missing or of the wrong kind."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import earned, full_marks, right, unit_module
from torch import Tensor

from kvlearn.attention import core
from kvlearn.grading import Score, check, find_exercise, judge, undefined_writes
from kvlearn.measure.cache_size import cache_bytes, read_bytes
from kvlearn.measure.models import MODELS

pytestmark = pytest.mark.answers

CHECKS = unit_module("04_sliding_window", "checks")
EXERCISES = ("04.1", "04.2", "04.3", "04.4", "04.5", "04.6", "04.7")


def row(score: Score, name: str) -> Any:
    return next(row for row in score.rows if row.name.startswith(name))


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


def test_a_mask_of_any_style_is_right() -> None:
    def by_triangles(T: int, S: int, W: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).tril(S - T).triu(S - T - W + 1)

    def cropped(T: int, S: int, W: int) -> Tensor:
        at = torch.arange(S)
        return ((at[:, None] >= at) & (at[:, None] - W < at))[-T:]

    assert full_marks("04.1", by_triangles)
    assert full_marks("04.1", cropped)


def test_a_mask_of_ones_and_zeros_loses_the_point_for_its_form_alone() -> None:
    (mask,) = ours("04.1")
    assert earned(check("04.1", lambda *sizes: mask(*sizes).long())) == [0, 1, 1, 1, 1]


def one_at_a_time(ring: Tensor, new: Tensor, start: int) -> Tensor:
    for i, token in enumerate(new.unbind(2)):
        ring[:, :, (start + i) % ring.shape[2]] = token
    return ring


def by_roll(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """The ring turned until the next slot comes first, shifted, and turned back."""
    W, at = ring.shape[2], start % ring.shape[2]
    T = new.shape[2]
    in_order = torch.cat((ring.roll(-at, 2), new), 2)[:, :, -W:]
    return in_order.roll((start + T) % W, 2)


def by_index_copy(ring: Tensor, new: Tensor, start: int) -> Tensor:
    new, end = new[:, :, -ring.shape[2] :], start + new.shape[2]
    return ring.index_copy(2, torch.arange(end - new.shape[2], end) % ring.shape[2], new)


def by_gather(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """Each slot asks for the newest token of its own, if the chunk has one."""
    W, T = ring.shape[2], new.shape[2]
    newest = T - 1 - (start + T - 1 - torch.arange(W)) % W
    return torch.where((newest >= 0)[:, None], new[:, :, newest.clamp(min=0)], ring)


def by_scatter_of_the_newest(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """A slot is named as often as it is written, but always with its newest token: defined, if wasteful."""
    W, T = ring.shape[2], new.shape[2]
    i = torch.arange(T)
    newest = T - 1 - (T - 1 - i) % W
    index = ((start + i) % W)[:, None].expand_as(new)
    return ring.scatter(2, index, new[:, :, newest])


def by_numpy(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """numpy does define it: the last one stays."""
    array = ring.numpy().copy()
    array[:, :, np.arange(start, start + new.shape[2]) % ring.shape[2]] = new.numpy()
    return torch.from_numpy(array)


RINGS = [one_at_a_time, by_roll, by_index_copy, by_gather, by_scatter_of_the_newest, by_numpy]


@pytest.mark.parametrize("write_ring", RINGS)
def test_a_ring_may_be_written_in_any_way(write_ring: Callable[..., Tensor]) -> None:
    assert full_marks("04.2", write_ring, ours("04.2")[1])


WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool]] = {
    "index_put": (lambda ring, new: ring.__setitem__((slice(None), [0, 1, 0]), new), True),
    "index_put, a number": (lambda ring, new: ring.__setitem__((slice(None), [0, 1, 0]), 7.0), False),
    "index_put, pairs": (lambda ring, new: ring.__setitem__(([0, 0], [1, 1]), new[:, 0]), True),
    "index_put, other pairs": (lambda ring, new: ring.__setitem__(([0, 1], [1, 1]), new[:, 0]), False),
    "index_put, a mask": (lambda ring, new: ring.__setitem__(torch.eye(2, 4).bool(), new[:, 0]), False),
    "index_copy": (lambda ring, new: ring.index_copy(1, torch.tensor([2, 3, 2]), new), True),
    "index_copy, in place": (lambda ring, new: ring.index_copy_(1, torch.tensor([2, 3, 1]), new), False),
    "scatter": (lambda ring, new: ring.scatter(1, torch.zeros_like(new).long(), new), True),
    "added up": (
        lambda ring, new: ring.index_put_((torch.tensor([0, 0]),), new[:, :1], accumulate=True),
        False,
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_whose_order_decides_is_noticed(write: str) -> None:
    act, undefined = WRITES[write]
    with undefined_writes() as found:
        act(torch.randn(2, 4, 5), torch.randn(2, 3, 5))
    assert found == ([write.split(",")[0]] if undefined else [])


def test_positions_of_any_type_count() -> None:
    write_ring, held = ours("04.2")
    for cast in (lambda x: x.tolist(), lambda x: tuple(x.tolist()), lambda x: x.int()):
        assert full_marks("04.2", write_ring, lambda n, W, cast=cast: cast(held(n, W)))
    assert full_marks("04.2", write_ring, lambda n, W: list(held(n, W).numpy()))
    assert full_marks("04.2", write_ring, lambda n, W: held(n, W).numpy())
    assert full_marks("04.2", write_ring, lambda n, W: list(held(n, W)))
    score = check("04.2", write_ring, lambda n, W: held(n, W).float())
    assert earned(score) == [1, 1, 1, 1, 0, 0]
    assert "whole numbers, one per slot" in row(score, "held_positions").expected


def test_numpys_mask_loses_the_point_for_its_form_alone() -> None:
    (mask,) = ours("04.1")
    assert earned(check("04.1", lambda *sizes: mask(*sizes).numpy())) == [0, 1, 1, 1, 1]


def token_by_token(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Any:
    """Prefill by decoding: one is written, one attends."""
    W, outs = ring_k.shape[2], []
    for i in range(q.shape[2]):
        ring_k[:, :, (start + i) % W], ring_v[:, :, (start + i) % W] = k[:, :, i], v[:, :, i]
        n = min(start + i + 1, W)
        outs.append(F.scaled_dot_product_attention(q[:, :, [i]], ring_k[:, :, :n], ring_v[:, :, :n]))
    return torch.cat(outs, 2), ring_k, ring_v


def in_storage_order(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Any:
    """The slots as they lie, the mask made from what each holds."""
    write_ring, held = ours("04.2")
    W, T = ring_k.shape[2], q.shape[2]
    at = torch.cat((held(start, W), torch.arange(start, start + T)))
    queries = at[W:, None]
    see = (at >= 0) & (at <= queries) & (at > queries - W)
    keys, values = torch.cat((ring_k, k), 2), torch.cat((ring_v, v), 2)
    scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~see, -torch.inf)
    return [scores.softmax(-1) @ values, write_ring(ring_k, k, start), write_ring(ring_v, v, start)]


def with_the_whole_past(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Any:
    """As if all tokens were there; those that have left the window are never seen."""
    W, n = ring_k.shape[2], start + q.shape[2]
    keys, values = (ring[:, :, torch.arange(start) % W] for ring in (ring_k, ring_v))
    keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
    scores = torch.einsum("bhtd,bhsd->bhts", q, keys) / math.sqrt(q.shape[3])
    see = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - W)[start:]
    out = torch.where(see, scores, -torch.inf).softmax(-1) @ values
    for p in range(max(0, n - W), n):
        ring_k[:, :, p % W], ring_v[:, :, p % W] = keys[:, :, p], values[:, :, p]
    return out, ring_k, ring_v


@pytest.mark.parametrize("window_prefill", [token_by_token, in_storage_order, with_the_whole_past])
def test_a_prefill_of_any_style_is_right(window_prefill: Callable[..., Any]) -> None:
    assert full_marks("04.3", window_prefill)


def test_a_chunk_written_before_it_attends_is_told_so() -> None:
    """The result is the same as that of trimming, in another way."""

    def written_first(
        q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        write_ring, held = ours("04.2")
        W, T = ring_k.shape[2], q.shape[2]
        ring_k, ring_v = write_ring(ring_k, k, start), write_ring(ring_v, v, start)
        at, queries = held(start + T, W), torch.arange(start, start + T)[:, None]
        see = (at >= 0) & (at <= queries) & (at > queries - W)
        return F.scaled_dot_product_attention(q, ring_k, ring_v, attn_mask=see), ring_k, ring_v

    score = check("04.3", written_first)
    assert [mistake.name for mistake in score.mistakes] == ["trimmed to W keys before attending"]
    assert earned(score) == [1, 0, 0, 0, 1]


def by_maximum(scores: Tensor, sink_logits: Tensor) -> Tensor:
    sinks = sink_logits[:, None, None]
    largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    exp = (scores - largest).exp()
    return exp / (exp.sum(-1, keepdim=True) + (sinks - largest).exp())


def by_sigmoid(scores: Tensor, sink_logits: Tensor) -> Tensor:
    """The ordinary softmax, times the share that the sink leaves."""
    left = (scores.logsumexp(-1) - sink_logits[:, None]).sigmoid()
    return scores.softmax(-1).nan_to_num() * left[..., None]


def by_logaddexp(scores: Tensor, sink_logits: Tensor) -> Tensor:
    return (scores - torch.logaddexp(scores.logsumexp(-1), sink_logits[:, None])[..., None]).exp()


@pytest.mark.parametrize("sink_softmax", [by_maximum, by_sigmoid, by_logaddexp])
def test_a_sink_in_any_stable_form_is_right(sink_softmax: Callable[..., Tensor]) -> None:
    def seen(position: int, window: int, n_sinks: int) -> Tensor:
        at = torch.arange(position + 1)
        return at[(at < n_sinks) | (at > position - window)]

    assert full_marks("04.4", seen, sink_softmax)


def test_positions_from_numpy_or_a_loop_over_a_tensor_are_right() -> None:
    def of_numpy(position: int, window: int, n_sinks: int) -> Any:
        return np.union1d(
            np.arange(min(n_sinks, position + 1)), np.arange(max(0, position - window + 1), position + 1)
        )

    def of_tensors(position: int, window: int, n_sinks: int) -> list[Tensor]:
        return [p for p in torch.arange(position + 1) if p < n_sinks or position - p < window]

    _, sink_softmax = ours("04.4")
    assert full_marks("04.4", of_numpy, sink_softmax)
    assert full_marks("04.4", of_tensors, sink_softmax)


def test_one_maximum_a_head_does_not_do_for_rows_that_lie_far_apart() -> None:
    def by_head(scores: Tensor, sink_logits: Tensor) -> Tensor:
        largest = torch.maximum(scores.amax((0, 2, 3)), sink_logits)[:, None, None]
        exp = (scores - largest).exp()
        return exp / (exp.sum(-1, keepdim=True) + (sink_logits[:, None, None] - largest).exp())

    assert full_marks("04.4", ours("04.4")[0], by_maximum)
    score = check("04.4", ours("04.4")[0], by_head)
    assert row(score, "sink_softmax: large scores").earned == 0


def test_two_mistakes_in_one_exercise_are_both_named() -> None:
    score = check(
        "04.4",
        lambda p, W, n: [i for i in range(p + 1) if i < n or p - i < W - n],
        lambda scores, sinks: (
            scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
        ),
    )
    names = {mistake.name for mistake in score.mistakes}
    assert names == {"the sinks counted inside the window", "no maximum subtracted"}
    assert 0 < float(score) < score.max_score


def test_changed_scores_lose_the_point_for_that() -> None:
    def in_place(scores: Tensor, sink_logits: Tensor) -> Tensor:
        out = by_maximum(scores.clone(), sink_logits)
        scores -= 1
        return out

    score = check("04.4", ours("04.4")[0], in_place)
    assert earned(score) == [1, 1, 1, 0, 1, 1]
    assert "an input changed in place" in row(score, "sink_softmax: a logit").came


def test_a_reach_of_any_style_is_right() -> None:
    def as_range(position: int, windows: list[int | None], n_sinks: int = 0) -> Any:
        got = CHECKS.reachable(position, windows, n_sinks)
        return range(got[0], got[-1] + 1) if not n_sinks else np.array(got).tolist()

    assert full_marks(
        "04.5", as_range, lambda d, W: 0 if d == 0 else math.ceil(d / (W - 1)) if W > 1 else None
    )
    assert full_marks("04.5", lambda *a: torch.tensor(CHECKS.reachable(*a)), CHECKS.least_layers)

    def from_the_top(position: int, windows: list[int | None], n_sinks: int = 0) -> list[int]:
        """Without the lower layers every position is its own; then each layer adds what it sees."""
        if not windows:
            return [position]
        *below, top = windows
        seen = range(max(0, position + 1 - top) if top else 0, position + 1)
        first = min(from_the_top(seen[0], below)) if seen[0] else 0
        return sorted({*range(first, position + 1), *range(min(n_sinks, position + 1))})

    def one_layer_more(distance: int, window: int) -> int | None:
        if window == 1 or not distance:
            return None if distance else 0
        return next(n for n in range(1, distance + 1) if n * (window - 1) >= distance)

    assert full_marks("04.5", from_the_top, one_layer_more)


def test_none_for_distance_0_is_found_out_on_every_draw() -> None:
    reach, layers_needed = ours("04.5")
    for seed in range(12):
        score = judge(
            find_exercise("04.5"), (reach, lambda d, W: None if W == 1 else layers_needed(d, W)), seed
        )
        assert earned(score) == [1, 1, 1, 1, 1, 0]


def test_a_reach_given_as_its_first_position_is_told_what_was_asked_for() -> None:
    score = check("04.5", lambda *a, **k: CHECKS.reachable(*a, **k)[0], CHECKS.least_layers)
    assert earned(score) == [0, 0, 0, 0, 1, 0]
    assert "a list of positions, ascending" in score.message
    assert score.mistakes == ()


def test_the_reach_of_mistral_is_less_than_the_product_that_its_paper_rounds_to() -> None:
    """Jiang et al. (2023), section 2: "approximately 131K tokens" for 32 layers of 4096."""
    reach, layers_needed = ours("04.5")
    assert len(reach(200_000, 32 * [4096])) == 32 * 4095 + 1 == 131_041
    assert layers_needed(131_071, 4096) == 33


def test_the_models_of_the_exercise_are_those_of_the_library() -> None:
    of_library = {
        "Mistral 7B v0.1": CHECKS.MISTRAL,
        "Gemma 3 27B": CHECKS.GEMMA_3,
        "gpt-oss-120b": CHECKS.GPT_OSS,
    }
    for name, config in of_library.items():
        model = MODELS[name]
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        head_dim = config.get("head_dim", config["hidden_size"] // heads[0])
        assert (*heads, head_dim) == (model.n_heads, model.n_kv_heads, model.head_dim)
        for n in (100, 5000, 100_000):
            sizes = ours("04.6")[0](config, n, n // 2, 3)
            assert sizes["stored"] == cache_bytes(model, n, batch=3)
            assert sizes["read"] == read_bytes(model, n // 2, batch=3)


def test_mistrals_window_saves_half_at_8k_and_nothing_at_4k() -> None:
    (window_bytes,) = ours("04.6")
    at_8k, at_4k = (window_bytes(CHECKS.MISTRAL, n, n, 1) for n in (8192, 4096))
    assert (at_8k["saving"], at_4k["saving"]) == (0.5, 0)
    assert at_8k["stored_gib"] == at_4k["stored_gib"] == 0.5


def test_numbers_of_any_type_count() -> None:
    (window_bytes,) = ours("04.6")
    casts = {"stored": np.int64, "read": torch.tensor, "stored_gib": np.float64, "saving": Fraction}
    assert full_marks("04.6", lambda *a: {k: casts[k](v) for k, v in window_bytes(*a).items()})
    score = check("04.6", lambda *a: {k: v for k, v in window_bytes(*a).items() if k != "read"})
    assert earned(score) == [1, 1, 0, 0, 1, 1, 0]
    assert "a dict with the key 'read'" in row(score, "local and global layers, read").expected


def test_bytes_may_be_counted_layer_by_layer_or_token_by_token() -> None:
    def layer_by_layer(config: dict[str, Any], max_len: int, length: int, batch: int) -> dict[str, float]:
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        one = 4 * batch * config["num_key_value_heads"] * dim
        W, stored, read, full = config["sliding_window"], 0, 0, 0
        for i in range(config["num_hidden_layers"]):
            local = (
                W is not None and config.get("layer_types", {i: "sliding_attention"})[i] != "full_attention"
            )
            stored += one * (min(max_len, W) if local else max_len)
            read += one * (min(length, W) if local else length)
            full += one * max_len
        return {"stored": stored, "read": read, "stored_gib": stored / 1024**3, "saving": 1 - stored / full}

    def by_the_share(config: dict[str, Any], max_len: int, length: int, batch: int) -> dict[str, float]:
        L, W = config["num_hidden_layers"], config["sliding_window"] or math.inf
        types = config.get("layer_types", L * ["sliding_attention"])
        local = sum(kind == "sliding_attention" for kind in types) / L
        dim = config.get("head_dim", config["hidden_size"] / config["num_attention_heads"])
        one = 2 * batch * L * 2 * dim * config["num_key_value_heads"]
        stored, read = (round(one * ((1 - local) * n + local * min(n, W))) for n in (max_len, length))
        saving = 1 - stored / (one * max_len)
        return {"saving": saving, "stored_gib": stored * 2**-30, "read": read, "stored": stored}

    assert full_marks("04.6", layer_by_layer)
    assert full_marks("04.6", by_the_share)


def row_by_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    lengths: Tensor,
    slopes: Tensor | None = None,
) -> Any:
    """Each row brought into the order of time."""
    W, outs = ring_k.shape[2], []
    for b, n in enumerate(lengths.tolist()):
        ring_k[b, :, n % W], ring_v[b, :, n % W] = k[b], v[b]
        at = torch.arange(max(0, n + 1 - W), n + 1)
        bias = None if slopes is None else -slopes[:, None, None] * (n - at)
        keys, values = ring_k[b, :, at % W], ring_v[b, :, at % W]
        outs.append(F.scaled_dot_product_attention(q[b, :, None], keys, values, attn_mask=bias)[:, 0])
    return torch.stack(outs), ring_k, ring_v


def by_scatter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    lengths: Tensor,
    slopes: Tensor | None = None,
) -> Any:
    """All rows at once, by a mask to add."""
    W = ring_k.shape[2]
    slot = (lengths % W)[:, None, None, None].expand(-1, k.shape[1], 1, k.shape[2])
    ring_k = ring_k.scatter(2, slot, k[:, :, None])
    ring_v = ring_v.scatter(2, slot, v[:, :, None])
    age = (lengths[:, None] - torch.arange(W)) % W
    bias = torch.zeros(len(q), 1, 1, W).masked_fill((age > lengths[:, None])[:, None, None], -torch.inf)
    if slopes is not None:
        bias = bias - (slopes[None, :, None] * age[:, None])[:, :, None]
    return (
        F.scaled_dot_product_attention(q[:, :, None], ring_k, ring_v, attn_mask=bias)[:, :, 0],
        ring_k,
        ring_v,
    )


@pytest.mark.parametrize("ring_step", [row_by_row, by_scatter])
def test_a_step_of_any_style_is_right(ring_step: Callable[..., Any]) -> None:
    assert full_marks("04.7", ring_step)


@pytest.mark.parametrize(("exercise", "answer"), [("04.3", token_by_token), ("04.7", row_by_row)])
def test_an_output_without_its_rings_is_told_what_is_missing(
    exercise: str, answer: Callable[..., Any]
) -> None:
    score = check(exercise, lambda *a: answer(*a)[0])
    assert float(score) == 0
    assert "three tensors, (out, ring_k, ring_v)" in score.message
    assert score.mistakes == ()


def test_an_answer_that_returns_nothing_is_not_called_a_known_mistake() -> None:
    for exercise in EXERCISES:
        score = check(exercise, *[lambda *a, **k: None] * len(find_exercise(exercise).answers))
        assert float(score) == 0
        assert score.mistakes == ()


def test_kvlearns_own_attention_earns_nothing() -> None:
    def by_core(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Any:
        out, *rings = token_by_token(q, k, v, ring_k, ring_v, start)
        core.causal_mask(1, 2)
        return out, *rings

    score = check("04.3", by_core)
    assert float(score) == 0
    assert "calls kvlearn.attention.core.causal_mask" in score.message
