"""The pictures of chapter 03 show the sizes and the counts that the mechanisms have."""

import numpy as np
import pytest

from kvlearn import plots


def test_the_largest_intermediate_of_a_path_is_as_counted() -> None:
    data = plots.squeeze(8, 16, 32, 8, n_tokens=1024).data
    assert data["full"] == 2 * 8 * 16
    assert data["cached"] == 40
    assert data["largest"] == {"naive": 1024 * 8 * 32, "absorbed": 1024 * 8}


def test_as_many_cells_as_numbers() -> None:
    patches = plots.squeeze(2, 4, 3, 2, n_tokens=64).figure.axes[0].patches
    cells = [p for p in patches if (p.get_width(), p.get_height()) == (22 / 4, 14 / 2) and p.get_fc()[3] == 0]
    assert len(cells) == 2 * 2 * 4 + 3 + 2


def test_a_latent_wider_than_half_of_what_it_squeezes_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="rank: expected at most 8"):
        plots.squeeze(2, 4, 9)


def test_the_crossover_is_where_the_lines_meet() -> None:
    from kvlearn.attention.mla import crossover, path_flops

    meet = crossover(16, 32)
    flops = {
        path: [path_flops(path, 8, 16, 32, 8, new=n, cached=100_000) for n in (int(meet) - 1, int(meet) + 2)]
        for path in ("naive", "absorbed")
    }
    picture = plots.path_flops([int(meet) - 1, int(meet) + 2], flops, crossover=meet)
    first, last = zip(*picture.data["flops"].values(), strict=True)
    assert first[0] > first[1]
    assert last[0] < last[1]
    assert f"meet at {meet:.3g} tokens" in picture.alt
    assert "meet" not in plots.path_flops([1, 2], {"naive": [1, 1]}, crossover=float("inf")).alt


def test_the_share_of_the_energy_is_of_the_squares_summed() -> None:
    data = plots.spectrum({"here": {"a": [8.0, 1.0, 1.0, 0.0], "flat": np.ones(4)}}, share=0.9).data
    assert data["shares"]["here"]["a"] == pytest.approx([0.8, 0.9, 1, 1])
    assert data["ranks"] == {"here": {"a": 2, "flat": 4}}
    with pytest.raises(ValueError, match="another order"):
        plots.spectrum({"here": {"already summed": [0.8, 0.9, 1.0]}})


def test_the_axis_of_the_spectrum_ends_at_the_largest_possible_rank() -> None:
    both = plots.spectrum(
        {"here": {"a": [4.0, 2.0, 1.0, 0.0]}, "there": {"a": [3.0, 3.0, 1.0, 0.0]}}, largest=3
    )
    assert [panel.get_xlim() for panel in both.figure.axes] == [(0, 3), (0, 3)]
    assert both.data["largest"] == 3


def test_a_score_that_knows_only_distance_does_not_move() -> None:
    wave = np.cos(np.arange(8.0))
    spread = plots.rope_on_latent({"decoupled RoPE": np.ones(8), "RoPE on the latent": wave}).data["spread"]
    assert spread["decoupled RoPE"] == 0
    assert spread["RoPE on the latent"] == pytest.approx(np.ptp(wave))
