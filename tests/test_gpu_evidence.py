"""The staged driver, with stages that need no GPU: what passed is kept, what failed or ran out of time is run again, on another machine too."""
import csv
import importlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import gpu_evidence

import exp_replay
from common import UsageError
from lab import provenance, settings

PRINT_OUT = "import os; print('in', os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'], os.environ['GROKKING_TEST_GPU'])"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_evidence, "GRACE", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str, **codes: str) -> tuple[int, dict[str, str]]:
    """Stages of the given Python; each is told the folder of its results and that of the release."""
    stages = {name: [sys.executable, "-c", code, "{out}/" + name, "{released}"] for name, code in codes.items()}
    monkeypatch.setattr(gpu_evidence, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", [str(provenance.ROOT / "bench/gpu_evidence.py"), "--out", str(out), *arguments])
    code = gpu_evidence.main()
    path = out / "stages.csv"
    return code, {row["stage"]: row["outcome"] for row in csv.DictReader(path.open())} if path.exists() else {}


def packed(folder: Path) -> dict[str, bytes]:
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"evidence.tar.gz.{i}" for i in range(len(parts))] and len(parts) <= 8
    with tarfile.open(fileobj=BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_continues_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    out, released = tmp_path / "out", ("--released", str(tmp_path))
    assert call(monkeypatch, out, *released, one=count, two="raise SystemExit(4)") == (1, {"one": "ok", "two": "failed (4)"})
    assert call(monkeypatch, out, *released, one=count, two="print('now')") == (0, {"one": "ok", "two": "ok"})
    assert (tmp_path / "count").read_text() == "x"
    lines = (out / "logs/two.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["now"] and len(lines) == 3      # both calls' logs
    call(monkeypatch, out, *released, "--again", "one", one=count, two="")
    assert (tmp_path / "count").read_text() == "xx"


def test_logs_are_whole_and_one_folder_holds_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the archive has it all, after a stage that failed too."""
    before = {path for path in gpu_evidence.ROOT.iterdir()} | {path for path in (gpu_evidence.ROOT / "results").rglob("*")}
    code = "import sys, pathlib; out = pathlib.Path(sys.argv[1]); out.mkdir(); (out / 'runs.csv').write_text('a'); print('line\\n' * 50000)"
    assert call(monkeypatch, tmp_path / "out", "--released", str(tmp_path), long=code, env=PRINT_OUT, bad="1 / 0")[0] == 1
    held = packed(tmp_path / "out.archive")
    assert held["logs/long.txt"].count(b"line\n") == 50000 and held["long/runs.csv"] == b"a"
    assert b"in false 1\n" in held["logs/env.txt"] and b"ZeroDivisionError" in held["logs/bad.txt"] and b"failed (1)" in held["stages.csv"]
    assert held["left_out.txt"] == b""
    after = {path for path in gpu_evidence.ROOT.iterdir()} | {path for path in (gpu_evidence.ROOT / "results").rglob("*")}
    assert after == before


def test_a_fresh_machine_continues_from_the_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second stage finds its checkpoint; the first is not run again."""
    slow = """import sys, pathlib, time; out = pathlib.Path(sys.argv[1]); (out / 'checkpoint').mkdir(parents=True, exist_ok=True)
half = out / 'checkpoint/half'
if half.exists(): print('continues'); raise SystemExit(0)
half.touch(); time.sleep(60)"""
    code, outcomes = call(monkeypatch, tmp_path / "a", "--minutes", "0.11", "--released", str(tmp_path), one="print(1)", slow=slow)
    assert (code, outcomes) == (3, {"one": "ok", "slow": "out of time"})
    code, outcomes = call(monkeypatch, tmp_path / "b", "--restore", str(tmp_path / "a.archive"), "--released", str(tmp_path), one="1 / 0", slow=slow)
    assert (code, outcomes) == (0, {"one": "ok", "slow": "ok"}) and "continues" in (tmp_path / "b/logs/slow.txt").read_text()


def test_the_archive_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint gives way to tables, and what is missing is named."""
    monkeypatch.setattr(gpu_evidence, "PART_BYTES", 4096)
    for name, size in (("checkpoint/big", 50_000), ("checkpoint/small", 2_000), ("table.csv", 9_000)):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    gpu_evidence.pack(tmp_path / "out", tmp_path / "archive")
    held = packed(tmp_path / "archive")
    assert set(held) == {"table.csv", "checkpoint/small", "left_out.txt"} and held["left_out.txt"] == b"checkpoint/big\n"
    assert max(part.stat().st_size for part in (tmp_path / "archive").iterdir()) <= 4096 and "checkpoint/big" in capsys.readouterr().out
    (tmp_path / "out/table.csv").write_bytes(b"")
    gpu_evidence.pack(tmp_path / "out", tmp_path / "archive")
    assert packed(tmp_path / "archive")["table.csv"] == b""         # no part of the larger one is left


def test_what_is_to_be_repeated_is_not_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else an experiment says that its results are there."""
    for name in ("again", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.csv").touch()
    assert call(monkeypatch, tmp_path, "--released", str(tmp_path), "--again", "again", again="", kept="")[0] == 0
    assert [path.parent.name for path in tmp_path.glob("*/runs.csv")] == ["kept"]


def test_the_paper_presets_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {name for name in gpu_evidence.STAGES if name.endswith("_paper")} >= {"delay_law_paper", "logit_scale_paper", "fork_paper"}
    asked = ("--paper", "--released", str(tmp_path))
    assert call(monkeypatch, tmp_path / "out", *asked, tests="raise SystemExit(1)", fork_paper="") == (0, {"fork_paper": "ok"})


def test_no_experiment_is_left_out() -> None:
    """An experiment with a paper preset has a stage, and trains there what its dry run lists."""
    with_preset = {path.stem for path in provenance.ROOT.glob("exp_*.py") if '"paper": {' in path.read_text()}
    commands = [command for command in gpu_evidence.STAGES.values() if "paper" in command]
    assert {command[1].removesuffix(".py") for command in commands} == with_preset
    for command in commands:
        importlib.import_module(command[1].removesuffix(".py")).run([*command[2:], "--device", "cpu", "--dry-run"])


def test_the_release_is_replayed_whole(tmp_path: Path) -> None:
    """Both papers' files are chosen, wherever below the folder they lie."""
    names = {"logit-scale/metrics/mediation/a", "logit-scale/metrics/b", "critical-norm/data/denserho/metrics/c"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.npz").touch()
    command = [part.format(out=tmp_path / "out", released=tmp_path) for part in gpu_evidence.STAGES["replay_ieee"]]
    config, _ = settings.parse(exp_replay.Config, {}, (), command[2:])
    assert set(exp_replay.files_chosen(config)) == names


def test_a_dry_run_needs_no_gpu_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    smoke = [sys.executable, "exp_parity.py", "--preset", "smoke", "--out", "{out}/good"]
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path / "out"), "--dry-run"])
    for name, command, code, said in (("tests", [sys.executable, "-m", "pytest"], 0, "python -m pytest"), ("good", smoke, 0, "2 runs, "),
                                      ("bad", [*smoke, "--k", "0"], 1, "error: sparse parity")):
        monkeypatch.setattr(gpu_evidence, "STAGES", {name: command})
        assert gpu_evidence.main() == code and said in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_every_stage_writes_into_the_folder() -> None:
    for name, command in gpu_evidence.STAGES.items():
        assert name == "tests" or command[command.index("--out") + 1].startswith("{out}/"), name
        assert not any("results" in part for part in command), name


def test_stops_in_time_and_leaves_out_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, outcomes = call(monkeypatch, tmp_path / "out", "--minutes", "0.11", "--released", str(tmp_path), slow="import time; time.sleep(9)", next="")
    assert (code, outcomes) == (3, {"slow": "out of time"})
    for released in ((), ("--released", str(tmp_path / "absent"))):       # `../shared` is not everywhere
        assert call(monkeypatch, tmp_path / "other", *released, one="") == (1, {})
        assert "one: LEFT OUT, needs --released FOLDER" in capsys.readouterr().out


def test_the_commit_is_of_this_very_code_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clone, as it was committed and changed; an archive of it unpacked inside another repository; git absent."""
    outer, script = tmp_path / "outer", "bench/gpu_evidence.py"
    for folder in (outer, outer / "inner"):
        (folder / "bench").mkdir(parents=True)
        (folder / script).write_text("1")

    def git(*words: str) -> str:
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=outer, check=True, capture_output=True,
                              text=True).stdout.strip()

    def recorded(root: Path) -> str:
        monkeypatch.setattr(provenance, "ROOT", root)
        call(monkeypatch, tmp_path / "out", "--released", str(tmp_path), "--again", "one", one="")
        return next(csv.DictReader((tmp_path / "out/stages.csv").open()))["commit"]
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert recorded(outer) == git("rev-parse", "HEAD") and recorded(outer / "inner") == "unknown"
    (outer / script).write_text("2")
    assert recorded(outer) == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recorded(outer) == "unknown"


def test_ctrl_c_stops_the_stage_in_peace_and_packs(tmp_path: Path) -> None:
    """The whole group gets it, as from a terminal: the stage is asked once, writes its checkpoint, and the same command continues."""
    slow = """import signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('asked', len(asked)), sys.exit(143)))
