"""Judgments: every comparison is asked in both orders, and a verdict that flips with the order is a tie.

Position bias is large with language-model judges (46 % of verdicts conflicted between orders for GPT-4 in one study),
so the share of such flips is part of what `judgment_counts` reports.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from jpo_ray.errors import InputError
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
    texts = {
        item_id: (instruction, response)
        for item_id, instruction, response in zip(
            *(items[name].to_pylist() for name in ("item_id", "instruction", "response")), strict=True
        )
    }
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


def preferences(pairs: pa.Table, judgments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `records.PREFERENCES` of the decisive judgments, in their order; ties and invalid ones are dropped.

    The label is soft where the annotator said how sure it is.

    KeyError for a judgment of a pair that `pairs` lacks.
    """
    by_id = {
        pair["pair_id"]: pair for pair in pairs.select(["pair_id", "item_a", "item_b", "protocol", "split"]).to_pylist()
    }
    rows = []
    for judgment in judgments:
        pair = by_id[judgment["pair_id"]]
        if judgment["verdict"] in ("a", "b"):
            chosen, rejected = ("item_a", "item_b") if judgment["verdict"] == "a" else ("item_b", "item_a")
            sure, gap = judgment["probability"], judgment["gap"]
            if judgment["verdict"] == "b":
                sure, gap = None if sure is None else 1 - sure, None if gap is None else -gap
            rows.append(
                {
                    "chosen": pair[chosen],
                    "rejected": pair[rejected],
                    "protocol": pair["protocol"],
                    "weight": 1.0,
                    "probability": 1.0 if sure is None else sure,
                    "gap": _log_odds(sure) if gap is None and sure is not None else gap,
                    "split": pair["split"],
                }
            )
    return rows


def _log_odds(probability: float) -> float:
    """A Bradley-Terry model's difference of scores."""
    bounded = min(max(probability, LEAST_DOUBT), 1 - LEAST_DOUBT)
    return math.log(bounded / (1 - bounded))


def judgment_counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a set of judgments (`records.JUDGMENTS`) looks like.

    `flip_rate` is the share of judgments with a valid answer in both orders whose answers disagree, ties included, and
    `flip_rate_ci95` its Wilson interval; `first_shown_share` the share of their decisive answers that prefer the item
    shown first, 0.5 without position bias. None where there is nothing to count.
    """
    verdicts = Counter(row["verdict"] for row in rows)
    both = [(row["verdict_ab"], row["verdict_ba"]) for row in rows]
    both = [pair for pair in both if None not in pair and "invalid" not in pair]
    first_shown = sum((ab == "a") + (ba == "b") for ab, ba in both)
    second_shown = sum((ab == "b") + (ba == "a") for ab, ba in both)
    flips = sum(ab != ba for ab, ba in both)
    return {
        "judgments": len(rows),
        **{verdict: verdicts[verdict] for verdict in ("a", "b", "tie", "invalid")},
        "decisive": verdicts["a"] + verdicts["b"],
        "flip_rate": _share(flips, len(both)),
        "flip_rate_ci95": wilson(flips, len(both)),
        "first_shown_share": _share(first_shown, first_shown + second_shown),
        "tokens": sum(row["tokens"] for row in rows),
        "cost": sum(row["cost"] for row in rows),
    }


def invalid_reasons(rows: Sequence[dict[str, Any]], most: int = 3) -> str:
    """Why verdicts are invalid, the most frequent reasons first; empty where none is."""
    reasons = Counter(row["reason"] or "no reason given" for row in rows if row["verdict"] == "invalid")
    shown = [f"{reason[:100]} ({count:,})" for reason, count in reasons.most_common(most)]
    return "; ".join([*shown, "..."] if len(reasons) > most else shown)


def invalid_warning(rows: Sequence[dict[str, Any]]) -> str:
    """What to say where most verdicts of one judge are invalid; empty where they are not."""
    asked = _asked(rows)
    invalid = [row for row in asked if row["verdict"] == "invalid"]
    if len(invalid) <= len(asked) / 2:
        return ""
    name, said = invalid[0]["annotator"], invalid[0]["text_ab"]
    because = invalid_reasons(invalid)
    if said or invalid[0]["tokens"]:  # a language model, which may have answered with nothing
        because += f"; the first answer: {said[:80]!r}"
    return f"{len(invalid):,} of {len(asked):,} verdicts of {name} are invalid: {because}"


def require_verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """`invalid_warning`. Raises `InputError` where no verdict of the judge is valid: nothing would follow from them."""
    warning = invalid_warning(rows)
    if warning and all(row["verdict"] == "invalid" for row in _asked(rows)):
        raise InputError(f"judge: {warning}; mend that, or name another judge")
    return warning


def _asked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that nobody was asked about: an item compared with itself."""
    return [row for row in rows if row["verdict_ab"] is not None]


def wilson(part: int, whole: int) -> list[float] | None:
    """Wilson's 95 % interval of a share; None where there is nothing to count."""
    if not whole:
        return None
    from scipy.stats import binomtest

    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
