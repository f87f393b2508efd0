"""Per-seed replay of released runs: the same cells from the same start, member by member, beside what the authors' GPU measured.

Claim: every network of both papers (arXiv 2606.13753, "A", and 2606.18465, "B") comes out again, T_mem and T_grok at the released step or one
logged step beside it. Nothing is fitted: a clamp at rho times a critical norm takes the critical norm stored with the run. A run censored on one
side only counts as grokked at the budget there.

Reads the released `.npz` files and trains what each describes: network, block size, modulus or parity, train fraction, loss, temperature, learning
rate, decay, clamp target and step, budget.
  B  the CPU's generators; an allocation holds the stored group norms; weight decay follows the Adam update. A fork file (same-state comparison) is
     trained freely to its fork step, once for all its arms, and continued at the stored target of each member. Logged every 25 steps.
  A  the draws of its CUDA card (lab/draws.py), measured on its geometric grid of steps, about 3% apart.
A run that is damaged, or of another kind, is refused; a file that is no run, such as weights beside one, is counted and left out.

    python exp_replay.py METRICS_DIR                                                     every released run
    python exp_replay.py METRICS_DIR --match 'mediation/*p59*tau1.70*' --members 0 1 2   minutes on 2 cores
    python exp_replay.py METRICS_DIR --match 'denserho/*' --dry-run                      what it would train
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import Cell, Result, UsageError, geometric_grid
from lab import console, figures, files, provenance, settings, stats
from lab.desk import Lab, main
from lab.released import NoRun, Released, read
from lab.result import Trajectories
from lab.state import inherit


@dataclass(frozen=True, kw_only=True)
class Config(settings.Machine):
    metrics_dir: str = field(metadata={"help": "folder with released .npz files, searched recursively", "kind": "positional"})
    match: tuple[str, ...] = settings.option(("*",), "only files whose name, or path below METRICS_DIR, matches a pattern (.npz left out)")


MOST_ROWS = 11   # of the table that a command ends with


# ---------------------------------------------------------------- cells

def files_chosen(config: Config) -> dict[str, Path]:
    """The files to replay by their names below METRICS_DIR, without .npz. Raises UsageError if there are none."""
    root = Path(config.metrics_dir)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; name the folder that holds the released .npz files")
    paths = {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.npz")) if path.is_file()}
    if not paths:
        raise UsageError(f"no .npz file is below {root}; name the folder that holds the released .npz files")
    wanted = [label for label in paths if any(fnmatch.fnmatch(text, m) for m in config.match for text in (label, Path(label).name))]
    if not wanted:
        raise UsageError(f"no .npz file below {root} matches {' or '.join(config.match)}; {len(paths)} are there")
    for label in wanted:
        if not label.isprintable():   # a table could not hold it; what is not UTF-8 is not printable
            raise UsageError(f"{label!a}: the name of this file cannot be printed, or is not UTF-8; rename it, or leave it out with --match")
    return {label: paths[label] for label in wanted}


def runs_among(paths: dict[str, Path], members: tuple[int, ...]) -> tuple[list[Released], str]:
    """The released cells in `paths`, and what is said of the others, if any. Raises UsageError for one that is damaged, or if none is left."""
    released, no_runs = [], []
    for label, path in paths.items():
        # the folder of the file: denserho of data/denserho/metrics/x.npz, dose of metrics/dose/x.npz
        experiment = next((name for name in reversed(path.resolve().parent.parts) if name != "metrics"), "")
        try:
            released.append(dataclasses.replace(read(path, label, members), experiment=experiment))
        except NoRun:
            no_runs.append(label)
    skipped = f"{len(no_runs)} of {len(paths)} files are no runs and are left out: {', '.join(no_runs)[:300]}" if no_runs else ""
    if not released:
        raise UsageError(f"no released run is among the files; {skipped}")
    return released, skipped


# ---------------------------------------------------------------- training: whole runs, then forks

def trunk(item: Released) -> Cell:
    """The free run that a fork left; the same for all arms of one block and fork step."""
    return dataclasses.replace(item.cell, name=f"trunk_p{item.cell.p}_b{item.cell.block}_to{item.fork_step}", arm="free", rho=None, held=(),
                               clamp_start=0, stop_step=item.fork_step, expected_steps=item.fork_step)


def train(desk: Lab, released: list[Released]) -> Result:
    """Whole runs in one stage; then, fork by fork, the free phase once and all its arms from there."""
    result, forks = Result(), {}
    if whole_runs := [item.cell for item in released if not item.fork_step]:
        result += desk.train("replay", whole_runs, deal=True)
    for item in released:
        if item.fork_step:
            forks.setdefault(trunk(item), []).append(item.cell)
    for i, (before, arms) in enumerate(forks.items()):
        free = desk.train(f"trunk{i}", [before], keep_state=True)
        part = desk.train(f"fork{i}", arms, free.state.fork(arms), deal=True)
        inherit(part.runs, free.runs)
        result += dataclasses.replace(free, runs=[], trajectories=Trajectories()) + part
    return result


# ---------------------------------------------------------------- what is measured

def by_cell(rows: Iterable[dict]) -> dict[str, list[dict]]:
    cells: dict[str, list[dict]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    return cells


def compare(released: list[Released], runs: list[dict]) -> list[dict]:
    """One row per run: steps there and here, and the difference of T_grok, censored sides counted at the budget."""
    rows, ours = [], by_cell(runs)
    for item in released:
        for run in ours.get(item.cell.name, ()):
            t_mem, t_grok = (None if steps[run["member"]] < 0 else int(steps[run["member"]]) for steps in (item.t_mem, item.t_grok))
            there, here = t_grok or run["budget_steps"], run["t_grok_step"] or run["budget_steps"]
            rows.append({"cell": item.cell.name, "member": run["member"], "t_mem_released": t_mem, "t_mem": run["t_mem_step"],
                         "t_grok_released": t_grok, "t_grok": run["t_grok_step"], "difference_steps": here - there,
                         "difference_evaluations": evaluations_between(item.cell, there, here)})
    return rows


def evaluations_between(cell: Cell, one: int, other: int) -> int:
    """Evaluations of the cell's schedule from step `one` to step `other`, never negative."""
    if cell.eval_every:
        return math.ceil(abs(other - one) / cell.eval_every)
    before, after = np.searchsorted(geometric_grid(cell.budget_steps), [one, other])
    return abs(int(after) - int(before))


