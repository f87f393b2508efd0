"""The statistics of paper B on planted and on released data, and the commands of exp_logit_scale.py that end badly."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_replay import RELEASED

import exp_logit_scale as experiment
from common import UsageError
from lab import files, settings, stats
from lab.answers import Table, published

INF = math.inf


# ---------------------------------------------------------------- planted data

def planted_mediation(seed: int, noise_L: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and logit scales `(6, members)`: baseline, then a sweep on which T is linear in L and reaches 1000 + 0.2 x 3000 at the
    baseline's L: recovery (4000 - 1600) / 3000 = 0.8."""
    rng, members = np.random.default_rng(seed), 12
    L = np.array([24.0, 34.0, 30.0, 27.0, 23.0, 21.0])
    T = np.array([1000.0, *(1600 + 2400 * (L[1:] - 24) / 10)])
    shared = rng.normal(0, 0.05, members)
    return T[:, None] * np.exp(shared + rng.normal(0, 0.05, (6, members))), L[:, None] + rng.normal(0, noise_L, (6, members))


def fraction(T: np.ndarray, L: np.ndarray, joint: bool) -> callable:
    def statistic(picks: np.ndarray) -> np.ndarray:
        who = picks if joint else np.arange(picks.shape[1])[None].repeat(len(picks), 0)
        at = np.stack([row[who].mean(1) for row in L], 1)
        times = np.stack([stats.median(row[picks]) for row in T], 1)
        return stats.recovery(times[:, 0], times[:, 1], times[:, 1:], at[:, 1:], at[:, 0])
    return statistic


@pytest.mark.parametrize(("noise_L", "joint"), [(0.0, False), (0.5, True)])
def test_a_planted_recovery_fraction_lies_in_its_interval_at_the_nominal_rate(noise_L: float, joint: bool) -> None:
    inside, trials = 0, 120
    for seed in range(trials):
        T, L = planted_mediation(seed, noise_L)
        _, lo, hi = stats.resampled(12, fraction(T, L, joint), seed)
        inside += lo <= 0.8 <= hi
    assert 0.87 <= inside / trials <= 1.0   # binomial 0.95 -+ 3 x 0.02, and a percentile bootstrap of a median of 12 errs to either side


def test_holding_the_logit_curve_fixed_hides_the_noise_in_it() -> None:
    T, L = planted_mediation(0, 2.0)
    fixed, joint = (stats.resampled(12, fraction(T, L, joint)) for joint in (False, True))
    assert joint[2] - joint[1] > 1.5 * (fixed[2] - fixed[1])


def test_recovery_by_hand_and_at_its_edges() -> None:
    one = lambda *x: np.array([x])[0][None] if len(x) > 1 else np.array(x)  # noqa: E731
    T, L = np.array([[12600.0, 6825, 4700]]), np.array([[34.31, 26.50, 23.13]])
    T2 = 4700 + (6825 - 4700) * (23.87 - 23.13) / (26.50 - 23.13)
    ours = stats.recovery(one(3675.0), one(12600.0), T, L, one(23.87))
    assert ours == pytest.approx([(12600 - T2) / (12600 - 3675)], rel=1e-12)
    assert stats.recovery(one(3675.0), one(12600.0), T, L, one(23.87), log=True) == pytest.approx([math.log(12600 / T2) / math.log(12600 / 3675)])
    assert np.isnan(stats.recovery(one(3675.0), one(12600.0), T, L, one(20.0)))[0]              # outside the sweep: no value, not its end
    assert np.isnan(stats.recovery(one(3675.0), one(INF), np.array([[INF, 6825, 4700]]), L, one(23.87)))[0]
    tied = stats.recovery(one(3675.0), one(12600.0), np.array([[12600.0, 6825, 6825, 4700]]), np.array([[34.31, 26.5, 26.5, 23.13]]), one(26.5))
    assert np.isfinite(tied).all()


def test_censored_members_move_the_recovery_the_right_way() -> None:
    T, L = planted_mediation(3, 0.0)
    before = stats.resampled(12, fraction(T, L, False))[0]
    T[5] = INF                                # the coolest cell, beyond the baseline's L: the interpolation needs it no more
    assert stats.resampled(12, fraction(T[:, :], L, False))[0] == pytest.approx(before)
    T, L = planted_mediation(3, 0.0)
    T[4, :4] = INF                            # a cell next to the baseline's L grows later: less is recovered
    assert stats.resampled(12, fraction(T, L, False))[0] < before


