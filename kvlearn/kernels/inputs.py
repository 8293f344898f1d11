"""The arguments of one decode step, shared by the PyTorch form, the kernel and the checks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlearn import validate

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Request:
    """One decode step. Latent attention has ``q_rope``, one KV head, and no ``v``: the latent is the value.

    Caches are (B, G, S, D), or with a ``block_table`` (pages, G, page, D). A scale has its cache's shape
    without the last dimension.
    """

    q: Tensor  # (B, H, D)
    q_rope: Tensor | None  # (B, H, Dr)
    k: Tensor  # (B, G, S, D), latent: (B, 1, S, D + Dr)
    v: Tensor | None  # (B, G, S, Dv)
    lengths: Tensor  # (B,)
    scale: float
    window: int | None = None
    n_sinks: int = 0
    sink_logits: Tensor | None = None  # (H,)
    block_table: Tensor | None = None  # (B, pages per row)
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    out_scale: float = 1.0

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def n_heads(self) -> int:
        return self.q.shape[1]

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def value_dim(self) -> int:
        return self.q.shape[2] if self.v is None else self.v.shape[3]

    @property
    def page(self) -> int | None:
        return None if self.block_table is None else self.k.shape[2]

    @property
    def capacity(self) -> int:
        """The most tokens that a row can hold."""
        return self.k.shape[2] if self.block_table is None else self.k.shape[2] * self.block_table.shape[1]

    def live(self, length: int) -> Iterator[slice]:
        """Positions that a row of ``length`` tokens attends to: the kept sinks, then the window."""
        begin = 0 if self.window is None else max(length - self.window, 0)
        kept = min(self.n_sinks, begin)
        if kept:
            yield slice(0, kept)
        yield slice(begin, length)


def validate_tensors(**arguments: object) -> None:
    """Raise TypeError for an argument that is not a tensor."""
    for name, value in arguments.items():
        validate.instance(name, value, Tensor)


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Check the dimensions that scales are expanded to."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        validate.tensor(name, cache, ("rows or pages", "KV heads", "slots", "width"))


def check_shapes(request: Request) -> None:
    """Check shapes, dtypes and devices. Raises ValueError or TypeError that names the argument."""
    q, k, device = request.q, request.k, request.q.device
    latent = request.v is None
    q_name, k_name = ("q_latent", "cache") if latent else ("q", "k_cache")
    validate.tensor(q_name, q, ("batch", "heads", "width"))
    validate.one_of(f"{q_name}.dtype", q.dtype, FLOATS)
    batch, n_heads, width = q.shape
    for dimension, size in enumerate(q.shape):
        validate.positive(f"{q_name}.shape[{dimension}]", size)
    if request.q_rope is not None:
        rope = (batch, n_heads, "width")
        width += validate.tensor("q_rope", request.q_rope, rope, dtype=q.dtype, device=device).shape[2]
    rows: int | str = batch if request.block_table is None else "pages"
    sizes = (rows, "slots", width) if latent else (rows, "KV heads", "slots", width)
    cache = k[:, 0] if latent else k  # as it was given
    validate.tensor(k_name, cache, sizes, device=device)
    for dimension, size in enumerate(cache.shape[:-1]):
        validate.positive(f"{k_name}.shape[{dimension}]", size)
    validate.divides(f"{k_name}.shape[1] (KV heads)", k.shape[1], "heads", n_heads)
    if request.v is not None:
        validate.tensor("v_cache", request.v, (*k.shape[:3], "width"), dtype=k.dtype, device=device)
        validate.positive("v_cache.shape[3]", request.v.shape[3])
    # fp32 holds every number of the other formats; fp16 does not hold all of bf16's.
    floats = FLOATS if q.dtype == torch.float32 else (q.dtype,)
    validate.one_of(f"{k_name}.dtype", k.dtype, (*floats, *QUANTISED))
    validate.tensor("lengths", request.lengths, (batch,), dtype=torch.int32, device=device)
    if request.window is not None:
        validate.positive("window", request.window)
    validate.at_least("n_sinks", request.n_sinks, 0)
    if request.sink_logits is not None:
        validate.tensor("sink_logits", request.sink_logits, (n_heads,), device=device)
        validate.floating("sink_logits.dtype", request.sink_logits.dtype)
    if request.block_table is not None:
        table = validate.tensor(
            "block_table", request.block_table, (batch, "pages"), dtype=torch.int32, device=device
        )
        validate.positive("block_table.shape[1] (pages)", table.shape[1])
    for name, given in (("k_scale", request.k_scale), ("v_scale", request.v_scale)):
        if given is not None:
            validate.tensor(name, given, tuple(k.shape[:3]), device=device)
            validate.floating(f"{name}.dtype", given.dtype)


def check_memory(name: str, out: Tensor) -> None:
    """Raise ValueError if two numbers of a tensor that is written to may share memory.

    Taken by their strides, smallest first, each dimension must step over all that the ones before it reach.
    Strides that interleave without a shared number, 2 and 3 say, are refused too.
    """
    reach = 0  # of the dimensions so far, in numbers from the first to the last
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name}: expected memory of its own for every number, got shape {tuple(out.shape)} with "
                    f"strides {out.stride()}"
                )
            reach += stride * (size - 1)


def check_values(request: Request) -> None:
    """Check lengths against the cache, and the pages in use against the pool. Synchronises with a GPU."""
    lengths = request.lengths
    if bool(((lengths < 0) | (lengths > request.capacity)).any()):
        raise ValueError(
            f"lengths: expected 0 to {request.capacity} (the cache's capacity), got {lengths.tolist()}"
        )
    if request.block_table is None or request.page is None:
        return
    n_pages = request.k.shape[0]
    for row, length in enumerate(lengths.tolist()):
        for live in request.live(length):
            needed = request.block_table[row, live.start // request.page : -(-live.stop // request.page)]
            if bool(((needed < 0) | (needed >= n_pages)).any()):
                raise ValueError(
                    f"block_table: expected pages 0 to {n_pages - 1}, got {needed.tolist()} in row {row}"
                )


def number(name: str, value: float) -> float:
    """A finite number; unchecked while ``torch.compile`` traces, when it may be a symbol."""
    return float(value) if torch.compiler.is_compiling() else validate.in_fp32(name, value)


def split_scale(
    name: str, scale: float | Tensor | None, cache: Tensor, latent: bool = False
) -> tuple[float, Tensor | None]:
    """``scale`` as (number, None), or as (1, a view in the cache's shape without its last dimension).

    ``scale``: a number, one per KV head (G,), or one per key; of a ``latent`` cache, whose single KV head is
    not a dimension that the caller knows, a number or one per key.
    """
    if scale is None and cache.dtype == torch.int8:
        raise ValueError(f"{name}: expected the scale of an int8 cache, got None")
    if not isinstance(scale, Tensor):
        return 1.0 if scale is None else number(name, scale), None
    shape = cache.shape[:3]
    whole = (shape[0], shape[2]) if latent else tuple(shape)
    at = 1 if scale.dim() == (2 if latent else 1) else None  # the dimension that it lacks
    try:
        if latent and scale.dim() not in (0, 2):
            raise RuntimeError
        return 1.0, (scale if at is None else scale.unsqueeze(at)).expand(shape)
    except RuntimeError:
        of_heads = "" if latent else f" ({shape[1]},) for the KV heads,"
        raise ValueError(
            f"{name}: expected a number,{of_heads} or {whole}; got shape {tuple(scale.shape)}"
        ) from None
