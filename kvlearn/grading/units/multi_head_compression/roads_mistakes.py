"""03.6: the mistakes that people make when they count the two roads."""

from collections.abc import Callable
from typing import Any

from kvlearn.grading.units.multi_head_compression.roads import EXERCISE, largest

__all__ = ["EXERCISE"]

Answer = dict[str, Any]
Count = Callable[[int], float]


def crossing(naive: Count, absorbed: Count) -> int | None:
    """The largest T at which absorbed wins, for two straight lines in T."""
    start = naive(0) - absorbed(0)
    slope = (absorbed(1) - absorbed(0)) - (naive(1) - naive(0))
    if slope <= 0:
        return None if start > 0 or slope < 0 else 0
    return max(0, int(-(-start // slope)) - 1)


def answer(naive: Count, absorbed: Count, T: int) -> Answer:
    return {"naive": naive(T), "absorbed": absorbed(T), "largest_T": crossing(naive, absorbed)}


def right(H: int, D: int, R: int, Dr: int, S: int) -> tuple[Count, Count]:
    def naive(T: int) -> int:
        return 2 * S * R * H * 2 * D + 2 * T * S * H * (2 * D + Dr)

    def absorbed(T: int) -> int:
        return 2 * T * H * D * R * 2 + 2 * T * S * H * (2 * R + Dr)

    return naive, absorbed


@EXERCISE.misconception("multiply-adds, not FLOPs")
def multiply_adds(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """A factor of 2 is missing everywhere: a multiply-add is one multiplication and one addition, so 2 FLOPs.
    Which road wins does not change, and every comparison with a data sheet does."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(lambda T: naive(T) // 2, lambda T: absorbed(T) // 2, T)


@EXERCISE.misconception("decompressed once for every query")
def decompressed_each(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The decompression was counted T times. Keys and values of the S tokens are built once in this call, and
    all T queries use them: that is why a long prefill prefers the naive road."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(lambda T: naive(T) + (T - 1) * naive(0), absorbed, T)


@EXERCISE.misconception("only the keys decompressed")
def keys_only(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The naive road decompresses keys *and* values: 2·D numbers for each head and token, so
    2·S·R·H·2D FLOPs. Half of that is missing."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(lambda T: naive(T) - naive(0) // 2, absorbed, T)


@EXERCISE.misconception("the decompression left out")
def free_decompression(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Only the attention of the naive road was counted. Its keys and values are not in the cache: they are
    made anew from the latents of all S tokens, 2·S·R·H·2D FLOPs at every step."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(lambda T: naive(T) - naive(0), absorbed, T)


@EXERCISE.misconception("the rotary numbers left out")
def no_rope(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Dr is missing. On both roads a score is a product of content and of Dr rotary numbers: 2D + Dr and
    2R + Dr. It cancels in the comparison and not in the counts."""
    return answer(*right(H, D, R, 0, S), T)


@EXERCISE.misconception("rotary numbers counted in the values")
def rope_twice(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Dr was counted twice, once for the scores and once for the output. The rotary key takes part in the
    scores alone; what is summed up is the value, D numbers (or the latent, R)."""
    return answer(*right(H, D, R, 2 * Dr, S), T)


@EXERCISE.misconception("the values D wide on the absorbed road")
def values_in_heads(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The absorbed road was given R + Dr for the scores and D for the output, 2·T·S·H·(R + Dr + D). What is
    summed up there is the latent, R numbers: only the sum is taken up to D. So it is 2R + Dr."""
    naive, _ = right(H, D, R, Dr, S)
    return answer(naive, lambda T: 4 * T * H * D * R + 2 * T * S * H * (R + Dr + D), T)


@EXERCISE.misconception("one way only")
def way_in_only(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """W_uk was folded into the query, and the way out through W_uv forgotten, or the other way round. Each
    costs 2·T·H·D·R, and both are walked."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(naive, lambda T: absorbed(T) - 2 * T * H * D * R, T)


@EXERCISE.misconception("the ways in and out left out")
def free_ways(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Only the attention of the absorbed road was counted. The query goes in through W_uk and the result out
    through W_uv, for every new token: 2·T·H·D·R FLOPs each. (Folding W_uk into the query's weights beforehand
    would make that matrix larger, so nobody does it.)"""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(naive, lambda T: absorbed(T) - 4 * T * H * D * R, T)


@EXERCISE.misconception("the ways in and out counted for every cached token")
def ways_for_all(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """W_uk and W_uv were applied S times. On the absorbed road the cached tokens are left as they are; only
    the T queries go in and the T results out, and that is the point of it."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(naive, lambda T: absorbed(T) + 4 * (S - T) * H * D * R, T)


@EXERCISE.misconception("one head in the latent space")
def single_head(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Attention on the absorbed road was counted for one head, since the latent is shared. The *memory* is
    shared; every head has its own query, its own scores and its own sum: times H. So many FLOPs for each byte
    that is read are what makes this road fast in decode."""
    naive, _ = right(H, D, R, Dr, S)
    return answer(naive, lambda T: 4 * T * H * D * R + 2 * T * S * (2 * R + Dr), T)


@EXERCISE.misconception("the sum of latents left out")
def scores_only(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """On the absorbed road only the scores were counted, R + Dr products for each pair. The weighted sum of
    the latents takes R more for each pair: 2R + Dr."""
    naive, _ = right(H, D, R, Dr, S)
    return answer(naive, lambda T: 4 * T * H * D * R + 2 * T * S * H * (R + Dr), T)


@EXERCISE.misconception("one head counted")
def heads_forgotten(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Both counts lack the factor H. Every head has its own way up, its own scores and its own output. Which
    road wins does not change, for both grow with H alike."""
    return answer(*right(1, D, R, Dr, S), T)


@EXERCISE.misconception("one new token counted")
def single_query(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Both roads were counted for T = 1. T new tokens attend T times, and go in and out T times; only the
    decompression happens once."""
    return answer(*right(H, D, R, Dr, S), 1)


@EXERCISE.misconception("new tokens counted beside S")
def longer(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """S + T tokens were attended to. S counts all tokens in the cache, the T new ones included, as everywhere
    in the course."""
    naive, absorbed = (lambda n, i=i: right(H, D, R, Dr, S + n)[i](n) for i in range(2))
    return {
        "naive": naive(T),
        "absorbed": absorbed(T),
        "largest_T": next((n for n in range(2_000) if absorbed(n + 1) >= naive(n + 1)), None),
    }


@EXERCISE.misconception("half of the pairs, for causality")
def causal(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The attention was halved because of the causal mask. That is right for a whole prompt, T = S; a few new
    tokens see nearly all of S. The task counts all T·S pairs on both roads."""
    naive, absorbed = right(H, D, R, Dr, S)
    return answer(
        lambda T: naive(T) - T * S * H * (2 * D + Dr), lambda T: absorbed(T) - T * S * H * (2 * R + Dr), T
    )


def with_largest(H: int, D: int, R: int, Dr: int, S: int, T: int, value: int | None) -> Answer:
    naive, absorbed = right(H, D, R, Dr, S)
    return {"naive": naive(T), "absorbed": absorbed(T), "largest_T": value}


@EXERCISE.misconception("a tie taken for a win")
def tie_wins(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """Where both roads cost the same, this T was counted as won. Absorbed wins with *fewer* FLOPs: rounding
    down the T at which the lines cross is one too many when it is a whole number."""
    naive, absorbed = right(H, D, R, Dr, S)
    slope = absorbed(1) - (naive(1) - naive(0))
    return with_largest(H, D, R, Dr, S, T, None if slope <= 0 else int(naive(0) // slope))


@EXERCISE.misconception("the first T that loses")
def first_loss(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """This is the smallest T at which absorbed no longer wins, or the crossing rounded up. The largest at
    which it wins is one less."""
    most = largest(H, D, R, Dr, S)
    return with_largest(H, D, R, Dr, S, T, None if most is None else most + 1)


@EXERCISE.misconception("no more queries than tokens")
def capped(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The largest T was cut off at S. It is true that T > S cannot occur, but the question was where the two
    lines cross: None says that they never do."""
    most = largest(H, D, R, Dr, S)
    return with_largest(H, D, R, Dr, S, T, S if most is None else min(most, S))


@EXERCISE.misconception("whether absorbed wins at this T")
def at_this_t(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The T that was handed in was tested, and itself or 0 returned. The question is at which T the winner
    changes, for this H, D, R, Dr and S: solve for T."""
    naive, absorbed = right(H, D, R, Dr, S)
    return with_largest(H, D, R, Dr, S, T, T if absorbed(T) < naive(T) else 0)


@EXERCISE.misconception("the crossing of an endless cache")
def endless(H: int, D: int, R: int, Dr: int, S: int, T: int) -> Answer:
    """The largest T was taken from R·D / (R − D). That is what it tends to when S grows; the ways in and out,
    4·T·H·D·R, do not grow with S and move the crossing for a real cache: keep S in the equation."""
    most = None if R <= D else -(-R * D // (R - D)) - 1
    return with_largest(H, D, R, Dr, S, T, most)
