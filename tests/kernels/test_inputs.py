"""Argument checks of a decode step: wrong arguments and their errors."""

from dataclasses import replace
from itertools import permutations, product
from operator import mul
from typing import Any

import pytest
import torch
from cases import DEVICE, NAN, Case

from kvlearn.kernels import Workspace, decode_attention, decode_latent, validate_decode_inputs
from kvlearn.kernels.inputs import Request, check_memory


def step(**changes: Any) -> Any:
    """A right step with something changed in it."""
    case = Case((40, 9), page=changes.pop("page", None))
    tensors = {"q": case.q, "k_cache": case.k, "v_cache": case.v, "lengths": case.lengths_}
    # Values are validated unless told otherwise on a CPU only: on a GPU it would synchronise.
    options = {"block_table": case.table, "validate": None if DEVICE == "cpu" else True}
    for name, change in changes.items():
        if name in tensors:
            tensors[name] = change(tensors[name])
        else:
            options[name] = change(options[name]) if callable(change) else change
    return decode_attention(*tensors.values(), **options)


OUT = torch.zeros(2, 6, 16, device=DEVICE)
WRONG = [
    ({"q": lambda q: q[0]}, ValueError, "q: expected shape"),
    ({"q": lambda q: q.double()}, ValueError, "q.dtype"),
    ({"q": lambda q: q.tolist()}, TypeError, "q: expected Tensor, got list"),
    ({"q": lambda q: q[:, :, :0]}, ValueError, r"q.shape\[2\]: expected at least 1"),
    (
        {"q": lambda q: q.half()},
        ValueError,
        "k_cache.dtype: expected one of torch.float16.*got torch.float32",
    ),
    ({"v_cache": lambda v: None}, TypeError, "v_cache: expected Tensor, got NoneType"),
    (
        {"out": torch.zeros(1, 6, 16, device=DEVICE).expand(2, 6, 16)},
        ValueError,
        "out: expected memory of its own",
    ),
    ({"q": lambda q: q[:, :5]}, ValueError, "KV heads.*divisor of heads=5, got 2"),
    ({"q": lambda q: q[..., :8]}, ValueError, r"k_cache: expected shape \(2, KV heads, slots, 8\)"),
    ({"k_cache": lambda k: k[:1]}, ValueError, r"k_cache: expected shape \(2,"),
    ({"k_cache": lambda k: k.to(torch.int16)}, TypeError, "v_cache: expected dtype torch.int16"),
    ({"v_cache": lambda v: v[:, :, :-1]}, ValueError, "v_cache: expected shape"),
    ({"v_cache": lambda v: v.half()}, TypeError, "v_cache: expected dtype torch.float32"),
    ({"lengths": lambda n: n.long()}, TypeError, "lengths: expected dtype torch.int32"),
    ({"lengths": lambda n: n[:1]}, ValueError, r"lengths: expected shape \(2\)"),
    ({"lengths": lambda n: n + 30}, ValueError, r"lengths: expected 0 to 64 .*\[70, 39\]"),
    ({"lengths": lambda n: n - 10}, ValueError, r"lengths: expected 0 to 64 .*\[30, -1\]"),
    ({"lengths": lambda n: n.tolist()}, TypeError, "lengths: expected Tensor, got list"),
    ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
    ({"window": 2.5}, TypeError, "window: expected an integer"),
    ({"n_sinks": -1, "window": 4}, ValueError, "n_sinks: expected at least 0"),
    ({"sink_logits": torch.zeros(5, device=DEVICE)}, ValueError, r"sink_logits: expected shape \(6\)"),
    ({"num_splits": 0}, ValueError, "num_splits: expected at least 1"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ({"out": OUT[..., :8]}, ValueError, r"out: expected shape \(2, 6, 16\)"),
    (
        {"out": torch.zeros(200, device=DEVICE).as_strided((2, 6, 16), (96, 8, 1))},
        ValueError,
        "out: expected memory",
    ),
    ({"out": torch.zeros(200, device=DEVICE).as_strided((2, 6, 16), (16, 32, 0))}, ValueError, "out: expec"),
    ({"out": OUT.half()}, TypeError, "out: expected dtype"),
    ({"out": 3}, TypeError, "out: expected Tensor, got int"),
    ({"lengths": lambda n: n + 25}, ValueError, r"lengths: expected 0 to 64 .*\[65, 34\]"),
    ({"scale": NAN}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
    ({"k_scale": NAN}, ValueError, "k_scale: expected a finite number"),
    ({"v_scale": "1"}, TypeError, "v_scale: expected a number"),
    ({"v_scale": torch.ones(2, dtype=torch.int64, device=DEVICE)}, TypeError, "v_scale.dtype"),
    ({"sink_logits": torch.zeros(6, dtype=torch.int64, device=DEVICE)}, TypeError, "sink_logits.dtype"),
    ({"workspace": 3}, TypeError, "workspace: expected Workspace or NoneType, got int"),
    ({"return_lse": "yes"}, TypeError, "return_lse: expected bool"),
    ({"validate": 1}, TypeError, "validate: expected bool"),
    ({"k_cache": lambda k: k[0], "k_scale": torch.ones(2)}, ValueError, "k_cache: expected shape"),
    ({"v_cache": lambda v: v[..., :0]}, ValueError, r"v_cache.shape\[3\]: expected at least 1"),
    ({"page": 16, "block_table": lambda t: t[:, :0]}, ValueError, r"block_table.shape\[1\] \(pages\)"),
    (
        {"k_scale": torch.ones(3, device=DEVICE)},
        ValueError,
        r"k_scale: expected a number, \(2,\).*or \(2, 2, 64\)",
    ),
    ({"page": 16, "block_table": lambda t: t[:1]}, ValueError, "block_table: expected shape"),
    ({"page": 16, "block_table": lambda t: t.long()}, TypeError, "block_table: expected dtype torch.int32"),
    ({"page": 16, "block_table": lambda t: t + 8}, ValueError, "block_table: expected pages 0 to 10, got"),
    (
        {"page": 16, "block_table": lambda t: t - 11},
        ValueError,
        "block_table: expected pages 0 to 10, got .*-",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        step(**changes)


def test_the_same_step_without_a_mistake_is_accepted() -> None:
    step()
    step(page=16)


def test_an_int8_cache_needs_its_scales() -> None:
    case = Case((40,), cache_dtype=torch.int8, scales="head")
    decode_attention(*case.arguments(), **case.options())
    with pytest.raises(ValueError, match="v_scale: expected the scale of an int8 cache"):
        decode_attention(*case.arguments(), **{**case.options(), "v_scale": None})


def test_table_entries_past_the_length_or_outside_the_window_may_be_anything() -> None:
    case = Case((40, 64), page=8, window=10, n_sinks=3)
    assert case.table is not None
    want = decode_attention(*case.arguments(), **case.options())
    case.table[0, 5:] = -1
    case.table[:, 1:3] = 10**6
    torch.testing.assert_close(decode_attention(*case.arguments(), **case.options()), want)


def test_validation_can_be_asked_for_alone() -> None:
    case = Case((40, 9))
    validate_decode_inputs(*case.arguments())
    with pytest.raises(ValueError, match="lengths: expected 0 to 64"):
        validate_decode_inputs(case.q, case.k, case.v, case.lengths_ * 2)


def test_a_workspace_that_is_too_small_is_refused() -> None:
    case = Case((40, 9))
    small = Workspace.new(1, 2, 16, 1, DEVICE)
    with pytest.raises(ValueError, match="workspace: expected room for 12 rows of 16"):
        decode_attention(*case.arguments(), workspace=small, backend="triton")


def test_a_workspace_for_narrower_heads_has_room_for_fewer_splits() -> None:
    case = Case((40, 9))
    request = Request(case.q, None, case.k, case.v, case.lengths_, 1.0)
    assert Workspace.new(2, 6, 16, 16, DEVICE).max_splits(request) == 16
    assert Workspace.new(2, 6, 4, 16, DEVICE).max_splits(request) == 4


def test_a_latent_step_names_its_arguments() -> None:
    """Its own: no ``q``, no ``k_cache``, and the cache in the shape in which it was given."""
    q_latent, q_rope, cache = (torch.zeros(s, device=DEVICE) for s in ((2, 4, 16), (2, 4, 8), (2, 32, 24)))
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    right: dict[str, Any] = {"q_latent": q_latent, "q_rope": q_rope, "cache": cache, "lengths": lengths}
    scales = torch.ones(2, 32, device=DEVICE)
    decode_latent(**right, k_scale=scales)
    table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    wrong: list[tuple[str, Any, str]] = [
        ("q_latent", q_latent[0], "expected shape"),
        ("q_latent", q_latent.double(), "q_latent.dtype: expected one of"),
        ("q_latent", q_latent[:, :, :0], r"q_latent.shape\[2\]"),
        ("q_latent", None, "expected Tensor"),
        ("q_rope", q_rope[:, :3], r"expected shape \(2, 4, width\)"),
        ("cache", cache[..., :20], r"expected shape \(2, slots, 24\), got \(2, 32, 20\)"),
        ("cache", cache[None], "expected shape"),
        ("cache", cache[:1], r"expected shape \(2, slots, 24\), got \(1, 32, 24\)"),
        ("cache", cache[:, :0], r"cache.shape\[1\]: expected at least 1"),
        ("cache", cache.long(), "cache.dtype: expected one of"),
        ("lengths", lengths + 32, r"expected 0 to 32"),
        ("k_scale", scales[:, :3], r"expected a number, or \(2, 32\); got shape \(2, 3\)"),
        ("k_scale", scales[0], r"expected a number, or \(2, 32\)"),
        ("scale", NAN, "expected a finite number"),
        ("window", 0, "expected at least 1"),
        ("block_table", table + 2, r"expected pages 0 to 1"),
        ("out", q_latent[:1], r"expected shape \(2, 4, 16\)"),
        ("workspace", 3, "expected Workspace"),
    ]
    for name, value, says in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b") as refused:
            decode_latent(**{**right, name: value})
        refused.match(says)


def test_memory_that_two_numbers_share_is_refused() -> None:
    """Compared with the addresses, written out; every layout of a tensor with gaps is accepted."""
    for shape in ((2, 3), (3, 1), (2, 2, 2)):
        for strides in product(range(5), repeat=len(shape)):
            addresses = [sum(map(mul, at, strides)) for at in product(*map(range, shape))]
            if len(set(addresses)) < len(addresses):
                with pytest.raises(ValueError, match="out: expected memory of its own"):
                    check_memory("out", torch.zeros(40).as_strided(shape, strides))
    for order in permutations(range(3)):
        check_memory("out", torch.zeros(2, 3, 4).permute(order))
        check_memory("out", torch.zeros(4, 6, 8)[::2, ::2, ::2].permute(order))
        check_memory("out", torch.zeros(4, 6, 8)[1:3, :1].permute(order))
    check_memory("out", torch.zeros(1).expand(1, 1))


def test_a_workspace_of_other_types_is_refused_by_its_buffer() -> None:
    whole = Workspace.new(2, 6, 16, 4, DEVICE)
    for name, change in (
        ("parts", lambda t: t.half()),
        ("tickets", lambda t: t.float()),
        ("lse", lambda t: t[None]),
        ("part_lses", lambda t: t[::2]),
        ("parts", lambda t: None),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"workspace\.{name}: expected"):
            replace(whole, **{name: change(getattr(whole, name))})
