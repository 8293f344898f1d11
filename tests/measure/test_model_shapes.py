"""The table of real models, counted again by transformers from their published configurations."""

from typing import Any

import pytest
import torch

from kvlearn.measure import MODELS

WINDOWS_5_TO_1 = {
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "vocab_size": 262_144,
    "sliding_window": 1024,
}
E2B = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": 7 * (4 * ["sliding_attention"] + ["full_attention"]),
}
MINIMAX = {
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "vocab_size": 200_064,
    "num_local_experts": 32,
    "layer_types": 10 * (7 * ["linear_attention"] + ["full_attention"]),
}
KIMI = {
    "layer_types": [
        "full_attention" if n in (3, 7, 11, 15, 19, 23, 26) else "linear_attention" for n in range(27)
    ]
}
# Family in transformers, and what its configuration needs beside layers and heads.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1 8B": ("Llama", {"hidden_size": 4096, "intermediate_size": 14_336, "vocab_size": 128_256}),
    "Llama 3.1 70B": ("Llama", {"hidden_size": 8192, "intermediate_size": 28_672, "vocab_size": 128_256}),
    "Llama 3.1 405B": ("Llama", {"hidden_size": 16_384, "intermediate_size": 53_248, "vocab_size": 128_256}),
    "Mistral 7B v0.1": ("Mistral", {}),  # defaults are the published configuration, here and below
    "Mistral 7B v0.2": ("Mistral", {"sliding_window": None}),
    "Mixtral 8x7B": ("Mixtral", {}),
    "Qwen3 32B": ("Qwen3", {"hidden_size": 5120, "intermediate_size": 25_600}),
    "Gemma 2 27B": ("Gemma2", {"hidden_size": 4608, "intermediate_size": 36_864, "sliding_window": 4096}),
    "Gemma 3 27B": ("Gemma3Text", WINDOWS_5_TO_1),
    "Gemma 4 E2B": ("Gemma4Text", E2B),
    "gpt-oss-120b": ("GptOss", {}),
    "DeepSeek-V3": ("DeepseekV3", {}),
    "DeepSeek-V3.2": ("DeepseekV32", {}),
    "Jamba v0.1": ("Jamba", {}),
    "MiniMax-Text-01": ("MiniMax", MINIMAX),
    "Qwen3-Next 80B-A3B": ("Qwen3Next", {}),
    "Kimi Linear 48B-A3B": ("KimiLinear", KIMI),
    "Pythia 2.8B": ("GPTNeoX", {"hidden_size": 2560, "intermediate_size": 10_240, "vocab_size": 50_304}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_layers_are_those_of_the_real_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape, (family, extra) = MODELS[name], FAMILIES[name]
    heads = {"num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads}
    if family != "GPTNeoX":
        heads |= {"num_key_value_heads": shape.n_kv_heads, "head_dim": shape.head_dim}
    config = getattr(transformers, f"{family}Config")(**heads, **extra)
    with torch.device("meta"):
        model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    assert sum(p.numel() for p in model.parameters()) == shape.n_parameters
    for index, kind in enumerate(getattr(config, "layer_types", None) or []):
        window = config.sliding_window if kind == "sliding_attention" else None
        assert shape.layer(index).window == window


def test_every_model_is_checked_but_the_one_that_does_not_exist() -> None:
    assert set(MODELS) - set(FAMILIES) == {"Llama 3.1 405B as the article tells it"}


def test_every_model_says_where_its_numbers_come_from() -> None:
    for name, shape in MODELS.items():
        assert shape.name == name
        assert ": " in shape.source or "arXiv:" in shape.source or "article" in shape.source
