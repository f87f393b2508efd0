"""Files: written whole or not at all, read with one line on what is wrong. CSV, JSON, tensors."""
import csv
import io
import json
import math
import os
from pathlib import Path

import torch

from common import UsageError

RUN_COLUMNS = ("experiment", "cell", "model", "loss", "p", "train_frac", "n_train", "block", "seed0", "member", "arm", "rho", "tau", "gamma",
               "lr", "weight_decay", "clamp_start", "clamp_stop", "held_norm", "w_c", "budget_steps", "t_mem_step", "t_grok_step",
               "censored", "norm_at_grok", "logit_scale_at_grok", "steps_run", "diverged")


def write_atomic(path: Path, data: bytes) -> None:
    """The whole file or none of it: temporary name, fsync, rename."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def cell_text(value: object) -> object:
    """CSV text: empty for what was not reached; floats to 9 significant digits, which keeps float32 exactly."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.9g}" if isinstance(value, float) else value


def write_csv(path: Path, rows: list[dict], first: tuple[str, ...] = ()) -> None:
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([cell_text(row.get(name)) for name in names] for row in rows)
    write_atomic(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict]:
    """Rows with numbers as int or float and empty fields as None."""
    def value(text: str) -> object:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None
    try:
        with open(path, newline="") as f:
            return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(f)]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; train first, or name the folder with --out") from None
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(f"{path} is not a table of this project; name another folder with --out") from None


def read_runs(path: Path) -> list[dict]:
    """`read_csv` of a runs.csv. Raises UsageError if it is none."""
    rows = read_csv(path)
    if not rows or set(RUN_COLUMNS) - set(rows[0]):
        raise UsageError(f"{path} is not a runs.csv of this project; name another folder with --out")
    return rows


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} ({error}); train first, or name the folder with --out") from None


def write_json(path: Path, content: object) -> None:
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def save_tensors(path: Path, tensors: dict) -> None:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path) -> dict:
    try:
        tensors = torch.load(path, weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError(path)
        return tensors
    except Exception as error:  # whatever is wrong with a file, it is refused by name
        raise UsageError(f"{path} is not a checkpoint that can be read ({type(error).__name__}); remove it to train that stage again") from None
