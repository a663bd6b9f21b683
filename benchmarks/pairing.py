"""Candidate tiles at scale: time, recall, memory, and what happens after a kill.

    python benchmarks/pairing.py [--work NAME ...] [--json FILE]

    small     12 thousand instructions, all 72 million pairs scored, a band, a budget of 12 thousand
    exact     100 thousand vectors, exact top 32 in a band, beside faiss IndexFlatIP (top 32, no band) on the same cores
    approx    1 million vectors in clusters, approximate top 16: recall, peak memory, cost per item beside 100 thousand
    workers   the same exact tiles on one and on two Ray workers of one core each
    billion   1 billion candidate pairs sampled to 1 million pairs: peak memory, killed half way and started again

Every measurement runs in a process of its own with a Ray of its own, one after another. Vectors are synthetic, 384
dimensions in float16: topics, clusters of about 50 within topics, noise. Memory is the proportional set size of the
process and all that it started (Ray's workers and object store too), less what they take before the work begins.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from scaling import shown

from jpo_ray.artifacts import package_versions
from jpo_ray.config import JointPairs
from jpo_ray.files import write_json

WIDTH = 384
BAND = (0.2, 0.8)
RECALL_ROWS = 2000
KILLED_AFTER = 0.4  # of the tasks
GIB = 2**30

Row = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, options, out = sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
        write_json(out, WORKERS[name](**options))
        return
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    rows: list[Row] = []
    for name in arguments.work:
        found = WORKS[name]()
        rows += found
        for row in found:
            console.print("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()))
    table = Table("work", "measured", "to reach", title="Pairing")
    for row in rows:
        if "to reach" in row:
            table.add_row(row["work"], row["measured"], row["to reach"])
    console.print(table)
    if arguments.json:
        about = {"command": shlex.join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(arguments.json, about | {"cores": os.cpu_count(), "versions": package_versions(), "rows": rows})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def small() -> list[Row]:
    found = _apart("choose", count=12_000, budget=12_000, cpus=2)
    rate = 12_000**2 / found["seconds"] / 1e6
    measured = f"{found['seconds']:.2f} s ({rate:,.0f} million ordered pairs/s)"
    return [{"work": "small", **found, "measured": measured, "to reach": "under 5 s"}]


def exact() -> list[Row]:
    """In turns, so that other work on the machine slows both alike."""
    turns = [(_apart("exact_lists", count=100_000, keep=32, cpus=2), _apart("faiss_flat", count=100_000, keep=32))
             for _ in range(2)]  # fmt: skip
    ours, theirs = (min(turn[side]["seconds"] for turn in turns) for side in (0, 1))
    measured = f"{ours:.1f} s, faiss {theirs:.1f} s: {theirs / ours:.2f} times its speed"
    agreement = _agreement(turns[0][0]["sample"], turns[0][1]["sample"])
    row = {"work": "exact", "seconds": ours, "faiss seconds": theirs, "same in the top 8": agreement}
    return [row | {"measured": measured, "to reach": "no slower than faiss"}]


def approx() -> list[Row]:
    small_, large = (_apart("approximate_lists", count=count, keep=16, cpus=2) for count in (100_000, 1_000_000))
    each = [1e6 * found["seconds"] / count for found, count in ((small_, 100_000), (large, 1_000_000))]
    vectors = 1_000_000 * WIDTH * 2
    times = (large["peak_bytes"] + vectors) / vectors  # the vectors stand in memory before the work begins
    return [
        {"work": "approx 100k", **small_},
        {"work": "approx 1M", **large},
        {"work": "approx: recall", "measured": f"{large['recall']:.3f}", "to reach": "0.95"},
        {"work": "approx: memory", "measured": f"{times:.2f} times the float16 vectors, they included",
         "to reach": "at most 3 times"},
        {"work": "approx: cost per item", "measured": f"{each[0]:.0f} and {each[1]:.0f} microseconds",
         "to reach": "flat from 100 thousand to 1 million"},
    ]  # fmt: skip


def workers() -> list[Row]:
    turns = [[_apart("exact_lists", count=100_000, keep=32, cpus=cpus)["seconds"] for cpus in (1, 2)] for _ in range(2)]
    one, two = (min(turn[place] for turn in turns) for place in (0, 1))
    measured = f"{one:.1f} s and {two:.1f} s: {one / two:.2f} times"
    return [{"work": "workers", "one": one, "two": two, "measured": measured, "to reach": "1.8 times"}]


def billion() -> list[Row]:
    count, budget = 44_722, 1_000_000
    with tempfile.TemporaryDirectory(prefix="pairing-") as folder:
        whole = _apart("choose", count=count, budget=budget, cpus=2, low=-1.0, high=1.0)
        killed = _apart("choose", count=count, budget=budget, cpus=2, low=-1.0, high=1.0, parts=folder, kill=True)
        kept = len(list(Path(folder).glob("*.npz")))
        again = _apart("choose", count=count, budget=budget, cpus=2, low=-1.0, high=1.0, parts=folder)
    same = again["digest"] == whole["digest"]
    measured = (
        f"peak {whole['peak_bytes'] / GIB:.2f} GiB, {whole['seconds']:.1f} s; killed after {kept} of {whole['tasks']} "
        f"tasks, the rest took {again['seconds']:.1f} s; the same pairs: {'yes' if same else 'NO'}"
    )
    row = {"work": "billion", "pairs": count * (count - 1) // 2, "killed": killed["killed"], "same": same}
    return [row | {"measured": measured, "to reach": "under 2 GiB, resumable"}]


WORKS: dict[str, Callable[[], list[Row]]] = {work.__name__: work for work in (small, exact, approx, workers, billion)}


def _apart(name: str, **options: Any) -> Row:
    """Run one worker function in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="pairing-") as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--worker", name, json.dumps(options), str(out)]
        done = subprocess.run(command, check=False)
        if options.get("kill"):
            return {"killed": done.returncode == -signal.SIGKILL}
        if done.returncode:
            raise SystemExit(f"{name} failed")
        found: Row = json.loads(out.read_text())
        return found


