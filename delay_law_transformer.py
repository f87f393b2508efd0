"""Paper A (arXiv 2606.13753), section 7, the delay law on transformers: cells and claims of `exp_delay_law.py --model transformer...`.

Claims
  without LayerNorm  free networks grok at W_c = 36.9 (p=59); held at rho W_c, T_grok grows as exp(15.4 rho); at rho 1.20 it saturates
  with LayerNorm     over train fractions the total norm at grokking varies (CV 0.16), that of the unembedding hardly (0.04); it grows as p^0.77.
                     Of the groups held alone at rho times their own norm at grokking, the unembedding moves T_grok about twofold (p=71)

Parts: `dense` holds the total norm, `groups` one group at a time, `concentration` trains freely over train fraction, learning rate and p.
CV: standard deviation over mean of the norms at own T_grok, all members of all fractions (or learning rates) together.
"""
import dataclasses
import math

import numpy as np

from common import MODELS, Cell, UsageError, clamp_start, exactly, unique
from kernels.layout import TransformerLayout
from lab import settings, stats
from lab.answers import SAME, Measured

GROUPS = TransformerLayout.groups
PARTS = ("dense", "groups", "concentration")
MLP_FLAGS = ("weight_decays", "moduli", "moduli_seeds")       # flags of exp_delay_law.py that only parts of the MLP read
DOSES = {"transformer": (0.85, 1.00, 1.15, 1.20), "transformer_ln": (0.85, 1.00, 1.15), "transformer_b": (0.85, 1.00, 1.15, 1.20)}
GROUP_DOSES = {"unembed": (0.85, 1.00, 1.15, 1.30), "mlp": (0.85, 1.30), "embed": (1.30,)}
PAPER_GROUP_P = 71                                            # modulus of the published group clamps
FRACTIONS = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55)
PRESETS = {
    "smoke": {"parts": ("dense",), "rhos": (0.85,), "lrs": (2e-3,), "members": (0,)},
    "laptop": {"parts": ("dense",), "rhos": (0.85, 0.90, 0.95, 1.00), "members": (0, 1, 2)},
    "paper": {"parts": PARTS},
}
FIT = (0.85, 1.00, 1.15)      # doses of A.tf.alpha
SATURATED = 1.20              # dose of A.tf.saturation


def adapted(config: object, given: dict) -> object:
    """The preset of the model, not that of the MLP; flags that were given stay. Raises UsageError for what only the MLP has."""
    for part in set(given.get("parts", ())) - set(PARTS):
        raise UsageError(f"--parts {part} is of the MLP; for --model {config.model} there are {' '.join(PARTS)}")
    for flag in MLP_FLAGS:
        if flag in given:
            raise UsageError(f"--{flag.replace('_', '-')} is read by parts of the MLP only; leave it out with --model {config.model}")
    preset = {"rhos": (), "members": (), "lrs": (MODELS[config.model],), **PRESETS[config.preset]}
    if "dense" not in config.parts:
        preset["rhos"] = ()                                   # those of a preset are of its own part
    config = dataclasses.replace(config, **{k: v for k, v in preset.items() if k not in given})
    if {"p", "group_moduli"} <= set(given) and config.parts == ("groups",):
        raise UsageError("--p and --group-moduli both name the moduli of --parts groups; leave one out")
    if "p" in given:
        config = dataclasses.replace(config, free_moduli=given.get("free_moduli", config.p), group_moduli=given.get("group_moduli", config.p))
    settings.check_members(config, {"concentration": config.free_seeds})
    return config


# ---------------------------------------------------------------- cells

def expected(model: str, p: int, lr: float, rho: float | None = None) -> int:
    """Steps to grok by the published medians: for budgets and the estimate of time, never for a result."""
    if model == "transformer_ln":    # the total norm held at p=59: 3 times as long as free at rho 0.85, beyond every budget at 1.15
        steps = 1919 * (71 / p) ** 1.5 * (1 if rho is None else 3 if rho < 1 else 40)
    else:
        steps = 7300 if rho is None else 6608 * math.exp(15.45 * (min(rho, SATURATED) - 1))
    return int(steps * (MODELS[model] / lr) ** 0.8)


