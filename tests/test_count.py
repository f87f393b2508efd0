"""The count of a step on sm_90: the walk through the machine code of a product against what is known of it, and bank conflicts of known patterns."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here: nothing is counted")
sys.path.insert(0, str(Path(__file__).parent.parent))
from launches import Launch, recording

from bench import count_sm90, sass
from bench.sass_walk import Walk
from common import Cell, UsageError
from kernels.matmul import matmul
from lab import gpu_time

LANES = np.arange(32)


@pytest.mark.parametrize(("address", "size", "found"), [
    (4 * LANES, 4, (1, 1)),                     # a word of every bank
    (0 * LANES, 4, (1, 1)),                     # one word for all
    (128 * LANES, 4, (32, 32)),                 # all of one bank
    (8 * LANES, 4, (2, 2)),                     # every second bank
    (16 * LANES, 16, (4, 1)),                   # 512 bytes in a row, a quarter of the warp at a time
    (512 * (LANES % 8), 16, (32, 8)),           # rows of 128 floats, one for each lane of a quarter
    (8 * LANES, 8, (2, 1)),
    (0 * LANES, 16, (2, 1)),                    # one read for all still fills four registers
    (16 * (LANES // 2), 16, (2, 1)),            # neighbours alike: half a warp at a time
    (512 * (LANES // 2 % 2), 16, (4, 2)),       # the same, of two rows in the same banks
])
def test_bank_conflicts_of_known_patterns(address: np.ndarray, size: int, found: tuple[int, int]) -> None:
    assert sass.wavefronts(address, LANES >= 0, size) == found


def test_lanes_that_are_off_do_not_conflict() -> None:
    assert sass.wavefronts(128 * LANES, LANES < 2, 4) == (2, 2)


@pytest.fixture(scope="module")
def walked() -> tuple[Walk, list[torch.Tensor]]:
    """(48, 80) by (80, 40) in tiles of 64: a ragged tile, and five turns of the loop."""
    x, y, out = torch.zeros(1, 48, 80), torch.zeros(1, 80, 40), torch.zeros(1, 48, 40)
    found: list[Launch] = []
    with recording(found):
        matmul(x, y, out, "ieee")
    _, walk = count_sm90.walked(found[0], checked=True)
    return walk, [x, y, out]


def test_a_product_has_its_multiply_adds_and_its_bytes(walked: tuple) -> None:
    walk, (x, y, out) = walked
    fma = [i.op == "FFMA" for i in walk.code]
    assert walk.executed[fma].sum() * 32 == 64 * 64 * 80                 # tiles of 64 by 64, masked
    start = walk.tensors.starts[2] - sass.BASE
    assert (walk.stored[start: start + out.nbytes] == 1).all() and walk.stored.sum() == out.nbytes
    read = walk.read.any(0)
    for tensor, at in zip((x, y), walk.tensors.starts, strict=False):
        first = (at - sass.BASE) // sass.SECTOR
        assert read[first: first + tensor.nbytes // sass.SECTOR].all()
    assert read.sum() * sass.SECTOR == x.nbytes + y.nbytes


@pytest.mark.parametrize(("op", "operands", "said"), [
    ("QUUX", ("R1", "R2"), "instruction QUUX.WIDE R1, R2 is not known"), ("MOV", ("R1", "ATTR"), "operand ATTR is not known"),
    ("LDS", ("R1", "[R9]"), r"address \[R9\] hangs on floats")])
def test_what_the_walk_does_not_know_is_one_line(op: str, operands: tuple[str, ...], said: str) -> None:
    """Another compiler's instructions, and what no integers lead to: said, never guessed."""
    code = [sass.Instruction(0, op, ("WIDE",), operands, "", 1, 7, 7, ()), sass.Instruction(16, "EXIT", (), (), "", 1, 7, 7, ())]
    with pytest.raises(UsageError, match=said) as error:
        Walk(code, [(0, 0)], 32, [], (1, 1), sass.Tensors([]), 0).run()
    assert "\n" not in str(error.value)


def test_the_announced_time_is_of_the_counted_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs count as the nearest ensemble; between two moduli, and beyond, a time is on the line through both in logarithms."""
    counted = {(runs, p): 1e-3 * p**2 * (1 + 1 / runs) for runs in (10, 160) for p in (59, 97)}
    monkeypatch.setattr(gpu_time, "bounds", lambda: {("mlp", "ieee", "step"): counted, ("mlp", "ieee", "evaluation"): counted})
    for p in (29, 59, 71, 97, 113):
        assert gpu_time.microseconds("mlp", "ieee", "step", p, 12) == pytest.approx(1.1e-3 * p**2)
    assert gpu_time.microseconds("transformer", "ieee", "step", 59, 10) is None
    cell = Cell("x", p=59, members=tuple(range(10)), block=12, budget_steps=1000, eval_every=50)
    expected = 1e-6 * 1000 * 10 * counted[10, 59] * (1 + 1 / 50)
    assert gpu_time.seconds([cell], "ieee", "float32") == pytest.approx(expected)
    assert gpu_time.seconds([cell], "ieee", "float64") == pytest.approx(gpu_time.FLOAT64 * expected)


def test_a_bound_grows_with_the_busiest_multiprocessor() -> None:
    """132 programs take as long as one; the next takes its turn."""
    cycles = {name: (0.0, 0.0) for name in count_sm90.RESOURCES} | {"fma": (1980.0, 1980.0), "chain": (1e4, 1e4)}
    one = count_sm90.Count("step", 0, "k", 1, 4, 32, 0, 16, 1, 1, 0, 1, 0, 0, cycles)
    us = {runs: count_sm90.bounds(one, runs) for runs in (1, 132, 133, 132 * 16, 132 * 16 + 1)}
    assert [us[runs]["fma"] for runs in us] == pytest.approx([1, 1, 2, 16, 17])
    assert [us[runs]["chain"] for runs in us] == pytest.approx([1e4 / 1980] * 4 + [2e4 / 1980])