def agreement(rows: list[dict], budgets: dict[str, int]) -> dict:
    """Of compared runs, how many agree and in what; the largest difference of T_grok is over the released one, or over the budget of the cell."""
    return {"n": len(rows), "exact": sum(row["t_grok"] == row["t_grok_released"] for row in rows),
            "within_one_evaluation": sum(row["difference_evaluations"] <= 1 for row in rows),
            "t_mem_equal": sum(row["t_mem"] == row["t_mem_released"] for row in rows),
            "largest_relative": max(abs(row["difference_steps"]) / (row["t_grok_released"] or budgets[row["cell"]]) for row in rows),
            "censored_alike": sum((row["t_grok"] is None) == (row["t_grok_released"] is None) for row in rows)}


def cell_rows(released: list[Released], trajectories: Iterable[dict], rows: list[dict]) -> list[dict]:
    """cells.csv: the agreement of each cell, and its effective logit scale, mean over the members that ran, at the released logged step nearest the
    released median T_grok, the last where none grokked. The trajectories are walked through once, whatever the number of cells."""
    ours, place = by_cell(rows), {}
    for item in released:
        kept = item.t_grok[item.t_grok >= 0]
        place[item.cell.name] = int(np.abs(item.steps - np.median(kept)).argmin()) if len(kept) else len(item.steps) - 1
    steps = {item.cell.name: item.steps[place[item.cell.name]] for item in released}
    scales: dict[str, list[float]] = {}
    for row in trajectories:
        if row["step"] == steps.get(row["cell"]):
            scales.setdefault(row["cell"], []).append(row["logit_scale"])
    cells = []
    for item in released:
        name = item.cell.name
        mine, here, there = ours[name], scales.get(name, []), item.logit_scale
        cells.append({"cell": name, "block": item.cell.block, **agreement(mine, {name: item.cell.budget_steps}), "step": int(steps[name]),
                      "logit_scale_released": None if there is None else float(there[place[name]]),
                      "logit_scale": float(np.mean(here)) if len(here) == len(mine) else None})
    return cells


