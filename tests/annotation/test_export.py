"""What people answered, as the other stages read it."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jpo_ray import records
from jpo_ray.annotation.export import export, judgment_rows
from jpo_ray.annotation.store import Choice, Store
from jpo_ray.config import Source
from jpo_ray.data.sources import read_source
from jpo_ray.feedback.tally import judgment_counts
from tests.annotation.questions import conditional, joint

# person, whether a stands first, what they chose -> verdict in terms of a and b, by hand
CASES: list[tuple[str, bool, Choice, str]] = [
    ("ann", True, "first", "a"),
    ("bob", False, "first", "b"),
    ("cid", True, "second", "b"),
    ("dan", False, "second", "a"),
    ("eve", True, "tie", "tie"),
    ("fay", False, "tie", "tie"),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A conditional and a joint comparison, each answered in all six ways; a third one is pending."""
    with closing(Store(tmp_path / "annotations.sqlite", per_comparison=6)) as opened:
        opened.add([conditional(1), joint(2), joint(3)], [name for name, *_ in CASES])
        for _ in range(2):
            for name, a_first, choice, _verdict in CASES:
                found = opened.next_assignment(name)
                assert found is not None
                opened._connection.execute("UPDATE assignments SET a_first = ? WHERE id = ?", (a_first, found.id))
                opened.answer(name, found.id, choice, f"{name} explains")
        opened.next_assignment("ann")
        yield opened


def test_orientation(store: Store) -> None:
    rows = judgment_rows(store)
    assert [row["pair_id"] for row in rows] == [conditional(1).key] * 6 + [joint(2).key] * 6
    for row, (name, a_first, _, verdict) in zip(rows, CASES * 2, strict=True):
        text = f"{name} explains"
        assert row == {
            "pair_id": row["pair_id"],
            "annotator": name,
            "verdict": verdict,
            "verdict_ab": verdict if a_first else None,
            "verdict_ba": None if a_first else verdict,
            "probability": None,
            "gap": None,
            "text_ab": text if a_first else None,
            "text_ba": None if a_first else text,
            "tokens": 0,
            "cost": 0.0,
            "reason": "",
        }


def test_the_table_is_one_of_judgments(store: Store, tmp_path: Path) -> None:
    assert export(store, tmp_path) == 12
    table = records.read_table(tmp_path / "judgments.parquet", records.JUDGMENTS)
    assert table.to_pylist() == judgment_rows(store)
    counts = judgment_counts(table.to_pylist())
    assert {name: counts[name] for name in ("judgments", "a", "b", "tie", "invalid", "decisive")} == {
        "judgments": 12,
        "a": 4,
        "b": 4,
        "tie": 4,
        "invalid": 0,
        "decisive": 8,
    }
    assert (counts["flip_rate"], counts["tokens"], counts["cost"]) == (None, 0, 0.0)  # nobody saw both orders


def test_feedback_is_dove_s_and_read_back(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "instruction_0": "Instruction 1",
        "instruction_1": "Instruction 1",
        "response_0": "good 1",
        "response_1": "bad 1",
        "feedback": 1,
        "annotator": "bob",
        "shown_first": "b",
        "explanation": "bob explains",
    }
    assert lines[6] == {
        "instruction_0": "Instruction 2a",
        "instruction_1": "Instruction 2b",
        "response_0": "good 2",
        "response_1": "bad 2",
        "feedback": 0,
        "annotator": "ann",
        "shown_first": "a",
        "explanation": "ann explains",
    }
    rows = read_source(Source(path=str(tmp_path / "answers.jsonl")), "fail").rows
    assert [row.verdict for row in rows] == [verdict for *_, verdict in CASES * 2]
    assert rows[1].items == (("Instruction 1", "good 1"), ("Instruction 1", "bad 1"))
    assert rows[6].items == (("Instruction 2a", "good 2"), ("Instruction 2b", "bad 2"))


def test_conditional_feedback_alone_names_its_instruction_once(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "annotations.sqlite")) as store:
        store.add([conditional(1)], ["ann", "bob"])
        found = store.next_assignment("bob")
        assert found is not None
        store.answer("bob", found.id, "tie", "")
        export(store, tmp_path)
    [row] = read_source(Source(path=str(tmp_path / "answers.jsonl")), "fail").rows
    assert (row.kind, row.verdict) == ("dove_single", "tie")
    assert row.items == (("Instruction 1", "good 1"), ("Instruction 1", "bad 1"))


def test_labels_are_what_people_say_together(tmp_path: Path) -> None:
    """Two agree; one decides where the other does not; two contradict each other; one alone."""
    said: list[tuple[Choice, Choice | None, str]] = [
        ("first", "first", "a"), ("tie", "second", "b"), ("first", "second", "tie"), ("second", None, "b")
    ]  # fmt: skip
    with closing(Store(tmp_path / "annotations.sqlite")) as store:
        store.add([joint(number) for number in range(len(said))], ["ann", "bob"])
        for column, name in enumerate(("ann", "bob")):
            for choices in said:
                found = store.next_assignment(name)
                choice = choices[column]
                if found is None or choice is None:
                    continue
                store._connection.execute("UPDATE assignments SET a_first = 1 WHERE id = ?", (found.id,))
                store.answer(name, found.id, choice, "")  # type: ignore[arg-type]
        assert export(store, tmp_path) == 7
    rows = read_source(Source(path=str(tmp_path / "labels.jsonl")), "fail").rows
    assert [row.verdict for row in rows] == [verdict for *_, verdict in said]


def test_an_export_leaves_nothing_half_written(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path)
    (tmp_path / "answers.jsonl").unlink()
    (tmp_path / "answers.jsonl").mkdir()  # nothing can take its place
    with pytest.raises(OSError, match="answers"):
        export(store, tmp_path)
    (tmp_path / "answers.jsonl").rmdir()
    assert export(store, tmp_path) == 12
    left = {path.name for path in tmp_path.iterdir() if "sqlite" not in path.name}
    assert left == {"judgments.parquet", "answers.jsonl", "labels.jsonl"}


def test_nothing_answered_is_an_empty_table(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "annotations.sqlite")) as store:
        store.add([conditional(1)], ["ann", "bob"])
        assert export(store, tmp_path) == 0
    assert records.read_table(tmp_path / "judgments.parquet", records.JUDGMENTS).num_rows == 0
    assert (tmp_path / "answers.jsonl").read_text() == ""
