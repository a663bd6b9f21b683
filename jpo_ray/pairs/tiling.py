"""Where many pairs are kept: by tiles of the item matrix, so that a shard's pairs share items.

Items are spread at random over blocks, all those of an instruction in one; a pair of items of two blocks is in the tile
of both. Where pairs are compared within groups only, tiles are of groups.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.sides import Ints, Keys, random_groups, seeded

Columns = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Tiling:
    """The tiles 0..count-1 over N items."""

    count: int
    block: Ints  # int64[N]
    partner: Ints  # int64[N]: a random block, the same for all items of an instruction
    grouped: bool  # blocks are tiles

    @property
    def blocks(self) -> int:
        return self.count if self.grouped else int(((8 * self.count + 1) ** 0.5 - 1) / 2)

    def of_joint(self, first: Ints, second: Ints) -> Ints:
        """The tile of pairs of items, int64[E], whichever of the two comes first.

        Where blocks are tiles a pair of two groups, which only a label can ask for, is in the tile of one of them.
        """
        if self.grouped:
            of_group: Ints = self.block[np.minimum(first, second)]
            return of_group
        return self._tile(self.block[first], self.block[second])

    def of_beside(self, first: Ints) -> Ints:
        """The tile of conditional pairs, which come beside the joint ones, by their first item, int64[E].

        Those of an instruction stay together, and every tile of its block has as many of them.
        """
        if self.grouped:
            return self.partner[first]
        return self._tile(self.block[first], self.partner[first])

    def _tile(self, one: Ints, other: Ints) -> Ints:
        low, high = np.minimum(one, other), np.maximum(one, other)
        tile: Ints = low * self.blocks - low * (low - 1) // 2 + high - low
        return tile


def make_tiling(instructions: Ints, keys: Keys, wanted: int, seed: int, groups: Ints | None = None) -> Tiling:
    """About `wanted` tiles, at least as many. `instructions` int64[N] numbers each item's, `keys` are theirs.

    `groups` int64[N] are those within which pairs are chosen; of items without one, any number.
    """
    if groups is not None:
        partner = (seeded(keys, seed, purpose=4) % np.uint64(wanted)).astype(np.int64)
        return Tiling(wanted, groups * wanted // (int(groups.max(initial=0)) + 1), partner[instructions], grouped=True)
    blocks = int(np.ceil(((8 * wanted + 1) ** 0.5 - 1) / 2))
    block = random_groups(keys, blocks, seed)
    partner = (seeded(keys, seed, purpose=4) % np.uint64(blocks)).astype(np.int64)
    return Tiling(blocks * (blocks + 1) // 2, block[instructions], partner[instructions], grouped=False)


class Spool:
    """Rows of equal columns, appended tile by tile to files: what comes task by task is read tile by tile."""

    def __init__(self, folder: Path, fields: Mapping[str, npt.DTypeLike]) -> None:
        self._folder, self._dtype = folder, np.dtype(list(fields.items()))
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():  # of a run that was killed
            left.unlink()

    def add(self, tiles: Ints, columns: Columns) -> None:
        """Append rows, each to its tile."""
        if not len(tiles):
            return
        # Of small numbers a stable sort is a radix sort, several times as fast.
        tiles = tiles.astype(np.uint16) if tiles.max() < 2**16 else tiles
        order = np.argsort(tiles, kind="stable")
        rows = np.empty(len(tiles), dtype=self._dtype)
        for name in self._dtype.names or ():
            rows[name] = columns[name][order]
        numbers, starts = np.unique(tiles[order], return_index=True)
        for number, part in zip(numbers.tolist(), np.split(rows, starts[1:]), strict=True):
            with self._path(number).open("ab") as file:
                part.tofile(file)

    def read(self, tile: int) -> npt.NDArray[np.void]:
        """The rows of a tile, in the order in which they were added."""
        path = self._path(tile)
        return np.fromfile(path, dtype=self._dtype) if path.exists() else np.empty(0, dtype=self._dtype)

    def each(self, tiles: int) -> Iterable[npt.NDArray[np.void]]:
        return map(self.read, range(tiles))

    def _path(self, tile: int) -> Path:
        return self._folder / f"{tile:06d}"
