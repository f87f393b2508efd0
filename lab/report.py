"""Every published number beside ours, from results/ alone: the README's table and results/REPORT.md. Trains nothing.

    python -m lab.report            rewrite README.md's table, results/REPORT.md and results/report/*.png
    python -m lab.report --check    exit code 1 if README.md or REPORT.md differ from the results, or a summary from its runs.csv

Where several folders answer a number: a verdict goes before none, float32 before float64 (the papers' precision), then most members.
MLPs held at multiples of a given norm (--w-c) answer none: they stand beside the others under Sensitivity.
Equivalence of replayed runs: two one-sided t tests of ln(T_grok ours / released) against a margin of 5%, fixed before the runs.
"""
if __name__ == "__main__":
    from lab import early
    early.guard()

import json
import math
import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from common import UsageError
from lab import answers, console, figures, files, settings, stats
from lab.stats import short

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- claims: made by lab/report.py -->", "<!-- end of claims -->"
STRENGTH = {"reproduced": ("NOT RUN", "PARTLY RUN", "NOT REPRODUCED", "REPRODUCED"),   # weakest first
            "replicated": ("NOT RUN", "INCONCLUSIVE", "NOT REPLICATED", "REPLICATED")}
WHOSE = {"reproduced": "the papers' own networks", "replicated": "fresh networks"}
MARGIN = 0.05         # of T_grok, for equivalence with the released runs
PROVENANCE = {"command", "commit", "dirty", "device", "backend", "dtype", "training_seconds", "run_steps", "executed_over_needed"}
NETWORK = ("model", "loss", "p", "train_frac", "block", "seed0", "member", "arm", "tau", "lr", "weight_decay", "clamp_start", "held_norm", "held_E",
           "held_W1", "held_W2")   # what makes two runs the same one
HEADLINES = {"A.alpha.dense": "T_grok ~ exp(alpha rho): alpha", "A.alpha.shared": "one alpha for four moduli",
             "A.oneshot.spread": "one rescale: most over least T_grok", "A.saturation.p59": "rho 1.30: T_grok over that law",
             "B.recovery.p59": "delay that a temperature gives back", "B.collapse.r2_logit.p59": "ln T_grok on the logit scale: R2",
             "B.fork.p59.ratio": "one state: delay, raised over held", "A.tf.alpha": "transformer, no LayerNorm: alpha"}   # lines of 120 characters
DOUBTS = (   # question, beginnings of the ids of the findings that answer it
    ("Does a clamp at rho = 1 grok on the free timescale?", ("clamp_over_free.",)),
    ("Is ln T_grok a straight line in the held norm?", ("lack_of_fit.", "local_slope.")),
    ("Is there one exponent? alpha times W_c, modulus by modulus", ("alpha_wc.",)),
    ("Does the learning rate move the delay by a factor of about 2 at every norm?", ("lr_factor.",)),
    ("Does no weight decay leave a free run at the high norms?", ("free_norm.", "frontier.")),
    ("Are the high norms inside float32 softmax collapse, and does float64 agree?",
     ("float32_confounded.", "float32_over_float64.", "collapse.float", "twin.", "collapse32_max.raised")),
    ("L at grokking is an outcome: does L at step 600, or norm and temperature themselves, explain the grid as well?", ("r2.", "aicc.")),
    ("Recovery: how much depends on the time axis, on when L is read, and on holding the logit curve fixed?", ("recovery.",)),
    ("Does MSE dissociate the norm from the logit scale?", ("logit_movement.", "norm_up.", "tau_effect.")),
    ("Does temperature move memorisation?", ("memorisation.", "delay_share.")),
    ("Which form of the dose response does AIC prefer once the offset may lie above?", ("daic.",)),
    ("Allocation at fixed norm: how far do T_grok and L move?", ("allocation_",)),
    ("Same-state arms: does the ratio hold at other fork steps and norms?", ("raised_over_same.", "ordering.", "same_over_free.")),
    ("Transformers: does LayerNorm take the total norm out of the delay, and which norm is concentrated at grokking?",
     ("norm_factor", "total_over_free.", "unembed_over_free.", "group_over_free.", "cv.", "cv_of_medians.", "power.unembed")),
    ("The logarithmic counterpart: how does the free norm contract?", ("contraction.",)),
)


