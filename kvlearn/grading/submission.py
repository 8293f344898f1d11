"""A learner's notebook taken apart: the answers in it, laid into the pristine notebook of the unit.

Whatever happened to the file in between (check cells deleted, edited or doubled, cells split, renamed or
moved), exercises, set-up and checks are the original ones; only answers and added cells are the learner's.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlearn.grading.catalogue import nbgrader_of, read_source
from kvlearn.grading.release import stub

CHECK = re.compile(r"""kvlearn\.check\(\s*["'](\d\d\.\d+)["']""")


class Unusable(Exception):
    """A notebook that cannot be graded; the message says why, in a line."""


@dataclass
class Task:
    """One exercise: what is ours (set-up, stubs, check), and the learner's ``pieces`` in their order."""

    id: str
    points: float
    setup: list[str]  # cells since the check before
    stubs: list[str]
    check: str
    pieces: list[str] = field(default_factory=list)
    missing: bool = True  # no answer cell was found

    @property
    def untouched(self) -> bool:
        """Nothing but the stub is there."""
        return {piece.strip() for piece in self.pieces} <= {"", *(given.strip() for given in self.stubs)}


def tasks_of(unit: str, solutions: Path) -> tuple[list[Task], dict[str, tuple[str, int]]]:
    """The unit's exercises; and for every cell, by its grade id and by its id, its role and exercise."""
    tasks: list[Task] = []
    places: dict[str, tuple[str, int]] = {}
    setup: list[str] = []
    stubs: list[str] = []
    for cell in read_source(unit, solutions)["cells"]:
        marks = nbgrader_of(cell)
        role = "check" if marks.get("grade") else "answer" if marks.get("solution") else "given"
        names = [f"grade_id {marks['grade_id']}"] if marks.get("grade_id") else []
        for name in [*names, f"id {cell.get('id')}"]:
            places[name] = (role, len(tasks))
        if cell["cell_type"] != "code":
            continue
        if role == "check":
            called = CHECK.search(cell["source"])
            name = called.group(1) if called else str(marks["grade_id"])
            tasks.append(Task(name, float(marks["points"]), setup, stubs, cell["source"]))
            setup, stubs = [], []
        else:
            (stubs if role == "answer" else setup).append(stub(cell))
    return tasks, places


def load(file: Path) -> dict[str, Any]:
    """A notebook file as it is, however odd. ``Unusable`` if it is missing, not JSON or no notebook."""
    try:
        content = file.read_bytes()
        notebook = json.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise Unusable("no such file") from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if not content.strip():
            raise Unusable("the file is empty") from None
        if re.search(rb"^(<<<<<<<|>>>>>>>) ", content, re.MULTILINE):
            raise Unusable("it holds git's merge conflict markers (<<<<<<<): keep one side of each") from None
        raise Unusable(f"damaged, not JSON: {error}") from None
    if isinstance(notebook, dict) and isinstance(notebook.get("worksheets"), list):
        raise Unusable("a notebook of format 3: open it in JupyterLab and save it, that makes it format 4")
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise Unusable("not a Jupyter notebook (no list of cells, as nbformat 4 has it)")
    return notebook


def unit_of(file: Path, notebook: dict[str, Any] | None, known: list[str]) -> str:
    """The unit a notebook belongs to: by its own metadata, else by the name of its file or folder."""
    metadata = (notebook or {}).get("metadata")
    ours = metadata.get("kvlearn") if isinstance(metadata, dict) else None
    names = [ours.get("unit") if isinstance(ours, dict) else None, file.stem, file.absolute().parent.name]
    for name in names:
        if name in known:
            return name
    raise Unusable(f"not a unit of kvlearn; the units are {', '.join(known) or '(none found)'}")


def fill_in(tasks: list[Task], places: dict[str, tuple[str, int]], notebook: dict[str, Any]) -> None:
    """Give every task its pieces: answer cells by grade id, else by cell id; added cells where they stand."""
    here = 0
    recognised = False
    for cell in notebook["cells"]:
        if not isinstance(cell, dict):
            continue
        names = (f"grade_id {nbgrader_of(cell).get('grade_id')}", f"id {cell.get('id')}")
        role, place = next((places[name] for name in names if name in places), ("added", here))
        recognised = recognised or role != "added"
        here = place + 1 if role == "check" else place
        source = _text(cell.get("source"))
        if role in ("answer", "added") and cell.get("cell_type") == "code" and place < len(tasks):
            tasks[place].pieces.append(source)
            tasks[place].missing = tasks[place].missing and role != "answer"
    if not recognised:
        raise Unusable("none of its cells are the unit's")


def _text(source: Any) -> str:
    lines = source if isinstance(source, list) else [source]
    text = "".join(line for line in lines if isinstance(line, str))
    # JSON can hold half a character, what is sent to a kernel cannot.
    return text.encode("utf-8", "replace").decode()
