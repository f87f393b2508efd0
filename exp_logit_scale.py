"""What the weight norm acts through: paper B (arXiv 2606.18465).

Claims (section or table of the paper)
  Table 2   raising the held norm to 1.15 W_c delays grokking 3.4x under cross-entropy; a temperature that brings the effective logit scale L
            back recovers 0.83 (p=59) and 0.89 (p=97) of the delay. Under MSE L hardly moves and the norm still delays, 1.9x and 1.7x
  Table 3   over 12 cells of norm and temperature L explains ln T_grok (R^2 0.97), the norm adds 0.01-0.02
  Table 1   ln T_grok is linear in the held norm, at five moduli; an exponential is preferred over a power law and a saddle node
  Table 8   the raised cells are not artefacts of float32: rho 1.15 groks alike in float64; rho 1.25 lies in softmax collapse
  appendix  at equal total norm the split between embedding and unembedding moves T_grok

REPLICATED: our 95% interval over members meets the published one (or value +- 3%). A run that does not grok within its budget is censored there and
counts as later; none is dropped. W_c: median, over the members that grok, of the norm at own T_grok in the free control of the same p, loss and
block. L: mean over all p*p pairs of the length of the logit vector over tau; of a cell the mean over members, at the logged step nearest the
median T_grok. Recovered: (T1 - T2) / (T1 - T0), T_grok at the baseline (T0), at the raised norm (T1), at the tau that gives the baseline's L (T2).

    python exp_logit_scale.py                     laptop preset: mediation under cross-entropy and MSE at p=59, 3 members, about 6 minutes
    python exp_logit_scale.py --preset paper      all tables; meant for a GPU
    python exp_logit_scale.py --parts audit --audit-cells 1.15 1.20 1.15:1.7 --members 0 1
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from common import Cell, Result, UsageError, cell_name, exactly, unique
from lab import console, delay, figures, mediation, own, settings, stats
from lab.answers import Statistic, Table, answer, at_doses, lacking, published
from lab.desk import Lab, main

PARTS = ("mediation", "mse", "grid", "dose", "audit", "allocation")
UP, TAUS = 1.15, (1.0, 1.15, 1.3, 1.5, 1.7)                       # Table 2
GRID_RHOS, GRID_TAUS = (1.00, 1.05, 1.10, 1.15), (1.0, 1.3, 1.7)  # Table 3
GRID = [*itertools.product(GRID_RHOS, GRID_TAUS)]
DOSE_RHOS = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25)   # Table 1 fits those up to 1.15, at p=43 from 0.90 on
COLLAPSE_FREE, JUMP = 1.15, 2.5       # Table 1 fits rho up to the first, and stops before the first jump of L by more than the second
CONFOUNDED, APART = 0.05, 1.3         # Table 8: a float32 cell is an artefact above this collapse rate, or this far from float64
EARLY = 600                           # step right after the clamp engages, where L is not yet an outcome
BUDGET = {"free": 60_000, "base": 40_000, "mediation": 120_000, "mse": 120_000, "grid": 120_000, "allocation": 50_000, "audit": 60_000}   # steps


@dataclass(frozen=True)
class Config(settings.Config):
    p: tuple[int, ...] = settings.option((59, 97), "moduli; of the audit the first one only; with --parts dose see --moduli")
    seeds: int = settings.option(12, "block size of all parts but dose and audit", parts=("mediation", "mse", "grid", "allocation"), fresh=True)
    parts: tuple[str, ...] = settings.option((), f"parts to run: {' '.join(PARTS)}")
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c of grid and dose; mediation and mse raise to the largest", float, PARTS[:4])
    taus: tuple[float, ...] = settings.option((), "temperatures at the raised norm, and of the grid; 1 is always among them", float, PARTS[:3])
    gammas: tuple[float, ...] = settings.option((-0.6, -0.3, 0.0, 0.3, 0.6), "power moved from embedding to unembedding", parts=("allocation",))
    weight_decays: tuple[float, ...] = settings.option((0.5, 1.0, 2.0, 3.0, 4.0), "weight decays of its free runs", parts=("dose",), fresh=True)
    lr: float = settings.option(1e-3, "learning rate; published numbers are answered at 1e-3 only")
    moduli: tuple[int, ...] = settings.option((43, 59, 67, 97, 113), "moduli of the dose part; --p replaces them", parts=("dose",))
    dose_seeds: int = settings.option(0, "block size of the dose part; 0 = the paper's, 16 at p=59 and 97, else 8", parts=("dose",), fresh=True)
    audit_cells: tuple[str, ...] = settings.option(("1.15", "1.20", "1.25"), "cells of the audit, each RHO or RHO:TAU", parts=("audit",))
    audit_dtypes: tuple[str, ...] = settings.option(("float32", "float64"), "precisions that the audit trains in", parts=("audit",))
    audit_seeds: int = settings.option(8, "block size of the audit", parts=("audit",), fresh=True)
    w_c: float = settings.option(0.0, "hold multiples of this norm and train no control; 0 = the control's", fresh=True)
    budget: int = settings.option(120_000, "step at which a run that has not grokked is censored; a part with a smaller one keeps it", fresh=True)

    def tables(self) -> list[tuple[str, int, str, int]]:
        """`(part, p, loss, block)` of every table that the command makes."""
        tables = [(part, p, "mse" if part == "mse" else self.loss, self.seeds) for p in self.p for part in ("mediation", "grid", "allocation", "mse")]
        tables += [("dose", p, self.loss, self.dose_seeds or (16 if p in (59, 97) else 8)) for p in self.moduli]
        tables += [("audit", self.p[0], self.loss, self.audit_seeds)]
        return [table for table in tables if table[0] in self.parts]

    def doses(self, part: str) -> list[dict]:
        """Conditions of the held cells of a part; of mediation the baseline, then the raised norm, at tau 1 first. Raises UsageError."""
        if part == "grid":
            return [{"rho": rho, "tau": tau} for rho in self.rhos or GRID_RHOS for tau in sorted({1.0, *(self.taus or GRID_TAUS)})]
        if part == "dose":
            return [{"rho": rho} for rho in sorted(self.rhos or DOSE_RHOS)]
        if part == "allocation":
            return [{"arm": "alloc", "rho": 1.0, "gamma": gamma} for gamma in sorted(self.gammas)]
        if part == "audit":
            doses = settings.doses("--audit-cells", self.audit_cells)
            return [{"rho": rho, "tau": tau, "dtype": dtype} for rho, tau in doses for dtype in self.audit_dtypes]
        return [{"rho": 1.0}, *({"rho": max(self.rhos, default=UP), "tau": tau} for tau in (1.0, *sorted({*(self.taus or TAUS)} - {1.0})))]


PRESETS = {
    "smoke": {"parts": ("mediation", "mse"), "p": (59,), "lr": 8e-3, "rhos": (1.05,), "taus": (1.3, 1.7), "members": (0, 1)},
    "laptop": {"parts": ("mediation", "mse"), "p": (59,), "members": (0, 1, 2)},
    "paper": {"parts": PARTS, "networks": ("published", "fresh")},
}
PUBLISHED = [row for row in published("B.").values() if row["experiment"] in ("mediation", "collapse", "dose", "audit", "alloc")]
RELEASED = {"mediation": "mediation", "mse": "mediation", "grid": "collapse", "dose": "dose", "audit": "audit", "allocation": "alloc"}


def checked(config: Config, given: dict) -> Config:
    """`--p` narrows every part. Raises UsageError for values that do not fit each other."""
    if "p" in given:
        config = dataclasses.replace(config, moduli=given.get("moduli", config.p))
    if "allocation" in config.parts and config.model != "mlp":
        raise UsageError(f"--parts allocation splits the norm between E and W2 of the MLP; leave it out with --model {config.model}")
    if ("w_c" in given and config.w_c <= 0) or (config.w_c and (len(config.p) > 1 or not set(config.parts) <= {"mediation", "grid", "audit"})):
        raise UsageError("--w-c is one positive norm: it goes with one --p and with --parts mediation, grid and audit")
    config.doses("audit")
    settings.check_members(config, {part: min(block for of, _, _, block in config.tables() if of == part) for part in config.parts})
    return config


# ---------------------------------------------------------------- cells

def cell(config: Config, p: int, loss: str, block: int, budget: int, arm: str = "clamp", rho: float | None = None, tau: float = 1.0,
         gamma: float | None = None, weight_decay: float = 1.0, dtype: str = "", w_c: float | None = None, shares: tuple[float, ...] = ()) -> Cell:
    """One cell, named after its conditions. `shares` of E, W1 and W2 in the squared norm of the control, for an allocation."""
    dose = [("rho", ".2f", rho, None), ("tau", ".2f", tau, None)] if arm == "clamp" else []
    name = cell_name((arm, f"p{p}", f"b{block}", loss), *dose, ("gamma", "+.2f", gamma, None), ("wd", "g", weight_decay, 1), ("", "", dtype, ""))
    T, alpha, power = (3700, 8, -2) if loss == "ce" else (1175, 4.3, -0.7)   # by the paper's tables: for the estimate of time, never for a result
    steps = T * (59 / p) ** (1.5 if p >= 59 else 3) * math.exp(alpha * (min(rho or 1.04, 3) - 1)) * max(tau, 0.05) ** power
    steps = max(int(steps * (1e-3 / max(config.lr, 1e-9)) ** 0.4 / max(weight_decay, 0.3) ** 0.7), 1000)
    members, fields = config.members or tuple(range(block)), config.network() | {"loss": loss}
    return Cell(name, p=p, members=members, block=block, budget_steps=min(config.budget, budget), arm=arm, rho=rho,
                tau=tau, gamma=gamma, w_c=w_c, held=(allocated(w_c, gamma, shares),) * len(members) if shares else (), expected_steps=steps,
                dtype=dtype, model=config.model, seed0=config.seed0, lr=config.lr, weight_decay=weight_decay, after_grok=config.after_grok, **fields)


def held(config: Config, w_c: dict[str, float], shares: dict[str, tuple[float, ...]]) -> list[Cell]:
    """Cells relative to the W_c of their control, by its name; none where it has none (`run` says so). With the doses, free runs at other decays."""
    cells = []
    for part, *network in config.tables():
        if part == "dose":
            cells += [cell(config, *network, BUDGET["free"], "free", weight_decay=decay) for decay in config.weight_decays if decay != 1]
        control = cell(config, *network, BUDGET["free"], "free").name
        if control in w_c:
            for i, dose in enumerate(config.doses(part)):
                budget = 15_000 * 1.9 ** min((dose["rho"] - 1) / 0.05, 10)   # of the doses: as released, capped as in the paper
                budget = BUDGET.get("base" if part in ("mediation", "mse") and i == 0 else part, int(min(budget, 60_000)))
                cells.append(cell(config, *network, budget, **dose, w_c=w_c[control], shares=shares[control] if part == "allocation" else ()))
    return unique(cells)


def allocated(w_c: float, gamma: float, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Held norms, total and of E, W1, W2: W1 keeps its share of W_c; of the squared norm left W2 gets `theta0 (1 + gamma)`, clipped (appendix)."""
    E, W1, W2 = shares
    theta = min(max(W2 / (E + W2) * (1 + gamma), 0.02), 0.98)
    return (0.0, *(w_c * math.sqrt(share) for share in ((1 - theta) * (1 - W1), W1, theta * (1 - W1))))


