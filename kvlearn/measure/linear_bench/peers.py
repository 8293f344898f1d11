"""Mamba and Mamba-2 beside transformers' own PyTorch path: same weights, outputs compared first."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from kvlearn.attention import StateCache
from kvlearn.measure.linear_bench.designs import details, new_layer
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import agree, ratio_row, time_row
from kvlearn.measure.timing import compare

D_MODEL, N_HEADS, LENGTH = 768, 24, 4096  # Mamba's smallest; 24 heads of 64 in Mamba-2
ROUNDS = 5
FASTER = 1.0  # the bar
GOAL = 2


def peer_rows(device: torch.device) -> Iterator[Row]:
    """Time of both, and the memory of ours against one tensor of the states of all tokens.

    Without transformers there is a warning and no row.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        warnings.warn("transformers is not installed: no comparison with its Mamba", stacklevel=2)
        return
    x = torch.randn(1, LENGTH, D_MODEL, device=device)
    for name, new_peer in PEERS.items():
        layer = new_layer(name, device, D_MODEL, N_HEADS)
        with device:
            peer = new_peer().eval()
        share_weights(layer, peer)
        calls: dict[str, Callable[[], Tensor]] = {"transformers": partial(peer, x), name: partial(layer, x)}
        agree({name: calls[name]}, calls["transformers"]())
        by_turns = compare(calls, rounds=ROUNDS)
        title, sizes = f"{name} {D_MODEL}, {LENGTH} tokens", {"d_model": D_MODEL, "n_heads": N_HEADS}
        for who in calls:
            yield time_row(by_turns, title, who, details("peer_time", name, LENGTH, who=who, **sizes))
        found = details("peer_speedup", name, LENGTH, goal=GOAL, **sizes)
        yield ratio_row(by_turns, f"{title} (goal {GOAL})", "transformers", name, found, bar=FASTER)
        cache = layer.new_cache(batch=1, max_len=LENGTH)
        assert isinstance(cache, StateCache)
        states = LENGTH * cache.state["memory"].numel() * x.itemsize
        for who, call in calls.items():
            found = details("peer_memory", name, LENGTH, who=who, states=states, **sizes)
            bar = states if who == name else None
            peak = peak_memory(call, device)
            yield Row(f"{title}, extra memory: {who}", peak, "B", bar, "<=", details=found)


def new_mamba() -> nn.Module:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    mixer: nn.Module = MambaMixer(MambaConfig(hidden_size=D_MODEL), layer_idx=0)
    return mixer


def new_mamba2() -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    head_dim = 2 * D_MODEL // N_HEADS
    config = Mamba2Config(hidden_size=D_MODEL, num_heads=N_HEADS, head_dim=head_dim, n_groups=1)
    mixer: nn.Module = Mamba2Mixer(config, layer_idx=0)
    return mixer


PEERS = {"mamba": new_mamba, "mamba2": new_mamba2}


def share_weights(layer: nn.Module, peer: nn.Module) -> None:
    """Give ``peer`` the weights of ``layer``, under its own names."""
    renamed = {"conv": "conv1d", "o_proj": "out_proj"}
    weights = {}
    for name, weight in layer.state_dict().items():
        part, *rest = name.split(".")
        weights[".".join((renamed.get(part, part), *rest))] = weight
    peer.load_state_dict(weights)
