"""Mamba and Mamba-2 against transformers: the same weights, the same numbers; the scan against NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import kvlearn
from kvlearn.attention import StateCache
from kvlearn.attention.mamba import selective_scan
from kvlearn.model import Decoder
from kvlearn.model.state_space import MAMBA, MAMBA2

TIME, VOCABULARY = 21, 61
MAMBAS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "no convolution bias": {"use_conv_bias": False},
    "other sizes": {"expand": 3, "state_size": 7, "conv_kernel": 3, "time_step_rank": 5},
    "an output matrix of its own": {"tie_word_embeddings": False},
}
MAMBA2S: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "two groups": {"n_groups": 2},
    "a group per head": {"n_groups": 6},
    "no convolution bias 2": {"use_conv_bias": False, "n_groups": 3},
    "other sizes 2": {"expand": 3, "num_heads": 9, "state_size": 7, "conv_kernel": 2, "chunk_size": 5},
    "one weight in and out": {"tie_word_embeddings": True},
    "another epsilon": {"layer_norm_epsilon": 0.3, "n_groups": 2},
}
every_model = pytest.mark.parametrize("kind", [*MAMBAS, *MAMBA2S])


def redrawn(model: Any, seed: int = 0) -> Any:
    """Every weight anew, vectors too; rates and steps such that states neither vanish nor stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        if name.endswith("A_log"):
            drawn = drawn * 0.7
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            drawn = drawn * 0.7 - 1.5
        elif weight.dim() > 1:
            drawn = drawn * 1.5 * weight.shape[-1] ** -0.5
        else:
            drawn = drawn * 0.5 + 1
        weight.data = drawn
    return model.eval()


def theirs_of(kind: str, seed: int = 0, **options: Any) -> Any:
    common = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 8}
    if kind in MAMBAS:
        return redrawn(MambaForCausalLM(MambaConfig(**common | MAMBAS[kind] | options)), seed)
    heads = {"num_heads": 6, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    return redrawn(Mamba2ForCausalLM(Mamba2Config(**common | heads | MAMBA2S[kind] | options)), seed)


def prompt(batch: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, TIME), generator=torch.Generator().manual_seed(1))


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def with_form(ours: Decoder, form: str, chunk: int = 64) -> Decoder:
    for mixer in ours.mixers:
        mixer.form, mixer.chunk = form, chunk  # type: ignore[assignment]
    return ours


@every_model
def test_the_same_weights_give_their_logits(kind: str) -> None:
    theirs = theirs_of(kind)
    ours = kvlearn.from_transformers(theirs)
    with torch.no_grad():
        expected = theirs(prompt()).logits
        assert expected.std() > 0.5
        for form, chunk in (("chunked", 64), ("chunked", 4), ("recurrent", 1)):
            same(with_form(ours, form, chunk)(prompt()), expected)


@every_model
def test_token_by_token_the_cache_follows_their_pass_and_their_cache(kind: str) -> None:
    theirs, tokens = theirs_of(kind), prompt()
    ours = kvlearn.from_transformers(theirs)
    cache, their_cache = ours.new_cache(2, TIME), None
    with torch.no_grad():
        whole = theirs(tokens).logits
        for t, token in enumerate(tokens.split(1, dim=1)):
            step = theirs(token, cache_params=their_cache, use_cache=True)
            their_cache = step.cache_params
            logits = ours(token, cache)
            same(logits, step.logits)
            same(logits[:, 0], whole[:, t])


@every_model
def test_prefill_and_chunks_follow_their_pass_and_leave_their_state(kind: str) -> None:
    """The first chunk is shorter than the convolution. (Their Mamba forgets its state before a chunk.)"""
    theirs, tokens = theirs_of(kind), prompt()
    ours = with_form(kvlearn.from_transformers(theirs), "chunked", 4)
    cache = ours.new_cache(2, TIME)
    with torch.no_grad():
        whole = theirs(tokens, use_cache=True)
        same(
            torch.cat([ours(piece, cache) for piece in tokens.split((1, 11, 9), dim=1)], dim=1), whole.logits
        )
    for n, layer in enumerate(cache.layers):
        assert isinstance(layer, StateCache)
        memory = layer.state["memory"]
        their_state = whole.cache_params.get_recurrent_state(n, state_idx=0)
        same(memory if kind in MAMBAS else memory.mT, their_state)


@every_model
def test_after_their_prefill_both_decode_alike(kind: str) -> None:
    theirs, tokens = theirs_of(kind), prompt(1)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 12, stop=()), expected)


@every_model
def test_weights_go_back_to_them(kind: str) -> None:
    theirs, names = theirs_of(kind), MAMBA if kind in MAMBAS else MAMBA2
    weights, back = kvlearn.from_transformers(theirs).state_dict(), {}
    for name in theirs.state_dict():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        back[name] = weights[names[name.replace(f".{layer}.", ".{}.") if layer else name].format(layer)]
    other = theirs_of(kind, seed=1)
    other.load_state_dict(back)
    with torch.no_grad():
        assert torch.equal(other(prompt()).logits, theirs(prompt()).logits)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_models_are_loaded_from_their_folders(kind: str, tmp_path: object) -> None:
    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        same(kvlearn.from_transformers(tmp_path)(prompt()), theirs(prompt()).logits)


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("mamba", {"use_bias": True}, "use_bias"),
        ("mamba2", {"use_bias": True}, "use_bias"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_unsupported_options_are_refused_by_name(kind: str, options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        kvlearn.from_transformers(theirs_of(kind, **options))


@pytest.mark.parametrize("limits", [(0.0, 0.2), (0.3, float("inf")), (0.1, 0.3)])
@torch.no_grad()
def test_the_limits_of_a_step_are_theirs(limits: tuple[float, float]) -> None:
    """In a pass over a sequence. (Their step of one token has no limits, ours has the same ones.)"""
    theirs, tokens = theirs_of("mamba2", time_step_limit=limits), prompt()
    ours, expected = kvlearn.from_transformers(theirs), theirs(tokens).logits
    assert (expected - theirs_of("mamba2")(tokens).logits).abs().max() > 1e-2
    cache = ours.new_cache(2, TIME)
    same(ours(tokens), expected)
    same(torch.cat([ours(token, cache) for token in tokens.split(1, dim=1)], dim=1), expected)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_the_scan_is_the_loop_over_arrays(form: str, chunk: int) -> None:
    """In double precision, every number by itself: no product of matrices, no broadcasting."""
    rng = np.random.default_rng(0)
    rows, time, E, N = 2, 13, 3, 4
    x, b, c = (rng.normal(size=(rows, time, n)) for n in (E, N, N))
    dt, A, D = rng.uniform(0, 2, (rows, time, E)), -rng.uniform(0, 2, (E, N)), rng.normal(size=E)
    start = rng.normal(size=(rows, E, N))
    h, y = start.copy(), np.zeros((rows, time, E))
    for row, t, e in np.ndindex(rows, time, E):
        y[row, t, e] = D[e] * x[row, t, e]
        for n in range(N):
            h[row, e, n] *= np.exp(dt[row, t, e] * A[e, n])
            h[row, e, n] += dt[row, t, e] * b[row, t, n] * x[row, t, e]
            y[row, t, e] += c[row, t, n] * h[row, e, n]
    inputs = [torch.from_numpy(array) for array in (x, dt, A, b, c, D, start)]
    got, state = selective_scan(*inputs, form=form, chunk=chunk)
    torch.testing.assert_close(got, torch.from_numpy(y), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, torch.from_numpy(h), atol=1e-12, rtol=1e-12)
