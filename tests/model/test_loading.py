"""Loading models of transformers: folders, damaged files, tensors that do not fit, memory and time."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import kvlearn
from kvlearn.attention import LinearScaling
from kvlearn.model import loading


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **heads, **options})).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path)
    return tmp_path


def prompt() -> Tensor:
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """The folder's tensors after ``edit``."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(folder: Path, names: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=names):
        kvlearn.from_transformers(folder)


def test_a_folder_in_shards_is_loaded(tmp_path: Path) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(
            kvlearn.from_transformers(str(tmp_path))(prompt()), theirs(prompt()).logits
        )


def test_no_weight_of_a_file_is_copied(folder: Path) -> None:
    """Its memory is the file's, mapped; what is written to it does not reach the file."""
    before = (folder / "model.safetensors").read_bytes()
    ours = kvlearn.from_transformers(folder)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
    ]
    for name, weight in ours.named_parameters():
        assert any(start <= weight.data_ptr() < end for start, end in mapped), name
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_in_memory_stays_independent() -> None:
    theirs = llama()
    ours = kvlearn.from_transformers(theirs)
    with torch.no_grad():
        expected = theirs(prompt()).logits.clone()
        for weight in ours.parameters():
            weight.zero_()
        assert torch.equal(theirs(prompt()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype_and_angles_stay_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs: Any = llama()
    theirs = theirs.to(dtype)
    theirs.save_pretrained(tmp_path)
    for ours in (kvlearn.from_transformers(theirs), kvlearn.from_transformers(tmp_path)):
        assert {weight.dtype for weight in ours.parameters()} == {dtype}
        assert ours.mixers[0].rope.omega.on(torch.device("cpu")).dtype == torch.float64
        assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))


def test_tied_weights_are_one_matrix_whether_the_file_has_one_or_two(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    ours = kvlearn.from_transformers(tmp_path)
    assert ours.head.weight is ours.embed.weight
    change(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    with torch.no_grad():
        assert torch.equal(kvlearn.from_transformers(tmp_path)(prompt()), ours(prompt()))


def test_a_second_matrix_that_differs_is_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    change(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    theirs, ours = LlamaForCausalLM.from_pretrained(tmp_path).eval(), kvlearn.from_transformers(tmp_path)
    assert not ours.config.tied
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt()), theirs(prompt()).logits)


def test_stop_tokens_come_from_the_generation_configuration_first(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    change_config(folder, eos_token_id=3)
    assert kvlearn.from_transformers(folder).config.stop_tokens == (3,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5], "pad_token_id": 6}))
    config = kvlearn.from_transformers(folder).config
    assert (config.stop_tokens, config.pad_token) == ((4, 5), 6)
    change_config(folder, eos_token_id=None)
    (folder / "generation_config.json").write_text("{}")
    assert kvlearn.from_transformers(folder).config.stop_tokens == ()


def test_old_spellings_of_rope_are_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    old = {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps({**config, **old}))
    rope = kvlearn.from_transformers(folder).config.rope
    assert rope is not None
    assert (rope.theta, rope.scaling) == (777.0, LinearScaling(2.0))


def test_a_saved_decoder_is_what_was_loaded(folder: Path, tmp_path: Path) -> None:
    ours = kvlearn.from_transformers(folder)
    kvlearn.model.save(ours, tmp_path / "ours.safetensors")
    again = kvlearn.model.load(tmp_path / "ours.safetensors")
    assert again.config == ours.config
    with torch.no_grad():
        assert torch.equal(again(prompt()), ours(prompt()))


def test_a_missing_folder_or_configuration_is_said(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "model_or_path: no folder", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json", FileNotFoundError)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", loading.INDEX])
def test_a_file_that_is_no_json_object_is_refused_by_name(folder: Path, name: str) -> None:
    for content in (b"", b"{", b"[1]", b"\0", b"\xff", b"3", b"[" * 100_000):
        (folder / name).write_bytes(content)
        refused(folder, rf"model_or_path: .*{re.escape(name)}: expected")


def test_a_folder_without_weights_is_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "model_or_path: expected safetensors files in .*, got none")


@pytest.mark.parametrize("path", [None, 3, b"folder", ["folder"]])
def test_what_is_no_model_and_no_path_is_refused_by_name(path: Any) -> None:
    with pytest.raises(ValueError, match="model_or_path: expected a model of"):
        kvlearn.from_transformers(path)


@pytest.mark.parametrize("model_type", ["gpt7", None, 3, ["llama"]])
def test_an_unknown_family_is_refused_by_name(folder: Path, model_type: Any) -> None:
    change_config(folder, model_type=model_type)
    refused(folder, re.escape(f"model_type {model_type!r}"))


