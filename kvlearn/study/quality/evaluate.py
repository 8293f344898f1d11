"""Measurements of a decoder: loss by position, on repeated text, at longer contexts; bytes."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kvlearn import validate
from kvlearn.model import Decoder
from kvlearn.study.curve import mean_and_error
from kvlearn.study.evaluation import spread_windows, token_losses

NGRAM = 8  # bytes: as many as one int64 holds
COMMON = 8  # an n-gram that occurs more often in the training text is known by heart, not recalled


def evaluate_language(
    model: Decoder,
    text: UInt8[Tensor, "N"],
    trained_on: "TrainingText",
    *,
    length: int,
    n_windows: int,
    far: int,
    longer: Sequence[int] = (2, 4),
    batch: int = 16,
) -> dict[str, Any]:
    """Loss of ``model`` on ``text`` in nats per byte, as plain numbers for results/.

    ``loss`` and ``error`` (standard, over windows) of ``n_windows`` windows of ``length`` bytes, less those
    that occur in the training text too, where files hold copies of each other's code; ``by_position``, in
    buckets that double; ``slices``, see ``repetition_slices``; ``longer``: the same in contexts that are as
    many times longer than in training, in as many bytes of text.
    """
    windows = trained_on.without_copies(spread_windows(text, length, n_windows))
    losses = token_losses(model, windows, batch=batch).cpu()
    loss, error = mean_and_error(losses.mean(1).tolist())
    beyond = []
    for factor in longer:
        count = max(n_windows // factor, 1)
        its_windows = trained_on.without_copies(spread_windows(text, factor * length, count))
        parts = token_losses(model, its_windows, batch=max(batch // factor, 1)).cpu()
        mean, its_error = mean_and_error(parts.mean(1).tolist())
        beyond.append(
            {
                "length": factor * length,
                "loss": mean,
                "error": its_error,
                "by_position": by_position(parts),
            }
        )
    return {
        "loss": loss,
        "error": error,
        "windows": len(windows),
        "by_position": by_position(losses),
        "slices": slice_losses(losses, repetition_slices(windows, trained_on, far=far)),
        "longer": beyond,
    }


def by_position(losses: Float[Tensor, "N T"]) -> list[dict[str, Any]]:
    """The mean loss of positions 0 to 7, 8 to 15, 16 to 31 … of the context: ``from`` up to before ``to``."""
    length = losses.shape[1]
    edges = [0, *(2**k for k in range(3, 40) if 2**k < length), length]
    return [{"from": a, "to": b, "loss": losses[:, a:b].mean().item()} for a, b in pairwise(edges)]


class TrainingText:
    """Contents of the training text: n-grams of ``NGRAM`` bytes, copies of windows."""

    def __init__(self, text: UInt8[Tensor, "N"]) -> None:
        if len(text) < NGRAM:
            raise ValueError(f"text: expected at least {NGRAM} bytes, got {len(text)}")
        self.bytes = text.numpy().tobytes()
        self.text = text

    @cached_property
    def sorted(self) -> NDArray[np.int64]:
        """All n-grams of the text, in order."""
        return np.sort(ngrams(self.text[None])[0].numpy())

    def without_copies(self, windows: Int[Tensor, "B T"]) -> Int[Tensor, "_ T"]:
        """The ``windows`` that do not occur in the text, byte for byte."""
        return windows[torch.tensor([bytes(window) not in self.bytes for window in windows.tolist()])]

    def counts(self, keys: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """How often each n-gram of ``keys`` occurs in the text."""
        found = [np.searchsorted(self.sorted, keys.numpy(), side=side) for side in ("right", "left")]
        return torch.from_numpy(found[0] - found[1])


def ngrams(tokens: Tensor) -> Int[Tensor, "B N"]:
    """The ``NGRAM`` bytes that end at each token of (B, T), from the token NGRAM - 1 on, as one number."""
    keys = torch.zeros(len(tokens), tokens.shape[1] - NGRAM + 1, dtype=torch.int64)
    for i in range(NGRAM):
        keys = (keys << 8) | tokens[:, i : i + keys.shape[1]].to(torch.int64)
    return keys


def repeat_distance(keys: Int[Tensor, "B N"], *, rows: int = 16) -> Int[Tensor, "B N"]:
    """How many places before each n-gram the same one ended last; 0 where it did not occur before."""
    places = torch.arange(keys.shape[1])
    out = []
    for some in keys.split(rows):
        same = (some[:, :, None] == some[:, None]) & (places[:, None] > places)
        last = (same * (places + 1)).amax(-1)  # 1 + the place of the last one, 0 where there is none
        out.append(torch.where(last > 0, places + 1 - last, 0))
    return torch.cat(out)


def repetition_slices(
    windows: Int[Tensor, "B _"], trained_on: TrainingText, *, far: int
) -> dict[str, Tensor]:
    """Masks (B, T) over the predicted tokens, by whether their n-gram occurred in the context before.

    ``new``    it did not; only the weights, or the sense of the text, can help
    ``near``   it did, at most ``far`` tokens ago
    ``far``    it did, last more than ``far`` tokens ago: the prediction has to be recalled from there
    ``other``  the first ``NGRAM`` - 1 tokens, and n-grams that are common in the training text

    Source: Arora et al., "Zoology" (2023), section 3: the AR slice, tokens that complete a repeated bigram
    which is rare in training. A byte is a token here, so n-grams are longer.
    """
    far = validate.positive("far", far)
    B, T = windows.shape[0], windows.shape[1] - 1
    keys = ngrams(windows)
    distance, rare = repeat_distance(keys), trained_on.counts(keys) <= COMMON
    found = {
        "new": rare & (distance == 0),
        "near": rare & (distance > 0) & (distance <= far),
        "far": rare & (distance > far),
    }
    slices = {
        name: torch.cat((torch.zeros(B, T - mask.shape[1], dtype=torch.bool), mask), dim=1)
        for name, mask in found.items()
    }
    return {**slices, "other": ~(slices["new"] | slices["near"] | slices["far"])}


def slice_losses(losses: Float[Tensor, "B T"], slices: Mapping[str, Tensor]) -> dict[str, Any]:
    """The mean loss of the tokens of each slice, None where there are none, and how many there are."""
    return {
        name: {
            "loss": losses[mask].mean().item() if mask.any() else None,
            "tokens": int(mask.sum()),
        }
        for name, mask in slices.items()
    }


def memory(model: Decoder, trained_length: int) -> list[dict[str, Any]]:
    """Bytes of cache stored and read by one step, and per token: at the trained length first, then at others.

    In 16-bit numbers; states are kept in fp32, as the mechanisms do.
    """
    rows = []
    others = {4 * trained_length, 4096, 32768} - {trained_length}
    for length in (trained_length, *sorted(others)):
        total = model.table(length, dtype=torch.bfloat16)[-1]
        rows.append(
            {
                "length": length,
                "stored": total["stored"],
                "read": total["read"],
                "stored_per_token": total["stored"] / length,
                "read_per_token": total["read"] / length,
            }
        )
    return rows
