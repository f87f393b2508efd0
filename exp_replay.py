"""Per-seed replay of released runs: the same cells from the same start, member by member, beside what the authors' GPU measured.

Reads the `.npz` files released with both papers and trains what each describes: network, block size, modulus, train fraction, loss,
temperature, learning rate, decay, clamp target and step, budget. Nothing is fitted: a clamp at rho times a critical norm takes the critical
norm stored with the run.
Paper B (arXiv 2606.18465): the CPU's generators, an allocation holds the stored group norms, weight decay follows the Adam update. A fork file
(same-state comparison) is trained freely to its fork step, once for all its arms, and continued at the stored target of each member.
Paper A (arXiv 2606.13753): the draws of its CUDA card (lab/draws.py), measured on its geometric grid of steps; there one step of the grid is about
3%, and one logged step is what a difference of one evaluation is in paper B.
A run that is damaged, or of another kind, is refused; a file that is no run, such as weights beside one, is counted and left out, and so is a
run that there is no trainer for, by name.

    python exp_replay.py METRICS_DIR --match 'mediation/*p59*tau1.70*' --members 0 1 2

replay.csv compares step by step; a run censored on one side only counts as grokked at the budget there. A table by experiment (the folder that
the files lie in) and the last line sum it up.
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import dataclasses
import fnmatch
import functools
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import EVAL_EVERY, Cell, Result, Trajectories, UsageError, geometric_grid, n_train
from lab import console, figures, files, settings
from lab.desk import Lab, main, provenance
from lab.draws import LAYERS, Card, paper_a_seed
from lab.ensemble import inherit


@dataclass(frozen=True, kw_only=True)
class Config(settings.Machine):
    metrics_dir: str = field(metadata={"help": "folder with released .npz files, searched recursively", "kind": "positional"})
    match: tuple[str, ...] = settings.option(("*",), "only files whose name, or path below METRICS_DIR, matches a pattern (.npz left out)")


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


NEEDED = ("p", "alpha", "lam", "lr", "max_steps", "arm", "T_mem_per_seed", "T_grok_per_seed", "steps", "logit_scale")
FORK_NEEDED = ("p", "alpha", "lam", "lr", "arm", "t_fork", "n_seed", "N0", "target", "T_mem_per_seed", "T_grok_per_seed", "steps", "logit_scale")
ARMS = {"none": "free", "clamp": "clamp", "alloc": "alloc"}
FORK_ARMS = {"free": "free", "clamp_same": "same", "clamp_raised": "raised", "clamp_lowered": "lowered"}
ARCHS = {"mlp": ("mlp", 256), "tfnoln": ("transformer_b", 512)}   # model and hidden width
PAPER_A_NEEDED = ("lam", "lr", "max_steps", "T_mem_per_seed", "T_grok_per_seed", "steps", "train_acc")
PAPER_A_ARMS = {"none": "free", "free": "free", "clamp": "clamp", "rescale": "rescale", "layer": "rescale"}
GRID_LIMIT = 10**7     # steps
LARGEST_FILE = 64 << 20   # bytes
SMALLEST_NORM, LARGEST_NORM = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
RUN = {"p", "alpha", "lam", "lr", "steps", "logit_scale"}   # what a file has some of that is a run, whole or not
FORK_BUDGET = 60_000   # steps; fork files store none, the paper has it in its methods


class NoRun(UsageError):
    """A readable file that is not meant to be a run."""


class NotTrained(UsageError):
    """A released run of a kind that this project cannot train yet."""


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
    forked, paper_a = "t_fork" in data, "train_acc" in data and "logit_scale" not in data   # which every run of paper B has
    if missing := [key for key in (PAPER_A_NEEDED if paper_a else FORK_NEEDED if forked else NEEDED) if key not in data]:
        raise UsageError(f"{label}: not a released run, it lacks {', '.join(missing)}")
    try:
        if odd := [key for key, array in data.items() if np.asarray(array).dtype.kind not in "biufUS"]:
            raise ValueError(f"{odd[0]} holds neither numbers nor text")
        return (describe_paper_a if paper_a else describe_fork if forked else describe)(data, label, members)
    except UsageError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"{label}: a value in it cannot be used ({why}); expected a released file") from None


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


def check_shape(data: dict[str, np.ndarray], H: int) -> None:
    """Widths and batch that the file may state: only the papers' networks on the full batch are trained."""
    for key, expected in (("d_model", 128), ("H", H), ("n_train", n_train(whole(data, "p"), scalar(data, "alpha"))),
                          ("batch_size", n_train(whole(data, "p"), scalar(data, "alpha")))):
        if key in data and whole(data, key) != expected:
            raise ValueError(f"{key} is {whole(data, key)}, only {expected} is trained")
    if len(data["steps"]) == 0:
        raise ValueError("no logged steps")
    for key in ("steps", "T_mem_per_seed", "T_grok_per_seed"):
        if not (np.isfinite(data[key]) & (np.abs(data[key]) < 2**53)).all():
            raise ValueError(f"{key} is not finite")


