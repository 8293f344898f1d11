"""06.8: the bytes of recurrent states against keys and values, counted tensor by tensor."""

import math
from typing import Any

from kvlearn.grading.compare import describe, plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="06.8",
    slug="crossing",
    title="Where the state beats a KV cache",
    answers=("crossing",),
    hints=(
        "Count one layer first. What is a state takes 4 bytes a number, what is only the past of a "
        "convolution or of a token shift 2. Then multiply by the layers that have a state.",
        "A convolution of width W needs W − 1 tokens of the past; the newest comes with the step. Mamba "
        "convolves its expand · d_model channels, gated delta the queries, keys and values together: "
        "key_heads · key_dim twice, and value_heads · value_dim.",
        "A gated delta layer has a matrix (key_dim, value_dim) for every *value* head: two of them share a "
        "key head, each remembers for itself. RWKV-7 has d_model / head_dim heads, each with a square "
        "matrix, and keeps the token before twice, once in each half of the layer.",
        "Of a hybrid's `layers`, layers // full_every are full. They hold keys and values on both sides, so "
        "they count on neither. And `tokens`: the first n with n · per_token > state is state // per_token "
        "+ 1, for at state / per_token tokens the two are equal.",
    ),
)

Config = dict[str, Any]
Sizes = dict[str, int]
STATE, OTHER = 4, 2  # bytes of a number

# state-spaces/mamba: mamba_ssm/models/config_mamba.py and modules/mamba_simple.py, whose defaults are 2.8B's.
MAMBA = {"kind": "mamba", "layers": 64, "d_model": 2560, "expand": 2, "d_state": 16, "conv_width": 4}
# EleutherAI/pythia: models/2.8B/pythia-2.8b.yml.
PYTHIA = {"layers": 32, "query_heads": 32, "kv_heads": 32, "head_dim": 80}
# BlinkDL/RWKV-LM: README.md (3B: n_layer 32, n_embd 2560), RWKV-v7/rwkv_v7_demo_rnn.py (what it keeps).
RWKV = {"kind": "rwkv7", "layers": 32, "d_model": 2560, "head_dim": 64}
# config.json of Qwen/Qwen2.5-3B, as public repositories quote it.
QWEN_2_5 = {"layers": 36, "query_heads": 16, "kv_heads": 2, "head_dim": 128}
# huggingface/transformers: models/qwen3_next/configuration_qwen3_next.py, whose defaults are 80B-A3B's.
QWEN_3_NEXT = {
    "kind": "gated_delta",
    "layers": 48,
    "full_every": 4,
    "key_heads": 16,
    "value_heads": 32,
    "key_dim": 128,
    "value_dim": 128,
    "conv_width": 4,
}
ALL_FULL = {"layers": 48, "query_heads": 16, "kv_heads": 2, "head_dim": 256}
REAL = ((MAMBA, PYTHIA), (RWKV, QWEN_2_5), (QWEN_3_NEXT, ALL_FULL))