def own_rows(config: Config, given: dict) -> list[dict]:
    """Conditions of the paper's own networks: those of its cells that the flags leave, and the controls that allocations take their shares from."""
    asked = Config(**{**given, "parts": config.parts, "moduli": given.get("moduli", given.get("p", Config.moduli))})
    rows = []
    for part, p, loss, _ in asked.tables():
        network = {"model": asked.model, "p": p, "loss": loss, "lr": asked.lr}
        mine = own.under(PUBLISHED, experiment=RELEASED[part], **network)
        if part == "dose":          # published as fits over all doses; above rho 1.15 the runs are long, and outside the fit
            mine += [{**row, "arm": "clamp", "rho": rho} for row in own.under(mine, statistic="alpha_norm")
                     for rho in DOSE_RHOS[p == 43:] if rho <= COLLAPSE_FREE or "rhos" in given]
        if part == "allocation":
            mine += own.under(PUBLISHED, experiment="mediation", arm="free", **network)
        doses = [{"arm": "clamp", **dose} for dose in asked.doses(part)]
        for row in mine:
            stated = {**row, "tau": row["tau"] or 1.0}
            if row["arm"] == "free" or any(own.under([stated], **dose) for dose in doses):
                rows.append(row)
    return rows


def own_cells(rows: list[dict], members: tuple[int, ...]) -> tuple[list[Cell], list[Cell]]:
    """The controls of allocations, of which every member is needed, and all other cells but the allocations."""
    of_split = {row["p"] for row in rows if row["arm"] == "alloc"}
    controls = own.cells(row for row in own.under(rows, experiment="mediation", arm="free") if row["p"] in of_split)
    known = {control.name for control in controls}
    others = [c for c in own.cells((row for row in rows if row["arm"] != "alloc"), members) if c.name not in known]
    guess = lambda c: cell(Config(), c.p, c.loss, c.block, c.budget_steps, c.arm, c.rho).expected_steps  # noqa: E731
    return tuple([dataclasses.replace(c, expected_steps=c.expected_steps or guess(c)) for c in some] for some in (controls, others))


