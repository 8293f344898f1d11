"""Linear attention, retention, gated linear attention and the short convolution against others' parts.

transformers' lightning attention (MiniMax), its RoPE and Mamba's convolution, nn.Conv1d, and the equations
written out in float64: pair by pair or token by token, and head by head.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import draw, redraw
from torch import Tensor, nn
from transformers import LlamaConfig, MambaConfig, MiniMaxConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mamba.modeling_mamba import MambaMixer, causal_conv1d_fn, causal_conv1d_update
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from kvlearn.attention import GatedLinearAttention, LinearAttention, Retention, ShortConvolution
from kvlearn.attention.linear import elu_features, linear_attention, taylor_features

D_MODEL, N_HEADS, HEAD_DIM, BATCH, TIME = 32, 4, 8, 2, 53
FORMS = ("parallel", "recurrent", "chunked")
every_form = pytest.mark.parametrize("form", FORMS)


def text() -> Tensor:
    return draw(BATCH, TIME, D_MODEL, seed=1)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    atol = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=tolerance)


def heads(x: Tensor, proj: nn.Linear) -> Tensor:
    """(B, H, T, D) in float64."""
    return F.linear(x.double(), proj.weight.double()).view(BATCH, TIME, N_HEADS, -1).permute(0, 2, 1, 3)


def with_a_scale(layer: Any) -> Any:
    """With so large an epsilon in its norm that the size of the norm's input changes its output."""
    layer.norm.eps = 1.0
    return layer


def finished(layer: Any, o: Tensor, x: Tensor) -> Tensor:
    """The norm of every head, the gate and the output projection of ``layer``, in float64."""
    o = F.rms_norm(o, (o.shape[-1],), layer.norm.weight.double(), layer.norm.eps)
    o = o * F.silu(heads(x, layer.g_proj))
    return F.linear(o.permute(0, 2, 1, 3).flatten(2), layer.o_proj.weight.double())


def in_pieces(layer: Any, x: Tensor) -> Tensor:
    """A prompt, a chunk, then tokens, with a cache."""
    cache = layer.new_cache(BATCH, TIME)
    return torch.cat([layer(piece, cache) for piece in x.split([30, 11, *[1] * (TIME - 41)], dim=1)], dim=1)


# Decays that are constant


def lightning(layer_idx: int, block_size: int) -> MiniMaxLightningAttention:
    config = MiniMaxConfig(
        hidden_size=D_MODEL,
        num_attention_heads=N_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=4,
        block_size=block_size,
        layer_types=["linear_attention"] * 4,
    )
    return redraw(MiniMaxLightningAttention(config, layer_idx))


@every_form
@pytest.mark.parametrize("layer_idx", [0, 3])
@pytest.mark.parametrize("block_size", [7, 16, 256])
def test_the_core_is_lightning_attention(form: str, layer_idx: int, block_size: int) -> None:
    """Its slopes are our logarithms; the layer around the core is theirs."""
    theirs, x = lightning(layer_idx, block_size), text()
    made = F.silu(theirs.qkv_proj(x)).view(BATCH, TIME, N_HEADS, -1).transpose(1, 2)
    q, k, v = made.split(HEAD_DIM, dim=-1)
    log_decay = -theirs.slope_rate.view(1, N_HEADS, 1).expand(BATCH, -1, TIME)
    out, state = linear_attention(q, k, v, log_decay, form=form, chunk=9)
    out = theirs.norm(out.transpose(1, 2).flatten(2)) * torch.sigmoid(theirs.output_gate(x))
    expected, their_state = theirs(x, None, None)
    close(theirs.out_proj(out), expected)
    close(state, their_state)


def test_after_a_state_the_core_is_lightning_attention_with_its_cache() -> None:
    theirs, x = lightning(1, 16), text()
    cache, state = MiniMaxCache(), None
    log_decay = -theirs.slope_rate.view(1, N_HEADS, 1)
    for piece in x.split([30, 11, 1, 1, 10], dim=1):
        made = F.silu(theirs.qkv_proj(piece)).unflatten(2, (N_HEADS, -1)).transpose(1, 2)
        q, k, v = made.split(HEAD_DIM, dim=-1)
        _, state = linear_attention(q, k, v, log_decay.expand(BATCH, -1, piece.shape[1]), state, chunk=4)
        _, their_state = theirs(piece, None, None, cache)
        close(state, their_state)


def rotated(x: Tensor) -> Tensor:
    """By transformers, at the absolute positions."""
    config = LlamaConfig(head_dim=x.shape[-1], rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(x.shape[2])[None])
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("options", [{}, {"key_dim": 4}, {"decay": (0.2, 0.7, 0.95, 1.0)}])
def test_retention_is_its_parallel_form_with_keys_at_absolute_positions(options: dict[str, Any]) -> None:
    layer, x = with_a_scale(redraw(Retention(D_MODEL, N_HEADS, **options))), text()
    q, k, v = rotated(heads(x, layer.q_proj)), rotated(heads(x, layer.k_proj)), heads(x, layer.v_proj)
    gamma = torch.tensor(options.get("decay", [1 - 2.0 ** -(5 + h) for h in range(N_HEADS)])).double()
    fade = torch.zeros(N_HEADS, TIME, TIME, dtype=torch.float64)
    for t in range(TIME):
        for s in range(t + 1):
            fade[:, t, s] = gamma ** (t - s)
    o = torch.einsum("bhtk,bhsk,hts,bhsv->bhtv", q, k, fade, v) / math.sqrt(layer.key_dim)
    expected = finished(layer, o, x)
    close(layer(x), expected)
    close(in_pieces(layer, x), expected)


