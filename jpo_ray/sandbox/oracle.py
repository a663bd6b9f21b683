"""The oracle: the quality of any response, computed from the two texts alone."""

from functools import lru_cache

from jpo_ray.sandbox import facts, lists, notes, orders, sentences, summaries
from jpo_ray.sandbox.responses import EVASIVE_MARKS
from jpo_ray.sandbox.tasks import Family, Task, words_of

FAMILIES: tuple[Family, ...] = (
    lists.FAMILY,
    facts.FAMILY,
    summaries.FAMILY,
    orders.FAMILY,
    notes.FAMILY,
    sentences.FAMILY,
)
# An honest evasion is worth more than a wrong answer and less than any useful part of a right one.
EVASIVE_QUALITY = 0.1
_RAMBLING_COST = 0.03
_LEAST_BREVITY = 0.3
_REPETITION_COST = 0.8
_UNFINISHED = 0.9


@lru_cache(maxsize=65536)
def task_of(instruction: str) -> Task:
    """The task that the instruction sets; ValueError if no family of this world knows it."""
    for family in FAMILIES:
        task = family.parse(instruction.strip())
        if task is not None:
            return task
    raise ValueError(f"not an instruction of the sandbox: {instruction[:80]!r}; the oracle scores only its own world")


def quality(instruction: str, response: str) -> float:
    """Quality of any response text in [0, 1]: accuracy, lowered by rambling, repetition and a missing full stop.

    Deterministic. An empty or senseless response scores 0, an evasive one 0.1. ValueError if the instruction is not of
    this world.
    """
    task = task_of(instruction)
    words = words_of(response)
    if not words:
        return 0.0
    accuracy = task.accuracy(response)
    if accuracy < EVASIVE_QUALITY and any(mark in response.lower() for mark in EVASIVE_MARKS):
        accuracy = EVASIVE_QUALITY
    finished = 1.0 if response.rstrip().endswith((".", "!", "?")) else _UNFINISHED
    return round(accuracy * _brevity(len(words), task.room) * _novelty(words) * finished, 4)


def _brevity(count: int, room: int) -> float:
    return max(_LEAST_BREVITY, 1.0 - _RAMBLING_COST * max(0, count - room))


def _novelty(words: list[str]) -> float:
    """1 without a repeated run of three words, down to 0.2 where nearly all are repeated."""
    runs = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    if not runs:
        return 1.0
    return 1.0 - _REPETITION_COST * (1 - len(set(runs)) / len(runs))
