"""What a transformer's step and evaluation launch on a GPU, in order; `cuda.py` holds the state and calls this. The definition is `transformer.py`.

    before, products     tokens relative to '=', V, G = Wo R, scores, T_h = V_h G_h, back          tables of 2p+1 rows
    mix                  pairs -> logits, or LN(r') and the logits by a product
    logit_gradient ...   the way back over the pairs, down to the gradients of the tables
    products, behind     gradients of the nine matrices
    adamw_project        the update, the clamp

About 40 launches a step, of which most are products of tables: at R = 100 they take little time, at R = 1 they are all of it.
"""
import math
from typing import NamedTuple

from torch import Tensor

from . import adamw
from .attention import before, behind
from .evaluation import N_PARTIAL, evaluate_logits, evaluation_tiles
from .layout import HEADS, TransformerLayout
from .loss import logit_gradient
from .matmul import matmul, turn
from .mixing import column_block, mix, mix_backward
from .pairs import order_of, slots_for, views_of
from .transformer import gelu_backward, norm_backward, residual_backward, unit_block

__all__ = ["Workspace", "evaluate_all", "order_of", "slot_count", "step", "workspace_shapes"]


class Workspace(NamedTuple):
    """What a chunk of runs needs within a step or an evaluation; first dimension is the chunk's runs. F = H + Q; Q = p_pad, or d with LayerNorm."""
    D: Tensor           # (C, 2p+1, d) tokens relative to '=', which comes last
    O: Tensor           # (C, d+1, d) Wo and X_=; with LayerNorm they are the last columns of G
    q: Tensor           # (C, 1, d) query of '=' over sqrt(d / heads)
    key: Tensor         # (C, d, heads)
    scores: Tensor      # (C, 2p+1, heads)
    V: Tensor           # (C, 2p+1, d)
    G: Tensor           # (C, d+1, F)
    T: Tensor           # (C, heads, 2p+1, F)
    back: Tensor        # (C, H, Q)
    mixed: Tensor       # (C, slots, F) x and r, later the gradient of m
    weights: Tensor     # (C, slots, 2, heads)
    inverses: Tensor    # (C, 2, slots) with LayerNorm
    y: Tensor           # (C, slots or p*p, d) LN(r')
    logits: Tensor      # (C, slots or p*p, p_pad)
    dout: Tensor        # (C, slots, d) with LayerNorm: gradient of y, later of r'
    dots: Tensor        # (C, blocks, slots) with LayerNorm
    dweights: Tensor    # (C, blocks, slots, 2, heads)
    dT: Tensor          # (C, heads+1, 2p+1, F)
    dscores: Tensor     # (C, 2p, heads)
    dG: Tensor          # (C, d+1, F)
    dO: Tensor          # (C, d+1, d)
    dback: Tensor       # (C, H, Q)
    dV: Tensor          # (C, 2p+1, d)
    dD: Tensor          # (C, 2p+1, d)
    dkey: Tensor        # (C, d, heads)
    dq: Tensor          # (C, 1, d)
    QVt: Tensor         # (C, 2, d, d) of Wq and Wv; these five are transposed copies
    Wint: Tensor        # (C, H, d)
    Ut: Tensor          # (C, p_pad, d)
    backt: Tensor       # (C, Q, H)
    Gt: Tensor          # (C, F, d) of all but the last row of G
    gradient: Tensor    # (C, n_params)
    squares: Tensor     # (C, groups, blocks) float64
    partials: Tensor    # (C, 11, tiles) float64

    def runs(self, count: int) -> "Workspace":
        return Workspace(*(tensor[:count] for tensor in self))


