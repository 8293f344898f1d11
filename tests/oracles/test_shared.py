"""Shared KV against transformers: grouped heads as in Llama, layers that read others as in Gemma 3n and 4."""

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma3nTextConfig,
    Gemma3nTextModel,
    Gemma4TextConfig,
    Gemma4TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache

import kvlearn
from kvlearn.attention import KV, Cache, GroupedQueryAttention, RopeConfig
from kvlearn.model import Decoder, ModelConfig, Spec

POOLS = [(4, 1), (4, 2), (6, 1), (6, 2), (6, 3)]  # query heads, KV heads
LENGTH = 26


def redrawn(model: nn.Module, seed: int = 0) -> Any:
    """Every weight drawn anew: gains too, which are all ones at first."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.2)
    return model.eval()


def llama(n_heads: int, n_kv_heads: int, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return redrawn(LlamaForCausalLM(config))


def prompt(batch: int = 2, time: int = 40) -> Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), POOLS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_weights_give_llamas_logits(n_heads: int, n_kv_heads: int, tied: bool) -> None:
    theirs = llama(n_heads, n_kv_heads, tied)
    ours = kvlearn.from_transformers(theirs)
    assert [mixer.name for mixer in ours.mixers] == 3 * ["gqa"]
    with torch.no_grad():
        close(ours(prompt()), theirs(prompt()).logits)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), POOLS)
def test_chunks_and_single_tokens_follow_llamas_cache(n_heads: int, n_kv_heads: int) -> None:
    theirs, tokens = llama(n_heads, n_kv_heads), prompt()
    ours = kvlearn.from_transformers(theirs)
    cache, their_cache = ours.new_cache(2, 40), DynamicCache()
    with torch.no_grad():
        for piece in (tokens[:, :23], tokens[:, 23:30], *tokens[:, 30:].split(1, dim=1)):
            expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
            close(ours(piece, cache), expected)
    for layer, their_layer in zip(cache.layers, their_cache.layers, strict=True):
        for mine, other in zip(layer.tensors(), (their_layer.keys, their_layer.values), strict=True):
            close(mine, other)
    full = kvlearn.from_transformers(llama(n_heads, n_heads)).new_cache(2, 40).nbytes
    assert cache.nbytes * n_heads == full * n_kv_heads
    assert cache.nbytes == sum(x.keys.nbytes + x.values.nbytes for x in their_cache.layers)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), POOLS)
def test_greedy_generation_is_llamas(n_heads: int, n_kv_heads: int) -> None:
    theirs, tokens = llama(n_heads, n_kv_heads), prompt(1, 12)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert torch.equal(kvlearn.from_transformers(theirs).generate(tokens, 20, chunk=5, stop=()), expected)


# Which of Gemma's layers are sliding (s) and full (f), and how many of the last have no keys and values.
STACKS = [
    ("sfsf" + "sff", 3),
    ("ssfssf" + "ssfsf", 5),
    ("sf" + "f", 1),
    ("fsssf" + "ssssf", 5),
    ("sfs" + "f", 1),
]
KINDS = {"s": "sliding_attention", "f": "full_attention"}
# A sliding layer is full here (its window is longer than the text): what tells the two is how they rotate.
THETA = {"s": 1e4, "f": 1e6}
N_HEADS, N_KV_HEADS, HEAD_DIM, D_MODEL = 6, 2, 8, 24


def gemma(version: str, kinds: str, n_shared: int) -> PreTrainedModel:
    """A tiny text model whose last ``n_shared`` layers read others' keys and values."""
    options: dict[str, Any] = {
        "vocab_size": 61,
        "vocab_size_per_layer_input": 61,
        "hidden_size": D_MODEL,
        "intermediate_size": 32,
        "num_hidden_layers": len(kinds),
        "layer_types": [KINDS[kind] for kind in kinds],
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": n_shared,
        "sliding_window": 2 * LENGTH,
        "rope_parameters": {
            KINDS[kind]: {"rope_type": "default", "rope_theta": theta} for kind, theta in THETA.items()
        },
    }
    if version == "4":
        return redrawn(Gemma4TextModel(Gemma4TextConfig(**options, global_head_dim=HEAD_DIM)))
    config = Gemma3nTextConfig(**options, laurel_rank=4, activation_sparsity_pattern=len(kinds) * [0.0])
    return redrawn(Gemma3nTextModel(config))


def config_of(kinds: str, n_shared: int) -> ModelConfig:
    """The same stack as ours."""
    first = len(kinds) - n_shared
    layers = tuple(
        Spec("gqa", n_kv_heads=N_KV_HEADS, rope=RopeConfig(THETA[kind]), reads="last" if i >= first else None)
        for i, kind in enumerate(kinds)
    )
    return ModelConfig(61, D_MODEL, len(kinds), N_HEADS, HEAD_DIM, layers=layers)


