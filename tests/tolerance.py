"""The one tolerance policy: a kernel may be twice as wrong as plain float32 torch, plus 4 eps of the largest value."""
import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def assert_accurate(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`plain` is the definition in float32, `exact` in float64, from the same inputs, all of one shape.

    Of a float64 kernel the same is asked in its own eps: the definition's float32 error scaled by the ratio of the two.
    """
    assert actual.shape == plain.shape == exact.shape, f"{name}: shapes {tuple(actual.shape)}, {tuple(plain.shape)}, {tuple(exact.shape)}"
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() * eps / EPS32 + 4 * eps * exact.abs().max().item()
    share = error / allowed if allowed else float(error > 0)
    message = f"{name}: error {error:.3g}, allowed {allowed:.3g}, {share:.0%} of the budget"
    print(message)
    assert share <= 1, message          # NaN fails
