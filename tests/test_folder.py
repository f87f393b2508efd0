"""Whose the output folder is: taken away and made again, taken between two locks, finished before, impossible to use."""
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from short_runs import FLAGS, SHORT, main, tables

import exp_fork
from common import UsageError
from lab import desk, figures, files, folder, settings

DRAW = figures.save_figure


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)
    monkeypatch.setattr(folder, "LOCK_TRIES", 2)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


MOMENTS = {"save": (desk.Progress, "__call__"), "inside a save": (torch, "save"), "tables": (files, "write_csv"), "figures": (figures, "save_figure"),
           "finish": (desk.Lab, "finish"), "discard": (desk.Lab, "discard"), "discard of a rank": (desk.Lab, "discard"),
           "share of a rank": (desk.Lab, "_leave")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_folder_that_another_command_has_made_again_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture, moment: str) -> None:
    """Just before this command saves, while it does, before it writes tables or figures, ends, takes back what it made, leaves its share."""
    out, theirs = tmp_path / "out", {}
    monkeypatch.setattr(figures, "save_figure", DRAW if moment == "figures" else figures.save_figure)
    once = getattr(*MOMENTS[moment])

    def robbed(*args: object) -> object:
        if not theirs:
            shutil.rmtree(out)
            (out / "checkpoint").mkdir(parents=True)
            (out / "config.json").write_text("theirs")
            for name in ("runs.csv.part", "checkpoint/trunk_p11_100.fresh.pt.part", "checkpoint/arms_p11.pt", "checkpoint/arms_p11.0of2.pt"):
                (out / name).write_text("theirs")
            theirs.update(contents(out))
        return once(*args)
    monkeypatch.setattr(*MOMENTS[moment], robbed)
    if moment.endswith("of a rank"):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = main(monkeypatch, capsys, [*FLAGS[:-2], "25"] if moment.startswith("discard") else SHORT, out)
    assert code == 2 and errors == (
        f"error: {out}, or config.json in it, was removed or replaced while this command worked there, and nothing more is written to it; "
        "if another command has it now, choose another --out; if not, the same command continues from the last checkpoint that is left\n")
    assert theirs and contents(out) == theirs


