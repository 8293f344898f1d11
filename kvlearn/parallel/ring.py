"""Ring attention: the tokens are spread over devices, and blocks of keys and values go round.

Each of P ranks holds the queries, keys and values of C tokens. In P steps every block of keys and values
passes every rank, which attends to it and merges what it has by log-sum-exp: exact attention over P · C
tokens, of which no device ever holds more than its own and one block on its way. While a rank computes with
one block, the next is under way.

The gradient goes round in the same way: keys and values again, and with each block the sum of its gradients
so far, which the last rank on the way sends home.

    torchrun --nproc-per-node=4 -m kvlearn.parallel.ring --tokens 1000 --order striped

compares one forward and backward pass with attention on one device, and prints who did what. gloo carries the
blocks between CPUs; with nccl, on GPUs, this is untried.

Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.parallel.blockwise import Attended, Gradients, Rule, check_heads
from kvlearn.parallel.layout import ORDERS, Layout, Plan


@dataclass
class Log:
    """What a rank did, in order: (what, step, owner of the block, bytes or visible pairs).

    A "send" begins before the "compute" that it overlaps with; "receive" is the end of a message.
    """

    events: list[tuple[str, int, int, int]] = field(default_factory=list)

    def add(self, what: str, step: int, owner: int, amount: int) -> None:
        self.events.append((what, step, owner, amount))

    def total(self, what: str) -> int:
        """The sum of the amounts of all events of this kind."""
        return sum(amount for name, _, _, amount in self.events if name == what)

    @property
    def bytes_sent(self) -> int:
        return self.total("send")

    @property
    def pairs(self) -> int:
        """Visible pairs computed: each costs 4 · D FLOPs per head forward, and 10 · D backward."""
        return self.total("compute")


class PeerLost(RuntimeError):
    """Another rank did not send or take what was agreed: it has ended, or hangs."""


class Messages:
    """Tensors on their way between ranks. Nothing waits for a message to be taken before ``finish``."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.sent: list[tuple[Any, Tensor, int]] = []  # the tensor must live until it is sent

    def send(self, x: Tensor, to: int, tag: int) -> int:
        """Begin to send ``x`` to rank ``to``; returns its bytes."""
        x = x.contiguous()
        work = self._begin(dist.isend, x, to, tag, group_dst=to)
        self.sent.append((work, x, to))
        return x.nbytes

    def receive(self, like: Tensor, source: int, tag: int) -> Callable[[], Tensor]:
        """Begin to receive a tensor of the shape of ``like``; the result waits for it and gives it."""
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        work = self._begin(dist.irecv, x, source, tag, group_src=source)

        def wait() -> Tensor:
            self._wait(work, source)
            return x

        return wait

    def finish(self) -> None:
        """Wait until everything is sent."""
        for work, _, to in self.sent:
            self._wait(work, to)
        self.sent.clear()

    def _begin(self, call: Callable[..., Any], x: Tensor, rank: int, tag: int, **to: int) -> Any:
        try:
            return call(x, group=self.group, tag=tag, **to)
        except RuntimeError as error:
            raise PeerLost(f"rank {dist.get_rank(self.group)}: cannot reach rank {rank}: {error}") from error

    def _wait(self, work: Any, rank: int) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerLost(
                f"rank {dist.get_rank(self.group)}: no answer from rank {rank}: {error}"
            ) from error


def check_agreement(settings: Mapping[str, int], group: Any = None) -> None:
    """Raise ValueError on every rank, naming the ranks whose setting is not that of most others."""
    mine = torch.tensor(list(settings.values()), dtype=torch.int64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    for name, values in zip(settings, torch.stack(rows, dim=1).tolist(), strict=True):
        usual = max(values, key=values.count)
        if values.count(usual) < len(values):
            odd = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values) if value != usual)
            raise ValueError(f"{name}: expected {usual} on every rank; {odd}")


