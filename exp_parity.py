"""Sparse parity, a task without Fourier structure: paper A, section 8 (arXiv 2606.13753), and which of its law carries over (Table 2).

Claims: a dense MLP learns the product of the first k of n bits, -1 or 1, from m examples, long after it has memorised them.
  size         free networks grok at a norm that depends on m and n
  clamp        the total norm held at rho W_c moves T_grok, far less than in modular addition
  decay        free norms at grokking follow the weight decay, and the clamps lie on the frontier that they trace; at decay 5 nothing groks
  rate         over learning rates 5e-4 .. 2e-3 the norm at grokking varies by about 3%, T_grok by a factor of about 4
  temperature  beyond the paper: does the logit scale carry the delay here, too? tau divides the logits at the held norms

A claim is REPLICATED if our 95% interval over fresh networks meets the published one or the value +- 3% (lab/stats.py). A run that does not
grok within its budget is censored there and counts as later; none is dropped.
W_c is the median, over the members that grok, of the norm at their own T_grok in the free control: first of --n, --m and --lrs, weight decay 1.
Table 2 is properties.csv: a property of modular addition (A's number, and ours from the records in results/) beside the same of sparse parity. It
`transfers` if the two 95% intervals meet; where one has none its value +- 3% counts.

    python exp_parity.py                                           laptop preset: free, and two held norms, 3 members, minutes on 2 cores
    python exp_parity.py --preset paper --networks published       the paper's own networks, all parts, an hour on 2 cores
    python exp_parity.py --parts size --n 25 --m 800 --k 2         another size
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import Cell, Result, UsageError, cell_name, parity_sizes, unique
from lab import console, delay, figures, files, mediation, own, settings, stats
from lab.answers import ROOT, Table, answer, published
from lab.desk import Lab, main
from lab.tasks import parity_task

PARTS = ("size", "clamp", "decay", "rate", "temperature")


@dataclass(frozen=True)
class Config(settings.Config):
    model: str = settings.option("mlp_dense", "", "fixed")
    p: tuple[int, ...] = settings.option((), "", "fixed")
    n: tuple[int, ...] = settings.option((30, 20, 40), "bits; the first is everybody's, the others go with the first m", all_of=("size",))
    k: int = settings.option(3, "bits whose product is the label")
    m: tuple[int, ...] = settings.option((1000, 600, 1500), "training examples; the first is everybody's, the others go with the first n",
                                         all_of=("size",))
    task: str = settings.option("add", "", "fixed")
    width: tuple[int, ...] = settings.option((), "", "fixed")
    seeds: int = settings.option(16, "block size: members drawn from one generator; member 3 of 12 is not member 3 of 8", fresh=True)
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c; default: clamp .90 1 1.15 1.30, temperature 1.15 1.30", float,
                                              ("clamp", "temperature"))
    weight_decays: tuple[float, ...] = settings.option((), "weight decays of the decay part; default .3 .5 1 2 3 5", float, ("decay",))
    lrs: tuple[float, ...] = settings.option((1e-3, 5e-4, 2e-3), "learning rates of the rate part; the first is everybody else's", all_of=("rate",))
    taus: tuple[float, ...] = settings.option((0.5, 1.0, 1.7), "temperatures, 1 always among them", parts=("temperature",), fresh=True)
    w_c: float = settings.option(0.0, "hold multiples of this total norm and train no control (the paper's: 20.625); 0 = the control's",
                                 parts=("clamp", "temperature"), fresh=True)
    budget: int = settings.option(50_000, "step at which a run that has not grokked is censored", fresh=True)


PRESETS = {
    "smoke": {"parts": ("size",), "n": (12,), "k": 2, "m": (200,), "budget": 1000, "members": (0, 1)},
    "laptop": {"parts": ("clamp",), "rhos": (0.90, 1.30), "members": (0, 1, 2)},
    "paper": {"parts": PARTS, "networks": ("published", "fresh")},
}
RHOS, RAISED, DECAYS = (0.90, 1.00, 1.15, 1.30), (1.15, 1.30), (0.3, 0.5, 1.0, 2.0, 3.0, 5.0)


def checked(config: Config, given: dict) -> Config:
    """The settings. Raises UsageError for sizes that are no task, or values that do not fit each other."""
    for n in config.n:
        for m in config.m:
            parity_sizes(parity_task(n, config.k, m))
    if "w_c" in given and config.w_c <= 0:
        raise UsageError(f"--w-c must be a positive norm, got {config.w_c:g}")
    settings.check_members(config, {})
    return config


# ---------------------------------------------------------------- cells

def cell(config: Config, rho: float | None = None, w_c: float | None = None, tau: float = 1.0, n: int = 0, m: int = 0, wd: float = 1.0,
         lr: float = 0.0) -> Cell:
    """Free, or the total norm held at rho W_c. What is left out is the first of its flag."""
    n, m, lr, members = n or config.n[0], m or config.m[0], lr or config.lrs[0], config.members or tuple(range(config.seeds))
    arm = "free" if rho is None else "clamp"
    name = cell_name((arm, f"n{n}", f"k{config.k}", f"m{m}", f"b{config.seeds}"), ("", "", config.loss, "ce"), ("rho", ".2f", rho, None),
                     ("tau", "g", tau, 1.0), ("wd", "g", wd, 1.0), ("lr", "g", lr, config.lrs[0]))
    # by the paper's medians: for the estimate of time, never for a result
    steps = 2650 * (1000 / m) ** 5 * (n / 30) ** 9 * (1e-3 / lr) * max(wd, 0.1) ** -0.7 * math.exp(2.2 * ((rho or 1) - 1)) * 1.3
    steps = config.budget if wd >= 5 else min(steps, config.budget)
    return Cell(name, members=members, block=config.seeds, budget_steps=config.budget, model=config.model,
                seed0=config.seed0, rho=rho, tau=tau, lr=lr, weight_decay=wd, w_c=w_c,
                arm=arm, expected_steps=int(steps), after_grok=config.after_grok,
                **{**config.network(), "task": parity_task(n, config.k, m)})


def free_cells(config: Config) -> list[Cell]:
    """The control first; none where its norm is given and no other part is free."""
    if config.w_c and not {"size", "decay", "rate"} & set(config.parts):
        return []
    cells = [cell(config)]
    if "size" in config.parts:
        cells += [cell(config, m=m) for m in config.m] + [cell(config, n=n) for n in config.n]
    if "decay" in config.parts:
        cells += [cell(config, wd=wd) for wd in config.weight_decays or DECAYS]
    if "rate" in config.parts:
        cells += [cell(config, lr=lr) for lr in config.lrs]
    return unique(cells)


def held_cells(config: Config, w_c: float | None) -> list[Cell]:
    """Cells at multiples of `w_c`; none without one."""
    cells = []
    if w_c and "clamp" in config.parts:
        cells += [cell(config, rho, w_c) for rho in config.rhos or RHOS]
    if w_c and "temperature" in config.parts:
        cells += [cell(config, 1.0, w_c)] + [cell(config, rho, w_c, tau) for rho in config.rhos or RAISED for tau in {1.0, *config.taus}]
    return unique(cells)


def own_cells(config: Config, given: dict) -> list[Cell]:
    """The paper's own networks: those of its cells that the flags leave. It has no temperatures."""
    rows = []
    for row in published("A.parity").values():
        if row["arm"] and parity_sizes(row["task"])[1] == config.k:
            n, _, m = parity_sizes(row["task"])
            if row["arm"] == "clamp":
                part = "clamp"
            elif row["experiment"] == "parity":
                part = "size"
            else:
                part = "rate" if row["lr"] != 1e-3 else "decay"
            shared = part == "decay" and row["wd"] == 1.0 and "rate" in config.parts      # one cell of both series
            if (part in config.parts or shared) and n in given.get("n", (n,)) and m in given.get("m", (m,)):
                rows.append(row)
    return own.cells(rows, given.get("members", ()), rho=given.get("rhos", ()), lr=given.get("lrs", ()), wd=given.get("weight_decays", ()))


