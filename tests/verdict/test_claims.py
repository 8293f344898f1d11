"""Every claim of the article has a verdict, and every measured cell comes from results/ or is computed."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_quality import language_row, rows_of

from kvlearn import verdict
from kvlearn.measure import MODELS
from kvlearn.plots.quality import CLAIMS as DRAWN
from kvlearn.study.quality import CPU, Difference, LanguageRun
from kvlearn.study.quality.plan import TIER_A
from kvlearn.verdict import CLAIMS, RELEASED, Finding, Records, Verdict, judge, methods, predictions
from kvlearn.verdict import claim as claims
from kvlearn.verdict.claim import AS_CLAIMED, CANNOT_TELL, LESS, MORE, NOT_YET, against, settle
from kvlearn.verdict.vote import Answer, Votes, _buttons

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
BY_ID = {claim.id: claim for claim in CLAIMS}
# The article's claims: methods, products and money, predictions and remarks, headlines.
ARTICLE = (
    *(f"M{n}" for n in range(1, 14)),
    *("mistral", "mixtral", "claude", "gemini", "gpt", "gap"),
    *("share", "cards", "user", "million", "context", "market"),
    *("P1", "P2", "P3", "catch up", "shops", "routing"),
    *("80%", "69 KB"),
)


@pytest.fixture(scope="module", autouse=True)
def few_windows() -> Iterator[None]:
    """The chapter evaluates 48 windows of text; these tests four."""
    with pytest.MonkeyPatch.context() as patch:
        few = partial(methods.hidden_by_the_mean, 4)
        patch.setattr(methods, "hidden_by_the_mean", few)
        yield


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.claim.id: finding for finding in verdict.judge_all(CLAIMS, Records(RESULTS))}


def test_no_claim_of_the_article_is_without_a_verdict(findings: dict[str, Finding]) -> None:
    assert {name.split(".")[0] for name in findings} == set(ARTICLE)
    assert len(findings) == len(CLAIMS), "two claims of one id"
    for name, finding in findings.items():
        assert isinstance(finding.verdict, Verdict), name
        assert finding.evidence.note, f"{name} says neither conditions, nor what is right, nor who could say"
        assert finding.claim.claimed.endswith("."), name
        if finding.verdict is Verdict.CONDITIONS:
            assert len(finding.evidence.note) > 20, f"{name}: under which conditions?"


def test_a_chapter_that_shows_a_claim_exists() -> None:
    chapters = {int(path.name[:2]) for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {claim.chapter for claim in CLAIMS} - {None} <= chapters


def test_a_claim_without_a_chapter_says_why(findings: dict[str, Finding]) -> None:
    for name, finding in findings.items():
        claim = finding.claim
        if claim.chapter is None:
            assert len(claim.shows) > 20, f"{name}: why does no chapter show it?"
            assert claim.shown == f"none: {claim.shows}"
        else:
            assert claim.shown.startswith(f"{claim.chapter:02}")
        assert ("chapter", claim.shown) in Answer(finding).lines
    cells = {row[""]: row["chapter"] for row in verdict.summary(findings.values()).rows}
    assert cells == {name: finding.claim.shown for name, finding in findings.items()}
    without = {name for name in findings if findings[name].claim.chapter is None}
    assert without == {
        "claude.price",
        "claude.method",
        "gpt.price",
        "gpt.method",
        "share",
        "market",
        "catch up",
    }


def test_no_measured_cell_without_a_result_file(findings: dict[str, Finding], tmp_path: Path) -> None:
    """In an empty results/ a cell is computed all the same, or says that it was not yet run."""
    for name, finding in findings.items():
        assert all((RESULTS / file).is_file() for file in finding.files), name
        bare = judge(finding.claim, Records(tmp_path))
        assert bare.files == (), name
        if finding.files:
            assert NOT_YET in bare.evidence.measured, f"{name} has a number without a row"
        else:
            assert bare.evidence.measured == finding.evidence.measured, name
        if bare.evidence.measured.startswith(NOT_YET):
            assert bare.verdict is Verdict.OPEN, f"{name} judges without rows"
            assert bare.pending, name


def scaled(content: Any, factor: float) -> Any:
    """Every measured number in ``content`` times ``factor``; what identifies a row stays."""
    fixed = {"length", "tokens", "seed", "lr", "n_pairs", "threads", "probes", "epsilon", "context", "trials"}
    if isinstance(content, dict):
        keep = fixed | {"settings", "training", "provenance"}
        return {key: value if key in keep else scaled(value, factor) for key, value in content.items()}
    if isinstance(content, list):
        return [scaled(value, factor) for value in content]
    return content * factor if isinstance(content, int | float) and not isinstance(content, bool) else content


def test_a_measured_cell_follows_its_file(findings: dict[str, Finding], tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        content["rows"] = [scaled(row, 1.03 + 0.07 * (i % 11)) for i, row in enumerate(content["rows"])]
        (tmp_path / path.name).write_text(json.dumps(content))
    other = Records(tmp_path)
    for name, finding in findings.items():
        if finding.files:
            assert judge(finding.claim, other).evidence.measured != finding.evidence.measured, name


def test_every_note_and_cell_reads_without_its_table(findings: dict[str, Finding]) -> None:
    for finding in findings.values():
        said = repr(Answer(finding))
        assert finding.verdict.value in said
        assert not re.search(r"\bnan\b", said)
        assert "  " not in finding.evidence.measured + finding.evidence.note


def test_the_percentages_of_the_article_are_those_that_chapter_10_draws() -> None:
    drawn = {claim.name.split(",")[0]: (claim.saved, claim.worse) for claim in DRAWN}
    names = {"M3": "KV sharing", "M4": "MHC", "M5": "window", "M6": "sparse", "M7": "Mamba"}
    assert {key: drawn[name] for key, name in names.items()} == {
        key: (own["saved"], own["worse"]) for key, own in methods.ARTICLE.items()
    }


def test_the_models_of_chapter_07_are_counted() -> None:
    notebook = json.loads((ROOT / "notebooks/07_hybrids.ipynb").read_text())
    cells = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    (source,) = (cell for cell in cells if "layer_stripes" in cell)
    assert [model.name for model in RELEASED] == [name for name in MODELS if f'"{name}"' in source]


# The arithmetic, by hand


def test_numbers_that_the_verdicts_rest_on(findings: dict[str, Finding]) -> None:
    numbers = {name: finding.evidence.numbers for name, finding in findings.items()}
    assert numbers["M2"]["published"] == 2 * 126 * 8 * 128 * 2 * 32_768 / 2**30 == 15.75
    assert numbers["M2"]["article"] == 2 * 128 * 64 * 128 * 2 * 32_768 / 2**30 == 128
    assert numbers["M2"]["unshared"] == 252
    assert numbers["M1"] == {"bytes per element": 2, "times too many": 4}
    assert numbers["M5.bytes"]["8K"] == 0.5
    assert numbers["69 KB"]["KiB"] == pytest.approx(61 * 576 * 2 / 1024)
    assert numbers["69 KB"]["GPT-2 XL"] == pytest.approx(300 / (61 * 576 * 2 / 1024))
    assert numbers["69 KB"]["itself without MLA"] == pytest.approx(2 * 128 * 128 / 576)
    assert numbers["gap"]["times"] == pytest.approx(30)
    assert numbers["M8"] == {"mixed": 8, "of": 13}
    assert 60 < numbers["M7.bytes"]["crossing"] < 90
    assert max(numbers["million"].values()) < 4.2
    assert numbers["80%"]["a full card, 32K"] == pytest.approx(0.8, abs=0.01)
    assert numbers["80%"]["one user, 1K"] < 0.05


# Words about a measurement, which follow its rows


def altered(name: str, edit: Callable[[dict[str, Any]], None], *, quality: Iterable[Any] = ()) -> Records:
    """The recorded rows, those of the file ``name`` edited; no row of the study but ``quality``."""
    records = with_study(quality)
    rows = [json.loads(json.dumps(row)) for row in Records(RESULTS).rows(name)]
    for row in rows:
        edit(row)
    records._read[name] = (rows, {f"{name}-edited.json"})
    return records


def times(factor: float, key: str = "measured", **where: Any) -> Callable[[dict[str, Any]], None]:
    """An edit: ``key`` times ``factor`` in the rows that have all values of ``where``."""

    def edit(row: dict[str, Any]) -> None:
        if all(row.get(name) == value for name, value in where.items()):
            row[key] = row[key] * factor

    return edit


def loses(loss: float, text: str = "sympy", **where: Any) -> Callable[[dict[str, Any]], None]:
    """An edit: the loss on ``text`` of the rows of a converted model."""

    def edit(row: dict[str, Any]) -> None:
        if all(row[name] == value for name, value in where.items()):
            row["losses"][text]["loss"] = loss

    return edit


def answers(**shares: float) -> Callable[[dict[str, Any]], None]:
    def edit(row: dict[str, Any]) -> None:
        row["accuracy"] = shares.get(row["run"].split(",")[0], 1.0)

    return edit


def routed_loses(row: dict[str, Any]) -> None:
    row["loss"] = 1.0 if row["run"] == "routed" else 2.0


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str, str]] = {
    # claim: file, edit, what is said of the recorded rows, what is said of the edited ones
    "M1": ("hardware", times(2, what="stored", mechanism="gqa"), "it is exact", "still not what was alloc"),
    "M3.bytes": ("hardware", times(2, what="read", mechanism="gqa"), "as much", "what is read falls by 50%"),
    "M3.routing": ("routing", routed_loses, "does not beat fixed", "beats fixed groups"),
    "M4.bytes": ("hardware", times(3, what="stored", mechanism="mhc"), "a little less", "far from 8x less"),
    "M4.training": ("convert", loses(0.9, run="gqa-2-mean", tokens=0), "SVD is better", "SVD is no better"),
    "M5.bytes": ("hardware", times(2, what="stored", mechanism="window"), "length", "not what the formula"),
    "M5.order": ("window", times(2, name="window"), "For N well above W", "grow in another way"),
    "M5.quality": ("window_quality", loses(1.5, run="window-128"), "No one number", "do not lie on both"),
    "M6.bytes": (
        "window_quality",
        times(0.5, "bytes_stored_at_length", run="strided"),
        "3% for a stride",
        "51% for a stride",
    ),
    "M6.order": ("window", times(2, name="bigbird"), "O(N) for BigBird", "not in the times measured"),
    "M6.quality": ("window_quality", loses(0.9, run="bigbird"), "with 3 of 3", "with 2 of 3"),
    "M7.bytes": ("hardware", times(1e-3, what="stored", mechanism="mamba"), "up to 76", "a state is smaller"),
    "M7.order": ("hardware", times(-100, what="decode_exponent"), "costs the same", "costs more in a longer"),
    "M7.quality": ("recall", answers(mamba2=0.96, delta=0.96), "No one number", "In answers: mamba2"),
    "M9.context": ("ring", times(1e4, what="output_difference"), "exactly", "not that of one device"),
    "M11.parameters": (
        "convert",
        times(2, "parameters", run="mhc-32-activations"),
        "Not a linear map",
        "A linear map has more",
    ),
    "M11.forgetting": (
        "convert",
        loses(0.1, "prose", run="gqa-2-mean"),
        "comes back less than sympy",
        "comes back no less than sympy",
    ),
    "M13.leak": (
        "serving",
        times(0, "prompts", what="leak_prompts"),
        "leak is the reuse",
        "does not show it",
    ),
    "M13.research": (
        "serving",
        times(0.1, epsilon=1),
        "the measurement says why",
        "hides the fields at a small cost",
    ),
    "69 KB": ("hardware", times(2, what="stored", mechanism="mla"), "69 is DeepSeek-V3", "is neither 69 KiB"),
}
# Of these the whole note is made of ``said``, ``against`` and the interval, which other tests hold.
STUDY_ALONE = {"M3.quality", "M4.quality", "M8"}


def test_every_claim_that_reads_rows_is_edited_below(findings: dict[str, Finding]) -> None:
    assert {name for name, finding in findings.items() if finding.files} == set(EDITS) | STUDY_ALONE


@pytest.mark.parametrize("name", EDITS)
def test_words_about_a_measurement_change_with_its_rows(name: str, findings: dict[str, Finding]) -> None:
    file, edit, before, after = EDITS[name]
    recorded, edited = findings[name].evidence.note, judge(BY_ID[name], altered(file, edit)).evidence.note
    assert before in recorded
    assert after not in recorded
    assert after in edited
    assert before not in edited or name in ("M5.bytes", "M6.order")  # those keep what holds on paper


def test_words_about_the_wide_and_the_narrow_window_and_about_text_and_its_control() -> None:
    """The second clauses of a note, each against rows that contradict it."""
    code = altered("convert", loses(9.0, "networkx", run="gqa-2-mean"))
    assert "as well, less too" in judge(BY_ID["M11.forgetting"], code).evidence.note

    def drifts(row: dict[str, Any]) -> None:
        if row["run"] == "full":
            row["losses"]["prose"]["loss"] += row["tokens"] / 1e7

    control = judge(BY_ID["M11.forgetting"], altered("convert", drifts)).evidence.note
    assert "forgets as well" in control
    small = altered("convert", times(0.5, "parameters", run="mhc-transformer-32-activations"))
    assert "small transformer has fewer" in judge(BY_ID["M11.parameters"], small).evidence.note
    stored = altered("routing", times(2, "bytes_stored_per_token", run="routed"))
    assert "different amounts" in judge(BY_ID["M3.routing"], stored).evidence.note
    worse = altered("convert", loses(9.0, run="mhc-32-activations", tokens=1_228_800))
    finding = judge(BY_ID["M4.training"], worse)
    assert "does not bring back" in finding.evidence.note
    assert finding.verdict is Verdict.FAILS


def test_a_loss_far_above_what_is_claimed_is_no_condition() -> None:
    all_lose = judge(BY_ID["M7.quality"], altered("recall", answers(mamba2=0.5, delta=0.5)))
    assert all_lose.verdict is Verdict.FAILS
    some = judge(BY_ID["M7.quality"], altered("recall", answers(mamba2=0.96, delta=0.96)))
    assert some.verdict is Verdict.HOLDS


def test_words_that_are_computed_change_with_what_they_are_computed_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Records(RESULTS)
    assert "so the mean does not show them" in judge(BY_ID["M10.mean"], plain).evidence.note
    monkeypatch.setattr(methods, "hidden_by_the_mean", lambda: {"mean": 0.1, "far": 0.1, "share": 0.06})
    assert "shows them all the same" in judge(BY_ID["M10.mean"], plain).evidence.note
    faster = {card.name: 1 + i for i, card in enumerate(methods.DEVICES.values())}
    step = methods.batch_step_seconds
    monkeypatch.setattr(
        methods,
        "batch_step_seconds",
        lambda load, card, n: step(load, card, n) / (faster[card.name] if load.stored < 2**31 else 1),
    )
    assert "differs by device" in judge(BY_ID["M12"], plain).evidence.note
    monkeypatch.setattr(methods, "RELEASED", methods.RELEASED[:1])
    assert "few build it" in judge(BY_ID["M8"], plain).evidence.note


def test_what_chapter_13_says_in_prose_is_what_the_rows_say(findings: dict[str, Finding]) -> None:
    notebook = json.loads((ROOT / "notebooks/13_verdict.ipynb").read_text())
    prose = " ".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    last: dict[str, Any] = {row["run"]: row for row in Records(RESULTS).rows("convert")}  # the last step
    latent, losses = last["mhc-32-activations"], {r: x["losses"]["sympy"]["loss"] for r, x in last.items()}
    assert "converting a trained model it is the best per byte that we measured" in prose
    for name, row in last.items():
        if not name.startswith("mhc") and row["bytes_stored_per_token"] <= latent["bytes_stored_per_token"]:
            assert losses[name] > losses["mhc-32-activations"], name
    assert "Where a claim can be computed, the article is mostly right, or right with a condition." in prose
    bytes_ = [f.verdict in (Verdict.HOLDS, Verdict.CONDITIONS) for n, f in findings.items() if "bytes" in n]
    assert 2 * sum(bytes_) > len(bytes_) == 5


def test_words_about_the_predictions_are_those_of_the_shapes_that_are_counted() -> None:
    first, second, third = predictions.PREDICTIONS
    now = predictions.small_caches()
    assert first.note.startswith("Sharing holds already.") == now.shared_or_latent.all
    most = [2 * len(found.have) > found.total for found in (now.windows, now.long_with_latents)]
    assert "Windows as the baseline and latents for long contexts do not" in first.note
    assert most == [False, False]
    assert "the open ones above use states" in second.note
    assert all("state" in means for means in predictions.million_tokens().values())
    assert "bandwidth cancels" in third.state()


# Rows of the study that arrive


def study(**above: float) -> Records:
    """Rows of whole runs, three seeds: full attention, and each design so far above it."""
    runs = [("full", 0.0), *((name.replace("_", "-"), loss) for name, loss in above.items())]
    rows = [
        language_row(LanguageRun("cpu", design, CPU.training.steps, 2e-3, seed), 1.3 + loss + 0.001 * seed**2)
        for design, loss in runs
        for seed in range(3)
    ]
    return with_study(rows)


def with_study(rows: Iterable[Any]) -> Records:
    records = Records(RESULTS)
    records._read["quality"] = (list(rows), {"quality-amd-epyc-2-cores.json"})
    return records


def test_a_verdict_on_quality_changes_when_rows_arrive() -> None:
    claim = BY_ID["M3.quality"]
    without = judge(claim, with_study([]))
    assert (without.verdict, without.pending) == (Verdict.FAILS, True)
    assert NOT_YET in without.evidence.measured
    assert "--tier A" in "".join(without.waits)
    for loss, place, then in ((0.1, MORE, Verdict.FAILS), (-0.05, AS_CLAIMED, Verdict.CONDITIONS)):
        finding = judge(claim, study(gqa_4x=loss))
        assert (finding.verdict, finding.pending) == (then, False)
        assert place in finding.evidence.note
        assert f"{math.expm1(loss):+.1%}" in finding.evidence.measured
    assert judge(BY_ID["M4.quality"], with_study([])).verdict is Verdict.OPEN
    assert judge(BY_ID["M4.quality"], study(mhc_8x=0.1)).verdict is Verdict.FAILS
    assert judge(BY_ID["M4.quality"], study(mhc_8x=0.015)).verdict is Verdict.CONDITIONS


def test_a_converted_model_is_that_of_the_study_once_all_its_runs_are_there() -> None:
    rows = rows_of("C")
    for name in ("M3.quality", "M4.quality"):
        whole, before, cut = (judge(BY_ID[name], with_study(some)) for some in (rows, [], rows[:-1]))
        assert "(mean over seeds)" in whole.evidence.measured
        assert "(one run)" in before.evidence.measured
        assert whole.evidence.numbers["converted"] != before.evidence.numbers["converted"]
        assert "kvlearn study quality --tier C" not in {*before.waits, *cut.waits}


def test_of_a_gain_the_share_that_needs_no_state_is_told() -> None:
    for name, design in (("M7.quality", "mamba2"), ("M8", "hybrid")):
        both = judge(BY_ID[name], study(**{design: -0.1, "hybrid_conv": -0.05})).evidence.note
        assert "no state has 50% of that gain" in both
        for other in (
            {design: 0.1, "hybrid_conv": -0.05},
            {design: -0.1, "hybrid_conv": 0.02},
            {design: -0.1},
        ):
            assert "no state" not in judge(BY_ID[name], study(**other)).evidence.note


def test_a_mix_is_compared_with_full_attention_only_where_both_have_run() -> None:
    assert "has not yet compared" in judge(BY_ID["M8"], with_study([])).evidence.note
    for loss, how in ((0.0, "ties with"), (0.1, "worse than"), (-0.1, "better than")):
        assert how in judge(BY_ID["M8"], study(hybrid=loss)).evidence.note


def test_every_verdict_survives_whatever_of_the_study_has_run(findings: dict[str, Finding]) -> None:
    rows = [*rows_of("A"), *rows_of("B"), *rows_of("C")]
    whole = {f.claim.id: f for f in verdict.judge_all(CLAIMS, with_study(rows))}
    assert {name for name, f in whole.items() if f.pending} == {"M4.quality"}  # mhc-8x is of tier D
    for finding in whole.values():
        told = finding.evidence.measured + finding.evidence.note
        assert (NOT_YET in told) is finding.pending, finding.claim.id
    nothing = {f.claim.id: f for f in verdict.judge_all(CLAIMS, with_study([]))}
    for name, finding in nothing.items():
        used = "quality-amd-epyc-2-cores.json"
        assert used not in finding.files
        if finding.pending:
            assert NOT_YET in finding.evidence.measured + finding.evidence.note
            assert used in whole[name].files


def test_a_difference_of_too_few_seeds_is_told_and_waits_for_the_others() -> None:
    rows = [row for row in rows_of("A") if row["design"] in ("full", "gqa-4x")]
    one = [row for row in rows if row["design"] == "full" or row["seed"] < 2]
    assert judge(BY_ID["M3.quality"], with_study(rows)).waits == ()
    found = judge(BY_ID["M3.quality"], with_study(one))
    assert NOT_YET not in found.evidence.measured
    assert found.waits == ("kvlearn study quality --tier A",)


@pytest.mark.parametrize(
    ("name", "file", "key", "gone"),
    [
        ("M5.order", "window", "what", "prefill_time_exponent"),
        ("M6.order", "window", "name", "bigbird"),
        ("M9.context", "ring", "what", "output_difference"),
        ("M9.context", "ring", "what", "layer_memory_ratio"),
        ("M13.leak", "serving", "what", "leak_prompts"),
        ("M13.research", "serving", "what", "noise_success"),
        ("M3.quality", "convert", "run", "gqa-2-mean"),
        ("M11.parameters", "convert", "run", "mhc-32-activations"),
        ("M5.quality", "window_quality", "run", "window-32"),
        ("M6.bytes", "window_quality", "run", "strided"),
    ],
)
def test_a_file_without_the_rows_of_a_claim_is_no_error(name: str, file: str, key: str, gone: str) -> None:
    """A benchmark that was stopped, or whose row has no number: ``comparable`` leaves that row out."""
    records = with_study([])
    rows = [row for row in Records(RESULTS).rows(file) if row.get(key) != gone]
    records._read[file] = (rows, {f"{file}-cut.json"})
    finding = judge(BY_ID[name], records)
    assert finding.verdict is Verdict.OPEN
    assert any(f" {file} --record" in command for command in finding.waits)


RECALLED = {
    "M5.quality": ("mqar-8", ("window-8", "full")),
    "M8": ("copy-4", ("hybrid-linear-8", "full", "linear-8")),
}


@pytest.mark.parametrize("name", RECALLED)
def test_recall_is_told_as_it_arrives_task_by_task_and_design_by_design(name: str) -> None:
    """A number counts when every rate and seed of its design has run, and never before."""
    task, designs = RECALLED[name]
    rows = [row for row in rows_of("B") if row["design"] in designs]
    here, elsewhere = ([row for row in rows if (row["task"] == task) is own] for own in (True, False))
    nothing, whole = judge(BY_ID[name], with_study(elsewhere)), judge(BY_ID[name], with_study(rows))
    tier = "kvlearn study quality --tier B"
    assert tier in nothing.waits
    assert tier not in whole.waits
    told = whole.evidence.measured + whole.evidence.note
    for design in designs:
        own = [row for row in here if row["design"] == design]
        share = f"{sum(row['accuracy'] for row in own if row['lr'] == 5e-3) / 3:.0%}"
        assert f"{design} {share}" in told
        assert f"{design} {NOT_YET}" not in told
        for missing in own:  # one run fewer is a number fewer, whichever it is
            if len(own) == 4:
                part = judge(BY_ID[name], with_study(row for row in rows if row is not missing))
                assert tier in part.waits
                assert f"{design} {NOT_YET}" in part.evidence.measured + part.evidence.note
        others = judge(BY_ID[name], with_study(row for row in rows if row not in own))
        assert f"{design} {NOT_YET}" in others.evidence.measured + others.evidence.note
    assert nothing.verdict is whole.verdict


def test_states_are_told_over_the_tasks_that_full_attention_answers() -> None:
    claim, designs = BY_ID["M7.quality"], ("full", "mamba2-4", "mamba2-16")
    shares = {"mqar-8": 0.5, "mqar-16": 0.25, "needle-1": 1.0, "needle-8": 0.1}
    rows = []
    for row in rows_of("B"):
        if row["design"] in designs and row["task"] in shares:
            lost = row["design"] == "full" and row["task"] == "needle-8"
            share = 0.7 if lost else 1.0 if row["design"] == "full" else shares[row["task"]]
            rows.append({**row, "accuracy": share})
    some = judge(claim, with_study(rows))
    where = "where full attention answers (mqar-8, mqar-16, needle-1), mamba2-4 25% to 100%, mamba2-16 25% to"
    assert where in some.evidence.note
    assert f"{NOT_YET}: copy-4, induction." in some.evidence.note
    assert "kvlearn study quality --tier B" in some.waits
    part = judge(claim, with_study(row for row in rows if row["design"] != "mamba2-16"))
    assert f"mamba2-16 {NOT_YET}; {NOT_YET}: mqar-8, mqar-16, needle-1, copy-4" in part.evidence.note
    nothing = judge(claim, with_study([]))
    assert f"Recall in our study: {NOT_YET}: mqar-8," in nothing.evidence.note
    whole = judge(claim, with_study(rows_of("B")))
    assert NOT_YET not in whole.evidence.note.split("Recall in our study")[1]
    assert not any("B" in wait for wait in whole.waits)
    fails = [{**row, "accuracy": 0.5} for row in rows_of("B")]
    assert "answers none of the tasks" in judge(claim, with_study(fails)).evidence.note
    assert {f.verdict for f in (some, part, nothing, whole)} == {Verdict.FAILS}


def test_recall_that_diverged_has_run_and_another_preset_is_not_ours() -> None:
    rows = [row for row in rows_of("B") if (row["task"], row["design"]) == ("needle-1", "full")]
    assert with_study(rows).recall("needle-1", "full") == 1.0
    lost = [{key: value for key, value in row.items() if key != "accuracy"} | {"loss": None} for row in rows]
    assert with_study(lost).recall("needle-1", "full") == 0.0
    gpu = [{**row, "run": row["run"].replace("-cpu-", "-gpu-"), "accuracy": 0.0} for row in rows]
    assert with_study([*gpu, *rows]).recall("needle-1", "full") == 1.0
    assert with_study(gpu).recall("needle-1", "full") is None


def test_forgetting_is_told_with_seeds_when_every_conversion_of_it_has_run() -> None:
    claim, rows = BY_ID["M11.forgetting"], rows_of("C")
    without = judge(claim, with_study([]))
    assert without.waits == ("kvlearn study quality --tier C",)
    assert without.evidence.measured.endswith(f"in the study: {NOT_YET}")
    used = [row for row in rows if row["design"] in ("full", "gqa-2-mean") and row["share"] == 0.05]
    assert len(used) == 2 * 2 * 3
    for missing in used:
        assert judge(claim, with_study(row for row in rows if row is not missing)).pending
    found = with_study(used).converted("gqa-2-mean")
    assert found is not None
    by_hand = {  # 40% of 0.5, mended at the rate of 1e-3
        text: sum(row["after"][text]["loss"] for row in used if row["design"] == name and row["lr"] == 1e-3)
        / 3
        for name, text in (("gqa-2-mean", "sympy"), ("full", "prose"))
    }
    assert found["sympy"] == pytest.approx(by_hand["sympy"] - by_hand["prose"])
    assert judge(claim, with_study(used)).verdict is without.verdict
    for prose, said in ((0.1, "agrees"), (-0.1, "does not agree")):
        told = json.loads(json.dumps(used))
        for row in told:
            if row["design"] == "gqa-2-mean":
                row["after"]["prose"]["loss"] += prose
        finding = judge(claim, with_study(told))
        assert f"The study {said} on prose." in finding.evidence.note
        assert f"prose {found['prose'] + prose:+.2f}" in finding.evidence.measured
    diverged = [{**row, "loss": None} if row["lr"] == 1e-3 else row for row in used]
    assert with_study(diverged).converted("gqa-2-mean") is not None
    lost = judge(claim, with_study({**row, "loss": None} for row in used))
    assert lost.evidence.measured.endswith("all runs diverged")
    assert not lost.pending


def test_short_runs_and_one_seed_give_no_verdict() -> None:
    short = [
        language_row(LanguageRun("cpu", design, CPU.training.steps // 4, 2e-3, seed), 1.0)
        for design in ("full", "gqa-4x")
        for seed in range(3)
    ]
    assert with_study(short).above_full("gqa-4x") is None
    one = [row for row in study(gqa_4x=0.1).study() if row["design"] == "full" or row["seed"] == 0]
    assert with_study(one).above_full("gqa-4x") is None


def test_a_missing_design_names_its_tier() -> None:
    for design, tier in (("window", "A"), ("mhc-8x", "D")):
        records = with_study([]).for_one_check()
        assert records.above_full(design) is None
        assert records.waits == {f"kvlearn study quality --tier {tier}"}
    assert set(methods.NEAREST.values()) <= set(CPU.designs)
    assert "mhc-8x" not in TIER_A


def test_an_interval_beside_a_claimed_range() -> None:
    def between(low: float, high: float) -> Difference:
        return Difference(3, (low + high) / 2, low, high)

    worse = (0.02, 0.03)
    assert against(None, worse) == NOT_YET
    assert against(between(0.021, 0.029), worse) == AS_CLAIMED
    assert against(between(0.05, 0.06), worse) == MORE
    assert against(between(-0.01, 0.01), worse) == LESS
    assert against(between(0.01, 0.04), worse) == CANNOT_TELL
    assert against(between(-0.5, 0.004), (0.0, 0.005)) == AS_CLAIMED


def test_a_small_study_settles_no_claim_alone() -> None:
    for published in Verdict:
        assert settle(published, NOT_YET) is settle(published, CANNOT_TELL) is published
        assert settle(published, AS_CLAIMED) is (
            Verdict.HOLDS if published is Verdict.HOLDS else Verdict.CONDITIONS
        )
    assert settle(Verdict.HOLDS, MORE) is Verdict.CONDITIONS
    assert settle(Verdict.OPEN, MORE) is Verdict.FAILS


# Predictions


def test_predictions_have_a_day_a_criterion_and_a_place() -> None:
    assert [p.id for p in predictions.PREDICTIONS] == ["P1", "P2", "P3"]
    assert {p.due.year for p in predictions.PREDICTIONS} == {2027, 2028}
    for prediction in predictions.PREDICTIONS:
        assert prediction.criterion
        assert prediction.look_up
        assert prediction.state()


def test_the_first_prediction_is_read_off_from_shapes() -> None:
    now = predictions.small_caches()
    assert now.shared_or_latent.all
    assert len(now.windows.have) == 5
    assert now.long_with_latents.have == ("Kimi Linear 48B-A3B",)
    assert not now.holds
    gemma, kimi = MODELS["Gemma 3 27B"], replace(MODELS["DeepSeek-V3"], context=262_144)
    assert predictions.small_caches([gemma, replace(gemma, name="again"), kimi]).holds
    pythia = MODELS["Pythia 2.8B"]
    assert predictions.small_caches([gemma, kimi, pythia]).shared_or_latent.lack == (pythia.name,)


def test_the_second_and_third_prediction_today() -> None:
    assert predictions.million_tokens() == {
        "MiniMax-Text-01": ("state",),
        "Kimi Linear 48B-A3B": ("latents", "state"),
    }
    gains = predictions.gain_by_compression()
    assert max(gains.values()) == pytest.approx(min(gains.values()))


# Votes


def test_a_vote_is_kept_and_answered(findings: dict[str, Finding]) -> None:
    votes, finding = Votes(), findings["M2"]
    choice, said = _buttons(finding, votes).children[1:]
    assert choice.value is None
    choice.value = Verdict.HOLDS
    assert votes == {"M2": Verdict.HOLDS}
    assert "otherwise" in said.value
    assert votes.right(findings.values()) == (0, 1)
    choice.value = finding.verdict
    assert "So do we" in said.value
    assert votes.right(findings.values()) == (1, 1)
    assert _buttons(finding, votes).children[1].value is finding.verdict


def test_an_answer_is_folded_and_whole_without_a_kernel(findings: dict[str, Finding]) -> None:
    html = Answer(findings["69 KB"])._repr_html_()
    assert html.startswith("<details><summary>")
    assert "open" not in html.split(">")[0]
    for part in ("holds under these conditions", "results/hardware-", "GPT-2 XL", "03"):
        assert part in html


def test_the_article_is_told_in_our_words() -> None:
    assert claims.Verdict is Verdict
    assert all(len(claim.topic) <= 46 for claim in CLAIMS)
