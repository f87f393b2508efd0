"""What a held norm does to T_grok, measured alike for the MLP and for transformers: the exponential law, free contraction, open doubts."""
import math
from collections.abc import Callable, Iterable

import numpy as np

from lab import stats
from lab.answers import SAME, Statistic, Table, lacking


def line(table: Table, cells: Iterable[str]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """ln of the median T_grok on rho by least squares: slope alpha, intercept and R^2, each `(B,)`, of members `(B, members)`."""
    cells = tuple(cells)
    rhos = np.array([table.first[cell]["rho"] for cell in cells], dtype=float)
    return lambda picks: stats.line(rhos, table.log_T(cells)(picks))


def within(table: Table, cells: Iterable[str], doses: tuple[float, ...]) -> list[str]:
    """Cells between the first and the last of `doses`."""
    return [cell for cell in cells if doses[0] <= table.first[cell]["rho"] <= doses[-1]]


def lacking_doses(table: Table, cells: Iterable[str], doses: tuple[float, ...]) -> str:
    return lacking((table.first[cell]["rho"] for cell in cells), doses)


def statistics(fitted: dict[str, tuple[float, ...]], top: float, **plain: object) -> dict[str, Callable[[Table, dict], tuple | None]]:
    """Of the line through ln T_grok over rho: `alpha` its slope, `r2`, and `saturation`, the median T_grok at rho `top` over what the line says
    there. `fitted`: doses by the paper's set of runs; `plain`: conditions that the published rows leave out."""
    def of_line(number: int) -> Callable[[Table, dict], tuple | None]:
        def statistic(table: Table, row: dict) -> tuple | None:
            doses = fitted.get(row["experiment"], (math.inf,))
            cells = within(table, table.like(row, arm="clamp", **plain), doses)
            if len(cells) < 2:
                return None
            return cells, lambda picks: line(table, cells)(picks)[number], lacking_doses(table, cells, doses)
        return statistic

    def saturation(table: Table, row: dict) -> tuple | None:
        found, above = of_line(0)(table, row), table.like(row, arm="clamp", rho=top, **plain)
        if not found or not above:
            return None
        cells, _, missing = found

        def ratio(picks: np.ndarray) -> np.ndarray:
            slope, intercept, _ = line(table, cells)(picks)
            return table.T(above[0])(picks) / np.exp(intercept + slope * top)
        return [*cells, above[0]], ratio, missing
    return {"alpha": of_line(0), "r2": of_line(2), "saturation": saturation}


def tell(table: Table, rows: dict[str, dict], statistics: dict[str, Callable], labels: dict[str, str]) -> None:
    """A sentence of the command's last lines for every claim of `labels` that is answered."""
    for key, label in labels.items():
        if claim := table.claims.get(key):
            cells = statistics[rows[key]["statistic"]](table, rows[key])[0]
            ours = tuple(math.nan if claim[end] is None else claim[end] for end in ("ours", "lo", "hi"))
            table.say(label, ours, claim["n"] * len(cells), claim["n_censored"], key)


def power_of_p(column: str, fitted: dict[str, tuple[int, ...]], **plain: object) -> Callable[[Table, dict], tuple | None]:
    """k of a norm at own T_grok ~ p^k, of free cells. `fitted`: moduli by the paper's set of runs."""
    def statistic(table: Table, row: dict) -> tuple | None:
        cells = table.like(row, **plain, arm="free")
        moduli = [table.first[cell]["p"] for cell in cells]
        norms = table.values(cells, column)                                                 # (cells, members)
        if len(set(moduli)) < 3:
            return None
        return (cells, lambda picks: stats.line(np.log(moduli), np.log(stats.finite_median(norms[:, picks])).T)[0],
                lacking(moduli, fitted[row["experiment"]], "moduli"))
    return statistic


def of_read(column: str, **plain: object) -> Callable[[Table, dict], tuple | None]:
    """Median over members of a column that was read from another table, the largest of the cells: of clamps where the row's id says held."""
    def statistic(table: Table, row: dict) -> tuple | None:
        cells = table.like(row, **plain, arm="clamp" if row["id"].endswith("held") else "free")
        values = table.values(cells, column)                                                # (cells, members)
        if not np.isfinite(values).any():
            return None
        return cells, lambda picks: np.nanmax(stats.finite_median(values[:, picks]), axis=0), ""
    return statistic


def cv(table: Table, cells: Iterable[str], column: str = "norm_at_grok", unit: float = 100) -> Statistic:
    """Standard deviation over mean, in percent or another `unit`, of a norm at own T_grok over all members of `cells` together."""
    values = table.values(cells, column)                                                    # (cells, members)

    def statistic(picks: np.ndarray) -> np.ndarray:
        chosen = values[:, picks]                                                           # (cells, B, members)
        return unit * np.nanstd(chosen, axis=(0, 2), ddof=1) / np.nanmean(chosen, axis=(0, 2))
    return statistic


def off_frontier(table: Table, held: str, free: list[str], key: str = "") -> None:
    """By how much a held norm leaves the frontier that `free` cells trace over weight decays: its median T_grok over theirs, on a log scale
    interpolated between the median norms at own T_grok; a value only where the frontier reaches the held norm."""
    norms, target = table.values(free, "norm_at_grok"), table.first[held]["held_norm"]

    def ratio(picks: np.ndarray) -> np.ndarray:
        W, T = stats.finite_median(norms[:, picks]).T, table.log_T(free)(picks)             # (B, cells) each
        expected = []
        for x, y in zip(W, T, strict=True):
            order = np.argsort(x)[: np.isfinite(x).sum()]                                   # not a number sorts last: a cell that never groks
            expected.append(np.interp(np.log(target), np.log(x[order]), y[order], left=np.nan, right=np.nan) if len(order) > 1 else np.nan)
        return table.T(held)(picks) / np.exp(expected)
    run = table.first[held]
    if len(free) > 1:
        where = f"p{run['p']}" if run["p"] else run["task"].replace(" ", "_")
        table.finding(key or f"off_frontier.{where}.rho{run['rho']:g}", f"median T_grok held at rho {run['rho']:g}, over that of the free frontier "
                      "at this norm", (held, *free), ratio)


def frontier(table: Table, **conditions: object) -> None:
    """Clamps beside the frontier that free cells trace over weight decays, where several ran; and what is left of a start at another norm."""
    free = sorted(table.pick(arm="free", init_scale=None, **conditions), key=lambda cell: table.first[cell]["weight_decay"])
    plain = [cell for cell in free if table.first[cell]["weight_decay"] == 1]
    if len(free) > 2:
        for held in table.pick(arm="clamp", group="", weight_decay=1, tau=1, **conditions):
            off_frontier(table, held, free)
    for low in table.pick(arm="free", **conditions):
        if (scale := table.first[low].get("init_scale")) and plain:
            norms = table.values((low, plain[0]), "norm_at_grok")                           # (2, members)
            table.finding(f"washed_out.T_grok.{low}", f"median T_grok, weights started at {scale:g} times their scale, over plain", (low, plain[0]),
                          table.ratio(low, plain[0]))
            table.finding(f"washed_out.norm.{low}", "median norm at own T_grok of the same", (low, plain[0]),
                          lambda picks, norms=norms: np.divide(*stats.finite_median(norms[:, picks])))


def contraction(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """contraction.csv, free runs: slope of ln V after memorisation against 2 lr wd, and the delay against ln(V_mem / V_grok), V = ||W||^2.

    The norm may go on growing after T_mem, so slope and ratio are given from its peak (largest norm at T_mem or logged after it) as well.
    `fourier_rise_step`: first logged step at which the Gini coefficient of E's spectrum has made half its way from T_mem to T_grok.
    """
    logged: dict[tuple, list[dict]] = {}
    for row in trajectories:
        logged.setdefault((row["cell"], row["member"]), []).append(row)
    rows = []
    for run in runs:
        if run["arm"] != "free" or run["censored"] or run["t_mem_step"] is None:
            continue
        mine = logged.get((run["cell"], run["member"]), [])
        points = [(run["t_mem_step"], 2 * math.log(run["norm_at_mem"]))]                                       # (step, ln V)
        points += [(t["step"], 2 * math.log(t["norm"])) for t in mine if run["t_mem_step"] < t["step"] <= run["t_grok_step"]]
        peak_step, ln_peak = max(points, key=lambda point: point[1])
        falling = [point for point in points if point[0] >= peak_step]
        rate, rate_peak = (-float(stats.line(*np.array(part).T)[0]) if len(part) >= 3 else None for part in (points, falling))
        gini = sorted((t["step"], t["fourier_gini"]) for t in mine if run["t_mem_step"] <= t["step"] <= run["t_grok_step"] and t.get("fourier_gini"))
        half = (gini[0][1] + gini[-1][1]) / 2 if len(gini) > 1 else math.inf
        weak = 2 * run["lr"] * run["weight_decay"]
        v_mem, v_grok = run["norm_at_mem"] ** 2, run["norm_at_grok"] ** 2
        end = max(mine, key=lambda t: t["step"], default=run)
        rows.append({"cell": run["cell"], "member": run["member"], "v_mem": v_mem, "v_peak": math.exp(ln_peak), "v_grok": v_grok,
                     "v_end": end["norm"] ** 2 if end.get("norm") else None,
                     "delay_steps": run["t_grok_step"] - run["t_mem_step"], "peak_step": peak_step,
                     "fourier_rise_step": next((step for step, g in gini if g >= half), None),
                     "ln_v_ratio": math.log(v_mem / v_grok), "ln_v_peak_ratio": ln_peak - math.log(v_grok),
                     "rate_per_step": rate, "rate_from_peak": rate_peak, "two_lr_wd": weak,
                     "rate_over_two_lr_wd": rate / weak if weak and rate is not None else None,
                     "rate_from_peak_over_two_lr_wd": rate_peak / weak if weak and rate_peak is not None else None})
    return rows


def shares(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """shares.csv, of runs that grok with one norm for each of three groups: by how much the share of a group in the total norm, ||W_g|| / ||W||, has
    moved from the first logged step to T_grok, the largest of the groups."""
    first: dict[tuple, dict] = {}
    for row in trajectories:
        kept = first.setdefault((row["cell"], row["member"]), row)
        if row["step"] < kept["step"]:
            first[row["cell"], row["member"]] = row
    rows = []
    for run in runs:
        at = first.get((run["cell"], run["member"]), {})
        if run["t_grok_step"] is not None and at.get("norm_E"):
            drifts = [abs(run[f"norm_{group}_at_grok"] / run["norm_at_grok"] - at[f"norm_{group}"] / at["norm"]) for group in ("E", "W1", "W2")]
            rows.append({"cell": run["cell"], "member": run["member"], "share_drift": max(drifts)})
    return rows


def findings(table: Table, read: dict[str, list[dict]]) -> None:
    """Open doubts that these runs answer in numbers: no verdict, no goal. `read`: the rows of cells.csv and contraction.csv."""
    for cell in table.pick(arm="clamp"):
        run, control = table.first[cell], table.control(cell)
        alike = {key: run[key] for key in ("arm", "group", "tau", *SAME)}
        if run["rho"] == 1 and not run["group"] and control:
            table.finding(f"clamp_over_free.{cell}", "median T_grok, clamp at rho 1 over free, same seeds", (cell, control),
                          table.ratio(cell, control))
        at_rho = table.pick(**{key: value for key, value in alike.items() if key != "lr"}, rho=run["rho"])     # at every learning rate
        fast, lowest = max(at_rho, key=lambda c: table.first[c]["lr"]), min(table.first[c]["lr"] for c in at_rho)
        if run["lr"] == lowest < table.first[fast]["lr"]:
            table.finding(f"lr_factor.{cell}", f"median T_grok, learning rate {run['lr']:g} over {table.first[fast]['lr']:g}, same held norm",
                          (cell, fast), table.ratio(cell, fast))
        below = [c for c in table.pick(**alike) if table.first[c]["rho"] < run["rho"]]
        if below and not run["group"]:
            nearest, rho = below[-1], table.first[below[-1]]["rho"]
            ratio, step = table.ratio(cell, nearest), run["rho"] - rho
            table.finding(f"local_slope.{cell}", f"slope of ln T_grok on rho between {rho:g} and {run['rho']:g}", (cell, nearest),
                          lambda picks, ratio=ratio, step=step: np.log(ratio(picks)) / step)
        shares = table.values((cell,), "collapse32_at_grok")[0]
        shares = shares[np.isfinite(shares)]
        if shares.any() and run.get("dtype") in (None, "float32"):
            ours = float(shares.mean()), float(shares.min()), float(shares.max())
            table.findings.append(stats.finding(f"collapse.float32.{cell}", "share of training pairs in collapse in float32 at own T_grok, mean, "
                                                "least and most of members that grok", ours, len(shares), table.count((cell,))[1]))
    for row in read["cells.csv"]:   # without a T_grok there is nothing at it
        if (row["cell"] in table.first and row["arm"] == "clamp" and row["n_censored"] == row["n"] and row.get("collapse32_max")
                and row["dtype"] in (None, "float32")):
            table.finding(f"collapse.float32.{row['cell']}", "largest share of training pairs in collapse in float32 at a logged step, mean: "
                          "no member grokked", (row["cell"],), row["collapse32_max"])
    contracted = [row for row in read["contraction.csv"] if row["cell"] in table.first]
    for cell in dict.fromkeys(row["cell"] for row in contracted):
        for key, text in (("ln_v_ratio", "ln(V_mem / V_grok)"), ("ln_v_peak_ratio", "ln(V_peak / V_grok)"),
                          ("peak_step", "step at which the norm is largest"),
                          ("fourier_rise_step", "step at which the Gini coefficient of E's spectrum has made half its way from T_mem to T_grok"),
                          ("rate_from_peak_over_two_lr_wd", "rate of ln ||W||^2 from its peak to T_grok over 2 lr wd")):
            values = [row[key] for row in contracted if row["cell"] == cell and row.get(key) is not None]
            ours = (float(np.median(values)), min(values), max(values)) if values else (math.nan, math.nan, math.nan)
            table.findings.append(stats.finding(f"contraction.{key}.{cell}", f"{text}, median, least and most of the members that grok", ours,
                                                len(values), table.count((cell,))[1]))
