"""Families of softmax models against transformers' own: logits, and what they generate.

Every weight is drawn anew, vectors too. Each family has two shapes: head dims and head counts that are no
power of two, tied embeddings or not, the options of its configuration one way and the other. Generation
follows from the logits: of the first shape, and of both with HYPOTHESIS_PROFILE=thorough.
"""

import os
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import kvlearn
from kvlearn.model import Decoder

VOCAB, TIME = 61, 18
FIRST = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SECOND = {
    **FIRST,
    "hidden_size": 60,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-3,
}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 12,
    "moe_intermediate_size": 20,
    "n_routed_experts": 9,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
LATENT_2 = {
    **LATENT,
    "num_key_value_heads": 5,
    "kv_lora_rank": 10,
    "v_head_dim": 6,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}
INDEX = {"index_topk": 64, "index_n_heads": 16, "index_head_dim": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
}
# Family -> the class of its models, and of its configurations, and its options besides FIRST and SECOND.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "Llama",
        "Llama",
        {"rope_parameters": LLAMA3},
        {"head_dim": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("Mistral", "Mistral", {"sliding_window": 7}, {"head_dim": 10, "sliding_window": None}),
    "qwen2": (
        "Qwen2",
        "Qwen2",
        {},
        {"head_dim": 6, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (
        "Qwen3",
        "Qwen3",
        {"head_dim": 10},
        {
            "head_dim": 14,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
        },
    ),
    "olmo2": ("Olmo2", "Olmo2", {}, {"head_dim": 6, "attention_bias": True}),
    "phi3": (
        "Phi3",
        "Phi3",
        {"sliding_window": 9},
        {
            "hidden_size": 40,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75},
        },
    ),
    "glm": ("Glm", "Glm", {"head_dim": 12}, {"head_dim": 9, "attention_bias": False}),
    "glm4": ("Glm4", "Glm4", {"head_dim": 12}, {"head_dim": 9, "attention_bias": False}),
    "gemma2": (
        "Gemma2",
        "Gemma2",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "query_pre_attn_scalar": 13,
            "attn_implementation": "eager",
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "head_dim": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        "Gemma3Text",
        {"head_dim": 10, "num_hidden_layers": 7, "sliding_window": 7, "query_pre_attn_scalar": 13},
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
        },
    ),
    "gemma": (
        "Gemma",
        "Gemma",
        {"head_dim": 10},
        {"head_dim": 6, "attention_bias": True, "hidden_act": "gelu"},
    ),
    "olmo3": (
        "Olmo3",
        "Olmo3",
        {"num_hidden_layers": 5, "sliding_window": 7},
        {
            "head_dim": 6,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
        },
    ),
    "ministral3": (
        "Ministral3",
        "Ministral3",
        {"head_dim": 10, "sliding_window": None, "rope_parameters": GROWING},
        {
            "head_dim": 6,
            "sliding_window": 7,
            "rope_parameters": {**GROWING, "mscale": 0.7, "mscale_all_dim": 1.2, "llama_4_scaling_beta": 0.9},
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "Qwen3Moe",
        {
            "head_dim": 10,
            "moe_intermediate_size": 20,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
        },
        {
            "head_dim": 6,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "mixtral": (
        "Mixtral",
        "Mixtral",
        {"num_local_experts": 5},
        {"head_dim": 10, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5},
    ),
    "gpt_oss": (
        "GptOss",
        "GptOss",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "swiglu_limit": 0.5,
        },
        {
            "head_dim": 6,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        "DeepseekV2",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
        {**LATENT_2, "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        "DeepseekV3",
        {**LATENT, "n_group": 3, "topk_group": 2},
        {**LATENT_2, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "deepseek_v32": (
        "DeepseekV32",
        "DeepseekV32",
        {**LATENT, **INDEX, "n_group": 3, "topk_group": 2},
        {
            **LATENT_2,
            **INDEX,
            "index_topk": 7,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["sparse", "dense"],
        },
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
both_shapes = pytest.mark.parametrize("shape", [0, 1])
generating_shapes = pytest.mark.parametrize(
    "shape", [0, 1] if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else [0]
)


def build(family: str, shape: int = 0, **options: Any) -> Any:
    """A small model of transformers; every weight is drawn anew, and buffers that routing depends on."""
    model, config, *own = FAMILIES[family]
    fields = {**(FIRST, SECOND)[shape], **own[shape], **options}
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{config}Config")(**fields)
    built = getattr(transformers, f"{model}ForCausalLM")(theirs).eval()
    correction = [b for name, b in built.named_buffers() if name.endswith("correction_bias")]
    for weight in (*built.parameters(), *correction):
        nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.25)
    return built


def prompt(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(3, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def in_pieces(ours: Decoder, pieces: list[Tensor]) -> Tensor:
    cache = ours.new_cache(len(pieces[0]), sum(piece.shape[1] for piece in pieces))
    return torch.cat([ours(piece, cache) for piece in pieces], dim=1)


@every_family
@both_shapes
def test_logits_are_theirs_whole_in_chunks_and_token_by_token(family: str, shape: int) -> None:
    theirs, tokens = build(family, shape), prompt()
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.1
        ours = kvlearn.from_transformers(theirs)
        close(ours(tokens), expected)
        close(in_pieces(ours, [tokens[:, :8], tokens[:, 8:10], tokens[:, 10:]]), expected)
        close(in_pieces(ours, list(tokens.split(1, dim=1))), expected)


@every_family
@generating_shapes
def test_greedy_generation_is_theirs_with_its_stop_tokens(family: str, shape: int) -> None:
    theirs, tokens = build(family, shape), prompt(time=9)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 10, "do_sample": False}
    ours = kvlearn.from_transformers(theirs)
    free = theirs.generate(tokens, **options)
    assert torch.equal(ours.generate(tokens, 10), free)
    theirs.generation_config.eos_token_id = [int(free[0, 12]), int(free[1, 15])]  # rows end apart
    ours = kvlearn.from_transformers(theirs)
    assert torch.equal(ours.generate(tokens, 10), theirs.generate(tokens, **options))
    assert torch.equal(ours.generate(tokens, 10, stop=()), free)


@every_family
@both_shapes
def test_a_folder_gives_what_the_model_in_memory_gives(family: str, shape: int, tmp_path: Any) -> None:
    theirs = build(family, shape)
    theirs.generation_config.eos_token_id = [5, 7]
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours, from_folder = kvlearn.from_transformers(theirs), kvlearn.from_transformers(tmp_path)
    assert ours.config == from_folder.config
    assert ours.config.stop_tokens == (5, 7)
    weights = from_folder.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"mscale": 0.7},
        {"mscale_all_dim": 0.7},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"attention_factor": 1.3, "truncate": False},
        {"beta_fast": 0.1, "beta_slow": 0.8, "original_max_position_embeddings": 64},
        {"original_max_position_embeddings": 4},
    ],
    ids=str,
)
def test_yarn_is_theirs_with_any_of_its_options(options: dict[str, Any]) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 8}
    theirs = build("llama", head_dim=14, rope_parameters={**yarn, **options})
    with torch.no_grad():
        close(kvlearn.from_transformers(theirs)(prompt()), theirs(prompt()).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        # A copy of a field within RoPE's parameters, as in Ministral 3's default configuration.
        ("ministral3", {"rope_parameters": {**GROWING, "type": "yarn", "max_position_embeddings": 128}}),
        ("mixtral", {"hidden_act": "swish"}),
        ("deepseek_v3", {"mlp_layer_types": ["sparse"] * 3}),  # a field that V3 does not have
        ("phi3", {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}),
    ],
)
def test_fields_without_an_effect_of_their_own_change_nothing(family: str, options: dict[str, Any]) -> None:
    theirs = build(family, **options)
    with torch.no_grad():
        close(kvlearn.from_transformers(theirs)(prompt()), theirs(prompt()).logits)


LONG = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 3.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e3,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 5.0],
    },
}


