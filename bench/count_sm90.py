"""What a step and an evaluation cost on an H200, counted from the machine code of their kernels; no GPU is needed and nothing is timed.

Every launch is compiled for sm_90 and walked (`sass_walk.py`) by the programs of one run, so loops count as often as they turn and bank conflicts are
those of the addresses that the code computes. The model's numbers are BOUNDS: a step takes at least as long, if the rates below are right.

    multiprocessor    132 of them at 1.98 GHz, four quarters each; a quarter issues one warp instruction a cycle
    fma               32 lanes a quarter: FFMA, FMUL, FADD; IMAD on half of them
    alu               16 lanes: integers, comparisons, selections, moves
    special           4 lanes: MUFU and conversions of 64 bits
    fp64              16 lanes;  tensor: 1024 TF32 or 256 float64 multiply-adds a cycle and multiprocessor
    l1                one wavefront of at most 128 bytes a cycle and multiprocessor, of shared memory, with its conflicts (as `sass.wavefronts`
                      says), of memory through the cache, by lines, and shuffles; what wgmma reads of shared memory is left out
    l2, memory        5.5 and 4.3 TB/s: every program reads each of its sectors once; every kernel reads and writes each of its sectors once, so
                      what one kernel leaves to the next in the L2 counts as traffic
    chain             a program alone, by the assembler's stall counts and `sass_walk.LATENCY`, times the rounds in which the programs that fit at
                      once (registers, shared memory, warps) take turns

A kernel takes the largest of these over its busiest multiprocessor, and LAUNCH_US between kernels of a graph. Resources are taken to overlap fully,
and the order of programs to be perfect: what one measures will be more. Numbers are taken to be common: no slow path of a division or root. Every run
holds its norms. A run-step is a step of one run; chunks are those of `kernels/cuda.py`.

OUT/count_sm90.csv has a row for each launch and ensemble size, OUT/figures/count_sm90 a bar for each step, OUT/step_sm90.csv the sums.

Usage: python bench/count_sm90.py [--model mlp] [--p 59 97] [--arithmetic ieee] [--runs 10 40 160 2000] [--out results/bench]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lab import early
    early.guard()

import argparse
import itertools
import math
import subprocess
import tempfile
from typing import NamedTuple

import launches
import matplotlib.pyplot as plt
import numpy as np
import sm90
import torch

from bench import sass
from bench.sass_walk import Walk
from common import UsageError
from kernels import cuda
from kernels.layout import AnyLayout, model_layout
from lab import desk, figures, files, settings

ROOT = Path(__file__).resolve().parents[1]
CLOCK = 1.98e9              # cycles a second
MULTIPROCESSORS, QUARTERS = 132, 4
L2_RATE, MEMORY_RATE = 5.5e12, 4.3e12       # bytes a second
LAUNCH_US = 1.0             # between two dependent kernels of a graph
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_PROGRAMS = 65536, 227 * 1024, 64, 32      # of a multiprocessor
WALKED = 128                # programs of a run that are walked at most
TABLE, SUMS = "count_sm90.csv", "step_sm90.csv"

# Cycles for which an instruction of one warp holds a quarter's pipe
ALU = {"IADD3", "LEA", "LOP3", "SHF", "ISETP", "SEL", "FSEL", "FSETP", "FMNMX", "PRMT", "SGXT", "VIADD", "VIMNMX", "VIADDMNMX", "MOV", "PLOP3", "P2R",
       "R2P", "IABS", "I2FP", "F2FP", "FCHK", "CS2R"}
FP64 = {"DADD", "DMUL", "DFMA", "DSETP"}
FULL = {"FFMA", "FADD", "FMUL", "HFMA2"}
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND"}
PIPES = ("issue", "fma", "alu", "special", "fp64", "tensor")
RESOURCES = (*PIPES, "l1", "l2", "memory", "chain")


class Count(NamedTuple):
    """One launch, for one run."""
    phase: str              # step or evaluation
    launch: int             # of the phase, in order
    kernel: str
    programs: int
    warps: int              # of a program
    registers: int          # of a thread
    shared_bytes: int       # of a program
    resident: int           # programs that fit on a multiprocessor at once
    instructions: float     # of a program's warps, as are all that follow the mean over its programs
    barriers: float
    shared_wavefronts: float
    conflict_ways: int      # of the worst access
    bytes_read: int         # of the run: sectors touched, counted once
    bytes_written: int
    cycles: dict[str, tuple[float, float]]      # mean and largest of a program on each pipe of a quarter, on l1, and alone; bytes on l2


def tensor_cycles(i: sass.Instruction) -> float:
    """Of a quarter's tensor core, for what one warp brings."""
    if i.op == "HGMMA":             # 64xNxK by the warps of all four quarters
        return math.prod(map(int, i.mods[0].split("x"))) / QUARTERS / 256
    shape = {"1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "884": 8 * 8 * 4}[i.mods[0]]
    return shape / (64 if i.op == "DMMA" else 256)


def pipe_cycles(code: list[sass.Instruction], executed: np.ndarray) -> dict[str, np.ndarray]:
    """Cycles on every pipe `(programs,)` from how often the warps executed each instruction `(instructions, programs)`."""
    def total(chosen: set[str]) -> np.ndarray:
        return executed[[i.op in chosen for i in code]].sum(0)

    multiply = total({"IMAD"})
    tensor = sum((executed[n] * tensor_cycles(i) for n, i in enumerate(code) if i.op in ("HMMA", "DMMA", "HGMMA")), np.zeros(executed.shape[1]))
    return {"issue": executed.sum(0), "fma": np.maximum(total(FULL) + multiply, 2 * multiply), "alu": 2 * total(ALU), "special": 8 * total(SPECIAL),
            "fp64": 2 * total(FP64), "tensor": tensor}


def resident_programs(warps: int, registers: int, shared_bytes: int) -> int:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, SHARED_BYTES // (shared_bytes + 1024), MOST_WARPS // warps, MOST_PROGRAMS)


def walked(launch: launches.Launch, checked: bool = False) -> tuple[sm90.Build, Walk]:
    """Compiles it and walks the programs of its grid, at most WALKED of them, evenly chosen."""
    row = sm90.build(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(row.asm["cubin"])
        file.flush()
        code = sass.parse(subprocess.run([sm90.CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout)
    arrays, arguments = [], []
    for arg in sm90.runtime_arguments(launch):
        if torch.is_tensor(arg):
            arguments.append((("tensor", len(arrays)), 8))
            extent = 1 + sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
            arrays.append(arg.as_strided((extent,), (1,)).numpy())      # a view's rows lie apart: all memory that it spans
        else:
            arguments.append((arg, 4))
    grid = (*launch.grid, 1)[:2]
    programs = [(x, y) for y in range(grid[1]) for x in range(grid[0])]
    if len(programs) > WALKED:
        programs = [programs[i] for i in np.linspace(0, len(programs) - 1, WALKED).round().astype(int)]
    scratch = [(0, 8), (0, 8)]      # two more pointers that Triton's launcher passes
    try:
        return row, Walk(code, programs, 32 * row.warps, arguments + scratch, grid, sass.Tensors(arrays), row.shared_bytes, checked).run()
    except sass.Unknown as error:
        raise sass.Unknown(f"{row.kernel}: {error}") from None


def count(launch: launches.Launch, phase: str, number: int) -> Count:
    row, walk = walked(launch)
    code, programs = walk.code, math.prod(launch.grid)
    mean_and_most = lambda each: (float(each.mean()), float(each.max()))  # noqa: E731
    shared, sectors = walk.waves.sum(0), (walk.read | walk.written).sum(1)
    shuffles = walk.executed[[i.op == "SHFL" for i in code]].sum(0)
    cycles = {pipe: mean_and_most(each / min(QUARTERS, row.warps)) for pipe, each in pipe_cycles(code, walk.executed).items()}
    l1 = shared + walk.lines.sum(0) + shuffles
    cycles |= {"l1": mean_and_most(l1), "l2": mean_and_most(sectors * sass.SECTOR), "chain": mean_and_most(walk.time)}
    barriers = walk.executed[[i.op == "BAR" for i in code]].sum(0).mean() / row.warps
    written = walk.written.any(0).sum() * sass.SECTOR * programs // walk.P
    return Count(phase, number, row.kernel, programs, row.warps, row.registers, row.shared_bytes,
                 resident_programs(row.warps, row.registers, row.shared_bytes), walk.executed.sum(0).mean(), barriers, shared.mean(),
                 int(walk.ways.max()), int(walk.read.any(0).sum()) * sass.SECTOR, int(written), cycles)


def bounds(count: Count, runs: int) -> dict[str, float]:
    """Microseconds that one launch for a chunk of `runs` takes at least, by resource."""
    programs = count.programs * runs
    busiest = -(-programs // MULTIPROCESSORS)
    rounds = -(-programs // (MULTIPROCESSORS * count.resident))
    microseconds = {name: max(busiest * mean, most) / CLOCK * 1e6 for name, (mean, most) in count.cycles.items() if name not in ("l2", "chain")}
    return microseconds | {
        "l2": 1e6 * programs * count.cycles["l2"][0] / L2_RATE,
        "memory": 1e6 * runs * (count.bytes_read + count.bytes_written) / MEMORY_RATE,
        "chain": 1e6 * (count.cycles["chain"][1] if rounds == 1 else rounds * count.cycles["chain"][0]) / CLOCK}


def chunks(runs: int, chunk: int) -> list[int]:
    return [min(chunk, runs - start) for start in range(0, runs, chunk)]


def table(counts: list[Count], runs: int, chunk: int, **named: object) -> list[dict]:
    """A row for each launch: what was counted, and its bound for all chunks of `runs` together."""
    rows = []
    for each in counts:
        parts = [bounds(each, size) for size in chunks(runs, chunk)]
        total = sum(max(part.values()) + LAUNCH_US for part in parts)
        by_resource = {name: sum(part[name] for part in parts) for name in RESOURCES}
        plain = {name: value for name, value in each._asdict().items() if name != "cycles"}
        rows.append({**named, "runs": runs, "chunk": chunk, **plain, **{f"{name}_us": round(value, 3) for name, value in by_resource.items()},
                     "binds": max(by_resource, key=by_resource.get), "bound_us": round(total, 3), "bound_us_per_run": round(total / runs, 4)})
    return rows


def counted(layout: AnyLayout, dtype: torch.dtype, arithmetic: str) -> tuple[list[Count], cuda.CudaKernels]:
    """Every launch of a step and of an evaluation of one run."""
    engine = launches.engine_of(layout, dtype, arithmetic, "ce")
    scalars, known, counts = torch.ones(1, 1, engine.scalars, dtype=torch.float64), {}, []
    for phase, call in (("step", engine.steps), ("evaluation", engine.measure)):
        found: list[launches.Launch] = []
        with launches.recording(found):
            call(scalars)
        for number, launch in enumerate(found):
            key = sm90.kind(launch), launch.grid, tuple(arg.data_ptr() if torch.is_tensor(arg) else arg for arg in launch.args)
            if key not in known:
                known[key] = count(launch, phase, number)
                print(f"{phase} {number} {known[key].kernel}: {known[key].instructions:.0f} instructions a program, "
                      f"{known[key].conflict_ways}-way conflicts", flush=True)
            counts.append(known[key]._replace(phase=phase, launch=number))
    return counts, engine


def sums(rows: list[dict]) -> list[dict]:
    """Of every network, mode and ensemble size: microseconds a step and a run-step at least, and how many ways the worst bank conflict has."""
    def key(row: dict) -> tuple:
        return tuple(row[name] for name in ("model", "p", "dtype", "arithmetic", "runs", "phase"))

    out = []
    for of, group in itertools.groupby(sorted(rows, key=key), key):
        group = list(group)
        total = sum(row["bound_us"] for row in group)
        out.append({**dict(zip(("model", "p", "dtype", "arithmetic", "runs", "phase"), of, strict=True)), "launches": len(group),
                    "chunks": -(-of[4] // group[0]["chunk"]), "conflict_ways": max(row["conflict_ways"] for row in group),
                    "bound_us": round(total, 2), "bound_us_per_run": round(total / of[4], 3)})
    return out


def figure(rows: list[dict], folder: Path) -> None:
    """A bar of every kernel of a step, for each network and ensemble size, resources stacked: all but the longest are taken to hide behind it."""
    steps = [row for row in rows if row["phase"] == "step"]
    networks = sorted({(row["model"], row["p"], row["arithmetic"]) for row in steps})
    sizes = sorted({row["runs"] for row in steps})
    picture, axes = plt.subplots(len(networks), len(sizes), figsize=(4.2 * len(sizes), 3.4 * len(networks)), squeeze=False, layout="constrained")
    for line, network in zip(axes, networks, strict=True):
        for axis, runs in zip(line, sizes, strict=True):
            mine = [row for row in steps if (row["model"], row["p"], row["arithmetic"]) == network and row["runs"] == runs]
            names = list(dict.fromkeys(row["kernel"].removesuffix("_kernel") for row in mine))
            left = np.zeros(len(names))
            for number, resource in enumerate(RESOURCES):
                of = [sum(row[f"{resource}_us"] for row in mine if row["kernel"] == f"{name}_kernel") / runs for name in names]
                axis.barh(names, of, left=left, color=f"C{number}", label=resource, edgecolor="black", linewidth=0.3)
                left += of
            bound = [sum(row["bound_us"] for row in mine if row["kernel"] == f"{name}_kernel") / runs for name in names]
            axis.plot(bound, names, "kD", markersize=4, label="bound")
            axis.invert_yaxis()
            axis.set(title=f"{network[0]}, p={network[1]}, {network[2]}, R={runs}: at least {sum(bound):.1f} us", xlabel="us a run-step")
    axes[0, -1].legend(fontsize=6)
    figures.save_figure(picture, folder, "count_sm90")
    plt.close(picture)


def run(argv: list[str]) -> None:
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", choices=launches.MODELS, nargs="+", default=["mlp"], help="networks")
    parser.add_argument("--p", type=int, nargs="+", default=[59, 97], help="moduli")
    parser.add_argument("--arithmetic", choices=cuda.ARITHMETIC, nargs="+", default=["ieee"], help="of float32")
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 40, 160, 2000], help="ensemble sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench", help="folder for the tables and the figure")
    options = parser.parse_args(argv)
    if min(options.p) < 2 or min(options.runs) < 1:
        raise UsageError("--p must be >= 2 and --runs >= 1")
    settings.check_size("cuda", itertools.product(options.model, options.p))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {options.out}: {error.strerror}; choose another --out") from None
    rows: list[dict] = []
    for model, p, arithmetic in itertools.product(options.model, options.p, options.arithmetic):
        layout = model_layout(model, p, torch.float32)
        counts, engine = counted(layout, torch.float32, arithmetic)
        n_slots = engine.network.slot_count(engine.state.slots, engine.n_train)
        for runs in options.runs:
            chunk = cuda.chunk_runs(layout, n_slots, torch.float32, runs)
            rows += table(counts, runs, chunk, model=model, p=p, dtype="float32", arithmetic=arithmetic)
        files.write_csv(options.out / TABLE, rows)
    files.write_csv(options.out / SUMS, totals := sums(rows))
    for row in totals:
        print("{model} p={p} {arithmetic} R={runs} {phase}: at least {bound_us} us, {bound_us_per_run} a run; {launches} launches, {chunks} chunks, "
              "bank conflicts up to {conflict_ways}-way".format(**row))
    figure(rows, options.out / "figures")
    print(f"results in {options.out}")


if __name__ == "__main__":
    desk.main(run)
