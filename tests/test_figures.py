"""Figures come last and are the same on every machine; one that fails costs a line."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from short_runs import ROOT, SHORT, main, tables

from lab import figures


def test_the_matplotlibrc_of_a_machine_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    code = "from lab import figures; rc = figures.matplotlib.rcParams; print(rc['text.usetex'], rc['font.size'], rc['backend'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "MATPLOTLIBRC": str(tmp_path)}, capture_output=True, text=True,
                          check=False)
    assert done.stdout == "False 10.0 Agg\n", done


def test_a_figure_that_fails_costs_a_line_after_all_else_is_written_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                             capsys: pytest.CaptureFixture) -> None:
    def failing(*_: object) -> None:
        assert (tmp_path / "out" / "summary.json").exists()
        raise RuntimeError("latex could not\nbe found")
    monkeypatch.setattr(figures, "FORGIVEN", Exception)
    monkeypatch.setattr(figures, "save_figure", failing)
    said, written = [], []
    for flags in (SHORT, [*SHORT, "--figures-only"]):
        code, text, errors = main(monkeypatch, capsys, flags, tmp_path / "out")
        lines = text.splitlines()
        first = next(i for i, line in enumerate(lines) if "is not drawn" in line)
        assert lines[first] == ("a figure, sheet arms_p11_fork100_rho1.15, is not drawn (RuntimeError: latex could not be found); "
                                "the tables are whole")
        assert (code, errors) == (0, "") and lines[first - 1].startswith(f"tables, verdicts and findings in {tmp_path / 'out'}")
        assert not any("not drawn" not in line for line in lines[first:]) and not (tmp_path / "out" / "checkpoint").exists()
        said.append(lines[first:])
        written.append(tables(tmp_path / "out"))
    assert said[0] == said[1] and written[0] == written[1]
