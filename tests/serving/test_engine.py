"""The engine: the same text as the decoder alone, whatever others do, and nothing lost at any point."""

import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvlearn.attention import REGISTRY
from kvlearn.attention.rope import LongRopeScaling, RopeConfig
from kvlearn.model import Decoder, ModelConfig, MoEConfig, Spec
from kvlearn.model.generation import sample
from kvlearn.serving import Engine, OutOfBlocks, Request, Tenant, blocks_for
from kvlearn.workbench import base_model

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
PAYING = (Tenant("a", b"1", 12), Tenant("b", b"2", 12))
TEXT = b"def substitute(expression, symbol, value):\n    return expression.subs(symbol, value)\n" * 4


def tiny(*layers: str | Spec, **options: Any) -> Decoder:
    """A small decoder with weights that are not near 0, so that every token matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 32}
    model = Decoder(ModelConfig(**(sizes | {"layers": list(layers)} | options))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


MODELS: dict[str, Any] = {
    "full": lambda: tiny("full"),
    "gqa": lambda: tiny(Spec("gqa", n_kv_heads=1), "full"),
    "window": lambda: tiny(Spec("window", window=6)),
    "window and full": lambda: tiny(Spec("window", window=6), "full"),
    "sinks": lambda: tiny(Spec("window", window=5, n_sinks=2, sink_logits=True), Spec("window", window=7)),
    "mla": lambda: tiny(Spec("mla", rank=8, rope_dim=4), Spec("mla", rank=8, rope_dim=4, q_rank=6)),
    "mixture, scaled, capped": lambda: tiny(
        "full", "mla", experts=MoEConfig(n_experts=4, d_ff=16, top_k=2), embed_scale=3.0, logit_softcap=5.0
    ),
}


def alone(model: Decoder, request: Request, prompt: Sequence[int], **options: Any) -> list[int]:
    """The tokens that the decoder generates for this prompt with a cache of its own."""
    return model.generate(torch.tensor([list(prompt)]), request.n_new, **options)[0].tolist()


def logits_of(engine: Engine) -> list[tuple[list[Any], torch.Tensor]]:
    """Every batch from now on: its tables, and the logits."""
    seen, forward = [], engine.forward

    def watched(work: Any) -> torch.Tensor:
        logits = forward(work)
        seen.append(([table for table, _ in work], logits))
        return logits

    engine.forward = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_requests_of_different_lengths_get_the_text_that_they_get_alone(name: str) -> None:
    model = MODELS[name]()
    engine = Engine(model, 24, page=3, max_batch=3, budget=7)  # a prompt is several chunks
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, 11, (7,), generator=generator).tolist()
    prompts = [
        [*shared, *torch.randint(0, 11, (n,), generator=generator).tolist()] for n in (1, 9, 4, 17, 2, 5)
    ]
    requests = [engine.submit(prompt, 4 + 3 * i) for i, prompt in enumerate(prompts)]
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens == alone(model, request, prompt)
    assert engine.pool.counts.hits > 0
    engine.pool.audit([])


def test_the_base_model_writes_the_same_text_in_a_batch() -> None:
    model = base_model()
    engine = Engine(model, 64, max_batch=4, budget=48)
    prompts = [list(TEXT[start : start + 20 + 17 * i]) for i, start in enumerate((0, 0, 0, 31, 85, 0))]
    requests = [engine.submit(prompt, 24) for prompt in prompts]
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens == alone(model, request, prompt)


def test_sampling_is_as_repeatable_as_alone() -> None:
    model = tiny("full")
    engine = Engine(model, 24, page=3, max_batch=3, budget=7)
    requests = [engine.submit([1, 2, 3], 12, temperature=0.7, seed=seed) for seed in range(3)]
    engine.run()
    for seed, request in enumerate(requests):
        assert request.tokens == alone(model, request, [1, 2, 3], temperature=0.7, seed=seed)
    assert len({tuple(request.tokens) for request in requests}) > 1


def test_a_stop_token_ends_a_request() -> None:
    free = tiny("full")
    engine = Engine(free, 24, page=3)
    request = engine.submit([1, 2, 3], 12)
    engine.run()
    model = tiny("full", stop_tokens=(request.generated[5],))
    engine = Engine(model, 24, page=3)
    stopped = engine.submit([1, 2, 3], 12)
    engine.run()
    end = request.generated.index(request.generated[5])
    assert stopped.generated == request.generated[: end + 1]


def test_preempted_requests_continue_where_they_were() -> None:
    """Eight blocks for three requests that grow to six blocks each."""
    model = tiny("full")
    engine = Engine(model, 8, page=2, max_batch=3, budget=6)
    requests = [engine.submit([i, 5, 1], 10) for i in range(3)]
    waited = 0
    while engine.waiting or engine.running:
        engine.step()
        waited += any(request.generated for request in engine.waiting)
        engine.pool.audit([request.table for request in requests])
    assert waited > 0
    for i, request in enumerate(requests):
        assert request.tokens == alone(model, request, [i, 5, 1])


def test_a_fork_continues_on_its_own_and_copies_one_block() -> None:
    model = tiny("full")
    engine = Engine(model, 24, page=4, max_batch=4, budget=8)
    request = engine.submit([1, 2, 3], 12, temperature=1.0, seed=1)
    while len(request.generated) < 3:  # five tokens are cached: the second block is partly filled
        engine.step()
    start = request.tokens.copy()
    forks = [engine.fork(request, seed=seed) for seed in (2, 3)]
    engine.run()
    assert engine.pool.counts.copied == 2
    for fork in forks:
        assert fork.tokens[: len(start)] == start
        assert len(fork.tokens) == 15
    assert len({tuple(r.tokens) for r in (request, *forks)}) == 3
    assert request.tokens == alone(model, request, [1, 2, 3], temperature=1.0, seed=1)
    engine.pool.audit([])
    with pytest.raises(ValueError, match="request: expected one that is running"):
        engine.fork(request, seed=0)


def test_a_full_batch_admits_nobody_beside_forks() -> None:
    engine = Engine(tiny("full"), 60, page=4, max_batch=2, budget=4)
    request = engine.submit([1, 2, 3], 12)
    engine.step()
    forks = [engine.fork(request, seed=seed) for seed in (1, 2)]
    other = engine.submit([4], 2)
    engine.step()
    assert engine.running == [request, *forks]
    assert engine.waiting == [other]


def test_prompts_are_admitted_only_if_they_fit_together() -> None:
    """Eight blocks, and five for each prompt: a second one would give its blocks up and be computed again."""
    model = tiny("full")
    engine = Engine(model, 8, page=2, max_batch=3, budget=4, share=False)
    requests = [engine.submit([i] * 10, 2) for i in range(3)]
    engine.step()
    assert engine.running == requests[:1]
    engine.run()
    assert engine.pool.counts.computed == 3 * 11
    for i, request in enumerate(requests):
        assert request.tokens == alone(model, request, [i] * 10)


def test_a_request_that_waits_counts_what_it_finds_once() -> None:
    """It looks for its prefix in every step, and uses it when it is admitted."""
    engine = Engine(tiny("full"), 5, page=2, max_batch=3, budget=6)
    first = engine.submit([1, 2, 3, 4, 5, 6], 4)  # all five blocks at the end
    second = engine.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], 1)
    while not first.done:
        engine.step()
        assert engine.waiting == [second]
        assert (second.cached, engine.pool.counts.hits) == (0, 0)
    engine.run()
    assert (second.cached, engine.pool.counts.hits) == (6, 6)


def test_decode_goes_on_beside_a_long_prompt() -> None:
    engine = Engine(tiny("full"), 60, page=3, max_batch=4, budget=6)
    short = engine.submit([1, 2], 30)
    engine.step()
    long = engine.submit([3] * 40, 2)
    for _ in range(7):
        before = len(short.generated)
        assert short in engine.step()
        assert len(short.generated) == before + 1
    assert long.pending == 5  # seven chunks of five


def test_a_window_releases_the_blocks_behind_it() -> None:
    model = tiny(Spec("window", window=6), Spec("window", window=4))
    engine = Engine(model, 30, page=2, share=False)
    request = engine.submit([1, 2, 3], 40)
    most = 0
    while not request.done:
        engine.step()
        most = max(most, engine.pool.in_use)
    assert most == 3  # five tokens that the next one still sees, in blocks of two at any offset
    assert request.tokens == alone(model, request, [1, 2, 3])


def test_bytes_are_the_layers_own() -> None:
    model = tiny(Spec("gqa", n_kv_heads=1), Spec("mla", rank=8, rope_dim=4))
    engine = Engine(model, 10, page=4)
    assert engine.nbytes == sum(mixer.cache_bytes(40) for mixer in model.mixers)


def serve(engine: Engine, *submissions: tuple[str, list[int], int]) -> list[torch.Tensor]:
    """The logits of tenant a's requests in every step; all tenants' are submitted at once."""
    seen = logits_of(engine)
    requests = [engine.submit(prompt, n_new, tenant=name) for name, prompt, n_new in submissions]
    tables = [r.table for r in requests if r.tenant == "a"]
    engine.run()
    return [logits[[at.index(table) for table in tables if table in at]] for at, logits in seen]


@given(
    others=st.lists(st.integers(0, 10), min_size=9, max_size=9),
    history=st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=20), max_size=3),
)
@settings(max_examples=100 if THOROUGH else 10, deadline=None)
def test_logits_are_the_same_bit_for_bit_whatever_another_tenant_writes(
    others: list[int], history: list[list[int]]
) -> None:
    """At equal batch shape: what is in the other's prompt and what it did before changes no bit."""
    model = tiny("full", Spec("gqa", n_kv_heads=1))
    results = []
    for prompt, before in (([7] * 9, []), (others, history)):
        engine = Engine(model, 24, page=3, tenants=PAYING, max_batch=4, budget=8)
        for old in before:
            engine.submit(old, 5, tenant="b")
            engine.run()
        cached = engine.pool.open("b")
        assume(not engine.pool.match(cached, prompt))  # it would change the shape of a batch
        results.append(serve(engine, ("a", [1, 2, 3, 4, 5], 8), ("b", prompt, 8)))
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_logits_differ_by_rounding_only_beside_any_batch() -> None:
    model = tiny("full", Spec("gqa", n_kv_heads=1))
    results = []
    for others in ((), (("b", [3] * 20, 9), ("b", [4, 5], 12))):
        engine = Engine(model, 24, page=3, tenants=PAYING, max_batch=4, budget=24)
        results.append(torch.cat(serve(engine, ("a", [1, 2, 3, 4, 5], 8), *others)))
    assert len(results[0]) == 8
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_hit_and_a_collision_change_no_text() -> None:
    model = tiny("full")
    for hash_function in (lambda content: b"same", lambda content: bytes([sum(content) % 3])):
        engine = Engine(model, 40, page=2, max_batch=4, budget=8, hash_function=hash_function)
        prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7]] * 2
        requests = [engine.submit(prompt, 6) for prompt in prompts]
        engine.run()
        assert engine.pool.counts.collisions > 0
        for request, prompt in zip(requests, prompts, strict=True):
            assert request.tokens == alone(model, request, prompt)


