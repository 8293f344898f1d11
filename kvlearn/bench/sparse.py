"""Steps of decode where a token selects by content what it reads, beside full attention of the same width.

These are parts of ``kvlearn bench window``.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.attention import REGISTRY, Mechanism
from kvlearn.bench.common import Part, agree, ratio_row, time_row
from kvlearn.measure.results import Row
from kvlearn.measure.timing import compare

ROUNDS = 31
# As published, as far as a layer of this width can be: DSA's own index of 64 heads and 2048 tokens would not
# be smaller than the attention that it saves.
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "moba": {"block": 512, "n_blocks": 3},
    "nsa": {"compress": 32, "stride": 16, "block": 64, "n_blocks": 16, "window": 512},
    "dsa": {"top_k": 512, "index_heads": 4, "index_dim": 32},
    "csa": {"index_heads": 4, "index_dim": 32},
    "hca": {},
}
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "moba": {"block": 8, "n_blocks": 2},
    "nsa": {"compress": 8, "stride": 4, "block": 8, "n_blocks": 4, "n_local": 1, "window": 8},
    "dsa": {"top_k": 16, "index_heads": 16, "index_dim": 16},
    "csa": {"window": 8, "top_k": 8, "index_heads": 16, "index_dim": 16},
    "hca": {"window": 8, "rate": 16},
}


@dataclass(frozen=True)
class Sizes:
    """The width, each mechanism's options, and lengths in tokens."""

    d_model: int = 256
    n_heads: int = 4
    window: int = 512  # recorded with the rows of ``window``
    lengths: tuple[int, ...] = (4096, 16384)
    chunk: int = 1024  # tokens a pass, to fill a cache
    options: Mapping[str, dict[str, Any]] = field(default_factory=lambda: OPTIONS)

    def details(self, what: str, name: str, length: int, **more: Any) -> dict[str, Any]:
        """To find a row again; ``what`` and ``name`` say which."""
        family = "full" if name == "full" else "sparse"
        shape = {"d_model": self.d_model, "n_heads": self.n_heads, "window": self.window}
        return {"what": what, "name": name, "family": family, **shape, "length": length, "batch": 1, **more}


SIZES = Sizes()
SMALL = Sizes(d_model=16, n_heads=2, window=8, lengths=(32, 64), chunk=16, options=SMALL_OPTIONS)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The part of ``kvlearn bench window`` that measures selection by content."""
    sizes = SMALL if small else SIZES
    return [Part("sparse step", lambda: step_rows(sizes, device))]


@torch.no_grad()
def step_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The last token through the layer, of those mechanisms that are registered."""
    names = [name for name in sizes.options if name in REGISTRY]
    for n in sizes.lengths:
        x = torch.randn(1, n, sizes.d_model, device=device)
        calls: dict[str, Callable[[], Tensor]] = {}
        bytes_read = {}
        for name in names:
            with device:
                layer = REGISTRY[name](sizes.d_model, sizes.n_heads, **sizes.options[name]).eval()
            calls[name] = checked_step(name, layer, x, chunk=sizes.chunk, room=ROUNDS + 2)
            bytes_read[name] = layer.read_bytes(n)
        compared = compare(calls, rounds=ROUNDS, min_block_time=0)
        title = f"step, layer, {n} tokens"
        for name in names:
            found = sizes.details("chosen_time", name, n, read=bytes_read[name], **sizes.options[name])
            yield time_row(compared, title, name, found)
        for name in names[1:]:
            by_bytes = bytes_read["full"] / bytes_read[name]
            found = sizes.details("chosen_speedup", name, n, by_bytes=by_bytes, **sizes.options[name])
            yield ratio_row(compared, title, "full", name, found)


def checked_step(name: str, layer: Mechanism, x: Tensor, *, chunk: int, room: int) -> Callable[[], Tensor]:
    """The last token behind all others in a cache, once it comes out as from a pass over the last ``chunk``.

    Every call is a token more, at most ``room`` of them: some caches hold halves of blocks, or have summed up
    what they saw, and cannot be put back.
    """
    cache = layer.new_cache(batch=1, max_len=x.shape[1] + room)
    *before, last = x.split(chunk, dim=1)
    for piece in before:
        layer(piece, cache)
    expected = layer(last, deepcopy(cache))[:, -1:]
    layer(last[:, :-1], cache)
    step = partial(layer, x[:, -1:], cache)
    agree({name: step}, expected)
    return step
