"""Chapter 03: all heads' keys and values of a token kept as one small vector."""

from kvlearn.attention.compressed.latent import (
    LatentCache,
    absorbed_attention,
    fold_up,
    naive_attention,
    unfold_up,
)
from kvlearn.attention.compressed.latent_attention import LatentAttention, LatentStep
from kvlearn.attention.compressed.latent_memory import Compressed, LatentMemory
from kvlearn.attention.compressed.mhc import MultiHeadCompression
from kvlearn.attention.compressed.mhc_transformer import HeadCompressor, MultiHeadCompressionTransformer
from kvlearn.attention.compressed.mla import MultiHeadLatentAttention
from kvlearn.attention.compressed.roads import Road, absorbed_wins, crossover, road_bytes, road_flops

__all__ = [
    "Compressed",
    "HeadCompressor",
    "LatentAttention",
    "LatentCache",
    "LatentMemory",
    "LatentStep",
    "MultiHeadCompression",
    "MultiHeadCompressionTransformer",
    "MultiHeadLatentAttention",
    "Road",
    "absorbed_attention",
    "absorbed_wins",
    "crossover",
    "fold_up",
    "naive_attention",
    "road_bytes",
    "road_flops",
    "unfold_up",
]
