"""The CUDA path: an ensemble's state on the device, an interval between two evaluations as one replay of a CUDA graph.

A step of a chunk of runs is six launches: tables, loss and logit gradient, hidden backward, tables backward, AdamW, projection. Chunks
share one workspace and are walked one after the other, so its size is bounded whatever the number of runs; a run's bits do not depend
on its chunk. Without CUDA (Triton's interpreter) the same launches run one by one.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .adamw import SCALARS, adamw_project, partial_blocks
from .evaluation import N_PARTIAL, evaluate, evaluation_tiles
from .first_layer import tables, tables_backward
from .hidden import hidden_backward
from .layout import Layout
from .loss import loss_gradient
from .pairs import slots_of
from .step import METRICS

SMALLEST_WORKSPACE, LARGEST_WORKSPACE = 64 << 20, 256 << 20     # bytes: one chunk fills the device; more brings nothing
ARITHMETIC = ("ieee", "tf32x3")


class State(NamedTuple):
    """What belongs to a run; first dimension R."""
    params: Tensor      # (R, n_params), as are both moments
    moment1: Tensor
    moment2: Tensor
    slots: Tensor       # (R, slots) int32, see pairs.py
    train: Tensor       # (R, p*p) uint8, 1 on training pairs

    def runs(self, chosen: slice | Tensor) -> "State":
        return State(*(tensor[chosen] for tensor in self))


class Workspace(NamedTuple):
    """What a chunk of runs needs within a step or an evaluation; first dimension is the chunk's runs."""
    tables: Tensor      # (C, 2, p, H)
    dtables: Tensor     # (C, 2, p, H)
    dz: Tensor          # (C, slots, p_pad)
    gradient: Tensor    # (C, n_params)
    squares: Tensor     # (C, 3, blocks) float64
    partials: Tensor    # (C, 11, tiles) float64

    def runs(self, count: int) -> "Workspace":
        return Workspace(*(tensor[:count] for tensor in self))


def workspace_shapes(layout: Layout, n_slots: int) -> tuple[tuple[int, ...], ...]:
    """Shapes for one run, in the order of `Workspace`; the last two are float64 whatever the dtype."""
    p, _, H, p_pad = layout
    return ((2, p, H), (2, p, H), (n_slots, p_pad), (layout.n_params,), (3, partial_blocks(layout)),
            (N_PARTIAL, evaluation_tiles(layout)))


def workspace_bytes_per_run(layout: Layout, n_slots: int, dtype: torch.dtype) -> int:
    """Bytes of workspace for each run of a chunk."""
    sizes = [dtype.itemsize] * 4 + [8, 8]
    return sum(size * torch.Size(shape).numel() for size, shape in zip(sizes, workspace_shapes(layout, n_slots), strict=True))


def state_bytes_per_run(layout: Layout, dtype: torch.dtype) -> int:
    """Parameters and both moments."""
    return 3 * layout.n_params * dtype.itemsize


