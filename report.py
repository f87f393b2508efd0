"""Every published number beside ours, from results/ alone: the README's table, REPORT.md and a self-contained report.html. Trains nothing.

    python report.py            rewrite README.md's table, REPORT.md, report.html and results/report/*.png
    python report.py --check    exit code 1 if README.md or REPORT.md differ from the results, or a summary and its figures from their runs.csv

Where several folders answer a number: a verdict goes before none, float32 before float64 (the papers' precision), then most members.
MLPs held at multiples of a given norm (--w-c) answer none: they stand beside the others under Sensitivity.
Equivalence of replayed runs: two one-sided t tests of ln(T_grok ours / released) against a margin of 5%, fixed before the runs.
"""
if __name__ == "__main__":
    import early
    early.guard()

import base64
import html
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

import endings
import files
import plots
import stats
from common import UsageError

ROOT = Path(__file__).resolve().parent
BEGIN, END = "<!-- claims: made by report.py -->", "<!-- end of claims -->"
STRENGTH = ("NOT RUN", "INCONCLUSIVE", "NOT REPRODUCED", "REPRODUCED")
MARGIN = 0.05         # of T_grok, for equivalence with the released runs
PROVENANCE = {"command", "commit", "dirty", "device", "backend", "dtype", "training_seconds", "run_steps", "executed_over_needed"}
NETWORK = ("model", "loss", "p", "train_frac", "block", "seed0", "member", "arm", "tau", "lr", "weight_decay", "clamp_start", "held_norm", "held_E",
           "held_W1", "held_W2")   # what makes two runs the same one
HEADLINES = ("A.alpha.dense", "A.alpha.dense.r2", "A.norm_factor", "A.lr_factor", "A.sustained.spread", "A.oneshot.spread", "A.saturation.p59",
             "A.alpha.shared", "A.wc.power", "A.wc.cv", "B.med.ce.p59.ratio", "B.med.ce.p97.ratio", "B.recovery.p59", "B.recovery.p97",
             "B.med.mse.p59.ratio", "B.med.mse.p97.ratio", "B.collapse.r2_logit.p59", "B.collapse.dr2.p59", "B.dose.alpha.p59", "B.dose.daic.p59",
             "B.audit.1.15.T32", "B.audit.1.15.T64", "B.audit.1.25.sc32", "B.audit.1.25.T64", "B.fork.p59.ratio", "B.fork.p97.ratio", "A.tf.wc",
             "A.tf.rho0.85", "A.tf.rho1.00", "A.tf.alpha", "A.ln.total_cv", "A.ln.unembed_cv", "B.tf.effect")
DOUBTS = (            # question, beginnings of the findings' ids that answer it
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


def collect(root: Path) -> list[Folder]:
    """Every results folder with a summary. Raises UsageError for one that is none."""
    found = []
    for path in sorted(root.glob("*/*/summary.json")):
        try:
            summary = files.read_json(path)
            for claim in summary["claims"]:
                claim["source"], claim["dtype"] = str(path.parent.relative_to(root)), summary["provenance"]["dtype"]
            config = files.read_json(path.parent / "config.json")
            if missing := PROVENANCE - set(files.read_json(path.parent / "provenance.json")):
                raise ValueError(f"provenance.json has no {' '.join(sorted(missing))}")
        except (UsageError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"{path.parent} is not what an experiment leaves ({what}); remove it or make it again") from None
        given = config.get("w_c", 0.0) if config["model"] == "mlp" else 0.0
        found.append(Folder(str(path.parent.relative_to(root)), summary, files.read_runs(path.parent / "runs.csv"), given))
    return found


def answers(folders: list[Folder]) -> dict[str, dict]:
    """The best-supported answer to each published id."""
    rank = lambda c: (c["verdict"] in STRENGTH[2:], c["verdict"] != "NOT RUN", c["dtype"] == "float32", c["n"])  # noqa: E731
    best: dict[str, dict] = {}
    for claim in (claim for folder in folders if not folder.given for claim in folder.summary["claims"]):
        if claim["id"] not in best or rank(claim) > rank(best[claim["id"]]):
            best[claim["id"]] = claim
    return best


# ---------------------------------------------------------------- blocks: (kind, content), rendered twice

def number(x: float | None, digits: int = 4) -> str:
    if x is None or not math.isfinite(x):
        return "-"
    return f"{x:.0f}" if 1000 <= abs(x) < 1e7 else f"{x:.{digits}g}"


def interval(lo: float | None, hi: float | None) -> str:
    return "-" if lo is None and hi is None else f"{number(lo)} to {number(hi)}"


def claim_rows(ids: list[str], best: dict[str, dict], published: dict[str, dict]) -> list[list[str]]:
    rows = []
    for key in ids:
        row, c = published[key], best.get(key) or stats.claim(published[key], None)
        rows.append([f"`{key}`", c["verdict"], row["printed"] or "-", stats.beyond(c) or number(c["ours"]), interval(c["lo"], c["hi"]), str(c["n"]),
                     str(c["n_censored"]), row["quantity"]])
    return rows


CLAIM_HEADER = ["id", "verdict", "paper", "ours", "95% interval", "n", "censored", "quantity"]


def counts(ids: list[str], best: dict[str, dict]) -> str:
    verdicts = [best[key]["verdict"] if key in best else "NOT RUN" for key in ids]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in reversed(STRENGTH))


