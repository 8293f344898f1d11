"""The records of a learner's work: the last result of each exercise, and the hints that were shown.

``work/.kvlearn/progress.json`` holds it. Only a kernel that runs in a learner's copy in work/ writes to it,
and ``kvlearn progress``: never a grader's kernel, nbgrader or a test. A result belongs to an answer, known by
a hash of its source, and to a version of the checks, known by theirs.
"""

import ast
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from kvlearn.grading import submission
from kvlearn.grading.folders import STATE, own_copy, solutions_root
from kvlearn.grading.submission import Task

if sys.platform != "win32":
    import fcntl

SCHEMA = 1
PATIENCE = 5.0  # seconds that a check waits for other kernels before it leaves its result unrecorded


@dataclass(frozen=True)
class Record:
    """The last result of one exercise: ``answer`` and ``checks`` are hashes of what was run."""

    answer: str
    checks: str
    score: float
    max_score: float
    status: str
    message: str = ""


@dataclass(frozen=True)
class Records:
    """Results and numbers of shown hints by exercise; the result of the latest check is the last."""

    results: Mapping[str, Record]
    hints: Mapping[str, int]


def file_of(work: Path) -> Path:
    return work / STATE / "progress.json"


def read(work: Path) -> Records:
    """The records in ``work``: empty if there is no such file or it is damaged."""
    content = _content(file_of(work)) or {}
    results: dict[str, Record] = {}
    for name, result in _mapping(content.get("results")).items():
        with suppress(TypeError, ValueError, KeyError):
            known: dict[str, Any] = {e.name: result[e.name] for e in fields(Record) if e.name in result}
            for number in ("score", "max_score"):
                known[number] = float(known[number])
            results[name] = Record(**known)
    shown = _mapping(content.get("hints"))
    return Records(results, {name: n for name, n in shown.items() if isinstance(n, int) and n > 0})


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _content(file: Path) -> dict[str, Any] | None:
    """The file as JSON; None where there is none or it is damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None


def update(work: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the file's content, one process at a time, and replace the file in one step.

    A damaged file is set aside. OSError if it cannot be written; TimeoutError if others hold it too long.
    """
    file = file_of(work)
    with locked(file.with_name("progress.lock"), PATIENCE):
        content = _content(file)
        if content is None and file.exists():
            file.rename(free(file.with_name("progress-damaged.json")))
        content = content or {"schema": SCHEMA}
        for part in ("results", "hints"):
            content[part] = _mapping(content.get(part))
        change(content)
        write(file, (json.dumps(content, indent=1, ensure_ascii=True) + "\n").encode())


@contextmanager
def locked(file: Path, patience: float) -> Iterator[None]:
    """Hold the lock of this name; TimeoutError if another process keeps it for ``patience`` seconds."""
    with file.open("ab") as lock:
        end = time.monotonic() + patience
        while sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"another kvlearn works here ({file})") from None
                time.sleep(0.01)
        yield


