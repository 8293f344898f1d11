"""05.7: the mistakes that people make when they count the tokens of a design, and its index."""

from kvlearn.grading.units.sparse_attention.bytes import Config, Sizes, count, index_bytes, token_bytes
from kvlearn.grading.units.sparse_attention.bytes_mistakes import EXERCISE, sizes

__all__ = ["EXERCISE"]


def longformer(config: Config, N: int, tokens: int) -> Sizes:
    """Another count of tokens for Longformer, the rest right."""
    return sizes(config, tokens, tokens, N) if config["kind"] == "longformer" else count(config, N)


@EXERCISE.misconception("Longformer without its global tokens")
def no_globals(config: Config, N: int) -> Sizes:
    """Only the window was counted. The n_global first tokens are read by every step, so they stay when the
    window has passed."""
    return longformer(config, N, min(N, config.get("window", 0)))


@EXERCISE.misconception("window + n_global, however short the text")
def longformer_not_clipped(config: Config, N: int) -> Sizes:
    """window + n_global was counted though the text is shorter, or the window still covers the global tokens.
    No token that is not there, and none twice: min(N, window + n_global)."""
    return longformer(config, N, config.get("window", 0) + config.get("n_global", 0))


@EXERCISE.misconception("global tokens counted beside a window that covers them")
def globals_twice(config: Config, N: int) -> Sizes:
    """min(N, window) + n_global: while the window reaches back to the start, the global tokens are in it and
    were counted a second time. Take the smaller of N and the sum."""
    return longformer(config, N, min(N, config.get("window", 0)) + min(N, config.get("n_global", 0)))


@EXERCISE.misconception("the query counted beside its window")
def window_and_self(config: Config, N: int) -> Sizes:
    """window + 1 tokens: the query's own was added. The window counts it."""
    tokens = min(N, config.get("window", 0) + 1 + config.get("n_global", 0))
    return longformer(config, N, tokens)


def bigbird(config: Config, N: int, read: int) -> Sizes:
    """Another count of what BigBird reads, the rest right."""
    return sizes(config, N, read, N) if config["kind"] == "bigbird" else count(config, N)


def words(config: Config) -> list[int]:
    return [config.get(name, 1) for name in ("block", "n_window", "n_global", "n_random")]


def clipped(config: Config, N: int, **more: int) -> int:
    """BigBird's tokens, with other numbers of blocks."""
    size = token_bytes(config)
    return count({**config, **more}, N)["read"] // size if config["kind"] == "bigbird" else 0


@EXERCISE.misconception("the own block counted whole")
def own_whole(config: Config, N: int) -> Sizes:
    """The own block was counted as full. The step at N − 1 sees it up to itself: (N − 1) % block + 1
    tokens."""
    block, *_ = words(config)
    return bigbird(config, N, clipped(config, N) + -N % block)


@EXERCISE.misconception("the own block forgotten")
def own_missing(config: Config, N: int) -> Sizes:
    """n_window blocks lie *before* the query's own, and the own one was not counted. The step reads it as far
    as it is filled."""
    block, *_ = words(config)
    return bigbird(config, N, clipped(config, N) - ((N - 1) % block + 1))


@EXERCISE.misconception("a window on both sides")
def both_sides(config: Config, N: int) -> Sizes:
    """n_window blocks were counted on either side. There is nothing after the last token, and in a decoder
    there never is: the own block and n_window before it."""
    block, n_window, *_ = words(config)
    return bigbird(config, N, clipped(config, N) + n_window * block)


@EXERCISE.misconception("no random blocks read")
def no_random(config: Config, N: int) -> Sizes:
    """The n_random drawn blocks were not counted. They are read whole by every query of the block that drew
    them."""
    return bigbird(config, N, clipped(config, N, n_random=0))


@EXERCISE.misconception("BigBird without its global blocks")
def no_global_blocks(config: Config, N: int) -> Sizes:
    """The first n_global blocks were not counted. Every step reads them; and the random blocks are not drawn
    among them, so they are not in that number either."""
    block, n_window, n_global, _ = words(config)
    own = (N - 1) // block
    outside = min(n_global, max(own - n_window, 0))
    return bigbird(config, N, clipped(config, N) - outside * block)


@EXERCISE.misconception("one token for each block")
def blocks_as_tokens(config: Config, N: int) -> Sizes:
    """n_window + n_global + n_random were added up as tokens. They count blocks, and each has `block`
    tokens."""
    block, *numbers = words(config)
    return bigbird(config, N, (N - 1) % block + 1 + sum(numbers))


