"""All numbers of a run's report, from what stands in the run directory."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from jpo_ray.artifacts import Manifest
from jpo_ray.config import RunConfig
from jpo_ray.evaluation import sample_cards
from jpo_ray.evaluation.histories import final_values
from jpo_ray.evaluation.run_facts import (
    funnel,
    in_order,
    missing_stages,
    package_versions,
    spent,
    stage_seconds,
    win_rates_of,
)
from jpo_ray.evaluation.run_judgments import compared_in, judged_rows
from jpo_ray.feedback.analysis import analysis_of
from jpo_ray.files import read_json
from jpo_ray.runs import RunDir

IN_SHARDS = "judges are not compared with each other: the run's comparisons are kept in shards, too many for that"


def summary_of(
    run: RunDir,
    config: RunConfig,
    standing: Mapping[str, Manifest],
    samples: pa.Table | None,
    states: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    counts: dict[str, Any] = {artifact: manifest.counts for artifact, manifest in standing.items()}
    models = win_rates_of(run, config, standing)
    return {
        "models": models,
        "seconds": stage_seconds(standing),
        "spent": spent(run, standing),
        "counts": counts | {"funnel": funnel(run, standing)},
        "trainings": _trainings(config, states),
        "judges": _judges(run, standing),
        "policies": _read(run, "policies", standing),
        "tournament": _read(run, "tournament", standing),
        "lengths": [] if samples is None else sample_cards.lengths(samples, models_of(config, models, samples)),
        "raised": [] if samples is None else sample_cards.raised_temperatures(samples),
        "missing": missing_stages(config, standing) | ({"judges": IN_SHARDS} if _in_shards(run, standing) else {}),
        "config": config.model_dump(mode="json"),
        "versions": package_versions(standing),
    }


def _read(run: RunDir, artifact: str, standing: Mapping[str, Manifest]) -> Any:
    return read_json(run.path(artifact) / f"{artifact}.json") if artifact in standing else None


def _judges(run: RunDir, standing: Mapping[str, Manifest]) -> dict[str, Any] | None:
    """What the run's judgments say of its judges, as `jpo analyze` does; None where nothing was judged, or millions."""
    if not {"items", "pairs", "judge"} <= standing.keys() or _in_shards(run, standing):
        return None
    compared = compared_in(run)
    found = analysis_of(list(judged_rows(compared, compared.judgments)), [])
    found["interplay"] = [
        {key: value for key, value in row.items() if key not in ("comparisons", "ties")} for row in found["interplay"]
    ]
    return found if found["judged"] else None


def _in_shards(run: RunDir, standing: Mapping[str, Manifest]) -> bool:
    return {"pairs", "judge"} <= standing.keys() and (run.path("pairs") / "pairs.parquet").is_dir()


def models_of(config: RunConfig, models: Mapping[str, Any], samples: pa.Table | None) -> list[str]:
    return in_order(config, [*models, *([] if samples is None else samples.column("model").unique().to_pylist())])


def _trainings(config: RunConfig, states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "objective": entry.losses,
            "protocols": " + ".join(entry.protocols),
            # What puts losses on one scale.
            "compared": (entry.losses, str([term.parameters() for term in entry.terms]), *sorted(entry.protocols)),
            "steps": states[entry.name].get("global_step"),
            "epochs": states[entry.name].get("epoch"),
            **final_values(states[entry.name].get("log_history") or []),
        }
        for entry in config.trained
        if states[entry.name]
    ]
