"""`common.py` as a notebook uses it: conditions that name themselves, training in five lines, a table for a person, bad cells in one line."""
import dataclasses
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import MODELS, Cell, Result, UsageError, train, unique
from kernels.layout import model_layout
from lab import stats
from lab.ensemble import Ensemble

ROOT = Path(__file__).parents[1]
LINE = "from common import Cell, train; print(train([Cell(p=59, members=range(4), lr=4e-3)]).table())"


def test_five_lines_train_and_print_a_table() -> None:
    tiny = LINE.replace("p=59, members=range(4)", "p=7, members=range(2), budget_steps=50").replace("4e-3)]", "4e-3)], backend='eager'")
    done = subprocess.run([sys.executable, "-c", tiny], cwd=ROOT, capture_output=True, text=True, check=False)
    head, row = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert head.split()[:4] == ["condition", "n", "censored", "T_mem"] and row.split()[:2] == ["free_p7_b2_lr0.004", "2"]


def test_train_gives_rows_in_the_order_of_the_cells_and_every_shape() -> None:
    cells = [Cell(p=7, members=(1,), block=3, budget_steps=50), Cell(p=5, members=range(2), budget_steps=75, rho=1.1, w_c=20.0, clamp_start=25),
             Cell(p=7, members=(0, 2), budget_steps=50, dtype="float64")]
    result = train(cells, backend="eager")
    assert [(run["cell"], run["member"], run["dtype"]) for run in result.runs] == [
        ("free_p7_b3", 1, "float32"), ("clamp_p5_b2_rho1.10_wc20_hold_from25", 0, "float32"), ("clamp_p5_b2_rho1.10_wc20_hold_from25", 1, "float32"),
        ("free_p7_b3_float64", 0, "float64"), ("free_p7_b3_float64", 2, "float64")]
    assert result.runs[1]["held_norm"] == 22.0 and result.executed >= result.needed > 0 and result.seconds > 0
    held = [row["norm"] for row in result.trajectories if row["cell"].startswith("clamp")]
    assert held and len(result.table().splitlines()) == 4
    alone = Ensemble(cells[:1], "cpu", "eager", torch.float32, "ieee")
    alone.train(lambda _: None)
    assert alone.result().runs == result.runs[:1]


