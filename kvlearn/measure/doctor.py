"""``kvlearn doctor``: what this machine has, and what of the course will run how on it."""

import os
import platform
import shutil
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from kvlearn.measure.provenance import checkout, commit, cores, cpu_model, gpu, installed
from kvlearn.measure.roofline import read_bandwidth
from kvlearn.measure.units import GB, GIB, format_bytes, format_rate

Status = Literal["ok", "note", "wrong"]
# Disk that `make env` takes on Linux x86-64, by du, with torch's CUDA libraries and without.
ENVIRONMENT = {"cuda": 5.6 * GB, "cpu": 2.7 * GB}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``advice`` says what to do where something is not as it should be."""

    section: str
    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


class Place(NamedTuple):
    """Where doctor runs, and what opens the notebooks and installs everything there."""

    name: str
    lab: str
    env: str


def place(root: Path | None, here: Path) -> Place:
    """``root`` is the checkout that kvlearn is imported from, None for an installed wheel."""
    if root is None:
        lab = "kvlearn start, then: jupyter lab"
        return Place("no checkout: kvlearn is an installed package", lab, "pip install 'kvlearn[lab]'")
    inside = here.resolve().is_relative_to(root)
    # make reads the Makefile of the folder that it is told.
    make = "make" if here.resolve() == root else f"make -C {os.path.relpath(root, here) if inside else root}"
    name = "the checkout" if inside else f"outside the checkout {root}"
    return Place(name, f"{make} lab", f"{make} env")


class Need(NamedTuple):
    """A required package: which versions do, which one is installed (None: none), and whether it does."""

    name: str
    versions: str
    found: str | None
    met: bool


def examine() -> list[Finding]:
    """The whole report, in order. Takes about two seconds, most of them for the memory bandwidth."""
    return [*software(), *hardware(), *course()]


def software() -> list[Finding]:
    """Python, what kvlearn requires, what the notebooks require, and the pins."""
    python = platform.python_version()
    old = sys.version_info < (3, 11)
    where = place(checkout(), Path.cwd())
    advice = f"install Python 3.11 or newer, then: {where.env}" if old else ""
    state = commit()
    at = (
        f", commit {state['commit'][:10]}{' with changes' if state['dirty'] else ''}"
        if state["commit"]
        else ""
    )
    return [
        Finding("software", "python", python, "wrong" if old else "ok", advice),
        Finding("software", "kvlearn", f"{installed('kvlearn') or 'not installed, run from its folder'}{at}"),
        Finding("software", "runs in", f"{where.name}; the notebooks open with: {where.lab}"),
        *requirements(own_requirements()),
        *(
            Finding(
                "software", name, *(v, "ok", "") if (v := installed(name)) else ("missing", "note", advice)
            )
            for name, advice in (
                ("jupyterlab", f"for the notebooks: {where.env}"),
                ("nbclient", f"for grading and checking notebooks: {where.env}"),
                (
                    "transformers",
                    "for the tests and the chapters that load real models: pip install 'kvlearn[hf]'",
                ),
            )
        ),
        pins(),
    ]


def own_requirements() -> list[str]:
    """The requirements of the library itself, as lines of a requirements file."""
    try:
        return requires("kvlearn") or []
    except PackageNotFoundError:  # not installed, but run from its folder
        root = checkout()
        return tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"] if root else []


def requirements(lines: list[str]) -> list[Finding]:
    """One finding a requirement of this system: wrong where it is missing or its version does not do."""
    findings = []
    for need in filter(None, map(parse, lines)):
        if need.met and need.found is not None:
            findings.append(Finding("software", need.name, need.found))
        else:
            value = f"{need.found or 'missing'}, needed: {need.name}{need.versions}"
            one = f"pip install '{need.name}{need.versions}'"
            root = checkout()
            advice = one if root is None else f"{place(root, Path.cwd()).env}, or: {one}"
            findings.append(Finding("software", need.name, value, "wrong", advice))
    return findings


def pins(root: Path | None = None) -> Finding:
    """Whether what is installed is what requirements.txt pins."""
    root = root or checkout()
    path = root / "requirements.txt" if root is not None else None
    if path is None or not path.is_file():
        return Finding("software", "pins", "no requirements.txt here")
    lines = (line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pinned = [need for line in lines if line and line[0] not in "#-." and (need := parse(line)) is not None]
    unmet = [f"{n.name} {n.found or 'missing'} (pinned {n.versions})" for n in pinned if not n.met]
    if not pinned:
        return Finding("software", "pins", "not compared: the package packaging is not installed", "note")
    if not unmet:
        return Finding("software", "pins", f"all {len(pinned)} of requirements.txt met")
    more = f" and {len(unmet) - 3} more" if len(unmet) > 3 else ""
    value = f"{len(pinned) - len(unmet)} met; not: {', '.join(unmet[:3])}{more}"
    return Finding("software", "pins", value, "note", place(root, Path.cwd()).env)


def parse(line: str) -> Need | None:
    """A line such as ``triton==3.7.1 ; sys_platform == 'linux'``; None where another system is meant.

    None as well without the package packaging, which compares versions.
    """
    if find_spec("packaging") is None:  # comes with JupyterLab, matplotlib and pytest
        return None
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    found = installed(requirement.name)
    met = found is not None and requirement.specifier.contains(found, prereleases=True)
    return Need(requirement.name, str(requirement.specifier), found, met)


def hardware() -> list[Finding]:
    """Processor, memory and its bandwidth, GPU, disk."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    card = gpu()
    low_memory = memory.total < 4 * GIB
    return [
        Finding(
            "hardware", "processor", f"{cpu_model()}, {cores()} cores, {torch.get_num_threads()} threads"
        ),
        Finding(
            "hardware",
            "memory",
            f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free",
            "note" if low_memory else "ok",
            "under 4 GiB the training chapters may not fit" if low_memory else "",
        ),
        Finding(
            "hardware", "memory bandwidth", f"{format_rate(read_bandwidth('cpu'))}, measured now, reading"
        ),
        Finding("hardware", "GPU", f"{card['name']}, {format_bytes(card['memory'])}" if card else "none"),
        free_disk(disk.free, torch.version.cuda is not None),
    ]