print('begun', flush=True)
time.sleep(60)"""
    drive = ("import sys; sys.path.insert(0, 'bench'); import torch, gpu_evidence as g; torch.cuda.is_available = lambda: True; "
             f"torch.cuda.get_device_name = lambda: 'none'; g.STAGES = dict(slow=[sys.executable, '-c', {slow!r}]); "
             "g.console.end(lambda: sys.exit(g.main()))")
    process = subprocess.Popen([sys.executable, "-c", drive, "--out", str(tmp_path / "out")], cwd=provenance.ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "out/logs/slow.txt"
    while not (log.exists() and "\nbegun" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and said.startswith("slow: stopped, ") and said.endswith("\nstopped; the same command continues\n") and not errors
    assert "asked 0\n" in log.read_text() and b"stopped" in packed(tmp_path / "out.archive")["stages.csv"]


@pytest.mark.parametrize("words, why", [
    (("--minutes", "0"), "--minutes must be above 0, got 0"),
    (("--out", "README.md"), "is a file; name a folder"),
    (("--out", "x", "--archive", "x"), "is --out; name another folder"),
    (("--restore", "nowhere"), "no evidence.tar.gz.0 there"),
    (("--paper", "--again", "tests"), "--again tests: not among the stages of --paper"),
    (("--again", "nothing"), "invalid choice"),
    ((), "no CUDA device here"),
])
def test_bad_settings(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], why: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(words))
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", *words])
    with pytest.raises(UsageError, match=why):
        gpu_evidence.main()


def test_a_damaged_archive_or_table_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    released = ("--released", str(tmp_path))
    assert call(monkeypatch, tmp_path / "a", *released, one="")[0] == 0
    part = tmp_path / "a.archive/evidence.tar.gz.0"
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"cannot unpack evidence.tar.gz.\*"):
        call(monkeypatch, tmp_path / "b", "--restore", str(part.parent), *released, one="")
    assert not (tmp_path / "b").exists()
    (tmp_path / "a/stages.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no table of stages"):
        call(monkeypatch, tmp_path / "a", *released, one="")
