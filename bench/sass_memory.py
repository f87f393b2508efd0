"""What the loads and stores of a walk touch: sectors and lines of memory, wavefronts and bank conflicts of shared memory.

An address that is unknown or outside of its tensor is an error: nothing is guessed.
"""
import re

import numpy as np

from bench.sass import BASE, LINE, SECTOR, Instruction, Unknown, Value, consecutive, wavefronts
from bench.sass_integers import Integers, both


class Memory(Integers):
    """A machine whose threads load and store; counts are kept by instruction and program."""

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
                raise Unknown(f"address {text} hangs on floats")
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

    @staticmethod
    def _stored(name: str, size: int) -> tuple[str, ...]:
        """Registers that a store of `size` bytes from `name` on reads; RZ is 0 in every word."""
        words = max(1, size // 4)
        return consecutive(name, words) or (name,) * words

    def _lds(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        if args[0] == "RZ":
            return
        size, on, address = self._size(mods), self._on(mask), self._address(args[1])
        self._count_shared(i, address, on, size)
        if not self.known_shared:
            return self.forget(args[0], max(1, size // 4))
        offset = (address & 0xFFFFFF) // 4
        for word, register in enumerate(consecutive(args[0], max(1, size // 4))):
            found = self.shared[np.arange(self.P)[:, None], np.minimum(offset + word, self.shared.shape[1] - 1)]
            if size < 4:
                found = np.where(found < 0, found, found >> 8 * (address & 3) & ((1 << 8 * size) - 1))
            self.put(register, None if (found[on] < 0).any() else found, mask)

    def _sts(self, args: tuple, mods: set, mask: object, i: Instruction) -> None:
        size, on, address = self._size(mods), self._on(mask), self._address(args[0])
        self._count_shared(i, address, on, size)
        values = [self.value(name) for name in self._stored(args[1], size)]
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
        for word, register in enumerate(self._stored(name, 4 * words)):
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
        for word, register in enumerate(consecutive(dest, max(1, size // 4))):
            found = self.tensors.read(address[on] + 4 * word, min(size, 4))
            if found is None:
                return self.forget(dest, max(1, size // 4))
            value = np.zeros(on.shape, np.int64)
            value[on] = found
            self.put(register, value, on if mask is not None else None)

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
