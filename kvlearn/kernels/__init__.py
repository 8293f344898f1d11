"""Decode kernels in Triton: the library's kernel, and the stages of chapter 11 that lead to it.

Imports without Triton; only running a kernel needs it.
"""

from kvlearn.kernels import runtime  # first: it sets whether Triton interprets
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
