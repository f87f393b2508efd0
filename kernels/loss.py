"""Temperature-scaled loss, its logit gradient, and the float64 audit of the softmax.

    s = z / tau
    cross-entropy: mean_n -log softmax(s)[y]           ds = (softmax(s) - onehot(y)) / n
    MSE:           mean_n sum_c (s_c - onehot(y)_c)^2   ds = 2 (s - onehot(y)) / n         dz = ds / tau
    StableMax:     mean_n -log q[y], q = g(s) / sum_c g(s_c), g(x) = x + 1 from 0 on, 1 / (1 - x) below      (arXiv 2501.04697, section 4)
                                                        ds = (q - onehot(y)) / (1 + |s|) / n, for g' / g = 1 / (1 + |x|) on either side


Rows of the cross-entropy gradient sum to 0; shifting a row of logits changes nothing. Columns past `p` are padding and get zero.
On a GPU one program takes a tile of pairs from the tables to the logit gradient; the logits never leave the chip. Traffic per run: the
tables and W2 through the cache, and the (n, p_pad) gradient written once.
Softmax collapse after arXiv 2501.04697: float32 rounds the correct class's probability to 1, and its gradient row to exactly 0.
"""
import torch
from torch import Tensor

from .dialect import BK, divide, power_of_two, tl, triton, warps
from .hidden import logits_tile
from .layout import Layout, TransformerLayout

LOSSES = ("ce", "mse", "stablemax")     # as the C++ steps number them


def columns(logits: Tensor, p: int) -> Tensor:
    """True for the columns that are classes, False for padding. (p_pad,)"""
    return torch.arange(logits.shape[1], device=logits.device) < p


def softmax_ref(scaled: Tensor, p: int) -> Tensor:
    """Softmax over the first `p` columns of `scaled (n, p_pad)`; padding gets probability 0."""
    return torch.softmax(torch.where(columns(scaled, p), scaled, -torch.inf), dim=-1)


def scores_ref(scaled: Tensor, p: int, loss: str) -> Tensor:
    """What the loss normalises over the first `p` columns of `scaled (n, p_pad)`: exponentials shifted by the maximum, or StableMax's g."""
    if loss == "stablemax":
        return torch.where(columns(scaled, p), torch.where(scaled >= 0, scaled + 1, 1 / (1 - scaled.clamp_max(0))), 0)
    masked = torch.where(columns(scaled, p), scaled, -torch.inf)
    return torch.exp(masked - masked.amax(-1, keepdim=True))


def probabilities_ref(scaled: Tensor, p: int, loss: str) -> Tensor:
    """Softmax, or of StableMax q, over the first `p` columns of `scaled (n, p_pad)`; padding gets 0."""
    if loss != "stablemax":
        return softmax_ref(scaled, p)
    scores = scores_ref(scaled, p, loss)
    return scores / scores.sum(-1, keepdim=True)


def onehot_ref(logits: Tensor, labels: Tensor) -> Tensor:
    return (torch.arange(logits.shape[1], device=logits.device) == labels[:, None]).to(logits.dtype)


def loss_gradient_ref(logits: Tensor, labels: Tensor, tau: Tensor, p: int, loss: str) -> Tensor:
    """Gradient of the mean loss with respect to `logits (n, p_pad)`; `labels (n,)`, `tau ()`. Source: SGD on section 3's losses."""
    n = logits.shape[0]
    scaled = logits / tau
    if loss == "ce":
        return (softmax_ref(scaled, p) - onehot_ref(logits, labels)) / (tau * n)
    if loss == "stablemax":
        return (probabilities_ref(scaled, p, loss) - onehot_ref(logits, labels)) / (1 + scaled.abs()) / (tau * n)
    residual = torch.where(columns(logits, p), scaled - onehot_ref(logits, labels), 0)
    return 2 * residual / (tau * n)


def loss_ref(logits: Tensor, labels: Tensor, tau: Tensor, p: int, loss: str) -> Tensor:
    """The loss of every pair, `(n,)` float64. The logarithm is taken in float64: float32's is off by 2e-7 near a loss of 0."""
    scaled = logits / tau
    onehot = onehot_ref(logits, labels)
    if loss == "ce":
        masked = torch.where(columns(logits, p), scaled, -torch.inf)
        top = masked.amax(-1)
        total = torch.exp(masked - top[:, None]).sum(-1)
        return torch.log(total.double()) + (top.double() - (scaled * onehot).sum(-1).double())
    if loss == "stablemax":
        scores = scores_ref(scaled, p, loss)
        return torch.log(scores.sum(-1).double()) - torch.log((scores * onehot).sum(-1).double())
    return torch.where(columns(logits, p), scaled - onehot, 0).square().sum(-1).double()


AUDIT = ("collapse32", "collapse64", "sum_exp_is_one", "zero_gradient_rows", "max_gradient_difference")


