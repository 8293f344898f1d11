"""Steps of decode where a token chooses by content what it reads, beside full attention of the same width."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.attention import REGISTRY, Mechanism
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import agree, ratio_row, time_row
from kvlearn.measure.timing import compare
from kvlearn.measure.window_bench import designs
from kvlearn.measure.window_bench.designs import details

LENGTHS = (4096, 16384)
CHUNK = 1024  # tokens a pass, to fill a cache
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


def step_rows(device: torch.device) -> Iterator[Row]:
    """The last token through the layer, of those mechanisms that are registered."""
    names = [name for name in OPTIONS if name in REGISTRY]
    for n in LENGTHS:
        x = torch.randn(1, n, designs.D_MODEL, device=device)
        calls: dict[str, Callable[[], Tensor]] = {}
        bytes_read = {}
        for name in names:
            with device:
                layer = REGISTRY[name](designs.D_MODEL, designs.N_HEADS, **OPTIONS[name]).eval()
            calls[name] = checked_step(name, layer, x, chunk=CHUNK, room=ROUNDS + 2)
            bytes_read[name] = layer.read_bytes(n)
        by_turns = compare(calls, rounds=ROUNDS, min_block_time=0)
        title = f"step, layer, {n} tokens"
        for name in names:
            found = details("chosen_time", name, n, read=bytes_read[name], **OPTIONS[name])
            yield time_row(by_turns, title, name, found)
        for name in names[1:]:
            by_bytes = bytes_read["full"] / bytes_read[name]
            found = details("chosen_speedup", name, n, by_bytes=by_bytes, **OPTIONS[name])
            yield ratio_row(by_turns, title, "full", name, found)


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
