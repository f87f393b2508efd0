"""Same-state forks: one state in every arm, the clamp acting at once, a free arm that is the unforked run; bad input; planted rows."""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import exp_fork
import exp_replay
from common import Cell, UsageError
from kernels.layout import mlp_layout
from lab import desk, figures, files, released
from lab.answers import Table
from lab.ensemble import Ensemble
from lab.state import State

# p=13 at this learning rate memorises by step 50 and groks none of these members within 250 steps
CELL = Cell("trunk", p=13, members=(0, 1, 2), block=4, budget_steps=250, lr=3e-3, stop_step=100, width=(32, 64))
LAYOUT = mlp_layout(13, 32, 64)
CONFIG = exp_fork.Config(parts=exp_fork.ARMS, p=(13,), seeds=4, seed0=0, members=(0, 1, 2), lr=3e-3, budget=250, fork_steps=(100,), width=(32, 64))


def train(cells: list[Cell], start: State | None = None) -> Ensemble:
    ensemble = Ensemble(cells, "cpu", "eager", torch.float32, "ieee", start)
    ensemble.train(lambda _: None)
    return ensemble


@pytest.fixture(scope="module")
def trunk() -> State:
    return train([CELL]).result().state


def rows(state: State, arm: int) -> State:
    return state.pick([3 * arm, 3 * arm + 1, 3 * arm + 2])


def arms(trunk: State) -> dict[str, Cell]:
    return {cell.arm: cell for cell in exp_fork.arm_cells(CONFIG, 13, 100, trunk.norms(LAYOUT))}


def test_every_arm_starts_from_the_same_bits(trunk: State) -> None:
    """`free` and `same`: parameters, moments, step. `raised`, `lowered`: weights scaled at once to rho N0 and N0 / rho, the rest equal."""
    cells = arms(trunk)
    assert tuple(cells) == exp_fork.ARMS and trunk.step.tolist() == [100] * 3
    before = trunk.pick([0, 1, 2])
    forked = trunk.fork([*cells.values()])
    assert forked.step.tolist() == [100] * 12 and len(forked.params) == 12
    n = LAYOUT.n_weights
    for i, arm in enumerate(cells):
        mine = rows(forked, i)
        assert torch.equal(mine.moment1, trunk.moment1) and torch.equal(mine.moment2, trunk.moment2)
        assert torch.equal(mine.params[:, n:], trunk.params[:, n:])
        factor = {"lowered": 1 / 1.15, "raised": 1.15}.get(arm, 1.0)
        assert torch.equal(mine.params, trunk.params) == (factor == 1)
        # the ratio and each product are rounded once: half an ulp of float32 each
        assert mine.norms(LAYOUT) == pytest.approx([factor * norm for norm in trunk.norms(LAYOUT)], rel=torch.finfo(torch.float32).eps)
    forked.params.zero_()
    forked.moment1.zero_()
    assert torch.equal(trunk.params, before.params) and torch.equal(trunk.moment1, before.moment1)   # a copy, not a view


def test_a_free_arm_is_the_unforked_run_and_the_others_hold_their_norm(trunk: State) -> None:
    cells = arms(trunk)
    ended = train([*cells.values()], trunk.fork([*cells.values()]))
    unforked = train([dataclasses.replace(CELL, stop_step=0)])
    free = rows(ended.state, list(cells).index("free"))
    assert set(ended.step) == set(unforked.step) == {250}
    assert all(torch.equal(getattr(free, k), getattr(unforked.state, k)) for k in ("params", "moment1", "moment2"))
    logged = {(r["cell"], r["member"], r["step"]): r for r in ended.result().trajectories}
    for run in unforked.result().trajectories:
        if run["step"] == 200:
            assert logged[cells["free"].name, run["member"], 200] | {"cell": ""} == run | {"cell": ""}
    for arm, factor in (("lowered", 1 / 1.15), ("same", 1.0), ("raised", 1.15)):
        for m, norm in enumerate(trunk.norms(LAYOUT)):
            for step in (101, 200):   # the first step after the fork is held already
                assert logged[cells[arm].name, m, step]["norm"] == pytest.approx(factor * norm, rel=torch.finfo(torch.float32).eps)


def test_both_sides_of_a_fork_take_the_same_kernels() -> None:
    """With --backend auto a trunk is short and its arms are long; were the choice by length, `free` would not be the unforked run."""
    long = dataclasses.replace(CELL, p=59, budget_steps=60_000, stop_step=25)
    if not desk.has_compiler():
        pytest.skip("no C++ compiler here: auto is always eager")
    assert Ensemble([long], "cpu", "auto", torch.float32, "ieee").backend == "compiled"


TINY = ["--seed0", "0", "--p", "13", "--seeds", "4", "--members", "0", "1", "--lr", "3e-3", "--budget", "250", "--backend", "eager", "--width", "32",
        "64"]


