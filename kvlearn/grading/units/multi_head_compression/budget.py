"""03.7: the rank that a budget of memory allows, held against trying every rank."""

from typing import Any

from kvlearn.grading.compare import describe, plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="03.7",
    slug="budget",
    title="Choose a rank for a memory budget",
    answers=("rank_for_budget",),
    hints=(
        "Count what one token leaves behind: in every layer R + Dr numbers, of so many bytes. No factor 2, "
        "since keys and values share the latent, and no heads. `getattr(torch, name).itemsize` knows the "
        "bytes.",
        "The budget is budget_gib · 2³⁰ bytes, for batch · max_len tokens in every layer. Divide, and you "
        "have the R + Dr numbers that a token may leave in a layer.",
        "Take off Dr, then round *down* to a multiple of 64: `numbers // 64 * 64`. Then the cap: a "
        "multiple of 64 that is at most 2·H·D.",
        "A rank below 64 is no rank: raise ValueError. The ratios compare numbers per token and layer: "
        "2·H·D / (R + Dr) with MHA, 2·G·D / (R + Dr) with GQA, G the KV heads.",
    ),
)

Config = dict[str, Any]
BYTES = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}
STEP = 64

# The shapes of Gemma 3 1B, Llama 3.1 8B and DeepSeek-V3, whatever each of them really caches.
MODELS: list[Config] = [
    {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
    {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128},
]
SMALL: Config = {"num_hidden_layers": 9, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 48}


def cache_bytes(config: Config, rank: int, tokens: int) -> int:
    """Layer by layer: one row of the latent and the rotary key for every token."""
    row = (rank + config["qk_rope_head_dim"]) * BYTES[config["torch_dtype"]]
    return sum(tokens * row for _layer in range(config["num_hidden_layers"]))


def wanted(config: Config, budget_gib: float, batch: int, max_len: int) -> int:
    """Tries every rank from the largest down; 0 if none fits."""
    most = 2 * config["num_attention_heads"] * config["head_dim"]
    fits = (
        rank
        for rank in range(most // STEP * STEP, 0, -STEP)
        if cache_bytes(config, rank, batch * max_len) <= budget_gib * 2**30
    )
    return next(fits, 0)


def draw(
    t: Trial, rank: int | None = None, exact: bool = False, model: Config | None = None
) -> tuple[Config, float, int, int]:
    """A model, a budget, a batch and a length. The budget allows ``rank`` and something over, or nothing over
    where ``exact``. What is over grows from round to round and is never enough for 64 more."""
    config = {**(model or MODELS[t.round % len(MODELS)]), "torch_dtype": list(BYTES)[t.round % 3]}
    config["qk_rope_head_dim"] = t.pick(32, 64)
    batch, max_len = t.integer(2, 7), 2 ** t.integer(12, 15)
    rank = STEP * t.integer(18, 28) if rank is None else rank
    room = cache_bytes(config, rank, batch * max_len)
    if not exact:
        over = (t.integer(1, 9), t.integer(36, 44), t.integer(50, 60))[t.round % 3]
        room += over * cache_bytes({**config, "qk_rope_head_dim": 0}, 1, batch * max_len)
    return config, room / 2**30, batch, max_len


def field(t: Trial, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
        t.true(False, f"a dict with the key {name!r}", came)
        raise Stop
    return got[name]


def rank_is_right(t: Trial, rank_for_budget: Answer, case: tuple[Config, float, int, int]) -> None:
    got = field(t, rank_for_budget(*case), "rank")
    plain = plain_number(got)
    if isinstance(plain, float) and plain.is_integer():
        got = int(plain)
    t.number(got, wanted(*case), "rank")


def own_rank(got: Any, case: tuple[Config, float, int, int]) -> float:
    """The answer's own rank: a mistake in it, told above, shall not cost the other points too."""
    own = plain_number(got.get("rank")) if isinstance(got, dict) else None
    return own if own is not None and own > 0 else wanted(*case)


@EXERCISE.requirement(1, "the rank")
def rank(t: Trial, rank_for_budget: Answer) -> None:
    """the largest multiple of 64 at which the cache of the whole batch fits"""
    rank_is_right(t, rank_for_budget, draw(t))


@EXERCISE.requirement(1, "a budget that fits exactly")
def exact(t: Trial, rank_for_budget: Answer) -> None:
    """a cache as large as the budget fits, to the byte"""
    rank_is_right(t, rank_for_budget, draw(t, exact=True))


@EXERCISE.requirement(1, "bytes per token")
def per_token(t: Trial, rank_for_budget: Answer) -> None:
    """what one token leaves in the cache at the rank that was chosen, over all layers"""
    case = draw(t, model=MODELS[0])
    got = rank_for_budget(*case)
    none = cache_bytes(case[0], 0, 1)
    want = none + (cache_bytes(case[0], 1, 1) - none) * own_rank(got, case)
    t.number(field(t, got, "bytes_per_token"), want, "bytes_per_token")


@EXERCISE.requirement(1, "the ratios")
def ratios(t: Trial, rank_for_budget: Answer) -> None:
    """how many times larger the cache of MHA (2·H·D numbers) and of GQA (2·G·D) is, at the rank chosen"""
    case = draw(t, model=MODELS[0])
    got, config = rank_for_budget(*case), case[0]
    row = own_rank(got, case) + config["qk_rope_head_dim"]
    for name, heads in (("versus_mha", "num_attention_heads"), ("versus_gqa", "num_key_value_heads")):
        t.number(field(t, got, name), 2 * config[heads] * config["head_dim"] / row, name)


@EXERCISE.requirement(1, "more than enough")
def cap(t: Trial, rank_for_budget: Answer) -> None:
    """never more than 2·H·D, which compresses nothing any more, and still a multiple of 64"""
    config = {**SMALL, "qk_rope_head_dim": t.pick(16, 32), "torch_dtype": "bfloat16"}
    rank_is_right(t, rank_for_budget, (config, t.integer(60, 90) * 1.0, t.integer(2, 4), 4096))


@EXERCISE.requirement(1, "not enough")
def too_little(t: Trial, rank_for_budget: Answer) -> None:
    """a ValueError where not even rank 64 fits, and none where it just does"""
    rank_is_right(t, rank_for_budget, draw(t, STEP, exact=True))
    config, budget_gib, batch, max_len = draw(t, STEP, exact=True)
    t.raises(
        ValueError,
        lambda: rank_for_budget(config, budget_gib * 0.98, batch, max_len),
        "where not even rank 64 fits",
    )
