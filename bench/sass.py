"""The machine code of a kernel (sm_90) without a GPU: its instructions, its arguments in memory, bank conflicts.

`sass_machine.py` holds what threads know, `sass_integers.py` and `sass_memory.py` say what an instruction does to it, `sass_walk.py` goes
through the code.
"""
import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from common import UsageError

MASK = 0xFFFFFFFF
BASE = 1 << 33          # address of the first tensor
ALIGNED = 512           # bytes between starts of tensors: a sector belongs to one
PARAMETERS = 0x210      # where a kernel's arguments begin in the constant bank
SECTOR, LINE = 32, 128  # bytes
SMALL = 64              # floats

Value = int | np.ndarray | None     # 32 bits of every thread (programs, threads), of all alike, or unknown


class Unknown(UsageError):
    """What the walk cannot know of a kernel; nothing is guessed."""


class Instruction(NamedTuple):
    at: int
    op: str
    mods: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str              # predicate, "" if there is none
    stall: int              # cycles until the next instruction of the warp
    sets: int               # scoreboard that its result clears, 7: none
    read: int               # scoreboard cleared once its operands are read, 7: none
    waits: tuple[int, ...]  # scoreboards to wait for


def parse(text: str) -> list[Instruction]:
    """The one function of `cuobjdump -sass`."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\n"
                      r"\s+/\* 0x([0-9a-f]{16}) \*/", re.MULTILINE)
    code = []
    for at, guard, name, operands, high in line.findall(text):
        op, *mods = name.split(".")
        control = int(high, 16) >> 41
        waits = tuple(i for i in range(6) if control >> 11 >> i & 1)
        parts = tuple(part.strip().replace(".reuse", "") for part in re.split(r",(?![^\[]*\])", operands)) if operands else ()
        code.append(Instruction(int(at, 16), op, tuple(mods), parts, guard, max(1, control & 15), control >> 5 & 7, control >> 8 & 7, waits))
    return code


@functools.cache
def consecutive(name: str, count: int) -> tuple[str, ...]:
    """`count` registers from `name` on; none from RZ on."""
    found = re.match(r"(U?R)(\d+)", name)
    return tuple(f"{found[1]}{int(found[2]) + i}" for i in range(count)) if found else ()


@dataclass
class Tensors:
    """Arguments in memory, one behind the other from BASE on."""
    arrays: list[np.ndarray]
    starts: list[int] = field(default_factory=list)
    end: int = BASE

    def __post_init__(self) -> None:
        for array in self.arrays:
            self.starts.append(self.end)
            self.end += -(-max(array.nbytes, 1) // ALIGNED) * ALIGNED

    def sectors(self) -> int:
        return (self.end - BASE) // SECTOR

    def read(self, address: np.ndarray, size: int) -> np.ndarray | None:
        """Words of `size` bytes at `address (accesses,)`, all of one tensor; None if they are floats. Raises Unknown outside of it."""
        which = int(np.searchsorted(self.starts, address[0], "right")) - 1
        array = self.arrays[which]
        offset = address - self.starts[which]
        if which < 0 or offset.min() < 0 or offset.max() + size > array.nbytes:
            raise Unknown(f"an address {int(offset.min())} to {int(offset.max())} in a tensor of {array.nbytes} bytes")
        if array.dtype.kind == "f" and array.size > SMALL:
            return None
        data = array.reshape(-1).view(np.uint8)
        return sum(data[offset + i].astype(np.int64) << 8 * i for i in range(min(size, 4)))


def conflicts(words: np.ndarray) -> int:
    """Ways of the bank conflict of one phase: the most distinct `words` that fall into one of the 32 banks."""
    distinct = np.unique(words)
    return int(np.bincount(distinct % 32, minlength=32).max()) if len(distinct) else 0


def wavefronts(address: np.ndarray, active: np.ndarray, size: int, is_load: bool = True) -> tuple[int, int]:
    """Of one access of shared memory by one warp, `address (32,)` in bytes, `size` bytes a thread: how many wavefronts it takes and how many ways its
    worst phase conflicts. A wavefront brings at most 128 bytes, so 8 bytes a thread go in halves of a warp and 16 bytes in quarters; twice as
    many lanes go together in a load whose lanes n and n ^ 1, or n and n ^ 2, all read the same (NVIDIA on compute capability 7.x; taken to hold)."""
    lanes = 32 // max(1, size // 4)
    alike = any((address == address[np.arange(32) ^ other])[active & active[np.arange(32) ^ other]].all() for other in (1, 2))
    if is_load and alike and size > 4:
        lanes *= 2
    total, worst = 0, 0
    for start in range(0, 32, lanes):
        phase = slice(start, start + lanes)
        words = address[phase][active[phase], None] // 4 + np.arange(max(1, size // 4))
        ways = conflicts(words)
        total, worst = total + ways, max(worst, ways)
    return total, worst
