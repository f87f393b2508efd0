"""The transformers' kernels against their definitions, and whole steps: run by test_triton.py in a process of its own, interpreted or on a GPU.

Sizes by code path: p=3 and 5 have fewer pairs than a tile; p=13 has two, and several tiles of table rows; p=23, nearly full, lists longer than one
load; d=16, H=32 is one block of columns and of hidden units, the widths of the experiments are several. Interpreted, a step costs a second.
"""
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_accurate, references
from torch import Tensor
from triton_cases import DEVICE, Case, draw, make_transformer_case, nan

import kernels.step
from kernels import attention, mixing, transformer
from kernels.adamw import adamw_project, adamw_project_ref, group_norms_ref, partial_blocks
from kernels.evaluation import N_PARTIAL, evaluate_logits, evaluation_tiles
from kernels.hidden import gelu_ref
from kernels.layout import HEADS
from kernels.loss import logit_gradient, loss_gradient_ref
from kernels.matmul import matmul, turn
from kernels.pairs import order_of, slots_for, views_of
from kernels.step import evaluate_ref, metric_names

Outputs = dict[str, Tensor]     # name -> (R, ...)
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]
LAYER_NORM = pytest.mark.parametrize("model", ["transformer", "transformer_ln"])


def agree(case: Case, run: Callable[[Case], Outputs], ref: Callable[[Case, int], list[Tensor]]) -> None:
    outputs = run(case)
    for r in range(case.runs):
        wanted = references(case.params.dtype, lambda dtype, r=r: ref(case.to(dtype), r))
        for (name, actual), reference in zip(outputs.items(), wanted, strict=True):
            assert_accurate(f"{run.__name__} {name} run {r}", actual[r], reference)


def of(case: Case, *shape: int, seed: int) -> Tensor:
    """An input of all runs, equal numbers in both dtypes. (R, ...)"""
    return draw(case.runs, *shape, dtype=case.params.dtype, seed=seed)


def sizes(case: Case) -> tuple[int, int, int, int, int]:
    """Rows of a table, d, H, Q, F."""
    layout = case.layout
    Q = layout.d if layout.normed else layout.p_pad
    return 2 * layout.p + 1, layout.d, layout.H, Q, layout.H + Q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 32, 16), (11, 5, 4), (70, 20, 130)], ids=["one row", "ragged", "several tiles"])
def test_matmul(M: int, K: int, N: int, dtype: torch.dtype) -> None:
    """With heads side by side in the columns, a transposed operand beside which lies NaN, a scale and an addend."""
    x, addend, y = draw(2, M, 3 * K, dtype=dtype), draw(2, 3, M, N, dtype=dtype, seed=3), torch.full((2, 3, N, K + 16), float("nan"), dtype=dtype)
    x, y = x.unflatten(2, (3, K)).transpose(1, 2), y[..., :K].copy_(draw(2, 3, N, K, dtype=dtype, seed=2)).mT
    for add in (False, True):
        out = addend.to(DEVICE, copy=True) if add else nan(2, 3, M, N, dtype=dtype)
        matmul(x.to(DEVICE), y.to(DEVICE), out, "ieee", 0.3, add)
        (reference,) = references(dtype, lambda t, add=add: [0.3 * (x.to(t) @ y.to(t)) + add * addend.to(t)])
        assert_accurate("matmul", out, reference)
    with pytest.raises(ValueError, match="expected"):
        matmul(x, y, out[:, :, :, 1:], "ieee")


@pytest.mark.parametrize("dtype", DTYPES)
def test_turn(dtype: torch.dtype) -> None:
    """Of heads side by side in the columns, several ragged tiles; beside the copy nothing is written."""
    x = draw(2, 37, 2 * 70, dtype=dtype).to(DEVICE)
    out = nan(2, 2, 71, 37, dtype=dtype)
    heads = x.unflatten(2, (2, 70)).transpose(1, 2)
    turn(heads, out[:, :, :70])
    assert torch.equal(out[:, :, :70], heads.mT) and out[:, :, 70].isnan().all()
    with pytest.raises(ValueError, match="contiguous rows"):
        turn(heads, out)


