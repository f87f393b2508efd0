"""The weight norm sets the grokking timescale: paper A (arXiv 2606.13753).

Claims (section of the paper)
  sec 4  free networks grok at a critical norm W_c that varies by 1-2% over seeds and learning rates and grows as p^0.38
  sec 5  held at rho W_c, T_grok grows as exp(alpha rho), alpha = 7.64; the norm moves it about 19x, the learning rate about 2x
  sec 5  rescaling the norm once does nothing of the kind: max/min 1.2 against 7.3 for the sustained clamp
  sec 6  one exponent for all moduli, alpha = 7.49; above rho 1.25 the delay saturates
  abstract  without a clamp the delay has a logarithmic counterpart, ln(V_mem / V_grok)

Verdicts: `stats.claim`. A run that does not grok within its budget is censored there and counts as later; none is dropped.
W_c is the median, over the members that grok, of the norm at their own T_grok in the free control: same p, same block, first of --lrs.

    python exp_delay_law.py                    laptop preset: control and four doses at p=59, 3 members, minutes on 2 cores
    python exp_delay_law.py --preset paper     all tables of the paper; meant for a GPU
    python exp_delay_law.py --model transformer   section 7, parts dense, groups, concentration: see delay_law_transformer.py
    python exp_delay_law.py --parts dense --rhos 0.9 1.1 --members 0 1 2 --out results/mine
"""
import dataclasses
import math
from dataclasses import dataclass

import numpy as np

import delay_law_transformer as transformer
import files
import lab
import plots
import settings
import stats
from common import CLAMP_START, EVAL_EVERY, Cell, Result, UsageError, exactly, unique
from measured import flag_unlearned

PARTS = ("dense", "matrix", "moduli", "oneshot", "concentration")   # of the MLP; the transformers have parts of their own


@dataclass(frozen=True)
class Config(settings.Config):
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c; default: each part's own", float)
    lrs: tuple[float, ...] = settings.option((1e-3, 2e-3, 4e-3, 8e-3), "learning rates of the matrix; the first is everybody else's")
    train_fracs: tuple[float, ...] = settings.option((), "train fractions of the concentration part; default .30 .35 .40 .50 .65", float)
    weight_decays: tuple[float, ...] = settings.option((), "weight decays of the concentration part; default .3 1 3", float)
    moduli: tuple[int, ...] = settings.option((31, 41, 53, 59, 71), "moduli of the moduli part; --p replaces them")
    moduli_seeds: int = settings.option(12, "block size of the moduli part")
    free_moduli: tuple[int, ...] = settings.option((29, 41, 59, 79, 97), "moduli of the concentration part; --p replaces them")
    free_seeds: int = settings.option(20, "block size of the concentration part")
    group_moduli: tuple[int, ...] = settings.option((71,), "moduli of the transformers' groups part; --p replaces them")
    budget: int = settings.option(200_000, "largest step at which a run that has not grokked is censored; cells with a smaller one keep it")


PRESETS = {
    "smoke": {"parts": ("dense",), "rhos": (0.85, 1.0), "lrs": (8e-3,), "members": (0, 1)},
    "laptop": {"parts": ("dense",), "rhos": (0.85, 0.95, 1.05, 1.15), "members": (0, 1, 2)},
    "paper": {"parts": PARTS},
}
DENSE_RHOS = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25, 1.30)
PAPER_LR = 1e-3             # published numbers are answered only by runs whose first learning rate is the paper's
PAPER_SEEDS = {"A.wc.power": 20, "A.wc.cv": 20, "A.wc.power.pscan": 12, "A.alpha.shared.r2": 12, "A.saturation.p41": 12}   # elsewhere 16
MODULI_RHOS = (0.85, 1.00, 1.15)
FIT_DENSE = (0.85, 1.25)    # range of rho of A.alpha.dense
FIT_MODULI = (0.85, 1.15)   # range of rho of A.alpha.pNN


# ---------------------------------------------------------------- cells

def expected(p: int, rho: float = 1.04, lr: float = 1e-3) -> int:
    """Steps to grok by the papers' own law: for budgets and for the estimate of time, never for a result."""
    return int(4050 * (59 / p) ** 2.3 * math.exp(7.5 * (min(rho, 1.25) - 1)) * (1e-3 / lr) ** 0.4)


