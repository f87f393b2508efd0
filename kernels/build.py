"""Compiles a C++ source of this folder for one set of constants, tries it, keeps it, loads it.

Objects are keyed by source and headers, constants, compiler with its version, flags and the model of the CPU, because `-march=native` binds them to
one. They lie in `$XDG_CACHE_HOME/grokking-lab` or `~/.cache/grokking-lab`; where that cannot be written or loaded from, in a folder of
this process. A new object is written under a name of its own, tried, and only then moved to its place: two processes may race, and one
that fails leaves nothing behind.
"""
import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COMPILERS = ("g++", "clang++", "c++")
PATIENCE = 120         # seconds that a compiler may take
TRIAL_PATIENCE = 20    # seconds that a trial may take
X86 = ("x86_64", "AMD64", "i686")
# No -ffast-math: it would flush denormal numbers in the whole process. The two -fno flags let square roots and selections be vectors.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared",
         *(("-march=native", "-mprefer-vector-width=512") if platform.machine() in X86 else ("-mcpu=native",)))


class BuildError(Exception):
    """No compiler here makes a step that agrees with the definition; the text says why, in one line."""


class _Unusable(Exception):
    """Another folder would not help."""


def compilers() -> list[str]:
    return [path for path in map(shutil.which, COMPILERS) if path]


@functools.cache
def cpu_model() -> str:
    """What `-march=native` looks at: the lines of /proc/cpuinfo that name a model and its instructions."""
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer", "CPU part")
    lines = []
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines = [line for line in first.splitlines() if line.split(":")[0].strip() in names]
    return "\n".join([platform.machine(), platform.processor(), *lines])


def cpu_name() -> str:
    """As a person calls it, for records."""
    named = [line for line in cpu_model().splitlines() if line.startswith("model name")]
    return named[0].split(":", 1)[1].strip() if named else platform.machine()


@functools.cache
def version(compiler: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE).stdout
    return ""


@functools.cache
def own_folder() -> Path:
    """A folder of this process, gone when it ends."""
    folder = tempfile.mkdtemp(prefix="grokking-lab-")
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return Path(folder)


def folders() -> Iterator[Path]:
    """Where objects may be kept, best first."""
    with contextlib.suppress(OSError, RuntimeError):   # RuntimeError: no HOME and no entry in the table of users
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if root.is_absolute():
            folder = root / "grokking-lab"
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
    with contextlib.suppress(OSError):
        yield own_folder()


def survives(call: Callable[[], object]) -> bool:
    """Whether `call` comes back in a copy of this process: code that faults must not take the laboratory with it. The copy has no other
    threads, so `call` may start none and wait for none."""
    if not hasattr(os, "fork"):
        return True
    child = os.fork()
    if child == 0:
        try:
            for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGSEGV", "SIGILL", "SIGBUS", "SIGFPE"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            signal.alarm(TRIAL_PATIENCE)
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def load(source: Path, constants: dict[str, object], trial: Callable[[ctypes.CDLL], Any], verdict: Callable[[Any], str]) -> ctypes.CDLL:
    """The library of `source` compiled with `constants` as macros. A new one is tried first: `verdict(trial(library))` says in a few words what
    is wrong with it, or nothing. Raises BuildError."""
    trouble: dict[str, str] = {}
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    for compiler in compilers():
        command = [compiler, *FLAGS, *(f"-D{name}={value}" for name, value in constants.items())]
        key = hashlib.sha256("\0".join([*command, version(compiler), cpu_model(), *texts]).encode()).hexdigest()[:32]
        for folder in folders():
            kept = folder / f"{source.stem}-{key}.so"
            try:
                return ctypes.CDLL(str(kept))
            except OSError:
                try:
                    return _compile(command, source, kept, trial, verdict)
                except _Unusable as error:
                    trouble[Path(compiler).name] = str(error)
                    break
                except (OSError, BuildError) as error:       # the folder may be full, or forbid execution
                    trouble[Path(compiler).name] = str(error)
    raise BuildError("; ".join(f"{name}: {why}" for name, why in trouble.items()) or "no C++ compiler on the PATH")


def _compile(command: list[str], source: Path, kept: Path, trial: Callable, verdict: Callable) -> ctypes.CDLL:
    """The library, moved to `kept`. Raises BuildError, OSError or _Unusable."""
    fresh = kept.with_name(f"{kept.stem}.{os.getpid()}.{time.monotonic_ns()}.so")
    try:
        done = subprocess.run([*command, str(source), "-o", str(fresh)], capture_output=True, text=True, errors="replace", timeout=PATIENCE)
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines()]
            said = [line for line in said if "error" in line.lower()] + said
            raise BuildError(f"ended with code {done.returncode}" + (f" ({said[0]})" if said else ""))
        library = ctypes.CDLL(str(fresh))
        if not survives(lambda: trial(library)):
            raise _Unusable("its code crashes")
        if wrong := verdict(trial(library)):
            raise _Unusable(wrong)
        os.replace(fresh, kept)
        return library
    except subprocess.TimeoutExpired:
        raise _Unusable(f"still busy after {PATIENCE} s") from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
