"""The two paths of a latent, naive and absorbed: a step of decode, its memory, and the crossover of chunks.

These are parts of ``kvlearn bench shared``. The naive path is measured in several forms of decompression, and
the fastest is the baseline; each is checked against the equation, written down once more in fp64. Rows of the
step have "road" in their ``what``, the name under which recorded runs hold them.
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
from kvlearn.bench.common import Calls, Part, agree, ratio_row, time_row
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.steps import filled_cache, last_token, next_token
from kvlearn.measure.timing import compare

SPEEDUP = 10  # how many times as fast the absorbed step must be, at least
SCORES = 3  # times the scores of all heads: the most memory that the absorbed step may need
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
        """Of the scores."""
        return (self.head_dim + self.rope_dim) ** -0.5

    def details(self, what: str, name: str, **more: Any) -> dict[str, Any]:
        """The keys by which a plot finds a row."""
        return {"what": what, "name": name, **asdict(self), "batch": 1, **more}


@dataclass(frozen=True)
class Sizes:
    """Shapes of the step and of the chunks; lengths in tokens."""

    length: int = 8192
    piece: int = 512  # decompressed at a time: their keys stay in a core's own cache
    new: tuple[int, ...] = (1, 8, 64, 128, 256, 512)
    step: Shape = Shape(rank=128)
    # 4 · head_dim, as in MLA: absorbed costs more than it saves once many queries ask.
    chunks: Shape = Shape(rank=512)


SIZES = Sizes()
SMALL = Sizes(
    length=512,  # what does not grow with it no longer counts
    piece=100,
    new=(1, 2, 9),
    step=Shape(rank=6, n_heads=3, head_dim=8, rope_dim=4),
    chunks=Shape(rank=16, n_heads=2, head_dim=8, rope_dim=4),
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of ``kvlearn bench shared`` that measure latents."""
    sizes = SMALL if small else SIZES
    return [
        Part("latent step", lambda: step_rows(sizes, device)),
        Part("latent layer", lambda: layer_rows(sizes, device)),
        Part("latent chunks", lambda: chunk_rows(sizes, device)),
    ]


class Drawn(NamedTuple):
    """The inputs of both paths, in the order of ``naive_attention``'s arguments."""

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


def in_pieces(
    q: Tensor, latents: Tensor, kv_up: Tensor, positions: Tensor, scale: float, piece: int = SIZES.piece
) -> Tensor:
    """Naive, one token of one sequence: ``piece`` tokens at a time, all keys first, then the values."""
    n_heads, _, rank = kv_up.shape
    head_dim = q.shape[-1] - (latents.shape[-1] - rank)
    k_up, v_up = kv_up[:, :head_dim].flatten(0, 1), kv_up[:, head_dim:].flatten(0, 1)
    pieces = latents[0, :, :rank].T.split(piece, dim=1)
    keys = ((k_up @ latent).unflatten(0, (n_heads, -1)) for latent in pieces)
    scores = torch.cat([q[0, :, :, :head_dim] @ k for k in keys], dim=-1)
    scores += q[0, :, :, head_dim:] @ latents[0, :, rank:].T
    weights = (scores * scale).softmax(-1).transpose(1, 2).split(piece, dim=1)
    values = ((v_up @ latent).unflatten(0, (n_heads, -1)) for latent in pieces)
    out = sum(v @ weight for v, weight in zip(values, weights, strict=True))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)[None]


