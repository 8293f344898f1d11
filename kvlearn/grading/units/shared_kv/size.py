"""02.2: bytes a token, stored and read, held against five real models and a count layer by layer."""

from typing import Any

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="02.2",
    slug="size",
    title="Bytes a token of five real models",
    answers=("bytes_per_token",),
    hints=(
        "Go layer by layer: what does this layer keep of a token, and does it keep it itself? Add to "
        "`read` for every layer, and to `stored` only if the layer has a cache of its own.",
        "A layer keeps 2 · KV heads · head_dim numbers of 2 bytes. KV heads: `num_key_value_heads` where "
        "it is given; else 1 where `multi_query` is true; else as many as attention heads.",
        "`layer_types[i]` says what layer i is. A full_attention layer takes `global_head_dim` where the "
        "config has one, every other layer takes the ordinary head dim. The *last* num_kv_shared_layers "
        "store nothing.",
        "With `kv_lora_rank` none of the heads are stored: a layer keeps one vector of kv_lora_rank + "
        "qk_rope_head_dim numbers, from which keys and values are both made. No factor 2, no heads.",
    ),
)

Config = dict[str, Any]
Sizes = dict[str, int]


def model(layers: int, width: int, heads: int, **more: Any) -> Config:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, **more}


def pattern(layers: int, every: int) -> list[str]:
    """Every so many layers one with full attention, the others with a window."""
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


# From the models' config.json; Gemma 4 E2B and DeepSeek-V3 as in kvlearn/measure/models.py.
LLAMA_2 = model(32, 4096, 32, num_key_value_heads=32)
LLAMA_3_1 = model(32, 4096, 32, num_key_value_heads=8)
FALCON = model(32, 4544, 71, multi_query=True)
GEMMA_4 = model(
    35,
    1536,
    8,
    num_key_value_heads=1,
    head_dim=256,
    global_head_dim=512,
    layer_types=pattern(35, 5),
    num_kv_shared_layers=20,
)
DEEPSEEK_V3 = model(61, 7168, 128, num_key_value_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)


def layers(config: Config) -> list[tuple[bool, int]]:
    """For every layer whether it has a cache of its own, and the bytes it reads for each token."""
    heads: int = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", 1 if config.get("multi_query") else heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    n_layers: int = config["num_hidden_layers"]
    counted = []
    for i in range(n_layers):
        full = config.get("layer_types", [""] * n_layers)[i] == "full_attention"
        key = value = kv_heads * (config.get("global_head_dim", head_dim) if full else head_dim)
        numbers = key + value
        if "kv_lora_rank" in config:
            numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        counted.append((i < n_layers - config.get("num_kv_shared_layers", 0), 2 * numbers))
    return counted


def count(config: Config) -> Sizes:
    each = layers(config)
    return {"stored": sum(size for own, size in each if own), "read": sum(size for _, size in each)}


def same(t: Trial, bytes_per_token: Answer, config: Config, *names: str) -> None:
    got = bytes_per_token(config)
    for name in names:
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
        t.number(got[name], count(config)[name], name)


@EXERCISE.requirement(1, "a KV head for every query head: Llama 2 7B")
def multi_head(t: Trial, bytes_per_token: Answer) -> None:
    """keys and values of all heads and layers; stored and read are equal"""
    heads, head_dim = t.pick(12, 20, 40), t.pick(64, 80, 96)
    drawn = model(t.integer(20, 60), heads * head_dim, heads)
    same(t, bytes_per_token, LLAMA_2 if t.round == 0 else drawn, "stored", "read")


@EXERCISE.requirement(1, "pools of query heads: Llama 3.1 8B")
def grouped(t: Trial, bytes_per_token: Answer) -> None:
    """the KV heads count, not the query heads; head_dim where it is given"""
    G, head_dim = t.pick(2, 4, 8), t.pick(64, 96)
    heads = G * t.integer(2, 5)
    drawn = model(t.integer(20, 60), heads * head_dim, heads, num_key_value_heads=G)
    if t.round == 2:
        drawn["head_dim"] = 2 * head_dim
    same(t, bytes_per_token, LLAMA_3_1 if t.round == 0 else drawn, "stored", "read")


@EXERCISE.requirement(1, "one KV head for all: Falcon 7B")
def multi_query(t: Trial, bytes_per_token: Answer) -> None:
    """a single key and a single value a layer where multi_query is true"""
    heads = t.pick(11, 23, 48)
    drawn = model(t.integer(20, 60), heads * 64, heads, multi_query=True)
    same(t, bytes_per_token, FALCON if t.round == 0 else drawn, "stored", "read")


def sharing(t: Trial) -> Config:
    """Gemma 4 E2B, or its like with layers that do not fall into whole periods."""
    if t.round == 0:
        return GEMMA_4
    every = t.pick(3, 4, 5)
    n_layers = every * t.integer(5, 7)
    shared = every * t.integer(2, 3) + t.integer(1, every - 2)
    dims = t.pick({"head_dim": 128, "global_head_dim": 256}, {"head_dim": 64, "global_head_dim": 192})
    more = {"layer_types": pattern(n_layers, every), "num_kv_shared_layers": shared, **dims}
    return model(n_layers, 1024, 8, num_key_value_heads=t.pick(1, 2), **more)


@EXERCISE.requirement(1, "stored, where layers share: Gemma 4 E2B")
def shared_stored(t: Trial, bytes_per_token: Answer) -> None:
    """the layers with a cache of their own, each with the head dim of its type"""
    same(t, bytes_per_token, sharing(t), "stored")


@EXERCISE.requirement(1, "read, where layers share: Gemma 4 E2B")
def shared_read(t: Trial, bytes_per_token: Answer) -> None:
    """all layers, since a layer without a cache of its own reads another's"""
    same(t, bytes_per_token, sharing(t), "read")


@EXERCISE.requirement(1, "a latent vector: DeepSeek-V3")
def latent(t: Trial, bytes_per_token: Answer) -> None:
    """one vector of kv_lora_rank + qk_rope_head_dim numbers a layer, for keys and values together"""
    heads, ranks = t.pick(16, 40), {"kv_lora_rank": t.pick(256, 384), "qk_rope_head_dim": t.pick(32, 64)}
    drawn = model(t.integer(20, 60), 128 * heads, heads, num_key_value_heads=heads, **ranks)
    same(t, bytes_per_token, DEEPSEEK_V3 if t.round == 0 else drawn, "stored", "read")
