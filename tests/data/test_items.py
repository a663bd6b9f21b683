"""What becomes of rows: one item per text, one split per instruction, one response per instruction in D_S."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from jpo_ray import records
from jpo_ray.data.formats import LabelVerdict, Row
from jpo_ray.data.items import ItemTables, build_items
from jpo_ray.data.sources import SourceRows


def source(kind: str, *rows: Row, name: str = "file", skipped: dict[str, int] | None = None) -> SourceRows:
    return SourceRows(name, kind, list(rows), skipped or {}, [])


def pair(
    instruction: str, first: str, second: str, verdict: LabelVerdict | None = None, gold: str | None = None
) -> Row:
    return Row(((instruction, first), (instruction, second)), verdict, gold, "file line 1", "dove_single")


def joint(first: tuple[str, str], second: tuple[str, str], verdict: LabelVerdict | None = None) -> Row:
    return Row((first, second), verdict, None, "file line 1", "dove_raw")


def sft(instruction: str, response: str) -> Row:
    return Row(((instruction, response),), None, None, "file line 1", "sft")


def gold(instruction: str, response: str) -> Row:
    return Row(((instruction, response),), None, response, "file line 1", "gold")


def build(seed: int = 0, **splits: Sequence[Row] | Sequence[SourceRows]) -> ItemTables:
    rows: dict[str, Any] = {}
    for split, given in splits.items():
        rows[split] = given if given and isinstance(given[0], SourceRows) else [source("any", *given)]  # type: ignore[arg-type]
    return build_items(rows, seed)


def texts(tables: ItemTables, split: str, flag: str = "") -> list[tuple[str, str]]:
    rows = [row for row in tables.items.to_pylist() if row["split"] == split and (not flag or row[flag])]
    return [(row["instruction"], row["response"]) for row in rows]


def labels(tables: ItemTables) -> list[tuple[str, str, str]]:
    """(response a, response b, verdict)."""
    named = {row["item_id"]: row["response"] for row in tables.items.to_pylist()}
    return [(named[row["item_a"]], named[row["item_b"]], row["verdict"]) for row in tables.labels.to_pylist()]


def test_tables_keep_their_schemas_and_content_ids() -> None:
    tables = build(train=[pair("i", "x", "y", "b")])
    assert tables.items.schema == records.ITEMS
    assert tables.labels.schema == records.LABELS
    first, second = tables.items.to_pylist()
    assert first["item_id"] == records.item_id("i", "x")
    assert second["instruction_id"] == records.instruction_id("i")
    assert (first["source"], first["split"], first["gold"]) == ("file", "train", False)
    assert tables.labels.to_pylist() == [
        {"item_a": records.item_id("i", "x"), "item_b": records.item_id("i", "y"), "verdict": "b"}
    ]


def test_an_instruction_repeated_in_one_source_is_dropped_after_the_first() -> None:
    tables = build(train=[pair("i", "x", "y", "a"), pair("i", "z", "w", "a"), sft("j", "x"), sft("j", "y")])
    assert texts(tables, "train") == [("i", "x"), ("i", "y"), ("j", "x")]
    assert labels(tables) == [("x", "y", "a")]
    assert tables.counts["repeated"] == 2


def test_joint_rows_are_never_dropped_as_repeated_nor_make_others_so() -> None:
    x, y, z = ("i", "x"), ("j", "y"), ("k", "z")
    tables = build(train=[joint(x, y, "a"), joint(x, z, "b"), joint(z, y), pair("i", "x", "v", "a")])
    assert texts(tables, "train") == [x, y, z, ("i", "v")]
    assert labels(tables) == [("x", "y", "a"), ("x", "z", "b"), ("x", "v", "a")]
    assert (tables.counts["repeated"], tables.counts["joint_labels"], tables.counts["conditional_labels"]) == (0, 2, 1)


def test_sources_that_share_instructions_are_merged_and_their_items_stored_once() -> None:
    preferences = source("dove_single", pair("i", "x", "y", "a"), pair("j", "x", "y", "a"), name="pairs")
    tuned = source("sft", sft("i", "y"), sft("k", "x"), name="sft", skipped={"empty `response`": 3})
    tables = build(train=[preferences, tuned])
    assert texts(tables, "train") == [("i", "x"), ("i", "y"), ("j", "x"), ("j", "y"), ("k", "x")]
    assert tables.items["source"].to_pylist() == ["pairs"] * 4 + ["sft"]
    counts = tables.counts
    assert (counts["merged"], counts["repeated"], counts["skipped"]) == (1, 0, 3)
    assert (counts["train_instructions"], counts["train_items"], counts["train_sft"]) == (3, 5, 3)


def test_an_instruction_stays_in_the_most_protected_split() -> None:
    tables = build(
        train=[pair("i", "x", "y", "a"), pair("j", "x", "y", "a"), pair("k", "x", "y", "a")],
        validation=[pair("j", "v", "w", "a"), pair("i", "v", "w", "a")],
        test=[gold("i", "g")],
    )
    assert texts(tables, "train") == [("k", "x"), ("k", "y")]
    assert texts(tables, "validation") == [("j", "v"), ("j", "w")]
    assert texts(tables, "test") == [("i", "g")]
    assert (tables.counts["leaked"], tables.counts["leaked_labels"]) == (3, 3)
    assert tables.labels.num_rows == 2


def test_a_joint_label_goes_with_its_leaked_item_and_leaves_the_other() -> None:
    tables = build(train=[joint(("i", "x"), ("j", "y"), "a")], test=[gold("j", "g")])
    assert texts(tables, "train") == [("i", "x")]
    assert (tables.labels.num_rows, tables.counts["leaked_labels"]) == (0, 1)


def test_d_s_takes_the_response_given_for_sft() -> None:
    rows = [pair(str(number), "x", "y", "a") for number in range(50)]
    given = [sft(str(number), "s") for number in range(49)]
    tables = build(train=[source("dove_single", *rows), source("sft", *given)])
    chosen = dict(texts(tables, "train", "sft"))
    assert len(chosen) == tables.counts["train_sft"] == 50
    assert all(chosen[str(number)] == "s" for number in range(49))
    assert chosen["49"] in ("x", "y")


def test_d_s_choice_is_seeded_and_independent_of_order_and_of_other_rows() -> None:
    rows = [pair(str(number), f"x{number}", f"y{number}") for number in range(1000)]
    chosen = set(texts(build(train=rows), "train", "sft"))
    shuffled = [Row(row.items[::-1], None, None, "", row.kind) for row in random.Random(1).sample(rows, 1000)]
    assert set(texts(build(train=shuffled), "train", "sft")) == chosen
    assert set(texts(build(train=rows[:300]), "train", "sft")) == {each for each in chosen if int(each[0]) < 300}
    assert set(texts(build(validation=rows), "validation", "sft")) == chosen
    first = sum(response.startswith("x") for _, response in chosen)
    assert 437 <= first <= 563  # a fair coin within four standard deviations (15.8)
    other = set(texts(build(seed=1, train=rows), "train", "sft"))
    assert 437 <= len(other & chosen) <= 563
    assert len({instruction for instruction, _ in chosen}) == len(chosen) == 1000


def test_d_s_prefers_ordinary_responses_to_gold_and_leaves_test_out() -> None:
    rows = [pair(str(number), "x", "y", gold="g") for number in range(40)]
    tables = build(validation=[*rows, gold("only", "g")], test=[sft("t", "x")])
    chosen = dict(texts(tables, "validation", "sft"))
    assert set(chosen.values()) == {"x", "y", "g"}
    assert [instruction for instruction, response in chosen.items() if response == "g"] == ["only"]
    assert texts(tables, "test", "sft") == []


def test_gold_is_the_given_one_else_the_chosen_one_of_a_conditional_label() -> None:
    tables = build(
        test=[
            pair("given", "x", "y", "a", gold="g"),
            pair("among", "x", "y", "a", gold="y"),
            pair("labelled", "x", "y", "b"),
            pair("tie", "x", "y", "tie"),
            pair("open", "x", "y"),
            joint(("one", "x"), ("other", "y"), "a"),
        ]
    )
    assert texts(tables, "test", "gold") == [("given", "g"), ("among", "y"), ("labelled", "y")]
    assert ("given", "g") in texts(tables, "test")
    counts = tables.counts
    assert (counts["test_instructions"], counts["test_gold"], counts["test_without_gold"]) == (7, 3, 4)
    assert counts["tie_labels"] == 1


def test_a_given_gold_of_another_source_wins_over_a_label_and_train_has_none() -> None:
    tables = build(
        train=[pair("i", "x", "y", "a", gold="g")],
        validation=[source("dove_single", pair("j", "x", "y", "a")), source("gold", gold("j", "g"))],
    )
    assert texts(tables, "train", "gold") == []
    assert ("i", "g") in texts(tables, "train")
    assert texts(tables, "validation", "gold") == [("j", "g")]
    assert "train_gold" not in tables.counts


def test_labels_that_contradict_each_other_are_dropped_and_repeated_ones_kept_once() -> None:
    def sources(*verdicts: tuple[str, str, LabelVerdict]) -> list[SourceRows]:
        return [source("dove_single", pair("i", *each)) for each in verdicts]

    same = build(train=sources(("x", "y", "a"), ("y", "x", "b"), ("x", "y", "a")))
    assert (labels(same), same.counts["repeated_labels"], same.counts["contradictory"]) == ([("x", "y", "a")], 2, 0)
    ties = build(train=sources(("x", "y", "tie"), ("y", "x", "tie")))
    assert labels(ties) == [("x", "y", "tie")]
    for second in (("y", "x", "a"), ("x", "y", "b"), ("x", "y", "tie")):
        tables = build(test=sources(("x", "y", "a"), second, ("x", "y", "a")))  # type: ignore[arg-type]
        assert (labels(tables), tables.counts["contradictory"], tables.counts["test_gold"]) == ([], 1, 0)


def test_an_item_compared_with_itself_has_no_label() -> None:
    tables = build(train=[pair("i", "x", "x", "a")])
    assert (texts(tables, "train", "sft"), tables.labels.num_rows) == ([("i", "x")], 0)
    assert tables.counts["identical_labels"] == 1


def test_order_is_by_split_and_first_appearance_and_no_row_is_fine() -> None:
    tables = build(test=[gold("t", "g")], validation=[sft("v", "x")], train=[sft("b", "x"), sft("a", "x")])
    assert tables.items["instruction"].to_pylist() == ["b", "a", "v", "t"]
    empty = build_items({}, 0)
    assert (empty.items.num_rows, empty.labels.num_rows, empty.counts["train_items"]) == (0, 0, 0)
    assert empty.items.schema == records.ITEMS


def test_instructions_that_are_left_out_take_their_items_and_labels_along() -> None:
    rows = {"train": [source("any", pair("a", "x", "y", "a"), pair("b", "x", "y", "b"), sft("c", "z"))]}
    whole, less = build_items(rows, 0), build_items(rows, 0, {"near_duplicates": {records.instruction_id("b")}})
    assert less.items["instruction"].to_pylist() == ["a", "a", "c"]
    assert (len(whole.labels), len(less.labels)) == (2, 1)
    assert (less.counts["near_duplicates"], less.counts["leaked"], less.counts["leaked_labels"]) == (1, 0, 1)
    assert less.counts["train_instructions"] == less.counts["train_sft"] == 2


def test_what_is_given_for_fine_tuning_is_a_split_of_its_own() -> None:
    tables = build(
        sft=[sft("s", "x"), sft("t", "y"), sft("both", "z")], train=[pair("both", "u", "v", "a")], test=[gold("t", "g")]
    )
    rows = {(row["instruction"], row["split"], row["sft"]) for row in tables.items.to_pylist()}
    assert {row for row in rows if row[1] == "sft"} == {("s", "sft", True)}  # the others are at home elsewhere
    assert ("t", "test", False) in rows
    assert len(texts(tables, "train", "sft")) == 1
    assert (tables.counts["sft_items"], tables.counts["leaked"]) == (1, 2)


def test_counts_are_plain_integers_under_names_that_stay() -> None:
    counts = build(train=[pair("i", "x", "y", "a")]).counts
    assert all(type(value) is int for value in counts.values())
    per_split = {f"{split}_{what}" for split in records.SPLITS for what in ("instructions", "items")}
    assert set(counts) == per_split | {
        *(
            "train_sft",
            "validation_sft",
            "validation_gold",
            "validation_without_gold",
            "test_gold",
            "test_without_gold",
        ),
        *("conditional_labels", "joint_labels", "tie_labels", "skipped", "repeated", "merged", "leaked"),
        *("near_duplicates", "too_long", "leaked_labels", "identical_labels", "repeated_labels"),
        *("contradictory", "rated"),
    }


@pytest.mark.timeout(30)  # 0.5 s where the work grows with the rows, minutes where it grows with their square
def test_one_instruction_in_very_many_comparisons_takes_no_quadratic_time() -> None:
    rows = 50_000
    tables = build(train=[joint(("hub", f"r{number}"), (str(number), "x"), "a") for number in range(rows)])
    assert tables.counts["train_items"] == 2 * rows
    assert tables.counts["train_sft"] == rows + 1
