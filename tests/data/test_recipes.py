"""The sources of every recipe are read from small files of the same layout, through the `datasets` library, offline."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config import SANDBOX, RunConfig
from jpo_ray.config_experiment import load_experiment
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


# The authors' code: nothing stands between the colon and the answer.
PROMPTS = {
    "tldr": "### Instructions: You are given a social media post, summarize it accordingly. \nPost: {instruction}\n\n"
    "### Response:",
    "helpful": "### Instructions: {instruction}\n\n### Response:",
}


@pytest.mark.parametrize("kind", ["mistral7b", "released"])
@pytest.mark.parametrize("name", ["tldr", "helpful"])
def test_the_papers_prompts_pairs_and_samples(name: str, kind: str) -> None:
    config = load_config(CONFIGS / f"{name}_{kind}.yaml")
    model, sample = config.model, config.sample
    assert (model.template, model.response_prefix) == (PROMPTS[name], "")
    assert (model.max_length, model.dtype, model.load_in_4bit) == (1024, "bfloat16", True)
    assert config.pairs.conditional
    assert config.pairs.max_item_characters == 1024
    assert config.pairs.joint is not None
    assert config.pairs.joint.strategy == ("random" if kind == "mistral7b" else "labelled")
    assert config.pairs.joint.budget is None  # as many as D_S has items
    for entry in config.train:
        assert entry.lora_target_modules == ["q_proj", "k_proj", "v_proj"]
        assert (entry.optim, entry.weight_decay, entry.batching) == ("paged_adamw_32bit", 0.0, "pairs")
        assert entry.protocols == (["conditional", "joint"] if entry.name == "jpo" else ["conditional"])
    assert sample is not None
    assert (sample.split, sample.max_instructions, sample.max_new_tokens) == ("test", 500, 400)
    assert sample.temperatures == [0.001, 0.5, 1.0]
    assert config.evaluate is not None
    judge = config.evaluate.judge or config.judge
    assert (judge.annotator, judge.model, judge.temperature) == ("openai", "gpt-3.5-turbo-0125", None)


def test_appendix_e() -> None:
    """SFT on UltraChat-200k, joint pairs by proxy without new labels, temperature 0.7, three learning rates."""
    config = load_config(CONFIGS / "ultrafeedback_mistral7b.yaml")
    assert [(source.path, source.split) for source in config.items.sft] == [
        ("HuggingFaceH4/ultrachat_200k", "train_sft")
    ]
    assert [(source.path, source.split) for source in config.items.train] == [
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")
    ]
    assert config.pairs.joint is not None
    assert (config.pairs.conditional, config.pairs.joint.strategy, config.judge.annotator) == (True, "proxy", "labels")
    assert config.model.model_name_or_path == "mistralai/Mistral-7B-v0.1"
    assert config.model.template == "<|system|>\n</s>\n<|user|>\n{instruction}</s>\n<|assistant|>\n"  # Zephyr's
    assert (config.model.response_prefix, config.model.max_length) == ("", 2048)
    assert config.sample is not None
    assert (config.sample.temperatures, config.sample.max_instructions) == ([0.7], None)
    swept = load_experiment(CONFIGS / "experiments" / "ultrafeedback_lr.yaml", [])
    rates = [sorted(entry.learning_rate for entry in run.config.train) for run in swept.runs]
    assert rates == [[1e-7] * 3 + [3e-7] * 3 + [5e-7] * 3]


SOURCES = ("[paper]", "[code]", "[handbook]", "[ours]")
NUMBER = re.compile(r"(?:[:\[,{]) *-?\d[\d.]*(?:e-?\d+)?(?=[,\]} ]|$)")
COUNTED = {"one": 1, "two": 2, "three": 3, "four": 4, "eight": 8}


def unsourced(text: str) -> list[str]:
    """Lines of a config with a number whose source is neither beside it, nor in the comment above it, nor in that of
    its section, nor told by `as the next three`.
    """
    found = []
    above = section = ""
    told = 0
    for line in text.splitlines():
        code, _, comment = line.partition(" # ") if not line.lstrip().startswith("#") else ("", "", line)
        if not code.strip():
            above += comment
            continue
        said, above = above + comment, ""
        if not code.startswith(" "):
            section = said if code.rstrip().endswith(":") else ""
        if NUMBER.search(code) and not told and not any(source in said + section for source in SOURCES):
            found.append(code.strip())
        told = max(0, told - 1)
        if as_next := re.search(r"as the next(?: (\w+))?", said):
            told = COUNTED.get(as_next[1] or "one", 1)
    return found


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(("mistral7b", "released"))])
def test_every_number_of_the_papers_recipes_has_its_source(name: str) -> None:
    """docs/recipes.md says so."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert unsourced("seed:" + text.partition("\nseed:")[2]) == []
    for mark in ("[paper]", "[ours]"):
        assert mark in text.partition("\nseed:")[0]


def test_numbers_without_a_source_are_found() -> None:
    lines = ["seed: 0", "a: 1  # [ours], as the next two", "b: 2", "c: 3", "d: 4", "e:  # [paper]", "  f: 5"]
    text = "\n".join([*lines, "# [code] why", "g: [1, 2]", "h: {i: 6}"])
    assert unsourced(text) == ["seed: 0", "d: 4", "h: {i: 6}"]


def test_what_the_next_ones_share_is_counted_right() -> None:
    """Table 7 gives eight values after beta; the optimizer's 32 bits are the code's."""
    for name in ("tldr_mistral7b", "helpful_mistral7b", "tldr_released", "helpful_released"):
        lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
        (start,) = (number for number, line in enumerate(lines) if "[paper] Table 7, as the next eight" in line)
        keys = [line.split(":")[0].strip() for line in lines[start + 1 : start + 10]]
        assert keys == [
            "learning_rate", "num_train_epochs", "comparisons_per_step", "lr_scheduler_type", "warmup_steps",
            "lora_r", "lora_alpha", "lora_dropout", "optim",
        ]  # fmt: skip
        assert "optim: paged_adamw_32bit  # [code]" in lines[start + 9]
