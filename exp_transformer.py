"""The delay law on transformers: paper A, section 7 (arXiv 2606.13753), and paper B's transformer table (arXiv 2606.18465).

Claims
  transformer     no LayerNorm: free networks grok at W_c = 36.9 (p=59); held at rho W_c, T_grok grows as exp(15.4 rho); at rho 1.20 it saturates
  transformer_ln  with LayerNorm: over train fractions the total norm at grokking varies (CV 0.16), that of the unembedding hardly (0.04); it
                  grows as p^0.77. Of the groups held alone at rho times their own norm at grokking, the unembedding moves T_grok about twofold
  transformer_b   held at 1.15 W_c, a temperature of 1.7 makes T_grok 4.7 times shorter (p=59)

A claim is REPLICATED if our 95% interval over fresh networks meets the published one or the value +- 3% (lab/stats.py). A run that does not
grok within its budget is censored there and counts as later; none is dropped.
W_c is the median, over the members that grok, of a norm at their own T_grok in the free control: same p, same block, first of --lrs.
Parts: `dense` holds the total norm, `groups` one group at a time, `concentration` trains freely over train fraction, learning rate and p,
`temperature` raises the held norm and divides the logits by tau.
CV: standard deviation over mean of the norms at own T_grok, all members of all fractions (or learning rates) together.

    python exp_transformer.py                              laptop preset: control and four doses, no LayerNorm, 3 members, half an hour on 2 cores
    python exp_transformer.py --model transformer_ln --preset paper     all of section 7 with LayerNorm, for a GPU
    python exp_transformer.py --parts temperature --w-c 32.49242        multiples of paper B's own norm, and its network
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

from common import MODELS, Cell, Result, UsageError, cell_name, unique
from kernels.layout import TransformerLayout
from lab import console, delay, figures, mediation, own, settings, stats
from lab.answers import SAME, Table, answer, at_doses, published
from lab.desk import Lab, main

PARTS = ("dense", "groups", "concentration", "temperature")
GROUPS = TransformerLayout.groups                              # embed, attn, mlp, unembed
DOSES = {"transformer": (0.85, 1.00, 1.15, 1.20), "transformer_ln": (0.85, 1.00, 1.15), "transformer_b": (0.85, 1.00, 1.15, 1.20)}
GROUP_DOSES = {"unembed": (0.85, 1.00, 1.15, 1.30), "mlp": (0.85, 1.30), "embed": (1.30,)}
FRACTIONS = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55)
RAISED, TAUS = 1.15, (1.0, 1.15, 1.3, 1.5, 1.7)                # paper B's transformer table


@dataclass(frozen=True)
class Config(settings.Config):
    model: str = settings.option("transformer", "transformer, transformer_ln (with LayerNorm) or transformer_b (as in paper B's released runs, "
                                 "of the part temperature if left out)")
    seeds: int = settings.option(16, "block size of dense and groups: members drawn from one generator; member 3 of 12 is not member 3 of 8",
                                 parts=("dense", "groups"), fresh=True)
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c; default: each part's own; temperature raises to the largest", float,
                                              ("dense", "groups", "temperature"))
    lrs: tuple[float, ...] = settings.option((5e-4,), "learning rates of the concentration part, the first everybody's; default: the model's own, "
                                             "and of concentration half and twice that", all_of=("concentration",))
    train_fracs: tuple[float, ...] = settings.option((), "train fractions of the concentration part; default .25 to .55 by .05", float,
                                                     ("concentration",))
    free_moduli: tuple[int, ...] = settings.option((29, 41, 59, 79, 97), "moduli of the concentration part; --p replaces them",
                                                   parts=("concentration",))
    free_seeds: int = settings.option(20, "block size of the concentration part", parts=("concentration",), fresh=True)
    group_moduli: tuple[int, ...] = settings.option((71,), "moduli of the groups part; --p replaces them", parts=("groups",))
    taus: tuple[float, ...] = settings.option((), "temperatures at the raised norm, 1 always among them; default 1 1.15 1.3 1.5 1.7", float,
                                              ("temperature",))
    temperature_seeds: int = settings.option(12, "block size of the temperature part", parts=("temperature",), fresh=True)
    w_c: float = settings.option(0.0, "hold multiples of this total norm and train no control (paper B's: 32.49242, from the end of its free "
                                 "runs); 0 = the control's", parts=("dense", "temperature"), fresh=True)
    budget: int = settings.option(200_000, "largest step at which a run that has not grokked is censored; cells with a smaller one keep it",
                                 fresh=True)


PRESETS = {
    "smoke": {"parts": ("dense",), "rhos": (0.85,), "lrs": (2e-3,), "members": (0,)},
    "laptop": {"parts": ("dense",), "rhos": (0.85, 0.90, 0.95, 1.00), "taus": (1.7,), "members": (0, 1, 2)},
    "paper": {"parts": ("dense", "groups", "concentration"), "networks": ("published", "fresh")},
}
# the papers' runs by part
RELEASED = {"dense": ("tfnoln_long", "tfnoln"), "groups": ("tfnormint",), "concentration": ("tfgrok",), "temperature": ("transformer",)}


def checked(config: Config, given: dict) -> Config:
    """Part, doses and learning rate follow the model; `--p` narrows every part. Raises UsageError for values that do not fit each other."""
    model = given.get("model", "transformer_b" if "temperature" in given.get("parts", ()) else config.model)
    if model == "mlp":
        raise UsageError("--model mlp is what exp_delay_law.py trains; here it is transformer, transformer_ln or transformer_b")
    parts = config.parts if "parts" in given or model != "transformer_b" or config.preset == "smoke" else ("temperature",)
    rates = given.get("lrs") or PRESETS[config.preset].get("lrs") or (MODELS[model],)
    rhos = config.rhos if "rhos" in given or "dense" in parts else ()        # those of a preset are of its own part
    config = dataclasses.replace(config, model=model, parts=parts, lrs=rates, rhos=rhos)
    if model == "transformer_ln":                                            # the released block, and its moduli
        config = dataclasses.replace(config, free_seeds=given.get("free_seeds", 12), free_moduli=given.get("free_moduli", (53, 71, 97)))
    if {"p", "group_moduli"} <= set(given) and config.parts == ("groups",):
        raise UsageError("--p and --group-moduli both name the moduli of --parts groups; leave one out")
    if "p" in given:
        config = dataclasses.replace(config, free_moduli=given.get("free_moduli", config.p), group_moduli=given.get("group_moduli", config.p))
    if ("w_c" in given and config.w_c <= 0) or (config.w_c and (len(config.p) > 1 or "groups" in config.parts)):
        raise UsageError("--w-c is one positive total norm: it goes with one --p, and not with --parts groups")
    settings.check_members(config, {"concentration": config.free_seeds, "temperature": config.temperature_seeds})
    return config


# ---------------------------------------------------------------- cells

def expected(model: str, p: int, lr: float, rho: float | None = None, tau: float = 1.0) -> int:
    """Steps to grok by the published medians: for budgets and the estimate of time, never for a result."""
    if model == "transformer_ln":    # the total norm held at p=59: 3 times as long as free at rho 0.85, beyond every budget at 1.15
        steps = 1919 * (71 / p) ** 1.5 * (1 if rho is None else 3 if rho < 1 else 40)
    elif model == "transformer_b" and rho:
        steps = 1238 * math.exp(17.1 * (min(rho, RAISED) - 1)) * max(tau, 0.05) ** -2.9
    else:
        steps = 7300 if rho is None else 6608 * math.exp(15.45 * (min(rho, 1.20) - 1))
    return int(steps * (MODELS[model] / lr) ** 0.8)


def cell(config: Config, p: int, block: int, budget: int, rho: float | None = None, group: str = "", w_c: float | None = None,
         lr: float = 0.0, frac: float = 0.40, tau: float | None = None) -> Cell:
    """Free, or one norm held at rho times its value `w_c` at grokking: the total, or that of `group`. `tau`: in the name where it is given."""
    members, lr = config.members or tuple(range(block)), lr or config.lrs[0]
    name = cell_name(("free" if rho is None else "clamp", group, f"p{p}", f"b{block}"), ("rho", ".2f", rho, None), ("tau", ".2f", tau, None),
                     ("lr", "g", lr, config.lrs[0]), ("frac", "g", frac, 0.40))
    held = tuple(rho * w_c if each == group else 0.0 for each in ("", *GROUPS)) if w_c else ()
    return Cell(name, p, members, block, min(config.budget, budget), model=config.model, seed0=config.seed0, train_frac=frac, rho=rho,
                tau=tau or 1.0, lr=lr, w_c=w_c, held=(held,) * len(members) if held else (), after_grok=config.after_grok,
                expected_steps=expected(config.model, p, lr, None if group else rho, tau or 1.0), **config.network())


def control_cells(config: Config) -> list[Cell]:
    """Free runs that held cells refer to."""
    cells = []
    for part, moduli, block in (("dense", config.p, config.seeds), ("groups", config.group_moduli, config.seeds),
                                ("temperature", config.p, config.temperature_seeds)):
        if part in config.parts:
            cells += [cell(config, p, block, 60_000) for p in moduli]
    return unique(cells)


def other_free_cells(config: Config) -> list[Cell]:
    """The free runs of the concentration part that are no control."""
    if "concentration" not in config.parts:
        return []
    block, p0, lr = config.free_seeds, config.p[0], config.lrs[0]
    cells = [cell(config, p, block, 60_000) for p in config.free_moduli]
    swept = config.free_moduli if config.model == "transformer_ln" else (p0,)
    cells += [cell(config, p, block, 60_000, frac=frac) for p in swept for frac in config.train_fracs or FRACTIONS]
    cells += [cell(config, p0, block, 60_000, lr=rate) for rate in (config.lrs if len(config.lrs) > 1 else (lr / 2, lr, 2 * lr))]
    controls = {control.name for control in control_cells(config)}
    return [other for other in unique(cells) if other.name not in controls]


def held_cells(config: Config, w_c: dict[str, dict[str, float]]) -> list[Cell]:
    """Cells held relative to the norms `{"": total, group: its norm}` at grokking of their control; without one they are left out."""
    cells, names = [], {(control.p, control.block): control.name for control in control_cells(config)}
    for p in config.p:
        if "dense" in config.parts and (norms := w_c.get(names[p, config.seeds])):
            cells += [cell(config, p, config.seeds, 40_000 if rho <= 1.05 else 200_000, rho, w_c=norms[""])
                      for rho in config.rhos or DOSES[config.model]]
        if "temperature" in config.parts and (norms := w_c.get(names[p, config.temperature_seeds])):
            cells.append(cell(config, p, config.temperature_seeds, 40_000, 1.0, w_c=norms[""], tau=1.0))
            cells += [cell(config, p, config.temperature_seeds, 120_000, max(config.rhos, default=RAISED), w_c=norms[""], tau=tau)
                      for tau in sorted({1.0, *(config.taus or TAUS)})]
    if "groups" in config.parts:
        for p in config.group_moduli:
            if norms := w_c.get(names[p, config.seeds]):
                cells += [cell(config, p, config.seeds, 20_000, rho, group, norms[group])
                          for group in GROUP_DOSES for rho in config.rhos or GROUP_DOSES[group]]
    return unique(cells)


def own_cells(config: Config, given: dict) -> list[Cell]:
    """The papers' own networks: those of their cells that the flags leave; of a temperature always tau 1, and the baseline, rho 1."""
    cells = []
    for part in config.parts:
        rows = [row for row in published().values() if row["experiment"] in RELEASED[part] and row["model"] == config.model]
        only = {column: given.get(flag, ()) for column, flag in (("rho", "rhos"), ("lr", "lrs"), ("train_frac", "train_fracs"))}
        if part == "temperature":
            only["rho"] = (1.0, *given["rhos"]) if "rhos" in given else ()
            only["tau"] = (1.0, *given["taus"]) if "taus" in given else ()
        moduli = {"groups": "group_moduli", "concentration": "free_moduli"}.get(part, "p")
        cells += own.cells(rows, given.get("members", ()), p=given.get(moduli, given.get("p", ())), **only)
    return cells


