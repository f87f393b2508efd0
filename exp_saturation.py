"""Beyond the papers: is it the scale of the logits, or the saturation of the softmax?

Claim of paper B (arXiv 2606.18465): the weight norm acts on the delay "through the logit scale and the softmax saturation it drives". Under the
softmax the two move together. StableMax (arXiv 2501.04697) lets logits grow without saturating: s(x) = x + 1 from 0 on, 1 / (1 - x) below, in the
place of exp. So the same networks are trained under both losses, at the same held norms and temperatures. Fixed before any run:

  slopes      of ln median T_grok on rho, at tau 1, under either loss; and of ln median T_grok on ln L over all doses and temperatures of a loss
  removed     1 - slope under StableMax / slope under cross-entropy, on rho: the share of the norm's delay that goes with the saturation.
              If the norm acts through saturation alone it is 1, if through the scale alone 0
  regression  of ln median T_grok on ln L, saturation and ln of the training gradient, over the cells of both losses: R^2 of each, of all three, and
              what each adds to the other two

L: mean over members of the effective logit scale at the logged step nearest the cell's median T_grok. Saturation: share of pairs whose largest
probability, of the loss's own, exceeds 0.999. Training gradient: norm of the loss's gradient on the training pairs in the weight matrices. The
last two, and the share of training pairs in collapse, are means over the members that grok, each at its own T_grok. Both losses hold rho times the
W_c of the cross-entropy control: the median, over the members that grok, of the norm at own T_grok. A run that does not grok within its budget is
censored there and counts as later; a cell with half or more of its members censored is in no fit, and that is said.

    python exp_saturation.py                      laptop preset: four doses under both losses at p=59, 3 members, minutes on 2 cores
    python exp_saturation.py --preset paper       8 members, two temperatures, float64, and the doses on mul and s4
    python exp_saturation.py --parts doses --rhos 0.9 1.0 1.1 --members 0 1
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from common import Cell, Result, UsageError, cell_name, elements, load, unique
from lab import console, figures, files, settings, stats, weights
from lab.answers import Statistic, Table
from lab.desk import Lab, main

PARTS = ("doses", "temperatures", "precision", "tasks")
LOSSES = {"ce": "cross-entropy", "stablemax": "StableMax"}
RHOS, TASK_RHOS = (0.85, 1.00, 1.15, 1.25), (0.85, 1.00, 1.15)
AUDITED = 1.15                         # dose of the cross-entropy cell that is trained in float64 too
EXPLAIN = ("L", "saturated", "gradient")
TEXT = {"L": "ln L", "saturated": "the saturation", "gradient": "ln of the training gradient"}


@dataclass(frozen=True)
class Config(settings.Config):
    p: tuple[int, ...] = settings.option((59,), "modulus: one")
    seeds: int = settings.option(8, "block size: members drawn from one generator; member 3 of 12 is not member 3 of 8")
    parts: tuple[str, ...] = settings.option((), f"parts to run: {' '.join(PARTS)}")
    rhos: tuple[float, ...] = settings.option(RHOS, "held norms over W_c of the cross-entropy control")
    taus: tuple[float, ...] = settings.option((1.0, 1.7), "temperatures; 1 is always among them", parts=("temperatures",))
    tasks: tuple[str, ...] = settings.option(("mul", "s4"), "tasks that three of the doses are repeated on", parts=("tasks",))
    task_frac: float = settings.option(0.6, "share of the pairs of a permutation group to train on", parts=("tasks",))
    lr: float = settings.option(1e-3, "learning rate")
    budget: int = settings.option(120_000, "step at which a run that has not grokked is censored")
    model: str = settings.option("mlp", "", "fixed")
    networks: tuple[str, ...] = settings.option(("fresh",), "", "fixed")
    loss: str = settings.option("ce", "", "fixed")
    task: str = settings.option("add", "", "fixed")


PRESETS = {
    "smoke": {"parts": ("doses",), "lr": 8e-3, "rhos": (0.85, 1.0), "members": (0, 1)},
    "laptop": {"parts": ("doses",), "members": (0, 1, 2)},
    "paper": {"parts": PARTS},
}


def checked(config: Config) -> Config:
    """The settings, with weights kept: the training gradient is computed from them. Raises UsageError for values that do not fit each other."""
    if len(config.p) != 1:
        raise UsageError(f"--p takes one modulus here, got {' '.join(map(str, config.p))}")
    if not 0 < config.task_frac < 1:
        raise UsageError(f"--task-frac must be above 0 and below 1, got {config.task_frac:g}")
    for task in config.tasks:
        elements(task)
    settings.check_members(config, {})
    return dataclasses.replace(config, save_weights=True)


# ---------------------------------------------------------------- cells

def cell(config: Config, loss: str, task: str = "add", rho: float | None = None, tau: float = 1.0, dtype: str = "", w_c: float | None = None) -> Cell:
    """A free control, or a cell held at `rho w_c`."""
    arm, members = "free" if rho is None else "clamp", config.members or tuple(range(config.seeds))
    name = cell_name((arm, Path(task).stem, loss), ("rho", ".2f", rho, None), ("tau", ".2f", tau, 1), ("", "", dtype, ""))
    steps = 3700 * math.exp(8 * (min(rho or 1.04, 3) - 1)) * max(tau, 0.05) ** -2 * (1e-3 / config.lr) ** 0.4     # for the estimate of time alone
    fields = {**config.network(), "task": task, "loss": loss}
    return Cell(name, p=elements(task) or config.p[0], members=members, block=config.seeds, budget_steps=config.budget,
                arm=arm, seed0=config.seed0, train_frac=config.task_frac if elements(task) else 0.40, rho=rho, tau=tau, lr=config.lr, w_c=w_c,
                dtype=dtype, expected_steps=int(min(max(steps, 1000), config.budget)), after_grok=config.after_grok, **fields)


def tasks(config: Config) -> list[str]:
    """What the command trains on: addition if a part is about it, and the tasks of the part of that name."""
    others = config.tasks if "tasks" in config.parts else ()
    return [*others] if config.parts == ("tasks",) else ["add", *others]


def controls(config: Config) -> list[Cell]:
    """A free run of each task under each loss."""
    return [cell(config, loss, task) for task in tasks(config) for loss in LOSSES]


def held(config: Config, w_c: dict[str, float]) -> list[Cell]:
    """All held cells whose cross-entropy control has a W_c, by its name."""
    cells = []
    for task in tasks(config):
        norm = w_c.get(cell(config, "ce", task).name)
        if norm is None:
            continue
        rhos = config.rhos if task == "add" else [rho for rho in config.rhos if config.rhos != RHOS or rho in TASK_RHOS]
        taus = sorted({1.0, *config.taus}) if task == "add" and "temperatures" in config.parts else [1.0]
        cells += [cell(config, loss, task, rho, tau, w_c=norm) for loss in LOSSES for rho in rhos for tau in taus]
        if task == "add" and "precision" in config.parts:
            cells += [cell(config, "ce", task, AUDITED, dtype=dtype, w_c=norm) for dtype in ("", "float64")]
    return unique(cells)


# ---------------------------------------------------------------- what is measured

def gradients(folder: Path, runs: list[dict]) -> list[dict]:
    """gradients.csv: norm of the training loss's gradient in the weight matrices, by torch's autograd through the plain modules, at each member's
    T_mem and T_grok; from the weights, or as an earlier command left it where those are gone."""
    if not (folder / "weights").is_dir():
        return files.read_csv(folder / "gradients.csv") if (folder / "gradients.csv").exists() else []
    rows = []
    for name in dict.fromkeys(run["cell"] for run in runs):
        saved = load(folder / "weights" / weights.file_name(name))
        tau, loss, labels = saved.conditions["tau"], saved.conditions["loss"], saved.labels.flatten()
        for member, moments in saved.modules.items():
            pairs, p = saved.pairs[member], saved.conditions["p"]
            row = {"cell": name, "member": member}
            for moment in {"mem", "grok"} & set(moments):
                net = moments[moment].double()
                training_loss(net(pairs // p, pairs % p) / tau, labels[pairs], loss).backward()
                row[f"gradient_at_{moment}"] = float(torch.cat([net.E.grad.flatten(), net.W1.grad.flatten(), net.W2.grad.flatten()]).norm())
            rows.append({key: row.get(key) for key in ("cell", "member", "gradient_at_mem", "gradient_at_grok")})
    return rows


def training_loss(scaled: torch.Tensor, labels: torch.Tensor, loss: str) -> torch.Tensor:
    """Mean loss of scaled logits `(n, p)`."""
    if loss == "ce":
        return torch.nn.functional.cross_entropy(scaled, labels)
    scores = torch.where(scaled >= 0, scaled + 1, 1 / (1 - scaled.clamp_max(0)))
    return -torch.log(scores[torch.arange(len(labels)), labels] / scores.sum(1)).mean()


def column(table: Table, gradient: dict[str, np.ndarray], what: str, cells: list[str]) -> Statistic:
    """`(B, cells)`: ln L, the mean saturation, or the mean of the logarithm of the training gradient."""
    own = {name: table.values((name,), "saturated_at_grok")[0] if what == "saturated" else np.log(gradient[name]) for name in cells if what != "L"}
    if what == "L":
        return lambda picks: np.log(np.stack([table.at(name)(picks) for name in cells], 1))
    return lambda picks: np.stack([np.nanmean(own[name][picks], 1) for name in cells], 1)


def fitted(table: Table, **conditions: object) -> list[str]:
    """Held cells trained in the command's precision of which more than half of the members grok."""
    return [name for name in table.pick(arm="clamp", **conditions) if np.isfinite(table.grok[name]).mean() > 0.5 and not name.endswith("float64")]


