"""What a script does before the imports that take seconds: closed streams lead nowhere, and what ends the imports says so in one line."""
import os
import signal
import sys
import tempfile

try:
    import resource
except ImportError:   # Windows
    resource = None

ROOM = 1400 << 20   # bytes of address space

def guard() -> None:
    """First statement of a script, until `console.end` takes over. Of this project and others it has imported nothing yet."""
    streams()
    home()
    room()
    os.environ["MPLBACKEND"] = "Agg"   # figures are files; another name, or a backend that is not installed, would end the import of matplotlib
    signal.signal(signal.SIGINT, interrupted)
    sys.excepthook = failed


def streams() -> None:
    """A closed stream becomes one that leads nowhere: else the next file that is opened takes its number, and gets what libraries print.
    What a stream's encoding does not have is printed as an escape."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8"))   # noqa: SIM115, as long as the process
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def home() -> None:
    """A user without a home, as in some containers, has the folder for temporary files: libraries keep settings and caches there."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = tempfile.gettempdir()
        os.environ.setdefault("USER", "nobody")


def room() -> None:
    """Refuses a limit on memory that the imports alone would reach: at some, OpenBLAS was seen to ask for memory without end."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else -1
    if 0 <= limit < ROOM:
        print(f"error: memory is limited to {limit >> 20} MB (ulimit -v), and the libraries alone map {ROOM >> 20} MB; allow more", file=sys.stderr,
              flush=True)
        os._exit(2)


def interrupted(*_: object) -> None:
    """Ctrl-C: an exception would come out of somebody's import, as an error of theirs."""
    os.write(2, b"stopped; nothing had begun\n")
    os._exit(130)


def failed(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """A library that cannot be loaded, in one line; anything else is a fault of this project and shown whole."""
    if not issubclass(kind, (ImportError, MemoryError, OSError)):
        return sys.__excepthook__(kind, error, trace)
    first = error
    while first.__cause__ or first.__context__:   # numpy wraps what happened in a page of advice
        first = first.__cause__ or first.__context__
    print(f"error: cannot start ({type(first).__name__}: {' '.join(str(first).split())}); is everything in requirements.txt installed, and is there "
          "memory for it (ulimit -v)?", file=sys.stderr, flush=True)
    os._exit(2)
