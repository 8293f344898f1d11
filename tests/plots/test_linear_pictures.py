"""The pictures of chapter 06 show states as their recurrences leave them, and recall as it was measured."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvlearn import plots
from kvlearn.model import Decoder, ModelConfig
from kvlearn.plots.linear import RULES
from kvlearn.study import recall


def by_hand(keys: Tensor, values: Tensor, decay: float, beta: float) -> dict[str, list[Tensor]]:
    """The three rules as they are written on paper."""
    states = {rule: [torch.zeros(keys.shape[1], values.shape[1])] for rule in RULES}
    for k, v in zip(keys, values, strict=True):
        adds, fades, erases = (states[rule][-1] for rule in RULES)
        states["adds"].append(adds + torch.outer(k, v))
        states["fades"].append(decay * fades + torch.outer(k, v))
        states["erases"].append(erases + beta * torch.outer(k, v - erases.T @ k))
    return {rule: after[1:] for rule, after in states.items()}


def test_the_states_are_those_of_the_three_rules() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(4, 5) / 3, torch.randn(4, 3)
    data = plots.state_memory(keys, values, decay=0.7, beta=0.4).data
    for rule, states in by_hand(keys, values, 0.7, 0.4).items():
        torch.testing.assert_close(data["states"][rule].float(), torch.stack(states))
        for t, state in enumerate(states):
            for read in data["reads"][rule][t]:
                torch.testing.assert_close(read.given.float(), state.T @ keys[read.key])


def test_a_key_written_twice_gives_a_sum_a_faded_sum_or_the_new_value() -> None:
    reads = plots.state_memory().data["reads"]
    assert [read.text for read in reads["adds"][-1]] == ["k₁ gives v₁ + v₃ ✗", "k₂ gives v₂ ✓"]
    assert [read.text for read in reads["fades"][-1]] == ["k₁ gives 0.36 v₁ + v₃ ✗", "k₂ gives 0.6 v₂ ✗"]
    assert [read.text for read in reads["erases"][-1]] == ["k₁ gives v₃ ✓", "k₂ gives v₂ ✓"]
    assert [read.wanted for read in reads["adds"][-1]] == [2, 1]


def test_a_key_is_asked_from_its_first_write_on() -> None:
    for rule in RULES:
        reads = plots.state_memory().data["reads"][rule]
        assert [[read.key for read in some] for some in reads] == [[0], [0, 1], [0, 1]]


def test_of_many_terms_the_two_largest_are_named() -> None:
    keys = torch.nn.functional.normalize(torch.eye(3) + 0.3, dim=1)
    (first, _) = plots.state_memory(keys, torch.eye(3)).data["reads"]["adds"][-1]
    assert first.text.startswith("k₁ gives v₁ + 0.")
    assert first.text.endswith(" … ✗")


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.eye(3), torch.eye(2), r"values: expected shape \(3, numbers of a value\), got \(2, 2\)"),
        (torch.eye(10), torch.eye(10), r"len\(keys\): expected at most 9"),
    ],
)
def test_keys_and_values_that_do_not_fit_are_refused(keys: Tensor, values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.state_memory(keys, values)


def recall_rows() -> list[dict[str, Any]]:
    """Rows as ``kvlearn study recall`` keeps them: more is right with a larger state, and with lr 0.02."""
    return [
        {
            "design": design,
            "run": f"{design}, key_dim={size}",
            "n_pairs": n_pairs,
            "state_bytes": 128 * size,
            "training": {"lr": lr},
            "seed": seed,
            "accuracy": (size / 8 - 0.01 * (n_pairs == 24) + 0.02 * seed) * (1 if lr == 0.02 else 0.5),
            "seconds": 2.0,
        }
        for n_pairs in (12, 24)
        for design, sizes in {"full": [7], "short_conv": [0], "linear": [4, 2], "delta": [3, 6]}.items()
        for size in sizes
        for lr in (0.01, 0.02)
        for seed in (0, 1)
    ]


def test_each_point_is_the_mean_over_seeds_at_the_best_learning_rate() -> None:
    cells = plots.recall_over_state(recall_rows()).data["cells"]
    assert cells[12]["linear, key_dim=4"] == ("linear", 512, pytest.approx(0.51), pytest.approx(0.01))
    assert cells[24]["linear, key_dim=4"] == ("linear", 512, pytest.approx(0.50), pytest.approx(0.01))


def test_a_panel_a_number_of_pairs_a_line_a_design_a_ceiling_and_a_floor() -> None:
    picture = plots.recall_over_state(recall_rows(), designs=["delta"])
    panels = picture.figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == [
        "12 pairs\nfull attention keeps 896 B",
        "24 pairs\nfull attention keeps 896 B",
    ]
    ceiling, floor, line = panels[0].lines[:3]
    assert list(ceiling.get_ydata()) == pytest.approx([0.885, 0.885])
    assert list(floor.get_ydata()) == pytest.approx([0.01, 0.01])
    assert list(line.get_xdata()) == [384, 768]
    assert "delta 38% with 384 B to 76% with 768 B" in picture.alt


def test_a_design_that_was_not_recorded_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"designs: expected one of 'linear', 'delta'; got 'gamma'"):
        plots.recall_over_state(recall_rows(), designs=["gamma"])


def test_the_curves_are_the_runs() -> None:
    model = Decoder(ModelConfig(d_model=8, n_layers=1, n_heads=1))
    curve = [recall.Point(20, 3.0, 0.1), recall.Point(40, 1.0, 0.6)]
    picture = plots.recall_curves({"delta": recall.Run(model, curve, 0.9, 0.7, 5.0)})
    assert picture.data["curves"] == {"delta": [(20, 0.1), (40, 0.6)]}
    (line,) = picture.figure.axes[0].lines
    assert list(line.get_ydata()) == [0.1, 0.6]
    assert "delta 70% after 40 steps in 5 s" in picture.alt
