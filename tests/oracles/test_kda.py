"""Kimi delta attention against transformers' Kimi Linear: the rule by both of its functions, and the layer.

Their functions take heads after time, divide queries by √K, and normalise keys and queries if told to.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_tools import close, draw, redraw
from torch import Tensor
from transformers import KimiLinearConfig
from transformers.cache_utils import DynamicCache
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDeltaAttention,
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

from kvlearn.attention.delta import KimiDeltaAttention, generalised_delta_rule
from kvlearn.attention.recurrent import l2_normalize

BATCH, HEADS, TIME, D, WIDTH = 2, 3, 70, 16, 40


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])
@pytest.mark.parametrize("rule", [chunk_kimi_delta_attention, recurrent_kimi_delta_attention])
@pytest.mark.parametrize("after", [True, False], ids=["after a state", "from the start"])
def test_the_rule_is_theirs(form: str, rule, after: bool) -> None:  # type: ignore[no-untyped-def]
    q, k, v = (draw(BATCH, HEADS, TIME, D, seed=seed) for seed in (0, 1, 2))
    beta, log_decay = draw(BATCH, HEADS, TIME, seed=3).sigmoid(), -F.softplus(draw(BATCH, HEADS, TIME, D))
    state = draw(BATCH, HEADS, D, D, seed=5) if after else None
    expected, last = rule(
        *(x.transpose(1, 2) for x in (q, k, v)),
        g=log_decay.transpose(1, 2),
        beta=beta.transpose(1, 2),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    q, k = l2_normalize(q) * D**-0.5, l2_normalize(k)
    beta_k = beta[..., None] * k
    got = generalised_delta_rule(q, beta_k, v, log_decay.exp() * k, -beta_k, log_decay, state, form=form)
    close(got[0], expected.transpose(1, 2))
    close(got[1], last)


def their_layer() -> tuple[KimiLinearConfig, KimiLinearDeltaAttention]:
    config = KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        linear_num_heads=HEADS,
        linear_head_dim=D,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    layer = redraw(KimiLinearDeltaAttention(config, 0))
    with torch.no_grad():
        layer.forget_gate.A_log -= 3  # heads that keep more than one token
    return config, layer


def with_their_weights(layer: KimiLinearDeltaAttention) -> KimiDeltaAttention:
    ours = KimiDeltaAttention(WIDTH, HEADS, head_dim=D, norm_eps=1e-5).eval()
    names = {
        "conv1d": "conv",
        "forget_gate.f_a_proj": "decay_down",
        "forget_gate.f_b_proj": "decay_up",
        "forget_gate.": "",
        "g_a_proj": "gate_down",
        "g_b_proj": "gate_up",
        "o_norm": "norm",
    }
    weights: dict[str, Tensor] = {}
    for name, weight in layer.state_dict().items():
        theirs = next((start for start in names if name.startswith(start)), "")
        weights[names.get(theirs, "") + name.removeprefix(theirs)] = weight
    weights["A_log"] = weights["A_log"].flatten()
    ours.load_state_dict(weights)
    return ours


@torch.no_grad()
def test_the_layer_is_kimi_linears() -> None:
    _, layer = their_layer()
    x = draw(BATCH, 150, WIDTH)
    expected = layer(x)
    assert expected.std() > 0.1
    close(with_their_weights(layer)(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 2, 11])
def test_the_layer_decodes_as_kimi_linears(prompt: int) -> None:
    """A prompt, shorter than the convolution too, then token by token, each by its own cache."""
    config, layer = their_layer()
    ours = with_their_weights(layer)
    x = draw(BATCH, 20, WIDTH)
    cache, their_cache = ours.new_cache(BATCH, 20), DynamicCache(config=config)
    for part in (x[:, :prompt], *x[:, prompt:].split(1, dim=1)):
        close(ours(part, cache), layer(part, cache_params=their_cache))
    close(cache.state["memory"], their_cache.get_recurrent_state(0, state_idx=0))
    close(cache.state["past"], their_cache.get_conv_state(0, state_idx=0)[..., -3:].mT)
