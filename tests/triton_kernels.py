"""Every kernel against its definition: run by test_triton.py in a process of its own, interpreted or on a GPU.

Sizes by code path: p=13 needs padding to 16 columns and has part-filled tiles of 16; p=5 has fewer pairs than one tile; p=53 has tiles
of 32 pairs, a ragged last block and 64 columns; p=67 has 128 columns for 80 and two blocks of table rows.
"""
import pytest
import torch
from tolerance import EPS32, assert_accurate, references
from torch import Tensor
from triton_cases import DEVICE, Case, draw, from_slots, make_case, nan, to_slots

from kernels.adamw import adamw_project, adamw_project_ref, group_norms_ref, partial_blocks
from kernels.evaluation import N_PARTIAL, evaluate, evaluation_tiles
from kernels.first_layer import tables, tables_backward, tables_backward_ref, tables_ref, turn, turned_size
from kernels.hidden import hidden_backward, hidden_backward_ref, hidden_ref, part_size, segments_of
from kernels.loss import loss_gradient, loss_gradient_ref
from kernels.step import METRICS, evaluate_ref

Outputs = dict[str, Tensor]     # name -> (R, ...)


def parts_input(case: Case) -> Tensor:
    """Segments of dU and dV, dW2, db2."""
    return draw(case.runs, segments_of(case.layout.p), part_size(case.layout), dtype=case.params.dtype)


