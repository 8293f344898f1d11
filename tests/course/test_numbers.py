"""Numbers that the chapters' text states, computed again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlearn.measure import DEVICES, MODELS, results
from kvlearn.parallel import Layout, Plan
from kvlearn.parallel.simulate import LINKS, Shape, hidden_from, ring_bytes, simulate
from kvlearn.study import base_model, corpus
from kvlearn.study.routing import compare
from kvlearn.verdict import CLAIMS, RELEASED, Records
from kvlearn.verdict.released import has_latents, shares_heads

ROOT = Path(__file__).resolve().parents[2]


def cells(path: str, kind: str) -> list[str]:
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def rank_of_90_percent(table: torch.Tensor) -> int:
    energy = torch.linalg.svdvals(table.double()) ** 2
    return int((energy.cumsum(0) / energy.sum() < 0.9 - 1e-12).sum()) + 1


def test_most_of_the_energy_of_the_keys_is_their_mean() -> None:
    """Chapter 03, layer 2 of the base model: as they are, and with the mean of each table taken off."""
    base, text = base_model(), corpus()
    starts = torch.linspace(0, len(text.train) - 257, 24).long()
    inputs: list[torch.Tensor] = []
    hook = base.blocks[2].mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        base(text.train[starts[:, None] + torch.arange(256)].long())
        hook.remove()
        layer: Any = base.mixers[2]
        x = inputs[0]
        keys, values = (w(x).flatten(0, 1) for w in (layer.k_proj, layer.v_proj))
        turned = layer.project_kv(x).k.transpose(1, 2).flatten(2).flatten(0, 1)
    both = torch.cat((keys, values), dim=1)
    tables = {"keys": keys, "values": values, "keys after RoPE": turned, "both": both}
    assert {name: rank_of_90_percent(table) for name, table in tables.items()} == {
        "keys": 11,
        "values": 33,
        "keys after RoPE": 31,
        "both": 23,
    }
    assert {name: rank_of_90_percent(table - table.mean(0)) for name, table in tables.items()} == {
        "keys": 28,
        "values": 32,
        "keys after RoPE": 52,
        "both": 38,
    }
    energy = torch.linalg.svdvals(keys.double()) ** 2
    first, mean = torch.linalg.svd(keys, full_matrices=False).Vh[0], keys.mean(0)
    assert energy[0] / energy.sum() == pytest.approx(0.72, abs=0.005)
    assert (first @ mean).abs() / mean.norm() > 0.99


def test_the_paths_of_latent_attention_meet_where_the_formula_with_the_folding_says() -> None:
    """Chapter 03; a head's operations as exercise 03.6 counts them."""
    D, R, Dr = 128, 512, 64  # DeepSeek-V3
    (said,) = (
        text for text in cells("notebooks/03_multi_head_compression.ipynb", "markdown") if "2DR/S" in text
    )
    for S, meet in ((1000, 146), (10**9, 171)):
        T = 2 * D * R / (2 * R - 2 * D + 2 * D * R / S)
        naive = 2 * S * R * 2 * D + 2 * T * S * (2 * D + Dr)
        absorbed = 2 * T * R * 2 * D + 2 * T * S * (2 * R + Dr)
        assert naive == pytest.approx(absorbed)
        assert round(T) == meet
        assert str(meet) in said


def test_the_indexed_design_of_exercise_05_7_has_a_scale_beside_each_index_key() -> None:
    path = "solutions/05_sparse_attention/05_sparse_attention.ipynb"
    (source,) = (cell for cell in cells(path, "code") if cell.startswith("def sparse_bytes("))
    answer: dict[str, Any] = {}
    exec(source, answer)
    heads = {"query_heads": 6, "kv_heads": 2, "head_dim": 4, "number_bytes": 2}
    small = {"kind": "indexed", **heads, "top_k": 10, "index_dim": 6, "index_bytes": 1, "scale_bytes": 4}
    assert answer["sparse_bytes"](small, 100) == {"stored": 4200, "read": 1320}
    as_in_v3_2 = {**small, "index_dim": 128}
    without = {**as_in_v3_2, "kind": "full"}
    assert (
        answer["sparse_bytes"](as_in_v3_2, 1)["stored"] - answer["sparse_bytes"](without, 1)["stored"] == 132
    )


def test_mqa_is_above_gqa_by_less_than_the_error_at_half_the_bytes() -> None:
    """Chapter 02, routing: small models from nothing."""
    trained = results.load("routing")[0].rows
    above, error = compare(trained)["mqa"]["above_gqa"]
    assert 0 < above < error
    stored = {row["run"]: row["bytes_stored_per_token"] for row in trained}
    assert 2 * stored["mqa"] == stored["gqa"]


def test_a_channel_of_mamba_is_a_matrix_over_all_pairs_and_each_channel_another() -> None:
    """Chapter 06: m_ts = Σ_n C_tn exp((Δ_{s+1} + … + Δ_t) A_n) B_sn Δ_s."""
    torch.manual_seed(0)
    T, E, N = 7, 3, 4
    x, B, C = (torch.randn(T, n, dtype=torch.float64) for n in (E, N, N))
    dt, A = torch.rand(T, E, dtype=torch.float64), -torch.rand(E, N, dtype=torch.float64)
    h, y = torch.zeros(E, N, dtype=torch.float64), []
    for t in range(T):
        h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * B[t]
        y.append(h @ C[t])
    waited = dt.cumsum(0)[:, None] - dt.cumsum(0)[None]  # (t, s, E)
    decay = torch.einsum("tse, en -> tsen", waited, A).exp()
    matrices = torch.einsum("tn, tsen, sn, se -> ets", C, decay, B, dt).tril()
    torch.testing.assert_close(torch.einsum("ets, se -> te", matrices, x), torch.stack(y))
    assert not torch.allclose(matrices[0], matrices[1])


