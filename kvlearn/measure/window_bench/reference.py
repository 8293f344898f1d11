"""What a design must answer: some of the queries, each by the equation over all tokens it sees, in fp64."""

import random

import torch
from torch import Tensor, nn

from kvlearn.attention.core import merge_heads, split_heads
from kvlearn.measure.window_bench.designs import Design, Layer

SAMPLES = 32


def some_queries(n: int) -> list[int]:
    """First and last, and others drawn between them."""
    between = range(1, n - 1)
    return sorted({0, n - 1, *random.Random(n).sample(between, min(SAMPLES, len(between)))})


def attend(
    q: Tensor, k: Tensor, v: Tensor, design: Design, at: list[int], sink_logits: Tensor | None = None
) -> Tensor:
    """The queries at the positions ``at`` alone: (B, H, len(at), D) from all of q, k and v.

    softmax over [scores of what is seen, the sink's logit], without the sink's weight.
    """
    n = k.shape[2]
    s = torch.arange(n)
    seen = torch.stack([(s <= t) & design.visible(n, t, s) for t in at]).to(k.device)
    scores = q[:, :, at].double() @ k.double().mT / k.shape[3] ** 0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink_logits is not None:
        sinks = sink_logits.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return scores.softmax(-1)[..., :n] @ v.double()


def attend_in_layer(layer: Layer, x: Tensor, design: Design, at: list[int]) -> Tensor:
    """The same between the layer's own projections: its output at the positions ``at``."""
    k, v, positions = layer.project_kv(x)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), positions)
    logits = getattr(layer, "sink_logits", None)
    assert logits is None or isinstance(logits, nn.Parameter)
    heads = attend(q, k, v, design, at, logits)
    return layer.o_proj(merge_heads(heads).to(x.dtype))
