"""A naive form that shares a building block with the fast one cannot tell that the block is wrong.

Each building block of each mechanism is broken, one at a time. The fast form must then differ from the
naive form, and the naive form must give what it gave before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import draw, redraw

from kvlearn.attention import REGISTRY, Rope
from kvlearn.attention.recurrent import GatedNorm, HeadNorm, ShortConvolution

Break = Callable[[Any], Any]  # from the right building block to the broken one


def swapped_heads(real: Any) -> Any:
    return lambda x, n_heads: real(x.flip(-1), n_heads)


def half_as_heads(real: Any) -> Any:
    return lambda x, n_heads: x.repeat(1, n_heads // x.shape[1], 1, 1)


def other_up_projection(real: Any) -> Any:
    return lambda q, latents, up, *rest: real(q, latents, up.flip(1), *rest)


def unchanged(real: Any) -> Any:
    return lambda self, x, *rest, **options: x


NO_ROTATION: tuple[str, Break] = ("rope.Rope.forward", unchanged)
NO_CONVOLUTION: tuple[str, Break] = (
    "recurrent.ShortConvolution.run",
    lambda real: lambda self, x, past: (x, past),
)
NO_NORM: tuple[str, Break] = ("torch.nn.RMSNorm.forward", lambda real: lambda self, x: x * self.weight)
NO_HEAD_NORM: tuple[str, Break] = ("recurrent.HeadNorm.forward", lambda real: lambda self, heads: heads)
NO_GATE: tuple[str, Break] = (
    "recurrent.GatedNorm.forward",
    lambda real: lambda self, heads, gate: HeadNorm.forward(self, heads),
)
EQUAL_ENTRIES: tuple[str, Break] = (
    "deepseek_v4.Compressor.project",
    lambda real: lambda self, x: torch.stack((self.kv_proj(x), torch.zeros_like(self.kv_proj(x))), dim=2),
)
FIRST_OF_A_BLOCK: tuple[str, Break] = (
    "deepseek_v4.Compressor.compress",
    lambda real: lambda self, tokens, *rest, **options: tokens[:, :: self.rate, 0, -self.width :],
)
DEEPSEEK_V4: list[tuple[str, Break]] = [
    NO_ROTATION,
    ("deepseek_v4.TrailingRope.forward", unchanged),
    NO_NORM,
    ("deepseek_v4.F.rms_norm", lambda real: lambda x, *rest, **options: x),
    EQUAL_ENTRIES,
    FIRST_OF_A_BLOCK,
    ("deepseek_v4.with_sinks", lambda real: lambda part, sink_logits: part.out),
    ("deepseek_v4.merge", lambda real: lambda a, b: a),
    ("deepseek_v4.split_heads", swapped_heads),
]
DELTA: list[tuple[str, Break]] = [
    NO_CONVOLUTION,
    NO_HEAD_NORM,
    ("delta.l2_normalize", lambda real: lambda x: x.float()),
    ("delta.F.silu", lambda real: torch.relu),
]
MHC: list[tuple[str, Break]] = [NO_ROTATION, ("mhc.naive_attention", other_up_projection)]
# Targets are below kvlearn.attention unless they begin with torch.
BLOCKS: dict[str, list[tuple[str, Break]]] = {
    "full": [NO_ROTATION, ("full.split_heads", swapped_heads)],
    "gqa": [
        NO_ROTATION,
        ("full.split_heads", swapped_heads),
        ("full.causal_attention", lambda real: lambda q, k, v, at: real(q, k.flip(1), v.flip(1), at)),
    ],
    "routed": [
        NO_ROTATION,
        ("routed.split_heads", swapped_heads),
        ("routed.RoutedAttention.pools", lambda real: property(lambda self: [0] * self.n_heads)),
    ],
    "token_routed": [
        NO_ROTATION,
        ("routed.split_heads", swapped_heads),
        ("routed.one_hot_choice", lambda real: lambda logits: real(-logits)),
    ],
    "parallel": [NO_ROTATION, NO_NORM, NO_CONVOLUTION, NO_GATE],
    "gated_conv": [NO_CONVOLUTION],
    "mla": [
        NO_ROTATION,
        NO_NORM,
        ("mla.split_heads", swapped_heads),
        ("mla.naive_attention", other_up_projection),
    ],
    "mhc": [
        *MHC,
        (
            "mhc.MultiHeadCompression.compress",
            lambda real: lambda self, x: real(self, x.roll(1, 1)),
        ),
    ],
    "mhc_transformer": [
        *MHC,
        NO_NORM,
        ("torch.nn.functional.gelu", lambda real: torch.relu),
        (
            "mhc.HeadCompressor.forward",
            lambda real: lambda self, heads: self.latent_proj(heads.flatten(-2)),
        ),
    ],
    "window": [
        NO_ROTATION,
        ("window.split_heads", swapped_heads),
        ("window.Window.visible", lambda real: lambda self, q, k: q - k < self.size - 1),
        ("window.with_sinks", lambda real: lambda part, sink_logits: part.out),
    ],
    "released": [
        NO_ROTATION,
        NO_NORM,
        ("released.split_heads", swapped_heads),
        ("window.Window.visible", lambda real: lambda self, q, k: q - k < self.size - 1),
        ("released.with_sinks", lambda real: lambda part, sink_logits: part.out),
        ("torch.sigmoid", lambda real: torch.relu),
    ],
    "sparse": [
        NO_ROTATION,
        ("sparse.split_heads", swapped_heads),
        ("patterns.Local.visible", lambda real: lambda self, q, k: q - k < self.size - 1),
        ("patterns.Strided.visible", lambda real: lambda self, q, k: (q - k) % (self.stride + 1) == 0),
        ("patterns.Random.visible", lambda real: lambda self, q, k: torch.zeros_like(q + k).bool()),
        ("sparse.merge_all", lambda real: lambda parts: next(iter(parts))),
    ],
    "moba": [
        NO_ROTATION,
        ("moba.split_heads", swapped_heads),
        ("moba.block_means", lambda real: lambda k, block: torch.zeros_like(real(k, block))),
        ("moba.top_blocks", lambda real: lambda scores, allowed, n: torch.zeros_like(scores).bool()),
    ],
    "nsa": [
        NO_ROTATION,
        ("nsa.split_heads", swapped_heads),
        ("nsa.BlockMap.forward", lambda real: lambda self, blocks: blocks.mean(-2)),
        (
            "nsa.NativeSparseAttention.gates",
            lambda real: lambda self, x: torch.ones_like(real(self, x)),
        ),
        ("nsa.compressed_weights", lambda real: lambda *given: torch.ones_like(real(*given))),
        ("nsa.top_blocks", lambda real: lambda scores, allowed, n: torch.zeros_like(scores).bool()),
        ("window.Window.visible", lambda real: lambda self, q, k: q - k < self.size - 1),
    ],
    "dsa": [
        NO_ROTATION,
        NO_NORM,
        ("torch.nn.LayerNorm.forward", unchanged),
        ("dsa.index_scores", lambda real: lambda query, keys: -real(query, keys)),
        ("dsa.absorbed_attention", other_up_projection),
    ],
    "hca": DEEPSEEK_V4,
    "csa": [
        *DEEPSEEK_V4,
        ("dsa.index_scores", lambda real: lambda query, keys: torch.zeros_like(real(query, keys))),
    ],
    "short_conv": [NO_CONVOLUTION],
    "linear": [
        ("linear.FEATURES", lambda real: {"elu": lambda x: x.relu() + 1}),
        ("linear.normalised", lambda real: lambda sums: sums[..., :-1]),
        ("linear.linear_attention", lambda real: lambda q, k, v, *rest, **how: real(k, q, v, *rest, **how)),
        ("linear.split_heads", swapped_heads),
    ],
    "retention": [
        NO_ROTATION,
        NO_HEAD_NORM,
        NO_GATE,
        ("linear.log_decays", lambda real: lambda n_heads, decay: (-0.3,) * n_heads),
        ("linear.decay_mask", lambda real: lambda log_decay: real(log_decay).tril(-1)),
        ("linear.split_heads", swapped_heads),
    ],
    "gla": [
        NO_HEAD_NORM,
        NO_GATE,
        ("linear.F.logsigmoid", lambda real: lambda x: -x.abs()),
        ("linear.faded_products", lambda real: lambda x, y, log_decay: (x @ y.mT).tril()),
        ("linear.split_heads", swapped_heads),
    ],
    "delta": [*DELTA, ("delta.expand_heads", half_as_heads), ("delta.split_heads", swapped_heads)],
    "gated_delta": [
        *DELTA,
        NO_GATE,
        ("delta.expand_heads", half_as_heads),
        ("delta.F.softplus", lambda real: torch.relu),
        ("delta.decay_mask", lambda real: lambda log_decay: real(torch.zeros_like(log_decay))),
    ],
    "kda": [
        *DELTA,
        NO_GATE,
        ("delta.F.softplus", lambda real: torch.relu),
        ("delta.faded_products", lambda real: lambda x, y, log_decay: (x @ y.mT).tril()),
    ],
    "mamba": [
        NO_CONVOLUTION,
        ("mamba.F.softplus", lambda real: torch.relu),
        ("mamba.F.silu", lambda real: torch.relu),
        (
            "mamba.selective_scan",
            lambda real: lambda x, dt, *rest, **how: real(x, 0.5 * dt, *rest, **how),
        ),
    ],
    "mamba2": [
        NO_CONVOLUTION,
        ("mamba.GateAndNorm.forward", lambda real: lambda self, y, gate: y * F.silu(gate) * self.weight),
        ("mamba.expand_heads", lambda real: lambda x, n_heads: real(x.flip(1), n_heads)),
        ("linear.decay_mask", lambda real: lambda log_decay: real(torch.zeros_like(log_decay))),
        ("mamba.F.softplus", lambda real: torch.relu),
    ],
    "rwkv4": [
        ("rwkv.shift_tokens", lambda real: lambda x, last: x),
        ("rwkv.Sums.decay", lambda real: lambda self, by: self),
        ("rwkv.wkv", lambda real: lambda w, u, *rest, **how: real(w, u + 1, *rest, **how)),
    ],
    "rwkv4_channel": [("rwkv.shift_tokens", lambda real: lambda x, last: x)],
    "rwkv7": [
        ("rwkv.shift_tokens", lambda real: lambda x, last: x),
        ("rwkv.F.normalize", lambda real: lambda x, dim: x),
        ("rwkv.F.layer_norm", lambda real: lambda heads, *rest, **how: heads),
        (
            "rwkv.generalised_delta_rule",
            lambda real: (
                lambda q, k, v, probe, rewrite, decay, *rest, **how: real(
                    q, k, v, probe, rewrite, 0 * decay, *rest, **how
                )
            ),
        ),
        ("rwkv.split_heads", swapped_heads),
    ],
}


@contextmanager
def broken(target: str, breaking: Break) -> Iterator[None]:
    """``target`` replaced by what ``breaking`` makes of it."""
    path = target if target.startswith("torch") else f"kvlearn.attention.{target}"
    parts = path.split(".")
    depth = next(n for n in range(len(parts) - 1, 0, -1) if is_module(".".join(parts[:n])))
    owner: Any = import_module(".".join(parts[:depth]))
    for name in parts[depth:-1]:
        owner = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, parts[-1], breaking(getattr(owner, parts[-1])))
        yield


def is_module(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_naive_form_shares_no_building_block_with_the_fast_one(name: str) -> None:
    layer = redraw(REGISTRY[name].tiny())
    x = draw(2, 13, layer.d_model, seed=1)
    with torch.no_grad():
        right, naive = layer(x), layer.naive(x)
        assert (right - naive).abs().max() < 1e-4 * right.abs().max().clamp_min(1)
        for target, breaking in BLOCKS[name]:
            with broken(target, breaking):
                layer_of_broken_parts = redraw(REGISTRY[name].tiny())
                wrong, still = layer_of_broken_parts(x), layer_of_broken_parts.naive(x)
            assert torch.equal(still, naive), f"{name}: naive uses {target}"
            assert (wrong - naive).abs().max() > 1e-2, f"{name}: forward does not use {target}"


def test_every_rotation_convolution_norm_and_gate_is_among_the_broken_ones() -> None:
    for name, kind in REGISTRY.items():
        layer, targets = kind.tiny(), {target for target, _ in BLOCKS[name]}
        parts = list(layer.modules())
        wanted = {
            "rope.Rope.forward": any(isinstance(part, Rope) and part.config for part in parts),
            "recurrent.ShortConvolution.run": any(isinstance(part, ShortConvolution) for part in parts),
            "recurrent.GatedNorm.forward": any(isinstance(part, GatedNorm) for part in parts),
            "recurrent.HeadNorm.forward": any(type(part) is HeadNorm for part in parts),
            "torch.nn.RMSNorm.forward": any(type(part) is torch.nn.RMSNorm for part in parts),
        }
        missing = {target for target, used in wanted.items() if used} - targets
        assert not missing, f"{name}: {missing}"
