"""Figures that several experiments share: every member visible, censored runs as open triangles at their budget, published points beside ours."""
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import CensoredData, ecdf

from lab import desk, files, stats
from lab.answers import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LINES, MARKERS = ("-", "--", ":", "-."), "osD^vPX*"   # series differ in print without colour, too


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """`folder/name.png` and `.pdf`."""
    files.check_held(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=120, bbox_inches="tight")
        files.write_atomic(folder / f"{name}.{kind}", image.getvalue())


def steps(axis: matplotlib.axis.Axis, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis of steps: `subs` times powers of ten, as plain numbers."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def sheet(folder: Path, name: str, panels: list, draw: Callable[..., None], **more: object) -> None:
    """A figure: `draw(axis, panel, **more)` for each of `panels`, side by side, with a legend each."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw(axis, panel, **more)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    save_figure(figure, folder, name)
    plt.close(figure)


def points(table: Table, published: list[dict]) -> dict[str, dict]:
    """Cell -> `Table.point`, its median T_grok with 95% interval, and the published numbers about it by statistic."""
    found = {}
    for cell in table.first:
        median, lo, hi = stats.resampled(len(table.grok[cell]), table.T(cell))
        found[cell] = {**table.point(cell), "median": median, "lo": lo, "hi": hi, "published": {}}
    for row in published:
        if row["arm"] and row["value"] is not None and (cell := table.match(row)):
            found[cell]["published"].setdefault(row["statistic"], row["value"])
    return found


def squares(axis: plt.Axes, pairs: Iterable[tuple[float | None, float | None]], label: str = "published medians", marker: str = "s") -> None:
    """Published points: of `pairs` those that have both numbers."""
    pairs = [pair for pair in pairs if None not in pair]
    if pairs:
        seen = label in axis.get_legend_handles_labels()[1]
        axis.plot(*zip(*pairs, strict=True), marker, mfc="none", color="black", mew=1.3, ms=9 if marker == "s" else 6, label=None if seen else label)


def members(axis: plt.Axes, points: list[dict], x: str, color: str = "C0", marker: str = "o", what: str = "T",
            label: str = "every member; bar: median", over: dict | None = None) -> None:
    """Every member of each cell at its `x`, markers where it grokked and open triangles at the budget where it did not; a bar at the median;
    published medians. `what`: T, T_grok, or T_mem. `over`: the cell whose median is 1."""
    known, one = "T_grok" if what == "T" else what, float(stats.median(over[what])) if over else 1.0
    width = 0.012 * (max(point[x] for point in points) - min(point[x] for point in points)) or 0.03
    for point in points:
        for offset, t in zip(np.linspace(-width, width, len(point[what])) if len(point[what]) > 1 else [0], point[what], strict=True):
            axis.plot(point[x] + offset, (t if math.isfinite(t) else point["budget_steps"]) / one, marker if math.isfinite(t) else "^", color=color,
                      mfc=color if math.isfinite(t) else "none", ms=3.5, alpha=0.6)
        if math.isfinite(middle := float(stats.median(point[what]))):
            axis.plot([point[x] - 2.5 * width, point[x] + 2.5 * width], [middle / one] * 2, color=color, lw=2)
    axis.plot([], [], marker, color=color, label=label)
    if any(not np.isfinite(point[what]).all() for point in points):
        axis.plot([], [], "^", mfc="none", color=color, label="censored, at its budget")
    theirs = over["published"].get(known) if over else 1.0
    squares(axis, [(point[x], y / theirs) for point in points if theirs and (y := point["published"].get(known))])
    axis.set(yscale="log", ylabel=f"{known} (steps)")
    steps(axis.yaxis, (1, 1.5, 2, 3, 5, 7) if over else (1, 2, 5))


def values(axis: plt.Axes, points: list[dict], x: str, what: str, known: str, style: str = "D--", color: str = "C0", label: str = "",
           over: dict | None = None, published: str = "s") -> None:
    """`what` of each cell at its `x`, and the published statistic `known` by the marker `published`. `over`: the cell whose value is 1."""
    one = over[what] if over else 1
    axis.plot([point[x] for point in points], [point[what] / one for point in points], style, color=color, mfc="none", label=label)
    theirs = over["published"].get(known) if over else 1.0
    squares(axis, [(point[x], y / theirs) for point in points if theirs and (y := point["published"].get(known)) is not None], "published", published)


def mediation(folder: Path, name: str, memorisation: str, tables: list[list[dict]]) -> None:
    """Paper B, norm up and temperature back, two figures with a panel per table (baseline, then the raised norm over temperature): T_grok and logit
    scale over the baseline's, and T_mem beside T_grok: temperature moves the delay, not memorisation."""
    def title(base: dict, up: dict) -> str:
        return f"{base['model']}, {base['loss']}, p={base['p']}, rho {up['rho']:g}, {len(base['T'])} members"

    def over_baseline(axis: plt.Axes, cells: list[dict]) -> None:
        base, *sweep = cells
        axis.set(xlabel="temperature tau", title=title(base, sweep[0]))
        if not math.isfinite(base["median"]):
            return axis.set(title=f"{base['loss']}: half of the baseline is censored")
        members(axis, sweep, "tau", "C3", label="T_grok / baseline, every member; bar: median", over=base)
        values(axis, sweep, "tau", "logit_scale", "L", label="logit scale / baseline", over=base, published="x")
        axis.axhline(1, color="gray", lw=0.8, ls=":")
        return axis.set(ylabel="over the baseline (rho 1, tau 1)")

    def both_times(axis: plt.Axes, cells: list[dict]) -> None:
        members(axis, cells[1:], "tau", "C3", label="T_grok")
        members(axis, cells[1:], "tau", "C2", "D", "T_mem", label="T_mem")
        axis.set(xlabel="temperature tau", ylabel="steps", title=title(*cells[:2]))
    sheet(folder, name, tables, over_baseline)
    sheet(folder, memorisation, tables, both_times)


def middle(runs: list[dict]) -> float:
    """Median T_grok, censored runs counted as later; not a number where that is beyond the budget, so that nothing is drawn."""
    found = float(stats.median(np.array([math.inf if r["t_grok_step"] is None else r["t_grok_step"] for r in runs])))
    return found if math.isfinite(found) else math.nan


def dots(axis: plt.Axes, x: float, runs: list[dict], color: str, spread: float = 0.004) -> None:
    """Every member of a cell: dots where it grokked, open triangles at the budget where it did not; a bar at the median."""
    jitter = np.linspace(-spread, spread, len(runs)) if len(runs) > 1 else [0]
    for offset, run in zip(jitter, runs, strict=True):
        grok = run["t_grok_step"]
        axis.plot(x + offset, grok or run["budget_steps"], marker="." if grok else "^", color=color, mfc=color if grok else "none", ms=5, alpha=0.7)
    axis.plot([x - 2.2 * spread, x + 2.2 * spread], [middle(runs)] * 2, color=color, lw=2)


def dose(runs: list[dict], arm: str, title: str, folder: Path, file: str, fits: dict, prefix: str, published: str) -> None:
    """T_grok against rho on a log axis, a colour and a line style per modulus, lines fitted to three doses or more, published medians as
    open squares."""
    mine = [r for r in runs if r["arm"] == arm and r["lr"] == runs[0]["lr"]]
    figure, axis = plt.subplots(figsize=(6, 4.2))
    known, shown = stats.published(desk.ROOT / "published.csv", "A."), False
    for i, p in enumerate(sorted({r["p"] for r in mine})):
        color, rhos = f"C{i}", sorted({r["rho"] for r in mine if r["p"] == p})
        for rho in rhos:
            dots(axis, rho, [r for r in mine if (r["p"], r["rho"]) == (p, rho)], color)
        fit = fits.get(f"{prefix}.p{p}")
        if fit and arm == "clamp" and len(fit["rhos"]) >= 3 and math.isfinite(fit["alpha"][0]):
            x = np.array([min(fit["rhos"]), max(fit["rhos"])])
            axis.plot(x, np.exp(fit["intercept"] + fit["alpha"][0] * x), color=color, ls=LINES[i % 4], lw=1,
                      label=f"p={p}: alpha {fit['alpha'][0]:.2f} [{fit['alpha'][1]:.2f}, {fit['alpha'][2]:.2f}]")
        else:
            axis.plot([], [], color=color, lw=2, label=f"p={p}")
        points = [(known[k]["rho"], known[k]["value"]) for k in known if k.startswith(published.format(p=p)) and int(known[k]["p"]) == p]
        if points and arm == "clamp":
            shown = True
            axis.plot([float(x) for x, _ in points], [y for _, y in points], "s", mfc="none", mec=color, mew=1.5, ms=8)
        free_runs = [r["t_grok_step"] for r in runs if r["arm"] == "free" and r["p"] == p and r["t_grok_step"] and r["block"] == mine[0]["block"]]
        if free_runs:
            axis.axhline(np.median(free_runs), color=color, ls=(0, (1, 4)), lw=1)
    axis.set(yscale="log", xlabel="held norm / critical norm, rho" if arm == "clamp" else "norm after one rescale / critical norm, rho",
             ylabel="T_grok (steps)", title=title)
    if shown:
        axis.plot([], [], "s", mfc="none", color="gray", mew=1.5, label="published median")
    steps(axis.yaxis)
    axis.plot([], [], color="gray", ls=(0, (1, 4)), lw=1, label="free control, median")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    axis.legend(fontsize=7)
    save_figure(figure, folder, file)
    plt.close(figure)


def groups(runs: list[dict], names: tuple[str, ...], folder: Path, file: str) -> None:
    """T_grok of a transformer with one of the groups `names` held alone, at one modulus: side by side, our medians with a marker per group and,
    of three doses or more, a line; published medians as open squares."""
    known, p, shown = stats.published(desk.ROOT / "published.csv", "A.ln."), runs[0]["p"], False
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for i, group in enumerate(names):
        cells = {rho: [r for r in runs if r["arm"] == "clamp" and r["rho"] == rho and r[f"held_{group}"] is not None]
                 for rho in sorted({r["rho"] for r in runs if r[f"held_{group}"] is not None})}
        x = np.array([*cells]) + 0.014 * (i - (len(names) - 1) / 2)
        for at, mine in zip(x, cells.values(), strict=True):
            dots(axis, at, mine, f"C{i}", 0.003)
        if cells:
            axis.plot(x, [middle(mine) for mine in cells.values()], marker=MARKERS[2 + i], color=f"C{i}", lw=1,
                      ls=LINES[i % 4] if len(cells) >= 3 else "", label=f"{group} held")
        points = [(at, known[key]["value"]) for at, rho in zip(x, cells, strict=True)
                  if (key := f"A.ln.{group}{float(rho)}") in known and int(known[key]["p"]) == p]
        if points:
            shown = True
            axis.plot(*zip(*points, strict=True), "s", mfc="none", mec=f"C{i}", mew=1.5, ms=9)
    axis.axhline(middle([r for r in runs if r["arm"] == "free"]), color="gray", ls=(0, (1, 4)), lw=1, label="free control, median")
    if shown:
        axis.plot([], [], "s", mfc="none", color="gray", mew=1.5, label="published median")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    axis.set(yscale="log", xlabel="held norm of the group / its norm at grokking, rho", ylabel="T_grok (steps)",
             title=f"One group held at a time, {runs[0]['model']}, p={p}")
    steps(axis.yaxis)
    axis.legend(fontsize=7)
    save_figure(figure, folder, file)
    plt.close(figure)


def matrix(runs: list[dict], folder: Path, file: str) -> None:
    """T_grok against learning rate, a colour and a line style per held norm that was run at several, published medians as squares."""
    known = stats.published(desk.ROOT / "published.csv", "A.matrix.")
    rhos = sorted({r["rho"] for r in runs if r["arm"] == "clamp"})
    several = [rho for rho in rhos if len({r["lr"] for r in runs if r["rho"] == rho and r["arm"] == "clamp"}) > 1]
    if not several:   # nothing to compare, and a logarithmic axis without a point cannot be drawn
        return
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for i, rho in enumerate(several):
        mine, medians = [r for r in runs if r["arm"] == "clamp" and r["rho"] == rho], {}
        for lr in sorted({r["lr"] for r in mine}):
            cell = [r for r in mine if r["lr"] == lr]
            for r in cell:
                grok = r["t_grok_step"]
                axis.plot(lr, grok or r["budget_steps"], "." if grok else "^", color=f"C{i}", mfc=f"C{i}" if grok else "none", alpha=0.5)
            medians[lr] = middle(cell)
            axis.plot(lr, medians[lr], "_", color=f"C{i}", ms=16, mew=2)
        axis.plot([*medians], [*medians.values()], color=f"C{i}", ls=LINES[i % 4], lw=1, label=f"rho {rho:g}, through our medians")
        points = [(float(k["lr"]), k["value"]) for k in known.values() if float(k["rho"]) == rho and int(k["p"]) == mine[0]["p"]]
        if points:
            axis.plot(*zip(*points, strict=True), "s", mfc="none", color=f"C{i}", mew=1.5, ms=8)
    axis.plot([], [], "s", mfc="none", color="gray", label="published median")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="T_grok (steps)", title="Norm against learning rate")
    rates = sorted({r["lr"] for r in runs if r["arm"] == "clamp"})
    axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axis.set_xticks([], minor=True)
    steps(axis.yaxis)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, folder, file)
    plt.close(figure)


