"""Which items are for what: fine-tuning data of their own, instructions that are too long, items that are."""

import json
from pathlib import Path
from typing import Any

import pytest

from jpo_ray import records
from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.pipeline.plan import make_plan
from pipeline.inline import JPO, Cluster, run, small_config

WORDS = ["sing", "run", "jump", "count to ten", "name a fruit", "say hello"]


def preferences(tmp_path: Path, rows: list[dict[str, str]] | None = None) -> str:
    path = tmp_path / "train.jsonl"
    rows = rows or [{"prompt": word, "chosen": f"good {word}", "rejected": f"bad {word}"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_for(path: str, items: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    sources: dict[str, Any] = {"train": [{"path": path}]} | (items or {})
    return small_config(items=sources, judge={"annotator": "labels"}, sample=None, evaluate=None, **sections)


def table(run_dir: Path, name: str, schema: Any) -> list[dict[str, Any]]:
    return records.read_table(run_dir / name, schema).to_pylist()


def test_fine_tuning_has_items_of_its_own_that_nothing_else_sees(tmp_path: Path, cluster: Cluster) -> None:
    path = tmp_path / "sft.jsonl"
    rows = [{"instruction": f"{word} loudly", "response": "no"} for word in WORDS[:4]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(preferences(tmp_path), {"sft": [{"path": str(path)}]})
    shown = run(config, tmp_path / "run", ["items", "pairs", "judge", "sft", "reference", "train"])
    assert "sft items 4, train instructions 6" in shown
    assert read_json(tmp_path / "run" / "sft" / "manifest.json")["counts"]["items"] == 4
    items = table(tmp_path / "run", "items/items.parquet", records.ITEMS)
    own = {row["item_id"] for row in items if row["split"] == "sft"}
    assert len(own) == 4
    pairs = table(tmp_path / "run", "pairs/pairs.parquet", records.PAIRS)
    assert not own & {row[side] for row in pairs for side in ("item_a", "item_b")}
    scored = table(tmp_path / "run", "reference/reference.parquet", records.REFERENCE)
    assert {row["item_id"] for row in scored} == {row["item_id"] for row in items} - own
    embedded = table(tmp_path / "run", "embeddings/embeddings.parquet", records.EMBEDDINGS)
    assert len(embedded) == 6
    assert cluster.calls[0] == "embed"


def test_longer_instructions_are_left_out_on_request(tmp_path: Path, cluster: Cluster) -> None:  # noqa: ARG001
    long = {"prompt": "sing " * 300, "chosen": "la", "rejected": "no"}
    rows = [{"prompt": word, "chosen": "yes", "rejected": "no"} for word in WORDS]
    path = preferences(tmp_path, [*rows, long])
    with pytest.raises(InputError, match=r"max_length=256 is shorter than an instruction"):
        run(config_for(path), tmp_path / "run", ["items", "sft"])
    config = config_for(path, {"max_instruction_tokens": 64})
    shown = run(config, tmp_path / "run", ["items", "sft"])
    assert "too long 1" in shown
    assert len(table(tmp_path / "run", "items/items.parquet", records.ITEMS)) == 2 * len(WORDS)
    with pytest.raises(InputError, match=r"leaves no room for a response in model\.max_length=256"):
        parse_config(config.model_dump() | {"items": config.items.model_dump() | {"max_instruction_tokens": 256}}, "x")


def test_longer_items_are_not_compared(tmp_path: Path, cluster: Cluster) -> None:  # noqa: ARG001
    """Template, prefix and both texts count: an item of just the limit is compared, one of a character more is not."""
    template = "Q: {instruction} A:"
    limit = len("Q: sing A:") + 1 + 10
    rows = [
        {"prompt": "sing", "chosen": "x" * 10, "rejected": "short"},
        {"prompt": "song", "chosen": "x" * 11, "rejected": "short"},
        {"prompt": "hymn", "chosen": "yes", "rejected": "no"},
    ]
    model = {"model_name_or_path": "sandbox", "max_length": 256, "template": template}
    pairs: dict[str, Any] = {"max_item_characters": limit}
    config = config_for(preferences(tmp_path, rows), pairs=pairs, model=model)
    run(config, tmp_path / "run", ["items", "pairs"])
    items = {row["item_id"]: row for row in table(tmp_path / "run", "items/items.parquet", records.ITEMS)}
    found = table(tmp_path / "run", "pairs/pairs.parquet", records.PAIRS)
    compared = {items[row[side]]["response"] for row in found for side in ("item_a", "item_b")}
    conditional = {items[row["item_a"]]["instruction"] for row in found if row["protocol"] == "conditional"}
    assert "x" * 11 not in compared
    assert conditional == {"sing", "hymn"}
    assert len(items) == 6


def test_the_reference_scores_what_may_be_compared(tmp_path: Path, cluster: Cluster) -> None:
    """And the plan counts that. Trainings, of KTO's mismatched items too, find all that they read. An item whose other
    response is too long is compared with nothing either.
    """
    rows = [
        {"prompt": word, "chosen": f"good {word}", "rejected": f"bad {word} {'x' * 60 * (word == 'run')}"}
        for word in WORDS
    ]
    path, kto = preferences(tmp_path, rows), JPO | {"name": "kto", "objective": "kto"}
    train, stages = [JPO, kto], ["items", "pairs", "judge", "sft", "reference", "train"]

    def limited(to: int | None) -> RunConfig:
        return config_for(path, pairs={"max_item_characters": to, "joint": None}, train=train)

    run(limited(90), tmp_path / "run", stages)
    items = {row["item_id"]: row["response"] for row in table(tmp_path / "run", "items/items.parquet", records.ITEMS)}
    scored = table(tmp_path / "run", "reference/reference.parquet", records.REFERENCE)
    compared = {identity for identity, response in items.items() if "run" not in response}
    assert len(items) == 12
    assert len(compared) == 10
    assert {row["item_id"] for row in scored} == compared
    long = next(identity for identity, response in items.items() if "xxx" in response)
    assert long not in {row["response_of"] for row in scored}
    counts = read_json(tmp_path / "run" / "reference" / "manifest.json")["counts"]
    [cost] = [cost for cost in make_plan(limited(90)).stages if cost.name == "reference"]
    assert cost.items == counts["items"] + counts["mismatched items"] == 20
    assert cost.tokens == pytest.approx(counts["tokens"], rel=0.1)
    assert "reference stands already" in run(limited(90), tmp_path / "run", ["reference"])
    run(limited(None), tmp_path / "run", stages)  # another limit, other rows
    scored = table(tmp_path / "run", "reference/reference.parquet", records.REFERENCE)
    assert {row["item_id"] for row in scored} == items.keys()
    assert cluster.calls.count("train-kto") == 2
    with pytest.raises(
        InputError, match=r"no decisive preferences to train on; check pairs, judge and train\.protocols"
    ):
        run(limited(5), tmp_path / "run", stages)


def test_the_reference_scores_what_trainings_read(tmp_path: Path, cluster: Cluster) -> None:
    """Test items and those that no training draws are not scored, nor is any beside another response but for KTO. An
    entry that reads less than others changes nothing; one that reads more has the rest scored, and KTO stays.
    """
    held_out = tmp_path / "held_out.jsonl"
    two = [{"prompt": f"count {what}", "chosen": "one", "rejected": "no"} for what in ("sheep", "stars")]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in two))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"instruction": "name a tree", "gold_response": "an oak"}) + "\n")
    path, stages = preferences(tmp_path), ["items", "pairs", "judge", "sft", "reference", "train"]
    few = JPO | {"protocols": ["conditional"], "max_train_comparisons": 2}
    jpo, kto = few | {"seed": 1}, few | {"name": "kto", "objective": "kto"}
    dpo, all_ = few | {"name": "dpo", "objective": "dpo"}, JPO | {"name": "all", "protocols": ["conditional"]}

    def scored(*train: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        items = {"validation": [{"path": str(held_out)}], "test": [{"path": str(test)}]}
        shown = run(config_for(path, items, pairs={"joint": None}, train=list(train)), tmp_path / "run", stages)
        return shown, table(tmp_path / "run", "reference/reference.parquet", records.REFERENCE)

    _, rows = scored(jpo, kto)
    items = {row["item_id"]: row for row in table(tmp_path / "run", "items/items.parquet", records.ITEMS)}
    own = [items[row["item_id"]] for row in rows if row["item_id"] == row["response_of"]]
    twins = [items[row["item_id"]] for row in rows if row["item_id"] != row["response_of"]]
    assert len(items) == 17
    assert [row["split"] for row in own].count("validation") == [row["split"] for row in twins].count("validation") == 4
    assert len(twins) == 2 * 2 + 4
    assert 2 * 2 + 4 <= len(own) <= 2 * 4 + 4
    assert "name a tree" not in {row["instruction"] for row in own}
    counts = read_json(tmp_path / "run" / "reference" / "manifest.json")["counts"]
    assert (counts["items"], counts["mismatched items"]) == (len(own), len(twins))
    cluster.calls.clear()
    assert "reference stands already" in scored(jpo, kto, dpo)[0]
    assert cluster.calls == ["train-dpo"]
    cluster.calls.clear()
    _, more = scored(jpo, kto, dpo, all_)
    assert cluster.calls == [f"score {16 - len(own)}", "train-all"]
    assert len(more) == 16 + len(twins)
