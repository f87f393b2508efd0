"""Per-seed replay of released runs, and what replay does with files that are none."""
import csv
import dataclasses
import io
import itertools
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

import exp_replay
from common import Cell, UsageError, geometric_grid
from lab import files, released
from lab.draws import Card, paper_a_seed

RELEASED = Path(os.environ.get("RELEASED", Path(__file__).parents[2] / "shared" / "released" / "logit-scale" / "metrics"))


@pytest.mark.skipif(not RELEASED.is_dir(), reason=f"no released runs at {RELEASED.name} (set RELEASED): the per-seed replay is NOT tested here")
def test_released_runs_come_out_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp_replay.run([str(RELEASED), "--match", "mlp_ce_full_p59_clamp_rho0.85", "mlp_ce_full_p59_base_rho1.00_tau1.00",
                    "mlp_mse_full_p59_base_rho1.00_tau1.00", "--members", "3", "10", "--out", str(tmp_path / "r")])
    rows = list(csv.DictReader((tmp_path / "r" / "replay.csv").read_text().splitlines()))
    assert len(rows) == 6 and list(rows[0]) == ["cell", "member", "t_mem_released", "t_mem", "t_grok_released", "t_grok", "difference_steps",
                                                    "difference_evaluations"]
    assert all(row["t_mem"] == row["t_mem_released"] for row in rows)
    assert all(abs(int(row["difference_steps"])) <= 25 for row in rows), rows
    out = capsys.readouterr().out.splitlines()
    assert out[-6].startswith("replayed 6 runs: ") and out[-5].startswith("replayed ") and "mlp_mse_full" in "".join(out[-4:-1])


def good() -> dict:
    return dict(p=7, alpha=0.4, lam=1.0, lr=1e-3, max_steps=50, arm="clamp", rho=1.0, wc_used=9.0, t_int=10, tau=1.0, loss="ce",
                T_mem_per_seed=np.array([25, -1]), T_grok_per_seed=np.array([-1, 50]), steps=np.array([1.0, 50.0]),
                logit_scale=np.array([1.0, 2.0]))


def test_a_file_of_ours_is_compared_with_censored_sides_at_the_budget(tmp_path: Path) -> None:
    np.savez(tmp_path / "cell.npz", **good())
    exp_replay.run([str(tmp_path), "--out", str(tmp_path / "r"), "--backend", "eager"])
    rows = files.read_csv(tmp_path / "r" / "replay.csv")
    assert [row["t_grok_released"] for row in rows] == [None, 50] and [row["difference_steps"] for row in rows] == [0, 0]


