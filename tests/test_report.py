"""The report: equivalence on planted data, which answer wins, what --check notices, and that every published number has a line."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lab import answers, files, report

KEY = "B.med.ce.p59.T0"


def pairs(shift: float, noise: float, n: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    there = rng.integers(1000, 9000, n)
    return [{"t_grok_released": int(t), "t_grok": float(t * np.exp(shift + noise * e))} for t, e in zip(there, rng.normal(size=n), strict=True)]


def test_equivalence_on_planted_ratios() -> None:
    same = [report.equivalence(pairs(0.0, 0.03, 12, seed))[3] < 0.05 for seed in range(100)]
    edge = [report.equivalence(pairs(np.log(1.05), 0.03, 12, seed))[3] < 0.05 for seed in range(400)]
    assert np.mean(same) > 0.95
    assert np.mean(edge) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5   # at the margin the test errs at its level
    mean, low, high, _, n = report.equivalence([*pairs(0.0, 0.03, 12, 0), {"t_grok_released": 100, "t_grok": None}])
    assert low < mean < high and n == 12
    assert report.equivalence([{"t_grok_released": 500, "t_grok": 500}] * 3)[:3] == (0, 0, 0)


def claim(verdict: str, n: int, dtype: str = "float32", ours: float = 3700.0, key: str = KEY) -> dict:
    return {"id": key, "quantity": "q", "published": 3850.0, "published_lo": None, "published_hi": None,
            "replicated": {"ours": ours, "lo": ours, "hi": ours, "n": n, "n_censored": 0, "verdict": verdict, "why": "", "dtype": dtype,
                           "source": f"{verdict}{n}{dtype}"}}


@pytest.mark.parametrize(("better", "worse"), [
    (claim("NOT REPLICATED", 4), claim("INCONCLUSIVE", 12)), (claim("REPLICATED", 8), claim("REPLICATED", 4)),
    (claim("REPLICATED", 4), claim("REPLICATED", 8, "float64")), (claim("INCONCLUSIVE", 1), claim("INCONCLUSIVE", 2, "float64"))])
def test_the_best_supported_answer_wins_whatever_the_order(better: dict, worse: dict) -> None:
    for order in ([better, worse], [worse, better]):
        folders = [report.Folder("f", {"claims": [c]}, []) for c in order]
        assert report.best_answers(folders, "replicated")[KEY]["source"] == better["replicated"]["source"]
        assert not report.best_answers(folders, "reproduced")


def test_runs_held_at_a_given_norm_stand_under_sensitivity_and_answer_nothing() -> None:
    ours, theirs = claim("NOT REPLICATED", 6, ours=4000.0), claim("REPLICATED", 12)
    folders = [report.Folder("b", {"claims": [theirs]}, [], given=54.49), report.Folder("a", {"claims": [ours]}, [])]
    best = report.best_answers(folders, "replicated")
    assert best == {KEY: ours["replicated"]}
    (line,) = [line for block in report.sensitivity_section(folders, Path(), best, answers.published()) for line in block.splitlines() if KEY in line]
    assert line.strip("| ").split(" | ")[2:] == ["4000", "4000 to 4000", "NOT REPLICATED", "3700", "3700 to 3700", "REPLICATED", "12", "54.49"]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README and one folder of results, with the pages made from them."""
    folder = tmp_path / "results" / "delay_law" / "dense"
    folder.mkdir(parents=True)
    run = dict.fromkeys(files.RUN_COLUMNS) | {"experiment": "delay_law", "cell": "c", "model": "mlp", "loss": "ce", "p": 59, "train_frac": 0.4,
                                              "block": 2, "arm": "clamp", "rho": 1.0, "tau": 1, "lr": 1e-3, "weight_decay": 1, "budget_steps": 9000}
    files.write_csv(folder / "runs.csv", [run | {"member": m, "t_grok_step": 3700, "t_mem_step": 175, "censored": 0} for m in range(2)])
    files.write_json(folder / "config.json", {"model": "mlp"})
    files.write_json(folder / "provenance.json", {
        **dict.fromkeys(report.PROVENANCE, 1), **dict.fromkeys(("command", "commit", "device", "backend"), "text"), "dtype": "float32"})
    files.write_summary(folder, [claim("REPLICATED", 12)], [])
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main([]) == 0
    return tmp_path