def naive_forms(piece: int) -> dict[str, Callable[..., Tensor]]:
    """By name; ``piece`` tokens at a time where a form works in pieces."""
    return {
        "naive": naive_attention,
        "naive, one product": one_product,
        "naive, in pieces": partial(in_pieces, piece=piece),
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


@torch.inference_mode()
def step_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One token over a long cache, absorbed against the best naive form, and the memory that each needs."""
    shape = sizes.step
    given = draw(shape, sizes.length - 1, 1, device)
    calls: Calls = {
        "absorbed": partial(absorbed_attention, *given),
        **{name: partial(form, *given) for name, form in naive_forms(sizes.piece).items()},
    }
    agree(calls, exact(given))
    compared = compare(calls, rounds=ROUNDS)
    title = f"{shape.n_heads} heads, rank {shape.rank}, {sizes.length} tokens"
    for name in calls:
        path: AttentionPath = "absorbed" if name == "absorbed" else "naive"
        found = shape.details(
            "road_time", name, length=sizes.length, flops=flops(shape, path, sizes.length - 1, 1)
        )
        yield time_row(compared, title, name, found)
    best = min(naive_forms(sizes.piece), key=lambda name: compared.time(name).median)
    found = shape.details("road_speedup", best, length=sizes.length)
    yield ratio_row(compared, f"{title}, best naive", best, "absorbed", found, bar=SPEEDUP)
    scores = shape.n_heads * sizes.length * 4
    for name, call in calls.items():
        peak = peak_memory(call, device)
        found = shape.details("road_memory", name, length=sizes.length, times_scores=peak / scores)
        bar = SCORES * scores if name == "absorbed" else None
        yield Row(f"{title}, extra memory: {name}", peak, "B", bar=bar, relation="<=", details=found)


@torch.inference_mode()
def layer_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The same token through the whole layer, and through full attention with as many heads."""
    shape = sizes.step
    d_model = shape.n_heads * shape.head_dim
    with device:
        layer = MultiHeadCompression(d_model, shape.n_heads, rank=shape.rank, rope_dim=shape.rope_dim).eval()
        full = FullAttention(d_model, shape.n_heads).eval()
    step = next_token(layer, torch.randn(1, 1, d_model, device=device), filled_cache(layer, 1, sizes.length))

    def by(path: AttentionPath) -> Tensor:
        layer.absorb = path == "absorbed"
        return step()

    paths: dict[str, Callable[[], Tensor]] = {path: partial(by, path) for path in get_args(AttentionPath)}
    agree(paths, by("naive"))
    compared = compare({"full": last_token(full, 1, sizes.length), **paths}, rounds=ROUNDS)
    title = f"layer {d_model}, rank {shape.rank}, {sizes.length} tokens"
    for name in compared.rounds:
        yield time_row(compared, title, name, shape.details("layer_time", name, length=sizes.length))
    for name in ("naive", "full"):
        found = shape.details("layer_speedup", name, length=sizes.length)
        yield ratio_row(compared, title, name, "absorbed", found)


@torch.inference_mode()
def chunk_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """More and more new tokens over a long cache: both paths' times beside their FLOPs, and the crossover."""
    ratios, shape = {}, sizes.chunks
    for new in sizes.new:
        given = draw(shape, sizes.length, new, device)
        calls: Calls = {
            "naive": partial(naive_attention, *given),
            "absorbed": partial(absorbed_attention, *given),
        }
        check_chunk(calls, given)
        compared = compare(calls, rounds=ROUNDS if new < 64 else ROUNDS // 3)
        title = f"{new} new over {sizes.length}, rank {shape.rank}"
        for path in get_args(AttentionPath):
            counted = flops(shape, path, sizes.length, new)
            found = shape.details("chunk_time", path, new=new, cached=sizes.length, flops=counted)
            yield time_row(compared, title, path, found)
        by_flops = flops(shape, "naive", sizes.length, new) / flops(shape, "absorbed", sizes.length, new)
        found = shape.details("chunk_speedup", "absorbed", new=new, cached=sizes.length, by_flops=by_flops)
        yield ratio_row(compared, title, "naive", "absorbed", found)
        ratios[new] = compared.ratio("naive", "absorbed").median
    formula = crossover(shape.head_dim, shape.rank)
    found = shape.details("crossover", "formula", cached=sizes.length)
    yield Row(f"crossover, rank {shape.rank}: by FLOPs", formula, "tokens", details=found)
    measured = crossing(ratios)
    if measured is not None:
        found = shape.details("crossover", "measured", cached=sizes.length)
        yield Row(f"crossover, rank {shape.rank}: as measured", measured, "tokens", details=found)


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
