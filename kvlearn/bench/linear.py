"""States in place of caches: how time and memory grow, steps, bytes, and 100,000 tokens of decode.

Mechanisms that keep a state, beside full attention of the same width; Mamba and Mamba-2 also beside
transformers' own PyTorch path.
"""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlearn.attention import REGISTRY, Mechanism, StateCache
from kvlearn.attention.delta import delta_rule
from kvlearn.attention.linear import elu_features, gated_linear_attention, linear_attention, normalised
from kvlearn.attention.mamba import selective_scan
from kvlearn.attention.recurrent import l2_normalize
from kvlearn.attention.rwkv import wkv
from kvlearn.bench.common import Bars, Part, agree, by_label, growth_rows, label, ratio_row, time_row
from kvlearn.bench.sparse import checked_step
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.steps import last_token
from kvlearn.measure.timing import compare

Core = Callable[[], Tensor]
Form = Callable[[str], Tensor]

GROWTH = Bars(time=1.15, memory=1.15)  # the most that the exponents of a core may be
SPEEDUP = 3.0  # a core's prefill against full attention's, at least
WITH_BARS = ("linear", "gated_delta")
FLAT = 1.1  # the step behind the longer text against that behind the shorter, at most
ERROR = 1e-3  # |y - y in fp64| / |y in fp64| over the last outputs of the long decode, at most
PEER, PEER_GOAL = 1.0, 2  # how many times as long transformers' Mamba takes, at least
ROUNDS, LAYER_ROUNDS = 5, 3
STEP_ROUNDS = 301  # of one step each: on a busy machine a longer block meets more of what else runs
TRAINED = ("full", "linear", "gated_delta")  # at all lengths, for the exponents
STEPPED = ("retention",)  # one token per call all the way: its state is rotated once per call
ROUNDED = ("linear", "gated_delta")  # once more with the state in bf16
N_STATE = 16  # Mamba's, per channel


@dataclass(frozen=True)
class Sizes:
    """Widths, and lengths in tokens."""

    d_model: int = 256
    n_heads: int = 4
    bytes: tuple[int, int] = (1024, 1_000_000)
    steps: tuple[int, int] = (1024, 65536)
    chunk: int = 4096  # tokens a pass, to fill a cache
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    at: int = 8192  # where cores are compared with full attention
    layer: int = 8192
    train: tuple[int, ...] = (1024, 2048, 4096)
    train_at: int = 2048
    checked: int = 200  # tokens whose outputs and gradients must be the naive form's
    # Mamba's smallest; 24 heads of 64 in Mamba-2.
    peer_d_model: int = 768
    peer_n_heads: int = 24
    peer_length: int = 4096
    # Decode over a long text.
    long: int = 100_000
    last: int = 1000  # of its tokens one by one, and compared
    piece: int = 1000  # tokens per call before them
    long_d_model: int = 32
    long_n_heads: int = 2

    def details(self, what: str, name: str, length: int, **more: Any) -> dict[str, Any]:
        """To find a row again; ``what`` and ``name`` say which."""
        family = "full" if name == "full" else "linear"
        shape = {"d_model": self.d_model, "n_heads": self.n_heads, "length": length, "batch": 1}
        return {"what": what, "name": name, "family": family, **shape, **more}


