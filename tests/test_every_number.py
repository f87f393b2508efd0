"""Every published number has a statistic that answers it: planted runs of the papers' own networks, all scripts, and what is left without one."""
import pytest
from test_own import cells_of, rows

import exp_delay_law
import exp_fork
import exp_logit_scale
import exp_parity
import exp_transformer
from common import Cell
from lab import settings, stats
from lab.answers import Table, published

COMMANDS = [(exp_delay_law, ""), (exp_fork, ""), (exp_logit_scale, "--parts mediation mse grid dose audit allocation"), (exp_parity, ""),
            (exp_transformer, ""), (exp_transformer, "--model transformer_ln"), (exp_transformer, "--model transformer_b --parts temperature")]


def left_by(cell: Cell) -> list[dict]:
    """Rows of runs.csv with all that a run may leave: T_grok grows with the dose, norms with the modulus."""
    T = round(1000 * (cell.rho or 1) ** 3 / cell.tau * 1.5 ** (cell.block % 5))
    norm = 8.0 * max(cell.p, 30) ** 0.45
    groups = ("E", "W1", "W2", "embed", "attn", "mlp", "unembed")
    more = {f"norm_{group}_at_grok": 0.5 * norm for group in groups}
    more |= dict.fromkeys(("norm_at_80", "norm_at_95", "norm_at_grok", "norm_at_end"), norm)
    if cell.group and cell.w_c:
        more[f"held_{cell.group}"] = cell.rho * cell.w_c
    return rows(cell, [T + 25 * m for m in range(cell.block)], task=cell.task, norm_at_mem=1.2 * norm, delay_steps=800, fork_step=800,
                clamp_start=cell.clamp_start, collapse32_max=0.1, collapse64_max=0.0, logit_scale_at_grok=30.0, **more)


def test_none_is_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 20)
    answered = set()
    for script, flags in COMMANDS:
        words = f"--preset paper --networks published {flags}"
        runs = [run for cell in cells_of(script, words) if not cell.stop_step for run in left_by(cell)]
        log = [{"cell": run["cell"], "member": run["member"], "step": step, "logit_scale": 20.0 * (run["rho"] or 1) / run["tau"], "collapse32": 0.1,
                "collapse64": 0.0} for run in runs for step in (600, 1000, 1200, 1600, 2000)]
        more = [{"cell": run["cell"], "member": run["member"], "peak_step": 340, "share_drift": 0.06} for run in runs]
        parts = script.ARMS if script is exp_fork else script.PARTS
        config, given = settings.parse(script.Config, script.PRESETS, parts, words.split())
        config = config if script is exp_fork else script.checked(config, given)
        table = Table(runs, log, "published")
        script.measure(table, config, {"cells.csv": [], "contraction.csv": more, "shares.csv": more})
        answered |= set(table.claims)
    without = {key: (row["statistic"], row["experiment"]) for key, row in published().items() if key not in answered}
    assert not without, f"{len(without)} of {len(published())}: {without}"
