"""The leak: a tenant reads another's prompt without a salt, and is at chance with it."""

import pytest

from kvlearn.serving import Template, attack, noise, recover, response_times
from kvlearn.serving.leak import FORM
from kvlearn.workbench import base_model

SHORT = Template(
    (b"ward ", b" is the ward that you asked for, at ten", b"; that is all of it"), FORM.candidates
)


def test_hits_give_the_whole_prompt_away_and_a_salt_closes_that() -> None:
    open_ = attack(base_model(), "hits", salted=False, trials=2, template=SHORT, page=8)
    assert (open_.fields, open_.prompts, open_.chance, open_.requests) == (1.0, 1.0, 0.1, 22)
    closed = attack(base_model(), "hits", salted=True, trials=4, template=SHORT, page=8, seed=1)
    assert closed.fields <= 0.375  # eight fields at a chance of 0.1: more than three right in 0.5 % of cases


def test_the_attacker_takes_what_seems_most_cached_field_after_field() -> None:
    secret = [b"13", b"17"]
    asked = []

    def observe(prompt: bytes) -> float:
        asked.append(prompt)
        return sum(prompt.startswith(SHORT.prompt(secret[:n])) for n in range(3))

    assert recover(SHORT, observe) == secret
    assert asked[0] == b"ward "
    assert asked[11] == SHORT.prompt(secret[:1])


@pytest.mark.slow
def test_a_hit_is_faster_than_a_miss() -> None:
    hits, misses = response_times(base_model(), 10)
    assert sorted(hits)[5] < sorted(misses)[5]


def test_noise_hides_one_answer_and_not_many() -> None:
    hits, misses = [0.010, 0.011], [0.020, 0.021]

    def success(epsilon: float, probes: int = 1) -> float:
        return noise(hits, misses, epsilon=epsilon, probes=probes, trials=300).success

    assert success(100) == 1.0
    assert success(0.1) < 0.25
    assert success(1) < 0.5 < success(1, probes=30)
    answer = noise(hits, misses, epsilon=2.0, delta=0.01, trials=1)
    assert answer.saved == pytest.approx(0.010)
    assert answer.delay == pytest.approx(0.010 / 2 * 3.912, rel=1e-3)  # ln 50


@pytest.mark.parametrize("name", ["epsilon", "delta"])
def test_noise_of_no_size_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0"):
        noise([1.0], [2.0], **{"epsilon": 1.0, name: 0.0})
    with pytest.raises(ValueError, match="n_candidates: expected at least 2"):
        noise([1.0], [2.0], epsilon=1.0, n_candidates=1)
