"""exp_saturation: its statistics on numbers made for them, and a run from the command line to the figures."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import exp_saturation
from common import UsageError, load
from kernels.layout import mlp_layout
from kernels.step import gradient_ref
from lab import book, files
from lab.answers import Table

PLAIN = {"model": "mlp", "task": "add", "p": 59, "train_frac": 0.4, "block": 4, "seed0": 0, "group": None, "gamma": None, "lr": 1e-3,
         "weight_decay": 1.0, "w_c": 50.0, "budget_steps": 100_000, "dtype": "float32", "n_train": 1392, "networks": "fresh"}


def made(slopes: dict[str, float]) -> tuple[Table, list[dict]]:
    """Members whose ln T_grok is linear in rho, and in ln L as well; the gradient of StableMax is none of its business."""
    runs, log, gradients, random = [], [], [], np.random.default_rng(0)
    for loss, slope in slopes.items():
        for rho in (0.85, 1.0, 1.15, 1.25):
            cell = f"clamp_add_{loss}_rho{rho}"
            for member in range(4):
                T = math.exp(7 + slope * (rho - 1)) * (1 + 0.01 * (member - 1.5))
                runs.append({**PLAIN, "cell": cell, "member": member, "loss": loss, "arm": "clamp", "rho": rho, "tau": 1.0, "held_norm": 50 * rho,
                             "t_mem_step": 100, "t_grok_step": T, "saturated_at_grok": 0.1 * rho if loss == "ce" else 0.0, "norm_at_grok": 50 * rho})
                steps = [round(T / 200 + i) * 200 for i in (-1, 0, 1)]
                log += [{"cell": cell, "member": member, "step": step, "logit_scale": math.exp(slope * rho / 2), "collapse32": 0.0, "collapse64": 0.0}
                        for step in steps]
                gradients.append({"cell": cell, "member": member, "gradient_at_grok": math.exp(random.normal())})
    for run in runs:      # every member is logged where the cell's scale is read
        mine = [row for row in log if row["cell"] == run["cell"]]
        log += [{**mine[0], "member": run["member"], "step": step} for step in {row["step"] for row in mine}
                if not any(row["step"] == step and row["member"] == run["member"] for row in mine)]
    return Table(runs, log), gradients


def test_slopes_and_what_stablemax_removes_are_those_of_the_runs() -> None:
    table, gradients = made({"ce": 8.0, "stablemax": 2.0})
    exp_saturation.measure(table, exp_saturation.Config(), {"gradients.csv": gradients})
    found = {finding["id"]: finding for finding in table.findings}
    assert found["slope.rho.add.ce"]["ours"] == pytest.approx(8) and found["slope.rho.add.stablemax"]["ours"] == pytest.approx(2)
    assert found["removed.add"]["ours"] == pytest.approx(0.75) and found["removed.add"]["n_censored"] == 0
    assert found["slope.L.add.ce"]["ours"] == pytest.approx(2) and found["slope.L.add.stablemax"]["ours"] == pytest.approx(2)
    assert found["r2.all"]["ours"] >= max(found[f"r2.{what}"]["ours"] for what in exp_saturation.EXPLAIN) and found["r2.gradient"]["ours"] < 0.9
    assert all(found[f"dr2.{what}"]["ours"] >= -1e-9 for what in exp_saturation.EXPLAIN)


def test_a_censored_cell_is_in_no_fit_and_said(capsys: pytest.CaptureFixture) -> None:
    table, gradients = made({"ce": 8.0, "stablemax": 2.0})
    for run in table.runs:
        if run["cell"] == "clamp_add_ce_rho1.25" and run["member"] < 2:
            run["t_grok_step"] = None
    table = Table(table.runs, [])
    exp_saturation.measure(table, exp_saturation.Config(), {"gradients.csv": gradients})
    found = {finding["id"]: finding for finding in table.findings}
    assert "0.85 1 1.15" in found["slope.rho.add.ce"]["quantity"] and "1.25" not in found["slope.rho.add.ce"]["quantity"]
    assert "removed.add" not in found and "in no fit" in capsys.readouterr().out


def test_from_the_command_to_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Two doses, two losses, a second task, all grokked where first looked at; then again from the tables alone."""
    monkeypatch.setattr(book, "CROSSINGS", (("train_accuracy", 0.99), ("test_accuracy", 0.0), ("test_accuracy", 0.0), ("test_accuracy", 0.95)))
    out = tmp_path / "out"
    flags = ["--preset", "smoke", "--parts", "doses", "tasks", "--tasks", "mul", "--p", "7", "--width", "16", "16", "--rhos", "0.8", "1.1", "--seeds",
             "2", "--hold-from", "0", "--budget", "150", "--save-weights", "--backend", "eager", "--dtype", "float64", "--out", str(out)]
    exp_saturation.run(flags)
    runs, gradients = files.read_runs(out / "runs.csv"), files.read_csv(out / "gradients.csv")
    assert {run["cell"] for run in runs} >= {"free_add_ce", "free_mul_stablemax", "clamp_add_stablemax_rho0.80", "clamp_mul_ce_rho1.10"}
    assert {run["loss"] for run in runs} == {"ce", "stablemax"} and (out / "figures" / "saturation.png").exists()
    assert (out / "figures" / "saturation_mul.png").exists() and "slope of ln T_grok on rho" in capsys.readouterr().out
    layout = mlp_layout(7, 16, 16, torch.float64)
    checked = 0
    for row in gradients:      # by autograd there; here by the closed form that the kernels have
        saved = load(out / "weights" / f"{row['cell']}.safetensors")
        if row["gradient_at_grok"] is None:
            continue
        net, pairs = saved.modules[row["member"]]["grok"], saved.pairs[row["member"]]
        params = torch.zeros(layout.n_params, dtype=torch.float64)
        for view, parameter in zip(layout.views(params), net.parameters(), strict=True):
            view[..., : parameter.shape[-1]] = parameter.detach()
        gradient = gradient_ref(params, pairs // 7, pairs % 7, torch.tensor(1.0, dtype=torch.float64), layout, saved.conditions["loss"],
                                saved.labels.flatten())
        assert row["gradient_at_grok"] == pytest.approx(float(gradient[: layout.n_weights].norm()), rel=1e-8)
        checked += 1
    assert checked >= 8
    before = (out / "gradients.csv").read_bytes()
    for path in (out / "weights").iterdir():
        path.unlink()
    (out / "weights").rmdir()
    exp_saturation.run([*flags, "--figures-only"])
    assert (out / "gradients.csv").read_bytes() == before


@pytest.mark.parametrize("flags, said", [
    (["--p", "59", "61"], "--p takes one modulus"), (["--model", "transformer"], "unknown flag --model; "),
    (["--task-frac", "1"], "--task-frac must be"), (["--tasks", "xor", "--parts", "tasks"], "task must be one of"),
    (["--members", "8"], "0..7, got 8"), (["--loss", "mse"], "unknown flag --loss; ")])
def test_impossible_values_are_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        exp_saturation.run([*flags, "--dry-run"])
    assert "\n" not in str(error.value)
