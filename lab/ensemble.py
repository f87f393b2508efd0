"""The trainer of an ensemble of runs of equal shape: evaluation, retirement by cell, checkpoints, rows of results.

Hyperparameters are vectors over runs; a run's own bits depend on no other run. Source: arXiv 2606.13753 and 2606.18465, methods sections.
"""
import hashlib
import heapq
import threading
import time
from array import array
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from common import EVAL_EVERY, Cell, UsageError, geometric_grid, parity_sizes
from kernels import cpu
from kernels.layout import AnyLayout, DenseLayout
from kernels.step import metric_names
from lab.book import COLLAPSE, CROSSINGS, FOURIER, KEPT, Book
from lab.draws import initial_rows, parity_examples, splits
from lab.state import State, layout_of
from lab.tasks import N_TEST, labels

SAVE_SHARE = 0.01      # of the time may go into checkpoints
NEVER = 2**62          # a step that no run reaches


def data_of(cells: list[Cell], layout: AnyLayout, dtype: torch.dtype, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every run its training pairs `a, b (R, n)`, drawn from those with a label in `table (p*p,)`, and a mask `(R, p*p)` that is 1 on them; of
    a dense MLP inputs `(R, examples, n)` and labels `(R, examples)` of all its examples, and the mask of those to train on."""
    if isinstance(layout, DenseLayout):
        drawn = [parity_examples(*parity_sizes(c.task), N_TEST, c.block, c.seed0, c.members, c.card) for c in cells]
        x, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return x.to(dtype), labels, (torch.arange(layout.examples) < layout.m).to(dtype).repeat(len(x), 1)
    p, data = cells[0].p, None if table is None else (table >= 0).nonzero()[:, 0]
    indices = torch.cat([splits(p, c.n_train, c.block, c.seed0, c.members, c.card, data) for c in cells])   # (R, n)
    return indices // p, indices % p, torch.zeros(len(indices), p**2, dtype=dtype).scatter_(1, indices, 1)


class Ensemble(Book):
    """Runs of equal shape trained together; each stops with its cell, when the cell's last member has grokked or its budget ends.

    Hyperparameters are vectors over runs. On a CPU each worker advances the run that is furthest behind by one interval, so runs
    need no barrier; a run's own bits never depend on the others. On CUDA all runs advance in lockstep.
    """
    PROGRESS = ("step", "crossed", "at_grok", "norm_at", "below_after_grok", "diverged", "retire", "last", "before", "collapse_max")

    def __init__(self, cells: list[Cell], device: str, backend: str, dtype: torch.dtype, arithmetic: str, start: State | None = None,
                 keep_weights: bool = False):
        """`keep_weights`: those of the moments that `lab/weights.py` writes."""
        self.cells, first = cells, cells[0]
        self.layout = layout_of(first, dtype)
        self.metrics = metric_names(self.layout.groups)
        self.reported = ("norm", "logit_scale", *(f"norm_{group}" for group in self.layout.groups), "saturated", "collapse32", "collapse64")
        self.collapse_columns = [1 + self.metrics.index(name) for name in COLLAPSE]     # of `last` and `before`
        self.n = first.n_train
        self.dtype, self.loss, self.decay_last = dtype, first.loss, first.decay_last
        runs = [(c, m) for c, cell in enumerate(cells) for m in cell.members]
        self.cell_of = np.array([c for c, _ in runs])
        self.member = np.array([m for _, m in runs])
        over_runs = lambda name: np.array([getattr(cells[c], name) for c in self.cell_of])  # noqa: E731
        self.lr, self.weight_decay, self.tau = over_runs("lr"), over_runs("weight_decay"), over_runs("tau")
        self.betas, self.warmup, self.capped = over_runs("betas"), over_runs("warmup"), over_runs("hold") == "cap"
        self.perp_grad = first.perp_grad
        self.clamp_start = over_runs("clamp_start")
        self.clamp_stop = np.array([cells[c].clamp_stop or NEVER for c in self.cell_of])
        self.scale_at = np.array([cells[c].clamp_start if cells[c].scale_once else NEVER for c in self.cell_of])
        self.held = np.zeros((len(runs), 1 + len(self.layout.groups)))   # (R, 1 + groups)
        for row, targets in zip(self.held, (h for cell in cells for h in (cell.held or ((),) * len(cell.members))), strict=True):
            row[: len(targets)] = targets
        self.start = start.step if start else np.zeros(len(runs), dtype=int)   # (R,)
        # evaluations, and so every decision, fall on the cell's own schedule: on multiples of `every`, or where that is 0 on its grid
        self.every, self.grids = over_runs("eval_every"), [None if cell.eval_every else geometric_grid(cell.budget_steps) for cell in cells]
        stop = np.minimum(over_runs("budget_steps"), [cells[c].stop_step or NEVER for c in self.cell_of])
        self.end = np.where(self.every > 0, stop // np.maximum(self.every, 1) * self.every, stop)
        dense = isinstance(self.layout, DenseLayout)
        self.labels = None if dense or first.task == "add" else labels(first.p, first.task).flatten()   # (p*p,)
        self.a, self.b, self.train_mask = data_of(cells, self.layout, dtype, self.labels)
        if start:
            self.state = start
        else:
            drawn: dict[tuple, Tensor] = {}
            for c in cells:
                if (c.block, c.seed0, c.members, c.card) not in drawn:
                    drawn[c.block, c.seed0, c.members, c.card] = initial_rows(self.layout, c.block, c.seed0, c.members, dtype, c.card)
            params = torch.cat([drawn[c.block, c.seed0, c.members, c.card] for c in cells])
            for row, factor in zip(params, over_runs("init_scale").tolist(), strict=True):
                row[: self.layout.n_weights] *= factor
            self.state = State(params, torch.zeros_like(params), torch.zeros_like(params), self.start)
        R = len(runs)
        self.kept = self.state.params[:, None].repeat(1, len(KEPT), 1) if keep_weights else None   # (R, moments, n_params)
        self.step = self.start.copy()
        self.crossed = np.full((R, len(CROSSINGS)), -1)                  # first step of each crossing, -1 = not yet
        self.at_grok = np.full((R, len(self.metrics)), np.nan)
        # step and metrics of the last two evaluations: a run may be one past the step at which its cell turns out to retire
        self.last, self.before = np.full((2, R, 1 + len(self.metrics)), np.nan)
        self.collapse_max = np.zeros((R, len(COLLAPSE)))                 # largest rates over all evaluations but the last
        self.norm_at = np.full((R, len(CROSSINGS)), np.nan)              # total norm at each crossing
        self.below_after_grok = np.zeros(R, dtype=int)                   # evaluations under 0.90 after T_grok
        self.diverged = np.full(R, -1)                                   # step at which loss or norm was found not finite
        self.retire = self.end.copy()                                    # step at which the run's cell leaves
        self.log, self.log_width = array("d"), 2 + len(self.metrics) + len(FOURIER)   # rows of run, step, metrics and Fourier structure
        self.executed, self.seconds, self.quiescent = 0, 0.0, True
        self.arithmetic, self.on_device, self.kernels = arithmetic, np.arange(R), None
        if device == "cuda":
            self.backend = "triton"
        else:
            self.backend = "compiled" if backend == "compiled" or (backend == "auto" and cpu.has_compiler()) else "eager"
        self.backends: list[str] = []                                    # those that trained it, in their order: bits depend on them
        digest = hashlib.sha256(repr((cells, str(dtype), device, arithmetic, self.start.tolist())).encode()).digest()
        self.identity = torch.tensor(list(digest), dtype=torch.uint8)    # a snapshot of other runs must not be taken up

    def compile(self) -> None:
        """The CPU's kernels; nothing is compiled for an ensemble that has finished."""
        self.kernels = self.kernels or cpu.CpuKernels(self.layout, self.n, self.loss, self.dtype, self.backend == "compiled", self.decay_last,
                                                      self.labels, self.perp_grad)
        self.backend = self.kernels.backend

    # -- one interval

    def next_stops(self, runs: np.ndarray) -> np.ndarray:
        """Steps `(len(runs),)` to bring `runs` to next: at most EVAL_EVERY on, not past an evaluation, the end or where the weights are scaled;
        first of all, the first one that they make here."""
        step, every = self.step[runs], self.every[runs]
        stops = np.minimum(step + EVAL_EVERY, np.where(every > 0, (step // np.maximum(every, 1) + 1) * every, NEVER))
        for c in np.unique(self.cell_of[runs[every == 0]]):
            mine, grid = self.cell_of[runs] == c, self.grids[c]
            stops[mine] = np.minimum(stops[mine], np.append(grid, NEVER)[np.searchsorted(grid, step[mine], "right")])
        for bound in (self.end[runs], self.scale_at[runs]):
            stops = np.where(step < bound, np.minimum(stops, bound), stops)
        return np.where(step == self.start[runs], step + 1, stops)

    def due(self, runs: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Whether `step (len(runs),)` is on the schedule of evaluations of each of `runs`."""
        every = self.every[runs]
        on_schedule = (every > 0) & (step % np.maximum(every, 1) == 0)
        for c in np.unique(self.cell_of[runs[every == 0]]):
            mine = self.cell_of[runs] == c
            on_schedule[mine] = np.isin(step[mine], self.grids[c])
        return on_schedule

    def measured(self, runs: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Whether each of `runs` is measured at `step (len(runs),)`: on its schedule, and after the first step that it makes here."""
        return self.due(runs, step) | (step == self.start[runs] + 1)

    def unmeasured_starts(self) -> np.ndarray:
        """The runs to measure before they train: paper A's grid begins at step 0."""
        return np.flatnonzero((self.every == 0) & (self.start == 0)) if not self.log else np.array([], dtype=int)

    def scale(self, params: Tensor, run: int) -> None:
        """Scale the weight matrices in the row `params (n_params,)` of `run` by the factors of its cell."""
        for part, factor in zip(self.layout.group_slices(), self.cells[self.cell_of[run]].scale_once, strict=True):
            params[part] *= factor

    def scalars(self, runs: np.ndarray, k: int) -> Tensor:
        """Per-run, per-step scalars `(R, k, 8 + groups)` of each run's next `k` steps, as `kernels.adamw.scalar_names` has them, float64."""
        t = self.step[runs, None] + np.arange(1, k + 1)                  # (R, k)
        out = np.empty((len(runs), k, 7 + self.held.shape[1]))
        (beta1, beta2), warmup = self.betas[runs].T[..., None], self.warmup[runs, None]
        lr = self.lr[runs, None] * np.where(t < warmup, t / np.maximum(warmup, 1), 1.0)
        out[:, :, 0] = self.tau[runs, None]
        out[:, :, 1] = 1 - lr * self.weight_decay[runs, None]
        out[:, :, 2] = lr / (1 - beta1**t)
        out[:, :, 3] = np.sqrt(1 - beta2**t)
        inside = (t >= self.clamp_start[runs, None]) & (t < self.clamp_stop[runs, None])
        out[:, :, 4:-3] = inside[:, :, None] * self.held[runs, None, :] * np.where(self.capped[runs], -1, 1)[:, None, None]
        out[:, :, -3:] = np.concatenate([1 - beta1, beta2, 1 - beta2], 1)[:, None, :]
        return torch.from_numpy(out)

    def live(self) -> np.ndarray:
        return np.flatnonzero((self.step < self.retire) & (self.diverged < 0))

    def steps_left(self) -> int:
        """Run-steps still expected: a run past its expectation is taken to need as much again as it is late, at least a tenth of it."""
        live = self.live()
        expected = np.array([c.expected_steps or c.budget_steps for c in self.cells])[self.cell_of[live]]
        late = self.step[live] - expected
        return int(np.minimum(np.maximum(np.abs(late), expected // 10), self.end[live] - self.step[live]).sum())

    # -- all of it

    def train(self, tick: Callable[["Ensemble"], None], save: Callable[[dict], None] | None = None, save_every: float = 180) -> None:
        """Train until every cell has retired. `tick` is called a few times a second from the main thread; `save` gets a snapshot
        every `save_every` seconds, later if that would take more than its share of the time, and one if Ctrl-C or SIGTERM ends training early."""
        advance = self._train_lockstep if self.backend == "triton" else self._train_workers
        if self.backend != "triton" and len(self.live()):
            self.compile()                                               # the backend is what came of it
        if len(self.live()) and self.backend not in self.backends[-1:]:
            self.backends.append(self.backend)
        try:
            while len(self.live()):
                started = time.monotonic()
                try:
                    advance(tick, started + save_every)
                finally:
                    self.seconds += time.monotonic() - started
                if save and len(self.live()):
                    started = time.monotonic()
                    save(self.snapshot())
                    save_every = max(save_every, (time.monotonic() - started) / SAVE_SHARE)
        except (KeyboardInterrupt, SystemExit):                          # from `tick`, where the state is whole
            if save and self.quiescent and (self.step > self.start).any():
                save(self.snapshot())
            raise

    def snapshot(self) -> dict[str, Tensor]:
        """All that is needed to continue to the same bits, as tensors."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in self.PROGRESS}
        return {"params": self.state.params, "moment1": self.state.moment1, "moment2": self.state.moment2, **arrays,
                **({} if self.kept is None else {"kept": self.kept}),
                "log": torch.from_numpy(self.log_table()), "executed": torch.tensor(self.executed),
                "seconds": torch.tensor(self.seconds), "identity": self.identity,
                "backends": torch.tensor(list(" ".join(self.backends).encode()), dtype=torch.uint8)}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Continue from `snapshot`, on a CPU whichever backend left it. Raises UsageError if it is not of this ensemble."""
        mine = self.snapshot()
        kind = lambda k, tensor: (tensor.shape[k in ("log", "backends"):], tensor.dtype, tensor.layout, tensor.device)  # noqa: E731
        if (set(snapshot) != set(mine) or any(kind(k, snapshot[k]) != kind(k, mine[k]) for k in mine)
                or not torch.equal(snapshot["identity"], self.identity)):
            raise UsageError("checkpoint holds another ensemble; remove it or choose another --out")
        for name in self.PROGRESS:
            setattr(self, name, snapshot[name].numpy().copy())
        self.state = State(snapshot["params"], snapshot["moment1"], snapshot["moment2"], self.start)
        self.kept = snapshot.get("kept")
        self.log = array("d", snapshot["log"].numpy().tobytes())
        self.executed, self.seconds = int(snapshot["executed"]), float(snapshot["seconds"])
        self.backends = bytes(snapshot["backends"].flatten().tolist()).decode("ascii", "replace").split()

    def measure(self, run: int) -> list[float]:
        """Metrics of `run` as it is, on a CPU."""
        tau = torch.tensor(self.tau[run], dtype=self.dtype)
        return self.kernels.evaluate(self.state.params[run], self.train_mask[run], self.a[run], self.b[run], tau).tolist()

    def advance(self, run: int, until: int) -> list[float] | None:
        """Bring `run` to step `until` on a CPU, in place; its metrics there, where it is measured."""
        scalars = self.scalars(np.array([run]), until - int(self.step[run]))[0].to(self.dtype)
        rows = [t[run] for t in (self.state.params, self.state.moment1, self.state.moment2, self.a, self.b, self.train_mask)]
        measured, scaled = bool(self.measured(np.array([run]), np.array([until]))[0]), until == self.scale_at[run]
        if measured and not scaled:
            return cpu.advance(self.kernels, *rows, scalars)
        self.kernels.steps(*rows[:5], scalars)
        if scaled:
            self.scale(rows[0], run)
        return self.measure(run) if measured else None

    def _train_workers(self, tick: Callable[["Ensemble"], None], deadline: float) -> None:
        for r in self.unmeasured_starts():
            with cpu.single_thread(), torch.no_grad():
                self.record(np.array([r]), 0, np.array([self.measure(r)]))
        ready = threading.Condition()
        idle = [(int(self.step[r]), int(r)) for r in self.live()]
        heapq.heapify(idle)
        busy: dict[int, int] = {}                                        # run -> step it set out from
        stop, failures, left = False, [], 0                              # left: workers that have not returned
        ended = threading.Event()

        def must_wait() -> bool:
            """Nothing idle, or the next run is over an interval ahead of one of its cell that a worker still has: the cell may end there."""
            if not idle:
                return bool(busy)
            step, run = idle[0]
            return any(s < step - EVAL_EVERY and self.cell_of[r] == self.cell_of[run] for r, s in busy.items())

        def work() -> None:
            nonlocal left
            try:
                walk()
            finally:
                with ready:
                    left -= 1
                    if not left:
                        ended.set()

        def walk() -> None:
            torch.set_num_threads(1)
            while True:
                with ready:
                    while must_wait() and not stop:
                        ready.wait()
                    if stop or not idle:
                        return
                    step, run = heapq.heappop(idle)
                    if step >= self.retire[run]:
                        continue
                    busy[run] = step
                try:
                    until = int(self.next_stops(np.array([run]))[0])
                    with torch.no_grad():
                        metrics = self.advance(run, until)
                    with ready:
                        self.executed += until - step
                        if metrics is None:
                            self.step[run] = until
                        else:
                            self.record(np.array([run]), until - step, np.array([metrics]))
                        del busy[run]
                        if until < self.retire[run] and self.diverged[run] < 0:
                            heapq.heappush(idle, (until, run))
                        ready.notify_all()
                except BaseException as error:  # raised again by the main thread
                    with ready:
                        failures.append(error)
                        busy.pop(run, None)
                        ready.notify_all()
                    return

        found = torch.get_num_threads()
        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(found, max(len(idle), 1)))]
        left, self.quiescent = len(workers), False
        try:
            for worker in workers:
                worker.start()
            # an Event, not join: a Ctrl-C inside Thread.join makes Python 3.11 believe that the thread has ended
            while not ended.wait(0.25) and not failures and time.monotonic() < deadline:
                tick(self)
        finally:
            with ready:
                stop = True
                ready.notify_all()
            self.quiescent = ended.wait()
            torch.set_num_threads(found)
        tick(self)
        if failures:
            raise failures[0]

    def _train_lockstep(self, tick: Callable[["Ensemble"], None], deadline: float) -> None:
        if self.kernels is None:                                         # after `restore`, so that the device gets what it brought
            from kernels.cuda import CudaKernels
            self.on_device = self.live()
            rows = [t[self.on_device].to("cuda") for t in (self.state.params, self.state.moment1, self.state.moment2, self.a, self.b,
                                                           self.train_mask)]
            self.kernels = CudaKernels(self.layout, self.loss, self.dtype, self.arithmetic, *rows, self.decay_last, self.labels, self.perp_grad)
        while len(live := self.live()) and time.monotonic() < deadline:
            self.quiescent = False
            if len(live) <= len(self.on_device) * 7 / 8:                 # an eighth has retired: compact, capture anew
                stays = np.isin(self.on_device, live)
                self._fetch(np.flatnonzero(~stays))                      # the others move on the device alone
                self.kernels.keep(torch.from_numpy(np.flatnonzero(stays)))
                self.on_device = live
            if len(starts := self.unmeasured_starts()):
                self.record(starts, 0, self.kernels.measure(self.scalars(self.on_device, 1)).numpy()[np.isin(self.on_device, starts)])
            k = int((self.next_stops(live) - self.step[live]).min())     # all advance to the first stop of any
            until = self.step[live] + k
            metrics = self._advance_lockstep(k, live[until == self.scale_at[live]], self.measured(live, until).any())
            self.executed += len(self.on_device) * k
            if metrics is None:
                self.step[live] = until
            else:
                self.record(live, k, metrics[np.isin(self.on_device, live)])
            self.quiescent = True
            try:
                tick(self)
            except BaseException:
                self._fetch(np.arange(len(self.on_device)))
                raise
        self._fetch(np.arange(len(self.on_device)))

    def _advance_lockstep(self, k: int, scaled: np.ndarray, measured: bool) -> np.ndarray | None:
        """Bring all runs on the device `k` steps on and scale the weights of the runs `scaled`; the metrics of all, if `measured`."""
        scalars = self.scalars(self.on_device, k)
        if measured and not len(scaled):
            return self.kernels.interval(scalars).numpy()
        self.kernels.steps(scalars)
        for r in scaled:
            self.scale(self.kernels.state.params[int(np.searchsorted(self.on_device, r))], r)
        return self.kernels.measure(scalars).numpy() if measured else None

    def _fetch(self, rows: np.ndarray) -> None:
        """Copy these `rows` of the device into `state`."""
        for name in ("params", "moment1", "moment2"):
            getattr(self.state, name)[self.on_device[rows]] = getattr(self.kernels.state, name)[torch.from_numpy(rows).to(self.kernels.device)].cpu()



def by_shape(cells: list[Cell], chosen: Iterable[int]) -> list[list[int]]:
    """The numbers of the `chosen` cells, a list for each shape of ensemble."""
    groups: dict[tuple, list[int]] = {}
    for i in chosen:
        groups.setdefault(cells[i].ensemble_key(), []).append(i)
    return [*groups.values()]
