"""Comparisons of synthetic items through the stages: pairs, judgments, the edges that a trainer reads, its batches."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from jpo_ray import records, shards
from scaled.memory import Memory, Row, measured

WIDTH = 384
PER_STEP = 512  # comparisons of a training step


def measure_edges(memory: Memory, items: int, edges: int) -> Iterator[Row]:
    from jpo_ray.config_file import parse_config

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
    base = {"work": f"edges ({items:,} items, {edges:,} comparisons)"}
    yield from _stages(memory, base, root, config, edges)
    yield from _sampler(memory, base, root, config.train[0])
    shutil.rmtree(root)


def _stages(memory: Memory, base: Row, root: Path, config: Any, edges: int) -> Iterator[Row]:
    """What `pairs` (after the embeddings) and `judge` do."""
    from jpo_ray.pipeline import STAGES
    from jpo_ray.pipeline.context import Context
    from jpo_ray.pipeline.judge_stage import judge_all
    from jpo_ray.pipeline.pair_shards import make_pairs
    from jpo_ray.runs import RunDir

    with ExitStack() as stack:
        context = Context(RunDir(root), config, Console(file=StringIO()), STAGES, stack)
        ray = context.ray()
        ray.get(ray.remote(lambda: 0).remote())  # workers are up
        for name in ("pairs", "judge"):
            (root / name).mkdir()
        pairs: Row = base | {"step": "pairs"}
        with measured(memory, pairs, edges):
            make_pairs(context, root / "pairs", root / "work")
        yield pairs | _stored(root / "pairs" / "pairs.parquet")
        shutil.rmtree(root / "work")
        judged: Row = base | {"step": "judge"}
        with measured(memory, judged, edges):
            judge_all(context, root / "judge")
        yield judged | _stored(root / "judge" / "judgments.parquet")


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
        with measured(memory, row, count):
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
