"""One layer of every mechanism, with the shape of a released model, on this machine.

    bytes     stored (allocated), and read, written and computed by one decode step (operators are watched)
    decode    seconds of one step over the length of the context, batch 1, and how they grow
    prefill   seconds of a whole prompt into an empty cache; time to first token, with the cache allocated
              first; the most memory that the prompt needs beside the cache
    batch     the most sequences whose caches, with one step's memory, fit in a given memory
    machine   read bandwidth, peak, cost of a call, rates of attention: what ``roofline`` predicts from

Bytes are those of 16-bit weights and caches. Times are of fp32 on a CPU, as few CPUs multiply 16-bit numbers
fast, and of bf16 on a GPU. A step is timed cold: a large buffer is read before it, as the other layers of a
model would be, so that nothing of the layer lies in an on-chip cache. Caches are filled with random numbers.

Each part ends with a row "part" that says how long it took. A later run of the same command keeps the rows of
finished parts of this machine, preset and number of threads, and measures the rest; rows that were measured
with another number of threads stay. Where ``SECONDS`` are not enough, the next run measures what is left.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from kvlearn.attention import REGISTRY, Cache, Mechanism, SlotCache
from kvlearn.bench.common import Part
from kvlearn.measure.growth import fit_exponent
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Recorded, Row
from kvlearn.measure.roofline import (
    Machine,
    Roofline,
    attention_rate,
    call_seconds,
    matmul_peak,
    matrix_bandwidth,
    read_bandwidth,
)
from kvlearn.measure.timing import Quartiles
from kvlearn.measure.touched import Touched, touched
from kvlearn.measure.units import GIB, MIB, format_bytes


@dataclass(frozen=True)
class Case:
    """One layer: a name in the registry, its constructor's arguments, and the model that has this shape."""

    mechanism: str
    model: str
    d_model: int
    n_heads: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.mechanism}, {self.model}"

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Mechanism:
        """The layer, with random weights."""
        with torch.device(device):
            layer = REGISTRY[self.mechanism](self.d_model, self.n_heads, **self.options)
        return layer.to(dtype).eval()


_LLAMA = {"head_dim": 128}
_LATENT = {"head_dim": 128, "v_head_dim": 128, "rank": 512, "rope_dim": 64}
_V4 = {"head_dim": 512, "q_rank": 1024}

