"""The table of mistakes: known wrong answers, each written as what it changes in the right one.

    attend.mistakes(
        r'''
        scaled by d_model
            q.shape[-1] ** -0.5 → (q.shape[1] * q.shape[-1]) ** -0.5
        Why this is wrong, in two sentences, over as many lines as they need.

        masked after the softmax
            weights = scores.masked_fill(~mask, -torch.inf) → weights = scores
            return weights @ v → weights = weights.masked_fill(~mask, 0.0)
                return weights @ v
        Why …

        the mean of the values
            return v.mean(dim=2, keepdim=True).expand_as(q)
        Why …
        ''',
        helper=helper,
    )

A row is a name, the code (indented by four), and why it is wrong; an empty line ends it. Rows become
misconceptions in their order. The code is one of two things:

- **Edits** ``old → new`` of the right answer: of the source of the solution's cell, signature and docstring
  included. Each must apply exactly once to what the edits above it have left. Lines indented by four more
  continue ``new``; in the source they are as deep as the line in which ``old`` begins. ``old`` may be
  several lines, whatever their depth, and the arrow may begin a line of its own, indented. Nothing after the
  arrow deletes ``old``:

        self.max_len = max_len
        self.length = 0
            → KVCache.max_len = max_len
              KVCache.length = 0

- **Code without an arrow**: the new body of the exercise's function; or, where it begins with ``def``,
  ``class`` or a decorator, definitions that replace those of the same name (needed where an exercise asks for
  several functions or a class; the others stay right).

The code sees what the answer sees, the notebook's set-up cells, and the names handed to ``mistakes`` beside
the table. It is compiled when the unit is loaded (a row that does not fit is an error that names it), and run
when a diagnosis needs it.
"""

import ast
import linecache
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

ARROW = "→"


class Row(NamedTuple):
    """One row of the table; ``code`` is dedented."""

    name: str
    code: str
    why: str


def parse(table: str) -> Iterator[Row]:
    """The rows of a table. ValueError if a row lacks a name, code or a reason."""
    rows: list[list[str]] = [[]]
    lines = textwrap.dedent(table).strip("\n").split("\n")
    for i, line in enumerate(lines):
        following = next((later for later in lines[i + 1 :] if later.strip()), "")
        if line.strip():
            rows[-1].append(line)
        elif following.startswith(" "):  # an empty line within code
            rows[-1].append("")
        else:
            rows.append([])
    for name, *rest in filter(None, rows):
        code = [line for line in rest if not line or line.startswith(" ")]
        why = [line for line in rest if line and not line.startswith(" ")]
        if name.startswith(" ") or not code or not why or rest != code + why:
            raise ValueError(
                f"row {name.strip()!r}: expected a name, then indented code, then why it is wrong"
            )
        yield Row(name, textwrap.dedent("\n".join(code)).strip("\n"), " ".join(" ".join(why).split()))


def wrong_source(right: str, row: Row) -> str:
    """The source of the wrong answer. ValueError names the edit that does not apply exactly once."""
    lines = row.code.split("\n")
    if not any(ARROW in line for line in lines):
        return replaced(right, row)
    source = right
    for old, new in edits(lines):
        found = re.findall(r"\n *".join(map(re.escape, old)), source)
        if len(found) != 1:
            text = "\n".join(old)
            raise ValueError(f"{text!r}: expected once in the right answer, found {len(found)} times")
        before = source[: source.index(found[0])].rpartition("\n")[2]
        indent = before[: len(before) - len(before.lstrip())]
        source = source.replace(found[0], f"\n{indent}".join(new))
    return source


def edits(lines: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """The lines of (old, new), edit by edit."""
    old: list[str] = []
    new: list[str] = []
    depth = 0  # of the lines that continue new
    for line in lines:
        here = len(line) - len(line.lstrip())
        before, arrow, after = (part.strip() for part in line.partition(ARROW))
        begins_new = arrow and not (here and before)
        if new and (begins_new or (line and not here)):
            yield old, new
            old, new = [], []
        if begins_new:
            old += [before] if before else []
            new, depth = [after], here + 2 if here else 4
        elif new:
            new.append(line[min(here, depth) :])
        elif not here:
            old.append(line)
        if not old or (here and not new):
            raise ValueError(f"expected 'old {ARROW} new', got {line.strip()!r}")
    if not new:
        raise ValueError(f"expected 'old {ARROW} new', got {' '.join(old)!r}")
    yield old, new


def replaced(right: str, row: Row) -> str:
    """The right answer with another body, or with other definitions after its own, which take their place."""
    if row.code.startswith(("def ", "class ", "@")):
        return f"{right}\n\n\n{row.code}\n"
    functions = [node for node in ast.parse(right).body if isinstance(node, ast.FunctionDef)]
    if len(functions) != 1:
        raise ValueError("expected definitions (def, class), since the answer is not one function")
    head = right.split("\n")[: functions[0].body[0].lineno - 1]
    return "\n".join([*head, textwrap.indent(row.code, "    ")]) + "\n"


def compiled(source: str, name: str) -> CodeType:
    """Code whose lines can be looked up, as those of a notebook's cell: Triton reads a kernel's source."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return compile(source, name, "exec")


@cache
def _set_up(cells: tuple[str, ...]) -> Mapping[str, Any]:
    space: dict[str, Any] = {"__name__": "kvlearn_units"}
    for i, cell in enumerate(cells):
        exec(compiled(cell, f"<set-up {i} of {hash(cells)}>"), space)
    return space


def run(
    code: CodeType, set_up: Sequence[str], names: Mapping[str, Any], answers: Sequence[str]
) -> tuple[Any, ...]:
    """The objects that the code defines under the names of the answers, run after the set-up cells."""
    space = {**_set_up(tuple(set_up)), **names}
    exec(code, space)
    return tuple(space[answer] for answer in answers)
