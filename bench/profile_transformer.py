"""Where the time of a transformer's step goes on one core of a CPU: its matrix products, and the loops that Inductor makes of the rest.

    python bench/profile_transformer.py --p 59

profile.csv has a row per operation: calls in a step, milliseconds of all of them, share of the step. A call's time is its least over the steps, so
that other work on the machine counts for little. Products are bound by the arithmetic units, whose peak is measured beside them. The loops over
the pairs, named after what they hold, are not: forward and back they read, and back they add to, tables of 4 heads x 2p rows of H + p_pad numbers,
1.1 MB each at p=59, more than an L2 cache holds.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lab import early
    early.guard()

import argparse
import functools
import os
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "6")     # torch's profiler tells of each start and stop; it looks here when torch is imported

import numpy as np
import torch
from bench_step import flops, fma_chains
from torch.profiler import ProfilerActivity, profile

from common import Cell, UsageError
from kernels import build, cpu
from kernels.step import train_step_ref
from lab import desk, files, provenance, settings
from lab.ensemble import Ensemble

SHOWN = 0.002       # of a step's time: operations below have no row


def peak() -> float:
    """FLOP/s of one core, the best of a few repeats."""
    library, rounds, best = fma_chains(), 500_000, 0.0
    for _ in range(20):
        started = time.thread_time()
        library.chains(rounds, 0.5, 1.0)
        best = max(best, rounds * library.operations() / (time.thread_time() - started))
    return best


def calls(step: functools.partial) -> list[tuple[str, float]]:
    """What one step does in its order: names and microseconds."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return [(event.name, event.self_cpu_time_total) for event in sorted(profiler.events(), key=lambda event: event.time_range.start)]


def run(argv: list[str]) -> None:
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", choices=("transformer", "transformer_ln", "transformer_b"), default="transformer", help="network")
    parser.add_argument("--p", type=int, default=59, help="modulus")
    parser.add_argument("--steps", type=int, default=100, help="steps to take the least times of")
    parser.add_argument("--out", default="", help="folder for profile.csv; default: results/bench_ with the model's name behind it")
    options = parser.parse_args(argv)
    if options.p < 2 or options.steps < 1:
        raise UsageError("--p must be >= 2, --steps >= 1")
    if not cpu.has_compiler():
        raise UsageError("no C++ compiler on the PATH: the step runs by its definition here, and there is nothing to profile")
    cell = Cell("profile", p=options.p, members=(0,), budget_steps=10**6, lr=1e-3, weight_decay=1.0, model=options.model)
    e = Ensemble([cell], "cpu", "eager", torch.float32, "ieee")
    arguments = [t[0] for t in (e.state.params, e.state.moment1, e.state.moment2, e.a, e.b)] + [e.scalars(np.array([0]), 1)[0, 0].float()]
    cpu.COMPILE_OPTIONS["cpp.enable_kernel_profile"] = True
    cpu.keep_freed_memory()
    origin = {**provenance.origin(), "device": provenance.device_name("cpu"), "cpu": build.cpu_name(), "load_before": os.getloadavg()}
    step = functools.partial(cpu.compile_for(functools.partial(train_step_ref, layout=e.layout, loss="ce"), *arguments), *arguments)
    with cpu.single_thread(), torch.no_grad():
        names = [name for name, _ in calls(step)]
        taken = [calls(step) for _ in range(options.steps)]
    same = [times for times in taken if [name for name, _ in times] == names]
    least = np.array([[microseconds for _, microseconds in times] for times in same]).min(0) / 1e3      # (calls,)
    by_name = {name: least[[other == name for other in names]] for name in names}
    total, products = least.sum(), sum(times.sum() for name, times in by_name.items() if name.endswith("mm_out"))
    table = [{"model": options.model, "p": options.p, "operation": name, "calls": len(times), "ms": round(times.sum(), 4),
              "share": round(times.sum() / total, 4)} for name, times in by_name.items() if times.sum() > SHOWN * total]
    table.sort(key=lambda row: -row["ms"])
    out = Path(options.out or provenance.ROOT / "results" / f"bench_{options.model}")
    out.mkdir(parents=True, exist_ok=True)
    files.write_csv(out / "profile.csv", table)
    for row in table:
        print(f"{row['ms']:8.3f} ms {row['share']:6.1%} {row['calls']:3d} x {row['operation']}")
    ceiling, work = peak(), flops(options.model, options.p)
    summary = {"ms_of_a_step": total, "ms_of_products": products, "mflop_of_products": work / 1e6, "gflops_of_products": work / products / 1e6,
               "peak_gflops": ceiling / 1e9, "ms_of_products_at_the_peak": 1e3 * work / ceiling, "ms_of_the_rest": total - products}
    files.write_json(out / "profile.json", {**origin, "load_after": os.getloadavg(), **{name: round(float(x), 3) for name, x in summary.items()}})
    print(", ".join(f"{name} {x:.3g}" for name, x in summary.items()))
    print(f"results in {out}")


if __name__ == "__main__":
    desk.main(run)
