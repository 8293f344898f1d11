"""Many users: memory, hit rates and the pool's accounts; tokens per second and time to the first token.

The accounts are those of a recipe of requests (kvlearn.serving.Mix, with its seed in every row). Tokens are
those of the committed base model, in fp32. Arrivals of the Poisson load are on a clock that runs with the
engine's steps and skips the time in which nobody waits. Neither the leak nor the accounts depend on the
device.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kvlearn.model
from kvlearn.bench.common import Part, ratio_row, time_row
from kvlearn.measure.results import Row
from kvlearn.measure.timing import Quartiles, interleaved
from kvlearn.model import Decoder, load
from kvlearn.serving import BlockPool, Engine, Mix, Request, attack, noise, response_times, simulate

BLOCK_SECONDS = 1.0  # for the allocation and the release of N_BLOCKS blocks, at most
BATCH_BAR = 2.0  # continuous batching against one request at a time, at least
LEAK_SECONDS = 60.0  # for all trials of an attack, at most


@dataclass(frozen=True)
class Sizes:
    """How many requests, and of which lengths."""

    accounts: int = 20_000  # requests of the recipe
    million: int = 1_000_000  # the same at scale
    n_blocks: int = 4096  # of the accounts
    pool: int = 100_000  # blocks that are allocated and released
    users: int = 32
    requests: int = 96  # three for each user
    prompt: int = 64  # the longest; the shortest is a quarter
    n_new: int = 64
    system_prompt: int = 384
    rounds: int = 3
    arrivals: int = 200
    trials: int = 20  # of an attack
    samples: int = 30  # response times of a hit and of a miss


SIZES = Sizes()
SMALL = Sizes(
    accounts=200,
    million=300,
    n_blocks=1024,
    pool=1000,
    users=4,
    requests=8,
    prompt=12,
    n_new=4,
    system_prompt=32,
    rounds=2,
    arrivals=6,
    trials=1,
    samples=2,
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark, on ``device``."""
    sizes = SMALL if small else SIZES
    return [
        Part("blocks", lambda: block_rows(sizes)),
        Part("accounts", lambda: account_rows(sizes.accounts, sizes)),
        Part("batching", lambda: batching_rows(sizes, device)),
        Part("sharing", lambda: sharing_rows(sizes, device)),
        Part("first token", lambda: first_token_rows(sizes, device)),
        Part("leak", lambda: leak_rows(sizes, device)),
        Part("noise", lambda: noise_rows(sizes, device)),
        Part("million", lambda: account_rows(sizes.million, sizes)),
    ]


def base(device: torch.device) -> Decoder:
    """The committed base model."""
    return load(Path(kvlearn.model.__file__).with_name("base.safetensors"), device).requires_grad_(False)


# The pool


