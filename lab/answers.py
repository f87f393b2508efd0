"""The runs of a command as tables, and statistics of them as functions of chosen members.

A statistic maps members `picks (B, members)` to `(B,)`: called with all members it is the estimate, with resampled ones its distribution
(`stats.resampled`), the same members in every cell, because arms share seeds.
"""
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from common import nearest_log
from lab import stats

ROOT = Path(__file__).resolve().parents[1]
UNLEARNED = 0.9   # train accuracy under which a run that had memorised has come apart
SAME = ("model", "p", "block", "lr", "seed0", "train_frac", "weight_decay")   # what a clamp shares with its free control


class Measured:
    """The cells of one command, each a table of members, and what has been answered from them so far: `claims` by id, `findings`."""

    def __init__(self, runs: list[dict], log: list[dict], prefix: str, answers: bool):
        """`log`: rows with `cell, member, step` and logged columns. `prefix` of the published ids; `answers`: these runs may answer them."""
        self.runs, self.claims, self.findings = runs, {}, []
        self.first = {run["cell"]: run for run in reversed(runs)}
        self.grok = {cell: np.array([*stats.times(runs, cell).values()]) for cell in self.first}
        self.mem = {cell: np.array([*stats.times(runs, cell, "t_mem_step").values()]) for cell in self.first}
        self.log: dict[str, dict] = {cell: {} for cell in self.first}
        for row in log:
            self.log[row["cell"]].setdefault(row["step"], {})[row["member"]] = row
        self.known = stats.published(ROOT / "published.csv", prefix) if answers else {}

    def T(self, cell: str) -> Callable[[np.ndarray], np.ndarray]:
        """Median T_grok."""
        return lambda picks: stats.median(self.grok[cell][picks])

    def at(self, cell: str, column: str = "logit_scale", step: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """Mean over members of a logged column: at `step`, or at the logged step nearest the median T_grok of the members that grok."""
        steps = sorted(self.log[cell])
        members = [run["member"] for run in self.runs if run["cell"] == cell]
        values = np.array([[self.log[cell][s].get(m, {}).get(column) for m in members] for s in steps], dtype=float)   # (k, members); None -> nan

        def mean(picks: np.ndarray) -> np.ndarray:
            if not steps or (step is not None and step not in steps):
                return np.full(len(picks), np.nan)
            if step is None and nearest_log(self.grok[cell]) not in (-1, *steps):                                   # the cell ended before it
                return np.full(len(picks), np.nan)
            if step is not None:
                return values[steps.index(step)][picks].mean(1)
            grok = np.sort(np.where(np.isfinite(self.grok[cell]), self.grok[cell], np.nan)[picks], axis=1)     # not a number sorts last
            n, rows = np.isfinite(grok).sum(1), np.arange(len(picks))
            middle = np.where(n > 0, (grok[rows, np.maximum(n - 1, 0) // 2] + grok[rows, n // 2 * (n > 0)]) / 2, steps[-1])
            nearest = np.abs(np.array(steps)[None] - middle[:, None]).argmin(1)
            return np.take_along_axis(values[nearest], picks, 1).mean(1)
        return mean

    def have(self, *cells: str) -> bool:
        return all(cell in self.first for cell in cells)

    def count(self, cells: tuple[str, ...]) -> tuple[int, int, float]:
        """Members, censored runs in all `cells`, and the share of them in the worst cell."""
        censored = [int((~np.isfinite(self.grok[cell])).sum()) for cell in cells]
        n = len(self.grok[cells[0]])
        return n, sum(censored), max(censored) / n

    def claim(self, key: str, cells: tuple[str, ...], statistic: Callable[[np.ndarray], np.ndarray], missing: str = "") -> None:
        """Answer published row `key`, if there is one, by `statistic` of chosen members of `cells`, if all of them ran.
        `missing` says what part of the published cells is not there: the answer is then inconclusive."""
        if key not in self.known or not self.have(*cells):
            return
        n, censored, worst = self.count(cells)
        row = self.known[key]                                            # a row without its number of members had the whole block
        row = {**row, "n_seeds": row["n_seeds"] or self.first[cells[0]]["block"]}
        budget = min(self.first[cell]["budget_steps"] for cell in cells)
        if row["printed"].startswith("not within ") and worst >= 0.5 and budget < float(row["printed"].split()[-1]):
            missing = f"censored at {budget} steps, the paper {row['printed']}"
        self.claims[key] = stats.claim(row, stats.resampled(n, statistic), n, censored, missing, 1.0 if missing else worst)

    def finding(self, key: str, quantity: str, cells: tuple[str, ...], statistic: Callable[[np.ndarray], np.ndarray] | float) -> None:
        """A number that the papers do not publish: a statistic of chosen members, or a plain value."""
        if self.have(*cells):
            n, censored, _ = self.count(cells)
            ours = stats.resampled(n, statistic) if callable(statistic) else (statistic, math.nan, math.nan)
            self.findings.append({"id": key, "quantity": quantity, **dict(zip(("ours", "lo", "hi"), map(stats.finite, ours), strict=True)),
                                  "n": n, "n_censored": censored})

    def ratio(self, over: str, under: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda picks: self.T(over)(picks) / self.T(under)(picks)

    def point(self, cell: str) -> dict:
        """One cell for the figures: its conditions, every member's times, its logit scale and collapse."""
        everyone = np.arange(len(self.grok[cell]))[None]
        return {**self.first[cell], "T": self.grok[cell], "T_mem": self.mem[cell],
                **{k: float(self.at(cell, k)(everyone)[0]) for k in ("logit_scale", "collapse32", "collapse64")}}


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
