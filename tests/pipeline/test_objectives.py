"""Objectives in the pipeline: what each needs of other stages, and what it does without."""

from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config_objective import OBJECTIVES
from jpo_ray.errors import InputError
from jpo_ray.runs import read_json
from pipeline.inline import JPO, Cluster, run, small_config


def entry(objective: str, **keys: Any) -> dict[str, Any]:
    common = {key: value for key, value in JPO.items() if key not in ("name", "objective", "beta")}
    alone = {"protocols": ["conditional"]} if OBJECTIVES[objective].conditional_only else {}
    return common | alone | {"name": f"my-{objective}", "objective": objective} | keys


def test_objectives_train_beside_each_other(run_dir: Path, cluster: Cluster) -> None:
    """Of another run's artifacts: scores of the sandbox's judge, embeddings, whole lists, mixtures, a curriculum.

    Mismatched items alone are scored under the reference, for KTO; the rest is in the cache.
    """
    cluster.calls.clear()
    entries = [
        entry("odpo"), entry("rpo"), entry("lipo"), entry("kto"),
        entry("jpo", also=[{"objective": "sft", "weight": 0.2}], curriculum={"phases": 2}),
    ]  # fmt: skip
    run(small_config(train=entries), run_dir, ["reference", "train"])
    scored, *trained = cluster.calls
    assert scored.startswith("score 1")
    assert trained == [f"train-my-{name}" for name in ("odpo", "rpo", "lipo", "kto", "jpo")]
    for made in entries:
        state = read_json(run_dir / "train" / made["name"] / "trainer_state.json")
        assert state["global_step"] > 1
        assert [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    assert "loss/sft" in state["log_history"][0]
    assert "eval_loss/sft" in state["log_history"][-1]


def test_without_a_comparing_objective_there_is_no_reference_pass(tmp_path: Path, cluster: Cluster) -> None:
    """A whole run from nothing: no stage scores items under the reference, and none asks for it."""
    config = small_config(train=[entry("simpo"), entry("pro", also=[{"objective": "sft"}])])
    run(config, tmp_path / "run")
    assert not [call for call in cluster.calls if call.startswith("score")]
    assert not (tmp_path / "run" / "reference").exists()
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_an_objective_that_compares_asks_for_the_reference(tmp_path: Path, cluster: Cluster) -> None:
    config = small_config(train=[entry("orpo"), entry("ipo")])
    run(config, tmp_path / "run", ["items", "pairs", "judge", "sft"])
    with pytest.raises(InputError, match="run `jpo reference` first"):
        run(config, tmp_path / "run", ["train"])
    assert cluster.calls[-1] == "sft"
