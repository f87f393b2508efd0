"""What a user types: bad input ends in one line and writes nothing; the smoke preset runs end to end, twice to the same bytes."""
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import exp_delay_law
import exp_fork
import exp_logit_scale
import exp_parity
import exp_replay
import exp_saturation
import exp_transformer
from common import Cell, UsageError, unique
from lab import files, provenance, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bench_step

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("flags, message", [
    ("--p 1", "--p must be between 2 and 1000, got 1"),
    ("--p 2 --train-fracs 0.1", "leaves no training pair"),
    ("--p abc", "invalid int value"),
    ("--p", "expected at least one argument"),
    ("--rhos 0", "--rhos must be > 0, got 0"),
    ("--rhos -1", "--rhos must be > 0"),
    ("--rhos nan", "--rhos must be finite"),
    ("--rhos 1 1", "lists a value twice"),
    ("--lrs -1", "--lrs must be > 0, got -1"),
    ("--weight-decays -0.1", "--weight-decays must be >= 0"),
    ("--train-fracs 1.0", "below 1"),
    ("--members 99", "--members must lie in the block of --parts dense, 0..15, got 99"),
    ("--members -1", "--members are numbered from 0, got -1"),
    ("--parts moduli --members 12", "--members must lie in the block of --parts moduli, 0..11, got 12"),
    ("--parts moduli --moduli-seeds 20 --members 20", "--parts moduli, 0..19, got 20"),      # more than --seeds, less than the part's own block
    ("--model transformer", "unknown flag --model; did you mean --moduli? see --help"),
    ("--parts moduli --p 41 --moduli 41", "--p and --moduli both name"),
    ("--moduli-seeds 0", "--moduli-seeds must be between 1"),
    ("--rhos 1e300", "--rhos must be at most 100"),
    ("--rhos 1e-50", "--rhos must be at least 0.001, got 1e-50"),       # times W_c it is 0 in float32, and holds nothing
    ("--lrs 1e-50", "--lrs must be at least 1e-20, got 1e-50"),
    ("--seeds 0", "--seeds must be between 1"),
    ("--parts nothing", "--parts must be among dense"),
    ("--preset huge", "--preset must be one of smoke, laptop, paper"),
    ("--dtype float16", "--dtype must be one of float32, float64"),
    ("--backend triton --device cpu", "does not run on --device cpu"),
    ("--arithmetic tf32x3 --device cpu", "CUDA kernels"),
    ("--after-grok 30", "--after-grok must be 0 or a multiple of 25"),
    ("--resume", "no checkpoint in"),
    ("--lr 1e-3", "unknown flag --lr; did you mean --lrs? see --help"),
    ("--rhos=1 dense", "no flag takes dense; see --help"),
    ("--xyzzy", "unknown flag --xyzzy; see --help"),
    pytest.param("--device cuda", "no CUDA device is visible", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")),
])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, flags: str, message: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError) as error:
        exp_delay_law.run([*flags.split(), "--out", str(out)])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("script, flags", [
    (exp_delay_law, "--p 257 --device cuda"), (exp_delay_law, "--parts moduli --moduli 59 257 --backend triton"), (exp_fork, "--p 257"),
    (exp_logit_scale, "--p 300"), (exp_transformer, "--p 256"), (bench_step, "--p 59 257"), (bench_step, "--model transformer --p 256")])
