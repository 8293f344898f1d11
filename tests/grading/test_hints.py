"""``hint`` and ``solution``."""

from pathlib import Path

import pytest

import kvlearn
from kvlearn.grading import catalogue, exercises


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_shown", {})


def test_hints_come_one_by_one_and_say_how_many_are_left() -> None:
    total = len(exercises()["01.1"].hints)
    shown = [kvlearn.hint("01.1") for _ in range(total)]
    assert [h.text for h in shown] == list(exercises()["01.1"].hints)
    assert f"{total - 1} more" in repr(shown[0])
    assert "last hint" in repr(shown[-1])
    assert kvlearn.hint("01.1") == shown[-1]
    assert kvlearn.hint("01.2").number == 1


def test_a_hint_reads_as_markdown_and_as_plain_text() -> None:
    bundle = kvlearn.hint("01.3")._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/markdown"}
    assert bundle["text/markdown"].startswith("**Hint 1 of")


@pytest.mark.parametrize("exercise", exercises())
def test_the_solution_is_shown_only_when_asked_for(exercise: str) -> None:
    asked = kvlearn.solution(exercise)
    assert "confirm=True" in repr(asked)
    assert "def " not in repr(asked)
    shown = kvlearn.solution(exercise, confirm=True)
    assert exercises()[exercise].answers[0] in shown.code
    assert "SOLUTION" not in shown.code
    assert shown._repr_mimebundle_()["text/markdown"].startswith("```python\n")


def test_a_missing_solutions_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no units in .*nowhere"):
        kvlearn.solution("01.1", confirm=True)


@pytest.mark.parametrize("ask", [kvlearn.hint, kvlearn.solution])
def test_unknown_exercises_are_named(ask) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"'01\.8'.*; got '99\.1'"):
        ask("99.1")
    with pytest.raises(ValueError, match=r"got '9{20,50}….{0,1}$"):
        ask("9" * 10_000)
    with pytest.raises(TypeError, match=r"expected str, got NoneType \(write the id in quotes"):
        ask(None)


@pytest.mark.parametrize("meant", ["1.3", "01.03", "1.03", " 001.3 "])
def test_an_id_written_otherwise_is_understood_but_not_taken(meant: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean '01\.3'\?"):
        kvlearn.hint(meant)
    with pytest.raises(TypeError, match=r"got float; did you mean '01\.3'\? \(write the id in quotes"):
        kvlearn.hint(1.3)  # type: ignore[arg-type]
