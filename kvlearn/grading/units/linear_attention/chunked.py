"""06.3: linear attention chunk after chunk, held against sums made token by token."""

from torch import Tensor

from kvlearn.grading.compare import Difference
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.linear_attention.given import draw, sums, tensors
from kvlearn.grading.watch import largest_new_tensor, new_tensors

EXERCISE = Exercise(
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

NAMES = "out, state"


def run(t: Trial, answer: Answer, qkv: tuple[Tensor, ...], chunk: int) -> list[Tensor]:
    return tensors(t, answer(*qkv, chunk), NAMES)


def same_outputs(t: Trial, answer: Answer, n_tokens: int, chunk: int, square: bool, when: str = "") -> None:
    qkv = draw(t, n_tokens, square)
    t.close(run(t, answer, qkv, chunk)[0], sums(*qkv)[0], f"out{when}:", tolerance=3e-4)


@EXERCISE.requirement(1, "inside a chunk")
def inside(t: Trial, chunked_attention: Answer) -> None:
    """a text of just one chunk, maybe of one token: Σ (q_t·k_s) v_s over s ≤ t; the inputs are unchanged
    afterwards"""
    n = 1 if t.round == 1 else t.integer(4, 7)
    same_outputs(t, chunked_attention, n, n, square=True)
    t.unchanged()


@EXERCISE.requirement(2, "across chunks")
def across(t: Trial, chunked_attention: Answer) -> None:
    """out, (B, H, T, V), where T is a multiple of the chunk: the own chunk up to the token itself, and every
    chunk before it"""
    chunk = t.integer(3, 5)
    same_outputs(t, chunked_attention, t.integer(4, 5) * chunk, chunk, square=t.round < 2)


@EXERCISE.requirement(1, "a chunk that does not divide T")
def uneven(t: Trial, chunked_attention: Answer) -> None:
    """the last chunk is shorter, and nothing is lost or added; T may be less than one chunk, and a chunk may
    be one token"""
    chunk = t.integer(4, 6)
    n = t.integer(3, 4)
    same_outputs(t, chunked_attention, n * chunk - t.integer(1, chunk - 2), chunk, t.round < 2)
    same_outputs(t, chunked_attention, chunk - 2, chunk, True, ", T less than the chunk")
    same_outputs(t, chunked_attention, n, 1, True, ", chunk = 1")


@EXERCISE.requirement(1, "the last state")
def state(t: Trial, chunked_attention: Answer) -> None:
    """Σ k_s v_sᵀ over all tokens, (B, H, K, V), whatever the chunk"""
    chunk = t.integer(3, 5)
    for n_tokens, when in (
        (4 * chunk, ""),
        (4 * chunk - 2, ", a shorter last chunk"),
        (chunk, ", one chunk"),
    ):
        qkv = draw(t, n_tokens, square=t.round < 2)
        t.close(run(t, chunked_attention, qkv, chunk)[1], sums(*qkv)[1], f"state{when}:", tolerance=3e-4)


@EXERCISE.requirement(1, "no square of the text", rounds=1)
def no_square(t: Trial, chunked_attention: Answer) -> None:
    """a longer text, T = 32 chunks of 8 and a bit: the same outputs, and no T·T numbers are made, neither at
    once nor piece by piece (all tensors on the way together have fewer than T·T/4)"""
    chunk = 8
    T = 32 * chunk + t.integer(1, 3)
    qkv = tuple(t.randn(1, 1, T, n) / 2 for n in (2, 2, 1))
    with new_tensors() as made:
        out = run(t, chunked_attention, qkv, chunk)[0]
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