@pytest.mark.parametrize("make, message", [
    (lambda: Cell(model="cnn"), "model must be one of mlp, transformer"),
    (lambda: Cell(members=(4,), block=4), "members must be numbers of the block, 0..3, got (4,)"),
    (lambda: Cell(members=()), "members must be numbers of the block"),
    (lambda: Cell(members=(-1,)), "members must be numbers of the block"),
    (lambda: Cell(loss="hinge"), "got loss hinge"),
    (lambda: Cell(task="parity n30 k3 m1000"), "sparse parity is the task of model mlp_dense"),
    (lambda: Cell(model="mlp_dense"), "task of an mlp_dense must be such as 'parity n30 k3 m1000', got 'add'"),
    (lambda: Cell(model="mlp_dense", task="parity n30 k0 m1000"), "1 <= k <= n <= 256, and 2 to 100000 training examples; got k 0, n 30, m 1000"),
    (lambda: Cell(model="mlp_dense", task="parity n3 k4 m1000"), "got k 4, n 3"),
    (lambda: Cell(model="mlp_dense", task="parity n1000 k3 m1000"), "got k 3, n 1000"),
    (lambda: Cell(model="mlp_dense", task="parity n30 k3 m1"), "got k 3, n 30, m 1"),
    (lambda: Cell(p=1), "p at least 2"),
    (lambda: Cell(tau=0.0), "tau above 0"),
    (lambda: Cell(tau=math.nan), "tau above 0"),
    (lambda: Cell(p=3, train_frac=0.1), "train_frac leaves pairs to train and test on"),
    (lambda: Cell(train_frac=1.0), "train_frac leaves pairs to train and test on"),
    (lambda: Cell(eval_every=30), "eval_every must be 0, paper A's grid, or divide 200, got 30"),
    (lambda: train([]), "no cells"),
    (lambda: train([Cell(), Cell()]), "two cells are named free_p59_b1; give them names"),
    (lambda: train([Cell(p=5)], backend="triton", device="cpu"), "backend triton does not run on device cpu; triton needs cuda"),
    (lambda: train([Cell(p=5)], arithmetic="tf32x3", device="cpu"), "arithmetic tf32x3 is a mode of the CUDA kernels"),
    (lambda: train([Cell(p=5)], dtype="float16"), "dtype must be one of float32, float64, got 'float16'"),
    (lambda: Cell(lr=-1.0), "lr must be above 0"),
    (lambda: Cell(lr=math.nan), "lr must be above 0"),
    (lambda: Cell(weight_decay=-1.0), "weight_decay at least 0"),
    (lambda: Cell(budget_steps=0), "budget_steps at least 1"),
    (lambda: train([Cell(rho=1.1)]), "free_p59_b1_rho1.10 has a rho and no norm that it refers to; give its w_c"),
    (lambda: Cell(members=(0, 1), held=((9.0,),)), "held must have norms for each of the 2 members, got 1"),
])
def test_a_bad_cell_is_one_line(make: callable, message: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_cell_is_named_by_its_conditions_exactly() -> None:
    assert Cell(p=59, members=range(4), lr=4e-3).name == "free_p59_b4_lr0.004"
    assert Cell(rho=1.15, w_c=54.49, tau=1.3).name == "clamp_p59_b1_rho1.15_wc54.49_tau1.3"
    assert Cell(rho=1.154, w_c=54.49).name != Cell(rho=1.15, w_c=54.49).name and "rho1.154_" in Cell(rho=1.154, w_c=54.49).name
    assert Cell(model="mlp_dense", task="parity n30 k3 m600", rho=1.3, w_c=20.0).name == "clamp_parity_n30_k3_m600_b1_rho1.30_wc20"
    for change in ({"p": 61}, {"block": 8}, {"loss": "mse"}, {"model": "transformer_ln"}, {"seed0": 7}, {"train_frac": 0.3}, {"tau": 1.0000001},
                   {"gamma": 0.3}, {"lr": 0.00100001}, {"weight_decay": 0.5}, {"dtype": "float64"}):
        assert Cell(**change).name != Cell().name, change
    assert dataclasses.replace(Cell(), name="a").name == "a"


def test_what_a_cell_leaves_out_follows_from_the_rest() -> None:
    cell = Cell(members=range(5), rho=1.2, w_c=50.0, model="transformer")
    assert (cell.block, cell.arm, cell.lr, cell.clamp_start, cell.held) == (5, "clamp", 5e-4, 600, ((60.0,),) * 5)
    assert (Cell().arm, Cell().lr, Cell().clamp_start, Cell(loss="mse").clamp_start) == ("free", 1e-3, 500, 50)


def test_of_two_cells_of_a_name_the_longer_budget_stays() -> None:
    short, long = Cell("a", budget_steps=100), Cell("a", budget_steps=200)
    assert unique([short, long]) == unique([long, short]) == [long]


@pytest.mark.parametrize("model", MODELS)
def test_trained_weights_load_into_the_plain_module(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the module are those that the run was measured by."""
    monkeypatch.setattr("lab.book.LOG_EVERY", 25)
    result = train([Cell(p=5, members=(0, 1), budget_steps=25, model=model)], backend="eager", dtype="float64")
    plain, a = result.state.module(1, model, 5), torch.arange(5)
    with torch.no_grad():
        z = plain(a.repeat_interleave(5), a.repeat(5))
    last = next(row for row in result.trajectories if (row["member"], row["step"]) == (1, 25))
    assert z.shape == (25, model_layout(model, 5, torch.float64).classes)
    assert float(z.norm(dim=1).mean()) == pytest.approx(last["logit_scale"], rel=1e-12)
    assert train([Cell(p=5, budget_steps=25), Cell(p=7, budget_steps=25)], backend="eager").state is None   # no one shape


def run(member: int, t: int | None, cell: str = "c") -> dict:
    return {"cell": cell, "member": member, "t_mem_step": 150 + 25 * member, "t_grok_step": t, "norm_at_grok": t and 50.0 + member,
            "delay_steps": t and t - 800}


def test_the_table_counts_censored_runs_as_later() -> None:
    result = Result([run(0, 3000), run(1, 4000), run(2, None), run(0, None, "late"), run(1, None, "late")])
    head, row, late = (line.split("  ") for line in result.table().splitlines())
    cells = [[text.strip() for text in line if text.strip()] for line in (head, row, late)]
    assert cells[0] == ["condition", "n", "censored", "T_mem", "T_grok", "95% interval", "norm at T_grok"]
    assert cells[1] == ["c", "3", "1", "175", "4000", "3000 .. > budget", "50.5"]
    assert cells[2] == ["late", "2", "2", "162.5", "> budget", "> budget .. > budget", "-"]
    assert "published" in stats.cell_table(result.runs, {"c": 3900.0}) and "3900" in stats.cell_table(result.runs, {"c": 3900.0})
    assert stats.cell_table(result.runs, column="delay_steps", most=1).splitlines()[1:] == [
        stats.cell_table(result.runs[:3], column="delay_steps").splitlines()[1], "and 1 more conditions in cells.csv"]


def test_the_example_measures_a_delay_at_every_decay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As it stands, of a small modulus and a few steps; a run counts as grokked at its first evaluation."""
    spec = importlib.util.spec_from_file_location("weight_decay", ROOT / "examples" / "weight_decay.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small = {"p": 7, "members": (0, 1), "budget_steps": 50}
    example.main("eager", **small)
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [" no network grokked in 50 steps"] * 3
    monkeypatch.setattr("lab.book.CROSSINGS", (("train_accuracy", 0.0), *[("test_accuracy", 0.0)] * 3))
    example.main("eager", **small)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["weight decay 0.5", "weight decay 1", "weight decay 2"]
    assert all("W_c" in line and line.endswith("median T_grok 25, 25, 25, alpha 0.00") for line in lines), lines
