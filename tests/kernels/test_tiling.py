"""Tiles that fit the shared memory, and splits that occupy the GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.kernels import Tiling, choose_splits
from kvlearn.kernels.tiling import LATENT_TILINGS, choose_latent_tiling, choose_tiling

START = 4  # time to start a program and to write its partial result, in tiles
H200, A100, RTX = 232_448, 166_912, 101_376  # bytes of shared memory that a program may have


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 200), st.integers(1, 4))
def test_splits_are_few_and_take_the_least_time(
    programs: int, tiles: int, processors: int, each: int
) -> None:
    slots = processors * each
    splits = choose_splits(programs, tiles, processors, each)
    assert 1 <= splits <= max(tiles, 1)
    if programs > slots:
        assert splits == 1

    def time(n: int) -> int:
        return -(-programs * n // slots) * (-(-tiles // n) + START)

    others = range(1, min(max(tiles, 1), slots // programs + 1) + 1)
    assert all(time(splits) < time(n) for n in others if n < splits)
    assert all(time(splits) <= time(n) for n in others)


def test_splits_where_one_can_count_them() -> None:
    assert choose_splits(132, 1000, 132, 1) == 1  # full already
    assert choose_splits(1, 1024, 132, 2) == 256  # four tiles each: 205 to 255 splits would have five to do
    assert choose_splits(1, 16, 132, 2) == 16  # no more than there are tiles
    assert choose_splits(100, 1000, 132, 1) == 1  # two splits would take two waves
    assert choose_splits(66, 1000, 132, 1) == 2
    assert choose_splits(4, 0, 132, 2) == 1


@pytest.mark.parametrize("limit", [H200, A100, RTX])
@pytest.mark.parametrize("page", [None, 5, 16, 64])
@pytest.mark.parametrize(
    ("group", "width", "itemsize"), [(1, 64, 2), (4, 128, 2), (3, 256, 4), (128, 128, 1)]
)
def test_a_tiling_fits_into_the_shared_memory(
    limit: int, page: int | None, group: int, width: int, itemsize: int
) -> None:
    tiling = choose_tiling(group, 2 * width * itemsize, itemsize, page, limit)
    assert tiling.shared_bytes(2 * width * itemsize, 0, page) <= limit
    assert tiling.block_n >= 16
    assert tiling.block_h >= min(group, 64)


@pytest.mark.parametrize("limit", [H200, A100, RTX])
@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize("n_heads", [1, 16, 128])
def test_a_latent_tiling_fits_too(limit: int, page: int | None, n_heads: int) -> None:
    tiling = choose_latent_tiling(n_heads, 1152, 1152, page, limit, 90)
    assert tiling.shared_bytes(1152, 1152, page) <= limit
    if tiling.block_h == 64:
        assert page is None or page % tiling.block_n == 0


def test_many_heads_get_the_tensor_cores_rows() -> None:
    assert choose_latent_tiling(128, 1152, 1152, None, H200, 90) == LATENT_TILINGS[0]
    assert choose_latent_tiling(16, 1152, 1152, None, H200, 90).block_h == 16


def test_a_page_of_64_is_one_tile() -> None:
    assert choose_tiling(4, 256, 2, 64, H200).block_n == 64
    assert choose_tiling(4, 256, 2, None, H200) == Tiling(16, 128, 8, 3)


def test_splits_need_sensible_numbers() -> None:
    with pytest.raises(ValueError, match="programs"):
        choose_splits(0, 10, 132)
    with pytest.raises(TypeError, match="multiprocessors"):
        choose_splits(1, 10, "132")  # type: ignore[arg-type]
