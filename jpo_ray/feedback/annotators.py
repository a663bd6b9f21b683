"""Annotators: what answers a comparison. Each is a plain function in an `Annotator` record.

A comparison shows two (instruction, response) items, a first and b second. Whoever asks decides the order; the
annotator only says which is better (`judge.py` asks in both orders and combines).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["a", "b", "tie", "invalid"]


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


@dataclass(frozen=True)
class Annotator:
    name: str
    answer: Callable[[Sequence[Comparison]], list[Answer]]  # one answer per comparison, in order
    both_orders: bool = True  # False for ready-made labels, which have no order
