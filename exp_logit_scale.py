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
    python exp_logit_scale.py --model transformer_b --w-c 32.49      mediation as in the paper's transformer table, p=59; about an hour on 2 cores
    python exp_logit_scale.py --parts audit --audit-cells 1.15 1.20 1.15:1.7 --members 0 1
"""
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import files
import lab
import plots_logit_scale as plots
import settings
import stats
from common import EVAL_EVERY, LOG_EVERY, MODELS, Cell, Result, UsageError, clamp_start, exactly, unique
from measured import Measured, flag_unlearned

PARTS = ("mediation", "mse", "grid", "dose", "audit", "allocation")


@dataclass(frozen=True)
class Config(settings.Config):
    p: tuple[int, ...] = settings.option((59, 97), "moduli; of the audit the first one only; with --parts dose see --moduli")
    seeds: int = settings.option(12, "block size of mediation, mse, grid and allocation")
    parts: tuple[str, ...] = settings.option((), f"parts to run: {' '.join(PARTS)}")
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c of grid and dose; mediation and mse raise to the largest", float)
    taus: tuple[float, ...] = settings.option((), "temperatures at the raised norm, and of the grid; 1 is always among them", float)
    gammas: tuple[float, ...] = settings.option((-0.6, -0.3, 0.0, 0.3, 0.6), "allocations: power moved from the embedding to the unembedding")
    weight_decays: tuple[float, ...] = settings.option((0.5, 1.0, 2.0, 3.0, 4.0), "weight decays of the free runs of the dose part")
    lr: float = settings.option(1e-3, "learning rate; published numbers are answered at 1e-3 only")
    moduli: tuple[int, ...] = settings.option((43, 59, 67, 97, 113), "moduli of the dose part; --p replaces them")
    dose_seeds: int = settings.option(0, "block size of the dose part; 0 = the paper's, 16 at p=59 and 97, else 8")
    audit_cells: tuple[str, ...] = settings.option(("1.15", "1.20", "1.25"), "cells of the audit, each RHO or RHO:TAU")
    audit_dtypes: tuple[str, ...] = settings.option(("float32", "float64"), "precisions that the audit trains in")
    audit_seeds: int = settings.option(8, "block size of the audit")
    w_c: float = settings.option(0.0, "hold multiples of this norm and train no control (paper B's transformers: 32.49, from the end "
                                 "of theirs); 0 = the control's")
    budget: int = settings.option(120_000, "largest step at which a run that has not grokked is censored; parts with a smaller one keep it")


PRESETS = {
    "smoke": {"parts": ("mediation", "mse"), "p": (59,), "lr": 8e-3, "rhos": (1.05,), "taus": (1.3, 1.7), "members": (0, 1)},
    "laptop": {"parts": ("mediation", "mse"), "p": (59,), "members": (0, 1, 2)},
    "paper": {"parts": PARTS},
}
UP, TAUS = 1.15, (1.0, 1.15, 1.3, 1.5, 1.7)                       # Table 2
GRID_RHOS, GRID_TAUS = (1.00, 1.05, 1.10, 1.15), (1.0, 1.3, 1.7)  # Table 3
DOSE_RHOS = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25)
DOSE_CELLS = {43: 6}                  # cells behind a published row of Table 1; elsewhere 7
COLLAPSE_FREE, JUMP = 1.15, 2.5       # Table 1 fits rho up to the first, and stops before the first jump of L by more than the second
EARLY = 600                           # step right after the clamp engages, where L is not yet an outcome
BUDGET = {"free": 60_000, "base": 40_000, "up": 120_000, "grid": 120_000, "alloc": 50_000, "audit": 60_000}   # steps
CONFOUNDED = {"collapse": 0.05, "factor": 1.3}
PAPER_TRANSFORMER = (59, 32.49)       # p and given norm of the transformer table


# ---------------------------------------------------------------- cells

def expected(p: int, rho: float, tau: float, lr: float, loss: str) -> int:
    """Steps to grok by the paper's tables: for the estimate of time, never for a result."""
    rho, tau, lr = min(rho, 3), max(tau, 0.05), max(lr, 1e-9)   # far from any grid the law says nothing
    at_p = (59 / p) ** (1.5 if p >= 59 else 3)
    if loss == "mse":
        return int(1175 * at_p**0.5 * math.exp(4.3 * (rho - 1)) * tau**-0.7 * (1e-3 / lr) ** 0.4)
    return max(int(3700 * at_p * math.exp(8 * (rho - 1)) * tau**-2 * (1e-3 / lr) ** 0.4), 1000)


