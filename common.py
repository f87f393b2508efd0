"""What experiments share: the task, conditions as `Cell`s, and what training leaves of them.

Runs start as `draws.py` says, from the same bits on every device, and are trained by `ensemble.py`.
Source: arXiv 2606.13753 and 2606.18465, methods sections.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from draws import Card
from kernels.adamw import group_norms_ref
from kernels.layout import Layout, TransformerLayout, model_layout
from logbook import Trajectories

EVAL_EVERY = 25        # steps between evaluations, unless a cell has its own: the resolution of every T_mem and T_grok
LOG_EVERY = 200        # steps between rows of trajectories.csv
GRID_POINTS = 360      # of paper A's geometric grid, before rounding makes some of them equal
CLAMP_START = {"ce": 500, "mse": 50}   # step at which the papers engage the clamp on the MLP
TRANSFORMER_CLAMP_START = 600
MODELS = {"mlp": 1e-3, "transformer": 5e-4, "transformer_ln": 1e-3, "transformer_b": 5e-4}   # with the papers' learning rate of each


class UsageError(Exception):
    """Bad input: its message says in one line what is wrong and what would be right."""


# ---------------------------------------------------------------- task and conditions

def n_train(p: int, train_frac: float) -> int:
    return int(train_frac * p * p)


def clamp_start(model: str, loss: str) -> int:
    """First step after which the papers project the norm."""
    return CLAMP_START[loss] if model == "mlp" else TRANSFORMER_CLAMP_START


@functools.lru_cache
def geometric_grid(budget: int) -> np.ndarray:
    """Steps at which paper A's released runs were measured: 0, then about 3% apart, up to the budget."""
    return np.unique([0, *np.round(np.geomspace(1, budget, GRID_POINTS)).astype(int)])


@dataclass(frozen=True)
class Cell:
    """All chosen members of one block under one condition. `held`: for each member the targets of the total norm and of the norms of the
    model's groups (`layout.groups`); 0, or left out at the end, = not held."""
    name: str
    p: int
    members: tuple[int, ...]
    block: int
    budget_steps: int
    arm: str = "free"                 # free, clamp, rescale, alloc, same, raised, lowered
    loss: str = "ce"
    model: str = "mlp"
    seed0: int = 0
    train_frac: float = 0.40
    rho: float | None = None          # held norm over W_c
    tau: float = 1.0                  # divides the logits
    gamma: float | None = None        # allocation between E and W2
    lr: float = 1e-3
    weight_decay: float = 1.0
    clamp_start: int = 500            # first step after which the norm is projected
    clamp_stop: int | None = None     # first step after which it no longer is
    w_c: float | None = None          # critical norm that rho refers to
    held: tuple[tuple[float, ...], ...] = ()
    expected_steps: int = 0           # to grok, for the estimate of time only; 0 = budget
    decay_last: bool = False          # weight decay after the Adam update instead of before it
    after_grok: int = 0               # steps to train on after the last member has grokked
    stop_step: int = 0                # step to stop at short of the budget, to fork from; 0 = none
    dtype: str = ""                   # float32 or float64; empty: the command's
    card: Card | None = None          # CUDA card whose generator, seeded with seed0, draws the block, as in paper A; None: the CPU's
    eval_every: int = EVAL_EVERY      # steps between evaluations, a divisor of LOG_EVERY; 0: paper A's geometric grid up to the budget
    scale_once: tuple[float, ...] = ()   # factors of the model's groups, applied once, after step clamp_start; none: nothing is scaled

    def __post_init__(self) -> None:
        if self.eval_every and (self.eval_every < 0 or LOG_EVERY % self.eval_every):
            raise UsageError(f"eval_every must be 0, paper A's grid, or divide {LOG_EVERY}, got {self.eval_every}")

    @property
    def n_train(self) -> int:
        """Training pairs. Paper A, whose draws a `card` makes, rounds to the nearest number rather than down."""
        return n_train(self.p, self.train_frac) if self.card is None else max(2, round(self.train_frac * self.p**2))

    def ensemble_key(self) -> tuple:
        return self.p, self.model, self.loss, self.n_train, self.decay_last, self.dtype


