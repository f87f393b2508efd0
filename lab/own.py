"""The papers' own networks: cells made from the conditions that `published.csv` states, with the papers' draws, held norms and protocol.

What a paper held is `rho` times the column `w_c`, so no control has to be trained first. Paper A's runs are measured on a grid of steps that
depends on their budget; budgets are those of its released runs. A cell is named after the set of runs that it belongs to.
"""
import dataclasses
from collections.abc import Iterable

import numpy as np

from common import EVAL_EVERY, LEARNING_RATES, Cell, Result, UsageError, cell_name, parity_sizes
from lab.draws import LAYERS, Card, paper_a_seed

AUDIT_EVERY = 50   # steps between evaluations of paper B's audit
ON_TO_95 = 1000    # steps to train on after the last member has reached test accuracy 0.90, where the norm at 0.95 is wanted
# steps at which the papers' runs end, by set of runs, and where it is not one number by rho; None: free
BUDGETS = {
    "denserho": {None: 12_000, 0.85: 8000, 0.90: 8000, 0.95: 8000, 1.00: 12_000, 1.05: 18_000, 1.10: 27_000, 1.15: 40_000, 1.20: 51_000,
                 1.25: 66_000, 1.30: 66_000},
    "efflr": 30_000, "normint": 20_000, "grokfss": 60_000,
    "pscan": {None: 25_000, 0.85: 15_000, 1.00: 25_000, 1.15: 80_000, 1.30: 160_000},       # and 1.2 times as long at p=71
    "tfnoln": 30_000, "tfnoln_long": {None: 40_000, 0.85: 30_000, 1.00: 40_000, 1.15: 120_000, 1.20: 180_000},
    "tfnormint": 25_000, "tfgrok": 40_000, "parity": 50_000, "parity_lambda": 50_000,
    "mediation": {None: 60_000, 1.00: 40_000, 1.15: 120_000}, "collapse": {1.00: 20_000, 1.05: 38_000, 1.10: 72_200, 1.15: 137_179},
    "dose": {None: 60_000, 0.85: 2186, 0.90: 4155, 0.95: 7894, 1.00: 15_000, 1.05: 28_500, 1.10: 54_150, 1.15: 102_884, 1.20: 195_481,
             1.25: 300_000},
    "alloc": 50_000, "audit": 60_000, "transformer": {None: 80_000, 1.00: 50_000, 1.15: 137_179},
}


def label(row: dict) -> str:
    """The set of runs that answers a published row; of paper B all cells of one block are one set."""
    return row["experiment"].split()[0] if row["id"].startswith("A.") else "B"


def budget(row: dict) -> int:
    """Step at which the paper's runs behind a published row end."""
    steps = BUDGETS[row["experiment"]]
    steps = steps if isinstance(steps, int) else steps[row["rho"]]
    return steps * 6 // 5 if (row["experiment"], row["p"]) == ("pscan", 71) else steps


def cells(rows: Iterable[dict], members: tuple[int, ...] = (), **only: tuple) -> list[Cell]:
    """A cell for every condition of the published `rows` that names one arm; `members` of its block, none: the whole. `only`: the values of a
    column that are wanted, empty: all; free runs have no `rho` to want."""
    found: dict[str, Cell] = {}
    for row in rows:
        wanted = all(not values or row[column] in values or (column == "rho" and row["arm"] == "free") for column, values in only.items())
        if row["arm"] and row["block"] and row["experiment"] in BUDGETS and wanted:
            made = cell(row, members)
            kept = found.setdefault(made.name, made)
            most = {name: max(getattr(kept, name), getattr(made, name)) for name in ("budget_steps", "expected_steps", "after_grok")}
            found[made.name] = dataclasses.replace(kept, **most)
    return list(found.values())


