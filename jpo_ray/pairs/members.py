"""Which items of a split are compared, and how many pairs of them there are to be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.config import BaseModelConfig, JointPairs
from jpo_ray.data.tokens import CHAT
from jpo_ray.errors import InputError
from jpo_ray.pairs.sides import Ints

Items = list[dict[str, Any]]


@dataclass(frozen=True)
class JointWish:
    """The joint pairs of a split: `budget` of `left` with `right` (the same list, or two), or fewer where `at_most`."""

    left: Items
    right: Items
    budget: int
    at_most: bool
    config: JointPairs  # with the limits that hold in this split


def short_items(items: pa.Table, limit: int | None, model: BaseModelConfig) -> pa.Table:
    """The items of at most `limit` characters, those of the template (`chat` counts none) and prefix included."""
    if limit is None:
        return items
    template = "" if model.template == CHAT else model.template.replace("{instruction}", "")
    room = limit - len(template) - len(model.response_prefix)
    lengths = pc.add(pc.utf8_length(items["instruction"]), pc.utf8_length(items["response"]))
    return items.filter(pc.less_equal(lengths, room))


def instruction_numbers(items: Items) -> Ints:
    """The instruction of each item, int64[N], numbered in order of appearance."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(item["instruction_id"], len(number)) for item in items], dtype=np.int64)


def conditional_pairs(instructions: Ints) -> tuple[Ints, Ints]:
    """All pairs of responses of each instruction, as item numbers: int64[E] each, instruction by instruction.

    `instructions` int64[N] numbers each item's, in order of appearance.
    """
    members = np.argsort(instructions, kind="stable")
    sizes = np.bincount(instructions)
    starts = np.cumsum(sizes) - sizes
    first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for size in np.unique(sizes[sizes > 1]).tolist():
        places = starts[sizes == size]
        one, other = np.triu_indices(size, 1)
        first.append((places[:, None] + one).ravel())
        second.append((places[:, None] + other).ravel())
    low, high = np.concatenate(first), np.concatenate(second)
    order = np.lexsort((high, low, instructions[members[low]]))
    return members[low[order]], members[high[order]]


def labelled_pairs(items: Items, labels: Sequence[dict[str, Any]]) -> tuple[Ints, Ints]:
    """The joint pairs that the data have labels for, as item numbers: all of them, beside the budget and the band."""
    number = {item["item_id"]: place for place, item in enumerate(items)}
    found = []
    for label in labels:
        a, b = (number.get(label[side]) for side in ("item_a", "item_b"))
        if a is not None and b is not None and items[a]["instruction_id"] != items[b]["instruction_id"]:
            found.append((a, b))
    ends = np.array(found, dtype=np.int64).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def joint_wish(config: JointPairs, items: Items, labels: Sequence[dict[str, Any]], split: str) -> JointWish | None:
    """What `pairs.joint` asks of a split besides its labelled pairs; None where that is nothing. Raises `InputError`.

    As many pairs as D_S has items unless a budget says otherwise. In a validation split without one, limits and a band
    may leave few of its few items.
    """
    if config.strategy == "labelled":
        return None
    members = [item for item in items if item["sft"]]
    two = config.strategy == "proxy"
    left, right = _chosen_and_rejected(items, labels) if two else (members, members)
    if not left or not right:
        if split == "validation" or not two:
            return None
        raise InputError("pairs.joint.strategy: proxy needs labelled comparisons in items.train; there are none")
    asked = config.budget if split == "train" else config.validation_budget
    at_most = split == "validation" and not asked
    if at_most:
        config = config.model_copy(update={"min_per_item": 0, "connected": False})
    most = len(left) * len(right) if two else len(left) * (len(left) - 1) // 2
    budget = asked or min(most, _default_budget(config, len(members), len(left), len(right), two=two))
    return JointWish(left, right, budget, at_most, config) if budget else None


def _default_budget(config: JointPairs, items: int, left: int, right: int, *, two: bool) -> int:
    """As many pairs as D_S has items, as in the paper, or as the limits ask for or allow."""
    nodes = left + right if two else left
    wanted = max(items, -(-nodes * config.min_per_item // (1 if two else 2)), nodes - 1 if config.connected else 0)
    if config.max_per_item is None:
        return wanted
    return min(wanted, config.max_per_item * (min(left, right) if two else left) // (1 if two else 2))


def _chosen_and_rejected(items: Items, labels: Sequence[dict[str, Any]]) -> tuple[Items, Items]:
    """Items that are only ever chosen, and only ever rejected, by the ready-made labels."""
    chosen, rejected = set(), set()
    for label in labels:
        if label["verdict"] in ("a", "b"):
            winner, loser = ("item_a", "item_b") if label["verdict"] == "a" else ("item_b", "item_a")
            chosen.add(label[winner])
            rejected.add(label[loser])
    return (
        [item for item in items if item["item_id"] in chosen - rejected],
        [item for item in items if item["item_id"] in rejected - chosen],
    )