def test_a_request_that_never_fits_is_refused_and_changes_nothing() -> None:
    engine = Engine(tiny("full"), 24, page=3, tenants=PAYING, max_batch=4, budget=8)
    running = engine.submit([1, 2, 3], 20, tenant="a")
    engine.step()
    state = (running.table.blocks.copy(), engine.pool.free.copy(), engine.waiting.copy())
    with pytest.raises(OutOfBlocks, match=r"n_new: expected a sequence of at most 12 blocks of 3 .* 30 \+ 8"):
        engine.submit([1] * 30, 8, tenant="a")
    assert (running.table.blocks, engine.pool.free, engine.waiting) == state
    engine.submit([1] * 30, 7, tenant="a")  # 36 tokens are cached, the last new one is not
    engine.run()


def test_an_interrupted_step_can_be_repeated() -> None:
    model = tiny("full")
    engine = Engine(model, 24, page=3, max_batch=4, budget=8)
    requests = [engine.submit([i, 2, 3, 4], 6) for i in range(2)]
    forward, calls = engine.forward, 0

    def failing(work: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = forward(work)
        if calls % 2:
            raise KeyboardInterrupt
        return logits

    engine.forward = failing  # type: ignore[method-assign]
    while engine.running or engine.waiting:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.pool.audit([request.table for request in requests])
        engine.step()
    for i, request in enumerate(requests):
        assert request.tokens == alone(model, request, [i, 2, 3, 4])


def test_a_sample_that_fails_leaves_the_step_to_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("full")
    engine = Engine(model, 24, page=3)
    prompts = [[1, 2, 5], [0, 2, 0], [2, 2, 10]]  # whose next tokens differ
    requests = [engine.submit(prompt, 6) for prompt in prompts]
    calls = 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # the second request of the first step
            raise RuntimeError
        return sample(*args)

    monkeypatch.setattr("kvlearn.serving.engine.sample", failing)
    with pytest.raises(RuntimeError):
        engine.step()
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.tokens == alone(model, request, prompt)


def test_a_request_may_be_cancelled_while_it_is_computed() -> None:
    """A server gets the news while the model runs: the others get their tokens, and nothing is lost."""
    model = tiny("full")
    engine = Engine(model, 24, page=3)
    requests = [engine.submit([i, 2], 3) for i in range(3)]
    forward = engine.forward

    def interrupted(work: Any) -> torch.Tensor:
        logits = forward(work)
        engine.cancel(requests[1])
        return logits

    engine.forward = interrupted  # type: ignore[method-assign]
    assert engine.step() == [requests[0], requests[2]]
    engine.run()
    assert requests[1].generated == []
    for i in (0, 2):
        assert requests[i].tokens == alone(model, requests[i], [i, 2])
    engine.pool.audit([])
    with pytest.raises(ValueError, match="request: expected one that waits or runs in this engine"):
        Engine(model, 24).cancel(engine.submit([1], 1))


class Users(RuleBasedStateMachine):
    """Two tenants submit, fork and cancel while the engine steps, in a pool so small that it preempts."""

    @initialize(
        tenants=st.sampled_from([PAYING, (Tenant("a", b"1"), Tenant("b", b"2")), (Tenant("a"), Tenant("b"))]),
        n_blocks=st.sampled_from([24, 30]),
    )
    def start(self, tenants: tuple[Tenant, ...], n_blocks: int) -> None:
        self.model = tiny("full", n_layers=1)
        self.engine = Engine(self.model, n_blocks, page=2, tenants=tenants, max_batch=4, budget=6)
        self.requests: list[tuple[Request, list[int]]] = []
        self.cancelled: list[Request] = []
        self.forks: list[Request] = []

    @rule(
        name=st.sampled_from("ab"),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        n_new=st.integers(1, 8),
    )
    def submit(self, name: str, prompt: list[int], n_new: int) -> None:
        waiting = self.engine.waiting.copy()
        if blocks_for(len(prompt) + n_new - 1, 2) > self.engine.pool.limit(name):
            with pytest.raises(OutOfBlocks):
                self.engine.submit(prompt, n_new, tenant=name)
            assert self.engine.waiting == waiting
        else:
            self.requests.append((self.engine.submit(prompt, n_new, tenant=name), prompt))

    @rule(n=st.integers(1, 4))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    @rule(at=st.floats(0, 1))
    def cancel(self, at: float) -> None:
        if active := self.engine.running + self.engine.waiting:
            request = active[min(int(at * len(active)), len(active) - 1)]
            self.engine.cancel(request)
            assert request.table.blocks == []
            self.cancelled.append(request)

    @rule()
    def fork(self) -> None:
        if self.engine.running:
            self.forks.append(self.engine.fork(self.engine.running[0], seed=0))

    @invariant()
    def accounts_are_right(self) -> None:
        if hasattr(self, "engine"):
            everyone = {id(r): r for r in [r for r, _ in self.requests] + self.forks}
            self.engine.pool.audit([request.table for request in everyone.values()])

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        self.engine.pool.audit([])
        assert self.engine.pool.in_use == 0
        for request, prompt in self.requests:
            expected = alone(self.model, request, prompt)
            if request in self.cancelled:
                assert request.tokens == expected[: len(request.tokens)]
            else:
                assert request.tokens == expected


TestUsers = Users.TestCase
TestUsers.settings = settings(
    max_examples=150 if THOROUGH else 15, stateful_step_count=40 if THOROUGH else 20, deadline=None
)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["full", "mamba2"], r"layer 1 \(mamba2\): a state holds all tokens at once .*StatePrefixes"),
        (["gated_delta"], r"layer 0 \(gated_delta\): a state holds all tokens"),
        (["sparse"], r"layer 0 \(sparse\): expected layers of full, gqa, window, mla"),
        ([Spec("full"), Spec("full", reads="last")], r"layer 1 \(full\): expected layers of"),
        ([Spec("mla", rope_dim=0)], r"layer 0 \(mla\): expected decoupled positions"),
    ],
)
def test_a_layer_that_cannot_be_paged_is_refused(layers: Any, message: str) -> None:
    assert REGISTRY
    with pytest.raises(ValueError, match=message):
        Engine(tiny(*layers), 10)


