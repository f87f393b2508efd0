"""Everything that only a GPU can show, in stages, most telling first. `make gpu-evidence` calls it, `make paper` for
the paper presets of all experiments alone; call it again until it says "complete".

A stage that passed is not run again; one that ran out of time or failed is. Each call takes at most --minutes, each stage at most what is
left of them, so that it also runs where a command may last ten minutes; an experiment that is stopped continues from its checkpoint.

OUT holds everything and nothing is written elsewhere: stages.csv says of every stage its outcome, seconds, the commit and the command;
logs/STAGE.txt is all that it printed; the results of an experiment lie in OUT/STAGE, tables of measurements in OUT/bench*. After every stage
the whole of OUT is packed again into --archive, evidence.tar.gz.0 and so on, at most 8 files of at most 16 MiB: tables and logs first, then
the checkpoints that still fit. On a machine that has nothing of the last one, --restore FOLDER with those files continues:

    python bench/gpu_evidence.py --out RESULTS --archive "$OUT" [--restore FOLDER] [--released FOLDER]

Exit code: 0 complete, 1 a stage failed or was left out, 2 it cannot start, 3 time is up and stages are left.

Usage: python bench/gpu_evidence.py [--released FOLDER] [--out results/gpu] [--minutes 9] [--again STAGE ...] [--paper] [--dry-run]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lab import early
    early.guard()

import argparse
import csv
import io
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
import zlib

import torch

from common import UsageError
from lab import console, files, provenance, settings

ROOT = provenance.ROOT
PYTHON = sys.executable
STAGES = {      # name -> command; {out} and {released} are filled in
    "tests": [PYTHON, "-m", "pytest", "-q", "-rs", "tests/test_triton.py", "tests/test_triton_compile.py"],
    "measurements": [PYTHON, "bench/gpu_measurements.py", "--out", "{out}/bench"],
    "bench": [PYTHON, "bench/bench_step.py", "--p", "59", "97", "--runs", "160", "--out", "{out}/bench"],
    **{f"bench_{model}": [PYTHON, "bench/bench_step.py", "--model", model, "--p", "59", "--runs", "160", "--out", "{out}/bench_" + model]
       for model in ("transformer", "transformer_ln")},
    "bench_sweep": [PYTHON, "bench/bench_step.py", "--sweep", "--out", "{out}/bench"],
    **{f"replay_{arithmetic}": [PYTHON, "exp_replay.py", "{released}", "--arithmetic", arithmetic, "--out", "{out}/replay_" + arithmetic]
       for arithmetic in ("ieee", "tf32x3")},
    **{f"{name}_paper": [PYTHON, f"exp_{name}.py", "--preset", "paper", "--out", "{out}/" + f"{name}_paper"]
       for name in ("delay_law", "fork", "logit_scale", "parity", "saturation")},
    **{f"{model}_paper": [PYTHON, "exp_transformer.py", "--model", model, "--preset", "paper", "--out", "{out}/" + f"{model}_paper"]
       for model in ("transformer", "transformer_ln", "transformer_b")},
}
COLUMNS = ("stage", "outcome", "seconds", "commit", "device", "command")
GRACE = 20                          # seconds between asking a stage to stop and ending it
PARTS, PART_BYTES = 8, 16 << 20     # of the archive
# Kernels are tested natively; JAX takes memory as it needs it, where it would take three quarters of the device at once
ENVIRONMENT = {"GROKKING_TEST_GPU": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}


def read(out: Path) -> dict[str, dict[str, str]]:
    """The stages that are in stages.csv. Raises UsageError if it is none of ours."""
    path = out / "stages.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = list(csv.DictReader(file))
    if not all(set(row) == set(COLUMNS) and None not in row.values() for row in rows):
        raise UsageError(f"{path} is no table of stages; remove it to run all of them, or name another folder with --out")
    return {row["stage"]: row for row in rows}


def write(rows: dict[str, dict[str, str]], out: Path) -> None:
    files.write_csv(out / "stages.csv", [rows[name] for name in STAGES if name in rows], COLUMNS)


def pack(out: Path, folder: Path) -> None:
    """All files of `out` into `folder`/evidence.tar.gz.0, .1, ...; what does not fit is named in the archive and printed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [path for path in out.rglob("*") if path.is_file() and folder not in path.parents]
    files.sort(key=lambda path: ("checkpoint" in path.relative_to(out).parts, path.stat().st_size, path))
    left_out, whole = [], folder / "evidence.tar.gz.part"
    with whole.open("wb") as stream, tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for path in files:
            if stream.tell() + path.stat().st_size > (PARTS - 1) * PART_BYTES:      # a part is left for what is on its way through the compressor
                left_out.append(str(path.relative_to(out)))
            else:
                archive.add(path, path.relative_to(out), recursive=False)
        names = tarfile.TarInfo("left_out.txt")
        text = "".join(f"{name}\n" for name in left_out).encode()
        names.size = len(text)
        archive.addfile(names, io.BytesIO(text))
    count = 0
    with whole.open("rb") as stream:
        while block := stream.read(PART_BYTES):
            part = folder / f"evidence.tar.gz.{count}"
            part.with_name("evidence.part").write_bytes(block)
            part.with_name("evidence.part").replace(part)
            count += 1
    whole.unlink()
    for stale in range(count, PARTS):
        (folder / f"evidence.tar.gz.{stale}").unlink(missing_ok=True)
    if left_out:
        print(f"too large for the archive, kept in {out} alone: {' '.join(left_out)}", flush=True)


