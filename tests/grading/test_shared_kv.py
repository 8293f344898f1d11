"""Unit 02 takes right answers of every style, and tells a learner what was copied, called or missing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import full_marks, right
from einops import rearrange, reduce, repeat
from torch import Tensor

from kvlearn.attention import core
from kvlearn.grading import Score, check, find_exercise

pytestmark = pytest.mark.answers

Mask = Tensor | None


def row(score: Score, name: str) -> Any:
    return next(row for row in score.rows if row.name.startswith(name))


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask[:, :, None]
        scores = scores + torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1).to(v.dtype), v).flatten(1, 2)


def head_by_head(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    heads = []
    for h in range(q.shape[1]):
        pool = h * k.shape[1] // q.shape[1]
        scores = q[:, h] @ k[:, pool].mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = torch.where(mask if mask.ndim == 2 else mask[:, 0], scores, -torch.inf)
        heads.append(F.softmax(scores, -1) @ v[:, pool])
    return torch.stack(heads, 1)


def pool_by_pool(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    out = torch.empty_like(q)
    R = q.shape[1] // k.shape[1]
    for g in range(k.shape[1]):
        heads = slice(g * R, (g + 1) * R)
        out[:, heads] = by_einsum(q[:, heads], k[:, g : g + 1], v[:, g : g + 1], mask)
    return out


def by_einops_in_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    rows = rearrange(q.float(), "b (g r) t d -> b g (r t) d", g=k.shape[1])
    scores = rows @ rearrange(k.float(), "b g s d -> b g d s") / q.shape[-1] ** 0.5
    scores = rearrange(scores, "b g (r t) s -> b (g r) t s", t=q.shape[2])
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    weights = rearrange(scores.softmax(-1), "b (g r) t s -> b g (r t) s", g=k.shape[1])
    return rearrange(weights @ v.float(), "b g (r t) d -> b (g r) t d", t=q.shape[2]).to(q.dtype)


def by_bmm(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    B, H, T, D = q.shape
    scores = torch.bmm(q.reshape(B * k.shape[1], -1, D), k.flatten(0, 1).mT).view(B, H, T, -1) * D**-0.5
    weights = F.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), dim=-1)
    return torch.bmm(weights.reshape(B * k.shape[1], -1, k.shape[2]), v.flatten(0, 1)).view(B, H, T, D)


@pytest.mark.parametrize("answer", [by_einsum, head_by_head, pool_by_pool, by_einops_in_fp32, by_bmm])
def test_grouped_attention_of_any_style_is_right(answer: Callable[..., Tensor]) -> None:
    assert full_marks("02.1", answer)


def over_copies(copy: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        size = q.shape[1] // k.shape[1]
        return by_einsum(q, copy(k, size), copy(v, size), mask)

    return attend


COPIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, 1),
    "__getitem__": lambda x, n: x[:, torch.arange(x.shape[1] * n) // n],
    "index_select": lambda x, n: x.index_select(1, torch.arange(x.shape[1] * n) // n),
    "stack": lambda x, n: torch.stack([x[:, h // n] for h in range(x.shape[1] * n)], 1),
    "reshape": lambda x, n: repeat(x, "b g s d -> b (g r) s d", r=n),
    "contiguous": lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).contiguous().flatten(1, 2),
}


@pytest.mark.parametrize("call", COPIES)
def test_a_copy_of_the_keys_is_found_and_the_call_that_makes_it_is_named(call: str) -> None:
    score = check("02.1", over_copies(COPIES[call]))
    assert [row.earned for row in score.rows] == [1, 1, 1, 1, 0]
    assert f"{call} made a tensor of shape" in score.rows[-1].came
    assert score.mistakes


def test_a_product_that_broadcasts_expanded_keys_copies_them() -> None:
    def expanded(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        q = q.unflatten(1, (k.shape[1], -1))
        k, v = (x[:, :, None].expand(-1, -1, q.shape[2], -1, -1) for x in (k, v))
        scores = torch.einsum("bgrtd,bgrsd->bgrts", q, k) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
        return torch.einsum("bgrts,bgrsd->bgrtd", scores.softmax(-1), v).flatten(1, 2)

    score = check("02.1", expanded)
    assert "einsum made a tensor" in score.rows[-1].came
    assert [mistake.name for mistake in score.mistakes] == ["a copy made by @, which broadcasts"]


def test_a_mistake_in_the_values_does_not_cost_the_points_for_making_no_copy() -> None:
    score = check("02.1", lambda q, k, v, mask=None: by_einsum(q * 3, k.flip(1), v.flip(1), mask))
    assert [row.earned for row in score.rows] == [0, 0, 0, 0, 2]
    assert row(check("02.1", lambda q, k, v, mask=None: torch.zeros_like(q)), "no copy").earned == 0


def test_pytorchs_grouped_attention_earns_nothing() -> None:
    def ready_made(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    score = check("02.1", ready_made)
    assert float(score) == 0
    assert "calls torch's scaled_dot_product_attention" in score.message


def test_numbers_of_any_type_count() -> None:
    (bytes_per_token,) = right(find_exercise("02.2"))
    assert full_marks("02.2", lambda config: {k: np.int64(v) for k, v in bytes_per_token(config).items()})
    (for_budget,) = right(find_exercise("02.6"))
    assert full_marks("02.6", lambda *a: None if for_budget(*a) is None else np.int64(for_budget(*a)))
    cla, gemma = right(find_exercise("02.5"))
    assert full_marks("02.5", lambda *a: torch.tensor(cla(*a)), lambda *a: tuple(gemma(*a)))
    assert full_marks("02.5", lambda *a: list(np.array(cla(*a))), gemma)


def test_heads_are_pooled_by_any_means() -> None:
    def by_einops(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
        if n_heads % n_kv_heads != 0:
            raise ValueError(n_kv_heads)
        means: Tensor = reduce(
            weight.float(), "(g r d) m -> (g d) m", "mean", g=n_kv_heads, r=n_heads // n_kv_heads
        )
        return means.to(weight.dtype)

    def by_matrix(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
        if n_heads % n_kv_heads != 0:
            raise ValueError(n_kv_heads)
        R = n_heads // n_kv_heads
        mean = torch.kron(torch.eye(n_kv_heads), torch.full((1, R), 1 / R))
        return torch.kron(mean, torch.eye(len(weight) // n_heads)).to(weight.dtype) @ weight

    def head_after_head(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
        R, rest = divmod(n_heads, n_kv_heads)
        if rest or not R:
            raise ValueError(f"{n_heads} heads for {n_kv_heads} pools")
        heads = weight.chunk(n_heads)
        pools = [sum(heads[g * R + 1 : (g + 1) * R], heads[g * R]) / R for g in range(n_kv_heads)]
        return torch.cat(pools)

    assert full_marks("02.3", by_einops)
    assert full_marks("02.3", by_matrix)
    assert full_marks("02.3", head_after_head)


def test_bytes_are_counted_layer_by_layer_or_by_type() -> None:
    def layer_by_layer(config: dict[str, Any]) -> dict[str, int]:
        stored = read = 0
        n_layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        for i in range(n_layers):
            if config.get("kv_lora_rank"):
                size = 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
            else:
                kv_heads = config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads)
                dim = config.get("head_dim") or config["hidden_size"] // heads
                if config.get("layer_types", n_layers * ["all"])[i] == "full_attention":
                    dim = config.get("global_head_dim", dim)
                size = 4 * kv_heads * dim
            read += size
            stored += size * (i + config.get("num_kv_shared_layers", 0) < n_layers)
        return {"read": read, "stored": stored}

    def by_type(config: dict[str, Any]) -> dict[str, float]:
        (bytes_per_token,) = right(find_exercise("02.2"))
        if not config.get("multi_query", True):
            config = {**config, "num_key_value_heads": config["num_attention_heads"]}
        return {name: float(size) for name, size in bytes_per_token(config).items()}

    assert full_marks("02.2", layer_by_layer)
    assert full_marks("02.2", by_type)


def test_a_budget_may_be_met_from_above_or_below() -> None:
    def bytes_of_one(config: dict[str, Any], batch: int, max_len: int) -> int:
        bits = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8}[config["torch_dtype"]]
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return 2 * config["num_hidden_layers"] * dim * batch * max_len * bits // 8

    def from_above(config: dict[str, Any], budget_gib: float, batch: int, max_len: int) -> int | None:
        heads: int = config["num_attention_heads"]
        one = bytes_of_one(config, batch, max_len)
        for size in range(1, heads + 1):  # of a pool
            if heads % size == 0 and heads // size * one <= budget_gib * 2**30:
                return heads // size
        return None

    def from_below(config: dict[str, Any], budget_gib: float, batch: int, max_len: int) -> int | None:
        best = None
        for g in range(1, config["num_attention_heads"] + 1):
            if config["num_attention_heads"] % g:
                continue
            if bytes_of_one(config, batch, max_len) * g / 1024**3 > budget_gib:
                break
            best = g
        return best

    assert full_marks("02.6", from_above)
    assert full_marks("02.6", from_below)


def test_an_answer_that_returns_nothing_is_not_called_a_known_mistake() -> None:
    for exercise in ("02.1", "02.2", "02.3", "02.4", "02.5", "02.6", "02.7"):
        score = check(exercise, *[lambda *a, **k: None] * len(find_exercise(exercise).answers))
        assert float(score) == 0
        assert score.mistakes == ()


def test_a_routing_in_plain_lists_loses_the_point_for_the_form_alone() -> None:
    harden, keep_pools = right(find_exercise("02.4"))
    score = check("02.4", lambda logits: [part.tolist() for part in harden(logits)], keep_pools)
    assert [row.earned for row in score.rows] == [1, 2, 0, 1]


def step_with(
    positions: Callable[[Any, int], Tensor], extra: Callable[[Any, Tensor], Any] = lambda reader, x: None
) -> Callable[..., Any]:
    """A shared step that takes its positions from here, and may do something more with the reader."""

    def step(x: Tensor, x_reader: Tensor, owner: Any, reader: Any, cache: Any, rope: Any) -> Any:
        at = positions(cache, x.shape[1])
        keys, values, _ = cache.append(rope(owner.k(x), at), owner.v(x))
        extra(reader, x_reader)
        queries = (owner.q(x), reader.q(x_reader))
        return [core.causal_attention(rope(q, at), keys, values, at) for q in queries]

    return step


def test_a_step_of_another_style_is_right_and_one_token_at_a_time_too() -> None:
    step = step_with(lambda cache, T: cache.positions(T))

    def token_by_token(x: Tensor, x_reader: Tensor, *given: Any) -> Any:
        pairs = [step(*tokens, *given) for tokens in zip(x.split(1, 1), x_reader.split(1, 1), strict=True)]
        return tuple(torch.cat(outs, 2) for outs in zip(*pairs, strict=True))

    assert full_marks("02.7", step)
    assert full_marks("02.7", token_by_token)


def test_a_reader_that_projects_keys_loses_the_point_for_that_alone() -> None:
    score = check("02.7", step_with(lambda cache, T: cache.positions(T), lambda reader, x: reader.k(x)))
    assert [row.earned for row in score.rows] == [1, 1, 2, 1, 0]
    assert "the reader's k too" in score.rows[-1].came
