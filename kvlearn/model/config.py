"""The configuration of a decoder: plain fields, and a pattern of mechanisms repeated over the layers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any, Literal

from kvlearn import validate
from kvlearn.attention import (
    REGISTRY,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Pattern,
    RopeConfig,
    YarnScaling,
)
from kvlearn.model.feed_forward import ACTIVATIONS
from kvlearn.model.moe import MoEConfig

SCALINGS = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "dynamic": DynamicScaling,
    "longrope": LongRopeScaling,
}


class Spec:
    """A mechanism by its name in the registry, with its options: ``Spec("window", window=512)``.

    ``n_heads`` and ``head_dim`` are the model's unless given. A ``Pattern`` among the options is kept as its
    text, a list as a tuple, and a ``Spec`` as (name, options): ``Spec("parallel", parts=["gqa",
    Spec("mamba2", n_heads=16)])``.

    With ``reads`` the layer reads the keys and values of an earlier layer of the same kind: at that offset
    (-1 is the layer before), or of the "last" one that has its own. It then stores none; RWKV-7 still has its
    state, and mixes the other layer's values into its own.
    """

    def __init__(self, name: str, *, reads: int | Literal["last"] | None = None, **options: Any) -> None:
        self.name = validate.one_of("layers", name, REGISTRY)
        self.parameters = list(signature(REGISTRY[name]).parameters)[1:]  # after d_model
        ways = ("reader", "value_residual")  # options that a layer has if it can read another
        self.reading = next((option for option in ways if option in self.parameters), None)
        if reads is not None and self.reading is None:
            raise ValueError(f"layers: a layer of kind {name!r} cannot read another's keys and values")
        if isinstance(reads, int):
            validate.at_most("layers: reads", reads, -1, "an earlier layer; -1 is the one before")
        elif reads is not None:
            validate.one_of("layers: reads", reads, ["last"])
        allowed = [parameter for parameter in self.parameters if parameter != self.reading]
        for option in options:
            validate.one_of(f"layers: option of {name!r}", option, allowed)
        self.reads = reads
        self.options: dict[str, Any] = {name: _frozen(value) for name, value in options.items()}

    def to_dict(self) -> dict[str, Any]:
        """The options, ``reads`` among them where it is set."""
        return self.options if self.reads is None else {**self.options, "reads": self.reads}

    def __repr__(self) -> str:
        return f"Spec({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.to_dict().items())])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.name, self.to_dict()) == (other.name, other.to_dict())

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    ``layers`` is a pattern of mechanisms, by name or ``Spec``, repeated to ``n_layers``: with
    ``["window", "window", "full"]`` every third layer is full. ``head_dim`` is d_model / n_heads and ``d_ff``
    is 8/3 · d_model, rounded up to a multiple of 32, unless given; with 0 a layer has only its mechanism.
    ``norm`` is "rms" or "layer"; ``embed_norm`` adds one after the embedding.

    Options of some released models only:

    - ``norms``: where each part of a layer is normalised: its input ("pre"), its output ("post", OLMo 2) or
      both ("both", Gemma 2).
    - ``activation`` of the gated feed-forward, and its ``mlp_bias``.
    - ``experts``: a mixture of experts as the feed-forward of every layer, except of the ``dense_layers``
      (by number from 0), which have one of width ``d_ff``.
    - ``embed_scale`` multiplies the embeddings; ``head_bias`` is added to the logits, and ``logit_softcap``
      keeps them between its negative and itself: cap · tanh(logits / cap).
    - ``stop_tokens`` end a generated text, which is then filled up with ``pad_token`` (None: the first of
      them), if other texts of the batch go on.
    """

    vocab_size: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 8
    head_dim: int | None = None
    d_ff: int | None = None
    layers: Sequence[str | Spec] = ("full",)
    rope: RopeConfig | None = RopeConfig()
    norm: str = "rms"
    norm_eps: float = 1e-5
    embed_norm: bool = False
    tied: bool = True
    norms: Literal["pre", "post", "both"] = "pre"
    activation: str = "silu"
    mlp_bias: bool = False
    experts: MoEConfig | None = None
    dense_layers: Sequence[int] = ()
    embed_scale: float = 1.0
    head_bias: bool = False
    logit_softcap: float | None = None
    stop_tokens: Sequence[int] = ()
    pad_token: int | None = None

    def __post_init__(self) -> None:
        validate.fields_at_least(self, vocab_size=1, d_model=1, n_layers=1, n_heads=1)
        for name in ("embed_norm", "tied", "mlp_bias", "head_bias"):
            validate.instance(name, getattr(self, name), bool)
        for name, kind in (("rope", RopeConfig), ("experts", MoEConfig)):
            validate.instance(name, getattr(self, name), (kind, type(None)))
        if self.head_dim is not None:
            validate.fields_at_least(self, head_dim=1)
        if self.d_ff is not None:
            validate.fields_at_least(self, d_ff=0)
        validate.one_of("norm", self.norm, ("rms", "layer"))
        validate.one_of("norms", self.norms, ("pre", "post", "both"))
        validate.one_of("activation", self.activation, ACTIVATIONS)
        if validate.finite("norm_eps", self.norm_eps) < 0:
            raise ValueError(f"norm_eps: expected 0 or more, got {self.norm_eps}")
        validate.in_fp32("embed_scale", self.embed_scale)
        if self.logit_softcap is not None:
            validate.above("logit_softcap", validate.in_fp32("logit_softcap", self.logit_softcap), 0)
        if self.pad_token is not None:
            validate.fields_at_least(self, pad_token=-(2**63))
        for name in ("dense_layers", "stop_tokens"):
            numbers = _sequence(name, getattr(self, name))
            object.__setattr__(self, name, tuple(validate.at_least(name, n, -(2**63)) for n in numbers))
        for layer in self.dense_layers:
            validate.one_of("dense_layers", layer, range(self.n_layers))
        _sequence("layers", self.layers)
        validate.at_most("len(layers)", len(self.layers), self.n_layers, "n_layers")
        pattern = tuple(layer if isinstance(layer, Spec) else Spec(layer) for layer in self.layers)
        if not pattern:
            raise ValueError("layers: expected at least one mechanism, got none")
        object.__setattr__(self, "layers", pattern)
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", -(-8 * self.d_model // (3 * 32)) * 32)
        _ = self.owners  # raises if a layer reads one that does not exist

    @property
    def specs(self) -> list[Spec]:
        """One mechanism per layer: the pattern, repeated to ``n_layers``."""
        return [self.layers[i % len(self.layers)] for i in range(self.n_layers)]  # type: ignore[misc]

    @property
    def owners(self) -> list[int]:
        """For each layer, the layer whose keys and values it reads: itself, except for readers.

        Sources: Brandon et al., "Cross-Layer Attention" (2024; pairs and longer runs); Gemma 3n
        and Gemma 4 (2025, 2026: the last layers read the last unshared one of their type).
        """
        owners: list[int] = []
        for i, spec in enumerate(self.specs):
            alike = [j for j in range(i) if owners[j] == j and _same_kind(self.specs[j], spec)]
            if spec.reads is None:
                owners.append(i)
            elif spec.reads == "last" and alike:
                owners.append(alike[-1])
            elif spec.reads != "last" and i + spec.reads in alike:
                owners.append(i + spec.reads)
            else:
                source = "an earlier layer" if spec.reads == "last" else f"layer {i + spec.reads}"
                raise ValueError(
                    f"layers: layer {i}, {spec}, reads {source}; expected one of its kind and options with "
                    f"keys and values of its own: {alike or 'there is none'}"
                )
        return owners

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        fields = {name: _plain(value) for name, value in vars(self).items()}
        fields["layers"] = [
            [spec.name, {name: _plain(value) for name, value in spec.to_dict().items()}]
            for spec in self.layers
            if isinstance(spec, Spec)
        ]
        return fields

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ModelConfig":
        """The inverse of ``to_dict``."""
        fields = {name: _rich(value) for name, value in plain.items()}
        fields["layers"] = tuple(
            Spec(name, **{key: _rich(value) for key, value in options.items()})
            for name, options in plain["layers"]
        )
        return cls(**fields)


