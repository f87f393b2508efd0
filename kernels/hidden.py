"""Hidden layer: exact GELU of the gathered tables, logits, and the way back to the tables.

    x = U[a] + V[b],  h = x Phi(x),  z = h W2 + b2          Phi(x) = (1 + erf(x / sqrt 2)) / 2
    gelu'(x) = Phi(x) + x phi(x),                           phi(x) = exp(-x^2 / 2) / sqrt(2 pi)

Traffic per run: one (n, H) activation and one (n, H) derivative; both are recomputed rather than kept on a GPU.
"""
import math

import torch
from torch import Tensor

INV_SQRT_2 = 1 / math.sqrt(2)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def gelu_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of `x` and its derivative, both of x's shape."""
    Phi = 0.5 * (1 + torch.erf(x * INV_SQRT_2))
    return x * Phi, Phi + x * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def hidden_ref(U: Tensor, V: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`U, V (p, H)`, pairs `a, b (n,)` -> `h (n, H)` and `gelu'(x) (n, H)`."""
    return gelu_ref(U[a] + V[b])


def hidden_backward_ref(dz: Tensor, dgelu: Tensor, W2: Tensor, a: Tensor, b: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Logit gradient `dz (n, p_pad)` -> `dU, dV (p, H)`: row sums of the (n, H) gradient over pairs that share a, or b."""
    dx = (dz @ W2.T) * dgelu                                       # (n, H)
    zeros = dx.new_zeros(p, dx.shape[1])
    return zeros.index_add(0, a, dx), zeros.index_add(0, b, dx)
