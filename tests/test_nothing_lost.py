"""What happens in a day: kills, damaged checkpoints, two commands in one folder, full disks, folders that go away. The bits stay the same."""
import contextlib
import errno
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from short_runs import FLAGS, SHORT, WIDE, main, start, tables, wait_for

import exp_fork
from common import UsageError
from kernels import cpu
from lab import desk, figures, files, folder

KILLS = int(os.environ.get("GROKKING_TEST_KILLS", "3"))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda *_: None)
        exp_fork.run([*SHORT, "--out", str(out)])
    return tables(out)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL, wherever it strikes: starting, training, saving, writing results. Each start goes on from what the one before left. By the C++
    step, where there is a compiler: it is several times as fast."""
    budget = (4 if cpu.has_compiler() else 1) * (300 + 75 * KILLS)
    flags = [*WIDE, "--backend", "auto", "--budget", str(budget), "--parts", "same", "free"]
    exp_fork.run([*flags, "--out", str(tmp_path / "whole")])
    out, moments, kills, continued = tmp_path / "out", random.Random(KILLS), 0, 0
    while kills < KILLS:
        continued += bool([*out.glob("checkpoint/*.pt")])
        process = start(out, flags, 0.05, PYTHONUNBUFFERED="1")
        process.stdout.readline()   # it has imported and begins
        time.sleep(moments.uniform(0, 2.5))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL) and not errors, errors
        if process.returncode == 0:   # too quick for us: from the start
            shutil.rmtree(out)
        else:
            kills += 1
    desk.start(exp_fork.run, [*flags, "--out", str(out)])
    assert tables(out) == tables(tmp_path / "whole")
    assert {path.name for path in out.iterdir()} - {"figures"} == {path.name for path in (tmp_path / "whole").iterdir()}
    print(f"{kills} of {KILLS} kills survived; {continued} starts found a checkpoint")


def test_a_second_command_in_the_folder_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                                       request: pytest.FixtureRequest) -> None:
    flags = [*FLAGS, "--budget", "4000"]
    alone, ranked = start(tmp_path / "a", flags, 60), start(tmp_path / "b", flags, 60, RANK="0", WORLD_SIZE="2")
    request.addfinalizer(alone.kill)
    request.addfinalizer(ranked.kill)
    wait_for((tmp_path / "a" / "checkpoint").is_dir, alone)
    wait_for((tmp_path / "b" / "checkpoint" / "lock.0of2").exists, ranked)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    for out in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(UsageError, match=f"another process works in {out}"):
            exp_fork.run([*flags, "--out", str(out)])
        with pytest.raises(UsageError, match=f"another process works in {out}"):
            exp_fork.run([*flags, "--out", str(out), "--figures-only"])
    monkeypatch.setattr(folder, "LOCK_TRIES", 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=f"rank 0 of 2 already works in {tmp_path / 'b'}"):
        exp_fork.run([*flags, "--out", str(tmp_path / "b")])
    with pytest.raises(UsageError, match="another process works in"):   # nor does rank 0 draw where another rank trains
        exp_fork.run([*flags, "--out", str(tmp_path / "b"), "--figures-only"])
    with pytest.raises(UsageError, match="another process works in"):   # a rank beside one that works alone
        exp_fork.run([*flags, "--out", str(tmp_path / "a")])
    assert before.keys() == {*tmp_path.glob("*/*")} and (tmp_path / "a" / "config.json").stat().st_mtime_ns == before[tmp_path / "a" / "config.json"]
    alone.kill()
    ranked.terminate()
    _, errors = ranked.communicate(timeout=30)
    assert ranked.returncode == 143 and errors == "stopped; the same command continues from here\n"
    alone.communicate()
    for out in (tmp_path / "a", tmp_path / "b"):
        assert files.lock(out / "config.json")
        files.unlock(out / "config.json")


def test_a_refused_checkpoint_is_named_and_the_last_good_one_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                                  whole: dict) -> None:
    """Stopped with two snapshots of a stage on disk: one damaged, then both; foreign files beside them."""
    once, checkpoint = desk.Progress.__call__, tmp_path / "out" / "checkpoint"

    def stopping(self: desk.Progress, ensemble: object) -> None:
        once(self, ensemble)
        if self.stage == "arms_p11" and [*checkpoint.glob("arms_p11*.pt")]:   # the interrupt saves one more
            raise KeyboardInterrupt
    def command(stopped: bool, damaged: tuple[str, ...] = ()) -> str:
        for name in damaged:
            path = checkpoint / f"arms_p11{name}.pt"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if stopped else contextlib.nullcontext():
            patch.setattr(desk, "SAVE_EVERY", 0)
            patch.setattr(desk.Progress, "__call__", stopping if stopped else once)
            exp_fork.run([*SHORT, "--out", str(tmp_path / "out")])
        return capsys.readouterr().out
    refused = "refused arms_p11.pt (truncated or altered); arms_p11 goes on from arms_p11.previous.pt"
    command(stopped=True)
    assert refused in command(True, damaged=("",))    # saves once more, which must not push the good one out for the bad one
    assert refused in command(False, damaged=("",)) and tables(tmp_path / "out") == whole
    (tmp_path / "out" / "runs.csv").unlink()
    command(stopped=True)
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / "folder.pt").mkdir()
    text = command(False, damaged=("", ".previous"))
    both = "refused arms_p11.pt (truncated or altered), arms_p11.previous.pt (truncated or altered)"
    assert f"{both}; arms_p11 goes on from its start" in text
    assert tables(tmp_path / "out") == whole
    assert {path.name for path in checkpoint.iterdir()} == {"notes.txt", "folder.pt"}   # what is not ours stays


@pytest.mark.parametrize("stage", ["trunk_p11_100", "arms_p11"])
def test_a_checkpoint_moves_to_a_machine_with_another_step_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                                      whole: dict, stage: str) -> None:
    """Between two stages, and inside one: one machine's step goes by another name here, and computes the same."""
    once, make, out = desk.Progress.__call__, desk.Ensemble.compile, tmp_path / "out"

    def elsewhere(self: desk.Ensemble, *args: object) -> None:
        make(self, *args)
        self.backend = "faster"

    def stopping(self: desk.Progress, ensemble: object) -> None:
        once(self, ensemble)
        if [*(out / "checkpoint").glob(f"{stage}*.pt")]:   # the interrupt saves one more
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(desk, "SAVE_EVERY", 0)
        patch.setattr(desk.Ensemble, "compile", elsewhere)
        patch.setattr(desk.Progress, "__call__", stopping)
        exp_fork.run([*SHORT, "--out", str(out)])
    code, text, _ = main(monkeypatch, capsys, SHORT, out)
    said = (f"what {out / 'checkpoint'} holds was trained by the faster step, the rest is by this machine's eager one: their rounding "
            "differs, and provenance.json names both\n")
    assert code == 0 and text.count(said) == 1 and tables(out) == whole
    assert files.read_json(out / "provenance.json")["backend"] == "faster, eager"
    (out / "runs.csv").unlink()
    assert "rounding" not in main(monkeypatch, capsys, SHORT, out)[1] and files.read_json(out / "provenance.json")["backend"] == "eager"


