"""06.5: the mistakes that people make with the delta rule."""

from torch import Tensor

from kvlearn.grading.units.linear_attention.delta import EXERCISE

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, Tensor]


def ask(memory: Tensor, k: Tensor) -> Tensor:
    """Sᵀk."""
    return (k[..., None, :] @ memory)[..., 0, :]


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def wide(beta: Tensor) -> Tensor:
    return beta[..., None]


def right(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    memory = memory + outer(k, wide(beta) * (v - ask(memory, k)))
    return ask(memory, q), memory


def done(q: Tensor, memory: Tensor) -> Outs:
    return ask(memory, q), memory


@EXERCISE.misconception("added, and nothing removed")
def added(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """β k vᵀ was added to the memory, as in linear attention. What the memory had under this key is still
    there, and old and new values pile up. The delta rule writes the *error*, v − Sᵀk: what the memory answers
    already is not written again."""
    return done(q, memory + outer(k, wide(beta) * v))


@EXERCISE.misconception("added whole, β not looked at")
def added_whole(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """k vᵀ was added: linear attention, without β and without a look at what is there. The delta rule writes
    β times the error v − Sᵀk."""
    return done(q, memory + outer(k, v))


@EXERCISE.misconception("β on the new value only")
def beta_on_new(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The old value was removed whole, and the share β of the new one written. A small β then empties the
    memory. It is one step on one error: β stands before both, β k (v − Sᵀk)ᵀ."""
    return done(q, memory + outer(k, wide(beta) * v - ask(memory, k)))


@EXERCISE.misconception("β on the old value only")
def beta_on_old(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The share β of the old value was removed, and the new one written whole. So (1 − β) of the old is left
    beside all of the new, and a token with β = 0, which wants to write nothing, writes everything. β stands
    before the whole error: β k (v − Sᵀk)ᵀ."""
    return done(q, memory + outer(k, v - wide(beta) * ask(memory, k)))


@EXERCISE.misconception("β left out")
def no_beta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The whole error was written, as if β were 1. β is the size of the step, chosen by each token for each
    head: with β = 0 the memory stays as it is."""
    return done(q, memory + outer(k, v - ask(memory, k)))


@EXERCISE.misconception("up the gradient, not down")
def ascent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The sign is wrong: the error grew. The gradient of ½|Sᵀk − v|² is k (Sᵀk − v)ᵀ, and descent takes it
    *away*: S − β k (Sᵀk − v)ᵀ, which is S + β k (v − Sᵀk)ᵀ."""
    return done(q, memory - outer(k, wide(beta) * (v - ask(memory, k))))


@EXERCISE.misconception("the loss without its ½")
def no_half(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The step is twice as long: the gradient was that of |Sᵀk − v|². The ½ of the loss is there to cancel
    this 2; with β = 1 and a key of length 1 the value is then replaced, and not overshot."""
    return done(q, memory + outer(k, 2 * wide(beta) * (v - ask(memory, k))))


@EXERCISE.misconception("the loss as a mean over the value")
def mean_loss(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The step is V times too short: the squares were averaged over the V numbers of the value, as a ready
    made squared error does. |…|² is their sum."""
    return done(q, memory + outer(k, wide(beta) * (v - ask(memory, k)) / v.shape[-1]))


@EXERCISE.misconception("the whole memory fades")
def all_fades(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """(1 − β) S + β k vᵀ: all values faded, whatever their key. The delta rule removes only what stands under
    *this* key, β k (Sᵀk)ᵀ; to forget the rest takes a gate, which is another mechanism (gated delta)."""
    return done(q, (1 - beta)[..., None, None] * memory + outer(k, wide(beta) * v))


@EXERCISE.misconception("read before writing")
def reads_first(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The output was read from the old memory, so a token does not see itself. Write first, then read: out =
    Sᵀq with the S that is returned."""
    return ask(memory, q), right(q, k, v, beta, memory)[1]


@EXERCISE.misconception("the old value removed after the writing")
def removed_after(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """First β k vᵀ was written, then the share β of what the memory answers *now* removed. That answer holds
    the new value already, so a part of it goes at once. The error is taken against the memory as it was."""
    memory = memory + outer(k, wide(beta) * v)
    return done(q, memory - outer(k, wide(beta) * ask(memory, k)))


@EXERCISE.misconception("β twice")
def beta_twice(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """β was multiplied in twice, once into the error and once into the step. The step is β k (v − Sᵀk)ᵀ."""
    return done(q, memory + outer(k, wide(beta) ** 2 * (v - ask(memory, k))))


@EXERCISE.misconception("the key normalised inside")
def normalised(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """k was divided by its length. A layer does that to its keys before (else β |k|² may be above 2 and the
    memory explodes), but the step asked for is the gradient with the k that is handed in."""
    return right(q, k / k.norm(dim=-1, keepdim=True), v, beta, memory)


@EXERCISE.misconception("the step divided by |k|²")
def projected(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The step was divided by |k|², so that β = 1 always replaces the value (Kaczmarz' rule, or normalised
    least mean squares). The plain gradient step is longer for a longer key: β k (v − Sᵀk)ᵀ."""
    length = k.square().sum(-1, keepdim=True)
    return done(q, memory + outer(k, wide(beta) * (v - ask(memory, k)) / length))


@EXERCISE.misconception("asked with the query, not with the key")
def asked_by_query(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The old value was read with q: that is what another key holds, and it was taken from this one. What k
    is to replace is what k itself finds, Sᵀk; q only reads the output."""
    return done(q, memory + outer(k, wide(beta) * (v - ask(memory, q))))


@EXERCISE.misconception("the output read with the key")
def read_by_key(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The output is Sᵀk, what has just been written. The question of the token is q: out = Sᵀq."""
    memory = right(q, k, v, beta, memory)[1]
    return ask(memory, k), memory


@EXERCISE.misconception("the query scaled")
def scaled(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The output was divided by √K, as scores are before a softmax. Here there is no softmax; out = Sᵀq."""
    out, memory = right(q, k, v, beta, memory)
    return out * q.shape[-1] ** -0.5, memory


@EXERCISE.misconception("the first head's β for all")
def one_beta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """Every head took head 0's step. β is (B, H): each head of each sequence has its own, and against (B, H,
    V) it needs one more dimension at the end."""
    return right(q, k, v, beta[:, :1].expand_as(beta), memory)


@EXERCISE.misconception("the memory came back transposed")
def transposed(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The memory returned is (B, H, V, K). It came as (B, H, K, V), a row for each feature of the key, and
    the next token expects it so: the outer product is k vᵀ, not v kᵀ."""
    out, memory = right(q, k, v, beta, memory)
    return out, memory.mT.contiguous()


@EXERCISE.misconception("written in place")
def in_place(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The numbers are right, but something that was handed in has changed, most likely the memory (`+=`,
    `copy_`, `add_`): whoever keeps it, to go back or to branch, has lost it, and gradients break. Return new
    tensors."""
    memory += outer(k, wide(beta) * (v - ask(memory, k)))
    return done(q, memory)


@EXERCISE.misconception("the old memory returned")
def not_returned(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Outs:
    """The output knows the new token, the memory returned does not: the next token will not find it. Return
    the memory that was written."""
    return right(q, k, v, beta, memory)[0], memory.clone()
