"""Every way in which a source can be wrong: the error names file, line and key, or the row is skipped and counted."""

import json
from pathlib import Path

import pytest

from .reading import FRUIT, MEND, error_of, jsonl, read

SFT = {"instruction": FRUIT, "response": "An apple."}
SINGLE = {"instruction": FRUIT, "response_0": "An apple.", "response_1": "A chair."}
USER = {"role": "user", "content": FRUIT}
BAD_ROWS: list[tuple[object, object, str, str]] = [  # good row, bad row, message after "file line 2: ", reason
    (SFT, '{"instruction": "a", "response"', "broken JSON (Expecting ':' delimiter, column 32)", "broken JSON"),
    (SFT, '{"n": ' + "9" * 5000 + "}", "broken JSON (Exceeds the limit (4300 digits)", "broken JSON"),
    (SFT, "[" * 200_000, "broken JSON (", "broken JSON"),
    (SFT, '["a", "b"]', "the row is ['a', 'b'], not an object of columns", "not an object"),
    (SFT, {"instruction": FRUIT}, "missing `response`", "missing `response`"),
    (SFT, {**SFT, "response": 7}, "`response` is 7, not text", "`response` is not text"),
    (SFT, {**SFT, "instruction": None}, "`instruction` is None, not text", "`instruction` is not text"),
    (SFT, {**SFT, "instruction": ""}, "empty `instruction`", "empty `instruction`"),
    (SFT, {**SFT, "response": " \n\t\u00a0"}, "empty `response`", "empty `response`"),
    (SFT, '{"instruction": "a", "response": "\\ud83d"}', "`response` is not Unicode", "`response` is not Unicode"),
    (SINGLE, {**SINGLE, "feedback": 3}, "`feedback` is 3, not 0 (first better), 1", "bad `feedback`"),
    (SINGLE, {**SINGLE, "feedback": True}, "`feedback` is True, not 0", "bad `feedback`"),
    (SINGLE, {**SINGLE, "feedback": "a"}, "`feedback` is 'a', not 0", "bad `feedback`"),
    (SINGLE, {**SINGLE, "feedback": 0.5}, "`feedback` is 0.5, not 0", "bad `feedback`"),
    (SINGLE, {**SINGLE, "gold_response": " "}, "empty `gold_response`", "empty `gold_response`"),
    ({"messages": [USER, {"role": "assistant", "content": "An apple."}]}, {"messages": "hi"},
     "`messages` is 'hi', not a list of messages", "bad `messages`"),
    ({"messages": [USER, {"role": "assistant", "content": "An apple."}]}, {"messages": [USER, "hi"]},
     "`messages` holds 'hi', not {role, content}", "bad `messages`"),
    ({"messages": [USER, {"role": "assistant", "content": "An apple."}]}, {"messages": [USER]},
     "`messages` has no assistant message that answers another one", "bad `messages`"),
    ({"messages": [USER, {"role": "assistant", "content": "An apple."}]}, {"messages": []},
     "`messages` has no assistant message that answers another one", "bad `messages`"),
    ({"messages": [USER, {"role": "assistant", "content": "An apple."}]},
     {"messages": [USER, {"role": "assistant", "content": [1]}]},
     "`messages.content` is [1], not text", "`messages.content` is not text"),
    ({"prompt": FRUIT, "chosen": "An apple.", "rejected": "A chair."},
     {"prompt": FRUIT, "chosen": "An apple.", "rejected": ""}, "empty `rejected`", "empty `rejected`"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
     "empty `rejected response`", "empty `rejected response`"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     {"chosen": "only a text", "rejected": "\n\nHuman: a\n\nAssistant: b"},
     "`chosen` has no assistant message that answers another one", "bad `chosen`"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "message", "reason"), BAD_ROWS, ids=[case[2][:40] for case in BAD_ROWS])
