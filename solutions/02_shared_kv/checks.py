"""Unit 02: requirements and hints of the exercises on shared keys and values."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvlearn.attention import KVCache, Rope, RopeConfig
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Made,
    Stop,
    describe,
    new_tensors,
    plain_number,
)

# 02.1: query heads on common KV heads, compared with PyTorch's attention over repeated keys

attend = Exercise(
    id="02.1",
    slug="attend",
    title="Grouped attention without a copy",
    answers=("grouped_attention",),
    forbidden={F.scaled_dot_product_attention: "torch's scaled_dot_product_attention"},
    hints=(
        "H/G = R query heads belong to each pool, and they are neighbours: heads 0 … R−1 to pool 0. So "
        "`q.reshape(B, G, R, T, D)` puts every query head beside its pool, and nothing is moved.",
        "R heads of T queries each are R·T queries to the pool's keys. `q.reshape(B, G, R * T, D)` has "
        "the same number of dimensions as k, and one matrix product a pool does the rest.",
        "Cut the scores open again, (B, G, R·T, S) → (B, G, R, T, S), to lay the mask over them: (T, S) "
        "fits as it is, and (B, 1, T, S) needs one dimension more, `mask.unsqueeze(-3)`. That serves both.",
        "`q.reshape(B, G, R, T, D) @ k[:, :, None].transpose(-2, -1)` gives the right values, but `@` "
        "copies what it broadcasts: every key R times. Fold R into the rows, or let "
        '`torch.einsum("bgrtd,bgsd->bgrts", …)` do it.',
    ),
)

QKV = tuple[Tensor, Tensor, Tensor]


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SDPA in fp32, with every pool written down for each of its heads."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask).to(q.dtype)


def attend_draw(t: CheckContext, H: int, G: int, dtype: torch.dtype = torch.float32) -> QKV:
    """T, S and D differ from H, G and H/G, so that no confusion of dimensions goes unseen; T = 1 in the
    second round."""
    T = 1 if t.round == 1 else t.pick(4, 9)
    S, D = T + t.pick(7, 13), t.pick(16, 24)
    return (
        t.randn(2, H, T, D, dtype=dtype),
        t.randn(2, G, S, D, dtype=dtype),
        t.randn(2, G, S, D, dtype=dtype),
    )


@attend.requirement(1, "one pool for all heads (MQA), and a pool for each")
def attend_limits(t: CheckContext, grouped_attention: Answer) -> None:
    """softmax(q kᵀ / √D) v for G = 1 and for G = H, one output for each query: (B, H, T, D)"""
    H = t.pick(3, 5, 7)
    for G in (1, H):
        q, k, v = attend_draw(t, H, G)
        t.close(grouped_attention(q, k, v), attend_reference(q, k, v))


@attend.requirement(1, "pools of neighbouring heads (GQA)")
def pools(t: CheckContext, grouped_attention: Answer) -> None:
    """the same for every ratio: query head h reads pool h // (H/G)"""
    for G, size in ((3, 2), (2, t.pick(3, 5))):
        q, k, v = attend_draw(t, G * size, G)
        t.close(grouped_attention(q, k, v), attend_reference(q, k, v))


@attend.requirement(1, "with a mask")
def masked(t: CheckContext, grouped_attention: Answer) -> None:
    """over the keys where the mask is True; masks of shape (T, S) and (B, 1, T, S)"""
    q, k, v = attend_draw(t, t.pick(6, 10), 2)  # G = B: the masks of a batch laid over the pools would fit
    for lead in ((), (2, 1)):
        mask = t.mask(*lead, q.shape[2], k.shape[2])
        t.close(grouped_attention(q, k, v, mask), attend_reference(q, k, v, mask))


@attend.requirement(1, "half precision, and inputs left alone")
def half(t: CheckContext, grouped_attention: Answer) -> None:
    """bf16 and fp16 in, the same dtype out, right within its precision; q, k, v unchanged afterwards"""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = attend_draw(t, 6, 3, dtype)
        t.close(grouped_attention(q, k, v), attend_reference(q, k, v))
    t.unchanged()


@attend.requirement(2, "no copy of K and V for every query head")
def no_copy(t: CheckContext, grouped_attention: Answer) -> None:
    """no tensor of H·S·D numbers or more is made on the way"""
    G, size = t.pick((2, 3), (2, 4), (3, 2))
    H, T, S, D = G * size, t.integer(1, 3), t.integer(30, 40), 16
    # Queries of zeros give every key the same weight, and all pools hold the same values: whether the scores
    # and the pools are right is asked above and costs nothing here.
    q, k = torch.zeros(1, H, T, D), t.randn(1, G, S, D)
    v = t.randn(1, 1, S, D).repeat(1, G, 1, 1)
    with called() as copies, new_tensors() as made:
        copies.made = made
        got = grouped_attention(q, k, v)
    t.close(got, attend_reference(q, k, v))
    name, copy = copies.largest
    if copy.numel >= H * S * D:
        came = f"{name} made a tensor of shape {copy.shape}, H·S·D = {H}·{S}·{D} numbers"
        t.note(KINDS.get(name, name), Difference("", f"fewer than {H * S * D:,} numbers in any tensor", came))


