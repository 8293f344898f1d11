"""Linear attention, retention and gated linear attention: the past as one matrix per head, which may decay.

    S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t              S: (K, V), one matrix per head
    o_t = Σ_{s ≤ t} Σ_c q_t[c] (a_{s+1}[c] ⋯ a_t[c]) k_s[c] v_s       the same, unrolled

    a_t = 1                   linear attention; its queries and keys pass through a feature map
    a_t constant              retention, one number γ per head
    a_t chosen by the token   one number per head: Mamba-2 (mamba.py); K numbers: gated linear attention

Decays come as logarithms: products of many become sums, and nothing underflows. The forms "parallel",
"recurrent" and "chunked" are those of recurrent.py.

Letters beside those of recurrent.py: F features of a query or a key.
Sources: Katharopoulos et al., "Transformers are RNNs" (2020); Sun et al., "Retentive Network" (2023); Dao &
Gu, "Transformers are SSMs" (2024), sections 3 and 6; Yang et al., "Gated Linear Attention" (2024).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register
from kvlearn.attention.core import Constants, merge_heads, rms_norm_naive, split_heads, upcast
from kvlearn.attention.recurrent import (
    FORMS,
    GatedNorm,
    StateCache,
    by_form,
    check_log_decay,
    check_recurrence,
    load_state,
    state_dtype,
    store_state,
)
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive


def linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, with no decay or one number of it per head and token.

    Returns the outputs (B, H, T, V) and the last state (B, H, K, V), both in fp32 at least. Nothing is scaled
    or normalised. Without ``log_decay`` every decay is 1, without ``state`` it starts from zeros; ``chunk``
    need not divide T. Raises ValueError or TypeError for tensors that do not fit each other, and for decays
    outside (0, 1].
    Sources: Katharopoulos et al. (2020), equations 9 to 12 and 16 to 20; Sun et al. (2023), equations 5 to 7.
    """
    state = check_recurrence(q, k, v, state)
    if log_decay is None:
        log_ones = torch.zeros((), dtype=state.dtype, device=q.device).expand(q.shape[:3])
        return by_form(
            form, linear_parallel_without_decay, linear_recurrent, (q, k, v, log_ones), state, chunk
        )
    check_log_decay(log_decay, q.shape[:3], q.device)
    return by_form(form, linear_parallel, linear_recurrent, (q, k, v, log_decay), state, chunk)


def linear_parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Tensor, Tensor]:
    """All pairs at once: O = (QKᵀ ⊙ L) V plus what ``state`` still contributes, with L of ``decay_mask``."""
    mask = decay_mask(log_decay)
    since_start = log_decay.cumsum(dim=-1).exp()[..., None]
    out = (q @ k.mT * mask) @ v + since_start * (q @ state)
    state = since_start[:, :, -1:] * state + (mask[:, :, -1, :, None] * k).mT @ v
    return out, state


def decay_mask(log_decay: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T T"]:
    """L[t, s] = a_{s+1} ⋯ a_t for s ≤ t, and 0 above the diagonal.

    Summed for every s from s + 1 on: a difference of two sums from the start would lose a weak decay after a
    strong one, and overflow in exp above the diagonal.
    """
    rows = log_decay[..., None].expand(*log_decay.shape, log_decay.shape[-1])
    return rows.tril(-1).cumsum(dim=-2).exp().tril()


def linear_parallel_without_decay(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Tensor, Tensor]:
    """``linear_parallel`` where every decay is 1: L is the causal mask."""
    return (q @ k.mT).tril() @ v + q @ state, state + k.mT @ v


def linear_recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Tensor, Tensor]:
    """One token after the other: decay, write, read."""
    decay, outs = log_decay.exp(), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state