@dataclass
class Folder:
    """One results folder: its name below results/, its summary and its runs; `given`: the norm of --w-c that its MLPs are held at, or 0."""
    name: str
    summary: dict
    runs: list[dict]
    given: float = 0.0
    beyond: bool = False    # of networks, or of a question, that the papers have none of


def collect(root: Path) -> list[Folder]:
    """Every results folder with a summary. Raises UsageError for one that is none."""
    found = []
    for path in sorted(root.glob("*/*/summary.json")):
        try:
            summary = files.read_json(path)
            for claim in summary["claims"]:
                for kind in STRENGTH.keys() & claim.keys():
                    claim[kind] |= {"source": str(path.parent.relative_to(root)), "dtype": summary["provenance"]["dtype"]}
            config = files.read_json(path.parent / "config.json")
            if missing := PROVENANCE - set(files.read_json(path.parent / "provenance.json")):
                raise ValueError(f"provenance.json has no {' '.join(sorted(missing))}")
        except (UsageError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"{path.parent} is not what an experiment leaves ({what}); remove it or make it again") from None
        given = config.get("w_c", 0.0) if config.get("model", "mlp") == "mlp" else 0.0
        changed = [name for name in settings.CHANGES if name in config and config[name] != json.loads(json.dumps(getattr(settings.Config, name)))]
        beyond = path.parts[-3] == "saturation" or (bool(changed) and config.get("model") != "mlp_dense")     # of sparse parity the task is no change
        found.append(Folder(str(path.parent.relative_to(root)), summary, files.read_runs(path.parent / "runs.csv"), given, beyond))
    return found


def best_answers(folders: list[Folder], kind: str) -> dict[str, dict]:
    """The best-supported answer of one kind of networks to each published id."""
    rank = lambda c: (STRENGTH[kind].index(c["verdict"]) >= 2, c["dtype"] == "float32", c["n"])  # noqa: E731
    best: dict[str, dict] = {}
    for claim in (claim for folder in folders if not folder.given for claim in folder.summary["claims"] if kind in claim):
        if claim["id"] not in best or rank(claim[kind]) > rank(best[claim["id"]]):
            best[claim["id"]] = claim[kind]
    return best


# ---------------------------------------------------------------- text

def number(x: float | None) -> str:
    return "-" if x is None else short(x)


def interval(lo: float | None, hi: float | None) -> str:
    return "-" if lo is None and hi is None else f"{number(lo)} to {number(hi)}"


def value(answer: dict) -> str:
    """Our value; an infinite one is later than the budget."""
    return "> budget" if answer["ours"] is None and answer["n_censored"] else number(answer["ours"])


