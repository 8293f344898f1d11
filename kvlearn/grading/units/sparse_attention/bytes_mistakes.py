"""05.7: the mistakes that people make with the size of a token, and with stored and read."""

from kvlearn.grading.units.sparse_attention.bytes import (
    EXERCISE,
    Config,
    Sizes,
    count,
    index_bytes,
    token_bytes,
    tokens_read,
)

__all__ = ["EXERCISE", "sizes"]


def sizes(config: Config, stored: int, read: int, N: int) -> Sizes:
    """Of so many tokens, with the index that belongs to it."""
    one, index = token_bytes(config), index_bytes(config, N)
    return {"stored": one * stored + index, "read": one * read + index}


@EXERCISE.misconception("query heads in place of KV heads")
def query_heads(config: Config, N: int) -> Sizes:
    """query_heads was counted. Queries are used and forgotten; what stays, and what is read, are keys and
    values, one of each at every KV head."""
    return count({**config, "kv_heads": config["query_heads"]}, N)


@EXERCISE.misconception("what is read once for every query head")
def read_by_each(config: Config, N: int) -> Sizes:
    """Stored was counted with KV heads, read with query heads. The query heads of a pool read the same keys,
    and the step fetches them once for all of them: that is what grouped heads are for."""
    wide = {**config, "kv_heads": config["query_heads"]}
    return {"stored": count(config, N)["stored"], "read": count(wide, N)["read"]}


@EXERCISE.misconception("keys only")
def keys_only(config: Config, N: int) -> Sizes:
    """Half is missing. A token leaves a key *and* a value at each KV head, and both are read."""
    index = index_bytes(config, N)
    return {name: (size - index) // 2 + index for name, size in count(config, N).items()}


@EXERCISE.misconception("one head only")
def one_head(config: Config, N: int) -> Sizes:
    """The heads are missing: this is what a token leaves at one KV head."""
    return count({**config, "kv_heads": 1}, N)


@EXERCISE.misconception("numbers for bytes")
def numbers(config: Config, N: int) -> Sizes:
    """This counts numbers. Each takes `number_bytes` bytes, and one of the index `index_bytes`."""
    return count({**config, "number_bytes": 1, "index_bytes": 1}, N)


@EXERCISE.misconception("two bytes a number, whatever is said")
def always_two(config: Config, N: int) -> Sizes:
    """Each number was counted with 2 bytes. That is bf16; a cache in fp8 takes 1, in fp32 4: `number_bytes`
    says it."""
    return count({**config, "number_bytes": 2}, N)


@EXERCISE.misconception("bits for bytes")
def bits(config: Config, N: int) -> Sizes:
    """All is eight times too much: bits were counted. The result is in bytes."""
    return {name: 8 * size for name, size in count(config, N).items()}


@EXERCISE.misconception("reads few, so it stores few")
def stored_as_read(config: Config, N: int) -> Sizes:
    """Stored was set to what one step reads, for a design whose next steps read other tokens. BigBird's later
    blocks draw from the whole text, an index may find any token: they read little and store everything. Ask
    who may still come to read a token. (Only for Longformer do the two agree.)"""
    read = len(tokens_read(config, N))
    return sizes(config, read, read, N)


@EXERCISE.misconception("BigBird stores what it reads")
def bigbird_stores_few(config: Config, N: int) -> Sizes:
    """For BigBird the tokens that one step reads were taken for those that must be stored. A later block may
    draw any block before it, so none may be forgotten: it reads less, and it stores what full attention
    stores."""
    read = len(tokens_read(config, N))
    return sizes(config, read, read, N) if config["kind"] == "bigbird" else count(config, N)


@EXERCISE.misconception("BigBird stores what is near or global")
def bigbird_window(config: Config, N: int) -> Sizes:
    """BigBird's random blocks were forgotten when it came to storing: what lies between the global blocks and
    the window was counted as gone. The random readers to come may ask for any of it."""
    few = {**config, "n_random": 0}
    if config["kind"] != "bigbird":
        return count(config, N)
    return sizes(config, len(tokens_read(few, N)), len(tokens_read(config, N)), N)


@EXERCISE.misconception("an index stores only what it selects")
def index_stores_few(config: Config, N: int) -> Sizes:
    """Only top_k tokens were counted as stored. Each step selects others, and it can only select what is
    there: all N tokens stay."""
    if config["kind"] != "indexed":
        return count(config, N)
    few = min(N, config["top_k"])
    return sizes(config, few, few, N)


@EXERCISE.misconception("Longformer stores everything")
def longformer_stores_all(config: Config, N: int) -> Sizes:
    """All N tokens were counted as stored. In Longformer the global tokens are the first ones: once they have
    attended, nobody will read a token that the window has passed, and it can go. Here a fixed pattern *does*
    shrink the cache."""
    if config["kind"] != "longformer":
        return count(config, N)
    return sizes(config, N, len(tokens_read(config, N)), N)


@EXERCISE.misconception("every design reads everything")
def reads_all(config: Config, N: int) -> Sizes:
    """Read was set to what full attention reads. A step reads the tokens that its pattern or its index lets
    it see, and no others."""
    return {**count(config, N), "read": sizes(config, N, N, N)["read"]}


@EXERCISE.misconception("the block of the token to come")
def next_block(config: Config, N: int) -> Sizes:
    """N // block and N % block were taken for the own block and what is in it. The last token stands at
    N − 1. When it fills its block, N belongs to the next one, which is still empty, and the own one was not
    counted at all: (N − 1) // block, and (N − 1) % block + 1 tokens."""
    right = count(config, N)
    block = config.get("block", N + 1)
    if config["kind"] != "bigbird" or N % block:
        return right
    others = config["n_window"] + config["n_global"] + config["n_random"]
    return {**right, "read": token_bytes(config) * block * min(N // block, others)}


@EXERCISE.misconception("read without the new token")
def without_new(config: Config, N: int) -> Sizes:
    """One token too few is read. The step of the token at N − 1 is counted, and it has written its key and
    value before it reads: itself among them."""
    right = count(config, N)
    return {**right, "read": right["read"] - token_bytes(config)}
