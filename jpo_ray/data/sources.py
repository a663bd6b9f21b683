"""Sources: JSON Lines, JSON and Parquet files and Hugging Face datasets, read into rows of one or two items."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jpo_ray.config import Source
from jpo_ray.data.formats import COLUMNS, ID_COLUMNS, BadRow, Row, format_of, row_of
from jpo_ray.errors import InputError
from jpo_ray.files import hash_file

Record = tuple[str, object]  # where it stands, and the raw row (a `BadRow` where it could not even be read)

_FILE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip"}


@dataclass(frozen=True)
class SourceRows:
    """What one source holds."""

    name: str  # the path or dataset id, as the config writes it
    format: str
    rows: list[Row]
    skipped: dict[str, int]  # reason -> number of bad rows left out
    files: list[tuple[str, str]]  # (path, sha256); for a dataset its name and split, and the sha256 of the rows read


def read_source(source: Source, on_bad_rows: Literal["fail", "skip"], *, cached_only: bool = False) -> SourceRows:
    """Read a source's rows. Raises `InputError` that names file, row and key of what cannot be read.

    With `cached_only` nothing is asked of the Hugging Face Hub: its datasets are read where they were before.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        rows = parse_rows(_file_records(path, source.path), source, on_bad_rows)
        return replace(rows, files=[(source.path, hash_file(path))])
    if not path.is_dir() and _names_a_file(source.path):
        raise InputError(f"{source.path}: no such file (nor a Hugging Face dataset id)")
    dataset, label = _load_dataset(source, cached_only=cached_only)
    digest = hashlib.sha256()
    rows = parse_rows(_dataset_records(dataset, label, digest.update), source, on_bad_rows)
    return replace(rows, files=[(label, digest.hexdigest())])


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file by any column names, each with where it stands. Raises `InputError` where one cannot be read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    empty = True
    for where, record in _file_records(path, str(path)):
        empty = False
        if isinstance(record, BadRow):
            raise InputError(record.plain)
        yield where, _values(record, {}, where)
    if empty:
        raise InputError(f"{path}: has no rows")


def parse_rows(records: Iterable[Record], source: Source, on_bad_rows: Literal["fail", "skip"]) -> SourceRows:
    """Make raw rows into rows; also for rows that come from no file. Raises `InputError` as `read_source` does."""
    if unknown := sorted(set(source.columns) - COLUMNS):
        raise InputError(f"{source.path}: columns: `{unknown[0]}` is none of {', '.join(sorted(COLUMNS))}")
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    first_bad: BadRow | None = None
    kind = ""
    seen: dict[tuple[str, object], str] = {}
    absent = set(source.columns.values())  # renamed columns that no row has had
    for where, record in islice(records, source.limit):
        if absent and isinstance(record, dict):
            absent -= record.keys()
        try:
            values = _values(record, source.columns, where)
            kind = kind or format_of(values, source, where)
            row = row_of(values, kind, where)
            _check_id(values, where, seen)
        except BadRow as bad:
            first_bad = first_bad or bad
            skipped[bad.reason] += 1
        else:
            if row.single_turn or not source.single_turn:
                rows.append(row)
            else:
                skipped["more than one turn"] += 1
    if first_bad and on_bad_rows == "fail":
        others = skipped.total() - skipped["more than one turn"] - 1
        raise BadRow(first_bad.where, first_bad.reason, first_bad.detail, others)
    if absent and rows:
        raise InputError(f"{source.path}: columns: no row has a column `{min(absent)}`; check the source's `columns`")
    if not rows:
        none = "no conversation of one turn" if skipped else "no rows"
        raise InputError(f"no usable row: {first_bad}" if first_bad else f"{source.path}: has {none}")
    return SourceRows(source.path, kind, rows, dict(skipped), [])


def _values(record: object, columns: dict[str, str], where: str) -> dict[str, Any]:
    """The raw row by our column names."""
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(where, "not an object", f"the row is {shorten(record)}, not an object of columns")
    if not columns:
        return record
    renamed = {*columns, *columns.values()}
    kept = {name: value for name, value in record.items() if name not in renamed}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}


