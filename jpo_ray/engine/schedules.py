"""Which comparisons are trained on, in which batches: what an objective joins stays together, easy ones may be first.

The batches themselves are cut in `batches.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from jpo_ray.config_training import TrainConfig
from jpo_ray.engine import batches
from jpo_ray.engine.batches import Schedule
from jpo_ray.engine.dataset import EdgeList, EdgeShards, PreferenceData

Rows = batches.Ints  # numbers of items, or of edges


def training_edges(data: PreferenceData, config: TrainConfig, seed: int) -> EdgeShards:
    """The training edges, or a seeded subset of `max_train_comparisons`; subsets of one seed are nested.

    Of objectives that join lists, as many whole lists as fit in it, and one at least. Every shard gives its share.
    """
    return some_edges(data.train, config, seed, partial(lists_of, data) if config.joins == "lists" else None)


def some_edges(
    edges: EdgeShards, config: TrainConfig, seed: int, of_lists: Callable[[EdgeList], Rows] | None = None
) -> EdgeShards:
    """The same of `edges`, where `of_lists` says which list each belongs to, for objectives that join them."""
    limit = config.max_train_comparisons
    if limit is None or limit >= edges.count:
        return edges
    numbers, quota = _shares(edges.sizes, limit)
    order_of = [[seed, 0xED6E, number] if len(edges.sizes) > 1 else [seed, 0xED6E] for number in numbers]

    def load(place: int) -> EdgeList:
        rng = np.random.default_rng(order_of[place])
        whole = edges[numbers[place]]
        return whole.take(_subset(whole, quota[place], rng, of_lists))

    if of_lists is None:
        return EdgeShards(quota, load)
    return EdgeShards([len(load(place)) for place in range(len(numbers))], load)


def _shares(sizes: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """The shards that give edges to a subset of `limit`, and how many each: in proportion to its size.

    A larger subset takes no fewer of any (Sainte-Lague's method: the edges of a shard of n are due at (k + 1/2) / n).
    """
    of_size = np.array(sizes)
    low = np.maximum(np.floor(limit / of_size.sum() * of_size - 2), 0).astype(np.int64)  # no shard gives fewer
    due = [
        ((taken + np.arange(min(6, size - taken)) + 0.5) / size, number)
        for number, (taken, size) in enumerate(zip(low.tolist(), sizes, strict=True))
    ]
    when = np.concatenate([times for times, _ in due])
    whose = np.concatenate([np.full(len(times), number) for times, number in due])
    first = np.argsort(when, kind="stable")[: limit - int(low.sum())]
    quota = low + np.bincount(whose[first], minlength=len(sizes))
    numbers = np.flatnonzero(quota)
    return numbers.tolist(), quota[numbers].tolist()


def _subset(edges: EdgeList, limit: int, rng: np.random.Generator, of_lists: Callable[[EdgeList], Rows] | None) -> Rows:
    if of_lists is None:
        return rng.permutation(len(edges))[:limit]
    _, list_of, sizes = np.unique(of_lists(edges), return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    fitting = max(1, int((np.cumsum(sizes[order]) <= limit).sum()))
    return np.flatnonzero(np.isin(list_of, order[:fitting]))


def count_steps(sizes: Sequence[int], config: TrainConfig) -> int:
    """Steps of a training on shards of so many edges each, where batches need not be cut to count them."""
    limit = config.max_train_comparisons
    if limit is not None and limit < sum(sizes):
        _, sizes = _shares(sizes, limit)
    return batches.total_steps(sum(_steps_per_epoch(sizes, config)), config.num_train_epochs)


def _steps_per_epoch(sizes: Sequence[int], config: TrainConfig) -> list[int]:
    """Of each shard: a batch has edges of one."""
    return [math.ceil(size / config.comparisons_per_step) for size in sizes]


class EdgeSchedule:
    """Which edges each step sees: shard after shard, in an order of each epoch's, batches of one shard's edges."""

    def __init__(self, data: PreferenceData, edges: EdgeShards, config: TrainConfig, seed: int) -> None:
        self._data, self._edges, self._config = data, edges, config
        limits = batches.Limits(config.comparisons_per_step, config.max_batch_tokens, data.tokens.lengths)

        def part_batches(epoch: int, part: int) -> list[Rows]:
            some = edges[part]
            return _batch_maker(data, some, config)(some.chosen, some.rejected, limits, seed, epoch)

        fixed = _steps_per_epoch(edges.sizes, config) if config.counts_steps else None
        self._schedule = Schedule(part_batches, config.num_train_epochs, fixed, parts=len(edges.sizes), seed=seed)
        self.steps_per_epoch, self.total_steps = self._schedule.steps_per_epoch, self._schedule.total_steps

    def numbers(self, step: int) -> tuple[int, Rows]:
        """The shard of a step, and its edges' numbers there."""
        return self._schedule.batch(step)

    def batch(self, step: int) -> EdgeList:
        part, numbers = self.numbers(step)
        return weighted_by_list(self._data, self._edges[part].take(numbers), self._config)


def validation_batches(data: PreferenceData, config: TrainConfig, seed: int) -> list[Rows]:
    """The held-out edges in batches as of training, where the loss depends on them; else all at once."""
    edges = data.validation
    if config.joins in ("items", "edges"):
        return [np.arange(len(edges))]
    make = _batch_maker(data, edges, config)
    return make(edges.chosen, edges.rejected, batches.Limits(config.comparisons_per_step), seed, 0)


def _batch_maker(data: PreferenceData, edges: EdgeList, config: TrainConfig) -> batches.MakeBatches:
    """What cuts an epoch of the edges into batches."""
    if config.joins == "lists":
        return partial(batches.lists, lists_of(data, edges))
    make = {"pairs": batches.pairs, "graph": batches.graph}[config.batching]
    if config.curriculum is None:
        return make
    return partial(batches.phased, difficulty(data, edges, config.curriculum.easy), config.curriculum.phases, make)


def lists_of(data: PreferenceData, edges: EdgeList) -> Rows:
    """The list that each edge, of two responses to one instruction, belongs to."""
    return data.tokens.prompt_groups[edges.chosen]


def weighted_by_list(data: PreferenceData, edges: EdgeList, config: TrainConfig) -> EdgeList:
    """The edges; of objectives that join lists, weighted so that every list counts once: an edge by its share of the
    weights of its list. The papers take the expectation over lists, and a loss of a list stands at all its edges.
    """
    if config.joins != "lists":
        return edges
    _, list_of = np.unique(lists_of(data, edges), return_inverse=True)
    of_list = np.bincount(list_of, weights=edges.weight)
    return replace(edges, weight=(edges.weight / of_list[list_of]).astype(np.float32))


def difficulty(data: PreferenceData, edges: EdgeList, easy: str) -> npt.NDArray[np.floating]:
    """Of each edge, float[E]: how small the judge's gap is, or how much likelier per token the reference finds the
    rejected response.
    """
    if easy == "gap":
        return -edges.gap
    assert data.reference is not None
    mean = data.reference[: data.items, 1] / data.tokens.response_tokens[: data.items]
    return mean[edges.rejected] - mean[edges.chosen]