def elu_features(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """φ(x) = elu(x) + 1: x + 1 above 0, eˣ below; D features, all positive.

    Source: Katharopoulos et al., "Transformers are RNNs" (2020), equation 7.
    """
    return x.relu() + x.clamp_max(0).exp()  # elu(x) + 1 would round a small eˣ to 0


def taylor_features(x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
    """The features of exp's Taylor series to the second order, F = 1 + D + D(D + 1)/2.

        φ(q)·φ(k) = 1 + s + s²/2 ≈ exp(s),   s = q·k / √D

    A product of features may be negative, their sum never: 1 + s + s²/2 = ((1 + s)² + 1)/2 ≥ 1/2. Each pair
    i < j is computed once and multiplied by √2, because it occurs twice.
    Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff"
    (Based, 2024), section 4.1; after Zhang et al., "The Hedgehog & the Porcupine" (2024).
    """
    D = x.shape[-1]
    x = x / D**0.25
    i, j = torch.triu_indices(D, D, device=x.device)
    pairs = x[..., i] * x[..., j] * 0.5 ** ((i == j).to(x) / 2)
    return torch.cat((torch.ones_like(x[..., :1]), x, pairs), dim=-1)


FEATURES = {"elu": elu_features, "taylor": taylor_features}


def normalised(sums: Float[Tensor, "B H T V1"]) -> Float[Tensor, "B H T V"]:
    """Outputs divided by their last column, which is the sum of the weights.

    Where the features have underflowed, weights sum to 0 and the output is 0. Raises ValueError for a sum
    below 0: features that let this happen make no weights.
    """
    out, total = sums[..., :-1], sums[..., -1:]
    if validate.may_read(total) and not bool((total >= 0).all()):
        least = float(total.detach().min())
        raise ValueError(f"q, k: expected features whose products sum to at least 0, got {least:.3g}")
    return out / total.clamp_min(torch.finfo(total.dtype).tiny)


@register("linear")
class LinearAttention(Mechanism):
    """Attention with the weights φ(q_t)·φ(k_s) in place of exp(q_t·k_s / √D).

        head_t = Σ_{s ≤ t} (φ(q_t)·φ(k_s)) v_s / Σ_{s ≤ t} φ(q_t)·φ(k_s) = S_tᵀ φ(q_t) / (z_t·φ(q_t))
        S_t = S_{t-1} + φ(k_t) v_tᵀ,   z_t = z_{t-1} + φ(k_t),   y = [head_1 … head_H] W_o

    z is kept as one more column of S: the sum for a value that is always 1. φ is ``elu_features`` or
    ``taylor_features``. Queries and keys have ``key_dim`` numbers, head_dim unless given: the number of
    Taylor features grows with its square. ``chunk`` is the length of a chunk in tokens; it changes speed and
    memory, not the numbers.

    Cache: B · H · F · (D + 1) numbers, F features; every step reads all of it.
    Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 4 to 12.
    """

    forms = FORMS
    form = "chunked"
    chunk = 64

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        features: str = "elu",
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.key_dim = validate.positive("key_dim", self.head_dim if key_dim is None else key_dim)
        self.feature_map = validate.one_of("features", features, FEATURES)
        self.features: Callable[[Tensor], Tensor] = FEATURES[self.feature_map]
        self.n_features = len(self.features(torch.zeros(self.key_dim, device="cpu")))
        self.q_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        q, k, v = (upcast(split_heads(p(x), self.n_heads)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.features(q), self.features(k)  # (B, H, T, F)
        v = F.pad(v, (0, 1), value=1.0)  # (B, H, T, D + 1)
        sums, memory = linear_attention(q, k, v, None, state["memory"], form=form, chunk=self.chunk)
        y = self.o_proj(merge_heads(normalised(sums)).to(x.dtype))
        store_state(cache, {"memory": memory}, x.shape[1])
        return y

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """Every token a weighted mean of all values up to it; the weight of each pair from its kernel."""
        B, T, wide = len(x), x.shape[1], upcast(x)
        q, k, v = (
            (wide @ upcast(p.weight).T).reshape(B, T, self.n_heads, -1)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = torch.zeros_like(v)
        for t in range(T):
            now, past = q[:, t, None], k[:, : t + 1]
            if self.feature_map == "taylor":
                s = (now * past).sum(-1, keepdim=True) / self.key_dim**0.5
                weights = 1 + s + s**2 / 2
            else:
                now, past = (torch.where(z > 0, z + 1, z.clamp(max=0).exp()) for z in (now, past))
                weights = (now * past).sum(-1, keepdim=True)  # (B, t + 1, H, 1)
            total = weights.sum(1).clamp_min(torch.finfo(wide.dtype).tiny)
            heads[:, t] = (weights * v[:, : t + 1]).sum(1) / total
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"memory": (self.n_heads, self.n_features, self.head_dim + 1)}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · H · F · (D + 1) · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = self.n_heads * self.n_features * (self.head_dim + 1)
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "LinearAttention":
        return cls(d_model=24, n_heads=3, head_dim=8)


def log_decays(n_heads: int, decay: Sequence[float] | None) -> tuple[float, ...]:
    """log γ of every head; γ_h = 1 - 2^(-5 - h) unless given."""
    if decay is None:
        return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(n_heads))
    if len(decay) != n_heads or not all(0 < a <= 1 for a in decay):
        raise ValueError(f"decay: expected {n_heads} numbers in (0, 1], one per head, got {decay}")
    return tuple(map(math.log, decay))


@register("retention")
class Retention(Mechanism):
    """Attention without softmax, whose weights rotate and decay with the distance of two tokens.

        head_t = Σ_{s ≤ t} γ^(t-s) ⟨R_t q_t, R_s k_s⟩ v_s / √K = S_tᵀ q_t / √K
        S_t = γ R_{-1} S_{t-1} + k_t v_tᵀ
        y = [GatedNorm(head_1) … GatedNorm(head_H)] W_o,   gates W_g x

    R is RoPE. Only distances count, so the state keeps its keys rotated relative to the newest token: every
    token rotates it by one step, and no absolute position is needed. ``decay`` gives γ of every head, else
    1 - 2^(-5-h): head h forgets half in about 22 · 2^h tokens. Queries and keys have ``key_dim`` numbers,
    head_dim unless given; the paper takes half of head_dim. The paper's norm also subtracts the mean.

    Cache: B · H · key_dim · D numbers; every step reads all of it.
    Source: Sun et al., "Retentive Network" (2023), equations 3 to 8.
    """

    forms = FORMS
    form = "chunked"
    chunk = 64

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        decay: Sequence[float] | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.key_dim = validate.positive("key_dim", self.head_dim if key_dim is None else key_dim)
        if rope is not None and self.key_dim % 2:
            raise ValueError(f"key_dim: expected an even number for RoPE, got {self.key_dim}")
        self.decay: tuple[float, ...] | None = None
        if decay is not None:
            validate.instance("decay", decay, (list, tuple))
            self.decay = tuple(validate.finite("decay", number) for number in decay)
        self.log_decay = Constants(log_decays(self.n_heads, self.decay))
        self.rope = Rope(self.key_dim, rope)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.norm = GatedNorm(self.head_dim)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        T = x.shape[1]
        q = split_heads(self.q_proj(x) * self.key_dim**-0.5, self.n_heads)  # (B, H, T, K)
        k, v, gate = (split_heads(p(x), self.n_heads) for p in (self.k_proj, self.v_proj, self.g_proj))
        # The state's keys are rotated relative to its newest token, which has position 0 here.
        positions = torch.arange(1, T + 1, device=x.device)[None]
        q, k = self.rope(q, positions), self.rope(k, positions)
        log_decay = self.log_decay.on(x.device).to(state["memory"].dtype)[:, None].expand(len(x), -1, T)
        heads, memory = linear_attention(q, k, v, log_decay, state["memory"], form=form, chunk=self.chunk)
        y = self.o_proj(merge_heads(self.norm(heads, gate)).to(x.dtype))
        store_state(cache, {"memory": self.rotate_back(memory, T)}, T)
        return y

    def rotate_back(self, memory: Float[Tensor, "B H K V"], n_tokens: int) -> Float[Tensor, "B H K V"]:
        """The state with its keys relative to a token ``n_tokens`` further on: R_{-n} of its columns."""
        if self.rope.config is None:
            return memory
        columns = memory.mT.flatten(1, 2).unsqueeze(2)  # (B, H · V, 1, K), all at one position
        back = torch.full((1, 1), -n_tokens, device=memory.device)
        rotated = self.rope(columns, back) / self.rope.factor  # YaRN's factor is in the keys already
        return rotated.squeeze(2).unflatten(1, (self.n_heads, -1)).mT

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """Equation 5, pair by pair: keys at their absolute positions, and the decay as a power of γ."""
        B, T, wide = len(x), x.shape[1], upcast(x)
        q, k, v, gate = (
            (wide @ upcast(p.weight).T).reshape(B, T, self.n_heads, -1)
            for p in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        q, k = rotate_naive(q, self.rope.config), rotate_naive(k, self.rope.config)
        gammas = [1 - 2.0 ** (-5 - h) for h in range(self.n_heads)] if self.decay is None else self.decay
        heads = torch.zeros_like(v)
        for t in range(T):
            for s in range(t + 1):
                for h, gamma in enumerate(gammas):
                    score = (q[:, t, h] * k[:, s, h]).sum(-1, keepdim=True) / self.key_dim**0.5
                    heads[:, t, h] += gamma ** (t - s) * score * v[:, s, h]
        return (naive_gated_norm(heads, gate, self.norm).flatten(2) @ upcast(self.o_proj.weight).T).to(
            x.dtype
        )

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"memory": (self.n_heads, self.key_dim, self.head_dim)}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · H · key_dim · D · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = self.n_heads * self.key_dim * self.head_dim
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "Retention":
        return cls(d_model=24, n_heads=3, head_dim=8, key_dim=6, decay=(0.5, 0.9, 1.0))


def gated_linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, with a decay for each key channel.

    The weight of a pair is no longer a product of two numbers: the decay is inside the sum over channels.
    Returns the outputs (B, H, T, V) and the last state (B, H, K, V), both in fp32 at least. Nothing is scaled
    or normalised. Without ``state`` it starts from zeros; ``chunk`` need not divide T. Raises ValueError or
    TypeError for tensors that do not fit each other, and for decays outside (0, 1].
    Source: Yang et al., "Gated Linear Attention Transformers" (2024), sections 4.1 to 4.3.
    """
    state = check_recurrence(q, k, v, state)
    check_log_decay(log_decay, q.shape, q.device)
    return by_form(form, gated_parallel, gated_recurrent, (q, k, v, log_decay), state, chunk)


def gated_parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Tensor, Tensor]:
    """All pairs at once, plus what ``state`` still contributes."""
    from_start = log_decay.cumsum(dim=2)
    out = faded_products(q, k, log_decay) @ v + (from_start.exp() * q) @ state
    state = from_start[:, :, -1, :, None].exp() * state + (after(log_decay).exp() * k).mT @ v
    return out, state


def faded_products(
    x: Float[Tensor, "*B T K"], y: Float[Tensor, "*B T K"], log_decay: Float[Tensor, "*#B T K"]
) -> Float[Tensor, "*B T T"]:
    """x_t · ((a_{s+1} ⋯ a_t) ⊙ y_s) for all pairs s ≤ t, and 0 for the others.

    The decay cannot be split into a factor for each side: a_1 ⋯ a_t underflows, and its inverse overflows.
    But for a step m between s and t it is (a_{s+1} ⋯ a_m)(a_{m+1} ⋯ a_t), both at most 1. So the pairs on two
    sides of the middle are one product of matrices, and each half is cut again; computed here from the
    smallest blocks up. (The paper takes two sizes of blocks, and K numbers for each pair inside the smaller.)
    """
    T = x.shape[-2]
    missing = (1 << (T - 1).bit_length()) - T
    x, y, log_decay = (F.pad(z, (0, 0, 0, missing)) for z in (x, y, log_decay))
    blocks = (x * y).sum(dim=-1)[..., None, None]  # (…, number of blocks, size, size)
    while (size := blocks.shape[-1]) < x.shape[-2]:
        (_, x_right), (y_left, _), (left, right) = (
            z.unflatten(-2, (-1, 2, size)).unbind(-3) for z in (x, y, log_decay)
        )
        across = (x_right * right.cumsum(-2).exp()) @ (y_left * after(left).exp()).mT
        upper = F.pad(blocks[..., ::2, :, :], (0, size))
        lower = torch.cat((across, blocks[..., 1::2, :, :]), dim=-1)
        blocks = torch.cat((upper, lower), dim=-2)
    return blocks[..., 0, :T, :T]


def after(log_decay: Float[Tensor, "*B T K"]) -> Float[Tensor, "*B T K"]:
    """log (a_{s+1} ⋯ a_T) for every s, each summed separately: a difference of two sums is rounded."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def gated_recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Tensor, Tensor]:
    """One token after the other: decay, write, read."""
    decay, outs = log_decay.exp(), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state


@register("gla")
class GatedLinearAttention(Mechanism):
    """Linear attention that forgets by channel, with decays computed from the token.

        a_t = σ(W₂ W₁ x_t + b)^(1/16)               W₁: d_model -> rank;  a_t: K numbers per head
        S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   head_t = S_tᵀ q_t / √K
        y = [GatedNorm(head_1) … GatedNorm(head_H)] W_o,   gates W_g x

    The root keeps decays near 1: a gate that is half open forgets half in 16 tokens. Positions come from the
    decay alone. Queries and keys have ``key_dim`` numbers, half of head_dim unless given.

    Cache: B · H · key_dim · D numbers; every step reads all of it.
    Source: Yang et al., "Gated Linear Attention Transformers" (2024), section 4.4.
    """

    forms = FORMS
    form = "chunked"
    chunk = 128
    temperature = 16

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        rank: int = 16,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        key_dim = max(self.head_dim // 2, 1) if key_dim is None else key_dim
        self.key_dim = validate.positive("key_dim", key_dim)
        rank = validate.positive("rank", rank)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.decay_down = nn.Linear(d_model, rank, bias=False)
        self.decay_up = nn.Linear(rank, self.n_heads * self.key_dim)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.norm = GatedNorm(self.head_dim)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        q = split_heads(self.q_proj(x) * self.key_dim**-0.5, self.n_heads)  # (B, H, T, K)
        k, v, gate = (split_heads(p(x), self.n_heads) for p in (self.k_proj, self.v_proj, self.g_proj))
        decay = split_heads(self.decay_up(self.decay_down(x)), self.n_heads)
        log_decay = F.logsigmoid(upcast(decay)) / self.temperature  # (B, H, T, K)
        heads, memory = gated_linear_attention(
            q, k, v, log_decay, state["memory"], form=form, chunk=self.chunk
        )
        y = self.o_proj(merge_heads(self.norm(heads, gate)).to(x.dtype))
        store_state(cache, {"memory": memory}, x.shape[1])
        return y

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The recurrence, head by head: each row of a state decays by the 16th root of its gate."""
        B, T, D, wide = len(x), x.shape[1], self.head_dim, upcast(x)
        q, k, v, gate = (
            (wide @ upcast(p.weight).T).reshape(B, T, self.n_heads, -1)
            for p in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        low_rank = wide @ upcast(self.decay_down.weight).T
        opening = torch.sigmoid(low_rank @ upcast(self.decay_up.weight).T + upcast(self.decay_up.bias))
        a = (opening ** (1 / self.temperature)).reshape(B, T, self.n_heads, -1)
        heads = torch.zeros_like(v)
        for h in range(self.n_heads):
            S = wide.new_zeros(B, self.key_dim, D)
            for t in range(T):
                S = a[:, t, h, :, None] * S + k[:, t, h, :, None] * v[:, t, h, None, :]
                heads[:, t, h] = (q[:, t, h, :, None] * S).sum(1) / self.key_dim**0.5
        return (naive_gated_norm(heads, gate, self.norm).flatten(2) @ upcast(self.o_proj.weight).T).to(
            x.dtype
        )

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"memory": (self.n_heads, self.key_dim, self.head_dim)}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · H · key_dim · D · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = self.n_heads * self.key_dim * self.head_dim
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "GatedLinearAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, key_dim=6, rank=5)


def naive_gated_norm(
    heads: Float[Tensor, "B T H D"], gate: Float[Tensor, "B T H D"], norm: GatedNorm
) -> Float[Tensor, "B T H D"]:
    """RMSNorm(head) ⊙ w ⊙ g σ(g), for the naive forms of retention and gated linear attention."""
    return rms_norm_naive(heads, norm) * gate * torch.sigmoid(gate)
