"""What is kept of a compressed sequence: entries, the block that is still filling, and a window of tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn.attention.cache import Cache
from kvlearn.attention.sliding.ring import RingCache
from kvlearn.attention.sparse.compressor import Compressor


class Entries:
    """One compressor's past: all entries, at most m - 1 tokens that wait, and what overlaps with the next.

    A block is compressed as its last token comes, so that m tokens never wait. Once compressed, a block
    cannot be opened again.
    """

    def __init__(
        self, compressor: Compressor, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        rate, width = compressor.rate, compressor.width
        both = 2 * width if compressor.overlap else width
        self.rate = rate
        self.entries = torch.zeros(batch, max_len // rate, width, dtype=dtype, device=device)
        self.waiting = torch.zeros(batch, rate - 1, 2, both, dtype=dtype, device=device)
        before = rate if compressor.overlap else 0
        self.previous = torch.zeros(batch, before, 2, width, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.entries, self.waiting, self.previous]

    def extend(
        self, compressor: Compressor, x: Float[Tensor, "B T M"], length: int
    ) -> Float[Tensor, "B E D"]:
        """Take in tokens that stand behind ``length`` others; return a view of all entries that are whole."""
        first, waiting = divmod(length, self.rate)
        tokens = torch.cat((self.waiting[:, :waiting].to(x.dtype), compressor.project(x)), dim=1)
        n_blocks, left = divmod(tokens.shape[1], self.rate)
        if n_blocks:
            whole = tokens[:, : n_blocks * self.rate]
            previous = self.previous.to(x.dtype) if compressor.overlap and first else None
            new = compressor.compress(whole, previous, first)
            self.entries[:, first : first + n_blocks] = new.to(self.entries.dtype)
            if compressor.overlap:
                last = whole[:, -self.rate :, :, : compressor.width]
                self.previous.copy_(last)
        self.waiting[:, :left] = tokens[:, tokens.shape[1] - left :].to(self.waiting.dtype)
        return self.entries[:, : first + n_blocks]


class CompressedCache(Cache):
    """The last tokens as they are, in a ring, and the entries of one compressor or more.

    It does not trim: the tokens of a block that has been compressed cannot come back to wait.
    """

    can_trim = False

    def __init__(self, window: RingCache, memories: list[Entries], sizes: dict[str, object]) -> None:
        super().__init__(window.batch, window.max_len, window.device)
        self.window, self.memories, self.sizes = window, memories, sizes

    def tensors(self) -> list[Tensor]:
        return [self.window.k, *(t for memory in self.memories for t in memory.tensors())]

    def expect_sizes(self, sizes: dict[str, object]) -> None:
        """Raise ValueError where this is the cache of a layer of other sizes; asked before writing."""
        if self.sizes != sizes:
            raise ValueError(f"cache: expected shapes for {sizes}, got those for {self.sizes}")

    def extend(
        self, x: Float[Tensor, "B T M"], k: Float[Tensor, "B 1 T D"], compressors: list[Compressor]
    ) -> tuple[Float[Tensor, "B 1 S D"], Int[Tensor, "1 S"], list[Tensor]]:
        """Take in new tokens; return those that are still there, their positions, and all entries."""
        kv = self.window.append(k, k)
        memories = [
            memory.extend(compressor, x, self.length)
            for memory, compressor in zip(self.memories, compressors, strict=True)
        ]
        self.advance(x.shape[1])
        return kv.k.to(x.dtype), kv.places, memories

    def reset(self) -> None:
        super().reset()
        self.window.reset()