def test_predictions_of_chapter_07() -> None:
    """Windows in 24 of 32 layers; one million tokens on 24 GB; the reach of four windows of 8."""
    n, window = 131_072, 1024
    assert 32 * n / (8 * n + 24 * window) == pytest.approx(3.9, abs=0.01)
    left = 24e9 - 2 * MODELS["Llama 3.1 8B"].n_parameters
    assert [int(left // (bytes_a_token * 2**20)) for bytes_a_token in (4096, 1152)] == [1, 6]
    assert 4 * (8 - 1) == 28
    places = [(asked, 2 * pair) for asked in range(16, 64) for pair in range(8)]
    assert sum(asked - key > 28 + 3 for asked, key in places) / len(places) == pytest.approx(0.5, abs=0.03)
    text = "\n".join(cells("notebooks/07_hybrids.ipynb", "markdown"))
    for said in ("3.9 times smaller", "16.1 GB of weights", "reach 28 tokens back", "4096 bytes", "1152"):
        assert said in text


def test_eight_of_thirteen_models_of_chapter_07_have_two_kinds_of_layers() -> None:
    (source,) = (cell for cell in cells("notebooks/07_hybrids.ipynb", "code") if "layer_stripes" in cell)
    names = [name for name in MODELS if f'"{name}"' in source]
    mixed = [name for name in names if len({MODELS[name].layer(i).kind for i in range(60)}) == 2]
    assert (len(mixed), len(names)) == (8, 13)


def test_predictions_of_chapter_08() -> None:
    """Work in contiguous order, bytes of a ring and of a tree, hidden messages, ten million tokens."""
    work = Plan(Layout(1024, 4)).work
    assert max(work) / min(work) == pytest.approx(7.0, abs=0.05)
    assert sum(work) / max(work) == pytest.approx(2.3, abs=0.05)
    small = Shape(n_heads=8, n_kv_heads=2, head_dim=32, itemsize=4)
    assert (small.block_bytes(256), ring_bytes(small, 4, 256)) == (131_072, 384 * 1024)
    shape, rate = Shape(n_heads=32, n_kv_heads=8, head_dim=128), DEVICES["H100"].peak / 2
    assert hidden_from(shape, 500e12, LINKS[-1]) == pytest.approx(20_000)
    assert [round(hidden_from(shape, rate, link)) for link in LINKS] == [550, 4948, 19_790]
    assert 2 * 7 / 8 * 32 * 129 * 4 < 32 * 1024  # a tree over 8 devices
    assert 65_536**2 * 4 * 4 == 64 * 1024**3  # scores of 4 heads at 64K tokens
    seconds = {P: 32 * simulate(shape, P, 10_000_000 // P, rate, LINKS[0]).total for P in (64, 1024)}
    assert seconds[64] == pytest.approx(15 * 60, rel=0.1)
    assert seconds[1024] == pytest.approx(60, rel=0.2)
    assert 10_000_000 // 1024 < 19_790 < 10_000_000 // 64
    text = "\n".join(cells("notebooks/08_ring_attention.ipynb", "markdown"))
    for said in (
        "7.0 times",
        "as 2.3 would be",
        "131,072",
        "384 KiB",
        "20,000 tokens",
        "19,790 over Ethernet",
    ):
        assert said in text
    for said in ("4,948 over InfiniBand", "550 over NVLink", "under 32 KiB", "64 GiB", "about a minute"):
        assert said in text


def test_numbers_of_chapter_13() -> None:
    """The text's numbers for 405B and 69 KB per token; all others are printed."""
    found = {
        name: claim.check(Records()).numbers for name, claim in ((c.id, c) for c in CLAIMS) if name in CITED
    }
    text = "\n".join(cells("notebooks/13_verdict.ipynb", "markdown"))
    for name, said in CITED.items():
        for key, (times, of, form) in said.items():
            ratio = found[name][key] / (found[name][of] if of else 1)
            assert form.format(ratio) == times
            assert times in text
    assert all(shares_heads(model) or has_latents(model) for model in RELEASED)
    assert len({model.name.split()[0].split("-")[0] for model in RELEASED if has_latents(model)}) == 2


# By claim and number: what the text says, the number that it is divided by, and how it is rounded.
CITED: dict[str, dict[str, tuple[str, str, str]]] = {
    "M2": {
        "article": ("8 times the cache", "published", "{:.0f} times the cache"),
        "unshared": ("16 times as much", "published", "{:.0f} times as much"),
    },
    "69 KB": {
        "Llama 3.1 8B": ("1.9x", "", "{:.1f}x"),
        "Llama 3.1 405B": ("7.3x", "", "{:.1f}x"),
        "itself without MLA": ("57x", "", "{:.0f}x"),
    },
}
