"""Jupyter's settings in the course's own environment, and the notebooks that it trusts."""

import json
import logging
import subprocess
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbformat.sign import MemorySignatureStore, NotebookNotary

from kvlearn.jupyter import settings, trust

ROOT = Path(__file__).resolve().parents[2]


def test_nbgrader_is_off_for_learners_and_on_for_teachers(tmp_path: Path) -> None:
    settings.write(tmp_path)
    for folder, teach in ((tmp_path, False), (tmp_path / "teach", True)):
        page = json.loads((folder / "labconfig/page_config.json").read_text())
        assert page["disabledExtensions"]["@jupyter/nbgrader"] is not teach
        server = json.loads((folder / "jupyter_server_config.d/nbgrader_kvlearn.json").read_text())
        extensions = server["ServerApp"]["jpserver_extensions"]
        assert set(extensions.values()) == {teach}
        assert len(extensions) == 4


def test_the_switches_are_read_after_nbgraders_own() -> None:
    assert sorted(["nbgrader.json", "nbgrader_kvlearn.json"])[-1] == "nbgrader_kvlearn.json"
    names = {name.rpartition("/")[2] for name in settings.files(teach=False)}
    assert "nbgrader_kvlearn.json" in names


def test_the_page_extension_is_what_jupyterlab_looks_for() -> None:
    folder = ROOT / "kvlearn/jupyter/labextension"
    build = json.loads((folder / "package.json").read_text())["jupyterlab"]["_build"]
    assert (folder / build["load"]).is_file()


def test_pages_made_by_nbconvert_have_alt_text() -> None:
    figure = {
        "output_type": "display_data",
        "data": {"image/png": "iVBORw0KGgo="},
        "metadata": {"image/png": {"alt": 'bars, "A" < B', "width": 10}},
    }
    bare = {**figure, "metadata": {}}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", outputs=[nbformat.from_dict(figure), nbformat.from_dict(bare)])]
    )
    page, _ = HTMLExporter(template_name="kvlearn").from_notebook_node(notebook)
    images = BeautifulSoup(page, "html.parser").find_all("img")
    assert images[0]["alt"] == 'bars, "A" < B'
    assert [image["src"] for image in images] == 2 * ["data:image/png;base64,iVBORw0KGgo="]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    for name in ("kept.ipynb", "edited.ipynb", "deep/er.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(nbformat.writes(notebook))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "notebooks"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "edited.ipynb").write_text(nbformat.writes(notebook) + "\n\n")
    (tmp_path / "strange.ipynb").write_text(nbformat.writes(notebook))
    return tmp_path


def test_only_committed_unchanged_notebooks_are_trusted(repository: Path) -> None:
    found = {path.relative_to(repository).as_posix() for path in trust.committed(repository)}
    assert found == {"kept.ipynb", "deep/er.ipynb"}


def test_no_checkout_and_a_folder_of_another_one_trust_nothing(repository: Path, tmp_path: Path) -> None:
    assert trust.committed(repository / "deep") == []
    assert trust.committed(repository / "nowhere") == []


def test_they_are_signed_and_a_broken_one_is_left_out(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (repository / "kept.ipynb").write_text("{")
    subprocess.run(["git", "-C", str(repository), "add", "."], check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, "commit", "-qm", "broken"], cwd=repository, check=True)
    notary = NotebookNotary(secret=b"secret", store_factory=MemorySignatureStore)
    trust.sign_committed(notary, logging.getLogger("test"), repository)
    good = nbformat.read(repository / "deep/er.ipynb", as_version=4)
    assert notary.check_signature(good)
    assert "kept.ipynb is not trusted" in caplog.text
    good.cells[0].source = "2"
    assert not notary.check_signature(good)