# ---------------------------------------------------------------- what is measured

def series(table: Table, varied: str, task: str) -> list[str]:
    """Free cells of one task that differ in `varied` alone, lr or weight_decay, by it. Each of the paper's own has a seed of its own."""
    same = {"lr": {"weight_decay": 1}, "weight_decay": {"lr": 1e-3}}[varied]
    found = table.pick(arm="free", task=task, networks="fresh" if table.networks == "fresh" else "parity_lambda", **same)
    return sorted(found, key=lambda cell: table.first[cell][varied])


def rates(table: Table, row: dict) -> tuple[list[str], str]:
    """Cells of the learning rates, and what they lack of the published ones."""
    cells = series(table, "lr", row["task"])
    ran = [table.first[cell]["lr"] for cell in cells]
    return cells, "" if {5e-4, 1e-3, 2e-3} <= set(ran) else f"learning rates {' '.join(f'{lr:g}' for lr in ran)} alone"


def spread(table: Table, row: dict) -> tuple | None:
    """Standard deviation over mean, in percent, of the median norms at own T_grok at the learning rates."""
    cells, missing = rates(table, row)
    norms = table.values(cells, "norm_at_grok")                                             # (cells, members)

    def over_rates(picks: np.ndarray) -> np.ndarray:
        medians = stats.finite_median(norms[:, picks])                                      # (cells, B)
        return 100 * medians.std(0, ddof=1) / medians.mean(0)
    return (cells, over_rates, missing) if len(cells) >= 2 else None