# Widths, heads, ranks and convolutions as in the published configurations (config.json, or the defaults of
# transformers for that model); GLA and DeltaNet as in fla-hub's gla-1.3B-100B and delta_net-1.3B-100B; RetNet
# and NSA as in their papers (RetNet: heads of 256 for keys and 512 for values), which released no weights of
# this size; MoBA's blocks as in the paper's model of 8B. Two layers differ from their models: NSA (below),
# and DeepSeek-V4's, whose output projection is of low rank in two steps; ours is one matrix, so it reads more
# weights.
CASES = (
    Case("full", "Llama 3.1 8B without shared heads", 4096, 32, _LLAMA),
    Case("gqa", "Llama 3.1 8B", 4096, 32, {**_LLAMA, "n_kv_heads": 8}),
    Case("window", "Mistral 7B v0.1", 4096, 32, {**_LLAMA, "n_kv_heads": 8, "window": 4096}),
    Case("mla", "DeepSeek-V2-Lite", 2048, 16, _LATENT),
    Case("mla", "DeepSeek-V3", 7168, 128, {**_LATENT, "q_rank": 1536}),
    Case("mamba", "Mamba-2.8B", 2560, 1),
    Case("gated_delta", "Qwen3-Next", 2048, 32, {"head_dim": 128, "n_key_heads": 16}),
    Case(
        "released", "Qwen3-Next", 2048, 16, {"head_dim": 256, "n_kv_heads": 2, "rotary_dim": 64, "gate": True}
    ),
    Case("dsa", "DeepSeek-V3.2", 7168, 128, {**_LATENT, "q_rank": 1536, "index_dim": 128}),
    Case("csa", "DeepSeek-V4-Flash", 4096, 64, _V4),
    Case("hca", "DeepSeek-V4-Flash", 4096, 64, _V4),
    Case("kda", "Kimi Linear 48B", 2304, 32, {"head_dim": 128}),
    Case("mamba2", "Mamba-2 2.7B", 2560, 80, {"head_dim": 64}),
    Case("rwkv7", "RWKV-7 2.9B", 2560, 40, {"head_dim": 64}),
    Case("rwkv4", "RWKV-4 3B", 2560, 40),
    Case("rwkv4_channel", "RWKV-4 3B", 2560, 40),
    Case("gated_conv", "LFM2 1.2B", 2048, 32),
    Case("moba", "Llama 3.1 8B", 4096, 32, {**_LLAMA, "n_kv_heads": 8, "block": 4096, "n_blocks": 12}),
    # NSA's 27B model has keys of 192 and values of 128; ours has one width.
    Case(
        "nsa",
        "NSA 27B, heads of 128",
        2560,
        64,
        {**_LLAMA, "n_kv_heads": 4, "compress": 32, "stride": 16, "block": 64, "n_blocks": 16, "window": 512},
    ),
    Case("retention", "RetNet 6.7B", 4096, 16, {"key_dim": 256, "head_dim": 512}),
    Case("gla", "GLA 1.3B", 2048, 4, {"key_dim": 256, "head_dim": 512}),
    Case("delta", "DeltaNet 1.3B", 2048, 16, {"head_dim": 128}),
    # No released decoder has these: the widths of Llama 3.1 8B.
    Case("sparse", "widths of Llama 3.1 8B", 4096, 32, {**_LLAMA, "n_kv_heads": 8}),
    Case("routed", "widths of Llama 3.1 8B", 4096, 32, {**_LLAMA, "n_kv_heads": 8}),
    Case("token_routed", "widths of Llama 3.1 8B", 4096, 32, {**_LLAMA, "n_kv_heads": 8}),
    Case("mhc", "widths of Llama 3.1 8B", 4096, 32, {**_LLAMA, "rope_dim": 64}),
    Case("mhc_transformer", "widths of Llama 3.1 8B", 4096, 32, {**_LLAMA, "rope_dim": 64}),
    Case("linear", "widths of Llama 3.1 8B", 4096, 32, _LLAMA),
    Case("short_conv", "widths of Llama 3.1 8B", 4096, 32),
    Case("parallel", "widths of Llama 3.1 8B", 4096, 32, _LLAMA),
)
SECONDS = 600.0  # no part is begun later; the next run goes on from there
FIRST = 8  # cases that come first: those that chapter 12 compares

LATENT = ("mla", "dsa", "csa", "hca", "mhc", "mhc_transformer")
RECURRENT = (*(name for name, kind in REGISTRY.items() if kind.forms), "rwkv4_channel", "parallel")
SMALL_CASES = tuple(
    Case(name, "small", 512, 8, {"n_kv_heads": 2} if name in ("gqa", "window", "moba", "sparse") else {})
    for name in dict.fromkeys(case.mechanism for case in CASES)
)


@dataclass(frozen=True)
class Sizes:
    """The preset that is measured."""

    name: str
    cases: Sequence[Case]
    lengths: Sequence[int] = (1024, 4096, 16_384, 32_768, 65_536, 131_072)  # of decode
    prompts: Sequence[int] = (1024, 2048, 4096)
    context: int = 32_768  # of the batch that fits
    memory: int = GIB  # that the batch must fit in
    rounds: int = 5
    slowest: float = 2.0  # seconds of a prompt, and of two steps: longer ones are left out
    flushed: int = 128 * MIB  # bytes read before each timed call
    largest: float = 0.3  # of the memory that is free: no larger cache is allocated


REAL = Sizes("real", CASES)
SMALL = Sizes(
    "small",
    SMALL_CASES,
    lengths=(1024, 2048, 4096, 8192, 16_384, 32_768),
    prompts=(512, 1024, 2048),
    context=4096,
    memory=64 * MIB,
    rounds=15,
    slowest=0.5,
    flushed=64 * MIB,
)


def parts(device: torch.device, small: bool = False, known: Iterable[Mapping[str, Any]] = ()) -> list[Part]:
    """The parts of this benchmark; those that ``known`` holds finished give the rows recorded there."""
    return parts_of(SMALL if small else REAL, device, known)


def parts_of(sizes: Sizes, device: torch.device, known: Iterable[Mapping[str, Any]] = ()) -> list[Part]:
    """The parts of a preset: machine, then every kind of the first cases, then of the others.

    Those that ``known`` holds finished come before all others: they take no time, and so none is left out
    where the seconds do not suffice.
    """
    measured: dict[str, Callable[[], Iterator[Row]]] = {"machine": partial(machine_rows, sizes, device)}
    for cases in (sizes.cases[:FIRST], sizes.cases[FIRST:]):
        for kind, rows in KINDS.items():
            for case in cases:
                measured[f"{kind}: {case.name}"] = partial(rows, case, sizes, device)
    condition = condition_of(sizes, device)
    ours = [row for row in known if all(row.get(key) == value for key, value in condition.items())]
    finished = {row.get("part") for row in ours if row.get("what") == "part"}
    names = sorted(measured, key=lambda name: name not in finished)
    return [Part(name, partial(once, name, measured[name], condition, ours)) for name in names]