def measure(table: Table, config: Config, read: dict[str, list[dict]]) -> None:
    for task in dict.fromkeys(run["task"] for run in table.first.values()):
        slopes = {}
        for loss, said in LOSSES.items():
            control = table.pick(arm="free", task=task, loss=loss)
            for name in control:
                table.finding(f"W_c.{task}.{loss}", f"{task}: norm at own T_grok of the free control, {said}", (name,),
                              table.median_of(name, "norm_at_grok"))
            cells = fitted(table, task=task, loss=loss, tau=1)
            if len(cells) >= 2:
                slopes[loss] = table.over("rho", cells, stats.slope), cells
                rhos = " ".join(f"{table.first[name]['rho']:g}" for name in cells)
                table.finding(f"slope.rho.{task}.{loss}", f"{task}, {said}: slope of ln T_grok on rho, rho {rhos}", cells, slopes[loss][0],
                              law=f"{task}, {said}: slope of ln T_grok on rho")
            both = fitted(table, task=task, loss=loss)
            if len(both) >= 2:
                table.finding(f"slope.L.{task}.{loss}", f"{task}, {said}: slope of ln T_grok on ln L, {len(both)} cells", both,
                              on_log_scale(table, both))
        doses = [[table.first[name]["rho"] for name in cells] for _, cells in slopes.values()]
        if len(doses) == 2 and doses[0] == doses[1]:
            (ours, first), (theirs, second) = slopes["ce"], slopes["stablemax"]
            table.finding(f"removed.{task}", f"{task}: share of the norm's delay that StableMax removes", [*first, *second],
                          lambda picks, ours=ours, theirs=theirs: 1 - theirs(picks) / ours(picks),
                          law=f"{task}: share of the delay StableMax removes")
    left_out = [name for name in table.pick(arm="clamp") if np.isfinite(table.grok[name]).mean() <= 0.5]
    if left_out:
        print(f"in no fit, for half or more of their members are censored: {', '.join(left_out)}", flush=True)
    regression(table, read["gradients.csv"])
    pair = [name for name in table.pick(arm="clamp", task="add", loss="ce", tau=1) if table.first[name]["rho"] == AUDITED]
    if len(pair) == 2:
        pair.sort(key=lambda name: table.first[name]["dtype"])
        table.finding("precision", f"T_grok in float32 over float64, cross-entropy, rho {AUDITED}", pair, table.ratio(*pair))


