"""04.6: the bytes of models with windows, held against three real models and a count layer by layer."""

from typing import Any

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="04.6",
    slug="bytes",
    title="Stored and read: three models with windows",
    answers=("window_bytes",),
    hints=(
        "Go layer by layer and ask for a number of tokens. A layer with a window has W slots at most: it "
        "stores min(max_len, W) tokens, and a step reads min(length, W). A full layer stores max_len and "
        "reads length.",
        "A token leaves 2 · KV heads · head_dim numbers of 2 bytes in a layer, for each row of the batch. "
        "Query heads do not count, and hidden_size is only needed where there is no head_dim.",
        "Which layer is which? `layer_types` says it; without it all layers have the window; and where "
        "`sliding_window` is None no layer has one, whatever else is written.",
        "`saving` compares stored with the same sum where every layer stores max_len: 1 − stored / full. A "
        "GiB is 2³⁰ bytes.",
    ),
)

Config = dict[str, Any]
Sizes = dict[str, float]
WINDOW, FULL = "sliding_attention", "full_attention"


def model(layers: int, width: int, heads: int, kv_heads: int, window: int | None, **more: Any) -> Config:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**shape, "num_key_value_heads": kv_heads, "sliding_window": window, **more}


def pattern(layers: int, every: int) -> list[str]:
    """Every so many layers one that is full."""
    return [FULL if (i + 1) % every == 0 else WINDOW for i in range(layers)]


# From the models' config.json and the sources named in kvlearn/measure/models.py.
MISTRAL = model(32, 4096, 32, 8, 4096)
GEMMA_3 = model(62, 5376, 32, 16, 1024, head_dim=128, layer_types=pattern(62, 6))
GPT_OSS = model(36, 2880, 64, 8, 128, head_dim=64, layer_types=pattern(36, 2))


def tokens_kept(config: Config, n_tokens: int) -> list[int]:
    """In each layer, when so many tokens have come."""
    kept = []
    for i in range(config["num_hidden_layers"]):
        local = config.get("layer_types", [WINDOW] * (i + 1))[i] == WINDOW
        window = config["sliding_window"] if local else None
        kept.append(n_tokens if window is None or window > n_tokens else window)
    return kept


