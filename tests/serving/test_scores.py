"""Scores are training's log-ratios times beta; comparisons are sigmoids of their differences."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpo_ray.cluster.policy import PolicyReader
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.sandbox import make_rows
from jpo_ray.serving.rewards import compared, scored, sigmoid
from serving.endpoint import Endpoint
from serving.served_run import BETAS, LAYOUT

ROWS = make_rows("test", 12, 0)
ITEMS = [(row["instruction"], row["gold_response"] if "gold_response" in row else row["response"]) for row in ROWS]


def log_ratios(run: Path, name: str) -> Any:
    """What training computes: float[items, 2], in nats."""
    tokens = tokenize(load_tokenizer(run / "sft"), LAYOUT, [i for i, _ in ITEMS], [r for _, r in ITEMS])
    reader = PolicyReader(str(run / "sft"), "float32", False, "log_ratio", "cpu", 1)
    return reader.read(run / "train" / name, tokens, range(len(ITEMS)))


@pytest.mark.ray
@pytest.mark.vllm
def test_scores_equal_the_log_ratios_of_training(endpoint: Endpoint) -> None:
    body = {"items": [{"instruction": i, "response": r} for i, r in ITEMS]}
    with endpoint.http() as client:
        for name, beta in BETAS.items():
            data = client.post("/v1/score", json=body | {"model": name}).json()["data"]
            found = np.array([[entry["instruction"], entry["response"]] for entry in data])
            expected = beta * log_ratios(endpoint.run_dir, name)
            assert np.abs(expected).max() > 0.05
            np.testing.assert_allclose(found, expected, atol=2e-4)
            assert [entry["score"] for entry in data] == pytest.approx(found.sum(axis=1).tolist())
            assert [entry["index"] for entry in data] == list(range(len(ITEMS)))
        reference = client.post("/v1/score", json=body | {"model": "sft"}).json()["data"]
        assert all(entry["score"] == 0 for entry in reference)
        assert client.post("/v1/score", json=body | {"model": "gone"}).status_code == 404
        many = {"model": "jpo", "items": body["items"] * 6}
        assert client.post("/v1/score", json=many).status_code == 422


@pytest.mark.ray
@pytest.mark.vllm
def test_comparisons_are_sigmoids_of_the_difference(endpoint: Endpoint) -> None:
    (i, r), (j, s) = ITEMS[0], ITEMS[1]
    pairs = [
        {"a": {"instruction": i, "response": r}, "b": {"instruction": j, "response": s}},
        {"a": {"instruction": i, "response": r}, "b": {"instruction": i, "response": s}},
    ]
    with endpoint.http() as client:
        items = [pairs[0]["a"], pairs[0]["b"], pairs[1]["b"]]
        first, second, third = client.post("/v1/score", json={"model": "jpo", "items": items}).json()["data"]
        joint, same = client.post("/v1/compare", json={"model": "jpo", "pairs": pairs}).json()["data"]
    assert joint["margin"] == pytest.approx(first["score"] - second["score"], abs=1e-5)
    assert joint["probability"] == pytest.approx(1 / (1 + math.exp(-joint["margin"])))
    assert not joint["same_instruction"]
    assert same["instruction_margin"] == 0
    assert same["margin"] == pytest.approx(first["response"] - third["response"], abs=1e-5)


def test_a_comparison_by_hand() -> None:
    a = {"instruction": 0.5, "response": 1.0, "beta": 0.1}
    b = {"instruction": -0.5, "response": 0.25, "beta": 0.1}
    different, same = compared([a, b, a, b], [False, True])
    assert (different["margin"], different["probability"]) == (1.75, pytest.approx(0.8519528))
    assert (same["margin"], same["probability"]) == (0.75, pytest.approx(0.6791787))
    assert [entry["score"] for entry in scored([a, b])] == [1.5, -0.25]


def test_sigmoid_of_large_margins() -> None:
    assert (sigmoid(800.0), sigmoid(-800.0), sigmoid(0.0)) == (1.0, 0.0, 0.5)
