"""Caches that all runs share: append-only folders of Parquet parts, one folder for each key that decides the values.

`JPO_CACHE` may be a URI: parts then are on the store, and in a working copy on this machine.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jpo_ray.files import flush_one, hash_file, write_json
from jpo_ray.store import StoreError, is_uri
from jpo_ray.stored import Place, make_working_copy, open_store, place_of, users_folder, working_copy

LOGGER = logging.getLogger(__name__)
PART_DIGITS = 16  # of the hash of a part's content, in its name


def cache_folder() -> Path:
    """`JPO_CACHE`, or `jpo-ray` in the user's cache folder. Of a URI it is the working copy on this machine.

    Raises `InputError` where a URI's store cannot be reached.
    """
    named = os.environ.get("JPO_CACHE") or ""
    if not is_uri(named):
        return Path(named).expanduser() if named else users_folder()
    copy = working_copy("caches", named)
    open_store(named)
    make_working_copy(named, copy)
    return copy


def key_folder(cache: Path, kind: str, key: dict[str, Any]) -> Path:
    """The folder of `kind` (reference, embeddings) whose values were made under this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache / kind / digest


def read_parts(folder: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """All parts in a key's folder; of a cache on a store those that this machine lacks are fetched first.

    A part whose content is not what its name says is deleted, here or there, and named in the log.
    """
    for part in folder.glob("part-*.parquet"):
        if not _is_whole(part, part.name):
            _say_damaged(part)
            part.unlink(missing_ok=True)
    if (place := place_of(folder)) is not None:
        fetch_parts(place, folder)
    for part in sorted(folder.glob("part-*.parquet")):
        yield pq.read_table(part, schema=schema)


def append_part(folder: Path, key: dict[str, Any], table: pa.Table) -> None:
    """Add rows as a new part, written aside, flushed to disk and renamed: a reader sees all of it or none."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key.json").exists():
        write_json(folder / "key.json", key)
    staged = folder / f".{secrets.token_hex(8)}"
    try:
        pq.write_table(table, staged, compression="zstd")
        flush_one(staged)
        part = staged.rename(folder / _name_of(staged))
    except BaseException:  # such as a full disk
        staged.unlink(missing_ok=True)
        raise
    if (place := place_of(folder)) is not None:
        for path in (part, folder / "key.json"):  # whole, also where Ctrl-C comes: others would read a part cut short
            place.store.write(f"{place.name}/{path.name}", path.read_bytes())


def fetch_parts(place: Place, folder: Path) -> None:
    """Copy a key's parts from the store. One whose content is not what its name says is deleted there, and logged."""
    store, name = place.store, place.name
    lacking = [part for part in store.names(name) if part.startswith("part-") and not (folder / part).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as staged:
        _download(place, Path(staged), lacking)
        for part in lacking:
            if _is_whole(Path(staged) / part, part):
                (Path(staged) / part).rename(folder / part)
            else:
                _delete_if_damaged(place, part)


def _download(place: Place, folder: Path, parts: list[str]) -> None:
    try:
        place.store.download(place.name, folder, parts)
    except FileNotFoundError:  # another run has just deleted a damaged one
        left = sorted({*parts} & {*place.store.names(place.name)})
        if left == sorted(parts):
            raise
        _download(place, folder, left)


def _delete_if_damaged(place: Place, part: str) -> None:
    """Delete a part on the store that came damaged, if it still is when read again, past this machine's disk."""
    name = f"{place.name}/{part}"
    content = place.store.read(name)
    if content is None:  # another run has just deleted it
        return
    _say_damaged(place.store.shown(name))
    if _named(hashlib.sha256(content).hexdigest()) != part:
        with suppress(StoreError):  # one that may only be read
            place.store.delete(name)


def _name_of(part: Path) -> str:
    return _named(hash_file(part))


def _named(digest: str) -> str:
    return f"part-{digest[:PART_DIGITS]}.parquet"


def _is_whole(part: Path, name: str) -> bool:
    try:
        return _name_of(part) == name
    except FileNotFoundError:  # another run has just deleted it
        return False


def _say_damaged(part: Path | str) -> None:
    # As an error, since warnings are not shown while Ray works.
    LOGGER.error("%s: is damaged and left out, its values are made again", part)
