"""The state of an ensemble: parameters and moments of many runs of one shape, and what a fork makes of them (arXiv 2606.18465)."""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common import Cell, module, parity_sizes
from kernels.adamw import group_norms_ref
from kernels.layout import AnyLayout, model_layout
from lab.tasks import N_TEST


def layout_of(cell: Cell, dtype: torch.dtype) -> AnyLayout:
    """How the parameters of `cell`'s networks lie in a row."""
    if cell.model == "mlp_dense":
        n, _, m = parity_sizes(cell.task)
        return model_layout(cell.model, n, dtype, m, m + N_TEST)
    return model_layout(cell.model, cell.p, dtype, width=cell.width)


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

    def norms(self, layout: AnyLayout) -> list[float]:
        """Total norm of every row's weight matrices, summed in float64."""
        return [float(group_norms_ref(row, layout).square().sum().sqrt()) for row in self.params]

    def module(self, row: int, model: str, p: int, width: tuple[int, int] = ()) -> nn.Module:
        """The plain module of `common.py` with the parameters of one row, in their dtype."""
        plain = module(model, p, width).to(self.params.dtype)
        for parameter, values in zip(plain.parameters(), model_layout(model, p, self.params.dtype, width=width).views(self.params[row]), strict=True):
            parameter.data = values[..., : parameter.shape[-1]].clone()
        return plain

    def fork(self, cells: list[Cell]) -> "State":
        """A copy of all rows, one per member, for each of `cells`: weights scaled at once to the cell's held norm, if it has one.
        Biases, moments and step stay as they are (arXiv 2606.18465, same-state comparison)."""
        layout = layout_of(cells[0], self.params.dtype)
        copy = self.pick([*range(len(self.params))] * len(cells))
        targets = [held[0] for cell in cells for held in (cell.held or ((0.0,),) * len(cell.members))]
        for row, norm, target in zip(copy.params, copy.norms(layout), targets, strict=True):
            if target > 0:
                row[: layout.n_weights] *= target / norm
        return copy


def inherit(runs: list[dict], before: list[dict]) -> None:
    """Rows of runs that continue from a fork keep what their member crossed before it."""
    earlier = {run["member"]: run for run in before}
    for run in runs:
        run.update({k: v for k in ("t_mem_step", "norm_at_mem", "t_80_step", "norm_at_80") if (v := earlier[run["member"]][k]) is not None})
