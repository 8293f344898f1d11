"""Associative recall: texts that can only be answered from the text, and models that learn to."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import Mamba, ShortConvolution
from kvlearn.model import Decoder, Spec
from kvlearn.study import TrainConfig, recall, study_recall
from kvlearn.study.capacity import DESIGNS, compare
from kvlearn.study.recall import LIVE, STACK_TASK, STACKS, Recall, Texts, answer, new_model
from kvlearn.study.report import recall_table

SMALL = Recall(n_pairs=2, length=8, n_keys=4, n_values=4)
QUICK = TrainConfig(steps=120, batch=32, lr=2e-2, warmup=10, weight_decay=0.0)


@given(
    n_pairs=st.integers(1, 6),
    more=st.tuples(*3 * [st.integers(0, 9)]),
    seed=st.integers(0, 1000),
)
def test_every_key_is_asked_for_once_and_its_answer_comes_after_it(
    n_pairs: int, more: tuple[int, int, int], seed: int
) -> None:
    task = Recall(n_pairs, 3 * n_pairs + more[0], n_pairs + more[1], n_pairs + more[2])
    tokens, asked, answers = task.texts(3, torch.Generator().manual_seed(seed))
    assert tokens.shape == (3, task.length)
    assert asked.shape == answers.shape == (3, n_pairs)
    for row, places, wanted in zip(tokens.tolist(), asked.tolist(), answers.tolist(), strict=True):
        keys, values = row[: 2 * n_pairs : 2], row[1 : 2 * n_pairs : 2]
        assert len({*keys}) == len({*values}) == n_pairs
        assert all(1 <= key <= task.n_keys for key in keys)
        assert all(task.n_keys < value < task.vocab_size for value in values)
        assert min(places) >= 2 * n_pairs
        assert {row[place]: value for place, value in zip(places, wanted, strict=True)} == dict(
            zip(keys, values, strict=True)
        )
        rest = set(range(2 * n_pairs, task.length)) - {*places}
        assert all(row[place] == 0 for place in rest)


def test_keys_are_asked_for_in_an_order_of_their_own_anywhere() -> None:
    tokens, asked, _ = Recall(4, 20).texts(400, torch.Generator().manual_seed(0))
    assert asked.flatten().bincount()[8:].min() > 80  # of 400 · 4 / 12 = 133 each
    first = tokens.gather(1, asked.sort(dim=1).values[:, :1])[:, 0]
    is_first_pair = (first == tokens[:, 0]).float().mean().item()
    assert 0.15 < is_first_pair < 0.35


def test_the_same_seed_gives_the_same_texts() -> None:
    one, same, other = (Recall().texts(2, torch.Generator().manual_seed(seed)).tokens for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 47}, "length: expected at least 48, got 47"),
        ({"n_keys": 15}, "n_keys: expected at least n_pairs=16, got 15"),
        ({"n_values": 15}, "n_values: expected at least n_pairs=16, got 15"),
        ({"n_pairs": 0}, "n_pairs: expected at least 1, got 0"),
    ],
)
def test_a_task_that_cannot_be_written_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**{"n_pairs": 16, "length": 48, **options})


def test_only_the_answers_count() -> None:
    model, texts = new_model("linear", SMALL), SMALL.texts(5, torch.Generator().manual_seed(0))
    loss, accuracy = answer(model, texts)
    logits = model(texts.tokens)
    losses, right = [], []
    for b in range(5):
        for place, value in zip(texts.asked[b].tolist(), texts.answers[b].tolist(), strict=True):
            losses.append(-logits[b, place].log_softmax(-1)[value])
            right.append(logits[b, place].argmax().item() == value)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert accuracy.item() == pytest.approx(sum(right) / 10)


def test_attention_learns_what_the_convolution_alone_cannot() -> None:
    full, control = (recall.train(spec, SMALL, QUICK, progress=False) for spec in ("full", "short_conv"))
    assert full.accuracy > 0.95
    assert control.accuracy < 0.7  # of two values one is right; the convolution sees one now and then
    assert [point.step for point in full.curve] == list(range(20, 121, 20))
    assert full.curve[-1].accuracy > 0.9
    assert full.curve[0].loss > full.curve[-1].loss


def test_the_same_seed_gives_the_same_run_and_leaves_the_callers_random_numbers_alone() -> None:
    short = replace(QUICK, steps=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = recall.train("linear", SMALL, short, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = recall.train("linear", SMALL, short, progress=False)
    other = recall.train("linear", SMALL, replace(short, seed=1), progress=False)
    assert first.curve == second.curve
    assert first.curve != other.curve


def test_mixers_see_the_same_texts_and_seeds_other_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(model: Decoder, texts: Texts) -> tuple[Tensor, Tensor]:
        seen.append(texts.tokens)
        return answer(model, texts)

    monkeypatch.setattr(recall, "answer", spy)
    for mixer, seed in (("linear", 0), ("short_conv", 0), ("linear", 1)):
        recall.train(mixer, SMALL, replace(QUICK, steps=1, seed=seed), progress=False)
    first, held_out = seen[::2], seen[1::2]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert all(torch.equal(texts, held_out[0]) for texts in held_out)


def test_a_run_ends_where_enough_is_right() -> None:
    run = recall.train("linear", SMALL, QUICK, every=5, until=0.1, progress=False)
    assert run.curve[-1].step < QUICK.steps
    assert run.curve[-1].accuracy >= 0.1
    assert all(point.accuracy < 0.1 for point in run.curve[:-1])


def test_every_design_comes_after_the_same_convolution_() -> None:
    for spec in {spec for specs in DESIGNS.values() for spec in specs} | {*LIVE.values()}:
        torch.manual_seed(0)
        model = new_model(spec, SMALL)
        assert model.config.specs == [Spec("short_conv"), spec]
        has_convolution = any(isinstance(part, ShortConvolution) for part in model.mixers[1].modules())
        assert has_convolution == (spec.name in ("mamba2", "short_conv"))


def test_a_mechanism_draws_its_own_weights_last() -> None:
    mamba = new_model("mamba", SMALL).mixers[1]
    assert isinstance(mamba, Mamba)
    most = mamba.dt_rank**-0.5  # of a uniform draw; the others here are normal, and go beyond
    assert mamba.dt_proj.weight.abs().max() <= most
    assert mamba.in_proj.weight.abs().max() > 3 / 64**0.5


def test_a_row_for_each_task_mechanism_rate_and_seed() -> None:
    designs = {"linear": [Spec("linear", key_dim=2, head_dim=4), Spec("linear", key_dim=4, head_dim=4)]}
    tasks, training = [SMALL, replace(SMALL, n_pairs=1)], replace(QUICK, steps=2)
    rows = list(study_recall(designs, tasks, training, rates=(1e-3, 1e-2), seeds=(0, 1), progress=False))
    assert len(rows) == 2 * 2 * 2 * 2
    assert rows[0]["run"] == "linear, key_dim=2"
    assert rows[0]["layers"] == ["Spec('short_conv')", "Spec('linear', key_dim=2, head_dim=4)"]
    assert {row["state_bytes"] for row in rows} == {4 * 2 * 5, 4 * 4 * 5}  # K x (V + 1) numbers in fp32
    assert rows[0]["training"] == {**rows[0]["training"], "lr": 1e-3, "seed": 0, "length": 8, "steps": 2}
    assert len(recall_table(rows).rows) == len(compare(rows)) == 4


@pytest.mark.slow
def test_runs_side_by_side_give_the_rows_of_runs_in_turn() -> None:
    designs = {"linear": [Spec("linear", key_dim=2, head_dim=4)], "full": [Spec("full", head_dim=4)]}
    in_turn, beside = (
        list(study_recall(designs, [SMALL], replace(QUICK, steps=2), seeds=(0,), jobs=n, progress=False))
        for n in (1, 2)
    )
    names = ("run", "training", "state_bytes")
    assert [[row[n] for n in names] for row in beside] == [[row[n] for n in names] for row in in_turn]
    for a, b in zip(in_turn, beside, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_best_rate_is_that_of_the_best_mean_over_the_seeds() -> None:
    shares = {0.01: (0.9, 0.1), 0.02: (0.6, 0.8)}
    rows = [
        {
            "design": "linear",
            "run": "linear",
            "n_pairs": 8,
            "state_bytes": 64,
            "training": {"lr": lr},
            "accuracy": share,
            "seconds": 2.0,
        }
        for lr, some in shares.items()
        for share in some
    ]
    (cell,) = compare(rows)
    assert (cell.lr, cell.accuracy, cell.error) == (0.02, pytest.approx(0.7), pytest.approx(0.1))


def test_a_stack_has_one_convolution_and_its_mixers() -> None:
    for name, layers in STACKS.items():
        model = new_model(layers, STACK_TASK)
        names = [mixer.name for mixer in model.mixers]
        assert names == ["short_conv", *(spec.name for spec in layers)]
        stored = model.table(STACK_TASK.length)[-1]["stored"]
        if name == "full":
            full = stored
    mix = new_model(STACKS["3 linear : 1 full"], STACK_TASK).table(STACK_TASK.length)[-1]["stored"]
    assert 0.25 < mix / full < 0.3  # a quarter, and three states


def test_what_several_mixers_add_starts_smaller_and_that_of_one_as_before() -> None:
    torch.manual_seed(0)
    one, four = new_model(LIVE["full"], SMALL), new_model(STACKS["full"], SMALL)
    sizes = [model.mixers[1].o_proj.weight.std().item() for model in (one, four)]  # type: ignore[union-attr]
    assert sizes[0] == pytest.approx(32**-0.5, rel=0.1)
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1)


def test_four_windows_do_not_reach_most_questions_and_one_full_layer_does() -> None:
    """The inputs that the answer at a place depends on, by the gradient."""
    for layers, reached in ((STACKS["window"], 32), (STACKS["3 window : 1 full"], 64)):
        torch.manual_seed(0)
        model = new_model(layers, STACK_TASK)
        x = torch.randn(1, 64, 64, requires_grad=True)
        y = x
        for block in model.blocks:
            y = block(y, None, {})
        y[0, -1].sum().backward()
        assert x.grad is not None
        assert int((x.grad[0].abs().sum(-1) > 0).sum()) == reached
