"""01.8: bytes of the cache of a real model, held against the models' published shapes and a bare count."""

from typing import Any

from kvlearn.grading.compare import describe, plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="01.8",
    slug="size",
    title="The cache of a real model, in bytes",
    answers=("cache_size",),
    hints=(
        "Count what one token leaves behind: in every layer, for every *KV* head, one key and one value "
        "of head_dim numbers, each of so many bytes.",
        "bytes_per_token = 2 · layers · KV heads · head_dim · bytes a number. bfloat16 and float16 take "
        "2 bytes, float32 takes 4, the float8 formats take 1: `getattr(torch, name).itemsize` knows.",
        "Stored is what the cache allocates: max_len tokens for each of len(lengths) sequences. Read is "
        "what one decode step touches: the tokens that are there, sum(lengths).",
        '1 GiB is 2**30 bytes; 1 GB is 10**9. `config.get("num_key_value_heads", '
        'config["num_attention_heads"])` serves models old and new.',
    ),
)

Config = dict[str, Any]
BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "float16": 2}

# From the models' config.json.
MULTI_HEAD: list[Config] = [
    {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32},
    {"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40},
    {"num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32},
]
GROUPED: list[Config] = [
    {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "num_key_value_heads": 8},
    {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8},
    {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    {
        "num_hidden_layers": 34,
        "hidden_size": 2560,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
]


def count(config: Config) -> int:
    """Bytes that one token leaves behind, layer by layer and head by head."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    total = 0
    for _layer in range(config["num_hidden_layers"]):
        for _head in range(kv_heads):
            key = value = head_dim * BYTES[config["torch_dtype"]]
            total += key + value
    return total


def draw(t: Trial, models: list[Config]) -> tuple[Config, int, list[int]]:
    """A model, a context length and the lengths of a batch, as the answer gets them."""
    config = {**models[t.round % len(models)], "torch_dtype": list(BYTES)[t.round]}
    max_len = t.pick(2048, 8192, 32768, 131072)
    return config, max_len, [t.integer(1, max_len) for _ in range(t.integer(3, 7))]


def plain(t: Trial) -> tuple[Config, int, list[int]]:
    """The same with nothing to look up twice: bf16, and every field given."""
    config, max_len, lengths = draw(t, MULTI_HEAD)
    heads = config["num_attention_heads"]
    given = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
    return {**config, **given, "torch_dtype": "bfloat16"}, max_len, lengths


def per_token(config: Config, got: Any) -> float:
    """The answer's own bytes per token: a mistake in them, told above, shall not cost the other points
    too."""
    own = plain_number(got.get("bytes_per_token")) if isinstance(got, dict) else None
    return own if own is not None and own > 0 else count(config)


def field(t: Trial, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        t.true(
            False,
            f"a dict with the key {name!r}",
            f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got),
        )
        raise Stop
    return got[name]


@EXERCISE.requirement(1, "bytes per token, multi-head attention")
def multi_head(t: Trial, cache_size: Answer) -> None:
    """keys and values of all layers and heads, at the dtype's bytes; models like Llama 2 and Pythia"""
    config, max_len, lengths = draw(t, MULTI_HEAD)
    t.number(
        field(t, cache_size(config, max_len, lengths), "bytes_per_token"), count(config), "bytes_per_token"
    )


@EXERCISE.requirement(1, "bytes per token, grouped heads", rounds=4)
def grouped(t: Trial, cache_size: Answer) -> None:
    """the same where num_key_value_heads is smaller, or head_dim is given: Llama 3.1 405B and its like"""
    config, max_len, lengths = draw(t, GROUPED)
    t.number(
        field(t, cache_size(config, max_len, lengths), "bytes_per_token"), count(config), "bytes_per_token"
    )


@EXERCISE.requirement(1, "stored")
def stored(t: Trial, cache_size: Answer) -> None:
    """bytes_per_token for max_len tokens in every sequence of the batch"""
    config, max_len, lengths = plain(t)
    got = cache_size(config, max_len, lengths)
    t.number(field(t, got, "stored"), per_token(config, got) * max_len * len(lengths), "stored")


@EXERCISE.requirement(1, "read by one decode step")
def read(t: Trial, cache_size: Answer) -> None:
    """bytes_per_token for the tokens that are in the cache, sequence by sequence"""
    config, max_len, lengths = plain(t)
    got = cache_size(config, max_len, lengths)
    t.number(field(t, got, "read"), per_token(config, got) * sum(lengths), "read")


@EXERCISE.requirement(1, "stored, in GiB")
def gib(t: Trial, cache_size: Answer) -> None:
    """stored in units of 2³⁰ bytes"""
    config, max_len, lengths = plain(t)
    got = cache_size(config, max_len, lengths)
    want = per_token(config, got) * max_len * len(lengths) / 2**30
    t.number(field(t, got, "stored_gib"), want, "stored_gib")
