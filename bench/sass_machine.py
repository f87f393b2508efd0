"""Registers, predicates and operands of all threads that walk through a kernel at once.

Addresses, loop counters and predicates have their values; what comes from a tensor of floats is unknown (None), and so is all that is computed of
it; of at most SMALL floats, the scalars of a step, values and comparisons are known.
"""
import re
from collections.abc import Callable

import numpy as np

from bench.sass import BASE, MASK, PARAMETERS, Instruction, Tensors, Unknown, Value, consecutive

# Results that are not computed: how many registers they fill
UNKNOWN_WIDTH = {"FFMA": 1, "FADD": 1, "FMUL": 1, "DFMA": 2, "DADD": 2, "DMUL": 2, "MUFU": 1, "F2F": 2, "I2F": 2, "I2FP": 1, "F2I": 1, "HMMA": 4,
                 "DMMA": 4, "F2FP": 1, "FRND": 1}
IDLE = {"NOP", "BSSY", "BSYNC", "WARPSYNC", "ERRBAR", "MEMBAR", "CCTL", "DEPBAR", "LDGDEPBAR", "BAR", "FENCE", "YIELD", "WARPGROUP", "BREAK", "BMOV"}
PREDICATES = {"FSETP", "DSETP", "FCHK", "HSETP2"}


class Machine:
    """The state of a walk: what every thread holds, what has been counted. Subclasses add what instructions do.

    `programs` are pairs of program ids, of `threads` threads each. `arguments` are numbers, and indices of `tensors` as `("tensor", i)`, in the order
    of the compiled kernel's parameters with their sizes in bytes; `grid` the number of programs in both directions."""

    def __init__(self, code: list[Instruction], programs: list[tuple[int, int]], threads: int, arguments: list[tuple[object, int]],
                 grid: tuple[int, int], tensors: Tensors, shared_bytes: int, checked: bool = False):
        self.code, self.tensors, self.threads = code, tensors, threads
        self.P, self.warps = len(programs), threads // 32
        self.ids = np.array(programs, np.int64)
        constants = np.zeros(4096, np.uint8)
        constants[0:12].view(np.uint32)[:] = threads, 1, 1
        constants[12:24].view(np.uint32)[:] = *grid, 1
        offset = PARAMETERS
        for value, size in arguments:
            offset = -(-offset // size) * size
            number = tensors.starts[value[1]] if isinstance(value, tuple) else value
            constants[offset: offset + size] = list(int(number & (2**(8 * size) - 1)).to_bytes(size, "little"))
            offset += size
        self.constants = constants
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, object] = {}
        self.shared = np.full((self.P, max(1, -(-shared_bytes // 4) + 64)), -1, np.int64)     # words, -1 unknown
        self.known_shared, self.local = False, {}
        n = len(code)
        self.executed = np.zeros((n, self.P))            # times warps of a program
        self.waves = np.zeros((n, self.P))               # of shared memory
        self.lines = np.zeros((n, self.P))               # of 128 bytes, and at least bytes / 128, of memory through the cache
        self.ways = np.zeros(n, int)                     # of the worst bank conflict
        self.read = np.zeros((self.P, tensors.sectors()), bool)
        self.written = np.zeros((self.P, tensors.sectors()), bool)
        self.stored = np.zeros(tensors.end - BASE, np.uint8)      # times each byte was written, to check the walk
        self.undecided: set[int] = set()                 # branches that hung on an unknown predicate
        self.time, self.ready = np.zeros(self.P), np.zeros((6, self.P))
        self.copies, self.groups = np.zeros(self.P), []  # asynchronous copies: when the open group ends, when the closed ones do
        self.checked = checked
        self._patterns: dict[tuple, tuple[int, int]] = {}
        self._steps = [self._step_of(instruction) for instruction in code]

    # ---- operands

    def value(self, text: str) -> Value:
        if text[0] in "-~|" and not text[1].isdigit():
            inner = self.value(text.strip("-~|"))
            if inner is None:
                return None
            if "|" in text:
                inner = inner & 0x7FFFFFFF
                return inner ^ 0x80000000 if text[0] == "-" else inner
            return (-inner) & MASK if text[0] == "-" else inner ^ MASK
        name = text.partition(".")[0]
        if name in ("RZ", "URZ", "SRZ"):
            return 0
        if name[0] == "R" or name[:2] == "UR":
            return self.registers.get(name)
        if text.startswith("c["):
            return int(self.constants[(at := int(re.search(r"\[(0x\w+)\]$", text)[1], 16)): at + 4].view(np.uint32)[0])
        if re.fullmatch(r"-?0x\w+", text):
            return int(text, 16) & MASK
        if re.fullmatch(r"[-+]?(INF|QNAN|[\d.]+(e[-+]?\d+)?)", text):
            return int(np.float32(text.replace("QNAN", "NAN")).view(np.uint32))
        raise Unknown(f"operand {text} is not known to the walk")

    def truth(self, text: str) -> object:
        """A predicate: bool, (programs, threads) of them, or None."""
        name = text.lstrip("!")
        found = True if name in ("PT", "UPT") else self.predicates.get(name)
        return found if found is None or text[0] != "!" else np.logical_not(found)

    def pair(self, name: str) -> tuple[str, str]:
        prefix, number = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", name).groups()
        return f"{prefix}{number}", f"{prefix}{int(number) + 1}"

    def put(self, name: str, value: Value, mask: object) -> None:
        if name in ("RZ", "URZ"):
            return
        if mask is not None and value is not None:
            old = self.registers.get(name)
            value = np.where(mask, value, 0 if old is None else old)
        self.registers[name] = value

    def put_wide(self, name: str, value: Value, mask: object) -> None:
        if name.strip("U") != "RZ":
            low, high = self.pair(name)
            self.put(low, None if value is None else value & MASK, mask)
            self.put(high, None if value is None else value >> 32 & MASK, mask)

    def put_truth(self, name: str, value: object, mask: object) -> None:
        if name not in ("PT", "UPT"):
            if mask is not None and value is not None:
                old = self.predicates.get(name)
                value = np.where(mask, value, False if old is None else old)
            self.predicates[name] = value

    def forget(self, name: str, count: int) -> None:
        for register in consecutive(name, count):
            self.registers[register] = None

    # ---- what an instruction does: a function of the threads that are on (None: all)

    def _step_of(self, i: Instruction) -> Callable | None:
        op, mods, args = i.op, set(i.mods), i.operands
        if op in UNKNOWN_WIDTH:
            names = consecutive(args[0], UNKNOWN_WIDTH[op] if op not in ("F2F", "I2F") or i.mods[0] == "F64" else 1)
            return lambda mask: self.registers.update(dict.fromkeys(names))
        if op == "HGMMA":       # 64xN results in the registers of four warps
            names = consecutive(args[0], int(i.mods[0].split("x")[1]) // 2)
            return lambda mask: self.registers.update(dict.fromkeys(names))
        if op in IDLE or op in ("BRA", "EXIT", "CALL", "RET"):
            return None
        if op in PREDICATES:
            return lambda mask: self._compare_floats(i, mask)
        method = getattr(self, f"_{op.lower().removeprefix('u')}", None)       # a uniform register is one whose threads are alike
        if method is None:
            raise Unknown(f"instruction {'.'.join((op, *i.mods))} {', '.join(args)} is not known to the walk")
        return lambda mask: method(args, mods, mask, i)
