"""Everything measured at one step, on a GPU: one pass over all p*p pairs. The definition is `step.evaluate_ref`.

    tiles of pairs -> 11 partial sums each (counts are whole numbers in float64, so exact) -> the 15 values of `step.METRICS`

Partial sums of a tile, in this order: correct on train and on test, loss on train and on test, ||z / tau||, saturated pairs, the four
counts of the audit and its largest difference. A second kernel, one program a run, adds the tiles in one order. Traffic per run: the
tables and W2 through the cache, the mask of training pairs, and 88 bytes a tile.
"""
from torch import Tensor

from .adamw import group_squares, load_squares, partial_blocks
from .dialect import BK, divide, power_of_two, square_root, tl, triton
from .hidden import logits_tile
from .layout import AnyLayout, Layout, TransformerLayout
from .loss import audit_rows, loss_rows, score_rows

N_PARTIAL = 11
BN = 32            # pairs in a tile: the audit holds a tile of logits in float64 as well
BN_LOGITS = 16     # of a transformer, whose logits may be 128 columns of float64
_BN, _N_PARTIAL = tl.constexpr(BN), tl.constexpr(N_PARTIAL)


@triton.jit
def _evaluate_kernel(theta, tables, train, labels, scalars, partials, train_row, p: tl.constexpr, d: tl.constexpr, H: tl.constexpr,
                     p_pad: tl.constexpr, ROW: tl.constexpr, SCALARS: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, LOSS: tl.constexpr,
                     PRECISION: tl.constexpr):
    """A program: one run, BN consecutive pairs."""
    run = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * _BN + tl.arange(0, _BN)
    inside = pair < p * p
    a, b = tl.where(inside, pair // p, 0), tl.where(inside, pair % p, 0)
    logits = logits_tile(theta + run * ROW, tables + run * (2 * p * H), a, b, p, d, H, p_pad, P, BK, PRECISION)    # (BN, P)
    measure_tile(logits, tl.load(labels + pair, mask=inside, other=-1), pair, tl.load(scalars + run * SCALARS), train + run * train_row,
                 partials + run * (_N_PARTIAL * tl.num_programs(0)), p, LOSS)


@triton.jit
def _evaluate_logits_kernel(logits, train, labels, scalars, partials, logits_run, train_row, p: tl.constexpr, CLASSES: tl.constexpr,
                            p_pad: tl.constexpr, SCALARS: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, LOSS: tl.constexpr):
    """A program: one run, BN consecutive pairs, whose logits lie in memory."""
    run = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = pair < p * p
    column = tl.arange(0, P)[None, :]
    tile = tl.load(logits + run * logits_run + pair[:, None] * p_pad + column, mask=inside[:, None] & (column < p_pad), other=0.0)
    measure_tile(tile, tl.load(labels + pair, mask=inside, other=-1), pair, tl.load(scalars + run * SCALARS), train + run * train_row,
                 partials + run * (_N_PARTIAL * tl.num_programs(0)), CLASSES, LOSS)


@triton.jit
def measure_tile(logits, labels, pair, tau, train, partials, p: tl.constexpr, LOSS: tl.constexpr):
    """The partial sums of a tile of `logits (pairs, P)`, of which `p` columns are classes, into `partials (11, tiles)` of the run. A pair of label
    -1 is no data."""
    data = labels >= 0
    on_train = tl.load(train + pair, mask=data, other=0).to(tl.float64)
    on_test = tl.where(data, 1 - on_train, 0.0)
    column = tl.arange(0, logits.shape[1])[None, :]
    is_label = column == labels[:, None]
    at_label = tl.sum(tl.where(is_label, logits, 0.0), axis=1)
    rival = tl.max(tl.where(is_label | (column >= p), -float("inf"), logits), axis=1)
    correct = (at_label > rival).to(tl.float64)
    scaled = divide(logits, tau)
    loss = tl.where(data, loss_rows(scaled, labels, p, LOSS), 0.0)
    within = tl.where(column < p, scaled, 0.0)
    scale = square_root(tl.sum(within * within, axis=1)).to(tl.float64)
    scores, total = score_rows(scaled, column < p, LOSS)
    saturated = divide(tl.max(scores, axis=1), total) > 0.999
    collapsed32, collapsed64, sum_is_one, zero, difference = audit_rows(logits, tau, labels, p, LOSS)

    at, tiles = partials + tl.program_id(0), tl.num_programs(0)
    tl.store(at, tl.sum(correct * on_train, axis=0))
    tl.store(at + tiles, tl.sum(correct * on_test, axis=0))
    tl.store(at + 2 * tiles, tl.sum(loss * on_train, axis=0))
    tl.store(at + 3 * tiles, tl.sum(loss * on_test, axis=0))
    tl.store(at + 4 * tiles, tl.sum(tl.where(data, scale, 0.0), axis=0))
    tl.store(at + 5 * tiles, tl.sum(tl.where(data & saturated, 1.0, 0.0).to(tl.float64), axis=0))
    tl.store(at + 6 * tiles, tl.sum(collapsed32 * on_train, axis=0))
    tl.store(at + 7 * tiles, tl.sum(collapsed64 * on_train, axis=0))
    tl.store(at + 8 * tiles, tl.sum(sum_is_one * on_train, axis=0))
    tl.store(at + 9 * tiles, tl.sum(zero * on_train, axis=0))
    tl.store(at + 10 * tiles, tl.max(difference * on_train, axis=0))


@triton.jit
def _metrics_kernel(partials, squares, metrics, metrics_row, n_train, n_pairs, TILES: tl.constexpr, BT: tl.constexpr,
                    BLOCKS: tl.constexpr, BB: tl.constexpr, GROUPS: tl.constexpr):
    """A program: one run. Divides by n_train, n_test or n_pairs, in the order of `step.metric_names`."""
    run = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BT)
    at = partials + run * (_N_PARTIAL * TILES) + j
    out = metrics + run * metrics_row
    n_pairs, n_train = tl.full([], n_pairs, tl.float64), tl.full([], n_train, tl.float64)
    n_test = n_pairs - n_train
    for k in tl.static_range(0, 10):
        count = n_pairs if k == 4 or k == 5 else n_test if k == 1 or k == 3 else n_train
        mean = tl.sum(tl.load(at + k * TILES, mask=j < TILES, other=0.0), axis=0) / count
        tl.store(out + (k if k < 6 else k + 1 + GROUPS), mean)
    tl.store(out + 11 + GROUPS, tl.max(tl.load(at + 10 * TILES, mask=j < TILES, other=0.0), axis=0))
    square = tl.zeros([], tl.float64)
    for g in tl.static_range(GROUPS):
        of_group = load_squares(squares + (run * GROUPS + g) * BLOCKS, BLOCKS, BB)
        tl.store(out + 7 + g, tl.sqrt(of_group))
        square += of_group
    tl.store(out + 6, tl.sqrt(square))


