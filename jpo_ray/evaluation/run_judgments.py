"""The judgments of a run, as rows that can be analysed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from jpo_ray import records
from jpo_ray.errors import InputError
from jpo_ray.feedback.analysis import Judged
from jpo_ray.feedback.annotators import Comparison
from jpo_ray.feedback.judge import comparisons_of
from jpo_ray.runs import RunDir


@dataclass(frozen=True)
class Compared:
    """Comparisons by id, what is known of each, and the judgments that stand beside them."""

    comparisons: Mapping[str, Comparison]
    datasets: Mapping[str, str]
    similarities: Mapping[str, float]
    judgments: pa.Table


def compared_in(run: RunDir) -> Compared:
    """Raises `InputError` where the run has no items, pairs or judgments."""
    for artifact in ("items", "pairs", "judge"):
        run.require(artifact, artifact)
    pairs = records.read_table(run.path("pairs") / "pairs.parquet", records.PAIRS)
    items = records.read_table(run.path("items") / "items.parquet", records.ITEMS)
    names = short_names(items["source"].unique().to_pylist())
    source_of = {
        item: names[source] for item, source in zip(*(items[c].to_pylist() for c in ("item_id", "source")), strict=True)
    }
    comparisons = {each.key: each for each in comparisons_of(pairs, items)}
    return Compared(
        comparisons,
        {key: " + ".join(sorted({source_of[e.item_a], source_of[e.item_b]})) for key, e in comparisons.items()},
        dict(zip(pairs["pair_id"].to_pylist(), pairs["similarity"].to_pylist(), strict=True)),
        records.read_table(run.path("judge") / "judgments.parquet", records.JUDGMENTS),
    )


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path by its last part, or by as many as tell it from the others."""
    for parts in range(1, 1 + max(len(Path(path).parts) for path in paths)):
        names = {path: "/".join(Path(path).parts[-parts:]) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def judged_rows(compared: Compared, judgments: pa.Table) -> Iterator[Judged]:
    """Raises `InputError` for a judgment of another comparison."""
    for row in judgments.select(["pair_id", "annotator", "verdict"]).to_pylist():
        comparison = compared.comparisons.get(row["pair_id"])
        if comparison is None:
            raise InputError(f"judgments of {row['annotator']}: comparison {row['pair_id']} is none of those given")
        yield Judged(
            pair=comparison.key,
            annotator=row["annotator"],
            dataset=compared.datasets[comparison.key],
            protocol=comparison.protocol,
            item_a=comparison.item_a,
            item_b=comparison.item_b,
            verdict=row["verdict"],
            similarity=compared.similarities.get(comparison.key, math.nan),
            characters_a=len(comparison.response_a),
            characters_b=len(comparison.response_b),
        )
