"""The sources of every recipe are read from small files of the same layout, through the `datasets` library, offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config import SANDBOX, RunConfig
from jpo_ray.config_file import load_config
from jpo_ray.data.items import ItemTables, build_items
from jpo_ray.data.sources import is_remote, read_source
from jpo_ray.pipeline.item_stage import split_sources

from .hub import all_folders, here

datasets = pytest.importorskip("datasets")

CONFIGS = Path(__file__).parents[2] / "configs"


def is_recipe(path: Path) -> bool:
    sources = load_config(path).items.train
    return any(is_remote(source) and source.path != SANDBOX for source in sources)


RECIPES = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if is_recipe(path)]
OBJECTIVES = {"jpo", "dpo", "kto"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return all_folders(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def tables_of(config: RunConfig, folders: dict[str, Path]) -> ItemTables:
    rows: dict[str, Sequence[Any]] = {
        split: [read_source(here(source, folders), config.items.on_bad_rows) for source in sources]
        for split, sources in split_sources(config.items).items()
    }
    return build_items(rows, config.seed)


def test_there_are_recipes() -> None:
    assert {f"{name}_mistral7b" for name in ("tldr", "helpful", "ultrafeedback")} <= set(RECIPES)
    assert {"tldr_released", "helpful_released"} <= set(RECIPES)
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("name", RECIPES)
def test_its_sources_give_items_to_compare_and_to_sample(name: str, folders: dict[str, Path]) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    counts = tables_of(config, folders).counts
    assert counts["train_instructions"] >= 3
    assert counts["test_gold"] == counts["test_instructions"] > 0
    assert counts["sft_items" if config.items.sft else "train_sft"] > 0
    if config.judge.annotator == "labels":
        assert counts["conditional_labels"] > 0
        assert counts["joint_labels"] > 0 or config.pairs.joint.strategy == "proxy"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_jpo_beside_dpo_and_kto(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert {entry.objective for entry in config.train} == OBJECTIVES
    assert config.train_entry("jpo").protocols == ["conditional", "joint"]
    assert config.evaluate is not None
    assert config.evaluate.judge is None or config.evaluate.judge.annotator != "labels"
    assert None not in (config.plan.train_instructions, config.plan.instruction_tokens, config.plan.response_tokens)


def test_the_papers_numbers(folders: dict[str, Path]) -> None:
    """Table 7 and section 6; the released data hold one conditional pair and one D_S response per instruction."""
    for name, rate, batch, epochs in (("tldr", 2e-5, 12, 10), ("helpful", 1.5e-6, 6, 5)):
        config = load_config(CONFIGS / f"{name}_mistral7b.yaml")
        assert config.sft is not None
        assert (config.sft.learning_rate, config.sft.items_per_step, config.sft.num_train_epochs) == (rate, batch, 3)
        assert config.model.load_in_4bit
        for entry in (*config.train, *load_config(CONFIGS / f"{name}_released.yaml").train):
            assert (entry.num_train_epochs, entry.learning_rate, entry.beta) == (epochs, 5e-5, 0.1)
            assert (entry.comparisons_per_step, entry.warmup_steps, entry.lr_scheduler_type) == (32, 100, "cosine")
            assert (entry.lora_r, entry.lora_alpha, entry.lora_dropout) == (8, 16, 0.05)
        released = tables_of(load_config(CONFIGS / f"{name}_released.yaml"), folders).counts
        assert (released["train_instructions"], released["train_sft"]) == (4, 4)
        assert (released["conditional_labels"], released["joint_labels"]) == (6, 6 if name == "tldr" else 3)
    config = load_config(CONFIGS / "ultrafeedback_mistral7b.yaml")
    for entry in config.train:
        assert (entry.beta, entry.num_train_epochs, entry.use_peft) == (0.01, 1, False)
