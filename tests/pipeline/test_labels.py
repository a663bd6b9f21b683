"""Ready-made labels of joint comparisons reach the preferences, and nothing is made up beside them."""

import json
from pathlib import Path

import pytest

from jpo_ray import records, shards
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.pipeline.context import StaleArtifact
from pipeline.inline import Cluster, run, small_config

COUNT = 8


@pytest.fixture
def joint_file(tmp_path: Path) -> Path:
    """8 labelled comparisons, each of an instruction with the next one's."""
    rows = [
        {
            "i_chosen": f"Say the number {n}.", "r_chosen": f"The number is {n}.",
            "i_reject": f"Say the number {n + 1} loudly.", "r_reject": f"No, I will not say {n + 1}.",
        }
        for n in range(COUNT)
    ]  # fmt: skip
    path = tmp_path / "joint.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_joint_labels_become_preferences(joint_file: Path, tmp_path: Path, cluster: Cluster) -> None:
    config = small_config(
        items={"train": [{"path": str(joint_file)}]}, judge={"annotator": "labels"}, sample=None, evaluate=None
    )
    run(config, tmp_path / "run", ["items", "pairs", "judge"])
    items = records.read_table(tmp_path / "run" / "items" / "items.parquet", records.ITEMS).to_pylist()
    text_of = {item["item_id"]: item["response"] for item in items}
    pairs = records.read_table(tmp_path / "run" / "pairs" / "pairs.parquet", records.PAIRS)
    assert pairs["strategy"].to_pylist().count("labelled") == COUNT
    assert len(set(pairs["pair_id"].to_pylist())) == pairs.num_rows
    found = records.read_table(tmp_path / "run" / "judge" / "preferences.parquet", records.PREFERENCES).to_pylist()
    assert sorted((text_of[row["chosen"]], text_of[row["rejected"]]) for row in found) == sorted(
        (f"The number is {n}.", f"No, I will not say {n + 1}.") for n in range(COUNT)
    )
    assert {row["protocol"] for row in found} == {"joint"}
    assert cluster.calls == ["embed", "tiles"]


def test_joint_pairs_that_no_label_decides_are_warned_about(tmp_path: Path, cluster: Cluster) -> None:
    rows = [
        {"instruction": f"Say {n}.", "response_0": f"It is {n}.", "response_1": f"No {n}.", "feedback": 0}
        for n in range(COUNT)
    ]
    path = tmp_path / "conditional.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for strategy, warned in (("random", True), ("proxy", False)):
        config = small_config(
            items={"train": [{"path": str(path)}]}, pairs={"joint": {"strategy": strategy}},
            judge={"annotator": "labels"}, sample=None, evaluate=None,
        )  # fmt: skip
        run(config, tmp_path / strategy, ["items", "pairs", "judge"])
        counts = read_json(tmp_path / strategy / "judge" / "manifest.json")["counts"]
        assert ("no joint pair has a verdict" in counts.get("warning", "")) == warned
    assert cluster.calls == ["embed", "tiles"] * 2


def test_proxy_pairs_within_groups_where_labels_tie(tmp_path: Path, cluster: Cluster) -> None:
    """A tied instruction has neither a chosen nor a rejected item, so both sides have fewer items than instructions."""
    rows = [
        {"instruction": f"Say {n}.", "response_0": f"It is {n}.", "response_1": f"No {n}.", "feedback": 2 * (n == 0)}
        for n in range(COUNT)
    ]
    path = tmp_path / "ties.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(
        items={"train": [{"path": str(path)}]}, pairs={"joint": {"strategy": "proxy", "group_size": 4, "budget": 10}},
        judge={"annotator": "labels"}, sample=None, evaluate=None,
    )  # fmt: skip
    run(config, tmp_path / "run", ["items", "pairs"])
    pairs = records.read_table(tmp_path / "run" / "pairs" / "pairs.parquet", records.PAIRS).to_pylist()
    assert [row["protocol"] for row in pairs].count("conditional") == COUNT
    items = records.read_table(tmp_path / "run" / "items" / "items.parquet", records.ITEMS).to_pylist()
    text_of = {item["item_id"]: item["response"] for item in items}
    joint = [[text_of[row[end]] for end in ("item_a", "item_b")] for row in pairs if row["protocol"] == "joint"]
    assert len(joint) == 10
    assert {"It is 0.", "No 0."}.isdisjoint(text for pair in joint for text in pair)
    assert all(sum(text.startswith("No") for text in pair) == 1 for pair in joint)
    assert cluster.calls == ["embed", "tiles"]


@pytest.mark.parametrize("joint", [{}, {"max_per_item": 15}, {"group_size": 8, "budget": 56}])
def test_labelled_pairs_that_are_also_chosen_are_in_one_shard_once(
    joint: dict[str, int], joint_file: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 120 pairs of 16 items, or all 28 in each of two groups, in shards of about 20; 8 of them have labels."""
    monkeypatch.setattr(shards, "ROWS", 20)
    config = small_config(
        items={"train": [{"path": str(joint_file)}]}, pairs={"joint": {"budget": 120} | joint},
        judge={"annotator": "labels"}, sample=None, evaluate=None,
    )  # fmt: skip
    run(config, tmp_path / "run", ["items", "pairs"])
    assert "shards" in cluster.calls
    assert len(shards.files_of(tmp_path / "run" / "pairs" / "pairs.parquet")) > 1
    pairs = records.read_table(tmp_path / "run" / "pairs" / "pairs.parquet", records.PAIRS)
    assert len(set(pairs["pair_id"].to_pylist())) == len(pairs)
    assert pairs["strategy"].to_pylist().count("labelled") == COUNT
    if "group_size" not in joint:
        assert len(pairs) == 120


def test_labels_cannot_judge_samples(joint_file: Path, tmp_path: Path, cluster: Cluster) -> None:
    source = [{"path": str(joint_file)}]
    config = small_config(items={"train": source, "test": source}, judge={"annotator": "labels"})
    with pytest.raises(InputError, match="ready-made labels cannot judge new samples; set evaluate: null"):
        run(config, tmp_path / "run")
    assert cluster.calls == []


def test_nothing_to_sample_is_found_before_any_stage(joint_file: Path, tmp_path: Path, cluster: Cluster) -> None:
    config = small_config(items={"train": [{"path": str(joint_file)}]})
    with pytest.raises(InputError, match=r"no instructions to sample; give items\.test, or set sample: null"):
        run(config, tmp_path / "run")
    assert cluster.calls == []


def test_a_report_does_not_mix_configs(run_dir: Path, cluster: Cluster) -> None:
    """A stage made with another config is named instead of shown beside the rest."""
    with pytest.raises(StaleArtifact, match="`items` was made with another config"):
        run(small_config(seed=7), run_dir, ["report"])
    assert cluster.calls == []


def test_a_kto_entry_leaves_the_other_adapters_alone(run_dir: Path, cluster: Cluster) -> None:
    jpo, dpo = (entry.model_dump() for entry in small_config().train)
    kto = dpo | {"name": "kto", "objective": "kto", "steps_like": None}
    run(small_config(train=[jpo, dpo, kto]), run_dir, ["reference", "train"])
    assert [call.split()[0] for call in cluster.calls] == ["score", "train-kto"]
    reference = records.read_table(run_dir / "reference" / "reference.parquet", records.REFERENCE)
    items = records.read_table(run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()
    split_of = {item["item_id"]: item["split"] for item in items}
    for item, response_of in zip(reference["item_id"].to_pylist(), reference["response_of"].to_pylist(), strict=True):
        assert split_of[item] == split_of[response_of]
