"""The items stage: every source read, merged and split."""

from pathlib import Path
from typing import Any, cast

from jpo_ray import records
from jpo_ray.artifacts import stage_fingerprint
from jpo_ray.config import Source
from jpo_ray.data.items import build_items
from jpo_ray.data.sources import SourceRows, parse_rows, read_source
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, hash_file
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.pipeline.pair_stage import embedding_slice, leaking_instructions

SANDBOX = "sandbox"
SANDBOX_ROWS = {"train": 3000, "validation": 300, "test": 500}


def items_specs(context: Context) -> list[Spec]:
    config = context.config.items
    sources = {"train": config.train, "validation": config.validation, "test": config.test}
    inputs = {f"{split}:{source.path}": _source_hash(source) for split, group in sources.items() for source in group}

    def make(out: Path) -> dict[str, Any]:
        rows = {
            split: [_read(source, split, config.on_bad_rows, context.config.seed) for source in group]
            for split, group in sources.items()
        }
        tables = build_items(rows, context.config.seed)
        if config.drop_near_duplicates:
            tables = build_items(rows, context.config.seed, leaking_instructions(context, tables.items))
        records.write_table(out / "items.parquet", tables.items, records.ITEMS)
        records.write_table(out / "labels.parquet", tables.labels, records.LABELS)
        records.write_table(out / "ratings.parquet", tables.ratings, records.RATINGS)
        return dict(tables.counts)

    slice_ = {"items": config.model_dump(), "seed": context.config.seed}
    if config.drop_near_duplicates:
        slice_["embedding"] = embedding_slice(context.config.pairs)
    return [Spec("items", "items", inputs, slice_, make)]


def _source_hash(source: Source) -> str:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return stage_fingerprint("folder", file_hashes(path), {})
    return hash_file(path) if path.is_file() else source.path


def _read(source: Source, split: str, on_bad_rows: Any, seed: int) -> SourceRows:
    if source.path != SANDBOX:
        return read_source(source, on_bad_rows)
    from jpo_ray.sandbox import make_rows

    try:
        rows = make_rows(cast(Any, split), source.limit or SANDBOX_ROWS[split], seed)
    except ValueError as error:
        raise InputError(f"items.{split}: {error}") from error
    numbered = ((f"sandbox {split} row {number}", row) for number, row in enumerate(rows, start=1))
    return parse_rows(numbered, source.model_copy(update={"format": "dove_single", "limit": None}), on_bad_rows)