def unique(cells: list[Cell]) -> list[Cell]:
    """One cell per condition; where parts ask for it with different budgets, the larger one. Raises ValueError if two conditions share a name."""
    best: dict[str, Cell] = {}
    for cell in cells:
        kept = best.setdefault(cell.name, cell)
        if dataclasses.replace(cell, budget_steps=kept.budget_steps, expected_steps=kept.expected_steps) != kept:
            raise ValueError(f"two conditions share the name {cell.name}")
        if cell.budget_steps > kept.budget_steps:
            best[cell.name] = cell
    return list(best.values())


def nearest_log(t_grok: np.ndarray) -> int:
    """Logged step nearest the median of the members that grok, where paper B reads a cell's logit scale; -1 if none does."""
    kept = t_grok[np.isfinite(t_grok) & (t_grok >= 0)]
    return -1 if not len(kept) else max(math.ceil(float(np.median(kept)) / LOG_EVERY - 0.5) * LOG_EVERY, 1)


def exactly(x: float, short: str) -> str:
    """`x` in format `short` where that says it exactly, else in full: two conditions never share a name."""
    return format(x, short) if float(format(x, short)) == x else repr(x)


@dataclass
class State:
    """Rows `(R, n_params)` of parameters and both moments, each after its own `step (R,)` steps. Copying it is forking."""
    params: Tensor
    moment1: Tensor
    moment2: Tensor
    step: np.ndarray

    def pick(self, rows: list[int]) -> "State":
        return State(self.params[rows].clone(), self.moment1[rows].clone(), self.moment2[rows].clone(), self.step[rows])

    @staticmethod
    def join(states: list["State"]) -> "State":
        """All rows, one state after the other."""
        return State(*(torch.cat([getattr(state, name) for state in states]) for name in ("params", "moment1", "moment2")),
                     np.concatenate([state.step for state in states]))

    def of_cells(self, cells: list[Cell], chosen: list[int]) -> "State":
        """The rows of the `chosen` of `cells`, of which each has a row per member."""
        ends = np.cumsum([0, *(len(cell.members) for cell in cells)])
        return self if len(chosen) == len(cells) else self.pick([r for i in chosen for r in range(ends[i], ends[i + 1])])

    def norms(self, layout: Layout | TransformerLayout) -> list[float]:
        """Total norm of every row's weight matrices, summed in float64."""
        return [float(group_norms_ref(row, layout).square().sum().sqrt()) for row in self.params]

    def fork(self, cells: list[Cell]) -> "State":
        """A copy of all rows, one per member, for each of `cells`: weights scaled at once to the cell's held norm, if it has one.
        Biases, moments and step stay as they are (arXiv 2606.18465, same-state comparison)."""
        layout = model_layout(cells[0].model, cells[0].p, self.params.dtype)
        copy = self.pick([*range(len(self.params))] * len(cells))
        targets = [held[0] for cell in cells for held in (cell.held or ((0.0,),) * len(cell.members))]
        for row, norm, target in zip(copy.params, copy.norms(layout), targets, strict=True):
            if target > 0:
                row[: layout.n_weights] *= target / norm
        return copy


@dataclass
class Result:
    """What training left: one dict per run (columns of runs.csv), log rows, final state, run-steps executed and needed."""
    runs: list[dict] = field(default_factory=list)
    trajectories: Trajectories = field(default_factory=Trajectories)
    state: State | None = None
    executed: int = 0
    needed: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Result") -> "Result":
        return Result(self.runs + other.runs, self.trajectories + other.trajectories, None, self.executed + other.executed,
                      self.needed + other.needed, self.seconds + other.seconds)


def inherit(runs: list[dict], before: list[dict]) -> None:
    """Rows of runs that continue from a fork keep what their member crossed before it."""
    earlier = {run["member"]: run for run in before}
    for run in runs:
        run.update({k: v for k in ("t_mem_step", "norm_at_mem", "t_80_step") if (v := earlier[run["member"]][k]) is not None})