def free_disk(free: int, cuda: bool) -> Finding:
    """Whether another environment like this one (``cuda``: with torch's CUDA libraries) would fit."""
    if free >= ENVIRONMENT["cuda" if cuda else "cpu"]:
        return Finding("hardware", "free disk", format_bytes(free))
    full, small = (f"{size / GB:.1f} GB" for size in (ENVIRONMENT["cuda"], ENVIRONMENT["cpu"]))
    advice = f"a new environment takes {full}, {small} with a CPU build of torch (README, Start)"
    return Finding("hardware", "free disk", format_bytes(free), "note", advice)


def course() -> list[Finding]:
    """How each part of the course will run."""
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    has_playwright = find_spec("playwright") is not None
    return [
        Finding("course", "chapters 00–10", "run here, on the CPU"),
        kernels(find_spec("triton") is not None, torch.cuda.is_available(), has_compiler()),
        Finding(
            "course", "chapters 12–13", "recorded results, and this machine's own measurements beside them"
        ),
        Finding("course", "browser test", f"runs, with {browser}")
        if browser and has_playwright
        else Finding(
            "course", "browser test", f"skipped: no {'playwright' if browser else 'chromium'}", "note"
        ),
    ]


def kernels(triton: bool, cuda: bool, compiler: bool) -> Finding:
    """How chapter 11's Triton kernels run: compiled, interpreted, or not at all."""
    name = "chapter 11, kernels"
    if not triton:
        value = "Triton is missing (on Linux: pip install 'kvlearn[kernels]'): the cells without kernels run"
        return Finding("course", name, value)
    if not cuda:
        return Finding(
            "course", name, "Triton's interpreter on the CPU: right but slow, so it measures no speed"
        )
    if not compiler:
        return Finding(
            "course",
            name,
            "interpreted: Triton finds no C compiler",
            "note",
            "install gcc, so that kernels compile",
        )
    return Finding("course", name, "compiled, on the GPU; speeds are measured here")


def has_compiler() -> bool:
    """Whether Triton finds the C compiler that it needs for its launchers."""
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))
