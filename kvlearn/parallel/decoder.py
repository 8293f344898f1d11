"""A whole decoder over a ring of ranks: each has all weights and its share of the tokens.

Everything but attention works on each token alone, so only attention communicates. The same logits and,
summed over the ranks, the same gradients as on one device.

Letters beside those of layout.py: V tokens of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention import FullAttention, GroupedQueryAttention, Mechanism, WindowAttention
from kvlearn.attention.core import merge_heads, split_heads
from kvlearn.model import Decoder
from kvlearn.parallel.blockwise import PADDING, Rule
from kvlearn.parallel.decode import ShardedKVCache
from kvlearn.parallel.layout import Layout, Order
from kvlearn.parallel.ring import Log, ring_attention


class ParallelDecoder(nn.Module):
    """``decoder`` with its tokens spread over the ranks of ``group``.

    Takes layers of ``full``, ``gqa`` and ``window`` (without sinks), each with keys of its own. Every rank
    gets all ``tokens`` and computes its slots of them. The cache of a window layer keeps all tokens here, and
    the ``balance_loss`` of a mixture of experts is not added up. Raises ValueError that names the first
    other layer.
    """

    def __init__(
        self, decoder: Decoder, order: Order = "striped", *, block: int = 512, group: Any = None
    ) -> None:
        super().__init__()
        for number, (mixer, owner) in enumerate(zip(decoder.mixers, decoder.config.owners, strict=True)):
            known = type(mixer) in (FullAttention, GroupedQueryAttention, WindowAttention)
            sinks = isinstance(mixer, WindowAttention) and (mixer.n_sinks or mixer.sink_logits is not None)
            if not known or sinks or owner != number:
                raise ValueError(
                    f"decoder: expected layers of full, gqa or window without sinks and with keys of their "
                    f"own; layer {number} is {mixer.label}"
                )
        self.decoder, self.order, self.block, self.group = decoder, order, block, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.log = Log()

    @property
    def blocks(self) -> list[Any]:
        """The decoder's layers."""
        return list(self.decoder.blocks)

    def layout(self, n_tokens: int) -> Layout:
        """How ``n_tokens`` lie on the ranks."""
        return Layout(n_tokens, self.world, self.order)

    def forward(
        self, tokens: Int[Tensor, "B N"], caches: list[ShardedKVCache] | None = None
    ) -> Float[Tensor, "B C V"]:
        """Logits of this rank's slots of all ``tokens``; with empty ``caches`` it also fills these."""
        layout = self.layout(tokens.shape[1])
        positions = layout.positions(self.rank).to(tokens.device)
        x = self.embed(layout.shard(tokens, self.rank))
        for number, block in enumerate(self.blocks):
            mixer: Any = block.mixer
            q, k, v = heads_of(mixer, block.mixer_norm(x), positions.clamp_min(0))
            if caches is not None:
                if caches[number].layout != layout:
                    raise ValueError(f"caches: expected {layout}, got {caches[number].layout}")
                caches[number].append_prompt(k, v)
            options = {"block": self.block, "group": self.group, "log": self.log}
            heads = ring_attention(q, k, v, layout, rule_of(mixer), **options)
            x = x + block.mixer_post_norm(mixer.o_proj(merge_heads(heads)))
            x = feed_forward(block, x)
        return self.decoder.logits(self.decoder.norm(x))

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T M"]:
        """The input of the first layer, as in ``Decoder.hidden``."""
        x, scale = self.decoder.embed(tokens.long()), self.decoder.config.embed_scale
        if scale != 1:
            x = x * torch.tensor(scale, dtype=x.dtype)
        return self.decoder.embed_norm(x)

    def loss(self, tokens: Int[Tensor, "B N"]) -> Float[Tensor, ""]:
        """This rank's share of the mean cross-entropy of all next tokens, in nats; the shares add up."""
        validate.at_least("tokens.shape[1] (time)", tokens.shape[1], 2)
        at = self.layout(tokens.shape[1]).positions(self.rank).to(tokens.device)
        has_next = (at > PADDING) & (at < tokens.shape[1] - 1)
        logits = self(tokens)[:, has_next]
        targets = tokens[:, at[has_next] + 1]
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), reduction="sum")
        return total / (len(tokens) * (tokens.shape[1] - 1))

    def backward(self, tokens: Int[Tensor, "B N"]) -> float:
        """Add the gradients of the mean loss, summed over the ranks, to every weight's; returns the loss."""
        loss = self.loss(tokens)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, grad in zip(weights, grads, strict=True):
            if grad is not None:
                grad = grad.contiguous()
                dist.all_reduce(grad, group=self.group)
                weight.grad = grad if weight.grad is None else weight.grad + grad
        whole = loss.detach().clone()
        dist.all_reduce(whole, group=self.group)
        return float(whole)

    def new_caches(self, batch: int, max_len: int, n_prompt: int) -> list[ShardedKVCache]:
        """Empty caches for this rank's part of ``max_len`` tokens, the first ``n_prompt`` fed together."""
        return [
            ShardedKVCache(
                batch,
                mixer.n_kv_heads,
                max_len,
                mixer.head_dim,
                self.layout(n_prompt),
                self.rank,
                *mixer.dtype_and_device(),
            )
            for mixer in (block.mixer for block in self.blocks)
        ]

    @torch.no_grad()
    def generate(self, tokens: Int[Tensor, "B N"], n_new: int) -> Int[Tensor, "B _"]:
        """``tokens`` continued greedily by ``n_new``, the same on every rank; the cache stays spread out."""
        n_new = validate.positive("n_new", n_new)
        n_prompt = tokens.shape[1]
        caches = self.new_caches(len(tokens), n_prompt + n_new, n_prompt)
        logits = self(tokens, caches)
        last = (self.layout(n_prompt).positions(self.rank) == n_prompt - 1).to(tokens.device)
        new = torch.zeros_like(tokens[:, :1])
        if bool(last.any()):
            new = logits[:, last].argmax(-1).to(tokens.dtype)
        dist.all_reduce(new, group=self.group)  # all others have zeros
        for _ in range(n_new - 1):
            tokens = torch.cat((tokens, new), dim=1)
            new = self.step(new, caches)[:, -1:].argmax(-1).to(tokens.dtype)
        return torch.cat((tokens, new), dim=1)

    def step(self, new: Int[Tensor, "B 1"], caches: list[ShardedKVCache]) -> Float[Tensor, "B 1 V"]:
        """Logits after one new token per row, which every rank computes; only the cache is spread out."""
        validate.tensor("new", new, ("batch", 1))
        x = self.embed(new)
        for block, cache in zip(self.blocks, caches, strict=True):
            mixer: Any = block.mixer
            q, k, v = heads_of(mixer, block.mixer_norm(x), torch.tensor([cache.length], device=new.device))
            cache.append(k, v)
            heads = cache.attend(q, rule_of(mixer), self.group, self.log)
            x = x + block.mixer_post_norm(mixer.o_proj(merge_heads(heads)))
            x = feed_forward(block, x)
        return self.decoder.logits(self.decoder.norm(x))


def heads_of(
    mixer: Any, x: Float[Tensor, "B T M"], positions: Int[Tensor, "T"]
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G T D"], Float[Tensor, "B G T D"]]:
    """Queries, keys and values of ``x`` at ``positions``, rotated."""
    q = mixer.rope(split_heads(mixer.q_proj(x), mixer.n_heads), positions[None])
    k = mixer.rope(split_heads(mixer.k_proj(x), mixer.n_kv_heads), positions[None])
    return q, k, split_heads(mixer.v_proj(x), mixer.n_kv_heads)


def rule_of(mixer: Mechanism) -> Rule:
    """The rule for the keys that a query of this layer attends to."""
    return Rule(window=mixer.window) if isinstance(mixer, WindowAttention) else Rule()


def feed_forward(block: Any, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
    """The second half of a layer."""
    return x if block.mlp is None else x + block.mlp_post_norm(block.mlp(block.mlp_norm(x)))
