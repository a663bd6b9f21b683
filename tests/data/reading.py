"""What the tests of sources share: writing a file, reading it and the error that reading it raises."""

import json
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config import Source
from jpo_ray.data.sources import SourceRows, read_source
from jpo_ray.errors import InputError

FRUIT = "Name a fruit."
MEND = "; mend it or set items.on_bad_rows: skip"


def read(path: Path | str, on_bad_rows: str = "fail", **options: Any) -> SourceRows:
    return read_source(Source(path=str(path), **options), on_bad_rows)  # type: ignore[arg-type]


def jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
