"""The report of a run: `index.html`, one self-contained page for people; the same as `report.md` with its figures as
files; and `summary.json`, the same numbers for programs.

It shows what exists. A stage that is off or has not run is named as such and never shown as a number. The page loads
nothing from anywhere, and its content security policy says so to the browser.
"""

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from jpo_ray.artifacts import Manifest
from jpo_ray.config import RunConfig
from jpo_ray.evaluation import panels, sample_cards
from jpo_ray.evaluation.captions import caption
from jpo_ray.evaluation.charts import standalone, temperatures_of
from jpo_ray.evaluation.looks import color_of, series_of, style_of
from jpo_ray.evaluation.pages import NONE, duration_text, light_colors, render, write_page
from jpo_ray.evaluation.report_markdown import markdown
from jpo_ray.evaluation.report_summary import models_of, summary_of
from jpo_ray.evaluation.run_facts import standing_manifests, trainer_state
from jpo_ray.evaluation.win_rates import BASELINE, interval_text, of_length_control
from jpo_ray.feedback.analysis import SHOWN
from jpo_ray.files import write_json
from jpo_ray.runs import RunDir


def make_report(run: RunDir, config: RunConfig, out: Path) -> dict[str, Any]:
    """Write `summary.json`, `index.html`, `report.md` and `figures/` into the folder `out`; returns the summary.

    The summary has all numbers of the page: `models` (as in `win_rates`, empty where not evaluated), `seconds` per
    stage and training entry, `spent` on judging, `counts` (each stage's own, and under `funnel` those of the tables),
    `trainings` (values at the end), `judges` (agreement, interplay, habits), `policies`, `tournament`, `lengths` of
    samples, temperatures that an engine `raised`, what is `missing` and why, `config` and `versions`.
    """
    standing = standing_manifests(run, config)
    samples = sample_cards.read_samples(run, standing)
    states = {entry.name: trainer_state(run, f"train/{entry.name}", standing) for entry in config.trained}
    summary = summary_of(run, config, standing, samples, states)
    shown = _panels(run, config, standing, summary, samples, states)
    page = render("report.html", _context(run, config, standing, summary, samples) | shown)
    write_page(out / "index.html", page)
    _write_figures(out, _all_panels(shown))
    write_page(out / "report.md", markdown(summary, _all_panels(shown)))
    write_json(out / "summary.json", summary)
    return summary


def _panels(
    run: RunDir,
    config: RunConfig,
    standing: Mapping[str, Manifest],
    summary: Mapping[str, Any],
    samples: pa.Table | None,
    states: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The page's charts by the names it has for them."""
    series = series_of(models_of(config, summary["models"], samples))
    logs = panels.logs_of(states)
    sft_log = trainer_state(run, "sft", standing).get("log_history") or []
    return {
        "win_rate_panel": panels.win_rate_panel(summary["models"], series),
        "sft_panel": panels.sft_panel(sft_log),
        "training_panels": panels.training_panels(logs, series),
        "margin_panels": panels.margin_panels(logs, series),
        "similarity_panel": panels.similarity_panel(run, config, standing),
        "interplay_panels": panels.interplay_panels(summary["judges"]) if summary["judges"] else [],
    }


def _all_panels(shown: Mapping[str, Any]) -> list[panels.Panel]:
    found = [each if isinstance(each, list) else [each] for each in shown.values()]
    return [panel for some in found for panel in some if panel is not None]


def _write_figures(out: Path, shown: Sequence[panels.Panel]) -> None:
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for panel in shown:
        above = caption(f"{panel.name}-caption", f"{panel.title}: {panel.note}".removesuffix(": "), panel.keys)
        write_page(folder / f"{panel.name}.svg", standalone(panel.svg, light_colors(), above))


def _context(
    run: RunDir,
    config: RunConfig,
    standing: Mapping[str, Manifest],
    summary: Mapping[str, Any],
    samples: pa.Table | None,
) -> dict[str, Any]:
    """All the page shows but its charts."""
    models = models_of(config, summary["models"], samples)
    series = series_of(models)
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "nonce": secrets.token_urlsafe(16),  # only the page's own script may run
        "config": config,
        "summary": summary,
        "series": {name: color_of(number) for name, number in series.items()},
        "styles": {name: style_of(number) for name, number in series.items()},
        "tiles": _tiles(summary),
        "controlled": {
            name: entry["length_controlled"]
            for name, entry in summary["models"].items()
            if "length_controlled" in entry
        },
        "controlled_notes": of_length_control(summary["models"], "note"),
        "temperatures": temperatures_of(summary["models"]),
        "shown_cells": SHOWN,
        "seconds": _seconds(standing),
        **sample_cards.section(run, standing, samples, models, config.report.sample_rows),
        "stage_counts": {
            name: {key: value for key, value in manifest.counts.items() if not isinstance(value, dict)}
            for name, manifest in standing.items()
            if manifest.counts
        },
        "config_yaml": yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    }


def _tiles(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that answer first: what the best model wins, against what, on how much data, in what time."""
    tiles = _win_rate_tiles(summary["models"])
    if not tiles:
        tiles.append(
            {"value": NONE, "label": "win rate", "note": summary["missing"].get("evaluate", "no valid judgment")}
        )
    comparisons = summary["counts"]["funnel"].get("comparisons", [])
    if any("preferences" in row for row in comparisons):
        used = {
            protocol: sum(row["preferences"] for row in comparisons if row["protocol"] == protocol)
            for protocol in ("conditional", "joint")
        }
        parts = ", ".join(f"{count:,} {protocol}" for protocol, count in used.items())
        tiles.append({"value": f"{sum(used.values()):,}", "label": "preferences", "note": parts})
    total = sum(seconds for stage, seconds in summary["seconds"].items() if not stage.startswith("train/"))
    cost = sum(row["cost"] for row in summary["spent"].values())
    note = "sum over the stages" + (f"; judging cost {cost:.2f} US dollars" if cost else "")
    tiles.append({"value": duration_text(total), "label": "time of all stages", "note": note})
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


def _seconds(standing: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    longest = max((manifest.seconds for manifest in standing.values()), default=0) or 1
    return [
        {"stage": artifact, "seconds": manifest.seconds, "percent": round(100 * manifest.seconds / longest, 2)}
        for artifact, manifest in standing.items()
    ]
