"""The desk around the bench: settings and command line, the output folder, checkpoints, progress, provenance.

An experiment subclasses `Config`, lists its presets, and is run by `main`. Nothing is written before every setting has been checked.
"""
import argparse
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy
import torch
from tqdm import tqdm

import files
from common import EVAL_EVERY, MODELS, Cell, Ensemble, Result, State, UsageError, n_train
from kernels.cpu import has_compiler

ROOT = Path(__file__).resolve().parent


def option(default: object, text: str, kind: type = str) -> object:
    """A setting that the command line offers, with its help text; `kind` of the values where the default is an empty tuple."""
    return field(default=default, metadata={"help": text, "kind": kind})


@dataclass(frozen=True)
class Machine:
    """Where and how to compute, and where to write: what every command takes."""
    members: tuple[int, ...] = option((), "members of the block to train; default: all, or the preset's choice", int)
    device: str = option("auto", "auto, cpu or cuda")
    backend: str = option("auto", "auto, compiled or eager (the definition on a CPU, through torch.compile or not) or triton (CUDA)")
    dtype: str = option("float32", "float32 or float64")
    arithmetic: str = option("ieee", "matrix products in float32 on CUDA: ieee or tf32x3")
    out: str = option("", "output folder; default: results/EXPERIMENT/PRESET, with the changed flags in its name")
    resume: bool = option(False, "continue from OUT/checkpoint; the same command does so by itself when one is there")
    dry_run: bool = option(False, "print the cells and the estimate, train nothing")
    figures_only: bool = option(False, "draw the figures and tables again from OUT/runs.csv, train nothing")


@dataclass(frozen=True)
class Config(Machine):
    """What the experiments share besides. A tuple takes several values on the command line."""
    preset: str = option("", "smoke (seconds), laptop (minutes on 2 cores) or paper (the papers' tables); default: paper on CUDA, else laptop")
    p: tuple[int, ...] = option((59,), "moduli; any p >= 2 works, the papers use primes")
    seeds: int = option(16, "block size: members drawn from one generator; member 3 of 12 is not member 3 of 8")
    seed0: int = option(0, "first seed: weights use seed0, the split of member s uses 1000 + seed0 + s")
    parts: tuple[str, ...] = option((), "parts of the experiment to run")
    model: str = option("mlp", "mlp, transformer, transformer_ln (with LayerNorm) or transformer_b (as in paper B's released runs); "
                        "learning rates default to the model's")
    after_grok: int = option(0, "steps to train a cell on past its last member's grokking")


NOT_SCIENCE = ("out", "resume", "dry_run", "figures_only", "metrics_dir", "twin_of")   # settings that change no number
CHOICES = {"device": ("auto", "cpu", "cuda"), "backend": ("auto", "compiled", "eager", "triton"), "dtype": ("float32", "float64"),
           "arithmetic": ("ieee", "tf32x3"), "model": tuple(MODELS)}
POSITIVE = ("rhos", "lrs", "lr", "taus", "rho", "fork_steps", "budget", "train_fracs")

LARGEST = {"rhos": 100, "rho": 100, "taus": 1e6, "weight_decays": 1e6}   # far past anything that trains


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


