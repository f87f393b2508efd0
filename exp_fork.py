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

Verdicts: `stats.claim`. Delay = T_grok - fork step. A run that has not grokked at the budget is censored there and counts as later.
Beyond the paper: transformers (--model), several fork steps and rhos in one command, collapse of the softmax along every arm (the raised
arms lie inside that of float32), and the float64 twin of any arm.

    python exp_fork.py                         laptop preset: four arms at p=59, 3 members, about 5 minutes on 2 cores
    python exp_fork.py --p 113                 2 members, about 10 minutes
    python exp_fork.py --fork-steps 400 800 1600 --rho 1.05 1.15
    python exp_fork.py --dtype float64 --parts raised --members 0 --twin-of results/fork/laptop
"""
if __name__ == "__main__":
    import early
    early.guard()

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import files
import lab
import plots
import progress
import settings
import stats
from common import EVAL_EVERY, Cell, Result, State, UsageError, exactly, inherit
from kernels.layout import model_layout
from measured import flag_unlearned

ARMS = ("lowered", "free", "same", "raised")   # by the delay that the paper finds


@dataclass(frozen=True)
class Config(settings.Config):
    seeds: int = settings.option(12, "block size: members drawn from one generator; the paper's is 12")
    parts: tuple[str, ...] = settings.option((), "arms to continue as: lowered free same raised")
    rho: tuple[float, ...] = settings.option((1.15,), "held norm of the raised arm over N0, and N0 over that of the lowered one; above 1")
    fork_steps: tuple[int, ...] = settings.option((800,), f"steps to fork at, multiples of {EVAL_EVERY}")
    lr: float = settings.option(1e-3, "learning rate; published numbers are answered at 1e-3 only")
    budget: int = settings.option(60_000, "step at which a run that has not grokked is censored")
    twin_of: str = settings.option("", "results folder of the same arms at another --dtype, to compare delays with, member by member")


PRESETS = {
    "smoke": {"rho": (1.04,), "fork_steps": (300,), "lr": 1.6e-2, "budget": 20_000},
    "laptop": {},
    "paper": {"p": (59, 97, 113)},
}
PAPER = {"fork_step": 800, "rho": 1.15, "lr": 1e-3}   # the condition of the published numbers, of the MLP
# Without LayerNorm the norm at step 800 is 1.28 W_c, and held there none groks in 100,000 steps: the fork is later, its arms closer.
LATER = {"fork_steps": (4800,), "rho": (1.05,), "budget": 150_000}
MODELS = {"transformer": LATER, "transformer_b": LATER}   # defaults that differ from the MLP's
COLUMNS = (*files.RUN_COLUMNS, "fork_step", "delay_steps", "norm_at_fork")
PAIRS = (("raised", "same"), ("lowered", "same"), ("same", "free"))
COLLAPSE = ("collapse32", "collapse64")


def check(config: Config) -> None:
    """Values that must fit each other, or UsageError."""
    for step in config.fork_steps:
        if step % EVAL_EVERY:
            raise UsageError(f"--fork-steps must be multiples of {EVAL_EVERY}, where runs are evaluated; got {step}")
        if step + EVAL_EVERY > config.budget:
            raise UsageError(f"--fork-steps {step} leaves no step to train before the budget; it must be below --budget {config.budget}")
    for rho in config.rho:
        if rho <= 1:
            raise UsageError(f"--rho must be above 1, got {rho:g}: the arms are raised to rho N0 and lowered to N0 / rho")
    settings.check_members(config, {})
    if config.twin_of:
        check_twin(config)


def check_twin(config: Config) -> None:
    """--twin-of must hold arms of the same network, block, seeds and learning rate at another precision, or UsageError."""
    folder = Path(config.twin_of)
    rows = files.read_runs(folder / "runs.csv")
    theirs = rows[0]
    if "delay_steps" not in theirs:
        raise UsageError(f"--twin-of {folder} holds no arms of this experiment; name a folder of exp_fork.py")
    for key, ours in (("model", config.model), ("block", config.seeds), ("seed0", config.seed0), ("lr", config.lr)):
        if theirs[key] != ours:
            raise UsageError(f"--twin-of {folder} has {key} {theirs[key]}, this command {ours}; a twin differs in --dtype alone")
    dtype = files.read_json(folder / "config.json").get("dtype")
    if dtype == config.dtype:
        raise UsageError(f"--twin-of {folder} was trained in {dtype} as well; a twin differs in --dtype")
    if not {(cell.name, member) for cell in planned(config) for member in cell.members} & {(row["cell"], row["member"]) for row in rows}:
        raise UsageError(f"--twin-of {folder} has none of these arms and members; it has " + ", ".join(dict.fromkeys(row["cell"] for row in rows)))


# ---------------------------------------------------------------- cells

def expected(model: str, arm: str, p: int, rho: float, lr: float) -> int:
    """Steps from the fork to grokking by the paper's table: for the estimate of time, never for a result."""
    if model != "mlp":   # a guess: no paper has forked transformers
        return {"lowered": 10_000, "free": 3000, "same": 20_000, "raised": 60_000}[arm] if model in MODELS else 2000
    rho, lr = min(rho, 3), max(lr, 1e-9)   # far from any grid the law says nothing
    same = 7200 * (59 / p) ** 0.17 * (1e-3 / lr) ** 0.6
    return int({"free": 4225 / 7200 * same * (59 / p) ** 1.4, "same": same}.get(arm) or
               same * (math.exp(8.1 * (rho - 1)) if arm == "raised" else math.exp(-11.9 * (1 - 1 / rho))))


