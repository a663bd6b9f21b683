"""What an experiment found: win rates of its groups over repetitions, a curve where a number varies, and a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jpo_ray.evaluation.charts import interval_chart, standalone
from jpo_ray.evaluation.pages import light_colors, render, write_page
from jpo_ray.evaluation.win_rates import interval, interval_text, resampled_mean, win_rates
from jpo_ray.files import write_json

SIZES = "max_train_comparisons"
LEAST_POINTS = 3  # of a curve that may be said to saturate
COLUMNS = ["instruction_id", "model", "temperature", "verdict"]


@dataclass(frozen=True)
class Measured:
    """One model of one run: what it is, and the judgments of its samples."""

    entry: str  # of the base config, or `sft`
    settings: Mapping[str, Any]  # without repetitions
    repetition: str
    judgments: pa.Table  # `COLUMNS`
    comparisons: int | None = None  # that it was trained on, which may be fewer than `max_train_comparisons`


@dataclass(frozen=True)
class Group:
    """Models that differ in nothing but repetition. Rates are in percent."""

    entry: str
    settings: dict[str, Any]
    comparisons: int | None  # trained on; the fewest of its models
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
        key = (each.entry, *sorted((name, repr(value)) for name, value in each.settings.items()))
        members.setdefault(key, []).append(each)
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
        comparisons=min((each.comparisons for each in members if each.comparisons is not None), default=None),
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
    """Win rate of one group minus another's in points, and its 95 % interval: the same instructions resampled for both,
    and the repetitions of each.
    """
    if any(len(set(_instructions(some))) != 1 for some in (first, second, [*first, *second])):
        raise ValueError("the groups were not judged on the same instructions")
    (one, one_B), (other, other_B) = (
        _resampled(members, resamples, seed, place) for place, members in enumerate((first, second))
    )
    return one - other, interval(one_B - other_B)


def _resampled(members: Sequence[Measured], resamples: int, seed: int, place: int) -> tuple[float, NDArray[np.float64]]:
    """Mean of a group, and that of each resample, [B]. `place` tells the groups of a comparison apart, whose
    repetitions are independent.

    R of R repetitions, drawn with replacement, vary (R - 1) / R as much as the mean of R does: they are scaled.
    """
    series = [resampled_mean(_pooled(_parts([each])), resamples, seed) for each in members]
    means_RB = np.array([of_resamples for _, of_resamples in series])
    mean_B: NDArray[np.float64] = means_RB.mean(axis=0)
    count = len(members)
    if count > 1:
        picks_RB = np.random.default_rng([seed, place]).integers(count, size=means_RB.shape)
        drawn_B = np.take_along_axis(means_RB, picks_RB, axis=0).mean(axis=0)
        mean_B = mean_B + np.sqrt(count / (count - 1)) * (drawn_B - mean_B)
    return mean(value for value, _ in series), mean_B


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
    """The smallest x from which on no rate is more than `within` points from the last one; None for fewer than three x,
    and where the curve still moves before its last x: then it is not known to have saturated.
    """
    points = sorted(points)
    places = sorted({x for x, _ in points})
    if len(places) < LEAST_POINTS:
        return None
    last = points[-1][1]
    moving = max((x for x, rate in points if abs(rate - last) > within), default=-math.inf)
    settled = [x for x in places if x > moving]
    return settled[0] if len(settled) > 1 else None


def saturation_text(points: Sequence[tuple[float, float]], within: float) -> str:
    """The same for people; empty for fewer than three points."""
    if len({x for x, _ in points}) < LEAST_POINTS:
        return ""
    at = saturation(points, within)
    if at is None:
        return "still moving at its last value: where it saturates is not known"
    return f"within {within:g} point{'s' if within != 1 else ''} of its last value from {at:,g} on"


def write_results(
    name: str, groups: Sequence[Group], varies: str | None, within: float, out: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """`results.json`, `results.md`, `index.html` and, of a curve, `curve.svg` in `out`; returns the results.

    `varies` is the setting of the horizontal axis, where its values are numbers.
    """
    curves = curves_of(groups, varies) if varies else {}
    points = {label: [(x, rate) for x, rate, *_ in of] for label, of in curves.items()}
    found = {
        "name": name,
        "groups": [asdict(group) for group in groups],
        "varies": varies,
        "saturation": {label: saturation(of, within) for label, of in points.items()},
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
    said = {label: text for label, of in points.items() if (text := saturation_text(of, within))}
    context = {**found, "chart": chart, "columns": columns, "temperatures": temperatures, "rows": groups, "said": said}
    write_page(out / "index.html", render("experiment.html", context))
    return found


def markdown_table(groups: Sequence[Group]) -> str:
    columns = list(dict.fromkeys(key for group in groups for key in group.settings))
    temperatures = list(dict.fromkeys(key for group in groups for key in group.by_temperature))
    heads = ["model", *columns, "comparisons", *temperatures, "mean", "95 %", "each repetition", "n", "invalid"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for group in groups:
        cells = [
            group.entry,
            *(str(group.settings.get(column, "")) for column in columns),
            "" if group.comparisons is None else f"{group.comparisons:,}",
            *(_text(group.by_temperature.get(temperature)) for temperature in temperatures),
            _text(group.win_rate),
            interval_text(group.ci95),
            ", ".join(map(_text, group.repetitions)),
            f"{group.n:,}",
            f"{group.invalid:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves_of(groups: Sequence[Group], varies: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Points (x, rate, low, high) of each series: groups that differ in `varies` alone. None but numbers; of
    `max_train_comparisons` those that there were.
    """
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for group in groups:
        x = group.settings.get(varies)
        if varies == SIZES and group.comparisons is not None:
            x = group.comparisons
        low, high = group.ci95
        if isinstance(x, int | float) and not isinstance(x, bool) and group.win_rate is not None:
            others = [f"{value}" for key, value in group.settings.items() if key != varies]
            label = " ".join([group.entry, *others])
            low, high = (group.win_rate if end is None else end for end in (low, high))
            found.setdefault(label, []).append((float(x), group.win_rate, low, high))
    return {label: sorted(points) for label, points in found.items() if len(points) > 1}


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
