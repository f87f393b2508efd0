"""Where networks start: splits and weights, drawn on a CPU generator whatever the device, so that a run starts from the same bits everywhere.

Source: arXiv 2606.18465, released runs.
"""
import torch
from torch import Tensor

from common import n_train
from kernels import cpu
from kernels.layout import Layout, TransformerLayout


def split(p: int, train_frac: float, member: int, seed0: int) -> Tensor:
    """Sorted indices `(n,)` of a member's training pairs; pair `i` is `(i // p, i % p)`."""
    generator = torch.Generator().manual_seed(1000 + seed0 + member)
    return torch.randperm(p * p, generator=generator)[: n_train(p, train_frac)].sort().values


def initial_rows(layout: Layout | TransformerLayout, block: int, seed0: int, members: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Starting parameters `(len(members), n_params)`: the whole block is drawn from one generator, members are kept as they come by.

    Member by member gives the bits of `torch.randn(block, ...)`, which fills 16 numbers at a time: a matrix is a multiple of 16 long."""
    generator = torch.Generator().manual_seed(seed0)
    rows, at = torch.zeros(len(members), layout.n_params, dtype=dtype), {member: i for i, member in enumerate(members)}
    with cpu.single_thread():   # threads cost small tensors more than they bring
        for matrix, (inputs, outputs, divisor) in enumerate(layout.draws()):
            for member in range(block):
                drawn = torch.randn(inputs, outputs, generator=generator)
                if member in at:
                    layout.views(rows[at[member]])[matrix][:, :outputs].copy_(drawn / divisor)
    return rows
