"""What a released file describes: the cell to train, and what came out of it on the authors' GPU.

Paper B (arXiv 2606.18465): the CPU's generators; an allocation holds the stored group norms; weight decay follows the Adam update; a fork file
holds one arm of the same-state comparison. Paper A (arXiv 2606.13753): the draws of its CUDA card (`lab/draws.py`), measured on its geometric
grid of steps. Nothing in a file is executed, and whatever is wrong with one is said in a line that names it.
"""
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import EVAL_EVERY, Cell, UsageError, geometric_grid, n_train
from lab.draws import LAYERS, Card, paper_a_seed
from lab.tasks import N_TEST, parity_task


@dataclass(frozen=True)
class Released:
    """One released cell: what to train, and what came out (-1 = not within the budget)."""
    cell: Cell
    t_mem: np.ndarray        # (S,)
    t_grok: np.ndarray       # (S,)
    steps: np.ndarray        # logged steps
    logit_scale: np.ndarray | None   # mean over members at those steps; paper A did not measure it
    fork_step: int = 0       # step at which it left the free run of its block; 0 = never
    experiment: str = ""     # the folder that it lies in


RUN = {"p", "alpha", "lam", "lr", "steps", "logit_scale"}   # what a file has some of that is a run, whole or not
TIMES = ("T_mem_per_seed", "T_grok_per_seed", "steps")
NEEDED = {"A": ("lam", "lr", "max_steps", "train_acc", *TIMES), "B": ("p", "alpha", "lam", "lr", "max_steps", "arm", "logit_scale", *TIMES),
          "fork": ("p", "alpha", "lam", "lr", "arm", "t_fork", "n_seed", "N0", "target", "logit_scale", *TIMES)}
ARMS = {"none": "free", "clamp": "clamp", "alloc": "alloc"}
FORK_ARMS = {"free": "free", "clamp_same": "same", "clamp_raised": "raised", "clamp_lowered": "lowered"}
PAPER_A_ARMS = {"none": "free", "free": "free", "clamp": "clamp", "rescale": "rescale", "layer": "rescale"}
PAPER_A_MODELS = {"tfnoln": "transformer", "tfnormint": "transformer_ln", "tfgrok": "transformer_ln"}   # of the others: mlp
ARCHS = {"mlp": "mlp", "tfnoln": "transformer_b"}         # paper B's
WIDTHS = {"mlp": 256}                                     # hidden ones; of the transformers 512
FORK_BUDGET = 60_000      # steps; fork files store none, the paper has it in its methods
LONGEST = 10**7           # steps that a run may have
LARGEST_FILE = 64 << 20   # bytes
SMALLEST_NORM, LARGEST_NORM = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class NoRun(UsageError):
    """A readable file that is not meant to be a run."""


def read(path: Path, label: str, members: tuple[int, ...]) -> Released:
    """The released cell in `path`. Raises UsageError, naming the file, if it cannot be read, is foreign, or is of a kind not replayed;
    NoRun if nothing of a run is in it."""
    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(entry.file_size for entry in packed.infolist())) > LARGEST_FILE:
                raise UsageError(f"{label}: {size / 2**20:.0f} MB unpacked, more than the {LARGEST_FILE >> 20} that any released run has")
        with np.load(path, allow_pickle=False) as archive:
            data = {key: archive[key] for key in archive.files}
    except UsageError:
        raise
    except Exception as error:  # whatever is wrong with a file, it is refused by name
        raise UsageError(f"{label}: not a readable .npz of plain arrays ({type(error).__name__}); expected a released file") from None
    if not RUN & set(data):
        raise NoRun(f"{label}: no run, it has none of {', '.join(sorted(RUN))}")
    kind = "A" if "train_acc" in data and "logit_scale" not in data else "fork" if "t_fork" in data else "B"   # all of B's have a logit scale
    if missing := [key for key in NEEDED[kind] if key not in data]:
        raise UsageError(f"{label}: not a released run, it lacks {', '.join(missing)}")
    try:
        if odd := [key for key, array in data.items() if np.asarray(array).dtype.kind not in "biufUS"]:
            raise ValueError(f"{odd[0]} holds neither numbers nor text")
        return {"A": describe_paper_a, "fork": describe_fork, "B": describe}[kind](data, label, members)
    except UsageError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"{label}: a value in it cannot be used ({why}); expected a released file") from None


