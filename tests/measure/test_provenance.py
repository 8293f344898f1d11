"""A measurement says where it comes from, and nothing that is private."""

import getpass
import json
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from kvlearn.measure import collect_provenance, provenance
from kvlearn.measure.provenance import commit, machine, slug

git_only = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVLEARN_COMMIT", raising=False)
    monkeypatch.delenv("KVLEARN_DIRTY", raising=False)


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", "-C", str(root), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.json").write_text("{}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


@git_only
def test_a_clean_tree_has_its_commit(repository: Path) -> None:
    assert commit(repository) == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}


@git_only
def test_recording_results_does_not_make_the_tree_dirty(repository: Path) -> None:
    (repository / "results" / "old.json").write_text("[]\n")
    (repository / "results" / "new.json").write_text("{}\n")
    (repository / "ignored").write_text("x\n")
    assert commit(repository)["dirty"] is False


@git_only
@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_a_change_or_a_new_file_makes_it_dirty(repository: Path, name: str) -> None:
    (repository / name).write_text("2\n")
    assert commit(repository)["dirty"] is True


@git_only
def test_git_comes_before_the_environment(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLEARN_COMMIT", "abc")
    assert commit(repository)["commit"] == git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize(("text", "dirty"), [("1", True), ("true", True), ("0", False), ("false", False)])
def test_without_git_the_environment_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, dirty: bool
) -> None:
    assert commit(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("KVLEARN_COMMIT", "abc123")
    monkeypatch.setenv("KVLEARN_DIRTY", text)
    assert commit(tmp_path) == {"commit": "abc123", "dirty": dirty}


def test_without_the_program_git_a_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) == {"commit": None, "dirty": None}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("AMD EPYC 9554 64-Core Processor", "amd-epyc-9554"),
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "intel-xeon-platinum-8370c"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "amd-ryzen-7-7840u-w-radeon-780m-graphics"),
        ("Apple M3 Pro", "apple-m3-pro"),
        ("NVIDIA H200", "nvidia-h200"),
        ("", "unknown"),
    ],
)
def test_a_machine_is_a_slug_of_its_model(model: str, expected: str) -> None:
    assert slug(model) == expected


def test_the_record_is_complete_and_private_things_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "read_bandwidth", lambda _: 12345.6)
    record = collect_provenance()
    assert record["machine"] == machine() == slug(record["machine"])
    assert record["read_bandwidth_measured"] == 12346
    assert record["versions"]["python"] == platform.python_version()
    assert set(record["versions"]) >= {"torch", "triton", "numpy"}
    text = json.dumps(record).lower()
    for private in (socket.gethostname(), str(Path.home()), str(Path(__file__).parents[2])):
        assert private.lower() not in text
    assert f'"{getpass.getuser().lower()}"' not in text
