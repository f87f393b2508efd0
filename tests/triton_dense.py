"""The dense MLP on the engine's CUDA path: run by test_triton.py in a process of its own, interpreted or on a GPU.

n=20 takes two blocks of inputs, of which the second is ragged; 40 and 70 examples are ragged tiles of 32.
"""
import pytest
import torch
from tolerance import assert_accurate, references
from triton_cases import DEVICE, make_dense_case
from triton_steps import assert_agrees, assert_bits_depend_on_nothing_else, assert_the_trainer_agrees, engine, schedule

from common import Cell
from kernels import dense
from kernels.cuda import CudaKernels, workspace_bytes_per_run
from kernels.layout import DenseLayout
from kernels.loss import AUDIT
from kernels.step import evaluate_ref, gradient_ref, metric_names
from lab import ensemble, state

LAYOUT = DenseLayout(20, 32, 40, 70)
METRICS = metric_names(LAYOUT.groups)


@pytest.mark.parametrize(("loss", "tau", "targets", "decay_last", "scale", "dtype"), [
    ("ce", 1.0, (), False, 1.0, torch.float32), ("ce", 1.7, (9.0,), False, 50.0, torch.float32),
    ("mse", 0.5, (0, 3.0, 2.0), True, 1.0, torch.float32), ("ce", 0.3, (9.0,), True, 1.0, torch.float64),
    ("mse", 1.0, (), False, 1.0, torch.float64), ("stablemax", 1.7, (), False, 2.0, torch.float32)])
def test_one_step(loss: str, tau: float, targets: tuple[float, ...], decay_last: bool, scale: float, dtype: torch.dtype) -> None:
    """A step and an evaluation; run 0 holds its total norm or its groups', run 1 is free."""
    case = make_dense_case(LAYOUT, loss=loss, tau=tau, scale=scale, dtype=dtype)
    made = assert_agrees(case, schedule(case, 1, targets=targets), decay_last)
    norms = made.metrics[0, METRICS.index("norm"):].tolist()
    for target, norm in zip(targets, norms, strict=False):
        assert not target or abs(norm - target) <= 2 * torch.finfo(dtype).eps * target


@pytest.mark.parametrize("n", [1, 16, 33])      # one input; a whole block; three blocks, of which the last has one input
def test_gradient(n: int) -> None:
    """At the experiment's width, every part of it written."""
    layout = DenseLayout(n, 512, 33, 40)
    case = make_dense_case(layout, runs=1, tau=1.3)
    made, scalars = engine(case), schedule(case, 1)
    made.steps(scalars)
    wanted = references(torch.float32, lambda t: layout.views(gradient_ref(case.params[0].to(t), case.to(t).a[0], case.b[0],
                                                                           scalars[0, 0, 0].float().to(t), layout, "ce")))
    for name, mine, reference in zip(("W1", "W2", "b1", "b2"), layout.views(made.workspace.gradient[0]), wanted, strict=True):
        assert_accurate(name, mine, reference)


def test_audit_of_saturated_logits() -> None:
    """Most of the logits so large that float32 collapses; counts of pairs are the definition's but for one at a threshold."""
    case = make_dense_case(LAYOUT, scale=300.0)
    found = engine(case).measure(schedule(case, 1))
    for r in range(case.runs):
        wanted = evaluate_ref(case.params[r], case.train[r], case.a[r], case.b[r], schedule(case, 1)[r, -1, 0].float(), LAYOUT, "ce")
        off = (found[r] - wanted).abs()[-len(AUDIT): -1]
        assert (off <= 1.01 / LAYOUT.m).all() and 0 < wanted[METRICS.index("collapse32")] < 1, off


@pytest.mark.bits
@pytest.mark.parametrize(("dtype", "arithmetic"), [(torch.float32, "ieee"), (torch.float64, "ieee")])
def test_bits_depend_on_nothing_else(dtype: torch.dtype, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_dense_case(LAYOUT, dtype=dtype)
    assert_bits_depend_on_nothing_else(case, schedule(case, 2, targets=(9.0,)), arithmetic, monkeypatch)


def test_workspace_and_arguments() -> None:
    case = make_dense_case(LAYOUT)
    made = engine(case)
    assert sum(tensor.nbytes for tensor in made.workspace) == made.chunk * workspace_bytes_per_run(LAYOUT, LAYOUT.m, torch.float32)
    for tensor in (*made.state, made.metrics):
        assert tensor[1:].data_ptr() % 16 == tensor.data_ptr() % 16 == 0
    assert torch.equal(dense.order_of(case.a, case.b, 20)[..., 20].cpu().long(), case.b)
    with pytest.raises(ValueError, match="inputs: expected"):
        CudaKernels(DenseLayout(257, 32, 40, 70), "ce", torch.float32, "ieee", *[case.params] * 3, case.a, case.b, case.train)


@pytest.mark.bits
def test_the_trainer_drives_the_kernels_as_it_drives_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells, one held from a step on, the other of which a member starts later."""
    to = torch.Tensor.to
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self if a and a[0] == "cuda" else to(self, *a, **k))
    for module in (ensemble, state):
        monkeypatch.setattr(module, "N_TEST", 20)
    monkeypatch.setattr(state, "model_layout", lambda model, n, dtype, m, examples: DenseLayout(n, 32, m, examples))
    shape = dict(block=2, budget_steps=50, model="mlp_dense", task="parity n5 k2 m24")
    cells = [Cell("a", members=(0,), clamp_start=10, held=((5.0,),), **shape), Cell("b", members=(1,), **shape)]
    assert_the_trainer_agrees(cells, [0, 25])
