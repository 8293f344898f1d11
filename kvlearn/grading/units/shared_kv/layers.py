"""02.5: which layer's keys and values each layer reads, held against the papers' rules spelt out."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="02.5",
    slug="layers",
    title="Which layer reads whose cache",
    answers=("cla_owners", "gemma_owners"),
    hints=(
        "Groups of `every` layers: layer i belongs to group i // every, and that group begins at layer (i "
        "// every) · every.",
        "Gemma: n_own = len(layer_types) − n_shared layers store, the first ones, and each of them is its "
        "own owner. Count n_own like this: a slice up to −n_shared is empty where n_shared is 0.",
        "A layer that shares looks among layers 0 … n_own − 1 only, for those of its own type, and takes "
        "the last. The layers that share are no candidates: they have nothing to be read.",
        "`max(i for i in range(n_own) if layer_types[i] == kind)` is that layer, and `max` of nothing "
        "raises ValueError all by itself. Better is one that says which type has no cache.",
    ),
)

FULL, WINDOW = "full_attention", "sliding_attention"


def cla(n_layers: int, every: int) -> list[int]:
    """Layer by layer: a new group begins after every so many."""
    owners: list[int] = []
    owner = 0
    for i in range(n_layers):
        if i - owner == every:
            owner = i
        owners.append(owner)
    return owners


def gemma(layer_types: list[str], n_shared: int) -> list[int]:
    """Layer by layer, remembering the last layer of each type that stored."""
    last: dict[str, int] = {}
    owners = []
    for i, kind in enumerate(layer_types):
        if i < len(layer_types) - n_shared:
            last[kind] = i
        owners.append(last[kind])
    return owners


def same(t: Trial, got: Any, want: list[int]) -> None:
    """A list, tuple or tensor of whole numbers."""
    if isinstance(got, Tensor) and got.ndim == 1 and not got.is_floating_point():
        got = got.tolist()
    if not isinstance(got, list | tuple) or not all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in got
    ):
        t.true(False, "a list of whole numbers, one a layer", describe(got))
        raise Stop
    t.close(torch.tensor([int(i) for i in got], dtype=torch.int64), torch.tensor(want), "the owners:")


def pattern(t: Trial, n_layers: int) -> list[str]:
    """Every third to fifth layer is full, counted from anywhere."""
    every = t.integer(3, 5)
    start = t.integer(0, every - 1)
    return [FULL if (i + start) % every == 0 else WINDOW for i in range(n_layers)]


@EXERCISE.requirement(1, "CLA: whole groups")
def whole_groups(t: Trial, cla_owners: Answer, gemma_owners: Answer) -> None:
    """the first layer of every group of `every` stores, and the others of the group read it"""
    every = t.integer(3, 5)
    n_layers = every * t.pick(*(n for n in (2, 3, 4, 6, 7) if n != every))
    same(t, cla_owners(n_layers, every), cla(n_layers, every))


@EXERCISE.requirement(1, "CLA: a rest, and the limits")
def rest(t: Trial, cla_owners: Answer, gemma_owners: Answer) -> None:
    """the last group may be smaller; every = 1 shares nothing, and a group may be larger than the model"""
    every = t.integer(3, 5)
    n_layers = every * t.integer(2, 4) + t.integer(1, every - 1)
    for size in (every, 1, n_layers + 2):
        same(t, cla_owners(n_layers, size), cla(n_layers, size))


@EXERCISE.requirement(1, "Gemma: one type of layer, or nothing shared")
def one_type(t: Trial, cla_owners: Answer, gemma_owners: Answer) -> None:
    """with n_shared = 0 each layer is its own owner; with one type all that share read the last that
    stores"""
    n_layers = t.integer(8, 12)
    kinds = [FULL] * n_layers
    n_shared = t.integer(2, n_layers // 2 - 1)
    same(t, gemma_owners(kinds, n_shared), gemma(kinds, n_shared))
    mixed = pattern(t, n_layers)
    same(t, gemma_owners(mixed, 0), gemma(mixed, 0))


@EXERCISE.requirement(2, "Gemma: two types of layers")
def two_types(t: Trial, cla_owners: Answer, gemma_owners: Answer) -> None:
    """a layer that shares reads the last layer *of its own type* that stores"""
    kinds = pattern(t, t.integer(16, 20))
    if t.round == 0:
        kinds = [FULL if (i + 1) % 5 == 0 else WINDOW for i in range(35)]
    # As many as leave both types at least two layers that store, and share a few of each.
    n_shared = 20 if t.round == 0 else t.pick(*(n for n in range(5, 8) if n != len(kinds) / 2))
    same(t, gemma_owners(kinds, n_shared), gemma(kinds, n_shared))


@EXERCISE.requirement(1, "Gemma: nobody to read from")
def nobody(t: Trial, cla_owners: Answer, gemma_owners: Answer) -> None:
    """ValueError where a layer is to share and no layer of its type stores"""
    n_layers = t.integer(6, 9)
    kinds = [WINDOW] * n_layers
    same(t, gemma_owners(kinds, 2), gemma(kinds, 2))
    kinds[t.integer(n_layers - 3, n_layers - 1)] = FULL
    t.raises(ValueError, lambda: gemma_owners(kinds, 3), "for a type that only layers that share have")
