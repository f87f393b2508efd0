"""What the weight norm acts through: paper B (arXiv 2606.18465).

Claims (section or table of the paper)
  Table 2   raising the held norm to 1.15 W_c delays grokking 3.4x under cross-entropy; a temperature that brings the effective logit scale L
            back recovers 0.83 (p=59) and 0.89 (p=97) of the delay. Under MSE L hardly moves and the norm still delays, 1.9x and 1.7x
  Table 3   over 12 cells of norm and temperature L explains ln T_grok (R^2 0.97), the norm adds 0.01-0.02
  Table 1   ln T_grok is linear in the held norm, at five moduli; an exponential is preferred over a power law and a saddle node
  Table 8   the raised cells are not artefacts of float32: rho 1.15 groks alike in float64; rho 1.25 lies in softmax collapse
  appendix  at equal total norm the split between embedding and unembedding moves T_grok

Verdicts: `stats.claim`. A run that does not grok within its budget is censored there and counts as later; none is dropped. W_c is the median,
over the members that grok, of the norm at their own T_grok in the free control of the same p, loss and block.
L of a cell: mean over members of the effective logit scale at the logged step nearest the cell's median T_grok, as the paper has it.

    python exp_logit_scale.py                     laptop preset: mediation under cross-entropy and MSE at p=59, 3 members, about 6 minutes
    python exp_logit_scale.py --preset paper      all tables; meant for a GPU
    python exp_logit_scale.py --model transformer_b --w-c 32.49      mediation as in the paper's transformer table, p=59
    python exp_logit_scale.py --parts audit --audit-cells 1.15 1.20 1.15:1.7 --members 0 1
"""
if __name__ == "__main__":
    import early
    early.guard()

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

import files
import lab
import logit_scale_claims as claims
import logit_scale_plots as plots
import progress
import settings
import stats
from common import EVAL_EVERY, Cell, Result, UsageError, clamp_start, exactly, unique
from measured import Measured, flag_unlearned

PARTS = ("mediation", "mse", "grid", "dose", "audit", "allocation")


@dataclass(frozen=True)
class Config(settings.Config):
    p: tuple[int, ...] = settings.option((59, 97), "moduli; of the audit the first one only; with --parts dose see --moduli")
    seeds: int = settings.option(12, "block size of mediation, mse, grid and allocation", parts=("mediation", "mse", "grid", "allocation"))
    parts: tuple[str, ...] = settings.option((), f"parts to run: {' '.join(PARTS)}")
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c of grid and dose; mediation and mse raise to the largest", float,
                                              ("mediation", "mse", "grid", "dose"))
    taus: tuple[float, ...] = settings.option((), "temperatures at the raised norm, and of the grid; 1 is always among them", float,
                                              ("mediation", "mse", "grid"))
    gammas: tuple[float, ...] = settings.option((-0.6, -0.3, 0.0, 0.3, 0.6), "allocations: power moved from the embedding to the unembedding",
                                       parts=("allocation",))
    weight_decays: tuple[float, ...] = settings.option((0.5, 1.0, 2.0, 3.0, 4.0), "weight decays of the free runs of the dose part", parts=("dose",))
    lr: float = settings.option(1e-3, "learning rate; published numbers are answered at 1e-3 only")
    moduli: tuple[int, ...] = settings.option((43, 59, 67, 97, 113), "moduli of the dose part; --p replaces them", parts=("dose",))
    dose_seeds: int = settings.option(0, "block size of the dose part; 0 = the paper's, 16 at p=59 and 97, else 8", parts=("dose",))
    audit_cells: tuple[str, ...] = settings.option(("1.15", "1.20", "1.25"), "cells of the audit, each RHO or RHO:TAU", parts=("audit",))
    audit_dtypes: tuple[str, ...] = settings.option(("float32", "float64"), "precisions that the audit trains in", parts=("audit",))
    audit_seeds: int = settings.option(8, "block size of the audit", parts=("audit",))
    w_c: float = settings.option(0.0, "hold multiples of this norm and train no control (paper B's transformers: 32.49, from the end "
                                 "of theirs); 0 = the control's")
    budget: int = settings.option(120_000, "largest step at which a run that has not grokked is censored; parts with a smaller one keep it")

    def offered(self) -> tuple[str, ...]:
        return PARTS if self.model == "mlp" else tuple(part for part in PARTS if part != "allocation")