def members(config: Config, p: int) -> tuple[int, ...]:
    """Those asked for; else as many as the preset's time allows, a step of p=113 costing six of p=59; on `paper` the whole block."""
    few = {"smoke": 2, "laptop": 3 if p <= 73 else 2}.get(config.preset, config.seeds)
    return config.members or tuple(range(min(few, config.seeds)))


def common_fields(config: Config, p: int) -> dict:
    return dict(p=p, block=config.seeds, members=members(config, p), model=config.model, seed0=config.seed0, lr=config.lr,
                budget_steps=config.budget)


def trunk_cells(config: Config, p: int) -> list[Cell]:
    """The free run up to each fork step, one after the other."""
    name = f"trunk_p{p}_b{config.seeds}"
    return [Cell(name, stop_step=step, expected_steps=step, **common_fields(config, p)) for step in sorted(config.fork_steps)]


def arm_cells(config: Config, p: int, step: int, norms: list[float]) -> list[Cell]:
    """The arms from fork step `step`, given every member's norm N0 there."""
    cells = []
    for arm in (arm for arm in ARMS if arm in config.parts):
        for rho in config.rho if arm in ("raised", "lowered") else (None,):
            factor = {"free": 0.0, "same": 1.0, "raised": rho, "lowered": rho and 1 / rho}[arm]
            name = f"{arm}_p{p}_b{config.seeds}_fork{step}" + (f"_rho{exactly(rho, 'g')}" if rho else "")
            cells.append(Cell(name, arm=arm, rho=rho, clamp_start=step + 1, held=tuple((factor * norm, 0.0, 0.0, 0.0) for norm in norms),
                              expected_steps=step + expected(config.model, arm, p, rho or 1.0, config.lr), after_grok=config.after_grok,
                              **common_fields(config, p)))
    return cells


def planned(config: Config) -> list[Cell]:
    """All cells with their steps counted from where they start: for the estimate and the list of a dry run."""
    cells = []
    for p in config.p:
        starts = [0, *sorted(config.fork_steps)]
        cells += [dataclasses.replace(c, name=f"{c.name}_to{c.stop_step}", expected_steps=c.stop_step - start)
                  for start, c in zip(starts, trunk_cells(config, p), strict=False)]
        cells += [dataclasses.replace(c, expected_steps=c.expected_steps - step)
                  for step in starts[1:] for c in arm_cells(config, p, step, [0.0] * len(members(config, p)))]
    return cells


