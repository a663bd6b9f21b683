"""Experiments: a config, a grid of what varies in it, and the runs and trainings that follow from both.

Keys of the grid that begin with `train.NAME.` (or `train.*.`, all entries) multiply the entries of `train`: they share
one run directory, so data, judgments, SFT model and reference are made once, and one engine samples them all. Every
combination of other keys is a run of its own, which takes over what another has made from the same input.
"""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from jpo_ray.config import RunConfig
from jpo_ray.config_base import NonNegative, Section
from jpo_ray.config_file import (
    apply_override,
    is_experiment,
    load_config,
    parse_config,
    read_yaml,
    set_key,
    validated,
)
from jpo_ray.errors import InputError

SEED = "seed"  # keys that end so are repetitions: they are averaged over
Settings = dict[str, Any]  # key of the grid -> value


class ExperimentConfig(Section):
    base: str  # a run's config, beside this file
    override: dict[str, Any] = {}  # keys of it that are others in all runs
    grid: dict[str, list[Any]] = Field(min_length=1)
    within: NonNegative = 1.0  # points of win rate that count as no difference, for the point of saturation


@dataclass(frozen=True)
class Trained:
    """One entry of a run's `train`, as the grid made it."""

    name: str
    entry: str  # of the base config
    settings: Settings


@dataclass(frozen=True)
class Run:
    """One run directory of an experiment."""

    name: str
    settings: Settings
    config: RunConfig
    trained: list[Trained]


@dataclass(frozen=True)
class Experiment:
    config: ExperimentConfig
    runs: list[Run]
    names: dict[str, str]  # of the grid's keys, as they are shown


def load_runs(path: Path, overrides: list[str]) -> dict[str, RunConfig]:
    """The runs of an experiment, by name, or the one of a config. Raises `InputError`."""
    if is_experiment(read_yaml(path, "--config")):
        return {run.name: run.config for run in load_experiment(path, overrides).runs}
    return {"run": load_config(path, overrides)}


def load_experiment(path: Path, overrides: list[str]) -> Experiment:
    """Read the file and lay out its runs; `overrides` are `section.key=value` for all. Raises `InputError`."""
    config = validated(ExperimentConfig, read_yaml(path, "--experiment"), str(path))
    base = path.parent / config.base
    values = read_yaml(base, f"{path}: base")
    for key, value in config.override.items():
        set_key(values, key, value)
    for key, given in config.grid.items():
        if not given or len({repr(value) for value in given}) < len(given):
            raise InputError(f"{path}: grid.{key}: needs values, each of them once")
    of_entries = {key: given for key, given in config.grid.items() if key.startswith("train.")}
    of_runs = {key: given for key, given in config.grid.items() if key not in of_entries}
    runs = [_run(values, settings, of_entries, overrides, path) for settings in _combinations(of_runs)]
    if repeated := [name for name, count in Counter(run.name for run in runs).items() if count > 1]:
        raise InputError(
            f"{path}: grid: two runs would both be called {repeated[0]}; give them values that differ more"
        )
    return Experiment(config, runs, _shown_names(config.grid))


def _combinations(grid: Mapping[str, list[Any]]) -> list[Settings]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _run(
    base: dict[str, Any], settings: Settings, grid: Mapping[str, list[Any]], overrides: list[str], path: Path
) -> Run:
    values = copy.deepcopy(base)
    for key, value in settings.items():
        set_key(values, key, value)
    entries, trained = [], []
    for entry in values.get("train") or [{"objective": "jpo"}]:
        name = entry.get("name") or entry.get("objective", "jpo")
        for own in _combinations(_of_entry(name, grid)):
            made = copy.deepcopy(entry) | {
                "name": "-".join([name, *(_short(key, value) for key, value in own.items())])
            }
            for key, value in own.items():
                set_key(made, key.split(".", 2)[2], value)
            entries.append(made)
            trained.append(Trained(made["name"], name, own))
    unknown = [key for key in grid if not any(key in each.settings for each in trained)]
    if unknown:
        raise InputError(f"{path}: grid.{unknown[0]}: no entry of `train` has this name")
    for made, each in zip(entries, trained, strict=True):
        if made.get("steps_like"):
            made["steps_like"] = _counterpart(made["steps_like"], each, trained, path)
    values["train"] = entries
    for override in overrides:
        apply_override(values, override)
    name = "-".join(_short(key, value) for key, value in settings.items()) or "run"
    return Run(name, settings, parse_config(values, f"{path} ({name})"), trained)


def _of_entry(name: str, grid: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: given for key, given in grid.items() if key.split(".")[1] in ("*", name)}


def _shown_names(keys: Iterable[str]) -> dict[str, str]:
    """A key's last part; where keys of different sections end alike, all of it, but for the entry of `train`."""
    whole = {key: f"train.{key.split('.', 2)[2]}" if key.startswith("train.") else key for key in keys}
    ends = Counter(_last(name) for name in set(whole.values()))
    return {key: name if ends[_last(name)] > 1 else _last(name) for key, name in whole.items()}


def _counterpart(entry: str, of: Trained, trained: list[Trained], path: Path) -> str:
    """The training of `entry` whose settings are the same where both have them."""
    found = [
        each.name
        for each in trained
        if each.entry == entry and all(each.settings.get(key, value) == value for key, value in of.settings.items())
    ]
    if len(found) != 1:
        raise InputError(f"{path}: steps_like: {of.name} has {len(found)} trainings of {entry} to be like, not one")
    return found[0]


def _short(key: str, value: Any) -> str:
    """A part of a folder's name."""
    signed = f"minus{abs(value)}" if isinstance(value, int | float) and value < 0 else str(value)
    text = re.sub(r"[^A-Za-z0-9.]+", "_", signed).strip("_.")
    return f"s{text}" if is_repetition(key) else text


def is_repetition(key: str) -> bool:
    return _last(key) == SEED


def shown_settings(settings: Settings, names: Mapping[str, str]) -> Settings:
    """What tells groups apart: all but repetitions, by the `names` of an experiment."""
    return {names[key]: value for key, value in settings.items() if not is_repetition(key)}


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]
