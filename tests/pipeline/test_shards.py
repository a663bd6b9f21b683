"""Many comparisons are kept in shards, from pairs to training; few are one file. Both say the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jpo_ray import records, shards
from jpo_ray.config_training import TrainConfig
from jpo_ray.errors import InputError
from jpo_ray.evaluation.run_facts import funnel, joint_similarities
from jpo_ray.files import read_json
from jpo_ray.pipeline.model_stages import _steps_of
from jpo_ray.runs import RunDir
from pipeline.inline import JPO, LIMITS, Cluster, run, small_config

TABLES = {
    "pairs/pairs.parquet": (records.PAIRS, "pair_id"),
    "judge/judgments.parquet": (records.JUDGMENTS, "pair_id"),
    "judge/preferences.parquet": (records.PREFERENCES, "chosen"),
}


def config(**joint: Any) -> Any:
    budget = {"budget": 400, "validation_budget": 20} | joint
    return small_config(pairs={"joint": budget}, train=[JPO], sample=None, evaluate=None)


def table(run_dir: Path, name: str) -> pa.Table:
    """In an order of its own, since shards have another."""
    found = records.read_table(run_dir / name, TABLES[name][0])
    keys = [(key, "ascending") for key in ("pair_id", "chosen", "rejected") if key in found.column_names]
    return found.take(pc.sort_indices(found, sort_keys=keys))


@pytest.mark.parametrize("joint", [{}, {"max_per_item": 20}, {"group_size": 24}, {"strategy": "similar"}])
def test_shards_hold_what_one_file_holds(
    joint: dict[str, Any], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """448 training pairs in shards of about 100: 6 tiles of 3 blocks, or 5 of groups; 20 and 12 held out in one."""
    stages = ["items", "pairs", "judge"]
    run(config(**joint), tmp_path / "one", stages)
    assert "shards" not in cluster.calls
    monkeypatch.setattr(shards, "ROWS", 100)
    run(config(**joint), tmp_path / "many", stages)
    assert "shards" in cluster.calls
    for name in TABLES:
        path = tmp_path / "many" / name
        assert (tmp_path / "one" / name).is_file()
        assert len(shards.files_of(path)) == (6 if "group_size" in joint else 7)
        assert table(tmp_path / "many", name).equals(table(tmp_path / "one", name))
    one, many = (read_json(tmp_path / name / "judge" / "manifest.json")["counts"] for name in ("one", "many"))
    assert one == many
    pairs = [read_json(tmp_path / name / "pairs" / "manifest.json")["counts"] for name in ("one", "many")]
    assert pairs[0] == pairs[1] == {
        "train conditional": 48, "train joint": 400, "validation conditional": 12, "validation joint": 20,
    }  # fmt: skip
    facts = [RunDir(tmp_path / name) for name in ("one", "many")]
    standing = [{name: each.manifest(name) for name in ("items", "pairs", "judge")} for each in facts]
    assert funnel(facts[0], standing[0]) == funnel(facts[1], standing[1])  # type: ignore[arg-type]
    assert sorted(joint_similarities(facts[0], standing[0])) == sorted(joint_similarities(facts[1], standing[1]))  # type: ignore[arg-type]


@pytest.mark.parametrize("joint", [{}, {"max_per_item": 20}])
def test_one_file_of_many_pairs_is_made_in_tasks(
    joint: dict[str, Any], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver holds no more than a few; the files are those of a small run, to the byte but for rows' order."""
    stages = ["items", "pairs", "judge"]
    run(config(**joint), tmp_path / "few", stages)
    monkeypatch.setattr(shards, "FEW", 100)
    run(config(**joint), tmp_path / "many", stages)
    assert cluster.calls[-2:] == ["tiles", "shards"]
    for name in TABLES:
        assert (tmp_path / "many" / name).is_file()
        assert table(tmp_path / "many", name).equals(table(tmp_path / "few", name))
    for stage in ("pairs", "judge"):
        few, many = (read_json(tmp_path / name / stage / "manifest.json")["counts"] for name in ("few", "many"))
        assert few == many


