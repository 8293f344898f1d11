"""One case, several implementations: each is checked against fp64, then all are timed interleaved.

``Setup`` is where a benchmark runs: the device with its timer, its tensors, and the rates measured on it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.bench.common import in_short
from kvlearn.bench.decode.cases import TOLERANCE, Arena, Case, Inputs, error, numbers
from kvlearn.kernels.decode import decode_attention, decode_latent
from kvlearn.kernels.inputs import Request, split_scale
from kvlearn.kernels.launch import Workspace, launch, tiling_for
from kvlearn.kernels.tiling import Tiling
from kvlearn.measure.results import Row
from kvlearn.measure.timers import CudaTimer, Prepared, Timer, time_interleaved
from kvlearn.measure.timing import Comparison
from kvlearn.measure.units import GIB, MIB, format_bytes_decimal

SHARE = 0.6  # of the card's memory: larger cases are skipped and named
SPARE = 12 * GIB  # for exact results, graphs and what libraries allocate
COLD = 5  # times the L2 that the inputs of one graph must exceed
MOST_COPIES = 640
MOST_SPLITS, MOST_PARTIAL_BYTES = 512, 512 * MIB  # of partial results
OWN = "own"  # the kernel under test, in recorded rows

Prepare = Callable[[Case, Inputs], Callable[[], Tensor]]


class Unavailable(RuntimeError):
    """An implementation that does not take part in this case, and why."""


# Where it runs


@dataclass
class Setup:
    """``memory`` and ``l2`` in bytes; ``backend`` as ``decode_attention`` takes it.

    ``read``, ``peak``: bytes/s and FLOP/s, measured before all else (0 until then).
    """

    device: torch.device
    timer: Timer
    arena: Arena
    memory: int
    l2: int
    backend: str = "triton"
    read: float = 0.0
    peak: float = 0.0

    def fits(self, case: Case) -> bool:
        """Whether the case's cache stays within its share of the memory."""
        return case.stored <= SHARE * self.memory and numbers(case) <= self.arena.buffer.numel()

    def floor(self, case: Case) -> float:
        """Seconds below which no kernel comes, launch aside: max(bytes / bandwidth, FLOPs / peak)."""
        return max(case.nbytes / self.read, case.flops / self.peak if self.peak else 0.0)


