"""The weight norm sets the grokking timescale: paper A (arXiv 2606.13753), the MLP. Its transformers: exp_transformer.py.

Claims (section of the paper)
  sec 4  free networks grok at a critical norm W_c that varies by 1-2% over seeds and learning rates and grows as p^0.38
  sec 5  held at rho W_c, T_grok grows as exp(alpha rho), alpha = 7.64; the norm moves it about 19x, the learning rate about 2x
  sec 5  rescaling the norm once does nothing of the kind: max/min 1.2 against 7.3 for the sustained clamp
  sec 5  no weight decay of a free run gives what a clamp gives: the clamps lie off the frontier that decays trace; a low start is washed out
  sec 6  one exponent for all moduli, alpha = 7.49; above rho 1.25 the delay saturates
  abstract  without a clamp the delay has a logarithmic counterpart, ln(V_mem / V_grok)

A claim is REPLICATED if our 95% interval over fresh networks meets the published one or the value +- 3% (lab/stats.py). A run that does not
grok within its budget is censored there and counts as later; none is dropped.
W_c is the median, over the members that grok, of the norm at their own T_grok in the free control: same p, same block, first of --lrs.

    python exp_delay_law.py                    laptop preset: control and four doses at p=59, 3 members, minutes on 2 cores
    python exp_delay_law.py --preset paper     all tables of the paper, for a GPU; --dry-run says how long
    python exp_delay_law.py --parts dense --rhos 0.9 1.1 --members 0 1 2 --out results/mine
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import Cell, Result, UsageError, cell_name, unique
from lab import console, delay, figures, own, settings, stats
from lab.answers import Table, answer, lacking, published
from lab.desk import Lab, main
from lab.draws import LAYERS

PARTS = ("dense", "matrix", "moduli", "oneshot", "concentration", "frontier")


@dataclass(frozen=True)
class Config(settings.Config):
    model: str = settings.option("mlp", "", "fixed")
    seeds: int = settings.option(16, "block size of the other parts: members drawn from one generator; member 3 of 12 is not member 3 of 8",
                                 parts=("dense", "matrix", "oneshot", "frontier"), fresh=True)
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c; default: each part's own", float, ("dense", "matrix", "moduli", "oneshot"))
    lrs: tuple[float, ...] = settings.option((1e-3, 2e-3, 4e-3, 8e-3), "learning rates of the matrix; the first is everybody else's",
                                             all_of=("matrix",))
    train_fracs: tuple[float, ...] = settings.option((), "train fractions of the concentration part; default .30 .35 .40 .50 .65", float,
                                                     ("concentration",))
    weight_decays: tuple[float, ...] = settings.option((), "weight decays; default: concentration .3 1 3, frontier .3 1 2 3 5 8", float,
                                                     ("concentration", "frontier"))
    moduli: tuple[int, ...] = settings.option((31, 41, 53, 59, 71), "moduli of the moduli part; --p replaces them", parts=("moduli",))
    moduli_seeds: int = settings.option(12, "block size of the moduli part", parts=("moduli",), fresh=True)
    free_moduli: tuple[int, ...] = settings.option((29, 41, 59, 79, 97), "moduli of the concentration part; --p replaces them",
                                                   parts=("concentration",))
    free_seeds: int = settings.option(20, "block size of the concentration part", parts=("concentration",), fresh=True)
    train_frac: float = settings.option(0.40, "share of the pairs to train on; published numbers are answered at 0.4 only, but for W_c", fresh=True)
    budget: int = settings.option(200_000, "largest step at which a run that has not grokked is censored; cells with a smaller one keep it",
                                 fresh=True)


PRESETS = {
    "smoke": {"parts": ("dense",), "rhos": (0.85, 1.0), "lrs": (8e-3,), "members": (0, 1)},
    "laptop": {"parts": ("dense",), "rhos": (0.85, 0.95, 1.05, 1.15), "members": (0, 1, 2)},
    "paper": {"parts": PARTS, "networks": ("published", "fresh")},
}
RELEASED = {"dense": "denserho", "matrix": "efflr", "moduli": "pscan", "oneshot": "normint", "concentration": "grokfss",
            "frontier": ""}                                                       # the paper's runs; of the frontier it prints nothing
DENSE_RHOS = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25, 1.30)     # Figure 3
MATRIX_RHOS = (0.85, 1.00, 1.15, 1.30)                                        # Table 1
MODULI_RHOS = (0.85, 1.00, 1.15)                                              # section 6, and 1.30 at two moduli
ONESHOT_RHOS = (0.70, 0.85, 1.00, 1.15, 1.30)
DECAYS, BESIDE, LOW = (0.3, 1.0, 2.0, 3.0, 5.0, 8.0), (1.00, 1.15), 0.5       # of the frontier: decays, clamps, factor of a low start


def checked(config: Config, given: dict) -> Config:
    """`--p` narrows every part. Raises UsageError if a part has no member to train."""
    if {"p", "moduli"} <= set(given) and config.parts == ("moduli",):
        raise UsageError("--p and --moduli both name the moduli of --parts moduli; leave one out")
    if "p" in given:
        config = dataclasses.replace(config, moduli=given.get("moduli", config.p), free_moduli=given.get("free_moduli", config.p))
    if "dense" not in config.parts and "rhos" not in given:
        config = dataclasses.replace(config, rhos=())       # those of a preset are of its own part
    settings.check_members(config, {"moduli": config.moduli_seeds, "concentration": config.free_seeds})
    return config


# ---------------------------------------------------------------- cells

def expected(p: int, rho: float = 1.04, lr: float = 1e-3) -> int:
    """Steps to grok by the papers' own law: for budgets and for the estimate of time, never for a result."""
    return int(4050 * (59 / p) ** 2.3 * math.exp(7.5 * (min(rho, 1.25) - 1)) * (1e-3 / lr) ** 0.4)


