"""``kvlearn doctor`` says what is there, what is wrong, and what to do about it."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvlearn.cli import app
from kvlearn.measure import doctor
from kvlearn.measure.doctor import Finding
from kvlearn.measure.report import print_findings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_bandwidth", lambda device: 35.2e9)


def test_the_report_names_everything_once() -> None:
    findings = doctor.examine()
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    assert {"python", "torch", "memory", "memory bandwidth", "GPU", "free disk", "browser test"} <= set(names)
    by_name = {finding.name: finding for finding in findings}
    assert by_name["memory bandwidth"].value == "35.2 GB/s, measured now, reading"
    assert all(finding.advice for finding in findings if finding.status == "wrong")


def test_a_missing_or_old_package_is_wrong_and_says_what_to_do() -> None:
    missing, old, fine = doctor.requirements(["no-such-package>=1", "torch>=99", "torch>=2.11"])
    assert (missing.status, missing.value) == ("wrong", "missing, needed: no-such-package>=1")
    assert "pip install 'no-such-package>=1'" in missing.advice
    assert old.status == "wrong"
    assert "needed: torch>=99" in old.value
    assert (fine.status, fine.advice) == ("ok", "")


def test_extras_are_not_required() -> None:
    names = {finding.name for finding in doctor.requirements(doctor.own_requirements())}
    assert {"torch", "numpy", "typer"} <= names
    assert not names & {"jupyterlab", "pytest", "nbgrader"}


def test_pins_that_are_not_met_are_named(tmp_path: Path) -> None:
    assert doctor.pins(tmp_path).value == "no requirements.txt here"
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# pins\n-e .[lab]\n--find-links=x\n"
        f"numpy=={doctor.installed('numpy')}  # a comment\n"
        "no-such==1 ; sys_platform == 'other'\n"
    )
    assert doctor.pins(tmp_path) == doctor.Finding("software", "pins", "all 1 of requirements.txt met")
    path.write_text("torch==0.1\nno-such==2\n")
    found = doctor.pins(tmp_path)
    assert (found.status, found.advice) == ("note", f"make -C {tmp_path} env")
    assert f"torch {doctor.installed('torch')} (pinned ==0.1), no-such missing (pinned ==2)" in found.value


def test_it_knows_where_it_runs(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "course", tmp_path / "elsewhere"
    (root / "notebooks").mkdir(parents=True)
    elsewhere.mkdir()
    assert doctor.place(root, root)[1:] == ("make lab", "make env")
    assert doctor.place(root, root / "notebooks")[1:] == ("make -C .. lab", "make -C .. env")
    outside = doctor.place(root, elsewhere)
    assert outside.lab == f"make -C {root} lab"
    assert "outside" in outside.name
    wheel = doctor.place(None, elsewhere)
    assert wheel.lab == "kvlearn start, then: jupyter lab"
    assert "make" not in " ".join(wheel)


def test_an_installed_package_is_never_told_of_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "checkout", lambda: None)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    monkeypatch.chdir(tmp_path)
    findings = doctor.software()
    assert {finding.name for finding in findings} >= {"runs in", "jupyterlab", "pins"}
    assert not [finding for finding in findings if "make" in finding.value + finding.advice]


def test_low_disk_is_measured_against_what_an_environment_takes() -> None:
    gb = 10**9
    assert doctor.free_disk(6 * gb, cuda=True).status == "ok"
    assert doctor.free_disk(3 * gb, cuda=False).status == "ok"
    assert doctor.free_disk(2 * gb, cuda=False).status == "note"
    low = doctor.free_disk(3 * gb, cuda=True)
    assert (low.status, low.value) == ("note", doctor.format_bytes(3 * gb))
    assert "5.6 GB, 2.7 GB with a CPU build" in low.advice


@pytest.mark.parametrize(
    ("triton", "cuda", "compiler", "said"),
    [
        (True, True, True, "compiled, on the GPU"),
        (True, True, False, "no C compiler"),
        (True, False, True, "interpreter"),
        (False, False, True, "cells without kernels"),
    ],
)
def test_how_kernels_run(triton: bool, cuda: bool, compiler: bool, said: str) -> None:
    assert said in doctor.kernels(triton, cuda, compiler).value


def test_the_command_exits_0_when_nothing_is_wrong() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "memory bandwidth" in done.output


def test_the_command_exits_1_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "own_requirements", lambda: ["torch>=99"])
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "pip install 'torch>=99'" in done.output


def test_programs_get_json() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    findings = json.loads(done.output)
    assert {"section", "name", "value", "status", "advice"} == set(findings[0])


def test_brackets_in_a_finding_are_printed_not_taken_for_style() -> None:
    console = Console(width=200, record=True, file=StringIO())
    advice = "pip install 'kvlearn[lab]'"
    print_findings([Finding("software", "name[red]", "value[red]", "note", advice)], console)
    printed = console.export_text()
    assert advice in printed
    assert "name[red]" in printed
    assert "value[red]" in printed