def softmax_audit_ref(logits: Tensor, labels: Tensor, tau: Tensor, p: int, loss: str) -> Tensor:
    """The probabilities twice from the same logits, in float32 and in float64; `(5,)` float64, named by `AUDIT`. Of MSE, which has none, softmax.

    Shares are over the n rows: correct-class probability >= 1 in float32 and in float64; float32 sum of the scores equal to the largest of them,
    of softmax 1; float32 probability minus onehot exactly zero in the whole row. Last, the largest |difference| of that in the two.
    A float64 run's logits are rounded to float32 for the float32 columns only.
    """
    onehot = onehot_ref(logits, labels)
    scores32 = scores_ref(logits.float() / tau.float(), p, loss)
    sum32 = scores32.sum(-1, keepdim=True)
    gradient32 = scores32 / sum32 - onehot.float()                  # (n, p_pad)
    gradient64 = probabilities_ref(logits.double() / tau.double(), p, loss) - onehot.double()
    at_label = onehot > 0
    return torch.stack([
        (torch.where(at_label, gradient32, -1).amax(-1) >= 0).double().mean(),
        (torch.where(at_label, gradient64, -1).amax(-1) >= 0).double().mean(),
        (sum32[:, 0] == scores32.amax(-1)).double().mean(),
        (gradient32.abs().amax(-1) == 0).double().mean(),
        (gradient32.double() - gradient64).abs().amax(),
    ])


@triton.jit
def softmax_rows(scaled, valid):
    """Exponentials shifted by the maximum, their sums, the maxima: `(rows, P)`, `(rows,)`, `(rows,)`. Float32 or float64."""
    masked = tl.where(valid, scaled, -float("inf"))
    top = tl.max(masked, axis=1)
    exponentials = tl.exp(masked - top[:, None])
    return exponentials, tl.sum(exponentials, axis=1), top


@triton.jit
def score_rows(scaled, valid, LOSS: tl.constexpr):
    """`scores_ref` of every row and their sums: `(rows, P)`, `(rows,)`."""
    if LOSS == "stablemax":
        below = divide(tl.full(scaled.shape, 1.0, scaled.dtype), 1 - tl.minimum(scaled, 0.0))
        scores = tl.where(valid, tl.where(scaled >= 0, scaled + 1, below), 0.0)
        total = tl.sum(scores, axis=1)
    else:
        scores, total, _ = softmax_rows(scaled, valid)
    return scores, total


@triton.jit
def loss_rows(scaled, labels, p: tl.constexpr, LOSS: tl.constexpr):
    """Loss of every row of `scaled (rows, P)`, float64. The logarithm is taken in float64: float32's is off by 2e-7 near a loss of 0."""
    column = tl.arange(0, scaled.shape[1])[None, :]
    is_label = column == labels[:, None]
    if LOSS == "ce":
        _, total, top = softmax_rows(scaled, column < p)
        at_label = tl.sum(tl.where(is_label, scaled, 0.0), axis=1)
        loss = tl.log(total.to(tl.float64)) + (top.to(tl.float64) - at_label.to(tl.float64))
    elif LOSS == "stablemax":
        scores, total = score_rows(scaled, column < p, LOSS)
        loss = tl.log(total.to(tl.float64)) - tl.log(tl.sum(tl.where(is_label, scores, 0.0), axis=1).to(tl.float64))
    else:
        residual = tl.where(column < p, scaled - tl.where(is_label, 1.0, 0.0), 0.0)
        loss = tl.sum(residual * residual, axis=1).to(tl.float64)
    return loss


@triton.jit
def audit_rows(logits, tau, labels, p: tl.constexpr, LOSS: tl.constexpr):
    """`softmax_audit_ref` of every row: four 0/1 vectors in float64 and the largest difference of the row."""
    column = tl.arange(0, logits.shape[1])[None, :]
    is_label = column == labels[:, None]
    scores32, sum32 = score_rows(divide(logits.to(tl.float32), tau.to(tl.float32)), column < p, LOSS)
    gradient32 = divide(scores32, sum32[:, None]) - tl.where(is_label, 1.0, 0.0)
    scores64, sum64 = score_rows(logits.to(tl.float64) / tau.to(tl.float64), column < p, LOSS)
    gradient64 = scores64 / sum64[:, None] - tl.where(is_label, 1.0, 0.0)
    collapsed32 = tl.max(tl.where(is_label, gradient32, -1.0), axis=1) >= 0
    collapsed64 = tl.max(tl.where(is_label, gradient64, -1.0), axis=1) >= 0
    zero = tl.max(tl.abs(gradient32), axis=1) == 0
    difference = tl.max(tl.abs(gradient32.to(tl.float64) - gradient64), axis=1)
    alone = sum32 == tl.max(scores32, axis=1)
    return collapsed32.to(tl.float64), collapsed64.to(tl.float64), alone.to(tl.float64), zero.to(tl.float64), difference