def test_angles_that_depend_on_the_length_are_refused() -> None:
    scaling = LongRopeScaling((1.0,) * 4, (2.0,) * 4, original_max_len=8)
    with pytest.raises(ValueError, match="angles that do not depend on the length"):
        Engine(tiny("full", rope=RopeConfig(scaling=scaling)), 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), r"len\(prompt\): expected at least 1"),
        (([11], 3), r"prompt: expected at most 10 \(vocab_size=11\), got 11"),
        (([-1], 3), "prompt: expected at least 0"),
        (([1], 0), "n_new: expected at least 1"),
    ],
)
def test_a_wrong_request_is_refused(arguments: Any, message: str) -> None:
    engine = Engine(tiny("full"), 10)
    with pytest.raises(ValueError, match=message):
        engine.submit(*arguments)
    for temperature, expected in ((-1.0, r"0 \(greedy\) or more"), (math.nan, "a finite number")):
        with pytest.raises(ValueError, match=f"temperature: expected {expected}"):
            engine.submit([1], 3, temperature=temperature)
    assert engine.waiting == []


def test_a_budget_below_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 32, got 16"):
        Engine(tiny("full"), 10, budget=16)
    for n_blocks, page, name in ((-1, 16, "n_blocks"), (4, 0, "page")):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
            Engine(tiny("full"), n_blocks, page)
