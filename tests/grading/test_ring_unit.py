"""Unit 08 takes right answers of every style, gives points for half of one, and knows a deadlock."""

import multiprocessing
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from answers import earned, full_marks, names, right, stub, unit_module
from torch import Tensor

from kvlearn import workbench
from kvlearn.grading import check, find_exercise, judge
from kvlearn.grading.mistakes import compiled, run
from kvlearn.parallel import Layout, Plan, RankFailed, Rule

pytestmark = pytest.mark.answers

CHECKS = unit_module("08_ring_attention", "checks")
MODEL = find_exercise("08.7")


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


# 08.1


def test_the_state_may_be_sums_and_a_maximum_or_an_object() -> None:
    class State:
        def __init__(self, like: Tensor) -> None:
            self.total = torch.zeros(like.shape, dtype=torch.float64)
            self.weight = torch.zeros(like.shape[:-1], dtype=torch.float64)
            self.largest = torch.full(like.shape[:-1], -1e30, dtype=torch.float64)

    def merge(state: Any, part: Any) -> Any:
        out, lse = part
        state = state or State(out)
        largest = torch.maximum(state.largest, lse.double())
        old, new = (state.largest - largest).exp(), (lse.double() - largest).exp()
        values = torch.where(lse[..., None].isneginf(), torch.zeros_like(out), out).double()
        state.total = state.total * old[..., None] + values * new[..., None]
        state.weight, state.largest = state.weight * old + new, largest
        return state

    def finish(state: Any, dtype: torch.dtype) -> Any:
        out = state.total / state.weight.clamp_min(1e-300)[..., None]
        return [out.to(dtype), (state.weight.log() + state.largest).float()]

    assert full_marks("08.1", merge, finish)


def test_a_merge_that_overflows_in_fp64_or_writes_into_its_parts_loses_a_point() -> None:
    merge, finish = ours("08.1")

    def sums(state: Any, part: Any) -> Any:
        weight = part[1].double().exp()
        values = torch.where(part[1][..., None].isneginf(), 0.0, part[0].double()) * weight[..., None]
        return (values, weight) if state is None else (state[0] + values, state[1] + weight)

    def divided(state: Any, dtype: torch.dtype) -> Any:
        return (state[0] / state[1].clamp_min(1e-300)[..., None]).to(dtype), state[1].log().float()

    def overwriting(state: Any, part: Any) -> Any:
        part[0][part[1].isneginf()] = 0.0
        return merge(state, part)

    assert earned(check("08.1", sums, divided)) == [2, 1, 1, 1, 0, 1, 1]
    assert earned(check("08.1", overwriting, finish)) == [2, 1, 1, 0, 1, 1, 1]


def test_kvlearns_own_merge_is_recognised() -> None:
    score = check("08.1", CHECKS.library_merge, CHECKS.library_finish)
    assert float(score) == 0
    assert "kvlearn.attention.core.merge" in score.message


# 08.2


