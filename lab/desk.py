"""The desk around the bench: training with checkpoints in a folder, progress, results. An experiment is run by `main`."""
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import Cell, Result, UsageError
from kernels.cpu import has_compiler
from lab import console, figures, files, provenance, ranks, settings, stats, weights
from lab.answers import Table, flag_unlearned, merged
from lab.console import Progress, Signals, duration
from lab.ensemble import Ensemble, by_shape
from lab.folder import Dealt, Folder, missing_text
from lab.state import State

SAVE_EVERY = 180   # seconds between checkpoints: what a kill can cost


class Lab(Folder):
    """One run of an experiment in its folder: trains its stages, writes its results."""

    def publish(self, measure: Callable[[Table, settings.Config, dict[str, list[dict]]], None],
                draw: Callable[[Table, settings.Config, Path, list[dict], dict[str, list[dict]]], None], result: Result | None,
                tables: dict[str, Callable[[list[dict], list[dict]], list[dict]]], cell_rows: Callable = stats.cell_rows,
                columns: tuple[str, ...] = files.RUN_COLUMNS, main_figure: str = "") -> None:
        """Tables, verdicts, the last lines, figures, in this order. Without `result` from the tables that are there (`--figures-only`).

        `tables`: further files, each made from runs and trajectories; they are read back, because a run of record may come without its long
        trajectories. `measure(table, config, read)` fills a `Table`; `draw(table, config, folder, trajectories, read)` its figures."""
        out, config = self.out, self.config
        if result:
            runs = [{"experiment": self.experiment, **run} for run in result.runs]
            if not config.model.startswith("mlp"):
                flag_unlearned(runs, result.trajectories)
            files.write_csv(out / "runs.csv", runs, columns)
            files.write_csv(out / "trajectories.csv", result.trajectories)
            files.write_json(out / "provenance.json", provenance.of_training(config, self.origin, self.backends, result))
        runs, trajectories = files.read_runs(out / "runs.csv"), []          # read back, so that both ways see the same digits
        if (out / "trajectories.csv").exists():
            trajectories = files.read_csv(out / "trajectories.csv")
            files.write_csv(out / "cells.csv", cell_rows(runs, trajectories))
            for name, make in tables.items():
                files.write_csv(out / name, make(runs, trajectories))
        read = {name: files.read_csv(out / name) if (out / name).exists() else [] for name in ("cells.csv", *tables)}
        answered: list[Table] = []
        for kind in ("fresh", "published"):
            mine = [run for run in runs if ((run.get("networks") or "fresh") == "fresh") == (kind == "fresh")]
            if mine:
                answered.append(Table(mine, read.get("around_grok.csv", []), kind))
                measure(answered[-1], config, read)
        files.write_summary(out, *merged(answered))
        self._last_words(answered, main_figure)
        for table in answered:
            folder = out / "figures" / ("published" if table.networks == "published" and len(answered) > 1 else "")
            figures.drawn(draw)(table, config, folder, trajectories, read)

    def _last_words(self, answered: list[Table], main_figure: str) -> None:
        """At most fifteen lines: the law in a sentence, a row a condition, where the main figure is."""
        lines = [line for table in answered for line in table.law][:4]
        for table in answered:
            column = "delay_steps" if "delay_steps" in table.runs[0] else "t_grok_step"
            lines += stats.cell_table(table.runs, table.medians, column, 10 // len(answered) - 2).splitlines()
        print("\n".join(lines))
        print(f"tables, verdicts and findings in {self.folder}" + (f", main figure {self.folder / 'figures' / main_figure}" if main_figure else ""))

    # -- training

    def train(self, stage: str, cells: list[Cell], start: State | None = None, keep_state: bool = False, deal: bool = False) -> Result:
        """Train `cells`, one ensemble per shape; finished stages and snapshots in OUT/checkpoint are taken up. `start` has a row per run.

        Of several ranks every one trains all cells itself, for what comes after may depend on them; unless they are dealt (`deal`, without
        `keep_state`): then the result has the rows of this rank's share only, and is good for nothing but to carry on to `out`."""
        size, shares = max(self.rank.size, self.shares) if deal else 1, {self.shard: [*range(len(cells))]}
        if size > 1:
            self.loads = self.loads or [0.0] * size
            first = np.cumsum([0, *(len(cell.members) for cell in cells)])
            owners = ranks.deal([ranks.cost(cell, int(start.step[row]) if start else 0) for cell, row in zip(cells, first, strict=False)], self.loads)
            shares = {f".{number}of{size}": [i for i, owner in enumerate(owners) if owner == number] for number in range(size)}
            if self.shard:
                shares = {self.shard: shares[self.shard]}
                print(f"rank {self.rank.number} of {size}: {len(shares[self.shard])} of the {len(cells)} cells of {stage}", flush=True)
        trained = {}
        for shard, mine in shares.items():
            groups = by_shape(cells, mine)
            for k, group in enumerate(groups):
                ensemble = self._train_group(f"{stage}-{k}" if len(groups) > 1 else stage, shard, [cells[i] for i in group],
                                             start and start.of_cells(cells, group), dealt=size > 1)
                trained |= {i: (ensemble, c) for c, i in enumerate(group)}
        ensembles = list({id(ensemble): ensemble for ensemble, _ in trained.values()}.values())
        total = Result(executed=sum(e.executed for e in ensembles), seconds=sum(e.seconds for e in ensembles))
        for group in by_shape(cells, [i for i in range(len(cells)) if i in trained]):   # rows lie as in one process
            for i in group:
                ensemble, c = trained[i]
                total = total + ensemble.rows(c)
        return dataclasses.replace(total, state=ensembles[0].result().state) if keep_state else total

    def _train_group(self, stage: str, shard: str, cells: list[Cell], start: State | None, dealt: bool) -> Ensemble:
        """An ensemble of `cells`, trained: from its own snapshots, from that of another process if the stage is everybody's, or from `start`."""
        done, latest, previous, fresh = (self.checkpoint / f"{stage}{shard}{kind}.pt" for kind in (".done", "", ".previous", ".fresh"))
        anybody = [] if dealt else sorted({*self.checkpoint.glob(f"{stage}.*of*.done.pt"), self.checkpoint / f"{stage}.done.pt"} - {done})
        c = self.config
        if c.device == "cpu" and c.backend == "auto":
            compiling, slower = ("a few seconds a modulus", 7) if cells[0].model.startswith("mlp") else ("up to a minute per modulus", 3)
            self.say(f"the step is compiled on first use, {compiling}" if has_compiler() else
                     f"no C++ compiler on the PATH: the step runs eagerly, about {slower} times slower")
        ensemble = Ensemble(cells, c.device, c.backend, getattr(torch, cells[0].dtype or c.dtype), c.arithmetic, start, c.save_weights)
        self._take_up(ensemble, stage + shard, [done, latest, previous], anybody)
        if len(ensemble.live()) and (trained := [*self.backends, *ensemble.backends]) and trained[-1] != ensemble.backend:
            self.say(f"what {self.checkpoint} holds was trained by the {trained[-1]} step, the rest is by this machine's {ensemble.backend} one: "
                     "their rounding differs, and provenance.json names both")
        runs, before, started = len(ensemble.step), ensemble.executed, ensemble.seconds
        if len(ensemble.live()):
            if self.shares > 1 and dealt:
                number = int(re.match(r"\.(\d+)of", shard)[1])
                (self.checkpoint / f"done{shard}").unlink()
                raise UsageError(f"the shard of {stage} in {self.checkpoint} is not complete, {missing_text([number], self.shares)}")

            def save(snapshot: dict[str, torch.Tensor], path: Path = latest) -> None:
                files.save_tensors(fresh, snapshot)
                if latest.exists():
                    latest.replace(previous)
                fresh.replace(path)
            progress = Progress(stage, runs, ensemble.steps_left())
            Signals.waiting = True
            try:
                ensemble.train(progress, save, SAVE_EVERY)
                save(ensemble.snapshot(), done)
            finally:
                Signals.waiting = False
                progress.close()
            if Signals.caught is not None:   # it came after the last tick
                Signals.leave(Signals.caught)
        self.backends = list(dict.fromkeys([*self.backends, *ensemble.backends]))
        if c.save_weights and not cells[0].stop_step:
            for i in range(len(cells)):
                weights.save(self.folder / "weights", ensemble, i)
        rows = ensemble.result().runs
        steps, seconds = ensemble.executed - before, ensemble.seconds - started   # of this command; the rows count all
        n_censored, rest = sum(run["censored"] for run in rows), "not yet" if cells[0].stop_step else "censored"
        print(f"{stage}: {runs} runs, {runs - n_censored} grokked, {n_censored} {rest}, {steps} run-steps in {duration(seconds)}"
              + (f" ({1e3 * seconds / steps:.2f} ms each)" if steps else " (from the checkpoint)"), flush=True)
        for run in rows:
            if run["diverged"]:
                print(f"{stage}: member {run['member']} of {run['cell']} diverged (loss or norm not finite); its row says so")
        return ensemble

    def _take_up(self, ensemble: Ensemble, stage: str, own: list[Path], anybody: list[Path]) -> None:
        """Restore the first good snapshot of: this process's last one, another process's, this process's earlier ones. Bad ones are named."""
        refused, found = [], "its start"
        for path in [own[0], *anybody, *own[1:]]:
            if not path.is_file():
                continue
            try:
                tensors = files.load_tensors(path)
            except files.Damaged as why:
                refused.append(f"{path.name} ({why})")
                if path in own:
                    path.unlink()   # the next snapshot must not push a good one out for it
                continue
            try:
                ensemble.restore(tensors)
            except UsageError as error:
                raise UsageError(f"{path}: {error}") from None
            found = path.name
            break
        if refused:
            print(f"{self.checkpoint}: refused {', '.join(refused)}; {stage} goes on from {found}", flush=True)


def start(run: Callable[[list[str]], None], argv: list[str]) -> None:
    """`run(argv)`. As one of several ranks; the one that then finds all shards there runs it once more, alone, to merge them."""
    try:
        run(argv)
    except Dealt as end:
        print(end, flush=True)
        if end.complete:
            Folder.merging = True
            try:
                run(argv)
            except Dealt as end:
                print(end, flush=True)
            finally:
                Folder.merging = False


def main(run: Callable[[list[str]], None]) -> None:
    """Run an experiment's `run(argv)` with the words of the command line, and end the process."""
    console.end(lambda: start(run, sys.argv[1:]))
