"""Where runs start: splits and weights, drawn as torch draws them on a CPU or on a CUDA card, on any machine.

Paper B's released runs and every run of ours take the CPU's generators. Paper A's took a CUDA generator, whose numbers come from a counter
(Philox4x32-10) and from how a card of its size deals a tensor over its threads. `Card` names such a card; its integers come out bit for bit,
its normal numbers to about 1e-6 relative, for a GPU takes a fast sine.
Source: arXiv 2606.18465 and 2606.13753, their released runs; Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011); torch's own fill.
"""
import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import cpu
from kernels.layout import AnyLayout, DenseLayout, Layout

BLOCK_THREADS = 256      # threads in a block of a fill
BIAS_SCALE = 1e-6        # of paper A's starting biases


# ---------------------------------------------------------------- the CPU's generators

def split(p: int, n: int, member: int, seed0: int, data: Tensor | None = None) -> Tensor:
    """Sorted indices `(n,)` of a member's training pairs; pair `i` is `(i // p, i % p)`. `data`: the indices to draw from, in ascending order;
    none: all pairs."""
    generator = torch.Generator().manual_seed(1000 + seed0 + member)
    drawn = torch.randperm(p * p if data is None else len(data), generator=generator)[:n].sort().values
    return drawn if data is None else data[drawn]


def cpu_rows(layout: AnyLayout, block: int, seed0: int, members: tuple[int, ...], dtype: torch.dtype) -> Tensor:
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


# ---------------------------------------------------------------- a CUDA card's generator