def table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "NOT RUN"
    lines = ["| " + " | ".join(field.replace("|", "\\|") for field in row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def counts(ids: list[str], best: dict[str, dict[str, dict]]) -> str:
    """How many of the numbers `ids` have each verdict, for both kinds of networks."""
    parts = []
    for kind, words in STRENGTH.items():
        found = Counter(best[kind][key]["verdict"] if key in best[kind] else "NOT RUN" for key in ids)
        parts.append(f"{WHOSE[kind]}: " + ", ".join(f"{found[word]} {word}" for word in reversed(words)))
    return "; ".join(parts)


def headline_table(best: dict[str, dict[str, dict]], published: dict[str, dict]) -> str:
    """Six columns: claim, paper, value and verdict of the papers' own networks, value and verdict of fresh ones."""
    rows = []
    for key, text in HEADLINES.items():
        cells = []
        for kind in STRENGTH:
            answer = best[kind].get(key)
            shown = f"{value(answer)}, n {answer['n']}" if answer and kind == "reproduced" else \
                f"{value(answer)} [{number(answer['lo'])}, {number(answer['hi'])}], n {answer['n']}" if answer else "-"
            cells += [shown, answer["verdict"] if answer else "NOT RUN"]
        rows.append([text, published[key]["printed"], *cells])
    return table(["claim", "paper", "its networks", "reproduced?", "fresh networks [95%]", "replicated?"], rows)


def claims_section(best: dict[str, dict[str, dict]], published: dict[str, dict]) -> list[str]:
    """All numbers in the order of the papers; for each what is not both reproduced and replicated has its reason."""
    parts = ["## Claims"]
    for paper, title in (("A.", "A: arXiv 2606.13753"), ("B.", "B: arXiv 2606.18465")):
        ids = [key for key in published if key.startswith(paper)]
        parts += [f"### {title}", f"{len(ids)} numbers. {counts(ids, best)}."]
        for section in dict.fromkeys(published[key]["where"] for key in ids):
            rows = []
            for key in (key for key in ids if published[key]["where"] == section):
                own, fresh = (best[kind].get(key) for kind in STRENGTH)
                whys = [f"{'own' if answer is own else 'fresh'}: {answer['why']}" for answer in (own, fresh)
                        if answer and answer["verdict"] not in ("REPRODUCED", "REPLICATED")]
                rows.append([f"`{key}`", published[key]["quantity"], published[key]["printed"],
                             f"{value(own)} (n {own['n']}, {own['n_censored']} censored)" if own else "-", own["verdict"] if own else "NOT RUN",
                             f"{value(fresh)} [{interval(fresh['lo'], fresh['hi'])}] (n {fresh['n']}, {fresh['n_censored']} censored)" if fresh
                             else "-", fresh["verdict"] if fresh else "NOT RUN", "; ".join(whys)])
            header = ["id", "quantity", "paper", "its own networks", "reproduced?", "fresh networks", "replicated?", "why not"]
            parts += [f"#### {section}", table(header, rows)]
    return parts


def doubts_section(folders: list[Folder]) -> list[str]:
    parts = ["## Doubts, and our answers in numbers",
             "Questions that the papers leave open. No verdict and no goal: only what the runs say. A value or an end of an interval that censored "
             "runs, or steps that were not logged, leave open is empty."]
    header = ["finding", "ours", "95% interval or range", "n", "censored", "what", "from"]
    for question, beginnings in DOUBTS:
        rows = [[f"`{f['id']}`", number(f["ours"]), interval(f["lo"], f["hi"]), str(f["n"]), number(f.get("n_censored")), f["quantity"],
                 folder.name + (", the paper's own networks" if "networks" in f else "")]
                for folder in folders for f in folder.summary.get("findings", []) if f["id"].startswith(beginnings)]
        parts += [f"### {question}", table(header, rows)]
    return [*parts, "### What does dropping the members that never grok do to a median?", dropped(folders)]


def beyond_section(folders: list[Folder]) -> list[str]:
    """What the folders beyond the papers found: other tasks, losses, optimisers, widths, and our own question."""
    rows = [[f["quantity"], number(f["ours"]), interval(f["lo"], f["hi"]), str(f["n"]), number(f.get("n_censored")), folder.name]
            for folder in folders if folder.beyond for f in folder.summary.get("findings", [])]
    return ["## Beyond the papers", table(["what", "ours", "95% interval or range", "n", "censored", "from"], rows)] if rows else []


def dropped(folders: list[Folder]) -> str:
    rows = []
    for folder in folders:
        for cell in dict.fromkeys(run["cell"] for run in folder.runs):
            grok = np.array([*stats.times(folder.runs, cell).values()])
            kept = grok[np.isfinite(grok)]
            if 0 < len(kept) < len(grok):
                middle = float(stats.median(grok))
                rows.append([cell, number(float(np.median(kept))), number(middle), str(len(grok)),
                             str(len(grok) - len(kept)), folder.name])
    header = ["cell", "median over those that grok", "median, censored counted as later", "n", "censored", "from"]
    return table(header, rows) if rows else "No cell of the results has a censored run beside one that grokked."


def sensitivity_section(folders: list[Folder], root: Path, best: dict[str, dict], published: dict[str, dict]) -> list[str]:
    """alpha under three thresholds and both conventions of W_c, from the runs of delay-law folders; claims held at the papers' own W_c."""
    thresholds, conventions, dips, given = [], [], [], []
    for folder in folders:
        runs, claims = folder.runs, folder.summary["claims"] if folder.given else []
        for theirs in claims:
            if (ours := best.get(theirs["id"])) and "replicated" in theirs:
                held = theirs["replicated"]
                given.append([f"`{theirs['id']}`", published[theirs["id"]]["printed"],
                              *(text for c in (ours, held) for text in (value(c), interval(c["lo"], c["hi"]), c["verdict"])), str(held["n"]),
                              number(folder.given)])
        doses = {r["cell"]: r for r in runs if r["arm"] == "clamp" and r["loss"] == "ce" and (r["tau"], r["p"]) == (1, 59) and r["rho"] <= 1.25}
        doses = {cell: r for cell, r in doses.items() if (r["lr"], r["weight_decay"], r["train_frac"], r["model"]) == (1e-3, 1, 0.4, "mlp")}
        if folder.name.startswith("delay_law/") and len(doses) >= 3:
            rho = np.array([r["rho"] for r in doses.values()])
            for column, text in (("t_80_step", "0.80"), ("t_grok_step", "0.90"), ("t_95_step", "0.95")):
                times = np.array([[*stats.times(runs, cell, column).values()] for cell in doses])
                e, lo, hi = stats.bootstrap(times, lambda t, rho=rho: stats.line(rho, np.log(stats.median(t)))[0])
                thresholds.append([folder.name, text, number(e), interval(stats.finite(lo), stats.finite(hi)), str(times.shape[1]),
                                   str(int((~np.isfinite(times)).sum())), str(len(rho))])
        free = files.read_csv(root / folder.name / "contraction.csv") if (root / folder.name / "contraction.csv").exists() else []
        mine = [r for r in free if r["cell"] in ("free_p59_b16", "free_p59_b12") and r.get("v_end")]
        if mine:
            own, end = (float(np.median([math.sqrt(r[k]) for r in mine])) for k in ("v_grok", "v_end"))
            fitted = ("A.alpha.dense", "A.alpha.p59", "A.tf.alpha")
            alpha = next((c["replicated"]["ours"] for c in folder.summary["claims"] if c["id"] in fitted and "replicated" in c
                          and c["replicated"]["ours"]), None)
            conventions.append([folder.name, runs[0]["model"], number(own), number(end), number(alpha), number(alpha and alpha * end / own),
                                str(len(mine))])
        after = [r for r in runs if r.get("evals_below_after_grok") is not None]
        if after:
            dips.append([folder.name, str(len(after)), str(sum(r["evals_below_after_grok"] > 0 for r in after)),
                         number(float(np.mean([25 * r["evals_below_after_grok"] / (r["steps_run"] - r["t_grok_step"]) for r in after])))])
    parts = ["## Sensitivity"]
    for title, header, rows in (
            ("Threshold of test accuracy", ["from", "threshold", "alpha", "95% interval", "n", "not reached", "doses"], thresholds),
            ("Convention of W_c: norm at each member's own T_grok, or at the end of the control run (last logged step), after its slowest member",
             ["from", "model", "W_c, own T_grok", "W_c, end of run", "alpha on the first", "alpha on the second", "n"], conventions),
            ("The same cells held at multiples of the paper's own W_c (--w-c) in place of ours",
             ["id", "paper", "at our W_c", "95% interval", "verdict", "at the paper's", "95% interval", "verdict", "n", "paper's W_c"], given),
            ("First against sustained crossing: test accuracy under 0.90 again after T_grok (--after-grok)",
             ["from", "runs trained on", "runs that fall below again", "mean share of later evaluations below"], dips)):
        parts += [f"### {title}", table(header, rows)]
    return parts


# ---------------------------------------------------------------- replay and survival

def replayed(root: Path) -> list[dict]:
    """Every replayed network; one that several folders hold, or several released files, counts once."""
    rows: dict[tuple, dict] = {}
    for path in sorted(root.glob("replay/*/replay.csv")):
        runs = {(run["cell"], run["member"]): run for run in files.read_runs(path.parent / "runs.csv")}
        for row in files.read_csv(path):
            run = runs[row["cell"], row["member"]]
            rows.setdefault(tuple(run.get(key) for key in NETWORK), row)
    return list(rows.values())


def within_one(row: dict) -> bool:
    """Whether T_grok is equal or one evaluation away: 25 steps, unless the run has a schedule of its own."""
    return row.get("difference_evaluations", math.ceil(abs(row["difference_steps"]) / 25)) <= 1


def equivalence(rows: list[dict]) -> tuple[float, float, float, float, int]:
    """Mean of ln(ours / released), its 90% interval, the larger p-value of the two one-sided tests, and n (pairs grokked on both sides).
    Ratios that are all equal have no spread: the interval is their value, and p is not a number."""
    d = np.log([r["t_grok"] / r["t_grok_released"] for r in rows if r["t_grok"] and r["t_grok_released"]])
    if len(d) < 2 or np.ptp(d) == 0:
        mean = float(d.mean()) if len(d) else math.nan
        return mean, mean, mean, math.nan, len(d)
    margin = math.log(1 + MARGIN)
    p = max(ttest_1samp(d, -margin, alternative="greater").pvalue, ttest_1samp(d, margin, alternative="less").pvalue)
    low, high = ttest_1samp(d, 0).confidence_interval(0.90)
    return float(d.mean()), float(low), float(high), float(p), len(d)


def replay_section(root: Path, folder: Path, draw: bool) -> list[str]:
    rows = replayed(root)
    if not rows:
        return ["## Seed by seed", "NOT RUN"]
    lines = []
    for cell in [None, *dict.fromkeys(r["cell"] for r in rows)]:
        mine = [r for r in rows if cell in (None, r["cell"])]
        differences = [abs(r["difference_steps"]) for r in mine]
        mean, low, high, p, n = equivalence(mine)
        relative = max(d / (r["t_grok_released"] or r["t_grok"] or math.inf) for d, r in zip(differences, mine, strict=True))
        unequal = "all equal" if low == high else f"{p:.2g}"
        lines.append([cell or "all", str(len(mine)), str(differences.count(0)), str(sum(within_one(r) for r in mine)), f"{100 * relative:.2f}%",
                      f"{100 * mean:+.3f}% [{100 * low:+.3f}, {100 * high:+.3f}]" if n else "-", unequal if n > 1 else "-"])
    if draw:
        figures.replay(rows, folder)
    header = ["released cell", "runs", "exact", "within one evaluation", "largest difference", "mean ln ratio [90% interval]", "p, not equivalent"]
    return ["## Seed by seed",
            "T_grok of released runs against ours; released files that are not listed were not replayed, and a network that the papers released "
            f"under two names counts once. Equivalence: two one-sided tests against a margin of {100 * MARGIN:g}%; runs whose ratios are all "
            "equal have no spread to test.", "![T_grok as released against T_grok here, every replayed run](report/replay.png)", table(header, lines)]


def survival_section(folders: list[Folder], folder: Path, draw: bool) -> list[str]:
    """Kaplan-Meier curves of T_grok per dose, of the delay-law folder with most doses."""
    best = max((f for f in folders if any(r["arm"] == "clamp" and r["p"] == 59 and r["tau"] == 1 and r["loss"] == "ce" for r in f.runs)),
               key=lambda f: (f.name.startswith("delay_law/"), len({r["rho"] for r in f.runs}), len(f.runs)), default=None)
    if best is None:
        return []
    if draw:
        figures.survival(best.runs, best.name, folder)
    return ["## Time to grok as survival", f"![Share of members that have not grokked, per held norm; {best.name}](report/survival.png)"]


# ---------------------------------------------------------------- the rest

def figures_section(folders: list[Folder], root: Path) -> list[str]:
    paths = [path.relative_to(root) for folder in folders for path in sorted((root / folder.name / "figures").glob("*.png"))]
    return ["## Figures of the runs of record", *(f"![{path.parents[1]}: {path.stem}]({path})" for path in paths)]


def speed_section(root: Path) -> list[str]:
    rows = [{"model": "mlp", **row} for path in sorted(root.glob("bench*/step.csv")) for row in files.read_csv(path)]
    names = ["name", "model", "device", "backend", "dtype", "p", "runs", "us_per_run_step", "low", "high", "ratio_to_ours"]
    return ["## Speed", "Microseconds for one optimiser step of one network; low and high are the 10% and 90% points of the repeats.",
            table(names, [[number(r[k]) if isinstance(r[k], float) else str(r[k]) for k in names] for r in rows])]


def provenance_section(root: Path) -> list[str]:
    rows, timed = [], []
    for path in sorted(root.glob("bench*/step.csv")):
        p = files.read_json(path.parent / "provenance.json") if (path.parent / "provenance.json").exists() else {}
        timed.append([str(path.parent.relative_to(root)), f"`{p['command']}`" if p else "not recorded",
                      p["commit"][:10] + (" (changed)" if p["dirty"] else "") if p else "not recorded", p.get("device", "not recorded")])
    for path in sorted(root.glob("*/*/provenance.json")):
        p, runs = files.read_json(path), files.read_runs(path.parent / "runs.csv")
        rows.append([str(path.parent.relative_to(root)), f"`{p['command']}`", p["commit"][:10] + (" (changed)" if p["dirty"] else ""), p["device"],
                     p["backend"], p["dtype"], str(len(runs)), f"{p['training_seconds']:.0f}", str(p["run_steps"]),
                     number(p["executed_over_needed"])])
    header = ["folder", "command", "commit", "device", "backend", "dtype", "runs", "seconds", "run-steps", "executed over needed"]
    return ["## Provenance", table(header, rows), table(header[:4], timed)]


RULE = """Rules, written before the runs. The papers' own networks: REPRODUCED if the whole published block ran and our value is the published one
to its printed digits or within 1%, NOT REPRODUCED if not, PARTLY RUN while members or cells are missing. Fresh networks: REPLICATED if our 95%
interval meets the published one (or the published value +- 3%), NOT REPLICATED if not, INCONCLUSIVE if fewer than half the published members ran,
half of a cell is censored or doses of a published fit are missing. NOT RUN otherwise. A number that the papers print in two tables has an id, and
counts, in each."""


def build(root: Path, draw: bool) -> tuple[str, str]:
    """The README's table and the text of REPORT.md. `draw`: write the figures of the report itself, in results/report/."""
    folders, published = collect(root), answers.published()
    best, drawn = {kind: best_answers(folders, kind) for kind in STRENGTH}, root / "report"
    papers = [folder for folder in folders if not folder.beyond]
    headlines = headline_table(best, published)
    total = f"Of {len(published)} published numbers, {counts(list(published), best)}."
    if again := replayed(root):
        exact, near = sum(row["difference_steps"] == 0 for row in again), sum(map(within_one, again))
        total += f" Of {len(again)} released networks trained again, {exact} grok at the released step, {near} within one evaluation."
    parts = ["# Two grokking papers, claim by claim",
             "Made by `python -m lab.report` from the files in this folder; nothing is trained. A = arXiv 2606.13753, B = arXiv 2606.18465.",
             total, RULE, "## Headlines", headlines, *claims_section(best, published), *doubts_section(papers), *beyond_section(folders),
             *sensitivity_section(papers, root, best["replicated"], published), *replay_section(root, drawn, draw),
             *survival_section(papers, drawn, draw), *speed_section(root), *figures_section(folders, root), *provenance_section(root)]
    return f"{headlines}\n\n{textwrap.fill(total, 118)}", "\n\n".join(parts) + "\n"


def stale(root: Path) -> list[str]:
    """Tables with other rows than summary and figures of their folder were made from. A summary made without the long trajectories says
    nothing about them."""
    out = []
    for path in sorted(root.glob("*/*/summary.json")):
        then = {"runs.csv": None, **files.made_from(path.parent)}
        out += [str((path.parent / name).relative_to(root)) for name, now in files.digests(path.parent).items() if then.get(name, now) != now]
    return out


def check_writable(root: Path) -> None:
    """Before minutes of work: the pages and the figures have a place, or UsageError."""
    for folder in (ROOT, root / "report" if (root / "report").exists() else root):
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder} cannot be written to; make the report in a copy, or use --check, which writes nothing")


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        raise UsageError(f"lab.report takes no flag but --check, got {' '.join(argv)}")
    readme, root = ROOT / "README.md", ROOT / "results"
    if not argv:
        check_writable(root)
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    block, text = build(root, draw=not argv)
    pages = {readme: f"{before}{BEGIN}\n{block}\n{END}{after}", root / "REPORT.md": text}
    pages = {path: text.encode("utf-8", "backslashreplace") for path, text in pages.items()}   # names of folders may not be UTF-8
    if argv:
        wrong = [f"{path.name} differs from the results" for path, page in pages.items() if not path.exists() or path.read_bytes() != page]
        wrong += [f"results/{table}: summary and figures beside it are of another one; draw them again with --figures-only" for table in stale(root)]
        print("\n".join([*wrong, "run python -m lab.report"] if wrong else []), end="\n" if wrong else "", file=sys.stderr)
        return int(bool(wrong))
    for path, page in pages.items():
        files.write_atomic(path, page)
    print(f"README.md and results/REPORT.md: {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    console.end(lambda: sys.exit(main(sys.argv[1:])))
