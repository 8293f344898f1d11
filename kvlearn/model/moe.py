"""Mixture of experts: many feed-forward networks, of which each token uses a few.

    s = softmax(x W_r)                          one score per expert; or sigmoid
    y = Σ_{e in top-k(s)} g_e · FFN_e(x)        g: the chosen scores, normalised to a sum of 1

A model has all experts' weights in memory, and a token computes with those of k: ``n_parameters`` and
``n_active_parameters`` differ. The cache of keys and values does not change.

Letters beside those of core.py: N tokens of a batch, E experts, k experts of each token, F numbers inside an
expert.
Sources: Shazeer et al., "Outrageously Large Neural Networks" (2017), equations 1 to 5; Jiang et al., "Mixtral
of Experts" (2024), section 2.1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.core import upcast
from kvlearn.model.feed_forward import SwiGLU


@dataclass(frozen=True)
class MoEConfig:
    """The shape and the routing of a mixture of experts.

    Each token uses ``top_k`` of ``n_experts`` SwiGLUs, each ``d_ff`` numbers wide. Scores are "softmax" or
    "sigmoid" of the router's logits; the chosen ones are divided by their sum plus ``sum_eps``
    (``normalise``) and multiplied by ``scaling``. With ``limit`` the SwiGLU is gpt-oss's: with g, u the gate
    and the input, clamped, (u + 1) · g · sigmoid(alpha · g).

    ``n_groups``: only experts of the ``topk_groups`` best groups can be chosen; a group's score is the sum
    of its ``group_best`` best experts. ``correction`` adds a bias per expert to the scores for the choice,
    not to the weights. ``d_ff_shared``: the width of a SwiGLU for every token; ``shared_gate`` multiplies
    it by sigmoid(x w). ``bias``: biases in router and experts.

        Mixtral        MoEConfig(8, 2, 14336)
        gpt-oss-20b    MoEConfig(32, 4, 2880, bias=True, limit=7.0)
        DeepSeek-V2    MoEConfig(160, 6, 1536, normalise=False, scaling=16.0, n_groups=8, topk_groups=3,
                                 d_ff_shared=3072)
        DeepSeek-V3    MoEConfig(256, 8, 2048, "sigmoid", scaling=2.5, n_groups=8, topk_groups=4,
                                 group_best=2, correction=True, d_ff_shared=2048)
        Qwen3-Next     MoEConfig(512, 10, 512, d_ff_shared=512, shared_gate=True)

    gpt-oss chooses k logits first and then takes their softmax; that is the same as dividing the chosen
    probabilities by their sum.
    Sources: DeepSeek-AI, "DeepSeek-V2" (2024), equations 20 to 22 and section 2.2.2 (groups); "DeepSeek-V3"
    (2024), equations 12 to 16 (sigmoid, correction); OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).
    """

    n_experts: int
    top_k: int
    d_ff: int
    routing: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scaling: float = 1.0
    n_groups: int = 1
    topk_groups: int = 1
    group_best: int = 1
    correction: bool = False
    d_ff_shared: int = 0
    shared_gate: bool = False
    bias: bool = False
    limit: float | None = None
    alpha: float = 1.702
    sum_eps: float = 1e-20

    def __post_init__(self) -> None:
        sizes = ("n_experts", "top_k", "d_ff", "n_groups", "topk_groups", "group_best")
        validate.fields_at_least(self, **dict.fromkeys(sizes, 1), d_ff_shared=0)
        for name in ("normalise", "correction", "shared_gate", "bias"):
            validate.instance(name, getattr(self, name), bool)
        validate.one_of("routing", self.routing, ("softmax", "sigmoid"))
        validate.divides("n_groups", self.n_groups, "n_experts", self.n_experts)
        validate.at_most("topk_groups", self.topk_groups, self.n_groups, "n_groups")
        in_group = self.n_experts // self.n_groups
        validate.at_most("group_best", self.group_best, in_group, "experts in a group")
        validate.at_most("top_k", self.top_k, self.topk_groups * in_group, "experts in the chosen groups")
        if self.shared_gate and not self.d_ff_shared:
            raise ValueError("shared_gate: expected d_ff_shared above 0 with it, got 0")
        for name in ("scaling", "alpha"):
            object.__setattr__(self, name, validate.in_fp32(name, getattr(self, name)))
        if validate.in_fp32("sum_eps", self.sum_eps) < 0:
            raise ValueError(f"sum_eps: expected at least 0, got {self.sum_eps}")
        if self.limit is not None:
            validate.above("limit", validate.in_fp32("limit", self.limit), 0)


class ExpertLinear(nn.Module):
    """One ``nn.Linear`` per expert, their weights in one tensor: weight (E, out, in), bias (E, out)."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_experts, d_out)) if bias else None

    def forward(self, parts: list[Tensor], experts: list[int]) -> list[Tensor]:
        """The outputs of ``experts``, each for its own rows."""
        # Indexing one expert has a gradient as large as all experts; unbinding has one gradient for all.
        weights = self.weight.unbind() if torch.is_grad_enabled() else self.weight
        return [
            F.linear(part, weights[e], None if self.bias is None else self.bias[e])
            for part, e in zip(parts, experts, strict=True)
        ]


