"""Ring attention: the tokens are spread over devices, and blocks of keys and values go round.

Each of P ranks holds the queries, keys and values of C tokens. In P steps every block of keys and values
passes every rank, which attends to it and merges what it has by log-sum-exp: exact attention over P · C
tokens, of which no device ever holds more than three blocks: its own, the one that it computes with, and the
next, which is under way meanwhile.

The gradient goes round in the same way: keys and values again, and with each block the sum of its gradients
so far, which the last rank on the way sends home.

Letters are those of layout.py.

    torchrun --nproc-per-node=4 -m kvlearn.parallel.ring --tokens 1000 --order striped

compares one forward and backward pass with attention on one device, and prints who did what. gloo carries the
blocks between CPUs; with nccl, on GPUs, this is untried.

Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvlearn import validate
from kvlearn.parallel.blockwise import Attended, Gradients, Rule, check_heads, padding_at, without
from kvlearn.parallel.layout import Layout, Plan


@dataclass
class Log:
    """The actions of a rank, in order: (what, step, owner of the block, bytes or visible pairs).

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
    """Tensors on their way between ranks: ``send`` and ``receive`` begin a message, ``finish`` waits."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.sent: list[tuple[Any, Tensor, int]] = []  # the tensor must live until it is sent

    def send(self, x: Tensor, to: int, tag: int) -> int:
        """Begin to send ``x`` to rank ``to``; returns its bytes."""
        x = x.contiguous()
        work = self._begin(dist.isend, x, to, tag, group_dst=to)
        self.sent.append((work, x, to))
        return x.nbytes

    def receive(
        self, like: Tensor, source: int, tag: int, dtype: torch.dtype | None = None
    ) -> Callable[[], Tensor]:
        """Begin to receive a tensor of the shape of ``like``; the result waits for it and gives it."""
        x = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        work = self._begin(dist.irecv, x, source, tag, group_src=source)

        def wait() -> Tensor:
            self._wait(work, source)
            return x

        return wait

    def finish(self) -> None:
        """Wait until everything is sent, and let it go."""
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


def agree(check: Callable[[dict[str, Any]], None], group: Any = None) -> None:
    """Raise on every rank if one has other settings than most, or bad arguments.

    ``check`` writes down the settings of this rank, and raises ValueError or TypeError. Here that is raised
    again, and the other ranks raise ValueError that names this one: nobody waits for a rank that has given
    up.
    """
    settings: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        check(settings)
    except (TypeError, ValueError) as error:
        problem = error
    told: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(told, (settings, None if problem is None else str(problem)), group)
    except RuntimeError as error:
        raise PeerLost(f"rank {dist.get_rank(group)}: not all ranks came to this call: {error}") from error
    for name in settings if all(theirs for theirs, _ in told) else ():
        values = [theirs[name] for theirs, _ in told]
        usual = max(values, key=values.count)
        if values.count(usual) < len(values):
            odd = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values) if value != usual)
            raise ValueError(f"{name}: expected {usual} on every rank; {odd}")
    if problem is not None:
        raise problem
    for rank, (_, message) in enumerate(told):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")


HOME = 10**6  # tag of gradients that return to their owner; blocks in step s have the tags 2s and 2s + 1


class _Ring(torch.autograd.Function):
    """In every step all messages of the step begin, then the rank computes, then it waits for them.

    A rank holds its own block, the one that it computes with and the next one, whatever the number of ranks;
    the backward pass as many sums of gradients.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        plan, scale, block, lengths, group, log = options
        rank, P = dist.get_rank(group), plan.layout.world
        mine = plan.layout.positions(rank).to(q.device)
        messages, attended = Messages(group), Attended(q, scale, block)
        held = torch.stack((k, v))
        for step in range(plan.n_steps):
            owner = plan.owner(rank, step)
            coming = None
            if plan.sends(rank, step):
                log.add("send", step, owner, messages.send(held, (rank + 1) % P, 2 * step))
            if plan.receives(rank, step):
                coming = messages.receive(held, (rank - 1) % P, 2 * step)
            if plan.holds(rank, step) and plan.pairs[rank][owner]:
                keys = plan.layout.positions(owner).to(q.device)
                attended.add(held[0], held[1], mine, keys, plan.rule, lengths)
                log.add("compute", step, owner, plan.pairs[rank][owner])
            messages.finish()
            if coming is not None:
                held = coming()
                log.add("receive", step, plan.owner(rank, step + 1), held.nbytes)
        ctx.save_for_backward(q, k, v, attended.out, attended.lse)
        ctx.options = options
        return attended.out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        plan, scale, block, lengths, group, log = ctx.options
        q, k, v, out, lse = ctx.saved_tensors
        rank, P = dist.get_rank(group), plan.layout.world
        mine = plan.layout.positions(rank).to(q.device)
        messages, gradients = Messages(group), Gradients(q, out, lse, d_outs[0], scale, block)
        held = torch.stack((k, v))
        home = d_coming = None
        if plan.hops[rank]:
            home = messages.receive(held, (rank + plan.hops[rank]) % P, HOME, out.dtype)
        for step in range(plan.n_steps):
            owner = plan.owner(rank, step)
            coming = d_next = None
            if plan.sends(rank, step):
                log.add("send", step, owner, messages.send(held, (rank + 1) % P, 2 * step))
            if plan.receives(rank, step):  # the next block, and behind it the sum of its gradients
                coming = messages.receive(held, (rank - 1) % P, 2 * step)
                d_next = messages.receive(held, (rank - 1) % P, 2 * step + 1, out.dtype)
            if plan.holds(rank, step):
                keys = plan.layout.positions(owner).to(q.device)
                d_kv = gradients.add(held[0], held[1], mine, keys, plan.rule, lengths)
                log.add("compute", step, owner, plan.pairs[rank][owner])
                if d_coming is not None:
                    d_kv += d_coming()
                if plan.sends(rank, step):
                    log.add("send", step, owner, messages.send(d_kv, (rank + 1) % P, 2 * step + 1))
                elif step:
                    log.add("send", step, owner, messages.send(d_kv, owner, HOME))
                else:
                    d_own = d_kv
            messages.finish()
            if coming is not None:
                held = coming()
                log.add("receive", step, plan.owner(rank, step + 1), held.nbytes)
            d_coming = d_next
        if home is not None:
            d_own = home()
        d_k, d_v = d_own.to(k.dtype)
        return gradients.d_q.to(q.dtype), d_k, d_v, *len(ctx.options) * [None]