def run_before(case: Case) -> Outputs:
    t, d, H, *_ = sizes(case)
    D, O, back = (nan(case.runs, rows, d, dtype=case.params.dtype) for rows in (t, d + 1, H))
    attention.before(case.params.to(DEVICE), D, O, back, case.layout)
    return {"D": D, "O": O} | ({"back": back} if case.layout.normed else {})


def ref_before(case: Case, r: int) -> list[Tensor]:
    E, pos, _, _, _, Wo, _, Wout, _ = case.layout.views(case.params[r])
    X = attention.tokens_ref(E, pos)
    A = attention.layer_norm_ref(X)[0] if case.layout.normed else X
    D, O = torch.cat([A[:-1] - A[-1], A[-1:]]), torch.cat([Wo, X[-1:]])
    return [D, transformer.centred(O), transformer.centred(Wout)] if case.layout.normed else [D, O]


def run_behind(case: Case) -> Outputs:
    t, d, _, _, F = sizes(case)
    row = nan(*case.params.shape, dtype=case.params.dtype)
    attention.behind(case.params.to(DEVICE), of(case, t, d, seed=1).to(DEVICE), of(case, d + 1, d, seed=2).to(DEVICE),
                     of(case, d + 1, F, seed=3).to(DEVICE)[:, :, F - d:], row, case.layout)
    dE, dpos, _, _, _, dWo, *_ = case.layout.views(row)
    return {"dE": dE, "dpos": dpos, "dWo": dWo}


def ref_behind(case: Case, r: int) -> list[Tensor]:
    (t, d, _, _, F), p = sizes(case), case.layout.p
    dD, rows, dG = (of(case, *shape, seed=seed)[r] for shape, seed in (((t, d), 1), ((d + 1, d), 2), ((d + 1, F), 3)))
    dX = torch.cat([dD[:-1], dD[-1:] - dD[:-1].sum(0)])
    if case.layout.normed:
        rows = transformer.centred(rows + dG[:, F - d:])
        dX = attention.layer_norm_backward_ref(dX, *attention.layer_norm_ref(attention.tokens_ref(*case.layout.views(case.params[r])[:2])))
    dX = torch.cat([dX[:-1], dX[-1:] + rows[-1]])
    return [torch.cat([dX[:p] + dX[p: 2 * p], dX[-1:]]), torch.stack([dX[:p].sum(0), dX[p: 2 * p].sum(0), dX[-1]]), rows[:-1]]


def mix_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, d, H, Q, F = sizes(case)
    G = of(case, d + 1, F, seed=3)
    G[:, :, H:] -= G[:, :, H:].mean(-1, keepdim=True) * case.layout.normed       # r is centred
    T = of(case, HEADS, t, F, seed=2)
    T[..., H:] -= T[..., H:].mean(-1, keepdim=True) * case.layout.normed
    return 2 * of(case, t, HEADS, seed=1), T, G, of(case, H, Q, seed=4) / H**0.5


def order_views(case: Case) -> tuple[Tensor, Tensor]:
    return views_of(case.slots.to(DEVICE), slots_for(case.n), case.layout.p)


def run_mix(case: Case) -> Outputs:
    (_, _, H, Q, F), (pairs, _) = sizes(case), order_views(case)
    slots, dtype = pairs.shape[1], case.params.dtype
    mixed, weights, inverses, out = (nan(case.runs, *shape, dtype=dtype) for shape in ((slots, F), (slots, 2, HEADS), (2, slots), (slots, Q)))
    mixing.mix(*(x.to(DEVICE) for x in mix_inputs(case)), pairs, mixed, weights, inverses, out, case.layout, "ieee")
    assert out.isfinite().all()        # in empty slots too, for sums run over them
    outputs = {"weights": weights[:, : case.n], "x": mixed[:, : case.n, :H], "out": out[:, : case.n]}
    return outputs | ({"r": mixed[:, : case.n, H:], "inverses": inverses[:, :, : case.n]} if case.layout.normed else {})


