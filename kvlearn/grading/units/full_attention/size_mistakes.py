"""01.8: the mistakes that people make when they count a cache."""

from kvlearn.grading.units.full_attention.size import EXERCISE, Config, count

__all__ = ["EXERCISE"]


def sizes(config: Config, max_len: int, lengths: list[int], each: int | None = None) -> Config:
    each = count(config) if each is None else each
    stored = each * max_len * len(lengths)
    return {
        "bytes_per_token": each,
        "stored": stored,
        "read": each * sum(lengths),
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


@EXERCISE.misconception("hidden_size in place of KV heads times head_dim")
def whole_width(config: Config, max_len: int, lengths: list[int]) -> Config:
    """The cache is counted with query heads in place of KV heads: 2 · layers · hidden_size · bytes, or the
    same by a head_dim of hidden_size / num_key_value_heads. hidden_size is the width of all *query* heads;
    what stays is num_key_value_heads · head_dim, and head_dim is hidden_size / num_attention_heads."""
    width = {"num_key_value_heads": 1, "head_dim": config["hidden_size"]}
    return sizes(config, max_len, lengths, count({**config, **width}))


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


@EXERCISE.misconception("stored counts the tokens that are there")
def only_filled(config: Config, max_len: int, lengths: list[int]) -> Config:
    """Stored was counted as sum(lengths) tokens. This cache is allocated once for max_len tokens a sequence,
    and the empty slots take memory too; sum(lengths) is what a step *reads*."""
    right = sizes(config, max_len, lengths)
    return {**right, "stored": right["read"], "stored_gib": right["read"] / 2**30}


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
