"""Items and ready-made labels out of the rows of all sources.

D of the paper has each instruction once per source; an instruction lives in one split only; D_S (the `sft` flag) has
one response per instruction of the train and validation splits, and all that fine-tuning has of its own (split `sft`).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jpo_ray import records
from jpo_ray.data.formats import LabelVerdict, Row
from jpo_ray.data.sources import SourceRows

NOWHERE = ""  # the split of an instruction that is left out
_SFT_SPLITS = ("sft", "train", "validation")
_GOLD_SPLITS = ("validation", "test")
_ITEM_COLUMNS = ("instruction_id", "instruction", "response", "source", "split")
_Use = dict[str, dict[str, None]]
_MIRRORED: dict[LabelVerdict, LabelVerdict] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class ItemTables:
    items: pa.Table  # records.ITEMS, by split, then in the order of first appearance
    labels: pa.Table  # records.LABELS, in the same order
    ratings: pa.Table  # records.RATINGS, in the same order
    counts: dict[str, int]  # for people; see `build_items`


@dataclass(frozen=True, slots=True)
class _Placed:
    """A row that takes part, and where it stands."""

    split: str
    source: str
    source_number: int
    row: Row
    instruction_ids: tuple[str, ...]  # of row.items


@dataclass(frozen=True, slots=True)
class _Label:
    item_a: str
    item_b: str
    verdict: LabelVerdict
    instruction_id: str | None  # None where the two differ


@dataclass
class _Found:
    """What the rows hold. The uses map instruction ids to ordered sets (dicts without values) of item ids."""

    homes: Mapping[str, str]  # instruction id -> the one split it is kept in
    items: dict[str, tuple[str, str, str, str, str]] = field(default_factory=dict)  # id -> `_ITEM_COLUMNS`
    sft: _Use = field(default_factory=dict)  # responses given for SFT
    golds: _Use = field(default_factory=dict)  # responses given as gold
    responses: _Use = field(default_factory=dict)  # all other responses
    labels: list[_Label] = field(default_factory=list)
    ratings: dict[str, list[float]] = field(default_factory=dict)  # item id -> all that were given


def build_items(
    rows: Mapping[str, Sequence[SourceRows]], seed: int, without: Mapping[str, Collection[str]] | None = None
) -> ItemTables:
    """Merge the rows of each split's sources into items and labels, leaving out the instructions of `without`: ids by
    the reason, under which they are counted.

    An instruction that occurs in several splits stays in the most protected one: test, else validation. The response of
    D_S is the one that an SFT source gives, else one of the instruction's responses, drawn by a hash of `seed` and the
    instruction, so that neither order nor other rows matter. The gold response of a validation or test instruction is
    the one that the data give, else the chosen one of its first decisive label. `counts` has `<split>_instructions`,
    `<split>_items`, `<split>_sft`, `<split>_gold`, `<split>_without_gold` (instructions), and over all splits

    - `conditional_labels`, `joint_labels`: rows of the labels table; `tie_labels`: the ties among them
    - `skipped`: bad rows left out while reading
    - `repeated`: rows dropped because an earlier row of their source has the instruction
    - `merged`: times that an instruction was met again in another source of its split
    - `leaked`: times that an instruction was taken out of a split because a more protected one has it
    - `near_duplicates`, `too_long`: instructions of `without`
    - `leaked_labels`: labels dropped because an item was taken out
    - `identical_labels`: labels dropped because they compare an item with itself
    - `repeated_labels`: labels given again; `contradictory`: pairs dropped because their labels disagree
    - `rated`: items with a rating, the mean of all that they were given
    """
    counts: Counter[str] = Counter({"skipped": 0})
    for source in (source for split in rows.values() for source in split):
        counts["skipped"] += sum(source.skipped.values())
        counts.update({f"skipped: {reason}": number for reason, number in source.skipped.items()})
    placed = list(_distinct_rows(rows, counts))
    homes = _homes(placed, counts)
    counts.update(near_duplicates=0, too_long=0)
    for reason, ids in (without or {}).items():
        homes |= dict.fromkeys(ids, NOWHERE)
        counts[reason] = len(ids)
    found = _collect(placed, homes, counts)
    labels = _settle(found.labels, counts)
    sft = _choose_sft(found, seed)
    gold = _choose_gold(found, labels)
    _count(found, labels, sft, gold, counts)
    counts["rated"] = len(found.ratings)
    return ItemTables(_items_table(found, sft, gold), _labels_table(labels), _ratings_table(found), dict(counts))


def _distinct_rows(rows: Mapping[str, Sequence[SourceRows]], counts: Counter[str]) -> Iterator[_Placed]:
    """Rows by split and source, without those about an instruction that their source has had already.

    A row that compares two instructions always stays: an instruction may occur in many of them.
    """
    counts["repeated"] = 0
    sources = [(split, source) for split in records.SPLITS for source in rows.get(split, ())]
    for number, (split, source) in enumerate(sources):
        seen: set[str] = set()
        for row in source.rows:
            first = records.instruction_id(row.items[0][0])
            same = row.items[-1][0] == row.items[0][0]
            if same and first in seen:
                counts["repeated"] += 1
                continue
            if same:
                seen.add(first)
            ids = (first,) * len(row.items) if same else (first, records.instruction_id(row.items[-1][0]))
            yield _Placed(split, source.name, number, row, ids)


def _homes(placed: Iterable[_Placed], counts: Counter[str]) -> dict[str, str]:
    """The most protected split that each instruction occurs in."""
    met = {(identity, entry.split) for entry in placed for identity in entry.instruction_ids}
    homes: dict[str, str] = {}
    for identity, split in met:
        homes[identity] = max(split, homes.get(identity, split), key=records.SPLITS.index)
    counts["leaked"] = len(met) - len(homes)
    return homes


def _collect(placed: Iterable[_Placed], homes: Mapping[str, str], counts: Counter[str]) -> _Found:
    """Items and labels of the rows whose instructions are at home in their split."""
    found = _Found(homes)
    last_source: dict[str, int] = {}
    counts.update(merged=0, leaked_labels=0, identical_labels=0)
    for entry in placed:
        for identity in set(entry.instruction_ids):
            if homes[identity] == entry.split:
                counts["merged"] += last_source.get(identity, entry.source_number) != entry.source_number
                last_source[identity] = entry.source_number
        item_ids = _add_row(found, entry)
        if entry.row.verdict is not None:
            _add_label(found, entry, item_ids, entry.row.verdict, counts)
    return found


def _add_row(found: _Found, entry: _Placed) -> list[str | None]:
    """Add a row's items; returns their ids, None for those whose instruction is at home in another split."""
    uses = {"sft": found.sft, "messages": found.sft, "gold": found.golds}
    use = uses.get(entry.row.kind, found.responses)
    ids = entry.instruction_ids
    item_ids = [_add_item(found, entry, ids[side], item, use) for side, item in enumerate(entry.row.items)]
    for item_id, rating in zip(item_ids, entry.row.ratings, strict=False):
        if item_id is not None and rating is not None:
            found.ratings.setdefault(item_id, []).append(rating)
    if entry.row.gold is not None:
        _add_item(found, entry, ids[0], (entry.row.items[0][0], entry.row.gold), found.golds)
    return item_ids


