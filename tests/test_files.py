"""Files are written whole or not at all; one that cannot be read or written is named with the reason."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from kvlearn import files


def test_two_writers_of_one_path_do_not_touch_each_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.pt"
    with files.replacing("checkpoint", path) as first:
        first.write_text("first")
        with files.replacing("checkpoint", path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def record(name: str) -> Any:
        function = getattr(os, name)
        return lambda *arguments: (done.append(name), function(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, record(name))
    with files.replacing("path", tmp_path / "x") as partial:
        partial.write_text("content")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_what_was_there(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    path.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(files.os, at, full)
    with (
        pytest.raises(OSError, match=r"checkpoint: could not write .*run\.pt: No space left") as refused,
        files.replacing("checkpoint", path) as partial,
    ):
        partial.write_bytes(b"half")
    assert refused.value.errno == errno.ENOSPC
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"path: could not write .*file/x: "),
        files.replacing("path", tmp_path / "file" / "x"),
    ):
        pytest.fail("the block ran")


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^here: expected JSON: .+"):
            files.read_json("here", path)
    path.write_text('{"é": 1}', encoding="utf-8")
    assert files.read_json("here", path) == {"é": 1}


@pytest.mark.xdist_group("together")
def test_a_group_of_tests_has_one_worker(request: pytest.FixtureRequest) -> None:
    """The group is part of the id by which pytest-xdist shares tests out."""
    grouped = bool(getattr(request.config.option, "loadgroup", False))
    assert request.node.nodeid.endswith("@together") is grouped
