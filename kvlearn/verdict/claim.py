"""A claim, the check that decides it, and what the check finds.

A check is a function of ``Records``. It reads what results/ holds, or computes from the package, and returns
its ``Evidence``: a verdict, the measured cell as text, and the numbers behind it. A number that has not been
recorded is "not yet run" in the cell, and gives no verdict: the verdict is then that of what is published,
or "cannot be checked".
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from kvlearn.measure import results
from kvlearn.study.quality import Compared, Difference, best_recall, compare, loss, summarise
from kvlearn.study.quality.compare import ENOUGH, Value, one_per_run
from kvlearn.study.quality.plan import TASKS, TIER_A, ConversionRun, RecallRun, parts

Row = Mapping[str, Any]
NOT_YET = "not yet run"


class Verdict(Enum):
    """The possible verdicts on a claim."""

    HOLDS = "holds"
    CONDITIONS = "holds under these conditions"
    FAILS = "does not hold"
    OPEN = "cannot be checked"


class NotRecordedError(LookupError):
    """results/ holds no row that a check needs; ``command`` records it."""

    def __init__(self, command: str) -> None:
        super().__init__(f"{NOT_YET}: {command}")
        self.command = command


@dataclass(frozen=True)
class Evidence:
    """The result of a check.

    ``measured``: the cell; empty where nothing can be measured. ``note``: the conditions, what is right in
    place of the claim, or who alone could say. ``numbers``: the values in the cell, by name.
    """

    verdict: Verdict
    measured: str
    note: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One statement of the article, in our words.

    ``topic``: it in three to six words, for the board. ``published``: what others have found, with the
    source. ``chapter``: the one that shows it, None where none does. ``shows``: the part that the chapter
    shows where it is not the whole claim; without a chapter, why none shows it.
    """

    id: str
    group: str
    topic: str
    claimed: str
    check: Callable[["Records"], Evidence]
    published: str = ""
    chapter: int | None = None
    shows: str = ""

    @property
    def shown(self) -> str:
        """The chapter that shows it, as a cell: "12", "12 in part: …", or "none: …" with the reason."""
        if self.chapter is None:
            return f"none: {self.shows}"
        return f"{self.chapter:02}" + (f" in part: {self.shows}" if self.shows else "")


@dataclass(frozen=True)
class Finding:
    """A claim with its evidence, the files of results/ that the check read, and what it still waits for."""

    claim: Claim
    evidence: Evidence
    files: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return self.evidence.verdict

    @property
    def pending(self) -> bool:
        """Whether a run is missing that the check asks for."""
        return bool(self.waits)