def write(file: Path, content: bytes) -> None:
    """Replace a file in one step: who reads it sees the old content or the new, and a full disk changes
    nothing. Its permissions stay, and a link still leads to it."""
    target = Path(os.path.realpath(file))
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        os.chmod(name, target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@cache
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def free(file: Path) -> Path:
    """The file's own name if it is free, else the first free one with a number."""
    for number in range(2, 10_000):
        if not file.exists():
            return file
        file = file.with_stem(f"{file.stem.removesuffix(f'-{number - 1}')}-{number}")
    raise FileExistsError(str(file))


def put(content: dict[str, Any], exercise: str, record: Record, *, latest: bool) -> None:
    """Note a result in the file's content; ``latest`` makes it the last one."""
    if latest:
        content["results"].pop(exercise, None)
    content["results"][exercise] = asdict(record)


def digest(sources: Sequence[str]) -> str:
    """Names an answer by the source of its cells, in order; blank ones do not count."""
    text = "\0".join(source.strip() for source in sources if source.strip())
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def answer_of(tasks: Sequence[Task], task: Task) -> str:
    """The hash of a notebook's answer: of every cell that the learner wrote for this exercise, and for those
    before it where its check reads them."""
    if not task.reads_answers:
        return digest(task.pieces)
    return digest([digest(each.pieces) for each in tasks[: tasks.index(task) + 1]])


@cache
def checks_of(unit: str, solutions: Path) -> str:
    """The hash of what grades a unit: its checks and the cells that learners are given."""
    tasks, _ = submission.tasks_of(unit, solutions)
    given = [source for task in tasks for source in (*task.setup, task.check)]
    return digest([(solutions / unit / "checks.py").read_text("utf-8"), *given])


def note(exercise: Any, score: Any, answers: Sequence[Any], unit_of: Callable[[], Any]) -> None:
    """Remember the score of a check that ran in a learner's copy; elsewhere nothing happens.

    It never raises: a result that cannot be written down is still shown. An answer whose source is not known
    is remembered under no hash, so that ``kvlearn progress`` runs it again.
    """
    with suppress(Exception):
        work = own_copy(exercise.id)
        if work is None:
            return
        unit = unit_of()
        answer = in_kernel(exercise, unit.exercises, answers)
        checks = checks_of(unit.name, solutions_root())
        points = (float(score), float(score.max_score))
        record = Record(answer, checks, *points, score.status, score.message)
        update(work, lambda content: put(content, exercise.id, record, latest=True))


def in_kernel(exercise: Any, others: Sequence[Any], answers: Sequence[Any]) -> str:
    """``answer_of`` as this kernel knows it: from the cells that it ran. Empty if it cannot tell.

    An answer is the last cells that define its names. Where the learner added cells that it uses, the
    notebook's hash is another one.
    """
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    shell = get_shell()
    if shell is None:
        return ""
    names, cells = shell.user_ns, list(shell.history_manager.input_hist_raw)
    if any(names.get(name) is not answer for name, answer in zip(exercise.answers, answers, strict=True)):
        return ""
    if not exercise.reads_answers:
        return digest(defining(cells, exercise.answers))
    ids = [each.id for each in others]
    read = others[: ids.index(exercise.id) + 1]
    return digest([digest(defining(cells, each.answers)) for each in read])


def defining(cells: Sequence[str], names: Sequence[str]) -> list[str]:
    """The cells that last defined these names, in their order."""
    found: set[int] = set()
    for name in names:
        last = [i for i, cell in enumerate(cells) if name in cell and name in _defined(cell)][-1:]
        found.update(last)
    return [cells[i] for i in sorted(found)]


@cache
def _defined(cell: str) -> frozenset[str]:
    """The names that a cell binds at its top level."""
    try:
        nodes: list[ast.AST] = list(ast.parse(cell).body)
    except (SyntaxError, ValueError, RecursionError):
        return frozenset()
    found: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif not isinstance(node, ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return frozenset(found)


def hints_shown(exercise: str, most: int) -> int:
    """How many hints of an exercise were shown in earlier kernels of the learner's copy."""
    with suppress(OSError):
        work = own_copy(exercise)
        if work is not None:
            return min(read(work).hints.get(exercise, 0), most)
    return 0


def hint_shown(exercise: str, number: int) -> None:
    """Remember that this hint was shown, if this is a learner's copy. It never raises."""

    def change(content: dict[str, Any]) -> None:
        before = content["hints"].get(exercise, 0)
        content["hints"][exercise] = max(number, before if isinstance(before, int) else 0)

    with suppress(Exception):
        work = own_copy(exercise)
        if work is not None:
            update(work, change)


def forget(work: Path, exercise: str) -> None:
    """Drop the result of an exercise; the hints that were shown stay."""
    update(work, lambda content: content["results"].pop(exercise, None))
