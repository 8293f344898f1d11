"""Unit 06: requirements and hints of the exercises on linear attention and its relatives."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Stop,
    describe,
    largest_new_tensor,
    new_tensors,
    plain_number,
)

QKV = tuple[Tensor, Tensor, Tensor]


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1 in fp64, and exact where x is far below 0."""
    x = x.double()
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def outer(k: Tensor, v: Tensor) -> Tensor:
    """The write of one token (B, H, K), (B, H, V): (B, H, K, V)."""
    return k[..., :, None] * v[..., None, :]


def averages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with its normaliser, one token at a time; 0 where all weights are 0."""
    features, out = phi(k), torch.zeros(v.shape, dtype=torch.float64)
    for i in range(q.shape[2]):
        weights = (features[:, :, : i + 1] * phi(q[:, :, i : i + 1])).sum(-1, keepdim=True)
        total = weights.sum(2)
        sums = (weights * v[:, :, : i + 1].double()).sum(2)
        out[:, :, i] = torch.where(total > 0, sums / total, 0)
    return out.to(v.dtype)


def sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_{s ≤ t} (q_t · k_s) v_s one token at a time, and the state behind the last: Σ k_s v_sᵀ."""
    dtype = v.dtype
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        weights = (k[:, :, : i + 1] * q[:, :, i : i + 1]).sum(-1, keepdim=True)
        out[:, :, i] = (weights * v[:, :, : i + 1]).sum(2)
    return out.to(dtype), outer(k, v).sum(2).to(dtype)