def critical_norm(runs: list[dict], folder: Path, group: str = "") -> None:
    """Total norm at own T_grok of free runs, or that of a group: cell by cell, and against p where there are several. Published W_c as squares."""
    column = f"norm_{group}_at_grok" if group else "norm_at_grok"
    mine = [r for r in runs if r["arm"] == "free" and r[column] is not None]
    plain = [r for r in mine if r["weight_decay"] == 1 and r["train_frac"] == 0.40]
    known = {int(k["p"]): k["value"] for key, k in stats.published(desk.ROOT / "published.csv", "A.").items() if k["value"] and not group
             and k["model"] == mine[0]["model"] and key in (f"A.wc.p{k['p']}", f"A.wc.pscan.p{k['p']}", "A.tf.wc")}
    moduli, names = {r["p"] for r in plain}, list(dict.fromkeys(r["cell"] for r in mine))
    panels = 1 + (len(moduli) > 1)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False)
    label = f"{group} norm at T_grok, free".strip()
    for i, cell in enumerate(names):
        values = [r[column] for r in mine if r["cell"] == cell]
        axes[0, 0].plot([i] * len(values), values, ".", color="C0", alpha=0.5, label="" if i else "ours, every member")
        axes[0, 0].plot(i, np.median(values), "_", color="black", ms=14, label="" if i else "our median")
        default = next((r for r in plain if r["cell"] == cell and r["lr"] == plain[0]["lr"]), None)
        if default and default["p"] in known:
            axes[0, 0].plot(i, known[default["p"]], "s", mfc="none", color="black")
    axes[0, 0].set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes[0, 0].set(ylabel=label, title="Norm at grokking", xlim=(-0.6, len(names) - 0.4))
    if panels == 2:
        axes[0, 1].plot([r["p"] for r in plain], [r[column] for r in plain], ".", color="C0", alpha=0.5)
        if points := [(p, value) for p, value in known.items() if min(moduli) <= p <= max(moduli)]:
            axes[0, 1].plot(*zip(*points, strict=True), "s", mfc="none", color="black")
        axes[0, 1].set(xlabel="p", title="Over p")
        axes[0, 1].set_xticks(sorted(moduli))
    if known:
        axes[0, 0].plot([], [], "s", mfc="none", color="black", label="published W_c")
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, folder, f"critical_norm_{group}" if group else "critical_norm")
    plt.close(figure)


