"""The weight norm sets the grokking timescale: paper A (arXiv 2606.13753).

Claims (section of the paper)
  sec 4  free networks grok at a critical norm W_c that varies by 1-2% over seeds and learning rates and grows as p^0.38
  sec 5  held at rho W_c, T_grok grows as exp(alpha rho), alpha = 7.64; the norm moves it about 19x, the learning rate about 2x
  sec 5  rescaling the norm once does nothing of the kind: max/min 1.2 against 7.3 for the sustained clamp
  sec 6  one exponent for all moduli, alpha = 7.49; above rho 1.25 the delay saturates
  abstract  without a clamp the delay has a logarithmic counterpart, ln(V_mem / V_grok)

Verdicts: `stats.claim`. A run that does not grok within its budget is censored there and counts as later; none is dropped.
W_c is the median, over the members that grok, of the norm at their own T_grok in the free control: same p, same block, first of --lrs.

    python exp_delay_law.py                    laptop preset: control and four doses at p=59, 3 members, minutes on 2 cores
    python exp_delay_law.py --preset paper     all tables of the paper; meant for a GPU
    python exp_delay_law.py --model transformer   section 7, parts dense, groups, concentration: see delay_law_transformer.py
    python exp_delay_law.py --parts dense --rhos 0.9 1.1 --members 0 1 2 --out results/mine
"""
if __name__ == "__main__":
    import early
    early.guard()

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

import delay_law_claims as mlp
import delay_law_transformer as transformer
import files
import lab
import plots
import progress
import settings
import stats
from common import CLAMP_START, EVAL_EVERY, Cell, Result, UsageError, exactly, unique
from measured import flag_unlearned

PARTS = ("dense", "matrix", "moduli", "oneshot", "concentration")   # of the MLP; the transformers have parts of their own


@dataclass(frozen=True)
class Config(settings.Config):
    seeds: int = settings.option(16, "block size of the other parts: members drawn from one generator; member 3 of 12 is not member 3 of 8",
                                 parts=("dense", "matrix", "oneshot", "groups"))
    rhos: tuple[float, ...] = settings.option((), "held norms over W_c; default: each part's own", float,
                                              ("dense", "matrix", "moduli", "oneshot", "groups"))
    lrs: tuple[float, ...] = settings.option((1e-3, 2e-3, 4e-3, 8e-3), "learning rates of the matrix, and of the transformers' concentration part; "
                                             "the first is everybody else's", all_of=("matrix", "concentration"))
    train_fracs: tuple[float, ...] = settings.option((), "train fractions of the concentration part; default .30 .35 .40 .50 .65", float,
                                                     ("concentration",))
    weight_decays: tuple[float, ...] = settings.option((), "weight decays of the concentration part; default .3 1 3", float, ("concentration",))
    moduli: tuple[int, ...] = settings.option((31, 41, 53, 59, 71), "moduli of the moduli part; --p replaces them", parts=("moduli",))
    moduli_seeds: int = settings.option(12, "block size of the moduli part", parts=("moduli",))
    free_moduli: tuple[int, ...] = settings.option((29, 41, 59, 79, 97), "moduli of the concentration part; --p replaces them",
                                                   parts=("concentration",))
    free_seeds: int = settings.option(20, "block size of the concentration part", parts=("concentration",))
    group_moduli: tuple[int, ...] = settings.option((71,), "moduli of the transformers' groups part; --p replaces them", parts=("groups",))
    budget: int = settings.option(200_000, "largest step at which a run that has not grokked is censored; cells with a smaller one keep it")

    def offered(self) -> tuple[str, ...]:
        return PARTS if self.model == "mlp" else transformer.PARTS


PRESETS = {
    "smoke": {"parts": ("dense",), "rhos": (0.85, 1.0), "lrs": (8e-3,), "members": (0, 1)},
    "laptop": {"parts": ("dense",), "rhos": (0.85, 0.95, 1.05, 1.15), "members": (0, 1, 2)},
    "paper": {"parts": PARTS},
}
DENSE_RHOS = (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25, 1.30)
MODULI_RHOS = (0.85, 1.00, 1.15)


# ---------------------------------------------------------------- cells

