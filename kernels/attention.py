"""Attention of the last of three tokens, as tables: everything before the tokens mix depends on (token, position) alone.

    X (2p+1, d): E[a] + pos0 for every a, E[b] + pos1 for every b, E[p] + pos2 of '='        A = X, or LN(X) row by row
    s_h(t) = A_t . (Wk_h q_h) / sqrt(d / heads),  q = A_= Wq: one query per run, so scores are a column per head
    w_h = softmax of s_h over the three tokens of a pair
    o R = sum_h sum_t w_h(t) V_t,h G_h,  V = A Wv,  G = Wo R: whatever matrix R comes behind the output projection folds into it

Weights of a pair sum to 1, so with V taken relative to that of '=' two tokens are left: x R + o R = base + sum_h w_h(a) T_h[a] + w_h(b) T_h[b],
`base` one row per run. T is (heads, 2p, F), rows of a first. Nothing of size n x d passes through Wq, Wk, Wv or Wo, forward or backward.
Source: Vaswani et al. 2017, eq. 1, for one query; LayerNorm (arXiv 1607.06450) without gain or bias.

On a GPU all tokens are taken relative to '=', whose own row comes last: D = [A - A_=; A_=]. Then `D Wv` holds V and V_=, scores relative to
that of '=' need no third exponential to be shared, and the row of '=' of every table carries `base`. The products are `matmul.py`'s; here is what
goes in front of them (D, the rows that multiply R) and what comes behind (gradients of E, pos and Wo), row by row, in ascending order.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dialect import divide, power_of_two, square_root, tl, triton
from .layout import HEADS, TransformerLayout

LN_EPS = 1e-5
_LN_EPS = tl.constexpr(LN_EPS)
BR = 16            # rows in a tile
_BR = tl.constexpr(BR)


class Tables(NamedTuple):
    """Of one run. `dh` = d / heads."""
    X: Tensor        # (2p+1, d) residual stream, last row '='
    A: Tensor        # (2p+1, d) what attention sees
    inverse: Tensor  # (2p+1, 1) 1 / standard deviation of the rows of X, or 1
    q: Tensor        # (d) query of '='
    scores: Tensor   # (2p+1, heads)
    V: Tensor        # (heads, 2p, dh) relative to '='
    V_eq: Tensor     # (d)


def layer_norm_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `x (n, d)` to mean 0 and variance 1, and `1 / sqrt(variance + eps)` `(n, 1)`."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LN_EPS)
    return centred * inverse, inverse


def layer_norm_backward_ref(dy: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the output `dy (n, d)` -> that of the input."""
    return inverse * (dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True))


def tokens_ref(E: Tensor, pos: Tensor) -> Tensor:
    """`E (p+1, d)`, `pos (3, d)` -> `(2p+1, d)`."""
    return torch.cat([E[:-1] + pos[0], E[:-1] + pos[1], E[-1:] + pos[2]])


