"""Figures that several experiments share: every member visible, censored runs as open triangles at their budget, published points beside ours."""
import io
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import CensoredData, ecdf

from lab import answers, files, stats
from lab.answers import Table
from lab.delay import line

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LINES, MARKERS = ("-", "--", ":", "-."), "osD^vPX*"   # series differ in print without colour, too


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """`folder/name.png` and `.pdf`; the figure is closed."""
    files.check_held(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=120, bbox_inches="tight")
        files.write_atomic(folder / f"{name}.{kind}", image.getvalue())
    plt.close(figure)


def steps(axis: matplotlib.axis.Axis) -> None:
    """Ticks of a logarithmic axis of steps: 1, 2 and 5 times powers of ten, as plain numbers."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def middle(values: np.ndarray) -> float:
    """Median with censored runs counted as later; not a number where that is beyond the budget, so that nothing is drawn."""
    found = float(stats.median(values))
    return found if math.isfinite(found) else math.nan


def dots(axis: plt.Axes, x: float, point: dict, color: str, scale: float = 1.0, marker: str = "o", width: float = 0.004, key: str = "T") -> None:
    """Every member of a cell (`Table.point`) at `x`, its times over `scale`: open triangles at the budget where censored; a bar at the median."""
    offsets = np.linspace(-width, width, len(point[key])) if len(point[key]) > 1 else [0]
    for offset, t in zip(offsets, point[key], strict=True):
        crossed = math.isfinite(t)
        axis.plot(x + offset, (t if crossed else point["budget_steps"]) / scale, marker if crossed else "^", color=color,
                  mfc=color if crossed else "none", ms=3.5, alpha=0.6)
    axis.plot([x - 2.5 * width, x + 2.5 * width], [middle(point[key]) / scale] * 2, color=color, lw=2)


def squares(axis: plt.Axes, points: Iterable[tuple[float, float | None]], color: str = "black") -> None:
    """Published values; `legend` has a line for them."""
    points = [(x, y) for x, y in points if y is not None]
    if points:
        axis.plot(*zip(*points, strict=True), "s", mfc="none", mec=color, mew=1.5, ms=8, label="_published")


def legend(axis: plt.Axes, **where: object) -> None:
    """A legend that explains the marks of `dots` and `squares` too."""
    if any(drawn.get_label() == "_published" for drawn in axis.lines):
        axis.plot([], [], "s", mfc="none", color="gray", mew=1.5, label="published median")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    axis.legend(fontsize=7, **where)


def dose(table: Table, cells: list[str], fitted: dict[int, list[str]], known: dict[str, dict], title: str, folder: Path, file: str) -> None:
    """T_grok against rho on a log axis, a colour and a line style per modulus: the line through its `fitted` cells, of three doses or more;
    rows `known` published between our doses as squares; the free control as a dotted line."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for i, p in enumerate(dict.fromkeys(table.first[cell]["p"] for cell in cells)):
        mine, label = {table.first[cell]["rho"]: cell for cell in cells if table.first[cell]["p"] == p}, f"p={p}"
        for rho, cell in mine.items():
            dots(axis, rho, table.point(cell), f"C{i}")
        if len(doses := fitted.get(p, ())) >= 3:
            fit, n = line(table, doses), table.count(tuple(doses))[0]
            slope, intercept, _ = (float(value[0]) for value in fit(np.arange(n)[None]))
            _, lo, hi = stats.resampled(n, lambda picks, fit=fit: fit(picks)[0])
            x = np.array([table.first[doses[0]]["rho"], table.first[doses[-1]]["rho"]])
            axis.plot(x, np.exp(intercept + slope * x), color=f"C{i}", ls=LINES[i % 4], lw=1)
            label += f": alpha {slope:.2f} [{lo:.2f}, {hi:.2f}]"
        axis.plot([], [], color=f"C{i}", ls=LINES[i % 4] if doses else "-", label=label)
        at_p = {row["rho"]: row["value"] for row in known.values() if row["p"] == p and row["rho"]}
        squares(axis, [(rho, value) for rho, value in at_p.items() if min(mine) <= rho <= max(mine)], f"C{i}")
        if control := table.control(mine[min(mine)]):
            axis.axhline(middle(table.grok[control]), color=f"C{i}", ls=(0, (1, 4)), lw=1)
    once = table.first[cells[0]]["arm"] == "rescale"
    axis.set(yscale="log", xlabel="norm after one rescale / critical norm, rho" if once else "held norm / critical norm, rho",
             ylabel="T_grok (steps)", title=title)
    steps(axis.yaxis)
    axis.plot([], [], color="gray", ls=(0, (1, 4)), lw=1, label="free control, median")
    legend(axis)
    save_figure(figure, folder, file)


