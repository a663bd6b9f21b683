"""Annotators by score and by ready-made label: what they answer, and what their noise depends on."""

import math
import statistics

import pyarrow as pa
import pytest

from jpo_ray import records
from jpo_ray.feedback.annotators import (
    Answer,
    Comparison,
    Verdict,
    flipped_verdict,
    label_annotator,
    one_by_one,
    score_annotator,
)

ASKED = 4000


def comparison(first: str, second: str, key: str = "", instructions: tuple[str, str] = ("i", "i")) -> Comparison:
    """Items are named by their responses, which are also their scores where they are numbers."""
    return Comparison(key or f"{first}|{second}", first, second, instructions[0], first, instructions[1], second)


def by_number(_: str, response: str) -> float:
    return float(response)


def verdicts(answers: list[Answer]) -> list[Verdict]:
    return [answer.verdict for answer in answers]


def test_the_higher_score_wins_and_the_tie_band_includes_its_edge() -> None:
    annotator = score_annotator("oracle", one_by_one(by_number), noise=0.0, tie_band=0.05, seed=0)
    asked = [("0.9", "0.2"), ("0.2", "0.9"), ("0.5", "0.5"), ("0.9", "0.85"), ("0.9", "0.8499"), ("0.3", "0.35")]
    assert verdicts(annotator.answer([comparison(*pair) for pair in asked])) == ["a", "b", "tie", "tie", "a", "tie"]
    assert (annotator.name, annotator.both_orders) == ("oracle", True)
    assert annotator.answer([comparison("0.9", "0.2")]) == [Answer("a", "0.9 against 0.2", gap=0.9 - 0.2)]
    assert annotator.answer([]) == []


def test_noise_depends_on_the_comparison_alone_and_not_on_batch_or_order_of_questions() -> None:
    annotator = score_annotator("oracle", one_by_one(by_number), noise=0.5, tie_band=0.1, seed=3)
    questions = [comparison("0.6", "0.4", key=str(number)) for number in range(300)]
    together = annotator.answer(questions)
    assert [annotator.answer([question])[0] for question in questions] == together
    assert annotator.answer(questions[::-1]) == together[::-1]
    assert set(verdicts(together)) == {"a", "b", "tie"}
    again = score_annotator("other name", one_by_one(by_number), noise=0.5, tie_band=0.1, seed=3)
    assert again.answer(questions) == together
    assert (
        score_annotator("oracle", one_by_one(by_number), noise=0.5, tie_band=0.1, seed=4).answer(questions) != together
    )


def test_the_two_orders_of_a_comparison_err_independently() -> None:
    annotator = score_annotator("oracle", one_by_one(by_number), noise=1.0, tie_band=0.0, seed=0)
    questions = [comparison("0.0", "0.00", key=str(number)) for number in range(ASKED)]
    forward = verdicts(annotator.answer(questions))
    backward = [flipped_verdict(verdict) for verdict in verdicts(annotator.answer([q.flipped() for q in questions]))]
    agreeing = sum(first == second for first, second in zip(forward, backward, strict=True))
    assert abs(agreeing - ASKED / 2) < 4 * math.sqrt(ASKED / 4)
    assert abs(forward.count("a") - ASKED / 2) < 4 * math.sqrt(ASKED / 4)


@pytest.mark.parametrize(("difference", "noise", "tie_band"), [(0.2, 0.4, 0.1), (0.0, 0.3, 0.05), (1.0, 0.5, 0.25)])
def test_noise_is_gaussian_with_its_standard_deviation(difference: float, noise: float, tie_band: float) -> None:
    annotator = score_annotator("oracle", one_by_one(by_number), noise=noise, tie_band=tie_band, seed=0)
    questions = [comparison(str(difference), "0", key=str(number)) for number in range(ASKED)]
    given = verdicts(annotator.answer(questions))
    error = statistics.NormalDist(difference, noise)
    for verdict, share in (("a", 1 - error.cdf(tie_band)), ("b", error.cdf(-tie_band))):
        assert abs(given.count(verdict) / ASKED - share) < 4 * math.sqrt(share * (1 - share) / ASKED)


