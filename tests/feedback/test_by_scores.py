"""Judgments by scores, a table at a time: what `judge` asks of the same annotator, pair by pair."""

from typing import Any

import pyarrow as pa
import pytest

from jpo_ray import records
from jpo_ray.feedback.annotators import one_by_one, score_annotator
from jpo_ray.feedback.by_scores import Scores, judge_by_scores
from jpo_ray.feedback.judge import comparisons_of, judge, preferences

ITEMS = [("i", "x" * n) for n in range(1, 9)] + [("j", ""), ("j", "y" * 3)]


def quality(_: str, response: str) -> float:
    if not response:
        raise ValueError("nothing to score")
    return len(response) / 3


def items() -> pa.Table:
    rows = [
        {"item_id": records.item_id(*text), "instruction_id": text[0], "instruction": text[0], "response": text[1]}
        | {"source": "s", "split": "train", "sft": True, "gold": False}
        for text in ITEMS
    ]
    return pa.Table.from_pylist(rows, records.ITEMS)


def pairs() -> pa.Table:
    """All ordered pairs, an item with itself too."""
    ids = items()["item_id"].to_pylist()
    rows = [
        {"pair_id": records.pair_id(a, b, "joint"), "item_a": a, "item_b": b, "protocol": "joint", "similarity": 0.0}
        | {"strategy": "random", "split": "train"}
        for a in ids
        for b in ids
    ]
    return pa.Table.from_pylist(rows, records.PAIRS)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_table_at_a_time_is_what_is_asked_one_by_one(noise: float) -> None:
    annotator = score_annotator("oracle", one_by_one(quality), noise=noise, tie_band=0.4, seed=3)
    one_by_one_rows = judge(comparisons_of(pairs(), items()), annotator)
    scores = Scores.of({records.item_id(*text): score(*text) for text in ITEMS})
    assert annotator.by_scores is not None
    found = judge_by_scores(pairs(), scores, annotator.by_scores)
    assert found.schema == records.JUDGMENTS
    assert found.to_pylist() == one_by_one_rows
    said = set(found["verdict"].to_pylist())
    assert said == {"a", "b", "tie", "invalid"}
    decided = preferences(pairs(), found)
    assert len(decided) == sum(row["verdict"] in ("a", "b") for row in one_by_one_rows)


def score(*text: str) -> float | str:
    try:
        return quality(*text)
    except ValueError as error:
        return str(error)


def test_an_item_without_an_entry_is_an_error() -> None:
    scores = Scores.of({"x": 1.0})
    annotator: Any = score_annotator("oracle", one_by_one(quality), noise=0.0, tie_band=0.0, seed=0)
    with pytest.raises(KeyError, match=r"[0-9a-f]{20}"):
        judge_by_scores(pairs(), scores, annotator.by_scores)
