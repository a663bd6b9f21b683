"""Scoring several requests together, without a server."""

from pathlib import Path

import pytest
from engine.tiny import make_llama

from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.adapter_checks import WEIGHTS
from jpo_ray.serving.plan import begun, make_plan
from jpo_ray.serving.policies import FAILED, GONE, Policies
from jpo_ray.serving.scores import batch_size
from serving.served_run import make_adapter, make_run

pytest.importorskip("vllm")

ITEMS = [("Name a fruit.", "A pear."), ("Copy: one two", "one two")]


def policies_on(base: Path, tmp_path: Path) -> Policies:
    plan = make_plan(ServeConfig(run_dir=str(make_run(tmp_path / "run", base=base))), keys_required=False)
    plan = begun(plan, tmp_path / "state")
    return Policies(plan, plan.store(0.1), "cpu")


@pytest.fixture
def policies(llama: Path, tmp_path: Path) -> Policies:
    return policies_on(llama, tmp_path)


def test_an_adapter_removed_meanwhile_fails_its_own_request_alone(policies: Policies) -> None:
    asked = [("jpo", ITEMS), ("dpo.one", ITEMS[:1]), ("sft", ITEMS)]
    before = policies.score(asked)
    assert [len(scores) for scores in before] == [2, 1, 2]
    policies._store.remove("jpo")
    assert policies.score(asked) == [GONE, before[1], before[2]]
    assert policies.score([("jpo", ITEMS)]) == [GONE]
    again = Policies(policies._plan, policies._store, "cpu")  # a scorer that takes this one's place
    assert again.score(asked) == [GONE, before[1], before[2]]


def test_a_model_that_cannot_be_had_fails_its_own_requests_alone(policies: Policies, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "new", Path(policies._plan.base), seed=3)
    entry = policies._store.prepare("new", "new", [folder.parent])
    policies._store.add(entry)
    before = policies.score([("jpo", ITEMS)])
    (Path(entry.folder) / WEIGHTS).unlink()
    assert policies.score([("new", ITEMS), ("jpo", ITEMS)]) == [FAILED, *before]


def test_an_adapter_on_the_head_is_scored_whole_whatever_was_loaded_before(tmp_path: Path) -> None:
    policies = policies_on(make_llama(tmp_path / "untied", tied=False), tmp_path)
    folder = make_adapter(tmp_path / "head", tmp_path / "untied", seed=3, lora_target_modules=["q_proj", "lm_head"])
    policies._store.add(policies._store.prepare("head", "head", [folder.parent]))
    alone = Policies(policies._plan, policies._store, "cpu").score([("head", ITEMS)])
    jpo, head = policies.score([("jpo", ITEMS), ("head", ITEMS)])
    assert [head] == alone
    assert policies.score([("jpo", ITEMS)]) == [jpo]


def test_a_batch_is_as_large_as_its_items() -> None:
    first, second = ("jpo", ITEMS * 40), ("sft", ITEMS)
    assert batch_size([second, second, first]) == 84
    assert batch_size([first]) == 1  # alone it goes through whatever the limit is
