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
process has for itself (unique set size; what it reads in Ray's object store is shared), looked at five times a second
from a process beside; of the workers, all together. CPU time is that of this process and of its workers: other work on
the machine changes it less than it changes the seconds.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scaled.edges import measure_edges
from scaled.memory import Memory, Row, measured, watching

from jpo_ray import shards
from jpo_ray.artifacts import package_versions
from jpo_ray.files import write_json

SIZES = ((1_000, 10_000), (10_000, 100_000), (100_000, 1_000_000), (100_000, 10_000_000))
CACHE_ROWS = (10_000, 100_000, 1_000_000)
SHARING_ITEMS = (44_000, 1_449)  # of two blocks of 45 of a million items; of a group in which all are compared
STEPS = (512, 8_192, 65_536)
TOKEN_ITEMS = (300, 3_000, 30_000)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, options, out = sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
        with watching() as memory:
            write_json(out, {"rows": list(WORKERS[name](memory, **options))})
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


def measure_cache(memory: Memory, rows: int) -> Iterator[Row]:
    from jpo_ray.cluster.reference import COMMIT_SEQUENCES
    from jpo_ray.data.tokens import TokenizedItems
    from jpo_ray.engine.reference import append_cache, missing_rows, read_cache

    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32_000, 100 * rows, dtype=np.int32)
    values = -rng.random((rows, 2)) * 100
    tokens = TokenizedItems(ids, np.arange(rows + 1) * 100, np.full(rows, 40, dtype=np.int32), truncated=0)
    key = {"format": 1, "weights": "none"}
    written: Row = {"work": "reference cache", "rows": rows, "step": "write"}
    with measured(memory, written, rows):
        for start in range(0, rows, COMMIT_SEQUENCES):
            part = range(start, min(rows, start + COMMIT_SEQUENCES))
            append_cache(folder, key, ((tokens.sequence_id(row), *values[row]) for row in part))
    size = sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    yield written | {"bytes each": size / rows}
    read: Row = {"work": "reference cache", "rows": rows, "step": "read"}
    with measured(memory, read, rows):
        cached = read_cache(folder, key)
        assert not len(missing_rows(tokens, cached))
    yield read
    shutil.rmtree(folder)


def measure_sharing(memory: Memory, items: int) -> Iterator[Row]:
    from jpo_ray.engine.batches import Limits, graph

    rng = np.random.default_rng(0)
    first, second = np.triu_indices(items, 1)
    if len(first) > shards.ROWS:  # as many of all pairs, at random
        chosen = rng.choice(len(first), shards.ROWS, replace=False)
        first, second = first[chosen], second[chosen]
    for per_step in STEPS:
        row: Row = {"work": "one shard's batches", "items": items, "comparisons": len(first), "per step": per_step}
        with measured(memory, row, len(first)):
            batches = graph(first, second, Limits(per_step), 0, 0)
        scored = sum(len(np.unique(np.concatenate([first[batch], second[batch]]))) for batch in batches)
        yield row | {"items per comparison": scored / len(first)}


def measure_tokens(memory: Memory, items: int) -> Iterator[Row]:
    from jpo_ray.data.tokens import Layout, tokenize
    from jpo_ray.engine.model import load_model, load_tokenizer
    from jpo_ray.engine.scoring import make_scorer
    from jpo_ray.engine.step import score_all
    from jpo_ray.sandbox import BASE_MODEL, make_rows

    rows = make_rows("train", items // 2, 0)
    scorer = make_scorer(load_model(BASE_MODEL, dtype="float32"))
    texts = [(row["instruction"], row[name]) for row in rows for name in ("response_0", "response_1")]
    made: Row = {"work": "items and tokens", "items": items, "step": "tokenize"}
    layout = Layout("### Instructions: {instruction}\n\n### Response:", " ", 256)
    with measured(memory, made, items):
        tokens = tokenize(load_tokenizer(BASE_MODEL), layout, *(list(side) for side in zip(*texts, strict=True)))
    count = int(tokens.lengths.sum())
    yield made | {"tokens": count}
    scored: Row = {"work": "items and tokens", "items": items, "step": "reference scores"}
    with measured(memory, scored, items):
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
