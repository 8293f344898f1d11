"""One decode step of attention on a GPU: the Triton kernel against the floor, torch, and its own stages.

Bandwidth and launch cost come first, and every result is checked against fp64 before it is timed. Without a
GPU the PyTorch forms are measured on the processor, in under a minute.

    sizes        which cases are measured
    cases        shapes, tensors and exact result of one case
    comparison   implementations of one case, checked and timed
    rates        bandwidth, peak and launch cost of the device
    libraries    the baselines
    grid, features, tilings, cpu   the parts, with their bars
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from kvlearn.bench.common import Limit, Part
from kvlearn.bench.decode import cpu, features, grid, libraries, rates, tilings
from kvlearn.bench.decode.cases import tokens
from kvlearn.bench.decode.comparison import (
    OWN,
    Implementation,
    Setup,
    compare_implementations,
    cuda_setup,
    kernel_under_test,
    unavailable,
)
from kvlearn.bench.decode.grid import bandwidth_points
from kvlearn.bench.decode.sizes import SIZES, SMALL, Sizes
from kvlearn.measure.results import Row

__all__ = ["bandwidth_points", "gpu_parts", "parts", "tiling_parts"]

SECONDS, CPU_SECONDS = 510.0, 45.0  # for all parts, unless `--seconds` says less
NEEDS, CPU_NEEDS = 25.0, 10.0  # seconds that a part may need once it is begun, unless it says otherwise
FLEX_SECONDS, FLEX_NEEDS = 120.0, 60.0  # each shape is compiled anew
FLEX_BAR = 1.1
LIBRARY_NEEDS = 150.0

# (name, rows of a setup, its other arguments, needs=, limit=) -> Part
MakePart = Callable[..., Part]


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark: on a GPU all of it, the essential first."""
    sizes = SMALL if small else SIZES
    if device.type != "cuda":
        return cpu_parts(sizes)
    return gpu_parts(sizes, cache(lambda: cuda_setup(device)))


def part_maker(
    sizes: Sizes, new_setup: Callable[[], Setup], limit: Limit | None, needs: float = NEEDS
) -> MakePart:
    """Makes parts on one setup, which is made when the first part begins; ``--only`` may select any.

    Parts that need a bar find the bandwidth measured.
    """

    def ready() -> Setup:
        setup = new_setup()
        if not setup.read:
            list(rates.bandwidth_rows(setup, sizes.stream))
        return setup

    def make(name: str, rows: Callable[..., Iterator[Row]], *given: Any, **more: Any) -> Part:
        return Part(name, lambda: rows(ready(), *given), **{"needs": needs, "limit": limit, **more})

    return make


def gpu_parts(
    sizes: Sizes, new_setup: Callable[[], Setup], seconds: float = SECONDS, libraries_too: bool = True
) -> list[Part]:
    """Bandwidth, launch cost, grid, features, stages, then other libraries, within ``seconds`` in all."""
    limit = Limit(seconds)
    make = part_maker(sizes, new_setup, limit)
    made = [
        Part("bandwidth", lambda: rates.bandwidth_rows(new_setup(), sizes.stream), NEEDS, limit),
        make("peak of a matrix product", rates.peak_rows, sizes.product),
        make("cost of a launch", rates.launch_rows),
        *grid_parts(sizes, make),
        *feature_parts(sizes, make),
    ]
    if libraries_too:
        stages = [sizes.case(*place) for place in sizes.stages]
        made += [make(f"stages, {case.name}", grid.stage_rows, case) for case in stages]
        made += library_parts(sizes, make)
    return made


def grid_parts(sizes: Sizes, make: MakePart) -> list[Part]:
    """A part per case."""
    longest = max(sizes.lengths)
    return [make(case.name, grid.grid_rows, case, longest) for case in grid.grid_cases(sizes)]


