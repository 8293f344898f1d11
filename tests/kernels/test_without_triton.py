"""On macOS there is no Triton: everything but the kernels works, and their error says why they do not."""

import os
import subprocess
import sys

import pytest
import torch

interpreted = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="where Triton has a GPU it compiles"
)


def run(code: str) -> str:
    """The output of a fresh Python."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


STEP = """
import torch
from kvlearn.kernels import decode_attention
q, cache, lengths = torch.ones(1, 4, 16), torch.ones(1, 2, 8, 16), torch.tensor([5], dtype=torch.int32)
assert decode_attention(q, cache, cache, lengths).allclose(q)
"""


@pytest.mark.slow
def test_the_pytorch_form_needs_no_triton() -> None:
    code = f"""
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import kvlearn.kernels.runtime as runtime
runtime.HAS_TRITON = False
{STEP}
try:
    decode_attention(q, cache, cache, lengths, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "Triton is not installed" in run(code)


@interpreted
@pytest.mark.slow
def test_triton_that_was_imported_to_compile_is_named() -> None:
    code = f"""
import torch, triton.language
{STEP}
try:
    decode_attention(q, cache, cache, lengths, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "TRITON_INTERPRET=1" in run(code)


@interpreted
@pytest.mark.slow
def test_without_a_gpu_the_interpreter_is_the_default() -> None:
    code = STEP + "print(decode_attention(q, cache, cache, lengths, backend='triton').allclose(q))"
    assert run(code).strip() == "True"
