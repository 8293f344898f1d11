"""``kvlearn start`` and ``kvlearn reset``: a learner's copies in work/, made, updated and restored.

Nothing that a learner wrote is lost: an existing file is never replaced by a copy, a notebook is changed in
one step and only after a copy of it was put into work/kept, and one that cannot be read is left alone.
work/.kvlearn/base holds each unit as the learner was given it: what they and the course changed since shows.
"""

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlearn.grading import records, submission
from kvlearn.grading.folders import KEPT, STATE, exercises_root, nbgrader_of, read_source, solutions_root
from kvlearn.grading.merging import Merged, Notebook, exercises_by_cell, merge, same
from kvlearn.grading.release import METADATA, committed, stub
from kvlearn.grading.submission import Unusable, names_of

PATIENCE = 60.0  # seconds to wait for another start or reset
RELOAD = "open in JupyterLab? File → Reload Notebook from Disk"


@dataclass
class Outcome:
    """The result for one unit: ``what`` is "copied", "updated", "reset", "unchanged" or "failed"; ``lines``
    tell the learner more; ``kept`` is the copy of the notebook as it was."""

    unit: str
    what: str
    lines: list[str] = field(default_factory=list)
    file: Path | None = None
    kept: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The same for a program, paths as text."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def start(units: list[str], work: Path) -> list[Outcome]:
    """Copy each unit into ``work``, or bring in what is new in it since. One unit's failure stops no other.

    OSError if there can be no such folder; TimeoutError if another ``kvlearn start`` does not end.
    """
    (work / STATE / "base").mkdir(parents=True, exist_ok=True)
    with records.locked(work / STATE / "work.lock", PATIENCE):
        return [_guarded(unit, work) for unit in units]


def copy_chapters(source: Path, target: Path, work: Path) -> list[str]:
    """Copy every chapter of ``source`` into ``target``, or bring it up to date; return the actions, in lines.

    A chapter that differs from the one that was copied last time is the reader's: it is put into work/kept
    before a newer one takes its place. OSError where a file cannot be written.
    """
    record = work / STATE / "chapters.json"
    given: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    new, newer, lines = 0, 0, list[str]()
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name, content = path.relative_to(source).as_posix(), path.read_bytes()
        file, digest = target / name, hashlib.sha256(content).hexdigest()
        before = file.read_bytes() if file.is_file() else None
        if before is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            _create(file, content)
            new += 1
        elif digest != given.get(name) and before != content:
            if hashlib.sha256(before).hexdigest() != given.get(name):
                kept = keep(file, before, work, file.stem)
                lines.append(f"{shown(file)}: a newer one; yours as it was: {shown(kept)}")
            records.write(file, content)
            newer += 1
        given[name] = digest
    records.write(record, json.dumps(given, indent=1).encode())
    if new or newer:
        done = [f"{n} {what}" for n, what in ((new, "copied"), (newer, "brought up to date")) if n]
        lines.insert(0, f"chapters in {shown(target)}: {', '.join(done)}")
    return lines


def _guarded(unit: str, work: Path) -> Outcome:
    try:
        return _start(unit, work)
    except (OSError, Unusable) as error:
        return Outcome(unit, "failed", [reason(error)])


def reason(error: Exception) -> str:
    """Why it failed, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    return str(error)


def _start(unit: str, work: Path) -> Outcome:
    new = pristine(unit)
    base = work / STATE / "base" / f"{unit}.ipynb"
    file = find_copy(unit, work)
    if file is None:
        return _copy(unit, work, new, base)
    mine = file.read_bytes()
    given = _read(base)
    if given == json.loads(new):
        submission.load(file)  # a damaged one is said so at each start
        return Outcome(unit, "unchanged", file=file)
    try:
        notebook = submission.load(file)
    except Unusable as error:
        raise Unusable(
            f"{shown(file)}: {error}; it is left as it is (move it away, then start again)"
        ) from None
    merged = merge(given, notebook, json.loads(new))
    return _replace(unit, work, file, mine, merged, base, new)


def _copy(unit: str, work: Path, new: bytes, base: Path) -> Outcome:
    """A first copy, with the answers of exercises/ if somebody wrote them there."""
    file = work / unit / f"{unit}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    source = exercises_root() / unit / file.name
    content, lines = new, []
    if source.is_file() and source.read_bytes() != new and not _unsolved(source.read_bytes(), unit):
        with suppress(Unusable):
            submission.load(source)
            content = source.read_bytes()
            lines = [f"with the answers that you wrote in {shown(source)}; that file stays as it is"]
    records.write(base, new)
    _create(file, content)
    return Outcome(unit, "copied", lines, file)


def _create(file: Path, content: bytes) -> None:
    """Write a new file in one step; FileExistsError where there is one."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as copy:
            copy.write(content)
        os.chmod(name, 0o644)
        try:
            os.link(name, file)  # unlike a rename, it fails where a file is
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with file.open("xb") as copy:
                copy.write(content)
    finally:
        os.unlink(name)


