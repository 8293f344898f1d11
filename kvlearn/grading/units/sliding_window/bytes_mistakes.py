"""04.6: the mistakes that people make when they count the bytes of a cache with windows."""

from kvlearn.grading.units.sliding_window.bytes import (
    EXERCISE,
    FULL,
    WINDOW,
    Config,
    Sizes,
    count,
    sizes,
    tokens_kept,
)

__all__ = ["EXERCISE"]


def with_window(config: Config, change: int) -> Config:
    window = config["sliding_window"]
    return {**config, "sliding_window": None if window is None else window + change}


def always_window(config: Config, n_tokens: int) -> list[int]:
    """The window's whole width in the local layers, however few tokens there are."""
    huge = tokens_kept(config, 2**40)
    return [n_tokens if kept == 2**40 else kept for kept in huge]


@EXERCISE.misconception("read counted with all tokens, not min(length, W)")
def reads_all(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Every layer was said to read `length` tokens. A layer with a window has no more than W of them, and
    reads no more: min(length, W)."""
    every = [length] * config["num_hidden_layers"]
    return sizes(config, tokens_kept(config, max_len), every, max_len, batch)


@EXERCISE.misconception("stored counted with all tokens, not min(max_len, W)")
def stores_all(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Every layer was given room for max_len tokens. That is what a window costs which is only a mask: what
    it hides is still stored. With a ring a local layer needs W slots and no more."""
    every = [max_len] * config["num_hidden_layers"]
    return sizes(config, every, tokens_kept(config, length), max_len, batch)


@EXERCISE.misconception("the windows not looked at")
def no_windows(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """All layers were counted as full ones. Those with a window store and read W tokens at most, and that is
    what the window is for."""
    return count({**config, "sliding_window": None}, max_len, length, batch)


@EXERCISE.misconception("W tokens even where there are fewer")
def no_min(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """W tokens were counted in the local layers even for a shorter context. As long as it is shorter than the
    window, such a layer stores and reads what a full one would: min(…, W)."""
    stored, read = (always_window(config, n) for n in (max_len, length))
    return sizes(config, stored, read, max_len, batch)


@EXERCISE.misconception("W tokens read before there are so many")
def reads_window(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The ring was read as a whole, all min(max_len, W) slots of it. While only `length` tokens have come,
    the rest is empty and need not be fetched."""
    kept = tokens_kept(config, max_len)
    read = [min(slots, max(length, config["sliding_window"] or 0)) for slots in kept]
    return sizes(config, kept, read, max_len, batch)


@EXERCISE.misconception("read taken for what there is room for")
def reads_stored(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Read was set to stored. What is stored is room for max_len tokens, reserved at the start; a step
    fetches the tokens that are there, `length` of them."""
    kept = tokens_kept(config, max_len)
    return sizes(config, kept, kept, max_len, batch)


@EXERCISE.misconception("stored taken for what is there now")
def stores_length(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Stored was counted for `length` tokens. The cache is allocated once, for max_len of them."""
    kept = tokens_kept(config, length)
    return {
        **sizes(config, kept, kept, max_len, batch),
        "saving": count(config, length, length, batch)["saving"],
    }


@EXERCISE.misconception("W − 1 tokens in the ring")
def one_slot_less(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The local layers were given W − 1 slots. transformers keeps so many *between* steps, and adds the new
    token to them; a ring writes the new token first and holds all W that it may see."""
    return count(with_window(config, -1), max_len, length, batch)


@EXERCISE.misconception("W + 1 tokens in the ring")
def one_slot_more(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The local layers were given W + 1 slots, W old ones and the new one. W counts the token itself."""
    return count(with_window(config, 1), max_len, length, batch)


@EXERCISE.misconception("a window in every layer")
def all_local(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """layer_types was not looked at: the global layers were counted as if they had the window too. It is they
    that grow with the context, and soon they hold nearly all of the cache."""
    return count({**config, "layer_types": [WINDOW] * config["num_hidden_layers"]}, max_len, length, batch)


@EXERCISE.misconception("local and global the wrong way round")
def swapped(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The full_attention layers were given the window, and the sliding_attention layers everything."""
    if "layer_types" not in config:
        return count(config, max_len, length, batch)
    types = [WINDOW if kind == FULL else FULL for kind in config["layer_types"]]
    return count({**config, "layer_types": types}, max_len, length, batch)


@EXERCISE.misconception("no layer_types taken for no window")
def types_missing(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """A config without layer_types was counted as if all its layers were full. Mistral 7B v0.1 has none
    because all its layers are alike: sliding_window holds for each of them."""
    full = [FULL] * config["num_hidden_layers"]
    return count({"layer_types": full, **config}, max_len, length, batch)


@EXERCISE.misconception("query heads in place of KV heads")
def query_heads(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """num_attention_heads counts the queries, which are used and forgotten. What stays are the keys and
    values of num_key_value_heads. (The share saved comes out right: there the heads cancel.)"""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    return count({**config, "num_key_value_heads": heads, "head_dim": head_dim}, max_len, length, batch)


@EXERCISE.misconception("head_dim not looked up")
def no_head_dim(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The head dim was taken as hidden_size / num_attention_heads. A config may choose it freely and say so
    in head_dim: gpt-oss has 64 where the division gives 45, Gemma 3 27B 128 in place of 168."""
    without = {key: value for key, value in config.items() if key != "head_dim"}
    return count(without, max_len, length, batch)


def times(counted: Sizes, factor: float) -> Sizes:
    """All bytes so many times; the share saved stays."""
    return {name: size if name == "saving" else number(size, factor) for name, size in counted.items()}


def number(size: float, factor: float) -> float:
    return int(size * factor) if isinstance(size, int) else size * factor


@EXERCISE.misconception("half of it: keys only, or numbers for bytes")
def halved(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Every size is half of what it should be. Either the values are missing (a token leaves a key *and* a
    value), or numbers were counted where each takes 2 bytes."""
    return times(count(config, max_len, length, batch), 0.5)


@EXERCISE.misconception("a quarter of it: keys only, and numbers for bytes")
def quartered(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Every size is a quarter. Two factors of 2 are missing: a token leaves a key and a value, and each
    number takes 2 bytes."""
    return times(count(config, max_len, length, batch), 0.25)


@EXERCISE.misconception("four bytes a number")
def four_bytes(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Every size is twice too large: numbers of 4 bytes, as fp32 takes. The cache is kept in 16 bits here."""
    return times(count(config, max_len, length, batch), 2)


@EXERCISE.misconception("one row of the batch")
def one_row(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The batch is missing. Every row is a sequence of its own, with a cache of its own."""
    return count(config, max_len, length, 1)


@EXERCISE.misconception("one layer")
def one_layer(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The layers are missing: this is what the first one stores and reads. Add up over all of them."""
    return count({**config, "num_hidden_layers": 1}, max_len, length, batch)


@EXERCISE.misconception("GB for GiB")
def gigabytes(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The bytes were divided by 10⁹, which gives GB. A GiB is 2³⁰ = 1,073,741,824 bytes, 7% more: a card of
    80 GB holds 74.5 GiB."""
    counted = count(config, max_len, length, batch)
    return {**counted, "stored_gib": counted["stored"] / 1e9}


@EXERCISE.misconception("the share that is left, not the share saved")
def share_left(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """stored / full is what is left. Saved is the rest: 1 − stored / full."""
    counted = count(config, max_len, length, batch)
    return {**counted, "saving": 1 - counted["saving"]}


@EXERCISE.misconception("the saving in percent")
def percent(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """The saving was multiplied by 100. Asked for is the share itself, between 0 and 1."""
    counted = count(config, max_len, length, batch)
    return {**counted, "saving": 100 * counted["saving"]}


@EXERCISE.misconception("the saving in what is read")
def saving_read(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """This is the share that a step saves when it reads, at `length` tokens. Asked for is the share of the
    memory: stored, at max_len."""
    return {
        **count(config, max_len, length, batch),
        "saving": count(config, length, length, batch)["saving"],
    }


@EXERCISE.misconception("read without the new token")
def without_new(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """length − 1 tokens were read. `length` counts the new one, which is written before the step attends and
    read like the others."""
    return {
        **count(config, max_len, length, batch),
        "read": count(config, max_len, length - 1, batch)["read"],
    }


@EXERCISE.misconception("hidden_size divided by the KV heads")
def by_kv_heads(config: Config, max_len: int, length: int, batch: int) -> Sizes:
    """Without head_dim, hidden_size was divided by num_key_value_heads. The width is cut into one piece for
    each *query* head, num_attention_heads; a KV head is as wide as one of those, there are only fewer."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_key_value_heads"])
    return count({**config, "head_dim": head_dim}, max_len, length, batch)
