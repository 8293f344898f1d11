"""Runs one requirement on an answer, round by round, and keeps what was seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlearn.grading.compare import Difference
from kvlearn.grading.exercise import Exercise, Requirement
from kvlearn.grading.guard import Guarded, NotWritten, Raised, Record, shorten
from kvlearn.grading.trial import Observation, Stop, Trial


@dataclass
class Outcome:
    """How a requirement came out. ``trace`` holds the observations of every round."""

    status: str = "passed"
    expected: str = ""
    came: str = ""
    borrowed: str = ""
    trace: list[list[Observation]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def fail(self, status: str, came: str, expected: str = "") -> None:
        """Note a failure; the first one is what the learner is told."""
        if self.passed:
            self.status, self.came, self.expected = status, came, expected


def run_requirement(
    exercise: Exercise, requirement: Requirement, answers: Sequence[Any], seed: int, rounds: int | None = None
) -> Outcome:
    """All rounds of a requirement (or the first ``rounds``); they end early where the answer raises."""
    outcome = Outcome()
    for round in range(requirement.rounds if rounds is None else rounds):
        record = Record(exercise.forbidden, exercise.may_use_kvlearn)
        trial = Trial(seed, round, record)
        raised = play(requirement, trial, answers, exercise.answers)
        outcome.trace.append(trial.observations)
        if record.borrowed:
            outcome.borrowed = record.borrowed
            outcome.fail("failed", f"a call of {record.borrowed}, which does the work of this exercise")
        for observation in trial.observations:
            if observation.difference is not None:
                outcome.fail("failed", *in_words(observation.difference, observation.call))
        if raised is not None:
            outcome.fail(*raised)
            break
    return outcome


def play(
    requirement: Requirement, trial: Trial, answers: Sequence[Any], names: Sequence[str]
) -> tuple[str, str] | None:
    """One round. Returns how it broke off (status, what came), or None."""
    record = trial.record
    guarded = [Guarded(answer, name, record) for answer, name in zip(answers, names, strict=True)]
    try:
        requirement.script(trial, *guarded)
    except Stop:
        return None
    except NotWritten:
        return "not attempted", f"{record.name} is not written yet (NotImplementedError)"
    except Raised as raised:
        return "raised", f"{raised.what}\nin {record.call}"
    except Exception as error:  # the script met something it could not work with
        return (
            "failed",
            f"{record.call} gave something unusable ({type(error).__name__}: {shorten(str(error))})",
        )
    return None


def in_words(difference: Difference, call: str) -> tuple[str, str]:
    part = f"{difference.what} " if difference.what else ""
    return f"{part}{difference.came}" + (f"\nin {call}" if call else ""), f"here: {part}{difference.expected}"
