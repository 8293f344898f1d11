"""06.8: the mistakes with keys and values beside a state, in a convolution too, and with the crossing."""

from kvlearn.grading.units.linear_attention.crossing import EXERCISE, Config, Sizes
from kvlearn.grading.units.linear_attention.crossing_mistakes import Count

__all__ = ["EXERCISE"]


@EXERCISE.misconception("query heads counted, not KV heads")
def query_heads(model: Config, attention: Config) -> Sizes:
    """Keys and values were counted at every query head. With grouped queries only the KV heads have keys and
    values, and the crossing comes so many times later."""
    return Count(model, {**attention, "kv_heads": attention["query_heads"]}).done()


@EXERCISE.misconception("keys only, or one byte a number")
def keys_only(model: Config, attention: Config) -> Sizes:
    """Half of a token is missing. It leaves a key *and* a value, in each layer and at each KV head, and each
    of their numbers takes 2 bytes."""
    count = Count(model, attention)
    return count.done(per_token=count.per_token // 2)


@EXERCISE.misconception("keys and values in 32 bit")
def wide_keys(model: Config, attention: Config) -> Sizes:
    """Keys and values were counted with 4 bytes. They are kept in 16 bit, 2 bytes; it is the state that has
    4."""
    count = Count(model, attention)
    return count.done(per_token=count.per_token * 2)


@EXERCISE.misconception("one layer's keys and values")
def one_layer(model: Config, attention: Config) -> Sizes:
    """Keys and values were counted for one layer, and the state for all. Every layer of the attention model
    has its own."""
    count = Count(model, attention)
    count.attention_layers = 1
    return count.done()


@EXERCISE.misconception("the layers of the wrong model")
def other_layers(model: Config, attention: Config) -> Sizes:
    """Keys and values were counted with the layers of the recurrent model. The two need not be equally deep:
    64 layers of Mamba-2.8B stand against 32 of Pythia-2.8B, since a Mamba layer has no MLP beside it."""
    count = Count(model, attention)
    count.attention_layers = model["layers"] - count.full
    return count.done()


@EXERCISE.misconception("a hybrid's states against keys and values of all layers")
def all_keys(model: Config, attention: Config) -> Sizes:
    """per_token was counted for all layers. The hybrid's full layers hold their keys and values as well, so
    they do not speak for either side: what it saves are those of the layers that have a state."""
    count = Count(model, attention)
    count.attention_layers = attention["layers"]
    return count.done()


@EXERCISE.misconception("a hybrid's states against its own full layers")
def own_keys(model: Config, attention: Config) -> Sizes:
    """The states were held against the keys and values of the hybrid's *full* layers. Those it has in any
    case. The question is what its other layers would hold, were they full."""
    count = Count(model, attention)
    count.attention_layers = count.full or count.attention_layers
    return count.done()


@EXERCISE.misconception("a state in every layer of a hybrid")
def all_states(model: Config, attention: Config) -> Sizes:
    """A state was counted in all layers. Every full_every-th layer is full attention and has none."""
    count = Count(model, attention)
    count.layers = model["layers"]
    return count.done()


@EXERCISE.misconception("a hybrid not seen as one")
def no_hybrid(model: Config, attention: Config) -> Sizes:
    """full_every was not looked at: states and keys and values in all layers. In `tokens` it cancels where
    both have as many layers, but not in the bytes."""
    return Count({**model, "full_every": None}, attention).done()


@EXERCISE.misconception("full and recurrent layers exchanged")
def exchanged(model: Config, attention: Config) -> Sizes:
    """layers // full_every was taken for the number of layers with a state. It is the number of *full* ones:
    every full_every-th is full, all the others have a state."""
    count = Count(model, attention)
    if count.full:
        count.layers, count.attention_layers = count.full, attention["layers"] - count.layers
    return count.done()


@EXERCISE.misconception("full layers rounded up")
def rounded_up(model: Config, attention: Config) -> Sizes:
    """A full layer too many was counted where full_every does not divide the number of layers. Layers are
    full where their number, from 1 on, is a multiple of full_every: layers // full_every, rounded down."""
    count = Count(model, attention)
    if count.full:
        more = int(model["layers"] % model["full_every"] > 0)
        count.layers, count.attention_layers = count.layers - more, count.attention_layers - more
    return count.done()


@EXERCISE.misconception("values counted by key heads in the convolution")
def narrow_values(model: Config, attention: Config) -> Sizes:
    """Gated delta's convolution was counted with key_heads heads of values. Queries and keys have that many,
    values have value_heads."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.channels = model["key_heads"] * (2 * model["key_dim"] + model["value_dim"])
    return count.done()


@EXERCISE.misconception("the values not convolved")
def no_values(model: Config, attention: Config) -> Sizes:
    """Only queries and keys were counted in gated delta's convolution. Values go through it as well, and
    their past is kept too."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.channels = 2 * model["key_heads"] * model["key_dim"]
    return count.done()


@EXERCISE.misconception("equal taken for smaller")
def rounded_tokens(model: Config, attention: Config) -> Sizes:
    """state / per_token was rounded up. Where it comes out even, the two are *equal* there, and the state is
    smaller only from the next token on: state // per_token + 1."""
    count = Count(model, attention)
    return count.done(tokens=-(-count.state // count.per_token))


@EXERCISE.misconception("tokens rounded down")
def floored(model: Config, attention: Config) -> Sizes:
    """state // per_token is the last number of tokens at which keys and values take no more bytes than the
    state. The state is smaller from the next one on."""
    count = Count(model, attention)
    return count.done(tokens=count.state // count.per_token)


@EXERCISE.misconception("tokens not a whole number")
def fractional(model: Config, attention: Config) -> Sizes:
    """state / per_token was returned as it is. Tokens come whole: the first number of them at which the state
    is smaller."""
    count = Count(model, attention)
    return count.done(tokens=count.state / count.per_token)


@EXERCISE.misconception("tokens rounded to the nearest")
def nearest(model: Config, attention: Config) -> Sizes:
    """state / per_token was rounded to the nearest whole number, which is sometimes one too few. The first
    number of tokens *above* it counts: state // per_token + 1."""
    count = Count(model, attention)
    return count.done(tokens=round(count.state / count.per_token))


@EXERCISE.misconception("in KiB")
def kib(model: Config, attention: Config) -> Sizes:
    """The sizes were divided by 1024. Bytes were asked for, whole numbers, so that nothing is lost by
    rounding."""
    count = Count(model, attention)
    return count.done(
        state=count.state / 1024, per_token=count.per_token / 1024, tokens=count.done()["tokens"]
    )


@EXERCISE.misconception("tokens counted from the bytes of one layer each")
def per_layer(model: Config, attention: Config) -> Sizes:
    """The crossing was computed for one layer against one layer. That is right only where both models have as
    many of them; here the whole state stands against all keys and values of a token."""
    count = Count(model, attention)
    one = count.per_token // count.attention_layers
    return count.done(tokens=count.state // count.layers // one + 1)
