"""The page GLOSSARY.md: letters, other symbols, mechanisms and terms, each with the chapter that explains it.

The chapter of an entry is the first that has it in its line of letters, names it often, or imports it.
"""

import ast
import importlib
import inspect
import json
import re
import sys
from functools import cache
from pathlib import Path

from kvlearn.attention import REGISTRY
from kvlearn.glossary.letters import CORE, PACKAGE, Letter, letters, tree, uses
from kvlearn.glossary.terms import SYMBOLS, TERMS

ROOT = PACKAGE.parent
PAGE = ROOT / "GLOSSARY.md"
SHOWN = 2  # modules named in a row
Row = tuple[str, ...]
OFTEN = 3  # a chapter from 01 on that has a term so often is about it
# Stems of words that tell no meanings apart.
COMMON = {"a", "all", "and", "in", "is", "it", "of", "one", "per", "the", "token", "numbe"}


@cache
def chapters() -> dict[Path, tuple[str, list[str]]]:
    """By notebook: its markdown, and its cells of code."""
    texts = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        markdown = "\n\n".join(source for kind, source in sources if kind == "markdown")
        texts[path] = markdown, [source for kind, source in sources if kind == "code"]
    return texts


@cache
def imports(path: Path) -> set[tuple[str, str]]:
    """Imports from kvlearn in the code of a chapter, as modules and names."""
    found: set[tuple[str, str]] = set()
    for cell in chapters()[path][1]:
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", cell, flags=re.MULTILINE))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvlearn."):
                found |= {(f"{node.module}.", alias.name) for alias in node.names}
    return found


def first_import(module: Path, names: set[str]) -> Path | None:
    """The first chapter that imports one of the ``names`` of ``module``, by it or by its package."""
    dotted = ".".join(module.relative_to(ROOT).with_suffix("").parts) + "."
    for path in chapters():
        if any(name in names and dotted.startswith(source) for source, name in imports(path)):
            return path
    return None


@cache
def chapter_of_mechanism(name: str) -> Path | None:
    """The first chapter that imports its class; else the first from 01 on that names it."""
    kind = REGISTRY[name]
    words = " ".join(re.findall(r"[A-Z][a-z0-9]*", kind.__name__))
    named = re.compile(rf"[\"'`]{name}[\"'`]|\b{kind.__name__}\b|\b(?i:{words})\b")
    texts = {path: "\n".join([text, *code]) for path, (text, code) in chapters().items() if path.name > "01"}
    return first_import(file_of(kind), {kind.__name__}) or next(
        (p for p in texts if named.search(texts[p])), None
    )