@triton.jit
def loss_gradient_rows(logits, labels, tau, n_train, p: tl.constexpr, LOSS: tl.constexpr):
    """Gradient of the mean loss over `n_train` pairs with respect to `logits (rows, P)`; `p` columns are classes."""
    column = tl.arange(0, logits.shape[1])[None, :]
    scaled = logits * divide(tl.full([], 1.0, tau.dtype), tau)
    onehot = tl.where(column == labels[:, None], 1.0, 0.0)
    if LOSS == "ce":
        exponentials, total, _ = softmax_rows(scaled, column < p)
        ds = exponentials * divide(tl.full([logits.shape[0]], 1.0, tau.dtype), total)[:, None] - onehot
    elif LOSS == "stablemax":
        scores, total = score_rows(scaled, column < p, LOSS)
        ds = divide(divide(scores, total[:, None]) - onehot, 1 + tl.abs(scaled))
    else:
        ds = 2 * tl.where(column < p, scaled - onehot, 0.0)
    return ds * divide(tl.full([], 1.0, tau.dtype), tau * n_train)


@triton.jit
def _loss_gradient_kernel(theta, tables, slots, labels, scalars, dz, n_slots, n_train, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr,
                          p_pad: tl.constexpr, ROW: tl.constexpr, SCALARS: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                          LOSS: tl.constexpr, PRECISION: tl.constexpr):
    """A program: one run, BN slots."""
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.arange(0, P)[None, :]
    pair = tl.load(slots + run * n_slots + slot, mask=slot < n_slots, other=-1)
    live = pair >= 0
    a, b = tl.where(live, pair // p, 0), tl.where(live, pair % p, 0)
    logits = logits_tile(theta + run * ROW, tables + run * (2 * p * H), a, b, p, d, H, p_pad, P, BK, PRECISION)
    ds = loss_gradient_rows(logits, tl.load(labels + pair, mask=live, other=0), tl.load(scalars + run * SCALARS), n_train, p, LOSS)
    at = dz + run * n_slots * p_pad + slot[:, None] * p_pad + column
    tl.store(at, tl.where(live[:, None], ds, 0.0), mask=(slot[:, None] < n_slots) & (column < p_pad))


def loss_gradient(params: Tensor, tables: Tensor, slots: Tensor, labels: Tensor, scalars: Tensor, dz: Tensor, n_train: int, layout: Layout, loss: str,
                  arithmetic: str) -> None:
    """`slots (R, slots)`, `labels (p*p,)`, `scalars (R, >= 8 + groups)` -> `dz (R, slots, p_pad)`, the gradient of the mean loss over a run's
    `n_train` pairs."""
    BN, P = 64, power_of_two(layout.p_pad)
    grid = (-(-slots.shape[1] // BN), params.shape[0])
    _loss_gradient_kernel[grid](params, tables, slots, labels, scalars, dz, slots.shape[1], n_train, *layout, layout.n_params, scalars.shape[1], P,
                                BN, BK, loss, arithmetic, num_warps=warps(BN * P))


@triton.jit
def _logit_gradient_kernel(logits, pairs, labels, scalars, dz, n_train, logits_run, pairs_run, dz_run, dz_row, CLASSES: tl.constexpr,
                           p_pad: tl.constexpr, SCALARS: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, LOSS: tl.constexpr):
    """A program: one run, BN slots, whose logits lie in memory."""
    run = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.arange(0, P)[None, :]
    pair = tl.load(pairs + run * pairs_run + slot)
    tile = tl.load(logits + run * logits_run + slot[:, None] * p_pad + column, mask=column < p_pad, other=0.0)
    ds = loss_gradient_rows(tile, tl.load(labels + pair, mask=pair >= 0, other=0), tl.load(scalars + run * SCALARS), n_train, CLASSES, LOSS)
    tl.store(dz + run * dz_run + slot[:, None] * dz_row + column, tl.where((pair >= 0)[:, None], ds, 0.0), mask=column < p_pad)


def logit_gradient(logits: Tensor, pairs: Tensor, labels: Tensor, scalars: Tensor, dz: Tensor, n_train: int, layout: TransformerLayout,
                   loss: str) -> None:
    """`logits (R, >= slots, p_pad)` of `pairs (R, slots)`, a multiple of 64, `labels (p*p,)` -> `dz (R, slots, p_pad)`, 0 in empty
    slots; may be the same rows."""
    BN, P = 64, power_of_two(layout.p_pad)
    _logit_gradient_kernel[(pairs.shape[1] // BN, pairs.shape[0])](
        logits, pairs, labels, scalars, dz, n_train, logits.stride(0), pairs.stride(0), dz.stride(0), dz.stride(1), layout.classes, layout.p_pad,
        scalars.shape[1], P, BN, loss, num_warps=warps(BN * P))
