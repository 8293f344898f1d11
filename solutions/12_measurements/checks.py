"""Unit 12: requirements and hints of the exercises on measurements."""

import contextlib
import math
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

from kvlearn import workbench
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Stop,
    describe,
    judge,
    mistakes,
    plain_number,
)
from kvlearn.model import Decoder, ModelConfig, Spec

Config = dict[str, Any]


def about(t: CheckContext, got: Any, want: float, what: str, relative: float = 1e-6) -> bool:
    """``got`` is this number within a relative error; noted rounded, since orders of operations differ."""
    plain = plain_number(got)
    if plain is None:
        return t.note(got, Difference(what, f"{want:.6g}", describe(got)))
    good = plain == want or (math.isfinite(want) and abs(plain - want) <= relative * abs(want))
    digits = 6 if f"{want:.6g}" != f"{plain:.6g}" else 12
    shown = Difference(what, f"{want:,.{digits}g}", f"{plain:,.{digits}g}")
    return t.note(f"{plain:.5g}", None if good else shown)


# 12.1: bytes of a step and bytes stored, compared with a count layer by layer and sequence by sequence

count = Exercise(
    id="12.1",
    slug="count",
    title="Count the bytes of a decode step",
    answers=("step_bytes", "stored_bytes"),
    hints=(
        "Which bytes does a step read once for all sequences together, and which once for each sequence? "
        "Then ask which of the model's parameters a token does not use.",
        "In pseudocode: for each layer: for each sequence: the tokens that this layer looks at, times the "
        "bytes that one token has in this layer. `step_bytes` takes every layer, `stored_bytes` only those "
        "that have a cache of their own.",
        "Two helpers are enough for the cache: `token_bytes(config)` and `tokens(config, layer, n)`. A "
        "window is a min. A latent has no factor 2 and no heads.",
        "An expert is *not* chosen by one token with probability 1 − k/E. All tokens of the batch leave it "
        "alone with that probability to the power of the batch. The others are read.",
        "Weights read: head table V · M, `other`, and experts · (1 − (1 − k/E)^B), times the bytes of "
        "torch_dtype. Weights stored: V · M once if tied, else twice, `other`, and all experts.",
    ),
)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


def plain_config(t: CheckContext) -> Config:
    """A model with grouped-query attention in every layer; no two sizes are equal."""
    G, D = t.pick((2, 80), (4, 64), (8, 128)), t.integer(16, 40)
    return {
        "num_hidden_layers": t.integer(9, 14),
        "hidden_size": 64 * D,
        "vocab_size": t.integer(30_000, 60_000),
        "tie_word_embeddings": False,
        "num_attention_heads": G[0] * t.integer(3, 7),
        "num_key_value_heads": G[0],
        "head_dim": G[1],
        "torch_dtype": "bfloat16",
        "parameters": {"other": t.integer(2_000_000, 9_000_000)},
    }


def drawn_lengths(t: CheckContext, batch: int, least: int = 200, most: int = 9000) -> list[int]:
    return [t.integer(least, most) for _ in range(batch)]


def mixed(config: Config, window: int) -> Config:
    """With a window in most layers."""
    n = config["num_hidden_layers"]
    kinds = ["full_attention" if i % 4 == 2 else "sliding_attention" for i in range(n)]
    return {**config, "layer_types": kinds, "sliding_window": window}


def cache_reference(config: Config, lengths: Sequence[int], stored: bool) -> int:
    """Bytes of all layers and sequences."""
    cached_as = config["cache_dtype"] if "cache_dtype" in config else config["torch_dtype"]
    if "kv_lora_rank" in config:
        numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        keys = values = config["num_key_value_heads"] * config["head_dim"]
        numbers = keys + values
    total, n_layers = 0, config["num_hidden_layers"]
    for i in range(n_layers):
        if stored and i >= n_layers - config.get("num_kv_shared_layers", 0):
            continue
        kind = config["layer_types"][i] if "layer_types" in config else "full_attention"
        for length in lengths:
            seen = length
            if kind == "sliding_attention" and seen > config["sliding_window"]:
                seen = config["sliding_window"]
            total += seen * numbers * BYTES[cached_as]
    return total


def weights_reference(config: Config, batch: int | None) -> float:
    """Bytes of all weights, or of those that a step of this batch reads."""
    table, parameters = config["vocab_size"] * config["hidden_size"], config["parameters"]
    numbers: float = table + parameters["other"]
    if batch is None and not config["tie_word_embeddings"]:
        numbers += table
    if "num_local_experts" in config:
        one = parameters["experts"] / config["num_local_experts"]
        left_alone = (1 - config["num_experts_per_tok"] / config["num_local_experts"]) ** (batch or 0)
        read = 1 - left_alone if batch is not None else 1
        numbers += config["num_local_experts"] * one * read
    return numbers * BYTES[config["torch_dtype"]]


WHOLE = 1e-7  # relative: a count that is rounded to whole bytes is as good


def count_step(t: CheckContext, step_bytes: Answer, config: Config, lengths: list[int]) -> None:
    weights, read = t.parts(step_bytes(config, lengths), 2, "a pair (weights, cache)")
    about(t, weights, weights_reference(config, len(lengths)), "weights read:", WHOLE)
    about(t, read, cache_reference(config, lengths, stored=False), "cache read:", 1e-9)


def count_stored(t: CheckContext, stored_bytes: Answer, config: Config, batch: int, max_len: int) -> None:
    weights, stored = t.parts(stored_bytes(config, batch, max_len), 2, "a pair (weights, cache)")
    about(t, weights, weights_reference(config, None), "weights stored:", 1e-9)
    about(t, stored, cache_reference(config, [max_len] * batch, stored=True), "cache stored:", 1e-9)


