"""What training leaves in memory: a row per network, what was logged, the state. `common.train` returns one, and so do the stages of a command."""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field


class Trajectories:
    """Logged rows, the lines of trajectories.csv, made anew from what was logged every time they are walked through."""

    def __init__(self, *parts: Callable[[], Iterable[dict]]):
        self.parts = parts

    def __iter__(self) -> Iterator[dict]:
        for part in self.parts:
            yield from part()

    def __add__(self, other: "Trajectories") -> "Trajectories":
        return Trajectories(*self.parts, *other.parts)


@dataclass
class Result:
    """What training left. `runs`: a dict per network, the columns of runs.csv (`results/README.md`); `trajectories`: its logged rows; `state`:
    parameters and moments, a row per run (`lab.state.State`), where all runs have one shape; run-steps executed and needed; seconds."""
    runs: list[dict] = field(default_factory=list)
    trajectories: Trajectories = field(default_factory=Trajectories)
    state: object = None
    executed: int = 0
    needed: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Result") -> "Result":
        return Result(self.runs + other.runs, self.trajectories + other.trajectories, None, self.executed + other.executed,
                      self.needed + other.needed, self.seconds + other.seconds)

    def table(self) -> str:
        """A line per condition: members, censored, median T_mem and T_grok with its 95% interval over members, norm at T_grok."""
        from lab import stats  # it knows `common`, which knows this file
        return stats.cell_table(self.runs)