def factor(table: Table, row: dict) -> tuple | None:
    """Largest over smallest median T_grok at the learning rates."""
    cells, missing = rates(table, row)
    return (cells, lambda picks: np.exp(np.ptp(table.log_T(cells)(picks), axis=-1)), missing) if len(cells) >= 2 else None


STATISTICS = {"W_c_spread": spread, "ratio": factor}


@dataclass(frozen=True)
class Property:
    """A line of Table 2. `ids`: of published.csv, or of findings of the records, that say it of modular addition; `of` turns their values into it."""
    text: str
    ids: tuple[str, ...]
    of: Callable[..., float] = lambda x: x


PROPERTIES = {
    "seeds": Property("CV of the free norm at own T_grok over seeds, percent", ("A.wc.cv",)),
    "rates": Property("CV of the free norm at own T_grok over seeds and learning rates, percent", ("A.wc.cv",)),
    "decay": Property("median norm at own T_grok, weight decay 0.3 over 3", ("A.wc.p59.wd0.3", "A.wc.p59.wd3"), lambda a, b: a / b),
    "speed": Property("free T_grok ~ lr^-x: x", ("A.matrix.free.lr0.001", "A.matrix.free.lr0.008"), lambda a, b: math.log(a / b) / math.log(8)),
    "alpha": Property("T_grok ~ exp(alpha rho), total norm held: alpha", ("A.alpha.dense",)),
    "one": Property("median T_grok held at rho 1, over free", ("clamp_over_free.clamp_p59_b16_rho1.00",)),
    "frontier": Property("median T_grok held at rho 1.15, over that of the free frontier at this norm", ("off_frontier.p59.rho1.15",)),
    "raised": Property("median T_grok at rho 1.15 over rho 1, tau 1", ("B.med.ce.p59.ratio",)),
    "tau": Property("median T_grok at rho 1.15, tau 1 over 1.7", ("tau_effect.ce.p59",)),
    "recovery": Property("share of the delay by rho 1.15 that is recovered at the logit scale of rho 1", ("B.recovery.p59",)),
}


