"""A GPU's arithmetic in Triton's interpreter, which has numpy's: what would fail there fails here, on every CPU alike.

    dot      one chain of FMAs over the inner dimension; single-pass TF32 and its three passes as named, with operands cut to 10 bits
    exp      off by up to 2^-22.5 of its value, exact at 0;  erf off by up to an ulp;  in float64 both by up to an ulp
    sum      a tree that adds halves, where numpy's has eight branches

Errors are drawn from the bits of the argument and a seed, so the same argument has the same error: a GPU is deterministic. An FMA is emulated in
float64, whose product is exact; its sum is rounded twice, which differs from once in a case of 2^29.
"""
import functools

import numpy as np
import torch
from tolerance import EXP_ERROR


def noise(x: np.ndarray, seed: int) -> np.ndarray:
    """Uniform in [-1, 1), a function of the bits of `x` and the seed. float64."""
    with np.errstate(over="ignore"):
        bits = x.view(np.dtype(f"u{x.itemsize}")).astype(np.uint64) + np.uint64(seed)
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):        # the finaliser of splitmix64
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(multiplier)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def exp(x: np.ndarray, seed: int) -> np.ndarray:
    bound = EXP_ERROR if x.dtype == np.float32 else np.finfo(np.float64).eps
    with np.errstate(over="ignore", under="ignore"):
        return np.where(x == 0, 1.0, np.exp(x.astype(np.float64)) * (1 + bound * noise(x, seed))).astype(x.dtype)


def erf(x: np.ndarray, seed: int | None) -> np.ndarray:
    near = torch.special.erf(torch.from_numpy(x.astype(np.float64))).numpy().astype(x.dtype)
    if seed is None:
        return near
    off = np.nextafter(near, near + np.round(1.5 * noise(x, seed)).astype(x.dtype))
    return np.where(x == 0, x, np.clip(off, -1, 1))


def chain(x: np.ndarray, y: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """`acc + x @ y`, one FMA after the other. `x (M, K)`, `y (K, N)`, `acc (M, N)`."""
    acc, left, right = acc.copy(), x.T.astype(np.float64)[:, :, None], y.astype(np.float64)
    for k in range(len(left)):
        acc[...] = left[k] * right[k] + acc
    return acc


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits behind the point, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def product(x: np.ndarray, y: np.ndarray, acc: np.ndarray, precision: str) -> np.ndarray:
    """As Triton lowers it: three passes add the small products first, and the accumulator last."""
    if acc.dtype == np.float64 or precision == "IEEE":
        return chain(x, y, acc)
    large_x, large_y = tf32(x), tf32(y)
    if precision == "TF32":
        return chain(large_x, large_y, acc)
    small = chain(large_x, tf32(y - large_y), chain(tf32(x - large_x), large_y, np.zeros_like(acc)))
    return chain(large_x, large_y, small) + acc


def halves(x: np.ndarray, axis: int) -> np.ndarray:
    """Sum over an axis whose length is a power of two."""
    x = np.moveaxis(x, axis, 0)
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2:]
    return x[0]


def install(seed: int | None) -> None:
    """From now on in this process. Call it before a kernel runs; the interpreter must be on. Without a seed no value changes, only half of the
    interpreter's time goes: its erf is a loop in Python, every call of a device function prepares the language anew, and every load and sum makes a
    table of all types."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle, _patch_lang

    prepared = set()

    def call(self: object, *args: object, **kwargs: object) -> object:
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            _patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def unary(function: object) -> object:
        return lambda self, x: TensorHandle(function(np.asarray(x.data, order="C"), seed), x.dtype.scalar)

    def create_dot(self: object, x: object, y: object, acc: object, precision: object, _: int) -> object:
        if x.data.shape[1] < 16:
            raise ValueError(f"an inner dimension of {x.data.shape[1]} does not compile on a GPU")
        return TensorHandle(product(*(np.asarray(part.data, order="C") for part in (x, y, acc)), precision.name), acc.dtype.scalar)

    def reduce_sum(self: object, x: object) -> object:
        total = halves(x.handle.data, self.axis)
        return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, x.dtype)

    numbers = functools.cache(interpreter._get_np_dtype)      # a block's or a pointer's type cannot be looked up
    interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else numbers(t.scalar)
    InterpreterBuilder.create_erf = unary(erf)
    InterpretedFunction.__call__ = call
    if seed is None:
        return
    InterpreterBuilder.create_exp = unary(exp)
    InterpreterBuilder.create_dot, ReduceOps.sum = create_dot, reduce_sum
