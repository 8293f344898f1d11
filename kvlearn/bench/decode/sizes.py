"""Which cases ``kvlearn bench decode`` measures: the grid of the bars, features of a cache, libraries."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvlearn.bench.decode.cases import FORMS, Case, new_case
from kvlearn.measure.units import GIB, KIB, MIB

# Form, batch, length.
Place = tuple[str, int, int]


def tiny_forms() -> dict[str, Case]:
    """The same ways of sharing heads, so small that a tile of the kernel holds them."""
    return {
        name: replace(
            form,
            n_heads=4,
            n_kv_heads=max(1, 4 * form.n_kv_heads // form.n_heads),
            head_dim=16,
            rope_dim=16 if form.rope_dim else 0,
        )
        for name, form in FORMS.items()
    }


def tiling_cases() -> tuple[Case, ...]:
    """A large case of each form of the kernel."""
    return (
        new_case("GQA 32/4", 32, 16 * KIB),
        new_case("MHA 32/32", 8, 16 * KIB),
        new_case("MQA 32/1", 128, 16 * KIB),
        new_case("MLA 128", 64, 8 * KIB),
        new_case("MLA 16", 64, 8 * KIB),
        new_case("GQA 32/4", 32, 16 * KIB, page=64),
        new_case("GQA 32/4", 32, 16 * KIB, page=16),
        new_case("GQA 64/8", 32, 16 * KIB, kv_dtype=torch.float8_e4m3fn),
        new_case("GQA 64/8", 32, 16 * KIB, kv_dtype=torch.int8),
        replace(new_case("GQA 32/4", 32, 16 * KIB, head_dim=64), form="GQA 32/4, D=64"),
        replace(new_case("GQA 32/4", 16, 16 * KIB, head_dim=256), form="GQA 32/4, D=256"),
    )


@dataclass(frozen=True)
class Sizes:
    """Cases as (form, batch, length in tokens)."""

    forms: dict[str, Case] = field(default_factory=lambda: FORMS)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    lengths: tuple[int, ...] = (KIB, 4 * KIB, 16 * KIB, 64 * KIB)
    stages: tuple[Place, ...] = (
        ("MHA 32/32", 1, 64 * KIB),
        ("MHA 32/32", 32, 4 * KIB),
        ("GQA 32/4", 1, 64 * KIB),
        ("GQA 32/4", 32, 4 * KIB),
    )
    window: int = 4 * KIB
    n_sinks: int = 4
    windowed: tuple[Place, ...] = (
        ("GQA 32/4", 32, 64 * KIB),
        ("MHA 32/32", 8, 64 * KIB),
        ("GQA 32/4", 32, 16 * KIB),
    )
    paged: tuple[Place, ...] = (
        ("GQA 32/4", 32, 4 * KIB),
        ("GQA 64/8", 8, 16 * KIB),
        ("MHA 32/32", 8, 16 * KIB),
        ("GQA 32/4", 1, 64 * KIB),
    )
    # The first row is so long, all others are as long as the last number.
    ragged: tuple[tuple[str, int, int, int], ...] = (
        ("GQA 32/4", 32, 64 * KIB, KIB),
        ("GQA 64/8", 128, 64 * KIB, KIB),
    )
    quantised: tuple[Place, ...] = (("GQA 64/8", 32, 16 * KIB), ("MHA 32/32", 8, 16 * KIB))
    few_heads: tuple[tuple[int, int], ...] = ((32, 16 * KIB), (64, 16 * KIB), (128, 16 * KIB))
    many_heads: tuple[tuple[int, int], ...] = ((64, 8 * KIB), (64, 16 * KIB), (64, 32 * KIB))
    flex: tuple[tuple[int, int], ...] = ((8, 16 * KIB), (1, 64 * KIB), (32, 4 * KIB))
    libraries: tuple[Place, ...] = (
        ("GQA 32/4", 32, 4 * KIB),
        ("GQA 64/8", 8, 16 * KIB),
        ("MHA 32/32", 8, 4 * KIB),
        ("GQA 32/4", 1, 64 * KIB),
    )
    stream: int = 2 * GIB  # bytes; more brings nothing
    product: int = 8192  # rows and columns
    # On a processor: batch and length of grouped heads, and of windows and latents.
    cpu: tuple[tuple[int, int], ...] = ((1, 4 * KIB), (4, 2 * KIB))
    cpu_long: tuple[int, int] = (1, 8 * KIB)
    cpu_window: int = KIB
    cpu_bytes: int = 512 * MIB  # of cache; none is larger
    # Tilings and splits.
    tilings: tuple[Case, ...] = field(default_factory=tiling_cases)
    splits: tuple[Place, ...] = (
        ("GQA 32/4", 1, 64 * KIB),
        ("GQA 32/4", 1, 4 * KIB),
        ("GQA 64/8", 8, 16 * KIB),
        ("MQA 32/1", 8, 16 * KIB),
        ("MHA 32/32", 1, 64 * KIB),
        ("MLA 16", 1, 64 * KIB),
    )
    split_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    choices: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "block_n": (16, 32, 64, 128),
            "num_stages": (2, 3, 4, 5, 6),
            "num_warps": (2, 4, 8),
            "block_h": (16, 32, 64),
        }
    )

    def case(self, form: str, batch: int, length: int, **changes: Any) -> Case:
        """A case of one of these forms."""
        return replace(self.forms[form], batch=batch, length=length, **changes)


SIZES = Sizes()
SMALL = Sizes(
    forms=tiny_forms(),
    batches=(1,),
    lengths=(16, 32),
    stages=(("GQA 32/4", 1, 32),),
    window=16,
    n_sinks=2,
    windowed=(("GQA 32/4", 1, 32), ("MHA 32/32", 1, 32)),
    paged=(("GQA 32/4", 1, 64),),
    ragged=(("GQA 32/4", 2, 32, 16),),
    quantised=(("GQA 64/8", 1, 32),),
    few_heads=((1, 32),),
    many_heads=((1, 32),),
    flex=((1, 32),),
    libraries=(("GQA 32/4", 1, 32),),
    stream=2**14,
    product=16,
    cpu=((1, 16),),
    cpu_long=(1, 64),
    cpu_window=16,
    cpu_bytes=2**16,
    tilings=(Case("GQA 32/4", batch=2, length=32, n_heads=4, n_kv_heads=2, head_dim=16),),
    splits=(("GQA 32/4", 2, 32),),
    split_counts=(1, 2),
    choices={"block_n": (16,), "num_warps": (4, 8)},
)
