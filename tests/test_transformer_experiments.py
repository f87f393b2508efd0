"""The experiments on transformers: what they refuse, the cells they plan, planted rows that come out as claims, a run end to end."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import exp_delay_law
import exp_fork
import exp_transformer
from common import UsageError
from lab import files, settings, stats
from lab.answers import Table, flag_unlearned


@pytest.mark.parametrize("run, flags, message", [
    (exp_transformer, "--model gpt", "--model must be one of mlp, transformer, transformer_ln, transformer_b"),
    (exp_transformer, "--model mlp", "--model mlp is what exp_delay_law.py trains"),
    (exp_transformer, "--parts matrix", "--parts must be among dense groups concentration temperature, got 'matrix'"),
    (exp_delay_law, "--parts groups", "--parts must be among dense matrix moduli oneshot concentration frontier, got 'groups'"),
    (exp_transformer, "--seeds 4 --members 4", "--parts dense, 0..3, got 4"),
    (exp_transformer, "--parts temperature --members 12", "--parts temperature, 0..11, got 12"),
    (exp_transformer, "--parts concentration --free-seeds 2 --members 3", "of --parts concentration, 0..1, got 3"),
    (exp_transformer, "--model transformer_ln --parts groups --p 59 --group-moduli 71", "--p and --group-moduli both name"),
    (exp_transformer, "--w-c -1", "--w-c is one positive total norm"),
    (exp_transformer, "--parts temperature --w-c 0", "--w-c is one positive total norm"),
    (exp_transformer, "--w-c 30 --p 59 97", "goes with one --p"),
    (exp_transformer, "--w-c 30 --parts groups", "not with --parts groups"),
    (exp_transformer, "--temperature-seeds 0", "--temperature-seeds must be between 1"),
    (exp_fork, "--model transformer --fork-steps 801", "--fork-steps must be multiples of 25"),
])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, run: object, flags: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        run.run([*flags.split(), "--out", str(tmp_path / "out")])
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def planned(capsys: pytest.CaptureFixture, tmp_path: Path, *flags: str) -> str:
    exp_transformer.run([*flags, "--dry-run", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().out


def test_a_preset_keeps_its_doses_to_its_part(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = planned(capsys, tmp_path, "--model", "transformer_ln", "--parts", "groups")
    assert "clamp_unembed_p71_b16_rho1.30" in text and "rho0.95" not in text
    exp_delay_law.run(["--parts", "moduli", "--moduli", "41", "--dry-run", "--out", str(tmp_path / "out")])
    assert "clamp_p41_b12_rho1.30" in (text := capsys.readouterr().out) and "rho0.95" not in text


@pytest.mark.parametrize("model", ["transformer", "transformer_ln", "transformer_b"])
def test_a_gpu_is_used_where_there_is_one(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device is visible here; use --device cpu"):
        exp_transformer.run(["--model", model, "--device", "cuda", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, device in (([], "paper on cuda"), (["--device", "cuda"], "paper on cuda"), (["--backend", "triton"], "paper on cuda"),
                          (["--device", "cpu"], "laptop on cpu"), (["--backend", "eager"], "laptop on cpu")):
        assert f"preset {device}" in planned(capsys, tmp_path, "--model", model, *flags)


@pytest.mark.parametrize("flags, cells, others", [
    ("--preset paper --parts dense", ["free_p59_b16", "clamp_p59_b16_rho1.20: 16 members of a block of 16, budget 200000"], "tau"),
    ("--model transformer_ln --preset paper",
     ["clamp_unembed_p71_b16_rho1.30", "clamp_embed_p71_b16_rho1.30", "free_p53_b12_frac0.25", "free_p97_b12_frac0.55"], "tau"),
    ("--model transformer_b --preset paper", ["free_p59_b12", "clamp_p59_b12_rho1.00_tau1.00", "clamp_p59_b12_rho1.15_tau1.30"], "b16"),
    ("--parts temperature", ["free_p59_b12: 3 members", "clamp_p59_b12_rho1.15_tau1.70"], "tau1.30"),          # laptop: two temperatures
    ("--parts temperature --taus 2 --rhos 1.1 1.2 --w-c 32.49242", ["clamp_p59_b12_rho1.20_tau2.00", "clamp_p59_b12_rho1.20_tau1.00"], "free"),
])
def test_dry_run_lists_the_papers_cells(tmp_path: Path, capsys: pytest.CaptureFixture, flags: str, cells: list[str], others: str) -> None:
    text = planned(capsys, tmp_path, *flags.split())
    assert all(cell in text for cell in cells) and others not in text


NORMS = {"": 36.9, "embed": 6.0, "attn": 22.0, "mlp": 26.0, "unembed": 8.0}


def configured(flags: str, **more: object) -> exp_transformer.Config:
    config = exp_transformer.checked(*settings.parse(exp_transformer.Config, exp_transformer.PRESETS, exp_transformer.PARTS, flags.split()))
    return dataclasses.replace(config, **more)


def rows(cell: object, grok: list[int | None], norms: dict[str, float] = NORMS) -> list[dict]:
    """One row a member; norms spread by 0 and 2% over members."""
    held = cell.held[0] if cell.held else (0.0,) * 5
    return [{"cell": cell.name, "member": i, "loss": "ce", "seed0": 1000, "t_grok_step": t, "t_mem_step": 200, "censored": int(t is None),
             **{k: getattr(cell, k) for k in ("model", "arm", "p", "block", "rho", "tau", "lr", "train_frac", "weight_decay", "budget_steps",
                                              "clamp_start")},
             "held_norm": held[0] or None, **{f"held_{g}": h or None for g, h in zip(exp_transformer.GROUPS, held[1:], strict=True)},
             **{exp_transformer.column(g): None if t is None else norm * (1 + 0.02 * (i % 2)) for g, norm in norms.items()}}
            for i, t in enumerate(grok)]


def measured(runs: list[dict], config: exp_transformer.Config, log: list[dict] = ()) -> tuple[dict[str, dict], dict[str, dict]]:
    table = Table(runs, log)
    exp_transformer.measure(table, config, {"cells.csv": [], "contraction.csv": []})
    return table.claims, {finding["id"]: finding for finding in table.findings}


def test_planted_exponent_critical_norm_and_saturation_come_out() -> None:
    config = configured("--preset paper --parts dense --members 0 1 2 3 4 5 6 7")
    (control,) = exp_transformer.control_cells(config)
    runs = rows(control, [7000] * 8)
    w_c = exp_transformer.critical_norms(runs)
    assert w_c[control.name][""] == pytest.approx(36.9 * 1.01) and w_c[control.name]["unembed"] == pytest.approx(8 * 1.01)
    for cell in exp_transformer.held_cells(config, w_c):
        assert cell.held[0] == (pytest.approx(cell.rho * 36.9 * 1.01), 0, 0, 0, 0) and cell.clamp_start == 600
        times = 6608 * np.exp(15 * (cell.rho - 1)) * (0.5 if cell.rho == 1.20 else 1)
        runs += rows(cell, [int(times)] * 7 + [None])                        # a censored member counts as later
    claims, found = measured(runs, config)
    assert claims["A.tf.alpha"]["ours"] == pytest.approx(15, abs=0.01) and claims["A.tf.saturation"]["ours"] == pytest.approx(0.5, abs=0.01)
    assert claims["A.tf.wc"]["verdict"] == "REPLICATED" and claims["A.tf.rho1.00"]["verdict"] == "REPLICATED"
    assert claims["A.tf.rho0.85"]["n_censored"] == 1
    assert found["norm_factor.p59"]["ours"] == pytest.approx(0.5 * np.exp(15 * 0.35), rel=0.01) and not any(key.startswith("A.ln") for key in claims)
    assert not measured([{**run, "lr": 1e-3} for run in runs], dataclasses.replace(config, lrs=(1e-3,)))[0]    # another learning rate answers nothing


def test_the_control_of_a_group_clamp_is_of_its_own_train_fraction() -> None:
    config = configured("--model transformer_ln --preset paper --parts groups concentration --p 71 --free-seeds 16 --members 0 1 2 3 4 5 6 7")
    runs = []                                                                # both parts draw from one block
    for cell in exp_transformer.control_cells(config) + exp_transformer.other_free_cells(config):
        runs += rows(cell, [2000 if (cell.train_frac, cell.lr) == (0.40, 1e-3) else 1000] * 8)
    for cell in exp_transformer.held_cells(config, exp_transformer.critical_norms(runs)):
        runs += rows(cell, [3000] * 8)
    claims, found = measured(runs, config)
    assert claims["A.ln.none"]["ours"] == 2000
    assert {finding["ours"] for key, finding in found.items() if key.startswith("group_over_free.")} == {1.5}


def test_a_censored_dose_bounds_the_norm_factor_from_below() -> None:
    config = configured("--preset paper --parts dense --rhos 0.85 1.15 --members 0 1 2 3 4 5 6 7")
    (control,) = exp_transformer.control_cells(config)
    runs = rows(control, [7000] * 8)
    low, high = exp_transformer.held_cells(config, exp_transformer.critical_norms(runs))
    runs += rows(low, [500] * 8) + rows(high, [40_000] * 3 + [None] * 5)     # budget 200,000
    found = measured(runs, config)[1]
    assert found["norm_factor.p59"]["ours"] is None and found["norm_factor_at_least.p59"]["ours"] == 400
    assert found["norm_factor_at_least.p59"]["n_censored"] == 5
    complete = [run for run in runs if run["cell"] != high.name] + rows(high, [40_000] * 8)
    for run in complete:
        run["norm_unembed_at_grok"] *= 1.5 if run["cell"] == high.name else 1
    found = measured(complete, config)[1]
    assert found[f"unembed_over_free.{high.name}"]["ours"] == pytest.approx(1.5)
    assert found["norm_factor.p59"]["ours"] == 80 and "norm_factor_at_least.p59" not in found


def test_planted_concentration_and_group_clamps_come_out(tmp_path: Path) -> None:
    config = configured("--model transformer_ln --preset paper --parts groups concentration --members 0 1 2 3 4 5 6 7 8 9")
    runs = []
    for cell in exp_transformer.control_cells(config) + exp_transformer.other_free_cells(config):
        wide = 36.9 * (1 + cell.train_frac)                                   # total norm moves with the fraction, the unembedding's with p
        runs += rows(cell, [1900] * 10, {**NORMS, "": wide, "unembed": 8 * (cell.p / 59) ** 0.77})
    for cell in exp_transformer.held_cells(config, exp_transformer.critical_norms(runs)):
        assert sum(h > 0 for h in cell.held[0]) == 1 and cell.held[0][0] == 0
        runs += rows(cell, [int(1900 * cell.rho)] * 10)
    exp_transformer.draw(Table(runs), config, tmp_path, [], {"contraction.csv": []})         # attn is not held
    assert {path.name for path in tmp_path.glob("*.png")} == {"groups_p71.png", "critical_norm.png", "critical_norm_unembed.png"}
    claims, found = measured(runs, config)
    assert claims["A.ln.unembed_power"]["ours"] == pytest.approx(0.77, abs=1e-3)
    totals = np.array([36.9 * (1 + f) * (1 + 0.02 * (i % 2)) for f in exp_transformer.FRACTIONS for i in range(10)])
    assert claims["A.ln.total_cv"]["ours"] == pytest.approx(totals.std(ddof=1) / totals.mean(), abs=1e-5)
    assert claims["A.ln.unembed_cv"]["ours"] == pytest.approx(0.01 * np.sqrt(70 / 69) / 1.01, abs=1e-5)
    assert claims["A.ln.unembed1.3"]["ours"] == 2470 and claims["A.ln.mlp0.85"]["ours"] == 1615 and claims["A.ln.none"]["ours"] == 1900
    assert {"A.ln.unembed0.85", "A.ln.unembed1.0", "A.ln.unembed1.15", "A.ln.mlp1.3", "A.ln.embed1.3"} <= set(claims)
    assert not any(key.startswith("A.ln.") for key in measured([{**run, "model": "transformer"} for run in runs], config)[0])   # another network
    assert "cv.unembed.over_lr.p59" in found
    medians = 1 + np.array(exp_transformer.FRACTIONS)
    assert found["cv_of_medians.total.over_fraction.p53"]["ours"] == pytest.approx(medians.std(ddof=1) / medians.mean(), abs=1e-5)


def test_planted_temperature_comes_out(tmp_path: Path) -> None:
    """T_grok and L both fall with tau; where L is back at the baseline's, half of the delay is."""
    config = configured("--parts temperature --preset paper --w-c 32.49242 --members 0 1 2 3 4 5 6 7")
    times, scales = {1.0: 16_000, 1.15: 10_000, 1.3: 8600, 1.5: 6000, 1.7: 4000}, {1.0: 300.0, 1.15: 250.0, 1.3: 200.0, 1.5: 180.0, 1.7: 160.0}
    runs, log = [], []
    for cell in exp_transformer.held_cells(config, {"free_p59_b12": {"": config.w_c}}):
        assert cell.held[0] == (pytest.approx(cell.rho * 32.49242), 0, 0, 0, 0)
        T, L = (1238, 200.0) if cell.rho == 1 else (times[cell.tau], scales[cell.tau])
        runs += rows(cell, [T] * 8)
        log += [{"cell": cell.name, "member": m, "step": step, "logit_scale": L / (2 if step == 600 else 1), "collapse32": 0.25, "collapse64": 0.0}
                for m in range(8) for step in (600, stats.nearest_log(np.array([float(T)])))]
    claims, found = measured(runs, config, log)
    assert claims["B.tf.effect"]["ours"] == 4 and claims["B.tf.rho1.15.tau1.30.T_grok"]["ours"] == 8600
    assert claims["B.tf.rho1.15.tau1.30.L"]["ours"] == 200 and claims["B.tf.rho1.00.tau1.00.T_grok"]["verdict"] == "REPLICATED"
    assert not measured(runs, dataclasses.replace(config, w_c=30.0), log)[0]                 # another norm answers nothing
    assert found["recovery.ce.p59"]["ours"] == pytest.approx((16_000 - 8600) / (16_000 - 1238)) == found["recovery.ce.p59.early"]["ours"]
    assert found["norm_up.ce.p59"]["ours"] == pytest.approx(16_000 / 1238, abs=1e-6) and found["memorisation.ce.p59"]["ours"] == 1
    assert found["collapse.float32.ce.p59.rho1.15"]["ours"] == 0.25 and found["delay_share.ce.p59"]["ours"] == 1
    exp_transformer.draw(Table(runs, log), config, tmp_path, [], {"contraction.csv": []})
    assert {"mediation_p59.png", "memorisation_p59.png"} <= {path.name for path in tmp_path.iterdir()}
    alone = [run for run in runs if (run["rho"], run["tau"]) in ((1, 1), (1.15, 1))]
    assert not any(key.startswith("recovery") for key in measured(alone, config, log)[1])    # one temperature is no sweep


