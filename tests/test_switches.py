"""Every switch of optimiser and network against the plain module with torch's own optimiser, in float64; and what they refuse."""
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import exp_delay_law
from common import Cell, UsageError, load, train
from kernels import cpu
from kernels.adamw import PLAIN, adamw_project_ref
from kernels.step import train_step_ref
from lab.answers import UNLESS_STATED, Table
from lab.ensemble import Ensemble

BACKENDS = ["eager", pytest.param("compiled", marks=pytest.mark.skipif(not cpu.has_compiler(), reason="no C++ compiler"))]
WEIGHTS = ("E", "W1", "W2")
STEPS = 12


def by_torch(cell: Cell) -> list[torch.Tensor]:
    """Parameters after STEPS steps of the plain module under autograd and torch.optim.AdamW, norms held by hand."""
    ensemble = Ensemble([cell], "cpu", "eager", torch.float64, "ieee")
    model = ensemble.state.module(0, cell.model, cell.p, cell.width)
    weights = [getattr(model, name) for name in WEIGHTS]
    optimiser = torch.optim.AdamW([{"params": weights, "weight_decay": cell.weight_decay}, {"params": [model.b1, model.b2], "weight_decay": 0.0}],
                                  lr=cell.lr, betas=cell.betas)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / cell.warmup) if cell.warmup else 1)
    a, b, norm = ensemble.a[0], ensemble.b[0], lambda tensors: torch.cat([x.detach().flatten() for x in tensors])
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        F.cross_entropy(model(a, b) / cell.tau, (a + b) % cell.p).backward()
        if cell.perp_grad:
            w, g = norm(weights), norm([x.grad for x in weights])
            for x in weights:
                x.grad -= float(g @ w) / float(w @ w) * x.detach()
        optimiser.step()
        rate.step()
        total = float(norm(weights).norm())
        if cell.held and step >= cell.clamp_start and (cell.hold == "exact" or total > cell.held[0][0]):
            for x in weights:
                x.data *= cell.held[0][0] / total
    return [parameter.detach() for parameter in model.parameters()]


