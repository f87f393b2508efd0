"""How a command begins and what it may meet at once: closed streams, names that cannot be printed, Ctrl-C and no memory while it imports."""
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab import console

ROOT = Path(__file__).parents[1]
SCRIPTS = [[path.name] for path in sorted(ROOT.glob("exp_*.py"))] + [["-m", "lab.report"], ["bench/bench_step.py"], ["bench/gpu_evidence.py"]]


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def importing(tmp_path: Path, script: list[str], numpy: str) -> subprocess.CompletedProcess:
    """`script` where the first `import numpy` does `numpy`."""
    (tmp_path / "numpy.py").write_text(numpy)
    return subprocess.run([sys.executable, *script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
                          check=False, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda words: words[-1])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path, script: list[str]) -> None:
    done = importing(tmp_path, script, "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; nothing had begun\n")


@pytest.mark.parametrize("numpy, code, lines", [
    ("try:\n    raise ImportError('x.so: failed to map segment')\nexcept ImportError as e:\n    raise ImportError('a\\npage') from e", 2, 1),
    ("raise MemoryError", 2, 1), ("1 / 0", 1, 5)])
def test_a_library_that_cannot_be_loaded_is_one_line_and_a_fault_of_ours_is_shown(tmp_path: Path, numpy: str, code: int, lines: int) -> None:
    done = importing(tmp_path, ["exp_fork.py"], numpy)
    assert done.returncode == code and done.stdout == "" and done.stderr.count("\n") >= lines and (code == 1 or done.stderr.count("\n") == 1)
    assert "error: cannot start (" in done.stderr if code == 2 else "ZeroDivisionError" in done.stderr
    assert "failed to map segment" in done.stderr or "map" not in numpy


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes streams")
@pytest.mark.parametrize("flags, code", [("--dry-run", 0), ("--rho 0", 2)])
def test_closed_streams_cost_nothing_and_are_taken_by_no_file(tmp_path: Path, flags: str, code: int) -> None:
    """Number 2 of a process without stderr would be the next file opened: a table or checkpoint, which libraries then print into."""
    probe = "import os, sys\nfrom lab import early\nearly.guard()\nopen(sys.argv[1], 'w').write(os.readlink('/proc/self/fd/2'))"
    (tmp_path / "probe.py").write_text(probe)
    if Path("/proc/self/fd").exists():
        subprocess.run(f"{sys.executable!r} {tmp_path / 'probe.py'} {tmp_path / 'second'} 2>&-", shell=True, check=True,
                       env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert (tmp_path / "second").read_text() == "/dev/null"
    done = subprocess.run(f"{sys.executable!r} exp_fork.py {flags} --out '{tmp_path}/out' 2>&-", shell=True, cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == code and ("error" in done.stdout, done.stderr) == (False, "") and not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_a_limit_that_the_libraries_alone_reach_is_one_line() -> None:
    done = subprocess.run("ulimit -v 900000; exec " + f"{sys.executable!r} exp_fork.py", shell=True, cwd=ROOT, capture_output=True, text=True,
                          check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "", "error: memory is limited to 878 MB (ulimit -v), and the libraries alone map 1400 MB; allow more\n")


def test_a_user_without_a_home_goes_on(tmp_path: Path) -> None:
    """HOME unset and no entry in the password file, as in a container with a user number of its own, and a backend for figures that is not there."""
    code = ("import os, pwd, runpy, sys\n[os.environ.pop(k, None) for k in ('HOME', 'USER', 'LOGNAME', 'MPLCONFIGDIR', 'XDG_CONFIG_HOME')]\n"
            "def none(*_): raise KeyError\npwd.getpwuid = pwd.getpwnam = none\nsys.path.insert(0, '.')\n"
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, "exp_fork.py", "--dry-run", "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True,
                          text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path), "MPLBACKEND": "none"})
    assert (done.returncode, done.stderr) == (0, "") and "cells" in done.stdout


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folder names, one beyond the stream's encoding and one that is not UTF-8."""
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, "ascii"))
    with pytest.raises(SystemExit) as done:
        console.end(lambda: print("results in \xfc and caf\udce9"))
    assert done.value.code == 0 and said.getvalue() == b"results in \\xfc and caf\\udce9\n"


@pytest.mark.parametrize("work", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)], ids=["of torch", "of Python"])
def test_no_memory_is_one_line(work: callable, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        console.end(work)
    errors = capsys.readouterr().err
    assert done.value.code == 2 and errors.startswith("error: out of memory; ") and errors.count("\n") == 1


def test_another_error_of_torch_is_a_fault_and_shown() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        console.end(lambda: torch.ones(2) + torch.ones(3))
