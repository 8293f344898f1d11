"""Prefixes of a recurrent model: snapshots of its state, each for prompts that start with all its tokens.

Keys and values belong to one token each, so that a prefix of any length can be shared, block by block. A
state is a sum over all tokens so far. None can be taken out of it: a prompt that differs in one token of a
prefix can use nothing of it. So a snapshot of the whole state is kept every few tokens, and costs as many
bytes there as at any other place.

Letters beside those of core.py: V tokens of the vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.recurrent import StateCache
from kvlearn.model import Decoder, DecoderCache


class StatePrefixes:
    """Up to ``room`` snapshots of ``model``'s state, taken every ``every`` tokens of prompts.

    Snapshots are found by a tenant's salt and the tokens themselves, not by a hash of them; the least
    recently used one is evicted. Raises ValueError for a layer whose cache is not a state.
    """

    def __init__(self, model: Decoder, every: int, room: int) -> None:
        self.model, self.every = model, validate.positive("every", every)
        self.room = validate.positive("room", room)
        self.snapshots: OrderedDict[tuple[bytes, tuple[int, ...]], list[Tensor]] = OrderedDict()
        for number, cache in enumerate(model.new_cache(1, 1, device="meta").layers):
            if not isinstance(cache, StateCache):
                name = model.mixers[number].name
                raise ValueError(f"layer {number} ({name}): expected a state, got a {type(cache).__name__}")

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return sum(part.nbytes for snapshot in self.snapshots.values() for part in snapshot)

    @torch.no_grad()
    def prefill(
        self, prompt: Sequence[int], max_len: int, salt: bytes = b""
    ) -> tuple[DecoderCache, Float[Tensor, "1 V"], int]:
        """A cache after ``prompt``, the logits of the next token, and how many tokens a snapshot had."""
        tokens = list(prompt)
        validate.positive("len(prompt)", len(tokens))
        cache = self.model.new_cache(1, validate.at_least("max_len", max_len, len(tokens)))
        cached = self._longest(tokens, salt)
        if cached:
            restore(cache, self.snapshots[salt, tuple(tokens[:cached])], cached)
        hidden, at = torch.empty(0), cached
        while at < len(tokens):
            stop = min(at - at % self.every + self.every, len(tokens))
            hidden = self.model.hidden(torch.tensor([tokens[at:stop]]), cache)
            at = stop
            if at % self.every == 0:
                self._keep((salt, tuple(tokens[:at])), cache)
        return cache, self.model.logits(hidden[:, -1]), cached

    def _longest(self, tokens: list[int], salt: bytes) -> int:
        """Tokens of the longest usable snapshot. The last token is computed: its logits are wanted."""
        for length in range((len(tokens) - 1) // self.every * self.every, 0, -self.every):
            key = (salt, tuple(tokens[:length]))
            if key in self.snapshots:
                self.snapshots.move_to_end(key)
                return length
        return 0

    def _keep(self, key: tuple[bytes, tuple[int, ...]], cache: DecoderCache) -> None:
        self.snapshots[key] = [part.clone() for layer in cache.layers for part in layer.tensors()]
        self.snapshots.move_to_end(key)
        if len(self.snapshots) > self.room:
            self.snapshots.popitem(last=False)


def restore(cache: DecoderCache, snapshot: Sequence[Tensor], n_tokens: int) -> None:
    """Bring an empty cache into the state of ``snapshot``, taken after ``n_tokens``."""
    parts = [part for layer in cache.layers for part in layer.tensors()]
    for part, kept in zip(parts, snapshot, strict=True):
        part.copy_(kept)
    for layer in cache.layers:
        layer.advance(n_tokens)
