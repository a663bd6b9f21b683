"""The choice tile by tile: the pairs that a choice among all candidates at once takes."""

from pathlib import Path

import numpy as np
import pytest

from jpo_ray.pairs import spread
from jpo_ray.pairs.candidates import Candidates
from jpo_ray.pairs.selection import Limits, select
from jpo_ray.pairs.sides import Ints
from jpo_ray.pairs.tiling import Spool, Tiling, make_tiling

ITEMS, KEEP = 60, 12


def candidates(columns: int, seed: int = 0) -> Candidates:
    """Each row's best of random priorities; few distinct ones, so that many are equal."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(ITEMS):
        others = np.setdiff1d(rng.permutation(columns), [row])[:KEEP] if columns == ITEMS else np.arange(KEEP)
        order = np.sort(rng.integers(0, 40, len(others)))
        rows.append((np.full(len(others), row), others, order))
    row, column, order = (np.concatenate(values) for values in zip(*rows, strict=True))
    similarity = rng.random(len(row)).astype(np.float32)
    return Candidates(
        row.astype(np.int32), column.astype(np.int32), similarity, np.zeros(len(row), np.uint8),
        order.astype(np.uint32), np.array([len(row)]),
    )  # fmt: skip


def tiling(tiles: int) -> Tiling:
    keys = np.random.default_rng(1).integers(0, 2**63, ITEMS // 2).astype(np.uint64)
    return make_tiling(np.arange(ITEMS) // 2, keys, tiles, seed=0)


def by_tiles(found: Candidates, tiles: int, budget: int, folder: Path, *, symmetric: bool) -> set[tuple[int, int]]:
    over = tiling(tiles)
    spool = Spool(folder, spread.FIELDS)
    for row in range(ITEMS):  # as tasks come
        one = np.flatnonzero(found.row == row)
        some = Candidates(
            *(getattr(found, n)[one] for n in ("row", "column", "similarity", "bin", "order")), found.in_band
        )
        spool.add(over.of_joint(some.row.astype(np.int64), some.column.astype(np.int64)), spread.ranked(some))
    parts = list(spool.each(over.count))
    counts = spread.summed(spread.count_by_rank(part, symmetric=symmetric) for part in parts)
    end = None
    if counts.sum() > budget:
        rank, taken = spread.last_rank(counts, budget)
        end = spread.end_of(rank, taken, [spread.of_rank(part, rank, symmetric=symmetric) for part in parts])
    chosen = [spread.taken(part, end, symmetric=symmetric) for part in parts]
    return {(int(a), int(b)) for part in chosen for a, b in zip(part["row"], part["column"], strict=True)}


@pytest.mark.parametrize("budget", [1, 59, 60, 61, 200, 333, 10_000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_choice_is_that_of_all_candidates_at_once(budget: int, symmetric: bool, tmp_path: Path) -> None:
    found = candidates(ITEMS if symmetric else 50)
    whole = select(found, ITEMS if symmetric else ITEMS + 50, 0 if symmetric else ITEMS, Limits(budget)).numbers
    expected = {(int(found.row[n]), int(found.column[n])) for n in whole}
    for tiles in (1, 4, 10):
        assert by_tiles(found, tiles, budget, tmp_path / str(tiles), symmetric=symmetric) == expected


def test_tiles_hold_items_of_two_blocks_and_instructions_stay_together() -> None:
    over = tiling(10)
    assert (over.count, over.blocks) == (10, 4)
    first, second = (ends.ravel() for ends in np.meshgrid(np.arange(ITEMS), np.arange(ITEMS)))
    tiles = over.of_joint(first, second)
    assert set(tiles.tolist()) == set(range(10))
    assert (tiles == over.of_joint(second, first)).all()
    blocks: dict[int, set[frozenset[int]]] = {}
    for tile, a, b in zip(tiles.tolist(), over.block[first].tolist(), over.block[second].tolist(), strict=True):
        blocks.setdefault(tile, set()).add(frozenset((a, b)))
    assert all(len(pairs) == 1 for pairs in blocks.values())
    assert np.bincount(over.block).tolist() == [16, 14, 16, 14]  # thirty instructions of two items, evenly
    beside = over.of_beside(np.arange(ITEMS))
    assert (beside[::2] == beside[1::2]).all()
    for item, tile in enumerate(beside.tolist()):
        assert any(int(over.block[item]) in pair for pair in blocks[tile])


def test_tiles_of_groups() -> None:
    """Six groups of ten items in three tiles: two groups each."""
    groups: Ints = np.arange(ITEMS) // 10
    over = make_tiling(np.arange(ITEMS) // 2, np.arange(30).astype(np.uint64), 3, seed=0, groups=groups)
    assert (over.count, over.blocks) == (3, 3)
    assert over.of_joint(np.arange(ITEMS), np.arange(ITEMS)).tolist() == np.repeat([0, 1, 2], 20).tolist()
    assert set(over.of_beside(np.arange(ITEMS)).tolist()) <= {0, 1, 2}
    mirrored = np.arange(ITEMS)[::-1]  # a label may join two groups, from either end
    assert (over.of_joint(np.arange(ITEMS), mirrored) == over.of_joint(mirrored, np.arange(ITEMS))).all()


def test_a_spool_forgets_a_run_that_was_killed(tmp_path: Path) -> None:
    fields = {"first": "<i4", "second": "<i4"}
    first = {"first": np.array([1, 2, 3]), "second": np.array([4, 5, 6])}
    Spool(tmp_path, fields).add(np.array([1, 0, 1]), first)
    spool = Spool(tmp_path, fields)
    spool.add(np.array([1, 0, 1]), first)
    spool.add(np.array([1]), {"first": np.array([9]), "second": np.array([9])})
    assert spool.read(1).tolist() == [(1, 4), (3, 6), (9, 9)]
    assert spool.read(0).tolist() == [(2, 5)]
    assert spool.read(2).tolist() == []
