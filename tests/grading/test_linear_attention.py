"""Unit 06, its first half: right answers of every style, the course's own mechanisms, and half-right ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from answers import earned, full_marks, names, right, unit_module
from torch import Tensor

from kvlearn.attention import linear as core
from kvlearn.attention.linear import LinearAttention, elu_features
from kvlearn.grading import check, find_exercise, judge

pytestmark = pytest.mark.answers

CHECKS = unit_module("06_linear_attention", "checks")
IDS = [f"06.{n}" for n in range(1, 5)]
Outs = tuple[Tensor, Tensor]


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


# Right answers of other styles


def attention_by_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No weights at all: the sums over keys come first."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    memory = torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(2)
    above, below = torch.einsum("bhtk,bhtkv->bhtv", q, memory), torch.einsum("bhtk,bhtk->bht", q, k.cumsum(2))
    return above / torch.where(below > 0, below, 1)[..., None]


def attention_in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """0 / 0 mended afterwards, and the time axis first on the way."""
    a, b, c = (x.double().permute(2, 0, 1, 3) for x in (q, k, v))
    weights = torch.einsum("tbhk,sbhk->bhts", phi(a), phi(b))
    weights = weights.masked_fill(torch.ones(len(a), len(a), dtype=torch.bool).triu(1), 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,sbhv->bhtv", weights.nan_to_num(), c).float()


def attention_by_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                w = torch.stack([phi(q[b, h, t]) @ phi(k[b, h, s]) for s in range(t + 1)])
                if w.sum() > 0:
                    out[b, h, t] = w / w.sum() @ v[b, h, : t + 1]
    return out


def step_by_einsum(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor) -> list[Tensor]:
    memory = torch.einsum("bhv,bhk->bhkv", v, phi(k)) + memory
    normaliser = normaliser.add(phi(k))
    above = torch.einsum("bhkv,bhk->bhv", memory, phi(q))
    return [above / torch.einsum("bhk,bhk->bh", normaliser, phi(q)).unsqueeze(-1), memory, normaliser]


def step_with_one_more_column(q, k, v, memory, normaliser):  # type: ignore[no-untyped-def]
    """The normaliser as the sum for a value that is always 1; fp64 inside."""
    both = torch.cat((memory, normaliser[..., None]), -1).double()
    both = both + phi(k.double())[..., None] @ F.pad(v.double(), (0, 1), value=1.0)[..., None, :]
    read = (phi(q.double())[..., None, :] @ both)[..., 0, :]
    return (read[..., :-1] / read[..., -1:]).float(), both[..., :-1].float(), both[..., -1].float()


def step_by_loops(q, k, v, memory, normaliser):  # type: ignore[no-untyped-def]
    out, memory, normaliser = torch.empty_like(v), memory.clone(), normaliser.clone()
    for b in range(len(q)):
        for h in range(q.shape[1]):
            memory[b, h] += torch.outer(phi(k[b, h]), v[b, h])
            normaliser[b, h] += phi(k[b, h])
            out[b, h] = memory[b, h].T @ phi(q[b, h]) / torch.dot(normaliser[b, h], phi(q[b, h]))
    return out, memory, normaliser


def chunks_all_at_once(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """Padded, every chunk in one batch, and the states as running sums without the own chunk."""
    T = q.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    states = (k.mT @ v).cumsum(2)
    before = torch.cat((torch.zeros_like(states[:, :, :1]), states[:, :, :-1]), 2)
    out = (q @ k.mT).tril() @ v + q @ before
    return out.flatten(2, 3)[:, :, :T], states[:, :, -1]


def chunks_by_halves(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> list[Tensor]:
    """The second half reads what the first one left."""
    T = q.shape[2]
    if chunk >= T:
        return [(q @ k.mT).tril() @ v, torch.einsum("bhtk,bhtv->bhkv", k, v)]
    half = max(T // chunk // 2, 1) * chunk
    (one, first), (two, second) = (
        chunks_by_halves(q[:, :, part], k[:, :, part], v[:, :, part], chunk)
        for part in (slice(half), slice(half, T))
    )
    return [torch.cat((one, two + q[:, :, half:] @ first), 2), first + second]


def chunks_by_sequence_and_head(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """One head of one sequence after the other, in fp64, written into one result."""
    out, state = torch.empty_like(v), torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    for b in range(len(q)):
        for h in range(q.shape[1]):
            memory = state[b, h].double()
            for start in range(0, q.shape[2], chunk):
                part = slice(start, min(start + chunk, q.shape[2]))
                a, c, d = (x[b, h, part].double() for x in (q, k, v))
                n = len(a)
                weights = torch.where(torch.arange(n)[:, None] >= torch.arange(n), a @ c.T, 0.0)
                out[b, h, part] = torch.addmm(a @ memory, weights, d).float()
                memory = torch.addmm(memory, c.T, d)
            state[b, h] = memory.float()
    return out, state


def token_by_token(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The recurrence, whatever the chunk: right numbers, and not the form that is asked for."""
    memory = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float64)
    outs = []
    for t in range(q.shape[2]):
        memory = memory + k[:, :, t, :, None].double() * v[:, :, t, None, :]
        outs.append((q[:, :, t, None].double() @ memory).float())
    return torch.cat(outs, 2), memory.float()


