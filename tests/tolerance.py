"""The one tolerance policy, the same on every machine.

The reference is the computation in float64. The budget is the error that float32 has by its nature: that of the plain definition in float32, each
of its sums added term by term in an order drawn anew, exp off by up to 2^-22.5 of its value and erf by up to an ulp as on a GPU; the worst of
`ORDERS` such passes, and one rounding of the largest value. A kernel may be twice as wrong. No BLAS has a say: products are chains here.
Of a float64 kernel the same is asked in its own eps, of float32 all the way.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS32 = torch.finfo(torch.float32).eps
EXP_ERROR = 2**-22.5    # relative, of a GPU's exp
ORDERS = 8


class Reference(NamedTuple):
    """One output of a definition."""
    exact: Tensor       # float64
    allowed: float      # the largest error of a kernel


def references(dtype: torch.dtype, definition: Callable[[torch.dtype], Sequence[Tensor]]) -> list[Reference]:
    """For a kernel that computes in `dtype`. `definition` takes a dtype and returns its outputs, computed in that dtype from equal numbers."""
    errors, eps = [], torch.finfo(dtype).eps
    exact = [output.double() for output in definition(torch.float64)]
    for seed in range(ORDERS):
        with RandomOrders(seed, widens=dtype == torch.float32):
            plain = definition(torch.float32)
        errors.append([(mine.double() - true).abs().max().item() for mine, true in zip(plain, exact, strict=True)])
    return [Reference(true, 2 * (max(each) * eps / EPS32 + eps * true.abs().max().item()))
            for true, each in zip(exact, zip(*errors, strict=True), strict=True)]


def assert_accurate(name: str, actual: Tensor, reference: Reference) -> None:
    exact, allowed = reference
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = (actual.cpu().double() - exact).abs().max().item()
    share = error / allowed if allowed else float(error > 0)
    message = f"{name}: error {error:.3g}, allowed {allowed:.3g}, {share:.0%} of the budget"
    print(message)
    assert share <= 1, message          # NaN fails


class RandomOrders(TorchDispatchMode):
    """Within the block, float32 sums of torch run term by term in orders drawn from `seed`, and exp and erf have a GPU's errors.

    Unless it `widens`, float32 stays float32 where the definition asks for float64: what float64 loses where there is nothing wider, magnified.
    """

    def __init__(self, seed: int, widens: bool):
        super().__init__()
        self.draw, self.widens = np.random.default_rng(seed), widens

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs, name = kwargs or {}, op.overloadpacket.__name__
        if name == "_to_copy" and args[0].dtype == torch.float32 and not self.widens:
            return args[0].clone()
        if name in REPLACED and args[0].dtype == torch.float32:
            return getattr(self, name.strip("_"))(*args, **kwargs)
        return op(*args, **kwargs)

    def chain(self, terms: np.ndarray) -> np.ndarray:
        """Sum over the first dimension."""
        total = np.zeros(terms.shape[1:], np.float32)
        for k in self.draw.permutation(len(terms)):
            total += terms[k]
        return total

    def mm(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = np.ascontiguousarray(x.numpy().T)[:, :, None], y.numpy()
        total = np.zeros((len(x), y.shape[1]), np.float32)
        for k in self.draw.permutation(len(y)):
            total += left[k] * right[k]
        return torch.from_numpy(total)

    def bmm(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.mm(left, right) for left, right in zip(x, y, strict=True)])

    def sum(self, x: Tensor, dim: list[int] | None = None, keepdim: bool = False) -> Tensor:
        dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
        total = self.chain(x.numpy().transpose(*dims, *(d for d in range(x.dim()) if d not in dims)).reshape(
            -1, *(size for d, size in enumerate(x.shape) if d not in dims)))
        shape = [1 if d in dims else size for d, size in enumerate(x.shape)] if keepdim else total.shape
        return torch.from_numpy(np.asarray(total)).reshape(shape)

    def mean(self, x: Tensor, dim: list[int] | None = None, keepdim: bool = False) -> Tensor:
        total = self.sum(x, dim, keepdim)
        return total / (x.numel() // total.numel())

    def exp(self, x: Tensor) -> Tensor:
        off = 1 + EXP_ERROR * torch.from_numpy(self.draw.uniform(-1, 1, x.shape))
        return torch.where(x == 0, 1.0, x.double().exp() * off).float()

    def erf(self, x: Tensor) -> Tensor:
        near = torch.special.erf(x.double()).float()
        ulps = torch.from_numpy(self.draw.integers(-1, 2, x.shape)).float()
        return torch.where(x == 0, 0.0, torch.nextafter(near, near + ulps)).clamp(-1, 1)

    def softmax(self, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
        exponentials = self.exp(x - x.amax(dim, keepdim=True))
        return exponentials / self.sum(exponentials, [dim], True)

    def index_add(self, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        if dim != 0:
            raise NotImplementedError(f"rows are added here, not dimension {dim}")
        out, order = x.numpy().copy(), self.draw.permutation(len(index))
        np.add.at(out, index.numpy()[order], source.numpy()[order])         # one row after the other
        return torch.from_numpy(out)


REPLACED = {"mm", "bmm", "sum", "mean", "exp", "erf", "_softmax", "index_add"}
