"""MLA against transformers' DeepSeek-V2 and V3, which cache the latent and decompress it.

So our absorbed path is compared with an implementation that has none.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import DynamicCache

import kvlearn
from kvlearn.attention import LatentCache, MultiHeadLatentAttention
from kvlearn.model import Decoder, half_split, interleave
from kvlearn.model.deepseek import DEEPSEEK

HEADS, ROPE_DIM, RANK, TIME = 3, 8, 20, 14
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": YARN,
    "yarn, mscale": {**YARN, "mscale": 0.7},
    "yarn, mscale_all_dim": {**YARN, "mscale_all_dim": 0.8},
    "yarn, both mscales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, attention_factor": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 1.1},
}
KINDS = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM, {}),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM, {"rope_interleave": True}),
    "v3 half-split": (DeepseekV3Config, DeepseekV3ForCausalLM, {"rope_interleave": False}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
either_query = pytest.mark.parametrize("q_rank", [None, 16])


def deepseek(
    kind: str = "v3", q_rank: int | None = 16, rope: str = "default", seed: int = 0, **options: Any
) -> Any:
    """A tiny DeepSeek, every weight of which is drawn anew: gains too, which are all ones at first."""
    torch.manual_seed(seed)
    config_class, model_class, own = KINDS[kind]
    config = config_class(
        **{
            "vocab_size": 61,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "kv_lora_rank": RANK,
            "q_lora_rank": q_rank,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": ROPE_DIM,
            "v_head_dim": 12,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "rope_parameters": dict(ROPES[rope]),
            **own,
            **options,
        }
    )
    model = model_class(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.2)
    return model


def take(absorb: bool | None, ours: Decoder) -> Decoder:
    """``ours`` with every layer on one path."""
    for mixer in ours.mixers:
        assert isinstance(mixer, MultiHeadLatentAttention)
        mixer.absorb = absorb
    return ours


def prompt(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(1))


def hidden(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, TIME, 48, generator=torch.Generator().manual_seed(2)).to(dtype)


def their_attention(theirs: Any, x: Tensor, first: int = 0, cache: DynamicCache | None = None) -> Tensor:
    """The first layer's attention alone, of tokens at positions ``first`` and after it."""
    positions = torch.arange(first, first + x.shape[1])[None]
    mask = torch.full((x.shape[1], first + x.shape[1]), -torch.inf, dtype=x.dtype).triu(first + 1)
    rotary = theirs.model.rotary_emb(x, positions)
    layer = theirs.model.layers[0].self_attn
    return layer(x, position_embeddings=rotary, attention_mask=mask[None, None], past_key_values=cache)[0]


@every_kind
@either_query
@pytest.mark.parametrize("absorb", [False, True])
def test_the_same_weights_give_deepseeks_attention(kind: str, q_rank: int | None, absorb: bool) -> None:
    theirs, x = deepseek(kind, q_rank), hidden()
    ours = take(absorb, kvlearn.from_transformers(theirs)).mixers[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), their_attention(theirs, x), atol=1e-5, rtol=1e-5)


@every_kind
@either_query
@pytest.mark.parametrize("absorb", [None, False, True])
def test_prefill_chunks_and_single_tokens_follow_deepseeks_cache(
    kind: str, q_rank: int | None, absorb: bool | None
) -> None:
    theirs, x = deepseek(kind, q_rank), hidden()
    ours = take(absorb, kvlearn.from_transformers(theirs)).mixers[0]
    cache, their_cache, first = ours.new_cache(2, TIME), DynamicCache(config=theirs.config), 0
    with torch.no_grad():
        for piece in (x[:, :5], x[:, 5:9], *x[:, 9:].split(1, dim=1)):
            expected = their_attention(theirs, piece, first, their_cache)
            torch.testing.assert_close(ours(piece, cache), expected, atol=1e-5, rtol=1e-5)
            first += piece.shape[1]
    assert isinstance(cache, LatentCache)
    their_layer = their_cache.layers[0]
    torch.testing.assert_close(cache.latents[..., :RANK], their_layer.keys[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["v3", "v3 half-split"])
@pytest.mark.parametrize("absorb", [False, True])
def test_in_double_precision_nothing_but_rounding_differs(kind: str, absorb: bool) -> None:
    """RoPE's angles are theirs in fp32, hence 1e-6. (V2 rotates in fp32 altogether.)"""
    theirs, x = deepseek(kind).double(), hidden(torch.float64)
    ours = take(absorb, kvlearn.from_transformers(theirs)).mixers[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), their_attention(theirs, x), atol=1e-6, rtol=1e-6)


