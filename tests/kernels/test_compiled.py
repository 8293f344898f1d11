"""Compiled without a GPU: no library kernel spills, and all load their caches 16 bytes at a time."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from kvlearn.kernels import compiled
from kvlearn.kernels.compiled import CARDS, Compiled
from kvlearn.kernels.runtime import HAS_TRITON
from kvlearn.kernels.stages import STAGES

# Shared memory that one program may have, by compute capability (CUDA programming guide).
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
BYTE_FORMATS = ("fp8, a scale a key", "int8, a scale a key")

compiles = [
    pytest.mark.slow,
    pytest.mark.xdist_group("compiled"),
    pytest.mark.skipif(not HAS_TRITON, reason="the pinned Triton is for Linux"),
]


def rows(group: str, target: int) -> list[Compiled]:
    """The compiled forms; a form that a card cannot have is not among them."""
    found = [row for row in compiled.report() if row.group == group and row.target == target]
    assert found
    return [row for row in found if not row.problem]


def named(form: str, target: int) -> Compiled:
    return next(row for row in compiled.report() if row.form == form and row.target == target)


@pytest.mark.parametrize("target", CARDS)
class TestCompiled:
    pytestmark = compiles

    def test_every_form_compiles(self, target: int) -> None:
        missing = {row.form: row.problem for row in compiled.report() if row.target == target and row.problem}
        assert missing == ({"fp8, a scale a key": "from sm_89 on"} if target == 80 else {})

    def test_every_stage_is_there(self, target: int) -> None:
        assert set(STAGES) <= {row.form for row in rows("stage", target)}

    def test_decode_never_spills(self, target: int) -> None:
        spilled = {row.form: (row.registers, row.stack) for row in rows("decode", target) if row.stack}
        assert spilled == {}

    def test_programs_fit_on_the_card(self, target: int) -> None:
        for row in rows("decode", target) + rows("stage", target):
            assert 0 < row.registers <= 255
            assert row.shared <= SHARED[target]
            assert row.programs >= 1, row.form

    def test_caches_are_read_16_bytes_at_a_time_ahead_of_the_arithmetic(self, target: int) -> None:
        for row in rows("decode", target):
            if row.form not in BYTE_FORMATS:
                assert set(row.loads) == set(row.copies) == {16}, (row.form, row.loads, row.copies)

    def test_numbers_of_one_byte_are_read_8_bytes_at_a_time_at_least(self, target: int) -> None:
        """Triton lays tiles out by eight numbers where they are converted before the product."""
        for row in rows("decode", target):
            if row.form in BYTE_FORMATS:
                assert row.copies == row.loads
                assert set(row.loads) <= {8, 16}, (row.form, row.loads)

    def test_a_cache_off_its_boundary_is_read_in_crumbs(self, target: int) -> None:
        whole, crumbs = named("GQA 32/8", target), named("cache 2 bytes off", target)
        assert set(crumbs.loads) == {2}
        assert not crumbs.copies
        assert sum(crumbs.loads.values()) > 2 * sum(whole.loads.values())

    def test_pipelining_comes_with_v1_and_tensor_cores_with_v2(self, target: int) -> None:
        assert not named("v0", target).copies
        assert named("v1", target).copies
        assert not named("v1", target).products
        assert named("v2", target).products["mma"]


class TestLatent:
    pytestmark = compiles

    @pytest.mark.parametrize(("target", "product"), [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
    def test_128_heads_use_the_largest_product_of_the_card(self, target: int, product: str) -> None:
        assert set(named("latent, 128 heads", target).products) == {product}

    def test_16_heads_are_too_few_for_the_large_one(self) -> None:
        assert set(named("latent, 16 heads", 90).products) == {"mma"}


@pytest.mark.parametrize(
    ("form", "programs"),
    [
        (Compiled("by registers", "", 90, num_warps=4, registers=90, shared=0), 5),  # 65536 // (96 · 128)
        (Compiled("by shared memory", "", 90, num_warps=4, registers=32, shared=72 * 1024), 3),  # 228 // 73
        (Compiled("by shared memory", "", 80, num_warps=4, registers=32, shared=72 * 1024), 2),  # 164 // 73
        (Compiled("by warps", "", 90, num_warps=8, registers=16, shared=0), 8),
        (Compiled("by programs", "", 90, num_warps=1, registers=16, shared=0), 32),
    ],
    ids=lambda value: getattr(value, "form", ""),
)
def test_what_a_program_takes_says_how_many_fit(form: Compiled, programs: int) -> None:
    assert form.programs == programs


def test_the_table_marks_what_is_wrong_and_fits_80_columns() -> None:
    good = Compiled(
        "v5_latent, 128 heads", "stage", 90, "decode_kernel", 8, 251, 0, 147_456, {16: 18}, {16: 18}
    )
    bad = Compiled("spilling", "decode", 90, "decode_kernel", 4, 255, 136, 0, {16: 8, 2: 128}, {})
    absent = Compiled("fp8", "decode", 90, problem="from sm_89 on")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(compiled.table([good, bad, absent, Compiled("other card", "stage", 80)], 90))
    lines = console.export_text().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 80
    text = "\n".join(lines)
    assert "other card" not in text
    assert next(line for line in lines if "spilling" in line).split()[1:] == [
        "4",
        "255",
        "136",
        "0.0",
        "2",
        "8",
        "128",
        "0",
        "-",
    ]
    assert "from sm_89 on" in text


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target: expected .*80.*got 70"):
        compiled.report((70,))


@pytest.mark.skipif(not HAS_TRITON, reason="the pinned Triton is for Linux")
def test_the_interpreter_does_not_compile() -> None:
    code = "from kvlearn.kernels.compile_only import compile_only\nwith compile_only(90): pass"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert "TRITON_INTERPRET: expected 0" in done.stderr


# Steps that differ in all that changes from token to token, and in what a server's cache may grow by.
STEPS = """
import torch
from kvlearn.kernels import decode_attention
from kvlearn.kernels.compile_only import compile_only
from kvlearn.kernels.kernel import decode_kernel
with compile_only(90) as launches:
    for batch, slots, window, sinks, splits, length in (
        (2, 4096, 500, 4, 3, 7), (2, 4096, 1, 1, 1, 4096), (2, 8192, 512, 16, 64, 16), (1, 4112, 999, 0, 2, 1)
    ):
        q = torch.zeros(batch, 32, 128, dtype=torch.bfloat16)
        pool = torch.zeros(batch * slots // 16, 8, 16, 128, dtype=torch.bfloat16)
        table = torch.zeros(batch, slots // 16, dtype=torch.int32)
        lengths = torch.full((batch,), length, dtype=torch.int32)
        decode_attention(q, pool, pool, lengths, block_table=table, window=window, n_sinks=sinks,
                         num_splits=splits, backend="triton")
print(len(launches), sum(len(kernels[0]) for kernels in decode_kernel.device_caches.values()))
"""


class TestDoor:
    pytestmark = compiles

    def test_python_dash_m_prints_rows_as_json(self) -> None:
        command = [
            sys.executable,
            "-m",
            "kvlearn.kernels.compiled",
            "--target",
            "90",
            "--only",
            "v0",
            "--json",
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        (row,) = json.loads(done.stdout)
        assert row["form"] == "v0"
        assert row["registers"] == named("v0", 90).registers

    def test_nothing_that_changes_from_step_to_step_is_compiled_in(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", STEPS],
            check=True,
            env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        launches, kernels = map(int, done.stdout.split())
        assert launches == 4
        assert kernels == 1