def readme_table(best: dict[str, dict], published: dict[str, dict]) -> str:
    return "\n".join([markdown([("table", (CLAIM_HEADER, claim_rows(list(HEADLINES), best, published)))]).strip(), "",
                      f"Of {len(published)} published numbers: {counts(list(published), best)}. All of them, with the doubts and their answers: "
                      "[REPORT.md](REPORT.md)."])


def claims_section(best: dict[str, dict], published: dict[str, dict]) -> list[tuple]:
    blocks: list[tuple] = [("h2", "Claims")]
    for paper, title in (("A.", "A: arXiv 2606.13753"), ("B.", "B: arXiv 2606.18465")):
        ids = [key for key in published if key.startswith(paper)]
        blocks += [("h3", title), ("p", f"{len(ids)} numbers: {counts(ids, best)}.")]
        sections = dict.fromkeys(published[key]["where"] for key in ids)
        for section in sections:
            mine = [key for key in ids if published[key]["where"] == section]
            blocks += [("h4", section), ("table", (CLAIM_HEADER, claim_rows(mine, best, published)))]
    return blocks


def doubts_section(folders: list[Folder]) -> list[tuple]:
    blocks = [("h2", "Doubts, and our answers in numbers"),
              ("p", "Questions that the papers leave open. No verdict and no goal: only what the runs say. A value or an end of an interval that "
                    "censored runs, or steps that were not logged, leave open is empty.")]
    header = ["finding", "ours", "95% interval or range", "n", "censored", "what", "from"]
    for question, beginnings in DOUBTS:
        rows = [[f"`{f['id']}`", number(f["ours"]), interval(f["lo"], f["hi"]), str(f["n"]), number(f.get("n_censored")), f["quantity"], folder.name]
                for folder in folders for f in folder.summary.get("findings", []) if f["id"].startswith(beginnings)]
        blocks += [("h3", question), ("table", (header, rows)) if rows else ("p", "NOT RUN")]
    return [*blocks, ("h3", "What does dropping the members that never grok do to a median?"), *dropped(folders)]


def dropped(folders: list[Folder]) -> list[tuple]:
    rows = []
    for folder in folders:
        for cell in dict.fromkeys(run["cell"] for run in folder.runs):
            grok = np.array([*stats.times(folder.runs, cell).values()])
            kept = grok[np.isfinite(grok)]
            if 0 < len(kept) < len(grok):
                middle = float(stats.median(grok))
                rows.append([cell, number(float(np.median(kept)), 6), number(middle, 6) if math.isfinite(middle) else "> budget", str(len(grok)),
                             str(len(grok) - len(kept)), folder.name])
    header = ["cell", "median over those that grok", "median, censored counted as later", "n", "censored", "from"]
    return [("table", (header, rows))] if rows else [("p", "No cell of the results has a censored run beside one that grokked.")]