def describe(data: dict[str, np.ndarray], label: str, members: tuple[int, ...]) -> Released:
    """A whole run of paper B."""
    arch, arm, loss, S = str(data.get("arch", "mlp")), str(data["arm"]), str(data.get("loss", "ce")), len(data["T_grok_per_seed"])
    if arch not in ARCHS:
        raise UsageError(f"{label}: a network that is not replayed ({arch}); there are {' and '.join(ARCHS)}, leave it out with --match")
    if arm not in ARMS or loss not in ("ce", "mse") or (arm, arch) == ("alloc", "tfnoln"):
        raise ValueError(f"arm {arm!r} of {arch} with loss {loss!r}")
    budget, start, tau = whole(data, "max_steps"), whole(data, "t_int", 500), scalar(data, "tau", 1)
    check_runs(data, S, budget >= EVAL_EVERY, budget <= LONGEST, 0 <= start <= 10**9, tau > 0)
    batch = n_train(whole(data, "p"), scalar(data, "alpha"))
    check_widths(data, d_model=128, H=WIDTHS.get(arch, 512), n_train=batch, batch_size=batch)
    rho, w_c, held = None, None, ()
    if arm != "none":
        rho, w_c = scalar(data, "rho"), scalar(data, "wc_used")
        groups = [float(data[key][-1]) for key in ("wn_E", "wn_W1", "wn_W2")] if arm == "alloc" else []
        check_norms(groups or [rho * w_c])
        held = (0.0, *groups) if groups else (rho * w_c,)
    chosen = choose(members, S, label)
    cell = Cell(label, members=chosen, block=S, budget_steps=budget, arm=ARMS[arm], loss=loss, model=ARCHS[arch], rho=rho, tau=tau,
                gamma=scalar(data, "gamma") if arm == "alloc" else None, clamp_start=start, w_c=w_c, held=(held,) * len(chosen) if held else (),
                expected_steps=slowest(data, chosen, budget), decay_last=True, **conditions(data))
    return outcome(cell, data)


def describe_fork(data: dict[str, np.ndarray], label: str, members: tuple[int, ...]) -> Released:
    """An arm of paper B's same-state comparison, from its fork step on."""
    arm, S, step = str(data["arm"]), whole(data, "n_seed"), whole(data, "t_fork")
    if arm not in FORK_ARMS:
        raise ValueError(f"fork arm {arm!r}")
    check_runs(data, S, EVAL_EVERY <= step < FORK_BUDGET, step % EVAL_EVERY == 0, data["N0"].shape == data["target"].shape == (S,))
    batch = n_train(whole(data, "p"), scalar(data, "alpha"))
    check_widths(data, d_model=128, H=WIDTHS["mlp"], n_train=batch, batch_size=batch)
    t_mem, t_grok = data["T_mem_per_seed"], data["T_grok_per_seed"]
    if not ((t_mem > 0) & (t_mem <= step) & ((t_grok < 0) | (t_grok > step))).all():
        raise ValueError("a member had not memorised, or had grokked, at the fork")
    chosen = choose(members, S, label)
    held = () if arm == "free" else tuple((norm,) for norm in data["target"][list(chosen)].astype(float).tolist())
    check_norms(norm for norms in held for norm in norms)
    cell = Cell(label, members=chosen, block=S, budget_steps=FORK_BUDGET, arm=FORK_ARMS[arm], clamp_start=step + 1, held=held,
                rho=scalar(data, "rho", 1.0) if arm in ("clamp_raised", "clamp_lowered") else None,
                expected_steps=slowest(data, chosen, FORK_BUDGET), decay_last=True, **conditions(data))
    return outcome(cell, data, step)


def describe_paper_a(data: dict[str, np.ndarray], label: str, members: tuple[int, ...]) -> Released:
    """A run of paper A, whose settings are stored in float32."""
    experiment, arm, S = paper_a_experiment(data), str(data.get("arm", "none")), len(data["T_grok_per_seed"])
    if arm not in PAPER_A_ARMS:
        raise ValueError(f"arm {arm!r}")
    parity = experiment in ("parity", "parity_lambda")
    model, budget, start = "mlp_dense" if parity else PAPER_A_MODELS.get(experiment, "mlp"), whole(data, "max_steps"), whole(data, "t_int", 0)
    check_runs(data, S, 1 <= budget <= LONGEST, 0 <= start <= 10**9, pairs=not parity)
    if not np.array_equal(data["steps"], geometric_grid(budget)):
        raise ValueError("its steps are not paper A's grid")
    w_c, held, scale_once = None, (), ()
    if arm in ("clamp", "rescale"):
        name = next(key for key in ("wc_group", "wc_used", "wc") if key in data)
        # its sweeps read W_c from a table in full precision; its other runners had a constant
        w_c = typed(data, name) if experiment in ("normint", "efflr", "tfnormint") else scalar(data, name)
        groups = ("all", "embed", "attn", "mlp", "unembed") if "group" in data else ("all",)
        held = tuple(typed(data, "rho") * w_c * (group == str(data.get("group", "all"))) for group in groups)
        check_norms([max(held)])
    elif arm == "layer":
        scale_once = tuple(typed(data, "f") if chosen else 1.0 for chosen in LAYERS[str(data["layer"])])
    chosen, same, task = choose(members, S, label), conditions(data, typed, pairs=not parity), {}
    if parity:
        sizes = {key: whole(data, key) for key in ("n", "k", "m")}
        seed, task = paper_a_seed(experiment, **sizes, **same), {"task": parity_task(**sizes)}
    else:
        seed = paper_a_seed(experiment, **same)
    cell = Cell(label, members=chosen, block=S, budget_steps=budget, arm=PAPER_A_ARMS[arm], model=model, seed0=seed,
                rho=typed(data, "rho") if held else None, clamp_start=start, clamp_stop=start + 1 if arm == "rescale" else None, w_c=w_c,
                held=(held,) * len(chosen) if held else (), expected_steps=slowest(data, chosen, budget), card=Card(), eval_every=0,
                scale_once=scale_once, **task, **same)
    check_widths(data, d_model=128, H=WIDTHS.get(model, 512), n_heads=4, n_layers=1, n_train=cell.n_train, m_test=N_TEST)
    return outcome(cell, data)


