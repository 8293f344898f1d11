"""The pictures of chapter 05 show the pairs, the computed columns and the lifetimes that the code has."""

from functools import partial
from unittest.mock import patch

import pytest
import torch

from kvlearn import plots
from kvlearn.attention import KV, SparseAttention, parse, sparse
from kvlearn.attention.core import attend_blockwise, grouped_attention
from kvlearn.attention.patterns import bigbird, longformer
from kvlearn.attention.sparse import attend_pattern

SENTENCES = [
    "local(9)",
    str(longformer(7, 2)),
    str(bigbird(4, 2)),
    "fixed(8, summary=2)",
    "local(3) | global(0, at=(5,))",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_what_is_pale_is_what_the_executor_computes(sentence: str) -> None:
    """The scores of a pass are counted where they are made."""
    n, block, scores = 30, 8, []

    def counting(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        scores.append(q.shape[2] * k.shape[2])
        return grouped_attention(q, k, v, mask)

    q, k, v = torch.randn(3, 1, 1, n, 4)
    with patch.object(sparse, "attend_blockwise", partial(attend_blockwise, attend=counting)):
        attend_pattern(q, KV(k, v, torch.arange(n)[None]), parse(sentence), block)
    data = plots.gallery({"it": sentence}, n_tokens=n, block=block).data["it"]
    assert int(data["computed"].sum()) == sum(scores)
    assert torch.equal(data["sees"], parse(sentence).mask(n))
    assert (data["computed"] | ~data["sees"]).all()


@pytest.mark.parametrize("sentence", [*SENTENCES, "local(4) | strided(4)"])
def test_the_numbers_under_a_grid_are_the_layers(sentence: str) -> None:
    layer, bytes_a_token = SparseAttention(8, 1, pattern=sentence), 2 * 8 * 4
    data = plots.gallery({"it": sentence}, n_tokens=30).data["it"]
    assert data["stored"] * bytes_a_token == layer.cache_bytes(30)
    assert data["read"] * bytes_a_token == layer.read_bytes(30)


def test_a_strided_grid_computes_no_more_than_it_sees() -> None:
    data = plots.gallery({"it": "strided(5)"}, n_tokens=30).data["it"]
    assert torch.equal(data["computed"], data["sees"])


def test_a_line_a_token_to_its_last_reader() -> None:
    picture = plots.lifetimes({"window": "local(4)", "fixed": "fixed(4)"}, n_tokens=12)
    for name, sentence in (("window", "local(4)"), ("fixed", "fixed(4)")):
        mask = parse(sentence).mask(12)
        last = [int(mask[:, j].nonzero().max()) for j in range(12)]
        assert picture.data[name]["last_readers"].tolist() == last
        live = [sum(last[j] >= t for j in range(t + 1)) for t in range(12)]
        assert picture.data[name]["live"].tolist() == live
        assert picture.data[name]["slots"] == max(live)
    lines = picture.figure.axes[0].collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in lines][:3] == [[0, 4], [1, 5], [2, 6]]


def test_a_selection_is_drawn_as_it_is() -> None:
    grid = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    picture = plots.selections({"head": grid})
    assert torch.equal(picture.data["head"], grid)
    assert "head: 5 of 6 pairs, 2 by the last" in picture.alt


def test_a_pattern_has_the_colour_of_its_family() -> None:
    picture = plots.gallery({"a": "local(2)", "b": "local(2)"}, n_tokens=8, families={"b": "sliding"})
    first, second = (panel.collections[0].cmap(1.0) for panel in picture.figure.axes)
    assert first != second
