"""What trains an indexer, which no loss on the output reaches: that its scores say what attention reads."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def choice_loss(
    scores: Float[Tensor, "B T S"], read: Float[Tensor, "B H T S"], seen: Bool[Tensor, "#B T S"]
) -> Float[Tensor, ""]:
    """Mean over t of  KL(p_t ‖ softmax(I_t)),   p_t = the mean over the heads of softmax(their scores).

    I are the indexer's ``scores``, ``read`` those of attention, which get no gradient. Both softmaxes go over
    the keys ``seen``: of those each query must see one. Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), equation
    3 where a query sees its whole past, 4 where it sees what was selected.
    """
    target = read.detach().masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)
    # The lowest finite number, not -inf: a weight of 0 times that is 0, and not NaN.
    guess = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
    return F.kl_div(guess, target, reduction="sum") / target.shape[:2].numel()
