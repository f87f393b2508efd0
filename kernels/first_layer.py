"""First layer as two tables: `[E[a]; E[b]] W1 + b1 = U[a] + V[b]` with `U = E W1[:d] + b1`, `V = E W1[d:]`, both (p, H).

Nothing of size n x 2d exists, forward or backward: 23 MFLOP a step at p=59 instead of 547 on the concatenated input.
"""
import torch
from torch import Tensor


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