def sensitivity_section(folders: list[Folder], root: Path, best: dict[str, dict], published: dict[str, dict]) -> list[tuple]:
    """alpha under three thresholds and both conventions of W_c, from the runs of delay-law folders; claims held at the papers' own W_c."""
    thresholds, conventions, dips, given = [], [], [], []
    for folder in folders:
        runs = folder.runs
        for theirs in folder.summary["claims"] if folder.given else ():
            ours = best.get(theirs["id"])
            if theirs["verdict"] != "NOT RUN" and ours:
                given.append([f"`{theirs['id']}`", published[theirs["id"]]["printed"], *(text for c in (ours, theirs) for text in (
                    stats.beyond(c) or number(c["ours"]), interval(c["lo"], c["hi"]), c["verdict"])), str(theirs["n"]), number(folder.given)])
        doses = {r["cell"]: r for r in runs if r["arm"] == "clamp" and r["loss"] == "ce" and (r["tau"], r["p"]) == (1, 59) and r["rho"] <= 1.25}
        doses = {cell: r for cell, r in doses.items() if (r["lr"], r["weight_decay"], r["train_frac"], r["model"]) == (1e-3, 1, 0.4, "mlp")}
        if folder.name.startswith("delay_law/") and len(doses) >= 3:
            rho = np.array([r["rho"] for r in doses.values()])
            for column, text in (("t_80_step", "0.80"), ("t_grok_step", "0.90"), ("t_95_step", "0.95")):
                table = np.array([[*stats.times(runs, cell, column).values()] for cell in doses])
                e, lo, hi = stats.bootstrap(table, lambda t, rho=rho: stats.line(rho, np.log(stats.median(t)))[0])
                thresholds.append([folder.name, text, number(e), interval(stats.finite(lo), stats.finite(hi)), str(table.shape[1]),
                                   str(int((~np.isfinite(table)).sum())), str(len(rho))])
        free = files.read_csv(root / folder.name / "contraction.csv") if (root / folder.name / "contraction.csv").exists() else []
        mine = [r for r in free if r["cell"] in ("free_p59_b16", "free_p59_b12") and r.get("v_end")]
        if mine:
            own, end = (float(np.median([math.sqrt(r[k]) for r in mine])) for k in ("v_grok", "v_end"))
            fitted = ("A.alpha.dense", "A.alpha.p59", "A.tf.alpha")
            alpha = next((c["ours"] for c in folder.summary["claims"] if c["id"] in fitted and c["ours"]), None)
            conventions.append([folder.name, runs[0]["model"], number(own), number(end), number(alpha), number(alpha and alpha * end / own),
                                str(len(mine))])
        after = [r for r in runs if r.get("evals_below_after_grok") is not None]
        if after:
            dips.append([folder.name, str(len(after)), str(sum(r["evals_below_after_grok"] > 0 for r in after)),
                         number(float(np.mean([25 * r["evals_below_after_grok"] / (r["steps_run"] - r["t_grok_step"]) for r in after])))])
    blocks: list[tuple] = [("h2", "Sensitivity")]
    for title, header, rows in (
            ("Threshold of test accuracy", ["from", "threshold", "alpha", "95% interval", "n", "not reached", "doses"], thresholds),
            ("Convention of W_c: norm at each member's own T_grok, or at the end of the control run (last logged step), after its slowest member",
             ["from", "model", "W_c, own T_grok", "W_c, end of run", "alpha on the first", "alpha on the second", "n"], conventions),
            ("The same cells held at multiples of the paper's own W_c (--w-c) in place of ours",
             ["id", "paper", "at our W_c", "95% interval", "verdict", "at the paper's", "95% interval", "verdict", "n", "paper's W_c"], given),
            ("First against sustained crossing: test accuracy under 0.90 again after T_grok (--after-grok)",
             ["from", "runs trained on", "runs that fall below again", "mean share of later evaluations below"], dips)):
        blocks += [("h3", title), ("table", (header, rows)) if rows else ("p", "NOT RUN")]
    return blocks


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


def figure(path: Path, caption: str) -> list[tuple]:
    """The block of a figure, if it could be drawn."""
    return [("figure", (path, caption))] if path.exists() else []


