"""From candidates to exactly the budgeted number of distinct pairs.

Every row proposes its best candidate, then its second best, and so on; within a round the best priority goes first. So
each row is matched before any proposes twice, and the choice does not depend on how the candidates were found.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from jpo_ray.pairs.candidates import Candidates
from jpo_ray.pairs.sides import Ints, rank_in_run

MOST_FREE = 16  # items with places left among which swaps are looked for
PASSES = 32  # at most, in which what a limit refuses is replaced

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """What the chosen pairs must keep to."""

    budget: int
    min_per_item: int = 0  # sought, but not always found
    max_per_item: int | None = None
    connected: bool = False  # chains of chosen pairs join all items


@dataclass(frozen=True)
class Chosen:
    numbers: Ints  # of the chosen candidates, in order: at most the budget
    short: Flags  # bool[bins]: bins that more candidates could still give their share
    degree: Ints  # int64[nodes]: chosen pairs that an item is in
    parts: Ints  # int64[nodes]: which part of the graph an item is in; all 0 unless `connected` was asked


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
    """Choose pairs in the order of the rounds; those come first that connect items, then those that give an item its
    least, then each bin's share, then what fills up the budget.

    Rows are the nodes 0..R-1; columns start at node `columns_from`, which is 0 where both sides are the same items
    (then the pairs (i, j) and (j, i) are one).
    """
    number, low, high = _distinct(found, nodes, columns_from)
    tree = np.zeros(len(number), dtype=bool)
    if limits.connected:
        tree = _spanning_forest(low, high, nodes, limits.max_per_item)
        first = np.argsort(~tree, kind="stable")
        number, low, high, tree = number[first], low[first], high[first], tree[first]
    bins = found.bin[number].astype(np.int64)
    want = shares(limits.budget, _available(found, symmetric=columns_from == 0))
    left = np.arange(len(number))
    for attempt in range(PASSES):
        turn, wanted = _turns(low[left], high[left], bins[left], tree[left], nodes, want, limits.min_per_item)
        left, wanted = left[turn], wanted[turn]
        if limits.max_per_item is None:
            break
        fits = within_limit(low[left], high[left], nodes, limits.max_per_item)
        refused = wanted & ~fits
        if not refused.any() or attempt == PASSES - 1:
            left = left[fits]
            break
        left = np.sort(left[~refused])
    taken = np.zeros(len(number), dtype=bool)
    taken[left[: limits.budget]] = True
    if limits.max_per_item is not None:
        _swap_in(low, high, taken, tree, nodes, limits.budget - int(taken.sum()), limits.max_per_item)
    return Chosen(
        numbers=number[np.flatnonzero(taken)],
        short=np.bincount(bins[taken], minlength=len(want)) < want,
        degree=_degree(low[taken], high[taken], nodes),
        parts=_parts(low[tree], high[tree], nodes) if limits.connected else np.zeros(nodes, dtype=np.int64),
    )


def _distinct(found: Candidates, nodes: int, columns_from: int) -> tuple[Ints, Ints, Ints]:
    """Numbers of the candidates in the order of the rounds, each pair once, and its lower and higher node."""
    order = _in_rounds(found)
    first, second = found.row[order].astype(np.int64), found.column[order].astype(np.int64) + columns_from
    low, high = np.minimum(first, second), np.maximum(first, second)
    _, kept = np.unique(low * nodes + high, return_index=True)
    kept.sort()
    return order[kept], low[kept], high[kept]


def _turns(low: Ints, high: Ints, bins: Ints, tree: Flags, nodes: int, want: Ints, least: int) -> tuple[Ints, Flags]:
    """The order in which pairs are taken, int64[E], and which pairs serve more than to fill up the budget, bool[E]."""
    needed = _needed(low, high, nodes, least) if least else np.zeros(len(low), dtype=bool)
    by_bin = np.lexsort((~needed, ~tree, bins))
    place = np.empty(len(low), dtype=np.int64)
    place[by_bin] = rank_in_run(bins[by_bin])
    in_share = place < want[bins]
    wanted = tree | needed | (in_share if len(want) > 1 else False)
    return np.lexsort((place, ~in_share, ~needed, ~tree)), wanted


def _needed(low: Ints, high: Ints, nodes: int, least: int) -> Flags:
    """Pairs that give every node `least`: first those that serve both ends, then the first of who still lacks some."""
    needed = within_limit(low, high, nodes, least)
    lacks = least - _degree(low[needed], high[needed], nodes)
    rest = np.flatnonzero(~needed)
    needed[rest] = (_before(low[rest], high[rest]) < lacks[np.stack([low[rest], high[rest]])]).any(axis=0)
    return needed


def _swap_in(low: Ints, high: Ints, taken: Flags, fixed: Flags, nodes: int, missing: int, limit: int) -> None:
    """Make room for missing pairs: a taken u-v gives way to a-u and v-b, for items a and b that have places left.

    A walk in order ends with few such items, paired with each other already; this is the shortest augmenting path.
    """
    for _ in range(missing):
        swap = _swap(low, high, taken, taken & ~fixed, limit - _degree(low[taken], high[taken], nodes))
        if swap is None:
            return
        out, *into = swap
        taken[out] = False
        taken[into] = True


def _swap(low: Ints, high: Ints, taken: Flags, movable: Flags, places: Ints) -> tuple[int, int, int] | None:
    """Numbers of the pair that gives way and of the two that come instead."""
    free = np.flatnonzero(places > 0)
    if len(free) > MOST_FREE:
        return None
    numbers = np.flatnonzero(movable)
    low, high, all_low, all_high = low[numbers], high[numbers], low, high
    partners = {node: _partners(node, all_low, all_high, ~taken, len(places)) for node in free.tolist()}
    joins = {node: (edge[low] >= 0, edge[high] >= 0) for node, edge in partners.items()}
    for a, b in combinations_with_replacement(partners, 2):
        if a == b and places[a] < 2:
            continue
        for u, v, ends in ((0, 1, (low, high)), (1, 0, (high, low))):
            able = np.flatnonzero(joins[a][u] & joins[b][v])
            if len(able):
                out = able[-1]  # the one of least priority
                return int(numbers[out]), int(partners[a][ends[0][out]]), int(partners[b][ends[1][out]])
    return None


def _partners(node: int, low: Ints, high: Ints, open_: Flags, nodes: int) -> Ints:
    """The open edge that joins `node` to each other node, int64[nodes]; -1 where there is none."""
    edge = np.full(nodes, -1)
    for one, other in ((low, high), (high, low)):
        mine = np.flatnonzero((one == node) & open_)
        edge[other[mine]] = mine
    return edge


def within_limit(low: Ints, high: Ints, nodes: int, limit: int) -> Flags:
    """Which edges a walk in their order takes that skips those of a node with `limit` edges already: bool[E].

    In rounds: an edge with fewer than a node's remaining places before it, at both its ends, is taken for sure.
    """
    taken = np.zeros(len(low), dtype=bool)
    left = np.full(nodes, limit, dtype=np.int64)
    open_ = np.arange(len(low))
    while len(open_):
        ends = np.stack([low[open_], high[open_]])
        sure = (_before(*ends) < left[ends]).all(axis=0)
        taken[open_[sure]] = True
        left -= _degree(ends[0, sure], ends[1, sure], nodes)
        open_ = open_[~sure]
        open_ = open_[(left[low[open_]] > 0) & (left[high[open_]] > 0)]
    return taken


def _before(low: Ints, high: Ints) -> Ints:
    """How many earlier edges the lower and the higher node of each edge is in, int64[2, E]."""
    ends = np.concatenate([low, high])
    by_node = np.lexsort((np.tile(np.arange(len(low)), 2), ends))
    before = np.empty(len(ends), dtype=np.int64)
    before[by_node] = rank_in_run(ends[by_node])
    return before.reshape(2, -1)


def _degree(low: Ints, high: Ints, nodes: int) -> Ints:
    return np.bincount(np.concatenate([low, high]), minlength=nodes)


def _in_rounds(found: Candidates) -> Ints:
    """Numbers of the candidates, first choices first."""
    lists = found.row.astype(np.int64) * len(found.in_band) + found.bin
    rank = rank_in_run(lists).astype(np.uint64)
    return np.argsort(rank << np.uint64(32) | found.order, kind="stable")


def _available(found: Candidates, *, symmetric: bool) -> Ints:
    return found.in_band // 2 if symmetric else found.in_band


def _spanning_forest(low: Ints, high: Ints, nodes: int, limit: int | None) -> Flags:
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


def _parts(low: Ints, high: Ints, nodes: int) -> Ints:
    """Connected part of each node, int64[nodes]."""
    graph = csr_array((np.ones(len(low), dtype=np.int8), (low, high)), shape=(nodes, nodes))
    parts: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
    return parts
