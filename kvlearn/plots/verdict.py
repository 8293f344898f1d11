"""Pictures of chapter 13: the board of verdicts, what the guide weighs, and where it recommends what."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from kvlearn import validate
from kvlearn.measure.units import format_bytes
from kvlearn.plots.picture import COLOURS, VIOLET, Line, Picture, drawing
from kvlearn.verdict import CHANGES, Finding, Recommendation, Verdict, Votes

VERDICTS = {
    Verdict.HOLDS: Line(COLOURS["full"], "", "o"),
    Verdict.CONDITIONS: Line(COLOURS["shared"], "", "s"),
    Verdict.FAILS: Line(COLOURS["sliding"], "", "X"),
    Verdict.OPEN: Line(COLOURS["memory"], "", "D"),
}
HEADS = {
    Verdict.HOLDS: "holds",
    Verdict.CONDITIONS: "conditions",
    Verdict.FAILS: "does not",
    Verdict.OPEN: "cannot be\nchecked",
}
CHANGED = dict(
    zip(
        (change.name for change in CHANGES),
        (
            Line(COLOURS["full"], "", "o"),
            Line(COLOURS["shared"], "", "s"),
            Line(COLOURS["compressed"], "", "^"),
            Line(COLOURS["sparse"], "", "D"),
            Line(COLOURS["hybrid"], "", "v"),
            Line(COLOURS["linear"], "", "P"),
            Line(VIOLET, "", "X"),
            Line(COLOURS["sliding"], "", "*"),
            Line(COLOURS["memory"], "", "p"),
        ),
        strict=True,
    )
)


def verdict_board(findings: Sequence[Finding], votes: Votes | None = None) -> Picture:
    """Every claim in the column of its verdict; a hollow marker waits for a run, a ring is a vote."""
    validate.positive("len(findings)", len(findings))
    votes = votes or Votes()
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.claim.group, []).append(finding)
    panels = _columns(list(groups.items()))
    tallest = max(sum(len(own) + 1 for _, own in panel) for panel in panels)
    size = (10.6, 0.2 * tallest + 1.1)
    with drawing(1, len(panels), size=size, squeeze=False) as (figure, axes):
        for panel, own in zip(axes.flat, panels, strict=True):
            _board(panel, own, votes, tallest)
        handles = [_mark(VERDICTS[verdict], verdict.value) for verdict in Verdict]
        if any(finding.pending for finding in findings):
            handles.append(_mark(Line(COLOURS["memory"], "", "o"), "hollow: a run is missing", hollow=True))
        if votes:
            ring = Line2D([], [], ls="", marker="o", mfc="none", ms=11, color=VIOLET, label="ring: your vote")
            handles.append(ring)
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    by_verdict = {
        verdict: [finding.claim.id for finding in findings if finding.verdict is verdict]
        for verdict in Verdict
    }
    pending = [finding.claim.id for finding in findings if finding.pending]
    told = "; ".join(f"{verdict.value}: {', '.join(ids) or 'none'}" for verdict, ids in by_verdict.items())
    alt = (
        f"The verdicts on {len(findings)} claims. {told}. Waiting for a run: {', '.join(pending) or 'none'}."
    )
    if votes:
        right, cast = votes.right(findings)
        alt += f" {right} of {cast} votes agree."
    return Picture(figure, alt, {"verdicts": by_verdict, "pending": pending, "votes": dict(votes)})


def _columns(groups: list[tuple[str, list[Finding]]]) -> list[list[tuple[str, list[Finding]]]]:
    """Groups in two panels of about equal height, in their order; one panel for a few."""
    heights = [len(own) + 1 for _, own in groups]
    if sum(heights) < 16:
        return [groups]
    cut = min(range(1, len(groups)), key=lambda i: max(sum(heights[:i]), sum(heights[i:])), default=1)
    return [groups[:cut], groups[cut:]] if len(groups) > 1 else [groups]


def _board(axes: Axes, groups: list[tuple[str, list[Finding]]], votes: Votes, tallest: int) -> None:
    places, labels, y = [], [], 0
    for group, own in groups:
        axes.text(-0.5, y, group, fontsize=8, weight="bold", va="center", ha="left")
        y += 1
        for finding in own:
            x, line = list(Verdict).index(finding.verdict), VERDICTS[finding.verdict]
            fill = "none" if finding.pending else line.colour
            axes.plot(x, y, ls="", marker=line.marker, color=line.colour, mfc=fill, ms=6.5)
            if finding.claim.id in votes:
                at = list(Verdict).index(votes[finding.claim.id])
                axes.plot(at, y, ls="", marker="o", mfc="none", color=VIOLET, ms=11, mew=1.2)
            places.append(y)
            topic = finding.claim.topic.replace("$", r"\$")  # dollars, no formula
            labels.append(f"{topic}  ·  {finding.claim.id}")
            y += 1
    axes.set_ylim(tallest - 0.4, -0.6)
    axes.set_xlim(-0.55, len(Verdict) - 0.45)
    axes.set_yticks(places, labels, fontsize=7.5)
    axes.set_xticks(range(len(Verdict)), [HEADS[verdict] for verdict in Verdict], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def recommendation(found: Recommendation) -> Picture:
    """The guide's numbers: bytes per user, users per device, dollars; the recommended change is filled."""
    if not found.options:
        text = f"{found.question}: I do not know\n" + "\n".join(found.unknown)
        with drawing(size=(7.5, 0.8 + 0.3 * len(found.unknown))) as (figure, axes):
            axes.axis("off")
            axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        return Picture(figure, text.replace("\n", "; "), {"unknown": found.unknown})
    columns = {
        "stored per user": [float(option.stored) for option in found.options],
        "read by a step, per user": [float(option.read) for option in found.options],
        "dollars per million tokens": [option.dollars for option in found.options],
    }
    states = [_state(option is found.best, option.excluded) for option in found.options]
    size = (10.4, 0.36 * len(found.options) + 1.6)
    with drawing(1, 3, size=size, sharey=True) as (figure, axes):
        for panel, (title, values) in zip(axes, columns.items(), strict=True):
            for y, (value, state) in enumerate(zip(values, states, strict=True)):
                if math.isfinite(value):
                    line, hollow = STATES[state]
                    fill = "none" if hollow else line.colour
                    panel.plot(value, y, ls="", marker=line.marker, color=line.colour, mfc=fill, ms=8)
                else:
                    panel.text(0.5, y, "does not fit", va="center", fontsize=8, transform=_rows(panel))
            panel.set_title(title, fontsize=9)
            panel.set_xscale("log", base=2 if "dollars" not in title else 10)
            _log_axis(panel, [v for v in values if math.isfinite(v)], dollars="dollars" in title)
        axes[0].set_yticks(
            range(len(found.options)), [_named(option) for option in found.options], fontsize=8
        )
        axes[0].set_ylim(len(found.options) - 0.5, -0.5)
        shown = [state for state in STATES if state in states]
        handles = [_mark(STATES[state][0], state, hollow=STATES[state][1]) for state in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(shown))
    told = "; ".join(
        f"{option.name}: {format_bytes(option.stored)} stored, "
        + (f"{option.dollars:.3g} dollars" if math.isfinite(option.dollars) else "does not fit")
        + (f", left out: {option.excluded}" if option.excluded else "")
        for option in found.options
    )
    best = "nothing" if found.best is None else found.best.name
    alt = f"{found.question}. Recommended: {best}. {told}."
    return Picture(figure, alt, {"states": dict(zip([o.name for o in found.options], states, strict=True))})


