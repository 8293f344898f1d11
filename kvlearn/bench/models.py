"""Models rebuilt from kvlearn's parts beside transformers' own, with the same weights.

Decode is real: every step appends a token, so the context grows by one token per step, for all alike. The
weights are random, which changes no time. Before anything is timed, the outputs are compared.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlearn.attention import KVCache
from kvlearn.attention.window import RingCache
from kvlearn.bench.common import Calls, Part, agree, ratio_row, time_row
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.timing import compare
from kvlearn.model import Decoder, from_transformers

# How many times as long transformers takes, at least.
STATIC_BAR, DYNAMIC_BAR, STATE_BAR = 1.0, 1.2, 1.0
MOE_BAR = 1.2  # how many times as long as transformers the mixture takes, at most
LOAD_SECONDS = 2.0
COPIES = 1.1  # of the checkpoint in memory while it is loaded, its mapped file included, at most


@dataclass(frozen=True)
class Sizes:
    """The shape of all models, and how long they are measured."""

    n_layers: int = 8
    d_model: int = 512
    d_ff: int = 1376
    n_heads: int = 8
    n_kv_heads: int = 2
    vocab_size: int = 4096
    n_experts: int = 8
    state: int = 64  # of Mamba-2, and the key dim of the gated delta rule
    window: int = 1024
    context: int = 4096  # of models with a cache of keys and values
    prompt: int = 512  # of models with a state, and of a mixture
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 15
    steps: int = 6  # per round

    @property
    def room(self) -> int:
        """Tokens that the steps add, the first two of each model included."""
        return self.rounds * self.steps + 2


SIZES = Sizes()
SMALL = Sizes(
    n_layers=4,
    d_model=32,
    d_ff=48,
    n_heads=4,
    vocab_size=61,
    n_experts=4,
    state=8,
    window=8,
    context=24,
    prompt=12,
    batches=(1, 2),
    rounds=2,
    steps=2,
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark, on ``device``."""
    sizes = SMALL if small else SIZES
    return [
        Part("llama decode", lambda: attention_rows("llama", sizes, device)),
        Part("mistral decode", lambda: attention_rows("mistral", sizes, device)),
        Part("qwen3_next", lambda: state_rows("qwen3_next", sizes, device)),
        Part("mamba2", lambda: state_rows("mamba2", sizes, device)),
        Part("mixture", lambda: mixture_rows(sizes, device)),
        Part("loading", lambda: loading_rows(sizes)),
    ]


