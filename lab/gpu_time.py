"""How long a GPU trains at least, from the bounds that `make count` leaves: no GPU has timed the kernels yet."""
import csv
import functools
import math
from pathlib import Path

from common import EVAL_EVERY, Cell

RESULTS = Path(__file__).parents[1] / "results"
DENSE = 5.0         # us of a run-step of 1000 examples: not counted, by its operations alone
FLOAT64 = 2         # of float32: its pipe has half the lanes


@functools.cache
def bounds() -> dict[tuple[str, str, str], dict[tuple[int, int], float]]:
    """`(model, arithmetic, phase)` -> `(runs, p)` -> microseconds a run. Empty where nothing was counted."""
    found: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
    for table in sorted(RESULTS.glob("bench*/step_sm90.csv")):
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                of = found.setdefault((row["model"], row["arithmetic"], row["phase"]), {})
                of[int(row["runs"]), int(row["p"])] = float(row["bound_us_per_run"])
    return found


def microseconds(model: str, arithmetic: str, phase: str, p: int, runs: int) -> float | None:
    """Of one run: in the counted ensemble whose size is nearest to `runs`, between the counted moduli and beyond by the power of p that they show.
    Of an arithmetic that is not counted, as in "ieee"; None of a network that is not."""
    model = {"transformer_b": "transformer"}.get(model, model)      # the same launches
    counted = bounds().get((model, arithmetic, phase)) or bounds().get((model, "ieee", phase), {})
    if not counted:
        return None
    size = min({runs for runs, _ in counted}, key=lambda each: abs(math.log(each / runs)))
    moduli = sorted(p for each, p in counted if each == size)
    if len(moduli) == 1:
        return counted[size, moduli[0]] * (p / moduli[0]) ** 2
    low = max((each for each in moduli[:-1] if each <= p), default=moduli[0])
    high = moduli[moduli.index(low) + 1]
    growth = math.log(counted[size, high] / counted[size, low]) / math.log(high / low)
    return counted[size, low] * (p / low) ** growth


def seconds(cells: list[Cell], arithmetic: str, dtype: str) -> float:
    """Of the expected steps of all members of `cells` and of their evaluations, in ensembles of all that share a modulus."""
    total = 0.0
    for cell in cells:
        runs = sum(len(other.members) for other in cells if other.p == cell.p)
        steps = min(cell.expected_steps or cell.budget_steps, cell.budget_steps)
        step, evaluation = (microseconds(cell.model, arithmetic, phase, cell.p, runs) for phase in ("step", "evaluation"))
        if step is None or evaluation is None:
            step, evaluation = DENSE * cell.n_train / 1000, 0.0
        total += 1e-6 * steps * len(cell.members) * (step + evaluation / (cell.eval_every or EVAL_EVERY))
    return total * (FLOAT64 if dtype == "float64" else 1)
