"""Cutting an epoch into batches: every number exactly once, reshuffled each epoch, a function of seed and epoch.

`shuffled` gives independent ones (the paper's way). `graph` groups comparisons that share items: an item is scored
once per batch however many comparisons it is part of, so a batch costs its distinct items, not its comparisons.
"""

import heapq

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def shuffled(count: int, per_step: int, seed: int, epoch: int) -> list[Ints]:
    """A permutation of 0..count-1 cut into batches of `per_step`; the last one may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[start : start + per_step] for start in range(0, count, per_step)]


def graph(first: Ints, second: Ints, per_step: int, seed: int, epoch: int) -> list[Ints]:
    """Batches of `per_step` edges (first[i], second[i]) that have few distinct items.

    A batch grows from a random edge: the outside item with most remaining edges into the batch joins it, ties at
    random, and brings these edges along; where none is connected, another random edge starts anew. int64[E] in, the
    numbers of the edges out.
    """
    rng = np.random.default_rng([seed, epoch, 0x6772])
    starts = rng.permutation(len(first)).tolist()
    rank = rng.random(int(max(first.max(initial=-1), second.max(initial=-1))) + 1).tolist()
    edges_of = _incidence(first, second, rng)
    ends = list(zip(first.tolist(), second.tolist(), strict=True))
    taken = bytearray(len(ends))
    batches: list[Ints] = []
    batch: list[int] = []
    members: set[int] = set()
    into: dict[int, int] = {}  # outside item -> its remaining edges into the batch
    frontier: list[tuple[int, float, int]] = []
    while True:
        joining = _pop(frontier, into, members)
        if joining is None:
            while starts and taken[starts[-1]]:
                starts.pop()
            if not starts:
                break
            joining = ends[starts[-1]][0]
            if joining in members:
                joining = ends[starts[-1]][1]
        members.add(joining)
        for edge in edges_of[joining]:
            if taken[edge]:
                continue
            other = ends[edge][0] if ends[edge][1] == joining else ends[edge][1]
            if other in members:
                taken[edge] = 1
                batch.append(edge)
                if len(batch) == per_step:
                    break
            else:
                into[other] = into.get(other, 0) + 1
                heapq.heappush(frontier, (-into[other], rank[other], other))
        if len(batch) == per_step:
            batches.append(np.array(batch, dtype=np.int64))
            batch, members, into, frontier = [], set(), {}, []
    if batch:
        batches.append(np.array(batch, dtype=np.int64))
    return [batches[place] for place in rng.permutation(len(batches))]


def _incidence(first: Ints, second: Ints, rng: np.random.Generator) -> dict[int, list[int]]:
    """Edges of each item, in random order."""
    found: dict[int, list[int]] = {}
    for edge in rng.permutation(len(first)).tolist():
        for end in {int(first[edge]), int(second[edge])}:
            found.setdefault(end, []).append(edge)
    return found


def _pop(frontier: list[tuple[int, float, int]], into: dict[int, int], members: set[int]) -> int | None:
    """The outside item with most edges into the batch; entries that are out of date are dropped."""
    while frontier:
        negative, _, item = heapq.heappop(frontier)
        if item not in members and into[item] == -negative:
            return item
    return None
