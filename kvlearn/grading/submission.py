"""Submissions: which notebooks they are, whose, of which unit; and one taken apart.

The answers in a notebook are laid into the pristine notebook of the unit. Whatever happened to the file in
between (check cells deleted, edited or doubled, cells split, renamed or moved), exercises, set-up and checks
are the original ones; only answers and added cells are the learner's.
"""

import ast
import codecs
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvlearn.grading.folders import (
    KEPT,
    STATE,
    nbgrader_of,
    read_source,
    shows_only,
    unit_names,
    work_root,
)
from kvlearn.grading.release import stub

CHECK = re.compile(r"""kvlearn\.check\(\s*["'](\d\d\.\d+)["']""")

# Folders that are nobody's name: of a course (nothing above them is a student), and of hand-in systems.
OURS = re.compile(r"exercises|_?solutions|work|source|release|notebooks")
BETWEEN = re.compile(
    r"(?i)(re)?submi(tted|ssions?)|attempts?|hand(ed)?[ _-]?ins?|downloaded|archive|autograded|files?|late"
)
NUMBERED = re.compile(r"[ _.-]*\(?\d*\)?$")  # "attempt-2", "submission (1)"
# Additions to a file's name by copying, downloading and handing in again: U-Copy1, U (1), U_v2, "Copy of U".
COPY = re.compile(r"(?i)(copy|kopie)\d*|final|solved|new|late|v\d+|\(?\d{1,2}\)?")
COPY_OF = re.compile(r"(?i)copy( of)?|kopie( von)?|final|my")
# Moodle's "Ada Byron_123_assignsubmission_file_", Canvas's "byronada_LATE_123_456_".
HAND_IN = re.compile(r"(?i)(_\d+)+_assignsubmission_.*|(_late)?_\d+_\d+$")

CONTROLS = ("Cc", "Zl", "Zp")  # control characters and separators of lines, by Unicode's categories
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
LARGEST = 32 * 2**20  # bytes of a notebook file that are read; those of the course have less than 1 MiB


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
    """A name as text to be shown: "?" stands for what is no UTF-8, moves a cursor or turns the direction of
    writing."""
    text = name.encode("utf-8", "replace").decode()
    return "".join("?" if unicodedata.category(c) in CONTROLS or c in DIRECTIONS else c for c in text)


def notebooks(path: Path) -> tuple[list[Path], list[str]]:
    """The notebook at this path, or all below it, and a line for each folder that is not read.

    Hidden files and folders are left out. Links to folders are not followed, since they may lead to other
    people's work and to solutions/; only in the learner's own work/ they are, but not back to where they come
    from. (A notebook that is a link is found, and ``submitted`` refuses it.)
    """
    if not path.is_dir():
        return ([path] if os.path.lexists(path) else []), []
    found: list[Path] = []
    faults: list[str] = []

    def cannot(error: OSError) -> None:
        faults.append(f"{readable(error.filename)}: {error.strerror}")

    follow = is_own(path)
    for at, folders, names in os.walk(path, onerror=cannot, followlinks=follow):
        here = os.path.realpath(at)
        ours = {KEPT} if STATE in folders else set()  # in work/: copies that kvlearn kept of the learner's
        below = [name for name in folders if not name.startswith(".") and name not in ours]
        linked = [name for name in below if os.path.islink(os.path.join(at, name))]
        if follow:
            leave = {n for n in linked if _is_within(here, os.path.realpath(os.path.join(at, n)))}
        else:
            leave = set(linked)
            faults += [f"{readable(os.path.join(at, n))}: a link to a folder, not followed" for n in linked]
        folders[:] = [name for name in below if name not in leave]
        found += [Path(at, name) for name in names if name.lower().endswith(".ipynb") and name[0] != "."]
    return sorted(found), faults


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def is_own(path: Path) -> bool:
    """Is this the learner's own work/, or in it? What lies there was put there by the user who grades."""
    return _is_within(os.path.abspath(path), os.path.abspath(work_root()))


def find(path: Path, solutions: Path) -> tuple[list[Submission], list[str]]:
    """The submissions at or below a path, in whatever layout and under whatever names, and a line for each
    notebook that is no unit's. ``Unusable`` if there is no notebook."""
    if not os.path.lexists(path):
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
            faults.append(f"{readable(str(path))}: {error}")
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
        notebook = submitted(file, solutions)
    except Unusable:
        folder = file.absolute().parent.name
        if named or folder in known:
            return named or folder
        raise
    metadata = notebook.get("metadata")
    ours = metadata.get("kvlearn") if isinstance(metadata, dict) else None
    if isinstance(ours, dict) and ours.get("unit") in known:
        return str(ours["unit"])
    cells = [cell for cell in notebook["cells"] if isinstance(cell, dict)]
    names = [name for cell in cells for name in names_of(cell)]
    votes = Counter(unit for unit in known for name in names if name in _known_cells(unit, solutions))
    if not votes:  # no ids: by the exercises that its checks name
        called = [name.split(".")[0] for cell in cells for name in CHECK.findall(text_of(cell.get("source")))]
        votes = Counter(unit for unit in known for number in called if unit.split("_")[0] == number)
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
    top = root if root.is_dir() else root.parent
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
    """A file's name without the unit's name and a copy's additions: "ada" in ada_UNIT-Copy1.ipynb."""
    before, there, after = file.stem.partition(unit)
    before, after = before.strip(" _-"), after.strip(" _-")
    if there and before and not COPY_OF.fullmatch(before):
        return _person(before)
    copied = all(COPY.fullmatch(part) for part in re.split(r"[ _.-]+", after))
    return _person(after) if there and after and not copied else ""


