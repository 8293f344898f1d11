"""Unit 13: requirements and hints of the exercises on claims and verdicts."""

import inspect
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn import workbench
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    NotWritten,
    Raised,
    Stop,
    describe,
    find_exercise,
    judge,
    keep_points,
    plain_number,
    shorten,
    solved_answers,
)
from kvlearn.model import Decoder, Spec, convert
from kvlearn.study.quality.statistics import student_quantile
from kvlearn.study.text import corpus

Config = dict[str, Any]


def about(
    t: CheckContext, got: Any, want: float, what: str, relative: float = 1e-6, least: float = 1e-9
) -> bool:
    """``got`` is this number within a relative error; noted rounded, since orders of operations differ.

    Numbers below ``least`` may be wrong by as much as ``least``: differences of fp32 losses have few digits.
    """
    plain = plain_number(got)
    if plain is None:
        return t.note(got, Difference(what, f"{want:.6g}", describe(got)))
    good = plain == want or (math.isfinite(want) and abs(plain - want) <= relative * max(abs(want), least))
    rounded = round(plain, 6) if least > 1e-6 and math.isfinite(plain) else plain
    return t.note(f"{rounded:.5g}", None if good else Difference(what, f"{want:,.6g}", f"{plain:,.6g}"))


def mapping(t: CheckContext, got: Any, keys: Iterable[str] | None, form: str) -> dict[Any, Any]:
    """An answer that is a dict with these keys, or the end of this round."""
    if isinstance(got, Mapping) and (keys is None or set(got) == set(keys)):
        return dict(got)
    came = f"the keys {', '.join(map(str, got)) or 'none'}" if isinstance(got, Mapping) else describe(got)
    t.note(came, Difference("", form, came[:120]))
    raise Stop


# 13.1: claims about models, compared with a count layer by layer

claims = Exercise(
    id="13.1",
    slug="judge",
    title="Judge a claim from its numbers",
    answers=("bytes_per_user", "judge"),
    hints=(
        "A config has a window in three of four layers and a top_k. Which of these fields decides what is "
        "allocated, and which only what a step looks at? Answer for one layer of each kind.",
        "`bytes_per_user`, in pseudocode: first the four fields, None if one of them is not there. Then for "
        "each layer, numbered from 1: tokens kept = context, or the window if it is smaller and the layer "
        "is not global; tokens read = the kept ones, or top_k if it is smaller.",
        "Sum both over the layers. One token of one layer has 2 · KV heads · head dim numbers, times their "
        "bytes. `query_heads` is not needed at all.",
        "`judge` is four questions in the order of the task: what cannot be computed; is everything right "
        "for stored bytes; is everything right for read ones; else it does not hold. Write one function "
        "for the middle two, with 0 or 1 as the index into the pair.",
        "A number that is None is not claimed, so it is right. A saving is 1 − new / old, and its tolerance "
        "is a difference of 0.02; that of the gigabytes is 5% of your own number.",
    ),
)

FIELDS = ("layers", "kv_heads", "head_dim", "bytes_per_number")
VERDICTS = ("holds", "holds for what is read", "does not hold", "cannot be checked")


def drawn_config(t: CheckContext) -> Config:
    """A model whose layers are all alike; no two sizes are equal."""
    heads = t.pick((4, 20), (6, 42), (8, 24))
    return {
        "layers": 4 * t.integer(6, 11),
        "query_heads": heads[1],
        "kv_heads": heads[0],
        "head_dim": t.pick(80, 96, 128),
        "bytes_per_number": t.pick(1, 2, 4),
    }


def user_reference(config: Config, context: int) -> tuple[int, int]:
    """Bytes stored and read, token by token kept as two counts per layer."""
    one = sum(config["head_dim"] * config["bytes_per_number"] for _ in range(2 * config["kv_heads"]))
    stored = read = 0
    for number in range(1, config["layers"] + 1):
        kept = context
        every = config.get("global_every")
        if config.get("window") and not (every and number % every == 0) and config["window"] < kept:
            kept = config["window"]
        stored += kept * one
        top_k = config.get("top_k")
        read += (top_k if top_k and top_k < kept else kept) * one
    return stored, read


def same_bytes(t: CheckContext, bytes_per_user: Answer, config: Config, context: int) -> None:
    got = t.parts(bytes_per_user(dict(config), context), 2, "a pair (stored, read)")
    for came, want, what in zip(got, user_reference(config, context), ("stored:", "read:"), strict=True):
        t.number(came, want, what)


def claim_of(
    config: Config,
    context: int,
    kind: int,
    baseline: Config | None = None,
    size_off: float | None = 1.0,
    saving_off: float | None = 0.0,
) -> Config:
    """A claim about what is stored (0) or read (1): the gigabytes times ``size_off``, the saving plus
    ``saving_off``; None: not claimed."""
    new = user_reference(config, context)[kind]
    saving = None
    if baseline is not None and saving_off is not None:
        saving = 1 - new / user_reference(baseline, context)[kind] + saving_off
    return {
        "config": config,
        "context": context,
        "gb_per_user": None if size_off is None else new / 1e9 * size_off,
        "baseline": baseline,
        "saving": saving,
    }


def judged(t: CheckContext, judge: Answer, claim: Config, want: str) -> None:
    t.text(judge(claim), want, "verdict:")


