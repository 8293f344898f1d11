"""RWKV: layers that work on a mixture of each token and the one before it (token shift), and keep a state.

RWKV-4 mixes tokens by an average of all values, weighted by their keys and by their age, each channel for
itself; its feed-forward is shifted too, so it is a layer with a cache here. RWKV-7 keeps a matrix per head,
updated by the generalised delta rule of delta.py.
Sources: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023); Peng et al., "RWKV-7 Goose with
Expressive Dynamic State Evolution" (2025).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register, token_positions
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.delta import generalised_delta_rule
from kvlearn.attention.recurrent import FORMS, StateCache, load_state, state_dtype, store_state

LOWEST = -1e38  # the exponent of an empty sum: finite, so that the difference of two of them is not NaN


def shift_tokens(x: Float[Tensor, "B T M"], last: Float[Tensor, "B M"]) -> Float[Tensor, "B T M"]:
    """For every token of ``x`` the one before it; ``last`` comes before the first."""
    return torch.cat((last[:, None].to(x.dtype), x[:, :-1]), dim=1)


def rising(channels: int, power: float) -> Float[Tensor, "M"]:
    """(i / channels)^power, from 0 to nearly 1: a start in which channels differ from each other."""
    return (torch.arange(channels, dtype=torch.float64) / channels) ** power


class Sums(NamedTuple):
    """Numerator and denominator, both to be multiplied by e^top. ``top`` is a scale, and has no gradient."""

    num: Float[Tensor, "..."]
    den: Float[Tensor, "..."]
    top: Float[Tensor, "..."]

    def decay(self, by: Tensor) -> "Sums":
        """Both sums times e^-by."""
        return Sums(self.num, self.den, self.top - by)

    def add(self, other: "Sums") -> "Sums":
        """Sums over the terms of both. No exponent is above 0, and one of the two is 0."""
        top = torch.maximum(self.top, other.top).detach()
        a, b = torch.exp(self.top - top), torch.exp(other.top - top)
        return Sums(a * self.num + b * other.num, a * self.den + b * other.den, top)

    @staticmethod
    def of(exponent: Tensor, v: Tensor) -> "Sums":
        """The sums of a single term."""
        return Sums(v, torch.ones_like(v), exponent)


def wkv(
    w: Float[Tensor, "M"],
    u: Float[Tensor, "M"],
    k: Float[Tensor, "B T M"],
    v: Float[Tensor, "B T M"],
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 256,
) -> tuple[Float[Tensor, "B T M"], Sums]:
    """RWKV-4's average of all values, weighted by their keys and by their age.

        wkv_t = (Σ_{s<t} e^{k_s - (t-1-s) w} v_s + e^{k_t + u} v_t) / (the same without v)

    A key is a number per channel, and there is no query. A token loses a factor e^-w of its weight with every
    token that follows; at its own position its weight is e^u times as much. e^k may overflow, so the sums are
    kept relative to the largest exponent in them, as FlashAttention keeps its softmax.

    Returns the averages and the ``Sums`` of (B, M) after the last token, both in fp32 at least. ``form`` is
    "recurrent", a bare loop, or "chunked": ``wkv_blocked`` over ``chunk`` tokens at a time. Raises ValueError
    or TypeError for tensors that do not fit each other, and for w below 0 or not finite.
    Source: Peng et al. (2023), on the WKV operator, and the appendix on its form as an RNN.
    """
    validate.tensor("k", k, ("batch", "time", "channels"))
    validate.at_least("k.shape[0] (batch)", k.shape[0], 1)
    validate.at_least("k.shape[1] (time)", k.shape[1], 1)
    B, T, M = k.shape
    validate.tensor("v", v, (B, T, M), dtype=k.dtype, device=k.device)
    validate.floating("k", k.dtype)
    for name, x in (("w", w), ("u", u)):
        validate.floating(name, validate.tensor(name, x, (M,), device=k.device).dtype)
    if validate.may_read(w) and not bool(((w >= 0) & w.isfinite()).all()):
        raise ValueError(f"w: expected finite numbers of at least 0, decays e^-w in (0, 1], got {w.tolist()}")
    validate.one_of("form", form, ("recurrent", "chunked"))
    chunk = validate.positive("chunk", chunk)
    k, v = upcast(k), upcast(v)
    w, u = w.to(k.dtype), u.to(k.dtype)
    if state is None:
        sums = Sums(k.new_zeros(B, M), k.new_zeros(B, M), k.new_full((B, M), LOWEST))
    else:
        if len(validate.instance("state", state, (tuple, list))) != len(Sums._fields):
            raise ValueError(f"state: expected {', '.join(Sums._fields)}, got {len(state)} tensors")
        parts = zip(Sums._fields, state, strict=True)
        sums = Sums(
            *(validate.tensor(f"state.{n}", x, (B, M), device=k.device).to(k.dtype) for n, x in parts)
        )
    if form == "recurrent":
        return wkv_recurrent(w, u, k, v, sums)
    outs = []
    for k_part, v_part in zip(k.split(chunk, dim=1), v.split(chunk, dim=1), strict=True):
        out, sums = wkv_blocked(w, u, k_part, v_part, sums)
        outs.append(out)
    return torch.cat(outs, dim=1), sums


def wkv_recurrent(w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Sums) -> tuple[Tensor, Sums]:
    """One token after the other: read with the token's bonus, then decay and write."""
    outs = []
    for k_t, v_t in zip(k.unbind(dim=1), v.unbind(dim=1), strict=True):
        read = past.add(Sums.of(k_t + u, v_t))
        outs.append(read.num / read.den)
        past = past.decay(w).add(Sums.of(k_t, v_t))
    return torch.stack(outs, dim=1), past