class Records:
    """The rows of results/, each file read once. It notes which files were read and what was missing."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.files: set[str] = set()
        self.waits: set[str] = set()
        self._read: dict[str, tuple[list[Row], set[str]]] = {}
        self._layers: dict[tuple[str, str], list[Row]] = {}
        self._compared: dict[tuple[str, Value], dict[str, Compared]] = {}

    def for_one_check(self) -> "Records":
        """The same rows, with nothing noted yet."""
        other = Records(self.folder)
        other._read, other._layers, other._compared = self._read, self._layers, self._compared
        return other

    def rows(self, name: str, command: str = "") -> list[Row]:
        """The rows of results/NAME-*.json that have a number. Raises ``NotRecordedError`` without any."""
        if name not in self._read:
            usable = results.comparable(name, self.folder).recorded
            self._read[name] = (
                [row for run in usable for row in run.rows],
                {run.path.name for run in usable},
            )
        rows, files = self._read[name]
        if not rows:
            raise NotRecordedError(command or f"kvlearn bench {name} --record")
        self.files |= files
        return rows

    def having(self, name: str, /, command: str = "", **where: Any) -> list[Row]:
        """The rows with these values. Raises ``NotRecordedError`` without any."""
        rows = self.rows(name, command)
        found = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
        if not found:
            raise NotRecordedError(command or f"kvlearn bench {name} --record")
        return found

    def study(self) -> list[Row]:
        """The rows of ``kvlearn study quality``; none is no error, for they arrive one by one.

        Its files are noted by ``above_full`` and ``recall``, where they find what they are asked for.
        """
        try:
            rows = self.for_one_check().rows("quality")
        except NotRecordedError:
            return []
        return one_per_run(row for row in rows if row["kind"] != "speed")

    def hardware(self, what: str, mechanism: str, length: int | None = None, model: str = "") -> Row:
        """The row of one layer, real shapes, one thread where several were measured."""
        rows = self.rows("hardware")
        if not self._layers:
            for row in rows:
                if row["preset"] == "real" and "mechanism" in row:
                    self._layers.setdefault((row["what"], row["mechanism"]), []).append(row)
        found = [
            row
            for row in self._layers.get((what, mechanism), [])
            if length in (None, row.get("length")) and model in ("", row["model"])
        ]
        if not found:
            raise NotRecordedError("kvlearn bench hardware --record")
        return min(found, key=lambda row: row["threads"])

    def above_full(self, design: str, value: Value = loss, budget: str = "cpu") -> Difference | None:
        """Loss of ``design`` above full attention's, paired by seed with the pooled interval.

        None until runs of the whole budget of both are recorded. A note of what to run until both have all
        their seeds: before, the difference is that of the seeds that there are.
        """
        rows = self.study()
        if (budget, value) not in self._compared:
            found = compare(rows, budget, value=value)
            self._compared[budget, value] = {item.design: item for item in found}
        items = self._compared[budget, value]
        pooled = items[design].pooled if design in items else None
        if pooled is None or any(len(items[name].rows) < ENOUGH for name in (design, "full")):
            self.waits.add(f"kvlearn study quality --tier {'A' if design in TIER_A else 'D'}")
        if pooled is not None:
            self.rows("quality")
        return pooled

    def recall(self, task: str, design: str) -> float | None:
        """The mean share of right answers of a recall design at its best rate, 0 if all runs diverged.

        None, and a note of what to run, until every rate and seed of the plan has run.
        """
        found = self._recall(task, design)
        if found is None:
            self.waits.add("kvlearn study quality --tier B")
        else:
            self.rows("quality")
        return found

    def _recall(self, task: str, design: str) -> float | None:
        plan = [run for run in _planned("B", RecallRun) if (run.task_name, run.design) == (task, design)]
        rows = [
            row for row in self.study() if row["kind"] == "recall" and row["run"].startswith("recall-cpu-")
        ]
        rows = [row for row in rows if (row["task"], row["design"]) == (task, design)]
        own = best_recall(rows).get((task, design), [])
        rates = {run.lr for run in plan if run.lr is not None} - {row["lr"] for row in rows}
        seeds = {run.seed for run in plan} - {row["seed"] for row in own}
        if not plan or rates or seeds:
            return None
        return summarise([row.get("accuracy") for row in own]).mean or 0.0

    def worst_recall(self, design: str) -> float | None:
        """Of the recall tasks that full attention answers (95% and more), the least share of ``design``.

        None where no such task is recorded of both.
        """
        answered = [task for task in TASKS["cpu"] if (self._recall(task, "full") or 0) >= 0.95]
        shares = [self._recall(task, design) for task in answered]
        return min((share for share in shares if share is not None), default=None)

    def converted(self, design: str, share: float = 0.05) -> dict[str, float] | None:
        """Mean loss of a converted model above the control's, by text, each at its better rate.

        None, and a note of what to run, until every run of both that is planned is recorded; empty where all
        of one diverged.
        """
        rows = {row["run"]: row for row in self.study() if row["kind"] == "conversion"}
        found = []
        for name in (design, "full"):
            plan = [r for r in _planned("C", ConversionRun) if (r.conversion, r.share) == (name, share)]
            rates: dict[float, list[Row]] = {}
            for run in plan:
                if run.name not in rows:
                    self.waits.add("kvlearn study quality --tier C")
                    return None
                if rows[run.name]["loss"] is not None:
                    rates.setdefault(run.lr, []).append(rows[run.name])
            means = [
                {text: _mean([row["after"][text]["loss"] for row in own]) for text in own[0]["after"]}
                for own in rates.values()
            ]
            if not means:
                return {}
            found.append(min(means, key=lambda losses: losses["sympy"]))
        self.rows("quality")
        return {text: loss - found[1][text] for text, loss in found[0].items()}


R = TypeVar("R", RecallRun, ConversionRun)


def _planned(tier: str, kind: type[R]) -> list[R]:
    return [run for part in parts("cpu", tier) for run in part.runs if isinstance(run, kind)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def judge(claim: Claim, records: Records | None = None) -> Finding:
    """Run the check of ``claim``. A check that finds none of its rows gives "cannot be checked"."""
    own = (records or Records()).for_one_check()
    try:
        evidence = claim.check(own)
    except NotRecordedError as missing:
        own.waits.add(missing.command)
        note = "The rows that decide it have not been recorded."
        evidence = Evidence(Verdict.OPEN, f"{NOT_YET}: {missing.command}", note)
    return Finding(claim, evidence, tuple(sorted(own.files)), tuple(sorted(own.waits)))


def judge_all(claims: Iterable[Claim], records: Records | None = None) -> list[Finding]:
    """``judge`` for each; files are read once."""
    records = records or Records()
    return [judge(claim, records) for claim in claims]


AS_CLAIMED, MORE, LESS, CANNOT_TELL = "as claimed", "more than claimed", "less than claimed", "cannot tell"


def against(difference: Difference | None, worse: Sequence[float]) -> str:
    """Where the interval of a loss lies beside a claimed range of percent of perplexity per byte.

    ``worse``: two shares of 1; a range that begins at 0 has no lower end, for a better loss agrees with it.
    """
    if difference is None:
        return NOT_YET
    low, high = (math.log1p(share) for share in worse)
    low = low or -math.inf
    if difference.low > high:
        return MORE
    if difference.high < low:
        return LESS
    return AS_CLAIMED if low <= difference.low and difference.high <= high else CANNOT_TELL


def settle(published: Verdict, ours: str) -> Verdict:
    """The verdict of what is published, changed by our study where that is clear.

    Our models are small: a claim that holds for them holds under conditions.
    """
    if ours == MORE:
        return Verdict.CONDITIONS if published is Verdict.HOLDS else Verdict.FAILS
    if ours in (AS_CLAIMED, LESS):
        return published if published is Verdict.HOLDS else Verdict.CONDITIONS
    return published


def said(difference: Difference | None) -> str:
    """A loss above full attention's in words, as nats per byte and percent of perplexity per byte."""
    if difference is None:
        return NOT_YET
    interval = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] nats per byte"
    tie = ", a tie" if difference.tie else ""
    return f"{math.expm1(difference.mean):+.1%} perplexity per byte ({interval}{tie})"
