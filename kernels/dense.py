"""The dense MLP: one hidden layer over inputs of the run's own, no embedding (arXiv 2606.13753, section 8: sparse parity).

    h = gelu(x W1 + b1),  z = h W2 + b2           x (m, n), W1 (n, H), W2 (H, 2);  dz is the gradient of the mean loss over the m examples
    dW2 = h' dz,  dx = (dz W2') gelu',  dW1 = x' dx,  db1 and db2 the sums of dx and dz over the examples

On a GPU a step is four launches: examples -> dz, dz -> the gradient, the update, the projection. The backward kernel recomputes the activations;
a program owns a slice of hidden units and walks the examples in tiles, in ascending order, so nothing is shared and nothing is atomic; a tile's
products are summed by themselves first, as in `hidden.py`. Traffic per run: the examples once per slice, through the cache, and dz.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .adamw import adamw_project, partial_blocks
from .dialect import BK, divisor_block, dot, power_of_two, product, tl, triton, warps
from .evaluation import N_PARTIAL, evaluation_tiles, measure_tile, sum_tiles
from .hidden import INV_SQRT_2, INV_SQRT_2PI, gelu_ref
from .layout import DenseLayout
from .loss import loss_gradient_ref, loss_gradient_rows

BN = 32            # examples in a tile
P = 16             # columns of a tile of logits, the least that a dot takes
_BN, _P, _INV_SQRT_2, _INV_SQRT_2PI = tl.constexpr(BN), tl.constexpr(P), tl.constexpr(INV_SQRT_2), tl.constexpr(INV_SQRT_2PI)


def logits_ref(params: Tensor, x: Tensor, layout: DenseLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(rows, 2)` of the inputs `x (rows, n)`, the activations `h (rows, H)` and gelu' at their arguments."""
    W1, W2, b1, b2 = layout.views(params)
    h, dgelu = gelu_ref(x @ W1 + b1)
    return h @ W2 + b2, h, dgelu


def gradient_ref(params: Tensor, x: Tensor, labels: Tensor, tau: Tensor, layout: DenseLayout, loss: str) -> Tensor:
    """Gradient row `(n_params,)` of the mean loss over the examples `x (m, n)`, `labels (m,)`."""
    _, W2, _, _ = layout.views(params)
    z, h, dgelu = logits_ref(params, x, layout)
    dz = loss_gradient_ref(z, labels, tau, layout.classes, loss)    # (m, 2)
    dx = (dz @ W2.T) * dgelu                                        # (m, H)
    parts = [(x.T @ dx).reshape(-1), (h.T @ dz).reshape(-1), dx.sum(0), dz.sum(0)]
    return torch.cat([*parts, params.new_zeros(layout.n_params - sum(layout.sizes))])


