"""Over the pairs: attention weights, the weighted sum of table rows, GELU and the product behind it; and the way back to the tables.

    w = softmax of (s[a], s[p + b], s[=]) by head;  m = base + sum_h w_h(a) T_h[a] + w_h(b) T_h[p + b]        m (n, F), F = H + Q
    without LayerNorm  x = m[:, :H],             out = m[:, H:] + gelu(x) back     the logits, back = Wout U (H, Q = p_pad)
    with LayerNorm     x = m[:, :H] / sigma(r),  out = LN(r + gelu(x) back)        r = m[:, H:], back = Wout C (H, Q = d)
    back again         dT_h[t] = sum of w_h(t) dm,  dw_h(t) = dm . T_h[t],  ds_h(t) = sum of w_h(t) (dw_h(t) - mean_h)

sums over the pairs that share the token t. On a GPU a table row belongs to one program, which walks the list of its pairs (`pairs.py`) in order,
16 at a time: no atomics, and no bit that depends on other runs. A fifth head of weight 1 there gives the plain sums of dm, the gradient
of `base`. Traffic per run: the tables through the cache; x, later dm, written and read twice, 3.2 MB each time at p=59.
"""
import torch
from torch import Tensor

from .attention import LN_EPS
from .dialect import BK, divide, dot, power_of_two, square_root, tl, triton
from .hidden import INV_SQRT_2
from .layout import HEADS, TransformerLayout
from .pairs import LIST_ROWS, SLOT_ROWS

_BL, _HEADS, _LN_EPS, _INV_SQRT_2 = tl.constexpr(LIST_ROWS), tl.constexpr(HEADS), tl.constexpr(LN_EPS), tl.constexpr(INV_SQRT_2)


