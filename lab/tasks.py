"""What networks learn: labels of pairs (a, b), by an operation mod p, in a group, or from a table of one's own; and sparse parity of bits."""
import csv
import functools
import itertools
import math
import re

import torch
from torch import Tensor

from kernels.layout import MOST_INPUTS

N_TEST = 2000          # test examples of sparse parity, drawn beside the training examples
MOST_EXAMPLES = 100_000   # to train on


class UsageError(Exception):
    """Bad input: its message says in one line what is wrong and what would be right."""


OPERATIONS = {                                     # labels of the pairs (a, b), before mod p; -1: no data
    "add": lambda a, b, p: a + b, "sub": lambda a, b, p: a - b, "mul": lambda a, b, p: a * b, "quadratic": lambda a, b, p: a * a + a * b + b * b,
    "div": lambda a, b, p: a * torch.tensor([0, *(pow(x, -1, p) for x in range(1, p))])}
GROUPS = {"s3": 3, "s4": 4, "s5": 5}               # all permutations of so many letters; the label of (a, b) is that of a after b
TASKS = (*OPERATIONS, *GROUPS)


@functools.lru_cache(32)
def labels(p: int, task: str = "add") -> Tensor:
    """Label of every pair (a, b) of a task, `(p, p)` int64; -1 where there is none. A task is one of TASKS or a file of labels, `.csv`: line a,
    field b, in 0..p-1, empty for a pair that is no data. Raises UsageError."""
    if (size := elements(task)) not in (0, p):
        raise UsageError(f"task {task} has {size} elements; give p {size}, or none; got {p}")
    if task in GROUPS:
        group = [*itertools.permutations(range(GROUPS[task]))]
        number = {x: i for i, x in enumerate(group)}
        return torch.tensor([[number[tuple(x[i] for i in y)] for y in group] for x in group])
    if task.endswith(".csv"):
        return torch.tensor(read_labels(task))
    if task == "div" and any(p % x == 0 for x in range(2, math.isqrt(p) + 1)):
        raise UsageError(f"task div needs a prime p, got {p}: other numbers have no inverse of every b above 0")
    a = torch.arange(p)
    table = OPERATIONS[task](a[:, None], a[None, :], p) % p
    if task == "div":
        table[:, 0] = -1
    return table


def elements(task: str) -> int:
    """How many elements a task has by itself; 0 for an operation, which has any p. Raises UsageError for what is no task."""
    if task not in TASKS and not task.endswith(".csv"):
        raise UsageError(f"task must be one of {', '.join(TASKS)} or a file of labels, .csv; got {task!r}")
    return math.factorial(GROUPS[task]) if task in GROUPS else len(read_labels(task)) if task.endswith(".csv") else 0


@functools.lru_cache(4)
def read_labels(path: str) -> list[list[int]]:
    """The table of labels in a file. Raises UsageError that names the first line and field that will not do."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read the task {path}: {getattr(error, 'strerror', None) or 'it is no table'}") from None
    p = len(rows)
    for a, row in enumerate(rows):
        if len(row) != p:
            raise UsageError(f"{path}: a table of labels is square, it has {p} lines, and line {a + 1} has {len(row)} fields")
        for b, text in enumerate(row):
            if text.strip() and not (text.strip().isdecimal() and int(text) < p):
                raise UsageError(f"{path}: line {a + 1}, field {b + 1}: a label is a whole number in 0..{p - 1}, or empty; got {text[:20]!r}")
    return [[int(text) if text.strip() else -1 for text in row] for row in rows]


def n_pairs(p: int, task: str = "add") -> int:
    """Pairs that are data."""
    return p * p if task == "add" else int((labels(p, task) >= 0).sum())


def n_train(p: int, train_frac: float, task: str = "add") -> int:
    """Training pairs; the other pairs that are data are the test set."""
    return int(train_frac * n_pairs(p, task))


def parity_task(n: int, k: int, m: int) -> str:
    """Sparse parity as published.csv names it: of `n` bits, -1 or 1, the product of the first `k`; `m` training examples."""
    return f"parity n{n} k{k} m{m}"


def parity_sizes(task: str) -> tuple[int, int, int]:
    """`(n, k, m)` of what `parity_task` gave. Raises UsageError if it gave no such thing, or if there is no such task."""
    if not (found := re.fullmatch(r"parity n(\d+) k(\d+) m(\d+)", task)):
        raise UsageError(f"task of an mlp_dense must be such as {parity_task(30, 3, 1000)!r}, got {task!r}")
    n, k, m = map(int, found.groups())
    if not (1 <= k <= n <= MOST_INPUTS and 2 <= m <= MOST_EXAMPLES):
        raise UsageError(f"sparse parity takes the first k of n bits, 1 <= k <= n <= {MOST_INPUTS}, and 2 to {MOST_EXAMPLES} training examples; "
                         f"got k {k}, n {n}, m {m}")
    return n, k, m
