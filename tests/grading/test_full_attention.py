"""Unit 01 takes right answers of every style, and tells a learner what was copied, called or missing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import earned, full_marks, names, right
from einops import rearrange
from torch import Tensor

from kvlearn.attention import core
from kvlearn.grading import Score, check, find_exercise, judge

pytestmark = pytest.mark.answers

Mask = Tensor | None
Part = tuple[Tensor, Tensor]
Prompt = Callable[[Tensor], Part]


def row(score: Score, name: str) -> Any:
    return next(row for row in score.rows if row.name.startswith(name))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
    answer: Part = right(find_exercise("01.1"))[0](q, k, v, mask)
    return answer


# 01.1


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> list[Tensor]:
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double()) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    largest = scores.max(-1, keepdim=True).values.clamp_min(-1e30)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1)
    out = torch.einsum("bhts,bhsd->bhtd", weights / total.clamp_min(1e-300)[..., None], v.double())
    return [out.to(q.dtype), (total.log() + largest[..., 0]).float()]


def key_by_key(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
    """Online: one key at a time, and no matrix of scores."""
    mask = torch.ones(1, 1, dtype=torch.bool).expand(q.shape[2], k.shape[2]) if mask is None else mask
    most = torch.full(q.shape[:3], -torch.inf)
    total, out = torch.zeros(q.shape[:3]), torch.zeros(q.shape)
    for s in range(k.shape[2]):
        score = (q.float() * k[:, :, s : s + 1].float()).sum(-1) / q.shape[-1] ** 0.5
        score = score.masked_fill(~mask[..., s], -torch.inf)
        new = torch.maximum(most, score)
        old, weight = ((x - new).exp().nan_to_num() for x in (most, score))
        total = total * old + weight
        out = out * old[..., None] + weight[..., None] * v[:, :, s : s + 1].float()
        most = new
    return (out / total.clamp_min(1e-30)[..., None]).to(q.dtype), most + total.log()


def row_by_row_in_numpy(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
    B, H, T, D = q.shape
    out, lse = torch.zeros(B, H, T, D), torch.full((B, H, T), -torch.inf)
    seen = torch.ones(B, 1, T, k.shape[2], dtype=torch.bool) if mask is None else mask.expand(B, 1, T, -1)
    for b, h, t in np.ndindex(B, H, T):
        keys = seen[b, 0, t]
        if keys.any():
            scores = (k[b, h, keys].float() @ q[b, h, t].float()).numpy() / D**0.5
            exp = np.exp(scores - scores.max())
            out[b, h, t] = torch.from_numpy(exp / exp.sum()) @ v[b, h, keys].float()
            lse[b, h, t] = float(np.log(exp.sum()) + scores.max())
    return out.to(q.dtype), lse


@pytest.mark.parametrize("answer", [by_einsum, key_by_key, row_by_row_in_numpy])
def test_attention_may_be_written_in_any_way(answer: Any) -> None:
    assert full_marks("01.1", answer)


@pytest.mark.parametrize(
    ("borrowed", "name"),
    [
        (lambda scores: scores.softmax(-1), "softmax"),
        (lambda scores: torch.softmax(scores, -1), "softmax"),
        (lambda scores: F.softmax(scores, dim=-1), "softmax"),
        (torch.nn.Softmax(-1), "softmax"),
        (lambda scores: scores.log_softmax(-1).exp(), "log_softmax"),
        (lambda scores: (scores - scores.logsumexp(-1, keepdim=True)).exp(), "logsumexp"),
        (lambda scores: (scores - torch.special.logsumexp(scores, -1)[..., None]).exp(), "logsumexp"),
    ],
)
def test_a_ready_made_softmax_is_recognised_however_it_is_called(
    borrowed: Callable[[Tensor], Tensor], name: str
) -> None:
    def answer(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
        borrowed(q @ k.mT)
        return attend(q, k, v, mask)

    score = check("01.1", answer)
    assert (float(score), score.status) == (0, "wrong")
    assert f"calls torch's {name}," in score.message


def test_the_chapters_cell_does_not_pass() -> None:
    def part(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    assert check("01.1", part) == 0


def test_an_answer_in_half_precision_is_told_so() -> None:
    def in_half(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        most = scores.amax(-1, keepdim=True)
        most = most.masked_fill(most == -torch.inf, 0.0)
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        return weights @ v / total.masked_fill(total == 0, 1), (most + total.log())[..., 0]

    score = judge(find_exercise("01.1"), [in_half], 3)
    assert names(score) == ["the lse in the dtype of q"]
    assert float(score) == score.max_score - 1


def test_the_largest_difference_is_told_beside_an_infinite_lse() -> None:
    def one_more(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Part:
        out, lse = attend(q, k, v, mask)
        return out, lse + 1

    came = row(check("01.1", one_more), "a query without keys").came
    assert "the largest difference is 1 at [" in came


# 01.2


def pair_by_pair(n_queries: int, n_keys: int, padding: Any) -> Tensor:
    mask = torch.zeros(len(padding), 1, n_queries, n_keys, dtype=torch.bool)
    for b, t, s in np.ndindex(len(padding), n_queries, n_keys):
        mask[b, 0, t, s] = int(padding[b]) <= s <= t + n_keys - n_queries
    return mask


def by_tril(n_queries: int, n_keys: int, padding: Any) -> Tensor:
    causal = torch.ones(n_queries, n_keys).tril(n_keys - n_queries).bool()
    masks = [causal.clone() for _ in padding]
    for mask, n in zip(masks, padding, strict=True):
        mask[:, :n] = False
    return torch.stack(masks)[:, None]


def the_last_rows_of_all(n_queries: int, n_keys: int, padding: Any) -> Tensor:
    real = torch.arange(n_keys) >= torch.as_tensor(padding).reshape(-1, 1)
    square = torch.arange(n_keys)[:, None] >= torch.arange(n_keys)
    return (square & real[:, None, None])[:, :, n_keys - n_queries :]


def cut_from_the_real_tokens(n_queries: int, n_keys: int, padding: Any) -> Tensor:
    """Row by row: the mask of a text without padding, put into the lower right corner."""
    rows = []
    for n in torch.as_tensor(padding).tolist():
        real = core.causal_mask(1, 1).new_ones(n_keys - n, n_keys - n).tril()
        rows.append(F.pad(real, (n, 0, n, 0))[n_keys - n_queries :])
    return torch.stack(rows).unsqueeze(1)


@pytest.mark.parametrize("answer", [pair_by_pair, by_tril, the_last_rows_of_all])
def test_a_mask_may_be_written_in_any_way(answer: Any) -> None:
    assert full_marks("01.2", answer)


def test_a_mask_made_by_kvlearn_earns_nothing() -> None:
    assert check("01.2", cut_from_the_real_tokens) == 0


def test_the_mask_of_a_single_text_earns_the_point_for_no_padding() -> None:
    score = check("01.2", lambda T, S, padding: torch.ones(T, S, dtype=torch.bool).tril(S - T))
    assert earned(score) == [0, 1, 0, 0, 0]


# 01.3


def split_by_einops(x: Tensor, n_heads: int) -> Tensor:
    return rearrange(x, "b t (h three d) -> three b h t d", h=n_heads, three=3)


def split_by_chunks(x: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (n_heads, -1)).movedim(2, 1).chunk(3, dim=-1)


def split_by_strides(x: Tensor, n_heads: int) -> list[Tensor]:
    B, T, width = x.shape
    D = width // n_heads // 3
    shape, strides = (B, n_heads, T, D), (T * width, 3 * D, width, 1)
    return [x.as_strided(shape, strides, i * D) for i in range(3)]


def merge_by_cat(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(1), dim=-1)


def merge_by_einops(x: Tensor) -> Tensor:
    return rearrange(x, "b h t d -> b t (h d)")


def merge_token_by_token(x: Tensor) -> Tensor:
    return torch.stack([x[:, :, t].flatten(1) for t in range(x.shape[2])], dim=1)


@pytest.mark.parametrize(
    ("split", "merge"),
    [
        (split_by_einops, merge_by_einops),
        (split_by_chunks, merge_by_cat),
        (split_by_strides, merge_token_by_token),
    ],
)
def test_heads_may_be_split_and_merged_in_any_way(split: Any, merge: Any) -> None:
    assert full_marks("01.3", split, merge)


@pytest.mark.parametrize("how", ["contiguous", "clone", "stack", "reshape"])
def test_a_split_that_copies_is_told_by_what(how: str) -> None:
    def split(x: Tensor, n_heads: int) -> Any:
        parts = split_by_chunks(x, n_heads)
        if how == "reshape":
            whole = torch.stack(parts, dim=-2)
            return whole.reshape(*whole.shape[:3], -1).chunk(3, dim=-1)
        return torch.stack(parts) if how == "stack" else [getattr(part, how)() for part in parts]

    score = check("01.3", split, merge_by_cat)
    assert earned(score) == [1, 2, 0, 1]
    assert names(score) == ["the split copies"]
    assert "a copy of shape" in row(score, "split: views").came


# 01.7


def by_exponentials(q: Tensor, prompt: Prompt, k: Tensor, v: Tensor, lengths: Tensor) -> Part:
    """Two numerators and two denominators, relative to the larger log-sum-exp."""
    B, _, _, D = q.shape
    out_p, lse_p = prompt(rearrange(q, "b h t d -> h (b t) d"))
    out_p, lse_p = rearrange(out_p, "h (b t) d -> b h t d", b=B), rearrange(lse_p, "h (b t) -> b h t", b=B)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / D**0.5
    scores = torch.where(torch.arange(k.shape[2]) < lengths.view(-1, 1, 1, 1), scores, -torch.inf)
    most = torch.maximum(scores.amax(-1), lse_p)
    most = torch.where(most.isinf(), 0.0, most)
    own, given = (scores - most[..., None]).exp(), (lse_p - most).exp()[..., None]
    total = own.sum(-1, keepdim=True) + given
    out = (own @ v + given * out_p) / torch.where(total == 0, 1.0, total)
    return out, (most + total[..., 0].log())


def row_by_row(q: Tensor, prompt: Prompt, k: Tensor, v: Tensor, lengths: Tensor) -> Part:
    B, H, T, _ = q.shape
    outs, lses = prompt(torch.cat(list(q), dim=1))
    out, lse = torch.zeros_like(q), torch.full((B, H, T), -torch.inf)
    for b, n in enumerate(lengths.tolist()):
        parts = [(outs[:, b * T : (b + 1) * T], lses[:, b * T : (b + 1) * T])]
        if n:
            scores = q[b] @ k[b, :, :n].mT / q.shape[-1] ** 0.5
            parts.append((F.softmax(scores, -1) @ v[b, :, :n], scores.logsumexp(-1)))
        known = torch.stack([part[1] for part in parts])
        lse[b] = known.logsumexp(0)
        weights = known.softmax(0).nan_to_num()  # NaN only where both are empty
        out[b] = sum(w[..., None] * part[0] for w, part in zip(weights, parts, strict=True))
    return out, lse


def by_a_sigmoid(q: Tensor, prompt: Prompt, k: Tensor, v: Tensor, lengths: Tensor) -> Part:
    H, D = q.shape[1], q.shape[3]
    fold = q.movedim(1, 0)
    out_p, lse_p = (x.unflatten(1, fold.shape[1:3]).movedim(0, 1) for x in prompt(fold.reshape(H, -1, D)))
    written = torch.arange(k.shape[2])[None] < lengths[:, None]
    out_o, lse_o = attend(q, k, v, written[:, None, None].expand(-1, -1, q.shape[2], -1))
    share = torch.sigmoid(lse_o - lse_p).nan_to_num(0.0)[..., None]  # NaN only where both are empty
    return share * out_o + (1 - share) * out_p, torch.logaddexp(lse_o, lse_p)


@pytest.mark.parametrize("answer", [by_exponentials, row_by_row, by_a_sigmoid])
def test_a_shared_prompt_may_be_merged_in_any_way(answer: Any) -> None:
    assert full_marks("01.7", answer)


def test_queries_of_another_shape_are_refused_in_words() -> None:
    def unfolded(q: Tensor, prompt: Prompt, k: Tensor, v: Tensor, lengths: Tensor) -> Part:
        return prompt(q)

    score = check("01.7", unfolded)
    assert (float(score), score.status) == (0, "error")
    assert "queries: expected shape (H, N, D) with H = " in score.message
    assert "of your code: return prompt(q)" in score.message


# 01.6


def test_smaller_appends_than_a_chunk_cost_points() -> None:
    def halves(q: Tensor, k: Tensor, v: Tensor, cache: Any, rope: Any, chunk: int) -> Tensor:
        return right(find_exercise("01.6"))[0](q, k, v, cache, rope, max(chunk // 2, 1))

    score = check("01.6", halves)
    assert row(score, "equal chunks").earned == 0
    assert "appends of [" in row(score, "equal chunks").came
    assert row(score, "one token at a time").earned == 1
