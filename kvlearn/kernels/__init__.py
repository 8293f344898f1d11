"""Decode kernels in Triton: the one that people use, and the stages that lead to it.

Imports without Triton; only running a kernel needs it.
"""

from kvlearn.kernels import runtime  # first: it decides whether Triton interprets
from kvlearn.kernels.decode import decode_attention, decode_latent, validate_decode_inputs
from kvlearn.kernels.launch import Workspace
from kvlearn.kernels.tiling import Tiling, choose_splits

__all__ = [
    "Tiling",
    "Workspace",
    "choose_splits",
    "decode_attention",
    "decode_latent",
    "runtime",
    "validate_decode_inputs",
]