KINDS = {
    **dict.fromkeys(("repeat", "repeat_interleave", "tile", "index_select", "cat", "stack"), "copied heads"),
    **dict.fromkeys(("__getitem__", "gather"), "copied heads"),
    **dict.fromkeys(("reshape", "contiguous", "clone", "flatten", "reshape_as"), "copied an expanded view"),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"), "copied by a product"),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), "products"),
}
"""How the large tensor was made, in as many words as the catalogue of mistakes knows."""


class Calls(TorchFunctionMode):
    """Puts the name of the call in the answer's code beside every tensor that it makes."""

    made: list[Made]
    largest: tuple[str, Made] = ("", Made((), ""))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.made)
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        for made in self.made[before:]:
            if made.numel > self.largest[1].numel:
                self.largest = name, made
        return result


@contextmanager
def called() -> Iterator[Calls]:
    with Calls() as calls:
        yield calls


# 02.2: bytes per token, stored and read, compared with five real models and a count layer by layer

size = Exercise(
    id="02.2",
    slug="size",
    title="Bytes per token of five real models",
    answers=("bytes_per_token",),
    hints=(
        "Go layer by layer: what does this layer keep of a token, and does it keep it itself? Add to "
        "`read` for every layer, and to `stored` only if the layer has a cache of its own.",
        "A layer keeps 2 · KV heads · head_dim numbers of 2 bytes. KV heads: `num_key_value_heads` where "
        "it is given; else 1 where `multi_query` is true; else as many as attention heads.",
        "`layer_types[i]` says what layer i is. A full_attention layer takes `global_head_dim` where the "
        "config has one, every other layer takes the ordinary head dim. The *last* num_kv_shared_layers "
        "store nothing.",
        "With `kv_lora_rank` none of the heads are stored: a layer keeps one vector of kv_lora_rank + "
        "qk_rope_head_dim numbers, from which keys and values are both made. No factor 2, no heads.",
    ),
)

Config = dict[str, Any]
Sizes = dict[str, int]


def model(layers: int, width: int, heads: int, **more: Any) -> Config:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, **more}


def size_pattern(layers: int, every: int) -> list[str]:
    """Every so many layers one with full attention, the others with a window."""
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


# From the models' config.json; Gemma 4 E2B and DeepSeek-V3 as in kvlearn/measure/models.py.
LLAMA_2 = model(32, 4096, 32, num_key_value_heads=32)
LLAMA_3_1 = model(32, 4096, 32, num_key_value_heads=8)
FALCON = model(32, 4544, 71, multi_query=True)
GEMMA_4 = model(
    35,
    1536,
    8,
    num_key_value_heads=1,
    head_dim=256,
    global_head_dim=512,
    layer_types=size_pattern(35, 5),
    num_kv_shared_layers=20,
)
DEEPSEEK_V3 = model(61, 7168, 128, num_key_value_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)


def size_layers(config: Config) -> list[tuple[bool, int]]:
    """For every layer whether it has a cache of its own, and the bytes it reads for each token."""
    heads: int = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", 1 if config.get("multi_query") else heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    n_layers: int = config["num_hidden_layers"]
    counted = []
    for i in range(n_layers):
        full = config.get("layer_types", [""] * n_layers)[i] == "full_attention"
        key = value = kv_heads * (config.get("global_head_dim", head_dim) if full else head_dim)
        numbers = key + value
        if "kv_lora_rank" in config:
            numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        counted.append((i < n_layers - config.get("num_kv_shared_layers", 0), 2 * numbers))
    return counted


def size_count(config: Config) -> Sizes:
    each = size_layers(config)
    return {"stored": sum(size for own, size in each if own), "read": sum(size for _, size in each)}


def size_same(t: CheckContext, bytes_per_token: Answer, config: Config, *names: str) -> None:
    got = bytes_per_token(config)
    for name in names:
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
        t.number(got[name], size_count(config)[name], name)


@size.requirement(1, "a KV head for every query head: Llama 2 7B")
def multi_head(t: CheckContext, bytes_per_token: Answer) -> None:
    """keys and values of all heads and layers; stored and read are equal; a multi_query that is false changes
    nothing"""
    heads, head_dim = t.pick(12, 20, 40), t.pick(64, 80, 96)
    drawn = model(t.integer(20, 60), heads * head_dim, heads)
    if t.round == 2:
        drawn["multi_query"] = False
    size_same(t, bytes_per_token, LLAMA_2 if t.round == 0 else drawn, "stored", "read")


