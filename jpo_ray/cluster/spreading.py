"""The pairs to compare, where they are too many for one memory: chosen tile by tile of the item matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jpo_ray.cluster.joint_problem import JointProblem, check_limits, too_few
from jpo_ray.cluster.pairing import make_plan
from jpo_ray.cluster.shards import map_shards
from jpo_ray.cluster.tiles import Tiles
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.pairs import spread
from jpo_ray.pairs.selection import candidates_per_row
from jpo_ray.pairs.sides import Ints
from jpo_ray.pairs.spread import End
from jpo_ray.pairs.strategies import STRATEGIES
from jpo_ray.pairs.tiling import Spool

TileOf = Callable[[Ints, Ints], Ints]


def spread_pairs(
    ray: Any,
    cluster: ClusterConfig,
    problem: JointProblem,
    bar: Any,
    parts: Path,
    spool: Path,
    tile_of: TileOf,
    tiles: int,
) -> tuple[Spool, End | None, dict[str, Any]]:
    """Where the candidates of each tile are, where the choice among them ends (`spread.taken` gives a tile's pairs),
    and what to tell about it. The same pairs as `joint_pairs` chooses; see `can_spread` for what cannot be.

    `tile_of(rows, columns)` is the tile of each pair, whichever of its ends is the row. This process holds the
    candidates of one task at a time. Raises `InputError` where there are too few pairs.
    """
    rows, columns, budget = problem.rows, problem.columns, problem.limits.budget
    check_limits(problem, len(rows) if problem.symmetric else len(rows) + len(columns))
    keep = min(candidates_per_row(budget, len(rows), 1), len(columns))
    found = Tiles(ray, rows, columns, problem.vectors, bar, parts, problem.timeout_s)
    plan_of, exact, notes = make_plan(found, problem, problem.search(keep))
    while True:
        kept, full = Spool(spool, spread.FIELDS), False
        for some in found.stream(plan_of(np.arange(len(rows))), problem.search(keep)):
            kept.add(tile_of(some.row.astype(np.int64), some.column.astype(np.int64)), spread.ranked(some))
            full |= bool((np.bincount(some.row) == keep).any())
        each = ((part, problem.symmetric) for part in kept.each(tiles))
        counts = spread.summed(map_shards(ray, cluster, "pairs", _counts, each))
        if counts.sum() >= budget or not full or keep == len(columns):
            break
        keep = min(2 * keep, len(columns))  # the band leaves too few of them: longer lists
    if counts.sum() <= budget:
        if counts.sum() < budget and not problem.at_most:
            raise too_few(problem, int(counts.sum()), exact=exact)
        return kept, None, notes
    rank, of_it = spread.last_rank(counts, budget)
    each_of_rank = ((part, rank, problem.symmetric) for part in kept.each(tiles))
    ends = list(map_shards(ray, cluster, "pairs", _of_rank, each_of_rank))
    return kept, spread.end_of(rank, of_it, ends), notes


def spreads(problem: JointProblem) -> bool:
    """Whether the choice can be made tile by tile."""
    strategy = STRATEGIES[problem.config.strategy]
    return spread.can_spread(problem.limits, problem.config.bins if strategy.bins else 1)


def _counts(rows: spread.Rows, symmetric: bool) -> Ints:
    return spread.count_by_rank(rows, symmetric=symmetric)


def _of_rank(rows: spread.Rows, rank: int, symmetric: bool) -> spread.Found:
    return spread.of_rank(rows, rank, symmetric=symmetric)