class Recorded(dict[int, list[tuple[Tensor, Tensor]]]):
    """Inputs and outputs of each attention of a Gemma, pass by pass, and the keys that it read."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__({i: [] for i in range(len(model.layers))})
        self.keys: dict[int, list[Tensor]] = defaultdict(list)
        for i, layer in enumerate(model.layers):
            layer.self_attn.register_forward_hook(self.hook(i), with_kwargs=True)

    def hook(self, i: int) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            self[i].append((x, out[0]))
            keys = kwargs["shared_kv_states"].get(module.layer_type)
            if keys is not None:  # left there by this layer, or by the one that it reads
                self.keys[i].append(keys[0])

        return record

    def owner(self, i: int) -> int:
        """The first layer that read the same keys as layer ``i``."""
        return min(j for j in self.keys if self.keys[j][0] is self.keys[i][0]) if i in self.keys else i


@pytest.mark.parametrize("version", ["3n", "4"])
@pytest.mark.parametrize(("kinds", "n_shared"), STACKS)
def test_layers_read_the_same_layers_as_in_gemma(version: str, kinds: str, n_shared: int) -> None:
    model = gemma(version, kinds, n_shared)
    recorded = Recorded(model)
    with torch.no_grad():
        model(prompt(1, 3))
    owners = config_of(kinds, n_shared).owners
    assert owners == [recorded.owner(i) for i in range(len(kinds))]
    assert [i for i, owner in enumerate(owners) if i != owner] == [
        i for i, layer in enumerate(model.layers) if layer.self_attn.is_kv_shared_layer
    ]


class HeadNorm(nn.Module):
    """RMSNorm of every head, after its projection, times ``factor``."""

    def __init__(self, theirs: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps, self.factor = getattr(theirs, "weight", None), theirs.eps, factor

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, HEAD_DIM))
        return F.rms_norm(heads, (HEAD_DIM,), self.weight, self.eps).flatten(-2) * self.factor


class GemmaAttention(GroupedQueryAttention):
    """Ours with Gemma's norms. Its scores are not divided by √D, so that queries come multiplied by it."""

    def __init__(self, theirs: Any, rope: RopeConfig) -> None:
        reader = theirs.is_kv_shared_layer
        super().__init__(D_MODEL, N_HEADS, n_kv_heads=N_KV_HEADS, head_dim=HEAD_DIM, rope=rope, reader=reader)
        self.q_proj = nn.Sequential(theirs.q_proj, HeadNorm(theirs.q_norm, HEAD_DIM**0.5))  # type: ignore[assignment]
        if not reader:
            self.k_proj = nn.Sequential(theirs.k_proj, HeadNorm(theirs.k_norm))  # type: ignore[assignment]
            self.v_proj = nn.Sequential(theirs.v_proj, HeadNorm(theirs.v_norm))  # type: ignore[assignment]
        self.o_proj = theirs.o_proj


@pytest.mark.parametrize("version", ["3n", "4"])
@pytest.mark.parametrize("split", [[LENGTH], [9, 4, *[1] * (LENGTH - 13)], [1] * LENGTH], ids=len)
@torch.no_grad()
def test_owners_and_readers_attend_as_in_gemma(version: str, split: list[int]) -> None:
    """Each attention of a whole Gemma: in one pass, in chunks and token by token, with both their caches."""
    kinds, n_shared = STACKS[0]
    model, config = gemma(version, kinds, n_shared), config_of(kinds, n_shared)
    recorded, their_cache = Recorded(model), DynamicCache(config=model.config)
    for piece in prompt(2, LENGTH).split(split, dim=1):
        model(piece, past_key_values=their_cache, use_cache=True)
    layers = [
        GemmaAttention(theirs.self_attn, spec.options["rope"])
        for theirs, spec in zip(model.layers, config.specs, strict=True)
    ]
    caches: list[Cache] = [layer.new_cache(2, LENGTH) for layer in layers]
    for step in range(len(split)):
        sources: dict[int, KV] = {}
        for i, owner in enumerate(config.owners):
            x, expected = recorded[i][step]
            if config.owners.count(i) > 1:
                sources[i] = layers[i].project_kv(x, caches[i])
            close(layers[i](x, caches[i], sources.get(owner)), expected)

    for i, (cache, theirs) in enumerate(zip(caches, their_cache.layers, strict=True)):
        if config.owners[i] == i:
            close(cache.tensors()[0], theirs.keys)
            close(cache.tensors()[1], theirs.values)
            assert cache.nbytes == theirs.keys.nbytes + theirs.values.nbytes > 0
        else:
            assert getattr(theirs, "keys", None) is None
            assert cache.nbytes == layers[i].cache_bytes(LENGTH, batch=2) == 0


@torch.no_grad()
def test_a_reader_of_the_other_kind_of_layer_would_be_detected() -> None:
    """The test above can fail: keys of the wrong owner give other numbers."""
    kinds, n_shared = STACKS[0]
    model, config = gemma("4", kinds, n_shared), config_of(kinds, n_shared)
    recorded = Recorded(model)
    model(prompt(2, LENGTH))
    reader = GemmaAttention(model.layers[4].self_attn, RopeConfig(THETA["s"]))
    x, expected = recorded[4][0]
    for i in (0, 1, 2, 3):
        owner = GemmaAttention(model.layers[i].self_attn, config.specs[i].options["rope"])
        error = (reader(x, source=owner.project_kv(recorded[i][0][0])) - expected).abs().max()
        assert (error < 1e-5) == (i == config.owners[4] == 2)


@pytest.mark.parametrize("version", ["3n", "4"])
def test_gemmas_readers_have_the_weights_that_ours_have(version: str) -> None:
    kinds, n_shared = STACKS[0]
    ours = Decoder(config_of(kinds, n_shared))
    for theirs, mixer in zip(gemma(version, kinds, n_shared).layers, ours.mixers, strict=True):
        names = {name for name, _ in theirs.self_attn.named_parameters() if name.endswith("proj.weight")}
        assert names == {name for name, _ in mixer.named_parameters()}
