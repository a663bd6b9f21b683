"""A finished run whose models are also scored on held-out preferences and on their own samples."""

from pathlib import Path

import pytest

from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from pipeline.inline import JPO, LIMITS, Cluster, run, small_config


def test_policies_are_scored(run_dir: Path, cluster: Cluster) -> None:
    sample = {"engine": "transformers", "temperatures": [0.7, 1.0], "max_new_tokens": 16}
    run(small_config(sample=sample, evaluate={"policies": True}), run_dir)
    found = read_json(run_dir / "policies" / "policies.json")
    assert list(found) == ["jpo", "dpo", "sft"]
    state = read_json(run_dir / "train" / "jpo" / "trainer_state.json")
    (last,) = [entry for entry in state["log_history"] if "eval_loss" in entry][-1:]
    jpo = found["jpo"]
    # What the loop measured at the end on the same held-out comparisons, over all of them.
    both = jpo["accuracy_conditional"] * jpo["conditional"] + jpo["accuracy_joint"] * jpo["joint"]
    assert both / (jpo["conditional"] + jpo["joint"]) == pytest.approx(last["eval_rewards/accuracies"], abs=1e-6)
    assert jpo["reference_ranking_accuracy"] == found["dpo"]["reference_ranking_accuracy"]
    assert jpo["kl_samples"] == 6
    assert set(found["sft"]) == {"characters", "words", "distinct_1", "distinct_2"}
    assert "What training did to the policies" in (run_dir / "report" / "index.html").read_text()
    assert cluster.calls[-1] == "evaluate: log_ratio of 2"


def test_nothing_to_score_is_one_line(run_dir: Path, cluster: Cluster) -> None:
    items = {split: [{"path": "sandbox", "limit": LIMITS[split]}] for split in ("train", "test")}
    config = small_config(items=items, evaluate={"policies": True})
    with pytest.raises(InputError, match=r"evaluate.policies: neither held-out preferences .* nor samples"):
        run(config, run_dir)
    assert "train-jpo" in cluster.calls


@pytest.mark.usefixtures("cluster")
def test_without_held_out_items_own_samples_are_scored(run_dir: Path) -> None:
    """The only training compares with no reference, so that one has nothing to score."""
    items = {split: [{"path": "sandbox", "limit": LIMITS[split]}] for split in ("train", "test")}
    sample = {"engine": "transformers", "temperatures": [1.0], "max_new_tokens": 16}
    train = [JPO | {"name": "simpo", "objective": "simpo", "protocols": ["conditional"]}]
    run(small_config(items=items, train=train, sample=sample, evaluate={"policies": True}), run_dir)
    assert read_json(run_dir / "reference" / "manifest.json")["counts"] == {"items": 0}
    found = read_json(run_dir / "policies" / "policies.json")
    assert found["simpo"]["kl_samples"] == 6
    assert found["simpo"]["conditional"] == found["simpo"]["joint"] == 0
    assert "What training did to the policies" in (run_dir / "report" / "index.html").read_text()