@size.requirement(1, "pools of query heads: Llama 3.1 8B")
def grouped(t: CheckContext, bytes_per_token: Answer) -> None:
    """the KV heads count, not the query heads; head_dim where it is given"""
    G, head_dim = t.pick(2, 4, 8), t.pick(64, 96)
    heads = G * t.integer(2, 5)
    drawn = model(t.integer(20, 60), heads * head_dim, heads, num_key_value_heads=G)
    if t.round == 2:
        drawn["head_dim"] = 2 * head_dim
    size_same(t, bytes_per_token, LLAMA_3_1 if t.round == 0 else drawn, "stored", "read")


@size.requirement(1, "one KV head for all: Falcon 7B")
def multi_query(t: CheckContext, bytes_per_token: Answer) -> None:
    """a single key and a single value a layer where multi_query is true"""
    heads = t.pick(11, 23, 48)
    drawn = model(t.integer(20, 60), heads * 64, heads, multi_query=True)
    size_same(t, bytes_per_token, FALCON if t.round == 0 else drawn, "stored", "read")


def sharing(t: CheckContext) -> Config:
    """Gemma 4 E2B, or its like with layers that do not fall into whole periods."""
    if t.round == 0:
        return GEMMA_4
    every = t.pick(3, 4, 5)
    n_layers = every * t.integer(5, 7)
    shared = every * t.integer(2, 3) + t.integer(1, every - 2)
    dims = t.pick({"head_dim": 128, "global_head_dim": 256}, {"head_dim": 64, "global_head_dim": 192})
    more = {"layer_types": size_pattern(n_layers, every), "num_kv_shared_layers": shared, **dims}
    return model(n_layers, 1024, 8, num_key_value_heads=t.pick(1, 2), **more)


@size.requirement(1, "stored, where layers share: Gemma 4 E2B")
def shared_stored(t: CheckContext, bytes_per_token: Answer) -> None:
    """the layers with a cache of their own, each with the head dim of its type"""
    size_same(t, bytes_per_token, sharing(t), "stored")


@size.requirement(1, "read, where layers share: Gemma 4 E2B")
def shared_read(t: CheckContext, bytes_per_token: Answer) -> None:
    """all layers, since a layer without a cache of its own reads another's"""
    size_same(t, bytes_per_token, sharing(t), "read")


@size.requirement(1, "a latent vector: DeepSeek-V3")
def latent(t: CheckContext, bytes_per_token: Answer) -> None:
    """one vector of kv_lora_rank + qk_rope_head_dim numbers per layer, for keys and values together"""
    heads, ranks = t.pick(16, 40), {"kv_lora_rank": t.pick(256, 384), "qk_rope_head_dim": t.pick(32, 64)}
    drawn = model(t.integer(20, 60), 128 * heads, heads, num_key_value_heads=heads, **ranks)
    size_same(t, bytes_per_token, DEEPSEEK_V3 if t.round == 0 else drawn, "stored", "read")


# 02.3: a trained projection's heads averaged into pools, compared with a loop over pools in fp64

pool = Exercise(
    id="02.3",
    slug="pool",
    title="Pool a trained model's heads",
    answers=("pool_heads",),
    hints=(
        "D = weight.shape[0] // n_heads. The rows of head h are h·D to (h+1)·D − 1: nn.Linear keeps its "
        "weight as (outputs, inputs), and the outputs come head by head.",
        "Give the heads a dimension of their own: `weight.view(n_heads, D, -1)`. Then row d of each head "
        "has the same index, and the average is taken over the heads.",
        "R = n_heads // n_kv_heads neighbours make a pool: `weight.view(n_kv_heads, R, D, -1)`, pools in "
        "front. Average over the R.",
        "`.mean(dim=1)` gives (G, D, M); `.flatten(0, 1)` makes a weight of it again. Check `n_heads % "
        "n_kv_heads` first, and raise ValueError where it is not 0.",
    ),
)