SIZES = Sizes()
SMALL = Sizes(
    d_model=16,
    n_heads=2,
    bytes=(16, 10**6),
    steps=(16, 40),
    chunk=16,
    lengths=(80, 160, 320),
    at=160,
    layer=20,
    train=(8, 16, 32),
    train_at=16,
    checked=6,
    peer_d_model=32,
    peer_n_heads=4,
    peer_length=96,
    long=60,
    last=20,
    piece=16,
    long_d_model=16,
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark, on ``device``."""
    sizes = SMALL if small else SIZES
    return [
        Part("bytes", lambda: size_rows(sizes, device)),
        Part("step", lambda: step_rows(sizes, device)),
        Part("prefill", lambda: prefill_rows(sizes, device)),
        Part("layer", lambda: layer_rows(sizes, device)),
        Part("train", lambda: train_rows(sizes, device)),
        Part("transformers", lambda: peer_rows(sizes, device)),
        Part("long decode", lambda: long_rows(sizes, device)),
    ]


def state_names() -> list[str]:
    """All registered mechanisms with a state, by name."""
    return [name for name, kind in REGISTRY.items() if kind.forms]


def new_layer(name: str, d_model: int, n_heads: int, device: torch.device) -> Mechanism:
    """A layer, its options at their defaults."""
    kind: Callable[..., Mechanism] = REGISTRY[name]
    with device:
        return kind(d_model, n_heads).eval()


# Bytes


@torch.no_grad()
def size_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Bytes of one sequence, in fp32. Full attention's are by formula: a million tokens may not fit.

    ``tokens``: the length at which full attention's cache is as large.
    """
    short, long = sizes.bytes
    shape = (sizes.d_model, sizes.n_heads, torch.device("cpu"))
    full = new_layer("full", *shape)
    for n in sizes.bytes:
        found = sizes.details("stored", "full", n, dtype="float32")
        yield Row(f"{n} tokens: full, stored by formula", full.cache_bytes(n), "B", details=found)
    for name in state_names():
        layer = new_layer(name, *shape)
        allocated = {n: layer.new_cache(batch=1, max_len=n, device=device).nbytes for n in sizes.bytes}
        for n in sizes.bytes:
            tokens = allocated[n] / full.cache_bytes(1)
            found = sizes.details("stored", name, n, dtype="float32", tokens=tokens)
            title = f"{n} tokens: {name}, stored"
            yield Row(title, allocated[n], "B", layer.cache_bytes(n), "==", details=found)
        found = sizes.details("stored_growth", name, long, shorter=short)
        title = f"stored, {name}: {long} / {short} tokens"
        yield Row(title, allocated[long] / allocated[short], "x", 1, "==", details=found)


# Steps of decode: a state reads the same behind any text


@torch.no_grad()
def step_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The whole layer's step behind all of a text; the two lengths of one mechanism interleaved.

    States have really seen the text. Full attention's cache is filled with random numbers, which it reads in
    the same time.
    """
    short, long = sizes.steps
    x = torch.randn(1, long, sizes.d_model, device=device)
    for name in ("full", *state_names()):
        layer = new_layer(name, sizes.d_model, sizes.n_heads, device)
        steps: dict[str, Core] = {}
        for n in sizes.steps:
            if name == "full":
                steps[f"{n} tokens"] = last_token(layer, 1, n)
            else:
                room = STEP_ROUNDS + 2
                steps[f"{n} tokens"] = checked_step(name, layer, x[:, :n], chunk=sizes.chunk, room=room)
        compared = compare(steps, rounds=STEP_ROUNDS, min_block_time=0)
        title = f"step, {name}"
        for n in sizes.steps:
            yield time_row(compared, title, f"{n} tokens", sizes.details("step_time", name, n))
        ratio = compared.ratio(f"{long} tokens", f"{short} tokens")
        bar = None if name == "full" else FLAT
        found = sizes.details("step_growth", name, long, shorter=short)
        yield Row(f"{title}: {long} / {short}", ratio.median, "x", bar, "<=", ratio, found)


# Growth with the length: the mixing cores alone
#
# Each builder draws inputs for n tokens and returns the core as a function of the form. What a layer does
# right around its core counts: the features and the normaliser of linear attention, the unit length of Gated
# DeltaNet's queries and keys. Keys are as long as values; Mamba and RWKV-4 have ``d_model`` channels.


def draw(sizes: Sizes, n: int, device: torch.device) -> Tensor:
    """Queries, keys and values of ``n`` tokens, in one tensor."""
    return torch.randn(3, 1, sizes.n_heads, n, sizes.d_model // sizes.n_heads, device=device)


def draw_log_decay(shape: torch.Size) -> Tensor:
    """Decays around 0.95, in logarithms."""
    return F.logsigmoid(3 + torch.randn(shape))


def full_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """torch's causal attention."""
    q, k, v = draw(sizes, n, device)
    return lambda form: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def linear_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """Linear attention with the features of elu + 1, and its normaliser."""
    q, k, v = draw(sizes, n, device)

    def core(form: str) -> Tensor:
        with_ones = F.pad(v, (0, 1), value=1.0)
        return normalised(linear_attention(elu_features(q), elu_features(k), with_ones, form=form)[0])

    return core


def gated_delta_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """Gated DeltaNet's rule, queries and keys of unit length."""
    q, k, v = draw(sizes, n, device)
    beta = torch.rand(q.shape[:3], device=device)
    log_decay = draw_log_decay(beta.shape).to(device)
    return lambda form: delta_rule(l2_normalize(q), l2_normalize(k), v, beta, log_decay, form=form)[0]


def gla_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """Gated linear attention, a decay for every key dimension."""
    q, k, v = draw(sizes, n, device)
    log_decay = draw_log_decay(k.shape).to(device)
    return lambda form: gated_linear_attention(q, k, v, log_decay, form=form)[0]


def mamba2_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """Mamba-2's: heads share B and C."""
    C, B, x = draw(sizes, n, device)
    C, B = (t[:, :1].expand_as(x) for t in (C, B))
    log_decay = draw_log_decay(x.shape[:3]).to(device)
    return lambda form: linear_attention(C, B, x, log_decay, form=form)[0]


def mamba_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """Mamba's selective scan."""
    x, dt = torch.randn(2, 1, n, sizes.d_model, device=device)
    B, C = torch.randn(2, 1, n, N_STATE, device=device)
    A = -torch.arange(1.0, N_STATE + 1, device=device).expand(sizes.d_model, -1)
    D, dt = torch.ones(sizes.d_model, device=device), F.softplus(dt - 4)
    return lambda form: selective_scan(x, dt, A, B, C, D, form=form)[0]


def rwkv4_core(sizes: Sizes, n: int, device: torch.device) -> Form:
    """RWKV-4's weighted average."""
    k, v = torch.randn(2, 1, n, sizes.d_model, device=device)
    w, u = torch.rand(2, sizes.d_model, device=device)
    return lambda form: wkv(w, u, k, v, form=form)[0]


CORES: dict[str, Callable[[Sizes, int, torch.device], Form]] = {
    "full": full_core,
    "linear": linear_core,
    "gated_delta": gated_delta_core,
    "gla": gla_core,
    "mamba2": mamba2_core,
    "mamba": mamba_core,
    "rwkv4": rwkv4_core,
}


def checked_core(name: str, sizes: Sizes, n: int, device: torch.device) -> Core:
    """The core's fast form, once it has given what the recurrent one gives, token by token."""
    core = CORES[name](sizes, n, device)
    agree({name: partial(core, "chunked")}, core("recurrent"))
    return partial(core, "chunked")


@torch.no_grad()
def prefill_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A whole text through each core, every core at every length interleaved.

    All lengths are fitted: a core over a state is linear from its second chunk on.
    """
    calls = {name: {n: checked_core(name, sizes, n, device) for n in sizes.lengths} for name in CORES}
    compared = compare(by_label(calls), rounds=ROUNDS)
    bars = dict.fromkeys(WITH_BARS, GROWTH)
    yield from growth_rows("prefill", calls, compared, device, bars=bars, details=sizes.details)
    for name in list(CORES)[1:]:
        bar = SPEEDUP if name in WITH_BARS else None
        found = sizes.details("prefill_speedup", name, sizes.at)
        labels = label("full", sizes.at), label(name, sizes.at)
        yield ratio_row(compared, "prefill", *labels, found, bar=bar)


# Whole layers, projections included


@torch.no_grad()
def layer_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A text through each layer, without a cache."""
    x = torch.randn(1, sizes.layer, sizes.d_model, device=device)
    calls: dict[str, Core] = {}
    for name in ("full", *state_names()):
        layer = new_layer(name, sizes.d_model, sizes.n_heads, device)
        few = x[:, : sizes.checked]
        agree({name: partial(layer, few)}, layer.naive(few))
        calls[name] = partial(layer, x)
    compared = compare(calls, rounds=LAYER_ROUNDS)
    title = f"layer {sizes.d_model}, {sizes.layer} tokens"
    for name in calls:
        yield time_row(compared, title, name, sizes.details("layer_time", name, sizes.layer))
    for name in list(calls)[1:]:
        found = sizes.details("layer_speedup", name, sizes.layer)
        yield ratio_row(compared, title, "full", name, found)


@torch.no_grad()
def train_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Forward and backward of each layer, to the gradients of its input and its weights."""
    calls: dict[str, dict[int, Core]] = {}
    for name in ("full", *state_names()):
        lengths = sizes.train if name in TRAINED else (sizes.train_at,)
        calls[name] = checked_train_steps(name, lengths, sizes, device)
    compared = compare(by_label(calls), rounds=LAYER_ROUNDS)
    grown = {name: calls[name] for name in TRAINED}
    yield from growth_rows("train", grown, compared, device, bars={}, details=sizes.details)
    title, at = f"training step, layer {sizes.d_model}", sizes.train_at
    for name in calls:
        found = sizes.details("train_layer_time", name, at)
        yield time_row(compared, title, label(name, at), found)
    for name in list(calls)[1:]:
        found = sizes.details("train_speedup", name, at)
        yield ratio_row(compared, title, label("full", at), label(name, at), found)


def checked_train_steps(
    name: str, lengths: tuple[int, ...], sizes: Sizes, device: torch.device
) -> dict[int, Core]:
    """Steps over texts of these lengths, once short ones have given the naive form's gradients."""
    layer = new_layer(name, sizes.d_model, sizes.n_heads, device)
    x, upstream = torch.randn(2, 1, max(lengths), sizes.d_model, device=device)
    few = slice(0, sizes.checked)
    expected = gradient(layer, layer.naive, x[:, few], upstream[:, few])
    agree({name: partial(gradient, layer, layer, x[:, few], upstream[:, few])}, expected)
    return {n: partial(gradient, layer, layer, x[:, :n], upstream[:, :n]) for n in lengths}


def gradient(layer: Mechanism, run: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    """Of the layer's input; those of its weights are computed too."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(run(x), (x, *layer.parameters()), upstream)[0]


# Mamba and Mamba-2 beside transformers: same weights, outputs compared first


@torch.no_grad()
def peer_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Time of both, and the memory of ours against one tensor of the states of all tokens.

    Without transformers there is a warning and no row.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        warnings.warn("transformers is not installed: no comparison with its Mamba", stacklevel=2)
        return
    width, n_heads, n = sizes.peer_d_model, sizes.peer_n_heads, sizes.peer_length
    x = torch.randn(1, n, width, device=device)
    for name, new_peer in PEERS.items():
        layer = new_layer(name, width, n_heads, device)
        with device:
            peer = new_peer(width, n_heads).eval()
        share_weights(layer, peer)
        calls: dict[str, Core] = {"transformers": partial(peer, x), name: partial(layer, x)}
        agree({name: calls[name]}, calls["transformers"]())
        compared = compare(calls, rounds=ROUNDS)
        title, shape = f"{name} {width}, {n} tokens", {"d_model": width, "n_heads": n_heads}
        for who in calls:
            yield time_row(compared, title, who, sizes.details("peer_time", name, n, who=who, **shape))
        found = sizes.details("peer_speedup", name, n, goal=PEER_GOAL, **shape)
        yield ratio_row(compared, f"{title} (goal {PEER_GOAL})", "transformers", name, found, bar=PEER)
        cache = layer.new_cache(batch=1, max_len=n)
        assert isinstance(cache, StateCache)
        states = n * cache.state["memory"].numel() * x.itemsize
        for who, call in calls.items():
            found = sizes.details("peer_memory", name, n, who=who, states=states, **shape)
            bar = states if who == name else None
            peak = peak_memory(call, device)
            yield Row(f"{title}, extra memory: {who}", peak, "B", bar, "<=", details=found)


def new_mamba(width: int, n_heads: int) -> nn.Module:
    """transformers' Mamba layer; it has no heads."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer: nn.Module = MambaMixer(MambaConfig(hidden_size=width), layer_idx=0)
    return mixer


def new_mamba2(width: int, n_heads: int) -> nn.Module:
    """transformers' Mamba-2 layer."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    head_dim = 2 * width // n_heads
    config = Mamba2Config(hidden_size=width, num_heads=n_heads, head_dim=head_dim, n_groups=1)
    mixer: nn.Module = Mamba2Mixer(config, layer_idx=0)
    return mixer


PEERS = {"mamba": new_mamba, "mamba2": new_mamba2}


def share_weights(layer: nn.Module, peer: nn.Module) -> None:
    """Give ``peer`` the weights of ``layer``, under its own names."""
    renamed = {"conv": "conv1d", "o_proj": "out_proj"}
    weights = {}
    for name, weight in layer.state_dict().items():
        part, *rest = name.split(".")
        weights[".".join((renamed.get(part, part), *rest))] = weight
    peer.load_state_dict(weights)


# A hundred thousand tokens of decode: what rounding does to a state by then


@torch.no_grad()
def long_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Every mechanism with a state; for some the same with a state that is rounded after every token.

    The recurrent form goes through the cache in pieces, whose arithmetic is that of single steps, and the
    last tokens are single steps. The outputs at the end are compared with the same layer in fp64, by its
    chunked form.
    """
    width, n_heads, n = sizes.long_d_model, sizes.long_n_heads, sizes.long
    x = torch.randn(1, n, width, device=device)
    for name in state_names():
        layer = new_layer(name, width, n_heads, device)
        exact = through_cache(deepcopy(layer).double(), x.double(), sizes.piece, sizes.last)
        layer.form = "recurrent"
        outs = {"float32": through_cache(layer, x, 1 if name in STEPPED else sizes.piece, sizes.last)}
        if name in ROUNDED:
            outs["bfloat16"] = rounding_state(layer, x, torch.bfloat16)
        for state, y in outs.items():
            none, most = (0, ERROR) if state == "float32" else (None, None)
            shape = {"state": state, "d_model": width, "n_heads": n_heads, "last": sizes.last}
            title = f"{n} tokens, {name}, state in {state}"
            broken, found = int((~y.isfinite()).sum()), sizes.details("long_finite", name, n, **shape)
            yield Row(f"{title}: numbers not finite", broken, "in all", none, "==", details=found)
            found = sizes.details("long_error", name, n, **shape)
            title = f"{title}: error of the last {sizes.last} against fp64"
            yield Row(title, error(y, exact, sizes.last), "x", most, "<=", details=found)


def through_cache(layer: Mechanism, x: Tensor, piece: int, last: int) -> Tensor:
    """The text in pieces through a cache; the last ``last`` tokens one by one."""
    cache = layer.new_cache(batch=1, max_len=x.shape[1])
    pieces = (*x[:, :-last].split(piece, dim=1), *x[:, -last:].split(1, dim=1))
    return torch.cat([layer(each, cache) for each in pieces], dim=1)


def rounding_state(layer: Mechanism, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Token by token, with the memory rounded to ``dtype`` between them; the arithmetic is fp32."""
    cache, outs = layer.new_cache(batch=1, max_len=x.shape[1]), []
    assert isinstance(cache, StateCache)
    memory = cache.state["memory"]
    for token in x.split(1, dim=1):
        outs.append(layer(token, cache))
        memory.copy_(memory.to(dtype))
    return torch.cat(outs, dim=1)


def error(y: Tensor, exact: Tensor, last: int) -> float:
    """Relative, by norms, over the last outputs."""
    y, exact = y[:, -last:].double(), exact[:, -last:]
    return float((y - exact).norm() / exact.norm())
