"""The command line: help, version, completion, JSON, exit codes, and refusals that take no second."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvlearn import __version__
from kvlearn.cli import EXIT_CODES, PRESETS, STUDIES, app

COMMANDS = sorted(str(command.callback.__name__) for command in app.registered_commands if command.callback)
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def kvlearn(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvlearn", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )


def in_one_line(text: str) -> str:
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", text).split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_a_help_that_says_the_exit_codes(command: str, option: str) -> None:
    result = kvlearn(*filter(None, [command, option]))
    assert result.exit_code == 0
    assert in_one_line(EXIT_CODES) in in_one_line(result.stdout)


def test_the_version_is_the_packages() -> None:
    result = kvlearn("--version")
    assert (result.exit_code, result.stdout) == (0, f"kvlearn {__version__}\n")


def test_without_a_command_the_commands_are_listed() -> None:
    result = kvlearn()
    assert all(command in result.output for command in COMMANDS)


def test_the_readme_names_every_command_and_exit_code() -> None:
    for command in COMMANDS:
        assert f"kvlearn {command}" in README, command
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"\b{code}\b", README.split("exit code", 1)[1].split("\n\n")[0]), code


def test_a_bare_study_lists_the_studies() -> None:
    result = kvlearn("study")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(STUDIES)
    assert kvlearn("study", "--list").stdout == result.stdout
    listed = json.loads(kvlearn("study", "--json").stdout)
    assert {each["name"]: each["about"] for each in listed} == STUDIES


WRONG = {
    "nosuch": 2,
    "study nosuch": 2,
    "study base --tier A": 2,
    "study quality --preset nosuch": 2,
    "study quality --json": 2,
    "study base --record": 2,
    "start nosuch": 2,
    "reset 01.99": 2,
    "reset nosuch": 2,
    "grade nosuch": 1,
    "grade nosuch other.ipynb --json": 1,
    "grade nosuch --watch": 1,
    "progress nosuch": 1,
    "doctor --nosuch": 2,
    "bench nosuch": 2,
    "bench full --small --record": 2,
}
WITHOUT_TORCH = """
import contextlib, io, json, sys, time
from kvlearn.cli import app
for wrong in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            app(wrong.split(), prog_name="kvlearn")
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "nbclient", "nbformat", "matplotlib"} & set(sys.modules))
    print(json.dumps([wrong, code, out.getvalue(), err.getvalue(), heavy, time.process_time()]))
"""


def test_what_is_written_wrongly_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """All in one process: what the first command imports would be seen at each."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(list(WRONG)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = {wrong: rest for wrong, *rest in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(WRONG)
    before = 0.0
    for wrong, (code, out, said, heavy, seconds) in found.items():
        assert code == WRONG[wrong], f"{wrong}: {said}"
        assert heavy == [], wrong
        assert said.strip(), f"{wrong}: a refusal says why"
        assert seconds - before < 4, f"{wrong}: {seconds - before:.1f} s of processor time"
        before = seconds
        if "--json" in wrong and code == 1:
            assert json.loads(out) == []


def test_a_wrong_name_is_told_the_right_ones() -> None:
    for wrong, expected in (
        (("study", "nosuch"), "expected one of base, speed"),
        (("study", "quality", "--preset", "nosuch"), f"expected one of {', '.join(PRESETS)}"),
        (("start", "nosuch"), "expected one of 01_full_attention"),
        (("reset", "01.99"), "expected one of 01.1, 01.2"),
    ):
        assert expected in in_one_line(kvlearn(*wrong).output)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("kvlearn sta", ["start"]),
        ("kvlearn start 0", ["01_full_attention", "02_shared_kv"]),
        ("kvlearn reset 01.", ["01.1", "01.9"]),
        ("kvlearn study window", ["window_quality"]),
        ("kvlearn grade --j", ["--json"]),
    ],
)
def test_the_shell_completes(typed: str, expected: list[str]) -> None:
    environment = {
        "_KVLEARN_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="kvlearn")
    offered = result.stdout.split()
    assert set(expected) <= set(offered), result.output


def test_the_shells_script_is_shown() -> None:
    done = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_KVLEARN_COMPLETE=complete_bash" in done.stdout


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvlearn.grading.course.survey", interrupted)
    assert kvlearn("progress").exit_code == 130


@pytest.mark.parametrize("arguments", [["--help"], ["grade", "nosuch"], ["reset", "nosuch"], ["study", "-h"]])
def test_no_color_is_honoured(arguments: list[str]) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38|48)[0-9;]*m")
    plain = process(*arguments, FORCE_COLOR="1", NO_COLOR="1")
    assert not coloured.search(plain.stdout + plain.stderr)
    if "--help" in arguments:
        assert coloured.search(process(*arguments, FORCE_COLOR="1").stdout), "this test can fail"
