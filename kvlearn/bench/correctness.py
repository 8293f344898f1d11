"""The decode kernels on the device against attention in fp64: part of ``kvlearn bench gpu``.

Each check is a part of its own, so one that fails or does not compile costs only itself. A row is the
largest ‖out − exact‖ / ‖exact‖ of any head; NaN in a result is a failed check.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.bench.common import Limit, Part
from kvlearn.kernels.decode import decode_attention, decode_latent
from kvlearn.kernels.launch import Workspace
from kvlearn.measure.results import Row

# Of a result in this dtype; fp32 products on a GPU are exact to their rounding.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Sizes:
    """Shapes of the checks. ``lengths``: ragged, with an empty row and a row of one token."""

    head_dims: tuple[int, ...] = (64, 80, 96, 128, 192, 256)
    lengths: tuple[int, ...] = (4096, 1, 0, 777, 2048)
    splits: tuple[int, ...] = (1, 2, 3, 7, 16, 17, 64, 257)
    groups: tuple[int, ...] = (1, 4, 8, 32)
    window: int = 1000
    pages: tuple[int, ...] = (16, 64)
    latent: tuple[int, int] = (512, 64)  # rank, rope_dim
    latent_heads: tuple[int, ...] = (16, 128)
    merge_lengths: tuple[int, ...] = (17_000, 777)  # so long that the most splits have a tile each
    repeats: int = 1000  # of the one-launch merge
    head_dim: int = 128


SIZES = Sizes()
SMALL = Sizes(
    head_dims=(16, 24),
    lengths=(40, 1, 0, 17),
    splits=(1, 3),
    groups=(1, 4),
    window=9,
    pages=(16,),
    latent=(32, 16),
    latent_heads=(4,),
    merge_lengths=(50, 9),
    repeats=3,
    head_dim=16,
)


@dataclass
class Step:
    """One decode step: q (B, H, D), k and v (B, G, S, D) with one length per row."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    scale: float
    options: dict[str, Any] = field(default_factory=dict)  # of ``decode_attention``


