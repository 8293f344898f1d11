"""Attention as released models have it: grouped-query attention with the options that they add.

    q, k, v = W_q x + b_q,  W_k x + b_k,  W_v x + b_v        biases: Qwen2, gpt-oss, GLM
    q, k = norm(q), norm(k)                                   Qwen3, Gemma 3; OLMo 2 over all heads at once
    q, k = RoPE(q), RoPE(k)                                   of the first coordinates of a head: GLM, Phi
    score = cap · tanh(scale · q·k / cap)                     Gemma 2
    head = Σ_s softmax_s(score) v_s                           over a window: Mistral; with a sink: gpt-oss
    y = W_o (sigmoid(W_g x) ⊙ heads) + b_o                    the gate: Qwen3-Next

Without options it is ``gqa``, and with a window it is ``window``; full.py and window.py explain those two.
"""

import math
import sys
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import (
    KV,
    Cache,
    DecodeStep,
    KVCache,
    Mechanism,
    decode_step,
    register,
    token_positions,
)
from kvlearn.attention.core import (
    attend_blockwise,
    causal_attention,
    grouped_attention,
    grouped_partial,
    merge_heads,
    rms_norm_naive,
    split_heads,
    upcast,
    with_sinks,
)
from kvlearn.attention.full import GroupedQueryAttention
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive
from kvlearn.attention.window import BLOCK, RingCache, Window


