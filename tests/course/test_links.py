"""Every link inside the repository leads somewhere, and every command that the README names exists."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("solutions/*/*.ipynb")]
PAGES = [*ROOT.glob("*.md"), *NOTEBOOKS]


def prose(page: Path) -> str:
    """The text of a page without its code: `table[name](x)` is no link."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def leads_to(page: Path, target: str) -> Path:
    """The file of a link; a learner's copy in work/ counts as there when the exercise is."""
    return page.parent / target.split("#")[0].replace("../work/", "../exercises/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target and not target.startswith("#"):
            assert leads_to(page, target).exists(), f"{target} leads nowhere"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_notebook_lead_to_files_because_jupyterlab_opens_no_folder(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target and not target.startswith("#"):
            assert leads_to(page, target).is_file(), f"{target} is a folder"


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    cli = (ROOT / "kvlearn" / "cli.py").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z]+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for command in re.findall(r"(?:`|bin/)kvlearn ([a-z]+)", readme):
        assert f"def {command}(" in cli, f"kvlearn {command}"