def _check_id(values: dict[str, Any], where: str, seen: dict[tuple[str, object], str]) -> None:
    for name in ID_COLUMNS:
        value = values.get(name)
        if isinstance(value, str | int) and (first := seen.setdefault((name, value), where)) != where:
            raise BadRow(where, f"repeated `{name}`", f"`{name}` {shorten(value)} stands already at {first}")


def _file_records(path: Path, name: str) -> Iterator[Record]:
    """Rows of a file, by its suffix."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{name}: suffix `{path.suffix}` is not known; name it {', '.join(readers)} by what it holds")
    try:
        yield from reader(path, name)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name}: cannot be read as {path.suffix} ({str(error).splitlines()[0]})") from error


def _jsonl(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as file:  # as bytes: a line ends at a newline only, not at U+2028
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{name} line {number}", _parsed(line.rstrip(), name, number)


def _json(path: Path, name: str) -> Iterator[Record]:
    rows = _parsed(path.read_bytes(), name, 1)
    if not isinstance(rows, list):
        detail = f"the file holds {shorten(rows)}, not a list of objects (one object per line is .jsonl)"
        rows = [rows if isinstance(rows, BadRow) else BadRow(name, "not a list", detail)]
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _parquet(path: Path, name: str) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(data: bytes, name: str, line: int) -> object:
    """The JSON value of `data`, which starts at `line` of a file; or a `BadRow` that says why there is none."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        return BadRow(f"{name} line {line}", "not UTF-8", f"not UTF-8 text (byte 0x{data[error.start]:02x})")
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        return BadRow(f"{name} line {line}", "broken JSON", f"broken JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
        return BadRow(f"{name} line {line}", "broken JSON", f"broken JSON ({str(error).split(';')[0]})")


def _names_a_file(path: str) -> bool:
    """Whether a path that does not exist was meant as one, and not as a dataset id (`name` or `owner/name`)."""
    first, *rest = path.split("/")
    own_folder = bool(rest) and Path(first).is_dir()
    return Path(path).suffix.lower() in _FILE_SUFFIXES or path[:1] in "./~" or len(rest) > 1 or own_folder


def is_remote(source: Source) -> bool:
    """Whether a source is a dataset of the Hugging Face Hub, or files at addresses of their own."""
    return not Path(source.path).expanduser().exists() and not _names_a_file(source.path)


def source_name(source: Source) -> str:
    """The source, and the part of it that is read, for people."""
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files or []
    return "/".join(filter(None, (source.path, source.data_dir, "+".join(files))))


def _load_dataset(source: Source, *, cached_only: bool) -> tuple[Any, str]:
    """One split (`train` by default) of a Hugging Face dataset, from the Hub or a folder; and what to call it."""
    split = source.split or "train"
    try:
        with _offline() if cached_only else nullcontext():
            return _quietly_loaded(source, split), f"{source_name(source)}[{split}]"
    except Exception as error:  # the library and the network raise dozens of kinds
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{source.path}: no Hugging Face dataset could be loaded, split {split} ({problem[:300]}); check the id, "
            "the source's `name`, `split`, `data_dir` and `data_files`, the network and HF_TOKEN"
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """The libraries of the Hub look into their caches alone."""
    import datasets
    import huggingface_hub

    settings: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [setting.HF_HUB_OFFLINE for setting in settings]
    for setting in settings:
        setting.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.HF_HUB_OFFLINE = value


def _quietly_loaded(source: Source, split: str) -> Any:
    """`load_dataset` without its own report of a failure: ours is the one line."""
    from datasets import load_dataset  # here, since it takes a second to import
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return load_dataset(
            source.path,
            name=source.name,
            revision=source.revision,
            split=split,
            data_dir=source.data_dir,
            data_files=source.data_files,
        )
    finally:
        logging.set_verbosity(before)


def _dataset_records(dataset: Any, label: str, feed: Callable[[bytes], None]) -> Iterator[Record]:
    """Rows of a dataset; `feed` is given their content, for the hash that stands for a file's."""
    for number, row in enumerate(dataset, start=1):
        feed(json.dumps(row, sort_keys=True, default=str).encode())
        yield f"{label} row {number}", row
