"""CSA and HCA against transformers' DeepSeek-V4 attention: the same weights, the same numbers.

Their RoPE pairs neighbours, ours the halves, so ``half_split`` reorders the rotated rows, and the columns
of the output projection that read them. Their output projection is two matrices, the first of them in
blocks; ours is their product.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4RotaryEmbedding,
)

from kvlearn.attention.deepseek_v4 import (
    CompressedCache,
    CompressedSparseAttention,
    HeavilyCompressedAttention,
)
from kvlearn.attention.rope import RopeConfig, YarnScaling
from kvlearn.model import half_split

BATCH, TIME, WIDTH, HEADS, HEAD_DIM, ROPE_DIM, WINDOW = 2, 23, 48, 4, 16, 8, 5
RATES = {"compressed_sparse_attention": 3, "heavily_compressed_attention": 4}
KINDS = {"csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "default": (None, RopeConfig(1000.0)),
    "yarn": (YARN, RopeConfig(1000.0, YarnScaling(4.0, 32, attention_factor=1.0))),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# Where no index head answers, scores are equal, 0, and who wins is open: hence 16 of them.
INDEX_HEADS, INDEX_DIM = 16, 12


class Theirs:
    """One attention layer of a tiny DeepSeek-V4 with what surrounds it: positions, mask, cache."""

    def __init__(self, kind: str, top_k: int = 2, rope: str = "default") -> None:
        self.kind, self.top_k, self.rope = kind, top_k, ROPES[rope][1]
        self.config = DeepseekV4Config(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            head_dim=HEAD_DIM,
            q_lora_rank=20,
            o_groups=2,
            o_lora_rank=12,
            partial_rotary_factor=ROPE_DIM / HEAD_DIM,
            sliding_window=WINDOW,
            layer_types=[KINDS[kind]],
            mlp_layer_types=["moe"],
            compress_rates=dict(RATES),
            compress_rope_theta=1000.0,
            rope_parameters=None if ROPES[rope][0] is None else dict(ROPES[rope][0]),
            index_n_heads=INDEX_HEADS,
            index_head_dim=INDEX_DIM,
            index_topk=top_k,
            rms_norm_eps=1e-5,
            max_position_embeddings=128,
            attn_implementation="eager",
        )
        torch.manual_seed(0)
        self.layer = DeepseekV4Attention(self.config, 0).eval()
        for weight in self.layer.parameters():  # vectors too: gains, and the heads' sinks
            spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
            nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=spread)
        self.rotary = DeepseekV4RotaryEmbedding(self.config)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.config)

    def __call__(self, x: Tensor, first: int = 0, cache: DynamicCache | None = None) -> Tensor:
        """The output for tokens from position ``first`` on. Their cache holds the last WINDOW - 1 tokens."""
        positions = torch.arange(first, first + x.shape[1])[None].expand(len(x), -1)
        there = torch.arange(max(first - WINDOW + 1, 0) if cache is not None else first, first + x.shape[1])
        distance = positions[:, None, :, None] - there
        mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= WINDOW), -torch.inf)
        rotary = {name: self.rotary(x, positions, layer_type=name) for name in ("main", "compress")}
        return self.layer(
            x, position_embeddings=rotary, position_ids=positions, attention_mask=mask, past_key_values=cache
        )[0]

    def ours(self) -> HeavilyCompressedAttention:
        """Our layer with these weights."""
        sizes: dict[str, Any] = {
            "head_dim": HEAD_DIM,
            "window": WINDOW,
            "rate": RATES[KINDS[self.kind]],
            "q_rank": 20,
            "rope_dim": ROPE_DIM,
            "norm_eps": 1e-5,
            "rope": self.rope,
        }
        if self.kind == "hca":
            layer = HeavilyCompressedAttention(WIDTH, HEADS, **sizes)
        else:
            sizes |= {"top_k": self.top_k, "index_heads": INDEX_HEADS, "index_dim": INDEX_DIM}
            layer = CompressedSparseAttention(WIDTH, HEADS, **sizes)
        layer.load_state_dict(self.weights())
        return layer.eval()

    def weights(self) -> dict[str, Tensor]:
        theirs = self.layer.state_dict()
        groups = theirs["o_a_proj.weight"].unflatten(0, (2, -1))  # (groups, rank, heads' width / groups)
        out = theirs["o_b_proj.weight"] @ torch.block_diag(*groups)
        weights = {
            "q_down.weight": theirs["q_a_proj.weight"],
            "q_norm.weight": theirs["q_a_norm.weight"],
            "q_proj.weight": half_split(theirs["q_b_proj.weight"], ROPE_DIM, HEADS),
            "k_proj.weight": half_split(theirs["kv_proj.weight"], ROPE_DIM),
            "k_norm.weight": half_split(theirs["kv_norm.weight"][:, None], ROPE_DIM)[:, 0],
            "sink_logits": theirs["sinks"],
            "o_proj.weight": half_split(out.T, ROPE_DIM, HEADS).T,
            **self.compressor("compressor.", "compressor."),
        }
        if self.kind == "csa":
            index = "compressor.indexer."
            weights |= {
                "indexer.q_proj.weight": half_split(theirs[index + "q_b_proj.weight"], ROPE_DIM, INDEX_HEADS),
                "indexer.weight_proj.weight": theirs[index + "scorer.weights_proj.weight"],
                **self.compressor(index, "indexer.compressor."),
            }
        return weights

    def compressor(self, name: str, our_name: str) -> dict[str, Tensor]:
        theirs, series = self.layer.state_dict(), 2 if self.kind == "csa" else 1
        return {
            our_name + "kv_proj.weight": half_split(theirs[name + "kv_proj.weight"], ROPE_DIM, series),
            our_name + "gate_proj.weight": half_split(theirs[name + "gate_proj.weight"], ROPE_DIM, series),
            our_name + "position_bias": half_split(theirs[name + "position_bias"].T, ROPE_DIM, series).T,
            our_name + "norm.weight": half_split(theirs[name + "kv_norm.weight"][:, None], ROPE_DIM)[:, 0],
        }


def hidden() -> Tensor:
    return torch.randn(BATCH, TIME, WIDTH, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("kind", "top_k"), [("hca", 1), ("csa", 1), ("csa", 2), ("csa", 5), ("csa", 64)])
@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_the_same_weights_give_deepseek_v4s_attention(kind: str, rope: str, top_k: int) -> None:
    theirs, x = Theirs(kind, top_k, rope), hidden()
    expected = theirs(x)
    close(theirs.ours()(x), expected)
    close(theirs.ours().naive(x), expected)


@every_kind
@pytest.mark.parametrize("cuts", [[9, 14], [1, 2, 3, 12], [5, 6, 16], list(range(1, TIME))])
@torch.no_grad()
def test_prefill_chunks_and_single_tokens_follow_deepseek_v4s_cache(kind: str, cuts: list[int]) -> None:
    theirs, x = Theirs(kind), hidden()
    ours, their_cache = theirs.ours(), theirs.new_cache()
    cache = ours.new_cache(BATCH, TIME)
    for a, b in zip([0, *cuts], [*cuts, TIME], strict=True):
        close(ours(x[:, a:b], cache), theirs(x[:, a:b], a, their_cache))
        entries = their_cache.layers[0].compressed_kv["compressor"]
        assert entries.shape[1] == b // ours.rate
        expected = torch.stack([half_split(row.T, ROPE_DIM).T for row in entries])
        close(cache.memories[0].entries[:, : b // ours.rate], expected)
    assert isinstance(cache, CompressedCache)


@torch.no_grad()
def test_the_indexer_selects_what_theirs_selects() -> None:
    theirs, x = Theirs("csa"), hidden()
    layer, positions = theirs.layer, torch.arange(TIME)[None].expand(BATCH, -1)
    residual = layer.q_a_norm(layer.q_a_proj(x))
    selected = layer.compressor.indexer(x, residual, positions, None, 0)
    n_entries = TIME // RATES[KINDS["csa"]]
    mask = torch.zeros(BATCH, TIME, n_entries + 1, dtype=torch.bool)
    mask.scatter_(-1, torch.where(selected < 0, n_entries, selected), True)
    ours = theirs.ours()
    assert isinstance(ours, CompressedSparseAttention)
    assert torch.equal(ours.selection(x), mask[..., :-1])
    # There is a choice: of seven entries two, and not always the same.
    assert mask[:, -1, :-1].sum(-1).tolist() == [2, 2]
    assert len({tuple(row) for row in mask[:, -6:, :-1].flatten(0, 1).tolist()}) > 3


@torch.no_grad()
def test_the_selection_matters() -> None:
    x = hidden()
    two, all_of_them = (Theirs("csa", top_k).ours()(x) for top_k in (2, 64))
    changed = (two - all_of_them).abs().amax(-1) > 1e-2
    assert not changed[:, : 3 * 3 - 1].any()  # up to two whole blocks there is no choice
    assert changed[:, 3 * 3 - 1 :].float().mean() > 0.9
