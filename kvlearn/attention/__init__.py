"""Mechanisms: one a file, all on the contract in base.py, found by name in ``REGISTRY``."""

from kvlearn.attention.base import REGISTRY, Mechanism, register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.full import DecodeStep, FullAttention, KVCache
from kvlearn.attention.rope import LinearScaling, Llama3Scaling, Rope, RopeConfig, YarnScaling

__all__ = [
    "KV",
    "REGISTRY",
    "Cache",
    "DecodeStep",
    "FullAttention",
    "KVCache",
    "LinearScaling",
    "Llama3Scaling",
    "Mechanism",
    "Rope",
    "RopeConfig",
    "YarnScaling",
    "register",
]