def condition_of(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The values that must agree before rows are compared: preset, threads, and the dtype of the times."""
    return {
        "preset": sizes.name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype_of(device)).removeprefix("torch."),
    }


def dtype_of(device: torch.device) -> torch.dtype:
    """In which the times are measured."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def once(
    part: str,
    rows: Callable[[], Iterator[Row]],
    condition: Mapping[str, Any],
    known: Sequence[Mapping[str, Any]],
) -> Iterator[Row]:
    """The rows of a part: those of an earlier run that finished it in the same condition, or new ones."""
    wanted = {**condition, "part": part}
    found = [row for row in known if all(row.get(key) == value for key, value in wanted.items())]
    if any(row["what"] == "part" for row in found):
        yield from map(Row.of, found)
        return
    start = time.monotonic()
    for row in rows():
        yield with_details(row, wanted)
    took = Row(f"{part}: took", time.monotonic() - start, "s", details={"what": "part"})
    yield with_details(took, wanted)


def with_details(row: Row, more: Mapping[str, Any]) -> Row:
    """``row`` with more details."""
    return replace(row, details={**row.details, **more})


def others(
    known: Iterable[Mapping[str, Any]],
    device: torch.device,
    small: bool = False,
    chosen: Iterable[str] | None = None,
) -> list[Mapping[str, Any]]:
    """Rows of ``known`` that a run of the parts ``chosen`` (all, unless given) does not give again.

    They are of another condition, or of another part; a new record keeps them. Rows of missing
    parts are dropped.
    """
    condition = condition_of(SMALL if small else REAL, device)
    names = None if chosen is None else set(chosen)

    def ours(row: Mapping[str, Any]) -> bool:
        same = all(row.get(key) == value for key, value in condition.items())
        return same and (names is None or row.get("part") in names)

    return [row for row in known if row.get("what") != "missing" and not ours(row)]


# The machine


