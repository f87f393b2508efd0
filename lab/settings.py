"""Settings and command line. An experiment subclasses `Config` and lists its presets; every setting is checked before anything is written."""
import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from common import EVAL_EVERY, MODELS, UsageError, elements, n_train
from kernels.cpu import has_compiler
from kernels.cuda import MOST_CLASSES
from kernels.layout import model_layout
from kernels.loss import LOSSES


def option(default: object, text: str, kind: type = str, parts: tuple[str, ...] = (), all_of: tuple[str, ...] = (), fresh: bool = False) -> object:
    """A setting that the command line offers, with its help text; `kind` of the values where the default is an empty tuple. One of kind
    "fixed" is not offered: an experiment that is about one model has no --model.
    `parts`: the only parts of the experiment that read it; `all_of`: the only ones that read more than its first value; `fresh`: only fresh
    networks read it, the papers' own have a value of theirs."""
    return field(default=default, metadata={"help": text, "kind": kind, "parts": parts, "all_of": all_of, "fresh": fresh})


@dataclass(frozen=True)
class Machine:
    """Where and how to compute, and where to write: what every command takes."""
    members: tuple[int, ...] = option((), "members of the block to train; default: all, or the preset's choice", int)
    device: str = option("auto", "auto, cpu or cuda")
    backend: str = option("auto", "auto, compiled or eager (the definition on a CPU, through torch.compile or not) or triton (CUDA)")
    dtype: str = option("float32", "float32 or float64")
    arithmetic: str = option("ieee", "matrix products in float32 on CUDA: ieee or tf32x3")
    out: str = option("", "output folder; default: results/EXPERIMENT/PRESET, with the changed flags in its name")
    save_weights: bool = option(False, "write OUT/weights/CELL.safetensors: members at the start, T_mem, T_grok and the end; common.load reads it")
    resume: bool = option(False, "continue from OUT/checkpoint; the same command does so by itself when one is there")
    dry_run: bool = option(False, "print the cells and the estimate, train nothing")
    figures_only: bool = option(False, "draw the figures and tables again from OUT/runs.csv, train nothing")


@dataclass(frozen=True)
class Config(Machine):
    """What the experiments share besides. A tuple takes several values on the command line."""
    preset: str = option("", "smoke (seconds), laptop (minutes on 2 cores) or paper (the papers' tables); default: paper on CUDA, else laptop")
    p: tuple[int, ...] = option((59,), "moduli, 2 to 1000; the papers use primes")
    networks: tuple[str, ...] = option(("fresh",), "fresh: networks of our own; published: the paper's own, by its draws, held norms and protocol, "
                                       "whole blocks unless --members are given; or both")
    seeds: int = option(16, "block size: members drawn from one generator; member 3 of 12 is not member 3 of 8", fresh=True)
    seed0: int = option(1000, "first seed of fresh networks: weights use seed0, the split of member s uses 1000 + seed0 + s", fresh=True)
    parts: tuple[str, ...] = option((), "parts of the experiment to run")
    model: str = option("mlp", "mlp, transformer, transformer_ln (with LayerNorm) or transformer_b (as in paper B's released runs); "
                        "learning rates default to the model's")
    after_grok: int = option(0, "steps to train a cell on past its last member's grokking", fresh=True)
    task: str = option("add", "add, sub, mul, div, quadratic, s3, s4, s5 (permutations of so many letters) or FILE.csv, a table of labels: line a, "
                       "field b, empty where a pair is no data", fresh=True)

    loss: str = option("ce", "ce, mse or stablemax", fresh=True)
    betas: tuple[float, ...] = option((0.9, 0.999), "of AdamW", fresh=True)
    warmup: int = option(0, "steps over which the learning rate rises to its value", fresh=True)
    width: tuple[int, ...] = option((), "embedding and hidden width, d and H, multiples of 16; default: the papers', 128 256, of transformers "
                                    "128 512", int, fresh=True)
    init_scale: float = option(1.0, "factor of the starting weights", fresh=True)
    hold_from: int = option(-1, "step from which a held norm is held, 0: from the start; default: the papers', 500 (mse 50, transformers 600)",
                            fresh=True)
    hold: str = option("exact", "exact, or cap: a held norm is brought down where it is larger and left alone where not", fresh=True)
    perp_grad: bool = option(False, "leave out what of the gradient lies along the weights (arXiv 2501.04697)", fresh=True)

    def network(self) -> dict:
        """What these settings say of the task, the loss, the optimiser and the network of every fresh cell: fields of `Cell`."""
        return {name: getattr(self, name) for name in CHANGES if name != "hold_from"} | (
            {"clamp_start": self.hold_from} if self.hold_from >= 0 else {})