def chunk_runs(layout: Layout, n_slots: int, dtype: torch.dtype, runs: int) -> int:
    """Runs in a chunk: its workspace takes at most half of what parameters and moments take, once that is worth counting, and at most
    `LARGEST_WORKSPACE`. 50,000 runs of p=59 are 53 GB of state beside 0.27 GB of workspace."""
    budget = min(LARGEST_WORKSPACE, max(SMALLEST_WORKSPACE, runs * state_bytes_per_run(layout, dtype) // 2))
    most = max(1, min(runs, budget // workspace_bytes_per_run(layout, n_slots, dtype)))
    return -(-runs // -(-runs // most))                         # equal chunks


def aligned_rows(tensor: Tensor) -> Tensor:
    """A copy of `tensor (R, n)` whose rows start at multiples of 16 elements: Triton compiles an unaligned start as another kernel, which
    must not happen when the second chunk is captured, and equal alignment means equal bits at any row."""
    rows, size = tensor.shape
    padded = tensor.new_empty(rows, -(-size // 16) * 16)[:, :size]
    return padded.copy_(tensor)


class CudaKernels:
    """Trains the runs given by `params, moment1, moment2 (R, n_params)` on the pairs `a, b (R, n)`; `train (R, p*p)` is 1 on them.

    The three rows are updated in place and stay readable as `.state.params` and so on. Raises ValueError on arguments that do not fit.
    """

    def __init__(self, layout: Layout, loss: str, dtype: torch.dtype, arithmetic: str, params: Tensor, moment1: Tensor,
                 moment2: Tensor, a: Tensor, b: Tensor, train: Tensor, decay_last: bool = False):
        _check(layout, loss, dtype, arithmetic, params, moment1, moment2, a, b, train)
        self.layout, self.loss, self.dtype, self.arithmetic, self.n_train = layout, loss, dtype, arithmetic, a.shape[1]
        self.device, self.decay_last = params.device, decay_last
        self.state = State(params, moment1, moment2, slots_of(a, b, layout.p).to(self.device),
                           aligned_rows(train.to(self.device, torch.uint8)))
        self._allocate()

    def _allocate(self) -> None:
        runs, n_slots = self.state.slots.shape
        self.chunk = chunk_runs(self.layout, n_slots, self.dtype, runs)
        dtypes = [self.dtype] * 4 + [torch.float64] * 2
        self.workspace = Workspace(*(torch.empty(self.chunk, *shape, dtype=dtype, device=self.device) for shape, dtype in
                                     zip(workspace_shapes(self.layout, n_slots), dtypes, strict=True)))
        self.metrics = aligned_rows(torch.empty(runs, len(METRICS), dtype=torch.float64, device=self.device))
        self.graphs: dict[tuple, tuple[Tensor, object]] = {}    # (steps, evaluated) of an interval -> its buffer of scalars, its graph

    def keep(self, indices: Tensor) -> None:
        """Keeps the runs `indices (K,)`, in that order; everything else of them stays bit for bit."""
        self.graphs.clear()                                     # they hold the old addresses
        *rows, train = (tensor[indices.to(self.device)].contiguous() for tensor in self.state)
        self.state = State(*rows, aligned_rows(train))
        self._allocate()

    def interval(self, scalars: Tensor) -> Tensor:
        """`scalars (R, k, 8)` float64, named by `adamw.SCALARS` -> k steps of every run, then its metrics `(R, 15)` float64 on the CPU."""
        self.steps(scalars, evaluated=True)
        return self.metrics.to("cpu", copy=True)

    def steps(self, scalars: Tensor, evaluated: bool = False) -> None:
        """The k steps alone, or with the evaluation after them; returns before the device has finished."""
        runs, steps = self.state.params.shape[0], scalars.shape[1]
        if scalars.shape != (runs, steps, len(SCALARS)) or steps < 1:
            raise ValueError(f"scalars: expected ({runs}, k, {len(SCALARS)}) with k >= 1, got {tuple(scalars.shape)}")
        by_step = scalars.transpose(0, 1).to(self.dtype).contiguous()                   # (k, R, 8), rounded once
        if self.device.type != "cuda":
            self._launch(self.state, by_step, self.metrics, evaluated)
            return
        if (steps, evaluated) not in self.graphs:
            self.graphs[steps, evaluated] = self._capture(by_step, evaluated)
        buffer, graph = self.graphs[steps, evaluated]
        buffer.copy_(by_step)
        graph.replay()

    def _capture(self, by_step: Tensor, evaluated: bool) -> tuple[Tensor, object]:
        """A graph of one interval. Kernels compile on a copy of one run first: nothing may compile inside a capture."""
        buffer = by_step.to(self.device)
        *rows, train = (tensor[:1].clone() for tensor in self.state)
        self._launch(State(*rows, aligned_rows(train)), buffer[:1, :1].contiguous(), aligned_rows(self.metrics[:1]), True)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(self.state, buffer, self.metrics, evaluated)
        return buffer, graph

    def _launch(self, state: State, by_step: Tensor, metrics: Tensor, evaluated: bool) -> None:
        """All steps of a chunk, its evaluation if wanted, then the next chunk."""
        for start in range(0, state.params.shape[0], self.chunk):
            chunk = slice(start, start + self.chunk)
            part = state.runs(chunk)
            work = self.workspace.runs(part.params.shape[0])
            for scalars in by_step:
                self._step(part, work, scalars[chunk])
            if not evaluated:
                continue
            tables(part.params, work.tables, self.layout, self.arithmetic)
            evaluate(part.params, work.tables, part.train, by_step[-1, chunk], work.partials, work.squares, metrics[chunk],
                     self.n_train, self.layout, self.loss, self.arithmetic)

    def _step(self, state: State, work: Workspace, scalars: Tensor) -> None:
        layout, arithmetic = self.layout, self.arithmetic
        tables(state.params, work.tables, layout, arithmetic)
        loss_gradient(state.params, work.tables, state.slots, scalars, work.dz, self.n_train, layout, self.loss, arithmetic)
        hidden_backward(state.params, work.tables, work.dz, state.slots, work.dtables, work.gradient, layout, arithmetic)
        tables_backward(state.params, work.dtables, work.gradient, layout, arithmetic)
        adamw_project(state.params, state.moment1, state.moment2, work.gradient, scalars, work.squares, layout,
                      self.decay_last)


def _check(layout: Layout, loss: str, dtype: torch.dtype, arithmetic: str, params: Tensor, moment1: Tensor, moment2: Tensor, a: Tensor,
           b: Tensor, train: Tensor) -> None:
    runs, n = a.shape
    wanted = {"params": (runs, layout.n_params), "moment1": (runs, layout.n_params), "moment2": (runs, layout.n_params), "b": (runs, n),
              "train": (runs, layout.p**2)}
    for name, tensor in (("params", params), ("moment1", moment1), ("moment2", moment2), ("b", b), ("train", train)):
        if tensor.shape != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(tensor.shape)}")
        if name in ("params", "moment1", "moment2") and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {dtype}, got {tensor.dtype}, contiguous: {tensor.is_contiguous()}")
    if dtype not in (torch.float32, torch.float64) or loss not in ("ce", "mse") or arithmetic not in ARITHMETIC:
        raise ValueError(f"expected float32 or float64, ce or mse, {' or '.join(ARITHMETIC)}; got {dtype}, {loss}, {arithmetic}")
    if layout.d % 16 or layout.H % 16:
        raise ValueError(f"d and H must be multiples of 16, the shortest inner dimension of a product; got {layout.d}, {layout.H}")
