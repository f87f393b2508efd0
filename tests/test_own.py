"""The papers' own networks: cells made from the published rows, the flags that narrow them, and the numbers that planted runs of them answer."""
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

import exp_delay_law
import exp_fork
import exp_logit_scale
import exp_transformer
from common import Cell, Result, UsageError
from lab import answers, files, own, released, settings, stats
from lab.answers import Table, published
from lab.result import Trajectories

SHARES = {p: (0.15, 0.64, 0.21) for p in (59, 97)}


def cells_of(experiment: object, flags: str) -> list[Cell]:
    parts = experiment.ARMS if experiment is exp_fork else experiment.PARTS
    config, given = settings.parse(experiment.Config, experiment.PRESETS, parts, flags.split())
    if experiment is exp_fork:
        return [cell for command in exp_fork.kinds(config, given) for cell in exp_fork.planned(command)]
    config = experiment.checked(config, given)
    if experiment is not exp_logit_scale:
        return experiment.own_cells(config, given)
    rows, members = exp_logit_scale.own_rows(config, given), given.get("members", ())
    return [*itertools.chain(*exp_logit_scale.own_cells(rows, members)), *exp_logit_scale.own_allocations(rows, members, SHARES)]


def rows(cell: Cell, grok: list, **more: object) -> list[dict]:
    """A row of runs.csv for each of `grok`, as a run of `cell` leaves it."""
    same = ("p", "block", "arm", "rho", "tau", "gamma", "lr", "train_frac", "weight_decay", "model", "loss", "seed0", "w_c", "networks", "group",
            "budget_steps")
    run = {"cell": cell.name, "held_norm": cell.held[0][0] or None if cell.held else None, "dtype": cell.dtype or "float32", "t_mem_step": 175,
           "norm_at_grok": 50.0, "norm_at_end": 50.0, **{name: getattr(cell, name) for name in same}, **more}
    return [{**run, "member": m, "t_grok_step": t, "censored": int(t is None)} for m, t in enumerate(grok)]


@pytest.mark.parametrize(("experiment", "flags", "n"), [
    (exp_delay_law, "", None), (exp_logit_scale, "", None), (exp_fork, "", 10), (exp_transformer, "", 11),
    (exp_transformer, "--model transformer_ln", 31), (exp_transformer, "--model transformer_b", 6)])
def test_cells_of_the_papers_have_their_own_names_norms_seeds_and_protocols(experiment: object, flags: str, n: int | None) -> None:
    cells = cells_of(experiment, f"--preset paper --networks published {flags}")
    assert len({cell.name for cell in cells}) == len(cells) and len(cells) == (n or len(cells)) and len(cells) >= 6
    for cell in cells:
        assert cell.networks != "fresh" and cell.name.startswith(f"{cell.networks}_") and cell.members == tuple(range(cell.block))
        if cell.networks == "B":
            assert cell.seed0 == 0 and cell.decay_last and cell.card is None and cell.eval_every in (25, 50)
        else:
            assert cell.card and cell.eval_every == 0 and not cell.decay_last and cell.seed0 > 0
        if cell.arm == "clamp":
            assert sum(cell.held[0]) == pytest.approx(cell.rho * cell.w_c) and len(cell.held) == len(cell.members)


@pytest.mark.parametrize(("experiment", "flags", "names"), [
    (exp_logit_scale, "--p 59 --parts mediation --taus 1.7", {"B_free_p59_b12", "B_clamp_p59_b12_rho1", "B_clamp_p59_b12_rho1.15",
                                                              "B_clamp_p59_b12_rho1.15_tau1.7"}),
    (exp_logit_scale, "--p 59 --parts grid --rhos 1.05 --taus 1.3", {"B_clamp_p59_b12_rho1.05", "B_clamp_p59_b12_rho1.05_tau1.3"}),
    (exp_logit_scale, "--p 59 --parts dose --rhos 1.2", {"B_free_p59_b16", "B_clamp_p59_b16_rho1.2"}),
    (exp_logit_scale, "--parts audit --audit-cells 1.25 --audit-dtypes float64", {"B_clamp_p59_b8_rho1.25_float64"}),
    (exp_logit_scale, "--p 97 --parts allocation --gammas 0.3", {"B_free_p97_b12", "B_alloc_p97_b12_rho1_gamma0.3"}),
    (exp_logit_scale, "--lr 0.002", set()), (exp_logit_scale, "--p 61", set()),
    (exp_fork, "--p 59 113 --parts free", {"B_trunk_p59_b12_to800", "B_free_p59_b12_fork800"}),
    (exp_fork, "--fork-steps 400", set()), (exp_fork, "--lr 0.002", set()), (exp_fork, "--model transformer_ln", set()),
    (exp_transformer, "--parts temperature --taus 1.5", {"B_clamp_p59_b12_rho1", "B_clamp_p59_b12_rho1.15", "B_clamp_p59_b12_rho1.15_tau1.5"}),
    (exp_transformer, "--parts dense --rhos 1.2", {"tfnoln_long_free_p59_b16", "tfnoln_free_p59_b16", "tfnoln_long_clamp_p59_b16_rho1.2"})])
