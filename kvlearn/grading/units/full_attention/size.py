"""01.8: bytes of the cache of a real model, held against the models' published shapes and a bare count."""

from typing import Any

from kvlearn.grading.compare import describe
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
    """bytes allocated for max_len tokens in every sequence of the batch"""
    config, max_len, lengths = draw(t, MULTI_HEAD)
    want = count(config) * max_len * len(lengths)
    t.number(field(t, cache_size(config, max_len, lengths), "stored"), want, "stored")


@EXERCISE.requirement(1, "read by one decode step")
def read(t: Trial, cache_size: Answer) -> None:
    """bytes of the tokens that are in the cache, sequence by sequence"""
    config, max_len, lengths = draw(t, MULTI_HEAD)
    t.number(field(t, cache_size(config, max_len, lengths), "read"), count(config) * sum(lengths), "read")


@EXERCISE.requirement(1, "stored, in GiB")
def gib(t: Trial, cache_size: Answer) -> None:
    """stored in units of 2³⁰ bytes"""
    config, max_len, lengths = draw(t, MULTI_HEAD)
    want = count(config) * max_len * len(lengths) / 2**30
    t.number(field(t, cache_size(config, max_len, lengths), "stored_gib"), want, "stored_gib")


def sizes(config: Config, max_len: int, lengths: list[int], per_token: int | None = None) -> Config:
    per_token = count(config) if per_token is None else per_token
    stored = per_token * max_len * len(lengths)
    return {
        "bytes_per_token": per_token,
        "stored": stored,
        "read": per_token * sum(lengths),
        "stored_gib": stored / 2**30,
    }


@EXERCISE.misconception("query heads in place of KV heads")
def query_heads(config: Config, max_len: int, lengths: list[int]) -> Config:
    """num_attention_heads counts the queries, which are used and forgotten. What stays are keys and
    values, and of those there are num_key_value_heads: for Llama 3.1 405B 8 and not 128, so this is 16
    times too much."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    return sizes(
        config, max_len, lengths, count({**config, "num_key_value_heads": heads, "head_dim": head_dim})
    )


@EXERCISE.misconception("keys only")
def keys_only(config: Config, max_len: int, lengths: list[int]) -> Config:
    """A factor of 2 is missing: the cache holds a key *and* a value for each head of each token."""
    return sizes(config, max_len, lengths, count(config) // 2)


@EXERCISE.misconception("one layer only")
def one_layer(config: Config, max_len: int, lengths: list[int]) -> Config:
    """The layers are missing. Every layer has keys and values of its own, computed from its own input."""
    return sizes(config, max_len, lengths, count({**config, "num_hidden_layers": 1}))


@EXERCISE.misconception("bits for bytes")
def bits(config: Config, max_len: int, lengths: list[int]) -> Config:
    """bfloat16 has 16 bits, and that is 2 bytes. All sizes are 8 times too large."""
    return sizes(config, max_len, lengths, count(config) * 8)


@EXERCISE.misconception("two bytes a number, whatever the dtype")
def two_bytes(config: Config, max_len: int, lengths: list[int]) -> Config:
    """torch_dtype is not looked at. float32 takes 4 bytes a number and the 8-bit floats take 1; storing
    the cache in 8 bits is one of the cheapest ways to halve it."""
    return sizes(config, max_len, lengths, count({**config, "torch_dtype": "bfloat16"}))


@EXERCISE.misconception("the batch forgotten")
def one_sequence(config: Config, max_len: int, lengths: list[int]) -> Config:
    """The cache is counted for a single sequence. The weights are shared by a batch and the cache is not:
    each of the len(lengths) sequences keeps its own."""
    one = sizes(config, max_len, lengths[:1])
    return {**one, "read": count(config) * sum(lengths)}


@EXERCISE.misconception("GB called GiB")
def gb(config: Config, max_len: int, lengths: list[int]) -> Config:
    """stored_gib was divided by 10⁹. That is GB; a GiB is 2³⁰ bytes, 7% more. GPU memory is sold and
    measured in GiB, so the two must not be mixed."""
    right = sizes(config, max_len, lengths)
    return {**right, "stored_gib": right["stored"] / 10**9}


@EXERCISE.misconception("read taken for stored")
def read_is_stored(config: Config, max_len: int, lengths: list[int]) -> Config:
    """What a step reads was set to what is allocated. A decode step reads the keys and values that are there,
    sum(lengths) tokens; the empty slots behind them are reserved and not touched."""
    right = sizes(config, max_len, lengths)
    return {**right, "read": right["stored"]}


@EXERCISE.misconception("every sequence as long as the longest")
def padded(config: Config, max_len: int, lengths: list[int]) -> Config:
    """What a step reads was counted as the longest sequence times the batch. That is what a padded batch
    costs; a decode step over a cache that knows its lengths reads each sequence's own tokens,
    sum(lengths) in all."""
    return {**sizes(config, max_len, lengths), "read": count(config) * max(lengths) * len(lengths)}


@EXERCISE.misconception("head_dim not looked up")
def no_head_dim(config: Config, max_len: int, lengths: list[int]) -> Config:
    """The head dim was always taken as hidden_size / num_attention_heads. Some models, Gemma and Qwen3 among
    them, choose it freely and say so in head_dim."""
    return sizes(config, max_len, lengths, count({k: v for k, v in config.items() if k != "head_dim"}))
