"""What a higher degree gives for the same number of judged comparisons: fewer items, each compared more often.

    python benchmarks/degree.py --run-dir runs/quality [--comparisons 2816] [--json FILE] [section.key=value ...]

A comparison costs a judgment whatever its degree, so the judging budget is held fixed: degree d spreads it over
`2 * comparisons / d` items in random groups. Each degree trains in `graph` batches from the run's own SFT model (made
up to the reference where it is missing), and is measured on the run's validation split as in `time_to_quality.py`.
"""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_curves.setting import DEMO, machine, prepare
from quality_curves.training import train_curve
from quality_curves.world import GROUP, make_world, mode_settings
from rich.console import Console
from rich.table import Table

from jpo_ray.artifacts import package_versions
from jpo_ray.files import write_json

COLUMNS = {
    "items": "items", "comparisons": "comparisons", "passes": "items scored", "seconds": "seconds",
    "accuracy": "held-out accuracy", "win_rate": "win rate",
}  # fmt: skip


def main() -> None:
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    configs = prepare(arguments, console)
    found: list[dict[str, Any]] = []
    for seed, config in configs.items():
        for degree in arguments.degrees:
            settings = mode_settings(config, "graph", arguments)
            count = 2 * arguments.comparisons // degree
            world = make_world(config, arguments.run_dir / f"seed-{seed}", settings, arguments, degree, count)
            *_, end = train_curve(world, settings, points=1)
            row = {"seed": seed, "degree": degree, "items": count, "comparisons": world.data.train.count}
            row |= {"passes": end["items"]} | {name: end[name] for name in ("seconds", "accuracy", "win_rate")}
            found.append(row)
            console.print("  " + ", ".join(f"{name} {value:.5g}" for name, value in row.items()))
    _print_table(console, found, arguments.degrees)
    if arguments.json:
        report = {"command": shlex.join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(
            arguments.json,
            report | {"machine": machine(torch.get_num_threads()), "versions": package_versions(), "rows": found},
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO, help="with a `train` entry `jpo`; default: the demo's")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--comparisons", type=int, default=2816, help="judged ones, ties included")
    parser.add_argument("--comparisons-per-step", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: the entry's")
    parser.add_argument("--epochs", type=float, help="default: the entry's")
    parser.add_argument("--win-rate-instructions", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    arguments.conditional, arguments.graph_learning_rate, arguments.graph_epochs = False, None, None
    if any(degree % 2 or not 2 <= degree < GROUP for degree in arguments.degrees):
        parser.error(f"--degrees: even numbers from 2 to {GROUP - 2}")
    if any(2 * arguments.comparisons % (degree * GROUP) for degree in arguments.degrees):
        parser.error(f"--comparisons: each degree must fill whole groups of {GROUP} items")
    return arguments


def _print_table(console: Console, found: list[dict[str, Any]], degrees: list[int]) -> None:
    table = Table("degree", *COLUMNS.values(), "each seed's win rate", title="The same number of judged comparisons")
    for degree in degrees:
        rows = [row for row in found if row["degree"] == degree]
        cells = [f"{mean(row[name] for row in rows):,.1f}" for name in COLUMNS]
        table.add_row(str(degree), *cells, ", ".join(f"{row['win_rate']:.1f}" for row in rows))
    console.print(table)


if __name__ == "__main__":
    main()
