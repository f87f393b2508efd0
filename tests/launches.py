"""Every kernel launch that the experiments, the kernels' tests and `bench/` make, without a GPU and mostly without running anything.

A launch is what Triton's launcher is given. Those of the experiments and of `bench/` come from their own launch code, in which a recorder takes the
launcher's place; those of the tests from their suites, run by the interpreter with `GROKKING_RECORD_LAUNCHES` naming a file.
"""
import ast
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import mlp_launches
from kernels.cuda import CudaKernels, launches_of
from kernels.dialect import triton
from kernels.layout import DenseLayout, Layout, TransformerLayout, model_layout
from kernels.pairs import order_of, slots_of

ROOT = Path(__file__).parent.parent
MODULI = (29, 31, 41, 43, 53, 59, 67, 71, 79, 97, 113)
MODELS = ("mlp", "transformer", "transformer_ln", "transformer_b")
MODES = ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float64, "ieee"))
SUITES = ("triton_kernels.py", "triton_steps.py", "triton_transformer.py", "triton_transformer_steps.py", "triton_dense.py")


class Launch(NamedTuple):
    kernel: object      # triton.runtime.jit.JITFunction
    args: tuple
    options: dict       # num_warps and the like
    grid: tuple[int, ...] = ()      # programs in each direction


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor on a device: all that a launcher asks of one."""
    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def recording(launches: list[Launch]) -> object:
    """Within the block nothing is launched: launches are appended."""
    def record(kernel: object, *args: object, grid: object, warmup: bool, **options: object) -> None:
        launches.append(Launch(kernel, args, options, grid))
    return mock.patch.object(triton.runtime.jit.JITFunction, "run", record)


def drawn_pairs(p: int, n: int) -> torch.Tensor:
    """Of one run. (1, n)"""
    return torch.randperm(p * p, generator=torch.Generator().manual_seed(1000))[None, :n]


@functools.cache
def order_of_one(tiles: bool, p: int, n: int) -> torch.Tensor:
    """The order of the pairs of one run: half a minute of all launches if it is worked out for each."""
    pairs = drawn_pairs(p, n)
    return (slots_of if tiles else order_of)(pairs // p, pairs % p, p)


def engine_of(layout: Layout | TransformerLayout, dtype: torch.dtype, arithmetic: str, loss: str, runs: int = 1, n: int | None = None,
              decay_last: bool = False) -> CudaKernels:
    """On `n` training pairs, 40% of all by default."""
    p, network = layout.p, launches_of(layout)
    n = n or int(0.4 * p * p)
    pairs = drawn_pairs(p, n).expand(runs, n)
    rows = [torch.empty(runs, layout.n_params, dtype=dtype) for _ in range(3)]
    with mock.patch.object(network, "order_of", lambda *_: order_of_one(network is mlp_launches, p, n).repeat(runs, 1)):
        return CudaKernels(layout, loss, dtype, arithmetic, *rows, pairs // p, pairs % p, torch.zeros(runs, p * p), decay_last)


def step_launches(layout: Layout | TransformerLayout, dtype: torch.dtype, arithmetic: str, loss: str, runs: int = 1, chunk: int = 1, steps: int = 1,
                  n: int | None = None, decay_last: bool = False) -> list[Launch]:
    """Of some steps and an evaluation."""
    launches: list[Launch] = []
    engine = engine_of(layout, dtype, arithmetic, loss, runs, n, decay_last)
    engine.chunk = chunk
    with recording(launches):
        engine.interval(torch.ones(runs, steps, engine.scalars, dtype=torch.float64))
    return launches


def dense_launches(layout: DenseLayout, dtype: torch.dtype, arithmetic: str, loss: str, runs: int = 1, chunk: int = 1, steps: int = 1,
                   decay_last: bool = False) -> list[Launch]:
    """The same of dense MLPs."""
    rows, launches = [torch.empty(runs, layout.n_params, dtype=dtype) for _ in range(3)], []
    x, labels = torch.zeros(runs, layout.examples, layout.n, dtype=dtype), torch.zeros(runs, layout.examples, dtype=torch.int64)
    engine = CudaKernels(layout, loss, dtype, arithmetic, *rows, x, labels, torch.zeros(runs, layout.examples), decay_last)
    engine.chunk = chunk
    with recording(launches):
        engine.interval(torch.ones(runs, steps, engine.scalars, dtype=torch.float64))
    return launches


PARITY = ((30, 1000), (30, 600), (30, 1500), (20, 1000), (40, 1000))     # inputs and training examples of the experiment
EXPERIMENTS = list(itertools.product(MODELS, MODULI, MODES, ("ce", "mse")))


def of_experiments(chosen: list = EXPERIMENTS) -> Iterator[Launch]:
    """All models, moduli, modes and losses. A launcher asks of the number of pairs only whether it is a multiple of 16: both are here."""
    for model, p, (dtype, arithmetic), loss in chosen:
        layout, n = model_layout(model, p, dtype), int(0.4 * p * p)
        yield from step_launches(layout, dtype, arithmetic, loss, decay_last=loss == "mse")
        yield from step_launches(layout, dtype, arithmetic, loss, n=n + 1 if n % 16 == 0 else n - n % 16)


def of_parity() -> Iterator[Launch]:
    """All sizes, modes and losses of exp_parity.py."""
    for (n, m), (dtype, arithmetic), loss in itertools.product(PARITY, MODES, ("ce", "mse")):
        yield from dense_launches(model_layout("mlp_dense", n, dtype, m, m + 2000), dtype, arithmetic, loss, decay_last=loss == "mse")


def of_bench() -> Iterator[Launch]:
    """Kernels that `bench/` defines, and those of the engine as it measures them. Its other launches are an experiment's."""
    from bench import gpu_measurements as bench

    launches: list[Launch] = []

    def once(call: object, *_: object, **__: object) -> tuple[float, float, float]:
        with recording(launches):
            call()
        return 1.0, 1.0, 1.0

    with mock.patch.multiple(bench, DEVICE="cpu", seconds=once):
        for p in (59, 97):
            for measurement in (bench.dot_rate, bench.row_adds, bench.graph):
                list(measurement(p, 2))
    return iter(launches)


def of_tests(path: Path) -> Iterator[Launch]:
    """What `record_interpreted` wrote."""
    for line in path.read_text().splitlines():
        module, name, args, options = json.loads(line)
        yield Launch(getattr(importlib.import_module(module), name), tuple(
            Pointer(getattr(torch, value), address) if kind == "tensor" else ast.literal_eval(value) for kind, value, address in args), options)


def record_interpreted(path: Path) -> None:
    """From now on the interpreter's launches are also lines of `path`, each kind once."""
    from triton.runtime.interpreter import InterpretedFunction

    run, seen = InterpretedFunction.run, set()

    def record(self: object, *args: object, grid: object, warmup: bool, **options: object) -> object:
        described = [("tensor", str(arg.dtype).removeprefix("torch."), arg.data_ptr() % 16) if isinstance(arg, torch.Tensor) else
                     ("value", repr(tuple(arg) if isinstance(arg, tuple) else arg), 0) for arg in args]
        line = json.dumps((self.fn.__module__, self.fn.__name__, described, options))
        if line not in seen:
            seen.add(line)
            with path.open("a") as file:
                file.write(line + "\n")
        return run(self, *args, grid=grid, warmup=warmup, **options)

    InterpretedFunction.run = record