def measure(table: Table, config: Config, read: dict[str, list[dict]]) -> None:
    """Fills `table`: published numbers that these runs answer, and what they say beyond."""
    rows = {key: row for key, row in published("A.parity").items() if row["loss"] == config.loss}
    answer(table, rows.values(), STATISTICS)
    task = parity_task(config.n[0], config.k, config.m[0])
    held = {(table.first[name]["rho"], table.first[name]["tau"]): name for name in table.pick(arm="clamp", task=task)}
    doses = [held[dose] for dose in sorted(held) if dose[1] == 1]
    decays, speeds = series(table, "weight_decay", task), series(table, "lr", task)
    alpha = lambda picks: delay.line(table, doses)(picks)[0]  # noqa: E731
    control = (table.control(doses[0]) if doses else None) or next((name for name in speeds if table.first[name]["lr"] == config.lrs[0]), None)
    if control:
        say(table, "seeds", [control], delay.cv(table, [control]))
    if len(speeds) > 1:
        say(table, "rates", speeds, delay.cv(table, speeds))
        x = -np.log([table.first[name]["lr"] for name in speeds])
        say(table, "speed", speeds, lambda picks: stats.line(x, table.log_T(speeds)(picks))[0])
    ends = [name for wd in (0.3, 3) for name in decays if table.first[name]["weight_decay"] == wd]
    if len(ends) == 2:
        W = table.values(ends, "norm_at_grok")
        say(table, "decay", ends, lambda picks: np.divide(*stats.finite_median(W[:, picks])))
    if len(doses) > 1:
        say(table, "alpha", doses, alpha)
    if (1.0, 1.0) in held and (free := table.control(held[1.0, 1.0])):
        say(table, "one", [held[1.0, 1.0], free], table.ratio(held[1.0, 1.0], free))
    for name in doses:
        delay.off_frontier(table, name, decays, "property.frontier" if table.first[name]["rho"] == 1.15 else "")
    temperature(table, held)
    delay.tell(table, rows, STATISTICS, {"A.parity.lr_factor": "T_grok over learning rates, largest over smallest"})
    if table.networks == "fresh":
        delay.findings(table, read)


def say(table: Table, key: str, cells: list[str], statistic: Callable) -> None:
    """A property of Table 2, among the last lines if it is alpha."""
    table.finding(f"property.{key}", PROPERTIES[key].text, cells, statistic)
    if key == "alpha":
        n, censored, _ = table.count(tuple(cells))
        table.say("alpha of sparse parity", stats.resampled(n, statistic), n * len(cells), censored)


def temperature(table: Table, held: dict[tuple[float, float], str]) -> None:
    """At every raised norm: what part of the delay the logit scale accounts for."""
    for rho in sorted({rho for rho, tau in held if rho > 1 and tau != 1}):
        sweep = [held[dose] for dose in sorted(held) if dose[0] == rho and dose[1] != 1]
        if (1.0, 1.0) in held and (rho, 1.0) in held:
            base, up = held[1.0, 1.0], held[rho, 1.0]
            mediation.findings(table, (base, up, *sweep))
            if rho == 1.15:
                say(table, "raised", [up, base], table.ratio(up, base))
                say(table, "recovery", [base, up, *sweep], table.recovery((base, up, *sweep)))
                if (rho, 1.7) in held:
                    say(table, "tau", [up, held[rho, 1.7]], table.ratio(up, held[rho, 1.7]))


