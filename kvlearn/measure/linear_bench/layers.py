"""Whole layers, projections included, beside full attention's: a long text, and a step of training."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvlearn.attention import Mechanism
from kvlearn.measure.linear_bench import designs
from kvlearn.measure.linear_bench.designs import details, state_names
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.growth import by_label, growth_rows, label
from kvlearn.measure.shared_bench.rows import agree, ratio_row, time_row
from kvlearn.measure.timing import compare

LENGTH = 8192
ROUNDS = 3
TRAIN_LENGTHS = (1024, 2048, 4096)
TRAIN_AT = 2048
GROWN = ("full", "linear", "gated_delta")  # trained at all lengths, for the exponents
CHECKED = 200  # tokens whose outputs and gradients must be the naive form's


def layer_rows(device: torch.device) -> Iterator[Row]:
    """A text through each layer, without a cache."""
    x = torch.randn(1, LENGTH, designs.D_MODEL, device=device)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in ("full", *state_names()):
        layer = designs.new_layer(name, device)
        agree({name: partial(layer, x[:, :CHECKED])}, layer.naive(x[:, :CHECKED]))
        calls[name] = partial(layer, x)
    by_turns = compare(calls, rounds=ROUNDS)
    title = f"layer {designs.D_MODEL}, {LENGTH} tokens"
    for name in calls:
        yield time_row(by_turns, title, name, details("layer_time", name, LENGTH))
    for name in list(calls)[1:]:
        yield ratio_row(by_turns, title, "full", name, details("layer_speedup", name, LENGTH))


def train_rows(device: torch.device) -> Iterator[Row]:
    """Forward and backward of each layer, to the gradients of its input and its weights."""
    calls: dict[str, dict[int, Callable[[], Tensor]]] = {}
    for name in ("full", *state_names()):
        lengths = TRAIN_LENGTHS if name in GROWN else (TRAIN_AT,)
        calls[name] = checked_train_steps(name, lengths, device)
    by_turns = compare(by_label(calls), rounds=ROUNDS)
    grown = {name: calls[name] for name in GROWN}
    yield from growth_rows("train", grown, by_turns, device, bars={}, details=details)
    title = f"training step, layer {designs.D_MODEL}"
    for name in calls:
        found = details("train_layer_time", name, TRAIN_AT)
        yield time_row(by_turns, title, label(name, TRAIN_AT), found)
    for name in list(calls)[1:]:
        found = details("train_speedup", name, TRAIN_AT)
        yield ratio_row(by_turns, title, label("full", TRAIN_AT), label(name, TRAIN_AT), found)


def checked_train_steps(
    name: str, lengths: tuple[int, ...], device: torch.device
) -> dict[int, Callable[[], Tensor]]:
    """Steps over texts of these lengths, once short ones have given the naive form's gradients."""
    layer = designs.new_layer(name, device)
    x, upstream = torch.randn(2, 1, max(lengths), designs.D_MODEL, device=device)
    few = slice(0, CHECKED)
    expected = gradient(layer, layer.naive, x[:, few], upstream[:, few])
    agree({name: partial(gradient, layer, layer, x[:, few], upstream[:, few])}, expected)
    return {n: partial(gradient, layer, layer, x[:, :n], upstream[:, :n]) for n in lengths}


def gradient(layer: Mechanism, run: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    """Of the layer's input; those of its weights are computed too."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(run(x), (x, *layer.parameters()), upstream)[0]
