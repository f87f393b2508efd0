"""Whole steps of the transformers on the engine's CUDA path: run by test_triton.py in a process of its own, interpreted or on a GPU.

Sizes as in triton_transformer.py; the sums that these compositions leave to chance are tested there.
"""
import pytest
import torch
from tolerance import assert_accurate, references
from triton_cases import DEVICE, make_transformer_case, with_table
from triton_steps import assert_agrees, assert_bits_depend_on_nothing_else, assert_the_trainer_agrees, engine, schedule, small

import common
from common import Cell
from kernels.cuda import chunk_runs, state_bytes_per_run, workspace_bytes_per_run
from kernels.layout import transformer_layout
from kernels.pairs import slots_for
from kernels.step import gradient_ref, metric_names
from kernels.transformer_launches import gradient
from lab import book, ensemble

__all__ = ["small"]
LAYER_NORM = pytest.mark.parametrize("model", ["transformer", "transformer_ln"])


@pytest.mark.parametrize(("model", "loss", "tau", "targets", "decay_last", "dtype"), [
    ("transformer", "ce", 1.0, (), False, torch.float32), ("transformer", "mse", 0.5, (20.0,), False, torch.float64),
    ("transformer", "ce", 1.7, (0, 0, 0, 0, 4.0), False, torch.float32), ("transformer_ln", "ce", 1.7, (20.0,), False, torch.float64),
    ("transformer_ln", "mse", 0.5, (), False, torch.float32), ("transformer_ln", "ce", 1.0, (0, 2.0), True, torch.float32),
    ("transformer_b", "stablemax", 1.7, (), True, torch.float32), ("transformer_b", "mse", 1.0, (0, 0, 3.0), False, torch.float64)])
def test_one_step(model: str, loss: str, tau: float, targets: tuple[float, ...], decay_last: bool, dtype: torch.dtype) -> None:
    """A step and an evaluation; run 0 holds its total norm or one group's, run 1 is free."""
    case = make_transformer_case(model, dtype=dtype, loss=loss, tau=tau)
    made = assert_agrees(case, schedule(case, 1, targets=targets), decay_last)
    norms = made.metrics[0, metric_names(case.layout.groups).index("norm"):].tolist()
    for target, norm in zip(targets, norms, strict=False):
        assert not target or abs(norm - target) <= 2 * torch.finfo(dtype).eps * target


def test_a_table_of_labels() -> None:
    case = with_table(make_transformer_case("transformer"))
    assert_agrees(case, schedule(case, 1))


@pytest.mark.bits
@pytest.mark.parametrize(("model", "dtype", "arithmetic"), [("transformer", torch.float32, "ieee"), ("transformer_ln", torch.float32, "tf32x3")])
def test_bits_depend_on_nothing_else(model: str, dtype: torch.dtype, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_transformer_case(model, 3, dtype=dtype)
    assert_bits_depend_on_nothing_else(case, schedule(case, 2, targets=(9.0,)), arithmetic, monkeypatch)


@LAYER_NORM
def test_gradient_at_the_experiments_widths(model: str) -> None:
    case = make_transformer_case(model, 13, runs=1, d=128, H=512, scale=1.0, tau=1.3)
    made, scalars = engine(case), case.scalars.to(DEVICE)
    gradient(made.state.params, made.state.slots, made.labels, scalars, made.workspace, case.n, case.layout, "ce", "ieee")
    wanted = references(torch.float32, lambda t: case.layout.views(gradient_ref(case.params[0].to(t), case.a[0], case.b[0], case.scalars[0, 0].to(t),
                                                                                case.layout, "ce")))
    for name, mine, reference in zip(("E", "pos", "Wq", "Wk", "Wv", "Wo", "Win", "Wout", "U"), case.layout.views(made.workspace.gradient[0]), wanted,
                                     strict=True):
        assert_accurate(name, mine, reference)


@LAYER_NORM
def test_workspace_is_counted_and_bounded(model: str) -> None:
    case = make_transformer_case(model)
    made = engine(case)
    per_run = workspace_bytes_per_run(case.layout, slots_for(case.n), torch.float32)
    assert sum(tensor.nbytes for tensor in made.workspace) == made.chunk * per_run
    layout, slots = transformer_layout(59, model=model), slots_for(1392)
    for runs in (160, 20_000):
        assert chunk_runs(layout, slots, torch.float32, runs) * workspace_bytes_per_run(layout, slots, torch.float32) <= 1 << 30
    assert chunk_runs(layout, slots, torch.float32, 160) >= 54       # a third of the paper's ensemble at once
    assert 20_000 * (state_bytes_per_run(layout, torch.float32) + 4 * case.slots.shape[1] + 59**2) + (1 << 30) < 100e9


def test_every_row_starts_aligned() -> None:
    """A chunk that starts elsewhere must launch the kernels compiled for the first, for nothing may compile inside a capture."""
    made = engine(make_transformer_case("transformer_ln", 7))
    for tensor in (*made.state, made.metrics):
        assert tensor[1:].data_ptr() % 16 == tensor.data_ptr() % 16 == 0


@pytest.mark.bits
def test_the_trainer_drives_the_kernels_as_it_drives_the_definition(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations every 2 steps, so that there are several. A group is held in one cell; the other starts later."""
    for where, name, steps in ((common, "EVAL_EVERY", 2), (ensemble, "EVAL_EVERY", 2), (common, "LOG_EVERY", 4), (book, "LOG_EVERY", 4)):
        monkeypatch.setattr(where, name, steps)
    shape = dict(p=5, block=2, budget_steps=6, model="transformer", lr=5e-4, eval_every=2)
    cells = [Cell("a", members=(0,), arm="clamp", clamp_start=2, held=((0, 0, 0, 0, 2.0),), **shape), Cell("b", members=(1,), **shape)]
    assert_the_trainer_agrees(cells, [0, 2])