def _add_item(found: _Found, entry: _Placed, identity: str, item: tuple[str, str], use: _Use) -> str | None:
    if found.homes[identity] != entry.split:
        return None
    item_id = records.item_id(*item)
    found.items.setdefault(item_id, (identity, *item, entry.source, entry.split))
    use.setdefault(identity, {})[item_id] = None
    return item_id


def _add_label(
    found: _Found, entry: _Placed, item_ids: Sequence[str | None], verdict: LabelVerdict, counts: Counter[str]
) -> None:
    item_a, item_b = item_ids
    if item_a is None or item_b is None:
        counts["leaked_labels"] += 1
    elif item_a == item_b:
        counts["identical_labels"] += 1
    else:
        first, second = entry.instruction_ids
        found.labels.append(_Label(item_a, item_b, verdict, first if first == second else None))


def _settle(labels: Iterable[_Label], counts: Counter[str]) -> list[_Label]:
    """One label per pair, in the order of first appearance, without the pairs whose labels disagree."""
    settled: dict[tuple[str, str], _Label] = {}
    contradictory = set()
    counts["repeated_labels"] = 0
    for label in labels:
        key = (min(label.item_a, label.item_b), max(label.item_a, label.item_b))
        first = settled.setdefault(key, label)
        if first is label:
            continue
        counts["repeated_labels"] += 1
        agrees = label.verdict if label.item_a == first.item_a else _MIRRORED[label.verdict]
        if agrees != first.verdict:
            contradictory.add(key)
    counts["contradictory"] = len(contradictory)
    return [label for key, label in settled.items() if key not in contradictory]