def fields(kind: str, sizes: Sizes) -> dict[str, Any]:
    """The configuration of a transformers model of this ``model_type``."""
    s = sizes
    common = {"vocab_size": s.vocab_size, "hidden_size": s.d_model, "num_hidden_layers": s.n_layers}
    heads = {
        "num_attention_heads": s.n_heads,
        "num_key_value_heads": s.n_kv_heads,
        "head_dim": s.d_model // s.n_heads,
        "intermediate_size": s.d_ff,
        "max_position_embeddings": 2 * s.context,
    }
    match kind:
        case "llama":
            return {**common, **heads}
        case "mistral":
            return {**common, **heads, "sliding_window": s.window}
        case "mixtral":
            return {**common, **heads, "num_local_experts": s.n_experts, "num_experts_per_tok": 2}
        case "qwen3_next":
            linear = {f"linear_num_{part}_heads": s.n_heads for part in ("key", "value")}
            dims = {f"linear_{part}_head_dim": s.state for part in ("key", "value")}
            experts = {"num_experts": s.n_experts, "num_experts_per_tok": 2}
            width = s.d_ff // 4
            widths = {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
            return {**common, **heads, **linear, **dims, **experts, **widths}
        case "mamba2":
            inner = {"expand": 2, "num_heads": 2 * s.n_heads, "head_dim": s.d_model // s.n_heads}
            return {**common, **inner, "state_size": s.state, "n_groups": 1}
    raise ValueError(f"kind: expected a model of this benchmark, got {kind!r}")


def build(kind: str, sizes: Sizes, device: torch.device, **options: Any) -> Any:
    """A transformers model with random weights, in fp32."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns that its own PyTorch path is slow: that is compared
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**fields(kind, sizes), **options})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()


def details(what: str, kind: str, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """The keys by which a row is found again."""
    shape = {"n_layers": sizes.n_layers, "d_model": sizes.d_model, "dtype": "float32"}
    return {"what": what, "model": kind, **shape, **more}


def same_output(calls: Calls, expected: Tensor) -> None:
    """``agree`` within 1e-4 of the largest expected number: logits of random weights are small."""
    agree(calls, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def agree_in_step(steps: Calls) -> None:
    """``same_output`` for calls of which each changes its own cache: every one is called once."""
    ours = steps["kvlearn"]()
    same_output({name: step for name, step in steps.items() if name != "kvlearn"}, ours)


# Decode over a cache of keys and values


@torch.inference_mode()
def attention_rows(kind: str, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Steps at the end of a long context, beside transformers with each of its caches."""
    theirs = build(kind, sizes, device)
    ours = from_transformers(theirs)
    for batch in sizes.batches:
        steps = attention_steps(ours, theirs, sizes, batch)
        agree_in_step(steps)
        compared = compare(steps, rounds=sizes.rounds, calls=sizes.steps)
        title = f"{kind}, batch {batch}, {sizes.context} tokens"
        found = details("decode_time", kind, sizes, batch=batch, context=sizes.context)
        for name in steps:
            yield time_row(compared, title, name, found)
        found["what"] = "decode_ratio"
        for base, bar in (("StaticCache", STATIC_BAR), ("DynamicCache", DYNAMIC_BAR)):
            yield ratio_row(compared, title, base, "kvlearn", found, bar)


def attention_steps(ours: Decoder, theirs: Any, sizes: Sizes, batch: int) -> Calls:
    """One token per call, after a context whose keys and values are random and the same in all caches."""
    from transformers import DynamicCache, StaticCache

    max_len, device = sizes.context + sizes.room + 1, ours.embed.weight.device
    cache = ours.new_cache(batch, max_len)
    static = StaticCache(config=theirs.config, max_cache_len=max_len)
    dynamic = DynamicCache(config=theirs.config)
    head_dim = sizes.d_model // sizes.n_heads
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, KVCache | RingCache)
        k, v = torch.randn(2, batch, sizes.n_kv_heads, sizes.context - 1, head_dim, device=device)
        layer.append(k, v)
        static.update(k, v, i)
        dynamic.update(k, v, i)
    tokens = torch.randint(0, sizes.vocab_size, (batch, 1), device=device)
    return {
        "kvlearn": partial(ours, tokens, cache),
        "StaticCache": lambda: theirs(tokens, past_key_values=static).logits,
        "DynamicCache": lambda: theirs(tokens, past_key_values=dynamic).logits,
    }


# Models with a state


@torch.inference_mode()
def state_rows(kind: str, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Steps after a prompt, and the prompt itself, beside transformers' own PyTorch path."""
    theirs = build(kind, sizes, device)
    ours = from_transformers(theirs)
    for batch in sizes.batches:
        steps = state_steps(ours, theirs, sizes, batch)
        agree_in_step(steps)
        compared = compare(steps, rounds=sizes.rounds, calls=sizes.steps)
        title, found = f"{kind}, batch {batch}", details("decode_time", kind, sizes, batch=batch)
        for name in steps:
            yield time_row(compared, title, name, found)
        found["what"] = "decode_ratio"
        yield ratio_row(compared, title, "transformers", "kvlearn", found, STATE_BAR)
    tokens = torch.randint(0, sizes.vocab_size, (1, sizes.prompt), device=device)
    passes: Calls = {
        "kvlearn": partial(ours, tokens),
        "transformers": lambda: theirs(tokens, use_cache=False).logits,
    }
    same_output(passes, passes["kvlearn"]())
    compared = compare(passes, rounds=max(2, sizes.rounds // 3), calls=1)
    title = f"{kind}, {sizes.prompt} tokens at once"
    found = details("prefill_ratio", kind, sizes, batch=1, context=sizes.prompt)
    yield ratio_row(compared, title, "transformers", "kvlearn", found)


def state_steps(ours: Decoder, theirs: Any, sizes: Sizes, batch: int) -> Calls:
    """One token per call, after the same prompt."""
    device = ours.embed.weight.device
    prompt = torch.randint(0, sizes.vocab_size, (batch, sizes.prompt), device=device)
    cache = ours.new_cache(batch, sizes.prompt + sizes.room)
    ours(prompt, cache)
    output = theirs(prompt, use_cache=True)
    argument = "past_key_values" if "past_key_values" in output else "cache_params"
    state, tokens = {argument: output[argument]}, prompt[:, :1]
    return {
        "kvlearn": partial(ours, tokens, cache),
        "transformers": lambda: theirs(tokens, use_cache=True, **state).logits,
    }


# Mixture of experts


@torch.inference_mode()
def mixture_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The feed-forward of one Mixtral layer alone: a step per batch, and a prompt."""
    theirs = build("mixtral", sizes, device, num_hidden_layers=1)
    ours: Any = from_transformers(theirs)
    moe, their_moe = ours.blocks[0].mlp, theirs.model.layers[0].mlp
    for batch, time in (*((batch, 1) for batch in sizes.batches), (1, sizes.prompt)):
        x = torch.randn(batch, time, sizes.d_model, device=device)
        calls: Calls = {
            "kvlearn": partial(moe, x),
            "transformers": partial(their_moe, x),
        }
        same_output(calls, calls["kvlearn"]())
        compared = compare(calls, rounds=sizes.rounds, calls=sizes.steps)
        title = f"mixture of {sizes.n_experts} experts, {batch} x {time}"
        found = details("mixture_ratio", "mixtral", sizes, batch=batch, context=time)
        yield ratio_row(compared, title, "kvlearn", "transformers", found, MOE_BAR, "<=")


# Loading


def loading_rows(sizes: Sizes) -> Iterator[Row]:
    """A checkpoint written to a temporary folder, loaded, and every weight read once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build("llama", sizes, torch.device("cpu")).save_pretrained(folder)
        nbytes = (folder / "model.safetensors").stat().st_size
        title = f"loading {nbytes / 1e6:.0f} MB"
        found = details("load_time", "llama", sizes, nbytes=nbytes)
        compared = compare({"kvlearn": partial(load_and_read, folder)}, rounds=5, calls=1)
        yield time_row(compared, title, "kvlearn", found, LOAD_SECONDS)
        share = peak_memory(partial(from_transformers, folder)) / nbytes
        found = {**found, "what": "load_memory"}
        yield Row(f"{title}: peak memory / checkpoint", share, "x", COPIES, "<=", details=found)


def load_and_read(folder: Path) -> float:
    """Load a folder. Weights are views of the file, which is read when they are: so each is summed."""
    with torch.no_grad():
        return sum(float(weight.sum()) for weight in from_transformers(folder).parameters())
