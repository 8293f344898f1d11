"""What a decoder is made of: ten plain fields, and a pattern of mechanisms repeated to the depth."""

from dataclasses import asdict, dataclass
from typing import Any

from kvlearn import expect
from kvlearn.attention import REGISTRY, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


class Spec:
    """A mechanism by its name in the registry, with options of its own: ``Spec("window", window=512)``."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = expect.one_of("layers", name, REGISTRY)
        self.options = options

    def __repr__(self) -> str:
        return f"Spec({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.options.items())])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.name, self.options) == (other.name, other.options)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    ``layers`` is a pattern of mechanisms, by name or ``Spec``, repeated to ``n_layers``: with
    ``["window", "window", "full"]`` every third layer is full. ``head_dim`` is d_model / n_heads and ``d_ff``
    is 8/3 · d_model, rounded up to a multiple of 32, unless given.
    """

    vocab_size: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 8
    head_dim: int | None = None
    d_ff: int | None = None
    layers: tuple[str | Spec, ...] = ("full",)
    rope: RopeConfig | None = RopeConfig()
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads"):
            expect.positive(name, getattr(self, name))
        pattern = tuple(layer if isinstance(layer, Spec) else Spec(layer) for layer in self.layers)
        if not pattern:
            raise ValueError("layers: expected at least one mechanism, got none")
        object.__setattr__(self, "layers", pattern)
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", -(-8 * self.d_model // (3 * 32)) * 32)

    @property
    def specs(self) -> list[Spec]:
        """One mechanism a layer: the pattern, repeated to the depth."""
        return [self.layers[i % len(self.layers)] for i in range(self.n_layers)]  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        plain = asdict(self)
        plain["layers"] = [[spec.name, spec.options] for spec in self.layers if isinstance(spec, Spec)]
        if self.rope and self.rope.scaling:
            kind = next(name for name, cls in SCALINGS.items() if isinstance(self.rope.scaling, cls))
            plain["rope"]["scaling"]["kind"] = kind
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ModelConfig":
        """The inverse of ``to_dict``."""
        fields = dict(plain)
        fields["layers"] = tuple(Spec(name, **options) for name, options in fields["layers"])
        if rope := fields["rope"]:
            scaling = dict(rope["scaling"] or {})
            kind = scaling.pop("kind", None)
            fields["rope"] = RopeConfig(rope["theta"], SCALINGS[kind](**scaling) if kind else None)
        return cls(**fields)