@pytest.mark.parametrize("law", [exp_delay_law, exp_transformer])
def test_a_budget_shortens_every_cell_that_has_a_larger_one(law: object) -> None:
    given = ["--preset", "paper", "--p", "59", "--members", "0", "--budget", "20000"]
    config = law.checked(*settings.parse(law.Config, law.PRESETS, law.PARTS, given))
    free = law.control_cells(config)
    norms = {cell.name: 50.0 if law is exp_delay_law else dict.fromkeys(("", *exp_transformer.GROUPS), 30.0) for cell in free}
    cells = [*free, *law.other_free_cells(config), *law.held_cells(config, norms)]
    assert {cell.budget_steps for cell in cells} <= {*range(8000, 20_001)} and max(cell.budget_steps for cell in cells) == 20_000
    with pytest.raises(UsageError, match="--budget must be at least 25 steps"):
        law.run(["--budget", "24"])


def test_a_run_that_comes_apart_at_a_held_norm_is_flagged(capsys: pytest.CaptureFixture) -> None:
    runs = [{"cell": "a", "member": m, "t_mem_step": t} for m, t in ((0, 200), (1, 200), (2, None))]
    log = [{"cell": "a", "member": m, "step": s, "train_accuracy": acc} for m, s, acc in
           ((0, 1, 0.02), (0, 400, 1.0), (0, 600, 0.95), (1, 1, 0.02), (1, 400, 0.3), (1, 600, 0.02), (2, 400, 0.5))]
    flag_unlearned(runs, log)
    assert [run["unlearned"] for run in runs] == [0, 2, 0]               # never memorised is censored, not unlearned
    assert capsys.readouterr().out == "member 1 of a unlearned its training pairs at 2 logged steps; its row says so\n"


