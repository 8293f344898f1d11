"""Full attention, one layer in fp32: what its cache saves, and how close it comes to the roofline."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvlearn.attention import FullAttention
from kvlearn.bench.common import Part, agree
from kvlearn.measure.results import Row
from kvlearn.measure.roofline import measure_roofline, read_stream, square_product
from kvlearn.measure.steps import last_token, next_token
from kvlearn.measure.timing import compare
from kvlearn.measure.work import attention_layer_work

SPEEDUP, AT = 10, 2048  # how many times as fast a cached token must be, behind so many tokens
SHARE = 0.5  # of the bandwidth in decode, of the matrix product's FLOP/s in prefill, at least
OVER_FLOOR = 3  # times the least time that the roofline allows, at most


@dataclass(frozen=True)
class Sizes:
    """The layer, and the lengths at which it is measured."""

    d_model: int = 1024
    n_heads: int = 16
    lengths: tuple[int, ...] = (256, 512, 1024, AT)
    prompt: int = 2048
    long: int = 8192  # decode against the bandwidth: a cache far larger than the processor's own

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.d_model // self.n_heads


SIZES = Sizes()
SMALL = Sizes(d_model=64, n_heads=4, lengths=(4, 8), prompt=16, long=32)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark, on ``device``."""
    sizes = SMALL if small else SIZES
    return [
        Part("cache", lambda: cache_rows(sizes, device)),
        Part("cached or recomputed", lambda: step_rows(sizes, device)),
        Part("decode roofline", lambda: decode_rows(sizes, device)),
        Part("prefill roofline", lambda: prefill_rows(sizes, device)),
    ]


def new_layer(sizes: Sizes, device: torch.device) -> FullAttention:
    """A layer for inference."""
    with device:
        return FullAttention(sizes.d_model, sizes.n_heads).eval()


@torch.inference_mode()
def cache_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Bytes allocated, against 2 · B · H · N · D · bytes per number."""
    layer = new_layer(sizes, device)
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        batch, length = 2, sizes.prompt
        formula = 2 * batch * sizes.n_heads * length * sizes.head_dim * itemsize
        cache = layer.new_cache(batch=batch, max_len=length, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        details = {"what": "cache_bytes", "batch": batch, "length": length, "dtype": name}
        yield Row(f"cache {batch} x {length}, {name}", cache.nbytes, "B", formula, "==", details=details)


@torch.inference_mode()
def step_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One more token, with the cache and without; the same answer in both cases."""
    layer = new_layer(sizes, device)
    for length in sizes.lengths:
        x = torch.randn(1, length, sizes.d_model, device=device)
        cache = layer.new_cache(batch=1, max_len=length)
        layer(x[:, :-1], cache)
        step = next_token(layer, x[:, -1:], cache)
        agree({"cached": step}, layer(x)[:, -1:])
        compared = compare({"cached": step, "recomputed": partial(layer, x)}, rounds=5)
        details = {"length": length, "batch": 1}
        for name in ("cached", "recomputed"):
            time = compared.time(name)
            found = {"what": name, **details}
            yield Row(f"token {length}, {name}", time.median, "s", spread=time, details=found)
        ratio, bar = compared.ratio("recomputed", "cached"), SPEEDUP if length == AT else None
        found = {"what": "speedup", **details}
        yield Row(f"token {length}, speed-up", ratio.median, "x", bar, spread=ratio, details=found)


@torch.inference_mode()
def decode_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One step at the end of a long cache, interleaved with a stream that only reads: bytes per second."""
    batch = 4 if device.type == "cpu" else 64
    step = last_token(new_layer(sizes, device), batch, sizes.long)
    stream, streamed = read_stream(device)
    compared = compare({"decode": step, "stream": stream})
    shape = (sizes.d_model, sizes.n_heads, sizes.n_heads, sizes.head_dim)
    work = attention_layer_work(*shape, new=1, cached=sizes.long - 1, batch=batch)
    time = compared.time("decode")
    share = compared.ratio("stream", "decode").scaled(work.nbytes / streamed)
    floor = measure_roofline(device).floor(work)

    def row(what: str, title: str, measured: float, unit: str, **bar: Any) -> Row:
        details = {"what": f"decode_{what}", "length": sizes.long, "batch": batch}
        return Row(f"decode: {title}", measured, unit, details=details, **bar)

    yield row("time", f"{batch} x {sizes.long} tokens", time.median, "s", spread=time)
    yield row("intensity", "FLOPs per byte", work.intensity, "FLOP/B")
    yield row("bandwidth", "bytes per second", work.nbytes / time.median, "B/s")
    yield row("share", "share of bandwidth", share.median, "x", spread=share, bar=SHARE)
    yield row("over_floor", "time / floor", time.median / floor, "x", bar=OVER_FLOOR, relation="<=")


@torch.inference_mode()
def prefill_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A prompt in one pass, interleaved with a plain matrix product: FLOPs per second."""
    layer = new_layer(sizes, device)
    cache = layer.new_cache(batch=1, max_len=sizes.prompt)
    prompt = next_token(layer, torch.randn(1, sizes.prompt, sizes.d_model, device=device), cache)
    product, multiplied = square_product(2048 if device.type == "cpu" else 8192, device)
    compared = compare({"prefill": prompt, "product": product})
    work = attention_layer_work(sizes.d_model, sizes.n_heads, sizes.n_heads, sizes.head_dim, new=sizes.prompt)
    time = compared.time("prefill")
    share = compared.ratio("product", "prefill").scaled(work.flops / multiplied)

    def row(what: str, title: str, measured: float, unit: str, **bar: Any) -> Row:
        details = {"what": f"prefill_{what}", "length": sizes.prompt, "batch": 1}
        return Row(f"prefill: {title}", measured, unit, details=details, **bar)

    yield row("time", f"{sizes.prompt} tokens", time.median, "s", spread=time)
    yield row("rate", "tokens per second", sizes.prompt / time.median, "tokens/s")
    yield row("intensity", "FLOPs per byte", work.intensity, "FLOP/B")
    yield row("flops", "FLOPs per second", work.flops / time.median, "FLOP/s")
    yield row("share", "share of matmul peak", share.median, "x", spread=share, bar=SHARE)
