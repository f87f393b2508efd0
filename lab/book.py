"""What an ensemble keeps of its evaluations: crossings, the log, weights at the moments that matter, and the rows of results made from them."""
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import LOG_EVERY, T_GROK_ACCURACY, T_MEM_ACCURACY, Result
from kernels.layout import DenseLayout
from lab.result import Trajectories
from lab.stats import nearest_log, without_nan

CROSSINGS = (("train_accuracy", T_MEM_ACCURACY), ("test_accuracy", 0.80), ("test_accuracy", T_GROK_ACCURACY), ("test_accuracy", 0.95))
MEM, CROSS_80, GROK, CROSS_95 = range(4)
KEPT = AT_START, AT_MEM, AT_GROK, LAST, BEFORE = range(5)   # of a run that keeps its weights; the last two as in `last` and `before`
FOURIER = ("fourier_top5", "fourier_gini")
COLLAPSE = ("collapse32", "collapse64")
CELL_COLUMNS = ("networks", "model", "task", "loss", "p", "train_frac", "block", "seed0", "arm", "group", "rho", "tau", "gamma", "lr", "weight_decay",
                "clamp_start", "clamp_stop", "w_c", "budget_steps")


def fourier_structure(E: Tensor) -> Tensor:
    """Of the power spectra of `E (R, p, d)` over its p inputs: share of the five strongest non-DC frequencies, and Gini coefficient, `(R, 2)`.
    NaN where there is no power, or where it is not finite."""
    power = torch.fft.rfft(E.double(), dim=1)[:, 1:].abs().square().sum(2).sort(1).values       # (R, p // 2)
    m, total = power.shape[1], power.sum(1)
    rank = torch.arange(1, m + 1, dtype=torch.float64, device=E.device)
    structure = torch.stack([power[:, -5:].sum(1) / total, ((2 * rank - m - 1) * power).sum(1) / (m * total)], 1)
    return torch.where((power.isfinite().all(1) & (total > 0))[:, None], structure, math.nan)


