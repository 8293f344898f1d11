"""Unit 11: requirements and hints of the exercises on the Triton decode kernel."""

import heapq
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading import Answer, CallWrapper, CheckContext, Exercise, Raised, Stop, describe, plain_number
from kvlearn.teaching.watch import LAUNCHED, done, far, watching

LOG2E = 1.4426950408889634  # eˣ = 2^(x · log₂e)
BLOCK = 16  # keys in a tile
NAN = float("nan")
READY_MADE: dict[Any, str] = {
    torch.nn.functional.scaled_dot_product_attention: "torch's scaled_dot_product_attention",
    torch.softmax: "torch.softmax",
}


class NoKernel(Raised):
    """The answer came by its result without a kernel; shown like an error of its own."""

    def __init__(self) -> None:
        self.error = self
        self.what = (
            "NoKernel: no kernel was launched: this exercise asks for a Triton kernel that does the work"
        )


def run(answer: Any, *args: Any, own: tuple[str, ...] = ()) -> Any:
    """The answer's result on these inputs, on the CPU; the answer gets them where kernels run.

    ``own`` names the functions of ``kvlearn.teaching.decode`` that are this exercise's own answer.
    """
    from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED
    from kvlearn.teaching import interpreter  # noqa: F401  (it has launches watched)

    compiled = HAS_TRITON and not INTERPRETED
    placed = [arg.cuda() if compiled and isinstance(arg, Tensor) else arg for arg in args]
    done.clear()
    result = home(answer(*placed))
    if is_emulation(answer):
        return result
    if LAUNCHED not in done and (watching or not HAS_TRITON):
        raise NoKernel
    # As with a ready-made softmax: the check says which function does the work of the exercise.
    answer._record.borrowed = answer._record.borrowed or next((f for f in own if ("called", f) in done), "")
    return result


def is_emulation(answer: CallWrapper) -> bool:
    """One of the catalogue's own mistakes, which are short PyTorch functions and launch nothing."""
    return str(getattr(answer._target, "__module__", "")).split(".")[0] == __package__.split(".")[0]