def cell(row: dict, members: tuple[int, ...] = (), shares: tuple[float, ...] = ()) -> Cell:
    """The cell of one published row. An allocation needs the `shares` of the groups: its held norms over w_c."""
    a, free, block = row["id"].startswith("A."), row["arm"] == "free", row["block"]
    fields = {"lr": row["lr"] or LEARNING_RATES[row["model"]], "weight_decay": row["wd"] or 1.0}
    if parity := row["model"] == "mlp_dense":
        network, key = {"task": row["task"]}, dict(zip("nkm", parity_sizes(row["task"]), strict=True))
    else:
        network = key = {"p": row["p"], "train_frac": row["train_frac"] or 0.40}
    protocol = ({"card": Card(), "seed0": paper_a_seed(row["experiment"], **key, **fields), "eval_every": 0} if a else
                {"seed0": 0, "decay_last": True, "eval_every": AUDIT_EVERY if row["experiment"] == "audit" else EVAL_EVERY})
    group, chosen, held = row["group"] or "", tuple(members) or tuple(range(block)), ()
    scaled = row["arm"] == "rescale" and group in LAYERS     # a transformer's group has the same name, and is held
    if scaled:
        protocol |= {"scale_once": tuple(0.8 if named else 1.0 for named in LAYERS[group])}
    elif group:
        held = tuple(row["rho"] * row["w_c"] if name == group else 0.0 for name in ("total", "embed", "attn", "mlp", "unembed"))
    elif not free:
        held = tuple(row["w_c"] * share for share in (0.0, *shares)) if shares else (row["rho"] * row["w_c"],)
    about = row["task"].replace(" ", "_") if parity else f"p{row['p']}"
    name = cell_name((label(row), row["arm"], group, about, f"b{block}"), ("", "", row["loss"], "ce"), ("rho", "g", row["rho"], None),
                     ("tau", "g", row["tau"] or 1.0, 1.0), ("gamma", "g", row["gamma"], None),
                     ("lr", "g", fields["lr"], LEARNING_RATES[row["model"]]), ("wd", "g", fields["weight_decay"], 1.0),
                     ("frac", "g", row["train_frac"] or 0.40, 0.40), ("", "", row["dtype"] or "float32", "float32"))
    steps = row["value"] if row["statistic"] == "T_grok" and row["value"] else 0
    made = Cell(name, members=chosen, block=block, budget_steps=budget(row), arm=row["arm"], loss=row["loss"], model=row["model"],
                rho=None if scaled else row["rho"], tau=row["tau"] or 1.0, gamma=row["gamma"], w_c=row["w_c"] if held else None,
                held=(held,) * len(chosen) if held else (), group=group, networks=label(row), expected_steps=int(1.15 * steps),
                after_grok=ON_TO_95 * (row["statistic"] == "W_c_at_0.95"), dtype=row["dtype"] or "", **network, **fields, **protocol)
    if row["arm"] == "rescale" and not scaled:               # the norm is set to its target at one step instead of held from there on
        return dataclasses.replace(made, clamp_stop=made.clamp_start + 1)
    return made


def under(rows: Iterable[dict], **conditions: object) -> list[dict]:
    """The `rows` that have all `conditions`."""
    return [row for row in rows if all(row.get(key) == value for key, value in conditions.items())]


def some(cells: list[Cell]) -> list[Cell]:
    """`cells`, all of a command. Raises UsageError if there are none: then the flags leave no condition that the papers ran."""
    if not cells:
        raise UsageError("--networks published: the paper ran none of these conditions; change the flags, or use --networks fresh")
    return cells


def shares_at_end(result: Result) -> dict[int, tuple[float, ...]]:
    """By p, the shares of E, W1 and W2 in the squared norm at the last logged step of the controls `result`: of their mean norms over members,
    as paper B's allocations have them."""
    shares, p_of = {}, {run["cell"]: run["p"] for run in result.runs}
    logged: dict[str, dict[int, list[list[float]]]] = {}                                    # by cell and step, norms of the groups by member
    for row in result.trajectories:
        logged.setdefault(row["cell"], {}).setdefault(row["step"], []).append([row[f"norm_{group}"] for group in ("E", "W1", "W2")])
    for cell, by_step in logged.items():
        power = np.mean(by_step[max(by_step)], 0) ** 2
        shares[p_of[cell]] = tuple((power / power.sum()).tolist())
    return shares
