"""Strengths fitted to comparisons: against what made the comparisons, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jpo_ray.feedback import strengths as module
from jpo_ray.feedback.strengths import fit_strengths, graph_facts


def _world(
    items: int, per_item: int, *, spread: float = 1.5, tie: float = 0.5, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """True strengths, and comparisons drawn from Davidson's model."""
    rng = np.random.default_rng(seed)
    true = spread * rng.standard_normal(items)
    first = np.tile(np.arange(items), per_item // 2)
    second = (first + rng.integers(1, items, len(first))) % items
    half = (true[first] - true[second]) / 2
    weights = np.stack([np.exp(half), np.full(len(half), tie), np.exp(-half)])
    drawn = (rng.random(len(half)) > np.cumsum(weights / weights.sum(axis=0), axis=0)[:2]).sum(axis=0)
    return true, first, second, 1 - drawn


def test_strengths_and_their_errors_are_those_that_made_the_comparisons() -> None:
    """400 items, 24 comparisons each: errors in units of standard errors spread like a standard normal."""
    true, first, second, outcome = _world(400, 24)
    fitted = fit_strengths(400, first, second, outcome)
    assert np.corrcoef(fitted.strength, true)[0, 1] > 0.92
    assert fitted.tie == pytest.approx(0.5, rel=0.15)
    assert fitted.prior_std == pytest.approx(1.5, rel=0.2)
    z = (fitted.strength - (true - true.mean())) / fitted.standard_error
    assert 0.85 < z.std() < 1.25
    assert fitted.agreement is not None
    assert fitted.agreement > 0.7
    assert fitted.log_loss < 0.9 < np.log(3)
    assert 0.8 < fitted.reliability < 0.95


def test_win_probabilities_of_pairs_that_were_not_compared_are_modest_but_not_too_modest() -> None:
    """The width of the prior, estimated by Laplace's method, comes out somewhat small where comparisons are few."""
    true, first, second, outcome = _world(600, 8, tie=0.2)
    fitted = fit_strengths(600, first, second, outcome)
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 600, (2, 20_000))
    probability = fitted.win_probability(a, b)
    truth = 1 / (1 + np.exp(-(true[a] - true[b])))
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        here = (probability >= low) & (probability < low + 0.1)
        assert probability[here].mean() - 0.02 < truth[here].mean() < probability[here].mean() + 0.1


def test_sampled_errors_are_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    _, first, second, outcome = _world(300, 8)
    exact = fit_strengths(300, first, second, outcome)
    monkeypatch.setattr(module, "DENSE_ITEMS", 0)
    sampled = fit_strengths(300, first, second, outcome)
    ratio = sampled.standard_error / exact.standard_error
    assert abs(ratio.mean() - 1) < 0.05
    assert ratio.std() < 0.12  # 64 samples: a standard error is off by 9 %
    assert sampled.prior_std == pytest.approx(exact.prior_std, rel=0.1)


def test_items_that_always_win_have_finite_strengths_in_order() -> None:
    """0 beats 1 beats 2 beats 3, each three times."""
    first, second = np.tile([0, 1, 2], 3), np.tile([1, 2, 3], 3)
    fitted = fit_strengths(4, first, second, np.ones(9, dtype=np.int64))
    assert np.isfinite(fitted.strength).all()
    assert (np.diff(fitted.strength) < 0).all()
    assert fitted.strength.sum() == pytest.approx(0, abs=1e-3)
    assert fitted.tie == 0
    assert fitted.agreement == 1


def test_equals_have_equal_strengths_and_their_share_of_ties() -> None:
    """One win each and two ties of two items: nu / (nu + 2) = 1/2, so nu = 2."""
    fitted = fit_strengths(2, np.zeros(400, dtype=np.int64), np.ones(400, dtype=np.int64), np.tile([1, -1, 0, 0], 100))
    assert fitted.strength == pytest.approx([0, 0], abs=1e-3)
    assert fitted.tie == pytest.approx(2, rel=0.02)
    assert fitted.log_loss == pytest.approx((2 * np.log(4) + 2 * np.log(2)) / 4, abs=1e-3)


def test_nothing_is_known_of_noise() -> None:
    rng = np.random.default_rng(0)
    first = np.tile(np.arange(200), 3)
    second = (first + rng.integers(1, 200, 600)) % 200
    fitted = fit_strengths(200, first, second, rng.choice([1, -1], 600))
    assert fitted.reliability < 0.3
    assert np.abs(fitted.win_probability(first, second) - 0.5).max() < 0.3


@pytest.mark.parametrize(("first", "second", "words"), [([], [], "no comparison"), ([1], [1], "with itself")])
def test_what_cannot_be_fitted(first: list[int], second: list[int], words: str) -> None:
    ends = (np.array(side, dtype=np.int64) for side in (first, second))
    with pytest.raises(ValueError, match=words):
        fit_strengths(3, *ends, np.ones(len(first), dtype=np.int64))


def test_facts_of_a_graph() -> None:
    """0 > 1 > 2 > 0 goes round; 3 > 4 > 5, 3 > 5 does not, though 4 and 5 were judged twice; 6 = 7 is a tie apart."""
    first, second = np.array([0, 1, 2, 3, 4, 3, 5, 6]), np.array([1, 2, 0, 4, 5, 5, 4, 7])
    facts = graph_facts(9, first, second, np.array([1, 1, 1, 1, 1, 1, -1, 0]))
    assert (facts.items, facts.comparisons, facts.components, facts.largest_component) == (9, 8, 4, 3)
    assert (facts.triples, facts.intransitive, facts.intransitive_share) == (2, 1, 0.5)
    assert facts.per_item == pytest.approx(16 / 9)
    assert graph_facts(3, np.array([0, 1]), np.array([1, 2]), np.array([1, 0])).intransitive_share is None
