"""The experiments on transformers: what they refuse, the cells they plan, planted rows that come out as claims, a run end to end."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import delay_law_transformer as transformer
import exp_delay_law
import exp_fork
import exp_logit_scale
from common import UsageError
from lab import figures, files, settings
from lab.answers import flag_unlearned


@pytest.mark.parametrize("run, flags, message", [
    (exp_delay_law, "--model gpt", "--model must be one of mlp, transformer, transformer_ln, transformer_b"),
    (exp_delay_law, "--model transformer --parts matrix", "--parts matrix is of the MLP; for --model transformer there are dense groups"),
    (exp_delay_law, "--parts groups", "--parts groups is of the transformers"),
    (exp_delay_law, "--model transformer_ln --moduli 31", "--moduli is read by parts of the MLP only"),
    (exp_delay_law, "--model transformer --parts concentration --free-seeds 2 --members 3", "of --parts concentration, 0..1, got 3"),
    (exp_logit_scale, "--model transformer --parts allocation", "--parts allocation splits the norm between E and W2 of the MLP"),
    (exp_delay_law, "--model transformer_ln --parts groups --p 59 --group-moduli 71", "--p and --group-moduli both name"),
    (exp_logit_scale, "--w-c -1", "--w-c is one positive norm"),
    (exp_logit_scale, "--w-c 0", "--w-c is one positive norm"),
    (exp_logit_scale, "--w-c 30 --p 59 97", "goes with one --p"),
    (exp_fork, "--model transformer --fork-steps 801", "--fork-steps must be multiples of 25"),
])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, run: object, flags: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        run.run([*flags.split(), "--out", str(tmp_path / "out")])
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_note_names_parts_of_the_model_only_and_a_preset_keeps_its_doses_to_its_part(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp_delay_law.run(["--model", "transformer_ln", "--parts", "concentration", "--rhos", "1.1", "--dry-run", "--out", str(tmp_path / "out")])
    assert "note: --rhos changes nothing here: it is read with --parts dense or groups\n" in capsys.readouterr().out
    exp_delay_law.run(["--model", "transformer_ln", "--parts", "groups", "--dry-run", "--out", str(tmp_path / "out")])
    assert "clamp_unembed_p71_b16_rho1.30" in (text := capsys.readouterr().out) and "rho0.95" not in text
    exp_delay_law.run(["--parts", "moduli", "--moduli", "41", "--dry-run", "--out", str(tmp_path / "out")])
    assert "clamp_p41_b12_rho1.30" in (text := capsys.readouterr().out) and "rho0.95" not in text


@pytest.mark.parametrize("model", ["transformer", "transformer_ln", "transformer_b"])
def test_a_gpu_is_used_where_there_is_one(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device is visible here; use --device cpu"):
        exp_delay_law.run(["--model", model, "--device", "cuda", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, device in (([], "paper on cuda"), (["--device", "cuda"], "paper on cuda"), (["--backend", "triton"], "paper on cuda"),
                          (["--device", "cpu"], "laptop on cpu"), (["--backend", "eager"], "laptop on cpu")):
        exp_delay_law.run(["--model", model, "--dry-run", "--out", str(tmp_path / "out"), *flags])
        assert f"preset {device}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, cells", [
    ("--model transformer --preset paper --parts dense", ["free_p59_b16", "clamp_p59_b16_rho1.20: 16 members of a block of 16, budget 200000"]),
    ("--model transformer_ln --preset paper",
     ["clamp_unembed_p71_b16_rho1.30", "clamp_embed_p71_b16_rho1.30", "free_p59_b20_frac0.25", "free_p97_b20"]),
])
def test_dry_run_lists_the_papers_cells(tmp_path: Path, capsys: pytest.CaptureFixture, flags: str, cells: list[str]) -> None:
    exp_delay_law.run([*flags.split(), "--dry-run", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert all(cell in text for cell in cells) and not (tmp_path / "out").exists()


CONFIG = exp_delay_law.Config(model="transformer", p=(59,), lrs=(5e-4,), parts=transformer.PARTS, preset="paper")
NORMS = {"": 36.9, "embed": 6.0, "attn": 22.0, "mlp": 26.0, "unembed": 8.0}


def rows(cell: object, grok: list[int], norms: dict[str, float] = NORMS) -> list[dict]:
    """One row a member; norms spread by 0 and 2% over members."""
    held = cell.held[0] if cell.held else (0.0,) * 5
    return [{"cell": cell.name, "member": i, "model": cell.model, "arm": cell.arm, "p": cell.p, "block": cell.block,
             "rho": cell.rho, "lr": cell.lr, "seed0": 0, "train_frac": cell.train_frac, "weight_decay": 1, "budget_steps": cell.budget_steps,
             "t_grok_step": t, "t_mem_step": 200, "censored": int(t is None),
             "held_norm": held[0] or None, **{f"held_{g}": h or None for g, h in zip(transformer.GROUPS, held[1:], strict=True)},
             **{transformer.column(g): None if t is None else norm * (1 + 0.02 * (i % 2)) for g, norm in norms.items()}}
            for i, t in enumerate(grok)]


def test_planted_exponent_critical_norm_and_saturation_come_out() -> None:
    config = dataclasses.replace(CONFIG, members=tuple(range(8)), parts=("dense",))
    (control,) = transformer.control_cells(config)
    runs = rows(control, [7000] * 8)
    w_c = transformer.critical_norms(runs)
    assert w_c[control.name][""] == pytest.approx(36.9 * 1.01) and w_c[control.name]["unembed"] == pytest.approx(8 * 1.01)
    for cell in transformer.clamp_cells(config, w_c):
        assert cell.held[0] == (pytest.approx(cell.rho * 36.9 * 1.01), 0, 0, 0, 0) and cell.clamp_start == 600
        times = 6608 * np.exp(15 * (cell.rho - 1)) * (0.5 if cell.rho == 1.20 else 1)
        runs += rows(cell, [int(times)] * 7 + [None])                        # a censored member counts as later
    claims, fits, findings = transformer.measure(runs, config)
    assert claims["A.tf.alpha"]["ours"] == pytest.approx(15, abs=0.01) and claims["A.tf.saturation"]["ours"] == pytest.approx(0.5, abs=0.01)
    assert claims["A.tf.wc"]["verdict"] == "REPRODUCED" and claims["A.tf.rho1.00"]["verdict"] == "REPRODUCED"
    assert claims["A.tf.rho0.85"]["n_censored"] == 1 and fits["dense.p59"]["rhos"] == [0.85, 1.0, 1.15]
    assert findings[0]["ours"] == pytest.approx(0.5 * np.exp(15 * 0.35), rel=0.01) and not any(key.startswith("A.ln") for key in claims)
    other = transformer.measure(runs, dataclasses.replace(config, lrs=(1e-3,)))[0]
    assert not other                                                         # another learning rate answers nothing


def test_the_control_of_a_group_clamp_is_of_its_own_train_fraction() -> None:
    config = dataclasses.replace(CONFIG, model="transformer_ln", lrs=(1e-3,), p=(71,), free_moduli=(71,), free_seeds=16, members=tuple(range(8)),
                                 parts=("groups", "concentration"))          # both parts draw from one block
    runs = []
    for cell in transformer.control_cells(config) + transformer.other_free_cells(config):
        runs += rows(cell, [2000 if (cell.train_frac, cell.lr) == (0.40, 1e-3) else 1000] * 8)
    for cell in transformer.clamp_cells(config, transformer.critical_norms(runs)):
        runs += rows(cell, [3000] * 8)
    claims, _, findings = transformer.measure(runs, config)
    assert claims["A.ln.none"]["ours"] == 2000
    assert {f["ours"] for f in findings if f["id"].startswith("group_over_free.")} == {1.5}


def test_a_censored_dose_bounds_the_norm_factor_from_below() -> None:
    config = dataclasses.replace(CONFIG, members=tuple(range(8)), parts=("dense",), rhos=(0.85, 1.15))
    (control,) = transformer.control_cells(config)
    runs = rows(control, [7000] * 8)
    low, high = transformer.clamp_cells(config, transformer.critical_norms(runs))
    runs += rows(low, [500] * 8) + rows(high, [40_000] * 3 + [None] * 5)     # budget 200,000
    found = {row["id"]: row for row in transformer.measure(runs, config)[2]}
    assert found["norm_factor.p59"]["ours"] is None and found["norm_factor_at_least.p59"]["ours"] == 400
    assert found["norm_factor_at_least.p59"]["n_censored"] == 5
    complete = [run for run in runs if run["cell"] != high.name] + rows(high, [40_000] * 8)
    for run in complete:
        run["norm_unembed_at_grok"] *= 1.5 if run["cell"] == high.name else 1
    found = {row["id"]: row for row in transformer.measure(complete, config)[2]}
    assert found[f"unembed_over_free.{high.name}"]["ours"] == pytest.approx(1.5)
    assert found["norm_factor.p59"]["ours"] == 80 and "norm_factor_at_least.p59" not in found


def test_planted_concentration_and_group_clamps_come_out(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, model="transformer_ln", lrs=(1e-3,), members=tuple(range(10)), parts=("groups", "concentration"))
    runs = []
    for cell in transformer.control_cells(config) + transformer.other_free_cells(config):
        wide = 36.9 * (1 + cell.train_frac)                                   # total norm moves with the fraction, the unembedding's with p
        runs += rows(cell, [1900] * 10, {**NORMS, "": wide, "unembed": 8 * (cell.p / 59) ** 0.77})
    for cell in transformer.clamp_cells(config, transformer.critical_norms(runs)):
        assert sum(h > 0 for h in cell.held[0]) == 1 and cell.held[0][0] == 0
        runs += rows(cell, [int(1900 * cell.rho)] * 10)
    held = [run for run in runs if run["p"] == 71 and run["held_norm"] is None]
    figures.groups(held, transformer.GROUPS, tmp_path, "groups")               # attn is not held
    assert (tmp_path / "groups.png").stat().st_size > 5000
    claims, _, findings = transformer.measure(runs, config)
    assert claims["A.ln.unembed_power"]["ours"] == pytest.approx(0.77, abs=1e-3)
    totals = np.array([36.9 * (1 + f) * (1 + 0.02 * (i % 2)) for f in transformer.FRACTIONS for i in range(10)])
    assert claims["A.ln.total_cv"]["ours"] == pytest.approx(totals.std(ddof=1) / totals.mean(), abs=1e-5)
    assert claims["A.ln.unembed_cv"]["ours"] == pytest.approx(0.01 * np.sqrt(70 / 69) / 1.01, abs=1e-5)
    assert claims["A.ln.unembed1.3"]["ours"] == 2470 and claims["A.ln.mlp0.85"]["ours"] == 1615 and claims["A.ln.none"]["ours"] == 1900
    assert {"A.ln.unembed0.85", "A.ln.unembed1.0", "A.ln.unembed1.15", "A.ln.mlp1.3", "A.ln.embed1.3"} <= set(claims)
    assert not transformer.measure(runs, dataclasses.replace(config, model="transformer", lrs=(5e-4,)))[0]   # another network answers nothing
    found = {row["id"]: row["ours"] for row in findings}
    assert "cv.unembed.over_lr.p59" in found
    medians = 1 + np.array(transformer.FRACTIONS)
    assert found["cv_of_medians.total.over_fraction.p59"] == pytest.approx(medians.std(ddof=1) / medians.mean(), abs=1e-5)


@pytest.mark.parametrize("model", ["mlp", "transformer_ln"])
def test_a_budget_shortens_every_cell_that_has_a_larger_one(model: str) -> None:
    given = ["--model", model, "--preset", "paper", "--p", "59", "--members", "0", "--budget", "20000"]
    config = exp_delay_law.narrowed(*settings.parse(exp_delay_law.Config, exp_delay_law.PRESETS, (*exp_delay_law.PARTS, "groups"), given))
    law = exp_delay_law if model == "mlp" else transformer
    free = law.control_cells(config)
    norms = {cell.name: 50.0 if model == "mlp" else dict.fromkeys(("", *transformer.GROUPS), 30.0) for cell in free}
    cells = [*free, *law.other_free_cells(config), *law.clamp_cells(config, norms)]
    assert {cell.budget_steps for cell in cells} <= {*range(8000, 20_001)} and max(cell.budget_steps for cell in cells) == 20_000
    with pytest.raises(UsageError, match="--budget must be at least 25 steps"):
        exp_delay_law.run(["--budget", "24"])


def test_a_run_that_comes_apart_at_a_held_norm_is_flagged(capsys: pytest.CaptureFixture) -> None:
    runs = [{"cell": "a", "member": m, "t_mem_step": t} for m, t in ((0, 200), (1, 200), (2, None))]
    log = [{"cell": "a", "member": m, "step": s, "train_accuracy": acc} for m, s, acc in
           ((0, 1, 0.02), (0, 400, 1.0), (0, 600, 0.95), (1, 1, 0.02), (1, 400, 0.3), (1, 600, 0.02), (2, 400, 0.5))]
    flag_unlearned(runs, log)
    assert [run["unlearned"] for run in runs] == [0, 2, 0]               # never memorised is censored, not unlearned
    assert capsys.readouterr().out == "member 1 of a unlearned its training pairs at 2 logged steps; its row says so\n"


def test_a_control_that_does_not_grok_leaves_complete_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    whole = transformer.cell
    monkeypatch.setattr(transformer, "cell", lambda *a, **k: dataclasses.replace(whole(*a, **k), budget_steps=50))
    out = tmp_path / "out"
    exp_delay_law.run(["--model", "transformer_ln", "--parts", "dense", "groups", "--p", "13", "--members", "0", "1", "--backend", "eager",
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


def test_mediation_at_a_given_norm_trains_no_control(tmp_path: Path) -> None:
    out = tmp_path / "out"
    exp_logit_scale.run(["--model", "transformer_b", "--p", "13", "--w-c", "30", "--taus", "1.7", "--budget", "25", "--members", "0", "--backend",
                         "eager", "--out", str(out)])
    runs = files.read_runs(out / "runs.csv")
    assert {(run["arm"], run["rho"], run["tau"], run["lr"], run["clamp_start"]) for run in runs} == {
        ("clamp", rho, tau, 5e-4, 600) for rho, tau in ((1, 1), (1.15, 1), (1.15, 1.7))}
    assert all("unlearned" in run for run in runs)
    assert [run["held_norm"] for run in runs] == pytest.approx([30, 34.5, 34.5]) and all(run["w_c"] == 30 for run in runs)
    assert json.loads((out / "summary.json").read_text())["claims"] == []   # the paper's transformer table is not this experiment's