def expected(p: int, rho: float = 1.04, lr: float = 1e-3) -> int:
    """Steps to grok by the papers' own law: for budgets and for the estimate of time, never for a result."""
    return int(4050 * (59 / p) ** 2.3 * math.exp(7.5 * (min(rho, 1.25) - 1)) * (1e-3 / lr) ** 0.4)


def narrowed(config: Config, given: dict) -> Config:
    """`--p` narrows every part. Raises UsageError if a part has no member to train, or is not the model's."""
    if config.budget < EVAL_EVERY:
        raise UsageError(f"--budget must be at least {EVAL_EVERY} steps, where runs are first evaluated; got {config.budget}")
    if config.model != "mlp":
        return transformer.adapted(config, given)
    for part in set(config.parts) - set(PARTS):
        raise UsageError(f"--parts {part} is of the transformers; for the MLP there are {' '.join(PARTS)}")
    if "group_moduli" in given:
        raise UsageError("--group-moduli is read by a part of the transformers only; leave it out, or add --model transformer")
    if {"p", "moduli"} <= set(given) and config.parts == ("moduli",):
        raise UsageError("--p and --moduli both name the moduli of --parts moduli; leave one out")
    if "p" in given:
        config = dataclasses.replace(config, moduli=given.get("moduli", config.p), free_moduli=given.get("free_moduli", config.p))
    if "dense" not in config.parts and "rhos" not in given:
        config = dataclasses.replace(config, rhos=())       # those of a preset are of its own part
    settings.check_members(config, {"moduli": config.moduli_seeds, "concentration": config.free_seeds})
    return config


def common_fields(config: Config, p: int, block: int, lr: float, weight_decay: float = 1.0, train_frac: float = 0.40) -> dict:
    members = config.members or tuple(range(block))
    return dict(p=p, block=block, members=members, model=config.model, seed0=config.seed0, lr=lr, weight_decay=weight_decay,
                train_frac=train_frac, after_grok=config.after_grok)


def name(arm: str, p: int, block: int, lr: float, base_lr: float, rho: float | None = None, wd: float = 1.0, frac: float = 0.40) -> str:
    parts = [arm, f"p{p}", f"b{block}"]
    parts += ["rho" + exactly(rho, ".2f")] if rho is not None else []
    parts += ["lr" + exactly(lr, "g")] if lr != base_lr else []
    parts += ["wd" + exactly(wd, "g")] if wd != 1 else []
    parts += ["frac" + exactly(frac, "g")] if frac != 0.40 else []
    return "_".join(parts)


def free(config: Config, p: int, block: int, lr: float | None = None, wd: float = 1.0, frac: float = 0.40) -> Cell:
    lr = lr or config.lrs[0]
    return Cell(name("free", p, block, lr, config.lrs[0], None, wd, frac), budget_steps=min(config.budget, 60_000 if p >= 59 else 120_000),
                expected_steps=int(1.3 * expected(p, 1, lr) / max(wd, 0.1)), **common_fields(config, p, block, lr, wd, frac))


def clamp(config: Config, p: int, block: int, rho: float, w_c: float, budget: int, lr: float | None = None, arm: str = "clamp") -> Cell:
    lr, start = lr or config.lrs[0], CLAMP_START["ce"]
    fields = common_fields(config, p, block, lr)
    return Cell(name(arm, p, block, lr, config.lrs[0], rho), budget_steps=min(config.budget, budget), arm=arm, rho=rho, w_c=w_c, clamp_start=start,
                clamp_stop=start + 1 if arm == "rescale" else None, held=((rho * w_c, 0.0, 0.0, 0.0),) * len(fields["members"]),
                expected_steps=expected(p, rho if arm == "clamp" else 1.0, lr), **fields)


def dense_budget(rho: float) -> int:
    """8000 steps at rho 0.85, 66000 from 1.25 on."""
    return int(np.clip(8000 * math.exp(7.5 * (min(rho, 2) - 0.85)), 8000, 66_000)) // 1000 * 1000


def control_cells(config: Config) -> list[Cell]:
    """The free cells that give the W_c of held ones."""
    cells = []
    if {"dense", "matrix", "oneshot"} & set(config.parts):
        cells += [free(config, p, config.seeds) for p in config.p]
    if "moduli" in config.parts:
        cells += [free(config, p, config.moduli_seeds) for p in config.moduli]
    return unique(cells)


