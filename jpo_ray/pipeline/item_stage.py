"""The items stage: every source read, merged and split."""

from pathlib import Path
from typing import Any, cast

from jpo_ray import records
from jpo_ray.artifacts import stage_fingerprint
from jpo_ray.config import SANDBOX, ItemsConfig, Source
from jpo_ray.data.items import build_items
from jpo_ray.data.sources import SourceRows, parse_rows, read_source
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, hash_file
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.pipeline.instructions import long_instructions
from jpo_ray.pipeline.pair_stage import embedding_slice, leaking_instructions

SANDBOX_ROWS = {"train": 3000, "validation": 300, "test": 500}


def items_specs(context: Context) -> list[Spec]:
    config = context.config.items
    sources = split_sources(config)
    inputs = {f"{split}:{source.path}": _source_hash(source) for split, group in sources.items() for source in group}

    def make(out: Path) -> dict[str, Any]:
        rows = {
            split: [read_rows(source, split, config.on_bad_rows, context.config.seed) for source in group]
            for split, group in sources.items()
        }
        tables = build_items(rows, context.config.seed)
        without: dict[str, set[str]] = {}
        if config.max_instruction_tokens:
            without["too_long"] = long_instructions(context, tables.items, config.max_instruction_tokens)
            tables = build_items(rows, context.config.seed, without)
        if config.drop_near_duplicates:
            without["near_duplicates"] = leaking_instructions(context, tables.items)
            tables = build_items(rows, context.config.seed, without)
        records.write_table(out / "items.parquet", tables.items, records.ITEMS)
        records.write_table(out / "labels.parquet", tables.labels, records.LABELS)
        records.write_table(out / "ratings.parquet", tables.ratings, records.RATINGS)
        return dict(tables.counts)

    slice_ = {"items": config.model_dump(), "seed": context.config.seed}
    if config.drop_near_duplicates:
        slice_["embedding"] = embedding_slice(context.config.pairs)
    if config.max_instruction_tokens:
        slice_["prompts"] = context.config.model.model_dump(include={"model_name_or_path", "template"})
    return [Spec("items", "items", inputs, slice_, make)]


def _source_hash(source: Source) -> str:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return stage_fingerprint("folder", file_hashes(path), {})
    return hash_file(path) if path.is_file() else source.path


def split_sources(config: ItemsConfig) -> dict[str, list[Source]]:
    return {"sft": config.sft, "train": config.train, "validation": config.validation, "test": config.test}


def read_rows(source: Source, split: str, on_bad_rows: Any, seed: int, *, cached_only: bool = False) -> SourceRows:
    """The rows of a source, the sandbox's among them. Raises `InputError` as `read_source` does."""
    if source.path != SANDBOX:
        return read_source(source, on_bad_rows, cached_only=cached_only)
    from jpo_ray.sandbox import make_rows

    try:
        rows = make_rows(cast(Any, split), source.limit or SANDBOX_ROWS.get(split, 0), seed)
    except ValueError as error:
        raise InputError(f"items.{split}: {error}") from error
    numbered = ((f"sandbox {split} row {number}", row) for number, row in enumerate(rows, start=1))
    return parse_rows(numbered, source.model_copy(update={"format": "dove_single", "limit": None}), on_bad_rows)
