"""A learner's notebook and a new version of its unit, merged cell by cell.

Three notebooks: ``base``, as the learner was given it; ``mine``, as it is now; ``new``, as it is given today.
A change since ``base`` that only one side made is kept. Where both did, an answer stays the learner's and any
other cell is the new one. Cells that the learner added stay behind the cell that they followed.
"""

import uuid
from dataclasses import dataclass, field
from typing import Any

from kvlearn.grading.folders import nbgrader_of
from kvlearn.grading.submission import CHECK, names_of, text_of

Notebook = dict[str, Any]
Cell = dict[str, Any]


@dataclass
class Merged:
    """The merged notebook, and what to tell the learner of it.

    ``changed`` lists what is new, by exercise ("" for none). ``clashes`` says in sentences where the learner
    and the course both changed something. ``own``: the learner had written something.
    """

    notebook: Notebook
    changed: dict[str, list[str]] = field(default_factory=dict)
    clashes: list[str] = field(default_factory=list)
    own: bool = False


def merge(base: Notebook | None, mine: Notebook, new: Notebook) -> Merged:
    """The learner's notebook with what is new in the unit. Without ``base``, an answer that differs from
    ``new`` is taken for the learner's, and any other cell that differs for an old one."""
    keys: dict[str, str] = {}
    for cell in [*(base["cells"] if base else []), *new["cells"]]:
        names = names_of(cell)
        key = next((keys[name] for name in names if name in keys), names[0])
        keys |= {name: keys.get(name, key) for name in names}

    def key_of(cell: Cell) -> str:
        return next((keys[name] for name in names_of(cell) if name in keys), "")

    given = {key_of(cell): cell for cell in base["cells"]} if base else {}
    today = {key_of(cell): cell for cell in new["cells"]}
    merged = Merged({})
    own: dict[str, list[Cell]] = {}
    added: dict[str, list[Cell]] = {}
    anchor = ""
    for cell in mine["cells"]:
        if not isinstance(cell, dict):
            merged.clashes.append("a damaged cell is left out")
            continue
        key = key_of(cell)
        if key in today:
            own.setdefault(key, []).append(cell)
            anchor = key
        elif not key:
            added.setdefault(anchor, []).append(cell)
        elif not same(cell, given[key]):
            added.setdefault(anchor, []).append(_without_marks(cell))
            merged.clashes.append("a cell that you changed is no longer in the unit; it stays as your own")

    labels = exercises_by_cell(new)
    cells = list(added.get("", []))
    for (key, cell), exercise in zip(today.items(), labels, strict=True):
        kept = _cell(merged, given.get(key), own.get(key, []), cell, exercise, deletable=base is not None)
        cells += [*kept, *added.get(key, [])]
    merged.own = merged.own or any(added.values())
    if _order(own, given) != _order(given, own):
        merged.clashes.append("cells that you moved are in the unit's order again")
    merged.notebook = _notebook(mine, new, cells)
    return merged


def _cell(
    merged: Merged, given: Cell | None, own: list[Cell], new: Cell, exercise: str, *, deletable: bool
) -> list[Cell]:
    """The cell for the place of ``new``, and a note in ``merged`` of what was decided."""
    is_answer = bool(nbgrader_of(new).get("solution"))
    kind = kind_of(new)

    def is_new() -> list[Cell]:
        merged.changed.setdefault(exercise, []).append(kind)
        return [new]

    if not own:  # new in the unit, or deleted by the learner
        deleted = deletable and given is not None
        merged.own = merged.own or deleted
        return [] if deleted and given is not None and same(given, new) else is_new()
    before = given or new
    if len(own) == 1 and same(own[0], new):
        merged.own = merged.own or not same(new, before)
        return [_refreshed(own[0], new, given)]
    touched = len(own) > 1 or not same(own[0], before)
    merged.own = merged.own or touched
    if not touched:
        return is_new()
    clash = given is not None and not same(given, new)
    if is_answer or (given is not None and not clash):
        if clash:
            merged.clashes.append(
                f"{exercise}: the given lines of the answer are new; yours is kept as it is"
            )
        return [_refreshed(cell, new, given) for cell in own]
    if clash or len(own) > 1:
        where = f"{exercise}: " if exercise else ""
        merged.clashes.append(f"{where}you had changed the {kind}; it is the new one now")
    elif not deletable:
        merged.clashes.append(f"{exercise}: the {kind} differed from today's; it is the new one now")
    return is_new()


def same(a: Cell, b: Cell) -> bool:
    """Do two cells hold the same, but for what running them adds?"""
    return a.get("cell_type") == b.get("cell_type") and text_of(a.get("source")) == text_of(b.get("source"))


def kind_of(cell: Cell) -> str:
    marks = nbgrader_of(cell)
    if marks.get("grade"):
        return "check"
    if marks.get("solution"):
        return "stub"
    return "task" if cell.get("cell_type") == "markdown" else "set-up"


def exercises_by_cell(notebook: Notebook) -> list[str]:
    """The exercise that each cell of a unit belongs to, by the next check; "" before none."""
    labels: list[str] = []
    after = ""
    for cell in reversed(notebook["cells"]):
        if nbgrader_of(cell).get("grade"):
            called = CHECK.search(text_of(cell.get("source")))
            after = called.group(1) if called else ""
        labels.append(after)
    return labels[::-1]


def _order(some: dict[str, Any], others: dict[str, Any]) -> list[str]:
    return [key for key in some if key in others]


def _refreshed(cell: Cell, new: Cell, given: Cell | None) -> Cell:
    """The learner's cell with the metadata of the new one (its points may have changed)."""
    old = (given or new).get("metadata", {})
    mine = cell.get("metadata")
    kept = {k: v for k, v in (mine if isinstance(mine, dict) else {}).items() if k not in old}
    return cell | {"metadata": kept | new["metadata"]}


def _without_marks(cell: Cell) -> Cell:
    metadata = cell.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    return cell | {"metadata": {k: v for k, v in kept.items() if k not in ("nbgrader", "kvlearn")}}


def _notebook(mine: Notebook, new: Notebook, cells: list[Cell]) -> Notebook:
    """The cells with the learner's metadata of the notebook (kernel, editor), and ours of the unit."""
    theirs = mine.get("metadata")
    metadata = new["metadata"] | (theirs if isinstance(theirs, dict) else {})
    ours = {key: value for key, value in new["metadata"].items() if key == "kvlearn"}
    used: set[str] = set()
    named = []
    for cell in cells:  # the format wants an id for each cell, and no two alike
        name = cell.get("id")
        if not isinstance(name, str) or not name or name in used:
            name = uuid.uuid4().hex[:8]
        used.add(name)
        named.append(cell | {"id": name})
    version = {key: new[key] for key in ("nbformat", "nbformat_minor") if key in new}
    return mine | {"cells": named, "metadata": metadata | ours} | version
