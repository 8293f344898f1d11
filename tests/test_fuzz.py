"""Wrong values of every kind at the public functions of attention, kernels, model, parallel, serving,
measure, study and verdict.

Each call is right at first; then one or two of its arguments are replaced. The outcome is a ValueError or
TypeError that begins with an argument's name, or a result without NaN. A cache is unchanged after a refusal.
HYPOTHESIS_PROFILE=thorough tries 40 times as many.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache as once
from inspect import signature
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlearn import attention, kernels, measure, model, parallel, serving, study, verdict
from kvlearn.attention import REGISTRY
from kvlearn.attention.delta import delta_rule, generalised_delta_rule
from kvlearn.attention.linear import gated_linear_attention, linear_attention
from kvlearn.attention.mamba import selective_scan
from kvlearn.attention.mla import absorbed_wins, crossover, path_bytes, path_flops
from kvlearn.attention.rwkv import wkv
from kvlearn.study import conversion, evaluation, long_context, quality, recall, tasks, text
from kvlearn.study.quality.statistics import student_cdf, student_quantile


@pytest.fixture(scope="module", autouse=True)
def in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``save`` with a wrong path that is none of its faults writes a file."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    yield
    os.chdir(before)


EXAMPLES = 2400 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 60
INT32 = torch.int32

# Made anew for each call, so that none can be changed by one. No number is so large that memory runs out.
VALUES: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (
        None, True, False, -1, 0, 1, 2, 3, 7, 64, -(2**70), 0.0, -0.5, 0.5, 1.5, 4.0, 1e300, 1e-300, math.nan,
        math.inf, -math.inf, 1j, "", "x", "full", "cpu", "nope", "1", b"x", (), (1,), (2, 3), (None,), ("x",),
        int, torch.float32, torch.int64, torch.bool, torch.device("meta"),
    )),
    list, dict, set, object, lambda: [1], lambda: [[1, 2], [3]], lambda: [math.nan], lambda: {"a": 1},
    lambda: np.float64("nan"), lambda: np.int64(2), lambda: np.bool_(True), lambda: np.zeros(2),
    lambda: torch.tensor(3), lambda: torch.tensor(2.5), lambda: torch.tensor([True]), lambda: torch.zeros(0),
    lambda: torch.zeros(2, 3), lambda: torch.zeros(2, 3, 8), lambda: torch.zeros(2, 2, 3, 8),
    lambda: torch.zeros(2, 3, dtype=torch.int64), lambda: torch.ones(2, dtype=INT32),
    lambda: torch.zeros(2, 3, dtype=torch.complex64), lambda: torch.zeros(2, 3, 8).half(),
    lambda: torch.zeros(0, 3, 8), lambda: torch.zeros(2, 0, 8), lambda: torch.zeros(2, 3).bool(),
]  # fmt: skip

# The name of an argument where it is checked: by a model of its layers, by a cache of itself.
ALIASES = ("cache", "layers", "pattern", "rope", "source")

Call = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]


def finite(result: Any, depth: int = 0) -> bool:
    """Whether there is no NaN in ``result``."""
    if isinstance(result, Tensor):
        return not result.is_meta and not bool(result.isnan().any()) if result.is_floating_point() else True
    if isinstance(result, float):
        return not math.isnan(result)
    if depth > 3:
        return True
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return all(finite(each, depth + 1) for each in result)
    if is_dataclass(result) and not isinstance(result, type):
        return all(finite(getattr(result, field.name), depth + 1) for field in fields(result))
    return True


def tried(call: Callable[..., Any], arguments: dict[str, Any], names: set[str]) -> bool:
    """Whether the call was accepted. Fails for another error, one without a name, and a result with NaN."""
    shown = {name: arguments[name] for name in names}
    known = "|".join({*ALIASES, *arguments, *signature(call).parameters} - {"self", "options"})
    try:
        result = call(**arguments)
    except (FileExistsError, FileNotFoundError, TypeError, ValueError) as error:
        message = str(error).removeprefix("[Errno 17] ")
        assert re.match(rf"(len\()?({known})\b", message), f"{call.__qualname__}({shown}): {message}"
        return False
    assert finite(result), f"{call.__qualname__}({shown}) gave {result}"
    return True


def try_any(data: st.DataObject, calls: Mapping[str, Call]) -> None:
    """One call with one or two wrong arguments."""
    call, right = calls[data.draw(st.sampled_from(sorted(calls)))]
    arguments = right()
    names = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    wrong = {name: data.draw(st.sampled_from(range(len(VALUES)))) for name in names}
    tried(call, arguments | {name: VALUES[at]() for name, at in wrong.items()}, {*names})


@pytest.fixture(autouse=True, scope="module")
def _unchecked() -> Iterator[None]:
    """Without the hook that checks shapes: what a caller sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