def other_free_cells(config: Config) -> list[Cell]:
    """The free cells that no other cell needs."""
    cells = []
    if "matrix" in config.parts:
        cells += [free(config, p, config.seeds, lr) for p in config.p for lr in config.lrs[1:]]
    if "concentration" in config.parts:
        block, p0 = config.free_seeds, config.p[0]
        cells += [free(config, p, block) for p in config.free_moduli]
        cells += [free(config, p0, block, frac=frac) for frac in config.train_fracs or (0.30, 0.35, 0.40, 0.50, 0.65)]
        cells += [free(config, p0, block, wd=wd, frac=0.50) for wd in config.weight_decays or (0.3, 1.0, 3.0)]
        cells += [free(config, p0, block, lr=lr, wd=3.0, frac=0.50) for lr in (3e-4, 1e-3, 3e-3)]
    controls = {cell.name for cell in control_cells(config)}
    return [cell for cell in unique(cells) if cell.name not in controls]


def clamp_cells(config: Config, w_c: dict[str, float]) -> list[Cell]:
    """Cells at rho W_c for every part; a part whose control has no W_c is left out (said by `run`)."""
    cells = []
    for p in config.p:
        if (wc := w_c.get(name("free", p, config.seeds, 0, 0))) is not None:
            if "dense" in config.parts:
                cells += [clamp(config, p, config.seeds, rho, wc, dense_budget(rho)) for rho in config.rhos or DENSE_RHOS]
            if "matrix" in config.parts:
                cells += [clamp(config, p, config.seeds, rho, wc, 30_000 if rho < 1.30 else 160_000, lr)
                          for rho in config.rhos or (0.85, 1.00, 1.15, 1.30) for lr in config.lrs]
            if "oneshot" in config.parts:
                rhos = config.rhos or (0.70, 0.85, 1.00, 1.15, 1.30)
                cells += [clamp(config, p, config.seeds, rho, wc, 15_000, arm="rescale") for rho in rhos]
    if "moduli" in config.parts:
        for p in config.moduli:
            if (wc := w_c.get(name("free", p, config.moduli_seeds, 0, 0))) is not None:
                rhos = config.rhos or ((*MODULI_RHOS, 1.30) if p in (41, 59) else MODULI_RHOS)
                cells += [clamp(config, p, config.moduli_seeds, rho, wc, 60_000 if rho <= 1.0 else 160_000) for rho in rhos]
    return unique(cells)


# ---------------------------------------------------------------- run