def executed(marker: Path) -> object:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)
    return Payload()


def test_no_damaged_or_foreign_checkpoint_is_taken_or_executed(tmp_path: Path) -> None:
    """Every altered byte is noticed; a file with the right checksum and something else in it is refused too."""
    path, chance, tensors = tmp_path / "a.pt", random.Random(0), {"params": torch.randn(50), "log": torch.zeros(2, 3)}
    files.save_tensors(path, tensors)
    good = path.read_bytes()
    assert all(torch.equal(tensors[k], v) for k, v in files.load_tensors(path).items())
    tried = [good[:n] for n in (0, 1, 31, 32, 33, len(good) - 32, len(good) - 1)] + [good + b"x", b"PK\3\4" * 50, os.urandom(5000)]
    for _ in range(300):
        data, k = bytearray(good), chance.randrange(len(good))
        data[k] ^= 1 << chance.randrange(8)
        tried += [bytes(data), good[:k], good[k:]] if k else []
    marker = tmp_path / "executed"
    for content in ({"a": executed(marker)}, [torch.zeros(2)], {"a": 1}, torch.zeros(2), {"a": torch.nn.Linear(2, 2)}, {1: "x"}):
        files.save_tensors(path, content)
        tried.append(path.read_bytes())
    for data in tried:
        path.write_bytes(data)
        with pytest.raises(files.Damaged) as error:
            files.load_tensors(path)
        assert "\n" not in str(error.value)
    assert len(tried) > 800 and not marker.exists()


