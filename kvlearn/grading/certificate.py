"""``kvlearn progress --html``: a page with what a learner has solved, and the picture of their own model.

``work/.kvlearn/board.json`` holds the points of that picture, as "Your model" of the last unit measured them.
The page needs nothing else: styles and picture are in it.
"""

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from kvlearn import html
from kvlearn.grading import records
from kvlearn.grading.folders import STATE, own_copy
from kvlearn.grading.overview import SIGNS, Progress, UnitLine
from kvlearn.grading.report import STYLE

SCHEMA = 1
MOST = 40  # points of a picture
NUMBERS = ("bytes", "loss", "error")
LEFT, RIGHT = "text-align: left; overflow-wrap: anywhere", "text-align: right; white-space: nowrap"
NOTE = (
    "The points are those of the checks that ran in this copy of the course; they were recorded where the "
    "answers were written, and nobody supervised it."
)


@dataclass(frozen=True)
class Board:
    """The points of a picture of bytes against loss, and the exercise that they belong to.

    Each point has a ``name``, ``bytes`` per token, ``loss`` and its ``error`` in nats per byte, ``whose``
    ("yours" or "ours"), and ``front``: no other point beats it.
    """

    exercise: str
    points: Sequence[Mapping[str, Any]]


def file_of(work: Path) -> Path:
    return work / STATE / "board.json"


def keep_points(exercise: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Remember the points in a learner's copy; elsewhere nothing happens. It never raises."""
    with suppress(Exception):
        work = own_copy(exercise)
        if work is not None:
            content = {"schema": SCHEMA, "exercise": exercise, "points": list(points)}
            records.write(file_of(work), (json.dumps(content, indent=1) + "\n").encode())


def read_points(work: Path) -> Board | None:
    """The points that ``keep_points`` has written; None if there are none or they cannot be read."""
    try:
        content = json.loads(file_of(work).read_text("utf-8"))
        if content["schema"] != SCHEMA:
            return None
        points = [_point(each) for each in content["points"][:MOST]]
        return Board(str(content["exercise"]), points) if points else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _point(each: Mapping[str, Any]) -> dict[str, Any]:
    """A point with sound values. ValueError, KeyError or TypeError if it has none."""
    numbers = {name: float(each[name]) for name in NUMBERS}
    if not all(map(math.isfinite, numbers.values())) or numbers["bytes"] <= 0 or numbers["error"] < 0:
        raise ValueError(f"expected finite numbers, bytes above 0, got {numbers}")
    whose = "yours" if each["whose"] == "yours" else "ours"
    return {"name": str(each["name"])[:60], "whose": whose, "front": each["front"] is True, **numbers}


def page(progress: Progress, board: Board | None = None, date: str = "") -> str:
    """The page. ``board`` is shown if its exercise is solved; ``date`` is today unless given."""
    shown = progress.shown
    lines = [line for unit in shown for line in unit.exercises]
    score, most = (sum(getattr(line, name) for line in lines) for name in ("score", "max_score"))
    n_solved = sum(line.status == "passed" for line in lines)
    solved = {line.id for line in lines if line.status == "passed"}
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>kvlearn: what I solved</title><style>{STYLE}</style></head><body>",
        "<h1>kvlearn: what I solved</h1>",
        f"<p>{_meter(score, most)} in {n_solved} of {len(lines)} exercises solved, "
        f"on {escape(date or time.strftime('%Y-%m-%d'))}.</p>",
        _units(shown),
    ]
    if board is not None and board.exercise in solved:
        parts.append(_picture(board))
    parts += [_exercises(unit) for unit in shown if unit.score or unit.counts()["attempted"]]
    return "\n".join([*parts, f"<p><small>{NOTE}</small></p>", "</body></html>\n"])


def _meter(score: float, most: float) -> str:
    points = f"{score:g} of {most:g} points"
    return f'<meter max="{most:g}" value="{score:g}">{points}</meter> {points}'


def _units(units: Sequence[UnitLine]) -> str:
    rows = [
        (
            each.unit,
            f"{each.counts()['solved']} / {len(each.exercises)}",
            html.Cell(_meter(each.score, each.max_score)),
            str(each.hints or ""),
        )
        for each in units
    ]
    return html.table(("unit", "solved", "points", "hints"), rows, styles=(LEFT, RIGHT, LEFT, RIGHT))


def _exercises(unit: UnitLine) -> str:
    rows = [
        (f"{e.id} {e.title}".strip(), f"{e.score:g} / {e.max_score:g}", f"{SIGNS[e.status]} {e.status}")
        for e in unit.exercises
    ]
    head = f"<h2>{escape(unit.unit)}</h2>"
    return head + html.table(("exercise", "points", "status"), rows, styles=(LEFT, RIGHT, LEFT))


def _picture(board: Board) -> str:
    """The picture, and its numbers in a table."""
    from kvlearn.plots.workbench import bytes_against_loss  # matplotlib takes a second to import

    picture = bytes_against_loss(board.points)
    png = base64.b64encode(picture.png()).decode()
    rows = [
        (
            each["name"],
            "mine" if each["whose"] == "yours" else "kvlearn's",
            f"{each['bytes']:,.0f}",
            f"{each['loss']:.3f}",
            "yes" if each["front"] else "",
        )
        for each in board.points
    ]
    columns = ("mechanism", "whose", "bytes per token", "loss, nats per byte", "on the front")
    return (
        f"<h2>My model: bytes against loss ({escape(board.exercise)})</h2>"
        f'<p style="background: white; padding: .5rem"><img alt="{escape(picture.alt, quote=True)}" '
        f'src="data:image/png;base64,{png}" style="max-width: 100%"></p>'
        + html.table(columns, rows, styles=(LEFT, LEFT, RIGHT, RIGHT, LEFT))
    )
