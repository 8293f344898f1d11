"""Every claim of the article has a verdict, and every measured cell comes from results/ or is computed."""

import json
import math
import re
from collections.abc import Iterable, Iterator
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


def test_a_mix_is_compared_with_full_attention_only_where_both_have_run() -> None:
    assert "has not yet compared" in judge(BY_ID["M8"], with_study([])).evidence.note
    for loss, how in ((0.0, "ties with"), (0.1, "worse than"), (-0.1, "better than")):
        assert how in judge(BY_ID["M8"], study(hybrid=loss)).evidence.note


def test_every_verdict_survives_whatever_of_the_study_has_run(findings: dict[str, Finding]) -> None:
    rows = [*rows_of("A"), *rows_of("B"), *rows_of("C")]
    whole = {f.claim.id: f for f in verdict.judge_all(CLAIMS, with_study(rows))}
    assert {name for name, f in whole.items() if f.pending} == {"M4.quality"}  # mhc-8x is of tier D
    nothing = {f.claim.id: f for f in verdict.judge_all(CLAIMS, with_study([]))}
    for name, finding in nothing.items():
        used = "quality-amd-epyc-2-cores.json"
        assert used not in finding.files
        if finding.pending:
            assert NOT_YET in finding.evidence.measured + finding.evidence.note
            assert (used in whole[name].files) is (name != "M4.quality")


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
