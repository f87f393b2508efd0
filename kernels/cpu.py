"""The CPU path: the definitions, compiled where there is a C++ compiler, walked run by run by one single-threaded worker per core.

Seen on 2 cores at p=59: 2.6 ms a run-step on one core compiled, 9 ms eagerly; two workers take twice the runs in the same time, which
two threads inside one operation do not. A run of 1 MB stays in the cache for a whole interval.
"""
import contextlib
import ctypes
import functools
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .adamw import scalar_names
from .layout import Layout, TransformerLayout
from .step import evaluate_ref, train_step_ref

# cpp_wrapper: one C++ call a step, which also releases the interpreter lock; threshold: keep gelu' instead of evaluating erf twice.
COMPILE_OPTIONS = {"cpp_wrapper": True, "realize_opcount_threshold": 8, "cpp.threads": 1}
# The weighted sum of eight table rows as one loop, attention weights kept rather than divided again in it: 4% of a step, 15% of an evaluation.
TRANSFORMER_OPTIONS = {"realize_acc_reads_threshold": 64, "realize_reads_threshold": 3}


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


class CpuKernels:
    """`step` and `evaluate` for runs of one shape, after one warm-up call each so that nothing compiles inside a worker."""

    def __init__(self, layout: Layout | TransformerLayout, n_train: int, loss: str, dtype: torch.dtype, compiled: bool, decay_last: bool = False):
        keep_freed_memory()
        self.step = functools.partial(train_step_ref, layout=layout, loss=loss, decay_last=decay_last)
        self.evaluate = functools.partial(evaluate_ref, layout=layout, loss=loss)
        if compiled:
            rows = [torch.zeros(layout.n_params, dtype=dtype) for _ in range(3)]
            a, b = torch.zeros(2, n_train, dtype=torch.int64)
            options = COMPILE_OPTIONS | (TRANSFORMER_OPTIONS if isinstance(layout, TransformerLayout) else {})
            self.step = compile_for(self.step, options, *rows, a, b, torch.ones(len(scalar_names(layout.groups)), dtype=dtype))
            self.evaluate = compile_for(self.evaluate, options, rows[0], torch.ones(layout.p**2, dtype=dtype), a, b, torch.ones((), dtype=dtype))

    def steps(self, params: Tensor, moment1: Tensor, moment2: Tensor, a: Tensor, b: Tensor, scalars: Tensor) -> None:
        """`k` steps in place on one run's rows `(n_params,)`; `a, b (n,)` its training pairs, `scalars (k, 5 + groups)`."""
        for row in scalars:
            self.step(params, moment1, moment2, a, b, row)


def keep_freed_memory() -> None:
    """Asks glibc to hand the megabytes that a step frees to the next step. Left to itself it returns them to the system, and 2400 page
    faults a step were seen to double the transformers' time. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, top_pad, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -2, -3
        mallopt(mmap_threshold, 32 << 20)                               # the most that every glibc takes
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def compile_for(definition: Callable, options: dict, *example: Tensor) -> Callable:
    """`definition` through Inductor for arguments of exactly these shapes, called once here. The graph is traced without Dynamo, whose
    guards cost 50 us a call and count calls in a variable that all threads share."""
    with single_thread(), torch.no_grad():
        graph = make_fx(lambda *args: () if (out := definition(*args)) is None else out, tracing_mode="fake")(*example)
        compiled = torch._inductor.compile(graph, list(example), options=options)
        compiled(*example)
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
