"""What a machine without a GPU can prove of the compiled kernels: that they compile, arithmetic, registers, stack, the order of memory.

A sample here; `make compile-all` builds every launch that the experiments, the kernels' tests and `bench/` make.
"""
import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here: its kernels are NOT compiled")
from launches import EXPERIMENTS, MODES, Launch, dense_launches, of_bench, of_experiments, recording, step_launches
from sm90 import build, check, kind, kinds

import kernels.dialect
import kernels.matmul
from kernels.layout import mlp_layout, model_layout, transformer_layout


def assert_sound(found: dict[str, Launch]) -> None:
    for launch in found.values():
        row = build(launch)
        print(f"{row.kernel:24}", *(f"{name} {value}" for name, value in row._asdict().items() if name not in ("kernel", "asm")), sep="  ")
        check(row)
        assert row.seconds <= 20, f"{row.kernel}: {row.seconds} s to compile"        # about 1 s on one idle core


@pytest.mark.parametrize(("p", "mode"), [(29, MODES[0]), (59, MODES[1]), (97, MODES[2])], ids=["p=29", "p=59, tf32x3", "p=97, float64"])
def test_mlp(p: int, mode: tuple[torch.dtype, str]) -> None:
    """One modulus for each width of a row of logits, one in each mode."""
    found = kinds(step_launches(model_layout("mlp", p, mode[0]), *mode, "ce"))
    assert len(found) == 10
    assert_sound(found)


@pytest.mark.parametrize("mode", MODES, ids=["ieee", "tf32x3", "float64"])
def test_dense_mlp(mode: tuple[torch.dtype, str]) -> None:
    """Of sparse parity; every step of every chunk launches the kernels of the first."""
    layout = model_layout("mlp_dense", 30, mode[0], 1000, 3000)
    found = kinds(dense_launches(layout, *mode, "ce"))
    assert set(kinds(dense_launches(layout, *mode, "ce", 3, 2, 2))) == set(found)
    assert_sound({key: launch for key, launch in found.items() if "dense" in launch.kernel.fn.__name__})


def test_sample_of_the_experiments() -> None:
    draw = random.Random(0)
    found = kinds(of_experiments(draw.sample(EXPERIMENTS, 12)))
    assert_sound({key: found[key] for key in draw.sample(sorted(found), 20)})


SMALL = mlp_layout(5, 16, 32), mlp_layout(5, 16, 32, torch.float64), mlp_layout(13, 16, 32), transformer_layout(3, 16, 32)


@pytest.mark.parametrize("layout", SMALL, ids=["p=5", "p=5, float64", "p=13", "transformer"])
def test_sizes_of_the_kernels_tests(layout: object) -> None:
    dtype = torch.float64 if layout.p_pad < 16 else torch.float32
    found = kinds(step_launches(layout, dtype, "ieee", "ce"))
    assert_sound({key: found[key] for key in sorted(found)[::4]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [2, 5, 8, 255])
def test_warps(p: int, dtype: torch.dtype) -> None:
    """A power of two from 1 to 32, for the narrowest row of logits and the widest."""
    for layout in (mlp_layout(p, 16, 32, dtype), transformer_layout(p, 16, 32, dtype)):
        assert {launch.options["num_warps"] for launch in step_launches(layout, dtype, "ieee", "ce", n=min(p, 64))} <= {1, 2, 4, 8, 16, 32}


def test_measurements() -> None:
    found = kinds(launch for launch in of_bench() if launch.kernel.fn.__module__ == "bench.gpu_measurements")
    assert len(found) == 9          # products at two widths in three modes, adds at two moduli, the empty one
    assert_sound(dict(list(found.items())[::3]))


def test_largest_modulus() -> None:
    """Beyond the experiments' some registers spill."""
    for launch in kinds(step_launches(mlp_layout(251), torch.float32, "ieee", "ce")).values():
        if launch.kernel.fn.__name__ in ("_loss_gradient_kernel", "_hidden_backward_kernel", "_evaluate_kernel"):     # hold rows of logits
            row = build(launch)
            assert row.stack_bytes <= 256 and row.shared_bytes <= 113 * 1024


@pytest.mark.parametrize("model", ["mlp", "transformer", "transformer_ln"])
def test_every_step_of_every_chunk_launches_the_same_kernels(model: str) -> None:
    """Those compiled for the first run's first step: nothing may compile while a graph is captured. Odd numbers of runs shift every row.
    And Triton's launcher takes all arguments: it has local names, such as `params`, that no argument may have."""
    layout = model_layout(model, 59, torch.float32)
    first, *others = (step_launches(layout, torch.float32, "ieee", "ce", *sizes) for sizes in ((), (3, 1, 2), (3, 2, 2)))
    known = {kind(launch) for launch in first}
    for launches in others:
        assert {kind(launch) for launch in launches} == known


@pytest.mark.parametrize("wrong", ["acc = tl.dot(x, y, acc)", 'acc = tl.dot(x, y, acc, input_precision="tf32")'])
def test_a_product_in_single_pass_tf32_is_seen(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of `dialect.dot`, with its precision left out or named wrongly."""
    text = Path(kernels.dialect.__file__).read_text()
    right = "acc = tl.dot(x, y, acc, input_precision=PRECISION)"
    assert text.count(right) == 1
    changes = ("dialect", kernels.dialect, (right, wrong)), ("matmul", kernels.matmul, ("from .dialect", "from .planted_dialect"))
    for name, module, change in changes:
        path = tmp_path / f"{name}.py"
        path.write_text(Path(module.__file__).read_text().replace(*change))
        spec = importlib.util.spec_from_file_location(f"kernels.planted_{name}", path)
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, planted)
        spec.loader.exec_module(planted)
    found: list[Launch] = []
    with recording(found):
        planted.matmul(*(torch.zeros(1, 64, 64) for _ in range(3)), "ieee")
    with pytest.raises(AssertionError, match="matmul_kernel"):
        check(build(found[0]))
