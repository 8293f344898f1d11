"""Multi-head latent attention (MLA), complete: the arrangement of DeepSeek-V2, V3 and their successors."""

from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.compressed.latent_attention import LatentAttention
from kvlearn.attention.compressed.latent_memory import Compressed
from kvlearn.attention.core import split_heads
from kvlearn.attention.rope import RopeConfig


@register("mla")
class MultiHeadLatentAttention(LatentAttention):
    """Latent attention with a norm on the latent and, if ``q_rank`` is given, queries from a latent too.

        c = norm(W_down x),  r = W_r x;     q = W_uq norm(W_dq x),  or W_q x without ``q_rank``

    and from there as ``LatentAttention``. The query's latent saves no cache; it saves weights, and
    activations in training. ``rank`` is 4 · D unless given, the paper's choice, or the heads' width where
    that is less. ``scale`` of the scores is 1/√(D + Dr) unless given; DeepSeek multiplies it by mscale² where
    YaRN stretches the context.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), equations 9 to 19; 3.1.2 for the ranks.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        rank: int | None = None,
        q_rank: int | None = None,
        rope_dim: int | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            rank=rank,
            rope_dim=rope_dim,
            rope=rope,
            scale=scale,
        )
        width = self.n_heads * (self.head_dim + self.rope_dim)
        self.q_rank = None if q_rank is None else validate.positive("q_rank", q_rank)
        if self.q_rank is None:
            self.q_proj = nn.Linear(d_model, width, bias=False)
        else:
            self.q_down = nn.Linear(d_model, self.q_rank, bias=False)
            self.q_norm = nn.RMSNorm(self.q_rank, eps=norm_eps)
            self.q_up = nn.Linear(self.q_rank, width, bias=False)
        self.kv_down = nn.Linear(d_model, self.rank + self.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(self.rank, eps=norm_eps)

    def default_rank(self) -> int:
        return min(4 * self.head_dim, self.n_heads * (self.head_dim + self.v_head_dim))

    def queries(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T DDr"]:
        q = self.q_proj(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        return split_heads(q, self.n_heads)

    def compress(self, x: Float[Tensor, "B T M"]) -> Compressed:
        latent, k_rope = self.kv_down(x).split((self.rank, self.rope_dim), dim=-1)
        return Compressed(self.kv_norm(latent), k_rope)

    @classmethod
    def tiny(cls) -> "MultiHeadLatentAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, v_head_dim=6, rank=12, q_rank=16, rope_dim=4)