W = np.array([46.0, 49, 51.5, 54, 57, 59.5, 62])
FORMS = {"exponential": 0.14 * W, "power": 2.5 * np.log(W - 44.0), "saddle_node": -0.5 * np.log(62.3 - W)}


@pytest.mark.parametrize("planted", FORMS)
def test_aic_picks_the_planted_form(planted: str) -> None:
    right = 0
    for seed in range(50):
        y = 3 + FORMS[planted] + np.random.default_rng(seed).normal(0, 0.02, len(W))
        scores = stats.dose_forms(W, y[None])
        right += min(FORMS, key=lambda form: scores[form][0]) == planted
    assert right >= 45


def test_forms_by_hand_and_at_their_edges() -> None:
    y = np.array([[7.0, 7.4, 8.0, 8.3, 8.8, 9.2, 9.3]])
    slope, intercept = np.polyfit(W, y[0], 1)
    rss = ((y[0] - intercept - slope * W) ** 2).sum()
    assert stats.dose_forms(W, y)["exponential"] == pytest.approx([7 * math.log(rss / 7) + 4], rel=1e-9)
    tied = stats.dose_forms(W, np.full((1, 7), 8.0))
    assert not any(np.isnan(score).any() for score in tied.values())
    assert all(np.isnan(score).all() for score in stats.dose_forms(W, np.where(np.arange(7) == 3, INF, y)).values())
    assert np.isnan(stats.dose_forms(W[:3], y[:, :3])["power"]).all()       # three parameters on three points: no score


def test_least_squares_against_numpy_and_on_ties() -> None:
    rng = np.random.default_rng(0)
    y, a, b = rng.normal(size=(5, 12)), rng.normal(size=(5, 12)), rng.normal(size=12)
    r2, score = stats.least_squares(y, a, b)
    for i in range(5):
        X = np.stack([np.ones(12), a[i], b], 1)
        rss = np.linalg.lstsq(X, y[i], rcond=None)[1][0]
        assert r2[i] == pytest.approx(1 - rss / ((y[i] - y[i].mean()) ** 2).sum(), rel=1e-10)
        assert score[i] == pytest.approx(12 * math.log(rss / 12) + 6 + 2 * 3 * 4 / 8, rel=1e-10)
    tied = stats.least_squares(np.repeat(y[:, :6], 2, 1), np.repeat(a[:, :6], 2, 1), np.zeros(12))   # pairs of equal cells, a constant column
    assert np.isfinite(tied).all()
    y[2, 3] = INF
    assert list(np.isnan(stats.least_squares(y, a)[0])) == [False, False, True, False, False]


def test_a_median_beyond_the_papers_budget_is_answered() -> None:
    row = {"id": "x", "quantity": "q", "value": None, "printed": "not within 60000", "lo": None, "hi": None, "n_seeds": 8}
    assert stats.replicated(row, (INF, INF, INF), 8, 8, worst=1.0)["verdict"] == "REPLICATED"
    assert stats.replicated(row, (25000, 24000, 26000), 8, 0)["verdict"] == "NOT REPLICATED"
    assert stats.replicated(row, (INF, INF, INF), 2, 2)["verdict"] == "INCONCLUSIVE"
    json.dumps(stats.replicated(row, (INF, INF, INF), 8, 8), allow_nan=False)


def test_a_smaller_budget_answers_nothing_about_a_larger_one() -> None:
    for budget, verdict in ((30_000, "INCONCLUSIVE"), (60_000, "REPLICATED")):
        table = Table(planted("x", [None] * 8, block=8, rho=1.25, dtype="float64", budget_steps=budget))
        experiment.answer(table, experiment.PUBLISHED, experiment.STATISTICS)
        assert table.claims["B.audit.1.25.T64"]["verdict"] == verdict


# ---------------------------------------------------------------- planted runs

def planted(cell: str, t_grok: list, **changed: object) -> list[dict]:
    """Rows of runs.csv of one cell, a member each."""
    run = {"cell": cell, "arm": "clamp", "model": "mlp", "loss": "ce", "p": 59, "train_frac": 0.4, "block": 12, "seed0": 1000, "rho": 1.0, "tau": 1.0,
           "gamma": None, "lr": 1e-3, "weight_decay": 1.0, "dtype": "float32", "budget_steps": 120_000, "t_mem_step": 175, "w_c": 54.0,
           "held_norm": 54.0 * (changed.get("rho") or 1.0), "norm_at_grok": 54.0, "held_E": None, **changed}
    return [{**run, "member": m, "t_grok_step": t, "censored": int(t is None)} for m, t in enumerate(t_grok)]


