"""Compiles launches for sm_90 on a machine without a GPU, reads what the assembler made of them, and says what is wrong with it.

`python tests/sm90.py --out results/bench` (`make compile-all`) builds every launch of `launches.py`, those of the tests recorded afresh, and writes
kernels_sm90.csv: a row for each compiled kernel. Interrupted, the same command continues: OUT/checkpoint/ holds what is built, until a kernel or
Triton changes. Exit code 1 if a build fails or is out of bounds.
"""
import argparse
import csv
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import launches
import triton
from launches import ROOT, Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from common import UsageError
from lab import console

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Build(NamedTuple):
    """One kernel as the assembler made it; a row of the table, less the last two fields."""
    kernel: str
    p: int | str            # empty where the kernel does not know it
    dtype: str
    arithmetic: str         # empty without a product
    loss: str               # empty where it makes no difference
    constants: str          # all that the kernel is compiled for beside these
    warps: int
    registers: int          # per thread
    stack_bytes: int        # per thread
    spill_accesses: int     # loads and stores of local memory in the code
    shared_bytes: int       # per program
    dots_written: int       # in the source
    dots_compiled: int      # three for each in tf32x3, more where a loop is peeled
    seconds: float          # of processor time, whatever else the machine does
    asm: dict[str, str | bytes]


def bound(launch: Launch) -> tuple[dict, list, dict]:
    """A launch's arguments by name, and what they specialise the kernel to: by Triton's own launcher, which has names of its own."""
    return binder(launch.kernel)(*launch.args, **launch.options)


@functools.cache
def binder(kernel: object) -> Callable:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGET))


def runtime_arguments(launch: Launch) -> list:
    """Those that the compiled kernel takes, in its order: all but constants, and numbers that it is specialised to."""
    _, signature, _, _ = launch.kernel._pack_args(make_backend(TARGET), launch.options, *bound(launch))
    return [arg for arg, of in zip(launch.args, signature.values(), strict=True) if of != "constexpr"]


def kind(launch: Launch) -> str:
    """What tells compiled kernels apart: source, constants, types, and which numbers and addresses are 1 or multiples of 16."""
    return repr((launch.kernel.fn.__name__, launch.kernel.cache_key, *bound(launch)[1:]))


def kinds(found: object) -> dict[str, Launch]:
    """The first launch of each kind."""
    unique: dict[str, Launch] = {}
    for launch in found:
        unique.setdefault(kind(launch), launch)
    return unique


def assembled(cubin: bytes) -> tuple[dict[str, int], int]:
    """What the assembler reports (REG, STACK, ...), and how many loads and stores of local memory are in the machine code. That is read only
    where there is a stack: it takes as long as to compile."""
    def said(flag: str) -> str:
        return subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", said("-res-usage"))}
        code = said("-sass") if usage["STACK"] or usage["LOCAL"] else ""
    return usage, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?:STL|LDL)", code, flags=re.MULTILINE))


def build(launch: Launch) -> Build:
    """Compiled afresh."""
    kernel, args, options = launch[:3]
    names = [param.name for param in kernel.params]
    given = dict(zip(names, args, strict=True))
    start = sum(os.times()[:4])         # of this process and of those it has waited for
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        packed, signature, constants, attributes = kernel._pack_args(make_backend(TARGET), options, *bound(launch))
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=packed.__dict__)
        seconds = sum(os.times()[:4]) - start
        asm = {stage: compiled.asm[stage] for stage in ("ttir", "ttgir", "ptx", "cubin")}
        usage, spills = assembled(compiled.asm["cubin"])
    floats = [str(arg.dtype).removeprefix("torch.") for arg in args if str(getattr(arg, "dtype", "")).startswith("torch.float")]
    own = {"p", "PRECISION", "LOSS"}
    fixed = {names[path[0]]: value for path, value in constants.items() if len(path) == 1 and names[path[0]] not in own}
    return Build(
        kernel.fn.__name__.strip("_"), given.get("p", ""), floats[0], given.get("PRECISION", ""), given.get("LOSS", ""),
        " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in fixed.items()), options["num_warps"], usage["REG"], usage["STACK"],
        spills, compiled.metadata.shared,
        len(re.findall(r"= tt\.dot ", asm["ttir"])), len(re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) ", asm["ttgir"])),
        round(seconds, 2), asm)


def check(row: Build) -> None:
    """Raises AssertionError on what must not be in a compiled kernel."""
    where = f"{row.kernel} p={row.p} {row.dtype} {row.arithmetic} {row.constants}"
    assert row.registers <= 255, where
    assert row.stack_bytes <= 64 and row.spill_accesses <= 32, f"{where}: {row.stack_bytes} bytes of stack, {row.spill_accesses} accesses"
    assert row.shared_bytes <= 113 * 1024, f"{where}: two programs must fit in the 227 KB of a multiprocessor"
    assert not re.search(r"\b(atom|red)\.", row.asm["ptx"]), f"{where}: every sum has one owner"
    check_arithmetic(row, where)
    if row.kernel in ("hidden_backward_kernel", "mix_kernel", "row_adds_kernel"):       # each tile reads back what another wrote
        waits = re.search(r"\b(ttg|gpu)\.barrier", row.asm["ttgir"])
        assert waits and "cp.async" not in row.asm["ptx"], f"{where}: a load may overtake a store"
    if row.kernel in ("hidden_backward_kernel", "gelu_backward_kernel", "dense_backward_kernel"):
        apart = re.search(r"(%\w+) = tt\.dot .*maxNumImpreciseAcc = 1", row.asm["ttir"])
        added = apart and re.search(rf"arith\.addf %\w+, {re.escape(apart[1])}\b", row.asm["ttir"])
        assert added, f"{where}: a tile's product is not summed by itself"


