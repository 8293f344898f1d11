"""Shared parts of recurrences: a state of constant size as the cache, the forms, norms and convolutions.

A recurrence is computed in one of these forms, which give the same numbers:

    parallel     all pairs of tokens at once, masked: quadratic; for understanding, and inside a chunk
    recurrent    one token after the other, as in a decode step
    chunked      chunk after chunk, parallel inside, the state carried across: linear in time and in memory

Letters beside those of core.py: K numbers of a key, V numbers of a value, E channels, P past inputs.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register
from kvlearn.attention.core import upcast

FORMS = ("parallel", "recurrent", "chunked")
State = dict[str, Tensor]  # the parts of the state by name; the first dimension is the batch


class StateCache(Cache):
    """A state of constant size, whatever the length; fp32 at least, since rounding errors add up in it.

    Past tokens cannot be removed, so it does not trim: rows of a batch have one length, and prompts of
    different lengths need one cache each. ``shapes`` are the parts of the state and their
    shapes in one row of a batch; a part starts from 0, or from its number in ``starts``.
    """

    can_trim = False

    def __init__(
        self,
        batch: int,
        max_len: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        starts: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(batch, max_len, device)
        self.shapes, self.starts = dict(shapes), starts or {}
        self.state: State = {
            name: torch.full((batch, *shape), self.starts.get(name, 0.0), dtype=dtype, device=device)
            for name, shape in shapes.items()
        }

    def tensors(self) -> list[Tensor]:
        return list(self.state.values())

    def replace(self, state: State, n_tokens: int) -> None:
        """Store the state after ``n_tokens`` more."""
        self.advance(n_tokens)
        for name, new in state.items():
            self.state[name].copy_(new.detach())

    def reset(self) -> None:
        super().reset()
        for name, start in self.starts.items():
            self.state[name].fill_(start)


def load_state(layer: Mechanism, x: Float[Tensor, "B T M"], cache: Cache | None) -> tuple[State, str]:
    """The state before ``x``, in fp32 at least and read-only, and the form for ``x``.

    Without a cache it is the state before the first token. A single token after a cache uses the recurrent
    form, everything else ``layer.form``. Raises ValueError if ``x`` exceeds the cache, or if the cache
    is for a layer of other sizes.
    """
    if not isinstance(cache, StateCache):
        empty = layer.new_cache(len(x), 1, x.dtype, x.device)
        assert isinstance(empty, StateCache)
        return empty.state, layer.form
    if layer.state_shapes is None:  # looked up once, and not at every step
        own = layer.new_cache(1, 1, device="meta")
        assert isinstance(own, StateCache)
        layer.state_shapes = own.shapes
    if layer.state_shapes != cache.shapes:
        raise ValueError(f"cache: expected shapes {layer.state_shapes} in a row, got {cache.shapes}")
    cache.check_room(x.shape[1])
    inside = torch.promote_types(x.dtype, torch.float32)
    state = {name: t.to(inside) for name, t in cache.state.items()}
    return state, "recurrent" if x.shape[1] == 1 else layer.form


def store_state(cache: Cache | None, state: State, n_tokens: int) -> None:
    """Store ``state``, after ``n_tokens`` more, if there is a cache."""
    if isinstance(cache, StateCache):
        cache.replace(state, n_tokens)


def state_dtype(layer: Mechanism, dtype: torch.dtype | None) -> torch.dtype:
    """fp32, or wider where the weights or ``dtype`` are. (A narrower one is for keys and values.)"""
    return torch.promote_types(validate.floating("dtype", layer.dtype_and_device(dtype)[0]), torch.float32)


def by_form(
    form: str,
    parallel: Callable[..., tuple[Tensor, Tensor]],
    recurrent: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """A recurrence over ``inputs``, each (B, H, T, …), in the form of this name and the dtype of ``state``.

    Returns the outputs (B, H, T, V) and the state after the last token. The parallel form is one chunk of all
    tokens; the chunked form is the parallel one chunk after chunk, each from the state of the one before. The
    last chunk may be shorter. Intermediate results exist for one chunk only (except for gradients), so memory
    is linear in T.
    """
    validate.one_of("form", form, FORMS)
    chunk = validate.positive("chunk", chunk)
    size, outs = chunk if form == "chunked" else inputs[0].shape[2], []
    with no_autocast(state.device):
        if form == "recurrent":
            return recurrent(*(x.to(state.dtype) for x in inputs), state)
        for pieces in zip(*(x.split(size, dim=2) for x in inputs), strict=True):
            out, state = parallel(*(x.to(state.dtype) for x in pieces), state)
            outs.append(out)
    return torch.cat(outs, dim=2), state


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products of matrices keep the dtype of their factors: autocast is for projections."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def check_recurrence(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Float[Tensor, "B H K V"]:
    """Check that queries, keys and values fit each other; returns the state as ``check_state`` does."""
    validate.tensor("q", q, ("batch", "heads", "time", "features"))
    validate.floating("q", q.dtype)
    validate.at_least("q.shape[0] (batch)", q.shape[0], 1)
    validate.at_least("q.shape[2] (time)", q.shape[2], 1)
    B, H, T, K = q.shape
    validate.tensor("k", k, (B, H, T, K), dtype=q.dtype, device=q.device)
    validate.tensor("v", v, (B, H, T, "values"), dtype=q.dtype, device=q.device)
    return check_state(state, (B, H, K, v.shape[3]), q)


def check_state(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The state in the dtype of its sums, fp32 or that of ``like``; zeros for None."""
    inside = torch.promote_types(like.dtype, torch.float32)
    if state is None:
        return torch.zeros(shape, dtype=inside, device=like.device)
    validate.tensor("state", state, shape, device=like.device)
    validate.floating("state", state.dtype)
    return state.to(inside)


