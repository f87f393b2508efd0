"""Walks the machine code of a kernel (sm_90) without a GPU: which instructions its warps issue, and which memory they touch.

All threads of the chosen programs go through the code together, in integers: addresses, loop counters, predicates and all that is loaded from
tensors of integers have their values, so loops turn as often as they would and every access has its addresses. What comes from a tensor of
floats is unknown (None), and so is all that is computed of it; of at most SMALL floats, the scalars of a step, values and comparisons are
known. A branch that hangs on an unknown predicate is not taken: it is the slow path of a division or a root, whose numbers are rare, and such
a path asks last whether a number is above one of TINY. An address that is unknown or outside of its tensor is an error: nothing is guessed.

Threads that part meet again, since those at the lowest address go first. Every instruction also carries what the assembler wrote for the hardware:
how many cycles until the next may issue, and which outstanding results to wait for; with `LATENCY` that makes the time of a program that is alone.
"""
import re

import numpy as np

from bench.sass import Instruction, Unknown
from bench.sass_memory import Memory

# Cycles from issue until a result may be read, where the code waits for it by a scoreboard: published microbenchmarks of Hopper, rounded
LATENCY = {"shared": 29, "cached": 40, "global": 270, "special": 20, "shuffle": 24, "barrier": 20, "other": 20}


class Walk(Memory):
    """`run` takes all threads of all programs through the code."""

    def run(self, most: int = 20_000_000) -> "Walk":
        """Until all have left. Raises Unknown after `most` instructions."""
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
                    raise Unknown(f"{i.op} at {i.at:#x} hangs on floats")
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
        raise Unknown(f"the walk does not end in {most} instructions")

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
