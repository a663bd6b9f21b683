"""Which columns each block of rows meets: all of them, those of its group, or some where there are too many."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from jpo_ray.pairs.candidates import BLOCK_ROWS, Candidates, Search, block_candidates, joined
from jpo_ray.pairs.product import bfloat16_is_quicker
from jpo_ray.pairs.sides import Ints, Side

TASK_ROWS = 16_384  # of parts, which meet few columns each
LEAST_TASK_ROWS = 256
TASK_CANDIDATES = 2**21  # that the driver gets at a time: 34 MiB, and twice that beside them while it deals them out


class Plan(Protocol):
    """Tasks that can run anywhere in any order; each has blocks of (rows, columns) to compare."""

    @property
    def tasks(self) -> int: ...

    def blocks(self, task: int) -> Iterator[tuple[Ints, Ints | slice]]: ...


def run_task(
    plan: Plan, task: int, rows: Side, columns: Side, vectors: npt.NDArray[np.float16], search: Search
) -> Candidates:
    """The candidates of a task's rows by row and bin, numbered as in `rows` and `columns`."""
    if search.quick:
        bfloat16_is_quicker()  # loads torch, whose threads are limited too
    with threadpool_limits(1):  # a task has one core, whatever the environment says
        parts = [
            block_candidates(rows.take(some), columns.take(others), vectors, search).renumbered(some, others)
            for some, others in plan.blocks(task)
        ]
    return by_row(joined(parts, search.bins))


def by_row(found: Candidates) -> Candidates:
    """By row and bin, best first: the choice must not depend on how rows were spread over tasks."""
    lists = found.row.astype(np.int64) * len(found.in_band) + found.bin
    if (lists[1:] >= lists[:-1]).all():
        return found
    return numbered(found, np.lexsort((found.order, lists)))


def numbered(found: Candidates, numbers: Ints) -> Candidates:
    columns = {name: values[numbers] for name, values in found.__dict__.items() if name != "in_band"}
    return replace(found, **columns)


@dataclass(frozen=True)
class Exact:
    """Every row (those listed) meets every column."""

    rows: Ints

    @property
    def tasks(self) -> int:
        return -(-len(self.rows) // BLOCK_ROWS)

    def blocks(self, task: int) -> Iterator[tuple[Ints, Ints | slice]]:
        yield self.rows[task * BLOCK_ROWS : (task + 1) * BLOCK_ROWS], slice(None)


@dataclass(frozen=True)
class Parts:
    """Rows meet columns by the parts (groups, clusters) they belong to: part p's rows those of the parts `meets[p]`.

    `extra` columns more, drawn at random for each block, are met too.
    """

    row_order: Ints  # rows by part
    row_starts: Ints  # int64[P + 1]
    column_order: Ints
    column_starts: Ints
    meets: Ints  # int64[P, M]
    extra: int
    seed: int
    task_rows: int

    @classmethod
    def of(
        cls, rows: Ints, row_parts: Ints, column_parts: Ints, meets: Ints, extra: int, seed: int, keep: int = 1
    ) -> "Parts":
        """`rows` are the rows to look at; `row_parts` and `column_parts` give the part of every row and column.

        `keep` is how many candidates of a row are kept: where they are many, a task has fewer rows.
        """
        by_part = rows[np.argsort(row_parts[rows], kind="stable")]
        column_edges = np.arange(max(int(column_parts.max(initial=0)), int(meets.max(initial=0))) + 2)
        return cls(
            row_order=by_part,
            row_starts=np.searchsorted(row_parts[by_part], np.arange(len(meets) + 1)),
            column_order=np.argsort(column_parts, kind="stable"),
            column_starts=np.searchsorted(np.sort(column_parts), column_edges),
            meets=meets,
            extra=extra,
            seed=seed,
            task_rows=min(TASK_ROWS, max(LEAST_TASK_ROWS, TASK_CANDIDATES // keep)),
        )

    @property
    def tasks(self) -> int:
        return -(-len(self.row_order) // self.task_rows)

    def blocks(self, task: int) -> Iterator[tuple[Ints, Ints | slice]]:
        """The task's rows, part by part: parts are not cut, so a task has those that start among its rows."""
        starts = self.row_starts[:-1]
        first, last = np.searchsorted(starts, [task * self.task_rows, (task + 1) * self.task_rows])
        for part in range(first, last):
            rows = self.row_order[self.row_starts[part] : self.row_starts[part + 1]]
            for start in range(0, len(rows), BLOCK_ROWS):
                yield rows[start : start + BLOCK_ROWS], self._columns(part)

    def _columns(self, part: int) -> Ints:
        near = [self.column_order[self.column_starts[p] : self.column_starts[p + 1]] for p in self.meets[part]]
        columns = np.concatenate([np.empty(0, np.int64), *near])
        if self.extra:
            rng = np.random.default_rng([self.seed, 0x6578, part])
            drawn = rng.integers(0, len(self.column_order), self.extra)
            columns = np.unique(np.concatenate([columns, drawn]))
        return np.sort(columns)


def grouped(rows: Ints, row_groups: Ints, column_groups: Ints) -> Parts:
    """Every row meets the columns of its group."""
    count = int(max(row_groups.max(), column_groups.max())) + 1
    return Parts.of(rows, row_groups, column_groups, np.arange(count)[:, None], extra=0, seed=0)