def token_bytes(config: Config, batch: int) -> int:
    """Bytes of a token in one layer, in every row of the batch."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    key = value = config["num_key_value_heads"] * head_dim * 2
    return batch * (key + value)


def sizes(config: Config, stored: list[int], read: list[int], max_len: int, batch: int) -> Sizes:
    """The four numbers from the tokens that each layer stores and reads."""
    one = token_bytes(config, batch)
    everything = one * max_len * config["num_hidden_layers"]
    return {
        "stored": one * sum(stored),
        "read": one * sum(read),
        "stored_gib": one * sum(stored) / 2**30,
        "saving": 1 - one * sum(stored) / everything,
    }


def count(config: Config, max_len: int, length: int, batch: int = 1) -> Sizes:
    return sizes(config, tokens_kept(config, max_len), tokens_kept(config, length), max_len, batch)


def same(t: Trial, window_bytes: Answer, config: Config, max_len: int, length: int, *names: str) -> None:
    batch = t.pick(3, 4, 6)
    got, want = window_bytes(config, max_len, length, batch), count(config, max_len, length, batch)
    for name in names:
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
        if name == "saving":
            close_to(t, got[name], want[name])
        else:
            t.number(got[name], want[name], name)


def close_to(t: Trial, got: Any, want: float) -> None:
    """A share, which may be 0, to nine digits after the point."""
    try:
        share = round(float(got), 9) + 0.0
    except (TypeError, ValueError):
        t.true(False, f"saving {want:.4f}", describe(got))
        raise Stop from None
    if abs(share - want) <= 2e-9:
        share = want
    t.number(share, want, "saving")


def local_and_global(t: Trial, round: int) -> Config:
    """Gemma 3 27B, gpt-oss-120b, or their like with layers that do not fall into whole periods."""
    if round < 2:
        return (GEMMA_3, GPT_OSS)[round]
    every = t.integer(3, 5)
    layers = every * t.integer(4, 8) + t.integer(1, every - 1)
    heads, kv_heads, head_dim = 24, t.pick(2, 4, 8), t.pick(96, 160)
    more = {"head_dim": head_dim, "layer_types": pattern(layers, every)}
    return model(layers, heads * 64, heads, kv_heads, t.pick(256, 512, 2048), **more)


@EXERCISE.requirement(1, "a window in every layer: Mistral 7B v0.1")
def windows(t: Trial, window_bytes: Answer) -> None:
    """stored: min(max_len, W) tokens in each layer; no layer_types means that all have the window; without
    head_dim it is hidden_size / num_attention_heads"""
    heads, kv_heads = t.pick((24, 8), (40, 10), (56, 7))
    drawn = model(t.integer(20, 60), heads * t.pick(64, 96), heads, kv_heads, t.pick(1024, 2048))
    same(
        t,
        window_bytes,
        MISTRAL if t.round == 0 else drawn,
        t.pick(8192, 12_288),
        t.integer(5000, 8000),
        "stored",
    )


@EXERCISE.requirement(1, "local and global layers, stored: Gemma 3 27B, gpt-oss-120b")
def stored(t: Trial, window_bytes: Answer) -> None:
    """min(max_len, W) tokens in the sliding_attention layers, max_len in the others"""
    length = t.integer(3000, 30_000)
    same(t, window_bytes, local_and_global(t, t.round), t.pick(32_768, 131_072), length, "stored")


@EXERCISE.requirement(1, "local and global layers, read by a step")
def read(t: Trial, window_bytes: Answer) -> None:
    """min(length, W) tokens in the sliding_attention layers, length in the others: what is there, not what
    there is room for"""
    length = t.integer(3000, 30_000)
    same(t, window_bytes, local_and_global(t, t.round), t.pick(32_768, 131_072), length, "read")


@EXERCISE.requirement(1, "fewer tokens than the window")
def short(t: Trial, window_bytes: Answer) -> None:
    """stored for max_len < W, and read for length < W: no layer keeps more tokens than there are"""
    config = local_and_global(t, t.pick(0, 1, 2))
    window = config["sliding_window"]
    same(
        t, window_bytes, config, window - t.integer(20, 60), window // 4 + t.integer(0, 20), "stored", "read"
    )
    same(t, window_bytes, config, 8 * window, window // 2 - t.integer(1, 20), "read")


@EXERCISE.requirement(1, "in GiB")
def gib(t: Trial, window_bytes: Answer) -> None:
    """stored_gib: what is stored in units of 2³⁰ bytes"""
    same(
        t,
        window_bytes,
        local_and_global(t, t.round),
        t.pick(16_384, 65_536),
        t.integer(3000, 8000),
        "stored_gib",
    )


@EXERCISE.requirement(1, "the share saved")
def saving(t: Trial, window_bytes: Answer) -> None:
    """1 − stored / (the same, were every layer full): 0.5 for Mistral v0.1 at 8192, and 0 while the context
    is not longer than the window"""
    config = MISTRAL if t.round == 0 else local_and_global(t, 2 - t.round)
    same(t, window_bytes, config, 8192 if t.round == 0 else 65_536, t.integer(3000, 8000), "saving")
    window = config["sliding_window"]
    same(t, window_bytes, config, window - t.integer(0, 20), window // 2, "saving")


@EXERCISE.requirement(1, "a window that was dropped: Mistral 7B v0.2")
def dropped(t: Trial, window_bytes: Answer) -> None:
    """sliding_window None: all layers are full, stored and read grow with the context"""
    config = {**MISTRAL, "sliding_window": None, "num_hidden_layers": t.integer(20, 60)}
    same(t, window_bytes, config, 32_768, t.integer(5000, 30_000), "stored", "read")
