"""Hidden layer: exact GELU of the gathered tables, logits, and the way back to the tables.

    x = U[a] + V[b],  h = x Phi(x),  z = h W2 + b2          Phi(x) = (1 + erf(x / sqrt 2)) / 2
    gelu'(x) = Phi(x) + x phi(x),                           phi(x) = exp(-x^2 / 2) / sqrt(2 pi)

Traffic per run: one (n, H) activation and one (n, H) derivative on a CPU. On a GPU both are recomputed where they are needed and never
leave the chip; the backward kernel reads the (n, p_pad) logit gradient once per slice of hidden units, through the cache.

Order of summation there: blocks of pairs are dealt out in turn to a few sums, the segments, of dU, dV, dW2 and db2, so that ten runs fill a device;
whoever reads them adds them in order. Within a segment blocks come in ascending order, dW2 and db2 of a block by themselves first: one chain
over all pairs is three times as wrong. A program owns its hidden units of its segment, and the rows that a tile of `pairs.py` adds into dU (or dV)
differ, so nothing is shared and nothing is atomic. A block's segment depends neither on other runs nor on the number of blocks.
"""
import math

import torch
from torch import Tensor

from .dialect import BK, divisor_block, dot, power_of_two, product, tl, triton
from .layout import Layout
from .pairs import BLOCK_PAIRS, tile_rows

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
def load_segments(at, apart, mask, SEGMENTS: tl.constexpr):
    """The sum over the segments of what lies at `at`, `apart` elements apart, in order."""
    total = tl.load(at, mask=mask, other=0.0)
    for segment in tl.static_range(1, SEGMENTS):
        total += tl.load(at + segment * apart, mask=mask, other=0.0)
    return total


@triton.jit
def _hidden_backward_kernel(W2t, tables, dz, slots, parts, n_slots, W2t_run, p: tl.constexpr, H: tl.constexpr, p_pad: tl.constexpr, P: tl.constexpr,
                            ROWS: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, SEGMENTS: tl.constexpr,
                            PRECISION: tl.constexpr):
    """A program: one run, BH hidden units, one segment of the blocks of BN pairs. Owns its columns of the segment's dU and dV, its rows of dW2; the
    first of a segment owns db2."""
    run = tl.program_id(1).to(tl.int64)
    slices: tl.constexpr = H // BH
    segment = tl.program_id(0) // slices
    unit = tl.program_id(0) % slices * BH + tl.arange(0, BH)
    column = tl.arange(0, P)
    slot = tl.arange(0, BN)
    U = tables + run * (2 * p * H) + unit[None, :]
    parts += (run * SEGMENTS + segment) * (2 * p * H + H * p_pad + p_pad)
    dU = parts + unit[None, :]
    W2t += run * W2t_run
    dz += run * n_slots * p_pad
    for start in range(0, 2 * p, BN):
        row = start + slot
        tl.store(dU + row[:, None] * H, tl.zeros([BN, BH], tables.dtype.element_ty), mask=row[:, None] < 2 * p)
    dW2 = tl.zeros([BH, P], tables.dtype.element_ty)
    db2 = tl.zeros([1, P], tables.dtype.element_ty)
    for start in range(segment * BN, n_slots, SEGMENTS * BN):
        pair = tl.load(slots + run * n_slots + start + slot)
        live = pair[:, None] >= 0
        a, b = pair[:, None] // p * H, (pair[:, None] % p + p) * H
        x = tl.load(U + a, mask=live, other=0.0) + tl.load(U + b, mask=live, other=0.0)         # (BN, BH)
        rows = dz + (start + slot[:, None]) * p_pad
        dh = tl.zeros([BN, BH], tables.dtype.element_ty)
        for first in range(0, p_pad, BK):
            k = first + tl.arange(0, BK)
            left = tl.load(rows + k[None, :], mask=k[None, :] < p_pad, other=0.0)               # (BN, BK)
            right = tl.load(W2t + k[:, None] * H + unit[None, :], mask=k[:, None] < p_pad, other=0.0)
            dh = dot(left, right, dh, PRECISION)
        Phi = 0.5 + 0.5 * tl.erf(x * _INV_SQRT_2)
        dx = dh * (Phi + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI)
        for first in tl.static_range(0, BN, ROWS):      # tile by tile: pairs of two tiles may share a row
            tl.debug_barrier()                          # the rows that the tile before wrote, now seen by every thread of this program
            mine = live & (slot[:, None] >= first) & (slot[:, None] < first + ROWS)
            tl.store(dU + a, tl.load(dU + a, mask=mine, other=0.0) + dx, mask=mine)
            tl.store(dU + b, tl.load(dU + b, mask=mine, other=0.0) + dx, mask=mine)
        block = tl.load(rows + column[None, :], mask=column[None, :] < p_pad, other=0.0)        # (BN, P)
        dW2 = product(tl.trans(x * Phi), block, dW2, PRECISION)
        db2 = product(tl.full([1, BN], 1.0, tables.dtype.element_ty), block, db2, PRECISION)     # a sum over rows conflicts in the shared memory
    out = parts + 2 * p * H
    tl.store(out + unit[:, None] * p_pad + column[None, :], dW2, mask=column[None, :] < p_pad)
    if tl.program_id(0) % slices == 0:
        tl.store(out + H * p_pad + column[None, :], db2, mask=column[None, :] < p_pad)


def segments_of(p: int) -> int:
    """From `p` alone, so that a run's bits do not depend on its neighbours; with six, ten runs fill 132 multiprocessors about twice."""
    return 6 if p > 24 else 2


def part_size(layout: Layout) -> int:
    """Of a segment: `dtables (2, p, H)`, then `dW2 (H, p_pad)`, then `db2 (p_pad)`."""
    return 2 * layout.p * layout.H + (layout.H + 1) * layout.p_pad


def backward_blocks(p: int, P: int, itemsize: int, arithmetic: str) -> tuple[int, int, int]:
    """Pairs and hidden units that a program takes at once, its warps: the widest whose sums stay in registers. A run's bits hang on the first."""
    if itemsize == 8:
        return tile_rows(p), 16, 4
    if P <= 64:
        return BLOCK_PAIRS if arithmetic == "ieee" else 32, 64, 4
    return 32, 16384 // P, 8


def hidden_backward(turned: Tensor, tables: Tensor, dz: Tensor, slots: Tensor, parts: Tensor, layout: Layout, arithmetic: str) -> None:
    """`turned` as `first_layer.turn` leaves it, `dz (R, slots, p_pad)` -> `parts (R, segments, part_size)`."""
    p, d, H, p_pad = layout
    P = power_of_two(p_pad)
    BN, units, warps = backward_blocks(p, P, turned.itemsize, arithmetic)
    BH, segments = divisor_block(H, units), segments_of(p)
    grid = (H // BH * segments, turned.shape[0])
    # One stage: a load moved ahead of the block before it would miss the rows that this block is still adding.
    _hidden_backward_kernel[grid](turned[:, 2 * d * H:], tables, dz, slots, parts, slots.shape[1], turned.stride(0), p, H, p_pad, P, tile_rows(p),
                                  BN, BH, BK, segments, arithmetic, num_warps=warps, num_stages=1)
