"""05.7: bytes stored and read by four designs, held against sets of positions."""

from typing import Any

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="05.7",
    slug="bytes",
    title="Stored and read: four designs",
    answers=("sparse_bytes",),
    hints=(
        "Count tokens first, bytes last. One token is 2 · kv_heads · head_dim numbers of `number_bytes` "
        "bytes; query heads do not count. Then ask for each kind: how many tokens must be there, and how "
        "many of them does the step at position N − 1 read?",
        "`longformer` forgets: behind the window only the n_global first tokens have readers to come, so "
        "min(N, window + n_global) tokens are stored, and the step reads the same ones.",
        "`bigbird` forgets nothing: some later block may draw any block. It reads its own block as far as "
        "it is filled, n_window blocks before, n_global at the start and n_random others: so many as there "
        "*are*, and none twice. Python's `set(range(…))` does the union for you.",
        "`indexed` stores an index key beside every token, and the step reads the index keys of *all* N "
        "tokens to find the min(N, top_k) tokens that it reads then. An index key is index_dim numbers of "
        "`index_bytes` bytes, one for all heads.",
    ),
)

Config = dict[str, Any]
Sizes = dict[str, int]


def tokens_read(config: Config, N: int) -> set[int]:
    """The positions that the token at N − 1 reads."""
    t, everything = N - 1, set(range(N))
    if config["kind"] == "longformer":
        window = {t - back for back in range(config["window"]) if back <= t}
        return window | {p for p in everything if p < config["n_global"]}
    if config["kind"] == "bigbird":
        block = config["block"]
        own, n_global = t // block, config["n_global"]
        near = {c for c in range(own + 1) if own - c <= config["n_window"]}
        others = [c for c in range(own) if c >= n_global and c not in near]
        blocks = near | set(range(n_global)) | set(others[: config["n_random"]])
        return {p for p in everything if p // block in blocks}
    if config["kind"] == "indexed":
        return set(range(min(N, config["top_k"])))  # which ones, the content says
    return everything


def tokens_stored(config: Config, N: int) -> set[int]:
    """The positions that this or some later token may read."""
    return tokens_read(config, N) if config["kind"] == "longformer" else set(range(N))


def token_bytes(config: Config) -> int:
    key = value = config["kv_heads"] * config["head_dim"] * config["number_bytes"]
    return key + value


def index_bytes(config: Config, N: int) -> int:
    return N * config["index_dim"] * config["index_bytes"] if config["kind"] == "indexed" else 0


def count(config: Config, N: int) -> Sizes:
    index, one = index_bytes(config, N), token_bytes(config)
    return {
        "stored": one * len(tokens_stored(config, N)) + index,
        "read": one * len(tokens_read(config, N)) + index,
    }


def draw(t: Trial, kind: str) -> Config:
    kv_heads = t.pick(2, 3, 4, 5)
    config = {
        "kind": kind,
        "query_heads": kv_heads * t.pick(3, 6, 7),
        "kv_heads": kv_heads,
        "head_dim": t.pick(64, 96, 128),
        "number_bytes": t.pick(1, 2, 4),
    }
    if kind == "longformer":
        config |= {"window": t.pick(96, 200, 256), "n_global": t.integer(3, 16)}
    if kind == "bigbird":
        n_window, n_global = t.random.sample(range(1, 4), 2)
        blocks = {"n_window": n_window, "n_global": n_global, "n_random": t.integer(2, 4)}
        config |= {"block": t.pick(16, 24, 64), **blocks}
    if kind == "indexed":
        number = config["number_bytes"]
        bytes_ = t.pick(*({1, 2, 4} - {number}))
        config |= {"top_k": t.pick(100, 128, 300), "index_dim": t.pick(32, 48), "index_bytes": bytes_}
    return config


def same(t: Trial, sparse_bytes: Answer, config: Config, N: int, *names: str) -> None:
    got, want = sparse_bytes(config, N), count(config, N)
    for name in names or ("stored", "read"):
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
        t.number(got[name], want[name], f"{config['kind']}, N = {N}, {name}:")


@EXERCISE.requirement(1, "full attention")
def full(t: Trial, sparse_bytes: Answer) -> None:
    """keys and values of N tokens at every KV head, in numbers of 1, 2 or 4 bytes: stored and read"""
    for _ in range(3):
        same(t, sparse_bytes, draw(t, "full"), t.integer(1, 3000))


@EXERCISE.requirement(1, "Longformer")
def longformer(t: Trial, sparse_bytes: Answer) -> None:
    """stored and read: the window and the global tokens, once the text is longer than both"""
    same(t, sparse_bytes, draw(t, "longformer"), t.integer(500, 3000))


def long_text(t: Trial, config: Config) -> int:
    """A length at which the last block is half-filled and every word has blocks of its own."""
    block = config["block"]
    return block * t.integer(20, 60) + t.integer(2, block - 2)


@EXERCISE.requirement(1, "BigBird, read")
def bigbird_read(t: Trial, sparse_bytes: Answer) -> None:
    """its own block as far as it is filled, and n_window + n_global + n_random whole ones; also for a token
    that fills its block"""
    config = draw(t, "bigbird")
    same(t, sparse_bytes, config, long_text(t, config), "read")
    same(t, sparse_bytes, config, config["block"] * t.integer(20, 60), "read")


@EXERCISE.requirement(1, "BigBird, stored")
def bigbird_stored(t: Trial, sparse_bytes: Answer) -> None:
    """every token: a later block may draw any block"""
    config = draw(t, "bigbird")
    same(t, sparse_bytes, config, long_text(t, config), "stored")


@EXERCISE.requirement(1, "an index")
def indexed(t: Trial, sparse_bytes: Answer) -> None:
    """stored: keys, values and an index key of every token; read: all index keys, and keys and values of the
    top_k tokens"""
    same(t, sparse_bytes, draw(t, "indexed"), t.integer(400, 3000))


@EXERCISE.requirement(1, "texts shorter than what a design reads")
def short(t: Trial, sparse_bytes: Answer) -> None:
    """no design stores or reads a token that is not there, or one of them twice"""
    config = draw(t, "longformer")
    window, n_global = config["window"], config["n_global"]
    for N in (window - t.integer(1, 50), window + t.integer(1, n_global - 1), 1):
        same(t, sparse_bytes, config, N)
    config = draw(t, "bigbird")
    block, wide, near = config["block"], config["n_global"], config["n_window"]
    for blocks in (wide + near + 1, wide + near, wide, wide - 1):  # complete ones, before the own
        same(t, sparse_bytes, config, blocks * block + t.integer(2, block - 2), "stored", "read")
    config = draw(t, "indexed")
    same(t, sparse_bytes, config, config["top_k"] - t.integer(1, 50))
