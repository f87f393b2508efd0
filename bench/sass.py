"""Walks the machine code of a kernel (sm_90) without a GPU: which instructions its warps issue, and which memory they touch.

All threads of the chosen programs go through the code together, in integers: addresses, loop counters, predicates and all that is loaded from
tensors of integers have their values, so loops turn as often as they would and every access has its addresses. What comes from a tensor of
floats is unknown (None), and so is all that is computed of it; of at most SMALL floats, the scalars of a step, values and comparisons are
known. A branch that hangs on an unknown predicate is not taken: it is the slow path of a division or a root, whose numbers are rare, and such
a path asks last whether a number is above one of TINY. An address that is unknown or outside of its tensor is an error: nothing is guessed.

Threads that part meet again, since those at the lowest address go first. Every instruction also carries what the assembler wrote for the hardware:
how many cycles until the next may issue, and which outstanding results to wait for; with `LATENCY` that makes the time of a program that is alone.
"""
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

MASK = 0xFFFFFFFF
BASE = 1 << 33          # address of the first tensor
ALIGNED = 512           # bytes between starts of tensors: a sector belongs to one
PARAMETERS = 0x210      # where a kernel's arguments begin in the constant bank
SECTOR, LINE = 32, 128  # bytes
SMALL = 64              # floats

# Cycles from issue until a result may be read, where the code waits for it by a scoreboard: published microbenchmarks of Hopper, rounded
LATENCY = {"shared": 29, "cached": 40, "global": 270, "special": 20, "shuffle": 24, "barrier": 20, "other": 20}
TINY = ("1.469367938527859385e-39", "6.5827683646048100446e-37")    # bounds of slow paths below which only rare numbers lie

Value = int | np.ndarray | None     # 32 bits of every thread (programs, threads), of all alike, or unknown


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
        """Words of `size` bytes at `address (accesses,)`, all of one tensor; None if they are floats. Raises IndexError outside of it."""
        which = int(np.searchsorted(self.starts, address[0], "right")) - 1
        array = self.arrays[which]
        offset = address - self.starts[which]
        if which < 0 or offset.min() < 0 or offset.max() + size > array.nbytes:
            raise IndexError(f"an address {int(offset.min())} to {int(offset.max())} in a tensor of {array.nbytes} bytes")
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


def signed(value: Value) -> Value:
    return (value ^ 0x80000000) - 0x80000000


def both(low: Value, high: Value, is_signed: bool = False) -> Value:
    """64 bits of two registers; as numpy has it where it is an array, modulo 2^64."""
    return low | (signed(high) if is_signed else np.uint64(high).astype(np.int64) if isinstance(high, np.ndarray) else high) << 32


def product(a: Value, b: Value, is_signed: bool) -> Value:
    """64 bits of `a b`, exact; as int64 where it is an array."""
    if isinstance(a, int) and isinstance(b, int):
        return (signed(a) * signed(b) if is_signed else a * b) & 0xFFFFFFFFFFFFFFFF
    if is_signed:
        return signed(a) * signed(b)
    return (np.asarray(a).astype(np.uint64) * np.asarray(b).astype(np.uint64)).view(np.int64)


COMPARE: dict[str, Callable] = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal}
# Results that are not computed: how many registers they fill
UNKNOWN_WIDTH = {"FFMA": 1, "FADD": 1, "FMUL": 1, "DFMA": 2, "DADD": 2, "DMUL": 2, "MUFU": 1, "F2F": 2, "I2F": 2, "I2FP": 1, "F2I": 1, "HMMA": 4,
                 "DMMA": 4, "F2FP": 1, "FRND": 1}
IDLE = {"NOP", "BSSY", "BSYNC", "WARPSYNC", "ERRBAR", "MEMBAR", "CCTL", "DEPBAR", "LDGDEPBAR", "BAR", "FENCE", "YIELD", "WARPGROUP", "BREAK", "BMOV"}
PREDICATES = {"FSETP", "DSETP", "FCHK", "HSETP2"}


def compare(name: str, a: object, b: object) -> np.ndarray:
    """`GEU` and the like are true of what is not a number, which no number here is."""
    return COMPARE[name[:2]](a, b)