def choose(members: tuple[int, ...], S: int, label: str) -> tuple[int, ...]:
    chosen = members or tuple(range(S))
    if not 0 <= min(chosen) <= max(chosen) < S:
        raise UsageError(f"--members {' '.join(map(str, members))} is not in {label}, a block of {S} (0..{S - 1})")
    return chosen


def describe(data: dict[str, np.ndarray], label: str, members: tuple[int, ...]) -> Released:
    number = functools.partial(scalar, data)
    arch = str(data.get("arch", "mlp"))
    if arch not in ARCHS:
        raise UsageError(f"{label}: a network that is not replayed ({arch}); there are {' and '.join(ARCHS)}, leave it out with --match")
    model, H = ARCHS[arch]
    arm, loss, S = str(data["arm"]), str(data.get("loss", "ce")), len(data["T_grok_per_seed"])
    p, budget, start = whole(data, "p"), whole(data, "max_steps"), whole(data, "t_int", 500)
    if arm not in ARMS or loss not in ("ce", "mse"):
        raise ValueError(f"arm {arm!r} with loss {loss!r}")
    if not (2 <= p <= 1000 and 1 <= n_train(p, number("alpha")) < p * p and number("tau", 1) > 0 and number("lr") > 0 and number("lam") >= 0
            and 1 <= S <= 1000 and EVAL_EVERY <= budget <= 10**8 and 0 <= start <= 10**8 
            and data["T_mem_per_seed"].shape == data["T_grok_per_seed"].shape == (S,)
            and data["steps"].shape == data["logit_scale"].shape == (len(data["steps"]),)):
        raise ValueError("a number is out of its range or an array has the wrong length")
    check_shape(data, H)
    chosen = choose(members, S, label)
    rho, w_c = (number("rho"), number("wc_used")) if arm != "free" and arm != "none" else (None, None)
    held = (0.0, 0.0, 0.0, 0.0)
    if arm == "clamp":
        held = (rho * w_c, 0.0, 0.0, 0.0)
    elif arm == "alloc" and model == "mlp":
        held = (0.0, *(float(data[key][-1]) for key in ("wn_E", "wn_W1", "wn_W2")))
    wanted = {"clamp": held[:1], "alloc": held[1:]}.get(arm, ())
    if not all(SMALLEST_NORM <= norm <= LARGEST_NORM for norm in wanted):   # a smaller one would hold nothing
        raise ValueError("the held norm is not positive and finite")
    grokked = data["T_grok_per_seed"][list(chosen)]
    expected = int(np.where(grokked < 0, budget, grokked).max())
    cell = Cell(label, p=p, members=chosen, block=S, budget_steps=budget, arm=ARMS[arm], loss=loss, model=model, train_frac=number("alpha"), rho=rho,
                tau=number("tau", 1), gamma=number("gamma") if arm == "alloc" else None, lr=number("lr"), weight_decay=number("lam"),
                clamp_start=start, w_c=w_c, held=(held,) * len(chosen), expected_steps=expected, decay_last=True)
    return Released(cell, data["T_mem_per_seed"].astype(int), data["T_grok_per_seed"].astype(int), data["steps"].astype(int),
                    data["logit_scale"].astype(float))


