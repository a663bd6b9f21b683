"""Ratings in the data decide every pair, conditional and joint, for nothing."""

import json
from pathlib import Path

import pytest

from jpo_ray import records
from jpo_ray.errors import InputError
from pipeline.inline import Cluster, run, small_config

ROOT = Path(__file__).parents[2]


def ultrafeedback(path: Path, *, rated: bool = True) -> Path:
    """6 instructions with 3 responses, rated 1 to 18; of the last instruction one is not rated."""
    with path.open("w") as file:
        for number in range(6):
            completions = [
                {"response": f"Reply {number}-{place}.", "overall_score": 1 + 3 * number + place if rated else None}
                for place in range(3)
            ]
            if number == 5:
                completions[2]["overall_score"] = None
            file.write(json.dumps({"instruction": f"Say {number}.", "completions": completions}) + "\n")
    return path


def test_ratings_decide_every_pair(tmp_path: Path, cluster: Cluster) -> None:
    config = small_config(
        items={"train": [{"path": str(ultrafeedback(tmp_path / "rated.jsonl"))}]},
        judge={"annotator": "ratings", "tie_band": 1.0}, sample=None, evaluate=None,
    )  # fmt: skip
    run(config, tmp_path / "run", ["items", "pairs", "judge"])
    pairs = records.read_table(tmp_path / "run" / "pairs" / "pairs.parquet", records.PAIRS).to_pylist()
    items = records.read_table(tmp_path / "run" / "items" / "items.parquet", records.ITEMS).to_pylist()
    judgments = records.read_table(tmp_path / "run" / "judge" / "judgments.parquet", records.JUDGMENTS).to_pylist()
    place = {item["item_id"]: [int(n) for n in item["response"][6:-1].split("-")] for item in items}
    rating = {item: 1 + 3 * number + reply for item, (number, reply) in place.items() if (number, reply) != (5, 2)}
    assert {pair["protocol"] for pair in pairs} == {"conditional", "joint"}
    assert len(judgments) == len(pairs) > 18
    for pair, row in zip(pairs, judgments, strict=True):
        a, b = rating.get(pair["item_a"]), rating.get(pair["item_b"])
        if a is None or b is None:
            assert (row["verdict"], row["reason"]) == ("invalid", "no rating")
        else:
            assert row["verdict"] == ("tie" if abs(a - b) <= 1 else "a" if a > b else "b")
            assert row["gap"] == a - b
    assert {row["annotator"] for row in judgments} == {"ratings"}
    preferences = records.read_table(
        tmp_path / "run" / "judge" / "preferences.parquet", records.PREFERENCES
    ).to_pylist()
    assert preferences
    assert all(row["gap"] == rating[row["chosen"]] - rating[row["rejected"]] > 1 for row in preferences)
    assert cluster.calls == ["embed", "tiles"]


def test_data_without_ratings_are_one_line(tmp_path: Path, cluster: Cluster) -> None:
    path = ultrafeedback(tmp_path / "bare.jsonl", rated=False)
    config = small_config(
        items={"train": [{"path": str(path)}]}, judge={"annotator": "ratings"}, sample=None, evaluate=None
    )
    with pytest.raises(InputError) as caught:
        run(config, tmp_path / "run", ["items", "pairs", "judge"])
    assert str(caught.value) == "judge.annotator: ratings: the data have none; docs/data.md names the columns"
    assert "`judge.annotator: ratings` reads them" in (ROOT / "docs" / "data.md").read_text()
    assert cluster.calls


def test_ratings_cannot_judge_samples(tmp_path: Path, cluster: Cluster) -> None:
    source = [{"path": str(ultrafeedback(tmp_path / "rated.jsonl"))}]
    config = small_config(items={"train": source, "test": source}, judge={"annotator": "ratings"})
    with pytest.raises(InputError, match="ready-made ratings cannot judge new samples"):
        run(config, tmp_path / "run")
    assert cluster.calls == []
