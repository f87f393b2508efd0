"""Compiles for sm_90 exactly what the engine would launch, on a machine without a GPU, and reads what the assembler made of it.

`python tests/sm90.py --out results/bench` writes kernels_sm90.csv: every kernel at every modulus of the experiments (two minutes).
"""
import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels.cuda import CudaKernels
from kernels.layout import model_layout

MODULI = (43, 59, 67, 97, 113)
MODES = ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float64, "ieee"))
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.uint8: "*u8"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Build(NamedTuple):
    """One kernel as the assembler made it; a row of the table, less the last field."""
    kernel: str
    p: int
    dtype: str
    arithmetic: str
    loss: str
    warps: int
    registers: int          # per thread
    stack_bytes: int        # per thread
    spill_accesses: int     # loads and stores of local memory in the code
    shared_bytes: int       # per program
    instructions: int
    dots_written: int       # in the source
    dots_compiled: int      # three for each in tf32x3, more where a loop is peeled
    seconds: float
    asm: dict[str, str]


def recorded_launches(p: int, dtype: torch.dtype, arithmetic: str, loss: str, model: str = "mlp") -> list[tuple[JITFunction, tuple, dict]]:
    """`(kernel, arguments, options)` of every launch of one step and its evaluation, at the experiments' d and H. Nothing runs."""
    layout, n = model_layout(model, p, dtype), int(0.4 * p * p)
    pairs = torch.randperm(p * p, generator=torch.Generator().manual_seed(1000))[None, :n]
    rows = [torch.zeros(1, layout.n_params, dtype=dtype) for _ in range(3)]
    engine = CudaKernels(layout, loss, dtype, arithmetic, *rows, pairs // p, pairs % p, torch.zeros(1, p * p))
    launches = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append((kernel, args, options))

    with mock.patch.object(JITFunction, "run", record):
        engine.interval(torch.ones(1, 1, engine.scalars, dtype=torch.float64))
    return launches


def compile_launch(kernel: JITFunction, args: tuple, options: dict) -> object:
    """The compiled kernel, from the types, the alignment and the constants of a launch."""
    signature, constants, attributes = {}, {}, {}
    for i, (param, value) in enumerate(zip(kernel.params, args, strict=True)):
        if param.is_constexpr or (isinstance(value, int) and value == 1):
            signature[param.name], constants[(i,)] = "constexpr", value
            continue
        signature[param.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32), options=options)


def assembled(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """What the assembler reports (REG, STACK, ...), and the opcodes of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, flags=re.MULTILINE)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}, opcodes


def build(p: int, dtype: torch.dtype, arithmetic: str, loss: str, model: str = "mlp") -> list[Build]:
    """Every kernel of a step and its evaluation, compiled afresh; for MSE only the two that differ. One that is launched with several sets of
    constants is as many kernels; the product of matrices has a kernel for each kind of operands, named by the first that it multiplies."""
    launches, kinds = {}, set()
    for launch in recorded_launches(p, dtype, arithmetic, loss, model):
        name, args = launch[0].fn.__name__.strip("_"), launch[1]
        kind = name, *(value if param.is_constexpr or value == 1 else value % 16 == 0 for param, value in zip(launch[0].params, args, strict=True)
                       if not isinstance(value, torch.Tensor))
        if kind not in kinds:
            name = f"matmul_{args[3]}x{args[4]}x{args[5]}" if name == "matmul_kernel" else name
            launches[name if name not in launches else f"{name}_again"] = launch
            kinds.add(kind)
    builds = []
    for name, (kernel, args, options) in launches.items():
        if loss == "mse" and "LOSS" not in [param.name for param in kernel.params]:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            compiled = compile_launch(kernel, args, options)
            seconds = time.perf_counter() - start
            asm = {stage: compiled.asm[stage] for stage in ("ttir", "ttgir", "ptx")}
            usage, opcodes = assembled(compiled.asm["cubin"])
        builds.append(Build(
            name, p, str(dtype).removeprefix("torch."), arithmetic, loss, options["num_warps"], usage["REG"], usage["STACK"],
            sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes), compiled.metadata.shared, len(opcodes),
            len(re.findall(r"= tt\.dot ", asm["ttir"])), len(re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) ", asm["ttgir"])),
            round(seconds, 2), asm))
    return builds


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, stack, shared memory and instructions of every kernel on sm_90.")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels_sm90.csv")
    out = parser.parse_args().out
    builds = [row for p in MODULI for dtype, arithmetic in MODES for loss in ("ce", "mse") for row in build(p, dtype, arithmetic, loss)]
    out.mkdir(parents=True, exist_ok=True)
    part = out / "kernels_sm90.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Build._fields[:-2])         # seconds are the machine's, not the kernel's
        writer.writerows(row[:-2] for row in builds)
    part.replace(out / "kernels_sm90.csv")
    print(f"{len(builds)} kernels, {sum(row.seconds for row in builds):.0f} s; most: {max(row.registers for row in builds)} registers, "
          f"{max(row.stack_bytes for row in builds)} bytes of stack, {max(row.shared_bytes for row in builds)} bytes of shared memory, "
          f"{max(row.seconds for row in builds)} s")


if __name__ == "__main__":
    main()
