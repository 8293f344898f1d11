"""GLOSSARY.md follows from the code and the chapters, and holds every letter and every mechanism."""

import ast
import re
from pathlib import Path

import pytest

from kvlearn.attention import REGISTRY
from kvlearn.glossary.letters import CORE, declared, letters, symbols
from kvlearn.glossary.page import PAGE, first_sentence, page, resolve, without_name
from kvlearn.glossary.terms import TERMS

ROOT = Path(__file__).resolve().parents[2]
PRESENT = PAGE.read_text(encoding="utf-8")
SHAPE = re.compile(r"\b(?:Float|Int|Bool|UInt8|Integer|Num)\[\w+, \"([^\"]*)\"\]")


def test_the_committed_page_is_the_generated_one() -> None:
    assert page() == PRESENT, "run python -m kvlearn.glossary"


def test_every_letter_of_a_public_signature_is_in_the_index() -> None:
    """Read from the text of the functions, without the generator's parser."""
    listed = set(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|", PRESENT, re.MULTILINE))
    found = set()
    for path in (ROOT / "kvlearn").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                annotated = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
                text = " ".join(ast.unparse(part).replace("'", '"') for part in annotated if part)
                found |= {
                    letter
                    for shape in SHAPE.findall(text)
                    for letter in re.findall(r"\b[A-Z][a-z]?\b", shape)
                }
    assert len(found) > 20
    assert found <= listed


def test_every_mechanism_is_in_the_glossary_with_its_chapter() -> None:
    for name in REGISTRY:
        (row,) = re.findall(rf"^\| `{name}` \| .*\|$", PRESENT.split("## Mechanisms")[1], re.MULTILINE)
        assert "(notebooks/" in row, name


def test_every_term_has_a_chapter_or_is_used_in_none() -> None:
    rows = re.findall(r"^\| \*\*(.*?)\*\*.*\| (\[\d\d\]\(\S+\))? ?\|$", PRESENT, re.MULTILINE)
    assert len(rows) == len(TERMS)
    assert sum(not chapter for _, chapter in rows) <= 1


@pytest.mark.parametrize("meaning", [meaning for meaning in TERMS.values() if meaning.startswith(":")])
def test_a_definition_from_a_docstring_is_a_sentence(meaning: str) -> None:
    sentence = first_sentence(resolve(meaning[1:]))
    assert 20 < len(sentence) < 130
    assert sentence.endswith(".")


def test_a_definition_does_not_begin_with_its_own_term() -> None:
    names = ["DSA", "DeepSeek sparse attention"]
    assert without_name("DeepSeek sparse attention (DSA): few tokens: some.", names) == "Few tokens: some."
    assert without_name("Sparse attention: few tokens.", names) == "Sparse attention: few tokens."
    for name, meaning in re.findall(r"^\| \*\*(.*?)\*\*[^|]*\| ([^|]*) \|", PRESENT, re.MULTILINE):
        assert not meaning.lower().startswith(f"{name.lower()}:"), name


def test_a_letter_that_no_docstring_declares_is_an_error() -> None:
    known = letters(CORE)
    assert list(symbols("#B *T HD {n_keys} splits half_D 2", known)) == ["B", "T", "H", "D", "D"]
    assert list(symbols("RDr", known)) == ["R", "Dr"]
    with pytest.raises(ValueError, match="'Q'"):
        list(symbols("B Q", known))


def test_letters_are_read_from_sentences_and_from_columns(tmp_path: Path) -> None:
    module = tmp_path / "a.py"
    module.write_text('"""A.\n\nLetters beside those of core.py: J index heads, Di numbers of\na key.\n"""\n')
    own, parent = declared(module)
    assert [(x.symbol, x.meaning) for x in own] == [("J", "index heads"), ("Di", "numbers of a key")]
    assert parent == CORE
    module = tmp_path / "b.py"
    module.write_text(
        '"""A.\n\nLetters beside those of core.py:\n\n    l   tokens   E  blocks: ⌊S / l⌋\n\nB.\n"""\n'
    )
    assert [(x.symbol, x.meaning) for x in declared(module)[0]] == [("l", "tokens"), ("E", "blocks: ⌊S / l⌋")]
    module = tmp_path / "c.py"
    module.write_text('"""A. Letters are those of recurrent.py.\n"""\n')
    assert letters(module)["K"].meaning == "numbers of a key"
