"""DeepSeek sparse attention against transformers' DeepSeek-V3.2, which masks what ours does not gather.

At least 16 index heads: with few, many scores are exactly 0, and which of equal tokens is selected is then
up to the implementation.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.cache_utils import DynamicCache

import kvlearn
from kvlearn.attention.dsa import DeepSeekSparseAttention, IndexedLatentCache
from kvlearn.model import half_split

HEADS, ROPE_DIM, RANK, TIME = 3, 8, 20, 24
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "yarn": YARN,
    "yarn, both mscales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
}
few_or_all = pytest.mark.parametrize("top_k", [1, 6, TIME + 9])


def deepseek(top_k: int = 6, rope: str = "default", **options: Any) -> Any:
    """A tiny DeepSeek-V3.2, every weight of which is drawn anew: gains and offsets too."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        **{
            "vocab_size": 61,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "kv_lora_rank": RANK,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": ROPE_DIM,
            "v_head_dim": 12,
            "index_topk": top_k,
            "index_n_heads": 16,
            "index_head_dim": 12,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "rope_parameters": dict(ROPES[rope]),
            **options,
        }
    )
    model = DeepseekV32ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1 and not name.endswith("bias")), std=0.2)
    return model


def first_layer(theirs: Any) -> DeepSeekSparseAttention:
    layer = kvlearn.from_transformers(theirs).mixers[0]
    assert isinstance(layer, DeepSeekSparseAttention)
    layer.block = 7  # no divisor of the lengths here
    return layer


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, TIME, 48, generator=torch.Generator().manual_seed(2)).to(dtype)


def their_arguments(theirs: Any, x: Tensor, first: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rotations and causal mask of tokens at positions ``first`` and after it."""
    positions = torch.arange(first, first + x.shape[1])[None]
    mask = torch.full((x.shape[1], first + x.shape[1]), -torch.inf, dtype=x.dtype).triu(first + 1)
    return theirs.model.rotary_emb(x, positions), mask.expand(len(x), 1, -1, -1)


def their_attention(theirs: Any, x: Tensor, first: int = 0, cache: DynamicCache | None = None) -> Tensor:
    rotary, mask = their_arguments(theirs, x, first)
    layer = theirs.model.layers[0].self_attn
    return layer(x, position_embeddings=rotary, attention_mask=mask, past_key_values=cache)[0]


@few_or_all
def test_the_same_weights_give_deepseeks_attention(top_k: int) -> None:
    theirs, x = deepseek(top_k), hidden()
    with torch.no_grad():
        torch.testing.assert_close(first_layer(theirs)(x), their_attention(theirs, x), atol=1e-5, rtol=1e-5)


def test_what_is_selected_decides_the_output() -> None:
    """Otherwise the test above would hold for any selection."""
    few, every = (first_layer(deepseek(top_k))(hidden()) for top_k in (6, TIME))
    torch.testing.assert_close(few[:, :6], every[:, :6])
    assert ((few - every)[:, 8:].abs().amax(-1) > 1e-2).all()


@few_or_all
def test_the_tokens_selected_are_theirs(top_k: int) -> None:
    theirs, x = deepseek(top_k), hidden()
    attention, (rotary, mask) = theirs.model.layers[0].self_attn, their_arguments(theirs, x)
    latent = attention.q_a_layernorm(attention.q_a_proj(x))
    indices = attention.indexer(x, latent, rotary, mask[:, 0], None)
    expected = torch.zeros(2, TIME, TIME, dtype=torch.bool).scatter(-1, indices.long(), True).tril()
    assert torch.equal(first_layer(theirs).selection(x), expected)


@few_or_all
def test_prefill_chunks_and_single_tokens_follow_deepseeks_cache(top_k: int) -> None:
    theirs, x = deepseek(top_k), hidden()
    ours = first_layer(theirs)
    cache, their_cache, first = ours.new_cache(2, TIME), DynamicCache(config=theirs.config), 0
    with torch.no_grad():
        for piece in (x[:, :10], x[:, 10:15], *x[:, 15:].split(1, dim=1)):
            expected = their_attention(theirs, piece, first, their_cache)
            torch.testing.assert_close(ours(piece, cache), expected, atol=1e-5, rtol=1e-5)
            first += piece.shape[1]
    assert isinstance(cache, IndexedLatentCache)
    their_layer = their_cache.layers[0]
    torch.testing.assert_close(cache.latents[..., :RANK], their_layer.keys[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.index_keys, their_layer.indexer_keys, atol=1e-5, rtol=1e-5)


def test_in_double_precision_nothing_but_rounding_differs() -> None:
    """RoPE's angles are theirs in fp32, hence 1e-6."""
    theirs, x = deepseek().double(), hidden(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(first_layer(theirs)(x), their_attention(theirs, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rope", ROPES)
def test_the_same_weights_give_deepseeks_logits(rope: str) -> None:
    theirs = deepseek(rope=rope)
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = kvlearn.from_transformers(theirs)
    cache = ours.new_cache(2, 40)
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=3e-5, rtol=1e-4)
        pieces = [ours(piece, cache) for piece in (tokens[:, :30], *tokens[:, 30:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=3e-5, rtol=1e-4)


def test_greedy_generation_is_deepseeks() -> None:
    theirs = deepseek()
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 16, stop=()), expected)


def test_the_indexer_rotates_halves_where_attention_rotates_neighbours() -> None:
    """With the rows of the index key in the order that attention needs, other tokens are selected."""
    theirs, x = deepseek(), hidden()
    ours = first_layer(theirs)
    expected = ours.selection(x)
    with torch.no_grad():
        rows = ours.indexer.k_proj.weight
        rows.copy_(torch.cat((half_split(rows[:ROPE_DIM], ROPE_DIM), rows[ROPE_DIM:])))
    assert not torch.equal(ours.selection(x), expected)


def test_a_deepseek_is_loaded_from_its_folder(tmp_path: object) -> None:
    theirs = deepseek(rope="yarn, both mscales")
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 61, (2, TIME), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = kvlearn.from_transformers(tmp_path)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=3e-5, rtol=1e-4)
