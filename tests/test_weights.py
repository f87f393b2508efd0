"""Trained weights: what is written loads into the plain modules, whose logits are those that the run's row tells of."""
import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest
import torch

from common import Cell, UsageError, load, train
from lab import book, weights
from lab.ensemble import Ensemble

CELL = Cell(p=7, members=(1, 3), block=4, budget_steps=100, lr=5e-3, tau=1.3)


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the test set counts as grokked, so that a hundred steps are enough."""
    monkeypatch.setattr(book, "CROSSINGS", (("train_accuracy", 0.99), ("test_accuracy", 0.05), ("test_accuracy", 0.1), ("test_accuracy", 0.95)))


def test_a_round_trip_agrees_with_the_rows(easy: None, tmp_path: Path) -> None:
    cell = dataclasses.replace(CELL, task="mul", budget_steps=200)
    result = train([cell], backend="eager", dtype="float64", weights=tmp_path)
    saved = load(tmp_path / f"{cell.name}.safetensors")
    assert saved.conditions["p"] == 7 and saved.conditions["tau"] == 1.3 and set(saved.modules) == {1, 3}
    a, b = torch.arange(49) // 7, torch.arange(49) % 7
    assert saved.labels.flatten().tolist() == (a * b % 7).tolist()
    for run in result.runs:
        modules, pairs = saved.modules[run["member"]], saved.pairs[run["member"]]
        assert set(modules) == {"start", *("mem",) * (run["t_mem_step"] is not None), *("grok",) * (run["t_grok_step"] is not None), "end"}
        assert run["t_grok_step"] is not None and run["t_mem_step"] is not None and saved.runs[run["member"]]["t_grok_step"] == run["t_grok_step"]
        logits = {moment: module(a, b).detach() for moment, module in modules.items()}
        right = {moment: z.argmax(1) == saved.labels.flatten() for moment, z in logits.items()}
        test = torch.ones(49, dtype=torch.bool).index_fill(0, pairs, False)
        assert len(pairs) == run["n_train"] and right["mem"][pairs].double().mean() >= 0.99 and right["grok"][test].double().mean() >= 0.1
        assert float((logits["grok"] / 1.3).norm(dim=1).mean()) == pytest.approx(run["logit_scale_at_grok"], rel=1e-12)
        for moment, column in (("grok", "norm_at_grok"), ("end", "norm_at_end"), ("mem", "norm_at_mem")):
            norm = torch.cat([getattr(modules[moment], name).detach().flatten() for name in ("E", "W1", "W2")]).norm()
            assert float(norm) == pytest.approx(run[column], rel=1e-12), moment
    start = train([dataclasses.replace(cell, budget_steps=1)], backend="eager", dtype="float64", weights=tmp_path / "short")
    assert start.runs and torch.equal(load(next((tmp_path / "short").iterdir())).modules[3]["start"].E, saved.modules[3]["start"].E)


def test_they_outlive_an_interruption(easy: None) -> None:
    def made() -> Ensemble:
        return Ensemble([CELL], "cpu", "eager", torch.float32, "ieee", keep_weights=True)
    whole, first, second = made(), made(), made()
    whole.train(lambda _: None)

    def stop(ensemble: Ensemble) -> None:
        if ensemble.executed >= 100:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    second.restore({name: tensor.clone() for name, tensor in first.snapshot().items()})
    second.train(lambda _: None)
    for run in range(2):
        for mine, theirs in zip(second.moments(run), whole.moments(run), strict=True):
            assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


def test_the_file_is_the_format(tmp_path: Path) -> None:
    """As its page has it: the length of the header in 8 bytes, the header, the numbers in row-major order from where the header says."""
    path, x = tmp_path / "x.safetensors", torch.arange(6, dtype=torch.float32).reshape(2, 3)
    weights.write(path, {"x": x.T, "y": x[0].double()}, {"made": "here"})
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8: 8 + size])
    assert header == {"__metadata__": {"made": "here"}, "x": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
                      "y": {"dtype": "F64", "shape": [3], "data_offsets": [24, 48]}}
    assert size % 8 == 0 and struct.unpack("<6f", data[8 + size: 8 + size + 24]) == (0, 3, 1, 4, 2, 5)
    for damaged in (data[:20], data[:-1], b"", data.replace(b"F32", b"F99"), data.replace(b"[0, 24]", b"[0, 20]"), b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is not a file of weights of this project, or is damaged"):
            load(path)
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none.safetensors")


def test_the_example_opens_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """At a tiny size, from top to bottom; and what it measures is right where one knows it: a single wave."""
    path = Path(__file__).parents[1] / "examples" / "ask_your_own.py"
    code, usual = path.read_text(), '{"p": 59, "members": range(2), "lr": 8e-3, "after_grok": 400}'
    assert usual in code and code.count("# %%") == 3 + 1
    code = code.replace(usual, '{"p": 11, "members": range(2), "lr": 8e-3, "budget_steps": 50, "width": (16, 16)}').replace(
        "train(CELLS, ", "train(CELLS, backend='eager', ")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example", "__file__": str(path)}
    exec(compile(code, str(path), "exec"), names)
    out = capsys.readouterr().out
    assert (tmp_path / "results/ask_your_own/accuracy.png").exists() and out.count(" of the logits") == 2 * 2 and "multiplication_held" in out
    angle = 2 * math.pi / 11 * torch.arange(11)
    s = (torch.arange(11)[:, None, None] + torch.arange(11)[None, :, None] - torch.arange(11)) % 11
    wave = torch.cos(3 * angle)[s] + 0.5 * torch.sin(2 * angle)[s] + 7
    assert names["explained"](wave, [3]) == pytest.approx(0.8, abs=1e-6) and names["explained"](wave, [2, 3]) == pytest.approx(1, abs=1e-6)
    assert names["spectrum"](torch.stack([torch.cos(3 * angle), torch.sin(3 * angle)], 1))[2] == pytest.approx(1, abs=1e-6)
