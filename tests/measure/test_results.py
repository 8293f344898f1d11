"""Results: written whole or not at all, found again by name, and refused with the name of the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvlearn import files
from kvlearn.measure import results

ROWS = [{"case": "b", "measured": 1.5}, {"case": "a", "measured": 2, "seeds": [0, 1]}]


def record(**changes: Any) -> dict[str, Any]:
    return {
        "date": "2026-05-01T12:00:00+00:00",
        "commit": None,
        "dirty": None,
        "machine": "amd-epyc-2-cores",
        "cores": 2,
        "memory": 2**34,
        "read_bandwidth_measured": 3.5e10,
        "gpu": None,
        "versions": {"python": "3.12.1", "triton": None},
    } | changes


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = results.save("full", "kvlearn bench full --record", ROWS, record(), tmp_path / "results")
    assert path == tmp_path / "results" / "full-amd-epyc-2-cores.json"
    (found,) = results.load("full", tmp_path / "results")
    assert (found.path, found.command, found.rows) == (path, "kvlearn bench full --record", ROWS)
    assert found.provenance == record()


def test_every_machine_has_its_file_and_writes_over_its_own(tmp_path: Path) -> None:
    for machine, value in (("nvidia-h200", 1), ("apple-m3", 2), ("nvidia-h200", 3)):
        results.save("full", "…", [{"v": value}], record(machine=machine), tmp_path)
    found = results.load("full", tmp_path)
    assert [(r.provenance["machine"], r.rows[0]["v"]) for r in found] == [("apple-m3", 2), ("nvidia-h200", 3)]


def test_a_longer_name_is_another_name(tmp_path: Path) -> None:
    results.save("full-model", "…", ROWS, record(), tmp_path)
    assert results.load("full", tmp_path) == []
    assert len(results.load("full-model", tmp_path)) == 1


def test_the_text_is_the_same_for_the_same_content(tmp_path: Path) -> None:
    path = results.save("full", "…", ROWS, record(), tmp_path)
    first = path.read_text()
    results.save("full", "…", [dict(reversed(row.items())) for row in ROWS], record(), tmp_path)
    assert path.read_text() == first
    assert list(json.loads(first)) == ["command", "provenance", "rows", "schema"]


@pytest.mark.parametrize("bad", [[{"v": float("nan")}], [{"v": {1, 2}}]])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, bad: Any) -> None:
    path = results.save("full", "…", ROWS, record(), tmp_path)
    before = path.read_text()
    with pytest.raises(ValueError, match="rows: expected numbers, strings"):
        results.save("full", "…", bad, record(), tmp_path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.save("full", "…", ROWS, record(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "Bob's laptop"}, "provenance: machine: expected a slug"),
        ({"cores": True}, "provenance: cores: expected int, got True"),
        ({"dirty": "no"}, "provenance: dirty: expected bool or null, got 'no'"),
        ({"read_bandwidth_measured": None}, "read_bandwidth_measured: expected int or float, got None"),
    ],
)
def test_a_wrong_provenance_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results.save("full", "…", ROWS, record(**change), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../full", "Full", "a b", "-a"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name: expected lower-case words"):
        results.save(name, "…", ROWS, record(), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON: its brackets are nested too deeply"),
        ("[]", "expected a dict, got list"),
        ("{}", "expected a key 'schema', got none"),
        ({"schema": 2}, "schema: expected 1, got 2"),
        ({"rows": [1]}, r"rows\[0\]: expected a dict, got int"),
        ({"rows": [{"provenance": {}}]}, r"rows\[0\]: provenance: expected a key 'date'"),
        ({"provenance": {}}, "provenance: expected a key 'date'"),
        ({"provenance": record(machine="other")}, "expected NAME-other.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    if not isinstance(content, str):
        whole = {"schema": 1, "command": "…", "provenance": record(), "rows": []}
        content = json.dumps(whole | content)
    (tmp_path / "full-amd-epyc-2-cores.json").write_text(content)
    with pytest.raises(ValueError, match=f"full-amd-epyc-2-cores.json: .*{message}"):
        results.load("full", tmp_path)


def test_all_results_of_the_repository_hold_what_they_should() -> None:
    for folder in results.results_folders():
        for path in folder.glob("*.json"):
            results.read(path)


# Rows that must not be compared


def save(
    folder: Path, rows: list[dict[str, Any]], command: str = "kvlearn bench full", **changes: Any
) -> str:
    return results.save("full", command, rows, record(**changes), folder).name


def test_runs_that_may_be_compared_are_found_with_all_their_rows(tmp_path: Path) -> None:
    save(tmp_path, ROWS, machine="apple-m3")
    save(tmp_path, ROWS, machine="nvidia-h200", dirty=False)
    results.save("full-model", "…", ROWS, record(), tmp_path)  # another name
    found = results.comparable("full", tmp_path)
    assert [run.provenance["machine"] for run in found.recorded] == ["apple-m3", "nvidia-h200"]
    assert [run.rows for run in found.recorded] == [ROWS, ROWS]
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dirty": True}, "dirty tree"),
        ({"command": "kvlearn bench full --record --small"}, "small sizes"),
        ({"rows": []}, "no row"),
    ],
)
def test_a_run_that_must_not_be_compared_is_named(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    save(tmp_path, ROWS, machine="apple-m3")
    name = save(tmp_path, **{"rows": ROWS, "machine": "nvidia-h200", **changes})
    found = results.comparable("full", tmp_path)
    assert [run.provenance["machine"] for run in found.recorded] == ["apple-m3"]
    assert list(found.left_out) == [name]
    assert why in found.left_out[name]
    assert str(found).splitlines()[1].startswith(f"left out: {name}: ")


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, json.dumps({"schema": 0, "command": "", "provenance": {}, "rows": []})]
)
def test_a_file_of_another_schema_is_named_and_hides_no_other(tmp_path: Path, text: str) -> None:
    save(tmp_path, ROWS, machine="apple-m3")
    (tmp_path / "full-old.json").write_text(text)
    found = results.comparable("full", tmp_path)
    assert len(found.recorded) == 1
    (why,) = found.left_out.values()
    assert list(found.left_out) == ["full-old.json"]
    assert "schema: expected 1, got 0" in why or "expected JSON" in why


def test_rows_without_a_number_or_of_another_machine_are_named(tmp_path: Path) -> None:
    rows = [
        {"case": "good", "measured": 1.0},
        {"case": "nan", "measured": None, "missing": "measured nan"},
        {"case": "elsewhere", "measured": 3.0, "provenance": record(machine="apple-m3")},
        {"case": "unclean", "measured": 4.0, "provenance": record(dirty=True)},
        {"case": "own", "measured": 5.0, "provenance": record(dirty=False)},
    ]
    name = save(tmp_path, rows)
    found = results.comparable("full", tmp_path)
    assert [row["case"] for row in found.recorded[0].rows] == ["good", "own"]
    assert found.left_out == {
        f"{name}: nan": "measured nan",
        f"{name}: elsewhere": "measured on apple-m3",
        f"{name}: unclean": "measured from a dirty tree",
    }
    assert results.load("full", tmp_path)[0].rows == rows  # the file itself is read as it is


def test_a_row_from_a_dirty_tree_does_not_hide_those_recorded_before_it(tmp_path: Path) -> None:
    clean, unclean = ({"case": str(dirty), "provenance": record(dirty=dirty)} for dirty in (False, True))
    name = save(tmp_path, [clean, unclean, {"case": "of the file"}], dirty=True)
    found = results.comparable("full", tmp_path)
    assert [run.rows for run in found.recorded] == [[clean]]
    assert set(found.left_out) == {f"{name}: True", f"{name}: of the file"}
