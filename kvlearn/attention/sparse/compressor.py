"""The compressor: a block of tokens becomes one entry, which stands in the cache in place of all of them.

Multi-head compression (chapter 03) makes every token smaller; here there are fewer of them. An entry is a
weighted mean of its tokens, with a weight of its own for every coordinate. Letters of this chapter:

    m  rate: tokens in a block, for one entry       E  entries: whole blocks so far, E = ⌊S / m⌋
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.core import upcast
from kvlearn.attention.rope import Rope, RopeConfig


class TrailingRope(nn.Module):
    """RoPE on the last ``rope_dim`` coordinates; the others stay as they are, and all of them without it.

    ``back`` turns the other way. Where keys are values too, a mean of values comes out turned by its keys'
    positions; turned back by the query's own, only distances remain of them.
    """

    def __init__(self, rope_dim: int, config: RopeConfig | None) -> None:
        super().__init__()
        self.rope_dim = rope_dim
        self.rope = None if config is None else Rope(rope_dim, config)

    def forward(
        self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"], back: bool = False
    ) -> Float[Tensor, "B H T D"]:
        if self.rope is None:
            return x
        still, turned = x[..., : -self.rope_dim], x[..., -self.rope_dim :]
        turned = self.rope(turned, -positions if back else positions)
        if back:
            turned = turned / self.rope.factor**2  # what YaRN put on the keys and puts on once more
        return torch.cat((still, turned), dim=-1)


class Compressor(nn.Module):
    """One entry of D numbers for every ``rate`` tokens, from a content C and a gate Z of each.

        C = W_c x,  Z = W_z x,   e_i = RoPE_{i·m}(norm(Σ_j softmax_j(Z_j + b_j) ⊙ C_j)),   j in block i

    With ``overlap`` C and Z are two series, a and b: entry i takes series a of block i - 1 and series b of
    block i, 2m tokens under one softmax, so that no seam between two blocks goes unseen. Entry 0 has no block
    before it. A token is handled as [C, Z], (2, D) or with ``overlap`` (2, 2D).

    Source: DeepSeek-AI, "DeepSeek-V4" (2026), equations 20 to 23 (one series), 9 to 12 (two).
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        rate: int,
        overlap: bool,
        rope_dim: int,
        rope: RopeConfig | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.width, self.rate, self.overlap = width, validate.positive("rate", rate), overlap
        both = 2 * width if overlap else width
        self.kv_proj = nn.Linear(d_model, both, bias=False)
        self.gate_proj = nn.Linear(d_model, both, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(rate, both))
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.rope = TrailingRope(rope_dim, rope)

    def project(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T 2 W"]:
        """[C, Z] of every token."""
        return torch.stack((self.kv_proj(x), self.gate_proj(x)), dim=2)

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B E D"]:
        """The entries of all whole blocks of a sequence from its start."""
        return self.compress(self.project(x[:, : x.shape[1] // self.rate * self.rate]))

    def compress(
        self,
        tokens: Float[Tensor, "B N 2 W"],
        previous: Float[Tensor, "B m 2 D"] | None = None,
        first: int = 0,
    ) -> Float[Tensor, "B E D"]:
        """Entries ``first`` and on, of tokens that are whole blocks.

        ``previous`` is series a of the block before them, where there is one and it counts.
        """
        blocks = tokens.unflatten(1, (-1, self.rate))  # (B, E, m, 2, W)
        bias: Tensor = self.position_bias
        if self.overlap:
            a, b = blocks.split(self.width, dim=-1)
            if previous is None:
                previous = torch.zeros_like(a[:, :1])
                previous[:, :, :, 1] = -torch.inf  # a gate that lets nothing through
            else:
                previous = previous.unsqueeze(1)
            blocks = torch.cat((torch.cat((previous, a), dim=1)[:, : a.shape[1]], b), dim=2)
            bias = torch.cat(bias.split(self.width, dim=-1))  # (2m, D)
        content, gate = upcast(blocks).unbind(3)
        entries = ((gate + bias).softmax(dim=2) * content).sum(dim=2)
        starts = (first + torch.arange(entries.shape[1], device=tokens.device)) * self.rate
        return self.rope(self.norm(entries.to(tokens.dtype))[:, None], starts[None])[:, 0]

    def naive(self, x: Float[Tensor, "B T M"], i: int) -> Float[Tensor, "B D"]:
        """Entry ``i`` token by token, in fp32."""
        contents, gates = [], []
        for t in range(max(i - 1, 0) * self.rate if self.overlap else i * self.rate, (i + 1) * self.rate):
            series = slice(self.width) if t < i * self.rate else slice(-self.width, None)
            contents.append(upcast(self.kv_proj(x[:, t])[:, series]))
            gates.append(
                upcast(self.gate_proj(x[:, t])[:, series] + self.position_bias[t % self.rate, series])
            )
        weights = torch.stack(gates).softmax(dim=0)
        entry = self.norm(sum(w * c for w, c in zip(weights, contents, strict=True)).to(x.dtype))
        return upcast(self.rope(entry[:, None, None], torch.tensor([[i * self.rate]], device=x.device)))[
            :, 0, 0
        ]

    def stored_numbers(self, max_len: int) -> int:
        """⌊max_len / m⌋ · D of entries, 2 · (m - 1) · W of tokens that wait, 2 · m · D to overlap with."""
        waiting = 2 * (self.rate - 1) * self.kv_proj.out_features
        overlap = 2 * self.rate * self.width if self.overlap else 0
        return max_len // self.rate * self.width + waiting + overlap
