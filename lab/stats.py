"""Medians that keep censored runs, intervals over seeds, fits, and the verdict on a published number.

A run that did not grok within its budget counts as later than the budget: infinite here, `> budget` in print. Nothing is dropped.
Intervals: 95% percentile bootstrap over members, the same resampled members in every cell (arms share seeds), 4000 resamples, seeded.
"""
import math
from collections.abc import Callable

import numpy as np

from common import CHANGED, LOG_EVERY

RESAMPLES = 4000
TOLERANCE = 0.03   # a published value without an interval counts as value +- 3% for fresh networks
EQUAL = 0.01       # and within 1% as the same for the papers' own


def nearest_log(t_grok: np.ndarray) -> int:
    """Logged step nearest the median of the members that grok, where paper B reads a cell's logit scale; -1 if none does."""
    kept = t_grok[np.isfinite(t_grok) & (t_grok >= 0)]
    return -1 if not len(kept) else max(math.ceil(float(np.median(kept)) / LOG_EVERY - 0.5) * LOG_EVERY, 1)


def times(runs: list[dict], cell: str, column: str = "t_grok_step") -> dict[int, float]:
    """Member -> step at which it crossed; infinite where it did not within the budget."""
    return {run["member"]: math.inf if run[column] is None else float(run[column]) for run in runs if run["cell"] == cell}


