"""Attention over many devices: blockwise on one, ring attention over several, decode over a sharded cache.

Everything is exact. ``blockwise`` has the computation, ``layout`` who holds and needs what, ``ring`` the
messages, ``decode`` the cache that is spread out, ``state`` a recurrence, ``decoder`` a whole model,
``processes`` starts processes, ``simulate`` says what more devices and other links would do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlearn.parallel.blockwise import Rule, blockwise_attention, blockwise_layer
    from kvlearn.parallel.decode import ShardedKVCache, tree_merge
    from kvlearn.parallel.decoder import ParallelDecoder
    from kvlearn.parallel.layout import Layout, Plan
    from kvlearn.parallel.processes import RankFailed, launch
    from kvlearn.parallel.ring import Log, PeerLost, ring_attention
    from kvlearn.parallel.state import pass_state

# Imported when used: ``python -m kvlearn.parallel.ring`` must not meet a second copy of its own module.
_HOMES = {
    "blockwise": ("Rule", "blockwise_attention", "blockwise_layer"),
    "decode": ("ShardedKVCache", "tree_merge"),
    "decoder": ("ParallelDecoder",),
    "processes": ("RankFailed", "launch"),
    "layout": ("Layout", "Plan"),
    "ring": ("Log", "PeerLost", "ring_attention"),
    "state": ("pass_state",),
}

__all__ = [
    "Layout",
    "Log",
    "ParallelDecoder",
    "PeerLost",
    "Plan",
    "RankFailed",
    "Rule",
    "ShardedKVCache",
    "blockwise_attention",
    "blockwise_layer",
    "launch",
    "pass_state",
    "ring_attention",
    "tree_merge",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
