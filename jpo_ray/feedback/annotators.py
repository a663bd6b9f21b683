"""Annotators: what answers a comparison. Each is a plain function in an `Annotator` record.

A comparison shows two (instruction, response) items, a first and b second. Whoever asks decides the order; the
annotator only says which is better (`judge.py` asks in both orders and combines).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from jpo_ray.feedback.by_scores import ROUNDING, ByScores, standard_normal

Verdict = Literal["a", "b", "tie", "invalid"]
Progress = Callable[[float, str], None]  # the share that is done, and what to tell about it
Texts = Mapping[str, tuple[str, str]]  # item id -> instruction, response
# Scores of items by id, or why one has none.
ScoreItems = Callable[[Texts, Progress], Mapping[str, float | str]]


@dataclass(frozen=True)
class Comparison:
    """Two items to compare; with equal instructions the comparison is conditional, else joint."""

    key: str  # stable name of the unordered pair; seeds an annotator's noise
    item_a: str
    item_b: str
    instruction_a: str
    response_a: str
    instruction_b: str
    response_b: str

    @property
    def protocol(self) -> Literal["conditional", "joint"]:
        return "conditional" if self.instruction_a == self.instruction_b else "joint"

    def flipped(self) -> "Comparison":
        return Comparison(
            self.key, self.item_b, self.item_a, self.instruction_b, self.response_b, self.instruction_a, self.response_a
        )


@dataclass(frozen=True)
class Answer:
    verdict: Verdict
    text: str = ""  # raw words of the annotator
    tokens: int = 0
    cost: float = 0.0  # US dollars
    reason: str = ""  # why the verdict is invalid
    share_a: float | None = None  # probability that a is better, from an annotator that says how sure it is
    gap: float | None = None  # by how much a's score is higher, from an annotator that scores items


def silent(share: float, note: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Annotator:
    name: str
    answer: Callable[[Sequence[Comparison], Progress], list[Answer]]  # one answer per comparison, in order
    both_orders: bool = True  # False for ready-made labels, which have no order
    score_items: ScoreItems | None = None  # of one that decides by scores of items, and how
    by_scores: ByScores | None = None


def score_annotator(name: str, score_items: ScoreItems, *, noise: float, tie_band: float, seed: int) -> Annotator:
    """Prefer the item with the higher score: an oracle, a reward model or ratings as an annotator.

    N scores decide all their comparisons, so each item is scored once, whatever it is compared with.

    `noise` is the standard deviation of a Gaussian error on the difference of the two scores, in the scores' unit. It
    is a function of (seed, comparison key, order shown) alone, so answers depend neither on what else is asked nor on
    the order of questions, and the two orders of a comparison err independently. Differences up to `tie_band` are
    ties. Where an item has no score, the answer is invalid and says why.
    """
    scores: dict[str, float | str] = {}

    def answer(comparisons: Sequence[Comparison], progress: Progress = silent) -> list[Answer]:
        texts = {each.item_a: (each.instruction_a, each.response_a) for each in comparisons}
        texts |= {each.item_b: (each.instruction_b, each.response_b) for each in comparisons}
        scores.update(score_items({item: text for item, text in texts.items() if item not in scores}, progress))
        return [compare(each, scores[each.item_a], scores[each.item_b]) for each in comparisons]

    def compare(comparison: Comparison, score_a: float | str, score_b: float | str) -> Answer:
        if isinstance(score_a, str) or isinstance(score_b, str):
            reasons = dict.fromkeys(each for each in (score_a, score_b) if isinstance(each, str))
            return Answer("invalid", reason="; ".join(reasons))
        difference = (
            score_a
            - score_b
            + (
                noise * standard_normal(seed, comparison.key, forward=comparison.item_a < comparison.item_b)
                if noise
                else 0.0
            )
        )
        text = f"{score_a:.6g} against {score_b:.6g}"
        if abs(difference) <= tie_band + ROUNDING:
            return Answer("tie", text, gap=difference)
        return Answer("a" if difference > 0 else "b", text, gap=difference)

    return Annotator(name, answer, score_items=score_items, by_scores=ByScores(name, noise, tie_band, seed))


def label_annotator(labels: pa.Table, *, proxy: bool = True) -> Annotator:
    """Answer from ready-made labels (`records.LABELS`), without an order.

    With `proxy`, two items of different instructions that no label compares directly are decided by what labels say of
    each (JPO paper, Appendix E): one that labels choose, and never reject, beats one that they reject, and never
    choose. Else invalid.
    """
    direct: dict[tuple[str, str], Verdict] = {}
    chosen: set[str] = set()
    rejected: set[str] = set()
    for row in labels.to_pylist():
        pair, verdict = (row["item_a"], row["item_b"]), row["verdict"]
        direct[pair] = verdict
        direct[pair[::-1]] = flipped_verdict(verdict)
        if verdict in ("a", "b"):
            chosen.add(pair[0] if verdict == "a" else pair[1])
            rejected.add(pair[1] if verdict == "a" else pair[0])
    both = chosen & rejected
    winners, losers = chosen - both, rejected - both

    def verdict_on(comparison: Comparison) -> Verdict:
        pair = (comparison.item_a, comparison.item_b)
        if pair in direct:
            return direct[pair]
        if proxy and comparison.instruction_a != comparison.instruction_b:
            if pair[0] in winners and pair[1] in losers:
                return "a"
            if pair[0] in losers and pair[1] in winners:
                return "b"
        return "invalid"

    def answer(comparisons: Sequence[Comparison], _: Progress = silent) -> list[Answer]:
        verdicts = map(verdict_on, comparisons)
        return [Answer(verdict, reason="no label" if verdict == "invalid" else "") for verdict in verdicts]

    return Annotator("labels", answer, both_orders=False)


def flipped_verdict(verdict: Verdict) -> Verdict:
    """The same verdict with a and b exchanged."""
    exchanged: dict[Verdict, Verdict] = {"a": "b", "b": "a"}
    return exchanged.get(verdict, verdict)


def one_by_one(score: Callable[[str, str], float]) -> ScoreItems:
    """Scores by a function of instruction and response; its ValueError says why an item has none."""

    def score_items(texts: Texts, _: Progress = silent) -> dict[str, float | str]:
        return {item: of_item(*text) for item, text in texts.items()}

    def of_item(instruction: str, response: str) -> float | str:
        try:
            return finite(float(score(instruction, response)))
        except ValueError as error:
            return str(error) or "no score"

    return score_items


def given_scores(ratings: Mapping[str, float]) -> ScoreItems:
    """Scores that came with the data."""
    return lambda texts, _: {item: finite(ratings[item]) if item in ratings else "no rating" for item in texts}


def finite(score: float) -> float | str:
    return score if math.isfinite(score) else f"the score is {score}"
