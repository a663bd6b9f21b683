"""Cutting an epoch into batches: every number exactly once, reshuffled each epoch, a function of seed and epoch.

`pairs` gives independent comparisons (the paper's way). `graph` groups comparisons that share items: an item is scored
once per batch however many comparisons it is part of, so a batch costs its distinct items, not its comparisons. `lists`
keeps all comparisons of an instruction together; `phased` puts easy ones first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
MakeBatches = Callable[..., list[Ints]]  # of first and second item of each edge, limits, seed and epoch


@dataclass(frozen=True)
class Limits:
    """What a batch holds at most: comparisons, and tokens of its distinct items, where they are limited."""

    comparisons: int
    tokens: int | None = None
    lengths: Ints | None = None  # of each item, in tokens; needed for the limit of tokens


def shuffled(count: int, per_step: int, seed: int, epoch: int) -> list[Ints]:
    """A permutation of 0..count-1 cut into batches of `per_step`; the last one may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[start : start + per_step] for start in range(0, count, per_step)]


def pairs(first: Ints, second: Ints, limits: Limits, seed: int, epoch: int) -> list[Ints]:
    """Edges (first[i], second[i]) in random order: int64[E] in, the numbers of each batch's edges out."""
    if limits.tokens is None or limits.lengths is None:
        return shuffled(len(first), limits.comparisons, seed, epoch)
    batches: list[list[int]] = [[]]
    members: set[int] = set()
    for edge in np.random.default_rng([seed, epoch]).permutation(len(first)).tolist():
        ends = {int(first[edge]), int(second[edge])}
        tokens = sum(int(limits.lengths[item]) for item in members | ends)
        if batches[-1] and (len(batches[-1]) == limits.comparisons or tokens > limits.tokens):
            batches.append([])
            members = set()
        batches[-1].append(edge)
        members |= ends
    return [np.array(batch, dtype=np.int64) for batch in batches if batch]


def graph(first: Ints, second: Ints, limits: Limits, seed: int, epoch: int) -> list[Ints]:
    """Batches within the same limits as `pairs` makes them, but of edges that have few distinct items.

    A batch grows from a random edge: the outside item with most remaining edges into the batch joins it, ties at
    random, and brings these edges along; where none is connected, another random edge starts anew.
    """
    rng = np.random.default_rng([seed, epoch, 0x6772])
    starts = rng.permutation(len(first)).tolist()
    rank = rng.random(int(max(first.max(initial=-1), second.max(initial=-1))) + 1)
    items, numbers = np.unique(np.stack([first, second]), return_inverse=True)
    ends: Ints = numbers.reshape(2, -1)
    cost = [0] * len(items) if limits.lengths is None else limits.lengths[items].tolist()
    most = math.inf if limits.tokens is None else limits.tokens
    grown = _Growing(ends, rng.permutation(len(first)), rank[items])
    batches: list[Ints] = []
    while True:
        joining = grown.next_item()
        if joining is None:
            while starts and grown.taken[starts[-1]]:
                starts.pop()
            if not starts:
                break
            joining = next(end for end in ends[:, starts[-1]].tolist() if not grown.inside[end])
        if grown.count and grown.tokens + cost[joining] > most:
            batches.append(grown.cut())
            continue
        grown.add(joining, cost[joining], limits.comparisons)
        if grown.count == limits.comparisons:
            batches.append(grown.cut())
    if grown.count:
        batches.append(grown.cut())
    return [batches[place] for place in rng.permutation(len(batches))]


def lists(list_of: Ints, first: Ints, second: Ints, limits: Limits, seed: int, epoch: int) -> list[Ints]:
    """Batches of whole lists, within the same limits: all edges of equal `list_of`, int64[E], come together.

    A list that is larger than the limits is a batch of its own.
    """
    names, number = np.unique(list_of, return_inverse=True)
    edges_of = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
    batches: list[list[Ints]] = []
    edges = tokens = 0
    for place in np.random.default_rng([seed, epoch, 0x6C69]).permutation(len(names)).tolist():
        whole = edges_of[place]
        members = np.unique(np.concatenate([first[whole], second[whole]]))
        cost = 0 if limits.lengths is None else int(limits.lengths[members].sum())
        too_long = limits.tokens is not None and tokens + cost > limits.tokens
        if not batches or too_long or edges + len(whole) > limits.comparisons:
            batches.append([])
            edges = tokens = 0
        batches[-1].append(whole)
        edges, tokens = edges + len(whole), tokens + cost
    return [np.concatenate(batch) for batch in batches]


def phased(
    difficulty: npt.NDArray[np.floating], phases: int, make: MakeBatches, first: Ints, second: Ints, *how: Any
) -> list[Ints]:
    """Batches that `make` cuts from equal shares of the edges, one share after the other, the easiest first.

    `difficulty` float[E] grows with it.
    """
    found: list[Ints] = []
    for share in np.array_split(np.argsort(difficulty, kind="stable"), phases):
        found += [share[batch] for batch in make(first[share], second[share], *how)]
    return found


