"""02.7: the mistakes that people make with a shared cache: who writes, who reads what."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from kvlearn.attention import KVCache, Rope
from kvlearn.grading.units.shared_kv.step import EXERCISE, Layer

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, Tensor]


def causal_mask(T: int, S: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@dataclass
class Owner:
    """The owner's part, done right: its output, and what the reader may use."""

    x: Tensor
    layer: Layer
    cache: KVCache
    rope: Rope
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.T = self.x.shape[1]
        self.positions = self.cache.positions(self.T)
        self.new_k, self.new_v = self.rope(self.layer.k(self.x), self.positions), self.layer.v(self.x)
        self.keys, self.values, _ = self.cache.append(self.new_k, self.new_v)
        self.mask = causal_mask(self.T, self.keys.shape[2])
        q = self.rope(self.layer.q(self.x), self.positions)
        self.out = attention(q, self.keys, self.values, self.mask)

    def attend(self, q: Tensor) -> Tensor:
        return attention(q, self.keys, self.values, self.mask)


@EXERCISE.misconception("nothing is written to the cache")
def never_appended(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """Both layers attend to the keys of this step, and nobody appends them. The next step knows nothing of
    the past, and its positions start at 0 again. Append first; what that returns is what both attend to."""
    positions = cache.positions(x.shape[1])
    keys, values = rope(owner.k(x), positions), owner.v(x)
    mask = causal_mask(x.shape[1], x.shape[1])
    queries = (owner.q(x), reader.q(x_r))
    out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
    return out, out_r


@EXERCISE.misconception("the reader appends its own keys too")
def appends_own(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """Keys and values of both layers go into the one cache: twice the memory, and every token stands in it
    twice, the second time at a wrong position. The reader stores nothing; that is the whole point."""
    own = Owner(x, owner, cache, rope)
    positions = cache.positions(own.T)
    keys, values, _ = cache.append(rope(reader.k(x_r), positions), reader.v(x_r))
    q = rope(reader.q(x_r), positions)
    return own.out, attention(q, keys, values, causal_mask(own.T, keys.shape[2]))


@EXERCISE.misconception("the owner's keys appended twice")
def appends_again(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The same keys were appended once for the owner and once more for the reader. The cache counts 2T tokens
    for T, and all that follow stand at wrong positions. The first append has returned what the reader needs:
    keep it."""
    own = Owner(x, owner, cache, rope)
    keys, values, _ = cache.append(own.new_k, own.new_v)
    q = rope(reader.q(x_r), own.positions)
    return own.out, attention(q, keys, values, causal_mask(own.T, keys.shape[2]))


@EXERCISE.misconception("the reader attends to its own keys")
def own_keys(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader projected keys and values of its own and attended to those, which it has for the new tokens
    only: it sees nothing of the past. Its keys and values are the owner's, all of them, from the cache."""
    own = Owner(x, owner, cache, rope)
    q, k = (rope(part, own.positions) for part in (reader.q(x_r), reader.k(x_r)))
    return own.out, attention(q, k, reader.v(x_r), causal_mask(own.T, own.T))


@EXERCISE.misconception("the reader sees the new tokens only")
def new_only(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader attended to the keys that the owner has just made, and not to the past. For a prompt it is
    the same; in decode a token sees only itself. Use what append returned: everything so far."""
    own = Owner(x, owner, cache, rope)
    q = rope(reader.q(x_r), own.positions)
    return own.out, attention(q, own.new_k, own.new_v, causal_mask(own.T, own.T))


@EXERCISE.misconception("the reader goes before the owner has written")
def before_owner(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader read the cache as it stood before this step, so no token sees itself, and a prompt sees
    nothing at all. The owner comes first in the model, and it writes before it attends."""
    T = x.shape[1]
    q = rope(reader.q(x_r), cache.positions(T))
    out = attention(q, cache.k[:, :, : cache.length], cache.v[:, :, : cache.length])
    return Owner(x, owner, cache, rope).out, out


@EXERCISE.misconception("the reader's mask aligned top-left")
def top_left(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader's T queries were taken for the *first* of the S positions (so does SDPA's is_causal=True):
    in decode the new token sees the first key and no other. They are the last: causal_mask(T, S), as for the
    owner."""
    own = Owner(x, owner, cache, rope)
    mask = torch.ones_like(own.mask).tril()
    return own.out, attention(rope(reader.q(x_r), own.positions), own.keys, own.values, mask)


@EXERCISE.misconception("both masks aligned top-left")
def both_top_left(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The T queries of both layers were taken for the *first* of the S positions, as SDPA's is_causal=True
    takes them: in decode the new token sees the first key and no other. They are the last:
    causal_mask(T, S)."""
    own = Owner(x, owner, cache, rope)
    queries = (rope(layer.q(part), own.positions) for layer, part in ((owner, x), (reader, x_r)))
    out, out_r = (attention(q, own.keys, own.values, is_causal=True) for q in queries)
    return out, out_r


@EXERCISE.misconception("is_causal where there is more than one token")
def sometimes_top_left(
    x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope
) -> Outs:
    """SDPA's is_causal=True was used for T > 1. It takes the queries for the *first* of the S positions,
    which is right for a prompt in an empty cache. When several tokens continue what is there, they are the
    last: causal_mask(T, S)."""
    own = Owner(x, owner, cache, rope)
    queries = (rope(layer.q(part), own.positions) for layer, part in ((owner, x), (reader, x_r)))
    out, out_r = (attention(q, own.keys, own.values, is_causal=own.T > 1) for q in queries)
    return out, out_r


@EXERCISE.misconception("no mask for the reader")
def unmasked(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader sees the whole prompt from each of its tokens, later ones too. With one token there is
    nothing to hide, so decode is right; a prompt needs the owner's mask."""
    own = Owner(x, owner, cache, rope)
    return own.out, attention(rope(reader.q(x_r), own.positions), own.keys, own.values)


@EXERCISE.misconception("no mask at all")
def no_mask(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """Both layers see the whole prompt from each of its tokens, later ones too. With one token there is
    nothing to hide; with more, `core.causal_mask(T, S)` hides what comes after each."""
    own = Owner(x, owner, cache, rope)
    out = attention(rope(owner.q(x), own.positions), own.keys, own.values)
    return out, attention(rope(reader.q(x_r), own.positions), own.keys, own.values)


@EXERCISE.misconception("the owner's output for both")
def same_output(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader's output is the owner's. What is shared are keys and values; the reader asks its own
    question, with its own queries from its own input, and gets another answer."""
    own = Owner(x, owner, cache, rope)
    return own.out, own.out


@EXERCISE.misconception("the reader's queries from the owner's input")
def wrong_input(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader's queries were made from x_owner. The reader stands further up in the model and has an input
    of its own, x_reader; only keys and values come from the owner's."""
    own = Owner(x, owner, cache, rope)
    return own.out, own.attend(rope(reader.q(x), own.positions))


@EXERCISE.misconception("the owner's query weights for the reader")
def wrong_weights(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader's queries were made with owner.q. A reader gives up its keys and values and keeps its own
    query projection: reader.q(x_reader)."""
    own = Owner(x, owner, cache, rope)
    return own.out, own.attend(rope(owner.q(x_r), own.positions))


@EXERCISE.misconception("keys used as values")
def keys_as_values(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader weighed the keys, not the values. A key says how well a token fits, and it is turned by its
    position; what is added up are the values."""
    own = Owner(x, owner, cache, rope)
    q = rope(reader.q(x_r), own.positions)
    return own.out, attention(q, own.keys, own.keys, own.mask)


@EXERCISE.misconception("reader and owner the other way round")
def other_way_round(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """Both outputs are right, in the wrong order: the pair is (out_owner, out_reader)."""
    own = Owner(x, owner, cache, rope)
    return own.attend(rope(reader.q(x_r), own.positions)), own.out
