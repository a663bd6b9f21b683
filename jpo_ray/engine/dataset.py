"""What training reads: tokenized items, their reference log-probs and the edges between them.

Rows 0..n-1 are the items. For KTO, row n + i is a mismatched item: item i's instruction with another item's response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.data.tokens import TokenizedItems


@dataclass(frozen=True)
class EdgeList:
    """Comparisons as row numbers: int64[E] each, with what is known of each: bool[E] and float32[E]."""

    chosen: npt.NDArray[np.int64]
    rejected: npt.NDArray[np.int64]
    joint: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32]
    probability: npt.NDArray[np.float32]  # that `chosen` is better
    gap: npt.NDArray[np.float32]  # by how much, in the judge's scores; NaN where it gave none

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, index: npt.NDArray[np.int64]) -> "EdgeList":
        return EdgeList(*(column[index] for column in self.__dict__.values()))


class EdgeShards:
    """Edges that are read shard by shard: at most one of them is held at a time."""

    def __init__(self, sizes: Sequence[int], load: Callable[[int], EdgeList]) -> None:
        """`sizes` are the edges of each shard, `load(number)` reads one."""
        self.sizes = list(sizes)
        self._load = lru_cache(maxsize=1)(load)

    @classmethod
    def of(cls, edges: EdgeList) -> "EdgeShards":
        """One shard, which is at hand."""
        return cls([len(edges)], lambda _: edges)

    def __getitem__(self, number: int) -> EdgeList:
        return self._load(number)

    @property
    def count(self) -> int:
        """Edges of all shards."""
        return sum(self.sizes)


@dataclass(frozen=True)
class PreferenceData:
    tokens: TokenizedItems
    # [rows, 2]: instruction part, response part; None where the objective needs no reference
    reference: npt.NDArray[np.float64] | None
    items: int  # rows that are items; the rest are mismatched
    train: EdgeShards
    validation: EdgeList
    embeddings: npt.NDArray[np.float16] | None = None  # [items, D]: of the instructions, where the objective needs them
    item_ids: Sequence[str] = ()


def edge_list(preferences: pa.Table, ids: pa.Array, split: str, protocols: Sequence[str]) -> EdgeList:
    """The edges of one split and the given protocols, in table order; `ids` are the items' ids, by row."""
    of_kind = pc.and_(
        pc.equal(preferences["split"], split), pc.is_in(preferences["protocol"], pa.array(protocols, pa.string()))
    )
    some = preferences.filter(of_kind)
    return EdgeList(
        chosen=rows_of(some["chosen"], ids),
        rejected=rows_of(some["rejected"], ids),
        joint=pc.equal(some["protocol"], "joint").to_numpy().astype(np.bool_),
        weight=some["weight"].to_numpy().astype(np.float32),
        probability=some["probability"].to_numpy().astype(np.float32),
        gap=pc.fill_null(some["gap"], np.nan).to_numpy().astype(np.float32),
    )


def joined(parts: Sequence[EdgeList]) -> EdgeList:
    """Edges of several lists in one; at least one list."""
    columns = zip(*(part.__dict__.values() for part in parts), strict=True)
    return EdgeList(*(np.concatenate(column) for column in columns))


def rows_of(column: pa.ChunkedArray, ids: pa.Array) -> npt.NDArray[np.int64]:
    """The place of each id in `ids`, int64[E]. KeyError for one that is not there."""
    found = pc.index_in(column, value_set=ids)
    if found.null_count:
        raise KeyError(column.filter(pc.is_null(found))[0].as_py())
    rows: npt.NDArray[np.int64] = found.to_numpy().astype(np.int64)
    return rows


def mismatched_partners(instruction_ids: Sequence[str], seed: int) -> npt.NDArray[np.int64]:
    """For each item another one, of a different instruction, whose response is the mismatched one: int64[n].

    A seeded cycle, so every response is used once where instructions allow; an item without any partner of another
    instruction (a data set of one instruction) gets itself.
    """
    n = len(instruction_ids)
    order = np.random.default_rng([seed, 0x4B54]).permutation(n)
    partners = np.arange(n, dtype=np.int64)
    for place, item in enumerate(order):
        for step in range(1, n):
            candidate = order[(place + step) % n]
            if instruction_ids[candidate] != instruction_ids[item]:
                partners[item] = candidate
                break
    return partners


def mismatched_rows(
    rows: Sequence[dict[str, Any]], partners: dict[str, str], by_id: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each item that has a partner, its instruction with the partner's response."""
    return [
        row | {"response": by_id[partners[row["item_id"]]]["response"]} for row in rows if row["item_id"] in partners
    ]
