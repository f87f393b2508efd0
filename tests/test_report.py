"""The report: equivalence on planted data, which answer wins, what --check notices, and a page that needs no network."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from short_runs import committed

import files
import report
import stats

ROOT = Path(__file__).parents[1]


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


def claim(verdict: str, n: int, dtype: str) -> dict:
    return {"id": "x", "verdict": verdict, "n": n, "dtype": dtype, "source": f"{verdict}{n}{dtype}"}


@pytest.mark.parametrize(("better", "worse"), [
    (claim("NOT REPRODUCED", 4, "float32"), claim("INCONCLUSIVE", 12, "float32")),
    (claim("REPRODUCED", 8, "float32"), claim("REPRODUCED", 4, "float32")),
    (claim("REPRODUCED", 4, "float32"), claim("REPRODUCED", 8, "float64")), (claim("INCONCLUSIVE", 1, "float64"), claim("NOT RUN", 0, "float32"))])
def test_the_best_supported_answer_wins_whatever_the_order(better: dict, worse: dict) -> None:
    for order in ([better, worse], [worse, better]):
        folders = [report.Folder("f", {"claims": [c]}, []) for c in order]
        assert report.answers(folders)["x"]["source"] == better["source"]


def test_runs_held_at_a_given_norm_stand_under_sensitivity_and_answer_nothing() -> None:
    key = "B.med.ce.p59.T0"
    ours, theirs = ({"id": key, "verdict": v, "n": n, "n_censored": 0, "dtype": "float32", "ours": x, "lo": x, "hi": x}
                    for v, n, x in (("NOT REPRODUCED", 6, 4000.0), ("REPRODUCED", 12, 3700.0)))
    folders = [report.Folder("b", {"claims": [theirs]}, [], given=54.49), report.Folder("a", {"claims": [ours]}, [])]
    best = report.answers(folders)
    assert best == {key: ours}
    blocks = report.sensitivity_section(folders, ROOT, best, stats.published(ROOT / "published.csv", ""))
    row = next(content[1][0] for kind, content in blocks if kind == "table")
    assert row[2:] == ["4000", "4000 to 4000", "NOT REPRODUCED", "3700", "3700 to 3700", "REPRODUCED", "12", "54.49"]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README, published numbers and results of this repository in a folder of their own."""
    committed(tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def test_check_notices_a_changed_summary_a_changed_page_and_runs_newer_than_their_figures(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    page = (copy / "REPORT.md").read_text()
    (copy / "REPORT.md").write_text(page.replace("NOT RUN", "REPRODUCED", 1))
    assert report.main(["--check"]) == 1 and "REPORT.md differs" in capsys.readouterr().err
    (copy / "REPORT.md").write_text(page)
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
    summary["claims"] = [{**c, "verdict": "NOT REPRODUCED"} if c["verdict"] == "REPRODUCED" else c for c in summary["claims"]]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert report.main(["--check"]) == 1 and "REPORT.md differs" in capsys.readouterr().err


def test_a_checkout_that_cannot_be_written_to_is_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(report.os, "access", lambda path, _: path != copy)
    monkeypatch.setattr(report.endings.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        report.endings.end(lambda: report.main([]))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {copy} cannot be written to; make the report in a copy, or use --check, which writes nothing\n"
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} and report.main(["--check"]) == 0


def test_every_published_number_is_accounted_for_and_the_page_needs_no_network(copy: Path) -> None:
    before = (copy / "REPORT.md").read_text()
    assert report.main([]) == 0
    page, published = (copy / "report.html").read_text(), stats.published(ROOT / "published.csv", "")
    claims = page[page.index(">Claims</h2>"):page.index(">Provenance</h2>")]
    for key in published:
        assert claims.count(f"<code>{key}</code>") == 1, key
    verdicts = re.findall(r'<td class="[A-Z-]+">([A-Z ]+)</td>', claims)
    assert len(verdicts) == len(published) and set(verdicts) <= set(report.STRENGTH)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "url(" not in page and "<script" not in page
    assert (copy / "REPORT.md").read_text() == before
