"""A published number and the runs that answer it.

`published.csv` states for every number the conditions it holds for and its statistic. A `Table` holds the runs of one command cell by cell; `answer`
picks, for every row, the cell whose conditions equal the row's, as numbers, and computes the statistic: the plain read-outs here, the others by
functions that an experiment hands over. A run at another dose, norm or rate answers nothing.

A statistic maps members `picks (B, members)` to `(B,)`: called with all members it is the estimate, with resampled ones its distribution
(`stats.resampled`), the same members in every cell, because arms share seeds.
"""
import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from common import CHANGED
from lab import own, stats

ROOT = Path(__file__).resolve().parents[1]
SAME = ("model", "task", "p", "block", "lr", "seed0", "train_frac", "weight_decay")   # what a clamp shares with its free control
NUMBERS = {"p": int, "block": int, **dict.fromkeys(("train_frac", "rho", "tau", "gamma", "lr", "wd", "w_c", "lo", "hi", "n_seeds"), float)}
# column of published.csv -> column of runs.csv; an empty field is no condition, but for these
CONDITIONS = {"model": "model", "task": "task", "p": "p", "train_frac": "train_frac", "loss": "loss", "arm": "arm", "group": "group", "rho": "rho",
              "tau": "tau", "gamma": "gamma", "lr": "lr", "wd": "weight_decay", "dtype": "dtype", "block": "block"}
UNLESS_STATED = {"tau": 1.0, "group": "", "gamma": None, **dict.fromkeys(CHANGED)}
UNLEARNED = 0.9   # train accuracy under which a run that had memorised has come apart
Statistic = Callable[[np.ndarray], np.ndarray]


def published(prefix: str = "") -> dict[str, dict]:
    """Rows of published.csv whose id starts with `prefix`, by id: numbers as numbers, empty fields as None, `printed` the value as printed."""
    rows = {}
    with open(ROOT / "published.csv", newline="") as f:
        for row in csv.DictReader(f):
            if row["id"].startswith(prefix):
                typed = {k: NUMBERS[k](text) if k in NUMBERS and text else text or None for k, text in row.items()}
                try:
                    value = float(row["value"])
                except ValueError:
                    value = None                                        # such as "not within 60000"
                rows[row["id"]] = {**typed, "value": value, "printed": row["value"]}
    return rows