# No decay


def taylor_features_of(q: Tensor, k: Tensor) -> Tensor:
    """1 + s + s²/2 for every pair."""
    s = q @ k.mT / math.sqrt(q.shape[-1])
    return 1 + s + s**2 / 2


def elu_features_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q > 0, q + 1, q.exp()) @ torch.where(k > 0, k + 1, k.exp()).mT


WEIGHTS = {"elu": elu_features_of, "taylor": taylor_features_of}


@pytest.mark.parametrize("features", WEIGHTS)
@pytest.mark.parametrize("key_dim", [3, HEAD_DIM])
def test_linear_attention_is_a_mean_of_values_with_its_weights(features: str, key_dim: int) -> None:
    layer, x = redraw(LinearAttention(D_MODEL, N_HEADS, key_dim=key_dim, features=features)), text()
    q, k, v = (heads(x, proj) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = WEIGHTS[features](q, k) * torch.ones(TIME, TIME).tril()
    o = weights / weights.sum(-1, keepdim=True) @ v
    expected = F.linear(o.permute(0, 2, 1, 3).flatten(2), layer.o_proj.weight.double())
    close(layer(x), expected)
    close(in_pieces(layer, x), expected)


def test_products_of_features_are_the_kernels() -> None:
    q, k = draw(5, 7).double(), draw(6, 7, seed=2).double()
    close(elu_features(q) @ elu_features(k).mT, elu_features_of(q, k), 1e-12)
    close(taylor_features(q) @ taylor_features(k).mT, taylor_features_of(q, k), 1e-12)
    assert taylor_features(q).shape == (5, 1 + 7 + 7 * 8 // 2)
    near = taylor_features_of(q / 9, k / 9) - torch.exp(q @ k.mT / 81 / 7**0.5)
    assert near.abs().max() < 1e-4  # the series of exp, to the second order


# Decays computed from the token


def test_gated_linear_attention_is_its_recurrence() -> None:
    layer, x = with_a_scale(redraw(GatedLinearAttention(D_MODEL, N_HEADS))), text()
    K = HEAD_DIM // 2
    q, k, v = (heads(x, proj) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    z = x.double() @ (layer.decay_up.weight.double() @ layer.decay_down.weight.double()).T
    a = torch.sigmoid(z + layer.decay_up.bias.double()) ** (1 / 16)
    o = torch.zeros(BATCH, N_HEADS, TIME, HEAD_DIM, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(N_HEADS):
            S = torch.zeros(K, HEAD_DIM, dtype=torch.float64)
            for t in range(TIME):
                S = torch.diag(a[b, t, h * K : (h + 1) * K]) @ S + torch.outer(k[b, h, t], v[b, h, t])
                o[b, h, t] = S.T @ q[b, h, t] / math.sqrt(K)
    expected = finished(layer, o, x)
    close(layer(x), expected)
    close(layer.naive(x), expected)
    close(in_pieces(layer, x), expected)


# The short convolution


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("split", [[TIME], [1, 1, 1, 20, 2, 1, 27], [1] * TIME])
def test_a_short_convolution_is_a_convolution_padded_on_the_left(
    width: int, bias: bool, split: list[int]
) -> None:
    ours = redraw(ShortConvolution(D_MODEL, width, bias=bias))
    theirs = nn.Conv1d(D_MODEL, D_MODEL, width, groups=D_MODEL, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, past, ys = text(), torch.zeros(BATCH, *ours.past_shape), []
    for piece in x.split(split, dim=1):
        y, past = ours.run(piece, past)
        ys.append(y)
    close(torch.cat(ys, dim=1), theirs(F.pad(x.mT, (width - 1, 0))).mT, 2e-6)


def test_a_short_convolution_is_mambas() -> None:
    mixer = MambaMixer(MambaConfig(hidden_size=D_MODEL, expand=1, conv_kernel=4), layer_idx=0)
    ours = ShortConvolution(D_MODEL, 4, bias=True)
    ours.load_state_dict(redraw(mixer).conv1d.state_dict())
    x, weight = text(), ours.weight[:, 0]
    y, past = ours.run(x[:, :30], torch.zeros(BATCH, *ours.past_shape))
    close(y, causal_conv1d_fn(x[:, :30].mT, weight, ours.bias).mT, 2e-6)
    conv_state = x[:, 26:30].mT.clone()
    for t in range(30, TIME):
        token = x[:, t : t + 1]
        y, past = ours.run(token, past)
        close(y, causal_conv1d_update(token.mT, conv_state, weight, ours.bias).mT, 2e-6)
        assert torch.equal(past, conv_state[..., 1:].mT)