def properties(findings: list[dict], root: Path) -> list[dict]:
    """properties.csv: Table 2. Fresh networks go before the paper's own, and of several records the one with most members."""
    mine = {f["id"]: f for f in sorted(findings, key=lambda f: "networks" not in f)}
    there: dict[str, dict] = {}
    for path in sorted(root.glob("*/*/summary.json")):
        summary = files.read_json(path)
        replicated = [{**claim["replicated"], "id": claim["id"]} for claim in summary["claims"] if "replicated" in claim]
        for f in (*summary["findings"], *replicated):
            if f["ours"] is not None and f["n"] > there.get(f["id"], {"n": 0})["n"]:
                there[f["id"]] = f
    rows, numbers = [], published()
    for key, line in PROPERTIES.items():
        ours, theirs = mine.get(f"property.{key}"), [there.get(name) for name in line.ids]
        printed = [numbers[name]["value"] for name in line.ids if name in numbers]
        paper = line.of(*printed) if len(printed) == len(line.ids) else None
        value, lo, hi = (derived(line, theirs, end) for end in ("ours", "lo", "hi"))
        known, transfers = paper if value is None else value, None
        if ours and None not in (ours["lo"], ours["hi"], known):
            low, high = (known * (1 - stats.TOLERANCE), known * (1 + stats.TOLERANCE)) if lo is None else (lo, hi)
            transfers = int(ours["lo"] <= high and ours["hi"] >= low)
        rows.append({"property": key, "text": line.text, "paper": paper, "addition": value, "addition_lo": lo, "addition_hi": hi,
                     "addition_n": min(f["n"] for f in theirs) if value is not None else None,
                     **{f"parity{suffix}": ours and ours[end] for suffix, end in (("", "ours"), ("_lo", "lo"), ("_hi", "hi"), ("_n", "n"),
                                                                                  ("_censored", "n_censored"))},
                     "transfers": transfers})
    return rows


def derived(line: Property, findings: list[dict | None], end: str) -> float | None:
    """A property's value, or an `end` of its interval, of the findings that it is made from; an interval only of a single one."""
    known = [f[end] for f in findings if f and f[end] is not None]
    whole = len(known) == len(findings) and (end == "ours" or len(findings) == 1)
    return line.of(*known) if whole else None


# ---------------------------------------------------------------- figures

def draw(table: Table, config: Config, folder: Path, trajectories: list[dict], read: dict[str, list[dict]]) -> None:
    rows = list(published("A.parity").values())
    task, points = parity_task(config.n[0], config.k, config.m[0]), figures.points(table, rows)
    for name, point in points.items():
        norms = table.values((name,), "norm_at_grok")[0]
        point |= {"norms": norms, "norm": float(stats.finite_median(norms[None])[0])}
    free, held = series(table, "weight_decay", task), table.pick(arm="clamp", task=task, tau=1)
    if len(free) + len(held) > 1:
        figures.sheet(folder, "frontier", [([points[name] for name in free], [points[name] for name in held])], frontier)
    if len(speeds := series(table, "lr", task)) > 1:
        figures.sheet(folder, "rate", ["W_c", "T_grok"], over_rate, points=[points[name] for name in speeds])
    warm = [points[name] for name in table.pick(arm="clamp", task=task)]
    if any(point["tau"] != 1 for point in warm):
        figures.sheet(folder, "temperature", [warm], over_temperature)
    figures.critical_norm(table, rows, folder)
    figures.contraction(read["contraction.csv"], folder)
    if trajectories:
        figures.trajectories(trajectories, folder)


