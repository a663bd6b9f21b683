"""The recipes whose labels come with the data, through the stages that read, pair and judge; and their plan."""

from pathlib import Path

import pytest
from data.hub import all_folders, here

from jpo_ray.config import RunConfig
from jpo_ray.config_file import load_config
from jpo_ray.files import read_json
from jpo_ray.pipeline.plan import make_plan
from pipeline.inline import Cluster, run

CONFIGS = Path(__file__).parents[2] / "configs"
LABELLED = [
    "tldr_released", "helpful_released", "ultrafeedback_mistral7b", "helpful_smollm2_135m", "tldr_qwen25_05b",
    "ultrafeedback_qwen3_06b",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return all_folders(tmp_path_factory.mktemp("hub"))


def small(name: str, folders: dict[str, Path]) -> RunConfig:
    """The recipe with small data, and the sandbox's model for its tokenizer."""
    config = load_config(CONFIGS / f"{name}.yaml", ["model.model_name_or_path=sandbox"])
    splits = {
        split: [here(source, folders) for source in getattr(config.items, split)]
        for split in ("train", "validation", "test", "sft")
    }
    return config.model_copy(update={"items": config.items.model_copy(update=splits)})


@pytest.mark.parametrize("name", LABELLED)
def test_its_labels_become_preferences_as_planned(
    name: str, folders: dict[str, Path], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    config = small(name, folders)
    plan = make_plan(config)
    run(config, tmp_path / "run", ["items", "pairs", "judge"])
    items, pairs, judged = (
        read_json(tmp_path / "run" / stage / "manifest.json")["counts"] for stage in ("items", "pairs", "judge")
    )
    assert "embed" in cluster.calls
    for split, found in plan.counts.splits.items():
        assert (found.instructions, found.items) == (items[f"{split}_instructions"], items[f"{split}_items"])
        for protocol, planned in (("conditional", found.conditional), ("joint", found.joint)):
            assert planned == pairs.get(f"{split} {protocol}", 0)
    assert plan.counts.fine_tuning == items["sft_items" if config.items.sft else "train_sft"]
    of_validation = pairs.get("validation conditional", 0) + pairs.get("validation joint", 0)
    train = sum(count or 0 for count in plan.counts.preferences.values())
    assert train > 0
    assert train <= judged["preferences"] <= train + of_validation
