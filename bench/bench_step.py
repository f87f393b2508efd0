"""Time per run-step of our training step beside its peers and the roofline, in one process, interleaved, after an agreement test.

    python bench/bench_step.py --p 59 97 --runs 12 --out results/bench

Unit: one optimiser step of one network, clamp included, evaluation not. Every contender advances the same R runs from the same state; the
medians and the 10-90% range are over interleaved rounds, so a disturbance of the machine falls on all. step.csv has a row per contender; besides,
on a CPU, of our step on one core and of one evaluation of one run on one core; of the step's matrix products at the rate of the best library at hand
(`roofline`), and at that of the arithmetic units (`fma_peak`). provenance.json has the machine and its load.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lab import early
    early.guard()

import argparse
import ctypes
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import torch
from torch import Tensor

from common import MODELS, Cell, UsageError, n_train
from lab import desk, figures, files, provenance, settings
from lab.ensemble import Ensemble

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from peers import peers

from kernels import build, cpu
from kernels.layout import GROUPS

TARGET, LR, WEIGHT_DECAY = 40.0, 1e-3, 1.0   # any held norm would do: the work is the same


class Ours:
    """The project's step as the trainer drives it: on a CPU one single-threaded worker per core, each walking its share of the runs."""
    name = "ours"

    def __init__(self, p: int, runs: int, dtype: torch.dtype, device: str, arithmetic: str, model: str = "mlp"):
        cell = Cell("bench", p=p, members=tuple(range(runs)), block=runs, budget_steps=10**6, clamp_start=1, lr=LR, weight_decay=WEIGHT_DECAY,
                    model=model, held=((TARGET,),) * runs)
        self.ensemble = Ensemble([cell], device, "auto", dtype, arithmetic)
        self.dtype, self.p, self.runs, self.device = dtype, p, runs, device
        self.backend, self.arithmetic = self.ensemble.backend, arithmetic if device == "cuda" else "ieee"
        if device == "cpu":
            self.ensemble.compile()
            self.pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        else:
            from kernels.cuda import CudaKernels
            e = self.ensemble
            self.kernels = CudaKernels(e.layout, e.loss, dtype, arithmetic,
                                       *(t.to(device) for t in (e.state.params, e.state.moment1, e.state.moment2, e.a, e.b, e.train_mask)))

    def steps(self, k: int) -> None:
        e, every = self.ensemble, np.arange(self.runs)
        scalars = e.scalars(every, k)
        e.step += k
        if self.device == "cuda":
            self.kernels.steps(scalars)
            return
        scalars = scalars.to(self.dtype)

        list(self.pool.map(lambda r: self.one(r, scalars[r]), every))

    @torch.no_grad()
    def one(self, r: int, scalars: Tensor) -> None:
        """Run `r` on a CPU, on one core."""
        e = self.ensemble
        e.kernels.steps(e.state.params[r], e.state.moment1[r], e.state.moment2[r], e.a[r], e.b[r], scalars)

    def weights(self, i: int) -> list[Tensor]:
        row = self.kernels.state.params[i].cpu() if self.device == "cuda" else self.ensemble.state.params[i]
        *whole, last = self.ensemble.layout.views(row)
        if self.ensemble.layout.groups != GROUPS:
            return [*whole, last[:, : self.ensemble.layout.classes]]
        E, W1, W2, b1 = whole
        return [E, W1, W2[:, : self.p], b1, last[: self.p]]


class OneCore:
    """Our step, all runs on one core of a CPU."""
    name = "ours_one_core"

    def __init__(self, ours: Ours):
        self.ours, self.dtype, self.backend, self.arithmetic = ours, ours.dtype, ours.backend, ours.arithmetic

    def steps(self, k: int) -> None:
        scalars = self.ours.ensemble.scalars(np.arange(self.ours.runs), k).to(self.dtype)
        with cpu.single_thread():
            for r in range(self.ours.runs):
                self.ours.one(r, scalars[r])


class Evaluation(OneCore):
    """The evaluation of every run, audit included, on one core of a CPU."""
    name = "evaluation_one_core"

    def steps(self, k: int) -> None:
        with cpu.single_thread(), torch.no_grad():
            for r in range(self.ours.runs * k):
                self.ours.ensemble.measure(r % self.ours.runs)


