"""Candidate tiles on Ray Data: plans run as tasks of an actor pool, resumably.

Workers import this module: it must stay light.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jpo_ray.errors import InputError
from jpo_ray.pairs.candidates import Candidates, Search, joined
from jpo_ray.pairs.plans import Exact, Plan, by_row, run_task
from jpo_ray.pairs.sides import Ints, Side
from jpo_ray.pairs.strategies import STRATEGIES

if TYPE_CHECKING:
    from jpo_ray.config_cluster import ClusterConfig

CHECKED_AT_ONCE = 16_384
PARTS_FORMAT = 3  # of what tasks leave for a run that goes on
NORM_TOLERANCE = 0.02  # of float16 vectors
POOL_TASKS = 16  # from which starting actors pays
TIMEOUT_S = 900.0  # longest wait for the next task's candidates
QUICK_PAIRS = 2**31  # from which loading torch for quicker products pays

Vectors = npt.NDArray[np.float16]


@dataclass(frozen=True)
class SharedVectors:
    """Vectors of instructions, float16[n, d], in Ray's object store, and this process's view of them there."""

    reference: Any
    array: Vectors
    cluster: "ClusterConfig"  # of the stage: where the tasks that read them run


def share(ray: Any, vectors: Vectors, cluster: "ClusterConfig | None" = None) -> SharedVectors:
    """Put vectors where all workers read them; the caller's copy is not needed any longer.

    Raises `InputError` for vectors that are not normalised: zero, not finite, or of another kind of embedding.
    """
    for start in range(0, len(vectors), CHECKED_AT_ONCE):
        norms = np.linalg.norm(vectors[start : start + CHECKED_AT_ONCE].astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) < NORM_TOLERANCE))
        if len(bad):
            raise InputError(
                f"embeddings: vector {start + bad[0]} of {len(vectors)} has the norm {norms[bad[0]]:g}, not 1; "
                "remove the run's embeddings and the cache's to make them again"
            )
    from jpo_ray.config_cluster import ClusterConfig

    reference = ray.put(vectors)
    return SharedVectors(reference, ray.get(reference), cluster or ClusterConfig())


class Tiles:
    """Runs plans over two sides of items. With `folder`, what a task found is kept there until all is done."""

    def __init__(
        self,
        ray: Any,
        rows: Side,
        columns: Side,
        vectors: SharedVectors,
        bar: Any,
        folder: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._ray, self._bar, self._folder, self._timeout_s = ray, bar, folder, timeout_s
        self._rows, self._columns, self._vectors = rows, columns, vectors
        self._sides = ray.put((rows, columns))
        self._runs = 0

    def run(self, plan: Plan, search: Search, parts: Ints | None = None, *, turned: bool = False) -> Candidates:
        """The candidates of all the plan's rows, by row; with `parts` (of every node) only those of different parts.

        `turned`: the plan's rows are of the columns' side, and look for partners on the rows' side.
        """
        tasks = self._parts(plan, search, parts, turned=turned)
        every = joined(list(tasks), search.bins)
        return by_row(replace(every, row=every.column, column=every.row) if turned else every)

    def stream(self, plan: Plan, search: Search) -> Iterator[Candidates]:
        """The same task by task, by row, with only one task's in memory; there must be a folder."""
        assert self._folder is not None
        return map(by_row, self._parts(plan, search, None, turned=False))

    def _parts(self, plan: Plan, search: Search, parts: Ints | None, *, turned: bool) -> Iterator[Candidates]:
        """What each task found, in the order of tasks, once all are done."""
        self._runs += 1
        # Not for blocks of all sizes: for every shape the quicker product compiles a kernel of its own.
        many = isinstance(plan, Exact) and len(plan.rows) * len(self._columns) >= QUICK_PAIRS
        search = replace(search, quick=many and STRATEGIES[search.strategy].priority is None)
        rows, columns, sides = self._rows, self._columns, self._sides
        if parts is not None:
            rows, columns = replace(rows, parts=parts[: len(rows)]), replace(columns, parts=parts[-len(columns) :])
        if turned:
            rows, columns = columns, rows
        if parts is not None or turned:
            sides = self._ray.put((rows, columns))
        prefix = f"{self._runs}-{_digest(plan, search, rows, columns)}"
        kept, done = self._kept(prefix), dict[int, bytes]()
        self._bar.begin(plan.tasks)
        self._bar.advance(len(kept))
        left = [task for task in range(plan.tasks) if task not in kept]
        from jpo_ray.cluster.session import LARGE_AHEAD, within  # not above: workers need none of it

        tasks = _tasks_on_ray(self._ray, sides, self._vectors, plan, left, search)
        for task, found in within(tasks, self._timeout_s, "pairs", "cluster.actor_timeout_s", LARGE_AHEAD):
            if self._folder is None:
                done[task] = found
            else:
                staged = self._folder / f".{prefix}-{task}"
                with staged.open("wb") as file:
                    file.write(found)
                    file.flush()
                    os.fsync(file.fileno())
                staged.rename(self._folder / f"{prefix}-{task}.npz")
            self._bar.advance(1)
        for task in range(plan.tasks):
            if self._folder is None:
                yield _decoded(done.pop(task))
            else:
                yield _decoded((self._folder / f"{prefix}-{task}.npz").read_bytes())

    def _kept(self, prefix: str) -> set[int]:
        """Tasks that were done before a kill."""
        if self._folder is None:
            return set()
        self._folder.mkdir(parents=True, exist_ok=True)
        return {int(path.stem.rsplit("-", 1)[1]) for path in self._folder.glob(f"{prefix}-*.npz")}


