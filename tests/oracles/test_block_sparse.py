"""MoBA and NSA against forms put together from others' parts; transformers has neither mechanism.

transformers' RoPE, loops over NumPy arrays for the masks, PyTorch's attention over all keys, and a strided
convolution for φ.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvlearn.attention.moba import MixtureOfBlockAttention
from kvlearn.attention.nsa import NativeSparseAttention

D_MODEL, HEAD_DIM, BATCH, TIME = 32, 8, 2, 53

MOBA = [
    {"n_heads": 4, "block": 4, "n_blocks": 3},
    {"n_heads": 6, "n_kv_heads": 2, "block": 5, "n_blocks": 2},
    {"n_heads": 3, "n_kv_heads": 1, "block": 8, "n_blocks": 4},
    {"n_heads": 2, "block": 16, "n_blocks": 9},
]
NSA = [
    {"n_heads": 4, "n_kv_heads": 2, "compress": 4, "stride": 2, "block": 8, "n_blocks": 4, "window": 9},
    {"n_heads": 6, "n_kv_heads": 2, "compress": 5, "stride": 1, "block": 5, "n_blocks": 5, "n_local": 3,
     "window": 6},
    {"n_heads": 3, "compress": 6, "stride": 3, "block": 6, "n_blocks": 3, "n_local": 1, "window": 70},
]  # fmt: skip


def redrawn(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[-1] ** -0.5
    return layer.eval()


def text() -> Tensor:
    return torch.randn(BATCH, TIME, D_MODEL, generator=torch.Generator().manual_seed(1))


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    config = LlamaConfig(head_dim=HEAD_DIM, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).view(BATCH, TIME, -1, HEAD_DIM).permute(0, 2, 1, 3)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: np.ndarray) -> Tensor:
    """Over every key, with those that ``mask`` (B, H, T, S) leaves out at -inf; 0 where it leaves out all."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    bias = torch.from_numpy(np.where(mask, 0.0, -np.inf)).float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).nan_to_num(0.0)


def output(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.permute(0, 2, 1, 3).reshape(BATCH, TIME, -1), weight)


def decoded(layer: Any, x: Tensor) -> Tensor:
    """A prompt, a chunk, and then token by token."""
    cache, edges = layer.new_cache(BATCH, TIME), [0, 21, 30, *range(31, TIME + 1)]
    return torch.cat([layer(x[:, a:b], cache) for a, b in pairwise(edges)], dim=1)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)