def test_a_lock_is_on_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who had it may remove it between our opening it and our locking it."""
    fcntl = pytest.importorskip("fcntl")
    path, once = tmp_path / "lock", fcntl.flock

    def late(file: object, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", once)
        path.unlink()
        once(file, how)
    monkeypatch.setattr(fcntl, "flock", late)
    assert files.is_at(files.lock(path), path)
    files.unlock(path)


def lab_of(out: Path, *flags: str) -> desk.Lab:
    config, given = settings.parse(exp_fork.Config, exp_fork.PRESETS, exp_fork.ARMS, [*SHORT, *flags, "--out", str(out)])
    return desk.Lab("fork", config, given, exp_fork.PRESETS)


def test_a_rank_with_other_settings_is_refused_beside_one_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw an empty folder when it began; since then another rank has written its settings and shares the lock."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ours = lab_of(tmp_path)
    with open(tmp_path / "config.json", "w") as theirs:
        theirs.write(json.dumps({**ours.settings, "lr": 0.5}))
        theirs.flush()
        fcntl.flock(theirs, fcntl.LOCK_SH)
        with pytest.raises(UsageError, match=r"holds another configuration: lr is 0\.5, this command has 0\.003"):
            ours.open()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("intruder, message", [("stays", "another process works in"), ("leaves", "holds another configuration: lr is 0.5")])
def test_who_comes_between_the_two_locks_of_a_rank_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intruder: str, message: str) -> None:
    """A rank has the folder for itself to write the settings, then shares it; in between another command can take it."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    once, intruders, ours = files.lock, [], lab_of(tmp_path / "out")

    def lock(path: Path, shared: bool = False) -> object:
        if shared and not intruders:
            files.unlock(path)
            intruders.append(open(path, "r+"))   # noqa: SIM115
            fcntl.flock(intruders[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            intruders[0].write(json.dumps({**ours.settings, "lr": 0.5}))
            intruders[0].truncate()
            intruders[0].flush()
            if intruder == "leaves":
                intruders[0].close()
        return once(path, shared)
    monkeypatch.setattr(files, "lock", lock)
    try:
        with pytest.raises(UsageError, match=re.escape(message)):
            ours.open()
    finally:
        intruders[0].close()
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_what_is_complete_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Killed when all was written and the checkpoint renamed; then given again, with and without --resume, until a table is not there."""
    out, clear = tmp_path / "out", desk.Lab._clear

    def killed(self: desk.Lab, folder: Path) -> None:
        clear(self, folder) if not self.opened else (_ for _ in ()).throw(SystemExit(9))
    with monkeypatch.context() as patch:
        patch.setattr(desk.Lab, "_clear", killed)
        assert main(monkeypatch, capsys, SHORT, out)[0] == 9 and (out / "checkpoint.spent").is_dir()
    before = tables(out)
    for flags in (SHORT, [*SHORT, "--resume"]):
        with monkeypatch.context() as patch:
            patch.setattr(desk.Lab, "train", None)
            code, text, errors = main(monkeypatch, capsys, flags, out)
        assert (code, errors) == (0, "") and text.splitlines()[-1].startswith(f"the results are in {out}; remove its runs.csv to train again")
        assert tables(out) == before and not [*out.glob("checkpoint*")]
    for name in ("trajectories.csv", "runs.csv", "cells.csv", "provenance.json"):   # as runs of record are kept; as the message says; damaged
        (out / name).unlink()
        code, text, errors = main(monkeypatch, capsys, [*SHORT, "--resume"], out)
        assert code == 2 and errors.startswith("error: --resume: no checkpoint in")
        code, text, errors = main(monkeypatch, capsys, SHORT, out)
        assert (code, errors) == (0, "") and "the results are in" not in text and tables(out) == before


@pytest.mark.parametrize("target", ["there", "gone"])
def test_a_checkpoint_may_be_a_link_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                    target: str) -> None:
    """It stays where it was put, whether the disk has been cleared or the command is killed when all is written; what it held is gone."""
    out, scratch, clear = tmp_path / "out", tmp_path / "scratch" / "mine", desk.Lab._clear
    out.mkdir()
    (out / "checkpoint").symlink_to(scratch)
    if target == "there":
        scratch.mkdir(parents=True)

    def killed(self: desk.Lab, folder: Path) -> None:
        clear(self, folder) if not self.opened else (_ for _ in ()).throw(SystemExit(9))
    with monkeypatch.context() as patch:
        patch.setattr(desk.Lab, "_clear", killed)
        assert main(monkeypatch, capsys, SHORT, out)[0] == 9 and [*scratch.glob("arms_p11.done.pt")]
    code, text, errors = main(monkeypatch, capsys, SHORT, out)
    assert (code, errors) == (0, "") and "the results are in" in text
    for _ in range(2):
        assert os.readlink(out / "checkpoint") == str(scratch) and not [*scratch.iterdir()] and not os.path.lexists(out / "checkpoint.spent")
        (out / "runs.csv").unlink()
        assert main(monkeypatch, capsys, SHORT, out)[::2] == (0, "")


def test_resume_wants_a_checkpoint_not_a_folder_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "arms_p11.fresh.pt.part").touch()
    code, _, errors = main(monkeypatch, capsys, [*SHORT, "--resume"], tmp_path)
    assert code == 2 and errors == f"error: --resume: no checkpoint in {tmp_path}; run without --resume to start\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint", "arms_p11.fresh.pt.part"]


@pytest.mark.skipif(os.name == "nt", reason="other limits")
@pytest.mark.parametrize("below", ["x" * 300, "/".join(["y" * 200] * 21), "/".join(["z" * 97] * 41)])
def test_a_folder_with_too_long_a_name_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                          capsys: pytest.CaptureFixture, below: str) -> None:
    """A name that no file system takes; a path that the system does not take; one that it takes without the files in it."""
    out = tmp_path / below
    if below.startswith("z"):
        out = Path(f"{out}/{'z' * (4000 - len(str(out)))}")
    code, text, errors = main(monkeypatch, capsys, SHORT, out)
    assert code == 2 and errors.startswith(f"error: --out of {len(str(out))} characters cannot be used (File name too long), choose another: ")
    assert errors.count("\n") == 1 and not text and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("table, old, new", [
    ("runs.csv", ",free,", ",frea,"), ("runs.csv", ",11,", ",eleven,"), ("runs.csv", "collapse64_at_grok", "collapse_at_grok"),
    ("trajectories.csv", ",0,1,", ",0,,"), ("cells.csv", "free", "1e400")])
def test_tables_that_were_edited_are_drawn_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, table: str,
                                                    old: str, new: str) -> None:
    out = tmp_path / "out"
    main(monkeypatch, capsys, SHORT, out)
    text = (out / table).read_text()
    assert old in text
    (out / table).write_text(text.replace(old, new))
    if table == "cells.csv":
        (out / "trajectories.csv").unlink()   # else it is made from them again
    code, text, errors = main(monkeypatch, capsys, [*SHORT, "--figures-only"], out)
    assert code in (0, 2) and len(errors.splitlines()) == (code == 2)
    assert (f"note: the tables in {out} are not the ones" in text) == (table != "cells.csv")
    assert code == 0 or f"cannot draw from the tables in {out}" in errors or "is not a runs.csv" in errors or "is no number" in errors
