"""Caches that all runs share: append-only folders of Parquet parts, one folder for each key that decides the values."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jpo_ray.errors import InputError
from jpo_ray.files import write_json


def cache_folder() -> Path:
    """`JPO_CACHE`, or `jpo-ray` in the user's cache folder. Raises `InputError` for an object store's address."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("JPO_CACHE") or f"{home}/jpo-ray"
    if "://" in folder:
        raise InputError(f"JPO_CACHE={folder}: object stores are not supported yet; name a folder that all nodes see")
    return Path(folder).expanduser()


def key_folder(cache: Path, kind: str, key: dict[str, Any]) -> Path:
    """The folder of `kind` (reference, embeddings) whose values were made under this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache / kind / digest


def read_parts(folder: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    for part in sorted(folder.glob("part-*.parquet")):
        yield pq.read_table(part, schema=schema)


def append_part(folder: Path, key: dict[str, Any], table: pa.Table) -> None:
    """Add rows as a new part, written aside and renamed: a reader sees all of it or none."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key.json").exists():
        write_json(folder / "key.json", key)
    name = f"part-{secrets.token_hex(8)}.parquet"
    staged = folder / f".{name}"
    pq.write_table(table, staged, compression="zstd")
    staged.rename(folder / name)