def test_flags_narrow_the_papers_cells(experiment: object, flags: str, names: set[str]) -> None:
    assert {cell.name for cell in cells_of(experiment, f"--networks published {flags}")} == names


def test_members_apply_to_all_but_the_control_that_gives_an_allocation_its_shares() -> None:
    cells = {cell.name: cell for cell in cells_of(exp_logit_scale, "--networks published --parts allocation audit --p 59 --members 1")}
    assert cells.pop("B_free_p59_b12").members == tuple(range(12)) and {cell.members for cell in cells.values()} == {(1,)}
    assert {cell.eval_every for cell in cells.values() if cell.arm == "clamp"} == {50}


@pytest.mark.parametrize("experiment", [exp_delay_law, exp_logit_scale, exp_fork, exp_transformer])
def test_no_published_condition_is_said_in_one_line(experiment: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--networks published: the paper ran none of these conditions"):
        experiment.run(["--networks", "published", "--p", "61", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_shares_of_an_allocation_are_of_the_mean_norms_at_the_last_logged_step() -> None:
    log = [{"cell": "B_free", "member": m, "step": step, "norm_E": E + 400 - step, "norm_W1": 40.0, "norm_W2": 20.0}
           for step in (1, 200, 400) for m, E in enumerate((19.0, 21.0))]
    shares = own.shares_at_end(Result([{"cell": "B_free", "p": 59}], Trajectories(lambda: log)))[59]
    assert shares == pytest.approx((400 / 2400, 1600 / 2400, 400 / 2400))
    (row,) = own.under(published("B.alloc.p59.g+0.0.T_grok").values())
    total, *groups = own.cell(row, (0,), exp_logit_scale.allocated(1.0, 0.0, shares)[1:]).held[0]
    assert total == 0 and groups == pytest.approx([54.4893 * share**0.5 for share in shares], rel=1e-9)


def test_planted_runs_of_the_papers_networks_reproduce_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the members that grok; with members missing PARTLY RUN; no findings, which are of fresh networks."""
    monkeypatch.setattr(stats, "RESAMPLES", 100)
    values = {row["id"]: row["value"] for row in published("B.").values()}
    flags = "--preset paper --networks published --parts mediation grid dose audit allocation"
    config, _ = settings.parse(exp_logit_scale.Config, exp_logit_scale.PRESETS, exp_logit_scale.PARTS, flags.split())
    cells = cells_of(exp_logit_scale, flags)
    for members, verdict in ((12, "REPRODUCED"), (3, "PARTLY RUN")):
        runs = []
        for cell in cells:
            row = next((row for row in exp_logit_scale.PUBLISHED if row["statistic"] == "T_grok" and row["arm"] and row["value"]
                        and own.cell(row, (), (1, 1, 1) if row["arm"] == "alloc" else ()).name == cell.name), None)
            T = int(row["value"]) if row else 4000
            runs += rows(cell, [T] * (min(members, cell.block) - 1) + [None if cell.gamma == 0.6 else T])
        table = Table(runs, networks="published")
        exp_logit_scale.measure(table, config, {})
        assert not table.findings
        for key in ("B.med.ce.p59.T1", "B.med.ce.p97.ratio", "B.alloc.p59.g+0.6.T_grok", "B.grid.p97.rho1.10.tau1.30.T_grok"):
            assert table.claims[key]["published"] == values[key]
            assert table.claims[key]["verdict"] == verdict or (key.endswith("ratio") and members == 3), key
        assert {part for part, _, _ in exp_logit_scale.ran(table, config)} == {"mediation", "grid", "dose", "audit", "allocation"}


def test_planted_forks_of_the_papers_networks_reproduce_their_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 100)
    delays, runs = {"lowered": 1525, "free": 4225, "same": 7200, "raised": 24162}, []
    for cell in cells_of(exp_fork, "--networks published --p 59"):
        if not cell.stop_step:
            late = delays[cell.arm]
            runs += rows(cell, [late + 800] * 12, fork_step=800, delay_steps=late)
    table = Table(runs, networks="published")
    exp_fork.measure(table, exp_fork.Config(networks=("published",), parts=exp_fork.ARMS), {"cells.csv": []})
    assert {key: claim["verdict"] for key, claim in table.claims.items()} == {
        f"B.fork.p59.{key}": "REPRODUCED" for key in (*exp_fork.ARMS, "ratio")}
    assert not table.findings and [name for *_, name in exp_fork.forks(table, exp_fork.Config())] == ["p59.fork800.rho1.15"]
    assert table.law == ["delay raised / same, p=59 = 3.356 [3.356, 3.356], paper 3.36: REPRODUCED, 24 of the paper's own networks, 0 censored"]


def test_planted_transformers_of_paper_a_answer_by_their_own_set_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 100)
    for flags, wanted in (("", {"A.tf.rho1.00": 6608, "A.tfshort.clamp_rho1.00": 6739}), ("--model transformer_ln", {"A.ln.unembed1.3": 3727.5})):
        words = f"--preset paper --networks published {flags}".split()
        config = exp_transformer.checked(*settings.parse(exp_transformer.Config, exp_transformer.PRESETS, exp_transformer.PARTS, words))
        value = {own.cell(row, ()).name: row["value"] for row in published("A.").values()
                 if row["statistic"] == "T_grok" and row["arm"] and row["model"] == config.model and row["experiment"] in own.BUDGETS}
        runs = []
        for cell in cells_of(exp_transformer, " ".join(words)):
            held = {f"held_{cell.group}": cell.rho * cell.w_c} if cell.group else {}
            runs += rows(cell, [value.get(cell.name)] * cell.block, norm_unembed_at_grok=10.0, **held)
        table = Table(runs, networks="published")
        exp_transformer.measure(table, config, {"cells.csv": [], "contraction.csv": []})
        exp_transformer.draw(table, config, tmp_path / config.model, [], {"contraction.csv": []})
        assert not table.findings and {key: table.claims[key]["ours"] for key in wanted} == wanted
        assert {table.claims[key]["verdict"] for key in wanted} == {"REPRODUCED"}
    assert table.claims["A.ln.total_cv"]["verdict"] == "PARTLY RUN"  # its modulus was chosen after looking
    assert table.claims["A.ln.total_cv"]["n"] == 12                  # of p=97, cells of other seeds in one series
    assert (tmp_path / "transformer" / "dense.png").exists() and (tmp_path / "transformer_ln" / "groups_p71.png").exists()


# ---------------------------------------------------------------- records beside the released runs, member by member

RELEASED = Path(os.environ.get("RELEASED", Path(__file__).parents[2] / "shared" / "released"))
SAME = ("model", "loss", "p", "block", "seed0", "arm", "rho", "tau", "gamma", "lr", "weight_decay", "train_frac",
        "budget_steps")   # of a cell and of a row of runs.csv; released runs that share them are one network, which counts once


@pytest.mark.skipif(not RELEASED.is_dir(), reason="no released runs are here (set RELEASED): records are NOT compared with them")
def test_records_of_the_papers_own_networks_are_the_released_runs(capsys: pytest.CaptureFixture) -> None:
    """Outside float32 collapse T_mem is exact in 99% and T_grok in 97%; inside, where an evaluation may round otherwise, T_grok is within 1%."""
    records = {}
    for path in sorted((answers.ROOT / "results").glob("*/*/runs.csv")):
        for run in files.read_runs(path):
            if run.get("networks", "fresh") != "fresh" and run["dtype"] == "float32" and not run["group"]:
                records.setdefault(tuple(run.get(key) for key in SAME), {})[run["member"]] = run
    exact_mem, exact_grok, collapsed = [], [], []
    for path in sorted(RELEASED.rglob("*.npz")):
        try:
            item = released.read(path, path.stem, ())
        except released.NoRun:
            continue
        for member, run in records.pop(tuple(getattr(item.cell, key) for key in SAME), {}).items():
            t_mem, t_grok = (None if steps[member] < 0 else int(steps[member]) for steps in (item.t_mem, item.t_grok))
            if run["collapse32_max"] > 0.001:
                collapsed.append((run["t_grok_step"] or run["budget_steps"]) / (t_grok or run["budget_steps"]))
            else:
                exact_mem.append(run["t_mem_step"] == t_mem)
                exact_grok.append(run["t_grok_step"] == t_grok)
    with capsys.disabled():
        print(f"\nrecords beside released runs: {len(exact_grok)} outside collapse, T_mem exact in {sum(exact_mem)}, T_grok in {sum(exact_grok)}; "
              f"{len(collapsed)} in collapse, T_grok over the released one {min(collapsed, default=1):.4f} to {max(collapsed, default=1):.4f}")
    assert exact_grok and np.mean(exact_mem) >= 0.99 and np.mean(exact_grok) >= 0.97
    assert all(0.99 < ratio < 1.01 for ratio in collapsed)
