"""The reference cache: log-probs of items under the reference model, computed once and shared by all runs.

A cache folder holds one folder per reference key (weights, quantisation, dtype, tokenizer, template, truncation) and
in it Parquet parts of rows keyed by the token ids that were scored. Loss, beta, pairs and output path are in no key, so
changing them costs no reference pass; changing one token is a miss.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jpo_ray.cache import append_part, key_folder, read_parts
from jpo_ray.data.tokens import Layout, TokenizedItems
from jpo_ray.errors import InputError

CACHE_FORMAT = 1
KIND = "reference"
PART = pa.schema([("sequence_id", pa.string()), ("instruction", pa.float64()), ("response", pa.float64())])

# Largest difference between a fresh forward pass and the cache, in nats per token, that rounding explains.
TOLERANCE_PER_TOKEN = {"float32": 1e-4, "bfloat16": 5e-2}


def reference_key(*, weights: str, tokenizer: str, layout: Layout, dtype: str, load_in_4bit: bool) -> dict[str, Any]:
    """Everything besides the items that decides a reference log-prob."""
    return {
        "format": CACHE_FORMAT,
        "weights": weights,
        "quantisation": "nf4-double" if load_in_4bit else None,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "layout": asdict(layout),
        "scored": "all but the first token",
    }


def read_cache(cache: Path, key: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """All cached rows of a key: sequence id -> (instruction log-prob, response log-prob)."""
    found: dict[str, tuple[float, float]] = {}
    for table in read_parts(key_folder(cache, KIND, key), PART):
        columns = (table[name].to_pylist() for name in PART.names)
        found.update(
            {sequence: (instruction, response) for sequence, instruction, response in zip(*columns, strict=True)}
        )
    return found


def append_cache(cache: Path, key: dict[str, Any], rows: Iterable[tuple[str, float, float]]) -> None:
    """Add rows as a new part."""
    names = PART.names
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], PART)
    append_part(key_folder(cache, KIND, key), key, table)


def missing_rows(tokens: TokenizedItems, cached: dict[str, tuple[float, float]]) -> npt.NDArray[np.int64]:
    """Rows whose sequence is not cached; of equal sequences only the first."""
    first: dict[str, int] = {}
    for row in range(len(tokens)):
        sequence = tokens.sequence_id(row)
        if sequence not in cached:
            first.setdefault(sequence, row)
    return np.array(sorted(first.values()), dtype=np.int64)


def check_reference(
    fresh: npt.NDArray[np.float64], cached: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], dtype: str
) -> float:
    """Largest difference per token between fresh and cached log-probs (float64[n, 2], tokens int64[n]).

    Before the first update the policy is the reference, so more than rounding means a stale cache: raises `InputError`.
    """
    per_token = np.abs(fresh.sum(axis=1) - cached.sum(axis=1)) / np.maximum(tokens, 1)
    worst = float(per_token.max(initial=0.0))
    if not worst <= TOLERANCE_PER_TOKEN[dtype]:
        raise InputError(
            f"the reference log-probs do not belong to this model: they differ by {worst:.3g} nats per token before "
            f"the first update (rounding in {dtype} explains {TOLERANCE_PER_TOKEN[dtype]:g}); run `jpo reference` again"
        )
    return worst