@pytest.mark.parametrize("order", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("window", [None, 3])
def test_the_plan_is_the_librarys(order: Any, window: int | None) -> None:
    layout = Layout(17, 4, order)
    plan = Plan(layout, Rule(window=window))
    held = [layout.positions(rank).tolist() for rank in range(4)]
    hops, timetable = ours("08.2")
    assert hops(held, held, True, window) == plan.hops
    table = timetable(held, held, True, window)
    assert len(table) == plan.n_steps
    for step, owners in enumerate(table):
        for rank, owner in enumerate(owners):
            expected = plan.owner(rank, step)
            assert owner == (expected if plan.pairs[rank][expected] else None)


def test_a_plan_may_be_of_arrays_and_one_function_earns_nothing_alone() -> None:
    hops, timetable = ours("08.2")
    assert full_marks("08.2", lambda *a: np.array(hops(*a)), lambda *a: tuple(map(tuple, timetable(*a))))
    assert full_marks("08.2", CHECKS.library_hops, CHECKS.library_timetable)
    assert sum(earned(check("08.2", hops, stub))) == 0


# 08.3


def test_bytes_may_be_tensors_and_forward_earns_its_part() -> None:
    forward, backward = ours("08.3")
    assert full_marks("08.3", lambda *a: torch.tensor(forward(*a)), lambda *a: np.array(backward(*a)))
    assert earned(check("08.3", forward, stub)) == [1, 1, 2, 0, 0, 0]
    assert earned(check("08.3", lambda *a: sum(forward(*a)), backward)) == [0, 0, 0, 1, 1, 0]


# 08.4


def test_tokens_may_be_dealt_forth_and_back_or_greedily() -> None:
    _, idle = ours("08.4")

    def forth_and_back(costs: list[int], world: int) -> list[Tensor]:
        order = torch.tensor(costs).argsort(descending=True, stable=True)
        shares: list[list[int]] = [[] for _ in range(world)]
        for i, position in enumerate(order.tolist()):
            turn, place = divmod(i, world)
            shares[place if turn % 2 == 0 else world - 1 - place].append(position)
        return [torch.tensor(share) for share in shares]

    assert full_marks("08.4", forth_and_back, lambda held: torch.tensor(idle(held)))
    assert "dict" in check("08.4", lambda *a: dict(enumerate(forth_and_back(*a))), idle).message
    assert earned(check("08.4", forth_and_back, stub)) == [1, 1, 2, 0, 0, 0]


def test_a_striped_text_earns_a_part_and_is_named() -> None:
    _, idle = ours("08.4")
    score = check("08.4", lambda costs, n: [list(range(r, len(costs), n)) for r in range(n)], idle)
    assert earned(score) == [1, 1, 0, 1, 1, 1]
    assert names(score) == ["striped by position"]


# 08.5


def test_an_order_by_rounds_is_as_good_and_a_loop_in_vain_earns_nothing() -> None:
    stuck, _ = ours("08.5")

    def mend(programs: Any) -> Any:
        has = [{rank} for rank in range(len(programs))]
        todo = [(a, *op[1:]) for a, program in enumerate(programs) for op in program if op[0] == "send"]
        new: list[list[Any]] = [[] for _ in programs]
        while todo:
            ready = [m for m in reversed(todo) if m[2] in has[m[0]]]
            for a, b, block in ready:
                new[a].append(["send", b, block])
                new[b].append(["recv", a, block])
                has[b].add(block)
                todo.remove((a, b, block))
        return tuple(new)

    assert full_marks("08.5", stuck, mend)
    assert earned(check("08.5", lambda *_: [], mend)) == [0, 0, 0, 1, 1, 2]
    assert earned(check("08.5", stuck, lambda programs: programs)) == [1, 1, 1, 0, 0, 0]
    assert earned(check("08.5", stuck, lambda programs: [[] for _ in programs])) == [1, 1, 1, 0, 0, 0]
    renamed = check(
        "08.5", stuck, lambda ps: [[("receive", *op[1:]) if op[0] == "recv" else op for op in p] for p in ps]
    )
    assert "rank 0 without ('recv', " in renamed.message
    assert "with ('receive', " in renamed.message


# 08.6


def test_a_ring_may_leave_out_blocks_and_use_the_softmax_sums() -> None:
    def ring(blocks: Any, n_tokens: int, causal: bool = True) -> tuple[Tensor, ...]:
        C, outs = blocks[0][0].shape[2], []
        for rank, (q, _, _) in enumerate(blocks):
            mine = max(0, min(C, n_tokens - rank * C))
            out = torch.zeros_like(q)
            total = torch.zeros(*q.shape[:2], mine, q.shape[3], dtype=torch.float64)
            weight = torch.zeros(*q.shape[:2], mine, 1, dtype=torch.float64)
            for owner in range(rank + 1 if causal else len(blocks)):
                n = max(0, min(C, n_tokens - owner * C))
                group = q.shape[1] // blocks[owner][1].shape[1]
                k, v = (x[:, :, :n].double().repeat_interleave(group, 1) for x in blocks[owner][1:])
                exp = (q[:, :, :mine].double() @ k.mT / q.shape[3] ** 0.5).exp()
                if causal and owner == rank:
                    exp = exp.tril()
                total, weight = total + exp @ v, weight + exp.sum(-1, keepdim=True)
            out[:, :, :mine] = (total / weight).to(q.dtype)
            outs.append(out)
        return tuple(outs)

    assert full_marks("08.6", ring)


# 08.7


def test_the_model_takes_any_share_of_the_right_sizes() -> None:
    def attention(x: Tensor, layer: Any, cache: Any, start: int, parts: Any) -> Tensor:
        ring = cache if cache is not None else layer.ring()
        q, k, v = layer.project(x, start)
        by_size = np.argsort([len(p) for p in ring.positions], kind="stable")
        shares: list[list[int]] = [[] for _ in range(ring.world)]
        for i in range(x.shape[1]):
            shares[by_size[i % ring.world]].append(i)
        at = [[start + i for i in share] for share in shares]
        for rank, share in enumerate(shares):
            if share:
                ring.store(rank, at[rank], k[:, :, share], v[:, :, share])
        out = torch.zeros_like(q)
        ways = parts.hops(at, ring.positions)
        states: dict[int, Any] = {}
        for owner in range(ring.world):  # block by block, not step by step
            block = ring.block(owner)
            for step in range(ways[owner] + 1):
                rank = (owner + step) % ring.world
                if shares[rank]:
                    part = layer.attend(q[:, :, shares[rank]], block, at[rank], ring.positions[owner])
                    states[rank] = parts.merge(states.get(rank), part)
                if step < ways[owner]:
                    block = ring.send(block, rank)
        for rank, state in states.items():
            out[:, :, shares[rank]] = parts.finish(state, q.dtype)[0]
        return layer.finish(out)

    assert full_marks("08.7", attention)


def test_kvlearns_parts_do_not_earn_the_points_of_yours() -> None:
    notebook = {"attention": ours("08.7")[0]}
    score = check("08.7", *ours("08.7"), notebook=notebook)
    assert earned(score) == [1, 1, 1, 1, 1, 0, 0, 0]
    assert "kvlearn's merge in place of yours" in score.rows[5].came


def test_with_the_learners_parts_the_text_is_the_same() -> None:
    notebook: dict[str, Any] = {}
    for exercise in ("08.1", "08.2", "08.3", "08.4", "08.7"):
        notebook |= dict(zip(find_exercise(exercise).answers, ours(exercise), strict=True))
    comparison = workbench.compare("08.7", notebook, n_new=6)
    assert {works for part, works in comparison.parts if part.is_theirs} == {"yes"}
    same = [row for row in comparison.rows if row[0].startswith("identical tokens")]
    assert same[-1][0] == "identical tokens, over 2 processes"
    assert len(same) >= 4
    assert {row[2] for row in same} == {"yes"}
    layers, n_tokens, per_token = 4, 77 + 5, 2 * 128 * 4
    assert comparison.rows[-2][2] == " and ".join(2 * [f"{layers * n_tokens // 2 * per_token:,}"])


def edited(*edits: tuple[str, str]) -> Any:
    """Our attention with edits of its source."""
    source = MODEL.solution
    for old, new in edits:
        assert source.count(old) == 1
        source = source.replace(old, new)
    return run(compiled(source, "<edited>"), MODEL.set_up, {}, MODEL.answers)[0]


def test_a_wrong_answer_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHECKS, "launch", lambda *_, **__: pytest.fail("a process would have been started"))
    score = judge(MODEL, (edited(("len(ring.positions[rank])", "rank")),), 1, name=False)
    assert earned(score) == [1, 1, 1, 1, 0, 1, 1, 0]  # the text is right, the cache is not even
    assert score.rows[-1].came == "this runs when all requirements before it hold"