def dose_block(config: Config, p: int) -> int:
    return config.dose_seeds or (16 if p in (59, 97) else 8)


def audited(config: Config) -> list[tuple[float, float]]:
    """`(rho, tau)` of each of --audit-cells. Raises UsageError."""
    cells = []
    for text in config.audit_cells:
        try:
            rho, tau = (float(x) for x in (text if ":" in text else text + ":1").split(":"))
        except ValueError:
            raise UsageError(f"--audit-cells are RHO or RHO:TAU, such as 1.15 or 1.15:1.7, got {text!r}") from None
        if not (0 < rho <= settings.LARGEST["rhos"] and 0 < tau <= settings.LARGEST["taus"]):
            raise UsageError(f"--audit-cells: rho must be in (0, {settings.LARGEST['rhos']:g}] and tau in (0, {settings.LARGEST['taus']:g}], "
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
    if config.w_c < 0 or (config.w_c and (len(config.p) > 1 or not set(config.parts) <= {"mediation", "grid", "audit"})):
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
    blocks = {"dose": min((dose_block(config, p) for p in config.moduli), default=8), "audit": config.audit_seeds}
    for part, block in blocks.items():
        if part in config.parts and max(config.members, default=0) >= block:
            raise UsageError(f"--members {max(config.members)} is not in the block of the {part} part, 0..{block - 1}; name others, or other --parts")
    return config


def name(arm: str, p: int, block: int, loss: str, rho: float | None = None, tau: float = 1.0, gamma: float | None = None,
         wd: float = 1.0, dtype: str = "") -> str:
    parts = [arm, f"p{p}", f"b{block}", loss]
    parts += [f"rho{exactly(rho, '.2f')}", f"tau{exactly(tau, '.2f')}"] if rho is not None else []
    parts += [f"gamma{exactly(gamma, '+.2f')}"] if gamma is not None else []
    parts += [f"wd{exactly(wd, 'g')}"] if wd != 1 else []
    return "_".join([*parts, dtype] if dtype else parts)


class Plan:
    """The cells of a command, part by part."""

    def __init__(self, config: Config):
        self.config = config
        self.up = max(config.rhos, default=UP)
        self.taus = tuple(sorted({1.0, *(config.taus or TAUS)}))
        self.grid = [(rho, tau) for rho in config.rhos or GRID_RHOS for tau in sorted({1.0, *(config.taus or GRID_TAUS)})]
        self.losses = [loss for loss, part in (("ce", "mediation"), ("mse", "mse")) if part in config.parts]

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
            cells += [self.cell("free", p, dose_block(c, p), "ce", BUDGET["free"]) for p in c.moduli]
        if "audit" in c.parts:
            cells += [self.cell("free", c.p[0], c.audit_seeds, "ce", BUDGET["free"])]
        return unique(cells)

    def frontier(self) -> list[Cell]:
        """The free runs of the dose part at other weight decays."""
        c = self.config
        return [self.cell("free", p, dose_block(c, p), "ce", BUDGET["free"], wd=wd)
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
            block = dose_block(c, p)
            if (wc := w_c.get(name("free", p, block, "ce"))) is not None:
                cells += [self.cell("clamp", p, block, "ce", dose_budget(rho), rho, w_c=wc) for rho in c.rhos or DOSE_RHOS]
        if "audit" in c.parts and (wc := w_c.get(name("free", c.p[0], c.audit_seeds, "ce"))) is not None:
            cells += [self.cell("clamp", c.p[0], c.audit_seeds, "ce", BUDGET["audit"], rho, tau, dtype=dtype, w_c=wc)
                      for rho, tau in audited(c) for dtype in c.audit_dtypes]
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


# ---------------------------------------------------------------- measurement

def around_grok(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """What the fits need of the trajectories: logit scale and collapse at step 600 and from the first to the last T_grok of a cell."""
    rows = []
    for cell in dict.fromkeys(run["cell"] for run in runs):
        grok = [run["t_grok_step"] for run in runs if run["cell"] == cell and run["t_grok_step"] is not None]
        mine = [t for t in trajectories if t["cell"] == cell]
        last = max((t["step"] for t in mine), default=0)
        first, end = (min(grok) - LOG_EVERY, max(grok) + LOG_EVERY) if grok else (last, last)
        first = min(first, last)
        rows += [{k: t[k] for k in ("cell", "member", "step", "logit_scale", "collapse32", "collapse64")} for t in mine
                 if first <= t["step"] <= end or t["step"] == EARLY]
    return rows


def measure(runs: list[dict], log: list[dict], config: Config) -> Measured:
    m, plan = Measured(runs, log, "B.", answers=config.lr == MODELS[config.model]), Plan(config)
    m.known = {key: m.known[key] for key in published(config) if key in m.known}
    for p in config.p:
        for loss in plan.losses:
            mediation(m, plan, p, loss)
        if "grid" in config.parts:
            collapse(m, plan, p)
        if "allocation" in config.parts:
            allocation(m, config, p)
    for p in config.moduli if "dose" in config.parts else ():
        dose(m, config, p)
    if "audit" in config.parts:
        audit(m, config)
    return m


def published(config: Config) -> dict[str, dict]:
    """The published rows that runs of this network may answer: those of the transformer were made with `transformer_b`."""
    model = {"mlp": "mlp", "transformer_b": "transformer"}.get(config.model)
    return {key: row for key, row in stats.published(lab.ROOT / "published.csv", "B.").items()
            if row["model"] == model and not key.startswith("B.fork.")}


def ups(plan: Plan, p: int, loss: str) -> tuple[str, ...]:
    """Cells of the raised norm over temperature, tau = 1 first."""
    return tuple(name("clamp", p, plan.config.seeds, loss, plan.up, tau) for tau in (1.0, *(t for t in plan.taus if t != 1)))


def mediation(m: Measured, plan: Plan, p: int, loss: str) -> None:
    """Table 2 and the tables of its cells: norm up, temperature back, what part of the delay the logit scale recovers."""
    base, sweep, control = name("clamp", p, plan.config.seeds, loss, 1.0), ups(plan, p, loss), name("free", p, plan.config.seeds, loss)
    up = sweep[0]
    if not m.have(base, *sweep):
        return
    for cell in (base, *sweep):
        rho, tau = m.first[cell]["rho"], m.first[cell]["tau"]
        key = f"B.cell.{loss}.p{p}.rho{rho:.2f}.tau{tau:.2f}"
        m.claim(f"{key}.T_grok", (cell,), m.T(cell))
        m.claim(f"{key}.T_mem", (cell,), lambda picks, cell=cell: stats.median(m.mem[cell][picks]))
        m.claim(f"{key}.L", (cell,), m.at(cell))
        if (p, plan.config.w_c) == PAPER_TRANSFORMER:
            m.claim(f"B.tf.rho{rho:.2f}.tau{tau:.2f}.T_grok", (cell,), m.T(cell))
            m.claim(f"B.tf.rho{rho:.2f}.tau{tau:.2f}.L", (cell,), m.at(cell))
    if plan.up == UP and plan.taus[-1] == TAUS[-1] and (p, plan.config.w_c) == PAPER_TRANSFORMER:
        m.claim("B.tf.effect", (up, sweep[-1]), m.ratio(up, sweep[-1]))
    if plan.up == UP:
        m.claim(f"B.med.{loss}.p{p}.T0", (base,), m.T(base))
        m.claim(f"B.med.{loss}.p{p}.T1", (up,), m.T(up))
        m.claim(f"B.med.{loss}.p{p}.ratio", (up, base), m.ratio(up, base))
    where = f"{loss}.p{p}"
    if loss == "ce":
        norms = np.array([math.nan if r["norm_at_grok"] is None else r["norm_at_grok"] for r in m.runs if r["cell"] == control])
        m.claim(f"B.wc.p{p}", (control,), lambda picks: np.nanmedian(norms[picks], axis=1))

    def recovered(step: int | None, log: bool, joint: bool) -> Callable[[np.ndarray], np.ndarray]:
        def fraction(picks: np.ndarray) -> np.ndarray:
            who = picks if joint else np.arange(picks.shape[1])[None].repeat(len(picks), 0)
            T, L = (np.stack([of(cell) for cell in sweep], 1) for of in (lambda c: m.T(c)(picks), lambda c: m.at(c, step=step)(who)))
            return stats.recovery(m.T(base)(picks), m.T(up)(picks), T, L, m.at(base, step=step)(who), log)
        return fraction
    if loss == "ce" and plan.up == UP and plan.taus == TAUS:
        m.claim(f"B.recovery.p{p}", (base, *sweep), recovered(None, False, False))
    for step, when in ((None, "at grokking"), (EARLY, f"at step {EARLY}")) if loss == "ce" else ((None, "at grokking"),):
        for log, time in ((False, "time"), (True, "log time")):
            for joint, interval in ((False, "logit curve held fixed"), (True, "logit axis resampled")):
                key = ".".join(["recovery", where, *["early"] * bool(step), *["log"] * log, *["joint"] * joint])
                m.finding(key, f"recovery fraction on {time}, L {when}; interval with the {interval}", (base, *sweep),
                          recovered(step, log, joint))
    last = sweep[-1]
    if loss == "ce":
        bits = 64 if plan.config.dtype == "float64" else 32
        m.finding(f"collapse.float{bits}.{where}.rho{plan.up:.2f}", f"share of training pairs in collapse in working precision, {plan.config.model}, "
                  f"trained in float{bits}, tau 1", (up,), m.at(up, f"collapse{bits}"))
    m.finding(f"norm_up.{where}", f"median T_grok, rho {plan.up:g} over 1, tau 1", (up, base), m.ratio(up, base))
    m.finding(f"tau_effect.{where}", f"median T_grok at rho {plan.up:g}, tau 1 over {plan.taus[-1]:g}", (up, last), m.ratio(up, last))
    m.finding(f"logit_movement.{where}", f"logit scale at rho {plan.up:g}, tau 1 over {plan.taus[-1]:g}", (up, last),
              lambda picks: m.at(up)(picks) / m.at(last)(picks))
    m.finding(f"memorisation.{where}", f"median T_mem at rho {plan.up:g}, tau {plan.taus[-1]:g} over 1", (up, last),
              lambda picks: stats.median(m.mem[last][picks]) / stats.median(m.mem[up][picks]))
    m.finding(f"delay_share.{where}", "share of the tau effect on T_grok that is in the delay T_grok - T_mem", (up, last), lambda picks:
              (stats.median((m.grok[up] - m.mem[up])[picks]) - stats.median((m.grok[last] - m.mem[last])[picks]))
              / (m.T(up)(picks) - m.T(last)(picks)))


def collapse(m: Measured, plan: Plan, p: int) -> None:
    """Table 3: what explains ln T_grok over the grid of norm and temperature."""
    cells = tuple(name("clamp", p, plan.config.seeds, "ce", rho, tau) for rho, tau in plan.grid)
    if not m.have(*cells):
        return
    rho, tau = np.array(plan.grid).T
    for cell, r, t in zip(cells, rho, tau, strict=True):
        m.claim(f"B.grid.p{p}.rho{r:.2f}.tau{t:.2f}.T_grok", (cell,), m.T(cell))
        m.claim(f"B.grid.p{p}.rho{r:.2f}.tau{t:.2f}.L", (cell,), m.at(cell))

    def table(of: Callable[[str], Callable], picks: np.ndarray) -> np.ndarray:
        return np.stack([of(cell)(picks) for cell in cells], 1)                                     # (B, cells)

    def late(picks: np.ndarray) -> np.ndarray:
        return table(m.at, picks)

    def early(picks: np.ndarray) -> np.ndarray:
        return table(lambda cell: m.at(cell, step=EARLY), picks)

    def norm(picks: np.ndarray) -> np.ndarray:
        return np.broadcast_to(rho, (len(picks), len(rho)))

    def heat(picks: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.log(tau), (len(picks), len(tau)))

    def explained(*columns: Callable, score: int = 0) -> Callable[[np.ndarray], np.ndarray]:
        return lambda picks: stats.least_squares(np.log(table(m.T, picks)), *(column(picks) for column in columns))[score]

    if plan.grid == [(r, t) for r in GRID_RHOS for t in GRID_TAUS]:
        m.claim(f"B.collapse.r2_logit.p{p}", cells, explained(late))
        m.claim(f"B.collapse.r2_rho.p{p}", cells, explained(norm))
        m.claim(f"B.collapse.r2_both.p{p}", cells, explained(late, norm))
        m.claim(f"B.collapse.dr2.p{p}", cells, lambda picks: explained(late, norm)(picks) - explained(late)(picks))
    models = {"L": (late,), "rho": (norm,), "L+rho": (late, norm), f"L{EARLY}": (early,), f"L{EARLY}+rho": (early, norm), "rho+ln_tau": (norm, heat)}
    for label, columns in models.items():
        m.finding(f"r2.{label}.p{p}", f"R^2 of ln T_grok on {label.replace('+', ' and ')}, {len(cells)} cells", cells, explained(*columns))
        m.finding(f"aicc.{label}.p{p}", f"AICc of ln T_grok on {label.replace('+', ' and ')}", cells, explained(*columns, score=1))


def dose_cells(m: Measured, config: Config, p: int) -> tuple[list[str], list[str]]:
    """Clamped cells of the dose part by norm, and those that Table 1 fits: a majority grokked, rho <= 1.15, before the first jump of L."""
    block, everyone = dose_block(config, p), []
    for rho in sorted(config.rhos or DOSE_RHOS):
        if m.have(cell := name("clamp", p, block, "ce", rho)):
            everyone.append(cell)
    fitted, before = [], math.nan
    for cell in everyone:
        point = m.point(cell)
        if point["rho"] > COLLAPSE_FREE + 1e-9 or point["logit_scale"] > JUMP * before:
            break
        if np.isfinite(point["T"]).mean() > 0.5:
            fitted.append(cell)
            before = point["logit_scale"]
    return everyone, fitted


def dose(m: Measured, config: Config, p: int) -> None:
    """Table 1: ln T_grok over the held norm, the three forms by AIC, lack of fit, local slopes; how high a norm weight decay alone leaves."""
    everyone, fitted = dose_cells(m, config, p)
    control = name("free", p, dose_block(config, p), "ce")
    if len(fitted) >= 2:
        W = np.array([m.first[cell]["held_norm"] for cell in fitted])
        rho = np.array([m.first[cell]["rho"] for cell in fitted])
        cells = tuple(fitted)

        def y(picks: np.ndarray) -> np.ndarray:
            return np.log(np.stack([m.T(cell)(picks) for cell in cells], 1))                        # (B, cells)

        def favours(form: str) -> Callable[[np.ndarray], np.ndarray]:
            def difference(picks: np.ndarray) -> np.ndarray:
                scores = stats.dose_forms(W, y(picks))
                others = [form] if form != "table" else ["power", "saddle_node"]
                return np.min([scores[k] for k in others], axis=0) - scores["exponential"]
            return difference
        wanted = DOSE_CELLS.get(p, 7)
        enough = 2 * len(fitted) >= wanted and rho.max() >= COLLAPSE_FREE - 1e-9 and rho.min() <= (0.90 if wanted < 7 else 0.85) + 1e-9
        missing = "" if enough else f"fitted to {len(fitted)} doses {rho.min():g}..{rho.max():g}, the paper to {wanted} up to {COLLAPSE_FREE:g}"
        m.claim(f"B.dose.alpha.p{p}", cells, lambda picks: stats.line(W, y(picks))[0], missing)
        m.claim(f"B.dose.r2.p{p}", cells, lambda picks: stats.line(W, y(picks))[2], missing)
        m.finding(f"alpha_wc.p{p}", "slope of ln T_grok on the held norm times W_c", cells,
                  lambda picks: stats.line(W, y(picks))[0] * m.first[cells[0]]["w_c"])
        if len(fitted) >= 4:
            m.claim(f"B.dose.daic.p{p}", cells, favours("table"), missing)
            for form, text in (("power", "the power law, offset between 0 and the least norm"), ("saddle_node", "the saddle node"),
                               ("power_above", "a power law that diverges at an offset above the norms, which the paper does not try")):
                m.finding(f"daic.{form}.p{p}", f"AIC of {text}, minus that of the exponential", cells, favours(form))
            times = np.array([m.grok[cell] for cell in cells])
            if np.isfinite(times).all() and times.shape[1] >= 2:
                m.finding(f"lack_of_fit.p{p}", "p-value: ln T_grok is a straight line in the held norm, against seed noise", cells,
                          stats.lack_of_fit(W, np.log(times)))
        for low, high, step in zip(fitted, fitted[1:], np.diff(W), strict=False):
            m.finding(f"local_slope.{high}", f"slope of ln T_grok between rho {m.first[low]['rho']:g} and {m.first[high]['rho']:g}", (low, high),
                      lambda picks, low=low, high=high, step=step: np.log(m.T(high)(picks) / m.T(low)(picks)) / step)
    if everyone and m.have(control):
        frontier = [r for r in m.runs if r["arm"] == "free" and (r["p"], r["block"]) == (p, dose_block(config, p)) and r["norm_at_grok"] is not None]
        top = max(m.first[cell]["held_norm"] for cell in everyone)
        for wd in dict.fromkeys(r["weight_decay"] for r in frontier):
            mine = [r["norm_at_grok"] for r in frontier if r["weight_decay"] == wd]
            m.finding(f"free_norm.p{p}.wd{wd:g}", "largest norm at own T_grok of a free run, over W_c", (control,),
                      max(mine) / m.first[everyone[0]]["w_c"])
        if frontier:
            m.finding(f"frontier.p{p}", "largest norm at own T_grok of any free run, over the highest held norm", (control,),
                      max(r["norm_at_grok"] for r in frontier) / top)


def audit(m: Measured, config: Config) -> None:
    """Table 8: the same held norm trained in float32 and in float64; is the float32 cell one of softmax collapse?"""
    p = config.p[0]
    for rho, tau in audited(config):
        single, double = (name("clamp", p, config.audit_seeds, "ce", rho, tau, dtype=dtype) for dtype in ("float32", "float64"))
        where = f"p{p}.rho{rho:.2f}.tau{tau:.2f}"
        for cell, bits in ((single, 32), (double, 64)):
            if not m.have(cell):
                continue
            if p == 59 and tau == 1:
                m.claim(f"B.audit.{rho:.2f}.T{bits}", (cell,), m.T(cell))
                m.claim(f"B.audit.{rho:.2f}.sc{bits}", (cell,), m.at(cell, f"collapse{bits}"))
            m.finding(f"collapse.float{bits}.{where}", f"share of training pairs in collapse in working precision, trained in float{bits}", (cell,),
                      m.at(cell, f"collapse{bits}"))
        if m.have(single, double):
            m.finding(f"float32_over_float64.{where}", "median T_grok, float32 over float64, same members", (single, double), m.ratio(single, double))
            everyone = np.arange(len(m.grok[single]))[None]
            times = [float(m.T(cell)(everyone)[0]) for cell in (single, double)]
            apart = max(times) / min(times) if math.isfinite(min(times)) else math.nan      # infinite: only one of them groks
            confounded = float(m.at(single, "collapse32")(everyone)[0]) >= CONFOUNDED["collapse"] or apart > CONFOUNDED["factor"]
            m.finding(f"float32_confounded.{where}", "1 if the collapse rate is 0.05 or more, or the medians differ by more than 1.3",
                      (single, double), float(confounded))


def allocation(m: Measured, config: Config, p: int) -> None:
    """Appendix: T_grok and logit scale over the split of the squared norm at fixed total."""
    cells = [cell for gamma in sorted(config.gammas) if m.have(cell := name("alloc", p, config.seeds, "ce", gamma=gamma))]
    for cell in cells:
        key = f"B.alloc.p{p}.g{m.first[cell]['gamma']:+.1f}"
        m.claim(f"{key}.T_grok", (cell,), m.T(cell))
        m.claim(f"{key}.L", (cell,), m.at(cell))
    if len(cells) >= 2:
        for key, of, text in (("allocation_T", m.T, "median T_grok"), ("allocation_L", m.at, "logit scale")):
            def spread(picks: np.ndarray, of: Callable = of) -> np.ndarray:
                values = np.stack([of(cell)(picks) for cell in cells])
                return values.max(0) / values.min(0)
            m.finding(f"{key}.p{p}", f"largest over smallest {text} over the allocations", tuple(cells), spread)


# ---------------------------------------------------------------- figures and files

def draw(m: Measured, config: Config, desk: lab.Lab) -> None:
    plan, folder, points = Plan(config), desk.out / "figures", {cell: m.point(cell) for cell in m.first}
    for p in config.p:
        panels = {}
        for loss in plan.losses:
            cells = (name("clamp", p, config.seeds, loss, 1.0), *ups(plan, p, loss))
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
        everyone, fitted = dose_cells(m, config, p)
        if everyone:
            free = [r for r in m.runs if r["arm"] == "free" and (r["p"], r["block"]) == (p, dose_block(config, p))]
            plots.dose([points[c] for c in everyone], [points[c] for c in fitted], free, m.known, folder, f"dose_p{p}")
    if "audit" in config.parts:
        pairs = [[points[c] for dtype in ("float32", "float64")
                  if m.have(c := name("clamp", config.p[0], config.audit_seeds, "ce", rho, tau, dtype=dtype))] for rho, tau in audited(config)]
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
        files.write_csv(out / "around_grok.csv", around_grok(runs, trajectories))
    for cell in dict.fromkeys(run["cell"] for run in runs if run["arm"] != "free"):
        mine = [run for run in runs if run["cell"] == cell]
        if all(run["censored"] for run in mine):
            print(f"{cell}: no member grokked within {mine[0]['budget_steps']} steps; its median is later than that")
    m = measure(runs, files.read_csv(out / "around_grok.csv"), config)      # a run of record may come without its long trajectories
    answered = [m.claims.get(key) or stats.claim(row, None) for key, row in published(config).items()]
    files.write_summary(out, answered, m.findings)
    draw(m, config, desk)
    print(stats.table(answered))
    for row in m.findings:
        ends = f" [{row['lo']:.3g}, {row['hi']:.3g}]" if row["lo"] is not None and row["hi"] is not None else ""
        ours = "no value" if row["ours"] is None else f"{row['ours']:.3g}"
        print(f"{row['id']}: {ours}{ends}, n {row['n']}, {row['n_censored']} censored: {row['quantity']}")
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
    lab.announce(config, [*controls, *plan.frontier(), *plan.held(given_norms or guess, dict.fromkeys(guess, (0.15, 0.64, 0.21)))])
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