def median(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Median over `axis`; infinite as soon as half of the runs are."""
    ordered = np.sort(values, axis=axis)
    n = ordered.shape[axis]
    low, high = np.take(ordered, (n - 1) // 2, axis=axis), np.take(ordered, n // 2, axis=axis)
    return (low + high) / 2


def finite_median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis of the finite values; not a number where there is none."""
    n = np.isfinite(values).sum(-1, keepdims=True)
    ordered = np.sort(np.where(np.isfinite(values), values, np.inf), -1)
    low, high = (np.take_along_axis(ordered, np.maximum(at, 0), -1) for at in ((n - 1) // 2, np.minimum(n // 2, values.shape[-1] - 1)))
    return np.where(n > 0, (low + high) / 2, np.nan)[..., 0]


def resampled(members: int, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """Estimate and 95% interval of `statistic`, which maps chosen members `(resamples, members)` to `(resamples,)`.

    An end of the interval that falls on resamples without a finite value is not a number; so are both where one resample in twenty has
    no value at all.
    """
    picks = np.random.default_rng(seed).integers(0, members, (RESAMPLES, members))
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate, samples = float(statistic(np.arange(members)[None])[0]), statistic(picks)
        some = np.isnan(samples).mean() <= 0.05
        lo, hi = np.nanpercentile(samples, [2.5, 97.5], method="nearest") if some else (math.nan, math.nan)
    return estimate, float(lo), float(hi)


def bootstrap(table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """`resampled` of a statistic that maps `(..., cells, members)` to `(...)`; members are resampled jointly in all cells of `table`."""
    return resampled(table.shape[-1], lambda picks: statistic(np.moveaxis(table[:, picks], 1, 0)), seed)


def critical_norms(runs: list[dict], column: str = "norm_at_grok") -> dict[str, float]:
    """W_c of every free cell that has a run which grokked: the median of the norm, total or of the group in `column`, at each run's own T_grok."""
    norms: dict[str, list[float]] = {}
    for run in runs:
        if run["arm"] == "free" and not run["censored"]:
            norms.setdefault(run["cell"], []).append(run[column])
    return {cell: float(np.median(values)) for cell, values in norms.items()}


def power_shares(runs: list[dict]) -> dict[str, tuple[float, ...]]:
    """Shares of E, W1 and W2 in the squared norm, mean over the members that grok, each at its own T_grok, of every free cell that has one."""
    shares: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["arm"] == "free" and not run["censored"]:
            mine = [(run[f"norm_{group}_at_grok"] / run["norm_at_grok"]) ** 2 for group in ("E", "W1", "W2")]
            shares.setdefault(run["cell"], []).append(mine)
    return {cell: tuple(np.mean(values, 0).tolist()) for cell, values in shares.items()}


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


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return line(x, y)[0]


def r2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return line(x, y)[2]


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


def lack_of_fit(x: np.ndarray, log_times: np.ndarray) -> float:
    """p-value of the F test that ln T is a straight line in x, against seed noise. `log_times (cells, members)`, finite."""
    from scipy.special import fdtrc  # half a second's import, which other commands do without

    cells, members = log_times.shape
    means = log_times.mean(1)
    residual = means - np.polyval(np.polyfit(x, means, 1), x)
    between = members * (residual**2).sum() / (cells - 2)
    within = ((log_times - means[:, None]) ** 2).sum() / (cells * (members - 1))
    return math.nan if within == 0 else float(fdtrc(cells - 2, cells * (members - 1), between / within))


# ---------------------------------------------------------------- paper B: regressions, forms of the dose response, mediation

def least_squares(y: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`y (B, m)` on a constant and `columns`, each `(m,)` or `(B, m)`: R^2 and corrected AIC, `m ln(RSS / m) + 2k + 2k(k+1)/(m-k-1)`.

    Not a number where a value of that row is not finite. `k` counts the coefficients, as paper B does.
    """
    B, m = y.shape
    X = np.stack([np.ones((B, m)), *(np.broadcast_to(c, (B, m)) for c in columns)], axis=-1)   # (B, m, k)
    whole = np.isfinite(y).all(1) & np.isfinite(X).all((1, 2))
    X, z = np.where(whole[:, None, None], X, 0), np.where(whole[:, None], y, 0)
    residual = z - np.einsum("bmk,bkn,bn->bm", X, np.linalg.pinv(X), z)
    k, rss, total = X.shape[-1], (residual**2).sum(1), ((z - z.mean(1, keepdims=True)) ** 2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r2, score = np.where(total > 0, 1 - rss / total, np.nan), m * np.log(rss / m) + 2 * k
    score = score + 2 * k * (k + 1) / (m - k - 1) if m > k + 1 else np.full(B, np.nan)
    return np.where(whole, r2, np.nan), np.where(whole, score, np.nan)


def dose_forms(W: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """AIC, `m ln(RSS / m) + 2k`, of three forms of `y = ln T_grok (B, m)` over held norms `W (m,)` (arXiv 2606.18465, Table 1 and its code),
    and of a fourth that its code leaves out. Not a number where a value of the row is not finite, or there are no more points than k.

    exponential `c + a W`, k=2; power law `c + g ln(W - w0)` with the offset w0 in [0, min W), k=3; saddle node `c - ln(w0 - W) / 2`,
    w0 > max W, k=2; and a power law that diverges at an offset above, `c - g ln(w0 - W)`, k=3. Offsets are searched on a grid.
    """
    m, near = len(W), np.geomspace(1e-4, 1, 1500)
    below = (W.min() * (1 - near))[:, None]                                                    # (g, 1), from min W down to 0
    above = (W.max() * (1 + np.geomspace(1e-5, 100, 3000)))[:, None]
    whole = np.isfinite(y).all(1)
    centred = np.where(whole[:, None], y, 0)
    centred = centred - centred.mean(1, keepdims=True)

    def best(x: np.ndarray, slope: float | None = None) -> np.ndarray:
        """Least residual sum of squares over the candidates `x (g, m)`, with a free slope or the given one."""
        dx = x - x.mean(1, keepdims=True)
        if slope is not None:
            return np.stack([((row[None] - slope * dx) ** 2).sum(1).min() for row in centred])
        unit = dx / np.linalg.norm(dx, axis=1, keepdims=True)
        return (centred**2).sum(1) - ((centred @ unit.T) ** 2).max(1)

    forms = {"exponential": (best(W[None].astype(float)), 2), "power": (best(np.log(W - below)), 3),
             "saddle_node": (best(np.log(above - W), -0.5), 2), "power_above": (best(np.log(above - W)), 3)}
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: np.where(whole & (m > k), m * np.log(np.maximum(rss, 1e-300) / m) + 2 * k, np.nan)
                for name, (rss, k) in forms.items()}


def favours(*others: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """AIC of the best of the `others` among the dose forms minus that of the exponential, as a statistic of norms and ln T_grok."""
    def difference(W: np.ndarray, y: np.ndarray) -> np.ndarray:
        scores = dose_forms(W, y)
        return np.min([scores[form] for form in others], axis=0) - scores["exponential"]
    return difference


def recovery(T0: np.ndarray, T1: np.ndarray, T: np.ndarray, L: np.ndarray, L0: np.ndarray, log: bool = False) -> np.ndarray:
    """Recovery fraction `(T1 - T2) / (T1 - T0) (B,)`; T2 is `T (B, k)` interpolated over the logit scales `L (B, k)` at `L0 (B,)`.

    `log` takes it on ln T (T2 as before). Not a number where L0 lies outside the sweep, or a time is infinite (arXiv 2606.18465, sec 4).
    """
    order = np.argsort(L, axis=1, kind="stable")
    xs, ys = np.take_along_axis(L, order, 1), np.take_along_axis(T, order, 1)
    T2 = np.array([np.interp(x0, x, t, left=np.nan, right=np.nan) for x0, x, t in zip(L0, xs, ys, strict=True)])
    if log:
        T0, T1, T2 = np.log(T0), np.log(T1), np.log(T2)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = (T1 - T2) / (T1 - T0)
    return np.where(np.isfinite(out), out, np.nan)


# ---------------------------------------------------------------- verdicts and tables

def finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(f"{x:.9g}")


def without_nan(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def short(x: float | None) -> str:
    """A number for a person: four significant digits, steps in full."""
    if x is None or math.isnan(x):
        return "-"
    return "> budget" if math.isinf(x) else f"{x:.0f}" if 1000 <= abs(x) < 1e7 else f"{x:.4g}"


def answer_row(row: dict, ours: tuple[float, float, float], n: int, n_censored: int, verdict: str, why: str) -> dict:
    """One answer of summary.json: our estimate and 95% interval beside the published ones."""
    return {"id": row["id"], "quantity": row["quantity"], **dict(zip(("ours", "lo", "hi"), map(finite, ours), strict=True)),
            "published": row["value"], "published_lo": row["lo"], "published_hi": row["hi"], "n": n, "n_censored": n_censored, "verdict": verdict,
            "why": why}


def reproduced(row: dict, ours: tuple[float, float, float], n: int, n_censored: int, missing: str = "") -> dict:
    """The papers' own networks: do the same numbers come out? By the rule written before the runs.

    REPRODUCED if the whole published block ran and our value is the published one to its printed digits or within 1%, NOT REPRODUCED if not,
    PARTLY RUN while members or cells are missing. A median "not within" a budget is reproduced if half or more of the runs are censored there.
    """
    value, printed = row["value"], row["printed"]
    if missing or (row["n_seeds"] and n < row["n_seeds"]):
        return answer_row(row, ours, n, n_censored, "PARTLY RUN", missing or f"{n} of {row['n_seeds']:.0f} members")
    if printed.startswith("not within "):
        late = ours[0] > float(printed.split()[-1])                      # infinite, or later than the paper's budget
        equal = late or not math.isfinite(ours[0]) or (row["statistic"] == "T_grok" and 2 * n_censored >= n)
        why = f"{n_censored} of {n} runs censored"
    elif value is None:
        return answer_row(row, ours, n, n_censored, "NOT REPRODUCED", f"the paper gives no number: {printed}")
    else:
        decimals = len(printed.partition(".")[2]) if "e" not in printed else 15
        equal = math.isfinite(ours[0]) and (round(ours[0], decimals) == value or abs(ours[0] - value) <= EQUAL * abs(value))
        why = f"{100 * (ours[0] / value - 1):+.2f}%" if value else f"{ours[0]:.3g} against {printed}"
    return answer_row(row, ours, n, n_censored, "REPRODUCED" if equal else "NOT REPRODUCED", why)


def replicated(row: dict, ours: tuple[float, float, float], n: int, n_censored: int, missing: str = "", worst: float = 0.0) -> dict:
    """Fresh networks: does the claim hold for them? By the rule written before the runs.

    REPLICATED if our 95% interval meets the published one (or value +- 3%), NOT REPLICATED if not, INCONCLUSIVE if fewer than half the
    published members ran, half are censored (`worst`: share censored in the worst cell behind the number) or doses of the published fit are
    `missing`.
    """
    value, lo, hi = row["value"], row["lo"], row["hi"]
    beyond = row["printed"].startswith("not within ")
    if beyond:   # the paper's median is later than its budget; ours is infinite where half of its runs are
        lo, hi, worst = float(row["printed"].split()[-1]), math.inf, 1.0 if missing else 0.0
    elif value is not None and lo is None:
        lo, hi = sorted((value * (1 - TOLERANCE), value * (1 + TOLERANCE)))
    if row["n_seeds"] and n < row["n_seeds"] / 2:
        verdict, why = "INCONCLUSIVE", missing or f"{n} members ran, the paper has {row['n_seeds']:.0f}"
    elif worst >= 0.5 or not (all(map(math.isfinite, ours)) or (beyond and math.isinf(ours[2]))):
        verdict, why = "INCONCLUSIVE", missing or "half or more of a cell, or of its resamples, is censored"
    elif value is None and not beyond:
        verdict, why = "INCONCLUSIVE", missing or f"the paper gives no number: {row['printed']}"
    else:
        meets = ours[1] <= hi and ours[2] >= lo
        verdict = "REPLICATED" if meets else "NOT REPLICATED"
        why = missing or ("the intervals meet" if meets else "the intervals do not meet")
    return answer_row(row, ours, n, n_censored, verdict, why)


def finding(key: str, quantity: str, ours: tuple[float, float, float], n: int, n_censored: int = 0, **where: object) -> dict:
    """A number that no paper publishes, for summary.json."""
    return {"id": key, "quantity": quantity, **dict(zip(("ours", "lo", "hi"), map(finite, ours), strict=True)), "n": n, "n_censored": n_censored,
            **where}


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
                                           "weight_decay", "dtype", "clamp_start", "clamp_stop", "held_norm", "w_c", "budget_steps")}
        row |= {k: mine[0][k] for k in ("task", *CHANGED) if mine[0].get(k) not in (None, "add")}
        row |= {"n": len(mine), "n_censored": int((~np.isfinite(grok)).sum()), "median_t_mem_step": finite(median(mem)),
                "median_t_grok_step": finite(estimate), "median_lo": finite(lo), "median_hi": finite(hi),
                "median_grokked_only": finite(np.median(kept)) if len(kept) else None}
        logged = [t for t in trajectories if t["cell"] == name and (t["step"] % 200 == 0 or t["step"] == 1)]
        steps = sorted({t["step"] for t in logged})
        if steps:
            nearest = nearest_log(kept) if len(kept) else steps[-1]
            there = [t for t in logged if t["step"] == nearest]
            mean = lambda k, there=there: float(np.mean([t[k] for t in there if t[k] is not None] or [np.nan]))  # noqa: E731
            row |= {"logit_scale": finite(mean("logit_scale")) if len(kept) else None,
                    "collapse32": finite(mean("collapse32")), "collapse64": finite(mean("collapse64")), "logit_scale_step": nearest}
        for key in ("collapse32", "collapse64"):
            row[f"{key}_max"] = largest(key, [t for t in trajectories if t["cell"] == name])
        own = [run["logit_scale_at_grok"] for run in mine if run["logit_scale_at_grok"] is not None]
        row["logit_scale_at_own_grok"] = finite(np.mean(own)) if own else None
        rows.append(row)
    return rows


def around_grok(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """around_grok.csv, what L of a cell needs of the trajectories: logit scale and collapse at step 600, right after the clamp engages, and from
    the first to the last T_grok of a cell."""
    rows = []
    for cell in dict.fromkeys(run["cell"] for run in runs):
        grok = [run["t_grok_step"] for run in runs if run["cell"] == cell and run["t_grok_step"] is not None]
        mine = [t for t in trajectories if t["cell"] == cell]
        last = max((t["step"] for t in mine), default=0)
        first, end = (min(grok) - LOG_EVERY, max(grok) + LOG_EVERY) if grok else (last, last)
        rows += [{k: t[k] for k in ("cell", "member", "step", "logit_scale", "collapse32", "collapse64")} for t in mine
                 if min(first, last) <= t["step"] <= end or t["step"] == 600]
    return rows


def largest(key: str, log: list[dict]) -> float | None:
    """Over the logged steps of a cell, the largest mean over members of `key`; None where nothing was logged or every run had diverged."""
    by_step: dict[int, list[float]] = {}
    for t in log:
        if t[key] is not None:
            by_step.setdefault(t["step"], []).append(t[key])
    return max((float(np.mean(values)) for values in by_step.values()), default=None)


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of text, their columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def cell_table(runs: list[dict], published: dict[str, float] | None = None, column: str = "t_grok_step", most: int = 0) -> str:
    """A line per cell for a person: members, censored, medians of T_mem and of `column` with its 95% interval, norm at own T_grok; `published`
    medians by cell beside them. `most`: lines at most, 0 = all."""
    rows = [("condition", "n", "censored", "T_mem", column.removesuffix("_step").replace("t_", "T_"), "95% interval", "norm at T_grok", "published")]
    for cell in dict.fromkeys(run["cell"] for run in runs):
        mine = [run for run in runs if run["cell"] == cell]
        own = np.array([*times(mine, cell, column).values()])
        ours, lo, hi = bootstrap(own[None], lambda t: median(t)[..., 0])
        norms = [run["norm_at_grok"] for run in mine if run["norm_at_grok"] is not None]
        known = (published or {}).get(cell)
        memorised = float(median(np.array([*times(mine, cell, "t_mem_step").values()])))
        rows.append((cell, str(len(mine)), str(int((~np.isfinite(own)).sum())), short(memorised), short(ours),
                     f"{short(lo)} .. {short(hi)}", short(float(np.median(norms)) if norms else None), short(known) if known else ""))
    rows = [row if published else row[:-1] for row in rows]
    rest = len(rows) - 1 - most if most else 0
    lines = columns(rows[: most + 1] if rest > 0 else rows)
    return lines + (f"\nand {rest} more conditions in cells.csv" if rest > 0 else "")
