"""Chapter 05: attention to some of the tokens, by a pattern or by what they say."""

from kvlearn.attention.sparse.dsa import DeepSeekSparseAttention
from kvlearn.attention.sparse.indexer import IndexedLatentCache, LightningIndexer
from kvlearn.attention.sparse.moba import BlockCache, MixtureOfBlockAttention
from kvlearn.attention.sparse.nsa import NativeSparseAttention
from kvlearn.attention.sparse.nsa_memory import SparseCache

__all__ = [
    "BlockCache",
    "DeepSeekSparseAttention",
    "IndexedLatentCache",
    "LightningIndexer",
    "MixtureOfBlockAttention",
    "NativeSparseAttention",
    "SparseCache",
]
