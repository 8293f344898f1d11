"""Mechanisms, one family per file, all on the contract in base.py and found by name in ``REGISTRY``.

They are imported in the order of the chapters, which is the order of the registry.
"""

# isort: off
from kvlearn.attention.base import KV, REGISTRY, Cache, DecodeStep, KVCache, Mechanism, NoCache, register
from kvlearn.attention.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeConfig,
    YarnScaling,
)
from kvlearn.attention.full import FullAttention, GroupedQueryAttention
from kvlearn.attention.routed import RoutedAttention, TokenRoutedAttention
from kvlearn.attention.mhc import MultiHeadCompression, MultiHeadCompressionTransformer
from kvlearn.attention.mla import LatentCache, LatentStep, MultiHeadLatentAttention
from kvlearn.attention.window import RingCache, SlotCache, WindowAttention
from kvlearn.attention.released import ReleasedAttention
from kvlearn.attention.patterns import Pattern, PatternCache, parse
from kvlearn.attention.sparse import SparseAttention
from kvlearn.attention.moba import MixtureOfBlockAttention
from kvlearn.attention.nsa import NativeSparseAttention
from kvlearn.attention.dsa import DeepSeekSparseAttention
from kvlearn.attention.deepseek_v4 import CompressedSparseAttention, HeavilyCompressedAttention
from kvlearn.attention.recurrent import (
    GatedShortConvolution,
    ShortConvolution,
    ShortConvolutionMixer,
    StateCache,
)
from kvlearn.attention.linear import GatedLinearAttention, LinearAttention, Retention
from kvlearn.attention.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from kvlearn.attention.mamba import Mamba, Mamba2
from kvlearn.attention.rwkv import Rwkv4, Rwkv4ChannelMix, Rwkv7
from kvlearn.attention.parallel import ParallelCache, ParallelMixers
# isort: on

__all__ = [
    "KV",
    "REGISTRY",
    "Cache",
    "CompressedSparseAttention",
    "DecodeStep",
    "DeepSeekSparseAttention",
    "DeltaNet",
    "DynamicScaling",
    "FullAttention",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedShortConvolution",
    "GroupedQueryAttention",
    "HeavilyCompressedAttention",
    "KVCache",
    "KimiDeltaAttention",
    "LatentCache",
    "LatentStep",
    "LinearAttention",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Mamba",
    "Mamba2",
    "Mechanism",
    "MixtureOfBlockAttention",
    "MultiHeadCompression",
    "MultiHeadCompressionTransformer",
    "MultiHeadLatentAttention",
    "NativeSparseAttention",
    "NoCache",
    "ParallelCache",
    "ParallelMixers",
    "Pattern",
    "PatternCache",
    "ReleasedAttention",
    "Retention",
    "RingCache",
    "Rope",
    "RopeConfig",
    "RoutedAttention",
    "Rwkv4",
    "Rwkv4ChannelMix",
    "Rwkv7",
    "ShortConvolution",
    "ShortConvolutionMixer",
    "SlotCache",
    "SparseAttention",
    "StateCache",
    "TokenRoutedAttention",
    "WindowAttention",
    "YarnScaling",
    "parse",
    "register",
]
