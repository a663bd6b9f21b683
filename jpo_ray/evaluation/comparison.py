"""Two runs beside each other: what differs in their configs, win rates, and the time they took."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jpo_ray.errors import InputError
from jpo_ray.evaluation.pages import render, write_page
from jpo_ray.evaluation.win_rates import interval_text
from jpo_ray.files import read_json, write_json
from jpo_ray.runs import RunDir


def compare_runs(runs: tuple[Path | str, Path | str], out: Path) -> dict[str, Any]:
    """Write `comparison.json`, `comparison.md` and `index.html` of two reported runs into `out`; returns the first.

    Raises `InputError` where a run has no report.
    """
    summaries, configs = zip(*(_reported(run) for run in runs), strict=True)
    models = list(dict.fromkeys(name for summary in summaries for name in summary["models"]))
    stages = list(dict.fromkeys(name for summary in summaries for name in summary["seconds"]))
    found = {
        "runs": [str(run) for run in runs],
        "config": {
            key: [flat.get(key) for flat in flats]
            for flats in [[dict(_flat(config)) for config in configs]]
            for key in dict.fromkeys(key for flat in flats for key in flat)
            if flats[0].get(key) != flats[1].get(key)
        },
        "models": {name: [_rate(summary["models"].get(name)) for summary in summaries] for name in models},
        "seconds": {stage: [summary["seconds"].get(stage) for summary in summaries] for stage in stages},
        "versions": {
            name: [summary["versions"].get(name) for summary in summaries]
            for name in dict.fromkeys(name for summary in summaries for name in summary["versions"])
            if summaries[0]["versions"].get(name) != summaries[1]["versions"].get(name)
        },
    }
    write_json(out / "comparison.json", found)
    staged = out / ".comparison.md.part"
    staged.write_text(markdown(found), encoding="utf-8")
    staged.replace(out / "comparison.md")
    write_page(out / "index.html", render("comparison.html", found))
    return found


def _reported(run: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = RunDir(run).require("report", "report")
    path = RunDir(run).path("report") / "summary.json"
    if "config" not in manifest.config:
        raise InputError(f"{path}: of another version of jpo-ray; run `jpo report` again")
    return read_json(path), manifest.config["config"]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and value of everything in a config; entries of lists by their name, else by number."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{inner.get('name') or number}")
    else:
        yield key, value


def _rate(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if entry is None else {"mean": entry["win_rate"]["mean"], "ci95": entry["ci95"], "n": entry["n"]}


def _text(rate: Mapping[str, Any] | None) -> str:
    known = rate is not None and rate["mean"] is not None
    return f"{rate['mean']:.1f} ({interval_text(rate['ci95'])})" if known and rate is not None else "-"


def markdown(found: Mapping[str, Any]) -> str:
    first, second = found["runs"]
    lines = [f"| | {first} | {second} |", "| --- | --- | --- |"]
    for name, rates in found["models"].items():
        lines.append(f"| {name}, win rate | {' | '.join(map(_text, rates))} |")
    for stage, seconds in found["seconds"].items():
        lines.append(f"| {stage}, seconds | {' | '.join('-' if s is None else f'{s:.1f}' for s in seconds)} |")
    for key, values in [*found["config"].items(), *found["versions"].items()]:
        lines.append(f"| {key} | {' | '.join(str(value) for value in values)} |")
    return "\n".join(lines) + "\n"
