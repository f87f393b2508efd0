"""Where a run's parameters lie: one flat row per run, so that AdamW, the norms and the projection are each a single pass.

    MLP           E (p, d) | W1 (2d, H) | W2 (H, p_pad) | b1 (H) | b2 (p_pad)
    transformer   E (p+1, d) | pos (3, d) | Wq Wk Wv Wo (d, d) | Win (d, H) | Wout (H, d) | U (d, p_pad)
    dense MLP     W1 (n, H) | W2 (H, 2) | b1 (H) | b2 (2)

Weight matrices come first, biases last: decay, norms and the clamp act on the prefix `[:n_weights]`. The columns of W2, b2 and U past
the classes are zero, receive zero gradient, and so stay zero; they only round the row length up to what a matrix product likes.
"""
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = ("E", "W1", "W2")   # of the MLP: norms that are measured, and may be held, one by one
HEADS = 4
MOST_INPUTS = 256   # of a dense MLP: a program on a GPU holds whole rows of them and their share of dW1


class Layout(NamedTuple):
    """Shapes of one MLP. `p_pad` is the number of logit columns stored, `p` the number that count."""
    p: int
    d: int
    H: int
    p_pad: int

    groups = GROUPS

    @property
    def classes(self) -> int:
        return self.p

    @property
    def examples(self) -> int:
        """What an evaluation looks at: all pairs."""
        return self.p**2

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

    def draws(self) -> tuple[tuple[int, int, float], ...]:
        """`(rows, columns, divisor)` of the weight matrices that `views` begins with, in the order in which they are drawn: `randn / divisor`."""
        p, d, H = self.p, self.d, self.H
        return (p, d, math.sqrt(d)), (2 * d, H, math.sqrt(2 * d)), (H, p, math.sqrt(H))

    def views(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`(E, W1, W2, b1, b2)` as views of `row (n_params,)`."""
        E, W1, W2, b1, b2 = row[: sum(self.sizes)].split(self.sizes)
        return E.view(self.p, self.d), W1.view(2 * self.d, self.H), W2.view(self.H, self.p_pad), b1, b2

    def group_slices(self) -> tuple[slice, slice, slice]:
        a, b, c = self.sizes[:3]
        return slice(0, a), slice(a, a + b), slice(a + b, a + b + c)


class TransformerLayout(NamedTuple):
    """Shapes of one transformer over the tokens a, b, '='; token p is '='. `p_pad` logit columns stored, `classes` count. No biases."""
    p: int
    d: int
    H: int
    p_pad: int
    normed: bool      # LayerNorm before attention, before the MLP block and before the unembedding
    classes: int      # p + 1, or p as in the released runs of paper B
    pos_scale: float  # pos starts at this / sqrt(d): 0.1, or 1 as in the released runs of paper B

    groups = ("embed", "attn", "mlp", "unembed")

    @property
    def examples(self) -> int:
        return self.p**2

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        p, d, H = self.p, self.d, self.H
        return (p + 1, d), (3, d), (d, d), (d, d), (d, d), (d, d), (d, H), (H, d), (d, self.p_pad)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(rows * columns for rows, columns in self.shapes)

    @property
    def n_weights(self) -> int:
        return sum(self.sizes)

    @property
    def n_params(self) -> int:
        """Length of a run's row, rounded up to 64 bytes of float32."""
        return -(-self.n_weights // 16) * 16

    def draws(self) -> tuple[tuple[int, int, float], ...]:
        """`(rows, columns, divisor)` of the nine matrices in the order in which they are drawn: `randn / divisor`."""
        d, H = self.d, self.H
        divisors = (math.sqrt(d), math.sqrt(d) / self.pos_scale, *[math.sqrt(d)] * 5, math.sqrt(H), math.sqrt(d))
        columns = [columns for _, columns in self.shapes[:-1]] + [self.classes]
        return tuple((rows, count, divisor) for (rows, _), count, divisor in zip(self.shapes, columns, divisors, strict=True))

    def views(self, row: Tensor) -> tuple[Tensor, ...]:
        """`(E, pos, Wq, Wk, Wv, Wo, Win, Wout, U)` as views of `row (..., n_params)`: of one run, or of many."""
        parts = row[..., : self.n_weights].split(self.sizes, dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True))

    def group_slices(self) -> tuple[slice, ...]:
        """E and pos; the four matrices of attention; Win and Wout; U."""
        ends = [sum(self.sizes[:count]) for count in (0, 2, 6, 8, 9)]
        return tuple(slice(start, stop) for start, stop in itertools.pairwise(ends))


class DenseLayout(NamedTuple):
    """Shapes of one MLP over inputs of its own, and of its data: of `examples` the first `m` are to train on. Two classes, nothing is padded."""
    n: int            # inputs
    H: int
    m: int
    examples: int

    groups = ("W1", "W2")
    classes = p_pad = 2

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.n * self.H, self.H * self.classes, self.H, self.classes

    @property
    def n_weights(self) -> int:
        return sum(self.sizes[:2])

    @property
    def n_params(self) -> int:
        """Length of a run's row, rounded up to 64 bytes of float32."""
        return -(-sum(self.sizes) // 16) * 16

    def draws(self) -> tuple[tuple[int, int, float], ...]:
        """`(rows, columns, divisor)` of the two matrices in the order in which they are drawn: `randn / divisor`."""
        return (self.n, self.H, math.sqrt(self.n)), (self.H, self.classes, math.sqrt(self.H))

    def views(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(W1, W2, b1, b2)` as views of `row (n_params,)`."""
        W1, W2, b1, b2 = row[: sum(self.sizes)].split(self.sizes)
        return W1.view(self.n, self.H), W2.view(self.H, self.classes), b1, b2

    def group_slices(self) -> tuple[slice, slice]:
        return slice(0, self.sizes[0]), slice(self.sizes[0], self.n_weights)


AnyLayout = Layout | TransformerLayout | DenseLayout


def padded(columns: int, dtype: torch.dtype) -> int:
    """Row lengths measured fastest on a CPU: 16 columns in float32 (one AVX-512 vector), 4 in float64, where rows of 64
    doubles alias in the cache (p=59: 3.7 ms at 64 columns against 2.7 at 60 for the step's three products)."""
    multiple = 16 if dtype == torch.float32 else 4
    return -(-columns // multiple) * multiple


def mlp_layout(p: int, d: int = 128, H: int = 256, dtype: torch.dtype = torch.float32) -> Layout:
    return Layout(p, d, H, padded(p, dtype))


def transformer_layout(p: int, d: int = 128, H: int = 512, dtype: torch.dtype = torch.float32, model: str = "transformer") -> TransformerLayout:
    """`transformer`; `transformer_ln`, the same with LayerNorm; `transformer_b`, as paper B's released runs have it: p classes, pos unscaled."""
    classes, pos_scale = (p, 1.0) if model == "transformer_b" else (p + 1, 0.1)
    return TransformerLayout(p, d, H, padded(classes, dtype), model == "transformer_ln", classes, pos_scale)


def model_layout(model: str, p: int, dtype: torch.dtype, m: int = 0, examples: int = 0,
                 width: tuple[int, int] = ()) -> AnyLayout:
    """The layout of a model of a `width`, d and H, or at the papers'. `mlp_dense` has `p` inputs, and `examples` of which the first
    `m` are to train on."""
    if model == "mlp_dense":
        return DenseLayout(p, 512, m, examples)
    return mlp_layout(p, *width, dtype=dtype) if model == "mlp" else transformer_layout(p, *width, dtype=dtype, model=model)