PRESETS = {
    "smoke": {"parts": ("mediation", "mse"), "p": (59,), "lr": 8e-3, "rhos": (1.05,), "taus": (1.3, 1.7), "members": (0, 1)},
    "laptop": {"parts": ("mediation", "mse"), "p": (59,), "members": (0, 1, 2)},
    "paper": {"parts": PARTS},
}
UP, TAUS = 1.15, (1.0, 1.15, 1.3, 1.5, 1.7)                       # Table 2
GRID_RHOS, GRID_TAUS = (1.00, 1.05, 1.10, 1.15), (1.0, 1.3, 1.7)  # Table 3
DOSE_RHOS = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25)   # Table 1 fits those up to 1.15
BUDGET = {"free": 60_000, "base": 40_000, "up": 120_000, "grid": 120_000, "alloc": 50_000, "audit": 60_000}   # steps


# ---------------------------------------------------------------- cells

def expected(p: int, rho: float, tau: float, lr: float, loss: str) -> int:
    """Steps to grok by the paper's tables: for the estimate of time, never for a result."""
    rho, tau, lr = min(rho, 3), max(tau, 0.05), max(lr, 1e-9)   # far from any grid the law says nothing
    at_p = (59 / p) ** (1.5 if p >= 59 else 3)
    if loss == "mse":
        return int(1175 * at_p**0.5 * math.exp(4.3 * (rho - 1)) * tau**-0.7 * (1e-3 / lr) ** 0.4)
    return max(int(3700 * at_p * math.exp(8 * (rho - 1)) * tau**-2 * (1e-3 / lr) ** 0.4), 1000)


def audited(config: Config) -> list[tuple[float, float]]:
    """`(rho, tau)` of each of --audit-cells. Raises UsageError."""
    cells = []
    for text in config.audit_cells:
        try:
            rho, tau = (float(x) for x in (text if ":" in text else text + ":1").split(":"))
        except ValueError:
            raise UsageError(f"--audit-cells are RHO or RHO:TAU, such as 1.15 or 1.15:1.7, got {text!r}") from None
        if not all(settings.SMALLEST[key] <= value <= settings.LARGEST[key] for key, value in (("rhos", rho), ("taus", tau))):
            raise UsageError(f"--audit-cells: rho must be in [{settings.SMALLEST['rhos']:g}, {settings.LARGEST['rhos']:g}] and tau in "
                             f"[{settings.SMALLEST['taus']:g}, {settings.LARGEST['taus']:g}], "
                             f"got {text!r}")
        cells.append((rho, tau))
    if len(set(cells)) < len(cells):
        raise UsageError(f"--audit-cells lists a cell twice: {' '.join(config.audit_cells)}")
    return cells


def checked(config: Config, given: dict) -> Config:
    """`--p` narrows every part. Raises UsageError for values that do not fit each other."""
    if "p" in given:
        config = dataclasses.replace(config, moduli=given.get("moduli", config.p))
    if config.model != "mlp":
        config = dataclasses.replace(config, **{k: v for k, v in (("p", (59,)), ("parts", ("mediation",))) if k not in given})
        if "allocation" in config.parts:
            raise UsageError(f"--parts allocation splits the norm between E and W2 of the MLP; leave it out with --model {config.model}")
    if ("w_c" in given and config.w_c <= 0) or (config.w_c and (len(config.p) > 1 or not set(config.parts) <= {"mediation", "grid", "audit"})):
        raise UsageError("--w-c is one positive norm: it goes with one --p and with --parts mediation, grid and audit")
    audited(config)
    if not config.audit_dtypes or set(config.audit_dtypes) - {"float32", "float64"}:
        raise UsageError(f"--audit-dtypes are float32 and float64, got {' '.join(config.audit_dtypes)}")
    if not 0 <= config.dose_seeds <= 10_000:
        raise UsageError(f"--dose-seeds must be between 1 and 10000, or 0 for the paper's, got {config.dose_seeds}")
    if config.budget < EVAL_EVERY:
        raise UsageError(f"--budget must be at least {EVAL_EVERY} steps, where runs are first evaluated; got {config.budget}")
    for gamma in config.gammas:
        if abs(gamma) > 100:
            raise UsageError(f"--gammas must lie between -100 and 100, got {gamma:g}; beyond -1 and 1 the split no longer changes")
    settings.check_members(config, {"dose": min(Plan(config).dose_block(p) for p in config.moduli), "audit": config.audit_seeds})
    return config


