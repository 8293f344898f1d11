"""Choosing a pool: a hard choice that can still be learned."""

import torch
from jaxtyping import Float
from torch import Tensor


def one_hot_choice(logits: Float[Tensor, "... G"], noisy: bool) -> Float[Tensor, "... G"]:
    """1 at the largest logit and 0 elsewhere, with the gradient of softmax(logits): straight-through.

    ``noisy`` adds Gumbel noise first, so that in training a pool is drawn with its softmax probability and
    others get a chance. Sources: Bengio et al., "Estimating or Propagating Gradients" (2013), section 4;
    Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (2016), section 2.2.
    """
    if noisy:
        logits = logits - torch.empty_like(logits).exponential_().log()  # -log of an Exp(1) is a Gumbel
    soft = logits.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # what is in brackets is 0 exactly: half precision keeps its 1
