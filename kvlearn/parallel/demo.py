"""The demonstration of chapter 08 and ``torchrun … -m kvlearn.parallel.ring``, run on every rank."""

import os
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from kvlearn.attention.core import attention
from kvlearn.model import Decoder
from kvlearn.parallel.blockwise import Rule
from kvlearn.parallel.decoder import ParallelDecoder
from kvlearn.parallel.layout import Layout, Order
from kvlearn.parallel.processes import start
from kvlearn.parallel.ring import Log, ring_attention


def compare(
    n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int, order: str, window: int | None, seed: int = 0
) -> dict[str, Any]:
    """One forward and backward pass over the default group against one device: differences, bytes, work.

    "forward" is what this rank did in the forward pass, in order: (what, owner of the block).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    layout, rule = Layout(n_tokens, world, order), Rule(window=window)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    q, d_out = torch.randn(2, 1, n_heads, n_tokens, head_dim, generator=generator)
    k, v = torch.randn(2, 1, n_kv_heads, n_tokens, head_dim, generator=generator)
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    wide_k, wide_v = (x.repeat_interleave(n_heads // n_kv_heads, dim=1) for x in whole[1:])
    at = torch.arange(n_tokens)
    out = attention(whole[0], wide_k, wide_v, rule.visible(at, at))
    expected = [out, *torch.autograd.grad(out, whole, d_out.double())]

    parts = [layout.shard(x, rank, dim=2).requires_grad_() for x in (q, k, v)]
    log = Log()
    mine = ring_attention(parts[0], parts[1], parts[2], layout, rule, log=log)
    forward, pairs, events = log.bytes_sent, log.pairs, list(log.events)
    got = [mine, *torch.autograd.grad(mine, parts, layout.shard(d_out, rank, dim=2))]
    differences = [
        (a - layout.shard(b, rank, dim=2)).abs().max().item() for a, b in zip(got, expected, strict=True)
    ]
    return {
        "rank": rank,
        "output differs by": differences[0],
        "gradients differ by": max(differences[1:]),
        "bytes sent forward": forward,
        "bytes sent backward": log.bytes_sent - forward,
        "visible pairs": pairs,
        "forward": [(what, owner) for what, _, owner, _ in events],
    }


def write(decoder: Decoder, tokens: Tensor, n_new: int, order: Order = "striped") -> dict[str, Any]:
    """``tokens`` (1, T) continued by the ranks of the default group, and this rank's bytes in all layers."""
    parallel = ParallelDecoder(decoder, order)
    parallel.generate(tokens, 1)
    prompt = parallel.log.bytes_sent
    text = parallel.generate(tokens, n_new)
    stored = parallel.new_caches(1, text.shape[1], tokens.shape[1])
    return {
        "rank": dist.get_rank(),
        "tokens": text,
        "stored": sum(cache.nbytes for cache in stored),
        "sent by the prompt": prompt,
        "sent by a step": (parallel.log.bytes_sent - 2 * prompt) // (n_new - 1),
    }


def main(
    tokens: Annotated[int, typer.Option(help="of the sequence, on all ranks together")] = 1000,
    heads: Annotated[int, typer.Option(help="query heads")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads, which travel")] = 2,
    head_dim: Annotated[int, typer.Option(help="numbers per head")] = 32,
    order: Annotated[str, typer.Option(help="contiguous, striped or zigzag")] = "striped",
    window: Annotated[int, typer.Option(help="tokens that a query sees; 0: all")] = 0,
    seconds: Annotated[float, typer.Option(help="how long ranks wait for each other")] = 20,
) -> None:
    """Ring attention over the processes that torchrun has started, against one device in fp64."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start(rank, world, seconds)
    row = compare(tokens, heads, kv_heads, head_dim, order, window or None)
    rows: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(row, rows)
    for row in rows or ():
        events = row.pop("forward")
        shown = (
            f"{name} {value:.1e}" if "differ" in name else f"{name} {value:,}" for name, value in row.items()
        )
        typer.echo("   ".join(shown))
        typer.echo("       forward: " + ", ".join(f"{what} {owner}" for what, owner in events))
    dist.destroy_process_group()
