"""One command in several processes: which of them this is, as the usual launchers say it in the environment, and who trains what.

torchrun sets RANK and WORLD_SIZE, `srun` SLURM_PROCID and SLURM_NTASKS, a Slurm array SLURM_ARRAY_TASK_ID and _COUNT (tasks of an array
may each be an `srun` of several), Open MPI OMPI_COMM_WORLD_RANK and _SIZE, other MPIs PMI_RANK and PMI_SIZE. The first pair that is there
counts, so RANK=0 WORLD_SIZE=1 makes a process work alone whatever launched it.
"""
from collections.abc import Mapping
from typing import NamedTuple

from common import Cell, UsageError

LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
             ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"), ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"))


class Rank(NamedTuple):
    """Process `number` of `size`; `local` counts on its machine and picks the GPU; `source`: the variables that say so."""
    number: int = 0
    size: int = 1
    local: int = 0
    source: str = ""


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Which process this is, by the variables of the usual launchers. Raises UsageError if they are there and make no sense."""
    def value(name: str) -> int:
        try:
            return int(environment[name])
        except ValueError:
            raise UsageError(f"{name} in the environment must be a whole number, got {environment[name]!r}") from None

    def checked(number: int, size: int, local: int, *names: str) -> Rank:
        if not 0 <= number < size:
            raise UsageError(f"{' and '.join(names)} in the environment say process {number} of {size}; processes are numbered from 0")
        return Rank(number, size, local, " ".join(f"{name}={environment[name]}" for name in names))

    found, launcher = Rank(), ""
    for number, size, local in LAUNCHERS:
        if number in environment and size in environment:
            found = checked(value(number), value(size), value(local) if local in environment else 0, number, size)
            launcher = number
            break
    if launcher in ("", "SLURM_PROCID") and "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step = (value(f"SLURM_ARRAY_TASK_{name}") if f"SLURM_ARRAY_TASK_{name}" in environment else 0 for name in ("MIN", "STEP"))
        task = (value("SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
        array = checked(task, value("SLURM_ARRAY_TASK_COUNT"), 0, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
        found = Rank(array.number * found.size + found.number, array.size * found.size, found.local, f"{array.source} {found.source}".strip())
    return found


def cost(cell: Cell, start_step: int = 0) -> float:
    """Expected work of `cell` from `start_step` on, in run-steps of p=59; a step's time grows with p as seen on GPUs and CPUs."""
    steps = min(cell.expected_steps or cell.budget_steps, cell.budget_steps) - start_step
    return max(steps, 1) * len(cell.members) * ((cell.p / 59) ** 2.4 if cell.p else cell.n_train / 1000)


def deal(costs: list[float], loads: list[float]) -> list[int]:
    """The owner of every cell: longest first, each to the process with the least to do so far; `loads` (one a process) grows by it."""
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