def dense_budget(rho: float) -> int:
    """Step at which a dose is censored: 8000 at rho 0.85, 66000 from 1.25 on."""
    return int(np.clip(8000 * math.exp(7.5 * (min(rho, 2) - 0.85)), 8000, 66_000)) // 1000 * 1000


def name(config: Config, arm: str, p: int, block: int, rho: float | None = None, lr: float | None = None, wd: float = 1.0,
         frac: float | None = None) -> str:
    return cell_name((arm, f"p{p}", f"b{block}"), ("rho", ".2f", rho, None), ("lr", "g", lr or config.lrs[0], config.lrs[0]), ("wd", "g", wd, 1),
                     ("frac", "g", frac or config.train_frac, config.train_frac))


def free(config: Config, p: int, block: int, lr: float | None = None, wd: float = 1.0, frac: float | None = None) -> Cell:
    lr, frac = lr or config.lrs[0], frac or config.train_frac
    to_95 = own.ON_TO_95 if block == config.free_seeds and (lr, wd, frac) == (config.lrs[0], 1.0, config.train_frac) else 0
    return Cell(name(config, "free", p, block, None, lr, wd, frac), p, config.members or range(block), block,
                budget_steps=min(config.budget, 60_000 if p >= 59 else 120_000), seed0=config.seed0, train_frac=frac, lr=lr,
                weight_decay=wd, expected_steps=int(1.3 * expected(p, 1, lr) / max(wd, 0.1)), after_grok=max(config.after_grok, to_95),
                **config.network())


def held(config: Config, p: int, block: int, rho: float, w_c: float, budget: int, lr: float | None = None, once: bool = False) -> Cell:
    """The total norm held at rho W_c from step 500 on, or set to it `once`, at that step."""
    lr, arm = lr or config.lrs[0], "rescale" if once else "clamp"
    cell = Cell(name(config, arm, p, block, rho, lr), p, config.members or range(block), block, budget_steps=min(config.budget, budget), arm=arm,
                seed0=config.seed0, train_frac=config.train_frac, rho=rho, lr=lr, w_c=w_c,
                expected_steps=expected(p, 1.0 if once else rho, lr), after_grok=config.after_grok, **config.network())
    return dataclasses.replace(cell, clamp_stop=max(cell.clamp_start, 1) + 1) if once else cell


