"""The two paths of a latent, naive and absorbed: a step of decode, its memory, and where chunks change sides.

The best that can be done naively is sought among several ways to decompress; each is checked against the
equation, written down once more in fp64.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import FullAttention, MultiHeadCompression
from kvlearn.attention.core import causal_mask_at
from kvlearn.attention.mla import AttentionPath, absorbed_attention, crossover, naive_attention, path_flops
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import Calls, agree, ratio_row, time_row
from kvlearn.measure.steps import filled_cache, last_token, next_token
from kvlearn.measure.timing import compare

LENGTH = 8192
PIECE = 512  # tokens decompressed at a time: their keys stay in a core's own cache
NEW = (1, 8, 64, 128, 256, 512)
ROUNDS = 9


@dataclass(frozen=True)
class Shape:
    """Heads over a latent: of ``rank`` numbers and a rotated key of ``rope_dim``."""

    rank: int
    n_heads: int = 8
    head_dim: int = 128
    rope_dim: int = 64

    @property
    def scale(self) -> float:
        return (self.head_dim + self.rope_dim) ** -0.5

    def details(self, what: str, name: str, **more: Any) -> dict[str, Any]:
        return {"what": what, "name": name, **asdict(self), "batch": 1, **more}


STEP = Shape(rank=128)
CHUNKS = Shape(rank=512)  # 4 · head_dim, as in MLA: absorbed costs more than it saves once many ask


class Drawn(NamedTuple):
    """What both paths start from; in the order of ``naive_attention``'s arguments."""

    q: Tensor
    latents: Tensor
    kv_up: Tensor
    positions: Tensor
    scale: float


def draw(shape: Shape, cached: int, new: int, device: torch.device) -> Drawn:
    """Queries of ``new`` tokens behind ``cached`` ones, in fp32."""
    randn = partial(torch.randn, device=device)
    q = randn(1, shape.n_heads, new, shape.head_dim + shape.rope_dim)
    latents = randn(1, cached + new, shape.rank + shape.rope_dim)
    kv_up = randn(shape.n_heads, 2 * shape.head_dim, shape.rank) * shape.rank**-0.5
    return Drawn(q, latents, kv_up, torch.arange(cached, cached + new, device=device)[None], shape.scale)


