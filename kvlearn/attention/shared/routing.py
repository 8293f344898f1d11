"""Choosing a pool: a hard choice that can still be learned."""

import torch
from jaxtyping import Float
from torch import Tensor


def one_hot_choice(logits: Float[Tensor, "... G"]) -> Float[Tensor, "... G"]:
    """1 at the largest logit and 0 elsewhere, with the gradient of softmax(logits): straight-through.

    So training and inference compute the same. (Gumbel noise on the logits, which would let every pool be
    tried, made the course's small models clearly worse: a head whose keys change from step to step does not
    learn to read them.) Source: Bengio et al., "Estimating or Propagating Gradients" (2013), section 4.
    """
    soft = logits.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # what is in brackets is 0 exactly: half precision keeps its 1
