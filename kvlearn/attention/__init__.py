"""Mechanisms: one a file, all on the contract in base.py, found by name in ``REGISTRY``."""

from kvlearn.attention.base import REGISTRY, Mechanism, register
from kvlearn.attention.cache import KV, Cache, KVCache, NoCache
from kvlearn.attention.compressed import (
    LatentAttention,
    LatentCache,
    LatentStep,
    MultiHeadCompression,
    MultiHeadCompressionTransformer,
    MultiHeadLatentAttention,
)
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import DecodeStep, KVAttention
from kvlearn.attention.linear.delta import DeltaNet
from kvlearn.attention.linear.gated_delta import GatedDeltaNet
from kvlearn.attention.linear.gla import GatedLinearAttention
from kvlearn.attention.linear.kda import KimiDeltaAttention
from kvlearn.attention.linear.linear import LinearAttention
from kvlearn.attention.linear.mamba import Mamba
from kvlearn.attention.linear.mamba2 import Mamba2
from kvlearn.attention.linear.retention import Retention
from kvlearn.attention.linear.rwkv4 import Rwkv4
from kvlearn.attention.linear.rwkv4_channel import Rwkv4ChannelMix
from kvlearn.attention.linear.rwkv7 import Rwkv7
from kvlearn.attention.linear.short_conv import ShortConvolution, ShortConvolutionMixer
from kvlearn.attention.linear.state import StateCache, StateMechanism
from kvlearn.attention.rope import LinearScaling, Llama3Scaling, Rope, RopeConfig, YarnScaling
from kvlearn.attention.shared.gqa import GroupedQueryAttention
from kvlearn.attention.shared.routed import RoutedAttention
from kvlearn.attention.shared.token_routed import TokenRoutedAttention
from kvlearn.attention.sliding.ring import RingCache
from kvlearn.attention.sliding.window import WindowAttention
from kvlearn.attention.slots import SlotCache
from kvlearn.attention.sparse.csa import CompressedSparseAttention
from kvlearn.attention.sparse.dsa import DeepSeekSparseAttention
from kvlearn.attention.sparse.fixed import SparseAttention
from kvlearn.attention.sparse.hca import HeavilyCompressedAttention
from kvlearn.attention.sparse.moba import BlockCache, MixtureOfBlockAttention
from kvlearn.attention.sparse.nsa import NativeSparseAttention
from kvlearn.attention.sparse.pattern import Pattern
from kvlearn.attention.sparse.plan import PatternCache
from kvlearn.attention.sparse.sentences import parse

__all__ = [
    "KV",
    "REGISTRY",
    "BlockCache",
    "Cache",
    "CompressedSparseAttention",
    "DecodeStep",
    "DeepSeekSparseAttention",
    "DeltaNet",
    "FullAttention",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GroupedQueryAttention",
    "HeavilyCompressedAttention",
    "KVAttention",
    "KVCache",
    "KimiDeltaAttention",
    "LatentAttention",
    "LatentCache",
    "LatentStep",
    "LinearAttention",
    "LinearScaling",
    "Llama3Scaling",
    "Mamba",
    "Mamba2",
    "Mechanism",
    "MixtureOfBlockAttention",
    "MultiHeadCompression",
    "MultiHeadCompressionTransformer",
    "MultiHeadLatentAttention",
    "NativeSparseAttention",
    "NoCache",
    "Pattern",
    "PatternCache",
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
    "StateMechanism",
    "TokenRoutedAttention",
    "WindowAttention",
    "YarnScaling",
    "parse",
    "register",
]
