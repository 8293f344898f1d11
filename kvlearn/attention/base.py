"""The contract: the methods of every mechanism of the course, and the cache of keys and values.

    y = layer(x)                                   training: (batch, time, d_model) -> the same, causal
    cache = layer.new_cache(batch=2, max_len=4096)
    y = layer(x, cache)                            continues the cached sequence: prefill, chunk or token
    cache.nbytes                                   bytes really allocated
    layer.cache_bytes(max_len)                     STORED, by the formula on paper
    layer.read_bytes(length)                       READ by one decode step at this length
    y = layer(x, cache, source=kv)                 reads another layer's keys and values, and stores 0 bytes

The model, the measurements and the tests use only these methods. Every class in ``REGISTRY`` is tested
by tests/attention/test_contract.py.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate


class Cache(ABC):
    """The cache of one layer.

    Rows of a batch may differ in length: prompts of different lengths are padded on the right, fed together,
    and cut back to their own lengths by ``trim``.

    Once it holds tokens it belongs to the layer that was called with it, ``writer``, and another layer
    refuses it. An empty one belongs to none, nor does a copy (by copy, deepcopy or pickle) until its next
    call. A copy of a layer is another layer: it continues a copy of the cache.
    """

    can_trim = True  # False where past tokens cannot be removed: a state, a ring that has overwritten some
    writer: "weakref.ref[Mechanism] | None" = None  # weak: a cache that is kept does not keep its model alive

    def __init__(self, batch: int, max_len: int, device: torch.device | str) -> None:
        self.batch = validate.positive("batch", batch)
        self.max_len = validate.positive("max_len", max_len)
        device = validate.device("device", device)
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as in tensors
        self.length = 0  # of the longest row
        self.lengths: Int[Tensor, "B"] | None = None  # of every row, where they differ

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that hold content. (``lengths``, 8 bytes per row, is not counted.)"""

    @property
    def nbytes(self) -> int:
        """Bytes really allocated for content; each storage counts once."""
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self.tensors())}
        return sum(storages.values())

    def positions(self, n_tokens: int) -> Int[Tensor, "#B T"]:
        """Positions of the next ``n_tokens`` tokens, from 0: (1, T), or (B, T) if rows differ."""
        if self.lengths is None:
            return torch.arange(self.length, self.length + n_tokens, device=self.device)[None]
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.device)

    def check_room(self, n_tokens: int) -> None:
        """Raise ValueError if ``n_tokens`` more would exceed ``max_len``; called before writing."""
        if self.length + n_tokens > self.max_len:
            raise ValueError(
                f"cache: expected at most max_len={self.max_len} tokens, got {self.length} and {n_tokens} new"
            )

    def advance(self, n_tokens: int) -> None:
        """Count ``n_tokens`` more in every row; called after writing."""
        self.check_room(n_tokens)
        self.length += n_tokens
        if self.lengths is not None:
            self.lengths = self.lengths + n_tokens

    def trim(self, lengths: Int[Tensor, "B"]) -> None:
        """Remove each row's tokens past its new length: right padding, or tokens that were rejected.

        Raises ValueError for lengths that the rows never had, and where ``can_trim`` is False.
        """
        lengths = self.check_lengths(lengths)
        self.length = int(lengths.max())
        self.lengths = None if bool((lengths == self.length).all()) else lengths

    def check_lengths(self, lengths: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """A copy of ``lengths`` for ``trim``, if the rows can be trimmed to these."""
        if not self.can_trim:
            raise ValueError(
                f"cache: a {type(self).__name__} cannot forget what it has seen, not even "
                "padding: feed prompts of different lengths each with a cache of its own"
            )
        validate.integers("lengths", validate.tensor("lengths", lengths, (self.batch,)))
        lengths = lengths.to(self.device, torch.int64, copy=True)
        current = torch.full_like(lengths, self.length) if self.lengths is None else self.lengths
        if (lengths < 0).any() or (lengths > current).any():
            raise ValueError(
                f"lengths: expected 0 to {current.tolist()} in every row, got {lengths.tolist()}"
            )
        return lengths

    def reset(self) -> None:
        """Empty the cache; its memory stays allocated."""
        self.length, self.lengths = 0, None
        for t in self.tensors():
            t.zero_()

    def check_writer(self, layer: "Mechanism") -> None:
        """Raise ValueError if another layer than ``layer`` has written the tokens in it."""
        if self.length and self.writer is not None and self.writer() is not layer:
            raise ValueError(
                "cache: expected one that this layer alone has used, got one that holds another layer's "
                "tokens; each layer needs its own, by new_cache"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "writer"}


@dataclass(frozen=True)
class KV:
    """Keys and values that new tokens attend to, and the positions of these tokens: ``k, v, positions = kv``.

    Slot s holds the key at position ``slot_positions[..., s]``, -1 where it is empty; with None it holds
    position s. A layer passes these to another that reads them in place of its own (cross-layer sharing).
    """

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S Dv"]
    positions: Int[Tensor, "#B T"]
    slot_positions: Int[Tensor, "#B S"] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.k, self.v, self.positions))

    @property
    def key_positions(self) -> Int[Tensor, "#B S"]:
        """``slot_positions``, written out where slot s holds position s."""
        if self.slot_positions is not None:
            return self.slot_positions
        return torch.arange(self.k.shape[2], device=self.k.device)[None]


