"""Candidate tiles on Ray Data, and the pairs chosen from them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray.config import JointPairs
from jpo_ray.errors import InputError
from jpo_ray.pairs.candidates import Candidates, Search, joined
from jpo_ray.pairs.clusters import cluster
from jpo_ray.pairs.plans import Exact, Parts, Plan, grouped, run_task
from jpo_ray.pairs.selection import Limits, candidates_per_row, select
from jpo_ray.pairs.sides import Ints, Side
from jpo_ray.pairs.strategies import STRATEGIES

CLUSTER_SIZE = 256  # of approximate candidates: rows that meet the same columns
MOST_CANDIDATES = 2**26  # that longer lists may hold: 1.1 GiB
MOST_NEAR = 64  # clusters that a row may meet
QUICK_PAIRS = 2**27  # from which loading torch for quicker products pays
SAMPLED_ROWS = 256  # on which recall is measured
SAMPLED_COLUMNS = 4096  # that a cluster's rows meet at random, at least

JOINING = 2  # partners in other parts of the graph that an item looks for

Vectors = npt.NDArray[np.float16]
PlanOf = Callable[[Ints], Plan]


@dataclass(frozen=True)
class SharedVectors:
    """Vectors of instructions, float16[n, d], in Ray's object store, and this process's view of them there."""

    reference: Any
    array: Vectors


def share(ray: Any, vectors: Vectors) -> SharedVectors:
    """Put vectors where all workers read them; the caller's copy is not needed any longer."""
    reference = ray.put(vectors)
    return SharedVectors(reference, ray.get(reference))


@dataclass(frozen=True)
class JointProblem:
    """What to choose pairs of, and within which limits."""

    rows: Side
    columns: Side  # the same object as `rows` where items are compared among themselves
    vectors: SharedVectors
    config: JointPairs
    budget: int
    seed: int
    budget_key: str = "pairs.joint.budget"  # what the config calls the budget
    at_most: bool = False  # the budget is no more than wished for

    @property
    def symmetric(self) -> bool:
        return self.rows is self.columns

    @property
    def limits(self) -> Limits:
        return Limits(self.budget, self.config.min_per_item, self.config.max_per_item, self.config.connected)

    @property
    def band(self) -> tuple[float, float]:
        return self.config.min_similarity, self.config.max_similarity

    def search(self, keep: int, bins: int = 1) -> Search:
        return Search(self.config.strategy, self.band, keep, self.seed, bins)


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
    _check_limits(problem, nodes)
    bins = problem.config.bins if STRATEGIES[problem.config.strategy].bins else 1
    keep = min(candidates_per_row(limits.budget, len(rows), bins), len(columns))
    search = problem.search(keep, bins)
    tiles = Tiles(ray, problem, bar, parts)
    plan_of, exact, notes = make_plan(tiles, search)
    found = tiles.run(plan_of(np.arange(len(rows))), search)
    kept = np.full(len(rows), keep)  # candidates of each row and bin that were kept
    joining: list[Candidates] = []  # pairs that join what would fall apart
    graph_parts = nodes + 1
    while True:
        every = _sorted(replace(joined([found, *joining], bins), in_band=found.in_band)) if joining else found
        chosen = select(every, nodes, columns_from, limits)
        if chosen.parts.any():
            joining.append(_joining(tiles, plan_of, search, chosen.parts, fewer_than=graph_parts))
            graph_parts = 1 + int(chosen.parts.max())
            continue
        missing = limits.budget - len(chosen.numbers)
        lists = np.bincount(found.row.astype(np.int64) * bins + found.bin, minlength=len(rows) * bins)
        more = lists.reshape(-1, bins) == np.minimum(kept, len(columns))[:, None]
        more &= kept[:, None] < len(columns)
        if not missing:
            more &= chosen.short
        full = chosen.degree[: len(rows)] >= (limits.max_per_item or nodes)
        deeper = np.flatnonzero(more.any(axis=1) & ~full)
        if not len(deeper) or 2 * bins * int(kept[deeper].sum()) > MOST_CANDIDATES:
            break
        kept[deeper] = np.minimum(2 * kept[deeper], len(columns))
        parts_of = [tiles.run(plan_of(deeper[kept[deeper] == size]), replace(search, keep=int(size)))
                    for size in np.unique(kept[deeper])]  # fmt: skip
        found = _replaced(found, deeper, parts_of, bins)
    if missing and not problem.at_most:
        raise _too_few(problem, len(chosen.numbers), exact=exact, complete=not len(deeper))
    _check_least(problem, chosen.degree)
    table = {name: getattr(every, name)[chosen.numbers] for name in ("row", "column", "similarity")}
    return JointChoice(pa.table(table), notes)