def test_only_processes_see_that_what_was_sent_is_not_used() -> None:
    score = judge(MODEL, (edited(("blocks[owner] = ring.send(", "ring.send(")),), 1)
    assert earned(score) == [1, 1, 1, 1, 1, 1, 1, 0]
    assert "attended in 2 processes, expected 1" in score.rows[-1].came


def hang() -> None:
    time.sleep(1000)


def raise_in_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("no such rank")


@pytest.mark.parametrize(
    ("act", "message"),
    [(hang, "no result within the time"), (raise_in_one, "rank 1: KeyError: 'no such rank'")],
)
def test_processes_that_fail_say_why_and_end(act: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = ours("08.7")[0]

    def broken(*args: Any) -> Any:
        if dist.is_initialized():
            act()
        return attention(*args)

    if act is hang:
        monkeypatch.setattr(CHECKS, "SECONDS", 4.0)
        monkeypatch.setattr(CHECKS, "processes_work", lambda prompt: True)
    score = judge(MODEL, (broken,), 1, name=False)
    assert earned(score) == [1, 1, 1, 1, 1, 1, 1, 0]
    assert message in score.rows[-1].came
    assert not multiprocessing.active_children()


def test_a_machine_without_processes_costs_no_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RankFailed("rank 0: no network")

    monkeypatch.setattr(CHECKS, "launch", fails)
    assert full_marks("08.7", *ours("08.7"))
