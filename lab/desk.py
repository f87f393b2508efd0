"""The desk around the bench: the output folder, checkpoints, ranks, progress, results. An experiment is run by `main`."""
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
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
from lab.provenance import ROOT
from lab.state import State

SAVE_EVERY = 180   # seconds between checkpoints: what a kill can cost
LONGEST_NAME = 100 * "x"   # longer than the name of any file in a folder of results: a path that has room for it has room for all
LOCK_TRIES = 100   # of 50 ms each, while another rank writes the settings of a new folder


# ---------------------------------------------------------------- training with checkpoints, resume

class Dealt(Exception):
    """A process has trained its share of a command: nothing is left for it to do, or only to merge."""

    def __init__(self, message: str, complete: bool):
        super().__init__(message)
        self.complete = complete


class Lab:
    """The output folder of one run of an experiment: its settings, its checkpoints, its results.

    Of several processes with a rank each trains its share of every dealt stage and writes checkpoints of its own, `STAGE.RANKofSIZE`. At
    `out`, where results would be written, it leaves; when all shares are there, the same command without ranks takes them up and goes on."""
    merging = False   # this process left as a rank, and now works alone

    def __init__(self, experiment: str, config: settings.Machine, given: dict, presets: dict[str, dict], inputs: str = ""):
        """`inputs`: digest of the files that the command reads, if it reads any; it counts among the settings."""
        self.experiment, self.config = experiment, config
        self.rank = ranks.Rank() if Lab.merging else ranks.rank_of(os.environ)
        if config.figures_only:
            if self.rank.number:
                raise Dealt(f"rank {self.rank.number} of {self.rank.size} ({self.rank.source}): --figures-only is for rank 0", complete=False)
            self.rank = ranks.Rank()
        else:                             # tables of an earlier command are drawn whatever flags it had
            settings.check_read(config, given)
        if config.device == "cuda" and self.rank.size > 1:
            torch.cuda.set_device(self.rank.local % torch.cuda.device_count())
        self.shard = f".{self.rank.number}of{self.rank.size}" if self.rank.size > 1 else ""
        preset = getattr(config, "preset", "all")
        changed = [f"{k}{'_'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in sorted(given.items())
                   if k not in (*settings.NOT_SCIENCE, "preset", "device") and presets.get(preset, {}).get(k, getattr(type(config), k, None)) != v]
        folder = re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join([preset, *changed]))[:120]
        self.folder = Path(config.out) if config.out else ROOT / "results" / experiment / folder
        self.checkpoint, self.config_file = self.folder / "checkpoint", self.folder / "config.json"
        self.backends, self.said = [], set()   # backends that trained the runs, in their order
        self.origin = provenance.origin()
        self.created: list[Path] = []     # folders that `open` had to make, innermost first
        self.opened, self.shares = False, 1
        self.loads: list[float] = []      # expected work of every share so far
        wanted = json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in settings.NOT_SCIENCE}))
        self.settings = {"experiment": experiment, **wanted, **({"inputs": inputs} if inputs else {})}
        try:
            (self.checkpoint / LONGEST_NAME).exists()
            if self.folder.exists() and not self.folder.is_dir():
                raise UsageError(f"--out {self.folder} is a file; name a folder")
        except OSError as error:
            raise UsageError(f"--out of {len(str(self.folder))} characters cannot be used ({error.strerror}), choose another: "
                             f"{str(self.folder)[:80]}") from None
        self._check_settings()
        if self.shard:
            print(f"rank {self.rank.number} of {self.rank.size} ({self.rank.source}); RANK=0 WORLD_SIZE=1 makes a process work alone", flush=True)
        if config.figures_only and self.config_file.exists():
            self._lock()

    @property
    def out(self) -> Path:
        """The folder, to write results to. A process that has only its share of them leaves here."""
        if self.opened and self.shard:
            self._leave()
        return self.folder

    def say(self, text: str) -> None:
        """Print `text` unless it has been said."""
        if text not in self.said:
            self.said.add(text)
            print(text, flush=True)

    # -- the folder

    def _check_settings(self) -> bool:
        """Whether the folder holds these very settings; False if it holds nothing. Raises UsageError if it holds anything else."""
        defaults = json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(self.config) if f.default is not dataclasses.MISSING}))
        try:
            text = self.config_file.read_text() if self.config_file.exists() else ""
            if not text:   # never opened, or killed before the first byte
                if self.folder.exists() and {path.name for path in self.folder.iterdir()} - {"config.json", "checkpoint"}:
                    raise UsageError(f"--out {self.folder} exists and is no results folder; name a new or empty folder")
                return False
            held = dict(json.loads(text))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"cannot read {self.config_file} ({error}); remove that file to continue there, or choose another --out") from None
        for key in dict.fromkeys([*self.settings, *held]):
            ours = self.settings.get(key)
            theirs = held.get(key, defaults.get(key, ours))   # a setting newer than the folder had its default
            if theirs != ours:
                raise UsageError(f"--out {self.folder} holds another configuration: {key} is {theirs}, this command has {ours}; "
                                 "choose another --out")
        return True

    def _lock(self) -> None:
        """The folder for this process alone; as one of several ranks, shared with the others. Raises UsageError, or Dealt if another rank merges."""
        for _ in range(LOCK_TRIES if self.shard else 1):   # a rank lets another one write the settings
            if file := files.lock(self.config_file):
                if not self._check_settings():
                    file.write((json.dumps(self.settings, indent=1) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
                if not self.shard:
                    return
            if self.shard and files.lock(self.config_file, shared=True):
                if self._check_settings():   # written by another rank, or by anybody between the two locks of this one
                    return
                files.unlock(self.config_file)
            time.sleep(0.05)
        if Lab.merging:
            raise Dealt("another process merges the shards", complete=False)
        raise UsageError(f"another process works in {self.folder}; wait for it or choose another --out")

    def _unlock(self) -> None:
        files.unlock(self.config_file)
        files.unlock(self.checkpoint / f"lock{self.shard}")

    def _snapshots(self) -> set[str]:
        """Names of the checkpoints that there are to continue from."""
        return {path.name for path in self.checkpoint.glob("*.pt") if path.is_file() and not path.name.endswith(".fresh.pt")}

    def _complete(self) -> bool:
        """Whether an earlier command has left all results here. Those of record come without their trajectories, and are trained again."""
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if "summary.json" in names:
            return {"cells.csv", "trajectories.csv", "provenance.json"} <= names and files.made_from(self.folder) == files.digests(self.folder)
        return "runs.csv" in names and ("trajectories.csv" in names or "cells.csv" not in names)

    def redraw(self, write: Callable[[], None]) -> None:
        """`write()` the results of tables that are there. Raises UsageError if it fails on them."""
        if (before := files.made_from(self.folder)) and before != {**before, **files.digests(self.folder)}:
            print(f"note: the tables in {self.folder} are not the ones that its summary was made from", flush=True)
        try:
            write()
        except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise UsageError(f"cannot draw from the tables in {self.folder} ({type(error).__name__}: {error}); put back what was changed in them, or "
                             "remove runs.csv and train again") from error

    def open(self) -> None:
        """Create the folder and take it for this process. Checkpoints found in it are announced; raises Dealt if all results are in it already."""
        if self.config.resume and not self._snapshots() and not self._complete():
            raise UsageError(f"--resume: no checkpoint in {self.folder}; run without --resume to start")
        self.created = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._clear_spent()
            if not (found := self._snapshots()) and (Lab.merging or self._complete()):
                self._unlock()
                raise Dealt(f"the results are in {self.folder}; remove its runs.csv to train again, --figures-only draws them again", complete=False)
            os.makedirs(os.path.realpath(self.checkpoint), exist_ok=True)   # it may be a link to another disk
            if self.shard and not files.lock(self.checkpoint / f"lock{self.shard}"):
                raise UsageError(f"rank {self.rank.number} of {self.rank.size} already works in {self.folder}; wait for it or choose another --out")
        except OSError as error:
            raise UsageError(f"cannot write to {error.filename or self.folder}: {error.strerror}; choose another --out") from None
        self.opened = True
        if self.shard:
            (self.checkpoint / f"done{self.shard}").unlink(missing_ok=True)
        else:
            self._find_shards({*found, *(path.name for path in self.checkpoint.glob("done.*of*"))})
        if found:
            print(f"continuing from {self.checkpoint}", flush=True)

    def _find_shards(self, names: set[str]) -> None:
        """Sets `shares` to the number of ranks whose shards are all there. Raises UsageError if some are missing.

        A rank leaves no snapshot of its own where there was nothing to train, so its mark of having ended counts as well."""
        sizes = sorted({int(found[1]) for name in names if (found := re.search(r"\.\d+of(\d+)(\.|$)", name))})
        if complete := [size for size in sizes if not self._missing(size)]:
            self.shares = complete[0]
        elif Lab.merging:
            raise Dealt(missing_text(self._missing(sizes[0]), sizes[0]) if sizes else "another process has merged the shards", complete=False)
        elif sizes:
            raise UsageError(f"{self.checkpoint} holds shards, {missing_text(self._missing(sizes[0]), sizes[0])}; "
                             "or remove it to train everything in one process")

    def _missing(self, size: int) -> list[int]:
        return [number for number in range(size) if not (self.checkpoint / f"done.{number}of{size}").exists()]

    def _leave(self) -> None:
        """The end of a rank's work. It no longer has the folder, so that of ranks that end together the last one can merge."""
        files.write_atomic(self.checkpoint / f"done{self.shard}", b"")
        self._unlock()
        self.opened, missing = False, self._missing(self.rank.size)
        raise Dealt(f"rank {self.rank.number} of {self.rank.size} has trained its share; "
                    + (missing_text(missing, self.rank.size) if missing else "all shards are there"), complete=not missing)

    def discard(self) -> None:
        """Input that proved bad only in training: what this command created goes; results of an earlier one stay, and what other ranks hold."""
        if self.shard:
            files.check_held(self.checkpoint)
            for path in self.checkpoint.glob(f"*{self.shard}.*"):
                path.unlink()
            (self.checkpoint / f"lock{self.shard}").unlink()
            self._unlock()
            if any(self.checkpoint.iterdir()) or not files.lock(self.config_file):
                return
        self.finish()
        if not (self.folder / "runs.csv").exists():
            self.config_file.unlink()
            self._clear(self.folder / "weights")
        for folder in self.created:
            folder.rmdir()

    def finish(self) -> None:
        """All results are written: the checkpoint has served. It goes at once, by its name, so that a kill leaves it whole or gone."""
        files.check_held(self.checkpoint)
        with contextlib.suppress(OSError):   # it is in the way of itself after a kill: then file by file
            self.checkpoint.rename(self.folder / "checkpoint.spent")
        self._clear(self.checkpoint)
        self._clear_spent()
        self._unlock()

    def drop_weights(self) -> None:
        """The trained weights have served."""
        self._clear(self.folder / "weights")

    def _clear_spent(self) -> None:
        """The end of a checkpoint that has served. Files of others, and a link to another disk, go back to where they were put."""
        spent = self.folder / "checkpoint.spent"
        self._clear(spent)
        if not os.path.lexists(self.checkpoint):
            with contextlib.suppress(OSError):
                spent.rename(self.checkpoint)

    def _clear(self, folder: Path) -> None:
        """Remove the checkpoints or weights in `folder`, and `folder` if nothing else is in it and it is no link."""
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.is_file() and (path.suffix in (".pt", ".part", ".safetensors") or path.name.startswith(("done.", "lock."))):
                path.unlink()
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()

    # -- results

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


def missing_text(missing: list[int], size: int) -> str:
    which = f"shard {missing[0]} of {size} is" if len(missing) == 1 else f"shards {', '.join(map(str, missing))} of {size} are"
    return f"{which} missing (RANK={missing[0]} WORLD_SIZE={size} and the same command, if it is not running, makes one)"


def start(run: Callable[[list[str]], None], argv: list[str]) -> None:
    """`run(argv)`. As one of several ranks; the one that then finds all shards there runs it once more, alone, to merge them."""
    try:
        run(argv)
    except Dealt as end:
        print(end, flush=True)
        if end.complete:
            Lab.merging = True
            try:
                run(argv)
            except Dealt as end:
                print(end, flush=True)
            finally:
                Lab.merging = False


def main(run: Callable[[list[str]], None]) -> None:
    """Run an experiment's `run(argv)` with the words of the command line, and end the process."""
    console.end(lambda: start(run, sys.argv[1:]))
