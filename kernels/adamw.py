"""AdamW on a run's flat row, fused with the projection onto the held norm.

    w <- (1 - lr wd) w                      weight matrices only
    m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    w <- w * target / ||w||                 each held set of weight matrices, if any: the clamp; moments are left alone

and with `perp_grad`, ahead of all that, g <- g - w <g, w> / <w, w> over the weight matrices together: what of the gradient only scales them
(arXiv 2501.04697, section 5, without its rescaling of what is left),

as torch.optim.AdamW orders it (arXiv 1711.05101); with `decay_last` the decay comes after the update, `w <- (1 - lr wd)(w - ...)`, as the
released runs of paper B have it. Scalars that depend on the step come from the host in float64, rounded once.
Sums of squares accumulate in float64, so a held norm is exact to the rounding of the float32 weights.

On a GPU two kernels, because no program may scale before all have summed: the update, which leaves a sum of squares per block and group,
and the scaling, whose programs each add those sums in the same order. A scale left pending for the next step's loads would save the
second one's traffic (0.7 MB a run-step at p=59, 0.17 us at 4.3 TB/s, less from the cache) and cost a multiplication at every load of a
weight in four other kernels; runs that hold nothing skip the traffic here. Traffic of the update: 7 rows.
"""
import torch
from torch import Tensor

from .dialect import divide, power_of_two, square_root, tl, triton
from .layout import GROUPS, AnyLayout

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
_EPS = tl.constexpr(EPS)
TINY = 2.2250738585072014e-308
_TINY = tl.constexpr(TINY)
PLAIN = (1 - BETA1, BETA2, 1 - BETA2)   # take1, keep2, take2 of torch's betas, the papers'
BLOCK = 1024       # elements of a row in one program


def scalar_names(groups: tuple[str, ...]) -> tuple[str, ...]:
    """What a step takes besides the data, in order. A target above 0 is held, one below 0 is a cap, which holds only what is larger than it, 0
    holds nothing; take1 = 1 - beta1, keep2 = beta2, take2 = 1 - beta2."""
    return ("tau", "decay", "step_size", "bias2_sqrt", "target_total", *(f"target_{group}" for group in groups), "take1", "keep2", "take2")


SCALARS = scalar_names(GROUPS)   # of the MLP


def group_norms_ref(weights: Tensor, layout: AnyLayout) -> Tensor:
    """Norm of each of the layout's groups of weight matrices in a row, float64 `(groups,)`."""
    return torch.stack([weights[part].double().square().sum() for part in layout.group_slices()]).sqrt()


def adamw_project_ref(params: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, scalars: Tensor,
                      layout: AnyLayout, decay_last: bool = False, perp_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """New `params, moment1, moment2`, each `(n_params,)`, from the gradient row and the scalars of `scalar_names`."""
    _, decay, step_size, bias2_sqrt = scalars[:4]
    take1, keep2, take2 = scalars[-3:]
    n = layout.n_weights
    if perp_grad:
        w, g = params[:n].double(), gradient[:n].double()
        share = ((g * w).sum() / (w * w).sum().clamp_min(TINY)).to(params.dtype)
        gradient = torch.cat([gradient[:n] - share * params[:n], gradient[n:]])
    moment1 = moment1 + take1 * (gradient - moment1)
    moment2 = moment2 * keep2 + take2 * gradient * gradient
    update = step_size * moment1 / (moment2.sqrt() / bias2_sqrt + EPS)
    weights = (params[:n] - update[:n]) * decay if decay_last else params[:n] * decay - update[:n]
    biases = params[n:] - update[n:]
    norms = group_norms_ref(weights, layout)
    held = torch.cat([norms.square().sum().sqrt()[None], norms]).clamp_min(TINY)
    targets = scalars[4:-3].double()
    ratio = torch.where(targets == 0, 1.0, targets.abs() / held)
    ratio = torch.where(targets < 0, ratio.clamp_max(1), ratio).to(params.dtype)     # (1 + groups,): total, then each group
    parts = [weights[part] * (ratio[0] * ratio[1 + i]) for i, part in enumerate(layout.group_slices())]
    return torch.cat([*parts, biases]), moment1, moment2


@triton.jit
def store_squares(weights, i, partials, ENDS: tl.constexpr):
    """This block's sums of squares by group, float64, into `partials (groups, blocks)` of the run; group g ends where `ENDS[g]` says."""
    squares = weights.to(tl.float64) * weights.to(tl.float64)
    for g in tl.static_range(len(ENDS)):
        start = ENDS[g - 1] if g > 0 else 0
        tl.store(partials + g * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where((i >= start) & (i < ENDS[g]), squares, 0.0), axis=0))