NOT_SCIENCE = ("out", "resume", "dry_run", "figures_only", "metrics_dir", "twin_of")   # settings that change no number
CHOICES = {"device": ("auto", "cpu", "cuda"), "backend": ("auto", "compiled", "eager", "triton"), "dtype": ("float32", "float64"),
           "arithmetic": ("ieee", "tf32x3"), "model": tuple(MODELS), "audit_dtypes": ("float32", "float64"), "networks": ("fresh", "published"),
           "loss": LOSSES, "hold": ("exact", "cap")}
CHANGES = ("task", "loss", "betas", "warmup", "width", "init_scale", "hold_from", "hold", "perp_grad")   # make a network none of the papers'
PAIRS = ("width", "betas")                             # whose values may be equal
MODULI = ("p", "moduli", "free_moduli", "group_moduli")
POSITIVE = ("rhos", "lrs", "lr", "taus", "rho", "fork_steps", "budget", "train_fracs", "train_frac")

LARGEST = {"rhos": 100, "rho": 100, "taus": 1e6, "weight_decays": 1e6, "w_c": 1e6, "gammas": 100}   # far past anything that trains
SMALLEST = {"rhos": 1e-3, "rho": 1e-3, "taus": 1e-6, "w_c": 1e-6, "lrs": 1e-20, "lr": 1e-20}   # of what must be above 0: less is 0 in float32


