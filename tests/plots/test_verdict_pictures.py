"""The board shows every verdict where it belongs; the guide's pictures show what it says."""

from pathlib import Path

import pytest

from kvlearn import plots
from kvlearn.plots.verdict import CHANGED, HEADS, STATES, VERDICTS
from kvlearn.verdict import CHANGES, Claim, Evidence, Finding, Records, Verdict, Votes, recommend

RECORDED = Records(Path(__file__).resolve().parents[2] / "results")


def finding(name: str, verdict: Verdict, group: str = "one", waits: tuple[str, ...] = ()) -> Finding:
    claim = Claim(name, group, f"topic of {name}", "It is so.", lambda _: evidence)
    evidence = Evidence(verdict, "", "a note")
    return Finding(claim, evidence, (), waits)


FINDINGS = [
    finding("a", Verdict.HOLDS),
    finding("b", Verdict.FAILS, waits=("kvlearn study quality --tier A",)),
    finding("c", Verdict.OPEN, "two"),
    finding("d", Verdict.CONDITIONS, "two"),
]


def test_every_claim_is_in_the_column_of_its_verdict() -> None:
    picture = plots.verdict_board(FINDINGS)
    (axes,) = picture.figure.axes
    drawn = {(line.get_xdata()[0], line.get_ydata()[0]): line for line in axes.lines}
    labels = {
        tick: text.get_text() for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    assert len(drawn) == len(FINDINGS)
    for (x, y), line in drawn.items():
        (own,) = (f for f in FINDINGS if labels[y].endswith(f"·  {f.claim.id}"))
        assert list(Verdict)[int(x)] is own.verdict
        assert line.get_marker() == VERDICTS[own.verdict].marker
        assert line.get_color() == VERDICTS[own.verdict].colour
        assert (line.get_markerfacecolor() == "none") is own.pending
    assert picture.data["verdicts"] == {
        Verdict.HOLDS: ["a"],
        Verdict.CONDITIONS: ["d"],
        Verdict.FAILS: ["b"],
        Verdict.OPEN: ["c"],
    }
    assert picture.data["pending"] == ["b"]
    assert "does not hold: b" in picture.alt


def test_votes_are_drawn_where_they_were_cast() -> None:
    votes = Votes({"a": Verdict.OPEN, "d": Verdict.CONDITIONS})
    picture = plots.verdict_board(FINDINGS, votes)
    (axes,) = picture.figure.axes
    rings = [
        (int(line.get_xdata()[0]), line.get_ydata()[0]) for line in axes.lines if line.get_markersize() > 10
    ]
    assert {x for x, _ in rings} == {list(Verdict).index(vote) for vote in votes.values()}
    assert "1 of 2 votes agree" in picture.alt
    assert picture.data["votes"] == votes


def test_many_claims_take_two_columns_and_none_is_lost() -> None:
    many = [finding(f"{group}{i}", Verdict.HOLDS, group) for group in "abcdefg" for i in range(4)]
    figure = plots.verdict_board(many).figure
    assert len(figure.axes) == 2
    assert sum(len(axes.lines) for axes in figure.axes) == len(many)


def test_verdicts_states_and_changes_differ_in_colour_and_marker() -> None:
    assert list(VERDICTS) == list(HEADS) == list(Verdict)
    assert list(CHANGED) == [change.name for change in CHANGES]
    for lines in (VERDICTS.values(), CHANGED.values(), (line for line, _ in STATES.values())):
        lines = list(lines)
        assert len({line.colour for line in lines}) == len({line.marker for line in lines}) == len(lines)


def test_the_guide_is_drawn_as_it_answered() -> None:
    found = recommend("Llama 3.1 8B", 32_768, 64, "A100 80 GB", records=RECORDED)
    picture = plots.recommendation(found)
    assert picture.data["states"] == {
        option.name: "recommended" if option is found.best else "left out" if option.excluded else "allowed"
        for option in found.options
    }
    assert list(picture.data["states"].values()).count("recommended") == 1
    stored, read, dollars = picture.figure.axes
    for axes, values in (
        (stored, [o.stored for o in found.options]),
        (dollars, [o.dollars for o in found.options]),
    ):
        assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(values)
    assert len(read.lines) == len(found.options)
    unknown = plots.recommendation(recommend("GPT-9", 1024, 1, "A100 80 GB", records=RECORDED))
    assert "I do not know" in unknown.alt


def test_the_map_has_a_point_for_each_answer() -> None:
    panels = {"a card": {(1024, 1): "as it is", (1024, 4): "latents", (2048, 1): None, (2048, 4): "latents"}}
    picture = plots.decisions(panels)
    (axes,) = picture.figure.axes
    markers = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_marker() for line in axes.lines}
    assert markers[0, 0] == CHANGED["as it is"].marker
    assert markers[0, 1] == markers[1, 1] == CHANGED["latents"].marker
    assert markers[1, 0] == "."
    assert "latents 2" in picture.alt
