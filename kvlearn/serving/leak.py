"""The leak of a prefix cache that tenants share: one of them reads another's prompt by guessing it.

A prompt has known text with secret fields in it, as a form has. The attacker submits the known text with one
candidate after another in the first field. If the victim's prompt is cached, the right candidate is found in
the cache, and with it all known text after the field: more tokens are cached, and the first token comes
sooner. Then comes the next field.

Sources: Song et al., "The Early Bird Catches the Leak" (2024); Wu et al., "PROMPTPEEK" (2025); Gu et al.,
"Auditing Prompt Caching in Language Model APIs" (2025), by timing. The defence is vLLM's ``cache_salt``.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvlearn import validate
from kvlearn.model import Decoder
from kvlearn.serving.blocks import Tenant
from kvlearn.serving.engine import Engine


@dataclass(frozen=True)
class Template:
    """Known text, one piece more than there are fields, and what a field may hold. All bytes are tokens."""

    known: Sequence[bytes]
    candidates: Sequence[bytes]

    @property
    def n_fields(self) -> int:
        """Secret fields."""
        return len(self.known) - 1

    def prompt(self, fields: Sequence[bytes]) -> bytes:
        """The first ``len(fields)`` fields filled in, and the known text after the last of them."""
        rest = b"".join(field + text for field, text in zip(fields, self.known[1:], strict=False))
        return self.known[0] + rest


FORM = Template(
    known=(
        b"def schedule_patient_visits(calendar, clinic, doctor):\n    # ward ",
        b": confirm the room, the doctor and the time with the patient, and enter all three of them below\n",
        b" is the ward of the second visit; it is moved to the next morning where the first one was late\n",
        b" is the ward of the last visit; print the form, sign it and give it to the clinic at the exit\n",
    ),
    candidates=tuple(b"%02d" % n for n in range(10, 20)),
)

N_BLOCKS = 512  # of an engine under attack: enough that nothing is evicted

# The attacker's observation of its own request: larger if more of the request was cached.
Observe = Callable[[bytes], float]


def observe_hits(engine: Engine, tenant: str) -> Observe:
    """Cached tokens, as an API reports them that bills these at a lower price."""

    def observe(prompt: bytes) -> float:
        request = engine.submit(list(prompt), 1, tenant=tenant)
        engine.run()
        return request.cached

    return observe


def observe_time(engine: Engine, tenant: str) -> Observe:
    """Minus the seconds until the first token."""

    def observe(prompt: bytes) -> float:
        start = time.perf_counter()
        engine.submit(list(prompt), 1, tenant=tenant)
        engine.run()
        return start - time.perf_counter()

    return observe


def recover(template: Template, observe: Observe) -> list[bytes]:
    """The victim's fields, one after the other: in each, the candidate of which most seems to be cached."""
    found: list[bytes] = []
    while len(found) < template.n_fields:
        observe(template.prompt(found))  # computed once, so that the first guess is no slower than the others
        seen = {guess: observe(template.prompt([*found, guess])) for guess in template.candidates}
        found.append(max(seen, key=seen.__getitem__))
    return found


@dataclass(frozen=True)
class Attack:
    """How often the attacker was right, in fields and in whole prompts, and what chance would give."""

    trials: int
    fields: float
    prompts: float
    chance: float  # of a field
    requests: int  # of the attacker, per trial
    seconds: float  # per trial


