"""Copies for Colab: they install first and are otherwise the course's notebooks; badges come and go whole."""

import json
import re
from pathlib import Path
from typing import Any

import colab
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[2]
HERE = "https://github.com/someone/kvlearn"
OPENS = "https://colab.research.google.com/github/someone/kvlearn/blob/colab"
CHAPTERS = sorted(ROOT.glob("notebooks/*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text("utf-8"))["cells"])


def without_targets(cell: dict[str, Any]) -> dict[str, Any]:
    """A markdown cell with its links' words alone; any other cell as it is."""
    if cell["cell_type"] != "markdown":
        return cell
    text = colab.BADGE.sub("", "".join(cell["source"]))
    return {**cell, "source": colab.LINK.sub(r"[\2]()", text)}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colab")
    colab.copies(folder, "v1.2.3", HERE)
    return folder


def test_every_notebook_is_copied_and_only_its_links_change(copied: Path) -> None:
    originals = [*CHAPTERS, *ROOT.glob("exercises/*/*.ipynb")]
    assert len(originals) == len(list(copied.rglob("*.ipynb"))) > 25
    for original in originals:
        copy = copied / original.relative_to(ROOT)
        nbformat.validate(nbformat.read(copy, as_version=4))
        assert [*map(without_targets, cells(copy)[1:])] == [*map(without_targets, cells(original))]


def test_links_of_the_copies_open_copies_or_files_of_the_tag(copied: Path) -> None:
    seen = set()
    for copy in copied.rglob("*.ipynb"):
        for cell in cells(copy):
            if cell["cell_type"] == "markdown":
                found = colab.LINK_OR_CODE.findall("".join(cell["source"]))
                seen |= {target for _, _, target in found if target and not target.startswith("#")}
    ours = {target for target in seen if "someone/kvlearn" in target}
    assert all(re.match("https?://", target) for target in seen)
    assert f"{OPENS}/notebooks/02_shared_kv.ipynb" in ours
    assert f"{OPENS}/exercises/02_shared_kv/02_shared_kv.ipynb" in ours
    assert f"{HERE}/blob/v1.2.3/kvlearn/kernels/decode.py" in ours
    for target in ours:
        file = target.removeprefix(f"{OPENS}/").removeprefix(f"{HERE}/blob/v1.2.3/")
        assert (ROOT / file).exists(), target


def test_the_first_cell_installs_the_tag_in_colab_and_does_nothing_elsewhere(copied: Path) -> None:
    for copy in copied.rglob("*.ipynb"):
        first = cells(copy)[0]
        assert first["cell_type"] == "code"
        assert first["outputs"] == []
        assert f"git+{HERE}@v1.2.3" in "".join(first["source"])
    python = TransformerManager().transform_cell("".join(first["source"]))
    asked: list[str] = []

    class Shell:
        def run_line_magic(self, magic: str, line: str) -> None:
            asked.append(f"{magic} {line}")

    exec(python, {"get_ipython": Shell})
    assert asked == []
    exec(python.replace('"google.colab" in', '"json" in'), {"get_ipython": Shell})
    assert asked == [f'pip install -q "kvlearn[hf,kernels,plots,study] @ git+{HERE}@v1.2.3"']


def test_the_installed_extras_exist() -> None:
    from kvlearn.extras import EXTRAS

    named = re.search(r"kvlearn\[([\w,]+)\]", colab.INSTALL)
    assert named is not None
    assert set(named[1].split(",")) == set(EXTRAS.values()) - {"lab"}


def test_badges_open_the_copies_and_are_removed_whole() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    plain = colab.with_badges(readme, "")
    assert "Open in Colab](" not in plain
    shown = colab.with_badges(plain, HERE)
    assert shown.count(f"]({OPENS}/notebooks/") == len(CHAPTERS)
    assert colab.with_badges(shown, HERE) == shown
    assert colab.with_badges(shown, "") == plain
    for path in CHAPTERS:
        name = path.relative_to(ROOT).as_posix()
        text = colab.with_badge("".join(cells(path)[0]["source"]), name, "")
        shown = colab.with_badge(text, name, HERE)
        assert shown.splitlines()[2].endswith(f"]({OPENS}/{name})")
        assert colab.with_badge(shown, name, HERE) == shown
        assert colab.with_badge(shown, name, "https://gitlab.com/someone/kvlearn") == text


def test_a_chapter_is_written_as_jupyter_writes_it() -> None:
    for path in CHAPTERS:
        assert colab.as_text(json.loads(path.read_text("utf-8"))) == path.read_text("utf-8")


def test_copies_need_a_repository_on_github(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"repository: expected https://github\.com/OWNER/NAME"):
        colab.copies(tmp_path, "v1.2.3", "")
    assert not list(tmp_path.iterdir())
