"""11.1: the mistakes that people make when they count arithmetic and time."""

from kvlearn.grading.units.triton_decode.floor import Config, count
from kvlearn.grading.units.triton_decode.floor_mistakes import EXERCISE, Gpu, Step, step

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the arithmetic of one head")
def one_head(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The FLOPs were counted for one head. Every query head computes its own scores and its own weighted sum:
    times n_heads."""
    return step(config, lengths, gpu, a_key_flops=count({**config, "n_heads": 1}, [1])[2])


@EXERCISE.misconception("the RoPE part in the weighted sum")
def rope_in_values(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The weighted sum of a latent was counted with its RoPE part. That part is for the scores alone; the
    value is the first `latent` numbers."""
    more = 2 * config["rope"] * config["n_heads"] if config["latent"] else 0
    return step(config, lengths, gpu, a_key_flops=count(config, [1])[2] + more)


@EXERCISE.misconception("the fixed cost for each sequence")
def fixed_each(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """`fixed` was counted once for each sequence. The batch is one launch."""
    right = step(config, lengths, gpu)
    return {**right, "seconds": right["seconds"] + (len(lengths) - 1) * gpu["fixed"]}


@EXERCISE.misconception("a multiplication and its addition counted as one")
def half_the_flops(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """A factor of 2 is missing in the FLOPs: a product and its sum are two operations, and a GPU's peak is
    quoted that way."""
    return step(config, lengths, gpu, a_key_flops=count(config, [1])[2] // 2)


@EXERCISE.misconception("only the scores computed")
def scores_only(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The FLOPs of q·k are there, those of the weighted sum of the values are missing: as many again (for a
    latent, without its RoPE part)."""
    numbers = config["latent"] + config["rope"] if config["latent"] else config["head_dim"]
    return step(config, lengths, gpu, a_key_flops=2 * numbers * config["n_heads"])


@EXERCISE.misconception("the two times added")
def times_added(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """Reading and computing were added. A GPU does both at once, while one tile is computed the next is on
    its way: the slower of the two counts, max(…)."""
    right = step(config, lengths, gpu)
    seconds = right["bytes"] / gpu["bandwidth"] + right["flops"] / gpu["flops"] + gpu["fixed"]
    return {**right, "seconds": seconds}


@EXERCISE.misconception("the faster of the two times")
def faster(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """min was taken in place of max. The step is done when both are done."""
    right = step(config, lengths, gpu)
    return {
        **right,
        "seconds": min(right["bytes"] / gpu["bandwidth"], right["flops"] / gpu["flops"]) + gpu["fixed"],
    }


@EXERCISE.misconception("only the reading counts")
def reading_only(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The arithmetic was left out of the time. Most decode steps are bound by memory, and not all: with
    hundreds of heads on one KV head or latent, the tensor cores are the slower part."""
    right = step(config, lengths, gpu)
    return {**right, "seconds": right["bytes"] / gpu["bandwidth"] + gpu["fixed"]}


@EXERCISE.misconception("the fixed cost forgotten")
def no_fixed(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """`fixed` is missing: launching, the first bytes' way from memory and the merge take their microseconds
    however little there is to read, and at small sizes they are most of the time."""
    right = step(config, lengths, gpu)
    return {**right, "seconds": right["seconds"] - gpu["fixed"]}


@EXERCISE.misconception("the fixed cost inside the maximum")
def fixed_inside(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """`fixed` was compared with the two times in place of being added. It comes before and after the
    reading, not beside it: max(…) + fixed."""
    right = step(config, lengths, gpu)
    return {**right, "seconds": max(right["seconds"] - gpu["fixed"], gpu["fixed"])}


@EXERCISE.misconception("GiB called GB")
def gib(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """gb_per_second was divided by 2³⁰. That is GiB; bandwidths are quoted in GB, 10⁹ bytes, and the 7%
    between them are more than the last improvement of most kernels."""
    right = step(config, lengths, gpu)
    return {**right, "gb_per_second": right["bytes"] / gpu["measured"] / 2**30}


@EXERCISE.misconception("the floor's time in the bandwidth reached")
def floor_bandwidth(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """gb_per_second was taken from the floor. What a kernel reached is its bytes in the time that was
    *measured*; from the floor you get what it could reach at best."""
    right = step(config, lengths, gpu)
    return {**right, "gb_per_second": right["bytes"] / right["seconds"] / 1e9}