SWITCHES = {
    "nothing": {}, "betas": {"betas": (0.8, 0.98)}, "warmup": {"warmup": 7}, "width": {"width": (32, 48)}, "init_scale": {"init_scale": 0.5},
    "hold_from_the_start": {"held": ((5.0,),), "clamp_start": 0}, "cap_that_acts": {"held": ((5.0,),), "clamp_start": 3, "hold": "cap"},
    "cap_that_does_not": {"held": ((80.0,),), "clamp_start": 3, "hold": "cap"}, "perp_grad": {"perp_grad": True},
    "all": {"betas": (0.85, 0.97), "warmup": 5, "width": (48, 16), "init_scale": 2.0, "held": ((9.0,),), "clamp_start": 0, "hold": "cap",
            "perp_grad": True, "tau": 1.5},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_does_what_torch_does(switch: str, backend: str) -> None:
    cell = Cell(**{"p": 11, "width": (16, 16), "members": (0,), "budget_steps": STEPS, "lr": 3e-3, **SWITCHES[switch]})
    ensemble = Ensemble([cell], "cpu", backend, torch.float64, "ieee")
    ensemble.compile()
    assert ensemble.backend == backend
    with torch.no_grad():
        ensemble.advance(0, STEPS)
    ours = ensemble.state.module(0, "mlp", 11, cell.width)
    for mine, theirs in zip(ours.parameters(), by_torch(cell), strict=True):
        assert (mine - theirs).norm() <= 1e-9 * theirs.norm()
    if switch != "nothing":
        plain = by_torch(dataclasses.replace(cell, **{f.name: f.default for f in dataclasses.fields(Cell) if f.name in SWITCHES[switch]},
                                             name="", arm=""))
        acts = any(x.shape != y.shape or (x - y).norm() > 1e-6 * x.norm() for x, y in zip(plain, ours.parameters(), strict=True))
        assert acts == (switch != "cap_that_does_not")


def test_switches_are_vectors_over_runs() -> None:
    """Runs of one ensemble each have their own; alone they are the same bits."""
    shape = {"p": 11, "width": (16, 16), "members": (0,), "budget_steps": 50, "lr": 3e-3}
    cells = [Cell("a", betas=(0.8, 0.98), **shape), Cell("b", warmup=9, init_scale=0.7, **shape), Cell("c", held=((6.0,),), clamp_start=0, **shape),
             Cell("d", held=((6.0,),), clamp_start=0, hold="cap", **shape), Cell("e", **shape)]
    together = train(cells, backend="eager")
    assert together.state.params.shape[0] == 5 and len({row.numpy().tobytes() for row in together.state.params}) == 5
    for i, cell in enumerate(cells):
        assert torch.equal(train([cell], backend="eager").state.params[0], together.state.params[i])


def test_the_step_without_the_gradient_along_the_weights_keeps_them_perpendicular() -> None:
    ensemble = Ensemble([Cell(p=11, width=(16, 16), members=(0,), perp_grad=True)], "cpu", "eager", torch.float64, "ieee")
    rows = [tensor[0].clone() for tensor in (ensemble.state.params, ensemble.state.moment1, ensemble.state.moment2)]
    weights, n = rows[0].clone(), ensemble.layout.n_weights
    train_step_ref(*rows, ensemble.a[0], ensemble.b[0], ensemble.scalars(np.array([0]), 1)[0, 0], ensemble.layout, "ce", perp_grad=True)
    assert abs(float(rows[1][:n] @ weights[:n])) <= 1e-14 * float(rows[1][:n].norm() * weights[:n].norm()) and rows[1][n:].abs().max() > 0


def test_a_cap_acts_from_above_only() -> None:
    ensemble = Ensemble([Cell(p=11, width=(16, 16), members=(0,))], "cpu", "eager", torch.float64, "ieee")
    row, zeros, n = ensemble.state.params[0], torch.zeros_like(ensemble.state.params[0]), ensemble.layout.n_weights
    norm = float(row[:n].norm())
    for target, wanted in ((-0.5 * norm, 0.5 * norm), (-2 * norm, norm), (2 * norm, 2 * norm), (0, norm)):
        scalars = torch.tensor([1, 1, 0, 1, target, 0, 0, 0, *PLAIN], dtype=torch.float64)
        assert float(adamw_project_ref(row, zeros, zeros, zeros, scalars, ensemble.layout)[0][:n].norm()) == pytest.approx(wanted, rel=1e-14)


def test_changed_networks_answer_no_published_number(tmp_path: object) -> None:
    """Their columns are there where they are needed, and only there; saved weights are of their width."""
    cell = Cell("clamp", p=11, width=(32, 16), betas=(0.9, 0.98), members=(0,), budget_steps=25, held=((6.0,),), clamp_start=0, rho=1.0, hold="cap")
    result = train([cell], backend="eager", weights=tmp_path)
    row = result.runs[0]
    assert (row["beta2"], row["d"], row["H"], row["hold_from"], row["hold"]) == (0.98, 32, 16, 0, "cap") and not {"beta1", "warmup"} & set(row)
    assert not set(UNLESS_STATED) & set(train([Cell(p=11, members=(0,), budget_steps=1)], backend="eager").runs[0]) - {"tau", "group", "gamma"}
    table = Table(result.runs)
    conditions = {"id": "A.x", **{k: row[k] for k in ("model", "task", "p", "loss", "arm", "block", "rho")}}
    assert not table.like(conditions) and table.like(conditions, **{k: row.get(k) for k in UNLESS_STATED if k not in ("tau", "group", "gamma")})
    assert load(tmp_path / "clamp.safetensors").modules[0]["end"].W1.shape == (64, 16)


@pytest.mark.parametrize("flags, said", [
    (["--width", "100"], "width is two multiples of 16"), (["--width", "100", "128"], "got 100 128"), (["--width", "16", "16", "16"], "got 16 16 16"),
    (["--betas", "1", "1"], "betas are two numbers of at least 0 and below 1"), (["--betas", "0.9"], "got 0.9"), (["--warmup", "-1"], "warmup -1"),
    (["--init-scale", "0"], "init_scale 0.0"), (["--hold", "tight"], "--hold must be one of exact, cap"),
    (["--hold-from", "-7"], "--hold-from is a step"),
    (["--loss", "hinge"], "--loss must be one of ce, mse, stablemax"), (["--betas", "nan", "0.9"], "must be finite"),
    (["--networks", "published", "--warmup", "5"], "they go without --warmup")])
def test_impossible_switches_are_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        exp_delay_law.run([*flags, "--dry-run"])
    assert "\n" not in str(error.value)