def machine_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Bandwidth, peak and the cost of a call, with the threads of this run."""
    dtype = dtype_of(device)
    yield Row("read bandwidth", read_bandwidth(device), "B/s", details={"what": "read_bandwidth"})
    matrices = matrix_bandwidth(device, dtype, sizes.flushed)
    yield Row("a matrix times one row", matrices, "B/s", details={"what": "matrix_bandwidth"})
    yield Row("matrix products", matmul_peak(device, dtype), "FLOP/s", details={"what": "peak"})
    yield Row("call of an operator", call_seconds(device), "s", details={"what": "call"})
    for rows, heads, width in dict.fromkeys(filter(None, map(heads_of, sizes.cases))):
        rate = attention_rate(rows, heads, width, device, dtype, nbytes=sizes.flushed // 2)
        title = f"attention, {rows} queries for each of {heads} KV heads of {width}"
        shape = {"rows": rows, "kv_heads": heads, "width": width}
        yield Row(title, rate, "FLOP/s", details={"what": "attention_rate", **shape})


def heads_of(case: Case) -> tuple[int, int, int] | None:
    """Query rows per KV head, KV heads, and their width, of attention over a cache; None for a recurrence.

    A latent is one KV head for all query heads.
    """
    options = case.options
    if case.mechanism in RECURRENT:
        return None
    if case.mechanism in LATENT:
        layer = case.build(torch.bfloat16, "meta")
        rank, rope_dim = (int(getattr(layer, name, 0)) for name in ("rank", "rope_dim"))
        return case.n_heads, 1, rank + rope_dim if rank else layer.head_dim
    heads = options.get("n_kv_heads", 1 if case.mechanism == "gqa" else case.n_heads)
    return case.n_heads // heads, heads, options.get("head_dim", case.d_model // case.n_heads)


def machine_of(rows: Iterable[Mapping[str, Any]]) -> Machine:
    """The machine that recorded ``rows`` of one condition. Raises ValueError that names what is missing."""
    rows = [row for row in rows if row.get("part") == "machine" and row["measured"] is not None]
    found = {row["what"]: row["measured"] for row in rows}
    for what in ("read_bandwidth", "matrix_bandwidth", "peak", "call"):
        if what not in found:
            raise ValueError(f"rows: expected a measured row {what!r} of part 'machine', got none")
    rates = {
        (r["rows"], r["kv_heads"], r["width"]): r["measured"] for r in rows if r["what"] == "attention_rate"
    }
    reached = found["matrix_bandwidth"] / found["read_bandwidth"]
    return Machine(Roofline(found["peak"], found["read_bandwidth"]), found["call"], reached, rates)


def conditions(
    found: Iterable[Recorded], preset: str = "real"
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Recorded rows by machine and number of threads, and what was left out, with its reason.

    Rows of decode have their prediction, as "predicted". Left out are rows of another preset (silently), and,
    each with a line in the second result: files of an older form, rows from a tree with uncommitted changes,
    rows of several machines under one name, and conditions without the machine's own numbers.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    left_out: list[str] = []
    for recorded in found:
        named: dict[str, list[dict[str, Any]]] = {}
        for row in recorded.rows:
            if row.get("what") == "missing":
                continue
            if not {"part", "preset", "threads", "dtype", "what"} <= set(row):
                left_out.append(f"{recorded.path.name}: rows of an older form")
            elif row["preset"] == preset:
                threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
                named.setdefault(f"{recorded.provenance['machine']}, {threads}", []).append(row)
        for name, rows in named.items():
            sources = [row.get("provenance", recorded.provenance) for row in rows]
            if any(source["dirty"] for source in sources):
                left_out.append(f"{name}: measured with uncommitted changes")
            elif len({source["machine"] for source in sources}) > 1:
                left_out.append(f"{name}: rows of several machines")
            else:
                try:
                    groups[name] = with_predictions(rows)
                except ValueError as error:
                    left_out.append(f"{name}: {error}")
    return groups, list(dict.fromkeys(left_out))


def with_predictions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one condition, those of decode with their prediction. Raises as ``machine_of`` does."""
    machine = machine_of(rows)
    timed = [row["what"] == "decode_time" and row["measured"] is not None for row in rows]
    return [
        {**row, "predicted": predicted(row, machine)} if decode else dict(row)
        for row, decode in zip(rows, timed, strict=True)
    ]


def predicted(
    row: Mapping[str, Any], machine: Machine, cases: Iterable[Case] = (*CASES, *SMALL_CASES)
) -> float:
    """Seconds of a recorded row of decode, by the model of ``Machine.step_seconds``.

    Raises ValueError for a layer that this version does not measure.
    """
    layer = {key: row[key] for key in ("mechanism", "model")}
    found = [case for case in cases if of(case) == layer]
    if not found:
        raise ValueError(f"row: expected a layer of CASES, got {layer['mechanism']}, {layer['model']}")
    case = found[0]
    return machine.step_seconds(
        row["weights"],
        row["cache"],
        row["attention"],
        row["calls"],
        heads_of(case),
        row["stream"],
    )


# Bytes


