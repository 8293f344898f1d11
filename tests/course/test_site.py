"""The site's source: links lead somewhere, docstrings are valid reStructuredText, nothing needs a kernel."""

import ast
import json
import re
from pathlib import Path

import pytest
import source as SOURCE
from docutils.core import publish_doctree
from docutils.utils import Reporter

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "source"
    SOURCE.write(folder)
    return folder


def markdown(page: Path) -> str:
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_every_link_leads_to_a_page_of_the_site_or_to_an_address(site: Path) -> None:
    pages = [*site.rglob("*.md"), *site.rglob("*.ipynb")]
    assert len(pages) > 25
    for page in pages:
        text = re.sub(r"^```.*?^```", "", markdown(page), flags=re.MULTILINE | re.DOTALL)
        for target in LINK.findall(text):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"


def test_every_page_is_in_a_table_of_contents(site: Path) -> None:
    index = (site / "index.md").read_text()
    for page in site.rglob("*"):
        if page.suffix in {".md", ".ipynb", ".rst"} and page.name != "index.md":
            assert page.relative_to(site).with_suffix("").as_posix() in index.splitlines(), page


def test_outputs_need_no_kernel_pictures_have_words_and_no_solution_is_shown(site: Path) -> None:
    described = 0
    for page in site.rglob("*.ipynb"):
        text = page.read_text()
        assert "jupyter.widget-view" not in text
        assert "BEGIN SOLUTION" not in text
        described += sum("mystnb" in cell["metadata"] for cell in json.loads(text)["cells"])
    assert described > 20


def test_links_to_files_lead_to_the_repository_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = ROOT / "README.md"
    monkeypatch.setenv("KVLEARN_REPOSITORY", "https://github.com/someone/kvlearn")
    shown = SOURCE.with_links("see [the `code`](kvlearn/attention) and [01](notebooks/01_x.ipynb)", readme)
    assert shown == (
        "see [the `code`](https://github.com/someone/kvlearn/blob/main/kvlearn/attention) and "
        "[01](notebooks/01_x.ipynb)"
    )
    monkeypatch.setenv("KVLEARN_REPOSITORY", "")
    assert SOURCE.with_links("see [the code](kvlearn/attention)", readme) == "see the code"
    chapter = ROOT / "notebooks" / "01_x.ipynb"
    assert (
        SOURCE.with_links("[yours](../work/01_x/01_x.ipynb)", chapter)
        == "[yours](../exercises/01_x/01_x.ipynb)"
    )


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (
        ast.get_docstring(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)
    )
    return [text for text in found if text]


def test_every_docstring_becomes_valid_restructuredtext() -> None:
    texts = [
        text
        for package in SOURCE.PACKAGES
        for path in (ROOT / "kvlearn" / package).rglob("*.py")
        for text in docstrings(path)
    ]
    assert len(texts) > 1000
    settings = {
        "report_level": Reporter.WARNING_LEVEL,
        "halt_level": Reporter.WARNING_LEVEL,
        "warning_stream": False,
    }
    whole = []
    for text in texts:
        lines = text.splitlines()
        SOURCE.as_rst(lines)
        whole += [*lines, "", ".. next", ""]
    publish_doctree("\n".join(whole), settings_overrides=settings)


def test_equations_and_columns_stay_as_they_are_written() -> None:
    lines = [
        "Attention of *all* heads_.",
        "",
        "    y = softmax(q k*) v_",
        "",
        "a   b",
        "c   d",
        "",
        "As:",
        "- one `x`",
        "  more",
        "So.",
    ]
    SOURCE.as_rst(lines)
    assert lines == [
        "Attention of \\*all\\* heads\\_.", "",
        "::", "", "        y = softmax(q k*) v_", "",
        "::", "", "    a   b", "    c   d", "",
        "As:", "",
        "- one \\`x\\`", "  more", "",
        "So.", "",
    ]  # fmt: skip