def decay_by_loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> list[Tensor]:
    state, out = state.clone(), torch.empty_like(v)
    for t, a in enumerate(log_decay.exp().unbind(-1)):
        state *= a[..., None, None]
        state += torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        out[:, :, t] = torch.einsum("bhkv,bhk->bhv", state, q[:, :, t])
    return [out, state]


def decay_by_segments(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Mamba-2's segment sums, in fp64, with the state as a token before the first."""
    T, g = q.shape[2], log_decay.double()
    column = g[..., None].expand(-1, -1, -1, T + 1)
    below = torch.ones(T, T + 1, dtype=torch.bool).tril()  # column 0 is the state
    sums = column.masked_fill(~below, 0).cumsum(-2).masked_fill(~torch.ones_like(below).tril(1), -torch.inf)
    fade = sums.exp()
    scores = (q @ k.mT) * fade[..., 1:]
    out = scores @ v.double() + fade[..., :1] * (q @ state)
    last = fade[..., -1, 0, None, None] * state + (fade[..., -1, 1:, None] * k).mT @ v.double()
    return out.float(), last.float()


def decay_by_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """An associative scan over (a, S): (a, S) then (b, R) is (ab, bS + R)."""
    a, S = log_decay.exp()[..., None, None], k[..., :, None] * v[..., None, :]
    step = 1
    while step < q.shape[2]:
        S = torch.cat((S[:, :, :step], a[:, :, step:] * S[:, :, :-step] + S[:, :, step:]), 2)
        a = torch.cat((a[:, :, :step], a[:, :, step:] * a[:, :, :-step]), 2)
        step *= 2
    S = S + a * state[:, :, None]
    return (q[..., None, :] @ S)[..., 0, :], S[:, :, -1]


OTHER_STYLES: list[tuple[str, Callable[..., Any]]] = [
    *(("06.1", f) for f in (attention_by_running_sums, attention_in_double, attention_by_loops)),
    *(("06.2", f) for f in (step_by_einsum, step_with_one_more_column, step_by_loops)),
    *(("06.3", f) for f in (chunks_all_at_once, chunks_by_halves, chunks_by_sequence_and_head)),
    *(("06.4", f) for f in (decay_by_loop, decay_by_segments, decay_by_scan)),
]


@pytest.mark.parametrize(("exercise", "answer"), OTHER_STYLES)
def test_a_right_answer_in_another_style_earns_full_marks(exercise: str, answer: Callable[..., Any]) -> None:
    assert full_marks(exercise, answer)


def test_a_state_written_token_by_token_is_not_the_chunked_form() -> None:
    score = check("06.3", token_by_token)
    assert earned(score) == [1, 2, 1, 1, 0]
    assert names(score) == ["one token after the other"]


# The exercises ask for the course's own results


def draw(*, T: int = 13, V: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, T, 4), torch.randn(2, 3, T, 4), torch.randn(2, 3, T, V)


def test_the_averages_are_those_of_the_courses_layer() -> None:
    layer, x = LinearAttention(24, 3, head_dim=8).double(), torch.randn(2, 11, 24).double()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in projections)
    ours = CHECKS.averages(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.o_proj(ours), layer(x))


def test_the_sums_and_the_decay_are_those_of_the_courses_core() -> None:
    q, k, v = draw()
    for form in ("recurrent", "parallel", "chunked"):
        out, state = core.linear_attention(q, k, v, form=form, chunk=4)
        torch.testing.assert_close(CHECKS.sums(q, k, v), (out, state), rtol=1e-4, atol=1e-4)
        log_decay, start = -torch.rand(2, 3, 13), torch.randn(2, 3, 4, 5)
        out, state = core.linear_attention(q, k, v, log_decay, start, form=form, chunk=4)
        torch.testing.assert_close(
            CHECKS.faded(q, k, v, log_decay, start), (out, state), rtol=1e-4, atol=1e-4
        )


def test_the_feature_map_is_the_courses_one() -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(CHECKS.phi(x).float(), elu_features(x), rtol=1e-3, atol=1e-6)


# The worked examples of the tasks