def new_step(
    device: torch.device,
    lengths: tuple[int, ...],
    *,
    n_kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    scales: str = "",
    **options: Any,
) -> Step:
    """Random numbers; slots past a row's length hold NaN where the format has one.

    ``scales``: "", "head" or "key".
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (len(lengths), n_kv_heads, max(lengths), head_dim)
    randn = partial(torch.randn, generator=generator, device=device)
    k, v = (quantised(randn(shape), kv_dtype or dtype) for _ in range(2))
    q = randn(len(lengths), n_kv_heads * group, head_dim).to(dtype)
    for cache in (k, v):
        for row, length in enumerate(lengths):
            if cache.is_floating_point():
                cache[row, :, length:] = torch.nan
    if scales:
        size = (n_kv_heads,) if scales == "head" else shape[:-1]
        for name in ("k_scale", "v_scale"):
            factors = 0.01 + 0.05 * torch.rand(size, generator=generator, device=device)
            options[name] = factors if kv_dtype == torch.int8 else factors * 20
    row_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Step(q, k, v, row_lengths, head_dim**-0.5, options)


def quantised(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``; int8 takes a few hundred steps of the range."""
    return (numbers * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else numbers.to(dtype)


def exact(step: Step) -> Tensor:
    """softmax(scale · q k) v in fp64 over the keys that length, window and sinks leave: (B, H, D)."""
    n = torch.arange(step.k.shape[2], device=step.q.device)
    length = step.lengths[:, None].long()
    visible = n < length
    window = step.options.get("window")
    if window is not None:
        visible &= (n >= length - window) | (n < step.options.get("n_sinks", 0))
    k, v = (
        full(cache, step.options.get(name)) * visible[:, None, :, None]
        for cache, name in ((step.k, "k_scale"), (step.v, "v_scale"))
    )
    q = step.q.double().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bghd, bgsd -> bghs", q, k) * step.scale
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    sinks = step.options.get("sink_logits")
    if sinks is not None:
        logits = sinks.double().view(1, k.shape[1], -1, 1).expand(len(scores), -1, -1, 1)
        weights = torch.cat([scores, logits], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0.0)  # a row without keys gives 0
    return torch.einsum("bghs, bgsd -> bghd", weights, v).flatten(1, 2)


def full(cache: Tensor, scale: Tensor | None) -> Tensor:
    """The numbers of a cache in fp64, by way of fp32, to which all formats convert exactly; NaN as 0."""
    numbers = cache.float().double().nan_to_num(0.0)
    if scale is None:
        return numbers
    return numbers * (scale[None, :, None, None] if scale.dim() == 1 else scale[..., None]).double()


def errors(out: Tensor, expected: Tensor) -> Tensor:
    """The relative error of every head; of a head that must be 0 its own norm. NaN stays NaN."""
    norm = expected.norm(dim=-1)
    return (out.double() - expected).norm(dim=-1) / torch.where(norm > 0, norm, 1.0)


def error_row(title: str, measured: Tensor, dtype: torch.dtype, **details: Any) -> Row:
    """The largest of these errors, or how many are NaN: a check that fails, not one that is missing."""
    found = {"what": "correct", "dtype": str(dtype).removeprefix("torch."), **details}
    broken = int(measured.isnan().sum())
    if broken:
        return Row(f"{title}: heads with NaN", broken, "heads", 0, "==", details=found)
    return Row(title, float(measured.max()), "x", TOLERANCE[dtype], "<=", details=found)


# The checks


def step_row(title: str, step: Step, **how: Any) -> Iterator[Row]:
    """One step of the kernel against fp64."""
    options = {"scale": step.scale, "backend": "triton", "validate": False, **step.options, **how}
    out = decode_attention(step.q, step.k, step.v, step.lengths, **options)
    yield error_row(title, errors(out, exact(step)), step.q.dtype)


def paged_row(title: str, step: Step, page: int) -> Iterator[Row]:
    """The same cache in pages that lie anywhere."""
    batch, _, slots, _ = step.k.shape
    n_pages = -(-slots // page)
    order = torch.randperm(batch * n_pages, device=step.q.device)
    table = order.view(batch, n_pages).to(torch.int32)
    pools = []
    for cache in (step.k, step.v):
        whole = cache.new_zeros(batch, cache.shape[1], n_pages * page, cache.shape[3])
        whole[:, :, :slots] = cache
        pieces = whole.unflatten(2, (n_pages, page)).transpose(1, 2).flatten(0, 1)
        pool = torch.empty_like(pieces)
        pool[order] = pieces
        pools.append(pool)
    options: dict[str, Any] = {"scale": step.scale, "backend": "triton", "validate": False}
    options["block_table"] = table
    out = decode_attention(step.q, pools[0], pools[1], step.lengths, **options)
    yield error_row(title, errors(out, exact(step)), step.q.dtype)


def latent_row(title: str, device: torch.device, sizes: Sizes, n_heads: int) -> Iterator[Row]:
    """One latent as keys and values of all heads."""
    rank, rope_dim = sizes.latent
    step = new_step(device, sizes.lengths, n_kv_heads=1, group=n_heads, head_dim=rank + rope_dim)
    q_latent, q_rope = step.q.split([rank, rope_dim], dim=-1)
    out = decode_latent(
        q_latent, q_rope, step.k[:, 0], step.lengths, scale=step.scale, backend="triton", validate=False
    )
    step.v = step.k[..., :rank]
    yield error_row(title, errors(out, exact(step)), step.q.dtype)


def merge_rows(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The last of many splits merges: so many launches in a row on one workspace, every result compared."""
    step = new_step(device, sizes.merge_lengths, head_dim=sizes.head_dim)
    splits = sizes.splits[-1]
    batch, n_heads, width = step.q.shape
    workspace = Workspace.new(batch, n_heads, width, splits, device)
    expected, out = exact(step), torch.empty_like(step.q)
    worst = torch.zeros(out.shape[:2], dtype=torch.float64, device=device)
    options: dict[str, Any] = {"scale": step.scale, "num_splits": splits, "workspace": workspace, "out": out}
    options |= {"backend": "triton", "validate": False}
    for _ in range(sizes.repeats):
        out.fill_(torch.nan)
        decode_attention(step.q, step.k, step.v, step.lengths, **options)
        worst = torch.maximum(worst, errors(out, expected))  # hands a NaN on
    title = f"one-launch merge of {splits} splits, {sizes.repeats} times"
    yield error_row(f"{title}: largest error", worst, step.q.dtype, repeats=sizes.repeats)
    left = int(workspace.tickets.count_nonzero())
    details = {"what": "correct", "repeats": sizes.repeats}
    yield Row(f"{title}: tickets left", left, "tickets", 0, "==", details=details)


def graph_row(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """A step captured in a CUDA graph and replayed on other numbers."""
    step = new_step(device, sizes.lengths, head_dim=sizes.head_dim)
    batch, n_heads, width = step.q.shape
    workspace = Workspace.new(batch, n_heads, width, sizes.splits[-1], device)
    out = torch.empty_like(step.q)

    def call() -> None:
        options: dict[str, Any] = {"scale": step.scale, "workspace": workspace, "out": out}
        decode_attention(step.q, step.k, step.v, step.lengths, validate=False, **options)

    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    step.q.normal_()
    graph.replay()
    torch.cuda.synchronize(device)
    yield error_row("in a CUDA graph", errors(out, exact(step)), step.q.dtype)


def stage_row(name: str, device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """A teaching stage, all rows of one length."""
    from kvlearn.kernels.stages import STAGES

    stage, n = STAGES[name], max(sizes.lengths)
    step = new_step(device, (n, n), head_dim=sizes.head_dim)
    out = stage.decode(step.q, step.k, step.v, step.lengths if stage.ragged else n, scale=step.scale)
    yield error_row(f"stage {name}", errors(out, exact(step)), step.q.dtype)


def checks(device: torch.device, sizes: Sizes) -> Mapping[str, Callable[[], Iterator[Row]]]:
    """All checks by name, the most used first."""
    new = partial(new_step, device, sizes.lengths)
    wide: dict[str, Any] = {"head_dim": sizes.head_dim}
    n_heads = 8
    sinks = partial(torch.randn, n_heads, device=device)
    found: dict[str, Callable[[], Iterator[Row]]] = {}

    def check(title: str, make: Callable[[], Step], row: Callable[..., Iterator[Row]], **how: Any) -> None:
        found[title] = lambda: row(title, make(), **how)

    for splits in sizes.splits:
        check(f"up to {splits} splits, ragged lengths", partial(new, **wide), step_row, num_splits=splits)
    for head_dim in sizes.head_dims:
        check(f"head dim {head_dim}", partial(new, head_dim=head_dim), step_row)
    for group in sizes.groups:
        check(f"{group} query heads per KV head", partial(new, group=group, **wide), step_row)
    found["one-launch merge"] = lambda: merge_rows(device, sizes)
    check("window", partial(new, window=sizes.window, **wide), step_row)
    check("window and sinks", partial(new, window=sizes.window, n_sinks=4, **wide), step_row)
    check("sink logits", lambda: new(sink_logits=sinks(), **wide), step_row)
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        for scales in ("head", "key"):
            make = partial(new, kv_dtype=dtype, scales=scales, **wide)
            check(f"{name}, a scale per {scales}", make, step_row)
    for page in sizes.pages:
        check(f"pages of {page}", partial(new, **wide), paged_row, page=page)
    for heads in sizes.latent_heads:
        title = f"latent, {heads} heads"
        found[title] = partial(latent_row, title, device, sizes, heads)
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        check(name, partial(new, dtype=dtype, **wide), step_row)
    if device.type == "cuda":
        found["CUDA graph"] = lambda: graph_row(device, sizes)
    for name in ("v0", "v1", "v2", "v3", "v4", "v5"):
        found[f"stage {name}"] = partial(stage_row, name, device, sizes)
    return found


def parts(device: torch.device, small: bool = False, limit: Limit | None = None) -> list[Part]:
    """A part per check, within ``limit`` together."""
    sizes = SMALL if small else SIZES
    return [Part(f"correct: {name}", rows, 0.0, limit) for name, rows in checks(device, sizes).items()]
