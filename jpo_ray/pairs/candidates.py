"""Candidates by tiles: for each row item its best partners among some columns, within the similarity band.

A block of rows meets its columns strip by strip: a matrix product gives the cosines, the strategy the priorities, and
each row keeps its best so far. What is kept beats a row's threshold in one comparison per pair; only survivors are
sorted. Memory is that of a strip and of what the rows keep, whatever the number of columns.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.sides import Floats, Ints, Side, float32
from jpo_ray.pairs.strategies import STRATEGIES, Priorities, Tile

BLOCK_ROWS = 2048  # of one task: float16 vectors are converted once for all of them
STRIP = 512  # columns at a time
CHUNK_ROWS = 512  # rows at a time: a tile of 1 MiB stays in a core's cache, and its product is fast
RUN = 64  # flags that are looked at together

Small = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Search:
    """What is looked for. The band includes both its ends; `bins` equal parts of it are searched each for itself."""

    strategy: str
    band: tuple[float, float]
    keep: int  # candidates of each row and bin
    seed: int
    bins: int = 1


@dataclass(frozen=True)
class Candidates:
    """Ordered pairs (row, column), by row and bin, best first within them."""

    row: Small  # int32[K]
    column: Small  # int32[K]
    similarity: Floats
    bin: npt.NDArray[np.uint8]
    order: npt.NDArray[np.uint32]  # by the strategy's priority: lower comes first
    in_band: Ints  # int64[bins]: all that there were to choose from

    def renumbered(self, rows: Ints, columns: Ints | slice) -> "Candidates":
        """With rows and columns numbered as in the whole that a block's were taken from."""
        column = self.column if isinstance(columns, slice) else columns[self.column].astype(np.int32)
        row = rows[self.row].astype(np.int32)
        return Candidates(row, column, self.similarity, self.bin, self.order, self.in_band)


def block_candidates(rows: Side, columns: Side, vectors: npt.NDArray[np.float16], search: Search) -> Candidates:
    """The best `search.keep` candidates of each row, in each bin; numbers into `rows` and `columns`.

    Items of one instruction are never candidates: a comparison of them is conditional, not joint.
    """
    strategy = STRATEGIES[search.strategy]
    best = _Best(len(rows) * search.bins, search.keep)
    in_band = np.zeros(search.bins, dtype=np.int64)
    same_row, same_column = _same_instruction(rows, columns)
    left = float32(vectors[rows.instructions])
    for start in range(0, len(columns), STRIP):
        strip = columns.take(slice(start, start + STRIP))
        right = float32(vectors[strip.instructions]).T
        in_strip = slice(*np.searchsorted(same_column, [start, start + STRIP]))
        for top in range(0, len(rows), CHUNK_ROWS):
            chunk = slice(top, top + CHUNK_ROWS)
            here = (same_row[in_strip] >= top) & (same_row[in_strip] < top + CHUNK_ROWS)
            same = same_row[in_strip][here] - top, same_column[in_strip][here] - start
            cosine = left[chunk] @ right
            priority = strategy.priority(Tile(rows.take(chunk), strip, cosine, search.seed))
            inside = _inside(cosine, search.band)
            inside[same] = False
            if search.bins == 1:
                lists = None
                in_band += np.count_nonzero(inside)
            else:
                lists = _bin_of(cosine, search)
                in_band += np.bincount(lists[inside], minlength=search.bins)
                lists += (np.arange(len(cosine)) * search.bins)[:, None]
            best.add(priority, inside, cosine, lists, first_list=top * search.bins, first_column=start)
    lists, column, similarity, order = best.result()
    return Candidates(
        row=(lists // search.bins).astype(np.int32),
        column=column,
        similarity=np.clip(similarity, -1, 1),
        bin=(lists % search.bins).astype(np.uint8),
        order=order,
        in_band=in_band,
    )


def joined(parts: list[Candidates], bins: int) -> Candidates:
    """Candidates of several blocks together."""

    def whole(name: str, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        return np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)], dtype=dtype)

    total = sum((part.in_band for part in parts), np.zeros(bins, dtype=np.int64))
    columns = {"row": np.int32, "column": np.int32, "similarity": np.float32, "bin": np.uint8, "order": np.uint32}
    return Candidates(**{name: whole(name, dtype) for name, dtype in columns.items()}, in_band=total)  # type: ignore[arg-type]