@claims.requirement(1, "bytes: every layer alike")
def claims_plain(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """keys and values of the KV heads in all layers; a step reads all that is stored"""
    same_bytes(t, bytes_per_user, drawn_config(t), t.integer(2000, 9000))


@claims.requirement(1, "bytes: a window, and global layers", rounds=4)
def claims_window(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """at most `window` tokens, stored and read, but in layers whose number is a multiple of global_every"""
    config = {**drawn_config(t), "window": t.integer(500, 900)}
    if t.round:
        # Not a divisor of the layers: then layers counted from 0 have one global layer more.
        config["global_every"] = t.random.choice([n for n in (3, 5, 7) if config["layers"] % n])
    same_bytes(t, bytes_per_user, config, t.integer(100, 400) if t.round == 3 else t.integer(2000, 9000))


@claims.requirement(1, "bytes: top_k", rounds=4)
def claims_top(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """at most top_k tokens of a layer are read, and all are stored; beside windows too"""
    config = {**drawn_config(t), "top_k": t.integer(300, 450)}
    if t.round % 2:
        config |= {"window": (200, 800)[t.round // 2] + t.integer(1, 50), "global_every": 4}
    same_bytes(t, bytes_per_user, config, t.integer(2000, 9000))


@claims.requirement(1, "bytes: not published", rounds=4)
def claims_unknown(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """None where one of the four fields is missing or None, and only there"""
    config = drawn_config(t)
    name = FIELDS[t.round]
    for unknown in ({**config, name: None}, {key: n for key, n in config.items() if key != name}):
        t.text(bytes_per_user(unknown, 3000), None, f"without {name}:")
    without = {key: n for key, n in config.items() if key != "query_heads"}
    same_bytes(t, bytes_per_user, without, t.integer(2000, 9000))


@claims.requirement(1, "judge: holds", rounds=4)
def claims_hold(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """what is claimed is right for stored bytes, within 5% of the gigabytes and 0.02 of the saving"""
    baseline = drawn_config(t)
    config = {**baseline, "window": t.integer(500, 700), "global_every": 4}
    context, off = t.integer(6000, 9000), (0.951, 1.049, None, 1.0)[t.round]
    judged(
        t, judge, claim_of(config, context, 0, baseline, off, (0.017, None, -0.017, 0.0)[t.round]), "holds"
    )
    large = {**config, "kv_heads": 3 * config["kv_heads"], "top_k": 4000}  # reads less than it stores
    judged(t, judge, claim_of(large, context, 0, baseline, 1.0, 0.0), "holds")


@claims.requirement(1, "judge: holds for what is read", rounds=4)
def claims_read(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """not right for stored bytes, and all of it right for those read"""
    baseline = drawn_config(t)
    config, context = {**baseline, "top_k": t.integer(600, 900)}, t.integer(6000, 9000)
    if t.round == 3:  # the baseline too reads less than it stores
        baseline = {**baseline, "top_k": 3000}
    # Near both ends of the tolerance: a layer too few or too many is never within it.
    off, shift = ((1.045, 0.0), (0.955, None), (None, -0.01), (1.0, 0.0))[t.round]
    judged(t, judge, claim_of(config, context, 1, baseline, off, shift), "holds for what is read")


@claims.requirement(1, "judge: does not hold", rounds=9)
def claims_wrong(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """a number that is claimed is off, for stored bytes and for read ones: also where the other one is right,
    or where one fits what is stored and the other what is read"""
    baseline, context = drawn_config(t), t.integer(6000, 9000)
    config = {**baseline, "window": t.integer(500, 700), "global_every": 4}
    if t.round == 5:
        sparse = {**baseline, "top_k": t.integer(600, 900)}
        claim = claim_of(sparse, context, 1, baseline, 1.0, 0.0)
        claim["gb_per_user"] = user_reference(sparse, context)[0] / 1e9
    else:
        off, shift = {
            0: (1 / 1.0737, None),
            1: (1.0, 0.03),
            2: (1.09, 0.0),
            3: (None, -0.028),
            4: (0.91, 0.0),
            6: (1.0515, 0.0),  # within 5% of the claim, not of what is right
            7: (1.0, 0.0),
            8: (0.9485, None),
        }[t.round]
        claim = claim_of(config, context, 0, baseline, off, shift)
        if t.round == 7:
            claim["saving"] = 0.0
        if t.round == 8:  # a layer or two too few bring bytes down to one of the two claims
            judged(t, judge, claim_of(config, context, 0, None, 0.87, None), "does not hold")
    judged(t, judge, claim, "does not hold")


@claims.requirement(1, "judge: cannot be checked", rounds=4)
def claims_uncheckable(t: CheckContext, bytes_per_user: Answer, judge: Answer) -> None:
    """the config lacks a field, or a saving is claimed against a baseline that lacks one or is not named; a
    baseline that is not needed may lack anything"""
    baseline, context = drawn_config(t), t.integer(6000, 9000)
    config = {**baseline, "window": t.integer(500, 700)}
    claim = claim_of(config, context, 0, baseline)
    unknown = {**baseline, t.pick(*FIELDS): None}
    changes = ({"config": {**config, "kv_heads": None}}, {"baseline": unknown}, {"baseline": None})
    for change in (changes[t.round % 3], {"config": {"window": 500}}):
        judged(t, judge, {**claim, **change}, "cannot be checked")
    # Near an end of the tolerance, for the same reason as in the rows above.
    claim["gb_per_user"] *= (0.955, 1.045)[t.round % 2]
    judged(t, judge, {**claim, "saving": None, "baseline": (None, unknown)[t.round % 2]}, "holds")


# 13.2: all ways to read a number, compared with loops in exact fractions

unstated = Exercise(
    id="13.2",
    slug="baseline",
    title="Find the unstated baseline",
    answers=("readings", "settled", "question"),
    hints=(
        "How many readings are there in all, if each question has the answers in OPTIONS? Is that too many "
        "to try them one by one?",
        "`itertools.product(*OPTIONS.values())` gives all combinations; `dict(zip(OPTIONS, values))` makes a "
        "reading of one. Then compute its bytes, divide by base to the power of the letter, and compare.",
        "The bytes: 2 · heads · head dim · layers · tokens · bits / 8. Each of heads, layers and tokens is "
        "looked up by the reading's answer; a small dict for each of them does it.",
        "How precise is the printed number? Count the digits behind the point: with d of them the last one "
        "is worth 10⁻ᵈ, and half of that is the tolerance. `KiB` allows base 1024 only.",
        "`settled`: for each question the set of answers in the readings; keep those with one element. "
        "`question`: for each question the size of the largest group of readings with one answer "
        "(`Counter(...).values()`), and of these the smallest. `min` keeps the first of equal ones.",
    ),
)

OPTIONS: dict[str, tuple[Any, ...]] = {
    "heads": ("KV", "query"),
    "layers": ("one", "stored", "read"),
    "bits": (32, 16, 8),
    "amount": ("token", "user", "batch"),
    "base": (1000, 1024),
}
Reading = dict[str, Any]


def bytes_of(config: Config, heads: str, layers: str, bits: int, amount: str) -> int:
    """Key, then value; layer by layer of those that count."""
    n_heads = config["query_heads"] if heads == "query" else config["kv_heads"]
    counted = {
        "one": [0],
        "read": range(config["layers"]),
        "stored": range(config["shared_layers"], config["layers"]),
    }
    tokens = {"token": 1, "user": config["context"], "batch": config["context"] * config["batch"]}[amount]
    size = (n_heads + n_heads) * config["head_dim"] * (bits // 8) * tokens
    return size * len(counted[layers])


def readings_reference(
    text: str, config: Config, wide: float = 0.5, low: float = 0.5
) -> tuple[set[tuple[Any, ...]], bool]:
    """The readings as tuples in the order of OPTIONS, and whether none is close to the border.

    A value may be ``wide`` units of the last digit above the printed number and ``low`` below it.
    """
    amount, unit = text.split(" ")
    last = 10.0 ** -(len(amount) - amount.index(".") - 1 if "." in amount else 0)
    found, clear = set(), True
    for heads in OPTIONS["heads"]:
        for layers in OPTIONS["layers"]:
            for bits in OPTIONS["bits"]:
                for many in OPTIONS["amount"]:
                    size = bytes_of(config, heads, layers, bits, many)
                    for base in (1024,) if "i" in unit else OPTIONS["base"]:
                        above = (size / base ** ("KMG".index(unit[0]) + 1) - float(amount)) / last
                        clear = clear and min(abs(above - wide), abs(above + low)) > 1e-3
                        if -low <= above <= wide:
                            found.add((heads, layers, bits, many, base))
    return found, clear


def plainly(text: str, config: Config) -> bool:
    """Other ways to compare the number, such as within 1% or cut off, give the same readings."""
    found, clear = readings_reference(text, config)
    one_percent = 0.01 * float(text.split(" ")[0]) * 10 ** len(text.split(" ")[0].partition(".")[2])
    others = ((1.0, 1.0), (1.0, 0.0), (one_percent, one_percent))
    return clear and all(readings_reference(text, config, *each)[0] == found for each in others)


def told(found: Iterable[tuple[Any, ...]]) -> str:
    """Readings in a line, for a table."""
    listed = sorted(map(str, found))
    shown = "; ".join(each.strip("()").replace("'", "") for each in listed[:3])
    if not listed:
        return "no readings"
    return f"{len(listed)} reading{'s' * (len(listed) > 1)} ({shown}{' …' if len(listed) > 3 else ''})"


def as_tuples(t: CheckContext, got: Any) -> set[tuple[Any, ...]]:
    """A list of readings as a set of tuples, or the end of this round."""
    if isinstance(got, list | tuple):
        rows = [each for each in got if isinstance(each, Mapping) and set(each) == set(OPTIONS)]
        if len(rows) == len(got):
            return {tuple(row[name] for name in OPTIONS) for row in rows}
    t.note(got, Difference("", f"a list of dicts with {', '.join(OPTIONS)}", describe(got)))
    raise Stop


@lru_cache(maxsize=64)
def drawn_text(
    seed: int,
    round: int,
    reading: tuple[Any, ...],
    shared: bool,
    digits: int,
    off: float | None = None,
    last: str = "",
) -> tuple[str, Config]:
    """A printed number with this reading, and the config.

    Without ``off`` the number is so plain that it does not matter how it is compared. With 0 it was rounded
    up; with another ``off`` it is wrong by so many units of its last digit, and nothing reproduces it.
    ``last``: its last digit.
    """
    r = random.Random(f"{seed}/{round}/{reading}/{shared}/{digits}/{off}")
    while True:
        kv_heads = r.choice((3, 5, 6, 7))
        config = {
            "layers": r.randint(20, 60),
            "shared_layers": r.randint(5, 15) if shared else 0,
            "query_heads": kv_heads * r.choice((5, 7, 9)),
            "kv_heads": kv_heads,
            "head_dim": r.choice((72, 80, 96, 112)),
            "context": r.randint(3000, 9000),
            "batch": r.choice((11, 13, 17, 23)),
        }
        size = bytes_of(config, *reading[:4])
        unit = 3 if size > 2 * 10**9 else 2 if size > 2 * 10**6 else 1
        value = size / reading[4] ** unit
        shown = digits + (value < 20)
        text = f"{value + (off or 0) / 10**shown:.{shown}f} {'KMG'[unit - 1]}B"
        found, clear = readings_reference(text, config)
        if off is None:
            good = reading in found and plainly(text, config) and plainly(text.replace("B", "iB"), config)
        elif off:
            good = clear and not found
        else:
            good = clear and reading in found and float(text.split(" ")[0]) > value
        if good and value > 1 and text.split(" ")[0].endswith(last):
            return text, config


def same_readings(t: CheckContext, readings: Answer, text: str, config: Config) -> None:
    want, _ = readings_reference(text, config)
    got = as_tuples(t, readings(text, dict(config)))
    missing, extra = want - got, got - want
    came = told(got) + (f"; {told(missing)} missing" if missing else "")
    t.note(str(sorted(map(str, got))), Difference("", told(want), came) if missing or extra else None)


@unstated.requirement(1, "readings: of one token", rounds=4)
def unstated_token(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """KV or query heads, one layer or all, 32, 16 or 8 bits"""
    reading = (t.pick("KV", "query"), ("one", "read")[t.round % 2], t.pick(32, 16, 8), "token", 1000)
    same_readings(t, readings, *drawn_text(t.seed, t.round, reading, False, 1))


@unstated.requirement(1, "readings: of a user or a batch", rounds=4)
def unstated_users(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """`context` tokens per user, `batch` users"""
    many = ("user", "batch")[t.round % 2]
    reading = (t.pick("KV", "query"), "read", t.pick(32, 16, 8), many, 1000)
    same_readings(t, readings, *drawn_text(t.seed, t.round, reading, False, 2))


@unstated.requirement(1, "readings: layers that share a cache", rounds=4)
def unstated_shared(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """all layers are read; the last shared_layers store nothing"""
    reading = (t.pick("KV", "query"), ("stored", "read")[t.round % 2], 16, t.pick("token", "user"), 1000)
    same_readings(t, readings, *drawn_text(t.seed, t.round, reading, True, 2))


@unstated.requirement(1, "readings: KB, MB and KiB, MiB", rounds=4)
def unstated_units(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """base 1000 or 1024 with B, 1024 alone with iB"""
    reading = (t.pick("KV", "query"), "one", 16, t.pick("token", "user"), (1024, 1000)[t.round % 2])
    text, config = drawn_text(t.seed, t.round, reading, False, 1)
    same_readings(t, readings, text, config)
    same_readings(t, readings, text.replace("B", "iB"), config)


@unstated.requirement(1, "readings: as precise as it is printed", rounds=4)
def unstated_digits(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """within half a unit of the last digit; an empty list where nothing reproduces the number"""
    reading = ("KV", "read", t.pick(32, 16), "token", 1000)
    digits = (0, 2)[t.round // 2]
    same_readings(t, readings, *drawn_text(t.seed, t.round, reading, False, digits, 0.0))
    # As it was printed, it is off by more than rounding explains; a zero at the end is a digit as well.
    for off, last in ((0.8, "0" if t.round == 3 else ""), (1.5, "")):
        same_readings(t, readings, *drawn_text(t.seed, t.round, reading, False, digits, off, last))


def drawn_readings(t: CheckContext, n: int, fixed: Mapping[str, Any]) -> list[Reading]:
    """So many different readings that agree on ``fixed`` and on nothing else."""
    while True:
        rows: list[Reading] = []
        while len(rows) < n:
            row = {name: fixed.get(name, t.random.choice(values)) for name, values in OPTIONS.items()}
            rows += [] if row in rows else [row]
        open_fields = [name for name in OPTIONS if name not in fixed]
        if all(len({row[name] for row in rows}) > 1 for name in open_fields):
            return rows


@unstated.requirement(1, "settled")
def unstated_settled(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """the questions with one answer in all readings, and these answers; an empty dict without readings"""
    names = t.random.sample(list(OPTIONS), 2)
    fixed = {name: t.random.choice(OPTIONS[name]) for name in names}
    rows = drawn_readings(t, t.integer(4, 6), fixed)
    for found, want in ((rows, fixed), (rows[:1], rows[0]), ([], {})):
        got = settled([dict(row) for row in found])
        came = dict(got) if isinstance(got, Mapping) else got
        shown = repr(sorted(came.items())) if isinstance(came, dict) else describe(came)
        t.note(
            shown, None if came == want else Difference(f"of {len(found)} readings:", f"{want}", shown[:150])
        )


def question_reference(found: Sequence[Reading]) -> str | None:
    """The question with the smallest largest group, by counting pairs."""
    if len(found) <= 1:
        return None
    worst = {name: max(sum(a[name] == b[name] for b in found) for a in found) for name in OPTIONS}
    return next(name for name in OPTIONS if worst[name] == min(worst.values()))


def tied_readings(t: CheckContext) -> list[Reading]:
    """Readings for which several questions are best. In half of the rounds the first of them is not the one
    with most answers, in the others not the best by its luckiest answer or on average; in the last, these
    differ."""
    while True:
        rows = drawn_readings(t, t.integer(5, 8), {})
        groups = {
            name: sorted(sum(row[name] == value for row in rows) for value in {r[name] for r in rows})
            for name in OPTIONS
        }
        best = question_reference(rows)
        most = max(OPTIONS, key=lambda name: len(groups[name]))
        least = min(OPTIONS, key=lambda name: groups[name][0])
        average = min(OPTIONS, key=lambda name: sum(n * n for n in groups[name]))
        equal = [name for name in OPTIONS if groups[name][-1] == groups[str(best)][-1]]
        good = (
            best != most,
            best not in (least, average),
            best != most,
            best not in (least, average) and most not in (least, average),
        )[t.round]
        if good and len(equal) > 1:
            return rows


@unstated.requirement(1, "question: the best one", rounds=4)
def unstated_best(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """that whose answer leaves the fewest readings in the worst case, the first of equal ones"""
    rows = tied_readings(t)
    t.text(question([dict(row) for row in rows]), question_reference(rows), "ask for:")


@unstated.requirement(1, "question: nothing to ask")
def unstated_nothing(t: CheckContext, readings: Answer, settled: Answer, question: Answer) -> None:
    """None for one reading and for none; of two readings the first question in which they differ"""
    rows = drawn_readings(t, 1, dict(zip(OPTIONS, ("KV", "one", 16, "token", 1000), strict=True)))
    t.text(question(rows), None, "of one reading:")
    t.text(question([]), None, "of none:")
    pair = drawn_readings(t, 2, {"heads": "KV", "bits": 8})
    t.text(question(pair), "layers", "of two:")


# 13.3: experiments on simulated runs

trial = Exercise(
    id="13.3",
    slug="experiment",
    title="An experiment that could refute it",
    answers=("smallest", "seeds", "experiment"),
    hints=(
        "You measure three seeds, look, and add one as long as the result is not clear. In the end it is "
        "clear. Why does that say less than four seeds planned from the beginning?",
        "`smallest` is the formula of the task; both tables are asked at n − 1. `seeds` tries n = 2, 3, … "
        "and stops at the first that is small enough.",
        "`experiment`, in pseudocode: n from seeds; if there is none, leave; measure all seeds; drop the "
        "diverged runs; if fewer than two are left, leave; compute low and high; compare both with at_most.",
        "`statistics.stdev` divides by n − 1, `fmean` is the mean. The degrees of freedom are those of the "
        "differences that are left.",
        "Refuted: low > at_most. Supported: high ≤ at_most. Everything else is undecided. Zero plays no "
        "part: the claim is not that it costs nothing.",
    ),
)

T95 = {df: student_quantile(0.975, df) for df in range(1, 31)}
T80 = {df: student_quantile(0.8, df) for df in range(1, 31)}


def smallest_reference(spread: float, n: int) -> float:
    error = math.sqrt(spread * spread / n)
    return T95[n - 1] * error + T80[n - 1] * error


def seeds_reference(spread: float, difference: float) -> int | None:
    good = [n for n in range(2, 32) if smallest_reference(spread, n) <= difference]
    return min(good, default=None)


class Simulation:
    """Training runs that end at once, with known differences. ``asked``: the seeds, in order."""

    def __init__(self, differences: Sequence[float | None]) -> None:
        self.differences, self.asked = differences, list[Any]()

    def measure(self, seed: int) -> float | None:
        self.asked.append(seed)
        if len(self.asked) > 200:
            raise RuntimeError("more than 200 runs: there is no money left")
        return self.differences[seed % len(self.differences)]


def plan(t: CheckContext) -> tuple[Config, int]:
    """A claim whose experiment takes 7 to 12 seeds, and their number."""
    spread = t.integer(50, 150) / 10_000
    n = t.integer(7, 12)
    difference = smallest_reference(spread, n) * 1.0001
    return {"at_most": 5 * difference, "difference": difference, "spread": spread}, n


def drawn_differences(t: CheckContext, claim: Config, n: int, kind: str) -> list[float]:
    """Differences that refute the claim, support it, or leave it undecided although the first four refute it;
    and more that go on in the same way."""
    at, size = claim["at_most"], claim["difference"]
    noise = [0.25 * size * t.random.uniform(-1, 1) for _ in range(60)]
    if kind == "refuted":
        return [at + 1.2 * size + each for each in noise]
    if kind == "supported":
        return [at - 1.2 * size + each for each in noise]
    early, late = at + size, at - 0.45 * size
    return [(early if i < 4 else late) + 0.2 * each for i, each in enumerate(noise)]


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    mean = math.fsum(values) / n
    half = T95[n - 1] * math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return mean - half, mean + half


class Table(dict[int, float]):
    """A table that notes which entries are asked for."""

    def __init__(self, entries: Mapping[int, float]) -> None:
        super().__init__(entries)
        self.asked = set[int]()

    def __getitem__(self, df: int) -> float:
        self.asked.add(df)
        return super().__getitem__(df)


def carried_out(t: CheckContext, experiment: Answer, claim: Config, runs: Simulation) -> tuple[Any, Any]:
    t95, t80 = Table(T95), Table(T80)
    got = t.parts(experiment(dict(claim), runs.measure, t95, t80), 2, "a pair (n, verdict)")
    # No requirement: it tells mistakes apart that give the same verdicts.
    t.note(f"{sorted(t95.asked)} {sorted(t80.asked)}", None)
    return got[0], got[1]


@trial.requirement(2, "smallest")
def trial_smallest(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """(t95 + t80) · spread / √n, both at n − 1 degrees of freedom"""
    spread, n = t.integer(50, 500) / 10_000, (2, t.integer(3, 6), t.integer(8, 20))[t.round]
    about(t, smallest(spread, n, dict(T95), dict(T80)), smallest_reference(spread, n), f"{n} seeds:")


@trial.requirement(1, "seeds: the fewest that are enough", rounds=4)
def trial_seeds(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """the first n from 2 on whose smallest detectable difference is at most the one asked for"""
    spread, n = t.integer(50, 500) / 10_000, (2, t.integer(4, 8), t.integer(10, 16), 31)[t.round]
    for by in (1.0001, 0.9999):
        difference = smallest_reference(spread, n) * by
        want = seeds_reference(spread, difference)
        if want is not None:
            t.number(seeds(spread, difference, dict(T95), dict(T80)), want, "seeds:")


@trial.requirement(1, "seeds: too few")
def trial_none(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """None where 31 seeds do not detect it; then the experiment is (0, "undecided"), and measures nothing"""
    claim, _ = plan(t)
    claim["difference"] = smallest_reference(claim["spread"], 31) * t.pick(0.3, 0.9, 0.999)
    t.text(seeds(claim["spread"], claim["difference"], dict(T95), dict(T80)), None, "seeds:")
    runs = Simulation([claim["at_most"] * (1 + i) for i in range(40)])
    n, verdict = carried_out(t, experiment, claim, runs)
    t.text(plain_number(n), 0, "n:")
    t.text(verdict, "undecided", "verdict:")
    t.text(len(runs.asked), 0, "runs:")


@trial.requirement(1, "experiment: as planned")
def trial_planned(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """each of the seeds 0 … n − 1 measured once, whatever the first ones say; none added"""
    claim, n = plan(t)
    runs = Simulation(drawn_differences(t, claim, n, "undecided"))
    came, _ = carried_out(t, experiment, claim, runs)
    t.number(came, n, "n:")
    good = sorted(runs.asked, key=str) == sorted(range(n), key=str)
    shown = ", ".join(map(str, runs.asked[:15])) + (" …" if len(runs.asked) > 15 else "")
    t.note(
        shown, None if good else Difference("measured:", f"each seed from 0 to {n - 1} once", shown or "none")
    )


def shifted(values: Sequence[float], claim: Config, by: float) -> list[float]:
    """``values`` with their mean so many half widths of their interval above at_most."""
    mean = math.fsum(values) / len(values)
    side = by * (interval_of(values)[1] - mean)
    return [each - mean + claim["at_most"] + side for each in values]


@trial.requirement(1, "experiment: refuted or supported", rounds=4)
def trial_decided(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """ "refuted" where the whole interval is above at_most, "supported" where none of it is: by little too"""
    claim, n = plan(t)
    kind = ("refuted", "supported")[t.round % 2]
    values = drawn_differences(t, claim, n, kind)
    if t.round > 1:
        values = shifted(values[:n], claim, (1.02, -1.02)[t.round % 2])
        first = max(values) if kind == "supported" else min(values)
        values.insert(0, values.pop(values.index(first)))  # read once more, it leaves the claim undecided
    _, verdict = carried_out(t, experiment, claim, Simulation(values))
    t.text(verdict, kind, "verdict:")


@trial.requirement(1, "experiment: undecided")
def trial_undecided(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """ "undecided" where at_most is inside the interval, on whichever side the mean is"""
    claim, n = plan(t)
    values = shifted(drawn_differences(t, claim, n, "undecided")[:n], claim, (0.3, -0.5, 0.975)[t.round])
    _, verdict = carried_out(t, experiment, claim, Simulation(values))
    t.text(verdict, "undecided", "verdict:")


@trial.requirement(1, "experiment: diverged runs", rounds=7)
def trial_diverged(t: CheckContext, smallest: Answer, seeds: Answer, experiment: Answer) -> None:
    """left out, and not replaced; the interval is that of the differences left, "undecided" with fewer than
    two; n stays as planned"""
    claim, n = plan(t)
    kind = ("refuted", "supported")[t.round % 2]
    values: list[float | None] = [*drawn_differences(t, claim, n, kind)]
    gone = {0: [0], 1: [1, n - 1], 2: list(range(1, n)), 3: list(range(n))}
    gone[4] = gone[5] = [0, 2, n - 1]
    for seed in gone.get(t.round, range(2, n)):
        values[seed] = None
    left = [each for each in values[:n] if each is not None]
    want = kind if len(left) > 1 else "undecided"
    if t.round == 4:  # decided if divided by the planned number, not yet with the planned degrees of freedom
        wrong = math.sqrt(len(left) / n), T95[n - 1] / T95[len(left) - 1]
        left, want = shifted(left, claim, sum(wrong) / 2), "undecided"
    if t.round == 5:  # decided with either
        left, want = shifted(left, claim, 0.98), "undecided"
    if t.round == 6:  # a difference of 0 is a measurement
        left, want = [0.0, claim["at_most"] / 100], "supported"
    rest = iter(left)
    runs = Simulation([None if each is None else next(rest) for each in values[:n]] + values[n:])
    came, verdict = carried_out(t, experiment, claim, runs)
    t.text(verdict, want, "verdict:")
    t.number(len(runs.asked), n, "runs:")
    t.number(came, n, "n:")


# 13.4: users and prices from assumptions, compared with counting users one by one

table = Exercise(
    id="13.4",
    slug="table",
    title="Recompute the article's table",
    answers=("users", "dollars", "factor", "decisive"),
    hints=(
        "The cache is divided by 4. Which terms of the price change, and which stay as they are? Say what "
        "happens to the number of users, to the bytes of a step, and to the FLOPs of a step.",
        "`users`, in words: subtract from the memory what is reserved and what the weights need, and ask how "
        "often the cache of one user fits into the rest. No part of a user, and no negative number.",
        "`dollars`, in three lines: the seconds of a step, the dollars that so many seconds cost, and the "
        "tokens of the step that somebody pays for. The seconds are the longer of two times: which of their "
        "terms come once per step, and which once per user?",
        "`factor`: the price never rises with a larger divisor, so try 1, 2, 3, … and stop at the first that "
        'is enough. `{**model, "cache": model["cache"] / k}` is the model with a divided cache.',
        "`decisive`: for each name two prices, everything else as given. Compare quotients, not differences: "
        "an assumption that doubles the price matters more than one that adds ten percent.",
    ),
)


def users_reference(model: Config, gpu: Config, given: Config) -> int:
    n = 0
    left = gpu["memory"] - gpu["memory"] * given["reserve"] - model["weights"]
    while (n + 1) * model["cache"] <= left:
        n += 1
    return n


def dollars_reference(model: Config, gpu: Config, given: Config) -> float:
    n = users_reference(model, gpu, given)
    if not n:
        return math.inf
    reached = given["reached"]
    by_memory = (model["weights"] + n * model["cache"]) / (gpu["bandwidth"] * reached)
    by_compute = n * model["flops"] / (gpu["flops"] * reached)
    per_hour = 3600 / max(by_memory, by_compute) * n * given["busy"]
    return float(gpu["price"] / per_hour * 1e6)


def factor_reference(model: Config, gpu: Config, given: Config, ratio: float) -> int | None:
    most = ratio * dollars_reference(model, gpu, given)
    for k in range(1, 1025):
        if dollars_reference({**model, "cache": model["cache"] / k}, gpu, given) <= most:
            return k
    return None


def drawn_case(t: CheckContext) -> tuple[Config, Config, Config]:
    """A model that leaves room for 4 to 9 users and 0.3 to 0.9 of one more, on a GPU bound by memory."""
    weights, n = t.integer(14, 18) * 1e9, t.integer(4, 9)
    given = {
        "reserve": t.integer(5, 15) / 100,
        "reached": t.integer(50, 80) / 100,
        "busy": t.integer(30, 70) / 100,
    }
    memory = t.integer(75, 85) * 1e9
    # No divisor up to 1024 makes a whole number of users of it, so that rounding decides nothing.
    cache = (memory * (1 - given["reserve"]) - weights) / (n + (100 * t.integer(30, 90) + 37) / 10_000)
    bandwidth = t.integer(15, 35) * 1e11
    gpu = {
        "memory": memory,
        "bandwidth": bandwidth,
        "flops": 300 * bandwidth,
        "price": t.integer(10, 40) / 10,
    }
    return {"weights": weights, "cache": cache, "flops": weights * 1.05}, gpu, given


@table.requirement(1, "users")
def table_users(t: CheckContext, users: Answer, *others: Answer) -> None:
    """whole users beside the weights, in the memory without the reserve; 0 where not even they fit"""
    model, gpu, given = drawn_case(t)
    t.number(users(model, gpu, given), users_reference(model, gpu, given), "users:")
    room = gpu["memory"] * (1 - given["reserve"]) - model["weights"]
    nearly = {**model, "cache": room / (t.integer(4, 9) + 0.97)}
    t.number(users(nearly, gpu, given), users_reference(nearly, gpu, given), "room for nearly one more:")
    large = {**model, "weights": gpu["memory"] * (1 - given["reserve"]) + model["cache"] * t.integer(1, 3)}
    t.number(users(large, gpu, given), 0, "weights larger than the memory:")


@table.requirement(1, "dollars: bound by memory")
def table_memory(t: CheckContext, users: Answer, dollars: Answer, *others: Answer) -> None:
    """the step reads the weights once and each cache; its price over the tokens that are paid for"""
    model, gpu, given = drawn_case(t)
    about(t, dollars(model, gpu, given), dollars_reference(model, gpu, given), "dollars:")


@table.requirement(1, "dollars: bound by arithmetic")
def table_compute(t: CheckContext, users: Answer, dollars: Answer, *others: Answer) -> None:
    """a token of each user in the step, where that takes longer"""
    model, gpu, given = drawn_case(t)
    gpu["flops"] = gpu["bandwidth"] * t.integer(1, 4) / 10
    about(t, dollars(model, gpu, given), dollars_reference(model, gpu, given), "dollars:")


@table.requirement(1, "dollars: nobody fits")
def table_nobody(t: CheckContext, users: Answer, dollars: Answer, *others: Answer) -> None:
    """math.inf, and no exception"""
    model, gpu, given = drawn_case(t)
    model["cache"] = gpu["memory"] * t.pick(1, 2, 3)
    about(t, dollars(model, gpu, given), math.inf, "dollars:")


@table.requirement(2, "factor", rounds=4)
def table_factor(t: CheckContext, users: Answer, dollars: Answer, factor: Answer, *others: Answer) -> None:
    """the smallest whole divisor of the cache with which the price is at most ratio times that before"""
    model, gpu, given = drawn_case(t)
    k = (1, t.pick(3, 5, 6), t.integer(9, 15), t.integer(20, 31))[t.round]
    price = dollars_reference(model, gpu, given)
    ratio = dollars_reference({**model, "cache": model["cache"] / k}, gpu, given) / price * 1.0001
    t.number(factor(model, gpu, given, ratio), factor_reference(model, gpu, given, ratio) or 0, "divisor:")
    if t.round == 0:
        t.number(factor(model, gpu, given, 1.0), 1, "for a ratio of 1:")


@table.requirement(1, "factor: not by the cache alone")
def table_limit(t: CheckContext, users: Answer, dollars: Answer, factor: Answer, *others: Answer) -> None:
    """None where arithmetic keeps the price up; a divisor of up to 1024 where it is enough"""
    model, gpu, given = drawn_case(t)
    gpu["flops"] = 60 * gpu["bandwidth"]
    price = dollars_reference(model, gpu, given)
    floor = dollars_reference({**model, "cache": model["cache"] / 1024}, gpu, given) / price
    got = factor(model, gpu, given, floor * t.pick(0.5, 0.7, 0.9))
    t.text(got, None, "divisor:")


@table.requirement(1, "decisive", rounds=5)
def table_decisive(t: CheckContext, *answers: Answer) -> None:
    """the assumption whose two values give the largest quotient of prices, all others as they are"""
    model, gpu, given = drawn_case(t)
    ranges = {
        "reserve": (0.01, 0.1),
        "reached": (given["reached"] * 0.8, given["reached"] * 1.1),
        "busy": (given["busy"] * 0.7, given["busy"] * 1.2),
        "price": (gpu["price"] * 0.8, gpu["price"] * 1.3),
        "memory": (gpu["memory"] * 0.995, gpu["memory"] * 1.005),
    }
    if t.round == 3:  # the memory changes the price by less than half
        ranges |= {name: (0.95 * {**gpu, **given}[name], 1.05 * {**gpu, **given}[name]) for name in ranges}
    strong, low, high = (
        ("busy", 0.35, 1.05),
        ("price", 0.45, 1.0),
        ("reached", 0.35, 1.05),
        ("memory", 0.6, 1.9),
        ("price", 1.0, 2.6),
    )[t.round]
    middle = {**gpu, **given}[strong]
    ranges[strong] = (middle * low, middle * high)
    items = list(ranges.items())
    t.random.shuffle(items)
    quotients = {}
    for name, values in items:
        prices = [
            dollars_reference(
                model,
                {**gpu, name: value} if name in gpu else gpu,
                {**given, name: value} if name in given else given,
            )
            for value in values
        ]
        quotients[name] = max(prices) / min(prices)
    t.text(answers[3](model, gpu, given, dict(items)), max(quotients, key=quotients.__getitem__), "name:")


# 13.5: a table with error bars, compared with sums and all pairs

bars = Exercise(
    id="13.5",
    slug="bars",
    title="Read a table with error bars",
    answers=("by_luck", "baseline", "verdicts"),
    may_use_kvlearn=True,  # the quantile that it is handed is kvlearn's
    hints=(
        "Twenty methods that are all exactly as good as the baseline are compared with it at 5%. How many "
        "of them do you expect to look different? And what is the chance that none does?",
        '`baseline`: keep the rows of kind "baseline" with no more bytes, then take the smallest mean loss. '
        "`min(..., default=None)` covers the case that there is none.",
        "`verdicts`, in pseudocode: find all baselines first, since m counts those that are not None. Then "
        "for each name: differences over the seeds in both; t at 1 − 0.05 / (2 m); interval; verdict.",
        "The factor 2 in 0.05 / (2 m) has nothing to do with m: an interval has two sides, and quantile asks "
        "for the probability below t. With m = 1 it is 0.975.",
        "`supported`: mean + half < 0. `refuted`: mean − half > 0. Lower loss is better.",
    ),
)

Row = dict[str, Any]


def drawn_table(t: CheckContext, n_seeds: int = 5) -> list[Row]:
    """Three baselines and a few methods between them, of which the last has none."""
    sizes = [t.integer(40, 60), t.integer(90, 120), t.integer(200, 260)]
    seeds = sorted(t.random.sample(range(30), n_seeds))
    rows = []
    for i, (size, mean) in enumerate(zip(sizes, (2.6, 2.3, 2.1), strict=True)):
        losses = {seed: mean + t.random.uniform(-0.03, 0.03) for seed in seeds}
        rows.append({"name": f"baseline {i + 1}", "kind": "baseline", "bytes": size, "losses": losses})
    t.random.shuffle(rows)
    return rows


def add_method(
    t: CheckContext, rows: list[Row], name: str, against: str, mean: float, spread: float, n_bytes: int
) -> None:
    """A method whose differences to a baseline have exactly this mean and standard deviation."""
    base = next(row for row in rows if row["name"] == against)["losses"]
    noise = [t.random.gauss(0, 1) for _ in base]
    middle = math.fsum(noise) / len(noise)
    size = math.sqrt(math.fsum((x - middle) ** 2 for x in noise) / (len(noise) - 1))
    losses = {
        seed: loss + mean + spread * (x - middle) / size
        for (seed, loss), x in zip(base.items(), noise, strict=True)
    }
    shuffled = list(losses.items())
    t.random.shuffle(shuffled)
    rows.insert(
        t.integer(0, len(rows)), {"name": name, "kind": "method", "bytes": n_bytes, "losses": dict(shuffled)}
    )


def size_of(rows: Sequence[Row], name: str) -> int:
    return int(next(row["bytes"] for row in rows if row["name"] == name))


def half_width(spread: float, n: int, m: int) -> float:
    return student_quantile(1 - 0.05 / (2 * m), n - 1) * spread / math.sqrt(n)


def same_verdicts(
    t: CheckContext, verdicts: Answer, rows: list[Row], names: Sequence[str], want: Mapping[str, str]
) -> None:
    asked = set()

    def quantile(p: float, df: int) -> float:
        asked.add(f"{p:.4f} {df}")
        return student_quantile(p, df)

    got = mapping(t, verdicts(rows, list(names), quantile), want, f"a dict with {', '.join(want)}")
    t.note(str(sorted(asked)), None)  # no requirement: it tells mistakes apart that give the same verdicts
    for name, verdict in want.items():
        t.text(got[name], verdict, f"{name}:")


@bars.requirement(1, "by_luck")
def bars_luck(t: CheckContext, by_luck: Answer, baseline: Answer, verdicts: Answer) -> None:
    """1 minus the probability that none of the m comparisons errs"""
    m, level = (1, t.integer(3, 9), t.integer(20, 60))[t.round], t.pick(0.01, 0.05, 0.1)
    none = math.prod(1 - level for _ in range(m))
    about(t, by_luck(m, level), 1 - none, f"{m} comparisons:")


@bars.requirement(1, "baseline: of no more bytes", rounds=4)
def bars_baseline(t: CheckContext, by_luck: Answer, baseline: Answer, verdicts: Answer) -> None:
    """the best of those that store no more than the design, to the byte; None where all store more"""
    rows = drawn_table(t)
    second = size_of(rows, "baseline 2")
    size, want = ((second, "baseline 2"), (second - 1, "baseline 1"), (500, "baseline 3"), (30, None))[
        t.round
    ]
    add_method(t, rows, "method", "baseline 1", -0.7, 0.02, size)
    t.text(baseline(rows, "method"), want, "baseline:")


@bars.requirement(1, "baseline: the best, not the nearest", rounds=5)
def bars_best(t: CheckContext, by_luck: Answer, baseline: Answer, verdicts: Answer) -> None:
    """the lowest mean loss of all its seeds, also where a larger baseline is worse or one seed is lucky, or
    where baselines have different seeds"""
    rows = drawn_table(t)
    large = next(row for row in rows if row["name"] == "baseline 3")
    worse = {seed: loss + 0.4 for seed, loss in large["losses"].items()}
    lucky = t.random.choice(list(worse))
    large["losses"] = {**worse, lucky: 2.0} if t.round else worse
    best = next(row for row in rows if row["name"] == "baseline 2")["losses"]
    add_method(t, rows, "method", "baseline 2", -0.5, 0.02, 600)
    add_method(t, rows, "better method", "baseline 2", -0.9, 0.02, 100 if t.round else 70)
    if t.round == 2:  # more seeds, just as good
        best.update({50 + i: loss for i, loss in enumerate(list(best.values())[:4])})
    if t.round == 3:  # worse with the seeds that the method has, and better with the others
        common = {seed: loss + 0.4 for seed, loss in best.items()}
        best.update({**common, **{50 + i: loss - 0.4 for i, loss in enumerate([*best.values(), 2.3])}})
    if t.round == 4:  # worse in most seeds, and much better in the others
        best.update({s: x + (0.4, -0.6)[i < 2] for i, (s, x) in enumerate(list(best.items()))})
    t.text(baseline(rows, "method"), "baseline 2", "baseline:")


@bars.requirement(2, "verdicts: one claim", rounds=7)
def bars_one(t: CheckContext, by_luck: Answer, baseline: Answer, verdicts: Answer) -> None:
    """ "supported" below 0, "refuted" above it, "undecided" where 0 is inside; "no baseline" """
    n = t.integer(4, 7)
    rows, spread = drawn_table(t, n), 0.05
    half, size = half_width(spread, n, 1), size_of(rows, "baseline 2") + 10
    by, want = (
        (-1.15, "supported"),
        (1.15, "refuted"),
        (-0.985, "undecided"),
        (0.985, "undecided"),
        (-1.5, "no baseline"),
        (-1.015, "supported"),
        (-0.4, "undecided"),
    )[t.round]
    add_method(t, rows, "A", "baseline 2", by * half, spread, 20 if t.round == 4 else size)
    same_verdicts(t, verdicts, rows, ["A"], {"A": want})


@bars.requirement(2, "verdicts: several claims", rounds=4)
def bars_several(t: CheckContext, by_luck: Answer, baseline: Answer, verdicts: Answer) -> None:
    """intervals that are right together: 0.05 shared among the claims that have a baseline, also where seeds
    are too few, and no others"""
    n, m = 6, t.integer(3, 5)
    rows, spread = drawn_table(t, n), 0.05
    few = t.round % 2  # a claim with too few seeds is one of the m
    half, alone = half_width(spread, n, m + few), half_width(spread, n, 1)
    want = {}
    for i in range(m):
        # Between what fewer claims need and what m claims need; or just beyond the latter.
        by, verdict = (
            (-0.98 * half if few else -0.5 * (half + alone), "undecided"),
            (-1.01 * half, "supported"),
            (1.01 * half, "refuted"),
        )[i % 3]
        name = "ABCDE"[i]
        add_method(t, rows, name, "baseline 2", by, spread, size_of(rows, "baseline 2") + 5 + i)
        want[name] = verdict
    for name in ("tiny", "smaller")[: 1 + t.round % 2]:  # no baseline: these are not among the m
        add_method(t, rows, name, "baseline 1", -0.5, spread, 20)
        want[name] = "no baseline"
    if few:
        add_method(t, rows, "few", "baseline 2", -0.5, spread, size_of(rows, "baseline 2"))
        losses = next(row for row in rows if row["name"] == "few")["losses"]
        for seed in list(losses)[1:]:
            losses[seed + 40] = losses.pop(seed)
        want["few"] = "undecided"
    add_method(t, rows, "not claimed", "baseline 1", -0.5, spread, 99)
    same_verdicts(t, verdicts, rows, list(want), want)


@bars.requirement(1, "verdicts: seeds of one table only", rounds=4)
def bars_seeds(t: CheckContext, by_luck: Answer, baseline: Answer, verdicts: Answer) -> None:
    """differences over the seeds that both have, in whatever order; "undecided" with fewer than two"""
    n = 6
    rows, spread = drawn_table(t, n), 0.04
    add_method(
        t, rows, "A", "baseline 2", -1.6 * half_width(spread, n, 1), spread, size_of(rows, "baseline 2")
    )
    ours = next(row for row in rows if row["name"] == "A")
    seeds = list(ours["losses"])
    if t.round < 2:  # more seeds of each, that the other does not have: they would turn it round
        ours["losses"] |= {40 + i: 9.0 for i in range(3)}
        next(row for row in rows if row["name"] == "baseline 2")["losses"][50] = 2.3
        want = "supported"
    else:
        keep = seeds[: 3 - t.round]
        ours["losses"] = {60: 1.0, 61: 1.1, **{seed: ours["losses"][seed] for seed in keep}}
        want = "undecided"
    same_verdicts(t, verdicts, rows, ["A"], {"A": want})


# 13.7: what was built in the whole course, measured by the learner's functions

LENGTH = 512  # tokens, for the bytes of a cache
Found = dict[str, Any]


@dataclass(frozen=True)
class Mechanism:
    """One mechanism of the picture.

    logits   a text (1, T) -> the logits of the byte that follows each of its bytes, (1, T, 256)
    nbytes   the tokens of a sequence -> the bytes that its cache holds
    """

    logits: Callable[[Tensor], Tensor]
    nbytes: Callable[[int], float]
    known: dict[bytes, Tensor] = field(default_factory=dict)  # losses by text, each computed once

    @torch.no_grad()
    def losses(self, text: Tensor) -> Tensor:
        """Nats of each byte of the text but the first, (T − 1,)."""
        key = bytes(text[0].tolist())
        if key not in self.known:
            self.known[key] = F.cross_entropy(self.logits(text)[0, :-1], text[0, 1:], reduction="none")
        return self.known[key]


def converted(specs: Sequence[Spec], init: str = "mean", dtype: torch.dtype = torch.float32) -> Mechanism:
    """The base model with other layers, not trained any further, and its cache in ``dtype``."""
    return of_decoder(_converted(tuple(specs), init), dtype)


@cache
def _converted(specs: tuple[Spec, ...], init: str) -> Decoder:
    some = corpus().train[: 16 * 256].view(16, 256).long()
    return convert(workbench.base_model(), list(specs), init=init, tokens=some).requires_grad_(False)


def of_decoder(decoder: Decoder, dtype: torch.dtype = torch.float32) -> Mechanism:
    """One of kvlearn's decoders; what passes through its cache is rounded to ``dtype``."""

    def logits(text: Tensor) -> Tensor:
        result: Tensor = decoder(text, decoder.new_cache(1, text.shape[1], dtype))
        return result

    return Mechanism(logits, lambda n: sum(m.cache_bytes(n, dtype=dtype) for m in decoder.mixers))


class Fake:
    """A mechanism whose losses and bytes are known; ``per_text`` by the length of the text."""

    def __init__(self, per_text: Mapping[int, Tensor], nbytes: Callable[[int], int]) -> None:
        self.per_text, self.nbytes = per_text, nbytes

    def losses(self, text: Tensor) -> Tensor:
        return self.per_text[text.shape[1]]


def base_texts(n: int, length: int) -> list[Tensor]:
    """Texts (1, length) that no model was trained on, spread evenly over the test text."""
    text = corpus().test
    starts = [i * (len(text) // n) for i in range(n)]
    return [text[start : start + length].long()[None] for start in starts]


def collected(exercise_id: str, names: Sequence[str]) -> tuple[Found, str]:
    """The learner's answers under these names, or ours; and why they are ours, empty if they are not."""
    try:
        return solved_answers("13.7", exercise_id), ""
    except NotWritten as missing:
        exercise = find_exercise(exercise_id)
        ours = dict(zip(exercise.answers, exercise.right, strict=True))
        return {name: ours[name] for name in names}, str(missing)


def parts_in(found: Mapping[str, Any], exercise_id: str) -> Any:
    """The parts of a unit's model: those in ``found``, else the library's."""
    wiring = find_exercise(exercise_id).wiring
    parts = workbench.library(wiring)
    vars(parts).update({name: found[name] for name in wiring.parts if name in found})
    return parts


def written(exercise_id: str, found: Found, held: Callable[[Any], float]) -> Mechanism:
    """The base model with a learner's ``attention`` and parts; ``held``: the bytes in one layer's cache."""
    wiring, parts = find_exercise(exercise_id).wiring, parts_in(found, exercise_id)
    model = workbench.Model(wiring, found["attention"], parts)

    def nbytes(length: int) -> float:
        caches = model.new_caches(length)
        model(base_texts(1, length)[0], caches)
        return sum(map(held, caches))

    return Mechanism(model, nbytes)


def allocated(cache: Any) -> float:
    """The bytes of all tensors of a cache, each storage once."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in workbench.tensors_in(cache)
    }
    return sum(storages.values())


def fullest(ring: Any) -> float:
    """The bytes of the rank that holds most."""
    return max(sum(x.nbytes for x in workbench.tensors_in(held)) for held in ring.stored)


def paged(found: Found) -> Mechanism:
    """Eight users whose prompts begin with the same three quarters, in the blocks of a learner's manager."""
    page, users, parts = 8, 8, parts_in(found, "09.7")

    def nbytes(length: int) -> float:
        manager = found["BlockManager"](users * length // page + users, page, parts)
        free = manager.n_free()
        for user in range(users):
            prompt = [i % 251 for i in range(length * 3 // 4)]
            prompt += [(user * 31 + i) % 256 for i in range(length - len(prompt))]
            cached = int(manager.start(f"user {user}", list(prompt)))
            manager.reserve(f"user {user}", length - cached)
            manager.commit(f"user {user}", prompt[cached:])
        each = of_decoder(workbench.base_model()).nbytes(1)
        return (free - manager.n_free()) * page * each / users

    return replace(of_decoder(workbench.base_model()), nbytes=nbytes)


def hybrid(found: Found) -> Mechanism:
    """The base model's layers placed by a learner's ``layers``: full, or a window of 32; half the bytes."""
    specs = {"full": Spec("full"), "window": Spec("window", window=32)}
    base = workbench.base_model()
    one = base.mixers[0].cache_bytes(LENGTH)
    kinds = {
        "full": {"stored": one, "read": one, "reach": None},
        "window": {"stored": one * 32 // LENGTH, "read": one * 32 // LENGTH, "reach": 31},
    }
    parts = parts_in(found, "07.8")
    names = found["layers"](
        kinds, len(base.mixers), len(base.mixers) * one // 2 + one // 4, LENGTH - 1, parts
    )
    return converted([specs[name] for name in names], "first")


def trained(found: Found) -> Mechanism:
    """A model of one layer and width 48, trained for seconds by a learner's recipe; it sees 64 bytes."""
    unit = inspect.getmodule(find_exercise("10.7").wiring.train)
    assert unit is not None
    small, _ = unit.train_small(found, 0, unit.N_TOKENS)

    def logits(text: Tensor) -> Tensor:
        return torch.cat([small(piece) for piece in text.split(unit.LONGEST, dim=1)], dim=1)

    return Mechanism(logits, lambda n: min(n, unit.LONGEST) * 2 * unit.WIDTH * unit.LAYERS * 4)


def configured(found: Found) -> Mechanism:
    """The base model with a learner's ``my_config``: KV heads pooled by their mean, windows, and a dtype."""
    choice = found["my_config"]()
    n_kv_heads = choice.get("num_key_value_heads", 8)
    kinds = {
        "full_attention": Spec("gqa", n_kv_heads=n_kv_heads),
        "sliding_attention": Spec("window", window=choice.get("sliding_window", 1), n_kv_heads=n_kv_heads),
    }
    layers = choice.get("layer_types") or 4 * ["full_attention"]
    return converted(
        [kinds[kind] for kind in layers], "mean", getattr(torch, choice.get("cache_dtype", "float32"))
    )


# {name in the picture: (exercise, the answers that it needs, how they make a mechanism)}
COURSE: dict[str, tuple[str, tuple[str, ...], Callable[[Found], Mechanism]]] = {
    "full": ("01.9", ("attention",), lambda found: written("01.9", found, allocated)),
    "07 layers": ("07.8", ("layers",), hybrid),
    "08 ring of 2": ("08.7", ("attention",), lambda found: written("08.7", found, fullest)),
    "09 blocks": ("09.7", ("BlockManager",), paged),
    "10 small": ("10.7", ("layout", "learning_rate", "decay", "clip"), trained),
    "12 config": ("12.7", ("my_config",), configured),
}
OURS: dict[str, Callable[[], Mechanism]] = {
    "gqa, 2 heads": lambda: converted([Spec("gqa", n_kv_heads=2)]),
    "window 64": lambda: converted([Spec("window", window=64)], "first"),
    "mhc, rank 64": lambda: converted([Spec("mhc", rank=64, rope_dim=0)], "activations"),
}


@dataclass(frozen=True, repr=False)
class Course(workbench.Comparison):
    """The picture shows bytes against loss."""

    points: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @cached_property
    def picture(self) -> Any:
        from kvlearn.plots.workbench import bytes_against_loss  # matplotlib takes a second to import

        return bytes_against_loss(self.points)


@dataclass(frozen=True)
class WholeCourse:
    """The learner's mechanisms of all units; ``compare`` measures it with the functions of 13.7."""

    parts: Mapping[str, tuple[str, Any]]

    @property
    def shown(self) -> list[Any]:
        return [Mechanism, of_decoder, written, paged, hybrid, trained, configured]

    def compare(self, exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> workbench.Comparison:
        """Each "Your model" of the course, the learner's where it is solved in work/, and three of ours."""
        ours = dict(zip(exercise.answers, exercise.right, strict=True))
        given = [notebook.get(name) for name in exercise.answers]
        solved = judge(exercise, given, name=False).status == "passed"
        why = "" if solved else f"{exercise.id} does not have all its points yet"
        used = [
            (workbench.Part(n, exercise.id, notebook.get(n), ours[n], why), "–" if why else "yes")
            for n in exercise.answers
        ]
        makers: dict[str, Callable[[], Mechanism]] = {}
        found = {name: collected(source, names) for name, (source, names, _) in COURSE.items()}
        for name, (source, _, make) in COURSE.items():
            makers[name] = partial(make, found[name][0])
            used.append((workbench.Part(name, source, None, None, found[name][1]), "yes"))
        functions = {part.name: part.chosen for part, _ in used[: len(exercise.answers)]}
        board, failed = functions["assemble"](makers | OURS, base_texts(8, LENGTH), LENGTH)
        used = [
            (part, f"no: {shorten(str(failed[part.name]))}" if part.name in failed else works)
            for part, works in used
        ]
        # Exact mechanisms differ by the order of their sums alone: that decides nothing.
        exact = {name: {**each, "loss": round(float(each["loss"]), 5)} for name, each in board.items()}
        best = functions["front"](exact)
        points = [
            {
                "name": name,
                **{key: float(each[key]) for key in ("bytes", "loss", "error")},
                "whose": "ours" if name in OURS or found[name][1] else "yours",
                "front": name in best,
            }
            for name, each in board.items()
        ]
        if solved:
            keep_points(exercise.id, points)
        rows = [
            (
                name,
                f"{each['bytes']:,.0f}",
                f"{each['loss']:.3f}",
                f"{round(each['excess'], 3) + 0:+.3f} ± {each['error']:.3f}",
                "yes" if name in best else "",
            )
            for name, each in board.items()
        ]
        columns = (f"bytes per token at {LENGTH}", "loss, nats per byte", "beyond full", "on the front")
        return Course(exercise.id, used, rows, {}, columns, "The course on one board", points)


WHOLE = WholeCourse(parts={})

model = Exercise(
    id="13.7",
    slug="model",
    title="Your model",
    answers=("entry", "assemble", "front"),
    may_use_kvlearn=True,
    wiring=WHOLE,
    hints=(
        "A window of 32 at 512 tokens: how many bytes does its cache hold, and how many is that per token of "
        "the text? And why would `m.nbytes(1)` be the wrong question?",
        "`entry`: compute the losses of m and of full for each text once. The loss is a sum over all bytes "
        "divided by their number; excess and error come from one number per text.",
        "`assemble`, in pseudocode: make full; for each maker: try to make the mechanism and its entry; on "
        "an exception note it in failed and go on; a loss that is not finite is noted too. Take care that "
        "the maker of full is called once.",
        "`front`: a pair (bytes, loss) is beaten if another pair, different from it, is no larger in both "
        "numbers. Two equal pairs do not beat each other.",
        "`statistics.stdev` wants Python numbers: `float(tensor.mean())`. With NaN or infinity among them it "
        "may raise, or return NaN; `math.isfinite` is False for both.",
    ),
)


def entry_reference(m: Any, full: Any, texts: Sequence[Tensor], length: int) -> dict[str, float]:
    """Byte by byte."""
    nats, n, differences = 0.0, 0, []
    for text in texts:
        a, b = m.losses(text).tolist(), full.losses(text).tolist()
        nats, n = nats + math.fsum(a), n + len(a)
        differences.append(math.fsum(a) / len(a) - math.fsum(b) / len(b))
    mean = math.fsum(differences) / len(differences)
    squares = math.fsum((d - mean) ** 2 for d in differences)
    error = math.sqrt(squares / (len(differences) - 1) / len(differences))
    return {"bytes": m.nbytes(length) / length, "loss": nats / n, "excess": mean, "error": error}


def drawn_texts(t: CheckContext, n: int) -> list[Tensor]:
    """Texts of different lengths, whose content does not matter."""
    return [torch.zeros(1, length, dtype=torch.long) for length in t.random.sample(range(9, 60), n)]


def drawn_mechanism(t: CheckContext, texts: Sequence[Tensor], level: float, most: int | None = None) -> Fake:
    """A mechanism of about this loss, longer texts easier, that keeps ``most`` tokens if given."""
    losses = {
        text.shape[1]: level
        + 6 / text.shape[1]
        + 0.3 * t.randn(text.shape[1] - 1).abs()
        + 0.2 * t.random.random()
        for text in texts
    }
    each, fixed = t.integer(3, 9) * 128, t.integer(1, 5) * 1000
    return Fake(losses, lambda length: fixed + each * (length if most is None else min(length, most)))


def same_entry(
    t: CheckContext, got: Any, want: Mapping[str, float], which: Sequence[str], name: str = ""
) -> None:
    came = mapping(t, got, want, f"a dict with {', '.join(want)}")
    for key in which:
        about(t, came[key], want[key], f"{name}{key}:", 1e-4, least=0.01)


@model.requirement(1, "entry: bytes")
def model_bytes(t: CheckContext, entry: Answer, *others: Answer) -> None:
    """of a cache with `length` tokens, per token: also where a window or a constant part is in it"""
    texts = drawn_texts(t, 4)
    full, m = drawn_mechanism(t, texts, 2.0), drawn_mechanism(t, texts, 2.2, (None, 64, 200)[t.round])
    length = t.integer(300, 900)
    same_entry(t, entry(m, full, texts, length), entry_reference(m, full, texts, length), ["bytes"])


@model.requirement(1, "entry: loss")
def model_loss(t: CheckContext, entry: Answer, *others: Answer) -> None:
    """over all predicted bytes of all texts, whatever their lengths"""
    texts = drawn_texts(t, t.integer(4, 7))
    full, m = drawn_mechanism(t, texts, 2.0), drawn_mechanism(t, texts, 2.2)
    same_entry(t, entry(m, full, texts, 100), entry_reference(m, full, texts, 100), ["loss"])


@model.requirement(1, "entry: excess and its error")
def model_excess(t: CheckContext, entry: Answer, *others: Answer) -> None:
    """mean and standard error of the differences to full, one per text; full's own are 0"""
    texts = drawn_texts(t, t.integer(4, 7))
    full, m = drawn_mechanism(t, texts, 2.0), drawn_mechanism(t, texts, 2.3)
    which = ["excess", "error"]
    same_entry(t, entry(m, full, texts, 100), entry_reference(m, full, texts, 100), which)
    same_entry(t, entry(full, full, texts, 100), entry_reference(full, full, texts, 100), which, "full, ")


class Shop:
    """Makers that count how often each of them is called."""

    def __init__(self, mechanisms: Mapping[str, Any]) -> None:
        self.mechanisms, self.calls = mechanisms, dict.fromkeys(mechanisms, 0)

    def makers(self) -> dict[str, Callable[[], Any]]:
        return {name: partial(self.make, name) for name in self.mechanisms}

    def make(self, name: str) -> Any:
        self.calls[name] += 1
        if isinstance(self.mechanisms[name], Exception):
            raise self.mechanisms[name]
        return self.mechanisms[name]


class NoKeys(RuntimeError):
    """The error of a mechanism that breaks; no answer raises it itself."""


class Breaks(Fake):
    """A mechanism that can be made and not run."""

    def losses(self, text: Tensor) -> Tensor:
        raise NoKeys("no keys in the cache")


def assembled(
    t: CheckContext, assemble: Answer, shop: Shop, texts: Sequence[Tensor], good: Sequence[str]
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The board and the failures, with the right names."""
    got = t.parts(assemble(shop.makers(), texts, 100), 2, "a pair (board, failed)")
    board = mapping(t, got[0], good, f"on the board {', '.join(good)}")
    bad = [name for name in shop.mechanisms if name not in good]
    return board, mapping(t, got[1], bad, f"in failed {', '.join(bad) or 'nothing'}")


@model.requirement(1, "assemble: an entry for each")
def model_board(t: CheckContext, entry: Answer, assemble: Answer, *others: Answer) -> None:
    """all mechanisms, full as well, each against full; nothing failed, and every maker called once"""
    texts = drawn_texts(t, 4)
    shop = Shop({name: drawn_mechanism(t, texts, 2.0 + 0.1 * i) for i, name in enumerate(("a", "full", "b"))})
    board, _ = assembled(t, assemble, shop, texts, list(shop.mechanisms))
    for name, m in shop.mechanisms.items():
        want = entry_reference(m, shop.mechanisms["full"], texts, 100)
        same_entry(t, board[name], want, list(want), f"{name}, ")
    calls = str(shop.calls)
    t.note(calls, None if set(shop.calls.values()) == {1} else Difference("calls:", "1 of each maker", calls))


@model.requirement(1, "assemble: what is broken", rounds=5)
def model_failed(t: CheckContext, entry: Answer, assemble: Answer, *others: Answer) -> None:
    """a maker or a mechanism that raises, or a loss that is not finite: in failed, with a reason; the others
    are measured all the same"""
    texts = drawn_texts(t, 4)
    broken = drawn_mechanism(t, texts, 2.0)
    length = texts[1].shape[1]
    broken.per_text = {**broken.per_text, length: broken.per_text[length] * (math.nan, math.inf)[t.round % 2]}
    bad = (ValueError("not solved"), Breaks({}, lambda n: n), broken, broken, NotImplementedError())[t.round]
    shop = Shop({"full": drawn_mechanism(t, texts, 2.0), "bad": bad, "good": drawn_mechanism(t, texts, 2.1)})
    try:
        board, failed = assembled(t, assemble, shop, texts, ["full", "good"])
    except Raised as raised:
        if not isinstance(raised.error, NoKeys):
            raise
        t.note("not caught", Difference("", "bad in failed, and no exception", raised.what))
        return
    want = entry_reference(shop.mechanisms["good"], shop.mechanisms["full"], texts, 100)
    same_entry(t, board["good"], want, ["loss"], "good, ")
    reason = failed["bad"]
    came = repr(reason) if isinstance(reason, str) else describe(reason)
    t.true(isinstance(reason, str) and bool(reason.strip()), "a reason: a text that is not empty", came)


def drawn_board(t: CheckContext) -> dict[str, dict[str, float]]:
    """Designs of which some are beaten, in any order; some share their bytes or their loss."""
    names = t.random.sample(["full", "gqa", "mla", "window", "linear", "hybrid", "ring", "mhc", "cla"], 8)
    sizes = [100.0 * i for i in (1, 2, 2, 3, 4, 4, 6, 8)]
    losses = [2.9, 2.5, 2.7, 2.5, 2.2, 2.2, 2.6, 2.0 + t.random.random() / 10]
    rows = list(zip(names, sizes, losses, strict=True))
    t.random.shuffle(rows)
    # The excess weighs texts, the loss bytes: they need not agree. No error decides who beats whom.
    order = t.random.sample(range(len(rows)), len(rows))
    return {
        n: {"bytes": s, "loss": x, "excess": 0.1 * i, "error": 0.05 + 0.3 * t.random.random()}
        for i, (n, s, x) in zip(order, rows, strict=True)
    }


def front_reference(board: Mapping[str, Mapping[str, float]]) -> list[str]:
    left = []
    for a, x in board.items():
        beats = [
            b
            for b, y in board.items()
            if y["bytes"] <= x["bytes"]
            and y["loss"] <= x["loss"]
            and (y["bytes"] < x["bytes"] or y["loss"] < x["loss"])
        ]
        left += [] if beats else [a]
    return sorted(left, key=lambda name: board[name]["bytes"])


def same_front(t: CheckContext, front: Answer, board: dict[str, dict[str, float]], exact: bool) -> None:
    got = front({name: dict(each) for name, each in board.items()})
    want = front_reference(board)
    names = list(got) if isinstance(got, list | tuple) and all(isinstance(x, str) for x in got) else None
    if names is None:
        t.note(got, Difference("", "a list of names", describe(got)))
        raise Stop
    ordered = not exact or [board[x]["bytes"] for x in names if x in board] == [
        board[x]["bytes"] for x in want
    ]
    good = sorted(names) == sorted(want) and ordered
    shown = str(names if exact else sorted(names))
    t.note(shown, None if good else Difference("", ", ".join(want), ", ".join(names) or "no names"))


@model.requirement(1, "front: what is not beaten")
def model_front(t: CheckContext, entry: Answer, assemble: Answer, front: Answer) -> None:
    """no other has no more of both and less of one; equal ones stay"""
    same_front(t, front, drawn_board(t), exact=False)


@model.requirement(1, "front: by growing bytes")
def model_order(t: CheckContext, entry: Answer, assemble: Answer, front: Answer) -> None:
    """in the order of the picture, from left to right"""
    sizes = sorted(t.random.sample(range(100, 900), 5))
    rows = [(f"{chr(97 + t.integer(0, 25))}{i}", s, 3.0 - 0.1 * i) for i, s in enumerate(sizes)]
    t.random.shuffle(rows)
    same_front(
        t, front, {n: {"bytes": s, "loss": x, "excess": x, "error": 0.0} for n, s, x in rows}, exact=True
    )


@cache
def real_mechanisms() -> dict[str, Mechanism]:
    return {"full": of_decoder(workbench.base_model()), "gqa, 2 heads": OURS["gqa, 2 heads"]()}


@model.requirement(1, "the base model, before and after its heads are pooled", rounds=1)
def model_real(t: CheckContext, entry: Answer, assemble: Answer, front: Answer) -> None:
    """assemble and front of two models of kvlearn: a quarter of the bytes, at a loss that is no tie"""
    texts = base_texts(5, t.integer(60, 100))
    mechanisms = real_mechanisms()
    makers = {name: lambda m=m: m for name, m in mechanisms.items()}
    got = t.parts(assemble(makers, texts, LENGTH), 2, "a pair (board, failed)")
    board = mapping(t, got[0], mechanisms, f"on the board {', '.join(mechanisms)}")
    for name, m in mechanisms.items():
        want = entry_reference(m, mechanisms["full"], texts, LENGTH)
        came = mapping(t, board[name], want, f"a dict with {', '.join(want)}")
        for key in want:
            about(t, came[key], want[key], f"{name}, {key}:", 1e-2)
    t.text(list(front(board)), ["gqa, 2 heads", "full"], "front:")


EXERCISES = (claims, unstated, trial, table, bars, model)
