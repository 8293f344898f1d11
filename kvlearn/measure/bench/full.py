"""Full attention, one layer in fp32: what its cache saves, and how close it comes to the roofline."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kvlearn.attention import FullAttention
from kvlearn.measure.bench import Row
from kvlearn.measure.roofline import measure_roofline, read_stream, square_product
from kvlearn.measure.steps import last_token, next_token
from kvlearn.measure.timing import compare
from kvlearn.measure.work import attention_layer_work

D_MODEL, N_HEADS, HEAD_DIM = 1024, 16, 64
LENGTHS = (256, 512, 1024, 2048)
PROMPT = 2048
LONG = 8192  # decode against the bandwidth: a cache far larger than the processor's own


@torch.inference_mode()
def run(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    layer = FullAttention(D_MODEL, N_HEADS).to(device).eval()
    yield from cache_size(layer)
    yield from cached_or_recomputed(layer, device)
    yield from decode_on_the_roofline(layer, device)
    yield from prefill_on_the_roofline(layer, device)


def cache_size(layer: FullAttention) -> Iterator[Row]:
    """Bytes allocated, against 2 · B · H · N · D · bytes per number."""
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        batch, length = 2, 2048
        formula = 2 * batch * N_HEADS * length * HEAD_DIM * itemsize
        cache = layer.new_cache(batch=batch, max_len=length, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        details = {"what": "cache_bytes", "batch": batch, "length": length, "dtype": name}
        yield Row(f"cache {batch} x {length}, {name}", cache.nbytes, "B", formula, "==", details=details)


def cached_or_recomputed(layer: FullAttention, device: torch.device) -> Iterator[Row]:
    """One more token, with the cache and without; the same answer in both cases."""
    for length in LENGTHS:
        x = torch.randn(1, length, D_MODEL, device=device)
        cache = layer.new_cache(batch=1, max_len=length)
        layer(x[:, :-1], cache)
        step = next_token(layer, x[:, -1:], cache)
        torch.testing.assert_close(step(), layer(x)[:, -1:], rtol=1e-3, atol=1e-4)
        by_turns = compare({"cached": step, "recomputed": partial(layer, x)}, rounds=5)
        for way in ("cached", "recomputed"):
            time = by_turns.time(way)
            details = {"what": way, "length": length, "batch": 1}
            yield Row(f"token {length}, {way}", time.median, "s", spread=time, details=details)
        ratio = by_turns.ratio("recomputed", "cached")
        yield Row(
            f"token {length}, speed-up",
            ratio.median,
            "x",
            bar=10 if length == 2048 else None,
            spread=ratio,
            details={"what": "speedup", "length": length, "batch": 1},
        )


def decode_on_the_roofline(layer: FullAttention, device: torch.device) -> Iterator[Row]:
    """One step at the end of a long cache, by turns with a stream that only reads: who moves more bytes/s?"""
    batch = 4 if device.type == "cpu" else 64
    step = last_token(layer, batch, LONG)
    stream, streamed = read_stream(device)
    by_turns = compare({"decode": step, "stream": stream})
    work = attention_layer_work(D_MODEL, N_HEADS, N_HEADS, HEAD_DIM, new=1, cached=LONG - 1, batch=batch)
    time, share = by_turns.time("decode"), by_turns.ratio("stream", "decode").scaled(work.nbytes / streamed)
    floor = measure_roofline(device).floor(work)

    def row(what: str, title: str, measured: float, unit: str, **bar: Any) -> Row:
        details = {"what": f"decode_{what}", "length": LONG, "batch": batch}
        return Row(f"decode: {title}", measured, unit, details=details, **bar)

    yield row("time", f"{batch} x {LONG} tokens", time.median, "s", spread=time)
    yield row("intensity", "FLOPs per byte", work.intensity, "FLOP/B")
    yield row("bandwidth", "bytes per second", work.nbytes / time.median, "B/s")
    yield row("share", "share of bandwidth", share.median, "x", spread=share, bar=0.5)
    yield row("over_floor", "time / floor", time.median / floor, "x", bar=3, relation="<=")


def prefill_on_the_roofline(layer: FullAttention, device: torch.device) -> Iterator[Row]:
    """A prompt in one pass, by turns with a plain matrix product: who does more FLOP/s?"""
    cache = layer.new_cache(batch=1, max_len=PROMPT)
    prompt = next_token(layer, torch.randn(1, PROMPT, D_MODEL, device=device), cache)
    product, multiplied = square_product(2048 if device.type == "cpu" else 8192, device)
    by_turns = compare({"prefill": prompt, "product": product})
    work = attention_layer_work(D_MODEL, N_HEADS, N_HEADS, HEAD_DIM, new=PROMPT)
    time, share = (
        by_turns.time("prefill"),
        by_turns.ratio("product", "prefill").scaled(work.flops / multiplied),
    )

    def row(what: str, title: str, measured: float, unit: str, **bar: Any) -> Row:
        details = {"what": f"prefill_{what}", "length": PROMPT, "batch": 1}
        return Row(f"prefill: {title}", measured, unit, details=details, **bar)

    yield row("time", f"{PROMPT} tokens", time.median, "s", spread=time)
    yield row("rate", "tokens per second", PROMPT / time.median, "tokens/s")
    yield row("intensity", "FLOPs per byte", work.intensity, "FLOP/B")
    yield row("flops", "FLOPs per second", work.flops / time.median, "FLOP/s")
    yield row("share", "share of matmul peak", share.median, "x", spread=share, bar=0.5)
