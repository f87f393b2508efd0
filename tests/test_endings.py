"""How a command ends that is stopped, hung up on, not listened to, or out of luck: its work is kept, and what it says fits in a line."""
import errno
import os
import re
import signal
from pathlib import Path

import pytest
from short_runs import FLAGS, SHORT, main, start, tables, wait_for

import exp_fork
from lab import console, desk, figures, files
from lab.console import Signals
from lab.ensemble import Ensemble

LONGER = [*FLAGS, "--budget", "400", "--parts", "same", "free"]
QUICK = "from lab import figures; figures.save_figure = lambda *_: None"
STOPPED = "stopped; the same command continues from here\n"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save_figure", lambda *_: None)
    monkeypatch.setattr(Signals, "caught", None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda *_: None)
        exp_fork.run([*SHORT, "--out", str(out)])
    return tables(out)


@pytest.mark.skipif(not console.HANGUP, reason="no hangups here")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_hangup_is_a_stop_and_so_is_the_signal_before_the_end_of_a_job(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    path, number = tmp_path / "out" / "checkpoint" / "arms_p11.pt", getattr(signal, name)
    process = start(tmp_path / "out", LONGER, 0.05, f"signal.signal(signal.SIGHUP, signal.SIG_DFL); {QUICK}")
    request.addfinalizer(process.kill)
    wait_for(path.exists, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == STOPPED and files.load_tensors(path)


@pytest.mark.skipif(not console.HANGUP, reason="no hangups here")
def test_the_second_signal_is_not_waited_for_unless_a_terminal_closes_which_sends_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Signals, "waiting", True)
    for _ in range(2):
        Signals.handle(signal.SIGHUP, None)
    assert Signals.caught == signal.SIGHUP
    with pytest.raises(SystemExit):
        Signals.handle(signal.SIGTERM, None)


@pytest.mark.skipif(not console.HANGUP, reason="no hangups here")
@pytest.mark.parametrize("before, heard", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_under_nohup_a_hangup_is_not_heard(monkeypatch: pytest.MonkeyPatch, before: object, heard: bool) -> None:
    numbers = []
    monkeypatch.setattr(signal, "getsignal", lambda _: before)
    monkeypatch.setattr(signal, "signal", lambda number, _: numbers.append(number))
    Signals.listen()
    assert (signal.SIGHUP in numbers) == heard and {signal.SIGINT, signal.SIGTERM} <= {*numbers}


@pytest.mark.parametrize("place", ["inside", "at the end"])
def test_a_reader_who_goes_away_costs_nothing(tmp_path: Path, place: str, whole: dict, request: pytest.FixtureRequest) -> None:
    """`| head`: the pipe closes inside a stage, where only progress is printed; or the reader is gone before the last lines."""
    out, flags, last_read = tmp_path / "out", *{"inside": (LONGER, "arms_p11: 0/8 runs finished"), "at the end": (SHORT, "arms_p11: 8 runs")}[place]
    process = start(out, flags, 60, f"from lab import console; console.SPEAK_EVERY = 0; {QUICK}")
    request.addfinalizer(process.kill)
    while last_read not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    process.stdout.close()
    assert process.wait(60) == console.CLOSED and not process.stderr.read()
    if place == "inside":
        assert not (out / "runs.csv").exists() and files.load_tensors(out / "checkpoint" / "arms_p11.pt")
    else:
        assert tables(out) == whole   # `finish` may not have been reached
        desk.start(exp_fork.run, [*SHORT, "--out", str(out)])
        assert tables(out) == whole and not (out / "checkpoint").exists()


@pytest.mark.parametrize("what", ["save", "tick", "log"])
def test_an_error_inside_a_stage_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str,
                                                                               capsys: pytest.CaptureFixture, whole: dict) -> None:
    """Of the disk while the next snapshot is written, of the terminal while progress is, of the disk that holds the log."""
    out, sync, once, append = tmp_path / "out", os.fsync, desk.Progress.speak, desk.Ensemble.record
    path, kept = out / "checkpoint" / "arms_p11.pt", []

    def fail(name: str, number: int) -> None:
        if name == what and path.exists() and not kept:
            kept.append(path.read_bytes())
            raise OSError(number, os.strerror(number))
    monkeypatch.setattr(desk, "SAVE_EVERY", 0)
    monkeypatch.setattr(os, "fsync", lambda file: (fail("save", errno.ENOSPC), sync(file)))
    monkeypatch.setattr(desk.Progress, "speak", lambda *a: (fail("tick", errno.EIO), once(*a)))
    monkeypatch.setattr(desk.Ensemble, "record", lambda *a: (fail("log", errno.ENOSPC), append(*a)))
    code, _, errors = main(monkeypatch, capsys, SHORT, out)
    assert code == 2 and re.fullmatch(r"error: (No space left on device|Input/output error): .*[a-z]\n", errors), errors
    assert [path.read_bytes()] == kept
    assert main(monkeypatch, capsys, SHORT, out)[0] == 0 and tables(out) == whole


@pytest.mark.parametrize("when", ["after the last tick", "while saving", "while finishing", "after it"])
def test_a_late_signal_stops_where_all_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, when: str,
                                                whole: dict) -> None:
    out, early = tmp_path / "out", when in ("after the last tick", "while saving")
    owner, name = {"after the last tick": (Ensemble, "train"), "while saving": (files, "save_tensors"), "while finishing": (desk.Lab, "_clear"),
                   "after it": (desk.Lab, "_unlock")}[when]
    once = getattr(owner, name)

    def interrupted(*args: object) -> None:
        once(*args)
        if when != "while finishing" or args[0].opened:
            Signals.handle(signal.SIGTERM, None)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        code, _, errors = main(monkeypatch, capsys, SHORT, out)
    assert code == 143 and errors == STOPPED
    if early:
        assert {path.name for path in (out / "checkpoint").glob("*.pt")} == {"trunk_p11_100.done.pt"} and not (out / "runs.csv").exists()
    else:
        assert tables(out) == whole
    Signals.caught = None
    code, text, errors = main(monkeypatch, capsys, SHORT, out)
    assert (code, errors) == (0, "") and ("the results are in" in text) != early
    assert tables(out) == whole and not [*out.glob("checkpoint*")]
