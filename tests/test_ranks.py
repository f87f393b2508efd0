"""One command in several processes: whose rank it is, who trains what, and files that are those of one process, byte for byte."""
import json
from pathlib import Path

import numpy as np
import pytest

import exp_delay_law
import exp_fork
import exp_replay
from common import UsageError
from lab import desk, figures, files, ranks

LAW = ["--preset", "smoke", "--p", "11", "13", "--members", "0", "1", "--after-grok", "200", "--backend", "eager", "--rhos", "0.9",
       "--width", "32", "64", "--parts", "dense", "matrix", "--lrs", "3e-3", "6e-3"]
FORK = ["--p", "13", "--seeds", "4", "--members", "0", "1", "--lr", "3e-3", "--budget", "200", "--backend", "eager", "--width", "32", "64",
        "--parts", "same", "raised", "free", "--fork-steps", "100", "150"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for launcher in ranks.LAUNCHERS for name in launcher):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Name -> experiment and flags. For the delay law every run counts as having grokked at its first evaluation, so that there is a W_c."""
    released = tmp_path / "released"
    released.mkdir()
    norms = np.array([30.0, 31.0], dtype=np.float32)
    same = dict(p=13, alpha=0.4, lam=1.0, lr=3e-3, steps=np.array([101.0, 200.0]), logit_scale=np.ones(2), T_mem_per_seed=np.array([50, 50]),
                T_grok_per_seed=np.array([-1, -1]))
    for arm in ("free", "clamp_raised"):
        np.savez(released / f"{arm}.npz", arm=arm, t_fork=100, n_seed=2, N0=norms, target=0 * norms if arm == "free" else norms, **same)
    for tau in (1.0, 1.5, 2.0):
        np.savez(released / f"tau{tau}.npz", arm="none", max_steps=150, tau=tau, **same)
    monkeypatch.setattr("lab.released.FORK_BUDGET", 200)
    return {"law": (exp_delay_law, LAW), "fork": (exp_fork, FORK), "replay": (exp_replay, [str(released), "--backend", "eager"])}


def call(monkeypatch: pytest.MonkeyPatch, experiment: object, flags: list[str], out: Path, rank: tuple[int, int] | None = None) -> None:
    with monkeypatch.context() as patch:
        if experiment is exp_delay_law:
            patch.setattr("lab.book.CROSSINGS",
                          (("train_accuracy", 0.99), ("test_accuracy", 0.0), ("test_accuracy", 0.0), ("test_accuracy", 0.95)))
        patch.setattr(figures, "save_figure", lambda *_: None)
        for name, value in zip(("RANK", "WORLD_SIZE"), rank or (), strict=False):
            patch.setenv(name, str(value))
        desk.start(experiment.run, [*flags, "--out", str(out)])


def contents(folder: Path) -> dict[str, object]:
    """Every table as bytes, and the summary; not the provenance, which has the seconds."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".csv" or path.name == "config.json"}
    if (folder / "summary.json").exists():
        found["summary"] = {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k != "provenance"}
    return found


@pytest.mark.parametrize("name, order", [("law", [1, 0]), ("fork", [2, 0, 1]), ("replay", [0, 1])])
def test_ranks_leave_the_files_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, commands: dict,
                                              name: str, order: list[int]) -> None:
    experiment, flags = commands[name]
    one, many, n = tmp_path / "one", tmp_path / "many", len(order)
    call(monkeypatch, experiment, flags, one)
    capsys.readouterr()
    for done, rank in enumerate(order):
        assert not (many / "runs.csv").exists()
        call(monkeypatch, experiment, flags, many, (rank, n))
        text = capsys.readouterr().out
        missing = sorted(order[done + 1 :])
        assert f"rank {rank} of {n} has trained its share" in text
        if missing:
            assert f"{', '.join(map(str, missing))} of {n} {'are' if missing[1:] else 'is'} missing (RANK={missing[0]} WORLD_SIZE={n} " in text
            with pytest.raises(UsageError, match=f"{missing[0]}.* of {n} (is|are) missing"):   # one process alone names them too, and trains nothing
                call(monkeypatch, experiment, flags, many)
    assert "all shards are there" in text and text.count("(from the checkpoint)") >= n
    assert contents(many) == contents(one) and len(contents(one)) >= 4
    for late in ((0, n), None, "merger"):   # a rank that is started again when all is done; one process; a second one that was to merge
        with monkeypatch.context() as patch:
            patch.setattr(desk.Lab, "train", None)
            if late == "merger":
                patch.setattr(desk.Lab, "merging", True)
            call(monkeypatch, experiment, flags, many, None if late == "merger" else late)
        assert "the results are in" in capsys.readouterr().out and contents(many) == contents(one) and not (many / "checkpoint").exists()
    call(monkeypatch, experiment, [*flags, "--figures-only"], many, (1, n))
    assert capsys.readouterr().out == f"rank 1 of {n} (RANK=1 WORLD_SIZE={n}): --figures-only is for rank 0\n"
    call(monkeypatch, experiment, [*flags, "--figures-only"], many, (0, n))
    assert contents(many) == contents(one) and not (many / "checkpoint").exists()