def wkv_blocked(w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Sums) -> tuple[Tensor, Sums]:
    """The same in about 2 √T steps: T tokens as √T blocks of √T.

    First the sums inside each block, token after token for all blocks at once; then the sums over all that
    comes before each block, block after block; then both added, for all tokens at once.
    """
    T = k.shape[1]
    width = math.isqrt(T - 1) + 1
    k_cut, v_cut = (F.pad(x, (0, 0, 0, -T % width)).unflatten(1, (-1, width)) for x in (k, v))
    nothing = torch.zeros_like(v_cut[:, :, 0])
    inside = Sums(nothing, nothing, nothing + LOWEST)
    earlier = []  # for each token: the sums over the tokens before it in its block
    for i in range(width):
        earlier.append(inside)
        inside = inside.decay(w).add(Sums.of(k_cut[:, :, i], v_cut[:, :, i]))
    before = []  # for each block: the sums over all tokens before it
    for block in zip(*(x.unbind(dim=1) for x in inside), strict=True):
        before.append(past)
        past = past.decay(width * w).add(Sums(*block))
    steps = torch.arange(width, dtype=w.dtype, device=w.device)[:, None]
    in_block = Sums(*(torch.stack(parts, dim=2) for parts in zip(*earlier, strict=True)))
    in_front = Sums(*(torch.stack(parts, dim=1)[:, :, None] for parts in zip(*before, strict=True)))
    sums = Sums(*(x.flatten(1, 2)[:, :T] for x in in_front.decay(steps * w).add(in_block)))
    read = sums.add(Sums.of(k + u, v))
    # Not the sum over the last block, which includes the padding.
    last = Sums(*(x[:, -1] for x in sums)).decay(w).add(Sums.of(k[:, -1], v[:, -1]))
    return read.num / read.den, last


