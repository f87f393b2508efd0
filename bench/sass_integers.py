"""What the instructions of sm_90 that touch no memory do to the registers of all threads at once, in integers."""
import re
from collections.abc import Callable

import numpy as np

from bench.sass import MASK, Instruction, Unknown, Value
from bench.sass_machine import Machine

TINY = ("1.469367938527859385e-39", "6.5827683646048100446e-37")    # bounds of slow paths below which only rare numbers lie
COMPARE: dict[str, Callable] = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal}


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


def inputs_of(table: int) -> list[bool]:
    """Which of its three inputs a function of bits, given as the truth table of LOP3, depends on."""
    return [any((table >> m & 1) != (table >> (m ^ bit) & 1) for m in range(8)) for bit in (4, 2, 1)]


def compare(name: str, a: object, b: object) -> np.ndarray:
    """`GEU` and the like are true of what is not a number, which no number here is."""
    return COMPARE[name[:2]](a, b)


class Integers(Machine):
    """A method for each instruction, by its name; `mask (programs, threads)`: the threads that are on, None: all."""

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
            raise Unknown(f"register {args[1]} is not known to the walk")
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
            raise Unknown("an IMAD with a carry out is not known to the walk")
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
        values = [value if used else 0 for value, used in zip((a, b, c), inputs_of(table), strict=True)]
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
            uses = inputs_of(table)
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