@pytest.mark.parametrize("flags, message", [
    ("--fork-steps 810", "--fork-steps must be multiples of 25, where runs are evaluated; got 810"),
    ("--fork-steps 0", "--fork-steps must be > 0"),
    ("--fork-steps 60000", "--fork-steps 60000 leaves no step to train before the budget; it must be below --budget 60000"),
    ("--rho 0", "--rho must be > 0, got 0"),
    ("--rho -1.15", "--rho must be > 0"),
    ("--rho 0.9", "--rho must be above 1, got 0.9"),
    ("--lr 0", "--lr must be > 0"),
    ("--parts sideways", "--parts must be among lowered free same raised, got 'sideways'"),
    ("--twin-of nowhere", "cannot read nowhere/runs.csv: No such file or directory; train first, or name the folder with --twin-of"),
    (" ".join([*TINY, "--fork-steps", "25"]), "--fork-steps 25: member 0 of p=13 has not memorised there yet; choose a later step"),
    (" ".join([*TINY, "--fork-steps", "100", "--lr", "1e30"]), "member 0 of p=13 diverged before it"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, flags: str, message: str) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(UsageError) as error:
        exp_fork.run([*flags.split(), "--out", str(out)])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not out.parent.exists()


def test_a_fork_after_grokking_is_refused_and_a_folder_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.book.CROSSINGS", (("train_accuracy", 0.99), ("test_accuracy", 0.0), ("test_accuracy", 0.0), ("test_accuracy", 0.95)))
    with pytest.raises(UsageError, match="--fork-steps 100: 2 of 2 members of p=13 have grokked there, the first at 25; choose an earlier step"):
        exp_fork.run([*TINY, "--fork-steps", "100", "--out", str(tmp_path)])
    assert tmp_path.exists() and not list(tmp_path.iterdir())


def test_two_fork_steps_end_to_end_and_a_float64_twin(tmp_path: Path, trunk: State, capsys: pytest.CaptureFixture) -> None:
    """None groks within this budget: every row is there, censored, with what it crossed before its fork."""
    out, wide = tmp_path / "a", tmp_path / "b"
    flags = [*TINY, "--fork-steps", "150", "100", "--rho", "1.15", "1.05"]
    exp_fork.run([*flags, "--out", str(out)])
    assert "a GPU would run: preset paper on cuda" in capsys.readouterr().out
    runs = files.read_csv(out / "runs.csv")
    assert len(runs) == 2 * 2 * (2 + 2 * 2) and {(r["fork_step"], r["censored"], r["delay_steps"]) for r in runs} == {(100, 1, None), (150, 1, None)}
    assert all(r["t_mem_step"] < 100 and r["steps_run"] == 250 for r in runs)
    for r in runs:
        factor = {"free": None, "same": 1.0}.get(r["arm"], r["rho"] if r["arm"] == "raised" else 1 / (r["rho"] or 1))
        assert r["held_norm"] == (factor and pytest.approx(factor * r["norm_at_fork"], rel=1e-8))   # 9 digits in the file
        assert r["clamp_start"] == (factor and r["fork_step"] + 1)
    cell = arms(trunk)["raised"]   # the weights were scaled before the first step, not only held after it: the loss there tells
    logged = {(r["cell"], r["member"], r["step"]): r["test_loss"] for r in files.read_csv(out / "trajectories.csv")}
    for r in train([cell], trunk.fork([cell])).result().trajectories:
        assert r["member"] == 2 or logged[cell.name, r["member"], r["step"]] == pytest.approx(r["test_loss"], rel=1e-8)
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["claims"] and not (out / "checkpoint").exists()
    assert summary["provenance"]["run_steps"] == 2 * 150 + 2 * 6 * (100 + 150)   # the free phase once, then six arms from each fork
    assert {p.name for p in (out / "figures").glob("*.png")} == {
        "ratio_over_fork_step.png", "ratio_over_rho.png",
        *(f"{kind}_p13_fork{step}_rho{rho}.png" for kind in ("arms", "trajectories") for step in (100, 150) for rho in (1.05, 1.15))}
    twin = [*TINY, "--dtype", "float64", "--parts", "raised", "--twin-of", str(out), "--out", str(wide)]
    with pytest.raises(UsageError, match="has none of these arms and members; it has lowered_p13_b4_fork100"):
        exp_fork.run([*twin, "--fork-steps", "75"])
    assert not wide.exists()
    exp_fork.run([*twin, "--fork-steps", "100"])
    found = json.loads((wide / "summary.json").read_text())["findings"]
    assert [f["id"] for f in found if f["id"].startswith("twin.")] == ["twin.raised_p13_b4_fork100_rho1.15"]
    before = (out / "cells.csv").read_bytes()
    exp_fork.run([*flags, "--out", str(out), "--figures-only"])
    assert (out / "cells.csv").read_bytes() == before


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)


def test_stopped_inside_the_arms_and_continued_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    flags = [*TINY, "--fork-steps", "100", "150"]
    exp_fork.run([*flags, "--out", str(tmp_path / "a")])
    whole = desk.Progress.__call__

    def stopping(self: desk.Progress, ensemble: Ensemble) -> None:
        if self.stage == "arms_p13" and (ensemble.step >= 175).any():
            raise KeyboardInterrupt
        whole(self, ensemble)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(desk.Progress, "__call__", stopping)
        exp_fork.run([*flags, "--out", str(tmp_path / "b")])
    assert (tmp_path / "b" / "checkpoint" / "arms_p13.pt").exists() and not (tmp_path / "b" / "runs.csv").exists()
    exp_fork.run([*flags, "--out", str(tmp_path / "b")])
    for name in ("runs.csv", "trajectories.csv", "cells.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_fork_step_alone_gives_the_rows_that_it_gives_in_one_ensemble_with_another(tmp_path: Path, no_figures: None) -> None:
    for name, steps in (("both", ("100", "150")), ("late", ("150",))):
        exp_fork.run([*TINY, "--fork-steps", *steps, "--out", str(tmp_path / name)])
    both, late = (files.read_csv(tmp_path / name / "runs.csv") for name in ("both", "late"))
    assert [run for run in both if run["fork_step"] == 150] == late and len(both) == 2 * len(late)
    logs = [[row for row in files.read_csv(tmp_path / name / "trajectories.csv") if "fork150" in row["cell"]] for name in ("both", "late")]
    assert logs[0] == logs[1] and {row["step"] for row in logs[0]} >= {151, 200}


def test_smoke_preset_groks_in_every_arm_later_at_a_higher_norm(tmp_path: Path) -> None:
    exp_fork.run(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "s")])
    runs = files.read_csv(tmp_path / "s" / "runs.csv")
    delays = {(r["arm"], r["member"]): r["delay_steps"] for r in runs}
    assert all(r["delay_steps"] == r["t_grok_step"] - r["fork_step"] > 0 for r in runs)
    assert len(delays) == 8 and all(delays["lowered", m] < delays["same", m] < delays["raised", m] for m in (0, 1))


