"""Tables with a row per comparison: one Parquet file, or, where there are many rows, a folder of files, its shards.

Shards are written and read one at a time, so that nobody needs memory for all comparisons; in tasks, where they have
more than a few, so that the driver's memory is that of a small run. A shard of pairs, of
judgments and of preferences that belong together have the same name. Each file's footer holds how many rows of each
split and protocol are in it. `pyarrow.parquet.read_table` reads both forms.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Kind = tuple[str, str]  # split, protocol
COUNTS = b"jpo_ray.counts"
ROWS = 2**20  # of a shard, about
FEW = 2**16  # comparisons that a driver may hold
# Columns of few distinct values. A shard's item ids need more room than Parquet's default for them, 1 MiB, beyond which
# each would stand there in full.
REPEATED = {
    "item_a", "item_b", "chosen", "rejected", "protocol", "strategy", "split", "annotator", "verdict", "verdict_ab",
    "verdict_ba", "weight", "probability", "tokens", "cost", "reason",
}  # fmt: skip
DICTIONARY_BYTES = 2**24


def files_of(path: Path) -> list[Path]:
    """The files of a table, in order."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def shard_path(path: Path, name: str | None) -> Path:
    """Where the shard `name` of a table is; None: where the table is one file. Makes the folder."""
    if name is None:
        return path
    path.mkdir(parents=True, exist_ok=True)
    return path / name


def shard_names(path: Path) -> list[str | None]:
    """The names of a table's shards; `[None]` where it is one file."""
    return [file.name for file in files_of(path)] if path.is_dir() else [None]


def numbered_name(number: int) -> str:
    return f"{number:05d}.parquet"


def write_shard(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    """Write one file; the table's splits and protocols, where it has them, are counted in its footer."""
    path.write_bytes(shard_bytes(table, schema))


def shard_bytes(table: pa.Table, schema: pa.Schema) -> pa.Buffer:
    """The contents of such a file. Ray hands buffers on without a copy."""
    table = table.select(schema.names).cast(schema)
    if {"split", "protocol"} <= set(schema.names):
        table = table.replace_schema_metadata({COUNTS: json.dumps(_written(kinds_in(table)))})
    written = pa.BufferOutputStream()
    repeated = [name for name in schema.names if name in REPEATED]
    pq.write_table(
        table, written, compression="zstd", use_dictionary=repeated, dictionary_pagesize_limit=DICTIONARY_BYTES
    )
    return written.getvalue()


def kinds_in(table: pa.Table) -> Counter[Kind]:
    """Rows by split and protocol."""
    counted = table.group_by(["split", "protocol"]).aggregate([([], "count_all")]).to_pylist()
    return Counter({(row["split"], row["protocol"]): row["count_all"] for row in counted})


def kinds_of(path: Path) -> Counter[Kind]:
    """Rows by split and protocol of one file: from its footer, or, where another program wrote it, by counting."""
    found = (pq.read_schema(path).metadata or {}).get(COUNTS)
    if found is None:
        return kinds_in(pq.read_table(path, columns=["split", "protocol"]))
    return Counter({(split, protocol): count for split, protocol, count in json.loads(found)})


def kinds_of_all(paths: Iterable[Path]) -> Counter[Kind]:
    return sum(map(kinds_of, paths), Counter[Kind]())


def distinct_values(paths: Iterable[Path], columns: Sequence[str]) -> pa.Array:
    """The distinct values of some columns of strings together, in order of appearance, file by file."""
    seen = pa.array([], pa.string())
    for path in paths:
        for column in columns:  # as numbers of few strings: whole columns of them take ten times the memory
            [whole] = pq.read_table(path, columns=[column], read_dictionary=[column]).columns
            parts = [chunk.dictionary.take(chunk.indices.unique().drop_null()) for chunk in whole.chunks]
            seen = pa.concat_arrays([seen, *(part.cast(pa.string()) for part in parts)]).unique()
    return seen


def file_buffer(path: Path) -> pa.Buffer:
    """A file's contents, for a task that may run where the file is not; `read_shard` reads them."""
    return pa.py_buffer(path.read_bytes())


def read_shard(path: Path | pa.Buffer, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """One file, or some of its columns."""
    table = pq.read_table(path if isinstance(path, Path) else pa.BufferReader(path), schema=schema, columns=columns)
    return table if columns is None else table.select(columns)


def row_count(path: Path) -> int:
    """Rows of a table, from its files' footers."""
    return sum(pq.read_metadata(file).num_rows for file in files_of(path))


def _written(kinds: Counter[Kind]) -> list[list[str | int]]:
    return [[*kind, count] for kind, count in sorted(kinds.items())]
