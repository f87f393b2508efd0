"""A command that trains for a second or two, in this process or one of its own."""
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import exp_fork
from lab import desk

ROOT = Path(__file__).parents[1]
NARROW = ["--width", "32", "64"]
WIDE = ["--p", "11", "--seeds", "4", "--members", "0", "1", "--lr", "3e-3", "--backend", "eager", "--fork-steps", "100", "150"]
FLAGS = [*NARROW, *WIDE]
SHORT = [*FLAGS, "--budget", "200", "--parts", "same", "free"]


def committed(folder: Path) -> Path:
    """`folder` with the pages and runs of record as committed: whoever follows the README has runs of their own beside them."""
    names = ("README.md", "published.csv", "results")
    if (ROOT / ".git").exists():
        archive = subprocess.run(["git", "archive", "HEAD", *names], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
    else:
        for name in names[:2]:
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("checkpoint", "trajectories.csv", "*.pdf"))
    return folder


def start(out: Path, flags: list[str], save_every: float, first: str = "", **environment: str) -> subprocess.Popen:
    """A real training process, which begins with the statements `first`."""
    code = (f"from lab import desk, ensemble; import exp_fork, signal; ensemble.SAVE_SHARE, desk.SAVE_EVERY = 0.5, {save_every}; {first or 'pass'}; "
            "desk.main(exp_fork.run)")
    return subprocess.Popen([sys.executable, "-c", code, *flags, "--out", str(out)], cwd=ROOT, env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: callable, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str], out: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["exp_fork.py", *flags, "--out", str(out)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        desk.main(exp_fork.run)
    return end.value.code, *capsys.readouterr()


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("runs.csv", "cells.csv", "trajectories.csv")}
