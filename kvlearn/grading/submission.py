"""Submissions: which notebooks they are, whose, of which unit; and one taken apart.

The answers in a notebook are laid into the pristine notebook of the unit. Whatever happened to the file in
between (check cells deleted, edited or doubled, cells split, renamed or moved), exercises, set-up and checks
are the original ones; only answers and added cells are the learner's.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvlearn.grading.folders import KEPT, STATE, nbgrader_of, read_source, shows_only, unit_names
from kvlearn.grading.release import stub

CHECK = re.compile(r"""kvlearn\.check\(\s*["'](\d\d\.\d+)["']""")

# Folders that are nobody's name: of a course (nothing above them is a student), and of hand-in systems.
OURS = re.compile(r"exercises|_?solutions|work|source|release|notebooks")
BETWEEN = re.compile(
    r"(?i)(re)?submi(tted|ssions?)|attempts?|hand(ed)?[ _-]?ins?|downloaded|archive|autograded|files?|late"
)
NUMBERED = re.compile(r"[ _.-]*\(?\d*\)?$")  # "attempt-2", "submission (1)"
# What copying, downloading and handing in again add to a file's name: U-Copy1, U (1), U_v2, "Copy of U".
COPY = re.compile(r"(?i)(copy|kopie)\d*|final|solved|new|late|v\d+|\(?\d{1,2}\)?")
COPY_OF = re.compile(r"(?i)copy( of)?|kopie( von)?|final|my")
# Moodle's "Ada Byron_123_assignsubmission_file_", Canvas's "byronada_LATE_123_456_".
HAND_IN = re.compile(r"(?i)(_\d+)+_assignsubmission_.*|(_late)?_\d+_\d+$")


class Unusable(Exception):
    """A notebook that cannot be graded; the message says why, in a line."""


@dataclass(frozen=True)
class Submission:
    """A notebook to grade. ``student`` is empty where neither folders nor the file's name say whose it is."""

    file: Path
    unit: str
    student: str = ""

    @property
    def shown(self) -> str:
        """The file's name, in which a file system may hold any bytes."""
        return readable(str(self.file))


def readable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def notebooks(path: Path) -> tuple[list[Path], list[str]]:
    """The notebook at this path, or all below it, and a line for each folder that cannot be read.

    Hidden files and folders are left out; links are followed, but not back to where they come from.
    """
    if not path.is_dir():
        return ([path] if path.exists() else []), []
    found: list[Path] = []
    errors: list[OSError] = []
    for at, folders, names in os.walk(path, onerror=errors.append, followlinks=True):
        here = os.path.realpath(at)
        ours = {KEPT} if STATE in folders else set()  # in work/: copies that kvlearn kept of the learner's
        below = [name for name in folders if not name.startswith(".") and name not in ours]
        folders[:] = [n for n in below if not _is_within(here, os.path.realpath(os.path.join(at, n)))]
        found += [Path(at, name) for name in names if name.lower().endswith(".ipynb") and name[0] != "."]
    return sorted(found), [f"{readable(error.filename)}: {error.strerror}" for error in errors]


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def find(path: Path, solutions: Path) -> tuple[list[Submission], list[str]]:
    """The submissions at or below a path, in whatever layout and under whatever names, and a line for each
    notebook that is no unit's. ``Unusable`` if there is no notebook."""
    if not path.exists():
        units = ", ".join(unit_names(solutions))
        raise Unusable(f"no such file, folder or unit; the units are {units}")
    files, faults = notebooks(path)
    if not files and not faults:
        raise Unusable("no notebook in it: expected UNIT/UNIT.ipynb or STUDENT/UNIT/UNIT.ipynb")
    found: list[tuple[Path, str]] = []
    for file in files:
        try:
            found.append((file, unit_of(file, solutions)))
        except Unusable as error:
            faults.append(f"{readable(str(file))}: {error}")
    return [Submission(file, unit, student_of(file, unit, path, found)) for file, unit in found], faults


def find_all(paths: list[Path], solutions: Path) -> tuple[list[Submission], list[str]]:
    """Every notebook that the paths mean, once, and a line for each that cannot be graded."""
    found: dict[str, Submission] = {}
    faults: list[str] = []
    for path in paths:
        try:
            here, unknown = find(path, solutions)
        except Unusable as error:
            faults.append(f"{path}: {error}")
            continue
        faults += unknown
        for submission in here:
            found.setdefault(os.path.abspath(submission.file), submission)
    return list(found.values()), faults


def unit_of(file: Path, solutions: Path) -> str:
    """The unit a notebook belongs to: as its metadata, its cells or its name say; or, of one that cannot be
    read, its folder. ``Unusable`` if none of them says so."""
    known = unit_names(solutions)
    named = next((unit for unit in known if unit in file.stem), "")
    try:
        notebook = load(file)
    except Unusable:
        folder = file.absolute().parent.name
        if named or folder in known:
            return named or folder
        raise
    metadata = notebook.get("metadata")
    ours = metadata.get("kvlearn") if isinstance(metadata, dict) else None
    if isinstance(ours, dict) and ours.get("unit") in known:
        return str(ours["unit"])
    cells = [name for cell in notebook["cells"] if isinstance(cell, dict) for name in names_of(cell)]
    votes = Counter(unit for unit in known for name in cells if name in _known_cells(unit, solutions))
    if votes or named:
        return max(votes, key=votes.__getitem__) if votes else named
    raise Unusable(f"not a unit of kvlearn; the units are {', '.join(known) or '(none found)'}")


@cache
def _known_cells(unit: str, solutions: Path) -> frozenset[str]:
    return frozenset(tasks_of(unit, solutions)[1])


def student_of(file: Path, unit: str, root: Path, found: Sequence[tuple[Path, str]] = ()) -> str:
    """Whose notebook it is, of those below ``root``.

    The name of a folder between the two, else what the file's name holds beside the unit's
    (``ada_UNIT.ipynb``), else the name of a folder above. Where one folder holds notebooks of several people,
    as ``found`` shows, the names of the files come first.
    """
    own = _in_name(file, unit)
    beside = {
        _in_name(other, unit) for other, theirs in found if (other.parent, theirs) == (file.parent, unit)
    }
    if own and len(beside - {""}) > 1:
        return own
    top = root.parent if root.is_file() else root
    for name in reversed(file.parent.relative_to(top).parts):
        if name != unit and not _nobodys(name, OURS) and not _nobodys(name, BETWEEN):
            return _person(name)
    if own:
        return own
    # Above, only what was written in the path; or, for STUDENT/UNIT/UNIT.ipynb, what is there.
    above = top.absolute().parts[1:] if file.absolute().parent.name == unit else top.parts
    for name in reversed(above):
        if _nobodys(name, OURS) or name in ("..", os.sep):
            return ""
        if name != unit and not _nobodys(name, BETWEEN):
            return _person(name)
    return ""


def _nobodys(name: str, names: re.Pattern[str]) -> bool:
    return names.fullmatch(NUMBERED.sub("", name)) is not None


def _person(name: str) -> str:
    return readable(HAND_IN.sub("", name).strip(" _-") or name)


def _in_name(file: Path, unit: str) -> str:
    """What a file's name holds beside the unit's and what copying adds: "ada" in ada_UNIT-Copy1.ipynb."""
    before, there, after = file.stem.partition(unit)
    before, after = before.strip(" _-"), after.strip(" _-")
    if there and before and not COPY_OF.fullmatch(before):
        return _person(before)
    copied = all(COPY.fullmatch(part) for part in re.split(r"[ _.-]+", after))
    return _person(after) if there and after and not copied else ""


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
    reads_answers: bool = False  # the check looks at the answers to the exercises before

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
        for name in names_of(cell):
            places[name] = (role, len(tasks))
        if cell["cell_type"] != "code":
            continue
        if role == "check":
            called = CHECK.search(cell["source"])
            name = called.group(1) if called else str(marks["grade_id"])
            reads = bool(cell["metadata"].get("kvlearn", {}).get("reads_answers"))
            points = float(marks["points"])
            tasks.append(Task(name, points, setup, stubs, cell["source"], reads_answers=reads))
            setup, stubs = [], []
        elif not shows_only(cell):
            (stubs if role == "answer" else setup).append(stub(cell))
    return tasks, places


def names_of(cell: dict[str, Any]) -> list[str]:
    """What a cell is known by: its grade id, then its id."""
    marks = {"grade_id": nbgrader_of(cell).get("grade_id"), "id": cell.get("id")}
    return [f"{kind} {name}" for kind, name in marks.items() if name]


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


def fill_in(tasks: list[Task], places: dict[str, tuple[str, int]], notebook: dict[str, Any]) -> None:
    """Give every task its pieces: answer cells by grade id, else by cell id; added cells where they stand."""
    here = 0
    recognised = False
    for cell in notebook["cells"]:
        if not isinstance(cell, dict):
            continue
        role, place = next((places[name] for name in names_of(cell) if name in places), ("added", here))
        recognised = recognised or role != "added"
        here = place + 1 if role == "check" else place
        source = text_of(cell.get("source"))
        if role in ("answer", "added") and cell.get("cell_type") == "code" and place < len(tasks):
            tasks[place].pieces.append(source)
            tasks[place].missing = tasks[place].missing and role != "answer"
    if not recognised:
        raise Unusable("none of its cells are the unit's")


def text_of(source: Any) -> str:
    lines = source if isinstance(source, list) else [source]
    text = "".join(line for line in lines if isinstance(line, str))
    # JSON can hold half a character, what is sent to a kernel cannot.
    return text.encode("utf-8", "replace").decode()
