"""Paper B (arXiv 2606.18465): how each claim of `exp_logit_scale.py` is measured, from the rows of `runs.csv` and `around_grok.csv` alone.

Statistics take members `picks (B, members)` to `(B,)` (`measured.Measured`). L of a cell: mean over members of the effective logit scale at the
logged step nearest the cell's median T_grok, as the paper has it.
"""
import math
from collections.abc import Callable

import numpy as np

from common import LOG_EVERY, MODELS
from lab import stats
from lab.answers import ROOT, Measured

EARLY = 600                           # step right after the clamp engages, where L is not yet an outcome
DOSE_CELLS = {43: 6}                  # cells behind a published row of Table 1; elsewhere 7
COLLAPSE_FREE, JUMP = 1.15, 2.5       # Table 1 fits rho up to the first, and stops before the first jump of L by more than the second
CONFOUNDED = {"collapse": 0.05, "factor": 1.3}   # Table 8: a float32 cell is an artefact above this collapse rate, or this far from float64
PAPER_TRANSFORMER, LAST_TAU = (59, 32.49), 1.7   # p and given norm of the transformer table; its higher temperature


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


def measure(runs: list[dict], log: list[dict], plan: object) -> Measured:
    config = plan.config
    m = Measured(runs, log, "B.", answers=config.lr == MODELS[config.model])
    m.known = {key: m.known[key] for key in published(config) if key in m.known}
    for p in config.p:
        for loss in plan.losses:
            mediation(m, plan, p, loss)
        if "grid" in config.parts:
            collapse(m, plan, p)
        if "allocation" in config.parts:
            allocation(m, plan, p)
    for p in config.moduli if "dose" in config.parts else ():
        dose(m, plan, p)
    if "audit" in config.parts:
        audit(m, plan)
    return m


def published(config: object) -> dict[str, dict]:
    """The published rows that runs of this network may answer: those of the transformer were made with `transformer_b`."""
    model = {"mlp": "mlp", "transformer_b": "transformer"}.get(config.model)
    return {key: row for key, row in stats.published(ROOT / "published.csv", "B.").items()
            if row["model"] == model and not key.startswith("B.fork.")}


def ups(plan: object, p: int, loss: str) -> tuple[str, ...]:
    """Cells of the raised norm over temperature, tau = 1 first."""
    return tuple(plan.name("clamp", p, plan.config.seeds, loss, plan.up, tau) for tau in (1.0, *(t for t in plan.taus if t != 1)))


def mediation(m: Measured, plan: object, p: int, loss: str) -> None:
    """Table 2 and the tables of its cells: norm up, temperature back, what part of the delay the logit scale recovers."""
    base, sweep, control = plan.name("clamp", p, plan.config.seeds, loss, 1.0), ups(plan, p, loss), plan.name("free", p, plan.config.seeds, loss)
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
    if plan.paper_up and plan.taus[-1] == LAST_TAU and (p, plan.config.w_c) == PAPER_TRANSFORMER:
        m.claim("B.tf.effect", (up, sweep[-1]), m.ratio(up, sweep[-1]))
    if plan.paper_up:
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
    if loss == "ce" and plan.paper_up and plan.paper_taus:
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


def collapse(m: Measured, plan: object, p: int) -> None:
    """Table 3: what explains ln T_grok over the grid of norm and temperature."""
    cells = tuple(plan.name("clamp", p, plan.config.seeds, "ce", rho, tau) for rho, tau in plan.grid)
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

    if plan.paper_grid:
        m.claim(f"B.collapse.r2_logit.p{p}", cells, explained(late))
        m.claim(f"B.collapse.r2_rho.p{p}", cells, explained(norm))
        m.claim(f"B.collapse.r2_both.p{p}", cells, explained(late, norm))
        m.claim(f"B.collapse.dr2.p{p}", cells, lambda picks: explained(late, norm)(picks) - explained(late)(picks))
    models = {"L": (late,), "rho": (norm,), "L+rho": (late, norm), f"L{EARLY}": (early,), f"L{EARLY}+rho": (early, norm), "rho+ln_tau": (norm, heat)}
    for label, columns in models.items():
        m.finding(f"r2.{label}.p{p}", f"R^2 of ln T_grok on {label.replace('+', ' and ')}, {len(cells)} cells", cells, explained(*columns))
        m.finding(f"aicc.{label}.p{p}", f"AICc of ln T_grok on {label.replace('+', ' and ')}", cells, explained(*columns, score=1))


def dose_cells(m: Measured, plan: object, p: int) -> tuple[list[str], list[str]]:
    """Clamped cells of the dose part by norm, and those that Table 1 fits: a majority grokked, rho <= 1.15, before the first jump of L."""
    block, everyone = plan.dose_block(p), []
    for rho in plan.dose_rhos:
        if m.have(cell := plan.name("clamp", p, block, "ce", rho)):
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


def dose(m: Measured, plan: object, p: int) -> None:
    """Table 1: ln T_grok over the held norm, the three forms by AIC, lack of fit, local slopes; how high a norm weight decay alone leaves."""
    everyone, fitted = dose_cells(m, plan, p)
    control = plan.name("free", p, plan.dose_block(p), "ce")
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
        frontier = [r for r in m.runs if r["arm"] == "free" and (r["p"], r["block"]) == (p, plan.dose_block(p)) and r["norm_at_grok"] is not None]
        top = max(m.first[cell]["held_norm"] for cell in everyone)
        for wd in dict.fromkeys(r["weight_decay"] for r in frontier):
            mine = [r["norm_at_grok"] for r in frontier if r["weight_decay"] == wd]
            m.finding(f"free_norm.p{p}.wd{wd:g}", "largest norm at own T_grok of a free run, over W_c",
                      (next(r["cell"] for r in frontier if r["weight_decay"] == wd),),
                      max(mine) / m.first[everyone[0]]["w_c"])
        if frontier:
            m.finding(f"frontier.p{p}", "largest norm at own T_grok of any free run, over the highest held norm",
                      tuple(dict.fromkeys(r["cell"] for r in frontier)),
                      max(r["norm_at_grok"] for r in frontier) / top)


def audit(m: Measured, plan: object) -> None:
    """Table 8: the same held norm trained in float32 and in float64; is the float32 cell one of softmax collapse?"""
    config, p = plan.config, plan.config.p[0]
    for rho, tau in plan.audited:
        single, double = (plan.name("clamp", p, config.audit_seeds, "ce", rho, tau, dtype=dtype) for dtype in ("float32", "float64"))
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


def allocation(m: Measured, plan: object, p: int) -> None:
    """Appendix: T_grok and logit scale over the split of the squared norm at fixed total."""
    cells = [cell for gamma in sorted(plan.config.gammas) if m.have(cell := plan.name("alloc", p, plan.config.seeds, "ce", gamma=gamma))]
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
