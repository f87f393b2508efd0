"""What the delay law's runs say, on planted runs: published numbers, findings, free contraction; a network under two names counts once."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest

import exp_delay_law
from lab import delay, files, report
from lab.answers import Table, lacking

CONFIG = exp_delay_law.Config(preset="paper", parts=exp_delay_law.PARTS)
RUN = {"experiment": "planted", "model": "mlp", "loss": "ce", "p": 59, "train_frac": 0.4, "block": 2, "seed0": 0, "tau": 1.0, "lr": 1e-3,
       "weight_decay": 1.0, "censored": 0, "budget_steps": 20_000, "collapse32_at_grok": 0.0, "t_mem_step": 175, "norm_at_mem": 60.0,
       "norm_at_grok": 50.0}
NOTHING = {"cells.csv": [], "contraction.csv": []}


def clamp(rho: float, *grok: int | None, collapse: float = 0.0, **conditions: object) -> list[dict]:
    return [{**RUN, "cell": f"clamp_rho{rho}", "arm": "clamp", "rho": rho, "held_norm": 55 * rho, "member": m, "t_grok_step": t,
             "censored": int(t is None), "collapse32_at_grok": collapse if t else None, **conditions} for m, t in enumerate(grok)]


def findings(runs: list[dict], **read: list[dict]) -> dict[str, dict]:
    table = Table(runs)
    delay.findings(table, {"cells.csv": read.get("cells", []), "contraction.csv": read.get("contraction", [])})
    return {finding["id"]: finding for finding in table.findings}


def rows(cell: object, grok: list[float], **columns: object) -> list[dict]:
    """A row a member, as a run of `cell` leaves it."""
    return [{**RUN, "cell": cell.name, **{k: getattr(cell, k) for k in ("p", "block", "arm", "rho", "lr", "train_frac", "weight_decay")},
             "held_norm": cell.held[0][0] if cell.held else None, "budget_steps": cell.budget_steps, "member": m, "t_grok_step": t,
             "group": cell.group, **cell.changed(), **columns}
            for m, t in enumerate(grok)]


def test_planted_exponents_and_power_law_come_out() -> None:
    """Every published number is answered by the cells of its own modulus, block and doses, and by no other."""
    config = dataclasses.replace(CONFIG, members=(0, 1, 2))
    free = exp_delay_law.control_cells(config) + exp_delay_law.other_free_cells(config)
    runs = [row for cell in free for row in rows(cell, [4000] * 3, norm_at_grok=12.0 * cell.p**0.4)]
    slope = {("clamp", 16): 7.0, ("clamp", 12): 8.0}
    for cell in exp_delay_law.held_cells(config, {cell.name: 12.0 * cell.p**0.4 for cell in free}):
        saturated = 0.5 if (cell.arm, cell.rho) == ("clamp", 1.30) else 1
        law = np.exp(slope.get((cell.arm, cell.block), 0.2) * (cell.rho - 1)) * saturated * (1e-3 / cell.lr) ** 0.5
        runs += rows(cell, [4000 * law] * 3)
    table = Table(runs)
    exp_delay_law.measure(table, config, NOTHING)
    ours = {key: claim["ours"] for key, claim in table.claims.items()}
    assert ours["A.alpha.dense"] == pytest.approx(7) and ours["A.alpha.dense.r2"] == pytest.approx(1)
    assert all(ours[f"A.alpha.p{p}"] == pytest.approx(8) for p in (41, 53, 59, 71)) and ours["A.alpha.shared"] == pytest.approx(8)
    assert ours["A.saturation.p59"] == pytest.approx(0.5) and ours["A.saturation.p41"] == pytest.approx(0.5)
    assert ours["A.norm_factor"] == pytest.approx(0.5 * np.exp(7 * 0.45)) and ours["A.lr_factor"] == pytest.approx(8**0.5)
    assert ours["A.sustained.spread"] == pytest.approx(np.exp(7 * 0.25)) and ours["A.oneshot.spread"] == pytest.approx(np.exp(0.2 * 0.6))
    assert ours["A.wc.power"] == pytest.approx(0.4) and ours["A.wc.power.pscan"] == pytest.approx(0.4) and ours["A.wc.cv"] == pytest.approx(0)
    assert ours["A.dense.rho1.00"] == 4000 and ours["A.matrix.rho1.00.lr0.004"] == 2000 and ours["A.matrix.alpha"] == pytest.approx(7)
    assert {finding["id"] for finding in table.findings if finding["id"].startswith("alpha")} == {"alpha.moduli.p31"}   # of the paper no number
    assert table.law[0].startswith("alpha shared by four moduli = 8 [8, 8], paper 7.49:")
    for runs_at, lrs in (([{**run, "lr": 5 * run["lr"]} for run in runs], (5e-3,)), (runs, (2e-3, 1e-3))):
        other = Table(runs_at)
        exp_delay_law.measure(other, dataclasses.replace(config, lrs=lrs), NOTHING)      # another learning rate, or the W_c of another,
        assert not any(key.startswith(("A.alpha", "A.dense.rho", "A.sat", "A.matrix.rho")) for key in other.claims)     # answers nothing


def test_local_slopes_collapse_and_censored_runs_are_among_the_findings() -> None:
    found = findings([*clamp(0.9, 1000, 1000), *clamp(1.0, 2000, 2000, collapse=0.1), *clamp(1.1, 4000, None)])
    assert found["local_slope.clamp_rho1.0"]["ours"] == pytest.approx(np.log(2) / 0.1) and found["local_slope.clamp_rho1.0"]["n_censored"] == 0
    assert found["local_slope.clamp_rho1.1"]["n_censored"] == 1
    assert {key for key in found if key.startswith("collapse.")} == {"collapse.float32.clamp_rho1.0"}
    assert found["collapse.float32.clamp_rho1.0"]["ours"] == pytest.approx(0.1)


def test_a_finding_compares_cells_that_differ_in_one_condition() -> None:
    hot, fast = clamp(1.1, 500, 500, cell="hot", tau=2.0), clamp(1.0, 400, 400, cell="fast", lr=4e-3)
    found = findings([*clamp(1.0, 2000, 2000), *hot, *fast])
    assert set(found) == {"lr_factor.clamp_rho1.0"} and found["lr_factor.clamp_rho1.0"]["ours"] == 5


def test_the_collapse_of_a_cell_in_which_none_groks_is_told() -> None:
    """cells.csv has its largest; of cells in which some grok the rows of the runs tell."""
    cells = [{"cell": f"clamp_rho{rho}", "arm": "clamp", "n": 2, "n_censored": censored, "collapse32_max": 0.3, "dtype": None}
             for rho, censored in ((1.1, 1), (1.2, 2))]
    found = findings([*clamp(1.1, 4000, None), *clamp(1.2, None, None)], cells=cells)
    assert {key: found[key]["ours"] for key in found if key.startswith("collapse.")} == {"collapse.float32.clamp_rho1.2": 0.3}


@pytest.mark.parametrize("logged, peak", [(58.0, 60.0), (64.0, 64.0)])
def test_the_peak_is_the_norm_at_memorisation_or_a_later_one(logged: float, peak: float) -> None:
    run = {**RUN, "cell": "free", "arm": "free", "member": 0, "t_grok_step": 1000}
    steps = [{"cell": "free", "member": 0, "step": step, "norm": norm} for step, norm in ((1, 70.0), (200, logged), (400, 55.0), (1000, 50.0))]
    assert delay.contraction([run], steps)[0]["v_peak"] == pytest.approx(peak**2)   # the start, before memorisation, is none


def test_a_power_law_lacks_moduli_as_a_line_lacks_doses() -> None:
    moduli = exp_delay_law.FITTED_MODULI["pscan"]
    assert "4 moduli 41..71" in lacking(np.array([41, 53, 59, 71]), moduli, "moduli")
    assert lacking(np.array([31, 53, 71]), moduli, "moduli") == ""


def test_a_network_released_under_two_names_counts_once(tmp_path: Path) -> None:
    for folder, held in (("a", 55.0), ("b", 55.0), ("c", 60.0)):
        (tmp_path / "replay" / folder).mkdir(parents=True)
        run = {**RUN, "cell": folder, "arm": "clamp", "member": 0, "held_norm": held}
        files.write_csv(tmp_path / "replay" / folder / "runs.csv", [run], files.RUN_COLUMNS)
        files.write_csv(tmp_path / "replay" / folder / "replay.csv", [{"cell": folder, "member": 0, "t_grok_released": 1, "t_grok": 1}])
    assert [row["cell"] for row in report.replayed(tmp_path)] == ["a", "c"]


def test_shares_drift_from_the_first_logged_step_and_the_spectrum_rises_between_memorisation_and_grokking() -> None:
    """The group that moves most, of the total norm; runs that never grok, and cells without such groups, have none."""
    log = [{"cell": "free", "member": 0, "step": step, "norm": 10.0, "norm_E": 4.0, "norm_W1": 8.0, "norm_W2": 4.5, "fourier_gini": gini}
           for step, gini in ((400, 0.35), (1, 0.1), (200, 0.3), (1000, 0.9), (600, 0.6), (800, 0.7))]
    run = {**RUN, "cell": "free", "arm": "free", "member": 0, "t_grok_step": 1000, "norm_at_grok": 20.0, "norm_E_at_grok": 12.0,
           "norm_W1_at_grok": 15.0, "norm_W2_at_grok": 9.0}
    assert delay.shares([run, {**run, "t_grok_step": None}], log) == [{"cell": "free", "member": 0, "share_drift": pytest.approx(0.2)}]
    assert delay.shares([run], [{**log[1], "norm_E": None}]) == []
    assert delay.contraction([run], log)[0]["fourier_rise_step"] == 600


def test_clamps_beside_the_frontier_of_weight_decays_and_a_low_start() -> None:
    """Free T = 4000 / wd at norm 55 / wd^0.2: of slope 5 in logarithms. The clamp at rho 1.15 groks at 9000, a low start as the plain one."""
    config = dataclasses.replace(CONFIG, parts=("frontier", "oneshot"), members=(0, 1))
    free = exp_delay_law.control_cells(config) + exp_delay_law.other_free_cells(config)
    assert {cell.scale_once for cell in free if cell.group == "hidden"} == {(1.0, 0.8, 1.0)}
    runs = [row for cell in free for row in rows(cell, [4000 / cell.weight_decay] * 2, norm_at_grok=55 / cell.weight_decay**0.2)]
    held = exp_delay_law.held_cells(config, {free[0].name: 55.0})
    runs += [row for cell in held for row in rows(cell, [9000] * 2)]
    table = Table(runs)
    exp_delay_law.measure(table, config, NOTHING)
    found = {finding["id"]: finding["ours"] for finding in table.findings}
    assert found["off_frontier.p59.rho1.15"] == pytest.approx(9000 / (4000 * 1.15**5))
    assert found["washed_out.T_grok.free_p59_b16_low"] == found["washed_out.norm.free_p59_b16_low"] == 1
    assert table.claims["A.layer_hidden.T_grok"]["ours"] == 4000 and "A.oneshot.spread" in table.claims