def feature_parts(sizes: Sizes, make: MakePart) -> list[Part]:
    """A part per case and feature."""
    windowed = [sizes.case(*place, window=sizes.window, n_sinks=sizes.n_sinks) for place in sizes.windowed]
    paged = [sizes.case(*place) for place in sizes.paged]
    few = [sizes.case("MLA 16", *place) for place in sizes.few_heads]
    many = [sizes.case("MLA 128", *place) for place in sizes.many_heads]
    quantised = [sizes.case(*place) for place in sizes.quantised]
    ragged = [sizes.case(form, batch, n, others=others) for form, batch, n, others in sizes.ragged]
    return [
        *(make(case.name, features.windowed_rows, case) for case in windowed),
        *(make(f"paged, {case.name}", features.paged_rows, case) for case in paged),
        *(make(case.name, features.latent_few_heads_rows, case) for case in few),
        *(make(case.name, features.latent_many_heads_rows, case) for case in many),
        *(make(f"fp8 and int8, {case.name}", features.quantised_rows, case) for case in quantised),
        *(make(case.name, features.ragged_rows, case) for case in ragged),
    ]


def library_parts(sizes: Sizes, make: MakePart) -> list[Part]:
    """FlexAttention's decode path, a few cases; FlashInfer's and vLLM's kernels on pages of 16.

    One row for what is not installed.
    """
    flex, flex_limit = libraries.Flex(), Limit(FLEX_SECONDS)
    made = []
    for batch, length in sizes.flex:
        for form in grid.FORMS:
            case = sizes.case(form, batch, length)
            one = {libraries.FLEX: Implementation(case, flex)}
            name, bars = f"{libraries.FLEX}, {case.name}", {libraries.FLEX: FLEX_BAR}
            made.append(make(name, library_rows, one, bars, needs=FLEX_NEEDS, limit=flex_limit))
    installed = libraries.installed_libraries()
    for name in libraries.LIBRARIES:
        if name not in installed:
            row = unavailable(name, "not installed", stage=name)
            made.append(Part(name, partial(iter, [row])))
    for place in sizes.libraries if installed else ():
        case = sizes.case(*place, page=16)
        all_of = {name: Implementation(case, baseline) for name, baseline in installed.items()}
        no_bars = dict.fromkeys(all_of)
        made.append(make(f"libraries, {case.name}", library_rows, all_of, no_bars, needs=LIBRARY_NEEDS))
    return made


def library_rows(
    setup: Setup, baselines: dict[str, Implementation], bars: dict[str, float | None]
) -> Iterator[Row]:
    """The kernel and libraries in one case."""
    (case,) = {baseline.case for baseline in baselines.values()}
    compared = compare_implementations(setup, {OWN: kernel_under_test(setup, case), **baselines})
    yield from compared.missing_rows()
    yield from grid.baseline_rows(compared, bars)


def tiling_parts(
    sizes: Sizes, new_setup: Callable[[], Setup], seconds: float, per_form: float = tilings.SECONDS_PER_FORM
) -> list[Part]:
    """The splits first, which cost no compiling; then a part per form of the kernel."""
    limit = Limit(seconds)
    make = part_maker(sizes, new_setup, limit, needs=15)
    splits = [sizes.case(*place) for place in sizes.splits]
    return [
        *(make(f"splits, {case.name}", tilings.split_rows, case, sizes.split_counts) for case in splits),
        *(
            make(f"tiling, {case.name}", tilings.tiling_rows, case, sizes.choices, per_form, needs=per_form)
            for case in sizes.tilings
        ),
    ]


def cpu_parts(sizes: Sizes) -> list[Part]:
    """Windowed and latent; grouped heads against as many KV heads; torch's attention beside each."""
    limit = Limit(CPU_SECONDS)
    new_setup = cache(lambda: cpu.cpu_setup(sizes.cpu_bytes))
    make = part_maker(sizes, new_setup, limit, CPU_NEEDS)
    whole = cpu.plain(sizes, "GQA 32/4", *sizes.cpu_long)
    return [
        make("processor", cpu.machine_rows),
        make("window", cpu.windowed_rows, whole, sizes.cpu_window),
        make("latent", cpu.latent_rows, sizes, *sizes.cpu_long),
        *(make(f"heads, {b} x {tokens(n)}", cpu.shared_rows, sizes, b, n) for b, n in sizes.cpu),
    ]
