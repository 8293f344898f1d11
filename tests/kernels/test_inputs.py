"""Argument checks of a decode step: wrong arguments and their errors."""

from typing import Any

import pytest
import torch
from cases import DEVICE, Case

from kvlearn.kernels import Workspace, decode_attention, decode_latent, validate_decode_inputs
from kvlearn.kernels.inputs import Request


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
    q_latent, q_rope, cache = (torch.zeros(s, device=DEVICE) for s in ((1, 4, 16), (1, 4, 8), (1, 32, 24)))
    lengths = torch.ones(1, dtype=torch.int32, device=DEVICE)
    decode_latent(q_latent, q_rope, cache, lengths)
    with pytest.raises(ValueError, match=r"q_rope: expected shape \(1, 4, width\)"):
        decode_latent(q_latent, q_rope[:, :3], cache, lengths)
    with pytest.raises(ValueError, match="cache"):
        decode_latent(q_latent, q_rope, cache[..., :20], lengths)
    with pytest.raises(ValueError, match="cache: expected shape"):
        decode_latent(q_latent, q_rope, cache[None], lengths)