def test_a_control_that_does_not_grok_leaves_complete_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    whole = exp_transformer.cell
    monkeypatch.setattr(exp_transformer, "cell", lambda *a, **k: dataclasses.replace(whole(*a, **k), budget_steps=50))
    out = tmp_path / "out"
    exp_transformer.run(["--model", "transformer_ln", "--parts", "dense", "groups", "--p", "13", "--members", "0", "1", "--backend", "eager",
                         "--out", str(out)])
    assert "no W_c" in capsys.readouterr().out
    runs = files.read_runs(out / "runs.csv")
    assert [run["model"] for run in runs] == ["transformer_ln"] * 2 and {"norm_unembed_at_grok", "held_embed", "unlearned"} <= set(runs[0])
    assert {"cells.csv", "trajectories.csv", "summary.json"} <= {path.name for path in out.iterdir()}


def test_a_fork_of_a_transformer_starts_its_arms_from_one_state(tmp_path: Path) -> None:
    out = tmp_path / "out"
    exp_fork.run(["--model", "transformer_ln", "--p", "13", "--fork-steps", "75", "--rho", "1.1", "--budget", "100", "--members", "0", "--backend",
                  "eager", "--lr", "3e-3", "--out", str(out)])
    runs = {run["arm"]: run for run in files.read_runs(out / "runs.csv")}
    N0 = runs["same"]["norm_at_fork"]
    assert [runs[arm]["held_norm"] for arm in ("lowered", "same", "raised")] == pytest.approx([N0 / 1.1, N0, 1.1 * N0], rel=1e-6)
    log = [row for row in files.read_csv(out / "trajectories.csv") if row["cell"] == runs["raised"]["cell"]]
    assert log[0]["step"] == 76 and log[0]["norm"] == pytest.approx(1.1 * N0, rel=1e-6)     # the clamp acts at the fork at once
    assert "unlearned" in runs["raised"]


def test_temperature_at_a_given_norm_trains_no_control(tmp_path: Path) -> None:
    out = tmp_path / "out"
    exp_transformer.run(["--parts", "temperature", "--p", "13", "--w-c", "30", "--taus", "1.7", "--budget", "25", "--members", "0", "--backend",
                         "eager", "--out", str(out)])
    runs = files.read_runs(out / "runs.csv")
    assert {(run["model"], run["arm"], run["rho"], run["tau"], run["lr"], run["clamp_start"]) for run in runs} == {
        ("transformer_b", "clamp", rho, tau, 5e-4, 600) for rho, tau in ((1, 1), (1.15, 1), (1.15, 1.7))}
    assert all("unlearned" in run for run in runs)
    assert [run["held_norm"] for run in runs] == pytest.approx([30, 34.5, 34.5]) and all(run["w_c"] == 30 for run in runs)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["claims"] == [] and "recovery.ce.p13" in {finding["id"] for finding in summary["findings"]}     # another p than the paper's