def test_a_modulus_too_large_for_a_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType, flags: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"the CUDA kernels of model .* take p up to 25[56], got .*; use --device cpu"):
        script.run([*flags.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_conditions_that_differ_never_share_a_name_and_p_narrows_every_part(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp_delay_law.run(["--dry-run", "--rhos", "0.851", "0.852", "--out", str(tmp_path / "out")])
    assert "rho0.851:" in capsys.readouterr().out.replace("  ", " ")
    exp_delay_law.run(["--dry-run", "--p", "59", "--parts", "moduli", "concentration", "--weight-decays", "0", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "p59_b12" in text and "wd0_" in text and not any(f"p{p}_" in text for p in (29, 31, 41, 97))


def test_doses_that_round_to_one_another_are_cells_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp_delay_law.run(["--dry-run", "--rhos", "1.15", "1.154", "1.1500000000000001", "1.1500000000000004", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert all(text.count(f"_rho{rho}: ") == 1 for rho in ("1.15", "1.154", "1.1500000000000004"))
    one = Cell("x", p=7, members=(0,), block=1, budget_steps=50, rho=1.15)
    longer = dataclasses.replace(one, budget_steps=75)
    assert unique([one, longer, one]) == [longer]
    with pytest.raises(ValueError, match="two conditions share the name x"):
        unique([one, dataclasses.replace(one, rho=1.154)])


@pytest.mark.parametrize(("experiment", "flags", "said"), [
    (exp_delay_law, "--parts dense --weight-decays 2", "--weight-decays is read with --parts concentration or frontier alone"),
    (exp_delay_law, "--parts dense --lrs 1e-3 2e-3", "of --lrs the first value alone is read here, all are with --parts matrix"),
    (exp_delay_law, "--parts moduli --seeds 4", "--seeds is read with --parts dense or matrix or oneshot or frontier alone"),
    (exp_logit_scale, "--gammas 0.3", "--gammas is read with --parts allocation alone"),
    (exp_transformer, "--model transformer_ln --parts concentration --rhos 1.1", "--rhos is read with --parts dense or groups or temperature alone"),
    (exp_fork, "--parts free same --rho 1.1", "--rho is read with --parts lowered or raised alone"),
    (exp_delay_law, "--networks published --seed0 7", "--seed0 is read with --networks fresh alone, the papers' own networks have theirs"),
    (exp_logit_scale, "--networks published --parts dose --weight-decays 2", "--weight-decays is read with --networks fresh alone"),
    (exp_fork, "--networks published --budget 5000", "--budget is read with --networks fresh alone"),
    (exp_transformer, "--networks published --w-c 30", "--w-c is read with --networks fresh alone")])
def test_a_flag_that_nothing_reads_is_refused(experiment: ModuleType, flags: str, said: str, tmp_path: Path) -> None:
    """It would name a folder, or be another configuration there, and change no number; tables that are there are drawn with it."""
    with pytest.raises(UsageError) as error:
        experiment.run([*flags.split(), "--out", str(tmp_path / "out")])
    assert str(error.value).startswith(said) and "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="runs"):
        experiment.run([*flags.split(), "--figures-only", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(("experiment", "flags"), [
    (exp_delay_law, "--parts concentration --weight-decays 2"), (exp_delay_law, "--parts matrix --lrs 1e-3 2e-3"),
    (exp_delay_law, "--parts moduli --members 11"), (exp_logit_scale, "--networks published fresh --parts dose --weight-decays 2"),
    (exp_delay_law, "--parts concentration --train-frac 0.3")])
def test_a_flag_that_some_part_reads_is_taken(experiment: ModuleType, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    experiment.run([*flags.split(), "--dry-run", "--out", str(tmp_path / "out")])
    assert " cells, " in capsys.readouterr().out


def test_provenance_names_no_folder_outside(tmp_path: Path) -> None:
    words = ["--out", "results/fork/p97", str(tmp_path / "runs"), "../released/metrics", "0.9"]
    assert [provenance._without_machine(word) for word in words] == ["--out", "results/fork/p97", "runs", "metrics", "0.9"]


def test_provenance_names_the_commit_of_this_very_code_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone; the script not tracked; an archive unpacked inside another repository, which has a file of that name too; git that fails."""
    outer, script = tmp_path / "outer", "exp_fork.py"
    inner = outer / "lab"
    inner.mkdir(parents=True)
    for name in (script, "lab/exp_fork.py", "lab/mine.py"):
        (outer / name).write_text("1\n")

    def origin(root: Path, script: str) -> tuple[str, bool | None]:
        monkeypatch.setattr(provenance, "ROOT", root)
        monkeypatch.setattr(sys, "argv", [str(root / script)])
        found = provenance.origin()
        return found["commit"], found["dirty"]

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *identity, *words], cwd=outer, check=True, capture_output=True, text=True).stdout.strip()
    git("init", "-q")
    git("add", script, "lab/exp_fork.py")
    assert origin(outer, script) == ("unknown", None)   # no commit yet
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert origin(outer, script) == (commit, False) and origin(inner, script) == ("unknown", None)
    assert origin(outer, "lab/mine.py") == ("unknown", None) and origin(outer, "-c") == ("unknown", None)
    (outer / script).write_text("2\n")
    assert origin(outer, script) == (commit, True)
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))   # inside a hook of the other repository
    assert origin(inner, script) == ("unknown", None)
    monkeypatch.delenv("GIT_DIR")
    (outer / ".git" / "HEAD").write_text("")
    assert origin(outer, script) == ("unknown", None)
    monkeypatch.setenv("PATH", "")
    assert origin(outer, script) == ("unknown", None)


def test_a_command_runs_without_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under PYTHONOPTIMIZE=2."""
    monkeypatch.setattr(exp_fork, "__doc__", None)
    exp_fork.run(["--dry-run", "--out", str(tmp_path / "out")])


def test_exit_code_and_stderr_of_a_bad_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "exp_delay_law.py", "--rhos", "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == "error: --rhos must be > 0, got 0\n"


EXPERIMENTS = (exp_delay_law, exp_fork, exp_logit_scale, exp_parity, exp_replay, exp_saturation, exp_transformer)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_help_begins_with_three_commands_then_flags_in_groups_the_experiments_own_first(experiment: object, tmp_path: Path,
                                                                                       capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        experiment.run(["--help"])
    text = capsys.readouterr().out
    commands = [shlex.split(line.strip().split("   ")[0]) for line in text.splitlines()[:3]]
    assert done.value.code == 0 and [words[:2] for words in commands] == [["python", f"{experiment.__name__}.py"]] * 3
    assert text.splitlines()[3] == "" and text.count("    python ") == 3
    place = {f.name: re.search(rf"\n  (--)?{f.name.replace('_', '-')}\s", text.replace("metrics_dir", "metrics-dir"))
             for f in dataclasses.fields(experiment.Config) if f.metadata["kind"] != "fixed"}
    assert None not in place.values()
    own = [name for name in experiment.Config.__annotations__ if name in place]
    shared = [name for name in place if name not in (*own, *settings.HOW, *settings.WHERE)]
    order = ["what to train:", *own, *shared, "how to compute:", *settings.HOW, "where to write", *settings.WHERE]
    at = [place[name].start() if name in place else text.index(name) for name in order]
    assert at == sorted(at)
    for words in commands:
        if not {"METRICS_DIR", "--twin-of"} & set(words):
            experiment.run([*words[2:], "--device", "cpu", "--dry-run", "--out", str(tmp_path / "out")])


def test_dry_run_lists_the_cells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp_delay_law.run(["--dry-run", "--preset", "paper", "--device", "cpu", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "clamp_p59_b16_rho1.25" in text and "rescale_p59_b16_rho0.70" in text and "clamp_p41_b12_rho1.30" in text
    assert "free_p59_b20_lr0.003_wd3_frac0.5" in text and not (tmp_path / "out").exists()


def test_a_composite_modulus_is_allowed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp_delay_law.run(["--dry-run", "--p", "60", "--out", str(tmp_path / "out")])
    assert "p=60 is not prime" in capsys.readouterr().out


TINY = ["--preset", "smoke", "--p", "13", "--members", "0", "1", "--backend", "eager", "--width", "32", "64"]    # it memorises; no more


@pytest.fixture
def short_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp_delay_law, "dense_budget", lambda rho: 300)
    whole = exp_delay_law.free
    monkeypatch.setattr(exp_delay_law, "free", lambda *a, **k: dataclasses.replace(whole(*a, **k), budget_steps=300))


def test_a_control_that_does_not_grok_leaves_complete_files(tmp_path: Path, short_budgets: None, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    exp_delay_law.run([*TINY, "--out", str(out)])
    assert "no W_c" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} >= {"runs.csv", "cells.csv", "trajectories.csv", "summary.json", "config.json"}
    runs = files.read_csv(out / "runs.csv")
    assert len(runs) == 2 and all(run["censored"] == 1 and run["t_grok_step"] is None and run["budget_steps"] == 300 for run in runs)
    with pytest.raises(UsageError, match="holds another configuration: members is"):
        exp_delay_law.run([*TINY[:4], "--members", "0", "--backend", "eager", "--out", str(out)])
    assert files.read_csv(out / "runs.csv") == runs
    (out / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"not a runs\.csv"):
        exp_delay_law.run([*TINY, "--out", str(out), "--figures-only"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="is no results folder"):
        exp_delay_law.run([*TINY, "--out", str(tmp_path / "other")])


def test_runs_that_diverge_warn_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """From training to the figures, some runs not finite, the others as if they were alone; every run counts as having grokked at once."""
    monkeypatch.setattr("lab.book.CROSSINGS", (("train_accuracy", 0.0), ("test_accuracy", 0.0), ("test_accuracy", 0.0), ("test_accuracy", 0.0)))
    flags, rates = [*TINY, "--parts", "dense", "matrix", "--rhos", "0.9", "--after-grok", "200", "--lrs"], ["1e-3", "1e30"]
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, lrs in (("both", rates), ("one", rates[:1])):
            exp_delay_law.run([*flags, *lrs, "--out", str(tmp_path / name)])
            rows[name] = files.read_csv(tmp_path / name / "runs.csv")
    assert capfd.readouterr().err == ""
    assert {(run["lr"], run["diverged"]) for run in rows["both"]} == {(1e-3, 0), (1e30, 1)}
    assert [run for run in rows["both"] if run["lr"] == 1e-3] == rows["one"]


SMOKE = ["--preset", "smoke", "--members", "0"]


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("runs.csv", "cells.csv", "trajectories.csv", "contraction.csv")}


def start(out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "exp_delay_law.py", *SMOKE, "--out", str(out)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_smoke_preset_end_to_end_interrupted_and_not(tmp_path: Path) -> None:
    """The same command twice gives the same bytes; so does one stopped by SIGINT half-way and started again."""
    first = start(tmp_path / "a")
    text, _ = first.communicate(timeout=400)
    assert first.returncode == 0, text
    second = start(tmp_path / "b")
    while not list((tmp_path / "b").glob("checkpoint/control.done.pt")):
        assert second.poll() is None, second.communicate()
        time.sleep(0.05)
    time.sleep(1.5)   # inside the clamped cells
    second.send_signal(signal.SIGINT)
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and "the same command continues" in text and (tmp_path / "b" / "checkpoint").is_dir()
    third = start(tmp_path / "b")
    text, _ = third.communicate(timeout=400)
    assert third.returncode == 0 and "continuing from" in text, text
    assert tables(tmp_path / "a") == tables(tmp_path / "b") and not (tmp_path / "b" / "checkpoint").exists()

    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert [claim["id"] for claim in summary["claims"]] == ["A.matrix.free.lr0.008"]     # held norms are relative to the W_c of another rate
    assert "alpha.p59" in {finding["id"] for finding in summary["findings"]}
    assert summary["provenance"]["executed_over_needed"] <= 1.05
    assert {"commit", "dirty", "command", "versions", "device", "backend", "dtype", "arithmetic", "run_steps"} <= set(summary["provenance"])
    runs = files.read_csv(tmp_path / "a" / "runs.csv")
    assert all(run["t_grok_step"] is not None for run in runs) and {run["arm"] for run in runs} == {"free", "clamp"}
    assert list(runs[0])[: len(files.RUN_COLUMNS)] == list(files.RUN_COLUMNS)
    assert (tmp_path / "a" / "figures" / "dense.png").stat().st_size > 5000 and (tmp_path / "a" / "figures" / "dense.pdf").exists()

    os.remove(tmp_path / "a" / "figures" / "dense.png")
    exp_delay_law.run([*SMOKE, "--out", str(tmp_path / "a"), "--figures-only"])
    assert (tmp_path / "a" / "figures" / "dense.png").exists() and tables(tmp_path / "a") == tables(tmp_path / "b")


def test_columns_have_types(tmp_path: Path) -> None:
    """Cells named after released files `1.npz` and `nan.npz`; a table saved by a spreadsheet; text where a number belongs."""
    rows = [{"cell": "1", "member": 0, "t_grok": 25}, {"cell": "1.50", "member": 1, "t_grok": None}, {"cell": "nan", "member": 2, "t_grok": 2.5}]
    files.write_csv(tmp_path / "t.csv", rows)
    assert files.read_csv(tmp_path / "t.csv") == rows
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert files.read_csv(tmp_path / "t.csv") == rows
    (tmp_path / "t.csv").write_text(text.replace("25", "soon"))
    with pytest.raises(UsageError, match=r"t\.csv: 'soon' in column t_grok is no number"):
        files.read_csv(tmp_path / "t.csv")


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n3", "a,b\n1,2,3\n", "a,b\n1\n"])
def test_a_table_that_is_cut_off_or_ragged_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError, match="cut off or has rows of unequal length"):
        files.read_csv(tmp_path / "t.csv")
