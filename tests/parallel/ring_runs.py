"""The code of the processes in kvlearn.parallel's tests; importable, because they are started afresh."""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import REGISTRY
from kvlearn.attention.core import Partial
from kvlearn.model import Decoder, ModelConfig
from kvlearn.parallel import Layout, Log, ParallelDecoder, Rule, pass_state, ring_attention, tree_merge
from kvlearn.parallel.blockwise import Attended, padding_at
from kvlearn.parallel.ring import Messages


def inputs(shape: tuple[int, int, int], tokens: int, dim: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output; ``shape`` is batch, heads, KV heads."""
    torch.manual_seed(0)
    batch, heads, kv_heads = shape
    return [torch.randn(batch, n, tokens, dim) for n in (heads, kv_heads, kv_heads, heads)]


def one_device(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, rule: Rule, lengths: Tensor | None
) -> list[Tensor]:
    """Output and gradients of PyTorch's SDPA in fp64, with a mask written from the definition."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    T, n = q.shape[2], q.shape[1] // k.shape[1]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    mask = torch.ones(len(q), 1, T, T, dtype=torch.bool)
    if rule.causal:
        mask &= j <= i
    if rule.window is not None:
        mask &= i - j < rule.window
    rows = torch.ones(len(q), 1, T, 1, dtype=torch.bool)
    if lengths is not None:
        ends = lengths[:, None, None, None]
        mask, rows = mask & (j < ends), (i < ends)
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1), attn_mask=mask
    )
    out = torch.where(rows, out, 0.0)
    return [out.detach(), *(g.detach() for g in torch.autograd.grad(out, (q, k, v), d_out.double()))]