class Table:
    """The cells of one command, each a table of members, and what has been answered from them so far: `claims` by id,
    `findings`, `law` (sentences for a person) and the published `medians` of cells."""

    def __init__(self, runs: list[dict], log: Iterable[dict] = (), networks: str = "fresh"):
        """`log`: rows with `cell, member, step` and logged columns. `networks`: "published" takes the papers' medians, over runs that grok."""
        self.runs, self.networks, self.claims, self.findings, self.law, self.medians = runs, networks, {}, [], [], {}
        self.first: dict[str, dict] = {}
        for run in runs:
            if run["cell"] not in self.first:
                given = {key: run.get(key) for key in ("group", "networks") if run.get(key)}
                self.first[run["cell"]] = {"networks": "fresh", **run, "task": run.get("task") or "add", "group": group_held(run), **given}
        self.grok = {cell: np.array([*stats.times(runs, cell).values()]) for cell in self.first}
        self.mem = {cell: np.array([*stats.times(runs, cell, "t_mem_step").values()]) for cell in self.first}
        self.log: dict[str, dict] = {cell: {} for cell in self.first}
        for row in log:
            if row["cell"] in self.log:
                self.log[row["cell"]].setdefault(row["step"], {})[row["member"]] = row

    # -- choosing cells

    def pick(self, **conditions: object) -> list[str]:
        """Cells that have all `conditions` (columns of runs.csv, and `group`, held alone), by p and rho."""
        found = [cell for cell, run in self.first.items() if all(run.get(k) == v for k, v in conditions.items())]
        return sorted(found, key=lambda cell: (self.first[cell]["p"] or 0, self.first[cell]["rho"] or 0))

    def like(self, row: dict, **more: object) -> list[str]:
        """Cells under all conditions that a published row states, and `more`, such as those that only its note has. Where no fresh networks were
        drawn in a block of its size, those of any other: they are as fresh."""
        stated = {column: row[key] for key, column in CONDITIONS.items() if row.get(key) is not None}
        wanted = {**UNLESS_STATED, **stated, "networks": own.label(row) if self.networks == "published" else "fresh", **more}
        found = self.pick(**wanted)
        if not found and self.networks == "fresh" and "block" in wanted:
            del wanted["block"]
            found = self.pick(**wanted)
        return found

    def match(self, row: dict, **more: object) -> str | None:
        """The cell that a published row is about, if it ran. Where the row has no dtype float32, the papers' precision, goes first."""
        return min(self.like(row, **more), key=lambda cell: self.first[cell].get("dtype") == "float64", default=None)

    def control(self, cell: str) -> str | None:
        """The free cell of the same network, block, rate and seeds."""
        run = self.first[cell]
        return next((name for name, other in self.first.items() if other["arm"] == "free" and all(other[k] == run[k] for k in SAME)), None)

    def have(self, *cells: str | None) -> bool:
        return all(cell in self.first for cell in cells)

    # -- statistics of chosen members

    def median(self, values: np.ndarray) -> np.ndarray:
        """Over the last axis: censored runs later than the budget; of the papers' networks, as they have it, over those that grok."""
        return stats.finite_median(values) if self.networks == "published" else stats.median(values)

    def T(self, cell: str) -> Statistic:
        """Median T_grok."""
        return lambda picks: self.median(self.grok[cell][picks])

    def T_mem(self, cell: str) -> Statistic:
        return lambda picks: self.median(self.mem[cell][picks])

    def delay(self, cell: str) -> Statistic:
        """Median of T_grok minus the fork step."""
        delays = self.values((cell,), "delay_steps")[0]
        return lambda picks: self.median(np.where(np.isnan(delays), math.inf, delays)[picks])

    def log_T(self, cells: Iterable[str]) -> Statistic:
        """Log of the median T_grok of several cells, `(B, cells)`; infinite where half of a cell is censored."""
        cells = tuple(cells)
        return lambda picks: np.log(np.stack([self.T(cell)(picks) for cell in cells], -1))

    def ratio(self, over: str, under: str) -> Statistic:
        return lambda picks: self.T(over)(picks) / self.T(under)(picks)

    def values(self, cells: Iterable[str], column: str) -> np.ndarray:
        """A column of runs.csv, `(cells, members)`; not a number where it is empty."""
        return np.array([[np.nan if r.get(column) is None else r[column] for r in self.runs if r["cell"] == cell] for cell in cells], dtype=float)

    def median_of(self, cell: str, column: str) -> Statistic:
        """Median of a column over the members that have it, such as the norm at own T_grok."""
        values = self.values((cell,), column)[0]
        return lambda picks: stats.finite_median(values[picks])

    def mean_of(self, cell: str, column: str) -> Statistic:
        values = self.values((cell,), column)[0]
        return lambda picks: values[picks].mean(-1)

    def at(self, cell: str, column: str = "logit_scale", step: int | None = None) -> Statistic:
        """Mean over members of a logged column: at `step`, or at the logged step nearest the median T_grok of the members that grok
        (paper B's L of a cell)."""
        steps = sorted(self.log[cell])
        members = [run["member"] for run in self.runs if run["cell"] == cell]
        values = np.array([[self.log[cell][s].get(m, {}).get(column) for m in members] for s in steps], dtype=float)   # (k, members); None -> nan

        def mean(picks: np.ndarray) -> np.ndarray:
            if not steps or (step is not None and step not in steps):
                return np.full(len(picks), np.nan)
            if step is None and stats.nearest_log(self.grok[cell]) not in (-1, *steps):                             # the cell ended before it
                return np.full(len(picks), np.nan)
            if step is not None:
                return values[steps.index(step)][picks].mean(1)
            grok = np.sort(np.where(np.isfinite(self.grok[cell]), self.grok[cell], np.nan)[picks], axis=1)     # not a number sorts last
            n, rows = np.isfinite(grok).sum(1), np.arange(len(picks))
            middle = np.where(n > 0, (grok[rows, np.maximum(n - 1, 0) // 2] + grok[rows, n // 2 * (n > 0)]) / 2, steps[-1])
            nearest = np.abs(np.array(steps)[None] - middle[:, None]).argmin(1)
            return np.take_along_axis(values[nearest], picks, 1).mean(1)
        return mean

    def over(self, column: str, cells: Iterable[str], statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Statistic:
        """`statistic` of a condition `(cells,)` and of ln T_grok `(B, cells)`, such as `stats.slope` over held_norm."""
        x, log_T = np.array([self.first[cell][column] for cell in cells], dtype=float), self.log_T(cells)
        return lambda picks: statistic(x, log_T(picks))

    def recovery(self, cells: Iterable[str], step: int | None = None, log: bool = False, joint: bool = False) -> Statistic:
        """Paper B's recovery fraction `(T1 - T2) / (T1 - T0)` (sec 4; `stats.recovery`): T0 of the baseline, first of `cells`, T1 at the raised
        norm, second, T2 at the temperature that gives it the baseline's logit scale. The scale at `step`, else at grokking; `joint`: of the same
        resampled members, else of all."""
        cells = tuple(cells)

        def fraction(picks: np.ndarray) -> np.ndarray:
            who = picks if joint else np.arange(picks.shape[1])[None].repeat(len(picks), 0)
            T = np.stack([self.T(cell)(picks) for cell in cells], 1)                                             # (B, cells)
            L = np.stack([self.at(cell, step=step)(who) for cell in cells], 1)
            return stats.recovery(T[:, 0], T[:, 1], T[:, 1:], L[:, 1:], L[:, 0], log)
        return fraction

    # -- answers

    def count(self, cells: tuple[str, ...]) -> tuple[int, int, float]:
        """Members, censored runs in all `cells`, and the share of them in the worst cell."""
        censored = [int((~np.isfinite(self.grok[cell])).sum()) for cell in cells]
        n = len(self.grok[cells[0]])
        return n, sum(censored), max(censored) / n

    def claim(self, row: dict, cells: Iterable[str], statistic: Statistic, missing: str = "") -> None:
        """Answer a published row by `statistic` of chosen members of `cells`. `missing` says what part of the published cells is not there."""
        cells = tuple(cells)
        n, censored, worst = self.count(cells)
        row = {**row, "n_seeds": row["n_seeds"] or row["block"] or self.first[cells[0]]["block"]}
        budget = min(self.first[cell]["budget_steps"] for cell in cells)
        if row["printed"].startswith("not within ") and worst >= 0.5 and budget < float(row["printed"].split()[-1]):
            missing = f"censored at {budget} steps, the paper {row['printed']}"
        ours = stats.resampled(n, statistic)
        if self.networks == "fresh" and row["id"].startswith("B.") and self.first[cells[0]]["seed0"] == 0:
            missing = "seed0 0 draws paper B's own networks, fresh ones are needed (--seed0 1000)"
        if self.networks == "published":
            self.claims[row["id"]] = stats.reproduced(row, ours, n, censored, missing)
        else:
            self.claims[row["id"]] = stats.replicated(row, ours, n, censored, missing, 1.0 if missing else worst)
            norm = self.first[cells[0]].get("w_c")
            if norm and row["w_c"] and abs(norm / row["w_c"] - 1) > 5e-4:
                self.claims[row["id"]]["why"] += f"; our W_c is {100 * (norm / row['w_c'] - 1):+.1f}% off the paper's{worth(row, norm, ours[0])}"

    def finding(self, key: str, quantity: str, cells: Iterable[str], statistic: Statistic | float, law: str = "", paper: str = "",
                **where: object) -> None:
        """A number that the papers do not publish: a statistic of chosen members, or a plain value. `where`: its conditions, for figures.
        `law`: what to call it among the last lines, beside the published number `paper` where that was answered."""
        cells = tuple(cells)
        if self.have(*cells):
            n, censored, _ = self.count(cells)
            ours = stats.resampled(n, statistic) if callable(statistic) else (statistic, math.nan, math.nan)
            self.findings.append(stats.finding(key, quantity, ours, n, censored, **where))
            if law:   # the paper's doses may not be the command's: then the published number was answered by another one
                self.say(law, ours, n, censored, paper if self.claims.get(paper, {}).get("ours") == stats.finite(ours[0]) else "")

    def say(self, label: str, ours: tuple[float, float, float], n: int, censored: int, key: str = "") -> None:
        """A sentence of the command's last lines: an estimate with its interval, beside the published number `key` where it answers one."""
        if math.isnan(ours[0]):
            return
        interval = f" [{stats.short(ours[1])}, {stats.short(ours[2])}]" if all(map(math.isfinite, ours[1:])) else ""
        claim = self.claims.get(key)
        paper = f", paper {stats.short(claim['published'])}: {claim['verdict']}" if claim else ""
        whose = "of the paper's own networks" if self.networks == "published" else "networks"
        self.law.append(f"{label} = {stats.short(ours[0])}{interval}{paper}, {n} {whose}, {censored} censored")

    def point(self, cell: str) -> dict:
        """One cell for the figures: its conditions, every member's times, its logit scale and collapse."""
        everyone = np.arange(len(self.grok[cell]))[None]
        return {**self.first[cell], "T": self.grok[cell], "T_mem": self.mem[cell],
                **{k: float(self.at(cell, k)(everyone)[0]) for k in ("logit_scale", "collapse32", "collapse64")}}


def worth(row: dict, norm: float, ours: float) -> str:
    """What of the difference to a published T_grok another held norm explains by paper A's law T ~ exp(alpha rho), and what is left to seeds and
    protocol; nothing of other numbers, and of models and losses that the law was not fitted to."""
    law = (row["statistic"], row["arm"], row["model"], row["loss"], row["tau"] or 1.0) == ("T_grok", "clamp", "mlp", "ce", 1.0)
    if not law or not row["value"] or not math.isfinite(ours):
        return ""
    by_norm = math.exp(published("A.alpha.dense")["A.alpha.dense"]["value"] * row["rho"] * (norm / row["w_c"] - 1))
    return f", worth {100 * (by_norm - 1):+.0f}% of T_grok by the delay law; seeds and protocol {100 * (ours / row['value'] / by_norm - 1):+.0f}%"


READOUTS: dict[str, Callable[[Table, str], Statistic]] = {
    "T_grok": Table.T,
    "T_mem": Table.T_mem,
    "L": Table.at,
    "W_c": lambda table, cell: table.median_of(cell, "norm_at_grok"),
    # of paper B's own networks its median where it read them, at the end of the control; of fresh ones at own T_grok, as everywhere
    "W_c_end": lambda table, cell: table.median_of(cell, "norm_at_end") if table.networks == "published" else table.median_of(cell, "norm_at_grok"),
    "W_c_at_0.80": lambda table, cell: table.median_of(cell, "norm_at_80"),
    "W_c_at_0.90": lambda table, cell: table.median_of(cell, "norm_at_grok"),
    "W_c_at_0.95": lambda table, cell: table.median_of(cell, "norm_at_95"),
    "W_c_unembed": lambda table, cell: table.median_of(cell, "norm_unembed_at_grok"),
    "delay": Table.delay,
    "collapse32_max": lambda table, cell: table.mean_of(cell, "collapse32_max"),   # of each member's largest rate
    "collapse64_max": lambda table, cell: table.mean_of(cell, "collapse64_max"),
}


def at_doses(doses: Iterable[tuple[float, float]], statistic: Callable[..., Statistic], **more: object) -> Callable[[Table, dict], tuple | None]:
    """For `answer`: `statistic(table, cells, **more)` of the cells held at exactly these `(rho, tau)`, if all of them ran."""
    doses = tuple(doses)

    def found(table: Table, row: dict) -> tuple | None:
        cells = [table.match({**row, "arm": "clamp", "rho": rho, "tau": tau}) for rho, tau in doses]
        return (cells, statistic(table, cells, **more), "") if table.have(*cells) else None
    return found


def answer(table: Table, rows: Iterable[dict], statistics: dict[str, Callable[[Table, dict], tuple | None]]) -> None:
    """Answer all `rows` that the runs of `table` can. A function of `statistics` maps table and row to `(cells, statistic, what is missing)`,
    or to None if the cells are not there; it goes before the read-out of the same name."""
    for row in rows:
        if row["statistic"] in statistics:
            found = statistics[row["statistic"]](table, row)
        else:
            cell = table.match(row) if row["statistic"] in READOUTS else None
            found = ((cell,), READOUTS[row["statistic"]](table, cell), "") if cell else None
        if found and row["statistic"].startswith(("W_c", "collapse")):      # some member must have a value
            n = table.count(found[0])[0]
            found = found if np.isfinite(found[1](np.arange(n)[None])).any() else None
        if found:
            table.claim(row, *found)
            if row["statistic"] in ("T_grok", "delay"):
                table.medians.setdefault(found[0][0], row["value"])


def merged(tables: list[Table]) -> tuple[list[dict], list[dict]]:
    """Claims and findings of summary.json: an entry for each published number, with what the papers' networks say (`reproduced`) and what fresh
    ones say (`replicated`), of both what there is."""
    claims: dict[str, dict] = {}
    for table in tables:
        kind = "reproduced" if table.networks == "published" else "replicated"
        for key, claim in table.claims.items():
            entry = claims.setdefault(key, {k: claim[k] for k in ("id", "quantity", "published", "published_lo", "published_hi")})
            entry[kind] = {k: claim[k] for k in ("ours", "lo", "hi", "n", "n_censored", "verdict", "why")}
    return [*claims.values()], [{**finding, **({"networks": "published"} if table.networks == "published" else {})}
                                for table in tables for finding in table.findings]


def group_held(run: dict) -> str:
    """The group of weights that a run holds alone; empty if it holds the total norm, several groups, or nothing."""
    held = [k.removeprefix("held_") for k, v in run.items() if k.startswith("held_") and v is not None]
    return held[0] if len(held) == 1 and held[0] != "norm" else ""


def lacking(ours: Iterable[float], published: tuple[float, ...], what: str = "doses") -> str:
    """What our doses lack of a published fit: both of its ends, and at least half of its doses, must be there."""
    ours = tuple(ours)
    have = set(ours) & set(published)
    enough = {published[0], published[-1]} <= have and 2 * len(have) >= len(published)
    ran, wanted = f"{len(ours)} {what} {min(ours):g}..{max(ours):g}", f"{len(published)} of {published[0]}..{published[-1]}"
    return "" if enough else f"fitted to {ran}, the paper to {wanted}"


def flag_unlearned(runs: list[dict], trajectories: Iterable[dict]) -> None:
    """Adds to every row `unlearned`: logged steps after T_mem with train accuracy under UNLEARNED. At a held norm nothing overflows, so a run
    that comes apart there shows here and not in `diverged`. Seen in transformers only."""
    t_mem = {(run["cell"], run["member"]): run["t_mem_step"] for run in runs}
    lost = Counter((t["cell"], t["member"]) for t in trajectories if (start := t_mem.get((t["cell"], t["member"]))) is not None and t["step"] > start
                   and t["train_accuracy"] is not None and t["train_accuracy"] < UNLEARNED)
    for run in runs:
        run["unlearned"] = lost[run["cell"], run["member"]]
        if run["unlearned"]:
            print(f"member {run['member']} of {run['cell']} unlearned its training pairs at {run['unlearned']} logged steps; its row says so")