def own_allocations(rows: list[dict], members: tuple[int, ...], shares: dict[int, tuple[float, ...]]) -> list[Cell]:
    """Paper B's allocations. `shares`: by p, of the groups in the squared norm at the last logged step of its control."""
    return [own.cell(row, members, allocated(1.0, row["gamma"], shares[row["p"]])[1:]) for row in own.under(rows, arm="alloc", statistic="T_grok")]


# ---------------------------------------------------------------- what is measured

def ran(table: Table, config: Config) -> Iterator[tuple[str, int, list[str]]]:
    """`(part, p, cells)` of every table of the command that has all its cells; of dose, audit and allocation, and of the paper's own networks,
    those that ran, of a mediation at least the baseline and the raised norm."""
    theirs = table.networks == "published"
    config = Config(parts=config.parts, dtype=config.dtype) if theirs else config
    for part, p, loss, block in config.tables():
        row = dict(id="B.", arm="clamp", model=config.model, p=p, loss=loss, block=block, lr=config.lr, wd=1.0, dtype=config.dtype)
        cells = [table.match({**row, **dose}) for dose in config.doses(part)]
        some_will_do = part in ("dose", "audit", "allocation") or (theirs and part == "grid")
        needed = cells[:2] if theirs else cells
        if any(cells) and (some_will_do or None not in needed):
            yield part, p, [name for name in cells if name]


