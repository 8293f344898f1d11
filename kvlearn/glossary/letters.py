"""Letters of shapes: where docstrings declare them, and which public signatures use them.

A module declares letters in its docstring, in a sentence or in columns:

    "Letters beside those of core.py: J index heads, Di numbers of an index key."

They come on top of the letters of the module that it names, and those on top of attention/core.py's.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CORE = PACKAGE / "attention" / "core.py"


@dataclass(frozen=True)
class Letter:
    """A letter of shapes, the things that it is a number of, and the first module that declares it so."""

    symbol: str
    meaning: str
    module: Path = field(compare=False)


def declared(module: Path) -> tuple[list[Letter], Path | None]:
    """The letters that a module's docstring declares, and the module whose letters they are added to."""
    source = module.read_text(encoding="utf-8")
    doc = (ast.get_docstring(tree(module)) or "") if "Letters" in source else ""
    found = re.search(r"Letters,? ([^:]*?)(?:(\w+)\.py|kvlearn)(\.|:\n\n|:)", doc)
    if found is None:
        return [], None
    parent = None
    if found[2]:
        parent = module.with_name(f"{found[2]}.py")
        parent = parent if parent.exists() else PACKAGE / "attention" / parent.name
    rest = doc[found.end() :]
    if found[3] == ".":
        return [], parent
    if found[3] == ":\n\n":  # columns of letters and meanings
        block = rest.split("\n\n")[0]
        cells = [cell for line in block.splitlines() for cell in re.split(r"\s{2,}", line.strip())]
        pairs = list(zip(cells[::2], cells[1::2], strict=True))
    else:
        sentence = re.split(r"\.(?:\s|$)", rest.strip() + " ")[0]
        pairs = [(s, m) for s, m in (item.split(" ", 1) for item in " ".join(sentence.split()).split(", "))]
    return [Letter(symbol, meaning, module) for symbol, meaning in pairs], parent


@cache
def tree(module: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(module.read_text(encoding="utf-8"))


@cache
def letters(module: Path) -> dict[str, Letter]:
    """All letters that hold in a module: its own, else those of the module that it names, else core.py's."""
    own, parent = declared(module)
    start = letters(parent or CORE) if module != CORE else {}
    return {**start, **{letter.symbol: letter for letter in own}}


def shapes(node: ast.AST, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, shape) of every public signature below ``node`` that jaxtyping annotates."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        if node.name.startswith("_") and not node.name.startswith("__"):
            return
        name = f"{name}.{node.name}" if name else node.name
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
        kind, shape = node.value, node.slice.elts[1]
        if isinstance(kind, ast.Name) and isinstance(shape, ast.Constant) and isinstance(shape.value, str):
            yield name, shape.value
    for child in ast.iter_child_nodes(node):
        yield from shapes(child, name)


def symbols(shape: str, known: dict[str, Letter]) -> Iterator[str]:
    """The letters of a shape; words such as ``splits`` and sizes such as ``{n_keys}`` are none.

    A product or a sum (``HD``, ``RDr``, ``half_D``, ``2HD``) is split into its letters. Raises ValueError for
    a letter that no docstring declares.
    """
    for axis in re.sub(r"\{[^}]*\}|\.\.\.|[#*?]", " ", shape).split():
        rest = re.sub(r"_plus_|half_|two|\d|\W|^_$", "", axis)
        if rest in known:
            yield rest
        elif not re.fullmatch(r"[a-z_]{3,}", rest):
            while rest:
                fitting = [symbol for symbol in known if rest.startswith(symbol)]
                if not fitting:
                    raise ValueError(f"no docstring declares the letter {rest!r} of the shape {shape!r}")
                yield (longest := max(fitting, key=len))
                rest = rest.removeprefix(longest)


@cache
def uses() -> dict[Letter, dict[Path, list[str]]]:
    """By letter and module: the public signatures that have it in a shape."""
    found: dict[Letter, dict[Path, list[str]]] = {}
    for module in sorted(PACKAGE.rglob("*.py")):
        if "from jaxtyping import" not in module.read_text(encoding="utf-8"):
            continue
        known = letters(module)
        for name, shape in shapes(tree(module)):
            try:
                used = list(symbols(shape, known))
            except ValueError as error:
                raise ValueError(f"{module.relative_to(PACKAGE.parent)}: {name}: {error}") from error
            for symbol in used:
                names = found.setdefault(known[symbol], {}).setdefault(module, [])
                if name and name not in names:
                    names.append(name)
    return found
