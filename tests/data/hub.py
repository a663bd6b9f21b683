"""Small data sets of the layout and columns of those on the Hugging Face Hub that the recipes name."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jpo_ray.config import Source

INFO = pa.struct([(name, pa.string()) for name in ("id", "post", "title", "subreddit", "site", "article")])


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if "info" in table.column_names:  # columns that are empty in one file must have the type of the other's
        table = table.set_column(0, "info", pa.array([row["info"] for row in rows], INFO))
    pq.write_table(table, path)


def comparison(post: str | None, *texts: str, choice: int = 0) -> dict[str, Any]:
    """A row of openai/summarize_from_feedback, `comparisons`; without a post one about an article."""
    info = {"id": "t3_1", "post": post, "title": "A title", "subreddit": "tifu", "site": None, "article": None}
    summaries = [{"text": text, "policy": "sup4", "note": "fine"} for text in texts]
    known = {"worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": 8}}
    return {"info": info | ({} if post else {"article": "News."}), "summaries": summaries, "choice": choice, **known}


def summaries_folder(folder: Path) -> Path:
    """As the Hub's own conversion to Parquet lays it out; validation has articles among its posts."""
    rows = [comparison(f"A long post, number {n}.", f" Short {n}.", f" Shorter {n}.", choice=n % 2) for n in range(6)]
    parquet(folder / "comparisons" / "train" / "0000.parquet", [*rows, rows[0]])
    held_out = [comparison(None, " A.", " B."), *(comparison(f"Unseen {n}.", " C.", " D.") for n in range(3))]
    parquet(folder / "comparisons" / "validation" / "0000.parquet", held_out)
    return folder


def helpful_folder(folder: Path) -> Path:
    """Anthropic/hh-rlhf: gzipped lines in a folder per part, conversations of one turn and of more."""
    more = "\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Name a tool.\n\nAssistant: "
    for split, count in (("train", 5), ("test", 3)):
        rows = [
            {
                "chosen": f"\n\nHuman: Name {split} fruit {n}.\n\nAssistant: An apple.",
                "rejected": f"\n\nHuman: Name {split} fruit {n}.\n\nAssistant: No.",
            }
            for n in range(count)
        ]
        rows.append({"chosen": more + "A saw.", "rejected": more + "Rain."})
        for part in ("helpful-base", "harmless-base"):
            path = folder / part / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def feedback_row(question: str) -> dict[str, Any]:
    """Of ultrafeedback_binarized: `messages` repeats the chosen conversation."""
    turns = [{"content": question, "role": "user"}, {"content": "An apple.", "role": "assistant"}]
    return {
        "prompt": question,
        "prompt_id": question,
        "chosen": turns,
        "rejected": [turns[0], {"content": "No.", "role": "assistant"}],
        "messages": turns,
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }


def chat_row(identity: str, turns: int) -> dict[str, Any]:
    """Of ultrachat_200k: a conversation of so many messages."""
    texts = ["Hello.", "Hi.", "Name a tool.", "A saw."][:turns]
    messages = [{"content": text, "role": ("user", "assistant")[place % 2]} for place, text in enumerate(texts)]
    return {"prompt": texts[0], "prompt_id": identity, "messages": messages}


def hub_folder(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """As `push_to_hub` lays it out: Parquet files and a card that says which are of which split."""
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, rows in splits.items():
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
        card += [f"  - split: {split}", f"    path: data/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def alpaca_file(path: Path) -> Path:
    """A list in one file; its `generator` and `dataset` are left aside."""
    row = {"dataset": "koala", "instruction": "Name a fruit.", "output": "An apple.", "generator": "gpt4_1106_preview"}
    path.write_text(json.dumps([row, row | {"instruction": "Name a tool.", "output": "A saw."}]))
    return path


def released_folder(folder: Path) -> Path:
    """jointpreferences/sft_and_pref_data: lines, of which the files on TL;DR have the name `.json`."""
    for name, suffix in (("tldr", "json"), ("anthropic_helpful", "jsonl")):
        here = folder / "data" / name
        here.mkdir(parents=True)
        for split in ("train", "val"):
            texts = [f"{name} {split} {n}" for n in range(4)]
            same = [{"i_chosen": t, "r_chosen": "Good.", "i_reject": t, "r_reject": "Bad."} for t in texts[:3]]
            other = [
                {"i_chosen": a, "r_chosen": "Good.", "i_reject": b, "r_reject": "Good."} for a, b in pairwise(texts)
            ]
            lines(here / f"{split}_conditional_pref.{suffix}", same)
            lines(here / f"{split}_sft.jsonl", [{"instruction": text, "response": "Good."} for text in texts])
            if (split, name) != ("val", "anthropic_helpful"):  # the one that was not released
                lines(here / f"{split}_joint_pref.{suffix}", other)
        test = {"instruction": f"{name} unseen", "gold_response": "Gold."}
        more = {"instruction_id": "t3_1", "subreddit": "tifu", "title": "T"} if name == "tldr" else {}
        lines(here / f"test.{suffix}", [more | test])
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_folders(root: Path) -> dict[str, Path]:
    """A small one of each data set that a recipe names, by its id."""
    root.mkdir(parents=True, exist_ok=True)
    questions, held_out = ([feedback_row(f"Name {what} {n}.") for n in range(4)] for what in ("fruit", "tree"))
    chats = [chat_row("u1", 4), chat_row("u2", 2)]
    return {
        "openai/summarize_from_feedback": summaries_folder(root / "summaries"),
        "Anthropic/hh-rlhf": helpful_folder(root / "hh"),
        "HuggingFaceH4/ultrafeedback_binarized": hub_folder(
            root / "feedback", {"train_prefs": questions, "test_prefs": held_out}
        ),
        "HuggingFaceH4/ultrachat_200k": hub_folder(root / "chat", {"train_sft": chats, "test_sft": chats}),
        "jointpreferences/sft_and_pref_data": released_folder(root / "released"),
        "json": alpaca_file(root / "alpaca_eval_gpt4_baseline.json"),
    }


def here(source: Source, folders: dict[str, Path]) -> Source:
    """The source, read from the small copy instead of the Hub."""
    if source.path not in folders:
        return source
    place = str(folders[source.path])
    if source.path == "json":
        assert isinstance(source.data_files, str)
        assert source.data_files.startswith("hf://datasets/")
        return source.model_copy(update={"data_files": place})
    return source.model_copy(update={"path": place, "revision": None})