def chapter_of_letter(letter: Letter) -> Path | None:
    """The chapter of its module's first mechanism, or the first that declares it or imports the module.

    A chapter declares a letter in its line of letters, with a word of this meaning.
    """
    module, words = letter.module, stems(letter.meaning)
    for name, kind in REGISTRY.items():
        if file_of(kind) == module:
            return chapter_of_mechanism(name)
    for path, (text, _) in chapters().items():
        for line in re.findall(r"^.*\bLetters\b.*$", text, re.MULTILINE):
            for said in re.findall(rf"\*\*{re.escape(letter.symbol)}\*\*,?([^*.;,]*)", line):
                if words & stems(said):
                    return path
    if module == CORE:
        return None
    names = {n.name for n in tree(module).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return first_import(module, names)


def stems(text: str) -> set[str]:
    """The words of a meaning by their first five letters, without those that most meanings have."""
    return {word[:5] for word in re.findall(r"\w+", text.lower())} - COMMON


def chapter_of_term(term: str) -> Path | None:
    """The first chapter that sets ``term`` off in bold or has it often; else the first that has it."""
    names = "|".join(re.escape(name).replace(r"\ ", r"\s+") + "s?" for name in term.split("|"))
    word = rf"(?<![\w-])({names})(?![\w-])"
    set_off = re.compile(rf"\*[^*\n]*{word}[^*\n]*\*|^#.*{word}", re.IGNORECASE | re.MULTILINE)
    used = re.compile(word, re.IGNORECASE)
    counts = {path: len(used.findall(text)) for path, (text, _) in chapters().items()}
    for path, (text, _) in chapters().items():
        if (counts[path] and set_off.search(text)) or (counts[path] >= OFTEN and path.name > "01"):
            return path
    return next((path for path, count in counts.items() if count), None)


def resolve(dotted: str) -> object:
    """The object or module of a dotted name."""
    try:
        return importlib.import_module(dotted)
    except ImportError:
        parent, _, name = dotted.rpartition(".")
        return getattr(resolve(parent), name)


def first_sentence(thing: object) -> str:
    """Of a docstring, as Markdown: ``code`` with single quotes, one line."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=[\w)])\.\s", text + " ")[0].rstrip(". ").replace("|", "\\|") + "."


def without_name(sentence: str, names: list[str]) -> str:
    """A sentence such as "Ring attention: the tokens …" without the name that it begins with."""
    head, colon, rest = sentence.partition(": ")
    title = re.sub(r" \(\w+\)$", "", head).lower()
    return rest[0].upper() + rest[1:] if colon and title in [name.lower() for name in names] else sentence


def file_of(thing: object) -> Path:
    """The source file of a module, or of the module of an object."""
    module = thing if inspect.ismodule(thing) else sys.modules[thing.__module__]
    return Path(str(module.__file__))


def link(path: Path | None, text: str | None = None) -> str:
    """A link from the page; empty without a path."""
    if path is None:
        return ""
    relative = path.relative_to(ROOT).as_posix()
    shown = path.name[:2] if path.suffix == ".ipynb" else relative.removeprefix("kvlearn/")
    return f"[{text or shown}]({relative})"


def table(head: Row, rows: list[Row]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def letter_rows() -> list[Row]:
    """Letters of shapes: core.py's in its order, then the others by the alphabet."""
    common = list(letters(CORE).values())
    others = sorted(uses().keys() - common, key=lambda x: (x.symbol.lower(), x.symbol, x.module))
    rows: list[Row] = []
    for letter in common + others:
        modules = uses().get(letter, {})
        ranked = sorted(modules, key=lambda m: (m != letter.module, -len(modules[m]), m))
        shown = [" ".join([link(m), *(f"`{name}`" for name in modules[m][:1])]) for m in ranked[:SHOWN]]
        if len(ranked) > SHOWN:
            shown.append(f"and {len(ranked) - SHOWN} more")
        row = f"`{letter.symbol}`", letter.meaning, "; ".join(shown), link(chapter_of_letter(letter))
        rows.append(row)
    return rows


def other_symbol_rows() -> list[Row]:
    """Symbols that occur in no shape, with the first chapter that writes them."""
    rows: list[Row] = []
    for symbol, (written, meaning) in SYMBOLS.items():
        chapter = next((path for path, (text, _) in chapters().items() if written in text), None)
        rows.append((f"`{symbol}`", meaning, link(chapter)))
    return rows


def mechanism_rows() -> list[Row]:
    """Every mechanism of the registry, by its name there."""
    return [
        (
            f"`{name}`",
            first_sentence(kind),
            link(file_of(kind), kind.__name__),
            link(chapter_of_mechanism(name)),
        )
        for name, kind in REGISTRY.items()
    ]


def term_rows() -> list[Row]:
    """Terms in the order of the alphabet."""
    rows: list[Row] = []
    for term, meaning in sorted(TERMS.items(), key=lambda item: item[0].lower()):
        name, *others = names = term.split("|")
        shown = f"**{name}**" + (f" ({', '.join(others)})" if others else "")
        where, chapter = "", chapter_of_term(term)
        if meaning.startswith(":"):
            thing = resolve(meaning[1:])
            meaning, where = without_name(first_sentence(thing), names), link(file_of(thing))
            taught = first_import(file_of(thing), {getattr(thing, "__qualname__", "")})
            chapter = min(filter(None, (chapter, taught)), default=None)
        rows.append((shown, meaning, where, link(chapter)))
    return rows


def page() -> str:
    """The whole page, in Markdown."""
    parts = [
        "# Glossary and symbols",
        "Made by `python -m kvlearn.glossary` from docstrings and from the chapters: edit those, not this "
        "page. The last column is the chapter to read first.",
        "## Letters of shapes",
        "A letter of a shape is a number of things: `(B, H, T, D)` is B sequences, H heads, T tokens and D "
        "numbers. The letters of a product or a sum are written together: `HD` is H · D, `RDr` is R + Dr. "
        "If a letter has several meanings, the docstring of a file says which one it uses.",
        table(("letter", "number of", "used by", "chapter"), letter_rows()),
        "## Other symbols",
        table(("symbol", "meaning", "chapter"), other_symbol_rows()),
        "## Mechanisms",
        "By their names in `kvlearn.attention.REGISTRY`, which a model's `layers` take.",
        table(("name", "what it computes", "class", "chapter"), mechanism_rows()),
        "## Terms",
        table(("term", "meaning", "code", "chapter"), term_rows()),
    ]
    return "\n\n".join(parts) + "\n"
