"""The CUDA path: an ensemble's state on the device, an interval between two evaluations as one replay of a CUDA graph.

What a step launches is the network's own, `mlp_launches.py`, `transformer_launches.py` or `dense.py`. Chunks of runs share one workspace and are
walked one after the other, so its size is bounded whatever the number of runs; a run's bits do not depend on its chunk. Without CUDA (Triton's
interpreter) the same launches run one by one.
"""
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import dense, mlp_launches, transformer_launches
from .adamw import scalar_names
from .layout import MOST_INPUTS, AnyLayout, DenseLayout, TransformerLayout
from .loss import LOSSES
from .pairs import labels_of
from .step import metric_names

ARITHMETIC = ("ieee", "tf32x3")
LARGEST_WORKSPACE = 1 << 30     # bytes: a run of p = 59 takes 2.3 MB, of a transformer 8 to 11, and a hundred fill the device
MOST_CLASSES = 256  # a program holds whole rows of logits: 64 pairs of 512 columns are past what a multiprocessor has


class State(NamedTuple):
    """What belongs to a run; first dimension R."""
    params: Tensor      # (R, n_params), as are both moments
    moment1: Tensor
    moment2: Tensor
    slots: Tensor       # (R, slots) int32: the order of the pairs, see pairs.py and mixing.py; or examples, see dense.py
    train: Tensor       # (R, examples) uint8, 1 on those to train on

    def runs(self, chosen: slice | Tensor) -> "State":
        return State(*(tensor[chosen] for tensor in self))


def launches_of(layout: AnyLayout) -> ModuleType:
    """The module that knows the network's workspace, the order of its pairs, its step and its evaluation."""
    if isinstance(layout, DenseLayout):
        return dense
    return transformer_launches if isinstance(layout, TransformerLayout) else mlp_launches


def workspace_bytes_per_run(layout: AnyLayout, n_slots: int, dtype: torch.dtype) -> int:
    """Bytes of workspace for each run of a chunk."""
    *shapes, squares, partials = launches_of(layout).workspace_shapes(layout, n_slots, dtype.itemsize)
    return dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes) + 8 * (torch.Size(squares).numel() + torch.Size(partials).numel())


def state_bytes_per_run(layout: AnyLayout, dtype: torch.dtype) -> int:
    """Parameters and both moments."""
    return 3 * layout.n_params * dtype.itemsize


