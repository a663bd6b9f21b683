"""The parts of `time_to_quality.py` that need no training: comparisons within groups, and reading the curves."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jpo_ray.config_file import load_config

ROOT = Path(__file__).parents[2]


def _part(name: str) -> ModuleType:
    """A module of the benchmark by its path: `benchmarks/` is no package that is installed."""
    spec = importlib.util.spec_from_file_location(
        f"quality_curves_{name}", ROOT / f"benchmarks/quality_curves/{name}.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world, reading = _part("world"), _part("reading")


@pytest.mark.parametrize(
    ("count", "group", "degree"), [(96, 32, 8), (100, 32, 8), (64, 32, 2), (40, 8, 6), (31, 32, 8)]
)
def test_groups_are_regular_graphs_without_pairs_of_one_item(count: int, group: int, degree: int) -> None:
    first, second = world.circulant_groups(count, group, degree, np.random.default_rng(0))
    whole = count // group * group  # what fills no group is left out
    assert len(first) == len(second) == whole * degree // 2
    assert not (first == second).any()
    assert len({frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
    assert (
        sorted(np.bincount(np.concatenate([first, second]), minlength=count))
        == [0] * (count - whole) + [degree] * whole
    )


def test_comparisons_stay_inside_groups() -> None:
    first, second = world.circulant_groups(100, 32, 8, np.random.default_rng(0))
    place = np.argsort(np.random.default_rng(0).permutation(100))  # of each item in the random order
    assert (place[first] // 32 == place[second] // 32).all()
    assert set(((place[second] - place[first]) % 32).tolist()) == {1, 2, 3, 4}


def test_groups_depend_on_the_generator_alone() -> None:
    made = [world.circulant_groups(64, 32, 8, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert (made[0][0] == made[1][0]).all()
    assert (made[0][0] != made[2][0]).any()


def _curve(*accuracies: float) -> list[dict[str, Any]]:
    """A point every 10 seconds, 200 comparisons and 50 items."""
    return [
        {"seconds": 10.0 * n, "comparisons": 200 * n, "items": 50 * n, "accuracy": value, "win_rate": value}
        for n, value in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("accuracies", "target", "seconds"),
    [
        ((50, 60, 70), 65, 15.0),  # half way between two points
        ((50, 60, 70), 60, 10.0),  # at a point
        ((50, 70, 60, 80), 65, 7.5),  # the first time, though it falls below again
        ((50, 50, 60), 60, 20.0),  # at the very end
        ((50, 60), 40, 0.0),  # before training
        ((50, 60, 70), 71, None),
    ],
)
def test_first_reached(accuracies: tuple[float, ...], target: float, seconds: float | None) -> None:
    reached = reading.first_reached(_curve(*accuracies), "accuracy", target)
    expected = seconds if seconds is None else {"seconds": seconds, "comparisons": 20 * seconds, "items": 5 * seconds}
    assert reached == expected


def _seed(pairs: tuple[float, ...], graph: tuple[float, ...]) -> dict[str, Any]:
    curves = {"pairs": _curve(*pairs), "graph": _curve(*graph)}
    return {"curves": curves, "reached": reading.read_curves(curves)}


def test_summary_over_seeds() -> None:
    # Until 60: `pairs` takes 20 s in both seeds, `graph` 10 and 5 s. At the end `graph` is 5 and 10 better.
    found = {0: _seed((50, 55, 60), (50, 60, 65)), 1: _seed((50, 55, 60), (50, 70, 70))}
    rows = {row["name"]: row for row in reading.summarise(found)}
    ratio = rows["seconds until held-out accuracy, graph / pairs"]
    assert ratio["values"] == [0.5, 0.25]
    assert ratio["mean"] == pytest.approx(math.sqrt(0.5 * 0.25))
    # t(0.975, 1 degree of freedom) = 12.7062; the standard error of the two logs is ln(2) / 2.
    spread = math.exp(12.7062 * math.log(2) / 2)
    assert ratio["ci95"] == pytest.approx([ratio["mean"] / spread, ratio["mean"] * spread], rel=1e-4)
    difference = rows["win rate at the end, graph - pairs"]
    assert (difference["values"], difference["mean"]) == ([5, 10], 7.5)
    assert difference["ci95"] == pytest.approx([7.5 - 12.7062 * 2.5, 7.5 + 12.7062 * 2.5], rel=1e-4)


def test_a_seed_that_never_gets_there_leaves_no_mean() -> None:
    found = {0: _seed((50, 55, 60), (50, 60, 65)), 1: _seed((50, 55, 60), (50, 55, 59))}
    row = reading.summarise(found)[0]
    assert row["values"] == [0.5, None]
    assert row["mean"] is None
    assert row["ci95"] == [None, None]


def test_each_mode_has_its_settings() -> None:
    config = load_config(ROOT / "jpo_ray/sandbox/demo.yaml", ["seed=7"])
    given = {"learning_rate": None, "graph_learning_rate": 2e-3, "epochs": 3.0, "graph_epochs": None}
    arguments = SimpleNamespace(comparisons_per_step=128, **given)
    pairs, graph = (world.mode_settings(config, mode, arguments) for mode in ("pairs", "graph"))
    assert (pairs.batching, pairs.learning_rate, pairs.num_train_epochs) == ("pairs", 1e-3, 3)
    assert (graph.batching, graph.learning_rate, graph.num_train_epochs) == ("graph", 2e-3, 3)
    assert pairs.seed == graph.seed == 7
    assert pairs.comparisons_per_step == graph.comparisons_per_step == 128
