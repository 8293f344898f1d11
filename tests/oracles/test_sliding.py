"""Sliding windows against transformers: Mistral whole, the attentions of Gemma 3 and of gpt-oss.

Their cache of a window keeps W - 1 tokens, since the next one brings its own key; our ring has a slot for
that one too, and keeps W.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    GptOssConfig,
    GptOssModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache

import kvlearn
from kvlearn.attention import (
    Cache,
    GroupedQueryAttention,
    RopeConfig,
    WindowAttention,
)
from kvlearn.attention.window import SlotCache
from kvlearn.model.families import rope

WINDOW, LENGTH = 7, 40
SPLITS = {
    "one pass": [LENGTH],
    "chunks, some longer than the window": [9, 4, 12, 1, 14],
    "prompt, then tokens": [23, *[1] * (LENGTH - 23)],
    "tokens": [1] * LENGTH,
}
every_split = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)


def redrawn(model: nn.Module, seed: int = 0) -> Any:
    """Every weight drawn anew: gains, biases and sinks too, which are all alike at first."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        around = 1.0 if weight.dim() == 1 and "norm" in name else 0.0
        nn.init.normal_(weight, mean=around, std=0.2 if weight.dim() > 1 else 0.5)
    return model.eval()


def prompt(batch: int = 2, time: int = LENGTH) -> Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    atol = 2e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)


def mistral(window: int | None = WINDOW, n_kv_heads: int = 2, **options: Any) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=n_kv_heads,
        head_dim=16,
        sliding_window=window,
        **options,
    )
    return redrawn(MistralForCausalLM(config))


def same_tokens_as_theirs(cache: Cache, theirs: Any, tokens: int) -> None:
    """Of our ring the last W - 1 tokens, in the order of their positions."""
    assert isinstance(cache, SlotCache)
    order = cache.slot_positions[0].argsort()[-min(tokens, WINDOW - 1) :]
    assert cache.slot_positions[0, order].tolist() == list(range(max(tokens - WINDOW + 1, 0), tokens))
    close(cache.k[:, :, order], theirs.keys)
    close(cache.v[:, :, order], theirs.values)
    assert theirs.keys.shape[2] == WINDOW - 1
    assert cache.nbytes * (WINDOW - 1) == (theirs.keys.nbytes + theirs.values.nbytes) * WINDOW


@every_split
@pytest.mark.parametrize("n_kv_heads", [6, 2])
@torch.no_grad()
def test_the_same_weights_give_mistrals_logits(split: list[int], n_kv_heads: int) -> None:
    theirs, tokens = mistral(n_kv_heads=n_kv_heads), prompt()
    ours = kvlearn.from_transformers(theirs)
    assert [mixer.name for mixer in ours.mixers] == 3 * ["window"]
    cache, their_cache = ours.new_cache(2, LENGTH), DynamicCache(config=theirs.config)
    whole = theirs(tokens, use_cache=False).logits
    close(ours(tokens), whole)
    for piece, part in zip(tokens.split(split, dim=1), whole.split(split, dim=1), strict=True):
        expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
        close(expected, part)
        close(ours(piece, cache), expected)
    for layer, their_layer in zip(cache.layers, their_cache.layers, strict=True):
        same_tokens_as_theirs(layer, their_layer, LENGTH)


@pytest.mark.parametrize("chunk", [None, 5, 11])
def test_greedy_generation_is_mistrals_far_past_the_window(chunk: int | None) -> None:
    theirs, tokens = mistral(), prompt(1, 12)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=45, do_sample=False, eos_token_id=None
    )
    assert len(expected[0].unique()) > 5  # not one token over and over
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 45, chunk=chunk, stop=()), expected)


@pytest.mark.parametrize(("n_kv_heads", "name"), [(6, "full"), (2, "gqa")])
@torch.no_grad()
def test_a_mistral_without_a_window_is_a_llama(n_kv_heads: int, name: str) -> None:
    theirs = mistral(window=None, n_kv_heads=n_kv_heads)
    ours = kvlearn.from_transformers(theirs)
    assert {mixer.name for mixer in ours.mixers} == {name}
    close(ours(prompt()), theirs(prompt()).logits)