def chunk_runs(layout: AnyLayout, n_slots: int, dtype: torch.dtype, runs: int) -> int:
    """Runs in a chunk, whose workspace takes at most LARGEST_WORKSPACE: 50,000 runs of p=59 are 53 GB of state beside 1 GB of workspace."""
    most = max(1, min(runs, LARGEST_WORKSPACE // workspace_bytes_per_run(layout, n_slots, dtype)))
    return -(-runs // -(-runs // most))                         # equal chunks


def aligned_rows(tensor: Tensor) -> Tensor:
    """A copy of `tensor (R, n)` whose rows start at multiples of 16 elements: Triton compiles an unaligned start as another kernel, which
    must not happen when the second chunk is captured, and equal alignment means equal bits at any row."""
    rows, size = tensor.shape
    padded = tensor.new_empty(rows, -(-size // 16) * 16)[:, :size]
    return padded.copy_(tensor)


class CudaKernels:
    """Trains the runs given by `params, moment1, moment2 (R, n_params)` on the pairs `a, b (R, n)`; `train (R, p*p)` is 1 on them;
    `labels (p*p,)` as `pairs.labels_of` has them. Of a dense MLP `a, b` are the inputs `(R, examples, n)` and labels `(R, examples)` of all
    examples, and `train (R, examples)`.

    The three rows are updated in place and stay readable as `.state.params` and so on. Raises ValueError on arguments that do not fit.
    """

    def __init__(self, layout: AnyLayout, loss: str, dtype: torch.dtype, arithmetic: str, params: Tensor, moment1: Tensor,
                 moment2: Tensor, a: Tensor, b: Tensor, train: Tensor, decay_last: bool = False, labels: Tensor | None = None,
                 perp_grad: bool = False):
        _check(layout, loss, dtype, arithmetic, params, moment1, moment2, a, b, train)
        self.layout, self.loss, self.dtype, self.arithmetic, self.n_train = layout, loss, dtype, arithmetic, n_train(layout, a)
        self.labels, self.n_pairs = None, layout.examples           # of a dense MLP every example has its own label
        if not isinstance(layout, DenseLayout):
            pair = torch.arange(layout.p**2)
            table = labels_of(labels, pair // layout.p, pair % layout.p, layout.p)
            self.labels, self.n_pairs = table.to(params.device, torch.int32), int((table >= 0).sum())
        self.device, self.decay_last, self.perp_grad, self.network = params.device, decay_last, perp_grad, launches_of(layout)
        self.scalars, self.n_metrics = len(scalar_names(layout.groups)), len(metric_names(layout.groups))
        self.state = State(params, moment1, moment2, self.network.order_of(a, b, layout[0]).to(self.device),
                           aligned_rows(train.to(self.device, torch.uint8)))
        self._allocate()

    def _allocate(self) -> None:
        runs, n_slots = len(self.state.slots), self.network.slot_count(self.state.slots, self.n_train)
        self.chunk = chunk_runs(self.layout, n_slots, self.dtype, runs)
        shapes = self.network.workspace_shapes(self.layout, n_slots, self.dtype.itemsize)
        dtypes = [self.dtype] * (len(shapes) - 2) + [torch.float64] * 2
        self.workspace = self.network.Workspace(*(torch.empty(self.chunk, *shape, dtype=dtype, device=self.device)
                                                  for shape, dtype in zip(shapes, dtypes, strict=True)))
        self.metrics = aligned_rows(torch.empty(runs, self.n_metrics, dtype=torch.float64, device=self.device))
        self.graphs: dict[tuple, tuple[Tensor, object]] = {}    # (steps, evaluated) of an interval -> its buffer of scalars, its graph

    def keep(self, indices: Tensor) -> None:
        """Keeps the runs `indices (K,)`, in that order; everything else of them stays bit for bit."""
        self.graphs.clear()                                     # they hold the old addresses
        *rows, train = (tensor[indices.to(self.device)].contiguous() for tensor in self.state)
        self.state = State(*rows, aligned_rows(train))
        self._allocate()

    def interval(self, scalars: Tensor) -> Tensor:
        """`scalars (R, k, 8 + groups)` float64, named by `adamw.scalar_names` -> k steps of every run, then its metrics `(R, 12 + groups)`,
        named by `step.metric_names`, float64 on the CPU."""
        self.steps(scalars, evaluated=True)
        return self.metrics.to("cpu", copy=True)

    def measure(self, scalars: Tensor) -> Tensor:
        """The metrics of every run as it is; of `scalars (R, k, 8 + groups)` the last temperature counts."""
        self._launch(self.state, self._by_step(scalars)[-1:].to(self.device), self.metrics, evaluated=True, trained=False)
        return self.metrics.to("cpu", copy=True)

    def steps(self, scalars: Tensor, evaluated: bool = False) -> None:
        """The k steps alone, or with the evaluation after them; returns before the device has finished."""
        by_step, steps = self._by_step(scalars), scalars.shape[1]
        if self.device.type != "cuda":
            self._launch(self.state, by_step, self.metrics, evaluated)
            return
        if (steps, evaluated) not in self.graphs:
            self.graphs[steps, evaluated] = self._capture(by_step, evaluated)
        buffer, graph = self.graphs[steps, evaluated]
        buffer.copy_(by_step)
        graph.replay()

    def _by_step(self, scalars: Tensor) -> Tensor:
        """`scalars` as the kernels take them: `(k, R, 16)`, rounded once; rows are padded for the same reason as in `aligned_rows`."""
        runs, steps = self.state.params.shape[0], scalars.shape[1]
        if scalars.shape != (runs, steps, self.scalars) or steps < 1:
            raise ValueError(f"scalars: expected ({runs}, k, {self.scalars}) with k >= 1, got {tuple(scalars.shape)}")
        return torch.nn.functional.pad(scalars.transpose(0, 1).to(self.dtype), (0, -self.scalars % 8)).contiguous()

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

    def _launch(self, state: State, by_step: Tensor, metrics: Tensor, evaluated: bool, trained: bool = True) -> None:
        """All steps of a chunk unless it is not to be trained, its evaluation if wanted, then the next chunk."""
        for start in range(0, state.params.shape[0], self.chunk):
            chunk = slice(start, start + self.chunk)
            part = state.runs(chunk)
            work = self.workspace.runs(part.params.shape[0])
            for scalars in by_step if trained else ():
                self.network.step(*part[:4], self.labels, scalars[chunk], work, self.n_train, self.layout, self.loss, self.arithmetic,
                                  self.decay_last, self.perp_grad)
            if evaluated:
                data = part[3:] if self.network is dense else part[4:]
                self.network.evaluate_all(part.params, *data, self.labels, by_step[-1, chunk], work, metrics[chunk], self.n_train, self.n_pairs,
                                          self.layout, self.loss, self.arithmetic)


def n_train(layout: AnyLayout, a: Tensor) -> int:
    """Of every run; `a` as `CudaKernels` takes it."""
    return layout.m if isinstance(layout, DenseLayout) else a.shape[1]


def _check(layout: AnyLayout, loss: str, dtype: torch.dtype, arithmetic: str, params: Tensor, moment1: Tensor, moment2: Tensor,
           a: Tensor, b: Tensor, train: Tensor) -> None:
    if layout.classes > MOST_CLASSES:
        raise ValueError(f"p must be at most {layout.p + MOST_CLASSES - layout.classes} on CUDA, got {layout.p}; use the CPU")
    runs, n = a.shape[:2]
    if isinstance(layout, DenseLayout) and (layout.n > MOST_INPUTS or a.shape[1:] != (layout.examples, layout.n)):
        raise ValueError(f"inputs: expected (R, {layout.examples}, at most {MOST_INPUTS}), got {tuple(a.shape)}")
    wanted = {"params": (runs, layout.n_params), "moment1": (runs, layout.n_params), "moment2": (runs, layout.n_params), "b": (runs, n),
              "train": (runs, layout.examples)}
    for name, tensor in (("params", params), ("moment1", moment1), ("moment2", moment2), ("b", b), ("train", train)):
        if tensor.shape != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(tensor.shape)}")
        if name in ("params", "moment1", "moment2") and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {dtype}, got {tensor.dtype}, contiguous: {tensor.is_contiguous()}")
    if dtype not in (torch.float32, torch.float64) or loss not in LOSSES or arithmetic not in ARITHMETIC:
        raise ValueError(f"expected float32 or float64, {' or '.join(LOSSES)}, {' or '.join(ARITHMETIC)}; got {dtype}, {loss}, {arithmetic}")
    if any(width % 16 for width in ((layout.H,) if isinstance(layout, DenseLayout) else (layout.d, layout.H))):
        raise ValueError(f"d and H must be multiples of 16, the shortest inner dimension of a product; got {layout}")
