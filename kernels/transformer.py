"""One-layer transformer over [a, b, =], predicted at '=': logits and their closed-form gradient from the tables of `attention.py`.

    r = x + o          x the token '=' with its position, o the attention output
    without LayerNorm  z = r U + gelu(r Win) Wout U         everything linear folds: R = [Win | U] into the tables, Wout U into one matrix
    with LayerNorm     r' = r + gelu(LN(r) Win) Wout, z = LN(r') U

LN(r) Win = (C r) Win / sigma(r) with C the projection that removes a row's mean: C folds into R = C [Win | 1], and the n rows of C r that the
second half of R gives are all that LN needs. C Wout keeps r' centred. Source: arXiv 2606.13753, section 7; d = 128, 4 heads, H = 512.

Products over the n pairs a step: three of (n, H) by (H, p_pad), or of (n, H) by (H, d) and three of (n, d) by (d, p_pad) with LayerNorm.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import LN_EPS, Tables, attend_ref, mix_backward_ref, mix_ref, tables_backward_ref, tables_ref
from .hidden import gelu_ref
from .layout import HEADS, TransformerLayout
from .loss import loss_gradient_ref


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


def gradient_ref(params: Tensor, a: Tensor, b: Tensor, tau: Tensor, layout: TransformerLayout, loss: str) -> Tensor:
    """Gradient row `(n_params,)` of the mean loss over the training pairs `a, b (n,)`."""
    _, _, Wq, Wk, Wv, Wo, _, Wout, U = layout.views(params)
    d, H = layout.d, layout.H
    z, f = forward_ref(params, a, b, layout)
    dz = loss_gradient_ref(z, (a + b) % layout.p, tau, layout.classes, loss)                # (n, p_pad)
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