def make_vectors(count: int) -> np.ndarray:
    """Topics, clusters of about 50 within them, noise: float16[count, WIDTH], normalised."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(100, WIDTH)).astype(np.float32)
    centres = topics[rng.integers(0, 100, max(1, count // 50))]
    centres += rng.normal(size=centres.shape).astype(np.float32)
    vectors = np.empty((count, WIDTH), dtype=np.float16)
    for start in range(0, count, 20_000):
        part = centres[rng.integers(0, len(centres), min(20_000, count - start))]
        part = part + rng.normal(size=part.shape).astype(np.float32)
        vectors[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


class Watch:
    """Peak memory of this process and all it started, above what they had at the start."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._base = self._peak = _memory()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
        self._stop.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return self._peak - self._base

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            self._peak = max(self._peak, _memory())


def _memory() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


@contextmanager
def _ray(cpus: int) -> Iterator[Any]:
    """A Ray of `cpus` cores, its workers started."""
    from jpo_ray.cluster.session import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    import logging

    import ray

    folder = tempfile.mkdtemp(prefix="pr", dir="/tmp")
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=folder)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.disable(logging.WARNING)
    ray.data.range(2 * cpus).map(lambda row: row).materialize()
    try:
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Bar:
    """No progress; with `kill` the process dies after a share of the tasks."""

    def __init__(self, kill: bool = False) -> None:
        self._kill, self.total, self._done = kill, 0, 0

    def begin(self, total: int) -> None:
        self.total, self._done = total, 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._kill and self._done >= KILLED_AFTER * self.total:
            for process in psutil.Process().children(recursive=True):
                process.kill()
            os.kill(os.getpid(), signal.SIGKILL)


def _side(count: int) -> Any:
    from jpo_ray.pairs.sides import Side, mix

    return Side(mix(np.arange(1, count + 1, dtype=np.uint64)), np.arange(count))


