"""Judgments that follow from scores of items, a table at a time: the same as `judge` asks of an annotator, row by row.

N scores decide all comparisons of N items, of which there may be a billion: no object is made for any of them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records

ROUNDING = 1e-9  # 0.90 - 0.85 must be within a tie band of 0.05, though not in binary
NORMAL = NormalDist()
SAME = "the same item twice"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ByScores:
    """How scores decide: Gaussian `noise` on the difference of two, drawn per order; up to `tie_band` is a tie."""

    name: str
    noise: float
    tie_band: float
    seed: int


@dataclass(frozen=True)
class Scores:
    """Of N items: score float64[N], NaN where an item has none, and then the reason; text as judgments show it."""

    ids: pa.Array
    score: Floats
    reason: pa.Array
    text: pa.Array

    @classmethod
    def of(cls, found: Mapping[str, float | str]) -> "Scores":
        return cls(
            pa.array(list(found), pa.string()),
            np.array([np.nan if isinstance(score, str) else score for score in found.values()], dtype=np.float64),
            pa.array([score if isinstance(score, str) else None for score in found.values()], pa.string()),
            pa.array(["" if isinstance(score, str) else f"{score:.6g}" for score in found.values()], pa.string()),
        )

    def places(self, column: pa.ChunkedArray) -> pa.Array:
        found = pc.index_in(column, value_set=self.ids).combine_chunks()
        if found.null_count:
            raise KeyError(column.filter(pc.is_null(found))[0].as_py())
        return found


def judge_by_scores(pairs: pa.Table, scores: Scores, how: ByScores) -> pa.Table:
    """Rows of `records.JUDGMENTS`, one per pair, in order: both orders, as `judge` has it of `score_annotator`.

    KeyError for an item without an entry in `scores`.
    """
    a, b = (scores.places(pairs[end]) for end in ("item_a", "item_b"))
    same = pc.equal(a, b).to_numpy(zero_copy_only=False)
    first, second = scores.score[a.to_numpy()], scores.score[b.to_numpy()]
    scored = ~np.isnan(first) & ~np.isnan(second) & ~same
    ab, ba = first - second, second - first
    if how.noise:
        ascending = pc.less(pairs["item_a"], pairs["item_b"]).to_pylist()
        keys = pairs["pair_id"].to_pylist()
        ab += how.noise * _normals(how.seed, keys, ascending)
        ba += how.noise * _normals(how.seed, keys, [not forward for forward in ascending])
    of_ab, of_ba = _verdicts(ab, how.tie_band), _verdicts(-ba, how.tie_band)
    both = np.where(of_ab == of_ba, of_ab, "tie")
    nothing, count = pa.scalar(None, pa.string()), len(pairs)
    is_scored, is_same = pa.array(scored), pa.array(same)
    texts = scores.text.take(a), scores.text.take(b)
    shown = [
        pc.if_else(is_scored, pc.binary_join_element_wise(*some, " against "), "") for some in (texts, texts[::-1])
    ]
    of_a, of_b = scores.reason.take(a), scores.reason.take(b)
    two = pc.if_else(pc.equal(of_a, of_b), of_a, pc.binary_join_element_wise(of_a, of_b, "; "))
    reasons = pc.coalesce(two, of_a, of_b)
    columns = {
        "pair_id": pairs["pair_id"],
        "annotator": pa.repeat(how.name, count),
        "verdict": np.where(scored, both, np.where(same, "tie", "invalid")),
        "verdict_ab": pc.if_else(is_same, nothing, pa.array(np.where(scored, of_ab, "invalid"), pa.string())),
        "verdict_ba": pc.if_else(is_same, nothing, pa.array(np.where(scored, of_ba, "invalid"), pa.string())),
        "probability": pa.nulls(count, pa.float64()),
        "gap": pa.array((ab - ba) / 2, mask=~scored),
        "text_ab": shown[0],
        "text_ba": pc.if_else(is_same, nothing, shown[1]),
        "tokens": np.zeros(count, dtype=np.int64),
        "cost": np.zeros(count),
        "reason": pc.if_else(is_same, SAME, pc.if_else(is_scored, "", reasons)),
    }
    return pa.table(columns).cast(records.JUDGMENTS)


def _verdicts(difference: Floats, tie_band: float) -> npt.NDArray[np.str_]:
    """By the difference of a's score to b's."""
    decided = np.where(difference > 0, "a", "b")
    return np.where(np.abs(difference) <= tie_band + ROUNDING, "tie", decided)


def standard_normal(seed: int, key: str, *, forward: bool) -> float:
    """A draw from N(0, 1) that depends on the comparison and its order only."""
    digest = hashlib.sha256(json.dumps([seed, key, "forward" if forward else "backward"]).encode()).digest()
    # 52 bits and a half keep the quantile strictly between 0 and 1 and exact in a double.
    return NORMAL.inv_cdf((int.from_bytes(digest[:8]) // 2**12 + 0.5) / 2**52)


def _normals(seed: int, keys: list[str], forward: list[bool]) -> Floats:
    drawn = (standard_normal(seed, key, forward=ahead) for key, ahead in zip(keys, forward, strict=True))
    return np.fromiter(drawn, dtype=np.float64, count=len(keys))