def control_cells(config: Config) -> list[Cell]:
    """The free cells that give the W_c of held ones."""
    cells = []
    if {"dense", "matrix", "oneshot", "frontier"} & set(config.parts):
        cells += [free(config, p, config.seeds) for p in config.p]
    if "moduli" in config.parts:
        cells += [free(config, p, config.moduli_seeds) for p in config.moduli]
    return unique(cells)


def other_free_cells(config: Config) -> list[Cell]:
    """The free cells that no other cell needs."""
    cells = []
    if "matrix" in config.parts:
        cells += [free(config, p, config.seeds, lr) for p in config.p for lr in config.lrs[1:]]
    if "concentration" in config.parts:
        block, p0 = config.free_seeds, config.p[0]
        cells += [free(config, p, block) for p in config.free_moduli]
        cells += [free(config, p0, block, frac=frac) for frac in config.train_fracs or (0.30, 0.35, 0.40, 0.50, 0.65)]
        cells += [free(config, p0, block, wd=wd, frac=0.50) for wd in config.weight_decays or (0.3, 1.0, 3.0)]
        cells += [free(config, p0, block, lr=lr, wd=3.0, frac=0.50) for lr in (3e-4, 1e-3, 3e-3)]
    plain = [free(config, p, config.seeds) for p in config.p]
    if "frontier" in config.parts:
        for cell in plain:
            cells += [free(config, cell.p, config.seeds, wd=wd) for wd in config.weight_decays or DECAYS]
            cells.append(dataclasses.replace(cell, name=f"{cell.name}_low", init_scale=LOW * cell.init_scale))
    if "oneshot" in config.parts:
        for group, factors in LAYERS.items():
            scale = tuple(0.8 if chosen else 1.0 for chosen in factors)
            cells += [dataclasses.replace(cell, name=cell.name.replace("free", f"rescale_{group}"), arm="rescale", group=group, scale_once=scale)
                      for cell in plain]
    controls = {cell.name for cell in control_cells(config)}
    return [cell for cell in unique(cells) if cell.name not in controls]


def held_cells(config: Config, w_c: dict[str, float]) -> list[Cell]:
    """Cells at rho W_c for every part; those whose control has no W_c are left out (said by `run`)."""
    cells, block = [], config.seeds
    for p in config.p:
        norm = w_c.get(name(config, "free", p, block))
        if norm is None:
            continue
        if "dense" in config.parts:
            cells += [held(config, p, block, rho, norm, dense_budget(rho)) for rho in config.rhos or DENSE_RHOS]
        if "frontier" in config.parts:
            cells += [held(config, p, block, rho, norm, dense_budget(rho)) for rho in BESIDE]
        if "matrix" in config.parts:
            cells += [held(config, p, block, rho, norm, 30_000 if rho < 1.30 else 160_000, lr)
                      for rho in config.rhos or MATRIX_RHOS for lr in config.lrs]
        if "oneshot" in config.parts:
            cells += [held(config, p, block, rho, norm, 15_000, once=True) for rho in config.rhos or ONESHOT_RHOS]
    if "moduli" in config.parts:
        for p in config.moduli:
            norm = w_c.get(name(config, "free", p, config.moduli_seeds))
            if norm is not None:
                rhos = config.rhos or ((*MODULI_RHOS, 1.30) if p in (41, 59) else MODULI_RHOS)
                cells += [held(config, p, config.moduli_seeds, rho, norm, 60_000 if rho <= 1.0 else 160_000) for rho in rhos]
    return unique(cells)


def own_cells(config: Config, given: dict) -> list[Cell]:
    """The paper's own networks: those of its cells that the flags leave."""
    cells = []
    for part in config.parts:
        rows = [row for row in published("A.").values() if row["experiment"] == RELEASED[part]]
        if part == "dense":                                  # the paper prints nothing of rho 1.30 but its share in A.saturation.p59
            rows.append({**published("A.dense.rho1.25")["A.dense.rho1.25"], "rho": 1.30, "statistic": "", "value": None})
        only = {column: given.get(flag, ()) for column, flag in (("rho", "rhos"), ("lr", "lrs"), ("wd", "weight_decays"),
                                                                 ("train_frac", "train_fracs"))}
        moduli = {"moduli": "moduli", "concentration": "free_moduli"}.get(part, "p")
        cells += own.cells(rows, given.get("members", ()), p=given.get(moduli, given.get("p", ())), **only)
    return cells


