"""What a pair's label is, and the order in which a run's training pairs are walked on a GPU: for the MLP tiles in which all `a`
differ and all `b` differ.

Such a tile adds its rows into dU and dV without two rows meeting, so the sums need no atomics and have one fixed order. A tile is a
matching of the bipartite graph whose edges are the pairs; König: as many matchings as the largest degree suffice, and any number of
them can be made equally large (de Werra 1971). So padding is about 1% (p=59: 44 tiles of 32 for 1392 pairs), where the p classes of
`(b - a) mod p`, each padded to 32, would cost 36%.

For a transformer: ascending order, padded to whole tiles with -1, and behind it, for each of the 2p rows of a table, the list of the pairs that
share it. A pair adds its row four times, with a weight for each head, to sums that a program can keep at hand.
"""
import torch
from torch import Tensor


def labels_of(labels: Tensor | None, a: Tensor, b: Tensor, p: int) -> Tensor:
    """Labels of the pairs `a, b` from a table `labels (p*p,)`, -1 for a pair that is no data; without one they are sums mod p."""
    return (a + b) % p if labels is None else labels[a * p + b]


SLOT_ROWS = 64     # pairs in a tile of a transformer
LIST_ROWS = 16     # pairs of a list taken at once


def tile_rows(p: int) -> int:
    """Pairs in a tile, from `p` alone so that a run's sums do not depend on its neighbours. At most p / 1.5: a random split then has
    more tiles than its largest degree, and all are full. At least 16, the shortest inner dimension of a dot; 64 would spill at p = 97."""
    return 16 if p < 48 else 32


def matching_tiles(a: Tensor, b: Tensor, p: int) -> Tensor:
    """Pairs `a, b (n,)` -> `(tiles, rows)` int32 of `a p + b`, -1 where a tile is not full."""
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    rows = tile_rows(p)
    degree = max(int(torch.bincount(side, minlength=p).max()) for side in (a.cpu(), b.cpu()))
    count = max(-(-len(pairs) // rows), degree)
    colouring = _Colouring(p, count)
    for pair in pairs:
        colouring.add(*pair)
    colouring.level()
    tiles = torch.full((count, rows), -1, dtype=torch.int32)
    filled = [0] * count
    for u, colours in enumerate(colouring.at[0]):
        for colour, v in enumerate(colours):
            if v >= 0:
                tiles[colour, filled[colour]] = u * p + v
                filled[colour] += 1
    return tiles


class _Colouring:
    """A proper edge colouring: `at[side][vertex][colour]` is the vertex across, -1 if the colour is free there."""

    def __init__(self, p: int, count: int):
        self.at = [[[-1] * count for _ in range(p)] for _ in range(2)]
        self.load = [0] * count

    def add(self, u: int, v: int) -> None:
        """Colours the edge with the least used colour free at both ends; if there is none, an alternating path makes one."""
        at_u, at_v = self.at[0][u], self.at[1][v]
        common = [(self.load[c], c) for c, (x, y) in enumerate(zip(at_u, at_v, strict=True)) if x < 0 and y < 0]
        if common:
            colour = min(common)[1]
        else:
            colour = at_u.index(-1)
            self.flip(self.path(1, v, colour, at_v.index(-1)), colour, at_v.index(-1))
        at_u[colour], at_v[colour] = v, u
        self.load[colour] += 1

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
            self.at[0][u][colour] = self.at[1][v][colour] = -1
            self.load[colour] -= 1
        for (u, v), colour in zip(edges, colours, strict=True):
            other = first + second - colour
            self.at[0][u][other], self.at[1][v][other] = v, u
            self.load[other] += 1

    def level(self) -> None:
        """Makes the loads differ by at most one: of two matchings, the larger has a path that begins and ends in it."""
        while max(self.load) - min(self.load) > 1:
            most, least = self.load.index(max(self.load)), self.load.index(min(self.load))
            starts = ((side, vertex) for side in (0, 1) for vertex, colours in enumerate(self.at[side])
                      if colours[most] >= 0 and colours[least] < 0)
            edges = next(edges for start in starts if len(edges := self.path(*start, most, least)) % 2)
            self.flip(edges, most, least)


def slots_of(a: Tensor, b: Tensor, p: int) -> Tensor:
    """`a, b (R, n)` -> `(R, slots)` int32 of `a p + b`, -1 in empty slots; runs with equal splits are worked out once.

    Runs may differ in their number of tiles: shorter ones end in empty tiles, which add nothing and so change no bit.
    """
    splits, which = torch.unique(a.cpu() * p + b.cpu(), dim=0, return_inverse=True)
    tiles = [matching_tiles(split // p, split % p, p).reshape(-1) for split in splits]
    slots = torch.full((len(tiles), max(map(len, tiles))), -1, dtype=torch.int32)
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
