"""Draws a score: a table that survives JupyterLab's sanitiser, and one for the terminal.

Inline styles and class names only, colours translucent over the page's own, so that it reads in light and
dark and in a notebook that is not trusted.
"""

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlearn.grading.score import Row, Score

GREEN, RED, AMBER, GREY = "34, 160, 90", "214, 69, 65", "222, 150, 20", "128, 128, 128"
TINT = {"passed": GREEN, "partial": AMBER, "wrong": RED, "error": RED, "not attempted": GREY}
SIGN = {"passed": "✓ passed", "failed": "✗ not yet", "raised": "✗ raised", "not attempted": "– not attempted"}
CELL = "text-align: left; vertical-align: top; padding: 4px 10px"
HINT = {True: "Every requirement holds.", False: "Stuck? {hint} gives a hint, the smallest first."}


def html(score: "Score") -> str:
    tint = TINT[score.status]
    boxes = "".join(mistake_box(mistake.name, mistake.why) for mistake in score.mistakes)
    if not boxes and score.status != "passed":
        boxes = box(tint, escape(score.message))
    rows = "".join(map(row, score.rows))
    heads = "".join(
        f'<th style="{CELL}">{name}</th>' for name in ("requirement", "points", "result", "expected", "came")
    )
    return (
        f'<div class="kvlearn-score" style="border-left: 4px solid rgb({tint}); padding: 2px 0 2px 12px">'
        f'<div style="margin: 4px 0"><b>{escape(score.exercise)} · {escape(score.title)}</b> &nbsp; '
        f'<meter min="0" max="{score.max_score:g}" value="{float(score):g}"></meter> &nbsp; '
        f"<b>{float(score):g} of {score.max_score:g} points · {score.status}</b></div>"
        f'{boxes}<table style="margin: 6px 0"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f'<div style="margin: 4px 0">{closing(score, "code")}</div></div>'
    )


def row(row: "Row") -> str:
    tint = GREEN if row.status == "passed" else GREY if row.status == "not attempted" else RED
    sign = SIGN[row.status].replace(" ", "&nbsp;")
    cells = (
        f'<td style="{CELL}">{escape(row.name)}</td>',
        f'<td style="{CELL}">{row.earned}&#8239;/&#8239;{row.points}</td>',
        f'<td style="{CELL}; background-color: rgba({tint}, 0.2)"><b>{sign}</b></td>',
        f'<td style="{CELL}">{lines(row.expected)}</td>',
        f'<td style="{CELL}">{lines(row.came)}</td>',
    )
    return f"<tr>{''.join(cells)}</tr>"


def prose(words: str) -> str:
    """What is written `so` as code, and *so* in italics."""
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))
    return re.sub(r"(?<![\w*])\*(\w[^*<]*)\*", r"<em>\1</em>", words)


def lines(words: str) -> str:
    return escape(words).replace("\n", "<br>")


def mistake_box(name: str, why: str) -> str:
    return box(AMBER, f"<b>A known mistake: {escape(name)}.</b><br>{prose(why)}")


def box(tint: str, content: str) -> str:
    return (
        f'<div style="margin: 6px 0; padding: 6px 10px; border-radius: 4px; max-width: 900px; '
        f'background-color: rgba({tint}, 0.16)">{content}</div>'
    )


def closing(score: "Score", tag: str = "") -> str:
    call = f'kvlearn.hint("{score.exercise}")'
    call = f"<{tag}>{escape(call)}</{tag}>" if tag else call
    return HINT[score.status == "passed"].format(hint=call)


def text(score: "Score") -> str:
    out = [f"{score.exercise} · {score.title}: {float(score):g} of {score.max_score:g}, {score.status}"]
    out += [f"  A known mistake: {mistake.name}. {mistake.why}" for mistake in score.mistakes]
    if not score.mistakes and score.status != "passed":
        out.append(f"  {score.message}")
    for r in score.rows:
        out.append(f"  {SIGN[r.status]:<16} {r.earned}/{r.points}  {r.name}")
        if r.status not in ("passed", "not attempted"):
            for head, words in (("expected", r.expected), ("came", r.came)):
                out += [
                    f"{'':24}{h:<10}{line}" for h, line in zip((head, ""), words.split("\n"), strict=False)
                ]
    return "\n".join([*out, f"  {closing(score)}"])
