"""02.5: the mistakes that people make with the map of layers: which one stores, and who may read it."""

from collections.abc import Callable

from kvlearn.grading.units.shared_kv.layers import EXERCISE, cla, gemma

__all__ = ["EXERCISE"]


def right_gemma(layer_types: list[str], n_shared: int) -> list[int]:
    return mapped(layer_types, n_shared, lambda of_type, i: of_type[-1])


def mapped(
    layer_types: list[str], n_shared: int, choose: Callable[[list[int], int], int], any_type: bool = False
) -> list[int]:
    """The owners, where ``choose`` picks one of the layers that store and are of the right type."""
    n_own = len(layer_types) - n_shared
    owners = list(range(n_own))
    for i in range(n_own, len(layer_types)):
        of_type = [j for j in range(n_own) if any_type or layer_types[j] == layer_types[i]]
        if not of_type:
            raise ValueError(f"layer_types: no layer of type {layer_types[i]!r} stores anything")
        owners.append(choose(of_type, i))
    return owners


@EXERCISE.misconception("the last layer of a group stores", gemma_owners=right_gemma)
def last_of_group(n_layers: int, every: int) -> list[int]:
    """A layer reads one that comes after it. When it runs, the later layer's keys do not exist yet: the owner
    is the *first* of the group."""
    return [min(i // every * every + every, n_layers) - 1 for i in range(n_layers)]


@EXERCISE.misconception("each reader reads the layer just before", gemma_owners=right_gemma)
def chained(n_layers: int, every: int) -> list[int]:
    """Layer i reads layer i − 1, which may be a reader itself and has nothing to be read. All readers of a
    group read the one that stores. (In groups of two it is the same layer.)"""
    return [i if i % every == 0 else i - 1 for i in range(n_layers)]


@EXERCISE.misconception("all readers read layer 0", gemma_owners=right_gemma)
def all_read_first(n_layers: int, every: int) -> list[int]:
    """Every reader was sent to layer 0. Each group has an owner of its own, the layer with which it begins,
    so that what is read was computed not far below."""
    return [0 if i % every else i for i in range(n_layers)]


@EXERCISE.misconception("the place in the group", gemma_owners=right_gemma)
def modulo(n_layers: int, every: int) -> list[int]:
    """i % every counts 0, 1, 2 within each group. Asked for is the layer with which the group begins:
    i − i % every, or i // every · every."""
    return [i % every for i in range(n_layers)]


@EXERCISE.misconception("the number of the group", gemma_owners=right_gemma)
def group_number(n_layers: int, every: int) -> list[int]:
    """i // every counts the groups 0, 1, 2 … It is the number of the cache, and would do as an index into a
    list of caches; asked for is the layer that fills it, (i // every) · every."""
    return [i // every for i in range(n_layers)]


@EXERCISE.misconception("so many groups, not groups of so many", gemma_owners=right_gemma)
def number_of_groups(n_layers: int, every: int) -> list[int]:
    """The layers were cut into `every` groups. `every` is how many layers share one cache: with 32 layers and
    every = 2 there are 16 groups of two."""
    size = max(n_layers // every, 1)
    return [i // size * size for i in range(n_layers)]


@EXERCISE.misconception("one reader too many", gemma_owners=right_gemma)
def one_too_many(n_layers: int, every: int) -> list[int]:
    """`every` layers read each owner besides itself, so a group has every + 1 layers. In the paper's count
    the owner is one of the group: CLA2 is one that stores and one that reads."""
    return cla(n_layers, every + 1)


@EXERCISE.misconception("groups counted from layer 1", gemma_owners=right_gemma)
def from_one(n_layers: int, every: int) -> list[int]:
    """Layer 0 was left to itself and the groups begin after it. Layers count from 0 here, and the first group
    is layers 0 … every − 1."""
    return [0, *(1 + owner for owner in cla(n_layers - 1, every))]


@EXERCISE.misconception("the last that stores, of whatever type", cla_owners=cla)
def any_type(layer_types: list[str], n_shared: int) -> list[int]:
    """All layers that share read the very last one that stores. A layer with a window has forgotten what a
    full one needs, its heads may have another width and its angles another base: read the last of the *same*
    type."""
    return mapped(layer_types, n_shared, lambda of_type, i: of_type[-1], any_type=True)


@EXERCISE.misconception("the first layer of the type", cla_owners=cla)
def first_of_type(layer_types: list[str], n_shared: int) -> list[int]:
    """`list.index` finds the first layer of a type. Gemma reads the *last* one that stores, whose keys are
    closest to what the later layers would have made themselves."""
    return mapped(layer_types, n_shared, lambda of_type, i: of_type[0])


@EXERCISE.misconception("the last of the type in the whole model", cla_owners=cla)
def last_of_all(layer_types: list[str], n_shared: int) -> list[int]:
    """The last layer of each type was looked for among all layers. It is one that shares: it stores nothing,
    and it comes too late. Look among the first L − n_shared layers only."""
    right_gemma(layer_types, n_shared)
    last = {kind: i for i, kind in enumerate(layer_types)}
    n_own = len(layer_types) - n_shared
    return [i if i < n_own else last[kind] for i, kind in enumerate(layer_types)]


@EXERCISE.misconception("one layer too many shares", cla_owners=cla)
def off_by_one(layer_types: list[str], n_shared: int) -> list[int]:
    """n_shared + 1 layers read. The last n_shared layers are those from L − n_shared on: the comparison is
    `i < n_own` for a layer that stores, with n_own = L − n_shared."""
    return right_gemma(layer_types, n_shared + 1)


@EXERCISE.misconception("a reader reads a reader", cla_owners=cla)
def nearest(layer_types: list[str], n_shared: int) -> list[int]:
    """The nearest earlier layer of the type was taken, whether it stores or not. Behind the first one that
    shares, that is a layer without keys of its own. Look among the first L − n_shared layers only."""
    owners = right_gemma(layer_types, n_shared)
    for i in range(len(layer_types) - n_shared, len(layer_types)):
        owners[i] = max(j for j in range(i) if layer_types[j] == layer_types[i])
    return owners


@EXERCISE.misconception("the first layers share", cla_owners=cla)
def first_share(layer_types: list[str], n_shared: int) -> list[int]:
    """The first n_shared layers read a later one of their type, which has not run yet when they need it. It
    is the last layers that share: keys can only be handed upwards."""
    n_layers = len(layer_types)
    upside_down = right_gemma(layer_types[::-1], n_shared)[::-1]
    return [n_layers - 1 - owner for owner in upside_down]


@EXERCISE.misconception("n_shared layers store", cla_owners=cla)
def n_shared_store(layer_types: list[str], n_shared: int) -> list[int]:
    """The first n_shared layers store and all others read. n_shared is how many *read*: in Gemma 4 E2B it is
    20 of 35, and 15 store."""
    return (
        right_gemma(layer_types, len(layer_types) - n_shared) if n_shared else list(range(len(layer_types)))
    )


@EXERCISE.misconception("n_shared = 0 taken for everything", cla_owners=cla)
def minus_zero(layer_types: list[str], n_shared: int) -> list[int]:
    """With n_shared = 0, `layer_types[-n_shared:]` is `layer_types[0:]`: the whole list, and with
    `[:-n_shared]` nothing is left. A slice from the end knows no zero. Count from the front:
    n_own = len(layer_types) − n_shared."""
    if n_shared == 0:
        return [*range(len(layer_types)), *gemma(layer_types, 0)]
    return right_gemma(layer_types, n_shared)


@EXERCISE.misconception("nobody to read from, and no error", cla_owners=cla)
def own_after_all(layer_types: list[str], n_shared: int) -> list[int]:
    """Where no layer of its type stores, a layer that shares was given some answer after all: itself, or
    nothing. It has no weights for keys and values and nobody to read from, so the map describes a model that
    cannot run: raise ValueError."""
    try:
        return right_gemma(layer_types, n_shared)
    except ValueError:
        n_own = len(layer_types) - n_shared
        last = {kind: i for i, kind in enumerate(layer_types[:n_own])}
        return [i if i < n_own else last.get(kind, i) for i, kind in enumerate(layer_types)]


@EXERCISE.misconception("counted within the type", cla_owners=cla)
def within_type(layer_types: list[str], n_shared: int) -> list[int]:
    """The owner was given by its place among the layers of its type: the third full layer, say, as 2. Asked
    for is its place in the model, counted over all layers."""
    places = [layer_types[:i].count(kind) for i, kind in enumerate(layer_types)]
    return [places[owner] for owner in right_gemma(layer_types, n_shared)]
