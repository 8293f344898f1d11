"""The study of sinks: a planted sink draws weight, and each variant is the model that it says."""

import pytest
import torch
from torch import Tensor

from kvlearn.attention.core import causal_mask, split_heads
from kvlearn.model import Decoder, ModelConfig
from kvlearn.study import TrainConfig, study_sinks
from kvlearn.study.report import sinks_table
from kvlearn.study.sinks import FIRST, log_weight_of_first, plant_sink, with_first

TINY = TrainConfig(steps=40, batch=8, length=48, lr=1e-2, warmup=4)


@pytest.fixture
def text() -> Tensor:
    return torch.randint(97, 105, (4000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def base() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(d_model=32, n_layers=2, n_heads=4)).eval()


def test_the_weight_of_the_first_token_is_the_attentions(base: Decoder) -> None:
    tokens = torch.randint(0, 256, (2, 9))
    log = log_weight_of_first(base, tokens)
    x = base.blocks[0].mixer_norm(base.embed(tokens))
    layer = base.mixers[0]
    q, k = (split_heads(proj(x), 4) for proj in (layer.q_proj, layer.k_proj))
    turned = [layer.rope(part, torch.arange(9)[None]) for part in (q, k)]
    scores = (turned[0] @ turned[1].mT / 8**0.5).masked_fill(~causal_mask(9, 9), -torch.inf)
    torch.testing.assert_close(log[0].exp(), scores.softmax(-1)[..., 0])
    assert log.shape == (2, 2, 4, 9)


def test_planting_draws_weight_to_the_first_token_and_leaves_the_base_alone(
    base: Decoder, text: Tensor
) -> None:
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    planted = plant_sink(base, text, TINY, progress=False)
    tokens = with_first(text[None, :40].long())
    weight = [log_weight_of_first(model, tokens)[..., 20:].exp().mean().item() for model in (base, planted)]
    assert weight[0] < 0.1
    assert weight[1] > 3 * weight[0]
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert tokens[0, 0] == FIRST


def test_a_row_for_each_model_and_variant(base: Decoder, text: Tensor) -> None:
    rows = list(study_sinks(base, TINY, text=text, held_out=text, n_windows=4, progress=False))
    assert [row["run"] for row in rows] == 4 * ["as trained"] + 4 * ["sink planted"]
    full, window, one, four = rows[:4]
    assert full["layers"] == 2 * ["Spec('full')"]
    assert one["layers"] == 2 * ["Spec('window', window=32, n_sinks=1)"]
    for row in rows:
        assert len(row["by_position"]) == TINY.length
        assert row["loss"] == pytest.approx(sum(row["by_position"]) / TINY.length, abs=1e-3)
    assert window["by_position"][:32] == pytest.approx(full["by_position"][:32], abs=2e-4)  # nothing has left
    assert window["by_position"][32:] != pytest.approx(full["by_position"][32:], abs=2e-4)
    assert four["by_position"][:36] == pytest.approx(full["by_position"][:36], abs=2e-4)
    assert len(sinks_table(rows).rows) == 8
