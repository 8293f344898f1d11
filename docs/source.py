"""The source of the site that ``make site`` builds: README, chapters, exercises without solutions, modules.

    python docs/source.py FOLDER

The folder has the layout of the repository, so that links between pages work as they do there. Links to
files that are no page lead to the repository, if it is a public one, and are plain text otherwise.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colab import LINK, ROOT, repository, with_badge

PACKAGES = (
    "attention",
    "kernels",
    "model",
    "parallel",
    "serving",
    "measure",
    "bench",
    "study",
    "integrations",
)
PAGES = {  # files at the top, with the names of their pages
    "GLOSSARY.md": "glossary.md",
    "CONTRIBUTING.md": "contributing.md",
    "TEACHING.md": "teaching.md",
    "CHANGELOG.md": "changelog.md",
}
ALIGNED = re.compile(r"\S {2,}\S")
ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
SPECIAL = re.compile(r"([*|\\]|(?<=\w)_(?!\w)|`)")


def write(folder: Path) -> None:
    """Write the whole source of the site into ``folder``, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    units = sorted((ROOT / "exercises").glob("*/*.ipynb"))
    for path in (*chapters, *units):
        page = folder / path.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(as_page(json.loads(path.read_text()), path)))
    shutil.copytree(ROOT / "notebooks" / "pictures", folder / "notebooks" / "pictures")
    for file, name in PAGES.items():
        (folder / name).write_text(with_links((ROOT / file).read_text(), ROOT / file))
    readme = with_links((ROOT / "README.md").read_text(), ROOT / "README.md")
    trees = [
        tree("Chapters", [path.relative_to(ROOT).with_suffix("").as_posix() for path in chapters]),
        tree("Exercises", [path.relative_to(ROOT).with_suffix("").as_posix() for path in units]),
        tree("Reference", [f"api/{package}" for package in PACKAGES]),
        tree("Around the course", [name.removesuffix(".md") for name in PAGES.values()]),
    ]
    (folder / "index.md").write_text("\n\n".join([readme.rstrip(), *trees]) + "\n")
    (folder / "api").mkdir()
    for package in PACKAGES:
        (folder / "api" / f"{package}.rst").write_text(reference(package))


def tree(caption: str, pages: list[str]) -> str:
    """A hidden table of contents, which the sidebar shows."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def reference(package: str) -> str:
    """One page for a package: its own docstring, then each public module with its members."""
    names = [f"kvlearn.{package}"]
    for path in sorted((ROOT / "kvlearn" / package).rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not path.name.startswith("_") and not dotted.startswith("kvlearn.kernels.stages"):
            names.append(dotted)
    title = f"kvlearn.{package}"
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", "   :no-members:", ""]
    for name in names[1:]:
        lines += [name, "-" * len(name), "", f".. automodule:: {name}", ""]
    return "\n".join(lines)


def as_page(notebook: dict[str, Any], path: Path) -> dict[str, Any]:
    """A notebook for the site: links rewritten, pictures with alt text, no widgets that need a kernel.

    Below its title is the badge that opens its copy in Colab, if the repository is on GitHub.
    """
    first, name = notebook["cells"][0], path.relative_to(ROOT).as_posix()
    first["source"] = with_badge("".join(first["source"]), name, repository(ROOT))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), path)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt and "image/png" in data:
                cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": alt}
    return notebook


def with_links(text: str, path: Path) -> str:
    """``text`` of the file ``path`` with links that the site can follow."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [LINK.sub(lambda found: _link(found, path), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], path: Path) -> str:
    image, words, target = found.groups()
    if re.match(r"[a-z]+:|#", target):
        return found[0]
    file, _, anchor = target.partition("#")
    wanted = (path.parent / file).resolve()
    relative = Path(os.path.relpath(wanted, ROOT)).as_posix()
    if relative.startswith("work/"):  # a learner's copy: on the site, the exercise as it is given
        relative = relative.replace("work/", "exercises/", 1)
        wanted = ROOT / relative
    if relative == "README.md":
        relative = "index.md"
    elif relative in PAGES:
        relative = PAGES[relative]
    elif not (wanted.suffix in {".ipynb", ".png"} and relative.split("/")[0] in {"notebooks", "exercises"}):
        address = repository(ROOT)
        return f"[{words}]({address}/blob/main/{relative})" if address else words
    page = path if path.suffix == ".ipynb" else ROOT / "index.md"
    here = os.path.relpath(ROOT / relative, page.parent)
    return f"{image}[{words}]({Path(here).as_posix()}{'#' + anchor if anchor else ''})"


def as_rst(lines: list[str]) -> None:
    """Turn a docstring of plain text into reStructuredText, in place.

    Indented blocks (equations, examples) and blocks with aligned columns become literal ones; list items
    stay; in other text only ``code`` has a meaning.
    """
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            listed = bool(blocks[-1] and ITEM.match(blocks[-1][0]))
            if blocks[-1] and listed != bool(ITEM.match(line) or (listed and line.startswith("  "))):
                blocks.append([])  # a list begins right below its sentence, or a sentence right below a list
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    out: list[str] = []
    for block in filter(None, blocks):
        literal = block[0].startswith(" ") or any(ALIGNED.search(line) for line in block)
        out += ["::", "", *(f"    {line}" for line in block), ""] if literal else [*map(escape, block), ""]
    lines[:] = out


def escape(line: str) -> str:
    """Everything but ``code`` and roles taken literally."""
    parts = re.split(r"(``.*?``|:\w+:`[^`]*`)", line)
    item = ITEM.match(parts[0])
    keep = item.end() if item else 0
    plain: Callable[[str], str] = lambda text: SPECIAL.sub(r"\\\1", text)  # noqa: E731
    head = parts[0][:keep] + plain(parts[0][keep:])
    return "".join([head, *(part if i % 2 == 0 else plain(part) for i, part in enumerate(parts[1:]))])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