@register("rwkv4")
class Rwkv4(Mechanism):
    """RWKV-4's time mixing, the layer that mixes tokens; its feed-forward is ``rwkv4_channel``.

        k_t = W_k (μ_k ⊙ x_t + (1 - μ_k) ⊙ x_{t-1}),   v_t and r_t alike with μ_v and μ_r
        y_t = W_o (σ(r_t) ⊙ wkv_t),   wkv_t as in ``wkv``, with w = e^time_decay and u = time_first

    Each of the d_model channels is a head of size 1; ``n_heads`` must divide d_model and has no other effect.
    The published start of decays and μ depends on the layer's depth, which a layer does not know here: each
    begins as the one in the middle of the depth.

    Cache: B · 4 · d_model numbers: the last token's input, and three for the sums; every step reads all of
    it. RWKV-4-14B, with a d_model of 5120, keeps 20,480 of them per layer, 82 kB in fp32.
    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), on time mixing.
    """

    forms = ("recurrent", "chunked")
    form = "chunked"
    chunk = 256

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__(d_model, n_heads, None)
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_value = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.time_decay = nn.Parameter(torch.empty(d_model))
        self.time_first = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published code's start, at half the depth: decays from slow, e^-5 per token, to fast, e^3."""
        channels = torch.arange(self.d_model, dtype=torch.float64)
        depth = 0.5
        self.time_mix_key.copy_(rising(self.d_model, 1 - depth))
        self.time_mix_value.copy_(rising(self.d_model, 1 - depth) + 0.3 * depth)
        self.time_mix_receptance.copy_(rising(self.d_model, 0.5 * (1 - depth)))
        part = channels / max(self.d_model - 1, 1)
        self.time_decay.copy_(-5 + 8 * part ** (0.7 + 1.3 * depth))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channels + 1) % 3 - 1))

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        past = shift_tokens(x, state["last"])
        k = self.k_proj(torch.lerp(past, x, self.time_mix_key))
        v = self.v_proj(torch.lerp(past, x, self.time_mix_value))
        r = self.r_proj(torch.lerp(past, x, self.time_mix_receptance))
        w = upcast(self.time_decay).clamp_max(60.0).exp()  # e^-(e^60) is 0 already, and e^89 overflows
        sums = (state["num"], state["den"], state["top"])
        average, sums = wkv(w, self.time_first, k, v, sums, form=form, chunk=self.chunk)  # (B, T, M)
        y = self.o_proj((torch.sigmoid(upcast(r)) * average).to(x.dtype))
        store_state(cache, {"last": upcast(x[:, -1]), **sums._asdict()}, x.shape[1])
        return y

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The average as a softmax over the tokens so far: each key loses w with every token that follows."""
        wide, w, u = upcast(x), upcast(self.time_decay).exp(), upcast(self.time_first)
        before = torch.zeros_like(wide[:, 0])
        keys: list[Tensor] = []  # of the tokens before t, each less w · the tokens between
        values: list[Tensor] = []
        ys: list[Tensor] = []
        for t in range(x.shape[1]):
            k, v, r = (
                (upcast(mix) * wide[:, t] + (1 - upcast(mix)) * before) @ upcast(proj.weight).T
                for mix, proj in (
                    (self.time_mix_key, self.k_proj),
                    (self.time_mix_value, self.v_proj),
                    (self.time_mix_receptance, self.r_proj),
                )
            )
            values.append(v)
            weights = torch.stack([*keys, k + u], dim=1).softmax(dim=1)  # (B, t + 1, M)
            average = (weights * torch.stack(values, dim=1)).sum(dim=1)
            ys.append((torch.sigmoid(r) * average) @ upcast(self.o_proj.weight).T)
            keys = [*(key - w for key in keys), k]
            before = wide[:, t]
        return torch.stack(ys, dim=1).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = dict.fromkeys(("last", "num", "den", "top"), (self.d_model,))
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device, {"top": LOWEST})

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · 4 · d_model · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        return self.to_bytes(4 * self.d_model, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "Rwkv4":
        return cls(d_model=24, n_heads=3)


@register("rwkv4_channel")
class Rwkv4ChannelMix(Mechanism):
    """RWKV-4's channel mixing: a feed-forward over two tokens, and a layer here, since it needs a cache.

        k_t = relu(W_k (μ_k ⊙ x_t + (1 - μ_k) ⊙ x_{t-1}))²,   r_t = W_r (μ_r ⊙ x_t + (1 - μ_r) ⊙ x_{t-1})
        y_t = σ(r_t) ⊙ W_v k_t

    A model of it takes layers=("rwkv4", "rwkv4_channel") and d_ff=0. ``hidden`` is the width of k, 4 d_model
    unless given; ``n_heads`` must divide d_model and has no other effect. W_v is called ``o_proj``, the name
    of the projection back to the residual stream in every mechanism.

    Cache: B · d_model numbers, the last token's input.
    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), on channel mixing.
    """

    forms = ("recurrent", "chunked")
    form = "chunked"

    def __init__(self, d_model: int, n_heads: int, *, hidden: int | None = None) -> None:
        super().__init__(d_model, n_heads, None)
        self.hidden = validate.positive("hidden", 4 * d_model if hidden is None else hidden)
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, self.hidden, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(self.hidden, d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published code's start of μ, at half the depth, as in ``rwkv4``."""
        self.time_mix_key.copy_(rising(self.d_model, 0.5))
        self.time_mix_receptance.copy_(rising(self.d_model, 0.5))

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        last, ys = state["last"], []
        for part in x.split(1 if form == "recurrent" else x.shape[1], dim=1):
            past = shift_tokens(part, last)
            k = torch.relu(self.k_proj(torch.lerp(past, part, self.time_mix_key)))  # (B, T, hidden)
            r = self.r_proj(torch.lerp(past, part, self.time_mix_receptance))
            ys.append(torch.sigmoid(r) * self.o_proj(k.square()))
            last = upcast(part[:, -1])
        store_state(cache, {"last": last}, x.shape[1])
        return torch.cat(ys, dim=1)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        wide, ys = upcast(x), []
        mix_k, mix_r = upcast(self.time_mix_key), upcast(self.time_mix_receptance)
        before = torch.zeros_like(wide[:, 0])
        for t in range(x.shape[1]):
            now = wide[:, t]
            k = (mix_k * now + (1 - mix_k) * before) @ upcast(self.k_proj.weight).T
            r = (mix_r * now + (1 - mix_r) * before) @ upcast(self.r_proj.weight).T
            ys.append(torch.sigmoid(r) * (k.clamp(min=0) ** 2 @ upcast(self.o_proj.weight).T))
            before = now
        return torch.stack(ys, dim=1).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, {"last": (self.d_model,)}, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · d_model · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        return self.to_bytes(self.d_model, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "Rwkv4ChannelMix":
        return cls(d_model=24, n_heads=3, hidden=40)


@register("rwkv7")
class Rwkv7(Mechanism):
    """RWKV-7's time mixing: each token sets the decays, the removal and the write of the state.

        x^□_t = x_t + μ_□ ⊙ (x_{t-1} - x_t)                               for □ = r, w, k, v, a, g
        r, k, v = W_r x^r, W_k x^k, W_v x^v;   a = σ(low-rank of x^a);   g = low-rank of x^g
        decay = exp(-e^{-1/2} σ(low-rank of x^w));   κ = normalised(k ⊙ ξ);   k̃ = k ⊙ (1 + (a - 1) ⊙ α)
        S_t = diag(decay_t) S_{t-1} - (a_t ⊙ κ_t)(κ_tᵀ S_{t-1}) + k̃_t v_tᵀ
        y_t = W_o (g_t ⊙ (norm(S_tᵀ r_t) + (r_t · (ρ ⊙ k̃_t)) v_t))

    a, the in-context learning rate, is a number for each feature. The key of the removal, κ, and the key of
    the write, k̃, differ. A decay is never below e^{-0.607} = 0.545. The norm is LayerNorm of each head.
    ``rank`` is that of decay and rate, the published code's for this d_model unless given; the gate's is
    twice as much. With ``value_residual`` the layer reads the values v¹ of the first layer, as ``source``,
    and mixes them into its own: v + σ(low-rank of x^v) ⊙ (v¹ - v). In a model of n layers:
    ``["rwkv7", *(n - 1) * [Spec("rwkv7", reads="last")]]``.

    Cache: B · (H · D² + d_model) numbers: one matrix per head, and the last token's input; every step reads
    all of it. RWKV-7-2.9B, with 40 heads of 64 and d_model 2560, keeps 166,400 of them per layer, 0.67 MB in
    fp32.
    Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), on time mixing.
    """

    forms = FORMS
    form = "chunked"
    chunk = 32
    no_weight_decay = ("time_mix",)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rank: int | None = None,
        value_residual: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        width = self.n_heads * self.head_dim
        self.value_residual = validate.instance("value_residual", value_residual, bool)
        suggested = max(32, round(2.5 * d_model**0.5 / 32) * 32)
        self.rank = validate.positive("rank", suggested if rank is None else rank)
        self.time_mix = nn.Parameter(torch.empty(6, d_model))
        self.r_proj = nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.decay_down = nn.Linear(d_model, self.rank, bias=False)
        self.decay_up = nn.Linear(self.rank, width)
        self.rate_down = nn.Linear(d_model, self.rank, bias=False)
        self.rate_up = nn.Linear(self.rank, width)
        if value_residual:
            self.value_down = nn.Linear(d_model, self.rank, bias=False)
            self.value_up = nn.Linear(self.rank, width)
        self.gate_down = nn.Linear(d_model, 2 * self.rank, bias=False)
        self.gate_up = nn.Linear(2 * self.rank, width, bias=False)
        self.removal_scale = nn.Parameter(torch.empty(width))  # ξ
        self.rate_in_key = nn.Parameter(torch.empty(width))  # α
        self.bonus = nn.Parameter(torch.empty(width))  # ρ
        self.norm = nn.GroupNorm(self.n_heads, width, eps=1e-5 * self.head_dim)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published code's start, at half the depth, since a layer does not know its own."""
        D, depth = self.head_dim, 0.5
        for mix, power in zip(self.time_mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            mix.copy_(1 - rising(self.d_model, power * (1 - depth)))
        part = torch.linspace(0, 1, self.n_heads * D, dtype=torch.float64)
        in_head = torch.linspace(-1, 1, D, dtype=torch.float64) if D > 1 else torch.zeros(1)
        zigzag = (in_head * in_head.abs()).repeat(self.n_heads)
        self.decay_up.bias.copy_(-5.5 + 6 * part ** (1 + depth**0.3) + 2.5 * zigzag)
        self.rate_up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (part - 0.5))
        pairs = [
            (self.decay_down, self.decay_up),
            (self.rate_down, self.rate_up),
            (self.gate_down, self.gate_up),
        ]
        if self.value_residual:
            self.value_up.bias.copy_(0.73 - 0.4 * (part - 0.5))
            pairs.append((self.value_down, self.value_up))
        for down, up in pairs:
            nn.init.zeros_(down.weight)
            gain = 0.1 * max(1.0, up.in_features / up.out_features) ** 0.5
            wide = torch.empty_like(up.weight, dtype=torch.float32)  # no half precision in the QR
            up.weight.copy_(nn.init.orthogonal_(wide, gain))
        self.removal_scale.copy_(0.71 - 0.1 * (part - 0.5))
        self.rate_in_key.fill_(1.02)
        self.bonus.fill_(-0.04)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache)
        self.check_values(x, source)
        state, form = load_state(self, x, cache)
        step = shift_tokens(x, state["last"]) - x
        xr, xw, xk, xv, xa, xg = (x + step * mix for mix in self.time_mix)
        r, k, v = upcast(self.r_proj(xr)), upcast(self.k_proj(xk)), upcast(self.v_proj(xv))
        if self.value_residual and source is not None:
            share = torch.sigmoid(upcast(self.value_up(self.value_down(xv))))
            v = torch.lerp(v, merge_heads(source.v), share)
        speed = torch.sigmoid(upcast(self.decay_up(torch.tanh(self.decay_down(xw)))))
        rate = torch.sigmoid(upcast(self.rate_up(self.rate_down(xa))))
        gate = upcast(self.gate_up(torch.sigmoid(self.gate_down(xg))))
        removal, key = k * self.removal_scale, k * (1 + (rate - 1) * self.rate_in_key)
        r, key, v, bonus, rate, removal, log_decay = (  # (B, H, T, D)
            split_heads(part, self.n_heads)
            for part in (r, key, v, r * key * self.bonus, rate, removal, -(torch.e**-0.5) * speed)
        )
        removal = F.normalize(removal, dim=-1)
        heads, memory = generalised_delta_rule(
            r, key, v, removal, -rate * removal, log_decay, state["memory"], form=form, chunk=self.chunk
        )
        weight, bias = (upcast(p).view(self.n_heads, 1, -1) for p in (self.norm.weight, self.norm.bias))
        heads = F.layer_norm(heads, (self.head_dim,), eps=self.norm.eps) * weight + bias
        out = merge_heads(heads + bonus.sum(dim=-1, keepdim=True) * v)
        y = self.o_proj((gate * out).to(x.dtype))
        store_state(cache, {"last": upcast(x[:, -1]), "memory": memory}, x.shape[1])
        return y

    def project_kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        """The values of ``x``, for layers with ``value_residual``; there are no keys to read. Not cached."""
        self.check_inputs(x, cache, StateCache)
        before = load_state(self, x, cache)[0]["last"]
        xv = x + (shift_tokens(x, before) - x) * self.time_mix[3]
        v = split_heads(upcast(self.v_proj(xv)), self.n_heads)  # (B, H, T, D)
        return KV(v, v, token_positions(x, cache))

    def check_values(self, x: Float[Tensor, "B T M"], source: KV | None) -> None:
        """Raise TypeError if ``value_residual`` is without a source, ValueError if the values do not fit."""
        if source is None and not self.value_residual:
            return
        validate.instance("source", source, KV)
        shape = (len(x), self.n_heads, x.shape[1], self.head_dim)
        validate.tensor("source.v", source.v, shape, device=x.device)  # type: ignore[union-attr]

    def naive(self, x: Float[Tensor, "B T M"], source: KV | None = None) -> Float[Tensor, "B T M"]:
        """The equations above, token by token, with the state's transition written out as a matrix."""
        B, H, D, wide = len(x), self.n_heads, self.head_dim, upcast(x)
        p = {name: upcast(weight) for name, weight in self.named_parameters()}
        xi, alpha, rho, norm_weight, norm_bias = (
            p[name].reshape(H, D)
            for name in ("removal_scale", "rate_in_key", "bonus", "norm.weight", "norm.bias")
        )
        S, before, ys = wide.new_zeros(B, H, D, D), torch.zeros_like(wide[:, 0]), []
        for t in range(x.shape[1]):
            now = wide[:, t]
            xr, xw, xk, xv, xa, xg = ((1 - mu) * now + mu * before for mu in p["time_mix"])
            w = torch.tanh(xw @ p["decay_down.weight"].T) @ p["decay_up.weight"].T + p["decay_up.bias"]
            a = torch.sigmoid(xa @ p["rate_down.weight"].T @ p["rate_up.weight"].T + p["rate_up.bias"])
            g = torch.sigmoid(xg @ p["gate_down.weight"].T) @ p["gate_up.weight"].T
            r, k, v, w, a = (
                made.reshape(B, H, D)
                for made in (
                    xr @ p["r_proj.weight"].T,
                    xk @ p["k_proj.weight"].T,
                    xv @ p["v_proj.weight"].T,
                    torch.exp(-math.exp(-0.5) * torch.sigmoid(w)),
                    a,
                )
            )
            if self.value_residual and source is not None:
                share = xv @ p["value_down.weight"].T @ p["value_up.weight"].T + p["value_up.bias"]
                share = torch.sigmoid(share).reshape(B, H, D)
                v = (1 - share) * v + share * source.v[:, :, t]
            kappa = k * xi
            kappa = kappa / kappa.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
            k = k * (1 - alpha + a * alpha)
            transition = torch.diag_embed(w) - (a * kappa)[..., :, None] * kappa[..., None, :]
            S = transition @ S + k[..., :, None] * v[..., None, :]
            read = (r[..., :, None] * S).sum(-2)  # (B, H, D)
            read = read - read.mean(-1, keepdim=True)
            read = read / (read.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
            read = read * norm_weight + norm_bias + (r * rho * k).sum(-1, keepdim=True) * v
            ys.append((g * read.reshape(B, H * D)) @ p["o_proj.weight"].T)
            before = now
        return torch.stack(ys, dim=1).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"last": (self.d_model,), "memory": (self.n_heads, self.head_dim, self.head_dim)}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (H · D² + d_model) · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = self.n_heads * self.head_dim**2 + self.d_model
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "Rwkv7":
        return cls(d_model=24, n_heads=3, head_dim=8, rank=4)