@register("released")
class ReleasedAttention(Mechanism):
    """Grouped-query attention with the options of released models: biases, norms, a window, sinks, a gate.

    - ``qkv_bias``, ``o_bias``: biases of the projections.
    - ``qk_norm``: RMSNorm of queries and keys before RoPE, of each head alone ("head"; one gain per
      coordinate, for all heads) or of all heads together ("width").
    - ``rotary_dim``: RoPE turns the first so many coordinates of a head and leaves the others; all unless
      given.
    - ``scale`` of the scores, 1/√D unless given; ``softcap``, their cap.
    - ``v_head_dim``: the width of a value, Dv; that of a key, D, unless given.
    - ``window`` W: a query reads the last W tokens, its own included; ``sink_logits``: a learned logit per
      head that takes weight and has no value.
    - ``query_growth`` (β, F, o): the query at position m is multiplied by 1 + β · ln(1 + ⌊(m + o) / F⌋), so
      that scores over long contexts stay sharp.
    - ``gate``: the heads are multiplied by sigmoid(W_g x).

    Cache: B · G · min(max_len, W) · (D + Dv) numbers, all of them read by a step. ``decode``, if set,
    computes the attention of steps of one token, without ``softcap`` and with Dv = D. Raises ValueError for
    an odd ``rotary_dim`` or one above D, for a ``softcap`` or an F that is not above 0, for an unknown
    ``qk_norm``, and for a cache for another window.
    Sources: Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), section 2
    (qk_norm); Gemma Team, "Gemma 2" (2024), section 2 (softcap); OpenAI, "gpt-oss" (2025), section 2.2
    (sink_logits); Nakanishi, "Scalable-Softmax" (2025) for queries that grow; Qiu et al., "Gated Attention
    for Large Language Models" (2025), section 2 (gate).
    """

    decode: DecodeStep | None = None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        rotary_dim: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: Literal["head", "width"] | None = None,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        sink_logits: bool = False,
        query_growth: tuple[float, int, int] | None = None,
        gate: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        H, D = self.n_heads, self.head_dim
        self.n_kv_heads = G = validate.divides(
            "n_kv_heads", H if n_kv_heads is None else n_kv_heads, "n_heads", H
        )
        self.v_head_dim = Dv = D if v_head_dim is None else validate.positive("v_head_dim", v_head_dim)
        self.rotary_dim = D if rotary_dim is None else validate.positive("rotary_dim", rotary_dim)
        validate.at_most("rotary_dim", self.rotary_dim, D, "head_dim")
        if rotary_dim is not None and rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected an even number, got {rotary_dim}")
        self.window = None if window is None else validate.positive("window", window)
        for name, flag in (
            ("qkv_bias", qkv_bias),
            ("o_bias", o_bias),
            ("gate", gate),
            ("sink_logits", sink_logits),
        ):
            validate.instance(name, flag, bool)
        self.scale = (
            D**-0.5 if scale is None else validate.above("scale", validate.in_fp32("scale", scale), 0)
        )
        if softcap is not None:
            validate.above("softcap", validate.in_fp32("softcap", softcap), 0)
        self.softcap = softcap
        if query_growth is not None:
            for number in validate.instance("query_growth", query_growth, (list, tuple)):
                validate.finite("query_growth", number)
        if query_growth is not None and not (
            len(query_growth) == 3 and query_growth[1] > 0 and all(map(math.isfinite, query_growth))
        ):
            raise ValueError(
                f"query_growth: expected (β, F, o), finite and with F above 0, got {query_growth}"
            )
        self.query_growth = query_growth
        validate.above("norm_eps", norm_eps, 0)
        self.qk_norm = validate.one_of("qk_norm", qk_norm, (None, "head", "width"))
        self.q_proj = nn.Linear(d_model, H * D, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, G * D, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, G * Dv, bias=qkv_bias)
        self.o_proj = nn.Linear(H * Dv, d_model, bias=o_bias)
        self.gate_proj = nn.Linear(d_model, H * Dv, bias=False) if gate else None
        if qk_norm is not None:
            self.q_norm = nn.RMSNorm(H * D if qk_norm == "width" else D, eps=norm_eps)
            self.k_norm = nn.RMSNorm(G * D if qk_norm == "width" else D, eps=norm_eps)
        self.sink_logits = nn.Parameter(torch.zeros(H)) if sink_logits else None
        self.rope = Rope(self.rotary_dim, rope)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, RingCache if isinstance(cache, RingCache) else KVCache, source)
        self.check_window(cache)
        positions = token_positions(x, cache)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q = split_heads(q, self.n_heads)  # (B, H, T, D)
        k, v = split_heads(k, self.n_kv_heads), split_heads(v, self.n_kv_heads)  # (B, G, T, D), (B, G, T, Dv)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if self.query_growth is not None:
            beta, every, offset = self.query_growth
            periods = torch.div(positions + offset, every, rounding_mode="floor")  # (#B, T)
            growth = 1 + beta * torch.log1p(periods.to(torch.promote_types(q.dtype, torch.float32)))
            q = (q * growth[:, None, :, None]).to(q.dtype)

        kv = cache.append(k, v) if isinstance(cache, KVCache | RingCache) else KV(k, v, positions)
        if self.decodes_by_function(q, cache):
            options = {} if self.sink_logits is None else {"sink_logits": self.sink_logits}
            heads = decode_step(self.decode, q, kv, scale=self.scale, **options)  # type: ignore[arg-type]
        else:
            heads = self.attend(q, kv)  # (B, H, T, Dv)
        if self.gate_proj is not None:
            heads = heads * split_heads(torch.sigmoid(self.gate_proj(x)), self.n_heads)
        return self.o_proj(merge_heads(heads))

    def check_window(self, cache: Cache | None) -> None:
        """Raise ValueError for a cache for another window."""
        if cache is not None and (window := getattr(cache, "window", None)) != self.window:
            raise ValueError(
                f"cache: expected shapes for window={self.window}, got those for window={window}"
            )

    def rotate(self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"]) -> Float[Tensor, "B H T D"]:
        """RoPE of the first ``rotary_dim`` coordinates of every head."""
        if self.rotary_dim == self.head_dim:
            return self.rope(x, positions)
        turned = self.rope(x[..., : self.rotary_dim], positions)
        return torch.cat((turned, x[..., self.rotary_dim :]), dim=-1)

    def decodes_by_function(self, q: Tensor, cache: Cache | None) -> bool:
        """Whether ``decode`` is set and can compute this step."""
        step = self.decode is not None and cache is not None and q.shape[2] == 1
        return step and self.softcap is None and self.v_head_dim == self.head_dim

    def attend(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T Dv"]:
        """Every query over the keys up to its own position, or the last W of them."""
        plain = self.softcap is None and self.sink_logits is None
        if self.window is None and plain:
            return causal_attention(q, kv.k.to(q.dtype), kv.v.to(q.dtype), kv.positions, self.scale)
        if q.shape[2] == 1 and len(kv.positions) == 1 and kv.k.shape[2] <= self.reach:
            return self.attend_masked(q, kv.k, kv.v, None)
        return attend_blockwise(q, kv, Window(self.reach), BLOCK, self.attend_masked)

    @property
    def reach(self) -> int:
        """The number of tokens that a query reads, at most."""
        return sys.maxsize if self.window is None else self.window

    def attend_masked(
        self, q: Float[Tensor, "B H T D"], k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "B H T Dv"]:
        """Some queries over some keys, and over the sink logit if there is one."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self.softcap is None and self.sink_logits is None:
            return grouped_attention(q, k, v, mask, self.scale)
        part = grouped_partial(q, k, v, mask, self.scale, self.softcap)
        out = part.out if self.sink_logits is None else with_sinks(part, self.sink_logits)
        return out.to(q.dtype)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, H, G, D, wide = len(x), x.shape[1], self.n_heads, self.n_kv_heads, self.head_dim, upcast(x)

        def linear(x: Tensor, part: nn.Linear) -> Tensor:
            y = x @ upcast(part.weight).T
            return y if part.bias is None else y + upcast(part.bias)

        q, k = linear(wide, self.q_proj), linear(wide, self.k_proj)
        v = linear(wide, self.v_proj).reshape(B, T, G, -1)
        if self.qk_norm == "width":
            q, k = rms_norm_naive(q, self.q_norm), rms_norm_naive(k, self.k_norm)
        q, k = q.reshape(B, T, H, D), k.reshape(B, T, G, D)
        if self.qk_norm == "head":
            q, k = rms_norm_naive(q, self.q_norm), rms_norm_naive(k, self.k_norm)
        n = self.rotary_dim
        q, k = (torch.cat((rotate_naive(z[..., :n], self.rope.config), z[..., n:]), dim=-1) for z in (q, k))
        heads = x.new_zeros(B, T, H, self.v_head_dim, dtype=wide.dtype)
        for t in range(T):
            beta, every, offset = self.query_growth or (0.0, 1, 0)
            grown = self.scale * (1 + beta * math.log(1 + (t + offset) // every))
            first = 0 if self.window is None else max(0, t - self.window + 1)
            for h in range(H):
                g = h // (H // G)
                scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k[:, first : t + 1, g]) * grown
                if self.softcap is not None:
                    scores = self.softcap * torch.tanh(scores / self.softcap)
                if self.sink_logits is not None:
                    scores = torch.cat((scores, upcast(self.sink_logits[h]).expand(B, 1)), dim=-1)
                weights = scores.softmax(-1)[:, : t + 1 - first]
                heads[:, t, h] = torch.einsum("bs, bsd -> bd", weights, v[:, first : t + 1, g])
        out = heads.flatten(2)
        if self.gate_proj is not None:
            out = out / (1 + torch.exp(-linear(wide, self.gate_proj)))
        return linear(out, self.o_proj).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache | RingCache:
        dtype, device = self.dtype_and_device(dtype, device)
        G, D, Dv = self.n_kv_heads, self.head_dim, self.v_head_dim
        if self.window is None:
            return KVCache(batch, G, max_len, D, dtype, device, Dv)
        validate.positive("max_len", max_len)
        return RingCache(batch, G, max_len, D, self.window, 0, dtype, device, v_head_dim=Dv)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · G · min(max_len, W) · (D + Dv) · bytes per number."""
        return self.read_bytes(validate.positive("max_len", max_len), batch=batch, dtype=dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · G · min(length, W) · (D + Dv) · bytes per number: all that is kept."""
        tokens = min(validate.positive("length", length), self.reach)
        return self.to_bytes(self.n_kv_heads * tokens * (self.head_dim + self.v_head_dim), batch, dtype)

    @classmethod
    def tiny(cls) -> "ReleasedAttention":
        """All options at once."""
        return cls(
            d_model=24,
            n_heads=6,
            n_kv_heads=2,
            head_dim=8,
            v_head_dim=6,
            rotary_dim=4,
            qkv_bias=True,
            o_bias=True,
            qk_norm="head",
            scale=0.3,
            softcap=3.0,
            window=5,
            sink_logits=True,
            query_growth=(0.5, 4, 1),
            gate=True,
        )

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """Without options."""
        gqa = GroupedQueryAttention.tiny()
        limit = cls(d_model=24, n_heads=6, n_kv_heads=2, head_dim=8)
        limit.load_state_dict(gqa.state_dict())
        return limit, gqa
