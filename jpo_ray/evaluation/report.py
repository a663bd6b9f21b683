"""The report of a run: `summary.json` for programs and `index.html`, one self-contained page, for people.

It shows what exists. A stage that is off or has not run is named as such and never shown as a number. The page loads
nothing from anywhere, and its content security policy says so to the browser.
"""

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from jpo_ray.artifacts import Manifest
from jpo_ray.config import RunConfig
from jpo_ray.evaluation import panels, sample_cards
from jpo_ray.evaluation.charts import series_of, temperatures_of
from jpo_ray.evaluation.histories import final_values
from jpo_ray.evaluation.run_facts import (
    funnel,
    in_order,
    missing_stages,
    package_versions,
    stage_seconds,
    standing_manifests,
    trainer_state,
    win_rates_of,
)
from jpo_ray.evaluation.win_rates import BASELINE, interval_text
from jpo_ray.files import read_json, write_json
from jpo_ray.runs import RunDir

NONE = "–"  # stands where there is no number


def make_report(run: RunDir, config: RunConfig, out: Path) -> dict[str, Any]:
    """Write `summary.json` and `index.html` into the folder `out`; returns the summary.

    The summary has `models` (as in `win_rates`, empty where not evaluated), `seconds` per stage and training entry,
    `counts` (each stage's own, and under `funnel` those of the tables) and `versions`.
    """
    standing = standing_manifests(run, config)
    counts: dict[str, Any] = {artifact: manifest.counts for artifact, manifest in standing.items()}
    summary = {
        "models": win_rates_of(run, config, standing),
        "seconds": stage_seconds(standing),
        "counts": counts | {"funnel": funnel(run, standing)},
        "versions": package_versions(standing),
    }
    page = render("report.html", _context(run, config, standing, summary))
    write_page(out / "index.html", page)
    write_json(out / "summary.json", summary)
    return summary


def write_page(path: Path, page: str) -> None:
    """Aside, then in place."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    staged.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates are no text
    staged.replace(path)


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page of this folder, with the filters number, interval and duration."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number_text, "percent": _percent, "interval": _interval, "duration": duration_text
    }  # fmt: skip
    return environment.get_template(template).render(context)


def _context(
    run: RunDir, config: RunConfig, standing: Mapping[str, Manifest], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """All the page shows."""
    samples = sample_cards.read_samples(run, standing)
    sampled = [] if samples is None else samples.column("model").unique().to_pylist()
    models = in_order(config, [*summary["models"], *sampled])
    series = series_of(models)
    states = {entry.name: trainer_state(run, f"train/{entry.name}", standing) for entry in config.trained}
    logs = panels.logs_of(states)
    sft_log = trainer_state(run, "sft", standing).get("log_history") or []
    missing = missing_stages(config, standing)
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "nonce": secrets.token_urlsafe(16),  # only the page's own script may run
        "config": config,
        "summary": summary,
        "missing": missing,
        "series": series,
        "tiles": _tiles(summary, missing),
        "evaluated": {"invalid because": "", "warning": ""} | dict(summary["counts"].get("evaluate", {})),
        "tournament": read_json(run.path("tournament") / "tournament.json") if "tournament" in standing else None,
        "policies": read_json(run.path("policies") / "policies.json") if "policies" in standing else None,
        "controlled": {
            name: entry["length_controlled"]
            for name, entry in summary["models"].items()
            if "length_controlled" in entry
        },
        "temperatures": temperatures_of(summary["models"]),
        "win_rate_panel": panels.win_rate_panel(summary["models"], series),
        "similarity_panel": panels.similarity_panel(run, config, standing),
        "sft_panel": panels.sft_panel(sft_log),
        "training_panels": panels.training_panels(logs, series),
        "margin_panels": panels.margin_panels(logs, series),
        "trainings": _trainings(config, states),
        "seconds": _seconds(standing),
        **sample_cards.section(run, standing, samples, models, config.report.sample_rows),
        "stage_counts": {
            name: {key: value for key, value in manifest.counts.items() if not isinstance(value, dict)}
            for name, manifest in standing.items()
            if manifest.counts
        },
        "config_yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    }


def _tiles(summary: Mapping[str, Any], missing: Mapping[str, str]) -> list[dict[str, str]]:
    """The few numbers that answer first: what the best model wins, against what, on how much data, in what time."""
    tiles = _win_rate_tiles(summary["models"])
    if not tiles:
        tiles.append({"value": NONE, "label": "win rate", "note": missing.get("evaluate", "no valid judgment")})
    comparisons = summary["counts"]["funnel"].get("comparisons", [])
    if any("preferences" in row for row in comparisons):
        used = {
            protocol: sum(row["preferences"] for row in comparisons if row["protocol"] == protocol)
            for protocol in ("conditional", "joint")
        }
        parts = ", ".join(f"{count:,} {protocol}" for protocol, count in used.items())
        tiles.append({"value": f"{sum(used.values()):,}", "label": "preferences", "note": parts})
    total = sum(seconds for stage, seconds in summary["seconds"].items() if not stage.startswith("train/"))
    tiles.append({"value": duration_text(total), "label": "time of all stages", "note": "sum over the stages"})
    return tiles


def _win_rate_tiles(models: Mapping[str, Any]) -> list[dict[str, str]]:
    ranked = {name: entry for name, entry in models.items() if entry["win_rate"].get("mean") is not None}
    trained = [name for name in ranked if name != BASELINE]
    if not ranked:
        return []
    best = max(trained, key=lambda name: ranked[name]["win_rate"]["mean"]) if trained else BASELINE
    entry = ranked[best]
    chosen = f"; the highest mean of {len(trained)} trained models" if len(trained) > 1 else ""
    tiles = [
        {
            "value": f"{entry['win_rate']['mean']:.1f} %",
            "label": f"{best}: win rate against gold",
            "note": f"95 % interval {interval_text(entry['ci95'])}{chosen}",
        }
    ]
    difference = entry.get("difference_to_sft")
    if difference and difference["mean"] is not None:
        low, high = difference["ci95"]
        within = low is None or high is None or low <= 0 <= high
        verdict = "; zero is inside: no difference shown" if within else ""
        tiles.append(
            {
                "value": f"{difference['mean']:+.1f} points",
                "label": f"{best}: difference to {BASELINE}",
                "note": f"95 % interval {interval_text(difference['ci95'], '+.1f')}{verdict}",
            }
        )
    return tiles


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


def _seconds(standing: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    longest = max((manifest.seconds for manifest in standing.values()), default=0) or 1
    return [
        {"stage": artifact, "seconds": manifest.seconds, "percent": round(100 * manifest.seconds / longest, 2)}
        for artifact, manifest in standing.items()
    ]


def number_text(value: float | None, form: str = ",.1f") -> str:
    """A number, or a dash where there is none."""
    return NONE if value is None else format(value, form)


def _percent(share: float | None) -> str:
    return number_text(None if share is None else 100 * share)


def _interval(interval: list[float | None] | None, form: str = ".1f") -> str:
    text = interval_text(interval or [None, None], form)
    return NONE if text == "-" else text


def duration_text(seconds: float) -> str:
    """Seconds as people say them: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
