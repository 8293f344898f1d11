"""Set-up: one pinned list for every way to install, and a clear message where it cannot work."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(pin.name): pin for pin in map(Requirement, (x for x in LINES if x[0] != "-"))}


def test_the_list_installs_the_course_with_every_extra() -> None:
    (editable,) = [line for line in LINES if line.startswith("-")]
    extras = PROJECT["optional-dependencies"]
    todo, brought = editable.removeprefix("-e .[").removesuffix("]").split(","), set[str]()
    while todo:  # an extra may ask for others
        brought.add(extra := todo.pop())
        todo += [each for line in extras[extra] for each in Requirement(line).extras if "kvlearn" in line]
    assert brought == set(extras)


def test_everything_is_pinned_to_one_version() -> None:
    assert len(PINS) == len(LINES) - 1, "a package is in the list twice"
    for pin in PINS.values():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is not pinned"
        assert not pin.url, f"{pin} names an address"


def test_pins_satisfy_what_the_package_asks_for() -> None:
    wanted = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
    for requirement in map(Requirement, wanted):
        if requirement.name == "kvlearn":
            continue
        version = str(PINS[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert version in requirement.specifier, f"pin {version} does not satisfy {requirement}"


def test_triton_is_for_linux_and_cuda_is_left_to_torch() -> None:
    assert str(PINS["torch"].specifier) == "==2.13.0"
    assert str(PINS["triton"].specifier) == "==3.7.1"
    assert PINS["triton"].marker is not None
    assert not PINS["triton"].marker.evaluate({"sys_platform": "darwin"})
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-"))]


def test_the_list_is_complete() -> None:
    """All requirements of the installed packages are pinned too, except torch's own CUDA packages."""
    todo, seen = [("kvlearn", frozenset(PROJECT["optional-dependencies"]))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add((name, extras))
        assert name == "kvlearn" or name in PINS, f"{name} is installed but not in requirements.txt"
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in extras or {""}]
            if needed.marker is None or any(needed.marker.evaluate(env) for env in environments):
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))


def test_conda_and_make_install_the_same_list() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "kvlearn"
    assert {re.split("[=<>]", package)[0] for package in conda} == {"python", "pip"}
    assert pip == {"pip": ["-r requirements.txt"]}
    assert "pip install --disable-pip-version-check -r requirements.txt" in (ROOT / "Makefile").read_text()


def test_a_fresh_clone_holds_every_folder_that_the_package_is_built_from() -> None:
    """Git keeps no empty folder, and the build stops at a missing one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    kept = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if kept.returncode:
        pytest.skip("not a git checkout")
    for folder in SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]:
        assert f"\n{folder}/" in f"\n{kept.stdout}", f"{folder}/ is empty"


# A network on which nobody answers.
CLOSED = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "100", "PIP_FIND_LINKS": ""}

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without MAKEFLAGS of a `make test` around us, which would leak its own variables in.
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=outer | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def script(folder: Path, body: str) -> str:
    path = folder / "python-of-the-test"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The lines of kvlearn itself on stderr; make adds its own `*** Error 1`."""
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    return line


@needs_make
@pytest.mark.parametrize(
    "target", ["env", "lab", "teach", "test", "quick", "grade", "bench", "study", "notebooks"]
)
def test_every_target_makes_a_missing_or_stale_environment_first(checkout: Path, target: str) -> None:
    assert "pip install" in make(checkout, "-n", target).stdout
    binaries = checkout / ".venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    (checkout / ".venv/.ready").touch()
    assert "pip install" not in make(checkout, "-n", target).stdout
    assert "pip install" in make(checkout, "-n", "-W", "requirements.txt", target).stdout
    assert "pip install" in make(checkout, "-n", "-W", "pyproject.toml", target).stdout


@needs_make
def test_torch_comes_from_the_address_that_is_given(checkout: Path) -> None:
    assert "--extra-index-url" not in make(checkout, "-n", "env").stdout
    told = make(checkout, "-n", "env", "TORCH_INDEX=http://127.0.0.1:9/cpu").stdout
    assert '-r requirements.txt \\\n  --extra-index-url "http://127.0.0.1:9/cpu"' in told
    assert 'echo "http://127.0.0.1:9/cpu" >.venv/.ready' in told
    assert 'echo "http://127.0.0.1:9/cpu" >.venv/.torch-index' in told


