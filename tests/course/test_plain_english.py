"""The English of the course is plain, for readers whose first language is another."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
COUNTED = "bits|bytes|FLOPs|GiB|keys|KiB|MiB|nats|numbers|one|points|queries|rows|seconds|three|tokens|two"
COUNTS = "block|byte|call|channel|exercise|head|layer|mechanism|number|row|second|slot|step|tile|token"
# What a reader has to look up or to read twice, and the plain form.
HABITS = {
    r"(stands?|stood)(?! (in )?for|-in)": "is, are, was; is compared with",
    r"(roads?|doors?|gloves?|rivals?|contests?)": "the word that papers use: path, function, baseline",
    r"(dearer|dearest|lest|whence|whoever|whomever)": "costs more; so that ... not; the reader",
    r"(held|hold|holds) against|by turns": "is compared with; interleaved",
    rf"({COUNTED}) an? ({COUNTS})(?! at a time| sees| reads)": "per: bytes per token",
}
WORDS = {re.compile(rf"(?<![\w`-])({old})(?![\w`-])", re.IGNORECASE): new for old, new in HABITS.items()}
# A docstring or a comment that begins with a clause, and says only later or never what it is about.
CLAUSE = re.compile(r'("""|(?<=\n)\s*# )(Whatever|What|Those of|That of) [^"?]*')
# Identifiers that stay: a key of recorded rows, and the grade id by which learners' answers are found.
ALLOWED = {
    "kvlearn/bench/compressed.py": {"road"},
    "solutions/03_multi_head_compression/checks.py": {"roads"},
}


def prose(path: Path) -> str:
    """The text of a file; of a notebook its cells, without their outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def habits(text: str, allowed: set[str]) -> list[str]:
    """Each habit found in ``text``, with the words around it and the plain form."""
    found = [f"{clause[0][:60]!r}: begin with a noun" for clause in CLAUSE.finditer(text)]
    # The name of a test is a sentence.
    text += "".join(f"\n\n{name.replace('_', ' ')}." for name in re.findall(r"def test_(\w+)", text))
    # One line, also where a sentence is cut into several strings or comments.
    line = re.sub(r"\s*\n\s*(# )?|\s+", " ", re.sub(r"\"\s*\n\s*f?\"", "", text))
    for word, plain in WORDS.items():
        hits = (hit for hit in word.finditer(line) if hit[0] not in allowed)
        found += [f"{line[max(0, hit.start() - 40) : hit.end() + 30]!r}: {plain}" for hit in hits]
    return found


@pytest.mark.parametrize("folder", ["docs", "kvlearn", "notebooks", "solutions", "tests", ""])
def test_sources_are_written_in_plain_english(folder: str) -> None:
    files = [path for kind in ("py", "ipynb") for path in (ROOT / folder).rglob(f"*.{kind}")]
    files = [path for path in files if path != Path(__file__)] if folder else PAGES
    assert files
    found = [
        f"{path.relative_to(ROOT)}: {habit}"
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        for habit in habits(prose(path), ALLOWED.get(path.relative_to(ROOT).as_posix(), set()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "The query stands at position 3.",
        "a list of whole numbers, one a layer",
        '"It costs 4 bytes a "\n    "token."',
        "# Rows that are held\n# against the recorded ones",
        '    """What came of a run."""',
        "x = 1\n# Those of the last step",
        "Gathering is dearer.",
        "def test_gathering_is_never_dearer() -> None:",
    ],
)
def test_a_habit_is_found(text: str) -> None:
    assert len(habits(text, set())) == 1


def test_words_with_another_meaning_are_not() -> None:
    text = "n stands for a number; a stand-in; `road`; standard; # What is this?\nkeys a block at a time"
    assert habits(text, set()) == []
