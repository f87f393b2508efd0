"""The benchmark of the step, where a peer cannot run."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import bench_step
import peers

from kernels import cpu
from lab.ensemble import Ensemble


def test_a_peer_that_fails_is_lost_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Not installed, or out of memory at its first step: the others are timed."""
    class Absent(peers.EagerTrainPairs):
        name = "absent"

        def __init__(self, *_: object):
            raise ModuleNotFoundError("No module named 'jax'")

    class Greedy(peers.EagerTrainPairs):
        name = "greedy"

        def steps(self, k: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_step, "Ensemble", lambda cells, device, _, *rest: Ensemble(cells, device, "eager", *rest))
    monkeypatch.setattr(bench_step, "peers", lambda _: [Absent, Greedy, peers.EagerTrainPairs])
    monkeypatch.setattr(bench_step, "seconds", lambda contender, k, device: 0.1)
    monkeypatch.setattr(bench_step, "product_rates", lambda device: {"torch": 1e11, "onednn": 2e11})
    rows = bench_step.measure("mlp", 5, 1, 1, "cpu", None)
    assert [row["name"] for row in rows] == ["ours", "ours", "ours_one_core", "evaluation_one_core", "eager_train_pairs", "roofline"]
    assert rows[-1]["backend"] == "onednn" and rows[-1]["us_per_run_step"] == pytest.approx(bench_step.flops("mlp", 5) / 2e5, abs=1e-3)
    said = capsys.readouterr().out
    assert "absent: LEFT OUT, ModuleNotFoundError" in said and "greedy: LEFT OUT, OutOfMemoryError" in said


@pytest.mark.skipif(not cpu.has_compiler(), reason="no C++ compiler here: the peak cannot be measured")
def test_the_peak_is_that_of_chains_in_registers() -> None:
    """Twelve chains that differ: had the compiler merged two, a round would be fewer operations than are counted."""
    library = bench_step.fma_chains()
    lanes = library.operations() // 24
    assert lanes in (4, 8, 16) and library.chains(0, 2.0, 1.0) == lanes * sum(range(12))
    assert library.chains(3, 2.0, 1.0) == lanes * sum(8 * i + 7 for i in range(12))
