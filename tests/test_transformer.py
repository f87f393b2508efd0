"""The transformers: float64 autograd of three plain tokens proves the closed-form gradient, and a plain step the whole of ours."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common import Cell, Transformer, n_train
from kernels import cpu
from kernels.adamw import PLAIN, adamw_project_ref, group_norms_ref, scalar_names
from kernels.layout import TransformerLayout, transformer_layout
from kernels.step import evaluate_ref, gradient_ref, metric_names, train_step_ref
from lab.draws import initial_rows, split
from lab.ensemble import Ensemble

MODELS = ("transformer", "transformer_ln", "transformer_b")


def plain(row: Tensor, layout: TransformerLayout) -> Transformer:
    """The model as one would write it, three tokens a pair, no tables, with the weights of `row`."""
    model = Transformer(layout.p, layout.d, layout.H, classes=layout.classes, normed=layout.normed).to(row.dtype)
    for parameter, values in zip(model.parameters(), layout.views(row), strict=True):
        parameter.data = values[..., : parameter.shape[-1]].clone()
    return model


def plain_loss(model: Transformer, a: Tensor, b: Tensor, tau: float, loss: str) -> Tensor:
    z, labels = model(a, b) / tau, (a + b) % model.p
    return F.cross_entropy(z, labels) if loss == "ce" else (z - F.one_hot(labels, z.shape[1])).square().sum(-1).mean()


def start(model: str, p: int, d: int = 128, H: int = 512, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple:
    layout = transformer_layout(p, d, H, dtype, model)
    pairs = split(p, n_train(p, 0.40), 0, 0)
    return layout, scale * initial_rows(layout, 2, 0, (0,), dtype)[0], pairs // p, pairs % p


def scalars(t: int, lr: float, weight_decay: float, targets: tuple = (0, 0, 0, 0, 0), tau: float = 1.0) -> Tensor:
    return torch.tensor([tau, 1 - lr * weight_decay, lr / (1 - 0.9**t), math.sqrt(1 - 0.999**t), *targets, *PLAIN], dtype=torch.float64)


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("tau, scale", [(1.0, 1.0), (0.4, 1.0), (1.7, 2.0)])   # scale 2: attention far from uniform
@pytest.mark.parametrize("model, p", [(model, p) for model in MODELS for p in (7, 23)])   # fewer pairs than columns; padded
def test_gradient_is_autograds(model: str, p: int, tau: float, scale: float, loss: str) -> None:
    layout, row, a, b = start(model, p, scale=scale)
    network = plain(row, layout)
    plain_loss(network, a, b, tau, loss).backward()
    ours = gradient_ref(row, a, b, torch.tensor(tau, dtype=torch.float64), layout, loss)
    for mine, parameter in zip(layout.views(ours), network.parameters(), strict=True):
        theirs = parameter.grad
        assert (mine[..., : theirs.shape[-1]] - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("model", MODELS)
def test_padding_gets_no_gradient_and_the_class_that_is_no_sum_does(model: str) -> None:
    layout, row, a, b = start(model, 9)
    dU = layout.views(gradient_ref(row, a, b, torch.tensor(1.0, dtype=torch.float64), layout, "ce"))[-1]
    assert layout.p_pad == 12 and layout.classes == (9 if model == "transformer_b" else 10)
    assert not dU[:, layout.classes:].any() and dU[:, : layout.classes].all()


@pytest.mark.parametrize("targets", [(0, 0, 0, 0, 0), (30.0, 0, 0, 0, 0), (0, 0, 20.0, 0, 6.0)], ids=["free", "total", "groups"])
@pytest.mark.parametrize("model", ["transformer", "transformer_ln"])
def test_ten_steps_are_ten_plain_steps(model: str, targets: tuple[float, ...]) -> None:
    """Autograd of three tokens, torch.optim.AdamW with decay on all nine matrices, the clamp written out: the whole step in float64."""
    layout, row, a, b = start(model, 13)
    network = plain(row, layout)
    matrices = [*network.parameters()]
    optimiser = torch.optim.AdamW(matrices, lr=3e-3, weight_decay=0.7)
    groups = matrices[:2], matrices[2:6], matrices[6:8], matrices[8:]
    moment1, moment2 = torch.zeros_like(row), torch.zeros_like(row)
    for t in range(1, 11):
        optimiser.zero_grad()
        plain_loss(network, a, b, 1.3, "ce").backward()
        optimiser.step()
        with torch.no_grad():
            for target, held in zip(targets, (matrices, *groups), strict=True):
                norm = math.sqrt(sum(float(w.square().sum()) for w in held))
                for w in held if target else ():
                    w *= target / norm
        train_step_ref(row, moment1, moment2, a, b, scalars(t, 3e-3, 0.7, targets, 1.3), layout, "ce")
    for mine, theirs in zip(layout.views(row), matrices, strict=True):
        # Adam divides by sqrt(v): where a gradient is as small as its rounding, 1e-15, an update may turn; seen 1e-12
        assert (mine[..., : theirs.shape[-1]] - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("model", ["transformer", "transformer_ln"])
def test_clamp_holds_total_and_groups_in_float32(model: str) -> None:
    layout, row, *_ = start(model, 13, dtype=torch.float32)
    gradient, zeros = torch.randn(layout.n_params, generator=torch.Generator().manual_seed(2)), torch.zeros_like(row)
    free, total, some = (adamw_project_ref(row, zeros, zeros, gradient, scalars(1, 1e-3, 1.0, targets).float(), layout)
                         for targets in ((0,) * 5, (33.0, 0, 0, 0, 0), (0, 5.0, 0, 21.0, 0)))
    eps = torch.finfo(torch.float32).eps   # the ratio and each product are rounded once: half an ulp each
    assert abs(float(group_norms_ref(total[0], layout).norm()) / 33 - 1) <= eps
    before, after = group_norms_ref(free[0], layout).tolist(), group_norms_ref(some[0], layout).tolist()
    assert abs(after[0] / 5 - 1) <= eps and abs(after[2] / 21 - 1) <= eps and after[1::2] == before[1::2]
    assert all(torch.equal(clamped[i], free[i]) for clamped in (total, some) for i in (1, 2))
    norms = [math.sqrt(sum(float(w.double().square().sum()) for w in layout.views(row)[part])) for part in map(slice, (0, 2, 6, 8), (2, 6, 8, 9))]
    assert group_norms_ref(row, layout).tolist() == pytest.approx(norms, rel=1e-12)


@pytest.mark.parametrize("model", ["transformer", "transformer_ln"])
def test_evaluation_counts_what_a_plain_forward_counts(model: str) -> None:
    layout, row, a, b = start(model, 13, 16, 32)
    p, tau = 13, 1.7
    moment1, moment2 = torch.zeros_like(row), torch.zeros_like(row)
    for t in range(1, 41):   # far enough that some pairs are right
        train_step_ref(row, moment1, moment2, a, b, scalars(t, 1e-2, 0.0, tau=tau), layout, "ce")
    layout.views(row)[-1][:, p] *= 8                             # the class that is no sum now wins some pairs
    train = torch.zeros(p * p, dtype=torch.float64).scatter_(0, a * p + b, 1)
    names = metric_names(layout.groups)
    got = dict(zip(names, evaluate_ref(row, train, a, b, torch.tensor(tau, dtype=torch.float64), layout, "ce").tolist(), strict=True))
    pair = torch.arange(p * p)
    z, labels = plain(row, layout)(pair // p, pair % p).detach(), (pair // p + pair % p) % p
    right, test = z.argmax(1) == labels, train == 0
    assert (z.argmax(1) == p).any()
    assert got["train_accuracy"] == right[~test].double().mean() > 2 / 13 and got["test_accuracy"] == right[test].double().mean()
    assert got["train_loss"] == pytest.approx(float(F.cross_entropy(z[~test] / tau, labels[~test])), rel=1e-12)
    assert got["test_loss"] == pytest.approx(float(F.cross_entropy(z[test] / tau, labels[test])), rel=1e-12)
    assert got["logit_scale"] == pytest.approx(float((z / tau).norm(dim=1).mean()), rel=1e-12)
    assert got["saturated"] == (torch.softmax(z / tau, 1).amax(1) > 0.999).double().mean()
    assert got["norm"] == pytest.approx(float(row[: layout.n_weights].norm()), rel=1e-12)
    probability = torch.softmax((z[~test] / tau).float(), 1)[torch.arange(len(a)), labels[~test]]
    assert got["collapse32"] == (probability >= 1).double().mean() and len(scalar_names(layout.groups)) == 12


def test_start_is_drawn_from_one_generator_block_at_once() -> None:
    layout = transformer_layout(5)
    generator = torch.Generator().manual_seed(3)
    for view, (rows, columns, scale) in zip(layout.views(initial_rows(layout, 4, 3, (1, 2), torch.float32)[1]), (
            (6, 128, 128**-0.5), (3, 128, 0.1 * 128**-0.5), *[(128, 128, 128**-0.5)] * 4, (128, 512, 128**-0.5), (512, 128, 512**-0.5),
            (128, 6, 128**-0.5)), strict=True):
        drawn = torch.randn(4, rows, columns, generator=generator)[2] * scale
        assert torch.allclose(view[:, :columns], drawn, rtol=1e-6, atol=0) and not view[:, columns:].any()


CELL = Cell("a", p=13, members=(0, 1, 2), block=4, budget_steps=75, lr=3e-3, model="transformer_ln", width=(32, 64))


def trained(cell: Cell, backend: str = "eager", dtype: torch.dtype = torch.float32) -> Ensemble:
    ensemble = Ensemble([cell], "cpu", backend, dtype, "ieee")
    ensemble.train(lambda _: None)
    return ensemble


def test_a_run_alone_is_the_run_in_company_and_compiled_is_eager() -> None:
    cell = replace(CELL, arm="clamp", clamp_start=30, held=((0, 0, 0, 20.0, 9.0),) * 3)
    eager = trained(cell)
    assert torch.equal(eager.state.params[2], trained(replace(cell, members=(2,), held=cell.held[:1])).state.params[0])
    run = eager.result().runs[0]
    assert (run["held_mlp"], run["held_unembed"], run["held_attn"], run["held_norm"]) == (20.0, 9.0, None, None)
    last = [row for row in eager.result().trajectories if row["member"] == 0]
    assert {"norm_embed", "norm_attn", "norm_mlp", "norm_unembed", "fourier_top5"} <= set(last[-1])
    if not cpu.has_compiler():
        pytest.skip("no C++ compiler here: the compiled backend cannot be tested")
    compiled = trained(cell, "compiled")
    # 75 Adam steps amplify rounding; a difference in the recipe is larger within the first few
    assert (compiled.state.params - eager.state.params).norm() < 1e-3 * eager.state.params.norm()


@pytest.mark.parametrize("model", ["transformer", "transformer_ln"])
def test_a_run_that_overflows_is_flagged(model: str) -> None:
    runs = trained(replace(CELL, model=model, lr=1e30, members=(0,))).result().runs
    assert [(run["diverged"], run["censored"]) for run in runs] == [(1, 1)] and runs[0]["steps_run"] < CELL.budget_steps


def test_a_short_held_row_holds_the_total_alone() -> None:
    short, full = (trained(replace(CELL, members=(0,), arm="clamp", clamp_start=30, held=(held,))) for held in ((30.0,), (30.0, 0, 0, 0, 0)))
    assert torch.equal(short.state.params, full.state.params)
    assert float(group_norms_ref(short.state.params[0], short.layout).norm()) == pytest.approx(30.0, rel=1e-6)


@pytest.mark.parametrize("tau, norm, logit_scale", [(1.0, 35.670937, 1.0642865), (1.7, 35.67166, 0.672196)])
def test_released_runs_start_as_ours(tau: float, norm: float, logit_scale: float) -> None:
    """Means after step 1 over the block of 12 in the released runs of arXiv 2606.18465: p classes, pos unscaled, decay last."""
    cell = Cell("f", p=59, members=tuple(range(12)), block=12, budget_steps=25, model="transformer_b", lr=5e-4, tau=tau, decay_last=True)
    ensemble = Ensemble([cell], "cpu", "eager", torch.float32, "ieee")
    ensemble.end[:] = 1
    ensemble.retire[:] = 1
    ensemble.train(lambda _: None)
    first = [row for row in ensemble.result().trajectories if row["step"] == 1]
    # means of twelve float32 numbers, printed to 7 or 8 digits; pos at a tenth moves the norm by 1e-3 and the logit scale by a fourth
    assert np.mean([row["norm"] for row in first]) == pytest.approx(norm, rel=2e-6)
    assert np.mean([row["logit_scale"] for row in first]) == pytest.approx(logit_scale, rel=2e-6)


def test_released_t_mem() -> None:
    cell = Cell("f", p=59, members=(1,), block=12, budget_steps=175, model="transformer_b", lr=5e-4, decay_last=True)
    assert [run["t_mem_step"] for run in trained(cell).result().runs] == [175]