def paper_a_experiment(data: dict[str, np.ndarray]) -> str:
    """Which of paper A's released experiments left a file, by what only its files hold."""
    if "m_test" in data:
        return "parity" if whole(data, "t_int") <= LONGEST else "parity_lambda"     # which has no clamp
    for key, experiment in (("layer", "normint"), ("eff_lr_E", "efflr"), ("n_layers", "tfgrok"), ("role", "grokfss"),
                            ("group", "tfnormint"), ("n_heads", "tfnoln"), ("norm_before_int", "denserho")):
        if key in data:
            return experiment
    raise ValueError("no experiment of paper A leaves such a file")


# ---------------------------------------------------------------- values of a released file, checked

def scalar(data: dict[str, np.ndarray], key: str, default: float | None = None) -> float:
    value = float(data[key].item()) if key in data else default
    if value is None or not np.isfinite(value):
        raise ValueError(f"{key} is {value}")
    return value


def whole(data: dict[str, np.ndarray], key: str, default: float | None = None) -> int:
    value = scalar(data, key, default)
    if value != int(value):
        raise ValueError(f"{key} is {value:g}, not a whole number")
    return int(value)


def typed(data: dict[str, np.ndarray], key: str) -> float:
    """A setting as its author typed it, who stored it in float32."""
    value = scalar(data, key)
    return float(str(np.float32(value))) if data[key].dtype == np.float32 else value


def conditions(data: dict[str, np.ndarray], number: Callable[[dict, str], float] = scalar, pairs: bool = True) -> dict[str, float]:
    of_pairs = {"p": whole(data, "p"), "train_frac": number(data, "alpha")} if pairs else {}
    return {**of_pairs, "weight_decay": number(data, "lam"), "lr": number(data, "lr")}


def check_runs(data: dict[str, np.ndarray], S: int, *more: bool, pairs: bool = True) -> None:
    """What every released run has: numbers in their range, an entry per member and per logged step. `more`: what must hold besides; `pairs`: it
    is about pairs."""
    p, train_frac = (whole(data, "p"), scalar(data, "alpha")) if pairs else (2, 0.5)
    if not (2 <= p <= 1000 and 1 <= n_train(p, train_frac) < p * p and scalar(data, "lr") > 0 and scalar(data, "lam") >= 0 and 1 <= S <= 1000
            and all(more) and data["T_mem_per_seed"].shape == data["T_grok_per_seed"].shape == (S,)
            and data["steps"].shape == data.get("logit_scale", data["steps"]).shape == (len(data["steps"]),)):
        raise ValueError("a number is out of its range or an array has the wrong length")
    if len(data["steps"]) == 0:
        raise ValueError("no logged steps")
    for key in TIMES:
        if not (np.isfinite(data[key]) & (np.abs(data[key]) < 2**53)).all():
            raise ValueError(f"{key} is not finite")


def check_widths(data: dict[str, np.ndarray], **expected: int) -> None:
    """Widths and batch that the file may state: only the papers' networks on the full batch are trained."""
    for key, value in expected.items():
        if key in data and whole(data, key) != value:
            raise ValueError(f"{key} is {whole(data, key)}, only {value} is trained")


def check_norms(held: Iterable[float]) -> None:
    if not all(SMALLEST_NORM <= norm <= LARGEST_NORM for norm in held):   # a smaller one would hold nothing
        raise ValueError("the held norm is not positive and finite")


def choose(members: tuple[int, ...], S: int, label: str) -> tuple[int, ...]:
    chosen = members or tuple(range(S))
    if not 0 <= min(chosen) <= max(chosen) < S:
        raise UsageError(f"--members {' '.join(map(str, members))} is not in {label}, a block of {S} (0..{S - 1})")
    return chosen


def slowest(data: dict[str, np.ndarray], members: tuple[int, ...], budget: int) -> int:
    """The largest released T_grok of `members`, the budget where one did not grok: for the estimate of time."""
    grokked = data["T_grok_per_seed"][list(members)]
    return int(np.where(grokked < 0, budget, grokked).max())


def outcome(cell: Cell, data: dict[str, np.ndarray], fork_step: int = 0) -> Released:
    t_mem, t_grok, steps = (data[key].astype(int) for key in TIMES)
    return Released(cell, t_mem, t_grok, steps, data["logit_scale"].astype(float) if "logit_scale" in data else None, fork_step)
