"""The delta rule against transformers' Qwen3-Next: the rule by both of its functions, and the whole layer.

Their functions take heads after time, divide queries by √K, and normalise keys and queries if told to.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_tools import close, draw, redraw
from torch import Tensor
from transformers import OlmoHybridConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from kvlearn.attention.delta import DeltaNet, GatedDeltaNet, delta_rule
from kvlearn.attention.recurrent import l2_normalize

BATCH, HEADS, TIME, K, V = 2, 3, 70, 16, 12
WIDTH, VALUE_HEADS, KEY_HEADS = 32, 6, 2

every_form = pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])


def theirs(
    rule: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rule as one of their functions gives it, in our order of dimensions; they normalise q and k."""
    function = {"chunk": torch_chunk_gated_delta_rule, "recurrent": torch_recurrent_gated_delta_rule}[rule]
    out, last = function(
        *(x.transpose(1, 2) for x in (q, k, v)),
        g=log_decay.transpose(1, 2),
        beta=beta.transpose(1, 2),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out.transpose(1, 2), last


@every_form
@pytest.mark.parametrize("rule", ["chunk", "recurrent"])
@pytest.mark.parametrize("decays", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("after", [True, False], ids=["after a state", "from the start"])
def test_the_rule_is_theirs(form: str, rule: str, decays: bool, after: bool) -> None:
    q, k = draw(BATCH, HEADS, TIME, K), draw(BATCH, HEADS, TIME, K, seed=1)
    v, beta = draw(BATCH, HEADS, TIME, V, seed=2), draw(BATCH, HEADS, TIME, seed=3).sigmoid()
    log_decay = -F.softplus(draw(BATCH, HEADS, TIME, seed=4)) if decays else None
    state = draw(BATCH, HEADS, K, V, seed=5) if after else None
    out, last = delta_rule(
        l2_normalize(q) * K**-0.5, l2_normalize(k), v, beta, log_decay, state, form=form, chunk=16
    )
    expected = theirs(rule, q, k, v, beta, torch.zeros_like(beta) if log_decay is None else log_decay, state)
    close(out, expected[0])
    close(last, expected[1])


@every_form
@pytest.mark.parametrize("decays", [True, False], ids=["gated", "ungated"])
def test_the_rule_in_float64_is_the_equation_with_matrices(form: str, decays: bool) -> None:
    """S_t = a_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, written as matrices multiply."""
    q, k = draw(HEADS, TIME, K).double(), l2_normalize(draw(HEADS, TIME, K, seed=1).double())
    v, beta = draw(HEADS, TIME, V, seed=2).double(), 2 * draw(HEADS, TIME, seed=3).double().sigmoid()
    log_decay = -F.softplus(draw(HEADS, TIME, seed=4).double())
    out, last = delta_rule(
        *(x[None] for x in (q, k, v, beta)), log_decay[None] if decays else None, form=form, chunk=16
    )
    for head in range(HEADS):
        state = torch.zeros(K, V, dtype=torch.float64)
        for t in range(TIME):
            key, fade = k[head, t], log_decay[head, t].exp() if decays else 1.0
            erase = torch.eye(K, dtype=torch.float64) - beta[head, t] * torch.outer(key, key)
            state = fade * erase @ state + beta[head, t] * torch.outer(key, v[head, t])
            torch.testing.assert_close(out[0, head, t], state.T @ q[head, t], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(last[0, head], state, atol=1e-11, rtol=1e-11)


def their_layer(key_heads: int) -> tuple[Qwen3NextConfig, Qwen3NextGatedDeltaNet]:
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=VALUE_HEADS,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
    )
    layer = redraw(Qwen3NextGatedDeltaNet(config, 0))
    with torch.no_grad():
        layer.A_log -= 2  # heads that keep more than one token
    return config, layer


def with_their_weights(layer: Qwen3NextGatedDeltaNet) -> GatedDeltaNet:
    """Ours with the same weights; theirs lie by key head: q, k, the values it serves, their gates."""
    ours = GatedDeltaNet(
        WIDTH, VALUE_HEADS, head_dim=V, key_dim=K, n_key_heads=layer.num_k_heads, conv=4
    ).eval()
    served = VALUE_HEADS // layer.num_k_heads
    by_head = layer.in_proj_qkvz.weight.unflatten(0, (layer.num_k_heads, -1))
    rows = by_head.split([K, K, served * V, served * V], dim=1)
    b, a = layer.in_proj_ba.weight.unflatten(0, (layer.num_k_heads, -1)).split([served, served], dim=1)
    weights = zip(("q", "k", "v", "g", "b", "a"), (*rows, b, a), strict=True)
    same = {f"{name}_proj.weight": rows.flatten(0, 1) for name, rows in weights}
    same |= {
        "conv.weight": layer.conv1d.weight,
        "norm.weight": layer.norm.weight,
        "o_proj.weight": layer.out_proj.weight,
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
    }
    ours.load_state_dict(same)
    return ours


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [KEY_HEADS, VALUE_HEADS])
def test_the_layer_is_qwen3_nexts(key_heads: int) -> None:
    _, layer = their_layer(key_heads)
    x = draw(BATCH, 150, WIDTH)
    expected = layer(x)
    assert expected.std() > 0.1
    close(with_their_weights(layer)(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [KEY_HEADS, VALUE_HEADS])
@pytest.mark.parametrize("prompt", [1, 2, 11])
def test_the_layer_decodes_as_qwen3_nexts(key_heads: int, prompt: int) -> None:
    """A prompt, shorter than the convolution too, then token by token, each by its own cache."""
    config, layer = their_layer(key_heads)
    ours = with_their_weights(layer)
    x = draw(BATCH, 20, WIDTH)
    cache, their_cache = ours.new_cache(BATCH, 20), DynamicCache(config=config)
    for part in (x[:, :prompt], *x[:, prompt:].split(1, dim=1)):
        close(ours(part, cache), layer(part, cache_params=their_cache))
    last = their_cache.get_recurrent_state(0, state_idx=0)
    close(cache.state["memory"], last)
    past = their_cache.get_conv_state(0, state_idx=0)
    close(cache.state["past"], past[..., -3:].mT)


@torch.no_grad()
def test_the_ungated_layer_is_their_rule_without_decay_between_projections() -> None:
    layer = redraw(DeltaNet(WIDTH, VALUE_HEADS, head_dim=V, key_dim=K))
    x = draw(BATCH, TIME, WIDTH)
    projected = torch.cat([p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=-1)
    past = F.conv1d(F.pad(projected.mT, (3, 0)), layer.conv.weight, groups=projected.shape[-1]).mT
    keys = VALUE_HEADS * K
    q, k, v = (
        part.unflatten(-1, (VALUE_HEADS, -1)).transpose(1, 2)
        for part in F.silu(past).split([keys, keys, VALUE_HEADS * V], dim=-1)
    )
    beta = layer.b_proj(x).sigmoid().mT
    heads = theirs("recurrent", q, k, v, beta, torch.zeros_like(beta), None)[0] * K**0.5  # q as it is
    normed = F.rms_norm(heads, (V,), layer.norm.weight, 1e-6).transpose(1, 2).flatten(2)
    close(layer(x), layer.o_proj(normed))


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True], ids=["beta to 1", "beta to 2"])
def test_negative_eigenvalues_are_olmo_hybrids(negative: bool) -> None:
    """In a pass, and token by token."""
    config = OlmoHybridConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=VALUE_HEADS,
        linear_num_key_heads=VALUE_HEADS,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_allow_neg_eigval=negative,
    )
    layer = redraw(OlmoHybridGatedDeltaNet(config, 0))
    layer.A_log -= 2
    beta_max = 2.0 if negative else 1.0
    ours = GatedDeltaNet(WIDTH, VALUE_HEADS, head_dim=V, key_dim=K, beta_max=beta_max, norm_eps=1e-5).eval()
    names = {"conv1d.weight": "conv.weight", "o_norm.weight": "norm.weight"}
    ours.load_state_dict({names.get(name, name): weight for name, weight in layer.state_dict().items()})
    x = draw(BATCH, 20, WIDTH)
    expected = layer(x)
    assert expected.std() > 0.1
    close(ours(x), expected)
    cache, their_cache = ours.new_cache(BATCH, 20), DynamicCache(config=config)
    for part in x.split(1, dim=1):
        close(ours(part, cache), layer(part, cache_params=their_cache))
