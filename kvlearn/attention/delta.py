"""The delta rule, which corrects a state where linear attention adds: DeltaNet, Gated DeltaNet, Kimi's KDA.

    S' = a_t S_{t-1},   S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ,   o_t = S_tᵀ q_t         S: (K, V), one per head

This is online regression: for each token one step of gradient descent, of size β_t, on ½ |Sᵀ k_t - v_t|².
With |k_t| = 1 and β_t = 1 the state then gives exactly v_t for k_t, whatever it gave before. Without decay,
a = 1, it is DeltaNet's rule; with a decay that the token chooses, Gated DeltaNet's; with one decay per key
feature, diag(a_t), Kimi's.

Letters beside those of recurrent.py: I inputs of a linear map, O outputs of a linear map.
Sources: Widrow & Hoff, "Adaptive Switching Circuits" (1960); Schlag et al., "Linear Transformers Are Secretly
Fast Weight Programmers" (2021), section 4.2; Yang et al., "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length" (2024), section 3; Yang et al., "Gated Delta Networks" (2025), section 3; Peng et
al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025); Kimi Team, "Kimi Linear" (2025).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register
from kvlearn.attention.core import merge_heads, rms_norm_naive, split_heads, upcast
from kvlearn.attention.linear import after, decay_mask, faded_products
from kvlearn.attention.recurrent import (
    FORMS,
    GatedNorm,
    HeadNorm,
    ShortConvolution,
    StateCache,
    by_form,
    check_log_decay,
    check_recurrence,
    drawn,
    expand_heads,
    l2_normalize,
    load_state,
    naive_softplus,
    state_dtype,
    step_biases,
    store_state,
)


def delta_rule(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    log_decay: Float[Tensor, "B H T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """The delta rule with one decay per head, in one of the forms: outputs and last state, in fp32 at least.

    Nothing is scaled or normalised. Keys should be short enough for 0 ≤ β_t |k_t|² ≤ 2: beyond that a step
    makes the error larger, and the state may grow without bound. With ``log_decay`` None the decay is 1, with
    ``state`` None the first state is 0; ``chunk`` need not divide T. Raises ValueError or TypeError for
    tensors that do not fit each other, for a ``beta`` that is not finite, and for decays outside (0, 1].
    """
    state = check_recurrence(q, k, v, state)
    validate.tensor("beta", beta, q.shape[:3], device=q.device)
    validate.floating("beta", beta.dtype)
    if validate.may_read(beta) and not bool(beta.isfinite().all()):
        raise ValueError("beta: expected finite numbers, got NaN or infinity among them")
    if log_decay is None:
        log_decay = torch.zeros((), dtype=state.dtype, device=q.device).expand(q.shape[:3])
    check_log_decay(log_decay, q.shape[:3], q.device)
    return by_form(form, delta_parallel, delta_recurrent, (q, k, v, beta, log_decay), state, chunk)


def delta_parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """All pairs of tokens at once.

    A token writes its correction u_t = β_t (v_t - S'ᵀ k_t) where linear attention writes v_t. A correction
    depends on those before it, by a triangular system; with all u known, the rest is linear attention:

        (I + A) U = β ⊙ (V - c ⊙ K S_0),   A[t, s] = β_t (k_t·k_s) L[t, s] for s < t,   else 0
        O = (QKᵀ ⊙ L) U + c ⊙ Q S_0,   L[t, s] = a_{s+1} ⋯ a_t,   c_t = a_1 ⋯ a_t
    """
    L, beta = decay_mask(log_decay), beta[..., None]
    c = log_decay.cumsum(dim=-1).exp()[..., None]
    # The solver takes the diagonal as 1 and does not read what is there.
    u = torch.linalg.solve_triangular(
        beta * (k @ k.mT) * L, beta * (v - c * (k @ state)), upper=False, unitriangular=True
    )
    out = (q @ k.mT * L) @ u + c * (q @ state)
    state = c[..., -1:, :] * state + (L[..., -1, :, None] * k).mT @ u
    return out, state


def delta_recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """One token after the other: decay, compare, correct, read."""
    inputs = (q, k, v, beta[..., None], log_decay.exp()[..., None])
    outs = []
    for q_t, k_t, v_t, beta_t, a_t in zip(*(x.split(1, dim=2) for x in inputs), strict=True):
        decayed = a_t * state
        state = decayed + k_t.mT * (beta_t * (v_t - k_t @ decayed))
        outs.append(q_t @ state)
    return torch.cat(outs, dim=2), state


def generalised_delta_rule(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    probe: Float[Tensor, "B H T K"],
    rewrite: Float[Tensor, "B H T K"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 32,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """The rule with one decay per key feature and every part free: outputs and last state, in fp32 at least.

        S_t = diag(a_t) S_{t-1} + p_t (r_tᵀ S_{t-1}) + k_t v_tᵀ,   o_t = S_tᵀ q_t

    ``probe`` r reads the old state; ``rewrite`` p writes the result back, in most uses to remove it. With
    r = a ⊙ k, p = -β k and β k as the key this is Kimi's delta attention, with r = κ and p = -η ⊙ κ RWKV-7.
    ``log_decay`` is log a. Nothing is scaled or normalised: the caller must keep the state bounded. With
    ``state`` None the first state is 0; ``chunk`` need not divide T. Raises ValueError or TypeError for
    tensors that do not fit each other, and for decays outside (0, 1].
    """
    state = check_recurrence(q, k, v, state)
    for name, x in (("probe", probe), ("rewrite", rewrite)):
        validate.tensor(name, x, q.shape, dtype=q.dtype, device=q.device)
    check_log_decay(log_decay, q.shape, q.device)
    inputs = (q, k, v, probe, rewrite, log_decay)
    return by_form(form, generalised_parallel, generalised_recurrent, inputs, state, chunk)


def generalised_parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    probe: Float[Tensor, "B H T K"],
    rewrite: Float[Tensor, "B H T K"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """All pairs of tokens at once, after solving for z_t = S_{t-1}ᵀ r_t, which the probes find.

        S_t = (a_1 ⋯ a_t) ⊙ S_0 + Σ_{s≤t} (a_{s+1} ⋯ a_t) ⊙ (k_s v_sᵀ + p_s z_sᵀ)

    Put into z this is a linear system, z_t = … + Σ_{s<t} (…) z_s: triangular, with ones on its diagonal.
    """
    # A probe reads the state that the query of the token before reads: shifted by one, both decay alike.
    reads = torch.stack((q, F.pad(probe[:, :, 1:], (0, 0, 0, 1))), dim=2)
    writes = torch.stack((k, rewrite), dim=2)
    reads, writes = torch.broadcast_tensors(reads[:, :, :, None], writes[:, :, None])
    scores = faded_products(reads, writes, log_decay[:, :, None, None])
    (query_key, query_rewrite), (probe_key, probe_rewrite) = (x.unbind(2) for x in scores.unbind(2))
    probe_key, probe_rewrite = (F.pad(x[:, :, :-1], (0, 0, 1, 0)) for x in (probe_key, probe_rewrite))

    from_start = log_decay.cumsum(dim=2)
    before = F.pad(from_start[:, :, :-1], (0, 0, 1, 0))
    known = probe_key @ v + (before.exp() * probe) @ state
    # (I - A) z = known: the solver takes the diagonal as 1 and does not read what is above it.
    z = torch.linalg.solve_triangular(-probe_rewrite, known, upper=False, unitriangular=True)
    out = query_key @ v + query_rewrite @ z + (from_start.exp() * q) @ state
    until_last = after(log_decay).exp()
    state = from_start[:, :, -1, :, None].exp() * state
    return out, state + (until_last * k).mT @ v + (until_last * rewrite).mT @ z


def generalised_recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    probe: Float[Tensor, "B H T K"],
    rewrite: Float[Tensor, "B H T K"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """One token after the other: probe, decay, rewrite, write, read."""
    decay, outs = log_decay.exp(), []
    for t in range(q.shape[2]):
        z = probe[:, :, t, None] @ state
        state = decay[:, :, t, :, None] * state + rewrite[:, :, t, :, None] * z
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state


@register("delta")
class DeltaNet(Mechanism):
    """The delta rule as a layer: keys and queries of length 1, and a step size that the token chooses.

        [q k v]_t = silu(conv([W_q x, W_k x, W_v x]))_t,   q, k divided by their lengths,   β_t = σ(W_b x_t)
        S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ,   y_t = W_o [RMSNorm(S_tᵀ q_t) of each head]

    With |k| = 1 and 0 < β < 1 a token moves the state's value for its key towards v_t, by the share β. With
    ``beta_max`` of 2, β = 2 σ(W_b x_t) can exceed 1: I - β k kᵀ then has the negative eigenvalue 1 - β, so
    that a token can change the sign of what is stored, and a layer can compute parity (Grazzi et al.,
    "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024, section 4).
    ``conv`` is the width of the short convolution, None for none. Keys have ``key_dim`` numbers, head_dim
    unless given; with ``n_key_heads`` below ``n_heads``, each key and query head serves n_heads / n_key_heads
    neighbouring states. Raises ValueError where n_key_heads does not divide n_heads, and for a conv below 2.

    Cache: B · (H · K · V + (conv - 1) · (2 · n_key_heads · K + H · V)) numbers in fp32.
    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024),
    section 3; the rule in a linear transformer is from Schlag et al., "Linear Transformers Are Secretly Fast
    Weight Programmers" (2021), section 4.2.
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
        n_key_heads: int | None = None,
        conv: int | None = 4,
        beta_max: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.beta_max = check_beta_max(beta_max)
        self.key_dim = validate.positive("key_dim", self.head_dim if key_dim is None else key_dim)
        n_key_heads = self.n_heads if n_key_heads is None else n_key_heads
        self.n_key_heads = validate.divides("n_key_heads", n_key_heads, "n_heads", self.n_heads)
        keys, values = self.n_key_heads * self.key_dim, self.n_heads * self.head_dim
        self.widths = [keys, keys, values]  # of q, k and v
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.b_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.conv = (
            None if conv is None else ShortConvolution(sum(self.widths), validate.at_least("conv", conv, 2))
        )
        self.norm = HeadNorm(self.head_dim, norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        if self.conv is not None:
            qkv, state["past"] = self.conv.run(qkv, state["past"])
        q, k, v = F.silu(upcast(qkv)).split(self.widths, dim=-1)
        q, k = (l2_normalize(split_heads(part, self.n_key_heads)) for part in (q, k))
        q, k, v = expand_heads(q, self.n_heads), expand_heads(k, self.n_heads), split_heads(v, self.n_heads)
        beta = self.beta_max * torch.sigmoid(upcast(self.b_proj(x))).mT  # (B, H, T)
        out, state["memory"] = delta_rule(
            q, k, v, beta, None, state["memory"], form=form, chunk=self.chunk
        )  # (B, H, T, V)
        store_state(cache, state, x.shape[1])
        return self.o_proj(merge_heads(self.norm(out)).to(x.dtype))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        q, k, v = naive_qkv(self, x, self.n_key_heads)
        beta = torch.sigmoid(naive_linear(x, self.b_proj)) * self.beta_max
        heads = rms_norm_naive(naive_delta_rule(q, k, v, beta, torch.ones_like(k)), self.norm)
        return naive_linear(heads.flatten(2), self.o_proj).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes: dict[str, tuple[int, ...]] = {"memory": (self.n_heads, self.key_dim, self.head_dim)}
        if self.conv is not None:
            shapes["past"] = self.conv.past_shape
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (H · K · V + (conv - 1) · (2 · n_key_heads · K + H · V)) · 4 bytes (8 in fp64)."""
        validate.positive("max_len", max_len)
        numbers = self.n_heads * self.key_dim * self.head_dim
        if self.conv is not None:
            width = 2 * self.n_key_heads * self.key_dim + self.n_heads * self.head_dim
            numbers += (self.conv.kernel_size[0] - 1) * width
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "DeltaNet":
        return cls(d_model=24, n_heads=4, head_dim=8, key_dim=6, n_key_heads=2)


@register("gated_delta")
class GatedDeltaNet(DeltaNet):
    """DeltaNet with a decay that the token chooses, and an output gate; three of four layers of Qwen3-Next.

        log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),   S' = a_t S_{t-1}              of each head
        S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ,   y_t = W_o [RMSNorm(S_tᵀ q_t) ⊙ silu(W_g x_t)]

    The rule replaces what the state holds under one key, the decay clears all keys at once. Queries, keys,
    values, β and the options are DeltaNet's; queries are also divided by √K. Heads start with A uniform in
    (0.01, 16), and with a step softplus(dt_bias) log-uniform in (0.001, 0.1), so that they forget at very
    different rates.

    Cache: as DeltaNet's. A layer of Qwen3-Next-80B-A3B, with H = 32, K = V = 128, 16 key heads and conv 4,
    keeps 548,864 numbers, 2.2 MB in fp32.
    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2025), section 3.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        n_key_heads: int | None = None,
        conv: int | None = 4,
        beta_max: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            head_dim=head_dim,
            key_dim=key_dim,
            n_key_heads=n_key_heads,
            conv=conv,
            beta_max=beta_max,
        )
        self.a_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedNorm(self.head_dim, norm_eps)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        self.A_log.copy_(drawn((self.n_heads,), 0.01, 16.0).log())
        self.dt_bias.copy_(step_biases(self.n_heads))

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        if self.conv is not None:
            qkv, state["past"] = self.conv.run(qkv, state["past"])
        q, k, v = F.silu(upcast(qkv)).split(self.widths, dim=-1)
        q, k = (l2_normalize(split_heads(part, self.n_key_heads)) for part in (q, k))
        q, k, v = expand_heads(q, self.n_heads), expand_heads(k, self.n_heads), split_heads(v, self.n_heads)
        beta = self.beta_max * torch.sigmoid(upcast(self.b_proj(x))).mT  # (B, H, T)
        step = F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))
        log_decay = -(upcast(self.A_log).exp() * step).mT  # (B, H, T)
        out, state["memory"] = delta_rule(
            self.key_dim**-0.5 * q, k, v, beta, log_decay, state["memory"], form=form, chunk=self.chunk
        )  # (B, H, T, V)
        store_state(cache, state, x.shape[1])
        out = self.norm(out, split_heads(self.g_proj(x), self.n_heads))
        return self.o_proj(merge_heads(out).to(x.dtype))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        q, k, v = naive_qkv(self, x, self.n_key_heads)
        beta = torch.sigmoid(naive_linear(x, self.b_proj)) * self.beta_max
        step = naive_softplus(naive_linear(x, self.a_proj) + upcast(self.dt_bias))
        decay = torch.exp(-torch.exp(upcast(self.A_log)) * step)[..., None].expand_as(k)
        heads = rms_norm_naive(naive_delta_rule(q / self.key_dim**0.5, k, v, beta, decay), self.norm)
        gate = naive_linear(x, self.g_proj).reshape(heads.shape)
        return naive_linear((heads * gate * torch.sigmoid(gate)).flatten(2), self.o_proj).to(x.dtype)