def on_log_scale(table: Table, cells: list[str]) -> Statistic:
    """Slope of ln median T_grok on ln L."""
    def slope(picks: np.ndarray) -> np.ndarray:
        x = np.log(np.stack([table.at(name)(picks) for name in cells], 1))                     # (B, cells)
        x, y = x - x.mean(1, keepdims=True), table.log_T(cells)(picks)
        return (x * y).sum(1) / (x * x).sum(1)
    return slope


def regression(table: Table, rows: list[dict]) -> None:
    """What explains ln T_grok over the cells of both losses, on addition."""
    cells = fitted(table, task="add")
    known = {(row["cell"], row["member"]): row["gradient_at_grok"] for row in rows}
    gradient = {name: np.array([known.get((name, run["member"])) for run in table.runs if run["cell"] == name], dtype=float) for name in cells}
    if len(cells) < 6 or len({table.first[name]["loss"] for name in cells}) < 2:
        return
    columns = {what: column(table, gradient, what, cells) for what in EXPLAIN}

    def r2(by: tuple[str, ...]) -> Statistic:
        return lambda picks: stats.least_squares(table.log_T(cells)(picks), *(columns[what](picks) for what in by))[0]
    for what in EXPLAIN:
        table.finding(f"r2.{what}", f"R^2 of ln T_grok on {TEXT[what]}, {len(cells)} cells of both losses", cells, r2((what,)),
                      law=f"both losses, {len(cells)} cells: R^2 of ln T_grok on {TEXT[what]}")
    if len(cells) >= 8:
        table.finding("r2.all", "R^2 of ln T_grok on all three", cells, r2(EXPLAIN))
        for what in EXPLAIN:
            rest = tuple(other for other in EXPLAIN if other != what)
            table.finding(f"dr2.{what}", f"what {TEXT[what]} adds to the R^2 of the other two", cells,
                          lambda picks, rest=rest: r2(EXPLAIN)(picks) - r2(rest)(picks))


