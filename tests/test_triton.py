"""The Triton kernels: interpreted on the CPU, native on a GPU with GROKKING_TEST_GPU=1, in processes of their own (`conftest.py`).

The interpreter replaces the compiler when the kernels are defined, so it cannot share a process with tests that compile them. All suites run
twice there: in numpy's arithmetic, and in a GPU's (`native.py`), whose errors are drawn from a seed; GROKKING_TEST_SEEDS="1 2 3" names several.
"""
import os

import pytest
import torch
from launches import SUITES

NATIVE = os.environ.get("GROKKING_TEST_GPU") == "1"
SEEDS = [""] if NATIVE else ["", *os.environ.get("GROKKING_TEST_SEEDS", "1").split()]
RUNS = [pytest.param(SUITES, seed, id=f"noise {seed}" if seed else "exact") for seed in SEEDS]


@pytest.mark.parametrize(("suites", "noise"), [pytest.param(("triton_faults.py",), "", id="planted faults"), *RUNS])
def test_suites(suites: tuple[str, ...], noise: str, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("triton", reason="Triton cannot be installed here: its kernels are NOT tested")
    if NATIVE:
        assert torch.cuda.is_available(), "GROKKING_TEST_GPU=1 asks for native tests, and there is no CUDA device"
    code, output = pytestconfig.beside.done[suites, noise].result()
    print(output[-2000:])
    assert code == 0, output[-8000:]
