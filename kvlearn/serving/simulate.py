"""The pool's accounts for a million requests: the same blocks, tables and hashes, without a model.

A mix of requests is a recipe: every number in it and a seed. Conversations of several tenants start with one
of a few system prompts; each turn's prompt is the whole conversation so far.
"""

import heapq
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvlearn import validate
from kvlearn.serving.blocks import BlockPool, BlockTable, OutOfBlocks, Tenant, blocks_for

MOST = 1e6  # of a mean length, and of requests per second


@dataclass(frozen=True)
class Mix:
    """A recipe for requests. Lengths are in tokens, means of exponential distributions unless said otherwise.

    Tenant i sends a share of 1/i of the requests. A share ``public`` of the conversations starts with one of
    ``n_public`` system prompts that all tenants use, the others with the tenant's own. After an answer the
    conversation goes on with probability ``goes_on``, at a later time. ``rate`` is in requests per second; a
    request stays for ``seconds_per_token`` for each of its new tokens.
    """

    seed: int = 0
    n_tenants: int = 8
    n_public: int = 4
    public: float = 0.5
    system_prompt: int = 256  # all of one length
    question: int = 48
    answer: int = 96
    goes_on: float = 0.6
    max_len: int = 1024
    rate: float = 20.0
    seconds_per_token: float = 0.02

    def __post_init__(self) -> None:
        validate.fields_at_least(self, seed=0, n_tenants=1, n_public=1, system_prompt=0, max_len=2)
        for name in ("question", "answer", "rate"):
            if validate.above(name, getattr(self, name), 0) > MOST:
                raise ValueError(f"{name}: expected at most {MOST:g}, got {getattr(self, name)}")
        for name in ("public", "goes_on"):
            if not 0 <= validate.finite(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if validate.finite("seconds_per_token", self.seconds_per_token) < 0:
            raise ValueError(f"seconds_per_token: expected at least 0, got {self.seconds_per_token}")

    def requests(self, n: int) -> Iterator[tuple[float, int, list[int], list[int]]]:
        """``n`` requests in the order of arrival: seconds, number of the tenant, prompt, answer."""
        rng, now = random.Random(int(self.seed)), 0.0
        system = [self._text(rng, self.system_prompt) for _ in range(self.n_public + self.n_tenants)]
        weights = [1 / (i + 1) for i in range(self.n_tenants)]
        talks: list[list[list[int]]] = [[] for _ in range(self.n_tenants)]  # that go on
        for _ in range(n):
            now += rng.expovariate(self.rate)
            (tenant,) = rng.choices(range(self.n_tenants), weights)
            if talks[tenant] and rng.random() < self.goes_on:
                prompt = talks[tenant].pop(rng.randrange(len(talks[tenant])))
            else:
                common = rng.random() < self.public
                which = rng.randrange(self.n_public) if common else self.n_public + tenant
                prompt = system[which].copy()
            prompt += self._text(rng, 1 + int(rng.expovariate(1 / self.question)))
            prompt = prompt[: self.max_len - 1]
            answer = self._text(rng, 1 + int(rng.expovariate(1 / self.answer)))[: self.max_len - len(prompt)]
            yield now, tenant, prompt, answer
            talk = prompt + answer
            if len(talk) < self.max_len - self.question and rng.random() < self.goes_on:
                talks[tenant].append(talk)

    @staticmethod
    def _text(rng: random.Random, n: int) -> list[int]:
        return list(rng.randbytes(n))


Sharing = Literal["none", "all", "salts", "quotas"]


@dataclass(frozen=True)
class Report:
    """Statistics of a pool under a mix of requests. Shares are 0 to 1; means are over the arrivals."""

    requests: int
    hit_rate: float  # of the prompts' tokens, those found cached
    waited: float  # share of requests for which no blocks were left when they arrived
    evicted: int
    blocks: float  # mean blocks in use, a shared one once
    peak: int
    unshared: float  # mean blocks if every request had its own
    waste: float  # share of the tokens' places in these that are empty
    waste_contiguous: float  # the same if every request has max_len places
    seconds: float


def simulate(mix: Mix, n_requests: int, n_blocks: int, page: int = 16, sharing: Sharing = "all") -> Report:
    """Block accounting of ``n_requests`` of ``mix``.

    ``sharing``: "none", between "all" tenants, with "salts" within each tenant only, or with "quotas" too, an
    equal share of the pool for each. A request takes the blocks of its prompt and of its answer when it
    starts, waits until there are enough, and keeps them until its last token.
    """
    validate.instance("mix", mix, Mix)
    validate.one_of("sharing", sharing, ("none", "all", "salts", "quotas"))
    n_requests = validate.positive("n_requests", n_requests)
    n_blocks, page = validate.positive("n_blocks", n_blocks), validate.positive("page", page)
    quota = n_blocks // mix.n_tenants if sharing == "quotas" else None
    salted = sharing in ("salts", "quotas")
    names = [str(i) for i in range(mix.n_tenants)]
    tenants = [Tenant(name, name.encode() if salted else b"", quota) for name in names]
    name, most = ("n_blocks", n_blocks) if quota is None else ("n_blocks // n_tenants", quota)
    validate.at_least(name, most, blocks_for(mix.max_len, page))
    pool = BlockPool(n_blocks, page, tenants, share=sharing != "none")
    running: list[tuple[float, int, BlockTable]] = []  # by the time at which they end
    start, prompts, hits, waited = time.perf_counter(), 0, 0, 0
    in_use, unshared, filled, places, peak = 0, 0, 0, 0, 0
    held_blocks, held_tokens = 0, 0  # of the running ones, shared ones as often as they are held

    def end_first() -> float:
        nonlocal held_blocks, held_tokens
        ended, _, table = heapq.heappop(running)
        held_blocks -= len(table.blocks)
        held_tokens -= table.length
        pool.close(table)
        return ended

    clock = 0.0
    for number, (arrival, tenant, prompt, answer) in enumerate(mix.requests(n_requests)):
        clock = max(clock, arrival)
        while running and running[0][0] <= clock:
            end_first()
        table, late = pool.open(names[tenant]), False
        while True:
            found = pool.match(table, prompt)
            try:
                pool.reserve(table, len(prompt) + len(answer) - found)
                break
            except OutOfBlocks:
                pool.close(table)
                late, clock = True, end_first()
        waited += late
        pool.commit(table, prompt[found:] + answer)
        heapq.heappush(running, (clock + len(answer) * mix.seconds_per_token, number, table))
        held_blocks += len(table.blocks)
        held_tokens += table.length
        prompts, hits = prompts + len(prompt), hits + found
        in_use += pool.in_use
        peak = max(peak, pool.in_use)
        unshared += held_blocks
        filled += held_tokens
        places += len(running) * mix.max_len
    seconds = time.perf_counter() - start
    return Report(
        requests=n_requests,
        hit_rate=hits / prompts,
        waited=waited / n_requests,
        evicted=pool.counts.evicted,
        blocks=in_use / n_requests,
        peak=peak,
        unshared=unshared / n_requests,
        waste=1 - filled / (unshared * page),
        waste_contiguous=1 - filled / places,
        seconds=seconds,
    )