@lru_cache(maxsize=64)
def plan_of(layout: Layout, rule: Rule) -> Plan:
    """The plan, counted once for all layers and passes."""
    return Plan(layout, rule)


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

    ``q``, ``k`` and ``v`` are this rank's slots of ``layout`` (``layout.shard``), the output too; the
    content of padded slots, NaN too, has no effect, and they give 0. ``rule`` says what a query sees; a
    block that no rank further along needs is not sent. ``lengths`` are the tokens of each row of the batch,
    the same on all ranks. H query heads read G KV heads, and only the G travel. Gradients go the same way:
    every rank must call ``backward``.

    Bytes sent by rank r, with K = 2 · B · G · C · D · bytes per number (the gradients are fp32 at least):
    ``plan.n_sent(r)`` · K forward; backward K and the gradient's bytes each ``plan.n_sent(r)`` times, and the
    gradient's ``plan.n_returned(r)`` times more. ``log`` records what was done.

    Raises ValueError or TypeError on every rank for shapes that do not fit on one, or settings in which one
    differs from the others, and PeerLost when a rank does not answer within the group's timeout.
    """
    rule = rule or Rule()

    def check(settings: dict[str, Any]) -> None:
        check_heads(q, k, v)
        settings |= dict(
            zip(("batch", "heads", "KV heads", "head_dim"), (*q.shape[:2], *k.shape[1::2]), strict=True)
        )
        settings |= {"dtype": q.dtype, "n_tokens": layout.n_tokens, "order": layout.order}
        settings |= {"causal": rule.causal, "window": rule.window}
        settings |= {"scale": q.shape[3] ** -0.5 if scale is None else scale}
        settings |= {"lengths": None if lengths is None else lengths.tolist()}
        settings |= {"training": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))}
        if layout.world != dist.get_world_size(group):
            raise ValueError(f"layout: expected {dist.get_world_size(group)} ranks, got {layout.world}")
        for name, x in (("q", q), ("k", k)):
            if x.shape[2] != layout.per_rank:
                raise ValueError(f"{name}: expected {layout.per_rank} slots, got {x.shape[2]}")
        if lengths is not None:
            validate.tensor("lengths", lengths, (len(q),))
        validate.positive("block", block)

    agree(check, group)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    padding = padding_at(layout.positions(dist.get_rank(group)).to(q.device), lengths)
    q, k, v = (without(x, padding) for x in (q, k, v))
    out: Tensor = _Ring.apply(q, k, v, plan_of(layout, rule), scale, block, lengths, group, log or Log())
    return without(out, padding)


if __name__ == "__main__":
    import typer

    from kvlearn.parallel.demo import main

    typer.run(main)
