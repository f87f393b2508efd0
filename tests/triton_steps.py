"""Whole steps and intervals of the engine's CUDA path: run by test_triton.py in a process of its own, interpreted or on a GPU."""
import dataclasses

import numpy as np
import pytest
import torch
from tolerance import assert_accurate, references
from torch import Tensor
from triton_cases import DEVICE, ON_GPU, Case, make_case, with_table

from common import Cell
from kernels import cuda
from kernels.adamw import BETA1, BETA2, PLAIN, scalar_names
from kernels.cuda import LARGEST_WORKSPACE, CudaKernels, chunk_runs, state_bytes_per_run, workspace_bytes_per_run
from kernels.layout import mlp_layout, model_layout, transformer_layout
from kernels.loss import AUDIT
from kernels.step import METRICS, evaluate_ref, metric_names, train_step_ref
from lab import ensemble, state
from lab.ensemble import Ensemble

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]


def engine(case: Case, arithmetic: str = "ieee", decay_last: bool = False, perp_grad: bool = False) -> CudaKernels:
    """A fresh optimiser; the workspace starts as NaN."""
    params = case.params.to(DEVICE, copy=True)
    made = CudaKernels(case.layout, case.loss, params.dtype, arithmetic, params, torch.zeros_like(params), torch.zeros_like(params),
                       case.a, case.b, case.train, decay_last, case.table, perp_grad)
    for tensor in (*made.workspace, made.metrics):
        tensor.fill_(float("nan"))
    return made


def schedule(case: Case, steps: int, lr: float = 1e-3, targets: tuple[float, ...] = ()) -> Tensor:
    """`(R, steps, 5 + groups)` float64 scalars of the first steps, weight decay 1; run 0 holds the targets, the others do not. Beside its case's
    value tau grows with run and step, so that an index gone wrong shows."""
    step = torch.arange(1, steps + 1, dtype=torch.float64)
    out = torch.zeros(case.runs, steps, case.scalars.shape[1], dtype=torch.float64)
    out[..., 0] = case.scalars[:, :1] + 0.1 * torch.arange(case.runs)[:, None] + 0.01 * step
    out[..., 1], out[..., 2], out[..., 3] = 1 - lr, lr / (1 - BETA1**step), (1 - BETA2**step).sqrt()
    out[..., -3:] = torch.tensor(PLAIN, dtype=torch.float64)
    out[0, :, 4: 4 + len(targets)] = torch.tensor(targets, dtype=torch.float64)
    return out


def definition(case: Case, scalars: Tensor, dtype: torch.dtype, decay_last: bool = False, perp_grad: bool = False) -> list[Tensor]:
    """Of one run, after the steps `scalars (1, k, 5 + groups)`: `params, moment1, moment2 (n_params)`, every metric but the audit's `(1)`."""
    case, scalars = case.to(dtype), scalars[0].to(dtype)
    rows = [case.params[0].clone(), torch.zeros_like(case.params[0]), torch.zeros_like(case.params[0])]
    for row in scalars:
        train_step_ref(*rows, case.a[0], case.b[0], row, case.layout, case.loss, decay_last, case.table, perp_grad)
    metrics = evaluate_ref(rows[0], case.train[0], case.a[0], case.b[0], scalars[-1, 0], case.layout, case.loss, case.table)
    return [*rows, *metrics[:-len(AUDIT), None]]


def assert_agrees(case: Case, scalars: Tensor, decay_last: bool = False, perp_grad: bool = False) -> CudaKernels:
    made = engine(case, decay_last=decay_last, perp_grad=perp_grad)
    metrics = made.interval(scalars)
    names = ("params", "moment1", "moment2", *metric_names(case.layout.groups)[:-len(AUDIT)])
    for r in range(case.runs):
        found = [*(rows[r] for rows in made.state[:3]), *metrics[r, :-len(AUDIT), None]]
        wanted = references(case.params.dtype, lambda dtype, r=r: definition(case.alone(r), scalars[r: r + 1], dtype, decay_last,
                                                                                  perp_grad))
        for name, actual, reference in zip(names, found, wanted, strict=True):
            assert_accurate(f"{name} run {r} after {scalars.shape[1]} steps", actual, reference)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "tau"), [("ce", 1.0), ("ce", 1.7), ("mse", 1.0), ("mse", 0.5), ("stablemax", 1.7)])
