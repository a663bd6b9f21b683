"""What an experiment found: win rates of its groups over repetitions, a curve where a number varies, and a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.evaluation.charts import interval_chart, standalone
from jpo_ray.evaluation.pages import light_colors, render, write_page
from jpo_ray.evaluation.win_rates import interval, interval_text, resampled_mean, win_rates
from jpo_ray.files import write_json

COLUMNS = ["instruction_id", "model", "temperature", "verdict"]


@dataclass(frozen=True)
class Measured:
    """One model of one run: what it is, and the judgments of its samples."""

    entry: str  # of the base config, or `sft`
    settings: Mapping[str, Any]  # without repetitions
    repetition: str
    judgments: pa.Table  # `COLUMNS`


@dataclass(frozen=True)
class Group:
    """Models that differ in nothing but repetition. Rates are in percent."""

    entry: str
    settings: dict[str, Any]
    win_rate: float | None  # mean over temperatures and repetitions
    ci95: list[float | None]  # of that, instructions resampled
    by_temperature: dict[str, float | None]  # mean over repetitions
    repetitions: list[float | None]  # each one's mean over temperatures
    spread: float | None  # standard deviation of these
    n: int  # valid judgments
    invalid: int


def groups_of(measured: Sequence[Measured], resamples: int, seed: int) -> list[Group]:
    """In order of appearance."""
    members: dict[tuple[Any, ...], list[Measured]] = {}
    for each in measured:
        members.setdefault((each.entry, *sorted(each.settings.items(), key=str)), []).append(each)
    return [_group(some, resamples, seed) for some in members.values()]


def _group(members: Sequence[Measured], resamples: int, seed: int) -> Group:
    parts = _parts(members)
    found = win_rates(_pooled(parts), resamples, seed)["models"]["all"]
    rates = {key: found["win_rate"][repr(float(number))] for number, (key, _) in enumerate(parts)}
    repetitions = [mean_of_all([rates[key] for key in rates if key[0] == each.repetition]) for each in members]
    known = [rate for rate in repetitions if rate is not None]
    return Group(
        entry=members[0].entry,
        settings=dict(members[0].settings),
        win_rate=found["win_rate"]["mean"],
        ci95=found["ci95"],
        by_temperature={
            repr(float(t)): mean_of_all([rate for key, rate in rates.items() if key[1] == t])
            for t in sorted({key[1] for key in rates})
        },
        repetitions=repetitions,
        spread=stdev(known) if len(known) > 1 else None,
        n=found["n"],
        invalid=found["invalid"],
    )


def difference(
    first: Sequence[Measured], second: Sequence[Measured], resamples: int, seed: int
) -> tuple[float, list[float | None]]:
    """Win rate of one group minus another's in points, and its 95 % interval with the same instructions resampled."""
    if any(len(set(_instructions(some))) != 1 for some in (first, second, [*first, *second])):
        raise ValueError("the groups were not judged on the same instructions")
    (one, one_B), (other, other_B) = (
        resampled_mean(_pooled(_parts(members)), resamples, seed) for members in (first, second)
    )
    return one - other, interval(one_B - other_B)


def _instructions(members: Sequence[Measured]) -> list[frozenset[str]]:
    return [frozenset(each.judgments["instruction_id"].to_pylist()) for each in members]


def _parts(members: Sequence[Measured]) -> list[tuple[tuple[str, float], pa.Table]]:
    """Judgments by repetition and temperature."""
    return [
        ((each.repetition, temperature), each.judgments.filter(pc.equal(each.judgments["temperature"], temperature)))
        for each in members
        for temperature in sorted(each.judgments["temperature"].unique().to_pylist())
    ]


def _pooled(parts: Sequence[tuple[tuple[str, float], pa.Table]]) -> pa.Table:
    """One model with a "temperature" for each part: repetitions and temperatures count alike, and are resampled by
    instruction together.
    """
    tables = []
    for number, (_, part) in enumerate(parts):
        columns = {"temperature": np.full(len(part), float(number)), "model": ["all"] * len(part)}
        tables.append(pa.table({name: part[name] for name in ("instruction_id", "verdict")} | columns))
    return pa.concat_tables(tables)


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """None where one of them is None, or there are none."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def saturation(points: Sequence[tuple[float, float]], within: float) -> float | None:
    """The smallest x from which on no rate is more than `within` points from the last one; None for fewer than three.

    The last x itself where the curve still moves: then it is not known to have saturated.
    """
    points = sorted(points)
    if len(points) < 3:
        return None
    last = points[-1][1]
    moving = [place for place, (_, rate) in enumerate(points) if abs(rate - last) > within]
    return points[moving[-1] + 1 if moving else 0][0]


def write_results(
    name: str, groups: Sequence[Group], varies: str | None, within: float, out: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """`results.json`, `results.md`, `index.html` and, of a curve, `curve.svg` in `out`; returns the results.

    `varies` is the setting of the horizontal axis, where its values are numbers.
    """
    curves = _curves(groups, varies) if varies else {}
    found = {
        "name": name,
        "groups": [asdict(group) for group in groups],
        "varies": varies,
        "saturation": {label: saturation([(x, y) for x, y, *_ in of], within) for label, of in curves.items()},
        "within": within,
        "about": dict(about),
    }
    chart = (
        interval_chart("curve", f"Win rate by {varies}", curves, varies or "", "win rate, percent") if curves else ""
    )
    columns = list(dict.fromkeys(key for group in groups for key in group.settings))
    temperatures = list(dict.fromkeys(key for group in groups for key in group.by_temperature))
    write_json(out / "results.json", found)
    if chart:
        write_page(out / "curve.svg", standalone(chart, light_colors()))
    write_page(out / "results.md", markdown_table(groups) + ("\n![Curve](curve.svg)\n" if chart else ""))
    context = {**found, "chart": chart, "columns": columns, "temperatures": temperatures, "rows": groups}
    write_page(out / "index.html", render("experiment.html", context))
    return found


def markdown_table(groups: Sequence[Group]) -> str:
    columns = list(dict.fromkeys(key for group in groups for key in group.settings))
    temperatures = list(dict.fromkeys(key for group in groups for key in group.by_temperature))
    heads = ["model", *columns, *temperatures, "mean", "95 %", "each repetition", "n", "invalid"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for group in groups:
        cells = [
            group.entry,
            *(str(group.settings.get(column, "")) for column in columns),
            *(_text(group.by_temperature.get(temperature)) for temperature in temperatures),
            _text(group.win_rate),
            interval_text(group.ci95),
            ", ".join(map(_text, group.repetitions)),
            f"{group.n:,}",
            f"{group.invalid:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _curves(groups: Sequence[Group], varies: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Points (x, rate, low, high) of each series: groups that differ in `varies` alone. None but numbers."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for group in groups:
        x = group.settings.get(varies)
        low, high = group.ci95
        if isinstance(x, int | float) and not isinstance(x, bool) and group.win_rate is not None:
            others = [f"{value}" for key, value in group.settings.items() if key != varies]
            label = " ".join([group.entry, *others])
            low, high = (group.win_rate if end is None else end for end in (low, high))
            found.setdefault(label, []).append((float(x), group.win_rate, low, high))
    return {label: sorted(points) for label, points in found.items() if len(points) > 1}


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
