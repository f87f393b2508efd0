"""The CPU path: one run after the other by a worker per core, each on one thread.

The MLP's step is `fused_step.cpp`, the dense MLP's `dense_step.cpp`, compiled on first use and called through ctypes, which releases the
interpreter lock. Where no compiler makes one that agrees with the definition, the definition itself runs. A transformer's is its definition
through Inductor.
Seen on 2 cores with a floating-point peak of 117 GFLOP/s each, at p=59: 1.8 ms a run-step on one core, 12 ms eagerly; two workers take
twice the runs in the same time, which two threads inside one operation do not. A run of 1 MB stays in the cache for a whole interval.
"""
import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from . import build
from .adamw import EPS, PLAIN, scalar_names
from .layout import AnyLayout, DenseLayout, Layout
from .loss import LOSSES
from .step import evaluate_ref, metric_names, train_step_ref

# cpp_wrapper: one C++ call a step, which also releases the interpreter lock; threshold: keep gelu' instead of evaluating erf twice. The last two:
# the weighted sum of eight table rows as one loop, attention weights kept rather than divided again in it: 4% of a step, 15% of an evaluation.
COMPILE_OPTIONS = {"cpp_wrapper": True, "realize_opcount_threshold": 8, "cpp.threads": 1, "realize_acc_reads_threshold": 64,
                   "realize_reads_threshold": 3}


def has_compiler() -> bool:
    return bool(build.compilers())


