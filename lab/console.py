"""The command line's side of a run: the estimate before it, the bar or a line now and then during it, signals, and how the process ends.

Exit codes: 0 done, 2 an error said in one line on stderr, 130 after Ctrl-C, 143 SIGTERM, 138 SIGUSR1 (Slurm, before a job's time is up), 129 a
hangup, 141 nobody reads stdout any more.
"""
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TextIO

import torch
from tqdm import tqdm

from common import Cell, UsageError
from lab import early, gpu_time, settings
from lab.ensemble import Ensemble

SPEAK_EVERY = 30   # seconds between lines of progress where there is no terminal
HANGUP, USER = getattr(signal, "SIGHUP", None), getattr(signal, "SIGUSR1", None)   # Windows has none
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, HANGUP, USER) if number}   # exit codes
NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "start new thread")   # of torch, CUDA and Python
CLOSED = 141                               # as shells have it for SIGPIPE


# ---------------------------------------------------------------- while it runs

class Progress:
    """Bar on a terminal; elsewhere a plain line now and then. Time left comes from the cells' expected steps."""

    def __init__(self, stage: str, runs: int, expected: int):
        self.stage, self.runs, self.started = stage, runs, time.monotonic()
        self.spoken, self.first = self.started, None
        self.bar = tqdm(total=expected, desc=stage, unit=" run-steps", unit_scale=True, disable=None, leave=False)

    def __call__(self, ensemble: Ensemble) -> None:
        if Signals.caught is not None:
            Signals.leave(Signals.caught)
        try:
            self.speak(ensemble)
        except BrokenPipeError:   # nobody reads on (`| head`): stop here, where the state is whole
            raise SystemExit(CLOSED) from None

    def speak(self, ensemble: Ensemble) -> None:
        done, now = ensemble.executed, time.monotonic()
        if self.first is None:
            self.first = done
        finished = len(ensemble.step) - len(ensemble.live())
        if not self.bar.disable:
            self.bar.total = done + ensemble.steps_left()
            self.bar.set_postfix_str(f"{finished}/{self.runs} runs finished", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.spoken > SPEAK_EVERY:
            self.spoken = now
            rate = (done - self.first) / (now - self.started)
            left = f"{rate:.0f} run-steps/s, about {duration(ensemble.steps_left() / rate)} left" if rate else "no estimate yet"
            print(f"{self.stage}: {finished}/{self.runs} runs finished, {left}", flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):   # a terminal that is gone must not hide why training ended
            self.bar.close()


def announce(config: settings.Machine, cells: list[Cell]) -> None:
    """What will run and about how long it takes, before anything does; every cell with --dry-run."""
    runs = sum(len(cell.members) for cell in cells)
    steps = sum(min(cell.expected_steps or cell.budget_steps, cell.budget_steps) * len(cell.members) for cell in cells)
    if config.device == "cuda":
        seconds, precision = gpu_time.seconds(cells, config.arithmetic, config.dtype), "at least"
    else:
        # seconds of a step at p=59, or of 1000 examples, of float64 over float32, the power of p it grows with: the MLP's as seen at p=59, 97, 113
        per_step, float64, growth = {"mlp": (1.9e-3, 2.2, 2.65), "mlp_dense": (2e-3, 2.2, 1)}.get(cells[0].model, (15e-3, 3, 2.75))
        per_step *= (float64 if config.dtype == "float64" else 1) / max(torch.get_num_threads(), 1)      # a worker a core
        size = lambda c: max((c.p / 59 if c.p else c.n_train / 1000) ** growth, 0.1)  # noqa: E731
        seconds = sum(min(c.expected_steps or c.budget_steps, c.budget_steps) * len(c.members) * per_step * size(c) for c in cells)
        precision = "about"
    if config.dry_run:
        for c in cells:
            print(f"{c.name}: {len(c.members)} members of a block of {c.block}, budget {c.budget_steps} steps, expected {c.expected_steps}")
    for p in dict.fromkeys(c.p for c in cells if c.task == "add"):
        if any(p % q == 0 for q in range(2, math.isqrt(p) + 1)):
            print(f"note: p={p} is not prime; addition modulo p is defined for every p, but the papers have only primes")
    preset = f"preset {config.preset} " if hasattr(config, "preset") else ""
    print(f"{preset}on {config.device}, {config.dtype}: {len(cells)} cells, {runs} runs, about {steps / 1e6:.2g} million run-steps, "
          f"{precision} {duration(seconds)} of training", flush=True)


def say_norms(controls: list[Cell], w_c: dict[str, float | dict[str, float]]) -> None:
    """The critical norm of each free cell, or its norms by group of weights (the total under ""), or that it has none."""
    for cell in controls:
        norms = w_c.get(cell.name)
        if norms is None:
            print(f"{cell.name}: no member grokked within {cell.budget_steps} steps: no W_c, so the cells held relative to it are not run")
        elif isinstance(norms, float):
            print(f"{cell.name}: W_c = {norms:.2f}")
        else:
            print(f"{cell.name}: W_c = {norms['']:.2f}; by group " + ", ".join(f"{group} {norm:.2f}" for group, norm in norms.items() if group))


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- signals, and the end

class Signals:
    """Ctrl-C, SIGTERM, SIGUSR1 and a hangup while training wait for the next tick, where the state is whole; a second one is not waited for."""
    waiting = False
    caught: int | None = None

    @classmethod
    def listen(cls) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, USER):
            if number:
                signal.signal(number, cls.handle)
        if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:   # under nohup a hangup does not matter
            signal.signal(HANGUP, cls.handle)

    @classmethod
    def handle(cls, number: int, _: object) -> None:
        first, cls.caught = cls.caught is None, number
        if not (cls.waiting if first else number == HANGUP):   # a terminal that closes says so more than once
            cls.leave(number)

    @classmethod
    def leave(cls, number: int) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def end(work: Callable[[], None]) -> None:
    """Do `work` and end the process."""
    early.streams()
    Signals.listen()
    sys.excepthook = sys.__excepthook__
    code, why = 0, ""
    try:
        work()
    except UsageError as error:
        code, why = 2, " ".join(["error:", *str(error).split()])   # one line, whatever was typed
    except BrokenPipeError:
        code = CLOSED
    except OSError as error:   # disk full, folder gone: files are written whole, so what was there is intact
        code, why = 2, (f"error: {error.strerror or error}: {error.filename or 'a file'}; nothing is left half-written, mend this "
                        "(disk full? folder gone?) and the same command continues")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY)):
            raise
        code, why = 2, ("error: out of memory; allow more (ulimit -v, --mem) or train fewer --members at a time, and the same command continues "
                        f"({' '.join(str(error).split())[:200] or type(error).__name__})")
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:
        code = leaving.code
    if code in STOPPED:
        why = "stopped; the same command continues from here"
    if why:
        with contextlib.suppress(OSError):
            print(why, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if not delivered(stream):
            code = code or CLOSED
    sys.exit(code)


def delivered(stream: TextIO | None) -> bool:
    """Whether what was printed to `stream` has arrived. If not it leads nowhere from now on, so that Python can end without complaint."""
    try:
        if stream:
            stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True