def cuda_setup(device: torch.device) -> Setup:
    """This GPU; takes 60 % of its memory at once, so that no case waits for an allocation."""
    properties = torch.cuda.get_device_properties(device)
    l2 = int(properties.L2_cache_size) or 64 * MIB
    free, _ = torch.cuda.mem_get_info(device)
    nbytes = int(min(SHARE * properties.total_memory, max(free - SPARE, free // 2)))
    timer = CudaTimer(device, l2)
    return Setup(device, timer, Arena(nbytes // 256 * 128, device), properties.total_memory, l2)


# Implementations


@dataclass(frozen=True)
class Implementation:
    """In which case it is measured, and how a call is made of its inputs."""

    case: Case
    prepare: Prepare
    tolerance: float = TOLERANCE


def kernel_under_test(
    setup: Setup,
    case: Case,
    tolerance: float = TOLERANCE,
    *,
    num_splits: int | None = None,
    tiling: Tiling | None = None,
) -> Implementation:
    """``decode_attention``, or ``decode_latent`` for a latent; with a ``tiling`` the launch beneath them.

    A call allocates nothing, and its result is filled with NaN beforehand.
    """
    shared: dict[str, Any] = {}  # all copies write to one result: the graph runs them one after the other

    def prepare(case: Case, x: Inputs) -> Callable[[], Tensor]:
        if setup.backend == "triton" and not shared:
            shared["out"] = torch.full_like(x.q, torch.nan)
            shared["workspace"] = new_workspace(case, x.q.device)
        if tiling is not None:
            return partial(tiled, request(case, x), tiling, num_splits, **shared)
        options: dict[str, Any] = {**shared, "scale": case.scale, "num_splits": num_splits}
        options |= {"backend": setup.backend, "window": case.window, "n_sinks": case.n_sinks}
        options |= {"block_table": x.table, "validate": False}
        if x.q_rope is not None:
            latent: Callable[..., Any] = decode_latent
            return partial(latent, x.q, x.q_rope, x.k, x.lengths, **options)
        options |= {"k_scale": x.k_scale, "v_scale": x.v_scale}
        attention: Callable[..., Any] = decode_attention
        return partial(attention, x.q, x.k, x.v, x.lengths, **options)

    return Implementation(case, prepare, tolerance)


def new_workspace(case: Case, device: torch.device) -> Workspace:
    """Room for as many splits as are of any use."""
    per_split = case.batch * case.n_heads * case.head_dim * 4
    splits = max(1, min(MOST_SPLITS, MOST_PARTIAL_BYTES // per_split))
    return Workspace.new(case.batch, case.n_heads, case.head_dim, splits, device)


def request(case: Case, x: Inputs) -> Request:
    """The case as the launch takes it."""
    k, v = (x.k[:, None], None) if x.q_rope is not None else (x.k, x.v)
    scales = split_scale("k_scale", x.k_scale, x.k)[1], split_scale("v_scale", x.v_scale, x.v)[1]
    return Request(
        *(x.q, x.q_rope, k, v, x.lengths, case.scale, case.window, case.n_sinks, None, x.table, *scales)
    )


def tiled(
    wanted: Request, tiling: Tiling, num_splits: int | None, *, out: Tensor, workspace: Workspace
) -> Tensor:
    """One step with this tiling."""
    lse = workspace.lse[: wanted.batch * wanted.n_heads].view(wanted.batch, wanted.n_heads)
    launch(wanted, out, lse, num_splits, workspace, tiling)
    return out


def present_tiling(case: Case, x: Inputs) -> Tiling:
    """The kernel's own choice for this case."""
    return tiling_for(request(case, x))


# The comparison


@dataclass
class Compared:
    """Times of the implementations that gave the right result, and why the others have none.

    ``unavailable``: could not take part; ``failed``: raised or gave a wrong result. ``errors``: against fp64.
    """

    implementations: Mapping[str, Implementation]
    comparison: Comparison
    copies: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def time_row(self, name: str, title: str = "", **extra: Any) -> Row:
        """Seconds per call in a CUDA graph with a cold L2; ``extra`` are a bar, or details."""
        case, time = self.implementations[name].case, self.comparison.time(name)
        bar = {key: extra.pop(key) for key in ("bar", "relation") if key in extra}
        details = {
            **case.details,
            "what": "time",
            "stage": name,
            "how": "graph",
            "bandwidth": case.nbytes / time.median,
            "rate": case.flops / time.median,
            "error": self.errors[name],
            "copies": self.copies[name],
            **extra,
        }
        return Row(f"{case.name}: {title or name}", time.median, "s", spread=time, details=details, **bar)

    def ratio_row(self, name: str, base: str, *, of: str = "", **bar: Any) -> Row:
        """How many times as long ``name`` takes as ``base``; ``of`` is whose case is recorded (``base``)."""
        case, ratio = self.implementations[of or base].case, self.comparison.ratio(name, base)
        details = {**case.details, "what": "ratio", "stage": base, "against": name}
        return Row(f"{case.name}: {name} / {base}", ratio.median, "x", spread=ratio, details=details, **bar)

    def missing_rows(self) -> Iterator[Row]:
        """Who has no time in a case, and why; one row for all that give the same reason."""
        for what, reasons in (("unavailable", self.unavailable), ("missing", self.failed)):
            alike: dict[tuple[Case, str], list[str]] = {}
            for name, why in reasons.items():
                alike.setdefault((self.implementations[name].case, why), []).append(name)
            for (case, why), names in alike.items():
                details = {**case.details, "what": what, "names": names}
                title = f"{case.name}: {', '.join(names)}"
                yield Row(title, float("nan"), "s", details=details, missing=why)


def compare_implementations(setup: Setup, implementations: Mapping[str, Implementation]) -> Compared:
    """Check and time the implementations; those of the same case get the very same inputs."""
    inputs: dict[Case, list[Inputs]] = {}
    compared = Compared(implementations, Comparison({}))
    prepared: dict[str, Prepared] = {}
    for name, implementation in implementations.items():
        case = implementation.case
        try:
            if case not in inputs:
                if not setup.fits(case):
                    raise Unavailable(too_large(case))
                count = setup.arena.copies(case, COLD * setup.l2, MOST_COPIES)
                inputs[case] = setup.arena.inputs(case, count)
            calls = [implementation.prepare(case, x) for x in inputs[case]]
            off = error(case, inputs[case][0], calls[0]())
            if not off <= implementation.tolerance:  # NaN is wrong too
                raise ArithmeticError(f"wrong by {off:.2g}, expected at most {implementation.tolerance}")
            prepared[name] = setup.timer.prepare(calls)
            compared.errors[name], compared.copies[name] = off, len(calls)
            compared.calls[name] = calls[0]
        except Unavailable as why:
            compared.unavailable[name] = str(why)
        except Exception as problem:
            compared.failed[name] = in_short(problem)
    if prepared:
        compared.comparison = time_interleaved(prepared)
    return compared


def too_large(case: Case) -> str:
    """Why a case is skipped."""
    return f"skipped, a cache of {format_bytes_decimal(case.stored)} is above {SHARE:.0%} of the memory"


def unavailable(title: str, why: str, **details: Any) -> Row:
    """Something that this machine cannot measure, as a row: nothing is silently missing."""
    return Row(title, float("nan"), "s", details={"what": "unavailable", **details}, missing=why)
