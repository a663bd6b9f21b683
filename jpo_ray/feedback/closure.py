"""Closure of a graph of comparisons: preferences between items that nobody compared, implied by fitted strengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray.feedback.strengths import GraphFacts, Strengths, components

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DRAWS = 8  # partners looked at for each one that is wanted
RELIABLE = 0.5  # below, strengths are more guess than knowledge
OUTCOMES = {"a": 1, "tie": 0, "b": -1}


@dataclass(frozen=True)
class ItemGraph:
    """Judged pairs of one split by item number: `outcome` int64[E] is 1 where `first` won, -1 `second`, 0 a tie."""

    ids: list[str]
    first: Ints
    second: Ints
    outcome: Ints

    def table(self, fitted: Strengths, split: str) -> pa.Table:
        """Rows of `records.STRENGTHS`."""
        compared = np.bincount(np.concatenate([self.first, self.second]), minlength=len(self.ids))
        columns = {"item_id": self.ids, "split": [split] * len(self.ids), "strength": fitted.strength}
        return pa.table(columns | {"standard_error": fitted.standard_error, "comparisons": compared.astype(np.int32)})


def item_graph(pairs: pa.Table, judgments: Sequence[dict[str, Any]], split: str) -> ItemGraph:
    """The valid judgments of a split. KeyError for a judgment of a pair that `pairs` lacks."""
    of_pair = {row["pair_id"]: row for row in pairs.select(["pair_id", "item_a", "item_b", "split"]).to_pylist()}
    valid = [row for row in judgments if row["verdict"] in OUTCOMES and of_pair[row["pair_id"]]["split"] == split]
    ends = [(of_pair[row["pair_id"]]["item_a"], of_pair[row["pair_id"]]["item_b"]) for row in valid]
    number = {item: place for place, item in enumerate(dict.fromkeys(item for pair in ends for item in pair))}
    return ItemGraph(
        list(number),
        np.array([number[a] for a, _ in ends], dtype=np.int64),
        np.array([number[b] for _, b in ends], dtype=np.int64),
        np.array([OUTCOMES[row["verdict"]] for row in valid], dtype=np.int64),
    )


def implied_rows(
    graph: ItemGraph, fitted: Strengths, items: pa.Table, per_item: int, min_probability: float, seed: int
) -> list[dict[str, Any]]:
    """Rows of `records.PREFERENCES` for the training split, with the fitted probability as their soft label."""
    winner, loser, probability = implied_preferences(
        graph, fitted, per_item=per_item, min_probability=min_probability, seed=seed
    )
    instruction_of = dict(zip(items["item_id"].to_pylist(), items["instruction_id"].to_pylist(), strict=True))
    rows = []
    for better, worse, sure in zip(winner.tolist(), loser.tolist(), probability.tolist(), strict=True):
        chosen, rejected = graph.ids[better], graph.ids[worse]
        same = instruction_of[chosen] == instruction_of[rejected]
        row = {"chosen": chosen, "rejected": rejected, "protocol": "conditional" if same else "joint"}
        rows.append(row | {"weight": 1.0, "probability": sure, "split": "train"})
    return rows


def implied_preferences(
    graph: ItemGraph, fitted: Strengths, *, per_item: int, min_probability: float, seed: int
) -> tuple[Ints, Ints, Floats]:
    """Pairs that nobody judged, decided by the fit: winner int64[P], loser int64[P], probability float64[P].

    Each item draws random partners of its own component (items that no chain of comparisons connects cannot be
    compared) and keeps the first `per_item` of those about which the fit is sure, `min_probability` or more. A pair
    comes once, whichever of its items drew it.
    """
    count = len(graph.ids)
    component = components(count, graph.first, graph.second)
    members = np.argsort(component, kind="stable")  # those of a component stand together
    sizes = np.bincount(component)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    draws = np.random.default_rng([seed, 0xC105]).random((count, DRAWS * per_item))
    items = np.repeat(np.arange(count), draws.shape[1])
    partners = members[starts[component[items]] + (draws.ravel() * sizes[component[items]]).astype(np.int64)]
    probability = fitted.win_probability(items, partners)
    pair = _pair_number(items, partners, count)
    sure = (np.maximum(probability, 1 - probability) >= min_probability) & (items != partners)
    sure &= ~np.isin(pair, _pair_number(graph.first, graph.second, count))
    drawn = np.flatnonzero(sure)
    drawn = np.sort(drawn[np.unique(pair[drawn], return_index=True)[1]])
    owner = items[drawn]
    kept = drawn[np.arange(len(owner)) - np.searchsorted(owner, owner) < per_item]
    wins = probability[kept] >= 0.5
    winner, loser = np.where(wins, items[kept], partners[kept]), np.where(wins, partners[kept], items[kept])
    return winner, loser, np.where(wins, probability[kept], 1 - probability[kept])


def warning(facts: GraphFacts, fitted: Strengths) -> str | None:
    """What is wanting in the judgments for a closure; None where nothing is."""
    if facts.components > 1:
        return (
            f"the judged pairs fall into {facts.components} components (the largest has {facts.largest_component} of "
            f"{facts.items} items), which nothing compares with each other; judge more joint pairs"
        )
    if fitted.reliability < RELIABLE:
        return (
            f"{facts.per_item:.1f} judgments per item explain {fitted.reliability:.0%} of the differences between "
            "items: too few, or too noisy; judge more pairs"
        )
    return None


def _pair_number(first: Ints, second: Ints, count: int) -> Ints:
    number: Ints = np.minimum(first, second) * count + np.maximum(first, second)
    return number
