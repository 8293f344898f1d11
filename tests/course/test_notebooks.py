"""Rules for every notebook of the course, so that its outputs are those of the code."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*/*.ipynb"))
HEADINGS = [
    "The question",
    "Predict",
    "Build",
    "Prove",
    "Measure",
    "Break it",
    "What it saves, what it costs",
    "Exercises",
    "Read further",
]
LONGEST_CELL = 40
Notebook = dict[str, Any]

every_notebook = pytest.mark.parametrize(
    "path", CHAPTERS + SOLUTIONS, ids=lambda path: str(path.relative_to(ROOT))
)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Notebook) -> str:
    return "".join(cell["source"])


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(cells: list[Notebook]) -> str:
    return "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")


def outputs(notebook: Notebook) -> list[Notebook]:
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def test_the_course_has_notebooks() -> None:
    assert CHAPTERS
    assert SOLUTIONS


@every_notebook
def test_every_cell_was_run_once_in_order(path: Path) -> None:
    """nbval passes a cell that was never run, whatever it prints; this test does not."""
    counts = [cell["execution_count"] for cell in code_cells(read(path)) if source(cell).strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


@every_notebook
def test_no_output_is_an_error_or_a_warning(path: Path) -> None:
    for output in outputs(read(path)):
        assert output["output_type"] != "error", output.get("evalue")
        assert output.get("name") != "stderr", "".join(output["text"])


@every_notebook
def test_what_a_cell_prints_is_in_one_piece(path: Path) -> None:
    """In pieces it would differ from run to run, and some viewers put a gap between them."""
    for cell in code_cells(read(path)):
        streams = [output.get("name") for output in cell["outputs"]]
        assert not any(a == b is not None for a, b in pairwise(streams)), "make notebooks joins them"


@every_notebook
def test_every_picture_has_alt_text(path: Path) -> None:
    notebook = read(path)
    for output in outputs(notebook):
        data, metadata = output.get("data", {}), output.get("metadata", {})
        for kind in [kind for kind in data if kind.startswith("image/")]:
            alt = metadata.get("alt") or metadata.get(kind, {}).get("alt")
            assert alt, f"a figure without alt text: {data.get('text/plain')}"
    html = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs(notebook)]
    for tag in re.findall(r"<img\b[^>]*>", prose(notebook["cells"]) + "\n".join(html)):
        assert re.search(r"""\balt=["'][^"']+["']""", tag), f"{tag[:200]} has no alt text"
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", prose(notebook["cells"])):
        assert alt.strip(), f"the picture {target[:100]} has no alt text"


@every_notebook
def test_every_cell_fits_on_a_screen(path: Path) -> None:
    for cell in code_cells(read(path)):
        lines = source(cell).splitlines()
        assert len(lines) <= LONGEST_CELL, f"{len(lines)} lines in the cell that begins {lines[0]!r}"


@every_notebook
def test_the_kernel_is_the_one_that_make_env_registers(path: Path) -> None:
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["nbformat"] == 4


@every_notebook
def test_nothing_of_the_machine_that_ran_it_is_kept(path: Path) -> None:
    notebook = read(path)
    assert set(notebook["metadata"].get("language_info", {})) <= {"name"}, "run `make notebooks`"
    for cell in notebook["cells"]:
        assert "execution" not in cell["metadata"], "time stamps change with every run: `make notebooks`"
    for output in outputs(notebook):
        widget = output.get("data", {}).get("application/vnd.jupyter.widget-view+json", {"model_id": ""})
        assert widget["model_id"] == "", "a widget's id changes with every run: `make notebooks`"


@every_chapter
def test_a_chapter_says_first_what_to_know_and_how_long_it_takes(path: Path) -> None:
    opening = prose(read(path)["cells"][:3])
    assert opening.startswith("# "), "a chapter opens with its title"
    assert re.search(r"\b(know|knows|before|prerequisites?|you need)\b", opening, re.IGNORECASE)
    assert re.search(r"\d+ ?(min|minutes|h|hours?)\b", opening)


@every_chapter
def test_a_chapter_reads_in_the_order_of_the_course(path: Path) -> None:
    number = int(path.stem[:2])
    if not 1 <= number <= 11:
        pytest.skip("only 01 to 11 follow the pattern")
    titles = re.findall(r"^## +(?:\d+[.) ] *)?(.+)$", prose(read(path)["cells"]), re.MULTILINE)
    found = [heading for title in titles for heading in HEADINGS if title.startswith(heading)]
    assert found == HEADINGS


def test_generated_exercises_pass_lint(tmp_path: Path) -> None:
    """The learner's starting point is clean; the learner's own code is never linted."""
    from kvlearn.grading import catalogue, work

    for unit in catalogue.unit_names(ROOT / "solutions"):
        (tmp_path / f"{unit}.ipynb").write_bytes(work.to_bytes(work.derived(unit)))
    for command in (["check"], ["format", "--check"]):
        ruff = [
            sys.executable,
            "-m",
            "ruff",
            *command,
            "--config",
            str(ROOT / "pyproject.toml"),
            str(tmp_path),
        ]
        result = subprocess.run(ruff, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
