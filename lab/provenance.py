"""Where numbers come from: the code and command that made them, the machine, the steps and the time."""
import dataclasses
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import scipy
import torch

from common import Result
from lab import settings

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str | None:
    """What git says of this project's own repository; None if it fails, or if the project is no repository but a folder inside another one."""
    own = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}   # a hook's are of its repository

    def said(*line: str) -> str:
        return subprocess.run(["git", *line], cwd=ROOT, env=own, capture_output=True, text=True, errors="surrogateescape", timeout=10,
                              check=True).stdout.rstrip("\n")
    try:
        return said(*words) if os.path.samefile(said("rev-parse", "--show-toplevel"), ROOT) else None
    except (OSError, subprocess.SubprocessError):
        return None


def origin() -> dict:
    """The code and command that this process is. The commit is unknown, and `dirty` null, where git cannot say or does not have the script."""
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if not commit or changed is None or git("ls-files", "--error-unmatch", "--", os.path.realpath(sys.argv[0])) is None:
        commit, changed = "unknown", None
    return {
        "commit": commit, "dirty": None if changed is None else bool(changed),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *map(_without_machine, sys.argv[1:])]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
    }


def device_name(device: str) -> str:
    flags = sorted(w for w in _cpu_flags() if w.startswith(("avx2", "avx512f", "amx")))
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads, {' '.join(flags)}"


def of_training(config: settings.Machine, origin: dict, backends: list[str], result: Result) -> dict:
    """Where the numbers of `result` come from: `origin` as it was when the command began, for the tree may move on while it runs; how and on
    what they were computed."""
    return {
        **origin, "device": device_name(config.device),
        "backend": ", ".join(backends) or "none", "dtype": config.dtype, "arithmetic": config.arithmetic if config.device == "cuda" else "ieee",
        "training_seconds": round(result.seconds, 1), "run_steps": result.executed, "run_steps_needed": result.needed,
        "executed_over_needed": round(result.executed / max(result.needed, 1), 4),
        "run_steps_per_second": round(result.executed / max(result.seconds, 1e-9), 1),
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in settings.NOT_SCIENCE},
    }


def _without_machine(word: str) -> str:
    """A path outside this folder is told by its last part alone."""
    return Path(word).name if os.path.isabs(word) or os.pardir in Path(word).parts else word


def _cpu_flags() -> list[str]:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return []