def kept(model: Config) -> list[tuple[int, tuple[int, ...]]]:
    """What one layer keeps: for each tensor the bytes of a number, and the shape."""
    if model["kind"] == "mamba":
        channels = model["expand"] * model["d_model"]
        return [(STATE, (channels, model["d_state"])), (OTHER, (model["conv_width"] - 1, channels))]
    if model["kind"] == "rwkv7":
        width, head_dim = model["d_model"], model["head_dim"]
        return [(STATE, (width // head_dim, head_dim, head_dim)), (OTHER, (width,)), (OTHER, (width,))]
    past, K, V = model["conv_width"] - 1, model["key_dim"], model["value_dim"]
    query = key = (OTHER, (past, model["key_heads"], K))
    return [(STATE, (model["value_heads"], K, V)), query, key, (OTHER, (past, model["value_heads"], V))]


def count(model: Config, attention: Config) -> Sizes:
    every = model.get("full_every")
    full = [every is not None and (i + 1) % every == 0 for i in range(model["layers"])]
    state = sum(size * math.prod(shape) for size, shape in kept(model)) * full.count(False)
    per_token = sum(
        OTHER * attention["kv_heads"] * attention["head_dim"]
        for _ in range(attention["layers"] - full.count(True))
        for _ in ("key", "value")
    )
    return {"state": state, "per_token": per_token, "tokens": state // per_token + 1}


def draw(t: Trial, kind: str) -> Config:
    """A model of this kind, without full layers."""
    layers = t.integer(20, 60)
    if kind == "mamba":
        shape = {"d_model": 64 * t.integer(8, 40), "expand": t.pick(2, 3), "d_state": t.pick(8, 16, 24)}
        return {"kind": kind, "layers": layers, **shape, "conv_width": t.pick(3, 4, 5)}
    if kind == "rwkv7":
        head_dim = t.pick(48, 64, 96)
        return {"kind": kind, "layers": layers, "d_model": head_dim * t.integer(8, 40), "head_dim": head_dim}
    key_heads = t.pick(3, 6, 8)
    heads = {"key_heads": key_heads, "value_heads": key_heads * t.pick(2, 3, 4)}
    dims = {"key_dim": t.pick(64, 96), "value_dim": t.pick(80, 128)}
    return {"kind": kind, "layers": layers, **heads, **dims, "conv_width": t.pick(3, 4, 5)}


def draw_attention(t: Trial, layers: int | None = None) -> Config:
    kv_heads = t.pick(2, 3, 4)
    heads = {"query_heads": kv_heads * t.pick(3, 5, 8), "kv_heads": kv_heads, "head_dim": t.pick(64, 80, 128)}
    return {"layers": t.integer(61, 80) if layers is None else layers, **heads}


def ask(t: Trial, crossing: Answer, model: Config, attention: Config, *names: str) -> Config:
    """What came, if it is a dict with these keys; else the end of this round."""
    got = crossing(model, attention)
    for name in names:
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
    return got


def same(t: Trial, crossing: Answer, model: Config, attention: Config, *names: str) -> None:
    got, want = ask(t, crossing, model, attention, *names), count(model, attention)
    for name in names:
        t.number(got[name], want[name], f"{model['kind']}, {name}:")


@EXERCISE.requirement(1, "keys and values of a token")
def per_token(t: Trial, crossing: Answer) -> None:
    """per_token, where no layer of the model is full: 2 bytes for each number of a key and of a value, at
    every KV head, in every layer of the attention model"""
    same(t, crossing, draw(t, "mamba"), draw_attention(t), "per_token")
    same(t, crossing, draw(t, "rwkv7"), draw_attention(t), "per_token")


@EXERCISE.requirement(1, "the state of Mamba")
def mamba(t: Trial, crossing: Answer) -> None:
    """state: d_state numbers of 4 bytes for each of the expand · d_model channels, and conv_width − 1 tokens
    of the past with 2 bytes for each, in every layer"""
    same(t, crossing, draw(t, "mamba"), draw_attention(t), "state")


@EXERCISE.requirement(1, "the state of RWKV-7")
def rwkv(t: Trial, crossing: Answer) -> None:
    """state: a square matrix of head_dim in 4 bytes for each of the d_model / head_dim heads, and two shifted
    tokens of d_model in 2 bytes, in every layer"""
    same(t, crossing, draw(t, "rwkv7"), draw_attention(t), "state")


@EXERCISE.requirement(1, "the state of gated delta")
def gated_delta(t: Trial, crossing: Answer) -> None:
    """state: a matrix (key_dim, value_dim) in 4 bytes for each value head, and conv_width − 1 tokens of
    queries, keys and values in 2 bytes, in every layer"""
    same(t, crossing, draw(t, "gated_delta"), draw_attention(t), "state")


@EXERCISE.requirement(1, "a hybrid")
def hybrid(t: Trial, crossing: Answer) -> None:
    """every full_every-th of `layers` is full: state counts the other layers, and per_token what these would
    hold, were they full; measured by your own count for a model without full layers"""
    every = t.integer(3, 6)
    layers = every * t.integer(6, 10) - 1  # where rounding to the nearest is rounding up
    recurrent = sum((i + 1) % every != 0 for i in range(layers))
    model = draw(t, "mamba" if t.round == 1 else "gated_delta") | {"layers": layers}
    attention = draw_attention(t, layers)
    names = ("state", "per_token")
    whole = numbers(t, crossing, model, attention, *names)
    got = ask(t, crossing, model | {"full_every": every}, attention, *names)
    for name, own in zip(names, whole, strict=True):
        share = own * recurrent / layers
        t.number(got[name], int(share) if share == int(share) else share, f"{name}:")


def numbers(t: Trial, crossing: Answer, model: Config, attention: Config, *names: str) -> list[float]:
    """The numbers under these names, above 0; else the end of this round."""
    got = ask(t, crossing, model, attention, *names)
    plain = [plain_number(got[name]) for name in names]
    if any(number is None or not 0 < number < math.inf for number in plain):
        t.true(False, f"{' and '.join(names)}, numbers above 0", ", ".join(describe(got[n]) for n in names))
        raise Stop
    return [number for number in plain if number is not None]


@EXERCISE.requirement(1, "the first token that pays")
def tokens(t: Trial, crossing: Answer) -> None:
    """tokens, by your own state and per_token: the first number of tokens whose keys and values take *more*
    bytes than the state"""
    even = (MAMBA, PYTHIA | {"kv_heads": t.pick(4, 8, 16), "query_heads": 32})
    odd = {"kind": "rwkv7", "layers": 32, "d_model": 64 * t.pick(7, 11, 13), "head_dim": 64}
    uneven = [(odd, QWEN_2_5 | {"layers": layers}) for layers in range(20, 90)]
    below_half = [
        pair for pair in uneven if 0.1 < count(*pair)["state"] / count(*pair)["per_token"] % 1 < 0.4
    ]
    for model, attention in (even, t.pick(*below_half)):
        state, one = numbers(t, crossing, model, attention, "state", "per_token")
        got = ask(t, crossing, model, attention, "tokens")
        t.number(got["tokens"], int(state // one) + 1, f"state {state:,}, per_token {one:,}, tokens:")


@EXERCISE.requirement(1, "three real models")
def real(t: Trial, crossing: Answer) -> None:
    """Mamba-2.8B against Pythia-2.8B, RWKV-7 2.9B against Qwen2.5 3B, and Qwen3-Next against itself with full
    attention in every layer"""
    same(t, crossing, *REAL[t.round % 3], "state", "per_token", "tokens")
