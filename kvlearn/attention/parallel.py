"""Several mechanisms in one layer: each reads the same tokens, and their outputs are added.

    y = Σ_i mixer_i(x)                              Falcon-H1: attention and Mamba-2
    y = 1/n Σ_i w_i ⊙ RMSNorm(mixer_i(x))           Hymba: no output dominates by its size

Attention to a window keeps a few tokens exactly, a state keeps a summary of all; such a layer has both. Its
cache is the caches of its parts, and its bytes are the sum of theirs.
"""

import functools
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, REGISTRY, Cache, Mechanism, register
from kvlearn.attention.core import rms_norm_naive, upcast
from kvlearn.attention.rope import RopeConfig

Part = str | tuple[str, Mapping[str, Any]] | list[Any]  # a name in the registry, or (name, options)


class ParallelCache(Cache):
    """The caches of the parts, which always hold the same tokens."""

    def __init__(self, parts: list[Cache]) -> None:
        super().__init__(parts[0].batch, parts[0].max_len, parts[0].device)
        self.parts = parts

    @property
    def can_trim(self) -> bool:  # type: ignore[override]
        return all(part.can_trim for part in self.parts)

    def tensors(self) -> list[Tensor]:
        return [t for part in self.parts for t in part.tensors()]

    def trim(self, lengths: Int[Tensor, "B"]) -> None:
        for part in self.parts:
            part.check_lengths(lengths)
        super().trim(lengths)
        for part in self.parts:
            part.trim(lengths)

    def reset(self) -> None:
        self.length, self.lengths = 0, None
        for part in self.parts:
            part.reset()


@register("parallel")
class ParallelMixers(Mechanism):
    """The sum of several mechanisms, or the mean of their normalised outputs, over the same tokens.

    ``parts`` are names in the registry or pairs of a name and its options: ``("mamba2", ("window",
    {"window": 512}))``; in a model's pattern, specs: ``Spec("parallel", parts=["mamba2", Spec("window",
    window=512)])``. ``head_dim`` and ``rope`` are for the parts that take them, unless a part has its own;
    a part may have its own ``n_heads``. With ``normalise`` every output has an RMSNorm, whose weight scales
    its channels, and their mean is taken.

    Cache: those of all parts. With a state among the parts it cannot be trimmed.
    Sources: Zuo et al., "Falcon-H1" (2025), section 2 (the sum); Dong et al., "Hymba" (2024), section 2.1
    (the mean of normalised outputs; there before a common output projection, here after each part's own).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        parts: Sequence[Part] = ("window", "gated_delta"),
        normalise: bool = False,
        norm_eps: float = 1e-5,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        if not isinstance(parts, list | tuple) or not parts:
            raise ValueError(f"parts: expected at least one mechanism, as a list, got {parts!r}")
        validate.instance("normalise", normalise, bool)
        validate.above("norm_eps", norm_eps, 0)
        given = {"rope": rope} if head_dim is None else {"rope": rope, "head_dim": head_dim}
        self.mixers = nn.ModuleList(new_part(part, d_model, n_heads, given) for part in parts)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model, norm_eps) for _ in parts) if normalise else None
        self.chooses_by_content = any(mixer.chooses_by_content for mixer in self.mechanisms)
        self.no_weight_decay, self.auxiliary_parameters = (
            tuple(
                f"mixers.{i}.{name}"
                for i, mixer in enumerate(self.mechanisms)
                for name in getattr(mixer, listed)
            )
            for listed in ("no_weight_decay", "auxiliary_parameters")
        )

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The parts."""
        return list(self.mixers)  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        return " + ".join(mixer.label for mixer in self.mechanisms)

    def initialise(self) -> None:
        for mixer in self.mechanisms:
            mixer.initialise()

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, ParallelCache, source)
        caches = self.check_parts(cache, x.shape[1])
        outs = [mixer(x, part) for mixer, part in zip(self.mechanisms, caches, strict=True)]
        if cache is not None:
            cache.advance(x.shape[1])
        if self.norms is not None:
            outs = [norm(out) / len(outs) for norm, out in zip(self.norms, outs, strict=True)]
        return functools.reduce(torch.add, outs)

    def check_parts(self, cache: Cache | None, n_tokens: int) -> list[Cache] | list[None]:
        """The caches of the parts, if they fit; so that no part writes before another refuses."""
        if not isinstance(cache, ParallelCache):
            return [None] * len(self.mixers)
        cache.check_room(n_tokens)
        if len(cache.parts) != len(self.mixers):
            raise ValueError(f"cache: expected {len(self.mixers)} parts, got {len(cache.parts)}")
        if any(part.length != cache.length for part in cache.parts):  # a forward was interrupted
            raise ValueError(
                f"cache: expected parts of one length, got {[p.length for p in cache.parts]}; reset it"
            )
        return cache.parts

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        y = torch.zeros_like(upcast(x))
        for i, mixer in enumerate(self.mechanisms):
            out = upcast(mixer.naive(x))
            if self.norms is not None:
                out = rms_norm_naive(out, self.norms[i]) / len(self.mixers)  # type: ignore[arg-type]
            y = y + out
        return y.to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ParallelCache:
        return ParallelCache([mixer.new_cache(batch, max_len, dtype, device) for mixer in self.mechanisms])

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The sum over the parts."""
        return sum(mixer.cache_bytes(max_len, batch=batch, dtype=dtype) for mixer in self.mechanisms)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The sum over the parts."""
        return sum(mixer.read_bytes(length, batch=batch, dtype=dtype) for mixer in self.mechanisms)

    @classmethod
    def tiny(cls) -> "ParallelMixers":
        parts = (("window", {"window": 4}), ("gated_delta", {"key_dim": 6}))
        return cls(d_model=24, n_heads=3, parts=parts, normalise=True)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """A single part, full attention."""
        limit = cls(d_model=24, n_heads=3, parts=("full",))
        full = REGISTRY["full"](24, 3)  # type: ignore[call-arg]
        full.load_state_dict(limit.mixers[0].state_dict())
        return limit, full


def new_part(part: Part, d_model: int, n_heads: int, given: Mapping[str, Any]) -> Mechanism:
    """The mechanism that ``part`` names, with those of the options ``given`` that it takes and lacks."""
    name, own = part if isinstance(part, tuple | list) and len(part) == 2 else (part, {})
    if not isinstance(name, str) or not isinstance(own, Mapping):
        raise ValueError(f"parts: expected names, or pairs of a name and its options, got {part!r}")
    validate.one_of("parts", name, REGISTRY)
    allowed = list(signature(REGISTRY[name]).parameters)[1:]  # after d_model
    options = {**{key: value for key, value in given.items() if key in allowed}, **own}
    allowed = [each for each in allowed if each not in ("reader", "value_residual")]  # no part has a source
    for option in options:
        validate.one_of(f"parts: option of {name!r}", option, allowed)
    return REGISTRY[name](d_model, options.pop("n_heads", n_heads), **options)
