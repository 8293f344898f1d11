"""Where units and a learner's copies are, and what is read of a unit without importing torch.

A unit is a folder of solutions/. Learners work on copies in work/, which git does not watch: work/UNIT holds
the notebook, work/.kvlearn what kvlearn remembers, work/kept copies of notebooks before they were changed.
"""

import json
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import kvlearn

STATE = ".kvlearn"  # the folder of work/ that marks it
KEPT = "kept"
MARK = (
    "KVLEARN_SANDBOX"  # a variable in the environment of the grader's kernels, which their children inherit
)


def solutions_root() -> Path:
    """The folder of units: $KVLEARN_SOLUTIONS, else in an installed wheel, else beside the package."""
    chosen = os.environ.get("KVLEARN_SOLUTIONS")
    package = Path(kvlearn.__file__).resolve().parent
    inside = package / "_solutions"
    return Path(chosen) if chosen else inside if inside.is_dir() else package.parent / "solutions"


def exercises_root() -> Path:
    """``exercises`` in the working directory, else in an installed wheel, else beside the units."""
    inside = Path(kvlearn.__file__).resolve().parent / "_exercises"
    here = Path("exercises")
    return here if here.is_dir() else inside if inside.is_dir() else solutions_root().parent / "exercises"


def chapters_root() -> Path | None:
    """The chapters that an installed wheel carries; None in a checkout, where they are in notebooks/."""
    inside = Path(kvlearn.__file__).resolve().parent / "_notebooks"
    return inside if inside.is_dir() else None


def work_root() -> Path:
    """The folder of a learner's copies, whether or not it exists yet.

    $KVLEARN_WORK; else the nearest ``work`` at or above the working directory that ``kvlearn start`` made;
    else ``work`` in the repository that kvlearn runs from, or, without one, in the working directory.
    """
    chosen = os.environ.get("KVLEARN_WORK")
    if chosen:
        return Path(chosen).absolute()
    checkout = solutions_root().resolve().parent
    is_checkout = (checkout / "pyproject.toml").is_file()
    here = checkout
    with suppress(FileNotFoundError):  # the working directory was removed
        here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "work" / STATE).is_dir() or (is_checkout and folder == checkout):
            return folder / "work"
    return (checkout if is_checkout else here) / "work"


def own_copy(exercise: str) -> Path | None:
    """The folder of copies if this process runs in the copy of the exercise's unit, as a learner's kernel
    does; None in a grader's kernel, in tests and everywhere else."""
    if MARK in os.environ:
        return None
    work = work_root()
    with suppress(OSError, ValueError):
        first, *_ = Path.cwd().resolve().relative_to(work.resolve()).parts or ("",)
        if first.split("_")[0] == exercise.split(".")[0] and (work / STATE).is_dir():
            return work
    return None


def unit_names(solutions: Path) -> list[str]:
    """The names of all units that have a source notebook, in order."""
    return sorted(p.stem for p in solutions.glob("*/*.ipynb") if p.stem == p.parent.name)


def unit_named(name: str, solutions: Path) -> str:
    """The unit that is meant by its name, number or topic: "01_full_attention", "01", "1", "full_attention".

    ValueError if there is none.
    """
    wanted = Path(name).name
    for unit in unit_names(solutions):
        number, _, topic = unit.partition("_")
        if wanted in (unit, number, number.lstrip("0"), topic):
            return unit
    raise ValueError(f"expected one of {', '.join(unit_names(solutions))}; got {name!r}")


def read_source(unit: str, solutions: Path) -> dict[str, Any]:
    """The source notebook of a unit, with every cell's source as one string."""
    notebook: dict[str, Any] = json.loads((solutions / unit / f"{unit}.ipynb").read_text("utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


@cache
def titles(unit: str, solutions: Path) -> dict[str, str]:
    """The title of each exercise, from the heading of its task: ``## 01.3 Split a fused projection``."""
    text = "\n".join(
        c["source"] for c in read_source(unit, solutions)["cells"] if c["cell_type"] == "markdown"
    )
    return dict(re.findall(r"^#+ (\d\d\.\d+) (.+?) *$", text, re.MULTILINE))


def nbgrader_of(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell's nbgrader metadata; empty where there is none or it is not a mapping."""
    metadata = cell.get("metadata")
    mine = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    return mine if isinstance(mine, dict) else {}


def shows_only(cell: dict[str, Any]) -> bool:
    """Is a cell there to be looked at, so that nothing after it needs it (``kvlearn.shows_only``)?"""
    ours = cell["metadata"].get("kvlearn")
    return isinstance(ours, dict) and ours.get("shows_only") is True
