"""Whatever is typed or fed: a run, or exit code 2 with one line on stderr. Configurations by hypothesis, released files by damage."""
import dataclasses
import io
import os
import random
import signal
import string
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

import exp_delay_law
import exp_fork
from common import UsageError
from kernels import cpu
from kernels.step import METRICS
from lab import desk, figures
from lab.released import read

EXAMPLES = int(os.environ.get("GROKKING_TEST_EXAMPLES", "120"))   # of each property
FUZZED = int(os.environ.get("GROKKING_TEST_FUZZED", "400"))       # damaged files of each kind
EXPERIMENTS = {"exp_delay_law": exp_delay_law, "exp_fork": exp_fork}

PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize="GROKKING_TEST_EXAMPLES" not in os.environ)
ODD = ("1e-3", "0.5", "1.15", "1e300", "nan", "-inf", "1e-320", "0", "-0", "1_0", "٣", "")
numbers = st.one_of(st.integers(-3, 200).map(str), st.sampled_from(ODD), st.floats(allow_nan=True).map(repr), st.text(string.printable, max_size=5))
several = st.lists(numbers, max_size=4)
CHOICES = {"--preset": ("smoke", "laptop", "paper", "none"), "--device": ("cpu", "auto", "tpu"), "--backend": ("eager", "auto", "triton", "x"),
           "--dtype": ("float32", "float64", "float16"), "--arithmetic": ("ieee", "tf32x3"), "--model": ("mlp", "cnn"),
           "--parts": ("dense", "oneshot", "moduli", "matrix", "concentration", "free", "same", "raised", "lowered", "none")}
FLAGS = ("--p", "--members", "--seeds", "--seed0", "--rhos", "--rho", "--lrs", "--lr", "--taus", "--train-fracs", "--weight-decays", "--moduli",
         "--moduli-seeds", "--free-moduli", "--free-seeds", "--after-grok", "--fork-steps", "--budget", "--twin-of", "--resume", "--what", "--")


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    words = []
    for flag in draw(st.lists(st.sampled_from([*CHOICES, *FLAGS]), max_size=5)):
        words += [flag, *draw(st.lists(st.sampled_from(CHOICES[flag]), min_size=1, max_size=2) if flag in CHOICES else several)]
    return words


