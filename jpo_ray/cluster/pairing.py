"""The pairs to compare: candidates of every item, and the choice among them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray.cluster.joint_problem import (
    JointProblem,
    check_least,
    check_limits,
    how_to_mend,
    limits_text,
    too_few,
)
from jpo_ray.cluster.tiles import TIMEOUT_S, SharedVectors, Tiles
from jpo_ray.config import JointPairs
from jpo_ray.errors import InputError
from jpo_ray.pairs.candidates import Candidates, Search, joined
from jpo_ray.pairs.clusters import cluster
from jpo_ray.pairs.plans import Exact, Parts, Plan, by_row, grouped, numbered
from jpo_ray.pairs.selection import candidates_per_row, select
from jpo_ray.pairs.sides import Ints, Side, random_groups, rank_in_run
from jpo_ray.pairs.strategies import STRATEGIES, uniform

CLUSTER_SIZE = 256  # of approximate candidates: rows that meet the same columns
MOST_CANDIDATES = 2**26  # that longer lists may hold: 1.1 GiB
MOST_NEAR = 64  # clusters that a row may meet
SAMPLED_ROWS = 256  # on which recall is measured
SAMPLED_COLUMNS = 4096  # that a cluster's rows meet at random, at least

JOINING_ITEMS = 4096  # that look for them where not all pairs can be looked at
JOINING = 2  # partners in other parts of the graph that an item looks for

PlanOf = Callable[[Ints], Plan]


@dataclass(frozen=True)
class JointChoice:
    pairs: pa.Table  # columns row, column (numbers into the sides), similarity
    notes: dict[str, Any]  # how candidates were found, where not by all pairs


def joint_pairs(ray: Any, problem: JointProblem, bar: Any, parts: Path | None = None) -> JointChoice:
    """Exactly the budgeted number of pairs (`at_most`: no more than it, as many as there are).

    Candidates are tasks of Ray Data over vectors shared through the object store; `parts` is a folder that keeps what
    each task found, for a run that is killed and started again. Raises `InputError` where the band, the limits or the
    groups leave too few pairs. Progress counts tasks.
    """
    rows, columns, limits = problem.rows, problem.columns, problem.limits
    nodes, columns_from = (len(rows), 0) if problem.symmetric else (len(rows) + len(columns), len(rows))
    check_limits(problem, nodes)
    bins = problem.config.bins if STRATEGIES[problem.config.strategy].bins else 1
    keep = min(candidates_per_row(limits.budget, len(rows), bins), len(columns))
    search = problem.search(keep, bins)
    tiles = Tiles(ray, rows, columns, problem.vectors, bar, parts, problem.timeout_s)
    plan_of, exact, notes = make_plan(tiles, problem, search)
    found = tiles.run(plan_of(np.arange(len(rows))), search)
    kept = np.full(len(rows), keep)  # candidates of each row and bin that were kept
    more: list[Candidates] = []  # pairs that join what would fall apart, or that columns look for
    if exact and not problem.symmetric and (limits.min_per_item or limits.connected):
        wanted = min(candidates_per_row(limits.budget, len(columns), bins), len(rows))
        more.append(
            tiles.run(_turned_plan(problem, np.arange(len(columns))), replace(search, keep=wanted), turned=True)
        )
    graph_parts, before = nodes + 1, None
    while True:
        every = by_row(replace(joined([found, *more], bins), in_band=found.in_band)) if more else found
        chosen = select(every, nodes, columns_from, limits)
        if chosen.parts.any():
            more += _joining(tiles, problem, search, chosen.parts, fewer_than=graph_parts, exact=exact)
            graph_parts = 1 + int(chosen.parts.max())
            continue
        missing = limits.budget - len(chosen.numbers)
        shares = np.bincount(every.bin[chosen.numbers], minlength=bins).tolist()
        lists = np.bincount(found.row.astype(np.int64) * bins + found.bin, minlength=len(rows) * bins)
        longer = lists.reshape(-1, bins) == np.minimum(kept, len(columns))[:, None]
        longer &= kept[:, None] < len(columns)
        if not missing:
            longer &= chosen.short
        full = chosen.degree[: len(rows)] >= (limits.max_per_item or nodes)
        deeper = np.flatnonzero(longer.any(axis=1) & ~full)
        # Longer lists that changed nothing will not with the next: other limits take the places.
        if (
            not len(deeper)
            or 2 * bins * int(kept[deeper].sum()) > MOST_CANDIDATES
            or (shares == before and not missing)
        ):
            break
        before = shares
        kept[deeper] = np.minimum(2 * kept[deeper], len(columns))
        parts_of = [tiles.run(plan_of(deeper[kept[deeper] == size]), replace(search, keep=int(size)))
                    for size in np.unique(kept[deeper])]  # fmt: skip
        found = _replaced(found, deeper, parts_of, bins)
    if missing and not problem.at_most:
        raise too_few(problem, len(chosen.numbers), exact=exact, most=MOST_CANDIDATES if len(deeper) else None)
    check_least(problem, chosen.degree)
    table = {name: getattr(every, name)[chosen.numbers] for name in ("row", "column", "similarity")}
    return JointChoice(pa.table(table), notes)


def _joining(
    tiles: Tiles, problem: JointProblem, search: Search, parts: Ints, *, fewer_than: int, exact: bool
) -> list[Candidates]:
    """Candidates that join the parts of the graph: of each item the best in another part.

    All parts but the largest look for partners, so their number is halved at least, where there are any (Boruvka). Of
    more items than all pairs can be looked at some of each part do. Raises `InputError` where there are none, or no
    fewer parts than the last time.
    """
    count, rows = 1 + int(parts.max()), len(problem.rows)
    looking = np.flatnonzero(parts != np.bincount(parts).argmax())
    if not exact:
        by_part = looking[np.argsort(parts[looking], kind="stable")]
        looking = np.sort(by_part[rank_in_run(parts[by_part]) < max(1, JOINING_ITEMS // count)])
    search = replace(search, keep=JOINING)
    found = []
    if count < fewer_than:
        found.append(tiles.run(_exact_plan(problem, looking[looking < rows]), search, parts))
        if not problem.symmetric:
            found.append(tiles.run(_turned_plan(problem, looking[looking >= rows] - rows), search, parts, turned=True))
    if not any(len(some.row) for some in found):
        limited = " and their limit" if problem.limits.max_per_item else ""
        raise InputError(
            f"pairs.joint.connected: the pairs that {limits_text(problem)} leave fall into {count} parts{limited}, "
            f"which no pair joins; {how_to_mend(problem)}"
        )
    return found


def _exact_plan(problem: JointProblem, some: Ints) -> Plan:
    """Some rows meet every column that they may."""
    if problem.rows.groups is not None and problem.columns.groups is not None:
        return grouped(some, problem.rows.groups, problem.columns.groups)
    return Exact(some)


def _turned_plan(problem: JointProblem, some: Ints) -> Plan:
    """Some columns meet every row that they may."""
    return _exact_plan(replace(problem, rows=problem.columns, columns=problem.rows), some)


def _replaced(found: Candidates, rows: Ints, parts: list[Candidates], bins: int) -> Candidates:
    """`found` with the candidates of some rows replaced by longer lists of them."""
    others = numbered(found, np.flatnonzero(~np.isin(found.row, rows)))
    return replace(by_row(joined([others, *parts], bins)), in_band=found.in_band)


def make_plan(tiles: Tiles, problem: JointProblem, search: Search) -> tuple[PlanOf, bool, dict[str, Any]]:
    """How rows meet columns, whether that is all of them, and what to tell about it."""
    rows, columns = problem.rows, problem.columns
    if _any_partner_will_do(problem, search):
        return _sampled_plan(problem, search)
    if rows.groups is not None or max(len(rows), len(columns)) <= problem.config.approximate_above:
        return lambda some: _exact_plan(problem, some), True, {}
    strategy = STRATEGIES[problem.config.strategy]
    clusters = cluster(problem.vectors.array, -(-len(columns) // CLUSTER_SIZE), problem.seed).cut(8 * CLUSTER_SIZE)
    row_parts, column_parts = (clusters.of_vector[side.instructions] for side in (rows, columns))
    near = clusters.nearest(MOST_NEAR)
    rng = np.random.default_rng([problem.seed, 0x7265])
    sample = np.sort(rng.choice(len(rows), min(SAMPLED_ROWS, len(rows)), replace=False))
    truth = tiles.run(Exact(sample), search)
    nearness = _nearness(near, row_parts[truth.row], column_parts[truth.column])
    recalls = np.cumsum(np.bincount(nearness, minlength=near.shape[1] + 1)[:-1]) / max(1, len(truth.row))
    enough = int(np.searchsorted(recalls, problem.config.min_recall)) + 1
    notes: dict[str, Any] = {"clusters": len(near)}
    in_band = max(1, truth.in_band.sum()) / (len(sample) * len(columns))
    extra = max(SAMPLED_COLUMNS, int(4 * search.keep * search.bins / in_band))
    if strategy.sampled and (enough > near.shape[1] or enough * CLUSTER_SIZE > extra):
        if 2 * extra >= len(columns):
            return Exact, True, {}
        meets = near[:, : MOST_NEAR // 8 if strategy.near else 0]
        notes |= {"columns met at random": extra}
    else:
        enough = min(enough, near.shape[1])
        meets, extra = near[:, :enough], 0
        notes["clusters met"] = enough
        if len(truth.row):
            notes["recall"] = round(float(recalls[enough - 1]), 4)
        if notes.get("recall", 1) < problem.config.min_recall:
            notes["warning"] = (
                f"approximate candidates find {notes['recall']:.2%} of the exact ones, pairs.joint.min_recall asks for "
                f"{problem.config.min_recall:.2%}; raise approximate_above to look at all pairs"
            )
    keep = search.keep * search.bins
    return lambda some: Parts.of(some, row_parts, column_parts, meets, extra, problem.seed, keep), False, notes


def _any_partner_will_do(problem: JointProblem, search: Search) -> bool:
    """Whether an item's partners may be looked for in any sample, and one is not most of the columns."""
    plain = STRATEGIES[search.strategy].priority is uniform and search.bins == 1 and search.band == (-1, 1)
    limits, groups = problem.limits, problem.rows.groups
    limited = limits.min_per_item or limits.max_per_item is not None or limits.connected
    return plain and groups is None and not limited and 2 * _sample_size(search) < len(problem.columns)


