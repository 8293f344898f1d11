"""Unit 08: requirements and hints of the exercises on ring attention."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvlearn import workbench
from kvlearn.attention.core import Partial, attend_partial, merge_heads, split_heads
from kvlearn.attention.core import merge as merge_two
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Raised,
    Stop,
    describe,
    largest_new_tensor,
    new_tensors,
    place_of,
    plain_number,
)
from kvlearn.parallel.layout import ORDERS, Layout
from kvlearn.parallel.processes import RankFailed, launch
from kvlearn.parallel.ring import Messages, PeerLost

Positions = list[list[int]]
Part = tuple[Tensor, Tensor]


def nested(value: Any) -> Any:
    """Tuples, ranges, arrays and tensors as lists of plain numbers."""
    if value is None or isinstance(value, str):
        return value
    number = plain_number(value)
    if number is not None:
        return number
    if isinstance(value, list | tuple | range):
        return [nested(each) for each in value]
    if hasattr(value, "tolist"):
        return nested(value.tolist())
    return describe(value)


def same_value(t: CheckContext, got: Any, want: Any, what: str) -> bool:
    """A nest of lists of numbers, whatever kinds of sequence it is made of."""
    came = nested(got)
    text = describe(got) if isinstance(came, str) and not isinstance(got, str) else repr(came)
    return t.note(text[:900], None if came == want else Difference(what, repr(want)[:200], text[:200]))


def held_by(order: Any, n_tokens: int, world: int) -> Positions:
    """The position in each slot of each rank; -1 is padding."""
    layout = Layout(n_tokens, world, order)
    return [layout.positions(rank).tolist() for rank in range(world)]


# 08.1: partial results merged one after the other, compared with the softmax over all keys in fp64

merge = Exercise(
    id="08.1",
    slug="merge",
    title="Merge what comes, in any order",
    answers=("merge", "finish"),
    hints=(
        "Two devices report averages of different numbers of measurements. What must each report beside its "
        "average, so that a third can compute the average of all? Which of the two numbers here plays that "
        "part?",
        "In pseudocode: common = the lse of both together; each output counts exp(its lse − common). The new "
        "output is their sum, the new lse is `common`. Keep both in fp32 and convert in `finish`.",
        "lse of both = larger + log(exp(a − larger) + exp(b − larger)); `torch.logaddexp(a, b)` does just "
        "that. Nothing overflows, since no exponent is above 0.",
        "Where both are empty, common is −inf, and −inf − (−inf) is NaN: subtract 0 there. And 0 · NaN is "
        "NaN: put 0 into the output of an empty row before you multiply.",
    ),
)


def exact_part(scores: Tensor, v: Tensor) -> Part:
    """Output and log-sum-exp of keys with these scores (B, H, T, S), in the dtype of both."""
    lse = scores.logsumexp(-1)
    largest = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(scores - largest[..., None]) @ v, lse


@dataclass
class Draw:
    """Partial results in fp32, and what they make together in fp64."""

    parts: list[Part]
    out: Tensor
    lse: Tensor


def drawn_parts(
    t: CheckContext,
    n: int,
    shifts: Sequence[float] = (0.0,),
    mask: bool = False,
    dtype: torch.dtype = torch.float32,
    row_shift: float = 0.0,
) -> Draw:
    """``n`` parts of two to four keys each; the scores of part i lie around ``shifts[i]``.

    In row 0 all scores are larger by ``row_shift``.
    """
    B, H, T, D = 2, t.pick(3, 5, 6), t.integer(2, 4), t.pick(4, 8)
    sizes = [t.integer(2, 4) for _ in range(n)]
    scores = t.randn(B, H, T, sum(sizes), dtype=torch.float64)
    centre = torch.cat([torch.full((s,), float(shifts[i % len(shifts)])) for i, s in enumerate(sizes)])
    scores = scores + centre.double()
    scores[:, :, 0] += row_shift
    v = t.randn(B, H, sum(sizes), D, dtype=torch.float64) + 1
    pieces = list(scores.split(sizes, dim=-1))
    if mask:  # row 0 sees nothing of the first part, row 1 nothing of the last
        pieces[0][:, :, 0] = -torch.inf
        pieces[-1][:, :, 1] = -torch.inf
    parts = [exact_part(s, each) for s, each in zip(pieces, v.split(sizes, dim=2), strict=True)]
    out, lse = exact_part(torch.cat(pieces, dim=-1), v)
    return Draw([(o.to(dtype), each.float()) for o, each in parts], out, lse)


def fold(
    t: CheckContext,
    merge: Answer,
    finish: Answer,
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-4,
) -> None:
    state = None
    for out, lse in draw.parts:
        state = merge(state, (out, lse))
    got = t.pair(finish(state, dtype), "a pair (out, lse)")
    want = f"{dtype}, {torch.float32}"
    came = ", ".join(str(getattr(x, "dtype", describe(x))) for x in got)
    t.note(came, None if came == want else Difference("dtypes of (out, lse):", want, came))
    t.close(got[0], draw.out.to(dtype), "out", tolerance=tolerance)
    t.close(got[1], draw.lse.float(), "lse", tolerance=1e-4)


def numbers_in(value: Any) -> int:
    """All numbers of the tensors in a value: in lists and mappings, and in the attributes of objects."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, list | tuple | set):
        return sum(map(numbers_in, value))
    if isinstance(value, Mapping):
        return sum(map(numbers_in, value.values()))
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return sum(map(numbers_in, vars(value).values()))
    return 0