def narrowed(config: Config, given: dict) -> Config:
    """`--p` narrows every part. Raises UsageError if a part has no member to train, or is not the model's."""
    if config.budget < EVAL_EVERY:
        raise UsageError(f"--budget must be at least {EVAL_EVERY} steps, where runs are first evaluated; got {config.budget}")
    if config.model != "mlp":
        return transformer.adapted(config, given)
    for part in set(config.parts) - set(PARTS):
        raise UsageError(f"--parts {part} is of the transformers; for the MLP there are {' '.join(PARTS)}")
    if "p" in given:
        config = dataclasses.replace(config, moduli=given.get("moduli", config.p), free_moduli=given.get("free_moduli", config.p))
    blocks = {"moduli": config.moduli_seeds, "concentration": config.free_seeds}
    for part in config.parts:
        for m in config.members:
            if m >= blocks.get(part, config.seeds):
                raise UsageError(f"--members {m} is not in the block of the {part} part, 0..{blocks.get(part, config.seeds) - 1}; name others, "
                                 "or other --parts")
    return config


def common_fields(config: Config, p: int, block: int, lr: float, weight_decay: float = 1.0, train_frac: float = 0.40) -> dict:
    members = config.members or tuple(range(block))
    return dict(p=p, block=block, members=members, model=config.model, seed0=config.seed0, lr=lr, weight_decay=weight_decay,
                train_frac=train_frac, after_grok=config.after_grok)


def name(arm: str, p: int, block: int, lr: float, base_lr: float, rho: float | None = None, wd: float = 1.0, frac: float = 0.40) -> str:
    parts = [arm, f"p{p}", f"b{block}"]
    parts += ["rho" + exactly(rho, ".2f")] if rho is not None else []
    parts += ["lr" + exactly(lr, "g")] if lr != base_lr else []
    parts += ["wd" + exactly(wd, "g")] if wd != 1 else []
    parts += ["frac" + exactly(frac, "g")] if frac != 0.40 else []
    return "_".join(parts)


def free(config: Config, p: int, block: int, lr: float | None = None, wd: float = 1.0, frac: float = 0.40) -> Cell:
    lr = lr or config.lrs[0]
    return Cell(name("free", p, block, lr, config.lrs[0], None, wd, frac), budget_steps=min(config.budget, 60_000 if p >= 59 else 120_000),
                expected_steps=int(1.3 * expected(p, 1, lr) / max(wd, 0.1)), **common_fields(config, p, block, lr, wd, frac))


def clamp(config: Config, p: int, block: int, rho: float, w_c: float, budget: int, lr: float | None = None, arm: str = "clamp") -> Cell:
    lr, start = lr or config.lrs[0], CLAMP_START["ce"]
    fields = common_fields(config, p, block, lr)
    return Cell(name(arm, p, block, lr, config.lrs[0], rho), budget_steps=min(config.budget, budget), arm=arm, rho=rho, w_c=w_c, clamp_start=start,
                clamp_stop=start + 1 if arm == "rescale" else None, held=((rho * w_c, 0.0, 0.0, 0.0),) * len(fields["members"]),
                expected_steps=expected(p, rho if arm == "clamp" else 1.0, lr), **fields)


def dense_budget(rho: float) -> int:
    """8000 steps at rho 0.85, 66000 from 1.25 on."""
    return int(np.clip(8000 * math.exp(7.5 * (min(rho, 2) - 0.85)), 8000, 66_000)) // 1000 * 1000


def control_cells(config: Config) -> list[Cell]:
    """The free cells that give the W_c of held ones."""
    cells = []
    if {"dense", "matrix", "oneshot"} & set(config.parts):
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
    controls = {cell.name for cell in control_cells(config)}
    return [cell for cell in unique(cells) if cell.name not in controls]


