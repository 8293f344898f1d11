"""Fixed patterns against others' code: Longformer and BigBird of transformers, FlexAttention, and loops.

Theirs look at both sides. Ours is causal, so it is asked twice: for the past with a token itself, and, the
sequence reversed and the pattern with it, for the future. The two are merged by their log-sum-exp.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from kvlearn.attention import KV, Pattern, SparseAttention
from kvlearn.attention.core import (
    MaskRule,
    Partial,
    attend_blockwise,
    grouped_partial,
    merge,
    merge_heads,
    split_heads,
)
from kvlearn.attention.patterns import (
    Global,
    Local,
    Random,
    bigbird,
    longformer,
    sparse_transformer,
    sparse_transformer_fixed,
)
from kvlearn.attention.sparse import attend_pattern

BATCH, D_MODEL, N_HEADS = 2, 24, 3


def redrawn(model: nn.Module, seed: int = 0) -> Any:
    """Every weight drawn anew, biases too, and large, so that attention picks."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    return model


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def heads(layer: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values by the layer's own weights."""
    return [split_heads(getattr(layer, name)(x), N_HEADS) for name in ("query", "key", "value")]


@dataclass(frozen=True)
class Others:
    """A mask rule without the pairs of a token with itself."""

    rule: MaskRule

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.rule.visible(queries, keys) & (queries != keys)

    def visible_keys(self, first: int, last: int) -> Tensor:
        return self.rule.visible_keys(first, last)


def partial(q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, block: int) -> Partial:
    """Blockwise, with the log-sum-exp as one more column."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, lse = grouped_partial(q, k, v, mask)
        return torch.cat((out, lse[..., None]), dim=-1)

    both = attend_blockwise(q, KV(k, v, torch.arange(q.shape[2])[None]), rule, block, attend)
    return Partial(both[..., :-1], both[..., -1])


def on_both_sides(q: Tensor, k: Tensor, v: Tensor, past: MaskRule, future: MaskRule, block: int) -> Tensor:
    """``past`` up to the token itself; ``future``, a pattern of the sequence reversed, without it."""
    before = partial(q, k, v, past, block)
    after = partial(*(x.flip(2) for x in (q, k, v)), Others(future), block)
    return merge(before, Partial(after.out.flip(2), after.lse.flip(2))).out


def longformer_layer(width: int) -> LongformerSelfAttention:
    """Theirs has other projections for global tokens; here they are the same."""
    config = LongformerConfig(
        hidden_size=D_MODEL,
        num_attention_heads=N_HEADS,
        attention_window=[width],
        attention_probs_dropout_prob=0.0,
    )
    layer = redrawn(LongformerSelfAttention(config, 0)).eval()
    for name in ("query", "key", "value"):
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    return layer


def longformer_output(layer: LongformerSelfAttention, x: Tensor, wide: tuple[int, ...]) -> Tensor:
    marks = torch.zeros(x.shape[:2])
    marks[:, list(wide)] = 10_000.0
    return layer(
        x,
        attention_mask=marks,
        is_index_masked=marks < 0,
        is_index_global_attn=marks > 0,
        is_global_attn=bool(wide),
    )[0]


@pytest.mark.parametrize("wide", [(), (0,), (0, 1, 2), (0, 7, 8, 30, 47)], ids=str)
@pytest.mark.parametrize("width", [4, 8, 24])
@pytest.mark.parametrize("block", [1, 5, 16, 100])
@torch.no_grad()
def test_windows_and_global_tokens_are_longformers(width: int, wide: tuple[int, ...], block: int) -> None:
    """Its window of w looks w/2 back and w/2 ahead."""
    time = 48
    layer, x = longformer_layer(width), draw(BATCH, time, D_MODEL)
    past: Pattern = Local(width // 2 + 1)
    future: Pattern = past
    if wide:
        past, future = past | Global(at=wide), past | Global(at=tuple(time - 1 - p for p in wide))
    if wide == (0, 1, 2):
        assert torch.equal(longformer(width // 2 + 1, 3).mask(time), past.mask(time))
    got = merge_heads(on_both_sides(*heads(layer, x), past, future, block))
    close(got, longformer_output(layer, x, wide))


@torch.no_grad()
def test_a_longformer_off_by_one_would_be_detected() -> None:
    layer, x = longformer_layer(8), draw(BATCH, 48, D_MODEL)
    expected = longformer_output(layer, x, (0,))
    for past, future in (
        (longformer(4, 1), longformer(5, 1)),  # nothing global at the end of time, and one past token less
        (Local(5) | Global(2), Local(5) | Global(at=(47,))),
        (Local(5) | Global(1), Local(5) | Global(at=(46,))),
        (Local(5) | Global(1), Local(6) | Global(at=(47,))),
    ):
        got = merge_heads(on_both_sides(*heads(layer, x), past, future, 16))
        assert (got - expected).abs().max() > 1e-2


@dataclass(frozen=True)
class Drawn(Random):
    """Random blocks that somebody else has drawn: those before each block."""

    table: tuple[tuple[int, ...], ...] = field(default=())

    def draw(self, number: int) -> list[int]:
        return sorted(b for b in self.table[number] if b < number)


def bigbird_output(
    block: int, n_random: int, x: Tensor
) -> tuple[BigBirdBlockSparseAttention, Tensor, list[list[list[int]]]]:
    """A layer of theirs, its output, and for each head and each block the random blocks that it drew.

    In evaluation theirs draws block 0 for all, which is global anyway; so it is left in training, without
    dropout.
    """
    config = BigBirdConfig(
        hidden_size=D_MODEL,
        num_attention_heads=N_HEADS,
        block_size=block,
        num_random_blocks=n_random,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=4096,
    )
    layer = redrawn(BigBirdBlockSparseAttention(config, seed=3)).train()
    drawn: list[Any] = []
    original = layer._bigbird_block_rand_mask_with_head

    def recorded(**arguments: Any) -> Any:
        drawn.append(original(**arguments))
        return drawn[-1]

    layer._bigbird_block_rand_mask_with_head = recorded
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(x.shape[:2]), block)
    out = layer(
        x,
        band_mask=masks[1],
        from_mask=masks[2],
        to_mask=masks[3],
        from_blocked_mask=masks[0],
        to_blocked_mask=masks[0],
    )[0]
    # The first and the last block attend to everything, and draw nothing.
    return layer, out, [[[], *rows.tolist(), []] for rows in drawn[0]]


@pytest.mark.parametrize(
    ("block", "n_random", "n_blocks"), [(4, 1, 9), (4, 2, 12), (3, 3, 12), (8, 2, 7), (2, 3, 20)]
)
@pytest.mark.parametrize("executed", [1, 6, 100])
@torch.no_grad()
def test_blocks_near_global_and_random_are_bigbirds(
    block: int, n_random: int, n_blocks: int, executed: int
) -> None:
    """Its first and last blocks are global; here its own draws replace ours, head by head."""
    time = block * n_blocks
    x = draw(BATCH, time, D_MODEL)
    layer, expected, drawn = bigbird_output(block, n_random, x)
    assert len({str(rows) for rows in drawn}) > 1  # heads differ
    assert {b for rows in drawn for row in rows for b in row} - {0}
    near_and_first = bigbird(block, n_random).parts[:2]  # type: ignore[attr-defined]
    assert near_and_first == (Local(2 * block, block), Global(block))
    ends = Local(2 * block, block) | Global(block, at=tuple(range(time - block, time)))
    outs = []
    for head, rows in enumerate(drawn):
        mirrored = [[n_blocks - 1 - b for b in row] for row in reversed(rows)]
        past, future = (
            ends | Drawn(n_random, block, table=tuple(map(tuple, table))) for table in (rows, mirrored)
        )
        mine = (part[:, head : head + 1] for part in heads(layer, x))
        outs.append(on_both_sides(*mine, past, future, executed))
    close(merge_heads(torch.cat(outs, 1)), expected)


@torch.no_grad()
def test_a_bigbird_with_another_draw_would_be_detected() -> None:
    x = draw(BATCH, 48, D_MODEL)
    layer, expected, drawn = bigbird_output(4, 2, x)
    ends = Local(8, 4) | Global(4, at=tuple(range(44, 48)))
    tables = [tuple(map(tuple, rows)) for rows in drawn]
    wrong = (
        (tables[0], ends),
        (tables[1], Local(4, 4) | Global(4, at=tuple(range(44, 48)))),
        (tables[1], Local(8) | Global(4, at=tuple(range(44, 48)))),
        (tables[1], Local(8, 4) | Global(4)),
        (tables[1], ends),
    )
    mine = [part[:, 1:2] for part in heads(layer, x)]
    errors = []
    for table, others in wrong:
        mirrored = tuple(tuple(11 - b for b in row) for row in reversed(table))
        past, future = others | Drawn(2, 4, table=table), others | Drawn(2, 4, table=mirrored)
        got = on_both_sides(*mine, past, future, 16)[:, 0]
        errors.append(float((got - expected.view(BATCH, 48, N_HEADS, -1)[:, :, 1]).abs().max()))
    assert min(errors[:-1]) > 1e-2
    assert errors[-1] < 1e-4


def by_loops(visible: Callable[[int, int], bool], time: int) -> np.ndarray:
    """The mask of a definition, pair by pair."""
    mask = np.zeros((time, time), dtype=bool)
    for i in range(time):
        for j in range(i + 1):
            mask[i, j] = visible(i, j)
    return mask


def strided(stride: int) -> Callable[[int, int], bool]:
    """Sparse Transformers, section 4.3: A1 = {t … i} with t = max(0, i - l), A2 = {j : (i - j) mod l = 0}."""
    return lambda i, j: j >= max(0, i - stride) or (i - j) % stride == 0


def fixed(block: int, summary: int) -> Callable[[int, int], bool]:
    """The same: A1 = {j : ⌊j/l⌋ = ⌊i/l⌋}, A2 = {j : j mod l ∈ {t … l}} with t = l - c."""
    return lambda i, j: j // block == i // block or j % block in range(block - summary, block + 1)


PAPERS = {
    "strided(1)": (sparse_transformer(1), strided(1)),
    "strided(5)": (sparse_transformer(5), strided(5)),
    "strided(7)": (sparse_transformer(7), strided(7)),
    "strided(64)": (sparse_transformer(64), strided(64)),
    "fixed(1, 1)": (sparse_transformer_fixed(1, 1), fixed(1, 1)),
    "fixed(6, 1)": (sparse_transformer_fixed(6, 1), fixed(6, 1)),
    "fixed(8, 3)": (sparse_transformer_fixed(8, 3), fixed(8, 3)),
    "fixed(5, 5)": (sparse_transformer_fixed(5, 5), fixed(5, 5)),
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("block", [1, 7, 16, 64])
@torch.no_grad()
def test_strided_and_fixed_are_the_sparse_transformers(name: str, block: int) -> None:
    pattern, visible = PAPERS[name]
    time = 45
    mask = torch.from_numpy(by_loops(visible, time))
    assert torch.equal(pattern.mask(time), mask)
    q, k, v = draw(BATCH, 6, time, 8), draw(BATCH, 2, time, 8, seed=2), draw(BATCH, 2, time, 8, seed=3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    close(attend_pattern(q, KV(k, v, torch.arange(time)[None]), pattern, block), expected)


@pytest.mark.parametrize("name", PAPERS)
@torch.no_grad()
def test_a_layer_of_the_sparse_transformer_decodes_as_its_mask_says(name: str) -> None:
    pattern, visible = PAPERS[name]
    time = 30
    layer = redrawn(SparseAttention(D_MODEL, N_HEADS, pattern=pattern, block=8, rope=None)).eval()
    x, cache = draw(BATCH, time, D_MODEL), layer.new_cache(BATCH, time)
    q, k, v = (split_heads(proj(x), N_HEADS) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    mask = torch.from_numpy(by_loops(visible, time))
    expected = layer.o_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    close(torch.cat([layer(part, cache) for part in x.split([11, 4, *[1] * 15], 1)], 1), expected)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "thorough",
    reason="its compiler takes half a minute: with HYPOTHESIS_PROFILE=thorough",
)
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="FlexAttention on a CPU needs a C++ compiler: there is no g++ and no clang++",
)
@torch.no_grad()
def test_a_pattern_is_flex_attentions_mask_mod() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    time = 256
    pattern = Local(40) | Global(3) | sparse_transformer(48)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near, far, wide = i - j <= 47, (i - j) % 48 == 0, (j < 3) | (i < 3)
        return (j <= i) & (near | far | wide)

    q, k, v = (draw(1, 4, time, 16, seed=seed) for seed in (1, 2, 3))
    blocks = create_block_mask(mask_mod, None, None, time, time, device="cpu")
    expected = torch.compile(flex_attention)(q, k, v, block_mask=blocks)
    close(attend_pattern(q, KV(k, v, torch.arange(time)[None]), pattern, 50), expected)