@merge.requirement(2, "two parts")
def merge_two_parts(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """output and lse as if all keys had been seen together; the inputs are not changed"""
    fold(t, merge, finish, drawn_parts(t, 2, (0.0, 1.0)))
    t.unchanged()


@merge.requirement(1, "one part, and more than two in any order")
def merge_many(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """one to six parts; the order in which they come changes nothing"""
    draw = drawn_parts(t, (1, 4, 6)[t.round], (0.0, 2.0, -1.0))
    fold(t, merge, finish, draw)
    t.random.shuffle(draw.parts)
    fold(t, merge, finish, draw)


@merge.requirement(1, "rows without keys")
def merge_empty(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """rows with lse = −inf count nothing; rows without any key give out = 0 and lse = −inf"""
    draw = drawn_parts(t, 3, mask=True)
    if t.round:  # a row that no part has a key for
        for out, lse in draw.parts:
            out[0, 0, 0], lse[0, 0, 0] = 0.0, -torch.inf
        draw.out[0, 0, 0], draw.lse[0, 0, 0] = 0.0, -torch.inf
    fold(t, merge, finish, draw)


@merge.requirement(1, "NaN in rows without keys")
def merge_nan(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """where lse = −inf, the numbers in out have no effect, even if it is NaN; the inputs are not changed"""
    draw = drawn_parts(t, 3, mask=True)
    for out, lse in draw.parts:
        out[lse == -torch.inf] = 5.0 if t.round == 2 else torch.nan
    if t.round == 1:
        draw.parts.reverse()
    fold(t, merge, finish, draw)
    t.unchanged()


@merge.requirement(1, "large scores")
def merge_large(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """scores around 150, around −150, of both sizes in one tensor, and parts that are 900 apart"""
    shifts, row_shift = (((150.0,), 0.0), ((-150.0,), 300.0), ((-900.0, 0.0, 900.0), 0.0))[t.round]
    fold(t, merge, finish, drawn_parts(t, 3, shifts, row_shift=row_shift), tolerance=1e-3)


@merge.requirement(1, "outputs in fp16")
def merge_half(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """outputs come in fp16, each lse in fp32; so does the result, with `dtype` for the output"""
    draw = drawn_parts(t, 4, (70.0, 70.5), dtype=torch.float16)
    fold(t, merge, finish, draw, torch.float16, tolerance=1e-2)


@merge.requirement(1, "a state that does not grow")
def merge_state(t: CheckContext, merge: Answer, finish: Answer) -> None:
    """after twelve parts the state holds at most three times the numbers of one part"""
    draw = drawn_parts(t, 12)
    state = None
    for part in draw.parts:
        state = merge(state, part)
    n, one = numbers_in(state), numbers_in(draw.parts[0])
    t.true(n <= 3 * one, f"at most {3 * one} numbers", f"{n} numbers")
    got = t.pair(finish(state, torch.float32), "a pair (out, lse)")
    t.close(got[0], draw.out.float(), "out", tolerance=1e-3)


# 08.2: who needs which block, compared with the visible pairs of all positions

plan = Exercise(
    id="08.2",
    slug="plan",
    title="Who needs which block when",
    answers=("hops", "timetable"),
    hints=(
        "Take three ranks with two tokens each, on paper: whose block lies at rank 0 after one step, if "
        "everything moves to the next rank? And which two positions decide whether rank 0 has use for it?",
        "A helper `sees(queries, keys, causal, window)` that is True if any pair (i, j) is visible answers "
        "both questions. Do not reason about ranks: the order of the tokens may be any.",
        "A pair is visible if neither is −1, and j ≤ i where it is causal, and i − j < window where there is "
        "a window.",
        "`hops`: in step s the block of o is at rank (o + direction · s) mod P. Its way ends at the *last* "
        "rank that needs it, and goes through ranks that do not.",
        "`timetable`: the block at rank r in step s is that of (r − direction · s) mod P. There are 1 + "
        "max(hops) steps. A rank that does not see the block gets None.",
    ),
)


def visible(queries: list[int], keys: list[int], causal: bool, window: int | None) -> bool:
    i, j = torch.tensor(queries, dtype=torch.long)[:, None], torch.tensor(keys, dtype=torch.long)[None]
    mask = (i >= 0) & (j >= 0)
    if causal:
        mask &= i - j >= 0
    if window is not None:
        mask &= i - j <= window - 1
    return bool(mask.any())


def plan_reference(
    queries: Positions, keys: Positions, causal: bool = True, window: int | None = None, direction: int = 1
) -> tuple[list[int], list[list[int | None]]]:
    """The ways of all blocks, and the timetable."""
    P = len(keys)
    ways, cells = [0] * P, {}
    for owner in range(P):
        for rank in range(P):
            if visible(queries[rank], keys[owner], causal, window):
                step = direction * (rank - owner) % P
                ways[owner] = max(ways[owner], step)
                cells[step, rank] = owner
    return ways, [[cells.get((step, rank)) for rank in range(P)] for step in range(1 + max(ways))]


def same_plan(
    t: CheckContext, hops: Answer, timetable: Answer, queries: Positions, keys: Positions, *rule: Any
) -> None:
    ways, table = plan_reference(queries, keys, *rule)
    same_value(t, hops(queries, keys, *rule), ways, "hops:")
    same_value(t, timetable(queries, keys, *rule), table, "timetable:")


@plan.requirement(1, "every query sees every key")
def plan_all(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """without a mask every block goes all the way, and every rank has work in every step"""
    P = (3, 4, 5)[t.round]
    held = held_by(ORDERS[t.round], P * 2 * t.integer(1, 2), P)
    same_plan(t, hops, timetable, held, held, False)


@plan.requirement(1, "causal, tokens in contiguous order")
def plan_contiguous(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """None where a rank holds a block whose tokens all come later"""
    P = (4, 3, 5)[t.round]
    held = held_by("contiguous", P * t.integer(2, 4), P)
    same_plan(t, hops, timetable, held, held)


@plan.requirement(1, "causal, other orders")
def plan_orders(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """striped, zig-zag, and whole blocks that lie on other ranks: the positions decide, not the ranks"""
    P = (4, 3, 5)[t.round]
    if t.round < 2:
        held = held_by(ORDERS[1 + t.round], P * 4, P)
    else:
        held = [held_by("contiguous", 3 * P, P)[rank] for rank in (3, 0, 4, 2, 1)]
    same_plan(t, hops, timetable, held, held)


@plan.requirement(2, "windows")
def plan_window(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """a query sees itself and window − 1 tokens before it; a block stops where nobody further on needs it"""
    P, C = (4, 5, 4)[t.round], 2 * t.integer(1, 2) + 1
    order, window = (("contiguous", C + 1), ("striped", P - 1), ("zigzag", 1))[t.round]
    held = held_by(order, P * (C + t.round % 2 if order != "zigzag" else 4), P)
    same_plan(t, hops, timetable, held, held, True, window)


@plan.requirement(1, "the other direction")
def plan_direction(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """direction −1: blocks go from rank r to rank r − 1"""
    P, C = (4, 5, 3)[t.round], t.integer(2, 4)
    held = held_by("contiguous", P * C, P)
    same_plan(t, hops, timetable, held, held, True, (None, C + 1, C + 1)[t.round], -1)


@plan.requirement(1, "padding")
def plan_padding(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """slots of position −1 see nothing and are seen by nobody; a rank may hold nothing else, or position 0
    alone"""
    P, n = ((4, 5), (4, 3), (3, 4))[t.round]
    held = held_by("contiguous", n, P)
    same_plan(t, hops, timetable, held, held, t.round != 2)


@plan.requirement(1, "decode")
def plan_decode(t: CheckContext, hops: Answer, timetable: Answer) -> None:
    """queries are the newest tokens alone, on one rank or two; the keys are those of the whole text"""
    P = (3, 4, 5)[t.round]
    n = P * t.integer(3, 5)
    keys = held_by("striped" if t.round else "contiguous", n, P)
    queries: Positions = [[] for _ in range(P)]
    for new in range(1 + t.round % 2):
        queries[(1 + 2 * new) % P].append(n - 1 - new)
    same_plan(t, hops, timetable, queries, keys, True, (None, 3, P + 1)[t.round])


# 08.3: bytes, compared with a ring that is walked message by message

count = Exercise(
    id="08.3",
    slug="bytes",
    title="Count what each rank sends",
    answers=("forward_bytes", "backward_bytes"),
    hints=(
        "Follow one block on its way of two hops from rank 3 of 4. Which ranks send it? Does the last one "
        "that gets it send it too? Then ask the same for its gradient, which has to end where it began.",
        "Three helpers: numbers of a block; blocks of keys that each rank sends; gradients that each rank "
        "sends home. For every rank the bytes are a sum of products of these.",
        "Rank r sends the block of owner o if it lies on the way, not at its end: (r − o) mod P < hops[o].",
        "A latent is one vector of rank + rope numbers per token: no heads, no factor 2. Keys and values of "
        "heads: 2 · G · D.",
        "Backward: each sent block takes its numbers · size, and its gradient goes with it in 4 bytes per "
        "number at least. The rank (o + hops[o]) mod P sends the gradient of o once more, home, if the block "
        "travelled at all.",
    ),
)


def drawn_heads(t: CheckContext, dtype: str = "bfloat16") -> dict[str, Any]:
    H, G = t.pick((12, 4), (10, 2), (21, 7))
    return {"kind": "heads", "n_heads": H, "n_kv_heads": G, "head_dim": t.pick(48, 64, 96), "dtype": dtype}


def drawn_latent(t: CheckContext, dtype: str = "bfloat16") -> dict[str, Any]:
    return {
        "kind": "latent",
        "n_heads": t.pick(12, 16, 24),
        "rank": t.pick(256, 320, 512),
        "rope": t.pick(32, 48, 64),
        "dtype": dtype,
    }


def walked(
    layer: Mapping[str, Any], batch: int, per_rank: int, hops: Sequence[int], backward: bool
) -> list[int]:
    """Every message of a pass, one after the other, on the account of its sender."""
    P = len(hops)
    per_token = (
        layer["rank"] + layer["rope"]
        if layer["kind"] == "latent"
        else sum(2 * layer["head_dim"] for _ in range(layer["n_kv_heads"]))
    )
    size = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[layer["dtype"]]
    block, gradient = (batch * per_rank * per_token * each for each in (size, max(size, 4)))
    sent = [0] * P
    for owner in range(P):
        at = owner
        for _ in range(hops[owner]):
            sent[at] += block + (gradient if backward else 0)
            at = (at + 1) % P
        if backward and at != owner:
            sent[at] += gradient
    return sent


def same_bytes(
    t: CheckContext, answers: Sequence[Answer], layer: dict[str, Any], hops: list[int], *passes: str
) -> None:
    batch, per_rank = t.integer(2, 5), t.integer(100, 900)
    for name in passes:
        answer = answers[name == "backward"]
        want = walked(layer, batch, per_rank, hops, name == "backward")
        same_value(t, answer(layer, batch, per_rank, list(hops)), want, f"{name}:")


def uneven(t: CheckContext) -> list[int]:
    """Ways of which some end early, and one block that stays at home; no rotation maps it on itself."""
    return [[3, 1, 0, 2], [1, 4, 2, 0, 2], [0, 1, 2]][t.round]


@count.requirement(1, "grouped queries, forward")
def count_heads(t: CheckContext, *answers: Answer) -> None:
    """keys and values of the KV heads, all rows of the batch; P − 1 blocks per rank if all go all the way"""
    P = t.integer(3, 6)
    same_bytes(t, answers, drawn_heads(t), [P - 1] * P, "forward")


@count.requirement(1, "latents, forward")
def count_latent(t: CheckContext, *answers: Answer) -> None:
    """one vector of rank + rope numbers per token, whatever the heads"""
    P = t.integer(3, 6)
    same_bytes(t, answers, drawn_latent(t), [P - 1] * P, "forward")


@count.requirement(2, "blocks that stop early")
def count_uneven(t: CheckContext, *answers: Answer) -> None:
    """each rank sends the blocks that lie on it and still have a way to go"""
    same_bytes(t, answers, drawn_heads(t), uneven(t), "forward")


@count.requirement(1, "backward, all the way")
def count_backward(t: CheckContext, *answers: Answer) -> None:
    """keys and values once more; with each block its gradient in fp32, which at the end is sent home"""
    P = t.integer(3, 6)
    same_bytes(t, answers, drawn_heads(t), [P - 1] * P, "backward")


@count.requirement(1, "backward, latents and blocks that stop early")
def count_home(t: CheckContext, *answers: Answer) -> None:
    """the last rank of a way sends the gradient home; what never left sends nothing"""
    same_bytes(t, answers, drawn_latent(t), uneven(t), "backward")


@count.requirement(1, "other dtypes")
def count_dtype(t: CheckContext, *answers: Answer) -> None:
    """fp32 and fp64: a gradient has 4 bytes per number, or as many as the numbers themselves if these have
    more"""
    layer = (drawn_heads, drawn_latent)[t.round % 2](t, ("float32", "float64", "float16")[t.round])
    same_bytes(t, answers, layer, uneven(t), "forward", "backward")


# 08.4: a distribution of tokens, of which only what the task promises is checked

balance = Exercise(
    id="08.4",
    slug="balance",
    title="No rank idles",
    answers=("assign", "idle"),
    hints=(
        "Why does striping work for one causal text, and what would a text look like for which every "
        "world-th token is a cheap one? What about the tokens should be dealt out, if not their places?",
        "`assign`: two ranks whose tokens, taken in pairs, cost nearly the same have nearly the same work. "
        "In which order must the tokens be for that?",
        "Sort the positions by cost and deal them out like cards: rank r gets every world-th of the sorted "
        "ones, from the r-th on. Then one rank's k-th token costs no more than the next rank's, and no less "
        "than the next rank's (k − 1)-th.",
        "`idle` in pseudocode: for each step: the pairs of every rank with the block of (rank − step) mod P; "
        "the step lasts as long as the largest of them. idle = 1 − all pairs / (P · the sum of the largest).",
    ),
)


def fair(t: CheckContext, assign: Answer, costs: list[int], world: int) -> None:
    """Every token once, as many tokens as any other rank but for one, and nearly the same work."""
    came = assign(list(costs), world)
    shares = nested(came)
    good = isinstance(shares, list) and len(shares) == world and all(isinstance(s, list) for s in shares)
    if not good:
        t.note(repr(shares)[:300], Difference("", f"a list of {world} lists", describe(came)))
        raise Stop
    whole = sorted((each for share in shares for each in share), key=repr)
    if whole != sorted(range(len(costs)), key=repr):
        once = f"every position of 0 … {len(costs) - 1} once"
        t.note(repr(shares)[:900], Difference("", once, f"{len(whole)} entries, which are not these"))
        raise Stop
    sizes = [len(share) for share in shares]
    work = [sum(costs[position] for position in share) for share in shares]
    value = f"{sizes} {work}"
    if max(sizes) - min(sizes) > 1:
        t.note(value, Difference("", "numbers of tokens that differ by 1 at most", f"{sizes}"))
    elif max(work) - min(work) > max(costs):
        want = f"work that differs by {max(costs)} at most"
        t.note(value, Difference("", want, f"{work}, which differs by {max(work) - min(work)}"))
    else:
        t.note("fair", None)


def documents(lengths: Sequence[int]) -> list[int]:
    """The costs of documents in one sequence: a token sees its own document up to itself."""
    return [i + 1 for length in lengths for i in range(length)]


@balance.requirement(1, "one causal text")
def balance_causal(t: CheckContext, assign: Answer, idle: Answer) -> None:
    """every position once, as many for each rank, and work that differs by the largest cost at most"""
    P = (3, 4, 5)[t.round]
    fair(t, assign, documents([2 * P * t.integer(5, 8)]), P)


@balance.requirement(1, "a length that does not divide")
def balance_ragged(t: CheckContext, assign: Answer, idle: Answer) -> None:
    """some ranks have one token more; the same bound on the work"""
    P = (4, 3, 5)[t.round]
    fair(t, assign, documents([P * 2 * t.integer(5, 8) + (1, P - 1, 2)[t.round]]), P)


@balance.requirement(2, "windows and documents")
def balance_documents(t: CheckContext, assign: Answer, idle: Answer) -> None:
    """the costs decide: a window; many short documents, as long as there are ranks or twice; a long one
    before short ones, also of one token each"""
    P = (4, 3, 5)[t.round]
    if t.round == 0:
        window, n = 9, 2 * P * t.integer(12, 15)
        costs = [min(i + 1, window) for i in range(n)]
    elif t.round == 1:
        costs = documents([2 * P] * (2 * t.integer(8, 12)) + [P])
    else:
        c = t.integer(8, 10)
        costs = documents([P * c] + [P] * c)
        fair(t, assign, documents([P + 1] + [1] * (6 * P)), P)
    fair(t, assign, costs, P)


def idle_reference(held: Positions) -> float:
    P = len(held)
    pairs = torch.zeros(P, P)  # by step and rank
    for rank in range(P):
        for owner in range(P):
            i, j = torch.tensor(held[rank])[:, None], torch.tensor(held[owner])[None]
            pairs[(rank - owner) % P, rank] = ((j >= 0) & (j <= i)).sum()
    return float(1 - pairs.sum() / (P * pairs.amax(dim=1).sum()))


def same_idle(t: CheckContext, idle: Answer, held: Positions) -> None:
    want, got = idle_reference(held), plain_number(came := idle(held))
    if got is None:
        t.note(came, Difference("idle:", f"{want:.4f}", describe(came)))
        return
    good = math.isfinite(got) and abs(got - want) < 1e-5
    t.note(f"{got:.4f}", None if good else Difference("idle:", f"{want:.4f}", f"{got:.4f}"))


@balance.requirement(1, "idle, contiguous order")
def balance_contiguous(t: CheckContext, assign: Answer, idle: Answer) -> None:
    """each step lasts as long as the rank with the most visible pairs in it"""
    P = (3, 4, 5)[t.round]
    same_idle(t, idle, held_by("contiguous", P * t.integer(3, 5), P))


@balance.requirement(1, "idle, other orders")
def balance_orders(t: CheckContext, assign: Answer, idle: Answer) -> None:
    """striped, zig-zag, and pieces of the text that lie on any rank: in each step another rank may be late"""
    P, n = (4, 5, 4)[t.round], t.integer(2, 3)
    if t.round < 2:
        held = held_by(ORDERS[1 + t.round], 2 * P * n, P)
    else:
        held = [
            [piece * n + i for piece in pieces for i in range(n)]
            for pieces in ((0, 7), (3, 4), (5, 6), (1, 2))
        ]
    same_idle(t, idle, held)


@balance.requirement(1, "idle, with padding")
def balance_padding(t: CheckContext, assign: Answer, idle: Answer) -> None:
    """slots of position −1 have no work and make none"""
    P, n = ((4, 9), (5, 12), (3, 7))[t.round]
    same_idle(t, idle, held_by(("contiguous", "striped", "zigzag")[t.round], n, P))


# 08.5: programs of blocking messages, run on a network that is simulated here

deadlock = Exercise(
    id="08.5",
    slug="deadlock",
    title="Find the deadlock and mend it",
    answers=("stuck", "mend"),
    hints=(
        "Two people phone each other at the same moment and each waits until the other picks up. What has to "
        "be different about one of them? Does the same change help three of them in a circle?",
        "`stuck` in pseudocode: each rank has a place in its program. Again and again, until nothing moves: "
        "look at the operation at the place of each rank; if it can end, move on. Who is not at the end then "
        "is stuck.",
        "A send ends if its rank has fewer than `room` messages under way, or if the receiver is at just "
        "this receive: then both move on. A receive ends if its message is under way, which takes it off.",
        "`mend`: imagine all messages in one list, in one order for everybody. If every rank keeps to that "
        "order, the first message that is left has both its ranks ready: there is no deadlock.",
        "To find such an order, repeat: take a send, still left, of a block that its rank has (its own, or "
        "received before); write the send into its rank's new program and the receive into the other's; now "
        "the other has the block too.",
    ),
)

Operation = tuple[str, int, int]
Programs = list[list[Operation]]


class Network:
    """Ranks that send and receive blocks; a rank may have ``room`` messages under way."""

    def __init__(self, programs: Programs, room: int) -> None:
        self.left = [list(program) for program in programs]
        self.room, self.under_way = room, set[tuple[int, int, int]]()

    def run(self) -> list[int]:
        """The ranks that have not ended when nothing can move any more."""
        while sum(self.step(rank) for rank in range(len(self.left))):
            pass
        return [rank for rank, left in enumerate(self.left) if left]

    def step(self, rank: int) -> bool:
        if not self.left[rank]:
            return False
        kind, peer, block = self.left[rank][0]
        if kind == "recv":
            message = (peer, rank, block)
            if message not in self.under_way:
                return False
            self.under_way.remove(message)
            del self.left[rank][0]
            return True
        if sum(source == rank for source, _, _ in self.under_way) < self.room:
            self.under_way.add((rank, peer, block))
            del self.left[rank][0]
            return True
        if self.left[peer][:1] == [("recv", rank, block)]:
            del self.left[rank][0], self.left[peer][0]
            return True
        return False


def programs_of(messages: Sequence[tuple[int, int, int]], world: int) -> Programs:
    """The programs of messages (sender, receiver, block), each rank in the order of the list."""
    programs: Programs = [[] for _ in range(world)]
    for source, target, block in messages:
        programs[source].append(("send", target, block))
        programs[target].append(("recv", source, block))
    return programs


def ring_programs(world: int, steps: int, receivers: Sequence[int] = ()) -> Programs:
    """A ring in which every rank sends first but the ``receivers``."""
    programs: Programs = []
    for rank in range(world):
        program: list[Operation] = []
        for step in range(steps):
            pair: list[Operation] = [
                ("send", (rank + 1) % world, (rank - step) % world),
                ("recv", (rank - 1) % world, (rank - 1 - step) % world),
            ]
            program += reversed(pair) if rank in receivers else pair
        programs.append(program)
    return programs


def same_stuck(t: CheckContext, stuck: Answer, programs: Programs, room: int) -> None:
    want = Network(programs, room).run()
    same_value(t, stuck(programs, room), want, f"stuck with room for {room}:")


@deadlock.requirement(1, "stuck: a ring")
def deadlock_ring(t: CheckContext, stuck: Answer, mend: Answer) -> None:
    """all ranks of a ring in which everybody sends first; none if one of them receives first"""
    P = (3, 4, 5)[t.round]
    same_stuck(t, stuck, ring_programs(P, P - 1), 0)
    same_stuck(t, stuck, ring_programs(P, P - 1, [t.integer(0, P - 1)]), 0)


@deadlock.requirement(1, "stuck: some of the ranks")
def deadlock_some(t: CheckContext, stuck: Answer, mend: Answer) -> None:
    """those that wait for a rank that is stuck are stuck too; others end, as those do whose message was
    taken before"""
    a, b = t.random.sample(range(2), 2)
    programs: Programs = [[] for _ in range(6)]
    programs[a] = [("send", 2, a), ("send", b, a), ("recv", b, b)]
    programs[b] = [("send", a, b), ("recv", a, a)]
    programs[2] = [("recv", a, a), ("send", 5, 2)]  # ends
    programs[3] = [("recv", b, b), ("send", 4, b)]  # b never comes so far
    programs[b].append(("send", 3, b))
    programs[4] = [("recv", 3, b)]
    programs[5] = [("recv", 2, 2)]
    if t.round:  # a block that nobody sends, since 2 is asked for another one
        programs[5] = [("recv", 2, 5)]
    same_stuck(t, stuck, programs, 0)


@deadlock.requirement(1, "stuck: room for messages")
def deadlock_room(t: CheckContext, stuck: Answer, mend: Answer) -> None:
    """a rank may have `room` messages under way, to all receivers together, until each is received; then its
    next send waits"""
    P = (3, 4, 5)[t.round]
    same_stuck(t, stuck, ring_programs(P, P - 1), 1)  # each message leaves room again
    everybody = [(a, (a + d) % P, a) for d in range(1, P) for a in range(P)]
    sends_first = [sorted(p, key=lambda op: op[0], reverse=True) for p in programs_of(everybody, P)]
    for n in (0, P - 2, P - 1):
        same_stuck(t, stuck, sends_first, n)
    # Rank 0 has no room for its second message; rank 2 is ready for it.
    ready: Programs = [
        [("send", 1, 0), ("send", 2, 0)],
        [("recv", 2, 2), ("recv", 0, 0)],
        [("recv", 0, 0), ("send", 1, 2)],
    ]
    same_stuck(t, stuck, ready, 1)


def changed_operations(programs: Programs, mended: Programs) -> str:
    """The operations that the first changed rank lacks or has too many; "" if there is none."""
    if len(mended) != len(programs):
        return f"{len(mended)} programs for {len(programs)} ranks"
    for rank, (old, new) in enumerate(zip(programs, mended, strict=True)):
        lacking, more = Counter(old) - Counter(new), Counter(new) - Counter(old)
        said = [f"{word} {next(iter(ops))}" for word, ops in (("without", lacking), ("with", more)) if ops]
        if said:
            return f"rank {rank} {' and '.join(said)}"
    return ""


def ends(t: CheckContext, mend: Answer, programs: Programs) -> None:
    """The same operations, in an order that ends and sends only what a rank has."""
    came = nested(mend([list(program) for program in programs]))
    try:
        mended: Programs = [[(op[0], op[1], op[2]) for op in program] for program in came]
        changed = changed_operations(programs, mended)
    except (TypeError, IndexError, KeyError):
        t.note(repr(came)[:300], Difference("", "a program for each rank", describe(came)))
        raise Stop from None
    value = repr(mended)[:900]
    if changed:
        t.note(value, Difference("", "the operations that each rank had", changed))
        raise Stop
    for rank, program in enumerate(mended):
        has = {rank}
        for kind, _, block in program:
            if kind == "recv":
                has.add(block)
            elif block not in has:
                late = f"rank {rank} sends block {block} before it has received it"
                t.note(value, Difference("", "blocks sent by ranks that have them", late))
                return
    left = Network(mended, 0).run()
    t.note(value if left else "ends", Difference("", "an end", f"ranks {left} are stuck") if left else None)


@deadlock.requirement(1, "mend: a ring")
def mend_ring(t: CheckContext, stuck: Answer, mend: Answer) -> None:
    """the same operations for each rank, in an order with which all end, without any room"""
    ends(t, mend, ring_programs((3, 4, 5)[t.round], 1))


@deadlock.requirement(1, "mend: blocks that are passed on")
def mend_passed(t: CheckContext, stuck: Answer, mend: Answer) -> None:
    """a rank sends its own block, or one that it has received before"""
    P = (4, 3, 5)[t.round]
    programs = ring_programs(P, P - 1)
    if t.round:
        programs = [sorted(program, key=lambda op: op[0], reverse=True) for program in programs]
    ends(t, mend, programs)


@deadlock.requirement(2, "mend: any messages")
def mend_any(t: CheckContext, stuck: Answer, mend: Answer) -> None:
    """up a tree and down again, everybody to everybody, messages drawn; each rank's operations shuffled"""
    if t.round == 0:
        world = 4
        messages = [(1, 0, 1), (3, 2, 3), (2, 0, 2), (0, 2, 0), (0, 1, 0), (2, 3, 0)]
    elif t.round == 1:
        world = 5
        messages = [(a, b, a) for a in range(world) for b in range(world) if a != b]
    else:
        world, messages, has = 6, [], [{rank} for rank in range(6)]
        while len(messages) < 18:
            source = t.integer(0, world - 1)
            target, block = t.integer(0, world - 1), t.random.choice(sorted(has[source]))
            if block not in has[target]:
                messages.append((source, target, block))
                has[target].add(block)
    programs = programs_of(messages, world)
    for program in programs:
        t.random.shuffle(program)
        program.sort(key=lambda op: op[0] == "send")  # all receives first: nobody begins
    if t.round == 1:
        programs = [program[::-1] for program in programs]
    ends(t, mend, programs)


# 08.6: a ring with padding, compared with one softmax over the tokens that there are

ragged = Exercise(
    id="08.6",
    slug="ragged",
    title="The last block is shorter",
    answers=("ring",),
    hints=(
        "There are two kinds of slots without a token: those of queries and those of keys. What has to "
        "come out of the first, and what must the second not do, whatever is in them?",
        "In pseudocode: for each rank, for each step: the block of (rank − step) mod P; the mask from "
        "*positions* (rank · C + slot), not from slots; a partial result with its log-sum-exp; merge.",
        "A key is visible if its position is < n_tokens, that of the query too, and if causal, key ≤ query. "
        "`repeat_interleave(H // G, dim=1)` gives each query head its KV head.",
        "A weight of 0 does not save you: 0 · NaN is NaN. Put 0 into the padded rows of q, k and v first, "
        "with masked_fill or torch.where.",
        "A row that sees nothing in a block has lse −inf there. Subtract 0 in its place before you "
        "exponentiate, in the block and in the merge; its output is then 0.",
    ),
)


@dataclass
class Ragged:
    """Slots of all ranks, and the outputs that belong to them."""

    blocks: list[tuple[Tensor, Tensor, Tensor]]
    outs: list[Tensor]


def drawn_ring(
    t: CheckContext,
    world: int,
    n: int,
    causal: bool,
    heads: tuple[int, int] = (3, 3),
    junk: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Ragged:
    """``n`` tokens in contiguous order; the padding holds ``junk``, or numbers as everything else."""
    B, D, C = 2, 8, -(-n // world)
    H, G = heads
    q, k, v = (t.randn(B, h, world * C, D).to(dtype) for h in (H, G, G))
    i = torch.arange(n)
    mask = (i[None] <= i[:, None]) if causal else torch.ones(n, n, dtype=torch.bool)
    want = torch.zeros_like(q)
    for head in range(H):
        own = head // (H // G)
        scores = (q[:, head, :n].double() @ k[:, own, :n].double().mT) / math.sqrt(D)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        want[:, head, :n] = (weights @ v[:, own, :n].double()).to(dtype)
    if junk is not None:
        for x in (q, k, v):
            x[:, :, n:] = junk
    pieces = zip(*(x.split(C, dim=2) for x in (q, k, v)), strict=True)
    return Ragged([(a.clone(), b.clone(), c.clone()) for a, b, c in pieces], list(want.split(C, dim=2)))


def same_ring(t: CheckContext, ring: Answer, draw: Ragged, n: int, causal: bool) -> None:
    got = ring(draw.blocks, n, causal)
    if not isinstance(got, list | tuple) or len(got) != len(draw.outs):
        t.note(got, Difference("", f"a list of {len(draw.outs)} outputs", describe(got)))
        raise Stop
    for rank, (out, want) in enumerate(zip(got, draw.outs, strict=True)):
        tolerance = 1e-3 if want.dtype == torch.float32 else 1e-2
        t.close(out, want, f"rank {rank}:", tolerance=tolerance)


@ragged.requirement(1, "a length that divides")
def ragged_even(t: CheckContext, ring: Answer) -> None:
    """the attention of all tokens, causal and not"""
    P = (3, 2, 4)[t.round]
    n, causal = P * t.integer(3, 4), t.round != 1
    same_ring(t, ring, drawn_ring(t, P, n, causal), n, causal)
    t.unchanged()


@ragged.requirement(1, "a shorter last block, causal")
def ragged_causal(t: CheckContext, ring: Answer) -> None:
    """the tokens' outputs as before, and 0 in the slots without a token; the inputs are not changed"""
    P = (3, 2, 3)[t.round]
    n = P * 4 - (1, 1, 2)[t.round]
    same_ring(t, ring, drawn_ring(t, P, n, True), n, True)
    t.unchanged()


@ragged.requirement(1, "a shorter last block, every key visible")
def ragged_all(t: CheckContext, ring: Answer) -> None:
    """no query sees padding, though nothing else is hidden"""
    P = (3, 2, 3)[t.round]
    n = P * 4 - (1, 1, 2)[t.round]
    same_ring(t, ring, drawn_ring(t, P, n, False), n, False)


@ragged.requirement(1, "NaN and inf in the padding")
def ragged_junk(t: CheckContext, ring: Answer) -> None:
    """whatever is in slots without a token has no effect"""
    P = (3, 2, 3)[t.round]
    n, causal = P * 4 - (1, 1, 2)[t.round], t.round != 1
    junk = (math.nan, math.inf, math.nan)[t.round]
    same_ring(t, ring, drawn_ring(t, P, n, causal, junk=junk), n, causal)


@ragged.requirement(1, "a rank without any token")
def ragged_empty(t: CheckContext, ring: Answer) -> None:
    """its outputs are 0, and its block changes nothing"""
    P, n = ((3, 4), (4, 5), (3, 2))[t.round]
    causal = t.round != 1
    same_ring(t, ring, drawn_ring(t, P, n, causal), n, causal)


@ragged.requirement(1, "grouped queries")
def ragged_grouped(t: CheckContext, ring: Answer) -> None:
    """query head h reads KV head h // (H / G); in fp16 too, which the outputs then are"""
    n, dtype = 11, torch.float16 if t.round == 1 else torch.float32
    same_ring(t, ring, drawn_ring(t, 3, n, True, t.pick((4, 2), (6, 2), (6, 3)), dtype=dtype), n, True)


@ragged.requirement(1, "one block at a time", rounds=1)
def ragged_small(t: CheckContext, ring: Answer) -> None:
    """no tensor is larger than the scores of one rank's queries with one block"""
    P, C = 3, 8
    draw = drawn_ring(t, P, P * C - 3, True)
    with new_tensors() as made:
        got = ring(draw.blocks, P * C - 3, True)
    most = draw.blocks[0][0].shape[0] * 3 * C * C
    largest = largest_new_tensor(made)
    came = f"a tensor of shape {largest.shape}"
    t.true(largest.numel <= most, f"at most {most} numbers", came)
    t.close(got[1], draw.outs[1], "rank 1:", tolerance=1e-3)


# 08.7: the answers in the base model, its tokens spread over ranks: in one process, and at last over two


class Ring:
    """The keys and values of one layer, spread over ranks that are simulated in one process.

    positions[r]   of the tokens whose keys rank r holds, in the order of its block
    sent[r]        the bytes that rank r has sent
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.positions: Positions = [[] for _ in range(world)]
        self.sent = [0] * world
        self.stored: list[Any] = [None] * world

    def store(self, rank: int, positions: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Add keys and values (1, H, n, D) of these positions to what the rank holds."""
        if len(positions) != k.shape[2]:
            raise ValueError(f"positions: expected {k.shape[2]}, one per key, got {len(positions)}")
        old = self.stored[rank]
        new = torch.stack((k, v))
        self.stored[rank] = new if old is None else torch.cat((old, new), dim=3)
        self.positions[rank] += list(positions)

    def block(self, rank: int) -> Part:
        """Keys and values that the rank holds, in the order of ``positions[rank]``."""
        if self.stored[rank] is None:  # no keys yet
            some = next(each for each in self.stored if each is not None)
            return some[0, :, :, :0], some[1, :, :, :0]
        k, v = self.stored[rank]
        return k, v

    def send(self, block: Part, source: int) -> Part:
        """The block as the next rank, source + 1 (mod world), gets it."""
        self.sent[source] += sum(x.nbytes for x in block)
        k, v = block
        return k.clone(), v.clone()


@dataclass
class RingLayer:
    """The attention of one layer of the base model, apart from who holds what."""

    mixer: Any
    world: int = 2

    def ring(self) -> Ring:
        """An empty ring."""
        return Ring(self.world)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (1, H, T, D) of tokens from position ``start`` on, rotated."""
        at = torch.arange(start, start + x.shape[1])[None]
        q, k = (
            self.mixer.rope(split_heads(proj(x), self.mixer.n_heads), at)
            for proj in (self.mixer.q_proj, self.mixer.k_proj)
        )
        return q, k, split_heads(self.mixer.v_proj(x), self.mixer.n_heads)

    def attend(self, q: Tensor, block: Part, queries: Sequence[int], keys: Sequence[int]) -> Part:
        """(out, lse) of these queries over one block, causal by positions."""
        mask = torch.tensor(keys)[None] <= torch.tensor(queries)[:, None]
        out, lse = attend_partial(q, *block, mask)
        return out, lse

    def finish(self, out: Tensor) -> Tensor:
        """Outputs of all heads (1, H, T, D) -> (1, T, M)."""
        result: Tensor = self.mixer.o_proj(merge_heads(out))
        return result


def absent(x: Tensor) -> Tensor:
    """A stand-in for a tensor that another process has: NaN, in the memory of one number."""
    return torch.tensor(torch.nan).expand(x.shape)


class ProcessRing(Ring):
    """A ring of processes: each keeps the block of its own rank, and the others are NaN in it."""

    def store(self, rank: int, positions: Sequence[int], k: Tensor, v: Tensor) -> None:
        super().store(rank, positions, k, v)
        if rank != dist.get_rank():
            self.stored[rank] = absent(self.stored[rank])

    def send(self, block: Part, source: int) -> Part:
        """A message, if this process is the source or the next one."""
        here, target = dist.get_rank(), (source + 1) % self.world
        both, messages = torch.stack(block), Messages()
        if here == source:
            self.sent[source] += messages.send(both, target, tag=0)
            messages.finish()
        k, v = messages.receive(both, source, tag=0)() if here == target else absent(both)
        return k, v


@dataclass
class ProcessLayer(RingLayer):
    """The attention of one layer in one of the processes: it attends with blocks that are here."""

    start: int = 0
    mine: set[int] = field(default_factory=set)  # positions of the queries that have attended here

    def ring(self) -> Ring:
        return ProcessRing(self.world)

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        self.start, self.mine = start, set()
        return super().project(x, start)

    def attend(self, q: Tensor, block: Part, queries: Sequence[int], keys: Sequence[int]) -> Part:
        """As in one process; with a block that is not here, the result of no keys."""
        if block[0].shape[2] == 0 or block[0].isnan().any():
            return absent(q), torch.full(q.shape[:3], -torch.inf)
        self.mine.update(queries)
        return super().attend(q, block, queries, keys)

    def finish(self, out: Tensor) -> Tensor:
        """The outputs of all processes put together, then as in one process."""
        here = torch.tensor([self.start + i in self.mine for i in range(out.shape[2])])
        out, times = out.masked_fill(~here[:, None], 0.0), here.int()
        try:
            dist.all_reduce(times)
            dist.all_reduce(out)
        except RuntimeError as error:
            raise PeerLost(f"rank {dist.get_rank()}: not all came to layer.finish: {error}") from error
        for i in (times != 1).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"the query at position {self.start + i} attended in {times[i]} processes, expected 1: does "
                f"each rank attend with its own block and with what ring.send gave?"
            )
        return super().finish(out)


def new_cache(parts: Any, layer: RingLayer, max_len: int) -> Ring:
    """An empty cache of one layer: it grows on its ranks."""
    return layer.ring()


def library_merge(state: Part | None, part: Part) -> Part:
    out, lse = part
    clean = (out.float().masked_fill((lse == -torch.inf)[..., None], 0.0), lse.float())
    if state is None:
        return clean

    merged = merge_two(Partial(*state), Partial(*clean))
    return merged.out, merged.lse


def library_finish(state: Part, dtype: torch.dtype) -> Part:
    return state[0].to(dtype), state[1]


def library_hops(queries: Positions, keys: Positions, *rule: Any) -> list[int]:
    return plan_reference(queries, keys, *rule)[0]


def library_timetable(queries: Positions, keys: Positions, *rule: Any) -> list[list[int | None]]:
    return plan_reference(queries, keys, *rule)[1]


def library_forward_bytes(layer: Any, batch: int, per_rank: int, hops: Sequence[int]) -> list[int]:
    return walked(layer, batch, per_rank, hops, False)


def library_assign(costs: Sequence[int], world: int) -> Positions:
    order = sorted(range(len(costs)), key=costs.__getitem__)
    return [order[rank::world] for rank in range(world)]


@dataclass(frozen=True)
class RingWiring(workbench.Wiring):
    """The wiring of a model over ranks: ``code`` shows the ring too, ``compare`` runs two processes."""

    @property
    def shown(self) -> list[Any]:
        return [workbench.Model, Ring, RingLayer, new_cache, absent, ProcessRing, ProcessLayer]

    def compare(self, exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> workbench.Comparison:
        found = super().compare(exercise, notebook, n_new)
        parts = SimpleNamespace(**{part.name: part.chosen for part, _ in found.parts})
        return replace(found, rows=[*found.rows, *process_rows(parts.attention, parts, n_new)])


WIRING = RingWiring(
    parts={
        "merge": ("08.1", library_merge),
        "finish": ("08.1", library_finish),
        "hops": ("08.2", library_hops),
        "timetable": ("08.2", library_timetable),
        "forward_bytes": ("08.3", library_forward_bytes),
        "assign": ("08.4", library_assign),
    },
    weights=RingLayer,
    new_cache=new_cache,
)
SECONDS = 16.0  # a run takes less than one; two that fail stay within the 60 s of an exercise


@dataclass(frozen=True)
class Written:
    """The model's text, and the bytes of the ranks' messages and caches in all layers."""

    tokens: Tensor
    sent: list[int]
    stored: list[int]


def write(wiring: RingWiring, attention: Any, parts: Any, prompt: Tensor, n_new: int) -> Written:
    """The prompt, one chunk, and ``n_new`` tokens after it."""
    model, length = workbench.Model(wiring, attention, parts), prompt.shape[1]
    caches = model.new_caches(length + n_new)
    tokens = workbench.greedy(model, caches, prompt, n_new, length)
    sent = [sum(ring.sent[rank] for ring in caches) for rank in range(2)]
    stored = [sum(ring.stored[rank].untyped_storage().nbytes() for ring in caches) for rank in range(2)]
    return Written(tokens, sent, stored)


def write_here(*args: Any) -> Written:
    """``write`` as one of two processes."""
    try:
        return write(replace(WIRING, weights=ProcessLayer), *args)
    except Exception as error:
        cause = error.error if isinstance(error, Raised) else error
        cause.add_note(place_of(cause))
        raise cause from None


def over_processes(attention: Any, parts: Any, prompt: Tensor, n_new: int) -> tuple[list[Tensor], Written]:
    """The text of each of two processes, and the bytes that each counted of itself. Raises RankFailed."""
    args = (attention, parts, prompt, n_new)
    ranks = launch(write_here, 2, *args, seconds=SECONDS, limit=1.25 * SECONDS, copied=True)
    sent, stored = ([getattr(x, name)[i] for i, x in enumerate(ranks)] for name in ("sent", "stored"))
    return [each.tokens for each in ranks], Written(ranks[0].tokens, sent, stored)


def process_rows(attention: Any, parts: Any, n_new: int) -> list[tuple[str, ...]]:
    """Rows of the comparison, for the model over two processes."""
    prompt, what = workbench.encode(workbench.PROMPTS[0]), "identical tokens, over 2 processes"
    want, n = workbench.base_model().generate(prompt, n_new), prompt.shape[1]
    try:
        texts, written = over_processes(attention, parts, prompt, n_new)
    except RankFailed as failed:
        return [(what, "yes", f"no: {failed}")]
    same = all(torch.equal(text, want) for text in texts)
    sent, stored = (" and ".join(f"{x:,}" for x in each) for each in (written.sent, written.stored))
    return [
        (what, "yes", "yes" if same else "no"),
        (f"bytes stored by process 0 and 1, for {n + n_new - 1} tokens", "–", stored),
        (f"bytes sent by process 0 and 1, for {n} tokens and {n_new - 1} steps", "–", sent),
    ]


model = Exercise(
    id="08.7",
    slug="model",
    title="Your model",
    answers=("attention",),
    may_use_kvlearn=True,
    wiring=WIRING,
    hints=(
        "Which of the T new tokens does each rank take, and at which positions are they in the text? Write "
        "both down for T = 3 and start = 5 on two ranks, before any key is sent.",
        "In order: project; deal the new tokens out; store their keys and values; ask timetable and hops; "
        "then step by step attend, merge and send; finish every rank; put the outputs back in the order of "
        "the tokens; layer.finish.",
        "`parts.assign` gives indices into the new tokens. The longest share goes to the rank that holds the "
        "fewest keys, so that the cache stays even. The queries of a rank are at start + index.",
        "Keep the blocks by owner: `blocks[o]` is at rank (o + step) mod P in this step. After the step, "
        "`ring.send(blocks[o], (o + step) % P)` for every owner with step < hops[o], and for no other.",
        "A rank without new tokens has no state, and no output: leave it out. With `out = empty_like(q)`, "
        "`out[:, :, share] = …` puts the outputs of a share in their places.",
    ),
)


def base_logits(tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return workbench.base_model()(tokens)


def drawn_text(t: CheckContext, length: int) -> Tensor:
    """Bytes that a text may hold, as tokens (1, length), no two alike."""
    return torch.tensor([t.random.sample(range(33, 127), length)])


def in_pieces(t: CheckContext, attention: Answer, parts: Any, pieces: Sequence[int]) -> None:
    """The logits of a text that comes in pieces through caches."""
    tokens = drawn_text(t, sum(pieces))
    yours = workbench.Model(WIRING, attention, parts)
    caches, start, want = yours.new_caches(sum(pieces)), 0, base_logits(tokens)
    for piece in tokens.split(list(pieces), dim=1):
        end = start + piece.shape[1]
        if not t.close(yours(piece, caches, start), want[:, start:end], "logits", tolerance=1e-3):
            raise Stop
        start = end


def one_layer(
    t: CheckContext, attention: Answer, world: int, pieces: Sequence[int]
) -> list[tuple[Positions, Positions, list[int]]]:
    """One layer over so many ranks: of each call the queries, the keys, and the bytes sent."""
    layer = replace(RingLayer(workbench.base_model().mixers[t.round % 4]), world=world)
    ring, start, calls = layer.ring(), 0, []
    x = t.randn(1, sum(pieces), layer.mixer.q_proj.in_features)
    with torch.no_grad():
        for n in pieces:
            before, sent = [list(p) for p in ring.positions], list(ring.sent)
            attention(x[:, start : start + n], layer, ring, start, workbench.library(WIRING))
            new = [after[len(old) :] for after, old in zip(ring.positions, before, strict=True)]
            added = [a - b for a, b in zip(ring.sent, sent, strict=True)]
            calls.append((new, [list(p) for p in ring.positions], added))
            start += n
    return calls


@model.requirement(1, "over two ranks, without a cache")
def model_whole(t: CheckContext, attention: Answer) -> None:
    """the logits of kvlearn's decoder for a whole text; x is not changed"""
    tokens = drawn_text(t, (8, 9, 1)[t.round])
    yours = workbench.Model(WIRING, attention, workbench.library(WIRING))
    t.close(yours(tokens), base_logits(tokens), "logits", tolerance=1e-3)
    t.unchanged()


@model.requirement(1, "over two ranks, with a cache")
def model_cache(t: CheckContext, attention: Answer) -> None:
    """the same when the text comes in pieces: a chunk, a shorter one, single tokens"""
    in_pieces(t, attention, workbench.library(WIRING), (5 + t.round, 3, 1, 1))


@model.requirement(1, "over three and more ranks")
def model_more(t: CheckContext, attention: Answer) -> None:
    """one layer gives the same over 3, 4 and 5 ranks, in pieces"""
    layer = RingLayer(workbench.base_model().mixers[t.round])
    ring_layer = replace(layer, world=3 + t.round)
    parts, pieces = workbench.library(WIRING), (10, 2, 1)
    x = t.randn(1, sum(pieces), layer.mixer.q_proj.in_features)
    ring, start = ring_layer.ring(), 0
    with torch.no_grad():
        q, k, v = layer.project(x, 0)
        mask = torch.ones(len(x[0]), len(x[0]), dtype=torch.bool).tril()
        want = layer.finish(attend_partial(q, k, v, mask).out)
        for n in pieces:
            got = attention(x[:, start : start + n], ring_layer, ring, start, parts)
            t.close(got, want[:, start : start + n], "one layer:", tolerance=1e-3)
            start += n


@model.requirement(1, "what is sent")
def model_sent(t: CheckContext, attention: Answer) -> None:
    """every block goes as far as hops says and no further: the bytes that each rank sent"""
    P = 3 + t.round
    calls = one_layer(t, attention, P, (2 * P, 1))
    mixer = workbench.base_model().mixers[0]
    per_key = 2 * mixer.n_heads * mixer.head_dim * 4
    for n, (queries, keys, came) in zip((2 * P, 2 * P + 1), calls, strict=True):
        stored = sum(map(len, keys))
        if not t.true(stored == n, f"the keys of {n} tokens on the ranks", f"{stored}"):
            raise Stop
        ways, want = plan_reference(queries, keys)[0], [0] * P
        for owner, way in enumerate(ways):
            for step in range(way):
                want[(owner + step) % P] += len(keys[owner]) * per_key
        same_value(t, came, want, "bytes:")


@model.requirement(1, "an even cache")
def model_even(t: CheckContext, attention: Answer) -> None:
    """each token's keys on one rank; after every call the numbers of keys differ by 1 at most"""
    P = 2 + t.round
    calls = one_layer(t, attention, P, (P + 1, 1, 1, 2))
    for n, (_, keys, _) in zip((P + 1, P + 2, P + 3, P + 5), calls, strict=True):
        sizes = [len(each) for each in keys]
        total = sorted(position for each in keys for position in each)
        t.true(total == list(range(n)), f"positions 0 … {n - 1} once", f"{keys}")
        t.true(max(sizes) - min(sizes) <= 1, "numbers that differ by 1 at most", f"{sizes}")


@model.requirement(1, "your merge, finish, hops and timetable", rounds=1, reads_answers=True)
def model_yours(t: CheckContext, attention: Answer) -> None:
    """08.1 and 08.2 are solved, and the model with them gives the same logits, in pieces"""
    parts = workbench.theirs(model, t.notebook, "merge", "finish", "hops", "timetable")
    in_pieces(t, attention, parts, (7, 3, 1, 1))


@model.requirement(1, "all your parts: the same text, and the bytes predicted", rounds=1, reads_answers=True)
def model_together(t: CheckContext, attention: Answer) -> None:
    """with every part yours the model writes identical tokens, and each rank sends in the prompt what your
    forward_bytes (08.3) says"""
    parts = workbench.theirs(model, t.notebook, *WIRING.parts)
    in_pieces(t, attention, parts, (6, 1))
    prompt = workbench.encode(workbench.PROMPTS[0][-24:])
    over_ranks = workbench.Model(WIRING, attention, parts)
    caches = over_ranks.new_caches(28)
    over_ranks(prompt, caches, 0)
    mixer = workbench.base_model().mixers[0]
    layer = {
        "kind": "heads",
        "n_heads": mixer.n_heads,
        "n_kv_heads": mixer.n_heads,
        "head_dim": mixer.head_dim,
        "dtype": "float32",
    }
    positions = caches[0].positions
    want = parts.forward_bytes(layer, 1, len(positions[0]), parts.hops(positions, positions))
    same_value(t, caches[0].sent, nested(want), "bytes of layer 0:")
    fresh = workbench.Model(WIRING, attention, parts)
    text = workbench.without_cache(fresh, prompt, 3)
    t.true(torch.equal(text, workbench.base_model().generate(prompt, 3)), "the same text", "another one")


@model.requirement(1, "over two processes", rounds=1, reads_answers=True, last=True)
def model_processes(t: CheckContext, attention: Answer) -> None:
    """two processes, each with the keys of its own tokens, write the same text and send the same bytes as in
    one process; this runs when all requirements above hold"""
    parts = workbench.theirs(model, t.notebook, *WIRING.parts)
    prompt = workbench.encode(workbench.PROMPTS[0][-24:])
    want, one = workbench.base_model().generate(prompt, 4), write(WIRING, attention, parts, prompt, 4)
    try:
        texts, written = over_processes(attention, parts, prompt, 4)
    except RankFailed as failed:
        if processes_work(prompt):
            t.note("failed", Difference("", "two processes that write the text", str(failed)))
        return
    t.true(all(torch.equal(text, want) for text in texts), "the same text in both", "another one")
    same_value(t, written.sent, one.sent, "bytes sent:")
    same_value(t, written.stored, one.stored, "bytes stored:")


def processes_work(prompt: Tensor) -> bool:
    """Do two processes work together on this machine? If ours do not, no answer is to blame."""
    try:
        over_processes(model.right[0], workbench.library(WIRING), prompt, 1)
    except RankFailed:
        return False
    return True


EXERCISES = (merge, plan, count, balance, deadlock, ragged, model)