def test_each_item_is_scored_once_per_call() -> None:
    scored = []

    def score(instruction: str, response: str) -> float:
        scored.append((instruction, response))
        return len(response)

    annotator = score_annotator("length", one_by_one(score), noise=0.0, tie_band=0.0, seed=0)
    names = ["x", "xx", "xxx", "xxxx"]
    annotator.answer([comparison(first, second) for first in names for second in names if first != second])
    assert sorted(scored) == [("i", name) for name in names]


def test_items_that_cannot_be_scored_make_the_answer_invalid_and_say_why() -> None:
    def score(_: str, response: str) -> float:
        if response.startswith("?"):
            raise ValueError(f"no idea about {response}")
        return float(response)

    annotator = score_annotator("oracle", one_by_one(score), noise=1.0, tie_band=0.0, seed=0)
    answers = annotator.answer([comparison("?x", "1"), comparison("1", "?y"), comparison("?x", "?y")])
    assert answers == [
        Answer("invalid", reason="no idea about ?x"),
        Answer("invalid", reason="no idea about ?y"),
        Answer("invalid", reason="no idea about ?x; no idea about ?y"),
    ]
    assert annotator.answer([comparison("nan", "1")]) == [Answer("invalid", reason="the score is nan")]
    assert verdicts(annotator.answer([comparison("1", "inf")])) == ["invalid"]


def test_other_errors_of_a_score_are_not_swallowed() -> None:
    def score(_: str, __: str) -> float:
        raise KeyError("a fault of the program")

    with pytest.raises(KeyError):
        score_annotator("oracle", one_by_one(score), noise=0.0, tie_band=0.0, seed=0).answer([comparison("1", "2")])


def labels(*rows: tuple[str, str, str]) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(records.LABELS.names, row, strict=True)) for row in rows], schema=records.LABELS
    )


def test_direct_labels_answer_in_either_order() -> None:
    annotator = label_annotator(labels(("w", "l", "a"), ("p", "q", "b"), ("s", "t", "tie")))
    asked = [("w", "l"), ("l", "w"), ("p", "q"), ("q", "p"), ("s", "t"), ("t", "s")]
    assert verdicts(annotator.answer([comparison(*pair) for pair in asked])) == ["a", "b", "b", "a", "tie", "tie"]
    assert (annotator.name, annotator.both_orders) == ("labels", False)


def test_without_a_label_a_chosen_item_beats_a_rejected_one_of_another_instruction() -> None:
    table = labels(
        ("w1", "l1", "a"), ("l2", "w2", "b"), ("middle", "l3", "a"), ("w3", "middle", "a"), ("t1", "t2", "tie")
    )
    annotator = label_annotator(table)

    def ask(first: str, second: str, other: str = "j") -> Answer:
        return annotator.answer([comparison(first, second, instructions=("i", other))])[0]

    assert ask("w1", "l2").verdict == "a"
    assert ask("l1", "w2").verdict == "b"
    nothing = Answer("invalid", reason="no label")
    for pair in [("w1", "w2"), ("l1", "l2"), ("middle", "l1"), ("w1", "middle"), ("t1", "l1"), ("w1", "new")]:
        assert ask(*pair) == nothing
        assert ask(*pair[::-1]) == nothing
    assert ask("w1", "l2", other="i") == nothing  # one instruction: only its own label counts


def test_a_direct_label_goes_before_the_proxy() -> None:
    annotator = label_annotator(labels(("w1", "l1", "a"), ("w2", "l2", "a"), ("w1", "l2", "tie")))
    assert verdicts(annotator.answer([comparison("l2", "w1", instructions=("j", "i"))])) == ["tie"]