def restore(folder: Path, out: Path) -> None:
    """What `pack` left in `folder` into `out`, the table of stages last: it says that the rest is there. Raises UsageError for a damaged archive."""
    parts = [folder / f"evidence.tar.gz.{count}" for count in range(PARTS)]
    data = b"".join(part.read_bytes() for part in parts if part.exists())
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            archive.extractall(out, sorted(archive.getmembers(), key=lambda member: member.name == "stages.csv"), filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"--restore {folder}: cannot unpack evidence.tar.gz.* ({error}); is a part missing? without it everything is run") from None


def run(command: list[str], log: Path, limit: float) -> str:
    """`ok`, `failed (code)` or `out of time`; everything it prints goes behind what `log` has."""
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)      # a terminal's Ctrl-C is for this command; the stage gets one signal, below
        try:
            code = process.wait(max(1.0, limit))
            return "ok" if code == 0 else f"failed ({code})"
        except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit) as reason:
            process.send_signal(signal.SIGTERM)     # an experiment writes its checkpoint
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "out of time" if isinstance(reason, subprocess.TimeoutExpired) else "stopped"


def preview(command: list[str]) -> bool:
    """Prints `command` and, of an experiment, what it would train. False if the experiment refuses it."""
    print(shlex.join(["python", *command[1:]]))
    if not command[1].startswith("exp_"):
        return True
    if not torch.cuda.is_available():
        command = ["ieee" if part == "tf32x3" else part for part in command]        # a CPU has no other
    asked = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in asked.stdout.splitlines() if " run-steps, " in line] if asked.returncode == 0 else asked.stderr.splitlines()
    print(*(f"    {line}" for line in said), sep="\n", flush=True)
    return asked.returncode == 0


def parse() -> argparse.Namespace:
    parser = settings.Parser(allow_abbrev=False, description="Tests, measurements, bench, replays and the paper presets on a GPU, in stages.")
    parser.add_argument("--released", type=Path, help="folder of the released .npz files; without it the replays are left out, aloud")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu", help="folder for everything: results, logs, what is done")
    parser.add_argument("--archive", type=Path, help="folder for the packed OUT, at most 8 files; default: OUT with .archive behind it")
    parser.add_argument("--restore", type=Path, help="folder with the archive of an earlier call; unpacked into OUT if that has no stages yet")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call")
    parser.add_argument("--again", nargs="+", choices=STAGES, default=[], help="stages to repeat though they passed")
    parser.add_argument("--paper", action="store_true", help="the paper presets of all experiments and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="show every stage's command, and what its experiment would train; no GPU is needed")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.archive = (options.archive or options.out.with_name(options.out.name + ".archive")).resolve()
    for name in ("out", "archive"):
        if getattr(options, name).is_file():
            raise UsageError(f"--{name} {getattr(options, name)} is a file; name a folder")
    if options.archive == options.out:
        raise UsageError(f"--archive {options.archive} is --out; name another folder")
    if options.restore and not (options.restore / "evidence.tar.gz.0").is_file():
        raise UsageError(f"--restore {options.restore}: no evidence.tar.gz.0 there")
    if not 0 < options.minutes < 1e6:
        raise UsageError(f"--minutes must be above 0, got {options.minutes:g}")
    if options.paper and (left := [name for name in options.again if not name.endswith("_paper")]):
        raise UsageError(f"--again {' '.join(left)}: not among the stages of --paper")
    if not (options.dry_run or torch.cuda.is_available()):
        raise UsageError("no CUDA device here; run it on a machine with one, or see with --dry-run what it would do")
    return options


def main() -> int:
    options = parse()
    chosen = {name: command for name, command in STAGES.items() if name.endswith("_paper") or not options.paper}
    deadline, out = time.monotonic() + 60 * options.minutes - GRACE, options.out
    released = options.released.resolve() if options.released and options.released.is_dir() else None
    left_out = [name for name, command in chosen.items() if "{released}" in command and released is None]
    for name in left_out:
        print(f"{name}: LEFT OUT, needs --released FOLDER" + (f"; {options.released} is none" if options.released else ""))
    wanted = {name: [part.format(out=out, released=released) for part in command] for name, command in chosen.items() if name not in left_out}
    if options.dry_run:
        return 0 if all([preview(command) for command in wanted.values()]) else 1       # all are shown, whatever the first says
    if options.restore and not (out / "stages.csv").exists():
        restore(options.restore, out)
    out.mkdir(parents=True, exist_ok=True)
    rows = {name: row for name, row in read(out).items() if name not in options.again}
    for name in options.again:          # an experiment does not repeat what is complete
        shutil.rmtree(out / name, ignore_errors=True)
    for name, command in wanted.items():
        if rows.get(name, {}).get("outcome") == "ok":
            print(f"{name}: passed before")
            continue
        if time.monotonic() > deadline - 5:
            print("time is up; the same command" + (" without --again" if options.again else "") + " continues")
            return 3
        code, start = provenance.origin(), time.monotonic()
        outcome = run(command, out / "logs" / f"{name}.txt", deadline - start)
        rows[name] = dict(zip(COLUMNS, (name, outcome, f"{time.monotonic() - start:.0f}", code["commit"] + "-dirty" * bool(code["dirty"]),
                                        torch.cuda.get_device_name(), shlex.join(["python", *chosen[name][1:]])), strict=True))
        write(rows, out)
        pack(out, options.archive)
        print(f"{name}: {outcome}, {rows[name]['seconds']} s", flush=True)
        if outcome in ("out of time", "stopped"):
            print(("stopped" if outcome == "stopped" else "time is up") + "; the same command" + (" without --again" if options.again else "") +
                  " continues")
            return 3
    missing = [name for name in chosen if rows.get(name, {}).get("outcome") != "ok"]
    print(f"failed or left out: {', '.join(missing)}" if missing else "complete")
    return 1 if missing else 0


if __name__ == "__main__":
    console.end(lambda: sys.exit(main()))
