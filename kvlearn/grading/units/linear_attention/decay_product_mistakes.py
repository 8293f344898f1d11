"""06.4: the mistakes that people make with products of many decays, and with the state at either end."""

import torch
from torch import Tensor

from kvlearn.grading.units.linear_attention.decay_mistakes import EXERCISE, Outs, plain, turns

__all__ = ["EXERCISE"]


def pairs(
    q: Tensor, k: Tensor, v: Tensor, fade: Tensor, from_state: Tensor, to_last: Tensor, state: Tensor
) -> Outs:
    """All at once: ``fade`` (B, H, T, T) of tokens, ``from_state`` (B, H, T) of the state as each reads it,
    ``to_last`` (B, H, T) of tokens in the last state."""
    out = (q @ k.mT * fade) @ v + from_state[..., None] * (q @ state)
    return out, from_state[..., -1, None, None] * state + (to_last[..., None] * k).mT @ v


def distances(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Sums c_t of logarithms, and c_t − c_s with −∞ above the diagonal."""
    c = log_decay.cumsum(-1)
    future = torch.ones(c.shape[-1], c.shape[-1], dtype=torch.bool).triu(1)
    return c, (c[..., :, None] - c[..., None, :]).masked_fill(future, -torch.inf)


@EXERCISE.misconception("decays multiplied up twice")
def cumulated(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The state was multiplied by a_0 ⋯ a_t in step t, in a loop: the products were made by cumsum *and* by
    the loop. In a loop each step has its own a_t alone."""
    return turns(q, k, v, log_decay.cumsum(-1).exp(), state, plain)


@EXERCISE.misconception("the decay of one token for the whole distance")
def one_factor(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Everything a token reads was multiplied by its own a_t, once, however long ago it was written. Decays
    multiply up: a_{s+1} ⋯ a_t, one factor for each token in between."""
    past = torch.ones(q.shape[2], q.shape[2]).tril(-1)
    fade = log_decay.exp()[..., None] * past + torch.eye(q.shape[2])
    a = log_decay.exp()
    to_last = torch.cat((a[..., -1:].expand_as(a)[..., 1:], torch.ones_like(a[..., :1])), -1)
    return pairs(q, k, v, fade, a, to_last, state)


@EXERCISE.misconception("powers of one decay")
def powers(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The reading token's own decay was raised to the distance, a_t^(t − s), as if all tokens had the same.
    That holds for retention, where a head has one decay for good; here each token has its own, and the
    product runs over those in between."""
    T = q.shape[2]
    steps = torch.arange(T)[:, None] - torch.arange(T)
    fade = (log_decay[..., None] * steps.clamp(min=0)).exp().tril()
    from_state = (log_decay * torch.arange(1, T + 1)).exp()
    return pairs(q, k, v, fade, from_state, fade[..., -1, :], state)


@EXERCISE.misconception("faded by the products from the beginning")
def from_beginning(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Token s was faded by a_0 ⋯ a_s, the decays *before* it, so the newest fades most. What was written at s
    fades by what comes after: a_{s+1} ⋯ a_t = exp(c_t − c_s)."""
    c, _ = distances(log_decay)
    fade = c.exp()[..., None, :].expand(*c.shape, c.shape[-1]).tril()
    return pairs(q, k, v, fade, c.exp(), c.exp(), state)


@EXERCISE.misconception("a factor too many for each pair")
def own_factor(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Among the pairs token s has faded by a_s as well, and so has the token itself, on the diagonal: sums of
    logarithms that start one place too early. It is a_{s+1} ⋯ a_t = exp(c_t − c_s), and 1 on the diagonal."""
    c, d = distances(log_decay)
    return pairs(q, k, v, (d + log_decay[..., None, :]).exp(), c.exp(), (c[..., -1:] - c).exp(), state)


@EXERCISE.misconception("the distances with the wrong sign")
def wrong_sign(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Pairs were weighed with exp(c_s − c_t), or with sums made from the end: what is long past grows instead
    of fading. It is exp(c_t − c_s), t down and s across."""
    c, d = distances(log_decay)
    return pairs(q, k, v, (-d).exp().tril(), c.exp(), (c[..., -1:] - c).exp(), state)


@EXERCISE.misconception("the state handed in not read")
def state_unread(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The state returned is right, but no output has read what was handed in: qᵀS, faded by a_0 ⋯ a_t, is
    missing from the sum."""
    c, d = distances(log_decay)
    out, _ = pairs(q, k, v, d.exp(), c.exp(), (c[..., -1:] - c).exp(), torch.zeros_like(state))
    return out, turns(q, k, v, log_decay.exp(), state, plain)[1]


@EXERCISE.misconception("the state handed in left out")
def state_ignored(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The recurrence began with zeros: what was handed in is not in the outputs nor in the last state. A text
    that goes on would have forgotten its beginning."""
    return turns(q, k, v, log_decay.exp(), torch.zeros_like(state), plain)


@EXERCISE.misconception("the state handed in does not fade")
def state_kept(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Tokens fade, but what was handed in was added undiminished to every output and to the last state. It is
    the past like everything else: by token t it has faded by a_0 ⋯ a_t."""
    c, d = distances(log_decay)
    return pairs(q, k, v, d.exp(), torch.ones_like(c), (c[..., -1:] - c).exp(), state)


@EXERCISE.misconception("the state handed in fades one step late")
def state_late(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The first token reads the state handed in unfaded, the second faded by a_0, and so on: a factor is
    missing. a_0 falls on it before the first read."""
    c, d = distances(log_decay)
    out, last = pairs(q, k, v, d.exp(), (c - log_decay).exp(), (c[..., -1:] - c).exp(), state)
    return out, last + (c[..., -1].exp() - (c - log_decay)[..., -1].exp())[..., None, None] * state


@EXERCISE.misconception("quotients of products")
def quotients(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """a_{s+1} ⋯ a_t was made as (a_0 ⋯ a_t) / (a_0 ⋯ a_s). That is right on paper; but after some tokens both
    products have underflowed, and 0 / 0 or 0 · ∞ is NaN. Subtract the sums of logarithms first, then exp."""
    product = log_decay.exp().cumprod(-1)
    fade = (product[..., :, None] / product[..., None, :]).tril()
    return pairs(q, k, v, fade, product, product[..., -1:] / product, state)


@EXERCISE.misconception("queries and keys faded apart")
def apart(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Queries were multiplied by a_0 ⋯ a_t and keys by 1 / (a_0 ⋯ a_s): right on paper, and a good trick
    inside short chunks. But with strong decay the first underflows and the second overflows, and 0 · ∞ is
    NaN. Subtract the sums of logarithms first, then exp."""
    c = log_decay.cumsum(-1)
    near, far = q * c.exp()[..., None], k * (-c).exp()[..., None]
    last = c[..., -1].exp()[..., None, None]
    return (near @ far.mT).tril() @ v + near @ state, last * (state + far.mT @ v)


@EXERCISE.misconception("hidden by a factor, after exp")
def hidden_late(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The future was hidden by multiplying with 0 after exp. Above the diagonal c_t − c_s is positive, exp of
    it overflows, and ∞ · 0 is NaN. Set it to −∞ before exp."""
    c = log_decay.cumsum(-1)
    seen = torch.ones(c.shape[-1], c.shape[-1]).tril()
    fade = (c[..., :, None] - c[..., None, :]).exp() * seen
    return pairs(q, k, v, fade, c.exp(), (c[..., -1:] - c).exp(), state)


@EXERCISE.misconception("the future not hidden")
def unmasked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """exp(c_t − c_s) was used for all pairs. For s > t that is more than 1: tokens to come are seen, and
    amplified. Set c_t − c_s to −∞ above the diagonal."""
    c = log_decay.cumsum(-1)
    fade = (c[..., :, None] - c[..., None, :]).exp()
    return pairs(q, k, v, fade, c.exp(), (c[..., -1:] - c).exp(), state)


@EXERCISE.misconception("a last state that has not faded")
def last_unfaded(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The outputs are right, but the state that is handed on is the plain sum of k vᵀ and what was there.
    In it token s has faded by a_{s+1} ⋯ a_{T−1} = exp(c_{T−1} − c_s), the state handed in by all decays."""
    return turns(q, k, v, log_decay.exp(), state, plain)[0], state + k.mT @ v


@EXERCISE.misconception("a last state without the state handed in")
def last_without(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The outputs are right, but the state that is handed on holds the tokens of this text alone. What was
    handed in is still there, faded by all decays."""
    out, _ = turns(q, k, v, log_decay.exp(), state, plain)
    return out, turns(q, k, v, log_decay.exp(), torch.zeros_like(state), plain)[1]


@EXERCISE.misconception("one head's decay for all")
def first_head(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """All heads faded by the first one's decays. log_decay is (B, H, T): each head of each sequence has its
    own."""
    return turns(q, k, v, log_decay[:, :1].expand_as(log_decay).exp(), state, plain)


@EXERCISE.misconception("an input changed in place")
def in_place(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The numbers are right, but something that was handed in has changed, most likely the state (`*=`,
    `+=`). Make new tensors: `state = a * state + …`."""

    def turn(q: Tensor, a: Tensor, wrote: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state *= a
        state += wrote
        return state, state

    return turns(q, k, v, log_decay.exp(), state, turn)
