"""First layer as two tables: `[E[a]; E[b]] W1 + b1 = U[a] + V[b]` with `U = E W1[:d] + b1`, `V = E W1[d:]`, both (p, H).

Nothing of size n x 2d exists, forward or backward: 23 MFLOP a step at p=59 instead of 547 on the concatenated input.

The tables of a run lie as `(2, p, H)`, U first. Each output tile belongs to one program, which sums over blocks of the inner dimension
in ascending order. Traffic per run and call: E and W1 once or twice through the cache, the tables once.

The backward pass multiplies by the transposes of W1 and W2. Its products read a right operand row by row, and columns would all come from one bank of
the shared memory; so each step leaves a transposed copy of both, `turned`: `(2, H, d)` of the halves of W1, then `(p_pad, H)` of W2.
"""
import torch
from torch import Tensor

from .dialect import BK, divisor_block, dot, power_of_two, tl, triton
from .hidden import load_segments, segments_of
from .layout import Layout

SUMMED = 1024       # elements of dW2 and db2 whose segments a program adds
_SUMMED = tl.constexpr(SUMMED)


def tables_ref(E: Tensor, W1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """`E (p, d)`, `W1 (2d, H)`, `b1 (H)` -> `U (p, H)`, `V (p, H)`."""
    d = E.shape[1]
    return E @ W1[:d] + b1, E @ W1[d:]


def tables_backward_ref(dU: Tensor, dV: Tensor, E: Tensor, W1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tables `dU, dV (p, H)` -> `dE (p, d)`, `dW1 (2d, H)`, `db1 (H)`."""
    d = E.shape[1]
    dE = dU @ W1[:d].T + dV @ W1[d:].T
    dW1 = torch.cat([E.T @ dU, E.T @ dV])
    return dE, dW1, dU.sum(0)


@triton.jit
def _tables_kernel(theta, tables, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr, p_pad: tl.constexpr, ROW: tl.constexpr,
                   BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """A program: one run, one of the two tables, BM rows, BH hidden units."""
    run = tl.program_id(1).to(tl.int64)
    h_blocks: tl.constexpr = H // BH
    second = tl.program_id(0) // h_blocks % 2
    row = tl.program_id(0) // (2 * h_blocks) * BM + tl.arange(0, BM)
    unit = tl.program_id(0) % h_blocks * BH + tl.arange(0, BH)
    inner = tl.arange(0, BK)
    E = theta + run * ROW
    W1 = E + p * d + second * d * H
    acc = tl.zeros([BM, BH], theta.dtype.element_ty)
    for start in range(0, d, BK):
        k = start + inner
        left = tl.load(E + row[:, None] * d + k[None, :], mask=row[:, None] < p, other=0.0)
        right = tl.load(W1 + k[:, None] * H + unit[None, :])
        acc = dot(left, right, acc, PRECISION)
    b1 = tl.load(E + p * d + 2 * d * H + H * p_pad + unit)
    acc += tl.where(second == 0, b1, 0.0)[None, :]
    out = tables + run * (2 * p * H) + second * p * H
    tl.store(out + row[:, None] * H + unit[None, :], acc, mask=row[:, None] < p)


@triton.jit
def _turn_kernel(theta, turned, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr, p_pad: tl.constexpr, ROW: tl.constexpr, BD: tl.constexpr,
                 BH: tl.constexpr):
    """A program: one run; a (BD, BH) tile of W1, or BH rows and BD columns of W2."""
    run = tl.program_id(1).to(tl.int64)
    h_blocks: tl.constexpr = H // BH
    unit = tl.program_id(0) % h_blocks * BH + tl.arange(0, BH)
    row = tl.program_id(0) // h_blocks * BD + tl.arange(0, BD)      # of W1, and then columns of W2
    W1 = theta + run * ROW + p * d
    turned += run * (2 * d * H + p_pad * H)
    if tl.program_id(0) < 2 * d // BD * h_blocks:
        tile = tl.load(W1 + row[:, None] * H + unit[None, :])
        tl.store(turned + (row // d * H + unit[:, None]) * d + row[None, :] % d, tl.trans(tile))
    else:
        column = row - 2 * d
        inside = column < p_pad
        rows = tl.load(W1 + 2 * d * H + unit[:, None] * p_pad + column[None, :], mask=inside[None, :], other=0.0)
        tl.store(turned + 2 * d * H + column[:, None] * H + unit[None, :], tl.trans(rows), mask=inside[:, None])


def tables(params: Tensor, out: Tensor, layout: Layout, arithmetic: str) -> None:
    """Rows `params (R, n_params)` -> `out (R, 2, p, H)`."""
    p, _, H, _ = layout
    BH, BM = divisor_block(H, 64), min(64, power_of_two(max(p, 16)))
    grid = (-(-p // BM) * 2 * (H // BH), params.shape[0])
    _tables_kernel[grid](params, out, *layout, layout.n_params, BM, BH, BK, arithmetic, num_warps=4)


def turned_size(layout: Layout) -> int:
    return (2 * layout.d + layout.p_pad) * layout.H


def turn(params: Tensor, turned: Tensor, layout: Layout) -> None:
    """Rows `params (R, n_params)` -> `turned (R, turned_size)`: the halves of W1 transposed `(2, H, d)`, then W2 `(p_pad, H)`."""
    _, d, H, p_pad = layout
    BD, BH = divisor_block(d, 32), divisor_block(H, 32)
    grid = ((2 * d // BD + -(-p_pad // BD)) * (H // BH), params.shape[0])
    _turn_kernel[grid](params, turned, *layout, layout.n_params, BD, BH, num_warps=4)


@triton.jit
def _tables_backward_kernel(theta, turned, parts, gradient, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr, p_pad: tl.constexpr, ROW: tl.constexpr,
                            BP: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, SEGMENTS: tl.constexpr,
                            PRECISION: tl.constexpr):
    """A program: one run and a (BD, BH) tile of dW1, or a (BP, BD) tile of dE, or a block of dW2 and db2, whose segments it only adds. Reads the
    weights before any of them is updated."""
    run = tl.program_id(1).to(tl.int64)
    d_blocks: tl.constexpr = d // BD
    h_blocks: tl.constexpr = H // BH
    dW1_tiles: tl.constexpr = 2 * d_blocks * h_blocks
    dE_tiles: tl.constexpr = (p + BP - 1) // BP * d_blocks
    PART: tl.constexpr = 2 * p * H + H * p_pad + p_pad
    tile = tl.program_id(0)
    inner = tl.arange(0, BK)
    E = theta + run * ROW
    dE = gradient + run * ROW
    dU = parts + run * SEGMENTS * PART
    if tile < dW1_tiles:
        second = tile // (d_blocks * h_blocks)
        column = tile // h_blocks % d_blocks * BD + tl.arange(0, BD)
        unit = tile % h_blocks * BH + tl.arange(0, BH)
        acc = tl.zeros([BD, BH], theta.dtype.element_ty)
        total = tl.zeros([1, BH], theta.dtype.element_ty)
        for start in range(0, p, BK):
            k = start + inner
            left = tl.load(E + k[:, None] * d + column[None, :], mask=k[:, None] < p, other=0.0)
            right = load_segments(dU + (second * p + k[:, None]) * H + unit[None, :], PART, k[:, None] < p, SEGMENTS)
            acc = dot(tl.trans(left), right, acc, PRECISION)
            total = dot(tl.full([1, BK], 1.0, theta.dtype.element_ty), right, total, PRECISION)
        tl.store(dE + p * d + (second * d + column[:, None]) * H + unit[None, :], acc)
        if tile < h_blocks:
            tl.store(dE + p * d + 2 * d * H + H * p_pad + unit[None, :], total)      # db1
    elif tile < dW1_tiles + dE_tiles:
        row = (tile - dW1_tiles) // d_blocks * BP + tl.arange(0, BP)
        column = (tile - dW1_tiles) % d_blocks * BD + tl.arange(0, BD)
        rows = tl.zeros([BP, BD], theta.dtype.element_ty)       # a name of its own: one name has one shape on both sides of an `if`
        turned += run * (2 * d * H + p_pad * H)
        for start in range(0, 2 * H, BK):
            k = start + inner       # of the units of both halves, one behind the other
            left = load_segments(dU + (start // H * p + row[:, None]) * H + k[None, :] % H, PART, row[:, None] < p, SEGMENTS)
            rows = dot(left, tl.load(turned + k[:, None] * d + column[None, :]), rows, PRECISION)
        tl.store(dE + row[:, None] * d + column[None, :], rows, mask=row[:, None] < p)
    else:
        i = (tile - dW1_tiles - dE_tiles) * _SUMMED + tl.arange(0, _SUMMED)
        inside = i < H * p_pad + p_pad
        sums = load_segments(dU + 2 * p * H + i, PART, inside, SEGMENTS)
        tl.store(dE + p * d + 2 * d * H + tl.where(i < H * p_pad, i, i + H), sums, mask=inside)     # b1 lies between W2 and b2


def tables_backward(params: Tensor, turned: Tensor, parts: Tensor, gradient: Tensor, layout: Layout, arithmetic: str) -> None:
    """`params (R, n_params)`, `turned` as `turn` leaves it, `parts (R, segments, part_size)` -> the rows `gradient (R, n_params)`."""
    p, d, H, p_pad = layout
    BD, BH, BP = divisor_block(d, 512 // params.itemsize), divisor_block(H, 256 // params.itemsize), 16
    grid = (2 * (d // BD) * (H // BH) + -(-p // BP) * (d // BD) + -(-(H + 1) * p_pad // SUMMED), params.shape[0])
    # One stage: the sums over the segments would fill the registers twice
    _tables_backward_kernel[grid](params, turned, parts, gradient, *layout, layout.n_params, BP, BD, BH, BK, segments_of(p), arithmetic, num_warps=4,
                                  num_stages=1)