def stacked(ours: Ours) -> list[Tensor]:
    """`E (R, p, d)`, `W1`, `W2`, `b1 (R, 1, H)`, `b2 (R, 1, p)`, or the nine matrices of a transformer: the common start, for the peers."""
    rows = [ours.weights(i) for i in range(ours.runs)]
    return [torch.stack([torch.atleast_2d(row[j]) for row in rows]).clone() for j in range(len(rows[0]))]


def agreement(contenders: list, ours: Ours) -> float:
    """Largest relative difference of any weight tensor after 3 steps. Adam's first steps divide by |g|, which amplifies rounding of tiny
    gradients to the size of the learning rate for single elements; over a whole tensor 1e-3 of its norm is far above that and far below
    any difference in the recipe (one missing decay step is 1e-3 on its own)."""
    worst = 0.0
    for contender in contenders:
        pairs = zip(ours.weights(ours.runs - 1), contender.weights(ours.runs - 1), strict=True)
        for mine, theirs in (pair for pair in pairs if pair[0].dim() == 2):
            difference = float((mine.double() - theirs.double().cpu().reshape(mine.shape)).norm() / mine.double().norm())
            if not difference < 2e-4:
                raise SystemExit(f"{contender.name} disagrees with ours after 3 steps: {difference:.1e} of a tensor's norm; nothing is timed")
            worst = max(worst, difference)
    return worst


def flops(model: str, p: int, d: int = 128, H: int = 256) -> float:
    """Of the matrix products of one run-step of ours: three over the n pairs and six over the p rows, or those of `kernels/transformer.py`."""
    if model != "mlp":
        c, H, n = p + 1, 512, n_train(p, 0.40)
        pairs, F, rest = (6 * n * d * (H + c), H + d, 0) if model == "transformer_ln" else (6 * n * H * c, H + c, 6 * H * d * c)
        return pairs + rest + 6 * 2 * p * d * (d + F) + 6 * d * d * F
    return 6 * n_train(p, 0.40) * H * p + 12 * p * d * H


def product_rates(device: str) -> dict[str, float]:
    """FLOP/s of square float32 products on all cores by each library at hand: the best of a few sizes and repeats."""
    best: dict[str, float] = {}
    for size in (1024, 1536) if device == "cpu" else (1024, 1536, 2048):
        x = torch.randn(size, size, device=device)
        ways = {"torch": lambda: x @ x}                                                        # noqa: B023
        if device == "cpu":
            ways["numpy"] = lambda: x.numpy() @ x.numpy()                                      # noqa: B023
            if torch.backends.mkldnn.is_available():
                ways["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")   # noqa: B023
        for name, way in ways.items():
            for _ in range(4):
                started = time.perf_counter()
                way()
                if device == "cuda":
                    torch.cuda.synchronize()
                best[name] = max(best.get(name, 0.0), 2 * size**3 / (time.perf_counter() - started))
    return best


@functools.cache
def fma_chains() -> ctypes.CDLL:
    """The compiled `fma_peak.cpp`. Raises build.BuildError."""
    def declared(library: ctypes.CDLL) -> float:
        library.operations.restype, library.chains.restype = ctypes.c_int64, ctypes.c_float
        library.chains.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_float]
        return library.chains(1, 0.5, 1.0)

    library = build.load(Path(__file__).with_name("fma_peak.cpp"), {}, declared, lambda total: "" if total > 0 else "it adds nothing")
    declared(library)
    return library


def fma_peak(pool: ThreadPoolExecutor, cores: int) -> float:
    """FLOP/s of all cores of a CPU when they do nothing but fused multiply-adds in registers: the best of a few repeats."""
    library, rounds, best = fma_chains(), 500_000, 0.0
    for _ in range(4):
        started = time.perf_counter()
        list(pool.map(lambda _: library.chains(rounds, 0.5, 1.0), range(cores)))
        best = max(best, cores * rounds * library.operations() / (time.perf_counter() - started))
    return best


