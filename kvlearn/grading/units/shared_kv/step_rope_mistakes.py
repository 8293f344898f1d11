"""02.7: the mistakes that people make with the positions of two layers on one cache."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from kvlearn.attention import KVCache, Rope
from kvlearn.grading.units.shared_kv.step import EXERCISE, Layer
from kvlearn.grading.units.shared_kv.step_mistakes import Outs, Owner, causal_mask

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the reader's positions start at 0")
def from_zero(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader's queries were turned to positions 0 … T − 1. For a prompt that is right, and from then on
    every new token asks as if it stood at the start. The reader has no cache to count with: it takes the
    owner's positions."""
    own = Owner(x, owner, cache, rope)
    return own.out, own.attend(rope(reader.q(x_r), torch.arange(own.T)[None]))


@EXERCISE.misconception("all positions start at 0")
def all_from_zero(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """Queries and keys of every step were turned to positions 0 … T − 1, so in decode every token seems to
    stand at the start. The first step is right, which hides it. Count from what the cache holds:
    cache.positions(T)."""
    positions = torch.arange(x.shape[1])[None]
    keys, values, _ = cache.append(rope(owner.k(x), positions), owner.v(x))
    mask = causal_mask(x.shape[1], keys.shape[2])
    queries = (owner.q(x), reader.q(x_r))
    out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
    return out, out_r


@EXERCISE.misconception("values turned too")
def turned_values(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The values were turned to their positions like the keys. Turning serves the scores, where only the
    distance of query and key remains; values are added up as they are."""
    positions = cache.positions(x.shape[1])
    keys, values, _ = cache.append(rope(owner.k(x), positions), rope(owner.v(x), positions))
    mask = causal_mask(x.shape[1], keys.shape[2])
    queries = (owner.q(x), reader.q(x_r))
    out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
    return out, out_r


@EXERCISE.misconception("positions asked for after the append")
def after_append(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """cache.positions(T) was called again for the reader. By then the owner has appended, so it tells where
    the *next* tokens will stand, T too far on. Ask once, before the append, and use the answer for both."""
    own = Owner(x, owner, cache, rope)
    return own.out, own.attend(rope(reader.q(x_r), cache.positions(own.T)))


@EXERCISE.misconception("cached keys turned again")
def turned_twice(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader turned the cached keys once more. They were turned when they were written, and position m
    has become 2m, so all distances are wrong. Only the reader's queries need turning."""
    own = Owner(x, owner, cache, rope)
    S = own.keys.shape[2]
    keys = rope(own.keys, torch.arange(S)[None])
    return own.out, attention(rope(reader.q(x_r), own.positions), keys, own.values, own.mask)


@EXERCISE.misconception("the reader's queries not turned")
def not_turned(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The reader's queries went in as they were projected. The keys carry their positions, and a query
    without its own asks as if from position 0: turn it by the owner's positions."""
    own = Owner(x, owner, cache, rope)
    return own.out, own.attend(reader.q(x_r))


@EXERCISE.misconception("keys stored without their positions")
def unturned_keys(x: Tensor, x_r: Tensor, owner: Layer, reader: Layer, cache: KVCache, rope: Rope) -> Outs:
    """The owner appended its keys before turning them, and both layers turned queries only. Then a score
    depends on the query's position and not on the distance. Turn k as well, before the append."""
    positions = cache.positions(x.shape[1])
    keys, values, _ = cache.append(owner.k(x), owner.v(x))
    mask = causal_mask(x.shape[1], keys.shape[2])
    queries = (owner.q(x), reader.q(x_r))
    out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
    return out, out_r