# ---------------------------------------------------------------- what is measured

FIT = {"dense": DENSE_RHOS[:-1], "moduli": MODULI_RHOS}       # doses of alpha: above 1.25 the delay saturates
FITTED = {**dict.fromkeys(("denserho", "denserho and pscan"), FIT["dense"]), **dict.fromkeys(("pscan", "efflr"), FIT["moduli"])}   # by set of runs
FITTED_MODULI = {"grokfss": (29, 41, 59, 79, 97), "pscan": (31, 41, 53, 59, 71)}               # of W_c ~ p^k, sections 4 and 6
SHARED = (41, 53, 59, 71)                                     # moduli of the shared exponent
PLAIN = {"lr": 1e-3, "train_frac": 0.40}                      # what a row leaves out that is about more than one cell


def of_shared_line(number: int, over: str = "rho") -> Callable[[Table, dict], tuple | None]:
    """One slope for four moduli, an intercept for each: 0 the slope, 1 the R^2 within moduli, 3 that of all of ln T_grok; and 2, the CV of the
    slopes of the moduli each by itself, percent."""
    def statistic(table: Table, row: dict) -> tuple | None:
        groups = [delay.within(table, table.like(row, **PLAIN, arm="clamp", p=p), MODULI_RHOS) for p in SHARED]
        if min(map(len, groups)) < 2:
            return None
        x = [np.array([table.first[cell][over] for cell in cells], dtype=float) for cells in groups]

        def fit(picks: np.ndarray) -> np.ndarray:
            y = [table.log_T(cells)(picks) for cells in groups]
            if number == 2:
                alphas = np.stack([stats.slope(*each) for each in zip(x, y, strict=True)])  # (moduli, B)
                return 100 * alphas.std(0) / alphas.mean(0)
            if number == 3:
                within = stats.shared_slope(x, y)[1]
                left = (1 - within) * sum(each.var(-1) * each.shape[-1] for each in y)
                return 1 - left / (np.concatenate(y, -1).var(-1) * sum(each.shape[-1] for each in y))
            return stats.shared_slope(x, y)[number]
        missing = [text for cells in groups if (text := delay.lacking_doses(table, cells, MODULI_RHOS))]
        return [cell for cells in groups for cell in cells], fit, missing[0] if missing else ""
    return statistic


def factor(over: dict, under: dict) -> Callable[[Table, dict], tuple | None]:
    """Median T_grok under one condition over that under another, p=59."""
    def statistic(table: Table, row: dict) -> tuple | None:
        cells = [cell for one in (over, under) for cell in table.like(row, arm="clamp", p=59, train_frac=0.40, **one)]
        return (cells, table.ratio(*cells), "") if len(cells) == 2 else None
    return statistic


def spread(table: Table, row: dict) -> tuple | None:
    """Largest over smallest median T_grok: of all cells rescaled once, or of the sustained clamp at rho 0.90 and 1.15."""
    once = row["id"] == "A.oneshot.spread"
    cells = table.like(row, **PLAIN, arm="rescale" if once else "clamp")
    rhos = [table.first[cell]["rho"] for cell in cells]
    if not once:
        cells = [cell for cell, rho in zip(cells, rhos, strict=True) if rho in (0.90, 1.15)]
    missing = lacking(rhos, ONESHOT_RHOS) if once and cells else ""
    return (cells, lambda picks: np.exp(np.ptp(table.log_T(cells)(picks), axis=-1)), missing) if len(cells) >= 2 else None


def concentration(table: Table, row: dict) -> tuple | None:
    """CV in percent of W_c, all members at all learning rates together, weight decay 3 and train fraction 0.50."""
    cells = table.like(row, arm="free", p=59, weight_decay=3, train_frac=0.50)
    return (cells, delay.cv(table, cells), "") if len(cells) >= 2 else None


def earliest(table: Table, row: dict) -> tuple | None:
    """First T_grok of all members."""
    cell = table.match(row, **PLAIN)
    return ((cell,), lambda picks: table.grok[cell][picks].min(-1), "") if cell else None