def describe_fork(data: dict[str, np.ndarray], label: str, members: tuple[int, ...]) -> Released:
    number = functools.partial(scalar, data)
    arm, S, step, p = str(data["arm"]), whole(data, "n_seed"), whole(data, "t_fork"), whole(data, "p")
    per_seed = ("T_mem_per_seed", "T_grok_per_seed", "N0", "target")
    if arm not in FORK_ARMS:
        raise ValueError(f"fork arm {arm!r}")
    if not (2 <= p <= 1000 and 1 <= n_train(p, number("alpha")) < p * p and number("lr") > 0 and number("lam") >= 0 and 1 <= S <= 1000
            and EVAL_EVERY <= step < FORK_BUDGET and step % EVAL_EVERY == 0 and all(data[key].shape == (S,) for key in per_seed)
            and data["steps"].shape == data["logit_scale"].shape == (len(data["steps"]),)):
        raise ValueError("a number is out of its range or an array has the wrong length")
    check_shape(data, 256)
    t_mem, t_grok = data["T_mem_per_seed"], data["T_grok_per_seed"]
    if not ((t_mem > 0) & (t_mem <= step) & ((t_grok < 0) | (t_grok > step))).all():
        raise ValueError("a member had not memorised, or had grokked, at the fork")
    chosen = choose(members, S, label)
    targets = data["target"][list(chosen)].astype(float)
    if arm != "free" and not ((targets >= SMALLEST_NORM) & (targets <= LARGEST_NORM)).all():
        raise ValueError("the held norm is not positive and finite")
    grokked = t_grok[list(chosen)]
    expected = int(np.where(grokked < 0, FORK_BUDGET, grokked).max())
    cell = Cell(label, p=p, members=chosen, block=S, budget_steps=FORK_BUDGET, arm=FORK_ARMS[arm], train_frac=number("alpha"), lr=number("lr"),
                rho=number("rho", 1.0) if arm in ("clamp_raised", "clamp_lowered") else None, weight_decay=number("lam"), clamp_start=step + 1,
                held=() if arm == "free" else tuple((target, 0.0, 0.0, 0.0) for target in targets), expected_steps=expected,
                decay_last=True)
    return Released(cell, t_mem.astype(int), t_grok.astype(int), data["steps"].astype(int), data["logit_scale"].astype(float), step)


def paper_a_experiment(data: dict[str, np.ndarray]) -> str:
    """Which of paper A's released experiments left a file, by what only its files hold."""
    for key, experiment in (("m_test", "parity"), ("layer", "normint"), ("eff_lr_E", "efflr"), ("n_layers", "tfgrok"), ("role", "grokfss"),
                            ("group", "tfnormint"), ("n_heads", "tfnoln"), ("norm_before_int", "denserho")):
        if key in data:
            return experiment
    raise ValueError("no experiment of paper A leaves such a file")


def typed(data: dict[str, np.ndarray], key: str, default: float | None = None) -> float:
    """A setting as its author typed it, who stored it in float32."""
    value = scalar(data, key, default)
    return float(str(np.float32(value))) if key in data and data[key].dtype == np.float32 else value


