"""How many items training steps and the reference score for comparisons: tried on a random graph of the same shape."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jpo_ray.config import JointPairs
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine import batches
from jpo_ray.engine.reading import readers

EDGES = 4_000  # of the graph that is tried; sharing depends on comparisons per item, not on how many there are


@dataclass(frozen=True)
class Shared:
    """Per comparison."""

    items: float
    instructions: float  # each is computed once for all its responses of a step, in the best case


def shared_items(entry: TrainConfig, instructions: int, conditional: int, joint: int, how: JointPairs | None) -> Shared:
    """Of an epoch over so many comparisons; instructions have two responses, joint comparisons one of them each."""
    edges = conditional + joint
    if not edges or not instructions:
        return Shared(0.0, 0.0)
    ends = _graph(instructions, conditional, joint, how)
    chosen, rejected = (np.concatenate(side) for side in zip(*ends.values(), strict=True))
    make = batches.pairs if entry.batching == "pairs" or entry.joins == "lists" else batches.graph
    items = prompts = 0
    for batch in make(chosen, rejected, batches.Limits(entry.comparisons_per_step), 0, 0):
        members = np.unique(np.concatenate([chosen[batch], rejected[batch]]))
        items += len(members)
        prompts += len(np.unique(members // 2))
    return Shared(items / len(chosen), prompts / len(chosen))


def read_items(
    entries: Sequence[TrainConfig], instructions: int, conditional: int, joint: int, how: JointPairs | None
) -> int:
    """Distinct items in what the entries read of so many comparisons; of the same graph."""
    edges = conditional + joint
    if not edges or not instructions:
        return 0
    ends = _graph(instructions, conditional, joint, how)
    scale = min(1.0, EDGES / edges)
    found: set[int] = set()
    for number, entry in enumerate(readers(entries).values()):
        first, second = (np.concatenate(side) for side in zip(*(ends[of] for of in entry.protocols), strict=True))
        drawn = np.arange(len(first))
        if entry.max_train_comparisons:
            drawn = np.random.default_rng(number).permutation(drawn)[: round(entry.max_train_comparisons * scale)]
        found |= {*first[drawn].tolist(), *second[drawn].tolist()}
    return round(len(found) / scale)


def _graph(
    instructions: int, conditional: int, joint: int, how: JointPairs | None
) -> Mapping[str, tuple[batches.Ints, batches.Ints]]:
    """Ends of comparisons by protocol, of `EDGES` at most; items are `2 * instruction` and `2 * instruction + 1`."""
    scale = min(1.0, EDGES / (conditional + joint))
    count = max(2, round(instructions * scale), round(conditional * scale))
    rng = np.random.default_rng(0)
    own = rng.permutation(count)[: round(conditional * scale)]
    return {"conditional": (2 * own, 2 * own + 1), "joint": _joint_ends(rng, count, round(joint * scale), how)}


def _joint_ends(
    rng: np.random.Generator, count: int, edges: int, how: JointPairs | None
) -> tuple[batches.Ints, batches.Ints]:
    """Items `2 * instruction` (and `+ 1`, the rejected ones of `proxy`) that are compared."""
    size = min(count, how.group_size or count) if how else count
    first = np.arange(edges) % count  # items propose in turn
    start = first // size * size
    width = np.maximum(2, np.minimum(size, count - start))
    second = start + (first - start + rng.integers(1, width)) % width
    second = np.where(second == first, (first + 1) % count, second) % count
    return 2 * first, 2 * second + int(how is not None and how.strategy == "proxy")