@triton.jit
def dense_logits(theta, rows, inside, n: tl.constexpr, H: tl.constexpr, CLASSES: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Logits `(rows, P)` of the examples that lie at `rows (rows,)`; columns past the classes are 0."""
    W2 = theta + n * H
    column = tl.arange(0, _P)
    acc = tl.zeros([rows.shape[0], _P], theta.dtype.element_ty)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        x = tl.zeros([rows.shape[0], BK], theta.dtype.element_ty)
        for first in range(0, n, BK):
            i = first + tl.arange(0, BK)
            left = tl.load(rows[:, None] + i[None, :], mask=inside[:, None] & (i[None, :] < n), other=0.0)
            right = tl.load(theta + i[:, None] * H + k[None, :], mask=i[:, None] < n, other=0.0)
            x = dot(left, right, x, PRECISION)
        x += tl.load(W2 + H * CLASSES + k)[None, :]
        h = x * (0.5 + 0.5 * tl.erf(x * _INV_SQRT_2))
        right = tl.load(W2 + k[:, None] * CLASSES + column[None, :], mask=column[None, :] < CLASSES, other=0.0)
        acc = dot(h, right, acc, PRECISION)
    return acc + tl.load(W2 + H * CLASSES + H + column, mask=column < CLASSES, other=0.0)[None, :]


@triton.jit
def _dense_gradient_kernel(theta, examples, scalars, dz, n_train, examples_run, n: tl.constexpr, H: tl.constexpr, CLASSES: tl.constexpr,
                           ROW: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr, BK: tl.constexpr, LOSS: tl.constexpr,
                           PRECISION: tl.constexpr):
    """A program: one run, BN training examples; the gradient of their logits."""
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * _BN + tl.arange(0, _BN)
    inside = slot < n_train
    rows = examples + run * examples_run + slot * WIDTH
    labels = tl.load(rows + n, mask=inside, other=0.0).to(tl.int32)
    logits = dense_logits(theta + run * ROW, rows, inside, n, H, CLASSES, BK, PRECISION)
    ds = loss_gradient_rows(logits, labels, tl.load(scalars + run * SCALARS), n_train, CLASSES, LOSS)
    column = tl.arange(0, _P)[None, :]
    tl.store(dz + (run * n_train + slot[:, None]) * CLASSES + column, ds, mask=inside[:, None] & (column < CLASSES))


@triton.jit
def _dense_backward_kernel(theta, examples, dz, gradient, n_train, examples_run, n: tl.constexpr, H: tl.constexpr, CLASSES: tl.constexpr,
                           ROW: tl.constexpr, WIDTH: tl.constexpr, NP: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr):
    """A program: one run, BH hidden units, all training examples. Owns its columns of dW1 and db1, its rows of dW2; the first owns db2."""
    run = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    input, column = tl.arange(0, NP), tl.arange(0, _P)
    theta += run * ROW
    gradient += run * ROW
    W2 = n * H
    weights = tl.load(theta + input[:, None] * H + unit[None, :], mask=input[:, None] < n, other=0.0)                   # (NP, BH)
    bias = tl.load(theta + W2 + H * CLASSES + unit)
    out = tl.load(theta + W2 + unit[:, None] * CLASSES + column[None, :], mask=column[None, :] < CLASSES, other=0.0)    # (BH, P)
    dW1 = tl.zeros([NP, BH], theta.dtype.element_ty)
    dW2 = tl.zeros([BH, _P], theta.dtype.element_ty)
    db1 = tl.zeros([BH], theta.dtype.element_ty)
    db2 = tl.zeros([_P], theta.dtype.element_ty)
    for start in range(0, n_train, _BN):
        slot = start + tl.arange(0, _BN)
        inside = slot[:, None] < n_train
        rows = tl.load(examples + run * examples_run + slot[:, None] * WIDTH + input[None, :], mask=inside & (input[None, :] < n), other=0.0)
        ds = tl.load(dz + (run * n_train + slot[:, None]) * CLASSES + column[None, :], mask=inside & (column[None, :] < CLASSES), other=0.0)
        x = dot(rows, weights, tl.zeros([_BN, BH], theta.dtype.element_ty), PRECISION) + bias[None, :]                  # (BN, BH)
        Phi = 0.5 + 0.5 * tl.erf(x * _INV_SQRT_2)
        dx = dot(ds, tl.trans(out), tl.zeros([_BN, BH], theta.dtype.element_ty), PRECISION)
        dx *= Phi + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
        dW1 = product(tl.trans(rows), dx, dW1, PRECISION)
        dW2 = product(tl.trans(x * Phi), ds, dW2, PRECISION)
        db1 += tl.sum(dx, axis=0)
        db2 += tl.sum(ds, axis=0)
    tl.store(gradient + input[:, None] * H + unit[None, :], dW1, mask=input[:, None] < n)
    tl.store(gradient + W2 + unit[:, None] * CLASSES + column[None, :], dW2, mask=column[None, :] < CLASSES)
    tl.store(gradient + W2 + H * CLASSES + unit, db1)
    if tl.program_id(0) == 0:
        tl.store(gradient + W2 + H * CLASSES + H + column, db2, mask=column < CLASSES)


@triton.jit
def _evaluate_dense_kernel(theta, examples, train, scalars, partials, count, examples_run, train_row, n: tl.constexpr, H: tl.constexpr,
                           CLASSES: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr, SCALARS: tl.constexpr, BK: tl.constexpr,
                           PARTIALS: tl.constexpr, LOSS: tl.constexpr, PRECISION: tl.constexpr):
    """A program: one run, BN consecutive examples of all `count`."""
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * _BN + tl.arange(0, _BN)
    inside = slot < count
    rows = examples + run * examples_run + slot * WIDTH
    labels = tl.load(rows + n, mask=inside, other=-1.0).to(tl.int32)
    logits = dense_logits(theta + run * ROW, rows, inside, n, H, CLASSES, BK, PRECISION)
    measure_tile(logits, labels, slot, tl.load(scalars + run * SCALARS), train + run * train_row,
                 partials + run * (PARTIALS * tl.num_programs(0)), CLASSES, LOSS)


# ---------------------------------------------------------------- what `cuda.py` launches

class Workspace(NamedTuple):
    """What a chunk of runs needs within a step or an evaluation; first dimension is the chunk's runs."""
    dz: Tensor          # (C, m, 2)
    gradient: Tensor    # (C, n_params)
    squares: Tensor     # (C, 2, blocks) float64
    partials: Tensor    # (C, 11, tiles) float64

    def runs(self, count: int) -> "Workspace":
        return Workspace(*(tensor[:count] for tensor in self))


def workspace_shapes(layout: DenseLayout, n_slots: int, itemsize: int) -> tuple[tuple[int, ...], ...]:
    """Shapes for one run, in the order of `Workspace`; the last two are float64 whatever the dtype."""
    return ((layout.m, layout.classes), (layout.n_params,), (len(layout.groups), partial_blocks(layout)), (N_PARTIAL, evaluation_tiles(layout)))


def order_of(x: Tensor, labels: Tensor, n: int) -> Tensor:
    """`x (R, examples, n)`, `labels (R, examples)` -> `(R, examples, width)`, a multiple of 16 wide: an example's inputs, then its label."""
    rows = x.new_zeros(*labels.shape, -(-(n + 1) // 16) * 16)
    rows[..., :n], rows[..., n] = x, labels
    return rows


def slot_count(examples: Tensor, n_train: int) -> int:
    return n_train


def step(params: Tensor, moment1: Tensor, moment2: Tensor, examples: Tensor, labels: None, scalars: Tensor, w: Workspace, n_train: int,
         layout: DenseLayout, loss: str, arithmetic: str, decay_last: bool, perp_grad: bool) -> None:
    """As of the other networks; `labels` lie with the examples."""
    n, H, sizes = layout.n, layout.H, (layout.classes, layout.n_params, examples.shape[2])
    runs, BH = len(params), divisor_block(H, 128 // params.itemsize)        # float64 takes twice the registers
    _dense_gradient_kernel[(-(-n_train // BN), runs)](params, examples, scalars, w.dz, n_train, examples.stride(0), n, H, *sizes, scalars.shape[1],
                                                      BK, loss, arithmetic, num_warps=warps(BN * P) * 2)
    _dense_backward_kernel[(H // BH, runs)](params, examples, w.dz, w.gradient, n_train, examples.stride(0), n, H, *sizes,
                                            power_of_two(max(n, 16)), BH, arithmetic, num_warps=4)
    adamw_project(params, moment1, moment2, w.gradient, scalars, w.squares, layout, decay_last, perp_grad)


def evaluate_all(params: Tensor, examples: Tensor, train: Tensor, labels: None, scalars: Tensor, w: Workspace, metrics: Tensor, n_train: int,
                 n_pairs: int, layout: DenseLayout, loss: str, arithmetic: str) -> None:
    sizes = layout.classes, layout.n_params, examples.shape[2]
    _evaluate_dense_kernel[(evaluation_tiles(layout), len(params))](
        params, examples, train, scalars, w.partials, layout.examples, examples.stride(0), train.stride(0), layout.n, layout.H, *sizes,
        scalars.shape[1], BK, N_PARTIAL, loss, arithmetic, num_warps=4)
    sum_tiles(params, w.partials, w.squares, metrics, n_train, n_pairs, layout)
