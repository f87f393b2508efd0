"""Attention of the last of three tokens, as tables: everything before the tokens mix depends on (token, position) alone.

    X (2p+1, d): E[a] + pos0 for every a, E[b] + pos1 for every b, E[p] + pos2 of '='        A = X, or LN(X) row by row
    s_h(t) = A_t . (Wk_h q_h) / sqrt(d / heads),  q = A_= Wq: one query per run, so scores are a column per head
    w_h = softmax of s_h over the three tokens of a pair
    o R = sum_h sum_t w_h(t) V_t,h G_h,  V = A Wv,  G = Wo R: whatever matrix R comes behind the output projection folds into it

Weights of a pair sum to 1, so with V taken relative to that of '=' two tokens are left: x R + o R = base + sum_h w_h(a) T_h[a] + w_h(b) T_h[b],
`base` one row per run. T is (heads, 2p, F), rows of a first. Nothing of size n x d passes through Wq, Wk, Wv or Wo, forward or backward.
Source: Vaswani et al. 2017, eq. 1, for one query; LayerNorm (arXiv 1607.06450) without gain or bias.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import HEADS

LN_EPS = 1e-5


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
