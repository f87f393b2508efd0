"""The staged driver, with stages that need no GPU: what passed is kept, what failed or ran out of time is run again."""
import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import gpu_evidence


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str, **codes: str) -> tuple[int, dict[str, str]]:
    stages = {name: [sys.executable, "-c", code, "{released}"] for name, code in codes.items()}
    monkeypatch.setattr(gpu_evidence, "STAGES", stages)
    monkeypatch.setattr(gpu_evidence, "GRACE", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(out), *arguments])
    code = gpu_evidence.main()
    path = out / "gpu_evidence.csv"
    return code, {row["stage"]: row["outcome"] for row in csv.DictReader(path.open())} if path.exists() else {}


def test_continues_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    released = ("--released", str(tmp_path))
    assert call(monkeypatch, tmp_path, *released, one=count, two="raise SystemExit(4)") == (1, {"one": "ok", "two": "failed (4)"})
    assert call(monkeypatch, tmp_path, *released, one=count, two="print('now')") == (0, {"one": "ok", "two": "ok"})
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "gpu_evidence_two.txt").read_text() == "now\n"
    call(monkeypatch, tmp_path, *released, "--again", "one", one=count, two="")
    assert (tmp_path / "count").read_text() == "xx"


def test_what_is_to_be_repeated_is_not_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else an experiment says that its results are there."""
    for name in ("again", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.csv").touch()
    stages = {name: [sys.executable, "-c", "", "--out", str(tmp_path / name)] for name in ("again", "kept")}
    monkeypatch.setattr(gpu_evidence, "STAGES", stages)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path), "--again", "again"])
    assert gpu_evidence.main() == 0 and [path.parent.name for path in tmp_path.glob("*/runs.csv")] == ["kept"]


def test_the_paper_presets_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {name for name in gpu_evidence.STAGES if name.endswith("_paper")} >= {"delay_law_paper", "logit_scale_paper", "fork_paper"}
    asked = ("--paper", "--released", str(tmp_path))
    assert call(monkeypatch, tmp_path, *asked, tests="raise SystemExit(1)", fork_paper="") == (0, {"fork_paper": "ok"})


def test_stops_in_time_and_leaves_out_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, outcomes = call(monkeypatch, tmp_path, "--minutes", "0.15", "--released", str(tmp_path), slow="import time; time.sleep(60)", next="")
    assert (code, outcomes) == (3, {"slow": "out of time"})
    assert call(monkeypatch, tmp_path / "other", one="") == (1, {})
    assert "LEFT OUT" in capsys.readouterr().out


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path / "absent")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_evidence.main() == 2 and not (tmp_path / "absent").exists()


@pytest.mark.parametrize("words, why", [
    (("--minutes", "0"), "--minutes must be above 0, got 0"),
    (("--out", "README.md"), "is a file; name a folder"),
])
def test_bad_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: tuple[str, ...], why: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", *words])
    with pytest.raises(SystemExit) as end:
        gpu_evidence.main()
    assert end.value.code == 2 and why in capsys.readouterr().err


def test_what_is_not_run_cannot_be_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _ = call(monkeypatch, tmp_path / "absent", "--paper", "--again", "tests", tests="", fork_paper="")
    assert code == 2 and capsys.readouterr().err.startswith("error: --again tests") and not (tmp_path / "absent").exists()
