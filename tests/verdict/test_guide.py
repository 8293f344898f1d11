"""The guide agrees with the measurements of chapters 10 and 12, refuses what it does not know, and routes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_claims import RESULTS, study, with_study
from test_quality import rows_of

from kvlearn.measure import DEVICES, GB, MODELS, Device, Load, cache_bytes
from kvlearn.measure.cost import batch_step_seconds, dollars_per_million, sharded, users_per_device
from kvlearn.verdict import CHANGES, Records, Request, decision_map, recommend, route
from kvlearn.verdict.guide import AS_IT_IS, longest_measured, place, users_at_speed

LLAMA, CARD = "Llama 3.1 8B", "A100 80 GB"
RECORDED = Records(RESULTS)


def names(found) -> set[str]:  # type: ignore[no-untyped-def]
    return {option.name for option in found.options if not option.excluded}


# Chapter 12


def test_bytes_are_those_that_chapter_12_measured() -> None:
    """Of the layers that it measured with the shape of the guide's own."""
    model = MODELS[LLAMA]
    measured_layers = {"latents": ["mla"], "windows of 4096": ["window"], "states": ["kda"]}
    for change in CHANGES:
        if change.name in measured_layers:
            changed = change.of(model)
            assert changed is not None
            for length in (4096, 32_768, 131_072):
                measured = RECORDED.hardware("stored", *measured_layers[change.name], length)["measured"]
                assert cache_bytes(changed, length) / 32 == pytest.approx(measured, rel=0.05), change.name
    for length in (4096, 131_072):
        assert cache_bytes(model, length) / 32 == RECORDED.hardware("stored", "gqa", length)["measured"]


def recorded_machine() -> Device:
    """The processor of chapter 12, one thread, as it measured itself."""
    found = {
        row["what"]: row["measured"]
        for row in RECORDED.rows("hardware")
        if row["preset"] == "real" and row["threads"] == 1 and row["part"] == "machine"
    }
    return Device("the recorded machine", 10**12, found["read_bandwidth"], found["peak"], "results/hardware")


def test_on_the_machine_of_chapter_12_the_guide_ranks_changes_as_its_clocks_did() -> None:
    """One user at 128K, a model whose heads are not shared yet: every pair that was timed with 32 heads."""
    plain = replace(MODELS[LLAMA], n_kv_heads=32)
    found = recommend(
        plain, 131_072, 1, recorded_machine(), find_anything=False, evidence="any", records=RECORDED
    )
    timed = {option.name: option.layer for option in found.options if option.layer is not None}
    assert {"as it is", "KV heads ÷ 4", "latents", "windows of 4096", "states"} <= set(timed)
    steps = {option.name: option.step for option in found.options}
    by_guide = sorted(timed, key=lambda name: steps[name])
    by_clock = sorted(timed, key=lambda name: timed[name])
    assert by_guide[2:] == by_clock[2:] == ["KV heads ÷ 4", "latents", "as it is"]
    assert set(by_guide[:2]) == set(by_clock[:2])  # a window and a state: weights are most of both


def test_what_is_recommended_was_not_slower_where_chapter_12_timed_both() -> None:
    compared = 0
    for n_kv_heads in (8, 32):
        model = replace(MODELS[LLAMA], n_kv_heads=n_kv_heads)
        for context in (32_768, 131_072):
            for users in (1, 64, 1024):
                for find_anything in (True, False):
                    found = recommend(
                        model,
                        context,
                        users,
                        recorded_machine(),
                        find_anything=find_anything,
                        records=RECORDED,
                    )
                    assert found.best is not None
                    before, after = found.options[0].layer, found.best.layer
                    if before is not None and after is not None and found.best is not found.options[0]:
                        assert after < before
                        compared += 1
    assert compared > 6


def test_users_and_dollars_are_those_of_chapter_12() -> None:
    load, card = Load.of(MODELS[LLAMA], 32_768), DEVICES[CARD]
    full = users_per_device(load, card.memory)
    (option,) = (
        o for o in recommend(LLAMA, 32_768, full, CARD, records=RECORDED).options if o.change is AS_IT_IS
    )
    assert (option.per_device, option.devices, option.group) == (full, 1, 1)
    assert option.dollars == pytest.approx(dollars_per_million(load, card, 2.0, efficiency=0.6))


def test_where_weights_are_most_of_the_bytes_nothing_is_changed() -> None:
    for context, users in ((1024, 1), (2048, 4)):
        found = recommend(LLAMA, context, users, CARD, records=RECORDED)
        assert found.best is not None
        assert found.best.change is AS_IT_IS
        cheapest = min(option.dollars for option in found.options if not option.excluded)
        assert found.best.dollars <= 1.1 * cheapest


def test_weights_are_named_as_the_reason_only_where_they_are_most_of_the_bytes() -> None:
    for model, context, users, told in (("Gemma 3 27B", 524_288, 16, False), (LLAMA, 1024, 1, True)):
        found = recommend(model, context, users, CARD, records=with_study([]))
        assert found.best is not None
        assert found.best.change is AS_IT_IS
        assert "The cheapest change would save" in found.why
        assert ("most bytes are weights" in found.why) is told