@count.requirement(1, "one sequence, full layers")
def count_one(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """the head table and `other`, without the input table; keys and values of the KV heads"""
    count_step(t, step_bytes, plain_config(t), drawn_lengths(t, 1))


@count.requirement(1, "a batch of sequences of different lengths")
def count_batch(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """the weights once for all of them; each sequence its own tokens"""
    count_step(t, step_bytes, plain_config(t), drawn_lengths(t, t.integer(3, 9)))


@count.requirement(1, "a cache in another dtype")
def count_dtype(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """the weights in torch_dtype, the cache in cache_dtype; read and stored"""
    weights, cached = (("bfloat16", "float8_e4m3fn"), ("float32", "bfloat16"), ("float8_e4m3fn", "float16"))[
        t.round
    ]
    config = {**plain_config(t), "torch_dtype": weights, "cache_dtype": cached}
    count_step(t, step_bytes, config, drawn_lengths(t, 2))
    count_stored(t, stored_bytes, config, t.integer(2, 5), t.integer(2000, 9000))


@count.requirement(1, "windows")
def count_window(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """a "sliding_attention" layer reads and stores at most sliding_window tokens, of short texts fewer"""
    config = mixed(plain_config(t), t.integer(1000, 2000))
    count_step(t, step_bytes, config, [t.integer(300, 900), *drawn_lengths(t, 2, 2500)])
    count_stored(t, stored_bytes, config, t.integer(2, 5), t.integer(3000, 9000))
    count_stored(t, stored_bytes, config, t.integer(2, 5), t.integer(300, 900))


@count.requirement(1, "latents")
def count_latent(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """one vector of kv_lora_rank + qk_rope_head_dim numbers per token and layer, whatever the heads"""
    config = {**plain_config(t), "kv_lora_rank": t.pick(192, 320, 512), "qk_rope_head_dim": t.pick(32, 48)}
    count_step(t, step_bytes, config, drawn_lengths(t, 3))
    count_stored(t, stored_bytes, config, t.integer(2, 5), t.integer(3000, 9000))


@count.requirement(1, "experts")
def count_experts(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """the share of the experts that at least one token of the batch chooses, on average; all are stored"""
    E = t.pick(8, 32, 64)
    config = {**plain_config(t), "num_local_experts": E, "num_experts_per_tok": t.pick(2, 3, 4)}
    config["parameters"] = {**config["parameters"], "experts": E * t.integer(1_000_000, 2_000_000)}
    for batch in (1, t.integer(3, 6)):
        count_step(t, step_bytes, config, drawn_lengths(t, batch))
    count_stored(t, stored_bytes, config, 2, t.integer(3000, 9000))


@count.requirement(1, "stored: tables and room for max_len tokens")
def count_tables(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """one table if tied, else two; the cache for batch sequences of max_len tokens; a step reads one table
    either way"""
    config = {**plain_config(t), "tie_word_embeddings": t.round != 1}
    count_stored(t, stored_bytes, config, t.integer(2, 5), t.integer(3000, 9000))
    count_step(t, step_bytes, config, drawn_lengths(t, 2))


@count.requirement(1, "layers that share a cache")
def count_shared(t: CheckContext, step_bytes: Answer, stored_bytes: Answer) -> None:
    """the last num_kv_shared_layers store nothing, and read as much as any layer of their type"""
    config = mixed(plain_config(t), t.integer(500, 900)) if t.round else plain_config(t)
    config["num_kv_shared_layers"] = t.integer(3, 5)
    count_step(t, step_bytes, config, drawn_lengths(t, 2, 1000))
    count_stored(t, stored_bytes, config, t.integer(2, 5), t.integer(3000, 9000))


# 12.2: a roofline, compared with loops over heads and tokens

roof = Exercise(
    id="12.2",
    slug="roofline",
    title="Four mechanisms under one roof",
    answers=("work", "place", "step_seconds"),
    hints=(
        "For one query head and one cached token: how many multiplications and additions does the score "
        "take, and how many does adding the value take? Which of these bytes does another query head read "
        "again, and which are already there?",
        "`work`, in pseudocode: FLOPs = query heads · tokens · (FLOPs of a score + FLOPs of adding a value); "
        "bytes = what the cache holds of these tokens, once. For a state there are no tokens.",
        "A latent serves as key (rank + rope numbers) and as value (its first rank numbers): the FLOPs of a "
        "head differ for the two, and the bytes are read once for both and for all heads.",
        "`place`: a computation takes at least flops / peak, and at least bytes / bandwidth. The larger one "
        "is its time and names its bound. The ridge is the intensity at which both are equal.",
        "`step_seconds`: one part after the other, so their times add up. First the weights: "
        "2 · parameters · batch FLOPs on 2 · parameters bytes. Then each layer: work · batch, with a "
        "time of its own. A maximum of sums is not the sum of maxima.",
    ),
)

Layer = dict[str, Any]


def drawn_layer(t: CheckContext, kind: str) -> Layer:
    G, H = t.pick((2, 6), (4, 12), (5, 35)), t.pick(12, 24, 40)
    return {
        "full": {"kind": "heads", "n_heads": H, "n_kv_heads": H, "head_dim": t.pick(48, 64, 80)},
        "grouped": {"kind": "heads", "n_heads": G[1], "n_kv_heads": G[0], "head_dim": t.pick(96, 128)},
        "latent": {"kind": "latent", "n_heads": H, "rank": t.pick(256, 384, 512), "rope": t.pick(32, 64)},
        "state": {"kind": "state", "n_heads": H, "key_dim": t.pick(64, 96), "value_dim": t.pick(128, 160)},
    }[kind]


def work_reference(layer: Layer, length: int) -> tuple[int, int]:
    """FLOPs and bytes of one token in one sequence, head by head."""
    H = layer["n_heads"]
    if layer["kind"] == "state":
        numbers = layer["key_dim"] * layer["value_dim"]
        return sum(numbers + 2 * numbers + 2 * numbers for _ in range(H)), sum(8 * numbers for _ in range(H))
    seen = length
    if layer.get("window") is not None:
        seen = min(length, layer["window"])
    if layer["kind"] == "latent":
        key, value = layer["rank"] + layer["rope"], layer["rank"]
        return sum(2 * seen * key + 2 * seen * value for _ in range(H)), 2 * seen * key
    D = layer["head_dim"]
    return sum(2 * seen * D + 2 * seen * D for _ in range(H)), sum(
        2 * seen * 2 * D for _ in range(layer["n_kv_heads"])
    )


def roof_seconds(flops: float, nbytes: float, device: Mapping[str, float]) -> float:
    return max(flops / device["flops"], nbytes / device["bandwidth"])


def drawn_device(t: CheckContext, ridge: float) -> dict[str, float]:
    bandwidth = t.integer(100, 900) * 1e9
    return {"bandwidth": bandwidth, "flops": ridge * bandwidth}


def same_work(t: CheckContext, work: Answer, layer: Layer, length: int) -> None:
    flops, nbytes = t.parts(work(layer, length), 2, "a pair (flops, bytes)")
    want = work_reference(layer, length)
    t.number(flops, want[0], "FLOPs:")
    t.number(nbytes, want[1], "bytes:")


@roof.requirement(1, "work: keys and values of heads", rounds=4)
def roof_heads(t: CheckContext, work: Answer, place: Answer, step_seconds: Answer) -> None:
    """each query head's scores and sums, 2 FLOPs for a product that is added; each KV head's bytes once"""
    same_work(t, work, drawn_layer(t, ("full", "grouped")[t.round % 2]), t.integer(500, 5000))


@roof.requirement(1, "work: a window", rounds=4)
def roof_window(t: CheckContext, work: Answer, place: Answer, step_seconds: Answer) -> None:
    """at most `window` tokens in FLOPs and bytes; all of them where window is None, and in a short text"""
    window = (t.integer(600, 900), None)[t.round // 3]
    length = t.integer(100, 500) if t.round == 2 else t.integer(1000, 5000)
    same_work(t, work, {**drawn_layer(t, "grouped"), "window": window}, length)


@roof.requirement(1, "work: a latent")
def roof_latent(t: CheckContext, work: Answer, place: Answer, step_seconds: Answer) -> None:
    """scores over rank + rope numbers, values over rank; one vector per token, read once"""
    same_work(t, work, drawn_layer(t, "latent"), t.integer(500, 5000))


@roof.requirement(1, "work: a state")
def roof_state(t: CheckContext, work: Answer, place: Answer, step_seconds: Answer) -> None:
    """5 FLOPs per number of the state; 4 bytes per number, read and written, at any length"""
    same_work(t, work, drawn_layer(t, "state"), t.integer(500, 5000))


@roof.requirement(2, "place: intensity, ridge, bound and seconds", rounds=4)
def roof_place(t: CheckContext, work: Answer, place: Answer, step_seconds: Answer) -> None:
    """FLOPs per byte; peak / bandwidth; "memory" left of the ridge, "compute" right of it; the larger time"""
    device = drawn_device(t, t.integer(100, 300))
    left = t.round % 2 == 0
    intensity = device["flops"] / device["bandwidth"] * (t.pick(0.01, 0.3) if left else t.pick(1.5, 7.0))
    nbytes = t.integer(10**6, 10**9)
    flops = intensity * nbytes
    form = "four values (intensity, ridge, bound, seconds)"
    got = t.parts(place(flops, nbytes, device), 4, form)
    about(t, got[0], flops / nbytes, "intensity:")
    about(t, got[1], device["flops"] / device["bandwidth"], "ridge:")
    t.text(got[2], "memory" if left else "compute", "bound:")
    about(t, got[3], roof_seconds(flops, nbytes, device), "seconds:")


@roof.requirement(2, "step_seconds", rounds=4)
def roof_step(t: CheckContext, work: Answer, place: Answer, step_seconds: Answer) -> None:
    """the weights, then each layer, one after the other: the sum of their times, each by its own bound"""
    layers = [drawn_layer(t, kind) for kind in ("full", "grouped", "latent", "state")]
    layers[1]["window"] = 256
    layers, length, batch = layers[: t.round + 1], t.integer(2000, 9000), t.integer(300, 500)
    parameters = t.integer(10**7, 10**8)
    device = drawn_device(t, 20 if t.round == 3 else t.integer(40, 90))  # the weights: by compute
    want = roof_seconds(2 * parameters * batch, 2 * parameters, device)
    for layer in layers:
        flops, nbytes = work_reference(layer, length)
        want += roof_seconds(batch * flops, batch * nbytes, device)
    about(t, step_seconds(layers, length, batch, parameters, device), want, "seconds:")


# 12.3: which card is faster, compared with every batch tried in turn

card = Exercise(
    id="12.3",
    slug="card",
    title="Which card, and why",
    answers=("fastest", "flip"),
    hints=(
        "Write the time of one card as three numbers: what memory asks for, what arithmetic asks for, what "
        "the launches ask for. Which two of them happen at the same time?",
        "In pseudocode: need = weights + batch · stored; time = max(bytes / bandwidth, flops / peak) + "
        "kernels · launch. Compute the time of every card, also of those without room; then compare.",
        "The reason in two questions. Would a card without room have been faster than the winner? Then it is "
        "capacity. Otherwise: which of the winner's three numbers is the largest?",
        "`flip`: the order at batch 1 is fixed once. Walk through the batches and stop at the first at which "
        "the other card wins. A card without room loses to one that has room; if neither has room, no batch "
        "from here on has an order, and the answer is None.",
    ),
)

Card = dict[str, float]


def card_parts(job: Mapping[str, float], batch: int, tokens: int, card: Card) -> dict[str, float]:
    """Seconds that each resource asks for."""
    return {
        "bandwidth": (job["weights"] + batch * job["read"]) / card["bandwidth"],
        "compute": batch * tokens * job["flops"] / card["flops"],
        "launches": job["kernels"] * card["launch"],
    }


def card_seconds(job: Mapping[str, float], batch: int, tokens: int, card: Card) -> float:
    parts = card_parts(job, batch, tokens, card)
    return max(parts["bandwidth"], parts["compute"]) + parts["launches"]


def has_room(job: Mapping[str, float], batch: int, card: Card) -> bool:
    return job["weights"] + batch * job["stored"] <= card["memory"]


def fastest_reference(
    job: Mapping[str, float], batch: int, tokens: int, cards: Mapping[str, Card]
) -> tuple[str | None, str]:
    seconds = {name: card_seconds(job, batch, tokens, each) for name, each in cards.items()}
    ordered = sorted(seconds, key=lambda name: seconds[name])
    winner = next((name for name in ordered if has_room(job, batch, cards[name])), None)
    if winner is None or winner != ordered[0]:
        return winner, "capacity"
    parts = card_parts(job, batch, tokens, cards[winner])
    return winner, max(parts, key=lambda name: parts[name])


def flip_reference(job: Mapping[str, float], tokens: int, a: Card, b: Card, most: int) -> int | None:
    first = None
    for batch in range(1, most + 1):
        winner, _ = fastest_reference(job, batch, tokens, {"a": a, "b": b})
        if winner is None:
            return None
        first = first or winner
        if winner != first:
            return batch
    return None


def drawn_job(t: CheckContext) -> dict[str, float]:
    weights = t.integer(4, 9) * 10**9
    return {
        "weights": weights,
        "stored": t.integer(200, 300) * 10**6,
        "read": t.integer(60, 150) * 10**6,
        "flops": float(weights),
        "kernels": t.integer(80, 120),
    }


def drawn_card(t: CheckContext, memory: float, bandwidth: float, flops: float, launch: float) -> Card:
    """A card with these numbers, each changed a little."""
    numbers = {"memory": memory, "bandwidth": bandwidth, "flops": flops, "launch": launch}
    return {name: n * (1 + 0.01 * t.integer(-5, 5)) for name, n in numbers.items()}


def same_fastest(
    t: CheckContext,
    fastest: Answer,
    job: Mapping[str, float],
    batch: int,
    tokens: int,
    cards: Mapping[str, Card],
) -> None:
    names = list(cards)
    t.random.shuffle(names)
    cards = {name: dict(cards[name]) for name in names}
    got = t.parts(fastest(dict(job), batch, tokens, cards), 2, "a pair (name, why)")
    want = fastest_reference(job, batch, tokens, cards)
    t.text(got[0], want[0], "the fastest:")
    t.text(got[1], want[1], "why:")


def four_cards(t: CheckContext) -> dict[str, Card]:
    """The widest memory bus, the most arithmetic, the quickest launches, and one that is second in all."""
    return {
        "wide": drawn_card(t, 96e9, 3e12, 2e14, 9e-6),
        "strong": drawn_card(t, 90e9, 9e11, 9e14, 8e-6),
        "quick": drawn_card(t, 24e9, 6e11, 1e14, 2e-6),
        "middling": drawn_card(t, 48e9, 8e11, 1.2e14, 6e-6),
    }


@card.requirement(1, "decoding", rounds=3)
def card_decode(t: CheckContext, fastest: Answer, flip: Answer) -> None:
    """weights once and each sequence's cache, by bandwidth; the widest bus wins"""
    same_fastest(t, fastest, drawn_job(t), t.integer(8, 30), 1, four_cards(t))


@card.requirement(1, "a prompt", rounds=3)
def card_prompt(t: CheckContext, fastest: Answer, flip: Answer) -> None:
    """FLOPs for `tokens` of each sequence, bytes as in decoding; arithmetic decides"""
    same_fastest(t, fastest, drawn_job(t), t.integer(2, 5), t.integer(1500, 3000), four_cards(t))


@card.requirement(1, "a small model", rounds=3)
def card_small(t: CheckContext, fastest: Answer, flip: Answer) -> None:
    """launches come on top of the larger of the two other times; so many of them decide"""
    job = drawn_job(t)
    job |= {"weights": 2e8, "flops": 2e8, "stored": 1e6, "read": 1e6, "kernels": t.integer(600, 900)}
    same_fastest(t, fastest, job, t.integer(1, 3), 1, four_cards(t))


@card.requirement(2, "cards without room", rounds=4)
def card_room(t: CheckContext, fastest: Answer, flip: Answer) -> None:
    """only cards that hold the weights and every sequence's stored bytes; "capacity" if one without room
    would have been faster, and (None, "capacity") if none has room"""
    cards, job = four_cards(t), drawn_job(t)
    batch = t.integer(150, 200)
    job["stored"] = job["read"] + 1.5e8
    job["flops"] *= 0.1  # bandwidth decides on every card
    if t.round in (0, 3):  # the wide card has no room
        cards["wide"]["memory"] = job["weights"] + (batch - 1) * job["stored"]
        cards["strong"]["memory"] = job["weights"] + batch * job["stored"]  # exactly enough
    elif t.round == 1:
        batch = 2000
    else:  # cards without room that are slower do not matter
        cards["wide"]["memory"] = job["weights"] + batch * job["stored"] + 1e6
    same_fastest(t, fastest, job, batch, 1, cards)


@card.requirement(2, "flip", rounds=5)
def card_flip(t: CheckContext, fastest: Answer, flip: Answer) -> None:
    """the first batch at which the other card is faster: more arithmetic, or more room; None if there is
    none up to and including `most`, or neither has room before"""
    job, tokens, most = drawn_job(t), 1, 900
    a = drawn_card(t, 80e9, 3e12, 1.5e14, 2e-6)
    b = drawn_card(t, 80e9, 1e12, 9e14, 9e-6)
    if t.round == 1:  # the faster one is too small from some batch on
        a["memory"] = job["weights"] + t.integer(9, 40) * job["stored"] + 1e6
    elif t.round == 3:  # neither has room, long before the order changes
        a["memory"] = b["memory"] = job["weights"] + t.integer(9, 20) * job["stored"]
        b["bandwidth"] = 5e11
    else:  # more arithmetic
        tokens = t.integer(2, 4)
        job |= {"read": 4e6, "stored": 12e6, "kernels": t.integer(250, 350)}
    want = flip_reference(job, tokens, a, b, most)
    if t.round == 2 and want is not None:
        most, want = want - 1, None
    if t.round == 4 and want is not None:
        most = want
    pair = (a, b) if t.round % 2 else (b, a)
    got = flip(dict(job), tokens, *pair, most)
    if want is None:
        t.text(got, None, "the batch:")
    else:
        t.number(got, want, "the batch:")


# 12.4: users and their price, in whole users and exact bytes

serve = Exercise(
    id="12.4",
    slug="users",
    title="Users per GPU",
    answers=("to_bytes", "users", "price"),
    hints=(
        "A GPU of 80 GB and a cache of 4 GiB per user: how many bytes is each of them? Do it on paper before "
        "you divide.",
        "`to_bytes`: split the text at the blank. The unit has an i or has none; the letter before it says "
        "which power of 1024 or of 1000.",
        "Memory: what is left after weights and workspace, divided by what one user stores, rounded down, at "
        "least 0. Latency: a step reads the weights once and every user's cache; solve for the users.",
        "(weights + n · read) / bandwidth ≤ limit gives n ≤ (limit · bandwidth − weights) / read. The "
        "smaller of the two numbers is the answer, and says what bounds it.",
        "One step takes (weights + n · read) / bandwidth seconds, costs a 3600th of the hourly price for "
        "each second, and makes n tokens. Without users no token is made: math.inf.",
    ),
)

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def bytes_reference(quantity: Any) -> float:
    if not isinstance(quantity, str):
        return float(quantity)
    amount, unit = quantity.split()
    return float(amount) * UNITS[unit]


def users_reference(gpu: Config, model: Config, limit: float | None) -> tuple[int, str, float]:
    """Users, what bounds them, and the seconds of a step with them."""
    weights, workspace, stored, read = (
        bytes_reference(model[name]) for name in ("weights", "workspace", "stored", "read")
    )
    capacity, bandwidth = bytes_reference(gpu["capacity"]), bytes_reference(gpu["bandwidth"])
    n, bound = 0, "memory"
    while weights + workspace + (n + 1) * stored <= capacity:
        if limit is not None and (weights + (n + 1) * read) / bandwidth > limit:
            bound = "latency"
            break
        n += 1
    return n, bound, (weights + n * read) / bandwidth


def drawn_service(t: CheckContext) -> tuple[Config, Config]:
    """A GPU and a model; more than half of one user's cache is left over, and less than all of it."""
    while True:
        gpu = {
            "capacity": t.pick("80 GB", "141 GB", "48 GB"),
            "bandwidth": f"{t.integer(9, 40) / 10} TB",
            "dollars_per_hour": t.integer(8, 40) / 10,
        }
        stored = t.integer(300, 900)
        model = {
            "weights": f"{t.integer(140, 170) / 10} GB",
            "workspace": f"{t.integer(10, 30) / 10} GiB",  # more than one user stores
            "stored": f"{stored} MiB",
            "read": f"{t.integer(stored // 3, stored // 2)} MiB",
        }
        left = bytes_reference(gpu["capacity"]) - sum(
            bytes_reference(model[name]) for name in ("weights", "workspace")
        )
        if 0.55 < left / bytes_reference(model["stored"]) % 1 < 0.95:  # rounding is seen
            return gpu, model


def limit_for(gpu: Config, model: Config, n: int) -> float:
    """Seconds in which n users and a half get a token each."""
    nbytes = bytes_reference(model["weights"]) + (n + 0.5) * bytes_reference(model["read"])
    return nbytes / bytes_reference(gpu["bandwidth"])


def same_users(t: CheckContext, users: Answer, gpu: Config, model: Config, *limit: float) -> None:
    n, bound, _ = users_reference(gpu, model, *limit or (None,))
    got = t.parts(users(gpu, model, *limit), 2, "a pair (users, bound)")
    t.number(got[0], n, "users:")
    t.text(got[1], bound, "bound:")


@serve.requirement(1, "to_bytes", rounds=4)
def serve_bytes(t: CheckContext, to_bytes: Answer, users: Answer, price: Answer) -> None:
    """powers of 1000 for KB, MB, GB and TB, of 1024 for KiB, MiB, GiB and TiB; a number is bytes already"""
    for unit in t.pick(("KB", "GiB"), ("MB", "TiB"), ("GB", "KiB"), ("TB", "MiB")):
        amount = t.integer(11, 99) + (0.25 if t.round % 2 else 0)  # whole bytes in every unit
        about(t, to_bytes(f"{amount:g} {unit}"), amount * UNITS[unit], f"{unit}:", 1e-12)
    number = t.integer(10**6, 10**9)
    about(t, to_bytes(number), number, "a number:", 1e-12)
    about(t, to_bytes(f"{number % 997} B"), number % 997, "B:", 1e-12)


@serve.requirement(1, "users: by memory")
def serve_memory(t: CheckContext, to_bytes: Answer, users: Answer, price: Answer) -> None:
    """whole users beside the weights and the workspace; "memory" where no limit is given"""
    same_users(t, users, *drawn_service(t))


@serve.requirement(1, "users: exactly enough, and no room")
def serve_edges(t: CheckContext, to_bytes: Answer, users: Answer, price: Answer) -> None:
    """the last user may fill the memory to the last byte; 0 users where there is no room, never fewer"""
    gpu, model = drawn_service(t)
    whole = {name: int(bytes_reference(model[name])) for name in model}
    room = whole["weights"] + whole["workspace"] + t.integer(5, 20) * whole["stored"]
    if t.round == 1:
        room = whole["weights"] - t.integer(1, 20) * 10**9 // 2
    same_users(t, users, {**gpu, "capacity": room}, whole)


@serve.requirement(2, "users: by a limit on the time of a step", rounds=4)
def serve_latency(t: CheckContext, to_bytes: Answer, users: Answer, price: Answer) -> None:
    """the weights once, and `read` of each user, within the limit; the smaller number, and which one it is"""
    gpu, model = drawn_service(t)
    by_memory = users_reference(gpu, model, None)[0]
    n = t.integer(3, by_memory - 3) if t.round % 2 == 0 else by_memory + t.integer(2, 9)
    limit = limit_for(gpu, model, n)
    if t.round == 2:  # not even the weights can be read in time
        limit = 0.5 * bytes_reference(model["weights"]) / bytes_reference(gpu["bandwidth"])
    same_users(t, users, gpu, model, limit)


@serve.requirement(2, "price", rounds=4)
def serve_price(t: CheckContext, to_bytes: Answer, users: Answer, price: Answer) -> None:
    """dollars per million tokens with all users that fit and are served in time; math.inf without users"""
    gpu, model = drawn_service(t)
    by_memory = users_reference(gpu, model, None)[0]
    limit = (None, limit_for(gpu, model, by_memory // 2), None, 1e-9)[t.round]
    n, _, seconds = users_reference(gpu, model, limit)
    want = gpu["dollars_per_hour"] / 3600 * seconds / n * 1e6 if n else math.inf
    about(t, price(gpu, model, limit) if limit else price(gpu, model), want, "dollars:")


# 12.5: exponents from times whose law is known

fit = Exercise(
    id="12.5",
    slug="fit",
    title="Fit an exponent honestly",
    answers=("fit_power", "fit_offset", "conclude"),
    hints=(
        "Take t = 5 + n² and write down n = 1, 2, 4, …, 64 and the ratio of neighbouring times. What is the "
        "exponent between 1 and 2, what between 32 and 64? What would a straight line through all say?",
        "`fit_power`: x = log n, y = log t; slope = Σ (x − x̄)(y − ȳ) / Σ (x − x̄)². Its standard error comes "
        "from the residuals; two parameters were fitted.",
        "`fit_offset`, in pseudocode: for every p on a fine grid: the best c and a for this p, by least "
        "squares of the *relative* errors (divide the equation by t); keep the p with the smallest sum. If c "
        "comes out negative, set it to 0 and fit a alone. Refine the grid around the best p.",
        "`conclude`: for one p, each time gives two inequalities in c and a. For a given a, c must be at "
        "least max(t (1 − noise) − a nᵖ) and 0, and at most min(t (1 + noise) − a nᵖ).",
        "Try many values of a, between 0 and the smallest t (1 + noise) / nᵖ. The candidate is possible if "
        "for one of them the largest lower bound of c is no larger than the smallest upper one. Exactly one "
        "possible candidate is an answer; none or several are None.",
    ),
)

Times = tuple[list[int], list[float]]


def spread(first: int, last: int, points: int) -> list[int]:
    """Lengths from the first to the last, about evenly spaced in their logarithm."""
    step = (last / first) ** (1 / (points - 1))
    return [round(first * step**i) for i in range(points)]


def timed(r: random.Random, n: Sequence[int], c: float, a: float, p: float, noise: float) -> list[float]:
    """Times of c + a · nᵖ with relative errors of both signs, at most ``noise``."""
    signs = [(-1) ** i * noise * (0.6 + 0.4 * r.random()) for i in range(len(n))]
    r.shuffle(signs)
    return [(c + a * each**p) * (1 + error) for each, error in zip(n, signs, strict=True)]


def least_squares(n: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Slope of log t over log n, and its standard error, by the normal equations."""
    x, y = ([math.log(each) for each in values] for values in (n, times))
    N, sx, sy = len(x), math.fsum(x), math.fsum(y)
    sxx = math.fsum(a * a for a in x) - sx * sx / N
    sxy = math.fsum(a * b for a, b in zip(x, y, strict=True)) - sx * sy / N
    slope = sxy / sxx
    left = [b - sy / N - slope * (a - sx / N) for a, b in zip(x, y, strict=True)]
    return slope, math.sqrt(math.fsum(r * r for r in left) / (N - 2) / sxx)


def explains(n: Sequence[int], times: Sequence[float], p: float, noise: float) -> bool:
    """Whether some c ≥ 0 and a > 0 bring c + a · nᵖ within the noise of every time.

    The room that the times leave for c is a concave function of a, so its maximum is found by thirds.
    """
    rows = [(s * (1 - noise), s * (1 + noise), each**p) for s, each in zip(times, n, strict=True)]

    def room(a: float) -> float:
        most = min(high - a * x for _, high, x in rows)
        return most - max(0.0, *(low - a * x for low, _, x in rows))

    least, most = 0.0, min(high / x for _, high, x in rows)
    for _ in range(40):
        third = (most - least) / 3
        if room(least + third) < room(most - third):
            least += third
        else:
            most -= third
    return room((least + most) / 2) >= 0


@fit.requirement(1, "fit_power: the slope")
def fit_slope(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """of the least-squares line through log t over log n"""
    n = spread(t.integer(50, 200), t.integer(3000, 9000), t.integer(5, 9))
    times = timed(t.random, n, 0.0, 1e-5, t.pick(0.6, 1.0, 1.8), 0.15)
    got = t.parts(fit_power(n, times), 2, "a pair (p, error)")
    about(t, got[0], least_squares(n, times)[0], "p:", 1e-4)


@fit.requirement(1, "fit_power: its standard error")
def fit_error(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """the root of the residuals' mean square, over N − 2, divided by Σ (x − x̄)²"""
    n = spread(t.integer(50, 200), t.integer(3000, 9000), t.integer(4, 6))
    times = timed(t.random, n, 0.0, 1e-5, t.pick(0.6, 1.0, 1.8), 0.15)
    got = t.parts(fit_power(n, times), 2, "a pair (p, error)")
    about(t, got[1], least_squares(n, times)[1], "error:", 1e-3)


@fit.requirement(2, "fit_offset")
def fit_with_offset(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """times of c + a · nᵖ with errors of 0.2%: p within 0.03, c within 5%"""
    p, n = (1.0, 1.6, 2.0)[t.round], spread(t.integer(90, 130), t.integer(12_000, 16_000), 14)
    c = 10.0 ** -t.integer(2, 5)
    # The offset is as large as the rest at a length within the range.
    times = timed(t.random, n, c, c / (n[5] * 1.1) ** p, p, 0.002)
    got = t.parts(fit_offset(n, times), 3, "three numbers (c, a, p)")
    for value, want, wide, name in ((got[2], p, 0.03 / p, "p:"), (got[0], c, 0.05, "c:")):
        plain = plain_number(value)
        come = describe(value) if plain is None else f"{plain:.3g}"
        good = plain is not None and abs(plain - want) <= wide * want
        t.note(come, None if good else Difference(name, f"about {want:.3g}", come))


@fit.requirement(1, "fit_offset: nothing to add")
def fit_no_offset(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """times of a power alone, or of one minus a constant: c is never negative, p is still about right"""
    p, n = (1.0, 1.5, 2.0)[t.round], spread(t.integer(90, 130), t.integer(12_000, 16_000), 14)
    a = 10.0 ** -t.integer(4, 7)
    times = timed(t.random, n, -0.3 * a * n[0] ** p if t.round else 0.0, a, p, 0.002)
    got = t.parts(fit_offset(n, times), 3, "three numbers (c, a, p)")
    c, power = plain_number(got[0]), plain_number(got[2])
    if c is None or power is None:
        t.note(got, Difference("", "numbers (c, a, p)", describe(got)))
        raise Stop
    good = 0 <= c <= 0.05 * times[0]
    share = f"{c / times[0]:.2g} of the first time"
    t.note(share, None if good else Difference("c:", "about 0, and not less", share))
    good = abs(power - p) <= 0.1
    t.note(f"{power:.2f}", None if good else Difference("p:", f"about {p}", f"{power:.3f}"))


@lru_cache(maxsize=64)
def drawn_case(seed: int, round: int, kind: str) -> tuple[list[int], list[float], float, tuple[float, ...]]:
    """Times, the noise, and candidates that it clearly allows or rules out.

    Every candidate in a diagnosis is given the same case, and drawing it takes longer than answering it.
    """
    r = random.Random(f"{seed}/{round}/{kind}")
    noise, powers = 0.02, (1.0, 2.0)
    p = powers[round // 2 % 2]

    def lengths(first: int, last: int, points: int) -> list[int]:
        return spread(first + r.randint(-first // 10, first // 10), last, points)

    while True:
        offset = 0.0
        if kind == "plain":  # no constant at all
            n = lengths(100, r.randint(20_000, 30_000), r.randint(7, 10))
        elif kind == "wide":  # the exponent shows behind a constant
            n = lengths(100, r.randint(20_000, 30_000), r.randint(7, 10))
            offset = float(n[5]) ** p
        elif kind == "misleading":  # a plain slope comes nearest to the wrong one
            p, n = 2.0, lengths(110, r.randint(3000, 4000), r.randint(7, 9))
            offset = float(r.randint(2000, 2600)) ** 2
        elif kind == "short":  # one octave behind a constant: both laws are straight enough
            n = lengths(1000, r.randint(1900, 2100), r.randint(5, 8))
            offset = r.randint(3, 4) * 1500.0**p
        elif kind == "between":  # a power between the candidates
            p, n = 1.5, lengths(100, r.randint(20_000, 30_000), r.randint(7, 10))
        else:  # "below": linear only with a negative constant
            p, n = 1.0, lengths(100, r.randint(900, 1100), r.randint(7, 10))
            offset = -0.5 * n[0]
        unit = 10.0 ** -r.randint(5, 8)
        times = [unit * each for each in timed(r, n, offset, 1.0, p, 0.4 * noise)]
        # No candidate is close to the border between possible and not.
        if all(explains(n, times, q, 0.55 * noise) == explains(n, times, q, 1.6 * noise) for q in powers):
            return n, times, noise, powers[:: (1, -1)[round % 2]]


def same_conclusion(t: CheckContext, conclude: Answer, kind: str) -> None:
    n, times, noise, powers = drawn_case(t.seed, t.round, kind)
    possible = [power for power in powers if explains(n, times, power, noise)]
    want = possible[0] if len(possible) == 1 else None
    got = conclude(list(n), list(times), noise, powers)
    plain = None if got is None else plain_number(got)
    come = f"{plain:g}" if plain is not None else "None" if got is None else describe(got)
    good = want is None if got is None else plain == want
    t.note(come, None if good else Difference("", "None" if want is None else f"{want:g}", come))


@fit.requirement(1, "conclude: one candidate", rounds=4)
def fit_conclude(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """the only one for which some c ≥ 0 and a > 0 explain every time within the noise"""
    same_conclusion(t, conclude, ("wide", "misleading", "plain", "wide")[t.round])


@fit.requirement(1, "conclude: several", rounds=4)
def fit_several(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """None where the range is too short to tell them apart"""
    same_conclusion(t, conclude, "short")


@fit.requirement(1, "conclude: none", rounds=4)
def fit_none(t: CheckContext, fit_power: Answer, fit_offset: Answer, conclude: Answer) -> None:
    """None where no candidate explains the times; a negative constant explains nothing"""
    same_conclusion(t, conclude, ("between", "below")[t.round % 2])


# 12.6: benchmarks on a device whose true times are known

bench = Exercise(
    id="12.6",
    slug="bench",
    title="What is wrong in this benchmark?",
    answers=("faults", "measure", "ratio"),
    hints=(
        "Go through one benchmark line by line and note, for each line, what the host's clock shows and what "
        "the device is doing. Which of the lines return before the device is done?",
        "Ask nine questions of each benchmark: is the clock read when the device is idle, before and after? "
        "Does anything else happen in between? Is the first call of this length in it? Where are the data "
        "when the kernel starts? Are both sides measured at the same length, and at the same time? Which "
        "single number stands for all runs?",
        "The table above gives each benchmark's result beside the truth. A factor far above 100 is a "
        "compiler; a factor below one is something that did not have to be waited for, or read.",
        "`measure`, in pseudocode: run once and wait; then 21 times: flush, wait, read the clock, run, wait, "
        "read the clock; the median of the differences.",
        "`ratio`: the same with both kernels inside the loop, so that each pair is measured on a device of "
        "the same temperature; then the median of the 21 ratios.",
    ),
)

FAULTS = {
    "a": "unequal lengths",
    "b": "mean",
    "c": "queued work",
    "d": "right",
    "e": "asynchronous",
    "f": "set-up timed",
    "g": "one after the other",
    "h": "first call",
    "i": "warm cache",
}


@cache
def device_class() -> Any:
    """The device of the notebook, which counts what it is asked to run."""
    (Device,) = mistakes.run(mistakes.compiled("", "<given>"), bench.set_up, {}, ("Device",))

    class Counting(Device):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.asked: list[tuple[str, int]] = []

        def run(self, kernel: str, length: int) -> None:
            self.asked.append((kernel, length))
            if len(self.asked) > 2000:
                raise RuntimeError("more than 2000 runs: the device is needed elsewhere")
            super().run(kernel, length)

    Counting.__name__ = "Device"  # what a failed check shows
    return Counting


def drawn_kernels(t: CheckContext) -> dict[str, Callable[[int], float]]:
    """Two kernels, seconds by length; the slower one takes 1.5 to 4 times as long."""
    base, factor = t.integer(20, 40) * 1e-8, t.integer(15, 40) / 10
    return {"linear": lambda length: base * length, "square": lambda length: factor * base * length}


def true_seconds(device: Any, kernel: str, length: int) -> float:
    """From the launch to the end, on an idle device, data not in the cache."""
    return device._kernels[kernel](length) + device.LAUNCH


def same_time(t: CheckContext, measure: Answer, **quirks: Any) -> None:
    device = device_class()(drawn_kernels(t), seed=t.integer(0, 10**6), **quirks)
    kernel, length = t.pick("linear", "square"), t.integer(3000, 9000)
    want = true_seconds(device, kernel, length)
    for _ in range(t.integer(2, 4)):  # somebody's work is still in the queue
        device.run("square", 4 * length)
    before = len(device.asked)
    got = measure(device, kernel, length)
    plain, asked = plain_number(got), device.asked[before:]
    wrong = next((each for each in asked if each != (kernel, length)), None)
    t.true(wrong is None, f"runs of {kernel!r} at length {length} alone", f"a run of {wrong}")
    t.true(len(asked) >= 3, "several runs", f"{len(asked)}")
    t.true(len(asked) <= 400, "at most 400 runs", f"{len(asked)}")
    factor = None if plain is None else plain / want
    good = factor is not None and abs(factor - 1) < 0.04
    come = describe(got) if factor is None else f"{factor:.2f} times the true seconds"
    seen = come if factor is None else f"{factor:.1f} times"
    t.note(seen, None if good else Difference("", "the true seconds, within 4%", come))


def named_faults(t: CheckContext, faults: Answer, letters: str) -> None:
    got = faults()
    if not isinstance(got, Mapping):
        t.note(got, Difference("", 'a dict, as {"a": "mean", …}', describe(got)))
        raise Stop
    for letter in letters:
        good = got.get(letter) == FAULTS[letter]
        come = repr(got.get(letter))[:60]
        # The right name is not shown: that is the exercise.
        t.note(come, None if good else Difference(f"bench_{letter}:", "another name", come))


@bench.requirement(1, "faults: a, b and c", rounds=1)
def bench_abc(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """the name of what is wrong with each"""
    named_faults(t, faults, "abc")


@bench.requirement(1, "faults: d, e and f", rounds=1)
def bench_def(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """the name of what is wrong with each"""
    named_faults(t, faults, "def")


@bench.requirement(1, "faults: g, h and i", rounds=1)
def bench_ghi(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """the name of what is wrong with each"""
    named_faults(t, faults, "ghi")


@bench.requirement(1, "measure: a device that compiles")
def bench_compiles(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """seconds of one call, launched on an idle device, until its end; the compiler's are not among them"""
    same_time(t, measure, cache=False, outliers=False)


@bench.requirement(1, "measure: a device with a cache")
def bench_cache(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """the data come from memory, not from the cache; emptying it is not counted"""
    same_time(t, measure, outliers=False)


@bench.requirement(1, "measure: a device that others use too")
def bench_outliers(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """some runs take eight times as long, and do not change the result"""
    same_time(t, measure)


@bench.requirement(2, "ratio: a device that gets warm")
def bench_ratio(t: CheckContext, faults: Answer, measure: Answer, ratio: Answer) -> None:
    """the time of a over that of b, at this length, while every run is slower than the one before"""
    seed = t.integer(0, 10**6)
    device = device_class()(drawn_kernels(t), seed=seed, outliers=False, heating=0.01)
    a, b = t.pick(("linear", "square"), ("square", "linear"))
    length = t.integer(3000, 9000)
    want = true_seconds(device, a, length) / true_seconds(device, b, length)
    plain = plain_number(got := ratio(device, a, b, length))
    wrong = next((each for each in device.asked if each not in ((a, length), (b, length))), None)
    t.true(wrong is None, f"runs at length {length} alone", f"a run of {wrong}")
    factor = None if plain is None else plain / want
    good = factor is not None and abs(factor - 1) < 0.05
    come = describe(got) if factor is None else f"{factor:.2f} times the true ratio"
    seen = come if factor is None else f"{factor:.1f} times"
    t.note(seen, None if good else Difference("", "the true ratio, within 5%", come))


# 12.7: a decoder of the learner's own, in a memory that is counted

MEMORY, CONTEXT, SEQUENCES = 2**30, 8192, 200
LONGEST = 2**20
LENGTHS = [512 * 2**i for i in range(8)]
BASE: Config = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "torch_dtype": "float32",
}


def build(config: Config) -> Decoder:
    """The decoder of a config: four layers of width 128, each full or with a window."""
    kinds = config.get("layer_types") or ["full_attention"] * 4
    return built(config["num_key_value_heads"], tuple(kinds), config.get("sliding_window"))


@lru_cache(maxsize=32)
def built(n_kv_heads: int, kinds: tuple[str, ...], window: int | None) -> Decoder:
    specs = {
        "full_attention": Spec("gqa", n_kv_heads=n_kv_heads),
        "sliding_attention": Spec("window", window=window or 1, n_kv_heads=n_kv_heads),
    }
    layers = [specs[kind] for kind in kinds]
    return Decoder(ModelConfig(vocab_size=256, d_model=128, n_layers=4, n_heads=8, layers=layers))


def cached_as(config: Config) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config["cache_dtype" if "cache_dtype" in config else "torch_dtype"])
    return dtype


def complete(choice: Config) -> Config:
    """The whole config of the learner's choice, its parameters counted."""
    config = {**BASE, **choice}
    table = config["vocab_size"] * config["hidden_size"]
    return {**config, "parameters": {"other": build(config).n_parameters - table}}


class Gpu:
    """A memory of so many bytes. The decoder's weights lie in it, and every cache that is alive.

    The caches are on torch's meta device: they have a size, and take no memory of this machine.
    """

    def __init__(self, config: Config, memory: int, context: int) -> None:
        self.decoder, self.memory, self.context = build(config), memory, context
        self.dtype = cached_as(config)
        self.used = sum(weight.nbytes for weight in self.decoder.parameters())

    def new_cache(self, batch: int) -> Any:
        """A cache for so many sequences; MemoryError where it has no room."""
        cache = self.decoder.new_cache(batch, self.context, self.dtype, "meta")
        nbytes = sum(t.nbytes for layer in cache.layers for t in layer.tensors())
        if self.used + nbytes > self.memory:
            raise MemoryError(f"{batch} sequences of {self.context} tokens do not fit")
        self.used += nbytes
        weakref.finalize(cache, self.free, nbytes)
        return cache

    def free(self, nbytes: int) -> None:
        self.used -= nbytes


class Board:
    """A GPU of the check: as ``Gpu``, without a decoder. ``tries`` counts the caches asked for."""

    def __init__(self, weights: int, one: int, memory: int) -> None:
        self.used, self.one, self.memory, self.tries = weights, one, memory, 0

    def new_cache(self, batch: int) -> "Block":
        self.tries += 1
        if self.tries > 500:
            raise RuntimeError("more than 500 tries")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        if self.used + batch * self.one > self.memory:
            raise MemoryError(f"{batch} sequences do not fit")
        return Block(self, batch * self.one)


class Block:
    def __init__(self, board: Board, nbytes: int) -> None:
        self.nbytes = nbytes
        board.used += nbytes
        weakref.finalize(self, Block.freed, board, nbytes)

    @staticmethod
    def freed(board: Board, nbytes: int) -> None:
        board.used -= nbytes


def library_step(config: Config, lengths: Sequence[int]) -> tuple[float, int]:
    return weights_reference(config, len(lengths)), cache_reference(config, lengths, stored=False)


def library_stored(config: Config, batch: int, max_len: int) -> tuple[int, int]:
    return int(weights_reference(config, None)), cache_reference(config, [max_len] * batch, stored=True)


def library_users(gpu: Config, model: Config, limit: float | None = None) -> tuple[int, str]:
    weights, workspace, stored, read = (
        bytes_reference(model[name]) for name in ("weights", "workspace", "stored", "read")
    )
    left = bytes_reference(gpu["capacity"]) - weights - workspace
    by_memory = max(0, int(left // stored))
    if limit is None:
        return by_memory, "memory"
    by_time = max(0, int((limit * bytes_reference(gpu["bandwidth"]) - weights) // read))
    return min(by_memory, by_time), "memory" if by_memory <= by_time else "latency"


def library_offset(n: Sequence[int], times: Sequence[float]) -> tuple[float, float, float]:
    """The best c, a and p: p on a grid that is refined, for each of them the least squares of c and a."""

    def solved(p: float) -> tuple[float, float, float]:
        u, v = [1 / s for s in times], [k**p / s for k, s in zip(n, times, strict=True)]
        uu, uv, vv, su, sv = (
            math.fsum(x)
            for x in (
                [x * x for x in u],
                [x * y for x, y in zip(u, v, strict=True)],
                [y * y for y in v],
                u,
                v,
            )
        )
        det = uu * vv - uv * uv
        c = (su * vv - sv * uv) / det
        c = max(c, 0.0)
        a = (sv - c * uv) / vv
        return math.fsum((c * x + a * y - 1) ** 2 for x, y in zip(u, v, strict=True)), c, a

    middle, width = 1.6, 1.4
    for _ in range(6):
        grid = [middle + width * i / 10 for i in range(-10, 11)]
        middle = min(grid, key=lambda p: solved(p)[0])
        width /= 6
    _, c, a = solved(middle)
    return c, a, middle


def library_measure(device: Any, kernel: str, length: int) -> float:
    device.run(kernel, length)
    seconds = []
    for _ in range(15):
        device.flush()
        device.synchronize()
        start = device.now()
        device.run(kernel, length)
        device.synchronize()
        seconds.append(device.now() - start)
    return sorted(seconds)[7]


class Machine:
    """This computer in the form of 12.6's device: a "step" decodes one token for four sequences."""

    def __init__(self, config: Config) -> None:
        self.decoder = build(config).eval().requires_grad_(False)
        self.caches: dict[int, Any] = {}
        self.spoiler = torch.zeros(8 * 2**20)  # larger than this machine's caches

    def now(self) -> float:
        return time.perf_counter()

    @torch.no_grad()
    def run(self, kernel: str, length: int) -> None:
        """Decode the token behind so many; the first time, the tokens before it are computed."""
        if length not in self.caches:
            self.caches[length] = self.decoder.new_cache(4, length + 400)
            self.decoder(torch.zeros(4, length, dtype=torch.long), self.caches[length])
        self.decoder(torch.zeros(4, 1, dtype=torch.long), self.caches[length])

    def flush(self) -> None:
        self.spoiler.add_(1.0)

    def synchronize(self) -> None:
        """A call returns when its work is done."""


@dataclass(frozen=True)
class Serving:
    """How the parts of this unit count a decoder: what ``compare`` shows."""

    parts: Mapping[str, tuple[str, Any]]

    @property
    def shown(self) -> list[Any]:
        return [build, built, cached_as, complete, Gpu]

    def compare(self, exercise: Exercise, notebook: Mapping[str, Any], n_new: int) -> workbench.Comparison:
        """kvlearn's decoder with full attention and the learner's, each predicted and measured in 1 GiB."""
        ours = dict(zip(exercise.answers, exercise.right, strict=True))
        given = [notebook.get(name) for name in exercise.answers]
        solved = judge(exercise, given, name=False).status == "passed"
        why = "" if solved else f"{exercise.id} does not have all its points yet"
        own = [workbench.Part(n, exercise.id, notebook.get(n), ours[n], why) for n in exercise.answers]
        parts = workbench.choose(exercise, notebook)
        answers, chosen = {part.name: part.chosen for part in own}, workbench.namespace(parts)
        columns = {
            "full attention in fp32, by kvlearn's": served({}, ours, workbench.library(self)),
            "your decoder, by your functions": served(answers["my_config"](), answers, chosen),
        }
        rows = [
            (what, *(numbers[what] for numbers, _ in columns.values()))
            for what in next(iter(columns.values()))[0]
        ]
        curves = {name: curve for name, (_, curve) in columns.items()}
        used = [(part, "yes" if part.is_theirs else "–") for part in (*own, *parts)]
        caption = "Two decoders in 1 GiB, predicted and measured"
        return Capacity(exercise.id, used, rows, {}, tuple(columns), caption, curves)


Curve = list[tuple[int, int, int]]


def served(choice: Config, answers: Mapping[str, Answer], parts: Any) -> tuple[dict[str, str], Curve]:
    """The serving numbers of one decoder: texts by name, and (context, predicted, measured)."""
    config = complete(choice)
    weights, one = parts.stored_bytes(config, 1, CONTEXT)
    curve = [
        (
            context,
            int(answers["largest_batch"](config, MEMORY, context, parts)),
            int(answers["measured_batch"](Gpu(config, MEMORY, context).new_cache)),
        )
        for context in (1024, 2048, 4096, 8192, 16384, 32768)
    ]
    _, predicted, measured = curve[3]
    longest = answers["longest_context"](config, MEMORY, 16, parts)
    board, fits = Gpu(config, MEMORY, max(1, longest)), "no"
    with contextlib.suppress(MemoryError):
        board.new_cache(16)
        fits = "yes"
    dtype = cached_as(config)
    allocated = build(config).new_cache(max(1, measured), CONTEXT, dtype).nbytes  # in real memory
    try:
        step = f"{1e3 * parts.measure(Machine(config), 'step', 1024):.1f}"
    except ValueError as error:  # more runs than its cache has room for
        step = f"{error}"
    numbers = {
        "bytes of the weights": f"{weights:,}",
        f"bytes per sequence of {CONTEXT:,} tokens": f"{one:,}",
        f"largest batch at {CONTEXT:,} tokens, predicted": f"{predicted:,}",
        f"largest batch at {CONTEXT:,} tokens, measured": f"{measured:,}",
        "bytes of that cache, allocated here": f"{allocated:,}",
        "longest context for 16 sequences, predicted": f"{longest:,}",
        "does that fit?": fits,
        "exponent of a step's bytes": f"{growth(config, parts):.2f}",
        "ms per step, 4 sequences of about 1,024 tokens, on this machine": step,
    }
    return numbers, curve


@dataclass(frozen=True, repr=False)
class Capacity(workbench.Comparison):
    """The picture shows the largest batch over the context."""

    curves: Mapping[str, Curve] = field(default_factory=dict)

    @cached_property
    def picture(self) -> Any:
        from kvlearn.plots.workbench import largest_batches  # matplotlib takes a second to import

        return largest_batches(self.curves)


SERVING = Serving(
    parts={
        "step_bytes": ("12.1", library_step),
        "stored_bytes": ("12.1", library_stored),
        "users": ("12.4", library_users),
        "fit_offset": ("12.5", library_offset),
        "measure": ("12.6", library_measure),
    }
)

model = Exercise(
    id="12.7",
    slug="model",
    title="Your model",
    answers=("my_config", "largest_batch", "longest_context", "measured_batch"),
    may_use_kvlearn=True,
    wiring=SERVING,
    hints=(
        "How many bytes may one sequence of 8,192 tokens have, if 200 of them and the weights fit in 1 GiB? "
        "How many has it with full attention in fp32, and which factors can you choose?",
        "`largest_batch`: what users of 12.4 asks for are weights, workspace and bytes per user; "
        "parts.stored_bytes of one sequence gives two of them. There is no limit on time.",
        "`longest_context`: with windows the bytes are no line, so do not divide. Bytes never fall as the "
        "context grows: search by halves between 0 and 2**20.",
        "`measured_batch`: by halves as well, between a batch that fits and one that does not. `try:` and "
        "`except MemoryError:` tell which of them the next one is. A cache that still has a name takes room "
        "away from the next one.",
    ),
)


def drawn_decoder(t: CheckContext) -> Config:
    """A config of the learner's kind, complete: windows in some layers in the second round."""
    choice: Config = {"num_key_value_heads": t.pick(1, 2, 4), "cache_dtype": t.pick("float32", "bfloat16")}
    if t.round == 1:
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
        choice |= {"layer_types": kinds, "sliding_window": 128}
    if t.round == 2:
        choice |= {"layer_types": 4 * ["sliding_attention"], "sliding_window": 256}
    return complete(choice)


def really_stored(config: Config, batch: int, context: int) -> int:
    """Bytes of the decoder's weights and of its caches, by the layers themselves."""
    decoder = build(config)
    dtype = cached_as(config)
    caches = sum(mixer.cache_bytes(context, batch=batch, dtype=dtype) for mixer in decoder.mixers)
    return sum(weight.nbytes for weight in decoder.parameters()) + caches


def same_batch(t: CheckContext, largest_batch: Answer, parts: Any) -> None:
    config, context = drawn_decoder(t), t.integer(1000, 3000)
    weights = really_stored(config, 1, context)
    one = really_stored(config, 2, context) - weights
    weights -= one
    n = t.integer(5, 40)
    memory = weights + n * one + (0 if t.round == 0 else one // 2)
    t.number(largest_batch(config, memory, context, parts), n, "sequences:")
    t.number(largest_batch(config, weights // 2, context, parts), 0, "too small for the weights:")


def same_context(t: CheckContext, longest_context: Answer, parts: Any) -> None:
    config, batch = drawn_decoder(t), t.integer(2, 9)
    want = t.integer(1500, 9000)
    memory = really_stored(config, batch, want)
    if t.round == 2:  # windows alone: no context is too long
        want, memory = LONGEST, really_stored(config, batch, 256)
    t.number(longest_context(config, memory, batch, parts), want, "tokens:")
    if t.round == 0:
        memory = really_stored(config, batch, 1) - 1
        t.number(longest_context(config, memory, batch, parts), 0, "no room for a token:")


def growth(config: Config, parts: Any) -> Any:
    """The exponent of the bytes that a step reads over the length, the weights apart."""
    read = [float(sum(parts.step_bytes(config, [length]))) for length in LENGTHS]
    return parts.fit_offset(LENGTHS, read)[2]


@model.requirement(1, "my_config", rounds=1)
def model_config(t: CheckContext, my_config: Answer, *others: Answer) -> None:
    """a decoder with at least one full layer, of which 200 sequences of 8,192 tokens fit in 1 GiB; only the
    four fields that you may choose"""
    choice = my_config()
    if not isinstance(choice, Mapping):
        t.note(choice, Difference("", "a dict", describe(choice)))
        raise Stop
    free = {"num_key_value_heads", "layer_types", "sliding_window", "cache_dtype"}
    unknown = sorted(map(str, set(choice) - free))
    kinds = choice.get("layer_types") or ["full_attention"] * 4
    complaint = ""
    if unknown:
        complaint = f"the field {unknown[0]}"
    elif choice.get("num_key_value_heads", 8) not in (1, 2, 4, 8):
        complaint = f"num_key_value_heads {choice['num_key_value_heads']!r}, which does not divide 8"
    elif choice.get("cache_dtype", "float32") not in ("float32", "bfloat16", "float16"):
        complaint = f"cache_dtype {choice['cache_dtype']!r}"
    elif len(kinds) != 4 or not set(kinds) <= {"full_attention", "sliding_attention"}:
        complaint = "layer_types that are not four of the two kinds"
    elif "full_attention" not in kinds:
        complaint = "no full layer"
    elif "sliding_attention" in kinds and not is_window(choice.get("sliding_window")):
        complaint = f"windows with sliding_window {choice.get('sliding_window')!r}"
    if not t.true(not complaint, "a decoder that is allowed", complaint):
        raise Stop
    stored = really_stored(complete(dict(choice)), SEQUENCES, CONTEXT)
    t.true(stored <= MEMORY, f"at most {MEMORY:,} bytes with 200 sequences", f"{stored:,}")


@model.requirement(1, "largest_batch")
def model_batch(t: CheckContext, my_config: Answer, largest_batch: Answer, *others: Answer) -> None:
    """as many sequences of `context` tokens as fit beside the weights, to the last byte; 0 if none does"""
    same_batch(t, largest_batch, workbench.library(SERVING))


@model.requirement(2, "longest_context")
def model_context(
    t: CheckContext, my_config: Answer, largest_batch: Answer, longest_context: Answer, *others: Answer
) -> None:
    """the most tokens for which `batch` sequences fit, with windows too; at most 2**20, 0 if none fits"""
    same_context(t, longest_context, workbench.library(SERVING))


@model.requirement(2, "measured_batch", rounds=4)
def model_measured(t: CheckContext, *answers: Answer) -> None:
    """the largest batch for which new_cache finds room, in at most 80 tries; 0 if there is room for none;
    what was allocated on the way is free again"""
    n, one = (t.integer(20, 90), 1, t.integer(10_000, 90_000), 0)[t.round], t.integer(1000, 2000)
    weights = t.integer(10**5, 10**6)
    board = Board(weights, one, weights + n * one + one // 2)
    t.number(answers[3](board.new_cache), n, "sequences:")
    t.true(board.tries <= 80, "at most 80 tries", "more than 80")
    t.true(board.used == weights, "no cache left allocated", "a cache is still held")


def is_window(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@model.requirement(1, "your stored_bytes and users", rounds=2, reads_answers=True)
def model_yours_counted(t: CheckContext, *answers: Answer) -> None:
    """12.1 and 12.4 are solved; with them the same batch and the same context"""
    parts = workbench.theirs(model, t.notebook, "stored_bytes", "users")
    same_batch(t, answers[1], parts)
    same_context(t, answers[2], parts)


@model.requirement(1, "all your parts, predicted and measured", rounds=1, reads_answers=True)
def model_yours_measured(t: CheckContext, *answers: Answer) -> None:
    """12.5 and 12.6 are solved too; for your own decoder in 1 GiB the predicted batch is the one measured"""
    parts = workbench.theirs(model, t.notebook, *SERVING.parts)
    config = complete(dict(answers[0]()))
    predicted = plain_number(answers[1](config, MEMORY, CONTEXT, parts))
    measured = answers[3](Gpu(config, MEMORY, CONTEXT).new_cache)
    t.true(predicted == plain_number(measured), "the same number", f"{predicted} and {measured}")
    full = complete({"num_key_value_heads": 2, "cache_dtype": "bfloat16"})
    power = plain_number(growth(full, parts))
    good = power is not None and abs(power - 1) < 0.02
    t.true(good, "1.00 as the exponent of a full decoder's bytes", f"{power}")


EXERCISES = (count, roof, card, serve, fit, bench, model)
