"""Converting a trained model: the same network with another mechanism, made from the trained heads.

    small = convert(base, ["gqa"], init="mean")
    small = convert(base, [Spec("mhc", rank=32, rope_dim=0)], init="activations", tokens=tokens)

Weights that the new model also has are copied; ``init`` sets how keys and values are initialised. Training
recovers part of the loss: ``kvlearn.study.convert_and_uptrain``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention import (
    REGISTRY,
    FullAttention,
    GroupedQueryAttention,
    Mechanism,
    MultiHeadCompression,
    MultiHeadCompressionTransformer,
    RoutedAttention,
    SparseAttention,
    WindowAttention,
)
from kvlearn.attention.rope import angular_frequencies
from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.decoder import Block, Decoder
from kvlearn.model.low_rank import best_latent, shared_rotary_key


@dataclass
class Heads:
    """A trained layer, head by head in fp64: its projections, the gain of the norm before it, and E[x xᵀ]."""

    q: Float[Tensor, "H D M"]
    k: Float[Tensor, "H D M"]
    v: Float[Tensor, "H D M"]
    o: Float[Tensor, "M HD"]
    gain: Float[Tensor, "M"]
    moment: Float[Tensor, "M M"]


# Fills a new layer from the trained layer at its position, and from all layers that will read it.
Init = Callable[[Mechanism, Heads, list[Heads]], None]


def convert(
    model: Decoder,
    layers: Sequence[str | Spec],
    *,
    init: str,
    tokens: Integer[Tensor, "B T"] | None = None,
    seed: int = 0,
) -> Decoder:
    """``model``, whose layers are all "full", with the mechanisms of the pattern ``layers`` instead.

    ``init``, for keys and values that replace those of several heads or layers (see ``INITS``):
        "mean"         the mean of the weights of a pool's heads, or of a layer and its readers
        "first"        the first head of each pool, or the layer's own
        "activations"  the latent that keeps most of the layer's keys and values over ``tokens``
        "weights"      the latent that keeps most of the weights
        "random"       new weights, drawn from ``seed``, as an untrained model has them
    A layer that keeps all heads, whatever its mask, and is read by no other is copied.

    Exact with as many pools as heads, and at full rank with ``rope_dim=0``. With
    ``rope_dim`` > 0 the layer's ``rope`` follows from it: its frequencies are the model's fastest.

    ``model`` itself is not changed; the new one is in evaluation mode, of the same dtype and device. Raises
    ValueError that names ``model``, ``layers``, ``init`` or ``tokens``.

    Sources: Ainslie et al., "GQA" (2023), section 2.1; low_rank.py for the latents.
    """
    validate.instance("model", model, Decoder)
    validate.instance("layers", layers, (list, tuple))
    seed = validate.at_most("seed", validate.at_least("seed", seed, -(2**63)), 2**64 - 1, "64 bits")
    if any(spec.name != "full" or spec.reads is not None for spec in model.config.specs):
        raise ValueError(f'model: expected "full" layers with keys of their own, got {model.config.layers}')
    config, head_dim = replace(model.config, layers=tuple(layers)), model.mixers[0].head_dim
    config = replace(config, layers=tuple(_fitted(spec, config, head_dim) for spec in config.specs))
    inits = [_init_of(init, spec, config.owners.count(i) > 1) for i, spec in enumerate(config.specs)]
    weight = model.embed.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        converted = Decoder(config).to(weight.device, weight.dtype)
    heads = [_heads(block) for block in model.blocks]  # type: ignore[arg-type]
    if init == "activations":
        if tokens is None:
            raise ValueError('tokens: expected some text for init="activations", got None')
        for layer, moment in zip(heads, second_moments(model, tokens), strict=True):
            layer.moment = moment
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".mixer." not in name}
    converted.load_state_dict(kept, strict=False)
    with torch.no_grad():
        for i, (mixer, fill) in enumerate(zip(converted.mixers, inits, strict=True)):
            fill(mixer, heads[i], [heads[j] for j, owner in enumerate(config.owners) if owner == i])
    return converted.eval()


def _heads(block: Block) -> Heads:
    full = block.mixer
    assert isinstance(full, FullAttention)
    q, k, v = (
        proj.weight.detach().double().unflatten(0, (full.n_heads, full.head_dim))
        for proj in (full.q_proj, full.k_proj, full.v_proj)
    )
    norm = block.mixer_norm  # without one, as in OLMo 2, the gain is 1
    gain = norm.weight if isinstance(norm, nn.RMSNorm | nn.LayerNorm) else q.new_ones(full.d_model)
    return Heads(
        q,
        k,
        v,
        full.o_proj.weight.detach().double(),
        gain.detach().double(),
        torch.eye(full.d_model, dtype=torch.float64, device=q.device),
    )


@torch.no_grad()
def second_moments(model: Decoder, tokens: Integer[Tensor, "B T"]) -> list[Float[Tensor, "M M"]]:
    """E[x xᵀ] over ``tokens`` of the input x of every layer's mechanism, in fp64."""
    moments: list[Tensor] = []

    def record(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].double().flatten(0, 1)
        moments.append(x.mT @ x / len(x))

    hooks = [mixer.register_forward_pre_hook(record) for mixer in model.mixers]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _shared(pool: Callable[[Tensor], Tensor] | None, with_readers: bool = False) -> Init:
    """Keys and values by ``pool`` of each pool's heads, (n, D, M) -> (D, M); None leaves the new weights."""

    def fill(new: Mechanism, own: Heads, group: list[Heads]) -> None:
        assert isinstance(new, GroupedQueryAttention | RoutedAttention | WindowAttention | SparseAttention)
        new.q_proj.weight.copy_(own.q.flatten(0, 1))
        new.o_proj.weight.copy_(own.o)
        if new.reader or pool is None:
            return
        G, H = new.n_kv_heads, new.n_heads
        neighbours = [h * G // H for h in range(H)]
        pool_of = new.pools if isinstance(new, RoutedAttention) else neighbours
        pools, layers = torch.tensor(pool_of, device=own.q.device), group if with_readers else [own]
        for proj, name in ((new.k_proj, "k"), (new.v_proj, "v")):
            # Average maps from the residual stream: each weight with the gain of the norm before it.
            heads = torch.stack([getattr(layer, name) * layer.gain / own.gain for layer in layers]).mean(0)
            proj.weight.copy_(torch.cat([pool(heads[pools == g]) for g in range(G)]))

    return fill


def _latent(new: Mechanism, own: Heads, group: list[Heads]) -> None:
    """The best latent, and the best shared key, by the layer's second moment."""
    assert isinstance(new, MultiHeadCompression)
    key, rest = _queries(new, own)
    latent = best_latent(rest, own.v, own.moment, new.rank)
    heads = torch.cat((rest, own.v)).flatten(0, 1)
    new.k_up.copy_(latent.k_up)
    new.v_up.copy_(latent.v_up)
    if not isinstance(new, MultiHeadCompressionTransformer):
        new.kv_down.weight.copy_(torch.cat((latent.down @ heads, key)))
        return
    new.keep_all(heads)  # its transformer's output is 0 at first
    new.compressor.latent_proj.weight.copy_(latent.down)
    if new.k_rope_proj is not None:
        new.k_rope_proj.weight.copy_(key)


def _latent_at_random(new: Mechanism, own: Heads, group: list[Heads]) -> None:
    assert isinstance(new, MultiHeadCompression)
    _queries(new, own)


def _queries(new: MultiHeadCompression, own: Heads) -> tuple[Tensor, Tensor]:
    """Fill queries and output of a latent layer; return the weights of its shared key and of the rest."""
    key, q, rest = own.k[0, :0], own.q[:, :0], own.k
    if new.rope_dim:
        key, q, rest = shared_rotary_key(own.q, own.k, own.moment, new.rope_dim)
    scale = own.q.shape[1] ** -0.5 / new.scale  # scores are divided by √(D + Dr) there, and by √D here
    new.q_proj.weight.copy_(torch.cat((own.q, q), dim=1).flatten(0, 1) * scale)
    new.o_proj.weight.copy_(own.o)
    return key, rest


SHARED: dict[str, Init] = {
    "mean": _shared(lambda heads: heads.mean(0), with_readers=True),
    "first": _shared(lambda heads: heads[0]),
    "random": _shared(None),
}
LATENT: dict[str, Init] = {"activations": _latent, "weights": _latent, "random": _latent_at_random}
MASKS = ("full", "window", "sparse")  # they differ in the mask alone, and keep all heads by default
# The inits that each mechanism supports.
INITS: dict[str, dict[str, Init]] = {
    "full": SHARED,
    "gqa": SHARED,
    "routed": SHARED,
    "window": SHARED,
    "sparse": SHARED,
    "mhc": LATENT,
    "mhc_transformer": LATENT,
}


def _init_of(init: str, spec: Spec, is_read: bool) -> Init:
    inits = INITS[validate.one_of("layers", spec.name, INITS)]
    validate.one_of("init", init, {**SHARED, **LATENT})
    keeps_heads = inits is SHARED and spec.name in MASKS and "n_kv_heads" not in spec.options
    if keeps_heads and not is_read:
        return SHARED["first"]  # nothing to choose: a copy
    return inits[validate.one_of(f"init for {spec.name!r}", init, inits)]


def _fitted(spec: Spec, config: ModelConfig, head_dim: int) -> Spec:
    """``spec``, with the rope by which a shared key rotates as the model's fastest pairs do."""
    if spec.options.get("head_dim") not in (None, head_dim):
        raise ValueError(f"layers: head_dim: expected the model's {head_dim}, got {spec.options['head_dim']}")
    if INITS.get(spec.name) is not LATENT or config.rope is None:
        return spec
    with torch.device("meta"):
        options = {"head_dim": head_dim, "rope": config.rope, **spec.options}
        rope_dim: int = REGISTRY[spec.name](config.d_model, config.n_heads, **options).rope_dim  # type: ignore
    if not rope_dim:
        return spec
    validate.at_most("layers: rope_dim", rope_dim, head_dim, "head_dim: the rotary pairs there are")
    rope = replace(config.rope, theta=config.rope.theta ** (rope_dim / head_dim))
    whole, factor = angular_frequencies(head_dim, config.rope)
    part, _ = angular_frequencies(rope_dim, rope)
    if factor != 1 or not torch.allclose(part, whole[: rope_dim // 2]):
        raise ValueError(f"model: frequencies stretched by {config.rope.scaling} cannot be kept in part")
    if spec.options.get("rope", rope) != rope:
        raise ValueError(f"layers: rope: expected {rope} or none given, got {spec.options['rope']}")
    return Spec(spec.name, **{**spec.options, "rope": rope})
