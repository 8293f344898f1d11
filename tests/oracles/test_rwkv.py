"""RWKV-4 against transformers', as a whole model; RWKV-7 against its paper's equations in a plain loop."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import close, draw
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

import kvlearn
from kvlearn.attention import Rwkv7

LAYERS, TIME = 4, 40


def their_model(**options: Any) -> RwkvForCausalLM:
    """A tiny RWKV-4 with every weight drawn anew, decays and mixes too."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": LAYERS, "intermediate_size": 48}
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**{**sizes, **options})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "time_mix" in name:
                weight.uniform_()
            elif weight.dim() > 1:
                weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
            else:
                weight.normal_(mean=float(name.endswith("weight")), std=0.5)
    return model


def some_tokens(batch: int) -> Tensor:
    return torch.randint(61, (batch, TIME), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_rwkv4_gives_the_same_logits(tied: bool) -> None:
    model = their_model(tie_word_embeddings=tied, rescale_every=0)
    tokens = some_tokens(2)
    expected = model(tokens, use_cache=False).logits
    assert expected.std() > 0.5
    close(kvlearn.from_transformers(model)(tokens), expected, 1e-4)


@torch.no_grad()
def test_rwkv4_decodes_as_theirs_token_by_token() -> None:
    """From logits to every part of every state. Theirs cannot decode a batch of more than one."""
    model = their_model(rescale_every=0)
    ours, tokens = kvlearn.from_transformers(model), some_tokens(1)
    cache, state = ours.new_cache(1, TIME), None
    for part in (tokens[:, :7], *tokens[:, 7:].split(1, dim=1)):
        theirs = model(part, state=state, use_cache=True)
        state = theirs.state
        close(ours(part, cache), theirs.logits, 1e-4)
    for layer in range(LAYERS):
        time_mix, channel_mix = (c.state for c in cache.layers[2 * layer : 2 * layer + 2])  # type: ignore[attr-defined]
        close(channel_mix["last"], state[0][:, :, layer], 1e-4)
        for i, name in enumerate(("last", "num", "den", "top"), start=1):
            close(time_mix[name], state[i][:, :, layer], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 6])
@pytest.mark.parametrize("when", ["before a forward", "after one", "in training after one"])
def test_weights_that_theirs_has_divided_come_back_whole(every: int, when: str) -> None:
    """Their first forward in evaluation divides weights in place, which only a flag tells."""
    model = their_model(rescale_every=every)
    trained = {name: weight.clone() for name, weight in model.named_parameters()}
    tokens = some_tokens(2)
    expected = model(tokens, use_cache=False).logits
    if when == "before a forward":
        model.train()(tokens)
        assert not model.rwkv.layers_are_rescaled
        model.eval()
    elif when == "in training after one":
        model.train()
    ours = kvlearn.from_transformers(model)
    for layer in range(LAYERS):
        weight = ours.blocks[2 * layer].mixer.o_proj.weight  # type: ignore[union-attr]
        assert torch.equal(weight, trained[f"rwkv.blocks.{layer}.attention.output.weight"])
    # They halve the residual stream as often, so that the eps of a norm weighs up to 4³ times as much.
    close(ours(tokens), expected, 1e-3 if every == 1 else 1e-4)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"attention_hidden_size": 64}, "attention_hidden_size"),
    ],
)
def test_an_rwkv4_of_another_shape_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=f"config: {names}="):
        kvlearn.from_transformers(their_model(**options))


@torch.no_grad()
def test_an_rwkv4_generates() -> None:
    ours, prompt = kvlearn.from_transformers(their_model(rescale_every=0)), some_tokens(2)[:, :5]
    new = ours.generate(prompt, 6)[:, 5:]
    for i in range(6):
        whole = ours(torch.cat((prompt, new[:, :i]), dim=1))
        assert torch.equal(whole[:, -1].argmax(-1), new[:, i])


@torch.no_grad()
def test_rwkv7_is_the_papers_equations() -> None:
    """Head by head and token by token in float64, with states of values by keys, as the paper writes them."""
    H, D, M, T = 3, 8, 24, 19
    layer = Rwkv7(M, H, head_dim=D, rank=5).double().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * spread)
    x = draw(1, T, M).double()
    p = dict(layer.named_parameters())
    state = torch.zeros(H, D, D, dtype=torch.float64)
    previous = torch.zeros(M, dtype=torch.float64)
    for t in range(T):
        now = x[0, t]
        xr, xw, xk, xv, xa, xg = (torch.lerp(now, previous, mu) for mu in p["time_mix"])
        r, k, v = (p[f"{n}_proj.weight"] @ z for n, z in (("r", xr), ("k", xk), ("v", xv)))
        d = p["decay_up.weight"] @ torch.tanh(p["decay_down.weight"] @ xw) + p["decay_up.bias"]
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(d))
        a = torch.sigmoid(p["rate_up.weight"] @ (p["rate_down.weight"] @ xa) + p["rate_up.bias"])
        g = p["gate_up.weight"] @ torch.sigmoid(p["gate_down.weight"] @ xg)
        kappa, key = k * p["removal_scale"], k * (1 - p["rate_in_key"] + a * p["rate_in_key"])
        heads = []
        for h in range(H):
            one = slice(h * D, (h + 1) * D)
            unit = kappa[one] / kappa[one].norm()
            transition = torch.diag(w[one]) - torch.outer(unit, a[one] * unit)
            state[h] = state[h] @ transition + torch.outer(v[one], key[one])
            read = F.layer_norm(state[h] @ r[one], (D,), p["norm.weight"][one], p["norm.bias"][one], D * 1e-5)
            heads.append(read + (r[one] * p["bonus"][one] * key[one]).sum() * v[one])
        expected = p["o_proj.weight"] @ (g * torch.cat(heads))
        torch.testing.assert_close(layer(x)[0, t], expected, atol=1e-10, rtol=1e-10)
        previous = now