def test_check_notices_a_changed_summary_a_changed_page_and_runs_newer_than_their_figures(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    page = copy / "results" / "REPORT.md"
    text = page.read_text()
    page.write_text(text.replace("NOT RUN", "REPRODUCED", 1))
    assert report.main(["--check"]) == 1 and "REPORT.md differs" in capsys.readouterr().err
    page.write_text(text)
    folder = copy / "results" / "delay_law" / "dense"
    summary = json.loads((folder / "summary.json").read_text())
    summary["data"].pop("trajectories.csv", None)       # as in a folder made before trajectories were remembered
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "trajectories.csv").write_text("cell,step\na,1\n")
    assert report.main(["--check"]) == 0   # the summary was made without it
    (folder / "summary.json").write_text(json.dumps({**summary, "data": files.digests(folder)}))
    assert report.main(["--check"]) == 0
    (folder / "trajectories.csv").write_text("cell,step\na,2\n")
    assert report.main(["--check"]) == 1
    assert f"results/delay_law/{folder.name}/trajectories.csv: summary and figures beside it are of another one" in capsys.readouterr().err
    (folder / "trajectories.csv").unlink()
    assert report.main(["--check"]) == 0
    rows = files.read_csv(folder / "runs.csv")
    files.write_csv(folder / "runs.csv", [*rows[:-1], {**rows[-1], "t_grok_step": rows[-1]["t_grok_step"] + 25}])
    assert report.main(["--check"]) == 1
    assert f"results/delay_law/{folder.name}/runs.csv: summary and figures beside it are of another one" in capsys.readouterr().err
    summary["claims"][0]["replicated"]["verdict"] = "NOT REPLICATED"
    (folder / "summary.json").write_text(json.dumps(summary))
    assert report.main(["--check"]) == 1 and "REPORT.md differs" in capsys.readouterr().err


def test_a_checkout_that_cannot_be_written_to_is_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(report.os, "access", lambda path, _: path != copy)
    monkeypatch.setattr(report.console.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        report.console.end(lambda: report.main([]))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {copy} cannot be written to; make the report in a copy, or use --check, which writes nothing\n"
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} and report.main(["--check"]) == 0


def test_every_published_number_has_one_line_with_both_verdicts(copy: Path) -> None:
    text, published = (copy / "results" / "REPORT.md").read_text(), answers.published()
    claims = text[text.index("## Claims"):text.index("## Doubts")]
    for key in published:
        (line,) = [line for line in claims.splitlines() if f"`{key}`" in line]
        verdicts = re.findall(r"(?<=\| )(?:NOT RUN|[A-Z ]*RE[A-Z]+ED|INCONCLUSIVE|PARTLY RUN)(?= \|)", line)
        assert verdicts == ["NOT RUN", "REPLICATED" if key == KEY else "NOT RUN"], line
    readme = (copy / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and f"Of {len(published)} published numbers" in readme


def test_other_tasks_and_losses_stand_by_themselves(copy: Path) -> None:
    """A folder of multiplication has the same columns at p=59, and a finding that on addition would answer a doubt."""
    plain = copy / "results" / "delay_law" / "dense"
    other = plain.with_name("mul")
    other.mkdir()
    for name in ("runs.csv", "provenance.json"):
        (other / name).write_bytes((plain / name).read_bytes())
    files.write_json(other / "config.json", {"model": "mlp", "task": "mul", "betas": [0.9, 0.999], "width": []})
    found = {"id": "clamp_over_free.x", "quantity": "of products", "ours": 1.5, "lo": 1.0, "hi": 2.0, "n": 4, "n_censored": 0}
    files.write_summary(other, [], [found])
    before = (copy / "results" / "REPORT.md").read_text()
    assert "Beyond the papers" not in before and report.main([]) == 0
    text = (copy / "results" / "REPORT.md").read_text()
    assert "| of products | 1.5 | 1 to 2 | 4 | 0 | delay_law/mul |" in text[text.index("## Beyond the papers"):text.index("## Sensitivity")]
    assert text.count("of products") == 1
    files.write_json(other / "config.json", {"model": "mlp", "task": "add", "betas": [0.9, 0.999], "width": [], "perp_grad": False})
    assert report.main([]) == 0 and "Beyond the papers" not in (copy / "results" / "REPORT.md").read_text()