def _replace(
    unit: str,
    work: Path,
    file: Path,
    before: bytes,
    merged: Merged,
    base: Path,
    new: bytes,
    what: str = "updated",
) -> Outcome:
    """Write a merged notebook over the learner's, with a copy of that first if they wrote something in it."""
    after = to_bytes(merged.notebook)
    lines = [f"{exercise}: new {_listed(kinds)}" for exercise, kinds in merged.changed.items() if exercise]
    lines += [f"new {_listed(kinds)}" for exercise, kinds in merged.changed.items() if not exercise]
    kept = None
    changes = json.loads(after) != json.loads(before.decode("utf-8-sig"))
    if not changes and not merged.clashes:
        what = "unchanged"
    if changes:
        if not os.access(file, os.W_OK):
            raise PermissionError(13, "cannot be written", shown(file))
        if merged.own or merged.clashes:
            kept = keep(file, before, work, unit)
        if file.read_bytes() != before:  # JupyterLab has just saved it
            raise Unusable(f"{shown(file)}: it was saved meanwhile; nothing is changed, try again")
        records.write(file, after)
    records.write(base, new)
    lines += merged.clashes
    today = exercises_root() / unit / f"{unit}.ipynb"
    if merged.clashes and today.is_file():
        lines.append(f"to compare, the unit as it is given today: {shown(today)}")
    if what == "updated":
        lines.append("your answers are kept" if merged.own else "you had not begun this unit")
    return Outcome(unit, what, lines, file, kept)


def _listed(kinds: list[str]) -> str:
    return ", ".join(dict.fromkeys(kinds))


