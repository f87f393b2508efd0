"""Hidden layer: exact GELU of the gathered tables, logits, and the way back to the tables.

    x = U[a] + V[b],  h = x Phi(x),  z = h W2 + b2          Phi(x) = (1 + erf(x / sqrt 2)) / 2
    gelu'(x) = Phi(x) + x phi(x),                           phi(x) = exp(-x^2 / 2) / sqrt(2 pi)

Traffic per run: one (n, H) activation and one (n, H) derivative on a CPU. On a GPU both are recomputed where they are needed and never
leave the chip; the backward kernel reads the (n, p_pad) logit gradient once per slice of hidden units, through the cache.

Order of summation there: dW2, db2, dU, dV over the tiles of `pairs.py` in ascending order, dW2 and db2 of a tile by themselves first: one chain over
all pairs is three times as wrong. A program owns its hidden units, and the rows that a tile adds into dU (or dV) differ, so nothing is shared and
nothing is atomic.
"""
import math

import torch
from torch import Tensor

from .dialect import BK, divisor_block, dot, power_of_two, product, tl, triton
from .layout import Layout
from .pairs import tile_rows

INV_SQRT_2 = 1 / math.sqrt(2)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_INV_SQRT_2, _INV_SQRT_2PI = tl.constexpr(INV_SQRT_2), tl.constexpr(INV_SQRT_2PI)


def gelu_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of `x` and its derivative, both of x's shape."""
    Phi = 0.5 * (1 + torch.erf(x * INV_SQRT_2))
    return x * Phi, Phi + x * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def hidden_ref(U: Tensor, V: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`U, V (p, H)`, pairs `a, b (n,)` -> `h (n, H)` and `gelu'(x) (n, H)`."""
    return gelu_ref(U[a] + V[b])


def hidden_backward_ref(dz: Tensor, dgelu: Tensor, W2: Tensor, a: Tensor, b: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Logit gradient `dz (n, p_pad)` -> `dU, dV (p, H)`: row sums of the (n, H) gradient over pairs that share a, or b."""
    dx = (dz @ W2.T) * dgelu                                       # (n, H)
    zeros = dx.new_zeros(p, dx.shape[1])
    return zeros.index_add(0, a, dx), zeros.index_add(0, b, dx)


@triton.jit
def logits_tile(theta, table, a, b, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr, p_pad: tl.constexpr, P: tl.constexpr,
                BK: tl.constexpr, PRECISION: tl.constexpr):
    """Logits `(rows, P)` of the pairs `a, b (rows,)` from one run's row and tables; columns past p_pad are 0."""
    W2 = theta + p * d + 2 * d * H
    column = tl.arange(0, P)
    inner = tl.arange(0, BK)
    acc = tl.zeros([a.shape[0], P], theta.dtype.element_ty)
    for start in range(0, H, BK):
        k = start + inner
        x = tl.load(table + a[:, None] * H + k[None, :]) + tl.load(table + p * H + b[:, None] * H + k[None, :])     # (rows, BK)
        h = x * (0.5 + 0.5 * tl.erf(x * _INV_SQRT_2))
        right = tl.load(W2 + k[:, None] * p_pad + column[None, :], mask=column[None, :] < p_pad, other=0.0)
        acc = dot(h, right, acc, PRECISION)
    b2 = tl.load(W2 + H * p_pad + H + column, mask=column < p_pad, other=0.0)
    return acc + b2[None, :]


@triton.jit
def _hidden_backward_kernel(theta, tables, dz, slots, dtables, gradient, n_slots, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr,
                            p_pad: tl.constexpr, ROW: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
                            BK: tl.constexpr, PRECISION: tl.constexpr):
    """A program: one run, BH hidden units, all tiles of BN pairs. Owns its columns of dU and dV, its rows of dW2; the first owns db2."""
    run = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    column = tl.arange(0, P)
    slot = tl.arange(0, BN)
    U = tables + run * (2 * p * H) + unit[None, :]
    dU = dtables + run * (2 * p * H) + unit[None, :]
    W2 = theta + run * ROW + p * d + 2 * d * H
    dz += run * n_slots * p_pad
    for start in range(0, 2 * p, BN):
        row = start + slot
        tl.store(dU + row[:, None] * H, tl.zeros([BN, BH], tables.dtype.element_ty), mask=row[:, None] < 2 * p)
    dW2 = tl.zeros([BH, P], tables.dtype.element_ty)
    db2 = tl.zeros([P], tables.dtype.element_ty)
    for start in range(0, n_slots, BN):
        tl.debug_barrier()      # the rows that the tile before wrote, now seen by every thread of this program
        pair = tl.load(slots + run * n_slots + start + slot)
        live = pair[:, None] >= 0
        a, b = pair[:, None] // p * H, (pair[:, None] % p + p) * H
        x = tl.load(U + a, mask=live, other=0.0) + tl.load(U + b, mask=live, other=0.0)         # (BN, BH)
        Phi = 0.5 + 0.5 * tl.erf(x * _INV_SQRT_2)
        rows = dz + (start + slot[:, None]) * p_pad
        dh = tl.zeros([BN, BH], tables.dtype.element_ty)
        for first in range(0, p_pad, BK):
            k = first + tl.arange(0, BK)
            left = tl.load(rows + k[None, :], mask=k[None, :] < p_pad, other=0.0)               # (BN, BK)
            right = tl.load(W2 + unit[:, None] * p_pad + k[None, :], mask=k[None, :] < p_pad, other=0.0)
            dh = dot(left, tl.trans(right), dh, PRECISION)
        dx = dh * (Phi + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI)
        tl.store(dU + a, tl.load(dU + a, mask=live, other=0.0) + dx, mask=live)
        tl.store(dU + b, tl.load(dU + b, mask=live, other=0.0) + dx, mask=live)
        tile = tl.load(rows + column[None, :], mask=column[None, :] < p_pad, other=0.0)         # (BN, P)
        dW2 = product(tl.trans(x * Phi), tile, dW2, PRECISION)
        db2 += tl.sum(tile, axis=0)
    out = gradient + run * ROW + p * d + 2 * d * H
    tl.store(out + unit[:, None] * p_pad + column[None, :], dW2, mask=column[None, :] < p_pad)
    if tl.program_id(0) == 0:
        tl.store(out + H * p_pad + H + column, db2, mask=column < p_pad)


def hidden_backward(params: Tensor, tables: Tensor, dz: Tensor, slots: Tensor, dtables: Tensor, gradient: Tensor, layout: Layout,
                    arithmetic: str) -> None:
    """`dz (R, slots, p_pad)` -> `dtables (R, 2, p, H)` and the parts dW2, db2 of the rows `gradient (R, n_params)`."""
    BH = divisor_block(layout.H, 128 // params.itemsize)        # float64 takes twice the registers
    grid = (layout.H // BH, params.shape[0])
    # One stage: a load moved ahead of the tile before it would miss the rows that this tile is still adding.
    _hidden_backward_kernel[grid](params, tables, dz, slots, dtables, gradient, slots.shape[1], *layout, layout.n_params,
                                  power_of_two(layout.p_pad), tile_rows(layout.p), BH, BK, arithmetic,
                                  num_warps=4, num_stages=1)
