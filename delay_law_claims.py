"""Paper A (arXiv 2606.13753), the MLP: how each claim of `exp_delay_law.py` is measured, from the rows of its `runs.csv` alone.

A statistic maps tables `(..., cells, members)` of T_grok to `(...)`: the whole table gives the estimate, resampled members its interval
(`stats.bootstrap`). Infinite = censored, which counts as later.
"""
import math
from collections.abc import Callable

import numpy as np

from lab import stats
from lab.answers import ROOT, SAME

PAPER_LR = 1e-3             # published numbers are answered only by runs whose first learning rate is the paper's
PAPER_SEEDS = {"A.wc.power": 20, "A.wc.cv": 20, "A.wc.power.pscan": 12, "A.alpha.shared.r2": 12, "A.saturation.p41": 12}   # elsewhere 16
FIT_DENSE = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25)   # doses of A.alpha.dense
FIT_MODULI = (0.85, 1.00, 1.15)                                      # doses of A.alpha.pNN
MODULI, FREE_MODULI = (31, 41, 53, 59, 71), (29, 41, 59, 79, 97)     # of A.wc.power.pscan and A.wc.power


class Tables:
    """The runs as tables, and the claims they answer."""

    def __init__(self, runs: list[dict], base_lr: float):
        self.runs, self.base_lr = runs, base_lr
        self.cells = {run["cell"]: run for run in runs}
        self.claims: dict[str, dict] = {}
        self.known = stats.published(ROOT / "published.csv", "A.")

    def pick(self, arm: str, p: int | None = None, block: int | None = None, lr: float | None = None) -> list[dict]:
        """First run of each matching cell at weight decay 1 and train fraction 0.40, by rho."""
        lr = lr or self.base_lr
        found = [c for c in self.cells.values() if c["arm"] == arm and c["weight_decay"] == 1 and c["train_frac"] == 0.40
                 and c["lr"] == lr and p in (None, c["p"]) and block in (None, c["block"])]
        return sorted(found, key=lambda c: (c["p"], c["rho"] or 0))

    def table(self, cells: list[dict]) -> np.ndarray:
        """`T_grok (cells, members)`; infinite = censored."""
        return np.array([list(stats.times(self.runs, c["cell"]).values()) for c in cells])

    def claim(self, key: str, cells: list[dict], statistic: Callable[[np.ndarray], np.ndarray], table: np.ndarray | None = None,
              missing: str = "") -> tuple | None:
        """Answer published row `key`, if there is one, by `statistic` of the `(cells, members)` table of T_grok (or `table`).
        `missing` says what part of the published cells is not there: the answer is then inconclusive."""
        if not cells:
            return None
        grok = self.table(cells)
        ours = stats.bootstrap(grok if table is None else table, statistic)
        if key in self.known and self.base_lr == PAPER_LR:
            censored = ~np.isfinite(grok)
            row = {**self.known[key], "n_seeds": self.known[key]["n_seeds"] or PAPER_SEEDS.get(key, 16)}
            self.claims[key] = stats.claim(row, ours, grok.shape[1], int(censored.sum()), missing,
                                           1.0 if missing else float(censored.mean(1).max()))
        return ours


def log_median(table: np.ndarray) -> np.ndarray:
    medians = stats.median(table)
    return np.where(np.isfinite(medians), np.log(medians), np.inf)


def only(table: np.ndarray) -> np.ndarray:
    return stats.median(table)[..., 0]


def measure(runs: list[dict], config: object) -> tuple[dict[str, dict], dict]:
    """Claims by id, and the fits that the figures draw."""
    m, fits = Tables(runs, config.lrs[0]), {}
    delay_law(m, fits, config)
    matrix(m, config)
    moduli_law(m, fits, config)
    oneshot(m, config)
    concentration(m, fits, config)
    return m.claims, fits


