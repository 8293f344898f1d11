"""Peak memory is exact on the CPU: the same bytes on every run."""

import pytest
import torch
import torch.nn.functional as F

from kvlearn.measure import peak_memory

N = 25_000_000  # floats: 100 MB


def one_after_the_other() -> None:
    first = torch.empty(N)
    del first
    second = torch.empty(N)
    del second


def both_at_once() -> None:
    first, second = torch.empty(N), torch.empty(N)
    del first, second


def test_a_temporary_that_is_freed_makes_room_for_the_next() -> None:
    assert [peak_memory(one_after_the_other) for _ in range(3)] == 3 * [100_000_000]
    assert peak_memory(both_at_once) == 200_000_000


def test_the_order_of_allocations_counts() -> None:
    def large_before_two_small() -> None:
        large = torch.empty(N)
        del large
        small = torch.empty(N // 4), torch.empty(N // 5)
        del small

    assert peak_memory(large_before_two_small) == 100_000_000


def test_what_the_call_returns_counts() -> None:
    assert peak_memory(lambda: torch.empty(N)) == 100_000_000


def test_a_view_and_a_change_in_place_cost_nothing() -> None:
    x = torch.ones(1000, 1000)
    assert peak_memory(lambda: x.view(-1)[10:].neg_().view(-1)) == 0


def test_what_was_there_before_does_not_count_even_when_it_is_freed() -> None:
    peak_memory(lambda: torch.empty(N))  # its address is likely used again: it must not be mistaken
    held = [torch.empty(N)]

    def swap() -> None:
        held.clear()
        held.append(torch.empty(N // 2))

    assert peak_memory(swap) == 50_000_000


def test_it_sees_what_an_operator_allocates_inside_itself() -> None:
    """SDPA's flash kernel works in blocks: more than its output, far less than the matrix of scores."""
    q, k, v = (torch.randn(1, 4, 1024, 64) for _ in range(3))
    scores = 4 * 1024 * 1024 * 4
    output = q.nbytes
    written_out = peak_memory(lambda: torch.softmax(q @ k.mT / 8, dim=-1) @ v)
    fused = peak_memory(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert written_out >= 2 * scores
    assert output < fused < output + scores / 2


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        peak_memory(lambda: None, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_the_allocators_peak() -> None:
    assert peak_memory(lambda: torch.empty(2**28, device="cuda"), "cuda") == 2**30