HOW = ("device", "backend", "dtype", "arithmetic")                      # groups of --help; every other flag says what to train
WHERE = ("out", "save_weights", "resume", "dry_run", "figures_only")
ENDINGS = """exit codes: 0 done, 2 an error said in one line, 130 after Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 129 a hangup, 141 nobody reads stdout.
Of several processes, started by torchrun, Slurm or MPI, each trains its share of the cells; the last one to finish merges the shards. The share
of a process that died is trained by the same command with its RANK and WORLD_SIZE."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        missing = [action for action in self._actions if action.required]
        if missing and "arguments are required" in message:
            raise UsageError(f"{missing[0].dest.upper()} is missing: name the {missing[0].help}; see --help")
        raise UsageError(message)

    def unknown(self, words: list[str]) -> str:
        """What is said of `words`, which are no flag and no value of one: the first flag among them, and the known one nearest to it."""
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if not flags:
            return f"no flag takes {' '.join(words)}; see --help"
        near = difflib.get_close_matches(flags[0], [flag for action in self._actions for flag in action.option_strings], 1)
        return f"unknown flag {flags[0]}; {f'did you mean {near[0]}? ' if near else ''}see --help"


def parser_of(text: str) -> Parser:
    """The command line of an experiment with docstring `text`: its --help begins with the commands in it, then says what they are about."""
    commands = [line for line in text.splitlines() if line.startswith("    python ")]
    about = [line for line in text.splitlines() if line not in commands]
    return Parser(usage=argparse.SUPPRESS, description="\n".join([*commands, "", *about]).rstrip(), epilog=ENDINGS, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)


def add_flags(parser: Parser, cls: type) -> None:
    """The settings of `cls` as flags in three groups: what to train, its own before those that all experiments have, how, and where."""
    titles = {"what": "what to train", "how": "how to compute", "where": "where to write, and what to do there"}
    groups = {key: parser.add_argument_group(title) for key, title in titles.items()}
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata["kind"] != "fixed"}
    own = [name for name in cls.__annotations__ if name in fields]
    for f in [fields[name] for name in dict.fromkeys([*own, *fields])]:
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        group = groups["how" if f.name in HOW else "where" if f.name in WHERE else "what"]
        if f.metadata["kind"] == "positional":
            group.add_argument(f.name, help=text)
        elif f.type in (bool, "bool"):
            group.add_argument(flag, action="store_true", default=None, help=text)
        else:
            many = isinstance(f.default, tuple)
            kind = type(f.default[0]) if many and f.default else f.metadata["kind"] if many else type(f.default)
            usual = " ".join(map(str, f.default)) if many else str(f.default)
            group.add_argument(flag, type=kind, nargs="+" if many else None, default=None, help=f"{text} [{usual}]" if usual else text)


def parse(cls: type, presets: dict[str, dict], parts: tuple[str, ...], argv: list[str]) -> tuple[Machine, dict]:
    """Settings of `cls` from preset and flags, checked, and the flags that were given. Raises UsageError."""
    parser = parser_of(sys.modules[cls.__module__].__doc__ or "")   # python -OO has no docstrings
    add_flags(parser, cls)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(parser.unknown(unknown))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items() if v is not None}
    if presets and given.get("preset", next(iter(presets))) not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}, got {given['preset']!r}")
    device, model = place(given), given.get("model", getattr(cls, "model", "mlp"))
    settings = {**given, "device": device}
    if presets:
        preset = given.get("preset", "paper" if device == "cuda" else "laptop")
        settings = {"parts": parts, **presets[preset], **settings, "preset": preset}
    if model in MODELS and model != "mlp":   # a preset's learning rates are those of the MLP
        rates = {"lr": MODELS[model], "lrs": (MODELS[model],)}
        settings |= {f.name: rates[f.name] for f in dataclasses.fields(cls) if f.name in rates and f.name not in given}
    if changed := [name for name in CHANGES if given.get(name, getattr(cls, name, None)) != getattr(cls, name, None)]:   # the papers have none
        if "published" in given.get("networks", ()):
            raise UsageError(f"--networks published are the papers' own; they go without --{changed[0].replace('_', '-')}")
        settings |= {"networks": ("fresh",)} if hasattr(cls, "networks") else {}
    if size := elements(given.get("task", "add")):
        settings |= {name: (size,) for name in MODULI if hasattr(cls, name) and name not in given}
    config = cls(**settings)
    check(config)
    if presets:
        check_grid(config, parts)
    return config, given


def place(given: dict, flag: str = "--") -> str:
    """The device, cpu or cuda, that the choices in `given` come to. Raises UsageError for one that there is not, or that this machine lacks."""
    for name, allowed in CHOICES.items():
        values = given.get(name, ())
        for value in values if isinstance(values, tuple) else (values,):
            if value not in allowed:
                raise UsageError(f"{flag}{name.replace('_', '-')} must be one of {', '.join(allowed)}, got {value!r}")
    device, backend = given.get("device", "auto"), given.get("backend", "auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{flag}device cuda: no CUDA device is visible here; use {flag}device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and backend in ("auto", "triton") else "cpu"
    if (backend == "triton") != (device == "cuda") and backend != "auto":
        raise UsageError(f"{flag}backend {backend} does not run on {flag}device {device}; triton needs cuda, compiled and eager need cpu")
    if backend == "compiled" and not has_compiler():
        raise UsageError(f"{flag}backend compiled needs a C++ compiler (g++ or clang++) on the PATH; use {flag}backend eager")
    if given.get("arithmetic") == "tf32x3" and device != "cuda":
        raise UsageError(f"{flag}arithmetic tf32x3 is a mode of the CUDA kernels; use ieee on a CPU")
    return device


def check_size(device: str, networks: Iterable[tuple[str, int]]) -> None:
    """The kernels of the device take every `(model, p)` of `networks`, or UsageError."""
    for model, p in dict.fromkeys(networks):
        if device == "cuda" and (more := model_layout(model, p, torch.float32).classes - MOST_CLASSES) > 0:
            raise UsageError(f"the CUDA kernels of model {model} take p up to {p - more}, got {p}; use --device cpu")


def doses(flag: str, texts: tuple[str, ...]) -> list[tuple[float, float]]:
    """`(rho, tau)` of each of `texts`, RHO or RHO:TAU. Raises UsageError."""
    try:
        found = [(float(rho), float(tau or 1)) for rho, _, tau in (text.partition(":") for text in texts)]
    except ValueError:
        found = [(math.nan, 1.0)]
    if len(set(found)) < len(found) or not all(0 < rho <= LARGEST["rhos"] and 0 < tau <= LARGEST["taus"] for rho, tau in found):
        raise UsageError(f"{flag} are RHO or RHO:TAU, such as 1.15 or 1.15:1.7, none twice, rho in (0, {LARGEST['rhos']:g}], "
                         f"tau in (0, {LARGEST['taus']:g}]; got {' '.join(texts)}")
    return found


def check_read(config: Machine, given: dict) -> None:
    """Something that runs reads every given flag, or UsageError that says what would: the folder is named after the flags."""
    theirs_alone = getattr(config, "networks", ()) == ("published",)
    for f in dataclasses.fields(config):
        if f.name not in given:
            continue
        flag, parts, all_of = "--" + f.name.replace("_", "-"), f.metadata.get("parts"), f.metadata.get("all_of")
        if parts and not set(parts) & set(config.parts):
            raise UsageError(f"{flag} is read with --parts {' or '.join(parts)} alone; name one of them, or leave it out")
        if all_of and len(given[f.name]) > 1 and not set(all_of) & set(config.parts):
            raise UsageError(f"of {flag} the first value alone is read here, all are with --parts {' or '.join(all_of)}; name one, or leave them out")
        if theirs_alone and f.metadata.get("fresh"):
            raise UsageError(f"{flag} is read with --networks fresh alone, the papers' own networks have theirs; leave it out")


def check_members(config: Config, blocks: dict[str, int]) -> None:
    """Members lie in the block of every part that runs, or UsageError. `blocks`: sizes by part; of parts without one it is `--seeds`."""
    for part in config.parts:
        block = blocks.get(part, config.seeds)
        if max(config.members, default=0) >= block:
            raise UsageError(f"--members must lie in the block of --parts {part}, 0..{block - 1}, got {max(config.members)}")


def check(config: Machine) -> None:
    """Every value possible by itself, or UsageError naming the flag, the value and what would do."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, tuple) and len(set(value)) != len(value) and f.name not in PAIRS:
            raise UsageError(f"--{f.name.replace('_', '-')} lists a value twice: {' '.join(map(str, value))}")
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, float) and not math.isfinite(v):
                raise UsageError(f"--{f.name.replace('_', '-')} must be finite, got {v}")
            if f.name == "hold_from" and v < -1:
                raise UsageError(f"--hold-from is a step, 0 or later, got {v}")
            if f.name == "members" and v < 0:
                raise UsageError(f"--members are numbered from 0, got {v}")
            if f.name in LARGEST and abs(v) > LARGEST[f.name]:
                raise UsageError(f"--{f.name.replace('_', '-')} must be at most {LARGEST[f.name]:g}, got {v:g}")
            if f.name in POSITIVE and v <= 0:
                raise UsageError(f"--{f.name.replace('_', '-')} must be > 0, got {v:g}")
            if f.name in SMALLEST and 0 < v < SMALLEST[f.name]:
                raise UsageError(f"--{f.name.replace('_', '-')} must be at least {SMALLEST[f.name]:g}, got {v:g}")
            if f.name in ("train_fracs", "train_frac") and v >= 1:
                raise UsageError(f"--{f.name.replace('_', '-')} must be below 1, got {v:g}: some pairs must be left to test on")
            if f.name == "weight_decays" and v < 0:
                raise UsageError(f"--weight-decays must be >= 0, got {v:g}")