@torch.no_grad()
def test_a_mistral_is_loaded_from_its_folder(tmp_path: object) -> None:
    theirs = mistral(tie_word_embeddings=True, rms_norm_eps=1e-2)
    theirs.save_pretrained(tmp_path)
    close(kvlearn.from_transformers(tmp_path)(prompt()), theirs(prompt()).logits)


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor is missing"),
        ({"sliding_window": 0}, "config: sliding_window=0"),
    ],
)
def test_what_our_mistral_lacks_is_refused_by_name(option: dict[str, Any], names: str) -> None:
    theirs = mistral()
    for name, value in option.items():
        setattr(theirs.config, name, value)
    with pytest.raises(ValueError, match=names):
        kvlearn.from_transformers(theirs)


class Recorded(dict[int, list[tuple[Tensor, Tensor]]]):
    """Inputs and outputs of each attention of a model of theirs, pass by pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__({i: [] for i in range(len(model.layers))})
        for i, layer in enumerate(model.layers):
            layer.self_attn.register_forward_hook(self.hook(i), with_kwargs=True)

    def hook(self, i: int) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
            self[i].append((args[0] if args else kwargs["hidden_states"], out[0]))

        return record


def follow(
    model: PreTrainedModel, layers: list[GroupedQueryAttention | WindowAttention], split: list[int]
) -> None:
    """Each attention of ``model``, cut like this, by ours on the same inputs; both caches at the end."""
    recorded, their_cache = Recorded(model), DynamicCache(config=model.config)
    for piece in prompt().split(split, dim=1):
        model(piece, past_key_values=their_cache, use_cache=True)
    for i, layer in enumerate(layers):
        cache, theirs = layer.new_cache(2, LENGTH), their_cache.layers[i]
        for x, expected in recorded[i]:
            close(layer(x, cache), expected)
        close(layer(torch.cat([x for x, _ in recorded[i]], 1)), torch.cat([out for _, out in recorded[i]], 1))
        if model.config.layer_types[i] == "sliding_attention":
            same_tokens_as_theirs(cache, theirs, LENGTH)
        else:
            close(cache.tensors()[0], theirs.keys)
            assert cache.nbytes == theirs.keys.nbytes + theirs.values.nbytes


N_HEADS, N_KV_HEADS, HEAD_DIM, D_MODEL = 6, 2, 8, 24
SHAPE = {"n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM}


def gemma() -> Gemma3TextModel:
    """Seven layers, the sixth of which is global, and rotates by other angles."""
    config = Gemma3TextConfig(
        vocab_size=61,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=7,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=5,
        sliding_window=WINDOW,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    model = redrawn(Gemma3TextModel(config))
    assert model.config.layer_types == 5 * ["sliding_attention"] + ["full_attention", "sliding_attention"]
    return model


class HeadNorm(nn.Module):
    """RMSNorm of every head, after its projection, times ``factor``; its gain counts from 1."""

    def __init__(self, theirs: Any, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps, self.factor = theirs.weight, theirs.eps, factor

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, HEAD_DIM))
        return F.rms_norm(heads, (HEAD_DIM,), 1 + self.weight, self.eps).flatten(-2) * self.factor


def like_gemma(
    model: Gemma3TextModel, i: int, window: int = WINDOW
) -> GroupedQueryAttention | WindowAttention:
    """Ours with layer i's weights. Theirs divides scores by √scalar, ours by √D: queries make up for it."""
    theirs, config = model.layers[i].self_attn, model.config
    kind = config.layer_types[i]
    rope_config: RopeConfig = rope(config.rope_parameters[kind])
    layer: GroupedQueryAttention | WindowAttention = (
        WindowAttention(D_MODEL, N_HEADS, window=window, rope=rope_config, **SHAPE)
        if kind == "sliding_attention"
        else GroupedQueryAttention(D_MODEL, N_HEADS, rope=rope_config, **SHAPE)
    )
    factor = (HEAD_DIM / config.query_pre_attn_scalar) ** 0.5
    layer.q_proj = nn.Sequential(theirs.q_proj, HeadNorm(theirs.q_norm, factor))  # type: ignore[assignment]
    layer.k_proj = nn.Sequential(theirs.k_proj, HeadNorm(theirs.k_norm))  # type: ignore[assignment]
    layer.v_proj, layer.o_proj = theirs.v_proj, theirs.o_proj
    return layer


