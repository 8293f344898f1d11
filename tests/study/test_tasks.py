"""Every question has one answer, which follows from the text."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.study import TrainConfig, recall
from kvlearn.study.tasks import Induction, Needle, SelectiveCopy, longer

sizes = st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 999))


@given(sizes)
def test_the_asked_key_is_once_before_its_question_and_the_answer_after_it(
    size: tuple[int, int, int],
) -> None:
    n, more, seed = size
    task = Needle(n, 2 * n + 1 + more, 3, n + 1, n + 2)
    tokens, asked, answers = task.texts(4, torch.Generator().manual_seed(seed))
    assert int(tokens.max()) < task.vocab_size
    assert asked.tolist() == [[task.length - 1]] * 4
    for row, (answer,) in zip(tokens.tolist(), answers.tolist(), strict=True):
        keys = [i for i, token in enumerate(row) if 3 <= token < 3 + n + 1]
        values = [i for i, token in enumerate(row) if token >= 3 + n + 1]
        assert keys.pop() == task.length - 1
        assert [i + 1 for i in keys] == values
        assert len({row[i] for i in keys}) == len({row[i] for i in values}) == n
        assert [row[i + 1] for i in keys if row[i] == row[-1]] == [answer]


def test_any_needle_is_asked_for_at_any_depth() -> None:
    tokens, _, _ = Needle(3, 20).texts(600, torch.Generator().manual_seed(0))
    place = (tokens[:, :-1] == tokens[:, -1:]).float().argmax(1)
    assert place.bincount(minlength=18).min() > 10  # of 600 / 18 = 33


@given(sizes)
def test_the_last_token_of_induction_occurred_once_before(size: tuple[int, int, int]) -> None:
    _, more, seed = size
    task = Induction(3 + more, 2 + more)
    tokens, asked, answers = task.texts(4, torch.Generator().manual_seed(seed))
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < task.vocab_size
    for row, (place,), (answer,) in zip(tokens.tolist(), asked.tolist(), answers.tolist(), strict=True):
        assert place == task.length - 1
        assert row[:-1].count(row[-1]) == 1
        assert row[row.index(row[-1]) + 1] == answer


@given(sizes)
def test_copies_are_the_symbols_in_their_order(size: tuple[int, int, int]) -> None:
    n, more, seed = size
    task = SelectiveCopy(n, 2 * n + 1 + more, 1 + more)
    tokens, asked, answers = task.texts(4, torch.Generator().manual_seed(seed))
    for row, places, wanted in zip(tokens.tolist(), asked.tolist(), answers.tolist(), strict=True):
        assert row[0] == 1
        assert [token for token in row[1 : task.length - n] if token] == wanted
        assert all(2 <= symbol < 2 + task.n_symbols for symbol in wanted)
        assert [row[place] for place in places] == list(range(2 + task.n_symbols, task.vocab_size))


@pytest.mark.parametrize("task", [Needle(2, 12), Induction(12), SelectiveCopy(2, 12)])
def test_the_same_seed_gives_the_same_texts_and_longer_ones_keep_the_rest(task: Any) -> None:
    one, same, other = (task.texts(2, torch.Generator().manual_seed(seed)).tokens for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    twice = longer(task, 2)
    assert {**vars(task), "length": 24} == vars(twice)
    assert twice.vocab_size == task.vocab_size


def test_attention_learns_a_needle_and_finds_it_in_longer_texts() -> None:
    task = Needle(1, 12, 4, 4, 4)
    training = TrainConfig(steps=150, batch=64, lr=2e-2, warmup=10, weight_decay=0.0)
    found = recall.train("full", task, training, until=0.99, progress=False)
    assert found.accuracy > 0.9
    assert recall.score(found.model, longer(task, 2))[1] > 0.6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Needle(3, 6), "length: expected at least 7, got 6"),
        (lambda: Needle(3, n_keys=2), "n_keys: expected at least 3, got 2"),
        (lambda: Induction(2), "length: expected at least 3, got 2"),
        (lambda: SelectiveCopy(4, 8), "length: expected at least 9, got 8"),
        (lambda: longer(Needle(), 0), "factor: expected at least 1, got 0"),
    ],
)
def test_a_task_that_cannot_be_written_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_hybrid_is_a_pattern_of_mixers_behind_the_convolution() -> None:
    model = recall.new_model(["linear", "full"], Needle(), n_mixers=3)
    assert [spec.name for spec in model.config.specs] == ["short_conv", "linear", "full", "linear"]
