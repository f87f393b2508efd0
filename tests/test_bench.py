"""The benchmark of the step, where a peer cannot run."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import bench_step
import peers

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
    monkeypatch.setattr(bench_step, "matmul_rate", lambda device: 1e11)
    rows = bench_step.measure("mlp", 5, 1, 1, "cpu", None)
    assert [row["name"] for row in rows] == ["ours", "ours", "eager_train_pairs", "roofline"]
    said = capsys.readouterr().out
    assert "absent: LEFT OUT, ModuleNotFoundError" in said and "greedy: LEFT OUT, OutOfMemoryError" in said