def named(arm: str, config: object, p: int, block: int, rho: float | None = None, group: str = "", lr: float | None = None,
          frac: float = 0.40) -> str:
    parts = [arm, *([group] if group else []), f"p{p}", f"b{block}"]
    parts += ["rho" + exactly(rho, ".2f")] if rho is not None else []
    parts += ["lr" + exactly(lr, "g")] if lr not in (None, config.lrs[0]) else []
    return "_".join(parts + (["frac" + exactly(frac, "g")] if frac != 0.40 else []))


def cell(config: object, p: int, block: int, budget: int, rho: float | None = None, group: str = "", w_c: float | None = None,
         lr: float | None = None, frac: float = 0.40) -> Cell:
    """Free, or one norm held at rho times its value `w_c` at grokking: the total, or that of `group`."""
    members, lr, arm = config.members or tuple(range(block)), lr or config.lrs[0], "free" if rho is None else "clamp"
    held = tuple(rho * w_c if name == group else 0.0 for name in ("", *GROUPS)) if w_c else ()
    return Cell(named(arm, config, p, block, rho, group, lr, frac), p=p, members=members, block=block, arm=arm,
                budget_steps=min(config.budget, budget), model=config.model, seed0=config.seed0, train_frac=frac, rho=rho, lr=lr, w_c=w_c,
                clamp_start=clamp_start(config.model, "ce"), held=(held,) * len(members) if held else (),
                expected_steps=expected(config.model, p, lr, None if group else rho), after_grok=config.after_grok)


def control_cells(config: object) -> list[Cell]:
    """Free runs that held cells refer to."""
    cells = []
    if "dense" in config.parts:
        cells += [cell(config, p, config.seeds, 60_000) for p in config.p]
    if "groups" in config.parts:
        cells += [cell(config, p, config.seeds, 60_000) for p in config.group_moduli]
    return unique(cells)


def other_free_cells(config: object) -> list[Cell]:
    """The free runs of the concentration part that are no control."""
    cells, controls = [], {cell.name for cell in control_cells(config)}
    if "concentration" in config.parts:
        block, p0, lr = config.free_seeds, config.p[0], config.lrs[0]
        cells += [cell(config, p, block, 60_000) for p in config.free_moduli]
        cells += [cell(config, p0, block, 60_000, frac=frac) for frac in config.train_fracs or FRACTIONS]
        cells += [cell(config, p0, block, 60_000, lr=rate) for rate in (config.lrs if len(config.lrs) > 1 else (lr / 2, lr, 2 * lr))]
    return [cell for cell in unique(cells) if cell.name not in controls]


def clamp_cells(config: object, w_c: dict[str, dict[str, float]]) -> list[Cell]:
    """Cells held relative to the norms `{"": total, group: its norm}` at grokking of their control; without one they are left out."""
    cells = []
    for p in config.p if "dense" in config.parts else ():
        for rho in (config.rhos or DOSES[config.model]) if (norms := w_c.get(named("free", config, p, config.seeds))) else ():
            cells.append(cell(config, p, config.seeds, 40_000 if rho <= 1.05 else 200_000, rho, w_c=norms[""]))
    for p in config.group_moduli if "groups" in config.parts else ():
        for group in GROUP_DOSES if (norms := w_c.get(named("free", config, p, config.seeds))) else ():
            cells += [cell(config, p, config.seeds, 20_000, rho, group, norms[group]) for rho in config.rhos or GROUP_DOSES[group]]
    return unique(cells)


