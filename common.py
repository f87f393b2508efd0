"""What the experiments share: the task, the networks, conditions as `Cell`s, and `train`.

    from common import Cell, train
    result = train([Cell(p=59, members=range(4), lr=4e-3), Cell(p=59, members=range(4), lr=4e-3, rho=1.1, w_c=54.5)])
    print(result.table())        # a row per condition; result.runs has a dict per network

Networks are trained by fused kernels (`kernels/`) from starts that are the same bits on every machine (`lab/draws.py`). The modules below say
what is computed; tests differentiate them in float64. Source: arXiv 2606.13753 and 2606.18465, methods sections.
"""
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.draws import Card
from lab.result import Result
from lab.tasks import TASKS, UsageError, elements, n_pairs, n_train, parity_sizes

EVAL_EVERY = 25        # steps between evaluations, unless a cell has its own: the resolution of every T_mem and T_grok
LOG_EVERY = 200        # steps between rows of trajectories.csv
T_MEM_ACCURACY = 0.99    # train accuracy that counts as memorised: T_mem is the first evaluation at or above it
T_GROK_ACCURACY = 0.90   # test accuracy that counts as grokked: T_grok is the first evaluation at or above it
GRID_POINTS = 360      # of paper A's geometric grid, before rounding makes some of them equal
CLAMP_START = {"ce": 500, "mse": 50, "stablemax": 500}   # step at which the papers engage the clamp on the MLP; StableMax has none of theirs
CLAMP_START_OF = {"transformer": 600, "transformer_ln": 600, "transformer_b": 600, "mlp_dense": 1000}   # and on the others
MODELS = {"mlp": 1e-3, "transformer": 5e-4, "transformer_ln": 1e-3, "transformer_b": 5e-4}   # of pairs; learning rates are the papers'
LEARNING_RATES = {**MODELS, "mlp_dense": 1e-3}   # and of the one whose inputs are no pairs
CHANGED = ("beta1", "beta2", "warmup", "d", "H", "init_scale", "hold", "perp_grad", "hold_from")   # columns that are there where a run needs one


# ---------------------------------------------------------------- the clamp, the schedule

def clamp_start(model: str, loss: str) -> int:
    """First step after which the papers project the norm."""
    return CLAMP_START_OF.get(model, CLAMP_START[loss])


@functools.lru_cache
def geometric_grid(budget: int) -> np.ndarray:
    """Steps at which paper A's released runs were measured: 0, then about 3% apart, up to the budget."""
    return np.unique([0, *np.round(np.geomspace(1, budget, GRID_POINTS)).astype(int)])


# ---------------------------------------------------------------- the networks: what the kernels compute, in plain torch