def test_bad_rows_fail_by_name_or_are_skipped_and_counted(
    good: object, bad: object, message: str, reason: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path, good, bad, bad, good)
    error = error_of(path)
    assert error.startswith(f"{path} line 2: {message}")
    assert error.endswith(MEND)
    source = read(path, on_bad_rows="skip")
    assert source.skipped == {reason: 2}
    assert [row.where for row in source.rows] == [f"{path} line 1", f"{path} line 4"]


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    line = json.dumps(SFT).encode() + b"\n"
    path.write_bytes(line + b'{"instruction": "caf\xe9", "response": "x"}\n')
    assert error_of(path) == f"{path} line 2: not UTF-8 text (byte 0xe9){MEND}"
    assert read(path, on_bad_rows="skip").skipped == {"not UTF-8": 1}
    as_list = tmp_path / "latin.json"
    as_list.write_bytes(b'[\n{"instruction":\n "caf\xe9"}]')
    assert error_of(as_list) == f"{as_list} line 3: not UTF-8 text (byte 0xe9){MEND}"


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(SFT).encode())
    assert read(path).rows[0].items == ((FRUIT, "An apple."),)


@pytest.mark.parametrize("column", ["id", "instruction_id", "row_id"])
def test_an_id_must_not_repeat(column: str, tmp_path: Path) -> None:
    rows = [{**SFT, column: value} for value in ("x", 7, None, None, "y", "x")]
    path = jsonl(tmp_path, *rows)
    assert error_of(path) == f"{path} line 6: `{column}` 'x' stands already at {path} line 1{MEND}"
    skipped = read(path, on_bad_rows="skip")
    assert (len(skipped.rows), skipped.skipped) == (5, {f"repeated `{column}`": 1})


def test_files_without_a_usable_row_are_refused(tmp_path: Path) -> None:
    empty = jsonl(tmp_path, name="empty.jsonl")
    assert error_of(empty) == f"{empty}: has no rows"
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    assert error_of(nothing) == f"{nothing}: has no rows"
    bad = jsonl(tmp_path, {**SFT, "response": ""})
    assert error_of(bad, on_bad_rows="skip") == f"no usable row: {bad} line 1: empty `response`{MEND}"


def test_json_that_is_no_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"instruction": "a"}\n')
    assert error_of(path).startswith(f"{path}: the file holds {{'instruction': 'a'}}, not a list of objects")
    path.write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    assert error_of(path) == f"{path} line 2: broken JSON (Extra data, column 1){MEND}"
    path.write_text("[1]")
    assert error_of(path) == f"{path} row 1: the row is 1, not an object of columns{MEND}"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet at all")
    assert error_of(path).startswith(f"{path}: cannot be read as .parquet (")
    other = tmp_path / "rows.csv"
    other.write_text("instruction,response\n")
    assert error_of(other) == (
        f"{other}: suffix `.csv` is not known; name it .jsonl, .ndjson, .json, .parquet by what it holds"
    )


@pytest.mark.parametrize(
    "path", ["absent.jsonl", "data/absent.parquet", "./absent", "/nowhere/at/all", "~/absent", "a/b/c", "tests/absent"]
)
def test_a_file_that_is_not_there_is_named(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert error_of(path) == f"{path}: no such file (nor a Hugging Face dataset id)"


def test_unknown_columns_name_those_found_and_the_formats_known(tmp_path: Path) -> None:
    message = error_of(jsonl(tmp_path, {"text": "x", "label": 1}))
    assert f"{tmp_path / 'rows.jsonl'} line 1: columns found: text, label; formats known: dove (i_chosen," in message
    assert "sft (instruction, response); rename with the source's `columns`" in message


def test_an_absent_dataset_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    message = error_of("nobody/nothing")
    assert message.startswith("nobody/nothing: no Hugging Face dataset could be loaded, split train (")
    assert message.endswith(
        "check the id, the source's `name`, `split`, `data_dir` and `data_files`, the network and HF_TOKEN"
    )


def test_a_renamed_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"instruction": FRUIT, "response_0": "Pear.", "response_1": "No.", "label": 0})
    said = error_of(path, columns={"feedback": "labl"})
    assert said == f"{path}: columns: no row has a column `labl`; check the source's `columns`"
    assert read(path, columns={"feedback": "label"}).rows[0].verdict == "a"
