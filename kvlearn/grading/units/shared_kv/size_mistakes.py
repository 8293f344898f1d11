"""02.2: the mistakes that people make when they count the bytes of a token."""

from kvlearn.grading.units.shared_kv.size import EXERCISE, Config, Sizes, count, layers

__all__ = ["EXERCISE"]


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def times(sizes: Sizes, factor: float) -> Sizes:
    return {name: int(size * factor) for name, size in sizes.items()}


def per_layer(config: Config, numbers: int) -> Sizes:
    """The count of a model whose every layer keeps so many numbers."""
    total = 2 * numbers * config["num_hidden_layers"]
    return {"stored": total, "read": total}


@EXERCISE.misconception("query heads in place of KV heads")
def query_heads(config: Config) -> Sizes:
    """num_attention_heads counts the queries, which are used and forgotten. What stays are the keys and
    values, and there are num_key_value_heads of each; for Llama 3.1 8B that is 8 and not 32."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    return count({**config, "num_key_value_heads": heads, "head_dim": head_dim})


@EXERCISE.misconception("multi_query not looked at")
def no_multi_query(config: Config) -> Sizes:
    """Falcon 7B's config has no num_key_value_heads; it says multi_query instead, and that is one KV head for
    all 71 query heads. Taken for an ordinary model it seems to need 71 times the cache."""
    return count(without(config, "multi_query"))


@EXERCISE.misconception("head_dim not looked up")
def no_head_dim(config: Config) -> Sizes:
    """The head dim was always taken as hidden_size / num_attention_heads. A config may choose it freely and
    say so in head_dim, as Gemma's does."""
    return count(without(config, "head_dim"))


