"""The lightning indexer over entries: which blocks of the past are worth reading."""

from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.core import split_heads
from kvlearn.attention.sparse.compressor import Compressor
from kvlearn.attention.sparse.indexer import Indexer, Request


class EntryIndexer(Indexer):
    """Scores every whole block i for every token t, by J small heads over one small key a block.

        I_ti = Σ_j w_tj ReLU(q_tj · κ_i),   q = RoPE(W_q a),   w = W_w x / √(J · Di)

    The keys κ are entries of a compressor of its own, Di wide; a is what the queries of attention are made
    from. It is the indexer of ``dsa``, with m times fewer keys to score and to store.
    """

    def __init__(
        self, d_model: int, query_width: int, n_heads: int, top_k: int, compressor: Compressor
    ) -> None:
        super().__init__()
        self.n_heads, self.top_k = (
            validate.positive("index_heads", n_heads),
            validate.positive("top_k", top_k),
        )
        self.q_proj = nn.Linear(query_width, self.n_heads * compressor.width, bias=False)
        self.weight_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.compressor = compressor

    def request(self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Tensor) -> Request:
        q = self.compressor.rope(split_heads(self.q_proj(a), self.n_heads), positions)
        return Request(q, self.weight_proj(x).mT * (self.n_heads * self.compressor.width) ** -0.5)
