"""Workflows, containers and the syllabus name only what exists; what cannot run here is at least parsed."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_workflows_and_containers_call_targets_of_the_makefile() -> None:
    assert {path.stem for path in WORKFLOWS} == {"test", "grade", "release"}
    texts = [step.get("run", "") for path in WORKFLOWS for step in steps(path)]
    texts += [
        (ROOT / name).read_text()
        for name in ("Dockerfile", ".ci/run", ".devcontainer/devcontainer.json", ".binder/postBuild")
    ]
    called = {name for text in texts for name in re.findall(r"(?:^|&& |RUN |\")make ([a-z]+)", text, re.M)}
    called |= set(re.findall(r'"make", "([a-z]+)"', (ROOT / "Dockerfile").read_text()))
    assert {"env", "test", "quick", "lab"} <= called <= TARGETS


def test_continuous_integration_and_containers_use_what_the_course_supports() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required == ">=3.11"
    test = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert test["jobs"]["linux"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    thorough = test["jobs"].pop("thorough")
    assert thorough["env"] == {"HYPOTHESIS_PROFILE": "thorough"}
    assert thorough["if"] == "github.event_name == 'schedule'"
    for job in test["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert job["if"] == "github.event_name != 'schedule'"
    gitlab = yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text())
    assert gitlab["test"]["script"] == ["bash .ci/run"]
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert yaml.safe_load((ROOT / ".binder" / "environment.yml").read_text())["name"] == "kvlearn"


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".binder" / "postBuild"], ids=lambda path: path.name)
def test_shell_of_workflows_parses(path: Path) -> None:
    scripts = [path.read_text()] if path.suffix != ".yml" else [step.get("run", "") for step in steps(path)]
    for script in scripts:
        plain = re.sub(r"\$\{\{.*?\}\}", "1", script)
        done = subprocess.run(["bash", "-n"], input=plain, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{script}"


def test_the_readme_says_of_every_way_in_whether_it_was_tried() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]?[\w, ]+) \| .* \| (yes|no).* \|$", readme, re.MULTILINE)
    ways = {"pip", "uv", "Docker", "Codespaces, dev containers", "Colab", "Binder", "Windows"}
    assert {way for way, _ in rows} == ways
    (sentence,) = re.findall(r"`\.github/workflows/.*?untried", readme)
    for path in (*WORKFLOWS, ROOT / ".gitlab-ci.yml"):
        assert path.name in sentence


def test_the_wheel_carries_units_results_and_chapters() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried == {name: f"kvlearn/_{name}" for name in ("solutions", "results", "notebooks")}


def test_citation_and_changelog_have_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings
    assert headings[0] == "Unreleased" or headings[0].startswith(version)


def test_pre_commit_calls_what_lint_calls() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        tool = hook["entry"].removeprefix(".venv/bin/").split()[:2]
        assert " ".join(word for word in tool if not word.startswith("-")) in lint[1]


def test_the_syllabus_names_every_chapter_and_only_exercises_that_exist() -> None:
    text = (ROOT / "TEACHING.md").read_text()
    chapters = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert chapters <= set(re.findall(r"^\| (\d\d) ", text, re.MULTILINE))
    given = {
        id
        for path in (ROOT / "solutions").glob("*/*.ipynb")
        for id in re.findall(r'"exercise": "(\d\d\.\d+)"', path.read_text())
    }
    named = set(re.findall(r"\b(\d\d\.\d)\b", text.split("## Eight weeks")[1]))
    assert named
    assert named <= given