def contraction(rows: list[dict], folder: Path) -> None:
    """Delay of free runs against the logarithm that the squared norm V fell through, from T_mem and from its peak."""
    figure, axis = plt.subplots(figsize=(5.5, 4.2))
    for i, cell in enumerate(dict.fromkeys(row["cell"] for row in rows)):
        mine = [row for row in rows if row["cell"] == cell]
        delay = [row["delay_steps"] for row in mine]
        axis.plot([row["ln_v_peak_ratio"] for row in mine], delay, MARKERS[i % 5], color=f"C{i % 10}", alpha=0.7, label=cell if i < 10 else None)
        axis.plot([row["ln_v_ratio"] for row in mine], delay, "x", color=f"C{i % 10}", alpha=0.7)
    axis.plot([], [], "o", color="gray", label="V at its peak")
    axis.plot([], [], "x", color="gray", label="V at T_mem")
    axis.set(xlabel="ln(V / V_grok), V = squared norm", ylabel="T_grok - T_mem (steps)", title="Free contraction")
    axis.legend(fontsize=6)
    save_figure(figure, folder, "contraction")
    plt.close(figure)


def trajectories(trajectories: list[dict], folder: Path) -> None:
    """Median over members of test accuracy, norm (of transformers also the unembedding's) and effective logit scale against step, a line a cell."""
    columns = [key for key in ("test_accuracy", "norm", "norm_unembed", "logit_scale") if key in trajectories[0]]
    figure, axes = plt.subplots(1, len(columns), figsize=(13 / 3 * len(columns), 4))
    cells = list(dict.fromkeys(t["cell"] for t in trajectories))[:12]
    for i, cell in enumerate(cells):
        mine = [t for t in trajectories if t["cell"] == cell and t["step"] > 1 and t["norm"] is not None]   # None: the run diverged
        steps = sorted({t["step"] for t in mine})
        for axis, key in zip(axes, columns, strict=True):
            axis.plot(steps, [np.median([t[key] for t in mine if t["step"] == s]) for s in steps], color=plt.cm.viridis(0.9 * i / len(cells)),
                      ls=LINES[i % 4], label=cell)
            axis.set(xscale="log", xlabel="step", title=key.replace("_", " "))
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, folder, "trajectories")
    plt.close(figure)