class _Growing:
    """The edges that are left, and a batch as it grows out of them: its items, and their edges.

    Each time an item joins, all its edges and all N items are looked at, as arrays: lists and a heap of numbers take
    three times as long for sparse graphs, and ten times for dense ones.
    """

    def __init__(self, ends: Ints, order: Ints, rank: npt.NDArray[np.float64]) -> None:
        """`ends` int64[2, E] of items 0..N-1, `rank` float64[N] of which the lowest comes first where as many edges
        lead to two items; an item's edges come in `order`, int64[E].
        """
        self.taken = np.zeros(len(order), dtype=bool)
        self.inside = np.zeros(len(rank), dtype=bool)
        self._begin, self._edges, self._others = _incidence(ends, len(rank), order)
        most = (int(np.diff(self._begin).max(initial=0)) + 1) * len(rank)
        self._place = np.empty(len(rank), dtype=np.int32 if most < 2**31 else np.int64)  # half as much to look at
        self._step = self._place.dtype.type(len(rank))
        self._place[np.argsort(-rank, kind="stable")] = np.arange(len(rank))
        self._begin_batch()

    def _begin_batch(self) -> None:
        self.count = self.tokens = 0
        self._members: list[int] = []
        self._parts: list[Ints] = []
        # Of each item outside: its place, and N for every edge into the batch.
        self._worth = self._place.copy()

    def next_item(self) -> int | None:
        """The outside item with most edges into the batch; None where no edge leads into it."""
        best = int(self._worth.argmax()) if self._members else -1
        return best if best >= 0 and self._worth[best] >= self._step else None

    def add(self, item: int, tokens: int, most: int) -> None:
        """Let an item join with its edges into the batch, as many as make `most` at most."""
        self._members.append(item)
        self.tokens += tokens
        self.inside[item] = True
        self._worth[item] = -1
        here = slice(self._begin[item], self._begin[item + 1])
        left = np.flatnonzero(~self.taken[self._edges[here]])
        others = self._others[here][left]
        into = self.inside[others]
        np.add.at(self._worth, others[~into], self._step)  # several may be of one item
        joined = self._edges[here][left[into]][: most - self.count]
        self.taken[joined] = True
        self._parts.append(joined)
        self.count += len(joined)

    def cut(self) -> Ints:
        """The batch's edges; the next one begins."""
        edges = np.concatenate(self._parts)
        self.inside[self._members] = False
        self._begin_batch()
        return edges


def _incidence(ends: Ints, items: int, order: Ints) -> tuple[list[int], Ints, Ints]:
    """Edges of each item, in `order`: where each item's begin, the edges, and their other ends."""
    whose, others = ends[:, order].T.ravel(), ends[::-1, order].T.ravel()
    edges = np.repeat(order, 2)
    once = np.flatnonzero((whose != others) | (np.arange(len(edges)) % 2 == 0))  # an edge of an item to itself
    by_item = once[np.argsort(whose[once], kind="stable")]
    begin = np.searchsorted(whose[by_item], np.arange(items + 1))
    return begin.tolist(), edges[by_item], others[by_item]


class Schedule:
    """The batch of each step. An epoch is cut into batches part by part, the parts in a seeded order of each epoch's.

    Epochs, and parts, may have different numbers of batches. One part at a time is in memory.
    """

    def __init__(
        self,
        part_batches: Callable[[int, int], list[Ints]],
        epochs: float,
        fixed: Sequence[int] | None,
        *,
        parts: int = 1,
        seed: int = 0,
    ) -> None:
        """`part_batches(epoch, part)` gives a part's batches.

        `fixed` are the batches of each part, where they are the same in all epochs; None: all epochs are made once.
        """
        self._make = lru_cache(maxsize=1)(part_batches)
        self._parts, self._seed = parts, seed
        self._fixed = None if fixed is None else np.array(fixed, dtype=np.int64)
        self._counts = [] if fixed is not None else [self._counted(epoch) for epoch in range(math.ceil(epochs))]
        per_epoch = [int(counts.sum()) for counts in self._counts]
        self._ends = np.cumsum(per_epoch)
        if self._fixed is not None:
            self.steps_per_epoch = int(self._fixed.sum())
            self.total_steps = total_steps(self.steps_per_epoch, epochs)
        else:  # whole epochs, and of the last its share
            self.steps_per_epoch = per_epoch[0]
            whole = sum(per_epoch[: math.floor(epochs)])
            self.total_steps = max(1, whole + math.ceil((epochs % 1) * per_epoch[-1]))

    def batch(self, step: int) -> tuple[int, Ints]:
        """The part of step `step`, and the numbers of its edges or items there."""
        if self._fixed is not None:
            epoch, place = divmod(step, self.steps_per_epoch)
            counts = self._fixed
        else:
            epoch = min(int(np.searchsorted(self._ends, step, side="right")), len(self._counts) - 1)
            place = step - (int(self._ends[epoch - 1]) if epoch else 0)
            counts = self._counts[epoch]
        order = self._order(epoch)
        ends = np.cumsum(counts[order])
        turn = int(np.searchsorted(ends, place, side="right"))
        part = int(order[turn])
        return part, self._make(epoch, part)[place - (int(ends[turn - 1]) if turn else 0)]

    def _counted(self, epoch: int) -> Ints:
        return np.array([len(self._make(epoch, part)) for part in range(self._parts)], dtype=np.int64)

    def _order(self, epoch: int) -> Ints:
        return np.random.default_rng([self._seed, epoch, 0x7368]).permutation(self._parts)


def total_steps(steps_per_epoch: int, epochs: float) -> int:
    return max(1, math.ceil(steps_per_epoch * epochs))
