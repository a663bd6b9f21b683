"""From candidates to pairs: worked by hand, and against a walk that looks at one candidate at a time."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpo_ray.pairs.candidates import Candidates
from jpo_ray.pairs.selection import Limits, candidates_per_row, select, shares, within_limit

Rows = list[tuple[int, int, int, int]]  # row, column, bin, order


def candidates(rows: Rows, in_band: list[int] | None = None) -> Candidates:
    """The candidates of a row and bin together and best first."""
    row, column, part, order = (np.array(values) for values in zip(*rows, strict=True))
    return Candidates(
        row=row.astype(np.int32),
        column=column.astype(np.int32),
        similarity=np.zeros(len(row), dtype=np.float32),
        bin=part.astype(np.uint8),
        order=order.astype(np.uint32),
        in_band=np.array(in_band or [2 * len(rows)]),
    )


FOUND = candidates([(0, 1, 0, 10), (0, 2, 0, 20), (1, 0, 0, 30), (1, 2, 0, 40), (2, 1, 0, 5), (2, 0, 0, 90)])


def pairs(found: Candidates, numbers: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(found.row[numbers].tolist(), found.column[numbers].tolist(), strict=True))


def test_first_choices_go_before_second_ones_and_mirrored_pairs_count_once() -> None:
    """Round one, best priority first: (2, 1), (0, 1), then (1, 0), which is (0, 1) again. Round two: (0, 2)."""
    chosen = select(FOUND, 3, 0, Limits(3))
    assert pairs(FOUND, chosen.numbers) == [(2, 1), (0, 1), (0, 2)]
    assert not chosen.short.any()


def test_with_two_sides_the_pairs_i_j_and_j_i_differ() -> None:
    assert select(FOUND, 6, 3, Limits(6)).numbers.tolist() == [4, 0, 2, 1, 3, 5]


@pytest.mark.parametrize("budget", [1, 3, 4])
def test_never_more_than_the_budget_nor_than_there_is(budget: int) -> None:
    chosen = select(FOUND, 3, 0, Limits(budget))
    assert len(chosen.numbers) == min(budget, 3)
    assert chosen.short.tolist() == [budget > 3]


def test_a_full_item_takes_no_more_pairs() -> None:
    """At most one pair each: (2, 1) fills 1 and 2, so nothing is left for 0."""
    chosen = select(FOUND, 3, 0, Limits(3, max_per_item=1))
    assert pairs(FOUND, chosen.numbers) == [(2, 1)]
    assert chosen.degree.tolist() == [0, 1, 1]


def test_a_taken_pair_gives_way_where_that_makes_room() -> None:
    """A path 2-0-1-3: 0-1, everybody's first choice, blocks the two others when one pair each is all there may be."""
    found = candidates([(0, 1, 0, 1), (0, 2, 0, 5), (1, 0, 0, 2), (1, 3, 0, 6)])
    chosen = select(found, 4, 0, Limits(2, max_per_item=1))
    assert {frozenset(pair) for pair in pairs(found, chosen.numbers)} == {frozenset((0, 2)), frozenset((1, 3))}
    assert chosen.degree.tolist() == [1, 1, 1, 1]
    assert pairs(found, select(found, 4, 0, Limits(1, max_per_item=1)).numbers) == [(0, 1)]


def test_connected_pairs_come_first() -> None:
    """Two pairs of neighbours, 0-1 and 2-3; the only bridge, 0-3, is everybody's last choice."""
    found = candidates([(0, 1, 0, 1), (0, 3, 0, 9), (1, 0, 0, 2), (2, 3, 0, 3), (3, 2, 0, 4), (3, 0, 0, 8)])
    chosen = select(found, 4, 0, Limits(3, connected=True))
    assert not chosen.parts.any()
    assert {frozenset(pair) for pair in pairs(found, chosen.numbers)} == {
        frozenset(p) for p in ((0, 1), (2, 3), (0, 3))
    }
    apart = select(candidates([(0, 1, 0, 1), (2, 3, 0, 1)]), 4, 0, Limits(2, connected=True))
    assert apart.parts.tolist() == [0, 0, 1, 1]


def test_bins_get_equal_shares_and_what_one_lacks_the_others_get() -> None:
    assert shares(10, np.array([50, 50, 50])).tolist() == [4, 3, 3]
    assert shares(10, np.array([50, 1, 50])).tolist() == [5, 1, 4]
    assert shares(10, np.array([2, 1, 3])).tolist() == [2, 1, 3]
    assert shares(0, np.array([2])).tolist() == [0]
    rows = [(row, 5 * part + i, part, row * 7 + i) for row in range(4) for part in (0, 1) for i in range(5)]
    chosen = select(candidates(rows, in_band=[20, 20]), 14, 4, Limits(10))
    assert Counter(candidates(rows).bin[chosen.numbers].tolist()) == {0: 5, 1: 5}
    assert not chosen.short.any()


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda pair: pair[0] != pair[1]), max_size=60),
    st.integers(1, 4),
)
def test_the_limit_is_that_of_a_walk_in_order(edges: list[tuple[int, int]], limit: int) -> None:
    degree: Counter[int] = Counter()
    expected = []
    for low, high in edges:
        expected.append(degree[low] < limit and degree[high] < limit)
        if expected[-1]:
            degree.update((low, high))
    low, high = (np.array([edge[side] for edge in edges], dtype=np.int64) for side in (0, 1))
    assert within_limit(low, high, 8, limit).tolist() == expected


@given(st.integers(2, 9), st.data())
def test_a_spanning_tree_of_the_earliest_edges_is_chosen(nodes: int, data: st.DataObject) -> None:
    """Kruskal's algorithm, edge by edge."""
    every = [(i, j) for i in range(nodes) for j in range(nodes) if i != j]
    rows = [(i, j, 0, data.draw(st.integers(0, 5))) for i, j in every]
    rows.sort(key=lambda one: (one[0], one[3], one[1]))
    found = candidates(rows)
    plain = pairs(found, select(found, nodes, 0, Limits(len(every) // 2)).numbers)
    part = list(range(nodes))
    tree = []
    for i, j in plain:
        if part[i] != part[j]:
            tree.append((i, j))
            part = [part[i] if one == part[j] else one for one in part]
    chosen = pairs(found, select(found, nodes, 0, Limits(nodes - 1, connected=True)).numbers)
    assert chosen == tree
    assert all(plain.index(one) < plain.index(other) for one, other in pairwise(chosen))


def test_twice_the_need_is_looked_at_first() -> None:
    assert candidates_per_row(100, 100, 1) == 6
    assert candidates_per_row(101, 100, 1) == 8
    assert candidates_per_row(5, 0, 1) == 14
    assert candidates_per_row(800, 100, 8) == 3
