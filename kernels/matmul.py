"""Products of small matrices, one for each run and head: `out = scale x y`, or `out + scale x y`. The definition is torch's own `@`.

Operands are torch views: their strides say which rows, columns, heads and transposes are meant. A right operand should be read row by row, since
the columns of a transpose would all come from one bank of the shared memory: `turn` leaves a transposed copy for those that pay for it.
An output tile belongs to one program, which sums over blocks of the inner dimension in ascending order. Traffic: both operands once per
tile of the other, through the cache, and the output once.
"""
from torch import Tensor

from .dialect import BK, dot, power_of_two, tl, triton

TURNED = 32         # rows and columns of a tile that is transposed


@triton.jit
def _matmul_kernel(x, y, out, M, N, K, heads, x_run, x_head, x_row, x_column, y_run, y_head, y_row, y_column, out_run, out_head, out_row,
                   out_column, SCALE: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   PRECISION: tl.constexpr):
    """A program: one run and head, a (BM, BN) tile of the output."""
    run, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    column_tiles = tl.cdiv(N, BN)
    row = tl.program_id(0) // column_tiles * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)[None, :]
    x += run * x_run + head * x_head + row * x_row
    y += run * y_run + head * y_head + column * y_column
    acc = tl.zeros([BM, BN], out.dtype.element_ty)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + k[None, :] * x_column, mask=(row < M) & (k[None, :] < K), other=0.0)
        right = tl.load(y + k[:, None] * y_row, mask=(column < N) & (k[:, None] < K), other=0.0)
        acc = dot(left, right, acc, PRECISION)
    acc *= SCALE
    at, inside = out + run * out_run + head * out_head + row * out_row + column * out_column, (row < M) & (column < N)
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc, mask=inside)


@triton.jit
def _turn_matrix_kernel(x, out, M, N, heads, x_run, x_head, x_row, x_column, out_run, out_head, out_row, BM: tl.constexpr):
    """A program: one run and head, a (BM, BM) tile."""
    run, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    column_tiles = tl.cdiv(N, BM)
    row = tl.program_id(0) // column_tiles * BM + tl.arange(0, BM)[:, None]
    column = tl.program_id(0) % column_tiles * BM + tl.arange(0, BM)[None, :]
    inside = (row < M) & (column < N)
    tile = tl.load(x + run * x_run + head * x_head + row * x_row + column * x_column, mask=inside, other=0.0)
    at = out + run * out_run + head * out_head + tl.trans(column) * out_row + tl.trans(row)
    tl.store(at, tl.trans(tile), mask=tl.trans(inside))


def turn(x: Tensor, out: Tensor) -> None:
    """`x (R, [heads,] M, N)` -> its transpose `out (R, [heads,] N, M)`, whose rows are contiguous."""
    x, out = (view if view.dim() == 4 else view[:, None] for view in (x, out))
    runs, heads, M, N = x.shape
    if out.shape != (runs, heads, N, M) or out.stride(3) != 1:
        raise ValueError(f"expected (R, heads, M, N) -> (R, heads, N, M) with contiguous rows, got {tuple(x.shape)}, {tuple(out.shape)}")
    grid = (-(-M // TURNED) * -(-N // TURNED), runs * heads)
    _turn_matrix_kernel[grid](x, out, M, N, heads, *x.stride(), *out.stride()[:3], TURNED, num_warps=4)


def matmul(x: Tensor, y: Tensor, out: Tensor, arithmetic: str, scale: float = 1.0, add: bool = False) -> None:
    """`x (R, [heads,] M, K)`, `y (R, [heads,] K, N)` -> `out (R, [heads,] M, N)`, any strides."""
    x, y, out = (view if view.dim() == 4 else view[:, None] for view in (x, y, out))
    runs, heads, M, N = out.shape
    if x.shape != (runs, heads, M, x.shape[3]) or y.shape != (runs, heads, x.shape[3], N):
        raise ValueError(f"expected (R, heads, M, K), (R, heads, K, N) -> (R, heads, M, N), got {[tuple(t.shape) for t in (x, y, out)]}")
    BM, BN = (min(64, power_of_two(max(size, 16))) for size in (M, N))
    grid = (-(-M // BM) * -(-N // BN), runs * heads)
    _matmul_kernel[grid](x, y, out, M, N, x.shape[3], heads, *x.stride(), *y.stride(), *out.stride(), scale, add, BM, BN, BK, arithmetic,
                         num_warps=4)
