"""The log of an ensemble, kept on disk: what a run has logged costs no memory while it trains, nor when it is written out.

A row is `width + 2` float64 numbers: run, step, values. The file has no name: it goes with its process, killed or not, and what a checkpoint
has of it is a copy.
"""
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK = 1024   # rows read at a time


class Logbook:
    """Rows `(run, step, values)` in the order in which they came; `folder` holds the file, default the system's for temporary ones."""

    def __init__(self, width: int, folder: Path | None = None):
        self.row, self.count = struct.Struct(f"{width + 2}d"), 0
        self.sorted: tuple[np.ndarray, np.ndarray] | None = None   # rows by run and then by step, and their runs
        self.file = tempfile.TemporaryFile(dir=folder)   # noqa: SIM115, closed with its last reader
        weakref.finalize(self, self.file.close)

    def append(self, run: int, step: int, values: list[float]) -> None:
        self.file.write(self.row.pack(run, step, *values))
        self.count, self.sorted = self.count + 1, None

    def table(self) -> np.ndarray:
        """`(rows, width + 2)` float64, mapped from the file: reading it takes no memory."""
        shape = self.count, self.row.size // 8
        if not self.count:
            return np.empty(shape)
        self.file.flush()
        return np.memmap(self.file, np.float64, "c", shape=shape)

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.table())

    def replace(self, rows: Tensor) -> None:
        """Forget all and hold `rows (rows, width + 2)`."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(rows.contiguous().numpy().data)
        self.count, self.sorted = len(rows), None

    def rows(self, order: np.ndarray) -> Iterator[tuple[int, int, list[float]]]:
        for i in range(0, len(order), CHUNK):
            for run, step, *values in self.table()[order[i : i + CHUNK]].tolist():
                yield int(run), int(step), values

    def __iter__(self) -> Iterator[tuple[int, int, list[float]]]:
        return self.rows(np.arange(self.count))

    def of(self, runs: np.ndarray) -> Iterator[tuple[int, int, list[float]]]:
        """The rows of `runs`, by run and then by step."""
        if self.sorted is None:   # once for all cells, of which there may be hundreds
            table = self.table()
            order = np.lexsort((table[:, 1], table[:, 0]))
            self.sorted = order, table[order, 0]
        order, sorted_runs = self.sorted
        for run in np.sort(runs):
            yield from self.rows(order[slice(*np.searchsorted(sorted_runs, [run, run + 1]))])


class Trajectories:
    """Rows for trajectories.csv, made anew from the logs every time they are walked through."""

    def __init__(self, *parts: Callable[[], Iterable[dict]]):
        self.parts = parts

    def __iter__(self) -> Iterator[dict]:
        for part in self.parts:
            yield from part()

    def __add__(self, other: "Trajectories") -> "Trajectories":
        return Trajectories(*self.parts, *other.parts)
