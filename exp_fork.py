"""Arms from one identical state: paper B (arXiv 2606.18465), the same-state comparison, and the map of when around it.

Claims (the paper's same-state table; fork at step 800, rho 1.15, learning rate 1e-3, 12 members)
  p=59  median delay from the fork: lowered 1525, free 4225, same 7200, raised 24162; raised / same 3.36
  p=97  median delay from the fork: lowered 1338, free 1950, same 6600, raised 21600; raised / same 3.27

A run trains freely to the fork step, after it has memorised and before it groks. Its parameters and moments are copied and continue as
  free      as it was
  same      norm held at N0, its own at the fork: nothing changes at the fork
  raised    held at rho N0          \\ the weights are scaled at the fork at once, the moments are not,
  lowered   held at N0 / rho        / and the norm is held after every later step
so what differs between arms is the value of the held norm, and between `free` and `same` the act of holding it.

REPLICATED: our 95% interval over members meets the published one (or value +- 3%). Delay: T_grok minus the fork step. A run that has not grokked at
the budget is censored there and counts as later. Beyond the paper: transformers (--model), several fork steps and rhos in one command, softmax
collapse along every arm (the raised arms lie inside that of float32), and the float64 twin of any arm.

    python exp_fork.py                         laptop preset: four arms at p=59, 3 members, about 5 minutes on 2 cores
    python exp_fork.py --p 113 --fork-steps 400 800 1600 --rho 1.05 1.15
    python exp_fork.py --dtype float64 --parts raised --members 0 --twin-of results/fork/laptop
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import EVAL_EVERY, Cell, Result, UsageError, cell_name, exactly
from kernels.cuda import MOST_CLASSES
from lab import console, delay, figures, files, own, settings, stats
from lab.answers import Statistic, Table, answer, published
from lab.desk import Lab, main
from lab.state import State, inherit, layout_of

ARMS = ("lowered", "free", "same", "raised")   # by the delay that the paper finds
SCALED = ("lowered", "raised")                 # those that have a rho
FORK_STEP, RHO, PUBLISHED_P = 800, 1.15, (59, 97)   # of the published numbers


@dataclass(frozen=True)
class Config(settings.Config):
    seeds: int = settings.option(12, "block size: members drawn from one generator; the paper's is 12", fresh=True)
    parts: tuple[str, ...] = settings.option((), "arms to continue as: lowered free same raised")
    hold_from: int = settings.option(-1, "", "fixed")
    rho: tuple[float, ...] = settings.option((RHO,), "held norm of the raised arm over N0, and N0 over the lowered arm's; above 1", parts=SCALED)
    fork_steps: tuple[int, ...] = settings.option((FORK_STEP,), f"steps to fork at, multiples of {EVAL_EVERY}")
    lr: float = settings.option(1e-3, "learning rate; published numbers are answered at 1e-3 only")
    budget: int = settings.option(60_000, "step at which a run that has not grokked is censored", fresh=True)
    twin_of: str = settings.option("", "results folder of the same arms at another --dtype, to compare delays with, member by member", fresh=True)


PRESETS = {"smoke": {"rho": (1.04,), "fork_steps": (300,), "lr": 1.6e-2, "budget": 20_000},
           "laptop": {}, "paper": {"p": (59, 97, 113), "networks": ("published", "fresh")}}
# Without LayerNorm the norm at step 800 is 1.28 W_c, and held there none groks in 100,000 steps: the fork is later, its arms closer.
LATER = {"fork_steps": (4800,), "rho": (1.05,), "budget": 150_000}
OF_MODEL = {"transformer": LATER, "transformer_b": LATER}   # defaults that differ from the MLP's


def check(config: Config) -> None:
    """Values that must fit each other, or UsageError."""
    for step in config.fork_steps:
        if step % EVAL_EVERY:
            raise UsageError(f"--fork-steps must be multiples of {EVAL_EVERY}, where runs are evaluated; got {step}")
        if step + EVAL_EVERY > config.budget:
            raise UsageError(f"--fork-steps {step} leaves no step to train before the budget; it must be below --budget {config.budget}")
    if min(config.rho) <= 1:
        raise UsageError(f"--rho must be above 1, got {min(config.rho):g}: the arms are raised to rho N0 and lowered to N0 / rho")
    settings.check_members(config, {})
    if config.twin_of:
        check_twin(config)


def check_twin(config: Config) -> None:
    """--twin-of must hold arms of the same network, block, seeds and learning rate at another precision, or UsageError."""
    folder, theirs = Path(config.twin_of), files.read_runs(Path(config.twin_of) / "runs.csv", "--twin-of")
    if "delay_steps" not in theirs[0]:
        raise UsageError(f"--twin-of {folder} holds no arms of this experiment; name a folder of exp_fork.py")
    for key, ours in (("model", config.model), ("block", config.seeds), ("seed0", config.seed0), ("lr", config.lr)):
        if theirs[0][key] != ours:
            raise UsageError(f"--twin-of {folder} has {key} {theirs[0][key]}, this command {ours}; a twin differs in --dtype alone")
    if files.read_json(folder / "config.json").get("dtype") == config.dtype:
        raise UsageError(f"--twin-of {folder} was trained in {config.dtype} as well; a twin differs in --dtype")
    mine = {(cell.name, member) for cell in planned(config) for member in cell.members}
    if not mine & {(run["cell"], run["member"]) for run in theirs}:
        raise UsageError(f"--twin-of {folder} has none of these arms and members; it has " + ", ".join(dict.fromkeys(run["cell"] for run in theirs)))


# ---------------------------------------------------------------- cells

def expected(model: str, arm: str, p: int, rho: float, lr: float) -> int:
    """Steps from the fork to grokking by the paper's table: for the estimate of time, never for a result."""
    if model != "mlp":   # a guess: no paper has forked transformers
        return {"lowered": 10_000, "free": 3000, "same": 20_000, "raised": 60_000}[arm] if model in OF_MODEL else 2000
    rho, lr = min(rho, 3), max(lr, 1e-9)   # far from any grid the law says nothing
    same = 7200 * (59 / p) ** 0.17 * (1e-3 / lr) ** 0.6
    return int({"free": 4225 / 7200 * same * (59 / p) ** 1.4, "same": same, "raised": same * math.exp(8.1 * (rho - 1)),
                "lowered": same * math.exp(-11.9 * (1 - 1 / rho))}[arm])


