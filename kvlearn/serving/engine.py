"""Continuous batching: in every step each request gets its next token, or a chunk of its prompt is computed.

A request waits until its prompt fits, runs, and leaves its place in the batch as soon as it is done; the next
one takes it in the same step. The cache grows block by block. When no block is left, the request that came
last gives up its blocks and waits again ("preemption by recomputation"); its generated tokens are kept.

Letters beside those of core.py: V tokens of the vocabulary.

Sources: Yu et al., "Orca" (2022), section 3 (scheduling per iteration); Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention" (2023), section 4.5 (preemption); Agrawal et
al., "Sarathi-Serve" (2024), section 4 (chunked prefill beside decode).
"""

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.model import Decoder
from kvlearn.model.decoder import Block
from kvlearn.model.generation import sample
from kvlearn.serving.blocks import (
    BlockPool,
    BlockTable,
    HashFunction,
    OutOfBlocks,
    Tenant,
    blocks_for,
    sha256,
)
from kvlearn.serving.layers import Batch, paged_layer


@dataclass(eq=False)
class Request:
    """A prompt that is continued by up to ``n_new`` tokens; greedily at ``temperature`` 0.

    ``tokens`` are the prompt and what was generated so far; ``table`` has those whose keys and values are
    cached. ``cached`` counts the tokens of the prompt that other requests had computed.
    """

    number: int
    tenant: str
    tokens: list[int]
    n_prompt: int
    n_new: int
    temperature: float
    generator: torch.Generator
    table: BlockTable
    cached: int = 0
    done: bool = False

    @property
    def generated(self) -> list[int]:
        """The new tokens so far."""
        return self.tokens[self.n_prompt :]

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not cached yet: one in decode, more before the first new token."""
        return len(self.tokens) - self.table.length


@dataclass
class Engine:
    """Serves ``model`` to many requests from ``n_blocks`` blocks of ``page`` tokens.

    At most ``max_batch`` requests run, and a step computes at most ``budget`` tokens; with a budget of at
    least ``max_batch`` every request that decodes gets its token in every step. ``tenants``, ``share`` and
    ``hash_function`` are those of ``BlockPool``. Layers: full, gqa, window, mla. A model whose layers all
    have windows releases the blocks that are behind the largest one.

    Raises ValueError for a layer that cannot be paged.
    """

    model: Decoder
    n_blocks: int
    page: int = 16
    tenants: Sequence[Tenant] = (Tenant("default"),)
    max_batch: int = 32
    budget: int = 64
    share: bool = True
    hash_function: HashFunction = sha256
    waiting: list[Request] = field(default_factory=list, init=False)
    running: list[Request] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        validate.instance("model", self.model, Decoder)
        validate.fields_at_least(self, n_blocks=1, page=1, max_batch=1)
        validate.fields_at_least(self, budget=self.max_batch)
        mixers, weight = self.model.mixers, self.model.embed.weight
        self.layers = [paged_layer(i, mixer, self.page) for i, mixer in enumerate(mixers)]
        widths = [math.prod(layer.shape) for layer in self.layers]
        data = torch.zeros(self.n_blocks, sum(widths), dtype=weight.dtype, device=weight.device)
        self.pages = [
            part.unflatten(1, layer.shape)  # a view
            for part, layer in zip(data.split(widths, dim=1), self.layers, strict=True)
        ]
        self.pool = BlockPool(
            self.n_blocks,
            self.page,
            self.tenants,
            data=data,
            share=self.share,
            hash_function=self.hash_function,
        )
        windows = [layer.window for layer in self.layers]
        self.window = None if None in windows else max(window or 0 for window in windows)
        self._numbers = count()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all blocks."""
        assert self.pool.data is not None
        return self.pool.data.nbytes

    # Methods for users

    def submit(
        self,
        prompt: Sequence[int],
        n_new: int,
        *,
        tenant: str = "default",
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Request:
        """Put a request into the queue.

        Raises OutOfBlocks if its tokens would not fit even alone (all of them, also those that a window would
        release); requests that would have to wait are accepted.
        """
        validate.positive("len(prompt)", len(validate.instance("prompt", prompt, Sequence)))
        if validate.finite("temperature", temperature) < 0:
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}")
        tokens = [validate.at_least("prompt", token, 0) for token in prompt]
        vocabulary = self.model.config.vocab_size
        validate.at_most("prompt", max(tokens), vocabulary - 1, f"vocab_size={vocabulary}")
        n_new = validate.positive("n_new", n_new)
        needed = blocks_for(len(tokens) + n_new - 1, self.page)
        table = self.pool.open(tenant)
        if needed > self.pool.limit(tenant):
            raise OutOfBlocks(
                f"n_new: expected a sequence of at most {self.pool.limit(tenant)} blocks of {self.page} "
                f"tokens, got {len(tokens)} + {n_new} tokens"
            )
        seed = validate.at_most("seed", validate.at_least("seed", seed, -(2**63)), 2**64 - 1, "64 bits")
        device = self.model.embed.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        request = Request(
            number=next(self._numbers),
            tenant=tenant,
            tokens=tokens,
            n_prompt=len(tokens),
            n_new=n_new,
            temperature=temperature,
            generator=generator,
            table=table,
        )
        self.waiting.append(request)
        return request

    def fork(self, request: Request, *, seed: int) -> Request:
        """A second continuation of a running request from here on, with its own random numbers.

        It shares the request's blocks and runs at once, even if the batch is full. Raises ValueError for a
        request that is not running.
        """
        if request not in self.running:
            raise ValueError("request: expected one that is running")
        other = Request(**vars(request))
        other.number, other.tokens = next(self._numbers), request.tokens.copy()
        other.generator = torch.Generator(request.generator.device).manual_seed(seed)
        other.table = self.pool.fork(request.table)
        self.running.append(other)
        return other

    def cancel(self, request: Request) -> None:
        """End a request that waits or runs, and release its blocks. One that is done stays as it is.

        Raises ValueError for a request of another engine.
        """
        if request.done:
            return
        for place in (self.waiting, self.running):
            if request in place:
                place.remove(request)
                break
        else:
            raise ValueError("request: expected one that waits or runs in this engine")
        self.pool.close(request.table)
        request.done = True

    def run(self) -> None:
        """Steps until every request is done."""
        while self.waiting or self.running:
            self.step()

    # A step

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Compute one batch; the requests that got a token."""
        self._admit()
        work = self._plan()
        if not work:
            return []
        logits = self.forward([(r.table, r.tokens[r.table.length :][:n]) for r, n in work])
        updated = []
        for i, (request, n) in enumerate(work):
            if request.done:
                continue  # cancelled while it was computed
            complete, length = request.pending == n, request.table.length
            if complete:  # before anything changes, so that a step that fails here can be repeated
                token = int(sample(logits[i : i + 1], request.temperature, 1.0, request.generator))
            self.pool.commit(request.table, request.tokens[length : length + n])
            if self.window is not None:
                self.pool.drop(request.table, request.table.length + 1 - self.window)
            if not complete:
                continue  # more of the prompt follows
            request.tokens.append(token)
            updated.append(request)
            if len(request.generated) == request.n_new or token in self.model.config.stop_tokens:
                self.cancel(request)
        return updated

    def forward(self, work: Sequence[tuple[BlockTable, Sequence[int]]]) -> Float[Tensor, "n V"]:
        """Logits after the last new token of each sequence; keys and values of all new ones are cached.

        ``work``: tables with room for the tokens that follow, sequences of one new token first.
        """
        model = self.model
        batch = Batch.of(work, self.page, model.embed.weight.device)

        x = model.embed(batch.tokens)  # (1, N, M): the new tokens of all sequences
        x = model.embed_norm(x * torch.tensor(model.config.embed_scale, dtype=x.dtype))
        for block, layer, pages in zip(model.blocks, self.layers, self.pages, strict=True):
            assert isinstance(block, Block)
            x = x + block.mixer_post_norm(layer(block.mixer_norm(x), pages, batch))
            if block.mlp is not None:
                x = x + block.mlp_post_norm(block.mlp(block.mlp_norm(x)))
        return model.logits(model.norm(x[0, batch.last]))

    # The scheduler

    def _admit(self) -> None:
        """Let requests run in the order of their arrival, as long as there are places and blocks."""
        full: set[str] = set()  # whose next request has to wait, and so do those after it
        for request in self.waiting.copy():
            if len(self.running) >= self.max_batch:
                break
            whose = self._blocks_of(request)
            if whose in full:
                continue
            found = self._match(request)
            others = [r for r in self.running if self._blocks_of(r) == whose]
            if sum(map(self._missing, [*others, request])) > self.pool.available(request.tenant):
                self._release(request)
                self.pool.counts.hits -= found  # it makes no use of them now
                full.add(whose)
                continue
            self.waiting.remove(request)
            insort(self.running, request, key=lambda r: r.number)

    def _plan(self) -> list[tuple[Request, int]]:
        """The tokens of one step: one for each request in decode, then prompts with the rest of the budget.

        Room for it is reserved; requests that must give up their blocks for it are not in the list.
        """
        work, budget = list[tuple[Request, int]](), self.budget
        for request in sorted(self.running, key=lambda r: r.pending > 1):
            if budget == 0 or request not in self.running:
                continue
            self._match(request)
            n = min(request.pending, budget)
            if self._make_room(request, n):
                work.append((request, n))
                budget -= n
        kept = [(request, n) for request, n in work if request in self.running]
        return sorted(kept, key=lambda pair: pair[1] > 1)

    def _match(self, request: Request) -> int:
        """Take what is cached of the next tokens, also what others have computed since the last step."""
        found = self.pool.match(request.table, request.tokens)
        if not request.generated:
            request.cached += found
        return found

    def _make_room(self, request: Request, n_tokens: int) -> bool:
        """Reserve blocks; the last of those that use the same blocks gives up its own until there are enough.

        False if that is ``request`` itself.
        """
        while True:
            try:
                self.pool.reserve(request.table, n_tokens)
                return True
            except OutOfBlocks:
                same = [r for r in self.running if self._blocks_of(r) == self._blocks_of(request)]
                self._preempt(same[-1])
                if same[-1] is request:
                    return False

    def _release(self, request: Request) -> None:
        """Take its blocks back; the cached part of its prompt will be counted when it is found again."""
        self.pool.close(request.table)
        if not request.generated:
            request.cached = 0

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self.running.remove(request)
        insort(self.waiting, request, key=lambda r: r.number)

    def _missing(self, request: Request) -> int:
        """Blocks that the request needs for its pending tokens and has not reserved yet."""
        return max(blocks_for(len(request.tokens), self.page) - len(request.table.blocks), 0)

    def _blocks_of(self, request: Request) -> str:
        """Whose blocks the request uses: its tenant's own, or the common ones."""
        return request.tenant if self.pool.has_quotas else ""