def home(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(home(part) for part in value) if type(value) in (tuple, list) else value


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (..., D) to keys (n, D) in double precision; 0 where there are no keys."""
    scores = q.double() @ k.double().T * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).float() if len(k) else torch.zeros_like(q)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The same for each row of q (B, D), k and v (B, S, D), over its first ``lengths[b]`` keys."""
    live = [k.shape[1]] * len(q) if lengths is None else lengths.tolist()
    return torch.stack([attend(q[b], k[b, :n], v[b, :n]) for b, n in enumerate(live)])


# 11.1: bytes and floor of a decode step, compared with a count key by key

floor = Exercise(
    id="11.1",
    slug="floor",
    title="Bytes of a decode step, and its floor",
    answers=("decode_step",),
    hints=(
        "First the live keys of each sequence: its length; with a window at most window + n_sinks. "
        "`min(length, window + n_sinks)` is right for short sequences too.",
        "A live key costs one key and one value of head_dim numbers for each *KV* head: 2 · G · D · number "
        "bytes, and 2 · G scales if there are scales. With latents it costs latent + rope numbers, once: the "
        "same bytes serve as key and as value, and for all heads.",
        "The arithmetic is done by the *query* heads: 2 FLOPs for each number of the score and 2 for each "
        "number of the weighted sum. That is 2 · (D + D) a head and key, or 2 · (latent + rope) + 2 · "
        "latent.",
        "Reading and computing overlap, so the slower of the two counts: max(bytes / bandwidth, flops / "
        "flops_per_second) + fixed. GB are 10⁹ bytes, and the bandwidth reached is bytes / measured seconds.",
    ),
)

Config = dict[str, Any]
FIELDS = ("live", "bytes", "flops", "seconds", "gb_per_second")


def plain(t: CheckContext, group: int = 1) -> Config:
    G = t.pick(2, 4, 8)
    config = {"n_heads": G * group, "n_kv_heads": G, "head_dim": t.pick(64, 96, 128), "number": 2, "scale": 0}
    return {**config, "window": None, "n_sinks": 0, "latent": 0, "rope": 0}


def machine(t: CheckContext) -> dict[str, float]:
    return {
        "bandwidth": t.pick(4.2e12, 2.0e12),
        "flops": t.pick(7.88e14, 3.1e14),
        "fixed": t.pick(5e-6, 12e-6),
        "measured": t.pick(40e-6, 95e-6),
    }


def draw_lengths(t: CheckContext) -> list[int]:
    return [t.integer(500, 40_000) for _ in range(t.integer(3, 6))]


def live_keys(config: Config, length: int) -> int:
    """Counted one by one: the newest ``window``, and of the others the first ``n_sinks``."""
    if config["window"] is None:
        return length
    behind = max(length - config["window"], 0)
    return len(range(behind, length)) + len(range(min(config["n_sinks"], behind)))


def floor_count(config: Config, lengths: list[int]) -> tuple[int, int, int]:
    """Live keys, bytes and FLOPs."""
    live = sum(live_keys(config, length) for length in lengths)
    if config["latent"]:
        vector = config["latent"] + config["rope"]
        a_key, score, mix = vector * config["number"], vector, config["latent"]
    else:
        one = config["head_dim"] * config["number"] + config["scale"]
        a_key, score, mix = (
            sum(one for _head in range(config["n_kv_heads"]) for _kv in "kv"),
            *[config["head_dim"]] * 2,
        )
    return live, live * a_key, sum(2 * (score + mix) * live for _head in range(config["n_heads"]))


def field(t: CheckContext, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
        t.true(False, f"a dict with the key {name!r}", came)
        raise Stop
    return got[name]


def own(got: Any, name: str, otherwise: float) -> float:
    """The answer's own number: a mistake in it, told elsewhere, shall not cost other points too."""
    number = plain_number(got.get(name)) if isinstance(got, dict) else None
    return number if number is not None and number > 0 else otherwise


def asked(t: CheckContext, decode_step: Answer, config: Config, lengths: list[int], *names: str) -> Any:
    got = decode_step(config, lengths, max(lengths) + t.integer(1, 5000), machine(t))
    for name in names:
        t.number(field(t, got, name), floor_count(config, lengths)[FIELDS.index(name)], name)
    return got


@floor.requirement(1, "live keys and bytes")
def full(t: CheckContext, decode_step: Answer) -> None:
    """all keys of each sequence, K and V, for each KV head, in 2-byte numbers"""
    asked(t, decode_step, plain(t, (4, 1, 8)[t.round]), draw_lengths(t), "live", "bytes")


@floor.requirement(1, "a window with sinks")
def window(t: CheckContext, decode_step: Answer) -> None:
    """the newest `window` keys and, on top of them, the first `n_sinks`; shorter sequences whole"""
    size, sinks = t.pick(1024, 4096), t.pick(4, 16)
    lengths = [*draw_lengths(t), size + t.integer(1, sinks - 1), t.integer(10, size - 1)]
    asked(t, decode_step, {**plain(t), "window": size, "n_sinks": sinks}, lengths, "live", "bytes")


@floor.requirement(1, "8-bit and 4-byte numbers, with scales")
def quantised(t: CheckContext, decode_step: Answer) -> None:
    """bytes where a number takes 1 or 4 bytes, and each key and each value of a head may bring a scale"""
    kind = ({"number": 1, "scale": 2}, {"number": 4}, {"number": 1, "scale": 4})[t.round]
    asked(t, decode_step, {**plain(t), **kind}, draw_lengths(t), "bytes")


@floor.requirement(1, "a latent for keys and values")
def latent(t: CheckContext, decode_step: Answer) -> None:
    """bytes where one vector of latent + rope numbers is all there is of a token: read once, for all heads"""
    shape = {"n_heads": t.pick(16, 128), "n_kv_heads": 1, "latent": t.pick(512, 256), "rope": 64}
    asked(t, decode_step, {**plain(t), **shape}, draw_lengths(t), "bytes")


@floor.requirement(1, "FLOPs")
def flops(t: CheckContext, decode_step: Answer) -> None:
    """2 for each number of each score and of each weighted sum, for every *query* head; with latents too"""
    config = plain(t, t.pick(4, 8))
    if t.round == 2:
        config |= {"n_heads": 128, "n_kv_heads": 1, "latent": 512, "rope": 64}
    asked(t, decode_step, config, draw_lengths(t), "flops")


@floor.requirement(1, "the floor, and the bandwidth reached", rounds=4)
def seconds(t: CheckContext, decode_step: Answer) -> None:
    """max(bytes / bandwidth, flops / FLOP/s) + fixed, and GB a second in the measured time"""
    config, lengths, gpu = plain(t, t.pick(1, 4)), draw_lengths(t), machine(t)
    if t.round % 2:
        config |= {"n_heads": 512, "n_kv_heads": 1}  # enough arithmetic to be the slower part
    if t.round == 2:
        lengths = [length % 50 + 1 for length in lengths]  # so little that the fixed cost is the largest
    got = decode_step(config, lengths, 50_000, gpu)
    _, n_bytes, n_flops = floor_count(config, lengths)
    moved, computed = own(got, "bytes", n_bytes), own(got, "flops", n_flops)
    floor = max(moved / gpu["bandwidth"], computed / gpu["flops"]) + gpu["fixed"]
    t.number(field(t, got, "seconds"), float(floor), "seconds")
    t.number(field(t, got, "gb_per_second"), float(moved / gpu["measured"] / 1e9), "gb_per_second")


# 11.2: online softmax in a kernel, compared with the softmax of all scores at once

online = Exercise(
    id="11.2",
    slug="online",
    title="Online softmax in a kernel",
    answers=("online_attention",),
    forbidden=READY_MADE,
    hints=(
        "Bring the scores to base 2 first: `scores * scale * LOG2E`. Then `tl.exp2` takes the place of exp "
        "everywhere, and the result is the same softmax.",
        "The new maximum is `tl.maximum(m, tl.max(scores, axis=0))`, and the tile's weights are "
        "`tl.exp2(scores - new)`: every exponent is at most 0, so nothing overflows.",
        "`total` and `acc` were counted from the old maximum. Multiply both by `tl.exp2(m - new)` before you "
        "add the tile's share. In the first tile m is −∞, and that factor is 0.",
        "The tile's share of `acc` is `tl.sum(weights[:, None] * v, axis=0)`, its share of `total` is "
        "`tl.sum(weights, axis=0)`. Last of all, `m = new`. Nothing is divided inside the loop.",
    ),
)

QKV = tuple[Tensor, Tensor, Tensor]


def online_draw(t: CheckContext, n_tiles: int) -> QKV:
    B, D, S = t.pick(2, 3), t.pick(8, 16), n_tiles * BLOCK
    return t.randn(B, D), t.randn(B, S, D), t.randn(B, S, D)


def aligned(t: CheckContext, scores: Tensor) -> QKV:
    """Keys that give these scores (B, S), but for a little noise."""
    B, S = scores.shape
    q, _, _ = online_draw(t, 1)
    q = q[:1].expand(B, -1).contiguous()
    D = q.shape[1]
    k = scores[..., None] * q[:, None] / q.square().sum(-1)[:, None, None] * D**0.5
    return q, k + 0.01 * t.randn(B, S, D), t.randn(B, S, D)


def online_same(
    t: CheckContext, online_attention: Answer, inputs: QKV, tolerance: float | None = None
) -> None:
    got = run(online_attention, *inputs, own=("online", "online_rows"))
    t.close(got, attend_rows(*inputs), tolerance=tolerance)


@online.requirement(1, "one tile", rounds=2)
def one_tile(t: CheckContext, online_attention: Answer) -> None:
    """softmax(q kᵀ / √D) v, (B, D), over 16 keys"""
    online_same(t, online_attention, online_draw(t, 1))


@online.requirement(2, "several tiles", rounds=2)
def several_tiles(t: CheckContext, online_attention: Answer) -> None:
    """the same over 32 to 64 keys; q, k and v unchanged"""
    online_same(t, online_attention, online_draw(t, t.integer(2, 4)))
    t.unchanged()


@online.requirement(1, "a maximum that rises, and one that falls", rounds=2)
def moving_maximum(t: CheckContext, online_attention: Answer) -> None:
    """right where the largest score is in the last tile, and where it is in the first"""
    slope = torch.arange(3).repeat_interleave(BLOCK) * t.pick(2.0, 3.0)
    online_same(t, online_attention, aligned(t, torch.stack([slope, -slope]) + t.randn(2, len(slope))), 1e-3)


@online.requirement(1, "scores up to ±1000", rounds=2)
def online_large(t: CheckContext, online_attention: Answer) -> None:
    """finite and right where exp of a score would overflow, in whichever tile it is"""
    hills = torch.arange(3).repeat_interleave(BLOCK) * 400.0
    scores = torch.stack([hills - 100, 900 - hills]) + 2 * t.randn(2, len(hills))
    online_same(t, online_attention, aligned(t, scores), 1e-2)


@online.requirement(1, "all scores far below 0", rounds=2)
def low(t: CheckContext, online_attention: Answer) -> None:
    """right where all scores of a row are near −500: their largest is what counts, not 0"""
    scores = t.randn(2, 2 * BLOCK) - 500
    scores[0, BLOCK:] += 3  # here the maximum rises from tile to tile
    online_same(t, online_attention, aligned(t, scores), 1e-2)


# 11.3: a kernel's last tile, where keys end and other memory begins; compared with attention row by row

tail = Exercise(
    id="11.3",
    slug="tail",
    title="Masks at the tail",
    answers=("ragged_attention",),
    forbidden=READY_MADE,
    hints=(
        "One boolean for each key of the tile says all there is to say: `live = n < length`. The keys are "
        "numbered from 0, so the last live one is length − 1.",
        "`tl.load(pointers, mask=live[:, None], other=0.0)` does not touch what is masked and gives 0 there. "
        "K and V both need it: a weight of 0 does not make a NaN in V harmless, 0 · NaN is NaN.",
        "A masked key has the score 0 after that, and exp2(0 − m) is a weight. Set it to −∞: "
        '`tl.where(live, scores, float("-inf"))`, before the maximum is taken.',
        "A row of length 0 never enters the loop, and its `total` is 0. Divide by 1 there: "
        "`acc / tl.where(total == 0, 1.0, total)` gives 0.",
    ),
)

TailInputs = tuple[Tensor, Tensor, Tensor, Tensor]


def tail_draw(t: CheckContext, lengths: list[int], capacity: int, behind: float | None = None) -> TailInputs:
    """q (B, D), k and v (B, S, D) with room for ``capacity`` keys; ``behind`` fills what lies behind the
    lengths."""
    B, D = len(lengths), t.pick(8, 32)
    k, v = t.randn(B, capacity, D), t.randn(B, capacity, D)
    for b, length in enumerate(lengths):
        if behind is not None:
            k[b, length:] = v[b, length:] = behind
    return 2 * t.randn(B, D), k, v, torch.tensor(lengths, dtype=torch.int32)


def tail_same(t: CheckContext, ragged_attention: Answer, inputs: TailInputs) -> None:
    t.close(run(ragged_attention, *inputs, own=("attend_keys", "load_tile")), attend_rows(*inputs))


@tail.requirement(1, "lengths that fill their tiles", rounds=2)
def whole_tiles(t: CheckContext, ragged_attention: Answer) -> None:
    """attention of each row to its own 16, 32 or 48 keys, (B, D)"""
    tail_same(t, ragged_attention, tail_draw(t, t.pick([16, 48], [32, 16]), 3 * BLOCK))


@tail.requirement(1, "lengths that do not", rounds=2)
def partial_tiles(t: CheckContext, ragged_attention: Answer) -> None:
    """the same for any length; what lies behind a row's keys has no weight; inputs unchanged"""
    lengths = [t.integer(2, 14), t.integer(BLOCK + 2, 2 * BLOCK - 2)]
    tail_same(t, ragged_attention, tail_draw(t, lengths, 3 * BLOCK))
    t.unchanged()


@tail.requirement(1, "NaN behind the keys", rounds=2)
def poisoned(t: CheckContext, ragged_attention: Answer) -> None:
    """memory behind the lengths may hold anything, NaN too, and none of it reaches the result"""
    tail_same(t, ragged_attention, tail_draw(t, [t.integer(2, 14), 2 * BLOCK], 2 * BLOCK, NAN))


@tail.requirement(1, "one key, and one key more than a tile", rounds=2)
def edges(t: CheckContext, ragged_attention: Answer) -> None:
    """right for the lengths 1, 15, 17 and 31"""
    lengths, behind = t.pick([1, 17, 31], [15, 1, 17]), t.pick(1e4, -1e4)
    q, *others = tail_draw(t, lengths, 2 * BLOCK, behind)
    tail_same(t, ragged_attention, (q.abs(), *others))  # so the sign behind is that of the scores there


@tail.requirement(1, "length 0", rounds=2)
def empty(t: CheckContext, ragged_attention: Answer) -> None:
    """0 for a row without keys, and the others as ever"""
    tail_same(t, ragged_attention, tail_draw(t, t.pick([0, 16, 5], [20, 0, 16]), 2 * BLOCK))


@tail.requirement(1, "a cache that ends inside a tile", rounds=2)
def short_cache(t: CheckContext, ragged_attention: Answer) -> None:
    """room for 20 to 30 keys in a row, all of them live: nothing is read behind the end of K and V"""
    capacity = t.integer(20, 30)
    tail_same(t, ragged_attention, tail_draw(t, [capacity, capacity], capacity))


# 11.4: the query heads of one KV head as the rows of a matrix product, compared with each head on its own

packing = Exercise(
    id="11.4",
    slug="packing",
    title="Pack the query heads of one KV head",
    answers=("grouped_attention",),
    forbidden=READY_MADE,
    hints=(
        "KV head g serves the query heads g · GROUP, …, g · GROUP + GROUP − 1: neighbours. So row r of the "
        "packed tile is head `g * GROUP + r`, as long as r < GROUP.",
        "The pointers into Q are `Q + (b * H + h)[:, None] * D + d[None, :]`, a (16, BLOCK_D) tile. Mask "
        "the rows with `rows < GROUP` and the columns with `d < D`; `other=0.0` makes the padding harmless "
        "in the product.",
        '`tl.dot(q, tl.trans(k), input_precision="ieee")` is (16, BLOCK_D) times (BLOCK_D, BLOCK): every '
        "head's score with every key of the tile. The scale is 1/√D with the *true* D.",
        "Store with the mask `(rows < GROUP)[:, None] & (d < D)[None, :]`. Without it the padded rows land "
        "on the heads of the next group, and which program writes last is anybody's guess.",
    ),
)

ROWS = 16  # of the packed tile, as many as an instruction of the tensor cores multiplies


def packing_draw(t: CheckContext, n_kv_heads: int, group: int, head_dim: int = 16) -> QKV:
    B, S = 2, 9 if t.round == 1 else t.pick(21, 27)  # one tile, or two
    k, v = t.randn(B, n_kv_heads, S, head_dim), t.randn(B, n_kv_heads, S, head_dim)
    return t.randn(B, n_kv_heads * group, head_dim), k, v


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    heads = [
        [attend(q[b, h], k[b, h // group], v[b, h // group]) for h in range(q.shape[1])]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(row) for row in heads])


def packing_same(t: CheckContext, grouped_attention: Answer, inputs: QKV) -> None:
    t.close(run(grouped_attention, *inputs), head_by_head(*inputs))


@packing.requirement(1, "one query head a KV head", rounds=1)
def multi_head(t: CheckContext, grouped_attention: Answer) -> None:
    """multi-head attention, groups of 1: (B, H, D)"""
    packing_same(t, grouped_attention, packing_draw(t, 3, 1))


@packing.requirement(1, "groups of 4", rounds=2)
def fours(t: CheckContext, grouped_attention: Answer) -> None:
    """grouped-query attention with 2 or 3 KV heads: query head h reads KV head h // 4; inputs unchanged"""
    packing_same(t, grouped_attention, packing_draw(t, t.pick(2, 3), 4))
    t.unchanged()


@packing.requirement(2, "groups of 3, 5, 6 and 7", rounds=2)
def odd(t: CheckContext, grouped_attention: Answer) -> None:
    """the same where a group is no power of two: no head left out, none overwritten"""
    packing_same(t, grouped_attention, packing_draw(t, 2, t.pick(3, 5, 6, 7)))


@packing.requirement(1, "a head dim that is padded", rounds=2)
def padded(t: CheckContext, grouped_attention: Answer) -> None:
    """the same with D = 12 or 20, in tiles of 16 or 32 columns"""
    packing_same(t, grouped_attention, packing_draw(t, 2, t.pick(2, 3), t.pick(12, 20)))


@packing.requirement(1, "all heads on one KV head", rounds=2)
def multi_query(t: CheckContext, grouped_attention: Answer) -> None:
    """multi-query attention: groups of 9, 12 or 16 heads"""
    packing_same(t, grouped_attention, packing_draw(t, 1, (t.pick(9, 12), 16)[t.round]))


# 11.5: the context cut into splits and merged again, compared with attention over all keys at once

splits = Exercise(
    id="11.5",
    slug="splits",
    title="Split the context, merge the parts",
    answers=("split_attention",),
    forbidden={**READY_MADE, torch.logsumexp: "torch.logsumexp"},
    hints=(
        "Count in tiles: `tiles = tl.cdiv(length, BLOCK)`, and each split gets `tl.cdiv(tiles, n_splits)` of "
        "them. Rounded down, the last keys would belong to nobody.",
        "`lo = split * each * BLOCK`, and `hi = tl.minimum(lo + each * BLOCK, length)`. A split behind the "
        "end has lo ≥ hi: its loop never runs, and it stores 0 and −∞. That is as it should be.",
        "The merge: subtract the largest lse of all parts, take exp2, and divide by the sum: "
        "`weights = tl.exp2(lse - top)`, and out is the sum of weights · parts over the sum of weights.",
        "In a row of length 0 every lse is −∞, and so is their maximum: −∞ − (−∞) is NaN. Subtract 0 there,"
        " and divide by 1 where the sum of weights is 0.",
    ),
)

SplitsInputs = tuple[Tensor, Tensor, Tensor, Tensor, int]


def splits_draw(t: CheckContext, lengths: list[int], n_splits: int) -> SplitsInputs:
    """Room for 96 keys per row: as many tiles as 2, 3 or 6 splits can share."""
    B, D, S = len(lengths), t.pick(8, 32), 96
    rows = torch.tensor(lengths, dtype=torch.int32)
    return 2 * t.randn(B, D), t.randn(B, S, D), t.randn(B, S, D), rows, n_splits


def splits_same(
    t: CheckContext, split_attention: Answer, inputs: SplitsInputs, tolerance: float | None = None
) -> None:
    out, _ = t.pair(run(split_attention, *inputs, own=("merge_parts",)), "a pair (out, lse of the parts)")
    t.close(out, attend_rows(*inputs[:4]), "out:", tolerance)


@splits.requirement(1, "splits of whole tiles", rounds=2)
def even(t: CheckContext, split_attention: Answer) -> None:
    """attention over all keys, (B, D), from 2 splits or 3 of whole tiles"""
    n_splits = t.pick(2, 3)
    splits_same(t, split_attention, splits_draw(t, [n_splits * BLOCK, n_splits * BLOCK], n_splits))


@splits.requirement(1, "any length, any number of splits", rounds=2)
def ragged(t: CheckContext, split_attention: Answer) -> None:
    """the same for lengths that fill neither tiles nor splits, and for a single split; inputs unchanged"""
    n_splits = 1 if t.round == 1 else 3
    splits_same(t, split_attention, splits_draw(t, [t.pick(19, 25, 29), t.pick(34, 41, 46)], n_splits))
    t.unchanged()


@splits.requirement(1, "a short row beside a long one", rounds=1)
def splits_empty_splits(t: CheckContext, split_attention: Answer) -> None:
    """a split without keys, and there are some where a row has fewer tiles than splits, contributes
    nothing"""
    lengths = [t.integer(1, 15), t.pick(34, 38, 41, 46)]  # the long one is no multiple of the splits
    splits_same(t, split_attention, splits_draw(t, lengths, t.pick(3, 5)))


@splits.requirement(1, "length 0", rounds=1)
def empty_row(t: CheckContext, split_attention: Answer) -> None:
    """0, not NaN, for a row whose splits are all empty"""
    splits_same(t, split_attention, splits_draw(t, [0, t.pick(19, 23, 26, 29)], 3))


@splits.requirement(1, "large scores", rounds=1)
def splits_large(t: CheckContext, split_attention: Answer) -> None:
    """finite and right when the scores, and with them the lse, reach ±1000"""
    q, k, v, lengths, n_splits = splits_draw(t, [20, 40], 3)
    k = (
        0.1 * k
        + 200.0 * torch.tensor([1.0, -1.0])[:, None, None] * q[:, None] / q.norm(dim=-1)[:, None, None]
    )
    splits_same(t, split_attention, (q, k, v, lengths, n_splits), 1e-2)


@splits.requirement(1, "the work is shared", rounds=2)
def shared(t: CheckContext, split_attention: Answer) -> None:
    """the fullest split of a row has ⌈tiles / splits⌉ tiles, tiles counted from the row's length; with q = 0
    every key adds 1 to a part's 2^lse, so the parts tell how many keys they saw"""
    n_splits = t.pick(2, 3)
    q, k, v, lengths, n_splits = splits_draw(t, [t.integer(20, 31), t.integer(50, 62)], n_splits)
    got = run(split_attention, torch.zeros_like(q), k, v, lengths, n_splits, own=("merge_parts",))
    _, lse = t.pair(got, "a pair (out, lse)")
    if not t.shape(lse, (len(q), n_splits), "lse of the parts:"):
        return
    seen = torch.exp2(lse.double()).round().long()
    for b, length in enumerate(lengths.tolist()):
        tiles = (length + BLOCK - 1) // BLOCK
        most = (tiles + n_splits - 1) // n_splits * BLOCK
        counts = seen[b].tolist()
        last = max((i for i, n in enumerate(counts) if n), default=0)
        whole = all(n % BLOCK == 0 for n in counts[:last])
        good = sum(counts) == length and max(counts) <= min(most, length) and whole
        what = f"{length} keys over {n_splits} splits, at most {most} in one, in whole tiles but the last"
        t.true(good, what, f"splits with {', '.join(map(str, counts))} keys")


# 11.6: decode through a page table, compared with attention to the same keys laid out in a row

pages = Exercise(
    id="11.6",
    slug="pages",
    title="Walk the page table",
    answers=("paged_attention",),
    forbidden=READY_MADE,
    hints=(
        "A key's number splits into two: `n // PAGE` says which of the sequence's pages it is on, `n % PAGE` "
        "which slot of that page.",
        "The table translates: `page = tl.load(TABLE + b * max_pages + n // PAGE, mask=live, other=0)`, one "
        "entry for each key of the tile. A tile may span several pages, and pages may span several tiles.",
        "The pool has the shape (blocks, G, PAGE, D). One page further is G · PAGE · D numbers, one KV head "
        "further PAGE · D, one slot further D: `((page * G + g) * PAGE + n % PAGE) * D`. Each of these "
        "products may pass 2³¹, so `.to(tl.int64)` belongs to `page`, before the first of them.",
        "Mask the *table's* load with `n < length` too: entries behind the last page may hold anything, and"
        " a pointer made from one of them points anywhere.",
    ),
)

PagesInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def pages_draw(
    t: CheckContext,
    lengths: list[int],
    page: int,
    *,
    shuffled: bool = True,
    behind: float | None = None,
    stray: int = 0,
    width: int = 32,
) -> PagesInputs:
    """q (B, G, D), pools (blocks, G, page, D), table (B, width), lengths (B,).

    ``behind`` fills the slots of a row's last page that hold no keys; ``stray`` is in the table behind
    it.
    """
    B, G, D = len(lengths), 2, t.pick(8, 32)
    needed = [-(-length // page) for length in lengths]
    blocks = sum(needed) + 2
    k, v = t.randn(blocks, G, page, D), t.randn(blocks, G, page, D)
    order = torch.randperm(blocks, generator=t.generator) if shuffled else torch.arange(blocks)
    table = torch.full((B, width), stray, dtype=torch.int32)
    for b, (length, n) in enumerate(zip(lengths, needed, strict=True)):
        table[b, :n] = order[sum(needed[:b]) : sum(needed[: b + 1])]
        if behind is not None and length % page:
            k[table[b, n - 1], :, length % page :] = v[table[b, n - 1], :, length % page :] = behind
    return 2 * t.randn(B, G, D), k, v, table, torch.tensor(lengths, dtype=torch.int32)


def far_blocks(G: int, page: int, D: int) -> tuple[int, int, int]:
    """Block numbers with which block · G · page · D passes 2³¹ at its last product, its second or its first;
    wrapped to 32 bits none of them is a place in the pool."""
    return 3 * 2**30 // (G * page * D), 3 * 2**30 // (G * page), 3 * 2**30 // G


def first_block(table: Tensor, pool: Tensor) -> int:
    """The number of the pool's first block: 0, but for a pool that is the end of a larger one."""
    return max((n for n in far_blocks(*pool.shape[1:]) if n <= int(table[0, 0])), default=0)


def in_a_row(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    rows = []
    table = table - first_block(table, k)
    for b, length in enumerate(lengths.tolist()):
        pages = table[b, : -(-length // k.shape[2])].tolist()
        for g in range(k.shape[1]):
            keys, values = (torch.cat([pool[page, g] for page in pages])[:length] for pool in (k, v))
            rows.append(attend(q[b, g], keys, values))
    return torch.stack(rows).view_as(q)


def pages_same(t: CheckContext, paged_attention: Answer, inputs: PagesInputs) -> None:
    t.close(run(paged_attention, *inputs), in_a_row(*inputs))


@pages.requirement(1, "one sequence, its pages in order", rounds=1)
def in_order(t: CheckContext, paged_attention: Answer) -> None:
    """attention to the keys of its pages, (B, G, D), with pages of 16, as large as a tile"""
    pages_same(t, paged_attention, pages_draw(t, [2 * BLOCK], BLOCK, shuffled=False))


@pages.requirement(1, "pages in any order, two sequences", rounds=2)
def any_order(t: CheckContext, paged_attention: Answer) -> None:
    """the same where a sequence's pages are scattered over the pool, each row with a table of its own; inputs
    unchanged"""
    pages_same(t, paged_attention, pages_draw(t, [2 * BLOCK, BLOCK], BLOCK))
    t.unchanged()


@pages.requirement(1, "pages smaller and larger than a tile", rounds=2)
def other_sizes(t: CheckContext, paged_attention: Answer) -> None:
    """the same with pages of 4, 6 or 32 keys: a tile spans several pages, or a page several tiles"""
    page = 32 if t.round == 1 else t.pick(4, 6)
    pages_same(t, paged_attention, pages_draw(t, [24, 12] if page < BLOCK else [64, 32], page))


@pages.requirement(1, "a last page that is not full", rounds=2)
def partial_page(t: CheckContext, paged_attention: Answer) -> None:
    """slots without a key have no weight, whatever is in them"""
    page, behind = ((BLOCK, 50.0), (8, NAN))[t.round]
    pages_same(
        t, paged_attention, pages_draw(t, [t.integer(BLOCK + 1, BLOCK + 7), 2 * BLOCK], page, behind=behind)
    )


@pages.requirement(1, "entries behind the last page", rounds=2)
def stray_entries(t: CheckContext, paged_attention: Answer) -> None:
    """the table's entries behind a row's last page may hold anything, −1 or a billion, and nobody follows
    them; nothing is read behind the table's own end"""
    stray, width = (t.pick(-1, 10**9), 32) if t.round == 0 else (0, 5)
    pages_same(
        t, paged_attention, pages_draw(t, [t.integer(2, 6), t.integer(18, 20)], 4, stray=stray, width=width)
    )


@pages.requirement(1, "a pool of more than 2³¹ numbers", rounds=3)
def large_pool(t: CheckContext, paged_attention: Answer) -> None:
    """the same where the pages are behind 3·2³⁰ numbers, slots or pairs of page and head: none of the
    products passes 2³¹ in 32 bits"""
    q, k, v, table, lengths = pages_draw(t, [t.integer(18, 24), 7], BLOCK)
    _, G, page, D = k.shape
    first = far_blocks(G, page, D)[t.round] if watching else 0  # elsewhere it takes a pool of that size
    needed = torch.arange(table.shape[1]) < -(-lengths[:, None] // page)
    table = torch.where(needed, table + first, 0).to(torch.int32)
    with far(tuple(k.shape), first * G * page * D):
        pages_same(t, paged_attention, (q, k, v, table, lengths))


# 11.7: how many splits, compared with trying every number of them with a bare count of what runs when

choose = Exercise(
    id="11.7",
    slug="choose",
    title="Choose the number of splits",
    answers=("choose_splits",),
    hints=(
        "Without splits there is one program for each pair of a sequence and a *KV* head: len(lengths) · "
        "n_kv_heads. With s splits there are s times as many.",
        "The machine runs multiprocessors · resident programs at once. The rest waits: "
        "⌈programs / (multiprocessors · resident)⌉ waves, and a wave that is nearly empty takes as long as a "
        "full one.",
        "A wave takes as long as its longest program: ⌈tiles / s⌉ tiles of the longest row, and one tile's "
        "time on top for starting and merging. `-(-a // b)` rounds a quotient up.",
        "Try every s from 1 to the number of tiles: "
        "`min(range(1, tiles + 1), key=lambda s: waves(s) * (-(-tiles // s) + 1))`. `min` gives the first of "
        "several, and so the fewest splits.",
    ),
)

Case = tuple[list[int], int, int, int, int]


def time_of(splits: int, lengths: list[int], n_kv_heads: int, block: int, machine: int) -> int:
    """Plays the launch: each program takes the first free place of the machine."""
    tiles = max(len(range(0, length, block)) for length in lengths)
    longest = max(len(range(split, tiles, splits)) for split in range(splits)) + 1
    places = [0] * machine
    for _program in range(len(lengths) * n_kv_heads * splits):
        heapq.heappush(places, heapq.heappop(places) + longest)
    return max(places)


def best(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, machine: int) -> int:
    tiles = max(len(range(0, length, block)) for length in lengths)
    times = [time_of(s, lengths, n_kv_heads, block, machine) for s in range(1, tiles + 1)]
    return 1 + times.index(min(times))


def choose_same(
    t: CheckContext, choose_splits: Answer, case: Case, multiprocessors: int, resident: int
) -> None:
    lengths, n_heads, n_kv_heads, block, _ = case
    got = choose_splits(lengths, n_heads, n_kv_heads, block, multiprocessors, resident)
    want = best(lengths, n_heads, n_kv_heads, block, multiprocessors * resident)
    plain = plain_number(got)
    if isinstance(plain, float) and plain.is_integer():
        got = int(plain)
    t.number(got, want, "splits:")


def quickest(programs: int, tiles: int, places: int, start: int = 1) -> int:
    """The number of splits by the formula; only for draws, which are to tell it from wrong ones."""
    return min(range(1, tiles + 1), key=lambda s: -(-programs * s // places) * (-(-tiles // s) + start))


def is_telling(t: CheckContext, case: Case, places: int) -> bool:
    """Another number comes out with a tile forgotten, in even rounds, or a start that costs nothing, in odd
    ones."""
    lengths, _, n_kv_heads, block, _ = case
    programs, tiles = len(lengths) * n_kv_heads, -(-max(lengths) // block)
    forgotten, start = (0, 0) if t.round % 2 else (1, 1)
    return quickest(programs, tiles, places) != quickest(programs, tiles - forgotten, places, start)


def case(
    t: CheckContext, batch: int, tiles: int, n_kv_heads: int, group: int = 1, spread: bool = False
) -> Case:
    """A batch whose longest row has this many tiles."""
    block = t.pick(16, 32, 64)
    longest = tiles * block - t.integer(1, block - 1)
    short = (lambda: t.integer(1, longest // 2)) if spread else (lambda: longest)
    lengths = [longest, *(short() for _ in range(batch - 1))]
    t.random.shuffle(lengths)
    return lengths, n_kv_heads * group, n_kv_heads, block, 0


@choose.requirement(1, "one long sequence", rounds=4)
def one_long(t: CheckContext, choose_splits: Answer) -> None:
    """fills a machine with 20 to 60 multiprocessors for one sequence and 1, 2 or 3 KV heads, and one with 140
    to 180 for a single head: any number of splits up to the number of tiles is possible"""
    n_kv_heads = (1, 2, 2, 3)[t.round]  # with 1 in an odd round nothing would tell
    while True:
        shape, multiprocessors = case(t, 1, t.integer(61, 150), n_kv_heads), t.integer(20, 60)
        if is_telling(t, shape, multiprocessors):
            break
    choose_same(t, choose_splits, shape, multiprocessors, 1)
    if t.round == 0:  # one wave with two tiles in each program is best
        multiprocessors = t.integer(140, 180)
        tiles = 2 * multiprocessors - t.integer(0, 20)
        choose_same(t, choose_splits, case(t, 1, tiles, 1), multiprocessors, 1)


@choose.requirement(1, "a batch that fills the machine", rounds=4)
def full_batch(t: CheckContext, choose_splits: Answer) -> None:
    """1 where sequences times KV heads are as many as the machine holds, or two or three times as many"""
    n_kv_heads, resident = t.pick(2, 4), t.pick(1, 2)
    while True:
        batch, tiles, times = t.integer(4, 8), t.integer(6, 20), t.integer(1, 3)
        multiprocessors = batch * n_kv_heads // resident
        if quickest(batch * times, tiles, multiprocessors * resident) > 1:  # without the KV heads
            break
    choose_same(t, choose_splits, case(t, batch * times, tiles, n_kv_heads), multiprocessors, resident)


@choose.requirement(1, "grouped heads and several programs a multiprocessor", rounds=4)
def grouped(t: CheckContext, choose_splits: Answer) -> None:
    """counts KV heads, not query heads, and what the machine holds at a time"""
    n_kv_heads, group, resident = t.pick(2, 3), t.pick(4, 8), t.pick(3, 2)
    while True:
        shape = case(t, t.integer(2, 4), t.integer(40, 90), n_kv_heads, group)
        multiprocessors = t.integer(20, 40)
        places, programs = multiprocessors * resident, len(shape[0]) * n_kv_heads
        tiles = -(-max(shape[0]) // shape[3])
        one_wave = t.round == 0 and quickest(programs, tiles, places) == places // programs
        if not one_wave and is_telling(t, shape, places):
            break
    choose_same(t, choose_splits, shape, multiprocessors, resident)


@choose.requirement(1, "short contexts, rows of different length, awkward numbers", rounds=9)
def awkward(t: CheckContext, choose_splits: Answer) -> None:
    """never more splits than tiles of the longest row; no wave for a handful of programs"""
    n_kv_heads = {0: 1, 2: 5}.get(t.round, t.pick(1, 3, 5))
    group, resident = t.pick(1, 4), t.pick(1, 2)
    telling = False
    while not telling:
        tiles, multiprocessors = t.integer(2, 3) if t.round == 0 else t.integer(3, 25), t.integer(11, 37)
        shape = case(t, t.integer(2, 5), tiles, n_kv_heads, group, spread=True)
        lengths, block, places = shape[0], shape[3], multiprocessors * resident
        programs = len(lengths) * n_kv_heads
        if t.round == 1:  # whether the tiles or the lengths of all rows are added up is told apart here alone
            sums = sum(-(-length // block) for length in lengths), -(-sum(lengths) // block)
            telling = len({quickest(programs, tiles, places) for tiles in sums}) == 2
        else:
            free = quickest(programs, tiles, places, start=0)
            telling = t.round != 2 or free != quickest(programs, tiles, places)
    choose_same(t, choose_splits, shape, multiprocessors, resident)


# 11.8: split and merge in one launch, compared with attention over all keys at once, call after call

ticket = Exercise(
    id="11.8",
    slug="ticket",
    title="Merge in the same launch, by ticket",
    answers=("one_launch",),
    forbidden=READY_MADE,
    hints=(
        "Each program that has stored its part draws a ticket: `tl.atomic_add(TICKETS + row, 1)` adds 1 and "
        "returns what was there *before*, so the programs of a row draw 0, 1, 2, …",
        "The one that draws the last number knows that all other parts are there. With n programs the last "
        "number is n − 1.",
        "Only splits that have keys draw: the others have left already. So the last number is "
        "`live_splits - 1`, not `n_splits - 1`.",
        "`if ticket == live_splits - 1:` merge, and leave the place as you found it: "
        "`tl.store(TICKETS + row, 0)`. The next decode step uses the same memory.",
    ),
)

READ_TICKET = ("tl.load reads", "TICKETS")
TicketInputs = tuple[Tensor, Tensor, Tensor, Tensor, int]


def ticket_draw(t: CheckContext, lengths: list[int], n_splits: int) -> TicketInputs:
    B, D, S = len(lengths), t.pick(8, 32), 4 * BLOCK
    rows = torch.tensor(lengths, dtype=torch.int32)
    return t.randn(B, D), t.randn(B, S, D), t.randn(B, S, D), rows, n_splits


class Tickets:
    """The counters of a workspace, which calls leave to each other. (A check hands out copies of tensors,
    so a function that holds them is handed out instead.)"""

    def __init__(self, batch: int) -> None:
        self.tensor = torch.zeros(batch, dtype=torch.int32)

    def __call__(self, like: Tensor) -> Tensor:
        self.tensor = self.tensor.to(like.device)
        return self.tensor


def ticket_same(
    t: CheckContext, one_launch: Answer, inputs: TicketInputs, tickets: Tickets, first: int
) -> None:
    out, merges = t.pair(run(one_launch, *inputs, first, tickets), "a pair (out, merges)")
    t.close(out, attend_rows(*inputs[:4]), "out:")
    t.true(bool((merges == 1).all()), "one merge in each row", f"merges: {merges.tolist()}")
    read = READ_TICKET in done
    t.true(not read, "tickets drawn by one atomic operation", "tickets read by tl.load")


@ticket.requirement(1, "one call", rounds=3)
def one_call(t: CheckContext, one_launch: Answer) -> None:
    """attention over all keys, (B, D), where every split has keys, in whichever order they run; one merge a
    row"""
    n_splits = (2, 3, 1)[t.round]
    inputs = ticket_draw(t, [n_splits * BLOCK - t.integer(0, 9)] * 2, n_splits)
    ticket_same(t, one_launch, inputs, Tickets(2), (1, 2, 0)[t.round])


@ticket.requirement(1, "splits without keys", rounds=2)
def ticket_empty_splits(t: CheckContext, one_launch: Answer) -> None:
    """the same where short rows have fewer live splits than n_splits"""
    inputs = ticket_draw(t, [t.integer(1, BLOCK), t.integer(2 * BLOCK + 1, 3 * BLOCK)], 4)
    ticket_same(t, one_launch, inputs, Tickets(2), (0, 2)[t.round])


@ticket.requirement(2, "call after call", rounds=1)
def again(t: CheckContext, one_launch: Answer) -> None:
    """a second and a third call with the same tickets, other inputs and other lengths: right each time,
    and the tickets are 0 afterwards"""
    tickets = Tickets(2)
    for first, lengths in enumerate(([2 * BLOCK, 3 * BLOCK - 5], [BLOCK + 3, BLOCK - 1], [9, 2 * BLOCK + 2])):
        ticket_same(t, one_launch, ticket_draw(t, lengths, 3), tickets, first)
    t.true(not tickets.tensor.any(), "tickets that are 0 again", f"tickets {tickets.tensor.tolist()}")


EXERCISES = (floor, online, tail, packing, splits, pages, choose, ticket)
