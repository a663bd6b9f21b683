"""The samples of a run as the report shows them: one card per instruction, and lengths per model and temperature."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.artifacts import Manifest
from jpo_ray.evaluation.run_facts import read_columns
from jpo_ray.records import SAMPLES
from jpo_ray.runs import RunDir

GOLD = "\t"  # stands for the gold response in a list of models: no model has this name
MAX_CHARACTERS = 6000  # of one text on the page: a runaway sample must not make it unusable
VERDICT_WORDS = {"a": "better than gold", "b": "worse than gold", "tie": "tie with gold", "invalid": "no valid verdict"}
SAMPLE_KEY = ("instruction_id", "model", "temperature", "seed")


def read_samples(run: RunDir, standing: Mapping[str, Manifest]) -> pa.Table | None:
    """All samples, or None where there are none."""
    samples = read_columns(run, "sample/samples.parquet", SAMPLES.names) if "sample" in standing else None
    return samples if samples is not None and samples.num_rows else None


def section(
    run: RunDir, standing: Mapping[str, Manifest], samples: pa.Table | None, models: Sequence[str], limit: int
) -> dict[str, Any]:
    """What the page shows of the samples; empty where there are none."""
    if samples is None:
        samples = pa.Table.from_pylist([], SAMPLES)
    return {
        "cards": cards(run, standing, samples, models, limit),
        "sample_temperatures": [repr(value) for value in sorted(samples.column("temperature").unique().to_pylist())],
        "sample_models": [model for model in models if model in {*samples.column("model").to_pylist()}],
        "GOLD": GOLD,
        "repeated": _repeated(samples),
        "instructions_sampled": len(samples.column("instruction_id").unique()),
    }


def _repeated(samples: pa.Table) -> bool:
    """Whether a model answered an instruction more than once at one temperature, so that seeds must tell them apart."""
    asked = samples.group_by(["instruction_id", "model", "temperature"]).aggregate([])
    return bool(asked.num_rows < samples.num_rows)


def cards(
    run: RunDir, standing: Mapping[str, Manifest], samples: pa.Table, models: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    """The first `limit` instructions: text, gold response and every sample, with verdicts where judged."""
    shown = pc.unique(samples.column("instruction_id")).slice(0, limit)
    golds = _gold_responses(run, shown) if "items" in standing else {}
    verdicts = _verdicts(run, shown) if "evaluate" in standing else {}
    found: dict[str, dict[str, Any]] = {}
    for row in samples.filter(pc.is_in(samples.column("instruction_id"), shown)).to_pylist():
        card = found.setdefault(
            row["instruction_id"],
            {"instruction": clipped(row["instruction"]), "gold": golds.get(row["instruction_id"]), "samples": []},
        )
        verdict = verdicts.get(tuple(row[name] for name in SAMPLE_KEY))
        card["samples"].append(
            {
                "model": row["model"],
                "temperature": repr(row["temperature"]),
                "seed": row["seed"],
                "text": clipped(row["response"]),
                "verdict": verdict,
                "verdict_words": VERDICT_WORDS.get(verdict or ""),
                "cut": row["finish_reason"] == "length",
            }
        )
    order = {model: position for position, model in enumerate(models)}
    for card in found.values():
        card["samples"].sort(
            key=lambda sample: (float(sample["temperature"]), order.get(sample["model"], len(order)), sample["seed"])
        )
    return list(found.values())


def clipped(text: str) -> str:
    """The text, cut where it is too long for a page, saying how much was left out."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS:,} more characters)"


def _gold_responses(run: RunDir, shown: pa.Array) -> dict[str, str]:
    items = read_columns(run, "items/items.parquet", ["instruction_id", "response", "gold"])
    if items is None:
        return {}
    golds = items.filter(pc.and_(items.column("gold"), pc.is_in(items.column("instruction_id"), shown)))
    return {row["instruction_id"]: clipped(row["response"]) for row in golds.to_pylist()}


def _verdicts(run: RunDir, shown: pa.Array) -> dict[tuple[Any, ...], str]:
    judgments = read_columns(run, "evaluate/judgments.parquet", [*SAMPLE_KEY, "verdict"])
    if judgments is None:
        return {}
    kept = judgments.filter(pc.is_in(judgments.column("instruction_id"), shown)).to_pylist()
    return {tuple(row[name] for name in SAMPLE_KEY): row["verdict"] for row in kept}


def lengths(samples: pa.Table, models: Sequence[str]) -> list[dict[str, Any]]:
    """Mean characters and share of samples cut at `max_new_tokens`, in percent, per model: judges like length."""
    table = pa.table(
        {
            "model": samples.column("model"),
            "characters": pc.utf8_length(samples.column("response")),
            "cut": pc.cast(pc.fill_null(pc.equal(samples.column("finish_reason"), "length"), False), pa.float64()),
        }
    )
    grouped = table.group_by("model").aggregate([("characters", "mean"), ("cut", "mean"), ("cut", "count")])
    rows = {row["model"]: row for row in grouped.to_pylist()}
    return [
        {
            "model": model,
            "samples": rows[model]["cut_count"],
            "characters": rows[model]["characters_mean"],
            "cut_percent": 100 * rows[model]["cut_mean"],
        }
        for model in models
        if model in rows
    ]


def raised_temperatures(samples: pa.Table) -> list[dict[str, Any]]:
    """Temperatures that the engine did not use as requested."""
    columns = ["temperature", "effective_temperature", "engine"]
    distinct = samples.select(columns).group_by(columns).aggregate([]).to_pylist()
    raised = [row for row in distinct if row["effective_temperature"] != row["temperature"]]
    return sorted(raised, key=lambda row: (row["temperature"], row["engine"] or ""))
