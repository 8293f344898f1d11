"""Every mechanism under odd conditions: default dtypes, the device "meta", ``torch.compile``, caches in the
wrong hands, and arguments that make no sense."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_tools import close, draw, redraw
from torch import Tensor

from kvlearn.attention import (
    REGISTRY,
    Cache,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)

B, T = 2, 11
every_mechanism = pytest.mark.parametrize("name", sorted(REGISTRY))


def tiny(name: str, seed: int = 0) -> Any:
    return redraw(REGISTRY[name].tiny(), seed)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def in_pieces(layer: Any, x: Tensor, cache: Cache) -> Tensor:
    return torch.cat([layer(piece, cache) for piece in x.split((5, 1, 1, x.shape[1] - 7), dim=1)], dim=1)


# Dtypes and devices


@every_mechanism
def test_it_is_built_alike_under_every_default_dtype(name: str) -> None:
    """Weights not drawn by ``nn.Linear`` are computed in fp32, and rounded once. (Seeds differ in two builds:
    what these agree in is a constant, or set by ``initialise``.)"""

    def build(seed: int, dtype: torch.dtype) -> Any:
        with default_dtype(dtype):
            torch.manual_seed(seed)
            layer = REGISTRY[name].tiny()
            torch.manual_seed(0)
            layer.initialise()
        return layer.eval()

    wide, other = (build(seed, torch.float64).state_dict() for seed in (1, 2))
    fixed = [weight for weight in wide if torch.equal(wide[weight], other[weight])]
    assert name not in ("gated_delta", "kda", "mamba", "mamba2", "rwkv4", "rwkv7") or len(fixed) > 2
    weights = redraw(REGISTRY[name].tiny()).state_dict()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = build(1, dtype)
        assert {weight.dtype for weight in layer.parameters()} == {dtype}
        for weight in fixed:
            assert torch.equal(layer.state_dict()[weight], wide[weight].to(dtype)), weight
        cast = REGISTRY[name].tiny().to(dtype).eval()
        for each in (layer, cast):
            each.load_state_dict(weights)
        x = draw(B, T, layer.d_model).to(dtype)
        expected = cast(x), in_pieces(cast, x, cast.new_cache(B, T))
        with default_dtype(dtype):
            got = layer(x), in_pieces(layer, x, layer.new_cache(B, T))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@every_mechanism
def test_built_on_meta_it_works_once_weights_are_assigned(name: str) -> None:
    kind, options = REGISTRY[name], [{}]
    if "reader" in signature(kind).parameters:
        options.append({"reader": True})
    for given in options:
        real = redraw(kind.tiny(**given))  # type: ignore[call-arg]
        with torch.device("meta"):
            layer = kind.tiny(**given).eval()  # type: ignore[call-arg]
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
        layer.load_state_dict(real.state_dict(), assign=True)
        x = draw(B, T, layer.d_model)
        source = tiny(name, seed=1).project_kv(x) if given else None
        assert torch.equal(layer(x, source=source), real(x, source=source))
        if not given:
            close(in_pieces(layer, x, layer.new_cache(B, T)), real(x))
        layer.to_empty(device="meta")
        assert layer(x.to("meta"), source=None if source is None else copy.copy(meta_of(source))).is_meta
        layer.to_empty(device="cpu").load_state_dict(real.state_dict())
        assert torch.equal(layer(x, source=source), real(x, source=source))


def meta_of(source: Any) -> Any:
    return type(source)(*(part.to("meta") for part in source))


@every_mechanism
def test_copies_and_pickles_of_a_layer_compute_the_same(name: str) -> None:
    layer = tiny(name)
    x = draw(B, T, layer.d_model)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


# A cache belongs to one layer


@every_mechanism
def test_a_cache_with_another_layers_tokens_is_refused_and_left_alone(name: str) -> None:
    layer, other = tiny(name), tiny(name, seed=1)
    x, cache = draw(B, T, layer.d_model), layer.new_cache(B, T)
    other(x[:, :3], cache)  # empty, it belongs to none
    before = [t.clone() for t in cache.tensors()]
    with pytest.raises(ValueError, match="cache: expected one that this layer alone has used"):
        layer(x[:, 3:], cache)
    assert cache.length == 3
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors(), before, strict=True))
    close(torch.cat((other(x[:, :3]), other(x[:, 3:], cache)), dim=1), other(x))
    cache.reset()
    close(in_pieces(layer, x, cache), layer(x))


@every_mechanism
def test_a_copy_of_a_cache_continues_with_a_copy_of_its_layer(name: str) -> None:
    layer = tiny(name)
    x, cache = draw(B, T, layer.d_model), layer.new_cache(B, T)
    layer(x[:, :6], cache)
    expected = layer(x)[:, 6:]
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch_saved(cache)):
        twin = copy.deepcopy(layer)
        with pytest.raises(ValueError, match="cache: expected one"):
            twin(x[:, 6:], cache)
        close(twin(x[:, 6:], copied), expected)
        with pytest.raises(ValueError, match="cache: expected one"):
            layer(x[:, 6:7], copied)
    close(layer(x[:, 6:], cache), expected)


def torch_saved(cache: Cache) -> Cache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_cache_does_not_keep_its_layer_alive() -> None:
    import gc
    import weakref

    layer = tiny("gqa")
    cache, alive = layer.new_cache(1, 4), weakref.ref(layer)
    layer(draw(1, 2, layer.d_model), cache)
    del layer
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match="cache: expected one"):
        tiny("gqa")(draw(1, 2, 24), cache)


# States, and gradients that end at a cache


@every_mechanism
def test_a_cache_that_is_reset_is_as_new(name: str) -> None:
    layer = tiny(name)
    cache = layer.new_cache(B, T)
    in_pieces(layer, draw(B, T, layer.d_model), cache)
    cache.reset()
    for got, new in zip(cache.tensors(), layer.new_cache(B, T).tensors(), strict=True):
        assert torch.equal(got, new)


@every_mechanism
def test_what_is_cached_has_no_gradient_even_where_one_is_computed(name: str) -> None:
    """``forward`` itself, and ``project_kv``, run with gradients on: what they write is detached."""
    layer = tiny(name)
    x, cache = draw(B, T, layer.d_model).requires_grad_(), layer.new_cache(B, T)
    for piece in x.split((5, 1, 1, 4), dim=1):
        layer.forward(piece, cache)
        assert not any(t.requires_grad for t in cache.tensors())
    if hasattr(layer, "reader"):
        cache.reset()
        layer.project_kv(x[:, :5], cache)
        cache.trim(torch.tensor([4, 3]))
        layer.project_kv(x[:, 5:7], cache)
        assert not any(t.requires_grad for t in cache.tensors())


# torch.compile


@pytest.mark.slow
def test_training_and_decode_are_one_graph_each() -> None:
    """In a process of its own, since the hook that checks shapes in the tests cannot be traced. In the
    thorough profile all mechanisms begin at the 4th token, and their first length has a graph too."""
    quick = [] if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else ["--quick"]
    script = Path(__file__).with_name("one_graph.py")
    command = [sys.executable, str(script), *quick, *REGISTRY]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# Arguments


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_nothing_is_not_a_batch(name: str) -> None:
    layer = tiny(name)
    x = draw(B, T, layer.d_model)
    for empty, names in ((x[:0], r"x\.shape\[0\] \(batch\)"), (x[:, :0], r"x\.shape\[1\] \(time\)")):
        for cache in (None, layer.new_cache(B, T)):
            with pytest.raises(ValueError, match=f"{names}: expected at least 1, got 0"):
                layer(empty, cache)
        if hasattr(layer, "reader"):
            with pytest.raises(ValueError, match=names):
                layer.project_kv(empty)


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_sizes_dtypes_and_devices_of_caches_are_refused_by_name(name: str) -> None:
    layer = tiny(name)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"dtype": "float32"}, TypeError, "dtype: expected a torch.dtype, got str"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected a floating"),
        ({"batch": 0}, ValueError, "batch: expected at least 1"),
        ({"batch": 1.5}, TypeError, "batch: expected an integer"),
    ]
    devices: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"device": "nope"}, ValueError, "device: expected a device such as 'cpu'"),
        ({"device": 1.5}, TypeError, "device: expected a device"),
    ]
    for options, error, names in (*wrong, *devices):
        with pytest.raises(error, match=names):
            layer.new_cache(**{"batch": B, "max_len": T, **options})
    for options, error, names in wrong:
        with pytest.raises(error, match=names):
            layer.cache_bytes(T, **options)
        with pytest.raises(error, match=names):
            layer.read_bytes(T, **options)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"max_len: expected at least 1, got {size}"):
            layer.cache_bytes(size)
        with pytest.raises(ValueError, match=f"length: expected at least 1, got {size}"):
            layer.read_bytes(size)


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_lengths_that_are_not_integers_are_refused(name: str) -> None:
    layer = tiny(name)
    cache = layer.new_cache(B, T)
    layer(draw(B, 3, layer.d_model), cache)
    if not cache.can_trim:
        return
    for dtype in (torch.bool, torch.float32, torch.complex64):
        with pytest.raises(TypeError, match=f"lengths: expected integers, got {dtype}"):
            cache.trim(torch.ones(B, dtype=dtype))
    assert cache.length == 3


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_numbers_that_would_make_nan_are_refused_by_name(name: str) -> None:
    wrong = {
        "norm_eps": (-1.0, 0.0, math.nan, math.inf, "1e-6"),
        "scale": (math.nan, math.inf, "1"),
        "softcap": (-1.0, math.nan, math.inf),
        "beta_max": (0.0, 3.0, math.nan),
    }
    options: dict[str, Any] = {"normalise": True} if name == "parallel" else {}
    for option in signature(REGISTRY[name]).parameters:
        for value in wrong.get(option, ()):
            with pytest.raises((ValueError, TypeError), match=f"{option}: expected"):
                REGISTRY[name](24, 3, **{option: value}, **options)  # type: ignore[call-arg]


@pytest.mark.usefixtures("unchecked_shapes")
def test_scalings_of_no_size_are_refused_by_name() -> None:
    nan, inf = math.nan, math.inf
    wrong: list[tuple[Any, tuple[Any, ...], str]] = [
        *((kind, (bad, *rest), "factor") for bad in (0.5, nan, inf, "8")
          for kind, rest in ((LinearScaling, ()), (Llama3Scaling, (1.0, 4.0, 64)), (YarnScaling, (64,)),
                             (DynamicScaling, (64,)))),
        *((YarnScaling, (8.0, bad), "original_max_len") for bad in (0, -1, 1.5, None)),
        (Llama3Scaling, (8.0, 1.0, 4.0, 0), "original_max_len"),
        (DynamicScaling, (8.0, 0), "original_max_len"),
        (LongRopeScaling, ((1.0,), (1.0,), 0), "original_max_len"),
        (Llama3Scaling, (8.0, 0.0, 4.0, 64), "low_freq_factor"),
        (Llama3Scaling, (8.0, 4.0, 4.0, 64), "high_freq_factor"),
        (Llama3Scaling, (8.0, 1.0, nan, 64), "high_freq_factor"),
        (YarnScaling, (8.0, 64, 0.0), "beta_fast"),
        (YarnScaling, (8.0, 64, 32.0, nan), "beta_slow"),
        (YarnScaling, (8.0, 64, 32.0, 1.0, nan), "attention_factor"),
        (LongRopeScaling, ((0.0,), (1.0,), 64), "short_factor"),
        (LongRopeScaling, ((1.0,), (nan,), 64), "long_factor"),
        (LongRopeScaling, ((1.0,), (1.0,), 64, inf), "attention_factor"),
    ]  # fmt: skip
    for kind, arguments, names in wrong:
        with pytest.raises((ValueError, TypeError), match=f"^{names}: expected"):
            kind(*arguments)
    for theta in (nan, inf, 1.0):
        with pytest.raises(ValueError, match=r"theta: expected"):
            REGISTRY["gqa"](24, 3, rope=RopeConfig(theta))  # type: ignore[call-arg]
