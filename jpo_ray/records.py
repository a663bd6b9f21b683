"""Row identities, column schemas and Parquet input/output of every table.

Ids are content hashes: the same text has the same id everywhere, so re-running a stage is idempotent. The instruction
text stands in every item row for convenience, but Parquet's dictionary encoding stores each distinct one once.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ID_HEX_DIGITS = 20  # 80 bits: a collision among a billion rows has a chance below one in a million

VERDICTS = ("a", "b", "tie", "invalid")
PROTOCOLS = ("conditional", "joint")
SPLITS = ("sft", "train", "validation", "test")  # an instruction that is in several stays in the last of them

ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("instruction_id", pa.string()),
        ("instruction", pa.string()),
        ("response", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("sft", pa.bool_()),  # member of D_S: the one response per instruction that SFT and joint pairs use
        ("gold", pa.bool_()),  # the response that samples are compared with
    ]
)
# Ready-made labels that came with the data; `judge: labels` reads them.
LABELS = pa.schema([("item_a", pa.string()), ("item_b", pa.string()), ("verdict", pa.string())])
# Ready-made scores that came with the data; `judge: ratings` reads them.
RATINGS = pa.schema([("item_id", pa.string()), ("rating", pa.float64())])
EMBEDDINGS = pa.schema([("instruction_id", pa.string()), ("vector", pa.large_list(pa.float16()))])
# Instructions so alike that one of them in training and the other in a test would leak.
NEAR_DUPLICATES = pa.schema(
    [
        ("instruction_a", pa.string()),  # of the less protected split
        ("instruction_b", pa.string()),
        ("similarity", pa.float32()),
        ("leaks", pa.bool_()),  # whether their splits differ
    ]
)
PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("item_a", pa.string()),
        ("item_b", pa.string()),
        ("protocol", pa.string()),
        ("similarity", pa.float32()),  # cosine of the two instructions
        ("strategy", pa.string()),
        ("split", pa.string()),
    ]
)
JUDGMENTS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("annotator", pa.string()),
        ("verdict", pa.string()),
        ("verdict_ab", pa.string()),
        ("verdict_ba", pa.string()),  # null where only one order was shown (ready-made labels)
        ("probability", pa.float64()),  # that a is better; null where the annotator does not say how sure it is
        ("gap", pa.float64()),  # by how much a's score is higher; null where the annotator gives no scores
        ("text_ab", pa.string()),
        ("text_ba", pa.string()),
        ("tokens", pa.int64()),
        ("cost", pa.float64()),  # US dollars
        ("reason", pa.string()),
    ]
)
PREFERENCES = pa.schema(
    [
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("protocol", pa.string()),
        ("weight", pa.float32()),
        ("probability", pa.float32()),  # that `chosen` is better: 1 unless the label is soft
        ("gap", pa.float32()),  # by how much, in the judge's scores or the log odds of its soft label; null: not known
        ("split", pa.string()),
    ]
)
# What all judgments of a split say of each item together (`feedback/strengths.py`), in log odds.
STRENGTHS = pa.schema(
    [
        ("item_id", pa.string()),
        ("split", pa.string()),
        ("strength", pa.float64()),
        ("standard_error", pa.float64()),
        ("comparisons", pa.int32()),
    ]
)
# Log-probs in nats, summed over tokens, of item `item_id`; for KTO also of mismatched items (instruction of one item,
# response of another), named by the two item ids they are made of so that no text is stored again.
REFERENCE = pa.schema(
    [
        ("item_id", pa.string()),
        ("response_of", pa.string()),  # the item whose response is scored; `item_id` itself unless mismatched
        ("instruction_logprob", pa.float64()),
        ("response_logprob", pa.float64()),
        ("instruction_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
    ]
)
SAMPLES = pa.schema(
    [
        ("instruction_id", pa.string()),
        ("instruction", pa.string()),
        ("model", pa.string()),
        ("temperature", pa.float64()),  # as requested
        ("effective_temperature", pa.float64()),  # as the engine used it: vLLM raises values below 0.01
        ("seed", pa.int64()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("engine", pa.string()),
    ]
)
SAMPLE_JUDGMENTS = pa.schema(
    [
        ("instruction_id", pa.string()),
        ("model", pa.string()),
        ("temperature", pa.float64()),
        ("seed", pa.int64()),
        *[JUDGMENTS.field(name) for name in JUDGMENTS.names if name != "pair_id"],  # a = sample, b = gold
    ]
)


def content_id(kind: str, *parts: str) -> str:
    """Hash of `parts`, unambiguous (lengths are hashed too) and distinct between kinds of things."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:ID_HEX_DIGITS]


def instruction_id(instruction: str) -> str:
    return content_id("instruction", instruction)


def item_id(instruction: str, response: str) -> str:
    return content_id("item", instruction, response)


def pair_id(item_a: str, item_b: str, protocol: str) -> str:
    """Id of a comparison, the same in whichever order its items are given."""
    return content_id("pair", *sorted((item_a, item_b)), protocol)


def pair_ids(lower: Sequence[str], higher: Sequence[str], protocol: str) -> list[str]:
    """`pair_id` of many pairs whose items stand in order. Item ids are hexadecimal: JSON escapes nothing in them."""
    texts = (f'["pair", "{one}", "{other}", "{protocol}"]' for one, other in zip(lower, higher, strict=True))
    return [hashlib.sha256(text.encode()).hexdigest()[:ID_HEX_DIGITS] for text in texts]


def write_table(path: Path, rows: Sequence[dict[str, Any]] | pa.Table, schema: pa.Schema) -> pa.Table:
    """Write rows in `schema`'s column order; raises if a column is missing or of another type."""
    table = rows.select(schema.names).cast(schema) if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, compression="zstd")
    return table


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table written by `write_table`."""
    return pq.read_table(path, schema=schema)
