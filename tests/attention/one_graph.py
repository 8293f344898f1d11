"""Each mechanism under torch.compile(fullgraph=True): a training pass, and decode steps with a cache.

    python tests/attention/one_graph.py [--quick] NAME ...

Outputs, gradients and caches must be those without it. Prints one line per mechanism, with the graphs that a
pass and its decode steps took; the exit status is 1 if a mechanism failed. The backend is "eager": graphs are
captured, nothing is compiled to machine code.

``--quick`` captures fewer graphs: except in ``AUTOMATIC`` the length of the cache is a symbol from the first
step on, so the first length has no graph of its own; and mechanisms that compress or select blocks begin at
the 10th token, since torch traces 0 and 1 blocks separately.
"""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from attention_tools import close, draw, redraw
from torch import Tensor

from kvlearn.attention import REGISTRY

FIRST, LAST = 4, 24
AUTOMATIC = ("gqa", "window", "linear")  # tokens, a ring, a state: a length traced as torch does by default
# Graphs of the decode steps from the 4th to the 24th token. Two are enough where nothing but the length
# changes, which is traced as a number from the second graph on. More for a ring that becomes full (window,
# nsa), and for a block that a token completes or not (moba, csa, hca).
GRAPHS = {"default": 2, "window": 3, "nsa": 3, "moba": 4, "csa": 3, "hca": 4}
QUICK_FIRST = {"nsa": 10, "moba": 10, "csa": 10, "hca": 10}
QUICK_GRAPHS = {"default": 1, "gqa": 2, "window": 3, "linear": 2, "nsa": 2, "moba": 2, "csa": 2, "hca": 3}


class Graphs:
    """The backend: graphs run as they are, and are counted."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        self.n += 1
        return graph.forward


def trace_fast() -> None:
    """Collect garbage rarely; no stack traces of operators, and no cache that costs more than it saves."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    torch._dynamo.config.run_gc_after_compile = False
    torch._dynamo.config.fake_tensor_cache_enabled = False
    traceback.StackSummary.from_list = lambda _: traceback.StackSummary()  # type: ignore[method-assign]


def capture(name: str, quick: bool) -> tuple[int, int]:
    """The number of graphs of a training pass and of the steps."""
    torch.compiler.reset()
    symbolic = quick and name not in AUTOMATIC
    torch.compiler.config.dynamic_sources = r"L\['cache'\](\..*)?\.length" if symbolic else ""
    first = QUICK_FIRST.get(name, FIRST) if quick else FIRST
    layer, graphs = redraw(REGISTRY[name].tiny()), Graphs()
    compiled: Any = torch.compile(layer, fullgraph=True, backend=graphs)
    x = draw(2, LAST, layer.d_model)
    got, expected = compiled(x), layer(x)
    close(got, expected)
    learned = [w for n, w in layer.named_parameters() if not n.startswith(layer.auxiliary_parameters)]
    grads = (torch.autograd.grad(y.square().sum(), learned) for y in (got, expected))
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)
    in_training, graphs.n = graphs.n, 0

    cache, plain = (layer.new_cache(2, LAST) for _ in range(2))
    outs = [layer(x[:, :first], each) for each in (cache, plain)][:1]
    for t in range(first, LAST):
        outs.append(compiled(x[:, t : t + 1], cache))
        layer(x[:, t : t + 1], plain)
    close(torch.cat(outs, dim=1), expected)
    for a, b in zip(cache.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    return in_training, graphs.n


def main(names: list[str]) -> int:
    if quick := names[:1] == ["--quick"]:
        names = names[1:]
    graphs, failed = QUICK_GRAPHS if quick else GRAPHS, False
    trace_fast()
    for name in names:
        start = time.process_time()
        try:
            training, steps = capture(name, quick)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-1)}", flush=True)
            failed = True
        else:
            allowed = graphs.get(name, graphs["default"])
            bad = training != 1 or steps > allowed
            failed |= bad
            seconds = time.process_time() - start
            verdict = f", expected 1 and at most {allowed}" if bad else ""
            print(f"{name}: {training} in training, {steps} in decode{verdict} ({seconds:.1f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