def mediation_runs(rhos: tuple[float, ...], lr: float = 1e-3) -> Table:
    """Table 2 with the raised norm at each of `rhos`: T_grok is linear in L, and at the first 0.8 of the delay goes at the baseline's L."""
    cells = {(rho, tau): (1600 + 240 * (L - 24) + 200 * i, L) for i, rho in enumerate(rhos)
             for tau, L in zip(experiment.TAUS, (34, 30, 27, 23, 21), strict=True)} | {(1.0, 1.0): (1000, 24)}
    runs, log = [], []
    for (held, tau), (T, L) in cells.items():
        runs += planted(f"{held}:{tau}", [T - 25, T, T + 25] * 4, rho=held, tau=tau, lr=lr)
        log += [{"cell": f"{held}:{tau}", "member": m, "step": step, "logit_scale": L, "collapse32": 0.0, "collapse64": 0.0}
                for m in range(12) for step in (600, *range(800, 4400, 200))]
    return Table(runs, log)


def test_published_numbers_are_answered_at_their_own_norm_rate_and_temperatures_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    for rho, flags, answers in ((1.15, [], True), (1.2, ["--rhos", "1.2"], False), (1.15, ["--lr", "0.002"], False)):
        config, given = settings.parse(experiment.Config, experiment.PRESETS, experiment.PARTS, ["--parts", "mediation", "--p", "59", *flags])
        table = mediation_runs((rho,), config.lr)
        experiment.measure(table, experiment.checked(config, given), {})
        found = {finding["id"]: finding["ours"] for finding in table.findings}
        assert found["recovery.ce.p59"] == pytest.approx(0.8) and found["norm_up.ce.p59"] == pytest.approx(4.0)
        assert found["logit_movement.ce.p59"] == pytest.approx(34 / 21) and found["delay_share.ce.p59"] == pytest.approx(1.0)
        assert {"B.recovery.p59", "B.med.ce.p59.ratio", "B.cell.ce.p59.rho1.15.tau1.70.L"} <= set(table.claims) or not answers
        assert answers or not any("1.15" in key or "recovery" in key or "ratio" in key for key in table.claims)
        assert ["paper" in line for line in table.law] == [answers, answers]
    config, given = settings.parse(experiment.Config, experiment.PRESETS, experiment.PARTS, ["--parts", "mediation", "--p", "59", "--rhos", "1.2"])
    table = mediation_runs((1.2, 1.15))
    experiment.measure(table, experiment.checked(config, given), {})
    assert "B.recovery.p59" in table.claims and not any("paper" in line for line in table.law)   # answered at 1.15, the sentences are of 1.2


# ---------------------------------------------------------------- released data

released = pytest.mark.skipif(not RELEASED.is_dir(), reason="no released runs here: set RELEASED to their folder")


def cell(path: str) -> dict[str, np.ndarray]:
    with np.load(RELEASED / f"{path}.npz", allow_pickle=False) as archive:
        data = {k: archive[k] for k in archive.files}
    grok = np.where(data["T_grok_per_seed"] < 0, INF, data["T_grok_per_seed"])
    step = np.median(grok[np.isfinite(grok)])
    return {**data, "T": grok, "L": float(data["logit_scale"][np.abs(data["steps"] - step).argmin()]),
            "early": float(data["logit_scale"][list(data["steps"]).index(600)])}


@released
def test_published_recovery_and_collapse_come_out_of_the_released_runs() -> None:
    known = published("B.")
    base = cell("mediation/mlp_ce_full_p59_base_rho1.00_tau1.00")
    sweep = [cell(f"mediation/mlp_ce_full_p59_up_rho1.15_tau{tau:.2f}") for tau in experiment.TAUS]
    T, L = np.array([[stats.median(c["T"]) for c in sweep]]), np.array([[c["L"] for c in sweep]])
    ours = stats.recovery(stats.median(base["T"])[None], T[:, 0], T, L, np.array([base["L"]]))
    assert float(ours[0]) == pytest.approx(known["B.recovery.p59"]["value"], abs=0.005)

    grid = [(rho, tau, cell(f"collapse/mlp_add_ce_full_p59_grid_rho{rho:.2f}_tau{tau:.2f}"))
            for rho in experiment.GRID_RHOS for tau in experiment.GRID_TAUS]
    y, L = np.log([[stats.median(c["T"]) for *_, c in grid]]), np.array([[c["L"] for *_, c in grid]])
    rho = np.array([r for r, _, _ in grid])
    for key, columns in (("r2_logit", (L,)), ("r2_rho", (rho,)), ("r2_both", (L, rho))):
        assert float(stats.least_squares(y, *columns)[0][0]) == pytest.approx(known[f"B.collapse.{key}.p59"]["value"], abs=0.0006), key