@triton.jit
def load_squares(partials, BLOCKS: tl.constexpr, BB: tl.constexpr):
    """A group's squared norm from its `partials (BLOCKS)`: the same tree of additions in every program."""
    j = tl.arange(0, BB)
    return tl.sum(tl.load(partials + j, mask=j < BLOCKS, other=0.0), axis=0)


@triton.jit
def _adamw_kernel(theta, moment1, moment2, gradient, scalars, partials, ENDS: tl.constexpr, SIZE: tl.constexpr, ROW: tl.constexpr,
                  SCALARS: tl.constexpr, BLOCK: tl.constexpr, DECAY_LAST: tl.constexpr):
    """A program: one run, BLOCK elements. The row's tail past SIZE is left alone."""
    WEIGHTS: tl.constexpr = ENDS[len(ENDS) - 1]
    run = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < SIZE
    scalars += run * SCALARS
    decay, step_size, bias2_sqrt = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    take1, keep2, take2 = tl.load(scalars + 5 + len(ENDS)), tl.load(scalars + 6 + len(ENDS)), tl.load(scalars + 7 + len(ENDS))
    at = run * ROW + i
    g = tl.load(gradient + at, mask=live, other=0.0)
    m = tl.load(moment1 + at, mask=live, other=0.0)
    v = tl.load(moment2 + at, mask=live, other=0.0)
    weights = tl.load(theta + at, mask=live, other=0.0)
    m += take1 * (g - m)
    v = v * keep2 + take2 * g * g
    update = divide(step_size * m, divide(square_root(v), bias2_sqrt) + _EPS)
    if DECAY_LAST:
        weights -= update
        weights = tl.where(i < WEIGHTS, weights * decay, weights)
    else:
        weights = tl.where(i < WEIGHTS, weights * decay, weights) - update
    tl.store(moment1 + at, m, mask=live)
    tl.store(moment2 + at, v, mask=live)
    tl.store(theta + at, weights, mask=live)
    store_squares(weights, i, partials + run * len(ENDS) * tl.num_programs(0), ENDS)