@needs_make
def test_an_address_that_was_given_is_used_again_when_the_list_changes(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.torch-index").write_text("http://127.0.0.1:9/cpu\n")
    told = make(checkout, "-n", "-W", "requirements.txt", "env").stdout
    assert '--extra-index-url "http://127.0.0.1:9/cpu"' in told
    assert 'echo "http://127.0.0.1:9/cpu" >.venv/.ready' in told


@needs_make
def test_an_environment_made_without_that_address_is_not_passed_off_as_one_with_it(checkout: Path) -> None:
    binaries = checkout / ".venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    for made_with, given, fine in (("", "", True), ("a", "", True), ("a", "a", True), ("", "a", False)):
        (checkout / ".venv/.ready").write_text(f"{made_with}\n")
        result = make(checkout, "env", f"TORCH_INDEX={given}")
        assert (result.returncode == 0) is fine
        assert fine or "make clean" in one_line(result)


@needs_make
def test_a_python_that_is_too_old_gives_one_line(checkout: Path) -> None:
    old = script(checkout, "exit 1")  # what the version check answers there
    assert "needs Python 3.11" in one_line(make(checkout, "env", f"PYTHON={old}"))
    assert not (checkout / ".venv").exists()


@needs_make
def test_a_missing_venv_module_gives_one_line(checkout: Path) -> None:
    bare = script(checkout, f'[ "$1" = -m ] && mkdir -p .venv/bin && exit 1\nexec "{sys.executable}" "$@"')
    assert "python3-venv" in one_line(make(checkout, "env", f"PYTHON={bare}"))
    assert not (checkout / ".venv").exists(), "a half-made environment was left behind"


@needs_make
@pytest.mark.slow
def test_a_set_up_that_was_killed_is_made_anew(checkout: Path) -> None:
    """python is there, pip is not, or not all of it: a kill while .venv is being made leaves either."""
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    offline = {**CLOSED, "PIP_CONFIG_FILE": os.devnull}
    result = make(checkout, "env", f"PYTHON={sys.executable}", **offline)
    assert "pip in .venv does not work (ModuleNotFoundError: No module named 'pip')" in result.stdout
    assert "pip cannot fetch packages" in one_line(result)
    result = make(checkout, "env", f"PYTHON={sys.executable}", **offline)
    assert "does not work" not in result.stdout
    (file,) = (checkout / ".venv").glob("lib/python*/site-packages/pip/_internal/req/constructors.py")
    file.unlink()
    fails = script(checkout, f'[ "$1" = -m ] && exit 1\nexec "{sys.executable}" "$@"')
    result = make(checkout, "env", f"PYTHON={fails}", **offline)
    assert "pip in .venv does not work (files of pip are missing)" in result.stdout
    assert "cannot make a virtual environment" in one_line(result)
    assert not (checkout / ".venv").exists()


@needs_make
@pytest.mark.slow
def test_a_failed_download_gives_one_line_and_no_stamp(checkout: Path) -> None:
    """In seconds, by one request; pip alone would repeat each of its own for minutes."""
    result = make(checkout, "env", f"PYTHON={sys.executable}", **CLOSED, PIP_CONFIG_FILE=os.devnull)
    assert "check network and disk" in one_line(result)
    assert "refused" in one_line(result)  # the reason
    assert "installing" not in result.stdout
    assert not (checkout / ".venv/.ready").exists()
    assert "pip install" in make(checkout, "-n", "env").stdout


def test_every_make_target_a_reader_is_told_of_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "solutions").glob("*/*.ipynb"),
    ]
    for page in pages:
        for target in re.findall(r"`(?:[A-Z]+=\S+ )*make ([a-z]+)", page.read_text()):
            assert target in targets, f"{page.name} names `make {target}`, which the Makefile lacks"


def test_the_package_that_is_asked_for_first_is_in_the_list() -> None:
    (name,) = re.findall(r"grep -m1 '\^([\w-]+)==' requirements.txt", (ROOT / "Makefile").read_text())
    assert name in PINS


@needs_make
def test_the_error_of_a_venv_that_cannot_be_made_is_said(checkout: Path) -> None:
    full = script(
        checkout,
        f'[ "$1" = -m ] && echo "No space left on device" >&2 && exit 1\nexec "{sys.executable}" "$@"',
    )
    assert "(No space left on device)" in one_line(make(checkout, "env", f"PYTHON={full}"))
