"""What a machine without a GPU can prove of the compiled kernels: arithmetic, registers, stack, time to compile.

Moduli 59 and 97 (blocks of 64 and of 128 columns) by default; GROKKING_TEST_MODULI="43 59 67 97 113" for all. Of the transformers by default
p=59, one mode each, and the kernels that are theirs but for most kinds of products; with GROKKING_TEST_MODULI everything.
"""
import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here: its kernels are NOT compiled")
from sm90 import MODES, Build, build, kind, recorded_launches

MODULI = [int(p) for p in os.environ.get("GROKKING_TEST_MODULI", "59 97").split()]
IDS = [f"{dtype}-{arithmetic}".removeprefix("torch.") for dtype, arithmetic in MODES]


@pytest.mark.parametrize(("dtype", "arithmetic"), MODES, ids=IDS)
@pytest.mark.parametrize("p", MODULI)
def test_kernels_compile_within_bounds(p: int, dtype: torch.dtype, arithmetic: str) -> None:
    builds = build(p, dtype, arithmetic, "ce") + build(p, dtype, arithmetic, "mse")
    assert len(builds) == 11        # nine kernels, and the loss and the evaluation once more under MSE
    for row in builds:
        assert_within_bounds(row)
    assert_rows_are_added_in_order(next(row for row in builds if row.kernel == "hidden_backward_kernel"))


SHARED = ("adamw_kernel", "project_kernel", "squares_kernel", "metrics_kernel")     # with the MLP
EVERYTHING = "GROKKING_TEST_MODULI" in os.environ
TRANSFORMERS = [(p, model, *mode) for p in MODULI for model in ("transformer", "transformer_ln") for mode in MODES] if EVERYTHING else [
    (59, "transformer", torch.float32, "ieee"), (59, "transformer_ln", torch.float32, "tf32x3"), (59, "transformer_ln", torch.float64, "ieee")]


@pytest.mark.parametrize(("p", "model", "dtype", "arithmetic"), TRANSFORMERS)
def test_transformer_kernels_compile_within_bounds(p: int, model: str, dtype: torch.dtype, arithmetic: str) -> None:
    products = itertools.count()

    def wanted(name: str) -> bool:
        return EVERYTHING or (next(products) < 2 if name == "matmul_kernel" else name not in SHARED)

    builds = build(p, dtype, arithmetic, "ce", model, wanted) + build(p, dtype, arithmetic, "mse", model, wanted)
    assert sum(row.loss == "mse" for row in builds) == 2
    for row in builds:
        assert_within_bounds(row)
        assert not re.search(r"\b(atom|red)\.", row.asm["ptx"]), row.kernel     # every sum has one owner
    mixing = next(row for row in builds if row.kernel == "mix_kernel")
    assert re.search(r"\b(ttg|gpu)\.barrier", mixing.asm["ttgir"]) and "cp.async" not in mixing.asm["ptx"]      # it reads back what it wrote


@pytest.mark.parametrize("model", ["mlp", "transformer", "transformer_ln"])
def test_every_step_of_every_chunk_launches_the_same_kernels(model: str) -> None:
    """Those compiled for the first run's first step: nothing may compile while a graph is captured. Odd numbers of runs shift every row.
    And Triton's launcher takes all arguments: it has local names, such as `params`, that no argument may have."""
    first, *others = recorded_launches(59, torch.float32, "ieee", "ce", model), recorded_launches(59, torch.float32, "ieee", "ce", model, 3, 1, 2), \
        recorded_launches(59, torch.float32, "ieee", "ce", model, 3, 2, 2)
    known = {kind(launch) for launch in first}
    for launches in others:
        assert {kind(launch) for launch in launches} == known


def assert_within_bounds(row: Build) -> None:
    print(f"{row.kernel:24}", *(f"{name} {value}" for name, value in row._asdict().items() if name not in ("kernel", "asm")), sep="  ")
    assert_arithmetic(row)
    where = f"{row.kernel} p={row.p} {row.dtype} {row.arithmetic}"
    assert row.registers <= 255, where
    assert row.stack_bytes <= 64 and row.spill_accesses <= 32, f"{where}: {row.stack_bytes} bytes, {row.spill_accesses} accesses"
    assert row.shared_bytes <= 113 * 1024, f"{where}: two programs must fit in the 227 KB of a multiprocessor"
    assert row.seconds <= 20, f"{where}: {row.seconds} s to compile"        # about 1 s on one idle core


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
