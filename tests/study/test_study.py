"""The corpus, the training loop and the evaluation."""

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvlearn.model import Decoder, ModelConfig
from kvlearn.study import TrainConfig, corpus, evaluate, train, windows
from kvlearn.study.text import split_of
from kvlearn.study.training import parameter_groups

SMALL = ModelConfig(d_model=24, n_layers=2, n_heads=3, d_ff=32)
CONFIG = TrainConfig(steps=12, batch=4, length=32, warmup=2)
KILLED = TrainConfig(steps=120, batch=2, length=16, warmup=2)


def model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(SMALL)


def text(length: int = 4000) -> Tensor:
    return torch.tensor(list(b"def f(x): return x + 1\n" * (length // 23)), dtype=torch.uint8)


def test_the_corpus_is_source_code_in_three_parts_that_share_no_file() -> None:
    parts = corpus()
    assert [round(len(part) / 1e6) for part in parts[:3]] == [14, 1, 1]
    assert b"class Symbol(" in bytes(parts.train.tolist())
    assert split_of("core/add.py") == split_of("core/add.py")
    files = [set(bytes(part.tolist()).split(b"\x00")[1:]) - {b""} for part in parts[:3]]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]


def test_another_text_is_not_taken_for_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kvlearn.study.text"]
    monkeypatch.setattr(module, "CHECKSUM", "0" * 64)
    with pytest.raises(RuntimeError, match=r"are not those of version 1\.14\.0"):
        module.corpus.__wrapped__()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    some = windows(text(), 4, 32, seed=0, step=7)
    assert some.shape == (4, 33)
    assert torch.equal(some, windows(text(), 4, 32, seed=0, step=7))
    assert not torch.equal(some, windows(text(), 4, 32, seed=0, step=8))
    assert not torch.equal(some, windows(text(), 4, 32, seed=1, step=7))


def test_training_learns() -> None:
    history = train(model(), text(), TrainConfig(steps=100, batch=4, length=32, warmup=5), progress=False)
    assert [line["step"] for line in history] == list(range(100))
    assert history[0]["loss"] == pytest.approx(math.log(256), abs=0.3)
    assert history[-1]["loss"] < 2.0


def test_weight_decay_spares_vectors_and_what_a_mechanism_names() -> None:
    mamba = Decoder(ModelConfig(d_model=24, n_layers=1, n_heads=3, layers=("mamba",)))
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(mamba, 0.1))
    mixer = mamba.mixers[0]
    assert {id(mixer.A_log), id(mixer.D), id(mamba.norm.weight)} <= spared
    assert {id(mixer.in_proj.weight), id(mamba.embed.weight)} <= decayed
    assert len(decayed) + len(spared) == len(list(mamba.parameters()))


def test_the_schedule_warms_up_and_comes_down() -> None:
    config = TrainConfig(steps=100, lr=1.0, warmup=10)
    rates = [config.lr_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A real process, killed by SIGKILL between two checkpoints; losses and weights equal to the last bit."""
    path = tmp_path / "run.pt"
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_study as t; t.torch.set_num_threads(1)\n"
        "t.train(t.model(), t.text(), t.KILLED, checkpoint=sys.argv[1], every=3, progress=False)\n"
    )
    command = [sys.executable, "-c", program, str(path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(torch.load(path, weights_only=True)["history"])
    assert 0 < done < KILLED.steps

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, resumed = model(), model(seed=5)
    history = train(whole, text(), KILLED, progress=False)
    assert train(resumed, text(), KILLED, checkpoint=path, progress=False) == history
    torch.set_num_threads(threads)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(model(), text(), CONFIG, checkpoint=tmp_path / "run.pt", progress=False)
    again = model(seed=5)
    assert train(again, text(), CONFIG, checkpoint=tmp_path / "run.pt", progress=False) == first


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(model(), text(), CONFIG, checkpoint=path, progress=False)
    other = TrainConfig(steps=12, batch=4, length=32, warmup=2, lr=1e-4)
    with pytest.raises(ValueError, match=r"another run: its lr is 0\.003, this run's 0\.0001"):
        train(model(), text(), other, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="another run: its text"):
        train(model(), text(2000), CONFIG, checkpoint=path, progress=False)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"run\.pt is damaged"):
        train(model(), text(), CONFIG, checkpoint=path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    path, poisoned = tmp_path / "run.pt", model()
    train(poisoned, text(), CONFIG, checkpoint=path, progress=False)
    before = path.read_bytes()
    longer = TrainConfig(steps=12, batch=4, length=32, warmup=2, seed=1)
    poisoned.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"diverged.*'step': 0"):
        train(poisoned, text(), longer, progress=False)
    assert path.read_bytes() == before


def test_evaluation_is_the_mean_over_fixed_windows() -> None:
    some = evaluate(model().eval(), text(), length=16, n_windows=6, batch=4)
    again = evaluate(model().eval(), text(), length=16, n_windows=6, batch=2)
    assert some.loss == pytest.approx(again.loss)
    assert some.by_position.shape == (16,)
    assert some.loss == pytest.approx(some.by_position.mean().item())
    assert some.bits_per_byte == pytest.approx(some.loss / math.log(2))
    assert some.perplexity == pytest.approx(math.exp(some.loss))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "expected at least 1, got 0"),
        ("batch", -1, "expected at least 1, got -1"),
        ("lr", 0.0, "expected a number above 0, got 0.0"),
        ("lr", math.nan, "expected a finite number, got nan"),
        ("lr", "0.1", r"expected a number, got str \('0.1'\)"),
        ("warmup", -1, "expected at least 0, got -1"),
        ("warmup", 2.5, r"expected an integer, got float \(2.5\)"),
        ("weight_decay", -0.1, "expected at least 0, got -0.1"),
        ("weight_decay", math.inf, "expected a finite number, got inf"),
        ("clip", 0.0, "expected a number above 0, got 0.0"),
        ("clip", math.nan, "expected a finite number, got nan"),
        ("seed", -1, "expected at least 0, got -1"),
        ("seed", 2**44, "expected at most 8796093022208 "),
    ],
)
def test_impossible_runs_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{field}: {message}"):
        TrainConfig(**{**vars(CONFIG), field: value})


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_configuration_of_numpys_numbers_can_be_written_as_json() -> None:
    numbers = {name: np.min_scalar_type(value).type(value) for name, value in vars(CONFIG).items()}
    assert json.loads(json.dumps(asdict(TrainConfig(**numbers)))) == pytest.approx(asdict(CONFIG), rel=1e-3)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="text: expected more than length=32"):
        windows(text()[:32], 4, 32, seed=0, step=0)
    with pytest.raises(ValueError, match="text: expected more than length=32"):
        evaluate(model(), text()[:32], length=32)


def trained(path: Path) -> bytes:
    train(model(), text(), CONFIG, checkpoint=path, progress=False)
    return path.read_bytes()


def test_a_damaged_checkpoint_is_refused_with_its_path(tmp_path: Path) -> None:
    """64 flipped bytes in the weights, one bit, half a file, and files that are no checkpoint."""
    path = tmp_path / "run.pt"
    whole = trained(path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    middle = largest.header_offset + largest.file_size // 2
    flipped = bytes(255 - byte for byte in whole[middle : middle + 64])
    one_bit = bytes([whole[middle] ^ 1])
    bare, other = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(3), bare)
    torch.save({"weights": {}, "optimizer": {}, "history": []}, other)
    for content in (
        whole[:middle] + flipped + whole[middle + 64 :],
        whole[:middle] + one_bit + whole[middle + 1 :],
        whole[:-40] + b"\xff" * 40,
        whole[: len(whole) // 2],
        b"",
        bare.getvalue(),
        other.getvalue(),
        b"[" * 100_000,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint: .*run\.pt is damaged, or no checkpoint: .+"):
            train(model(), text(), CONFIG, checkpoint=path, progress=False)
        assert path.read_bytes() == content
    path.write_bytes(whole)
    assert len(train(model(), text(), CONFIG, checkpoint=path, progress=False)) == CONFIG.steps


def test_a_disk_that_is_full_is_named_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    whole = trained(path)
    longer = TrainConfig(steps=12, batch=4, length=32, warmup=2, seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint: could not write .*other\.pt: File too large"):
            train(model(), text(), longer, checkpoint=tmp_path / "other.pt", every=2, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == whole