def replay_section(root: Path, folder: Path, draw: bool) -> list[tuple]:
    rows = replayed(root)
    if not rows:
        return [("h2", "Seed by seed"), ("p", "NOT RUN")]
    table = []
    for cell in [None, *dict.fromkeys(r["cell"] for r in rows)]:
        mine = [r for r in rows if cell in (None, r["cell"])]
        differences = [abs(r["difference_steps"]) for r in mine]
        mean, low, high, p, n = equivalence(mine)
        relative = max(d / (r["t_grok_released"] or r["t_grok"] or math.inf) for d, r in zip(differences, mine, strict=True))
        unequal = "all equal" if low == high else number(p, 2)
        table.append([cell or "all", str(len(mine)), str(differences.count(0)), str(sum(d <= 25 for d in differences)), f"{100 * relative:.2f}%",
                      f"{100 * mean:+.3f}% [{100 * low:+.3f}, {100 * high:+.3f}]" if n else "-", unequal if n > 1 else "-"])
    if draw:
        plots.replay(rows, folder)
    header = ["released cell", "runs", "exact", "within one evaluation", "largest difference", "mean ln ratio [90% interval]", "p, not equivalent"]
    return [("h2", "Seed by seed"),
            ("p", "T_grok of released runs against ours; released files that are not listed were not replayed, and a network that the papers "
                  f"released under two names counts once. Equivalence: two one-sided tests against a margin of {100 * MARGIN:g}%; runs whose "
                  "ratios are all equal have no spread to test."),
            *figure(folder / "replay.png", "T_grok as released against T_grok here, every replayed run"), ("table", (header, table))]


def survival_section(folders: list[Folder], folder: Path, draw: bool) -> list[tuple]:
    """Kaplan-Meier curves of T_grok per dose, of the delay-law folder with most doses."""
    best = max((f for f in folders if any(r["arm"] == "clamp" and r["p"] == 59 and r["tau"] == 1 and r["loss"] == "ce" for r in f.runs)),
               key=lambda f: (f.name.startswith("delay_law/"), len({r["rho"] for r in f.runs}), len(f.runs)), default=None)
    if best is None:
        return []
    if draw:
        plots.survival(best.runs, best.name, folder)
    caption = f"Share of members that have not grokked, per held norm; {best.name}"
    return [("h2", "Time to grok as survival"), *figure(folder / "survival.png", caption)]


# ---------------------------------------------------------------- the rest, and rendering

def figures_section(folders: list[Folder], root: Path) -> list[tuple]:
    blocks: list[tuple] = [("h2", "Figures of the runs of record")]
    for folder in folders:
        for path in sorted((root / folder.name / "figures").glob("*.png")):
            blocks.append(("figure", (path, f"{folder.name}: {path.stem}")))
    return blocks


def speed_section(root: Path) -> list[tuple]:
    rows = [{"model": "mlp", **row} for path in sorted(root.glob("bench*/step.csv")) for row in files.read_csv(path)]
    if not rows:
        return [("h2", "Speed"), ("p", "NOT RUN")]
    names = ("name", "model", "device", "backend", "dtype", "p", "runs", "us_per_run_step", "low", "high", "ratio_to_ours")
    return [("h2", "Speed"), ("p", "Microseconds for one optimiser step of one network; low and high are the 10% and 90% points of the repeats."),
            ("table", (list(names), [[number(r[k]) if isinstance(r[k], float) else str(r[k]) for k in names] for r in rows]))]


def provenance_section(root: Path) -> list[tuple]:
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
    return [("h2", "Provenance"), ("table", (header, rows)), ("table", (header[:4], timed))]


