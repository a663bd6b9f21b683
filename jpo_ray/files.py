"""Files written whole or not at all, and their hashes."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jpo_ray.errors import InputError


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in files}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Have `folder` and all that is below it on disk: after a rename a power cut leaves no empty files behind."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            flush_one(path)


def flush_one(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it with a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """The folder that `--out` names, made; `InputError` where something cannot be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside, flush it to disk and rename it into place."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with staged.open("w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
