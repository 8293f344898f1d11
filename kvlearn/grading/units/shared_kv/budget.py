"""02.6: how many KV heads fit into a budget, held against a count head by head."""

import itertools
from typing import Any

from kvlearn.grading.compare import Difference, describe, plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="02.6",
    slug="budget",
    title="How many KV heads fit",
    answers=("kv_heads_for_budget",),
    hints=(
        "First the price of *one* KV head: 2 · layers · head_dim · bytes a number, for max_len tokens in "
        "each of `batch` sequences. The cache of g heads costs g times that.",
        "Only divisors of num_attention_heads are possible: `[g for g in range(1, H + 1) if H % g == 0]`, "
        "H itself included.",
        "The budget is in GiB: budget_gib · 2**30 bytes. A cache that takes exactly as much does fit: `<=`.",
        "`max(fitting, default=None)` is the largest of those that fit, and None where there are none.",
    ),
)

Config = dict[str, Any]
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
DIVISIBLE = (8, 16, 32, 64)
ODD = (12, 20, 24, 28, 40, 56)


def head_bytes(config: Config, batch: int, max_len: int) -> int:
    """Bytes of the cache for each KV head."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    key = value = head_dim * BYTES[config["torch_dtype"]]
    return sum((key + value) * max_len * batch for _layer in range(config["num_hidden_layers"]))


def divisors(n: int) -> list[int]:
    return [g for g in range(1, n + 1) if n % g == 0]


def draw(t: Trial, heads: int, **more: Any) -> tuple[Config, int, int]:
    """A model, a batch and a length."""
    config = {"num_hidden_layers": t.pick(24, 32, 48), "hidden_size": heads * t.pick(64, 128)}
    config |= {"num_attention_heads": heads, "torch_dtype": "bfloat16", **more}
    return config, t.pick(3, 4, 8, 24), t.pick(4096, 8192, 32768)


def same(t: Trial, kv_heads_for_budget: Answer, model: tuple[Config, int, int], budget: float) -> None:
    """``budget`` in units of what one KV head costs."""
    config, batch, max_len = model
    got = kv_heads_for_budget(config, budget * head_bytes(config, batch, max_len) / 2**30, batch, max_len)
    want = max((g for g in divisors(config["num_attention_heads"]) if g <= budget), default=None)
    plain = plain_number(got)
    good = got is None if want is None else plain == want
    came = "None" if got is None else describe(got)
    # None is noted as 0.0, since many mistakes give it; the number 0 is an integer, and so told apart.
    value = 0.0 if got is None else came if plain is None else plain
    t.note(value, None if good else Difference("", str(want), came))


def between(t: Trial, heads: int, *, not_powers: bool = False) -> float:
    """A budget that lies between two divisors, by so much that GB and GiB give the same; the lower one is no
    power of two where that is asked for."""
    pairs = list(itertools.pairwise(divisors(heads)))
    low, high = t.pick(*(pair for pair in pairs if not not_powers or pair[0] & (pair[0] - 1)))
    return t.random.uniform(max(1.1 * low, 0.7 * low + 0.3 * high), 0.1 * low + 0.9 * high)


@EXERCISE.requirement(1, "head counts that are powers of two")
def powers(t: Trial, kv_heads_for_budget: Answer) -> None:
    """the largest divisor of num_attention_heads whose cache fits"""
    for _ in range(3):
        heads = t.pick(*DIVISIBLE)
        same(t, kv_heads_for_budget, draw(t, heads), between(t, heads))


@EXERCISE.requirement(1, "other head counts")
def others(t: Trial, kv_heads_for_budget: Answer) -> None:
    """the same for 12, 28 or 40 heads, and for a prime number of heads like Falcon's 71"""
    for heads in (t.pick(*ODD), t.pick(*ODD), t.pick(7, 23, 71)):
        budget = between(t, heads, not_powers=heads in ODD)
        same(t, kv_heads_for_budget, draw(t, heads), budget)


@EXERCISE.requirement(1, "a budget that is just met, in GiB")
def exact(t: Trial, kv_heads_for_budget: Answer) -> None:
    """a cache that takes the whole budget fits; a GiB is 2³⁰ bytes"""
    heads = t.pick(*DIVISIBLE, *ODD)
    just_met = t.pick(*divisors(heads)[1:-1])
    for budget in (just_met, heads, 1.03 * just_met):  # in GB the last one would not do either
        same(t, kv_heads_for_budget, draw(t, heads), budget)


@EXERCISE.requirement(1, "a budget that is too small, and one that is large")
def extremes(t: Trial, kv_heads_for_budget: Answer) -> None:
    """None where not even one KV head fits; all heads where there is room for more"""
    for budget in (t.random.uniform(0.3, 0.9), 0.01):
        same(t, kv_heads_for_budget, draw(t, t.pick(*DIVISIBLE)), budget)
    heads = t.pick(*DIVISIBLE)
    same(t, kv_heads_for_budget, draw(t, heads), heads * t.random.uniform(1.3, 3))


@EXERCISE.requirement(1, "head_dim and torch_dtype")
def looked_up(t: Trial, kv_heads_for_budget: Answer) -> None:
    """head_dim where it is given, and 1, 2 or 4 bytes a number by torch_dtype"""
    for dtype, head_dim in (("float32", None), ("float8_e4m3fn", None), ("bfloat16", t.pick(256, 320))):
        heads = t.pick(*DIVISIBLE[1:])
        more = {"torch_dtype": dtype} | ({"head_dim": head_dim} if head_dim else {})
        low = t.pick(*divisors(heads)[1:-1])
        same(t, kv_heads_for_budget, draw(t, heads, **more), low * t.random.uniform(1.1, 1.8))