def _digest(plan: Plan, search: Search, rows: Side, columns: Side) -> str:
    """What a task's result depends on, but for the vectors (a part of another run must not be taken for this one's)."""
    digest = hashlib.sha256(repr((PARTS_FORMAT, type(plan).__name__, plan.tasks, search)).encode())
    for name, value in vars(plan).items():
        field = np.ascontiguousarray(value)
        digest.update(f"{name} {field.dtype} {field.shape}".encode() + field.tobytes())
    for side in (rows, columns):
        for values in (side.keys, side.instructions, side.groups, side.parts):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def _tasks_on_ray(
    ray: Any, sides: Any, vectors: SharedVectors, plan: Plan, tasks: list[int], search: Search
) -> Iterator[tuple[int, bytes]]:
    """Each task's candidates, encoded, as they are done."""
    if not tasks:
        return
    from jpo_ray.cluster.resources import as_options, task_resources, tasks_at_once

    shared, options = (ray.put(plan), sides, vectors.reference), as_options(task_resources(vectors.cluster))

    def tile(batch: dict[str, Any]) -> dict[str, Any]:
        task = int(batch["task"][0])
        its_plan, (rows, columns), array = ray.get(list(shared))
        return {"task": [task], "found": [encoded(run_task(its_plan, task, rows, columns, array, search))]}

    class Tile:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return tile(batch)

    numbers = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    if len(tasks) < POOL_TASKS:
        mapped = numbers.map_batches(tile, batch_size=1, **options)
    else:
        # Actors hold the next task when one is done; plain tasks leave a core idle for a tenth of a second between two.
        size = min(tasks_at_once(ray, vectors.cluster), len(tasks))
        pool = ray.data.ActorPoolStrategy(min_size=1, initial_size=size, max_size=size, max_tasks_in_flight_per_actor=2)
        mapped = numbers.map_batches(Tile, batch_size=1, compute=pool, **options)
    for row in mapped.iter_rows():
        yield row["task"], row["found"]


def encoded(found: Candidates) -> bytes:
    buffer = BytesIO()
    np.savez(buffer, **found.__dict__)
    return buffer.getvalue()


def _decoded(stored: bytes) -> Candidates:
    with np.load(BytesIO(stored), allow_pickle=False) as arrays:
        return Candidates(**arrays)
