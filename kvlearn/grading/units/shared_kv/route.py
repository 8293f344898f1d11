"""02.4: learned routing made hard, held against a loop over heads in plain Python."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="02.4",
    slug="route",
    title="Harden a learned routing",
    answers=("harden", "keep_pools"),
    hints=(
        "Each row of `logits` belongs to one head. Its hard choice is the pool with the largest logit, "
        "`logits.argmax(dim=1)`; a softmax, at whatever temperature, would not change which one is "
        "largest.",
        "`torch.unique` gives the pools that occur in these choices, once each and in ascending order: "
        "that is `kept`.",
        "The choices are numbers of the old pools, and what stays is an array of U. "
        "`torch.unique(choices, return_inverse=True)` gives besides where each choice stands in `kept`: "
        "that is `route`.",
        "A pool's rows in the weight are a block of D = head_dim. Give the pools a dimension of their "
        "own, `weight.unflatten(0, (-1, head_dim))`, take `[kept]`, and flatten again.",
    ),
)

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def reference(logits: Tensor) -> tuple[list[int], list[int]]:
    """The pool that each head chooses, and the pools that are chosen at all."""
    chosen = [row.index(max(row)) for row in logits.tolist()]
    return chosen, sorted(set(chosen))


def indices(got: Any, what: str, t: Trial) -> list[int]:
    """A list or a tensor of whole numbers as a list, or the end of this round."""
    if isinstance(got, Tensor) and got.ndim == 1 and got.dtype in INTEGERS:
        return [int(i) for i in got]
    if isinstance(got, list | tuple) and all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in got
    ):
        return [int(i) for i in got]
    came = describe(got)
    t.true(False, f"{what}: whole numbers, of one dimension", came)
    raise Stop


def both(t: Trial, got: Any) -> tuple[Any, Any]:
    if isinstance(got, tuple | list) and len(got) == 2:
        return got[0], got[1]
    t.true(False, "the pair (route, kept)", describe(got))
    raise Stop


def logits_of(t: Trial, chosen: list[int], G: int) -> Tensor:
    """Logits of all signs whose largest of each row is the chosen pool's."""
    logits = t.randn(len(chosen), G)
    best = logits.amax(1) + 0.1 + torch.rand(len(chosen), generator=t.generator)
    return logits.scatter(1, torch.tensor(chosen)[:, None], best[:, None])


def some(t: Trial, pools: list[int], H: int) -> list[int]:
    """H choices among these pools: all of them, the lowest once only, and not by the first head."""
    chosen = pools + [t.pick(*pools[1:]) for _ in range(H - len(pools))]
    while chosen[0] == pools[0]:
        t.random.shuffle(chosen)
    return chosen


def used(t: Trial, G: int) -> list[int]:
    """Three of the G pools, or four; neither the first nor the last ones of all."""
    pools = sorted(t.random.sample(range(1, G), t.integer(3, 4)))
    return pools if pools != list(range(1, len(pools) + 1)) else [*pools[:-1], G - 1]


def same_route(t: Trial, harden: Answer, logits: Tensor) -> None:
    """``kept`` holds the pools that are chosen, and ``route`` leads each head to its own; the order of
    ``kept`` is asked for elsewhere."""
    chosen, pools = reference(logits)
    route, kept = both(t, harden(logits))
    kept, route = indices(kept, "kept", t), indices(route, "route", t)
    t.close(torch.tensor(sorted(kept)), torch.tensor(pools), "the pools kept:")
    inside = all(0 <= i < len(kept) for i in route)
    if t.true(
        inside, "route: places in kept, 0 … U−1", f"route: places 0 … {max(route, default=0)} of {len(kept)}"
    ):
        t.close(torch.tensor([kept[i] for i in route]), torch.tensor(chosen), "kept[route]:")


@EXERCISE.requirement(1, "every pool is chosen by a head")
def all_used(t: Trial, harden: Answer, keep_pools: Answer) -> None:
    """all pools are kept, and each head goes to the pool of its largest logit"""
    G = t.integer(3, 5)
    same_route(t, harden, logits_of(t, some(t, list(range(G)), G + t.integer(2, 5)), G))


@EXERCISE.requirement(2, "pools that no head chooses")
def unused(t: Trial, harden: Answer, keep_pools: Answer) -> None:
    """only the pools that are chosen are kept; route counts 0 … U−1 among those"""
    G = t.integer(7, 9)
    same_route(t, harden, logits_of(t, some(t, used(t, G), t.pick(6, 10, 11)), G))


@EXERCISE.requirement(1, "ties, and the order")
def ties(t: Trial, harden: Answer, keep_pools: Answer) -> None:
    """of equal largest logits the lowest pool; kept ascends; both are int64 tensors; logits unchanged"""
    G, H = 6, t.pick(7, 8)
    rest = [0] + [2] * (H - 2)
    t.random.shuffle(rest)
    logits = logits_of(t, [3, *rest], G)  # by number 0 comes first, by popularity 2, by the heads' order 3
    logits[:, 4:] = logits.amax(1, keepdim=True)
    logits = logits.to(t.pick(torch.float32, torch.bfloat16))
    if t.round == 1:
        logits = torch.zeros(H, G)
    chosen, pools = reference(logits)
    route, kept = both(t, harden(logits))
    t.close(kept, torch.tensor(pools), "kept:")
    t.close(route, torch.tensor([pools.index(pool) for pool in chosen]), "route:")
    t.unchanged()


@EXERCISE.requirement(1, "keep_pools: the smaller projection")
def smaller(t: Trial, harden: Answer, keep_pools: Answer) -> None:
    """the rows of the kept pools, (U·D, M), in the order of kept; the weight itself is unchanged"""
    D, G = t.pick(4, 5), t.pick(8, 9)
    kept = used(t, G)
    weight = t.randn(G * D, t.pick(11, 13))
    want = torch.cat([weight[pool * D : (pool + 1) * D] for pool in kept])
    t.close(keep_pools(weight, torch.tensor(kept), D), want, tolerance=0.0)
    t.unchanged()
