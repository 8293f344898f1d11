"""Hybrids of transformers rebuilt from our parts: the same weights, the same logits, however they are fed.

Every weight is drawn anew, vectors too. Shapes are small and odd on purpose: no two sizes of a model are
equal unless its code needs it, so that a table that mixes them up cannot fit. Generation follows from the
logits: of a family's first shape, and of all with HYPOTHESIS_PROFILE=thorough.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import kvlearn
from kvlearn.model import Decoder

TIME, VOCABULARY = 23, 61
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QWEN: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_value_heads": 6,
    "linear_num_key_heads": 3,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 8,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
JAMBA: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "mamba_d_state": 7,
    "mamba_dt_rank": 3,
    "use_mamba_kernels": False,
}
FALCON: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "mamba_d_ssm": 60,
    "mamba_n_heads": 6,
    "mamba_d_state": 7,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.5,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.9,
    "ssm_multipliers": [0.5, 0.9, 1.1, 1.4, 0.6],
}
KIMI: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 9,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "linear_head_dim": 8,
    "linear_num_heads": 5,
}
LFM: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "block_multiple_of": 8,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
}
ONE_EXPERT = {"num_experts": 1, "num_experts_per_tok": 1, "num_dense_layers": 0}  # its weight is near 1
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("qwen3_next", QWEN),
    "qwen3-next, other sizes": (
        "qwen3_next",
        {
            **QWEN,
            "num_hidden_layers": 5,
            "layer_types": [
                "full_attention",
                *2 * ["linear_attention"],
                "full_attention",
                "linear_attention",
            ],
            "linear_num_key_heads": 6,
            "linear_conv_kernel_dim": 3,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "jamba": ("jamba", JAMBA),
    "jamba, other sizes": (
        "jamba",
        {
            **JAMBA,
            "num_hidden_layers": 5,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 3,
            "expert_layer_offset": 2,
            "num_key_value_heads": 6,
            "num_experts_per_tok": 1,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "mamba_expand": 3,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    "jamba, no experts": ("jamba", {**JAMBA, "num_experts": 1}),
    "falcon-h1": ("falcon_h1", {**FALCON, **MULTIPLIERS}),
    "falcon-h1, other sizes": (
        "falcon_h1",
        {
            **FALCON,
            **MULTIPLIERS,
            "num_key_value_heads": 3,
            "mamba_n_groups": 3,
            "mamba_d_conv": 3,
            "mamba_conv_bias": False,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    "falcon-h1, gate before norm": (
        "falcon_h1",
        {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "kimi-linear": ("kimi_linear", KIMI),
    "kimi-linear, other sizes": (
        "kimi_linear",
        {
            **KIMI,
            "layer_types": 2 * ["linear_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse", "sparse"],
            "q_lora_rank": 11,
            "n_group": 2,
            "n_shared_experts": 2,
            "linear_conv_kernel_dim": 3,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,  # which theirs ignores
        },
    ),
    "falcon-mamba": ("falcon_mamba", {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 7}),
    "falcon-mamba, other sizes": (
        "falcon_mamba",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "state_size": 5,
            "expand": 3,
            "time_step_rank": 4,
            "conv_kernel": 3,
            "use_conv_bias": False,
            "mixer_rms_eps": 1e-2,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2": ("lfm2", LFM),
    "lfm2, other sizes": (
        "lfm2",
        {
            **LFM,
            "layer_types": ["full_attention", "conv", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_bias": True,
            "conv_L_cache": 5,
            "norm_eps": 1e-2,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2 with experts": (
        "lfm2_moe",
        {
            **{name: size for name, size in LFM.items() if not name.startswith("block")},
            "moe_intermediate_size": 20,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.7,
        },
    ),
    "lfm2 with experts, other sizes": (
        "lfm2_moe",
        {
            **{name: size for name, size in LFM.items() if not name.startswith("block")},
            "moe_intermediate_size": 36,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "num_dense_layers": 2,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "conv_L_cache": 4,
        },
    ),
}
SHAPES["lfm2 with one expert"] = ("lfm2_moe", {**SHAPES["lfm2 with experts"][1], **ONE_EXPERT})
every_shape = pytest.mark.parametrize("shape", SHAPES)
FIRST_SHAPES = {family: name for name, (family, _) in reversed(SHAPES.items())}.values()
generating_shapes = pytest.mark.parametrize(
    "shape", SHAPES if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else FIRST_SHAPES
)


def theirs_of(shape: str, **options: Any) -> Any:
    """A model with every weight drawn anew; rates and steps such that states neither vanish nor stay."""
    family, sizes = SHAPES[shape]
    config = AutoConfig.for_model(family, **{**COMMON, **sizes, **options})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    weights = model.state_dict()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name not in weights or "mup" in name:  # computed from the configuration
            continue
        drawn = torch.randn(weight.shape, generator=generator)
        if name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            drawn = drawn * 0.7 - 1
        elif weight.dim() > 1:
            drawn = drawn * weight.shape[-1] ** -0.5
        else:
            drawn = drawn * 0.5 + 1
        weight.data = drawn
    return model.eval()


def prompt(batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, TIME), generator=torch.Generator().manual_seed(1))


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@every_shape
@torch.no_grad()
def test_full_pass_chunks_and_tokens_give_their_logits(shape: str) -> None:
    theirs, tokens = theirs_of(shape), prompt()
    ours = kvlearn.from_transformers(theirs)
    expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.3
    assert (expected[:, 1:] - expected[:, :-1]).abs().mean() > 0.1
    same(ours(tokens), expected)
    for sizes in ((9, 1, 13), TIME * (1,)):
        cache = ours.new_cache(2, TIME)
        same(torch.cat([ours(piece, cache) for piece in tokens.split(sizes, dim=1)], dim=1), expected)


@generating_shapes
@torch.no_grad()
def test_generated_tokens_are_theirs_with_stop_tokens_and_without(shape: str) -> None:
    theirs, tokens = theirs_of(shape), prompt(1)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 10, "do_sample": False}
    expected = theirs.generate(tokens, eos_token_id=None, **options)
    ours = kvlearn.from_transformers(theirs)
    assert torch.equal(ours.generate(tokens, 10, stop=()), expected)
    theirs.generation_config.eos_token_id = expected[0, TIME + 4].item()
    stopped = theirs.generate(tokens, **options)
    assert stopped.shape[1] <= TIME + 5
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 10), stopped)


@every_shape
@torch.no_grad()
def test_a_folder_gives_what_the_model_in_memory_gives(shape: str, tmp_path: Any) -> None:
    """In files experts are apart, and some names differ from those in memory."""
    theirs = theirs_of(shape)
    theirs.save_pretrained(tmp_path)
    same(kvlearn.from_transformers(tmp_path)(prompt()), kvlearn.from_transformers(theirs)(prompt()))


def of(decoder: Decoder) -> list[str]:
    return [spec.name for spec in decoder.config.specs]


def test_layers_are_what_the_configuration_says() -> None:
    assert of(kvlearn.from_transformers(theirs_of("qwen3-next"))) == [*3 * ["gated_delta"], "released"]
    jamba = of(kvlearn.from_transformers(theirs_of("jamba")))
    assert jamba == [*4 * ["mamba"], "gqa", *3 * ["mamba"]]
    kimi = of(kvlearn.from_transformers(theirs_of("kimi-linear")))
    assert kimi == [*4 * ["kda"], "mla", "kda"]


@every_shape
def test_bytes_follow_from_the_layers(shape: str) -> None:
    ours = kvlearn.from_transformers(theirs_of(shape))
    assert ours.new_cache(1, 40).nbytes == ours.table(40)[-1]["stored"]


@pytest.mark.parametrize("limits", [[0.0, 0.3], [0.1, 0.5]])
@torch.no_grad()
def test_limits_of_the_steps_are_theirs(limits: list[float], tmp_path: Any) -> None:
    """In a full pass: with a cache, a step of theirs is not limited."""
    theirs, tokens = theirs_of("falcon-h1", time_step_limit=limits), prompt()
    ours, expected = kvlearn.from_transformers(theirs), theirs(tokens, use_cache=False).logits
    cache = ours.new_cache(2, TIME)
    for got in (ours(tokens), torch.cat([ours(token, cache) for token in tokens.split(1, dim=1)], dim=1)):
        same(got, expected)
    kvlearn.model.save(ours, tmp_path / "ours.safetensors")
    assert kvlearn.model.load(tmp_path / "ours.safetensors").config == ours.config


@pytest.mark.parametrize("shape", ["qwen3-next", "kimi-linear", "jamba", "falcon-h1", "falcon-mamba"])
@torch.no_grad()
def test_rates_may_be_wider_than_the_other_weights(shape: str, tmp_path: Any) -> None:
    theirs, tokens = theirs_of(shape), prompt()
    expected = kvlearn.from_transformers(theirs)(tokens)
    theirs = theirs.to(torch.bfloat16)
    for name, weight in theirs.named_parameters():
        if name.endswith(("A_log", ".D", "dt_bias")):
            weight.data = weight.data.float()
    theirs.save_pretrained(tmp_path)
    for ours in (kvlearn.from_transformers(theirs), kvlearn.from_transformers(tmp_path)):
        got = ours(tokens, ours.new_cache(2, TIME))
        assert got.dtype == torch.bfloat16
        assert (got - expected).abs().median() < 0.15 * expected.std()  # rounding may change the experts


@pytest.mark.parametrize(
    ("shape", "options", "names"),
    [
        ("qwen3-next", {"attention_bias": True}, "attention_bias"),
        ("qwen3-next", {"hidden_act": "gelu"}, "hidden_act"),
        ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ("falcon-h1", {"attention_bias": True}, "attention_bias"),
        ("falcon-h1", {"projectors_bias": True}, "projectors_bias"),
        ("kimi-linear", {"attention_bias": True}, "attention_bias"),
        ("falcon-mamba", {"use_bias": True}, "use_bias=True"),
        ("falcon-mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3-next", {"head_dim": 12, "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_the_name_of_its_field(
    shape: str, options: dict[str, Any], names: str
) -> None:
    with pytest.raises(ValueError, match=names):
        kvlearn.from_transformers(theirs_of(shape, **options))
