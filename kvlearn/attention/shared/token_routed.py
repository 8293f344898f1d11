"""Routing by the token: each new token decides for itself which pool each of its query heads reads."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import Attend, KVAttention
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.shared.routing import one_hot_choice


@register("token_routed")
class TokenRoutedAttention(KVAttention):
    """Grouped attention in which the token chooses the pools: at token t, head h reads argmax_g (x_t W_r)_hg.

        c_thg = one-hot of argmax_g (x_t W_r)_hg, with the gradient of the softmax
        head_th = Σ_g c_thg softmax(q_th K_gᵀ / √D) V_g

    Cache: 2 · B · G · max_len · D numbers. The choice is the reader's, and falls when the token is read from:
    a token that is written must leave its keys in every pool, since any of them may be asked for later. So
    this routing saves nothing over ``gqa`` with as many pools; all it can buy is quality, for G times the
    scores. Close to: Gumaan, "Mixture of Attention Schemes" (2025), which routes between whole schemes.
    """

    chooses_by_content = True

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int = 1,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, rope, reader)
        validate.at_most("n_kv_heads", n_kv_heads, n_heads, "n_heads")
        self.router = nn.Linear(d_model, n_heads * n_kv_heads, bias=False)

    def choice(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H G T 1"]:
        """1 where a head of a token reads a pool."""
        logits = self.router(x).unflatten(-1, (self.n_heads, self.n_kv_heads))
        return one_hot_choice(logits).movedim(1, 3)[..., None]

    def attend(self, attention: Attend, x: Tensor, q: Tensor, kv: KV) -> Float[Tensor, "B H T D"]:
        everywhere = attention(q.repeat(1, self.n_kv_heads, 1, 1), kv)  # all heads in every pool
        by_head = everywhere.unflatten(1, (self.n_kv_heads, self.n_heads)).transpose(1, 2)  # (B, H, G, T, D)
        return (by_head * self.choice(x)).sum(2)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        keys, values, positions = self.kv(x)
        k, v, choice = upcast(keys), upcast(values), upcast(self.choice(x))
        q = upcast(self.rotate(split_heads(self.q_proj(x), self.n_heads), positions))
        heads = torch.zeros_like(q)
        for t in range(x.shape[1]):
            for g in range(self.n_kv_heads):
                scores = torch.einsum("bhd, bsd -> bhs", q[:, :, t], k[:, g, : t + 1]) / self.head_dim**0.5
                read = torch.einsum("bhs, bsd -> bhd", scores.softmax(-1), v[:, g, : t + 1])
                heads[:, :, t] += choice[:, :, g, t] * read
        return self.o_proj(merge_heads(heads).to(x.dtype))

    @classmethod
    def tiny(cls, **options: Any) -> "TokenRoutedAttention":
        return cls(d_model=24, n_heads=5, n_kv_heads=3, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """Pools that are all alike: whichever is chosen, it is full attention whose heads have one key."""
        limit, full = cls(d_model=24, n_heads=3, n_kv_heads=3), FullAttention.tiny()
        for proj in (limit.k_proj, limit.v_proj):
            proj.weight.data = proj.weight.data[:8].repeat(3, 1)
        full.load_state_dict({n: w for n, w in limit.state_dict().items() if n != "router.weight"})
        return limit, full
