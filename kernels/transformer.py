"""One-layer transformer over [a, b, =], predicted at '=': logits and their closed-form gradient from the tables of `attention.py`.

    r = x + o          x the token '=' with its position, o the attention output
    without LayerNorm  z = r U + gelu(r Win) Wout U         everything linear folds: R = [Win | U] into the tables, Wout U into one matrix
    with LayerNorm     r' = r + gelu(LN(r) Win) Wout, z = LN(r') U

LN(r) Win = (C r) Win / sigma(r) with C the projection that removes a row's mean: C folds into R = C [Win | 1], and the n rows of C r that the
second half of R gives are all that LN needs. C Wout keeps r' centred. Source: arXiv 2606.13753, section 7; d = 128, 4 heads, H = 512.

Products over the n pairs a step: three of (n, H) by (H, p_pad), or of (n, H) by (H, d) and three of (n, d) by (d, p_pad) with LayerNorm.
The kernels here are the way back through GELU, and through LayerNorm, over the pairs; `transformer_launches.py` has the order of all.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import LN_EPS, Tables, normalised_backward, tables_backward_ref, tables_ref
from .dialect import BK, divisor_block, dot, power_of_two, product, tl, triton
from .hidden import INV_SQRT_2, INV_SQRT_2PI, gelu_ref
from .layout import HEADS, TransformerLayout
from .loss import loss_gradient_ref
from .mixing import attend_ref, mix_backward_ref, mix_ref
from .pairs import labels_of

BR = 32            # rows in a tile
_BR, _INV_SQRT_2, _INV_SQRT_2PI = tl.constexpr(BR), tl.constexpr(INV_SQRT_2), tl.constexpr(INV_SQRT_2PI)


def centred(W: Tensor) -> Tensor:
    """Rows of `W` less their mean: `W C`."""
    return W - W.mean(-1, keepdim=True)


class Forward(NamedTuple):
    """What the backward pass takes from the forward one."""
    tables: Tables
    R: Tensor          # (d, F): [Win | U], or C [Win | 1]
    G: Tensor          # (heads, dh, F): Wo R
    T: Tensor          # (heads, 2p, F)
    weights: Tensor    # (n, 2, heads)
    h: Tensor          # (n, H)
    dgelu: Tensor      # (n, H)
    back: Tensor       # (H, p_pad) Wout U, or (H, d) Wout C
    x: Tensor          # (n, H) input of the GELU
    r: Tensor          # (n, d) C r, with LayerNorm
    inverse: Tensor    # (n, 1) 1 / sigma(r), with LayerNorm
    y: Tensor          # (n, d) LN(r'), with LayerNorm
    inverse_y: Tensor  # (n, 1) 1 / sigma(r'), with LayerNorm


def forward_ref(params: Tensor, a: Tensor, b: Tensor, layout: TransformerLayout) -> tuple[Tensor, Forward]:
    """Logits `(n, p_pad)` of the pairs `a, b (n,)`, and what the backward pass needs."""
    E, pos, Wq, Wk, Wv, Wo, Win, Wout, U = layout.views(params)
    d, H = layout.d, layout.H
    tables = tables_ref(E, pos, Wq, Wk, Wv, layout.normed)
    R = centred(torch.cat([Win, torch.eye(d, dtype=Win.dtype, device=Win.device)], 1).T).T if layout.normed else torch.cat([Win, U], 1)
    G = Wo @ R                                                               # (d, F)
    heads = G.view(HEADS, d // HEADS, -1)
    T = torch.bmm(tables.V, heads)                                           # (heads, 2p, F)
    base = tables.X[-1] @ R + tables.V_eq @ G                                # (F)
    weights = attend_ref(tables.scores, a, b)
    mixed = mix_ref(weights, T, base, a, b)                                  # (n, F)
    first, rest = mixed[:, :H], mixed[:, H:]
    if not layout.normed:
        h, dgelu = gelu_ref(first)
        back = Wout @ U
        return h @ back + rest, Forward(tables, R, heads, T, weights, h, dgelu, back, *[first.new_empty(0)] * 5)
    inverse = torch.rsqrt(rest.square().mean(-1, keepdim=True) + LN_EPS)     # (n, 1)
    x = first * inverse
    h, dgelu = gelu_ref(x)
    back = centred(Wout)
    after = rest + h @ back                                                  # (n, d)
    inverse_y = torch.rsqrt(after.square().mean(-1, keepdim=True) + LN_EPS)
    y = after * inverse_y
    return y @ U, Forward(tables, R, heads, T, weights, h, dgelu, back, x, rest, inverse, y, inverse_y)


def gradient_ref(params: Tensor, a: Tensor, b: Tensor, tau: Tensor, layout: TransformerLayout, loss: str, labels: Tensor | None = None) -> Tensor:
    """Gradient row `(n_params,)` of the mean loss over the training pairs `a, b (n,)`."""
    _, _, Wq, Wk, Wv, Wo, _, Wout, U = layout.views(params)
    d, H = layout.d, layout.H
    z, f = forward_ref(params, a, b, layout)
    dz = loss_gradient_ref(z, labels_of(labels, a, b, layout.p), tau, layout.classes, loss)  # (n, p_pad)
    if layout.normed:
        dy = dz @ U.T
        dafter = f.inverse_y * (dy - f.y * (dy * f.y).mean(-1, keepdim=True))               # (n, d); r' is centred already
        dx = (dafter @ f.back.T) * f.dgelu                                                  # (n, H)
        dr = dafter - f.r * (f.inverse * f.inverse / d * (dx * f.x).sum(-1, keepdim=True))
        dmixed = torch.cat([dx * f.inverse, dr], 1)
        dWout, dU = centred(f.h.T @ dafter), f.y.T @ dz
    else:
        dback = f.h.T @ dz                                                                  # (H, p_pad)
        dmixed = torch.cat([(dz @ f.back.T) * f.dgelu, dz], 1)
        dWout, dU = dback @ U.T, Wout.T @ dback
    dT, dscores = mix_backward_ref(dmixed, f.weights, f.T, a, b)
    dbase = dmixed.sum(0)                                                                   # (F)
    G, t = f.G.reshape(d, -1), f.tables
    dG = torch.bmm(f.tables.V.transpose(1, 2), dT).reshape(d, -1) + t.V_eq[:, None] * dbase
    dR = Wo.T @ dG + t.X[-1, :, None] * dbase
    dWin = dR[:, :H]
    if layout.normed:
        dWin = centred(dWin.T).T
    else:
        dU = dU + dR[:, H:]
    dV = torch.bmm(dT, f.G.transpose(1, 2))                                                 # (heads, 2p, dh)
    parts = tables_backward_ref(dV, G @ dbase, dscores, f.R @ dbase, t, Wq, Wk, Wv, layout.normed)
    row = [part.reshape(-1) for part in (*parts, dG @ f.R.T, dWin, dWout, dU)]
    return torch.cat([*row, params.new_zeros(layout.n_params - layout.n_weights)])


def all_logits_ref(params: Tensor, layout: TransformerLayout) -> Tensor:
    """Logits of all p*p pairs, pair `i` being `(i // p, i % p)`: `(p*p, p_pad)`."""
    pair = torch.arange(layout.p**2, device=params.device)
    return forward_ref(params, pair // layout.p, pair % layout.p, layout)[0]


@triton.jit
def _gelu_backward_kernel(mixed, dout, turned, dback, inverses, dots, n_slots, dout_run, dout_row, dback_run, H: tl.constexpr, Q: tl.constexpr,
                          QP: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NORMED: tl.constexpr,
                          PRECISION: tl.constexpr):
    """A program: one run, BH hidden units, all slots in ascending order. Owns its columns of mixed and its rows of dback."""
    F: tl.constexpr = H + Q
    run = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    column = tl.arange(0, QP)[None, :]
    mixed += run * n_slots * F
    dout += run * dout_run
    turned += run * (Q * H)
    acc = tl.zeros([BH, QP], mixed.dtype.element_ty)
    for start in range(0, n_slots, BN):
        slot = start + tl.arange(0, BN)
        at = mixed + slot[:, None] * F + unit[None, :]
        x = tl.load(at)                                                                         # (BN, BH)
        Phi = 0.5 + 0.5 * tl.erf(x * _INV_SQRT_2)
        rows = dout + slot[:, None] * dout_row
        dx = tl.zeros([BN, BH], mixed.dtype.element_ty)
        for first in range(0, Q, BK):
            k = first + tl.arange(0, BK)
            left = tl.load(rows + k[None, :], mask=k[None, :] < Q, other=0.0)                   # (BN, BK)
            right = tl.load(turned + k[:, None] * H + unit[None, :], mask=k[:, None] < Q, other=0.0)
            dx = dot(left, right, dx, PRECISION)
        dx *= Phi + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
        if NORMED:
            tl.store(dots + (run * (H // BH) + tl.program_id(0)) * n_slots + slot, tl.sum(dx * x, axis=1))
            dx *= tl.load(inverses + 2 * run * n_slots + slot)[:, None]
        tl.store(at, dx)
        acc = product(tl.trans(x * Phi), tl.load(rows + column, mask=column < Q, other=0.0), acc, PRECISION)    # as dW2 in hidden.py
    tl.store(dback + run * dback_run + unit[:, None] * Q + column, acc, mask=column < Q)


def unit_block(H: int, itemsize: int) -> int:
    """Hidden units of a program; float64 takes twice the registers."""
    return divisor_block(H, 128 // itemsize)


def gelu_backward(mixed: Tensor, dout: Tensor, turned: Tensor, dback: Tensor, inverses: Tensor, dots: Tensor, layout: TransformerLayout,
                  arithmetic: str) -> None:
    """x in `mixed (R, slots, F)` becomes its gradient, from `dout (R, slots, Q)` and the transpose of back, `turned (R, Q, H)`;
    `dback (R, H, Q)` = gelu(x)^T dout.

    With LayerNorm it becomes that of m, and `dots (R, blocks, slots)` gets the parts of sum_H dx x. An empty slot has dout = 0."""
    (runs, n_slots, _), H, Q = mixed.shape, layout.H, turned.shape[1]
    BN, BH = 4 * BR // mixed.itemsize, unit_block(H, mixed.itemsize)       # float64 takes twice the registers
    _gelu_backward_kernel[(H // BH, runs)](mixed, dout, turned, dback, inverses, dots, n_slots, dout.stride(0), dout.stride(1), dback.stride(0), H, Q,
                                           power_of_two(Q), BN, BH, BK, layout.normed, arithmetic, num_warps=4 if Q <= 64 else 8, num_stages=2)


@triton.jit
def _norm_backward_kernel(dy, y, inverses, n_slots, y_run, d: tl.constexpr, DP: tl.constexpr):
    """A program: one run, BR slots."""
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * _BR + tl.arange(0, _BR)
    column = tl.arange(0, DP)[None, :]
    at = dy + run * n_slots * d + slot[:, None] * d + column
    rows = tl.load(y + run * y_run + slot[:, None] * d + column, mask=column < d, other=0.0)
    inverse = tl.load(inverses + (2 * run + 1) * n_slots + slot)[:, None]
    tl.store(at, normalised_backward(tl.load(at, mask=column < d, other=0.0), rows, inverse, column < d, d), mask=column < d)


def norm_backward(dy: Tensor, y: Tensor, inverses: Tensor, layout: TransformerLayout) -> None:
    """`dy (R, slots, d)` of `y (R, >= slots, d)` = LN(r') becomes the gradient of r'; `inverses (R, 2, slots)`."""
    _norm_backward_kernel[(dy.shape[1] // BR, dy.shape[0])](dy, y, inverses, dy.shape[1], y.stride(0), layout.d, power_of_two(layout.d), num_warps=4)


@triton.jit
def _residual_backward_kernel(mixed, dafter, inverses, dots, n_slots, d: tl.constexpr, H: tl.constexpr, DP: tl.constexpr, BLOCKS: tl.constexpr):
    """A program: one run, BR slots."""
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * _BR + tl.arange(0, _BR)
    column = tl.arange(0, DP)[None, :]
    inverse = tl.load(inverses + 2 * run * n_slots + slot)
    total = tl.zeros([_BR], inverse.dtype)
    for block in range(0, BLOCKS):
        total += tl.load(dots + (run * BLOCKS + block) * n_slots + slot)
    at = mixed + (run * n_slots + slot[:, None]) * (H + d) + H + column
    rows = tl.load(dafter + (run * n_slots + slot[:, None]) * d + column, mask=column < d, other=0.0)
    rows -= tl.load(at, mask=column < d, other=0.0) * (inverse * inverse * (1 / d) * total)[:, None]
    tl.store(at, rows, mask=column < d)


def residual_backward(mixed: Tensor, dafter: Tensor, inverses: Tensor, dots: Tensor, layout: TransformerLayout) -> None:
    """r in `mixed (R, slots, F)`, behind H, becomes its gradient: that of r', `dafter (R, slots, d)`, less what the LayerNorm before GELU takes."""
    _residual_backward_kernel[(mixed.shape[1] // BR, mixed.shape[0])](mixed, dafter, inverses, dots, mixed.shape[1], layout.d, layout.H,
                                                                      power_of_two(layout.d), dots.shape[1], num_warps=4)
