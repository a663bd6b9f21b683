"""Preferences that a graph of comparisons implies: never judged, of one component, right about the truth."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from jpo_ray import records
from jpo_ray.feedback.annotators import one_by_one, score_annotator
from jpo_ray.feedback.closure import ItemGraph, implied_preferences, implied_table, item_graph, judged_edges, warning
from jpo_ray.feedback.judge import comparisons_of, judge
from jpo_ray.feedback.strengths import fit_strengths, graph_facts
from jpo_ray.sandbox import make_rows, quality

ITEMS = 600
NOISE = 0.2


def _graph(per_item: int, seed: int = 0) -> tuple[ItemGraph, np.ndarray, np.ndarray]:
    """A random regular graph over sandbox items, judged once by a noisy oracle; the items' true qualities; and how
    often that oracle, asked about random pairs that differ, is right where it decides.
    """
    rows = make_rows("train", ITEMS, 3)
    true = np.array([quality(row["instruction"], row["response_0"]) for row in rows])
    rng = np.random.default_rng(seed)
    order = rng.permutation(ITEMS)
    steps = rng.choice(np.arange(1, ITEMS // 2), per_item // 2, replace=False)
    first = np.tile(order, len(steps))
    second = np.concatenate([np.roll(order, -step) for step in steps])
    judged = _judged(true[first] - true[second], rng)
    a, b = rng.integers(0, ITEMS, (2, 20_000))
    once = _judged(true[a] - true[b], rng)
    asked = (once != 0) & (true[a] != true[b])
    right = (once == np.sign(true[a] - true[b]))[asked]
    return ItemGraph([str(i) for i in range(ITEMS)], first, second, judged), true, right


def _judged(difference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = difference + NOISE * rng.standard_normal(len(difference))
    outcome: np.ndarray = np.where(np.abs(noisy) <= 0.05, 0, np.sign(noisy)).astype(np.int64)
    return outcome


@pytest.mark.parametrize("per_item", [4, 8, 16])
def test_implied_labels_are_right_at_least_as_often_as_single_judgments(per_item: int) -> None:
    graph, true, right_once = _graph(per_item)
    fitted = fit_strengths(ITEMS, graph.first, graph.second, graph.outcome)
    winner, loser, probability = implied_preferences(graph, fitted, per_item=8, min_probability=0.75, seed=0)
    differ = true[winner] != true[loser]
    right = (true[winner] > true[loser])[differ]
    assert len(right) > 200
    assert right.mean() >= right_once.mean()
    assert probability.min() >= 0.75


def test_implied_pairs_are_new_distinct_and_seeded() -> None:
    graph, _, _ = _graph(8)
    fitted = fit_strengths(ITEMS, graph.first, graph.second, graph.outcome)
    found = implied_preferences(graph, fitted, per_item=3, min_probability=0.8, seed=0)
    again, other = (implied_preferences(graph, fitted, per_item=3, min_probability=0.8, seed=seed) for seed in (0, 1))
    assert all(np.array_equal(one, two) for one, two in zip(found, again, strict=True))
    assert not np.array_equal(found[0], other[0])
    pairs = {frozenset(pair) for pair in zip(found[0].tolist(), found[1].tolist(), strict=True)}
    judged = {frozenset(pair) for pair in zip(graph.first.tolist(), graph.second.tolist(), strict=True)}
    assert len(pairs) == len(found[0])
    assert not pairs & judged
    assert {len(pair) for pair in pairs} == {2}
    assert ITEMS < len(pairs) <= 3 * ITEMS


def test_items_that_nothing_connects_are_not_compared() -> None:
    """Two tournaments of five items, all of the first stronger in itself: 0 > 1 > ... > 4 and 5 > ... > 9."""
    one = np.array([(a, b) for a in range(5) for b in range(a + 1, 5) if (a, b) != (0, 4)])
    both = np.tile(np.concatenate([one, one + 5]), (6, 1))
    graph = ItemGraph(list("abcdefghij"), both[:, 0], both[:, 1], np.ones(len(both), dtype=np.int64))
    fitted = fit_strengths(10, graph.first, graph.second, graph.outcome)
    winner, loser, _ = implied_preferences(graph, fitted, per_item=4, min_probability=0.7, seed=0)
    assert sorted(zip(winner.tolist(), loser.tolist(), strict=True)) == [(0, 4), (5, 9)]
    found = warning(graph_facts(10, graph.first, graph.second, graph.outcome), fitted)
    assert found is not None
    assert "2 components (the largest has 5 of 10 items)" in found


def test_too_few_judgments_are_said_to_be_too_few() -> None:
    for per_item, wanting in ((2, True), (16, False)):
        graph, _, _ = _graph(per_item)
        rng = np.random.default_rng(0)
        outcome = rng.choice([1, -1], len(graph.first)) if wanting else graph.outcome
        facts = graph_facts(ITEMS, graph.first, graph.second, outcome)
        found = warning(facts, fit_strengths(ITEMS, graph.first, graph.second, outcome))
        assert (found is not None) == wanting


def test_from_judgments_to_preferences() -> None:
    """A chain of four items of two instructions, judged by their lengths; what it implies has the right protocol."""
    texts = [("i", "x" * n) for n in (40, 30)] + [("j", "y" * n) for n in (20, 10)]
    ids = [records.item_id(*text) for text in texts]
    items = pa.Table.from_pylist(
        [
            {"item_id": name, "instruction_id": i, "instruction": i, "response": r}
            for name, (i, r) in zip(ids, texts, strict=True)
        ]
    )
    rows = []
    for a, b, split in [(0, 1, "train"), (1, 2, "train"), (2, 3, "train"), (0, 3, "validation")]:
        protocol = "conditional" if texts[a][0] == texts[b][0] else "joint"
        pair = {"pair_id": records.pair_id(ids[a], ids[b], protocol), "item_a": ids[a], "item_b": ids[b]}
        rows.append(pair | {"protocol": protocol, "similarity": 0.0, "strategy": "random", "split": split})
    pairs = pa.Table.from_pylist(rows, records.PAIRS)
    annotator = score_annotator("length", one_by_one(lambda _, text: float(len(text))), noise=0, tie_band=0, seed=0)
    judgments = judge(comparisons_of(pairs, items), annotator) * 8  # so many people of the same mind
    graph = item_graph(judged_edges(pairs, pa.Table.from_pylist(judgments, records.JUDGMENTS), "train"))
    assert len(graph.first) == 3 * 8
    fitted = fit_strengths(len(graph.ids), graph.first, graph.second, graph.outcome)
    table = implied_table(graph, fitted, items, 4, 0.51, 0)
    assert {(row["chosen"], row["rejected"], row["protocol"]) for row in table.to_pylist()} == {
        (ids[0], ids[2], "joint"), (ids[0], ids[3], "joint"), (ids[1], ids[3], "joint"),
    }  # fmt: skip
    assert 0.5 < min(table["probability"].to_pylist()) < max(table["probability"].to_pylist()) < 1
    assert graph.table(fitted, "train").select(records.STRENGTHS.names).cast(records.STRENGTHS).num_rows == 4