def pool_reference(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Pool by pool, row by row."""
    D, R = len(weight) // n_heads, n_heads // n_kv_heads
    rows = [
        torch.stack([weight[h * D + d].double() for h in range(pool * R, (pool + 1) * R)]).mean(0)
        for pool in range(n_kv_heads)
        for d in range(D)
    ]
    return torch.stack(rows).to(weight.dtype)


def pool_draw(t: CheckContext, n_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(H·D, M), M a multiple of H, so that a confusion of rows and columns goes through and can be named."""
    return t.randn(n_heads * t.pick(5, 7), n_heads * t.pick(4, 9), dtype=dtype)


def ratio(t: CheckContext) -> tuple[int, int]:
    """H and G; no two of H, G and H/G are equal, and none is 1."""
    return t.pick(
        *(((6, 2), (6, 3), (12, 4)), ((10, 2), (15, 5), (8, 2)), ((12, 3), (10, 5), (14, 2)))[t.round]
    )


@pool.requirement(1, "the form")
def pool_form(t: CheckContext, pool_heads: Answer) -> None:
    """a weight for G heads, (G·D, M), in the dtype of the one that was given"""
    H, G = ratio(t)
    weight = pool_draw(t, H, (torch.float32, torch.bfloat16, torch.float16)[t.round])
    t.form(pool_heads(weight, H, G), (len(weight) // H * G, weight.shape[1]), weight.dtype)


@pool.requirement(2, "the values")
def pool_values(t: CheckContext, pool_heads: Answer) -> None:
    """head g of the result is the mean of the heads g·R … (g+1)·R − 1, R = H/G"""
    H, G = ratio(t)
    weight = pool_draw(t, H)
    t.close(pool_heads(weight, H, G), pool_reference(weight, H, G))


@pool.requirement(1, "the limits, and the weight left alone")
def pool_limits(t: CheckContext, pool_heads: Answer) -> None:
    """G = H gives the weight as it is, G = 1 the mean of all heads; the trained weight is unchanged"""
    H = t.pick(3, 5, 6)
    weight = pool_draw(t, H)
    for G in (H, 1):
        t.close(pool_heads(weight, H, G), pool_reference(weight, H, G))
    t.unchanged()


@pool.requirement(1, "heads that do not divide")
def indivisible(t: CheckContext, pool_heads: Answer) -> None:
    """ValueError where n_kv_heads does not divide n_heads; the answer works where it does"""
    H, G = t.pick((6, 4), (7, 2), (10, 3), (4, 8))
    weight = pool_draw(t, H)
    one = pool_heads(weight, H, 1)  # to be told from an answer that raises, or returns nothing, always
    if t.true(isinstance(one, Tensor), f"a tensor for {H} heads and 1 pool", describe(one)):
        t.raises(ValueError, lambda: pool_heads(weight, H, G), f"for {H} heads and {G} pools")


# 02.4: learned routing made hard, compared with a loop over heads in plain Python

route = Exercise(
    id="02.4",
    slug="route",
    title="Harden a learned routing",
    answers=("harden", "keep_pools"),
    hints=(
        "Each row of `logits` belongs to one head. Its hard choice is the pool with the largest logit, "
        "`logits.argmax(dim=1)`; a softmax, at whatever temperature, would not change which one is "
        "largest.",
        "`torch.unique` gives the pools that occur in these choices, once each and in ascending order: "
        "that is `kept`.",
        "The choices are numbers of the old pools, and what stays is an array of U. "
        "`torch.unique(choices, return_inverse=True)` gives besides where each choice is in `kept`: "
        "that is `route`.",
        "A pool's rows in the weight are a block of D = head_dim. Give the pools a dimension of their "
        "own, `weight.unflatten(0, (-1, head_dim))`, take `[kept]`, and flatten again.",
    ),
)

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def route_reference(logits: Tensor) -> tuple[list[int], list[int]]:
    """The pool that each head chooses, and the pools that are chosen at all."""
    chosen = [row.index(max(row)) for row in logits.tolist()]
    return chosen, sorted(set(chosen))


def indices(got: Any, what: str, t: CheckContext) -> list[int]:
    """A list or a tensor of whole numbers as a list, or the end of this round."""
    if isinstance(got, Tensor) and got.ndim == 1 and got.dtype in INTEGERS:
        return [int(i) for i in got]
    if isinstance(got, list | tuple) and all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in got
    ):
        return [int(i) for i in got]
    came = describe(got)
    t.true(False, f"{what}: whole numbers, of one dimension", came)
    raise Stop


def both(t: CheckContext, got: Any) -> tuple[Any, Any]:
    if isinstance(got, tuple | list) and len(got) == 2:
        return got[0], got[1]
    t.true(False, "the pair (route, kept)", describe(got))
    raise Stop


def logits_of(t: CheckContext, chosen: list[int], G: int) -> Tensor:
    """Logits of all signs whose largest of each row is the chosen pool's."""
    logits = t.randn(len(chosen), G)
    best = logits.amax(1) + 0.1 + torch.rand(len(chosen), generator=t.generator)
    return logits.scatter(1, torch.tensor(chosen)[:, None], best[:, None])


def some(t: CheckContext, pools: list[int], H: int) -> list[int]:
    """H choices among these pools: all of them, the lowest once only, and not by the first head."""
    chosen = pools + [t.pick(*pools[1:]) for _ in range(H - len(pools))]
    while chosen[0] == pools[0]:
        t.random.shuffle(chosen)
    return chosen


def used(t: CheckContext, G: int) -> list[int]:
    """Three of the G pools, or four; neither the first nor the last ones of all."""
    pools = sorted(t.random.sample(range(1, G), t.integer(3, 4)))
    return pools if pools != list(range(1, len(pools) + 1)) else [*pools[:-1], G - 1]


def same_route(t: CheckContext, harden: Answer, logits: Tensor) -> None:
    """``kept`` holds the pools that are chosen, and ``route`` leads each head to its own; the order of
    ``kept`` is asked for elsewhere."""
    chosen, pools = route_reference(logits)
    route, kept = both(t, harden(logits))
    kept, route = indices(kept, "kept", t), indices(route, "route", t)
    t.close(torch.tensor(sorted(kept)), torch.tensor(pools), "the pools kept:")
    inside = all(0 <= i < len(kept) for i in route)
    if t.true(
        inside, "route: places in kept, 0 … U−1", f"route: places 0 … {max(route, default=0)} of {len(kept)}"
    ):
        t.close(torch.tensor([kept[i] for i in route]), torch.tensor(chosen), "kept[route]:")


@route.requirement(1, "every pool is chosen by a head")
def all_used(t: CheckContext, harden: Answer, keep_pools: Answer) -> None:
    """all pools are kept, and each head goes to the pool of its largest logit"""
    G = t.integer(3, 5)
    same_route(t, harden, logits_of(t, some(t, list(range(G)), G + t.integer(2, 5)), G))


@route.requirement(2, "pools that no head chooses")
def unused(t: CheckContext, harden: Answer, keep_pools: Answer) -> None:
    """only the pools that are chosen are kept; route counts 0 … U−1 among those"""
    G = t.integer(7, 9)
    pools = used(t, G)
    chosen = some(t, pools, t.pick(6, 10, 11))
    logits = logits_of(t, chosen, G)
    # One head's choice that the others are far from: by the sum of their softmax it would not be kept.
    logits[:, pools[0]] -= 8.0 * (torch.tensor(chosen) != pools[0])
    same_route(t, harden, logits)


@route.requirement(1, "ties, and the order")
def ties(t: CheckContext, harden: Answer, keep_pools: Answer) -> None:
    """of equal largest logits the lowest pool; kept ascends; both are int64 tensors; logits unchanged"""
    G, H = 6, t.pick(7, 8)
    rest = [0] + [2] * (H - 2)
    t.random.shuffle(rest)
    logits = logits_of(t, [3, *rest], G)  # by number 0 comes first, by popularity 2, by the heads' order 3
    logits[:, 4:] = logits.amax(1, keepdim=True)
    logits = logits.to(t.pick(torch.float32, torch.bfloat16))
    if t.round == 1:
        logits = torch.zeros(H, G)
    chosen, pools = route_reference(logits)
    route, kept = both(t, harden(logits))
    t.close(kept, torch.tensor(pools), "kept:")
    t.close(route, torch.tensor([pools.index(pool) for pool in chosen]), "route:")
    t.unchanged()


@route.requirement(1, "keep_pools: the smaller projection")
def smaller(t: CheckContext, harden: Answer, keep_pools: Answer) -> None:
    """the rows of the kept pools, (U·D, M), in the order of kept; the weight itself is unchanged"""
    D, G = t.pick(4, 5), t.pick(8, 9)
    kept = used(t, G)
    weight = t.randn(G * D, t.pick(11, 13))
    want = torch.cat([weight[pool * D : (pool + 1) * D] for pool in kept])
    t.close(keep_pools(weight, torch.tensor(kept), D), want, tolerance=0.0)
    t.unchanged()


# 02.5: which layer's keys and values each layer reads, compared with the papers' rules spelt out

layers = Exercise(
    id="02.5",
    slug="layers",
    title="Which layer reads whose cache",
    answers=("cla_owners", "gemma_owners"),
    hints=(
        "Groups of `every` layers: layer i belongs to group i // every, and that group begins at layer (i "
        "// every) · every.",
        "Gemma: n_own = len(layer_types) − n_shared layers store, the first ones, and each of them is its "
        "own owner. Count n_own like this: a slice up to −n_shared is empty where n_shared is 0.",
        "A layer that shares looks among layers 0 … n_own − 1 only, for those of its own type, and takes "
        "the last. The layers that share are no candidates: they have nothing to be read.",
        "`max(i for i in range(n_own) if layer_types[i] == kind)` is that layer, and `max` of nothing "
        "raises ValueError all by itself. Better is one that says which type has no cache.",
    ),
)

FULL, WINDOW = "full_attention", "sliding_attention"


def cla(n_layers: int, every: int) -> list[int]:
    """Layer by layer: a new group begins after every so many."""
    owners: list[int] = []
    owner = 0
    for i in range(n_layers):
        if i - owner == every:
            owner = i
        owners.append(owner)
    return owners


def gemma(layer_types: list[str], n_shared: int) -> list[int]:
    """Layer by layer, remembering the last layer of each type that stored."""
    last: dict[str, int] = {}
    owners = []
    for i, kind in enumerate(layer_types):
        if i < len(layer_types) - n_shared:
            last[kind] = i
        owners.append(last[kind])
    return owners


def layers_same(t: CheckContext, got: Any, want: list[int]) -> None:
    """A list, tuple or tensor of whole numbers."""
    if isinstance(got, Tensor) and got.ndim == 1 and not got.is_floating_point():
        got = got.tolist()
    if not isinstance(got, list | tuple) or not all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in got
    ):
        t.true(False, "a list of whole numbers, one per layer", describe(got))
        raise Stop
    t.close(torch.tensor([int(i) for i in got], dtype=torch.int64), torch.tensor(want), "the owners:")


def layers_pattern(t: CheckContext, n_layers: int) -> list[str]:
    """Every third to fifth layer is full, counted from anywhere."""
    every = t.integer(3, 5)
    start = t.integer(0, every - 1)
    return [FULL if (i + start) % every == 0 else WINDOW for i in range(n_layers)]


@layers.requirement(1, "CLA: whole groups")
def whole_groups(t: CheckContext, cla_owners: Answer, gemma_owners: Answer) -> None:
    """the first layer of every group of `every` stores, and the others of the group read it"""
    every = t.integer(3, 5)
    n_layers = every * t.pick(*(n for n in (2, 3, 4, 6, 7) if n != every))
    layers_same(t, cla_owners(n_layers, every), cla(n_layers, every))


@layers.requirement(1, "CLA: a rest, and the limits")
def rest(t: CheckContext, cla_owners: Answer, gemma_owners: Answer) -> None:
    """the last group may be smaller; every = 1 shares nothing, and a group may be larger than the model"""
    every = t.integer(3, 5)
    n_layers = every * t.integer(2, 4) + t.integer(1, every - 1)
    for size in (every, 1, n_layers + 2):
        layers_same(t, cla_owners(n_layers, size), cla(n_layers, size))


@layers.requirement(1, "Gemma: one type of layer, or nothing shared")
def one_type(t: CheckContext, cla_owners: Answer, gemma_owners: Answer) -> None:
    """with n_shared = 0 each layer is its own owner; with one type all that share read the last that
    stores"""
    n_layers = t.integer(8, 12)
    kinds = [FULL] * n_layers
    n_shared = t.integer(2, n_layers // 2 - 1)
    layers_same(t, gemma_owners(kinds, n_shared), gemma(kinds, n_shared))
    mixed = layers_pattern(t, n_layers)
    layers_same(t, gemma_owners(mixed, 0), gemma(mixed, 0))


@layers.requirement(2, "Gemma: two types of layers")
def two_types(t: CheckContext, cla_owners: Answer, gemma_owners: Answer) -> None:
    """a layer that shares reads the last layer *of its own type* that stores"""
    kinds = layers_pattern(t, t.integer(16, 20))
    if t.round == 0:
        kinds = [FULL if (i + 1) % 5 == 0 else WINDOW for i in range(35)]
    # As many as leave both types at least two layers that store, and share a few of each.
    n_shared = 20 if t.round == 0 else t.pick(*(n for n in range(5, 8) if n != len(kinds) / 2))
    layers_same(t, gemma_owners(kinds, n_shared), gemma(kinds, n_shared))


@layers.requirement(1, "Gemma: nobody to read from")
def nobody(t: CheckContext, cla_owners: Answer, gemma_owners: Answer) -> None:
    """ValueError where a layer is to share and no layer of its type stores"""
    n_layers = t.integer(6, 9)
    kinds = [WINDOW] * n_layers
    layers_same(t, gemma_owners(kinds, 2), gemma(kinds, 2))
    kinds[t.integer(n_layers - 3, n_layers - 1)] = FULL
    t.raises(ValueError, lambda: gemma_owners(kinds, 3), "for a type that only layers that share have")


# 02.6: how many KV heads fit into a budget, compared with a count head by head

budget = Exercise(
    id="02.6",
    slug="budget",
    title="How many KV heads fit",
    answers=("kv_heads_for_budget",),
    hints=(
        "First the price of *one* KV head: 2 · layers · head_dim · bytes per number, for max_len tokens in "
        "each of `batch` sequences. The cache of g heads costs g times that.",
        "Only divisors of num_attention_heads are possible: `[g for g in range(1, H + 1) if H % g == 0]`, "
        "H itself included.",
        "The budget is in GiB: budget_gib · 2**30 bytes. A cache that takes exactly as much does fit: `<=`.",
        "`max(fitting, default=None)` is the largest of those that fit, and None where there are none.",
    ),
)


BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
DIVISIBLE = (8, 16, 32, 64)
ODD = (12, 20, 24, 28, 40, 56)


def head_bytes(config: Config, batch: int, max_len: int) -> int:
    """Bytes of the cache for each KV head."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    key = value = head_dim * BYTES[config["torch_dtype"]]
    return sum((key + value) * max_len * batch for _layer in range(config["num_hidden_layers"]))


def divisors(n: int) -> list[int]:
    return [g for g in range(1, n + 1) if n % g == 0]


def budget_draw(t: CheckContext, heads: int, **more: Any) -> tuple[Config, int, int]:
    """A model, a batch and a length."""
    config = {"num_hidden_layers": t.pick(24, 32, 48), "hidden_size": heads * t.pick(64, 128)}
    config |= {"num_attention_heads": heads, "torch_dtype": "bfloat16", **more}
    return config, t.pick(3, 4, 8, 24), t.pick(4096, 8192, 32768)


def budget_same(
    t: CheckContext, kv_heads_for_budget: Answer, model: tuple[Config, int, int], budget: float
) -> None:
    """``budget`` in units of what one KV head costs."""
    config, batch, max_len = model
    got = kv_heads_for_budget(config, budget * head_bytes(config, batch, max_len) / 2**30, batch, max_len)
    want = max((g for g in divisors(config["num_attention_heads"]) if g <= budget), default=None)
    plain = plain_number(got)
    good = got is None if want is None else plain == want
    came = "None" if got is None else describe(got)
    # None is noted as 0.0, since many mistakes give it; the number 0 is an integer, and so told apart.
    value = 0.0 if got is None else came if plain is None else plain
    t.note(value, None if good else Difference("", str(want), came))


def between(t: CheckContext, heads: int, *, not_powers: bool = False) -> float:
    """A budget that lies between two divisors, by so much that GB and GiB give the same; the lower one is no
    power of two where that is asked for."""
    pairs = list(itertools.pairwise(divisors(heads)))
    low, high = t.pick(*(pair for pair in pairs if not not_powers or pair[0] & (pair[0] - 1)))
    return t.random.uniform(max(1.1 * low, 0.7 * low + 0.3 * high), 0.1 * low + 0.9 * high)


@budget.requirement(1, "head counts that are powers of two")
def powers(t: CheckContext, kv_heads_for_budget: Answer) -> None:
    """the largest divisor of num_attention_heads whose cache fits"""
    for _ in range(3):
        heads = t.pick(*DIVISIBLE)
        budget_same(t, kv_heads_for_budget, budget_draw(t, heads), between(t, heads))


@budget.requirement(1, "other head counts")
def others(t: CheckContext, kv_heads_for_budget: Answer) -> None:
    """the same for 12, 28 or 40 heads, and for a prime number of heads like Falcon's 71"""
    for heads in (t.pick(*ODD), t.pick(*ODD), t.pick(7, 23, 71)):
        budget = between(t, heads, not_powers=heads in ODD)
        budget_same(t, kv_heads_for_budget, budget_draw(t, heads), budget)


@budget.requirement(1, "a budget that is just met, in GiB")
def exact(t: CheckContext, kv_heads_for_budget: Answer) -> None:
    """a cache that takes the whole budget fits; a GiB is 2³⁰ bytes"""
    heads = t.pick(*(DIVISIBLE if t.round == 0 else ODD))
    just_met = t.pick(*divisors(heads)[1:-1])
    for budget in (just_met, heads, 1.03 * just_met):  # in GB the last one would not do either
        budget_same(t, kv_heads_for_budget, budget_draw(t, heads), budget)


@budget.requirement(1, "a budget that is too small, and one that is large")
def extremes(t: CheckContext, kv_heads_for_budget: Answer) -> None:
    """None where not even one KV head fits; all heads where there is room for more"""
    for budget in (t.random.uniform(0.55, 0.9), 0.01):  # the first is enough for one who counts half
        budget_same(t, kv_heads_for_budget, budget_draw(t, t.pick(*DIVISIBLE)), budget)
    heads = t.pick(*DIVISIBLE)
    budget_same(t, kv_heads_for_budget, budget_draw(t, heads), heads * t.random.uniform(1.3, 3))


@budget.requirement(1, "head_dim and torch_dtype")
def looked_up(t: CheckContext, kv_heads_for_budget: Answer) -> None:
    """head_dim where it is given, and 1, 2 or 4 bytes per number by torch_dtype"""
    for dtype, head_dim in (
        ("float32", None),
        ("float16", None),
        ("float8_e4m3fn", None),
        ("bfloat16", t.pick(256, 320)),
    ):
        heads = t.pick(*DIVISIBLE[1:])
        more = {"torch_dtype": dtype} | ({"head_dim": head_dim} if head_dim else {})
        low = t.pick(*divisors(heads)[1:-1])
        budget_same(t, kv_heads_for_budget, budget_draw(t, heads, **more), low * t.random.uniform(1.1, 1.8))


# 02.7: two layers on one cache, compared with one pass over the whole sequence

step = Exercise(
    id="02.7",
    slug="step",
    title="A step of two layers on one cache",
    answers=("shared_step",),
    may_use_kvlearn=True,
    hints=(
        "The owner does all that a layer of chapter 01 does: positions, rotate q and k, append, attend "
        "with a mask. The reader does only two things: rotate its own queries, attend.",
        "Ask for the positions once, `positions = cache.positions(T)`, before the append. Both layers' "
        "tokens are the same tokens at the same places, so the reader's queries turn by the same "
        "positions.",
        "`keys, values, _ = cache.append(rope(owner.k(x_owner), positions), owner.v(x_owner))` gives all "
        "keys, rotated already. Hand the same `keys, values` to both layers; turn and append nothing "
        "again.",
        "One mask for both: `core.causal_mask(T, keys.shape[2])`. Then "
        "`core.attention(rope(reader.q(x_reader), positions), keys, values, mask)`.",
    ),
)


class Layer:
    """A layer's projections to heads, and the record of which were used."""

    def __init__(self, t: CheckContext, M: int, H: int, D: int) -> None:
        self.weights = {name: t.randn(H * D, M) * M**-0.5 for name in "qkv"}
        self.n_heads = H
        self.used: set[str] = set()

    def project(self, name: str, x: Tensor) -> Tensor:
        """x (B, T, M) to heads (B, H, T, D), not rotated."""
        return (x @ self.weights[name].T).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def q(self, x: Tensor) -> Tensor:
        self.used.add("q")
        return self.project("q", x)

    def k(self, x: Tensor) -> Tensor:
        self.used.add("k")
        return self.project("k", x)

    def v(self, x: Tensor) -> Tensor:
        self.used.add("v")
        return self.project("v", x)


class Model:
    """Two layers on one cache, and the sequence that they are fed: x for each layer, in chunks."""

    def __init__(self, t: CheckContext, shared_step: Answer, *chunks: int) -> None:
        B, H, D, M = t.pick(2, 3), t.pick(5, 7), 16, 24
        self.t, self.shared_step = t, shared_step
        self.owner, self.reader = Layer(t, M, H, D), Layer(t, M, H, D)
        self.rope, self.chunks = Rope(D, RopeConfig()), chunks
        self.xs = t.randn(B, sum(chunks), M), t.randn(B, sum(chunks), M)
        # Twice as many slots: a step that writes twice is to be named for it, not to meet a full cache.
        self.cache = KVCache(B, H, 2 * sum(chunks) + 2, D, torch.float32, torch.device("cpu"))
        self.lengths: list[int] = []  # of the cache, after each step
        self.positions = torch.arange(sum(chunks))[None]
        k = self.rope(self.owner.project("k", self.xs[0]), self.positions)
        self.kv = k, self.owner.project("v", self.xs[0])

    def want(self) -> list[Tensor]:
        """Both layers' outputs for the whole sequence: causal attention over the owner's keys and values."""
        queries = (self.owner.project("q", self.xs[0]), self.reader.project("q", self.xs[1]))
        return [
            F.scaled_dot_product_attention(self.rope(q, self.positions), *self.kv, is_causal=True)
            for q in queries
        ]

    def run(self) -> list[list[Tensor]]:
        """The answer's outputs for each chunk: [of the owner, of the reader]."""
        got = []
        for x_owner, x_reader in zip(*(x.split(self.chunks, dim=1) for x in self.xs), strict=True):
            outs = self.shared_step(x_owner, x_reader, self.owner, self.reader, self.cache, self.rope)
            self.lengths.append(self.cache.length)
            got.append(list(self.t.pair(outs, "a pair of tensors, (out_owner, out_reader)")))
        return got

    def compare(self, *which: str) -> None:
        """Chunk by chunk, the outputs of these layers."""
        names, got = ("the owner's output:", "the reader's output:"), self.run()
        wanted = [w.split(self.chunks, dim=2) for w in self.want()]
        for i, outs in enumerate(got):
            for layer in (0, 1):
                if ("owner", "reader")[layer] in which:
                    self.t.close(outs[layer], wanted[layer][i], names[layer], tolerance=1e-3)


@step.requirement(1, "the owner", rounds=2)
def owner(t: CheckContext, shared_step: Answer) -> None:
    """out_owner as in chapter 01: a prompt, then one token at a time, over its own keys and values"""
    Model(t, shared_step, t.integer(4, 6), 1, 1).compare("owner")


@step.requirement(1, "the reader, for a prompt", rounds=2)
def prompt(t: CheckContext, shared_step: Answer) -> None:
    """out_reader: the reader's queries over the owner's keys and values, each token up to itself"""
    Model(t, shared_step, t.integer(5, 8)).compare("reader")


@step.requirement(2, "the reader, one token at a time", rounds=2)
def decode(t: CheckContext, shared_step: Answer) -> None:
    """the same when the prompt is in the cache: the positions go on, the new token's key is there"""
    Model(t, shared_step, t.integer(4, 6), 1, 1).compare("reader")


@step.requirement(1, "several tokens behind a prompt", rounds=2)
def chunk(t: CheckContext, shared_step: Answer) -> None:
    """both outputs for a chunk that continues what is in the cache"""
    Model(t, shared_step, t.integer(4, 6), 3).compare("owner", "reader")


@step.requirement(1, "one cache, written once", rounds=2)
def once(t: CheckContext, shared_step: Answer) -> None:
    """each step appends its T tokens once, the owner's rotated keys and its values; the reader projects
    nothing but queries; the inputs are unchanged"""
    model = Model(t, shared_step, 4, 1)
    model.run()
    before, after = model.lengths
    if t.true((before, after) == (4, 5), "4 tokens in the cache, then 5", f"{before} tokens, then {after}"):
        for got, want, name in zip((model.cache.k, model.cache.v), model.kv, ("keys", "values"), strict=True):
            t.close(got[:, :, :5], want, f"the {name} in the cache:", tolerance=1e-3)
    extra = sorted(model.reader.used - {"q"})
    came = f"the reader's {' and '.join(extra)} too"
    t.true(not extra, "the reader's q projection alone", came)
    t.unchanged()


EXERCISES = (attend, size, pool, route, layers, budget, step)