def workspace_shapes(layout: TransformerLayout, n_slots: int, itemsize: int) -> tuple[tuple[int, ...], ...]:
    """Shapes for one run, in the order of `Workspace`; the last two are float64 whatever the dtype."""
    p, d, H, p_pad, normed = layout[:5]
    rows, t = max(n_slots, p * p), 2 * p + 1
    Q = d if normed else p_pad
    F, only = H + Q, int(normed)                    # `only`: 0 without LayerNorm
    units, columns = H // unit_block(H, itemsize), -(-F // column_block(itemsize))
    return ((t, d), (d + 1, d), (1, d), (d, HEADS), (t, HEADS), (t, d), (d + 1, F), (HEADS, t, F), (H, Q),
            (n_slots, F), (n_slots, 2, HEADS), (2 * only, n_slots), (rows * only, d), (rows, p_pad), (n_slots * only, d),
            (units * only, n_slots), (columns, n_slots, 2, HEADS), (HEADS + 1, t, F), (2 * p, HEADS), (d + 1, F), (d + 1, d), (H, Q),
            (t, d), (t, d), (d, HEADS), (1, d), (2, d, d), (H, d), (p_pad, d), (Q, H), (F, d),
            (layout.n_params,), (len(layout.groups), adamw.partial_blocks(layout)),
            (N_PARTIAL, evaluation_tiles(layout)))


def slot_count(order: Tensor, n_train: int) -> int:
    return slots_for(n_train)


def by_head(rows: Tensor) -> Tensor:
    """Columns `(R, rows, d)` -> `(R, heads, rows, d / heads)`, a view."""
    return rows.unflatten(2, (HEADS, -1)).transpose(1, 2)


def heads_of(rows: Tensor) -> Tensor:
    """The first d rows `(R, d+1, columns)` -> `(R, heads, d / heads, columns)`, a view."""
    return rows[:, :-1].unflatten(1, (HEADS, -1))


