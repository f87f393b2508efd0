"""Small ensembles for the tests of the Triton kernels, and the definitions walked over their runs."""
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import launches
import native
import torch
from torch import Tensor

from kernels import dense
from kernels.adamw import PLAIN, scalar_names
from kernels.layout import AnyLayout, DenseLayout, mlp_layout, transformer_layout
from kernels.pairs import order_of, slots_of

ON_GPU = os.environ.get("GROKKING_TEST_GPU") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    noise = os.environ.get("GROKKING_TEST_NOISE")       # a seed: the interpreter computes as a GPU does
    native.install(int(noise) if noise else None)
if path := os.environ.get("GROKKING_RECORD_LAUNCHES"):
    launches.record_interpreted(Path(path))


@dataclass(frozen=True)
class Case:
    """Inputs on the CPU, drawn in float32 so that both dtypes start from equal numbers."""
    layout: AnyLayout
    loss: str
    params: Tensor      # (R, n_params)
    a: Tensor           # (R, n); of a dense MLP inputs (R, examples, n)
    b: Tensor           # and labels (R, examples)
    train: Tensor       # (R, p*p), or (R, examples)
    slots: Tensor       # (R, slots): the order of the pairs
    scalars: Tensor     # (R, 5 + groups)
    table: Tensor | None = None     # (p*p,) labels, -1 where a pair is no data; None: sums

    @property
    def labels(self) -> Tensor:
        """Of every pair its sum, `(p*p,)`, as the kernels take them."""
        pair = torch.arange(self.layout.p**2, dtype=torch.int32)
        return ((pair // self.layout.p + pair % self.layout.p) % self.layout.p).to(DEVICE)

    @property
    def runs(self) -> int:
        return len(self.params)

    @property
    def n(self) -> int:
        return self.a.shape[1]

    def alone(self, run: int) -> "Case":
        """The same run in an ensemble of its own."""
        rows = (tensor[run: run + 1].clone() for tensor in (self.params, self.a, self.b, self.train, self.slots, self.scalars))
        return Case(self.layout, self.loss, *rows, self.table)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers for a definition in another dtype, same layout."""
        a = self.a.to(dtype) if self.a.is_floating_point() else self.a
        return Case(self.layout, self.loss, self.params.to(dtype), a, self.b, self.train.to(dtype), self.slots, self.scalars.to(dtype), self.table)


def make_case(p: int = 13, runs: int = 2, dtype: torch.dtype = torch.float32, loss: str = "ce", tau: float = 1.0, scale: float = 1.0,
              seed: int = 0) -> Case:
    """d=16, H=32; `scale` multiplies W2 and b2, hence the logits."""
    layout = mlp_layout(p, 16, 32, dtype)
    generator = torch.Generator().manual_seed(seed)
    params = torch.zeros(runs, layout.n_params)
    for row in params:
        E, W1, W2, b1, b2 = layout.views(row)
        for part, size in ((E, 1.0), (W1, 32**-0.5), (W2[:, :p], scale * 32**-0.5), (b1, 0.1), (b2[:p], 0.1 * scale)):
            part.copy_(size * torch.randn(part.shape, generator=generator))
    pairs = torch.stack([torch.randperm(p * p, generator=generator)[: int(0.4 * p * p)] for _ in range(runs)])      # (R, n)
    train = torch.zeros(runs, p * p).scatter_(1, pairs, 1.0)
    scalars = torch.tensor([tau, 0.999, 0.01, 0.0316, 0, 0, 0, 0, *PLAIN]).repeat(runs, 1)      # step 1 of AdamW at lr = 0.001, no target
    return Case(layout, loss, params.to(dtype), pairs // p, pairs % p, train, slots_of(pairs // p, pairs % p, p), scalars.to(dtype))


def make_transformer_case(model: str, p: int = 5, runs: int = 2, dtype: torch.dtype = torch.float32, loss: str = "ce", tau: float = 1.0, d: int = 16,
                          H: int = 32, scale: float = 1.5, train_frac: float = 0.4, seed: int = 0) -> Case:
    """Weights `scale` times those of a start, so that attention is far from uniform. Pairs in ascending order: slot i holds pair i."""
    layout = transformer_layout(p, d, H, dtype, model)
    generator = torch.Generator().manual_seed(seed)
    params = torch.zeros(runs, layout.n_params)
    for row in params:
        for part, (rows, columns, divisor) in zip(layout.views(row), layout.draws(), strict=True):
            part[:, :columns] = scale * torch.randn(rows, columns, generator=generator) / divisor
    pairs = torch.stack([torch.randperm(p * p, generator=generator)[: int(train_frac * p * p)].sort().values for _ in range(runs)])     # (R, n)
    train = torch.zeros(runs, p * p).scatter_(1, pairs, 1.0)
    scalars = torch.zeros(runs, len(scalar_names(layout.groups)))
    scalars[:, :4], scalars[:, -3:] = torch.tensor([tau, 0.999, 0.01, 0.0316]), torch.tensor(PLAIN)
    return Case(layout, loss, params.to(dtype), pairs // p, pairs % p, train, order_of(pairs // p, pairs % p, p), scalars.to(dtype))


def make_dense_case(layout: DenseLayout, runs: int = 2, dtype: torch.dtype = torch.float32, loss: str = "ce", tau: float = 1.0, scale: float = 1.0,
                    seed: int = 0) -> Case:
    """Labels are the products of the first two inputs, which are -1 and 1 but for one; `scale` multiplies W2, hence the logits."""
    generator = torch.Generator().manual_seed(seed)
    params = torch.zeros(runs, layout.n_params)
    for row in params:
        for part, size in zip(layout.views(row), (1.0, scale * 32**-0.5, 0.1, 0.1), strict=True):
            part.copy_(size * torch.randn(part.shape, generator=generator))
    x = 2.0 * torch.randint(2, (runs, layout.examples, layout.n), generator=generator) - 1
    x[:, 0, 0] *= 0.3
    labels = (x[..., :2].prod(-1) > 0).long()
    train = (torch.arange(layout.examples) < layout.m).float().repeat(runs, 1)
    scalars = torch.tensor([tau, 0.999, 0.01, 0.0316, 0, 0, 0, *PLAIN]).repeat(runs, 1)
    return Case(layout, loss, params.to(dtype), x.to(dtype), labels, train, dense.order_of(x, labels, layout.n), scalars.to(dtype))


def with_table(case: Case) -> Case:
    """The same runs on labels drawn at random; a third of the pairs that no run trains on is no data."""
    table = torch.randint(case.layout.p, (case.layout.p**2,), generator=torch.Generator().manual_seed(9))
    table[(case.train.sum(0) == 0).nonzero()[::3, 0]] = -1
    return dataclasses.replace(case, table=table)


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output: what a kernel fails to write stays NaN and fails the test."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def draw(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def to_slots(rows: Tensor, case: Case) -> Tensor:
    """`rows (R, n, p_pad)` in the order of the pairs -> `(R, slots, p_pad)`, 0 in empty slots."""
    pairs = case.a * case.layout.p + case.b
    out = torch.zeros(*case.slots.shape, rows.shape[2], dtype=rows.dtype)
    for r in range(case.runs):
        live = case.slots[r] >= 0
        position = torch.zeros(case.layout.p**2, dtype=torch.int64).scatter_(0, pairs[r], torch.arange(case.n))
        out[r, live] = rows[r, position[case.slots[r, live].long()]]
    return out


def from_slots(rows: Tensor, case: Case) -> Tensor:
    """Inverse of `to_slots`."""
    pairs = case.a * case.layout.p + case.b
    out = []
    for r in range(case.runs):
        slot = torch.zeros(case.layout.p**2, dtype=torch.int64)
        live = case.slots[r] >= 0
        slot[case.slots[r, live].long()] = live.nonzero()[:, 0]
        out.append(rows[r, slot[pairs[r]]])
    return torch.stack(out)
