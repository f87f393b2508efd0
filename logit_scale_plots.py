"""Figures of paper B: mediation, memorisation, collapse, dose, audit, allocation. Every member visible, censored runs as open triangles
at their budget, published points as open black squares; series differ by marker or line as well as by colour."""
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import plots
import stats

MARKERS = "osD^vP"


def members(axis: plt.Axes, x: float, point: dict, color: str, scale: float = 1.0, marker: str = "o", width: float = 0.004) -> None:
    """Every member of a cell at `x`, T over `scale`; a bar at the median."""
    for i, t in enumerate(point["T"]):
        offset = width * (2 * i / (len(point["T"]) - 1) - 1) if len(point["T"]) > 1 else 0
        grokked = math.isfinite(t)
        axis.plot(x + offset, (t if grokked else point["budget_steps"]) / scale, marker if grokked else "^", color=color,
                  mfc=color if grokked else "none", ms=3.5, alpha=0.6)
    middle = float(stats.median(point["T"]))
    if math.isfinite(middle):
        axis.plot([x - 2.5 * width, x + 2.5 * width], [middle / scale] * 2, color=color, lw=2)


def squares(axis: plt.Axes, points: list[tuple[float, float | None]], label: str = "published medians") -> None:
    points = [(x, y) for x, y in points if y is not None]
    if points:
        axis.plot(*zip(*points, strict=True), "s", mfc="none", color="black", mew=1.3, ms=9, label=label)


def value(known: dict[str, dict], key: str) -> float | None:
    return known.get(key, {}).get("value")


def save(figure: plt.Figure, folder: Path, file: str) -> None:
    plots.save_figure(figure, folder, file)
    plt.close(figure)


def cell_key(point: dict) -> str:
    if point["model"] != "mlp":
        return f"B.tf.rho{point['rho']:.2f}.tau{point['tau']:.2f}"
    return f"B.cell.{point['loss']}.p{point['p']}.rho{point['rho']:.2f}.tau{point['tau']:.2f}"


@plots.drawn
def mediation(panels: dict[str, list[dict]], known: dict[str, dict], folder: Path, file: str) -> None:
    """Per loss: T_grok and L over tau at the raised norm, each over its baseline (first point), as in the paper."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), squeeze=False)
    for axis, (loss, (base, *sweep)) in zip(axes[0], panels.items(), strict=True):
        T0, L0 = float(stats.median(base["T"])), base["logit_scale"]
        if not math.isfinite(T0):
            axis.set_title(f"{loss}: half of the baseline is censored")
            continue
        sweep = sorted(sweep, key=lambda c: c["tau"])
        for point in sweep:
            members(axis, point["tau"], point, "C3", T0, width=0.008)
        axis.plot([], [], "o", color="C3", label="T_grok / baseline, every member; bar: median")
        axis.plot([c["tau"] for c in sweep], [c["logit_scale"] / L0 for c in sweep], "D--", color="C0", mfc="none", label="logit scale / baseline")
        base_T, base_L = value(known, cell_key(base) + ".T_grok"), value(known, cell_key(base) + ".L")
        if base_T:
            squares(axis, [(c["tau"], (v := value(known, cell_key(c) + ".T_grok")) and v / base_T) for c in sweep])
            published = [(c["tau"], v / base_L) for c in sweep if (v := value(known, cell_key(c) + ".L"))]
            if published:
                axis.plot(*zip(*published, strict=True), "x", color="black", label="published logit scale")
        axis.axhline(1, color="gray", lw=0.8, ls=":")
        axis.set(yscale="log", xlabel="temperature tau", ylabel="over the baseline (rho 1, tau 1)",
                 title=f"{base['model']}, {loss}, p={base['p']}, rho {sweep[0]['rho']:g}, {len(base['T'])} members")
        axis.set_yticks([t for t in (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 10, 15, 20) if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]])
        axis.get_yaxis().set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.legend(fontsize=7)
    save(figure, folder, file)


@plots.drawn
def memorisation(panels: dict[str, list[dict]], known: dict[str, dict], folder: Path, file: str) -> None:
    """T_mem and T_grok over tau at the raised norm: temperature moves the delay, not memorisation."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    for axis, (loss, (_, *sweep)) in zip(axes[0], panels.items(), strict=True):
        for point in sweep:
            members(axis, point["tau"], point, "C3", width=0.008)
            members(axis, point["tau"], {**point, "T": point["T_mem"]}, "C2", marker="D", width=0.008)
        squares(axis, [(c["tau"], value(known, f"{cell_key(c)}.{t}")) for c in sweep for t in ("T_grok", "T_mem")])
        axis.plot([], [], "o", color="C3", label="T_grok")
        axis.plot([], [], "D", color="C2", label="T_mem")
        axis.set(yscale="log", xlabel="temperature tau", ylabel="steps",
                 title=f"{sweep[0]['model']}, {loss}, p={sweep[0]['p']}, rho {sweep[0]['rho']:g}")
        axis.legend(fontsize=7)
    save(figure, folder, file)


