"""The reader votes on a claim, then unfolds our answer.

The votes are kept in a ``Votes``, which the notebook makes and the board draws. Where no kernel runs, each
claim is still there, with its answer folded below.
"""

from collections.abc import Iterable
from html import escape
from typing import Any

from kvlearn.verdict.claim import Finding, Verdict

FALLBACK = "Run this cell to vote."


class Votes(dict[str, Verdict]):
    """The reader's verdict by the id of a claim."""

    def right(self, findings: Iterable[Finding]) -> tuple[int, int]:
        """How many votes are ours, of those that were given on ``findings``."""
        cast = [finding for finding in findings if finding.claim.id in self]
        return sum(self[finding.claim.id] is finding.verdict for finding in cast), len(cast)


class Answer:
    """Our verdict on a claim, folded under the claim."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The texts by their titles; titles without a text are left out."""
        finding = self.finding
        lines = [
            ("verdict", finding.verdict.value),
            ("measured here", finding.evidence.measured or "nothing to measure"),
            ("from", ", ".join(f"results/{name}" for name in finding.files)),
            ("missing", ", ".join(finding.waits)),
            ("published elsewhere", finding.claim.published or "nothing that we know"),
            ("says" if finding.verdict is Verdict.OPEN else "so", finding.evidence.note),
            ("chapter", finding.claim.shown),
        ]
        return [(title, text) for title, text in lines if text]

    def __repr__(self) -> str:
        told = "\n".join(f"  {title}: {text}" for title, text in self.lines)
        return f"{self.finding.claim.id} · {self.finding.claim.claimed}\n{told}"

    def _repr_html_(self) -> str:
        claim = self.finding.claim
        rows = "".join(
            f"<tr><td style='text-align: left; vertical-align: top'><b>{escape(title)}</b></td>"
            f"<td style='text-align: left'>{escape(text)}</td></tr>"
            for title, text in self.lines
        )
        head = f"<b>{escape(claim.id)}</b> · {escape(claim.claimed)}"
        return f"<details><summary>{head}</summary><table><tbody>{rows}</tbody></table></details>"


def ballot(findings: Iterable[Finding], votes: Votes) -> None:
    """For each claim four buttons, and below them the claim with our answer folded under it."""
    from IPython.display import display

    for finding in findings:
        box = _buttons(finding, votes)
        view = box._repr_mimebundle_() or {}
        display({**view, "text/plain": FALLBACK}, raw=True)
        display(Answer(finding))


def _buttons(finding: Finding, votes: Votes) -> Any:
    import ipywidgets as widgets

    claim = finding.claim
    cast = votes.get(claim.id)
    choice = widgets.ToggleButtons(
        options=[(verdict.value, verdict) for verdict in Verdict],
        value=cast,
        style={"button_width": "auto"},
    )
    said = widgets.HTML()

    def vote(change: Any) -> None:
        votes[claim.id] = change["new"]
        same = "So do we." if change["new"] is finding.verdict else "We say otherwise."
        said.value = f"You say: {change['new'].value}. {same} Unfold the claim below."

    choice.observe(vote, names="value")
    return widgets.VBox([widgets.HTML(f"<b>{escape(claim.id)}</b> · {escape(claim.topic)}"), choice, said])
