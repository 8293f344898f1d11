"""The memory arithmetic: bytes of cache that a real model stores, and bytes that one decode step reads.

    stored = batch · Σ_layers (elements per token) · min(length, window) · bytes per element
             (+ index keys, + states of constant size)

Stored is not read: a layer that borrows another layer's cache stores nothing and still reads it every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kvlearn import validate


@dataclass(frozen=True)
class LayerShape:
    """Where one layer differs from plain attention over all tokens with the model's heads.

    ``window``: keeps and reads only the last so many tokens (the current one counts). ``head_dim``: its own
    instead of the model's. ``latent``: one vector of so many numbers per token in place of keys and values
    (multi-head latent attention: the latent's rank + the RoPE part). ``shared``: stores nothing and reads the
    cache of an earlier layer of its kind. ``index_dim``: an index key of so many numbers beside every token,
    and ``top_k``: a step reads only so many of the tokens, which it finds by reading all index keys.
    ``state``: a recurrent state of so many numbers in fp32, in place of keys and values of tokens; ``conv``:
    the numbers of the last inputs of its short convolution, in the cache's type. With ``beside`` the layer
    has the state beside keys and values: two mechanisms in one layer.
    """

    window: int | None = None
    head_dim: int | None = None
    latent: int | None = None
    shared: bool = False
    index_dim: int | None = None
    top_k: int | None = None
    state: int | None = None
    conv: int | None = None
    beside: bool = False

    def __post_init__(self) -> None:
        for name in ("shared", "beside"):
            validate.instance(name, getattr(self, name), bool)
        for name in ("window", "head_dim", "latent", "index_dim", "top_k", "state", "conv"):
            if getattr(self, name) is not None:
                validate.fields_at_least(self, **{name: 1})
        if self.state is None and (self.beside or self.conv is not None):
            raise ValueError("state: expected a number with beside or conv, got None")

    @property
    def keeps_tokens(self) -> bool:
        """Whether the layer keeps anything for each token (a window: for the last ones)."""
        return self.state is None or self.beside

    @property
    def kind(self) -> str:
        """The mechanism in a word: full, window, latent, indexed, state, or two of them with a plus."""
        tokens = "window" if self.window else "latent" if self.latent else "full"
        if self.index_dim is not None:
            tokens = "indexed"
        if self.state is None:
            return tokens
        return f"{tokens} + state" if self.beside else "state"


def index_key_bytes(index_dim: int) -> int:
    """Bytes of one index key as DeepSeek-V3.2 keeps it: fp8 numbers, and an fp32 scale for each 128 of them.

    Source: deepseek-ai/DeepSeek-V3.2-Exp, inference/model.py, Indexer.
    """
    index_dim = validate.positive("index_dim", index_dim)
    return index_dim + 4 * -(-index_dim // 128)


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model, as far as the sizes of its weights and its cache depend on it.

    ``layers`` is a pattern, repeated to the model's depth; empty means that all layers are plain.
    ``bytes_per_parameter``: of the released weights, averaged. ``context``: tokens the model was made for.
    ``source``: where the numbers were read. ``dataclasses.replace`` varies one of them:
    ``replace(model, n_kv_heads=model.n_heads)`` is the same model as multi-head attention.
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_parameters: int
    context: int
    source: str
    layers: tuple[LayerShape, ...] = ()
    bytes_per_parameter: float = 2.0

    def __post_init__(self) -> None:
        sizes = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "n_parameters", "context")
        validate.fields_at_least(self, **dict.fromkeys(sizes, 1))
        validate.divides("n_kv_heads", self.n_kv_heads, "n_heads", self.n_heads)
        validate.instance("layers", self.layers, tuple)
        validate.at_most("len(layers)", len(self.layers), self.n_layers, "n_layers")
        for layer in self.layers:
            validate.instance("layers", layer, LayerShape)
        for name in ("name", "source"):
            validate.instance(name, getattr(self, name), str)
        validate.above("bytes_per_parameter", self.bytes_per_parameter, 0)

    def layer(self, index: int) -> LayerShape:
        """The shape of layer ``index``, counted from 0."""
        return self.layers[index % len(self.layers)] if self.layers else LayerShape()


def elements_per_token(model: ModelShape, length: int = 1) -> int:
    """Numbers that the token at place ``length`` adds to the cache: none for a full window, none for a state.

    At the default, the first token: every layer that stores anything counts, 2 · L · G · D for plain layers.
    Numbers of index keys count too.
    """
    validate.instance("model", model, ModelShape)
    length = validate.positive("length", length)
    numbers = [
        _size(model, n, "stored", lambda width: width, lambda index: index, 1) for n in (length, length - 1)
    ]
    return numbers[0] - numbers[1]


def cache_bytes(
    model: ModelShape, length: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """STORED: bytes of cache for ``batch`` sequences of ``length`` tokens, windows as ring buffers.

    ``dtype`` is that of keys, values, latents and inputs of a convolution; index keys have their own type
    (``index_key_bytes``), states are fp32. A state is there before the first token.
    """
    return _bytes(model, length, "stored", batch, dtype)


def read_bytes(model: ModelShape, length: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """READ: bytes of cache that one decode step touches at ``length`` tokens, its own among them.

    Every layer reads its own tokens once, all query heads together; a shared layer reads its owner's again.
    A layer with an index reads all index keys, and ``top_k`` tokens; a state is read as a whole (and written
    again, which is not counted here).
    """
    return _bytes(model, length, "read", batch, dtype)


def state_bytes(model: ModelShape, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """The part of ``cache_bytes`` that does not grow with the text: all states and their convolutions."""
    return cache_bytes(model, 0, batch=batch, dtype=dtype)


def weights_bytes(model: ModelShape) -> int:
    """Bytes of the released weights; of a mixture of experts, all experts."""
    validate.instance("model", model, ModelShape)
    return round(model.n_parameters * model.bytes_per_parameter)


def users(model: ModelShape, device_bytes: float, length: int, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """How many sequences of ``length`` tokens fit on a device beside the weights (activations not counted).

    0 where not even the weights and one sequence fit.
    """
    validate.positive("length", length)
    left = validate.finite("device_bytes", device_bytes) - weights_bytes(model)
    if not (stored := cache_bytes(model, length, dtype=dtype)):
        raise ValueError("model: expected a layer that stores anything, got layers that are all shared")
    return max(0, int(left // stored))


def _bytes(
    model: ModelShape, length: int, what: Literal["stored", "read"], batch: int, dtype: torch.dtype
) -> int:
    validate.instance("model", model, ModelShape)
    length = validate.at_least("length", length, 0)
    validate.instance("dtype", dtype, torch.dtype)
    one = _size(
        model, length, what, lambda width: width * dtype.itemsize, index_key_bytes, torch.float32.itemsize
    )
    return validate.positive("batch", batch) * one


def _size(
    model: ModelShape,
    length: int,
    what: Literal["stored", "read"],
    of_token: Callable[[int], int],
    of_index: Callable[[int], int],
    of_state: int,
) -> int:
    """The sum over layers and tokens of ``of_token(width)`` for keys and values, ``of_index(index_dim)``.

    To it come ``of_state`` for each number of a state and ``of_token(conv)``, whatever the length.
    """
    total = 0
    for i in range(model.n_layers):
        layer = model.layer(i)
        if layer.shared and what == "stored":
            continue
        total += of_state * (layer.state or 0) + of_token(layer.conv or 0)
        if not layer.keeps_tokens:
            continue
        n_tokens = min(length, layer.window or length)
        if layer.index_dim is not None:
            total += of_index(layer.index_dim) * n_tokens
        if what == "read":
            n_tokens = min(n_tokens, layer.top_k or n_tokens)
        total += (
            of_token(layer.latent or 2 * model.n_kv_heads * (layer.head_dim or model.head_dim)) * n_tokens
        )
    return total
