"""A hundred thousand tokens of decode, one after the other: what rounding does to a state by then.

The recurrent form goes through the cache in pieces, whose arithmetic is that of single steps, and the last
tokens are single steps. Retention steps all the way: its state is turned once a call. What comes out at the
end is compared with the same layer in fp64, by its chunked form.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor

from kvlearn.attention import Mechanism, StateCache
from kvlearn.measure.linear_bench.designs import details, new_layer, state_names
from kvlearn.measure.results import Row

LENGTH, LAST = 100_000, 1000
D_MODEL, N_HEADS = 32, 2
PIECE = 1000  # tokens a call
STEPPED = ("retention",)
ERROR = 1e-3  # |y - y in fp64| / |y in fp64| over the last outputs, at most
ROUNDED = ("linear", "gated_delta")  # once more with the state in bf16


def long_rows(device: torch.device) -> Iterator[Row]:
    """Every mechanism with a state; for some the same with a state that is rounded after every token."""
    x = torch.randn(1, LENGTH, D_MODEL, device=device)
    for name in state_names():
        layer = new_layer(name, device, D_MODEL, N_HEADS)
        exact = through_cache(deepcopy(layer).double(), x.double(), PIECE)
        layer.form = "recurrent"
        out = through_cache(layer, x, 1 if name in STEPPED else PIECE)
        outs = {"float32": out}
        if name in ROUNDED:
            outs["bfloat16"] = rounding_state(layer, x, torch.bfloat16)
        for state, y in outs.items():
            none, most = (0, ERROR) if state == "float32" else (None, None)
            sizes = {"state": state, "d_model": D_MODEL, "n_heads": N_HEADS, "last": LAST}
            title = f"{LENGTH} tokens, {name}, state in {state}"
            broken, found = int((~y.isfinite()).sum()), details("long_finite", name, LENGTH, **sizes)
            yield Row(f"{title}: numbers not finite", broken, "in all", none, "==", details=found)
            found = details("long_error", name, LENGTH, **sizes)
            title = f"{title}: error of the last {LAST} against fp64"
            yield Row(title, error(y, exact), "x", most, "<=", details=found)


def through_cache(layer: Mechanism, x: Tensor, piece: int) -> Tensor:
    """The text in pieces through a cache; the last ``LAST`` tokens one by one."""
    cache = layer.new_cache(batch=1, max_len=x.shape[1])
    pieces = (*x[:, :-LAST].split(piece, dim=1), *x[:, -LAST:].split(1, dim=1))
    return torch.cat([layer(each, cache) for each in pieces], dim=1)


def rounding_state(layer: Mechanism, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Token by token, with the memory rounded to ``dtype`` between them; the arithmetic is fp32."""
    cache, outs = layer.new_cache(batch=1, max_len=x.shape[1]), []
    assert isinstance(cache, StateCache)
    memory = cache.state["memory"]
    for token in x.split(1, dim=1):
        outs.append(layer(token, cache))
        memory.copy_(memory.to(dtype))
    return torch.cat(outs, dim=1)


def error(y: Tensor, exact: Tensor) -> float:
    """Relative, by norms, over the last ``LAST`` outputs."""
    y, exact = y[:, -LAST:].double(), exact[:, -LAST:]
    return float((y - exact).norm() / exact.norm())