class Walk:
    """`code` walked by `programs`, pairs of program ids, of `threads` threads each. `arguments` are numbers, and indices of `tensors` as
    `("tensor", i)`, in the order of the compiled kernel's parameters with their sizes in bytes; `grid` the number of programs in both directions."""

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
        raise NotImplementedError(f"operand {text}")

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
            raise NotImplementedError(f"{op}.{'.'.join(i.mods)} {', '.join(args)}")
        return lambda mask: method(args, mods, mask, i)

    def _mov(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        if "64" in mods:
            self.put_wide(args[0], both(*map(self.value, self.pair(args[1]))), mask)
        self.put(args[0], self.value(args[1]), mask)

    def _hfma2(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        if {args[1].strip("-"), args[2].strip("-")} != {"RZ"}:
            return self.forget(args[0], 1)
        high, low = (int(np.float16(text).view(np.uint16)) for text in args[3:5])
        return self.put(args[0], high << 16 | low, mask)

    def _cs2r(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        if args[1] != "SRZ":
            raise NotImplementedError(args[1])
        self.put(args[0], 0, mask)
        if "32" not in mods:
            self.put(self.pair(args[0])[1], 0, mask)

    def _s2r(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        thread = np.arange(self.threads)[None, :]
        known = {"SR_TID.X": thread, "SR_LANEID": thread % 32, "SR_CTAID.X": self.ids[:, :1], "SR_CTAID.Y": self.ids[:, 1:]}
        if args[1] in ("SR_CTAID.Z", "SR_CgaCtaId"):
            return self.put(args[0], 0, mask)
        return self.put(args[0], np.broadcast_to(known[args[1]], (self.P, self.threads)), mask)

    _s2ur = _s2r

    def _r2ur(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        self.put(args[-2], self.value(args[-1]), mask)

    def _ldc(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        at = int(re.search(r"\[(0x\w+)\]$", args[1])[1], 16)
        words = self.constants[at: at + 8].view(np.uint32)
        self.put(args[0], int(words[0]), mask)
        if "64" in mods:
            self.put(self.pair(args[0])[1], int(words[1]), mask)

    def _sel(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, b, chosen = self.value(args[1]), self.value(args[2]), self.truth(args[3])
        self.put(args[0], None if a is None or b is None or chosen is None else np.where(chosen, a, b), mask)

    _fsel = _sel

    def _imad(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        dest, *rest = args
        carry = 0
        if rest[0].lstrip("!") in self.predicates or re.fullmatch(r"U?P[\dT]", rest[0]):      # a carry out: not in use
            raise NotImplementedError("IMAD with a carry out")
        a, b = self.value(rest[0]), self.value(rest[1])
        wide = "WIDE" in mods or "HI" in mods
        if wide and rest[2].strip("-") not in ("RZ", "URZ"):
            parts = [self.value(name) for name in self.pair(rest[2])] if re.match(r"U?R\d", rest[2]) else [self.value(rest[2]), 0]
            c = None if any(part is None for part in parts) else both(*parts, True)
        else:
            c = self.value(rest[2])
        if any(isinstance(value, int) and value == 0 for value in (a, b)):      # a move, as it is mostly written
            a = b = 0
        if "X" in mods and len(rest) > 3:
            carry = self.truth(rest[3])
            carry = None if carry is None else np.asarray(carry, np.int64)
        if a is None or b is None or c is None or carry is None:
            return self.forget(dest, 2 if "WIDE" in mods else 1)
        if not wide:
            low = (product(a, b, False) & MASK) + c + carry
            return self.put(dest, low & MASK, mask)
        total = product(a, b, "U32" not in mods) + c
        if isinstance(total, int):
            total &= 0xFFFFFFFFFFFFFFFF
        if "WIDE" in mods:
            return self.put_wide(dest, total, mask)
        return self.put(dest, total >> 32 & MASK, mask)

    def _iadd3(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        is_truth = [bool(re.fullmatch(r"!?U?P[\dT]", arg)) for arg in args]
        dest, outs = args[0], [arg for arg, truth in zip(args[1:3], is_truth[1:3], strict=True) if truth]
        rest = args[1 + len(outs):]
        values, carries = [self.value(arg) for arg in rest[:3]], [self.truth(arg) for arg in rest[3:]]
        if any(value is None for value in (*values, *carries)):
            self.forget(dest, 1)
            for name in outs:
                self.put_truth(name, None, mask)
            return
        total = sum(self._complement(arg, value) for arg, value in zip(rest[:3], values, strict=True))
        if "X" in mods:
            total = total + sum(np.asarray(carry, np.int64) for carry in carries)
        self.put(dest, total & MASK, mask)
        for number, name in enumerate(outs, 1):
            self.put_truth(name, (total >> 32) >= number, mask)

    def _complement(self, text: str, value: Value) -> Value:
        """`value` of an operand, or of a negated one 2^32 less its inner value: 2^32 of 0, which carries."""
        return np.where(np.equal(value, 0), 1 << 32, value) if text[0] == "-" and not text[1].isdigit() else value

    def _viadd(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, b = self.value(args[1]), self.value(args[2])
        self.put(args[0], None if a is None or b is None else (a + b) & MASK, mask)

    def _vimnmx(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, b, least = self.value(args[1]), self.value(args[2]), self.truth(args[3])
        if a is None or b is None:
            return self.forget(args[0], 1)
        if "U32" not in mods:
            a, b = signed(a), signed(b)
        return self.put(args[0], np.where(least, np.minimum(a, b), np.maximum(a, b)) & MASK, mask)

    def _viaddmnmx(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, b, c, least = *map(self.value, args[1:4]), self.truth(args[4])
        if a is None or b is None or c is None:
            return self.forget(args[0], 1)
        total = (a + b) & MASK
        if "U32" not in mods:
            total, c = signed(total), signed(c)
        return self.put(args[0], np.where(least, np.minimum(total, c), np.maximum(total, c)) & MASK, mask)

    def _iabs(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a = self.value(args[1])
        self.put(args[0], None if a is None else abs(signed(a)) & MASK, mask)

    def _lea(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        dest, rest, out = args[0], list(args[1:]), None
        if re.fullmatch(r"U?P[\dT]", rest[0]):
            out = rest.pop(0)
        carry = self.truth(rest.pop()) if "X" in mods else False
        shift = self.value(rest[-1])
        a, b = self.value(rest[0]), self.value(rest[1])
        high = 0
        if "HI" in mods:
            high = (None if a is None else -(a >> 31) & MASK) if "SX32" in mods else self.value(rest[2])
        if any(value is None for value in (a, b, high, carry)):
            self.forget(dest, 1)
            if out:
                self.put_truth(out, None, mask)
            return
        shifted = (a << shift) & MASK if "HI" not in mods else (high << shift | a >> (32 - shift)) & MASK
        total = shifted + self._complement(rest[1], b) + np.asarray(carry, np.int64)
        self.put(dest, total & MASK, mask)
        if out:
            self.put_truth(out, total >> 32 > 0, mask)

    def _lop3(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        out, rest = "PT", list(args)
        if re.fullmatch(r"U?P[\dT]", rest[0]):
            out = rest.pop(0)
        dest, a, b, c, table = rest[0], *map(self.value, rest[1:4]), self.value(rest[4])
        uses = [any((table >> m & 1) != (table >> (m ^ bit) & 1) for m in range(8)) for bit in (4, 2, 1)]
        values = [value if used else 0 for value, used in zip((a, b, c), uses, strict=True)]
        if any(value is None for value in values):
            self.forget(dest, 1)
            return self.put_truth(out, None, mask)
        a, b, c = values
        result = 0
        for m in range(8):
            if table >> m & 1:
                result = result | (a if m & 4 else a ^ MASK) & (b if m & 2 else b ^ MASK) & (c if m & 1 else c ^ MASK)
        self.put(dest, result, mask)
        return self.put_truth(out, np.not_equal(result, 0), mask)

    def _plop3(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        values, tables = [self.truth(arg) for arg in args[2:5]], [int(text, 16) for text in args[5:7]]
        for dest, table in zip(args[:2], tables, strict=True):
            if dest in ("PT", "UPT"):
                continue
            uses = [any((table >> m & 1) != (table >> (m ^ bit) & 1) for m in range(8)) for bit in (4, 2, 1)]
            if any(value is None and used for value, used in zip(values, uses, strict=True)):
                self.put_truth(dest, None, mask)
                continue
            a, b, c = (np.asarray(value if used else False) for value, used in zip(values, uses, strict=True))
            result = np.asarray(False)
            for m in range(8):
                if table >> m & 1:
                    result = result | (a if m & 4 else ~a) & (b if m & 2 else ~b) & (c if m & 1 else ~c)
            self.put_truth(dest, result, mask)

    def _shf(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        dest, (low, shift, high) = args[0], (self.value(arg) for arg in args[1:4])
        if low is None or shift is None or high is None:
            return self.forget(dest, 1)
        if not isinstance(shift, int):
            shift = np.minimum(shift, 63 if "U64" in mods or "S64" in mods else 32)
        if "L" in mods:
            result = ((high << shift) | (low >> (32 - shift)) if "HI" in mods else low << shift)
        elif "HI" in mods:
            result = (signed(high) if "S32" in mods or "S64" in mods else high) >> shift
        else:
            result = low >> shift | (high << (32 - shift))
        return self.put(dest, result & MASK, mask)

    def _sgxt(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, bits = self.value(args[1]), self.value(args[2])
        if a is None:
            return self.forget(args[0], 1)
        a = a & ((1 << bits) - 1)
        return self.put(args[0], a if "U32" in mods else ((a ^ (1 << bits - 1)) - (1 << bits - 1)) & MASK, mask)

    def _prmt(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, selector, b = (self.value(arg) for arg in args[1:4])
        if selector is None or (a is None or b is None):
            return self.forget(args[0], 1)
        result = 0
        for byte in range(4):
            choice = selector >> 4 * byte & 15
            source = (b if choice & 4 else a) >> 8 * (choice & 3) & 255
            result = result | (source if not choice & 8 else (source >> 7) * 255) << 8 * byte
        return self.put(args[0], result, mask)

    def _p2r(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        kept, start = self.value(args[3]), self.value(args[2])
        truths = [self.predicates.get(f"P{bit}") if kept >> bit & 1 else False for bit in range(7)]
        if start is None or any(truth is None for truth in truths):
            return self.forget(args[0], 1)
        return self.put(args[0], start & ~kept | sum(np.asarray(truth, np.int64) << bit for bit, truth in enumerate(truths)), mask)

    def _r2p(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        value, kept = self.value(args[1]), self.value(args[2])
        for bit in range(7):
            if kept >> bit & 1:
                self.put_truth(f"P{bit}", None if value is None else (value >> bit & 1) > 0, mask)

    def _isetp(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, b, more = self.value(args[2]), self.value(args[3]), self.truth(args[4])
        if a is None or b is None or more is None:
            self.put_truth(args[0], None, mask)
            return self.put_truth(args[1], None, mask)
        if "U32" not in mods:
            a, b = signed(a), signed(b)
        found = compare(i.mods[0], a, b)
        if "EX" in mods:
            low = self.truth(args[5])
            if low is None:
                self.put_truth(args[0], None, mask)
                return self.put_truth(args[1], None, mask)
            found = np.not_equal(a, b) | low if i.mods[0] == "NE" else np.where(np.equal(a, b), low, compare(i.mods[0], a, b))
        join = np.logical_or if "OR" in mods else np.logical_xor if "XOR" in mods else np.logical_and
        self.put_truth(args[0], join(found, more), mask)
        return self.put_truth(args[1], join(np.logical_not(found), more), mask)

    def _compare_floats(self, i: Instruction, mask: object) -> None:
        values = [self.value(arg) for arg in i.operands[2:4]] if i.op == "FSETP" else [None]
        if any(value is None for value in values):
            common = i.op == "FSETP" and i.mods[0][0] == "G" and i.operands[3] in TINY
            for name in i.operands[:1 if i.op == "FCHK" else 2]:
                self.put_truth(name, True if common and name == i.operands[0] else None, mask)
            return
        a, b = (np.asarray(value, np.uint32).view(np.float32) for value in values)
        found, more = compare(i.mods[0], a, b), self.truth(i.operands[4])
        self.put_truth(i.operands[0], None if more is None else np.logical_or(found, more) if "OR" in i.mods else np.logical_and(found, more), mask)

    def _fmnmx(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        a, b, least = self.value(args[1]), self.value(args[2]), self.truth(args[3])
        if a is None or b is None or least is None:
            return self.forget(args[0], 1)
        a, b = (np.asarray(value, np.uint32).view(np.float32) for value in (a, b))
        return self.put(args[0], np.where(least, np.minimum(a, b), np.maximum(a, b)).view(np.uint32).astype(np.int64), mask)

    def _shfl(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        value, lane = self.value(args[2]), self.value(args[3])
        if value is None or isinstance(value, int) or not isinstance(lane, int):
            return self.put(args[1], value if isinstance(value, int) else None, mask)
        rows = value.reshape(self.P, self.warps, 32)
        source = np.arange(32) ^ lane if "BFLY" in mods else np.full(32, lane)
        return self.put(args[1], rows[..., source].reshape(self.P, self.threads), mask)

    # ---- memory

    def _address(self, text: str) -> Value:
        """Of `[R4+UR5+0x20]` 32 bits, of `desc[UR8][R6.64+0x600]` 64."""
        total, wide = 0, ".64" in text
        for part in re.sub(r"^(desc\[\w+\])?\[|\]$", "", text).split("+"):
            name, _, scale = part.partition(".")
            if re.fullmatch(r"-?0x\w+", part):
                value = int(part, 16)
            elif wide and scale == "64":
                pair = [self.value(half) for half in self.pair(name)] if name != "RZ" else [0, 0]
                value = None if any(half is None for half in pair) else both(*pair, True)
            else:
                value = self.value(name)
                if value is not None and scale.startswith("X"):
                    value = value * int(scale[1:])
            if value is None:
                raise ValueError(f"unknown address {text}")
            total = total + value
        return np.broadcast_to(np.asarray(total, np.int64), (self.P, self.threads))

    def _on(self, mask: object) -> np.ndarray:
        return self.mask if mask is None else mask

    def _count_shared(self, i: Instruction, address: np.ndarray, on: np.ndarray, size: int) -> None:
        index, is_load = self.index[i.at], i.op == "LDS"
        alike = (address == address[:1]).all() and (on == on[:1]).all()
        for row in range(1 if alike else self.P):
            key = (size, is_load, (np.where(on[row], address[row] - address[row, 0] // LINE * LINE, -1)).tobytes())
            if key not in self._patterns:
                by_warp = zip(address[row].reshape(-1, 32), on[row].reshape(-1, 32), strict=True)
                each = [wavefronts(at, active, size, is_load) for at, active in by_warp]
                self._patterns[key] = sum(count for count, _ in each), max(ways for _, ways in each)
            count, ways = self._patterns[key]
            self.waves[index, slice(None) if alike else row] += count
            self.ways[index] = max(self.ways[index], ways)

    def _count_global(self, i: Instruction, address: np.ndarray, on: np.ndarray, size: int, touched: np.ndarray) -> bool:
        """Marks sectors, counts lines; whether any program touched memory that it had not read."""
        index = self.index[i.at]
        rows, _ = np.nonzero(on)
        if not len(rows):
            return False
        sector = (address[on] - BASE) // SECTOR
        fresh = not (self.read[rows, sector] | self.written[rows, sector]).all()
        for extra in range(0, size, SECTOR):
            touched[rows, sector + extra // SECTOR] = True
        line = np.where(on, address // LINE, -1).reshape(self.P, self.warps, 32)
        line = np.sort(line, axis=-1)
        count = (np.diff(line, axis=-1, prepend=-1) != 0).sum(-1)
        bytes_ = on.reshape(self.P, self.warps, 32).sum(-1) * size
        self.lines[index] += np.maximum(count, -(-bytes_ // LINE)).sum(-1)
        return fresh

    @staticmethod
    def _size(mods: set) -> int:
        return next((bytes_ for name, bytes_ in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)) if name in mods), 4)

    def _lds(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        if args[0] == "RZ":
            return
        size, on, address = self._size(mods), self._on(mask), self._address(args[1])
        self._count_shared(i, address, on, size)
        if not self.known_shared:
            return self.forget(args[0], max(1, size // 4))
        prefix, number = re.fullmatch(r"(U?R)(\d+)", args[0]).groups()
        offset = (address & 0xFFFFFF) // 4
        for word in range(max(1, size // 4)):
            found = self.shared[np.arange(self.P)[:, None], np.minimum(offset + word, self.shared.shape[1] - 1)]
            if size < 4:
                found = np.where(found < 0, found, found >> 8 * (address & 3) & ((1 << 8 * size) - 1))
            self.put(f"{prefix}{int(number) + word}", None if (found[on] < 0).any() else found, mask)

    def _sts(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        size, on, address = self._size(mods), self._on(mask), self._address(args[0])
        self._count_shared(i, address, on, size)
        names = [args[1]]
        if size > 4 and args[1] != "RZ":
            prefix, number = re.fullmatch(r"(U?R)(\d+)", args[1]).groups()
            names = [f"{prefix}{int(number) + word}" for word in range(size // 4)]
        values = [self.value(name) for name in names]
        if size < 4:
            values = [None]         # of a word that is written in parts nothing is known
        if not self.known_shared and all(value is None for value in values):
            return
        self.known_shared = True
        rows = np.nonzero(on)[0]
        for word, value in enumerate(values):
            offset = np.minimum((address[on] & 0xFFFFFF) // 4 + word, self.shared.shape[1] - 1)
            self.shared[rows, offset] = -1 if value is None else np.broadcast_to(value, on.shape)[on]

    def _stl(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        """What does not fit into the registers; each thread has its own, so a word of all lanes is one line."""
        name, words = args[1], max(1, self._size(mods) // 4)
        self.lines[self.index[i.at]] += words * self.warps
        for word, register in enumerate(consecutive(name, words) or ["RZ"] * words):
            self.local[int(np.max(self._address(args[0]))) + 4 * word] = self.value(register)

    def _ldl(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        words = max(1, self._size(mods) // 4)
        self.lines[self.index[i.at]] += words * self.warps
        for word, register in enumerate(consecutive(args[0], words)):
            self.put(register, self.local[int(np.max(self._address(args[1]))) + 4 * word], mask)

    def _ldsm(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        """Each group of eight lanes names the rows, 16 bytes each, of one 8x8 matrix."""
        count = next((number for name, number in (("4", 4), ("2", 2)) if name in mods), 1)
        on = self._on(mask) & (np.arange(self.threads) % 32 < 8 * count)
        self._count_shared(i, self._address(args[1]), on, 16)
        self.forget(args[0], count)

    def _stsm(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        count = next((number for name, number in (("4", 4), ("2", 2)) if name in mods), 1)
        self._count_shared(i, self._address(args[0]), self._on(mask) & (np.arange(self.threads) % 32 < 8 * count), 16)

    def _ldg(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        dest, text = args[-2:] if not args[-1].startswith("!") else args[-3:-1]
        size, on, address = self._size(mods), self._on(mask), self._address(text)
        self.fresh = self._count_global(i, address, on, size, self.read)
        if not on.any():
            return
        prefix, number = re.fullmatch(r"(U?R)(\d+)", dest).groups()
        for word in range(max(1, size // 4)):
            found = self.tensors.read(address[on] + 4 * word, min(size, 4))
            if found is None:
                return self.forget(dest, max(1, size // 4))
            value = np.zeros(on.shape, np.int64)
            value[on] = found
            self.put(f"{prefix}{int(number) + word}", value, on if mask is not None else None)

    def _stg(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        size, on, address = self._size(mods), self._on(mask), self._address(args[0])
        self._count_global(i, address, on, size, self.written)
        if on.any():
            self.tensors.read(address[on], size)            # inside of a tensor
            at = (address[on] - BASE)[:, None] + np.arange(size)
            self.stored += np.bincount(at.reshape(-1), minlength=len(self.stored)).astype(np.uint8) if self.checked else 0

    def _ldgsts(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        """Copies from memory to shared memory; lanes whose predicate is off fill with zeros."""
        size, on = self._size(mods), self._on(mask)
        self._count_shared(i, self._address(args[0]), on, size)
        reads = on if len(args) < 3 else on & np.broadcast_to(self.truth(args[2]), on.shape)
        self.fresh = self._count_global(i, self._address(args[1]), reads, size, self.read)
        if reads.any():
            self.tensors.read(self._address(args[1])[reads], size)

    # ---- the walk

    def run(self, most: int = 20_000_000) -> "Walk":
        """Until all have left. Raises RuntimeError after `most` instructions."""
        self.index = {instruction.at: number for number, instruction in enumerate(self.code)}
        everyone = np.ones((self.P, self.threads), bool)
        self.mask, waiting, at = everyone, {}, 0       # waiting: address -> threads, their registers and predicates
        warps = self._warps_on()
        for _ in range(most):
            if waiting and (low := min(waiting)) <= at:
                here = self._group()
                if low < at:
                    waiting[at], here, at = here, None, low
                self._go_on(waiting.pop(low), here)
                warps = self._warps_on()
            number = self.index[at]
            i = self.code[number]
            self.executed[number] += warps
            guard, mask = (self.truth(i.guard), None) if i.guard else (True, None)
            if i.op in ("BRA", "EXIT", "CALL", "RET"):
                self._clock(i, warps)
                extra = [self.truth(arg) for arg in i.operands[:-1] if re.fullmatch(r"!?U?P[\dT]", arg)]
                for truth, text in ((guard, i.guard), *zip(extra, i.operands, strict=False)):
                    if truth is None:
                        self.undecided.add(i.at)
                        truth = text[0] == "!"
                    guard = truth if guard is None or guard is True else guard & truth
                taken = self.mask & np.broadcast_to(guard, self.mask.shape)
                stays = self.mask & ~taken
                nearby = self.code[number + 1].at if number + 1 < len(self.code) else -1
                if taken.any() and i.op != "EXIT":
                    target = int(np.max(self.value(i.operands[0]))) if i.op == "RET" else int(i.operands[-1], 16)
                    if stays.any():
                        group = taken, dict(self.registers), dict(self.predicates)
                        here = stays, self.registers, self.predicates
                        if target in waiting:
                            self._go_on(group, waiting[target])
                            group = self._group()
                        waiting[target] = group
                        self._go_on(here)
                        at = nearby
                    else:
                        at = target
                elif stays.any():
                    at, self.mask = nearby, stays
                elif not waiting:
                    return self
                else:
                    at = min(waiting)
                    self._go_on(waiting.pop(at))
                warps = self._warps_on()
                continue
            if guard is None:
                if i.op in ("LDG", "STG", "LDGSTS", "LDS", "STS"):
                    raise ValueError(f"a load or store hangs on unknown data: {i}")
                self.undecided.add(i.at)
            elif guard is not True and not (isinstance(guard, (bool, np.bool_)) and guard):
                mask = self.mask & np.broadcast_to(guard, self.mask.shape)
            if mask is None and self.parted:
                mask = self.mask
            step = self._steps[number]
            self.fresh = False
            if step is not None:
                step(mask)
            self._clock(i, warps)
            at = self.code[number + 1].at if number + 1 < len(self.code) else -1
        raise RuntimeError("the walk does not end")

    def _group(self) -> tuple[np.ndarray, dict, dict]:
        return self.mask, self.registers, self.predicates

    def _go_on(self, group: tuple[np.ndarray, dict, dict], other: tuple[np.ndarray, dict, dict] | None = None) -> None:
        """With the threads of a group that waited, joined with another's: what one of them does not know, both do not."""
        self.mask, *kept = group
        if other is not None:
            kept = [{name: ours if (ours := mine[name]) is (their := theirs.get(name)) else
                     None if ours is None or their is None else np.where(self.mask, ours, their) for name in mine}
                    for mine, theirs in zip(kept, other[1:], strict=True)]
            self.mask = self.mask | other[0]
        self.registers, self.predicates = kept

    def _warps_on(self) -> np.ndarray:
        self.parted = not self.mask.all()
        return self.mask.reshape(self.P, self.warps, 32).any(-1).sum(-1).astype(float)

    def _clock(self, i: Instruction, warps: np.ndarray) -> None:
        for board in i.waits:       # a program that is elsewhere waits for nothing new
            np.maximum(self.time, self.ready[board], out=self.time, where=warps > 0)
        if i.op == "LDGDEPBAR":
            self.groups.append(self.copies)
        elif i.op == "DEPBAR" and len(i.operands) > 1:
            left = int(i.operands[1], 16)
            for group in self.groups[: len(self.groups) - left]:
                np.maximum(self.time, group, out=self.time, where=warps > 0)
            self.groups = self.groups[len(self.groups) - left:]
        elif i.op == "BAR":
            self.time += np.where(warps > 0, LATENCY["barrier"], 0)
        if i.op == "LDGSTS":
            self.copies = np.maximum(self.copies, self.time + LATENCY["global" if self.fresh else "cached"])
        if i.sets < 7:
            kind = {"LDS": "shared", "LDSM": "shared", "SHFL": "shuffle", "MUFU": "special"}.get(i.op, "other")
            if i.op == "LDG":
                kind = "global" if self.fresh else "cached"
            self.ready[i.sets] = np.maximum(self.ready[i.sets], self.time + LATENCY[kind])
        if i.read < 7:
            self.ready[i.read] = np.maximum(self.ready[i.read], self.time + LATENCY["other"])
        self.time += np.where(warps > 0, i.stall, 0)
