"""Compiles for sm_90 exactly what the engine would launch, on a machine without a GPU, and reads what the assembler made of it.

`python tests/sm90.py --out results/bench` writes kernels_sm90.csv: every kernel at every modulus of the experiments (two minutes);
`--model transformer --out results/bench_transformer` those of a transformer (four minutes).
"""
import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels.cuda import CudaKernels
from kernels.layout import model_layout

MODULI = {"mlp": (43, 59, 67, 97, 113), "transformer": (59, 97), "transformer_ln": (59, 71), "transformer_b": (59,)}
MODES = ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float64, "ieee"))
TARGET = GPUTarget("cuda", 90, 32)
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


def recorded_launches(p: int, dtype: torch.dtype, arithmetic: str, loss: str, model: str = "mlp", runs: int = 1, chunk: int = 1,
                      steps: int = 1) -> list[tuple[JITFunction, tuple, dict]]:
    """`(kernel, arguments, options)` of every launch of some steps and an evaluation, at the experiments' d and H. Nothing runs."""
    layout, n = model_layout(model, p, dtype), int(0.4 * p * p)
    pairs = torch.randperm(p * p, generator=torch.Generator().manual_seed(1000))[None, :n].expand(runs, n)
    rows = [torch.zeros(runs, layout.n_params, dtype=dtype) for _ in range(3)]
    engine = CudaKernels(layout, loss, dtype, arithmetic, *rows, pairs // p, pairs % p, torch.zeros(runs, p * p))
    engine.chunk, launches = chunk, []

    def record(kernel, *args, grid, warmup, **options):
        launches.append((kernel, args, options))

    with mock.patch.object(JITFunction, "run", record):
        engine.interval(torch.ones(runs, steps, engine.scalars, dtype=torch.float64))
    return launches


def bound(launch: tuple[JITFunction, tuple, dict]) -> tuple[dict, list, dict]:
    """A launch's arguments by name, and what they specialise the kernel to: by Triton's own launcher, which has names of its own."""
    kernel, args, options = launch
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGET))(*args, **options)


def kind(launch: tuple[JITFunction, tuple, dict]) -> str:
    """What tells the compiled kernels of a source apart: constants, types, and which numbers and addresses are 1 or multiples of 16."""
    return repr((launch[0].fn.__name__, *bound(launch)[1:]))


def compile_launch(kernel: JITFunction, args: tuple, options: dict) -> object:
    """The compiled kernel of a launch."""
    packed, signature, constants, attributes = kernel._pack_args(make_backend(TARGET), options, *bound((kernel, args, options)))
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=packed.__dict__)


def assembled(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """What the assembler reports (REG, STACK, ...), and the opcodes of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, flags=re.MULTILINE)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}, opcodes


def build(p: int, dtype: torch.dtype, arithmetic: str, loss: str, model: str = "mlp", wanted: Callable[[str], bool] = bool) -> list[Build]:
    """Every kernel of a step and its evaluation, compiled afresh; for MSE only the two that differ. One that is launched with several sets of
    constants is as many kernels; the product of matrices has a kernel for each kind of operands, named by the first that it multiplies."""
    launches, builds = {}, []
    for launch in recorded_launches(p, dtype, arithmetic, loss, model):
        launches.setdefault(kind(launch), launch)
    for kernel, args, options in launches.values():
        name = kernel.fn.__name__.strip("_")
        if (loss == "mse" and "LOSS" not in [param.name for param in kernel.params]) or not wanted(name):
            continue
        name = f"matmul_{args[3]}x{args[4]}x{args[5]}" if name == "matmul_kernel" else name
        name += "_again" * sum(row.kernel.startswith(name) for row in builds)
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
    parser.add_argument("--model", choices=MODULI, default="mlp", help="network")
    options = parser.parse_args()
    out, cases = options.out, [(p, *mode, loss) for p in MODULI[options.model] for mode in MODES for loss in ("ce", "mse")]
    builds = [row for case in cases for row in build(*case, options.model)]
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