def keep(file: Path, content: bytes, work: Path, unit: str) -> Path:
    """Put a copy of a notebook into work/kept, under a name of its own."""
    folder = work / KEPT
    folder.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    for number in range(1, 1000):
        copy = folder / f"{unit}-{stamp}{f'-{number}' if number > 1 else ''}.ipynb"
        with suppress(FileExistsError), copy.open("xb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
            return copy
    raise FileExistsError(17, "no free name for a copy", str(copy))


def reset(exercise: str, unit: str, work: Path) -> Outcome:
    """Give one exercise back as it was given, its answer cell the stub; a copy of the notebook is kept.

    First whatever is new in the unit is brought in, as ``start`` does. FileNotFoundError if there is no copy,
    ``Unusable`` if it cannot be read, OSError if it cannot be written.
    """
    if find_copy(unit, work) is None:
        raise FileNotFoundError(2, "no copy of the unit yet: kvlearn start makes it", shown(work / unit))
    (work / STATE / "base").mkdir(parents=True, exist_ok=True)
    with records.locked(work / STATE / "work.lock", PATIENCE):
        started = _start(unit, work)
        file = started.file
        assert file is not None
        before = file.read_bytes()
        new = pristine(unit)
        given = json.loads(new)
        restored, base, changed = _restored(exercise, submission.load(file), given)
        merged = merge(base, restored, given)
        merged.changed, merged.own = {}, True
        if not changed:
            lines = [*started.lines, f"{exercise} is as it was given; nothing to reset"]
            return Outcome(unit, "unchanged", lines, file, started.kept)
        path = work / STATE / "base" / f"{unit}.ipynb"
        outcome = _replace(unit, work, file, before, merged, path, new, "reset")
        with suppress(OSError):
            records.forget(work, exercise)
    outcome.lines = started.lines + outcome.lines
    return outcome


def _restored(exercise: str, mine: Notebook, new: Notebook) -> tuple[Notebook, Notebook, bool]:
    """``mine`` with the exercise's own cells as in ``new``, and ``new`` without those that are missing in
    ``mine``: a merge puts them back. And whether that changes anything."""
    fresh: dict[str, int] = {}
    labels = exercises_by_cell(new)
    for i, cell in enumerate(new["cells"]):
        if labels[i] == exercise:
            fresh |= dict.fromkeys(names_of(cell), i)
    seen: set[int] = set()
    cells, changed = [], False
    for cell in mine["cells"]:
        place = (
            next((fresh[name] for name in names_of(cell) if name in fresh), None)
            if isinstance(cell, dict)
            else None
        )
        if place is None:
            cells.append(cell)
            continue
        if place not in seen:
            cells.append(new["cells"][place])
        changed = changed or place in seen or not same(cell, new["cells"][place])
        seen.add(place)
    missing = set(fresh.values()) - seen
    base = new | {"cells": [cell for i, cell in enumerate(new["cells"]) if i not in missing]}
    return mine | {"cells": cells}, base, changed or bool(missing)


def find_copy(unit: str, work: Path) -> Path | None:
    """The learner's notebook of a unit: UNIT.ipynb, or the latest one if they gave it another name."""
    folder = work / unit
    named = folder / f"{unit}.ipynb"
    if named.exists() or named.is_symlink():
        return named
    found = []
    for file in submission.notebooks(folder)[0]:
        with suppress(Unusable):
            if submission.unit_of(file, solutions_root()) == unit:
                found.append(file)
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def pristine(unit: str) -> bytes:
    """The unit as learners are given it: exercises/ as git has it, or as it is; else made from solutions/."""
    file = exercises_root() / unit / f"{unit}.ipynb"
    if file.is_file():
        content = file.read_bytes()
        in_git = committed(file)
        if in_git is not None:
            return in_git
        if _unsolved(content, unit):
            return content
    return to_bytes(derived(unit))


def derived(unit: str) -> Notebook:
    """The unit's notebook made from its source, where no exercises/ was shipped: what nbgrader makes of it,
    but for nbgrader's checksums."""
    notebook = read_source(unit, solutions_root())
    for cell in notebook["cells"]:
        marks = nbgrader_of(cell)
        if cell["cell_type"] == "code":
            cell["source"] = stub(cell)
            cell |= {"outputs": [], "execution_count": None}
        if marks:
            cell["metadata"]["deletable"] = False
        if marks.get("locked"):
            cell["metadata"]["editable"] = False
        cell["source"] = cell["source"].splitlines(keepends=True)
    notebook["metadata"] = METADATA | {k: v for k, v in notebook["metadata"].items() if k == "kvlearn"}
    return notebook


def _unsolved(content: bytes, unit: str) -> bool:
    """Does a notebook hold nothing but the stubs, in cells and answers?"""
    tasks, places = submission.tasks_of(unit, solutions_root())
    with suppress(ValueError, KeyError, TypeError, Unusable, RecursionError):
        submission.fill_in(tasks, places, json.loads(content))
        return all(task.untouched for task in tasks)
    return False


def _read(file: Path) -> Notebook | None:
    with suppress(Unusable):
        return submission.load(file)
    return None


def to_bytes(notebook: dict[str, Any]) -> bytes:
    """A notebook file as Jupyter writes it."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can hold as an escape
        return (json.dumps(notebook, indent=1) + "\n").encode()


def shown(path: Path) -> str:
    """A path as a user writes it: from the working directory, where it is below."""
    with suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def tell(outcomes: list[Outcome]) -> list[str]:
    """The outcomes in lines for a learner; those that stayed as they were in one."""
    lines = []
    for each in outcomes:
        if each.what in ("unchanged", "failed"):
            lines += each.lines if each.what == "unchanged" else []
            continue
        assert each.file is not None
        verb = {"copied": "copied to", "updated": "brought up to date in", "reset": "reset in"}[each.what]
        lines.append(f"{each.unit}: {verb} {shown(each.file)}")
        lines += [f"  {line}" for line in each.lines]
        if each.kept is not None:
            lines.append(f"  the notebook as it was: {shown(each.kept)}")
        if each.what != "copied":
            lines.append(f"  {RELOAD}")
    same_as_before = [each for each in outcomes if each.what == "unchanged" and not each.lines]
    if same_as_before:
        many = len(same_as_before)
        units = same_as_before[0].unit if many == 1 else f"{many} units"
        lines.append(f"{units}: up to date")
    return lines
