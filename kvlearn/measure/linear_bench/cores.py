"""The mixing cores alone, projections left out: what each does with a text of n random tokens.

A builder draws inputs and returns the core as a function of the form. What a layer does right around its core
counts: the features and the normaliser of linear attention, the unit length of Gated DeltaNet's queries and
keys. There are ``N_HEADS`` heads, their keys as long as values; Mamba and RWKV-4 have ``D_MODEL`` channels.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention.delta import delta_rule
from kvlearn.attention.linear import elu_features, gated_linear_attention, linear_attention, normalised
from kvlearn.attention.mamba import selective_scan
from kvlearn.attention.recurrent import l2_normalize
from kvlearn.attention.rwkv import wkv
from kvlearn.measure.linear_bench import designs
from kvlearn.measure.shared_bench.growth import Core
from kvlearn.measure.shared_bench.rows import agree

Form = Callable[[str], Tensor]
N_STATE = 16  # Mamba's, a channel


def draw(n: int, device: torch.device, parts: int = 3) -> Tensor:
    """Queries, keys and values of ``n`` tokens, in one tensor."""
    return torch.randn(parts, 1, designs.N_HEADS, n, designs.D_MODEL // designs.N_HEADS, device=device)


def draw_log_decay(shape: torch.Size) -> Tensor:
    """Decays around 0.95, in logarithms."""
    return F.logsigmoid(3 + torch.randn(shape))


def full(n: int, device: torch.device) -> Form:
    q, k, v = draw(n, device)
    return lambda form: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def linear(n: int, device: torch.device) -> Form:
    q, k, v = draw(n, device)

    def core(form: str) -> Tensor:
        with_ones = F.pad(v, (0, 1), value=1.0)
        return normalised(linear_attention(elu_features(q), elu_features(k), with_ones, form=form)[0])

    return core


def gated_delta(n: int, device: torch.device) -> Form:
    q, k, v = draw(n, device)
    beta = torch.rand(q.shape[:3], device=device)
    log_decay = draw_log_decay(beta.shape).to(device)
    return lambda form: delta_rule(l2_normalize(q), l2_normalize(k), v, beta, log_decay, form=form)[0]


def gla(n: int, device: torch.device) -> Form:
    q, k, v = draw(n, device)
    log_decay = draw_log_decay(k.shape).to(device)
    return lambda form: gated_linear_attention(q, k, v, log_decay, form=form)[0]


def mamba2(n: int, device: torch.device) -> Form:
    C, B, x = draw(n, device)
    C, B = (t[:, :1].expand_as(x) for t in (C, B))  # heads share them
    log_decay = draw_log_decay(x.shape[:3]).to(device)
    return lambda form: linear_attention(C, B, x, log_decay, form=form)[0]


def mamba(n: int, device: torch.device) -> Form:
    x, dt = torch.randn(2, 1, n, designs.D_MODEL, device=device)
    B, C = torch.randn(2, 1, n, N_STATE, device=device)
    A = -torch.arange(1.0, N_STATE + 1, device=device).expand(designs.D_MODEL, -1)
    D, dt = torch.ones(designs.D_MODEL, device=device), F.softplus(dt - 4)
    return lambda form: selective_scan(x, dt, A, B, C, D, form=form)[0]


def rwkv4(n: int, device: torch.device) -> Form:
    k, v = torch.randn(2, 1, n, designs.D_MODEL, device=device)
    w, u = torch.rand(2, designs.D_MODEL, device=device)
    return lambda form: wkv(w, u, k, v, form=form)[0]


CORES: dict[str, Callable[[int, torch.device], Form]] = {
    "full": full,
    "linear": linear,
    "gated_delta": gated_delta,
    "gla": gla,
    "mamba2": mamba2,
    "mamba": mamba,
    "rwkv4": rwkv4,
}


def checked_core(name: str, n: int, device: torch.device) -> Core:
    """The core's fast form, once it has given what the recurrent one gives, token by token."""
    core = CORES[name](n, device)
    agree({name: partial(core, "chunked")}, core("recurrent"))
    return partial(core, "chunked")
