"""What a pair's label is, and the order in which a run's training pairs are walked on a GPU: for the MLP tiles in which all `a`
differ and all `b` differ.

Such a tile adds its rows into dU and dV without two rows meeting, so the sums need no atomics and have one fixed order. A tile is a
matching of the bipartite graph whose edges are the pairs; König: as many matchings as the largest degree suffice, and any number of
them can be made equally large (de Werra 1971). So padding is about 1% (p=59: 44 tiles of 32 for 1392 pairs), where the p classes of
`(b - a) mod p`, each padded to 32, would cost 36%.

For a transformer: ascending order, padded to whole tiles with -1, and behind it, for each of the 2p rows of a table, the list of the pairs that
share it. A pair adds its row four times, with a weight for each head, to sums that a program can keep at hand.
"""
import functools

import numpy as np
import torch
from torch import Tensor


def labels_of(labels: Tensor | None, a: Tensor, b: Tensor, p: int) -> Tensor:
    """Labels of the pairs `a, b` from a table `labels (p*p,)`, -1 for a pair that is no data; without one they are sums mod p."""
    return (a + b) % p if labels is None else labels[a * p + b]


BLOCK_PAIRS = 64   # pairs that a program of the MLP's backward pass takes at once: 64 / tile_rows tiles
SLOT_ROWS = 64     # pairs in a tile of a transformer
LIST_ROWS = 16     # pairs of a list taken at once


def tile_rows(p: int) -> int:
    """Pairs in a tile, from `p` alone so that a run's sums do not depend on its neighbours. At most p / 1.5: a random split then has
    more tiles than its largest degree, and all are full. At least 16, the shortest inner dimension of a dot; 64 would spill at p = 97."""
    return 16 if p < 48 else 32


def matching_tiles(a: Tensor, b: Tensor, p: int) -> Tensor:
    """Pairs `a, b (n,)` -> `(tiles, rows)` int32 of `a p + b`, -1 where a tile is not full."""
    return torch.from_numpy(_matching_tiles((a.cpu() * p + b.cpu()).numpy().astype(np.int32).tobytes(), p).copy())


