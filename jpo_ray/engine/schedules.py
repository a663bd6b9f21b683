"""Which comparisons are trained on, in which batches: what an objective joins stays together, easy ones may be first.

The batches themselves are cut in `batches.py`.
"""

import math
from functools import partial

import numpy as np
import numpy.typing as npt

from jpo_ray.config import TrainConfig
from jpo_ray.engine import batches
from jpo_ray.engine.batches import Schedule
from jpo_ray.engine.dataset import EdgeList, PreferenceData
from jpo_ray.engine.step import Rows


def training_edges(data: PreferenceData, config: TrainConfig, seed: int) -> EdgeList:
    """The training edges, or a seeded subset of `max_train_comparisons`; subsets of one seed are nested.

    Of objectives that join lists, as many whole lists as fit in it, and one at least.
    """
    edges, limit = data.train, config.max_train_comparisons
    if limit is None or limit >= len(edges):
        return edges
    rng = np.random.default_rng([seed, 0xED6E])
    if config.joins != "lists":
        return edges.take(rng.permutation(len(edges))[:limit])
    _, list_of, sizes = np.unique(lists_of(data, edges), return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    fitting = max(1, int((np.cumsum(sizes[order]) <= limit).sum()))
    return edges.take(np.flatnonzero(np.isin(list_of, order[:fitting])))


def preference_schedule(data: PreferenceData, edges: EdgeList, config: TrainConfig, seed: int) -> Schedule:
    """Which of the edges each step sees."""
    make = _batch_maker(data, edges, config)
    limits = batches.Limits(config.comparisons_per_step, config.max_batch_tokens, data.tokens.lengths)

    def epoch_batches(epoch: int) -> list[Rows]:
        return make(edges.chosen, edges.rejected, limits, seed, epoch)

    fixed = math.ceil(len(edges) / limits.comparisons) if config.counts_steps else None
    return Schedule(epoch_batches, config.num_train_epochs, fixed)


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


def difficulty(data: PreferenceData, edges: EdgeList, easy: str) -> npt.NDArray[np.floating]:
    """Of each edge, float[E]: how small the judge's gap is, or how much likelier per token the reference finds the
    rejected response.
    """
    if easy == "gap":
        return -edges.gap
    assert data.reference is not None
    mean = data.reference[: data.items, 1] / data.tokens.response_tokens[: data.items]
    return mean[edges.rejected] - mean[edges.chosen]
