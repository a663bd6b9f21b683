"""Tables, and what must be known about the machine to read them."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from throughput.figures import Row, fastest, ratios

# Ratio to TRL's comparisons per second on two CPU cores in float32: what must be reached, and the aim.
TARGETS = {"degree8": (30, 50), "degree2": (8, 10), "d_m": (6, 8), "conditional": (4, 6)}
MODEL_FLOPS_TARGET = (0.50, 0.65)
MEMORY_TARGET = (2, 3)  # TRL's peak above weights, in multiples of ours
LEFT = ("work", "contender", "dtype")  # columns of text


def print_tables(console: Console, rows: list[Row], *, with_targets: bool) -> None:
    columns = [*LEFT, "micro-batch", "comparisons/s", "with reference", "tokens/s", "MiB above weights"]
    table = _table("Training throughput", [*columns, "model flops", "hardware flops"])
    for row in rows:
        cells = [row["work"], row["contender"], row["dtype"], str(row["micro_batch"])]
        table.add_row(*cells, *(_cells(row) if "error" not in row else [row["error"]]))
    console.print(table)
    console.print(
        "micro-batch: comparisons for TRL, tokens for this engine. tokens: distinct ones. flops: shares of the "
        "best matrix product of that dtype in the same process."
    )
    compared = ratios(rows)
    if compared:
        console.print(_ratio_table(compared, with_targets))
    ours = [fastest(rows, work, "jpo", "float32") for work in TARGETS]
    shares = [row["model_flops_share"] for row in ours if row is not None]
    if with_targets and shares:
        must, aim = MODEL_FLOPS_TARGET
        console.print(f"model flops in float32, lowest work: {min(shares):.0%} (must {must:.0%}, aim {aim:.0%})")


def _cells(row: Row) -> list[str]:
    return [
        f"{row['comparisons_per_s']:.2f}",
        f"{row['comparisons_per_s_with_reference']:.2f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['peak_mib']:.0f}",
        f"{row['model_flops_share']:.1%}",
        f"{row['hardware_flops_share']:.1%}",
    ]


def _ratio_table(compared: list[Row], with_targets: bool) -> Table:
    columns = ["work", "dtype", "comparisons/s", "must", "aim", "with reference", "TRL's memory / ours", "must", "aim"]
    table = _table("This engine in multiples of TRL, each at its fastest micro-batch", columns)
    for row in compared:
        judged = with_targets and row["dtype"] == "float32"
        speed = [str(value) if judged else "" for value in TARGETS[row["work"]]]
        memory = [str(value) if judged else "" for value in MEMORY_TARGET]
        rates = [f"{row[name]:.1f}" for name in ("comparisons_per_s", "comparisons_per_s_with_reference", "memory")]
        table.add_row(row["work"], row["dtype"], rates[0], *speed, rates[1], rates[2], *memory)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right")
    return table


def machine(device: str) -> dict[str, Any]:
    """Where, when and with what this was measured."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),  # other work on the machine spoils the figures
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