def clamp_cells(config: Config, w_c: dict[str, float]) -> list[Cell]:
    """Cells at rho W_c for every part; a part whose control has no W_c is left out (said by `run`)."""
    cells = []
    for p in config.p:
        if (wc := w_c.get(name("free", p, config.seeds, 0, 0))) is not None:
            if "dense" in config.parts:
                cells += [clamp(config, p, config.seeds, rho, wc, dense_budget(rho)) for rho in config.rhos or DENSE_RHOS]
            if "matrix" in config.parts:
                cells += [clamp(config, p, config.seeds, rho, wc, 30_000 if rho < 1.30 else 160_000, lr)
                          for rho in config.rhos or (0.85, 1.00, 1.15, 1.30) for lr in config.lrs]
            if "oneshot" in config.parts:
                rhos = config.rhos or (0.70, 0.85, 1.00, 1.15, 1.30)
                cells += [clamp(config, p, config.seeds, rho, wc, 15_000, arm="rescale") for rho in rhos]
    if "moduli" in config.parts:
        for p in config.moduli:
            if (wc := w_c.get(name("free", p, config.moduli_seeds, 0, 0))) is not None:
                rhos = config.rhos or ((*MODULI_RHOS, 1.30) if p in (41, 59) else MODULI_RHOS)
                cells += [clamp(config, p, config.moduli_seeds, rho, wc, 60_000 if rho <= 1.0 else 160_000) for rho in rhos]
    return unique(cells)


# ---------------------------------------------------------------- measurement and fit