def test_a_modulus_too_large_for_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "cell.npz", **{**good(), "p": 257})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UsageError, match="the CUDA kernels of model mlp take p up to 256, got 257; use --device cpu"):
        exp_replay.run([str(tmp_path), "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def of_paper_a(**changed: object) -> dict:
    """A file as its dense sweep left them; `changed` values of None are left out."""
    data = dict(p=7, alpha=np.float32(0.4), lam=np.float32(1), lr=np.float32(1e-3), d_model=128, H=256, max_steps=60, arm="clamp",
                rho=np.float32(0.9), wc=np.float32(14.3), t_int=10, n_train=20, norm_before_int=np.zeros(2), steps=geometric_grid(60),
                train_acc=np.zeros((2, 61)), T_mem_per_seed=np.array([40, -1]), T_grok_per_seed=np.array([-1, 60]))
    return {k: v for k, v in {**data, **changed}.items() if v is not None}


PARITY = {"n": 8, "k": 2, "m": 20, "m_test": 2000, "H": 512, "p": None, "alpha": None, "d_model": None, "wc": None, "wc_used": np.float32(14.3)}
CONDITION = {"p": 7, "train_frac": 0.4, "weight_decay": 1.0, "lr": 1e-3}


@pytest.mark.parametrize("changed, expected", [
    ({}, {"arm": "clamp", "model": "mlp", "w_c": float(np.float32(14.3)), "held": ((0.9 * float(np.float32(14.3)),),) * 2, "rho": 0.9,
          "clamp_start": 10, "clamp_stop": None, "eval_every": 0, "card": Card(), "decay_last": False,
          "seed0": paper_a_seed("denserho", **CONDITION)}),
    ({"arm": "none", "wc": np.float32("nan")}, {"arm": "free", "held": (), "rho": None, "w_c": None}),
    ({"eff_lr_E": np.zeros(2)}, {"w_c": 14.3}),
    ({"arm": "rescale", "layer": "all", "f": np.float32(1)}, {"arm": "rescale", "clamp_stop": 11, "held": ((0.9 * 14.3,),) * 2, "scale_once": (),
     "seed0": paper_a_seed("normint", **CONDITION)}),
    ({"arm": "layer", "layer": "hidden", "f": np.float32(0.8)}, {"arm": "rescale", "held": (), "rho": None, "scale_once": (1.0, 0.8, 1.0)}),
    ({"arm": None, "role": "fss", "norm_before_int": None}, {"arm": "free", "seed0": paper_a_seed("grokfss", **CONDITION)}),
    ({"n_heads": 4, "H": 512, "group": "mlp", "wc_group": np.float32(11.2)}, {"model": "transformer_ln", "held": ((0, 0, 0, 0.9 * 11.2, 0),) * 2}),
    ({"n_heads": 4, "H": 512, "wc": None, "wc_used": np.float32(11.2)}, {"model": "transformer", "held": ((0.9 * float(np.float32(11.2)),),) * 2}),
    ({"n_heads": 4, "H": 512, "n_layers": 1, "arm": None}, {"model": "transformer_ln", "arm": "free"}),
    (PARITY, {"model": "mlp_dense", "task": "parity n8 k2 m20", "p": 0, "train_frac": 0.0, "held": ((0.9 * float(np.float32(14.3)),),) * 2,
              "seed0": paper_a_seed("parity", n=8, k=2, m=20, weight_decay=1.0, lr=1e-3)}),
    ({**PARITY, "arm": "free", "t_int": 10**9}, {"arm": "free", "p": 0, "train_frac": 0.0, "held": (),
     "seed0": paper_a_seed("parity_lambda", n=8, k=2, m=20, weight_decay=1.0, lr=1e-3)}),
])
def test_files_of_paper_a_say_what_to_train(tmp_path: Path, changed: dict, expected: dict) -> None:
    np.savez(tmp_path / "a.npz", **of_paper_a(**changed))
    cell = released.read(tmp_path / "a.npz", "a", ()).cell
    expected = {**CONDITION, "n_train": 20, "members": (0, 1), **expected}
    assert {name: getattr(cell, name) for name in expected} == expected


@pytest.mark.parametrize("changed, message", [
    ({"steps": np.arange(61)[:60]}, "not paper A's grid"), ({"n_train": 19}, "n_train is 19, only 20"), ({"arm": "up"}, "arm 'up'"),
    ({"norm_before_int": None}, "no experiment of paper A"), ({"rho": np.float32(-1)}, "held norm is not positive"),
    ({"max_steps": None}, "lacks max_steps"), ({"arm": "layer", "layer": "sideways", "f": 1.0}, "sideways"),
    ({**PARITY, "k": 9}, "1 <= k <= n"), ({**PARITY, "m_test": 500}, "m_test is 500, only 2000 is trained"), ({**PARITY, "m": None}, "m is None"),
])
def test_files_of_paper_a_that_cannot_be_used_are_refused(tmp_path: Path, changed: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **of_paper_a(**changed))
    with pytest.raises(UsageError, match=re.escape(message)):
        exp_replay.run([str(tmp_path), "--out", str(tmp_path / "r")])


def test_both_releases_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run of each and sparse parity: trained, compared on its own schedule, told by experiment."""
    for folder in ("data/denserho/metrics", "data/parity/metrics", "metrics/dose"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    np.savez(tmp_path / "in/data/denserho/metrics/a.npz", **of_paper_a())
    np.savez(tmp_path / "in/data/parity/metrics/x.npz", **of_paper_a(**PARITY))
    np.savez(tmp_path / "in/metrics/dose/b.npz", **good())
    exp_replay.run([str(tmp_path / "in"), "--out", str(tmp_path / "r"), "--backend", "eager"])
    out = capsys.readouterr().out.splitlines()
    rows = files.read_csv(tmp_path / "r" / "replay.csv")
    rows = [row for row in rows if "parity" not in row["cell"]]
    assert [(row["t_grok_released"], row["t_grok"]) for row in rows] == [(None, None), (60, None), (None, None), (50, None)]
    assert {row["difference_evaluations"] for row in rows} == {0}
    said, _, *table, folder = out[-6:]
    assert said.startswith("replayed 6 runs: T_mem exact in ") and table.pop(1).startswith("data/parity/metrics/x")
    assert [line.split()[:5] for line in table] == [["data/denserho/metrics/a", "2", "1", "1", "2"], ["metrics/dose/b", "2", "1", "1", "2"]]
    assert folder == f"tables in {tmp_path / 'r'}, main figure {tmp_path / 'r/figures/replay.png'}"
    logged = [row["step"] for row in files.read_csv(tmp_path / "r" / "trajectories.csv") if row["cell"].endswith("a") and not row["member"]]
    assert logged == geometric_grid(60).tolist()


def test_differences_count_in_evaluations_of_the_cell() -> None:
    cell = Cell("a", p=7, members=(0,), block=1, budget_steps=8000)
    for every, one, other, evaluations in ((25, 100, 150, 2), (50, 100, 150, 1), (0, 1495, 1495, 0), (0, 1495, 1458, 1), (0, 1255, 1319, 2)):
        assert exp_replay.evaluations_between(dataclasses.replace(cell, eval_every=every), one, other) == evaluations


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{**good(), "arm": np.array([{"a": 1}], dtype=object)})
    return buffer.getvalue()


def packed(**changed: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v for k, v in {**good(), **changed}.items() if v is not None})
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("content, message", [   # named by number: their bytes would fill the screen
    (b"not a zip", "not a readable .npz"),
    (packed()[:200], "not a readable .npz"),
    (pickled(), "not a readable .npz of plain arrays"),
    (zipped("p.npy", b"\x93NUMPY\x01\x00garbage"), "not a readable .npz"),
    (zipped("notes.txt", b"hello"), "no released run is among the files; 1 of 1 files are no runs"),
    (packed(T_grok_per_seed=None), "lacks T_grok_per_seed"),
    (packed(wc_used=1e-50), "held norm is not positive"),
    (zipped("p.npy", bytes(100 << 20)), "100 MB unpacked, more than the 64"),
    (packed(p=None), "lacks p"),
    (packed(p=np.nan), "p is nan"),
    (packed(p=1), "out of its range"),
    (packed(p=1, train_acc=np.zeros(2)), "out of its range"),
    (packed(lr=-1.0), "out of its range"),
    (packed(tau=0.0), "out of its range"),
    (packed(max_steps=10**12), "out of its range"),
    (packed(T_mem_per_seed=np.zeros((2, 2))), "wrong length"),
    (packed(wc_used=0.0), "held norm is not positive"),
    (packed(arm="sideways"), "'sideways'"),
    (packed(p=7.5), "not a whole number"),
    (packed(H=512), "only 256 is trained"),
    (packed(steps=np.array([]), logit_scale=np.array([])), "no logged steps"),
    (packed(arch="tfnoln", H=256), "only 512 is trained"),
    (packed(arch="resnet"), "a network that is not replayed (resnet)"),
    (packed(t_fork=800), "lacks n_seed, N0, target"),
], ids=itertools.count())
def test_foreign_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.npz").write_bytes(content)
    with pytest.raises(UsageError) as error:
        exp_replay.run([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert "bad" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_or_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        exp_replay.run([str(tmp_path / "none")])
    with pytest.raises(UsageError, match=r"no \.npz file is below .*; name the folder that holds the released \.npz files"):
        exp_replay.run([str(tmp_path)])
    with pytest.raises(UsageError, match="METRICS_DIR is missing: name the folder with released"):
        exp_replay.run(["--dry-run"])
    np.savez(tmp_path / "cell.npz", **good())
    with pytest.raises(UsageError, match=r"no \.npz file below .* matches x\*; 1 are there"):
        exp_replay.run([str(tmp_path), "--match", "x*"])
    for member in ("5", "-1"):
        with pytest.raises(UsageError, match=f"--members.*{member}"):
            exp_replay.run([str(tmp_path), "--members", member, "--out", str(tmp_path / "out")])


def test_a_file_that_is_no_run_is_counted_and_left_out_and_changes_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights beside a run, as paper B released them: with times to grok and nothing that says what was trained."""
    flags = [str(tmp_path), "--out", str(tmp_path / "r"), "--backend", "eager"]
    np.savez(tmp_path / "1.npz", **good())
    exp_replay.run(flags)
    np.savez(tmp_path / "1_weights.npz", rho=1.0, tau=1.0, **{k: good()[k] for k in ("T_mem_per_seed", "T_grok_per_seed")})
    capsys.readouterr()
    exp_replay.run([*flags, "--figures-only"])
    assert capsys.readouterr().out.splitlines()[0] == "note: 1 of 2 files are no runs and are left out: 1_weights"
    assert [row["cell"] for row in files.read_csv(tmp_path / "r" / "replay.csv")] == ["1", "1"]
    (tmp_path / "2.npz").write_bytes(packed()[:-30])
    with pytest.raises(UsageError, match=r"2: not a readable \.npz"):
        exp_replay.run(flags)


@pytest.mark.skipif(os.name == "nt", reason="other names of files")
@pytest.mark.parametrize("name", [b"caf\xe9.npz", b"two\nlines.npz"])
def test_a_file_name_that_no_table_can_hold_is_one_line(tmp_path: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(packed())
    with pytest.raises(UsageError, match="the name of this file cannot be printed, or is not UTF-8; rename it") as error:
        exp_replay.run([str(tmp_path), "--out", str(tmp_path / "r")])
    assert str(error.value).isascii() and "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_the_comparison_walks_through_everything_once_whatever_the_number_of_cells() -> None:
    class Counted(list):
        walked = 0

        def __iter__(self):
            for row in super().__iter__():
                self.walked += 1
                yield row
    item = released.describe({k: np.asarray(v) for k, v in good().items()}, "0", ())
    items = [dataclasses.replace(item, cell=dataclasses.replace(item.cell, name=str(i))) for i in range(200)]
    runs = Counted({"cell": str(i), "member": m, "budget_steps": 50, "t_mem_step": 25, "t_grok_step": None} for i in range(200) for m in range(2))
    log = Counted({"cell": str(i), "member": m, "step": step, "logit_scale": i + m} for i in range(200) for m in range(2) for step in (1, 50))
    rows = Counted(exp_replay.compare(items, runs))
    cells = exp_replay.cell_rows(items, log, rows)
    assert (runs.walked, log.walked, rows.walked) == (400, 800, 400)
    found = [(row["cell"], row["n"], row["exact"], row["logit_scale"]) for row in cells]
    assert found == [(str(i), 2, 1, i + 0.5) for i in range(200)]            # member 1 is censored here alone
