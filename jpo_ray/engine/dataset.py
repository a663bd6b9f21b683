"""What training reads: tokenized items, their reference log-probs and the edges between them.

Rows 0..n-1 are the items. For KTO, row n + i is a mismatched item: item i's instruction with another item's response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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


@dataclass(frozen=True)
class PreferenceData:
    tokens: TokenizedItems
    # [rows, 2]: instruction part, response part; None where the objective needs no reference
    reference: npt.NDArray[np.float64] | None
    items: int  # rows that are items; the rest are mismatched
    train: EdgeList
    validation: EdgeList
    embeddings: npt.NDArray[np.float16] | None = None  # [items, D]: of the instructions, where the objective needs them


def edge_list(preferences: pa.Table, row_of: dict[str, int], split: str, protocols: Sequence[str]) -> EdgeList:
    """The edges of one split and the given protocols, in table order."""
    rows = [row for row in preferences.to_pylist() if row["split"] == split and row["protocol"] in protocols]
    return EdgeList(
        chosen=np.array([row_of[row["chosen"]] for row in rows], dtype=np.int64),
        rejected=np.array([row_of[row["rejected"]] for row in rows], dtype=np.int64),
        joint=np.array([row["protocol"] == "joint" for row in rows], dtype=np.bool_),
        weight=np.array([row["weight"] for row in rows], dtype=np.float32),
        probability=np.array([row["probability"] for row in rows], dtype=np.float32),
        gap=np.array([np.nan if row["gap"] is None else row["gap"] for row in rows], dtype=np.float32),
    )


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