@released
def test_published_dose_fit_comes_out_of_the_released_runs() -> None:
    known = published("B.dose.")
    cells = [cell(f"dose/mlp_ce_full_p59_clamp_rho{rho:.2f}") for rho in experiment.DOSE_RHOS[:7]]
    norms = np.array([float(c["rho"]) * float(c["wc_used"]) for c in cells])
    y = np.log([[np.median(c["T"][np.isfinite(c["T"])]) for c in cells]])    # B's median: over the runs that grok
    scores = stats.dose_forms(norms, y)
    assert min(scores["power"], scores["saddle_node"])[0] - scores["exponential"][0] == pytest.approx(known["B.dose.daic.p59"]["value"], abs=0.05)
    slope, _, r2 = stats.line(norms, y)
    assert float(slope[0]) == pytest.approx(known["B.dose.alpha.p59"]["value"], abs=0.0006)
    assert float(r2[0]) == pytest.approx(known["B.dose.r2.p59"]["value"], abs=0.0006)


@released
def test_allocated_norms_are_the_released_ones() -> None:
    control = cell("alloc/mlp_ce_full_p59_ctrl")
    power = np.array([float(control[f"wn_{g}"][-1]) ** 2 for g in ("E", "W1", "W2")])
    for gamma in (-0.6, 0.0, 0.3):
        there = cell(f"alloc/mlp_ce_full_p59_alloc_g{gamma:+.2f}")
        ours = experiment.allocated(float(there["wc_used"]), gamma, tuple(power / power.sum()))
        assert ours[1:] == pytest.approx([float(there[f"wn_{g}"][-1]) for g in ("E", "W1", "W2")], rel=2e-4)   # means over members there


# ---------------------------------------------------------------- commands

def test_dose_stops_before_the_collapse() -> None:
    """Table 1 takes rho up to 1.15, cells with a majority grokked, and nothing from the first jump of L by more than 2.5x on."""
    config, given = settings.parse(experiment.Config, experiment.PRESETS, experiment.PARTS, ["--parts", "dose", "--p", "59", "--dose-seeds", "3"])
    runs, log = [], []
    for i, (rho, L) in enumerate([(0.85, 10), (0.90, 12), (0.95, 14), (1.00, 40), (1.05, 41), (1.20, 42)]):
        T = 1000 * (i + 1)
        runs += planted(f"{rho}", [T, None, None] if rho == 0.85 else [T] * 3, rho=rho, block=3)
        log += [{"cell": f"{rho}", "member": m, "step": T, "logit_scale": L, "collapse32": 0, "collapse64": 0} for m in range(3)]
    for wd, norms in ((1.0, (50, 51, 52)), (0.5, (60, 66, None))):          # of the gentle decay one member never groks
        free = planted(f"free{wd}", [norm and 5000 for norm in norms], arm="free", rho=None, block=3, weight_decay=wd)
        runs += [{**run, "norm_at_grok": norm} for run, norm in zip(free, norms, strict=True)]
    table = Table(runs, log)
    experiment.measure(table, experiment.checked(config, given), {})
    found = {f["id"]: f for f in table.findings}
    assert found["free_norm.p59.wd0.5"]["ours"] == pytest.approx(66 / 54) and found["free_norm.p59.wd1"]["ours"] == pytest.approx(52 / 54)
    assert [found[f"free_norm.p59.wd{wd}"]["n_censored"] for wd in ("0.5", "1")] == [1, 0]
    assert found["frontier.p59"]["ours"] == pytest.approx(66 / (54 * 1.20))
    assert found["alpha.p59"]["ours"] == pytest.approx(math.log(1.5) / (0.05 * 54))
    assert experiment.collapse_free(table, ["0.85", "0.9", "0.95", "1.0", "1.05", "1.2"]) == ["0.9", "0.95"]


