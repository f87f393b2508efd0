"""Statistics on planted data: what was put in comes out, censored runs pull the right way."""
import math

import numpy as np
import pytest

from lab import stats

INF = math.inf


def log_median(times: np.ndarray) -> np.ndarray:
    return np.log(stats.median(times))


def test_censored_runs_count_as_late() -> None:
    assert stats.median(np.array([1.0, 2.0, INF])) == 2.0
    assert stats.median(np.array([1.0, 2.0, 3.0, INF])) == 2.5
    assert stats.median(np.array([1.0, INF, INF])) == INF
    assert stats.median(np.array([1.0, 2.0, INF, INF])) == INF   # half censored: the middle is not reached
    assert (stats.median(np.array([[3.0, 1, 2], [5, 4, INF]])) == [2, 5]).all()


def test_the_median_of_those_that_grok() -> None:
    values = np.array([[3.0, INF, 1.0], [INF, INF, INF], [math.nan, 5.0, 2.0]])
    assert np.array_equal(stats.finite_median(values), [2.0, math.nan, 3.5], equal_nan=True)
    drawn = np.random.default_rng(0).choice([1.0, 2.5, 7.0, math.nan, INF], (200, 7))
    drawn[:, 0] = 4.0   # where there is one, numpy's
    assert np.array_equal(stats.finite_median(drawn), np.nanmedian(np.where(np.isinf(drawn), np.nan, drawn), -1))


