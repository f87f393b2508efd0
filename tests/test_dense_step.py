"""The dense MLP's C++ step against its definition, and its bits whatever surrounds a run."""
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tolerance import EPS32, assert_accurate, references
from torch import Tensor

from kernels import cpu
from kernels.adamw import PLAIN
from kernels.layout import DenseLayout
from kernels.step import evaluate_ref, metric_names, train_step_ref

pytestmark = pytest.mark.skipif(not cpu.has_compiler(), reason="no C++ compiler here: the dense MLP's C++ step cannot be tested")
METRICS = metric_names(DenseLayout.groups)


class Problem:
    """One run in mid-training: its rows scaled by `scale`, inputs that are no integers alone, scalars of `k` steps."""

    def __init__(self, layout: DenseLayout, dtype: torch.dtype, loss: str = "ce", tau: float = 1.0, scale: float = 1.0, held: Sequence[float] = (),
                 decay_last: bool = False, k: int = 1):
        self.layout, self.dtype, self.loss, self.decay_last = layout, dtype, loss, decay_last
        generator = torch.Generator().manual_seed(1)
        row, gradient = torch.randn(2, layout.n_params, generator=generator)
        row *= 0.3 * scale
        gradient[sum(layout.sizes):], row[sum(layout.sizes):] = 0, 0
        self.rows = [x.to(dtype) for x in (row, 1e-2 * gradient, 1e-4 * (1 + gradient.square()) * (gradient != 0))]
        self.x = (2 * torch.randint(2, (layout.examples, layout.n), generator=generator) - 1).to(dtype)
        self.x[0] *= 0.3
        self.labels = (self.x[:, :2].prod(1) > 0).long()
        self.train = (torch.arange(layout.examples) < layout.m).to(dtype)
        t = np.arange(51, 51 + k)
        scalars = np.zeros((k, 10))
        scalars[:, 0], scalars[:, 1], scalars[:, 2], scalars[:, 3] = tau, 0.999, 1e-3 / (1 - 0.9**t), np.sqrt(1 - 0.999**t)
        scalars[:, 4: 4 + len(held)], scalars[:, 7:] = held, PLAIN
        self.scalars = torch.from_numpy(scalars).float().to(dtype)

    def kernels(self) -> cpu.CpuKernels:
        kernels = cpu.CpuKernels(self.layout, self.layout.m, self.loss, self.dtype, True, self.decay_last)
        assert kernels.backend == "compiled"
        return kernels

    def steps(self, rows: list[Tensor]) -> list[Tensor]:
        self.kernels().steps(*rows, self.x, self.labels, self.scalars)
        return rows

    def copies(self) -> list[Tensor]:
        return [row.clone() for row in self.rows]

    def by_definition(self, dtype: torch.dtype) -> list[Tensor]:
        rows = [row.to(dtype, copy=True) for row in self.rows]
        for row in self.scalars.to(dtype):
            train_step_ref(*rows, self.x.to(dtype), self.labels, row, self.layout, self.loss, self.decay_last)
        return rows


PATHS = {                                  # n, H, m, examples
    "papers": (DenseLayout(30, 512, 60, 90), torch.float32),         # a ragged last tile of 12; rows of W1 in blocks of six without a rest
    "rest": (DenseLayout(7, 48, 51, 60), torch.float32),             # a rest of one input; three vectors; a tile of three
    "one_input": (DenseLayout(1, 16, 5, 9), torch.float32),
    "double": (DenseLayout(8, 32, 50, 60), torch.float64),
}
HARD = {"plain": {}, "saturated": {"scale": 20.0}, "tiny_logits": {"scale": 1e-3}, "hot": {"tau": 50.0, "k": 10}, "cold": {"tau": 0.02},
        "stablemax": {"loss": "stablemax", "tau": 0.4, "scale": 3.0},
        "mse": {"loss": "mse", "tau": 1.7, "decay_last": True, "held": (9.0, 0.0, 2.0)}}


@pytest.mark.parametrize("path, case", [*((path, "plain") for path in PATHS), *(("rest", case) for case in HARD), ("double", "mse")])
def test_a_step_agrees_with_the_definition(path: str, case: str) -> None:
    problem = Problem(*PATHS[path], **HARD[case])
    wanted = references(problem.dtype, problem.by_definition)
    for name, row, reference in zip(("params", "moment1", "moment2"), problem.steps(problem.copies()), wanted, strict=True):
        assert_accurate(name, row, reference)


@pytest.mark.parametrize("path, case", [("papers", "plain"), ("rest", "saturated"), ("double", "mse")])
def test_an_evaluation_is_the_definitions(path: str, case: str) -> None:
    problem = Problem(*PATHS[path], **HARD[case])
    found, exact = problem.kernels().evaluate(problem.rows[0], problem.train, problem.x, problem.labels, problem.scalars[0, 0]), evaluate_ref(
        problem.rows[0].double(), problem.train.double(), problem.x.double(), problem.labels, problem.scalars[0, 0].double(), problem.layout,
        problem.loss)
    counted = 7 + len(problem.layout.groups)         # the audit's shares are float32's own
    scale = exact.abs() + exact[METRICS.index("logit_scale")] ** (2 if problem.loss == "mse" else 1)     # a loss is a difference of logits
    assert ((found - exact).abs() <= 30 * torch.finfo(problem.dtype).eps * scale)[:counted].all()
    plain = evaluate_ref(problem.rows[0], problem.train, problem.x, problem.labels, problem.scalars[0, 0], problem.layout, problem.loss)
    assert ((found - plain).abs()[counted:-1] <= 1 / problem.layout.m).all() and abs(found[-1] - plain[-1]) <= 30 * EPS32


def test_the_held_norm_is_exact_and_bits_depend_on_nothing_else() -> None:
    problem = Problem(DenseLayout(7, 48, 51, 60), torch.float32, k=4, held=(9.0,))
    rows, split_up = problem.steps(problem.copies()), problem.copies()
    assert abs(float(rows[0][: problem.layout.n_weights].double().norm()) - 9) < 9 * EPS32
    shifted = [torch.cat([row.new_zeros(1 + i), row])[1 + i:] for i, row in enumerate(problem.rows)]     # 4, 8 and 12 bytes off
    for part in (problem.scalars[:1], problem.scalars[1:]):
        problem.kernels().steps(*split_up, problem.x, problem.labels, part)
        problem.kernels().evaluate(split_up[0], problem.train, problem.x, problem.labels, problem.scalars[0, 0])
    for other in (split_up, problem.steps(shifted)):
        assert all(map(torch.equal, rows, other))


def test_a_nearly_saturated_example_keeps_the_residual_of_its_probability() -> None:
    """As of `fused_step.cpp`: p - 1 is rounded before the mean is taken. One example and a network of biases alone."""
    layout, tau, gap = DenseLayout(1, 16, 1, 1), 1.7, 15.0
    row, moment1 = torch.zeros(2, layout.n_params)
    layout.views(row)[3][1] = -gap * tau
    scalars = torch.tensor([[tau, 1.0, 1e-3, 1.0, 0, 0, 0, *PLAIN]])
    step = cpu.CpuKernels(layout, 1, "ce", torch.float32, True).steps
    step(row, moment1, torch.zeros_like(row), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), scalars)
    residual = torch.softmax(torch.tensor([0.0, -gap]), 0)[0] - 1
    assert residual < 0 and float(layout.views(moment1)[3][0]) == pytest.approx(0.1 * float(residual) / tau, rel=1e-6)
    assert math.isfinite(float(row.sum()))
