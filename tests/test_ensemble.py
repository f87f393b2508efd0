"""The trainer: equal bits whatever shares the ensemble, retirement by cell, divergence flagged, and a stop that costs nothing."""
import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from common import EVAL_EVERY, Cell, UsageError, geometric_grid
from kernels import cpu
from kernels.layout import mlp_layout
from kernels.step import METRICS
from lab import files
from lab.book import GROK
from lab.draws import initial_rows
from lab.ensemble import Ensemble
from lab.state import State

CELL = Cell("a", p=13, members=(0, 1, 2), block=4, budget_steps=200, lr=3e-3, width=(32, 64))


def quiet(_: Ensemble) -> None:
    pass


def trained(cells: list[Cell], backend: str = "eager", dtype: torch.dtype = torch.float32) -> Ensemble:
    ensemble = Ensemble(cells, "cpu", backend, dtype, "ieee")
    ensemble.train(quiet)
    return ensemble


def bits(ensemble: Ensemble, cell: str, member: int) -> tuple:
    row = next(r for r, (c, m) in enumerate(zip(ensemble.cell_of, ensemble.member, strict=True))
               if (ensemble.cells[c].name, m) == (cell, member))
    log = ensemble.log_table()[ensemble.log_table()[:, 0] == row, 2:].tolist()
    return ensemble.state.params[row], ensemble.state.moment2[row], log


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


def test_a_run_alone_equals_the_same_run_in_company() -> None:
    held = dataclasses.replace(CELL, name="b", arm="clamp", clamp_start=50, held=((9.0, 0, 0, 0),) * 3, tau=1.5, weight_decay=0.3)
    company = trained([held, CELL])
    alone = trained([dataclasses.replace(CELL, members=(2,))])
    assert same(bits(company, "a", 2), bits(alone, "a", 2))
    assert not same(bits(company, "b", 2), bits(alone, "a", 2))


def test_a_run_alone_equals_the_same_run_in_company_compiled() -> None:
    if not cpu.has_compiler():
        pytest.skip("no C++ compiler here: the compiled backend cannot be tested")
    company = trained([CELL], "compiled")
    alone = trained([dataclasses.replace(CELL, members=(2,))], "compiled")
    assert company.backend == "compiled" and same(bits(company, "a", 2), bits(alone, "a", 2))
    eager = trained([CELL])
    gap = (company.state.params - eager.state.params).norm() / eager.state.params.norm()
    assert gap < 1e-3   # 200 Adam steps amplify rounding; a difference in the recipe is larger within the first few


def test_retirement_of_another_cell_leaves_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(CELL, name="short", budget_steps=75, lr=1e-3)
    company = trained([short, CELL])
    assert set(company.step[company.cell_of == 0]) == {75} and same(bits(company, "a", 1), bits(trained([CELL]), "a", 1))


def test_the_held_norm_is_held_inside_its_window_only() -> None:
    window = dataclasses.replace(CELL, arm="clamp", clamp_start=60, clamp_stop=120, held=((8.0, 0, 0, 0),) * 3, budget_steps=150)
    norms: dict[int, list[float]] = {}

    class Watched(Ensemble):
        def record(self, runs: np.ndarray, k: int, metrics: np.ndarray) -> None:
            norms.setdefault(int(self.step[runs[0]]) + k, []).extend(metrics[:, METRICS.index("norm")])
            super().record(runs, k, metrics)
    Watched([window], "cpu", "eager", torch.float32, "ieee").train(quiet)
    for step, values in norms.items():
        inside = 60 <= step < 120
        assert all((abs(v / 8 - 1) < 1e-6) == inside for v in values), step


def synthetic(ensemble: Ensemble, grok_at: dict[int, int]) -> None:
    """Replace the arithmetic by metrics that cross 0.90 at given steps per run: retirement is about bookkeeping alone."""
    def advance(kernels: object, *args: torch.Tensor) -> list[float]:
        params, scalars = args[0], args[-1]
        params[0] += len(scalars)
        run = int(params[1])
        accuracy = 1.0 if params[0] >= grok_at.get(run, math.inf) else 0.0
        return [accuracy if name in ("train_accuracy", "test_accuracy") else 1.0 for name in METRICS]
    ensemble.state.params[:, 0] = 0
    ensemble.state.params[:, 1] = torch.arange(len(ensemble.step))
    ensemble.advance_for_test = advance