def check_arithmetic(row: Build, where: str) -> None:
    """No float32 product in single-pass TF32: by what the source asks for, and by what the machine code does."""
    asked = re.findall(r"= tt\.dot .*", row.asm["ttir"])
    if row.dtype == "float64":
        assert all("xf64>" in line for line in asked), where
    elif row.arithmetic != "tf32x3":        # "ieee", or a kernel that knows no other
        assert not any("inputPrecision" in line for line in asked), f"{where}: a dot without ieee: {asked}"
    else:
        assert all("inputPrecision = tf32x3" in line for line in asked), f"{where}: a dot without tf32x3: {asked}"
        assert row.dots_compiled >= 3 * row.dots_written, f"{where}: {row.dots_compiled} passes for {row.dots_written} products"
    tensor_core = set(re.findall(r"mma[\w.:]*\.(tf32|f16|bf16|f64)\b", row.asm["ptx"]))
    allowed = {"float64": {"f64"}, "float32": {"tf32"} if row.arithmetic == "tf32x3" else set()}[row.dtype]
    assert tensor_core <= allowed, f"{where}: {tensor_core}"
    if row.arithmetic == "tf32x3" and row.dots_written:
        assert tensor_core == {"tf32"}, f"{where}: without tensor cores"


WANTED: dict[str, Launch] = {}


def built(key: str) -> tuple[list, str]:
    """Of a kind in `WANTED`: the table's row, empty if it does not compile, and what is wrong, empty if nothing."""
    launch = WANTED[key]
    try:
        row = build(launch)
    except Exception as error:
        return [], f"{launch.kernel.fn.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        check(row)
    except AssertionError as error:
        return list(row[:-2]), str(error)
    return list(row[:-2]), ""


def deaf() -> None:
    """A process that builds is stopped by the one that asked for it, never by what a terminal or `timeout` sends to all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def digest(sources: list[Path]) -> str:
    """Of their text and Triton's version."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources)) + triton.__version__.encode()).hexdigest()[:16]


def record_tests(folder: Path) -> list[Path]:
    """Runs the kernels' suites in the interpreter, those that have not been, and returns the files of their launches."""
    kernels, recorded = [*(ROOT / "kernels").glob("*.py"), ROOT / "tests/triton_cases.py"], []
    for suite in launches.SUITES:
        recorded.append(folder / f"launches_{suite}_{digest([*kernels, ROOT / 'tests' / suite])}.jsonl")
        if not recorded[-1].exists():
            print(f"recording {suite}", flush=True)
            part = recorded[-1].with_suffix(".part")
            part.unlink(missing_ok=True)
            environment = {**os.environ, "TRITON_INTERPRET": "1", "GROKKING_RECORD_LAUNCHES": str(part), "OMP_NUM_THREADS": "1",
                           "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / suite)]
            if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
                raise UsageError(f"{suite} fails, so its launches are not all recorded; see make test")
            part.replace(recorded[-1])
    return recorded


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, stack and shared memory of every kernel on sm_90.")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels_sm90.csv")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    folder = options.out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    recorded = record_tests(folder)
    start = time.monotonic()
    experiments = itertools.chain(launches.of_experiments(), launches.of_parity())
    found = {name: kinds(each) for name, each in (("experiments", experiments), ("bench", launches.of_bench()),
                                                  ("tests", itertools.chain(*map(launches.of_tests, recorded))))}
    wanted = found["tests"] | found["bench"] | found["experiments"]
    users = {key: " ".join(name for name in found if key in found[name]) for key in wanted}
    log = folder / f"built_{digest([Path(__file__)])}.jsonl"
    kept = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []     # the last may be a piece
    log.write_text("".join(kept))
    done = {key: (row, fault) for key, row, fault in map(json.loads, kept)}
    print(f"{len(wanted)} kernels ({', '.join(f'{len(each)} of {name}' for name, each in found.items())}), {len(done)} built before; "
          f"recorded in {time.monotonic() - start:.0f} s", flush=True)
    WANTED.update(wanted)           # the processes are forks of this one: a kernel cannot be sent to them
    pool = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork"), deaf)
    try:
        with log.open("a") as file:
            jobs = {pool.submit(built, key): key for key in wanted if key not in done}
            for count, job in enumerate(as_completed(jobs), 1):
                done[jobs[job]] = job.result()
                file.write(json.dumps((jobs[job], *job.result())) + "\n")
                file.flush()
                if count % 100 == 0:
                    print(f"{count} of {len(jobs)} built, {time.monotonic() - start:.0f} s", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)      # a stop waits for what is being built, not for all that is left
    part = options.out / "kernels_sm90.csv.part"
    rows = [(*row, users[key]) for key, (row, _) in done.items() if row and key in wanted]
    rows.sort(key=lambda row: (row[0], row[1] or 0, *map(str, row[2:])))
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Build._fields[:-2], "launched_by"))
        writer.writerows(rows)
    part.replace(options.out / "kernels_sm90.csv")
    faults = sorted({fault for key, (_, fault) in done.items() if fault and key in wanted})
    for fault in faults:
        print(fault)
    most = (max(row[Build._fields.index(name)] for row in rows) for name in ("registers", "stack_bytes", "shared_bytes"))
    print("{} kernels built, {} faults; most: {} registers, {} bytes of stack, {} bytes of shared memory".format(len(rows), len(faults), *most))
    return 1 if faults else 0


if __name__ == "__main__":
    console.end(lambda: sys.exit(main()))
