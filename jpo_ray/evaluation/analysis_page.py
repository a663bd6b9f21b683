"""The analysis of judgments as a page and as numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpo_ray.evaluation.charts import stacked_bars
from jpo_ray.evaluation.report import render, write_page
from jpo_ray.feedback.analysis import (
    CELLS,
    Judged,
    agreements,
    average_shares,
    circles,
    decisiveness_by_similarity,
    gold_rows,
    interplay,
    length_bias,
    verdict_counts,
)
from jpo_ray.files import write_json

SHOWN = (*CELLS[:2], "both alike", *CELLS[2:])  # of the interplay


def analysis_of(rows: Sequence[Judged], people: Sequence[str]) -> dict[str, Any]:
    """Everything the page shows, as plain numbers; `interplay` also names the comparisons behind each cell.

    In the interplay people who share comparisons count as one, with what they say together, as in the paper.
    """
    together = gold_rows(rows, people)
    tables = interplay([*(row for row in rows if not together or row.annotator not in people), *together])
    ranked = {
        key: table for key, table in tables.items() if any(share is not None for share in table.shares().values())
    }
    return {
        "judged": len(rows),
        "annotators": list(dict.fromkeys(row.annotator for row in rows)),
        "verdicts": verdict_counts(rows),
        "agreements": agreements(rows, people),
        "interplay": [
            {"annotator": annotator, "dataset": dataset, "shares": table.shares(), "comparisons": table.decisive,
             "ties": table.ties, "unranked": table.unranked}
            for (annotator, dataset), table in ranked.items()
        ],
        "average": average_shares(ranked),
        "length_bias": length_bias(rows),
        "similarity": decisiveness_by_similarity(rows),
        "circles": circles(rows),
    }  # fmt: skip


def write_analysis(found: Mapping[str, Any], out: Path) -> None:
    """`analysis.json` and `index.html` in the folder `out`."""
    write_json(out / "analysis.json", dict(found))
    bars = {f"{row['annotator']}, {row['dataset']}": row["shares"] for row in found["interplay"]}
    alike = {key: _two(shares["both alike"]) for key, shares in bars.items() if shares["both alike"] is not None}
    parts = {key: {cell: shares[cell] for cell in CELLS[2:]} for key, shares in bars.items()}
    mixed = {key: shares for key, shares in parts.items() if shares[CELLS[2]] is not None}
    labels = {
        "alike": "Joint verdicts on items ranked alike",
        "mixed": "Joint verdicts on a chosen and a rejected item",
    }
    drawn = {"alike": alike, "mixed": mixed}
    charts = {name: stacked_bars(name, labels[name], of) if of else "" for name, of in drawn.items()}
    write_page(out / "index.html", render("analysis.html", {**found, **charts, "cells": SHOWN}))


def _two(decisive: float) -> dict[str, float | None]:
    return {"decisive": decisive, "tie": 100 - decisive}
