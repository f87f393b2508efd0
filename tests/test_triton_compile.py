"""What a machine without a GPU can prove of the compiled kernels: arithmetic, registers, stack, time to compile.

Moduli 59 and 97 (blocks of 64 and of 128 columns) by default; GROKKING_TEST_MODULI="43 59 67 97 113" for all.
"""
import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here: its kernels are NOT compiled")
from sm90 import MODES, Build, build

MODULI = [int(p) for p in os.environ.get("GROKKING_TEST_MODULI", "59 97").split()]
IDS = [f"{dtype}-{arithmetic}".removeprefix("torch.") for dtype, arithmetic in MODES]


@pytest.mark.parametrize(("dtype", "arithmetic"), MODES, ids=IDS)
@pytest.mark.parametrize("p", MODULI)
def test_kernels_compile_within_bounds(p: int, dtype: torch.dtype, arithmetic: str) -> None:
    builds = build(p, dtype, arithmetic, "ce") + build(p, dtype, arithmetic, "mse")
    assert len(builds) == 11        # nine kernels, and the loss and the evaluation once more under MSE
    for row in builds:
        print(f"{row.kernel:24}", *(f"{name} {value}" for name, value in row._asdict().items() if name not in ("kernel", "asm")), sep="  ")
        assert_arithmetic(row)
        where = f"{row.kernel} p={p} {dtype} {arithmetic}"
        assert row.registers <= 255, where
        assert row.stack_bytes <= 64 and row.spill_accesses <= 32, f"{where}: {row.stack_bytes} bytes, {row.spill_accesses} accesses"
        assert row.shared_bytes <= 113 * 1024, f"{where}: two programs must fit in the 227 KB of a multiprocessor"
        assert row.seconds <= 20, f"{where}: {row.seconds} s to compile"        # about 1 s on one idle core
    assert_rows_are_added_in_order(next(row for row in builds if row.kernel == "hidden_backward_kernel"))


def assert_arithmetic(row: Build) -> None:
    """No float32 product in single-pass TF32: by what the source asks for, and by what the machine code does."""
    asked = re.findall(r"= tt\.dot .*", row.asm["ttir"])
    if row.dtype == "float64":
        assert all("xf64>" in line for line in asked), row.kernel
    elif row.arithmetic == "ieee":
        assert not any("inputPrecision" in line for line in asked), f"{row.kernel}: a dot without ieee: {asked}"
    else:
        assert all("inputPrecision = tf32x3" in line for line in asked), f"{row.kernel}: a dot without tf32x3: {asked}"
        assert row.dots_compiled >= 3 * row.dots_written, f"{row.kernel}: {row.dots_compiled} passes for {row.dots_written} products"
    tensor_core = set(re.findall(r"mma[\w.:]*\.(tf32|f16|bf16|f64)\b", row.asm["ptx"]))
    allowed = {"float64": {"f64"}, "float32": {"tf32"} if row.arithmetic == "tf32x3" else set()}[row.dtype]
    assert tensor_core <= allowed, f"{row.kernel}: {tensor_core} in {row.arithmetic}"
    if row.arithmetic == "tf32x3" and row.dots_written:
        assert tensor_core == {"tf32"}, f"{row.kernel}: tf32x3 without tensor cores"


def assert_rows_are_added_in_order(row: Build) -> None:
    """Each tile of pairs waits for the rows of the one before, and no load is moved ahead of that wait: what an interpreter cannot see."""
    assert re.search(r"\b(ttg|gpu)\.barrier", row.asm["ttgir"]) and "cp.async" not in row.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", row.asm["ptx"])