def seconds(contender: object, k: int, device: str) -> float:
    started = time.perf_counter()
    contender.steps(k)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def started(peer: type, start: list[Tensor], e: Ensemble, p: int, device: str) -> object | None:
    """The peer after its first three steps. One that cannot run here (not installed, out of memory, no compiler) is left out, aloud."""
    try:
        rival = peer([w.to(device) for w in start], e.a.to(device), e.b.to(device), p, TARGET, LR, WEIGHT_DECAY)
        rival.steps(3)
    except Exception as error:
        print(f"{peer.name}: LEFT OUT, {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        return None
    return rival


def measure(model: str, p: int, runs: int, rounds: int, device: str, only: list[str] | None) -> list[dict]:
    modes = [(torch.float32, "ieee"), (torch.float64, "ieee")] + ([(torch.float32, "tf32x3")] if device == "cuda" else [])
    ours = [Ours(p, runs, dtype, device, arithmetic, model) for dtype, arithmetic in modes]
    start, e = stacked(ours[0]), ours[0].ensemble
    chosen = [peer for peer in peers(model) if only is None or peer.name in only]
    for contender in ours:
        contender.steps(3)
    rivals = [rival for peer in chosen if (rival := started(peer, start, e, p, device))]
    worst = agreement([*ours[1:], *rivals], ours[0])
    print(f"{model}, p={p}: {len(rivals)} peers agree with ours after 3 steps to {worst:.1e} of a tensor's norm", flush=True)
    alone = [OneCore(ours[0]), Evaluation(ours[0])] if device == "cpu" else []
    contenders = [*ours, *alone, *rivals]
    taken: dict[int, list[float]] = {}
    for contender in contenders:   # enough steps for 0.3 s a visit, chosen once
        one = min(seconds(contender, 1, device) for _ in range(2))
        contender.per_visit = int(np.clip(0.3 / one, 1, 500))
        contender.steps(contender.per_visit)
    rates, peaks = [], []
    for _ in range(rounds):
        for contender in contenders:
            taken.setdefault(id(contender), []).append(1e6 * seconds(contender, contender.per_visit, device) / (contender.per_visit * runs))
        rates.append(product_rates(device))
        if device == "cpu" and ours[0].backend == "compiled":
            peaks.append(fma_peak(ours[0].pool, torch.get_num_threads()))
    base = float(np.median(taken[id(ours[0])]))

    def row(name: str, backend: str, arithmetic: str, dtype: str, samples: list[float]) -> dict:
        middle = float(np.median(samples))
        return {"name": name, "model": model, "device": device, "backend": backend, "arithmetic": arithmetic, "dtype": dtype, "p": p, "runs": runs,
                "us_per_run_step": round(middle, 3), "low": round(float(np.percentile(samples, 10)), 3),
                "high": round(float(np.percentile(samples, 90)), 3), "ratio_to_ours": round(middle / base, 4)}
    rows = [row(o.name, o.backend, o.arithmetic, str(o.dtype).split(".")[1], taken[id(o)]) for o in [*ours, *alone]]
    rows += [row(r.name, "jax" if r.name == "jax_vmap" else "torch", "ieee", "float32", taken[id(r)]) for r in rivals]
    middle = {name: float(np.median([rate[name] for rate in rates])) for name in rates[0]}
    print("products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in middle.items())
          + (f"; peak {np.median(peaks) / 1e9:.0f}" if peaks else "") + f"; of our step {flops(model, p) / base / 1e3:.0f}", flush=True)
    best = max(middle, key=middle.get)
    rows.append(row("roofline", best, "ieee", "float32", [1e6 * flops(model, p) / rate[best] for rate in rates]))
    return rows + ([row("fma_peak", "registers", "ieee", "float32", [1e6 * flops(model, p) / peak for peak in peaks])] if peaks else [])


def sweep(out: Path, device: str, counts: list[int], ps: list[int], rounds: int) -> None:
    """Our step alone over R at the first p and over p at the largest R that fits: sweep.csv, with bytes of state and workspace per run."""
    rows = []
    for p, runs in [(ps[0], runs) for runs in counts] + [(p, min(160, counts[-1])) for p in ps[1:]]:
        ours = Ours(p, runs, torch.float32, device, "ieee")
        ours.steps(25)
        samples = [1e6 * seconds(ours, 25, device) / (25 * runs) for _ in range(rounds)]
        middle, n = float(np.median(samples)), n_train(p, 0.40)
        memory = {"state_bytes_per_run": 3 * ours.ensemble.state.params[0].nbytes}
        if device == "cuda":
            work = sum(tensor.nbytes for tensor in ours.kernels.workspace)
            memory["workspace_bytes_per_run"] = work // runs
        rows.append({"p": p, "runs": runs, "device": device, "us_per_run_step": round(middle, 3), "low": round(float(np.percentile(samples, 10)), 3),
                     "high": round(float(np.percentile(samples, 90)), 3), "us_per_step": round(middle * runs, 1),
                     "ps_per_n_H_p": round(1e6 * middle / (n * 256 * p), 4), **memory})
        files.write_csv(out / "sweep.csv", rows)
        print(f"p={p} R={runs}: {middle:.2f} us per run-step, {rows[-1]['ps_per_n_H_p']:.2f} ps per n H p", flush=True)


def figure(rows: list[dict], folder: Path) -> None:
    ps = sorted({row["p"] for row in rows})
    picture, axes = plt.subplots(1, len(ps), figsize=(6 * len(ps), 3.6), squeeze=False, layout="constrained")
    for axis, p in zip(axes[0], ps, strict=True):
        mine = [row for row in rows if row["p"] == p][::-1]
        modes = ["" if (row["dtype"], row["arithmetic"]) == ("float32", "ieee") else f" {row['dtype']} {row['arithmetic']}" for row in mine]
        labels = [row["name"] + mode for row, mode in zip(mine, modes, strict=True)]
        colors = ["C3" if row["name"].startswith("ours") else "0.75" if row["name"] in ("roofline", "fma_peak") else "C0" for row in mine]
        axis.barh(labels, [row["us_per_run_step"] for row in mine], color=colors, edgecolor="black")
        for i, row in enumerate(mine):
            axis.text(row["us_per_run_step"], i, f" {row['us_per_run_step']:.0f} us, {row['ratio_to_ours']:.2g}x", va="center", fontsize=7)
        axis.set(xscale="log", xlabel="microseconds per run-step", title=f"{mine[0]['model']}, p={p}, {mine[0]['runs']} runs, {mine[0]['device']}")
        axis.set_xlim(right=axis.get_xlim()[1] * 4)
    figures.save_figure(picture, folder, "step")
    plt.close(picture)


def run(argv: list[str]) -> None:
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", choices=tuple(MODELS), default="mlp", help="network; its peers differ")
    parser.add_argument("--p", type=int, nargs="+", default=[59, 97], help="moduli")
    parser.add_argument("--runs", type=int, default=12, help="runs in the ensemble")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved repeats")
    parser.add_argument("--peers", nargs="+", default=None, help="only these peers; default: all that can be imported")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    parser.add_argument("--sweep", action="store_true", help="instead: our step alone over R and over p, with memory per run, to sweep.csv")
    parser.add_argument("--out", default="", help="folder for step.csv and figures; default: results/bench, with the model's name behind it")
    options = parser.parse_args(argv)
    if min(options.p) < 2 or options.runs < 1 or options.rounds < 1:
        raise UsageError("--p must be >= 2, --runs and --rounds >= 1")
    names = [peer.name for peer in peers(options.model)]
    if unknown := set(options.peers or ()) - set(names):
        raise UsageError(f"--peers {' '.join(unknown)}: not here; there are {' '.join(names)}")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu")
    if options.model != "mlp" and options.sweep:
        raise UsageError(f"--sweep is of the MLP; without it --model {options.model} is timed")
    settings.check_size(device, ((options.model, p) for p in options.p))
    torch._dynamo.config.recompile_limit = 256
    out, rows = Path(options.out or provenance.ROOT / "results" / ("bench" if options.model == "mlp" else f"bench_{options.model}")), []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--out {out} is a file; name a folder") from None
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if options.sweep:
        counts = [1, 4, 16, 64, 160, 640, 4096] if device == "cuda" else [1, 2, 4, 12, 48]
        return sweep(out, device, counts, [59, 29, 43, 67, 97, 113], options.rounds)
    compiler = build.version(build.compilers()[0]).splitlines()[0] if build.compilers() else "none"
    origin = {**provenance.origin(), "device": provenance.device_name(device), "cpu": build.cpu_name(), "compiler": compiler,
              "load_before": os.getloadavg()}
    for p in options.p:
        rows += measure(options.model, p, options.runs, options.rounds, device, options.peers)
        files.write_csv(out / "step.csv", rows)
        for row in rows[-sum(r["p"] == p for r in rows):]:
            print(f"p={p} {row['name']:18s} {row['dtype']} {row['arithmetic']:6s} {row['us_per_run_step']:10.1f} us per run-step "
                  f"[{row['low']:.1f}, {row['high']:.1f}]  {row['ratio_to_ours']:.2f}x ours", flush=True)
    figure(rows, out / "figures")
    files.write_json(out / "provenance.json", {**origin, "load_after": os.getloadavg()})
    print(f"results in {out}")
    return None


if __name__ == "__main__":
    desk.main(run)