def test_a_shard_has_items_of_two_blocks_and_its_share_of_conditional_pairs(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS", 100)
    run(config(), tmp_path, ["items", "pairs"])
    assert cluster.calls.count("embed") == 1
    *training, held_out = shards.files_of(tmp_path / "pairs" / "pairs.parquet")
    sizes, conditional = [], []
    for file in training:
        kinds = shards.kinds_of(file)
        assert {split for split, _ in kinds} == {"train"}
        sizes.append(sum(kinds.values()))
        conditional.append(kinds["train", "conditional"])
        items = shards.distinct_values([file], ["item_a", "item_b"])
        assert len(items) <= 2 * (2 * LIMITS["train"] // 3 + 2)
    assert (sum(sizes), sum(conditional)) == (448, 48)
    assert sum(1 for count in conditional if count) >= 5
    assert {split for split, _ in shards.kinds_of(held_out)} == {"validation"}


def test_a_run_in_shards_trains_and_closes_its_graph(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS", 100)
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    sections = config().model_dump()
    judge = {"annotator": "sandbox", "noise": 0.05, "tie_band": 0.05}
    judge |= {"closure": {"per_item": 2, "min_probability": 0.6}, "also": [judge | {"name": "second", "noise": 0.3}]}
    whole = small_config(pairs=sections["pairs"], train=[JPO], judge=judge, sample=None, evaluate=None)
    run(whole, tmp_path / "run", ["items", "pairs", "judge", "sft", "reference", "train"])
    counts = {name: read_json(tmp_path / "run" / name / "manifest.json")["counts"] for name in ("judge", "train/jpo")}
    assert counts["judge"]["implied"] > 0
    assert set(counts["judge"]["annotators"]) == {"sandbox", "second"}
    judgments = records.read_table(tmp_path / "run" / "judge" / "judgments.parquet", records.JUDGMENTS)
    assert judgments["annotator"].value_counts().to_pylist() == [
        {"values": "sandbox", "counts": 480}, {"values": "second", "counts": 480},
    ]  # fmt: skip
    kinds = shards.kinds_of_all(shards.files_of(tmp_path / "run" / "judge" / "preferences.parquet"))
    trained = kinds["train", "conditional"] + kinds["train", "joint"]
    assert counts["train/jpo"]["comparisons"] == trained
    sizes = [shards.kinds_of(file) for file in shards.files_of(tmp_path / "run" / "judge" / "preferences.parquet")]
    steps = sum(-(-(one["train", "conditional"] + one["train", "joint"]) // 16) for one in sizes)
    assert counts["train/jpo"]["steps"] == steps > trained / 16
    assert cluster.calls[-1] == "train-jpo"


def test_steps_like_another_entry_of_shards(tmp_path: Path) -> None:
    """Shards of 5, 0 and 7 training comparisons: batches of 4 are 2 + 2 and not ceil(12 / 4); 5 of them are 2 + 3."""
    for number, sizes in enumerate(((5, 2), (0, 3), (7, 0))):
        kinds = [split for split, size in zip(("train", "validation"), sizes, strict=True) for _ in range(size)]
        rows = [
            {"chosen": "a", "rejected": "b", "protocol": "joint", "weight": 1.0, "probability": 1.0, "split": split}
            for split in kinds
        ]
        path = shards.shard_path(tmp_path / "preferences.parquet", shards.numbered_name(number))
        shards.write_shard(path, pa.Table.from_pylist(rows, records.PREFERENCES), records.PREFERENCES)
    context: Any = SimpleNamespace(path=lambda _: tmp_path)

    def steps(**options: Any) -> int:
        return _steps_of(context, TrainConfig(comparisons_per_step=4, **options))

    assert steps(num_train_epochs=3) == 12
    assert steps(num_train_epochs=0.5) == 2
    assert steps(num_train_epochs=1, max_train_comparisons=5) == 2
    with pytest.raises(InputError, match="no decisive conditional preferences to train on"):
        steps(protocols=["conditional"])