def test_a_snapshot_of_odd_tensors_is_another_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "SAVE_EVERY", 0)
    once = desk.Progress.__call__

    def stopping(self: desk.Progress, ensemble: object) -> None:
        once(self, ensemble)
        if self.stage == "arms_p11":
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(desk.Progress, "__call__", stopping)
        exp_fork.run([*SHORT, "--out", str(tmp_path)])
    path = tmp_path / "checkpoint" / "trunk_p11_100.done.pt"
    good = files.load_tensors(path)
    params = good["params"]
    for changed in ({"params": params.double()}, {"params": params[:1]}, {"params": params.to_sparse()}, {"step": torch.zeros(())},
                    {"params": torch.empty(10**9, 10**9, device="meta")}, {"log": torch.zeros(3, 2)}, {"log": torch.zeros(3, dtype=torch.float64)},
                    {"identity": good["identity"] + 1}, {"more": torch.zeros(1)}):
        files.save_tensors(path, {**good, **changed})
        with pytest.raises(UsageError, match=r"trunk_p11_100.done.pt: .*another ensemble") as error:
            exp_fork.run([*SHORT, "--out", str(tmp_path)])
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know which file is being written")
def test_a_full_disk_at_any_write_is_one_line_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                                whole: dict) -> None:
    """Every file of a command fails to be written once, on top of an earlier command's results; the command is given again each time."""
    out, sync, failed = tmp_path / "out", os.fsync, []
    exp_fork.run([*SHORT, "--out", str(out)])
    (out / "summary.json").write_text("{}")   # of other tables: to train again

    def full(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name not in failed:
            failed.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    code, commands = 2, 0
    while code:
        code, _, errors = main(monkeypatch, capsys, SHORT, out)
        commands += 1
        assert commands < 20 and tables(out) == whole and not [*out.rglob("*.part")]
        assert code == 0 or re.fullmatch(r"error: No space left on device: .*[a-z]\n", errors), errors
        assert code == 0 or failed[-1].removesuffix(".part") in errors
    assert commands == len(failed) + 1 == 3 + 5 + 1   # three stages, five files


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                    whole: dict) -> None:
    """The system itself stops the write of a snapshot: a limit on the size of files."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        code, _, errors = main(monkeypatch, capsys, SHORT, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and re.fullmatch(r"error: File too large: .*\n", errors), errors
    assert not [*(tmp_path / "out").rglob("*.p*t")]
    exp_fork.run([*SHORT, "--out", str(tmp_path / "out")])
    assert tables(tmp_path / "out") == whole


def test_a_folder_that_goes_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    once = desk.Progress.__call__

    def vanishing(self: desk.Progress, ensemble: object) -> None:
        once(self, ensemble)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    monkeypatch.setattr(desk.Progress, "__call__", vanishing)
    code, _, errors = main(monkeypatch, capsys, SHORT, tmp_path / "out")
    assert code == 2 and errors == (
        f"error: {tmp_path / 'out'}, or config.json in it, was removed or replaced while this command worked there, and nothing more is written to "
        "it; the same command continues from the last checkpoint that is left\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file", tmp_path / "file" / "below"]
    if Path("/proc/self").exists():
        places.append(Path("/proc/self/out"))
    if os.geteuid():   # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        places += [tmp_path / "locked", tmp_path / "locked" / "below"]
    for out in places:
        code, _, errors = main(monkeypatch, capsys, SHORT, out)
        assert code == 2 and re.fullmatch(r"error: .*\n", errors) and str(out) in errors, errors


def test_a_folder_killed_before_its_settings_were_written_is_taken_up(tmp_path: Path, whole: dict) -> None:
    out = tmp_path / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "config.json").touch()
    exp_fork.run([*SHORT, "--out", str(out)])
    assert tables(out) == whole and not [*out.glob("checkpoint*")]