def faded(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_tᵀ as it is written: fade, write, read."""
    dtype = v.dtype
    q, k, v, a, memory = q.double(), k.double(), v.double(), log_decay.double().exp(), state.double()
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        memory = a[:, :, i, None, None] * memory + outer(k[:, :, i], v[:, :, i])
        out[:, :, i] = (q[:, :, i, :, None] * memory).sum(2)
    return out.to(dtype), memory.to(dtype)


def draw(t: CheckContext, n_tokens: int, square: bool = True) -> QKV:
    """Queries, keys and values; as many numbers in a key as in a value only where ``square``."""
    B, H, K = t.pick(2, 3), t.pick(5, 7), t.pick(8, 10, 12)
    V = K if square else K + t.pick(-2, 1, 4)
    return t.randn(B, H, n_tokens, K), t.randn(B, H, n_tokens, K), t.randn(B, H, n_tokens, V)


def tensors(t: CheckContext, got: Any, names: str) -> list[Tensor]:
    """The returned value, split into as many tensors as ``names`` lists, or the end of this round."""
    n = names.count(",") + 1
    if isinstance(got, tuple | list) and len(got) == n and all(isinstance(part, Tensor) for part in got):
        return list(got)
    t.note(got, Difference("", f"{n} tensors, ({names})", describe(got)))
    raise Stop


# 06.1: linear attention in its quadratic form, compared with weights that are summed token by token

features = Exercise(
    id="06.1",
    slug="features",
    title="Feature map and normaliser",
    answers=("linear_attention",),
    hints=(
        "Two lines make the weights: `F.elu(q) + 1` and `F.elu(k) + 1` in place of q and k, and their "
        "product, (B, H, T, T). Values have no feature map, and nothing is scaled.",
        "Hide the future with zeros: `weights.tril()`. Minus infinity is for scores that go into a softmax; "
        "here the numbers are weights already.",
        "The normaliser of token t is the sum of *its* weights, after hiding: "
        "`weights.sum(dim=-1, keepdim=True)`. What comes later is not in it.",
        "Far below 0 elu(x) + 1 is exactly 0. Then all weights of a token may be 0, and 0 / 0 is NaN: "
        "divide by `total.masked_fill(total == 0, 1)`, and the output is 0 there. A small number that is "
        "added to every total would change the averages whose weights are small.",
    ),
)


UNDERFLOW = -2000.0  # φ of it is 0, in fp64 as well


@features.requirement(1, "an average of values")
def average(t: CheckContext, linear_attention: Answer) -> None:
    """values that are all alike come back as they are, since the weights of a token sum to 1, small ones as
    well; one token alone gives its own value; queries and keys that are all −8, −12 or −15 weigh every token
    alike"""
    q, k, v = draw(t, 1 if t.round == 1 else t.integer(4, 7))
    v = v[:, :, :1].expand_as(v).clone()
    low = 2 + torch.rand(*q.shape, generator=t.generator) if t.round else 0  # sums of weights far below 1
    t.close(linear_attention(q - low, k - low, v), v)
    # Weights from 1e-7 down to 1e-13: all alike, so the outputs are means, and rounding decides nothing.
    depth, values = (-8.0, -12.0, -15.0)[t.round], t.randn(*v.shape)
    means = values.cumsum(2) / torch.arange(1, v.shape[2] + 1)[:, None]
    t.close(linear_attention(torch.full_like(q, depth), torch.full_like(k, depth), values), means)


@features.requirement(2, "the weights")
def weights(t: CheckContext, linear_attention: Answer) -> None:
    """φ(q)·φ(k), divided by their sum up to the token itself, φ = elu + 1; (B, H, T, V), and the inputs are
    unchanged afterwards"""
    q, k, v = draw(t, t.integer(5, 9), square=t.round == 0)
    t.close(linear_attention(q, k, v), averages(q, k, v))
    t.unchanged()


@features.requirement(1, "the past, and not the future")
def causal(t: CheckContext, linear_attention: Answer) -> None:
    """what a token gives depends on every token before it, and on none after it: neither weights nor
    normaliser"""
    n, later = t.integer(3, 5), t.integer(2, 4)
    q, k, v = draw(t, n + later)
    one = linear_attention(q, k, v)
    if not t.shape(one, tuple(v.shape)):
        raise Stop
    for x in (q, k, v):
        x[:, :, n:] = t.randn(*x[:, :, n:].shape)
    t.close(linear_attention(q, k, v)[:, :, :n], one[:, :, :n], "with other tokens to come:")
    v[:, :, 0] += 10
    moved = (linear_attention(q, k, v)[:, :, 1:n] - one[:, :, 1:n]).abs().amax()
    t.true(float(moved) > 1e-3, "outputs that change with the first value", "outputs as before")


@features.requirement(1, "large queries and keys")
def features_large(t: CheckContext, linear_attention: Answer) -> None:
    """numbers up to about ±100: the same weights, no overflow"""
    q, k, v = draw(t, t.integer(5, 8), square=t.round == 0)
    q, k = 30 * q, 30 * k
    for x in (q, k):
        x[..., 0] = x[..., 0].abs() + 1  # so that no sum of weights is small, and rounding decides nothing
    t.close(linear_attention(q, k, v), averages(q, k, v))


@features.requirement(1, "no key has any weight")
def empty(t: CheckContext, linear_attention: Answer) -> None:
    """the output is 0, not NaN, where φ of all keys so far is 0, or φ of the query; the other tokens are
    right as ever"""
    n = t.integer(2, 3)
    q, k, v = draw(t, n + t.integer(3, 5))
    k[:, :, :n] = UNDERFLOW
    q[:, :, n + 1] = UNDERFLOW
    t.close(linear_attention(q, k, v), averages(q, k, v))


# 06.2: one token through a memory and its normaliser, compared with sums over all tokens so far

recurrent = Exercise(
    id="06.2",
    slug="recurrent",
    title="From parallel to recurrent",
    answers=("linear_step",),
    hints=(
        "Write first, then read: the new token sees itself. Both the memory and the normaliser take it in "
        "before the output is made.",
        "φ(k) as a column, the value as a row: `phi_k[..., :, None] * v[..., None, :]` is (B, H, K, V), what "
        "this token writes. `memory + …` makes a new tensor, `memory += …` changes the one you were given.",
        "Reading sums over the features: `(phi_q[..., :, None] * memory).sum(dim=-2)` is (B, H, V), and "
        "`(phi_q * normaliser).sum(dim=-1, keepdim=True)` is (B, H, 1), what to divide by.",
        "Return (out, memory, normaliser): the sums go on undivided, and the division happens on the way "
        "out only.",
    ),
)


RECURRENT_NAMES = "out, memory, normaliser"


class State(NamedTuple):
    """One token and the past that it meets, as the answer is handed it."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: Tensor
    normaliser: Tensor


def meet(t: CheckContext, n_past: int, square: bool = True) -> State:
    """The last of ``n_past`` + 1 tokens, and the sums over those before it."""
    q, k, v = draw(t, n_past + 1, square)
    memory = outer(phi(k[:, :, :-1]), v[:, :, :-1].double()).sum(2)
    return State(q[:, :, -1], k[:, :, -1], v[:, :, -1], memory.float(), phi(k[:, :, :-1]).sum(2).float())


def recurrent_written(state: State) -> tuple[Tensor, Tensor]:
    """Memory and normaliser with the new token in them, in fp64."""
    memory = state.memory.double() + outer(phi(state.k), state.v.double())
    return memory, state.normaliser.double() + phi(state.k)


def recurrent_run(t: CheckContext, answer: Answer, state: State) -> list[Tensor]:
    return tensors(t, answer(*state), RECURRENT_NAMES)


@recurrent.requirement(1, "the first token")
def recurrent_first(t: CheckContext, linear_step: Answer) -> None:
    """behind an empty memory the output is the token's own value: all the weight is on itself, also where
    that is small"""
    state = meet(t, 0, square=t.round == 0)
    if t.round == 2:  # features far below 1
        state = state._replace(q=-state.q.abs() - 9, k=-state.k.abs() - 9)
    t.close(recurrent_run(t, linear_step, state)[0], state.v, "out:")


@recurrent.requirement(1, "the new memory")
def memory(t: CheckContext, linear_step: Answer) -> None:
    """S + φ(k) vᵀ, (B, H, K, V): features down, the numbers of a value across"""
    state = meet(t, t.integer(3, 6), square=t.round < 2)
    t.close(recurrent_run(t, linear_step, state)[1], recurrent_written(state)[0].float(), "memory:")


@recurrent.requirement(1, "the new normaliser")
def normaliser(t: CheckContext, linear_step: Answer) -> None:
    """z + φ(k), (B, H, K)"""
    state = meet(t, t.integer(3, 6), square=t.round < 2)
    t.close(recurrent_run(t, linear_step, state)[2], recurrent_written(state)[1].float(), "normaliser:")


@recurrent.requirement(1, "the output")
def recurrent_output(t: CheckContext, linear_step: Answer) -> None:
    """Sᵀφ(q) / (z·φ(q)) with the new token in both, (B, H, V)"""
    state = meet(t, t.integer(3, 6), square=t.round < 2)
    (S, z), f = recurrent_written(state), phi(state.q)
    want = (f[..., :, None] * S).sum(-2) / (f * z).sum(-1, keepdim=True)
    t.close(recurrent_run(t, linear_step, state)[0], want.float(), "out:")


@recurrent.requirement(1, "what was handed in stays as it is")
def two_ways(t: CheckContext, linear_step: Answer) -> None:
    """two tokens that go on from the same past leave memories that differ by what they wrote; the tensors
    handed in are unchanged"""
    state = meet(t, t.integer(2, 4))
    other = state._replace(k=t.randn(*state.k.shape), v=t.randn(*state.v.shape))
    _, one, _ = recurrent_run(t, linear_step, state)
    _, two, _ = recurrent_run(t, linear_step, other)
    want = recurrent_written(state)[0] - recurrent_written(other)[0]
    if t.shape(one, tuple(want.shape), "memory:") and t.shape(two, tuple(want.shape), "memory:"):
        t.close(one - two, want.float(), "the difference of the memories:")
    t.unchanged()


@recurrent.requirement(1, "a text, token by token", rounds=2)
def recurrent_text(t: CheckContext, linear_step: Answer) -> None:
    """from an empty memory on, each step handed what the one before returned: the outputs are those of
    attention over all tokens at once"""
    q, k, v = draw(t, t.integer(12, 20), square=t.round == 0)
    memory: Any = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    normaliser: Any = torch.zeros(*k.shape[:2], k.shape[3])
    outs = []
    for i in range(q.shape[2]):
        given = State(q[:, :, i], k[:, :, i], v[:, :, i], memory, normaliser)
        out, memory, normaliser = recurrent_run(t, linear_step, given)
        outs.append(out)
    if all(t.shape(out, (*v.shape[:2], v.shape[3]), "out:") for out in outs):
        t.close(torch.stack(outs, 2), averages(q, k, v), "all outputs:")


# 06.3: linear attention chunk after chunk, compared with sums made token by token

chunked = Exercise(
    id="06.3",
    slug="chunked",
    title="The chunked form and its boundary",
    answers=("chunked_attention",),
    hints=(
        "Go from chunk to chunk; `zip(q.split(chunk, dim=2), k.split(chunk, dim=2), v.split(chunk, dim=2))` "
        "gives the pieces, and the last is shorter by itself. Start with a state of zeros, (B, H, K, V).",
        "An output has two parts: what the state of all earlier chunks gives, `q @ state`, and what the own "
        "chunk gives up to the token itself, `(q @ k.transpose(-2, -1)).tril() @ v`.",
        "The state moves on *after* both parts are made: `state = state + k.transpose(-2, -1) @ v`. If it "
        "held the own chunk already, each of its tokens would count twice, and later ones would be seen.",
        "Put the outputs together with `torch.cat(outs, dim=2)`. The state behind the last chunk is the "
        "second thing to return.",
    ),
)


CHUNKED_NAMES = "out, state"


def chunked_run(t: CheckContext, answer: Answer, qkv: tuple[Tensor, ...], chunk: int) -> list[Tensor]:
    return tensors(t, answer(*qkv, chunk), CHUNKED_NAMES)


def same_outputs(
    t: CheckContext, answer: Answer, n_tokens: int, chunk: int, square: bool, when: str = ""
) -> None:
    qkv = draw(t, n_tokens, square)
    t.close(chunked_run(t, answer, qkv, chunk)[0], sums(*qkv)[0], f"out{when}:", tolerance=3e-4)


@chunked.requirement(1, "inside a chunk")
def inside(t: CheckContext, chunked_attention: Answer) -> None:
    """a text of just one chunk, maybe of one token: Σ (q_t·k_s) v_s over s ≤ t; the inputs are unchanged
    afterwards"""
    n = 1 if t.round == 1 else t.integer(4, 7)
    same_outputs(t, chunked_attention, n, n, square=True)
    t.unchanged()


@chunked.requirement(2, "across chunks")
def across(t: CheckContext, chunked_attention: Answer) -> None:
    """out, (B, H, T, V), where T is a multiple of the chunk: the own chunk up to the token itself, and every
    chunk before it"""
    chunk = t.integer(3, 5)
    same_outputs(t, chunked_attention, t.integer(4, 5) * chunk, chunk, square=t.round < 2)


@chunked.requirement(1, "a chunk that does not divide T")
def uneven(t: CheckContext, chunked_attention: Answer) -> None:
    """the last chunk is shorter, and nothing is lost or added; T may be less than one chunk, and a chunk may
    be one token"""
    chunk = t.integer(4, 6)
    n = t.integer(3, 4)
    same_outputs(t, chunked_attention, n * chunk - t.integer(1, chunk - 2), chunk, t.round < 2)
    same_outputs(t, chunked_attention, chunk - 2, chunk, True, ", T less than the chunk")
    same_outputs(t, chunked_attention, n, 1, True, ", chunk = 1")


@chunked.requirement(1, "the last state")
def chunked_state(t: CheckContext, chunked_attention: Answer) -> None:
    """Σ k_s v_sᵀ over all tokens, (B, H, K, V), whatever the chunk"""
    chunk = t.integer(3, 5)
    for n_tokens, when in (
        (4 * chunk, ""),
        (4 * chunk - 2, ", a shorter last chunk"),
        (chunk, ", one chunk"),
    ):
        qkv = draw(t, n_tokens, square=t.round < 2)
        t.close(
            chunked_run(t, chunked_attention, qkv, chunk)[1], sums(*qkv)[1], f"state{when}:", tolerance=3e-4
        )


@chunked.requirement(1, "no square of the text, and no loop over tokens", rounds=1)
def no_square(t: CheckContext, chunked_attention: Answer) -> None:
    """a longer text, T = 32 chunks of 8 and a bit: the same outputs, and no T·T numbers are made, neither at
    once nor piece by piece (all tensors on the way together have fewer than T·T/4); with chunks of 32 fewer
    than T tensors are made, since a chunk is worked out at once and not token by token"""
    chunk = 8
    T = 32 * chunk + t.integer(1, 3)
    qkv = tuple(t.randn(1, 1, T, n) / 2 for n in (2, 2, 1))
    with new_tensors() as made:
        out = chunked_run(t, chunked_attention, qkv, chunk)[0]
    t.close(out, sums(*qkv)[0], "out:", tolerance=3e-4)
    largest, together = largest_new_tensor(made), sum(one.numel for one in made)
    if largest.numel >= T * T:
        came = f"{largest.op} made one of shape {largest.shape}; T = {T}"
        t.note("square", Difference("", f"fewer than {T * T:,} numbers in any tensor", came))
    elif together >= T * T / 4:
        came = f"{together:,}; the largest, by {largest.op}, has shape {largest.shape}; T = {T}"
        side = max(largest.shape)  # of the largest product, which tells how the text was cut
        kind = "blocks" if side == -(-T // chunk) else "strips" if side > T / 2 else "another size"
        t.note(kind, Difference("", f"fewer than {T * T // 4:,} numbers in all tensors together", came))
    else:
        whole_chunks(t, chunked_attention, 32)


def whole_chunks(t: CheckContext, chunked_attention: Answer, chunk: int) -> None:
    """Some operations for each chunk are fewer than one for each token."""
    T = 4 * chunk + t.integer(1, 3)
    qkv = tuple(t.randn(1, 1, T, n) / 4 for n in (2, 2, 1))
    with new_tensors() as made:
        chunked_run(t, chunked_attention, qkv, chunk)
    if len(made) >= T:
        came = f"{len(made):,} tensors for T = {T} in chunks of {chunk}"
        t.note("token by token", Difference("", f"fewer than {T} tensors made", came))


# 06.4: a state that fades, compared with the recurrence as it is written

decay = Exercise(
    id="06.4",
    slug="decay",
    title="A state that fades",
    answers=("decayed_attention",),
    hints=(
        "The simplest answer is a loop over the tokens that does what the equation says, in this order: "
        "fade the state, write the token, read. `a = log_decay.exp()`, and token t's is "
        "`a[:, :, t, None, None]`.",
        "What token t writes is not faded in the same step: the decay of t is for what was there before. It "
        "does apply to the state that was handed in, from the first token on.",
        "All at once: token s has faded by a_{s+1} ⋯ a_t when t reads it. With "
        "`c = log_decay.cumsum(dim=-1)` that is exp(c_t − c_s), a (T, T) matrix, 1 on the diagonal; the "
        "state has faded by exp(c_t), and in the last state token s by exp(c_{T−1} − c_s).",
        "Never divide products of decays: exp(c_t) / exp(c_s) is 0 / 0 as soon as both underflow. Subtract "
        "first, then exp. Above the diagonal c_t − c_s is positive and may overflow: set it to −∞ *before* "
        "exp, for inf · 0 is NaN.",
    ),
)


DECAY_NAMES = "out, state"
DecayGiven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def given(t: CheckContext, n_tokens: int, square: bool = True) -> DecayGiven:
    """A text with decays between 0.2 and 0.95, no two alike, and a state that it meets."""
    q, k, v = draw(t, n_tokens, square)
    decay = 0.2 + 0.75 * torch.rand(q.shape[:3], generator=t.generator)
    return q, k, v, decay.log(), 2 * t.randn(*q.shape[:2], k.shape[3], v.shape[3])


def decay_run(t: CheckContext, answer: Answer, text: DecayGiven) -> list[Tensor]:
    return tensors(t, answer(*text), DECAY_NAMES)


@decay.requirement(1, "one token")
def single(t: CheckContext, decayed_attention: Answer) -> None:
    """the state fades, the token is written, and then it is read: out and the new state"""
    text = given(t, 1, square=t.round < 2)
    out, state = decay_run(t, decayed_attention, text)
    want = faded(*text)
    t.close(out, want[0], "out:", tolerance=3e-4)
    t.close(state, want[1], "state:", tolerance=3e-4)


@decay.requirement(2, "tokens fade from one another")
def decay_tokens(t: CheckContext, decayed_attention: Answer) -> None:
    """out, (B, H, T, V), behind a state of zeros: token s has faded by a_{s+1} ⋯ a_t when t reads it, and the
    token itself not at all"""
    q, k, v, log_decay, state = given(t, t.integer(5, 9), square=t.round < 2)
    text = (q, k, v, log_decay, torch.zeros_like(state))
    t.close(decay_run(t, decayed_attention, text)[0], faded(*text)[0], "out:", tolerance=3e-4)


@decay.requirement(1, "the state that was there")
def handed_in(t: CheckContext, decayed_attention: Answer) -> None:
    """with values of 0 all that is read comes from the state handed in: it has faded by a_0 ⋯ a_t; the inputs
    are unchanged afterwards"""
    q, k, v, log_decay, state = given(t, t.integer(4, 7), square=t.round < 2)
    text = (q, k, torch.zeros_like(v), log_decay, state)
    t.close(decay_run(t, decayed_attention, text)[0], faded(*text)[0], "out:", tolerance=3e-4)
    t.unchanged()


@decay.requirement(1, "the state behind the last token")
def handed_on(t: CheckContext, decayed_attention: Answer) -> None:
    """(B, H, K, V), so that a text may go on from it: token s has faded by a_{s+1} ⋯ a_{T−1}, the state
    handed in by all decays"""
    text = given(t, t.integer(4, 7), square=t.round < 2)
    t.close(decay_run(t, decayed_attention, text)[1], faded(*text)[1], "state:", tolerance=3e-4)


@decay.requirement(1, "strong decay")
def strong(t: CheckContext, decayed_attention: Answer) -> None:
    """40 tokens with log decays of −50 or so, and some of nearly 0 among them: finite and right; products
    that underflow are 0"""
    q, k, v, log_decay, state = given(t, 40)
    # Multiples of 1/8, so that sums of them are exact in fp32 and rounding decides nothing.
    log_decay = torch.full_like(log_decay, -50.0)
    if t.round:
        kind = torch.rand(log_decay.shape, generator=t.generator)
        log_decay = torch.where(kind < 0.6, -0.125, torch.where(kind < 0.8, 0.0, log_decay))
    log_decay[:, :, 20:] = torch.minimum(log_decay[:, :, 20:], torch.tensor(-0.125))
    log_decay[:, :, 8:20] = -50.0
    text = (q, k, v, log_decay, state)
    out, last = decay_run(t, decayed_attention, text)
    want = faded(*text)
    t.close(out, want[0], "out:", tolerance=3e-4)
    t.close(last, want[1], "state:", tolerance=3e-4)


# 06.5: the delta rule as one step of gradient descent, compared with autograd, head by head

delta = Exercise(
    id="06.5",
    slug="delta",
    title="The delta rule as online regression",
    answers=("delta_step",),
    hints=(
        "First ask the memory: Sᵀk is what it answers to the key today, (B, H, V). The error is v − Sᵀk.",
        "The gradient of ½|Sᵀk − v|² in S is the outer product k (Sᵀk − v)ᵀ, of shape (K, V). A step of "
        "gradient *descent* of size β takes β times that away: S + β k (v − Sᵀk)ᵀ.",
        "β has the shape (B, H): give it dimensions at the end. Products with unsqueezed dimensions do it "
        "all: `(memory * k[..., None]).sum(-2)` is Sᵀk, and `k[..., None] * error[..., None, :]` the outer "
        "product.",
        "Read last, and from the new memory, with q: out = Sᵀq. Return the new memory as a tensor of its "
        "own: `memory = memory + …`, not `memory += …`.",
    ),
)


DeltaGiven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, beta, memory
PARTS = "two tensors, (out, memory)"


def delta_draw(t: CheckContext, *, unit: bool = False) -> DeltaGiven:
    """Inputs of fresh sizes; no two of B, H, K and V are equal."""
    B, H, K, V = 2, t.pick(3, 5), t.pick(6, 8, 12), t.pick(7, 9, 14)
    q, k, v, memory = t.randn(B, H, K), t.randn(B, H, K), t.randn(B, H, V), t.randn(B, H, K, V)
    beta = 0.1 + 0.8 * t.randn(B, H).sigmoid()
    return q, (k / k.norm(dim=-1, keepdim=True) if unit else k), v, beta, memory


def descend(k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """The new memory: the gradient of the loss by autograd in float64, for one head after the other."""
    new = memory.double().clone()
    for b in range(len(memory)):
        for h in range(memory.shape[1]):
            with torch.enable_grad():
                S = memory[b, h].double().requires_grad_()
                loss = ((S.T @ k[b, h].double() - v[b, h].double()) ** 2).sum() / 2
                new[b, h] -= float(beta[b, h]) * torch.autograd.grad(loss, S)[0]
    return new.to(memory.dtype)


def read(q: Tensor, memory: Tensor) -> Tensor:
    """Sᵀq, head by head in float64."""
    pairs = zip(memory.double().flatten(0, 1), q.double().flatten(0, 1), strict=True)
    return torch.stack([S.T @ one for S, one in pairs]).to(q.dtype).unflatten(0, q.shape[:2])


def delta_written(t: CheckContext, answer: Answer, given: DeltaGiven) -> None:
    _, memory = t.pair(answer(*given), PARTS)
    t.close(memory, descend(*given[1:]), "memory:")


@delta.requirement(1, "two new tensors")
def delta_form(t: CheckContext, delta_step: Answer) -> None:
    """out (B, H, V) and memory (B, H, K, V) in the dtype of the inputs, and the inputs as they were before"""
    given = delta_draw(t)
    out, memory = t.pair(delta_step(*given), PARTS)
    t.form(out, tuple(given[2].shape), torch.float32)
    t.form(memory, tuple(given[4].shape), torch.float32)
    t.unchanged()


@delta.requirement(1, "what the memory knows already")
def known(t: CheckContext, delta_step: Answer) -> None:
    """where Sᵀk is v, there is no error and no gradient: the memory stays as it is"""
    q, k, _, beta, memory = delta_draw(t)
    _, new = t.pair(delta_step(q, k, read(k, memory), beta, memory), PARTS)
    t.close(new, memory, "memory:")


@delta.requirement(1, "β = 1 and a key of length 1")
def replaced(t: CheckContext, delta_step: Answer) -> None:
    """the value of the key is replaced: Sᵀk is v afterwards, and orthogonal keys are answered as before"""
    q, k, v, beta, memory = delta_draw(t, unit=True)
    delta_written(t, delta_step, (q, k, v, torch.ones_like(beta), memory))


@delta.requirement(1, "a step of size β")
def step(t: CheckContext, delta_step: Answer) -> None:
    """with keys of length 1: the share β of the old value goes, the share β of the new one comes; every head
    of every sequence has a β of its own"""
    delta_written(t, delta_step, delta_draw(t, unit=True))


@delta.requirement(1, "keys of any length")
def any_length(t: CheckContext, delta_step: Answer) -> None:
    """the gradient of ½|Sᵀk − v|² with the key as it is, half as long or twice as long"""
    q, k, v, beta, memory = delta_draw(t, unit=True)
    delta_written(t, delta_step, (q, k * t.pick(0.5, 2.0), v, beta, memory))


@delta.requirement(1, "the output")
def delta_output(t: CheckContext, delta_step: Answer) -> None:
    """out = Sᵀq, read from the memory that is returned, which knows the new token already"""
    given = delta_draw(t)
    out, memory = t.pair(delta_step(*given), PARTS)
    if t.shape(memory, tuple(given[4].shape), "memory:"):
        t.note(memory, None)  # what was read from, so that another mistake's memory is told from it
        t.close(out, read(given[0], memory), "out:")


# 06.6: Mamba's discretisation and its step, compared with loops over channels and states in float64

mamba = Exercise(
    id="06.6",
    slug="mamba",
    title="Mamba's discretisation and step",
    answers=("discretise", "mamba_step"),
    hints=(
        "Three things in order: the step size Δ = softplus(dt + dt_bias), (batch, E); the rates A = "
        "−exp(A_log), (E, N), all negative; and then Ā and B̄, (batch, E, N).",
        "Broadcast: Δ gets a dimension at the end, `delta[..., None]`, B one in the middle, `B[:, None]`. "
        "Ā = exp(Δ A) lies between 0 and 1, since Δ is positive and A negative.",
        "softplus(x) = log(1 + exp(x)) overflows for x = 100, where it simply is x. "
        "`torch.nn.functional.softplus` takes care of that, and `torch.logaddexp` would, too.",
        "The step: h ← Ā h + B̄ x, where x (batch, E) is the same for all N states of a channel; then y = "
        "Σ_n C h + D x, read from the *new* h. Write `h = A_bar * h + …`, so that the old h stays.",
    ),
)


MambaGiven = tuple[Tensor, Tensor, Tensor, Tensor]  # A_log, dt, dt_bias, B
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # x, A_bar, B_bar, C, D, h
BARS, OUTS = "two tensors, (A_bar, B_bar)", "two tensors, (y, h)"


def mamba_sizes(t: CheckContext) -> tuple[int, int, int]:
    return t.pick(2, 3), t.pick(5, 6, 7), t.pick(4, 8, 9)


def mamba_draw(t: CheckContext, least: float, most: float, A_log: float, *, bias: bool = True) -> MambaGiven:
    """Parameters with dt + dt_bias between ``least`` and ``most``, and A_log around a number."""
    batch, E, N = mamba_sizes(t)
    raw = least + (most - least) * torch.rand(batch, E, generator=t.generator)
    dt_bias = t.randn(E) if bias else torch.zeros(E)
    return A_log + t.randn(E, N) / 2, raw - dt_bias, dt_bias, t.randn(batch, N)


def bars(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """One number after the other, as Python computes."""
    raw = [[a + b for a, b in zip(row, dt_bias.tolist(), strict=True)] for row in dt.tolist()]
    delta = [[max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in row] for row in raw]
    sizes = [[math.exp(a) for a in row] for row in A_log.tolist()]
    A_bar = [
        [[math.exp(-d * a) for a in rates] for d, rates in zip(row, sizes, strict=True)] for row in delta
    ]
    B_bar = [[[d * b for b in inputs] for d in row] for row, inputs in zip(delta, B.tolist(), strict=True)]
    return torch.tensor(A_bar, dtype=dt.dtype), torch.tensor(B_bar, dtype=dt.dtype)


def both(t: CheckContext, discretise: Answer, given: MambaGiven, when: str = "") -> None:
    got, want = t.pair(discretise(*given), BARS), bars(*given)
    for one, right, name in zip(got, want, ("A_bar", "B_bar"), strict=True):
        t.close(one, right, f"{when}{name}:")


def draw_step(t: CheckContext) -> Step:
    batch, E, N = mamba_sizes(t)
    A_bar = t.randn(batch, E, N).sigmoid()
    x, B_bar, C, D = t.randn(batch, E), t.randn(batch, E, N), t.randn(batch, N), t.randn(E)
    return x, A_bar, B_bar, C, D, t.randn(batch, E, N)


@mamba.requirement(1, "discretise: what fades")
def fades(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """A_bar = exp(Δ A) with A = −exp(A_log), here for steps so long that softplus changes nothing: between 0
    and 1"""
    given = mamba_draw(t, 20, 40, -3.5, bias=False)
    A_bar, _ = t.pair(discretise(*given), BARS)
    t.close(A_bar, bars(*given)[0], "A_bar:")


@mamba.requirement(1, "discretise: what is written")
def mamba_written(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """B_bar = Δ B in the simplified form, whatever A is, again for long steps"""
    given = mamba_draw(t, 20, 40, -3.5, bias=False)
    _, B_bar = t.pair(discretise(*given), BARS)
    t.close(B_bar, bars(*given)[1], "B_bar:")


@mamba.requirement(1, "discretise: the step size")
def step_size(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """Δ = softplus(dt + dt_bias), in A_bar and B_bar, also where dt + dt_bias is negative"""
    both(t, discretise, mamba_draw(t, -3, 2, 0.0))


@mamba.requirement(1, "discretise: steps of any length")
def any_size(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """no infinity and no NaN for dt + dt_bias of 100, and for −100, where nothing fades and nothing is
    written"""
    both(t, discretise, mamba_draw(t, 95, 130, -4.5), "long steps, ")
    both(t, discretise, mamba_draw(t, -130, -95, 0.0), "short steps, ")


@mamba.requirement(1, "mamba_step: the state")
def mamba_state(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """h = A_bar · h + B_bar · x, for each channel and each of its N states"""
    given = x, A_bar, B_bar, _, _, h = draw_step(t)
    _, new = t.pair(mamba_step(*given), OUTS)
    want = torch.empty_like(h)
    for b, e in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        want[b, e] = A_bar[b, e].double() * h[b, e] + B_bar[b, e].double() * float(x[b, e])
    t.close(new, want, "h:")


@mamba.requirement(1, "mamba_step: the output")
def mamba_output(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """y = Σ_n C h + D x, read from the state that is returned"""
    given = x, _, _, C, D, h = draw_step(t)
    y, new = t.pair(mamba_step(*given), OUTS)
    if not t.shape(new, tuple(h.shape), "h:"):
        return
    t.note(new, None)  # what was read from, so that another mistake's state is told from it
    want = torch.empty_like(x)
    for b, e in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        want[b, e] = C[b].double() @ new[b, e].double() + float(D[e]) * float(x[b, e])
    t.close(y, want, "y:")


@mamba.requirement(1, "nothing overwritten")
def unchanged(t: CheckContext, discretise: Answer, mamba_step: Answer) -> None:
    """y (batch, E) and h (batch, E, N) are new tensors; the old state and the parameters stay as they were"""
    given = draw_step(t)
    y, h = t.pair(mamba_step(*given), OUTS)
    t.form(y, tuple(given[0].shape), torch.float32)
    t.form(h, tuple(given[5].shape), torch.float32)
    t.pair(discretise(*mamba_draw(t, -3, 2, 0.0)), BARS)
    t.unchanged()


# 06.7: RWKV-4's weighted average, compared with a softmax over written-out exponents in float64

wkv = Exercise(
    id="06.7",
    slug="wkv",
    title="wkv without overflow",
    answers=("wkv",),
    hints=(
        "Write the plain recurrence first. Two sums of the past, a = Σ e^{…} v and b = Σ e^{…}, start at 0. "
        "For each token: out = (a + e^{u+k} v) / (b + e^{u+k}); then a ← e^{−w} a + e^k v, b ← e^{−w} b + "
        "e^k. That is right for small k.",
        "Now keep a and b divided by e^m, where m is the largest exponent among the past tokens: a = e^m · "
        "(what you store). m starts at −∞, or at a very negative number such as −1e38.",
        "To read, take n = max(m, u + k) and divide numerator and denominator by e^n: e^{m−n} a + e^{u+k−n} "
        "v over e^{m−n} b + e^{u+k−n}. No exponent is above 0, and one of them is 0.",
        "To write, the past fades by e^{−w}, and so its largest exponent becomes m − w: n = max(m − w, k), "
        "a ← e^{m−w−n} a + e^{k−n} v, b likewise, m ← n. The bonus u has no part in it.",
    ),
)


WkvGiven = tuple[Tensor, Tensor, Tensor, Tensor]  # w, u, k, v


def naive(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token: all exponents written out, their softmax, the average."""
    w, u, k, values = w.double(), u.double(), k.double(), v.double()
    outs = []
    for t in range(k.shape[1]):
        steps = torch.arange(t - 1, -1, -1)[:, None]  # t − 1 − s for the tokens s before t
        exponents = torch.cat((k[:, :t] - steps * w, (u + k[:, t])[:, None]), 1)
        outs.append((exponents.softmax(1) * values[:, : t + 1]).sum(1))
    return torch.stack(outs, 1).to(v.dtype)


def quarters(x: Tensor) -> Tensor:
    """Rounded to quarters, so that sums of some hundreds are exact in fp32."""
    return (x * 4).round() / 4


def wkv_draw(t: CheckContext, T: int) -> WkvGiven:
    """Ordinary numbers: decays of 0.25 to 1.25 per step, and a bonus above 0."""
    B, C = t.pick(2, 3), t.pick(5, 6, 7)
    w = quarters(torch.rand(C, generator=t.generator)) + 0.25
    u = 0.5 + t.randn(C).abs()
    return w, u, t.randn(B, T, C), t.randn(B, T, C)


def wkv_same(t: CheckContext, wkv: Answer, given: WkvGiven, when: str = "") -> None:
    t.close(wkv(*given), naive(*given), when)


@wkv.requirement(1, "the first token")
def wkv_first(t: CheckContext, wkv: Answer) -> None:
    """there is nothing but itself: its weight is 1, the output its value; (B, T, C) also for T = 1"""
    w, u, k, v = wkv_draw(t, 1)
    t.close(wkv(w, u, k, v), v)


@wkv.requirement(1, "the bonus")
def bonus(t: CheckContext, wkv: Answer) -> None:
    """a token's own weight is e^(u + k), that of the tokens before it e^k (where w is next to nothing)"""
    w, u, k, v = wkv_draw(t, t.integer(4, 8))
    wkv_same(t, wkv, (torch.full_like(w, 1e-6), u, k, v))


@wkv.requirement(1, "the decay")
def wkv_decay(t: CheckContext, wkv: Answer) -> None:
    """the token before fades not at all, the one before that by e^(−w), then e^(−2w) … (where u is 0)"""
    w, u, k, v = wkv_draw(t, t.integer(6, 9))
    wkv_same(t, wkv, (w, torch.zeros_like(u), k, v))


@wkv.requirement(1, "a whole text")
def wkv_text(t: CheckContext, wkv: Answer) -> None:
    """decay and bonus together, for every row of the batch, u of either sign; the inputs stay as they were"""
    w, u, k, v = wkv_draw(t, t.integer(12, 20))
    wkv_same(t, wkv, (w, -u if t.round == 1 else u, k, v))
    t.unchanged()


@wkv.requirement(1, "large keys")
def wkv_large(t: CheckContext, wkv: Answer) -> None:
    """k anywhere between −1000 and 1000: e^1000 is infinite in fp64 as well, but only differences of
    exponents count (where u is 0 and w next to nothing)"""
    w, u, k, v = wkv_draw(t, t.integer(10, 16))
    given = torch.full_like(w, 1e-6), torch.zeros_like(u), quarters(t.integer(900, 990) * k.tanh()), v
    wkv_same(t, wkv, given)


@wkv.requirement(1, "small keys before a large one")
def small_first(t: CheckContext, wkv: Answer) -> None:
    """keys near −990 and, at the end, one near 990: the early outputs are averages, not 0/0 (where u is 0 and
    w next to nothing)"""
    w, u, k, v = wkv_draw(t, t.integer(6, 10))
    k = quarters(k) - 990
    k[:, -1] += 1980
    wkv_same(t, wkv, (torch.full_like(w, 1e-6), torch.zeros_like(u), k, v))


@wkv.requirement(1, "large keys that fade, and a large bonus")
def fading(t: CheckContext, wkv: Answer) -> None:
    """a key near 990, then many near −990: it fades, e^(−w) a step, and the average never becomes 0/0, also
    when the new ones have caught up with it; and a bonus of some hundreds overflows no more than a key
    does"""
    w, u, k, v = wkv_draw(t, 36)
    k = quarters(k) - 990
    k[:, 0] += 1980
    wkv_same(t, wkv, (w + 70, quarters(u), k, v), "one large key:")
    w, u, k, v = wkv_draw(t, t.integer(10, 16))
    wkv_same(t, wkv, (w, quarters(u + t.integer(300, 500)), quarters(800 * k.tanh()), v), "a large bonus:")


# 06.8: the bytes of recurrent states against keys and values, counted tensor by tensor

crossing = Exercise(
    id="06.8",
    slug="crossing",
    title="Where the state beats a KV cache",
    answers=("crossing",),
    hints=(
        "Count one layer first. What is a state takes 4 bytes per number, what is only the past of a "
        "convolution or of a token shift 2. Then multiply by the layers that have a state.",
        "A convolution of width W needs W − 1 tokens of the past; the newest comes with the step. Mamba "
        "convolves its expand · d_model channels, gated delta the queries, keys and values together: "
        "key_heads · key_dim twice, and value_heads · value_dim.",
        "A gated delta layer has a matrix (key_dim, value_dim) for every *value* head: two of them share a "
        "key head, each remembers for itself. RWKV-7 has d_model / head_dim heads, each with a square "
        "matrix, and keeps the token before twice, once in each half of the layer.",
        "Of a hybrid's `layers`, layers // full_every are full. They hold keys and values on both sides, so "
        "they count on neither. And `tokens`: the first n with n · per_token > state is state // per_token "
        "+ 1, for at state / per_token tokens the two are equal.",
    ),
)


Config = dict[str, Any]
Sizes = dict[str, int]
STATE, OTHER = 4, 2  # bytes of a number


# state-spaces/mamba: mamba_ssm/models/config_mamba.py and modules/mamba_simple.py, whose defaults are 2.8B's.
MAMBA = {"kind": "mamba", "layers": 64, "d_model": 2560, "expand": 2, "d_state": 16, "conv_width": 4}


# EleutherAI/pythia: models/2.8B/pythia-2.8b.yml.
PYTHIA = {"layers": 32, "query_heads": 32, "kv_heads": 32, "head_dim": 80}


# BlinkDL/RWKV-LM: README.md (3B: n_layer 32, n_embd 2560), RWKV-v7/rwkv_v7_demo_rnn.py (what it keeps).
RWKV = {"kind": "rwkv7", "layers": 32, "d_model": 2560, "head_dim": 64}


# config.json of Qwen/Qwen2.5-3B, as public repositories quote it.
QWEN_2_5 = {"layers": 36, "query_heads": 16, "kv_heads": 2, "head_dim": 128}


# huggingface/transformers: models/qwen3_next/configuration_qwen3_next.py, whose defaults are 80B-A3B's.
QWEN_3_NEXT = {
    "kind": "gated_delta",
    "layers": 48,
    "full_every": 4,
    "key_heads": 16,
    "value_heads": 32,
    "key_dim": 128,
    "value_dim": 128,
    "conv_width": 4,
}


ALL_FULL = {"layers": 48, "query_heads": 16, "kv_heads": 2, "head_dim": 256}
REAL = ((MAMBA, PYTHIA), (RWKV, QWEN_2_5), (QWEN_3_NEXT, ALL_FULL))


def kept(model: Config) -> list[tuple[int, tuple[int, ...]]]:
    """The state of one layer: for each tensor the bytes of a number, and the shape."""
    if model["kind"] == "mamba":
        channels = model["expand"] * model["d_model"]
        return [(STATE, (channels, model["d_state"])), (OTHER, (model["conv_width"] - 1, channels))]
    if model["kind"] == "rwkv7":
        width, head_dim = model["d_model"], model["head_dim"]
        return [(STATE, (width // head_dim, head_dim, head_dim)), (OTHER, (width,)), (OTHER, (width,))]
    past, K, V = model["conv_width"] - 1, model["key_dim"], model["value_dim"]
    query = key = (OTHER, (past, model["key_heads"], K))
    return [(STATE, (model["value_heads"], K, V)), query, key, (OTHER, (past, model["value_heads"], V))]


def crossing_count(model: Config, attention: Config) -> Sizes:
    every = model.get("full_every")
    full = [every is not None and (i + 1) % every == 0 for i in range(model["layers"])]
    state = sum(size * math.prod(shape) for size, shape in kept(model)) * full.count(False)
    per_token = sum(
        OTHER * attention["kv_heads"] * attention["head_dim"]
        for _ in range(attention["layers"] - full.count(True))
        for _ in ("key", "value")
    )
    return {"state": state, "per_token": per_token, "tokens": state // per_token + 1}


def crossing_draw(t: CheckContext, kind: str) -> Config:
    """A model of this kind, without full layers."""
    layers = t.integer(20, 60)
    if kind == "mamba":
        shape = {"d_model": 64 * t.integer(8, 40), "expand": t.pick(2, 3), "d_state": t.pick(8, 16, 24)}
        return {"kind": kind, "layers": layers, **shape, "conv_width": t.pick(3, 4, 5)}
    if kind == "rwkv7":
        head_dim = t.pick(48, 64, 96)
        return {"kind": kind, "layers": layers, "d_model": head_dim * t.integer(8, 40), "head_dim": head_dim}
    key_heads = t.pick(3, 6, 8)
    heads = {"key_heads": key_heads, "value_heads": key_heads * t.pick(2, 3, 4)}
    dims = {"key_dim": t.pick(64, 96), "value_dim": t.pick(80, 128)}
    return {"kind": kind, "layers": layers, **heads, **dims, "conv_width": t.pick(3, 4, 5)}


def draw_attention(t: CheckContext, layers: int | None = None) -> Config:
    kv_heads = t.pick(2, 3, 4)
    heads = {"query_heads": kv_heads * t.pick(3, 5, 8), "kv_heads": kv_heads, "head_dim": t.pick(64, 80, 128)}
    return {"layers": t.integer(61, 80) if layers is None else layers, **heads}


def ask(t: CheckContext, crossing: Answer, model: Config, attention: Config, *names: str) -> Config:
    """The returned value, if it is a dict with these keys; else the end of this round."""
    got = crossing(model, attention)
    for name in names:
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
    return got


def crossing_same(t: CheckContext, crossing: Answer, model: Config, attention: Config, *names: str) -> None:
    got, want = ask(t, crossing, model, attention, *names), crossing_count(model, attention)
    for name in names:
        t.number(got[name], want[name], f"{model['kind']}, {name}:")


@crossing.requirement(1, "keys and values of a token")
def per_token(t: CheckContext, crossing: Answer) -> None:
    """per_token, where no layer of the model is full: 2 bytes for each number of a key and of a value, at
    every KV head, in every layer of the attention model"""
    crossing_same(t, crossing, crossing_draw(t, "mamba"), draw_attention(t), "per_token")
    crossing_same(t, crossing, crossing_draw(t, "rwkv7"), draw_attention(t), "per_token")


@crossing.requirement(1, "the state of Mamba")
def crossing_mamba(t: CheckContext, crossing: Answer) -> None:
    """state: d_state numbers of 4 bytes for each of the expand · d_model channels, and conv_width − 1 tokens
    of the past with 2 bytes for each, in every layer"""
    crossing_same(t, crossing, crossing_draw(t, "mamba"), draw_attention(t), "state")


@crossing.requirement(1, "the state of RWKV-7")
def rwkv(t: CheckContext, crossing: Answer) -> None:
    """state: a square matrix of head_dim in 4 bytes for each of the d_model / head_dim heads, and two shifted
    tokens of d_model in 2 bytes, in every layer"""
    crossing_same(t, crossing, crossing_draw(t, "rwkv7"), draw_attention(t), "state")


@crossing.requirement(1, "the state of gated delta")
def gated_delta(t: CheckContext, crossing: Answer) -> None:
    """state: a matrix (key_dim, value_dim) in 4 bytes for each value head, and conv_width − 1 tokens of
    queries, keys and values in 2 bytes, in every layer"""
    crossing_same(t, crossing, crossing_draw(t, "gated_delta"), draw_attention(t), "state")


@crossing.requirement(1, "a hybrid")
def hybrid(t: CheckContext, crossing: Answer) -> None:
    """every full_every-th of `layers` is full: state counts the other layers, and per_token what these would
    hold, were they full; measured by your own count for a model without full layers"""
    every = t.integer(3, 6)
    layers = every * t.integer(6, 10) - 1  # where rounding to the nearest is rounding up
    recurrent = sum((i + 1) % every != 0 for i in range(layers))
    model = crossing_draw(t, "mamba" if t.round == 1 else "gated_delta") | {"layers": layers}
    attention = draw_attention(t, layers)
    names = ("state", "per_token")
    whole = numbers(t, crossing, model, attention, *names)
    got = ask(t, crossing, model | {"full_every": every}, attention, *names)
    for name, own in zip(names, whole, strict=True):
        share = own * recurrent / layers
        t.number(got[name], int(share) if share == int(share) else share, f"{name}:")


def numbers(t: CheckContext, crossing: Answer, model: Config, attention: Config, *names: str) -> list[float]:
    """The numbers under these names, above 0; else the end of this round."""
    got = ask(t, crossing, model, attention, *names)
    plain = [plain_number(got[name]) for name in names]
    if any(number is None or not 0 < number < math.inf for number in plain):
        t.true(False, f"{' and '.join(names)}, numbers above 0", ", ".join(describe(got[n]) for n in names))
        raise Stop
    return [number for number in plain if number is not None]


@crossing.requirement(1, "the first token that pays")
def crossing_tokens(t: CheckContext, crossing: Answer) -> None:
    """tokens, by your own state and per_token: the first number of tokens whose keys and values take *more*
    bytes than the state"""
    even = (MAMBA, PYTHIA | {"kv_heads": t.pick(4, 8, 16), "query_heads": 32})
    odd = {"kind": "rwkv7", "layers": 32, "d_model": 64 * t.pick(7, 11, 13), "head_dim": 64}
    uneven = [(odd, QWEN_2_5 | {"layers": layers}) for layers in range(20, 90)]
    below_half = [
        pair
        for pair in uneven
        if 0.1 < crossing_count(*pair)["state"] / crossing_count(*pair)["per_token"] % 1 < 0.4
    ]
    for model, attention in (even, t.pick(*below_half)):
        state, one = numbers(t, crossing, model, attention, "state", "per_token")
        got = ask(t, crossing, model, attention, "tokens")
        t.number(got["tokens"], int(state // one) + 1, f"state {state:,}, per_token {one:,}, tokens:")


@crossing.requirement(1, "three real models")
def real(t: CheckContext, crossing: Answer) -> None:
    """Mamba-2.8B against Pythia-2.8B, RWKV-7 2.9B against Qwen2.5 3B, and Qwen3-Next against itself with full
    attention in every layer"""
    crossing_same(t, crossing, *REAL[t.round % 3], "state", "per_token", "tokens")


EXERCISES = (features, recurrent, chunked, decay, delta, mamba, wkv, crossing)
