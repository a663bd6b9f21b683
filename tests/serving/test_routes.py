"""Scores and comparisons up to the scorer, on a catalogue that would score anything."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from jpo_ray.config_serve import ServeConfig
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.serving.catalogue import Catalogue, UnknownModel
from jpo_ray.serving.plan import begun, make_plan
from jpo_ray.serving.policies import FAILED, GONE
from jpo_ray.serving.prompts import Prompts
from jpo_ray.serving.routes import Routes
from serving.malformed import ITEM
from serving.served_run import LAYOUT

LONG = {"instruction": "i", "response": "word " * 900}


class Scores:
    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []

    async def score(self, model: str, items: list[tuple[str, str]]) -> list[dict[str, Any]]:
        if model != "jpo":
            raise UnknownModel(model)
        self.asked.append(items)
        return [{"instruction": 0.0, "response": float(len(response)), "beta": 1.0} for _, response in items]


@pytest.fixture
def prompts(llama: Path) -> Prompts:
    return Prompts(load_tokenizer(llama), LAYOUT, 64, vocabulary=10**6)


def posted(prompts: Prompts, catalogue: Any, path: str, body: dict[str, Any]) -> httpx.Response:
    async def post() -> httpx.Response:
        app = Routes(ServeConfig(), catalogue, prompts, None).app()  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post(path, json=body)

    return asyncio.run(post())


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/score", {"items": [ITEM, LONG]}, "items.1"),
        ("/v1/score", {"items": [{**LONG, "response": "word " * 9000}]}, "items.0"),
        ("/v1/compare", {"pairs": [{"a": ITEM, "b": ITEM}, {"a": ITEM, "b": LONG}]}, "pairs.1.b"),
    ],
)
def test_items_that_are_too_long_never_reach_the_scorer(
    prompts: Prompts, path: str, body: dict[str, Any], field: str
) -> None:
    scores = Scores()
    reply = posted(prompts, scores, path, {"model": "jpo", **body})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, field)
    assert reply.json()["error"]["message"].startswith(f"{field}: ")
    assert scores.asked == []


def test_pairs_are_scored_a_before_b(prompts: Prompts) -> None:
    scores = Scores()
    pair = {"a": {"instruction": "i", "response": "long"}, "b": {"instruction": "i", "response": "r"}}
    reply = posted(prompts, scores, "/v1/compare", {"model": "jpo", "pairs": [pair]})
    assert reply.json()["data"][0]["margin"] == 3
    assert scores.asked == [[("i", "long"), ("i", "r")]]


def test_a_model_that_is_gone_is_a_404(prompts: Prompts) -> None:
    assert posted(prompts, Scores(), "/v1/score", {"model": "gone", "items": [ITEM]}).status_code == 404


class Catalogued:
    """A scorer that gives what it was made with, as a deployment's handle."""

    def __init__(self, scores: Any) -> None:
        self.score = self
        self._scores = scores

    async def remote(self, *_: Any) -> Any:
        if isinstance(self._scores, Exception):
            raise self._scores
        return self._scores


NAN_SCORES = [{"instruction": 0.0, "response": float("nan"), "beta": 1.0}]


@pytest.mark.parametrize(
    ("scores", "status", "message"),
    [
        (GONE, 404, "there is no model `sft`"),
        (FAILED, 500, "this model cannot be scored; the server's log has the reason"),
        (NAN_SCORES, 422, "the log-probabilities under this model are no finite numbers"),
        (BackPressureError(9, 8), 429, "too many requests are under way; try again"),
        (DeploymentUnavailableError(DeploymentID("Scorer")), 503, "not ready; try again"),
    ],
)
def test_scores_that_cannot_be_had(
    served_run: Path, tmp_path: Path, prompts: Prompts, scores: Any, status: int, message: str
) -> None:
    plan = begun(make_plan(ServeConfig(run_dir=str(served_run)), keys_required=False), tmp_path / "state")
    catalogue = Catalogue(plan, {}, plan.store(0.1), None, None, Catalogued(scores))  # type: ignore[arg-type]
    reply = posted(prompts, catalogue, "/v1/score", {"model": "sft", "items": [ITEM]})
    assert reply.status_code == status
    assert reply.json()["error"]["message"].startswith(message)
    assert reply.headers.get("retry-after") == ("1" if status in (429, 503) else None)
