"""What an item, a comparison and a token cost as the work grows ten times, and how much memory it takes.

    python benchmarks/scaling.py [--work NAME ...] [--edges N ...] [--json FILE]

    edges     10 thousand to 10 million comparisons of 1 to 100 thousand items: pairs, judgments, the edges that a
              trainer reads and an epoch of batches; time, memory of the driver and of the workers, bytes
    cache     the reference cache: 10 thousand, 100 thousand and 1 million rows written and read
    sharing   one shard of a million comparisons cut into batches: items scored per comparison, by the number of items
              that the shard's comparisons are spread over and by the size of a step
    tokens    reference log-probs of 300, 3,000 and 30,000 items under the sandbox's model, in one process

Each measurement runs in a process of its own, with a Ray of its own. Items are synthetic (two responses to each
instruction, ratings as scores, vectors of 384 dimensions), so that embedding and oracle cost nothing. Memory is what a
process has for itself (unique set size), sampled ten times a second; of the workers, all together. CPU time is that of
this process and of its workers: other work on the machine changes it less than it changes the seconds.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from jpo_ray import records, shards
from jpo_ray.artifacts import package_versions
from jpo_ray.files import write_json

WIDTH = 384
MIB = 2**20
SIZES = ((1_000, 10_000), (10_000, 100_000), (100_000, 1_000_000), (100_000, 10_000_000))
CACHE_ROWS = (10_000, 100_000, 1_000_000)
SHARING_ITEMS = (44_000, 1_449)  # of two blocks of 45 of a million items; of a group in which all are compared
STEPS = (512, 8_192, 65_536)
TOKEN_ITEMS = (300, 3_000, 30_000)
PER_STEP = 512  # comparisons of a training step

Row = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, options, out = sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
        write_json(out, {"rows": list(WORKERS[name](**options))})
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--edges", nargs="+", type=int, default=[edges for _, edges in SIZES], help="of these sizes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    rows = [row for name in arguments.work for row in WORKS[name](arguments)]
    for work in dict.fromkeys(row["work"] for row in rows):
        some = [row for row in rows if row["work"] == work]
        names = list(dict.fromkeys(name for row in some for name in row if name != "work"))
        table = Table(*names, title=work)
        for row in some:
            table.add_row(*(shown(row.get(name, "")) for name in names))
        console.print(table)
    if arguments.json:
        about = {"command": shlex.join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(arguments.json, about | {"cores": os.cpu_count(), "versions": package_versions(), "rows": rows})


def shown(value: Any) -> str:
    """A number of four digits, or with commas."""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _edge_works(arguments: argparse.Namespace) -> Iterator[Row]:
    for items, edges in SIZES:
        if edges in arguments.edges:
            yield from _apart("edges", items=items, edges=edges)


WORKS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "edges": _edge_works,
    "cache": lambda _: (row for count in CACHE_ROWS for row in _apart("cache", rows=count)),
    "sharing": lambda _: (row for items in SHARING_ITEMS for row in _apart("sharing", items=items)),
    "tokens": lambda _: (row for count in TOKEN_ITEMS for row in _apart("tokens", items=count)),
}


def _apart(name: str, **options: Any) -> list[Row]:
    """What a worker measures in a process of its own."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--worker", name, json.dumps(options), str(out)]
        subprocess.run(command, check=True)
        rows: list[Row] = json.loads(out.read_text())["rows"]
        return rows


class Memory:
    """Peak private memory of this process and of its workers together, in MiB, and the workers' CPU seconds, since the
    last `reset`.
    """

    def __init__(self) -> None:
        self._me = psutil.Process()
        self.driver = self.workers = 0.0
        self._busy: dict[int, tuple[float, float]] = {}  # by process: CPU seconds at the reset, and last seen
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self.driver = self.workers = 0.0
        self._busy = {pid: (last, last) for pid, (_, last) in self._busy.items()}

    @property
    def workers_busy(self) -> float:
        return sum(last - first for first, last in list(self._busy.values()))

    def _watch(self) -> None:
        while True:
            self.driver = max(self.driver, _private(self._me))
            workers = [each for each in self._me.children(recursive=True) if _is_worker(each)]
            self.workers = max(self.workers, sum(map(_private, workers)))
            for each in workers:
                seconds = _cpu_seconds(each)
                self._busy[each.pid] = self._busy.get(each.pid, (seconds, 0.0))[0], seconds
            time.sleep(0.1)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::")
    except psutil.Error:
        return False


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.Error:
        return 0.0