@pytest.mark.parametrize("grok_at, steps, censored", [
    ({0: 300, 1: 500, 2: 425}, 500, 0),      # the cell ends with its last member
    ({0: 300, 1: 500}, 1000, 1),             # one never groks: all stay to the budget
    ({0: 500, 1: 525, 2: 525}, 600, 0),      # the logged step nearest the median comes after the last member's: all stay for it
])
def test_a_cell_retires_as_one(monkeypatch: pytest.MonkeyPatch, grok_at: dict, steps: int, censored: int) -> None:
    ensemble = Ensemble([dataclasses.replace(CELL, budget_steps=1010)], "cpu", "eager", torch.float32, "ieee")
    synthetic(ensemble, grok_at)
    monkeypatch.setattr(cpu, "advance", ensemble.advance_for_test)
    ensemble.train(quiet)
    result = ensemble.result()
    assert [run["steps_run"] for run in result.runs] == [steps] * 3
    assert sum(run["censored"] for run in result.runs) == censored
    assert [run["t_grok_step"] for run in result.runs] == [grok_at.get(i) for i in range(3)]
    # a worker may take a run one interval past its cell's slowest, and finishes that interval: two of 25 steps for two of the three runs
    assert result.needed == 3 * steps <= result.executed <= result.needed + 2 * 2 * EVAL_EVERY