class Book:
    """The part of `Ensemble` that takes in evaluations and gives out rows."""

    def record(self, runs: np.ndarray, k: int, metrics: np.ndarray) -> None:
        """Take in the evaluation `metrics (len(runs), metrics)` of `runs` after `k` more steps, of those that are measured there; retire the
        cells that it completes."""
        self.step[runs] += k
        seen = self.measured(runs, self.step[runs])
        runs, metrics = runs[seen], metrics[seen]
        step = self.step[runs]                                           # (len(runs),)
        due = self.due(runs, step)
        broken = ~np.isfinite(metrics[:, [self.metrics.index("train_loss"), self.metrics.index("norm")]]).all(1)
        new = broken & (self.diverged[runs] < 0)
        self.diverged[runs[new]] = step[new]
        for column, (name, threshold) in enumerate(CROSSINGS):
            new = due & (metrics[:, self.metrics.index(name)] >= threshold) & (self.crossed[runs, column] < 0)
            self.crossed[runs[new], column] = step[new]
            self.norm_at[runs[new], column] = metrics[new, self.metrics.index("norm")]
            if column == GROK:
                self.at_grok[runs[new]] = metrics[new]
                self.keep(runs[new], AT_GROK)
            elif column == MEM:
                self.keep(runs[new], AT_MEM)
        if self.kept is not None:
            self.kept[runs[due], BEFORE] = self.kept[runs[due], LAST]
            self.keep(runs[due], LAST)
        self.before[runs[due]] = self.last[runs[due]]
        self.last[runs[due]] = np.column_stack([step[due], metrics[due]])
        self.collapse_max[runs] = np.fmax(self.collapse_max[runs], self.before[runs][:, self.collapse_columns])
        after = due & (self.crossed[runs, GROK] >= 0) & (metrics[:, self.metrics.index("test_accuracy")] < T_GROK_ACCURACY)
        self.below_after_grok[runs] += after
        for c in np.unique(self.cell_of[runs]):
            mine = self.cell_of == c
            done = np.where(self.crossed[mine, GROK] >= 0, self.crossed[mine, GROK], self.diverged[mine])
            if (done >= 0).all():
                last = done.max()
                if self.cells[c].eval_every:   # every member is logged where the logit scale is read; on a grid it is by then
                    last = max(last, nearest_log(self.crossed[mine, GROK]))
                self.retire[mine] = np.minimum(last + self.cells[c].after_grok, self.end[mine])
        chosen = np.flatnonzero(self.logged(runs, step))
        for i, structure in zip(chosen, self.structure(runs[chosen]), strict=True):
            self.log.extend([runs[i], step[i], *metrics[i].tolist(), *structure])

    def rows_of(self, runs: np.ndarray, size: int) -> Tensor:
        """The first `size` parameters of `runs`, `(len(runs), size)`: from the device while they are there."""
        if self.backend == "triton" and self.kernels is not None:
            rows = torch.from_numpy(np.searchsorted(self.on_device, runs))
            return self.kernels.state.params[:, :size][rows.to(self.kernels.device)]
        return self.state.params[:, :size][torch.from_numpy(runs)]

    def structure(self, runs: np.ndarray) -> list[list[float]]:
        """Fourier structure of the embedding of each of `runs` as it is: all that comes over from a device."""
        if isinstance(self.layout, DenseLayout) or not len(runs):
            return [[math.nan] * len(FOURIER)] * len(runs)
        p, d = self.layout.p, self.layout.d
        return fourier_structure(self.rows_of(runs, p * d).unflatten(1, (p, d))).tolist()       # a token '=' would lie behind

    def keep(self, runs: np.ndarray, moment: int) -> None:
        """Remember the weights of `runs` as they are."""
        if self.kept is not None:
            self.kept[runs, moment] = self.rows_of(runs, self.layout.n_params).cpu()

    def moments(self, run: int) -> tuple[Tensor | None, ...]:
        """Kept parameters `(n_params,)` of `run` at its start, at T_mem, at T_grok and at the last evaluation before its cell retired; None for
        what it did not reach."""
        reached = [0 <= self.crossed[run, column] <= self.retire[run] for column in (MEM, GROK)]
        end = LAST if self.last[run, 0] <= self.retire[run] else BEFORE
        return tuple(self.kept[run, moment] if there else None for moment, there in zip((AT_START, AT_MEM, AT_GROK, end), (True, *reached, True),
                                                                                         strict=True))

    def log_table(self) -> np.ndarray:
        """A copy of the log `(rows, 2 + metrics)`: while somebody looks into an array it cannot grow."""
        return np.array(self.log).reshape(-1, self.log_width)

    def logged(self, runs: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Whether each of `runs`, measured at `step (len(runs),)`, is logged there: on a grid, always."""
        return (self.every[runs] == 0) | (step % LOG_EVERY == 0) | (step == self.start[runs] + 1)

    def result(self) -> Result:
        """Rows for runs.csv and trajectories.csv, final state, run-steps. What a run did past its cell's retirement is dropped."""
        out = Result(executed=self.executed, seconds=self.seconds, state=dataclasses.replace(self.state, step=self.step.copy()))
        for c in range(len(self.cells)):
            rows = self.rows(c)
            out.runs += rows.runs
            out.trajectories += rows.trajectories
            out.needed += rows.needed
        return out

    def rows(self, c: int) -> Result:
        """The part of `result` that belongs to cell number `c`: its rows, and the run-steps it needed."""
        cell, out = self.cells[c], Result()
        mine = np.flatnonzero(self.cell_of == c)
        for r in mine:
            last = int(self.retire[r])
            within = lambda step: int(step) if 0 <= step <= last else None  # noqa: B023, E731
            t_mem, t_80, t_grok, t_95 = (within(step) for step in self.crossed[r])
            diverged = within(self.diverged[r])
            steps = int(min(self.step[r], last))
            out.needed += steps - int(self.start[r])
            end = self.last[r] if self.last[r, 0] <= last else self.before[r]
            most = np.fmax(self.collapse_max[r], end[self.collapse_columns])
            at_grok = dict(zip(self.metrics, self.at_grok[r].tolist(), strict=True)) if t_grok is not None else {}
            held = [h or None for h in self.held[r].tolist()]
            out.runs.append({
                **{name: getattr(cell, name) for name in CELL_COLUMNS}, "p": cell.p or None, "train_frac": cell.train_frac or None,
                "task": Path(cell.task).name, **cell.changed(), "cell": cell.name, "member": int(self.member[r]), "n_train": self.n,
                "dtype": str(self.dtype).removeprefix("torch."),
                **dict(zip(("held_norm", *(f"held_{group}" for group in self.layout.groups)), held, strict=True)),
                "t_mem_step": t_mem, "t_80_step": t_80, "t_grok_step": t_grok, "t_95_step": t_95,
                "censored": int(t_grok is None), "diverged": int(diverged is not None), "steps_run": steps,
                **{name: float(self.norm_at[r, column]) if t is not None else None for name, column, t in (
                    ("norm_at_mem", MEM, t_mem), ("norm_at_80", CROSS_80, t_80), ("norm_at_95", CROSS_95, t_95))},
                **{f"{name}_at_grok": at_grok.get(name) for name in self.reported},
                **{f"{name}_at_end": value for name, value in zip(self.metrics, without_nan(end[1:]), strict=True) if name.startswith("norm")},
                **{f"{name}_max": value for name, value in zip(COLLAPSE, without_nan(most), strict=True)},
                "evals_below_after_grok": int(self.below_after_grok[r]) if t_grok is not None and cell.after_grok else None,
            })
            if not any(held) and not cell.scale_once:
                out.runs[-1].update(clamp_start=None, clamp_stop=None)
        out.trajectories = Trajectories(functools.partial(self.log_rows, mine, cell.name))
        return out

    def log_rows(self, runs: np.ndarray, cell: str) -> Iterator[dict]:
        """The log of `runs` as rows of trajectories.csv, by run and then by step."""
        names, log = (*self.metrics, *FOURIER), self.log_table()
        log = log[np.isin(log[:, 0], runs) & (log[:, 1] <= self.retire[log[:, 0].astype(int)])]
        for run, step, *values in log[np.lexsort((log[:, 1], log[:, 0]))].tolist():
            yield {"cell": cell, "member": int(self.member[int(run)]), "step": int(step), **dict(zip(names, values, strict=True))}