# ---------------------------------------------------------------- figures

def draw(table: Table, config: Config, folder: Path, trajectories: list[dict], read: dict[str, list[dict]]) -> None:
    known = {}
    for row in read["gradients.csv"]:
        known.setdefault(row["cell"], []).append(np.nan if row["gradient_at_grok"] is None else row["gradient_at_grok"])
    points = {name: {**point, "gradient": math.exp(np.log(known[name]).mean()) if np.isfinite(known.get(name, [np.nan])).all() else math.nan}
              for name, point in figures.points(table, []).items()}
    for task in dict.fromkeys(run["task"] for run in table.first.values()):
        mine = {loss: [points[name] for name in table.pick(arm="clamp", task=task, loss=loss)] for loss in LOSSES}
        if all(mine.values()):
            name = "saturation" if task == "add" else f"saturation_{Path(task).stem}"
            figures.sheet(folder, name, ["rho", "logit_scale", "gradient"], panel, mine=mine, title=f"{task}, p={mine['ce'][0]['p']}")


def panel(axis: Axes, x: str, mine: dict[str, list[dict]], title: str) -> None:
    """T_grok over the dose with every member, or over what the dose does, with the median and its interval; a colour and marker per loss."""
    for i, (loss, points) in enumerate(mine.items()):
        if x == "rho":
            width = 0.01 * (max(point["rho"] for point in points) - min(point["rho"] for point in points)) or 0.01
            plain = [point for point in points if point["tau"] == 1 and not point["cell"].endswith("float64")]
            figures.members(axis, plain, "rho", f"C{i}", figures.MARKERS[i],
                            label=f"{LOSSES[loss]}, every member; bar: median", width=width)
            continue
        shown = [point for point in points if math.isfinite(point[x]) and math.isfinite(point["median"])]
        for hot in (False, True):
            some = [point for point in shown if (point["tau"] != 1) == hot]
            if some:
                axis.plot([point[x] for point in some], [point["median"] for point in some], figures.MARKERS[i], color=f"C{i}",
                          mfc="none" if hot else f"C{i}", label=LOSSES[loss] + (", tau above 1" if hot else ""))
                axis.vlines([point[x] for point in some], [point["lo"] for point in some], [point["hi"] for point in some], color=f"C{i}", lw=1)
    said = {"rho": "held norm over W_c, rho (tau 1)", "logit_scale": "effective logit scale L at grokking",
            "gradient": "norm of the training gradient at T_grok"}
    axis.set(title=title, yscale="log", ylabel="T_grok (steps)", xlabel=said[x])
    if x != "rho":
        axis.set(xscale="log")
        figures.steps(axis.yaxis)


# ---------------------------------------------------------------- run

def publish(desk: Lab, result: Result | None) -> None:
    """Tables, figures and findings; without `result` from the tables that are there."""
    desk.publish(measure, draw, result, {"around_grok.csv": stats.around_grok, "gradients.csv": lambda runs, _: gradients(desk.folder, runs)},
                 main_figure="saturation.png")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, PARTS, argv)
    config = checked(config)
    desk = Lab("saturation", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: publish(desk, None))
    free = controls(config)
    console.announce(config, [*free, *held(config, {control.name: 54.8 for control in free})])
    if config.dry_run:
        return None
    desk.open()
    result = desk.train("control", free)
    w_c = stats.critical_norms(result.runs)
    console.say_norms(free, w_c)
    result += desk.train("cells", held(config, w_c), deal=True)
    publish(desk, result)
    if not given.get("save_weights"):      # they were kept for their gradients: 1.4 MB a network
        desk.drop_weights()
    return desk.finish()


if __name__ == "__main__":
    main(run)
