"""Unit 07: requirements and hints of the exercises on hybrids and real models."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kvlearn import workbench
from kvlearn.attention import REGISTRY
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Raised,
    Stop,
    describe,
    new_tensors,
    plain_number,
)
from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.model.moe import load_balancing_loss
from kvlearn.study.recall import Recall

Config = dict[str, Any]

# 07.1: a config.json as a table of bytes, compared with a count of numbers layer by layer

table = Exercise(
    id="07.1",
    slug="table",
    title="From config.json to bytes",
    answers=("cache_table",),
    hints=(
        "Take the config of one model and write down for its layers 0 to 7 which kind each is. Which fields "
        "did you use, and what would you have done without them? Then ask of one layer of each kind: what "
        "does it keep after a million tokens?",
        "Two steps, in pseudocode: kinds = [the kind of layer i for each i]; then for each kind a number of "
        "tokens it keeps (two numbers: of max_len, of length) times what a token costs; a state has no "
        "tokens and costs the same at any length.",
        "Fields may be missing or None: `config.get(name) or default` covers both. `use_sliding_window` may "
        "be False: then sliding_window is a number that nobody uses.",
        "A window layer keeps min(tokens, sliding_window) tokens. A linear layer keeps, per value head, a "
        "matrix of key dim times value dim, and the last kernel − 1 inputs of a convolution over q, k and v "
        "side by side: how many channels are these?",
        "Channels of the convolution: 2 · linear_num_key_heads · linear_key_head_dim + "
        "linear_num_value_heads · linear_value_head_dim. Mamba: d_inner = mamba_expand · hidden_size "
        "channels, each with mamba_d_state numbers of state and mamba_d_conv − 1 earlier inputs. All of a "
        "state takes 4 bytes per number.",
    ),
)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# From the models' config.json.
LLAMA: Config = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
PYTHIA: Config = {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 8}
QWEN3: Config = {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MISTRAL: Config = {**LLAMA, "sliding_window": 4096}
MISTRAL_V2: Config = {**LLAMA, "sliding_window": None, "head_dim": None}
QWEN2: Config = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
GPT_OSS: Config = {
    "num_hidden_layers": 24,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": 12 * ["sliding_attention", "full_attention"],
}
GEMMA3: Config = {
    "num_hidden_layers": 34,
    "hidden_size": 2560,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
QWEN3_NEXT: Config = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
JAMBA: Config = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_expand": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
}


def kinds_of(config: Config) -> list[str]:
    """The kind of every layer."""
    layers = config["num_hidden_layers"]
    if "layer_types" in config:
        short = {"full": "full", "slid": "window", "line": "state"}
        return [short[name[:4]] for name in config["layer_types"]]
    for field, cheap in (("sliding_window_pattern", "window"), ("full_attention_interval", "state")):
        if field in config:
            group = [*[cheap] * (config[field] - 1), "full"]
            return (group * layers)[:layers]
    if "attn_layer_period" in config:
        group = ["state"] * config["attn_layer_period"]
        group[config["attn_layer_offset"]] = "full"
        return (group * layers)[:layers]
    on = config.get("sliding_window") is not None and config.get("use_sliding_window") is not False
    return layers * ["window" if on else "full"]


def state_numbers(config: Config) -> int:
    """Numbers that a layer with a state keeps."""
    if "mamba_d_state" in config:
        channels = config["mamba_expand"] * config["hidden_size"]
        return sum([channels] * config["mamba_d_state"]) + sum([channels] * (config["mamba_d_conv"] - 1))
    K, V = config["linear_key_head_dim"], config["linear_value_head_dim"]
    keys, values = config["linear_num_key_heads"] * K, config["linear_num_value_heads"] * V
    inputs = sum([keys + keys + values] * (config["linear_conv_kernel_dim"] - 1))
    return config["linear_num_value_heads"] * K * V + inputs


def table_reference(config: Config, max_len: int, length: int) -> list[tuple[str, int, int]]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = config["hidden_size"] // heads
    key = value = kv_heads * head_dim * BYTES[config["torch_dtype"]]
    rows = []
    for kind in kinds_of(config):
        if kind == "state":
            rows.append((kind, 4 * state_numbers(config), 4 * state_numbers(config)))
        else:
            most = math.inf if kind == "full" else config["sliding_window"]
            stored, read = (int(min(n, most)) for n in (max_len, length))
            rows.append((kind, (key + value) * stored, (key + value) * read))
    return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def table_rows(t: CheckContext, got: Any, n_layers: int) -> list[Any]:
    """The rows of the answer: as many as layers, and one more."""
    if not isinstance(got, list | tuple) or len(got) != n_layers + 1:
        t.note(got, Difference("", f"a list of {n_layers + 1} rows, the last for all layers", describe(got)))
        raise Stop
    for row in got:
        if not isinstance(row, list | tuple) or len(row) != 3:
            t.note(row, Difference("", "rows (kind, stored, read)", describe(row)))
            raise Stop
    return list(got)


def table_draw(t: CheckContext, config: Config) -> tuple[Config, int, int]:
    """The model with another dtype in each round, a maximum and a length, longer than its window."""
    dtype = list(BYTES)[t.round % 3]
    max_len = t.pick(65_536, 131_072, 262_144)
    return {**config, "torch_dtype": dtype}, max_len, t.integer(max_len // 4, max_len - 1)


def table_same(t: CheckContext, cache_table: Answer, config: Config, max_len: int, length: int) -> None:
    """The bytes of each layer; kinds and totals are other requirements'."""
    want = table_reference(config, max_len, length)
    got = table_rows(t, cache_table(config, max_len, length), len(want) - 1)
    for i, (_, stored, read) in enumerate(want[:-1]):
        good = t.number(got[i][1], stored, f"layer {i}, stored:")
        if not t.number(got[i][2], read, f"layer {i}, read:") or not good:
            break


@table.requirement(1, "every layer full")
def table_full(t: CheckContext, cache_table: Answer) -> None:
    """bytes of keys and values, max_len tokens stored and length tokens read; num_key_value_heads and
    head_dim may be missing"""
    table_same(t, cache_table, *table_draw(t, (LLAMA, PYTHIA, QWEN3)[t.round]))


@table.requirement(1, "a window in every layer, or switched off", rounds=4)
def table_window(t: CheckContext, cache_table: Answer) -> None:
    """at most sliding_window tokens, fewer in a short text; all tokens where it is None or
    use_sliding_window is False"""
    config, max_len, length = table_draw(t, (MISTRAL, MISTRAL_V2, QWEN2, MISTRAL)[t.round])
    if t.round == 3:
        max_len, length = 4096 + t.integer(1, 4000), t.integer(100, 4000)
    table_same(t, cache_table, config, max_len, length)


@table.requirement(1, "windows and full layers", rounds=4)
def table_mixed(t: CheckContext, cache_table: Answer) -> None:
    """layer_types as gpt-oss has them, sliding_window_pattern as Gemma 3: the last of each group is full"""
    table_same(t, cache_table, *table_draw(t, (GPT_OSS, GEMMA3)[t.round % 2]))


@table.requirement(1, "linear attention and full layers")
def table_linear(t: CheckContext, cache_table: Answer) -> None:
    """Qwen3-Next: full_attention_interval, or layer_types in its place; a state of 4-byte numbers"""
    config, max_len, length = table_draw(t, QWEN3_NEXT)
    if t.round:
        config |= {"linear_num_key_heads": 8, "linear_key_head_dim": t.pick(96, 160)}
    if t.round == 2:
        del config["full_attention_interval"]
        config["layer_types"] = 24 * ["full_attention", "linear_attention"]
    table_same(t, cache_table, config, max_len, length)


@table.requirement(1, "Mamba and full layers")
def table_mamba(t: CheckContext, cache_table: Answer) -> None:
    """Jamba: attn_layer_period and attn_layer_offset; a state of 4-byte numbers"""
    config, max_len, length = table_draw(t, JAMBA)
    if t.round:
        config |= {"attn_layer_offset": t.integer(1, 6), "mamba_d_conv": t.pick(3, 5)}
    table_same(t, cache_table, config, max_len, length)


@table.requirement(1, "the kinds", rounds=5)
def table_kinds(t: CheckContext, cache_table: Answer) -> None:
    """ "full", "window" or "state" in each row, "all" in the last"""
    config, max_len, length = table_draw(t, (MISTRAL, GEMMA3, QWEN3_NEXT, JAMBA, GPT_OSS)[t.round])
    want = [row[0] for row in table_reference(config, max_len, length)]
    got = [row[0] for row in table_rows(t, cache_table(config, max_len, length), len(want) - 1)]
    wrong = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), 0)
    t.true(got == want, f"{want[wrong]!r} in row {wrong}", f"{got[wrong]!r}")


@table.requirement(1, "the last row", rounds=5)
def table_total(t: CheckContext, cache_table: Answer) -> None:
    """the sums of your own rows above it, stored and read"""
    config, max_len, length = table_draw(t, (LLAMA, GEMMA3, QWEN3_NEXT, JAMBA, GPT_OSS)[t.round])
    got = table_rows(t, cache_table(config, max_len, length), config["num_hidden_layers"])
    for column, name in ((1, "stored in all:"), (2, "read in all:")):
        own = [plain_number(row[column]) for row in got[:-1]]
        if any(each is None for each in own):
            t.note(got[0][column], Difference(name, "rows of numbers", describe(got[0][column])))
            raise Stop
        t.number(got[-1][column], sum(int(each or 0) for each in own), name)


# 07.2: hops through a stack of windows and global layers, compared with all choices of global layers