def test_after_grok_trains_on_and_counts_relapses(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = Ensemble([dataclasses.replace(CELL, budget_steps=2000, after_grok=400)], "cpu", "eager", torch.float32, "ieee")
    synthetic(ensemble, {0: 100, 1: 200, 2: 300})

    def relapsing(kernels: object, *args: torch.Tensor) -> list[float]:
        metrics = ensemble.advance_for_test(kernels, *args)
        if int(args[0][1]) == 0 and 400 <= args[0][0] < 500:
            metrics[METRICS.index("test_accuracy")] = 0.5
        return metrics
    monkeypatch.setattr(cpu, "advance", relapsing)
    ensemble.train(quiet)
    assert [run["evals_below_after_grok"] for run in ensemble.result().runs] == [100 // EVAL_EVERY, 0, 0]
    assert {run["steps_run"] for run in ensemble.result().runs} == {700}


def test_a_run_that_diverges_is_flagged_and_harms_nobody() -> None:
    wild = dataclasses.replace(CELL, name="wild", lr=1e30)
    company = trained([wild, CELL])
    runs = {(run["cell"], run["member"]): run for run in company.result().runs}
    assert all(runs["wild", m]["diverged"] == 1 and runs["wild", m]["censored"] == 1 and runs["wild", m]["steps_run"] < 200 for m in range(3))
    assert not runs["a", 1]["diverged"] and same(bits(company, "a", 1), bits(trained([CELL]), "a", 1))


def test_a_nan_in_one_run_stays_there() -> None:
    alone, company = trained([CELL]), Ensemble([CELL], "cpu", "eager", torch.float32, "ieee")
    company.state.params[0, 7] = math.nan
    company.train(quiet)
    assert all(same(bits(company, "a", m), bits(alone, "a", m)) for m in (1, 2))
    assert [(run["diverged"], run["steps_run"]) for run in company.result().runs] == [(1, 1), (0, 200), (0, 200)]


def test_stopping_and_continuing_gives_the_same_bits() -> None:
    class Stop(Exception):
        pass
    whole = trained([CELL])
    ensemble, kept = Ensemble([CELL], "cpu", "eager", torch.float32, "ieee"), {}

    def interrupt(e: Ensemble) -> None:
        if e.executed > 150:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        ensemble.train(interrupt, save=lambda snapshot: kept.update({k: v.clone() for k, v in snapshot.items()}))
    again = Ensemble([CELL], "cpu", "eager", torch.float32, "ieee")
    again.restore(kept)
    assert 0 < again.executed < whole.executed
    again.train(quiet)
    assert torch.equal(again.state.params, whole.state.params) and sorted(again.log_table().tolist()) == sorted(whole.log_table().tolist())
    assert again.result().runs == whole.result().runs
    assert again.result().executed == again.result().needed and again.result().seconds > 0   # over both parts
    with pytest.raises(UsageError, match="another ensemble"):   # equal shapes, another condition
        Ensemble([dataclasses.replace(CELL, lr=1e-3)], "cpu", "eager", torch.float32, "ieee").restore(kept)
    with pytest.raises(UsageError, match="another ensemble"):
        Ensemble([dataclasses.replace(CELL, members=(0,))], "cpu", "eager", torch.float32, "ieee").restore(kept)


def test_the_grid_of_paper_a() -> None:
    """Lengths of its released logs, by budget, and some T_grok of its dense sweep."""
    for budget, points in {8000: 253, 12_000: 259, 20_000: 266, 27_000: 270, 40_000: 275, 60_000: 279}.items():
        grid = geometric_grid(budget)
        assert len(grid) == points and grid[:4].tolist() == [0, 1, 2, 3] and grid[-1] == budget
    assert {153, 1255, 1495, 7802} <= {*geometric_grid(8000).tolist()}
    with pytest.raises(UsageError, match="divide 200"):
        dataclasses.replace(CELL, eval_every=30)


class Counting:
    """Kernels that count steps in `params[0]` and know all pairs of run `params[1]` from the step `grok_at` of it on."""

    def __init__(self, ensemble: Ensemble, grok_at: dict[int, int]):
        self.grok_at, self.backend, ensemble.kernels = grok_at, "eager", self
        ensemble.state.params[:, 0] = 0
        ensemble.state.params[:, 1] = torch.arange(len(ensemble.step))

    def steps(self, params: torch.Tensor, *rest: torch.Tensor) -> None:
        params[0] += len(rest[-1])

    def evaluate(self, params: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        known = float(params[0] >= self.grok_at.get(int(params[1]), math.inf))
        return torch.tensor([known if name in ("train_accuracy", "test_accuracy") else 1.0 for name in METRICS], dtype=torch.float64)


def test_every_cell_keeps_its_own_schedule() -> None:
    """Crossings at steps 110 and 3310, where the grid's steps are 90 apart: seen at the next evaluation of the cell's own; logs; the cell's end;
    nobody is far ahead."""
    grid = geometric_grid(20_000)
    cells = [dataclasses.replace(CELL, name=str(every), members=(0, 1), budget_steps=20_000, eval_every=every) for every in (25, 50, 0)]
    ensemble = Ensemble(cells, "cpu", "eager", torch.float32, "ieee")
    Counting(ensemble, {0: 110, 1: 3310, 2: 110, 3: 3310, 4: 110, 5: 3310})
    ensemble.train(quiet)
    first, last = (int(grid[grid >= step][0]) for step in (110, 3310))
    assert [run["t_grok_step"] for run in ensemble.result().runs] == [125, 3325, 150, 3350, first, last]
    assert [run["steps_run"] for run in ensemble.result().runs] == [3325] * 2 + [3350] * 2 + [last] * 2
    assert ensemble.result().executed <= ensemble.result().needed + 6 * 2 * EVAL_EVERY
    logs = {cell.name: [row["step"] for row in ensemble.result().trajectories if row["cell"] == cell.name and row["member"] == 1] for cell in cells}
    multiples = [1, *range(200, 3400, 200)]
    assert logs == {"25": multiples, "50": multiples, "0": grid[grid <= last].tolist()}


def test_schedules_leave_each_other_s_bits() -> None:
    cells = [dataclasses.replace(CELL, name=str(every), members=(0, 1), budget_steps=110, eval_every=every) for every in (25, 50, 0)]
    company = trained(cells)
    assert company.step.tolist() == [100] * 4 + [110] * 2
    for cell in cells:
        assert same(bits(company, cell.name, 1), bits(trained([cell]), cell.name, 1))


def test_a_grid_is_interrupted_and_continued_to_the_same_bits() -> None:
    cell = dataclasses.replace(CELL, members=(0, 2), budget_steps=120, eval_every=0)
    whole, ensemble, again = (Ensemble([cell], "cpu", "eager", torch.float32, "ieee") for _ in range(3))
    whole.train(quiet)
    kept = {}

    def save(snapshot: dict) -> None:
        kept.update({k: v.clone() for k, v in snapshot.items()})
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        ensemble.train(quiet, save, save_every=0.1)
    again.restore(kept)
    assert again.step.max() > 0 and again.step.min() < 120
    again.train(quiet)
    assert torch.equal(again.state.params, whole.state.params) and sorted(again.log) == sorted(whole.log)


@pytest.mark.parametrize("at", [60, 75])
def test_groups_are_scaled_once_before_the_step_is_measured(at: int) -> None:
    """As if the run had been stopped at that step, scaled by hand and continued; at a step of the schedule the scaled weights are measured."""
    seen = {}

    class Watched(Ensemble):
        def record(self, runs: np.ndarray, k: int, metrics: np.ndarray) -> None:
            seen[int(runs[0]), int(self.step[runs[0]]) + k] = metrics[0, METRICS.index("norm")]
            super().record(runs, k, metrics)
    before = trained([dataclasses.replace(CELL, budget_steps=at, eval_every=0)]).state
    for row in before.params:
        E, _, W2, _, _ = mlp_layout(13, 32, 64).views(row)
        E *= 0.8
        W2 *= 0.5
    start = State(before.params, before.moment1, before.moment2, np.full(3, at))
    norms = start.norms(mlp_layout(13, 32, 64))
    scaled = dataclasses.replace(CELL, budget_steps=125, clamp_start=at, scale_once=(0.8, 1.0, 0.5))
    ensemble = Watched([scaled], "cpu", "eager", torch.float32, "ieee")
    ensemble.train(quiet)
    by_hand = Ensemble([dataclasses.replace(CELL, budget_steps=125)], "cpu", "eager", torch.float32, "ieee", start)
    by_hand.train(quiet)
    assert torch.equal(ensemble.state.params, by_hand.state.params) and torch.equal(ensemble.state.moment2, by_hand.state.moment2)
    assert [seen.get((r, at)) for r in range(3)] == (pytest.approx(norms) if at == 75 else [None] * 3)
    assert ensemble.result().runs[0]["clamp_start"] == at


@pytest.mark.parametrize("step, left", [(0, 400), (300, 100), (380, 40), (400, 40), (700, 300), (1100, 300), (1400, 0)])
def test_what_is_left_is_what_was_expected_or_how_late_a_run_is(step: int, left: int) -> None:
    ensemble = Ensemble([dataclasses.replace(CELL, members=(0,), budget_steps=1400, expected_steps=400)], "cpu", "eager", torch.float32, "ieee")
    ensemble.step[:] = step
    assert ensemble.steps_left() == left


def test_training_starts_from_a_given_state() -> None:
    first = trained([dataclasses.replace(CELL, budget_steps=100)])
    state = State(first.state.params.clone(), first.state.moment1.clone(), first.state.moment2.clone(), np.full(3, 100))
    second = Ensemble([CELL], "cpu", "eager", torch.float32, "ieee", start=state)
    second.train(quiet)
    assert torch.equal(second.state.params, trained([CELL]).state.params) and second.result().needed == 3 * 100


def test_bookkeeping_grows_by_the_log_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that logs at every one of 4,000 evaluations keeps 8 bytes a number, where a dict would take 1 kB a row; then its trajectories.csv."""
    evaluations, used = 4000, []

    class Watched(Ensemble):
        def record(self, runs: np.ndarray, k: int, metrics: np.ndarray) -> None:
            super().record(runs, k, metrics)
            if self.step[0] in (1000 * EVAL_EVERY, evaluations * EVAL_EVERY):
                used.append(tracemalloc.get_traced_memory()[0])
    monkeypatch.setattr("lab.book.LOG_EVERY", EVAL_EVERY)
    ensemble = Watched([dataclasses.replace(CELL, p=5, members=(0,), budget_steps=evaluations * EVAL_EVERY)], "cpu", "eager", torch.float32, "ieee")
    synthetic(ensemble, {})
    monkeypatch.setattr(cpu, "advance", ensemble.advance_for_test)
    tracemalloc.start()
    try:
        ensemble.train(quiet)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        files.write_csv(tmp_path / "trajectories.csv", ensemble.result().trajectories)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    rows = (tmp_path / "trajectories.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + evaluations                                      # header, step 1
    row = 8 * ensemble.log_width
    assert row <= 200 and len(ensemble.log) == (1 + evaluations) * ensemble.log_width
    assert 0.9 * 3000 * row < used[1] - used[0] < 1.1 * 3000 * row + 100_000     # an array grows by a sixteenth at a time
    assert peak - before < evaluations * (3 * row + 32 * ensemble.log_width)     # copies of the log, and once its rows as Python's numbers


def test_a_block_is_drawn_as_one_tensor_would_be() -> None:
    """Shapes whose numbers are multiples of 16 and not of 64; odd p; a block of one."""
    for p, block in ((2, 3), (13, 4), (59, 1)):
        layout, generator = mlp_layout(p), torch.Generator().manual_seed(5)
        drawn = [torch.randn(block, *shape, generator=generator) / math.sqrt(fan_in)
                 for *shape, fan_in in ((p, layout.d, layout.d), (2 * layout.d, layout.H, 2 * layout.d), (layout.H, p, layout.H))]
        for row, *matrices in zip(initial_rows(layout, block, 5, tuple(range(block)), torch.float32), *drawn, strict=True):
            E, W1, W2, *_ = layout.views(row)
            assert all(torch.equal(*pair) for pair in zip((E, W1, W2[:, :p]), matrices, strict=True))


def test_members_are_those_of_the_whole_block() -> None:
    layout = mlp_layout(13)
    whole, picked = initial_rows(layout, 4, 0, (0, 1, 2, 3), torch.float32), initial_rows(layout, 4, 0, (3, 1), torch.float32)
    assert torch.equal(picked, whole[[3, 1]])
    assert not torch.equal(initial_rows(layout, 8, 0, (3,), torch.float32)[0], whole[3])
    assert torch.equal(initial_rows(layout, 4, 0, (2,), torch.float64)[0].float()[: 13 * 128], whole[2][: 13 * 128])


def test_float64_runs_and_agrees_with_float32_at_first() -> None:
    short = dataclasses.replace(CELL, budget_steps=25)
    wide, narrow = trained([short], dtype=torch.float64), trained([short])
    E64, E32 = wide.layout.views(wide.state.params[0])[0], narrow.layout.views(narrow.state.params[0])[0]
    assert E64.dtype == torch.float64 and (E64 - E32.double()).norm() < 1e-4 * E64.norm() and wide.crossed[:, GROK].max() < 0