def _sequence(name: str, value: Any) -> Sequence[Any]:
    """A list or tuple; a text would be taken for its letters."""
    return validate.instance(name, value, (list, tuple))


def _frozen(value: Any) -> Any:
    """An option in the form that JSON gives back: texts and tuples in place of patterns, lists and specs."""
    if isinstance(value, Pattern):
        return str(value)
    if isinstance(value, Spec):
        return (value.name, value.to_dict())
    if isinstance(value, dict):
        return {name: _frozen(each) for name, each in value.items()}
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _same_kind(a: Spec, b: Spec) -> bool:
    return (a.name, a.options) == (b.name, b.options)


def _plain(value: Any) -> Any:
    """A RopeConfig as a dictionary with the name of its scaling; a MoEConfig as one with its fields."""
    if isinstance(value, MoEConfig):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if not isinstance(value, RopeConfig):
        return value
    kind = next((name for name, scaling in SCALINGS.items() if isinstance(value.scaling, scaling)), None)
    return {**asdict(value), "kind": kind}


def _rich(value: Any) -> Any:
    """The inverse of ``_plain``."""
    if isinstance(value, list):
        return [_rich(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "n_experts" in value:
        return MoEConfig(**value)
    if "theta" not in value:
        return {name: _rich(each) for name, each in value.items()}
    scaling = SCALINGS[value["kind"]](**value["scaling"]) if value["kind"] else None
    return RopeConfig(value["theta"], scaling)
