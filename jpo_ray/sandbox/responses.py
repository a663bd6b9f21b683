"""Responses of graded quality to any task of the world."""

from collections.abc import Mapping
from random import Random
from typing import Literal

from jpo_ray.sandbox.tasks import Task

Kind = Literal["good", "evasive", "partial", "corrupted"]

# Most data are mediocre, as real preference data are: the commonest kind must not be the best one, otherwise greedy
# decoding of a model that imitates them has nothing to gain from preferences.
MEDIOCRE: Mapping[Kind, float] = {"good": 0.25, "evasive": 0.30, "partial": 0.20, "corrupted": 0.25}

# (text, weight); the oracle knows an evasive response by the words in `EVASIVE_MARKS`. All begin with the same word, so
# that greedy decoding, which chooses word by word, finds the commonest kind too.
_EVASIONS: tuple[tuple[str, int], ...] = (
    ("I am not sure.", 6),
    ("I do not know.", 3),
    ("I am not sure about that, sorry.", 2),
    ("I find that hard to say.", 2),
    ("I think it depends on many things.", 2),
    ("I cannot help with this.", 2),
    ("I have no idea.", 1),
    ("I would ask somebody else.", 1),
)
EVASIVE_MARKS: tuple[str, ...] = (
    "not sure",
    "not know",
    "hard to say",
    "depends on",
    "cannot help",
    "no idea",
    "ask somebody else",
)
_RAMBLINGS = (
    "There is much more to say about this.",
    "Many people talk about it every day.",
    "I hope this helps you a lot.",
    "As I said, this is just what I think.",
    "Let me know if you want to hear more.",
)


def respond(task: Task, rng: Random, kinds: Mapping[Kind, float] = MEDIOCRE) -> str:
    """A random response; `kinds` gives the share of each kind."""
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    if kind == "good":
        return task.good(rng)
    if kind == "evasive":
        return rng.choices([text for text, _ in _EVASIONS], [weight for _, weight in _EVASIONS])[0]
    if kind == "partial":
        return task.partial(rng)
    return _corrupted(task, rng)


def _corrupted(task: Task, rng: Random) -> str:
    """A wrong response, or a right one that rambles on or says everything twice."""
    fate = rng.random()
    if fate < 0.7:
        return task.corrupted(rng)
    answer = task.good(rng)
    if fate < 0.9:
        return " ".join([answer, *rng.sample(_RAMBLINGS, 2)])
    return f"{answer} {answer}"