def write(desk: lab.Lab, result: Result, trained: bool) -> None:
    """Tables, figures and summary from the rows alone; `--figures-only` comes here with the rows of OUT/runs.csv."""
    runs, out, config = [{"experiment": "delay_law", **run} for run in result.runs], desk.out, desk.config
    if trained:
        if config.model != "mlp":
            flag_unlearned(runs, result.trajectories)
        files.write_csv(out / "runs.csv", runs, files.RUN_COLUMNS)
        files.write_csv(out / "trajectories.csv", result.trajectories)
        files.write_json(out / "provenance.json", lab.provenance(desk, result))
    runs, trajectories = files.read_runs(out / "runs.csv"), []              # read back, so that both ways see the same digits
    if (out / "trajectories.csv").exists():
        trajectories = files.read_csv(out / "trajectories.csv")
        files.write_csv(out / "cells.csv", stats.cell_rows(runs, trajectories))
        files.write_csv(out / "contraction.csv", mlp.contraction(runs, trajectories))
    contracted = files.read_csv(out / "contraction.csv")                    # a run of record may come without its long trajectories
    claims, fits, found = transformer.measure(runs, config) if config.model != "mlp" else (*mlp.measure(runs, config), [])
    known = stats.published(lab.ROOT / "published.csv", "A.")
    answered = [claims.get(key) or stats.claim(row, None) for key, row in known.items()]
    found += mlp.findings(runs, fits, contracted, files.read_csv(out / "cells.csv"))
    files.write_summary(out, answered, found)
    print(stats.table(answered))
    for finding in found:
        print(f"{finding['id']}: {finding['ours']} ({finding['lo']} to {finding['hi']}; n {finding['n']}) {finding['quantity']}")
    for key, fit in fits.items():
        if isinstance(fit, dict):
            e, lo, hi = fit["alpha"]
            rhos = " ".join(f"{rho:g}" for rho in fit["rhos"])
            print(f"{key}: alpha = {e:.2f}, 95% interval {lo:.2f} to {hi:.2f}, R2 = {fit['r2']:.4f}, rho {rhos}")
    figures = out / "figures"
    medians = {"mlp": "A.dense.rho", "transformer": "A.tf.rho"}.get(config.model, "none")
    for block, moduli, prefix, published in ((config.seeds, config.p, "dense", medians),
                                             (config.moduli_seeds, config.moduli, "moduli", "A.pscan.p{p}.rho")):
        if prefix == "moduli" and "moduli" not in config.parts:
            continue
        mine = [r for r in runs if r["block"] == block and r["p"] in moduli
                and (r["lr"], r["weight_decay"], r["train_frac"]) == (config.lrs[0], 1, 0.40)]
        total = [r for r in mine if r["arm"] != "clamp" or r["held_norm"] is not None]     # without the clamps of single groups
        if any(r["arm"] == "clamp" for r in total):
            plots.dose(total, "clamp", "Delay law", figures, prefix, fits, prefix, published)
        if any(r["arm"] == "rescale" for r in mine):
            plots.dose(mine, "rescale", "One rescale at step 500", figures, "oneshot", fits, prefix, published)
    for p in config.group_moduli if "groups" in config.parts else ():
        mine = [r for r in runs if r["p"] == p and (r["arm"] == "free" or r["held_norm"] is None)]
        if any(r["arm"] == "clamp" for r in mine):
            plots.groups(mine, transformer.GROUPS, figures, f"groups_p{p}")
    for p in config.p if "matrix" in config.parts else ():
        if any(r["arm"] == "clamp" and r["p"] == p for r in runs):
            plots.matrix([r for r in runs if r["p"] == p and r["block"] == config.seeds], figures, f"matrix_p{p}")
    if any(r["norm_at_grok"] is not None for r in runs if r["arm"] == "free"):
        for group in ("",) if config.model == "mlp" else ("", "unembed"):
            plots.critical_norm(runs, figures, group)
    if contracted:
        plots.contraction(contracted, figures)
    if trajectories:
        plots.trajectories(trajectories, figures)
    print(f"results in {out}")


def run(argv: list[str]) -> None:
    config, given = settings.parse(Config, PRESETS, (*PARTS, "groups"), argv)
    config = narrowed(config, given)
    desk = lab.Lab("delay_law", config, given, PRESETS)
    if config.figures_only:
        return desk.redraw(lambda: write(desk, Result(), trained=False))
    controls, others, held = (control_cells(config), other_free_cells(config), clamp_cells) if config.model == "mlp" else (
        transformer.control_cells(config), transformer.other_free_cells(config), transformer.clamp_cells)
    guess = {c.name: 54.8 * (c.p / 59) ** 0.4 for c in controls}   # for the dry run's list only; the real W_c comes from the control
    progress.announce(config, [*controls, *others, *held(config, transformer.guess(controls) if config.model != "mlp" else guess)], given)
    if config.dry_run:
        return None
    desk.open()
    result = desk.train("control", controls)
    w_c = stats.critical_norms(result.runs) if config.model == "mlp" else transformer.critical_norms(result.runs)
    for cell in controls:
        if cell.name not in w_c:
            print(f"{cell.name}: no member grokked within {cell.budget_steps} steps: no W_c, so the cells held relative to it are not run")
        else:
            print(f"{cell.name}: W_c = {w_c[cell.name]:.2f}" if config.model == "mlp" else
                  f"{cell.name}: norms at own T_grok " + ", ".join(f"{group or 'total'} {norm:.2f}" for group, norm in w_c[cell.name].items()))
    result += desk.train("cells", [*others, *held(config, w_c)], deal=True)
    write(desk, result, trained=True)
    desk.finish()
    return None


if __name__ == "__main__":
    lab.main(run)