def name(arm: str, p: int, block: int, loss: str, rho: float | None = None, tau: float = 1.0, gamma: float | None = None,
         wd: float = 1.0, dtype: str = "") -> str:
    parts = [arm, f"p{p}", f"b{block}", loss]
    parts += [f"rho{exactly(rho, '.2f')}", f"tau{exactly(tau, '.2f')}"] if rho is not None else []
    parts += [f"gamma{exactly(gamma, '+.2f')}"] if gamma is not None else []
    parts += [f"wd{exactly(wd, 'g')}"] if wd != 1 else []
    return "_".join([*parts, dtype] if dtype else parts)


class Plan:
    """The cells of a command, part by part, and whether they are the paper's."""
    name = staticmethod(name)

    def __init__(self, config: Config):
        self.config, self.audited, self.dose_rhos = config, audited(config), sorted(config.rhos or DOSE_RHOS)
        self.up = max(config.rhos, default=UP)
        self.taus = tuple(sorted({1.0, *(config.taus or TAUS)}))
        self.grid = [(rho, tau) for rho in config.rhos or GRID_RHOS for tau in sorted({1.0, *(config.taus or GRID_TAUS)})]
        self.paper_up, self.paper_taus, self.paper_grid = self.up == UP, self.taus == TAUS, self.grid == [*itertools.product(GRID_RHOS, GRID_TAUS)]
        self.losses = [loss for loss, part in (("ce", "mediation"), ("mse", "mse")) if part in config.parts]

    def dose_block(self, p: int) -> int:
        return self.config.dose_seeds or (16 if p in (59, 97) else 8)

    def cell(self, arm: str, p: int, block: int, loss: str, budget: int, rho: float | None = None, tau: float = 1.0, gamma: float | None = None,
             wd: float = 1.0, dtype: str = "", w_c: float | None = None, held: tuple[float, float, float, float] | None = None) -> Cell:
        c = self.config
        members = c.members or tuple(range(block))
        if arm == "clamp":
            held = (rho * w_c, 0.0, 0.0, 0.0)
        steps = expected(p, rho if arm == "clamp" else 1.04, tau, c.lr, loss)
        return Cell(name(arm, p, block, loss, None if arm == "alloc" else rho, tau, gamma, wd, dtype if arm == "clamp" else ""), p=p,
                    members=members, block=block, budget_steps=min(c.budget, budget), arm=arm, loss=loss, model=c.model, seed0=c.seed0, rho=rho,
                    tau=tau, gamma=gamma, lr=c.lr, weight_decay=wd, clamp_start=clamp_start(c.model, loss), w_c=w_c, dtype=dtype,
                    held=(held,) * len(members) if held else (), expected_steps=int(steps / max(wd, 0.3) ** 0.7), after_grok=c.after_grok)

    def controls(self) -> list[Cell]:
        """The free runs that give the W_c of held ones: one for every p, loss and block."""
        c, cells = self.config, []
        if {"mediation", "grid", "allocation"} & set(c.parts):
            cells += [self.cell("free", p, c.seeds, "ce", BUDGET["free"]) for p in c.p]
        if "mse" in c.parts:
            cells += [self.cell("free", p, c.seeds, "mse", BUDGET["free"]) for p in c.p]
        if "dose" in c.parts:
            cells += [self.cell("free", p, self.dose_block(p), "ce", BUDGET["free"]) for p in c.moduli]
        if "audit" in c.parts:
            cells += [self.cell("free", c.p[0], c.audit_seeds, "ce", BUDGET["free"])]
        return unique(cells)

    def frontier(self) -> list[Cell]:
        """The free runs of the dose part at other weight decays."""
        c = self.config
        return [self.cell("free", p, self.dose_block(p), "ce", BUDGET["free"], wd=wd)
                for p in c.moduli for wd in c.weight_decays if wd != 1] if "dose" in c.parts else []

    def held(self, w_c: dict[str, float], shares: dict[str, tuple[float, float, float]]) -> list[Cell]:
        """Cells relative to the W_c of their control; those whose control has none are left out (said by `run`)."""
        c, cells = self.config, []
        for p in c.p:
            for loss in ("ce", "mse"):
                control = name("free", p, c.seeds, loss)
                if (wc := w_c.get(control)) is None:
                    continue
                if loss in self.losses:
                    cells += [self.cell("clamp", p, c.seeds, loss, BUDGET["base"], 1.0, w_c=wc)]
                    cells += [self.cell("clamp", p, c.seeds, loss, BUDGET["up"], self.up, tau, w_c=wc) for tau in self.taus]
                if loss == "ce" and "grid" in c.parts:
                    cells += [self.cell("clamp", p, c.seeds, loss, BUDGET["grid"], rho, tau, w_c=wc) for rho, tau in self.grid]
                if loss == "ce" and "allocation" in c.parts:
                    cells += [self.cell("alloc", p, c.seeds, loss, BUDGET["alloc"], 1.0, gamma=g, w_c=wc, held=allocated(wc, g, shares[control]))
                              for g in c.gammas]
        for p in c.moduli if "dose" in c.parts else ():
            block = self.dose_block(p)
            if (wc := w_c.get(name("free", p, block, "ce"))) is not None:
                cells += [self.cell("clamp", p, block, "ce", dose_budget(rho), rho, w_c=wc) for rho in self.dose_rhos]
        if "audit" in c.parts and (wc := w_c.get(name("free", c.p[0], c.audit_seeds, "ce"))) is not None:
            cells += [self.cell("clamp", c.p[0], c.audit_seeds, "ce", BUDGET["audit"], rho, tau, dtype=dtype, w_c=wc)
                      for rho, tau in self.audited for dtype in c.audit_dtypes]
        return unique(cells)