place = Exercise(
    id="07.2",
    slug="place",
    title="Place the global layers",
    answers=("carries", "place_global"),
    hints=(
        "Draw five layers with W = 4 as boxes and let one hop of distance 7 pass. How many boxes does it "
        "use, and what is left of the last one? Now the second hop begins: in which box?",
        "`carries`, in pseudocode: layer = first; for each hop: carried = 0; while carried < distance: if no "
        "layer is left, it fails; carried += what this layer carries; layer += 1.",
        "A layer carries a hop by the distance from the newest to the oldest token that one query sees. "
        "With window W these are W tokens, the query's own among them.",
        "`place_global`: which hop saves most layers if one global layer carries it? Turn hops into global "
        "ones in that order until all of them fit; only then ask in which layer each of them begins.",
        "A hop of distance d needs ceil(d / (W − 1)) window layers, or one global layer. Walk through the "
        "hops in their order with a counter that begins at `first`; where a hop is a global one, note the "
        "counter and add 1, else add its layers. At the end count the slots: max_len for each global layer, "
        "min(W, max_len) for each other one.",
    ),
)

Stack = Sequence[int | None]


def carried(windows: Stack, hops: Sequence[int], first: int) -> bool:
    """Every way to cut the layers from ``first`` into as many runs as hops: does one carry all of them?"""
    usable = [math.inf if window is None else window - 1 for window in windows[first:]]
    if len(hops) > len(usable):
        return False
    for cuts in combinations(range(1, len(usable)), len(hops) - 1):
        edges = [0, *cuts, len(usable)]
        if all(sum(usable[a:b]) >= hop for a, b, hop in zip(edges, edges[1:], hops, strict=False)):
            return True
    return False


def stack_of(n_layers: int, window: int, places: Sequence[int]) -> list[int | None]:
    return [None if i in places else window for i in range(n_layers)]


def slots(n_layers: int, window: int, n_global: int, max_len: int) -> int:
    return n_global * max_len + (n_layers - n_global) * min(window, max_len)


def fewest(n_layers: int, window: int, hops: Sequence[int], first: int) -> int | None:
    """The fewest global layers with which the hops are carried; None if no number is enough."""
    for n in range(n_layers - first + 1):
        for places in combinations(range(first, n_layers), n):
            if carried(stack_of(n_layers, window, places), hops, first):
                return n
    return None


