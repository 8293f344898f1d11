"""03.7: the mistakes that people make when they choose a rank."""

from typing import Any

from kvlearn.grading.units.multi_head_compression.budget import BYTES, EXERCISE, STEP, Config

__all__ = ["EXERCISE"]

Answer = dict[str, Any]


def plan(
    config: Config,
    budget_gib: float,
    batch: int,
    max_len: int,
    *,
    each: float | None = None,
    gib: float = 2**30,
    rope: int | None = None,
    tokens: int | None = None,
    layers: int | None = None,
    cap: float | None = None,
) -> Answer:
    """The right answer but for what is given: bytes a number, a GiB, rotary numbers, tokens, layers, the
    cap."""
    number = BYTES[config["torch_dtype"]] if each is None else each
    rotary = config["qk_rope_head_dim"] if rope is None else rope
    n_layers = config["num_hidden_layers"] if layers is None else layers
    most = 2 * config["num_attention_heads"] * config["head_dim"] if cap is None else cap
    n_tokens = batch * max_len if tokens is None else tokens
    numbers = budget_gib * gib / (n_layers * n_tokens * number) - rotary
    rank = int(min(numbers, most) // STEP * STEP)
    if rank < STEP:
        raise ValueError("budget_gib: too small for rank 64")
    return describe_rank(config, rank, number, rotary, n_layers)


def describe_rank(config: Config, rank: int, number: float, rotary: int, n_layers: int) -> Answer:
    row = rank + rotary
    per_token = n_layers * row * number
    return {
        "rank": rank,
        "bytes_per_token": int(per_token) if per_token == int(per_token) else per_token,
        "versus_mha": 2 * config["num_attention_heads"] * config["head_dim"] / row,
        "versus_gqa": 2 * config["num_key_value_heads"] * config["head_dim"] / row,
    }


def reranked(config: Config, rank: int) -> Answer:
    """Everything right for this rank."""
    number, rotary = BYTES[config["torch_dtype"]], config["qk_rope_head_dim"]
    return describe_rank(config, rank, number, rotary, config["num_hidden_layers"])


@EXERCISE.misconception("the latent counted twice, for keys and values")
def twice(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """A factor of 2 for keys and values went in. One latent serves both: it is stored once, and keys and
    values are made from it. So the budget allows about twice the rank."""
    return plan(config, budget_gib, batch, max_len, each=2 * BYTES[config["torch_dtype"]])


@EXERCISE.misconception("a latent for every head")
def per_head(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The row of R + Dr numbers was multiplied by the number of heads. All heads read the *same* row: that is
    the whole saving."""
    each = config["num_attention_heads"] * BYTES[config["torch_dtype"]]
    return plan(config, budget_gib, batch, max_len, each=each)


@EXERCISE.misconception("the rotary numbers forgotten")
def no_rope(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """Dr is missing. A cached row is [c ; k_rope]: beside the R numbers of the latent it holds the
    qk_rope_head_dim numbers of the rotary key, in every layer."""
    return plan(config, budget_gib, batch, max_len, rope=0)


@EXERCISE.misconception("a rotary key for every head")
def rope_per_head(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The rotary key was counted once for each head, H·Dr numbers. There is one for all heads, Dr numbers."""
    rotary = config["qk_rope_head_dim"]
    return plan(config, budget_gib, batch, max_len, rope=rotary * config["num_attention_heads"])


@EXERCISE.misconception("GB for GiB")
def gb(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The budget was taken as budget_gib · 10⁹ bytes. That is GB; a GiB is 2³⁰ bytes, 7% more. So some of the
    memory stays unused, and a budget that fits exactly does not fit."""
    return plan(config, budget_gib, batch, max_len, gib=10**9)


def allowed(config: Config, budget_gib: float, batch: int, max_len: int) -> tuple[float, int]:
    """The rank that fits, not rounded, and the cap. ValueError where it is below 64."""
    numbers = budget_gib * 2**30 / (config["num_hidden_layers"] * batch * max_len)
    numbers = numbers / BYTES[config["torch_dtype"]] - config["qk_rope_head_dim"]
    if numbers < STEP:
        raise ValueError("budget_gib: too small for rank 64")
    return numbers, 2 * config["num_attention_heads"] * config["head_dim"]


@EXERCISE.misconception("rounded up")
def rounded_up(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The rank was rounded to the next multiple of 64 *above*. Then the cache is larger than the budget, and
    the server runs out of memory at full load. Always round down."""
    numbers, most = allowed(config, budget_gib, batch, max_len)
    return reranked(config, int(min(-(-numbers // STEP), most // STEP)) * STEP)


@EXERCISE.misconception("rounded to the nearest")
def rounded(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The rank was rounded to the *nearest* multiple of 64. Every other time that is up, and the cache is
    larger than the budget. Always round down: `//`, not `round`."""
    numbers, most = allowed(config, budget_gib, batch, max_len)
    return reranked(config, min(round(numbers / STEP), most // STEP) * STEP)


@EXERCISE.misconception("not rounded to a multiple of 64")
def not_rounded(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The rank is the largest that fits, whatever number that is. GPUs multiply in tiles, so a rank is chosen
    as a multiple of 64: round down with `rank // 64 * 64`, below the cap too."""
    return reranked(config, int(min(allowed(config, budget_gib, batch, max_len))))


@EXERCISE.misconception("the limit itself taken as the rank")
def cap_not_rounded(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """Where memory is plenty the rank became 2·H·D, which need not be a multiple of 64. Take the smaller of
    the two first, and round it down then."""
    numbers, most = allowed(config, budget_gib, batch, max_len)
    return reranked(config, int(min(numbers // STEP * STEP, most)))


@EXERCISE.misconception("less than the budget, not at most")
def strictly_less(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """A cache that fills the budget to the byte was refused. It fits: the condition is ≤, not <. Budgets and
    caches are often round numbers, so this case is not rare."""
    numbers, most = allowed(config, budget_gib, batch, max_len)
    if numbers == STEP:
        raise ValueError("budget_gib: too small for rank 64")
    return reranked(config, int(min(-(-numbers // STEP) - 1, most // STEP)) * STEP)


@EXERCISE.misconception("the rotary numbers not taken off")
def rope_in_rank(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """What the budget allows is R + Dr numbers, and all of them were given to the rank. Dr of them belong to
    the rotary key: take them off before you round."""
    numbers, most = allowed(config, budget_gib, batch, max_len)
    return reranked(config, int(min(numbers + config["qk_rope_head_dim"], most) // STEP * STEP))


@EXERCISE.misconception("the layers forgotten")
def one_layer(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The cache was counted for one layer. Every layer compresses its own input and keeps its own latents."""
    return plan(config, budget_gib, batch, max_len, layers=1)


@EXERCISE.misconception("the batch forgotten")
def one_sequence(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The cache was counted for a single sequence. Each of the batch keeps its own, max_len tokens long."""
    return plan(config, budget_gib, batch, max_len, tokens=max_len)


@EXERCISE.misconception("two bytes a number, whatever the dtype")
def two_bytes(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """torch_dtype is not looked at. float32 takes 4 bytes a number, bfloat16 2 and the 8-bit floats 1."""
    return plan(config, budget_gib, batch, max_len, each=2)


@EXERCISE.misconception("no upper limit")
def uncapped(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """A generous budget gives a rank beyond 2·H·D. The keys and values of all heads are only 2·H·D numbers: a
    latent of more keeps nothing that they do not have."""
    return plan(config, budget_gib, batch, max_len, cap=float("inf"))


@EXERCISE.misconception("the limit taken as H·D")
def low_cap(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The rank was cut off at H·D. The latent holds keys *and* values of all heads, so up to 2·H·D numbers
    can say something new."""
    most = config["num_attention_heads"] * config["head_dim"]
    return plan(config, budget_gib, batch, max_len, cap=most)


@EXERCISE.misconception("the limit counted with KV heads")
def grouped_cap(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The rank was cut off at 2·G·D. In latent attention every query head has keys and values of its own,
    made from the latent, so the limit is 2·H·D; G describes the GQA model of the comparison and nothing
    else."""
    most = 2 * config["num_key_value_heads"] * config["head_dim"]
    return plan(config, budget_gib, batch, max_len, cap=max(STEP, most))


@EXERCISE.misconception("rank 0 where nothing fits")
def no_error(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """Where not even rank 64 fits, a rank of 0 or less, or None, came back. A model with such a rank would
    run and know nothing of its past. Say so at the door: raise ValueError."""
    try:
        return plan(config, budget_gib, batch, max_len)
    except ValueError:
        return reranked(config, 0)


@EXERCISE.misconception("the ratios upside down")
def inverted(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The ratios are latent over MHA and GQA, a fraction of 1. Asked was how many times *larger* their caches
    are: 2·H·D / (R + Dr)."""
    right = plan(config, budget_gib, batch, max_len)
    return {**right, **{name: 1 / right[name] for name in ("versus_mha", "versus_gqa")}}


@EXERCISE.misconception("the ratios without the rotary key")
def ratio_without_rope(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """The ratios were taken with R alone. The rotary key is cached as well: 2·H·D / (R + Dr)."""
    right = plan(config, budget_gib, batch, max_len)
    row = (right["rank"] + config["qk_rope_head_dim"]) / right["rank"]
    return {**right, **{name: right[name] * row for name in ("versus_mha", "versus_gqa")}}


@EXERCISE.misconception("keys only in the ratios")
def ratio_of_keys(config: Config, budget_gib: float, batch: int, max_len: int) -> Answer:
    """A factor of 2 is missing in the ratios: MHA and GQA cache a key *and* a value for each head, 2·H·D and
    2·G·D numbers."""
    right = plan(config, budget_gib, batch, max_len)
    return {**right, **{name: right[name] / 2 for name in ("versus_mha", "versus_gqa")}}
