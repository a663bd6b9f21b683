"""Strategies: which of an item's possible partners come first.

A strategy is one function that gives every ordered pair (row item, column item) of a tile a priority, higher is first.
It looks at the two items and the seed only, so that candidates do not depend on tiles, workers or their order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.sides import Floats, Keys, Side, seeded

Priorities = npt.NDArray[Any]  # uint32[R, C] or float32[R, C]


@dataclass(frozen=True)
class Tile:
    """All ordered pairs of R row items and C column items."""

    rows: Side
    columns: Side
    cosine: Floats  # float32[R, C], of their instructions
    seed: int

    def uniform(self) -> npt.NDArray[np.uint32]:
        """uint32[R, C]"""
        return pair_hash(self.rows.keys[:, None], self.columns.keys, self.seed)


def pair_hash(row_keys: Keys, column_keys: Keys, seed: int) -> npt.NDArray[np.uint32]:
    """Uniform uint32 by both keys, which broadcast; (i, j) and (j, i) differ, so mutual choices are rare."""
    high_row, low_row = _halves(seeded(row_keys, seed, purpose=1))
    high_column, low_column = _halves(seeded(column_keys, seed, purpose=2))
    # The multiplications and shifts of MurmurHash3, in place: this runs for every pair of items there is.
    x = low_row ^ low_column
    x *= np.uint32(0x9E3779B1)
    shifted = x >> np.uint32(15)
    x ^= shifted
    x += high_row
    x ^= high_column
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        x *= np.uint32(factor)
        np.right_shift(x, np.uint32(shift), out=shifted)
        x ^= shifted
    return x


def _halves(keys: Keys) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    return (keys >> np.uint64(32)).astype(np.uint32), keys.astype(np.uint32)


def uniform(tile: Tile) -> Priorities:
    """`random`, `stratified` and `proxy`: every partner has the same chance."""
    return tile.uniform()


def even_over_clusters(tile: Tile) -> Priorities:
    """`diverse`: every cluster of instructions has the same chance, whatever its size.

    Sampling without replacement with weights 1 / size (Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003).
    """
    x = tile.uniform().astype(np.float32)
    x += np.float32(0.5)
    x *= np.float32(2**-32)
    np.log(x, out=x)
    x *= tile.columns.facts["cluster_size"]
    return x


@dataclass(frozen=True)
class Strategy:
    priority: Callable[[Tile], Priorities] | None  # None: the nearest first, for which tiles have a shortcut
    # What an item's partners are looked for among when there are too many items for all pairs: those of nearby
    # clusters, a random sample, or both.
    near: bool = False
    sampled: bool = True
    bins: bool = False  # equal shares of similarity bins
    clusters: bool = False  # needs `cluster_size`


STRATEGIES = {
    "random": Strategy(uniform),
    "similar": Strategy(None, near=True, sampled=False),
    "stratified": Strategy(uniform, near=True, bins=True),
    "diverse": Strategy(even_over_clusters, clusters=True),
    "proxy": Strategy(uniform),  # what makes it differ are its sides: chosen items against rejected ones
}