def dose_budget(rho: float) -> int:
    """15000 steps at rho 1, 1.9 times as many with every 0.05, at most 60000: the released runs' budgets, capped as in the paper."""
    return int(min(15_000 * 1.9 ** min((rho - 1) / 0.05, 10), 60_000))


def power_shares(runs: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Shares of E, W1, W2 in the squared norm, mean over the members that grok, each at its own T_grok, of every free cell."""
    shares: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["arm"] == "free" and not run["censored"]:
            shares.setdefault(run["cell"], []).append([(run[f"norm_{g}_at_grok"] / run["norm_at_grok"]) ** 2 for g in ("E", "W1", "W2")])
    return {cell: tuple(np.mean(values, 0).tolist()) for cell, values in shares.items()}


def allocated(w_c: float, gamma: float, shares: tuple[float, float, float]) -> tuple[float, float, float, float]:
    """Held group norms: W1 keeps its share of W_c; of the squared norm left, W2 gets `theta0 (1 + gamma)`, clipped (paper B, allocation)."""
    E, W1, W2 = shares
    theta = min(max(W2 / (E + W2) * (1 + gamma), 0.02), 0.98)
    left = 1 - W1
    return (0.0, *(w_c * math.sqrt(share) for share in ((1 - theta) * left, W1, theta * left)))


# ---------------------------------------------------------------- figures and files

def draw(m: Measured, config: Config, desk: lab.Lab) -> None:
    plan, folder, points = Plan(config), desk.out / "figures", {cell: m.point(cell) for cell in m.first}
    for p in config.p:
        panels = {}
        for loss in plan.losses:
            cells = (name("clamp", p, config.seeds, loss, 1.0), *claims.ups(plan, p, loss))
            if m.have(*cells):
                panels[loss] = [points[cell] for cell in cells]
        if panels:
            plots.mediation(panels, m.known, folder, f"mediation_p{p}")
            plots.memorisation(panels, m.known, folder, f"memorisation_p{p}")
        grid = [points[c] for rho, tau in plan.grid if m.have(c := name("clamp", p, config.seeds, "ce", rho, tau))] if "grid" in config.parts else []
        if grid:
            plots.collapse(grid, m.known, folder, f"collapse_p{p}")
        split = [points[c] for gamma in sorted(config.gammas) if m.have(c := name("alloc", p, config.seeds, "ce", gamma=gamma))]
        if split:
            plots.allocation(split, m.known, folder, f"allocation_p{p}")
    for p in config.moduli if "dose" in config.parts else ():
        everyone, fitted = claims.dose_cells(m, plan, p)
        if everyone:
            free = [r for r in m.runs if r["arm"] == "free" and (r["p"], r["block"]) == (p, plan.dose_block(p))]
            plots.dose([points[c] for c in everyone], [points[c] for c in fitted], free, m.known, folder, f"dose_p{p}")
    if "audit" in config.parts:
        pairs = [[points[c] for dtype in ("float32", "float64")
                  if m.have(c := name("clamp", config.p[0], config.audit_seeds, "ce", rho, tau, dtype=dtype))] for rho, tau in plan.audited]
        if any(pairs):
            plots.audit([pair for pair in pairs if pair], m.known, folder, "audit")


def write(desk: lab.Lab, result: Result, trained: bool) -> None:
    """Tables, figures and summary from the rows alone; `--figures-only` comes here with the rows of OUT/runs.csv."""
    out, config = desk.out, desk.config
    if trained:
        runs = [{"experiment": "logit_scale", **run} for run in result.runs]
        if config.model != "mlp":
            flag_unlearned(runs, result.trajectories)
        files.write_csv(out / "runs.csv", runs, files.RUN_COLUMNS)
        files.write_csv(out / "trajectories.csv", result.trajectories)
        files.write_json(out / "provenance.json", lab.provenance(desk, result))
    runs = files.read_runs(out / "runs.csv")                                # read back, so that both ways see the same digits
    if (out / "trajectories.csv").exists():
        trajectories = files.read_csv(out / "trajectories.csv")
        files.write_csv(out / "cells.csv", stats.cell_rows(runs, trajectories))
        files.write_csv(out / "around_grok.csv", claims.around_grok(runs, trajectories))
    for cell in dict.fromkeys(run["cell"] for run in runs if run["arm"] != "free"):
        mine = [run for run in runs if run["cell"] == cell]
        if all(run["censored"] for run in mine):
            print(f"{cell}: no member grokked within {mine[0]['budget_steps']} steps; its median is later than that")
    m = claims.measure(runs, files.read_csv(out / "around_grok.csv"), Plan(config))      # a run of record may come without its long trajectories
    answered = [m.claims.get(key) or stats.claim(row, None) for key, row in claims.published(config).items()]
    files.write_summary(out, answered, m.findings)
    print(stats.table(answered))
    for row in m.findings:
        ends = f" [{row['lo']:.3g}, {row['hi']:.3g}]" if row["lo"] is not None and row["hi"] is not None else ""
        ours = "no value" if row["ours"] is None else f"{row['ours']:.3g}"
        print(f"{row['id']}: {ours}{ends}, n {row['n']}, {row['n_censored']} censored: {row['quantity']}")
    draw(m, config, desk)
    print(f"results in {out}")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, PARTS, argv)
    config = checked(config, given)
    desk, plan = lab.Lab("logit_scale", config, given, PRESETS), Plan(config)
    if config.figures_only:
        return desk.redraw(lambda: write(desk, Result(), trained=False))
    controls = [] if config.w_c else plan.controls()
    given_norms = {c.name: config.w_c for c in plan.controls()} if config.w_c else {}
    guess = {c.name: (54.5 if c.loss == "ce" else 36.5) * (c.p / 59) ** 0.4 for c in controls}   # for the list and estimate only
    progress.announce(config, [*controls, *plan.frontier(), *plan.held(given_norms or guess, dict.fromkeys(guess, (0.15, 0.64, 0.21)))], given)
    if config.dry_run:
        return None
    desk.open()
    result = desk.train("control", controls)
    w_c = given_norms or stats.critical_norms(result.runs)
    for cell in controls:
        if cell.name not in w_c:
            print(f"{cell.name}: no member grokked within {cell.budget_steps} steps: no W_c, so the cells held relative to it are not run")
        else:
            print(f"{cell.name}: W_c = {w_c[cell.name]:.2f}")
    shares = power_shares(result.runs) if "allocation" in config.parts else {}
    result += desk.train("cells", [*plan.frontier(), *plan.held(w_c, shares)], deal=True)
    write(desk, result, trained=True)
    desk.finish()
    return None


if __name__ == "__main__":
    lab.main(run)
