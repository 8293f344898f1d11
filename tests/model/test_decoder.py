"""The decoder, its generation and its checkpoints."""

import copy
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvlearn.attention import (
    DynamicScaling,
    GroupedQueryAttention,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from kvlearn.kernels import decode_attention
from kvlearn.model import Decoder, ModelConfig, MoEConfig, Spec, card, load, save
from kvlearn.model.checkpoints import FORMAT, checksum
from kvlearn.model.generation import sample

SMALL = ModelConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=3, d_ff=32)


def decoder(config: ModelConfig = SMALL, seed: int = 0) -> Decoder:
    """A decoder whose weights are large enough that the next token is not a toss-up."""
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    for weight in model.parameters():
        weight.data.mul_(8.0 if weight.dim() > 1 else 1.0)
    return model


def prompt(batch: int = 2, time: int = 9) -> Tensor:
    return torch.randint(0, 50, (batch, time), generator=torch.Generator().manual_seed(1))


def test_cache_and_no_cache_generate_the_same_tokens() -> None:
    model = decoder()
    expected = model.generate(prompt(), 25, use_cache=False)
    assert expected.shape == (2, 34)
    assert torch.equal(expected[:, :9], prompt())
    assert torch.equal(model.generate(prompt(), 25), expected)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 100])
def test_prefill_in_chunks_generates_the_same_tokens(chunk: int) -> None:
    model = decoder()
    assert torch.equal(model.generate(prompt(), 15, chunk=chunk), model.generate(prompt(), 15))


def test_sampling_is_repeatable_by_its_seed_alone() -> None:
    model = decoder()
    first = model.generate(prompt(), 30, temperature=1.5, seed=1)
    torch.manual_seed(99)
    assert torch.equal(model.generate(prompt(), 30, temperature=1.5, seed=1), first)
    assert not torch.equal(model.generate(prompt(), 30, temperature=1.5, seed=2), first)


def test_sampling_follows_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0]).log_softmax(-1).expand(20_000, 3)
    drawn = sample(logits, 2.0, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 2).softmax(-1), atol=0.015, rtol=0)


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    logits = torch.tensor([0.15, 0.5, 0.3, 0.05]).log().expand(5000, 4)

    def kept(p: float) -> set[int]:
        return set(sample(logits, 1.0, p, torch.Generator().manual_seed(0)).tolist())

    assert kept(0.4) == {1}
    assert kept(0.5) == {1}
    assert kept(0.6) == {1, 2}
    assert kept(0.9) == {0, 1, 2}
    assert kept(1.0) == {0, 1, 2, 3}


def test_the_pattern_of_layers_repeats_to_the_depth() -> None:
    config = ModelConfig(n_layers=5, layers=("full", Spec("full", rope=None)))
    assert [spec.options for spec in config.specs] == [{}, {"rope": None}, {}, {"rope": None}, {}]
    assert Decoder(config).mixers[1].rope.config is None  # type: ignore[union-attr]


def test_tied_weights_are_one_matrix() -> None:
    tied, untied = decoder(), decoder(ModelConfig(**{**vars(SMALL), "tied": False}))
    assert tied.head.weight is tied.embed.weight
    assert untied.n_parameters - tied.n_parameters == 50 * 24


def test_the_table_counts_what_is_allocated() -> None:
    model = decoder()
    *rows, total = model.table(64, batch=2, dtype=torch.bfloat16)
    assert len(rows) == 3
    assert total["stored"] == model.new_cache(2, 64, dtype=torch.bfloat16).nbytes == 3 * 2 * 2 * 64 * 24 * 2
    assert total["read"] == sum(row["read"] for row in rows)