@dataclass
class Task:
    """One exercise: the course's cells (set-up, stubs, check) and the learner's ``pieces`` in order."""

    id: str
    points: float
    setup: list[str]  # cells since the check before
    stubs: list[str]
    check: str
    pieces: list[str] = field(default_factory=list)
    missing: bool = True  # no answer cell was found
    turned: str = ""  # the type of an answer cell that is no code cell any more, as "Markdown"
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
    """The names that identify a cell: its grade id, then its id."""
    marks = {"grade_id": nbgrader_of(cell).get("grade_id"), "id": cell.get("id")}
    return [f"{kind} {name}" for kind, name in marks.items() if name]


def submitted(file: Path, solutions: Path) -> dict[str, Any]:
    """``load`` for what somebody handed in: a regular file that lies where its path says, or ``Unusable``.

    A link may lead to another's answers, and in the end to ours: it is refused by name, and so is a path
    through linked folders that ends in solutions/. Links in the learner's own work/ are the user's own.
    """
    if is_own(file):
        return load(file)
    if file.is_symlink():
        raise Unusable(f"a link (to {readable(os.readlink(file))}): hand in the notebook itself")
    ours = os.path.realpath(solutions)
    direct = any(_is_within(os.path.abspath(file), os.path.abspath(place)) for place in (ours, solutions))
    if _is_within(os.path.realpath(file), ours) and not direct:
        raise Unusable("a link leads from here into solutions/: hand in the notebook itself")
    return load(file)


def load(file: Path) -> dict[str, Any]:
    """A notebook file as it is, however odd. ``Unusable`` if it is missing, no regular file, larger than
    ``LARGEST``, not JSON or no notebook."""
    try:
        content = _read(file)
    except FileNotFoundError:
        raise Unusable("no such file") from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not content.strip():
            raise Unusable("the file is empty") from None
        if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise Unusable("not JSON as notebooks have it: the text is UTF-16; save it as UTF-8") from None
        if re.search(rb"^(<<<<<<<|>>>>>>>) ", content, re.MULTILINE):
            raise Unusable("it holds git's merge conflict markers (<<<<<<<): keep one side of each") from None
        raise Unusable(f"damaged, not JSON: {error}") from None
    if isinstance(notebook, dict) and isinstance(notebook.get("worksheets"), list):
        raise Unusable("a notebook of format 3: open it in JupyterLab and save it, that makes it format 4")
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise Unusable("not a Jupyter notebook (no list of cells, as nbformat 4 has it)")
    return notebook


def _read(file: Path) -> bytes:
    """The bytes of a regular file. A FIFO is opened without waiting for who writes to it, and not read."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Unusable(f"{_kind(found.st_mode)}, not a regular file")
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        size = f"{found.st_size / 2**20:.0f} MiB, more than the {LARGEST // 2**20} MiB that are read"
        raise Unusable(f"{size}: clear its outputs and save it")
    return content


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a folder" if stat.S_ISDIR(mode) else "a device"


def fill_in(tasks: list[Task], places: dict[str, tuple[str, int]], notebook: dict[str, Any]) -> None:
    """Give every task its pieces: answer cells by grade id, else by cell id; added cells where they are.

    In a notebook whose cells have lost their ids and metadata, checks and set-up are found by their text, and
    all other code before a check is the answer to it.
    """
    cells = [cell for cell in notebook["cells"] if isinstance(cell, dict)]
    named = any(name in places for cell in cells for name in names_of(cell))
    here = 0
    recognised = named
    for cell in cells:
        source = text_of(cell.get("source"))
        code = cell.get("cell_type") == "code"
        role, place = next((places[name] for name in names_of(cell) if name in places), ("added", here))
        if not named and code:
            role, place = _by_text(source, tasks, here)
            recognised = recognised or role == "check"
        here = place + 1 if role == "check" else place
        if role not in ("answer", "added") or place >= len(tasks):
            continue
        task = tasks[place]
        if code:
            task.pieces.append(source)
            task.missing = task.missing and named and role != "answer"
        elif role == "answer":
            task.turned = "Markdown" if cell.get("cell_type") == "markdown" else "raw"
    if not recognised:
        raise Unusable("none of its cells are the unit's")


def _by_text(source: str, tasks: list[Task], here: int) -> tuple[str, int]:
    """The role and the exercise of a code cell that has neither id nor metadata."""
    called = CHECK.search(source)
    if called and _only_checks(source):
        for place, task in enumerate(tasks):
            if task.id == called.group(1):
                return "check", place
    if any(source.strip() == given.strip() for task in tasks for given in task.setup):
        return "given", here
    return "added", here


def _only_checks(source: str) -> bool:
    """Does a cell nothing but import and call? Then it is no answer with a check behind it."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(line, ast.Import | ast.ImportFrom | ast.Expr) for line in body)


def text_of(source: Any) -> str:
    lines = source if isinstance(source, list) else [source]
    text = "".join(line for line in lines if isinstance(line, str))
    # JSON can hold half a character, what is sent to a kernel cannot.
    return text.encode("utf-8", "replace").decode()
