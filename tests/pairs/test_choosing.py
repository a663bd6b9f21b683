"""Choosing comparisons to judge: what each strategy prefers, and the limits of a round."""

from collections import Counter

import numpy as np
import pytest

from jpo_ray.pairs.choosing import CHOOSING, Known, choose_next
from pairs.world import side

KNOWN = Known(
    keys=side(6).keys,
    strength=np.array([0.0, 0.1, 3.0, 0.0, 0.1, 0.0]),
    standard_error=np.array([1.0, 1.0, 1.0, 0.1, 0.1, 2.0]),
    reward=np.array([0.0, 1.0, -5.0, 0.5, 0.5, 2.0]),
    embedding=np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [9.0, 9.0]]),
)
PAIRS = np.array([(0, 1), (0, 2), (3, 4), (0, 5), (1, 5), (2, 3)])


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("uncertainty", [(0, 5), (1, 5), (0, 1), (0, 2), (2, 3), (3, 4)]),
        ("margin", [(2, 3), (0, 2), (0, 5), (0, 1), (1, 5), (3, 4)]),
        ("ches", [(0, 5), (1, 5), (0, 1), (0, 2), (3, 4), (2, 3)]),
    ],
)
def test_the_best_comparisons_come_first(strategy: str, expected: list[tuple[int, int]]) -> None:
    first, second = PAIRS.T
    worth = CHOOSING[strategy](first, second, KNOWN, 0)
    if strategy == "uncertainty":  # p (1 - p) v by hand: of (0, 1), p is that of 0.1 / sqrt(1 + pi 2 / 8)
        p = 1 / (1 + np.exp(0.1 / np.sqrt(1 + np.pi / 4)))
        assert worth[0] == pytest.approx(p * (1 - p) * 2)
    order = np.argsort(-worth, kind="stable")
    assert [tuple(PAIRS[number].tolist()) for number in order] == expected


def test_a_round_spreads_over_the_items() -> None:
    """An item known least would be in every comparison of the round; it is in twice its share."""
    first, second = (np.array(values) for values in zip(*[(i, j) for i in range(40) for j in range(i)], strict=True))
    known = Known(side(40).keys, np.zeros(40), np.r_[50.0, np.ones(39)])
    nothing = np.zeros(len(first), dtype=bool)
    chosen = choose_next("uncertainty", first, second, nothing, known, 20, seed=0)
    degree = Counter(np.concatenate([first[chosen], second[chosen]]).tolist())
    assert len(set(chosen.tolist())) == 20
    assert max(degree.values()) == degree[0] == 2


@pytest.mark.parametrize("strategy", sorted(CHOOSING))
def test_what_is_judged_is_not_chosen_again_until_nothing_is_left(strategy: str) -> None:
    first, second = PAIRS.T
    judged = np.zeros(len(PAIRS), dtype=bool)
    seen: list[int] = []
    while len(chosen := choose_next(strategy, first, second, judged, KNOWN, 4, seed=1)):
        judged[chosen] = True
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(PAIRS)))


def test_random_rounds_depend_on_the_seed_alone() -> None:
    first, second = PAIRS.T
    nothing = np.zeros(len(PAIRS), dtype=bool)
    rounds = {seed: choose_next("random", first, second, nothing, KNOWN, 3, seed).tolist() for seed in range(20)}
    assert rounds[3] == choose_next("random", first, second, nothing, KNOWN, 3, 3).tolist()
    assert len({tuple(chosen) for chosen in rounds.values()}) > 10