def frontier(axis: plt.Axes, panel: tuple[list[dict], list[dict]]) -> None:
    """T_grok over the norm: the frontier that free runs trace over weight decays, and the clamps, each at its held norm."""
    free, held = panel
    for points, color, marker, label in ((free, "C0", "o", "free, weight decay beside it"), (held, "C3", "D", "held at rho W_c")):
        for point in points:
            norms = point["norms"] if color == "C0" else np.full(len(point["T"]), point["held_norm"])
            axis.plot(norms, point["T"], marker, color=color, ms=3.5, alpha=0.5)
            if math.isfinite(point["median"]):
                axis.annotate(f"{point['weight_decay']:g}" if color == "C0" else f"rho {point['rho']:g}", (np.nanmedian(norms), point["median"]),
                              xytext=(6, 4), textcoords="offset points", fontsize=7, color=color)
        axis.plot([], [], marker, color=color, label=label)
        known = [(point["published"].get("W_c") if color == "C0" else point["held_norm"], point["published"].get("T_grok")) for point in points]
        figures.squares(axis, known)
    line = sorted((point["norm"], point["median"]) for point in free if math.isfinite(point["median"]) and math.isfinite(point["norm"]))
    axis.plot([x for x, _ in line], [y for _, y in line], color="C0", lw=1)
    axis.set(yscale="log", xlabel="norm at own T_grok, or held norm", ylabel="T_grok (steps)", title="Clamps on the weight-decay frontier")
    figures.steps(axis.yaxis)


def over_rate(axis: plt.Axes, what: str, points: list[dict]) -> None:
    """Norm at own T_grok, or T_grok, over the learning rate."""
    points = [{**point, "x": i} for i, point in enumerate(points)]
    if what == "T_grok":
        figures.members(axis, points, "x", label="every member; bar: median")
    else:
        for point in points:
            axis.plot([point["x"]] * len(point["norms"]), point["norms"], "o", color="C0", ms=3.5, alpha=0.5)
            axis.plot(point["x"], point["norm"], "_", color="black", ms=14)
        figures.squares(axis, [(point["x"], point["published"].get("W_c")) for point in points])
        axis.set(ylabel="norm at own T_grok", ylim=(0, None))
    axis.set(xlabel="learning rate", title={"W_c": "The norm hardly moves", "T_grok": "T_grok does"}[what])
    axis.set_xticks(range(len(points)), [f"{point['lr']:g}" for point in points])


def over_temperature(axis: plt.Axes, points: list[dict]) -> None:
    """T_grok over the temperature, a colour and marker per held norm."""
    for i, rho in enumerate(dict.fromkeys(point["rho"] for point in points)):
        mine = sorted((point for point in points if point["rho"] == rho), key=lambda point: point["tau"])
        figures.members(axis, mine, "tau", f"C{i}", figures.MARKERS[i % 8], label=f"rho {rho:g}", width=0.012)
    axis.set(xlabel="temperature tau", title="Temperature at held norms")


# ---------------------------------------------------------------- run

def publish(desk: Lab, result: Result | None) -> None:
    """Tables, verdicts, figures; without `result` from the tables that are there."""
    tables = {"contraction.csv": delay.contraction, "around_grok.csv": stats.around_grok}
    main_figure = {"rate": "rate.png", "size": "critical_norm.png", "temperature": "temperature.png"}.get(desk.config.parts[0], "frontier.png")
    desk.publish(measure, draw, result, tables, main_figure=main_figure)
    files.write_csv(desk.out / "properties.csv", properties(files.read_json(desk.out / "summary.json")["findings"], ROOT / "results"))


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, PARTS, argv)
    config = checked(config, given)
    desk = Lab("parity", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: publish(desk, None))
    theirs = own_cells(config, given) if "published" in config.networks else []
    free, held = [], []
    if "fresh" in config.networks:
        free, held = free_cells(config), held_cells(config, config.w_c or 20.6)    # for a dry run's list only; the control gives the real W_c
    console.announce(config, own.some([*theirs, *free, *held]))
    if config.dry_run:
        return None
    desk.open()
    result, w_c = desk.train("published", theirs, deal=True), config.w_c
    if free and not w_c:
        control = desk.train("control", free[:1])
        norms = stats.critical_norms(control.runs)
        console.say_norms(free[:1], norms)
        result, free, w_c = result + control, free[1:], norms.get(free[0].name)
    if "fresh" in config.networks:
        result += desk.train("cells", [*free, *held_cells(config, w_c)], deal=True)
    publish(desk, result)
    return desk.finish()


if __name__ == "__main__":
    main(run)
