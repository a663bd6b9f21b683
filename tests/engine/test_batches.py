"""Batches: every edge once per epoch, a function of seed and epoch, and few items per edge in graph mode."""

import hashlib
from typing import Any

import numpy as np
import pytest

from jpo_ray.engine.batches import Limits, Schedule, graph, pairs, shuffled


def _edges(items: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, items, count)
    return first, (first + rng.integers(1, items, count)) % items


def _items_per_edge(first: np.ndarray, second: np.ndarray, batches: list[np.ndarray]) -> float:
    return sum(len(np.unique([first[batch], second[batch]])) for batch in batches) / len(first)


@pytest.mark.parametrize(("items", "count", "per_step"), [(50, 200, 32), (1000, 300, 32), (10, 1, 8), (4, 6, 7)])
def test_each_edge_comes_once_and_batches_are_full(items: int, count: int, per_step: int) -> None:
    first, second = _edges(items, count, seed=1)
    for batches in (graph(first, second, Limits(per_step), 0, 0), pairs(first, second, Limits(per_step), 0, 0)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(count))
        sizes = sorted(len(batch) for batch in batches)
        assert sizes[1:] == [per_step] * (len(sizes) - 1)


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    first, second = _edges(60, 240, seed=2)
    again = [
        np.concatenate(graph(first, second, Limits(32), seed, epoch)).tolist()
        for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert again[0] == again[1]
    assert again[0] != again[2] != again[3] != again[0]


@pytest.mark.parametrize(
    ("items", "count", "max_tokens", "digest"),
    [(1000, 600, None, "3a40658df4d104b3"), (30, 400, None, "c7a58b4e87790f07"), (50, 200, 100, "3ad153d5bebd3f10")],
    ids=["sparse", "dense", "tokens"],
)
def test_batches_stay_the_same(items: int, count: int, max_tokens: int | None, digest: str) -> None:
    """From version to version: a training that goes on, and one that is repeated, reads the same comparisons."""
    first, second = _edges(items, count, seed=5)
    limits = Limits(32, max_tokens, 10 + np.arange(items) % 20) if max_tokens else Limits(32)
    batches = [batch.tolist() for batch in graph(first, second, limits, 3, 1)]
    assert hashlib.sha256(repr(batches).encode()).hexdigest()[:16] == digest


def test_parallel_edges_and_lone_pairs_are_kept() -> None:
    first, second = np.array([0, 0, 1, 7, 7]), np.array([1, 1, 0, 8, 9])
    assert sorted(np.concatenate(graph(first, second, Limits(2), 0, 0)).tolist()) == [0, 1, 2, 3, 4]


def test_graph_mode_scores_far_fewer_items() -> None:
    """D_M of the paper: one conditional edge per instruction and as many joint edges among the D_S items.

    Independent comparisons need nearly two items per edge; grouped ones about one (measured 1.14 at 32 per batch).
    """
    count = 2000
    chosen = np.arange(count)
    partner = (chosen + np.random.default_rng(0).integers(1, count, count)) % count
    first, second = np.concatenate([chosen, chosen]), np.concatenate([chosen + count, partner])
    assert _items_per_edge(first, second, shuffled(2 * count, 32, 0, 0)) > 1.95
    assert _items_per_edge(first, second, graph(first, second, Limits(32), 0, 0)) < 1.2


def test_a_clique_costs_its_items() -> None:
    """Groups of 16 fully compared items: 120 edges per batch cost exactly 16 items."""
    pairs = [(16 * group + a, 16 * group + b) for group in range(5) for a in range(16) for b in range(a)]
    first, second = np.array(pairs).T
    batches = graph(first, second, Limits(120), 0, 0)
    assert [len(np.unique([first[batch], second[batch]])) for batch in batches] == [16] * 5


def test_the_item_with_most_edges_into_the_batch_joins() -> None:
    """Item 3 has two edges to the triangle 0, 1, 2, and item 4 one: five comparisons are those of 0 to 3."""
    first, second = np.array([0, 1, 2, 3, 3, 4]), np.array([1, 2, 0, 0, 1, 2])
    for seed in range(20):
        batches = graph(first, second, Limits(5), seed, 0)
        of_five = next(batch for batch in batches if len(batch) == 5)
        if 5 not in of_five:
            assert sorted(of_five.tolist()) == [0, 1, 2, 3, 4]
        else:  # it began with item 4's only edge
            assert of_five[0] == 5


@pytest.mark.parametrize("mode", [graph, pairs])
@pytest.mark.parametrize("max_tokens", [60, 100, 400])
def test_batches_stay_within_a_number_of_tokens(mode: Any, max_tokens: int) -> None:
    """Items of 10 to 29 tokens: a batch of one comparison always fits 60."""
    first, second = _edges(50, 200, seed=4)
    lengths = 10 + np.arange(50) % 20
    batches = mode(first, second, Limits(32, max_tokens, lengths), 0, 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    sizes = [int(lengths[np.unique([first[batch], second[batch]])].sum()) for batch in batches]
    assert max(sizes) <= max_tokens
    assert max(len(batch) for batch in batches) <= 32
    if mode is graph:
        assert len(batches) < len(pairs(first, second, Limits(32, max_tokens, lengths), 0, 0))


def test_a_comparison_longer_than_the_limit_has_a_batch_of_its_own() -> None:
    first, second = np.array([0, 2]), np.array([1, 3])
    for mode in (graph, pairs):
        batches = mode(first, second, Limits(8, 100, np.array([90, 90, 5, 5])), 0, 0)
        assert sorted(batch.tolist() for batch in batches) == [[0], [1]]


def test_without_a_limit_pairs_are_shuffled_edges() -> None:
    first, second = _edges(50, 70, seed=4)
    for one, other in zip(pairs(first, second, Limits(32), 3, 1), shuffled(70, 32, 3, 1), strict=True):
        assert one.tolist() == other.tolist()
    free = pairs(first, second, Limits(32, 1000, np.ones(50, dtype=np.int64)), 3, 1)
    assert [batch.tolist() for batch in free] == [batch.tolist() for batch in shuffled(70, 32, 3, 1)]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (2.5, 7), (0.5, 2), (3, 9)])
def test_epochs_of_different_numbers_of_batches(epochs: float, steps: int) -> None:
    """Epochs of 3, 2 and 4 batches; the last epoch counts by its share, rounded up."""
    counts = [3, 2, 4]
    schedule = Schedule(lambda epoch, _: [np.array([10 * epoch + n]) for n in range(counts[epoch])], epochs, None)
    assert schedule.total_steps == steps
    assert schedule.steps_per_epoch == 3
    found = [int(schedule.batch(step)[1][0]) for step in range(steps)]
    assert found == [0, 1, 2, 10, 11, 20, 21, 22, 23][:steps]
    assert int(schedule.batch(1)[1][0]) == 1  # an earlier one again, as a resumed run asks for it
