"""The output folder of a command: whose it is, what it holds, the shards of several ranks in it, and how it is left."""
import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import UsageError
from lab import files, provenance, ranks, settings
from lab.provenance import ROOT

LONGEST_NAME = 100 * "x"   # longer than the name of any file in a folder of results: a path that has room for it has room for all
LOCK_TRIES = 100   # of 50 ms each, while another rank writes the settings of a new folder


class Dealt(Exception):
    """A process has trained its share of a command: nothing is left for it to do, or only to merge."""

    def __init__(self, message: str, complete: bool):
        super().__init__(message)
        self.complete = complete


def missing_text(missing: list[int], size: int) -> str:
    which = f"shard {missing[0]} of {size} is" if len(missing) == 1 else f"shards {', '.join(map(str, missing))} of {size} are"
    return f"{which} missing (RANK={missing[0]} WORLD_SIZE={size} and the same command, if it is not running, makes one)"


class Folder:
    """The output folder of one run of an experiment: its settings, its checkpoints, its results.

    Of several processes with a rank each trains its share of every dealt stage and writes checkpoints of its own, `STAGE.RANKofSIZE`. At
    `out`, where results would be written, it leaves; when all shares are there, the same command without ranks takes them up and goes on."""
    merging = False   # this process left as a rank, and now works alone

    def __init__(self, experiment: str, config: settings.Machine, given: dict, presets: dict[str, dict], inputs: str = ""):
        """`inputs`: digest of the files that the command reads, if it reads any; it counts among the settings."""
        self.experiment, self.config = experiment, config
        self.rank = ranks.Rank() if Folder.merging else ranks.rank_of(os.environ)
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
        if Folder.merging:
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
            if not (found := self._snapshots()) and (Folder.merging or self._complete()):
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
        elif Folder.merging:
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
