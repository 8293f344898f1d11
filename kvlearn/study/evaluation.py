"""Evaluation: the loss on held-out text, over all and by position in the context."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.model import Decoder
from kvlearn.study.text import check_text


class Evaluation(NamedTuple):
    """Loss in nats per byte: over all, by position, by window; ``error``: standard error over windows."""

    loss: float
    error: float
    by_position: Float[Tensor, "length"]
    by_window: Float[Tensor, "n_windows"]

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(loss): how many equally likely bytes would be as hard to guess. It rises as a model worsens."""
        return math.exp(self.loss)


def evaluate(
    model: Decoder, text: UInt8[Tensor, "N"], *, length: int, n_windows: int = 64, batch: int = 16
) -> Evaluation:
    """The loss over ``n_windows`` windows of ``length`` bytes, spread evenly over ``text``."""
    n_windows = validate.positive("n_windows", n_windows)
    loss = token_losses(model, spread_windows(text, length, n_windows), batch=batch)
    error = loss.mean(1).std(correction=min(1, n_windows - 1)).item() / n_windows**0.5
    return Evaluation(loss.mean().item(), error, loss.mean(0), loss.mean(1))


def spread_windows(text: UInt8[Tensor, "N"], length: int, n_windows: int) -> Int[Tensor, "{n_windows} T"]:
    """``n_windows`` windows of ``length`` bytes and the one that follows, spread evenly over ``text``."""
    n_windows, length = validate.positive("n_windows", n_windows), validate.positive("length", length)
    check_text("text", text, length)
    starts = torch.linspace(0, len(text) - length - 1, n_windows, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(length + 1)].long()


@torch.no_grad()
def token_losses(
    model: Decoder, windows: Int[Tensor, "N T"], *, batch: int = 16
) -> Float[Tensor, "N length"]:
    """The loss of each token of ``windows`` but the first, in nats; ``batch`` windows at a time."""
    validate.instance("model", model, nn.Module)
    validate.integers("windows", validate.tensor("windows", windows, ("windows", "tokens")))
    validate.positive("windows.shape[0] (windows)", len(windows))
    validate.at_least("windows.shape[1] (tokens)", windows.shape[1], 2)
    losses = []
    for some in windows.split(validate.positive("batch", batch)):
        some = some.to(model.embed.weight.device)
        logits = model(some[:, :-1]).float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none"))
    return torch.cat(losses)