thoroughly = settings(max_examples=EXAMPLES, deadline=None)


# Kernels


def step() -> dict[str, Any]:
    return {
        "q": torch.ones(2, 4, 8), "k_cache": torch.ones(2, 2, 6, 8), "v_cache": torch.ones(2, 2, 6, 8),
        "lengths": torch.tensor([6, 3], dtype=INT32), "window": None, "n_sinks": 0, "sink_logits": None,
        "block_table": None, "k_scale": None, "v_scale": None,
    }  # fmt: skip


def options() -> dict[str, Any]:
    return {
        "scale": None,
        "num_splits": None,
        "out": None,
        "workspace": None,
        "return_lse": True,
        "backend": "torch",
    }


KERNELS: dict[str, Call] = {
    "decode_attention": (kernels.decode_attention, lambda: step() | options()),
    "paged": (
        kernels.decode_attention,
        lambda: step() | options() | {"block_table": torch.tensor([[0], [1]], dtype=INT32)},
    ),
    "unvalidated": (
        kernels.decode_attention,
        lambda: step() | {"block_table": torch.tensor([[-3], [9]], dtype=INT32), "validate": False},
    ),
    "validate_decode_inputs": (kernels.validate_decode_inputs, step),
    "decode_latent": (
        kernels.decode_latent,
        lambda: {
            "q_latent": torch.ones(2, 4, 8), "q_rope": torch.ones(2, 4, 4), "cache": torch.ones(2, 6, 12),
            "lengths": torch.tensor([6, 3], dtype=INT32), "window": None, "n_sinks": 0, "sink_logits": None,
            "block_table": None, "k_scale": None, **options(),
        },
    ),
    "choose_splits": (
        kernels.choose_splits,
        lambda: {"programs": 4, "tiles": 20, "multiprocessors": 8, "per_multiprocessor": 2},
    ),
    "Workspace.new": (
        lambda **sizes: kernels.Workspace.new(**sizes).tickets,  # the other buffers are not filled
        lambda: {"batch": 2, "n_heads": 4, "head_dim": 8, "max_splits": 2, "device": "cpu"},
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_kernels_take_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, KERNELS)


# Models


def new_decoder() -> model.Decoder:
    torch.manual_seed(0)
    config = model.ModelConfig(vocab_size=16, d_model=8, n_layers=1, n_heads=2, d_ff=8, layers=("full",))
    return model.Decoder(config).eval()


decoder = once(new_decoder)


def shape() -> dict[str, Any]:
    sizes = {"vocab_size": 16, "d_model": 8, "n_layers": 2, "n_heads": 2, "head_dim": 4, "d_ff": 8}
    plain = vars(model.ModelConfig(**sizes))
    return {**plain, "layers": ["full"], "stop_tokens": (1,), "pad_token": 2, "logit_softcap": 3.0}


def build(**arguments: Any) -> Tensor:
    """Logits of a decoder of this shape."""
    return model.Decoder(model.ModelConfig(**arguments))(torch.zeros(1, 2, dtype=torch.long))


def experts(**arguments: Any) -> Tensor:
    return model.MoE(8, model.MoEConfig(**arguments))(torch.ones(1, 3, 8))


MODEL: dict[str, Call] = {
    "ModelConfig": (model.ModelConfig, shape),
    "Decoder": (build, shape),
    "MoEConfig": (
        experts,
        lambda: {
            "n_experts": 4, "top_k": 2, "d_ff": 8, "routing": "softmax", "normalise": True, "scaling": 1.0,
            "n_groups": 2, "topk_groups": 1, "group_best": 1, "correction": True, "d_ff_shared": 4,
            "shared_gate": True, "bias": True, "limit": 7.0, "alpha": 1.7, "sum_eps": 1e-20,
        },
    ),
    "Spec": (
        lambda name, reads, n_kv_heads: model.Spec(name, reads=reads, n_kv_heads=n_kv_heads),
        lambda: {"name": "gqa", "reads": None, "n_kv_heads": 2},
    ),
    "generate": (
        model.generate,
        lambda: {
            "model": decoder(), "tokens": torch.ones(2, 3, dtype=torch.long), "n": 2, "temperature": 1.0,
            "top_k": 3, "top_p": 0.9, "stop": [1], "seed": 0, "chunk": 2, "use_cache": True,
            "progress": False,
        },
    ),
    "generate, prompts": (
        model.generate,
        lambda: {"model": decoder(), "tokens": [[1, 2], [3]], "n": 2, "temperature": 0.0, "stop": None},
    ),
    "new_cache": (decoder().new_cache, lambda: {"batch": 2, "max_len": 4, "dtype": None, "device": None}),
    "forward": (
        decoder().forward,
        lambda: {"tokens": torch.ones(2, 3, dtype=torch.long), "cache": decoder().new_cache(2, 4)},
    ),
    "decode_with": (new_decoder().decode_with, lambda: {"step": None, "latent_step": None}),
    "convert": (
        model.convert,
        lambda: {"model": decoder(), "layers": ["gqa"], "init": "mean", "tokens": None, "seed": 0},
    ),
    "save": (model.save, lambda: {"model": decoder(), "path": os.devnull + "/x", "card": {"a": 1}}),
    "load": (model.load, lambda: {"path": "nowhere", "device": "cpu"}),
    "card": (model.card, lambda: {"path": "nowhere"}),
    "from_transformers": (model.from_transformers, lambda: {"model_or_path": None}),
    "balance_loss": (model.balance_loss, lambda: {"model": decoder()}),
    "half_split": (
        model.half_split,
        lambda: {"weight": torch.ones(8, 4), "rope_dim": 2, "n_heads": 2},
    ),
    "interleave": (
        model.interleave,
        lambda: {"weight": torch.ones(8, 4), "rope_dim": 2, "n_heads": 2},
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_models_take_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, MODEL)


# Measurements


@once
def llama() -> measure.ModelShape:
    return measure.MODELS["Llama 3.1 8B"]


@once
def gpu() -> measure.Device:
    return measure.DEVICES["H100"]


def load() -> measure.Load:
    return measure.Load(1e9, 1e6, 1e6, 1e9)


SIZES = {"model": "Llama 3.1 8B", "context": 4096}
MEASURE: dict[str, Call] = {
    "LayerShape": (
        measure.LayerShape,
        lambda: {
            "window": 4, "head_dim": 8, "latent": None, "shared": False, "index_dim": 8, "top_k": 2,
            "state": 9, "conv": 2, "beside": True,
        },
    ),
    "ModelShape": (
        measure.ModelShape,
        lambda: {
            "name": "a", "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "n_parameters": 100,
            "context": 64, "source": "b", "layers": (measure.LayerShape(window=3),),
            "bytes_per_parameter": 2.0,
        },
    ),
    **{
        name: (
            getattr(measure, name),
            lambda: {"model": llama(), "length": 9, "batch": 2, "dtype": torch.half},
        )
        for name in ("cache_bytes", "read_bytes", "step_work")
    },
    "state_bytes": (measure.state_bytes, lambda: {"model": llama(), "batch": 2, "dtype": torch.half}),
    "weights_bytes": (measure.weights_bytes, lambda: {"model": llama()}),
    "elements_per_token": (measure.elements_per_token, lambda: {"model": llama(), "length": 3}),
    "index_key_bytes": (measure.index_key_bytes, lambda: {"index_dim": 128}),
    "users": (
        measure.users,
        lambda: {"model": llama(), "device_bytes": 8e10, "length": 100, "dtype": torch.half},
    ),
    "design": (measure.design, lambda: {"layers": ["full", "window"], "model": llama()}),
    "step_seconds": (
        measure.step_seconds,
        lambda: {"model": llama(), "length": 100, "device": gpu(), "batch": 2},
    ),
    "budget_table": (measure.budget_table, lambda: {"model": llama(), "length": 100, "batch": 2}),
    "memory_table": (
        measure.memory_table,
        lambda: {**SIZES, "n_users": 4, "precision": "16 bit", "card": "80 GB"},
    ),
    "Load": (measure.Load, lambda: {"weights": 1.0, "stored": 1.0, "moved": 1.0, "flops": 1.0}),
    "Load.of": (measure.Load.of, lambda: {"model": llama(), "length": 100}),
    "users_per_device": (measure.users_per_device, lambda: {"load": load(), "memory": 8e10, "reserve": 0.1}),
    "dollars_per_million": (
        measure.dollars_per_million,
        lambda: {
            "load": load(), "device": gpu(), "price": 2.0, "users": 3, "reserve": 0.1, "efficiency": 0.5,
            "busy": 0.5,
        },
    ),
    "cost_table": (
        measure.cost_table,
        lambda: {**SIZES, "device": "H100", "n_devices": 2, "price": 2.0, "smaller": 4.0, "efficiency": 0.6},
    ),
    "Device": (
        measure.Device,
        lambda: {"name": "a", "memory": 10, "bandwidth": 1e9, "peak": 1e12, "source": "b"},
    ),
    "device_table": (measure.device_table, lambda: {"devices": [gpu()]}),
    "fit_exponent": (
        measure.fit_exponent,
        lambda: {"lengths": [1, 2, 4], "values": [1.0, 2.0, 4.5], "errors": [0.1, 0.1, 0.1]},
    ),
    "peak_memory": (measure.peak_memory, lambda: {"fn": list, "device": "nope"}),
    "Roofline": (measure.Roofline, lambda: {"peak": 1e12, "bandwidth": 1e9, "name": "a"}),
    "attainable": (measure.Roofline(1e12, 1e9).attainable, lambda: {"intensity": 3.0}),
    "floor": (measure.Roofline(1e12, 1e9).floor, lambda: {"work": measure.Work(1.0, 1.0)}),
    "Table": (measure.Table, lambda: {"rows": [{"a": 1}], "caption": ""}),
    "running_table": (
        lambda *mechanisms, n_layers: measure.running_table(*mechanisms, n_layers=n_layers),
        lambda: {"n_layers": 1},
    ),
    "Quartiles.of": (measure.Quartiles.of, lambda: {"values": [1.0, 2.0]}),
    "scaled": (measure.Quartiles.of([1.0]).scaled, lambda: {"factor": 2.0}),
    "compare": (
        measure.compare,
        lambda: {"fns": {"a": list}, "rounds": 2, "min_block_time": 0.0, "calls": 1},
    ),
    "touched": (measure.touched, lambda: {"fn": list, "cache": [torch.ones(2)], "weights": ()}),
    "format_bytes": (measure.format_bytes, lambda: {"n_bytes": 3}),
    "format_bytes_decimal": (measure.format_bytes_decimal, lambda: {"n_bytes": 3}),
    "format_rate": (measure.format_rate, lambda: {"per_second": 3.0, "of": "B"}),
    "format_seconds": (measure.format_seconds, lambda: {"seconds": 3.0}),
    "linear_work": (
        measure.linear_work,
        lambda: {"d_in": 3, "d_out": 4, "tokens": 5, "dtype": torch.half},
    ),
    "attention_layer_work": (
        measure.attention_layer_work,
        lambda: {
            "d_model": 8, "n_heads": 4, "n_kv_heads": 2, "head_dim": 2, "new": 3, "cached": 4, "batch": 2,
            "dtype": torch.half,
        },
    ),
    "decoder_work": (
        measure.decoder_work,
        lambda: {
            "n_parameters": 100, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 2, "new": 3,
            "cached": 4, "batch": 2, "dtype": torch.half,
        },
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_measurements_take_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, MEASURE)


# Many devices, many users


def served(**arguments: Any) -> list[int]:
    """The tokens of one request."""
    engine = serving.Engine(decoder(), 64, page=4, max_batch=1, budget=16)
    request = engine.submit(**arguments)
    engine.run()
    return request.tokens


SHARED: dict[str, Call] = {
    "blockwise_attention": (
        parallel.blockwise_attention,
        lambda: {
            "q": torch.ones(2, 4, 3, 8), "k": torch.ones(2, 2, 3, 8), "v": torch.ones(2, 2, 3, 8),
            "rule": None, "queries": None, "lengths": None, "scale": None, "block": 2,
        },
    ),
    "Rule": (parallel.Rule, lambda: {"causal": True, "window": 3}),
    "Layout": (
        lambda n_tokens, world, order: parallel.Layout(n_tokens, world, order).positions(0),
        lambda: {"n_tokens": 7, "world": 2, "order": "zigzag"},
    ),
    "Tenant": (
        lambda name, salt, quota: serving.BlockPool(8, 2, [serving.Tenant(name, salt, quota)]).n_blocks,
        lambda: {"name": "a", "salt": b"", "quota": 2},
    ),
    "BlockPool": (
        serving.BlockPool,
        lambda: {
            "n_blocks": 4, "page": 2, "tenants": (serving.Tenant("a"),), "data": None, "share": True,
            "hash_function": serving.sha256,
        },
    ),
    "Engine": (
        serving.Engine,
        lambda: {
            "model": decoder(), "n_blocks": 4, "page": 2, "tenants": (serving.Tenant("a"),), "max_batch": 2,
            "budget": 4, "share": True, "hash_function": serving.sha256,
        },
    ),
    "submit": (
        served,
        lambda: {"prompt": [1, 2, 3], "n_new": 2, "tenant": "default", "temperature": 1.0, "seed": 0},
    ),
    "blocks_for": (serving.blocks_for, lambda: {"n_tokens": 3, "page": 2}),
    "Mix": (
        lambda **recipe: serving.simulate(serving.Mix(**recipe), 5, 100),
        lambda: {
            "seed": 0, "n_tenants": 2, "n_public": 2, "public": 0.5, "system_prompt": 8, "question": 4,
            "answer": 4, "goes_on": 0.5, "max_len": 64, "rate": 20.0, "seconds_per_token": 0.02,
        },
    ),
    "simulate": (
        serving.simulate,
        lambda: {"mix": serving.Mix(), "n_requests": 3, "n_blocks": 400, "page": 16, "sharing": "all"},
    ),
    "noise": (
        serving.noise,
        lambda: {
            "hits": [1.0, 2.0], "misses": [2.0, 3.0], "epsilon": 1.0, "delta": 0.01, "probes": 1,
            "n_candidates": 4, "trials": 3, "seed": 0,
        },
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_devices_and_users_share_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, SHARED)


# The guide

records = once(verdict.Records)
GUIDE: dict[str, Call] = {
    "recommend": (
        verdict.recommend,
        lambda: {
            "model": "Llama 3.1 8B", "context": 4096, "users": 3, "device": "H100", "price": 2.0,
            "find_anything": True, "worse": 0.02, "evidence": "planned", "near": 0.1, "efficiency": 0.6,
            "records": records(),
        },
    ),
    "Request": (verdict.Request, lambda: {"name": "a", "context": 4096, "users": 3, "speed": 10.0}),
    "route": (
        verdict.route,
        lambda: {
            "model": "Llama 3.1 8B", "requests": verdict.MIX, "prices": {"H100": 2.0}, "efficiency": 0.6,
        },
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_the_guide_takes_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, GUIDE)


# Mechanisms and their caches


@once
def layer(name: str) -> attention.Mechanism:
    torch.manual_seed(0)
    return REGISTRY[name].tiny().eval()


def build_layer(name: str, **arguments: Any) -> Tensor:
    mixer = REGISTRY[name](**arguments)  # type: ignore[arg-type]
    return mixer(torch.ones(1, 3, mixer.d_model))


@thoroughly
@given(st.data())
def test_mechanisms_are_built_from_nothing_that_is_wrong(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(REGISTRY)))
    parameters = signature(REGISTRY[name]).parameters
    arguments: dict[str, Any] = {"d_model": 16, "n_heads": 2}
    names = data.draw(st.lists(st.sampled_from(sorted(parameters)), min_size=1, max_size=2, unique=True))
    arguments |= {name: VALUES[data.draw(st.sampled_from(range(len(VALUES))))]() for name in names}

    def call(**given: Any) -> Tensor:
        return build_layer(name, **given)

    call.__qualname__ = name
    call.__signature__ = signature(REGISTRY[name])  # type: ignore[attr-defined]
    tried(call, arguments, {*names})


CACHES: dict[str, Callable[[attention.Mechanism, attention.Cache], Call]] = {
    "forward": lambda mixer, cache: (
        mixer.__call__,
        lambda: {"x": torch.ones(2, 3, mixer.d_model), "cache": cache, "source": None},
    ),
    "trim": lambda mixer, cache: (cache.trim, lambda: {"lengths": torch.tensor([2, 1])}),
    "new_cache": lambda mixer, cache: (
        mixer.new_cache,
        lambda: {"batch": 2, "max_len": 4, "dtype": None, "device": None},
    ),
    "cache_bytes": lambda mixer, cache: (
        mixer.cache_bytes,
        lambda: {"max_len": 4, "batch": 2, "dtype": torch.half},
    ),
    "read_bytes": lambda mixer, cache: (
        mixer.read_bytes,
        lambda: {"length": 4, "batch": 2, "dtype": torch.half},
    ),
}


@thoroughly
@given(st.data())
def test_layers_take_nothing_that_is_wrong_and_keep_their_caches(data: st.DataObject) -> None:
    mixer = layer(data.draw(st.sampled_from(sorted(REGISTRY))))
    with torch.no_grad():
        cache = mixer.new_cache(2, 6)
        mixer(torch.ones(2, 2, mixer.d_model), cache)
    call, right = CACHES[data.draw(st.sampled_from(sorted(CACHES)))](mixer, cache)
    arguments = right()
    names = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    arguments |= {name: VALUES[data.draw(st.sampled_from(range(len(VALUES))))]() for name in names}
    before = [cache.length, *(t.clone() for t in cache.tensors())]
    if not tried(call, arguments, {*names}):
        after = [cache.length, *cache.tensors()]
        assert after[0] == before[0]
        assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))


SCALINGS: dict[str, Call] = {
    "RopeConfig": (attention.RopeConfig, lambda: {"theta": 1e4, "scaling": None}),
    "LinearScaling": (attention.LinearScaling, lambda: {"factor": 2.0}),
    "DynamicScaling": (attention.DynamicScaling, lambda: {"factor": 2.0, "original_max_len": 8}),
    "YarnScaling": (
        attention.YarnScaling,
        lambda: {
            "factor": 2.0, "original_max_len": 8, "beta_fast": 32.0, "beta_slow": 1.0,
            "attention_factor": 1.0, "truncate": True,
        },
    ),
    "Llama3Scaling": (
        attention.Llama3Scaling,
        lambda: {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_len": 8},
    ),
    "LongRopeScaling": (
        attention.LongRopeScaling,
        lambda: {
            "short_factor": (1.0, 1.0), "long_factor": (2.0, 2.0), "original_max_len": 8,
            "attention_factor": 1.0,
        },
    ),
    "Rope": (attention.Rope, lambda: {"head_dim": 4, "config": attention.RopeConfig()}),
    "KVCache": (
        attention.KVCache,
        lambda: {
            "batch": 2, "n_heads": 2, "max_len": 4, "head_dim": 4, "dtype": torch.float32,
            "device": torch.device("cpu"), "v_head_dim": 4,
        },
    ),
    "append": (
        lambda k, v: attention.KVCache(2, 2, 4, 4, torch.float32, torch.device("cpu")).append(k, v),
        lambda: {"k": torch.ones(2, 2, 1, 4), "v": torch.ones(2, 2, 1, 4)},
    ),
    "parse": (
        attention.parse,
        lambda: {"spec": "local(4) | global(1)"},
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_angles_and_caches_take_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, SCALINGS)


def qkv() -> dict[str, Any]:
    return {name: torch.ones(2, 2, 3, 8) for name in ("q", "k", "v")}


def unfaded() -> Tensor:
    return torch.zeros(2, 2, 3, 8)


CHUNKS = {"form": "chunked", "chunk": 2}
SIZES_OF_A_CALL = {
    "n_heads": 2, "head_dim": 4, "rank": 8, "rope_dim": 2, "new": 3, "cached": 5, "v_head_dim": None,
}  # fmt: skip
RECURRENCES: dict[str, Call] = {
    "linear_attention": (
        linear_attention,
        lambda: qkv() | CHUNKS | {"log_decay": torch.zeros(2, 2, 3), "state": torch.ones(2, 2, 8, 8)},
    ),
    "gated_linear_attention": (
        gated_linear_attention,
        lambda: qkv() | CHUNKS | {"log_decay": unfaded(), "state": None},
    ),
    "delta_rule": (
        delta_rule,
        lambda: qkv() | CHUNKS | {"beta": torch.full((2, 2, 3), 0.1), "log_decay": None, "state": None},
    ),
    "generalised_delta_rule": (
        generalised_delta_rule,
        lambda: (
            qkv() | CHUNKS | {"probe": unfaded(), "rewrite": unfaded(), "log_decay": unfaded(), "state": None}
        ),
    ),
    "selective_scan": (
        selective_scan,
        lambda: {
            "x": torch.ones(2, 3, 8), "dt": torch.ones(2, 3, 8), "A": -torch.ones(8, 8),
            "B": torch.ones(2, 3, 8), "C": torch.ones(2, 3, 8), "D": torch.ones(8), "state": None, **CHUNKS,
        },
    ),
    "wkv": (
        wkv,
        lambda: {
            "w": torch.ones(8), "u": torch.ones(8), "k": torch.ones(2, 3, 8), "v": torch.ones(2, 3, 8),
            "state": (torch.ones(2, 8), torch.ones(2, 8), torch.zeros(2, 8)), **CHUNKS,
        },
    ),
    "path_flops": (path_flops, lambda: SIZES_OF_A_CALL | {"path": "naive", "batch": 2}),
    "path_bytes": (path_bytes, lambda: SIZES_OF_A_CALL | {"path": "absorbed", "batch": 2}),
    "absorbed_wins": (absorbed_wins, lambda: {**SIZES_OF_A_CALL}),
    "crossover": (crossover, lambda: {"head_dim": 4, "rank": 8, "v_head_dim": 4, "cached": 5}),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_recurrences_take_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, RECURRENCES)


# The study


def some_text() -> Tensor:
    return (torch.arange(64) % 16).to(torch.uint8)


def run() -> dict[str, Any]:
    return {
        "steps": 1, "batch": 1, "length": 4, "lr": 1e-3, "warmup": 1, "weight_decay": 0.1, "clip": 1.0,
        "seed": 0,
    }  # fmt: skip


def texts_of(kind: type) -> Callable[..., recall.Texts]:
    """Texts of a task of this kind."""
    return lambda **sizes: kind(**sizes).texts(2, torch.Generator().manual_seed(0))


SHORT = recall.Recall(1, 4, 2, 2)
STUDY: dict[str, Call] = {
    "TrainConfig": (study.TrainConfig, run),
    "lr_at": (study.TrainConfig(10, warmup=2).lr_at, lambda: {"step": 3}),
    "windows": (
        study.windows,
        lambda: {"text": some_text(), "batch": 2, "length": 4, "seed": 0, "step": 0},
    ),
    "as_tokens": (text.as_tokens, lambda: {"text": b"text"}),
    "split_of": (text.split_of, lambda: {"path": "a/b.py"}),
    "train": (
        study.train,
        lambda: {
            "model": new_decoder(), "text": some_text(), "config": study.TrainConfig(1, 1, 4), "every": 1,
            "at_step": None, "stop": None, "origin": None, "progress": False,
        },
    ),
    "train_and_measure": (
        study.train_and_measure,
        lambda: {
            "model": new_decoder(), "text": some_text(), "config": study.TrainConfig(1, 1, 4),
            "held_out": {"a": some_text()}, "at": [1], "n_windows": 2, "progress": False,
        },
    ),
    "evaluate": (
        study.evaluate,
        lambda: {"model": decoder(), "text": some_text(), "length": 4, "n_windows": 2, "batch": 2},
    ),
    "spread_windows": (
        evaluation.spread_windows,
        lambda: {"text": some_text(), "length": 4, "n_windows": 2},
    ),
    "token_losses": (
        evaluation.token_losses,
        lambda: {"model": decoder(), "windows": torch.zeros(2, 3, dtype=torch.long), "batch": 2},
    ),
    "prepare_conversion": (
        conversion.prepare_conversion,
        lambda: {
            "base": decoder(), "layers": ["gqa"], "init": "mean", "text": some_text(), "share": 1.0,
            "seen": 16, "batch": 2, "length": 4, "lr": 1e-3, "seed": 0,
        },
    ),
    "Recall": (
        texts_of(recall.Recall),
        lambda: {"n_pairs": 2, "length": 8, "n_keys": 3, "n_values": 3},
    ),
    "Needle": (
        texts_of(tasks.Needle),
        lambda: {"n_needles": 2, "length": 8, "n_words": 2, "n_keys": 3, "n_values": 3},
    ),
    "Induction": (texts_of(tasks.Induction), lambda: {"length": 4, "vocab_size": 3}),
    "SelectiveCopy": (texts_of(tasks.SelectiveCopy), lambda: {"n_data": 2, "length": 8, "n_symbols": 3}),
    **{
        f"{type(task).__name__}.texts": (
            task.texts,
            lambda: {"batch": 2, "generator": torch.Generator().manual_seed(0)},
        )
        for task in (SHORT, tasks.Needle(), tasks.Induction(), tasks.SelectiveCopy())
    },
    "longer": (tasks.longer, lambda: {"task": SHORT, "factor": 2}),
    "new_model": (
        recall.new_model,
        lambda: {"mixer": "full", "task": SHORT, "d_model": 8, "n_mixers": 1},
    ),
    "recall.train": (
        recall.train,
        lambda: {
            "mixer": "full", "task": SHORT, "training": study.TrainConfig(1, 1, 4), "n_mixers": 1, "every": 1,
            "until": 0.5, "n_texts": 2, "progress": False,
        },
    ),
    "recall.score": (
        lambda task, n_texts: recall.score(recall.new_model("full", SHORT, 8), task, n_texts),
        lambda: {"task": SHORT, "n_texts": 2},
    ),
    "study_recall": (
        lambda **arguments: list(study.study_recall(**arguments)),
        lambda: {
            "designs": {}, "tasks": [SHORT], "training": study.TrainConfig(1), "rates": [1e-2], "seeds": [0],
            "jobs": 1, "progress": False,
        },
    ),
    "evaluate_folder": (
        lambda **arguments: study.evaluate_folder(decoder(), **arguments),
        lambda: {
            "folder": "nowhere", "max_length": 100, "encode": long_context.encode_bytes,
            "decode": long_context.decode_bytes, "limit": 2, "chunk": 8,
        },
    ),
    "encode_bytes": (long_context.encode_bytes, lambda: {"text": "text"}),
    "decode_bytes": (long_context.decode_bytes, lambda: {"tokens": [104, 105]}),
    "without_middle": (long_context.without_middle, lambda: {"tokens": [1, 2, 3], "length": 2}),
    "summarise": (quality.summarise, lambda: {"losses": [1.0, None, 2.0]}),
    "student_cdf": (student_cdf, lambda: {"t": 1.5, "df": 3}),
    "student_quantile": (student_quantile, lambda: {"p": 0.9, "df": 3}),
    "paired_values": (quality.paired_values, lambda: {"ours": {0: 1.0}, "theirs": {0: 2.0, 1: None}}),
    "paired_difference": (
        quality.paired_difference,
        lambda: {"values": [0.1, 0.3], "spread": 0.2, "df": 4, "confidence": 0.9},
    ),
    "pooled_spread": (quality.pooled_spread, lambda: {"losses": [{0: 1.0, 1: 2.0}, {0: 3.0, 1: 5.0}]}),
    "bootstrap_difference": (
        quality.bootstrap_difference,
        lambda: {"values": [0.1, 0.3], "n_draws": 20, "seed": 0, "confidence": 0.9},
    ),
    "smallest_difference": (
        quality.smallest_difference,
        lambda: {"spread": 0.1, "df": 4, "n": 3, "confidence": 0.9, "power": 0.8},
    ),
}  # fmt: skip


@thoroughly
@given(st.data())
def test_the_study_takes_nothing_that_is_wrong(data: st.DataObject) -> None:
    try_any(data, STUDY)


# Integers of numpy


def same(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether two results hold the same numbers."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, float | int | str):
        return bool(a == b)
    if isinstance(a, list | tuple) and depth < 4:
        return len(a) == len(b) and all(same(x, y, depth + 1) for x, y in zip(a, b, strict=True))
    return True


TABLES = {
    "kernels": KERNELS, "model": MODEL, "measure": MEASURE, "shared": SHARED, "guide": GUIDE,
    "scalings": SCALINGS, "recurrences": RECURRENCES, "study": STUDY,
}  # fmt: skip
NOT_COMPARED = ("compare", "prepare_conversion", "recall.train", "train_and_measure")  # results hold times


@pytest.mark.parametrize("table", TABLES)
def test_an_integer_of_numpy_gives_what_pythons_gives(table: str) -> None:
    """The narrowest type that holds it: a sum or product that kept it would overflow."""
    for name, (call, right) in TABLES[table].items():
        for argument, value in right().items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                continue
            narrow = np.min_scalar_type(value).type(value)
            results = []
            for given_value in (value, narrow):
                torch.manual_seed(0)
                try:
                    results.append(call(**right() | {argument: given_value}))
                except (FileNotFoundError, ValueError):
                    if given_value is narrow and results:
                        raise
            if results and name not in NOT_COMPARED:
                assert same(*results), f"{name}({argument}={narrow!r})"
