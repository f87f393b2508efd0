"""What the step can cost on this GPU, measured before anything is tuned. Writes gpu_measurements.csv, each measurement as soon as it exists.

    dot_rate    TFLOP/s of bare block products at the blocks of the loss kernel, operands from the cache
    kernel_rate TFLOP/s (products) or GB/s (AdamW) of every kernel of the step, and microseconds per run-step
    transformer microseconds per run-step of every kernel of the transformers' step, and of the step
    dW2_error   largest error of dW2's sum over all pairs against float64, over its largest value: ieee, tf32x3, torch
    row_adds    microseconds per run-step of the fixed-order adds into dU and dV alone, and their share of the kernel that holds them
    graph       microseconds of a replay of five empty kernels
    copy        GB/s of a copy in device memory, read and written
    memory      bytes allocated per run with 50,000 runs of p=59 (as many as fit, if fewer), after one step and an evaluation

Usage: python bench/gpu_measurements.py --out results/bench [--p 59 97] [--runs 160] [--only graph copy]. A few minutes.
"""
import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels.adamw import adamw_project
from kernels.cuda import MOST_CLASSES, CudaKernels, state_bytes_per_run, workspace_bytes_per_run
from kernels.dialect import BK, dot, power_of_two, tl, triton
from kernels.first_layer import tables, tables_backward, turn, turned_size
from kernels.hidden import hidden_backward, hidden_backward_ref, hidden_ref
from kernels.layout import mlp_layout, model_layout
from kernels.loss import loss_gradient
from kernels.pairs import tile_rows

ARITHMETIC = ("ieee", "tf32x3")
DEVICE = "cuda"
MODES = (torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float64, "ieee")


class Row(NamedTuple):
    measurement: str
    name: str
    p: int | str
    runs: int | str
    arithmetic: str
    value: float        # median
    low: float          # least and most of the repeats
    high: float
    unit: str


def seconds(call: Callable[[], object], inner: int = 10, repeats: int = 15) -> tuple[float, float, float]:
    """Median, least and most seconds of one `call`, from replays of a CUDA graph that holds `inner` of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return tuple(t / inner for t in replays(graph, repeats))


def replays(graph: torch.cuda.CUDAGraph, repeats: int) -> tuple[float, float, float]:
    """Median, least and most seconds of a replay."""
    times = []
    for _ in range(repeats + 2):        # the first two warm up
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times[2:]), min(times[2:]), max(times[2:])


def rate(work: float, times: tuple[float, float, float], unit: float) -> tuple[float, float, float]:
    """Work per second in `unit`: median, least, most."""
    middle, fast, slow = times
    return work / middle / unit, work / slow / unit, work / fast / unit


def example(p: int, runs: int, dtype: torch.dtype = torch.float32, arithmetic: str = "ieee", model: str = "mlp") -> CudaKernels:
    """An engine on random weights of the paper's sizes; all runs share one split, which costs a GPU nothing less."""
    layout, generator = model_layout(model, p, dtype), torch.Generator().manual_seed(0)
    row = torch.zeros(layout.n_params)
    for part, (inputs, outputs, divisor) in zip(layout.views(row), layout.draws(), strict=False):
        part[:, :outputs] = torch.randn(inputs, outputs, generator=generator) / divisor
    pairs = torch.randperm(p * p, generator=generator)[: int(0.4 * p * p)].expand(runs, -1)
    train = torch.zeros(1, p * p, dtype=torch.uint8).index_fill(1, pairs[0], 1).expand(runs, -1)
    params = row.to(DEVICE, dtype).repeat(runs, 1)
    return CudaKernels(layout, "ce", dtype, arithmetic, params, torch.zeros_like(params), torch.zeros_like(params), pairs // p, pairs % p,
                       train)


def step_scalars(runs: int, steps: int, count: int = 11) -> torch.Tensor:
    """tau 1, lr 0.001, weight decay 1, as at step 1; the total norm held, so that the projection does its work."""
    return torch.tensor([1, 0.999, 0.01, 0.0316, 15.0] + [0] * (count - 8) + [0.1, 0.999, 0.001], dtype=torch.float64).repeat(runs, steps, 1)