RUN = {"model": "mlp", "loss": "ce", "p": 59, "train_frac": 0.4, "block": 12, "tau": 1, "gamma": None, "lr": 1e-3, "weight_decay": 1,
       "budget_steps": 60_000, "seed0": 1000, "t_mem_step": 175, "norm_at_grok": None}   # whole numbers are read back from runs.csv as such
PUBLISHED = {"lowered": 1525, "free": 4225, "same": 7200, "raised": 24162}


def planted(arm: str, delays: list[float], step: int = 800, rho: float = 1.15) -> list[dict]:
    return [{**RUN, "cell": f"{arm}{step}{rho}", "member": m, "arm": arm, "fork_step": step, "rho": rho if arm in exp_fork.SCALED else None,
             "delay_steps": None if math.isinf(d) else d, "t_grok_step": None if math.isinf(d) else step + d} for m, d in enumerate(delays)]


def measured(runs: list[dict], **config: object) -> Table:
    table = Table(runs)
    exp_fork.measure(table, exp_fork.Config(parts=exp_fork.ARMS, **config), {"cells.csv": []})
    return table


def found(table: Table) -> dict[str, dict]:
    return {finding["id"]: finding for finding in table.findings}


def test_claims_and_findings_of_planted_rows() -> None:
    seeds = np.linspace(0.99, 1.01, 12)   # a factor per member, shared by its arms
    runs = [run for arm in exp_fork.ARMS for run in planted(arm, [*(PUBLISHED[arm] * seeds)])]
    table = measured(runs)
    assert {key: claim["verdict"] for key, claim in table.claims.items()} == {f"B.fork.p59.{x}": "REPLICATED" for x in (*exp_fork.ARMS, "ratio")}
    ratio = table.claims["B.fork.p59.ratio"]
    assert ratio["ours"] == pytest.approx(24162 / 7200, rel=1e-3) and ratio["hi"] / ratio["lo"] < 1.001   # paired: the members' factor cancels
    assert found(table)["ordering.p59.fork800.rho1.15"]["ours"] == 1
    assert found(table)["same_over_free.p59.fork800.rho1.15"]["ours"] == pytest.approx(7200 / 4225, rel=1e-3)
    assert table.law == ["delay raised / same, p=59, fork at step 800, rho 1.15 = 3.356 [3.356, 3.356], paper 3.36: REPLICATED, "
                         "12 networks, 0 censored"]


