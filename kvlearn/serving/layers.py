"""The attention of a batch of sequences of different lengths, over keys and values in blocks.

All new tokens of all sequences are in one row, one after the other: first those of sequences with one new
token, a decode step each, then chunks of prompts. Projections work on all of them together; attention takes
each sequence's own blocks.

Letters beside those of core.py: N new tokens of all sequences, P blocks of a sequence's table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn.attention import (
    GroupedQueryAttention,
    Mechanism,
    MultiHeadLatentAttention,
    RopeConfig,
    WindowAttention,
)
from kvlearn.attention.base import KV
from kvlearn.attention.core import merge_heads, split_heads
from kvlearn.attention.mla import absorbed_attention, fold_up, unfold_up
from kvlearn.attention.recurrent import StateCache
from kvlearn.kernels import decode_attention, decode_latent
from kvlearn.serving.blocks import DROPPED, BlockTable, blocks_for


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one sequence: columns ``start`` to ``stop`` of the batch.

    ``blocks`` are those that the sequence still has, the first of them with the token at position ``first``;
    ``length`` counts its tokens, the new ones included.
    """

    start: int
    stop: int
    blocks: Int[Tensor, "P"]
    first: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Where the new tokens are, and which blocks their sequences have."""

    tokens: Int[Tensor, "1 N"]
    positions: Int[Tensor, "1 N"]
    block: Int[Tensor, "N"]  # that each new token is written to,
    offset: Int[Tensor, "N"]  # and its place there
    lengths: Int[Tensor, "B"]  # of the first B columns' sequences, which have one new token each
    block_table: Int[Tensor, "B P"]
    chunks: list[Chunk]
    last: Int[Tensor, "n"]  # columns of the last new token of every sequence

    @classmethod
    def of(cls, work: Sequence[tuple[BlockTable, Sequence[int]]], page: int, device: torch.device) -> "Batch":
        """From tables and the tokens that follow them, the single tokens first."""
        tokens, positions, blocks, ends = list[int](), list[int](), list[int](), list[int]()
        chunks: list[Chunk] = []
        for table, new in work:
            start, stop = len(tokens), len(tokens) + len(new)
            at = range(table.length, table.length + len(new))
            tokens += new
            positions += at
            blocks += [table.blocks[position // page] for position in at]
            ends.append(stop - 1)
            if len(new) > 1:
                live = table.blocks[: blocks_for(at.stop, page)]
                n_dropped = live.count(DROPPED)
                ids = torch.tensor(live[n_dropped:], device=device)
                chunks.append(Chunk(start, stop, ids, n_dropped * page, at.stop))
        steps = [table for table, new in work if len(new) == 1]
        width = max((len(table.blocks) for table in steps), default=0)
        rows = [table.blocks + [DROPPED] * (width - len(table.blocks)) for table in steps]
        where = torch.tensor(positions, device=device)
        return cls(
            tokens=torch.tensor([tokens], device=device),
            positions=where[None],
            block=torch.tensor(blocks, device=device),
            offset=where % page,
            lengths=torch.tensor([table.length + 1 for table in steps], dtype=torch.int32, device=device),
            block_table=torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(steps), width),
            chunks=chunks,
            last=torch.tensor(ends, device=device),
        )


class PagedAttention:
    """``full``, ``gqa`` and ``window`` over blocks of keys and values (blocks, G, page, D) each."""

    def __init__(self, mixer: GroupedQueryAttention | WindowAttention, page: int) -> None:
        self.mixer, self.page = mixer, page
        self.shape = (2, mixer.n_kv_heads, page, mixer.head_dim)  # of one block
        self.window = mixer.window if isinstance(mixer, WindowAttention) and not mixer.n_sinks else None
        self.options: dict[str, Any] = {}
        if isinstance(mixer, WindowAttention):
            sinks = {} if mixer.sink_logits is None else {"sink_logits": mixer.sink_logits}
            self.options = {"window": mixer.window, "n_sinks": mixer.n_sinks, **sinks}

    def __call__(
        self, x: Float[Tensor, "1 N M"], pages: Float[Tensor, "blocks 2 G page D"], batch: Batch
    ) -> Float[Tensor, "1 N M"]:
        mixer, n_steps = self.mixer, len(batch.lengths)
        k_pages, v_pages = pages[:, 0], pages[:, 1]

        q = mixer.rope(split_heads(mixer.q_proj(x), mixer.n_heads), batch.positions)  # (1, H, N, D)
        k = mixer.rope(split_heads(mixer.k_proj(x), mixer.n_kv_heads), batch.positions)  # (1, G, N, D)
        v = split_heads(mixer.v_proj(x), mixer.n_kv_heads)

        k_pages[batch.block, :, batch.offset] = k[0].transpose(0, 1).to(pages.dtype)
        v_pages[batch.block, :, batch.offset] = v[0].transpose(0, 1).to(pages.dtype)

        heads = torch.empty_like(q)
        if n_steps:
            heads[0, :, :n_steps] = decode_attention(
                q[0, :, :n_steps].transpose(0, 1),
                k_pages,
                v_pages,
                batch.lengths,
                block_table=batch.block_table,
                validate=False,  # the pool keeps tables right
                **self.options,
            ).transpose(0, 1)
        for chunk in batch.chunks:
            new = slice(chunk.start, chunk.stop)
            past = pages[chunk.blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)  # (2, G, P · page, D)
            keys, values = past[:, None, :, : chunk.length - chunk.first]
            slots = torch.arange(chunk.first, chunk.length, device=x.device)[None]
            kv = KV(keys.to(q.dtype), values.to(q.dtype), batch.positions[:, new], slots)
            heads[:, :, new] = mixer.attend(q[:, :, new], kv)
        return mixer.o_proj(merge_heads(heads))


class PagedLatent:
    """``mla`` over blocks of latents (blocks, page, R + Dr), by the absorbed path."""

    window = None

    def __init__(self, mixer: MultiHeadLatentAttention, page: int) -> None:
        self.mixer, self.page = mixer, page
        self.shape = (page, mixer.rank + mixer.rope_dim)

    def __call__(
        self, x: Float[Tensor, "1 N M"], pages: Float[Tensor, "blocks page RDr"], batch: Batch
    ) -> Float[Tensor, "1 N M"]:
        mixer, n_steps, D = self.mixer, len(batch.lengths), self.mixer.head_dim

        q = mixer.q_proj(x) if mixer.q_rank is None else mixer.q_up(mixer.q_norm(mixer.q_down(x)))
        q = split_heads(q, mixer.n_heads)  # (1, H, N, D + Dr)
        q = torch.cat((q[..., :D], mixer.rope(q[..., D:], batch.positions)), dim=-1)
        latent, k_rope = mixer.kv_down(x).split((mixer.rank, mixer.rope_dim), dim=-1)
        k_rope = mixer.rope(k_rope[:, None], batch.positions)[:, 0]
        new_rows = torch.cat((mixer.kv_norm(latent), k_rope), dim=-1)  # (1, N, R + Dr)

        pages[batch.block, batch.offset] = new_rows[0].to(pages.dtype)

        heads = q.new_empty(1, mixer.n_heads, x.shape[1], mixer.v_head_dim)
        if n_steps:
            folded = fold_up(q[0, :, :n_steps].transpose(0, 1)[:, :, None], mixer.up, mixer.rope_dim)
            q_latent, q_rope = folded[:, :, 0].split((mixer.rank, mixer.rope_dim), dim=-1)  # (R, H, ·)
            latents = decode_latent(
                q_latent,
                q_rope,
                pages,
                batch.lengths,
                scale=mixer.scale,
                block_table=batch.block_table,
                validate=False,
            )
            out = unfold_up(latents[:, :, None], mixer.up, D)  # (R, H, 1, Dv)
            heads[0, :, :n_steps] = out[:, :, 0].transpose(0, 1)
        for chunk in batch.chunks:
            new = slice(chunk.start, chunk.stop)
            rows = pages[chunk.blocks].flatten(0, 1)[None, : chunk.length].to(q.dtype)
            at = batch.positions[:, new]
            heads[:, :, new] = absorbed_attention(q[:, :, new], rows, mixer.up, at, mixer.scale)
        return mixer.o_proj(merge_heads(heads))


PagedLayer = PagedAttention | PagedLatent
# By their names in the registry. Subclasses that compute something else are not served.
PAGED: dict[str, Callable[..., PagedLayer]] = {
    "full": PagedAttention,
    "gqa": PagedAttention,
    "window": PagedAttention,
    "mla": PagedLatent,
}


def paged_layer(number: int, mixer: Mechanism, page: int) -> PagedLayer:
    """A model's layer over blocks. Raises ValueError that says why a layer's cache cannot be paged."""
    where, rope = f"layer {number} ({mixer.name})", getattr(getattr(mixer, "rope", None), "config", None)
    if isinstance(mixer.new_cache(1, 1, device="meta"), StateCache):
        raise ValueError(
            f"{where}: a state holds all tokens at once and cannot be divided into blocks; "
            "serve it with kvlearn.serving.StatePrefixes"
        )
    if mixer.name not in PAGED or getattr(mixer, "reader", False):
        raise ValueError(f"{where}: expected layers of {', '.join(PAGED)} with a cache of their own")
    if isinstance(rope, RopeConfig) and rope.depends_on_length:
        raise ValueError(f"{where}: expected angles that do not depend on the length of a sequence")
    if isinstance(mixer, MultiHeadLatentAttention) and not mixer.absorbable:
        raise ValueError(f"{where}: expected decoupled positions (rope_dim above 0)")
    return PAGED[mixer.name](mixer, page)
