"""The C++ step against its definition, its bits whatever surrounds a run, and what happens where a compiler or a cache folder fails."""
import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import EPS32, assert_accurate, references
from torch import Tensor
from torch._inductor import cpp_builder

from common import n_train
from kernels import build, cpu
from kernels.adamw import PLAIN
from kernels.layout import mlp_layout, transformer_layout
from kernels.step import METRICS, evaluate_ref, train_step_ref
from lab.draws import initial_rows, split

pytestmark = pytest.mark.skipif(not cpu.has_compiler(), reason="no C++ compiler here: the C++ step cannot be tested")

TINY = (5, 16, 16)                         # p, d, H
MARKS = (1, 10, 100)                       # steps at which an error is looked at
CODE_PATHS = {                             # p, d, H, dtype
    "papers": (59, 128, 256, torch.float32),
    "left_over_column": (97, 16, 32, torch.float32),         # 97 is 1 mod 16
    "power_of_two": (16, 32, 64, torch.float32),
    "three_vectors": (41, 16, 48, torch.float32),            # H / 16 is no multiple of 4, three vectors of logits, ragged tiles
    "tiny": (2, 16, 16, torch.float32),
    "double": (59, 16, 32, torch.float64),
    "double_left_over": (17, 16, 32, torch.float64),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small gain nothing from a second thread, and where other work shares the machine they wait for it."""
    with cpu.single_thread():
        yield


class Problem:
    """One run: its rows scaled by `scale`, its pairs, and scalars of `k` steps."""

    def __init__(self, p: int, d: int, H: int, dtype: torch.dtype, loss: str = "ce", tau: float = 1.0, scale: float = 1.0, held: Sequence[float] = (),
                 decay_last: bool = False, k: int = 1, lr: float = 1e-3):
        self.layout, self.dtype, self.loss, self.decay_last = mlp_layout(p, d, H, dtype), dtype, loss, decay_last
        row = scale * initial_rows(self.layout, 1, 0, (0,), torch.float64)[0]
        gradient = torch.randn(len(row), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for x in (row, gradient):
            _, _, W2, b1, b2 = self.layout.views(x)
            b1 += 0.1 * scale
            b2 -= 0.1 * scale
            W2[:, p:], b2[p:], x[sum(self.layout.sizes):] = 0, 0, 0
        # moments as they are in mid-training: at zero, Adam's quotient would turn the rounding of a small gradient into a whole step
        rows = row, 1e-2 * gradient, 1e-4 * (1 + gradient.square()) * (gradient != 0)
        self.rows = [x.float().to(dtype) for x in rows]      # the same numbers in every type
        index = split(p, n_train(p, 0.1 if p == 97 else 0.4), 0, 0) if p > 2 else torch.tensor([0, 3])
        self.a, self.b = index // p, index % p
        self.train = torch.zeros(p * p, dtype=dtype)
        self.train[index] = 1
        t = np.arange(51, 51 + k)
        scalars = np.zeros((k, 11))
        scalars[:, 0], scalars[:, 1], scalars[:, 2], scalars[:, 3] = tau, 1 - lr, lr / (1 - 0.9**t), np.sqrt(1 - 0.999**t)
        scalars[:, 4: 4 + len(held)], scalars[:, 8:] = held, PLAIN
        self.scalars = torch.from_numpy(scalars).float().to(dtype)

    def kernels(self) -> cpu.CpuKernels:
        kernels = cpu.CpuKernels(self.layout, len(self.a), self.loss, self.dtype, True, self.decay_last)
        assert kernels.backend == "compiled"
        return kernels

    def copies(self) -> list[Tensor]:
        return [row.clone() for row in self.rows]

    def by_definition(self, dtype: torch.dtype) -> list[Tensor]:
        rows = [row.to(dtype, copy=True) for row in self.rows]
        out = []
        for step, row in enumerate(self.scalars.to(dtype), start=1):
            train_step_ref(*rows, self.a, self.b, row, self.layout, self.loss, self.decay_last)
            if step in MARKS:
                out += [row.clone() for row in rows]
        return out

    def metrics_by_definition(self, dtype: torch.dtype) -> list[Tensor]:
        args = (t.to(dtype) for t in (self.rows[0], self.train))
        return list(evaluate_ref(*args, self.a, self.b, self.scalars[0, 0].to(dtype), self.layout, self.loss))


def check(rows: Sequence[Tensor], problem: Problem) -> None:
    """`rows`: those of the run after each of `MARKS` that it has reached."""
    names = [f"{name} after {steps} steps" for steps in MARKS for name in ("params", "moment1", "moment2")]
    for name, row, reference in zip(names, rows, references(problem.dtype, problem.by_definition), strict=False):
        assert_accurate(name, row, reference)


HARD = {
    "plain": {},
    "stablemax": {"loss": "stablemax", "tau": 1.7},
    "stablemax_of_hundreds": {"loss": "stablemax", "scale": 4.0},
    "mse_decay_last": {"loss": "mse", "decay_last": True},
    "saturated": {"scale": 4.0},           # logits of hundreds: exponentials underflow, gradient rows are exactly 0
    "tiny_logits": {"scale": 1e-3},
    "hot": {"tau": 50.0},
    "cold": {"tau": 0.02},
    "held": {"held": (9.0,)},
    "held_groups": {"held": (0.0, 3.0, 4.0, 5.0)},
}


@pytest.mark.parametrize("path", CODE_PATHS)
def test_a_step_agrees_with_the_definition_on_every_code_path(path: str) -> None:
    for options in ({}, {"loss": "mse", "tau": 1.7, "decay_last": True, "held": (20.0, 0.0, 5.0, 0.0)}):
        problem = Problem(*CODE_PATHS[path], **options)
        rows = problem.copies()
        problem.kernels().steps(*rows, problem.a, problem.b, problem.scalars)
        check(rows, problem)


@pytest.mark.parametrize("case", HARD)
def test_a_step_agrees_with_the_definition_on_hard_inputs(case: str) -> None:
    problem = Problem(*CODE_PATHS["three_vectors"], **HARD[case])
    rows = problem.copies()
    problem.kernels().steps(*rows, problem.a, problem.b, problem.scalars)
    check(rows, problem)


@pytest.mark.parametrize("case", HARD)
def test_an_evaluation_agrees_with_the_definition(case: str) -> None:
    for path in ("three_vectors", "double_left_over", "tiny"):
        problem = Problem(*CODE_PATHS[path], **HARD[case])
        found = problem.kernels().evaluate(problem.rows[0], problem.train, problem.a, problem.b, problem.scalars[0, 0])
        exact, plain = (torch.stack(problem.metrics_by_definition(dtype)) for dtype in (torch.float64, problem.dtype))
        # shares are counts: those of float32 are float32's, and a pair at a threshold may fall on either side of it
        counted = torch.tensor(["accuracy" in name or name in ("saturated", "collapse32", "collapse64", "sum_exp_is_one", "zero_gradient_rows")
                                for name in METRICS])
        assert ((found - plain).abs()[counted] * problem.layout.p**2 <= 1.01 * problem.layout.p**2 / len(problem.a)).all(), (case, path)
        eps = torch.finfo(problem.dtype).eps
        scale = exact.abs() + float(exact[METRICS.index("logit_scale")])     # a loss is a difference of logits
        difference = METRICS.index("max_gradient_difference")
        assert abs(found[difference] - plain[difference]) <= 8 * EPS32 * (1 + scale[METRICS.index("logit_scale")])
        counted[difference] = True
        assert ((found - exact).abs() <= 8 * eps * scale)[~counted].all(), (case, path, found - exact)


def test_gelu_is_that_of_float64_to_four_ulps_and_its_tail_does_not_cancel() -> None:
    layout = mlp_layout(*CODE_PATHS["power_of_two"])
    row = torch.zeros(layout.n_params)
    _, _, W2, b1, _ = layout.views(row)
    W2[:16] = torch.eye(16)                # with no embedding, the logits of every pair are gelu(b1)
    kernels = cpu.CpuKernels(layout, 1, "mse", torch.float32, True)
    for x in torch.linspace(-8, 8, 129, dtype=torch.float64):
        b1.fill_(float(x))
        found = kernels.evaluate(row, torch.ones(256), None, None, torch.tensor(1.0))[METRICS.index("logit_scale")] / 4
        h = float((x * torch.special.erfc(-x / 2**0.5) / 2).abs())
        assert abs(float(found) - h) <= 4 * EPS32 * h, float(x)


def test_error_after_many_steps_is_that_of_float32() -> None:
    problem = Problem(*TINY, torch.float32, k=MARKS[-1], held=(6.0,))
    kernels, rows, found = problem.kernels(), problem.copies(), []
    for start, stop in itertools.pairwise((0, *MARKS)):
        kernels.steps(*rows, problem.a, problem.b, problem.scalars[start:stop])
        found += [row.clone() for row in rows]
    check(found, problem)


def test_the_held_norm_is_exact_and_padding_stays_zero() -> None:
    problem = Problem(41, 16, 48, torch.float32, k=10, held=(9.0,))
    rows, layout = problem.copies(), problem.layout
    problem.kernels().steps(*rows, problem.a, problem.b, problem.scalars)
    assert abs(float(rows[0][: layout.n_weights].double().norm()) - 9) < 9 * EPS32
    assert layout.views(rows[0])[2][:, layout.p:].abs().max() == 0 and layout.views(rows[0])[4][layout.p:].abs().max() == 0


def test_bits_depend_on_nothing_but_the_run() -> None:
    problem = Problem(41, 16, 48, torch.float32, k=6, held=(9.0,))
    kernels = problem.kernels()
    once = problem.copies()
    kernels.steps(*once, problem.a, problem.b, problem.scalars)
    metrics = kernels.evaluate(once[0], problem.train, problem.a, problem.b, problem.scalars[0, 0])

    def same(rows: list[Tensor]) -> bool:
        again = kernels.evaluate(rows[0], problem.train, problem.a, problem.b, problem.scalars[0, 0])
        return all(map(torch.equal, once, rows)) and torch.equal(again, metrics)

    repeated, split_up = problem.copies(), problem.copies()
    kernels.steps(*repeated, problem.a, problem.b, problem.scalars)
    assert same(repeated)
    for part in (problem.scalars[:1], problem.scalars[1:3], problem.scalars[3:]):
        kernels.steps(*split_up, problem.a, problem.b, part)
        kernels.evaluate(split_up[0], problem.train, problem.a, problem.b, problem.scalars[0, 0])
    assert same(split_up)
    shifted = [torch.cat([row.new_zeros(1 + i), row])[1 + i:] for i, row in enumerate(problem.rows)]     # 4, 8 and 12 bytes off
    kernels.steps(*shifted, problem.a, problem.b, problem.scalars)
    assert same(shifted)
    threaded = [problem.copies() for _ in range(3)]
    threads = [threading.Thread(target=kernels.steps, args=(*rows, problem.a, problem.b, problem.scalars)) for rows in threaded]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(same, threaded))


def test_a_broken_run_is_seen() -> None:
    problem = Problem(*TINY, torch.float32)
    kernels = problem.kernels()
    problem.rows[0][3] = torch.nan
    metrics = kernels.evaluate(problem.rows[0], problem.train, problem.a, problem.b, problem.scalars[0, 0])
    assert not torch.isfinite(metrics[[METRICS.index("train_loss"), METRICS.index("norm")]]).any()


# -- compilers and folders that fail


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`tools(**scripts)`: only these compilers, and an empty cache folder, which it returns. `REAL` in a script is a compiler that works.
    Nothing is optimised: it is not the code that is looked at."""
    real = build.compilers()[0]

    def install(cache: str = "cache folder", **scripts: str) -> Path:
        (tmp_path / "bin").mkdir()
        for name, script in scripts.items():
            path = tmp_path / "bin" / name.replace("pp", "++")
            path.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\n' + script.replace("REAL", real) + "\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
        monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
        monkeypatch.setattr(build, "COMPILERS", tuple(name.replace("pp", "++") for name in scripts))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        return tmp_path / cache / "grokking-lab"

    monkeypatch.setattr(cpu.CpuKernels, "unusable", False)
    with contextlib.ExitStack() as stack:
        for cached in (cpu.fused_library, build.version):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield install


def backend() -> str:
    return cpu.CpuKernels(mlp_layout(*TINY), 10, "ce", torch.float32, True).backend


CRASHES = """#include <cmath>
#include <cstring>
#include <utility>
namespace std { inline void* fault(void*, int, unsigned long) { __builtin_trap(); } }
#define memset fault
"""


@pytest.mark.parametrize(("script", "reason"), [
    ("echo 'error: licence expired' >&2; exit 1", "g++: ended with code 1 (error: licence expired)"),
    ("kill -SEGV $$", "g++: ended with code -11"),
    ('for last; do :; done; echo text > "$last"', "g++: "),
    ('for last; do :; done; REAL -shared -fPIC -x c++ /dev/null -o "$last"', "g++: "),
    ('REAL "$@" -DCLASSES=4', "its code is wrong"),
    (f'echo "{CRASHES}" > "$0.h"; REAL -include "$0.h" "$@"', "its code crashes"),
])
def test_a_compiler_that_breaks_leaves_the_definition(tools: Callable, script: str, reason: str, capfd: pytest.CaptureFixture) -> None:
    cache = tools(gpp=script)
    assert backend() == backend() == "eager"
    said = capfd.readouterr().err.strip()
    assert reason in said and "\n" not in said and said.startswith("the step runs eagerly"), said
    assert not list(cache.iterdir())


def test_every_compiler_that_breaks_is_named(tools: Callable, capfd: pytest.CaptureFixture) -> None:
    tools(gpp="exit 3", clangpp="exit 4")
    assert backend() == "eager" and capfd.readouterr().err.endswith(": g++: ended with code 3; clang++: ended with code 4\n")


def test_a_transformer_without_a_working_compiler_keeps_its_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       capfd: pytest.CaptureFixture) -> None:
    """Inductor's errors are pages; it finds nothing in the cache of an earlier run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "COMPILERS", ("absent++",))
    monkeypatch.setattr(cpu.CpuKernels, "unusable", False)
    cpp_builder.cpp_compiler_search.cache_clear()
    for p in (3, 5):
        assert cpu.CpuKernels(transformer_layout(p, 16, 16), 4, "ce", torch.float32, True).backend == "eager"
    said = capfd.readouterr().err.strip()
    assert "No working C++ compiler" in said and said.startswith("the step runs eagerly") and "\n" not in said


def test_the_next_compiler_is_taken(tools: Callable) -> None:
    cache = tools(gpp="exit 1", clangpp='exec REAL "$@"')
    assert backend() == "compiled" and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("fault", ["a file in its place", "full", "forbids execution", "no home"])
def test_a_cache_folder_that_fails_costs_a_compilation_only(tools: Callable, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capfd: pytest.CaptureFixture) -> None:
    into_cache = 'for last; do :; done; case "$last" in *"cache folder"*) {} ;; esac; exec REAL "$@"'
    scripts = {"full": into_cache.format("echo No space left on device >&2; exit 1"),
               "forbids execution": into_cache.format('echo text > "$last"; exit 0')}        # the loader refuses either in the same way
    cache = tools(gpp=scripts.get(fault, 'exec REAL "$@"'))
    if fault == "a file in its place":
        cache.parent.write_text("")
    if fault == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert backend() == "compiled" and not capfd.readouterr().err
    assert not cache.is_dir() or not list(cache.iterdir())
    assert list(build.own_folder().glob("fused_step-*.so"))


def test_a_cached_object_is_used_and_a_damaged_one_replaced(tools: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    cache = tools(gpp=f'echo >> "{count}"; exec REAL "$@"')
    for damage, compilations in ((False, 1), (False, 1), (True, 2)):
        if damage:                         # in another folder, for what this process has loaded once is not read again; the loaded file stays whole
            [kept] = cache.iterdir()
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
            moved = tmp_path / "another" / cache.name / kept.name
            moved.parent.mkdir(parents=True)
            moved.write_bytes(b"damaged")
        assert backend() == "compiled" and len(count.read_text()) == compilations
        cpu.fused_library.cache_clear()


def test_two_processes_with_an_empty_cache(tmp_path: Path) -> None:
    code = ("import torch; from kernels import cpu; from kernels.layout import mlp_layout; "
            "print(cpu.CpuKernels(mlp_layout(5, 16, 16), 10, 'ce', torch.float32, True).backend)")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    root = Path(__file__).resolve().parents[1]
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    assert [process.communicate(timeout=300) for process in both] == [("compiled\n", "")] * 2
    assert len(list((tmp_path / "grokking-lab").iterdir())) == 1


@pytest.mark.parametrize("dtype, gap", [(torch.float32, 15.0), (torch.float64, 35.0)])
def test_a_nearly_saturated_pair_keeps_the_residual_of_its_probability(dtype: torch.dtype, gap: float) -> None:
    """What is left of p - 1 is a few units in the last place of 1, and says when a run leaves softmax collapse: it must be rounded there, as in
    the definition, before the mean is taken. Of one pair and a network of biases alone the gradient of b2 is that of the logits."""
    layout, tau = mlp_layout(2, 16, 16, dtype), 1.7
    row = torch.zeros(layout.n_params, dtype=dtype)
    layout.views(row)[4][1] = -gap * tau
    a = b = torch.zeros(1, dtype=torch.int64)
    scalars = torch.tensor([[tau, 1.0, 1e-3, 1.0, 0, 0, 0, 0, *PLAIN]], dtype=dtype)
    found = []
    for step in (cpu.FusedStep(cpu.fused_library(layout, dtype), layout, "ce", dtype).steps,
                 lambda *args: train_step_ref(*args[:5], args[5][0], layout, "ce")):
        moment1 = torch.zeros_like(row)
        step(row.clone(), moment1, torch.zeros_like(row), a, b, scalars)
        found.append(float(layout.views(moment1)[4][0]))
    assert found[1] < 0 and found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("p", [29, 59, 97, 113])    # fewer columns than lanes, 1 to 4 columns a lane
def test_the_softmax_adds_its_exponentials_in_the_order_of_torchs_cuda_kernel(p: int) -> None:
    """Lane l of 32 adds columns l, l + 32, ..., then lanes are added by halves: each exponential here is lost beside 1 and counts beside another."""
    layout = mlp_layout(p, 16, 16, torch.float32)
    row = torch.zeros(layout.n_params)
    layout.views(row)[4][1:] = -16.9
    a = b = torch.zeros(1, dtype=torch.int64)
    moment1 = torch.zeros_like(row)
    cpu.FusedStep(cpu.fused_library(layout, torch.float32), layout, "ce", torch.float32).steps(
        row, moment1, torch.zeros_like(row), a, b, torch.tensor([[1.0, 1.0, 1e-3, 1.0, 0, 0, 0, 0, *PLAIN]]))
    lanes = np.zeros(32, np.float32)
    for column in range(p):
        lanes[column % 32] += np.exp(np.float32(-16.9 * (column > 0)))
    while len(lanes) > 1:
        lanes = lanes[:len(lanes) // 2] + lanes[len(lanes) // 2:]
    in_columns_order = np.float32(1)
    for _ in range(1, p):
        in_columns_order += np.exp(np.float32(-16.9))
    assert in_columns_order == 1 < lanes[0]
    assert float(layout.views(moment1)[4][0]) == pytest.approx(0.1 * float(np.float32(1) / lanes[0] - np.float32(1)), rel=1e-6)