def test_table_1_is_answered_by_its_own_doses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends and half of the doses must be there; at p=43 the paper begins at 0.90. A tiny curvature leaves the exponential ahead."""
    monkeypatch.setattr(stats, "RESAMPLES", 100)
    for p, rhos, verdict in ((59, experiment.DOSE_RHOS, "REPLICATED"), (59, experiment.DOSE_RHOS[1:], "INCONCLUSIVE"),
                             (43, experiment.DOSE_RHOS[1:], "NOT REPLICATED")):
        block = 16 if p == 59 else 8
        T = {rho: 1000 * math.exp(0.14 * 54 * (rho - 1)) for rho in rhos}
        table = Table([run for rho in rhos for run in planted(f"{rho}", [T[rho] + m for m in range(block)], rho=rho, p=p, block=block)])
        experiment.answer(table, experiment.PUBLISHED, experiment.STATISTICS)
        assert table.claims[f"B.dose.alpha.p{p}"]["ours"] == pytest.approx(0.14, rel=0.01)
        assert table.claims[f"B.dose.alpha.p{p}"]["verdict"] == verdict and table.claims[f"B.dose.daic.p{p}"]["ours"] > 0


@pytest.mark.parametrize(("flags", "says"), [
    (["--audit-cells", "1.15:0"], "tau in"), (["--audit-cells", "much"], "are RHO or RHO:TAU"), (["--audit-cells", "1.15", "1.15:1"], "none twice"),
    (["--audit-dtypes", "float16"], "--audit-dtypes must be one of float32, float64"),
    (["--audit-cells", "nan"], "rho in .0, 100."), (["--taus", "0"], "must be > 0"), (["--rhos", "-1"], "must be > 0"),
    (["--gammas", "-1000"], "at most 100"), (["--dose-seeds", "-1"], "0 for the paper's"),
    (["--budget", "10"], "at least 25"), (["--parts", "colour"], "among"),
    (["--parts", "audit", "--members", "9"], "block of --parts audit, 0..7, got 9")])
def test_bad_input_writes_nothing(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        experiment.run([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_control_that_does_not_grok_leaves_complete_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    experiment.run(["--p", "11", "--members", "0", "--budget", "300", "--backend", "eager", "--preset", "paper", "--out", str(out)])
    said = capsys.readouterr().out
    assert said.count("no W_c") >= 3 and "findings in" in said
    runs = files.read_csv(out / "runs.csv")
    assert {run["arm"] for run in runs} == {"free"} and all(run["censored"] for run in runs)
    assert {p.name for p in out.iterdir()} >= {"runs.csv", "cells.csv", "trajectories.csv", "summary.json", "config.json", "around_grok.csv"}


def test_smoke_preset_a_cell_that_never_groks_and_a_hopeless_temperature(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    flags = ["--preset", "smoke", "--taus", "1.3", "1e6", "--budget", "1400", "--parts", "mediation", "grid", "allocation", "--gammas", "0", "0.5",
             "--members", "0", "--out", str(out)]
    experiment.run(flags)
    said = capsys.readouterr().out
    runs, summary = files.read_csv(out / "runs.csv"), json.loads((out / "summary.json").read_text())
    hopeless = "clamp_p59_b12_ce_rho1.05_tau1000000.00"
    assert any(line.startswith(hopeless) and "> budget" in line for line in said.splitlines())
    assert [run["t_grok_step"] for run in runs if run["cell"] == hopeless] == [None]
    assert summary["claims"] == []                                            # another learning rate than the paper's
    found = {f["id"]: f for f in summary["findings"]}
    assert found["norm_up.ce.p59"]["ours"] > 1.2 and found["r2.L.p59"]["ours"] is None   # a censored cell leaves the regression without value
    alloc = [run for run in runs if run["arm"] == "alloc"]
    for run in alloc:
        assert math.hypot(run["held_E"], run["held_W1"], run["held_W2"]) == pytest.approx(run["w_c"], rel=1e-6)
    for name in ("mediation_p59", "memorisation_p59", "collapse_p59", "allocation_p59"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    tables = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".csv", ".json")}
    (out / "trajectories.csv").unlink()                                       # as in a run of record
    experiment.run([*flags, "--figures-only"])
    assert all((out / name).read_bytes() == data for name, data in tables.items() if name != "trajectories.csv")
