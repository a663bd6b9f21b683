"""What the scripts share before anything is measured: the runs up to the reference, and the machine."""

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

import jpo_ray
from jpo_ray.config import RunConfig
from jpo_ray.config_file import load_config
from jpo_ray.pipeline import run_stages

DEMO = Path(jpo_ray.__file__).parent / "sandbox" / "demo.yaml"
STAGES = ["items", "pairs", "judge", "sft", "reference"]


def prepare(arguments: argparse.Namespace, console: Console) -> dict[int, RunConfig]:
    """A run of each seed up to the reference. All before any is measured: Ray must be gone from the cores by then."""
    configs = {seed: load_config(arguments.config, [*arguments.overrides, f"seed={seed}"]) for seed in arguments.seeds}
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    for seed, config in configs.items():
        run_stages(config, arguments.run_dir / f"seed-{seed}", STAGES, console)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    return configs


def machine(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": os.getloadavg(),
    }
