"""06.8: the mistakes that people make with the bytes of a state."""

from dataclasses import dataclass
from typing import Any

from kvlearn.grading.units.linear_attention.crossing import EXERCISE, Config, Sizes

__all__ = ["EXERCISE", "Count"]


@dataclass
class Count:
    """The parts of a right count, to be changed one by one: numbers of one layer, bytes, layers."""

    model: Config
    attention: Config
    state_bytes: int = 4
    past_bytes: int = 2

    def __post_init__(self) -> None:
        model = self.model
        self.past = model.get("conv_width", 2) - 1  # tokens
        every = model.get("full_every")
        self.full = model["layers"] // every if every else 0
        self.layers = model["layers"] - self.full
        self.attention_layers = self.attention["layers"] - self.full
        if model["kind"] == "mamba":
            self.channels = model["expand"] * model["d_model"]
            self.matrix = self.channels * model["d_state"]
        elif model["kind"] == "rwkv7":
            self.channels = 2 * model["d_model"]
            self.matrix = model["d_model"] * model["head_dim"]
        else:
            keys = model["key_heads"] * model["key_dim"]
            self.channels = 2 * keys + model["value_heads"] * model["value_dim"]
            self.matrix = model["value_heads"] * model["key_dim"] * model["value_dim"]

    @property
    def state(self) -> int:
        return self.layers * (self.matrix * self.state_bytes + self.past * self.channels * self.past_bytes)

    @property
    def per_token(self) -> int:
        return self.attention_layers * 2 * self.attention["kv_heads"] * self.attention["head_dim"] * 2

    def done(self, **changed: Any) -> Sizes:
        state, per_token = changed.get("state", self.state), changed.get("per_token", self.per_token)
        tokens = changed.get("tokens", state // per_token + 1)
        return {"state": state, "per_token": per_token, "tokens": tokens}


@EXERCISE.misconception("the state in 16 bit")
def half_state(model: Config, attention: Config) -> Sizes:
    """The state was counted with 2 bytes a number, like keys and values. A key is written once; a state is
    added to at every token, and its rounding errors add up as well. So it is kept in fp32: 4 bytes."""
    return Count(model, attention, state_bytes=2).done()


@EXERCISE.misconception("all that is kept in 32 bit")
def all_wide(model: Config, attention: Config) -> Sizes:
    """The past of the convolution (or of the token shift) was counted with 4 bytes. Nothing is added up
    there: it is a handful of tokens as they came, and 2 bytes do. (kvlearn's own caches keep both in fp32,
    for simplicity; here only the state has 4 bytes.)"""
    return Count(model, attention, past_bytes=4).done()


@EXERCISE.misconception("the widths swapped")
def swapped_bytes(model: Config, attention: Config) -> Sizes:
    """The state was given 2 bytes and the convolution's past 4. It is the state in which rounding adds up."""
    return Count(model, attention, state_bytes=2, past_bytes=4).done()


@EXERCISE.misconception("the past of the convolution forgotten")
def no_past(model: Config, attention: Config) -> Sizes:
    """Only the matrices were counted. A short convolution, or a token shift, looks back a few tokens, and in
    decode these must be kept: (conv_width − 1) tokens of all channels that are convolved, two tokens of
    d_model in RWKV-7."""
    count = Count(model, attention)
    count.past = 0
    return count.done()


@EXERCISE.misconception("conv_width tokens of the past")
def whole_width(model: Config, attention: Config) -> Sizes:
    """conv_width tokens were kept. One of those that the convolution sees is the new token itself, so
    conv_width − 1 must wait. (Mamba's own code allocates conv_width, and shifts before it multiplies.)"""
    count = Count(model, attention)
    count.past = model.get("conv_width", 1)
    return count.done()


@EXERCISE.misconception("one token of the past, whatever the width")
def one_past(model: Config, attention: Config) -> Sizes:
    """One token of the past was counted. A convolution of width W sees W − 1 of them beside the new one."""
    count = Count(model, attention)
    count.past = 1
    return count.done()


@EXERCISE.misconception("expand forgotten")
def not_expanded(model: Config, attention: Config) -> Sizes:
    """d_model channels were counted. Mamba widens before it convolves and scans: expand · d_model channels
    have a state."""
    return Count({**model, "expand": 1}, attention).done()


@EXERCISE.misconception("the channels of Mamba's convolution without expand")
def narrow_convolution(model: Config, attention: Config) -> Sizes:
    """The past of Mamba's convolution was counted with d_model channels. It runs behind the projection:
    expand · d_model of them, as many as have a state."""
    count = Count(model, attention)
    count.channels //= model.get("expand", 1)
    return count.done()


@EXERCISE.misconception("B and C convolved, too")
def mamba_2(model: Config, attention: Config) -> Sizes:
    """2 · d_state channels were added to Mamba's convolution. So it is in Mamba-2, where x, B and C are
    convolved together; in Mamba B and C are made from x behind the convolution."""
    count = Count(model, attention)
    count.channels += 2 * model.get("d_state", 0)
    return count.done()


@EXERCISE.misconception("one token shift, not two")
def one_shift(model: Config, attention: Config) -> Sizes:
    """Only one token was counted for RWKV-7's shifts. Both halves of its layer, time mixing and channel
    mixing, look at the token before, and they see different things: 2 · d_model numbers."""
    count = Count(model, attention)
    if model["kind"] == "rwkv7":
        count.channels = model["d_model"]
    return count.done()


@EXERCISE.misconception("a vector for each head, not a matrix")
def vectors(model: Config, attention: Config) -> Sizes:
    """A head of RWKV-7 or of gated delta was given head_dim numbers. It keeps a sum of outer products k vᵀ: a
    matrix, key dimension times value dimension. (RWKV-4 has vectors.)"""
    count = Count(model, attention)
    if model["kind"] != "mamba":
        count.matrix //= model.get("head_dim", model.get("key_dim"))
    return count.done()


@EXERCISE.misconception("one matrix of d_model times d_model")
def one_matrix(model: Config, attention: Config) -> Sizes:
    """RWKV-7's heads were taken for one: d_model². Each of the d_model / head_dim heads has a matrix of
    head_dim times head_dim, together d_model · head_dim numbers."""
    count = Count(model, attention)
    if model["kind"] == "rwkv7":
        count.matrix = model["d_model"] ** 2
    return count.done()


@EXERCISE.misconception("matrices counted by key heads")
def by_key_heads(model: Config, attention: Config) -> Sizes:
    """Gated delta was given one matrix for each key head. Several value heads share the keys, but each of
    them writes values of its own: a matrix for each value head."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.matrix = model["key_heads"] * model["key_dim"] * model["value_dim"]
    return count.done()


@EXERCISE.misconception("square matrices of the value dimension")
def square(model: Config, attention: Config) -> Sizes:
    """Gated delta's matrices were counted value_dim times value_dim. They lead from keys to values: key_dim
    times value_dim."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.matrix = model["value_heads"] * model["value_dim"] ** 2
    return count.done()


@EXERCISE.misconception("only the values convolved")
def values_convolved(model: Config, attention: Config) -> Sizes:
    """Of gated delta's convolution only the values were counted. Queries, keys and values all go through it,
    and the past of all three is kept: 2 · key_heads · key_dim + value_heads · value_dim channels."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.channels = model["value_heads"] * model["value_dim"]
    return count.done()


@EXERCISE.misconception("the queries' past forgotten")
def no_queries(model: Config, attention: Config) -> Sizes:
    """Keys and values were counted in gated delta's convolution, queries were not, as in a KV cache. But here
    the queries are convolved, too, and the convolution needs their past."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.channels -= model["key_heads"] * model["key_dim"]
    return count.done()


@EXERCISE.misconception("queries counted by value heads in the convolution")
def wide_queries(model: Config, attention: Config) -> Sizes:
    """Queries and keys were counted with value_heads heads. They are repeated for the value heads only
    *behind* the convolution; its past holds key_heads of each."""
    count = Count(model, attention)
    if model["kind"] == "gated_delta":
        count.channels = model["value_heads"] * (2 * model["key_dim"] + model["value_dim"])
    return count.done()


@EXERCISE.misconception("one layer's state")
def one_layer(model: Config, attention: Config) -> Sizes:
    """The state was counted for one layer and held against keys and values of all. Every layer has a state of
    its own."""
    count = Count(model, attention)
    count.layers = 1
    return count.done()
