"""The behaviour of every cache, without a mechanism."""

import torch
from torch import Tensor

from kvlearn.attention import Cache


class Views(Cache):
    """Two views of one block of memory, like a latent and its rotary part."""

    def __init__(self) -> None:
        super().__init__(batch=2, max_len=4, device="cpu")
        self.block = torch.zeros(2, 4, 5)

    def tensors(self) -> list[Tensor]:
        return [self.block[..., :3], self.block[..., 3:]]


def test_memory_that_two_views_share_is_counted_once() -> None:
    assert Views().nbytes == 2 * 4 * 5 * 4


def test_positions_are_one_row_until_rows_differ() -> None:
    cache = Views()
    assert cache.positions(2).tolist() == [[0, 1]]
    cache.advance(3)
    assert cache.positions(1).tolist() == [[3]]
    cache.trim(torch.tensor([3, 1]))
    assert cache.positions(1).tolist() == [[3], [1]]
    cache.advance(1)
    cache.trim(torch.tensor([2, 2]))
    assert cache.positions(2).tolist() == [[2, 3]]
