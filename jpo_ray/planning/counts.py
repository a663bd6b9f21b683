"""How much there is of everything: counted where the data are here, else what the config's `plan` says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.config import RunConfig
from jpo_ray.data.items import ItemTables
from jpo_ray.pairs.members import conditional_pairs, instruction_numbers, joint_wish, labelled_pairs, short_items
from jpo_ray.planning.lengths import COUNTED, STATED, UNKNOWN, Number, Tokens, count_tokens, product, whole
from jpo_ray.planning.tokenizing import PlainTokenizer

COMPARED = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """Of one split; None: not known."""

    origin: str
    instructions: int | None = None
    items: int | None = None
    conditional: int | None = None  # pairs
    joint: int | None = None
    golds: int | None = None  # instructions with a gold response
    short: int | None = None  # items that pairs.max_item_characters leaves: those that may be compared


@dataclass(frozen=True)
class Counts:
    splits: Mapping[str, Split]
    fine_tuning: int | None  # items
    preferences: Mapping[str, int | None]  # decisive training comparisons by protocol
    preferences_origin: str
    tokens: Tokens


def total(values: Sequence[Number]) -> int | None:
    """None where one of them is not known."""
    return None if any(value is None for value in values) else sum(int(value or 0) for value in values)


def count_all(
    config: RunConfig, tables: ItemTables | None, counted: set[str], tokenizer: PlainTokenizer | None
) -> Counts:
    """`tables` hold the splits `counted`; the others are what `plan` says of them. A split without sources is empty."""
    items, labels = (tables.items, tables.labels.to_pylist()) if tables else (None, [])
    short = None if items is None else short_items(items, config.pairs.max_item_characters, config.model)
    splits: dict[str, Split] = {}
    for split in ("train", "validation", "test"):
        if split in counted and items is not None and short is not None:
            splits[split] = _counted_split(config, split, items, short, labels)
        else:
            splits[split] = _stated_split(config, split)
    own = config.items.sft
    if "train" in counted and items is not None and not own:
        fine_tuning: int | None = len(_of(items, "train").filter(_of(items, "train")["sft"]))
    elif own and "sft" in counted and items is not None:
        fine_tuning = len(_of(items, "sft"))
    else:
        fine_tuning = config.plan.sft_items if own else splits["train"].instructions
    if config.judge.annotator == "labels" and "train" in counted and short is not None:
        preferences, origin = _labelled(config, short, labels, splits["train"]), COUNTED
    else:
        preferences, origin = expected_preferences(config, splits["train"])
    tokens = count_tokens(config, items, short, counted, tokenizer, fine_tuning)
    return Counts(splits, fine_tuning, preferences, origin, tokens)


def _of(items: pa.Table, split: str) -> pa.Table:
    return items.filter(pc.equal(items["split"], split))


def _counted_split(
    config: RunConfig, split: str, items: pa.Table, short: pa.Table, labels: Sequence[dict[str, Any]]
) -> Split:
    here, rows = _of(items, split), _of(short, split).to_pylist()
    conditional = joint = 0
    if split in COMPARED:
        conditional = len(conditional_pairs(instruction_numbers(rows))[0]) if config.pairs.conditional else 0
        joint = _joint_pairs(config, split, rows, labels)
    return Split(
        COUNTED,
        instructions=len(pc.unique(here["instruction_id"])),
        items=len(here),
        conditional=conditional,
        joint=joint,
        golds=len(pc.unique(here.filter(here["gold"])["instruction_id"])),
        short=len(rows),
    )


def _joint_pairs(config: RunConfig, split: str, rows: list[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> int:
    """The labelled ones and the budget; a band or limits may leave fewer."""
    if config.pairs.joint is None or not rows:
        return 0
    labelled = {frozenset(pair) for pair in zip(*(ends.tolist() for ends in labelled_pairs(rows, labels)), strict=True)}
    wish = joint_wish(config.pairs.joint, rows, labels, split)
    return len(labelled) + (wish.budget if wish else 0)


def _stated_split(config: RunConfig, split: str) -> Split:
    """By the numbers of `plan`. A split without sources is empty."""
    if not getattr(config.items, split):
        return Split(COUNTED, 0, 0, 0, 0, 0, 0)
    plan, joint = config.plan, config.pairs.joint
    instructions: int | None = getattr(plan, f"{split}_instructions")
    if instructions is None:
        return Split(UNKNOWN)
    short = plan.short_items if config.pairs.max_item_characters else 1.0
    responses = plan.responses_per_instruction if split in COMPARED else 1
    conditional = 0
    joint_pairs: int | None = 0
    if split in COMPARED:
        both = responses * (responses - 1) // 2 if config.pairs.conditional else 0
        conditional = round(instructions * both * short)
        if joint:
            asked = joint.budget if split == "train" else joint.validation_budget
            stated = plan.joint_labels if joint.strategy == "labelled" else plan.joint_labels or 0
            labelled = whole(product(stated, short**2)) if split == "train" else 0
            wished = 0 if joint.strategy == "labelled" else asked or round(instructions * short)
            joint_pairs = total([labelled, wished])
    items = instructions * responses
    return Split(STATED, instructions, items, conditional, joint_pairs, instructions, round(items * short))


def _labelled(
    config: RunConfig, short: pa.Table, labels: Sequence[dict[str, Any]], train: Split
) -> dict[str, int | None]:
    """Training pairs that a label decides; `proxy` pairs are decided by the labels of their instructions."""
    rows = _of(short, "train").to_pylist()
    instruction_of = {row["item_id"]: row["instruction_id"] for row in rows}
    found = {"conditional": 0, "joint": 0}
    for label in labels:
        ends = [instruction_of.get(label[side]) for side in ("item_a", "item_b")]
        if None not in ends and label["verdict"] != "tie":
            found["conditional" if ends[0] == ends[1] else "joint"] += 1
    joint = config.pairs.joint
    if joint and joint.strategy == "proxy":
        found["joint"] = train.joint or 0
    return {
        "conditional": found["conditional"] if config.pairs.conditional else 0,
        "joint": found["joint"] if joint else 0,
    }


def expected_preferences(config: RunConfig, train: Split) -> tuple[dict[str, int | None], str]:
    """The share of the judged training pairs that is decisive; of labels, as many as `plan` says there are."""
    plan, joint = config.plan, config.pairs.joint
    if config.judge.annotator == "labels":
        short = plan.short_items if config.pairs.max_item_characters else 1.0
        conditional = whole(product(plan.conditional_labels, short)) if config.pairs.conditional else 0
        by_proxy = joint is not None and joint.strategy == "proxy"
        stated = whole(product(plan.joint_labels, short**2)) if joint else 0
        labelled = {"conditional": conditional, "joint": train.joint if by_proxy else stated}
        if None in labelled.values():
            return labelled, UNKNOWN
        return labelled, f"{STATED}, joint ones derived from the instructions' own" if by_proxy else STATED
    selection, closure = config.judge.selection, config.judge.closure
    judged = train.joint if selection is None or train.joint is None else min(selection.budget, train.joint)
    found = {
        "conditional": whole(product(train.conditional, plan.decisive)),
        "joint": whole(product(judged, plan.decisive)),
    }
    if closure and found["joint"] is not None and train.items is not None:
        found["joint"] += train.items * closure.per_item // 2
    return found, f"{plan.decisive:.0%} of the judged ones"