def choose(
    count: int,
    budget: int,
    cpus: int,
    low: float = BAND[0],
    high: float = BAND[1],
    parts: str | None = None,
    kill: bool = False,
) -> Row:
    from jpo_ray.cluster.joint_problem import JointProblem
    from jpo_ray.cluster.pairing import joint_pairs
    from jpo_ray.cluster.tiles import share

    vectors, side, bar = make_vectors(count), _side(count), Bar(kill)
    config = JointPairs(min_similarity=low, max_similarity=high)
    with _ray(cpus) as ray, Watch() as watch:
        problem = JointProblem(side, side, share(ray, vectors), config, budget, 0)
        found = joint_pairs(ray, problem, bar, parts and Path(parts))
    chosen = found.pairs.select(["row", "column"]).to_pandas().to_numpy()
    digest = hashlib.sha256(np.ascontiguousarray(chosen).tobytes()).hexdigest()
    return {
        "seconds": watch.seconds, "pairs": len(found.pairs), "tasks": bar.total, "peak_bytes": watch.peak_bytes,
        "digest": digest,
    }  # fmt: skip


def exact_lists(count: int, keep: int, cpus: int) -> Row:
    """The exact top of every row in the band, by cosine."""
    from jpo_ray.cluster.tiles import share
    from jpo_ray.pairs.plans import Exact

    vectors = make_vectors(count)
    with _ray(cpus) as ray, Watch() as watch:
        tiles, _, search = _nearest(ray, share(ray, vectors), keep, max_similarity=BAND[1])
        found = tiles.run(Exact(np.arange(count)), search)
    sample = {int(row): found.column[found.row == row].tolist()[:8] for row in range(50)}
    return {"seconds": watch.seconds, "candidates": len(found.row), "sample": sample}


def _nearest(ray: Any, vectors: Any, keep: int, **options: Any) -> tuple[Any, Any, Any]:
    """Tiles of the nearest `keep` of every item, the problem and the search."""
    from jpo_ray.cluster.joint_problem import JointProblem
    from jpo_ray.cluster.tiles import Tiles

    side = _side(len(vectors.array))
    problem = JointProblem(side, side, vectors, JointPairs(strategy="similar", **options), len(side), 0)
    return Tiles(ray, side, side, vectors, Bar()), problem, problem.search(keep)


def faiss_flat(count: int, keep: int) -> Row:
    import faiss

    vectors = make_vectors(count).astype(np.float32)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    started = time.monotonic()
    _, found = index.search(vectors, keep + 1)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "sample": {row: [c for c in found[row].tolist() if c != row][:8] for row in range(50)}}


def _agreement(ours: Row, theirs: Row) -> float:
    """Share of the best that both name; the band cuts some of theirs off."""
    return float(np.mean([len(set(ours[row]) & set(theirs[row])) / 8 for row in ours]))


def approximate_lists(count: int, keep: int, cpus: int) -> Row:
    from jpo_ray.cluster.pairing import make_plan
    from jpo_ray.cluster.tiles import share
    from jpo_ray.pairs.plans import Exact

    with _ray(cpus) as ray:
        vectors = share(ray, make_vectors(count))
        with Watch() as watch:
            tiles, problem, search = _nearest(ray, vectors, keep, approximate_above=50_000)
            plan_of, _, notes = make_plan(tiles, problem, search)
            found = tiles.run(plan_of(np.arange(count)), search)
        # On rows that the plan was not tuned by.
        some = np.sort(np.random.default_rng(99).choice(count, RECALL_ROWS, replace=False))
        truth = tiles.run(Exact(some), search)
    chosen = np.isin(found.row, some)
    pairs = found.row[chosen].astype(np.int64) * count + found.column[chosen]
    recall = np.isin(truth.row.astype(np.int64) * count + truth.column, pairs).mean()
    return {"seconds": watch.seconds, "recall": float(recall), "peak_bytes": watch.peak_bytes, **notes}


WORKERS: dict[str, Callable[..., Row]] = {
    work.__name__: work for work in (choose, exact_lists, faiss_flat, approximate_lists)
}


if __name__ == "__main__":
    main()
