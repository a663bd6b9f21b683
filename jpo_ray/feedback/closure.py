"""Closure of a graph of comparisons: preferences between items that nobody compared, implied by fitted strengths."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
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


def judged_edges(pairs: pa.Table, judgments: pa.Table, split: str) -> pa.Table:
    """Columns item_a, item_b and verdict of the valid judgments of a split. KeyError for one of a pair not there."""
    place = pc.index_in(judgments["pair_id"], value_set=pairs["pair_id"])
    if place.null_count:
        raise KeyError(judgments["pair_id"].filter(pc.is_null(place))[0].as_py())
    of_pair = pairs.select(["item_a", "item_b", "split"]).take(place)
    found = of_pair.select(["item_a", "item_b"]).append_column("verdict", judgments["verdict"])
    valid = pc.is_in(judgments["verdict"], value_set=pa.array(list(OUTCOMES)))
    found = found.filter(pc.and_(valid, pc.equal(of_pair["split"], split)))
    return pa.table([column.dictionary_encode() for column in found.columns], names=found.column_names)


def item_graph(edges: pa.Table) -> ItemGraph:
    """The graph of `judged_edges`; items are numbered as they come."""
    ends = pc.cast(edges["item_a"], pa.string()), pc.cast(edges["item_b"], pa.string())
    each = pa.chunked_array([*ends[0].chunks, *ends[1].chunks], pa.string())
    in_turn = np.arange(2 * len(edges)).reshape(2, -1).T.ravel()  # a, b, a, b, ...
    ids = each.take(in_turn).unique()
    first, second = (pc.index_in(end, value_set=ids).to_numpy().astype(np.int64) for end in ends)
    outcome = np.zeros(len(edges), dtype=np.int64)
    for verdict, value in OUTCOMES.items():
        outcome[pc.equal(pc.cast(edges["verdict"], pa.string()), verdict).to_numpy().astype(bool)] = value
    return ItemGraph(ids.to_pylist(), first, second, outcome)


def implied_table(
    graph: ItemGraph, fitted: Strengths, items: pa.Table, per_item: int, min_probability: float, seed: int
) -> pa.Table:
    """Rows of `records.PREFERENCES` for the training split, with the fitted probability as their soft label."""
    winner, loser, probability = implied_preferences(
        graph, fitted, per_item=per_item, min_probability=min_probability, seed=seed
    )
    ids = pa.array(graph.ids, pa.string())
    instruction = items["instruction_id"].take(pc.index_in(ids, value_set=items["item_id"]))
    same = pc.equal(instruction.take(winner), instruction.take(loser))
    count = len(winner)
    columns = {
        "chosen": ids.take(pa.array(winner)),
        "rejected": ids.take(pa.array(loser)),
        "protocol": pc.if_else(same, "conditional", "joint"),
        "weight": np.ones(count, dtype=np.float32),
        "probability": probability.astype(np.float32),
        "gap": pa.nulls(count, pa.float32()),
        "split": pa.repeat("train", count),
    }
    return pa.table(columns, schema=records.PREFERENCES)


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
