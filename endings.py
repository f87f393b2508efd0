"""How a process ends: bad input and full disks in one line, signals with a checkpoint, a reader who goes away in silence.

Exit codes: 0 done, 2 an error said in one line on stderr, 130 after Ctrl-C, 143 SIGTERM, 138 SIGUSR1 (Slurm, before a job's time is up), 129 a
hangup, 141 nobody reads stdout any more.
"""
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

import early
from common import UsageError

HANGUP, USER = getattr(signal, "SIGHUP", None), getattr(signal, "SIGUSR1", None)   # Windows has none
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, HANGUP, USER) if number}   # exit codes
NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "start new thread")   # of torch, CUDA and Python
CLOSED = 141                               # as shells have it for SIGPIPE


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
