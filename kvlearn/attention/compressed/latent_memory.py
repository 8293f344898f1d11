"""What a latent mechanism remembers of a token, and from what: sizes, projections, positions, bytes."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism
from kvlearn.attention.compressed.latent import LatentCache
from kvlearn.attention.rope import Rope, RopeConfig


class Compressed(NamedTuple):
    """Tokens as they are cached: their latents, and the key that all heads share."""

    latent: Float[Tensor, "B T R"]
    k_rope: Float[Tensor, "B T Dr"]


class LatentMemory(Mechanism):
    """One latent of R numbers a token, from which keys and values of all heads follow linearly.

        [c_t, r_t] = compress(x_t),   k_t = [W_uk c_t, RoPE(r_t)],   v_t = W_uv c_t          of each head

    Cache: B · max_len · (R + Dr) numbers, all of them read by a step, once for all heads.

    Positions, by ``rope_dim`` (None: half a head; 0 without ``rope``):
    - Dr > 0, *decoupled*: only r and the queries' last Dr numbers turn; the latent does not, and W_uk can be
      absorbed (DeepSeek-V2, 2024, equations 14 to 18).
    - 0 with ``rope``: the decompressed keys turn. Exact, but the rotation stands between query and W_uk, and
      differs from key to key: nothing can be absorbed (Palu, 2024).

    Raises ValueError for a ``rank`` above the heads' width H · (D + Dv), and for an odd ``rope_dim``.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None,
        v_head_dim: int | None,
        rank: int | None,
        rope_dim: int | None,
        rope: RopeConfig | None,
        scale: float | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.v_head_dim = self.head_dim if v_head_dim is None else validate.positive("v_head_dim", v_head_dim)
        width = self.n_heads * (self.head_dim + self.v_head_dim)
        self.rank = validate.positive("rank", self.default_rank() if rank is None else rank)
        validate.at_most("rank", self.rank, width, "the heads' width, n_heads · (head_dim + v_head_dim)")
        if rope_dim is None:
            rope_dim = 0 if rope is None else max(self.head_dim // 4 * 2, 2)
        self.rope_dim = validate.at_least("rope_dim", rope_dim, 0)
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim: expected an even number, got {rope_dim}")
        self.scale = (self.head_dim + self.rope_dim) ** -0.5 if scale is None else float(scale)
        self.rope = Rope(self.rope_dim or self.head_dim, rope) if rope is not None else None
        self.kv_up = nn.Linear(self.rank, width, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.v_head_dim, d_model, bias=False)

    @abstractmethod
    def default_rank(self) -> int:
        """The rank where none is given."""

    @abstractmethod
    def queries(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T DDr"]:
        """The heads' queries, not rotated; their last Dr numbers belong to the rotated key."""

    @abstractmethod
    def compress(self, x: Float[Tensor, "B T M"]) -> Compressed:
        """Each token by itself as a latent and a shared key, not rotated."""

    @property
    def up(self) -> Float[Tensor, "H DDv R"]:
        """The up-projection by heads: of each, D rows W_uk, then Dv rows W_uv. A view of ``kv_up.weight``."""
        return self.kv_up.weight.unflatten(0, (self.n_heads, -1))

    @property
    def k_up(self) -> Float[Tensor, "H D R"]:
        """W_uk of every head, a view that may be written to."""
        return self.up[:, : self.head_dim]

    @property
    def v_up(self) -> Float[Tensor, "H Dv R"]:
        """W_uv of every head, a view that may be written to."""
        return self.up[:, self.head_dim :]

    @property
    def absorbable(self) -> bool:
        """Whether the up-projection can be absorbed: not where decompressed keys are rotated."""
        return self.rope is None or self.rope_dim > 0

    def rotated(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]) -> tuple[Tensor, Compressed]:
        """Queries and compressed tokens, turned to their positions as far as these are known: see above."""
        q, compressed = self.queries(x), self.compress(x)
        if self.rope is None:
            return q, compressed
        if not self.rope_dim:
            return self.rope(q, positions), compressed
        q, q_rope = q.split((self.head_dim, self.rope_dim), dim=-1)
        k_rope = self.rope(compressed.k_rope[:, None], positions)[:, 0]
        return torch.cat((q, self.rope(q_rope, positions)), dim=-1), compressed._replace(k_rope=k_rope)

    def rotate_keys(self, k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H S D"]:
        """Decompressed keys turned to their positions: slot s holds position s."""
        assert self.rope is not None
        return self.rope(k, torch.arange(k.shape[2], device=k.device)[None])

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LatentCache:
        return LatentCache(batch, max_len, self.rank, self.rope_dim, *self.dtype_and_device(dtype, device))

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · max_len · (R + Dr) · bytes a number."""
        validate.positive("max_len", max_len)
        validate.positive("batch", batch)
        width = self.rank + self.rope_dim
        return batch * max_len * width * self.dtype_and_device(dtype)[0].itemsize

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Everything stored so far, once for all heads: B · length · (R + Dr) · bytes a number.

        (The absorbed road reads no more; the naive one also writes and reads what it decompresses.)
        """
        validate.positive("length", length)
        return self.cache_bytes(length, batch=batch, dtype=dtype)
