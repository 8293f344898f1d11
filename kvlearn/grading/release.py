"""exercises/ from solutions/: what learners get, and the pristine form that answers are graded in.

``python -m kvlearn.grading.release`` (``make exercises``) writes exercises/ with nbgrader, and never over a
learner's work: a file that differs from git's HEAD stays as it is and is named.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvlearn.grading.folders import nbgrader_of, solutions_root, unit_names

STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stub(cell: dict[str, Any]) -> str:
    """A cell's source as nbgrader releases it: solution regions cut out."""
    lines: list[str] = []
    inside = cleared = False
    for line in cell["source"].split("\n"):
        if "BEGIN SOLUTION" in line:
            inside = cleared = True
            indent = re.match(r"\s*", line)
            lines += [(indent.group() if indent else "") + part for part in STUB]
        elif "END SOLUTION" in line:
            inside = False
        elif not inside:
            lines.append(line)
    if nbgrader_of(cell).get("solution") and not cleared:
        lines = list(STUB) if cell["cell_type"] == "code" else ["YOUR ANSWER HERE"]
    return "\n".join(lines)


def generate(unit: str, solutions: Path) -> dict[str, bytes]:
    """The files of exercises/UNIT, made by nbgrader in a temporary course; the same bytes everywhere.

    That is UNIT.ipynb alone: checks and mistakes, which lie beside the source, stay with the teacher.
    """
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as course:
        source = Path(course, "solutions", unit, f"{unit}.ipynb")
        source.parent.mkdir(parents=True)
        shutil.copy(solutions / unit / source.name, source)
        config = Config()
        config.CourseDirectory.root = course
        config.CourseDirectory.source_directory = "solutions"
        config.CourseDirectory.release_directory = "exercises"
        config.CourseDirectory.assignment_id = unit
        config.GenerateAssignment.no_database = True
        config.SaveCells.enabled = False  # with the line above, what --no-db does
        config.GenerateAssignment.force = True
        converter = GenerateAssignment(coursedir=CourseDirectory(config=config), config=config)
        converter.log.setLevel("ERROR")
        converter.start()
        made = Path(course, "exercises", unit)
        return {str(file.relative_to(made)): _tidy(file) for file in made.rglob("*") if file.is_file()}


def _tidy(file: Path) -> bytes:
    """A notebook without what depends on who ran it last."""
    notebook = json.loads(file.read_text("utf-8"))
    ours = {key: value for key, value in notebook["metadata"].items() if key == "kvlearn"}
    notebook["metadata"] = METADATA | ours
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
    return (json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def committed(path: Path) -> bytes | None:
    """The file's content in git's HEAD; None where there is no git, no commit yet or no such file in it."""
    command = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    try:
        shown = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return None
    return shown.stdout if shown.returncode == 0 else None


def release(solutions: Path, exercises: Path) -> tuple[list[Path], list[Path]]:
    """Write every unit's files; returns those written, and those left alone because somebody changed them."""
    written: list[Path] = []
    left: list[Path] = []
    for unit in unit_names(solutions):
        for name, content in generate(unit, solutions).items():
            file = exercises / unit / name
            present = file.read_bytes() if file.exists() else None
            if present == content:
                continue
            if present is not None and present != committed(file):
                left.append(file)
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            written.append(file)
    return written, left


def main() -> None:
    solutions = solutions_root()
    exercises = solutions.parent / "exercises"
    written, left = release(solutions, exercises)
    for file in written:
        print(f"wrote {file.relative_to(exercises.parent)}")
    for file in left:
        name = file.relative_to(exercises.parent)
        print(
            f"left as it is: {name} differs from git's HEAD (delete it to have it made anew)", file=sys.stderr
        )
    print(f"{len(unit_names(solutions))} units, {len(written)} files written, {len(left)} left as they are")


if __name__ == "__main__":
    main()