def delay_law(m: Tables, fits: dict, config: object) -> None:
    """Figure 3: alpha of T_grok ~ exp(alpha rho), its R^2, the medians, saturation at rho 1.30, the sustained clamp's range."""
    for p in config.p:
        cells = m.pick("clamp", p, config.seeds)
        fitted = [c for c in cells if FIT_DENSE[0] - 1e-9 <= c["rho"] <= FIT_DENSE[-1] + 1e-9]
        if len(fitted) >= 2:
            rho = np.array([c["rho"] for c in fitted])
            key = "A.alpha.dense" if p == 59 else f"alpha.p{p}"
            missing = lacking(rho, FIT_DENSE)
            alpha = m.claim(key, fitted, lambda t, rho=rho: stats.line(rho, log_median(t))[0], missing=missing)
            m.claim(key + ".r2", fitted, lambda t, rho=rho: stats.line(rho, log_median(t))[2], missing=missing)
            _, intercept, r2 = stats.line(rho, log_median(m.table(fitted)))
            fits[f"dense.p{p}"] = {"alpha": alpha, "intercept": float(intercept), "r2": float(r2), "rhos": rho.tolist()}
            counts = np.isfinite(m.table(fitted)).all()
            if counts and len(fitted) >= 4 and m.table(fitted).shape[1] >= 2:
                fits[f"dense.p{p}"] |= {"lack_of_fit_p": stats.lack_of_fit(rho, np.log(m.table(fitted))), "members": m.table(fitted).shape[1]}
            top = [c for c in cells if abs(c["rho"] - 1.30) < 1e-9]
            if top and p == 59:
                m.claim("A.saturation.p59", [*fitted, *top], saturation(rho), missing=missing)
        if p == 59:
            for c in cells:
                m.claim(f"A.dense.rho{c['rho']:.2f}", [c], only)
            ends = [c for c in cells if c["rho"] in (0.90, 1.15)]
            if len(ends) == 2:
                m.claim("A.sustained.spread", ends, lambda t: stats.median(t).max(-1) / stats.median(t).min(-1))


def lacking(ours: np.ndarray, published: tuple[float, ...], what: str = "doses") -> str:
    """What our doses lack of the published fit: both of its ends, and at least half of its doses, must be there."""
    have = {round(float(rho), 6) for rho in ours} & set(published)
    enough = {published[0], published[-1]} <= have and 2 * len(have) >= len(published)
    ran, wanted = f"{len(ours)} {what} {min(ours):g}..{max(ours):g}", f"{len(published)} of {published[0]}..{published[-1]}"
    return "" if enough else f"fitted to {ran}, the paper to {wanted}"


