"""The verdict: every claim of the article compared with what the course measured. Chapter 13.

    from kvlearn import verdict

    for finding in verdict.judge_all(verdict.CLAIMS):
        print(finding.claim.id, finding.verdict.value, finding.evidence.measured)
    verdict.recommend("Llama 3.1 8B", context=32_768, users=64, device="A100 80 GB")

claim        a claim, its check, the evidence; ``Records`` reads results/ and notes what is missing
methods      the claims M1 to M13
products     products, money, predictions, remarks, headlines
predictions  the three predictions as tests for 2027 and 2028
released     which mechanisms released models have
guide        ``recommend``, ``route``: a mechanism for a model, context, users and hardware; ``guide`` asks
vote         ``ballot``: the reader's vote before each answer
"""

from collections.abc import Iterable

from kvlearn.measure.table import Table
from kvlearn.verdict.claim import (
    Claim,
    Evidence,
    Finding,
    NotRecordedError,
    Records,
    Verdict,
    judge,
    judge_all,
)
from kvlearn.verdict.guide import (
    CHANGES,
    Change,
    Option,
    Plan,
    Recommendation,
    Request,
    decision_map,
    guide,
    recommend,
    route,
)
from kvlearn.verdict.methods import METHODS
from kvlearn.verdict.predictions import PREDICTIONS, Prediction, million_tokens, small_caches
from kvlearn.verdict.products import MIX, PRICES, PRODUCTS
from kvlearn.verdict.released import RELEASED
from kvlearn.verdict.vote import Answer, Votes, ballot

CLAIMS = METHODS + PRODUCTS
"""Every claim of the article, in the order of the chapter."""


def summary(findings: Iterable[Finding]) -> Table:
    """A row per claim: verdict, measured cell, the files behind it, chapter."""
    return Table(
        [
            {
                "": finding.claim.id,
                "claim": finding.claim.topic,
                "verdict": finding.verdict.value,
                "measured or computed": finding.evidence.measured or "–",
                "read from": ", ".join(name.split("-")[0] for name in finding.files) or "–",
                "chapter": finding.claim.shown,
            }
            for finding in findings
        ]
    )


__all__ = [
    "CHANGES",
    "CLAIMS",
    "METHODS",
    "MIX",
    "PREDICTIONS",
    "PRICES",
    "PRODUCTS",
    "RELEASED",
    "Answer",
    "Change",
    "Claim",
    "Evidence",
    "Finding",
    "NotRecordedError",
    "Option",
    "Plan",
    "Prediction",
    "Recommendation",
    "Records",
    "Request",
    "Verdict",
    "Votes",
    "ballot",
    "decision_map",
    "guide",
    "judge",
    "judge_all",
    "million_tokens",
    "recommend",
    "route",
    "small_caches",
    "summary",
]
