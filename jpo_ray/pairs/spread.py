"""The choice among candidates that no memory holds, tile by tile: the same pairs as `selection.select` takes.

Without limits on single items the rounds are an order of all candidates, by (rank in its row, priority, row), and the
budget takes the first of it. So tiles need only agree on where that ends: each counts its distinct pairs by rank, and
of the last rank, of which every row has one, they are compared one by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.candidates import Candidates
from jpo_ray.pairs.selection import Limits
from jpo_ray.pairs.sides import Ints, rank_in_run

FIELDS = {"row": "<i4", "column": "<i4", "similarity": "<f4", "rank": "<u4", "order": "<u4"}  # of a candidate

Rows = npt.NDArray[np.void]
Found = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]


@dataclass(frozen=True)
class End:
    """The last pair that is taken; of each rank before its all are."""

    rank: int
    order: int = -1
    row: int = -1


def can_spread(limits: Limits, bins: int) -> bool:
    """Whether the choice has no limits that look at what else was chosen."""
    return bins == 1 and not limits.min_per_item and limits.max_per_item is None and not limits.connected


def ranked(found: Candidates) -> dict[str, npt.NDArray[np.generic]]:
    """Columns of `FIELDS` of candidates that stand by row, best first; rows whole."""
    columns = {"row": found.row, "column": found.column, "similarity": found.similarity, "order": found.order}
    return columns | {"rank": rank_in_run(found.row)}


def _codes(rows: Rows, *, symmetric: bool) -> Ints:
    """A number for each candidate's pair, the same whichever of its ends is the row where that makes no difference."""
    ends = rows["row"].astype(np.int64), rows["column"].astype(np.int64)
    if symmetric:
        ends = np.minimum(*ends), np.maximum(*ends)
    codes: Ints = ends[0] << 32 | ends[1]
    return codes


def _distinct_pairs(rows: Rows, *, symmetric: bool) -> Rows:
    """A tile's candidates in the order in which they are taken, each pair once."""
    rows = rows[np.lexsort((rows["row"], rows["rank"].astype(np.uint64) << np.uint64(32) | rows["order"]))]
    _, first = np.unique(_codes(rows, symmetric=symmetric), return_index=True)
    first.sort()
    return rows[first]


def count_by_rank(rows: Rows, *, symmetric: bool) -> Ints:
    """How many of a tile's distinct pairs are first of each rank."""
    codes = _codes(rows, symmetric=symmetric)
    by_pair = np.argsort(codes)
    codes, rank = codes[by_pair], rows["rank"][by_pair]
    starts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))
    return np.bincount(np.minimum.reduceat(rank, starts) if len(starts) else rank)


def of_rank(rows: Rows, rank: int, *, symmetric: bool) -> Found:
    """Priorities and rows of a tile's distinct pairs of one rank."""
    some = _distinct_pairs(rows[rows["rank"] <= rank], symmetric=symmetric)
    some = some[some["rank"] == rank]
    return some["order"], some["row"]


def summed(counts: Iterable[Ints]) -> Ints:
    total = np.zeros(0, dtype=np.int64)
    for some in counts:
        longer, shorter = (total, some) if len(total) >= len(some) else (some, total)
        total = longer.astype(np.int64)
        total[: len(shorter)] += shorter
    return total


def last_rank(counts: Ints, budget: int) -> tuple[int, int]:
    """The rank in which the budget ends, and how many pairs of it are taken."""
    ends = np.cumsum(counts)
    rank = int(np.searchsorted(ends, budget))
    return rank, budget - (int(ends[rank - 1]) if rank else 0)


def end_of(rank: int, taken: int, found: Sequence[Found]) -> End:
    """Where the choice ends, by all pairs of the last rank."""
    order, row = (np.concatenate(values) for values in zip(*found, strict=True))
    last = np.lexsort((row, order))[taken - 1]
    return End(rank, int(order[last]), int(row[last]))


def taken(rows: Rows, end: End | None, *, symmetric: bool) -> Rows:
    """A tile's chosen pairs, in order; `end` None: all of them."""
    if end is None:
        return _distinct_pairs(rows, symmetric=symmetric)
    rows = _distinct_pairs(rows[rows["rank"] <= end.rank], symmetric=symmetric)  # about half of the candidates
    before = rows["rank"] < end.rank
    earlier = (rows["order"] < end.order) | ((rows["order"] == end.order) & (rows["row"] <= end.row))
    kept: Rows = rows[before | ((rows["rank"] == end.rank) & earlier)]
    return kept