@every_split
@torch.no_grad()
def test_local_and_global_layers_attend_as_in_gemma_3(split: list[int]) -> None:
    model = gemma()
    follow(model, [like_gemma(model, i) for i in range(7)], split)


def gpt_oss() -> GptOssModel:
    """Every other layer has a window; every head has a sink logit, every projection a bias."""
    config = GptOssConfig(
        vocab_size=61,
        hidden_size=D_MODEL,
        intermediate_size=16,
        num_hidden_layers=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        sliding_window=WINDOW,
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        attn_implementation="eager",
    )
    model = redrawn(GptOssModel(config))
    assert model.config._attn_implementation == "eager"
    assert model.config.layer_types == 2 * ["sliding_attention", "full_attention"]
    return model


def like_gpt_oss(
    model: GptOssModel, i: int, window: int = WINDOW, sink_logits: bool = True
) -> WindowAttention:
    """Ours with layer i's weights; a full layer is a window longer than the text."""
    theirs, config = model.layers[i].self_attn, model.config
    size = window if config.layer_types[i] == "sliding_attention" else LENGTH
    rope_config = rope(config.rope_parameters)
    layer = WindowAttention(D_MODEL, N_HEADS, window=size, sink_logits=sink_logits, rope=rope_config, **SHAPE)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert getattr(theirs, name).bias is not None
        setattr(layer, name, getattr(theirs, name))
    if sink_logits:
        layer.sink_logits = theirs.sinks
    return layer


@every_split
@torch.no_grad()
def test_windows_with_sinks_attend_as_in_gpt_oss(split: list[int]) -> None:
    model = gpt_oss()
    follow(model, [like_gpt_oss(model, i) for i in range(4)], split)


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
@torch.no_grad()
def test_a_window_that_is_off_by_one_would_be_detected(window: int) -> None:
    """The tests above can fail: until the window is full all is well, from then on nothing."""
    theirs = mistral()
    ours = kvlearn.from_transformers(theirs)
    for mixer in ours.mixers:
        mixer.window = window  # type: ignore[assignment]
    error = (ours(prompt()) - theirs(prompt()).logits).abs().amax((0, 2))
    same = min(window, WINDOW)
    assert (error[:same] < 1e-4).all()
    assert (error[same:] > 1e-2).all()
    model = gemma()
    recorded = Recorded(model)
    model(prompt())
    for i in (0, 4, 6):
        x, expected = recorded[i][0]
        error = (like_gemma(model, i, window)(x) - expected).abs().amax((0, 2))
        assert (error[:same] < 1e-4).all()
        assert (error[same:] > 1e-3).all()


@torch.no_grad()
def test_a_sink_that_is_left_out_would_be_detected() -> None:
    model = gpt_oss()
    recorded = Recorded(model)
    model(prompt())
    for i in range(4):
        x, expected = recorded[i][0]
        close(like_gpt_oss(model, i)(x), expected)
        without = (like_gpt_oss(model, i, sink_logits=False)(x) - expected).abs().amax((0, 2))
        assert (without > 1e-3).all()


@torch.no_grad()
def test_the_other_layers_angles_would_be_detected() -> None:
    model = gemma()
    recorded = Recorded(model)
    model(prompt())
    for i, other in ((4, "full_attention"), (5, "sliding_attention")):
        layer, (x, expected) = like_gemma(model, i), recorded[i][0]
        close(layer(x), expected)
        layer.rope = type(layer.rope)(HEAD_DIM, rope(model.config.rope_parameters[other]))  # type: ignore[misc, union-attr]
        assert (layer(x) - expected).abs().max() > 1e-2
