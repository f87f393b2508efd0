"""AdamW on a run's flat row, fused with the projection onto the held norm.

    w <- (1 - lr wd) w                      weight matrices only
    m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    w <- w * target / ||w||                 each held set of weight matrices, if any: the clamp; moments are left alone

as torch.optim.AdamW orders it (arXiv 1711.05101). Scalars that depend on the step come from the host in float64, rounded once.
Sums of squares accumulate in float64, so a held norm is exact to the rounding of the float32 weights.
"""
import torch
from torch import Tensor

from .layout import Layout

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
SCALARS = ("tau", "decay", "step_size", "bias2_sqrt", "target_total", "target_E", "target_W1", "target_W2")  # targets: 0 = not held


def group_norms_ref(weights: Tensor, layout: Layout) -> Tensor:
    """`||E||, ||W1||, ||W2||` of a row, float64 `(3,)`."""
    return torch.stack([weights[part].double().square().sum() for part in layout.group_slices()]).sqrt()


def adamw_project_ref(params: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, scalars: Tensor,
                      layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """New `params, moment1, moment2`, each `(n_params,)`, from the gradient row and `scalars (8,)` named by `SCALARS`."""
    _, decay, step_size, bias2_sqrt = scalars[:4]
    n = layout.n_weights
    moment1 = moment1 + (1 - BETA1) * (gradient - moment1)
    moment2 = moment2 * BETA2 + (1 - BETA2) * gradient * gradient
    update = step_size * moment1 / (moment2.sqrt() / bias2_sqrt + EPS)
    weights, biases = params[:n] * decay - update[:n], params[n:] - update[n:]
    norms = group_norms_ref(weights, layout)
    held = torch.cat([norms.square().sum().sqrt()[None], norms]).clamp_min(torch.finfo(torch.float64).tiny)
    targets = scalars[4:].double()
    ratio = torch.where(targets > 0, targets / held, 1.0).to(params.dtype)     # (4,): total, E, W1, W2
    parts = [weights[part] * (ratio[0] * ratio[1 + i]) for i, part in enumerate(layout.group_slices())]
    return torch.cat([*parts, biases]), moment1, moment2
