"""Full attention against implementations that we did not write: PyTorch's SDPA and transformers' Llama."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import kvlearn
from kvlearn.attention import FullAttention

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def llama(scaling: str = "default", tied: bool = False, **options: int) -> LlamaForCausalLM:
    """A tiny Llama, every weight of which is drawn anew: gains too, which are all ones at first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=options.pop("num_key_value_heads", 3),
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters=SCALINGS[scaling],
        tie_word_embeddings=tied,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.2)
    return model


def prompt(batch: int = 2, time: int = 40) -> Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(1))


def test_without_positions_it_is_sdpa_between_four_matrices() -> None:
    torch.manual_seed(0)
    layer = FullAttention(40, 5, rope=None)
    x = torch.randn(2, 11, 40)
    q, k, v = (
        F.linear(x, p.weight).view(2, 11, 5, 8).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = F.linear(heads.transpose(1, 2).reshape(2, 11, 40), layer.o_proj.weight)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_weights_give_llamas_logits(scaling: str, tied: bool) -> None:
    theirs = llama(scaling, tied)
    ours = kvlearn.from_transformers(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt()), theirs(prompt()).logits, atol=3e-5, rtol=1e-4)


def test_prefill_and_token_by_token_follow_llamas_cache() -> None:
    theirs, tokens = llama(), prompt()
    ours = kvlearn.from_transformers(theirs)
    cache, their_cache = ours.new_cache(2, 40), DynamicCache()
    with torch.no_grad():
        for piece in (tokens[:, :23], tokens[:, 23:30], *tokens[:, 30:].split(1, dim=1)):
            expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
            torch.testing.assert_close(ours(piece, cache), expected, atol=3e-5, rtol=1e-4)
    for layer, their_layer in zip(cache.layers, their_cache.layers, strict=True):
        torch.testing.assert_close(layer.tensors()[0], their_layer.keys, atol=3e-5, rtol=1e-4)


def test_greedy_generation_is_llamas() -> None:
    theirs, tokens = llama(), prompt(1, 12)
    ours = kvlearn.from_transformers(theirs)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ours.generate(tokens, 20, stop=()), expected)


def test_a_llama_is_loaded_from_its_folder(tmp_path: object) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = kvlearn.from_transformers(tmp_path)
        torch.testing.assert_close(ours(prompt()), theirs(prompt()).logits, atol=3e-5, rtol=1e-4)


def test_what_is_no_known_model_is_refused_by_name(tmp_path: object) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=10))
    for model in (gpt2, nn.Linear(2, 2), None):
        with pytest.raises(ValueError, match="model_or_path: expected a model of llama"):
            kvlearn.from_transformers(model)
    with pytest.raises(FileNotFoundError, match="model_or_path: no folder"):
        kvlearn.from_transformers(f"{tmp_path}/nowhere")


def test_half_precision_is_as_near_as_transformers_own() -> None:
    """At 2000 tokens positions must not have been rounded with the weights."""
    theirs, tokens = llama().bfloat16(), prompt(1, 2000)
    ours = kvlearn.from_transformers(theirs)
    exact = llama()
    exact.load_state_dict(theirs.float().state_dict())
    with torch.no_grad():
        expected = exact(tokens).logits
        their_error = (theirs.bfloat16()(tokens).logits.float() - expected).abs()[:, -200:].mean()
        our_error = (ours(tokens).float() - expected).abs()[:, -200:].mean()
    assert our_error < 1.5 * their_error


def test_rope_options_that_we_lack_are_refused_by_name() -> None:
    theirs = llama("yarn")
    theirs.config.rope_parameters = {**SCALINGS["yarn"], "high_freq_factor": 4.0}
    with pytest.raises(ValueError, match=r"rope_parameters: high_freq_factor=4\.0"):
        kvlearn.from_transformers(theirs)