def replay(rows: list[dict], folder: Path) -> None:
    """Released T_grok against ours, a marker per folder of released files: on the line they are equal."""
    picture, axis = plt.subplots(figsize=(5.5, 5))
    for i, group in enumerate(dict.fromkeys(Path(row["cell"]).parent.name for row in rows)):
        mine = [r for r in rows if Path(r["cell"]).parent.name == group]
        points = [(r["t_grok_released"], r["t_grok"]) for r in mine if r["t_grok_released"] and r["t_grok"]]
        if points:
            cells = len({r["cell"] for r in mine})
            axis.plot(*zip(*points, strict=True), MARKERS[i % 8], mfc="none", ms=6, alpha=0.7,
                      label=f"{group or 'released'}: {len(points)} runs, {cells} cells")
    low, high = axis.get_xlim()
    axis.plot([low, high], [low, high], color="gray", lw=0.7, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="T_grok as released (steps)", ylabel="T_grok here (steps)", title="Per-seed replay")
    steps(axis.xaxis)
    steps(axis.yaxis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="upper left")
    save_figure(picture, folder, "replay")
    plt.close(picture)


def survival(runs: list[dict], name: str, folder: Path) -> None:
    """Kaplan-Meier curves of T_grok at p=59, tau 1, one line per held norm; censored runs leave at their budget."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    lr = next(r["lr"] for r in runs if r["arm"] == "clamp")
    clamped = [r for r in runs if (r["arm"], r["lr"], r["p"], r["tau"]) == ("clamp", lr, 59, 1)]
    rhos = sorted({r["rho"] for r in clamped})
    for i, rho in enumerate(rhos):
        mine = [r for r in clamped if r["rho"] == rho]
        times = np.array([r["t_grok_step"] or r["budget_steps"] for r in mine], dtype=float)
        curve = ecdf(CensoredData.right_censored(times, np.array([r["t_grok_step"] is None for r in mine]))).sf
        axis.step([times.min() / 2, *curve.quantiles], [1, *curve.probabilities], where="post", color=plt.get_cmap("viridis")(i / max(len(rhos), 2)),
                  ls=("-", "--", ":", "-.")[i % 4], label=f"rho {rho:g}")
    axis.set(xscale="log", xlabel="step", ylabel="share not yet grokked", title=f"Kaplan-Meier curves of T_grok, {name}")
    axis.legend(fontsize=7)
    save_figure(figure, folder, "survival")
    plt.close(figure)


ARM_COLORS = {"lowered": "C2", "free": "C0", "same": "C1", "raised": "C3"}
ARM_LINES = {"lowered": ":", "free": "--", "same": "-.", "raised": "-"}


def fork_arms(arms: dict[str, list[dict]], published: dict[str, float], folder: Path, file: str) -> None:
    """Delay from the fork, log axis, one column per arm; a line joins each member's arms, so that order shows member by member."""
    figure, axis = plt.subplots(figsize=(5.5, 4.2))
    shown = {arm: [r["delay_steps"] or r["budget_steps"] - r["fork_step"] for r in runs] for arm, runs in arms.items()}
    first = next(iter(arms.values()))[0]
    for member in zip(*shown.values(), strict=True):
        axis.plot(range(len(arms)), member, color="gray", lw=0.6, alpha=0.6, zorder=0)
    for x, (arm, runs) in enumerate(arms.items()):
        for run, delay in zip(runs, shown[arm], strict=True):
            grokked = run["delay_steps"] is not None
            axis.plot(x, delay, marker="." if grokked else "^", color=ARM_COLORS[arm], mfc=ARM_COLORS[arm] if grokked else "none", ms=7)
        middle = float(stats.median(np.array([math.inf if r["delay_steps"] is None else r["delay_steps"] for r in runs])))
        if math.isfinite(middle):
            axis.plot([x - 0.15, x + 0.15], [middle, middle], color=ARM_COLORS[arm], lw=2)
    squares = [(x, published[arm]) for x, arm in enumerate(arms) if arm in published]
    if squares:
        axis.plot(*zip(*squares, strict=True), "s", mfc="none", color="black", ms=9, label="published medians")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    rho = next((runs[0]["rho"] for runs in arms.values() if runs[0]["rho"]), None)
    axis.set_xticks(range(len(arms)), arms)
    axis.set(yscale="log", ylabel="T_grok - fork step (steps)",
             title=f"Same state, p={first['p']}, fork at step {first['fork_step']}" + (f", rho {rho:g}" if rho else ""))
    axis.legend(fontsize=7)
    save_figure(figure, folder, file)
    plt.close(figure)


