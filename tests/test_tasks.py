"""What a network learns: tables of labels for operations, groups and files, in every backend of the CPU, and what no table may be."""
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_definition import plain, plain_loss, start

import exp_delay_law
from common import TASKS, Cell, UsageError, n_pairs, n_train, train
from kernels import cpu
from kernels.step import evaluate_ref, gradient_ref, train_step_ref
from lab import desk
from lab.draws import split
from lab.ensemble import Ensemble
from lab.tasks import labels


def test_operations_are_what_they_are_called() -> None:
    by_hand = {"add": lambda a, b: (a + b) % 7, "sub": lambda a, b: (a - b) % 7, "mul": lambda a, b: a * b % 7,
               "quadratic": lambda a, b: (a * a + a * b + b * b) % 7}
    for task, of in by_hand.items():
        assert labels(7, task).tolist() == [[of(a, b) for b in range(7)] for a in range(7)], task
    quotient = labels(7, "div")
    assert (quotient[:, 0] == -1).all() and all(quotient[a, b] * b % 7 == a for a in range(7) for b in range(1, 7))


@pytest.mark.parametrize("task, p", [("s3", 6), ("s4", 24), ("s5", 120)])
def test_groups_are_groups(task: str, p: int) -> None:
    """The identity first, every line and column a permutation, and no commutation; associative where all triples are few."""
    table = labels(p, task)
    assert table[0].tolist() == table[:, 0].tolist() == list(range(p)) and not torch.equal(table, table.T)
    assert (table.sort(0).values == torch.arange(p)[:, None]).all() and (table.sort(1).values == torch.arange(p)).all()
    triples = [*itertools.product(range(p), repeat=3)][:: 1 if p < 10 else 97]
    assert all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in triples)


def test_splits_are_drawn_from_the_pairs_that_there_are() -> None:
    data = (labels(7, "div").flatten() >= 0).nonzero()[:, 0]
    n = n_train(7, 0.4, "div")
    drawn = split(7, n, 1, 5, data)
    assert n == int(0.4 * 42) and len(set(drawn.tolist())) == n and set(drawn.tolist()) <= set(data.tolist())
    order = torch.randperm(42, generator=torch.Generator().manual_seed(1006))
    assert drawn.tolist() == sorted(data[order[:n]].tolist())
    assert torch.equal(split(7, 9, 1, 5, torch.arange(49)), split(7, 9, 1, 5))


@pytest.mark.parametrize("task, p", [("div", 7), ("s3", 6)])
def test_gradient_on_a_table_is_autograds(task: str, p: int) -> None:
    layout, row, *_ = start(p)
    table = labels(p, task).flatten()
    pairs = (table >= 0).nonzero()[::2, 0]
    a, b, model = pairs // p, pairs % p, plain(row, layout)
    plain_loss(model(a, b), table[pairs], 1.3, "ce").backward()
    ours = gradient_ref(row, a, b, torch.tensor(1.3, dtype=torch.float64), layout, "ce", table)
    for mine, parameter in zip(layout.views(ours), model.parameters(), strict=True):
        assert (mine[..., : parameter.shape[-1]] - parameter.grad).norm() <= 1e-12 * parameter.grad.norm()


@pytest.mark.parametrize("model, backend, loss", [("mlp", "compiled", "ce"), ("mlp", "compiled", "stablemax"), ("transformer", "eager", "ce")])
def test_a_step_reads_the_table(model: str, backend: str, loss: str) -> None:
    """Beside the definition, and the shares of an evaluation are of the pairs that are data."""
    ensemble = Ensemble([Cell(task="div", p=5, model=model, members=(0,), loss=loss)], "cpu", backend, torch.float64, "ieee")
    ensemble.compile()
    state, a, b, train_mask = ensemble.state, ensemble.a[0], ensemble.b[0], ensemble.train_mask[0]
    rows = [[tensor[0].clone() for tensor in (state.params, state.moment1, state.moment2)] for _ in range(2)]
    scalars = ensemble.scalars(np.array([0]), 2)[0]
    ensemble.kernels.steps(*rows[0], a, b, scalars)
    for step in scalars:
        train_step_ref(*rows[1], a, b, step, ensemble.layout, loss, False, ensemble.labels)
    assert all((mine - theirs).norm() <= 1e-9 * theirs.norm() for mine, theirs in zip(*rows, strict=True))
    found = ensemble.kernels.evaluate(rows[0][0], train_mask, a, b, scalars[0, 0])
    wanted = evaluate_ref(rows[1][0], train_mask, a, b, scalars[0, 0], ensemble.layout, loss, ensemble.labels)
    assert found.isfinite().all() and torch.allclose(found[:-1], wanted[:-1], rtol=1e-9, atol=1e-12)      # the last is itself a rounding error
    plain_net, pair = state.module(0, model, 5), torch.arange(25)
    right = plain_net(pair // 5, pair % 5)[:, :5].argmax(1) == ensemble.labels
    before = evaluate_ref(state.params[0], train_mask, a, b, scalars[0, 0], ensemble.layout, loss, ensemble.labels)
    assert before[1] == pytest.approx(float(right[(train_mask == 0) & (ensemble.labels >= 0)].double().mean()), abs=1e-12)


@pytest.mark.skipif(not cpu.has_compiler(), reason="a thousand steps of the definition take minutes")
def test_a_group_and_a_product_are_learned() -> None:
    """S3 by heart in a few steps, multiplication mod 23 up to its test set."""
    result = train([Cell(task="mul", p=23, train_frac=0.7, members=(0,), lr=4e-3, budget_steps=6000),
                    Cell(task="s4", train_frac=0.8, members=(0,), lr=4e-3, budget_steps=6000)])
    mul, s4 = result.runs
    assert mul["task"] == "mul" and mul["t_mem_step"] < mul["t_grok_step"] < 6000
    assert s4["p"] == 24 and s4["t_mem_step"] < s4["t_grok_step"] < 6000


def test_a_file_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0,1,\n1,2,0\n2,0,1\n")
    cell = Cell(task=str(path), train_frac=0.5, members=(0,))
    assert cell.p == 3 and n_pairs(3, cell.task) == 8 and cell.n_train == 4 and labels(3, cell.task)[0].tolist() == [0, 1, -1]
    assert "mine" in cell.name
    result = train([dataclasses.replace(cell, budget_steps=25)], backend="eager")
    assert result.runs[0]["task"] == "mine.csv" and result.runs[0]["n_train"] == 4


@pytest.mark.parametrize("text, said", [
    ("0,1\n1,2\n", "line 2, field 2: a label is a whole number in 0..1, or empty; got '2'"),
    ("0,1\n1\n", "is square, it has 2 lines, and line 2 has 1 fields"),
    ("0,1\n1,x\n", "got 'x'"), ("0,-1\n1,0\n", "got '-1'"), ("", "p at least 2"), (None, "No such file")])
def test_what_is_no_table_is_one_line(text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.csv"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["exp_delay_law.py", "--task", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        desk.main(exp_delay_law.run)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, said", [
    (["--task", "div", "--p", "57"], "needs a prime p, got 57"), (["--task", "s5", "--p", "59"], "120 elements"),
    (["--task", "xor"], "must be one of add, "), (["--task", "mul", "--networks", "published"], "they go without --task")])
def test_tasks_that_are_none_are_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        exp_delay_law.run([*flags, "--dry-run"])


def test_every_task_has_a_cell() -> None:
    assert [Cell(task=task).p for task in TASKS] == [59, 59, 59, 59, 59, 6, 24, 120]