STATISTICS = {
    **delay.statistics(FITTED, 1.30, **PLAIN), "alpha_shared": of_shared_line(0), "r2_shared": of_shared_line(1), "alpha_cv": of_shared_line(2),
    "collapse_r2_absolute": of_shared_line(3, "held_norm"), "T_grok_min": earliest, "share_drift": delay.of_read("share_drift", p=59, **PLAIN),
    "peak_step": delay.of_read("peak_step", p=59, **PLAIN), "power_E": delay.power_of_p("norm_E_at_grok", FITTED_MODULI, **PLAIN),
    "norm_factor": factor({"rho": 1.30, "lr": 1e-3}, {"rho": 0.85, "lr": 1e-3}),
    "lr_factor": factor({"rho": 1.30, "lr": 1e-3}, {"rho": 1.30, "lr": 8e-3}),
    "spread": spread, "power_W": delay.power_of_p("norm_at_grok", FITTED_MODULI, **PLAIN), "cv_W": concentration,
}


def networks(table: Table, part: str) -> str:
    """Whose networks answer for a part: the column `networks` of their runs."""
    return RELEASED[part] if table.networks == "published" else "fresh"


def curves(table: Table, config: Config, arm: str = "clamp") -> dict[str, list[str]]:
    """Dose-response curves by part: cells of all moduli at the first learning rate."""
    parts = [("dense", config.p, config.seeds)]
    if "moduli" in config.parts:
        parts.append(("moduli", config.moduli, config.moduli_seeds))
    found = {}
    for part, moduli, block in parts:
        of = networks(table, "oneshot" if arm == "rescale" else part)
        cells = [cell for p in moduli for cell in table.pick(arm=arm, group="", p=p, block=block, lr=config.lrs[0], networks=of)]
        if cells:
            found[part] = cells
    return found


def measure(table: Table, config: Config, read: dict[str, list[dict]]) -> None:
    """Fills `table`: published numbers that these runs answer, and what they say beyond."""
    at_paper_rate = config.lrs[0] == PLAIN["lr"]            # else W_c, and with it every rho, is that of another learning rate
    rows = {key: row for key, row in published("A.").items() if at_paper_rate or row["arm"] == "free"}
    for name, column in (("contraction.csv", "peak_step"), ("shares.csv", "share_drift")):
        there = {(row["cell"], row["member"]): row[column] for row in read.get(name, [])}
        for run in table.runs:
            run[column] = there.get((run["cell"], run["member"]))
    answer(table, rows.values(), STATISTICS)
    delay.tell(table, rows, STATISTICS, {
        "A.alpha.shared": "alpha shared by four moduli", "A.norm_factor": "T_grok at rho 1.30 over 0.85",
        "A.lr_factor": "T_grok at learning rate 1e-3 over 8e-3", "A.oneshot.spread": "max/min T_grok, one rescale",
        "A.wc.power": "k of W_c ~ p^k"})
    for part, cells in curves(table, config).items():
        for p in dict.fromkeys(table.first[cell]["p"] for cell in cells):
            mine = delay.within(table, [cell for cell in cells if table.first[cell]["p"] == p], FIT[part])
            if len(mine) < 2:
                continue
            slope = lambda picks, mine=mine: delay.line(table, mine)(picks)[0]  # noqa: E731
            n, censored, _ = table.count(tuple(mine))
            key = "A.alpha.dense" if part == "dense" and p == 59 else f"A.alpha.p{p}" if part == "moduli" else ""
            if key not in table.claims:
                table.finding(f"alpha.p{p}" if part == "dense" else f"alpha.moduli.p{p}", "alpha of T_grok ~ exp(alpha rho), rho "
                              + " ".join(f"{table.first[cell]['rho']:g}" for cell in mine), mine, slope)
            table.say(f"alpha at p={p}", stats.resampled(n, slope), n * len(mine), censored, key)
            times = np.log([table.grok[cell] for cell in mine])                             # (doses, members)
            if part == "dense" and len(mine) >= 4 and n >= 2 and np.isfinite(times).all():
                rhos = np.array([table.first[cell]["rho"] for cell in mine], dtype=float)
                table.finding(f"lack_of_fit.dense.p{p}", f"p-value: ln T_grok is a straight line in rho, against seed noise, {len(mine)} doses",
                              mine, stats.lack_of_fit(rhos, times))
    if table.networks == "fresh":
        for p in config.p:
            delay.frontier(table, p=p, block=config.seeds, lr=config.lrs[0], train_frac=0.40)
        delay.findings(table, read)