def explained(table: Table, cells: list[str], by: str, score: int = 0) -> Statistic:
    """R^2 (with `score` 1 the corrected AIC) of ln T_grok over `cells` on "L", "L600" (the same at step 600), "rho", "ln_tau" or a sum of them."""
    def column(what: str, picks: np.ndarray) -> np.ndarray:
        if what in ("rho", "ln_tau"):
            return np.array([table.first[name]["rho"] if what == "rho" else math.log(table.first[name]["tau"]) for name in cells])
        return np.stack([table.at(name, step=EARLY if what == f"L{EARLY}" else None)(picks) for name in cells], 1)
    return lambda picks: stats.least_squares(table.log_T(cells)(picks), *(column(what, picks) for what in by.split("+")))[score]


def collapse_free(table: Table, cells: list[str]) -> list[str]:
    """Of cells by norm those that Table 1 fits: a majority grokked, rho <= 1.15, before the first jump of L."""
    fitted, before = [], math.nan
    for point in map(table.point, cells):
        if point["rho"] > COLLAPSE_FREE or point["logit_scale"] > JUMP * before:
            break
        if np.isfinite(point["T"]).mean() > 0.5:
            fitted.append(point["cell"])
            before = point["logit_scale"]
    return fitted


def table1(statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], least: int) -> Callable[[Table, dict], tuple | None]:
    def found(table: Table, row: dict) -> tuple | None:
        cells = collapse_free(table, [name for rho in DOSE_RHOS if (name := table.match({**row, "arm": "clamp", "rho": rho}))])
        theirs = [rho for rho in DOSE_RHOS if (0.90 if row["p"] == 43 else 0.85) <= rho <= COLLAPSE_FREE]
        missing = lacking((table.first[name]["rho"] for name in cells), theirs) if len(cells) >= least else ""
        return (cells, table.over("held_norm", cells, statistic), missing) if len(cells) >= least else None
    return found