def ref_mix(case: Case, r: int) -> list[Tensor]:
    (_, _, H, _, _), (scores, T, G, back) = sizes(case), (x[r] for x in mix_inputs(case))
    weights = mixing.attend_ref(torch.cat([scores[:-1], torch.zeros_like(scores[:1])]), case.a[r], case.b[r])
    m = mixing.mix_ref(weights, T[:, :-1], G[-1] + T[:, -1].sum(0), case.a[r], case.b[r])
    x, rest = m[:, :H], m[:, H:]
    if not case.layout.normed:
        return [weights, x, rest + gelu_ref(x)[0] @ back]
    inverse = torch.rsqrt(rest.square().mean(-1) + attention.LN_EPS)
    x = x * inverse[:, None]
    after = rest + gelu_ref(x)[0] @ back
    inverse_y = torch.rsqrt(after.square().mean(-1) + attention.LN_EPS)
    return [weights, x, after * inverse_y[:, None], rest, torch.stack([inverse, inverse_y])]


def mix_backward_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    t, _, _, _, F = sizes(case)
    weights = torch.softmax(of(case, case.n, 3, HEADS, seed=3), 2)[:, :, :2]
    return of(case, case.n, F, seed=1), of(case, HEADS, t, F, seed=2), weights


def run_mix_backward(case: Case) -> Outputs:
    (t, d, _, _, F), (pairs, lists), dtype = sizes(case), order_views(case), case.params.dtype
    dm, T, weights = mix_backward_inputs(case)
    slots, blocks = pairs.shape[1], -(-F // mixing.column_block(dtype.itemsize))
    full = [nan(case.runs, slots, *x.shape[2:], dtype=dtype) for x in (dm, weights)]
    for into, x in zip(full, (dm, weights), strict=True):
        into[:, : case.n] = x
    dT, dweights, dscores, dG = (nan(case.runs, *shape, dtype=dtype) for shape in
                                 ((HEADS + 1, t, F), (blocks, slots, 2, HEADS), (t - 1, HEADS), (d + 1, F)))
    mixing.mix_backward(full[0], T.to(DEVICE), full[1], lists, dT, dweights, dscores, dG, case.layout)
    return {"dT": dT[:, :HEADS, :-1], "dscores": dscores, "dbase": dG[:, -1], "dbase of heads": dT[:, :HEADS, -1]}


def ref_mix_backward(case: Case, r: int) -> list[Tensor]:
    dm, T, weights = (x[r] for x in mix_backward_inputs(case))
    dT, dscores = mixing.mix_backward_ref(dm, weights, T[:, :-1], case.a[r], case.b[r])
    return [dT, dscores[:-1], dm.sum(0), dm.sum(0).expand(HEADS, -1)]


def gelu_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, H, Q, F = sizes(case)
    slots = slots_for(case.n)
    dout = of(case, slots, Q, seed=2)
    dout[:, case.n:] = 0
    return of(case, slots, F, seed=1), dout, of(case, H, Q, seed=3), of(case, 2, slots, seed=4).abs()


def run_gelu_backward(case: Case) -> Outputs:
    (_, _, H, Q, _), dtype = sizes(case), case.params.dtype
    mixed, dout, back, inverses = (x.to(DEVICE) for x in gelu_inputs(case))
    blocks = H // transformer.unit_block(H, dtype.itemsize)
    dback, dots = nan(case.runs, H, Q, dtype=dtype), nan(case.runs, blocks, mixed.shape[1], dtype=dtype)
    transformer.gelu_backward(mixed, dout, back.mT.contiguous(), dback, inverses, dots, case.layout, "ieee")
    return {"dm": mixed[:, :, :H], "dback": dback} | ({"dots": dots.sum(1)} if case.layout.normed else {})


def ref_gelu_backward(case: Case, r: int) -> list[Tensor]:
    mixed, dout, back, inverses = (x[r] for x in gelu_inputs(case))
    x = mixed[:, : case.layout.H]
    h, dgelu = gelu_ref(x)
    dx = (dout @ back.T) * dgelu
    return [dx * inverses[0, :, None], h.T @ dout, (dx * x).sum(1)] if case.layout.normed else [dx, h.T @ dout]


def norm_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (_, d, _, _, F), slots = sizes(case), slots_for(case.n)
    return (of(case, slots, d, seed=1), of(case, slots, d, seed=2), of(case, 2, slots, seed=3).abs(), of(case, 2, slots, seed=4),
            of(case, slots, F, seed=5))


def run_norm_backward(case: Case) -> Outputs:
    dy, y, inverses, dots, mixed = (x.to(DEVICE) for x in norm_inputs(case))
    transformer.norm_backward(dy, y, inverses, case.layout)
    transformer.residual_backward(mixed, dy, inverses, dots, case.layout)
    return {"dafter": dy, "dm": mixed}


def ref_norm_backward(case: Case, r: int) -> list[Tensor]:
    (dy, y, inverses, dots, mixed), (d, H) = (x[r] for x in norm_inputs(case)), (case.layout.d, case.layout.H)
    dafter = attention.layer_norm_backward_ref(dy, y, inverses[1, :, None])
    dr = dafter - mixed[:, H:] * (inverses[0].square() / d * dots.sum(0))[:, None]
    return [dafter, torch.cat([mixed[:, :H], dr], 1)]


KERNELS = {"before": (run_before, ref_before), "behind": (run_behind, ref_behind), "mix": (run_mix, ref_mix),
           "mix_backward": (run_mix_backward, ref_mix_backward), "gelu_backward": (run_gelu_backward, ref_gelu_backward)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [5, 13])
@LAYER_NORM
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_with_definition(kernel: str, model: str, p: int, dtype: torch.dtype) -> None:
    agree(make_transformer_case(model, p, runs=2 if p == 5 else 1, dtype=dtype), *KERNELS[kernel])


def test_lists_longer_than_one_load() -> None:
    case = make_transformer_case("transformer", 23, runs=1, train_frac=0.8)
    assert order_views(case)[1].shape[2] == 32
    agree(case, run_mix_backward, ref_mix_backward)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_backward_agrees_with_definition(dtype: torch.dtype) -> None:
    agree(make_transformer_case("transformer_ln", 13, dtype=dtype), run_norm_backward, ref_norm_backward)


def test_the_order_lists_every_pair_under_both_its_tokens() -> None:
    p, pairs = 7, torch.stack([torch.randperm(49, generator=torch.Generator().manual_seed(seed))[:23] for seed in (1, 2)])
    found, lists = views_of(order_of(pairs // p, pairs % p, p), slots_for(23), p)
    assert lists.shape[1:] == (2 * p, 16)
    for r in range(2):
        assert found[r, :23].tolist() == sorted(pairs[r].tolist()) and (found[r, 23:] < 0).all()
        for row in range(2 * p):
            mine = [slot for slot, pair in enumerate(found[r, :23].tolist()) if (pair // p if row < p else p + pair % p) == row]
            assert lists[r, row].tolist() == mine + [-1] * (16 - len(mine))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "tau"), [(100, 1), (1e-4, 1), (1, 7.3)], ids=["saturated", "tiny", "hot"])
@pytest.mark.parametrize(("model", "loss"), [("transformer", "ce"), ("transformer_b", "mse")])
def test_logit_gradient_at_extremes(model: str, loss: str, scale: float, tau: float, dtype: torch.dtype) -> None:
    """Of p + 1 classes, or of p, in 64 columns; in place."""
    case = make_transformer_case(model, 53, runs=1, dtype=dtype, loss=loss, tau=tau)
    pairs, _ = order_views(case)
    logits = scale * of(case, pairs.shape[1], case.layout.p_pad, seed=1)
    dz = logits.to(DEVICE, copy=True)
    logit_gradient(dz, pairs, case.labels, case.scalars.to(DEVICE), dz, case.n, case.layout, loss)
    assert not dz[:, case.n:].any() and not dz[:, :, case.layout.classes:].any()
    labels = (case.a[0] + case.b[0]) % 53
    (reference,) = references(dtype, lambda t: [loss_gradient_ref(logits[0, : case.n].to(t), labels, case.scalars[0, 0].to(t), case.layout.classes,
                                                              loss)])
    assert_accurate("dz", dz[0, : case.n], reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [(9.0, 0, 0, 0, 0), (0, 0, 5.0, 0, 2.0), (0, 1.0, 2.0, 3.0, 4.0)], ids=["total", "two groups", "groups"])
def test_held_norms_equal_their_targets(targets: tuple[float, ...], dtype: torch.dtype) -> None:
    """Run 0 holds, run 1 is free. A norm is off by at most the rounding of its weights and of its ratio: 2 eps of the target."""
    case = make_transformer_case("transformer", 13, dtype=dtype)
    case.scalars[0, 4:-3] = torch.tensor(targets, dtype=dtype)

    def rows(case: Case) -> list[Tensor]:
        gradient, moment1, moment2 = (of(case, case.layout.n_params, seed=seed) for seed in (2, 3, 4))
        return [gradient, 0.1 * moment1, 0.01 * moment2.square()]

    def run_adamw_project(case: Case) -> Outputs:
        (gradient, *moments), params = [row.to(DEVICE) for row in rows(case)], case.params.to(DEVICE, copy=True)
        squares = nan(case.runs, len(case.layout.groups), partial_blocks(case.layout), dtype=torch.float64)
        adamw_project(params, *moments, gradient, case.scalars.to(DEVICE), squares, case.layout)
        return {"params": params, "moment1": moments[0], "moment2": moments[1]}

    def ref_adamw_project(case: Case, r: int) -> list[Tensor]:
        gradient, *moments = (row[r] for row in rows(case))
        return list(adamw_project_ref(case.params[r], *moments, gradient, case.scalars[r], case.layout))

    assert case.layout.n_params == case.layout.n_weights        # no tail, which no one writes
    agree(case, run_adamw_project, ref_adamw_project)
    norms = group_norms_ref(run_adamw_project(case)["params"][0].cpu(), case.layout)
    for target, norm in zip(targets, [norms.norm(), *norms], strict=True):
        assert not target or abs(norm - target) <= 2 * torch.finfo(dtype).eps * target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["transformer", "transformer_b"])
def test_audit_counts_what_the_definition_counts(model: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every kind: class a leads by 8, 30, 60, 100 or 200, of which float32 loses the rest from 30 on; the last class is no sum in
    `transformer` and leads in a few pairs. Counts are exact."""
    case = make_transformer_case(model, 13, runs=1, dtype=dtype)
    p, layout = 13, case.layout
    logits, pair = -50 * torch.ones(1, p * p, layout.p_pad, dtype=dtype), torch.arange(p * p)
    leader = torch.where(pair % 3 == 0, (pair // p + pair % p) % p, pair // p)
    leader[::7] = layout.classes - 1
    logits[0, pair, leader] += torch.tensor([8, 30, 60, 100, 200.0], dtype=dtype)[pair % 5]
    logits[:, :, layout.classes:] = 0          # padding, above all that count
    metrics = nan(1, len(metric_names(layout.groups)), dtype=torch.float64)
    evaluate_logits(case.params.to(DEVICE), logits.to(DEVICE), case.train.to(DEVICE, torch.uint8), case.labels, case.scalars.to(DEVICE),
                    nan(1, N_PARTIAL, evaluation_tiles(layout), dtype=torch.float64),
                    nan(1, len(layout.groups), partial_blocks(layout), dtype=torch.float64), metrics, case.n, p * p, layout, "ce")
    monkeypatch.setattr(kernels.step, "all_logits_ref", lambda *_: logits[0])
    wanted = evaluate_ref(case.params[0], case.train[0], case.a[0], case.b[0], case.scalars[0, 0], layout, "ce")
    names = metric_names(layout.groups)
    for name in ("train_accuracy", "test_accuracy", "saturated", "collapse32", "collapse64", "sum_exp_is_one", "zero_gradient_rows"):
        assert metrics[0, names.index(name)].item() == pytest.approx(wanted[names.index(name)].item(), abs=1e-15), name
        assert 0 < wanted[names.index(name)] < 1, name
    assert torch.allclose(metrics[0].cpu(), wanted, rtol=1e-6, atol=1e-7)     # losses, scale and norms, which have tests of their own