@EXERCISE.misconception("the head dim from the KV heads")
def divided_by_kv_heads(config: Config) -> Sizes:
    """The head dim was taken as hidden_size / num_key_value_heads, so pooling seems to save nothing: fewer
    heads, each as much wider. hidden_size is divided among the *query* heads, and a key is as wide as the
    query it meets."""
    if "num_key_value_heads" not in config or "head_dim" in config or "kv_lora_rank" in config:
        return count(config)
    return count({**config, "head_dim": config["hidden_size"] // config["num_key_value_heads"]})


@EXERCISE.misconception("keys only")
def keys_only(config: Config) -> Sizes:
    """Half of the cache is missing. A token leaves a key *and* a value at each KV head. (A latent vector is
    the exception: one vector serves for both.)"""
    return count(config) if "kv_lora_rank" in config else times(count(config), 0.5)


@EXERCISE.misconception("one layer only")
def one_layer(config: Config) -> Sizes:
    """The layers are missing: this is what a token leaves in the first one. Add up over all of them."""
    _, first = layers(config)[0]
    return {"stored": first, "read": first}


@EXERCISE.misconception("numbers for bytes")
def numbers(config: Config) -> Sizes:
    """This counts numbers. Each takes 2 bytes in 16 bits, so all sizes are half of what they should be."""
    return times(count(config), 0.5)


@EXERCISE.misconception("four bytes a number")
def four_bytes(config: Config) -> Sizes:
    """Each number was counted with 4 bytes, as fp32 takes. The cache is kept in 16 bits here, which is 2
    bytes a number. (Bits for bytes would be 8 times too much; this is twice.)"""
    return times(count(config), 2)


@EXERCISE.misconception("layers that share store too")
def all_store(config: Config) -> Sizes:
    """Stored was counted over all layers. The last num_kv_shared_layers keep nothing of their own: they
    project queries only, and read what an earlier layer of their type has stored."""
    sizes = count(config)
    return {**sizes, "stored": sizes["read"]}


@EXERCISE.misconception("layers that share read nothing")
def none_read(config: Config) -> Sizes:
    """Read was set to stored. A layer that stores nothing attends all the same: it fetches the other layer's
    keys and values from memory again. Sharing across layers saves memory, and no traffic. Stored is not
    read."""
    sizes = count(config)
    return {**sizes, "read": sizes["stored"]}


@EXERCISE.misconception("only the layers that share read")
def owners_do_not_read(config: Config) -> Sizes:
    """The layers with a cache of their own were left out of what is read. Having stored a token does not
    spare a layer from fetching it again at every later step: all layers read."""
    sizes = count(config)
    return {**sizes, "read": sizes["read"] - sizes["stored"] or sizes["read"]}


@EXERCISE.misconception("the first layers share, not the last")
def first_share(config: Config) -> Sizes:
    """The first num_kv_shared_layers were taken for those without a cache. It is the *last* ones: a layer can
    only read what an earlier layer has computed already. (Where both parts hold the same mix of layer types
    the sum comes out equal.)"""
    each = layers(config)[config.get("num_kv_shared_layers", 0) :]
    return {**count(config), "stored": sum(size for _, size in each)}


@EXERCISE.misconception("only the layers that share were counted")
def shared_stored(config: Config) -> Sizes:
    """num_kv_shared_layers was taken for the number of layers that store. It is the number of those that do
    *not*: in Gemma 4 E2B 20 of 35 read, and the other 15 have a cache of their own."""
    shared = config.get("num_kv_shared_layers", 0)
    if not shared:
        return count(config)
    return {**count(config), "stored": sum(size for _, size in layers(config)[-shared:])}


@EXERCISE.misconception("one head dim for all layers")
def one_head_dim(config: Config) -> Sizes:
    """global_head_dim was not looked at. The layers with full attention have heads of their own width: 512
    numbers in Gemma 4 E2B, where the layers with a window have 256."""
    return count(without(config, "global_head_dim"))


@EXERCISE.misconception("global_head_dim in all layers")
def always_global(config: Config) -> Sizes:
    """global_head_dim was taken for every layer of a model that has one. It is the width in the
    full_attention layers; those with a window keep the ordinary head_dim."""
    return count({**config, "head_dim": config["global_head_dim"]} if "global_head_dim" in config else config)


@EXERCISE.misconception("the wider heads in the wrong layers")
def swapped_head_dims(config: Config) -> Sizes:
    """global_head_dim was given to the layers with a window, and head_dim to those with full attention.
    "Global" is the layer that sees everything: full_attention."""
    if "global_head_dim" not in config:
        return count(config)
    return count({**config, "head_dim": config["global_head_dim"], "global_head_dim": config["head_dim"]})


@EXERCISE.misconception("the latent counted twice")
def latent_twice(config: Config) -> Sizes:
    """The latent vector was counted for the keys and for the values. There is just one: each head makes its
    keys and its values from the same kv_lora_rank numbers. That is half of its charm."""
    return times(count(config), 2) if "kv_lora_rank" in config else count(config)


@EXERCISE.misconception("one latent for the keys, another for the values")
def two_latents(config: Config) -> Sizes:
    """kv_lora_rank was counted twice, and the position part once. The same kv_lora_rank numbers serve for the
    keys and for the values: that is what the "kv" in the name says."""
    if "kv_lora_rank" not in config:
        return count(config)
    return per_layer(config, 2 * config["kv_lora_rank"] + config["qk_rope_head_dim"])


@EXERCISE.misconception("heads stored, although there is a latent")
def latent_ignored(config: Config) -> Sizes:
    """The model was counted as if it stored its heads' keys and values. It has heads, but with kv_lora_rank
    they are made from the stored vector when they are needed: 576 numbers a layer and token in DeepSeek-V3,
    in place of tens of thousands."""
    return count(without(config, "kv_lora_rank", "qk_rope_head_dim"))


@EXERCISE.misconception("the latent without its position part")
def no_rope_part(config: Config) -> Sizes:
    """kv_lora_rank alone. Beside the latent a layer stores qk_rope_head_dim numbers: the part of the key that
    carries the position, which cannot be made from the latent later. It is shared by all heads."""
    return count({**config, "qk_rope_head_dim": 0})


@EXERCISE.misconception("a position part for every head")
def rope_part_per_head(config: Config) -> Sizes:
    """The qk_rope_head_dim numbers were counted for each head. There is one such part a token and layer, and
    all heads read it, as with multi-query attention."""
    if "kv_lora_rank" not in config:
        return count(config)
    heads = config["num_attention_heads"]
    return per_layer(config, config["kv_lora_rank"] + heads * config["qk_rope_head_dim"])


@EXERCISE.misconception("a latent for every head")
def latent_per_head(config: Config) -> Sizes:
    """The latent was multiplied by num_key_value_heads. It is one vector a token and layer; that all heads
    are made from the same one is what makes it small."""
    if "kv_lora_rank" not in config:
        return count(config)
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    return per_layer(config, config["num_key_value_heads"] * width)