def critical_norm(table: Table, folder: Path, group: str = "") -> None:
    """Total norm at own T_grok of free runs, or that of a group: cell by cell, and against p where there are several. Published W_c as squares."""
    column, statistic = (f"norm_{group}_at_grok", f"W_c_{group}") if group else ("norm_at_grok", "W_c")
    norms = {cell: table.values((cell,), column)[0] for cell in table.pick(arm="free")}
    norms = {cell: values[np.isfinite(values)] for cell, values in norms.items() if np.isfinite(values).any()}
    if not norms:
        return
    known = {table.match(row): row["value"] for row in answers.published().values() if row["statistic"] == statistic}
    plain = [cell for cell in norms if (table.first[cell]["weight_decay"], table.first[cell]["train_frac"]) == (1, 0.40)]
    moduli = sorted({table.first[cell]["p"] for cell in plain})
    figure, axes = plt.subplots(1, 1 + (len(moduli) > 1), figsize=(5.2 * (1 + (len(moduli) > 1)), 4.2), squeeze=False)
    for x, values in enumerate(norms.values()):
        axes[0, 0].plot([x] * len(values), values, ".", color="C0", alpha=0.5, label="" if x else "ours, every member")
        axes[0, 0].plot(x, np.median(values), "_", color="black", ms=14, label="" if x else "our median")
    places = {cell: x for x, cell in enumerate(norms)}
    axes[0, 0].set_xticks(range(len(norms)), norms, rotation=90, fontsize=6)
    axes[0, 0].set(ylabel=f"{group} norm at T_grok, free".strip(), title="Norm at grokking", xlim=(-0.6, len(norms) - 0.4))
    squares(axes[0, 0], [(places[cell], value) for cell, value in known.items() if cell in places])
    if len(moduli) > 1:
        for cell in plain:
            axes[0, 1].plot([table.first[cell]["p"]] * len(norms[cell]), norms[cell], ".", color="C0", alpha=0.5)
        squares(axes[0, 1], [(table.first[cell]["p"], known.get(cell)) for cell in plain])
        axes[0, 1].set(xlabel="p", title="Over p")
        axes[0, 1].set_xticks(moduli)
    if set(known) & set(norms):
        axes[0, 0].plot([], [], "s", mfc="none", color="black", label="published W_c")
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, folder, f"critical_norm_{group}" if group else "critical_norm")


def contraction(rows: list[dict], folder: Path) -> None:
    """Delay of free runs against the logarithm that the squared norm V fell through, from T_mem and from its peak. `rows` of contraction.csv."""
    figure, axis = plt.subplots(figsize=(5.5, 4.2))
    for i, cell in enumerate(dict.fromkeys(row["cell"] for row in rows)):
        mine = [row for row in rows if row["cell"] == cell]
        late = [row["delay_steps"] for row in mine]
        axis.plot([row["ln_v_peak_ratio"] for row in mine], late, MARKERS[i % 5], color=f"C{i % 10}", alpha=0.7, label=cell if i < 10 else None)
        axis.plot([row["ln_v_ratio"] for row in mine], late, "x", color=f"C{i % 10}", alpha=0.7)
    axis.plot([], [], "o", color="gray", label="V at its peak")
    axis.plot([], [], "x", color="gray", label="V at T_mem")
    axis.set(xlabel="ln(V / V_grok), V = squared norm", ylabel="T_grok - T_mem (steps)", title="Free contraction")
    axis.legend(fontsize=6)
    save_figure(figure, folder, "contraction")


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