def test_one_step(loss: str, tau: float, dtype: torch.dtype) -> None:
    case = make_case(13, dtype=dtype, loss=loss, tau=tau)
    assert_agrees(case, schedule(case, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_ten_steps(loss: str, dtype: torch.dtype) -> None:
    case = make_case(17, runs=1, dtype=dtype, loss=loss)         # float64 stores 20 columns where float32 stores 32
    assert_agrees(case, schedule(case, 10))


@pytest.mark.parametrize("dtype", DTYPES)
def test_betas_a_cap_and_the_gradient_across_the_weights(dtype: torch.dtype) -> None:
    """Run 0 is capped below its norm, and has other betas; run 1's cap is far above it."""
    case = make_case(13, dtype=dtype)
    scalars = schedule(case, 2, targets=(-9.0,))
    scalars[0, :, -3:], scalars[1, :, 4] = torch.tensor([0.2, 0.98, 0.02], dtype=torch.float64), -100.0
    made = assert_agrees(case, scalars, perp_grad=True)
    norms = made.metrics[:, METRICS.index("norm")].tolist()
    assert 8.9 < norms[0] <= 9 * (1 + 2 * torch.finfo(dtype).eps) and 9 < norms[1] < 100      # decay may take it under its cap


def test_a_table_of_labels() -> None:
    case = with_table(make_case(13))
    assert_agrees(case, schedule(case, 2))


@pytest.mark.parametrize("targets", [(9.0, 0, 0, 0), (0, 5.0, 6.0, 4.0)], ids=["total", "groups"])
def test_clamped_run_beside_a_free_one(targets: tuple[float, ...]) -> None:
    """Held to 2 eps: the rounding of the weights and of the ratio that scales them."""
    case = make_case(13)
    made = assert_agrees(case, schedule(case, 5, targets=targets))
    norms = [made.metrics[0, METRICS.index(name)].item() for name in ("norm", "norm_E", "norm_W1", "norm_W2")]
    for target, norm in zip(targets, norms, strict=True):
        assert not target or abs(norm - target) <= 2 * torch.finfo(torch.float32).eps * target
    assert abs(made.metrics[1, METRICS.index("norm")].item() - targets[0]) > 0.1


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_training_reaches_the_accuracies_of_the_definition(loss: str) -> None:
    """Four evaluations, 10 steps apart, on the way to memorisation: the counts of correct pairs are the definition's."""
    case = make_case(13, runs=1, loss=loss)
    scalars, made = schedule(case, 40, lr=1.5e-2), engine(case)
    metrics = torch.cat([made.interval(part) for part in scalars.split(10, dim=1)])
    wanted = torch.stack([torch.cat(definition(case, scalars[:, :steps], torch.float32)[3:5]) for steps in (10, 20, 30, 40)])
    assert torch.equal(metrics[:, :2], wanted), f"{metrics[:, :2]} against {wanted}"
    assert metrics[3, 0] > metrics[0, 0] > 3 / 13, metrics[:, 0]        # it learns: chance is 1 / 13


def assert_bits_depend_on_nothing_else(case: Case, scalars: Tensor, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run to a chunk; alone; after reordering and compaction: the same bits."""
    half = scalars.shape[1] // 2

    def train(case: Case, scalars: Tensor, kept: list[int] | None = None) -> list[Tensor]:
        made = engine(case, arithmetic)
        first = made.interval(scalars[:, :half])
        if kept is not None:
            made.keep(torch.tensor(kept + [r for r in range(case.runs) if r not in kept]))
            made.keep(torch.arange(len(kept)))
            scalars, first = scalars[kept], first[kept]
        return [first, made.interval(scalars[:, half:]), *(tensor.cpu() for tensor in made.state[:3])]

    whole = train(case, scalars)
    compared = [(train(case, scalars, kept=[1]), [1]), (train(case.alone(1), scalars[1:]), [1])]
    monkeypatch.setattr(cuda, "LARGEST_WORKSPACE", 1)
    assert engine(case).chunk == 1
    compared.append((train(case, scalars), [0, 1]))
    for outputs, rows in compared:
        assert all(torch.equal(output, reference[rows]) for output, reference in zip(outputs, whole, strict=True))


@pytest.mark.bits
@pytest.mark.parametrize(("dtype", "arithmetic"), [(torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float64, "ieee")])
def test_bits_depend_on_nothing_else(dtype: torch.dtype, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held run beside a free one."""
    case = make_case(13, dtype=dtype)
    assert_bits_depend_on_nothing_else(case, schedule(case, 4, targets=(9.0, 0, 0, 0)), arithmetic, monkeypatch)


def test_every_row_starts_aligned() -> None:
    """A chunk that starts elsewhere must launch the kernels compiled for the first, for nothing may compile inside a capture."""
    made = engine(make_case(13, runs=2))
    for tensor in (*made.state, made.metrics):
        assert tensor[1:].data_ptr() % 16 == tensor.data_ptr() % 16 == 0


def test_three_passes_are_not_one() -> None:
    """tf32x3 drops the product of two low parts, 2^-22 of the whole; one pass would drop 2^-11. On a GPU only does this bite."""
    case = make_case(53, runs=1)
    ieee, three = engine(case), engine(case, "tf32x3")
    for made in (ieee, three):
        made.interval(schedule(case, 1))
    assert three.state.moment1.sub(ieee.state.moment1).abs().max() <= 2**-18 * ieee.state.moment1.abs().max()


@pytest.mark.skipif(not ON_GPU, reason="NOT RUN: 500 steps at the experiments' sizes need a GPU")
@pytest.mark.parametrize(("model", "p", "arithmetic"), [("mlp", 59, "ieee"), ("mlp", 59, "tf32x3"), ("mlp", 97, "ieee"), ("transformer", 59, "ieee"),
                                                        ("transformer_ln", 59, "tf32x3")])
def test_500_steps_repeat(model: str, p: int, arithmetic: str) -> None:
    """Bit for bit: again, and in an ensemble of 2 rather than 40; half of the runs held."""
    generator = torch.Generator().manual_seed(0)
    layout = model_layout(model, p, torch.float32)
    params = torch.zeros(40, layout.n_params)
    for row in params:
        for part, (rows, columns, divisor) in zip(layout.views(row), layout.draws(), strict=False):
            part[:, :columns] = torch.randn(rows, columns, generator=generator) / divisor
    pairs = torch.stack([torch.randperm(p * p, generator=generator)[: int(0.4 * p * p)] for _ in range(40)])
    train = torch.zeros(40, p * p).scatter_(1, pairs, 1.0)
    step = torch.arange(1, 501, dtype=torch.float64)
    scalars = torch.zeros(40, 500, len(scalar_names(layout.groups)), dtype=torch.float64)
    scalars[..., 0], scalars[..., 1] = 1, 0.999
    scalars[..., 2], scalars[..., 3] = 1e-3 / (1 - BETA1**step), (1 - BETA2**step).sqrt()
    scalars[..., -3:] = torch.tensor(PLAIN, dtype=torch.float64)
    scalars[::2, 100:, 4] = 30.0

    def train_runs(chosen: list[int]) -> list[Tensor]:
        rows = params[chosen].to(DEVICE)
        made = CudaKernels(layout, "ce", torch.float32, arithmetic, rows, torch.zeros_like(rows), torch.zeros_like(rows),
                           pairs[chosen] // p, pairs[chosen] % p, train[chosen])
        metrics = [made.interval(part) for part in scalars[chosen].split(25, dim=1)]
        return [torch.stack(metrics, 1), *(tensor.cpu() for tensor in made.state[:3])]

    whole, again, two = train_runs(list(range(40))), train_runs(list(range(40))), train_runs([7, 30])
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    assert all(torch.equal(one[[7, 30]], other) for one, other in zip(whole, two, strict=True))
    assert whole[0].isfinite().all()


def test_arguments_are_checked() -> None:
    case = make_case(5)
    row = case.params
    for change, message in ((dict(loss="hinge"), "ce or mse or stablemax"), (dict(moment2=row[:1]), "moment2: expected shape"),
                            (dict(params=row.double()), "params: expected contiguous"), (dict(arithmetic="tf32"), "tf32x3"),
                            (dict(layout=mlp_layout(5, 12, 32)), "expected shape"),
                            (dict(layout=mlp_layout(257, 16, 32)), "at most 256 on CUDA, got 257"),
                            (dict(layout=transformer_layout(256, 16, 32)), "at most 255 on CUDA, got 256")):
        given = dict(layout=case.layout, loss="ce", dtype=torch.float32, arithmetic="ieee", params=row, moment1=row, moment2=row, a=case.a,
                     b=case.b, train=case.train)
        with pytest.raises(ValueError, match=message):
            CudaKernels(**{**given, **change})
    with pytest.raises(ValueError, match="scalars: expected"):
        engine(case).interval(torch.ones(3, 1, 11, dtype=torch.float64))


@pytest.mark.parametrize(("p", "n_slots"), [(59, 1408), (113, 5120)])
def test_workspace_is_bounded(p: int, n_slots: int) -> None:
    """Whatever the ensemble; 50,000 runs of p=59 fit in the 141 GB of an H200."""
    layout = mlp_layout(p)
    state, work = state_bytes_per_run(layout, torch.float32), workspace_bytes_per_run(layout, n_slots, torch.float32)
    for runs in (160, 4096, 50_000):
        total = chunk_runs(layout, n_slots, torch.float32, runs) * work
        assert total <= LARGEST_WORKSPACE
    if p == 59:
        own = state + 4 * n_slots + p * p       # the order of the pairs and the mask are kept per run as well
        assert 50_000 * own + LARGEST_WORKSPACE < 60e9


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of d=16, H=32; without a GPU the trainer's CUDA path hands the interpreter CPU tensors."""
    to = torch.Tensor.to
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self if a and a[0] == "cuda" else to(self, *a, **k))
    monkeypatch.setattr(state, "model_layout", lambda model, p, dtype, **_: mlp_layout(p, 16, 32, dtype) if model == "mlp" else
                        transformer_layout(p, 16, 32, dtype, model))


def assert_the_trainer_agrees(cells: list[Cell], steps: list[int]) -> None:
    """Runs that start at `steps`: lockstep, compaction and bookkeeping on the CUDA path against the CPU path."""
    start = dataclasses.replace(Ensemble(cells, "cpu", "eager", torch.float32, "ieee").state, step=np.array(steps))
    ours, theirs = (Ensemble(cells, device, backend, torch.float32, "ieee", start.pick([*range(len(steps))]))
                    for device, backend in (("cuda", "auto"), ("cpu", "eager")))
    for each in (ours, theirs):
        each.train(lambda _: None)
    end, needed = cells[0].budget_steps, sum(cells[0].budget_steps - step for step in steps)
    assert ours.step.tolist() == theirs.step.tolist() == [end] * len(steps) and ours.executed == theirs.executed == needed
    logs = [np.array(sorted(each.log_table().tolist())) for each in (ours, theirs)]
    assert np.array_equal(logs[0][:, :2], logs[1][:, :2])
    assert np.allclose(logs[0][:, -2:], logs[1][:, -2:], rtol=0, atol=1e-4, equal_nan=True)    # Fourier structure, if any
    for mine, other in zip(ours.state.params, theirs.state.params, strict=True):
        # 75 Adam steps carry rounding of 6e-8 each; a missed step, clamp or run is 1e-3 or more
        off = float((mine - other).norm() / other.norm())
        print(f"off by {off:.2g} of the norm after {end} steps, {off / 1e-5:.0%} of the budget")
        assert off <= 1e-5


def test_the_trainer_keeps_every_cell_s_schedule_on_the_kernels(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid as paper A's, but sparse, with a group scaled at a step off it, beside the default with one scaled at a step of its own."""
    monkeypatch.setattr(ensemble, "geometric_grid", lambda budget: np.array([0, 1, 2, 7, 19, budget]))
    once = {"budget_steps": 50, "scale_once": (0.5, 1.0, 1.0)}
    cells = [Cell("a", p=5, members=(0,), block=2, eval_every=0, clamp_start=11, **once),
             Cell("b", p=5, members=(1,), block=2, clamp_start=25, **once)]
    assert_the_trainer_agrees(cells, [0, 0])


@pytest.mark.bits
def test_the_trainer_drives_the_kernels_as_it_drives_the_definition(small: None) -> None:
    """Two cells that start at different steps, one retiring first."""
    cells = [Cell("a", p=5, members=(0, 1), block=2, budget_steps=75, arm="clamp", clamp_start=10, held=((3.0, 0, 0, 0),) * 2),
             Cell("b", p=5, members=(1,), block=2, budget_steps=75)]
    assert_the_trainer_agrees(cells, [0, 0, 50])