def moba_mask(q: np.ndarray, k: np.ndarray, block: int, top: int) -> np.ndarray:
    mask = np.zeros((BATCH, q.shape[1], TIME, TIME), bool)
    for b, h, t in np.ndindex(mask.shape[:3]):
        keys, own = k[b, h * k.shape[1] // q.shape[1]], t // block
        means = np.array([keys[i * block : (i + 1) * block].mean(0) for i in range(own)]).reshape(
            own, HEAD_DIM
        )
        for i in np.argsort(-(means @ q[b, h, t]))[: top - 1]:
            mask[b, h, t, i * block : (i + 1) * block] = True
        mask[b, h, t, own * block : t + 1] = True
    return mask


@pytest.mark.parametrize("options", MOBA)
@torch.no_grad()
def test_moba_is_full_attention_under_the_mask_of_its_selection(options: dict[str, int]) -> None:
    layer, x = redrawn(MixtureOfBlockAttention(D_MODEL, head_dim=HEAD_DIM, **options)), text()
    positions = torch.arange(TIME)
    q, k = (rotated(heads(x, w), positions) for w in (layer.q_proj.weight, layer.k_proj.weight))
    mask = moba_mask(q.numpy(), k.numpy(), options["block"], options["n_blocks"])
    expected = output(masked(q, k, heads(x, layer.v_proj.weight), mask), layer.o_proj.weight)
    close(layer(x), expected)
    close(decoded(layer, x), expected)


def squeezed(x: Tensor, branch_map: Any, length: int, stride: int) -> Tensor:
    """φ as a strided convolution over the sequence; the positions add the same to every block."""
    kernel = branch_map.mix.weight.view(HEAD_DIM, length, HEAD_DIM).transpose(1, 2)  # out, in, position
    bias = branch_map.mix.bias + branch_map.mix.weight @ branch_map.places.reshape(-1)
    series = x.reshape(-1, TIME, HEAD_DIM).transpose(1, 2)
    hidden = F.gelu(F.conv1d(series, kernel, bias, stride=stride)).transpose(1, 2)
    return F.linear(hidden, branch_map.out.weight, branch_map.out.bias).view(*x.shape[:2], -1, HEAD_DIM)


def nsa_masks(p: np.ndarray, n_kv_heads: int, o: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Selection, by the tokens that each compressed block and each block to select have in common."""
    n_heads, length, stride, size = p.shape[1], o["compress"], o["stride"], o["block"]
    n_local, group = o.get("n_local", 2), p.shape[1] // n_kv_heads
    selected = np.zeros((BATCH, n_heads, TIME, TIME), bool)
    window = np.zeros_like(selected)
    common = np.zeros((p.shape[-1], -(-TIME // size)))
    for i in range(p.shape[-1]):
        for s in range(i * stride, i * stride + length):
            common[i, s // size] += 1 / stride
    for b, h, t in np.ndindex(selected.shape[:3]):
        own, first = t // size, h // group * group
        score = (p[b, first : first + group, t] @ common).sum(0)
        score[own + 1 :] = -np.inf
        score[0] = np.inf
        score[max(0, own - n_local + 1) : own + 1] = np.inf
        for j in np.argsort(-score, kind="stable")[: min(o["n_blocks"], own + 1)]:
            selected[b, h, t, j * size : (j + 1) * size] = True
        selected[b, h, t, t + 1 :] = False
        window[b, h, t, max(0, t - o["window"] + 1) : t + 1] = True
    return selected, window


@pytest.mark.parametrize("options", NSA)
@torch.no_grad()
def test_nsa_is_three_masked_attentions_weighted_by_gates(options: dict[str, int]) -> None:
    layer, x = redrawn(NativeSparseAttention(D_MODEL, head_dim=HEAD_DIM, **options)), text()
    positions = torch.arange(TIME)
    length, stride, G, H = options["compress"], options["stride"], layer.n_kv_heads, layer.n_heads
    k, v = ([heads(x, w) for w in p.weight.chunk(3)] for p in (layer.k_proj, layer.v_proj))
    q = rotated(heads(x, layer.q_proj.weight), positions)

    k_cmp = squeezed(k[0], layer.k_map, length, stride)
    n = k_cmp.shape[2]
    k_cmp, v_cmp = rotated(k_cmp, stride * torch.arange(n)), squeezed(v[0], layer.v_map, length, stride)
    visible = np.array([[i * stride + length - 1 <= t for i in range(n)] for t in range(TIME)])
    visible = np.broadcast_to(visible, (BATCH, H, TIME, n))
    p = masked(q, k_cmp, torch.eye(n).expand(BATCH, G, n, n), visible).numpy()  # of values 1, the weights
    selected, window = nsa_masks(p, G, options)

    branches = (
        masked(q, k_cmp, v_cmp, visible),
        masked(q, rotated(k[1], positions), v[1], selected),
        masked(q, rotated(k[2], positions), v[2], window),
    )
    gates = F.linear(x, layer.gate_proj.weight, layer.gate_proj.bias).sigmoid().view(BATCH, TIME, 3, H)
    mixed = sum(gates[:, :, c].transpose(1, 2)[..., None] * out for c, out in enumerate(branches))
    assert isinstance(mixed, Tensor)
    expected = output(mixed, layer.o_proj.weight)
    close(layer(x), expected)
    close(decoded(layer, x), expected)
    for c in range(3):  # and each branch by itself
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(200 * (torch.arange(3) == c).float().repeat_interleave(H) - 100)
        close(layer(x), output(branches[c], layer.o_proj.weight))
