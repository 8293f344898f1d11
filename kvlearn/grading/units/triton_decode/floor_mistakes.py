"""11.1: the mistakes that people make when they count a decode step."""

from typing import Any

from kvlearn.grading.units.triton_decode.floor import EXERCISE, Config, count, live_keys

__all__ = ["EXERCISE"]

Gpu = dict[str, float]
Step = dict[str, Any]


def step(
    config: Config,
    lengths: list[int],
    gpu: Gpu,
    *,
    live: int | None = None,
    a_key: float | None = None,
    a_key_flops: float | None = None,
    **changed: float,
) -> Step:
    """The right answer, with another number of live keys, bytes a key or FLOPs a key where they are given."""
    right, right_bytes, right_flops = count(config, lengths)
    n = right if live is None else live
    n_bytes = n * (right_bytes // right if a_key is None else a_key)
    n_flops = n * (right_flops // right if a_key_flops is None else a_key_flops)
    seconds = max(n_bytes / gpu["bandwidth"], n_flops / gpu["flops"]) + gpu["fixed"]
    gb = n_bytes / gpu["measured"] / 1e9
    return {"live": n, "bytes": n_bytes, "flops": n_flops, "seconds": seconds, "gb_per_second": gb, **changed}


def bytes_of(config: Config, **other: Any) -> int:
    return count({**config, **other}, [1])[1]


@EXERCISE.misconception("query heads in place of KV heads")
def query_heads(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The bytes were counted for every query head. The query heads of a group share one KV head, and a kernel
    that packs them reads its keys and values once: n_kv_heads. Counted like this, a kernel would seem to be
    faster than its memory."""
    return step(config, lengths, gpu, a_key=bytes_of(config, n_kv_heads=config["n_heads"]))


@EXERCISE.misconception("KV heads in the arithmetic")
def kv_heads_compute(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The FLOPs were counted for n_kv_heads. Every *query* head computes its own scores with the shared keys:
    n_heads. This is why sharing helps: fewer bytes for the same arithmetic."""
    return step(config, lengths, gpu, a_key_flops=count({**config, "n_heads": config["n_kv_heads"]}, [1])[2])


@EXERCISE.misconception("the capacity in place of the lengths")
def by_capacity(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """Every sequence was counted with the room that it has, `capacity`. That is what is stored; a step
    reads the keys that are there."""
    return step(config, lengths, gpu, live=sum(live_keys(config, capacity) for _ in lengths))


@EXERCISE.misconception("every sequence as long as the longest")
def padded(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The longest sequence was taken times the batch. That is what a padded batch costs; a kernel that is
    told the lengths stops at each row's own end."""
    return step(config, lengths, gpu, live=live_keys(config, max(lengths)) * len(lengths))


@EXERCISE.misconception("the latent counted twice")
def latent_twice(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """A latent was counted as a key and as a value. It is stored once, and what was loaded for the score
    is still on the chip for the weighted sum: latent + rope numbers in all."""
    a_key = 2 * (config["latent"] + config["rope"]) * config["number"] if config["latent"] else None
    return step(config, lengths, gpu, a_key=a_key)


@EXERCISE.misconception("a latent for each head")
def latent_per_head(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The latent was multiplied by the heads. All heads read the same vector (each looks at it through its
    own up-projection, which is absorbed into the query): there is one a token."""
    heads = config["n_heads"] if config["latent"] else 1
    return step(config, lengths, gpu, a_key=bytes_of(config) * heads)


@EXERCISE.misconception("the latent without its RoPE part")
def latent_without_rope(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """The bytes of a latent were counted without the `rope` numbers that stand beside it. They carry the
    position and are read for every score."""
    return step(config, lengths, gpu, a_key=bytes_of(config, rope=0))


@EXERCISE.misconception("sinks inside the window")
def sinks_inside(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """At most `window` keys were counted, the sinks among them. In this course they come on top: the newest
    `window` keys, and the first n_sinks as well."""
    size = config["window"]
    return step(config, lengths, gpu, live=sum(min(n, size) if size else n for n in lengths))


@EXERCISE.misconception("sinks for sequences that still see their beginning")
def sinks_twice(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """min(length, window) + n_sinks counts the first keys twice as long as they are still in the window. A
    sequence never has more live keys than keys: min(length, window + n_sinks)."""
    size = config["window"]
    return step(
        config, lengths, gpu, live=sum(min(n, size) + config["n_sinks"] if size else n for n in lengths)
    )


@EXERCISE.misconception("every window full")
def windows_full(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """Every sequence was counted with window + n_sinks keys. A short one has fewer: min(length, …)."""
    size = config["window"]
    return step(config, lengths, gpu, live=sum(size + config["n_sinks"] if size else n for n in lengths))


@EXERCISE.misconception("the window ignored")
def no_window(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """All keys of a sequence were counted. With a window, a step reads the newest `window` and the sinks,
    however long the context is: that is why its time stays flat."""
    return step(config, lengths, gpu, live=sum(lengths))


@EXERCISE.misconception("keys only")
def keys_only(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """A factor of 2 is missing: a step reads the keys for the scores and the values for the weighted sum.
    (Only a latent is both at once.)"""
    return step(config, lengths, gpu, a_key=bytes_of(config) if config["latent"] else bytes_of(config) // 2)


@EXERCISE.misconception("two bytes a number, whatever is stored")
def two_bytes(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """`number`, the bytes of a stored number, is not looked at. fp8 and int8 take 1, fp32 takes 4."""
    return step(config, lengths, gpu, a_key=bytes_of(config, number=2))


@EXERCISE.misconception("the scales not counted")
def no_scales(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """A quantised key or value is read together with its scale, `scale` bytes: one for each key and each
    value of each KV head."""
    return step(config, lengths, gpu, a_key=bytes_of(config, scale=0))


@EXERCISE.misconception("scales for the keys only")
def key_scales(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """One scale was counted for a key and its value together. They are quantised apart, each with a scale
    of its own: 2 · n_kv_heads scales a token."""
    one = 0 if config["latent"] else config["n_kv_heads"] * config["scale"]
    return step(config, lengths, gpu, a_key=bytes_of(config) - one)


@EXERCISE.misconception("a scale for each number")
def scale_per_number(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """A scale was counted for every number. Then 8-bit numbers would save nothing: one scale serves the
    head_dim numbers of a key, or of a value."""
    return step(
        config, lengths, gpu, a_key=bytes_of(config, number=config["number"] + config["scale"], scale=0)
    )


@EXERCISE.misconception("bits for bytes")
def bits(config: Config, lengths: list[int], capacity: int, gpu: Gpu) -> Step:
    """`number` is a number of bytes, and was multiplied by 8. The bytes are 8 times too many."""
    return step(config, lengths, gpu, a_key=bytes_of(config, number=8 * config["number"]))
