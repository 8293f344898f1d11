"""JupyterLab's own changes are never written to a notebook on disk; a person's changes always are."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.sign import MemorySignatureStore, NotebookNotary

from kvlearn.jupyter.saving import WIDGET_VIEW, Keeper, merge

Json = dict[str, Any]

STORED: Json = {
    "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "execution_count": 1,
            "id": "b",
            "metadata": {"tags": ["nbval-ignore-output"], "kvlearn": {"shows_only": True}},
            "outputs": [
                {"name": "stdout", "output_type": "stream", "text": ["one\n", "two\n"]},
                {
                    "data": {"image/png": "iVBORw0KGgo=\n", "text/plain": ["a figure"]},
                    "execution_count": 1,
                    "metadata": {"image/png": {"alt": "a figure", "width": 825}},
                    "output_type": "execute_result",
                },
                {
                    "data": {WIDGET_VIEW: {"model_id": "", "version_major": 2}, "text/plain": ["text"]},
                    "metadata": {},
                    "output_type": "display_data",
                },
            ],
            "source": ["first\n", "second"],
        },
        {
            "cell_type": "code",
            "execution_count": None,
            "id": "c",
            "metadata": {},
            "outputs": [],
            "source": [],
        },
    ],
    "metadata": {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "kvlearn": {"unit": "01"},
        "language_info": {"name": "python"},
    },
    "nbformat": 4,
    "nbformat_minor": 5,
}


def as_saved() -> Json:
    """The same notebook as JupyterLab sends it: texts joined, its own metadata added."""
    notebook = copy.deepcopy(STORED)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["metadata"]["trusted"] = True
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = "".join(output["text"])
            for kind, value in output.get("data", {}).items():
                output["data"][kind] = "".join(value) if isinstance(value, list) else value
    notebook["metadata"]["language_info"] = {
        "name": "python",
        "version": "3.12.1",
        "mimetype": "text/x-python",
    }
    return notebook


SPLIT = [{"name": "stdout", "output_type": "stream", "text": line} for line in ("one\n", "two\n")]

NOISE = {
    "nothing": {},
    "language_info gone": {"metadata/language_info": ...},
    "another display name": {"metadata/kernelspec/display_name": "Python 3.12"},
    "another kernel": {"metadata/kernelspec": {"name": "conda", "display_name": "conda"}},
    "widget state": {"metadata/widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"x": {}}}}},
    "a signature": {"metadata/signature": "sha256:0"},
    "another minor version": {"nbformat_minor": 4},
    "folded": {"cells/1/metadata/collapsed": True, "cells/1/metadata/jupyter": {"outputs_hidden": True}},
    "scrolled": {"cells/1/metadata/scrolled": True},
    "times of running": {"cells/1/metadata/execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"}},
    "run again, the same came out": {"cells/1/execution_count": 7, "cells/1/outputs/1/execution_count": 7},
    "run, nothing came out": {"cells/2/execution_count": 3},
    "a widget's new id": {f"cells/1/outputs/2/data/{WIDGET_VIEW.replace('/', '|')}/model_id": "4f2a"},
    "no attachments": {"cells/0/attachments": {}},
    "an image without its last newline": {"cells/1/outputs/1/data/image|png": "iVBORw0KGgo="},
}
CHANGES = {
    "source": {"cells/1/source": "first\nsecond edited"},
    "source, white space only": {"cells/1/source": "first\n second"},
    "markdown": {"cells/0/source": "# Title\ntext."},
    "an output's text": {"cells/1/outputs/0/text": "one\nthree\n"},
    "another stream": {"cells/1/outputs/0/name": "stderr"},
    "an image": {"cells/1/outputs/1/data/image|png": "iVBORw0KGgoAAA=="},
    "alt text": {"cells/1/outputs/1/metadata/image|png/alt": "another"},
    "an output less": {"cells/1/outputs/0": ...},
    "outputs cleared": {"cells/1/outputs": [], "cells/1/execution_count": None},
    "an error": {"cells/2/outputs": [{"output_type": "error", "ename": "E", "evalue": "x", "traceback": []}]},
    "a cell's type": {"cells/2/cell_type": "raw"},
    "a tag": {"cells/1/metadata/tags": []},
    "nbgrader's metadata": {"cells/1/metadata/nbgrader": {"grade_id": "u01-1"}},
    "an attachment": {"cells/0/attachments": {"x.png": {"image/png": "AAAA"}}},
    "a cell less": {"cells/2": ...},
    "the notebook's own metadata": {"metadata/kvlearn/unit": "02"},
    "a cell replaced by an equal one": {"cells/2/id": "d"},
}


def changed(edits: Json) -> Json:
    saved = as_saved()
    for path, value in edits.items():
        steps = [step.replace("|", "/") for step in path.split("/")]
        *way, last = [int(step) if step.isdigit() else step for step in steps]
        place: Any = saved
        for step in way:
            place = place[step]
        if value is ...:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return saved


@pytest.mark.parametrize("edits", NOISE.values(), ids=NOISE)
def test_noise_is_no_change(edits: Json) -> None:
    before = copy.deepcopy(STORED)
    assert merge(changed(edits), STORED) is None
    assert before == STORED


@pytest.mark.parametrize("edits", CHANGES.values(), ids=CHANGES)
def test_a_change_is_saved_whole(edits: Json) -> None:
    saved = changed(edits)
    merged = merge(saved, STORED)
    assert merged is not None
    assert len(merged["cells"]) == len(saved["cells"])
    for one, sent in zip(merged["cells"], saved["cells"], strict=True):
        assert one["source"] == sent["source"]
        assert one.get("execution_count") == sent.get("execution_count")
        assert one["id"] == sent["id"]
    for path, value in edits.items():
        place: Any = merged
        for step in path.split("/"):
            if value is not ...:
                place = place[int(step) if step.isdigit() else step.replace("|", "/")]
        assert value is ... or place == value
    assert merge(merged, changed(edits)) is None, "what is written is not what was sent"


def test_a_change_keeps_what_did_not_change() -> None:
    saved = changed({"cells/0/source": "edited", "cells/1/metadata/scrolled": True})
    saved["cells"][1]["outputs"][2]["data"][WIDGET_VIEW]["model_id"] = "4f2a"
    merged = merge(saved, STORED)
    assert merged is not None
    assert merged["metadata"] == STORED["metadata"]
    assert merged["cells"][1]["outputs"] == STORED["cells"][1]["outputs"]
    assert merged["cells"][1]["metadata"] == STORED["cells"][1]["metadata"] | {"trusted": True}


def test_a_change_of_kernel_and_widget_state_are_saved_with_a_change() -> None:
    kernel = {"name": "conda", "display_name": "conda"}
    saved = changed(
        {"cells/0/source": "edited", "metadata/kernelspec": kernel, "metadata/widgets": {"x": {}}}
    )
    saved["cells"][1]["outputs"][2]["data"][WIDGET_VIEW]["model_id"] = "4f2a"
    merged = merge(saved, STORED)
    assert merged is not None
    assert merged["metadata"]["kernelspec"] == kernel
    assert merged["metadata"]["widgets"] == {"x": {}}
    assert merged["cells"][1]["outputs"][2]["data"][WIDGET_VIEW]["model_id"] == "4f2a"


def test_cells_moved_or_inserted_keep_their_own_outputs() -> None:
    saved = as_saved()
    saved["cells"].reverse()
    saved["cells"].insert(0, {"cell_type": "markdown", "id": "new", "metadata": {}, "source": "new"})
    merged = merge(saved, STORED)
    assert merged is not None
    assert [cell["id"] for cell in merged["cells"]] == ["new", "c", "b", "a"]
    assert merged["cells"][2]["outputs"] == STORED["cells"][1]["outputs"]


def test_a_stream_may_be_divided_in_any_way() -> None:
    saved = as_saved()
    saved["cells"][1]["outputs"][:1] = copy.deepcopy(SPLIT)
    assert merge(saved, STORED) is None
    saved["cells"][1]["outputs"].insert(
        1, saved["cells"][1]["outputs"].pop(2)
    )  # the figure between the lines
    assert merge(saved, STORED) is not None


def test_an_old_format_whose_cells_have_no_ids_stays_as_it_is() -> None:
    stored = copy.deepcopy(STORED) | {"nbformat_minor": 4}
    for cell in stored["cells"]:
        del cell["id"]
    assert merge(as_saved(), stored) is None
    assert merge(changed(CHANGES["source"]), stored) is not None


class Contents:
    """As much of a contents manager as the hooks use, and its writer."""

    def __init__(self, root: Path) -> None:
        self.root, self.keeper = root, Keeper()
        self.notary = NotebookNotary(secret=b"secret", store_factory=MemorySignatureStore)

    def _get_os_path(self, path: str) -> str:
        return str(self.root / path)

    def save(self, content: Any, path: str = "n.ipynb", kind: str = "notebook") -> None:
        """One save from beginning to end."""
        for _ in self.steps(content, path, kind):
            pass

    def steps(self, content: Any, path: str = "n.ipynb", kind: str = "notebook") -> Iterator[None]:
        """A save that stops when it has begun to write, and when it has written."""
        model = {"type": kind, "content": content, "format": "json"}
        self.keeper.before(model=model, path=f"/{path}", contents_manager=self)
        file = self.root / path
        text = model["content"]
        if kind == "notebook":
            notebook = nbformat.from_dict(model["content"])
            if self.notary.check_cells(notebook):
                self.notary.sign(notebook)
            text = nbformat.writes(notebook, version=nbformat.NO_CONVERT)
        file.write_text(text[: len(text) // 2])
        yield
        file.write_text(text)
        yield
        self.keeper.after(model=model, os_path=str(file), contents_manager=self)


FORMS: dict[str, Callable[[Json], str]] = {
    "nbformat's": lambda notebook: nbformat.writes(nbformat.from_dict(notebook)) + "\n",
    "without a last newline": lambda notebook: json.dumps(notebook, indent=1),
    "on one line": json.dumps,
    "keys in another order": lambda notebook: json.dumps(dict(reversed(notebook.items())), indent=4),
    "with escapes": lambda notebook: json.dumps(notebook, indent=1, ensure_ascii=True) + "\n\n",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_file_keeps_its_bytes_in_any_form(form: Callable[[Json], str], tmp_path: Path) -> None:
    file, contents = tmp_path / "n.ipynb", Contents(tmp_path)
    stored = copy.deepcopy(STORED)
    stored["cells"][0]["source"] = ["· × ü\n", "text"]
    file.write_text(form(stored))
    raw = file.read_bytes()
    saved = as_saved()
    saved["cells"][0]["source"] = "· × ü\ntext"
    for _ in range(2):
        contents.save(saved)
        assert file.read_bytes() == raw
    saved["cells"][0]["source"] = "edited"
    contents.save(saved)
    assert json.loads(file.read_text())["cells"][0]["source"] == ["edited"]


@pytest.mark.parametrize("second", [{}, CHANGES["source"]], ids=["unchanged", "changed"])
def test_saves_may_overlap(second: Json, tmp_path: Path) -> None:
    file, contents = tmp_path / "n.ipynb", Contents(tmp_path)
    file.write_text(json.dumps(STORED))
    one, two = contents.steps(as_saved()), contents.steps(changed(second))
    next(one)
    next(two)  # begins over a half-written file
    half = file.read_bytes()
    assert next(one, "written") is None
    file.write_bytes(half)
    assert next(one, "ended") == "ended"
    assert file.read_bytes() == half, "the end of one save wrote into the other's file"
    assert list(two) == [None]
    if second:
        assert json.loads(file.read_text())["metadata"] == STORED["metadata"]
        assert merge(changed(second), json.loads(file.read_text())) is None
    else:
        assert file.read_text() == json.dumps(STORED)


def test_a_save_that_failed_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, contents = tmp_path / "n.ipynb", Contents(tmp_path)
    file.write_text(json.dumps(STORED))
    next(contents.steps(as_saved()))  # and never ends
    file.write_text(json.dumps(changed(CHANGES["source"])))  # by git
    monkeypatch.setattr(Keeper, "LONGEST", -1.0)
    raw = file.read_bytes()
    contents.save(changed(CHANGES["source"]))
    assert file.read_bytes() == raw


def test_a_new_a_broken_and_another_file_are_written_as_they_come(tmp_path: Path) -> None:
    contents = Contents(tmp_path)
    contents.save(as_saved())
    assert json.loads((tmp_path / "n.ipynb").read_text())["metadata"]["language_info"]["version"] == "3.12.1"
    for broken in ("<<<<<<< a merge conflict", "[]", "{}", ""):
        (tmp_path / "n.ipynb").write_text(broken)
        contents.save(as_saved())
        assert json.loads((tmp_path / "n.ipynb").read_text())["nbformat"] == 4
    contents.save("text", "n.txt", "file")
    assert (tmp_path / "n.txt").read_text() == "text"


@pytest.mark.parametrize("edits", [{}, CHANGES["source"], CHANGES["markdown"]], ids=["", "code", "markdown"])
def test_what_its_reader_trusts_is_trusted_when_it_is_opened_again(edits: Json, tmp_path: Path) -> None:
    file, contents = tmp_path / "n.ipynb", Contents(tmp_path)
    file.write_text(json.dumps(STORED))
    strange = changed(edits)
    for cell in strange["cells"]:
        cell["metadata"].pop("trusted", None)
    contents.save(strange)
    assert not contents.notary.check_signature(nbformat.read(file, as_version=4))
    contents.save(changed(edits))
    assert contents.notary.check_signature(nbformat.read(file, as_version=4))