def _sample_size(search: Search) -> int:
    return max(SAMPLED_COLUMNS, 4 * search.keep)


def _sampled_plan(problem: JointProblem, search: Search) -> tuple[PlanOf, bool, dict[str, Any]]:
    """Random groups of rows meet some random groups of columns each: the work grows with the items, not their square.

    No group of columns is met by more than one group of rows more than another (by none more where items are compared
    among themselves), so that hardly an item is likelier to be a partner than another.
    """
    rows, columns, seed = problem.rows, problem.columns, problem.seed
    row_groups, column_groups = (-(-len(side) // CLUSTER_SIZE) for side in (rows, columns))
    wanted = 1 + -(-_sample_size(search) // CLUSTER_SIZE)  # groups are of that size or a little less
    met = min(column_groups, max(wanted, -(-column_groups // row_groups)))  # every one is met
    circle = np.random.default_rng([seed, 0x6578]).permutation(column_groups)
    place = np.arange(row_groups)[:, None] * met + np.arange(met)
    # Round and round the circle, a place further each time: or the same groups of rows would share all their columns.
    meets = circle[(place + place // column_groups) % column_groups]
    row_parts, column_parts = (
        random_groups(rows.keys, row_groups, seed),
        random_groups(columns.keys, column_groups, seed),
    )
    notes = {"columns met at random": met * len(columns) // column_groups}
    return lambda some: Parts.of(some, row_parts, column_parts, meets, 0, seed, search.keep), False, notes


def _nearness(near: Ints, row_parts: Ints, column_parts: Ints) -> Ints:
    """Place of each pair's column cluster among the nearest of its row's; the number of places where not among them."""
    hit = near[row_parts] == column_parts[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), near.shape[1])


def near_duplicates(
    ray: Any,
    vectors: SharedVectors,
    rows: Ints,
    columns: Ints,
    config: JointPairs,
    keep: int,
    seed: int,
    bar: Any,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Pairs of instructions (numbers into `vectors`), one of `rows` and one of `columns`, in the band of `config`.

    First and second int64[K], and the cosine. Of each row only the nearest `keep` are looked at: a crowd of copies is
    linked, not listed pair by pair. Raises `TimeoutError` where a task's pairs take longer than `timeout_s`.
    """
    if not len(rows) or not len(columns):
        return rows[:0], rows[:0], np.empty(0, np.float32)
    left, right = (Side(some.astype(np.uint64), some) for some in (rows, columns))
    problem = JointProblem(left, right, vectors, config, budget=0, seed=seed)
    search = problem.search(min(keep, len(columns)))
    tiles = Tiles(ray, left, right, vectors, bar, timeout_s=timeout_s)
    found = tiles.run(make_plan(tiles, problem, search)[0](np.arange(len(rows))), search)
    return rows[found.row], columns[found.column], found.similarity