class MoE(nn.Module):
    """A feed-forward of ``config.n_experts`` SwiGLUs, of which the router chooses some for each token.

    After a forward pass in training mode ``balance_loss`` is its load-balancing loss, with a gradient, and
    ``load`` the number of tokens of each expert; see ``balance_loss`` below. Shapes: (B, T, M) in and out.
    """

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        E, bias = config.n_experts, config.bias
        self.router = nn.Linear(d_model, E, bias=bias)
        self.gate_up_proj = ExpertLinear(E, d_model, 2 * config.d_ff, bias)
        self.down_proj = ExpertLinear(E, config.d_ff, d_model, bias)
        self.shared = SwiGLU(d_model, config.d_ff_shared) if config.d_ff_shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if config.shared_gate else None
        self.correction: Tensor | None
        self.register_buffer("correction", torch.zeros(E) if config.correction else None)
        self.balance_loss: Tensor | None = None
        self.load: Tensor | None = None

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        if not x.numel():  # no token, no expert, and no loss
            return x
        flat = x.flatten(0, 1)
        weights, chosen = self.route(flat)
        dispatch = self.dispatch_captured if torch.compiler.is_compiling() else self.dispatch
        y = dispatch(flat, weights.to(x.dtype), chosen).view_as(x)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)

    def route(self, x: Float[Tensor, "N M"]) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        """The weights of each token's experts, in fp32 at least, and their numbers."""
        c, router = self.config, self.router
        logits = F.linear(
            upcast(x), upcast(router.weight), None if router.bias is None else upcast(router.bias)
        )
        scores = logits.softmax(-1) if c.routing == "softmax" else logits.sigmoid()  # (N, E)
        choice = scores if self.correction is None else scores + self.correction
        if c.topk_groups < c.n_groups:
            groups = choice.unflatten(-1, (c.n_groups, -1))  # (N, groups, E / groups)
            best = groups.topk(c.group_best, dim=-1).values.sum(-1).topk(c.topk_groups, dim=-1).indices
            excluded = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
            choice = groups.masked_fill(excluded[..., None], -torch.inf).flatten(1)
        chosen = choice.topk(c.top_k, dim=-1).indices
        if self.training:
            self.balance_loss = load_balancing_loss(scores, chosen)
            self.load = tokens_per_expert(chosen, c.n_experts)
        weights = scores.gather(1, chosen)
        if c.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + c.sum_eps)
        return weights * c.scaling, chosen

    def dispatch(
        self, x: Float[Tensor, "N M"], weights: Float[Tensor, "N k"], chosen: Int[Tensor, "N k"]
    ) -> Float[Tensor, "N M"]:
        """Σ g_e FFN_e(x): tokens sorted by expert, then two products of matrices per expert that has any."""
        ordered, order = chosen.flatten().sort(stable=True)  # of N · k pairs of a token and an expert
        experts, counts = (t.tolist() for t in ordered.unique_consecutive(return_counts=True))
        parts = x.index_select(0, order // self.config.top_k).split(counts)
        hidden = [self.activate(part) for part in self.gate_up_proj(list(parts), experts)]
        y = torch.cat(self.down_proj(hidden, experts))
        y = y.index_select(0, order.argsort()).view(*chosen.shape, -1)  # (N, k, M)
        return (weights[:, None] @ y).squeeze(1)

    def dispatch_captured(
        self, x: Float[Tensor, "N M"], weights: Float[Tensor, "N k"], chosen: Int[Tensor, "N k"]
    ) -> Float[Tensor, "N M"]:
        """``dispatch`` in one graph, where the number of tokens per expert is not known.

        As many tokens as a step has read the weights of their experts alone; with more, all experts compute
        every token: n_experts / top_k times the FLOPs of ``dispatch``.
        """
        up, down, E = self.gate_up_proj, self.down_proj, self.config.n_experts
        if chosen.numel() <= E:
            gate_up = (up.weight[chosen] @ x[:, None, :, None]).squeeze(-1)  # (N, k, 2F)
            gate_up = gate_up if up.bias is None else gate_up + up.bias[chosen]
            out = (down.weight[chosen] @ self.activate(gate_up)[..., None]).squeeze(-1)
            out = out if down.bias is None else out + down.bias[chosen]
            return (weights[:, None] @ out).squeeze(1)
        gate_up = x @ up.weight.mT  # (E, N, 2F)
        gate_up = gate_up if up.bias is None else gate_up + up.bias[:, None]
        out = self.activate(gate_up) @ down.weight.mT
        out = out if down.bias is None else out + down.bias[:, None]
        shares = weights.new_zeros(len(x), E).scatter(1, chosen, weights)
        return torch.einsum("ne,enm->nm", shares, out)

    def activate(self, gate_up: Float[Tensor, "... twoF"]) -> Float[Tensor, "... F"]:
        """silu(gate) · up, or its clamped form."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.config.limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=self.config.limit), up.clamp(-self.config.limit, self.config.limit)
        return (up + 1) * gate * torch.sigmoid(self.config.alpha * gate)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The equations in fp32, one token and one expert after the other."""
        c, y = self.config, torch.zeros_like(upcast(x))
        p = {name: upcast(weight) for name, weight in self.named_parameters()}
        for b, t in [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]:
            token = upcast(x[b, t])
            logits = p["router.weight"] @ token + p.get("router.bias", torch.zeros(()))
            scores = 1 / (1 + torch.exp(-logits))
            if c.routing == "softmax":
                scores = torch.exp(logits - logits.max())
                scores = scores / scores.sum()
            added = [0.0] * c.n_experts if self.correction is None else self.correction.tolist()
            ranked = [score + add for score, add in zip(scores.tolist(), added, strict=True)]
            size = c.n_experts // c.n_groups
            groups = [range(start, start + size) for start in range(0, c.n_experts, size)]
            groups.sort(key=lambda group: -sum(sorted(ranked[e] for e in group)[-c.group_best :]))
            allowed = [e for group in groups[: c.topk_groups] for e in group]
            chosen = sorted(allowed, key=lambda e: -ranked[e])[: c.top_k]
            total = sum(scores[e] for e in chosen) + c.sum_eps if c.normalise else 1.0
            for e in chosen:
                inside = p["gate_up_proj.weight"][e] @ token
                if c.bias:
                    inside = inside + p["gate_up_proj.bias"][e]
                gate, up, slope = inside[: c.d_ff], inside[c.d_ff :], 1.0
                if c.limit is not None:
                    gate, up = gate.clamp(max=c.limit), up.clamp(-c.limit, c.limit) + 1
                    slope = c.alpha
                out = p["down_proj.weight"][e] @ (gate / (1 + torch.exp(-slope * gate)) * up)
                if c.bias:
                    out = out + p["down_proj.bias"][e]
                y[b, t] += c.scaling * scores[e] / total * out
            if c.d_ff_shared:
                gate, up = p["shared.gate_proj.weight"] @ token, p["shared.up_proj.weight"] @ token
                out = p["shared.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
                y[b, t] += out / (1 + torch.exp(-p["shared_gate.weight"] @ token)) if c.shared_gate else out
        return y.to(x.dtype)

    @property
    def n_active_parameters(self) -> int:
        """Numbers that one token is multiplied by: all but the experts that it does not use."""
        experts = sum(p.numel() for part in (self.gate_up_proj, self.down_proj) for p in part.parameters())
        others = sum(p.numel() for p in self.parameters()) - experts
        return others + experts * self.config.top_k // self.config.n_experts

    @torch.no_grad()
    def update_correction(self, rate: float = 1e-3) -> None:
        """Raise the correction of experts with fewer tokens than the mean, lower that of those with more.

        Called after an optimiser's step, it balances the experts without a loss. Raises ValueError without
        ``correction``, and before a forward pass in training mode.
        Source: Wang et al., "Auxiliary-Loss-Free Load Balancing" (2024), algorithm 1.
        """
        if self.correction is None or self.load is None:
            raise ValueError("correction: expected MoEConfig(correction=True) and a forward pass in training")
        load = self.load.to(self.correction.dtype)
        self.correction += rate * (load.mean() - load).sign()


def tokens_per_expert(chosen: Int[Tensor, "N k"], n_experts: int) -> Int[Tensor, "E"]:
    """How many tokens have chosen each expert."""
    each = chosen.flatten()
    return each.new_zeros(n_experts).scatter_add(0, each, torch.ones_like(each))


def load_balancing_loss(scores: Float[Tensor, "N E"], chosen: Int[Tensor, "N k"]) -> Float[Tensor, ""]:
    """E · Σ_e f_e P_e: k if every expert has equally many tokens, E if one of them has all.

    f_e is the number of tokens for expert e, divided by N, and has no gradient. P_e is the mean over the
    tokens of its score, each token's scores divided by their sum.
    Sources: Lepikhin et al., "GShard" (2020), section 2.2; Fedus et al., "Switch Transformers" (2021),
    equations 4 to 6, for one expert per token; for k as in Mixtral's code in transformers.
    """
    n_tokens, E = scores.shape
    share = tokens_per_expert(chosen, E).to(scores.dtype) / n_tokens
    return E * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()


def balance_loss(model: nn.Module) -> Float[Tensor, ""]:
    """The mean ``load_balancing_loss`` of the model's mixtures of experts in their last forward pass.

    A training loop adds it to its loss, times a small factor: 0.01 in Switch Transformers. Raises
    ValueError if there was no forward pass in training mode, or there is no mixture.
    """
    validate.instance("model", model, nn.Module)
    losses = [part.balance_loss for part in model.modules() if isinstance(part, MoE)]
    if not losses or any(loss is None for loss in losses):
        raise ValueError("model: expected mixtures of experts after a forward pass in training mode")
    return torch.stack([loss for loss in losses if loss is not None]).mean()