def test_the_three_edits_of_chapter_13_do_what_it_says() -> None:
    asked = {"find_anything": True, "worse": 0.01, "records": RECORDED}
    honest = recommend(LLAMA, 32_768, 64, CARD, **asked)
    assert honest.best is not None
    assert "latents" not in names(honest)
    forgets = recommend(LLAMA, 32_768, 64, CARD, **asked | {"find_anything": False}).best
    assert forgets is not None
    assert not forgets.change.finds
    assert forgets.dollars == min(option.dollars for option in honest.options)
    assert "latents" in names(recommend(LLAMA, 32_768, 64, CARD, **asked | {"worse": 10.0}))
    gains = []
    for users in (64, 1):
        found = recommend(LLAMA, 32_768, users, CARD, **asked)
        assert found.best is not None
        gains.append(found.options[0].dollars / found.best.dollars)
    assert gains[0] > 2 * gains[1] > 2


def test_where_the_cache_is_most_of_the_bytes_the_cheapest_is_at_most_a_tenth_cheaper() -> None:
    found = recommend(LLAMA, 131_072, 256, CARD, records=RECORDED)
    assert found.best is not None
    assert found.best.dollars < found.options[0].dollars / 2
    assert found.best.dollars <= 1.1 * min(o.dollars for o in found.options if not o.excluded)


# Chapter 10


def test_a_design_that_the_study_found_worse_is_left_out() -> None:
    good, bad = study(gqa_4x=0.001, mhc_4x=0.2), study(gqa_4x=0.2, mhc_4x=0.001)
    one, other = (recommend(LLAMA, 32_768, 256, CARD, records=records) for records in (good, bad))
    assert "latents" not in names(one)
    assert "KV heads ÷ 4" in names(one)
    assert "KV heads ÷ 4" not in names(other)
    assert "latents" in names(other)
    assert "latents" in names(recommend(LLAMA, 32_768, 256, CARD, worse=0.3, records=good))


def test_no_recommendation_is_against_a_recorded_row() -> None:
    for context in (4096, 32_768, 131_072):
        for find_anything in (True, False):
            best = recommend(LLAMA, context, 256, CARD, find_anything=find_anything, records=RECORDED).best
            assert best is not None
            if best.quality is not None:
                assert best.quality.low <= 0.02
            elif best.change is not AS_IT_IS:
                assert any("quality" in item for item in best.unknown)


def test_only_measured_designs_where_that_is_asked() -> None:
    nothing = recommend(LLAMA, 32_768, 256, CARD, evidence="known", records=with_study([]))
    assert names(nothing) == {"as it is"}
    anything = recommend(LLAMA, 32_768, 256, CARD, evidence="any", records=with_study([]))
    assert "latents, selected" in names(anything)
    planned = recommend(LLAMA, 32_768, 256, CARD, records=with_study([]))
    assert names(planned) == {"as it is", "KV heads ÷ 4", "latents", "3 states : 1"}
    some = recommend(LLAMA, 32_768, 256, CARD, evidence="known", records=study(gqa_4x=0.001))
    assert names(some) == {"as it is", "KV heads ÷ 4"}
    assert some.best is not None
    assert some.best.name == "KV heads ÷ 4"


def test_windows_and_states_alone_are_left_out_where_any_token_must_be_found() -> None:
    strict, free = (
        recommend(LLAMA, 32_768, 256, CARD, find_anything=f, records=with_study([])) for f in (True, False)
    )
    assert not names(strict) & {"windows of 4096", "states"}
    assert {"windows of 4096", "states"} <= names(free)


def test_a_mix_that_did_not_recall_in_chapter_10_is_left_out() -> None:
    """And one that did is not; a task that full attention fails says nothing."""
    rows = rows_of("B")
    full = [row for row in rows if row["design"] == "full"]
    mix = [row for row in rows if row["design"] == "hybrid-linear-8"]
    assert {row["task"] for row in mix} <= {row["task"] for row in full}

    def left_out(full_share: float, mix_share: float) -> bool:
        given = [{**row, "accuracy": full_share} for row in full]
        given += [{**row, "accuracy": mix_share} for row in mix]
        return "3 states : 1" not in names(recommend(LLAMA, 32_768, 256, CARD, records=with_study(given)))

    assert left_out(1.0, 0.5)
    assert not left_out(1.0, 0.99)
    assert not left_out(0.5, 0.5)
    open_question = recommend(LLAMA, 32_768, 256, CARD, records=with_study([]))
    (option,) = (o for o in open_question.options if o.name == "3 states : 1")
    assert any("finds everything again" in item for item in option.unknown)


# Questions without an answer


def test_unknown_hardware_and_models_are_answered_with_what_is_missing() -> None:
    for model, device, said in ((LLAMA, "a card of 2030", "data sheet"), ("GPT-9", CARD, "config.json")):
        found = recommend(model, 4096, 1, device, records=RECORDED)
        assert found.best is None
        assert found.options == ()
        assert said in found.unknown[0]
        assert "I do not know" in repr(found)
    card = Device("a card of 2030", 10**12, 1e13, 1e16, "made up")
    assert recommend(LLAMA, 4096, 1, card, records=RECORDED).best is not None