def markdown(blocks: list[tuple]) -> str:
    out = []
    for kind, content in blocks:
        if kind in ("h1", "h2", "h3", "h4"):
            out.append(f"{'#' * int(kind[1])} {content}")
        elif kind == "table":
            header, rows = content
            lines = ["| " + " | ".join(field.replace("|", "\\|") for field in row) + " |" for row in [header, *rows]]
            out.append("\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]))
        elif kind == "figure":
            out.append(f"![{content[1]}]({content[0].relative_to(ROOT)})")
        else:
            out.append(content)
    return "\n\n".join(out) + "\n"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:70rem;padding:1rem;color:#111;background:#fff}
h1,h2,h3,h4{line-height:1.2;margin:1.6em 0 .5em}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}
th,td{border:1px solid #bbb;padding:.2rem .5rem;text-align:left;vertical-align:top}th{background:#eee}td{white-space:nowrap}
td.text{white-space:normal;min-width:14rem}nav a{margin-right:1em}
img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption{font-size:.85rem}code{font-size:.9em}.REPRODUCED{font-weight:700}
.NOT-REPRODUCED{font-weight:700;text-decoration:underline}.NOT-RUN{color:#666}"""


def webpage(blocks: list[tuple]) -> str:
    """The same blocks as one HTML file: figures inline, nothing fetched, tables scroll on a narrow screen."""
    def inline(text: str) -> str:
        parts = html.escape(text).split("`")
        return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    out = []
    for kind, content in blocks:
        if kind == "table":
            header, rows = content
            marked = [[f'<td class="{c.replace(" ", "-") if c in STRENGTH else "text" if len(c) > 40 else "value"}">{inline(c)}</td>' for c in row]
                      for row in rows]
            body = "".join(f"<tr>{''.join(row)}</tr>" for row in marked)
            out.append(f'<div class="scroll"><table><tr>{"".join(f"<th>{inline(c)}</th>" for c in header)}</tr>{body}</table></div>')
        elif kind == "figure":
            data = base64.b64encode(content[0].read_bytes()).decode()
            caption = html.escape(content[1])
            out.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>')
        elif kind == "h2":
            out.append(f'<h2 id="{content.replace(" ", "-")}">{inline(content)}</h2>')
        else:
            out.append(f"<{kind}>{inline(content)}</{kind}>")
    links = "".join(f'<a href="#{content.replace(" ", "-")}">{inline(content)}</a>' for kind, content in blocks if kind == "h2")
    out.insert(1, f"<nav>{links}</nav>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>Two grokking papers, re-measured</title><style>{STYLE}</style></head><body>{''.join(out)}</body></html>\n")


def build(root: Path, draw: bool) -> tuple[str, list[tuple]]:
    """The README's table and the report's blocks. `draw`: write the figures of the report itself, in results/report/."""
    folders, published = collect(root), stats.published(ROOT / "published.csv", "")
    best, drawn = answers(folders), root / "report"
    blocks = [("h1", "Two grokking papers, claim by claim"),
              ("p", "Made by `python report.py` from the files under `results/`; nothing is trained. A = arXiv 2606.13753, B = arXiv 2606.18465."),
              ("p", f"Of {len(published)} published numbers: {counts(list(published), best)}. Rule, written before the runs: REPRODUCED if our 95% "
                    "interval meets the published one (or the published value +- 3%), NOT REPRODUCED if not, INCONCLUSIVE if fewer than half the "
                    "published members ran, half of a cell is censored or doses of a published fit are missing, NOT RUN otherwise. A number that "
                    "the papers print in two tables has an id, and counts, in each."),
              ("h2", "Headlines"), ("table", (CLAIM_HEADER, claim_rows(list(HEADLINES), best, published))),
              *doubts_section(folders), *sensitivity_section(folders, root, best, published), *replay_section(root, drawn, draw),
              *survival_section(folders, drawn, draw), *speed_section(root), *figures_section(folders, root), *claims_section(best, published),
              *provenance_section(root)]
    return readme_table(best, published), blocks


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
        raise UsageError(f"report.py takes no flag but --check, got {' '.join(argv)}")
    readme, root = ROOT / "README.md", ROOT / "results"
    if not argv:
        check_writable(root)
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table, blocks = build(root, draw=not argv)
    pages = {readme: f"{before}{BEGIN}\n{table}\n{END}{after}", ROOT / "REPORT.md": markdown(blocks)}
    pages = {path: text.encode("utf-8", "backslashreplace") for path, text in pages.items()}   # names of folders may not be UTF-8
    if argv:
        wrong = [f"{path.name} differs from the results" for path, page in pages.items() if not path.exists() or path.read_bytes() != page]
        wrong += [f"results/{table}: summary and figures beside it are of another one; draw them again with --figures-only" for table in stale(root)]
        print("\n".join([*wrong, "run report.py"] if wrong else []), end="\n" if wrong else "", file=sys.stderr)
        return int(bool(wrong))
    for path, page in {**pages, ROOT / "report.html": webpage(blocks).encode("utf-8", "backslashreplace")}.items():
        files.write_atomic(path, page)
    print(f"README.md, REPORT.md and report.html: {len(blocks)} blocks")
    return 0


if __name__ == "__main__":
    endings.end(lambda: sys.exit(main(sys.argv[1:])))