class KVCache(Cache):
    """Keys and values of all tokens so far, in memory that is allocated once; slot s holds position s.

    Values are as wide as keys, ``head_dim``, unless ``v_head_dim`` is given.
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__(batch, max_len, device)
        validate.floating("dtype", dtype)
        n_heads, head_dim = validate.positive("n_heads", n_heads), validate.positive("head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else validate.positive("v_head_dim", v_head_dim)
        # Zeros, since a masked slot has weight 0, and 0 · NaN would be NaN.
        self.k = torch.zeros(self.batch, n_heads, self.max_len, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*self.k.shape[:3], v_head_dim, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T Dv"]) -> KV:
        """Write new keys and values after the old ones; return views of all of them, never a copy."""
        for name, new, buffer in (("k", k, self.k), ("v", v, self.v)):
            validate.tensor(name, new, ("batch", "KV heads", "time", "width"), device=self.device)
            validate.tensor(name, new, (self.batch, buffer.shape[1], k.shape[2], buffer.shape[3]))
        self.check_room(k.shape[2])
        positions = self.positions(k.shape[2])
        for buffer, new in ((self.k, k), (self.v, v)):
            if self.lengths is None:
                buffer.narrow(2, self.length, k.shape[2]).copy_(new.detach())
            else:
                new = new.detach().to(buffer.dtype)
                buffer.scatter_(2, positions[:, None, :, None].expand(new.shape), new)
        self.advance(k.shape[2])
        return KV(self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length), positions)


class NoCache(Cache):
    """The cache of a layer that reads another layer's: it holds nothing, and its ``length`` stays 0."""

    def tensors(self) -> list[Tensor]:
        return []


# One token per row over its cache: q (B, H, D), keys and values (B, G, S, D), lengths (B,) int32 ->
# (B, H, D); for example kvlearn.kernels.decode_attention.
DecodeStep = Callable[..., Tensor]


def decode_step(
    decode: DecodeStep, q: Float[Tensor, "B H 1 D"], kv: KV, **options: Any
) -> Float[Tensor, "B H 1 D"]:
    """Attention of one token per row by ``decode``, over the first slots of each row, those in use."""
    lengths = (kv.positions[:, 0] + 1).clamp_max(kv.k.shape[2]).expand(len(q)).to(torch.int32)
    return decode(q[:, :, 0], kv.k, kv.v, lengths, **options).unsqueeze(2)


