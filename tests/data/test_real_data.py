"""The authors' released validation files, where they are at hand: the numbers that the paper's data are known by."""

import os
from pathlib import Path

import pytest

from jpo_ray.config import Source
from jpo_ray.data.items import ItemTables, build_items
from jpo_ray.data.sources import read_source

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("JPO_REAL_DATA", REPOSITORY.parent / "shared" / "data")) / "dove"


@pytest.fixture(scope="module")
def tables() -> ItemTables:
    helpful = FOLDER / "anthropic_helpful"
    if not helpful.is_dir():
        pytest.skip(f"no real data at {FOLDER}; set JPO_REAL_DATA to a folder that holds dove/anthropic_helpful")
    names = {"train": ["val_conditional_pref.jsonl", "val_sft.jsonl"], "test": ["test.jsonl"]}
    sources = {
        split: [read_source(Source(path=str(helpful / name)), "fail") for name in files]
        for split, files in names.items()
    }
    assert [source.format for source in (*sources["train"], *sources["test"])] == ["dove", "sft", "gold"]
    return build_items(sources, seed=0)


def test_the_released_preferences_and_sft_responses_make_d_and_d_s(tables: ItemTables) -> None:
    counts = tables.counts
    assert (counts["train_instructions"], counts["train_sft"]) == (500, 500)
    assert (counts["conditional_labels"], counts["joint_labels"], counts["tie_labels"]) == (363, 0, 0)
    assert counts["train_items"] == 2 * 363 + 137  # 363 of the 500 SFT responses are one of the two compared
    assert (counts["merged"], counts["repeated"], counts["contradictory"]) == (363, 0, 0)


def test_d_s_holds_the_chosen_response_of_177_and_the_rejected_one_of_186(tables: ItemTables) -> None:
    members = {row["item_id"] for row in tables.items.to_pylist() if row["sft"]}
    labels = tables.labels.to_pylist()
    assert {label["verdict"] for label in labels} == {"a"}
    assert sum(label["item_a"] in members for label in labels) == 177
    assert sum(label["item_b"] in members for label in labels) == 186


def test_every_test_instruction_has_its_gold_response(tables: ItemTables) -> None:
    counts = tables.counts
    assert (counts["test_instructions"], counts["test_gold"], counts["test_without_gold"]) == (500, 500, 0)
    assert (counts["leaked"], counts["test_items"]) == (0, 500)


def test_the_summaries_are_read_by_their_columns() -> None:
    path = FOLDER / "tldr" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"no real data at {path}; set JPO_REAL_DATA")
    source = read_source(Source(path=str(path)), "fail")
    assert (source.format, len(source.rows), source.skipped) == ("gold", 250, {})