def test_rows_of_different_length_continue_as_if_alone() -> None:
    model, lengths = decoder(), [9, 4]
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        model(prompt(), cache)
        cache.trim(torch.tensor(lengths))
        step = model(prompt()[:, :1], cache)[:, 0]
        for row, length in enumerate(lengths):
            alone = torch.cat((prompt()[row, :length], prompt()[row, :1]))[None]
            torch.testing.assert_close(step[row], model(alone)[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        None,
        RopeConfig(5e5, LinearScaling(2.0)),
        RopeConfig(5e5, Llama3Scaling(8.0, 1.0, 4.0, 64)),
        RopeConfig(1e4, YarnScaling(4.0, 64)),
        RopeConfig(1e4, YarnScaling(4.0, 64, truncate=False)),
        RopeConfig(1e4, DynamicScaling(3.0, 16)),
        RopeConfig(1e4, LongRopeScaling((1.0, 1.5, 2.0), (2.0, 3.0, 5.0), 16, 1.2)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, rope: RopeConfig | None, tied: bool) -> None:
    config = ModelConfig(
        **{
            **vars(SMALL),
            "rope": rope,
            "tied": tied,
            "layers": (Spec("full", head_dim=6), Spec("full", rope=RopeConfig(5e5))),
        }
    )
    model = decoder(config)
    save(model, tmp_path / "deep" / "model.safetensors", {"seed": 3})
    again = load(tmp_path / "deep" / "model.safetensors")
    assert again.config == config
    assert torch.equal(again(prompt()), model(prompt()))
    assert card(tmp_path / "deep" / "model.safetensors") == {"seed": 3}
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


def test_half_precision_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    model = decoder().bfloat16()
    save(model, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").embed.weight.dtype == torch.bfloat16


def damaged(path: Path, how: str) -> Path:
    """A checkpoint that is wrong in one way."""
    save(decoder(), path)
    content = path.read_bytes()
    weights = {name: t for name, t in decoder().state_dict().items() if name != "head.weight"}
    match how:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no checkpoint at all")
        case "foreign":
            save_file({"weight": torch.zeros(3)}, path)
        case "no mechanism of ours":
            written(path, weights, config={**SMALL.to_dict(), "layers": [["fool", {}]]})
        case "no size":
            written(path, weights, config={**SMALL.to_dict(), "d_model": -4})
        case "whole numbers":
            written(path, {name: t.int() for name, t in weights.items()})
        case "a missing tensor":
            del weights["norm.weight"]
            written(path, weights)
        case "another shape":
            written(path, {**weights, "norm.weight": torch.ones(7)})
        case "no checksum":
            save_file(weights, path, {"format": FORMAT, "config": json.dumps(SMALL.to_dict()), "card": "{}"})
    return path


def written(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None, card: str = "{}"
) -> None:
    """A checkpoint with the right checksum, whatever it holds."""
    texts = {"format": FORMAT, "config": json.dumps(config or SMALL.to_dict()), "card": card}
    save_file(weights, path, {**texts, "sha256": checksum(texts, weights)})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "damaged"),
        ("empty", "damaged"),
        ("text", "damaged"),
        ("foreign", "not a decoder of kvlearn"),
        ("no mechanism of ours", "'fool'"),
        ("no size", "cannot build: d_model"),
        ("whole numbers", "no weights of one floating-point type"),
        ("a missing tensor", "'norm.weight' is missing"),
        ("no checksum", "damaged: .* written is none"),
        ("another shape", r"'norm.weight' expected with shape \(24,\), got \(7,\)"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_named(tmp_path: Path, how: str, says: str) -> None:
    path = damaged(tmp_path / "model.safetensors", how)
    with pytest.raises(ValueError, match=says) as refused:
        load(path)
    assert "model.safetensors" in str(refused.value)


def test_a_missing_file_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"n": 0}, ValueError, "n: expected at least 1"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "tokens"),
        ({"tokens": torch.zeros(5, dtype=torch.long)}, ValueError, "tokens"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens"),
    ],
)
def test_generate_refuses_nonsense_by_name(
    options: dict[str, object], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        decoder().generate(**{"tokens": prompt(), "n": 3, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"n_layers": 0}, "n_layers"),
        ({"layers": ()}, "layers"),
        ({"layers": 4 * ("full",)}, "n_layers"),
        ({"d_ff": -1}, "d_ff"),
        ({"layers": ("fool",)}, "layers: expected one of 'gqa', 'full'"),
        ({"d_model": 25}, "n_heads: expected a divisor of d_model=25"),
    ],
)
def test_impossible_models_are_refused_by_name(fields: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Decoder(ModelConfig(**{**vars(SMALL), **fields}))  # type: ignore[arg-type]


def test_an_option_that_a_mechanism_lacks_is_refused_by_name() -> None:
    names = "expected one of 'n_heads', 'head_dim', 'rope'"
    with pytest.raises(ValueError, match=f"layers: option of 'full': {names}"):
        Spec("full", window=3)


def test_what_was_generated_can_be_trained_on() -> None:
    model = decoder()
    model(model.generate(prompt(), 3)).sum().backward()
    assert model.embed.weight.grad is not None


def test_a_forward_that_was_interrupted_does_not_go_unnoticed() -> None:
    model = decoder()
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        model(prompt(), cache)
        cache.layers[0].advance(1)
        with pytest.raises(ValueError, match=r"cache: expected layers of one length, got \[10, 9, 9\]"):
            model(prompt()[:, :1], cache)


def test_bytes_are_tokens_too() -> None:
    model = decoder()
    assert torch.equal(model(prompt().to(torch.uint8)), model(prompt()))


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens: expected 0 to 49"):
        decoder()(torch.tensor([[3, 50]]))


def test_the_scale_of_embeddings_is_rounded_to_their_dtype() -> None:
    model, scale, scaled = decoder(replace(SMALL, embed_scale=24**0.5)).bfloat16(), torch.tensor(24**0.5), []
    model.embed_norm.register_forward_pre_hook(lambda _, inputs: scaled.append(inputs[0]))
    model(prompt())
    assert torch.equal(scaled[0], model.embed(prompt()) * scale.bfloat16())


def test_a_cache_of_another_model_is_refused() -> None:
    other = decoder(ModelConfig(**{**vars(SMALL), "n_layers": 2}))
    with pytest.raises(ValueError, match="cache: expected 3 layers, got 2"):
        decoder()(prompt(), other.new_cache(2, 20))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_one_token_can_be_done_by_a_decode_kernel(cache_dtype: torch.dtype) -> None:
    model, rows = decoder(), torch.tensor([9, 4])
    asked = []

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        asked.append((tuple(q.shape), k.dtype, lengths.tolist()))
        return decode_attention(q, k, v, lengths)

    results = []
    for decode in (None, step):
        model.decode_with(decode)
        cache = model.new_cache(2, 12, dtype=cache_dtype)
        with torch.no_grad():
            model(prompt(), cache)
            cache.trim(rows)
            results.append(
                torch.cat([model(token, cache) for token in prompt(time=3).split(1, dim=1)], dim=1)
            )
    torch.testing.assert_close(*results)
    assert [lengths for _, _, lengths in asked[:: len(model.blocks)]] == [[10, 5], [11, 6], [12, 7]]
    assert all(shape == (2, 3, 8) and dtype == cache_dtype for shape, dtype, _ in asked)


def test_a_model_whose_layers_take_no_decode_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GroupedQueryAttention, "decode")
    model = decoder()
    with pytest.raises(ValueError, match="step: no layer"):
        model.decode_with(decode_attention)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    """In the weights, which would load, as in the texts before them."""
    path = tmp_path / "model.safetensors"
    save(decoder(), path, {"seed": 3})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (9, header // 2, header - 20, header, header + 1001, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        for reads in (load, card):
            with pytest.raises(ValueError, match=r"path: .*model\.safetensors"):
                reads(path)
    path.write_bytes(whole[:-4] + b"\0\0\x80\x7f")
    with pytest.raises(ValueError, match="is damaged: its content has the checksum"):
        load(path)


def test_a_card_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {"embed.weight": torch.zeros(2)}
    for text, says in (("{", "expected JSON"), ("[" * 100_000, "too deeply"), ("[1]", "got list")):
        written(path, weights, card=text)
        with pytest.raises(ValueError, match=rf"path: the card of .*model\.safetensors: .*{says}"):
            card(path)


def test_a_card_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    for value in (torch.zeros(2), float("nan"), {1, 2}):
        with pytest.raises(ValueError, match="card: expected a mapping that JSON can hold"):
            save(decoder(), tmp_path / "x", {"value": value})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_named_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"path: could not write .*model\.safetensors: .*[Ff]ile too large"):
            save(decoder(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_loaded_decoder_is_in_evaluation_mode(tmp_path: Path) -> None:
    save(decoder().train(), tmp_path / "model.safetensors")
    assert not any(module.training for module in load(tmp_path / "model.safetensors").modules())


def test_the_default_width_of_the_feed_forward_is_a_multiple_of_32() -> None:
    for d_model, d_ff in ((128, 352), (96, 256), (12, 32), (16, 64)):
        assert ModelConfig(d_model=d_model).d_ff == d_ff  # 8/3 · d_model: 341.3, 256, 32, 42.7


def test_weights_that_add_up_over_the_layers_begin_smaller() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=128, n_layers=2, layers=("gqa",), experts=MoEConfig(4, 2, 96)))
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            adds_up = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.01 if adds_up else 0.02, rel=0.05), name


