"""The ring buffer: the last W tokens in W slots, each new one in the place of the one that leaves."""

import torch
from jaxtyping import Int
from torch import Tensor

from kvlearn.attention.slots import SlotCache


class RingCache(SlotCache):
    """Keys and values of the first ``n_sinks`` tokens, which stay, and of the last ``window``, which turn.

        slot(p) = p                                      p < n_sinks
                  n_sinks + (p - n_sinks) mod window     else

    It holds min(max_len, n_sinks + window) tokens, however many it has seen. Sources: Jiang et al.,
    "Mistral 7B" (2023), section 2 (the rolling buffer); Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks" (2023), section 3.2 (the tokens that stay).
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        window: int,
        n_sinks: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        self.window, self.n_sinks = window, n_sinks
        n_slots = ring_slots(max_len, window, n_sinks)
        super().__init__(batch, n_heads, n_slots, head_dim, max_len, n_sinks + window, dtype, device, shared)

    def slots(self, positions: Int[Tensor, "#B T"]) -> Int[Tensor, "#B T"]:
        turning = self.n_sinks + (positions - self.n_sinks) % self.window
        return torch.where(positions < self.n_sinks, positions, turning)

    def used(self, length: int) -> int:
        return min(length, self.n_slots)


def ring_slots(length: int, window: int, n_sinks: int) -> int:
    """Tokens that a ring holds after ``length`` of them: min(length, n_sinks + window)."""
    return min(length, n_sinks + window)
