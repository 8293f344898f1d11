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
  included. Each must apply exactly once to what the edits above it have left. Lines indented further continue
  ``new``, and stand in the source as deep as the line that holds ``old``. A long edit may have its arrow on
  the second line (``old``, then ``    → new``). Nothing after the arrow deletes ``old``.
- **Code without an arrow**: the new body of the exercise's function; or, where it begins with ``def``,
  ``class`` or a decorator, definitions that replace those of the same name (needed where an exercise asks for
  several functions or a class; the others stay right).

The code sees what the answer sees, the notebook's set-up cells, and the names handed to ``mistakes`` beside
the table. It is compiled when the unit is loaded (a row that does not fit is an error that names it), and run
when a diagnosis needs it.
"""

import ast
import linecache
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
    edits: list[list[str]] = []
    for line in lines:
        if not line.startswith(" "):
            edits.append([])
        edits[-1].append(line)
    source = right
    for first, *more in edits:
        if ARROW not in first and more and more[0].lstrip().startswith(ARROW):
            first, more = f"{first} {more[0].lstrip()}", more[1:]
        old, arrow, new = (part.strip() for part in first.partition(ARROW))
        if not (old and arrow):
            raise ValueError(f"expected 'old {ARROW} new', got {first!r}")
        if source.count(old) != 1:
            raise ValueError(f"{old!r}: expected once in the right answer, found {source.count(old)} times")
        before = source[: source.index(old)].rpartition("\n")[2]
        indent = before[: len(before) - len(before.lstrip())]
        added = textwrap.indent(textwrap.dedent("\n".join(more)), indent) if more else ""
        source = source.replace(old, f"{new}\n{added}" if new and added else new or added.strip())
    return source


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
    """What the code defines under the names of the answers, run after the set-up cells."""
    space = {**_set_up(tuple(set_up)), **names}
    exec(code, space)
    return tuple(space[answer] for answer in answers)