def split_parts(parts: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """`(..., part_size)` -> `dtables (..., 2, p, H)`, `dW2 (..., H, p_pad)`, `db2 (..., p_pad)`."""
    p, _, H, p_pad = case.layout
    dtables, dW2, db2 = parts.split([2 * p * H, H * p_pad, p_pad], -1)
    return dtables.unflatten(-1, (2, p, H)), dW2.unflatten(-1, (H, p_pad)), db2


def in_order(parts: Tensor) -> Tensor:
    """The sum over the segments of `parts (R, segments, part_size)` as readers add them."""
    total = parts[:, 0].clone()
    for segment in range(1, parts.shape[1]):
        total += parts[:, segment]
    return total


def tables_input(case: Case) -> Tensor:
    """Tables of these parameters, rounded to float32 so that every dtype reads equal numbers. (R, 2, p, H)"""
    rows = [torch.stack(tables_ref(*(part.float() for part in views[:2]), views[3].float())) for views in
            map(case.layout.views, case.params)]
    return torch.stack(rows).to(case.params.dtype)


def dz_input(case: Case) -> Tensor:
    dz = draw(case.runs, case.n, case.layout.p_pad, dtype=case.params.dtype)
    dz[:, :, case.layout.p:] = 0
    return dz


def optimiser_input(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    rows = [draw(*case.params.shape, dtype=case.params.dtype, seed=seed) for seed in (2, 3, 4)]
    for row in rows:
        row[:, sum(case.layout.sizes):] = 0
    return rows[0], 0.1 * rows[1], 0.01 * rows[2].square()      # gradient, moment1, moment2


def turned(case: Case) -> Tensor:
    out = nan(case.runs, turned_size(case.layout), dtype=case.params.dtype)
    turn(case.params.to(DEVICE), out, case.layout)
    return out


def run_turn(case: Case) -> Outputs:
    return {"turned": turned(case)}


def ref_turn(case: Case, r: int) -> list[Tensor]:
    _, W1, W2, _, _ = case.layout.views(case.params[r])
    return [torch.cat([W1.unflatten(0, (2, -1)).mT.flatten(), W2.T.flatten()])]


def run_tables(case: Case) -> Outputs:
    out = nan(case.runs, 2, case.layout.p, case.layout.H, dtype=case.params.dtype)
    tables(case.params.to(DEVICE), out, case.layout, "ieee")
    return {"U": out[:, 0], "V": out[:, 1]}


def ref_tables(case: Case, r: int) -> list[Tensor]:
    E, W1, _, b1, _ = case.layout.views(case.params[r])
    return list(tables_ref(E, W1, b1))


def run_tables_backward(case: Case) -> Outputs:
    gradient = nan(*case.params.shape, dtype=case.params.dtype)
    tables_backward(case.params.to(DEVICE), turned(case), parts_input(case).to(DEVICE), gradient, case.layout, "ieee")
    return dict(zip(("dE", "dW1", "dW2", "db1", "db2"), map(torch.stack, zip(*map(case.layout.views, gradient), strict=True)), strict=True))


def ref_tables_backward(case: Case, r: int) -> list[Tensor]:
    E, W1, *_ = case.layout.views(case.params[r])
    dtables, dW2, db2 = split_parts(parts_input(case)[r].sum(0), case)
    dE, dW1, db1 = tables_backward_ref(*dtables, E, W1)
    return [dE, dW1, dW2, db1, db2]


def run_loss_gradient(case: Case) -> Outputs:
    dz = nan(*case.slots.shape, case.layout.p_pad, dtype=case.params.dtype)
    loss_gradient(case.params.to(DEVICE), tables_input(case).to(DEVICE), case.slots.to(DEVICE), case.labels, case.scalars.to(DEVICE), dz,
                  case.n, case.layout, case.loss, "ieee")
    assert (dz.cpu()[case.slots < 0] == 0).all()
    return {"dz": from_slots(dz.cpu(), case)}


def ref_loss_gradient(case: Case, r: int) -> list[Tensor]:
    _, _, W2, _, b2 = case.layout.views(case.params[r])
    h, _ = hidden_ref(*tables_input(case)[r], case.a[r], case.b[r])
    p = case.layout.p
    return [loss_gradient_ref(h @ W2 + b2, (case.a[r] + case.b[r]) % p, case.scalars[r, 0], p, case.loss)]


def run_hidden_backward(case: Case) -> Outputs:
    parts = nan(case.runs, segments_of(case.layout.p), part_size(case.layout), dtype=case.params.dtype)
    hidden_backward(turned(case), tables_input(case).to(DEVICE), to_slots(dz_input(case), case).to(DEVICE), case.slots.to(DEVICE), parts, case.layout,
                    "ieee")
    dtables, dW2, db2 = split_parts(in_order(parts), case)
    return {"dU": dtables[:, 0], "dV": dtables[:, 1], "dW2": dW2, "db2": db2}


def ref_hidden_backward(case: Case, r: int) -> list[Tensor]:
    _, _, W2, _, _ = case.layout.views(case.params[r])
    h, dgelu = hidden_ref(*tables_input(case)[r], case.a[r], case.b[r])
    dz = dz_input(case)[r]
    return [*hidden_backward_ref(dz, dgelu, W2, case.a[r], case.b[r], case.layout.p), h.T @ dz, dz.sum(0)]


def run_adamw_project(case: Case) -> Outputs:
    gradient, moment1, moment2 = (row.to(DEVICE) for row in optimiser_input(case))
    params, squares = case.params.to(DEVICE, copy=True), nan(case.runs, 3, partial_blocks(case.layout), dtype=torch.float64)
    adamw_project(params, moment1, moment2, gradient, case.scalars.to(DEVICE), squares, case.layout)
    return {"params": params, "moment1": moment1, "moment2": moment2}


def ref_adamw_project(case: Case, r: int) -> list[Tensor]:
    gradient, moment1, moment2 = (row[r] for row in optimiser_input(case))
    return list(adamw_project_ref(case.params[r], moment1, moment2, gradient, case.scalars[r], case.layout))


def run_evaluate(case: Case) -> Outputs:
    layout, metrics = case.layout, nan(case.runs, len(METRICS), dtype=torch.float64)
    partials = nan(case.runs, N_PARTIAL, evaluation_tiles(layout), dtype=torch.float64)
    squares = nan(case.runs, 3, partial_blocks(layout), dtype=torch.float64)
    params, work = case.params.to(DEVICE), run_tables(case)
    evaluate(params, torch.stack([work["U"], work["V"]], 1), case.train.to(DEVICE, torch.uint8), case.labels, case.scalars.to(DEVICE),
             partials, squares, metrics, case.n, layout.p**2, layout, case.loss, "ieee")
    return {name: metrics[:, i: i + 1].to(case.params.dtype) for i, name in enumerate(METRICS)}


def compared(outputs: Outputs) -> list[tuple[str, Tensor]]:
    """All but the audit's difference, which is itself a rounding error of float32 and has its own test."""
    return [(name, output) for name, output in outputs.items() if name != "max_gradient_difference"]


def ref_evaluate(case: Case, r: int) -> list[Tensor]:
    return list(evaluate_ref(case.params[r], case.train[r], case.a[r], case.b[r], case.scalars[r, 0], case.layout, case.loss)[:, None])


KERNELS = {"tables": (run_tables, ref_tables), "turn": (run_turn, ref_turn), "loss_gradient": (run_loss_gradient, ref_loss_gradient),
           "hidden_backward": (run_hidden_backward, ref_hidden_backward), "tables_backward": (run_tables_backward, ref_tables_backward),
           "adamw_project": (run_adamw_project, ref_adamw_project), "evaluate": (run_evaluate, ref_evaluate)}
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]


def agree(kernel: str, case: Case) -> None:
    run, ref = KERNELS[kernel]
    outputs = run(case)
    for r in range(case.runs):
        named = compared(outputs)
        wanted = references(case.params.dtype, lambda dtype, r=r: ref(case.to(dtype), r)[: len(compared(outputs))])
        for (name, actual), reference in zip(named, wanted, strict=True):
            assert_accurate(f"{kernel} {name} run {r}", actual[r], reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [5, 13])
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_with_definition(kernel: str, p: int, dtype: torch.dtype) -> None:
    agree(kernel, make_case(p, dtype=dtype))


@pytest.mark.parametrize("p", [53, 67])
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_at_blocks_of_the_experiments(kernel: str, p: int) -> None:
    agree(kernel, make_case(p, runs=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "tau"), [(100, 1), (1e-4, 1), (1, 7.3), (1, 0.05)],
                         ids=["saturated", "tiny", "hot", "cold"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_loss_gradient_at_extremes(loss: str, scale: float, tau: float, dtype: torch.dtype) -> None:
    """1123 pairs: where most rows saturate, the largest error of a few pairs is a matter of luck (10 to 90% of the budget at p=13)."""
    agree("loss_gradient", make_case(53, runs=1, dtype=dtype, loss=loss, tau=tau, scale=scale))


@pytest.mark.parametrize(("loss", "scale", "tau"), [("mse", 1, 1), ("ce", 1e-4, 1), ("mse", 1, 7.3), ("ce", 1, 0.2)])
def test_evaluation_at_extremes(loss: str, scale: float, tau: float) -> None:
    agree("evaluate", make_case(13, loss=loss, tau=tau, scale=scale))


def test_cross_entropy_rows_sum_to_zero() -> None:
    """Each row holds probabilities over n that sum to 1 within p roundings, less 1 / n."""
    case = make_case(13)
    dz = run_loss_gradient(case)["dz"].double()
    assert dz.sum(-1).abs().max() <= 13 * torch.finfo(torch.float32).eps / case.n
    assert dz.abs().amax(-1).min() > 0


def test_shifting_logits_changes_nothing() -> None:
    """b2 + 8: the shifted sums of logits below 4 round to 2^-21 rather than 2^-22, and their differences move by as much."""
    case = make_case(13)
    before = run_loss_gradient(case)["dz"]
    _, _, _, _, b2 = zip(*map(case.layout.views, case.params), strict=True)
    for row in b2:
        row[:13] += 8
    assert (run_loss_gradient(case)["dz"] - before).abs().max() <= 2 * 2**-20 / case.n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [(3.0, 0, 0, 0), (0, 2.0, 0, 1.5), (0, 1.0, 2.0, 3.0)], ids=["total", "two groups", "groups"])
def test_held_norms_equal_their_targets(targets: tuple[float, ...], dtype: torch.dtype) -> None:
    """Run 0 holds, run 1 is free. A norm is off by at most the rounding of its weights and of its ratio: 2 eps of the target."""
    case = make_case(13, dtype=dtype)
    case.scalars[0, 4:-3] = torch.tensor(targets, dtype=dtype)
    agree("adamw_project", case)
    norms = group_norms_ref(run_adamw_project(case)["params"][0].cpu(), case.layout)
    for target, norm in zip(targets, [norms.norm(), *norms], strict=True):
        assert not target or abs(norm - target) <= 2 * torch.finfo(dtype).eps * target


@pytest.mark.parametrize(("shift", "tau", "expected"), [(30, 1, (1, 0, 1, 0)), (60, 2, (1, 0, 1, 0)), (100, 1, (1, 1, 1, 0)),
                                                        (200, 1, (1, 1, 1, 1)), (8, 1, (0, 0, 0, 0))])
def test_audit_counts(shift: float, tau: float, expected: tuple[int, ...]) -> None:
    """Class 0 leads by `shift`; all others are at -50, below the padding's 0, which must not count.

    12 exp(-30) is lost beside 1 in float32, not in float64; 12 exp(-100) in both; exp(-200) is itself 0 in float32, so the
    row of a pair of class 0 is 0; 12 exp(-8) = 0.004 is lost nowhere."""
    case = make_case(13, runs=1, tau=tau)
    _, _, W2, _, b2 = case.layout.views(case.params[0])
    W2.zero_(), b2.zero_()
    b2[:13] = -50
    b2[0] += shift
    metrics = run_evaluate(case)
    of_class_0 = (((case.a + case.b) % 13 == 0).double().mean()).float()
    wanted = [expected[0] * of_class_0, expected[1] * of_class_0, torch.tensor(float(expected[2])), expected[3] * of_class_0]
    found = [metrics[name][0, 0].cpu() for name in ("collapse32", "collapse64", "sum_exp_is_one", "zero_gradient_rows")]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    assert metrics["train_accuracy"][0, 0] == of_class_0
    assert metrics["saturated"][0, 0] == (shift > 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "tau"), [(1, 1), (300, 7.3)])
def test_audit_difference(scale: float, tau: float, dtype: torch.dtype) -> None:
    """The float32 softmax is off by the rounding of z / tau, and by 4 eps at most beside it."""
    case = make_case(13, runs=1, dtype=dtype, scale=scale, tau=tau)
    found, wanted = run_evaluate(case)["max_gradient_difference"][0, 0].item(), ref_evaluate(case, 0)[-1].item()
    largest = scale * 10 / tau      # logits of these cases stay below 10 times their scale
    assert 0 < found <= (largest + 4) * EPS32 and abs(found - wanted) <= 4 * EPS32


@pytest.mark.bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_again_and_alone(kernel: str, dtype: torch.dtype) -> None:
    case = make_case(13, dtype=dtype)
    run, _ = KERNELS[kernel]
    first, again = run(case), run(case)
    for name, output in first.items():
        assert torch.equal(output, again[name]), name
    inputs = (parts_input, dz_input, optimiser_input)
    with pytest.MonkeyPatch.context() as patch:     # a run alone reads its own rows of the drawn inputs
        for function in inputs:
            whole = function(case)
            rows = tuple(part[1:] for part in whole) if isinstance(whole, tuple) else whole[1:]
            patch.setitem(globals(), function.__name__, lambda _, rows=rows: rows)
        for name, output in run(case.alone(1)).items():
            assert torch.equal(output[0], first[name][1]), name