def counted(n_layers: int, window: int, hops: Sequence[int], first: int) -> int:
    """``fewest`` by arithmetic, to draw with; more than the hops if no number is enough."""
    layers = sorted((-(-hop // (window - 1)) for hop in hops), reverse=True)
    n = 0
    while sum(layers[n:]) + n > n_layers - first and n <= len(hops):
        n += 1
    return n


def place_draw(t: CheckContext) -> tuple[int, int, list[int], int]:
    """Layers, window, hops and the first usable layer, so that one or two global layers are needed, no layer
    is left over, and it matters which hops get them, where they are, and that W − 1 tokens are carried."""
    while True:
        n_layers, window, first = t.integer(6, 8), t.integer(4, 9), t.integer(1, 2)
        hops = [t.integer(1, 4 * window) for _ in range(3)]
        n = counted(n_layers, window, hops, first)
        if n != 1 + t.round % 2 or n == counted(n_layers - 1, window, hops, first):
            continue
        if n in (counted(n_layers, window, hops, 0), counted(n_layers, window + 1, hops, first)):
            continue
        first_ones = n + sum(-(-hop // (window - 1)) for hop in hops[n:])  # layers, the first n hops global
        at_the_top = stack_of(n_layers, window, range(n_layers - n, n_layers))
        if first_ones > n_layers - first and not carried(at_the_top, hops, first):
            return n_layers, window, hops, first


def placed(
    t: CheckContext, got: Any, n_layers: int, window: int, hops: list[int], first: int
) -> list[int] | None:
    """The places as a list of integers, or the end of the round."""
    if got is None:
        return None
    if isinstance(got, Tensor | set | range):
        got = sorted(int(each) for each in got)
    numbers = [plain_number(each) for each in got] if isinstance(got, list | tuple) else [None]
    good = all(isinstance(each, int) and 0 <= each < n_layers for each in numbers)
    if not good or len(set(numbers)) != len(numbers):
        came = f"{got}" if isinstance(got, list | tuple) else describe(got)
        t.note(came, Difference("", f"None, or numbers of layers, each once, 0 to {n_layers - 1}", came))
        raise Stop
    return [int(each or 0) for each in numbers]


@place.requirement(1, "carries: one hop")
def carries_one(t: CheckContext, carries: Answer, place_global: Answer) -> None:
    """True if the layers from `first` on carry the distance, W − 1 tokens each; a distance that is just
    reached, and one more"""
    window, n, first = t.integer(3, 9), t.integer(3, 6), (0, 1, 2)[t.round]
    reach = n * (window - 1)
    for distance in (reach, reach + 1, reach - 1, 1):
        got = carries([window] * (n + first), [distance], first)
        asked = f"{n} layers of window {window} carry {distance}: "
        t.true(got == (distance <= reach), f"{asked}{distance <= reach}", f"{got}")


@place.requirement(1, "carries: other windows, and global layers")
def carries_mixed(t: CheckContext, carries: Answer, place_global: Answer) -> None:
    """each layer carries by its own window; a global layer (None) any distance"""
    windows: list[int | None] = [t.integer(2, 9) for _ in range(5)]
    reach = sum(int(w or 0) - 1 for w in windows)
    for distance in (reach, reach + 1):
        got = carries(windows, [distance], 0)
        t.true(got == (distance <= reach), f"{windows} carry {distance}: {distance <= reach}", f"{got}")
    with_global = [*windows[:2], None, *windows[2:]]
    for hops, first in (([10**6], 0), ([10**6], 3), ([10**6], 2)):
        want = carried(with_global, hops, first)
        got = carries(with_global, hops, first)
        t.true(got == want, f"{with_global} from layer {first} carry {hops}: {want}", f"{got}")


@place.requirement(1, "carries: several hops")
def carries_hops(t: CheckContext, carries: Answer, place_global: Answer) -> None:
    """each hop begins in the layer behind the last one that the hop before it used"""
    W = t.integer(4, 9)
    cases: list[tuple[Stack, list[int], int]] = [
        ([W] * 4, [W, W - 1, 1], 0),  # 2 + 1 + 1 layers
        ([W] * 4, [W, W], 0),
        ([W] * 3, [W, W - 2], 0),
        ([W] * 3, [W, W], 0),  # the reach in all is enough, the layers are not
        ([W] * 4, [W, W], 1),
        ([W, None, W], [10**6, 1], 0),
        ([W, None], [10**6, 1], 0),
        ([None, W, W], [W, W], 0),
        ([W] * 3, [2 * W - 2, 2 * W - 2], 0),
    ]
    for windows, hops, first in cases:
        want, got = carried(windows, hops, first), carries(windows, hops, first)
        t.true(got == want, f"{list(windows)} from layer {first} carry {hops}: {want}", f"{got}")


@place.requirement(1, "place_global: a stack that carries all hops")
def place_works(t: CheckContext, carries: Answer, place_global: Answer) -> None:
    """windows and your global layers carry every hop, in order, from layer `first` on"""
    n_layers, window, hops, first = place_draw(t)
    got = placed(t, place_global(n_layers, window, hops, first, 100, 10**9), n_layers, window, hops, first)
    good = got is not None and carried(stack_of(n_layers, window, got), hops, first)
    asked = f"{n_layers} layers, W = {window}, hops {hops}, first = {first}"
    t.true(good, f"global layers that carry them ({asked})", f"{got}")


@place.requirement(2, "place_global: as few as possible", rounds=4)
def place_fewest(t: CheckContext, carries: Answer, place_global: Answer) -> None:
    """the same with the smallest number of global layers; an empty list where windows are enough"""
    if t.round == 3:
        n_layers, window, hops, first = 6, 5, [4, 8, t.integer(1, 4)], 2
        if not carried([window] * n_layers, hops, first):
            raise AssertionError("windows are enough in this round")
    else:
        n_layers, window, hops, first = place_draw(t)
    n = fewest(n_layers, window, hops, first)
    got = placed(t, place_global(n_layers, window, hops, first, 100, 10**9), n_layers, window, hops, first)
    good = got is not None and len(got) == n and carried(stack_of(n_layers, window, got), hops, first)
    asked = f"{n_layers} layers, W = {window}, hops {hops}, first = {first}"
    t.true(good, f"{n} global layers that carry them ({asked})", f"{got}")


@place.requirement(1, "place_global: None where it cannot be done")
def place_impossible(t: CheckContext, carries: Answer, place_global: Answer) -> None:
    """None if even global layers are too few for the hops, or the slots in all exceed the budget; a budget
    that is just met is enough"""
    n_layers, window, hops, first = place_draw(t)
    n = fewest(n_layers, window, hops, first) or 0
    max_len = t.integer(20, 40) if t.round else 3  # shorter than a window
    limit = slots(n_layers, window, n, max_len)
    too_many = [1] * (n_layers - first + 1)
    cases = [(hops, limit, True), (hops, limit - 1, False), (hops, n * max_len - 1, False)]
    cases += [(too_many, 10**9, False)]
    for asked, budget, possible in cases:
        got = place_global(n_layers, window, asked, first, max_len, budget)
        words = (
            f"{n_layers} layers, W = {window}, hops {asked}, first = {first}, max_len = {max_len}, "
            f"budget {budget}"
        )
        want = "a list" if possible else "None"
        t.true((got is not None) == possible, f"{want} ({words})", "None" if got is None else f"{got}")


# 07.3: routing with a bias that only chooses, and experts with a capacity, compared with loops

moe = Exercise(
    id="07.3",
    slug="moe",
    title="Experts with a capacity",
    answers=("route", "dispatch"),
    hints=(
        "Take 4 tokens, k = 2 and capacity 1 on paper. Write all 8 pairs of a token and an expert in the "
        "order in which they are served. Which pair is the third?",
        "`route` needs two sets of scores: by one you choose, from the other you read the weights. Which of "
        "the two contains the bias?",
        "`dispatch`, in pseudocode: list the pairs in the order of service; sort them by expert so that this "
        "order stays within each expert; for each expert that has pairs: take its first `capacity` ones, "
        "call it once with their rows, and add weight · output to the rows of their tokens.",
        "`chosen.T.flatten()` lists all first choices, then all second ones: pair p belongs to token p mod N "
        "and to choice p // N. `argsort(stable=True)` keeps the order of equal elements. `(pairs == e)"
        ".nonzero()[:, 0]` is the same for one expert, without a sort.",
        "`y.index_add(0, tokens, weighted_rows)` adds to rows, returns a new tensor and has a gradient. The "
        "order of `topk` is from the largest down, `torch.gather(scores, 1, chosen)` reads the scores there, "
        "and `float()` comes before the sigmoid.",
    ),
)


def moe_draw(t: CheckContext, k: int | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """x (N, M), weights (N, k) and chosen (N, k) of E experts: uneven, every expert but the last used."""
    N, M, E = t.integer(9, 14), t.integer(4, 7), t.integer(5, 7)
    k = t.pick(2, 3) if k is None else k
    popular = torch.linspace(2.0, 0.0, E)
    popular[-1] = -99.0
    gumbel = -(-torch.rand(N, E, generator=t.generator).clamp(1e-6, 1 - 1e-6).log()).log()
    chosen = (popular + gumbel).topk(k).indices
    weights = torch.rand(N, k, generator=t.generator) + 0.1
    return t.randn(N, M), weights / weights.sum(-1, keepdim=True), chosen, E


class Experts:
    """Experts tanh(x A_e) that note the rows of each call."""

    def __init__(self, t: CheckContext, n: int, width: int) -> None:
        self.matrices = t.randn(n, width, width)
        self.calls: list[tuple[int, int]] = []

    def __call__(self, number: int, rows: Tensor) -> Tensor:
        self.calls.append((number, len(rows) if isinstance(rows, Tensor) and rows.ndim == 2 else -1))
        return torch.tanh(rows @ self.matrices[number])

    def functions(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda rows, e=e: self(e, rows) for e in range(len(self.matrices))]  # type: ignore[misc]


def served(chosen: Tensor, capacity: int | None) -> list[tuple[int, int]]:
    """The pairs (token, choice) that an expert has room for."""
    taken: dict[int, int] = {}
    pairs = []
    for rank in range(chosen.shape[1]):
        for token in range(chosen.shape[0]):
            expert = int(chosen[token, rank])
            if capacity is None or taken.get(expert, 0) < capacity:
                taken[expert] = taken.get(expert, 0) + 1
                pairs.append((token, rank))
    return pairs


def dispatch_reference(
    x: Tensor, weights: Tensor, chosen: Tensor, matrices: Tensor, capacity: int | None = None
) -> Tensor:
    rows = [torch.zeros_like(x[0]) for _ in x]
    for token, rank in served(chosen, capacity):
        out = torch.tanh(x[token] @ matrices[chosen[token, rank]])
        rows[token] = rows[token] + weights[token, rank] * out
    return torch.stack(rows)


def route_reference(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = 1 / (1 + torch.exp(-logits.float()))
    ranked = [sorted(range(len(row)), key=lambda e: -float(row[e])) for row in scores + bias.float()]
    chosen = torch.tensor(ranked)[:, :k]
    weights = torch.stack([row[picked] for row, picked in zip(scores, chosen, strict=True)])
    return weights / weights.sum(-1, keepdim=True), chosen


def route_same(t: CheckContext, got: Any, want: tuple[Tensor, Tensor]) -> None:
    weights, chosen = t.pair(got, "a pair (weights, chosen)")
    if weights.dtype in (torch.int64, torch.int32) and chosen.dtype.is_floating_point:
        t.note(weights, Difference("", "(weights, chosen)", "(chosen, weights): swapped?"))
        raise Stop
    t.close(chosen.long(), want[1], "chosen:")
    t.close(weights, want[0], "weights:")


def route_draw(t: CheckContext) -> tuple[Tensor, int]:
    N, E = t.integer(6, 9), t.integer(6, 9)
    return t.randn(N, E) * 2, t.pick(2, 3)


@moe.requirement(1, "route: sigmoid scores, the largest first")
def route_scores(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """with a bias of 0: the k best experts of each token, the best first; their scores divided by their
    sum"""
    logits, k = route_draw(t)
    bias = torch.zeros(logits.shape[1])
    route_same(t, route(logits, bias, k), route_reference(logits, bias, k))


@moe.requirement(1, "route: a bias that chooses and does not weigh")
def route_bias(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """chosen by score + bias, weighed by the scores alone"""
    logits, k = route_draw(t)
    bias = t.randn(logits.shape[1]) * 0.4
    route_same(t, route(logits, bias, k), route_reference(logits, bias, k))


@moe.requirement(1, "route: half precision in, fp32 out")
def route_half(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """for logits in bf16 scores and weights in fp32, right to 1e-4"""
    logits, k = route_draw(t)
    logits = logits.bfloat16()
    bias = t.randn(logits.shape[1]) * 0.4
    route_same(t, route(logits, bias, k), route_reference(logits, bias, k))


@moe.requirement(1, "dispatch: without a capacity")
def dispatch_all(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """y = Σ weight · expert(x) over each token's experts"""
    x, weights, chosen, E = moe_draw(t)
    experts = Experts(t, E, x.shape[1])
    got = dispatch(x, weights, chosen, experts.functions())
    t.close(got, dispatch_reference(x, weights, chosen, experts.matrices))


@moe.requirement(2, "dispatch: with a capacity")
def dispatch_capacity(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """each expert serves its first `capacity` pairs: first choices of all tokens, then second ones; what is
    dropped adds nothing and changes no weight"""
    x, weights, chosen, E = moe_draw(t, k=2 + t.round % 2)
    experts = Experts(t, E, x.shape[1])
    load = int(chosen.flatten().bincount().max())
    capacity = max(load // 2, int((chosen[:, 0] == 0).sum()) - 1, 1)
    got = dispatch(x, weights, chosen, experts.functions(), capacity)
    t.close(got, dispatch_reference(x, weights, chosen, experts.matrices, capacity), "y:")
    got = dispatch(x, weights, chosen, experts.functions(), 1)
    t.close(got, dispatch_reference(x, weights, chosen, experts.matrices, 1), "y, capacity 1:")


@moe.requirement(1, "dispatch: one call per expert")
def dispatch_calls(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """each expert that has tokens is called once, with the rows it serves and no others; the number of
    operations does not grow with the number of tokens"""
    x, weights, chosen, E = moe_draw(t)
    for capacity in (None, 2):
        experts = Experts(t, E, x.shape[1])
        dispatch(x, weights, chosen, experts.functions(), capacity)
        rows = [0] * E
        for token, rank in served(chosen, capacity):
            rows[int(chosen[token, rank])] += 1
        want = [(e, n) for e, n in enumerate(rows) if n]
        came = sorted(experts.calls)
        t.true(came == want, f"calls (expert, rows) {want}", f"{came[:12]}")
    made = []
    for n in (1, 6):
        experts = Experts(t, E, x.shape[1])
        with new_tensors() as new:
            dispatch(x.repeat(n, 1), weights.repeat(n, 1), chosen.repeat(n, 1), experts.functions())
        made.append(len(new))
    good = made[1] <= 1.5 * made[0] + 5
    t.true(good, "as many operations for 6 times as many tokens", "many more: a loop over tokens?")


@moe.requirement(1, "dispatch: gradients")
def dispatch_gradients(t: CheckContext, route: Answer, dispatch: Answer) -> None:
    """of x and of the weights, those of the sum over each token's experts"""
    x, weights, chosen, E = moe_draw(t)
    experts, capacity = Experts(t, E, x.shape[1]), (None, 3, 2)[t.round]
    direction, grads = t.randn(*x.shape), []
    for compute in (
        lambda a, b: dispatch(a, b, chosen, experts.functions(), capacity),
        lambda a, b: dispatch_reference(a, b, chosen, experts.matrices, capacity),
    ):
        a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = compute(a, b)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            t.shape(y, tuple(x.shape), "y:")
            raise Stop
        if y.requires_grad:
            (y * direction).sum().backward()
        grads.append([torch.zeros_like(each) if each.grad is None else each.grad for each in (a, b)])
    for got, want, name in zip(*grads, ("x", "weights"), strict=True):
        t.close(got, want, f"gradient of {name}:")


# 07.4: a load-balancing loss per sequence, compared with loops in double precision

balance = Exercise(
    id="07.4",
    slug="balance",
    title="Why does this loss not balance?",
    answers=("balance_loss",),
    hints=(
        "Print the broken loss and its gradient: `loss.backward(); logits.grad`. With one expert per token, "
        "which numbers does the broken mean score consist of, and on which logits do they depend?",
        "In words: scores of *all* experts; for each sequence, over its real tokens only: the share of the "
        "chosen pairs that each expert has, and the mean score of each expert; their products summed; the "
        "mean over the sequences.",
        "`F.one_hot(chosen, E).sum(-2)` is (B, T, E), 1 where an expert is chosen. Multiply by mask[..., "
        "None] before you sum over T, and divide by the number of real tokens of the sequence. Only one of "
        "the two factors has a gradient: which?",
        "f_e = E / (k · n) · (number of pairs of expert e), P_e = 1 / n · Σ scores, both over the n real "
        "tokens of a sequence. A sequence with n = 0 must neither divide by 0 nor count in the mean.",
    ),
)


def balance_reference(logits: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """DeepSeek-V3 (2024), equations 17 to 20, without the factor α; one sequence after the other."""
    E, k = logits.shape[-1], chosen.shape[-1]
    losses = []
    for b in range(logits.shape[0]):
        real = [i for i in range(logits.shape[1]) if bool(mask[b, i])]
        if real:
            p = torch.stack([torch.softmax(logits[b, i].double(), -1) for i in real])
            counts = [sum(int(e in chosen[b, i].tolist()) for i in real) for e in range(E)]
            f = torch.tensor(counts, dtype=torch.double) * E / (k * len(real))
            losses.append((f * p.mean(0)).sum())
    return torch.stack(losses).mean().float()


def balance_draw(t: CheckContext, k: int = 1, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = t.integer(2, 4), t.integer(6, 9), t.integer(4, 7)
    logits = t.randn(B, T, E) * 1.5 + torch.linspace(1.0, 0.0, E)
    mask = torch.ones(B, T, dtype=torch.bool)
    if padded:
        for b in range(B):
            n = t.integer(2, T - 2) if b else 2
            mask[b, n:] = False
        logits[~mask] = t.randn(*logits[~mask].shape) + torch.linspace(0.0, 4.0, E)
    return logits, logits.topk(k).indices, mask


def balance_same(
    t: CheckContext,
    balance_loss: Answer,
    logits: Tensor,
    chosen: Tensor,
    mask: Tensor,
    tolerance: float = 1e-4,
) -> None:
    got = balance_loss(logits, chosen, mask)
    got = torch.as_tensor(got) if isinstance(got, float | int) else got
    t.close(got, balance_reference(logits, chosen, mask), "loss", tolerance)


@balance.requirement(1, "one expert per token")
def balance_one(t: CheckContext, balance_loss: Answer) -> None:
    """Σ f P of each sequence, the mean over the sequences; 1 if all experts have equally much, at most E"""
    balance_same(t, balance_loss, *balance_draw(t))


@balance.requirement(1, "several experts per token")
def balance_several(t: CheckContext, balance_loss: Answer) -> None:
    """the same scale for any k: f counts pairs and is divided by k"""
    balance_same(t, balance_loss, *balance_draw(t, k=2 + t.round % 2))


@balance.requirement(2, "the gradient")
def balance_gradient(t: CheckContext, balance_loss: Answer) -> None:
    """on the logits of all experts, through the mean scores alone: f is a count and has none"""
    logits, chosen, mask = balance_draw(t, k=1 + t.round % 2)
    grads = []
    for compute in (balance_loss, balance_reference):
        leaf = logits.clone().requires_grad_()
        loss = compute(leaf, chosen, mask)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            t.close(loss, torch.zeros(()), "loss")
            raise Stop
        if loss.requires_grad:
            loss.sum().backward()
        grads.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    t.close(grads[0] * 100, grads[1] * 100, "100 · gradient:")


@balance.requirement(1, "padding")
def balance_padding(t: CheckContext, balance_loss: Answer) -> None:
    """tokens where the mask is False count nowhere: not in f, not in P, not in the number of tokens"""
    balance_same(t, balance_loss, *balance_draw(t, k=1 + t.round % 2, padded=True))


@balance.requirement(1, "a sequence without tokens")
def balance_empty(t: CheckContext, balance_loss: Answer) -> None:
    """it is left out of the mean; no NaN in the loss"""
    logits, chosen, mask = balance_draw(t)
    mask[t.integer(0, len(mask) - 1)] = False
    balance_same(t, balance_loss, logits, chosen, mask)


@balance.requirement(1, "half precision, and inputs left alone")
def balance_half(t: CheckContext, balance_loss: Answer) -> None:
    """logits in bf16: the loss in fp32, right to 1e-5; the inputs unchanged"""
    logits, chosen, mask = balance_draw(t, k=2)
    balance_same(t, balance_loss, logits.bfloat16(), chosen, mask, 1e-5)
    t.unchanged()


# 07.5: a checkpoint with other names and layouts, proved by a forward pass of the other form

convert = Exercise(
    id="07.5",
    slug="convert",
    title="Load a checkpoint of another form",
    answers=("to_kvlearn",),
    hints=(
        "Print the names and shapes of both sides, `given_checkpoint()` in the cell above and "
        "`given_model().state_dict()`. Which of our tensors have no partner of their own on the other side?",
        "Begin with what is only renamed, then norms, then gate and up, and the fused qkv last. Of the names "
        "that are left over one kind is dropped, rotary.inv_freq; any other is an error.",
        "The rows of qkv, group by group: view them as (G, H / G + 2, D, M). Of dimension 1 the last entry "
        "is v, the one before it k, the others are the queries of this group.",
        "Rows of one head of q or k in the other form: 0, 1 are the first pair, 2, 3 the second. We want all "
        "first members and then all second ones: which rows are that, and how do you write it with a step of "
        "2? Values have no rotation.",
        "`torch.cat((x[..., 0::2, :], x[..., 1::2, :]), dim=-2)` on (…, D, M). Norms: `weight + 1`. "
        "`gate_up.chunk(2)`.",
    ),
)


def convert_shape(t: CheckContext) -> dict[str, int]:
    H, G, D = t.pick((6, 2, 8), (4, 2, 6), (6, 3, 4))
    M = t.pick(20, 28)
    return {"H": H, "G": G, "D": D, "M": M, "F": t.pick(36, 44), "V": t.integer(31, 39), "L": 2}


def foreign_checkpoint(t: CheckContext, s: dict[str, int], tied: bool = False) -> dict[str, Tensor]:
    """A checkpoint in the other form: what its own forward pass, below, computes with."""
    H, G, D, M = s["H"], s["G"], s["D"], s["M"]
    tensors = {"wte.weight": t.randn(s["V"], M), "ln_f.weight": t.randn(M) * 0.3}
    for i in range(s["L"]):
        tensors |= {
            f"h.{i}.ln_1.weight": t.randn(M) * 0.3,
            f"h.{i}.attn.qkv.weight": t.randn((H + 2 * G) * D, M) * M**-0.5,
            f"h.{i}.attn.out.weight": t.randn(M, H * D) * (H * D) ** -0.5,
            f"h.{i}.ln_2.weight": t.randn(M) * 0.3,
            f"h.{i}.mlp.gate_up.weight": t.randn(2 * s["F"], M) * M**-0.5,
            f"h.{i}.mlp.down.weight": t.randn(M, s["F"]) * s["F"] ** -0.5,
        }
    if not tied:
        tensors["lm_head.weight"] = t.randn(s["V"], M)
    return tensors


def with_frequencies(t: CheckContext, tensors: dict[str, Tensor], s: dict[str, int]) -> dict[str, Tensor]:
    return tensors | {f"h.{i}.attn.rotary.inv_freq": t.randn(s["D"] // 2) for i in range(s["L"])}


def foreign_logits(tensors: dict[str, Tensor], s: dict[str, int], tokens: Tensor) -> Tensor:
    """The other form's own forward pass, token by token and head by head, in fp64: (T,) -> (T, V)."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    H, G, D, T = s["H"], s["G"], s["D"], len(tokens)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)

    def turned(x: Tensor) -> Tensor:  # (T, D): coordinates 2i and 2i + 1 are a pair
        angles = torch.arange(T).double()[:, None] * 10_000.0 ** (-2 * torch.arange(D // 2).double() / D)
        a, b = x[:, 0::2], x[:, 1::2]
        pairs = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        return torch.stack(pairs, dim=-1).flatten(1)

    causal = torch.ones(T, T).tril().bool()
    x = w["wte.weight"][tokens]
    for i in range(s["L"]):
        heads = (norm(x, w[f"h.{i}.ln_1.weight"]) @ w[f"h.{i}.attn.qkv.weight"].T).split(D, dim=-1)
        outputs = []
        for h in range(H):
            group = h // (H // G) * (H // G + 2)
            q = turned(heads[group + h % (H // G)])
            k, v = turned(heads[group + H // G]), heads[group + H // G + 1]
            scores = (q @ k.T / D**0.5).masked_fill(~causal, -torch.inf)
            outputs.append(scores.softmax(-1) @ v)
        x = x + torch.cat(outputs, dim=-1) @ w[f"h.{i}.attn.out.weight"].T
        gate, up = (norm(x, w[f"h.{i}.ln_2.weight"]) @ w[f"h.{i}.mlp.gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ w[f"h.{i}.mlp.down.weight"].T
    return norm(x, w["ln_f.weight"]) @ w.get("lm_head.weight", w["wte.weight"]).T


def our_model(s: dict[str, int], tied: bool = False) -> Any:
    """kvlearn's decoder of this shape."""
    layers = [Spec("gqa", n_kv_heads=s["G"])]
    config = ModelConfig(
        s["V"], s["M"], s["L"], s["H"], head_dim=s["D"], d_ff=s["F"], layers=layers, tied=tied
    )
    return Decoder(config).eval().requires_grad_(False)


def convert_reference(tensors: dict[str, Tensor], s: dict[str, int]) -> dict[str, Tensor]:
    """Row by row."""
    G, D, per = s["G"], s["D"], s["H"] // s["G"]
    ours = {"embed.weight": tensors["wte.weight"], "norm.weight": 1 + tensors["ln_f.weight"]}
    if "lm_head.weight" in tensors:
        ours["head.weight"] = tensors["lm_head.weight"]
    halves = [2 * j for j in range(D // 2)] + [2 * j + 1 for j in range(D // 2)]
    for i in range(s["L"]):
        heads = tensors[f"h.{i}.attn.qkv.weight"].split(D)
        q = [heads[g * (per + 2) + j][halves] for g in range(G) for j in range(per)]
        k = [heads[g * (per + 2) + per][halves] for g in range(G)]
        v = [heads[g * (per + 2) + per + 1] for g in range(G)]
        gate_up = tensors[f"h.{i}.mlp.gate_up.weight"]
        ours |= {
            f"blocks.{i}.mixer_norm.weight": 1 + tensors[f"h.{i}.ln_1.weight"],
            f"blocks.{i}.mixer.q_proj.weight": torch.cat(q),
            f"blocks.{i}.mixer.k_proj.weight": torch.cat(k),
            f"blocks.{i}.mixer.v_proj.weight": torch.cat(v),
            f"blocks.{i}.mixer.o_proj.weight": tensors[f"h.{i}.attn.out.weight"],
            f"blocks.{i}.mlp_norm.weight": 1 + tensors[f"h.{i}.ln_2.weight"],
            f"blocks.{i}.mlp.gate_proj.weight": gate_up[: s["F"]],
            f"blocks.{i}.mlp.up_proj.weight": gate_up[s["F"] :],
            f"blocks.{i}.mlp.down_proj.weight": tensors[f"h.{i}.mlp.down.weight"],
        }
    return ours


def converted(t: CheckContext, to_kvlearn: Answer, tied: bool = False) -> tuple[Any, Any, Any, Any]:
    """The checkpoint, its shape, what came and what should have come."""
    s = convert_shape(t)
    tensors = foreign_checkpoint(t, s, tied)
    got = to_kvlearn(tensors, s["H"], s["G"])
    if not isinstance(got, Mapping):
        t.note(got, Difference("", "a dict of tensors by name", describe(got)))
        raise Stop
    return tensors, s, got, convert_reference(tensors, s)


def tensors_same(t: CheckContext, got: Any, want: Mapping[str, Tensor], *parts: str) -> None:
    """The tensors with these parts in their names."""
    for name, tensor in want.items():
        if any(part in name for part in parts) and not t.close(got.get(name), tensor, f"{name}:", 1e-6):
            break


@convert.requirement(1, "the names")
def convert_names(t: CheckContext, to_kvlearn: Answer) -> None:
    """exactly those of our model; without head.weight where there is no lm_head.weight"""
    _, _, got, want = converted(t, to_kvlearn, tied=t.round == 1)
    missing, extra = sorted(set(want) - set(got)), sorted(map(str, set(got) - set(want)))
    came = f"missing {missing[:2]}, extra {extra[:2]}"
    t.true(not missing and not extra, "the names of our model", came)


@convert.requirement(1, "renamed, norms, gate and up")
def convert_easy(t: CheckContext, to_kvlearn: Answer) -> None:
    """embedding, head, output and down as they are; 1 added to norm weights; gate_up cut in two"""
    _, _, got, want = converted(t, to_kvlearn)
    tensors_same(t, got, want, "embed", "head", "norm", "o_proj", "mlp")


@convert.requirement(1, "values out of the fused qkv")
def convert_values(t: CheckContext, to_kvlearn: Answer) -> None:
    """the last D rows of each group"""
    _, _, got, want = converted(t, to_kvlearn)
    tensors_same(t, got, want, "v_proj")


@convert.requirement(2, "queries and keys, in our order of rotation")
def convert_rotary(t: CheckContext, to_kvlearn: Answer) -> None:
    """the heads of each group, and within each head the pairs (2i, 2i + 1) at (i, i + D/2)"""
    _, _, got, want = converted(t, to_kvlearn)
    tensors_same(t, got, want, "q_proj", "k_proj")


@convert.requirement(2, "equal logits")
def convert_logits(t: CheckContext, to_kvlearn: Answer) -> None:
    """our decoder with your tensors gives the logits of the other form's own forward pass; the checkpoint is
    not changed"""
    tied = t.round == 1
    tensors, s, got, want = converted(t, to_kvlearn, tied)
    if not all(isinstance(got.get(n), Tensor) and got[n].shape == w.shape for n, w in want.items()):
        t.note(sorted(map(str, got)), Difference("", "tensors that our model can load", "others"))
        raise Stop
    model = our_model(s, tied)
    head = {"head.weight": got["embed.weight"]} if tied else {}
    model.load_state_dict({name: got[name] for name in want} | head)
    tokens = torch.randint(s["V"], (9,), generator=t.generator)
    t.close(model(tokens[None])[0], foreign_logits(tensors, s, tokens).float(), "logits", tolerance=1e-3)
    t.unchanged()


@convert.requirement(1, "inv_freq, and a tensor that nobody knows")
def convert_unknown(t: CheckContext, to_kvlearn: Answer) -> None:
    """rotary.inv_freq is dropped; ValueError for an unknown tensor, with its name in the message"""
    s = convert_shape(t)
    known = foreign_checkpoint(t, s)
    try:
        got = to_kvlearn(with_frequencies(t, known, s), s["H"], s["G"])
        names = set(got) if isinstance(got, Mapping) else {describe(got)}
        extra = sorted(map(str, names ^ set(convert_reference(known, s))))
        t.true(not extra, "rotary.inv_freq dropped, all others there", f"a difference in {extra[:3]}")
    except Raised as error:
        t.note("refused", Difference("", "rotary.inv_freq dropped", error.what))
    name = ("h.0.attn.qkv.bias", "h.1.ln_3.weight", "score.weight")[t.round]
    tensors = known | {name: t.randn(3)}
    message = ""

    def call() -> None:
        nonlocal message
        try:
            to_kvlearn(tensors, s["H"], s["G"])
        except Exception as error:
            message = str(getattr(error, "error", error))
            raise

    if t.raises(ValueError, call, f"for a tensor named {name}"):
        t.true(name in message, f"the name {name} in the message", "a message without it")


# 07.6: wrong transposes found by the loss: of the base model, and of losses made for the purpose

transpose = Exercise(
    id="07.6",
    slug="transpose",
    title="Find the wrong transpose from its loss",
    answers=("find_transposed", "convert"),
    may_use_kvlearn=True,  # the loss runs the base model
    hints=(
        "A wrong transpose of a matrix that is not square raises an error when it is loaded. Which matrices "
        "of the base model can be wrong without one? Of how many kinds are they?",
        "`find_transposed`, in pseudocode: kinds = names without the number of the layer, square ones only; "
        "for each subset of the kinds: a copy of the state with these transposed in every layer, and its "
        "loss; the answer is the subset of the lowest loss.",
        "Why subsets, and not one kind after the other? The scores are (x Q)(x K)ᵀ. If Q and K are both "
        "wrong, mending one of them leaves the scores as wrong as they were, and the loss may even rise.",
        '`name.split(".", 2)` gives "blocks", the number and the kind. `itertools.combinations(kinds, n)` '
        "for n = 0, 1, … gives all subsets.",
        "`convert`: a shape cannot say whether a square matrix is to be transposed; a name can. Matrices "
        "within blocks are, embed.weight and head.weight are not, vectors have nothing to transpose.",
    ),
)

SQUARE = ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight", "mixer.o_proj.weight")
State = dict[str, Tensor]


def kind_of(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def transposed(state: Mapping[str, Tensor], kinds: Sequence[str]) -> State:
    """A copy with these kinds transposed in every layer."""
    return {name: w.T.contiguous() if kind_of(name) in kinds else w.clone() for name, w in state.items()}


class Loss:
    """A loss of a state that counts how often it is asked, and refuses far too many calls.

    Subsets of single matrices in place of kinds are 65,536 for the base model: minutes of waiting.
    """

    most = 200

    def __init__(self, compute: Callable[[Mapping[str, Tensor]], float]) -> None:
        self.compute, self.calls = compute, 0

    def __call__(self, state: Any) -> float:
        self.calls += 1
        if self.calls > self.most:
            raise RuntimeError(
                f"loss was called more than {self.most} times; four square kinds have 16 subsets, "
                "and a kind is transposed in all layers at once"
            )
        return self.compute(state)


_base_losses: dict[tuple[str, ...], float] = {}  # by the tensors that are transposed


def base_loss(state: Mapping[str, Tensor]) -> float:
    """The base model's loss with this state, on the first tokens of a text, in nats per byte."""
    base = workbench.base_model()
    changed = {name: w for name, w in base.state_dict().items() if not same_tensor(state.get(name), w)}
    changed.pop("head.weight", None)  # the embedding itself
    known = all(same_tensor(state.get(name), w.T) for name, w in changed.items())
    if not known or tuple(changed) not in _base_losses:
        tokens = workbench.encode(workbench.TEXT[:64])
        with torch.no_grad():
            logits = functional_call(base, dict(state), (tokens,))
            loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
        if not known:
            return loss
        _base_losses[tuple(changed)] = loss
    return _base_losses[tuple(changed)]


def same_tensor(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a, b)


def made_state(t: CheckContext, n_layers: int = 2) -> State:
    """Tensors of a small model whose feed-forward is square too, and its embedding as well."""
    M = 6
    state = {"embed.weight": t.randn(M, M), "norm.weight": t.randn(M), "head.weight": t.randn(9, M)}
    for i in range(n_layers):
        state |= {f"blocks.{i}.{kind}": t.randn(M, M) for kind in SQUARE}
        state |= {f"blocks.{i}.mlp.{name}.weight": t.randn(8, M) for name in ("gate_proj", "up_proj")}
        state |= {
            f"blocks.{i}.mlp.down_proj.weight": t.randn(M, 8),
            f"blocks.{i}.mlp_norm.weight": t.randn(M),
        }
    return state


def made_loss(right: State) -> Callable[[Mapping[str, Tensor]], float]:
    """1.5 where all is right; each wrong matrix adds to it, q and k alone more than both together."""
    cost = dict(zip(SQUARE, (1.0, 0.9, 0.5, 0.3), strict=True)) | {"embed.weight": 3.0}

    def compute(state: Mapping[str, Tensor]) -> float:
        loss = 1.5
        n_layers = sum(name.endswith(SQUARE[0]) for name in right)
        for name, weight in right.items():
            if state[name].shape != weight.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(weight.shape)}, got {tuple(state[name].shape)}"
                )
        for i in range(n_layers):
            wrong = [
                kind
                for kind in SQUARE
                if not torch.equal(state[f"blocks.{i}.{kind}"], right[f"blocks.{i}.{kind}"])
            ]
            both = SQUARE[0] in wrong and SQUARE[1] in wrong
            loss += (sum(cost[kind] for kind in wrong) - (1.3 if both else 0.0)) / n_layers
        return loss + cost["embed.weight"] * (not torch.equal(state["embed.weight"], right["embed.weight"]))

    return compute


def found(
    t: CheckContext, find_transposed: Answer, right: State, wrong: Sequence[str], compute: Any, most: int = 0
) -> None:
    """The kinds that were found are the wrong ones; with ``most``, by no more calls of the loss."""
    loss = Loss(compute)
    got = find_transposed(transposed(right, wrong), loss)
    names = list(got) if isinstance(got, list | tuple | set | frozenset) else None
    if names is None or not all(isinstance(name, str) for name in names):
        t.note(got, Difference("", "a list of kinds, as 'mixer.q_proj.weight'", describe(got)))
        return
    t.true(sorted(names) == sorted(wrong), f"{sorted(wrong)}", f"{sorted(names)}")
    if most:
        t.true(0 < loss.calls <= most, f"1 to {most} calls of loss", f"{loss.calls}")


@transpose.requirement(1, "find_transposed: one kind", rounds=2)
def find_one(t: CheckContext, find_transposed: Answer, convert: Answer) -> None:
    """the kind that is transposed in every layer of the base model, its name without the layer"""
    right = dict(workbench.base_model().state_dict())
    del right["head.weight"]  # the embedding itself
    found(t, find_transposed, right, [SQUARE[3 - 2 * t.round]], base_loss)


@transpose.requirement(1, "find_transposed: several kinds at once")
def find_several(t: CheckContext, find_transposed: Answer, convert: Answer) -> None:
    """all kinds that are wrong, also where mending one of them alone raises the loss"""
    wrong = (SQUARE[:2], SQUARE[:3], (SQUARE[1], SQUARE[3]))[t.round]
    right = made_state(t)
    found(t, find_transposed, right, wrong, made_loss(right))


@transpose.requirement(1, "find_transposed: nothing is wrong")
def find_none(t: CheckContext, find_transposed: Answer, convert: Answer) -> None:
    """an empty list"""
    right = made_state(t)
    found(t, find_transposed, right, [], made_loss(right))


@transpose.requirement(1, "find_transposed: the work, and the state left alone")
def find_work(t: CheckContext, find_transposed: Answer, convert: Answer) -> None:
    """at most one call of loss for each subset of the square kinds within blocks (16 for four); the tensors
    of the state unchanged"""
    right = made_state(t, n_layers=2 + t.round)
    found(t, find_transposed, right, [SQUARE[t.round]], made_loss(right), most=16)
    t.unchanged()


def linear_checkpoint(right: State) -> State:
    """The same with the matrices of its layers as (in, out)."""
    return {
        name: w.T.contiguous() if name.startswith("blocks.") and w.ndim == 2 else w.clone()
        for name, w in right.items()
    }


def converts(t: CheckContext, convert: Answer, right: State) -> None:
    shapes = {name: tuple(w.shape) for name, w in right.items()}
    got = convert(linear_checkpoint(right), shapes)
    if not isinstance(got, Mapping) or set(got) != set(right):
        t.note(got, Difference("", "a dict with the same names", describe(got)))
        raise Stop
    for name, weight in right.items():
        if not t.close(got[name], weight, f"{name}:", 1e-6):
            break


@transpose.requirement(1, "convert: matrices of the layers")
def convert_layers(t: CheckContext, find_transposed: Answer, convert: Answer) -> None:
    """(in, out) becomes (out, in), square or not"""
    M = t.integer(5, 7)
    right: State = {"embed.weight": t.randn(11, M), "norm.weight": t.randn(M)}
    right |= {f"blocks.{i}.{kind}": t.randn(M, M) for i in range(2) for kind in SQUARE}
    right |= {f"blocks.{i}.mlp.up_proj.weight": t.randn(M + 3, M) for i in range(2)}
    right |= {f"blocks.{i}.mlp_norm.weight": t.randn(M) for i in range(2)}
    converts(t, convert, right)


@transpose.requirement(1, "convert: square everywhere")
def convert_square(t: CheckContext, find_transposed: Answer, convert: Answer) -> None:
    """embed.weight and head.weight stay as they are, also where they are square"""
    M = t.integer(5, 7)
    names = ("embed.weight", "head.weight", *(f"blocks.0.{kind}" for kind in SQUARE))
    right = {name: t.randn(M, M) for name in names} | {"blocks.0.mlp.gate_proj.weight": t.randn(M, M)}
    converts(t, convert, right)


# 07.7: a pattern for a budget, compared with all numbers of layers of each kind

design = Exercise(
    id="07.7",
    slug="design",
    title="Design for a budget",
    answers=("design",),
    hints=(
        "Leave the order aside: how many choices of layers are there if only the number of each kind counts? "
        "For 16 layers of 5 kinds, is that few enough to try all?",
        "In pseudocode: best = None; for each multiset of n_layers kinds: skip it if it stores too much, "
        "reads too much, or does not reach; compare (number of exact layers, −read) with the best; at the "
        "end put the kinds of the best one in order.",
        "`itertools.combinations_with_replacement(kinds, n_layers)` gives the multisets. It reaches if some "
        "reach is None or the sum of all reaches is at least the distance.",
        "For the order: with m exact layers there are m + 1 gaps for the others: in front of, between and "
        "behind them. `divmod(len(others), m + 1)` says how long a gap is at least, and how many gaps are "
        "one longer.",
    ),
)

Kinds = dict[str, dict[str, Any]]


def real_kinds(n: int) -> Kinds:
    """One layer each, of width 4096, at n tokens in 16 bit: 8 KV heads of 128, DeepSeek's latent, the latent
    with V3.2's index that reads 2048 tokens, a window of 1024, a state of 32 matrices in 32 bit."""
    return {
        "full": {"stored": 4096 * n, "read": 4096 * n, "reach": None},
        "latent": {"stored": 1152 * n, "read": 1152 * n, "reach": None},
        "indexed": {"stored": 1284 * n, "read": 132 * n + 1152 * 2048, "reach": None},
        "window": {"stored": 4096 * 1024, "read": 4096 * 1024, "reach": 1023},
        "state": {"stored": 2_195_456, "read": 2_195_456, "reach": 0},
    }


def allowed(kinds: Kinds, counts: Mapping[str, int], budget: float, read_limit: float, distance: int) -> str:
    """The rules that such a stack violates; empty if none."""
    stored, read = (sum(kinds[name][key] * n for name, n in counts.items()) for key in ("stored", "read"))
    if stored > budget:
        return f"{stored:,} bytes stored, more than {budget:,}"
    if read > read_limit:
        return f"{read:,} bytes read, more than {read_limit:,}"
    used = [(kinds[name]["reach"], n) for name, n in counts.items() if n]
    if all(reach is not None for reach, _ in used) and sum(reach * n for reach, n in used) < distance:
        return f"a reach of {sum(reach * n for reach, n in used)}, less than {distance:,}"
    return ""


def all_counts(names: Sequence[str], n: int) -> list[dict[str, int]]:
    """Every number of layers of each kind, n in all."""
    if len(names) == 1:
        return [{names[0]: n}]
    return [{names[0]: i} | rest for i in range(n + 1) for rest in all_counts(names[1:], n - i)]


def exact_layers(kinds: Kinds, counts: Mapping[str, int]) -> int:
    return sum(n for name, n in counts.items() if kinds[name]["reach"] is None)


def read_by(kinds: Kinds, counts: Mapping[str, int]) -> int:
    return sum(kinds[name]["read"] * n for name, n in counts.items())


class Task:
    """Arguments of ``design``, and the best that can be done."""

    def __init__(self, t: CheckContext, binding: int) -> None:
        self.n_layers = t.integer(6, 8)
        self.n = n = t.pick(2**18, 2**19, 2**20)
        self.kinds = real_kinds(n)
        if t.round % 2:  # neither names nor their order are to be relied on
            names = ("a", "b", "c", "d", "e")
            self.kinds = dict(zip(names, reversed(list(self.kinds.values())), strict=True))
        self.budget, self.read_limit, self.distance = 10**15, 10**15, n - 1
        if binding == 0:  # stored
            self.budget = int(1152 * n * self.n_layers * (0.35 + 0.3 * t.random.random()))
        elif binding == 1:  # read
            self.budget = 1284 * n * self.n_layers
            self.read_limit = int(132 * n * self.n_layers * (0.5 + 0.35 * t.random.random()))
        else:  # no exact layer fits: windows alone must reach
            self.budget = 1152 * n - 1
            self.distance = 1023 * t.integer(2, 4)

    def arguments(self) -> tuple[Any, ...]:
        return self.kinds, self.n_layers, self.budget, self.read_limit, self.distance

    def best(self) -> tuple[int, int] | None:
        """The most exact layers, and the least read among these."""
        good = [
            (exact_layers(self.kinds, counts), -read_by(self.kinds, counts))
            for counts in all_counts(list(self.kinds), self.n_layers)
            if not allowed(self.kinds, counts, self.budget, self.read_limit, self.distance)
        ]
        return (max(good)[0], -max(good)[1]) if good else None

    def words(self) -> str:
        return f"{self.n_layers} layers, budget {self.budget:,}, read_limit {self.read_limit:,}"


def designed(t: CheckContext, got: Any, task: Task) -> tuple[list[str], dict[str, int]]:
    """The pattern and the number of its layers of each kind; the end of the round if it is none or not
    allowed."""
    if not isinstance(got, list | tuple) or not all(each in task.kinds for each in got):
        t.note(f"{got}"[:200], Difference("", f"names of kinds {list(task.kinds)}", f"{got}"[:200]))
        raise Stop
    counts = {name: list(got).count(name) for name in task.kinds}
    violated = allowed(task.kinds, counts, task.budget, task.read_limit, task.distance)
    if len(got) != task.n_layers:
        violated = f"{len(got)} layers"
    if violated:
        t.true(False, f"a pattern that is allowed ({task.words()})", f"{violated} by {mix(counts)}")
        raise Stop
    return list(got), counts


def mix(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n)


@design.requirement(1, "a pattern that is allowed", rounds=4)
def design_allowed(t: CheckContext, design: Answer) -> None:
    """n_layers names that store and read no more than allowed and reach the needle"""
    task = Task(t, t.round)
    if t.round == 3:  # one window reaches
        task.distance = t.integer(100, 1023)
    designed(t, design(*task.arguments()), task)
    t.note(True, None)


@design.requirement(2, "as many exact layers as possible")
def design_exact(t: CheckContext, design: Answer) -> None:
    """the most layers whose reach is None"""
    task = Task(t, (0, 1, 0)[t.round])
    _, counts = designed(t, design(*task.arguments()), task)
    want = (task.best() or (0, 0))[0]
    n = exact_layers(task.kinds, counts)
    t.true(n == want, f"{want} exact layers ({task.words()})", f"{n}: {mix(counts)}")


@design.requirement(1, "of these the one that reads least")
def design_read(t: CheckContext, design: Answer) -> None:
    """among the patterns with the most exact layers, the least bytes read"""
    task = Task(t, (0, 1, 2)[t.round])
    if t.round == 0:  # room for two exact layers, whichever of them stores more
        task.budget = 2 * 1284 * task.n + task.n_layers * 2_195_456
    _, counts = designed(t, design(*task.arguments()), task)
    want, read = (task.best() or (0, 0))[1], read_by(task.kinds, counts)
    t.true(read == want, f"{want:,} bytes read ({task.words()})", f"{read:,}: {mix(counts)}")


@design.requirement(1, "exact layers evenly spaced")
def design_spaced(t: CheckContext, design: Answer) -> None:
    """m exact layers leave m + 1 gaps, and no gap has more than ceil(others / (m + 1)) other layers"""
    task = Task(t, 0)
    task.n_layers = t.pick(7, 8)
    task.budget = int(1152 * task.n * (1.4 + t.round % 2))  # one or two exact layers
    pattern, counts = designed(t, design(*task.arguments()), task)
    m = exact_layers(task.kinds, counts)
    gaps = "".join("x" if task.kinds[name]["reach"] is None else "." for name in pattern)
    longest, most = max(map(len, gaps.split("x"))), -(-(len(pattern) - m) // (m + 1))
    t.true(longest <= most, f"gaps of at most {most}", f"one of {longest}: {gaps}")


@design.requirement(1, "limits that are just met")
def design_just(t: CheckContext, design: Answer) -> None:
    """a pattern that stores, reads or reaches exactly as much as allowed is allowed"""
    task = Task(t, 0)
    n = task.n
    if t.round == 0:
        task.budget = 3 * 1152 * n + (task.n_layers - 3) * 2_195_456
    elif t.round == 1:
        task.budget, task.read_limit = 10**15, task.n_layers * (132 * n + 1152 * 2048)
    else:
        task.budget, task.distance = 1152 * n - 1, 1023 * task.n_layers
    _, counts = designed(t, design(*task.arguments()), task)
    want, got = task.best(), (exact_layers(task.kinds, counts), read_by(task.kinds, counts))
    t.true(got == want, f"(exact layers, bytes read) {want} ({task.words()})", f"{got}: {mix(counts)}")


@design.requirement(1, "None where nothing is allowed")
def design_none(t: CheckContext, design: Answer) -> None:
    """one byte too few to store or to read, or a needle one token too far"""
    task = Task(t, 2)
    if t.round == 0:
        task.budget = task.n_layers * 2_195_456 - 1
    elif t.round == 1:
        task.read_limit = task.n_layers * 2_195_456 - 1
    else:
        task.distance = 1023 * task.n_layers + 1
    got = design(*task.arguments())
    t.true(got is None, f"None ({task.words()})", "a pattern" if isinstance(got, list | tuple) else f"{got}")


# 07.8: a hybrid that is trained

TASK = Recall(n_pairs=6, length=24, n_keys=12, n_values=12)
N_LAYERS, WIDTH, N_EXPERTS, TOP_K, LONG = 3, 48, 4, 2, 65_536
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {"head_dim": 32, "rope": None}),
    "window": ("window", {"head_dim": 32, "rope": None, "window": 8}),
    "linear": ("linear", {"head_dim": 32, "key_dim": 2}),
}


class Layer(nn.Module):
    """A mixture of experts: what ``feed_forward`` gets."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.bias = TOP_K, torch.zeros(N_EXPERTS)
        self.router = nn.Parameter(torch.randn(N_EXPERTS, WIDTH) * WIDTH**-0.5)
        self.up = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(N_EXPERTS, WIDTH, WIDTH) * 0.3 * WIDTH**-0.5)

    @property
    def experts(self) -> list[Callable[[Tensor], Tensor]]:
        """Functions of rows (n, M), one per expert."""
        return [partial(self.expert, number) for number in range(N_EXPERTS)]

    def expert(self, number: int, rows: Tensor) -> Tensor:
        return F.silu(rows @ self.up[number]) @ self.down[number]


class Hybrid(nn.Module):
    """A short convolution, the learner's layers, the learner's mixture of experts; tokens -> logits."""

    def __init__(self, names: Sequence[str], feed_forward: Callable[..., Any], parts: Any) -> None:
        super().__init__()
        self.feed_forward, self.parts = feed_forward, parts
        self.embed = nn.Embedding(TASK.vocab_size, WIDTH)
        mixers = [REGISTRY[kind](WIDTH, 1, **options) for kind, options in map(MIXERS.get, names)]
        self.mixers = nn.ModuleList([REGISTRY["short_conv"](WIDTH, 1), *mixers])
        self.moe = Layer()
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
        for mixer in self.mixers:
            mixer.initialise()
        for mixer in mixers:
            mixer.o_proj.weight.data *= len(mixers) ** -0.5
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        for mixer in self.mixers:
            x = x + mixer(F.rms_norm(x, (WIDTH,)))
        y, balance = self.feed_forward(F.rms_norm(x, (WIDTH,)), self.moe, self.parts)
        return F.rms_norm(x + y, (WIDTH,)) @ self.embed.weight.T, balance


def train_hybrid(answers: Mapping[str, Any], parts: Any) -> workbench.Trained:
    """At most 300 steps; ends when more than 97% of the last 10 steps' answers were right."""
    kinds = layer_kinds()
    names = list(answers["layers"](kinds, N_LAYERS, layer_budget(), LONG - 1, parts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # the same first weights each time
        model = Hybrid(names, answers["feed_forward"], parts)
    weights = list(model.parameters())
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    generator, curve, recent = torch.Generator().manual_seed(1), dict[int, float](), list[float]()
    for step in range(1, 301):
        texts = TASK.texts(32, generator)
        logits, balance = model(texts.tokens)
        loss = answers["loss"](logits, texts.asked, texts.answers, balance)
        lr = 5e-3 * min(1.0, step / 20)
        grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():  # Adam, written out: torch.optim loads torch's compiler, which takes seconds
            size = torch.stack([grad.norm() for grad in grads]).norm().clamp(min=1.0)
            for w, grad, mean, square in zip(weights, grads, means, squares, strict=True):
                mean.lerp_(grad / size, 0.1)
                square.lerp_((grad / size) ** 2, 0.05)
                w -= lr * mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        recent.append(recall_of(logits, texts))
        if step % 10 == 0:
            curve[step] = sum(recent[-10:]) / 10
            if curve[step] > 0.97:
                break
    with torch.no_grad():
        texts = TASK.texts(256, torch.Generator().manual_seed(2))
        right = recall_of(model(texts.tokens)[0], texts)
    stored, read = (sum(kinds[name][key] for name in names) for key in ("stored", "read"))
    numbers = {"layers": ", ".join(names), "right answers on new texts": f"{right:.0%}"}
    numbers |= {"steps of training": f"{max(curve)}", f"bytes stored at {LONG:,} tokens": f"{stored:,}"}
    return workbench.Trained(numbers | {f"bytes read at {LONG:,} tokens": f"{read:,}"}, curve)


def recall_of(logits: Tensor, texts: Any) -> float:
    """The share of the questions whose most likely next token is the answer."""
    likely = logits.argmax(-1).gather(1, texts.asked)
    return (likely == texts.answers).float().mean().item()


def layer_kinds() -> Kinds:
    """The costs and abilities of one layer of each kind at ``LONG`` tokens, from the layers themselves."""
    reach = {"full": None, "window": 7, "linear": 0}
    kinds = {}
    for name, (kind, options) in MIXERS.items():
        mixer = REGISTRY[kind](WIDTH, 1, **options)
        stored, read = mixer.cache_bytes(LONG), mixer.read_bytes(LONG)
        kinds[name] = {"stored": stored, "read": read, "reach": reach[name]}
    return kinds


def layer_budget() -> int:
    """Half of what full layers alone store."""
    return N_LAYERS * layer_kinds()["full"]["stored"] // 2


def library_route(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits.float())
    chosen = torch.topk(scores + bias, k).indices
    weights = torch.take_along_dim(scores, chosen, 1)
    return weights / weights.sum(1, keepdim=True), chosen


def library_dispatch(
    x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Any], capacity: int | None = None
) -> Tensor:
    ordered, order = chosen.T.flatten().sort(stable=True)
    parts = [torch.zeros_like(x)]
    for e, expert in enumerate(experts):
        pairs = order[ordered == e][:capacity]
        if len(pairs):
            token, rank = pairs % len(x), pairs // len(x)
            out = weights[token, rank, None] * expert(x[token])
            parts.append(torch.zeros_like(x).index_put((token,), out))
    return torch.stack(parts).sum(0)


def library_balance(logits: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    scores = logits.float().softmax(-1)
    each = [load_balancing_loss(s[m], c[m]) for s, c, m in zip(scores, chosen, mask, strict=True) if m.any()]
    return torch.stack(each).mean() / chosen.shape[-1]


def library_design(
    kinds: Kinds, n_layers: int, budget: float, read_limit: float, distance: int
) -> list[str] | None:
    good = [
        counts
        for counts in all_counts(list(kinds), n_layers)
        if not allowed(kinds, counts, budget, read_limit, distance)
    ]
    if not good:
        return None
    best = max(good, key=lambda counts: (exact_layers(kinds, counts), -read_by(kinds, counts)))
    exact = [name for name, n in best.items() if kinds[name]["reach"] is None for _ in range(n)]
    others = [name for name, n in best.items() if kinds[name]["reach"] is not None for _ in range(n)]
    pattern = []
    for gaps in range(len(exact) + 1, 0, -1):
        n = -(-len(others) // gaps)
        pattern += others[:n] + exact[:1]
        others, exact = others[n:], exact[1:]
    return pattern


TRAINING = workbench.Training(
    parts={
        "route": ("07.3", library_route),
        "dispatch": ("07.3", library_dispatch),
        "balance_loss": ("07.4", library_balance),
        "design": ("07.7", library_design),
    },
    shown=(Layer, Hybrid, train_hybrid),
    train=train_hybrid,
    baselines={
        "full in every layer": {"layers": lambda kinds, n, *_: n * ["full"]},
        "linear in every layer": {"layers": lambda kinds, n, *_: n * ["linear"]},
    },
)

model = Exercise(
    id="07.8",
    slug="model",
    title="Your model",
    answers=("layers", "feed_forward", "loss"),
    may_use_kvlearn=True,
    wiring=TRAINING,
    hints=(
        "`layers` has a budget for bytes stored and none for bytes read. Which limit do you hand to "
        "parts.design so that it never refuses anything?",
        "`feed_forward` in words: texts and tokens into one dimension of rows; logits of the rows; route; "
        "dispatch without a capacity; back into texts. balance_loss wants logits, chosen and a mask by "
        "texts.",
        "`x.flatten(0, 1)` gives the rows (B·T, M), `.unflatten(0, (B, T))` goes back. There is no padding: "
        "the mask is True everywhere.",
        "`loss`: only the places in `asked` count. `logits.gather(1, index)` needs an index of three "
        "dimensions: `asked[..., None].expand(-1, -1, V)`; `logits[torch.arange(B)[:, None], asked]` does "
        "the same. F.cross_entropy takes (B·P, V) and (B·P,).",
    ),
)


def model_names(t: CheckContext, layers: Answer, parts: Any) -> list[str]:
    """The pattern, if it is allowed; else the end of the round."""
    kinds = layer_kinds()
    got = layers(kinds, N_LAYERS, layer_budget(), LONG - 1, parts)
    if not isinstance(got, list | tuple) or not all(each in kinds for each in got):
        t.note(f"{got}"[:200], Difference("", f"names of kinds {list(kinds)}", f"{got}"[:200]))
        raise Stop
    counts = {name: list(got).count(name) for name in kinds}
    violated = allowed(kinds, counts, layer_budget(), math.inf, LONG - 1)
    if len(got) != N_LAYERS:
        violated = f"{len(got)} layers"
    t.true(not violated, f"{N_LAYERS} layers that are allowed", f"{violated} by {', '.join(got)}")
    if violated:
        raise Stop
    return list(got)


def model_layer(t: CheckContext) -> Layer:
    """A mixture of experts with drawn weights and a bias that matters."""
    layer = Layer().requires_grad_(False)
    for weight in (layer.router, layer.up, layer.down):
        weight.copy_(t.randn(*weight.shape) * WIDTH**-0.5)
    layer.bias = t.randn(N_EXPERTS) * 0.3
    return layer


def model_experts(t: CheckContext, feed_forward: Answer, parts: Any) -> None:
    """y and the balance of some texts, compared with loops."""
    while True:
        layer, x = model_layer(t), t.randn(2, t.integer(5, 7), WIDTH)
        # The texts prefer opposite experts, so that a balance over both together differs; the bias matters.
        x = x + t.randn(WIDTH) * torch.tensor([1.0, -1.0])[:, None, None]
        logits = x @ layer.router.T
        weights, chosen = route_reference(logits.flatten(0, 1), layer.bias, layer.k)
        every = torch.ones(x.shape[:2], dtype=torch.bool)
        want_balance = balance_reference(logits, chosen.view(*every.shape, -1), every)
        together = balance_reference(logits.flatten(0, 1)[None], chosen[None], every.view(1, -1))
        _, unbiased = route_reference(logits.flatten(0, 1), torch.zeros(N_EXPERTS), layer.k)
        if want_balance - together > 0.05 and not torch.equal(unbiased.sort(1)[0], chosen.sort(1)[0]):
            break
    want = [
        torch.stack([w * layer.expert(int(e), row) for w, e in zip(ws, es, strict=True)]).sum(0)
        for row, ws, es in zip(x.flatten(0, 1), weights, chosen, strict=True)
    ]
    y, balance = t.pair(feed_forward(x, layer, parts), "a pair (y, balance)")
    t.close(y, torch.stack(want).view_as(x), "y:", tolerance=1e-3)
    t.close(balance, want_balance, "balance:", tolerance=1e-3)


@model.requirement(1, "layers", rounds=1)
def model_layers(t: CheckContext, layers: Answer, feed_forward: Answer, loss: Answer) -> None:
    """as many names as layers, that store no more than the budget and reach the needle"""
    model_names(t, layers, workbench.library(TRAINING))


@model.requirement(2, "feed_forward")
def model_feed_forward(t: CheckContext, layers: Answer, feed_forward: Answer, loss: Answer) -> None:
    """the outputs of the experts of each token, (B, T, M), and the balance of the texts; x not changed"""
    model_experts(t, feed_forward, workbench.library(TRAINING))
    t.unchanged()


@model.requirement(1, "loss")
def model_loss(t: CheckContext, layers: Answer, feed_forward: Answer, loss: Answer) -> None:
    """the mean of −log p(answer) over the places asked, and 0.01 · balance; with gradients to both"""
    texts = TASK.texts(t.integer(2, 4), t.generator)
    logits = t.randn(*texts.tokens.shape, TASK.vocab_size).requires_grad_()
    balance = (5 + 5 * t.randn(()).abs()).requires_grad_()
    rows = zip(logits, texts.asked, texts.answers, strict=True)
    each = [
        -row[place].log_softmax(-1)[answer]
        for row, places, answers in rows
        for place, answer in zip(places, answers, strict=True)
    ]
    want = torch.stack(each).mean() + 0.01 * balance
    got = loss(logits, texts.asked, texts.answers, balance)
    if t.close(got, want.detach(), "loss", tolerance=1e-3):
        if not t.true(got.requires_grad, "a loss with a gradient", "one without"):
            raise Stop
        grads = torch.autograd.grad(got, (logits, balance), allow_unused=True)
        wanted = torch.autograd.grad(want, (logits, balance))
        for name, ours, grad in zip(("logits", "balance"), grads, wanted, strict=True):
            if t.true(ours is not None, f"a gradient of {name}", "none") and ours is not None:
                t.close(100 * ours, 100 * grad, f"100 · gradient of {name}:")


@model.requirement(1, "your route and dispatch", rounds=1)
def model_yours_moe(t: CheckContext, layers: Answer, feed_forward: Answer, loss: Answer) -> None:
    """07.3 is solved, and feed_forward with it gives the same outputs"""
    model_experts(t, feed_forward, workbench.theirs(model, t.notebook, "route", "dispatch"))


@model.requirement(1, "your balance_loss and design", rounds=1)
def model_yours_design(t: CheckContext, layers: Answer, feed_forward: Answer, loss: Answer) -> None:
    """07.4 and 07.7 are solved; with them the same balance, and layers that are allowed"""
    parts = workbench.theirs(model, t.notebook, "balance_loss", "design")
    model_names(t, layers, parts)
    model_experts(t, feed_forward, parts)


@model.requirement(1, "all your parts, trained", rounds=1)
def model_trained(t: CheckContext, layers: Answer, feed_forward: Answer, loss: Answer) -> None:
    """with every part yours, at most 300 steps: more than 90% of the answers right on new texts; a full layer
    between the others learns faster than one at the end"""
    parts = workbench.theirs(model, t.notebook, *TRAINING.parts)
    names = model_names(t, layers, parts)
    before = len(t.observations)
    model_experts(t, feed_forward, parts)  # a mistake is seen here at once
    model_loss(t, layers, feed_forward, loss)
    if any(observation.difference for observation in t.observations[before:]):
        raise Stop
    numbers = train_hybrid({"layers": layers, "feed_forward": feed_forward, "loss": loss}, parts).numbers
    right = numbers["right answers on new texts"]
    came = f"{right} by {', '.join(names)}"
    t.true(int(right.rstrip("%")) > 90, "more than 90% right answers", came)


EXERCISES = (table, place, moe, balance, convert, transpose, design, model)
