"""A tile's pairs, which are numbers until then, as rows of `records.PAIRS`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records, shards
from jpo_ray.pairs import spread
from jpo_ray.pairs.sides import Ints

CONDITIONAL, LABELLED, CHOSEN = 0, 1, 2  # kinds of pairs
PROTOCOL_OF = pa.array(["conditional", "joint", "joint"])
AT_ONCE = 2**16  # ids as Python's strings, which take ten times the memory


@dataclass(frozen=True)
class PairNames:
    """What turns a tile's numbers into rows of `records.PAIRS`."""

    ids: pa.Array
    split: str
    strategy: str
    rows: Ints | None
    columns: Ints | None
    end: spread.End | None
    symmetric: bool


def file_bytes(names: Sequence[PairNames], parts: Sequence[tuple[Any, Any]]) -> pa.Buffer:
    """The file of several splits' only tiles."""
    tables = [pair_table(of_split, *part) for of_split, part in zip(names, parts, strict=True)]
    return shards.shard_bytes(pa.concat_tables([records.PAIRS.empty_table(), *tables]), records.PAIRS)


def tile_bytes(names: PairNames, pairs: Any, candidates: Any) -> pa.Buffer | None:
    table = pair_table(names, pairs, candidates)
    return shards.shard_bytes(table, records.PAIRS) if len(table) else None


def pair_table(names: PairNames, pairs: Any, candidates: Any) -> pa.Table:
    """Rows of `records.PAIRS` of one tile. A labelled pair that was also chosen stays a labelled one."""
    first, second = pairs["first"].astype(np.int64), pairs["second"].astype(np.int64)
    similarity, kind = pairs["similarity"], pairs["kind"]
    if candidates is not None:
        assert names.rows is not None
        assert names.columns is not None
        taken = spread.taken(candidates, names.end, symmetric=names.symmetric)
        first = np.concatenate([first, names.rows[taken["row"]]])
        second = np.concatenate([second, names.columns[taken["column"]]])
        similarity = np.concatenate([similarity, taken["similarity"]])
        kind = np.concatenate([kind, np.full(len(taken), CHOSEN, dtype=np.uint8)])
    kept = _each_once(first, second)
    ids = names.ids
    a, b = ids.take(pa.array(first[kept])), ids.take(pa.array(second[kept]))
    ascending = pc.less(a, b)
    lower, higher = pc.if_else(ascending, a, b), pc.if_else(ascending, b, a)
    kind = pa.array(kind[kept])
    protocol = PROTOCOL_OF.take(kind)
    pair_id = np.empty(len(kept), dtype=object)
    for name in records.PROTOCOLS:
        of_protocol = np.flatnonzero(pc.equal(protocol, name))
        for start in range(0, len(of_protocol), AT_ONCE):
            some = of_protocol[start : start + AT_ONCE]
            low, high = (side.take(pa.array(some)).to_pylist() for side in (lower, higher))
            pair_id[some] = records.pair_ids(low, high, name)
    columns = {
        "pair_id": pa.array(pair_id, pa.string()),
        "item_a": lower,
        "item_b": higher,
        "protocol": protocol,
        "similarity": similarity[kept],
        "strategy": pa.array(["conditional", "labelled", names.strategy]).take(kind),
        "split": pa.repeat(names.split, len(kept)),
    }
    return pa.table(columns, schema=records.PAIRS)


def _each_once(first: Ints, second: Ints) -> Ints:
    """Which of some pairs to keep: each once as it first comes, in the place where it last comes."""
    code = np.minimum(first, second) << 32 | np.maximum(first, second)
    _, as_first = np.unique(code, return_index=True)
    _, from_end = np.unique(code[::-1], return_index=True)
    kept: Ints = as_first[np.argsort(-from_end, kind="stable")]
    return kept