def forward_and_backward(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case the slots of output and gradients on this rank, and its log. Padding holds NaN."""
    rank, world, results = dist.get_rank(), dist.get_world_size(), []
    for case in cases:
        layout, lengths = Layout(case["tokens"], world, case["order"]), case["lengths"]
        local = [layout.shard(x, rank, dim=2) for x in inputs(case["shape"], case["tokens"], case["dim"])]
        padding = padding_at(layout.positions(rank), lengths)
        if padding is not None:
            local = [x.masked_fill(padding, torch.nan) for x in local]
        q, k, v, d_out = (x.to(case.get("dtype")) for x in local)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        there, back = Log(), Log()
        out = ring_attention(q, k, v, layout, case["rule"], lengths=lengths, block=case["block"], log=there)
        forward = len(there.events)
        grads = torch.autograd.grad(out, (q, k, v), d_out)
        back.events, there.events = there.events[forward:], there.events[:forward]
        parts = [out.detach(), *grads]
        if padding is not None:
            assert not any(part.masked_select(padding).any() for part in parts)
        results.append({"parts": parts, "there": there, "back": back})
    return results


def most_kept(case: dict[str, Any]) -> list[int]:
    """The most messages that this rank keeps while it sends, forward and backward."""
    kept: list[int] = []
    send = Messages.send

    def counted(self: Messages, x: Tensor, to: int, tag: int) -> int:
        n_bytes = send(self, x, to, tag)
        kept.append(len(self.sent))
        return n_bytes

    Messages.send = counted  # type: ignore[method-assign]
    (result,) = forward_and_backward([case])
    Messages.send = send  # type: ignore[method-assign]
    forward = sum(what == "send" for what, *_ in result["there"].events)
    return [max(kept[:forward]), max(kept[forward:])]


def small_decoder(layers: list[Any], n_tokens: int) -> tuple[Decoder, Tensor]:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(50, 24, 2, 6, d_ff=32, embed_scale=3.0, layers=layers))
    return model, torch.randint(50, (2, n_tokens))


def whole_decoder(layers: list[Any], order: Any, n_tokens: int, n_new: int) -> dict[str, Any]:
    model, tokens = small_decoder(layers, n_tokens)
    parallel = ParallelDecoder(model, order, block=7)
    with torch.no_grad():
        logits = parallel(tokens)
    text = parallel.generate(tokens, n_new)
    losses = [parallel.backward(tokens), parallel.backward(tokens)]  # gradients add up
    with torch.no_grad():
        for weight in parallel.parameters():  # torch.optim would import a compiler in every process
            assert weight.grad is not None
            weight.sub_(0.1 * weight.grad)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "losses": losses, "grads": grads, "weights": weights, "text": text}


def states(name: str, lengths: list[int]) -> list[dict[str, Any]]:
    return [state_passed(name, n) for n in lengths]


def state_passed(name: str, n: int) -> dict[str, Any]:
    """The first rank has ``n`` tokens, the second none, the third three more."""
    torch.manual_seed(0)
    rank, layer = dist.get_rank(), REGISTRY[name].tiny()
    sizes = [n, 0, n + 3]
    x = torch.randn(2, sum(sizes), layer.d_model)
    log = Log()
    y = pass_state(layer, x.split(sizes, dim=1)[rank], log=log)
    return {"y": y, "want": layer(x).detach(), "sent": log.bytes_sent}


def die(rank: int) -> None:
    """The process of ``rank`` ends without a word in the middle of a pass."""
    layout = Layout(16, dist.get_world_size())
    q, k, v, _ = (layout.shard(x, dist.get_rank(), dim=2) for x in inputs((1, 2, 2), 16, 4))
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    ring_attention(q, k, v, layout)


def hang(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(300)
    dist.barrier()
    die(-1)


def raise_at(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ZeroDivisionError("nothing to divide by")
    die(-1)


def settings() -> list[str]:
    """The errors of this rank when one rank calls with other settings, or with bad arguments."""
    told = []
    for rank, changed in (
        (1, {"layout": Layout(15, 3)}),
        (1, {"rule": Rule(window=3)}),
        (0, {"heads": 4}),
        (2, {"dtype": torch.bfloat16}),
        (2, {"scale": 0.3}),
        (1, {"lengths": torch.tensor([9])}),
        (2, {"slots": 5}),
        (0, {"kv_heads": 3}),
    ):
        try:
            settings_of(**changed if dist.get_rank() == rank else {})
        except ValueError as error:
            told.append(str(error))
    return told


def settings_of(
    layout: Layout | None = None,
    rule: Rule | None = None,
    heads: int = 2,
    kv_heads: int = 2,
    slots: int = 6,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    q, k, v, _ = (x.to(dtype) for x in inputs((1, heads, kv_heads), slots, 4))
    ring_attention(q, k, v, layout or Layout(16, 3), rule, **options)


def wait_forever() -> None:
    time.sleep(300)


def merged() -> list[Any]:
    """Partial attention of each rank over its third of the keys, merged by the tree; one rank has none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    q, k, v, _ = inputs((2, 6, 3), 12, 8)
    keys = torch.arange(12)
    part = Attended(q, 0.3, block=5)
    if rank != 1:
        mine = keys[rank::world]
        part.add(k[:, :, mine], v[:, :, mine], keys, mine, Rule(causal=False))
    log = Log()
    out, lse = tree_merge(Partial(part.out, part.lse), log=log)
    return [out, lse, log.bytes_sent]


def both_rings(case: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """This rank's output and gradients, causal and then not, by our ring and by PyTorch's."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for causal, order in ((True, "zigzag"), (False, "contiguous")):
        (ours,) = forward_and_backward([case | {"order": order, "rule": Rule(causal)}])
        pairs += zip(ours["parts"], torchs_ring(case["tokens"], causal), strict=True)
    return pairs


def torchs_ring(tokens: int, causal: bool) -> list[Tensor]:
    """This rank's output and gradients by PyTorch's context parallel, messages sent round.

    Its public ``context_parallel`` knows kernels of GPUs only; its ring takes any kernel, here that of CPUs.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

    layout = Layout(tokens, dist.get_world_size(), "zigzag" if causal else "contiguous")
    q, k, v, d_out = (layout.shard(x, dist.get_rank(), dim=2) for x in inputs((2, 3, 3), tokens, 8))
    theirs._cp_options.enable_load_balance = causal
    theirs._cp_options.rotate_method = theirs._RotateMethod.ALL_TO_ALL
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    group: Any = dist.group.WORLD
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "is_causal": causal}
    out, lse = theirs._templated_ring_attention(group, 2, kernel, **given)
    given |= {"out": out, "logsumexp": lse, "dropout_p": 0.0}
    grads = theirs._templated_ring_attention_backward(group, 2, gradient, d_out, "grad_out", **given)
    return [out, *grads]