def test_a_tied_head_stays_tied_whatever_replaces_the_parameters(tmp_path: Path) -> None:
    weights = decoder().state_dict()
    without_head = {name: t for name, t in weights.items() if name != "head.weight"}
    copies = {name: t.clone() for name, t in weights.items()}
    save(decoder(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = [Decoder(SMALL) for _ in range(4)]
    empty[0].load_state_dict(weights, assign=True)
    empty[1].load_state_dict(copies, assign=True)
    empty[2].load_state_dict(without_head, assign=True)
    within = {f"of.{name}": t for name, t in copies.items()}
    torch.nn.ModuleDict({"of": empty[3]}).load_state_dict(within, assign=True)
    with torch.device("meta"):
        emptied = Decoder(SMALL)
    emptied.to_empty(device="cpu")
    emptied.load_state_dict(copies)
    models = [*empty, emptied, decoder(), decoder().double().float(), load(tmp_path / "model.safetensors")]
    for model in (*models, *map(copy.deepcopy, models)):
        assert model.head.weight is model.embed.weight
        assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
        assert torch.equal(model.head.weight, weights["head.weight"])
        assert model.n_parameters == decoder().n_parameters


def test_two_matrices_are_not_loaded_into_a_tied_head() -> None:
    weights = {**decoder().state_dict(), "head.weight": torch.ones(50, 24)}
    for options in ({}, {"assign": True}, {"strict": False}):
        with pytest.raises(ValueError, match=r"state_dict: expected head\.weight equal to embed\.weight"):
            decoder().load_state_dict(weights, **options)
    decoder(ModelConfig(**{**vars(SMALL), "tied": False})).load_state_dict(weights)


@pytest.mark.slow
def test_a_decoder_is_one_graph_in_training_and_in_decode() -> None:
    command = [sys.executable, str(Path(__file__).with_name("one_graph.py"))]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_field_of_the_wrong_type_is_refused_by_name() -> None:
    wrong = {
        "layers": (None, "full", 3, {"full"}),
        "norm_eps": (-1.0, float("nan"), float("inf"), "1e-5", None),
        "rope": (10_000.0, "rope"),
        "experts": (4, {"n_experts": 4}),
        "tied": (None, 1),
        "embed_scale": (float("nan"), None),
        "logit_softcap": (0.0, float("nan"), "30"),
        "stop_tokens": (3, "</s>", (1.5,), (None,)),
        "pad_token": (1.5, "pad"),
        "dense_layers": (0, (5,), (1.5,)),
        "vocab_size": (None, 2.0, True, 0),
        "norm": (None, ["rms"], "batch"),
        "activation": (torch.zeros(2), "tanh"),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
                ModelConfig(**{**vars(SMALL), name: value})  # type: ignore[arg-type]