# ---------------------------------------------------------------- run

def obstacle(cell: Cell, runs: list[dict]) -> str:
    """Why `runs`, trained to the fork step of `cell`, cannot be forked there; empty if they can."""
    step, p = cell.stop_step, cell.p
    grokked = [run["t_grok_step"] for run in runs if run["t_grok_step"] is not None]
    if grokked:
        return f"--fork-steps {step}: {len(grokked)} of {len(runs)} members of p={p} have grokked there, the first at {min(grokked)}; " \
               "choose an earlier step"
    for run in runs:
        who = f"--fork-steps {step}: member {run['member']} of p={p}"
        if run["diverged"]:
            return f"{who} diverged before it (loss or norm not finite); choose an earlier step or a smaller --lr"
        if run["t_mem_step"] is None:
            return f"{who} has not memorised there yet; choose a later step"
    return ""


def trunks(desk: lab.Lab) -> tuple[Result, dict[tuple[int, int], tuple[State, list[dict]]]]:
    """The free runs through all fork steps, before any arm: `{(p, fork step): (state, its runs' rows)}`. Raises UsageError."""
    total, at = Result(), {}
    for p in desk.config.p:
        state, before = None, []
        for cell in trunk_cells(desk.config, p):
            part = desk.train(f"trunk_p{p}_{cell.stop_step}", [cell], state.fork([cell]) if state else None, keep_state=True)
            if before:
                inherit(part.runs, before)
            if problem := obstacle(cell, part.runs):
                desk.discard()
                raise UsageError(problem)
            state, before = part.state, part.runs
            at[p, cell.stop_step] = state, before
            total += dataclasses.replace(part, runs=[])
    return total, at


def train(desk: lab.Lab) -> Result:
    """Trunks, forks, arms. Rows of the arms; log rows of all."""
    config = desk.config
    total, at = trunks(desk)
    for p in config.p:
        cells, states, origin = [], [], {}
        for step in sorted(config.fork_steps):
            state, before = at[p, step]
            norms = state.norms(model_layout(config.model, p, state.params.dtype))
            print(f"p={p}, fork at step {step}: norm N0 {' '.join(f'{norm:.2f}' for norm in norms)}", flush=True)
            arms = arm_cells(config, p, step, norms)
            cells += arms
            states.append(state.fork(arms))
            origin |= {cell.name: (step, before, dict(zip(cell.members, norms, strict=True))) for cell in arms}
        part = desk.train(f"arms_p{p}", cells, State.join(states), deal=True)      # every fork step and rho in one ensemble
        for run in part.runs:
            step, before, at_fork = origin[run["cell"]]
            inherit([run], before)
            grok = run["t_grok_step"]
            run.update(fork_step=step, delay_steps=None if grok is None else grok - step, norm_at_fork=at_fork[run["member"]])
        total += part
    return total


# ---------------------------------------------------------------- measurement

def pick(runs: list[dict], p: int, step: int, arm: str, rho: float) -> list[dict]:
    """The runs of one arm; `free` and `same` have no rho and belong to every one."""
    return [r for r in runs if (r["p"], r["fork_step"], r["arm"]) == (p, step, arm) and r["rho"] in (None, rho)]


def delays(*arms: list[dict]) -> np.ndarray:
    """`(arms, members)` steps from the fork; infinite = censored."""
    return np.array([[math.inf if r["delay_steps"] is None else r["delay_steps"] for r in runs] for runs in arms])


def middle(table: np.ndarray) -> np.ndarray:
    return stats.median(table)[..., 0]


def ratio(table: np.ndarray) -> np.ndarray:
    return stats.median(table)[..., 0] / stats.median(table)[..., 1]