def tables_ref(E: Tensor, pos: Tensor, Wq: Tensor, Wk: Tensor, Wv: Tensor, normed: bool) -> Tables:
    X = tokens_ref(E, pos)
    d = X.shape[1]
    A, inverse = layer_norm_ref(X) if normed else (X, torch.ones_like(X[:, :1]))
    q = A[-1:] @ Wq                                                          # (1, d)
    key = (Wk * q).view(d, HEADS, -1).sum(-1) / math.sqrt(d // HEADS)        # (d, heads)
    V = A @ Wv
    relative = (V[:-1] - V[-1]).view(-1, HEADS, d // HEADS).transpose(0, 1)  # (heads, 2p, dh)
    return Tables(X, A, inverse, q[0], A @ key, relative, V[-1])


def tables_backward_ref(dV: Tensor, dV_eq: Tensor, dscores: Tensor, dx_eq: Tensor, t: Tables, Wq: Tensor, Wk: Tensor, Wv: Tensor,
                        normed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `V (heads, 2p, dh)`, `V_eq (d)`, `scores`, and of the row of X of '=' that the residual carries on, `dx_eq (d)`
    -> `dE (p+1, d)`, `dpos (3, d)`, `dWq, dWk, dWv (d, d)`."""
    d, scale = t.X.shape[1], math.sqrt(t.X.shape[1] // HEADS)
    rows = dV.transpose(0, 1).reshape(-1, d)                                 # (2p, d)
    rows = torch.cat([rows, (dV_eq - rows.sum(0))[None]])                    # (2p+1, d): V itself
    key = (Wk * t.q).view(d, HEADS, -1).sum(-1) / scale                      # (d, heads)
    dkey = (t.A.T @ dscores / scale).repeat_interleave(d // HEADS, 1)        # (d, d): equal over a head's columns
    dWk, dq = dkey * t.q, (dkey * Wk).sum(0)
    dA = rows @ Wv.T + dscores @ key.T
    dA = torch.cat([dA[:-1], dA[-1:] + dq @ Wq.T])
    dX = layer_norm_backward_ref(dA, t.A, t.inverse) if normed else dA
    dX = torch.cat([dX[:-1], dX[-1:] + dx_eq])
    p = len(dX) // 2
    first, second = dX[:p], dX[p:-1]
    dE = torch.cat([first + second, dX[-1:]])
    dpos = torch.stack([first.sum(0), second.sum(0), dX[-1]])
    return dE, dpos, t.A[-1, :, None] * dq, dWk, t.A.T @ rows


@triton.jit
def normalised(x, inside, d: tl.constexpr):
    """`layer_norm_ref` of the rows of `x (rows, D)`, of which `d` columns are `inside`."""
    centred = tl.where(inside, x - tl.sum(x, axis=1)[:, None] * (1 / d), 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] * (1 / d)
    inverse = divide(tl.full([x.shape[0], 1], 1.0, x.dtype), square_root(variance + _LN_EPS))
    return centred * inverse, inverse


@triton.jit
def normalised_backward(dy, y, inverse, inside, d: tl.constexpr):
    """`layer_norm_backward_ref` of rows `(rows, D)`."""
    dx = dy - tl.sum(dy, axis=1)[:, None] * (1 / d) - y * (tl.sum(dy * y, axis=1)[:, None] * (1 / d))
    return tl.where(inside, dx * inverse, 0.0)


@triton.jit
def token_rows(theta, row, column, p: tl.constexpr, d: tl.constexpr):
    """Rows `row (rows, 1)` of X, the last being '='; 0 outside."""
    place = tl.where(row < p, 0, tl.where(row < 2 * p, 1, 2))
    token = tl.where(row == 2 * p, p, row - place * p)
    inside = (row <= 2 * p) & (column < d)
    return tl.load(theta + token * d + column, mask=inside, other=0.0) + tl.load(theta + ((p + 1) + place) * d + column, mask=inside, other=0.0)


@triton.jit
def _before_kernel(theta, D, O, back, O_run, O_row, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr, ROW: tl.constexpr, DP: tl.constexpr,
                   NORMED: tl.constexpr):
    """A program: one run, BR rows of D, of O = [Wo; X_=], or, with LayerNorm, of back = Wout C."""
    run = tl.program_id(1).to(tl.int64)
    theta += run * ROW
    column = tl.arange(0, DP)[None, :]
    inside = column < d
    D_tiles: tl.constexpr = (2 * p + _BR) // _BR
    O_tiles: tl.constexpr = (d + _BR) // _BR
    tile = tl.program_id(0)
    last = token_rows(theta, tl.full([1, 1], 2 * p, tl.int32), column, p, d)       # (1, DP) X_=
    if tile < D_tiles:
        row = tile * _BR + tl.arange(0, _BR)[:, None]
        A = token_rows(theta, row, column, p, d)
        if NORMED:
            A, _ = normalised(A, inside, d)
            last, _ = normalised(last, inside, d)
        tl.store(D + run * ((2 * p + 1) * d) + row * d + column, tl.where(row < 2 * p, A - last, A), mask=inside & (row <= 2 * p))
    elif tile < D_tiles + O_tiles:
        row = (tile - D_tiles) * _BR + tl.arange(0, _BR)[:, None]
        rows = tl.load(theta + ((p + 4) * d + 3 * d * d) + row * d + column, mask=inside & (row < d), other=0.0)
        rows = tl.where(row < d, rows, last)
        if NORMED:
            rows -= tl.sum(rows, axis=1)[:, None] * (1 / d)
        tl.store(O + run * O_run + row * O_row + column, rows, mask=inside & (row <= d))
    else:
        row = (tile - D_tiles - O_tiles) * _BR + tl.arange(0, _BR)[:, None]
        rows = tl.load(theta + ((p + 4) * d + 4 * d * d + d * H) + row * d + column, mask=inside & (row < H), other=0.0)
        rows -= tl.sum(rows, axis=1)[:, None] * (1 / d)
        tl.store(back + run * (H * d) + row * d + column, rows, mask=inside & (row < H))


def before(params: Tensor, D: Tensor, O: Tensor, back: Tensor, layout: TransformerLayout) -> None:
    """`params (R, n_params)` -> `D (R, 2p+1, d)`; `O (R, d+1, d)`: Wo and below it X_=, both times C with LayerNorm; then also
    `back (R, H, d)`: Wout C."""
    p, d, H = layout.p, layout.d, layout.H
    tiles = 2 * p // BR + 1 + d // BR + 1 + (-(-H // BR) if layout.normed else 0)
    _before_kernel[(tiles, params.shape[0])](params, D, O, back, O.stride(0), O.stride(1), p, d, H, layout.n_params, power_of_two(d),
                                             layout.normed, num_warps=4)


@triton.jit
def _behind_kernel(theta, dD, dO, dG, gradient, dG_run, dG_row, p: tl.constexpr, d: tl.constexpr, ROW: tl.constexpr, DP: tl.constexpr,
                   NORMED: tl.constexpr):
    """A program: one run; the first dE and dpos, each other BR rows of dWo."""
    run = tl.program_id(1).to(tl.int64)
    theta, gradient = theta + run * ROW, gradient + run * ROW
    dD, dO, dG = dD + run * ((2 * p + 1) * d), dO + run * ((d + 1) * d), dG + run * dG_run
    column = tl.arange(0, DP)[None, :]
    inside = column < d
    if tl.program_id(0) > 0:
        row = (tl.program_id(0) - 1) * _BR + tl.arange(0, _BR)[:, None]
        tl.store(gradient + ((p + 4) * d + 3 * d * d) + row * d + column, output_rows(dO, dG, dG_row, row, column, d, NORMED),
                 mask=inside & (row < d))
    else:
        lane = tl.arange(0, _BR)[:, None]
        first = tl.zeros([DP], theta.dtype.element_ty)
        second = tl.zeros([DP], theta.dtype.element_ty)
        all_rows = tl.zeros([DP], theta.dtype.element_ty)
        for start in range(0, p, _BR):
            row = start + lane
            live = inside & (row < p)
            of_a, of_b = tl.load(dD + row * d + column, mask=live, other=0.0), tl.load(dD + (p + row) * d + column, mask=live, other=0.0)
            all_rows += tl.sum(of_a, axis=0) + tl.sum(of_b, axis=0)
            if NORMED:
                y, inverse = normalised(token_rows(theta, row, column, p, d), inside, d)
                of_a = tl.where(live, normalised_backward(of_a, y, inverse, inside, d), 0.0)
                y, inverse = normalised(token_rows(theta, p + row, column, p, d), inside, d)
                of_b = tl.where(live, normalised_backward(of_b, y, inverse, inside, d), 0.0)
            first += tl.sum(of_a, axis=0)
            second += tl.sum(of_b, axis=0)
            tl.store(gradient + row * d + column, of_a + of_b, mask=live)
        last = tl.full([1, 1], 2 * p, tl.int32)
        dx = tl.load(dD + last * d + column, mask=inside, other=0.0) - all_rows[None, :]        # (1, DP)
        if NORMED:
            y, inverse = normalised(token_rows(theta, last, column, p, d), inside, d)
            dx = normalised_backward(dx, y, inverse, inside, d)
        dx += output_rows(dO, dG, dG_row, tl.full([1, 1], d, tl.int32), column, d, NORMED)
        dpos = gradient + (p + 1) * d + column
        tl.store(gradient + p * d + column, dx, mask=inside)
        tl.store(dpos, first[None, :], mask=inside)
        tl.store(dpos + d, second[None, :], mask=inside)
        tl.store(dpos + 2 * d, dx, mask=inside)


@triton.jit
def output_rows(dO, dG, dG_row, row, column, d: tl.constexpr, NORMED: tl.constexpr):
    """Rows of the gradient of `[Wo; X_=]`. With LayerNorm R ends in C: what G has behind H is added, and a row's mean removed."""
    inside = (row <= d) & (column < d)
    rows = tl.load(dO + row * d + column, mask=inside, other=0.0)
    if NORMED:
        rows += tl.load(dG + row * dG_row + column, mask=inside, other=0.0)
        rows -= tl.sum(rows, axis=1)[:, None] * (1 / d)
    return rows


def behind(params: Tensor, dD: Tensor, dO: Tensor, dG: Tensor, gradient: Tensor, layout: TransformerLayout) -> None:
    """`dD (R, 2p+1, d)`, `dO (R, d+1, d)`, and of LayerNorm `dG (R, d+1, d)`, the columns behind H -> the parts dE, dpos, dWo of the rows
    `gradient (R, n_params)`. The gradient of '=' is that of its own row less those of all others."""
    p, d = layout.p, layout.d
    _behind_kernel[(1 + -(-d // BR), params.shape[0])](params, dD, dO, dG, gradient, dG.stride(0), dG.stride(1), p, d, layout.n_params,
                                                       power_of_two(d), layout.normed, num_warps=4)
