"""Both orders into one verdict, judgments into preferences, and what is counted of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jpo_ray import records
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator, Answer, Comparison, Verdict, one_by_one, score_annotator
from jpo_ray.feedback.judge import (
    combine_orders,
    comparisons_of,
    judge,
    preferences,
)
from jpo_ray.feedback.tally import invalid_warning, judgment_counts, require_verdicts


def comparison(key: str = "k") -> Comparison:
    return Comparison(key, f"{key}-x", f"{key}-y", "i", "x", "j", "y")


def constant(*verdicts: Verdict, both_orders: bool = True) -> Annotator:
    """Answers with the given verdicts in turn, whatever is asked."""

    def answer(asked: Sequence[Comparison], *_: Any) -> list[Answer]:
        assert len(asked) == len(verdicts)
        return [Answer(verdict, f"says {verdict}", 10, 0.25) for verdict in verdicts]

    return Annotator("constant", answer, both_orders)


@pytest.mark.parametrize(
    ("ab", "ba", "combined"),
    [
        ("a", "b", "a"),  # a won in either place
        ("b", "a", "b"),
        ("a", "a", "tie"),  # the first shown won twice
        ("b", "b", "tie"),  # the second shown won twice
        ("a", "tie", "tie"),
        ("b", "tie", "tie"),
        ("tie", "a", "tie"),
        ("tie", "b", "tie"),
        ("tie", "tie", "tie"),
        ("a", "invalid", "invalid"),
        ("b", "invalid", "invalid"),
        ("tie", "invalid", "invalid"),
        ("invalid", "a", "invalid"),
        ("invalid", "b", "invalid"),
        ("invalid", "tie", "invalid"),
        ("invalid", "invalid", "invalid"),
        ("a", None, "a"),
        ("b", None, "b"),
        ("tie", None, "tie"),
        ("invalid", None, "invalid"),
    ],
)
def test_combine_orders(ab: Verdict, ba: Verdict | None, combined: Verdict) -> None:
    assert combine_orders(ab, ba) == combined


def test_a_judgment_of_both_orders_is_told_in_terms_of_the_original_a_and_b() -> None:
    shown: list[tuple[str, str]] = []

    def answer(asked: Sequence[Comparison], *_: Any) -> list[Answer]:
        shown.extend((each.response_a, each.response_b) for each in asked)
        return [Answer("a", "first", 3, 0.5), Answer("invalid", "eh", 4, 0.25, "no verdict in the reply")]

    assert judge([comparison()], Annotator("model", answer)) == [
        {
            "pair_id": "k",
            "annotator": "model",
            "verdict": "invalid",
            "verdict_ab": "a",
            "verdict_ba": "invalid",
            "probability": None,
            "gap": None,
            "text_ab": "first",
            "text_ba": "eh",
            "tokens": 7,
            "cost": 0.75,
            "reason": "no verdict in the reply",
        }
    ]
    assert shown == [("x", "y"), ("y", "x")]


def test_agreement_and_flip_by_the_answers_as_shown() -> None:
    keys = ["agree", "flip"]
    rows = judge([comparison(key) for key in keys], constant("b", "a", "a", "a"))  # forward twice, then backward twice
    assert [(row["pair_id"], row["verdict"], row["verdict_ab"], row["verdict_ba"]) for row in rows] == [
        ("agree", "b", "b", "b"),
        ("flip", "tie", "a", "b"),
    ]


def test_one_order_leaves_the_other_null_and_the_rows_fit_their_table(tmp_path: Path) -> None:
    rows = judge([comparison("1"), comparison("2")], constant("b", "tie", both_orders=False))
    assert [(row["verdict"], row["verdict_ba"], row["text_ba"], row["tokens"]) for row in rows] == [
        ("b", None, None, 10),
        ("tie", None, None, 10),
    ]
    table = records.write_table(tmp_path / "judgments.parquet", rows, records.JUDGMENTS)
    assert table.to_pylist() == rows


def test_reasons_of_both_orders_are_joined_once() -> None:
    def answer(asked: Sequence[Comparison], *_: Any) -> list[Answer]:
        return [Answer("invalid", reason=reason) for reason in ("empty", "refused", "empty", "empty")][: len(asked)]

    assert [row["reason"] for row in judge([comparison("1"), comparison("2")], Annotator("m", answer))] == [
        "empty",
        "refused; empty",
    ]


def test_an_annotator_that_loses_answers_is_an_error() -> None:
    silent = Annotator("silent", lambda *_: [Answer("a")])
    with pytest.raises(RuntimeError, match="silent gave 1 answers to 2 questions"):
        judge([comparison()], silent)
    assert judge([], Annotator("silent", lambda *_: [])) == []


def test_a_judge_without_noise_never_flips() -> None:
    annotator = score_annotator(
        "oracle", one_by_one(lambda _, response: len(response)), noise=0.0, tie_band=0.0, seed=0
    )
    comparisons = [
        Comparison(f"{n}-{m}", f"x{n}", f"x{m}", "i", "x" * n, "j", "x" * m) for n in range(5) for m in range(5)
    ]
    rows = judge(comparisons, annotator)
    different = [row for row, each in zip(rows, comparisons, strict=True) if each.item_a != each.item_b]
    assert all(row["verdict"] == row["verdict_ab"] == row["verdict_ba"] for row in different)
    counts = judgment_counts(rows)
    assert (counts["a"], counts["b"], counts["tie"], counts["flip_rate"]) == (10, 10, 5, 0.0)
    assert counts["first_shown_share"] == 0.5


def pair(number: int, protocol: str = "joint", split: str = "train") -> dict[str, Any]:
    return {
        "pair_id": f"p{number}",
        "item_a": f"x{number}",
        "item_b": f"y{number}",
        "protocol": protocol,
        "similarity": 0.5,
        "strategy": "random",
        "split": split,
    }


PAIRS = pa.Table.from_pylist(
    [pair(1), pair(2, "conditional", "validation"), pair(3), pair(4), pair(5)], schema=records.PAIRS
)


def test_comparisons_carry_the_texts_of_their_items_in_the_order_of_the_pairs() -> None:
    names = [f"{side}{number}" for number in range(5, 0, -1) for side in "xy"]
    rows = [
        dict.fromkeys(records.ITEMS.names, "")
        | {"item_id": name, "instruction": f"do {name}", "response": f"did {name}"}
        for name in names
    ]
    items = pa.Table.from_pylist([row | {"sft": False, "gold": False} for row in rows], schema=records.ITEMS)
    comparisons = comparisons_of(PAIRS, items)
    assert [each.key for each in comparisons] == ["p1", "p2", "p3", "p4", "p5"]
    assert comparisons[1] == Comparison("p2", "x2", "y2", "do x2", "did x2", "do y2", "did y2")
    with pytest.raises(KeyError, match="x1"):
        comparisons_of(PAIRS, items.slice(0, 8))


def judgment(number: int, verdict: str, ab: str = "a", ba: str | None = "a", cost: float = 0.0) -> dict[str, Any]:
    fields = {"verdict": verdict, "verdict_ab": ab, "verdict_ba": ba, "tokens": 2, "cost": cost}
    fields |= {"probability": None, "gap": None}
    return dict.fromkeys(records.JUDGMENTS.names, "") | fields | {"pair_id": f"p{number}", "annotator": "m"}


def judged(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), records.JUDGMENTS)


def test_preferences_are_the_decisive_verdicts(tmp_path: Path) -> None:
    judgments = [judgment(number, verdict) for number, verdict in ((2, "b"), (1, "a"), (3, "tie"), (4, "invalid"))]
    table = preferences(PAIRS, judged(*judgments))
    rows = table.to_pylist()
    shared = {"weight": 1.0, "probability": 1.0, "gap": None}
    assert rows == [
        {"chosen": "y2", "rejected": "x2", "protocol": "conditional", "split": "validation", **shared},
        {"chosen": "x1", "rejected": "y1", "protocol": "joint", "split": "train", **shared},
    ]
    assert records.write_table(tmp_path / "p.parquet", table, records.PREFERENCES).num_rows == 2
    with pytest.raises(KeyError, match="p9"):
        preferences(PAIRS, judged(judgment(9, "a")))


def test_an_annotator_that_says_how_sure_it_is_gives_soft_labels() -> None:
    def answer(*_: Any) -> list[Answer]:
        return [Answer("b", share_a=0.3), Answer("a", share_a=0.9)]  # b wins: by 0.7 as second, by 0.9 as first

    (row,) = judge([comparison("p1")], Annotator("m", answer))
    assert row["probability"] == pytest.approx(0.2)
    (found,) = preferences(PAIRS, judged(row)).to_pylist()
    assert found | {"probability": 0, "gap": 0} == {
        "chosen": "y1", "rejected": "x1", "protocol": "joint", "weight": 1.0, "probability": 0, "gap": 0,
        "split": "train",
    }  # fmt: skip
    assert found["probability"] == pytest.approx(0.8)
    assert found["gap"] == pytest.approx(1.3862944)  # log(0.8 / 0.2)


def test_a_certain_soft_label_has_a_finite_gap() -> None:
    (row,) = judge([comparison("p1")], Annotator("m", lambda *_: [Answer("a", share_a=1.0)], both_orders=False))
    (found,) = preferences(PAIRS, judged(row)).to_pylist()
    assert (found["probability"], found["gap"]) == (1.0, pytest.approx(9.2102404))  # log(0.9999 / 0.0001)


def test_an_annotator_that_scores_items_says_by_how_much_one_is_better() -> None:
    """b is ahead by 2 when shown second and by 3 when shown first (a score's noise differs): by 2.5 in the mean."""

    def answer(*_: Any) -> list[Answer]:
        return [Answer("b", gap=-2.0), Answer("a", gap=3.0)]

    (row,) = judge([comparison("p1")], Annotator("m", answer))
    assert row["gap"] == -2.5
    assert preferences(PAIRS, judged(row))["gap"][0].as_py() == 2.5


def test_counts_of_judgments() -> None:
    rows = [
        judgment(1, "a", "a", "a", cost=0.5),  # first shown once, second shown once
        judgment(2, "tie", "a", "b", cost=0.25),  # the first shown twice
        judgment(3, "tie", "tie", "b"),  # the first shown, when b was first
        judgment(4, "tie", "tie", "tie"),
        judgment(5, "invalid", "a", "invalid"),  # says nothing about position
        judgment(6, "b", "b", None),  # one order only: nothing about position either
    ]
    counts = judgment_counts(rows)
    assert counts.pop("flip_rate_ci95") == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson's, of 2 in 4
    assert counts == {
        "judgments": 6,
        "a": 1,
        "b": 1,
        "tie": 3,
        "invalid": 1,
        "decisive": 2,
        "flip_rate": 0.5,  # 2 of the 4 with two valid answers
        "first_shown_share": 0.8,  # 4 of 5 decisive answers
        "tokens": 12,
        "cost": 0.75,
    }
    nothing = judgment_counts([])
    assert (nothing["judgments"], nothing["flip_rate"], nothing["first_shown_share"]) == (0, None, None)


def test_an_item_is_not_compared_with_itself() -> None:
    """It would be shown twice the same prompt, and any answer would look like position bias."""
    asked: list[Comparison] = []

    def first_shown(comparisons: Sequence[Comparison], _: object) -> list[Answer]:
        asked.extend(comparisons)
        return [Answer("a") for _ in comparisons]

    same = Comparison("s", "x", "x", "i", "text", "i", "text")
    other = Comparison("o", "x", "y", "i", "text", "i", "other")
    rows = judge([same, other, same], Annotator("biased", first_shown))
    assert [row["verdict"] for row in rows] == ["tie", "tie", "tie"]
    assert [row["reason"] for row in rows] == ["the same item twice", "", "the same item twice"]
    assert asked == [other, other.flipped()]
    assert judgment_counts(rows)["flip_rate"] == 1.0
    assert judgment_counts([rows[0]])["flip_rate"] is None
    assert [row["verdict"] for row in judge([same], Annotator("biased", first_shown))] == ["tie"]


def verdicts(*given: Verdict) -> list[dict[str, Any]]:
    return judge([comparison(str(number)) for number, _ in enumerate(given)], constant(*given, both_orders=False))


def test_a_judge_without_a_valid_verdict_is_refused_and_one_with_few_is_told() -> None:
    assert invalid_warning(verdicts("a", "tie", "invalid", "invalid")) == ""
    few = verdicts("a", "invalid", "invalid")
    said = "2 of 3 verdicts of constant are invalid: no reason given (2); the first answer: 'says invalid'"
    assert invalid_warning(few) == require_verdicts(few) == said
    none = verdicts("invalid", "invalid")
    assert invalid_warning(none).startswith("2 of 2 verdicts")
    with pytest.raises(InputError, match=r"^judge: 2 of 2 verdicts of constant are invalid: .*; mend that, or name"):
        require_verdicts(none)
    itself = Comparison("k", "x", "x", "i", "x", "i", "x")
    with pytest.raises(InputError, match="2 of 2"):  # that an item ties with itself is no answer of the judge's
        require_verdicts([*none, *judge([itself], constant())])
    assert require_verdicts([]) == require_verdicts(judge([itself], constant())) == ""
