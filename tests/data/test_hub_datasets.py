"""The datasets that the recipes name: small ones of the same layout and columns, through the `datasets` library."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.data.items import build_items
from jpo_ray.data.sources import SourceRows

from .hub import comparison, feedback_row, hub_folder, parquet
from .reading import error_of, read

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def items_of(source: SourceRows) -> Sequence[Any]:
    return [row.items for row in source.rows]


def test_summarize_from_feedback(tmp_path: Path) -> None:
    """Its `comparisons` as the Hub's own conversion to Parquet has them; validation has articles among its posts."""
    folder = tmp_path / "summarize_from_feedback" / "comparisons"
    parquet(
        folder / "train" / "0000.parquet",
        [comparison("A long post.", " Short.", " Shorter.", choice=1), comparison("Another.", " One.", " Two.")],
    )
    parquet(
        folder / "validation" / "0000.parquet", [comparison(None, " A.", " B."), comparison("Third.", " C.", " D.")]
    )
    train = read(folder.parent, data_dir="comparisons")
    assert train.format == "summarize"
    assert items_of(train)[0] == (("A long post.", "Short."), ("A long post.", "Shorter."))
    assert [row.verdict for row in train.rows] == ["b", "a"]
    test = read(folder.parent, "skip", data_dir="comparisons", split="validation")
    assert (len(test.rows), test.skipped) == (1, {"no `info.post`": 1})
    tables = build_items({"train": [train], "test": [test]}, 0)
    assert (tables.counts["train_items"], tables.counts["test_gold"]) == (4, 1)
    assert "row 1: `info.post` is empty" in error_of(folder.parent, data_dir="comparisons", split="validation")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choice": 2}, "`choice` is 2, not 0 or 1"),
        ({"choice": True}, "`choice` is True, not 0 or 1"),
        ({"summaries": [{"text": "one"}]}, "not a list of two objects"),
        ({"summaries": [{"text": "one"}, {"text": " "}]}, "empty `text`"),
        ({"info": "a post"}, "`info` is 'a post', not an object"),
    ],
)
def test_rows_of_it_that_cannot_be_used(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(comparison("A post.", " One.", " Two.") | change))
    assert said in error_of(path)


def test_hh_rlhf_helpful_base_single_turn(tmp_path: Path) -> None:
    folder = tmp_path / "hh-rlhf" / "helpful-base"
    folder.mkdir(parents=True)
    one = {
        "chosen": "\n\nHuman: Name a fruit.\n\nAssistant: An apple.",
        "rejected": "\n\nHuman: Name a fruit.\n\nAssistant: No.",
    }
    more = "\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Name a tool.\n\nAssistant: "
    lines = [one, {"chosen": more + "A saw.", "rejected": more + "Rain."}]
    for split in ("train", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    source = read(folder.parent, data_dir="helpful-base", single_turn=True)
    assert items_of(source) == [(("Name a fruit.", "An apple."), ("Name a fruit.", "No."))]
    assert (source.format, source.skipped) == ("trl_preference", {"more than one turn": 1})
    assert len(read(folder.parent, data_dir="helpful-base", split="test").rows) == 2
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(lines[1]))
    assert error_of(only, single_turn=True) == f"{only}: has no conversation of one turn"


def test_ultrafeedback_binarized(tmp_path: Path) -> None:
    """`messages` repeats the chosen conversation, and the scores become ratings."""
    row = feedback_row("Name a fruit.")
    folder = hub_folder(
        tmp_path / "ultrafeedback_binarized", {"train_prefs": [row], "test_prefs": [row], "train_sft": [row]}
    )
    source = read(folder, split="train_prefs")
    assert source.format == "trl_preference"
    assert items_of(source) == [(("Name a fruit.", "An apple."), ("Name a fruit.", "No."))]
    assert (source.rows[0].verdict, source.rows[0].ratings) == ("a", (8.5, 3.0))


def test_ultrachat_200k(tmp_path: Path) -> None:
    turns = ["Hello.", "Hi.", "Name a tool.", "A saw."]
    messages = [{"content": text, "role": ("user", "assistant")[place % 2]} for place, text in enumerate(turns)]
    rows = [
        {"prompt": "Hello.", "prompt_id": "u1", "messages": messages},
        {"prompt": "Hello.", "prompt_id": "u2", "messages": messages[:2]},
    ]
    folder = hub_folder(tmp_path / "ultrachat_200k", {"train_sft": rows, "test_sft": rows})
    source = read(folder, split="train_sft")
    assert source.format == "messages"
    assert items_of(source) == [
        (("user: Hello.\n\nassistant: Hi.\n\nuser: Name a tool.", "A saw."),),
        (("Hello.", "Hi."),),
    ]
    assert len(read(folder, split="train_sft", single_turn=True).rows) == 1


def test_alpaca_eval(tmp_path: Path) -> None:
    """A list in a file of a repository that also has a loading script, so the file is named."""
    path = tmp_path / "alpaca_eval_gpt4_baseline.json"
    rows = [{"dataset": "koala", "instruction": "Name a fruit.", "output": "An apple.", "generator": "gpt4"}]
    path.write_text(json.dumps(rows))
    source = read("json", data_files=str(path), format="gold", columns={"gold_response": "output"})
    assert source.rows[0].gold == "An apple."
    assert source.files[0][0] == f"json/{path}[train]"


def test_the_authors_released_data(tmp_path: Path) -> None:
    """Files of one repository, of which some are lines under the name `.json`."""
    folder = tmp_path / "sft_and_pref_data" / "data" / "tldr"
    folder.mkdir(parents=True)
    pair = {"i_chosen": "Post one.", "r_chosen": "Good.", "i_reject": "Post two.", "r_reject": "Bad."}
    files: dict[str, list[dict[str, str]]] = {
        "train_joint_pref.json": [pair, pair | {"i_chosen": "Post three."}],
        "train_sft.jsonl": [{"instruction": "Post one.", "response": "Good."}],
        "test.json": [
            {"instruction_id": "t3_1", "subreddit": "tifu", "title": "T", "instruction": "P", "gold_response": "G"}
        ],
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = folder.parent.parent
    assert [read(root, data_files=f"data/tldr/{name}").format for name in files] == ["dove", "sft", "gold"]
    assert len(read(root, data_files="data/tldr/train_joint_pref.json").rows) == 2