def fork_trajectories(trajectories: list[dict], trunk: str, arms: dict[str, list[dict]], folder: Path, file: str) -> None:
    """Norm and test accuracy of every member: the common free run in black up to the fork, then the arms."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    fork_step = next(iter(arms.values()))[0]["fork_step"]
    for axis, key in zip(axes, ("norm", "test_accuracy"), strict=True):
        for color, cell, label in [("black", trunk, "before the fork"), *((ARM_COLORS[arm], runs[0]["cell"], arm) for arm, runs in arms.items())]:
            mine = [t for t in trajectories if t["cell"] == cell and fork_step / 8 <= t["step"] and (cell != trunk or t["step"] <= fork_step)]
            for i, member in enumerate(dict.fromkeys(t["member"] for t in mine)):
                points = [(t["step"], t[key]) for t in mine if t["member"] == member]
                axis.plot(*zip(*points, strict=True), color=color, ls=ARM_LINES.get(label, "-"), lw=1, alpha=0.8, label=None if i else label)
        axis.axvline(fork_step, color="gray", ls=":", lw=1)
        axis.set(xscale="log", xlabel="step", title=key.replace("_", " "))
    axes[0].legend(fontsize=7)
    save_figure(figure, folder, file)
    plt.close(figure)


def fork_ratio(ratios: list[dict], over: str, other: str, folder: Path, file: str) -> None:
    """Median delay of the raised over the same arm with its interval, against `over`; a line per modulus and value of `other`."""
    figure, axis = plt.subplots(figsize=(5.5, 4.2))
    groups = list(dict.fromkeys((r["p"], r[other]) for r in ratios))
    for i, (p, value) in enumerate(groups):
        mine = sorted((r for r in ratios if (r["p"], r[other]) == (p, value) and r["ours"] is not None), key=lambda r: r[over])
        y = np.array([r["ours"] for r in mine])
        ends = np.array([[r["ours"] if r[end] is None else r[end] for r in mine] for end in ("lo", "hi")])
        axis.errorbar([r[over] for r in mine], y, np.maximum([y - ends[0], ends[1] - y], 0), fmt=MARKERS[i % 8] + LINES[i % 4], ms=4, lw=1, capsize=3,
                      color=f"C{i % 10}", label=f"p={p}, {other.replace('_', ' ')} {value:g}")
    censored = sum(r["ours"] is None for r in ratios)
    axis.set(xlabel=over.replace("_", " "), ylabel="median delay, raised / same",
             title="Raised over same" + (f" ({censored} censored, not shown)" if censored else ""))
    axis.legend(fontsize=7)
    save_figure(figure, folder, file)
    plt.close(figure)