@register("kda")
class KimiDeltaAttention(Mechanism):
    """Gated DeltaNet with one decay per key feature; three of four layers of Kimi Linear.

        [q k v]_t = silu(conv([W_q x, W_k x, W_v x]))_t,   q, k divided by their lengths,   β_t = σ(W_b x_t)
        log a_t = -exp(A_log) softplus(W_f↑ W_f↓ x_t + dt_bias),   K numbers per head; A_log is one per head
        S' = diag(a_t) S_{t-1},   S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ
        y_t = W_o [RMSNorm(S_tᵀ q_t / √K) ⊙ σ(W_g↑ W_g↓ x_t)]

    Positions are encoded nowhere else: only the decays tell near tokens from far ones. Decay and gate pass
    through ``rank`` numbers, head_dim unless given. ``conv`` is the width of the short convolution.

    Cache: B · (H · D² + 3 · (conv - 1) · H · D) numbers in fp32. A layer of Kimi-Linear-48B-A3B, with H = 32,
    D = 128 and conv 4, keeps 561,152 of them, 2.2 MB.
    Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture" (2025), on KDA.
    """

    forms = FORMS
    form = "chunked"
    chunk = 32

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rank: int | None = None,
        conv: int = 4,
        beta_max: float = 1.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.beta_max = check_beta_max(beta_max)
        width = self.n_heads * self.head_dim
        rank = validate.positive("rank", self.head_dim if rank is None else rank)
        self.q_proj = nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.b_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.conv = ShortConvolution(3 * width, validate.at_least("conv", conv, 2))
        self.decay_down = nn.Linear(d_model, rank, bias=False)
        self.decay_up = nn.Linear(rank, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.gate_down = nn.Linear(d_model, rank, bias=False)
        self.gate_up = nn.Linear(rank, width, bias=False)
        self.norm = GatedNorm(self.head_dim, norm_eps, torch.sigmoid)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """A uniform in (1, 16), steps log-uniform in (0.001, 0.1): log a from -1.6 to -0.001 at first."""
        self.A_log.copy_(drawn((self.n_heads,), 1.0, 16.0).log())
        self.dt_bias.copy_(step_biases(len(self.dt_bias)))

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv, state["past"] = self.conv.run(qkv, state["past"])
        q, k, v = (split_heads(part, self.n_heads) for part in F.silu(upcast(qkv)).chunk(3, dim=-1))
        q, k = l2_normalize(q) * self.head_dim**-0.5, l2_normalize(k)
        beta = self.beta_max * torch.sigmoid(upcast(self.b_proj(x))).mT  # (B, H, T)
        beta_k = beta[..., None] * k  # (B, H, T, K)
        step = F.softplus(upcast(self.decay_up(self.decay_down(x))) + upcast(self.dt_bias))
        log_decay = -upcast(self.A_log).exp()[:, None, None] * split_heads(step, self.n_heads)  # (B, H, T, K)
        # S_t = diag(a) S - β k (a ⊙ k)ᵀ S + β k vᵀ
        out, state["memory"] = generalised_delta_rule(
            q, beta_k, v, log_decay.exp() * k, -beta_k, log_decay, state["memory"],
            form=form, chunk=self.chunk,
        )  # fmt: skip
        store_state(cache, state, x.shape[1])
        out = self.norm(out, split_heads(self.gate_up(self.gate_down(x)), self.n_heads))
        return self.o_proj(merge_heads(out).to(x.dtype))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        q, k, v = naive_qkv(self, x, self.n_heads)
        beta = torch.sigmoid(naive_linear(x, self.b_proj)) * self.beta_max
        step = naive_linear(naive_linear(x, self.decay_down), self.decay_up) + upcast(self.dt_bias)
        rate = torch.exp(upcast(self.A_log))[:, None]
        decay = torch.exp(-rate * naive_softplus(step).reshape(k.shape))
        heads = rms_norm_naive(naive_delta_rule(q / self.head_dim**0.5, k, v, beta, decay), self.norm)
        gate = naive_linear(naive_linear(x, self.gate_down), self.gate_up).reshape(heads.shape)
        return naive_linear((heads * torch.sigmoid(gate)).flatten(2), self.o_proj).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"memory": (self.n_heads, self.head_dim, self.head_dim), "past": self.conv.past_shape}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (H · D² + 3 · (conv - 1) · H · D) · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        width = self.n_heads * self.head_dim
        numbers = width * self.head_dim + 3 * (self.conv.kernel_size[0] - 1) * width
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "KimiDeltaAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, rank=5)