def _joining(tiles: "Tiles", plan_of: PlanOf, search: Search, parts: Ints, *, fewer_than: int) -> Candidates:
    """Candidates that join the parts of the graph: of each item the best in another part.

    All parts but the largest look for partners, so their number is halved at least, where there are any (Boruvka).
    Raises `InputError` where there are none, or no fewer parts than the last time.
    """
    problem, count = tiles.problem, 1 + int(parts.max())
    rows = np.arange(len(problem.rows))
    if problem.symmetric:
        rows = np.flatnonzero(parts != np.bincount(parts).argmax())
    found = tiles.run(plan_of(rows), replace(search, keep=JOINING), parts) if count < fewer_than else None
    if found is None or not len(found.row):
        raise InputError(
            f"pairs.joint.connected: the pairs that {_limits_text(problem)} leave fall into {count} parts, "
            f"which no pair joins; {_mend(problem)}"
        )
    return found


class Tiles:
    """Runs plans over the problem's sides. With `folder`, what a task found is kept there until all is done."""

    def __init__(self, ray: Any, problem: JointProblem, bar: Any, folder: Path | None) -> None:
        self.problem = problem
        self._ray, self._bar, self._folder = ray, bar, folder
        self._sides = ray.put((problem.rows, problem.columns))
        self._runs = 0

    def run(self, plan: Plan, search: Search, parts: Ints | None = None) -> Candidates:
        """The candidates of all the plan's rows, by row; with `parts` (of every node) only those of different parts."""
        self._runs += 1
        # Not for blocks of all sizes: for every shape the quicker product compiles a kernel of its own.
        quick = isinstance(plan, Exact) and len(plan.rows) * len(self.problem.columns) >= QUICK_PAIRS
        search = replace(search, quick=quick)
        sides = self._sides
        if parts is not None:
            rows = replace(self.problem.rows, parts=parts[: len(self.problem.rows)])
            columns = replace(self.problem.columns, parts=parts[-len(self.problem.columns) :])
            sides = self._ray.put((rows, columns))
        prefix = f"{self._runs}-{plan.tasks}-{search.keep}"
        done = self._kept(prefix)
        self._bar.begin(plan.tasks)
        self._bar.advance(len(done))
        left = [task for task in range(plan.tasks) if task not in done]
        for task, found in _tasks_on_ray(self._ray, sides, self.problem.vectors, plan, left, search):
            done[task] = found
            if self._folder is not None:
                staged = self._folder / f".{prefix}-{task}"
                with staged.open("wb") as file:
                    file.write(found)
                    file.flush()
                    os.fsync(file.fileno())
                staged.rename(self._folder / f"{prefix}-{task}.npz")
            self._bar.advance(1)
        return _sorted(joined([_decoded(done.pop(task)) for task in sorted(done)], search.bins))

    def _kept(self, prefix: str) -> dict[int, bytes]:
        if self._folder is None:
            return {}
        self._folder.mkdir(parents=True, exist_ok=True)
        paths = self._folder.glob(f"{prefix}-*.npz")
        return {int(path.stem.rsplit("-", 1)[1]): path.read_bytes() for path in paths}


def _tasks_on_ray(
    ray: Any, sides: Any, vectors: SharedVectors, plan: Plan, tasks: list[int], search: Search
) -> Iterator[tuple[int, bytes]]:
    """Each task's candidates, encoded, as they are done."""
    if not tasks:
        return
    shared = ray.put(plan), sides, vectors.reference

    class Worker:
        """Actor, so that the next task is there when one is done."""

        def __init__(self) -> None:
            self.plan, (self.rows, self.columns), self.vectors = ray.get(list(shared))

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            task = int(batch["task"][0])
            found = run_task(self.plan, task, self.rows, self.columns, self.vectors, search)
            return {"task": [task], "found": [encoded(found)]}

    actors = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(tasks)))
    numbers = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    pool = ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors, max_tasks_in_flight_per_actor=2)
    for row in numbers.map_batches(Worker, batch_size=1, num_cpus=1, compute=pool).iter_rows():
        yield row["task"], row["found"]


def encoded(found: Candidates) -> bytes:
    buffer = BytesIO()
    np.savez(buffer, **found.__dict__)
    return buffer.getvalue()


def _decoded(stored: bytes) -> Candidates:
    with np.load(BytesIO(stored), allow_pickle=False) as arrays:
        return Candidates(**arrays)


def _sorted(found: Candidates) -> Candidates:
    """By row and bin, best first: the choice must not depend on how rows were spread over tasks."""
    lists = found.row.astype(np.int64) * len(found.in_band) + found.bin
    if (np.diff(lists) >= 0).all():
        return found
    return _numbered(found, np.lexsort((found.order, lists)))


def _numbered(found: Candidates, numbers: Ints) -> Candidates:
    columns = {name: values[numbers] for name, values in found.__dict__.items() if name != "in_band"}
    return replace(found, **columns)


def _replaced(found: Candidates, rows: Ints, parts: list[Candidates], bins: int) -> Candidates:
    """`found` with the candidates of some rows replaced by longer lists of them."""
    others = _numbered(found, np.flatnonzero(~np.isin(found.row, rows)))
    return replace(_sorted(joined([others, *parts], bins)), in_band=found.in_band)


