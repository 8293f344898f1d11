"""The short convolution: what a layer says of a token depends on the few tokens before it, too."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.linear.state import State, StateMechanism


class ShortConvolution(nn.Conv1d):
    """y_t[c] = Σ_{i < width} w[c, i] · x_{t - width + 1 + i}[c] (+ b[c]): each channel for itself, causal.

    Tensors are those of ``nn.Conv1d``: weight (channels, 1, width), the newest token last, bias (channels,).
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        validate.at_least("width", width, 2)
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    @property
    def past_shape(self) -> tuple[int, int]:
        """The inputs that a step still needs, for one row: those of the last width - 1 tokens."""
        return self.kernel_size[0] - 1, self.in_channels

    def run(
        self, x: Float[Tensor, "B T C"], past: Float[Tensor, "B P C"]
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B P C"]]:
        """Outputs for ``x`` behind ``past``, and the past of what comes next; zeros stand before the text."""
        T, taps = x.shape[1], self.weight[:, 0].T
        seen = torch.cat((past.to(x.dtype), x), dim=1)
        y = seen[:, :T] * taps[0]
        for i, tap in enumerate(taps[1:], start=1):  # faster than conv1d on a CPU, and time stays in front
            y = torch.addcmul(y, seen[:, i : i + T], tap)
        return y if self.bias is None else y + self.bias, seen[:, T:]


@register("short_conv")
class ShortConvolutionMixer(StateMechanism):
    """A short convolution as a layer of its own: y = conv(x), each channel for itself.

    It moves information by fewer than ``width`` tokens, and no further. Alone it is the control in tests of
    recall; before another mixer it lets a token know what stands right before it, which softmax attention in
    two layers learns to find out by itself, and a state does not.

    Cache: B · (width - 1) · d_model numbers. ``n_heads`` must divide d_model and means nothing else.
    Source: Fu et al., "Hungry Hungry Hippos" (2023), section 3 (the shift); Arora et al., "Zoology" (2023).
    """

    forms = ("recurrent", "chunked")

    def __init__(self, d_model: int, n_heads: int, *, width: int = 4) -> None:
        super().__init__(d_model, n_heads, None)
        self.conv = ShortConvolution(d_model, width)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"past": self.conv.past_shape}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        if form == "chunked":
            y, past = self.conv.run(x, state["past"])
            return y, {"past": past}
        ys, past = [], state["past"]
        for token in x.split(1, dim=1):
            y, past = self.conv.run(token, past)
            ys.append(y)
        return torch.cat(ys, dim=1), {"past": past}

    @classmethod
    def tiny(cls) -> "ShortConvolutionMixer":
        return cls(d_model=24, n_heads=3)
