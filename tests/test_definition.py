"""The chain of proof, first links: float64 autograd proves the closed-form gradient, torch.optim.AdamW the optimiser, algebra the clamp."""
import math

import pytest
import torch
import torch.nn.functional as F

from common import Mlp, ParityMlp, n_train
from kernels.adamw import PLAIN, SCALARS, adamw_project_ref, group_norms_ref
from kernels.layout import DenseLayout, Layout, mlp_layout
from kernels.loss import AUDIT, loss_gradient_ref, loss_ref, softmax_audit_ref
from kernels.step import METRICS, evaluate_ref, gradient_ref, train_step_ref
from lab.draws import initial_rows, split


def start(p: int, d: int = 128, H: int = 256, dtype: torch.dtype = torch.float64, member: int = 0) -> tuple:
    layout = mlp_layout(p, d, H, dtype)
    row = initial_rows(layout, 2, 0, (member,), dtype)[0]
    row[layout.n_weights: layout.n_weights + H] = 0.1 * torch.randn(H, generator=torch.Generator().manual_seed(5), dtype=dtype)
    pairs = split(p, n_train(p, 0.40), member, 0)
    return layout, row, pairs // p, pairs % p


def plain(row: torch.Tensor, layout: Layout) -> Mlp:
    """The papers' model as they print it, `gelu([E[a]; E[b]] W1 + b1) W2 + b2`, no tables, with the weights of `row`."""
    model = Mlp(layout.p, layout.d, layout.H).to(row.dtype)
    for parameter, values in zip(model.parameters(), layout.views(row), strict=True):
        parameter.data = values[..., : parameter.shape[-1]].clone()
    return model


def plain_loss(z: torch.Tensor, labels: torch.Tensor, tau: float, loss: str) -> torch.Tensor:
    if loss == "stablemax":
        x = z / tau
        scores = torch.where(x >= 0, x + 1, 1 / (1 - x))
        return -torch.log(scores[torch.arange(len(z)), labels] / scores.sum(1)).mean()
    return F.cross_entropy(z / tau, labels) if loss == "ce" else (z / tau - F.one_hot(labels, z.shape[1])).square().sum(-1).mean()


@pytest.mark.parametrize("loss", ["ce", "mse", "stablemax"])
@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("p", [7, 16, 59])   # padding to 8; a power of two, no padding; the papers' size
def test_gradient_is_autograds(p: int, tau: float, loss: str) -> None:
    layout, row, a, b = start(p)
    model = plain(row, layout)
    plain_loss(model(a, b), (a + b) % p, tau, loss).backward()
    ours = gradient_ref(row, a, b, torch.tensor(tau, dtype=torch.float64), layout, loss)
    for mine, parameter in zip(layout.views(ours), model.parameters(), strict=True):
        theirs = parameter.grad
        assert (mine[..., : theirs.shape[-1]] - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("loss, tau", [("ce", 1.0), ("ce", 0.3), ("mse", 3.0), ("stablemax", 0.3)])
def test_gradient_of_the_dense_mlp_is_autograds(loss: str, tau: float) -> None:
    """Of the first m examples alone. 0 and 1 in place of -1 and 1, and a number between, are inputs as well."""
    layout, generator = DenseLayout(n=7, H=48, m=20, examples=33), torch.Generator().manual_seed(3)
    row = torch.randn(layout.n_params, generator=generator, dtype=torch.float64)
    x = torch.randint(2, (33, 7), generator=generator).double()
    x[0, 0] = 0.3
    labels = torch.randint(2, (33,), generator=generator)
    model = ParityMlp(7, 48).double()
    for parameter, values in zip(model.parameters(), layout.views(row), strict=True):
        parameter.data = values.clone()
    plain_loss(model(x[:20]), labels[:20], tau, loss).backward()
    ours = gradient_ref(row, x, labels, torch.tensor(tau, dtype=torch.float64), layout, loss)
    assert not ours[sum(layout.sizes):].any()
    for mine, parameter in zip(layout.views(ours), model.parameters(), strict=True):
        assert (mine - parameter.grad).norm() <= 1e-12 * parameter.grad.norm()
    train = (torch.arange(33) < 20).double()
    got = evaluate_ref(row, train, x, labels, torch.tensor(tau, dtype=torch.float64), layout, loss)
    z = model(x).detach()
    right = (z.argmax(1) == labels).double()
    assert got[:2].tolist() == [right[:20].mean(), right[20:].mean()] and len(got) == len(METRICS) - 1
    assert got[2:5].tolist() == pytest.approx([float(plain_loss(z[:20], labels[:20], tau, loss)), float(plain_loss(z[20:], labels[20:], tau, loss)),
                                               float((z / tau).norm(dim=1).mean())], rel=1e-12)


def test_padding_gets_no_gradient() -> None:
    layout, row, a, b = start(7)
    for loss in ("ce", "mse"):
        _, _, dW2, _, db2 = layout.views(gradient_ref(row, a, b, torch.tensor(1.0, dtype=torch.float64), layout, loss))
        assert layout.p_pad == 8 and not dW2[:, 7:].any() and not db2[7:].any() and dW2[:, :7].all()


def scalars(t: int, lr: float, weight_decay: float, targets: tuple = (0, 0, 0, 0), tau: float = 1.0) -> torch.Tensor:
    return torch.tensor([tau, 1 - lr * weight_decay, lr / (1 - 0.9**t), math.sqrt(1 - 0.999**t), *targets, *PLAIN], dtype=torch.float64)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-13),
    (torch.float32, 1e-6),   # 20 steps of 4 roundings, eps 6e-8 each: 20 * 4 * 6e-8 = 5e-6 at worst, a fifth of it typically
])
def test_optimiser_is_torch_adamw(dtype: torch.dtype, tolerance: float) -> None:
    layout, row, *_ = start(11, 8, 16, dtype)
    n = layout.n_weights
    weights, biases = row[:n].clone().requires_grad_(), row[n:].clone().requires_grad_()
    reference = torch.optim.AdamW([{"params": [weights], "weight_decay": 0.7}, {"params": [biases], "weight_decay": 0.0}], lr=3e-3)
    state = row, torch.zeros_like(row), torch.zeros_like(row)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 21):
        gradient = torch.randn(layout.n_params, generator=generator, dtype=dtype)
        weights.grad, biases.grad = gradient[:n].clone(), gradient[n:].clone()
        reference.step()
        state = adamw_project_ref(*state, gradient, scalars(t, 3e-3, 0.7).to(dtype), layout)
    expected = torch.cat([weights, biases]).detach()
    assert (state[0] - expected).norm() <= tolerance * expected.norm()


