"""RWKV-4 of transformers as a decoder whose layers alternate: time mixing, then channel mixing."""

from typing import Any

from torch import Tensor

from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.families import FAMILIES, Family

# One layer of theirs is two of ours.
PARTS = {
    "ln1": "blocks.{twice[0]}.mixer_norm",
    "ln2": "blocks.{twice[1]}.mixer_norm",
    "attention.key": "blocks.{twice[0]}.mixer.k_proj",
    "attention.value": "blocks.{twice[0]}.mixer.v_proj",
    "attention.receptance": "blocks.{twice[0]}.mixer.r_proj",
    "attention.output": "blocks.{twice[0]}.mixer.o_proj",
    "feed_forward.key": "blocks.{twice[1]}.mixer.k_proj",
    "feed_forward.receptance": "blocks.{twice[1]}.mixer.r_proj",
    "feed_forward.value": "blocks.{twice[1]}.mixer.o_proj",
}
VECTORS = {
    "attention": ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"),
    "feed_forward": ("time_mix_key", "time_mix_receptance"),
}
RWKV = {
    "rwkv.embeddings.weight": "embed.weight",
    "head.weight": "head.weight",
    **{f"rwkv.blocks.{{}}.pre_ln.{kind}": f"embed_norm.{kind}" for kind in ("weight", "bias")},
    **{f"rwkv.ln_out.{kind}": f"norm.{kind}" for kind in ("weight", "bias")},
    **{f"rwkv.blocks.{{}}.{theirs}.weight": f"{ours}.weight" for theirs, ours in PARTS.items()},
    **{f"rwkv.blocks.{{}}.{norm}.bias": f"{PARTS[norm]}.bias" for norm in ("ln1", "ln2")},
    **{
        f"rwkv.blocks.{{}}.{part}.{name}": f"blocks.{{twice[{i}]}}.mixer.{name}"
        for i, part in enumerate(("attention", "feed_forward"))
        for name in VECTORS[part]
    },
}


def rwkv(theirs: Any) -> ModelConfig:
    """The shape of an RWKV-4, from its configuration in transformers."""
    if theirs.attention_hidden_size != theirs.hidden_size:
        raise ValueError(
            f"config: attention_hidden_size={theirs.attention_hidden_size} is not supported, expected "
            f"hidden_size={theirs.hidden_size}"
        )
    if theirs.layer_norm_epsilon != 1e-5:
        raise ValueError(
            f"config: layer_norm_epsilon={theirs.layer_norm_epsilon} is not supported, expected 1e-05, which "
            "their last norm has in any case"
        )
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=2 * theirs.num_hidden_layers,
        n_heads=1,
        d_ff=0,
        layers=("rwkv4", Spec("rwkv4_channel", hidden=theirs.intermediate_size)),
        rope=None,
        norm="layer",
        norm_eps=theirs.layer_norm_epsilon,
        embed_norm=True,
        tied=theirs.tie_word_embeddings,
    )


def unscaled(model: Any) -> dict[str, Tensor]:
    """Their weights as trained.

    Their first forward in evaluation halves the residual stream every ``rescale_every`` layers, so that fp16
    does not overflow, and divides in place the weights that write to it; the norms undo it. A model saved
    after that cannot be restored, in their code neither: only a model in memory has the flag.
    """
    weights, every = dict(model.state_dict()), model.config.rescale_every
    if model.rwkv.layers_are_rescaled and every > 0:
        for name in weights:
            if name.endswith(("attention.output.weight", "feed_forward.value.weight")):
                weights[name] = weights[name] * 2 ** (int(name.split(".")[2]) // every)
    return weights


def adapt(name: str, tensor: Tensor, theirs: Any) -> Tensor:
    """Their mixing weights, (1, 1, M), as vectors."""
    return tensor.flatten() if "time_mix" in name else tensor


FAMILIES["rwkv"] = Family(RWKV, rwkv, adapt, unscaled)