STATISTICS = {
    "ratio": at_doses([(UP, 1.0), (1.0, 1.0)], lambda table, cells: table.ratio(*cells)),
    "recovery": at_doses([(1.0, 1.0), *((UP, tau) for tau in TAUS)], Table.recovery),
    "r2_logit": at_doses(GRID, explained, by="L"), "r2_rho": at_doses(GRID, explained, by="rho"), "r2_both": at_doses(GRID, explained, by="L+rho"),
    "dr2": at_doses(GRID, lambda *cells: lambda picks: explained(*cells, "L+rho")(picks) - explained(*cells, "L")(picks)),
    "alpha_norm": table1(stats.slope, 2), "r2_norm": table1(stats.r2, 2), "daic": table1(stats.favours("power", "saddle_node"), 4),
}


def measure(table: Table, config: Config, read: dict[str, list[dict]]) -> None:
    answer(table, PUBLISHED, STATISTICS)
    if table.networks == "published":
        return delay.tell(table, published("B."), STATISTICS, {f"B.recovery.p{p}": f"p={p}, ce: share of the delay recovered" for p in (59, 97)})
    for part, p, cells in ran(table, config):
        MEASURED[part](table, p, cells)


def recovered(table: Table, p: int, cells: list[str]) -> None:
    """Table 2: norm up, temperature back, what part of the delay the logit scale recovers."""
    loss = table.first[cells[0]]["loss"]
    mediation.findings(table, cells, EARLY if loss == "ce" else 0, (f"B.med.{loss}.p{p}.ratio", f"B.recovery.p{p}" if loss == "ce" else ""))


def grid(table: Table, p: int, cells: list[str]) -> None:
    """Table 3: what explains ln T_grok over the grid of norm and temperature."""
    for by in ("L", "rho", "L+rho", f"L{EARLY}", f"L{EARLY}+rho", "rho+ln_tau"):
        text = f"ln T_grok on {by.replace('+', ' and ')}"
        table.finding(f"r2.{by}.p{p}", f"R^2 of {text}, {len(cells)} cells", cells, explained(table, cells, by), paper=f"B.collapse.r2_logit.p{p}",
                      law=f"p={p}, {len(cells)} cells: R^2 of {text}" if by == "L" else "")
        table.finding(f"aicc.{by}.p{p}", f"AICc of {text}", cells, explained(table, cells, by, score=1))


def dose(table: Table, p: int, cells: list[str]) -> None:
    """Table 1: ln T_grok over the held norm, the forms by AIC, lack of fit, local slopes; how high a norm weight decay alone leaves."""
    fitted, W = collapse_free(table, cells), {name: table.first[name]["held_norm"] for name in cells}
    w_c, block = table.first[cells[0]]["w_c"], table.first[cells[0]]["block"]
    if len(fitted) >= 2:
        slope, text = table.over("held_norm", fitted, stats.slope), "slope of ln T_grok on the held norm"
        table.finding(f"alpha.p{p}", text, fitted, slope, law=f"p={p}, {len(fitted)} cells: {text}", paper=f"B.dose.alpha.p{p}")
        table.finding(f"alpha_wc.p{p}", f"{text} times W_c", fitted, lambda picks: slope(picks) * w_c)
    if len(fitted) >= 4:
        for form, text in (("power", "the power law, offset between 0 and the least norm"), ("saddle_node", "the saddle node"),
                           ("power_above", "a power law that diverges at an offset above the norms, which the paper does not try")):
            table.finding(f"daic.{form}.p{p}", f"AIC of {text}, minus that of the exponential", fitted,
                          table.over("held_norm", fitted, stats.favours(form)))
        times = np.array([table.grok[name] for name in fitted])
        if np.isfinite(times).all() and times.shape[1] >= 2:
            table.finding(f"lack_of_fit.p{p}", "p-value: ln T_grok is a straight line in the held norm, against seed noise", fitted,
                          stats.lack_of_fit(np.array([W[name] for name in fitted]), np.log(times)))
    for low, high in itertools.pairwise(fitted):
        table.finding(f"local_slope.{high}", f"slope of ln T_grok between {low} and this cell", (low, high),
                      lambda picks, low=low, high=high: np.log(table.ratio(high, low)(picks)) / (W[high] - W[low]))
    norms = {name: table.values((name,), "norm_at_grok") for name in table.pick(arm="free", p=p, loss="ce", block=block)}
    free = {name: float(np.nanmax(own)) for name, own in norms.items() if np.isfinite(own).any()}
    for name, norm in free.items():
        table.finding(f"free_norm.p{p}.wd{exactly(float(table.first[name]['weight_decay']), 'g')}",
                      "largest norm at own T_grok of a free run, over W_c", (name,), norm / w_c)
    if free:
        table.finding(f"frontier.p{p}", "largest norm at own T_grok of any free run, over the highest held norm", free,
                      max(free.values()) / W[cells[-1]])