def parse(cls: type, presets: dict[str, dict], parts: tuple[str, ...], argv: list[str]) -> tuple[Machine, dict]:
    """Settings of `cls` from preset and flags, checked, and the flags that were given. Raises UsageError."""
    parser = Parser(description=sys.modules[cls.__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        flag = "--" + f.name.replace("_", "-")
        if f.metadata["kind"] == "positional":
            parser.add_argument(f.name, help=f.metadata["help"])
        elif f.type in (bool, "bool"):
            parser.add_argument(flag, action="store_true", default=None, help=f.metadata["help"])
        else:
            many = isinstance(f.default, tuple)
            kind = type(f.default[0]) if many and f.default else f.metadata["kind"] if many else type(f.default)
            parser.add_argument(flag, type=kind, nargs="+" if many else None, default=None, help=f.metadata["help"])
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    for name, allowed in {**CHOICES, "preset": tuple(presets)}.items():
        if name in given and given[name] not in allowed:
            raise UsageError(f"--{name} must be one of {', '.join(allowed)}, got {given[name]!r}")
    device = given.get("device", "auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu")
    model = given.get("model", "mlp")
    if device == "cuda" and model != "mlp":
        raise UsageError(f"--model {model} has no CUDA kernels yet; use --device cpu")
    if device == "auto" and model != "mlp":
        device = "cpu"
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() and given.get("backend", "auto") in ("auto", "triton") else "cpu"
    if (given.get("backend") == "triton") != (device == "cuda") and given.get("backend", "auto") != "auto":
        raise UsageError(f"--backend {given['backend']} does not run on --device {device}; triton needs cuda, compiled and eager need cpu")
    if given.get("backend") == "compiled" and not has_compiler():
        raise UsageError("--backend compiled needs a C++ compiler (g++ or clang++) on the PATH; use --backend eager")
    settings = {**given, "device": device}
    if presets:
        preset = given.get("preset", "paper" if device == "cuda" else "laptop")
        settings = {"parts": parts, **presets[preset], **settings, "preset": preset}
    if model != "mlp":   # a preset's learning rates are those of the MLP
        rates = {"lr": MODELS[model], "lrs": (MODELS[model],)}
        settings |= {f.name: rates[f.name] for f in dataclasses.fields(cls) if f.name in rates and f.name not in given}
    config = cls(**settings)
    check(config)
    if presets:
        check_grid(config, parts)
    return config, given


def check(config: Machine) -> None:
    """Every value possible by itself, or UsageError naming the flag, the value and what would do."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, tuple) and len(set(value)) != len(value):
            raise UsageError(f"--{f.name.replace('_', '-')} lists a value twice: {' '.join(map(str, value))}")
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, float) and not math.isfinite(v):
                raise UsageError(f"--{f.name.replace('_', '-')} must be finite, got {v}")
            if f.name == "members" and v < 0:
                raise UsageError(f"--members are numbered from 0, got {v}")
            if f.name in LARGEST and v > LARGEST[f.name]:
                raise UsageError(f"--{f.name.replace('_', '-')} must be at most {LARGEST[f.name]:g}, got {v:g}")
            if f.name in POSITIVE and v <= 0:
                raise UsageError(f"--{f.name.replace('_', '-')} must be > 0, got {v:g}")
            if f.name == "train_fracs" and v >= 1:
                raise UsageError(f"--train-fracs must be below 1, got {v:g}: some pairs must be left to test on")
            if f.name == "weight_decays" and v < 0:
                raise UsageError(f"--weight-decays must be >= 0, got {v:g}")
    if config.arithmetic == "tf32x3" and config.device != "cuda":
        raise UsageError("--arithmetic tf32x3 is a mode of the CUDA kernels; use ieee on a CPU")


def check_grid(config: Config, parts: tuple[str, ...]) -> None:
    """Values that must fit each other, or UsageError."""
    for p in (*config.p, *getattr(config, "moduli", ()), *getattr(config, "free_moduli", ()), *getattr(config, "group_moduli", ())):
        if not 2 <= p <= 1000:
            raise UsageError(f"--p must be between 2 and 1000, got {p}")
        for fraction in getattr(config, "train_fracs", ()) or (0.4,):
            if not 1 <= n_train(p, fraction) < p * p:
                raise UsageError(f"--p {p} with train fraction {fraction:g} leaves no training pair; use a larger p or fraction")
    for name in ("seeds", "moduli_seeds", "free_seeds"):
        if not 1 <= getattr(config, name, 1) <= 10_000:
            raise UsageError(f"--{name.replace('_', '-')} must be between 1 and 10000, got {getattr(config, name)}")
    if not 0 <= config.seed0 < 2**31:
        raise UsageError(f"--seed0 must be between 0 and 2147483647, got {config.seed0}")
    for m in config.members:
        if not 0 <= m < config.seeds:
            raise UsageError(f"--members must lie in the block 0..{config.seeds - 1} (--seeds {config.seeds}), got {m}")
    for part in config.parts:
        if part not in parts:
            raise UsageError(f"--parts must be among {' '.join(parts)}, got {part!r}")
    if config.after_grok % EVAL_EVERY or (config.after_grok and config.after_grok < 200) or config.after_grok < 0:
        raise UsageError(f"--after-grok must be 0 or a multiple of {EVAL_EVERY} of at least 200 steps, got {config.after_grok}")


# ---------------------------------------------------------------- provenance

def git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def provenance(desk: "Lab", result: Result) -> dict:
    """Where the numbers come from. The commit is that of the start: the tree may move on while a long command runs."""
    config = desk.config
    flags = sorted(w for w in _cpu_flags() if w.startswith(("avx2", "avx512f", "amx")))
    return {
        "commit": desk.commit, "dirty": desk.dirty,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *(Path(w).name if os.sep in w else w for w in sys.argv[1:])]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "device": torch.cuda.get_device_name() if config.device == "cuda" else f"cpu, {torch.get_num_threads()} threads, {' '.join(flags)}",
        "backend": desk.backend, "dtype": config.dtype, "arithmetic": config.arithmetic if config.device == "cuda" else "ieee",
        "training_seconds": round(result.seconds, 1), "run_steps": result.executed, "run_steps_needed": result.needed,
        "executed_over_needed": round(result.executed / max(result.needed, 1), 4),
        "run_steps_per_second": round(result.executed / max(result.seconds, 1e-9), 1),
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SCIENCE},
    }


def _cpu_flags() -> list[str]:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return []


# ---------------------------------------------------------------- training with progress, checkpoints, resume

class Progress:
    """Bar on a terminal; elsewhere a plain line every 30 seconds. Time left comes from the cells' expected steps."""

    def __init__(self, stage: str, runs: int, expected: int):
        self.stage, self.runs, self.started = stage, runs, time.monotonic()
        self.spoken, self.first = self.started, None
        self.bar = tqdm(total=expected, desc=stage, unit=" run-steps", unit_scale=True, disable=None, leave=False)

    def __call__(self, ensemble: Ensemble) -> None:
        if Signals.caught is not None:
            Signals.leave(Signals.caught)
        done, now = ensemble.executed, time.monotonic()
        if self.first is None:
            self.first = done
        finished = len(ensemble.step) - len(ensemble.live())
        if not self.bar.disable:
            self.bar.total = done + ensemble.steps_left()
            self.bar.set_postfix_str(f"{finished}/{self.runs} runs finished", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.spoken > 30:
            self.spoken = now
            rate = (done - self.first) / (now - self.started)
            left = ensemble.steps_left() / max(rate, 1e-9)
            print(f"{self.stage}: {finished}/{self.runs} runs finished, {rate:.0f} run-steps/s, about {duration(left)} left", flush=True)


def announce(config: Machine, cells: list[Cell]) -> None:
    """What will run and about how long it takes, before anything does; every cell with --dry-run."""
    runs = sum(len(cell.members) for cell in cells)
    steps = sum(min(cell.expected_steps or cell.budget_steps, cell.budget_steps) * len(cell.members) for cell in cells)
    per_step = 5e-6 if config.device == "cuda" else 3.5e-3 / max(torch.get_num_threads(), 1) * (3 if config.dtype == "float64" else 1)
    per_step *= 1 if cells[0].model == "mlp" else 3
    growth = 2 if config.device == "cuda" else 2.75   # of a step's time with p; on a CPU p=113 was seen to cost 6 times p=59: it leaves the cache
    seconds = sum(min(c.expected_steps or c.budget_steps, c.budget_steps) * len(c.members) * per_step * (c.p / 59) ** growth for c in cells)
    if config.dry_run:
        for c in cells:
            print(f"{c.name}: {len(c.members)} members of a block of {c.block}, budget {c.budget_steps} steps, expected {c.expected_steps}")
    for p in dict.fromkeys(c.p for c in cells):
        if any(p % q == 0 for q in range(2, math.isqrt(p) + 1)):
            print(f"note: p={p} is not prime; addition modulo p is defined for every p, but the papers have only primes")
    preset = f"preset {config.preset} " if hasattr(config, "preset") else ""
    print(f"{preset}on {config.device}, {config.dtype}: {len(cells)} cells, {runs} runs, about {steps / 1e6:.2g} million run-steps, "
          f"about {duration(seconds)} of training", flush=True)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Lab:
    """The output folder of one run of an experiment: its settings, its checkpoints, its results."""

    def __init__(self, experiment: str, config: Machine, given: dict, presets: dict[str, dict]):
        self.experiment, self.config = experiment, config
        preset = getattr(config, "preset", "all")
        changed = [f"{k}{'_'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in sorted(given.items())
                   if k not in (*NOT_SCIENCE, "preset", "device") and presets.get(preset, {}).get(k, getattr(type(config), k, None)) != v]
        folder = re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join([preset, *changed]))[:120]
        self.out = Path(config.out) if config.out else ROOT / "results" / experiment / folder
        self.checkpoint = self.out / "checkpoint"
        self.backend, self.said = "none", set()
        self.commit, self.dirty = git("rev-parse", "HEAD") or "unknown", bool(git("status", "--porcelain", "--untracked-files=no"))
        self.created: list[Path] = []     # folders that `open` had to make, innermost first
        wanted = json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SCIENCE}))
        self.settings = {"experiment": experiment, **wanted}
        defaults = json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}))
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file; name a folder")
        try:
            held = dict(json.loads((self.out / "config.json").read_text()))
        except FileNotFoundError:
            if self.out.exists() and any(self.out.iterdir()):
                raise UsageError(f"--out {self.out} exists and is no results folder; name a new or empty folder") from None
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"cannot read {self.out / 'config.json'} ({error}); choose another --out") from None
        else:
            for key in dict.fromkeys([*self.settings, *held]):
                theirs, ours = held.get(key, defaults.get(key)), self.settings.get(key)   # a setting newer than the folder had its default
                if theirs != ours:
                    raise UsageError(f"--out {self.out} holds another configuration: {key} is {theirs}, this command has {ours}; "
                                     "choose another --out")
        if config.resume and not self.checkpoint.is_dir():
            raise UsageError(f"--resume: no checkpoint in {self.out}; run without --resume to start")

    def say(self, text: str) -> None:
        """Print `text` unless it has been said."""
        if text not in self.said:
            self.said.add(text)
            print(text, flush=True)

    def open(self) -> None:
        """Create the folder. A checkpoint found in it is announced."""
        self.created = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            files.write_json(self.out / "config.json", self.settings)           # first: a folder without it is refused
            self.checkpoint.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.out}: {error.strerror}; choose another --out") from None
        if any(self.checkpoint.iterdir()):
            print(f"continuing from {self.checkpoint}")

    def train(self, stage: str, cells: list[Cell], start: State | None = None, keep_state: bool = False) -> Result:
        """Train `cells`, one ensemble per shape; finished stages and snapshots in OUT/checkpoint are taken up."""
        groups: dict[tuple, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.ensemble_key(), []).append(cell)
        results = [self._train_group(f"{stage}-{i}" if len(groups) > 1 else stage, group, start, keep_state)
                   for i, group in enumerate(groups.values())]
        return sum(results[1:], results[0]) if results else Result()

    def _train_group(self, stage: str, cells: list[Cell], start: State | None, keep_state: bool) -> Result:
        done, partial = self.checkpoint / f"{stage}.done.pt", self.checkpoint / f"{stage}.pt"
        c = self.config
        if c.device == "cpu" and c.backend == "auto":
            self.say("the step is compiled on first use, up to a minute per modulus" if has_compiler() else
                     "no C++ compiler on the PATH: the step runs eagerly, about 3 times slower")
        ensemble = Ensemble(cells, c.device, c.backend, getattr(torch, cells[0].dtype or c.dtype), c.arithmetic, start)
        self.backend = ensemble.backend
        for path in (done, partial):
            if path.exists():
                ensemble.restore(files.load_tensors(path))
                break
        runs = len(ensemble.step)
        progress = Progress(stage, runs, ensemble.steps_left())
        before, started = ensemble.executed, ensemble.seconds
        Signals.waiting = True
        try:
            ensemble.train(progress, lambda snapshot: files.save_tensors(partial, snapshot))
        finally:
            Signals.waiting = False
            progress.bar.close()
        files.save_tensors(done, ensemble.snapshot())
        partial.unlink(missing_ok=True)
        result = ensemble.result()
        steps, seconds = result.executed - before, result.seconds - started   # of this command; the result counts all
        if not keep_state:
            result.state = None
        n_censored, rest = sum(run["censored"] for run in result.runs), "not yet" if cells[0].stop_step else "censored"
        print(f"{stage}: {runs} runs, {runs - n_censored} grokked, {n_censored} {rest}, {steps} run-steps in {duration(seconds)}"
              + (f" ({1e3 * seconds / steps:.2f} ms each)" if steps else " (from the checkpoint)"), flush=True)
        for run in result.runs:
            if run["diverged"]:
                print(f"{stage}: member {run['member']} of {run['cell']} diverged (loss or norm not finite); its row says so")
        return result

    def discard(self) -> None:
        """Input that proved bad only in training: what this command created goes; results of an earlier one stay."""
        self.finish()
        if not (self.out / "runs.csv").exists():
            (self.out / "config.json").unlink()
        for folder in self.created:
            folder.rmdir()

    def finish(self) -> None:
        """All results are written: the checkpoint has served."""
        for path in self.checkpoint.iterdir():
            path.unlink()
        self.checkpoint.rmdir()


class Signals:
    """Ctrl-C and SIGTERM while training wait for the next tick, where the state is whole; a second one is not waited for."""
    waiting = False
    caught: int | None = None

    @classmethod
    def handle(cls, number: int, _: object) -> None:
        if cls.waiting and cls.caught is None:
            cls.caught = number
        else:
            cls.leave(number)

    @classmethod
    def leave(cls, number: int) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)


def main(run: callable) -> None:
    """Run an experiment's `run(argv)`: bad input ends in one line and code 2, Ctrl-C in 130, SIGTERM in 143."""
    signal.signal(signal.SIGTERM, Signals.handle)
    signal.signal(signal.SIGINT, Signals.handle)
    code = 0
    try:
        run(sys.argv[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:   # disk full, folder gone: files are written whole, so what was there is intact
        print(f"error: {error.strerror}: {error.filename or 'a file'}; results so far are intact, free the disk or choose another --out",
              file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    if code in (130, 143):
        print("stopped; the same command continues from here", file=sys.stderr)
    sys.exit(code)