# ---------------------------------------------------------------- figures

def draw(table: Table, config: Config, folder: Path, trajectories: list[dict], read: dict[str, list[dict]]) -> None:
    rows = {part: published(prefix).values() for part, prefix in (("dense", "A.dense."), ("moduli", "A.pscan."), ("oneshot", "A.normint."))}
    for part, cells in curves(table, config).items():
        figures.dose(table, cells, delay.within(table, cells, FIT[part]), rows[part], "Delay law", folder, part)
    for cells in curves(table, config, "rescale").values():
        figures.dose(table, cells, (), rows["oneshot"], "One rescale at step 500", folder, "oneshot")
    if "matrix" in config.parts:
        for p in config.p:
            cells = table.pick(arm="clamp", p=p, block=config.seeds, networks=networks(table, "matrix"))
            draw_matrix(table, cells, folder, f"matrix_p{p}")
    figures.critical_norm(table, published("A.").values(), folder)
    figures.contraction(read["contraction.csv"], folder)
    if trajectories:
        figures.trajectories(trajectories, folder)


@figures.drawn
def draw_matrix(table: Table, cells: list[str], folder: Path, file: str) -> None:
    """T_grok against learning rate, a colour, marker and line style per held norm that was run at several; published medians as squares."""
    found, rates = figures.points(table, published("A.matrix.").values()), sorted({table.first[cell]["lr"] for cell in cells})
    by_rho: dict[float, list[dict]] = {}
    for cell in sorted(cells, key=lambda cell: table.first[cell]["lr"]):
        by_rho.setdefault(found[cell]["rho"], []).append({**found[cell], "rate": rates.index(found[cell]["lr"])})

    def over_rates(axis: plt.Axes, by_rho: dict[float, list[dict]]) -> None:
        for i, (rho, mine) in enumerate(by_rho.items()):
            figures.members(axis, mine, "rate", f"C{i}", figures.MARKERS[i % 8], label=f"rho {rho:g}", published=f"C{i}")
            grokked = [(point["rate"], point["median"]) for point in mine if math.isfinite(point["median"])]
            axis.plot([x for x, _ in grokked], [T for _, T in grokked], color=f"C{i}", ls=figures.LINES[i % 4], lw=1)
        axis.set(xlabel="learning rate", title="Norm against learning rate", xlim=(-0.3, len(rates) + 0.8))    # room for the legend
        axis.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    if by_rho := {rho: mine for rho, mine in by_rho.items() if len(mine) > 1}:
        figures.sheet(folder, file, [by_rho], over_rates)


# ---------------------------------------------------------------- run

def publish(desk: Lab, result: Result | None) -> None:
    """Tables, verdicts, figures; without `result` from the tables that are there."""
    main_figure = f"{'moduli' if desk.config.parts == ('moduli',) else 'oneshot' if desk.config.parts == ('oneshot',) else 'dense'}.png"
    desk.publish(measure, draw, result, {"contraction.csv": delay.contraction, "shares.csv": delay.shares}, main_figure=main_figure)


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, PARTS, argv)
    config = checked(config, given)
    desk = Lab("delay_law", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: publish(desk, None))
    theirs = own_cells(config, given) if "published" in config.networks else []
    controls, others = (control_cells(config), other_free_cells(config)) if "fresh" in config.networks else ([], [])
    guess = {cell.name: 54.8 * (cell.p / 59) ** 0.4 for cell in controls}   # for the dry run's list only; the real W_c comes from the control
    console.announce(config, own.some([*theirs, *controls, *others, *held_cells(config, guess)]))
    if config.dry_run:
        return None
    desk.open()
    result = desk.train("published", theirs, deal=True) + desk.train("control", controls)
    w_c = stats.critical_norms(result.runs)
    console.say_norms(controls, w_c)
    result += desk.train("cells", [*others, *held_cells(config, w_c)], deal=True)
    publish(desk, result)
    return desk.finish()


if __name__ == "__main__":
    main(run)
