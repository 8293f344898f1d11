"""Which mechanisms released models have, counted from their shapes: the 13 models of chapter 07."""

from dataclasses import replace

from kvlearn.measure.cache_size import LayerShape, ModelShape
from kvlearn.measure.models import MODELS

RELEASED = tuple(
    MODELS[name]
    for name in (
        "Llama 3.1 8B",
        "Mistral 7B v0.1",
        "Mixtral 8x7B",
        "Gemma 2 27B",
        "Gemma 3 27B",
        "Gemma 4 E2B",
        "gpt-oss-120b",
        "DeepSeek-V3",
        "DeepSeek-V3.2",
        "Jamba v0.1",
        "MiniMax-Text-01",
        "Qwen3-Next 80B-A3B",
        "Kimi Linear 48B-A3B",
    )
)


def layers(model: ModelShape) -> list[LayerShape]:
    """Every layer of ``model``, first to last."""
    return [model.layer(i) for i in range(model.n_layers)]


def shares_heads(model: ModelShape) -> bool:
    """Whether some layer keeps keys and values of fewer heads than it has queries, or reads another's."""
    return any(
        layer.shared or (layer.keeps_tokens and not layer.latent and model.n_kv_heads < model.n_heads)
        for layer in layers(model)
    )


def has_latents(model: ModelShape) -> bool:
    """Whether some layer keeps one latent per token in place of keys and values (MLA)."""
    return any(layer.latent for layer in layers(model))


def has_selection(model: ModelShape) -> bool:
    """Whether some layer reads only tokens that it selects by content."""
    return any(layer.top_k for layer in layers(model))


def has_state(model: ModelShape) -> bool:
    """Whether some layer keeps a recurrent state."""
    return any(layer.state for layer in layers(model))


def with_window_everywhere(model: ModelShape) -> bool:
    """Whether all layers have a window."""
    return all(layer.window for layer in layers(model))


def mostly_windows(model: ModelShape) -> bool:
    """Whether at least half of the layers have a window."""
    return 2 * sum(layer.window is not None for layer in layers(model)) >= model.n_layers


def without_sharing(model: ModelShape) -> ModelShape:
    """The same model with a KV head for each query head."""
    return replace(model, n_kv_heads=model.n_heads)