def common_fields(config: Config, p: int) -> dict:
    """What trunk and arms share. Members: those asked for, else as many as the preset has time for (p=113 costs six times p=59), on `paper` all."""
    few = {"smoke": 2, "laptop": 3 if p <= 73 else 2}.get(config.preset, config.seeds)
    return dict(p=p, block=config.seeds, members=config.members or tuple(range(min(few, config.seeds))), model=config.model, seed0=config.seed0,
                lr=config.lr, budget_steps=config.budget, **({"networks": "B", "decay_last": True} if label(config) else config.network()))


def kinds(config: Config, given: dict) -> list[Config]:
    """The command for each kind of networks that it trains: paper B's own ones take of the paper's conditions those that the flags leave."""
    asked = lambda flag, papers: tuple(value for value in papers if value in given.get(flag, papers))  # noqa: E731
    theirs = dataclasses.replace(config, networks=("published",), seeds=12, seed0=0, members=given.get("members", tuple(range(12))), lr=1e-3,
                                 budget=60_000, after_grok=0, fork_steps=asked("fork_steps", (FORK_STEP,)), rho=asked("rho", (RHO,)),
                                 p=asked("p", PUBLISHED_P) if config.model == "mlp" and given.get("lr", 1e-3) == 1e-3 else ())
    ours = dataclasses.replace(config, networks=("fresh",))
    return [command for command in (theirs, ours) if command.networks[0] in config.networks and command.p and command.fork_steps]


def label(config: Config) -> str:
    """What the names of cells begin with."""
    return "B_" if config.networks == ("published",) else ""


