"""Sparse parity's experiment: bad input in a line, the paper's own cells, what planted runs say, Table 2, and a run from end to end."""
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

import exp_parity
from common import Cell, UsageError
from lab import settings, stats
from lab.answers import Table, published

NOTHING = {"cells.csv": [], "contraction.csv": []}


def configured(flags: str = "--preset paper") -> tuple[exp_parity.Config, dict]:
    config, given = settings.parse(exp_parity.Config, exp_parity.PRESETS, exp_parity.PARTS, [*flags.split(), "--device", "cpu"])
    return exp_parity.checked(config, given), given


@pytest.mark.parametrize("flags, message", [
    ("--k 0", "1 <= k <= n <= 256, and 2 to 100000 training examples; got k 0, n 30"), ("--k 31", "got k 31, n 30"), ("--m 1", "got k 3, n 30, m 1"),
    ("--n 1000", "got k 3, n 1000"), ("--n 30 30", "--n lists a value twice"),
    ("--loss hinge", "--loss must be one of ce, mse, stablemax, got 'hinge'"),
    ("--w-c 0", "--w-c must be a positive norm, got 0"), ("--p 59", "unknown flag --p; "),
    ("--members 16", "of --parts clamp, 0..15, got 16"),    ("--networks published --k 2", "the paper ran none of these conditions"),
    ("--taus 0", "--taus must be > 0")])
