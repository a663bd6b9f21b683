"""Every format by a fixture written for it, in every kind of file."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jpo_ray.config import Source
from jpo_ray.data.formats import Row
from jpo_ray.data.sources import SourceRows, parse_rows

from .reading import FRUIT, MEND, error_of, jsonl, read

FIXTURES = Path(__file__).parent / "fixtures"
SYSTEM_TURN = "system: Be brief.\n\nuser: Name a river."
TWO_TURNS = "user: Hello.\n\nassistant: Good day.\n\nuser: Name a tool."


def fixture(name: str) -> SourceRows:
    return read(FIXTURES / name)


def test_dove_rows_prefer_the_chosen_item_and_may_be_joint() -> None:
    path = FIXTURES / "dove.jsonl"
    source = read(path)
    assert source.rows == [
        Row(((FRUIT, "An apple."), (FRUIT, "A chair.")), "a", None, f"{path} line 1", "dove"),
        Row((("Name a river.", "The Nile."), ("Name a colour.", "Loud.")), "a", None, f"{path} line 2", "dove"),
    ]
    assert (source.name, source.format, source.skipped) == (str(path), "dove", {})
    assert source.files == [(str(path), hashlib.sha256(path.read_bytes()).hexdigest())]


def test_dove_raw_feedback_may_be_a_number_its_string_null_or_absent() -> None:
    source = fixture("dove_raw.jsonl")
    assert source.format == "dove_raw"
    assert [row.verdict for row in source.rows] == ["a", "b", "tie", None, None]
    assert source.rows[1].items == (("Name a tool.", "Rain."), ("Name a colour.", "Green."))


def test_dove_single_carries_gold_and_feedback_where_given() -> None:
    first, second = fixture("dove_single.jsonl").rows
    assert first.items == ((FRUIT, "An apple."), (FRUIT, "A chair."))
    assert (first.verdict, first.gold, first.kind) == ("a", "A ripe apple.", "dove_single")
    assert (second.verdict, second.gold) == (None, None)


def test_trl_preference_of_texts() -> None:
    (row,) = fixture("trl_text.jsonl").rows
    assert (row.items, row.verdict, row.kind) == (
        ((FRUIT, "An apple."), (FRUIT, "A chair.")),
        "a",
        "trl_preference",
    )


def test_trl_preference_of_conversations_in_every_mixture() -> None:
    assert [row.items for row in fixture("trl_conversation.jsonl").rows] == [
        ((FRUIT, "An apple."), (FRUIT, "A chair.")),
        ((SYSTEM_TURN, "The Nile."), (SYSTEM_TURN, "A stone.")),
        (("Name a tool.", "A saw."), ("Name a tool.", "Rain.")),  # the prompt repeated, as in UltraFeedback
        (("Name a bird.", "A crow."), ("Name a bird.", "A boat.")),
        (("Name a fish.", "A trout."), ("Name a fish.", "A shoe.")),
    ]


def test_trl_implicit_prompts_carry_joint_pairs() -> None:
    assert [row.items for row in fixture("trl_implicit.jsonl").rows] == [
        ((FRUIT, "An apple."), ("Name a river.", "A stone.")),
        ((TWO_TURNS, "A saw."), ("Name a tool.", "Rain.")),
    ]


def test_anthropic_strings_are_split_at_the_last_assistant_turn() -> None:
    source = fixture("hh.jsonl")
    other_turns = TWO_TURNS.replace("Good day.", "Go away.")
    assert source.format == "trl_preference"
    assert [row.items for row in source.rows] == [
        ((FRUIT, "An apple."), (FRUIT, "A chair.")),
        ((TWO_TURNS, "A saw.\n\nIt cuts."), (other_turns, "Rain.")),
    ]


def test_sft_skips_blank_lines_but_counts_them_in_places() -> None:
    source = fixture("sft.jsonl")
    assert [(row.items, row.verdict, row.gold) for row in source.rows] == [
        (((FRUIT, "An apple."),), None, None),
        ((("Name a river.", "The Nile."),), None, None),
    ]
    assert [row.where.rsplit("/", 1)[1] for row in source.rows] == ["sft.jsonl line 1", "sft.jsonl line 3"]


def test_messages_take_the_last_assistant_turn_and_no_empty_system_message() -> None:
    source = fixture("messages.jsonl")
    assert source.format == "messages"
    assert [row.items for row in source.rows] == [((FRUIT, "An apple."),), ((TWO_TURNS, "A saw."),)]


def test_gold_from_a_json_list_with_columns_of_no_concern() -> None:
    source = fixture("gold.json")
    assert [(row.items, row.gold) for row in source.rows] == [
        (((FRUIT, "An apple."),), "An apple."),
        ((("Name a river.", "The Nile."),), "The Nile."),
    ]
    assert source.rows[1].where.endswith("gold.json row 2")


def test_odd_characters_and_long_texts_stay_as_they_are(tmp_path: Path) -> None:
    texts = [row.items[0] for row in fixture("odd.jsonl").rows]
    assert texts == [
        ("Say it with 🍎🧑‍🚀 and é", "👍🏽 done"),
        ("ما اسم نهر طويل؟", "\u200fالنيل\u200e (Nile)"),
        ("  spaces\tand\x0bcontrol\x1f characters\u2028stay ", "\r\n as they \x7f stand \u0085\n"),
    ]
    long = "word " * 400_000
    path = jsonl(tmp_path, {"instruction": "long", "response": long})
    assert read(path).rows[0].items == (("long", long),)
    assert read(path, format="sft").rows[0].items[0][1] == long


@pytest.mark.parametrize("name", ["dove.jsonl", "dove_raw.jsonl", "trl_implicit.jsonl", "messages.jsonl", "odd.jsonl"])
def test_parquet_and_json_hold_the_same_rows(name: str, tmp_path: Path) -> None:
    lines = (FIXTURES / name).read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    for record in records:  # Parquet columns have one type
        record.update({"feedback": int(record["feedback"])} if record.get("feedback") is not None else {})
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(records))
    expected = [(row.items, row.verdict) for row in fixture(name).rows]
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.json"):
        rows = read(path).rows
        assert [(row.items, row.verdict) for row in rows] == expected
        assert [row.where for row in rows] == [f"{path} row {number}" for number in range(1, len(expected) + 1)]


def test_parquet_feedback_with_gaps_comes_as_floats(tmp_path: Path) -> None:
    row = {"instruction": FRUIT, "response_0": "An apple.", "response_1": "A chair."}
    table = pa.Table.from_pylist([{**row, "feedback": value} for value in (1.0, None, float("nan"), 2.0)])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [row.verdict for row in read(tmp_path / "rows.parquet").rows] == ["b", None, None, "tie"]


def test_renamed_columns_and_forced_formats(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path, {"question": FRUIT, "response": "not this", "gold_response": "A pear.", "answer": "An apple."}
    )
    columns = {"instruction": "question", "response": "answer"}
    assert read(path, format="sft", columns=columns).rows[0].items == ((FRUIT, "An apple."),)
    assert read(path, format="gold", columns=columns).rows[0].gold == "A pear."
    assert error_of(path, columns=columns).startswith(
        f"{path} line 1: columns found: gold_response, instruction, response; they fit gold and sft: set the source's"
    )
    assert error_of(path, columns={"instrction": "question"}).startswith(
        f"{path}: columns: `instrction` is none of choice, chosen, completions, feedback, gold_response, i_chosen,"
    )
    assert error_of(path, format="sft") == (
        f"{path} line 1: `instruction` is missing, format sft needs it; columns found: question, response, "
        f"gold_response, answer{MEND}"
    )


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"instruction": "1", "response": "1"}, {"instruction": "2", "response": "2"}, "{broken")
    assert [row.items[0][0] for row in read(path, limit=2).rows] == ["1", "2"]


def test_rows_that_come_from_no_file() -> None:
    single = {"instruction": FRUIT, "response_0": "An apple.", "response_1": "A chair."}
    source = parse_rows([("world train row 1", single)], Source(path="world"), "fail")
    assert source == SourceRows(
        "world",
        "dove_single",
        [Row(((FRUIT, "An apple."), (FRUIT, "A chair.")), None, None, "world train row 1", "dove_single")],
        {},
        [],
    )


def test_a_dataset_folder_is_loaded_by_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "own"
    folder.mkdir()
    for name, fruit in (("train", "An apple."), ("test", "A pear.")):
        jsonl(folder, {"instruction": FRUIT, "response": fruit}, name=f"{name}.jsonl")
    train, test, again = read(folder), read(folder, split="test"), read(folder, split="train")
    assert train.rows == [Row(((FRUIT, "An apple."),), None, None, f"{folder}[train] row 1", "sft")]
    assert test.rows[0].items == ((FRUIT, "A pear."),)
    assert train.files == again.files != test.files
    assert train.files[0][0] == f"{folder}[train]"
    assert len(train.files[0][1]) == 64
    message = error_of(folder, split="dev")
    assert message.startswith(
        f"{folder}: no Hugging Face dataset could be loaded, split dev (ValueError: Unknown split"
    )
