"""Finished results of whole notebooks, kept so that a run that was interrupted continues where it stopped.

Each notebook's results are a file of their own, written in one step: any number of processes, also on several
machines, may share the folder. The file's name is a hash of all that the results depend on: the learner's
cells, the unit, this version of kvlearn and what it runs on, and the limits. A notebook that has changed
since is graded again under another name.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, astuple
from functools import cache
from importlib import metadata
from pathlib import Path

import kvlearn
from kvlearn.grading import records
from kvlearn.grading.report import Result
from kvlearn.grading.sandbox import Limits
from kvlearn.grading.submission import Task

SCHEMA = 1


class Kept:
    """The results in ``folder``, or, without one, in memory. OSError if there can be no such folder.

    ``again`` leaves what the folder holds unread; new results replace it.
    """

    def __init__(self, folder: Path | None = None, *, again: bool = False) -> None:
        self.folder, self.again = folder, again
        self._here: dict[str, list[Result]] = {}
        self.n_unchanged = 0  # notebooks that needed no run
        self.fault = ""  # why results could not be written, if so
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def key(self, unit: str, solutions: Path, tasks: Sequence[Task], limits: Limits) -> str:
        """The name of a notebook's results. Parts that are not run, such as outputs, do not count."""
        answers = [[task.id, task.points, task.pieces, task.missing, task.turned] for task in tasks]
        parts = [SCHEMA, version(), unit_version(solutions / unit), astuple(limits), answers]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def get(self, key: str, tasks: Sequence[Task]) -> list[Result] | None:
        """The results, one for each task; None if there are none in order."""
        results = self._here.get(key)
        if results is None and self.folder is not None and not self.again:
            results = _read(self.folder / f"{key}.json", tasks)
        self.n_unchanged += results is not None
        return results

    def put(self, key: str, results: list[Result]) -> None:
        """Keep a notebook's results. A full disk costs only the next run its time."""
        if self.folder is None:
            self._here[key] = results
            return
        content = {"schema": SCHEMA, "results": [asdict(result) for result in results]}
        try:
            records.write(self.folder / f"{key}.json", (json.dumps(content) + "\n").encode())
        except OSError as error:
            self.fault = f"{self.folder}: {error.strerror or error}; results are not kept"


def _read(file: Path, tasks: Sequence[Task]) -> list[Result] | None:
    try:
        results = [Result(**each) for each in json.loads(file.read_text("utf-8"))["results"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if len(results) != len(tasks):
        return None
    in_order = all(result.is_of(task.id, task.points) for result, task in zip(results, tasks, strict=True))
    return results if in_order else None


@cache
def version() -> str:
    """Of kvlearn, as a hash of its code (a checkout changes without a new number), of Python and torch."""
    home = Path(kvlearn.__file__).parent
    numbers = [kvlearn.__version__, platform.python_version(), platform.machine()]
    with suppress(metadata.PackageNotFoundError):
        numbers.append(metadata.version("torch"))
    return _hash(home, sorted(home.rglob("*.py")), numbers)


@cache
def unit_version(folder: Path) -> str:
    """Of a unit: its checks, mistakes and notebook."""
    return _hash(folder, sorted([*folder.glob("*.py"), *folder.glob("*.ipynb")]), [])


def _hash(home: Path, files: Sequence[Path], words: Sequence[str]) -> str:
    found = hashlib.sha256("\0".join(words).encode())
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        found.update(f"\0{file.relative_to(home)} {content}".encode())
    return found.hexdigest()[:32]