def test_bad_input_is_one_line_and_writes_nothing(flags: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        exp_parity.run([*flags.split(), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def rows(cell: Cell, T: float | None, norm: float = 20.0, members: int = 16, **more: object) -> list[dict]:
    """A row a member as a run of `cell` leaves it; T_grok and norm spread by 1% from member to member."""
    run = {name: getattr(cell, name) for name in ("networks", "model", "task", "loss", "block", "seed0", "arm", "group", "rho", "tau", "gamma", "lr",
                                                  "weight_decay", "w_c", "budget_steps")}
    wobble = lambda x, m: x and x * (1 + 0.01 * ((m % 3) - 1))  # noqa: E731
    return [{**run, "cell": cell.name, "p": None, "train_frac": None, "held_norm": cell.held[0][0] if cell.held else None, "member": m,
             "t_mem_step": 150, "t_grok_step": wobble(T, m), "censored": int(T is None), "norm_at_mem": 26.0, "norm_at_end": norm,
             "norm_at_grok": T and wobble(norm, m), "collapse32_at_grok": 0.0, "dtype": "float32", **more} for m in range(members)]


def test_the_papers_cells_and_their_planted_runs_reproduce_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of published.csv about sparse parity is answered, each by its own cell: whole blocks, the paper's draws and held norms."""
    monkeypatch.setattr(stats, "RESAMPLES", 100)
    config, given = configured("--preset paper --networks published")
    cells = {(cell.task, cell.arm, cell.rho, cell.weight_decay, cell.lr, cell.networks): cell for cell in exp_parity.own_cells(config, given)}
    assert len(cells) == 15 and all(cell.members == tuple(range(16)) and cell.eval_every == 0 and cell.card for cell in cells.values())
    assert {cell.held[0][0] for cell in cells.values() if cell.arm == "clamp"} == {0.90 * 20.625, 1.30 * 20.625}
    runs = []
    for key, cell in cells.items():
        mine = [row for row in published("A.parity").values() if row["arm"] and key == (row["task"], row["arm"], row["rho"], row["wd"], row["lr"],
                                                                                         row["experiment"])]
        known = {row["statistic"]: row["value"] for row in mine}
        runs += rows(cell, known["T_grok"], known.get("W_c") or 20.0)
    table = Table(runs, networks="published")
    exp_parity.measure(table, config, NOTHING)
    assert set(table.claims) == set(published("A.parity")) and {claim["verdict"] for claim in table.claims.values()} == {"REPRODUCED"}
    assert [line.split(", 0 censored")[0] for line in table.law] == [
        "alpha of sparse parity = 2.223 [2.223, 2.223], 32 of the paper's own networks",
        "T_grok over learning rates, largest over smallest = 3.765 [3.765, 3.765], paper 4: REPRODUCED, 48 of the paper's own networks"]


@pytest.mark.parametrize("flags, names", [
    ("--parts clamp --rhos 1.3", {"parity_clamp_parity_n30_k3_m1000_b16_rho1.3"}),
    ("--parts size --n 20", {"parity_free_parity_n20_k3_m1000_b16"}),
    ("--parts rate --lrs 1e-3 2e-3", {"parity_lambda_free_parity_n30_k3_m1000_b16", "parity_lambda_free_parity_n30_k3_m1000_b16_lr0.002"}),
    ("--parts decay --weight-decays 5", {"parity_lambda_free_parity_n30_k3_m1000_b16_wd5"})])
def test_flags_narrow_the_papers_cells(flags: str, names: set[str]) -> None:
    assert {cell.name for cell in exp_parity.own_cells(*configured(f"--networks published {flags}"))} == names


def planted(config: exp_parity.Config) -> list[dict]:
    """T_grok = 3000 exp(2 (rho - 1)) / tau^1.5, free 3000 (lr / 1e-3)^-0.9 at norm 20 wd^-0.25, and never at weight decay 5."""
    runs = []
    for cell in exp_parity.free_cells(config):
        T = None if cell.weight_decay == 5 else 3000 * (1e-3 / cell.lr) ** 0.9 / cell.weight_decay
        runs += rows(cell, T, 20 * cell.weight_decay**-0.25, 8)
    for cell in exp_parity.held_cells(config, 20.0):
        runs += rows(cell, 3000 * math.exp(2 * (cell.rho - 1)) / cell.tau**1.5, 20 * cell.rho, 8)
    return runs


def test_planted_properties_come_out_and_table_2_says_what_transfers(tmp_path: Path) -> None:
    config, _ = configured("--preset paper --networks fresh --seeds 8")
    runs = planted(config)
    log = [{"cell": run["cell"], "member": run["member"], "step": step, "logit_scale": 10 * run["rho"] / run["tau"], "collapse32": 0.0,
            "collapse64": 0.0} for run in runs if run["arm"] == "clamp" for step in range(200, 12_000, 200)]
    table = Table(runs, log)
    exp_parity.measure(table, config, NOTHING)
    found = {finding["id"]: finding for finding in table.findings}
    ours = {key: found[f"property.{key}"]["ours"] for key in exp_parity.PROPERTIES}
    held = 3000 * math.exp(2 * 0.15)
    # T = 3000 / wd at norm 20 wd^-0.25: the frontier is a line in logarithms, of slope 4
    expected = {"decay": 10**0.25, "speed": 0.9, "alpha": 2, "one": 1, "frontier": math.exp(0.3) / 1.15**4, "raised": math.exp(0.3), "tau": 1.7**1.5}
    assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert 0.5 < ours["seeds"] < 1.5 and ours["rates"] == pytest.approx(ours["seeds"], rel=0.2)
    # of T at the temperatures 0.5, 1, 1.7 of the raised norm, that at the logit scale of rho 1: between tau 1 and 1.7
    T2 = np.interp(10.0, [11.5 / 1.7, 11.5], [held / 1.7**1.5, held])
    assert ours["recovery"] == pytest.approx((held - T2) / (held - 3000), rel=1e-3)
    assert found["off_frontier.parity_n30_k3_m1000.rho1"]["ours"] == pytest.approx(1, rel=1e-3)
    assert "clamp_over_free.clamp_n30_k3_m1000_b8_rho1.00" in found and "tau_effect.ce.parity_n30_k3_m1000.rho1.15" in found

    record = tmp_path / "delay_law" / "dense"
    record.mkdir(parents=True)
    answer = {"ours": 7.7, "lo": 7.5, "hi": 7.9, "n": 8, "verdict": "REPLICATED"}
    summary = {"claims": [{"id": "A.alpha.dense", "replicated": answer}, {"id": "A.wc.cv", "reproduced": answer}],
               "findings": [{"id": "clamp_over_free.clamp_p59_b16_rho1.00", "ours": 0.8, "lo": 0.7, "hi": 1.1, "n": 8}]}
    (record / "summary.json").write_text(json.dumps(summary))
    lines = {row["property"]: row for row in exp_parity.properties(table.findings, tmp_path)}
    assert list(lines) == list(exp_parity.PROPERTIES)
    assert (lines["alpha"]["paper"], lines["alpha"]["addition"], lines["alpha"]["transfers"]) == (7.64, 7.7, 0)
    assert (lines["one"]["paper"], lines["one"]["addition_hi"], lines["one"]["transfers"]) == (None, 1.1, 1)
    assert lines["seeds"]["addition"] is None and lines["decay"]["paper"] == pytest.approx(63 / 49) and lines["raised"]["transfers"] == 0
    exp_parity.draw(table, config, tmp_path / "figures", [], {"contraction.csv": []})
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} >= {"frontier.png", "rate.png", "temperature.png", "critical_norm.png"}


def test_a_command_end_to_end_and_its_figures_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--n", "9", "--k", "2", "--m", "60", "--parts", "clamp", "--rhos", "1.0", "--budget", "1200", "--members", "0", "1", "--device", "cpu",
             "--out", str(tmp_path / "r")]
    exp_parity.run(flags)
    assert "W_c = " in capsys.readouterr().out
    tables = {name: (tmp_path / "r" / name).read_bytes() for name in ("runs.csv", "cells.csv", "summary.json", "properties.csv")}
    runs = list(csv.DictReader(tables["runs.csv"].decode().splitlines()))
    assert [(run["task"], run["p"], run["n_train"], run["arm"]) for run in runs] == [("parity n9 k2 m60", "", "60", arm) for arm in
                                                                                     ("free", "free", "clamp", "clamp")]
    assert all(run["norm_at_80"] == run["norm_at_grok"] for run in runs if run["t_80_step"] == run["t_grok_step"] != "")
    assert all((run["norm_at_80"] == "") == (run["t_80_step"] == "") for run in runs) and {run["norm_at_95"] for run in runs} != {""}
    assert {run["clamp_start"] for run in runs if run["arm"] == "clamp"} == {"1000"}
    (tmp_path / "r" / "figures" / "frontier.png").unlink()
    exp_parity.run([*flags, "--figures-only"])
    assert (tmp_path / "r" / "figures" / "frontier.png").exists()
    assert all((tmp_path / "r" / name).read_bytes() == content for name, content in tables.items())
