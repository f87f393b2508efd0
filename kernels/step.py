"""One training step of one run: forward, temperature-scaled loss, closed-form backward, AdamW, projection onto the held norm.

And the evaluation, which is the same forward over all p*p pairs. Both are compositions of the definitions of the other files.
"""
import torch
from torch import Tensor

from . import dense, transformer
from .adamw import adamw_project_ref, group_norms_ref
from .first_layer import tables_backward_ref, tables_ref
from .hidden import gelu_ref, hidden_backward_ref, hidden_ref
from .layout import GROUPS, AnyLayout, DenseLayout, TransformerLayout
from .loss import AUDIT, loss_gradient_ref, loss_ref, probabilities_ref, softmax_audit_ref
from .pairs import labels_of


def metric_names(groups: tuple[str, ...]) -> tuple[str, ...]:
    """What is measured at one step, in order: one norm for each of a model's groups."""
    return ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "logit_scale", "saturated", "norm",
            *(f"norm_{group}" for group in groups), *AUDIT)


METRICS = metric_names(GROUPS)   # of the MLP


def gradient_ref(params: Tensor, a: Tensor, b: Tensor, tau: Tensor, layout: AnyLayout, loss: str, labels: Tensor | None = None) -> Tensor:
    """Gradient row `(n_params,)` of the mean loss over the training pairs `a, b (n,)`, `labels` as `pairs.labels_of` has them; of a dense MLP
    `a, b` are the inputs `(examples, n)` and labels `(examples,)` of all examples."""
    if isinstance(layout, TransformerLayout):
        return transformer.gradient_ref(params, a, b, tau, layout, loss, labels)
    if isinstance(layout, DenseLayout):
        return dense.gradient_ref(params, a[: layout.m], b[: layout.m], tau, layout, loss)
    p = layout.p
    E, W1, W2, b1, b2 = layout.views(params)
    U, V = tables_ref(E, W1, b1)                                    # (p, H) each
    h, dgelu = hidden_ref(U, V, a, b)                               # (n, H) each
    dz = loss_gradient_ref(h @ W2 + b2, labels_of(labels, a, b, p), tau, p, loss)  # (n, p_pad)
    dU, dV = hidden_backward_ref(dz, dgelu, W2, a, b, p)            # (p, H) each
    dE, dW1, db1 = tables_backward_ref(dU, dV, E, W1)
    parts = [dE.reshape(-1), dW1.reshape(-1), (h.T @ dz).reshape(-1), db1, dz.sum(0)]
    tail = layout.n_params - sum(layout.sizes)
    return torch.cat([*parts, params.new_zeros(tail)])


def train_step_ref(params: Tensor, moment1: Tensor, moment2: Tensor, a: Tensor, b: Tensor, scalars: Tensor,
                   layout: AnyLayout, loss: str, decay_last: bool = False, labels: Tensor | None = None,
                   perp_grad: bool = False) -> None:
    """One step in place on the rows `(n_params,)`; `scalars (8 + groups,)` as `adamw.scalar_names` has them."""
    gradient = gradient_ref(params, a, b, scalars[0], layout, loss, labels)
    new = adamw_project_ref(params, moment1, moment2, gradient, scalars, layout, decay_last, perp_grad)
    for row, value in zip((params, moment1, moment2), new, strict=True):
        row.copy_(value)


def all_logits_ref(params: Tensor, layout: AnyLayout) -> Tensor:
    """Logits of all p*p pairs, pair `i` being `(i // p, i % p)`: `(p*p, p_pad)`."""
    if isinstance(layout, TransformerLayout):
        return transformer.all_logits_ref(params, layout)
    E, W1, W2, b1, b2 = layout.views(params)
    U, V = tables_ref(E, W1, b1)
    h, _ = gelu_ref((U[:, None, :] + V[None, :, :]).reshape(-1, layout.H))
    return h @ W2 + b2


def evaluate_ref(params: Tensor, train: Tensor, a: Tensor, b: Tensor, tau: Tensor, layout: AnyLayout, loss: str,
                 labels: Tensor | None = None, *, logits: Tensor | None = None) -> Tensor:
    """Everything measured at one step, float64, as `metric_names` names it; the last five (`loss.AUDIT`) are over the training pairs.

    `train (p*p,)` is 1 on training pairs. A pair counts as correct when its label's logit exceeds every other one; one of label -1 is no data.
    Of a dense MLP these are its own examples, and `a, b` as for the gradient; its `logits (examples, 2)`, if they are known.
    """
    classes = layout.classes
    if isinstance(layout, DenseLayout):
        logits, labels, learned = dense.logits_ref(params, a, layout)[0] if logits is None else logits, b, slice(layout.m)
    else:
        logits, p = all_logits_ref(params, layout), layout.p        # (p*p, p_pad)
        pair = torch.arange(p * p, device=params.device)
        labels, learned = labels_of(labels, pair // p, pair % p, p), a * p + b
    data = (labels >= 0).double()
    column = torch.arange(layout.p_pad, device=params.device)
    is_label = column == labels[:, None]
    at_label = torch.where(is_label, logits, 0).sum(-1)
    rival = torch.where(is_label | (column >= classes), -torch.inf, logits).amax(-1)
    correct = (at_label > rival).double()
    losses = torch.where(labels >= 0, loss_ref(logits, labels, tau, classes, loss), 0)
    scaled = torch.where(column < classes, logits / tau, 0)
    on_train, on_test = train.double(), data - train.double()
    n_train, n_test = on_train.sum(), on_test.sum()
    norms = group_norms_ref(params, layout)
    values = [
        (correct * on_train).sum() / n_train, (correct * on_test).sum() / n_test,
        (losses * on_train).sum() / n_train, (losses * on_test).sum() / n_test,
        (scaled.square().sum(-1).sqrt().double() * data).sum() / data.sum(),
        ((probabilities_ref(logits / tau, classes, loss).amax(-1) > 0.999).double() * data).sum() / data.sum(),
        norms.square().sum().sqrt(), *norms,
    ]
    return torch.cat([torch.stack(values), softmax_audit_ref(logits[learned], labels[learned], tau, classes, loss)])