@triton.jit
def _squares_kernel(theta, partials, ENDS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    run = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(theta + run * ROW + i, mask=i < ENDS[len(ENDS) - 1], other=0.0)
    store_squares(weights, i, partials + run * len(ENDS) * tl.num_programs(0), ENDS)


@triton.jit
def _radial_kernel(theta, gradient, partials, WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """This block's parts of <g, w> and <w, w>, float64, into the first two rows of `partials (groups, blocks)` of the run."""
    run = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(theta + run * ROW + i, mask=i < WEIGHTS, other=0.0).to(tl.float64)
    g = tl.load(gradient + run * ROW + i, mask=i < WEIGHTS, other=0.0).to(tl.float64)
    at = partials + run * GROUPS * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.sum(g * w, axis=0))
    tl.store(at + tl.num_programs(0), tl.sum(w * w, axis=0))


@triton.jit
def _perpendicular_kernel(theta, gradient, partials, WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
                          BLOCKS: tl.constexpr, BB: tl.constexpr):
    """Takes from the gradient what lies along the weights."""
    run = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partials += run * GROUPS * BLOCKS
    share = load_squares(partials, BLOCKS, BB) / tl.maximum(load_squares(partials + BLOCKS, BLOCKS, BB), _TINY)
    w = tl.load(theta + run * ROW + i, mask=i < WEIGHTS, other=0.0)
    at = gradient + run * ROW + i
    tl.store(at, tl.load(at, mask=i < WEIGHTS, other=0.0) - share.to(w.dtype) * w, mask=i < WEIGHTS)


@triton.jit
def held_ratio(target, square):
    """Factor that brings a norm of the given square to `target`, or under a cap below 0; 1 where the target is 0."""
    ratio = tl.abs(target).to(tl.float64) / tl.maximum(tl.sqrt(square), _TINY)
    ratio = tl.where(target < 0, tl.minimum(ratio, 1.0), ratio)
    return tl.where(target == 0, 1.0, ratio).to(target.dtype)


@triton.jit
def _project_kernel(theta, scalars, partials, ENDS: tl.constexpr, ROW: tl.constexpr, SCALARS: tl.constexpr, BLOCK: tl.constexpr,
                    BLOCKS: tl.constexpr, BB: tl.constexpr):
    run = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    targets = scalars + run * SCALARS + 4
    most = tl.abs(tl.load(targets))
    for g in tl.static_range(len(ENDS)):
        most = tl.maximum(most, tl.abs(tl.load(targets + 1 + g)))
    if most > 0:
        partials += run * len(ENDS) * BLOCKS
        square = load_squares(partials, BLOCKS, BB)
        ratio = tl.zeros([BLOCK], scalars.dtype.element_ty) + held_ratio(tl.load(targets + 1), square)      # of the group of each element
        for g in tl.static_range(1, len(ENDS)):
            of_group = load_squares(partials + g * BLOCKS, BLOCKS, BB)
            square += of_group
            ratio = tl.where(i < ENDS[g - 1], ratio, held_ratio(tl.load(targets + 1 + g), of_group))
        at, live = theta + run * ROW + i, i < ENDS[len(ENDS) - 1]
        tl.store(at, tl.load(at, mask=live, other=0.0) * (held_ratio(tl.load(targets), square) * ratio), mask=live)


def group_ends(layout: AnyLayout) -> tuple[int, ...]:
    return tuple(part.stop for part in layout.group_slices())


def partial_blocks(layout: AnyLayout) -> int:
    """Blocks of a row, that is the last dimension of `partials (R, groups, blocks)`, float64."""
    return -(-layout.n_params // BLOCK)


def adamw_project(params: Tensor, moment1: Tensor, moment2: Tensor, gradient: Tensor, scalars: Tensor, partials: Tensor,
                  layout: AnyLayout, decay_last: bool = False, perp_grad: bool = False) -> None:
    """One update in place on the rows `(R, n_params)`; `scalars (R, >= 8 + groups)`; with `perp_grad` of the gradient as well.
    `partials (R, groups, blocks)` float64 is scratch."""
    blocks, ends, row = partial_blocks(layout), group_ends(layout), layout.n_params
    grid = (blocks, params.shape[0])
    if perp_grad:
        sizes = layout.n_weights, len(ends), row, BLOCK
        _radial_kernel[grid](params, gradient, partials, *sizes, num_warps=4)
        _perpendicular_kernel[grid](params, gradient, partials, *sizes, blocks, power_of_two(blocks), num_warps=4)
    _adamw_kernel[grid](params, moment1, moment2, gradient, scalars, partials, ends, sum(layout.sizes), row, scalars.shape[1], BLOCK, decay_last,
                        num_warps=4)
    _project_kernel[grid](params, scalars, partials, ends, row, scalars.shape[1], BLOCK, blocks, power_of_two(blocks), num_warps=4)


def group_squares(params: Tensor, partials: Tensor, layout: AnyLayout) -> None:
    """Sums of squares of every block and group of `params (R, n_params)` into `partials (R, groups, blocks)`."""
    grid = (partial_blocks(layout), params.shape[0])
    _squares_kernel[grid](params, partials, group_ends(layout), layout.n_params, BLOCK, num_warps=4)