def block_rows(sizes: Sizes) -> Iterator[Row]:
    """All blocks of a pool given to sequences of 64 blocks, and taken back."""
    per_table = 64

    def once() -> float:
        pool = BlockPool(sizes.pool, 16, share=False)
        start = time.perf_counter()
        tables = [pool.open("default") for _ in range(sizes.pool // per_table)]
        for table in tables:
            pool.reserve(table, per_table * 16)
        for table in tables:
            pool.close(table)
        return time.perf_counter() - start

    times = Quartiles.of([once() for _ in range(max(3, sizes.rounds))])
    found = {"what": "block_time", "n_blocks": sizes.pool}
    title = f"{sizes.pool} blocks allocated and freed"
    yield Row(title, times.median, "s", BLOCK_SECONDS, "<=", times, found)
    rate = sizes.pool / times.median
    yield Row("blocks per second", rate, "blocks/s", details={**found, "what": "block_rate"})


def account_rows(n_requests: int, sizes: Sizes) -> Iterator[Row]:
    """Hit rates, blocks and waste of one recipe, shared between all tenants and isolated in two ways."""
    mix = Mix()
    for sharing in ("none", "all", "salts", "quotas"):
        report = simulate(mix, n_requests, sizes.n_blocks, sharing=sharing)
        found = {"sharing": sharing, "requests": n_requests, "n_blocks": sizes.n_blocks, "mix": asdict(mix)}
        title = f"{n_requests} requests, sharing: {sharing}"

        def row(what: str, text: str, value: float, unit: str, title=title, found=found) -> Row:  # type: ignore[no-untyped-def]
            return Row(f"{title}: {text}", value, unit, details={"what": what, **found})

        yield row("hit_rate", "prompt tokens found cached", report.hit_rate, "x")
        yield row("blocks", "blocks in use, mean", report.blocks, "blocks")
        yield row("peak", "blocks in use, most", report.peak, "blocks")
        yield row("evicted", "blocks evicted", report.evicted, "blocks")
        yield row("waited", "requests that had to wait", report.waited, "x")
        yield row("seconds", "time of the simulation", report.seconds, "s")
        if sharing == "none":
            yield row("waste", "memory wasted in blocks", report.waste, "x")
            contiguous = report.waste_contiguous
            yield row("waste_contiguous", "wasted with max_len places for each", contiguous, "x")


# Tokens per second


def text_prompts(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of differing lengths, a quarter of ``longest`` at least, from this package's own sources."""
    rng, source = random.Random(seed), Path(kvlearn.model.__file__).with_name("decoder.py").read_bytes()
    prompts = []
    for _ in range(n):
        length = rng.randint(max(longest // 4, 1), longest)
        start = rng.randrange(len(source) - length)
        prompts.append(list(source[start : start + length]))
    return prompts


def work_of(sizes: Sizes) -> list[tuple[list[int], int]]:
    """Prompts and numbers of new tokens, from a quarter of the longest to the longest."""
    rng = random.Random(1)
    prompts = text_prompts(sizes.requests, sizes.prompt)
    return [(prompt, rng.randint(max(sizes.n_new // 4, 1), sizes.n_new)) for prompt in prompts]


def new_engine(model: Decoder, sizes: Sizes, **options: Any) -> Engine:
    """An engine with room for all users at once."""
    room = sizes.users * (sizes.system_prompt + sizes.prompt + sizes.n_new) // 16
    options = {"max_batch": sizes.users, "budget": 4 * sizes.users} | options
    return Engine(model, room + sizes.users, **options)


def served(engine: Engine, work: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """All of ``work`` submitted at once; the generated tokens."""
    requests = [engine.submit(prompt, n_new) for prompt, n_new in work]
    engine.run()
    return [request.generated for request in requests]


def batching_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The same requests continuously batched, in static batches, and one at a time."""
    model, work = base(device), work_of(sizes)
    n_tokens = sum(n_new for _, n_new in work)
    texts: dict[str, list[list[int]]] = {}

    def clock(name: str, run: Callable[[], list[list[int]]]) -> Callable[[], float]:
        def seconds() -> float:
            start = time.perf_counter()
            texts[name] = run()
            return time.perf_counter() - start

        return seconds

    def static() -> list[list[int]]:
        engine = new_engine(model, sizes, share=False)
        batches = [work[at : at + sizes.users] for at in range(0, len(work), sizes.users)]
        return [text for batch in batches for text in served(engine, batch)]

    clocks = {
        "continuous": clock("continuous", lambda: served(new_engine(model, sizes, share=False), work)),
        "static": clock("static", static),
        "one at a time": clock(
            "one at a time", lambda: served(new_engine(model, sizes, share=False, max_batch=1), work)
        ),
    }
    compared = interleaved(clocks, sizes.rounds)
    pairs = zip(texts["continuous"], texts["one at a time"], strict=True)
    same = sum(text == alone for text, alone in pairs)
    title = f"{len(work)} requests of {sizes.users} users"
    found = {"what": "batching_time", "users": sizes.users, "requests": len(work), "tokens": n_tokens}
    for name in clocks:
        yield time_row(compared, title, name, found)
        rate = n_tokens / compared.time(name).median
        details = {**found, "what": "batching_rate", "who": name}
        yield Row(f"{title}: {name}, new tokens", rate, "tokens/s", details=details)
    found["what"] = "batching_ratio"
    yield ratio_row(compared, title, "one at a time", "continuous", found, BATCH_BAR)
    yield ratio_row(compared, title, "static", "continuous", found)
    details = {**found, "what": "same_text"}
    yield Row(f"{title}: same text as alone", same / len(work), "x", 1.0, ">=", details=details)


def sharing_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Every user's prompt after the same long system prompt, with and without prefix sharing."""
    model = base(device)
    (system,) = text_prompts(1, sizes.system_prompt, seed=2)
    system = (system * 8)[: sizes.system_prompt]
    work = [(system + prompt, n_new) for prompt, n_new in work_of(sizes)[: sizes.users]]
    blocks: dict[str, int] = {}

    def clock(name: str, share: bool) -> Callable[[], float]:
        def seconds() -> float:
            engine = new_engine(model, sizes, share=share)
            for prompt, n_new in work:
                engine.submit(prompt, n_new)
            start, most = time.perf_counter(), 0
            while engine.waiting or engine.running:
                engine.step()
                most = max(most, engine.pool.in_use)
            blocks[name] = most
            return time.perf_counter() - start

        return seconds

    clocks = {"shared": clock("shared", True), "not shared": clock("not shared", False)}
    compared = interleaved(clocks, sizes.rounds)
    n_tokens = sum(n_new for _, n_new in work)
    title = f"{sizes.users} users after {sizes.system_prompt} common tokens"
    found = {"what": "sharing_time", "users": sizes.users, "system_prompt": sizes.system_prompt}
    for name in clocks:
        yield time_row(compared, title, name, found)
        details = {**found, "who": name}
        rate, most = n_tokens / compared.time(name).median, blocks[name]
        what = {"what": "sharing_rate"}
        yield Row(f"{title}: {name}, new tokens", rate, "tokens/s", details=details | what)
        what = {"what": "sharing_blocks"}
        yield Row(f"{title}: {name}, blocks in use, most", most, "blocks", details=details | what)
    found["what"] = "sharing_ratio"
    yield ratio_row(compared, title, "not shared", "shared", found)


def first_token_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Seconds from arrival to the first token at half of, and near, the load that the engine can carry."""
    model, work = base(device), work_of(sizes)
    start = time.perf_counter()
    served(new_engine(model, sizes, share=False), work)
    capacity = len(work) / (time.perf_counter() - start)  # requests per second
    for share in (0.5, 0.9):
        rate = share * capacity
        waits = sorted(poisson(new_engine(model, sizes, share=False), work, rate, sizes.arrivals))
        for percentile in (50, 99):
            wait = waits[min(len(waits) * percentile // 100, len(waits) - 1)]
            found = {"what": "first_token", "percentile": percentile, "load": share, "n": len(waits)}
            title = f"first token at {share:.0%} of the load that fits: {percentile} of 100 within"
            yield Row(title, wait, "s", details={**found, "rate": rate})


def poisson(
    engine: Engine, work: Sequence[tuple[list[int], int]], rate: float, n_arrivals: int, seed: int = 0
) -> list[float]:
    """Seconds from arrival to the first token of ``n_arrivals`` requests, ``rate`` per second in the mean."""
    rng, now, next_arrival = random.Random(seed), 0.0, 0.0
    waits: list[float] = []
    arrived: dict[Request, float] = {}
    n_left = n_arrivals
    while n_left or engine.waiting or engine.running:
        if not (engine.waiting or engine.running):
            now = max(now, next_arrival)
        while n_left and next_arrival <= now:
            prompt, n_new = work[n_left % len(work)]
            arrived[engine.submit(prompt, n_new)] = next_arrival
            next_arrival += rng.expovariate(rate)
            n_left -= 1
        start = time.perf_counter()
        updated = engine.step()
        now += time.perf_counter() - start
        waits += [now - arrived[request] for request in updated if len(request.generated) == 1]
    return waits


# The leak


def leak_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """How much of another tenant's prompt an attacker reads, by hits and by time, without and with a salt."""
    model = base(device)
    for channel in ("hits", "time"):
        for salted in (False, True):
            done = attack(model, channel, salted=salted, trials=sizes.trials)
            found = {"channel": channel, "salted": salted, **asdict(done)}
            title = f"attack by {channel}, {'salted' if salted else 'no salt'}"
            for what, value in (("fields", done.fields), ("prompts", done.prompts)):
                details = {**found, "what": f"leak_{what}"}
                yield Row(f"{title}: {what} recovered", value, "x", details=details)
            took = done.seconds * done.trials
            details = {**found, "what": "leak_time"}
            yield Row(f"{title}: {done.trials} trials", took, "s", LEAK_SECONDS, "<=", details=details)


def noise_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The success of the attack by time under random delays, after one answer and after many."""
    hits, misses = response_times(base(device), sizes.samples)
    for epsilon in (10.0, 1.0, 0.1):
        for probes in (1, 10, 100):
            left = noise(hits, misses, epsilon=epsilon, probes=probes, trials=20 * sizes.samples)
            found = {"epsilon": epsilon, "probes": probes, **asdict(left)}
            title = f"delays of ε = {epsilon:g} per answer"
            details = {**found, "what": "noise_success"}
            yield Row(f"{title}, {probes} answers: fields recovered", left.success, "x", details=details)
        ratio = left.delay / left.saved if left.saved else 0.0
        details = {**found, "what": "noise_delay"}
        yield Row(f"{title}: mean delay / what a hit saves", ratio, "x", details=details)
