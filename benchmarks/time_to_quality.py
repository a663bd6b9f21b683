"""Time to quality on the sandbox: when is `graph` batching as good as `pairs` batching is at the end of its training?

    python benchmarks/time_to_quality.py --run-dir runs/quality [--seeds 0 1 2] [--json FILE] [section.key=value ...]

Each seed is a run of its own up to the reference. Then both modes train on the same joint comparisons: D_S items in
random groups, each compared with `--degree` others of its group and judged by the run's own noisy oracle. In between
they are evaluated on the run's validation split, outside the time that counts: the share of its comparisons that the
policy decides as the oracle did, and the win rate of sampled responses against gold.
"""

import argparse
import os
import shlex
import sys
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quality_curves.reading import METRICS, MODES, print_tables, read_curves, summarise
from quality_curves.setting import DEMO, machine, prepare
from quality_curves.training import train_curve, win_rates_of
from quality_curves.world import GROUP, World, make_world, mode_settings
from rich.console import Console

from jpo_ray.artifacts import package_versions
from jpo_ray.config_training import TrainConfig
from jpo_ray.evaluation.win_rates import BASELINE
from jpo_ray.files import write_json


def main() -> None:
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    configs = prepare(arguments, console)
    report: dict[str, Any] = {"command": shlex.join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    report |= {"machine": machine(arguments.threads), "versions": package_versions()}
    found: dict[int, dict[str, Any]] = {}
    for seed, config in configs.items():
        settings = {mode: mode_settings(config, mode, arguments) for mode in MODES}
        folder = arguments.run_dir / f"seed-{seed}"
        world = make_world(config, folder, settings["pairs"], arguments, arguments.degree)
        found[seed] = _measure(world, settings, arguments.points, console)
        if arguments.json:  # after each seed, so that an interrupted run leaves what it has
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, report | {"summary": summarise(found), "seeds": found})
    print_tables(console, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO, help="with a `train` entry `jpo`; default: the demo's")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--degree", type=int, default=8, help="comparisons of each item, ties included")
    parser.add_argument("--conditional", action="store_true", help="train on the run's conditional comparisons too")
    parser.add_argument("--comparisons-per-step", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, help="default: the entry's")
    parser.add_argument("--graph-learning-rate", type=float, help="default: as `pairs`")
    parser.add_argument("--epochs", type=float, help="default: the entry's")
    parser.add_argument("--graph-epochs", type=float, help="default: as `pairs`")
    parser.add_argument("--points", type=int, default=12, help="evaluations after the one before training")
    parser.add_argument("--win-rate-instructions", type=int, default=150)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.degree % 2 or not 2 <= arguments.degree < GROUP:
        parser.error(f"--degree: an even number from 2 to {GROUP - 2}")
    if min(arguments.points, arguments.win_rate_instructions, arguments.threads) < 1:
        parser.error("--points, --win-rate-instructions and --threads: at least 1")
    return arguments


def _measure(world: World, settings: dict[str, TrainConfig], points: int, console: Console) -> dict[str, Any]:
    """Both modes' curves, when they reach the targets, and their final win rates compared."""
    curves: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    # In turns, so that other work on the machine slows both alike.
    for pair in zip_longest(*(train_curve(world, settings[mode], points) for mode in MODES)):
        for mode, point in zip(MODES, pair, strict=True):
            if point is not None:
                curves[mode].append(point)
                shown = ", ".join(f"{name} {point[name]:.1f}" for name in ("seconds", *METRICS))
                console.print(f"  seed {world.config.seed} {mode} step {point['step']}: {shown}")
    judged = {mode: [point.pop("judged") for point in curves[mode]][-1] for mode in MODES}
    # Win rates are compared with those of the model named BASELINE, instruction by instruction: here `pairs`.
    named = {"pairs": BASELINE, "graph": "graph"}
    final = win_rates_of(world, [row | {"model": named[mode]} for mode in MODES for row in judged[mode]])
    return {
        "train_comparisons": world.data.train.count,
        "held_out_comparisons": len(world.data.validation),
        "sampled_instructions": len(world.golds),
        "settings": {mode: settings[mode].model_dump() for mode in MODES},
        "curves": curves,
        "reached": read_curves(curves),
        "win_rate_difference": final["graph"]["difference_to_sft"],
    }


if __name__ == "__main__":
    main()