@every_kind
@pytest.mark.parametrize("rope", ROPES)
def test_the_same_weights_give_deepseeks_logits(kind: str, rope: str) -> None:
    theirs = deepseek(kind, rope=rope)
    ours, tokens = kvlearn.from_transformers(theirs), prompt(time=40)
    cache = ours.new_cache(2, 40)
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=3e-5, rtol=1e-4)
        pieces = [ours(piece, cache) for piece in (tokens[:, :30], *tokens[:, 30:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=3e-5, rtol=1e-4)


def test_a_deepseek_may_share_its_embedding_with_its_output() -> None:
    theirs = deepseek(tie_word_embeddings=True)
    ours = kvlearn.from_transformers(theirs)
    assert ours.config.tied
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt()), theirs(prompt()).logits, atol=3e-5, rtol=1e-4)


@every_kind
@either_query
def test_greedy_generation_is_deepseeks(kind: str, q_rank: int | None) -> None:
    theirs, tokens = deepseek(kind, q_rank), prompt(1, 12)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 16, stop=()), expected)


@every_kind
@either_query
def test_weights_go_back_to_deepseek(kind: str, q_rank: int | None) -> None:
    """``interleave`` undoes the one thing that loading changes."""
    theirs = deepseek(kind, q_rank)
    weights, back = kvlearn.from_transformers(theirs).state_dict(), {}
    for name in theirs.state_dict():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        tensor = weights[DEEPSEEK[name.replace(f".{layer}.", ".{}.") if layer else name].format(layer)]
        if kind != "v3 half-split" and name.endswith(("q_proj.weight", "q_b_proj.weight")):
            tensor = interleave(tensor, ROPE_DIM, HEADS)
        elif kind != "v3 half-split" and "kv_a_proj" in name:
            tensor = interleave(tensor, ROPE_DIM)
        back[name] = tensor
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name], tensor), name
    other = deepseek(kind, q_rank, seed=1)
    other.load_state_dict(back)
    with torch.no_grad():
        assert torch.equal(other(prompt()).logits, theirs(prompt()).logits)


def test_half_split_puts_even_rows_before_odd_ones() -> None:
    rows = torch.arange(14.0)[:, None]
    assert half_split(rows, 4, n_heads=2).flatten().tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13]
    assert half_split(rows, 6).flatten().tolist() == [*range(8), 8, 10, 12, 9, 11, 13]
    assert torch.equal(interleave(half_split(rows, 6), 6), rows)
    with pytest.raises(ValueError, match="n_heads"):
        half_split(rows, 4, n_heads=3)
    with pytest.raises(ValueError, match="rope_dim"):
        half_split(rows, 8, n_heads=2)


def test_a_deepseek_is_loaded_from_its_folder(tmp_path: object) -> None:
    theirs = deepseek(rope="yarn, both mscales")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = kvlearn.from_transformers(tmp_path)
        torch.testing.assert_close(ours(prompt()), theirs(prompt()).logits, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_our_decoder_lacks_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        kvlearn.from_transformers(deepseek(**options))


def test_mscale_without_yarn_is_refused_by_name() -> None:
    theirs = deepseek(rope="linear")
    theirs.config.rope_parameters["mscale_all_dim"] = 0.8
    with pytest.raises(ValueError, match="mscale_all_dim"):
        kvlearn.from_transformers(theirs)