def check_beta_max(beta_max: float) -> float:
    """Raise ValueError unless the rule is stable: the eigenvalues of I - β k kᵀ are within [-1, 1]."""
    if validate.above("beta_max", beta_max, 0) > 2:
        raise ValueError(f"beta_max: expected a number above 0 and at most 2, got {beta_max}")
    return float(beta_max)


# The naive forms of the three layers, in fp32 at least and with the dimension of heads after time.


def naive_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    decay: Float[Tensor, "B T H K"],
) -> Float[Tensor, "B T H V"]:
    """The equation at the top of this file, token by token and head by head."""
    heads = torch.zeros_like(v)
    for h in range(v.shape[2]):
        S = v.new_zeros(len(v), k.shape[3], v.shape[3])
        for t in range(v.shape[1]):
            S = decay[:, t, h, :, None] * S
            error = v[:, t, h] - torch.einsum("bkv, bk -> bv", S, k[:, t, h])
            S = S + torch.einsum("b, bk, bv -> bkv", beta[:, t, h], k[:, t, h], error)
            heads[:, t, h] = torch.einsum("bkv, bk -> bv", S, q[:, t, h])
    return heads


def naive_qkv(
    layer: DeltaNet | KimiDeltaAttention, x: Float[Tensor, "B T M"], n_key_heads: int
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"], Float[Tensor, "B T H V"]]:
    """Queries, keys and values of every head; the state of head h uses key head h // (H / n_key_heads)."""
    parts = [naive_linear(x, projection) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)]
    qkv = torch.cat(parts, dim=-1)
    qkv = qkv if layer.conv is None else layer.conv.naive(qkv)
    qkv = qkv * torch.sigmoid(qkv)
    keys, (B, T), H = parts[1].shape[-1], x.shape[:2], layer.n_heads
    q, k = (part.reshape(B, T, n_key_heads, -1) for part in (qkv[..., :keys], qkv[..., keys : 2 * keys]))
    q, k = (part / torch.sqrt((part**2).sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    of_head = [h // (H // n_key_heads) for h in range(H)]
    return q[:, :, of_head], k[:, :, of_head], qkv[..., 2 * keys :].reshape(B, T, H, -1)


def naive_linear(x: Float[Tensor, "B T I"], projection: nn.Linear) -> Float[Tensor, "B T O"]:
    return upcast(x) @ upcast(projection.weight).T
