"""Mamba, Falcon-Mamba and Mamba-2 of transformers as decoders whose layers have only a mixer.

Weights are loaded unchanged. In half precision their residual stream is in fp32 by default, ours is not.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.families import FAMILIES, Family, expect, expect_silu

BOTH = {
    "backbone.embeddings.weight": "embed.weight",
    "backbone.norm_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "backbone.layers.{}.norm.weight": "blocks.{}.mixer_norm.weight",
    **{
        f"backbone.layers.{{}}.mixer.{theirs}": f"blocks.{{}}.mixer.{ours}"
        for theirs, ours in {
            "in_proj.weight": "in_proj.weight",
            "conv1d.weight": "conv.weight",
            "conv1d.bias": "conv.bias",
            "A_log": "A_log",
            "D": "D",
            "out_proj.weight": "o_proj.weight",
        }.items()
    },
}


def of_mixer(*names: str) -> dict[str, str]:
    """Tensors of a mixer whose names are equal in both libraries."""
    return {f"backbone.layers.{{}}.mixer.{name}": f"blocks.{{}}.mixer.{name}" for name in names}


MAMBA = {**BOTH, **of_mixer("x_proj.weight", "dt_proj.weight", "dt_proj.bias")}
FALCON_MAMBA: dict[str, str | Sequence[str]] = {
    **MAMBA,
    "backbone.layers.{}.mixer.x_proj.weight": [
        f"blocks.{{}}.mixer.{ours}.weight" for ours in ("x_proj", "norms.dt", "norms.B", "norms.C")
    ],
}
MAMBA2 = {**BOTH, **of_mixer("dt_bias", "norm.weight")}


def mamba(theirs: Any) -> ModelConfig:
    """The shape of a Mamba, from its configuration in transformers."""
    return of_mixers(theirs, Spec("mamba", **options_of(theirs), dt_rank=theirs.time_step_rank), n_heads=1)


def falcon_mamba(theirs: Any) -> ModelConfig:
    """The shape of a Falcon-Mamba: a Mamba with norms on dt, B and C, which have no weights of their own."""
    norms = {"norms": True, "norm_eps": theirs.mixer_rms_eps}
    mixer = Spec("mamba", **options_of(theirs), dt_rank=theirs.time_step_rank, **norms)
    return of_mixers(theirs, mixer, n_heads=1)


def with_unit_norms(name: str, tensor: Tensor, theirs: Any) -> Tensor | list[Tensor]:
    """With the projection of dt, B and C the weights of their norms, which are 1."""
    if not name.endswith("x_proj.weight"):
        return tensor
    sizes = (theirs.time_step_rank, theirs.state_size, theirs.state_size)
    return [tensor, *(tensor.new_ones(size) for size in sizes)]


def mamba2(theirs: Any) -> ModelConfig:
    """The shape of a Mamba-2, from its configuration in transformers."""
    options: dict[str, Any] = {"n_groups": theirs.n_groups, "norm_eps": theirs.layer_norm_epsilon}
    if tuple(theirs.time_step_limit) != (0, math.inf):
        options["dt_limit"] = tuple(float(bound) for bound in theirs.time_step_limit)
    mixer = Spec("mamba2", **options_of(theirs), **options)
    return of_mixers(theirs, mixer, theirs.num_heads, theirs.head_dim)


def options_of(theirs: Any) -> dict[str, Any]:
    """The options of both mixers. Raises ValueError that names an unsupported one."""
    expect(theirs, use_bias=False)
    expect_silu(theirs)
    return {
        "expand": theirs.expand,
        "d_state": theirs.state_size,
        "conv": theirs.conv_kernel,
        "conv_bias": theirs.use_conv_bias,
    }


def of_mixers(theirs: Any, mixer: Spec, n_heads: int, head_dim: int | None = None) -> ModelConfig:
    """A model in which every layer is ``mixer`` alone."""
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=n_heads,
        head_dim=head_dim,
        d_ff=0,
        layers=(mixer,),
        rope=None,
        norm_eps=theirs.layer_norm_epsilon,
        tied=theirs.tie_word_embeddings,
    )


# Models in half precision may keep rates and steps in fp32.
WIDE = [name for name in {**MAMBA, **MAMBA2} if name.endswith(("A_log", ".D", "dt_bias", "dt_proj.bias"))]

FAMILIES.update(
    mamba=Family(MAMBA, mamba, wide=WIDE),
    falcon_mamba=Family(FALCON_MAMBA, falcon_mamba, with_unit_norms, wide=WIDE),
    mamba2=Family(MAMBA2, mamba2, wide=WIDE),
)