def trunk_cells(config: Config, p: int) -> list[Cell]:
    """The free run up to each fork step, one after the other."""
    return [Cell(f"{label(config)}trunk_p{p}_b{config.seeds}", stop_step=step, expected_steps=step, **common_fields(config, p))
            for step in sorted(config.fork_steps)]


def arm_cells(config: Config, p: int, step: int, norms: list[float]) -> list[Cell]:
    """The arms from fork step `step`, given every member's norm N0 there."""
    cells = []
    for arm in sorted(config.parts, key=ARMS.index):
        rhos = config.rho if arm in SCALED else (None,)
        for rho in rhos:
            factor = {"free": 0.0, "same": 1.0, "raised": rho, "lowered": rho and 1 / rho}[arm]
            name = cell_name((f"{label(config)}{arm}", f"p{p}", f"b{config.seeds}", f"fork{step}"), ("rho", "g", rho, None))
            cells.append(Cell(name, arm=arm, rho=rho, clamp_start=step + 1, held=tuple((factor * norm, 0.0, 0.0, 0.0) for norm in norms),
                              expected_steps=step + expected(config.model, arm, p, rho or 1.0, config.lr), after_grok=config.after_grok,
                              **common_fields(config, p)))
    return cells


def planned(config: Config) -> list[Cell]:
    """All cells with their steps counted from where they start: for the estimate and the list of a dry run."""
    cells = []
    for p in config.p:
        start = 0
        for trunk in trunk_cells(config, p):
            step = trunk.stop_step
            cells.append(dataclasses.replace(trunk, name=f"{trunk.name}_to{step}", expected_steps=step - start))
            start = step
            cells += [dataclasses.replace(arm, expected_steps=arm.expected_steps - step)
                      for arm in arm_cells(config, p, step, [0.0] * len(trunk.members))]
    return cells


# ---------------------------------------------------------------- training: trunks, forks, arms

def obstacle(cell: Cell, runs: list[dict]) -> str:
    """Why `runs`, trained to the fork step of `cell`, cannot be forked there; empty if they can."""
    grokked = [run["t_grok_step"] for run in runs if run["t_grok_step"] is not None]
    if grokked:
        return f"{len(grokked)} of {len(runs)} members of p={cell.p} have grokked there, the first at {min(grokked)}; choose an earlier step"
    for run in runs:
        who = f"member {run['member']} of p={cell.p}"
        if run["diverged"]:
            return f"{who} diverged before it (loss or norm not finite); choose an earlier step or a smaller --lr"
        if run["t_mem_step"] is None:
            return f"{who} has not memorised there yet; choose a later step"
    return ""


def trunks(desk: Lab, config: Config) -> tuple[Result, dict[tuple[int, int], tuple[State, list[dict]]]]:
    """The free runs through all fork steps, before any arm: `{(p, fork step): (state, its runs' rows)}`. Raises UsageError."""
    total, at = Result(), {}
    for p in config.p:
        state, before = None, []
        for cell in trunk_cells(config, p):
            part = desk.train(f"{label(config)}trunk_p{p}_{cell.stop_step}", [cell], state.fork([cell]) if state else None, keep_state=True)
            if before:
                inherit(part.runs, before)
            if problem := obstacle(cell, part.runs):
                desk.discard()
                raise UsageError(f"--fork-steps {cell.stop_step}: {problem}")
            state, before = part.state, part.runs
            for run, norm in zip(before, state.norms(layout_of(cell, state.params.dtype)), strict=True):
                run["norm_at_fork"] = norm
            at[p, cell.stop_step] = state, before
            total += dataclasses.replace(part, runs=[])
    return total, at


