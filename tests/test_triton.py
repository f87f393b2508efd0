"""The Triton kernels: interpreted on the CPU, native on a GPU with GROKKING_TEST_GPU=1, in processes of their own.

The interpreter replaces the compiler when the kernels are defined, so it cannot share a process with tests that compile them.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


@pytest.mark.parametrize("suite", ["triton_kernels.py", "triton_steps.py", "triton_transformer.py", "triton_transformer_steps.py"])
def test_suite(suite: str) -> None:
    pytest.importorskip("triton", reason="Triton cannot be installed here: its kernels are NOT tested")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.environ.get("GROKKING_TEST_GPU") == "1":
        assert torch.cuda.is_available(), "GROKKING_TEST_GPU=1 asks for native tests, and there is no CUDA device"
        environment.pop("TRITON_INTERPRET", None)
    else:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(TESTS / suite)]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True)
    print(done.stdout[-2000:])
    assert done.returncode == 0, f"{suite}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
