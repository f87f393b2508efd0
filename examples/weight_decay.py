"""An experiment in thirty lines: does weight decay move the critical norm, and the delay at norms held relative to it? Minutes on 2 cores.

    python examples/weight_decay.py
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Cell, train
from lab import stats

DECAYS, RHOS = (0.5, 1.0, 2.0), (0.90, 1.00, 1.10)


def main(backend: str = "auto", **same: object) -> None:
    same = {"p": 59, "members": range(4), "lr": 4e-3, **same}
    free = [Cell(weight_decay=decay, **same) for decay in DECAYS]
    norms = stats.critical_norms(train(free, backend=backend).runs)          # W_c by cell: median norm at each network's own T_grok
    for control in free:
        if control.name not in norms:
            print(f"{control.name}: no network grokked in {control.budget_steps} steps")
            continue
        held = [Cell(weight_decay=control.weight_decay, rho=rho, w_c=norms[control.name], **same) for rho in RHOS]
        runs = train(held, backend=backend).runs
        grok = [np.array([*stats.times(runs, cell.name).values()]) for cell in held]      # infinite where a network did not grok
        medians = [float(stats.median(times)) for times in grok]
        alpha, _, _ = stats.line(np.array(RHOS), np.log(medians))
        steps = ", ".join(map(stats.short, medians))
        print(f"weight decay {control.weight_decay:g}: W_c {norms[control.name]:.1f}, median T_grok {steps}, alpha {alpha:.2f}")


if __name__ == "__main__":
    main()
