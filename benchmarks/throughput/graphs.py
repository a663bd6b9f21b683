"""Which items are compared: the graphs of the benchmark, as arrays (first[i], second[i]) of int64."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def circulant_groups(items: int, group: int, degree: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Random groups of `group` items, each item compared with its `degree` nearest on a circle of its group.

    Every group has `group * degree / 2` comparisons. Items that fill no group are left out. ValueError for a degree
    that is odd or too large for distinct pairs.
    """
    if degree % 2 or not 0 < degree < group:
        raise ValueError(f"degree {degree} must be even and below the group's {group} items")
    groups = rng.permutation(items)[: items // group * group].reshape(-1, group)
    offsets = range(1, degree // 2 + 1)
    first = np.concatenate([members for members in groups for _ in offsets])
    second = np.concatenate([np.roll(members, -offset) for members in groups for offset in offsets])
    return first.astype(np.int64), second.astype(np.int64)


def random_partners(items: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Each item with another one drawn at random, no pair twice: as many comparisons as items, the paper's D_H."""
    if items < 4:
        raise ValueError(f"{items} items are too few for as many distinct pairs")
    seen: set[tuple[int, int]] = set()
    partners = np.empty(items, dtype=np.int64)
    for item in range(items):
        other = item
        while other == item or (min(item, other), max(item, other)) in seen:
            other = int(rng.integers(items))
        seen.add((min(item, other), max(item, other)))
        partners[item] = other
    return np.arange(items, dtype=np.int64), partners


def shuffle_sides(first: Ints, second: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The same pairs with a random one of the two chosen."""
    swap = rng.random(len(first)) < 0.5
    return np.where(swap, second, first), np.where(swap, first, second)
