"""What native sparse attention (nsa.py) keeps of the past, and the map that compresses a block of it.

l  tokens in a compressed block       d  tokens from the start of one to the next: neighbours overlap
C  compressed blocks that are whole: those of S tokens are ⌊(S - l) / d⌋ + 1, or none
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.cache import KV, Cache, KVCache
from kvlearn.attention.sliding.ring import RingCache


@dataclass(frozen=True)
class Sizes:
    """The lengths of the branches: compressed blocks of l tokens at every d, and the window."""

    compress: int
    stride: int
    window: int

    def whole(self, length: int) -> int:
        """C: how many compressed blocks ``length`` tokens fill."""
        return max(0, (length - self.compress) // self.stride + 1)


def whole_blocks(kv: Float[Tensor, "2 B G T D"], sizes: Sizes) -> Float[Tensor, "2 B G C l D"]:
    """The compressed blocks, not yet compressed, that are whole in T tokens; a view."""
    if not sizes.whole(kv.shape[3]):
        return kv[:, :, :, :0, None].expand(-1, -1, -1, -1, sizes.compress, -1)
    return kv.unfold(3, sizes.compress, sizes.stride).transpose(-1, -2)


class BlockMap(nn.Module):
    """φ: a block of l keys (or values) to one, by a small network that knows the place of each in the block.

        φ(k_1 … k_l) = W_2 gelu(W_1 [k_1 + e_1, …, k_l + e_l])

    The same for all KV heads. Source: Yuan et al., "Native Sparse Attention" (2025), φ of equation 7, which
    says no more of it than that it is an MLP and that it encodes places in the block.
    """

    def __init__(self, head_dim: int, compress: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(compress, head_dim) * 0.02)
        self.mix = nn.Linear(compress * head_dim, head_dim)
        self.out = nn.Linear(head_dim, head_dim)

    def forward(self, blocks: Float[Tensor, "... l D"]) -> Float[Tensor, "... D"]:
        return self.out(F.gelu(self.mix((blocks + self.places).flatten(-2))))


class Memory(NamedTuple):
    """What the three branches read."""

    entries: Float[Tensor, "2 B G C D"]
    tokens: KV
    window: KV


class SparseCache(Cache):
    """The memory of the three branches, and of what is still to be compressed.

    ``entries``  compressed keys and values of the whole blocks so far       (2, B, G, C of max_len, D)
    ``waiting``  the tokens of the compressed block that is not yet whole    (2, B, G, l - 1, D)
    ``tokens``   keys and values to select from: all of them
    ``ring``     keys and values of the last ``window`` tokens
    """

    can_trim = False  # what a ring wrote over and what was compressed cannot come back

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        sizes: Sizes,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(batch, max_len, device)
        self.sizes = sizes
        self.tokens = KVCache(batch, n_heads, max_len, head_dim, dtype, device)
        self.ring = RingCache(batch, n_heads, max_len, head_dim, sizes.window, 0, dtype, device)
        shape = (2, batch, n_heads, min(sizes.compress - 1, max_len), head_dim)
        self.waiting = torch.zeros(shape, dtype=dtype, device=device)
        shape = (2, batch, n_heads, sizes.whole(max_len), head_dim)
        self.entries = torch.zeros(shape, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.entries, self.waiting, *self.tokens.tensors(), *self.ring.tensors()]

    def reset(self) -> None:
        super().reset()
        self.tokens.reset()
        self.ring.reset()

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> tuple[KV, KV]:
        """Write the keys and values of selection and of the window, side by side on dimension 1 (H = 2G).

        Returns what the new tokens may read of each.
        """
        _, n_heads, _, head_dim = self.tokens.k.shape
        for name, new in (("k", k), ("v", v)):
            validate.tensor(name, new, (self.batch, 2 * n_heads, k.shape[2], head_dim), device=self.device)
        (k_slc, k_win), (v_slc, v_win) = k.chunk(2, dim=1), v.chunk(2, dim=1)
        self.advance(k.shape[2])
        return self.tokens.append(k_slc, v_slc), self.ring.append(k_win, v_win)

    def fill(self, kv: Float[Tensor, "2 B G T D"]) -> Float[Tensor, "2 B G n l D"]:
        """Take the newest tokens, ``append``ed before, for compression: return the blocks that they complete.

        Only a step that fills a block, one in d, reads the tokens that wait.
        """
        kv, old = kv.detach().to(self.waiting.dtype), self.length - kv.shape[3]
        done, whole = self.sizes.whole(old), self.sizes.whole(self.length)
        waited = old - done * self.sizes.stride
        if whole == done:
            self.waiting[:, :, :, waited : waited + kv.shape[3]] = kv
            return whole_blocks(kv[:, :, :, :0], self.sizes)
        kv = torch.cat((self.waiting[:, :, :, :waited], kv), dim=3)
        rest = kv[:, :, :, (whole - done) * self.sizes.stride :]
        self.waiting[:, :, :, : rest.shape[3]] = rest
        return whole_blocks(kv, self.sizes)

    @property
    def compressed(self) -> Float[Tensor, "2 B G C D"]:
        """The entries of the whole blocks so far; a view."""
        return self.entries[:, :, :, : self.sizes.whole(self.length)]

    def add(self, entries: Float[Tensor, "2 B G n D"]) -> None:
        """Write the newest compressed keys and values: those of the blocks that ``fill`` returned."""
        self.compressed[:, :, :, -entries.shape[3] :] = entries.to(self.entries.dtype)