def check_log_decay(log_decay: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless these are logarithms of decays in (0, 1]."""
    validate.tensor("log_decay", log_decay, shape, device=device)
    validate.floating("log_decay", log_decay.dtype)
    if validate.may_read(log_decay):
        least, most = (float(bound) for bound in log_decay.detach().aminmax())
        if not (-math.inf < least and most <= 0):  # NaN fails too
            raise ValueError(f"log_decay: expected logarithms of decays in (0, 1], got {least} to {most}")


def expand_heads(x: Float[Tensor, "B G T K"], n_heads: int) -> Float[Tensor, "B H T K"]:
    """Each of G groups repeated for its H / G neighbouring heads; with one group a view."""
    return x[:, :, None].expand(-1, -1, n_heads // x.shape[1], -1, -1).flatten(1, 2)


def l2_normalize(x: Float[Tensor, "... D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / √(|x|² + eps), in fp32 at least: of length 1, and 0 for 0."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def naive_softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), written out for ``naive`` forms."""
    return torch.logaddexp(x, torch.zeros_like(x))


def step_biases(n: int) -> Float[Tensor, "{n}"]:
    """Biases b for steps softplus(b) that begin between 0.001 and 0.1, log-uniformly.

    At first a token then changes each state by a thousandth to a tenth. Source: the code published with
    Mamba (2023); section 3.6 of the paper has the step itself uniform.
    """
    dt = drawn((n,), math.log(0.001), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # log(e^dt - 1), the inverse of softplus


def drawn(shape: tuple[int, ...], least: float, most: float) -> Tensor:
    """Numbers drawn uniformly, in fp32: half precision would have 256 of them between any two."""
    return torch.empty(shape, dtype=torch.float32).uniform_(least, most)


class HeadNorm(nn.RMSNorm):
    """y = RMSNorm(head) ⊙ w, in fp32 at least, whatever dtype the weights have.

    For unnormalised recurrences: without softmax the output of a head can be of any size, and the norm fixes
    it.
    """

    def __init__(self, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__(head_dim, validate.above("norm_eps", eps, 0))

    def forward(self, heads: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        return F.rms_norm(upcast(heads), self.normalized_shape, upcast(self.weight), self.eps)


class GatedNorm(HeadNorm):
    """y = RMSNorm(head) ⊙ w ⊙ silu(gate), in fp32 at least; or with another ``activation`` of the gate.

    The gate, computed from the token, can set a head's output to 0.
    Source: Sun et al., "Retentive Network" (2023), equation 8; with RMSNorm and per head as in Yang et al.,
    "Gated Linear Attention" (2024), section 4.4, and in Gated DeltaNet (2025).
    """

    def __init__(
        self, head_dim: int, eps: float = 1e-6, activation: Callable[[Tensor], Tensor] = F.silu
    ) -> None:
        super().__init__(head_dim, eps)
        self.activation = activation

    def forward(  # type: ignore[override]
        self, heads: Float[Tensor, "B H T D"], gate: Float[Tensor, "B H T D"]
    ) -> Float[Tensor, "B H T D"]:
        return super().forward(heads) * self.activation(upcast(gate))


class ShortConvolution(nn.Conv1d):
    """y_t[c] = Σ_{i < width} w[c, i] · x_{t - width + 1 + i}[c] (+ b[c]): depthwise and causal.

    Tensors are those of ``nn.Conv1d``: weight (channels, 1, width), the newest token last, bias (channels,).
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        width = validate.at_least("width", width, 2)
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    @property
    def past_shape(self) -> tuple[int, int]:
        """Shape per row of the past inputs that a step needs: those of the last width - 1 tokens."""
        return self.kernel_size[0] - 1, self.in_channels

    def run(
        self, x: Float[Tensor, "B T E"], past: Float[Tensor, "B P E"]
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B P E"]]:
        """Outputs for ``x`` after ``past``, and the past of the next token; a sequence starts after zeros."""
        T, taps = x.shape[1], self.weight[:, 0].T
        inputs = torch.cat((past.to(x.dtype), x), dim=1)
        y = inputs[:, :T] * taps[0]
        for i, tap in enumerate(taps[1:], start=1):  # faster than conv1d on a CPU, and time stays in front
            y = torch.addcmul(y, inputs[:, i : i + T], tap)
        return y if self.bias is None else y + self.bias, inputs[:, T:]

    def naive(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        """The sum above, one product after the other."""
        y = torch.zeros_like(x)
        for t in range(x.shape[1]):
            for i in range(self.kernel_size[0]):
                s = t - self.kernel_size[0] + 1 + i
                if s >= 0:
                    y[:, t] = y[:, t] + upcast(self.weight[:, 0, i]) * x[:, s]
        return y if self.bias is None else y + upcast(self.bias)


@register("short_conv")
class ShortConvolutionMixer(Mechanism):
    """A short convolution as a layer: y = conv(x), depthwise.

    It moves information by fewer than ``width`` tokens. Alone it is the control in tests of recall; before
    another mixer it gives each token the one before it. Two layers of softmax attention learn to find that
    token by themselves, a state does not.

    Cache: B · (width - 1) · d_model numbers. ``n_heads`` must divide d_model and has no other effect.
    Source: Fu et al., "Hungry Hungry Hippos" (2023), section 3 (the shift); Arora et al., "Zoology" (2023).
    """

    forms = ("recurrent", "chunked")
    form = "chunked"

    def __init__(self, d_model: int, n_heads: int, *, width: int = 4) -> None:
        super().__init__(d_model, n_heads, None)
        self.conv = ShortConvolution(d_model, width)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        return self.convolve(x, cache)

    def convolve(self, x: Float[Tensor, "B T M"], cache: Cache | None) -> Float[Tensor, "B T M"]:
        """The convolution of ``x`` after the tokens in ``cache``."""
        state, form = load_state(self, x, cache)
        if form == "chunked":
            y, state["past"] = self.conv.run(x, state["past"])
        else:
            ys = []
            for token in x.split(1, dim=1):
                out, state["past"] = self.conv.run(token, state["past"])
                ys.append(out)
            y = torch.cat(ys, dim=1)
        store_state(cache, state, x.shape[1])
        return y

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return self.conv.naive(upcast(x)).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"past": self.conv.past_shape}
        return StateCache(
            batch, max_len, shapes, state_dtype(self, dtype), self.dtype_and_device(None, device)[1]
        )

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (width - 1) · d_model · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = (self.conv.kernel_size[0] - 1) * self.d_model
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "ShortConvolutionMixer":
        return cls(d_model=24, n_heads=3)


@register("gated_conv")
class GatedShortConvolution(ShortConvolutionMixer):
    """A short convolution between two gates; most layers of LFM2 are of this kind, the others attention.

        b, c, u = W_in x;   y = W_o (c ⊙ conv(b ⊙ u))              M numbers each

    ``bias`` adds biases to both projections and to the convolution. ``n_heads`` must divide d_model and has
    no other effect.

    Cache: B · (width - 1) · d_model numbers.
    Source: Liquid AI, "LFM2 Technical Report" (2025), on its gated short convolution blocks.
    """

    def __init__(self, d_model: int, n_heads: int, *, width: int = 3, bias: bool = False) -> None:
        super().__init__(d_model, n_heads, width=width)
        validate.instance("bias", bias, bool)
        self.conv = ShortConvolution(d_model, width, bias=bias)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        before, after, u = self.in_proj(x).chunk(3, dim=-1)  # (B, T, M) each
        return self.o_proj(after * self.convolve(before * u, cache))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        M, bias = self.d_model, 0 if self.in_proj.bias is None else upcast(self.in_proj.bias)
        gated = upcast(x) @ upcast(self.in_proj.weight).T + bias
        y = self.conv.naive(gated[..., :M] * gated[..., 2 * M :]) * gated[..., M : 2 * M]
        y = y @ upcast(self.o_proj.weight).T
        return (y if self.o_proj.bias is None else y + upcast(self.o_proj.bias)).to(x.dtype)