def tables(params: Tensor, w: Workspace, layout: TransformerLayout, arithmetic: str) -> Tensor:
    """Everything before the tokens mix: scores, T, back, G. Returns O."""
    H, scale = layout.H, 1 / math.sqrt(layout.d // HEADS)
    _, _, Wq, Wk, Wv, _, Win, Wout, U = layout.views(params)
    O = w.G[:, :, H:] if layout.normed else w.O
    before(params, w.D, O, w.back, layout)
    matmul(w.D[:, -1:], Wq, w.q, arithmetic, scale)
    matmul(by_head(Wk), by_head(w.q).mT, w.key.mT[..., None], arithmetic)
    matmul(w.D, w.key, w.scores, arithmetic)
    matmul(w.D, Wv, w.V, arithmetic)
    matmul(O, Win, w.G[:, :, :H], arithmetic)
    if not layout.normed:
        matmul(O, U, w.G[:, :, H:], arithmetic)
        matmul(Wout, U, w.back, arithmetic)
    matmul(by_head(w.V), heads_of(w.G), w.T, arithmetic)
    return O


def logits(params: Tensor, w: Workspace, pairs: Tensor | None, layout: TransformerLayout, arithmetic: str) -> None:
    """From the tables: logits of `pairs (R, slots)`, with all that the way back needs, or of all p*p pairs."""
    rows = layout.p**2 if pairs is None else pairs.shape[1]
    out = w.y if layout.normed else w.logits
    mix(w.scores, w.T, w.G, w.back, pairs, w.mixed, w.weights, w.inverses, out, layout, arithmetic)
    if layout.normed:
        matmul(w.y[:, :rows], layout.views(params)[8], w.logits[:, :rows], arithmetic)


def turned(params: Tensor, w: Workspace, layout: TransformerLayout) -> None:
    """Transposed copies of what the way back multiplies by from the right."""
    _, _, Wq, _, Wv, _, Win, _, U = layout.views(params)
    for matrix, copy in ((Wq, w.QVt[:, 0]), (Wv, w.QVt[:, 1]), (Win, w.Wint), (U, w.Ut), (w.back, w.backt), (w.G[:, :-1], w.Gt)):
        turn(matrix, copy)


def gradient(params: Tensor, order: Tensor, labels: Tensor, scalars: Tensor, w: Workspace, n_train: int, layout: TransformerLayout, loss: str,
             arithmetic: str) -> None:
    """`w.gradient (R, n_params)` of the mean loss over the training pairs; `order` from `order_of`."""
    H, (pairs, lists) = layout.H, views_of(order, w.mixed.shape[1], layout.p)
    _, _, _, Wk, _, _, _, Wout, _ = layout.views(params)
    _, _, dWq, dWk, dWv, _, dWin, dWout, dU = layout.views(w.gradient)
    O = tables(params, w, layout, arithmetic)
    logits(params, w, pairs, layout, arithmetic)
    turned(params, w, layout)
    if layout.normed:
        dz = w.logits[:, : pairs.shape[1]]
        logit_gradient(w.logits, pairs, labels, scalars, dz, n_train, layout, loss)
        matmul(w.y[:, : pairs.shape[1]].mT, dz, dU, arithmetic)
        matmul(dz, w.Ut, w.dout, arithmetic)
        norm_backward(w.dout, w.y, w.inverses, layout)
        gelu_backward(w.mixed, w.dout, w.backt, dWout, w.inverses, w.dots, layout, arithmetic)
        residual_backward(w.mixed, w.dout, w.inverses, w.dots, layout)
    else:
        dz = w.mixed[:, :, H:]
        logit_gradient(w.logits, pairs, labels, scalars, dz, n_train, layout, loss)
        gelu_backward(w.mixed, dz, w.backt, w.dback, w.inverses, w.dots, layout, arithmetic)
    mix_backward(w.mixed, w.T, w.weights, lists, w.dT, w.dweights, w.dscores, w.dG, layout)
    dT = w.dT[:, :HEADS]
    matmul(by_head(w.V).mT, dT, heads_of(w.dG), arithmetic)
    matmul(dT, by_head(w.Gt), by_head(w.dV), arithmetic)
    matmul(w.dG[:, :, :H], w.Wint, w.dO, arithmetic)
    matmul(O.mT, w.dG[:, :, :H], dWin, arithmetic)
    if not layout.normed:
        matmul(w.dG[:, :, H:], w.Ut, w.dO, arithmetic, add=True)
        matmul(O.mT, w.dG[:, :, H:], dU, arithmetic)
        matmul(Wout.mT, w.dback, dU, arithmetic, add=True)
        matmul(w.dback, w.Ut, dWout, arithmetic)
    tokens_backward(w, Wk, dWq, dWk, dWv, arithmetic)
    behind(params, w.dD, w.dO, w.dG[:, :, H:], w.gradient, layout)


def tokens_backward(w: Workspace, Wk: Tensor, dWq: Tensor, dWk: Tensor, dWv: Tensor, arithmetic: str) -> None:
    """Gradients of V and of the scores -> those of Wq, Wk, Wv and D."""
    last = w.D[:, -1:]
    matmul(w.D.mT, w.dV, dWv, arithmetic)
    matmul(w.dV, w.QVt[:, 1], w.dD, arithmetic)
    matmul(w.D[:, :-1].mT, w.dscores, w.dkey, arithmetic)
    matmul(w.dscores, w.key.mT, w.dD[:, :-1], arithmetic, add=True)
    matmul(w.dkey.mT[..., None], by_head(w.q), by_head(dWk), arithmetic)
    matmul(w.dkey.mT[:, :, None], by_head(Wk), by_head(w.dq), arithmetic, 1 / math.sqrt(w.D.shape[2] // HEADS))
    matmul(last.mT, w.dq, dWq, arithmetic)
    matmul(w.dq, w.QVt[:, 0], w.dD[:, -1:], arithmetic, add=True)


def step(params: Tensor, moment1: Tensor, moment2: Tensor, order: Tensor, labels: Tensor, scalars: Tensor, w: Workspace, n_train: int,
         layout: TransformerLayout, loss: str, arithmetic: str, decay_last: bool, perp_grad: bool) -> None:
    gradient(params, order, labels, scalars, w, n_train, layout, loss, arithmetic)
    adamw.adamw_project(params, moment1, moment2, w.gradient, scalars, w.squares, layout, decay_last, perp_grad)


def evaluate_all(params: Tensor, train: Tensor, labels: Tensor, scalars: Tensor, w: Workspace, metrics: Tensor, n_train: int, n_pairs: int,
                 layout: TransformerLayout, loss: str, arithmetic: str) -> None:
    tables(params, w, layout, arithmetic)
    logits(params, w, None, layout, arithmetic)
    evaluate_logits(params, w.logits, train, labels, scalars, w.partials, w.squares, metrics, n_train, n_pairs, layout, loss)