def critical_norms(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Of every free cell that has a run which grokked: medians of the norms at each run's own T_grok, the total under ""."""
    by_group = {group: stats.critical_norms(runs, column(group)) for group in ("", *GROUPS)}
    return {name: {group: norms[name] for group, norms in by_group.items()} for name in by_group[""]}


def column(group: str) -> str:
    return f"norm_{group}_at_grok" if group else "norm_at_grok"


# ---------------------------------------------------------------- what is measured

FITTED, SATURATED = (0.85, 1.00, 1.15), 1.20                   # doses of the published alpha, and of the saturation


def total_held(table: Table, **conditions: object) -> list[str]:
    """Dose response: cells with the total norm held, tau 1, by rho."""
    return table.pick(arm="clamp", group="", tau=1, train_frac=0.40, **conditions)


def series(table: Table, varied: str, **conditions: object) -> list[str]:
    """Free cells that differ in `varied` alone: the longest such series. Each of paper A's own cells has a seed of its own."""
    same = [key for key in SAME if key != varied and (key != "seed0" or table.networks == "fresh")]
    found: dict[tuple, list[str]] = {}
    for name in table.pick(arm="free", weight_decay=1, **conditions):
        found.setdefault(tuple(table.first[name][key] for key in same), []).append(name)
    return max(found.values(), key=len, default=[])


def cv_over_fractions(group: str) -> Callable[[Table, dict], tuple | None]:
    def statistic(table: Table, row: dict) -> tuple | None:
        own = table.networks == "published"
        p = {"p": 97} if own else {}     # the paper names no modulus; this one was chosen by its norms, so it cannot reproduce the number
        cells = series(table, "train_frac", model=row["model"], lr=MODELS[row["model"]], **p)
        ran = [table.first[name]["train_frac"] for name in cells]
        if len(cells) < 2:
            return None
        enough = min(ran) <= FRACTIONS[0] and max(ran) >= FRACTIONS[-1] and len(ran) >= 4
        missing = "p=97 was chosen to match" if own else "" if enough else f"train fractions {min(ran):g} to {max(ran):g} only"
        return cells, delay.cv(table, cells, column(group), 1), missing
    return statistic


def unembed_power(table: Table, row: dict) -> tuple | None:
    """k of the unembedding's norm at own T_grok ~ p^k."""
    cells = series(table, "p", model=row["model"], lr=MODELS[row["model"]], train_frac=0.40)
    norms, log_p = table.values(cells, column("unembed")), np.log([table.first[name]["p"] for name in cells])
    return (cells, lambda picks: stats.line(log_p, np.log(stats.finite_median(norms[:, picks])).T)[0], "") if len(cells) >= 3 else None


STATISTICS = {**delay.statistics({"tfnoln_long": FITTED}, SATURATED, lr=MODELS["transformer"], train_frac=0.40),
              "ratio": at_doses([(RAISED, 1.0), (RAISED, TAUS[-1])], lambda table, cells: table.ratio(*cells)),
              "cv_total": cv_over_fractions(""), "cv_unembed": cv_over_fractions("unembed"), "power_unembed": unembed_power}


def measure(table: Table, config: Config, read: dict[str, list[dict]]) -> None:
    """Fills `table`: published numbers that these runs answer, and what they say beyond."""
    rows = published("A.") | published("B.tf.")
    if config.w_c:                                           # a norm given to four digits or more; another one answers nothing
        rows = {key: row for key, row in rows.items() if math.isclose(row["w_c"] or 0, config.w_c, rel_tol=5e-4)}
    answer(table, rows.values(), STATISTICS)
    delay.tell(table, rows, STATISTICS, {
        "A.tf.alpha": "alpha", "A.tf.saturation": "T_grok at rho 1.20 over the line", "A.ln.total_cv": "CV of the total norm over train fractions",
        "A.ln.unembed_cv": "CV of the unembedding's norm", "B.tf.effect": "T_grok at tau 1 over 1.7, rho 1.15"})
    if table.networks == "published":
        return
    for p in dict.fromkeys(table.first[name]["p"] for name in total_held(table, block=config.seeds)):
        total_norm(table, p, total_held(table, block=config.seeds, p=p))
    for name in table.pick(arm="clamp"):
        group, control = table.first[name]["group"], table.control(name)
        if group and control:
            text = f"{group} held at rho {table.first[name]['rho']:g}, over free"
            table.finding(f"group_over_free.{name}", f"median T_grok, {text}", (name, control), table.ratio(name, control),
                          law=f"T_grok, {text}" if group == "unembed" else "")
    concentration(table, config)
    for base, cells in sweeps(table).items():                # how much of what norm and temperature do the logit scale L accounts for
        mediation.findings(table, (base, *cells), table.first[base]["clamp_start"])          # at that step L is not yet an outcome
    delay.findings(table, read)


def total_norm(table: Table, p: int, cells: list[str]) -> None:
    """By how much the total norm moves T_grok, and what the norm of the unembedding does meanwhile."""
    for name in cells:
        control = table.control(name)
        if control:
            rho = table.first[name]["rho"]
            table.finding(f"total_over_free.{name}", f"median T_grok, total norm held at rho {rho:g}, over free", (name, control),
                          table.ratio(name, control))
            pair = table.values((name, control), column("unembed"))                          # (2, members)
            if np.isfinite(pair).all():
                table.finding(f"unembed_over_free.{name}", f"median norm of the unembedding at own T_grok, total norm held at rho {rho:g}, over free",
                              (name, control), lambda picks, pair=pair: np.divide(*np.median(pair[:, picks], -1)))
    if len(cells) < 2:
        return
    low, high = cells[0], cells[-1]
    doses = f"rho {table.first[high]['rho']:g} over rho {table.first[low]['rho']:g}"
    table.finding(f"norm_factor.p{p}", f"median T_grok at {doses}, total norm held", (high, low), table.ratio(high, low),
                  law=f"T_grok at {doses}, p={p}")
    if np.isfinite(table.grok[low]).all() and not np.isfinite(table.grok[high]).all():
        reached = np.minimum(table.grok[high], table.first[high]["budget_steps"])
        table.finding(f"norm_factor_at_least.p{p}", f"the same with censored runs counted at their budget: a lower bound at {doses}", (high, low),
                      lambda picks: table.median(reached[picks]) / table.T(low)(picks))


def concentration(table: Table, config: Config) -> None:
    """CV of the norms at grokking over train fractions and over learning rates; the exponent of the unembedding's over p."""
    lr = config.lrs[0]
    for what, cells in (("fraction", series(table, "train_frac", lr=lr)), ("lr", series(table, "lr", train_frac=0.40))):
        for group in ("", *GROUPS):
            norms, norm = table.values(cells, column(group)), f"{group or 'total'} norm at own T_grok"
            if len(cells) < 2 or not np.isfinite(norms).any(1).all():
                continue

            def cv_of_medians(picks: np.ndarray, norms: np.ndarray = norms) -> np.ndarray:
                medians = stats.finite_median(norms[:, picks])                                # (cells, B)
                return np.std(medians, 0, ddof=1) / np.mean(medians, 0)
            label = f"{group or 'total'}.over_{what}.p{table.first[cells[0]]['p']}"
            table.finding(f"cv.{label}", f"CV of the {norm}, members of {len(cells)} {what}s together", cells,
                          delay.cv(table, cells, column(group), 1))
            table.finding(f"cv_of_medians.{label}", f"CV over {what}s of the median {norm}", cells, cv_of_medians)
    if found := unembed_power(table, {"model": config.model}):
        table.finding("power.unembed", "exponent of the unembedding norm at own T_grok ~ p^k", *found[:2])


def sweeps(table: Table) -> dict[str, list[str]]:
    """By baseline (rho 1, tau 1) the cells at the largest norm held above it, tau 1 first, then by tau; where there are two or more."""
    found = {}
    for base in total_held(table, rho=1):
        raised = [name for name in table.pick(arm="clamp", group="", **{k: table.first[base][k] for k in SAME}) if table.first[name]["rho"] > 1]
        tau = {table.first[name]["tau"]: name for name in raised if table.first[name]["rho"] == table.first[raised[-1]]["rho"]}
        if 1 in tau and len(tau) >= 2:
            found[base] = [tau.pop(1), *(tau[t] for t in sorted(tau))]
    return found


# ---------------------------------------------------------------- figures

def draw(table: Table, config: Config, folder: Path, trajectories: list[dict], read: dict[str, list[dict]]) -> None:
    rows = published("A.tf.") | published("A.ln.") | published("B.tf.")
    theirs = {"block": 16, "networks": "tfnoln_long"} if table.networks == "published" else {"block": config.seeds}
    if cells := total_held(table, lr=config.lrs[0], **theirs):
        figures.dose(table, cells, delay.within(table, cells, FITTED), rows.values(), "Delay law", folder, "dense")
    for p in config.group_moduli:
        if cells := [name for name in table.pick(arm="clamp", p=p) if table.first[name]["group"]]:
            draw_groups(table, cells, folder, f"groups_p{p}")
    points = figures.points(table, rows.values())
    for base, cells in sweeps(table).items():
        p = table.first[base]["p"]
        figures.mediation(folder, f"mediation_p{p}", f"memorisation_p{p}", [[points[name] for name in (base, *cells)]])
    for group in ("", "unembed"):
        figures.critical_norm(table, rows.values(), folder, group)
    figures.contraction(read["contraction.csv"], folder)
    if trajectories:
        figures.trajectories(trajectories, folder)


@figures.drawn
def draw_groups(table: Table, cells: list[str], folder: Path, file: str) -> None:
    """T_grok with one group held alone, side by side: a colour and a marker per group, medians joined at three doses or more."""
    found, control = figures.points(table, published("A.ln.").values()), table.control(cells[0])

    def over_doses(axis: plt.Axes, cells: list[str]) -> None:
        for i, group in enumerate(GROUPS):
            mine = [{**found[name], "x": found[name]["rho"] + 0.014 * (i - 1.5)} for name in cells if found[name]["group"] == group]
            if mine:
                figures.members(axis, mine, "x", f"C{i}", figures.MARKERS[2 + i], label=f"{group} held", width=0.003, published=f"C{i}")
            if len(mine) >= 3:
                axis.plot([point["x"] for point in mine], [point["median"] for point in mine], color=f"C{i}", ls=figures.LINES[i % 4], lw=1)
        if control:
            axis.axhline(found[control]["median"], color="gray", ls=(0, (1, 4)), lw=1, label="free control, median")
        axis.set(xlabel="held norm of the group / its norm at grokking, rho",
                 title=f"One group held at a time, {found[cells[0]]['model']}, p={found[cells[0]]['p']}")
    figures.sheet(folder, file, [cells], over_doses)


# ---------------------------------------------------------------- run

def publish(desk: Lab, result: Result | None) -> None:
    """Tables, verdicts, figures; without `result` from the tables that are there."""
    main_figure = {"dense": "dense", "groups": f"groups_p{desk.config.group_moduli[0]}", "concentration": "critical_norm_unembed",
                   "temperature": f"mediation_p{desk.config.p[0]}"}.get(desk.config.parts[0], "critical_norm")
    tables = {"contraction.csv": delay.contraction, "around_grok.csv": stats.around_grok}
    desk.publish(measure, draw, result, tables, main_figure=main_figure + ".png")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, PARTS, argv)
    config = checked(config, given)
    desk = Lab("transformer", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: publish(desk, None))
    theirs = own_cells(config, given) if "published" in config.networks else []
    fresh = config if "fresh" in config.networks else dataclasses.replace(config, parts=())
    norms = {control.name: dict.fromkeys(("", *GROUPS), config.w_c or 30.0) for control in control_cells(fresh)}   # 30: for a dry run's list only
    controls, others = [] if config.w_c else control_cells(fresh), other_free_cells(fresh)
    console.announce(config, own.some([*theirs, *controls, *others, *held_cells(fresh, norms)]))
    if config.dry_run:
        return None
    desk.open()
    result, ours = desk.train("published", theirs, deal=True), desk.train("control", controls)
    if controls:
        norms = critical_norms(ours.runs)
    console.say_norms(controls, norms)
    result += ours + desk.train("cells", [*others, *held_cells(fresh, norms)], deal=True)
    publish(desk, result)
    return desk.finish()


if __name__ == "__main__":
    main(run)
