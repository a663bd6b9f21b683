"""Cutting an epoch into batches: every number exactly once, reshuffled each epoch, a function of seed and epoch.

`pairs` gives independent comparisons (the paper's way). `graph` groups comparisons that share items: an item is scored
once per batch however many comparisons it is part of, so a batch costs its distinct items, not its comparisons. `lists`
keeps all comparisons of an instruction together; `phased` puts easy ones first.
"""

import heapq
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
    rank = rng.random(int(max(first.max(initial=-1), second.max(initial=-1))) + 1).tolist()
    cost = [0] * len(rank) if limits.lengths is None else limits.lengths[: len(rank)].tolist()
    most = math.inf if limits.tokens is None else limits.tokens
    edges_of = _incidence(first, second, rng)
    ends = list(zip(first.tolist(), second.tolist(), strict=True))
    taken = bytearray(len(ends))
    batches: list[Ints] = []
    grown = _Growing()
    while True:
        joining = grown.next_item()
        if joining is None:
            while starts and taken[starts[-1]]:
                starts.pop()
            if not starts:
                break
            joining = ends[starts[-1]][0]
            if joining in grown.members:
                joining = ends[starts[-1]][1]
        if grown.edges and grown.tokens + cost[joining] > most:
            batches.append(np.array(grown.edges, dtype=np.int64))
            grown = _Growing()
            continue
        grown.add(joining, cost[joining])
        for edge in edges_of[joining]:
            if taken[edge]:
                continue
            other = ends[edge][0] if ends[edge][1] == joining else ends[edge][1]
            if other in grown.members:
                taken[edge] = 1
                grown.edges.append(edge)
                if len(grown.edges) == limits.comparisons:
                    break
            else:
                grown.sees(other, rank[other])
        if len(grown.edges) == limits.comparisons:
            batches.append(np.array(grown.edges, dtype=np.int64))
            grown = _Growing()
    if grown.edges:
        batches.append(np.array(grown.edges, dtype=np.int64))
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
    """A batch as it grows: its items, its edges, and the outside items by their remaining edges into it."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        self.members: set[int] = set()
        self.tokens = 0
        self._into: dict[int, int] = {}
        self._frontier: list[tuple[int, float, int]] = []

    def add(self, item: int, tokens: int) -> None:
        self.members.add(item)
        self.tokens += tokens

    def sees(self, item: int, rank: float) -> None:
        """One more edge leads to the outside `item`."""
        self._into[item] = self._into.get(item, 0) + 1
        heapq.heappush(self._frontier, (-self._into[item], rank, item))

    def next_item(self) -> int | None:
        """The outside item with most edges into the batch; entries that are out of date are dropped."""
        while self._frontier:
            negative, _, item = heapq.heappop(self._frontier)
            if item not in self.members and self._into[item] == -negative:
                return item
        return None


def _incidence(first: Ints, second: Ints, rng: np.random.Generator) -> dict[int, list[int]]:
    """Edges of each item, in random order."""
    found: dict[int, list[int]] = {}
    for edge in rng.permutation(len(first)).tolist():
        for end in {int(first[edge]), int(second[edge])}:
            found.setdefault(end, []).append(edge)
    return found


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