class Card(NamedTuple):
    """What of a card and of its torch decides the numbers. The default is paper A's: 48 multiprocessors of 1536 threads, torch before 2.7."""
    multiprocessors: int = 48
    threads: int = 1536      # that a multiprocessor holds at once
    wide: bool = False       # randperm sorts by keys of 64 bits, as from torch 2.7 on, rather than 32

    @property
    def blocks(self) -> int:
        """The most blocks that a fill is dealt over."""
        return self.multiprocessors * (self.threads // BLOCK_THREADS)


LAYERS = {"embed": (1, 0, 0), "hidden": (0, 1, 0), "out": (0, 0, 1), "all": (1, 1, 1)}   # groups that paper A's one-shot arms scale
# What the runners of paper A's released experiments name a configuration by. Where the second is True the exponent's plus is left out.
KEYS = {
    **dict.fromkeys(("denserho", "pscan", "efflr"), ("{p}_{train_frac:.2f}_128_256_{weight_decay:.0e}", True)),
    "normint": ("adamw_p{p}_a{train_frac:.2f}_d128_H256_wd{weight_decay:.0e}_lr{lr:.0e}", False),
    "grokfss": ("adamw_p{p}_a{train_frac:.2f}_d128_H256_wd{weight_decay:.0e}_lr{lr:.0e}", True),
    **dict.fromkeys(("tfnoln", "tfnoln_long", "tfnormint"),
                    ("adamw_p{p}_a{train_frac:.2f}_d128_h4_H512_wd{weight_decay:.0e}_lr{lr:.0e}", False)),
    "tfgrok": ("adamw_p{p}_a{train_frac:.2f}_d128_h4_L1_H512_wd{weight_decay:.0e}_lr{lr:.0e}", True),
    "parity": ("adamw_n{n}_k{k}_m{m}_H512_wd{weight_decay:.0e}_lr{lr:.0e}", False),
    "parity_lambda": ("adamw_n{n}_k{k}_m{m}_H512_wd{weight_decay:.2f}_lr{lr:.0e}", False),
}


def paper_a_seed(experiment: str, **condition: float) -> int:
    """The seed of the generator that draws a block of a released `experiment` of paper A, a name of `KEYS`: all arms and doses share it.

    `condition`: p, train_frac, weight_decay, lr; of parity n, k, m, weight_decay, lr."""
    pattern, no_plus = KEYS[experiment]
    key = pattern.format(**condition)
    return int(hashlib.sha1((key.replace("+", "") if no_plus else key).encode()).hexdigest(), 16) % 2**31


def philox(seed: int, thread: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10: words `(4, ...)` uint32 of the subsequences `thread` at `counter`, broadcast against each other."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    thread, counter = np.broadcast_arrays(np.asarray(thread, np.uint64), np.asarray(counter, np.uint64))
    x0, x1, x2, x3 = counter & low, counter >> shift, thread & low, thread >> shift
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p, q = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (q >> shift) ^ x1 ^ np.uint64(k0), q & low, (p >> shift) ^ x3 ^ np.uint64(k1), p & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def normal_pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normal numbers, float32, from each pair of words: Box-Muller in float32.

    `u = x 2^-32 + 2^-33` and `a = y c + c / 2` round once, as a fused multiply-add does: their exact values are integers times a power of two."""
    c = np.float32(2.0**-32) * np.float32(2 * math.pi)                       # 24 bits above 2^-53
    u = (2 * x.astype(np.float32).astype(np.int64) + 1).astype(np.float32) * np.float32(2.0**-33)
    angle = (int(float(c) * 2.0**53) * (2 * y.astype(np.float32).astype(np.int64) + 1)).astype(np.float32) * np.float32(2.0**-54)
    radius = np.sqrt(np.float32(-2) * np.log(u.astype(np.float64)).astype(np.float32))
    wide = angle.astype(np.float64)
    return radius * np.sin(wide).astype(np.float32), radius * np.cos(wide).astype(np.float32)


def key_bits(n: int) -> int:
    """Bits of the keys that a permutation of `n` sorts by: as many as make the chance of any two being equal a tenth at most."""
    return math.ceil(math.log2(n - (6 * n**2 + 1) / (12 * math.log(0.9))))


class CudaGenerator:
    """`torch.Generator("cuda").manual_seed(seed)` of a card: the same draws in the same order give the same numbers."""

    def __init__(self, seed: int, card: Card = Card()):  # noqa: B008, it cannot be changed
        self.seed, self.card, self.offset = seed, card, 0

    def _fill(self, n: int, values: int) -> np.ndarray:
        """Words `(passes, 4, threads)` of all calls of a fill of `n` elements that takes `values` from a call."""
        threads = BLOCK_THREADS * min(-(-n // BLOCK_THREADS), self.card.blocks)
        passes = (n - 1) // (threads * values) + 1
        used = min(n, threads)
        words = philox(self.seed, np.arange(used)[None, :], self.offset // 4 + np.arange(passes)[:, None]).transpose(1, 0, 2)
        self.offset += 4 * passes
        return words

    def randn(self, *shape: int) -> np.ndarray:
        """float32 of `shape`."""
        n = math.prod(shape)
        w0, w1, w2, w3 = self._fill(n, 4).transpose(1, 0, 2)                # (passes, threads) each
        v = [*normal_pair(w0, w1), *(normal_pair(w2, w3) if n > w0.shape[1] else ())]
        return np.stack(v, axis=1).reshape(-1)[:n].reshape(shape)           # element j T U + l T + t is value l of thread t in pass j

    def randint(self, high: int, *shape: int) -> np.ndarray:
        """Integers `0 <= i < high`, `high < 2^28`, int64 of `shape`."""
        n = math.prod(shape)
        return (self._fill(n, 4).reshape(-1)[:n] % np.uint32(high)).astype(np.int64).reshape(shape)

    def randperm(self, n: int) -> np.ndarray:
        """A permutation `(n,)` int64 of `0 .. n - 1`, for `n` up to about 30000."""
        if self.card.wide:
            words = self._fill(n, 2).astype(np.uint64)                      # (passes, 4, threads)
            raw = ((words[:, 0::2] << np.uint64(32)) | words[:, 1::2]).reshape(-1)[:n]
        else:
            raw = self._fill(n, 4).astype(np.uint64).reshape(-1)[:n]
        keys = (raw % np.uint64(2**32 - 1)) & np.uint64(2**key_bits(n) - 1)
        order = np.argsort(keys, kind="stable")
        self._shuffle_equal(keys[order], order)
        self.offset += -(-n // 4) * 4
        return order

    def _shuffle_equal(self, keys: np.ndarray, order: np.ndarray) -> None:
        """Shuffle in place each run of equal sorted keys by the words of the subsequence that its position numbers."""
        same = keys[1:] == keys[:-1]
        for q in np.flatnonzero(same & ~np.concatenate([[False], same[:-1]])):
            m = int(np.searchsorted(keys, keys[q], "right")) - int(q)
            words = philox(self.seed, np.uint64(q), self.offset // 4 + np.arange(-(-(m - 1) // 4))).T.reshape(-1)
            for i, word in zip(range(m - 1, 0, -1), words.tolist(), strict=False):
                r = word % (i + 1)
                order[[q + i, q + r]] = order[[q + r, q + i]]


@functools.lru_cache(8)
def permutations(p: int, block: int, seed: int, card: Card) -> tuple[np.ndarray, int]:
    """Of each member of a block the order `(block, p*p)` of all pairs, whose first are its training pairs; and the offset behind them."""
    generator = CudaGenerator(seed, card)
    return np.stack([generator.randperm(p * p) for _ in range(block)]), generator.offset


@functools.lru_cache(8)
def parity_bits(n: int, m: int, m_test: int, block: int, seed: int, card: Card) -> tuple[np.ndarray, int]:
    """Inputs of each member of a block, -1 and 1: float32 `(block, m + m_test, n)`, the training examples first; and the offset behind them."""
    generator = CudaGenerator(seed, card)
    bits = np.concatenate([generator.randint(2, block, count, n) for count in (m, m_test)], axis=1)
    return 2 * bits.astype(np.float32) - 1, generator.offset


def cuda_rows(layout: AnyLayout, block: int, seed: int, members: tuple[int, ...], dtype: torch.dtype, card: Card) -> Tensor:
    """`initial_rows` on a card: matrices in the same order, and behind each of an MLP's two layers its biases, 1e-6 times a normal number."""
    generator = CudaGenerator(seed, card)
    if isinstance(layout, DenseLayout):
        generator.offset = parity_bits(layout.n, layout.m, layout.examples - layout.m, block, seed, card)[1]
    else:
        generator.offset = permutations(layout.p, block, seed, card)[1]
    rows = torch.zeros(len(members), layout.n_params, dtype=dtype)
    # matrix -> view of the biases drawn after it
    biases = {1: 3, 2: 4} if isinstance(layout, Layout) else {0: 2, 1: 3} if isinstance(layout, DenseLayout) else {}
    for matrix, (inputs, outputs, divisor) in enumerate(layout.draws()):
        drawn = [(matrix, generator.randn(block, inputs, outputs) * np.float32(1 / divisor))]
        if matrix in biases:
            drawn.append((biases[matrix], generator.randn(block, outputs) * np.float32(BIAS_SCALE)))
        for view, numbers in drawn:
            for row, member in zip(rows, members, strict=True):
                layout.views(row)[view][..., :outputs].copy_(torch.from_numpy(numbers[member]))
    return rows


# ---------------------------------------------------------------- either

def splits(p: int, n: int, block: int, seed0: int, members: tuple[int, ...], card: Card | None = None,
           data: Tensor | None = None) -> Tensor:
    """Sorted indices `(len(members), n)` of each member's training pairs; pair `i` is `(i // p, i % p)`. `data` as in `split`."""
    if card is None:
        return torch.stack([split(p, n, member, seed0, data) for member in members])
    orders, _ = permutations(p, block, seed0, card)
    return torch.from_numpy(np.sort(orders[list(members), :n], axis=1))


def parity_examples(n: int, k: int, m: int, m_test: int, block: int, seed0: int, members: tuple[int, ...],
                    card: Card | None = None) -> tuple[Tensor, Tensor]:
    """Inputs `(len(members), m + m_test, n)`, -1 and 1, and labels of each member, training examples first: 1 where the product of the first `k`
    bits is positive, else 0 (arXiv 2606.13753, section 8). A member's generator on a CPU is that of a split."""
    if card is None:
        draw = lambda member: torch.randint(2, (m + m_test, n), generator=torch.Generator().manual_seed(1000 + seed0 + member))  # noqa: E731
        x = 2 * torch.stack([draw(member) for member in members]).float() - 1
    else:
        x = torch.from_numpy(parity_bits(n, m, m_test, block, seed0, card)[0][list(members)])
    return x, (x[..., :k].prod(-1) > 0).long()


def initial_rows(layout: AnyLayout, block: int, seed0: int, members: tuple[int, ...], dtype: torch.dtype,
                 card: Card | None = None) -> Tensor:
    """Starting parameters `(len(members), n_params)`, as if the whole block were drawn; float64 rows are the float32 draws, cast."""
    return cpu_rows(layout, block, seed0, members, dtype) if card is None else cuda_rows(layout, block, seed0, members, dtype, card)