def test_a_replay_of_other_files_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: dict) -> None:
    """What is in the released files counts among the settings."""
    experiment, flags = commands["replay"]
    call(monkeypatch, experiment, flags, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "trajectories.csv").unlink()   # as runs of record are kept
    call(monkeypatch, experiment, flags, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    path = tmp_path / "released" / "tau1.5.npz"
    np.savez(path, **{**np.load(path), "T_grok_per_seed": np.array([-1, 125])})
    with pytest.raises(UsageError, match="holds another configuration: inputs is"):
        call(monkeypatch, experiment, flags, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_merge_that_is_cut_short_is_made_again_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: dict) -> None:
    experiment, flags = commands["fork"]
    call(monkeypatch, experiment, flags, tmp_path / "one")
    call(monkeypatch, experiment, flags, tmp_path / "two", (1, 2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call(monkeypatch, experiment, flags, tmp_path / "two", (0, 2))
    assert (tmp_path / "two" / "runs.csv").exists() and (tmp_path / "two" / "checkpoint").exists()
    call(monkeypatch, experiment, flags, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_ranks_of_another_number_after_ranks_of_which_nothing_is_dealt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                                       commands: dict) -> None:
    """One of four ends; the control does not grok, so nothing is dealt; then two, who find the control trained, leave no snapshot of their own."""
    flags = [*LAW, "--budget", "100"]
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)
    for out, rank in (("one", None), ("two", (0, 4)), ("two", (0, 2)), ("two", (1, 2))):
        with monkeypatch.context() as patch:
            for name, value in zip(("RANK", "WORLD_SIZE"), rank or (), strict=False):
                patch.setenv(name, str(value))
            desk.start(exp_delay_law.run, [*flags, "--out", str(tmp_path / out)])
    assert "has merged" not in capsys.readouterr().out and not (tmp_path / "two" / "checkpoint").exists()
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(contents(tmp_path / "one")) >= 4


def test_an_altered_shard_is_named_and_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                     commands: dict) -> None:
    experiment, flags = commands["fork"]
    call(monkeypatch, experiment, flags, tmp_path / "one")
    call(monkeypatch, experiment, flags, tmp_path / "two", (1, 2))
    shard = tmp_path / "two" / "checkpoint" / "arms_p13.1of2.done.pt"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"the shard of arms_p13 in .* shard 1 of 2 is missing .RANK=1 WORLD_SIZE=2"):
        call(monkeypatch, experiment, flags, tmp_path / "two", (0, 2))
    assert f"refused {shard.name} (truncated or altered)" in capsys.readouterr().out
    call(monkeypatch, experiment, flags, tmp_path / "two", (1, 2))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_bad_input_found_in_training_leaves_nothing_of_any_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (1, 0):
        with pytest.raises(UsageError, match="has not memorised there yet"):
            call(monkeypatch, exp_fork, [*FORK[:-3], "--fork-steps", "25"], tmp_path / "out", (rank, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variables, expected", [
    ("", (0, 1, 0)),
    ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 SLURM_PROCID=0 SLURM_NTASKS=2", (3, 8, 1)),
    ("RANK=3", (0, 1, 0)),                                                              # half of a pair means something else
    ("SLURM_PROCID=5 SLURM_NTASKS=6 SLURM_LOCALID=2", (5, 6, 2)),
    ("SLURM_ARRAY_TASK_ID=7 SLURM_ARRAY_TASK_COUNT=4 SLURM_ARRAY_TASK_MIN=3 SLURM_ARRAY_TASK_STEP=2", (2, 4, 0)),
    ("SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_COUNT=3 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1", (3, 6, 1)),
    ("RANK=0 WORLD_SIZE=1 SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_COUNT=3", (0, 1, 0)),   # alone, whatever launched it
    ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1", (1, 2, 1)),
    ("PMI_RANK=1 PMI_SIZE=4", (1, 4, 0)),
])
def test_ranks_of_the_usual_launchers(variables: str, expected: tuple[int, int, int]) -> None:
    assert ranks.rank_of(dict(v.split("=") for v in variables.split()))[:3] == expected


def test_the_first_line_says_which_rank_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A command inside `sbatch --ntasks=4` without srun is one process that would wait for three others."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    exp_fork.run([*FORK, "--dry-run", "--out", str(tmp_path / "out")])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "rank 0 of 4 (SLURM_PROCID=0 SLURM_NTASKS=4); RANK=0 WORLD_SIZE=1 makes a process work alone"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    exp_fork.run([*FORK, "--dry-run", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("rank 4 of 8 (SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_COUNT=2 SLURM_PROCID=0 SLURM_NTASKS=4); ")


@pytest.mark.parametrize("variables, message", [
    ("RANK=2 WORLD_SIZE=2", "RANK and WORLD_SIZE in the environment say process 2 of 2"),
    ("RANK=-1 WORLD_SIZE=2", "process -1 of 2"),
    ("RANK=x WORLD_SIZE=2", "RANK in the environment must be a whole number, got 'x'"),
    ("SLURM_ARRAY_TASK_ID=9 SLURM_ARRAY_TASK_COUNT=3", "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT in the environment say process 9 of 3"),
])
def test_an_impossible_rank_is_one_line(variables: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        ranks.rank_of(dict(v.split("=") for v in variables.split()))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_dealing_is_fair_over_stages_and_leaves_nothing_out() -> None:
    loads = [0.0] * 3
    owners = ranks.deal([5, 1, 9, 3, 3], loads)
    assert owners == [1, 1, 0, 2, 2] and loads == [9, 6, 6]
    assert ranks.deal([2, 2], loads) == [1, 2] and ranks.deal([1], [0.0] * 4) == [0]