class _Best:
    """The `keep` best of each list so far; lists are numbered from 0. Ties go to the lower column."""

    def __init__(self, lists: int, keep: int) -> None:
        self._lists, self._keep = lists, keep
        self._threshold: Priorities | None = None  # of each list; only what is above it can still enter
        self._parts: list[tuple[Ints, Small, Floats, Priorities]] = []
        self._pending = 0

    def add(
        self,
        priority: Priorities,
        inside: npt.NDArray[np.bool_],
        cosine: Floats,
        lists: Ints | None,
        *,
        first_list: int,
        first_column: int,
    ) -> None:
        """Those of a tile's pairs that are `inside`. `lists` int64[R, C] counts from `first_list`; None: each row is
        a list.
        """
        if self._threshold is None:
            self._threshold = np.full(self._lists, _worst(priority), dtype=priority.dtype)
        if lists is None:
            threshold = self._threshold[first_list : first_list + len(priority), None]
            if priority.shape[1] > 4 * self._keep and first_column == 0:
                # The first strip: its own best are a bound that spares sorting all of it.
                masked = np.where(inside, priority, _worst(priority))
                bound = np.partition(masked, -self._keep, axis=1)[:, -self._keep, None]
                np.maximum(threshold, _next_below(bound), out=threshold)
        else:
            threshold = self._threshold[first_list:][lists]
        enters = priority > threshold
        enters &= inside
        found = _numbers(enters)
        row, column = np.divmod(found, priority.shape[1])
        number = row if lists is None else lists.ravel()[found]
        column += first_column
        self._parts.append(
            (first_list + number, column.astype(np.int32), cosine.ravel()[found], priority.ravel()[found])
        )
        self._pending += len(found)
        if self._pending > max(2**16, self._lists * self._keep):
            self._merge()

    def result(self) -> tuple[Ints, Small, Floats, npt.NDArray[np.uint32]]:
        """List, column, cosine and order of what is kept, list by list."""
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.uint32)
        self._merge()
        lists, column, cosine, priority = self._parts[0]
        return lists, column, cosine, _order(priority)

    def _merge(self) -> None:
        lists, column, cosine, priority = (np.concatenate(values) for values in zip(*self._parts, strict=True))
        # Stable, and what is found later has higher columns.
        order = np.argsort(lists.astype(np.uint64) << np.uint64(32) | _order(priority), kind="stable")
        in_order = lists[order]
        rank = rank_in_run(in_order)
        kept = order[rank < self._keep]
        self._parts = [(lists[kept], column[kept], cosine[kept], priority[kept])]
        self._pending = 0
        assert self._threshold is not None
        last = order[rank == self._keep - 1]
        self._threshold[lists[last]] = priority[last]


def rank_in_run(values: npt.NDArray[np.integer]) -> Ints:
    """Place of each element within its run of equal neighbours, from 0: int64[K]."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))


def _numbers(flags: npt.NDArray[np.bool_]) -> Ints:
    """Places of the few flags that are set: runs of 64 without any are passed over at once."""
    flat = flags.ravel()
    whole = len(flat) // RUN * RUN
    runs = flat[:whole].reshape(-1, RUN)
    some = np.flatnonzero(runs.any(axis=1))
    run, place = np.nonzero(runs[some])
    return np.concatenate([some[run] * RUN + place, whole + np.flatnonzero(flat[whole:])])


def _same_instruction(rows: Side, columns: Side) -> tuple[Ints, Ints]:
    """(row, column) of all pairs of one instruction, by column."""
    order = np.argsort(columns.instructions, kind="stable")
    sorted_ = columns.instructions[order]
    first, last = (np.searchsorted(sorted_, rows.instructions, side) for side in ("left", "right"))
    row = np.repeat(np.arange(len(rows)), last - first)
    column = order[np.arange(len(row)) + np.repeat(first - (np.cumsum(last - first) - (last - first)), last - first)]
    by_column = np.argsort(column, kind="stable")
    return row[by_column], column[by_column]


def _inside(cosine: Floats, band: tuple[float, float]) -> npt.NDArray[np.bool_]:
    """Which pairs the band admits. Ends at -1 and 1 are open to rounding."""
    low, high = band
    inside = cosine >= np.float32(low) if low > -1 else np.ones(cosine.shape, dtype=bool)
    if high < 1:
        inside &= cosine <= np.float32(high)
    return inside


def _bin_of(cosine: Floats, search: Search) -> Ints:
    low, high = search.band
    scaled = (cosine - np.float32(low)) * np.float32(search.bins / (high - low))
    return np.clip(scaled, 0, search.bins - 1).astype(np.int64)


def _worst(priority: Priorities) -> np.generic:
    """Below every pair that may be chosen (but for one in 2^32, whose hash it is)."""
    return np.uint32(0) if priority.dtype == np.uint32 else np.float32(-np.inf)


def _next_below(values: Priorities) -> Priorities:
    if values.dtype == np.uint32:
        return values - (values > 0).astype(np.uint32)
    return np.nextafter(values, np.float32(-np.inf))


def _order(priority: Priorities) -> npt.NDArray[np.uint32]:
    """Unsigned integers that are the lower the higher the priority."""
    if priority.dtype == np.uint32:
        return ~priority
    bits = priority.view(np.uint32)
    return np.where(bits >> np.uint32(31) == 1, bits, ~bits & np.uint32(0x7FFFFFFF))