def test_the_examples_of_the_normaliser_are_true() -> None:
    (attend,), (step,) = right(find_exercise("06.1")), right(find_exercise("06.2"))
    half = torch.tensor(0.5).log().item()
    q = torch.tensor([[0.0, 1], [0, 1], [0, 1]])[None, None]
    k = torch.tensor([[0.0, 0], [2, 0], [0, half]])[None, None]
    v = torch.tensor([0.0, 10, 20]).reshape(1, 1, 3, 1)
    assert attend(q, k, v).flatten().tolist() == pytest.approx([0, 6.25, 9])

    memory, normaliser = torch.tensor([30.0, 10]).reshape(1, 1, 2, 1), torch.tensor([4.0, 2])[None, None]
    got = step(q[:, :, 2], k[:, :, 2], v[:, :, 2], memory, normaliser)
    want = (9, [50, 20], [5, 2.5])
    assert [x.flatten().tolist() for x in got] == [pytest.approx(x) for x in ([want[0]], *want[1:])]


def test_the_examples_of_chunks_and_of_decay_are_true() -> None:
    (chunked,), (decayed,) = right(find_exercise("06.3")), right(find_exercise("06.4"))
    q, k, v = (
        torch.tensor(x).reshape(1, 1, 5, 1) for x in ([1.0, 1, 2, 1, 1], [1.0, 2, 1, 1, 3], [1.0, 1, 2, 4, 1])
    )
    out, state = chunked(q, k, v, 2)
    assert (out.flatten().tolist(), float(state)) == ([1, 3, 10, 9, 12], 12)

    one, v = torch.ones(1, 1, 3, 1), torch.tensor([2.0, 1, 3]).reshape(1, 1, 3, 1)
    log_decay = torch.tensor([0.5, 0.5, 0.25]).log().reshape(1, 1, 3)
    out, state = decayed(one, one, v, log_decay, torch.full((1, 1, 1, 1), 8.0))
    assert out.flatten().tolist() == pytest.approx([6, 4, 4])
    assert float(state) == pytest.approx(4)


# Differences without effect on the score


def test_the_courses_own_recurrence_earns_nothing() -> None:
    for exercise, answer in (
        ("06.1", lambda q, k, v: core.linear_attention(elu_features(q), elu_features(k), v)[0]),
        ("06.3", lambda q, k, v, chunk: core.linear_attention(q, k, v, chunk=chunk)),
        ("06.4", core.linear_attention),
    ):
        score = check(exercise, answer)
        assert float(score) == 0
        assert "kvlearn.attention.linear" in score.message


@pytest.mark.parametrize("exercise", IDS)
def test_an_answer_that_returns_nothing_is_not_called_a_known_mistake(exercise: str) -> None:
    score = check(exercise, lambda *_: None)
    assert float(score) == 0
    assert score.mistakes == ()


@pytest.mark.parametrize(
    ("exercise", "echo"),
    [
        ("06.1", lambda q, k, v: v),
        ("06.2", lambda q, k, v, memory, normaliser: (v, memory, normaliser)),
        ("06.3", lambda q, k, v, chunk: (v, k.mT @ k)),
        ("06.4", lambda q, k, v, log_decay, state: (v, state)),
    ],
)
def test_an_answer_that_hands_back_what_it_got_earns_next_to_nothing(
    exercise: str, echo: Callable[..., Any]
) -> None:
    assert float(check(exercise, echo)) <= 1


# Half right


