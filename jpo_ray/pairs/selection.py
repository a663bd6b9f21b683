"""From candidates to exactly the budgeted number of distinct pairs."""

import numpy as np
import numpy.typing as npt

from jpo_ray.errors import InputError
from jpo_ray.pairs.candidates import Candidates


def candidates_per_row(budget: int, rows: int) -> int:
    """How many candidates of each row to look at first: twice the need, for those that others take."""
    return 2 * -(-budget // max(1, rows)) + 4


def select(candidates: Candidates, budget: int, *, symmetric: bool) -> npt.NDArray[np.int64] | None:
    """Numbers of the chosen candidates, int64[budget], or None where these candidates do not suffice.

    Every row proposes its best candidate, then its second best, and so on; within a round the best priority goes
    first. So each item is matched before any is matched twice. With `symmetric` (rows and columns are the same items)
    the pair (i, j) and the pair (j, i) are one.
    """
    rank = _rank_in_row(candidates.row)
    order = np.lexsort((candidates.column, candidates.row, candidates.priority, rank))
    row, column = candidates.row[order], candidates.column[order]
    low, high = (np.minimum(row, column), np.maximum(row, column)) if symmetric else (row, column)
    _, first = np.unique(low * (int(high.max(initial=0)) + 1) + high, return_index=True)
    chosen = np.sort(first)[:budget]
    return order[chosen] if len(chosen) == budget else None


def too_few(budget: int, available: int, band: tuple[float, float], key: str, *, grouped: bool = False) -> InputError:
    """The error of a band (and of groups) that leave fewer pairs than the budget, which the config names `key`."""
    within = " within the groups" if grouped else ""
    mend = "raise group_size, " if grouped else ""
    return InputError(
        f"pairs.joint: the similarity band [{band[0]:g}, {band[1]:g}] leaves {available} pairs{within}, the budget "
        f"asks for {budget}; {mend}widen min_similarity/max_similarity or lower {key}"
    )


def _rank_in_row(row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of each candidate within its row (candidates of a row stand together, best first)."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    return np.arange(len(row)) - np.repeat(starts, np.diff(np.append(starts, len(row))))
