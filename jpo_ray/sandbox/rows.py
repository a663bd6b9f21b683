"""Rows of the world: instructions with two responses each, in three splits that share no instruction."""

import hashlib
from random import Random
from typing import Literal

from jpo_ray.sandbox.oracle import FAMILIES, quality, task_of
from jpo_ray.sandbox.responses import respond
from jpo_ray.sandbox.tasks import Task

Split = Literal["train", "validation", "test"]

# Rows promised of each split. The families hold more instructions than this together, the small ones less than their
# share of it: the larger ones fill up.
CAPACITY: dict[Split, int] = {"train": 80_000, "validation": 10_000, "test": 10_000}
_TRIES = 8


def split_of(instruction: str) -> Split:
    """The split that the instruction belongs to, decided by its text alone: 80, 10 and 10 percent."""
    bucket = hashlib.sha256(instruction.encode()).digest()[0] % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def draw_instruction(rng: Random) -> str:
    """A random instruction of a random family, of any split."""
    return rng.choice(FAMILIES).draw(rng)


def make_rows(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows with the texts `instruction`, `response_0`, `response_1`.

    Validation and test rows have also `gold_response`, the better of the two by noise-free quality (`response_0` where
    they are equal). Instructions are distinct and never shared between splits, whatever seeds and counts; the same
    arguments give the same rows. ValueError for an unknown split, a negative count or one beyond what the world has.
    """
    if split not in CAPACITY:
        raise ValueError(f"unknown split {split!r}: use train, validation or test")
    if not 0 <= count <= CAPACITY[split]:
        raise ValueError(f"cannot make {count} {split} rows: the sandbox has 0 to {CAPACITY[split]} of them")
    rng = Random(f"{split}-{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        instruction = draw_instruction(rng)
        if instruction not in rows and split_of(instruction) == split:
            rows[instruction] = _row(split, instruction, rng)
    return list(rows.values())


def _row(split: Split, instruction: str, rng: Random) -> dict[str, str]:
    first, second = _two_responses(task_of(instruction), rng)
    row = {"instruction": instruction, "response_0": first, "response_1": second}
    if split != "train":
        row["gold_response"] = second if quality(instruction, second) > quality(instruction, first) else first
    return row


def _two_responses(task: Task, rng: Random) -> tuple[str, str]:
    """Two independent responses; the second is drawn again while it repeats the first."""
    first = respond(task, rng)
    second = respond(task, rng)
    for _ in range(_TRIES):
        if second != first:
            break
        second = respond(task, rng)
    return first, second
