"""The Triton kernels: interpreted on the CPU, native on a GPU with GROKKING_TEST_GPU=1, in processes of their own (`conftest.py`).

The interpreter replaces the compiler when the kernels are defined, so it cannot share a process with tests that compile them.
"""
import os

import pytest
import torch


@pytest.mark.parametrize("suite", ["triton_kernels.py", "triton_steps.py", "triton_transformer.py", "triton_transformer_steps.py"])
def test_suite(suite: str, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("triton", reason="Triton cannot be installed here: its kernels are NOT tested")
    if os.environ.get("GROKKING_TEST_GPU") == "1":
        assert torch.cuda.is_available(), "GROKKING_TEST_GPU=1 asks for native tests, and there is no CUDA device"
    code, output = pytestconfig.beside.done[suite].result()
    print(output[-2000:])
    assert code == 0, f"{suite}\n{output[-8000:]}"
