"""Generation: sampling at its limits, stop tokens, prompts of different lengths, arguments by name."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_tools import decoder, prompt
from torch import Tensor

from kvlearn.attention import DynamicScaling, LongRopeScaling, RopeConfig
from kvlearn.model import MoEConfig, Spec
from kvlearn.model.generation import sample

LENGTHS = (9, 4, 1, 6)
PROMPTS = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def drawn(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    return sample(logits, temperature, top_p, torch.Generator().manual_seed(0), top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_limits_of_sampling_are_the_greedy_token(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype) * 20
    logits[:, 7] = -torch.inf
    greedy = logits.argmax(-1)
    for options in (
        *({"temperature": t} for t in (1e-5, 1e-20, 1e-38, 1e-46, 1e-300, 5e-324)),
        *({"top_p": p} for p in (1e-8, 1e-38, 1e-46, 1e-300, 5e-324)),
        {"top_k": 1},
        {"top_k": 1, "temperature": 1e30},
    ):
        chosen = drawn(logits, **options)  # type: ignore[arg-type]
        # Rounded logits can be equal: then either is right.
        assert torch.equal(logits.gather(1, chosen[:, None]), logits.gather(1, greedy[:, None])), options
    assert (drawn(logits, 1e300) != 7).all()  # nearly uniform, but never what has no probability


def test_logits_may_be_infinite_but_not_nan() -> None:
    assert drawn(torch.tensor([[0.0, torch.inf, 3.0]])).tolist() == [1]
    assert drawn(torch.tensor([[-torch.inf, 1.0, -torch.inf]])).tolist() == [1]
    assert drawn(torch.tensor([[1e38, -1e38]]), 1e-30).tolist() == [0]
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits: expected numbers, got NaN"):
            drawn(torch.tensor([[0.0, torch.nan]]), temperature)


def test_top_k_keeps_the_k_most_likely_and_top_p_counts_among_them() -> None:
    logits = torch.tensor([0.15, 0.5, 0.3, 0.05]).log().expand(5000, 4)

    def kept(k: int, p: float = 1.0) -> set[int]:
        return set(drawn(logits, top_k=k, top_p=p).tolist())

    assert kept(1) == {1}
    assert kept(2) == {1, 2}
    assert kept(3) == {0, 1, 2}
    assert kept(4) == kept(100) == {0, 1, 2, 3}
    assert kept(2, 0.6) == {1}  # 0.5 / 0.8 = 0.625 of the two
    assert kept(3, 0.6) == {1, 2}  # 0.5 / 0.95 = 0.526 of the three
    shares = drawn(logits, top_k=2).bincount(minlength=4) / 5000
    torch.testing.assert_close(shares, torch.tensor([0, 0.625, 0.375, 0]), atol=0.02, rtol=0)


def test_a_row_ends_with_its_stop_token() -> None:
    model = decoder(["full"])
    free = model.generate(prompt(), 20, stop=())
    new = free[:, 9:].tolist()
    ends = [new[0][5], new[1][11]]
    stopped = model.generate(prompt(), 20, stop=ends)
    for row, text in zip(stopped[:, 9:].tolist(), new, strict=True):
        at = next(i for i, token in enumerate(text) if token in ends)
        assert row == text[: at + 1] + [ends[0]] * (len(row) - at - 1)
    longest = max(next(i for i, token in enumerate(text) if token in ends) for text in new)
    assert stopped.shape[1] == 9 + longest + 1
    padded = decoder(["full"], pad_token=3).generate(prompt(), 20, stop=ends)
    (ended,) = [row for row in range(2) if stopped[row, -1] == stopped[row, -2] == ends[0]]
    assert padded[ended, -1] == 3
    assert torch.equal(padded[1 - ended], stopped[1 - ended])
    beyond = decoder(["full"], pad_token=50).generate(prompt(), 20, stop=ends)  # not in the vocabulary
    assert torch.equal(beyond, stopped)
    first = model.generate(prompt()[:1], 20, stop=new[0][5])  # one token, not in a list
    assert first[0].tolist() == free[0, : 9 + new[0].index(new[0][5]) + 1].tolist()


@pytest.mark.parametrize(
    "layers",
    [
        ["full"],
        ["gqa", Spec("gqa", reads=-1)],
        ["mla"],
        ["full", Spec("window", window=40, n_sinks=2)],
        ["moba"],
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [None, 4])
def test_prompts_of_different_lengths_are_each_continued_as_if_alone(layers: Any, chunk: int | None) -> None:
    model = decoder(layers)
    alone = [model.generate(row[None], 12)[0] for row in PROMPTS]
    together = model.generate(PROMPTS, 12, chunk=chunk)
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    as_lists = model.generate([row.tolist() for row in PROMPTS], 12, use_cache=False)
    assert [row.tolist() for row in as_lists] == [row.tolist() for row in alone]


@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), chunk=st.integers(1, 9))
def test_any_lengths_in_any_chunks_are_continued_as_if_alone(lengths: list[int], chunk: int) -> None:
    model = decoder(["full"], n_layers=2, experts=MoEConfig(4, 2, 8))
    rows = [PROMPTS[0][:n] for n in lengths]
    together = model.generate(rows, 5, chunk=chunk)
    assert [row.tolist() for row in together] == [model.generate(row[None], 5)[0].tolist() for row in rows]


def test_each_of_several_prompts_ends_with_its_own_stop_token() -> None:
    model = decoder(["full"])
    free = model.generate(PROMPTS, 12)
    stop = [int(free[0][9 + 3]), int(free[2][1 + 7])]
    alone = [model.generate(row[None], 12, stop=stop)[0] for row in PROMPTS]
    together = model.generate(PROMPTS, 12, stop=stop)
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    assert len({len(row) - n for row, n in zip(together, LENGTHS, strict=True)}) > 1


def test_lists_of_one_length_are_continued_by_any_model() -> None:
    model = decoder(["mamba", "full"])
    together = model.generate(prompt().tolist(), 6)
    assert torch.equal(torch.stack(together), model.generate(prompt(), 6))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (["full", "mamba"], r"layer 1 \(mamba\) keeps a StateCache"),
        (["gated_delta"], r"layer 0 \(gated_delta\) keeps a StateCache"),
        (["nsa"], r"layer 0 \(nsa\) keeps a NSACache"),
        ([Spec("window", window=5)], r"layer 0 \(window\) keeps a RingCache"),
    ],
    ids=str,
)
def test_a_model_that_cannot_forget_padding_says_so_by_name(layers: Any, says: str) -> None:
    model = decoder(layers)
    with pytest.raises(ValueError, match=f"^tokens: expected prompts of one length, since {says}"):
        model.generate(PROMPTS, 3)
    together = model.generate(PROMPTS, 3, use_cache=False)
    assert [row.tolist() for row in together] == [model.generate(row[None], 3)[0].tolist() for row in PROMPTS]


def test_angles_that_depend_on_the_longest_row_are_refused_past_their_length() -> None:
    for scaling in (DynamicScaling(2.0, 14), LongRopeScaling((1.0,) * 4, (4.0,) * 4, 14)):
        model = decoder(["full"], rope=RopeConfig(1e4, scaling))
        alone = [model.generate(row[None], 5)[0] for row in PROMPTS]
        assert [row.tolist() for row in model.generate(PROMPTS, 5)] == [row.tolist() for row in alone]
        with pytest.raises(ValueError, match=f"tokens: .* angles of {type(scaling).__name__} depend"):
            model.generate(PROMPTS, 6)


def test_a_text_that_becomes_long_gets_the_other_angles_for_all_its_keys() -> None:
    """From the first token past the original length on: the cache is filled again, as if there were none."""
    scaling = LongRopeScaling((1.0,) * 4, (9.0,) * 4, 12)
    model = decoder(["full"], rope=RopeConfig(1e4, scaling))
    expected = model.generate(prompt(), 12, use_cache=False)
    for chunk in (None, 4):
        assert torch.equal(model.generate(prompt(), 12, chunk=chunk), expected)


@pytest.mark.usefixtures("unchecked_shapes")
def test_every_argument_is_refused_by_its_name() -> None:
    model, nan = decoder(["full"], n_layers=1), float("nan")
    wrong: dict[str, tuple[Any, ...]] = {
        "tokens": (
            None, 3, "abc", [], [[]], [3], [None], [[1.5]], [[True]], [[-1]], [[50]], [["a"]], [prompt()],
            [torch.zeros(3)], [torch.zeros(0, dtype=torch.long)], prompt().bool(), prompt().cfloat(),
            prompt()[:0], prompt() - 60, {1: 2},
        ),
        "n": (0, -1, 1.5, None, "3", True),
        "temperature": (-1e-9, nan, float("inf"), "1", None, torch.ones(()), True),
        "top_k": (0, -1, 1.5, "3", True),
        "top_p": (0, 0.0, -0.1, 1.0001, nan, "0.5", None),
        "stop": (-1, 50, 1.5, [None], "a", [[1]], [1, 50], True),
        "seed": (1.5, "0", 2**64, -(2**64)),
        "chunk": (0, -1, 1.5, "2"),
        "use_cache": (None, 1),
        "progress": (None, 1),
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=rf"^(len\()?{name}\b"):
                model.generate(**{"tokens": prompt(), "n": 2, name: value})  # type: ignore[call-overload]
