"""The reference cache: what is a hit, what is a miss, and that nobody reads half a part."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.tiny import LAYOUT, World
from jpo_ray.cache import key_folder
from jpo_ray.data.tokens import Layout, TokenizedItems
from jpo_ray.engine.reference import append_cache, missing_rows, read_cache, reference_key

ROWS = [("s1", -1.5, -2.25), ("s2", -3.0, -0.125)]
SAME: dict[str, Any] = {
    "weights": "w", "tokenizer": "t", "layout": LAYOUT, "dtype": "float32", "load_in_4bit": False,
}  # fmt: skip


def test_rows_come_back_to_the_last_bit(tmp_path: Path) -> None:
    key = reference_key(**SAME)
    assert read_cache(tmp_path, key) == {}
    append_cache(tmp_path, key, ROWS)
    append_cache(tmp_path, key, [("s3", -1 / 3, -1e-17)])
    assert read_cache(tmp_path, key) == {"s1": (-1.5, -2.25), "s2": (-3.0, -0.125), "s3": (-1 / 3, -1e-17)}


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "other"},
        {"tokenizer": "other"},
        {"layout": Layout("Q: {instruction}\nA:", LAYOUT.response_prefix, LAYOUT.max_length)},
        {"layout": Layout(LAYOUT.template, "", LAYOUT.max_length)},
        {"layout": Layout(LAYOUT.template, LAYOUT.response_prefix, LAYOUT.max_length + 1)},
        {"dtype": "bfloat16"},
        {"load_in_4bit": True},
    ],
    ids=["weights", "tokenizer", "template", "response_prefix", "max_length", "dtype", "4-bit"],
)
def test_whatever_decides_a_logprob_is_a_miss(changed: dict[str, Any], tmp_path: Path) -> None:
    append_cache(tmp_path, reference_key(**SAME), ROWS)
    assert read_cache(tmp_path, reference_key(**(SAME | changed))) == {}
    assert len(read_cache(tmp_path, reference_key(**SAME))) == 2


def test_nothing_else_is_in_the_key(tmp_path: Path) -> None:
    """Neither loss nor beta, pairs or output path: whoever asks with the same model, tokens and layout has a hit."""
    assert set(reference_key(**SAME)) == {
        "format", "weights", "quantisation", "dtype", "tokenizer", "layout", "scored"
    }  # fmt: skip
    assert set(reference_key(**SAME)["layout"]) == {"template", "response_prefix", "max_length"}
    folders = [key_folder(tmp_path, "reference", reference_key(**SAME)) for _ in range(2)]
    assert folders[0] == folders[1]


def test_one_changed_token_is_a_miss(world: World) -> None:
    tokens = world.tokens
    cached = {tokens.sequence_id(row): (0.0, 0.0) for row in range(len(tokens))}
    assert missing_rows(tokens, cached).tolist() == []
    ids = tokens.ids.copy()
    ids[tokens.offsets[7] + 12] += 1
    changed = TokenizedItems(ids, tokens.offsets, tokens.prompt_lengths, 0)
    assert missing_rows(changed, cached).tolist() == [7]
    moved = tokens.prompt_lengths.copy()
    moved[9] -= 1
    boundary = TokenizedItems(tokens.ids, tokens.offsets, moved, 0)
    assert missing_rows(boundary, cached).tolist() == [9]


def test_equal_sequences_are_scored_once() -> None:
    """Rows 0, 2 and 3 hold the same ids; row 3 with another boundary is another thing to score."""
    tokens = TokenizedItems(
        np.array([1, 5, 6, 1, 5, 7, 1, 5, 6, 1, 5, 6], np.int32), np.array([0, 3, 6, 9, 12]), np.array([2, 2, 2, 1]), 0
    )
    assert missing_rows(tokens, {}).tolist() == [0, 1, 3]
    assert missing_rows(tokens, {tokens.sequence_id(2): (0.0, 0.0)}).tolist() == [1, 3]


def test_a_part_that_was_not_finished_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies within a part leaves a file that no reader opens; the parts before it stand."""
    key = reference_key(**SAME)
    append_cache(tmp_path, key, ROWS)

    def die(_table: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"PAR1 half of it")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", die)
    with pytest.raises(OSError, match="disk full"):
        append_cache(tmp_path, key, [("s3", 0.0, 0.0)])
    monkeypatch.undo()
    assert set(read_cache(tmp_path, key)) == {"s1", "s2"}
    append_cache(tmp_path, key, [("s3", -1.0, -1.0)])
    assert set(read_cache(tmp_path, key)) == {"s1", "s2", "s3"}


def test_the_folder_says_what_its_key_is(tmp_path: Path) -> None:
    key = reference_key(**SAME)
    append_cache(tmp_path, key, ROWS)
    assert (key_folder(tmp_path, "reference", key) / "key.json").read_text().count('"weights": "w"') == 1
    assert key_folder(tmp_path, "reference", key).parent == tmp_path / "reference"