def with_angles_by_length(kind: str) -> Any:
    """A model whose RoPE changes at 16 tokens."""
    if kind == "dynamic":
        return build("llama", rope_parameters=LONG[kind], max_position_embeddings=16)
    return build("phi3", rope_parameters=LONG[kind], original_max_position_embeddings=16, sliding_window=None)


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("cuts", [[18], [11, 5, 2], [15, 1, 1, 1]])
def test_angles_that_depend_on_the_length_follow_theirs_call_by_call(kind: str, cuts: list[int]) -> None:
    theirs, pieces = with_angles_by_length(kind), prompt().split(cuts, dim=1)
    ours, their_cache = kvlearn.from_transformers(theirs), DynamicCache()
    cache = ours.new_cache(2, TIME)
    with torch.no_grad():
        for piece in pieces:
            expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
            close(ours(piece, cache), expected)


@pytest.mark.parametrize("kind", LONG)
def test_generation_is_theirs_where_a_text_becomes_long(kind: str) -> None:
    theirs, tokens = with_angles_by_length(kind), prompt(time=12)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 12), expected)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "hidden_act", "tanh"),
        ("mistral", "layer_types", ["full_attention"] * 3),
        ("qwen2", "layer_types", ["chunked_attention"] * 3),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "attn_logit_softcapping", 30.0),
        ("mixtral", "hidden_act", "gelu"),
        ("deepseek_v3", "attention_bias", True),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", None),
        ("glm", "head_dim", 10),
        ("ministral3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("llama", "rope_parameters", None),
        ("gemma2", "attn_logit_softcapping", 0.0),
        ("gpt_oss", "swiglu_limit", -1.0),
        ("deepseek_v3", "kv_lora_rank", 0),
    ],
)
def test_what_is_not_supported_is_refused_by_the_name_of_its_field(
    family: str, field: str, value: Any
) -> None:
    theirs = build(family)
    setattr(theirs.config, field, value)
    with pytest.raises(ValueError, match=field):
        kvlearn.from_transformers(theirs)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"rope_type": "spiral"}, "rope_type: .*'spiral'"),
        ({"rope_type": "linear"}, "rope_parameters: factor is missing"),
        ({"rope_type": "linear", "factor": 2.0, "extra": 1}, "rope_parameters: extra=1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
    ],
)
def test_an_unknown_rope_is_refused_by_name(parameters: dict[str, Any], names: str) -> None:
    theirs = build("llama")
    theirs.config.rope_parameters = {"rope_theta": 1e4, **parameters}
    with pytest.raises(ValueError, match=names):
        kvlearn.from_transformers(theirs)