class CpuKernels:
    """`steps` and `evaluate` for runs of one shape. `backend` says what came of it: compiled or eager."""
    unusable = False    # whether the compiler has failed: it is tried once a process

    def __init__(self, layout: AnyLayout, n_train: int, loss: str, dtype: torch.dtype, compiled: bool, decay_last: bool = False,
                 labels: Tensor | None = None, perp_grad: bool = False):
        """`labels (p*p,)` as `pairs.labels_of` has them."""
        self.backend = "eager"
        self.table = () if labels is None else (labels,)
        self.step = lambda *args: train_step_ref(*args[:6], layout, loss, decay_last, *(args[6:] or [None]), perp_grad)
        self.evaluate_with = lambda *args: evaluate_ref(*args[:5], layout, loss, *args[5:])
        if compiled and not CpuKernels.unusable:
            self._compile(layout, n_train, loss, dtype, decay_last, perp_grad)

    def _compile(self, layout: AnyLayout, n_train: int, loss: str, dtype: torch.dtype, decay_last: bool, perp_grad: bool) -> None:
        """If the compiler fails, the definition stays, and a line says why."""
        ours = isinstance(layout, Layout | DenseLayout)
        try:
            if ours:
                fused = step_of(layout)(fused_library(layout, dtype), layout, loss, dtype, decay_last, perp_grad, *self.table)
                self.steps, self.evaluate = fused.steps, fused.evaluate
            else:
                keep_freed_memory()
                rows = [torch.zeros(layout.n_params, dtype=dtype) for _ in range(3)]
                a, b = torch.zeros(2, n_train, dtype=torch.int64)
                step = compile_for(self.step, *rows, a, b, torch.ones(len(scalar_names(layout.groups)), dtype=dtype), *self.table)
                self.evaluate_with = compile_for(self.evaluate_with, rows[0], torch.ones(layout.examples, dtype=dtype), a, b,
                                                 torch.ones((), dtype=dtype), *self.table)
                self.step = step
            self.backend = "compiled"
        except build.BuildError as error:
            CpuKernels.unusable = True
            print(f"the step runs eagerly, about {7 if ours else 3} times slower: {error}", file=sys.stderr, flush=True)

    def steps(self, params: Tensor, moment1: Tensor, moment2: Tensor, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        """`k` steps in place on one run's rows `(n_params,)`; `a, b (n,)` its training pairs, or inputs and labels of all its examples;
        `scalars (k, 5 + groups)`."""
        for row in scalars:
            self.step(params, moment1, moment2, a, b, row, *self.table)

    def evaluate(self, params: Tensor, train: Tensor, a: Tensor, b: Tensor, tau: Tensor) -> Tensor:
        """As `evaluate_ref`, `(metrics,)` float64."""
        return self.evaluate_with(params, train, a, b, tau, *self.table)


class FusedStep:
    """`fused_step.cpp` for one shape, type, loss and order of decay."""

    def __init__(self, library: ctypes.CDLL, layout: Layout, loss: str, dtype: torch.dtype, decay_last: bool = False,
                 perp_grad: bool = False, labels: Tensor | None = None):
        self.library, self.layout, self.dtype = library, layout, dtype
        self.loss, self.decay_last, self.perp_grad = LOSSES.index(loss), int(decay_last), int(perp_grad)
        self.labels = pair_labels(layout.p) if labels is None else labels.contiguous()

    def steps(self, params: Tensor, moment1: Tensor, moment2: Tensor, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        """As `CpuKernels.steps`; fastest when the pairs that share `a` lie together."""
        assert scalars.dtype == params.dtype == moment1.dtype == moment2.dtype == self.dtype
        assert scalars.shape[1] == len(scalar_names(self.layout.groups))
        self.library.steps(*map(address, (params, moment1, moment2, a, b)), len(a), address(self.labels), address(scalars), len(scalars),
                           self.loss, self.decay_last, self.perp_grad, EPS)

    def evaluate(self, params: Tensor, train: Tensor, a: Tensor, b: Tensor, tau: Tensor) -> Tensor:
        """As `evaluate_ref`, `(metrics,)` float64. The training pairs are those of `train (p*p,)`."""
        assert params.dtype == train.dtype == self.dtype
        out = torch.empty(len(metric_names(self.layout.groups)), dtype=torch.float64)
        self.library.evaluate(address(params), address(train), address(self.labels), float(tau), self.loss, address(out))
        return out


class DenseStep:
    """`dense_step.cpp` for one shape, type, loss and order of decay."""

    def __init__(self, library: ctypes.CDLL, layout: DenseLayout, loss: str, dtype: torch.dtype, decay_last: bool = False,
                 perp_grad: bool = False):
        self.library, self.layout, self.dtype = library, layout, dtype
        self.loss, self.decay_last, self.perp_grad = loss, int(decay_last), int(perp_grad)

    def steps(self, params: Tensor, moment1: Tensor, moment2: Tensor, x: Tensor, labels: Tensor, scalars: Tensor) -> None:
        """As `CpuKernels.steps`."""
        assert x.dtype == scalars.dtype == params.dtype == moment1.dtype == moment2.dtype == self.dtype
        assert scalars.shape[1] == len(scalar_names(self.layout.groups))
        self.library.steps(*map(address, (params, moment1, moment2, x, labels)), self.layout.m, address(scalars), len(scalars),
                           LOSSES.index(self.loss), self.decay_last, self.perp_grad, EPS)

    def evaluate(self, params: Tensor, train: Tensor, x: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
        """As `evaluate_ref`, of logits from here."""
        assert x.dtype == params.dtype == self.dtype
        logits = torch.empty(len(x), self.layout.classes, dtype=self.dtype)
        self.library.logits(address(params), address(x), len(x), address(logits))
        return evaluate_ref(params, train, x, labels, tau, self.layout, self.loss, logits=logits)


def step_of(layout: Layout | DenseLayout) -> type:
    return DenseStep if isinstance(layout, DenseLayout) else FusedStep


def pair_labels(p: int) -> Tensor:
    """The label of every pair, `(p*p,)` int64."""
    pair = torch.arange(p * p)
    return (pair // p + pair % p) % p


def address(tensor: Tensor) -> int:
    """Of a tensor's first element, which is all that C++ is told."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


@functools.cache
def fused_library(layout: Layout | DenseLayout, dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled `fused_step.cpp` or `dense_step.cpp`. Raises build.BuildError."""
    real, ctype = ("float", ctypes.c_float) if dtype == torch.float32 else ("double", ctypes.c_double)
    dense = isinstance(layout, DenseLayout)
    if dense:
        constants = {"REAL": real, "INPUTS": layout.n, "HIDDEN": layout.H}
    else:
        constants = {"REAL": real, "ROWS": layout.p, "D": layout.d, "HIDDEN": layout.H, "CLASSES": layout.classes, "P_PAD": layout.p_pad}
    problem = trial_problem(layout, dtype)
    with single_thread():
        library = build.load(Path(__file__).with_name("dense_step.cpp" if dense else "fused_step.cpp"), constants,
                             lambda library: trial(declare(library, ctype, dense), layout, *problem), lambda found: verdict(found, layout, *problem))
    return declare(library, ctype, dense)


def declare(library: ctypes.CDLL, real: type, dense: bool) -> ctypes.CDLL:
    """The arguments of its functions: addresses, sizes, and the run's own type for `tau`."""
    at, size = ctypes.c_void_p, ctypes.c_int64
    if dense:
        library.steps.argtypes = [at] * 5 + [size, at, size, *[ctypes.c_int] * 3, ctypes.c_double]
        library.logits.argtypes = [at, at, size, at]
        library.steps.restype = library.logits.restype = None
        return library
    library.steps.argtypes = [at] * 5 + [size, at, at, size, *[ctypes.c_int] * 3, ctypes.c_double]
    library.evaluate.argtypes = [at, at, at, real, ctypes.c_int, at]
    library.steps.restype = library.evaluate.restype = None
    return library


def trial_problem(layout: Layout | DenseLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A start `(n_params,)` of small weights, a mask of those to train on, about 100 of all pairs or the first of all examples, and `a, b` as
    `CpuKernels.steps` takes them."""
    generator = torch.Generator().manual_seed(0)
    row = 0.1 * torch.randn(layout.n_params, generator=generator, dtype=dtype)
    if isinstance(layout, DenseLayout):
        row[sum(layout.sizes):] = 0
        x = torch.randn(layout.examples, layout.n, generator=generator, dtype=dtype)
        return row, (torch.arange(layout.examples) < layout.m).to(dtype), x, (x[:, 0] > 0).long()
    _, _, W2, _, b2 = layout.views(row)
    W2[:, layout.classes:], b2[layout.classes:], row[sum(layout.sizes):] = 0, 0, 0
    train = torch.zeros(layout.p**2, dtype=dtype)
    train[:: -(-layout.p**2 // 100)] = 1
    pairs = train.nonzero()[:, 0]
    return row, train, pairs // layout.p, pairs % layout.p


def trial(library: ctypes.CDLL | None, layout: Layout | DenseLayout, start: Tensor, train: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """Rows and metrics after two steps of either loss and either order of decay: by `library`, or by the definition in float64."""
    out, dtype = [], start.dtype if library else torch.float64
    a = a.to(dtype) if a.is_floating_point() else a
    targets = [9.0, 0.0, 5.0, 0.0][: 1 + len(layout.groups)]
    scalars = torch.tensor([[1.25, 0.999, 0.01, 0.0316, *targets, *PLAIN],
                            [1.25, 0.999, 0.005, 0.0447, -8.0, *[0.0] * len(layout.groups), 0.2, 0.98, 0.02]], dtype=dtype)
    for loss, decay_last in (("ce", False), ("mse", True), ("stablemax", False)):
        perp_grad = loss == "mse"
        rows = [row.to(dtype, copy=True) for row in (start, torch.zeros_like(start), torch.zeros_like(start))]
        if library:
            fused = step_of(layout)(library, layout, loss, dtype, decay_last, perp_grad)
            fused.steps(*rows, a, b, scalars)
            metrics = fused.evaluate(rows[0], train, a, b, scalars[-1, 0])
        else:
            for row in scalars:
                train_step_ref(*rows, a, b, row, layout, loss, decay_last, perp_grad=perp_grad)
            metrics = evaluate_ref(rows[0], train.double(), a, b, scalars[-1, 0], layout, loss)
        out += [*rows, metrics]
    return out


def verdict(found: list[Tensor], layout: Layout | DenseLayout, *problem: Tensor) -> str:
    """Whether `found` is what the definition gives, to far more than rounding and far less than any mistake; a few words if not.

    Adam's first steps divide by |g|: single elements may differ by as much as the learning rate, a whole row does not."""
    tolerance = 1e-3 if problem[0].dtype == torch.float32 else 1e-9
    exact = trial(None, layout, *problem)
    wrong = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]
    return "" if max(wrong) < tolerance else f"its code is wrong (relative error {max(wrong):.1g})"


def keep_freed_memory() -> None:
    """Asks glibc to hand the megabytes that a transformer's step frees to the next step. Left to itself it returns them to the system, and
    2400 page faults a step were seen to double the time. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, top_pad, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -2, -3
        mallopt(mmap_threshold, 32 << 20)                               # the most that every glibc takes
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def first_words(error: Exception) -> str:
    """What a compiler's error begins with, and the first line of it that speaks of an error; one line."""
    first, *rest = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in rest if "error:" in line.lower()), "")
    return f"{first[:200]} ({said[:200]})" if said else first[:400]


def compile_for(definition: Callable, *example: Tensor) -> Callable:
    """`definition` through Inductor for arguments of exactly these shapes, called once here. The graph is traced without Dynamo, whose
    guards cost 50 us a call and count calls in a variable that all threads share. Raises build.BuildError."""
    options = {**COMPILE_OPTIONS, "cpp.cxx": (None, *build.COMPILERS)}      # Inductor's own search ends with g++
    with single_thread(), torch.no_grad():
        graph = make_fx(lambda *args: () if (out := definition(*args)) is None else out, tracing_mode="fake")(*example)
        try:
            compiled = torch._inductor.compile(graph, list(example), options=options)
            compiled(*example)
        except Exception as error:      # whatever its compiler, its folder or the loader meets
            raise build.BuildError(first_words(error)) from error
    return compiled


class single_thread:
    """Operations of this thread use one core inside the block; the thread count found at entry comes back at exit."""

    def __enter__(self) -> None:
        self.found = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.found)


def advance(kernels: CpuKernels, params: Tensor, moment1: Tensor, moment2: Tensor, a: Tensor, b: Tensor, train: Tensor,
            scalars: Tensor) -> list[float]:
    """`k` steps in place on one run's rows `(n_params,)`, then its metrics. `scalars (k, 5 + groups)`, `a, b (n,)`, `train (p*p,)`."""
    kernels.steps(params, moment1, moment2, a, b, scalars)
    return kernels.evaluate(params, train, a, b, scalars[-1, 0]).tolist()