def evaluation_tiles(layout: AnyLayout) -> int:
    return -(-layout.examples // (BN_LOGITS if isinstance(layout, TransformerLayout) else BN))


def evaluate(params: Tensor, tables: Tensor, train: Tensor, labels: Tensor, scalars: Tensor, partials: Tensor, squares: Tensor, metrics: Tensor,
             n_train: int, n_pairs: int, layout: Layout, loss: str, arithmetic: str) -> None:
    """`train (R, p*p)` of 0 and 1, `labels (p*p,)`, of which `n_pairs` are not -1, `tables` of these `params` -> `metrics (R, 15)` float64,
    named by `step.METRICS`; rows of train and metrics may lie further apart than they are long.

    Scratch, float64: `partials (R, 11, tiles)`, `squares (R, 3, blocks)`.
    """
    grid = (evaluation_tiles(layout), params.shape[0])
    _evaluate_kernel[grid](params, tables, train, labels, scalars, partials, train.stride(0), *layout, layout.n_params, scalars.shape[1],
                           power_of_two(layout.p_pad), BK, loss, arithmetic, num_warps=8)
    sum_tiles(params, partials, squares, metrics, n_train, n_pairs, layout)


def evaluate_logits(params: Tensor, logits: Tensor, train: Tensor, labels: Tensor, scalars: Tensor, partials: Tensor, squares: Tensor,
                    metrics: Tensor, n_train: int, n_pairs: int, layout: TransformerLayout, loss: str) -> None:
    """The same from the logits of all pairs, `logits (R, >= p*p, p_pad)`; `metrics (R, 12 + groups)`."""
    grid = (evaluation_tiles(layout), params.shape[0])
    _evaluate_logits_kernel[grid](logits, train, labels, scalars, partials, logits.stride(0), train.stride(0), layout.p, layout.classes,
                                  layout.p_pad, scalars.shape[1], power_of_two(layout.p_pad), BN_LOGITS, loss, num_warps=8)
    sum_tiles(params, partials, squares, metrics, n_train, n_pairs, layout)


def sum_tiles(params: Tensor, partials: Tensor, squares: Tensor, metrics: Tensor, n_train: int, n_pairs: int, layout: AnyLayout) -> None:
    """The partial sums of every tile, `partials (R, 11, tiles)`, into `metrics (R, 12 + groups)`."""
    tiles, blocks = evaluation_tiles(layout), partial_blocks(layout)
    group_squares(params, squares, layout)
    _metrics_kernel[(params.shape[0],)](partials, squares, metrics, metrics.stride(0), n_train, n_pairs, tiles, power_of_two(tiles), blocks,
                                        power_of_two(blocks), len(layout.groups), num_warps=4)