def critical_norms(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Of every free cell that has a run which grokked: medians of the norms at each run's own T_grok, the total under ""."""
    grokked = [run for run in runs if run["arm"] == "free" and not run["censored"]]
    return {name: {group: float(np.median([run[column(group)] for run in grokked if run["cell"] == name])) for group in ("", *GROUPS)}
            for name in dict.fromkeys(run["cell"] for run in grokked)}


def guess(controls: list[Cell]) -> dict[str, dict[str, float]]:
    """For a dry run's list only; the real norms come from the control."""
    return {c.name: dict.fromkeys(("", *GROUPS), 30.0) for c in controls}


def column(group: str) -> str:
    return f"norm_{group}_at_grok" if group else "norm_at_grok"


# ---------------------------------------------------------------- measurement

def measure(runs: list[dict], config: object) -> tuple[dict[str, dict], dict, list[dict]]:
    """Claims by id, the fits that the figures draw, and findings beyond the paper."""
    m, fits = Measured(runs, [], "A.", answers=config.lrs[0] == MODELS[config.model] and config.model != "transformer_b"), {}
    own = "A.ln." if config.model == "transformer_ln" else "A.tf."
    m.known = {key: row for key, row in m.known.items() if key.startswith(own)}
    for p in config.p:
        dose(m, fits, config, p)
    groups(m)
    concentration(m, config)
    return m.claims, fits, m.findings


def norms(m: Measured, cells: tuple[str, ...], group: str) -> np.ndarray:
    """Norm at own T_grok `(cells, members)`; not a number where a run did not grok."""
    return np.array([[r[column(group)] for r in m.runs if r["cell"] == name] for name in cells], dtype=float)


def dose(m: Measured, fits: dict, config: object, p: int) -> None:
    """Section 7: W_c, the medians, alpha, saturation; and by how much the total norm moves T_grok."""
    control = named("free", config, p, config.seeds)
    cells = {c["rho"]: name for name, c in sorted(m.first.items(), key=lambda item: item[1]["rho"] or 0)
             if c["arm"] == "clamp" and c["p"] == p and c["held_norm"] is not None}
    if p == 59 and m.have(control) and np.isfinite(norms(m, (control,), "")).any():
        m.claim("A.tf.wc", (control,), lambda picks: np.nanmedian(norms(m, (control,), "")[0][picks], -1))
    for rho, name in cells.items() if p == 59 else ():
        m.claim(f"A.tf.rho{rho:.2f}", (name,), m.T(name))
    if len(cells) < 2:
        return
    low, high = min(cells), max(cells)
    m.finding(f"norm_factor.p{p}", f"median T_grok at rho {high:g} over rho {low:g}, total norm held", (cells[high], cells[low]),
              m.ratio(cells[high], cells[low]))
    if np.isfinite(m.grok[cells[low]]).all() and not np.isfinite(m.grok[cells[high]]).all():
        reached = np.minimum(m.grok[cells[high]], m.first[cells[high]]["budget_steps"])
        m.finding(f"norm_factor_at_least.p{p}", f"the same with censored runs counted at their budget: a lower bound at rho {high:g}",
                  (cells[high], cells[low]), lambda picks: stats.median(reached[picks]) / m.T(cells[low])(picks))
    if m.have(control):
        for rho, name in cells.items():
            m.finding(f"total_over_free.{name}", f"median T_grok, total norm held at rho {rho:g}, over free", (name, control), m.ratio(name, control))
            if np.isfinite(pair := norms(m, (name, control), "unembed")).all():
                m.finding(f"unembed_over_free.{name}", f"median norm of the unembedding at own T_grok, total norm held at rho {rho:g}, over free",
                          (name, control), lambda picks, pair=pair: np.divide(*np.median(pair[:, picks], -1)))
    fitted = {rho: name for rho, name in cells.items() if rho <= max(FIT) + 1e-9}
    if len(fitted) < 2:
        return
    rho = np.array([*fitted])

    def log_medians(picks: np.ndarray) -> np.ndarray:
        return np.log(np.stack([m.T(name)(picks) for name in fitted.values()], -1))      # (B, doses)
    slope = lambda picks: stats.line(rho, log_medians(picks))[0]  # noqa: E731
    missing = "" if set(FIT) <= set(fitted) else f"fitted to rho {' '.join(f'{x:g}' for x in fitted)}, the paper to {' '.join(map(str, FIT))}"
    n = len(m.grok[cells[low]])
    _, intercept, r2 = stats.line(rho, log_medians(np.arange(n)[None])[0])
    fits[f"dense.p{p}"] = {"alpha": stats.resampled(n, slope), "intercept": float(intercept), "r2": float(r2), "rhos": rho.tolist()}
    if p == 59:
        m.claim("A.tf.alpha", tuple(fitted.values()), slope, missing)
        if SATURATED in cells:
            def saturation(picks: np.ndarray) -> np.ndarray:
                a, b, _ = stats.line(rho, log_medians(picks))
                return m.T(cells[SATURATED])(picks) / np.exp(b + a * SATURATED)
            m.claim("A.tf.saturation", (*fitted.values(), cells[SATURATED]), saturation, missing)


def groups(m: Measured) -> None:
    """One group held alone: median T_grok, and its ratio to the free control."""
    for name, c in m.first.items():
        held = [group for group in GROUPS if c.get(f"held_{group}") is not None]
        if c["arm"] != "clamp" or not held:
            continue
        control = next(k for k, other in m.first.items() if other["arm"] == "free" and all(other[x] == c[x] for x in SAME))
        if c["p"] == PAPER_GROUP_P:
            m.claim(f"A.ln.{held[0]}{float(c['rho'])}", (name,), m.T(name))
            m.claim("A.ln.none", (control,), m.T(control))
        m.finding(f"group_over_free.{name}", f"median T_grok, {held[0]} held at rho {c['rho']:g}, over free", (name, control),
                  m.ratio(name, control))


def concentration(m: Measured, config: object) -> None:
    """CV of the norms at grokking over train fractions and over learning rates; the exponent of the unembedding's over p."""
    if "concentration" not in config.parts:
        return
    block, p0, lr0 = config.free_seeds, config.p[0], config.lrs[0]
    free = {name: c for name, c in m.first.items() if c["arm"] == "free" and c["block"] == block}
    over = {"fraction": tuple(k for k, c in free.items() if (c["p"], c["lr"]) == (p0, lr0)),
            "lr": tuple(k for k, c in free.items() if (c["p"], c["train_frac"]) == (p0, 0.40))}
    for what, cells in over.items():
        for group in ("", *GROUPS) if len(cells) >= 2 else ():
            values = norms(m, cells, group)                               # (cells, members)
            cv = lambda picks, values=values: (lambda t: np.nanstd(t, (0, 2), ddof=1) / np.nanmean(t, (0, 2)))(values[:, picks])  # noqa: E731
            if not np.isfinite(values).any(1).all():
                continue
            label = f"{group or 'total'}.over_{what}.p{p0}"
            m.finding(f"cv.{label}", f"CV of the {group or 'total'} norm at own T_grok, members of {len(cells)} {what}s together", cells, cv)
            m.finding(f"cv_of_medians.{label}", f"CV over {what}s of the median {group or 'total'} norm at own T_grok", cells,
                      lambda picks, values=values: (lambda t: np.std(t, 0, ddof=1) / np.mean(t, 0))(np.nanmedian(values[:, picks], -1)))
            if what == "fraction":
                ran = [free[k]["train_frac"] for k in cells]
                enough = min(ran) <= min(FRACTIONS) and max(ran) >= max(FRACTIONS) and len(ran) >= 4
                m.claim(f"A.ln.{group or 'total'}_cv", cells, cv, "" if enough else f"train fractions {min(ran):g} to {max(ran):g} only")
    by_p = tuple(k for k, c in free.items() if (c["lr"], c["train_frac"]) == (lr0, 0.40))
    if len({free[k]["p"] for k in by_p}) >= 3:
        values, log_p = norms(m, by_p, "unembed"), np.log([free[k]["p"] for k in by_p])
        power = lambda picks: stats.line(log_p, np.log(np.nanmedian(values[:, picks], -1)).T)[0]  # noqa: E731
        m.finding("power.unembed", "exponent of the unembedding norm at own T_grok ~ p^k", by_p, power)
        m.claim("A.ln.unembed_power", by_p, power)
