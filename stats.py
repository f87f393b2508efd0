"""Medians that keep censored runs, intervals over seeds, fits, and the verdict on a published number.

A run that did not grok within its budget counts as later than the budget: infinite here, `> budget` in print. Nothing is dropped.
Intervals: 95% percentile bootstrap over members, the same resampled members in every cell (arms share seeds), 4000 resamples, seeded.
"""
import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

RESAMPLES = 4000
TOLERANCE = 0.03   # a published value without an interval counts as value +- 3%


def times(runs: list[dict], cell: str, column: str = "t_grok_step") -> dict[int, float]:
    """Member -> step at which it crossed; infinite where it did not within the budget."""
    return {run["member"]: math.inf if run[column] is None else float(run[column]) for run in runs if run["cell"] == cell}


def median(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Median over `axis`; infinite as soon as half of the runs are."""
    ordered = np.sort(values, axis=axis)
    n = ordered.shape[axis]
    low, high = np.take(ordered, (n - 1) // 2, axis=axis), np.take(ordered, n // 2, axis=axis)
    return (low + high) / 2


def bootstrap(table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """Estimate and 95% interval of `statistic`, which maps `(..., cells, members)` to `(...)`; members are resampled jointly.

    An end of the interval that falls on resamples without a finite value is not a number.
    """
    members = table.shape[-1]
    picks = np.random.default_rng(seed).integers(0, members, (RESAMPLES, members))
    with np.errstate(invalid="ignore"):
        estimate = float(statistic(table))
        samples = statistic(np.moveaxis(table[:, picks], 1, 0))           # (resamples,)
        lo, hi = np.nanpercentile(samples, [2.5, 97.5], method="nearest") if np.isfinite(samples).any() else (math.nan, math.nan)
    return estimate, float(lo), float(hi)


def line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares `y = intercept + slope x` over the last axis, ignoring points whose y is not finite: slope, intercept, R^2.

    Fewer than two distinct x give no slope: not a number.
    """
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    use = np.isfinite(y)
    n = use.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x = np.where(use, x, 0).sum(-1) / n
        mean_y = np.where(use, y, 0).sum(-1) / n
        dx, dy = np.where(use, x - mean_x[..., None], 0), np.where(use, y - mean_y[..., None], 0)
        sxx, sxy, syy = (dx * dx).sum(-1), (dx * dy).sum(-1), (dy * dy).sum(-1)
        slope = np.where(sxx > 0, sxy / sxx, np.nan)
        return slope, mean_y - slope * mean_x, np.where(syy > 0, sxy**2 / (sxx * syy), np.nan)


def shared_slope(x: list[np.ndarray], y: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One slope and one intercept per group: pooled within-group least squares over the last axis. Slope and R^2 within groups."""
    sxx = sxy = syy = 0.0
    for xs, ys in zip(x, y, strict=True):
        xs, ys = np.broadcast_arrays(xs, ys)
        use = np.isfinite(ys)
        n = np.maximum(use.sum(-1), 1)
        dx = np.where(use, xs - (np.where(use, xs, 0).sum(-1) / n)[..., None], 0)
        dy = np.where(use, ys, 0) - np.where(use, (np.where(use, ys, 0).sum(-1) / n)[..., None], 0)
        sxx, sxy, syy = sxx + (dx * dx).sum(-1), sxy + (dx * dy).sum(-1), syy + (dy * dy).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return sxy / sxx, sxy**2 / (sxx * syy)


def lack_of_fit(x: np.ndarray, log_times: np.ndarray, degree: int = 1) -> float:
    """p-value of the F test that ln T is a polynomial of `degree` in x, against seed noise. `log_times (cells, members)`, finite."""
    cells, members = log_times.shape
    means = log_times.mean(1)
    residual = means - np.polyval(np.polyfit(x, means, degree), x)
    between = members * (residual**2).sum() / (cells - degree - 1)
    within = ((log_times - means[:, None]) ** 2).sum() / (cells * (members - 1))
    return float(stats.f.sf(between / within, cells - degree - 1, cells * (members - 1)))


# ---------------------------------------------------------------- claims and verdicts

def published(path: Path, prefix: str) -> dict[str, dict]:
    """Rows of published.csv whose id starts with `prefix`, by id, with `value, lo, hi` as numbers or None."""
    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:
            return None
    with open(path, newline="") as f:
        return {row["id"]: {**row, **{k: number(row[k]) for k in ("value", "lo", "hi", "n_seeds")}}
                for row in csv.DictReader(f) if row["id"].startswith(prefix)}


def finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else round(float(x), 6)


def claim(row: dict, ours: tuple[float, float, float] | None, n: int = 0, n_censored: int = 0, why: str = "", worst: float = 0.0) -> dict:
    """One claim of summary.json: our estimate and interval beside the published ones, and the verdict, by the rule written before the runs.

    REPRODUCED if our 95% interval meets the published one (or value +- 3%), NOT REPRODUCED if not, INCONCLUSIVE if fewer than half the
    published members ran or half are censored (`worst`: share censored in the worst cell behind the number), NOT RUN without a number.
    """
    value, lo, hi = row["value"], row["lo"], row["hi"]
    if value is not None and lo is None:
        lo, hi = sorted((value * (1 - TOLERANCE), value * (1 + TOLERANCE)))
    if ours is None:
        verdict, why = "NOT RUN", why or "not part of this run"
    elif row["n_seeds"] and n < row["n_seeds"] / 2:
        verdict, why = "INCONCLUSIVE", why or f"{n} members ran, the paper has {row['n_seeds']:.0f}"
    elif worst >= 0.5 or not all(map(math.isfinite, ours)):
        verdict, why = "INCONCLUSIVE", why or "half or more of a cell is censored"
    elif value is None:
        verdict, why = "INCONCLUSIVE", why or f"the paper gives no number: {row['value']}"
    else:
        meets = ours[1] <= hi and ours[2] >= lo
        verdict = "REPRODUCED" if meets else "NOT REPRODUCED"
        why = why or ("the intervals meet" if meets else "the intervals do not meet")
    e, l, h = ours or (None, None, None)
    return {"id": row["id"], "quantity": row["quantity"], "ours": finite(e), "lo": finite(l), "hi": finite(h), "published": value,
            "published_lo": row["lo"], "published_hi": row["hi"], "n": n, "n_censored": n_censored, "verdict": verdict, "why": why}


def cell_rows(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """cells.csv: per cell its conditions, n, n_censored, medians with interval, and the logit scale L at grokking as paper B defines it.

    `median_t_grok_step` counts censored runs as later than the budget (empty if half or more are); `median_grokked_only` is the papers'.
    """
    rows = []
    for name in dict.fromkeys(run["cell"] for run in runs):
        mine = [run for run in runs if run["cell"] == name]
        grok, mem = np.array([*times(mine, name).values()]), np.array([*times(mine, name, "t_mem_step").values()])
        estimate, lo, hi = bootstrap(grok[None], lambda t: median(t)[..., 0])
        kept = grok[np.isfinite(grok)]
        row = {k: mine[0].get(k) for k in ("cell", "arm", "model", "loss", "p", "train_frac", "block", "rho", "tau", "gamma", "lr",
                                           "weight_decay", "clamp_start", "clamp_stop", "held_norm", "w_c", "budget_steps")}
        row |= {"n": len(mine), "n_censored": int((~np.isfinite(grok)).sum()), "median_t_mem_step": finite(median(mem)),
                "median_t_grok_step": finite(estimate), "median_lo": finite(lo), "median_hi": finite(hi),
                "median_grokked_only": finite(np.median(kept)) if len(kept) else None}
        logged = [t for t in trajectories if t["cell"] == name and (t["step"] % 200 == 0 or t["step"] == 1)]
        steps = sorted({t["step"] for t in logged})
        if steps:
            nearest = min(steps, key=lambda s: abs(s - np.median(kept))) if len(kept) else steps[-1]
            there = [t for t in logged if t["step"] == nearest]
            mean = lambda k, there=there: float(np.mean([t[k] for t in there if t[k] is not None] or [np.nan]))  # noqa: E731
            row |= {"logit_scale": finite(mean("logit_scale")) if len(kept) else None,
                    "collapse32": finite(mean("collapse32")), "collapse64": finite(mean("collapse64")), "logit_scale_step": nearest}
        own = [run["logit_scale_at_grok"] for run in mine if run["logit_scale_at_grok"] is not None]
        row["logit_scale_at_own_grok"] = finite(np.mean(own)) if own else None
        rows.append(row)
    return rows


def table(claims: list[dict]) -> str:
    """The claims that ran, as text for the terminal; NOT RUN ones are counted in the last line."""
    def text(x: float | None) -> str:
        return "-" if x is None else f"{x:.4g}"
    rows = [("claim", "ours", "95% interval", "paper", "n", "censored", "verdict")]
    rows += [(c["id"], text(c["ours"]), f"{text(c['lo'])} .. {text(c['hi'])}", text(c["published"]), str(c["n"]), str(c["n_censored"]), c["verdict"])
             for c in claims if c["verdict"] != "NOT RUN"]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{sum(c['verdict'] == 'NOT RUN' for c in claims)} further published numbers: NOT RUN in this command"])
