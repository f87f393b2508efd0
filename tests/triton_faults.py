"""The tolerance bites: kernels with a fault planted in them are refused. Run by test_triton.py in a process of its own, interpreted or on a GPU.

A fault is planted in the text of a kernel's file, which then takes the place of the kernel; single-pass TF32 is asked for by name, and the
interpreter obeys it (`native.py`).
"""
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import native
import pytest
import triton_kernels as mlp
import triton_transformer as attn
from triton_cases import ON_GPU, make_case, make_transformer_case

import kernels

if not ON_GPU:
    native.install(1)
KERNELS = Path(kernels.__file__).parent


def refused(name: str, run: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match=rf"^{name} .* of the budget"):
        run()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    def plant(suite: object, module: str, right: str, wrong: str, *launchers: str) -> None:
        """Gives `suite` the launchers of a copy of `module` in which one line is wrong."""
        text = (KERNELS / f"{module}.py").read_text()
        assert text.count(right) == 1, f"{right} stands {text.count(right)} times in {module}.py"
        path = tmp_path / f"{module}.py"
        path.write_text(text.replace(right, wrong))
        spec = importlib.util.spec_from_file_location(f"kernels.planted_{module}", path)
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, planted)
        spec.loader.exec_module(planted)
        for launcher in launchers:
            monkeypatch.setattr(suite, launcher, getattr(planted, launcher))
    return plant


@pytest.mark.parametrize("kernel", ["tables", "loss_gradient", "hidden_backward", "tables_backward", "evaluate"])
def test_single_pass_tf32(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(mlp, kernel)
    monkeypatch.setattr(mlp, kernel, lambda *args: right(*args[:-1], "tf32"))
    refused(kernel, lambda: mlp.agree(kernel, make_case(13, runs=1)))


@pytest.mark.parametrize("kernel", ["mix", "gelu_backward"])
def test_single_pass_tf32_of_a_transformer(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"mix": attn.mixing, "gelu_backward": attn.transformer}[kernel]
    right = getattr(module, kernel)
    monkeypatch.setattr(module, kernel, lambda *args: right(*args[:-1], "tf32"))
    refused(f"run_{kernel}", lambda: attn.agree(make_transformer_case("transformer_ln", 13, runs=1), *attn.KERNELS[kernel]))


@pytest.mark.parametrize(("kernel", "module", "right", "wrong"), [
    ("hidden_backward", "hidden", "range(segment * BN, n_slots, SEGMENTS * BN):", "range((segment + SEGMENTS) * BN, n_slots, SEGMENTS * BN):"),
    ("tables_backward", "hidden", "in tl.static_range(1, SEGMENTS):", "in tl.static_range(1, SEGMENTS - 1):"),
    ("loss_gradient", "hidden", "for start in range(0, H, BK):", "for start in range(BK, H, BK):"),
    ("tables_backward", "first_layer", "for start in range(0, p, BK):", "for start in range(BK, p, BK):"),
], ids=["of pairs", "segment", "of hidden units", "of tokens"])
def test_dropped_tile(plant: Callable, monkeypatch: pytest.MonkeyPatch, kernel: str, module: str, right: str, wrong: str) -> None:
    if module == "hidden" and kernel != "hidden_backward":      # whose functions are in other modules' kernels
        plant(mlp, module, right, wrong)
        monkeypatch.setitem(sys.modules, "kernels.hidden", sys.modules["kernels.planted_hidden"])
        user, line = {"loss_gradient": ("loss", "from .hidden import logits_tile"),
                      "tables_backward": ("first_layer", "from .hidden import load_segments, segments_of")}[kernel]
        plant(mlp, user, line, line + "  # the planted one", kernel)
    else:
        plant(mlp, module, right, wrong, kernel)
    refused(kernel, lambda: mlp.agree(kernel, make_case(53, runs=1)))


def test_dropped_tile_of_a_transformer(plant: Callable) -> None:
    plant(attn.transformer, "transformer", "for start in range(0, n_slots, BN):", "for start in range(BN, n_slots, BN):", "gelu_backward")
    refused("run_gelu_backward", lambda: attn.agree(make_transformer_case("transformer", 13, runs=1), *attn.KERNELS["gelu_backward"]))


def test_swapped_pair(plant: Callable) -> None:
    """One of 1123: (a, b) read as (b, a)."""
    right = "    live = pair >= 0\n"
    plant(mlp, "loss", right, "    pair = tl.where(slot == 7, pair % p * p + pair // p, pair)\n" + right, "loss_gradient")
    refused("loss_gradient", lambda: mlp.agree("loss_gradient", make_case(53, runs=1)))


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_missing_temperature(plant: Callable, loss: str) -> None:
    """In the factor 1 / (tau n) alone, at a tau a thousandth from 1."""
    plant(mlp, "loss", "tl.full([], 1.0, tau.dtype), tau * n_train)", "tl.full([], 1.0, tau.dtype), n_train + 0 * tau)", "loss_gradient")
    refused("loss_gradient", lambda: mlp.agree("loss_gradient", make_case(13, runs=1, loss=loss, tau=1.001)))