def claims(runs: list[dict], config: Config) -> list[dict]:
    """Every published row of the same-state table, answered by runs of its own condition only."""
    out = []
    for key, row in stats.published(lab.ROOT / "published.csv", "B.fork.").items():
        _, _, modulus, what = key.split(".")
        groups = [pick(runs, int(modulus[1:]), PAPER["fork_step"], arm, PAPER["rho"]) for arm in (("raised", "same") if what == "ratio" else (what,))]
        if config.lr == PAPER["lr"] and config.model == "mlp" and all(groups):
            table = delays(*groups)
            censored = ~np.isfinite(table)
            ours = stats.bootstrap(table, ratio if what == "ratio" else middle)
            out.append(stats.claim(row, ours, table.shape[1], int(censored.sum()), "", float(censored.mean(1).max())))
        else:
            out.append(stats.claim(row, None))
    return out


def finding(key: str, quantity: str, ours: tuple[float, float, float], n: int, n_censored: int = 0, **where: object) -> dict:
    return {"id": key, "quantity": quantity, **dict(zip(("ours", "lo", "hi"), map(stats.finite, ours), strict=True)), "n": n,
            "n_censored": n_censored, **where}


def findings(runs: list[dict], cells: list[dict], config: Config) -> list[dict]:
    """The map: ratios of delays and their order at every fork step and rho; collapse of every arm; the twins at the other precision."""
    out = []
    for p in config.p:
        for step in config.fork_steps:
            for rho in config.rho:
                arm = {arm: found for arm in ARMS if (found := pick(runs, p, step, arm, rho))}
                at, where = f"p{p}.fork{step}.rho{exactly(rho, 'g')}", {"p": p, "fork_step": step, "rho": rho}
                for over, under in PAIRS:
                    if over in arm and under in arm:
                        table = delays(arm[over], arm[under])
                        out.append(finding(f"{over}_over_{under}.{at}", f"median delay, {over} over {under}, paired by member",
                                           stats.bootstrap(table, ratio), table.shape[1], int((~np.isfinite(table)).sum()), **where))
                if len(arm) == len(ARMS):
                    table = delays(*arm.values())
                    share = float((table[:-1] < table[1:]).all(0).mean())
                    out.append(finding(f"ordering.{at}", "share of members with delays lowered < free < same < raised",
                                       (share, math.nan, math.nan), table.shape[1], int((~np.isfinite(table)).sum()), **where))
    for cell in cells:
        for name in COLLAPSE:
            for when, text in (("max", "largest along the arm"), ("at_grok", "at own T_grok")):
                value = cell[f"{name}_{when}"]
                out.append(finding(f"{name}_{when}.{cell['cell']}", f"share of training pairs in softmax collapse, mean of members, {text}",
                                   (math.nan if value is None else value, math.nan, math.nan), cell["n"], cell["n_censored"]))
    return out + (twins(runs, config) if config.twin_of else [])


def twins(runs: list[dict], config: Config) -> list[dict]:
    """Delays here over those of the same arm and members in --twin-of; beyond a factor 1.3 the arm is confounded by float32."""
    out, folder = [], Path(config.twin_of)
    others = files.read_csv(folder / "runs.csv")
    for cell in dict.fromkeys(run["cell"] for run in runs):
        here, there = (stats.times(rows, cell, "delay_steps") for rows in (runs, others))
        if shared := [m for m in here if m in there]:
            table = np.array([[times[m] for m in shared] for times in (here, there)])
            out.append(finding(f"twin.{cell}", f"median delay in {config.dtype} over that in {folder.name}, same members",
                               stats.bootstrap(table, ratio), len(shared), int((~np.isfinite(table)).sum())))
    return out


def cell_rows(runs: list[dict], trajectories: list[dict]) -> list[dict]:
    """cells.csv: the shared columns, the delay from the fork, and the softmax collapse along the arm."""
    rows = stats.cell_rows(runs, trajectories)
    for row in rows:
        mine = [r for r in runs if r["cell"] == row["cell"]]
        estimate = stats.bootstrap(delays(mine), middle)
        held = [r["held_norm"] for r in mine if r["held_norm"] is not None]
        row |= {"held_norm": float(np.median(held)) if held else None, "fork_step": mine[0]["fork_step"],
                **dict(zip(("median_delay_steps", "delay_lo", "delay_hi"), map(stats.finite, estimate), strict=True))}
        for name in COLLAPSE:
            own = [r[f"{name}_at_grok"] for r in mine if r[f"{name}_at_grok"] is not None]
            row[f"{name}_at_grok"] = float(np.mean(own)) if own else None
    return rows