def one_product(q: Tensor, latents: Tensor, kv_up: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Naive, one token: keys and values in one matrix product, the rotated keys' scores added as a mask."""
    n_heads, _, rank = kv_up.shape
    head_dim = q.shape[-1] - (latents.shape[-1] - rank)
    heads = F.linear(latents[..., :rank], kv_up.flatten(0, 1)).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    mask = q[..., head_dim:] @ latents[:, None, :, rank:].transpose(-1, -2) * scale
    k, v = heads[..., :head_dim], heads[..., head_dim:]
    return F.scaled_dot_product_attention(q[..., :head_dim], k, v, attn_mask=mask, scale=scale)


def in_pieces(q: Tensor, latents: Tensor, kv_up: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Naive, one token of one sequence: ``PIECE`` tokens at a time, all keys first, then the values."""
    n_heads, _, rank = kv_up.shape
    head_dim = q.shape[-1] - (latents.shape[-1] - rank)
    k_up, v_up = kv_up[:, :head_dim].flatten(0, 1), kv_up[:, head_dim:].flatten(0, 1)
    pieces = latents[0, :, :rank].T.split(PIECE, dim=1)
    keys = ((k_up @ piece).unflatten(0, (n_heads, -1)) for piece in pieces)
    scores = torch.cat([q[0, :, :, :head_dim] @ k for k in keys], dim=-1)
    scores += q[0, :, :, head_dim:] @ latents[0, :, rank:].T
    weights = (scores * scale).softmax(-1).transpose(1, 2).split(PIECE, dim=1)
    values = ((v_up @ piece).unflatten(0, (n_heads, -1)) for piece in pieces)
    out = sum(v @ weight for v, weight in zip(values, weights, strict=True))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)[None]


NAIVE: dict[str, Callable[..., Tensor]] = {
    "naive": naive_attention,
    "naive, one product": one_product,
    "naive, in pieces": in_pieces,
}


def exact(given: Drawn) -> Tensor:
    """softmax(scale · [q, q_r] · [W_uk c, r]) W_uv c of every head, in fp64."""
    q, latents, kv_up = (x.double() for x in given[:3])
    rank, rope_dim = kv_up.shape[2], latents.shape[2] - kv_up.shape[2]
    head_dim = q.shape[-1] - rope_dim
    k, v = (
        torch.einsum("hdr, bsr -> bhsd", up, latents[..., :rank])
        for up in (kv_up[:, :head_dim], kv_up[:, head_dim:])
    )
    scores = torch.einsum("bhtd, bhsd -> bhts", q[..., :head_dim], k)
    scores += torch.einsum("bhtd, bsd -> bhts", q[..., head_dim:], latents[..., rank:])
    hidden = ~causal_mask_at(given.positions, latents.shape[1])
    return (scores * given.scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def step_rows(device: torch.device) -> Iterator[Row]:
    """One token over a long cache, absorbed against the best naive path, and the memory that each needs."""
    given = draw(STEP, LENGTH - 1, 1, device)
    calls: Calls = {
        "absorbed": partial(absorbed_attention, *given),
        **{name: partial(way, *given) for name, way in NAIVE.items()},
    }
    agree(calls, exact(given))
    by_turns = compare(calls, rounds=ROUNDS)
    title = f"{STEP.n_heads} heads, rank {STEP.rank}, {LENGTH} tokens"
    for name in calls:
        path: AttentionPath = "absorbed" if name == "absorbed" else "naive"
        found = STEP.details("road_time", name, length=LENGTH, flops=flops(STEP, path, LENGTH - 1, 1))
        yield time_row(by_turns, title, name, found)
    best = min(NAIVE, key=lambda name: by_turns.time(name).median)
    found = STEP.details("road_speedup", best, length=LENGTH)
    yield ratio_row(by_turns, f"{title}, best naive", best, "absorbed", found, bar=10)
    scores = STEP.n_heads * LENGTH * 4
    for name, call in calls.items():
        peak = peak_memory(call, device)
        found = STEP.details("road_memory", name, length=LENGTH, times_scores=peak / scores)
        bar = 3 * scores if name == "absorbed" else None
        yield Row(f"{title}, extra memory: {name}", peak, "B", bar=bar, relation="<=", details=found)


def layer_rows(device: torch.device) -> Iterator[Row]:
    """The same token through the whole layer, and through full attention with as many heads."""
    d_model = STEP.n_heads * STEP.head_dim
    with device:
        layer = MultiHeadCompression(d_model, STEP.n_heads, rank=STEP.rank, rope_dim=STEP.rope_dim).eval()
        full = FullAttention(d_model, STEP.n_heads).eval()
    step = next_token(layer, torch.randn(1, 1, d_model, device=device), filled_cache(layer, 1, LENGTH))

    def by(path: AttentionPath) -> Tensor:
        layer.absorb = path == "absorbed"
        return step()

    paths: dict[str, Callable[[], Tensor]] = {path: partial(by, path) for path in get_args(AttentionPath)}
    agree(paths, by("naive"))
    by_turns = compare({"full": last_token(full, 1, LENGTH), **paths}, rounds=ROUNDS)
    title = f"layer {d_model}, rank {STEP.rank}, {LENGTH} tokens"
    for name in by_turns.rounds:
        yield time_row(by_turns, title, name, STEP.details("layer_time", name, length=LENGTH))
    for name in ("naive", "full"):
        found = STEP.details("layer_speedup", name, length=LENGTH)
        yield ratio_row(by_turns, title, name, "absorbed", found)


def chunk_rows(device: torch.device) -> Iterator[Row]:
    """More and more new tokens over a long cache: both paths' times beside their FLOPs, and the crossover."""
    ratios = {}
    for new in NEW:
        given = draw(CHUNKS, LENGTH, new, device)
        calls: Calls = {
            "naive": partial(naive_attention, *given),
            "absorbed": partial(absorbed_attention, *given),
        }
        check_chunk(calls, given)
        by_turns = compare(calls, rounds=ROUNDS if new < 64 else ROUNDS // 3)
        title = f"{new} new over {LENGTH}, rank {CHUNKS.rank}"
        for path in get_args(AttentionPath):
            counted = flops(CHUNKS, path, LENGTH, new)
            found = CHUNKS.details("chunk_time", path, new=new, cached=LENGTH, flops=counted)
            yield time_row(by_turns, title, path, found)
        by_flops = flops(CHUNKS, "naive", LENGTH, new) / flops(CHUNKS, "absorbed", LENGTH, new)
        found = CHUNKS.details("chunk_speedup", "absorbed", new=new, cached=LENGTH, by_flops=by_flops)
        yield ratio_row(by_turns, title, "naive", "absorbed", found)
        ratios[new] = by_turns.ratio("naive", "absorbed").median
    formula = crossover(CHUNKS.head_dim, CHUNKS.rank)
    found = CHUNKS.details("crossover", "formula", cached=LENGTH)
    yield Row(f"crossover, rank {CHUNKS.rank}: by FLOPs", formula, "tokens", details=found)
    measured = crossing(ratios)
    if measured is not None:
        found = CHUNKS.details("crossover", "measured", cached=LENGTH)
        yield Row(f"crossover, rank {CHUNKS.rank}: as measured", measured, "tokens", details=found)


def check_chunk(calls: Calls, given: Drawn) -> None:
    """Both paths alike in every token, and the last token as the equation says."""
    naive = calls["naive"]()
    agree({"absorbed": calls["absorbed"]}, naive)
    last = given._replace(q=given.q[:, :, -1:], positions=given.positions[:, -1:])
    agree({"naive": lambda: naive[:, :, -1:]}, exact(last))


def flops(shape: Shape, path: AttentionPath, cached: int, new: int) -> int:
    """By formula."""
    sizes = (shape.n_heads, shape.head_dim, shape.rank, shape.rope_dim)
    return path_flops(path, *sizes, new=new, cached=cached)


def crossing(ratios: dict[int, float]) -> float | None:
    """Where naive / absorbed falls to 1, interpolated on logarithmic axes; None where it does not."""
    points = [(math.log(new), math.log(ratio)) for new, ratio in sorted(ratios.items())]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 > 0 >= y1:
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return None