def describe_paper_a(data: dict[str, np.ndarray], label: str, members: tuple[int, ...]) -> Released:
    number, experiment, S = functools.partial(typed, data), paper_a_experiment(data), len(data["T_grok_per_seed"])
    if experiment == "parity":
        raise NotTrained(f"{label} (sparse parity)")
    model = {"tfnoln": "transformer", "tfnormint": "transformer_ln", "tfgrok": "transformer_ln"}.get(experiment, "mlp")
    arm, p, budget, start = str(data.get("arm", "none")), whole(data, "p"), whole(data, "max_steps"), whole(data, "t_int", 0)
    if arm not in PAPER_A_ARMS:
        raise ValueError(f"arm {arm!r}")
    if not (2 <= p <= 1000 and 0 < number("alpha") < 1 and number("lr") > 0 and number("lam") >= 0 and 1 <= S <= 1000 and 0 <= start <= 10**9
            and 1 <= budget <= GRID_LIMIT and data["T_mem_per_seed"].shape == data["T_grok_per_seed"].shape == (S,)):
        raise ValueError("a number is out of its range or an array has the wrong length")
    if not np.array_equal(data["steps"], geometric_grid(budget)):
        raise ValueError("its steps are not paper A's grid")
    w_c, held, scale_once = None, (), ()
    if arm in ("clamp", "rescale"):
        # its sweeps read W_c from a table in full precision; its other runners had a constant
        name = next(key for key in ("wc_group", "wc_used", "wc") if key in data)
        w_c = number(name) if experiment in ("normint", "efflr", "tfnormint") else scalar(data, name)
        groups = ("all", "embed", "attn", "mlp", "unembed")
        held = tuple(number("rho") * w_c * (group == str(data.get("group", "all"))) for group in groups[: 5 if "group" in data else 1])
        if not SMALLEST_NORM <= max(held) <= LARGEST_NORM:
            raise ValueError("the held norm is not positive and finite")
    elif arm == "layer":
        scale_once = tuple(number("f") if chosen else 1.0 for chosen in LAYERS[str(data["layer"])])
    picked = choose(members, S, label)
    grokked = data["T_grok_per_seed"][list(picked)]
    settings_of = {"p": p, "train_frac": number("alpha"), "weight_decay": number("lam"), "lr": number("lr")}
    cell = Cell(label, members=picked, block=S, budget_steps=budget, arm=PAPER_A_ARMS[arm], model=model,
                seed0=paper_a_seed(experiment, **settings_of), rho=number("rho") if held else None, clamp_start=start,
                clamp_stop=start + 1 if arm == "rescale" else None, w_c=w_c, held=(held,) * len(picked) if held else (),
                expected_steps=int(np.where(grokked < 0, budget, grokked).max()), card=Card(), eval_every=0, scale_once=scale_once, **settings_of)
    for key, expected in (("d_model", 128), ("H", 256 if model == "mlp" else 512), ("n_heads", 4), ("n_layers", 1), ("n_train", cell.n_train)):
        if key in data and whole(data, key) != expected:
            raise ValueError(f"{key} is {whole(data, key)}, only {expected} is trained")
    return Released(cell, data["T_mem_per_seed"].astype(int), data["T_grok_per_seed"].astype(int), data["steps"].astype(int), None)