# ---------------------------------------------------------------- figures and files

def write(desk: lab.Lab, result: Result, trained: bool) -> None:
    """Tables, figures and summary from the rows alone; `--figures-only` comes here with the rows of OUT/runs.csv."""
    out, config = desk.out, desk.config
    if trained:
        runs = [{"experiment": "fork", **run} for run in result.runs]
        if config.model != "mlp":
            flag_unlearned(runs, result.trajectories)
        files.write_csv(out / "runs.csv", runs, COLUMNS)
        files.write_csv(out / "trajectories.csv", result.trajectories)
        files.write_json(out / "provenance.json", lab.provenance(desk, result))
    runs, trajectories = files.read_runs(out / "runs.csv"), []            # read back, so that both ways see the same digits
    if (out / "trajectories.csv").exists():                               # a run of record may come without them
        trajectories = files.read_csv(out / "trajectories.csv")
        files.write_csv(out / "cells.csv", cell_rows(runs, trajectories))
    cells, answered = files.read_csv(out / "cells.csv"), claims(runs, config)
    found = findings(runs, cells, config)
    files.write_summary(out, answered, found)
    print(stats.table(answered))
    for row in found:
        if not row["id"].startswith(COLLAPSE):
            ours = "no value, half or more is censored" if row["ours"] is None else f"{row['ours']:.3g}"
            interval = f", 95% interval {row['lo']:.3g} to {row['hi']:.3g}" if row["lo"] is not None and row["hi"] is not None else ""
            print(f"{row['id']}: {ours}{interval}, n = {row['n']}, {row['n_censored']} censored")
    for p in config.p:
        for step in config.fork_steps:
            for rho in config.rho:
                arms = {arm: mine for arm in ARMS if (mine := pick(runs, p, step, arm, rho))}
                published = {key.split(".")[-1]: row["value"] for key, row in stats.published(lab.ROOT / "published.csv", f"B.fork.p{p}.").items()
                             if (step, rho, config.lr) == tuple(PAPER.values())}
                file = f"p{p}_fork{step}_rho{exactly(rho, 'g')}"
                plots.fork_arms(arms, published, out / "figures", f"arms_{file}")
                if trajectories:
                    plots.fork_trajectories(trajectories, f"trunk_p{p}_b{config.seeds}", arms, out / "figures", f"trajectories_{file}")
    ratios = [row for row in found if row["id"].startswith("raised_over_same.")]
    for axis, other in (("fork_step", "rho"), ("rho", "fork_step")):
        if len({row[axis] for row in ratios}) > 1:
            plots.fork_ratio(ratios, axis, other, out / "figures", f"ratio_over_{axis}")
    print(f"results in {out}")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, ARMS, argv)
    config = dataclasses.replace(config, **{k: v for k, v in MODELS.get(config.model, {}).items() if k not in given})
    check(config)
    desk = lab.Lab("fork", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: write(desk, Result(), trained=False))
    progress.announce(config, planned(config), given)
    if config.model != "mlp":
        print(f"--model {config.model}: the published forks are of the MLP, so no published number is answered")
    elif config.device != "cuda":
        paper = Config(**{"parts": ARMS, **PRESETS["paper"], **given, "preset": "paper", "device": "cuda", "dry_run": False})
        print("a GPU would run: ", end="")
        progress.announce(paper, planned(paper), given)
    if config.dry_run:
        return None
    desk.open()
    write(desk, train(desk), trained=True)
    desk.finish()
    return None


if __name__ == "__main__":
    lab.main(run)