def planted(alpha: float, members: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rho = np.array([0.85, 0.95, 1.05, 1.15])
    rng = np.random.default_rng(seed)
    seeds = rng.normal(0, noise, members)   # shared by the arms, as in the experiment
    return rho, np.exp(8 + alpha * rho[:, None] + seeds + rng.normal(0, noise / 2, (4, members)))


def test_alpha_comes_back_inside_its_interval_at_the_nominal_rate() -> None:
    inside = 0
    for seed in range(200):
        rho, table = planted(7.6, 12, 0.08, seed)
        _, lo, hi = stats.bootstrap(table, lambda t, rho=rho: stats.line(rho, np.log(stats.median(t)))[0], seed)
        inside += lo <= 7.6 <= hi
    assert 0.88 <= inside / 200 <= 0.99   # binomial 95 +- 3 x 1.5%, and a percentile bootstrap of 12 is a little narrow


def test_bootstrap_is_paired_seeded_and_survives_censored_cells() -> None:
    rho, table = planted(7.6, 8, 0.3, 1)
    statistic = lambda t: stats.line(rho, np.log(stats.median(t)))[0]  # noqa: E731
    assert stats.bootstrap(table, statistic) == stats.bootstrap(table, statistic)
    shifted = table * np.exp(np.random.default_rng(3).normal(0, 2, 8))   # a factor per member, the same in every arm
    one = stats.bootstrap(shifted[:1].repeat(2, 0), lambda t: stats.median(t)[..., 1] / stats.median(t)[..., 0])
    assert one == (1, 1, 1)   # unpaired resampling would spread this
    table[3] = INF
    assert all(math.isfinite(x) for x in stats.bootstrap(table, statistic))
    table[:] = INF
    assert all(math.isnan(x) for x in stats.bootstrap(table, statistic))


def test_line_and_shared_slope() -> None:
    x = np.array([0.0, 1.0, 2.0])
    slope, intercept, r2 = stats.line(x, np.array([1.0, 3.0, 5.0]))
    assert (slope, intercept, r2) == (2, 1, 1)
    assert stats.line(x, np.array([1.0, INF, 5.0]))[0] == 2
    assert math.isnan(stats.line(x, np.array([1.0, INF, INF]))[0])
    assert math.isnan(stats.line(np.array([1.0, 1.0]), np.array([1.0, 2.0]))[0])
    assert not math.isnan(stats.line(x, np.array([2.0, 2.0, 2.0]))[0])   # ties in y: slope 0, R^2 undefined
    shared, r2 = stats.shared_slope([x, x + 5], [2 * x + 1, 2 * x + 40])
    assert shared == pytest.approx(2) and r2 == pytest.approx(1)


def test_lack_of_fit_tells_a_bend_from_noise() -> None:
    rng, rho = np.random.default_rng(0), np.linspace(0.85, 1.25, 9)
    straight = 7 * rho[:, None] + rng.normal(0, 0.1, (9, 16))
    assert stats.lack_of_fit(rho, straight) > 0.01
    assert stats.lack_of_fit(rho, straight - 8 * (rho[:, None] - 1.05) ** 2) < 1e-6


ROW = {"id": "x", "quantity": "q", "statistic": "T_grok", "value": 100.0, "printed": "100", "lo": None, "hi": None, "n_seeds": 16}
BEYOND = {**ROW, "value": None, "printed": "not within 20000"}
INFINITE = (INF, INF, INF)


@pytest.mark.parametrize("row, ours, n, worst, verdict", [
    (ROW, (104, 102, 106), 16, 0.0, "REPLICATED"),           # meets 97..103
    (ROW, (110, 104, 116), 16, 0.0, "NOT REPLICATED"),
    (ROW, (110, 104, 116), 7, 0.0, "INCONCLUSIVE"),          # fewer than half the published members
    (ROW, (100, 99, 101), 8, 0.5, "INCONCLUSIVE"),           # half are censored
    (ROW, (100, 99, 101), 8, 0.49, "REPLICATED"),
    (ROW, (math.nan,) * 3, 16, 0.0, "INCONCLUSIVE"),
    ({**ROW, "lo": 90.0, "hi": 95.0}, (96, 94, 98), 16, 0.0, "REPLICATED"),
    ({**ROW, "lo": 90.0, "hi": 93.0}, (96, 94, 98), 16, 0.0, "NOT REPLICATED"),
    (BEYOND, INFINITE, 8, 1.0, "REPLICATED"),
    (BEYOND, (15_000, 14_000, 16_000), 8, 0.0, "NOT REPLICATED"),
])
def test_verdict_on_fresh_networks(row: dict, ours: tuple, n: int, worst: float, verdict: str) -> None:
    assert stats.replicated(row, ours, n, 0, "", worst)["verdict"] == verdict


@pytest.mark.parametrize("row, ours, n, missing, verdict", [
    (ROW, (100.4, 90, 110), 16, "", "REPRODUCED"),           # its printed digits
    (ROW, (100.9, 90, 110), 16, "", "REPRODUCED"),           # within 1%
    (ROW, (101.1, 90, 110), 16, "", "NOT REPRODUCED"),
    (ROW, (100, 90, 110), 15, "", "PARTLY RUN"),
    (ROW, (100, 90, 110), 16, "two doses", "PARTLY RUN"),
    (BEYOND, INFINITE, 16, "", "REPRODUCED"),
    (BEYOND, (15_000, 14_000, 16_000), 16, "", "NOT REPRODUCED"),
])
def test_verdict_on_the_papers_networks(row: dict, ours: tuple, n: int, missing: str, verdict: str) -> None:
    assert stats.reproduced(row, ours, n, 0, missing)["verdict"] == verdict


def test_cells_table_uses_the_logged_step_nearest_the_median() -> None:
    run = {"arm": "clamp", "model": "mlp", "p": 59, "budget_steps": 1000, "t_mem_step": 175, "logit_scale_at_grok": 2.0}
    runs = [{**run, "cell": "c", "member": m, "t_grok_step": t} for m, t in enumerate((500, 600, None))]
    log = [{"cell": "c", "member": m, "step": s, "logit_scale": s + m, "collapse32": 0.0, "collapse64": 0.0}
           for m in range(3) for s in (1, 200, 400, 600, 800)]
    (row,) = stats.cell_rows(runs, log)
    assert (row["n"], row["n_censored"], row["median_t_grok_step"], row["median_grokked_only"]) == (3, 1, 600, 550)
    assert row["logit_scale_step"] in (400, 600) and row["logit_scale"] == row["logit_scale_step"] + 1   # mean over all three members