def audit(table: Table, p: int, cells: list[str]) -> None:
    """Table 8: the same held norm trained in float32 and in float64; is the float32 cell one of softmax collapse?"""
    for (rho, tau), group in itertools.groupby(cells, key=lambda name: (table.first[name]["rho"], table.first[name]["tau"])):
        pair = sorted(group, key=lambda name: table.first[name]["dtype"])
        where = f"p{p}.rho{exactly(float(rho), '.2f')}.tau{exactly(float(tau), '.2f')}"
        for name in pair:
            dtype = table.first[name]["dtype"]
            table.finding(f"collapse.{dtype}.{where}", f"share of training pairs in collapse in working precision, trained in {dtype}", (name,),
                          table.at(name, dtype.replace("float", "collapse")))
        if len(pair) == 2:
            table.finding(f"float32_over_float64.{where}", "median T_grok, float32 over float64, same members", pair, table.ratio(*pair),
                          law=f"p={p}, rho {rho:g}, tau {tau:g}: T_grok in float32 over float64")
            times = [float(table.median(table.grok[name])) for name in pair]
            apart = max(times) / min(times) if math.isfinite(min(times)) else math.nan      # infinite: only one of them groks
            table.finding(f"float32_confounded.{where}", "1 if the collapse rate is 0.05 or more, or the medians differ by more than 1.3", pair,
                          float(table.point(pair[0])["collapse32"] >= CONFOUNDED or apart > APART))


def allocation(table: Table, p: int, cells: list[str]) -> None:
    """Appendix: T_grok and logit scale over the split of the squared norm at fixed total."""
    if len(cells) >= 2:
        for key, of, what in (("allocation_T", table.T, "median T_grok"), ("allocation_L", table.at, "logit scale")):
            def spread(picks: np.ndarray, of: Callable[[str], Statistic] = of) -> np.ndarray:
                values = np.stack([of(name)(picks) for name in cells])
                return values.max(0) / values.min(0)
            text = f"largest over smallest {what} over the allocations"
            table.finding(f"{key}.p{p}", text, cells, spread, law=f"p={p}, one norm: {text}")


# ---------------------------------------------------------------- figures

def draw(table: Table, config: Config, folder: Path, trajectories: list[dict], read: dict[str, list[dict]]) -> None:
    points, tables = figures.points(table, PUBLISHED), {}
    for part, p, cells in ran(table, config):
        if part in ("mediation", "mse"):
            tables.setdefault(p, []).append([points[name] for name in cells])
        else:
            name, panels, panel = FIGURES[part]
            figures.sheet(folder, name.format(p=p), panels, panel, table=table, points=[points[name] for name in cells])
    for p, panels in tables.items():
        figures.mediation(folder, f"mediation_p{p}", f"memorisation_p{p}", panels)


