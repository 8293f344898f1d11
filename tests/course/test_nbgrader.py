"""A teacher's path: nbgrader itself, on three submissions, gives the grades that ``kvlearn grade`` gives."""

import csv
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kvlearn.grading import units
from kvlearn.grading.catalogue import nbgrader_of, unit_names
from kvlearn.grading.commands import grade
from kvlearn.grading.grader import Grader
from kvlearn.grading.sandbox import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("nbgrader"),  # one course for all of them
    pytest.mark.skipif(find_spec("nbgrader") is None, reason="needs the extra kvlearn[teach]"),
]

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = ROOT / "solutions"
# A plain one and Triton's; all with HYPOTHESIS_PROFILE=thorough. Full marks of the others: nbval, and
# test_exercises.py, which generates all of them too.
EVERY = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
UNITS = [unit for unit in unit_names(SOLUTIONS) if EVERY or unit[:2] in ("04", "11")]
DECLARED = {unit.name: unit for unit in units()}
COLLECT = 'c.FileNameCollectorPlugin.named_regexp = r".*/(?P<student_id>[a-z]+)-(?P<file_id>.*)"\n'
PATIENT = (
    "c.ExecutePreprocessor.timeout = c.Execute.timeout = 900\n"  # 30 s, where others use the machine, are few
)
Notebook = dict[str, Any]


# Its own command line, several commands in one process: starting it takes longer than most commands.
RUN = """import sys
from nbgrader.apps.nbgraderapp import NbGraderApp
for command in sys.argv[1:]:
    NbGraderApp.launch_instance(command.split())
    NbGraderApp.clear_instance()
    for app, _ in NbGraderApp.subcommands.values():
        app.clear_instance()
"""


def nbgrader(course: Path, *commands: str) -> None:
    """Run commands of nbgrader, apart from the settings of the person who runs the test."""
    apart = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(course / "home") for name in apart}
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # it calls alembic
    )
    environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", RUN, *commands],
        cwd=course,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def answered(released: Notebook, solved: Notebook, student: str) -> Notebook:
    """A student's submission: blank, half (right, empty, right, wrong, …) or full."""
    notebook = json.loads(json.dumps(released))
    answers = {cell["id"]: cell["source"] for cell in solved["cells"] if nbgrader_of(cell).get("solution")}
    if student == "half":
        kept = list(answers)[::2]
        wrong = list(answers)[-1:]
        answers = {name: answers[name] for name in kept} | {name: ["def nothing(): ...\n"] for name in wrong}
    if student == "blank":
        answers = {}
    for cell in notebook["cells"]:
        cell["source"] = answers.get(cell["id"], cell["source"])
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course in which every unit was released, handed in, collected, graded and exported by nbgrader."""
    course = tmp_path_factory.mktemp("course")
    (course / "nbgrader_config.py").write_text((ROOT / "nbgrader_config.py").read_text() + COLLECT + PATIENT)
    shutil.copytree(SOLUTIONS, course / "solutions", ignore=shutil.ignore_patterns(".*"))
    nbgrader(course, *(f"generate_assignment {unit}" for unit in UNITS))
    for unit in UNITS:
        released = json.loads((course / "exercises" / unit / f"{unit}.ipynb").read_text("utf-8"))
        solved = json.loads((SOLUTIONS / unit / f"{unit}.ipynb").read_text("utf-8"))
        archive = course / "downloaded" / unit / "archive"
        archive.mkdir(parents=True)
        # Blank and half once; each further unit costs only a full submission.
        for student in ("blank", "half", "full") if unit == UNITS[0] else ("full",):
            handed_in = json.dumps(answered(released, solved, student))
            (archive / f"{student}-{unit}.ipynb").write_text(handed_in, encoding="utf-8")
    graded = [f"{step} {unit}" for unit in UNITS for step in ("zip_collect", "autograde")]
    nbgrader(course, *graded, "export --to grades.csv")
    return course


def test_plain_nbgrader_releases_the_notebooks_and_nothing_else(course: Path) -> None:
    source = {file.name for unit in UNITS for file in (course / "solutions" / unit).iterdir()}
    assert source >= {"checks.py", "mistakes.py"}
    released = {file for file in (course / "exercises").rglob("*") if file.is_file()}
    assert released == {course / "exercises" / unit / f"{unit}.ipynb" for unit in UNITS}


def test_nbgrader_and_kvlearn_give_the_same_grades(course: Path) -> None:
    with (course / "grades.csv").open(encoding="utf-8") as file:
        theirs = {
            (row["student_id"], row["assignment"]): (float(row["score"]), float(row["max_score"]))
            for row in csv.DictReader(file)
            if row["score"] and (course / "submitted" / row["student_id"] / row["assignment"]).exists()
        }
    limits = Limits(seconds=900, setup=900, total=7200)  # others may use the machine
    submitted = [course / "submitted" / student for student in ("blank", "half")]
    reports, faults = grade(submitted, Grader(solutions=SOLUTIONS, limits=limits))
    ours = {(report.student, report.unit): (report.score, report.max_score) for report in reports}
    assert not faults
    assert ours == {who: grades for who, grades in theirs.items() if who[0] != "full"}
    blank, half = (ours[student, UNITS[0]] for student in ("blank", "half"))
    assert blank[0] == 0
    assert 0 < half[0] < half[1]

    # test_exercises.py holds that kvlearn gives full marks to all solutions.
    points = {unit: sum(e.points for e in declared.exercises) for unit, declared in DECLARED.items()}
    full = {unit: grades for (student, unit), grades in theirs.items() if student == "full"}
    assert full == {unit: (points[unit], points[unit]) for unit in UNITS}


def test_grading_leaves_the_submissions_as_they_were(course: Path) -> None:
    for file in sorted((course / "downloaded").glob("*/archive/*.ipynb")):
        student, unit = file.stem.split("-", 1)
        assert (course / "submitted" / student / unit / f"{unit}.ipynb").read_bytes() == file.read_bytes()
