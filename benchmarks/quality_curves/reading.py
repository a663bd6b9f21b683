"""What the curves say: when a mode reaches what `pairs` reaches at the end, per seed and over seeds."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import sem, t

from jpo_ray.evaluation.win_rates import interval_text

MODES = ("pairs", "graph")
METRICS = {"accuracy": "held-out accuracy", "win_rate": "win rate"}  # in percent
COSTS = ("seconds", "comparisons", "items")  # of the updates so far
LACKING = "not reached"

Row = dict[str, Any]


def first_reached(points: Sequence[Mapping[str, Any]], metric: str, target: float) -> dict[str, float] | None:
    """Costs at which the curve is first at `target`, linear between points; None where it never is."""
    if points[0][metric] >= target:
        return {cost: float(points[0][cost]) for cost in COSTS}
    for before, after in pairwise(points):
        if after[metric] >= target:
            share = (target - before[metric]) / (after[metric] - before[metric])
            return {cost: before[cost] + share * (after[cost] - before[cost]) for cost in COSTS}
    return None


def read_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Row:
    """Targets, and what reaching them costs each mode: `{metric: {target, pairs, graph}}`."""
    targets = {metric: curves["pairs"][-1][metric] for metric in METRICS}
    return {
        metric: {"target": target} | {mode: first_reached(curves[mode], metric, target) for mode in MODES}
        for metric, target in targets.items()
    }


def summarise(seeds: Mapping[int, Row]) -> list[Row]:
    """Graph against pairs per seed, and over seeds: the mean and its 95 % t-interval, of ratios on the log scale."""
    ends = [{mode: found["curves"][mode][-1] for mode in MODES} for found in seeds.values()]
    ratios: dict[str, list[float | None]] = {}
    for metric, title in METRICS.items():
        reached = [found["reached"][metric] for found in seeds.values()]
        for cost in COSTS:
            ratios[f"{cost} until {title}, graph / pairs"] = [
                _ratio(each["graph"], each["pairs"], cost) for each in reached
            ]
    ratios["all seconds, graph / pairs"] = [_ratio(end["graph"], end["pairs"], "seconds") for end in ends]
    rows = []
    for name, values in ratios.items():
        logs = [None if value is None else math.log(value) for value in values]
        middle, interval = _over_seeds(logs)
        known = [None if value is None else math.exp(value) for value in (middle, *interval)]
        rows.append({"name": name, "values": values, "mean": known[0], "ci95": known[1:]})
    for metric, title in METRICS.items():
        differences = [end["graph"][metric] - end["pairs"][metric] for end in ends]
        middle, interval = _over_seeds(differences)
        name = f"{title} at the end, graph - pairs"
        rows.append({"name": name, "values": differences, "mean": middle, "ci95": interval})
    return rows


def _ratio(graph: Mapping[str, Any] | None, pairs: Mapping[str, Any] | None, cost: str) -> float | None:
    """None where one of them never gets there, or both start there."""
    return graph[cost] / pairs[cost] if graph and pairs and pairs[cost] else None


def _over_seeds(values: Sequence[float | None]) -> tuple[float | None, list[float | None]]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):  # the mean of those seeds alone that get there would flatter
        return None, [None, None]
    middle = mean(known)
    if len(known) == 1:
        return middle, [None, None]
    half = float(t.ppf(0.975, len(known) - 1) * sem(known))
    return middle, [middle - half, middle + half]


def print_tables(console: Console, seeds: Mapping[int, Row]) -> None:
    for title, columns, rows in (
        ("Until a mode reaches what `pairs` reaches at the end", *_reached_rows(seeds)),
        ("At the end", *_end_rows(seeds)),
        ("Over seeds", *_summary_rows(summarise(seeds))),
    ):
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="left" if column in ("", "quality", "mode") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _reached_rows(seeds: Mapping[int, Row]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(seed),
            title,
            f"{found['curves']['pairs'][0][metric]:.1f}",
            f"{found['reached'][metric]['target']:.1f}",
            mode,
            *(_number(found["reached"][metric][mode], cost) for cost in COSTS),
        ]
        for seed, found in seeds.items()
        for metric, title in METRICS.items()
        for mode in MODES
    ]
    return ["seed", "quality", "start", "target", "mode", *COSTS], rows


def _number(reached: Mapping[str, float] | None, cost: str) -> str:
    return LACKING if reached is None else f"{reached[cost]:,.1f}" if cost == "seconds" else f"{reached[cost]:,.0f}"


def _end_rows(seeds: Mapping[int, Row]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for seed, found in seeds.items():
        difference = found["win_rate_difference"]
        for mode in MODES:
            end = found["curves"][mode][-1]
            cells = [str(seed), mode, *(_number(end, cost) for cost in COSTS), f"{end['loss']:.4f}"]
            cells += [f"{end['accuracy']:.1f}", f"{end['win_rate']:.1f}", interval_text(end["win_rate_ci95"])]
            compared = f"{difference['mean']:+.1f} ({interval_text(difference['ci95'], '+.1f')})"
            rows.append([*cells, compared if mode == "graph" else ""])
    return ["seed", "mode", *COSTS, "loss", "accuracy", "win rate", "95 %", "win rate - pairs' (95 %)"], rows


def _summary_rows(summary: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in summary:
        each = ", ".join("-" if value is None else f"{value:.2f}" for value in row["values"])
        middle = "-" if row["mean"] is None else f"{row['mean']:.2f}"
        rows.append([row["name"], each, middle, interval_text(row["ci95"], ".2f")])
    return ["", "each seed", "mean (of ratios: geometric)", "95 % t-interval"], rows