def check_grid(config: Config, parts: tuple[str, ...]) -> None:
    """Values that must fit each other, or UsageError."""
    moduli = [(p, flag) for flag in MODULI for p in getattr(config, flag, ())]
    for p, flag in moduli:
        if not 2 <= p <= 1000:
            raise UsageError(f"--{flag.replace('_', '-')} must be between 2 and 1000, got {p}")
        for fraction in getattr(config, "train_fracs", ()) or (0.4,):
            if not 1 <= n_train(p, fraction) < p * p:
                raise UsageError(f"--p {p} with train fraction {fraction:g} leaves no training pair; use a larger p or fraction")
    check_size(config.device, ((config.model, p) for p, _ in moduli))
    for name in ("seeds", "moduli_seeds", "free_seeds", "audit_seeds", "temperature_seeds"):
        if not 1 <= getattr(config, name, 1) <= 10_000:
            raise UsageError(f"--{name.replace('_', '-')} must be between 1 and 10000, got {getattr(config, name)}")
    if not 0 <= getattr(config, "dose_seeds", 0) <= 10_000:
        raise UsageError(f"--dose-seeds must be between 1 and 10000, or 0 for the paper's, got {config.dose_seeds}")
    if getattr(config, "budget", EVAL_EVERY) < EVAL_EVERY:
        raise UsageError(f"--budget must be at least {EVAL_EVERY} steps, where runs are first evaluated; got {config.budget}")
    if not 0 <= config.seed0 < 2**31:
        raise UsageError(f"--seed0 must be between 0 and 2147483647, got {config.seed0}")
    for part in config.parts:
        if part not in parts:
            raise UsageError(f"--parts must be among {' '.join(parts)}, got {part!r}")
    if config.after_grok % EVAL_EVERY or (config.after_grok and config.after_grok < 200) or config.after_grok < 0:
        raise UsageError(f"--after-grok must be 0 or a multiple of {EVAL_EVERY} of at least 200 steps, got {config.after_grok}")
