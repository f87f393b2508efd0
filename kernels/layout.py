"""Where a run's parameters lie: one flat row per run, so that AdamW, the norms and the projection are each a single pass.

    E (p, d) | W1 (2d, H) | W2 (H, p_pad) | b1 (H) | b2 (p_pad)

Weight matrices come first, biases last: decay, norms and the clamp act on the prefix `[:n_weights]`. The columns of W2 and b2 past
`p` are zero, receive zero gradient, and so stay zero; they only round the row length up to what a matrix product likes.
"""
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = ("E", "W1", "W2")


class Layout(NamedTuple):
    """Shapes of one MLP. `p_pad` is the number of logit columns stored, `p` the number that count."""
    p: int
    d: int
    H: int
    p_pad: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.p * self.d, 2 * self.d * self.H, self.H * self.p_pad, self.H, self.p_pad

    @property
    def n_weights(self) -> int:
        return sum(self.sizes[:3])

    @property
    def n_params(self) -> int:
        """Length of a run's row, rounded up to 64 bytes of float32 so that every row starts aligned (equal bits at any row)."""
        return -(-sum(self.sizes) // 16) * 16

    @property
    def n_free(self) -> int:
        """The papers' parameter count: what is left of the row without padding."""
        return self.p * self.d + 2 * self.d * self.H + self.H * self.p + self.H + self.p

    def views(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`(E, W1, W2, b1, b2)` as views of `row (n_params,)`."""
        E, W1, W2, b1, b2 = row[: sum(self.sizes)].split(self.sizes)
        return E.view(self.p, self.d), W1.view(2 * self.d, self.H), W2.view(self.H, self.p_pad), b1, b2

    def group_slices(self) -> tuple[slice, slice, slice]:
        a, b, c = self.sizes[:3]
        return slice(0, a), slice(a, a + b), slice(a + b, a + b + c)


def mlp_layout(p: int, d: int = 128, H: int = 256, dtype: torch.dtype = torch.float32) -> Layout:
    """Row lengths measured fastest on a CPU: 16 columns in float32 (one AVX-512 vector), 4 in float64, where rows of 64
    doubles alias in the cache (p=59: 3.7 ms at 64 columns against 2.7 at 60 for the step's three products)."""
    multiple = 16 if dtype == torch.float32 else 4
    return Layout(p, d, H, -(-p // multiple) * multiple)