def last_words(released: list[Released], rows: list[dict]) -> list[str]:
    """At most fourteen lines: the agreement of all runs, then a row a cell, or a row an experiment where cells are many, the worst first."""
    budgets, ours = {item.cell.name: item.cell.budget_steps for item in released}, by_cell(rows)
    group_of = {item.cell.name: item.cell.name if len(released) <= MOST_ROWS else item.experiment for item in released}
    groups = {group: agreement([row for name, mine in ours.items() if group_of[name] == group for row in mine], budgets)
              for group in dict.fromkeys(group_of.values())}
    worst = sorted(groups, key=lambda group: -groups[group]["largest_relative"])
    table = [("replayed", "runs", "T_mem exact", "T_grok exact", "within one logged step", "largest difference", "censored alike")]
    for group in worst[:MOST_ROWS]:
        s = groups[group]
        table.append((group, str(s["n"]), str(s["t_mem_equal"]), str(s["exact"]), str(s["within_one_evaluation"]), f"{s['largest_relative']:.2%}",
                      str(s["censored_alike"])))
    s = agreement(rows, budgets)
    return [f"replayed {s['n']} runs: T_mem exact in {s['t_mem_equal']}, T_grok exact in {s['exact']}, within one logged step in "
            f"{s['within_one_evaluation']}, largest difference {s['largest_relative']:.2%}, censored alike {s['censored_alike']}",
            stats.columns(table), *([f"and {len(worst) - MOST_ROWS} more in cells.csv"] if len(worst) > MOST_ROWS else [])]


# ---------------------------------------------------------------- figures

def draw(out: Path) -> None:
    figures.replay(files.read_csv(out / "replay.csv"), out / "figures")


# ---------------------------------------------------------------- run

def publish(desk: Lab, released: list[Released], result: Result) -> None:
    """Tables, the last lines, the figure."""
    out = desk.out           # one of several ranks leaves here
    rows = compare(released, result.runs)
    files.write_csv(out / "replay.csv", rows)
    files.write_csv(out / "cells.csv", cell_rows(released, result.trajectories, rows))
    files.write_csv(out / "trajectories.csv", result.trajectories)
    files.write_csv(out / "runs.csv", [{"experiment": "replay", **run} for run in result.runs], files.RUN_COLUMNS)
    files.write_json(out / "provenance.json", provenance.of_training(desk.config, desk.origin, desk.backends, result))
    print(*last_words(released, rows), f"tables in {out}, main figure {out / 'figures' / 'replay.png'}", sep="\n")
    draw(out)


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, {}, (), argv)
    paths = files_chosen(config)
    released, skipped = runs_among(paths, config.members)
    desk = Lab("replay", config, given, {}, inputs=files.digest({item.cell.name: paths[item.cell.name] for item in released}))
    if skipped:
        print(f"note: {skipped}")
    if config.figures_only:
        return desk.redraw(lambda: draw(desk.out))
    settings.check_size(config.device, ((item.cell.model, item.cell.p) for item in released))
    console.announce(config, [item.cell for item in released])
    if config.dry_run:
        return None
    desk.open()
    publish(desk, released, train(desk, released))
    return desk.finish()


if __name__ == "__main__":
    main(run)