def train(desk: Lab, config: Config) -> Result:
    """Rows of the arms; log rows of trunks and arms."""
    total, at = trunks(desk, config)
    for p in config.p:
        cells, states, origin = [], [], {}
        for step in sorted(config.fork_steps):
            state, before = at[p, step]
            norms = [run["norm_at_fork"] for run in before]
            print(f"p={p}, fork at step {step}: norm N0 {' '.join(f'{norm:.2f}' for norm in norms)}", flush=True)
            arms = arm_cells(config, p, step, norms)
            cells += arms
            states.append(state.fork(arms))
            origin |= {cell.name: (step, {run["member"]: run for run in before}) for cell in arms}
        part = desk.train(f"{label(config)}arms_p{p}", cells, State.join(states), deal=True)      # every fork step and rho in one ensemble
        for run in part.runs:
            step, before = origin[run["cell"]]
            inherit([run], [*before.values()])
            grok, norm = run["t_grok_step"], before[run["member"]]["norm_at_fork"]
            run.update(fork_step=step, delay_steps=None if grok is None else grok - step, norm_at_fork=norm)
        total += part
    return total


# ---------------------------------------------------------------- what is measured

COLUMNS = (*files.RUN_COLUMNS, "fork_step", "delay_steps", "norm_at_fork")
COLLAPSE = ("collapse32", "collapse64")
WHEN = (("max", "largest along the arm"), ("at_grok", "at own T_grok"))


def delay_ratio(table: Table, over: str, under: str) -> Statistic:
    """Median delay of one arm over that of another, paired by member."""
    over_delay, under_delay = table.delay(over), table.delay(under)
    return lambda picks: over_delay(picks) / under_delay(picks)


def of_published(table: Table, row: dict) -> tuple | None:
    """What answers a row of the published table: its columns are its conditions, and the fork step and rho that hold for all of it."""
    arms = ("raised", "same") if row["statistic"] == "ratio" else (row["arm"],)
    cells = [table.match({**row, "arm": arm}, fork_step=FORK_STEP, rho=RHO if arm in SCALED else None) for arm in arms]
    return (cells, delay_ratio(table, *cells) if len(cells) == 2 else table.delay(*cells), "") if table.have(*cells) else None


STATISTICS = {"delay": of_published, "ratio": of_published}


def delays(table: Table, cells: Iterable[str]) -> np.ndarray:
    """`(cells, members)` steps from the fork; infinite = censored."""
    found = table.values(cells, "delay_steps")
    return np.where(np.isnan(found), math.inf, found)


def forks(table: Table, config: Config) -> Iterator[tuple[dict, dict[str, str], str]]:
    """Every fork that ran: its conditions, its cells by arm, and its name. `free` and `same` have no rho and belong to every one."""
    asked = (PUBLISHED_P, (FORK_STEP,), (RHO,)) if table.networks == "published" else (config.p, config.fork_steps, config.rho)
    for p, step, rho in itertools.product(*asked):
        cells = {arm: table.pick(p=p, fork_step=step, arm=arm, rho=rho if arm in SCALED else None) for arm in ARMS}
        if arms := {arm: found[0] for arm, found in cells.items() if found}:
            yield {"p": p, "fork_step": step, "rho": rho}, arms, f"p{p}.fork{step}.rho{exactly(rho, 'g')}"


def measure(table: Table, config: Config, read: dict[str, list[dict]]) -> None:
    """The published table; ratios of delays and their order at every fork; collapse of every arm; the twins at the other precision."""
    answer(table, published("B.fork.").values(), STATISTICS)
    if table.networks == "published":
        return delay.tell(table, published("B.fork."), STATISTICS, {f"B.fork.p{p}.ratio": f"delay raised / same, p={p}" for p in PUBLISHED_P})
    for where, arms, name in forks(table, config):
        for over, under in (("raised", "same"), ("lowered", "same"), ("same", "free")):
            if over in arms and under in arms:
                table.finding(f"{over}_over_{under}.{name}", f"median delay, {over} over {under}, paired by member", (arms[over], arms[under]),
                              delay_ratio(table, arms[over], arms[under]), **where)
        if "raised" in arms and "same" in arms:
            n, censored, _ = table.count((arms["raised"], arms["same"]))
            key = f"B.fork.p{where['p']}.ratio" if (where["fork_step"], where["rho"]) == (FORK_STEP, RHO) else ""
            said = f"delay raised / same, p={where['p']}, fork at step {where['fork_step']}, rho {exactly(where['rho'], 'g')}"
            table.say(said, stats.resampled(n, delay_ratio(table, arms["raised"], arms["same"])), n, censored, key)
        if len(arms) == len(ARMS):
            steps = delays(table, arms.values())
            table.finding(f"ordering.{name}", "share of members with delays lowered < free < same < raised", arms.values(),
                          float((steps[:-1] < steps[1:]).all(0).mean()), **where)
    for cell, column, (when, text) in itertools.product(read["cells.csv"], COLLAPSE, WHEN):
        value = cell[f"{column}_{when}"]
        table.finding(f"{column}_{when}.{cell['cell']}", f"share of training pairs in softmax collapse, mean of members, {text}", (cell["cell"],),
                      math.nan if value is None else value)
    if config.twin_of:
        twins(table, config)


