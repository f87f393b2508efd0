"""The tiles of pairs: every pair once, no two in a tile share a or b, as few tiles as can be."""
import pytest
import torch
from torch import Tensor

from kernels.pairs import BLOCK_PAIRS, matching_tiles, slots_of, tile_rows


def split(p: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    pairs = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))[:n]
    return pairs // p, pairs % p


def assert_tiles(tiles: Tensor, a: Tensor, b: Tensor, p: int) -> None:
    assert sorted(tiles[tiles >= 0].tolist()) == sorted((a * p + b).tolist())
    for tile in tiles:
        live = tile[tile >= 0]
        assert len(set((live // p).tolist())) == len(set((live % p).tolist())) == len(live)


@pytest.mark.parametrize("p", [5, 29, 59, 97])
@pytest.mark.parametrize("train_frac", [0.3, 0.4, 0.65, 1.0])
def test_random_splits(p: int, train_frac: float) -> None:
    a, b = split(p, int(train_frac * p * p), seed=1000)
    tiles = matching_tiles(a, b, p)
    assert_tiles(tiles, a, b, p)
    degree = max(torch.bincount(side, minlength=p).max().item() for side in (a, b))
    assert tiles.shape == (max(-(-len(a) // tile_rows(p)), degree), tile_rows(p))      # the fewest there can be


def test_published_split_needs_no_padding_to_speak_of() -> None:
    """1392 pairs in 44 tiles of 32: 1.2% of the slots are empty."""
    assert matching_tiles(*split(59, 1392, seed=1000), 59).shape == (44, 32)


def test_a_star_needs_a_tile_for_each_pair() -> None:
    a, b = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    assert_tiles(matching_tiles(a, b, 7), a, b, 7)


def test_runs_keep_their_order_beside_others() -> None:
    """A run's tiles do not depend on the ensemble; a run with fewer tiles ends in empty ones."""
    star = (torch.arange(7) * 0, torch.arange(7))       # 7 tiles
    line = (torch.arange(7), torch.arange(7))           # 1 tile
    a, b = (torch.stack(sides) for sides in zip(line, star, line, strict=True))
    slots = slots_of(a, b, 7)
    assert slots.shape == (3, 2 * BLOCK_PAIRS) and torch.equal(slots[0], slots[2])
    assert torch.equal(slots[0, :16], matching_tiles(*line, 7)[0]) and (slots[0, 16:] == -1).all()
    assert torch.equal(slots[1, : 7 * 16], matching_tiles(*star, 7).reshape(-1)) and (slots[1, 7 * 16:] == -1).all()