@pytest.mark.parametrize("changed", [{"lr": 2e-3}, {"fork_step": 400}, {"weight_decay": 2}, {"model": "transformer"}])
def test_arms_of_another_condition_answer_no_published_number(changed: dict) -> None:
    runs = [run | changed for arm in exp_fork.ARMS for run in planted(arm, [PUBLISHED[arm]] * 12)]
    assert not measured(runs).claims


def test_arms_at_nearly_the_published_rho_are_kept_and_answer_nothing() -> None:
    near, exact = ([run for arm in exp_fork.SCALED for run in planted(arm, [PUBLISHED[arm]] * 12, rho=rho)] for rho in (1.154, 1.15))
    same = planted("same", [PUBLISHED["same"]] * 12)
    assert set(measured([*near, *same]).claims) == {"B.fork.p59.same"}
    table = measured([*near, *exact, *same], rho=(1.15, 1.154))
    assert set(table.claims) == {"B.fork.p59.lowered", "B.fork.p59.raised", "B.fork.p59.same", "B.fork.p59.ratio"}
    assert {"raised_over_same.p59.fork800.rho1.15", "raised_over_same.p59.fork800.rho1.154"} <= set(found(table))
    assert table.law[1] == "delay raised / same, p=59, fork at step 800, rho 1.154 = 3.356 [3.356, 3.356], 12 networks, 0 censored"


def test_a_censored_member_counts_as_late_and_not_as_in_order() -> None:
    late = math.inf
    table = measured([*planted("lowered", [10, 10, 30]), *planted("free", [20, 20, 20]), *planted("same", [30, late, 40]),
                      *planted("raised", [late] * 3)])
    order = found(table)["ordering.p59.fork800.rho1.15"]
    assert order["ours"] == pytest.approx(1 / 3, abs=1e-6) and order["n_censored"] == 4   # member 1: same and raised both open
    assert found(table)["raised_over_same.p59.fork800.rho1.15"]["ours"] is None
    assert found(table)["lowered_over_same.p59.fork800.rho1.15"]["ours"] == 0.25
    raised = table.claims["B.fork.p59.raised"]
    assert raised["verdict"] == "INCONCLUSIVE" and raised["n"] == raised["n_censored"] == 3


def fork_file(arm: str, /, **changed: object) -> dict:
    """A fork as released, of p=13: two of a block of two, forked at step 100."""
    norms = np.array([30.0, 31.0], dtype=np.float32)
    data = dict(arm=arm, p=13, rho=1.15, t_fork=100, n_seed=2, alpha=0.4, lr=3e-3, lam=1.0, T_mem_per_seed=np.array([50, 50]),
                T_grok_per_seed=np.array([-1, -1]), N0=norms, target=0 * norms if arm == "free" else norms,
                steps=np.array([101.0, 200.0]), logit_scale=np.ones(2))
    return {k: v for k, v in {**data, **changed}.items() if v is not None}


def test_released_forks_share_their_free_phase_and_hold_the_released_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "FORK_BUDGET", 250)
    for arm in ("free", "clamp_raised"):
        np.savez(tmp_path / f"{arm}.npz", **fork_file(arm))
    exp_replay.run([str(tmp_path), "--out", str(tmp_path / "r"), "--backend", "eager"])
    runs = files.read_csv(tmp_path / "r" / "runs.csv")
    assert [(r["cell"], r["arm"], r["held_norm"]) for r in runs] == [
        ("clamp_raised", "raised", 30), ("clamp_raised", "raised", 31), ("free", "free", None), ("free", "free", None)]
    assert all(r["t_mem_step"] < 100 for r in runs)
    assert files.read_json(tmp_path / "r" / "provenance.json")["run_steps"] == 2 * 100 + 4 * 150
    assert [row["difference_steps"] for row in files.read_csv(tmp_path / "r" / "replay.csv")] == [0] * 4


@pytest.mark.parametrize("changed, message", [
    ({"arm": "clamp_sideways"}, "fork arm 'clamp_sideways'"),
    ({"target": None}, "lacks target"),
    ({"target": np.array([30.0, 0.0])}, "held norm is not positive"),
    ({"target": np.array([30.0, np.nan])}, "held norm is not positive"),
    ({"N0": np.ones(3)}, "wrong length"),
    ({"t_fork": 110}, "out of its range"),
    ({"t_fork": 60_000}, "out of its range"),
    ({"t_fork": 25}, "had not memorised, or had grokked, at the fork"),
    ({"T_grok_per_seed": np.array([75, -1])}, "had not memorised, or had grokked, at the fork"),
])
def test_foreign_forks_are_refused_in_one_line(tmp_path: Path, changed: dict, message: str) -> None:
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "bad.npz", **fork_file("clamp_raised", **changed))
    with pytest.raises(UsageError) as error:
        exp_replay.run([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert "bad" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
