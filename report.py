"""Every published number beside ours: collects results/*/*/summary.json into the README's table. `--check` only compares.

    python report.py            rewrite the table between the two marks in README.md
    python report.py --check    exit code 1 if the README differs from the summaries
"""
import json
import sys
from pathlib import Path

import files
import stats
from common import UsageError

ROOT = Path(__file__).resolve().parent
BEGIN, END = "<!-- claims: made by report.py -->", "<!-- end of claims -->"
STRENGTH = ("NOT RUN", "INCONCLUSIVE", "NOT REPRODUCED", "REPRODUCED")


def answers(folder: Path) -> dict[str, dict]:
    """The best-supported answer to each published id: one with a verdict before an inconclusive one, then the one with most members."""
    best: dict[str, dict] = {}
    for path in sorted(folder.glob("*/*/summary.json")):
        try:
            claims = json.loads(path.read_text())["claims"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no summary of an experiment ({type(error).__name__}); remove it or make it again") from None
        for claim in claims:
            claim["source"] = str(path.parent.relative_to(folder))
            held = best.get(claim["id"])
            rank = lambda c: (c["verdict"] in STRENGTH[2:], c["verdict"] != "NOT RUN", c["n"])  # noqa: E731
            if held is None or rank(claim) > rank(held):
                best[claim["id"]] = claim
    return best


def table(best: dict[str, dict], published: dict[str, dict]) -> str:
    def text(x: float | None) -> str:
        return "-" if x is None else f"{x:.4g}"
    lines = ["| id | quantity | paper | ours | 95% interval | n | censored | verdict |", "|---|---|---|---|---|---|---|---|"]
    for key in published:
        claim = best.get(key)
        if claim and claim["verdict"] != "NOT RUN":
            lines.append(f"| `{key}` | {claim['quantity']} | {text(claim['published'])} | {text(claim['ours'])} "
                         f"| {text(claim['lo'])} to {text(claim['hi'])} | {claim['n']} | {claim['n_censored']} | {claim['verdict']} |")
    verdicts = [best[key]["verdict"] if key in best else "NOT RUN" for key in published]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in reversed(STRENGTH))
    sources = sorted({c["source"] for c in best.values() if c["verdict"] != "NOT RUN"})
    return "\n".join([*lines, "", f"Of {len(published)} published numbers: {counts}. From `results/` {', '.join(f'`{s}`' for s in sources)}."])


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        raise UsageError(f"report.py takes no flag but --check, got {' '.join(argv)}")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table(answers(ROOT / 'results'), stats.published(ROOT / 'published.csv', ''))}\n{END}{after}"
    if argv and wanted != readme.read_text():
        print("README.md differs from the summaries under results/; run report.py", file=sys.stderr)
        return 1
    if not argv:
        files.write_atomic(readme, wanted.encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