def test_a_context_beyond_what_was_measured_and_a_design_without_rows_are_said() -> None:
    longest = longest_measured(RECORDED)
    assert longest == 131_072
    within = recommend(LLAMA, longest, 64, "H200", records=with_study([]))
    beyond = recommend(LLAMA, 2 * longest, 64, "H200", records=with_study([]))
    assert not any("beyond" in item for item in within.unknown)
    assert any("beyond 131,072 tokens" in item for item in beyond.unknown)
    assert any("made for 131,072" in item for item in beyond.unknown)
    assert any("not yet run" in item for item in within.unknown)
    assert "Not known" in repr(within)
    known = recommend(LLAMA, longest, 64, "H200", evidence="known", records=study(gqa_4x=0.0))
    assert any("contexts of 256 tokens" in item for item in known.unknown)


def test_without_recorded_hardware_the_guide_says_so(tmp_path: Path) -> None:
    found = recommend(LLAMA, 32_768, 64, CARD, records=Records(tmp_path))
    assert any("kvlearn bench hardware is not recorded" in item for item in found.unknown)
    assert all(option.layer is None for option in found.options)


def test_a_model_that_fits_nowhere_gets_no_recommendation() -> None:
    found = recommend("DeepSeek-V3", 4096, 1, Device("tiny", GB, 1e9, 1e12, "made up"), records=RECORDED)
    assert found.best is None
    assert all("does not fit" in option.excluded for option in found.options)


def test_bad_questions_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="context"):
        recommend(LLAMA, 0, 1, CARD)
    with pytest.raises(ValueError, match="users"):
        recommend(LLAMA, 1024, 0, CARD)
    with pytest.raises(ValueError, match="evidence"):
        recommend(LLAMA, 1024, 1, CARD, evidence="some")


# Groups, speeds, routing


def test_a_large_model_takes_the_fewest_devices_that_hold_it() -> None:
    load = Load.of(MODELS["Llama 3.1 405B"], 8192)
    group, users = place(load, DEVICES["A100 80 GB"])
    assert users == users_per_device(load, group * 80 * GB) > 0
    assert users_per_device(load, group // 2 * 80 * GB) == 0


@pytest.mark.parametrize("speed", [5, 20, 80])
def test_users_at_a_speed_get_it_and_one_more_would_not(speed: float) -> None:
    for name in ("RTX 4090", "A100 80 GB", "H200"):
        load, card = Load.of(MODELS[LLAMA], 4096), DEVICES[name]
        users = users_at_speed(load, card, speed, 0.6)
        fit = users_per_device(load, card.memory)
        if users:
            assert batch_step_seconds(load, card, users, 0.6) <= 1 / speed * (1 + 1e-9)
        if users < fit:
            assert batch_step_seconds(load, card, users + 1, 0.6) > 1 / speed


def test_a_mix_of_requests_goes_to_a_mix_of_cards_and_costs_no_more_than_any_single_card() -> None:
    mix = [Request("short", 1024, 100, 20), Request("long", 131_072, 10, 20)]
    plan = route(LLAMA, mix, {"RTX 4090": 0.4, "H200": 3.0})
    assert [assignment.device for assignment in plan.assignments] == ["RTX 4090", "H200"]
    assert plan.dollars < min(plan.alone.values())
    for assignment in plan.assignments:
        load = Load.of(MODELS[LLAMA], assignment.request.context)
        group, each = place(load, DEVICES[assignment.device], assignment.request.speed, 0.6)
        assert assignment.devices == group * math.ceil(assignment.request.users / each)
        card = sharded(DEVICES[assignment.device], group)
        assert batch_step_seconds(load, card, each, 0.6) <= 1 / assignment.request.speed * (1 + 1e-9)


def test_with_one_kind_of_request_there_is_nothing_to_route() -> None:
    prices = {"RTX 4090": 0.4, "A100 80 GB": 1.6, "H200": 3.0}
    plan = route(LLAMA, [Request("chat", 4096, 300)], prices)
    assert plan.dollars == min(plan.alone.values())


def test_a_card_that_cannot_serve_is_said_and_an_unknown_one_refused() -> None:
    plan = route(LLAMA, [Request("impossible", 131_072, 1, speed=1e6)], {"T4": 0.2})
    assert plan.dollars == math.inf
    assert "no card serves all of it; one kind of card alone: T4 cannot" in " ".join(repr(plan).split())
    assert "inf" not in repr(plan)
    with pytest.raises(ValueError, match="prices"):
        route(LLAMA, [Request("chat", 1024, 1)], {"a card of 2030": 1.0})


def test_the_map_is_what_recommend_says_point_by_point() -> None:
    found = decision_map(LLAMA, CARD, (1024, 131_072), (1, 256), records=RECORDED)
    for (context, users), name in found.items():
        best = recommend(LLAMA, context, users, CARD, records=RECORDED).best
        assert name == (None if best is None else best.name)
    assert found[1024, 1] == "as it is"
    assert found[131_072, 256] != "as it is"
