"""What the repository promises beside its programs."""
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_folders_with_spaces_go_through_make(tmp_path: Path) -> None:
    """The interpreter and the released runs, each in a folder whose name a shell would take apart."""
    python, released = tmp_path / "my $HOME" / "python", tmp_path / "released; runs"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    for target, words in (("replay", f"exp_replay.py|{released}|"), ("report", "-m|lab.report|"),
                          ("gpu-evidence", f"bench/gpu_evidence.py|--released|{released}|")):
        done = subprocess.run(["make", "-s", target, f"PY={str(python).replace('$', '$$')}", f"RELEASED={released}"], cwd=ROOT, capture_output=True,
                              text=True, check=False, env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "ARGS")})
        assert (done.stdout, done.stderr) == (words, "")


def test_it_is_no_package_has_a_licence_and_one_oldest_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "project" not in project and "build-system" not in project and project["tool"]["ruff"]["target-version"] == "py311"
    assert "sys.version_info >= (3, 11)" in (ROOT / "Makefile").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License\n\nCopyright (c) 2026 The grokking lab's contributors\n")
    assert "license: MIT" in (ROOT / "CITATION.cff").read_text()


def test_the_top_level_is_what_a_user_runs_or_starts_from() -> None:
    """Eight files, each of a size that fits in a head; what lies behind the doors knows no experiment, and experiments not each other."""
    sizes = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert len(sizes) <= 8 and sizes.pop("common.py") <= 300 and all(name.startswith("exp_") for name in sizes)
    assert {name: size for name, size in sizes.items() if size > 400} == {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("kernels/*.py")]:
        assert not re.search(r"^\s*(import|from) exp_", path.read_text(), re.MULTILINE), path.name


SECTIONS = ("claims", "Config", "cells", "what is measured", "figures", "run")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("exp_*.py")))
def test_experiments_have_one_order(script: str) -> None:
    text = (ROOT / script).read_text()
    places = [text.index("\nclass Config("), *(text.index(f"\n# ---------------------------------------------------------------- {section}\n")
                                                for section in SECTIONS[2:])]
    assert places == sorted(places) and re.search(r"^Claims?\b", text, re.MULTILINE).start() < places[0]
    assert text.endswith('\n\n\nif __name__ == "__main__":\n    main(run)\n')