def test_decay_last_is_the_same_update_decayed_with_the_weights() -> None:
    layout, row, *_ = start(11, 8, 16)
    gradient, zeros, n = torch.randn_like(row), torch.zeros_like(row), layout.n_weights
    undecayed = adamw_project_ref(row, zeros, zeros, gradient, scalars(1, 1e-2, 0.0), layout)[0]
    last = adamw_project_ref(row, zeros, zeros, gradient, scalars(1, 1e-2, 0.7), layout, decay_last=True)[0]
    assert torch.allclose(last[:n], undecayed[:n] * (1 - 0.7e-2), rtol=1e-14) and torch.equal(last[n:], undecayed[n:])


def test_clamp_holds_total_and_groups_and_leaves_moments_and_biases() -> None:
    layout, row, *_ = start(11, 8, 16, torch.float32)
    gradient = torch.randn(layout.n_params, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros_like(row)
    free = adamw_project_ref(row, zeros, zeros, gradient, scalars(1, 1e-3, 1.0).float(), layout)
    total = adamw_project_ref(row, zeros, zeros, gradient, scalars(1, 1e-3, 1.0, (12.5, 0, 0, 0)).float(), layout)
    groups = adamw_project_ref(row, zeros, zeros, gradient, scalars(1, 1e-3, 1.0, (0, 3.0, 0, 7.0)).float(), layout)
    eps = torch.finfo(torch.float32).eps   # the ratio and each product are rounded once: half an ulp each
    assert abs(float(group_norms_ref(total[0], layout).square().sum().sqrt()) / 12.5 - 1) <= eps
    E, W1, W2 = group_norms_ref(groups[0], layout).tolist()
    assert abs(E / 3 - 1) <= eps and abs(W2 / 7 - 1) <= eps and group_norms_ref(free[0], layout)[1].item() == W1
    for clamped in (total, groups):
        assert torch.equal(clamped[0][layout.n_weights:], free[0][layout.n_weights:])
        assert torch.equal(clamped[1], free[1]) and torch.equal(clamped[2], free[2])


def test_loss_gradient_rows_sum_to_zero_and_ignore_a_shift() -> None:
    z = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 30
    labels = torch.arange(20) % 13
    gradient = loss_gradient_ref(z, labels, torch.tensor(0.7, dtype=torch.float64), 13, "ce")
    shifted = loss_gradient_ref(z + 1000, labels, torch.tensor(0.7, dtype=torch.float64), 13, "ce")
    assert gradient.sum(1).abs().max() < 1e-15 and not gradient[:, 13:].any()
    assert torch.allclose(gradient, shifted, rtol=1e-9, atol=1e-15)   # z + 1000 keeps 13 of 16 digits


@pytest.mark.parametrize("margin", [14.0, 16.0, 300.0])
def test_a_small_cross_entropy_is_kept_in_float32(margin: float) -> None:
    """log(1 + 12 e^-m) of float32 logits to ulps of the sum of exponentials, 1.2e-7 each; the logarithm of float32 is off by an ulp of m."""
    z = torch.zeros(1, 16)
    z[:, 3] = margin
    exact = math.log1p(12 * math.exp(-margin))
    assert loss_ref(z, torch.tensor([3]), torch.ones(()), 13, "ce").item() == pytest.approx(exact, abs=3e-7)


def audit(margin: float, tau: float = 1.0) -> dict[str, float]:
    """The audit of four rows whose label leads every other class by `margin`."""
    z = torch.zeros(4, 16)
    z[:, 3] = margin
    return dict(zip(AUDIT, softmax_audit_ref(z, torch.full((4,), 3), torch.tensor(tau), 13, "ce").tolist(), strict=True))


def test_audit_sees_float32_collapse_that_float64_does_not_have() -> None:
    # 12 e^-m falls under half an ulp of 1 at m > 19.1 in float32, at m > 39.2 in float64
    assert audit(15.0)["collapse32"] == audit(15.0)["zero_gradient_rows"] == 0
    collapsed = audit(25.0)
    assert (collapsed["collapse32"], collapsed["collapse64"], collapsed["sum_exp_is_one"]) == (1, 0, 1)
    assert 0 < collapsed["max_gradient_difference"] < 1e-9
    # past e^-104 the float32 exponential itself is 0, and with it the whole gradient row; divided by tau it comes back
    assert audit(110.0)["zero_gradient_rows"] == 1 and audit(110.0)["collapse64"] == 1
    assert audit(110.0, tau=4.0)["collapse64"] == 0


def test_evaluation_counts_what_a_plain_forward_counts() -> None:
    layout, row, a, b = start(13, 16, 32)
    p, tau = 13, 1.7
    for _ in range(60):   # far enough that some pairs are right
        m = torch.zeros_like(row)
        train_step_ref(row, m, m.clone(), a, b, scalars(1, 1e-2, 0.0, tau=tau), layout, "ce")
    train = torch.zeros(p * p, dtype=torch.float64).scatter_(0, a * p + b, 1)
    got = dict(zip(METRICS, evaluate_ref(row, train, a, b, torch.tensor(tau, dtype=torch.float64), layout, "ce").tolist(), strict=True))
    pair = torch.arange(p * p)
    E, W1, W2, *_ = layout.views(row)
    z = plain(row, layout)(pair // p, pair % p).detach()
    labels = (pair // p + pair % p) % p
    right, test = z.argmax(1) == labels, train == 0
    assert got["train_accuracy"] == right[~test].double().mean() and got["test_accuracy"] == right[test].double().mean()
    assert got["train_accuracy"] > 0 and len(SCALARS) == 11
    assert got["train_loss"] == pytest.approx(float(F.cross_entropy(z[~test] / tau, labels[~test])), rel=1e-12)
    assert got["test_loss"] == pytest.approx(float(F.cross_entropy(z[test] / tau, labels[test])), rel=1e-12)
    assert got["logit_scale"] == pytest.approx(float((z / tau).norm(dim=1).mean()), rel=1e-12)
    assert got["saturated"] == (torch.softmax(z / tau, 1).amax(1) > 0.999).double().mean()
    assert got["norm"] == pytest.approx(float(torch.cat([E.flatten(), W1.flatten(), W2.flatten()]).norm()), rel=1e-12)


def test_stablemax_does_not_saturate_where_softmax_does() -> None:
    """A right logit 30 above the others' 0: all of softmax in float32, 31 of 36 parts of StableMax. The audit is of the loss's own probabilities."""
    z, labels, tau = torch.zeros(3, 8), torch.tensor([0, 1, 2]), torch.tensor(1.0)
    z[torch.arange(3), labels] = 30
    softmax, stable = (dict(zip(AUDIT, softmax_audit_ref(z, labels, tau, 6, loss).tolist(), strict=True)) for loss in ("ce", "stablemax"))
    assert softmax["collapse32"] == softmax["sum_exp_is_one"] == 1 and softmax["collapse64"] == 0
    assert not any(stable[name] for name in AUDIT[:4]) and 0 < stable["max_gradient_difference"] < 1e-6
    gradient = loss_gradient_ref(z, labels, tau, 6, "stablemax")
    assert gradient[0, 0] == pytest.approx((31 / 36 - 1) / 31 / 3, rel=1e-6) and not gradient[:, 6:].any()
    assert loss_ref(z, labels, tau, 6, "stablemax")[0] == pytest.approx(math.log(36 / 31), rel=1e-6)