@st.composite
def likely_flags(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Mostly possible, small enough to run."""
    name = draw(st.sampled_from([*EXPERIMENTS]))
    S = draw(st.integers(1, 5))
    members = draw(st.lists(st.integers(0, S), min_size=1, max_size=2, unique=True))
    ps = draw(st.lists(st.integers(2, 13), min_size=1, max_size=2, unique=True))
    rhos = draw(st.lists(st.sampled_from([0.85, 1.0, 1.04, 1.15, 1.3, 5.0]), min_size=1, max_size=3, unique=True))
    words = ["--preset", "smoke", "--backend", "eager", "--members", *members, "--p", *ps]
    words += ["--dtype", draw(st.sampled_from(["float32", "float64"])),
             "--after-grok", draw(st.sampled_from([0, 0, 200, 30])), "--seed0", draw(st.sampled_from([0, 7]))]
    if name == "exp_delay_law":
        parts = draw(st.lists(st.sampled_from(exp_delay_law.PARTS), min_size=1, max_size=2, unique=True))
        rates = draw(st.lists(st.sampled_from([1e-3, 4e-3]), min_size=1, unique=True))
        words += ["--parts", *parts, "--lrs", *(rates if "matrix" in parts else rates[:1])]
        read_by = {field.name: field.metadata["parts"] for field in dataclasses.fields(exp_delay_law.Config)}
        for flag, given in (("seeds", [S]), ("moduli_seeds", [S]), ("free_seeds", [S]), ("rhos", rhos)):
            words += ["--" + flag.replace("_", "-"), *given] if {*read_by[flag]} & {*parts} else []
    else:
        steps = draw(st.lists(st.sampled_from([50, 100, 125]), min_size=1, max_size=2, unique=True))
        words += ["--seeds", S, "--rho", *rhos, "--fork-steps", *steps, "--budget", draw(st.sampled_from([150, 175, 100]))]
    return name, [str(word) for word in words]


def command(run: callable, words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command; anything but those two, an exception say, goes through."""
    stderr, stdout, argv, handler = sys.stderr, sys.stdout, sys.argv, signal.signal
    sys.stderr, sys.stdout, sys.argv, signal.signal = io.StringIO(), io.StringIO(), ["exp.py", *words], lambda *_: None
    try:
        desk.main(run)
    except SystemExit as end:
        return end.code, sys.stderr.getvalue()
    finally:
        sys.stderr, sys.stdout, sys.argv, signal.signal = stderr, stdout, argv, handler
    raise AssertionError("main came back")


def one_line(errors: str) -> bool:
    return errors.startswith("error: ") and errors.endswith("\n") and errors.count("\n") == 1


@settings(PATIENT, max_examples=EXAMPLES)
@given(st.sampled_from([*EXPERIMENTS]), flags())
@example("exp_fork", ["--what", "a\nb"])
def test_any_words_are_a_plan_or_one_line(name: str, words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        code, errors = command(EXPERIMENTS[name].run, [*words, "--dry-run", "--out", f"{folder}/out"])
        event(f"exit code {code}")
        assert (code, errors) == (0, "") or (code == 2 and one_line(errors)), (words, code, errors)
        assert not os.listdir(folder)


def instantly(kernels: object, params: object, moment1: object, *rest: object) -> list[float]:
    """In place of training: memorised at the first evaluation, grokked some steps later, the norm random enough for fits."""
    moment1[0] += 25
    return [float(name == "train_accuracy" or moment1[0] > 125) if "accuracy" in name else 1 + 0.01 * float(params[0]) for name in METRICS]


@settings(PATIENT, max_examples=EXAMPLES // 5)
@given(likely_flags())
def test_any_configuration_runs_or_is_one_line(drawn: tuple[str, list[str]]) -> None:
    """From the command line to the tables and figures; only the arithmetic of the steps is left out. Then again, as --figures-only."""
    name, words = drawn
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(cpu, "advance", instantly)
        patch.setattr(figures, "save_figure", lambda *_: None)
        out = Path(folder) / "out"
        code, errors = command(EXPERIMENTS[name].run, [*words, "--out", str(out)])
        event(f"exit code {code}")
        if code == 0:
            assert not errors and {"runs.csv", "cells.csv", "trajectories.csv", "summary.json"} <= {path.name for path in out.iterdir()}
            before = (out / "cells.csv").read_bytes()
            code, errors = command(EXPERIMENTS[name].run, [*words, "--out", str(out), "--figures-only"])
            assert code == 0 and not errors and (out / "cells.csv").read_bytes() == before
        else:
            assert code == 2 and one_line(errors) and not out.exists(), (words, code, errors)


def released(forked: bool = False) -> dict:
    common = dict(p=7, alpha=0.4, lam=1.0, lr=1e-3, steps=np.array([1.0, 50.0]), logit_scale=np.array([1.0, 2.0]))
    if forked:
        return dict(common, arm="clamp_raised", t_fork=100, n_seed=2, rho=1.15, N0=np.ones(2), target=np.ones(2), T_mem_per_seed=np.array([50, 50]),
                    T_grok_per_seed=np.array([-1, 200]))
    return dict(common, max_steps=50, arm="clamp", rho=1.0, wc_used=9.0, t_int=10, tau=1.0, loss="ce", T_mem_per_seed=np.array([25, -1]),
                T_grok_per_seed=np.array([-1, 50]))


def packed(arrays: dict, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def npy(descr: str, shape: str) -> bytes:
    """A .npy file that claims `shape` and holds 64 bytes."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def with_member(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A released run with one array replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed(released()))) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.namelist():
            if entry != name:
                new.writestr(entry, old.read(entry))
        new.writestr(name, content)
    return buffer.getvalue()


def damaged(chance: random.Random) -> list[bytes]:
    out = []
    for good in (packed(released()), packed(released(forked=True)), packed(released(), compressed=True)):
        for _ in range(FUZZED // 3):
            data = bytearray(good)
            for _ in range(chance.choice((1, 1, 3, 20))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            out.append(bytes(data))
        out += [good[: chance.randrange(len(good))] for _ in range(FUZZED // 6)]
    return out


def foreign(marker: Path) -> list[bytes]:
    odd = [np.array(0), np.array(np.nan), np.array([]), np.zeros((2, 2)), np.array("x"), np.array(b"x"), np.array(1j), np.array([1, np.nan]),
           np.inf, -1, 2**63, np.zeros(2, dtype=[("a", "f8")]), np.array(["x", "y"]), np.array([np.inf, 1]),
           np.array("2020-01-01", "M8[D]"), True, np.float16(7), 1e308]
    out = [packed({**released(forked), key: value}) for forked in (False, True) for key in released(forked) for value in odd]
    out += [packed({**released(), "arm": "alloc", "gamma": 0.3, "wn_E": np.ones(2), "wn_W1": np.ones(2), **changed})
            for value in odd for changed in ({}, {"wn_W2": value}, {"wn_W2": np.array([value])})]
    out += [packed({**released(), key: np.array([Payload(marker)], dtype=object)}) for key in released()]
    shapes = "(1000000000000,)", "(-1,)", "(2**70,)", "(1000000,1000000)", f"({2**62},)", "'x'", "()", "9" * 5000
    out += [with_member("p.npy", npy("'<f8'", shape)) for shape in shapes]
    descriptions = "'|O'", "'<f8' * 10**9", "[('a', '<f8')]", "'V0'", "{}", "[" * 4000, "'<U999999999'"
    out += [with_member("p.npy", npy(description, "(1,)")) for description in descriptions]
    out.append(with_member("steps.npy", npy("'<f8'", f"({10**8},)")[:-64] + bytes(2 * 10**8), zipfile.ZIP_DEFLATED))   # 200 MB in 200 KB
    return [*out, with_member("p", b"7"), with_member("p.npy", b""), with_member("../p.npy", b"x"), b"", b"\x80\x04K\x07.", b"PK\5\6" + bytes(18)]


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_no_released_file_crashes_hangs_or_is_executed(tmp_path: Path, kind: str) -> None:
    marker, path, outcomes = tmp_path / "executed", tmp_path / "cell.npz", {"taken": 0, "refused": 0}
    contents = damaged(random.Random(0)) if kind == "damaged" else foreign(marker)
    for data in contents:
        path.write_bytes(data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                item = read(path, "cell", ())
                assert 2 <= item.cell.p <= 1000 and np.isfinite([item.cell.lr, item.cell.tau, *np.ravel(item.cell.held)]).all()
                outcomes["taken"] += 1
            except UsageError as error:
                assert str(error).startswith("cell: ") and "\n" not in str(error)
                outcomes["refused"] += 1
        assert not said, [str(warning.message) for warning in said]
    print(kind, outcomes)
    assert outcomes["refused"] > len(contents) / 2 and len(contents) >= (FUZZED if kind == "damaged" else 500) and not marker.exists()