def attack(
    model: Decoder,
    channel: Literal["hits", "time"],
    *,
    salted: bool,
    trials: int = 20,
    template: Template = FORM,
    page: int = 16,
    seed: int = 0,
) -> Attack:
    """Attacks on victims whose fields are drawn anew in every trial, each against an engine of its own."""
    validate.one_of("channel", channel, ("hits", "time"))
    rng = random.Random(validate.at_least("seed", seed, 0))
    right, whole, start = 0, 0, time.perf_counter()
    tenants = (Tenant("victim", b"v" if salted else b""), Tenant("attacker", b"a" if salted else b""))
    for _ in range(validate.positive("trials", trials)):
        secret = [rng.choice(template.candidates) for _ in range(template.n_fields)]
        engine = Engine(model, N_BLOCKS, page, tenants, budget=512)
        engine.submit(list(template.prompt(secret)), 1, tenant="victim")
        engine.run()
        observe = (observe_hits if channel == "hits" else observe_time)(engine, "attacker")
        found = recover(template, observe)
        right += sum(guess == true for guess, true in zip(found, secret, strict=True))
        whole += found == secret
    n = len(template.candidates)
    requests, seconds = template.n_fields * (n + 1), (time.perf_counter() - start) / trials
    return Attack(trials, right / trials / template.n_fields, whole / trials, 1 / n, requests, seconds)


def response_times(
    model: Decoder, n: int, *, template: Template = FORM, page: int = 16, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Seconds to the first token of ``n`` right and ``n`` wrong guesses of the first field."""
    rng, hits, misses = random.Random(seed), list[float](), list[float]()
    for _ in range(validate.positive("n", n)):
        right, wrong = rng.sample(list(template.candidates), 2)
        engine = Engine(model, N_BLOCKS, page, (Tenant("victim"), Tenant("attacker")), budget=512)
        engine.submit(list(template.prompt([right])), 1, tenant="victim")
        engine.run()
        observe = observe_time(engine, "attacker")
        misses.append(-observe(template.prompt([wrong])))
        hits.append(-observe(template.prompt([right])))
    return hits, misses


@dataclass(frozen=True)
class Noise:
    """The leak that is left under random delays, and their cost: seconds added to every answer."""

    success: float  # of one field
    chance: float
    delay: float
    saved: float  # seconds by which a hit is faster than a miss


def noise(
    hits: Sequence[float],
    misses: Sequence[float],
    *,
    epsilon: float,
    delta: float = 0.01,
    probes: int = 1,
    n_candidates: int = 10,
    trials: int = 2000,
    seed: int = 0,
) -> Noise:
    """The attack by time on answers that are delayed at random, so that one answer is differentially private.

        delay = c + Laplace(b), cut to 0 … 2c,      b = (miss - hit) / ε,   c = b · ln(1 / 2δ)

    Whether an answer was a hit then changes the probability of any observed time by a factor of e^ε at most,
    except with probability about δ. An answer cannot be sent before it is computed, so that noise is always a
    delay, of c in the mean. ``probes`` independent answers about the same secret have ε · probes: the
    attacker takes their mean. Times are drawn from ``hits`` and ``misses``.

    Source: Dwork et al., "Calibrating Noise to Sensitivity in Private Data Analysis" (2006), section 3.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        validate.above(name, value, 0)
    for name, times in (("hits", hits), ("misses", misses)):
        validate.positive(f"len({name})", len(validate.instance(name, times, (list, tuple))))
        for each in times:
            validate.finite(name, each)
    n_candidates = validate.at_least("n_candidates", n_candidates, 2)
    probes = validate.positive("probes", probes)
    rng = random.Random(validate.at_least("seed", seed, 0))
    saved = max(sum(misses) / len(misses) - sum(hits) / len(hits), 0.0)
    scale = saved / epsilon
    centre = scale * max(math.log(1 / (2 * delta)), 0.0)

    def observed(times: Sequence[float]) -> float:
        answers = []
        for _ in range(probes):
            laplace = rng.expovariate(1) - rng.expovariate(1)
            answers.append(rng.choice(times) + min(max(centre + scale * laplace, 0.0), 2 * centre))
        return sum(answers) / probes

    right = 0
    for _ in range(validate.positive("trials", trials)):
        right += observed(hits) < min(observed(misses) for _ in range(n_candidates - 1))
    return Noise(right / trials, 1 / n_candidates, centre, saved)