def _private(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / MIB
    except psutil.Error:
        return 0.0


@contextmanager
def _measured(memory: Memory, row: Row, count: int) -> Iterator[None]:
    memory.reset()
    before, started, busy = _private(psutil.Process()), time.perf_counter(), time.process_time()
    yield
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    row |= {"seconds": round(seconds, 2), "us each": 1e6 * seconds / count}
    time.sleep(0.2)
    row |= {"CPU us: driver": 1e6 * busy / count, "workers": 1e6 * memory.workers_busy / count}
    row |= {"driver MiB": round(memory.driver), "of it new": round(memory.driver - before)}
    row |= {"workers MiB": round(memory.workers)}


def measure_edges(items: int, edges: int) -> Iterator[Row]:
    from jpo_ray.cluster.session import ray_session
    from jpo_ray.config_file import parse_config
    from jpo_ray.pipeline.judge_stage import judge_all
    from jpo_ray.pipeline.pair_shards import make_pairs

    root = Path(tempfile.mkdtemp())
    make_items(root, items)
    config = parse_config(
        {
            "items": {"train": [{"path": "none.jsonl"}]},
            "model": {"model_name_or_path": "none"},
            "pairs": {"joint": {"budget": edges - items // 2}},
            "judge": {"annotator": "ratings", "tie_band": 0.02},
            "sft": None,
            "train": [{"objective": "jpo", "comparisons_per_step": PER_STEP}],
            "sample": None,
            "evaluate": None,
        },
        "benchmark",
    )
    memory, base = Memory(), {"work": f"edges ({items:,} items, {edges:,} comparisons)"}
    with ray_session(config.cluster) as ray:
        ray.get(ray.remote(lambda: 0).remote())  # workers are up
        context: Any = SimpleNamespace(
            config=config, console=Console(file=StringIO()), path=lambda name: root / name, ray=lambda: ray,
            seed=lambda seed=None: config.seed if seed is None else seed,
        )  # fmt: skip
        for name in ("pairs", "judge"):
            (root / name).mkdir()
        pairs: Row = base | {"step": "pairs"}
        with _measured(memory, pairs, edges):
            make_pairs(context, root / "pairs", root / "work")
        yield pairs | _stored(root / "pairs" / "pairs.parquet")
        shutil.rmtree(root / "work")
        judged: Row = base | {"step": "judge"}
        with _measured(memory, judged, edges):
            judge_all(context, root / "judge")
        yield judged | _stored(root / "judge" / "judgments.parquet")
    yield from _sampler(memory, base, root, config.train[0])
    shutil.rmtree(root)


def _sampler(memory: Memory, base: Row, root: Path, entry: Any) -> Iterator[Row]:
    """What each training worker does beside the model: the edges' shards read, an epoch cut into batches."""
    from jpo_ray.engine.dataset import PreferenceData
    from jpo_ray.engine.jobs import read_edges
    from jpo_ray.engine.schedules import EdgeSchedule

    table = records.read_table(root / "items" / "items.parquet", records.ITEMS)
    for batching in ("pairs", "graph"):
        row: Row = base | {"step": f"sampler ({batching})"}
        config = entry.model_copy(update={"batching": batching})
        files = shards.files_of(root / "judge" / "preferences.parquet")
        count = shards.row_count(root / "judge" / "preferences.parquet")
        with _measured(memory, row, count):
            used = shards.distinct_values(files, ["chosen", "rejected"])
            train, validation = read_edges(files, used, config)
            tokens: Any = SimpleNamespace(lengths=np.full(len(table), 100), prompt_groups=None)
            data = PreferenceData(tokens, None, len(table), train, validation)
            schedule = EdgeSchedule(data, train, config, seed=0)
            scored = seen = 0
            for step in range(schedule.total_steps):
                batch = schedule.batch(step)
                seen += len(batch)
                scored += len(np.unique(np.concatenate([batch.chosen, batch.rejected])))
        assert seen == count
        yield row | _stored(root / "judge" / "preferences.parquet") | {"items per comparison": scored / seen}


def _stored(path: Path) -> Row:
    files = shards.files_of(path)
    size = sum(file.stat().st_size for file in files)
    return {"files": len(files), "bytes each": size / max(1, shards.row_count(path))}


def make_items(root: Path, count: int) -> None:
    """Items, ratings and embeddings as their stages write them."""
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    instruction_ids = [records.instruction_id(f"Write about topic {n}.") for n in range(count // 2)]
    for name in ("items", "embeddings"):
        (root / name).mkdir(parents=True)
    responses = [f"Response {n} about topic {n // 2}." for n in range(count)]
    ids = [records.item_id(f"Write about topic {n // 2}.", responses[n]) for n in range(count)]
    columns = {
        "item_id": ids,
        "instruction_id": [instruction_ids[n // 2] for n in range(count)],
        "instruction": [f"Write about topic {n // 2}." for n in range(count)],
        "response": responses,
        "source": pa.repeat("benchmark", count),
        "split": pa.repeat("train", count),
        "sft": np.ones(count, dtype=bool),  # all of them may be in joint pairs
        "gold": numbers % 2 == 0,
    }
    records.write_table(root / "items" / "items.parquet", pa.table(columns), records.ITEMS)
    records.write_table(root / "items" / "labels.parquet", [], records.LABELS)
    ratings = pa.table({"item_id": ids, "rating": rng.random(count)})
    records.write_table(root / "items" / "ratings.parquet", ratings, records.RATINGS)
    vectors = rng.standard_normal((count // 2, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    from jpo_ray.pairs.embedding import vector_column

    table = pa.table([instruction_ids, vector_column(vectors.astype(np.float16))], schema=records.EMBEDDINGS)
    records.write_table(root / "embeddings" / "embeddings.parquet", table, records.EMBEDDINGS)


def measure_cache(rows: int) -> Iterator[Row]:
    from jpo_ray.cluster.reference import COMMIT_SEQUENCES
    from jpo_ray.data.tokens import TokenizedItems
    from jpo_ray.engine.reference import append_cache, missing_rows, read_cache

    memory, folder = Memory(), Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32_000, 100 * rows, dtype=np.int32)
    values = -rng.random((rows, 2)) * 100
    tokens = TokenizedItems(ids, np.arange(rows + 1) * 100, np.full(rows, 40, dtype=np.int32), truncated=0)
    key = {"format": 1, "weights": "none"}
    written: Row = {"work": "reference cache", "rows": rows, "step": "write"}
    with _measured(memory, written, rows):
        for start in range(0, rows, COMMIT_SEQUENCES):
            part = range(start, min(rows, start + COMMIT_SEQUENCES))
            append_cache(folder, key, ((tokens.sequence_id(row), *values[row]) for row in part))
    size = sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    yield written | {"bytes each": size / rows}
    read: Row = {"work": "reference cache", "rows": rows, "step": "read"}
    with _measured(memory, read, rows):
        cached = read_cache(folder, key)
        assert not len(missing_rows(tokens, cached))
    yield read
    shutil.rmtree(folder)


def measure_sharing(items: int) -> Iterator[Row]:
    from jpo_ray.engine.batches import Limits, graph

    rng = np.random.default_rng(0)
    first, second = np.triu_indices(items, 1)
    if len(first) > shards.ROWS:  # as many of all pairs, at random
        chosen = rng.choice(len(first), shards.ROWS, replace=False)
        first, second = first[chosen], second[chosen]
    memory = Memory()
    for per_step in STEPS:
        row: Row = {"work": "one shard's batches", "items": items, "comparisons": len(first), "per step": per_step}
        with _measured(memory, row, len(first)):
            batches = graph(first, second, Limits(per_step), 0, 0)
        scored = sum(len(np.unique(np.concatenate([first[batch], second[batch]]))) for batch in batches)
        yield row | {"items per comparison": scored / len(first)}


def measure_tokens(items: int) -> Iterator[Row]:
    from jpo_ray.data.tokens import Layout, tokenize
    from jpo_ray.engine.model import load_model, load_tokenizer
    from jpo_ray.engine.scoring import make_scorer
    from jpo_ray.engine.step import score_all
    from jpo_ray.sandbox import BASE_MODEL, make_rows

    memory, rows = Memory(), make_rows("train", items // 2, 0)
    scorer = make_scorer(load_model(BASE_MODEL, dtype="float32"))
    texts = [(row["instruction"], row[name]) for row in rows for name in ("response_0", "response_1")]
    made: Row = {"work": "items and tokens", "items": items, "step": "tokenize"}
    layout = Layout("### Instructions: {instruction}\n\n### Response:", " ", 256)
    with _measured(memory, made, items):
        tokens = tokenize(load_tokenizer(BASE_MODEL), layout, *(list(side) for side in zip(*texts, strict=True)))
    count = int(tokens.lengths.sum())
    yield made | {"tokens": count}
    scored: Row = {"work": "items and tokens", "items": items, "step": "reference scores"}
    with _measured(memory, scored, items):
        score_all(scorer, tokens, np.arange(items), max_tokens=4096)
    yield scored | {"tokens": count, "us per token": 1e6 * scored["seconds"] / count}


WORKERS: dict[str, Callable[..., Iterator[Row]]] = {
    "edges": measure_edges,
    "cache": measure_cache,
    "sharing": measure_sharing,
    "tokens": measure_tokens,
}

if __name__ == "__main__":
    main()
