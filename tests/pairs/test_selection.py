"""From candidates to pairs: worked by hand."""

import numpy as np
import pytest

from jpo_ray.pairs.candidates import Candidates
from jpo_ray.pairs.selection import candidates_per_row, select


def candidates(*triples: tuple[int, int, float]) -> Candidates:
    """(row, column, priority) of each, the candidates of a row together and best first."""
    row, column, priority = (np.array(values) for values in zip(*triples, strict=True))
    similarity = np.zeros(len(row), dtype=np.float32)
    return Candidates(row.astype(np.int64), column.astype(np.int64), similarity, priority, in_band=len(row))


FOUND = candidates(
    (0, 1, 0.1), (0, 2, 0.2),
    (1, 0, 0.3), (1, 2, 0.4),
    (2, 1, 0.0), (2, 0, 0.9),
)  # fmt: skip


def test_first_choices_go_before_second_ones_and_mirrored_pairs_count_once() -> None:
    """Round one, best priority first: (2, 1), (0, 1), then (1, 0), which is (0, 1) again. Round two: (0, 2)."""
    chosen = select(FOUND, 3, symmetric=True)
    assert chosen is not None
    assert [(int(FOUND.row[i]), int(FOUND.column[i])) for i in chosen] == [(2, 1), (0, 1), (0, 2)]


def test_with_two_sides_the_pairs_i_j_and_j_i_differ() -> None:
    chosen = select(FOUND, 6, symmetric=False)
    assert chosen is not None
    assert chosen.tolist() == [4, 0, 2, 1, 3, 5]


@pytest.mark.parametrize(("budget", "enough"), [(1, True), (3, True), (4, False)])
def test_none_where_the_candidates_do_not_suffice(budget: int, enough: bool) -> None:
    chosen = select(FOUND, budget, symmetric=True)
    assert (chosen is not None) == enough
    assert chosen is None or len(chosen) == budget


def test_twice_the_need_is_looked_at_first() -> None:
    assert candidates_per_row(100, 100) == 6
    assert candidates_per_row(101, 100) == 8
    assert candidates_per_row(5, 0) == 14