def attend_ref(scores: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`scores (2p+1, heads)` -> attention weights of the pairs `a, b (n,)` on their own two tokens, `(n, 2, heads)`; '=' has the rest."""
    p = len(scores) // 2
    three = torch.stack([scores[a], scores[p + b], scores[-1].expand(len(a), -1)], 1)     # (n, 3, heads)
    return torch.softmax(three, 1)[:, :2]


def mix_ref(weights: Tensor, T: Tensor, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`weights (n, 2, heads)`, `T (heads, 2p, F)`, `base (F)` -> `(n, F)`."""
    p, mixed = T.shape[1] // 2, base
    for h in range(HEADS):
        mixed = mixed + weights[:, 0, h, None] * T[h][a] + weights[:, 1, h, None] * T[h][p + b]
    return mixed


def mix_backward_ref(dmixed: Tensor, weights: Tensor, T: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`dmixed (n, F)` -> `dT (heads, 2p, F)`: weighted row sums over pairs that share a, or b; and `dscores (2p+1, heads)`."""
    p = T.shape[1] // 2
    dT = torch.stack([torch.cat([dmixed.new_zeros(p, dmixed.shape[1]).index_add(0, side, weights[:, i, h, None] * dmixed)
                                 for i, side in enumerate((a, b))]) for h in range(HEADS)])
    dweights = torch.stack([torch.stack([(dmixed * T[h][row]).sum(-1) for h in range(HEADS)], 1) for row in (a, p + b)], 1)   # (n, 2, heads)
    mean = (weights * dweights).sum(1)                                       # (n, heads)
    ds = weights * (dweights - mean[:, None])                                # (n, 2, heads)
    ds_eq = -(1 - weights.sum(1)) * mean                                     # '=' has gradient 0 relative to itself
    zeros = ds.new_zeros(p, HEADS)
    return dT, torch.cat([zeros.index_add(0, a, ds[:, 0]), zeros.index_add(0, b, ds[:, 1]), ds_eq.sum(0)[None]])


@triton.jit
def pair_weights(scores, first, second):
    """Attention weights of one head on the two tokens of pairs, from their table rows; scores are relative to that of '='."""
    of_first, of_second = tl.load(scores + first * _HEADS), tl.load(scores + second * _HEADS)
    top = tl.maximum(tl.maximum(of_first, of_second), 0.0)
    of_first, of_second = tl.exp(of_first - top), tl.exp(of_second - top)
    total = of_first + of_second + tl.exp(-top)
    return divide(of_first, total), divide(of_second, total)


@triton.jit
def mixed_tile(T, residual, weights, first, second, column, inside, p: tl.constexpr, F: tl.constexpr):
    """m of pairs at `column`, `(pairs, columns)`: `base`, which is what '=' has without attention and the last row of every head's table,
    and the weighted rows of the two tokens."""
    base = tl.load(residual + column, mask=inside, other=0.0)
    for h in tl.static_range(_HEADS):
        base += tl.load(T + (h * (2 * p + 1) + 2 * p) * F + column, mask=inside, other=0.0)
    m = tl.zeros([first.shape[0], column.shape[0]], base.dtype) + base[None, :]
    for h in tl.static_range(_HEADS):
        table = T + h * (2 * p + 1) * F + column[None, :]
        m += weights[h][0][:, None] * tl.load(table + first[:, None] * F, mask=inside[None, :], other=0.0)
        m += weights[h][1][:, None] * tl.load(table + second[:, None] * F, mask=inside[None, :], other=0.0)
    return m


@triton.jit
def inverse_deviation(rows, d: tl.constexpr):
    """1 / sigma of centred rows `(rows, D)`, 0 past their `d` columns."""
    variance = tl.sum(rows * rows, axis=1) * (1 / d)
    return divide(tl.full([rows.shape[0]], 1.0, rows.dtype), square_root(variance + _LN_EPS))


@triton.jit
def _mix_kernel(scores, T, G, back, pairs, mixed, weights, inverses, out, rows, pairs_run, out_run, p: tl.constexpr, d: tl.constexpr,
                H: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORMED: tl.constexpr,
                TRAIN: tl.constexpr, PRECISION: tl.constexpr):
    """A program: one run, BN of its slots, or of all p*p pairs. Only for training is anything but `out` written."""
    F: tl.constexpr = H + Q
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    pair = tl.where(slot < rows, slot, -1)
    if TRAIN:
        pair = tl.load(pairs + run * pairs_run + slot)
    first, second = tl.where(pair >= 0, pair // p, 0), tl.where(pair >= 0, p + pair % p, p)     # table rows
    scores += run * ((2 * p + 1) * _HEADS)
    T += run * (_HEADS * (2 * p + 1) * F)
    residual = G + run * ((d + 1) * F) + d * F
    w = (pair_weights(scores, first, second), pair_weights(scores + 1, first, second), pair_weights(scores + 2, first, second),
         pair_weights(scores + 3, first, second))
    if TRAIN:
        mixed += run * rows * F
        for h in tl.static_range(_HEADS):
            at = weights + (run * rows + slot) * (2 * _HEADS) + h
            tl.store(at, w[h][0])
            tl.store(at + _HEADS, w[h][1])
    column = tl.arange(0, QP)
    out += run * out_run + slot[:, None] * Q
    for start in range(0, Q, BK):       # block by block through memory: all columns at once, times two tokens and four heads, fill the registers
        k = start + tl.arange(0, BK)
        rest = mixed_tile(T, residual, w, first, second, H + k, k < Q, p, F)
        tl.store(out + k[None, :], rest, mask=(slot[:, None] < rows) & (k[None, :] < Q))
    tl.debug_barrier()
    inside = (slot[:, None] < rows) & (column[None, :] < Q)
    acc = tl.load(out + column[None, :], mask=inside, other=0.0)                                # (BN, QP)
    inverse = tl.full([BN], 1.0, acc.dtype)
    if NORMED:
        inverse = inverse_deviation(acc, d)
        if TRAIN:
            tl.store(mixed + slot[:, None] * F + H + column[None, :], acc, mask=column[None, :] < Q)
            tl.store(inverses + 2 * run * rows + slot, inverse)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        x = mixed_tile(T, residual, w, first, second, k, k < H, p, F)                           # (BN, BK)
        if NORMED:
            x *= inverse[:, None]
        if TRAIN:
            tl.store(mixed + slot[:, None] * F + k[None, :], x)
        hidden = x * (0.5 + 0.5 * tl.erf(x * _INV_SQRT_2))
        right = tl.load(back + run * (H * Q) + k[:, None] * Q + column[None, :], mask=column[None, :] < Q, other=0.0)
        acc = dot(hidden, right, acc, PRECISION)
    if NORMED:
        inverse = inverse_deviation(acc, d)
        acc *= inverse[:, None]
        if TRAIN:
            tl.store(inverses + (2 * run + 1) * rows + slot, inverse)
    tl.store(out + column[None, :], acc, mask=inside)


def mix(scores: Tensor, T: Tensor, G: Tensor, back: Tensor, pairs: Tensor | None, mixed: Tensor, weights: Tensor, inverses: Tensor, out: Tensor,
        layout: TransformerLayout, arithmetic: str) -> None:
    """`scores (R, 2p+1, heads)`, `T (R, heads, 2p+1, F)`, the last row of `G (R, d+1, F)`, `back (R, H, Q)` -> `out (R, >= slots, Q)`, and of
    `pairs (R, slots)` also `mixed (R, slots, F)`: x, and r with LayerNorm; `weights (R, slots, 2, heads)`; with LayerNorm
    `inverses (R, 2, slots)`. Without `pairs`: `out` of all p*p pairs, nothing else."""
    rows, Q = layout.p**2 if pairs is None else pairs.shape[1], back.shape[2]
    tile = SLOT_ROWS * 4 // T.itemsize                 # float64 takes twice the registers
    grid = (-(-rows // tile), T.shape[0])
    _mix_kernel[grid](scores, T, G, back, mixed if pairs is None else pairs, mixed, weights, inverses, out, rows,
                      0 if pairs is None else pairs.stride(0), out.stride(0), layout.p, layout.d, layout.H, Q, power_of_two(Q), tile, BK,
                      layout.normed, pairs is not None, arithmetic, num_warps=8, num_stages=1)


@triton.jit
def head_row(T, head: tl.constexpr, row, column, p: tl.constexpr, F: tl.constexpr):
    """One head's table row at `column`, (1, columns)."""
    return tl.load(T + (head * (2 * p + 1) + row) * F + column, mask=column < F, other=0.0)[None, :]


@triton.jit
def _mix_backward_kernel(mixed, T, weights, lists, dT, dweights, n_slots, lists_run, L, p: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """A program: one run, one table row of every head, BF columns. Owns these of dT; of dw it leaves what its columns bring."""
    run = tl.program_id(1).to(tl.int64)
    row, block = tl.program_id(0) % (2 * p), tl.program_id(0) // (2 * p)
    column = block * BF + tl.arange(0, BF)
    T += run * (_HEADS * (2 * p + 1) * F)
    rows = (head_row(T, 0, row, column, p, F), head_row(T, 1, row, column, p, F), head_row(T, 2, row, column, p, F),
            head_row(T, 3, row, column, p, F))
    weights += run * n_slots * (2 * _HEADS) + row // p * _HEADS
    dweights += (run * tl.cdiv(F, BF) + block) * n_slots * (2 * _HEADS) + row // p * _HEADS
    acc0 = tl.zeros([_BL, BF], mixed.dtype.element_ty)
    acc1 = tl.zeros([_BL, BF], mixed.dtype.element_ty)
    acc2 = tl.zeros([_BL, BF], mixed.dtype.element_ty)
    acc3 = tl.zeros([_BL, BF], mixed.dtype.element_ty)
    plain = tl.zeros([_BL, BF], mixed.dtype.element_ty)
    for start in range(0, L, _BL):
        slot = tl.load(lists + run * lists_run + row * L + start + tl.arange(0, _BL))
        live = slot >= 0
        dm = tl.load(mixed + run * n_slots * F + slot[:, None] * F + column[None, :], mask=live[:, None] & (column[None, :] < F), other=0.0)
        at = weights + slot * (2 * _HEADS)
        acc0 += tl.load(at, mask=live, other=0.0)[:, None] * dm
        acc1 += tl.load(at + 1, mask=live, other=0.0)[:, None] * dm
        acc2 += tl.load(at + 2, mask=live, other=0.0)[:, None] * dm
        acc3 += tl.load(at + 3, mask=live, other=0.0)[:, None] * dm
        plain += dm
        for h in tl.static_range(_HEADS):
            tl.store(dweights + slot * (2 * _HEADS) + h, tl.sum(dm * rows[h], axis=1), mask=live)
    dT += run * ((_HEADS + 1) * (2 * p + 1) * F) + row * F + column[None, :]
    sums = (acc0, acc1, acc2, acc3, plain)
    for h in tl.static_range(_HEADS + 1):       # by a product with ones: a sum over rows conflicts in the shared memory
        ones, zeros = tl.full([1, _BL], 1.0, plain.dtype), tl.zeros([1, BF], plain.dtype)
        tl.store(dT + h * (2 * p + 1) * F, dot(ones, sums[h], zeros, "ieee"), mask=column[None, :] < F)


@triton.jit
def _mix_sums_kernel(weights, dweights, lists, dscores, dT, dG, n_slots, lists_run, L, p: tl.constexpr, d: tl.constexpr, F: tl.constexpr,
                     BF: tl.constexpr):
    """A program: one run; a table row's gradient of its scores, or BF columns of that of `base`, written where each reader looks for it."""
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    weights += run * n_slots * (2 * _HEADS)
    dweights += run * tl.cdiv(F, BF) * n_slots * (2 * _HEADS)
    dT += run * ((_HEADS + 1) * (2 * p + 1) * F)
    if row < 2 * p:
        head = tl.arange(0, _HEADS)
        total = tl.zeros([_HEADS], weights.dtype.element_ty)
        for start in range(0, L, _BL):
            slot = tl.load(lists + run * lists_run + row * L + start + tl.arange(0, _BL))[:, None]
            live = slot >= 0
            at = slot * (2 * _HEADS) + head[None, :]
            first, second = tl.load(weights + at, mask=live, other=0.0), tl.load(weights + at + _HEADS, mask=live, other=0.0)
            dfirst, dsecond = tl.zeros_like(first), tl.zeros_like(second)
            for _ in range(0, F, BF):
                dfirst += tl.load(dweights + at, mask=live, other=0.0)
                dsecond += tl.load(dweights + at + _HEADS, mask=live, other=0.0)
                at += n_slots * (2 * _HEADS)
            mean = first * dfirst + second * dsecond
            total += tl.sum(tl.where(row < p, first * (dfirst - mean), second * (dsecond - mean)), axis=0)
        tl.store(dscores + run * (2 * p * _HEADS) + row * _HEADS + head, total)
    else:
        column = (row - 2 * p) * BF + tl.arange(0, BF)
        inside = column < F
        sums = tl.zeros([BF], dT.dtype.element_ty)
        for start in range(0, p, _BL):
            a = start + tl.arange(0, _BL)[:, None]
            of_rows = dT + (_HEADS * (2 * p + 1) + a) * F + column[None, :]
            sums += tl.sum(tl.load(of_rows, mask=(a < p) & inside[None, :], other=0.0), axis=0)
        for h in tl.static_range(_HEADS):
            tl.store(dT + (h * (2 * p + 1) + 2 * p) * F + column, sums, mask=inside)
        tl.store(dG + run * ((d + 1) * F) + d * F + column, sums, mask=inside)


def column_block(itemsize: int) -> int:
    """Columns of a table row in one program."""
    return 512 // itemsize


def mix_backward(mixed: Tensor, T: Tensor, weights: Tensor, lists: Tensor, dT: Tensor, dweights: Tensor, dscores: Tensor, dG: Tensor,
                 layout: TransformerLayout) -> None:
    """`mixed (R, slots, F)`, now dm, `lists (R, 2p, L)` -> `dT (R, heads+1, 2p+1, F)`, `dscores (R, 2p, heads)`, the last row of
    `dG (R, d+1, F)`. The last row of dT's heads and that of dG are the gradient of `base`; the last head is scratch, as is
    `dweights (R, blocks, slots, 2, heads)`."""
    (runs, n_slots, F), p, BF, blocks = mixed.shape, layout.p, column_block(mixed.itemsize), dweights.shape[1]
    size = n_slots, lists.stride(0), lists.shape[2]
    _mix_backward_kernel[(2 * p * blocks, runs)](mixed, T, weights, lists, dT, dweights, *size, p, F, BF, num_warps=4)
    _mix_sums_kernel[(2 * p + blocks, runs)](weights, dweights, lists, dscores, dT, dG, *size, p, layout.d, F, BF, num_warps=4)
