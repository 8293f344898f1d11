"""The small decoder language model that takes any mechanism per layer, its generation and its checkpoints."""

from kvlearn.model import gemma as gemma  # adds its families
from kvlearn.model import hybrids as hybrids  # adds its families
from kvlearn.model import mixtures as mixtures  # adds its families
from kvlearn.model import rwkv as rwkv  # adds its family
from kvlearn.model import state_space as state_space  # adds its families
from kvlearn.model.checkpoints import card, load, save
from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.convert import convert
from kvlearn.model.decoder import Decoder, DecoderCache
from kvlearn.model.deepseek import half_split, interleave
from kvlearn.model.generation import generate
from kvlearn.model.loading import from_transformers
from kvlearn.model.moe import MoE, MoEConfig, balance_loss

__all__ = [
    "Decoder",
    "DecoderCache",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "Spec",
    "balance_loss",
    "card",
    "convert",
    "from_transformers",
    "generate",
    "half_split",
    "interleave",
    "load",
    "save",
]
