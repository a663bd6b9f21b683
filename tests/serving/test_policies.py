"""Scoring several requests together, without a server."""

from pathlib import Path

import pytest

from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.plan import begun, make_plan
from jpo_ray.serving.policies import Policies
from jpo_ray.serving.scores import batch_size
from serving.served_run import make_run

pytest.importorskip("vllm")

ITEMS = [("Name a fruit.", "A pear."), ("Copy: one two", "one two")]


@pytest.fixture
def policies(llama: Path, tmp_path: Path) -> Policies:
    plan = make_plan(ServeConfig(run_dir=str(make_run(tmp_path / "run", base=llama))), keys_required=False)
    plan = begun(plan, tmp_path / "state")
    return Policies(plan, plan.store(0.1), "cpu")


def test_an_adapter_removed_meanwhile_fails_its_own_request_alone(policies: Policies) -> None:
    asked = [("jpo", ITEMS), ("dpo.one", ITEMS[:1]), ("sft", ITEMS)]
    before = policies.score(asked)
    assert [len(scores or []) for scores in before] == [2, 1, 2]
    policies._store.remove("jpo")
    assert policies.score(asked) == [None, before[1], before[2]]
    assert policies.score([("jpo", ITEMS)]) == [None]


def test_a_batch_is_as_large_as_its_items() -> None:
    first, second = ("jpo", ITEMS * 40), ("sft", ITEMS)
    assert batch_size([second, second, first]) == 84
    assert batch_size([first]) == 1  # alone it goes through whatever the limit is
