"""Any mechanism in any layer, two in one layer, experts beside them, and the table of their bytes."""

import json
from pathlib import Path
from typing import Any

import model_tools
import pytest
import torch
import torch.nn.functional as F
from model_tools import prompt
from torch import Tensor

from kvlearn.measure import running_table
from kvlearn.model import Decoder, ModelConfig, MoEConfig, Spec, balance_loss, load, save

MHC_AND_WINDOW = Spec("parallel", parts=["mhc", Spec("window", window=5)])
HYBRIDS: dict[str, list[str | Spec]] = {
    "3 to 1": [*3 * ["gated_delta"], "full"],
    "memory and a window in one layer": [MHC_AND_WINDOW],
    "memory and windows in turn": ["mhc", Spec("window", window=5)],
    "attention and a state in one layer": [
        Spec("parallel", parts=[Spec("mamba2", n_heads=6, d_state=5), "gqa"], normalise=True)
    ],
    "parts within a part": [
        Spec(
            "parallel",
            parts=[Spec("parallel", parts=["full", Spec("mamba2", n_heads=6, dt_limit=(0.1, 0.5))])],
        )
    ],
    "other heads in one of the layers": [Spec("delta", n_heads=6, head_dim=4), "full"],
    "compressed, selected and a window": ["nsa", "window"],
}
every_hybrid = pytest.mark.parametrize("hybrid", HYBRIDS)


def decoder(hybrid: str, **fields: Any) -> Decoder:
    return model_tools.decoder(HYBRIDS[hybrid], **fields)


@every_hybrid
def test_cache_and_no_cache_generate_the_same_tokens(hybrid: str) -> None:
    model = decoder(hybrid)
    expected = model.generate(prompt(), 12, use_cache=False)
    assert torch.equal(model.generate(prompt(), 12), expected)
    assert torch.equal(model.generate(prompt(), 12, chunk=4), expected)


@every_hybrid
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(hybrid: str, tmp_path: Path) -> None:
    model = decoder(hybrid)
    assert ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert torch.equal(again(prompt()), model(prompt()))


def test_a_spec_in_a_spec_is_what_json_gives_back() -> None:
    plain = Spec("parallel", parts=[["mhc", {}], ["window", {"window": 5}]])
    assert Spec("parallel", parts=[Spec("mhc"), Spec("window", window=5)]) == plain
    assert hash(plain) == hash(Spec("parallel", parts=(("mhc", {}), ("window", {"window": 5}))))


def test_a_layer_may_have_another_number_of_heads() -> None:
    assert [mixer.n_heads for mixer in decoder("other heads in one of the layers").mixers] == [6, 3, 6, 3]


@every_hybrid
def test_the_table_counts_what_is_allocated_at_every_length(hybrid: str) -> None:
    model = decoder(hybrid)
    for length in (1, 7, 40):
        assert model.table(length)[-1]["stored"] == model.new_cache(1, length).nbytes
    table, one = model.table(7, 40), model.table(40)
    assert [row["stored at 40"] for row in table] == [row["stored"] for row in one]
    assert [row["read at 40"] for row in table] == [row["read"] for row in one]


def test_the_table_is_printed_at_four_lengths_in_one_unit() -> None:
    table = decoder("3 to 1").table(dtype=torch.bfloat16)
    assert table.columns == [
        f"{what} at {n}" for n in ("4K", "32K", "128K", "1M") for what in ("stored", "read")
    ]
    assert table[-1]["stored at 1M"] == 2 * 24 * 2**20 * 2 + 3 * (3 * 8 * 8 + 3 * 72) * 4
    text = repr(table).splitlines()
    assert text[0] == "Bytes in MiB"
    assert text[1].split()[:4] == ["layer", "mechanism", "stored", "at"]
    assert text[5].split()[:3] == ["3", "full", "0.375"]
    assert text[6].split()[-1] == "96"
    page = table._repr_html_()
    assert page.startswith("<table>")
    assert page.count("<tr>") == 6


def test_a_large_number_keeps_its_digits() -> None:
    from kvlearn.model.table import short, three_digits

    assert [three_digits(x) for x in (0.0, 0.001234, 1.005, 99.95, 1234.6)] == [
        "0",
        "0.00123",
        "1",
        "100",
        "1,235",
    ]
    assert [short(n) for n in (1000, 4096, 2**20, 3 * 2**20)] == ["1000", "4K", "1M", "3M"]


@torch.no_grad()
def test_a_decode_step_does_the_attention_of_a_layer_of_two_parts() -> None:
    lengths_seen = []

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        lengths_seen.append(lengths.tolist())
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        used = torch.arange(k.shape[2]) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=used).squeeze(2)

    model = decoder("attention and a state in one layer")
    expected = model.generate(prompt(), 4)
    model.decode_with(step)
    assert torch.equal(model.generate(prompt(), 4), expected)
    assert lengths_seen == [[n, n] for n in (10, 11, 12) for _ in range(4)]  # 4 layers


def test_tables_name_the_parts_of_a_layer() -> None:
    assert decoder("memory and a window in one layer").table(8)[0]["mechanism"] == "mhc + window"
    pair = Spec("parallel", parts=["full", Spec("window", window=512)])
    (row,) = running_table((pair, "full", "full"), n_layers=3).rows
    assert row["mechanism"] == "full + window (window=512), then 2 × full"


EXPERTS = MoEConfig(4, 2, 16, d_ff_shared=8)


@torch.no_grad()
def test_experts_are_where_the_configuration_says(tmp_path: Path) -> None:
    model = decoder("3 to 1", experts=EXPERTS, dense_layers=[0])
    assert [type(block.mlp).__name__ for block in model.blocks] == ["SwiGLU", "MoE", "MoE", "MoE"]
    expected = model.generate(prompt(), 8, use_cache=False)
    assert torch.equal(model.generate(prompt(), 8), expected)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert torch.equal(again(prompt()), model(prompt()))


def test_a_token_uses_fewer_parameters_than_a_model_has() -> None:
    model = decoder("3 to 1", experts=EXPERTS)
    idle = 4 * (4 - 2) * 3 * 24 * 16
    assert model.n_parameters - model.n_active_parameters == idle
    dense = decoder("3 to 1")
    assert dense.n_active_parameters == dense.n_parameters


def test_a_training_loop_can_add_the_loss_that_balances_experts() -> None:
    model = decoder("3 to 1", experts=EXPERTS).train()
    model(prompt())
    loss = balance_loss(model)
    loss.backward()
    assert 1 < loss.item() < 4
    assert all(block.mlp.router.weight.grad.abs().sum() > 0 for block in model.blocks)
