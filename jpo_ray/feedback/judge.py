"""Judgments: every comparison is asked in both orders, and a verdict that flips with the order is a tie.

Position bias is large with language-model judges (46 % of verdicts conflicted between orders for GPT-4 in one study),
so the share of such flips is part of what `tally.judgment_counts` reports.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
from jpo_ray.feedback.annotators import (
    Annotator,
    Answer,
    Comparison,
    Progress,
    Verdict,
    flipped_verdict,
    silent,
)

LEAST_DOUBT = 1e-4  # the log odds of a certain label would be infinite


def comparisons_of(pairs: pa.Table, items: pa.Table) -> list[Comparison]:
    """A comparison per row of `pairs` (`records.PAIRS`), in its order. KeyError for an item that `items` lacks."""
    return comparisons(pairs, texts_of(items))


def texts_of(items: pa.Table) -> dict[str, tuple[str, str]]:
    """Instruction and response of each item, by its id."""
    columns = (items[name].to_pylist() for name in ("item_id", "instruction", "response"))
    return {item_id: (instruction, response) for item_id, instruction, response in zip(*columns, strict=True)}


def comparisons(pairs: pa.Table, texts: Mapping[str, tuple[str, str]]) -> list[Comparison]:
    """`comparisons_of`, where the texts are at hand."""
    ids = zip(*(pairs[name].to_pylist() for name in ("pair_id", "item_a", "item_b")), strict=True)
    return [Comparison(key, item_a, item_b, *texts[item_a], *texts[item_b]) for key, item_a, item_b in ids]


def combine_orders(ab: Verdict, ba: Verdict | None) -> Verdict:
    """The verdict of both orders, in terms of the original a and b.

    `ba` is the verdict as given when b was shown first, so that its "a" names the first shown, which is b; None where
    only one order was asked. Agreement stands. A flip is a tie, as in the paper, and so is a preference in one order
    with a tie in the other: it did not survive the exchange. An invalid answer in either order makes the whole invalid,
    since one order alone cannot be told from position bias.
    """
    if ba is None:
        return ab
    other = flipped_verdict(ba)
    if "invalid" in (ab, other):
        return "invalid"
    return ab if ab == other else "tie"


def judge(comparisons: Sequence[Comparison], annotator: Annotator, progress: Progress = silent) -> list[dict[str, Any]]:
    """Ask the annotator, in both orders where it takes them; returns rows of `records.JUDGMENTS`, in order.

    `verdict_ab` and `verdict_ba` are both in terms of the original a and b: without position bias they are equal. An
    item is not compared with itself: that is a tie in neither order, which says nothing of position bias.
    """
    asked = [comparison for comparison in comparisons if comparison.item_a != comparison.item_b]
    if len(asked) < len(comparisons):
        judged = iter(judge(asked, annotator, progress) if asked else [])
        return [
            _itself(comparison, annotator.name) if comparison.item_a == comparison.item_b else next(judged)
            for comparison in comparisons
        ]
    flipped = [comparison.flipped() for comparison in comparisons] if annotator.both_orders else []
    questions = [*comparisons, *flipped]
    answers = annotator.answer(questions, progress)
    if len(answers) != len(questions):
        raise RuntimeError(f"annotator {annotator.name} gave {len(answers)} answers to {len(questions)} questions")
    forward = answers[: len(comparisons)]
    backward: Sequence[Answer | None] = answers[len(comparisons) :] or [None] * len(comparisons)
    return [
        _judgment(comparison, annotator.name, ab, ba)
        for comparison, ab, ba in zip(comparisons, forward, backward, strict=True)
    ]


def _judgment(comparison: Comparison, annotator: str, ab: Answer, ba: Answer | None) -> dict[str, Any]:
    given = [answer for answer in (ab, ba) if answer is not None]
    return {
        "pair_id": comparison.key,
        "annotator": annotator,
        "verdict": combine_orders(ab.verdict, ba.verdict if ba else None),
        "verdict_ab": ab.verdict,
        "verdict_ba": flipped_verdict(ba.verdict) if ba else None,
        "probability": _probability(ab, ba),
        "gap": _gap(ab, ba),
        "text_ab": ab.text,
        "text_ba": ba.text if ba else None,
        "tokens": sum(answer.tokens for answer in given),
        "cost": sum(answer.cost for answer in given),
        "reason": "; ".join(dict.fromkeys(answer.reason for answer in given if answer.reason)),
    }


def _itself(comparison: Comparison, annotator: str) -> dict[str, Any]:
    judgment = _judgment(comparison, annotator, Answer("tie"), None)
    return judgment | {"verdict_ab": None, "reason": "the same item twice"}


def _probability(ab: Answer, ba: Answer | None) -> float | None:
    """That a is better: the mean of both orders, where the annotator says how sure it is in both."""
    if ab.share_a is None or (ba is not None and ba.share_a is None):
        return None
    return ab.share_a if ba is None or ba.share_a is None else (ab.share_a + 1 - ba.share_a) / 2


def _gap(ab: Answer, ba: Answer | None) -> float | None:
    """By how much a's score is higher: the mean of both orders."""
    if ab.gap is None or ba is None or ba.gap is None:
        return ab.gap
    return (ab.gap - ba.gap) / 2


def preferences(pairs: pa.Table, judgments: pa.Table) -> pa.Table:
    """Rows of `records.PREFERENCES` of the decisive judgments, in their order; ties and invalid ones are dropped.

    The label is soft where the annotator said how sure it is.

    KeyError for a judgment of a pair that `pairs` lacks.
    """
    place = pc.index_in(judgments["pair_id"], value_set=pairs["pair_id"])
    if place.null_count:
        raise KeyError(judgments["pair_id"].filter(pc.is_null(place))[0].as_py())
    decisive = pc.is_in(judgments["verdict"], value_set=pa.array(["a", "b"]))
    judged = judgments.select(["verdict", "probability", "gap"]).filter(decisive)
    of_pair = pairs.select(["item_a", "item_b", "protocol", "split"]).take(place.filter(decisive))
    a_wins = pc.equal(judged["verdict"], "a")
    sure = pc.if_else(a_wins, judged["probability"], pc.subtract(1.0, judged["probability"]))
    gap = pc.if_else(a_wins, judged["gap"], pc.negate(judged["gap"]))
    columns = {
        "chosen": pc.if_else(a_wins, of_pair["item_a"], of_pair["item_b"]),
        "rejected": pc.if_else(a_wins, of_pair["item_b"], of_pair["item_a"]),
        "protocol": of_pair["protocol"],
        "weight": pa.repeat(pa.scalar(1.0, pa.float32()), len(judged)),
        "probability": pc.fill_null(sure, 1.0).cast(pa.float32()),
        "gap": pc.coalesce(gap, _log_odds(sure)).cast(pa.float32()),
        "split": of_pair["split"],
    }
    return pa.table(columns, schema=records.PREFERENCES)


def _log_odds(probability: pa.ChunkedArray) -> pa.ChunkedArray:
    """A Bradley-Terry model's difference of scores."""
    bounded = pc.min_element_wise(
        pc.max_element_wise(probability, LEAST_DOUBT, skip_nulls=False), 1 - LEAST_DOUBT, skip_nulls=False
    )
    return pc.ln(pc.divide(bounded, pc.subtract(1.0, bounded)))
