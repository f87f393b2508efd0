"""Files: written whole or not at all, read with one line on what is wrong. CSV, JSON, checkpoints, locks."""
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from common import UsageError

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

RUN_COLUMNS = ("experiment", "cell", "model", "loss", "p", "train_frac", "n_train", "block", "seed0", "member", "arm", "rho", "tau", "gamma",
               "lr", "weight_decay", "clamp_start", "clamp_stop", "held_norm", "w_c", "budget_steps", "t_mem_step", "t_grok_step",
               "censored", "norm_at_grok", "logit_scale_at_grok", "steps_run", "diverged")

# columns whose numbers are compared for equality
CONDITIONS = {"train_frac", "rho", "tau", "gamma", "lr", "weight_decay", "w_c", "beta1", "beta2", "init_scale"}
TEXT = {"experiment", "networks", "cell", "task", "model", "loss", "arm", "group", "dtype", "hold", "file", "name", "device", "backend", "arithmetic",
        "kernel"}


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends well, and nothing at all otherwise: temporary name, fsync, rename."""
    part = path.with_name(path.name + ".part")
    check_held(path)
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        check_held(path)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError, UsageError):
            check_held(path)   # nor is another command's folder tidied
            part.unlink()
        if isinstance(error, OSError) and not error.filename:   # a full disk does not say what it was to hold
            error.filename = str(path)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    with whole(path) as f:
        f.write(data)


def cell_text(value: object, exact: bool = False) -> object:
    """CSV text: empty for what was not reached; floats to 9 significant digits, which keeps float32 exactly, or so that they read back equal."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, float):
        return value
    short = f"{value:.9g}"
    return repr(value) if exact and float(short) != value else short


def write_csv(path: Path, rows: Iterable[dict], first: tuple[str, ...] = ()) -> None:
    """`rows` is walked through twice, for the columns and for the lines, and not kept."""
    names = list(dict.fromkeys(itertools.chain(first, (name for row in rows for name in row))))
    with whole(path) as f:
        text = io.TextIOWrapper(f, "utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([cell_text(row.get(name), name in CONDITIONS) for name in names] for row in rows)
        text.detach()


def read_csv(path: Path, flag: str = "--out") -> list[dict]:
    """Rows by column: text in those of TEXT, whatever it looks like, int or float in the others; empty fields as None. Raises UsageError.

    `flag`: the one that names the folder, for what an error says."""
    def value(name: str, text: str) -> object:
        if not text or name in TEXT:
            return text or None
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        raise UsageError(f"{path}: {text[:80]!r} in column {name} is no number; put back what was changed, or make it again")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:   # a spreadsheet saves with a mark of the encoding in front
            text = f.read()
        names, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
        if not text.endswith("\n") or any(len(row) != len(names) for row in rows):
            raise UsageError(f"{path} is cut off or has rows of unequal length; make it again, or name another folder with {flag}")
        return [{name: value(name, field) for name, field in zip(names, row, strict=True)} for row in rows]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; train first, or name the folder with {flag}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(f"{path} is not a table of this project; name another folder with {flag}") from None


def read_runs(path: Path, flag: str = "--out") -> list[dict]:
    """`read_csv` of a runs.csv. Raises UsageError if it is none."""
    rows = read_csv(path, flag)
    if not rows or set(RUN_COLUMNS) - set(rows[0]):
        raise UsageError(f"{path} is not a runs.csv of this project; name another folder with {flag}")
    return rows


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path} ({error}); train first, or name the folder with --out") from None


def write_json(path: Path, content: object) -> None:
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def digest(named: dict[str, Path]) -> str:
    """Start of the SHA-256 of files and the names that they go by. Raises UsageError if one cannot be read."""
    state = hashlib.sha256()
    for name, path in sorted(named.items()):
        try:
            state.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return state.hexdigest()[:16]


def digests(folder: Path) -> dict[str, str]:
    """What summary and figures of `folder` are made from, of it what is there: name of the table -> start of its SHA-256."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
            for name in ("runs.csv", "trajectories.csv") if (folder / name).exists()}


def made_from(folder: Path) -> dict[str, str]:
    """The digests that summary.json in `folder` has; none if there is no such file."""
    try:
        return dict(read_json(folder / "summary.json").get("data") or {})
    except (UsageError, ValueError, TypeError):
        return {}


def write_summary(folder: Path, claims: list[dict], findings: list[dict]) -> None:
    """summary.json: claims, findings, where the runs came from (provenance.json), and which tables all of it was made from: of the same runs
    the trajectories are remembered that are no longer there."""
    then, now = made_from(folder), digests(folder)
    data = {**then, **now} if then.get("runs.csv") == now["runs.csv"] else now
    write_json(folder / "summary.json", {"claims": claims, "findings": findings, "provenance": read_json(folder / "provenance.json"), "data": data})


# ---------------------------------------------------------------- checkpoints

class Damaged(Exception):
    """A file that is not a checkpoint as it was written."""


class Hashing:
    """A file to write that knows the SHA-256 of what went into it, and why it could not be written: torch hides that."""

    def __init__(self, file: BinaryIO):
        self.file, self.flush, self.sha256, self.error = file, file.flush, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """`tensors` as torch writes them, then the 32 bytes of the SHA-256 of that."""
    with whole(path) as f:
        hashing = Hashing(f)
        try:
            torch.save(tensors, hashing)
        except RuntimeError as error:
            raise hashing.error or error from None
        f.write(hashing.sha256.digest())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` wrote to `path`. Raises Damaged if it is anything else; nothing in it is executed."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
            raise Damaged("truncated or altered")
        tensors = torch.load(io.BytesIO(memoryview(data)[:-32]), weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # whatever is wrong with its content
        if isinstance(error, OSError) and not isinstance(error, IsADirectoryError):
            raise
        raise Damaged(f"not a checkpoint, {type(error).__name__}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise Damaged("not a checkpoint, no tensors")
    return tensors


# ---------------------------------------------------------------- one process at a time

HELD: dict[Path, BinaryIO] = {}   # locks of this process; the system frees them when it ends, however it ends


def lock(path: Path, shared: bool = False) -> BinaryIO | None:
    """The file `path`, made if need be, locked for this process alone, or with others that share it; None if another process has it.

    A lock of this process on the same path is given up first. Where the system or the file system has no locks, nobody is refused."""
    unlock(path)
    for _ in range(10):
        file = open(path, "a+b")   # noqa: SIM115, held until `unlock`
        try:
            if fcntl:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass
        if is_at(file, path):
            HELD[path] = file
            return file
        file.close()   # who had it removed it before it was locked: again, with what is there now
    return None


def unlock(path: Path) -> None:
    if path in HELD:
        HELD.pop(path).close()


def is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_held(path: Path) -> None:
    """Before anything is written or removed at `path`: raises UsageError if a folder around it was locked and has been taken away since."""
    for held, file in HELD.items():
        if held.parent in path.parents and not is_at(file, held):
            now = "if another command has it now, choose another --out; if not, the same command" if held.exists() else "the same command"
            raise UsageError(f"{held.parent}, or {held.name} in it, was removed or replaced while this command worked there, and nothing more is "
                             f"written to it; {now} continues from the last checkpoint that is left")
