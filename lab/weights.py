"""Trained weights in files of the safetensors format, one a cell: 8 bytes that say how long the header is, a JSON header, the numbers.

A tensor `MEMBER.MOMENT.PARAMETER` is one of a plain module of `common.py` (E, W1, ...) at a moment of its run: `start`, `mem` and `grok`, the
evaluations that T_mem and T_grok are, and `end`, the last evaluation; a moment that a member did not reach is not there. `labels (p, p)` is the
task's table, `MEMBER.pairs (n,)` the training pairs `a p + b`. The metadata has the conditions and the rows of runs.csv, as JSON.
Source of the format: https://github.com/huggingface/safetensors#format
"""
import json
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import Cell, UsageError, module, parity_sizes
from lab import files
from lab.book import CELL_COLUMNS
from lab.ensemble import Ensemble
from lab.tasks import labels

MOMENTS = ("start", "mem", "grok", "end")
DTYPES = {"F32": torch.float32, "F64": torch.float64, "I32": torch.int32}


class Saved(NamedTuple):
    """The trained networks of a cell."""
    conditions: dict[str, object]                   # columns of runs.csv
    runs: dict[int, dict]                           # by member its row of runs.csv
    modules: dict[int, dict[str, nn.Module]]        # by member and moment, of MOMENTS those that it reached
    labels: Tensor | None                           # (p, p) of every pair, -1: no data; None of examples
    pairs: dict[int, Tensor]                        # by member the training pairs, a p + b, (n,)


def load(path: Path) -> Saved:
    """The networks in a file that `save` left. Raises UsageError for any other."""
    tensors, metadata = read(path)
    conditions, runs = json.loads(metadata["conditions"]), json.loads(metadata["runs"])
    table, width = tensors.pop("labels", None), (conditions["d"], conditions["H"]) if "d" in conditions else ()
    saved = Saved(conditions, {run["member"]: run for run in runs}, {}, None if table is None else table.long(), {})
    for name, tensor in tensors.items():
        member, moment, *parameter = name.split(".")
        if not parameter:
            saved.pairs[int(member)] = tensor.long()
            continue
        moments = saved.modules.setdefault(int(member), {})
        if moment not in moments:
            moments[moment] = module(conditions["model"], conditions["p"] or parity_sizes(conditions["task"])[0], width).to(tensor.dtype)
        getattr(moments[moment], parameter[0]).data = tensor
    return saved


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    names, header, at = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.whole(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(tensor.contiguous().numpy().tobytes())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises UsageError for a file that `write` did not leave so."""
    try:
        data = path.read_bytes()
        size = struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8: 8 + size])
        metadata, tensors = header.pop("__metadata__"), {}
        for name, entry in header.items():
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start + math.prod(shape) * dtype.itemsize != stop or 8 + size + stop > len(data):
                raise ValueError(name)
            tensors[name] = torch.frombuffer(bytearray(data[8 + size + start: 8 + size + stop]), dtype=dtype).reshape(shape)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; --save-weights leaves such files") from None
    except (struct.error, ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} is not a file of weights of this project, or is damaged; --save-weights leaves such files") from None
    return tensors, metadata


def file_name(cell: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]", "-", cell) + ".safetensors"


def save(folder: Path, ensemble: Ensemble, c: int) -> Path:
    """The file of cell number `c` of an `Ensemble` that kept its weights, in `folder`."""
    cell: Cell = ensemble.cells[c]
    runs, tensors = ensemble.rows(c).runs, {}
    dense = cell.model == "mlp_dense"                                   # of examples, not pairs
    plain = module(cell.model, parity_sizes(cell.task)[0] if dense else cell.p, cell.width)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    if not dense:
        tensors["labels"] = labels(cell.p, cell.task).int()
    for r in np.flatnonzero(ensemble.cell_of == c):
        member = int(ensemble.member[r])
        if not dense:
            tensors[f"{member}.pairs"] = ensemble.train_mask[r].nonzero()[:, 0].int()
        for moment, row in zip(MOMENTS, ensemble.moments(r), strict=True):
            for (name, shape), view in zip(shapes.items(), ensemble.layout.views(row) if row is not None else (), strict=row is not None):
                tensors[f"{member}.{moment}.{name}"] = view[..., : shape[-1]]
    path = folder / file_name(cell.name)
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {**{k: runs[0][k] for k in CELL_COLUMNS}, **cell.changed()}
    write(path, tensors, {"cell": cell.name, "conditions": json.dumps(conditions), "runs": json.dumps(runs)})
    return path
