"""Triton where it can be installed, and the device functions that every kernel shares.

Elsewhere (macOS, Windows) the kernels are still defined, so that everything that only uses the definitions imports; they cannot run.
"""
from types import SimpleNamespace

BK = 16     # inner dimension of a block product: the least a dot takes on a GPU; 32 unrolls twice the code and 30-60 registers more

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """`acc + x @ y`. Left to itself Triton multiplies float32 in single-pass TF32, and its interpreter hides that."""
    if acc.dtype == tl.float64:
        acc = tl.dot(x, y, acc, out_dtype=tl.float64)
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr):
    """`acc + x @ y`, the product summed by itself before it is added. The compiler would fold a plain `acc += x @ y` into the chain of `dot`; the
    named bound on imprecise sums, which means nothing but in 8 bits, keeps it from that."""
    zero = tl.zeros(acc.shape, acc.dtype)
    if acc.dtype == tl.float64:
        acc += tl.dot(x, y, zero, max_num_imprecise_acc=1, out_dtype=tl.float64)
    else:
        acc += tl.dot(x, y, zero, input_precision=PRECISION, max_num_imprecise_acc=1)
    return acc


@triton.jit
def divide(x, y):
    """`x / y`, correctly rounded: Triton's float32 `/` is off by up to 2 ulp, its float64 `/` is exact."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def square_root(x):
    """Correctly rounded in both dtypes."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


def power_of_two(size: int) -> int:
    """Smallest power of two that covers `size`: block shapes are powers of two, the rest is masked."""
    return 1 << (size - 1).bit_length()


def warps(elements: int) -> int:
    """Warps of a program that holds a tile of so many elements: 32 in a thread, 1 at least."""
    return max(1, elements // 1024)


def divisor_block(size: int, limit: int) -> int:
    """Largest power of two that divides `size`, at most `limit`: blocks of hidden units and embedding columns need no mask."""
    return min(size & -size, limit)