STATES = {
    "recommended": (Line(COLOURS["full"], "", "o"), False),
    "allowed": (Line(COLOURS["shared"], "", "s"), True),
    "left out": (Line(COLOURS["memory"], "", "X"), False),
}


def _state(best: bool, excluded: str) -> str:
    return "recommended" if best else "left out" if excluded else "allowed"


def _named(option: Any) -> str:
    unknown = any("quality" in item for item in option.unknown)
    return f"{option.name}{'  (quality?)' if unknown else ''}"


def _rows(panel: Axes) -> Any:
    return panel.get_yaxis_transform()


def _log_axis(panel: Axes, values: Sequence[float], *, dollars: bool) -> None:
    if not values:
        return
    low, high = min(values) / 2, max(values) * 2
    panel.set_xlim(low, high)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    if dollars:
        steps = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]
        ticks = [x for x in steps if low <= x <= high]
        panel.set_xticks(ticks[:: max(1, len(ticks) // 4)])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} $"))
    else:
        powers = [2.0**n for n in range(10, 45) if low <= 2.0**n <= high]
        panel.set_xticks(powers[:: max(1, -(-len(powers) // 4))])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(round(x))))
    panel.tick_params(axis="x", labelsize=8)


def decisions(panels: Mapping[str, Mapping[tuple[int, int], str | None]]) -> Picture:
    """The recommendation over context and users, a panel per question; a dot where there is none.

    ``panels[title][context, users]`` is the name of a change (``kvlearn.verdict.decision_map``).
    """
    validate.positive("len(panels)", len(panels))
    size = (3.4 * len(panels) + 0.8, 4.2)
    shown = [name for name in CHANGED if any(name in found.values() for found in panels.values())]
    with drawing(1, len(panels), size=size, sharey=True, squeeze=False) as (figure, axes):
        for panel, (title, found) in zip(axes.flat, panels.items(), strict=True):
            contexts, users = (sorted({key[i] for key in found}) for i in (0, 1))
            for (context, n), name in found.items():
                x, y = contexts.index(context), users.index(n)
                if name is None:
                    panel.plot(x, y, ls="", marker=".", color=COLOURS["memory"], ms=4)
                else:
                    line = CHANGED[name]
                    panel.plot(x, y, ls="", marker=line.marker, color=line.colour, ms=7)
            panel.set_xticks(range(len(contexts)), [_tokens(n) for n in contexts], fontsize=8)
            panel.set_yticks(range(len(users)), [str(n) for n in users], fontsize=8)
            panel.set_xlim(-0.6, len(contexts) - 0.4)
            panel.set_ylim(-0.6, len(users) - 0.4)
            panel.set_xlabel("tokens of context")
            panel.set_title(title, fontsize=9)
            panel.grid(False)
        axes[0, 0].set_ylabel("users at a time")
        handles = [_mark(CHANGED[name], name) for name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(4, len(handles))))
    told = "; ".join(
        f"{title}: " + ", ".join(f"{name} {sum(x == name for x in found.values())}" for name in shown)
        for title, found in panels.items()
    )
    alt = f"What is recommended over context and users, and at how many of the points. {told}."
    return Picture(figure, alt, {"panels": {title: dict(found) for title, found in panels.items()}})


def _tokens(n: int) -> str:
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 1024}K"


def _mark(line: Line, label: str, *, hollow: bool = False) -> Line2D:
    fill = "none" if hollow else line.colour
    return Line2D([], [], ls="", marker=line.marker, color=line.colour, mfc=fill, ms=7, label=label)
