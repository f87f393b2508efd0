"""Everything that only a GPU can show, in stages, most telling first. `make gpu-evidence` calls it, `make paper` for
the paper presets of all experiments alone; call it again until it says "complete".

A stage that passed is not run again; one that ran out of time or failed is. Each call takes at most --minutes, each stage at most what is
left of them, so that it also runs where a command may last ten minutes; an experiment that is stopped continues from its checkpoint.
OUT/gpu_evidence.csv says of every stage: its outcome, seconds, the commit and the command; OUT/gpu_evidence_STAGE.txt is the end of what
it printed. Exit code: 0 complete, 1 a stage failed or was left out, 3 time is up and stages are left.

Usage: python bench/gpu_evidence.py --released FOLDER [--out results/bench] [--minutes 9] [--again STAGE ...] [--paper]
"""
import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
REPLAYED = ["mediation/*", "dose/*", "collapse/*", "alloc/*", "samestate/*", "transformer/*"]
STAGES = {      # name -> command; {out} and {released} are filled in
    "tests": [PYTHON, "-m", "pytest", "-q", "-rs", "tests/test_triton.py", "tests/test_triton_compile.py"],
    "measurements": [PYTHON, "bench/gpu_measurements.py", "--out", "{out}"],
    "bench": [PYTHON, "bench/bench_step.py", "--p", "59", "97", "--runs", "160", "--out", "{out}"],
    **{f"bench_{model}": [PYTHON, "bench/bench_step.py", "--model", model, "--p", "59", "--runs", "160", "--out", "{out}_" + model]
       for model in ("transformer", "transformer_ln")},
    "bench_sweep": [PYTHON, "bench/bench_step.py", "--sweep", "--out", "{out}"],
    "replay_ieee": [PYTHON, "exp_replay.py", "{released}", "--match", *REPLAYED, "--arithmetic", "ieee", "--out", "results/replay/ieee"],
    "replay_tf32x3": [PYTHON, "exp_replay.py", "{released}", "--match", *REPLAYED, "--arithmetic", "tf32x3", "--out", "results/replay/tf32x3"],
    **{f"{name}_paper": [PYTHON, f"exp_{name}.py", "--preset", "paper", "--out", f"results/{name}/paper"]
       for name in ("delay_law", "fork", "logit_scale")},
    **{f"{model}_paper": [PYTHON, "exp_transformer.py", "--model", model, "--preset", "paper", "--out", f"results/transformer/{model}_paper"]
       for model in ("transformer", "transformer_ln")},
    "transformer_b_paper": [PYTHON, "exp_transformer.py", "--model", "transformer_b", "--w-c", "32.49242", "--preset", "paper",
                            "--out", "results/transformer/transformer_b_paper"],
}
COLUMNS = ("stage", "outcome", "seconds", "commit", "device", "command")
GRACE = 20      # seconds between asking a stage to stop and ending it


def read(out: Path) -> dict[str, dict[str, str]]:
    path = out / "gpu_evidence.csv"
    return {row["stage"]: row for row in csv.DictReader(path.open())} if path.exists() else {}


def write(rows: dict[str, dict[str, str]], out: Path) -> None:
    part = out / "gpu_evidence.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in STAGES if name in rows)
    part.replace(out / "gpu_evidence.csv")


def run(command: list[str], log: Path, limit: float) -> str:
    """`ok`, `failed (code)` or `out of time`; the last 20,000 characters of the output go to `log`."""
    environment = {**os.environ, "GROKKING_TEST_GPU": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=max(1.0, limit))
        outcome = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)     # an experiment writes its checkpoint
        try:
            output, _ = process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        outcome = "out of time"
    log.write_text(output[-20_000:])
    return outcome


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests, measurements, bench, replays and the paper presets on a GPU, in stages.")
    parser.add_argument("--released", type=Path, help="folder of the released .npz files; without it the replays are left out, aloud")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder for tables and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call")
    parser.add_argument("--again", nargs="+", choices=STAGES, default=[], help="stages to repeat though they passed")
    parser.add_argument("--paper", action="store_true", help="the paper presets of all experiments and nothing else")
    settings = parser.parse_args()
    if (ROOT / settings.out).is_file():
        parser.error(f"--out {settings.out} is a file; name a folder")
    if not 0 < settings.minutes < 1e6:
        parser.error(f"--minutes must be above 0, got {settings.minutes:g}")
    return settings


def main() -> int:
    settings = parse()
    if not torch.cuda.is_available():
        print("error: no CUDA device here; run it on a machine with one", file=sys.stderr)
        return 2
    chosen = {name: command for name, command in STAGES.items() if name.endswith("_paper") or not settings.paper}
    if left := set(settings.again) - set(chosen):
        print(f"error: --again {' '.join(sorted(left))}: not among the stages of --paper", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * settings.minutes - GRACE
    out = ROOT / settings.out
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    rows = {name: row for name, row in read(out).items() if name not in settings.again}
    for command in (STAGES[name] for name in settings.again if "--out" in STAGES[name]):   # an experiment does not repeat what is complete
        (ROOT / command[command.index("--out") + 1] / "runs.csv").unlink(missing_ok=True)
    for name, command in chosen.items():
        if "{released}" in command and settings.released is None:
            print(f"{name}: LEFT OUT, needs --released FOLDER")
            continue
        if rows.get(name, {}).get("outcome") == "ok":
            print(f"{name}: passed before")
            continue
        if time.monotonic() > deadline - 5:
            print("time is up; the same command" + (" without --again" if settings.again else "") + " continues")
            return 3
        filled = [part.format(out=settings.out, released=settings.released and settings.released.resolve()) for part in command]
        start = time.monotonic()
        outcome = run(filled, out / f"gpu_evidence_{name}.txt", deadline - start)
        rows[name] = dict(zip(COLUMNS, (name, outcome, f"{time.monotonic() - start:.0f}", commit, torch.cuda.get_device_name(),
                                        " ".join(["python", *command[1:]])), strict=True))
        write(rows, out)
        print(f"{name}: {outcome}, {rows[name]['seconds']} s", flush=True)
        if outcome == "out of time":
            print("time is up; the same command" + (" without --again" if settings.again else "") + " continues")
            return 3
    missing = [name for name in chosen if rows.get(name, {}).get("outcome") != "ok"]
    print(f"failed or left out: {', '.join(missing)}" if missing else "complete")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
