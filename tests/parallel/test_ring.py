"""Ring attention, its decoder and its faults, in processes of their own."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ring_runs
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kvlearn.attention.core import attend_partial
from kvlearn.model import Spec
from kvlearn.parallel import Layout, Plan, RankFailed, Rule, launch
from kvlearn.parallel.layout import ORDERS
from kvlearn.parallel.processes import METHOD

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parallel")]

CASES = [
    {"tokens": tokens, "order": order, "rule": rule, "lengths": lengths, "block": 5, "shape": shape, "dim": 8}
    for order in ORDERS
    for rule in (Rule(), Rule(causal=False), Rule(window=7))
    for tokens, shape, lengths in (
        (24, (2, 6, 3), None),
        (37, (2, 4, 1), None),
        (37, (2, 3, 3), torch.tensor([37, 9])),
        (3, (1, 2, 2), None),  # fewer tokens than ranks
    )
]
HALF = CASES[1] | {"dtype": torch.bfloat16}


@pytest.mark.parametrize("world", [2, 4])
def test_ring_is_attention_on_one_device_and_sends_what_the_formula_says(world: int) -> None:
    cases = [*CASES, HALF]
    results = launch(ring_runs.forward_and_backward, world, cases, seconds=300)
    for i, case in enumerate(cases):
        layout, rule = Layout(case["tokens"], world, case["order"]), case["rule"]
        plan = Plan(layout, rule)
        batch, _, kv_heads = case["shape"]
        q, k, v, d_out = ring_runs.inputs(case["shape"], case["tokens"], 8)
        wanted = ring_runs.one_device(q, k, v, d_out, rule, case["lengths"])
        for j, expected in enumerate(wanted):
            got = layout.unshard([ranks[i]["parts"][j] for ranks in results], dim=2)
            wide = got.dtype == torch.float32
            torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=1e-5 if wide else 0.05)
        numbers = 2 * batch * kv_heads * layout.per_rank * 8
        block, gradient = numbers * got.itemsize, numbers * 4
        for rank in range(world):
            there, back = results[rank][i]["there"], results[rank][i]["back"]
            assert there.bytes_sent == plan.n_sent(rank) * block
            travelled, home = plan.n_sent(rank), plan.n_returned(rank)
            assert back.bytes_sent == travelled * (block + gradient) + home * gradient
            assert there.pairs == back.pairs == plan.work[rank]


def test_a_block_is_under_way_while_it_is_computed_with() -> None:
    case = {"tokens": 32, "order": "striped", "rule": Rule(), "lengths": None, "block": 8}
    case |= {"shape": (1, 2, 2), "dim": 4}
    for rank in launch(ring_runs.forward_and_backward, 2, [case], seconds=300):
        kinds = [(what, step) for what, step, _, _ in rank[0]["there"].events]
        assert kinds == [("send", 0), ("compute", 0), ("receive", 0), ("compute", 1)]


def test_a_rank_keeps_one_block_however_many_ranks_there_are() -> None:
    case = {"tokens": 24, "order": "contiguous", "rule": Rule(causal=False), "lengths": None, "block": 8}
    case |= {"shape": (1, 2, 2), "dim": 4}
    assert launch(ring_runs.most_kept, 4, case, seconds=300) == 4 * [[1, 2]]  # backward also a gradient


def test_ring_is_pytorchs_context_parallel() -> None:
    case = {"tokens": 24, "lengths": None, "block": 5, "shape": (2, 3, 3), "dim": 8}
    for pairs in launch(ring_runs.both_rings, 2, case, seconds=300):
        assert len(pairs) == 8
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("world", "layers", "order"),
    [(2, [Spec("gqa", n_kv_heads=2), Spec("window", window=5)], "striped"), (4, ["full"], "zigzag")],
)
def test_a_decoder_over_ranks_is_the_decoder(world: int, layers: list[Spec], order: str) -> None:
    results = launch(ring_runs.whole_decoder, world, layers, order, 21, 6, seconds=300)
    model, tokens = ring_runs.small_decoder(layers, 21)
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    layout = Layout(21, world, order)  # type: ignore[arg-type]
    torch.testing.assert_close(layout.unshard([r["logits"] for r in results]), logits, rtol=0, atol=1e-5)
    text = model.generate(tokens, 6)
    for result in results:
        assert result["losses"] == pytest.approx(2 * [loss.item()], abs=1e-5)
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            torch.testing.assert_close(result["grads"][name], 2 * weight.grad, rtol=0, atol=2e-6)
            stepped = weight - 0.1 * 2 * weight.grad
            torch.testing.assert_close(result["weights"][name], stepped, rtol=0, atol=1e-6)
        assert torch.equal(result["text"], text)


def test_a_state_is_passed_on_and_its_bytes_do_not_depend_on_the_text() -> None:
    results = launch(ring_runs.states, 3, "gated_delta", [5, 9], seconds=300)
    for each in zip(*results, strict=True):
        y = torch.cat([rank["y"] for rank in each], dim=1)
        torch.testing.assert_close(y, each[0]["want"], rtol=0, atol=1e-5)
    sent = [[length["sent"] for length in rank] for rank in results]
    assert sent[0] == sent[1] == 2 * [sent[0][0]]
    assert sent[0][0] > 0
    assert sent[2] == [0, 0]


def test_partial_results_merge_up_a_tree() -> None:
    results = launch(ring_runs.merged, 3, seconds=300)
    q, k, v, _ = ring_runs.inputs((2, 6, 3), 12, 8)
    mine = torch.cat([torch.arange(12)[rank::3] for rank in (0, 2)])
    k, v = (x[:, :, mine].repeat_interleave(2, 1) for x in (k, v))
    out, lse = attend_partial(q, k, v, scale=0.3)
    for got_out, got_lse, _ in results:
        torch.testing.assert_close(got_out, out, rtol=0, atol=1e-5)
        torch.testing.assert_close(got_lse, lse, rtol=0, atol=1e-5)
        assert torch.equal(got_out, results[0][0])
    assert sum(sent for _, _, sent in results) == 2 * 2 * (2 * 6 * 12 * 9 * 4)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (ring_runs.die, (1,), "rank 1: ended with exit code -9"),
        (ring_runs.raise_at, (0,), "rank 0: ZeroDivisionError: nothing to divide by"),
    ],
)
def test_a_rank_that_fails_is_named_and_nothing_is_left(function, args, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RankFailed, match=message):
        launch(function, 2, *args, seconds=300)
    assert not multiprocessing.active_children()


def test_a_rank_with_other_settings_is_named_on_every_rank() -> None:
    heads = "k.shape[1] (KV heads): expected a divisor of q.shape[1] (heads)=2, got 3"
    for rank, told in enumerate(launch(ring_runs.settings, 3, seconds=300)):
        assert told == [
            "n_tokens: expected 16 on every rank; rank 1 has 15",
            "window: expected None on every rank; rank 1 has 3",
            "heads: expected 2 on every rank; rank 0 has 4",
            "dtype: expected torch.float32 on every rank; rank 2 has torch.bfloat16",
            "scale: expected 0.5 on every rank; rank 2 has 0.3",
            "lengths: expected None on every rank; rank 1 has [9]",
            ("" if rank == 2 else "rank 2: ") + "q: expected 6 slots, got 5",
            ("" if rank == 0 else "rank 0: ") + heads,
        ]


def test_a_rank_that_hangs_ends_the_run_in_time() -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailed, match=r"^rank 1: no answer within the time"):
        launch(ring_runs.hang, 2, 1, seconds=8)
    assert time.monotonic() - begin < 300
    assert not multiprocessing.active_children()


def test_copies_run_what_cannot_be_imported_and_end_at_the_limit() -> None:
    secret = object()
    assert launch(lambda same: (same is secret, dist.get_rank()), 2, secret, copied=True) == [
        (True, 0),
        (True, 1),
    ]
    with pytest.raises(RankFailed, match=r"rank 1: no result within the time$"):
        launch(lambda: dist.get_rank() and time.sleep(1000), 2, seconds=300, limit=3, copied=True)
    with pytest.raises(RankFailed, match=r"^rank 0: ended with exit code 3"):
        launch(lambda: dist.get_rank() or os._exit(3), 2, seconds=300, copied=True)
    assert not multiprocessing.active_children()


def test_a_function_of_a_notebook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(ring_runs.wait_forever, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"function: .* wait_forever of a notebook"):
        launch(ring_runs.wait_forever, 2)


def test_processes_end_with_their_parent() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from kvlearn.parallel import launch\nimport ring_runs\n"
        "if __name__ == '__main__': launch(ring_runs.wait_forever, 2, seconds=300)"
    )
    folder = os.path.dirname(ring_runs.__file__)
    parent = subprocess.Popen([sys.executable, "-c", code, folder])
    end = time.monotonic() + 300
    started: list[psutil.Process] = []
    ranks = 0
    while ranks < 2 and time.monotonic() < end:
        time.sleep(0.2)
        started = psutil.Process(parent.pid).children(recursive=True)
        ranks = sum(METHOD == "spawn" or process.ppid() != parent.pid for process in started)
    assert ranks >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 30
    while (alive := [process for process in started if runs(process)]) and time.monotonic() < end:
        time.sleep(0.2)
    assert not alive


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended (an ended one may wait for its parent to ask for its exit code)."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
