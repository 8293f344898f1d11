"""02.6: the mistakes that people make when they choose a number of heads for a budget."""

from kvlearn.grading.units.shared_kv.budget import EXERCISE, Config, divisors, head_bytes

__all__ = ["EXERCISE"]


def fitting(config: Config, budget_gib: float, one: float) -> list[int]:
    """The divisors that fit where one head costs so many bytes."""
    return [g for g in divisors(config["num_attention_heads"]) if g * one <= budget_gib * 2**30]


def largest(config: Config, budget_gib: float, one: float) -> int | None:
    return max(fitting(config, budget_gib, one), default=None)


@EXERCISE.misconception("the largest number, divisor or not")
def any_number(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The budget was divided by what one head costs. 5 KV heads may fit, but 32 query heads cannot be dealt
    out evenly among 5: the pools must be equal, so the number has to divide num_attention_heads."""
    n = int(budget_gib * 2**30 // head_bytes(config, batch, max_len))
    return min(n, config["num_attention_heads"]) or None


@EXERCISE.misconception("powers of two only")
def powers_of_two(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """Only 1, 2, 4, 8 … were tried. They are common, and not required: 28 heads allow 7 and 14, and 12 heads
    allow 3. (And not every power of two divides them.)"""
    fits = fitting(config, budget_gib, head_bytes(config, batch, max_len))
    return max((g for g in fits if g & (g - 1) == 0), default=None)


@EXERCISE.misconception("the batch forgotten")
def no_batch(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The cache was counted for one sequence. The weights are shared by a batch and the cache is not: every
    sequence keeps its own."""
    return largest(config, budget_gib, head_bytes(config, 1, max_len))


@EXERCISE.misconception("the length forgotten")
def no_length(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The cache was counted for one token. It has room for max_len of them in each sequence."""
    return largest(config, budget_gib, head_bytes(config, batch, 1))


@EXERCISE.misconception("keys only")
def keys_only(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """Half of the cache is missing, so the choice is up to twice as large as what fits. A token leaves a key
    *and* a value at each KV head of each layer."""
    return largest(config, budget_gib, head_bytes(config, batch, max_len) / 2)


@EXERCISE.misconception("one layer only")
def one_layer(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The layers are missing. Every layer has a cache of its own, all of this size."""
    return largest(config, budget_gib, head_bytes({**config, "num_hidden_layers": 1}, batch, max_len))


@EXERCISE.misconception("GB called GiB")
def gb(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The budget was turned into bytes with 10⁹. That is a GB; a GiB is 2³⁰ bytes, 7% more. So a cache that
    just fits was refused."""
    return largest(config, budget_gib * 10**9 / 2**30, head_bytes(config, batch, max_len))


@EXERCISE.misconception("bits for bytes")
def bits(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """bfloat16 has 16 bits, and that is 2 bytes. The cache was taken for 8 times its size."""
    return largest(config, budget_gib, head_bytes(config, batch, max_len) * 8)


@EXERCISE.misconception("two bytes a number, whatever the dtype")
def two_bytes(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """torch_dtype was not looked at. float32 takes 4 bytes a number and the 8-bit floats take 1: the same
    budget then has room for half or twice as many heads."""
    return largest(config, budget_gib, head_bytes({**config, "torch_dtype": "bfloat16"}, batch, max_len))


@EXERCISE.misconception("head_dim not looked up")
def no_head_dim(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The head dim was always taken as hidden_size / num_attention_heads. Where the config has head_dim, that
    counts."""
    config = {key: value for key, value in config.items() if key != "head_dim"}
    return largest(config, budget_gib, head_bytes(config, batch, max_len))


@EXERCISE.misconception("the head dim from the KV heads")
def constant_width(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The head dim was taken as hidden_size / n_kv_heads, so every choice costs the same: either all heads
    fit or none. A key is as wide as the query that it meets, hidden_size / num_attention_heads, and fewer
    heads really are less."""
    heads = config["num_attention_heads"]
    all_of_them = heads * head_bytes(config, batch, max_len)
    if "head_dim" in config:
        return largest(config, budget_gib, head_bytes(config, batch, max_len))
    return heads if all_of_them <= budget_gib * 2**30 else None


@EXERCISE.misconception("hidden_size in place of head_dim")
def whole_width(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """Each KV head was counted with hidden_size numbers. That is the width of all query heads together; one
    head has head_dim of them, or hidden_size / num_attention_heads."""
    return largest(
        config, budget_gib, head_bytes({**config, "head_dim": config["hidden_size"]}, batch, max_len)
    )


@EXERCISE.misconception("the smallest that fits")
def smallest(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """One KV head fits whenever anything does, so this is always 1. Quality falls as pools grow: take the
    *largest* number that fits."""
    return min(fitting(config, budget_gib, head_bytes(config, batch, max_len)), default=None)


@EXERCISE.misconception("the size of a pool, not the number of pools")
def pool_size(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The answer is H/G, how many query heads share a KV head. Asked for is G, how many KV heads there
    are."""
    g = largest(config, budget_gib, head_bytes(config, batch, max_len))
    return None if g is None else config["num_attention_heads"] // g


@EXERCISE.misconception("a budget met exactly is refused")
def strictly(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """The comparison is < where it should be <=. A cache that takes the whole budget fits into it."""
    one = head_bytes(config, batch, max_len)
    fits = (g for g in divisors(config["num_attention_heads"]) if g * one < budget_gib * 2**30)
    return max(fits, default=None)


@EXERCISE.misconception("all heads never tried")
def never_all(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """num_attention_heads itself is missing among the candidates: `range(1, H)` ends at H − 1. Where there is
    room for a KV head for each query head, nothing need be shared."""
    fits = fitting(config, budget_gib, head_bytes(config, batch, max_len))
    return max((g for g in fits if g < config["num_attention_heads"]), default=None)


@EXERCISE.misconception("the next divisor above")
def rounded_up(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """Where the budget lies between two divisors the larger one was taken, and its cache does not fit. A
    budget is a limit: round down."""
    one = head_bytes(config, batch, max_len)
    if one > budget_gib * 2**30:
        return None
    above = [g for g in divisors(config["num_attention_heads"]) if g * one >= budget_gib * 2**30]
    return min(above, default=config["num_attention_heads"])


@EXERCISE.misconception("1 where nothing fits")
def at_least_one(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """Where not even one KV head fits the answer was 1, and the program would run out of memory later. Say so
    at once: None."""
    return largest(config, budget_gib, head_bytes(config, batch, max_len)) or 1


@EXERCISE.misconception("0 where nothing fits")
def zero(config: Config, budget_gib: float, batch: int, max_len: int) -> int | None:
    """Where not even one KV head fits the answer was 0, which is a number like any other: a model would be
    built with it. None, as asked for, cannot be mistaken for a number of heads."""
    return largest(config, budget_gib, head_bytes(config, batch, max_len)) or 0