def chosen(config: Config) -> dict[str, Path]:
    """The files to replay by their names below METRICS_DIR, without .npz. Raises UsageError if there are none."""
    root = Path(config.metrics_dir)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; name the folder that holds the released .npz files")
    paths = {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.npz")) if path.is_file()}
    wanted = [label for label in paths if any(fnmatch.fnmatch(text, m) for m in config.match for text in (label, Path(label).name))]
    if not wanted:
        raise UsageError(f"no .npz file below {root} matches {' or '.join(config.match)}; {len(paths)} are there")
    for label in wanted:
        if not label.isprintable():   # a table could not hold it; what is not UTF-8 is not printable
            raise UsageError(f"{label!a}: the name of this file cannot be printed, or is not UTF-8; rename it, or leave it out with --match")
    return {label: paths[label] for label in wanted}


def experiment_of(path: Path) -> str:
    """The folder of a released file: `denserho` of `data/denserho/metrics/x.npz`, `dose` of `metrics/dose/x.npz`."""
    return next((name for name in reversed(path.resolve().parent.parts) if name != "metrics"), "")


def runs_among(paths: dict[str, Path], members: tuple[int, ...]) -> tuple[list[Released], list[str]]:
    """The released cells in `paths`, and what is said of the others, a line a kind. Raises UsageError for one that is damaged, or if none is left."""
    released, no_runs, not_trained = [], [], []
    for label, path in paths.items():
        try:
            released.append(dataclasses.replace(read(path, label, members), experiment=experiment_of(path)))
        except NoRun:
            no_runs.append(label)
        except NotTrained as which:
            not_trained.append(str(which))
    skipped = [f"{len(names)} of {len(paths)} files {what} and are left out: {', '.join(names)[:300]}"
               for what, names in (("are no runs", no_runs), ("cannot be trained yet", not_trained)) if names]
    if not released:
        raise UsageError(f"no released run that can be trained is among the files; {'; '.join(skipped)}")
    return released, skipped


def trunk(item: Released) -> Cell:
    """The free run that a fork left; the same for all arms of one block and fork step."""
    return dataclasses.replace(item.cell, name=f"trunk_p{item.cell.p}_b{item.cell.block}_to{item.fork_step}", arm="free", rho=None, held=(),
                               clamp_start=0, stop_step=item.fork_step, expected_steps=item.fork_step)


def train(desk: Lab, released: list[Released]) -> Result:
    """Whole runs in one stage; then, fork by fork, the free phase once and all its arms from there."""
    result = Result()
    if whole := [item.cell for item in released if not item.fork_step]:
        result += desk.train("replay", whole, deal=True)
    forks: dict[Cell, list[Cell]] = {}
    for item in released:
        if item.fork_step:
            forks.setdefault(trunk(item), []).append(item.cell)
    for i, (before, arms) in enumerate(forks.items()):
        free = desk.train(f"trunk{i}", [before], keep_state=True)
        part = desk.train(f"fork{i}", arms, free.state.fork(arms), deal=True)
        inherit(part.runs, free.runs)
        result += dataclasses.replace(free, runs=[], trajectories=Trajectories()) + part
    return result


def by_cell(rows: Iterable[dict]) -> dict[str, list[dict]]:
    cells: dict[str, list[dict]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    return cells


def compare(released: list[Released], runs: list[dict]) -> list[dict]:
    """One row per run: steps there and here, and the difference of T_grok, censored sides counted at the budget."""
    rows, ours = [], by_cell(runs)
    for item in released:
        for run in ours.get(item.cell.name, ()):
            known, end = there(item, run["member"]), run["budget_steps"]
            difference = (run["t_grok_step"] or end) - (known["t_grok_released"] or end)
            rows.append({"cell": item.cell.name, "member": run["member"], "t_mem_released": known["t_mem_released"], "t_mem": run["t_mem_step"],
                         "t_grok_released": known["t_grok_released"], "t_grok": run["t_grok_step"], "difference_steps": difference,
                         "difference_evaluations": evaluations_between(item.cell, known["t_grok_released"] or end, run["t_grok_step"] or end)})
    return rows


def evaluations_between(cell: Cell, one: int, other: int) -> int:
    """Evaluations of the cell's schedule from step `one` to step `other`, never negative."""
    if cell.eval_every:
        return math.ceil(abs(other - one) / cell.eval_every)
    before, after = np.searchsorted(geometric_grid(cell.budget_steps), [one, other])
    return abs(int(after) - int(before))


def summary(rows: list[dict], budgets: dict[str, int]) -> dict:
    """How many of the compared runs agree, and in what. `largest`: difference of T_grok over the released one, or over the budget."""
    return {"runs": len(rows), "exact_t_mem": sum(r["t_mem"] == r["t_mem_released"] for r in rows),
            "exact_t_grok": sum(r["t_grok"] == r["t_grok_released"] for r in rows),
            "within_one": sum(r["difference_evaluations"] <= 1 for r in rows),
            "largest": max(abs(r["difference_steps"]) / (r["t_grok_released"] or budgets[r["cell"]]) for r in rows),
            "censored_alike": sum((r["t_grok"] is None) == (r["t_grok_released"] is None) for r in rows)}


def table(released: list[Released], rows: list[dict]) -> list[str]:
    """The agreement by experiment, and of all runs in the last line."""
    budgets, ours = {item.cell.name: item.cell.budget_steps for item in released}, by_cell(rows)
    lines = [f"{'experiment':16}{'runs':>6}{'T_mem exact':>13}{'T_grok exact':>14}{'within one':>12}{'largest':>9}{'censored alike':>16}"]
    for experiment in dict.fromkeys(item.experiment for item in released):
        s = summary([row for item in released if item.experiment == experiment for row in ours.get(item.cell.name, ())], budgets)
        lines.append(f"{experiment:16}{s['runs']:6}{s['exact_t_mem']:13}{s['exact_t_grok']:14}{s['within_one']:12}{s['largest']:9.2%}"
                     f"{s['censored_alike']:16}")
    s = summary(rows, budgets)
    return [*lines, f"replayed {s['runs']} runs: T_mem exact in {s['exact_t_mem']}, T_grok exact in {s['exact_t_grok']}, within one logged step in "
                    f"{s['within_one']}, largest difference {s['largest']:.2%}, censored alike {s['censored_alike']}"]


def there(item: Released, m: int) -> dict:
    """What was released of member `m`."""
    t_mem, t_grok = (None if steps[m] < 0 else int(steps[m]) for steps in (item.t_mem, item.t_grok))
    return {"cell": item.cell.name, "member": m, "t_mem_released": t_mem, "t_grok_released": t_grok}


def read_at(item: Released) -> int:
    """The place in `item.steps` nearest the released median T_grok; the last if no member grokked."""
    kept = item.t_grok[item.t_grok >= 0]
    return int(np.abs(item.steps - np.median(kept)).argmin()) if len(kept) else len(item.steps) - 1


def compare_scales(released: list[Released], trajectories: Iterable[dict], rows: list[dict]) -> list[dict]:
    """Per cell: effective logit scale, mean over the members that ran, at the released logged step nearest the released median T_grok.
    The trajectories are walked through once, whatever the number of cells."""
    out, ours, places = [], by_cell(rows), {item.cell.name: read_at(item) for item in released}
    steps = {item.cell.name: item.steps[places[item.cell.name]] for item in released}
    scales: dict[str, list[float]] = {}
    for t in trajectories:
        if t["step"] == steps.get(t["cell"]):
            scales.setdefault(t["cell"], []).append(t["logit_scale"])
    for item in released:
        mine, i, here = ours[item.cell.name], places[item.cell.name], scales.get(item.cell.name, [])
        L = float(np.mean(here)) if len(here) == len(mine) else None
        out.append({"cell": item.cell.name, "n": len(mine), "block": item.cell.block, "exact": sum(r["difference_steps"] == 0 for r in mine),
                    "within_one_evaluation": sum(r["difference_evaluations"] <= 1 for r in mine),
                    "t_mem_equal": sum(r["t_mem"] == r["t_mem_released"] for r in mine),
                    "largest_relative": max(abs(r["difference_steps"]) / (r["t_grok_released"] or item.cell.budget_steps) for r in mine),
                    "step": int(item.steps[i]), "logit_scale_released": None if item.logit_scale is None else float(item.logit_scale[i]),
                    "logit_scale": L})
    return out


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, {}, (), argv)
    paths = chosen(config)
    released, skipped = runs_among(paths, config.members)
    desk = Lab("replay", config, given, {}, inputs=files.digest({item.cell.name: paths[item.cell.name] for item in released}))
    for line in skipped:
        print(f"note: {line}")
    cells = [item.cell for item in released]
    if config.figures_only:
        return desk.redraw(lambda: figures.replay(files.read_csv(desk.out / "replay.csv"), desk.out / "figures"))
    settings.check_size(config.device, ((cell.model, cell.p) for cell in cells))
    console.announce(config, cells, given)
    if config.dry_run:
        return None
    desk.open()
    result = train(desk, released)
    out = desk.out   # one of several ranks leaves here
    rows = compare(released, result.runs)
    scales = compare_scales(released, result.trajectories, rows)
    files.write_csv(out / "replay.csv", rows)
    files.write_csv(out / "cells.csv", scales)
    files.write_csv(out / "trajectories.csv", result.trajectories)
    files.write_csv(out / "runs.csv", [{"experiment": "replay", **r} for r in result.runs], files.RUN_COLUMNS)
    files.write_json(out / "provenance.json", provenance(desk, result))
    for s in scales:
        L = f"{100 * (s['logit_scale'] / s['logit_scale_released'] - 1):+.2f}%" if s["logit_scale"] and s["logit_scale_released"] else "-"
        print(f"{s['cell']}: {s['exact']}/{s['n']} exact, T_mem equal {s['t_mem_equal']}/{s['n']}, "
              f"largest {100 * s['largest_relative']:.2f}%, L {L}" + ("" if s["n"] == s["block"] else " (not all members ran)"))
    figures.replay(rows, out / "figures")
    desk.finish()
    print(f"results in {out}", *table(released, rows), sep="\n")
    return None


if __name__ == "__main__":
    main(run)
