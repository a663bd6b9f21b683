"""`jpo annotate`: which comparisons people are shown."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray import records
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Comparison
from jpo_ray.feedback.judge import comparisons_of
from jpo_ray.pipeline.judge_files import file_comparisons
from jpo_ray.runs import RunDir


def comparisons_to_annotate(
    pairs: Path | None, run_dir: Path | str | None, limit: int | None, seed: int = 0
) -> list[Comparison]:
    """Of a file or of a run; at most `limit` drawn ones of a file.

    Of a run `limit` joint comparisons, with the conditional ones of their items, since what the protocols share shows
    only on items that both have ranked. Raises `InputError` where there is none.
    """
    if pairs is not None:
        found = list(file_comparisons(pairs).values())
        return found if limit is None or limit >= len(found) else random.Random(seed).sample(found, limit)
    if run_dir is None:
        return []  # what the annotations' folder holds already
    run = RunDir(run_dir)
    for artifact in ("items", "pairs"):
        run.require(artifact, artifact)
    table = records.read_table(run.path("pairs") / "pairs.parquet", records.PAIRS)
    if not len(table):
        raise InputError(f"{run_dir}: the run has no pairs to annotate")
    items = records.read_table(run.path("items") / "items.parquet", records.ITEMS)
    return comparisons_of(table if limit is None else _drawn(table, limit, seed), items)


def _drawn(pairs: pa.Table, limit: int, seed: int) -> pa.Table:
    joint = pairs.filter(pc.equal(pairs["protocol"], "joint"))
    conditional = pairs.filter(pc.equal(pairs["protocol"], "conditional"))
    if not len(joint):
        return _sample(conditional, limit, seed)
    joint = _sample(joint, limit, seed)
    shown = pa.chunked_array([*joint["item_a"].chunks, *joint["item_b"].chunks]).unique()
    ranked = pc.or_(*(pc.is_in(conditional[side], value_set=shown) for side in ("item_a", "item_b")))
    return pa.concat_tables([conditional.filter(ranked), joint])


def _sample(pairs: pa.Table, limit: int, seed: int) -> pa.Table:
    return pairs.take(sorted(random.Random(seed).sample(range(len(pairs)), min(limit, len(pairs)))))
