"""Temperature-scaled loss, its logit gradient, and the float64 audit of the softmax.

    s = z / tau
    cross-entropy: mean_n -log softmax(s)[y]           ds = (softmax(s) - onehot(y)) / n
    MSE:           mean_n sum_c (s_c - onehot(y)_c)^2   ds = 2 (s - onehot(y)) / n         dz = ds / tau

Rows of the cross-entropy gradient sum to 0; shifting a row of logits changes nothing. Columns past `p` are padding and get zero.
Softmax collapse after arXiv 2501.04697: float32 rounds the correct class's probability to 1, and its gradient row to exactly 0.
"""
import torch
from torch import Tensor


def columns(logits: Tensor, p: int) -> Tensor:
    """True for the columns that are classes, False for padding. (p_pad,)"""
    return torch.arange(logits.shape[1], device=logits.device) < p


def softmax_ref(scaled: Tensor, p: int) -> Tensor:
    """Softmax over the first `p` columns of `scaled (n, p_pad)`; padding gets probability 0."""
    return torch.softmax(torch.where(columns(scaled, p), scaled, -torch.inf), dim=-1)


def onehot_ref(logits: Tensor, labels: Tensor) -> Tensor:
    return (torch.arange(logits.shape[1], device=logits.device) == labels[:, None]).to(logits.dtype)


def loss_gradient_ref(logits: Tensor, labels: Tensor, tau: Tensor, p: int, loss: str) -> Tensor:
    """Gradient of the mean loss with respect to `logits (n, p_pad)`; `labels (n,)`, `tau ()`. Source: SGD on section 3's losses."""
    n = logits.shape[0]
    scaled = logits / tau
    if loss == "ce":
        return (softmax_ref(scaled, p) - onehot_ref(logits, labels)) / (tau * n)
    residual = torch.where(columns(logits, p), scaled - onehot_ref(logits, labels), 0)
    return 2 * residual / (tau * n)


def loss_ref(logits: Tensor, labels: Tensor, tau: Tensor, p: int, loss: str) -> Tensor:
    """The loss of every pair, `(n,)`."""
    scaled = logits / tau
    onehot = onehot_ref(logits, labels)
    if loss == "ce":
        masked = torch.where(columns(logits, p), scaled, -torch.inf)
        return torch.logsumexp(masked, dim=-1) - (scaled * onehot).sum(-1)
    return torch.where(columns(logits, p), scaled - onehot, 0).square().sum(-1)


AUDIT = ("collapse32", "collapse64", "sum_exp_is_one", "zero_gradient_rows", "max_gradient_difference")


def softmax_audit_ref(logits: Tensor, labels: Tensor, tau: Tensor, p: int) -> Tensor:
    """The softmax twice from the same logits, in float32 and in float64; `(5,)` float64, named by `AUDIT`.

    Shares are over the n rows: correct-class probability >= 1 in float32 and in float64; float32 sum of exponentials shifted by the
    maximum equal to 1; float32 gradient row exactly zero. Last, the largest |difference| of the two softmax gradients.
    A float64 run's logits are rounded to float32 for the float32 columns only.
    """
    onehot = onehot_ref(logits, labels)
    scaled32 = torch.where(columns(logits, p), logits.float() / tau.float(), -torch.inf)
    exp32 = torch.exp(scaled32 - scaled32.amax(-1, keepdim=True))
    sum32 = exp32.sum(-1, keepdim=True)
    gradient32 = exp32 / sum32 - onehot.float()                     # (n, p_pad)
    gradient64 = softmax_ref(logits.double() / tau.double(), p) - onehot.double()
    at_label = onehot > 0
    return torch.stack([
        (torch.where(at_label, gradient32, -1).amax(-1) >= 0).double().mean(),
        (torch.where(at_label, gradient64, -1).amax(-1) >= 0).double().mean(),
        (sum32 == 1).double().mean(),
        (gradient32.abs().amax(-1) == 0).double().mean(),
        (gradient32.double() - gradient64).abs().amax(),
    ])