HOME = 10**6  # tag of gradients that return to their owner; blocks in step s have the tags 2s and 2s + 1


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        plan, scale, block, lengths, group, log = options
        rank, P = dist.get_rank(group), plan.layout.world
        positions = [plan.layout.positions(r).to(q.device) for r in range(P)]
        messages, attended = Messages(group), Attended(q, scale, block)
        held = torch.stack((k, v))
        for step in range(plan.n_steps):
            owner = plan.owner(rank, step)
            if plan.sends(rank, step):
                log.add("send", step, owner, messages.send(held, (rank + 1) % P, 2 * step))
            coming = None
            if plan.receives(rank, step):
                coming = messages.receive(held, (rank - 1) % P, 2 * step)
            if plan.holds(rank, step) and plan.pairs[rank][owner]:
                attended.add(held[0], held[1], positions[rank], positions[owner], plan.rule, lengths)
                log.add("compute", step, owner, plan.pairs[rank][owner])
            if coming is not None:
                held = coming()
                log.add("receive", step, plan.owner(rank, step + 1), held.nbytes)
        messages.finish()
        ctx.save_for_backward(q, k, v, attended.out, attended.lse)
        ctx.options = options
        return attended.out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        plan, scale, block, lengths, group, log = ctx.options
        q, k, v, out, lse = ctx.saved_tensors
        rank, P = dist.get_rank(group), plan.layout.world
        positions = [plan.layout.positions(r).to(q.device) for r in range(P)]
        messages, gradients = Messages(group), Gradients(q, out, lse, d_outs[0], scale, block)
        held, d_own = torch.stack((k, v)), torch.zeros(2, *k.shape, dtype=out.dtype, device=k.device)
        for step in range(plan.n_steps):
            owner = plan.owner(rank, step)
            coming = d_coming = None
            if plan.sends(rank, step):
                log.add("send", step, owner, messages.send(held, (rank + 1) % P, 2 * step))
            if plan.receives(rank, step):
                coming = messages.receive(held, (rank - 1) % P, 2 * step)
            if plan.holds(rank, step):
                if step:
                    d_coming = messages.receive(d_own, (rank - 1) % P, 2 * step - 1)
                d_kv = gradients.add(held[0], held[1], positions[rank], positions[owner], plan.rule, lengths)
                log.add("compute", step, owner, plan.pairs[rank][owner])
                if d_coming is not None:
                    d_kv += d_coming()
                if plan.sends(rank, step):
                    log.add("send", step, owner, messages.send(d_kv, (rank + 1) % P, 2 * step + 1))
                elif step:
                    log.add("send", step, owner, messages.send(d_kv, owner, HOME))
                else:
                    d_own = d_kv
            if coming is not None:
                held = coming()
                log.add("receive", step, plan.owner(rank, step + 1), held.nbytes)
        if plan.hops[rank]:
            d_own = messages.receive(d_own, (rank + plan.hops[rank]) % P, HOME)()
        messages.finish()
        return (
            gradients.d_q.to(q.dtype),
            d_own[0].to(k.dtype),
            d_own[1].to(v.dtype),
            *len(ctx.options) * [None],
        )


def ring_attention(
    q: Float[Tensor, "B H C D"],
    k: Float[Tensor, "B G C D"],
    v: Float[Tensor, "B G C D"],
    layout: Layout,
    rule: Rule | None = None,
    *,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float | None = None,
    block: int = 512,
    group: Any = None,
    log: Log | None = None,
) -> Float[Tensor, "B H C D"]:
    """Attention of this rank's queries over the keys and values of all ranks of ``group``.

    ``q``, ``k`` and ``v`` are this rank's slots of ``layout`` (``layout.shard``), the output too; what lies
    in padded slots has no effect, and they give 0. ``rule`` says what a query sees; a block that no rank
    further along needs is not sent. ``lengths`` are the tokens of each row of the batch, the same on all
    ranks. H query heads read G KV heads, and only the G travel. Gradients go the same way.

    Bytes sent by rank r, with K = 2 · B · G · C · D · bytes per number (the gradients are fp32 at least):
    ``plan.n_sent(r)`` · K forward; backward K and the gradient's bytes each ``plan.n_sent(r)`` times, and the
    gradient's ``plan.n_returned(r)`` times more. ``log`` records what was done.

    Raises ValueError for shapes that do not fit, on every rank for settings in which a rank differs from the
    others, and PeerLost when a rank does not answer within the group's timeout.
    """
    check_heads(q, k, v)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if layout.world != world:
        raise ValueError(f"layout: expected {world} ranks, got {layout.world}")
    settings = dict(zip(("batch", "heads", "time", "head_dim"), q.shape, strict=True))
    settings |= {"KV heads": k.shape[1], "n_tokens": layout.n_tokens, "order": ORDERS.index(layout.order)}
    rule = rule or Rule()
    settings |= {"causal": int(rule.causal), "window": rule.window or 0, "bytes per number": q.itemsize}
    settings |= {"training": int(torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))}
    check_agreement(settings, group)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != layout.per_rank:
            raise ValueError(f"{name}: expected {layout.per_rank} slots on rank {rank}, got {x.shape[2]}")
    if lengths is not None:
        validate.tensor("lengths", lengths, (len(q),))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = Plan(layout, rule), scale, validate.positive("block", block), lengths, group, log or Log()
    out: Tensor = _Ring.apply(q, k, v, *options)
    return out


if __name__ == "__main__":
    import typer

    from kvlearn.parallel.demo import main

    typer.run(main)
