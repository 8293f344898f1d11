"""Bytes of a cache and of weights that the operators of a call really read and write, and its FLOPs.

A formula says what a step must read; an implementation may read more: a copy, a second pass, keys that a
mask throws away. Here every operator that PyTorch runs is seen with its arguments, and the numbers that it is
given are counted:

    read      every tensor that an operator takes, once for each operator (keys that are values too are read
              once); of a gather, what it gathers
    written   every tensor that an operator changes in place
    FLOPs     matrix products and attention by torch's own formulas, 1 per output number elsewhere
    calls     operators that do work (a view does none)

A number that an expanded view repeats counts once. What stays in an on-chip cache from one operator to the
next is counted again, as the operator asks for it again; what an operator reads twice inside itself is not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from kvlearn import validate

# Operators that copy a selection: they read as many numbers as they return.
GATHERS = ("gather", "index", "index_select", "embedding", "take_along_dim")
# Operators that write without reading what was there.
WRITERS = ("copy_", "fill_", "zero_", "index_copy_", "scatter_", "index_put_", "_index_put_impl_")


@dataclass(frozen=True)
class Touched:
    """Bytes of the cache that were read and written, of the weights that were read; FLOPs and calls.

    ``other``: bytes of everything else that operators took and gave: inputs, intermediate results.
    """

    cache_read: int
    cache_written: int
    weights_read: int
    other: int
    flops: int
    calls: int


def touched(
    fn: Callable[[], object], cache: Iterable[Tensor] = (), weights: Iterable[Tensor] = ()
) -> Touched:
    """Bytes of ``cache`` and of ``weights`` that one call of ``fn`` touches, and its FLOPs.

    It runs without gradients. An operator that is compiled or called from elsewhere (a Triton kernel, numpy)
    is not seen.
    """
    validate.function("fn", fn)
    cache, weights = (
        [validate.instance(name, tensor, Tensor) for tensor in several(name, given)]
        for name, given in (("cache", cache), ("weights", weights))
    )
    counter = _Counter({"cache": cache, "weights": weights})
    # Not in inference mode, where operators are seen before they are taken apart into those that work.
    with torch.inference_mode(False), torch.no_grad(), counter:
        fn()
    bytes_ = counter.bytes
    return Touched(
        bytes_["cache", "read"],
        bytes_["cache", "written"],
        bytes_["weights", "read"],
        counter.other,
        counter.flops,
        counter.calls,
    )


def several(name: str, given: Iterable[Tensor]) -> Iterable[Tensor]:
    """``given``, if it is a collection; a tensor by itself would be taken apart."""
    if isinstance(given, Tensor):
        raise TypeError(f"{name}: expected several tensors, got a Tensor")
    validate.instance(name, given, Iterable)
    return given


def view_bytes(tensor: Tensor) -> int:
    """Bytes of the numbers that a tensor shows; a dimension that is only expanded counts once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
    return prod(sizes) * tensor.element_size()


class _Counter(TorchDispatchMode):
    """Sees every operator below autograd."""

    def __init__(self, owners: dict[str, Iterable[Tensor]]) -> None:
        super().__init__()
        self.owner = {_storage(t): name for name, tensors in owners.items() for t in tensors}
        self.bytes = {(name, how): 0 for name in owners for how in ("read", "written")}
        self.flops = self.calls = self.other = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._schema.name in ("aten::detach", "aten::alias", "aten::lift_fresh"):
            return out
        name = func._schema.name.removeprefix("aten::")
        self.calls += 1
        self.flops += _flops(func, name, args, kwargs, out)
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        counted: dict[tuple[int, Any, bool], int] = {}  # a tensor that is given twice is read once
        for i, (argument, value) in enumerate(given):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                size = view_bytes(tensor)
                if i == 0 and name in GATHERS:
                    size = min(size, view_bytes(out))
                if changed and name in WRITERS:
                    size = min([size, *(view_bytes(t) for t in _tensors(args[-1]))])
                key = (_storage(tensor), tensor.storage_offset(), changed)
                counted[key] = max(size, counted.get(key, 0))
        for (storage, _, changed), size in counted.items():
            if owner := self.owner.get(storage):
                self.bytes[owner, "read"] += size * (not (changed and name in WRITERS))
                self.bytes[owner, "written"] += size * changed
            else:
                self.other += size
        self.other += sum(view_bytes(t) for t in _tensors(out) if _storage(t) not in self.owner)
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if func._overloadpacket in flop_registry:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    if name in WRITERS or name in GATHERS or name in ("clone", "_to_copy", "cat", "stack", "empty"):
        return 0  # moves numbers
    return sum(t.numel() for t in _tensors(out) if t.is_floating_point())