def test_a_wrong_feature_map_keeps_the_points_for_the_mask_and_the_normaliser() -> None:
    def softplus(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (F.softplus(q) @ F.softplus(k).mT).tril()
        return (weights @ v / weights.sum(-1, keepdim=True)).nan_to_num()

    score = check("06.1", softplus)
    assert earned(score) == [1, 0, 1, 0, 0]
    assert names(score) == []


def test_a_normaliser_that_is_kept_from_being_small_is_wrong() -> None:
    def at_least_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return weights @ v / weights.sum(-1, keepdim=True).clamp_min(1)

    assert earned(check("06.1", at_least_one)) == [0, 2, 1, 1, 1]


def test_nan_is_named_and_costs_one_point() -> None:
    def unguarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return weights / weights.sum(-1, keepdim=True) @ v

    score = check("06.1", unguarded)
    assert earned(score) == [1, 2, 1, 1, 0]
    assert names(score) == ["0 / 0 where no key has any weight"]


def test_a_right_output_earns_its_points_whatever_the_state_is() -> None:
    (step,), (chunked,), (decayed,) = (right(find_exercise(e)) for e in ("06.2", "06.3", "06.4"))
    score = check("06.2", lambda *given: (step(*given)[0], *(2 * x for x in step(*given)[1:])))
    assert earned(score) == [1, 0, 0, 1, 0, 0]
    score = check("06.3", lambda *given: (chunked(*given)[0], chunked(*given)[1] / 2))
    assert earned(score) == [1, 2, 1, 0, 1]
    score = check("06.4", lambda *given: (decayed(*given)[0], decayed(*given)[1] / 2))
    assert earned(score) == [0, 2, 1, 0, 0]


def test_even_a_mask_of_the_whole_text_is_a_square() -> None:
    (chunked,) = right(find_exercise("06.3"))

    def with_a_mask(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
        torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return chunked(q, k, v, chunk)

    score = check("06.3", with_a_mask)
    assert earned(score) == [1, 2, 1, 1, 0]
    assert "T = 25" in score.rows[4].came


def test_a_square_made_piece_by_piece_is_a_square() -> None:
    def by_torch_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
        state, outs = torch.zeros(*q.shape[:2], k.shape[3], v.shape[3]), []
        for a, b, c in zip(*(x.chunk(chunk, 2) for x in (q, k, v)), strict=True):
            outs.append(a @ state + (a @ b.mT).tril() @ c)
            state = state + b.mT @ c
        return torch.cat(outs, 2), state

    def token_by_token(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
        rows = [(q[:, :, [t]] @ k[:, :, : t + 1].mT) @ v[:, :, : t + 1] for t in range(q.shape[2])]
        return torch.cat(rows, 2), k.mT @ v

    for answer, name in (
        (by_torch_chunk, "the size of a chunk taken for the number of chunks"),
        (token_by_token, "the square in strips"),
    ):
        score = check("06.3", answer)
        assert earned(score) == [1, 2, 1, 1, 0]
        assert names(score) == [name]


def test_a_step_with_a_large_number_in_its_normaliser_is_wrong_on_every_draw() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor) -> tuple[Tensor, ...]:
        memory, normaliser = memory + phi(k)[..., None] * v[..., None, :], normaliser + phi(k)
        above = (phi(q)[..., None] * memory).sum(-2)
        return above / ((phi(q) * normaliser).sum(-1, keepdim=True) + 1e-3), memory, normaliser

    for seed in range(20):
        assert judge(find_exercise("06.2"), [padded], seed).rows[0].earned == 0


def test_an_error_among_the_pairs_alone_is_named() -> None:
    def pairs(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Outs]:
        def answer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
            c, (_, last) = log_decay.cumsum(-1), decay_by_loop(q, k, v, log_decay, state)
            fade = change(c, log_decay).exp().tril()
            return (q @ k.mT * fade) @ v + c.exp()[..., None] * (q @ state), last

        return answer

    score = check("06.4", pairs(lambda c, g: c[..., :, None] - (c - g)[..., None, :]))
    assert names(score) == ["a factor too many for each pair"]
    score = check("06.4", pairs(lambda c, g: c[..., None, :] - c[..., :, None]))
    assert names(score) == ["the distances with the wrong sign"]


def test_products_that_are_patched_where_they_underflow_are_still_wrong() -> None:
    def patched(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
        product = log_decay.exp().cumprod(-1)
        fade = (product[..., :, None] / product[..., None, :]).nan_to_num(0, 0, 0).tril()
        last = product[..., -1, None, None] * state + (fade[..., -1, :, None] * k).mT @ v
        return (q @ k.mT * fade) @ v + product[..., None] * (q @ state), last

    assert earned(check("06.4", patched)) == [1, 2, 1, 1, 0]


def test_inputs_changed_in_place_are_noticed() -> None:
    def first(change: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *others: (change(x), then(x, *others))[1]

    for exercise, row in (("06.1", 1), ("06.2", 4), ("06.3", 0), ("06.4", 2)):
        (answer,) = right(find_exercise(exercise))
        score = check(exercise, first(lambda q: q.add_(1e-6), answer))
        assert [i for i, points in enumerate(earned(score)) if not points] == [row]
        assert "changed in place" in score.rows[row].came


# Wrong answers that are not in the catalogue still get a message that helps


def test_an_unknown_mistake_is_told_by_place_and_number() -> None:
    (chunked,), (decayed,) = right(find_exercise("06.3")), right(find_exercise("06.4"))
    score = check("06.3", lambda q, k, v, chunk: chunked(k, q, v, chunk))
    assert "elements differ" in score.message
    assert names(score) == []
    score = check("06.4", lambda q, k, v, log_decay, state: decayed(q, k, v, log_decay / 2, state))
    assert "elements differ" in score.message
    assert names(score) == []


def test_one_tensor_in_place_of_several_is_told_so() -> None:
    (chunked,), (step,) = right(find_exercise("06.3")), right(find_exercise("06.2"))
    assert "(out, state)" in check("06.3", lambda *given: chunked(*given)[0]).message
    assert "(out, memory, normaliser)" in check("06.2", lambda *given: step(*given)[:2]).message


def test_two_mistakes_at_once_are_both_named() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor) -> tuple[Tensor, ...]:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        new = memory + k[..., None] * v[..., None, :]
        return (q[..., None] * new).sum(-2), new, normaliser

    found = names(check("06.2", both))
    assert "not divided by the normaliser" in found