@pytest.mark.parametrize("stop", ["</s>", 1.5, [[1]], [1, None]])
def test_stop_tokens_that_are_no_integers_are_refused(folder: Path, stop: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    refused(folder, "eos_token_id: expected integers")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_its_field(
    folder: Path, fields: dict[str, Any], names: str
) -> None:
    change_config(folder, **fields)
    refused(folder, names)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (lambda w: w.pop(UP), f"tensor '{UP}' is missing"),
        (lambda w: w.pop("lm_head.weight"), r"tensor 'lm_head\.weight' is missing"),
        (lambda w: w.update({"model.extra": torch.ones(2)}), r"tensor 'model\.extra' is not expected"),
        (lambda w: w.update({f"{UP[:-6]}bias": torch.ones(20)}), r"up_proj\.bias' is not expected"),
        (lambda w: w.update({UP.replace("1", "2"): w[UP].clone()}), r"layers\.2.* is not expected"),
        (
            lambda w: w.update({UP: w[UP][:-1].clone()}),
            rf"'{UP}' expected with shape \(20, 12\), got \(19, 12\)",
        ),
        (lambda w: w.update({UP: w[UP].half()}), f"'{UP}' expected as torch.float32.*got torch.float16"),
        (lambda w: w.update({UP: w[UP].int()}), f"'{UP}' expected of torch.bfloat16.*got torch.int32"),
        (
            lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)}),
            f"'{UP}' expected of .*got torch.float8_e4m3fn",
        ),
        (lambda w: w.update({UP.replace("1", "01"): w[UP].clone()}), r"layers\.01.* is not expected"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(folder: Path, edit: Any, names: str) -> None:
    change(folder, edit)
    refused(folder, names)


EXPERT = "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (
            lambda w: w.update({f"{EXPERT}.gate_up_proj": torch.ones(3, 40, 12)}),
            "experts.*is also there as .*experts|is not expected",
        ),
        (
            lambda w: w.update({f"{EXPERT}.01.w1.weight": w.pop(f"{EXPERT}.1.w1.weight")}),
            r"01\.w1.*not expected",
        ),
        (lambda w: w.update({f"{EXPERT}.3.w1.weight": w[f"{EXPERT}.1.w1.weight"].clone()}), "there are 3"),
        (lambda w: w.pop(f"{EXPERT}.1.w2.weight"), rf"'{EXPERT}\.1\.w2\.weight' is missing"),
        (
            lambda w: w.update(
                {"model.layers.0.mlp.experts.1.up_proj.weight": w[f"{EXPERT}.1.w3.weight"].clone()}
            ),
            "is also there as",
        ),
    ],
)
def test_experts_are_each_there_once(tmp_path: Path, edit: Any, names: str) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    MixtralForCausalLM(MixtralConfig(vocab_size=31, **sizes, **heads)).save_pretrained(tmp_path)
    change(tmp_path, edit)
    refused(tmp_path, names)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(folder: Path, keep: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    refused(folder, r"model\.safetensors: damaged")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip file", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{broken}"]
)
def test_a_file_of_another_kind_is_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors: damaged")


def test_pickled_weights_are_refused_and_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    refused(folder, r"pytorch_model\.bin, which is pickled")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "expected safetensors files")


@pytest.mark.parametrize(
    ("index", "names"),
    [
        ({}, "weight_map"),
        ({"weight_map": {"a": "model-2.safetensors"}}, r"no safetensors file 'model-2\.safetensors'"),
        ({"weight_map": {"a": "../model.safetensors"}}, "no safetensors file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, r"no safetensors file 'pytorch_model\.bin'"),
        ({"weight_map": {"a": 3}}, "weight_map"),
    ],
)
def test_an_index_of_files_that_are_not_there_is_refused(folder: Path, index: Any, names: str) -> None:
    (folder / "pytorch_model.bin").touch()
    (folder / loading.INDEX).write_text(json.dumps(index))
    refused(folder, names)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({UP: weights[UP]}, folder / "other.safetensors")
    index = {"weight_map": {**dict.fromkeys(weights, "model.safetensors"), UP: "other.safetensors"}}
    (folder / loading.INDEX).write_text(json.dumps(index))
    refused(folder, f"tensor '{UP}' is also in")


def test_a_hundred_megabytes_load_in_two_seconds(tmp_path: Path) -> None:
    theirs = llama(hidden_size=768, intermediate_size=2048, num_hidden_layers=4)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 100e6
    kvlearn.from_transformers(tmp_path)  # imports transformers
    start = time.process_time()
    kvlearn.from_transformers(tmp_path)
    assert time.process_time() - start < 2