@functools.lru_cache(maxsize=1024)      # the ensembles of a sweep train on the same splits
def _matching_tiles(split: bytes, p: int) -> np.ndarray:
    pairs = np.frombuffer(split, np.int32)
    rows = tile_rows(p)
    degree = max(int(np.bincount(side, minlength=p).max()) for side in (pairs // p, pairs % p))
    count = max(-(-len(pairs) // rows), degree)
    colouring = _Colouring(p, count)
    for u, v in zip((pairs // p).tolist(), (pairs % p).tolist(), strict=True):
        colouring.add(u, v)
    colouring.level()
    across = np.array(colouring.at[0], np.int32).T                  # (tiles, p)
    tile, u = np.nonzero(across >= 0)
    tiles = np.full((count, rows), -1, np.int32)
    tiles[tile, (across >= 0).cumsum(1)[tile, u] - 1] = u * p + across[tile, u]
    return tiles


class _Colouring:
    """A proper edge colouring: `at[side][vertex][colour]` is the vertex across, -1 if the colour is free there; the free colours of a vertex are also
    the bits of a number, so that those free at both ends are one operation."""

    def __init__(self, p: int, count: int):
        self.at = [[[-1] * count for _ in range(p)] for _ in range(2)]
        self.free = [[(1 << count) - 1] * p for _ in range(2)]
        self.load, self.next = [0] * count, 0

    def add(self, u: int, v: int) -> None:
        """Colours the edge with the next colour in turn that is free at both ends; if there is none, an alternating path makes one."""
        common = self.free[0][u] & self.free[1][v]
        if common:
            later = common >> self.next << self.next or common
            colour = (later & -later).bit_length() - 1
            self.next = (colour + 1) % len(self.load)
        else:
            colour, other = self.at[0][u].index(-1), self.at[1][v].index(-1)
            self.flip(self.path(1, v, colour, other), colour, other)
        self.put(u, v, colour)

    def put(self, u: int, v: int, colour: int) -> None:
        self.at[0][u][colour], self.at[1][v][colour] = v, u
        self.free[0][u] ^= 1 << colour
        self.free[1][v] ^= 1 << colour
        self.load[colour] += 1

    def take(self, u: int, v: int, colour: int) -> None:
        self.at[0][u][colour] = self.at[1][v][colour] = -1
        self.free[0][u] ^= 1 << colour
        self.free[1][v] ^= 1 << colour
        self.load[colour] -= 1

    def path(self, side: int, vertex: int, first: int, second: int) -> list[tuple[int, int]]:
        """Edges `(u, v)` of the path from `vertex` whose colours alternate `first, second, first, ...`."""
        edges, colour = [], first
        while (across := self.at[side][vertex][colour]) >= 0:
            edges.append((vertex, across) if side == 0 else (across, vertex))
            side, vertex, colour = 1 - side, across, first + second - colour
        return edges

    def flip(self, edges: list[tuple[int, int]], first: int, second: int) -> None:
        """Exchanges the two colours along a path that starts with `first`."""
        colours = [first if i % 2 == 0 else second for i in range(len(edges))]
        for (u, v), colour in zip(edges, colours, strict=True):
            self.take(u, v, colour)
        for (u, v), colour in zip(edges, colours, strict=True):
            self.put(u, v, first + second - colour)

    def level(self) -> None:
        """Makes the loads differ by at most one: of two matchings, the larger has a path that begins and ends in it."""
        while max(self.load) - min(self.load) > 1:
            most, least = self.load.index(max(self.load)), self.load.index(min(self.load))
            starts = ((side, vertex) for side in (0, 1) for vertex, colours in enumerate(self.at[side])
                      if colours[most] >= 0 and colours[least] < 0)
            edges = next(edges for start in starts if len(edges := self.path(*start, most, least)) % 2)
            self.flip(edges, most, least)


def slots_of(a: Tensor, b: Tensor, p: int) -> Tensor:
    """`a, b (R, n)` -> `(R, slots)` int32 of `a p + b`, -1 in empty slots, a multiple of BLOCK_PAIRS; runs with equal splits are worked out once.

    Runs may differ in their number of tiles: shorter ones end in empty tiles, which add nothing and so change no bit.
    """
    splits, which = torch.unique(a.cpu() * p + b.cpu(), dim=0, return_inverse=True)
    tiles = [matching_tiles(split // p, split % p, p).reshape(-1) for split in splits]
    slots = torch.full((len(tiles), -(-max(map(len, tiles)) // BLOCK_PAIRS) * BLOCK_PAIRS), -1, dtype=torch.int32)
    for row, tile in zip(slots, tiles, strict=True):
        row[: len(tile)] = tile
    return slots[which]


def order_of(a: Tensor, b: Tensor, p: int) -> Tensor:
    """`a, b (R, n)` -> `(R, slots + 2 p L)` int32: the pairs `a p + b` in ascending order, and for every table row the slots of the pairs that
    share it; -1 where there are none. L is that of the longest list, so a shorter one ends in tiles that add nothing."""
    pairs = (a.cpu() * p + b.cpu()).sort(dim=1).values                          # (R, n)
    runs, n = pairs.shape
    slots = torch.full((runs, slots_for(n)), -1)
    slots[:, :n] = pairs
    tokens = torch.stack([pairs // p, pairs % p], 1)                            # (R, 2, n)
    counts = torch.zeros(runs, 2, p, dtype=torch.int64).scatter_add(2, tokens, torch.ones_like(tokens))
    length = -(-int(counts.max()) // LIST_ROWS) * LIST_ROWS
    grouped, slot = tokens.sort(dim=2, stable=True)
    place = torch.arange(n) - (counts.cumsum(2) - counts).gather(2, grouped)    # in its list
    lists = torch.full((runs, 2, p * length), -1).scatter(2, grouped * length + place, slot)
    return torch.cat([slots, lists.flatten(1)], 1).to(torch.int32)


def slots_for(n: int) -> int:
    """Slots of a run with `n` pairs."""
    return -(-n // SLOT_ROWS) * SLOT_ROWS


def views_of(order: Tensor, n_slots: int, p: int) -> tuple[Tensor, Tensor]:
    """Of `order_of`: the pairs `(R, slots)`, and the lists `(R, 2p, L)`."""
    return order[:, :n_slots], order[:, n_slots:].unflatten(1, (2 * p, -1))
