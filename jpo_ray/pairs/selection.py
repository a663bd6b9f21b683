"""From candidates to exactly the budgeted number of distinct pairs.

Every row proposes its best candidate, then its second best, and so on; within a round the best priority goes first. So
each row is matched before any proposes twice, and the choice does not depend on how the candidates were found.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jpo_ray.pairs.candidates import Candidates, rank_in_run
from jpo_ray.pairs.sides import Ints


@dataclass(frozen=True)
class Limits:
    """What the chosen pairs must keep to."""

    budget: int
    max_per_item: int | None = None
    connected: bool = False  # chains of chosen pairs join all items


@dataclass(frozen=True)
class Chosen:
    numbers: Ints  # of the chosen candidates, in order: at most the budget
    short: npt.NDArray[np.bool_]  # bool[bins]: bins that more candidates could still give their share
    full: npt.NDArray[np.bool_]  # bool[nodes]: items that are in as many pairs as they may
    components: int  # that the candidates can be joined to, within the limits; 1 unless `connected` was asked


def candidates_per_row(budget: int, rows: int, bins: int) -> int:
    """How many candidates of each row and bin to look at first: twice the need, for those that others take."""
    return 2 * -(-budget // max(1, rows * bins)) + (4 if bins == 1 else 1)


def shares(budget: int, available: Ints) -> Ints:
    """Equal shares of the budget, int64[bins]; what a bin has not is shared among the others."""
    share = np.zeros(len(available), dtype=np.int64)
    while (missing := min(budget, int(available.sum())) - int(share.sum())) > 0:
        open_ = np.flatnonzero(share < available)
        more = np.full(len(open_), missing // len(open_))
        more[: missing % len(open_)] += 1
        share[open_] = np.minimum(share[open_] + more, available[open_])
    return share


def select(found: Candidates, nodes: int, columns_from: int, limits: Limits) -> Chosen:
    """Choose pairs in the order of the rounds.

    Rows are the nodes 0..R-1; columns start at node `columns_from`, which is 0 where both sides are the same items
    (then the pairs (i, j) and (j, i) are one).
    """
    order = _in_rounds(found)
    first, second = found.row[order].astype(np.int64), found.column[order].astype(np.int64) + columns_from
    low, high = np.minimum(first, second), np.maximum(first, second)
    _, kept = np.unique(low * nodes + high, return_index=True)
    kept.sort()
    tree = np.zeros(len(low), dtype=bool)
    if limits.connected:
        tree[kept] = _spanning_forest(low[kept], high[kept], nodes, limits.max_per_item)
    components = nodes - int(tree.sum()) if limits.connected else 1
    kept = kept[np.argsort(~tree[kept], kind="stable")]
    if limits.max_per_item is not None:
        kept = kept[within_limit(low[kept], high[kept], nodes, limits.max_per_item)]
    tree, bins = tree[kept], found.bin[order[kept]].astype(np.int64)
    want = shares(limits.budget, _available(found, symmetric=columns_from == 0))
    # What connects first, then each bin's share, then what fills up the budget.
    by_bin = np.lexsort((~tree, bins))
    place = np.empty(len(kept), dtype=np.int64)
    place[by_bin] = rank_in_run(bins[by_bin])
    turn = np.lexsort((place, place >= want[bins], ~tree))
    taken = np.sort(turn[: limits.budget])
    degree = np.bincount(np.concatenate([low[kept[taken]], high[kept[taken]]]), minlength=nodes)
    return Chosen(
        numbers=order[kept[taken]],
        short=np.bincount(bins[taken], minlength=len(want)) < want,
        full=degree >= (limits.max_per_item or np.iinfo(np.int64).max),
        components=components,
    )


def within_limit(low: Ints, high: Ints, nodes: int, limit: int) -> npt.NDArray[np.bool_]:
    """Which edges a walk in their order takes that skips those of a node with `limit` edges already: bool[E].

    In rounds: an edge with fewer than a node's remaining places before it, at both its ends, is taken for sure.
    """
    taken = np.zeros(len(low), dtype=bool)
    left = np.full(nodes, limit, dtype=np.int64)
    open_ = np.arange(len(low))
    while len(open_):
        ends = np.concatenate([low[open_], high[open_]])
        edge = np.tile(np.arange(len(open_)), 2)
        by_node = np.lexsort((edge, ends))
        before = np.empty(len(ends), dtype=np.int64)
        before[by_node] = rank_in_run(ends[by_node])
        sure = (before < left[ends]).reshape(2, -1).all(axis=0)
        taken[open_[sure]] = True
        left -= np.bincount(ends.reshape(2, -1)[:, sure].ravel(), minlength=nodes)
        open_ = open_[~sure]
        open_ = open_[(left[low[open_]] > 0) & (left[high[open_]] > 0)]
    return taken


def _in_rounds(found: Candidates) -> Ints:
    """Numbers of the candidates, first choices first."""
    lists = found.row.astype(np.int64) * len(found.in_band) + found.bin
    rank = rank_in_run(lists).astype(np.uint64)
    return np.argsort(rank << np.uint64(32) | found.order, kind="stable")


def _available(found: Candidates, *, symmetric: bool) -> Ints:
    return found.in_band // 2 if symmetric else found.in_band


def _spanning_forest(low: Ints, high: Ints, nodes: int, limit: int | None) -> npt.NDArray[np.bool_]:
    """The earliest edges that join what is not joined yet, bool[E] (Kruskal's), none of a node that has `limit`."""
    tree = np.zeros(len(low), dtype=bool)
    parent, left = list(range(nodes)), [nodes if limit is None else limit] * nodes

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    missing = nodes - 1
    for edge, (one, other) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if not missing:
            break
        if left[one] and left[other] and (top := root(one)) != (bottom := root(other)):
            parent[top] = bottom
            left[one] -= 1
            left[other] -= 1
            tree[edge] = True
            missing -= 1
    return tree