class Measured:
    """The runs as tables, and the claims they answer."""

    def __init__(self, runs: list[dict], base_lr: float):
        self.runs, self.base_lr = runs, base_lr
        self.cells = {run["cell"]: run for run in runs}
        self.claims: dict[str, dict] = {}
        self.known = stats.published(lab.ROOT / "published.csv", "A.")

    def pick(self, arm: str, p: int | None = None, block: int | None = None, lr: float | None = None) -> list[dict]:
        """First run of each matching cell at weight decay 1 and train fraction 0.40, by rho."""
        lr = lr or self.base_lr
        found = [c for c in self.cells.values() if c["arm"] == arm and c["weight_decay"] == 1 and c["train_frac"] == 0.40
                 and c["lr"] == lr and p in (None, c["p"]) and block in (None, c["block"])]
        return sorted(found, key=lambda c: (c["p"], c["rho"] or 0))

    def table(self, cells: list[dict]) -> np.ndarray:
        """`T_grok (cells, members)`; infinite = censored."""
        return np.array([list(stats.times(self.runs, c["cell"]).values()) for c in cells])

    def claim(self, key: str, cells: list[dict], statistic: callable, table: np.ndarray | None = None,
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


def measure(runs: list[dict], config: Config) -> tuple[dict[str, dict], dict]:
    """Claims by id, and the fits that the figures draw."""
    m, fits = Measured(runs, config.lrs[0]), {}
    delay_law(m, fits, config)
    matrix(m, config)
    moduli_law(m, fits, config)
    oneshot(m, config)
    concentration(m, fits, config)
    return m.claims, fits


def delay_law(m: Measured, fits: dict, config: Config) -> None:
    """Figure 3: alpha of T_grok ~ exp(alpha rho), its R^2, the medians, saturation at rho 1.30, the sustained clamp's range."""
    for p in config.p:
        cells = m.pick("clamp", p, config.seeds)
        fitted = [c for c in cells if FIT_DENSE[0] - 1e-9 <= c["rho"] <= FIT_DENSE[1] + 1e-9]
        if len(fitted) >= 2:
            rho = np.array([c["rho"] for c in fitted])
            key = "A.alpha.dense" if p == 59 else f"alpha.p{p}"
            missing = lacking(rho, DENSE_RHOS[:-1])
            alpha = m.claim(key, fitted, lambda t, rho=rho: stats.line(rho, log_median(t))[0], missing=missing)
            m.claim(key + ".r2", fitted, lambda t, rho=rho: stats.line(rho, log_median(t))[2], missing=missing)
            _, intercept, r2 = stats.line(rho, log_median(m.table(fitted)))
            fits[f"dense.p{p}"] = {"alpha": alpha, "intercept": float(intercept), "r2": float(r2), "rhos": rho.tolist()}
            counts = np.isfinite(m.table(fitted)).all()
            if counts and len(fitted) >= 4 and m.table(fitted).shape[1] >= 2:
                fits[f"dense.p{p}"]["lack_of_fit_p"] = stats.lack_of_fit(rho, np.log(m.table(fitted)))
            top = [c for c in cells if abs(c["rho"] - 1.30) < 1e-9]
            if top and p == 59:
                m.claim("A.saturation.p59", [*fitted, *top], saturation(rho), missing=missing)
        if p == 59:
            for c in cells:
                m.claim(f"A.dense.rho{c['rho']:.2f}", [c], only)
            ends = [c for c in cells if c["rho"] in (0.90, 1.15)]
            if len(ends) == 2:
                m.claim("A.sustained.spread", ends, lambda t: stats.median(t).max(-1) / stats.median(t).min(-1))


def lacking(ours: np.ndarray, published: tuple[float, ...]) -> str:
    """What our doses lack of the published fit: both of its ends, and at least half of its doses, must be there."""
    have = {round(float(rho), 6) for rho in ours} & set(published)
    enough = {published[0], published[-1]} <= have and 2 * len(have) >= len(published)
    ran, wanted = f"{len(ours)} doses {min(ours):g}..{max(ours):g}", f"{len(published)} of {published[0]}..{published[-1]}"
    return "" if enough else f"fitted to {ran}, the paper to {wanted}"


def saturation(rho: np.ndarray) -> callable:
    """Measured over extrapolated T_grok at rho 1.30: the last row of the table against the line through the others."""
    def ratio(t: np.ndarray) -> np.ndarray:
        slope, intercept, _ = stats.line(rho, log_median(t[..., :-1, :]))
        return stats.median(t[..., -1, :]) / np.exp(intercept + slope * 1.30)
    return ratio


def matrix(m: Measured, config: Config) -> None:
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


def moduli_law(m: Measured, fits: dict, config: Config) -> None:
    """Section 6: alpha and W_c per modulus, the shared exponent over four of them, saturation at p=41."""
    block, groups = config.moduli_seeds, {}
    for p in config.moduli if "moduli" in config.parts else ():
        cells = m.pick("clamp", p, block)
        for c in cells:
            m.claim(f"A.pscan.p{p}.rho{c['rho']:.2f}", [c], only)
        fitted = [c for c in cells if c["rho"] <= FIT_MODULI[1] + 1e-9]
        if len(fitted) >= 2:
            rho = np.array([c["rho"] for c in fitted])
            missing = lacking(rho, MODULI_RHOS)
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
    power_claim(m, "A.wc.power.pscan", m.pick("free", block=block) if "moduli" in config.parts else [])


def oneshot(m: Measured, config: Config) -> None:
    """Section 5: one rescale at step 500 leaves T_grok where it was."""
    cells = m.pick("rescale", 59, config.seeds)
    if len(cells) >= 2:
        m.claim("A.oneshot.spread", cells, lambda t: stats.median(t).max(-1) / stats.median(t).min(-1))


def norms_at_grok(m: Measured, cells: list[dict]) -> np.ndarray:
    """Norm at own T_grok `(cells, members)`; not a number where a run did not grok."""
    return np.array([[np.nan if r["norm_at_grok"] is None else r["norm_at_grok"] for r in m.runs if r["cell"] == c["cell"]] for c in cells])


def critical_norm_claim(m: Measured, key: str, cells: list[dict]) -> None:
    if cells and np.isfinite(norms_at_grok(m, cells[:1])).any():
        m.claim(key, cells[:1], lambda t: np.nanmedian(t, -1)[..., 0], norms_at_grok(m, cells[:1]))


def power_claim(m: Measured, key: str, cells: list[dict]) -> tuple | None:
    """k of W_c ~ p^k."""
    if len({c["p"] for c in cells}) >= 3:
        log_p = np.log([c["p"] for c in cells])
        return m.claim(key, cells, lambda t: stats.line(log_p, np.log(np.nanmedian(t, -1)))[0], norms_at_grok(m, cells))
    return None


def concentration(m: Measured, fits: dict, config: Config) -> None:
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
    fits["power"] = power_claim(m, "A.wc.power", m.pick("free", block=config.free_seeds))
    over_lr = [c for c in mine if (c["p"], c["train_frac"], c["weight_decay"]) == (59, 0.50, 3)]
    if len(over_lr) >= 2:
        def cv(t: np.ndarray) -> np.ndarray:
            return 100 * np.nanstd(t, axis=(-2, -1), ddof=1) / np.nanmean(t, axis=(-2, -1))
        m.claim("A.wc.cv", over_lr, cv, norms_at_grok(m, over_lr))


def contraction(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """Free runs: slope of ln ||W||^2 after memorisation against 2 lr wd, and the delay against ln(V_mem / V_grok), V = ||W||^2.

    The norm may go on growing after T_mem, so slope and ratio are given from its peak (largest logged norm between the two) as well.
    """
    rows = []
    for run in runs:
        if run["arm"] != "free" or run["censored"] or run["t_mem_step"] is None:
            continue
        points = [(t["step"], 2 * math.log(t["norm"])) for t in trajectories if t["cell"] == run["cell"] and t["member"] == run["member"]
                  and run["t_mem_step"] <= t["step"] <= run["t_grok_step"]]
        peak_step, ln_peak = max(points, key=lambda point: point[1], default=(run["t_mem_step"], 2 * math.log(run["norm_at_mem"])))
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


def findings(runs: list[dict], fits: dict, contracted: list[dict]) -> list[dict]:
    """Open doubts that these runs answer in numbers: no verdict, no goal."""
    out = []
    for run in {r["cell"]: r for r in runs if r["arm"] == "clamp" and r["rho"] == 1.0}.values():
        same = ("p", "block", "lr", "seed0", "train_frac", "weight_decay")
        control = [r for r in runs if r["arm"] == "free" and all(r[k] == run[k] for k in same)]
        if control:
            pair = np.array([list(stats.times(runs, c).values()) for c in (run["cell"], control[0]["cell"])])
            ratio = stats.bootstrap(pair, lambda t: stats.median(t)[..., 0] / stats.median(t)[..., 1])
            out.append({"id": f"clamp_over_free.{run['cell']}", "quantity": "median T_grok, clamp at rho 1 over free, same seeds",
                        "ours": stats.finite(ratio[0]), "lo": stats.finite(ratio[1]), "hi": stats.finite(ratio[2]), "n": pair.shape[1]})
    for slow in {r["cell"]: r for r in runs if r["arm"] == "clamp" and r["lr"] == min(run["lr"] for run in runs)}.values():
        fast = max((r for r in runs if all(r[k] == slow[k] for k in ("arm", "p", "block", "rho", "seed0"))), key=lambda r: r["lr"])
        if fast["lr"] > slow["lr"]:
            pair = np.array([list(stats.times(runs, c).values()) for c in (slow["cell"], fast["cell"])])
            ratio = stats.bootstrap(pair, lambda t: stats.median(t)[..., 0] / stats.median(t)[..., 1])
            out.append({"id": f"lr_factor.{slow['cell']}", "n": pair.shape[1],
                        "quantity": f"median T_grok, learning rate {slow['lr']:g} over {fast['lr']:g}, same held norm",
                        "ours": stats.finite(ratio[0]), "lo": stats.finite(ratio[1]), "hi": stats.finite(ratio[2])})
    for key, fit in fits.items():
        if isinstance(fit, dict) and "lack_of_fit_p" in fit:
            out.append({"id": f"lack_of_fit.{key}", "quantity": "p-value: ln T_grok is a straight line in rho, against seed noise",
                        "ours": stats.finite(fit["lack_of_fit_p"]), "lo": None, "hi": None, "n": len(fit["rhos"])})
    for cell in dict.fromkeys(row["cell"] for row in contracted):
        for key, text in (("ln_v_ratio", "ln(V_mem / V_grok)"), ("ln_v_peak_ratio", "ln(V_peak / V_grok)"),
                          ("rate_from_peak_over_two_lr_wd", "rate of ln ||W||^2 from its peak to T_grok over 2 lr wd")):
            values = [row[key] for row in contracted if row["cell"] == cell and row[key] is not None]
            out.append({"id": f"contraction.{key}.{cell}", "quantity": f"{text}, median of members", "n": len(values),
                        "ours": stats.finite(np.median(values)) if values else None, "lo": stats.finite(min(values, default=None)),
                        "hi": stats.finite(max(values, default=None))})
    return out


# ---------------------------------------------------------------- run

def write(desk: lab.Lab, result: Result, trained: bool) -> None:
    """Tables, figures and summary from the rows alone; `--figures-only` comes here with the rows of OUT/runs.csv."""
    runs, out, config = [{"experiment": "delay_law", **run} for run in result.runs], desk.out, desk.config
    if trained:
        if config.model != "mlp":
            flag_unlearned(runs, result.trajectories)
        files.write_csv(out / "runs.csv", runs, files.RUN_COLUMNS)
        files.write_csv(out / "trajectories.csv", result.trajectories)
        files.write_json(out / "provenance.json", lab.provenance(desk, result))
    runs, trajectories = files.read_runs(out / "runs.csv"), []              # read back, so that both ways see the same digits
    if (out / "trajectories.csv").exists():
        trajectories = files.read_csv(out / "trajectories.csv")
        files.write_csv(out / "cells.csv", stats.cell_rows(runs, trajectories))
        files.write_csv(out / "contraction.csv", contraction(runs, trajectories))
    contracted = files.read_csv(out / "contraction.csv")                    # a run of record may come without its long trajectories
    claims, fits, found = transformer.measure(runs, config) if config.model != "mlp" else (*measure(runs, config), [])
    known = stats.published(lab.ROOT / "published.csv", "A.")
    answered = [claims.get(key) or stats.claim(row, None) for key, row in known.items()]
    found += findings(runs, fits, contracted)
    files.write_summary(out, answered, found)
    figures = out / "figures"
    for block, moduli, prefix, published in ((config.seeds, config.p, "dense", "A.dense.rho" if config.model == "mlp" else "A.tf.rho"),
                                             (config.moduli_seeds, config.moduli, "moduli", "A.pscan.p{p}.rho")):
        if prefix == "moduli" and "moduli" not in config.parts:
            continue
        mine = [r for r in runs if r["block"] == block and r["p"] in moduli
                and (r["lr"], r["weight_decay"], r["train_frac"]) == (config.lrs[0], 1, 0.40)]
        total = [r for r in mine if r["arm"] != "clamp" or r["held_norm"] is not None]     # without the clamps of single groups
        if any(r["arm"] == "clamp" for r in total):
            plots.dose(total, "clamp", "Delay law", figures, prefix, fits, prefix, published)
        if any(r["arm"] == "rescale" for r in mine):
            plots.dose(mine, "rescale", "One rescale at step 500", figures, "oneshot", fits, prefix, published)
    for p in config.p if "matrix" in config.parts else ():
        if any(r["arm"] == "clamp" and r["p"] == p for r in runs):
            plots.matrix([r for r in runs if r["p"] == p and r["block"] == config.seeds], figures, f"matrix_p{p}")
    if any(r["norm_at_grok"] is not None for r in runs if r["arm"] == "free"):
        for group in ("",) if config.model == "mlp" else ("", "unembed"):
            plots.critical_norm(runs, figures, group)
    if contracted:
        plots.contraction(contracted, figures)
    if trajectories:
        plots.trajectories(trajectories, figures)
    print(stats.table(answered))
    for finding in found:
        print(f"{finding['id']}: {finding['ours']} ({finding['lo']} to {finding['hi']}; n {finding['n']}) {finding['quantity']}")
    for key, fit in fits.items():
        if isinstance(fit, dict):
            e, lo, hi = fit["alpha"]
            rhos = " ".join(f"{rho:g}" for rho in fit["rhos"])
            print(f"{key}: alpha = {e:.2f}, 95% interval {lo:.2f} to {hi:.2f}, R2 = {fit['r2']:.4f}, rho {rhos}")
    print(f"results in {out}")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, (*PARTS, "groups"), argv)
    config = narrowed(config, given)
    desk = lab.Lab("delay_law", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: write(desk, Result(), trained=False))
    controls, others, held = (control_cells(config), other_free_cells(config), clamp_cells) if config.model == "mlp" else (
        transformer.control_cells(config), transformer.other_free_cells(config), transformer.clamp_cells)
    guess = {c.name: 54.8 * (c.p / 59) ** 0.4 for c in controls}   # for the dry run's list only; the real W_c comes from the control
    lab.announce(config, [*controls, *others, *held(config, transformer.guess(controls) if config.model != "mlp" else guess)])
    if config.dry_run:
        return None
    desk.open()
    result = desk.train("control", controls)
    w_c = stats.critical_norms(result.runs) if config.model == "mlp" else transformer.critical_norms(result.runs)
    for cell in controls:
        if cell.name not in w_c:
            print(f"{cell.name}: no member grokked within {cell.budget_steps} steps: no W_c, so the cells held relative to it are not run")
        else:
            print(f"{cell.name}: W_c = {w_c[cell.name]:.2f}" if config.model == "mlp" else
                  f"{cell.name}: norms at own T_grok " + ", ".join(f"{group or 'total'} {norm:.2f}" for group, norm in w_c[cell.name].items()))
    result += desk.train("cells", [*others, *held(config, w_c)], deal=True)
    write(desk, result, trained=True)
    desk.finish()
    return None


if __name__ == "__main__":
    lab.main(run)