def over_held_norm(axis: Axes, what: str, table: Table, points: list[dict]) -> None:
    """T_grok over the held norm with the exponential fit, ours and published, and the free runs; or the collapse rate."""
    axis.set(xlabel="held norm ||W|| (free runs: norm at T_grok)", title=f"Dose, p={points[0]['p']}")
    if what == "collapse":
        figures.values(axis, points, "held_norm", "collapse32", "", "o-", "C3", "float32: share of training pairs in softmax collapse")
        axis.axhline(CONFOUNDED, color="gray", ls=":", lw=1, label="confounded from here")
        return
    figures.members(axis, points, "held_norm")
    if len(fitted := collapse_free(table, [point["cell"] for point in points])) >= 2:
        W, T = (np.array([point[key] for point in points if point["cell"] in fitted]) for key in ("held_norm", "median"))
        slope, intercept, r2 = map(float, stats.line(W, np.log(T)))
        axis.plot(W, np.exp(intercept + slope * W), color="C0", lw=1, label=f"ours: slope {slope:.3f}, R2 {r2:.3f}, {len(W)} cells")
        if claim := table.claims.get(f"B.dose.alpha.p{points[0]['p']}"):
            axis.plot(W, np.exp(intercept + slope * W.mean() + claim["published"] * (W - W.mean())), "--", color="black", lw=1,
                      label=f"published slope {claim['published']:g}")
    for i, name in enumerate(table.pick(arm="free", loss="ce", p=points[0]["p"], block=points[0]["block"])):
        axis.plot(table.values((name,), "norm_at_grok")[0], table.grok[name], figures.MARKERS[i % 8], mfc="none", color="C1", ms=5,
                  label=f"free, weight decay {table.first[name]['weight_decay']:g}")


MEASURED = {"mediation": recovered, "mse": recovered, "grid": grid, "dose": dose, "audit": audit, "allocation": allocation}
FIGURES = {"grid": ("collapse_p{p}", ["T_grok"], figures.over_logit_scale), "dose": ("dose_p{p}", ["T_grok", "collapse"], over_held_norm),
           "audit": ("audit", ["T_grok", "collapse"], functools.partial(figures.precisions, confounded=CONFOUNDED)),
           "allocation": ("allocation_p{p}", ["T_grok", "L"], figures.over_split)}


# ---------------------------------------------------------------- run

def publish(desk: Lab, result: Result | None) -> None:
    """Tables, figures and summary from the rows alone; `--figures-only` comes here with the rows of OUT/runs.csv."""
    part, p, *_ = desk.config.tables()[0]
    desk.publish(measure, draw, result, {"around_grok.csv": stats.around_grok},
                 main_figure=FIGURES.get(part, ("mediation_p{p}",))[0].format(p=p) + ".png")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, PARTS, argv)
    config = checked(config, given)
    desk = Lab("logit_scale", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: publish(desk, None))
    fresh = config if "fresh" in config.networks else dataclasses.replace(config, parts=())
    free, members = unique(cell(config, *network, BUDGET["free"], "free") for _, *network in fresh.tables()), given.get("members", ())
    rows = own_rows(config, given) if "published" in config.networks else []
    names, guess = [control.name for control in free], (0.15, 0.64, 0.21)                  # of the shares, for a dry run's list only
    free, w_c = ([], dict.fromkeys(names, config.w_c)) if config.w_c else (free, {})
    controls, theirs = own_cells(rows, members)
    listed = [*controls, *theirs, *own_allocations(rows, members, {row["p"]: guess for row in rows})]
    console.announce(config, own.some([*listed, *free, *held(fresh, dict.fromkeys(names, 1.0), dict.fromkeys(names, guess))]))
    if config.dry_run:
        return None
    desk.open()
    result = desk.train("published_control", controls)
    theirs += own_allocations(rows, members, own.shares_at_end(result))
    result += desk.train("published", theirs, deal=True) + (ours := desk.train("control", free))
    w_c = w_c or stats.critical_norms(ours.runs)
    console.say_norms(free, w_c)
    shares = stats.power_shares(ours.runs) if "allocation" in config.parts else {}
    result += desk.train("cells", held(fresh, w_c, shares), deal=True)
    publish(desk, result)
    return desk.finish()


if __name__ == "__main__":
    main(run)
