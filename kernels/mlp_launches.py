"""What an MLP's step and evaluation launch on a GPU, in order; `cuda.py` holds the state and calls this. A step is seven launches."""
from typing import NamedTuple

from torch import Tensor

from .adamw import adamw_project, partial_blocks
from .evaluation import N_PARTIAL, evaluate, evaluation_tiles
from .first_layer import tables, tables_backward, turn, turned_size
from .hidden import hidden_backward, part_size, segments_of
from .layout import Layout
from .loss import loss_gradient
from .pairs import slots_of as order_of

__all__ = ["Workspace", "evaluate_all", "order_of", "slot_count", "step", "workspace_shapes"]


class Workspace(NamedTuple):
    """What a chunk of runs needs within a step or an evaluation; first dimension is the chunk's runs."""
    tables: Tensor      # (C, 2, p, H)
    turned: Tensor      # (C, 2dH + p_pad H) W1 and W2 transposed
    parts: Tensor       # (C, segments, 2pH + H p_pad + p_pad) parts of dU and dV, dW2, db2
    dz: Tensor          # (C, slots, p_pad)
    gradient: Tensor    # (C, n_params)
    squares: Tensor     # (C, 3, blocks) float64
    partials: Tensor    # (C, 11, tiles) float64

    def runs(self, count: int) -> "Workspace":
        return Workspace(*(tensor[:count] for tensor in self))


def workspace_shapes(layout: Layout, n_slots: int, itemsize: int) -> tuple[tuple[int, ...], ...]:
    """Shapes for one run, in the order of `Workspace`; the last two are float64 whatever the dtype."""
    p, _, H, p_pad = layout
    return ((2, p, H), (turned_size(layout),), (segments_of(p), part_size(layout)), (n_slots, p_pad), (layout.n_params,), (3, partial_blocks(layout)),
            (N_PARTIAL, evaluation_tiles(layout)))


def slot_count(order: Tensor, n_train: int) -> int:
    return order.shape[1]


def step(params: Tensor, moment1: Tensor, moment2: Tensor, slots: Tensor, labels: Tensor, scalars: Tensor, work: Workspace, n_train: int,
         layout: Layout, loss: str, arithmetic: str, decay_last: bool, perp_grad: bool) -> None:
    tables(params, work.tables, layout, arithmetic)
    loss_gradient(params, work.tables, slots, labels, scalars, work.dz, n_train, layout, loss, arithmetic)
    turn(params, work.turned, layout)
    hidden_backward(work.turned, work.tables, work.dz, slots, work.parts, layout, arithmetic)
    tables_backward(params, work.turned, work.parts, work.gradient, layout, arithmetic)
    adamw_project(params, moment1, moment2, work.gradient, scalars, work.squares, layout, decay_last, perp_grad)


def evaluate_all(params: Tensor, train: Tensor, labels: Tensor, scalars: Tensor, work: Workspace, metrics: Tensor, n_train: int, n_pairs: int,
                 layout: Layout, loss: str, arithmetic: str) -> None:
    tables(params, work.tables, layout, arithmetic)
    evaluate(params, work.tables, train, labels, scalars, work.partials, work.squares, metrics, n_train, n_pairs, layout, loss, arithmetic)
