"""The course in Google Colab: copies of the notebooks that install kvlearn first, and badges that open them.

    python docs/colab.py copies FOLDER REF     REF: the tag or commit that the copies install
    python docs/colab.py badges                in README.md and the chapters, if the repository is on GitHub

The address of the repository is set in one place: KVLEARN_REPOSITORY, otherwise git's remote "origin". The
release workflow publishes FOLDER as the branch "colab", which the badges name. The course's own notebooks get
no cell that installs, because wherever else they run kvlearn is there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
LINK_OR_CODE = re.compile(rf"{LINK.pattern}|^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"(?:\n\n| )\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
ROW = re.compile(r"^\| \[[^\]]*\]\((notebooks/\w+\.ipynb)\)", re.MULTILINE)
INSTALL = """# In Colab this installs kvlearn, which takes a few minutes; elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "kvlearn[hf,kernels,plots,study] @ git+{repository}@{ref}\""""


def repository(root: Path) -> str:
    """The address of the repository on GitHub or GitLab, from git's remote; empty if it has none."""
    told = os.environ.get("KVLEARN_REPOSITORY")
    if told is not None:
        return told
    asked = ["git", "-C", str(root), "remote", "get-url", "origin"]
    url = subprocess.run(asked, check=False, capture_output=True, text=True).stdout.strip()
    found = re.fullmatch(r"(?:https://|git@)((?:github|gitlab)\.com)[:/](.+?)(?:\.git)?", url)
    return f"https://{found[1]}/{found[2]}" if found else ""


def in_colab(path: str, address: str) -> str:
    """Where Colab opens the copy of ``path``; empty for a repository that is not on GitHub."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    return f"{COLAB}/github/{found[1]}/blob/colab/{path}" if found else ""


def badge(path: str, address: str) -> str:
    """The badge in markdown, or nothing."""
    target = in_colab(path, address)
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target})" if target else ""


def with_badge(text: str, path: str, address: str) -> str:
    """The first cell of the notebook ``path`` with one badge, below its title."""
    title, *rest = BADGE.sub("", text).split("\n", 1)
    shown = badge(path, address)
    return "\n".join([title + (f"\n\n{shown}" if shown else ""), *rest])


def with_badges(readme: str, address: str) -> str:
    """The README with one badge after each chapter of its table."""

    def shown(row: re.Match[str]) -> str:
        return f"{row[0]} {badge(row[1], address)}".rstrip()

    return ROW.sub(shown, BADGE.sub("", readme))


def badges(address: str) -> None:
    """Write the badges into README.md and the chapters; without a repository on GitHub, remove them."""
    readme = ROOT / "README.md"
    readme.write_text(with_badges(readme.read_text("utf-8"), address), "utf-8")
    for chapter in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(chapter.read_text("utf-8"))
        first = notebook["cells"][0]
        text = with_badge("".join(first["source"]), chapter.relative_to(ROOT).as_posix(), address)
        first["source"] = text.splitlines(keepends=True)
        chapter.write_text(as_text(notebook), "utf-8")


def copies(folder: Path, ref: str, address: str) -> None:
    """Write every chapter and exercise into ``folder``, with a first cell that installs kvlearn at ``ref``.

    Raises ValueError without a repository on GitHub.
    """
    if not in_colab("", address):
        raise ValueError(f"repository: expected https://github.com/OWNER/NAME, got {address!r}")
    for path in sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*/*.ipynb")]):
        relative = path.relative_to(ROOT).as_posix()
        made = as_copy(json.loads(path.read_text("utf-8")), relative, ref, address)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_text(as_text(made), "utf-8")


def as_copy(notebook: dict[str, Any], path: str, ref: str, address: str) -> dict[str, Any]:
    """The notebook with that first cell. Its links open other copies, and files in the repository."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = BADGE.sub("", "".join(cell["source"]))
            text = LINK_OR_CODE.sub(lambda found: _link(found, path, ref, address), text)
            cell["source"] = text.splitlines(keepends=True)
    install = {
        "cell_type": "code",
        "execution_count": None,
        "id": "install-kvlearn",
        "metadata": {},
        "outputs": [],
        "source": INSTALL.format(repository=address, ref=ref).splitlines(keepends=True),
    }
    return {**notebook, "cells": [install, *notebook["cells"]]}


def _link(found: re.Match[str], path: str, ref: str, address: str) -> str:
    image, words, target = found.groups()
    if target is None or re.match(r"[a-z]+:|#", target):  # code, an address, a heading of this notebook
        return found[0]
    file = os.path.normpath(os.path.join(os.path.dirname(path), target.partition("#")[0]))
    file = file.replace("work/", "exercises/", 1) if file.startswith("work/") else file
    copied = file.endswith(".ipynb") and file.startswith(("notebooks/", "exercises/"))
    return f"{image}[{words}]({in_colab(file, address) if copied else f'{address}/blob/{ref}/{file}'})"


def as_text(notebook: dict[str, Any]) -> str:
    """As Jupyter writes it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["copies", folder, ref]:
            copies(Path(folder), ref, repository(ROOT))
        case ["badges"]:
            badges(repository(ROOT))
        case _:
            sys.exit(__doc__)