class Mechanism(nn.Module, ABC):
    """A layer that mixes tokens causally.

    Every constructor takes ``d_model`` and ``n_heads``, then its own options; among them, if they apply,
    ``head_dim`` (d_model / n_heads unless given) and ``rope`` (None: no positions). Raises ValueError or
    TypeError that names the argument.

    ``torch.compile(fullgraph=True)`` captures a training pass as one graph, and a step of one token with a
    cache as one graph for all lengths, after one for the first length; a ring that becomes full and a block
    that a step completes have graphs of their own. Prompts are fed uncompiled: to which slots of a ring many
    tokens go depends on values.
    """

    name: str  # in the registry
    chooses_by_content = False  # True if the output jumps where the selected pools or tokens change
    auxiliary_parameters: tuple[str, ...] = ()  # used for selection only: the output has no gradient for them
    no_weight_decay: tuple[str, ...] = ()  # matrices excluded from weight decay
    forms: tuple[str, ...] = ()  # of a recurrence: the forms in which it can be computed (recurrent.py)
    form = ""  # the form for more than one token
    state_shapes: Mapping[str, tuple[int, ...]] | None = None  # of a recurrence, once a cache has been used

    def __init__(self, d_model: int, n_heads: int, head_dim: int | None) -> None:
        super().__init__()
        self.d_model = validate.positive("d_model", d_model)
        if head_dim is None:
            head_dim = d_model // validate.divides("n_heads", n_heads, "d_model", d_model)
        self.n_heads = validate.positive("n_heads", n_heads)
        self.head_dim = validate.positive("head_dim", head_dim)

    @property
    def label(self) -> str:
        """The layer's name in a table: its name in the registry, or the names of its parts."""
        return self.name

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        """The layer's output for the new tokens ``x``, which continue the sequence in ``cache``.

        ``source`` holds another layer's keys and values, read in place of this layer's own; ``cache`` is then
        not changed.
        """

    def __call__(self, x: Tensor, cache: Cache | None = None, source: KV | None = None) -> Tensor:
        """``forward``; with a cache no gradient is computed, since a cache is written in place."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            y = super().__call__(x, cache, source)
        if cache is not None:
            cache.writer = weakref.ref(self)
        return y

    @abstractmethod
    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """``forward(x)`` written again from the paper: fp32, and a bare loop over time.

        It shares only the weights with ``forward``, so that no error can be in both.
        """

    @abstractmethod
    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """An empty cache for up to ``max_len`` tokens; dtype and device are the weights' unless given."""

    @abstractmethod
    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """STORED: bytes that a cache for ``max_len`` tokens allocates, by the formula on paper."""

    @abstractmethod
    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """READ: bytes of cache that one decode step reads when ``length`` tokens are in it."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> "Mechanism":
        """A small instance for the contract tests."""

    @classmethod
    def tiny_at_limit(cls) -> "tuple[Mechanism, Mechanism] | None":
        """A small instance at the setting where it must equal full attention, and that full attention.

        The two hold the same weights. None where there is no such setting.
        """
        return None

    def project_kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        """Keys and values of ``x``, appended to ``cache``; another layer may read them as its ``source``."""
        raise TypeError(
            f"source: a layer of kind {self.name!r} has no keys and values that another could read"
        )

    def initialise(self) -> None:
        """Set the weights that have an initialisation of their own; a model calls this last."""

    def dtype_and_device(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> tuple[torch.dtype, torch.device]:
        """The given dtype and device, or else those of the weights."""
        weight = first_weight(self)
        assert weight is not None
        return (
            weight.dtype if dtype is None else validate.floating("dtype", dtype),
            weight.device if device is None else validate.device("device", device),
        )

    def to_bytes(self, numbers: int, batch: int, dtype: torch.dtype | None) -> int:
        """Bytes of ``numbers`` cached per row, in ``dtype`` or in the weights' dtype."""
        return validate.positive("batch", batch) * numbers * self.dtype_and_device(dtype)[0].itemsize

    def check_inputs(
        self, x: Tensor, cache: Cache | None, kind: type[Cache], source: KV | None = None
    ) -> None:
        """Check shape, dtype and device of ``x``, and that ``cache`` is of this mechanism's ``kind``.

        Raises TypeError if ``source`` is given: a mechanism that can read one calls ``check_source``.
        """
        if source is not None:
            raise TypeError(f"source: a layer of kind {self.name!r} reads no other layer's keys and values")
        dtype, device = self.dtype_and_device()
        validate.tensor("x", x, ("batch", "time", self.d_model), dtype=dtype, device=device)
        validate.at_least("x.shape[0] (batch)", x.shape[0], 1)
        validate.at_least("x.shape[1] (time)", x.shape[1], 1)
        if cache is None:
            return
        validate.instance("cache", cache, kind)
        cache.check_writer(self)
        if cache.batch != len(x):
            raise ValueError(f"x: expected the cache's batch of {cache.batch}, got {len(x)}")
        if cache.device != device:
            raise ValueError(f"cache: expected device {device}, got {cache.device}")

    def check_source(
        self, x: Tensor, cache: Cache | None, kind: type[Cache], source: KV | None, n_kv_heads: int
    ) -> KV:
        """``source``, if its keys and values fit this layer's heads and the tokens ``x``."""
        self.check_inputs(x, cache, kind)
        kv: KV = validate.instance("source", source, KV)
        validate.tensor("source.k", kv.k, (len(x), n_kv_heads, "tokens", self.head_dim), device=x.device)
        validate.tensor("source.v", kv.v, tuple(kv.k.shape), device=x.device)
        validate.tensor("source.positions", kv.positions, ("1 or batch", x.shape[1]))
        if kv.slot_positions is not None:
            validate.tensor("source.slot_positions", kv.slot_positions, ("1 or batch", kv.k.shape[2]))
        return kv


def first_weight(module: nn.Module) -> Tensor | None:
    """``next(module.parameters())`` without its bookkeeping, which takes longer than a small layer's step."""
    for weight in module._parameters.values():
        if weight is not None:
            return weight
    found = (first_weight(child) for child in module._modules.values() if child is not None)
    return next((weight for weight in found if weight is not None), None)


def token_positions(x: Float[Tensor, "B T M"], cache: Cache | None) -> Int[Tensor, "#B T"]:
    """Positions of the tokens ``x``: from 0, or after the tokens in ``cache``."""
    return torch.arange(x.shape[1], device=x.device)[None] if cache is None else cache.positions(x.shape[1])


M = TypeVar("M", bound=type[Mechanism])
REGISTRY: dict[str, type[Mechanism]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a mechanism known as ``name`` to tests, models, results and the command line."""

    def add(mechanism: M) -> M:
        if name in REGISTRY:
            raise ValueError(f"name: {name!r} is registered already, by {REGISTRY[name].__name__}")
        REGISTRY[name] = mechanism
        mechanism.name = name
        return mechanism

    return add
