"""What the delay law's runs say beyond its verdicts, on planted runs; a network under two names counts once."""
from pathlib import Path

import numpy as np
import pytest

import delay_law_claims as claims
from lab import files, report

RUN = {"experiment": "planted", "model": "mlp", "loss": "ce", "p": 59, "train_frac": 0.4, "block": 2, "seed0": 0, "tau": 1.0, "lr": 1e-3,
       "weight_decay": 1.0, "censored": 0, "budget_steps": 20_000, "collapse32_at_grok": 0.0, "t_mem_step": 175, "norm_at_mem": 60.0,
       "norm_at_grok": 50.0}


def clamp(rho: float, *grok: int | None, collapse: float = 0.0) -> list[dict]:
    return [{**RUN, "cell": f"clamp_rho{rho}", "arm": "clamp", "rho": rho, "held_norm": 55 * rho, "member": m, "t_grok_step": t,
             "censored": int(t is None), "collapse32_at_grok": collapse if t else None} for m, t in enumerate(grok)]


def test_local_slopes_collapse_and_censored_runs_are_among_the_findings() -> None:
    runs = [*clamp(0.9, 1000, 1000), *clamp(1.0, 2000, 2000, collapse=0.1), *clamp(1.1, 4000, None)]
    found = {f["id"]: f for f in claims.findings(runs, {}, [], [])}
    assert found["local_slope.clamp_rho1.0"]["ours"] == pytest.approx(np.log(2) / 0.1) and found["local_slope.clamp_rho1.0"]["n_censored"] == 0
    assert found["local_slope.clamp_rho1.1"]["n_censored"] == 1
    assert {key for key in found if key.startswith("collapse.")} == {"collapse.float32.clamp_rho1.0"}
    assert found["collapse.float32.clamp_rho1.0"]["ours"] == pytest.approx(0.1)


def test_the_collapse_of_a_cell_in_which_none_groks_is_told() -> None:
    """cells.csv has its largest; of cells in which some grok the rows of the runs tell."""
    rows = [{"cell": f"clamp_rho{rho}", "arm": "clamp", "n": 2, "n_censored": censored, "collapse32_max": 0.3, "dtype": None}
            for rho, censored in ((1.1, 1), (1.2, 2))]
    found = {f["id"]: f for f in claims.findings([*clamp(1.1, 4000, None), *clamp(1.2, None, None)], {}, [], rows)}
    assert {key: found[key]["ours"] for key in found if key.startswith("collapse.")} == {"collapse.float32.clamp_rho1.2": 0.3}


@pytest.mark.parametrize("logged, peak", [(58.0, 60.0), (64.0, 64.0)])
def test_the_peak_is_the_norm_at_memorisation_or_a_later_one(logged: float, peak: float) -> None:
    run = {**RUN, "cell": "free", "arm": "free", "member": 0, "t_grok_step": 1000}
    steps = [{"cell": "free", "member": 0, "step": step, "norm": norm} for step, norm in ((1, 70.0), (200, logged), (400, 55.0), (1000, 50.0))]
    assert claims.contraction([run], steps)[0]["v_peak"] == pytest.approx(peak**2)   # the start, before memorisation, is none


def test_a_power_law_lacks_moduli_as_a_line_lacks_doses() -> None:
    assert "4 moduli 41..71" in claims.lacking(np.array([41, 53, 59, 71]), claims.MODULI, "moduli")
    assert claims.lacking(np.array([31, 53, 71]), claims.MODULI, "moduli") == ""


def test_a_network_released_under_two_names_counts_once(tmp_path: Path) -> None:
    for folder, held in (("a", 55.0), ("b", 55.0), ("c", 60.0)):
        (tmp_path / "replay" / folder).mkdir(parents=True)
        run = {**RUN, "cell": folder, "arm": "clamp", "member": 0, "held_norm": held}
        files.write_csv(tmp_path / "replay" / folder / "runs.csv", [run], files.RUN_COLUMNS)
        files.write_csv(tmp_path / "replay" / folder / "replay.csv", [{"cell": folder, "member": 0, "t_grok_released": 1, "t_grok": 1}])
    assert [row["cell"] for row in report.replayed(tmp_path)] == ["a", "c"]