@plots.drawn
def collapse(grid: list[dict], known: dict[str, dict], folder: Path, file: str) -> None:
    """Median T_grok over the logit scale, one colour and marker per rho: one curve if the logit scale is all that counts."""
    figure, axis = plt.subplots(figsize=(5.6, 4.4))
    for i, rho in enumerate(dict.fromkeys(c["rho"] for c in grid)):
        mine = [c for c in grid if c["rho"] == rho]
        axis.plot([c["logit_scale"] for c in mine], [stats.median(c["T"]) for c in mine], MARKERS[i % len(MARKERS)], color=f"C{i}", ms=7,
                  label=f"rho {rho:g}")
        for c in mine:
            low, high = stats.resampled(len(c["T"]), lambda picks, c=c: stats.median(c["T"][picks]))[1:]
            axis.plot([c["logit_scale"]] * 2, [low, high], color=f"C{i}", lw=1)
    key = lambda c: f"B.grid.p{c['p']}.rho{c['rho']:.2f}.tau{c['tau']:.2f}"  # noqa: E731
    squares(axis, [(value(known, key(c) + ".L"), value(known, key(c) + ".T_grok")) for c in grid if value(known, key(c) + ".L")], "published")
    axis.set(yscale="log", xlabel="effective logit scale L at grokking", ylabel="median T_grok (steps), 95% interval",
             title=f"Collapse, p={grid[0]['p']}")
    axis.legend(fontsize=7)
    save(figure, folder, file)


@plots.drawn
def dose(cells: list[dict], fitted: list[dict], free: list[dict], known: dict[str, dict], folder: Path, file: str) -> None:
    """T_grok over the held norm with the exponential fit, ours and published, the collapse rate above it, and the free runs' frontier."""
    figure, (rate, axis) = plt.subplots(2, 1, figsize=(6, 5.6), sharex=True, gridspec_kw={"height_ratios": [1, 3]})
    p = cells[0]["p"]
    for point in cells:
        members(axis, point["held_norm"], point, "C0", width=0.25)
    if len(fitted) >= 2:
        W = np.array([c["held_norm"] for c in fitted])
        slope, intercept, r2 = (float(v) for v in stats.line(W, np.log([stats.median(c["T"]) for c in fitted])))
        axis.plot(W, np.exp(intercept + slope * W), color="C0", lw=1, label=f"ours: slope {slope:.3f}, R2 {r2:.3f}, {len(W)} cells")
        if (theirs := value(known, f"B.dose.alpha.p{p}")) is not None:
            middle = W.mean()
            axis.plot(W, np.exp(intercept + slope * middle + theirs * (W - middle)), color="black", ls="--", lw=1,
                      label=f"published slope {theirs:g}")
    for i, wd in enumerate(dict.fromkeys(r["weight_decay"] for r in free)):
        mine = [(r["norm_at_grok"], r["t_grok_step"]) for r in free if r["weight_decay"] == wd and r["t_grok_step"] is not None]
        if mine:
            axis.plot(*zip(*mine, strict=True), MARKERS[i % len(MARKERS)], mfc="none", color="C1", ms=5, label=f"free, weight decay {wd:g}")
    rate.plot([c["held_norm"] for c in cells], [c["collapse32"] for c in cells], "o-", color="C3", ms=4)
    rate.axhline(0.05, color="gray", ls=":", lw=1)
    rate.set(ylabel="collapse, float32", title=f"Dose, p={p}")
    axis.set(yscale="log", xlabel="held norm ||W|| (free runs: norm at T_grok)", ylabel="T_grok (steps)")
    axis.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    axis.legend(fontsize=6)
    save(figure, folder, file)