def make_plan(tiles: Tiles, search: Search) -> tuple[PlanOf, bool, dict[str, Any]]:
    """How rows meet columns, whether that is all of them, and what to tell about it."""
    problem = tiles.problem
    rows, columns = problem.rows, problem.columns
    if rows.groups is not None and columns.groups is not None:
        row_groups, column_groups = rows.groups, columns.groups
        return lambda some: grouped(some, row_groups, column_groups), True, {}
    if max(len(rows), len(columns)) <= problem.config.approximate_above:
        return Exact, True, {}
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
        notes |= {"clusters met": enough, "recall": round(float(recalls[enough - 1]), 4)}
        if notes["recall"] < problem.config.min_recall:
            notes["warning"] = (
                f"approximate candidates find {notes['recall']:.2%} of the exact ones, pairs.joint.min_recall asks for "
                f"{problem.config.min_recall:.2%}; raise approximate_above to look at all pairs"
            )
    return lambda some: Parts.of(some, row_parts, column_parts, meets, extra, problem.seed), False, notes


def _nearness(near: Ints, row_parts: Ints, column_parts: Ints) -> Ints:
    """Place of each pair's column cluster among the nearest of its row's; the number of places where not among them."""
    hit = near[row_parts] == column_parts[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), near.shape[1])


def _check_limits(problem: JointProblem, nodes: int) -> None:
    """Raise `InputError` where the limits contradict each other, whatever the similarities."""
    config, limits = problem.config, problem.limits
    key = problem.budget_key
    most = (
        len(problem.rows) * (len(problem.rows) - 1) // 2
        if problem.symmetric
        else len(problem.rows) * len(problem.columns)
    )
    if limits.budget > most:
        raise _too_few(problem, most)
    if limits.max_per_item is not None and 2 * limits.budget > limits.max_per_item * nodes:
        raise InputError(
            f"pairs.joint.max_per_item: {nodes} items in at most {limits.max_per_item} pairs each make at most "
            f"{limits.max_per_item * nodes // 2} pairs, the budget asks for {limits.budget}; raise it or lower {key}"
        )
    if config.min_per_item * nodes > 2 * limits.budget:
        raise InputError(
            f"pairs.joint.min_per_item: {nodes} items in at least {config.min_per_item} pairs each take at least "
            f"{-(-config.min_per_item * nodes // 2)} pairs, the budget gives {limits.budget}; lower it or raise {key}"
        )
    if limits.connected and limits.budget < nodes - 1:
        raise InputError(
            f"pairs.joint.connected: it takes {nodes - 1} pairs to connect {nodes} items, the budget gives "
            f"{limits.budget}; raise {key} or set connected: false"
        )


def _check_least(problem: JointProblem, degree: Ints) -> None:
    wanted = problem.config.min_per_item
    if (degree < wanted).any():
        raise InputError(
            f"pairs.joint.min_per_item: {int((degree < wanted).sum())} of {len(degree)} items are in fewer than "
            f"{wanted} pairs (the fewest: {int(degree.min())}); {_mend(problem)}, raise {problem.budget_key} or "
            "lower it"
        )


def _limits_text(problem: JointProblem) -> str:
    low, high = problem.band
    capped = f" and max_per_item {problem.limits.max_per_item}" if problem.limits.max_per_item else ""
    within = " within the groups" if problem.rows.groups is not None else ""
    return f"the similarity band [{low:g}, {high:g}]{capped}{within}"


def _mend(problem: JointProblem) -> str:
    mends = ["raise group_size"] if problem.rows.groups is not None else []
    mends += ["raise max_per_item"] if problem.limits.max_per_item else []
    return ", ".join([*mends, "widen min_similarity/max_similarity"])


def _too_few(problem: JointProblem, count: int, *, exact: bool = True, complete: bool = True) -> InputError:
    """The error of a band, groups or limits that leave fewer pairs than the budget."""
    where = _limits_text(problem)
    said = (
        f"{where} leaves {count} pairs" if not problem.limits.max_per_item else f"in {where} {count} pairs were found"
    )
    if not exact:
        said += " among the approximate candidates (raise approximate_above to look at all pairs)"
    elif not complete:
        said += f" among the {MOST_CANDIDATES:,} candidates that are looked at most"
    return InputError(
        f"pairs.joint: {said}, the budget asks for {problem.limits.budget}; {_mend(problem)} or lower "
        f"{problem.budget_key}"
    )


def near_duplicates(
    ray: Any, vectors: SharedVectors, rows: Ints, columns: Ints, config: JointPairs, keep: int, seed: int, bar: Any
) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Pairs of instructions (numbers into `vectors`), one of `rows` and one of `columns`, in the band of `config`.

    First and second int64[K], and the cosine. Of each row only the nearest `keep` are looked at: a crowd of copies is
    linked, not listed pair by pair.
    """
    if not len(rows) or not len(columns):
        return rows[:0], rows[:0], np.empty(0, np.float32)
    left, right = (Side(some.astype(np.uint64), some) for some in (rows, columns))
    problem = JointProblem(left, right, vectors, config, budget=0, seed=seed)
    search = problem.search(min(keep, len(columns)))
    tiles = Tiles(ray, problem, bar, None)
    found = tiles.run(make_plan(tiles, search)[0](np.arange(len(rows))), search)
    return rows[found.row], columns[found.column], found.similarity
