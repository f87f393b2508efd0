"""Figures that several experiments share: every member visible, censored runs as open triangles at their budget, published points beside ours."""
import functools
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np

from common import UsageError, exactly
from lab import files, stats
from lab.answers import Table
from lab.delay import line

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

matplotlib.rcdefaults()   # a matplotlibrc of this machine would change the figures of record, or ask for a TeX that is not there
FORGIVEN: type[Exception] | tuple = Exception   # what a figure may fail by; the tests forgive nothing
LINES, MARKERS = ("-", "--", ":", "-."), "osD^vPX*"   # series differ in print without colour, too


def drawn(figure: Callable[..., None]) -> Callable[..., None]:
    """`figure`, whose failure costs a line and not the command: tables and verdicts are written and printed before. Of a folder that was taken
    away all the same UsageError is raised."""
    @functools.wraps(figure)
    def attempt(*args: object, **named: object) -> None:
        try:
            figure(*args, **named)
        except UsageError:
            raise
        except FORGIVEN as error:
            plt.close("all")
            what = " ".join([figure.__name__.replace("_", " "), *(word for word in args if isinstance(word, str))])
            print(f"a figure, {what}, is not drawn ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                  "the tables are whole", flush=True)
    return attempt


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


@drawn
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


def squares(axis: plt.Axes, pairs: Iterable[tuple[float | None, float | None]], label: str = "published medians", marker: str = "s",
            color: str = "black") -> None:
    """Published points: of `pairs` those that have both numbers."""
    pairs = [pair for pair in pairs if None not in pair]
    if pairs:
        seen = label in axis.get_legend_handles_labels()[1]
        axis.plot(*zip(*pairs, strict=True), marker, mfc="none", color=color, mew=1.3, ms=9 if marker == "s" else 6, label=None if seen else label)


def members(axis: plt.Axes, points: list[dict], x: str, color: str = "C0", marker: str = "o", what: str = "T",
            label: str = "every member; bar: median", over: dict | None = None, width: float = 0.0, published: str = "black") -> None:
    """Every member of each cell at its `x`, markers where it grokked and open triangles at the budget where it did not; a bar at the median;
    published medians. `what`: T, T_grok, or T_mem. `over`: the cell whose median is 1. `width` of a cell, and colour of what is published."""
    known, one = "T_grok" if what == "T" else what, float(stats.median(over[what])) if over else 1.0
    width = width or 0.012 * (max(point[x] for point in points) - min(point[x] for point in points)) or 0.03
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
    squares(axis, [(point[x], y / theirs) for point in points if theirs and (y := point["published"].get(known))], color=published)
    axis.set(yscale="log", ylabel=f"{known} (steps)")
    steps(axis.yaxis, (1, 1.5, 2, 3, 5, 7) if over else (1, 2, 5))


def values(axis: plt.Axes, points: list[dict], x: str, what: str, known: str, style: str = "D--", color: str = "C0", label: str = "",
           over: dict | None = None, published: str = "s") -> None:
    """`what` of each cell at its `x`, and the published statistic `known` by the marker `published`. `over`: the cell whose value is 1."""
    one = over[what] if over else 1
    axis.plot([point[x] for point in points], [point[what] / one for point in points], style, color=color, mfc="none", label=label)
    theirs = over["published"].get(known) if over else 1.0
    squares(axis, [(point[x], y / theirs) for point in points if theirs and (y := point["published"].get(known)) is not None], "published", published)


@drawn
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


def over_logit_scale(axis: plt.Axes, what: str, table: Table, points: list[dict]) -> None:
    """Median T_grok over the logit scale, one colour and marker per rho: one curve if the logit scale is all that counts."""
    for i, rho in enumerate(dict.fromkeys(point["rho"] for point in points)):
        mine = [point for point in points if point["rho"] == rho]
        L = [point["logit_scale"] for point in mine]
        axis.plot(L, [point["median"] for point in mine], MARKERS[i % 8], color=f"C{i}", ms=7, label=f"rho {rho:g}")
        axis.vlines(L, [point["lo"] for point in mine], [point["hi"] for point in mine], color=f"C{i}", lw=1)
    squares(axis, [(point["published"].get("L"), point["published"].get("T_grok")) for point in points])
    axis.set(yscale="log", xlabel="effective logit scale L at grokking", ylabel=f"median {what} (steps), 95% interval",
             title=f"Collapse, p={points[0]['p']}")
    steps(axis.yaxis)


def precisions(axis: plt.Axes, what: str, table: Table, points: list[dict], confounded: float) -> None:
    """T_grok, or the collapse rate in working precision, trained in float32 and in float64, dose by dose."""
    doses = list(dict.fromkeys((point["rho"], point["tau"]) for point in points))
    for bits, color, marker, offset in ((32, "C0", "o", -0.12), (64, "C1", "D", 0.12)):
        mine = [{**point, "x": doses.index((point["rho"], point["tau"])) + offset} for point in points if point["dtype"] == f"float{bits}"]
        if mine and what == "T_grok":
            members(axis, mine, "x", color, marker, label=f"trained in float{bits}")
        elif mine:
            values(axis, mine, "x", f"collapse{bits}", f"collapse{bits}_max", marker, color, f"trained in float{bits}")
    axis.set_xticks(range(len(doses)), [f"rho {rho:g}" + (f", tau {tau:g}" if tau != 1 else "") for rho, tau in doses])
    axis.set(xlim=(-0.5, len(doses) - 0.5), title=f"Audit, p={points[0]['p']}")
    if what == "collapse":
        axis.axhline(confounded, color="gray", ls=":", lw=1, label="float32-confounded from here")
        axis.set(ylabel="share of training pairs in softmax collapse", ylim=(-0.03, 1))


def over_split(axis: plt.Axes, what: str, table: Table, points: list[dict]) -> None:
    """T_grok, or the logit scale, over gamma at fixed total norm."""
    axis.set(xlabel="gamma: power moved from E to W2", title=f"Allocation at fixed total norm, p={points[0]['p']}")
    if what == "T_grok":
        return members(axis, points, "gamma")
    values(axis, points, "gamma", "logit_scale", "L", label="effective logit scale")
    return axis.set(ylabel="effective logit scale L at grokking", ylim=(0, 1.1 * axis.get_ylim()[1]))


def fork_ratio(axis: plt.Axes, over: str, ratios: list[dict], other: str) -> None:
    """Median delay of the raised over the same arm with its interval, against `over`; a line per modulus and value of `other`."""
    for i, (p, value) in enumerate(dict.fromkeys((row["p"], row[other]) for row in ratios)):
        mine = sorted((row for row in ratios if (row["p"], row[other]) == (p, value)), key=lambda row: row[over])
        x, y, lo, hi = np.array([[row[key] for key in (over, "ours", "lo", "hi")] for row in mine], dtype=float).T   # None -> not a number
        axis.errorbar(x, y, np.maximum([y - lo, hi - y], 0), fmt=MARKERS[i % 8] + LINES[i % 4],
                      ms=4, lw=1, capsize=3, color=f"C{i % 10}", label=f"p={p}, {other.replace('_', ' ')} {exactly(float(value), 'g')}")
    censored = sum(row["ours"] is None for row in ratios)
    title = f"Raised over same ({censored} censored, not shown)" if censored else "Raised over same"
    axis.set(xlabel=over.replace("_", " "), ylabel="median delay, raised / same", title=title)


@drawn
def dose(table: Table, cells: list[str], fitted: Iterable[str], published: Iterable[dict], title: str, folder: Path, file: str) -> None:
    """T_grok against rho, a colour, marker and line style per modulus: the line through the `fitted` cells, of three doses or more, `published`
    medians as squares, the free control as a dotted line."""
    found, fitted = points(table, published), set(fitted)

    def draw(axis: plt.Axes, cells: list[str]) -> None:
        for i, p in enumerate(dict.fromkeys(found[cell]["p"] for cell in cells)):
            mine, label = [cell for cell in cells if found[cell]["p"] == p], f"p={p}"
            if len(doses := [cell for cell in mine if cell in fitted]) >= 3:
                fit, n = line(table, doses), len(table.grok[doses[0]])
                slope, intercept, _ = (float(value[0]) for value in fit(np.arange(n)[None]))
                _, lo, hi = stats.resampled(n, lambda picks, fit=fit: fit(picks)[0])
                x = np.array([found[doses[0]]["rho"], found[doses[-1]]["rho"]])
                axis.plot(x, np.exp(intercept + slope * x), color=f"C{i}", ls=LINES[i % 4], lw=1)
                label += f": alpha {slope:.2f} [{lo:.2f}, {hi:.2f}]"
            members(axis, [found[cell] for cell in mine], "rho", f"C{i}", MARKERS[i % 8], label=label, published=f"C{i}")
            if (control := table.control(mine[0])) and math.isfinite(found[control]["median"]):
                axis.axhline(found[control]["median"], color=f"C{i}", ls=(0, (1, 4)), lw=1)
        axis.plot([], [], color="gray", ls=(0, (1, 4)), lw=1, label="free control, median")
        once = found[cells[0]]["arm"] == "rescale"
        axis.set(xlabel=f"{'norm after one rescale' if once else 'held norm'} / critical norm, rho", title=title)
    sheet(folder, file, [cells], draw)


@drawn
def critical_norm(table: Table, published: Iterable[dict], folder: Path, group: str = "") -> None:
    """Total norm at own T_grok of free runs, or that of a group: cell by cell, and against p where there are several; `published` as squares."""
    statistic, found = f"W_c_{group}" if group else "W_c", points(table, published)
    norms = {cell: table.values((cell,), f"norm_{group}_at_grok" if group else "norm_at_grok")[0] for cell in table.pick(arm="free")}
    norms = {cell: values[np.isfinite(values)] for cell, values in norms.items() if np.isfinite(values).any()}
    plain = [cell for cell in norms if (found[cell]["weight_decay"], found[cell]["train_frac"]) == (1, 0.40)]
    over_p = {cell: found[cell]["p"] for cell in plain}
    panels = [{cell: x for x, cell in enumerate(norms)}, *([over_p] if len(set(over_p.values())) > 1 else [])]

    def draw(axis: plt.Axes, places: dict[str, float]) -> None:
        for i, (cell, x) in enumerate(places.items()):
            axis.plot([x] * len(norms[cell]), norms[cell], ".", color="C0", alpha=0.5, label="" if i else "ours, every member")
            axis.plot(x, np.median(norms[cell]), "_", color="black", ms=14, label="" if i else "our median")
        squares(axis, [(x, found[cell]["published"].get(statistic)) for cell, x in places.items()], "published")
        axis.set(ylabel=f"{group} norm at T_grok, free".strip(), title="Norm at grokking")
        if places is over_p:
            axis.set(xlabel="p", ylabel="", title="Over p")
            axis.set_xticks(sorted(set(places.values())))
        else:
            axis.set(xlim=(-0.6, len(places) - 0.4))
            axis.set_xticks(range(len(places)), places, rotation=90, fontsize=6)
    if norms:
        sheet(folder, f"critical_norm_{group}" if group else "critical_norm", panels, draw)


@drawn
def contraction(rows: list[dict], folder: Path) -> None:
    """Delay of free runs against the logarithm that the squared norm V fell through, from T_mem and from its peak. `rows` of contraction.csv."""
    def draw(axis: plt.Axes, rows: list[dict]) -> None:
        for i, cell in enumerate(dict.fromkeys(row["cell"] for row in rows)):
            mine = [row for row in rows if row["cell"] == cell]
            late = [row["delay_steps"] for row in mine]
            axis.plot([row["ln_v_peak_ratio"] for row in mine], late, MARKERS[i % 5], color=f"C{i % 10}", alpha=0.7, label=cell if i < 10 else None)
            axis.plot([row["ln_v_ratio"] for row in mine], late, "x", color=f"C{i % 10}", alpha=0.7)
        axis.plot([], [], "o", color="gray", label="V at its peak")
        axis.plot([], [], "x", color="gray", label="V at T_mem")
        axis.set(xlabel="ln(V / V_grok), V = squared norm", ylabel="T_grok - T_mem (steps)", title="Free contraction")
    if rows:
        sheet(folder, "contraction", [rows], draw)


@drawn
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


@drawn
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


@drawn
def survival(runs: list[dict], name: str, folder: Path) -> None:
    """Kaplan-Meier curves of T_grok at p=59, tau 1, one line per held norm; censored runs leave at their budget."""
    from scipy.stats import CensoredData, ecdf  # a second's import, and the report alone draws this

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