class Mlp(nn.Module):
    """Embedding, one hidden layer, logits: `x = [E[a]; E[b]]`, `h = gelu(x W1 + b1)` (erf), `z = h W2 + b2` (both papers)."""

    def __init__(self, p: int, d: int = 128, H: int = 256):
        super().__init__()
        for name, shape in {"E": (p, d), "W1": (2 * d, H), "W2": (H, p), "b1": (H,), "b2": (p,)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat([self.E[a], self.E[b]], -1)                     # (n, 2d)
        h = functional.gelu(x @ self.W1 + self.b1)                    # (n, H)
        return h @ self.W2 + self.b2                                  # (n, p)


class Transformer(nn.Module):
    """One layer over the tokens a, b, '=' (token p), read at '='; no biases. `normed`: LayerNorm without gain before attention, before the
    MLP block and before the unembedding (arXiv 2606.13753, section 7)."""

    def __init__(self, p: int, d: int = 128, H: int = 512, heads: int = 4, classes: int = 0, normed: bool = False):
        super().__init__()
        for name, shape in {"E": (p + 1, d), "pos": (3, d), "Wq": (d, d), "Wk": (d, d), "Wv": (d, d), "Wo": (d, d), "Win": (d, H),
                            "Wout": (H, d), "U": (d, classes or p + 1)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.p, self.heads = p, heads
        self.norm = (lambda x: functional.layer_norm(x, x.shape[-1:])) if normed else lambda x: x

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        tokens = torch.stack([a, b, torch.full_like(a, self.p)], -1)  # (n, 3)
        x = self.E[tokens] + self.pos                                 # (n, 3, d)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731, (n, heads, tokens, d / heads)
        y = self.norm(x)
        mixed = functional.scaled_dot_product_attention(split(y[:, -1:] @ self.Wq), split(y @ self.Wk), split(y @ self.Wv))
        x = x[:, -1] + mixed.transpose(1, 2).flatten(1) @ self.Wo     # (n, d)
        x = x + functional.gelu(self.norm(x) @ self.Win) @ self.Wout  # (n, d)
        return self.norm(x) @ self.U                                  # (n, classes)


class ParityMlp(nn.Module):
    """The dense MLP, two classes, no embedding: `h = gelu(x W1 + b1)` (erf), `z = h W2 + b2` (arXiv 2606.13753, section 8)."""

    def __init__(self, n: int, H: int = 512):
        super().__init__()
        for name, shape in {"W1": (n, H), "W2": (H, 2), "b1": (H,), "b2": (2,)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x @ self.W1 + self.b1) @ self.W2 + self.b2   # (m, n) -> (m, 2)


def module(model: str, p: int, width: tuple[int, int] = ()) -> nn.Module:
    """An untrained plain module of `model`, one of LEARNING_RATES, of a `width`, d and H, or the papers'; `mlp_dense` has `p` inputs.
    `lab.state.State.module` fills one with trained weights."""
    if model == "mlp_dense":
        return ParityMlp(p)
    if model == "mlp":
        return Mlp(p, *width)
    return Transformer(p, *width, classes=p if model == "transformer_b" else 0, normed=model == "transformer_ln")


# ---------------------------------------------------------------- conditions

@dataclass(frozen=True)
class Cell:
    """All chosen members of one block under one condition. A member is one network with its own start and split; it depends on the size of its
    block as well as on its number. With `rho` and `w_c` the total norm is held at `rho w_c`. What is left out follows from the rest."""
    name: str = ""                    # made from the conditions
    p: int = 0                        # elements: 59, or as many as the task has; of an mlp_dense it says nothing, nor does train_frac
    members: tuple[int, ...] = (0,)
    block: int = 0                    # members drawn from one generator; the smallest block that has them all
    budget_steps: int = 60_000        # a run that has not grokked by then is censored there
    arm: str = ""                     # free, clamp, rescale, alloc, same, raised, lowered; free, or clamp where a norm is held
    loss: str = "ce"                  # ce, mse or stablemax
    model: str = "mlp"
    task: str = "add"                 # one of TASKS, or a file with a table of labels; of an mlp_dense what `parity_task` gives
    seed0: int = 0
    train_frac: float = 0.40
    rho: float | None = None          # held norm over W_c
    tau: float = 1.0                  # divides the logits
    gamma: float | None = None        # allocation between E and W2
    lr: float = 0.0                   # the papers' for the model
    weight_decay: float = 1.0
    clamp_start: int = -1             # first step after which the norm is projected; the papers' for model and loss
    clamp_stop: int | None = None     # first step after which it no longer is
    w_c: float | None = None          # critical norm that rho refers to
    held: tuple[tuple[float, ...], ...] = ()   # for each member the held total norm, then that of each group of weights; 0 = not held
    expected_steps: int = 0           # to grok, for the estimate of time only; 0 = budget
    decay_last: bool = False          # weight decay after the Adam update instead of before it
    after_grok: int = 0               # steps to train on after the last member has grokked
    stop_step: int = 0                # step to stop at short of the budget, to fork from; 0 = none
    dtype: str = ""                   # float32 or float64; empty: the command's
    card: Card | None = None          # CUDA card whose generator, seeded with seed0, draws the block, as in paper A; None: the CPU's
    eval_every: int = EVAL_EVERY      # steps between evaluations, a divisor of LOG_EVERY; 0: paper A's geometric grid up to the budget
    group: str = ""                   # of weights that is held or scaled alone
    networks: str = "fresh"           # or the set of a paper's own runs that these networks are
    scale_once: tuple[float, ...] = ()   # factors of the model's groups, applied once, after step clamp_start; none: nothing is scaled
    betas: tuple[float, float] = (0.9, 0.999)   # of AdamW
    warmup: int = 0                   # steps over which the learning rate rises linearly to lr
    width: tuple[int, ...] = ()       # embedding and hidden width, d and H; none: the papers'
    init_scale: float = 1.0           # factor of the starting weight matrices
    hold: str = "exact"               # a held norm is exact, or a cap: then only what is larger is brought down to it
    perp_grad: bool = False           # the gradient's component along the weights is left out (arXiv 2501.04697)

    def __post_init__(self) -> None:
        if self.eval_every and (self.eval_every < 0 or LOG_EVERY % self.eval_every):
            raise UsageError(f"eval_every must be 0, paper A's grid, or divide {LOG_EVERY}, got {self.eval_every}")
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in ("members", "betas", "width"):
            put(name, tuple(getattr(self, name)))
        if self.model not in LEARNING_RATES:
            raise UsageError(f"model must be one of {', '.join(LEARNING_RATES)}, got {self.model!r}")
        if not self.members or min(self.members) < 0 or (self.block and max(self.members) >= self.block):
            raise UsageError(f"members must be numbers of the block, 0..{(self.block or 1) - 1}, got {self.members}")
        if self.model == "mlp_dense":
            parity_sizes(self.task)
            put("p", 0)
            put("train_frac", 0.0)
        else:
            if self.task.startswith("parity"):
                raise UsageError(f"sparse parity is the task of model mlp_dense; model {self.model} takes {', '.join(TASKS)} or a file of labels")
            put("p", self.p or elements(self.task) or 59)
            if self.task != "add" and (self.card or self.networks != "fresh"):
                raise UsageError(f"the papers' own networks add; task {self.task} needs fresh ones")
            if self.p < 2 or not 1 <= n_train(self.p, self.train_frac, self.task) < n_pairs(self.p, self.task):
                raise UsageError(f"p at least 2, and train_frac leaves pairs to train and test on; got p {self.p}, train_frac {self.train_frac}")
        if self.loss not in CLAMP_START or not self.tau > 0:
            raise UsageError(f"loss is ce, mse or stablemax, tau above 0; got loss {self.loss}, tau {self.tau}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas are two numbers of at least 0 and below 1, such as 0.9 0.98; got {' '.join(map(str, self.betas))}")
        if self.width and (len(self.width) != 2 or any(size < 16 or size % 16 for size in self.width) or self.model == "mlp_dense"):
            raise UsageError("width is two multiples of 16, those of the embedding and of the hidden layer, such as 64 128, of a model with an "
                             f"embedding; got {' '.join(map(str, self.width))}, model {self.model}")
        if self.warmup < 0 or not 0 < self.init_scale < math.inf or self.hold not in ("exact", "cap"):
            raise UsageError(f"warmup must be at least 0, init_scale above 0, hold exact or cap; got warmup {self.warmup}, "
                             f"init_scale {self.init_scale}, hold {self.hold}")
        put("block", self.block or max(self.members) + 1)
        put("lr", self.lr or LEARNING_RATES[self.model])
        if not (0 < self.lr < math.inf and self.weight_decay >= 0 and self.budget_steps >= 1):
            raise UsageError(f"lr must be above 0, weight_decay at least 0 and budget_steps at least 1, got lr {self.lr}, "
                             f"weight_decay {self.weight_decay}, budget_steps {self.budget_steps}")
        if self.clamp_start < 0:
            put("clamp_start", clamp_start(self.model, self.loss))
        if self.rho is not None and self.w_c is not None and not self.held:
            put("held", ((self.rho * self.w_c,),) * len(self.members))
        if self.held and len(self.held) != len(self.members):
            raise UsageError(f"held must have norms for each of the {len(self.members)} members, got {len(self.held)}")
        put("arm", self.arm or ("clamp" if any(map(any, self.held)) else "free"))
        put("name", self.name or self._described())

    def _described(self) -> str:
        dense = self.model == "mlp_dense"
        task = "" if self.task == "add" else Path(self.task).stem.replace(" ", "_")
        return cell_name((self.arm, task, "" if dense else f"p{self.p}", f"b{self.block}"),
                         ("", "", self.model, "mlp_dense" if dense else "mlp"), ("", "", self.loss, "ce"), ("rho", ".2f", self.rho, None),
                         ("wc", "g", self.w_c, None), ("tau", "g", self.tau, 1.0), ("gamma", "+.2f", self.gamma, None),
                         ("wd", "g", self.weight_decay, 1.0), ("lr", "g", self.lr, LEARNING_RATES[self.model]),
                         ("frac", "g", self.train_frac, 0.0 if dense else 0.40), ("seed", "", self.seed0, 0), ("", "", self.dtype, ""),
                         *((short, "g", value, None) for short, value in self.changed().items()))

    @property
    def n_train(self) -> int:
        """Training pairs, or examples. Paper A, whose draws a `card` makes, rounds to the nearest number rather than down."""
        if self.model == "mlp_dense":
            return parity_sizes(self.task)[2]
        return n_train(self.p, self.train_frac, self.task) if self.card is None else max(2, round(self.train_frac * self.p**2))

    def changed(self) -> dict[str, object]:
        """The columns of runs.csv, of CHANGED, in which this cell is none of the papers'."""
        (beta1, beta2), (d, H) = self.betas, self.width or (None, None)
        usual = clamp_start(self.model, self.loss)
        values = (beta1, beta2, self.warmup, d, H, self.init_scale, self.hold, int(self.perp_grad),
                  self.clamp_start if self.arm == "clamp" and self.networks == "fresh" else usual)
        return {name: value for name, value, papers in zip(CHANGED, values, (0.9, 0.999, 0, None, None, 1.0, "exact", 0, usual), strict=True)
                if value != papers}

    def ensemble_key(self) -> tuple:
        """Cells of equal key have equal shapes and are trained together."""
        return self.p, self.model, self.task, self.loss, self.n_train, self.decay_last, self.dtype, self.width, self.perp_grad


def exactly(x: float, short: str) -> str:
    """`x` in format `short` where that says it exactly, else in full: two conditions never share a name."""
    return format(x, short) if float(format(x, short)) == x else repr(x)


def cell_name(words: Iterable[str], *conditions: tuple[str, str, object, object]) -> str:
    """The name of a cell: its `words`, then every one of its `conditions`, `(short, format, value, default)`, whose value is not the default."""
    parts = [word for word in words if word]
    for short, text, value, default in conditions:
        if value != default:
            parts.append(short + (exactly(value, text) if isinstance(value, float) else str(value)))
    return "_".join(parts)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """One cell per name; where parts of an experiment ask for it with different budgets, the larger one. Raises ValueError if two conditions
    share a name."""
    best: dict[str, Cell] = {}
    for cell in cells:
        kept = best.setdefault(cell.name, cell)
        if dataclasses.replace(cell, budget_steps=kept.budget_steps, expected_steps=kept.expected_steps) != kept:
            raise ValueError(f"two conditions share the name {cell.name}")
        if cell.budget_steps > kept.budget_steps:
            best[cell.name] = cell
    return list(best.values())


# ---------------------------------------------------------------- training

def load(path: str | Path) -> "Saved":  # noqa: F821, of lab/weights.py
    """Networks of a cell trained with `--save-weights`, or with a folder of `weights`: a `Saved`. Raises UsageError for a file that is none."""
    from lab import weights
    return weights.load(Path(path))


def train(cells: Iterable[Cell], device: str = "auto", backend: str = "auto", dtype: str = "float32", arithmetic: str = "ieee",
          weights: str | Path = "") -> Result:
    """Train all `cells`, those of equal shape together, with a bar on a terminal; nothing is written but, with a folder of `weights`, the trained
    networks there, for `load`. The experiments do the same in an output folder, with checkpoints (`lab/desk.py`). Raises UsageError for what
    cannot be."""
    from lab.console import Progress  # they know `Cell`, so they are asked for when there are some
    from lab.ensemble import Ensemble, by_shape
    from lab.settings import place
    from lab.weights import save
    cells = list(cells)
    device = place({"device": device, "backend": backend, "dtype": dtype, "arithmetic": arithmetic}, flag="")
    if not cells:
        raise UsageError("no cells: there is nothing to train")
    if twice := [name for name, group in itertools.groupby(sorted(cell.name for cell in cells)) if len(list(group)) > 1]:
        raise UsageError(f"two cells are named {twice[0]}; give them names")
    if loose := [cell.name for cell in cells if cell.rho is not None and not cell.held and not cell.scale_once]:
        raise UsageError(f"{loose[0]} has a rho and no norm that it refers to; give its w_c, the critical norm, or held norms")
    rows, total, groups = {}, Result(), by_shape(cells, range(len(cells)))
    for group in groups:
        mine = [cells[i] for i in group]
        ensemble = Ensemble(mine, device, backend, getattr(torch, mine[0].dtype or dtype), arithmetic, keep_weights=bool(weights))
        progress = Progress("training", len(ensemble.step), ensemble.steps_left())
        try:
            ensemble.train(progress)
        finally:
            progress.close()
        rows |= {i: ensemble.rows(c) for c, i in enumerate(group)}
        if weights:
            for c in range(len(group)):
                save(Path(weights), ensemble, c)
        total.executed, total.seconds = total.executed + ensemble.executed, total.seconds + ensemble.seconds
    whole = sum((rows[i] for i in range(len(cells))), total)
    return dataclasses.replace(whole, state=ensemble.result().state) if len(groups) == 1 else whole