def twins(table: Table, config: Config) -> None:
    """Delays here over those of the same arm and members in --twin-of; beyond a factor 1.3 the arm is confounded by float32."""
    folder, others = Path(config.twin_of), files.read_csv(Path(config.twin_of) / "runs.csv", "--twin-of")
    for cell in table.first:
        here, there = (stats.times(rows, cell, "delay_steps") for rows in (table.runs, others))
        if shared := [m for m in here if m in there]:
            pair = np.array([[times[m] for m in shared] for times in (here, there)])
            ours = stats.bootstrap(pair, lambda t: stats.median(t)[..., 0] / stats.median(t)[..., 1])
            table.findings.append(stats.finding(f"twin.{cell}", f"median delay in {config.dtype} over that in {folder.name}, same members",
                                                ours, len(shared), int((~np.isfinite(pair)).sum())))


def cell_rows(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """cells.csv: the shared columns, the delay from the fork, and the softmax collapse along the arm."""
    rows, table = stats.cell_rows(runs, trajectories), Table(runs)
    for row in rows:
        mine = [run for run in runs if run["cell"] == row["cell"]]
        known = {column: [run[column] for run in mine if run[column] is not None] or [math.nan]
                 for column in ("held_norm", *(f"{name}_at_grok" for name in COLLAPSE))}
        delay = stats.resampled(len(mine), table.delay(row["cell"]))
        row |= {"held_norm": float(np.median(known["held_norm"])), "fork_step": mine[0]["fork_step"],
                **dict(zip(("median_delay_steps", "delay_lo", "delay_hi"), map(stats.finite, delay), strict=True)),
                **{f"{name}_at_grok": float(np.mean(known[f"{name}_at_grok"])) for name in COLLAPSE}}
    return rows


# ---------------------------------------------------------------- figures

TRUNK = "before the fork"
COLORS = {"lowered": "C2", "free": "C0", "same": "C1", "raised": "C3", TRUNK: "black"}
DASHES = {"lowered": ":", "free": "--", "same": "-.", "raised": "-", TRUNK: "-"}


def draw(table: Table, config: Config, folder: Path, trajectories: list[dict], read: dict[str, list[dict]]) -> None:
    logged: dict[str, dict[int, list[dict]]] = {}   # rows by cell and member
    for row in trajectories:
        logged.setdefault(row["cell"], {}).setdefault(row["member"], []).append(row)
    for where, arms, name in forks(table, config):
        file = name.replace(".fork", "_fork").replace(".rho", "_rho")
        figures.sheet(folder, f"arms_{file}", [where], draw_arms, table=table, arms=arms)
        if logged:
            trunk = f"B_trunk_p{where['p']}_b12" if table.networks == "published" else f"trunk_p{where['p']}_b{config.seeds}"
            cells = {TRUNK: trunk, **arms}
            figures.sheet(folder, f"trajectories_{file}", ["norm", "test_accuracy"], draw_trajectories, logged=logged, cells=cells,
                          fork_step=where["fork_step"])
    ratios = [row for row in table.findings if row["id"].startswith("raised_over_same.")]
    for over, other in (("fork_step", "rho"), ("rho", "fork_step")):
        if len({row[over] for row in ratios}) > 1:
            figures.sheet(folder, f"ratio_over_{over}", [over], figures.fork_ratio, ratios=ratios, other=other)


def draw_arms(axis: plt.Axes, where: dict, table: Table, arms: dict[str, str]) -> None:
    """Delay from the fork, log axis, one column per arm; a line joins each member's arms, so that order shows member by member."""
    late = delays(table, arms.values())                                                        # (arms, members)
    shown = np.minimum(late, table.first[arms[next(iter(arms))]]["budget_steps"] - where["fork_step"])
    axis.plot(shown, color="gray", lw=0.6, alpha=0.6, zorder=0)
    for x, (arm, cell) in enumerate(arms.items()):
        for steps, censored in zip(shown[x], np.isinf(late[x]), strict=True):
            axis.plot(x, steps, "^" if censored else ".", color=COLORS[arm], mfc="none" if censored else COLORS[arm], ms=7)
        axis.plot([x - 0.15, x + 0.15], [stats.median(late[x])] * 2, color=COLORS[arm], lw=2)
        if cell in table.medians:
            axis.plot(x, table.medians[cell], "s", mfc="none", color="black", ms=9)
    if table.medians.keys() & set(arms.values()):
        axis.plot([], [], "s", mfc="none", color="black", ms=9, label="published medians")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    axis.set_xticks(range(len(arms)), arms)
    axis.set(yscale="log", ylabel="T_grok - fork step (steps)", title=f"Same state, p={where['p']}, fork at step {where['fork_step']}"
             + (f", rho {exactly(where['rho'], 'g')}" if set(SCALED) & set(arms) else ""))
    figures.steps(axis.yaxis)


def draw_trajectories(axis: plt.Axes, key: str, logged: dict[str, dict[int, list[dict]]], cells: dict[str, str], fork_step: int) -> None:
    """`key` of every member against step: the common free run in black up to the fork, then the arms."""
    for arm, cell in cells.items():
        for i, rows in enumerate(logged.get(cell, {}).values()):
            points = [(t["step"], t[key]) for t in rows if t["step"] >= fork_step / 8 and (arm != TRUNK or t["step"] <= fork_step)]
            axis.plot(*zip(*points, strict=True), color=COLORS[arm], ls=DASHES[arm], lw=1, alpha=0.8, label=None if i else arm)
    axis.axvline(fork_step, color="gray", ls=":", lw=1)
    axis.set(xscale="log", xlabel="step", title=key.replace("_", " "))
    figures.steps(axis.xaxis)


# ---------------------------------------------------------------- run

def publish(desk: Lab, result: Result | None) -> None:
    config = desk.config
    first = f"arms_p{config.p[0]}_fork{config.fork_steps[0]}_rho{exactly(config.rho[0], 'g')}.png"
    desk.publish(measure, draw, result, {}, cell_rows, COLUMNS, main_figure=first)


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, ARMS, argv)
    config = dataclasses.replace(config, **{k: v for k, v in OF_MODEL.get(config.model, {}).items() if k not in given})
    check(config)
    desk = Lab("fork", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: publish(desk, None))
    commands = kinds(config, given)
    console.announce(config, own.some([cell for command in commands for cell in planned(command)]))
    if config.model != "mlp":
        print(f"--model {config.model}: the published forks are of the MLP, so no published number is answered")
    elif config.device != "cuda" and max(config.p) <= MOST_CLASSES:
        paper = Config(**{"parts": ARMS, **PRESETS["paper"], **given, "preset": "paper", "device": "cuda", "dry_run": False})
        print("a GPU would run: ", end="")
        console.announce(paper, [cell for command in kinds(paper, given) for cell in planned(command)])
    if not config.dry_run:
        desk.open()
        publish(desk, sum((train(desk, command) for command in commands), Result()))
        desk.finish()


if __name__ == "__main__":
    main(run)