@plots.drawn
def audit(pairs: list[list[dict]], known: dict[str, dict], folder: Path, file: str) -> None:
    """T_grok and collapse rate in working precision, trained in float32 and float64, cell by cell."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    for x, pair in enumerate(pairs):
        for point in pair:
            bits = int(point["dtype"][-2:])
            color, marker, at = ("C0", "o", x - 0.12) if bits == 32 else ("C1", "D", x + 0.12)
            members(left, at, point, color, marker=marker, width=0.03)
            right.plot(at, point[f"collapse{bits}"], marker, color=color, ms=8)
            key = f"B.audit.{point['rho']:.2f}." if (point["p"], point["tau"]) == (59, 1) else ""
            squares(left, [(at, value(known, f"{key}T{bits}"))], "")
            squares(right, [(at, value(known, f"{key}sc{bits}"))], "")
    right.axhline(0.05, color="gray", ls=":", lw=1, label="float32-confounded from here")
    for axis in (left, right):
        axis.set(xlim=(-0.5, len(pairs) - 0.5))
        axis.set_xticks(range(len(pairs)), [f"rho {p[0]['rho']:g}" + (f", tau {p[0]['tau']:g}" if p[0]["tau"] != 1 else "") for p in pairs])
        axis.plot([], [], "o", color="C0", label="trained in float32")
        axis.plot([], [], "D", color="C1", label="trained in float64")
        axis.plot([], [], "s", mfc="none", color="black", label="published")
    left.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    left.set(yscale="log", ylabel="T_grok (steps)", title=f"Audit, p={pairs[0][0]['p']}")
    right.set(ylabel="share of training pairs in softmax collapse", title="Collapse in working precision, at the median T_grok", ylim=(-0.03, 1))
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    save(figure, folder, file)


@plots.drawn
def allocation(cells: list[dict], known: dict[str, dict], folder: Path, file: str) -> None:
    """T_grok and logit scale over gamma at fixed total norm."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    for point in cells:
        members(left, point["gamma"], point, "C0", width=0.015)
    key = lambda c: f"B.alloc.p{c['p']}.g{c['gamma']:+.1f}"  # noqa: E731
    squares(left, [(c["gamma"], value(known, key(c) + ".T_grok")) for c in cells])
    right.plot([c["gamma"] for c in cells], [c["logit_scale"] for c in cells], "D--", color="C0", mfc="none", label="ours")
    squares(right, [(c["gamma"], value(known, key(c) + ".L")) for c in cells], "published")
    left.plot([], [], "^", mfc="none", color="gray", label="censored, at its budget")
    left.set(yscale="log", xlabel="gamma: power moved from E to W2", ylabel="T_grok (steps)",
             title=f"Allocation at fixed total norm, p={cells[0]['p']}")
    right.set(xlabel="gamma", ylabel="effective logit scale L", ylim=(0, 1.1 * right.get_ylim()[1]), title="Logit scale at grokking")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    save(figure, folder, file)