@triton.jit
def _products_kernel(left, right, out, K, BN: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i, j, inner = tl.arange(0, BN), tl.arange(0, P), tl.arange(0, BLOCK)
    acc = tl.zeros([BN, P], left.dtype.element_ty)
    for start in range(0, K, BLOCK):
        k = start % 256 + inner
        x = tl.load(left + i[:, None] * 256 + k[None, :])
        y = tl.load(right + k[:, None] * P + j[None, :])
        acc = dot(x, y, acc, PRECISION)
    tl.store(out + tl.program_id(0) * BN * P + i[:, None] * P + j[None, :], acc)


def dot_rate(p: int, runs: int) -> Iterator[Row]:
    P, K, programs = power_of_two(mlp_layout(p).p_pad), 4096, 132 * 16
    for dtype, arithmetic in ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float64, "ieee")):
        left, right = torch.randn(64, 256, device=DEVICE, dtype=dtype), torch.randn(256, P, device=DEVICE, dtype=dtype)
        out = torch.empty(programs, 64, P, device=DEVICE, dtype=dtype)
        times = seconds(lambda: _products_kernel[(programs,)](left, right, out, K, 64, P, BK, arithmetic, num_warps=P // 16))  # noqa: B023
        name = f"64x{P} {str(dtype).removeprefix('torch.')}"
        yield Row("dot_rate", name, p, "", arithmetic, *rate(2 * 64 * P * K * programs, times, 1e12), "TFLOP/s")


def step_calls(engine: CudaKernels) -> dict[str, tuple[Callable[[], object], float, str]]:
    """Kernel -> a call on the first chunk, its work per run, the unit of work."""
    layout, (p, d, H, _) = engine.layout, engine.layout
    state, work, arithmetic = engine.state.runs(slice(0, engine.chunk)), engine.workspace, engine.arithmetic
    scalars = step_scalars(engine.chunk, 1)[:, 0].to(DEVICE, engine.dtype)
    n, itemsize = engine.n_train, engine.dtype.itemsize
    return {
        "tables": (lambda: tables(state.params, work.tables, layout, arithmetic), 4 * p * d * H, "TFLOP/s"),
        "loss_gradient": (lambda: loss_gradient(state.params, work.tables, state.slots, engine.labels, scalars, work.dz, n, layout, "ce",
                                                arithmetic),
                          2 * n * H * p, "TFLOP/s"),
        "turn": (lambda: turn(state.params, work.turned, layout), 2 * turned_size(layout) * itemsize, "GB/s"),
        "hidden_backward": (lambda: hidden_backward(work.turned, work.tables, work.dz, state.slots, work.parts, layout, arithmetic),
                            4 * n * H * p, "TFLOP/s"),
        "tables_backward": (lambda: tables_backward(state.params, work.turned, work.parts, work.gradient, layout, arithmetic), 8 * p * d * H,
                            "TFLOP/s"),
        "adamw_project": (lambda: adamw_project(state.params, state.moment1, state.moment2, work.gradient, scalars, work.squares, layout),
                          9 * layout.n_params * itemsize, "GB/s"),
    }


def kernel_rate(p: int, runs: int) -> Iterator[Row]:
    for dtype, arithmetic in MODES:
        engine = example(p, runs, dtype, arithmetic)
        label, chunk = f"{arithmetic} {str(dtype).removeprefix('torch.')}", engine.chunk
        for name, (call, work, unit) in step_calls(engine).items():
            times = seconds(call)
            yield Row("kernel_rate", name, p, chunk, label, *rate(work * chunk, times, 1e12 if unit == "TFLOP/s" else 1e9), unit)
            yield Row("kernel_time", name, p, chunk, label, *(t * 1e6 / chunk for t in times), "us per run-step")
        scalars = step_scalars(runs, 25)
        engine.interval(scalars)
        times = replays(engine.graphs[25, True][1], 15)
        yield Row("step_time", "25 steps and an evaluation", p, runs, label, *(t * 1e6 / 25 / runs for t in times), "us per run-step")


def transformer(p: int, runs: int) -> Iterator[Row]:
    """Every launch of a step by itself, those of one name added up; a product is named by its shape."""
    for model, (dtype, arithmetic) in itertools.product(("transformer", "transformer_ln"), MODES):
        engine = example(p, runs, dtype, arithmetic, model=model)
        label, chunk, scalars = f"{arithmetic} {str(dtype).removeprefix('torch.')}", engine.chunk, step_scalars(runs, 25, engine.scalars)
        engine.interval(scalars)
        times = replays(engine.graphs[25, True][1], 15)
        yield Row("step_time", f"{model}: 25 steps and an evaluation", p, runs, label, *(t * 1e6 / 25 / runs for t in times), "us per run-step")
        launches: list[tuple[str, Callable[[], object]]] = []

        def record(kernel: object, *args: object, launches: list = launches, **options: object) -> None:
            name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            shape = " {}x{}x{}".format(*args[3:6]) if name == "matmul" else ""
            launches.append((name + shape, lambda: kernel.run(*args, **options)))

        state, scalars = engine.state.runs(slice(0, chunk)), step_scalars(chunk, 1, 16)[:, 0].to(engine.device, dtype)
        with mock.patch.object(type(_empty_kernel), "run", record):
            engine.network.step(*state[:4], engine.labels, scalars, engine.workspace, engine.n_train, engine.layout, "ce", arithmetic, False, False)
        total: dict[str, list[float]] = {}
        for name, call in launches:
            found = total.setdefault(name, [0.0, 0.0, 0.0])
            total[name] = [a + b * 1e6 / chunk for a, b in zip(found, seconds(call, repeats=5), strict=True)]
        for name, found in total.items():
            yield Row("kernel_time", f"{model}: {name}", p, chunk, label, *found, "us per run-step")


def dW2_error(p: int, runs: int) -> Iterator[Row]:
    engine = example(p, 1)
    layout, work, state = engine.layout, engine.workspace, engine.state
    tables(state.params, work.tables, layout, "ieee")
    turn(state.params, work.turned, layout)
    loss_gradient(state.params, work.tables, state.slots, engine.labels, step_scalars(1, 1)[:, 0].to(DEVICE, torch.float32), work.dz,
                  engine.n_train, layout, "ce", "ieee")
    live = state.slots[0] >= 0
    pair, dz = state.slots[0, live].long(), work.dz[0, live]
    h, dgelu = hidden_ref(*work.tables[0].double(), pair // p, pair % p)
    exact = h.T @ dz.double()
    exact_dU, _ = hidden_backward_ref(dz.double(), dgelu, layout.views(state.params[0])[2].double(), pair // p, pair % p, p)
    for arithmetic in ARITHMETIC:
        hidden_backward(work.turned, work.tables, work.dz, state.slots, work.parts, layout, arithmetic)
        tables_backward(state.params, work.turned, work.parts, work.gradient, layout, arithmetic)
        dU = work.parts[0, :, : p * layout.H].double().sum(0).view(p, layout.H)
        for name, found, wanted in (("dW2", layout.views(work.gradient[0])[2], exact), ("dU", dU, exact_dU)):
            error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
            yield Row("dW2_error", name, p, 1, arithmetic, error, error, error, "of the largest value")
    torch.backends.cuda.matmul.allow_tf32 = False
    error = ((h.float().T @ dz).double().sub(exact).abs().max() / exact.abs().max()).item()
    yield Row("dW2_error", "dW2", p, 1, "torch float32", error, error, error, "of the largest value")


@triton.jit
def _row_adds_kernel(slots, dtables, n_slots, p: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr):
    """The adds of `hidden._hidden_backward_kernel`, with a constant in place of the products."""
    run = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    slot = tl.arange(0, BN)
    dU = dtables + run * (2 * p * H) + unit[None, :]
    dx = tl.full([BN, BH], 1.0, dtables.dtype.element_ty)
    for start in range(0, n_slots, BN):
        tl.debug_barrier()
        pair = tl.load(slots + run * n_slots + start + slot)
        live = pair[:, None] >= 0
        a, b = pair[:, None] // p * H, (pair[:, None] % p + p) * H
        tl.store(dU + a, tl.load(dU + a, mask=live, other=0.0) + dx, mask=live)
        tl.store(dU + b, tl.load(dU + b, mask=live, other=0.0) + dx, mask=live)


def row_adds(p: int, runs: int) -> Iterator[Row]:
    engine = example(p, runs)
    H, chunk, slots = engine.layout.H, engine.chunk, engine.state.slots
    work = torch.zeros_like(engine.workspace.tables)
    alone = seconds(lambda: _row_adds_kernel[(H // 32, chunk)](slots, work, slots.shape[1], p, H, tile_rows(p), 32, num_warps=4,
                                                               num_stages=1))
    yield Row("row_adds", "alone", p, chunk, "", *(t * 1e6 / chunk for t in alone), "us per run-step")
    whole = seconds(step_calls(engine)["hidden_backward"][0])
    share = alone[0] / whole[0]
    yield Row("row_adds", "share of hidden_backward", p, chunk, "ieee", share, share, share, "")


@triton.jit
def _empty_kernel(out):
    pass


def graph(p: int, runs: int) -> Iterator[Row]:
    out = torch.zeros(1, device=DEVICE)

    def five() -> None:
        for _ in range(5):
            _empty_kernel[(1,)](out, num_warps=1)

    for inner, name in ((1, "5 empty kernels"), (25, "5 empty kernels, 25 times in a graph")):
        yield Row("graph", name, "", "", "", *(t * 1e6 for t in seconds(five, inner=inner, repeats=101)), "us per 5 kernels")


def copy(p: int, runs: int) -> Iterator[Row]:
    source = torch.zeros(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    yield Row("copy", "1 GiB", "", "", "", *rate(2 * 4 * 2**28, seconds(lambda: target.copy_(source), inner=4), 1e9), "GB/s")


def memory(p: int, runs: int) -> Iterator[Row]:
    layout = mlp_layout(59)
    free, _ = torch.cuda.mem_get_info()
    own = state_bytes_per_run(layout, torch.float32) + 64 * 1024        # order of the pairs, mask, pairs on their way to the device
    count = min(50_000, int((free - (2 << 30)) // own))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = example(59, count)
    engine.interval(step_scalars(count, 1))
    for name, size in (("state and workspace", torch.cuda.memory_allocated() - before),
                       ("peak", torch.cuda.max_memory_allocated() - before)):
        yield Row("memory", name, 59, count, "ieee", *[size / count] * 3, "bytes per run")
    work = workspace_bytes_per_run(layout, engine.state.slots.shape[1], torch.float32) * engine.chunk
    yield Row("memory", "workspace, all runs together", 59, count, "ieee", *[float(work)] * 3, "bytes")


MEASUREMENTS = {"graph": graph, "copy": copy, "dot_rate": dot_rate, "dW2_error": dW2_error, "row_adds": row_adds,
                "kernel_rate": kernel_rate, "transformer": transformer, "memory": memory}
ONCE = ("graph", "copy", "memory")      # do not depend on p


def write(rows: list[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    part = out / "gpu_measurements.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([f"{value:.4g}" if isinstance(value, float) else value for value in row] for row in rows)
    part.replace(out / "gpu_measurements.csv")


def main() -> int:
    parser = argparse.ArgumentParser(description="The first measurements on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_measurements.csv")
    parser.add_argument("--p", type=int, nargs="+", default=[59, 97], help="moduli")
    parser.add_argument("--runs", type=int, default=160, help="runs in the ensemble")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="a subset")
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_measurements: no CUDA device here; run it on a machine with one", file=sys.stderr)
        return 2
    if not all(2 <= p <= MOST_CLASSES for p in settings.p) or settings.runs < 1:
        parser.error(f"--p must be between 2 and {MOST_CLASSES}, --runs at least 1")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    rows: list[Row] = []
    for name in settings.only:
        for p in settings.p[:1] if name in ONCE else settings.p:
            for row in MEASUREMENTS[name](p, settings.runs):
                rows.append(row)
                print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row), sep="  ", flush=True)
                write(rows, settings.out)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
