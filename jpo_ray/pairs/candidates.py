"""Candidate pairs: for each row item its best partners within the similarity band.

A strategy gives every ordered pair a priority (lower is better) that is a pure function of the two items and the seed.
So the candidates do not depend on blocks, workers or order. A new strategy is one function in `PRIORITIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Keys = npt.NDArray[np.uint64]

BLOCK_ELEMENTS = 2**23  # of a block of the similarity matrix: 32 MiB


@dataclass(frozen=True)
class Side:
    """Items on one side of the candidate matrix: R of them."""

    keys: Keys  # uint64[R], from the item ids
    instructions: npt.NDArray[np.int64]  # int64[R]: which instruction; its vector's row
    groups: npt.NDArray[np.int64] | None = None  # int64[R]: only items of one group are compared, where given


@dataclass(frozen=True)
class Candidates:
    """Ordered pairs (row, column), best first within a row; `in_band` counts all that the band admits."""

    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    similarity: Floats
    priority: npt.NDArray[np.float64]
    in_band: int


def random_priority(rows: Keys, columns: Keys, similarity: Floats, seed: int) -> npt.NDArray[np.float64]:  # noqa: ARG001
    """Uniform in [0, 1), by hashing both keys; (i, j) and (j, i) differ, so mutual choices are rare."""
    mixed = _mix(rows[:, None] + _mix(columns + np.uint64(seed))[None, :])
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


def similar_priority(rows: Keys, columns: Keys, similarity: Floats, seed: int) -> npt.NDArray[np.float64]:
    """Most similar first; exact ties in random order."""
    return -similarity.astype(np.float64) + 1e-9 * random_priority(rows, columns, similarity, seed)


Priority = Callable[[Keys, Keys, Floats, int], npt.NDArray[np.float64]]
# `proxy` differs from `random` in its sides only: chosen items against rejected ones.
PRIORITIES: dict[str, Priority] = {"random": random_priority, "similar": similar_priority, "proxy": random_priority}


def block_rows(columns: int) -> int:
    """Rows of the candidate matrix to treat at once."""
    return max(1, BLOCK_ELEMENTS // max(1, columns))


def block_candidates(
    block: npt.NDArray[np.int64],
    rows: Side,
    columns: Side,
    vectors: npt.NDArray[np.float16],
    *,
    strategy: str,
    band: tuple[float, float],
    per_row: int,
    seed: int,
) -> Candidates:
    """The best `per_row` candidates of each row in `block` (numbers into `rows`), within the band, both ends included.

    Items of one instruction are never candidates: a comparison of them is conditional, not joint.
    """
    similarity = (
        vectors[rows.instructions[block]].astype(np.float32) @ vectors[columns.instructions].astype(np.float32).T
    )
    similarity = np.clip(similarity, -1, 1)
    allowed = (similarity >= band[0]) & (similarity <= band[1])
    allowed &= rows.instructions[block][:, None] != columns.instructions[None, :]
    if rows.groups is not None and columns.groups is not None:
        allowed &= rows.groups[block][:, None] == columns.groups[None, :]
    priority = PRIORITIES[strategy](rows.keys[block], columns.keys, similarity, seed)
    priority[~allowed] = np.inf
    keep = min(per_row, priority.shape[1])
    best = np.argpartition(priority, keep - 1, axis=1)[:, :keep]
    values = np.take_along_axis(priority, best, axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    best, values = np.take_along_axis(best, order, axis=1), np.take_along_axis(values, order, axis=1)
    found = np.isfinite(values)
    return Candidates(
        row=np.repeat(block, keep).reshape(best.shape)[found],
        column=best[found].astype(np.int64),
        similarity=np.take_along_axis(similarity, best, axis=1)[found],
        priority=values[found],
        in_band=int(allowed.sum()),
    )


def random_groups(keys: Keys, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Spread items evenly over `count` groups at random, by their keys: int64[R]."""
    groups = np.empty(len(keys), dtype=np.int64)
    groups[np.argsort(_mix(keys + _mix(np.array([seed], dtype=np.uint64))))] = np.arange(len(keys)) * count // len(keys)
    return groups


def _mix(x: Keys) -> Keys:
    """SplitMix64's finaliser: a bijective hash of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def item_keys(item_ids: list[str]) -> Keys:
    """uint64 keys from hexadecimal item ids."""
    return np.array([int(item_id[:16], 16) for item_id in item_ids], dtype=np.uint64)
