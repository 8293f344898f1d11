"""11.1: bytes and floor of a decode step, held against a count key by key."""

from typing import Any

from kvlearn.grading.compare import describe, plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
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


def plain(t: Trial, group: int = 1) -> Config:
    G = t.pick(2, 4, 8)
    config = {"n_heads": G * group, "n_kv_heads": G, "head_dim": t.pick(64, 96, 128), "number": 2, "scale": 0}
    return {**config, "window": None, "n_sinks": 0, "latent": 0, "rope": 0}


def machine(t: Trial) -> dict[str, float]:
    return {
        "bandwidth": t.pick(4.2e12, 2.0e12),
        "flops": t.pick(7.88e14, 3.1e14),
        "fixed": t.pick(5e-6, 12e-6),
        "measured": t.pick(40e-6, 95e-6),
    }


def draw_lengths(t: Trial) -> list[int]:
    return [t.integer(500, 40_000) for _ in range(t.integer(3, 6))]


def live_keys(config: Config, length: int) -> int:
    """Counted one by one: the newest ``window``, and of the others the first ``n_sinks``."""
    if config["window"] is None:
        return length
    behind = max(length - config["window"], 0)
    return len(range(behind, length)) + len(range(min(config["n_sinks"], behind)))


def count(config: Config, lengths: list[int]) -> tuple[int, int, int]:
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


def field(t: Trial, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
        t.true(False, f"a dict with the key {name!r}", came)
        raise Stop
    return got[name]


def own(got: Any, name: str, otherwise: float) -> float:
    """The answer's own number: a mistake in it, told elsewhere, shall not cost other points too."""
    number = plain_number(got.get(name)) if isinstance(got, dict) else None
    return number if number is not None and number > 0 else otherwise


def asked(t: Trial, decode_step: Answer, config: Config, lengths: list[int], *names: str) -> Any:
    got = decode_step(config, lengths, max(lengths) + t.integer(1, 5000), machine(t))
    for name in names:
        t.number(field(t, got, name), count(config, lengths)[FIELDS.index(name)], name)
    return got


@EXERCISE.requirement(1, "live keys and bytes")
def full(t: Trial, decode_step: Answer) -> None:
    """all keys of each sequence, K and V, for each KV head, in 2-byte numbers"""
    asked(t, decode_step, plain(t, (4, 1, 8)[t.round]), draw_lengths(t), "live", "bytes")


@EXERCISE.requirement(1, "a window with sinks")
def window(t: Trial, decode_step: Answer) -> None:
    """the newest `window` keys and, on top of them, the first `n_sinks`; shorter sequences whole"""
    size, sinks = t.pick(1024, 4096), t.pick(4, 16)
    lengths = [*draw_lengths(t), size + t.integer(1, sinks - 1), t.integer(10, size - 1)]
    asked(t, decode_step, {**plain(t), "window": size, "n_sinks": sinks}, lengths, "live", "bytes")


@EXERCISE.requirement(1, "8-bit and 4-byte numbers, with scales")
def quantised(t: Trial, decode_step: Answer) -> None:
    """bytes where a number takes 1 or 4 bytes, and each key and each value of a head may bring a scale"""
    kind = ({"number": 1, "scale": 2}, {"number": 4}, {"number": 1, "scale": 4})[t.round]
    asked(t, decode_step, {**plain(t), **kind}, draw_lengths(t), "bytes")


@EXERCISE.requirement(1, "a latent for keys and values")
def latent(t: Trial, decode_step: Answer) -> None:
    """bytes where one vector of latent + rope numbers is all there is of a token: read once, for all heads"""
    shape = {"n_heads": t.pick(16, 128), "n_kv_heads": 1, "latent": t.pick(512, 256), "rope": 64}
    asked(t, decode_step, {**plain(t), **shape}, draw_lengths(t), "bytes")


@EXERCISE.requirement(1, "FLOPs")
def flops(t: Trial, decode_step: Answer) -> None:
    """2 for each number of each score and of each weighted sum, for every *query* head; with latents too"""
    config = plain(t, t.pick(4, 8))
    if t.round == 2:
        config |= {"n_heads": 128, "n_kv_heads": 1, "latent": 512, "rope": 64}
    asked(t, decode_step, config, draw_lengths(t), "flops")


@EXERCISE.requirement(1, "the floor, and the bandwidth reached", rounds=4)
def seconds(t: Trial, decode_step: Answer) -> None:
    """max(bytes / bandwidth, flops / FLOP/s) + fixed, and GB a second in the measured time"""
    config, lengths, gpu = plain(t, t.pick(1, 4)), draw_lengths(t), machine(t)
    if t.round % 2:
        config |= {"n_heads": 512, "n_kv_heads": 1}  # enough arithmetic to be the slower part
    if t.round == 2:
        lengths = [length % 50 + 1 for length in lengths]  # so little that the fixed cost is the largest
    got = decode_step(config, lengths, 50_000, gpu)
    _, n_bytes, n_flops = count(config, lengths)
    moved, computed = own(got, "bytes", n_bytes), own(got, "flops", n_flops)
    floor = max(moved / gpu["bandwidth"], computed / gpu["flops"]) + gpu["fixed"]
    t.number(field(t, got, "seconds"), float(floor), "seconds")
    t.number(field(t, got, "gb_per_second"), float(moved / gpu["measured"] / 1e9), "gb_per_second")