@EXERCISE.misconception("blocks counted that are not there")
def not_there(config: Config, N: int) -> Sizes:
    """n_window + n_global + n_random whole blocks were counted, however short the text. At its start there
    are fewer, and the window's may be the global ones: count each block that *is* there once."""
    block, *numbers = words(config)
    return bigbird(config, N, (N - 1) % block + 1 + sum(numbers) * block)


@EXERCISE.misconception("more random blocks than there are to draw from")
def random_not_clipped(config: Config, N: int) -> Sizes:
    """n_random blocks were counted even where fewer are left that are neither global nor in the window:
    min(n_random, those that are left)."""
    block, n_window, n_global, n_random = words(config)
    own = (N - 1) // block
    left = max(own - n_window - n_global, 0)
    return bigbird(config, N, clipped(config, N) + max(n_random - left, 0) * block)


def indexed(config: Config, N: int, **sizes_: int) -> Sizes:
    """Other sizes for the indexed design, the rest right."""
    right = count(config, N)
    return {**right, **sizes_} if config["kind"] == "indexed" else right


@EXERCISE.misconception("the index forgotten")
def no_index(config: Config, N: int) -> Sizes:
    """The index keys are missing from both. They are stored beside every token, and a step reads all of them
    to find out what to read."""
    index = index_bytes(config, N)
    return {name: size - index for name, size in count(config, N).items()}


@EXERCISE.misconception("the index stored and not read")
def index_not_read(config: Config, N: int) -> Sizes:
    """The index was counted in stored, and in read only the top_k tokens. To know which those are, the step
    compares its query with the index key of *every* token: that part of reading still grows with N."""
    return indexed(config, N, read=count(config, N)["read"] - index_bytes(config, N))


@EXERCISE.misconception("the index read and not stored")
def index_not_stored(config: Config, N: int) -> Sizes:
    """The index was counted in read and not in stored. Index keys are made once, when a token comes, and
    kept: the cache is *larger* than full attention's."""
    return indexed(config, N, stored=count(config, N)["stored"] - index_bytes(config, N))


@EXERCISE.misconception("index keys of the selected tokens alone")
def index_of_selected(config: Config, N: int) -> Sizes:
    """Index keys were counted for the top_k tokens that are selected. They are needed before the choice, so
    for all N."""
    if config["kind"] != "indexed":
        return count(config, N)
    few = index_bytes(config, min(N, config["top_k"]))
    return indexed(config, N, read=count(config, N)["read"] - index_bytes(config, N) + few)


@EXERCISE.misconception("the index in the cache's own numbers")
def index_in_number_bytes(config: Config, N: int) -> Sizes:
    """The index keys were counted with `number_bytes`. They have a type of their own, `index_bytes` (fp8, as
    a rule: they only have to find)."""
    return count({**config, "index_bytes": config["number_bytes"]}, N)


@EXERCISE.misconception("an index key for every KV head")
def index_per_head(config: Config, N: int) -> Sizes:
    """index_dim was multiplied by kv_heads. There is one index key a token, for all heads: they read the same
    selection."""
    return count({**config, "index_dim": config.get("index_dim", 0) * config["kv_heads"]}, N)


@EXERCISE.misconception("an index for keys and another for values")
def index_twice(config: Config, N: int) -> Sizes:
    """The index was counted twice, like keys and values. It is one key a token; what it finds is the
    token."""
    return count({**config, "index_dim": 2 * config.get("index_dim", 0)}, N)


@EXERCISE.misconception("top_k tokens where there are fewer")
def top_k_not_clipped(config: Config, N: int) -> Sizes:
    """top_k tokens were counted as read in a text that has fewer: min(N, top_k)."""
    if config["kind"] != "indexed":
        return count(config, N)
    return indexed(config, N, read=token_bytes(config) * config["top_k"] + index_bytes(config, N))


@EXERCISE.misconception("a selection for every query head")
def read_top_k_each(config: Config, N: int) -> Sizes:
    """The selected tokens were counted once for every query head. All heads of a layer read the same top_k
    tokens, and each of these once."""
    if config["kind"] != "indexed":
        return count(config, N)
    one = token_bytes({**config, "kv_heads": config["query_heads"]})
    return indexed(config, N, read=one * min(N, config["top_k"]) + index_bytes(config, N))
