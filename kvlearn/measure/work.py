"""The work of a computation: floating-point operations, and bytes moved between memory and the processor.

Counted by formula, for ``new`` tokens per sequence that follow ``cached`` ones:
prefill is (new=N, cached=0), a decode step (new=1, cached=N-1).
A multiplication with its addition is 2 FLOPs; softmax, norms and RoPE are not counted. Bytes are the least
that must move: every weight, cached number, input and output once; scores stay on the chip.
"""

from dataclasses import dataclass

import torch

from kvlearn import validate


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes; works add up."""

    flops: float
    nbytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.nbytes

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.nbytes * times)

    __rmul__ = __mul__


def _check(dtype: torch.dtype, **sizes: int) -> list[int]:
    """``sizes`` as Python's integers, which do not overflow."""
    validate.instance("dtype", dtype, torch.dtype)
    return [validate.positive(name, size) for name, size in sizes.items()]


def linear_work(d_in: int, d_out: int, *, tokens: int, dtype: torch.dtype = torch.float32) -> Work:
    """y = x Wᵀ for ``tokens`` rows: 2 · tokens · d_in · d_out FLOPs; W, x and y moved once."""
    d_in, d_out, tokens = _check(dtype, d_in=d_in, d_out=d_out, tokens=tokens)
    numbers = d_in * d_out + tokens * (d_in + d_out)
    return Work(2 * tokens * d_in * d_out, numbers * dtype.itemsize)


def attention_work(
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    new: int,
    cached: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """softmax(QKᵀ)V, causal, without its projections.

    FLOPs: 4 · B · H · D · pairs (2 for the score, 2 for the weighted sum), where the mask lets through
    pairs = new · cached + new · (new + 1) / 2. Bytes: keys and values of all tokens, 2 · B · G · D · (cached
    + new) numbers, and queries and outputs, 2 · B · H · D · new.
    """
    n_heads, n_kv_heads, head_dim, new, batch = _check(
        dtype, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, new=new, batch=batch
    )
    cached = validate.at_least("cached", cached, 0)
    pairs = new * cached + new * (new + 1) // 2
    numbers = 2 * batch * head_dim * (n_kv_heads * (cached + new) + n_heads * new)
    return Work(4 * batch * n_heads * head_dim * pairs, numbers * dtype.itemsize)


def attention_layer_work(
    d_model: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    new: int,
    cached: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """An attention layer: the four projections (queries, keys, values, output) around ``attention_work``."""
    core = attention_work(n_heads, n_kv_heads, head_dim, new=new, cached=cached, batch=batch, dtype=dtype)
    d_model, n_heads, n_kv_heads, head_dim, new, batch = _check(
        dtype,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        new=new,
        batch=batch,
    )
    tokens = batch * new
    q = linear_work(d_model, n_heads * head_dim, tokens=tokens, dtype=dtype)
    kv = linear_work(d_model, 2 * n_kv_heads * head_dim, tokens=tokens, dtype=dtype)
    o = linear_work(n_heads * head_dim, d_model, tokens=tokens, dtype=dtype)
    return q + kv + o + core


def decoder_work(
    n_parameters: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    new: int,
    cached: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """A whole decoder: 2 FLOPs per token per parameter in a matrix product, each read once, + attention.

    ``n_parameters``: those that enter a matrix product (tied embeddings once; an input table that is only
    looked up, not at all). Activations between the layers are small beside the weights and not counted.
    """
    core = attention_work(n_heads, n_kv_heads, head_dim, new=new, cached=cached, batch=batch, dtype=dtype)
    n_parameters = validate.at_least("n_parameters", n_parameters, 0)
    n_layers, new, batch = _check(dtype, n_layers=n_layers, new=new, batch=batch)
    return Work(2 * batch * new * n_parameters, n_parameters * dtype.itemsize) + n_layers * core