def saturation(rho: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Tables over extrapolated T_grok at rho 1.30: the last row of the table against the line through the others."""
    def ratio(t: np.ndarray) -> np.ndarray:
        slope, intercept, _ = stats.line(rho, log_median(t[..., :-1, :]))
        return stats.median(t[..., -1, :]) / np.exp(intercept + slope * 1.30)
    return ratio


def matrix(m: Tables, config: object) -> None:
    """Table 1: rho x learning rate."""
    if 59 not in config.p:
        return
    for lr in config.lrs:
        for c in m.pick("clamp", 59, config.seeds, lr):
            m.claim(f"A.matrix.rho{c['rho']:.2f}.lr{lr:g}", [c], only)
    at = {(c["rho"], c["lr"]): c for lr in config.lrs for c in m.pick("clamp", 59, config.seeds, lr)}

    def ratio(t: np.ndarray) -> np.ndarray:
        return stats.median(t)[..., 0] / stats.median(t)[..., 1]
    for key, over, under in (("A.norm_factor", (1.30, 1e-3), (0.85, 1e-3)), ("A.lr_factor", (1.30, 1e-3), (1.30, 8e-3))):
        if over in at and under in at:
            m.claim(key, [at[over], at[under]], ratio)


def moduli_law(m: Tables, fits: dict, config: object) -> None:
    """Section 6: alpha and W_c per modulus, the shared exponent over four of them, saturation at p=41."""
    block, groups = config.moduli_seeds, {}
    for p in config.moduli if "moduli" in config.parts else ():
        cells = m.pick("clamp", p, block)
        for c in cells:
            m.claim(f"A.pscan.p{p}.rho{c['rho']:.2f}", [c], only)
        fitted = [c for c in cells if c["rho"] <= FIT_MODULI[-1] + 1e-9]
        if len(fitted) >= 2:
            rho = np.array([c["rho"] for c in fitted])
            missing = lacking(rho, FIT_MODULI)
            alpha = m.claim(f"A.alpha.p{p}", fitted, lambda t, rho=rho: stats.line(rho, log_median(t))[0], missing=missing)
            _, intercept, r2 = stats.line(rho, log_median(m.table(fitted)))
            fits[f"moduli.p{p}"] = {"alpha": alpha, "intercept": float(intercept), "r2": float(r2), "rhos": rho.tolist()}
            groups[p] = fitted
            if p == 41 and (top := [c for c in cells if abs(c["rho"] - 1.30) < 1e-9]):
                m.claim("A.saturation.p41", [*fitted, *top], saturation(rho), missing=missing)
        critical_norm_claim(m, f"A.wc.pscan.p{p}", m.pick("free", p, block))
    four = [p for p in (41, 53, 59, 71) if p in groups]
    if len(four) == 4:
        flat = [c for p in four for c in groups[p]]
        rhos = [np.array([c["rho"] for c in groups[p]]) for p in four]
        ends = np.cumsum([len(r) for r in rhos])[:-1]
        for which, key in ((0, "A.alpha.shared"), (1, "A.alpha.shared.r2")):
            m.claim(key, flat, lambda t, which=which: stats.shared_slope(rhos, np.split(log_median(t), ends, axis=-1))[which])
    power_claim(m, "A.wc.power.pscan", m.pick("free", block=block) if "moduli" in config.parts else [], MODULI)


def oneshot(m: Tables, config: object) -> None:
    """Section 5: one rescale at step 500 leaves T_grok where it was."""
    cells = m.pick("rescale", 59, config.seeds)
    if len(cells) >= 2:
        m.claim("A.oneshot.spread", cells, lambda t: stats.median(t).max(-1) / stats.median(t).min(-1))


def norms_at_grok(m: Tables, cells: list[dict]) -> np.ndarray:
    """Norm at own T_grok `(cells, members)`; not a number where a run did not grok."""
    return np.array([[np.nan if r["norm_at_grok"] is None else r["norm_at_grok"] for r in m.runs if r["cell"] == c["cell"]] for c in cells])


def critical_norm_claim(m: Tables, key: str, cells: list[dict]) -> None:
    if cells and np.isfinite(norms_at_grok(m, cells[:1])).any():
        m.claim(key, cells[:1], lambda t: np.nanmedian(t, -1)[..., 0], norms_at_grok(m, cells[:1]))


def power_claim(m: Tables, key: str, cells: list[dict], published: tuple[int, ...]) -> tuple | None:
    """k of W_c ~ p^k; the paper's is fitted to the moduli `published`."""
    if len({c["p"] for c in cells}) >= 3:
        p = np.array([c["p"] for c in cells])
        missing = lacking(p, published, "moduli")
        return m.claim(key, cells, lambda t: stats.line(np.log(p), np.log(np.nanmedian(t, -1)))[0], norms_at_grok(m, cells), missing)
    return None


def concentration(m: Tables, fits: dict, config: object) -> None:
    """Section 4: W_c over train fraction, weight decay, learning rate and p; its coefficient of variation; its power law."""
    if "concentration" not in config.parts:
        return
    mine = [c for c in m.cells.values() if c["arm"] == "free" and c["block"] == config.free_seeds]
    for c in mine:
        frac, wd, lr = c["train_frac"], c["weight_decay"], c["lr"]
        keys = [f"A.wc.p{c['p']}"] if (frac, wd, lr) == (0.40, 1, m.base_lr) else []
        if c["p"] == 59:
            keys += [f"A.wc.p59.frac{frac:g}"] if (wd, lr) == (1, m.base_lr) else []
            keys += [f"A.wc.p59.wd{wd:g}"] if (frac, lr) == (0.50, m.base_lr) else []
            keys += [f"A.wc.p59.wd3.lr{lr:g}"] if (frac, wd) == (0.50, 3) else []
        for key in keys:
            critical_norm_claim(m, key, [c])
    fits["power"] = power_claim(m, "A.wc.power", m.pick("free", block=config.free_seeds), FREE_MODULI)
    over_lr = [c for c in mine if (c["p"], c["train_frac"], c["weight_decay"]) == (59, 0.50, 3)]
    if len(over_lr) >= 2:
        def cv(t: np.ndarray) -> np.ndarray:
            return 100 * np.nanstd(t, axis=(-2, -1), ddof=1) / np.nanmean(t, axis=(-2, -1))
        m.claim("A.wc.cv", over_lr, cv, norms_at_grok(m, over_lr))


def contraction(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """Free runs: slope of ln ||W||^2 after memorisation against 2 lr wd, and the delay against ln(V_mem / V_grok), V = ||W||^2.

    The norm may go on growing after T_mem, so slope and ratio are given from its peak (largest norm at T_mem or logged after it) as well.
    """
    rows = []
    for run in runs:
        if run["arm"] != "free" or run["censored"] or run["t_mem_step"] is None:
            continue
        points = [(run["t_mem_step"], 2 * math.log(run["norm_at_mem"]))]
        points += [(t["step"], 2 * math.log(t["norm"])) for t in trajectories if t["cell"] == run["cell"] and t["member"] == run["member"]
                  and run["t_mem_step"] < t["step"] <= run["t_grok_step"]]
        peak_step, ln_peak = max(points, key=lambda point: point[1])
        falling = [point for point in points if point[0] >= peak_step]
        rate, rate_peak = (-float(stats.line(*np.array(part).T)[0]) if len(part) >= 3 else None for part in (points, falling))
        weak = 2 * run["lr"] * run["weight_decay"]
        v_mem, v_grok = run["norm_at_mem"] ** 2, run["norm_at_grok"] ** 2
        end = max((t for t in trajectories if t["cell"] == run["cell"] and t["member"] == run["member"]), key=lambda t: t["step"], default=run)
        rows.append({"cell": run["cell"], "member": run["member"], "v_mem": v_mem, "v_peak": math.exp(ln_peak), "v_grok": v_grok,
                     "v_end": end["norm"] ** 2 if end.get("norm") else None,
                     "delay_steps": run["t_grok_step"] - run["t_mem_step"], "peak_step": peak_step,
                     "ln_v_ratio": math.log(v_mem / v_grok), "ln_v_peak_ratio": ln_peak - math.log(v_grok),
                     "rate_per_step": rate, "rate_from_peak": rate_peak, "two_lr_wd": weak,
                     "rate_over_two_lr_wd": rate / weak if weak and rate is not None else None,
                     "rate_from_peak_over_two_lr_wd": rate_peak / weak if weak and rate_peak is not None else None})
    return rows


def findings(runs: list[dict], fits: dict, contracted: list[dict], cells: list[dict]) -> list[dict]:
    """Open doubts that these runs answer in numbers: no verdict, no goal. `cells`: rows of cells.csv."""
    out = []

    def grok(*cells: str) -> np.ndarray:
        return np.array([[*stats.times(runs, cell).values()] for cell in cells])                   # (cells, members)

    def add(key: str, quantity: str, ours: tuple, n: int, censored: int) -> None:
        out.append({"id": key, "quantity": quantity, **dict(zip(("ours", "lo", "hi"), map(stats.finite, ours), strict=True)), "n": n,
                    "n_censored": censored})

    def add_ratio(key: str, quantity: str, over: str, under: str, of: Callable[[np.ndarray], np.ndarray] = lambda ratio: ratio) -> None:
        pair = grok(over, under)
        ours = stats.bootstrap(pair, lambda t: of(stats.median(t)[..., 0] / stats.median(t)[..., 1]))
        add(key, quantity, ours, pair.shape[1], int((~np.isfinite(pair)).sum()))

    clamps = {r["cell"]: r for r in runs if r["arm"] == "clamp"}
    for cell, run in clamps.items():
        control = next((r["cell"] for r in runs if r["arm"] == "free" and all(r[k] == run[k] for k in SAME)), None)
        if run["rho"] == 1.0 and run["held_norm"] and control:
            add_ratio(f"clamp_over_free.{cell}", "median T_grok, clamp at rho 1 over free, same seeds", cell, control)
        fast = max((r for r in runs if all(r[k] == run[k] for k in ("arm", "p", "block", "rho", "seed0"))), key=lambda r: r["lr"])
        if run["lr"] == min(r["lr"] for r in runs) < fast["lr"]:
            quantity = f"median T_grok, learning rate {run['lr']:g} over {fast['lr']:g}, same held norm"
            add_ratio(f"lr_factor.{cell}", quantity, cell, fast["cell"])
        above = min((r for r in clamps.values() if all(r[k] == run[k] for k in ("p", "block", "lr", "seed0")) and r["held_norm"] and run["held_norm"]
                     and r["rho"] > run["rho"]), key=lambda r: r["rho"], default=None)
        if above:
            step = above["rho"] - run["rho"]
            add_ratio(f"local_slope.{above['cell']}", f"slope of ln T_grok on rho between {run['rho']:g} and {above['rho']:g}", above["cell"], cell,
                      lambda ratio, step=step: np.log(ratio) / step)
        collapse = [r["collapse32_at_grok"] for r in runs if r["cell"] == cell and r["collapse32_at_grok"] is not None]
        if any(collapse) and run.get("dtype") in (None, "float32"):
            add(f"collapse.float32.{cell}", "share of training pairs in collapse in float32 at own T_grok, mean, least and most of members that grok",
                (np.mean(collapse), min(collapse), max(collapse)), len(collapse), int((~np.isfinite(grok(cell))).sum()))
    for row in cells:   # without a T_grok there is nothing at it
        if row["arm"] == "clamp" and row["n_censored"] == row["n"] and row.get("collapse32_max") and row["dtype"] in (None, "float32"):
            add(f"collapse.float32.{row['cell']}", "largest share of training pairs in collapse in float32 at a logged step, mean: no member grokked",
                (row["collapse32_max"], None, None), row["n"], row["n_censored"])
    for key, fit in fits.items():
        if isinstance(fit, dict) and "lack_of_fit_p" in fit:
            add(f"lack_of_fit.{key}", f"p-value: ln T_grok is a straight line in rho, against seed noise, {len(fit['rhos'])} doses",
                (fit["lack_of_fit_p"], None, None), fit["members"], 0)
    for cell in dict.fromkeys(row["cell"] for row in contracted):
        for key, text in (("ln_v_ratio", "ln(V_mem / V_grok)"), ("ln_v_peak_ratio", "ln(V_peak / V_grok)"),
                          ("rate_from_peak_over_two_lr_wd", "rate of ln ||W||^2 from its peak to T_grok over 2 lr wd")):
            values = [row[key] for row in contracted if row["cell"] == cell and row[key] is not None]
            ours = (np.median(values), min(values), max(values)) if values else (None, None, None)
            add(f"contraction.{key}.{cell}", f"{text}, median, least and most of the members that grok", ours, len(values),
                sum(r["cell"] == cell and r["censored"] for r in runs))
    return out
