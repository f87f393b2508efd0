"""The README says what the summaries say, and its example runs."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from short_runs import committed

from common import UsageError
from lab import report

ROOT = Path(__file__).parents[1]


def test_table_of_claims_is_that_of_the_summaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(report, "ROOT", committed(tmp_path))
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z_-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    first_screen = text[: text.index("![")]
    assert len(text.split()) <= 1200 and text.count("\n") <= 150 and len(first_screen.split()) <= 200
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_figures_and_links_of_the_pages_exist() -> None:
    for page in ("README.md", "results/README.md", "results/FINDINGS.md"):
        for path in re.findall(r"\]\((.*?)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(path).is_file(), (page, path)


def test_report_refuses_other_flags() -> None:
    try:
        report.main(["--force"])
    except UsageError as error:
        assert "--force" in str(error)
    else:
        raise AssertionError("--force was taken")


def test_the_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    tiny = code.replace("p=59, members=range(4)", "p=7, members=range(2), budget_steps=50").replace("in rhos])", "in rhos], backend='eager')")
    assert "budget_steps" in tiny and "eager" in tiny
    done = subprocess.run([sys.executable, "-c", tiny], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 1 + 3 + 1 and lines[0].startswith("condition") and lines[-1] == "None", done


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("exp_*.py") if path.name != "exp_replay.py"))
def test_a_record_in_the_folder_of_a_plain_command_does_not_refuse_it(script: str, tmp_path: Path) -> None:
    """The README's first commands write where runs of record may lie: those must have been made with the same settings."""
    committed(tmp_path)
    code = (f"import sys; from pathlib import Path; from lab import desk, folder; folder.ROOT = Path({str(tmp_path)!r}); "
            f"import {script.removesuffix('.py')} as it; it.run(['--dry-run', '--preset', 'laptop', '--device', 'cpu'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