@torch.no_grad()
def bytes_rows(case: Case, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Stored, and touched by one step, at each length, in 16 bit; beside them the formulas on paper.

    A step at each length really runs.
    """
    layer = case.build(torch.bfloat16, device)
    weights = [*layer.parameters()]
    stored = sum(w.numel() * w.element_size() for w in weights)
    yield _row(case, "weights", stored, "B")
    for n in sizes.lengths:
        if reason := too_large(layer, n, sizes, device):
            yield _row(case, "stored", reason, "B", n)
            continue
        cache = layer.new_cache(batch=1, max_len=n)
        formula = layer.cache_bytes(n)
        yield _row(case, "stored", cache.nbytes, "B", n, formula=formula)
        if layer.chooses_by_content:  # else zeros are read as random numbers are
            fill(cache)
        place(cache, n - 1)
        x = torch.randn(1, 1, layer.d_model, dtype=torch.bfloat16, device=device)
        found = touched(partial(layer, x, cache), cache.tensors(), weights)
        yield _row(
            case,
            "read",
            found.cache_read,
            "B",
            n,
            formula=layer.read_bytes(n),
            written=found.cache_written,
            **work_of(found, torch.bfloat16),
        )


# Time


@torch.no_grad()
def decode_rows(case: Case, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One step at each length, all lengths interleaved, and the exponent of the longest four."""
    dtype = dtype_of(device)
    layer = case.build(dtype, device)
    lengths = [n for n in sizes.lengths if not too_large(layer, n, sizes, device)]
    if not lengths:
        yield _row(case, "decode_time", too_large(layer, sizes.lengths[0], sizes, device), "s")
        return
    cache = layer.new_cache(batch=1, max_len=lengths[-1])
    fill(cache)
    x = torch.randn(1, 1, layer.d_model, dtype=dtype, device=device)
    flush = flusher(sizes, device)
    weights, streams = [*layer.parameters()], []

    def step(n: int) -> float:
        place(cache, n - 1)
        streams.append(seconds(flush, device))
        return seconds(lambda: layer(x, cache), device)

    works = {}
    for n in lengths:
        place(cache, n - 1)
        works[n] = touched(lambda: layer(x, cache), cache.tensors(), weights)  # it warms up, too
        if step(n) > sizes.slowest / 2:
            lengths = lengths[: lengths.index(n) + 1]
            break
    times: dict[int, list[float]] = {n: [] for n in lengths}
    for _ in range(sizes.rounds):
        for n in lengths:
            times[n].append(step(n))
    stream = sizes.flushed / Quartiles.of(streams).median
    for n in sizes.lengths:
        if n not in times:
            reason = too_large(layer, n, sizes, device) or f"a shorter one took over {sizes.slowest / 2:g} s"
            yield _row(case, "decode_time", reason, "s", n)
            continue
        work = work_of(works[n], dtype)
        yield _row(case, "decode_time", Quartiles.of(times[n]), "s", n, stream=stream, **work)
    yield from exponent_rows(case, "decode", times)


def work_of(found: Touched, dtype: torch.dtype) -> dict[str, int]:
    """The inputs of ``Machine.step_seconds``; ``attention``: FLOPs without those of the weights."""
    return {
        "weights": found.weights_read,
        "cache": found.cache_read + found.cache_written,
        "other": found.other,
        "attention": max(0, found.flops - 2 * found.weights_read // dtype.itemsize),
        "calls": found.calls,
    }


@torch.no_grad()
def prefill_rows(case: Case, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A whole prompt: into a cache that is there, and with the cache allocated first; memory beside it."""
    dtype = dtype_of(device)
    layer = case.build(dtype, device)
    times: dict[int, list[float]] = {}
    peaks: dict[int, int] = {}
    last = 0.0
    for n in sizes.prompts:
        if 2.5 * last > sizes.slowest:
            yield _row(case, "prefill_time", f"about {2.5 * last:.0f} s or more", "s", n)
            continue
        x = torch.randn(1, n, layer.d_model, dtype=dtype, device=device)

        def first_token(x: Tensor = x, n: int = n) -> Tensor:
            return layer(x, layer.new_cache(batch=1, max_len=n))[:, -1]

        def prefill(x: Tensor = x, n: int = n) -> float:
            cache = layer.new_cache(batch=1, max_len=n)
            for buffer in cache.tensors():
                buffer.zero_()  # touches every page
            return seconds(lambda: layer(x, cache), device)

        last = prefill()
        rounds = 1 if last > sizes.slowest / 4 else 3
        times[n] = [prefill() for _ in range(rounds)]
        firsts = [seconds(first_token, device) for _ in range(rounds)]
        peaks[n] = peak_memory(first_token, device) - layer.cache_bytes(n)
        yield _row(case, "prefill_time", Quartiles.of(times[n]), "s", n)
        yield _row(case, "first_token_time", Quartiles.of(firsts), "s", n)
        yield _row(case, "prefill_memory", peaks[n], "B", n)
    yield from exponent_rows(case, "prefill", times)
    yield from exponent_rows(
        case, "prefill_memory", {n: [float(peak)] for n, peak in peaks.items()}, unit="B"
    )


def exponent_rows(
    case: Case, what: str, values: Mapping[int, Sequence[float]], unit: str = "s"
) -> Iterator[Row]:
    """The exponent over the longest four lengths, with its error; none for fewer than three lengths."""
    lengths = sorted(values)[-4:]
    if len(lengths) < 3 or min(min(values[n]) for n in lengths) <= 0:
        return
    spreads = [Quartiles.of(values[n]) for n in lengths]
    # The standard error of a median, from the quartiles: 1.2533 · (q3 - q1) / 1.349 / √n.
    errors = [0.929 * (s.q3 - s.q1) / s.n**0.5 for s in spreads]
    fit = fit_exponent(lengths, [s.median for s in spreads], errors)
    details = {"what": f"{what}_exponent", "error": fit.error, "first": fit.first, "last": fit.last}
    yield Row(f"{case.name}: {what} grows as N^", fit.value, "", details={**details, **of(case)})


# The batch that fits


@torch.no_grad()
def batch_rows(case: Case, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The largest batch at ``sizes.context`` tokens in ``sizes.memory`` bytes, 16-bit, beside the weights."""
    layer = case.build(torch.bfloat16, device)
    n = sizes.context

    def needs(batch: int) -> int:
        """Bytes of the caches and of what one step allocates: both really are allocated."""
        cache = layer.new_cache(batch=batch, max_len=n)
        place(cache, n - 1)
        x = torch.zeros(batch, 1, layer.d_model, dtype=torch.bfloat16, device=device)
        return cache.nbytes + peak_memory(lambda: layer(x, cache), device)

    batch = largest(needs, sizes.memory)
    at = {"context": n, "memory": sizes.memory, "predicted": sizes.memory // layer.cache_bytes(n)}
    found = _row(case, "batch", batch, "sequences", n)
    yield with_details(found, at)


def largest(needs: Callable[[int], int], memory: int) -> int:
    """The most for which ``needs`` is at most ``memory``, if it grows with its argument; 0 if 1 is too many.

    Exact below 256; above, it fits, and a 256th more does not: each try really allocates. The caller's
    ``needs`` may raise ``torch.OutOfMemoryError``: that does not fit either.
    """

    def fits(batch: int) -> bool:
        try:
            return needs(batch) <= memory
        except torch.OutOfMemoryError:
            return False

    if not fits(1):
        return 0
    each = max(1, needs(2) - needs(1))
    guess = max(1, 1 + (memory - needs(1)) // each)
    low, high = 1, guess + 1
    if fits(guess):
        low, step = guess, max(1, guess // 64)
        while fits(low + step):
            low, step = low + step, 2 * step
        high = low + step
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


KINDS: dict[str, Callable[[Case, Sizes, torch.device], Iterator[Row]]] = {
    "decode": decode_rows,
    "bytes": bytes_rows,
    "batch": batch_rows,
    "prefill": prefill_rows,
}


# Caches that hold a text without its prefill


def fill(cache: Cache) -> None:
    """Random numbers in all buffers: one block of them, repeated, which is as fast as memory is."""
    for buffer in cache.tensors():
        flat = buffer.view(-1)
        if not len(flat):
            continue
        block = torch.randn(min(len(flat), 1_000_003), dtype=flat.dtype, device=flat.device) * 0.1
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])


def place(cache: Cache, length: int) -> None:
    """Let ``cache``, and the caches in it, hold ``length`` tokens; the numbers stay as they are."""
    cache.length = length
    if isinstance(cache, SlotCache):
        positions = torch.arange(length, device=cache.device)[None]
        empty = torch.full((1, cache.n_slots), -1, device=cache.device)
        cache.slot_positions = empty.scatter_reduce(1, cache.slots(positions), positions, "amax")
    for value in vars(cache).values():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, Cache):
                place(child, length)


def too_large(layer: Mechanism, length: int, sizes: Sizes, device: torch.device) -> str:
    """Why a cache of so many tokens is not allocated; empty where it is."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    stored = layer.cache_bytes(length)
    if stored <= sizes.largest * free:
        return ""
    return f"a cache of {format_bytes(stored)} beside {format_bytes(free)} of free memory"


def flusher(sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """A function that reads so much that nothing else is left in an on-chip cache."""
    buffer = torch.ones(sizes.flushed // 4, device=device)
    return buffer.sum


def seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Of one call, as inference runs it; on CUDA from an idle device until it is idle again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def of(case: Case) -> dict[str, Any]:
    """The keys by which a case's rows are found."""
    return {"mechanism": case.mechanism, "model": case.model}


def _row(
    case: Case,
    what: str,
    measured: float | Quartiles | str,
    unit: str,
    length: int | None = None,
    **more: Any,
) -> Row:
    """A row of a case: a number, quartiles, or why there is none."""
    title = f"{case.name}: {what.replace('_', ' ')}" + ("" if length is None else f", {length:,} tokens")
    details = {"what": what, **of(case), **({} if length is None else {"length": length}), **more}
    if isinstance(measured, str):
        return Row(title, float("nan"), unit, details=details, missing=measured)
    if isinstance(measured, Quartiles):
        return Row(title, measured.median, unit, spread=measured, details=details)
    return Row(title, measured, unit, details=details)