def _choose_sft(found: _Found, seed: int) -> set[str]:
    """Item ids of D_S: one per instruction of the train and validation splits."""
    chosen = set()
    for identity in {item[0] for item in found.items.values() if item[4] in _SFT_SPLITS}:
        candidates = found.sft.get(identity) or found.responses.get(identity) or found.golds[identity]
        digest = hashlib.sha256(f"D_S {seed} {identity}".encode()).digest()
        chosen.add(sorted(candidates)[int.from_bytes(digest[:8]) % len(candidates)])
    return chosen


def _choose_gold(found: _Found, labels: Iterable[_Label]) -> set[str]:
    """Item ids of the gold responses: at most one per instruction of the validation and test splits."""
    golds = {identity: next(iter(item_ids)) for identity, item_ids in found.golds.items()}
    for label in labels:
        if label.instruction_id is not None and label.verdict != "tie":
            golds.setdefault(label.instruction_id, label.item_a if label.verdict == "a" else label.item_b)
    return {item_id for item_id in golds.values() if found.items[item_id][4] in _GOLD_SPLITS}


def _count(found: _Found, labels: Sequence[_Label], sft: set[str], gold: set[str], counts: Counter[str]) -> None:
    homes = {item[0]: item[4] for item in found.items.values()}
    for split in records.SPLITS:
        counts[f"{split}_instructions"] = sum(home == split for home in homes.values())
        counts[f"{split}_items"] = sum(item[4] == split for item in found.items.values())
        if split in _SFT_SPLITS and split != "sft":
            counts[f"{split}_sft"] = sum(found.items[item_id][4] == split for item_id in sft)
        if split in _GOLD_SPLITS:
            counts[f"{split}_gold"] = sum(found.items[item_id][4] == split for item_id in gold)
            counts[f"{split}_without_gold"] = counts[f"{split}_instructions"] - counts[f"{split}_gold"]
    counts["conditional_labels"] = sum(label.instruction_id is not None for label in labels)
    counts["joint_labels"] = len(labels) - counts["conditional_labels"]
    counts["tie_labels"] = sum(label.verdict == "tie" for label in labels)


def _items_table(found: _Found, sft: set[str], gold: set[str]) -> pa.Table:
    table: dict[str, list[Any]] = {
        name: [item[position] for item in found.items.values()] for position, name in enumerate(_ITEM_COLUMNS)
    }
    table["item_id"] = list(found.items)
    table["sft"] = [item_id in sft for item_id in found.items]
    table["gold"] = [item_id in gold for item_id in found.items]
    return pa.Table.from_pydict(table, schema=records.ITEMS)


def _ratings_table(found: _Found) -> pa.Table:
    means = [math.fsum(given) / len(given) for given in found.ratings.values()]
    return pa.Table.from_pydict({"item_id": list(found.ratings), "rating": means}, schema=records.RATINGS)


def _labels_table(labels: Sequence[_Label]) -> pa.Table:
    columns = {name: [getattr(label, name) for label in labels] for name in records.LABELS.names}
    return pa.Table.from_pydict(columns, schema=records.LABELS)
