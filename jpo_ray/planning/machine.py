"""What this machine has, without starting anything on it."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jpo_ray.config import RunConfig
from jpo_ray.planning.memory import GIB
from jpo_ray.planning.workers import JUDGING, STAGES, devices_of, has_gpus, workers_of

GPU_MEMORY_GIB = 80.0  # where none is here to be asked
GPU_TFLOPS = 989.0  # 16-bit matrix peak of an H100 (SXM) by its data sheet
CORE_TFLOPS = 0.1  # float32, measured on Zen 4 (docs/benchmarks.md)
GPU_MFU = 0.35  # assumed: not measured by this project
CPU_MFU = 0.5  # 0.54 to 0.61 were measured (docs/benchmarks.md)


@dataclass(frozen=True)
class Machine:
    gpus: int
    gpu_name: str
    gpu_memory_gib: float | None
    cores: int
    memory_gib: float
    free_disk_gib: float  # where the run directory is to be
    free_hub_gib: float  # where the Hub's cache is
    one_disk: bool  # whether these are the same


def this_machine(run_dir: Path | None) -> Machine:
    """Free disk is that of the run directory's file system, or of the current folder's, and of the Hub's cache."""
    import psutil
    from huggingface_hub import constants

    names, memories = _gpus()
    place, hub = _existing(run_dir or Path()), _existing(Path(constants.HF_HUB_CACHE) / "models")
    return Machine(
        gpus=len(names),
        gpu_name=names[0] if names else "",
        gpu_memory_gib=min(memories) if memories else None,
        cores=os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / GIB,
        free_disk_gib=shutil.disk_usage(place).free / GIB,
        free_hub_gib=shutil.disk_usage(hub).free / GIB,
        one_disk=place.stat().st_dev == hub.stat().st_dev,
    )


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in path.expanduser().absolute().parents if folder.exists())


def _gpus() -> tuple[list[str], list[float]]:
    """Names and memory in GiB of the NVIDIA GPUs that the driver shows."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], []
    try:
        asked = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [], []
    rows = [line.rpartition(",") for line in said.splitlines() if "," in line]
    return [name.strip() for name, _, _ in rows], [float(memory) / 1024 for _, _, memory in rows]


def device_memory_gib(config: RunConfig, machine: Machine, stage: str) -> float:
    """Of a worker of the stage: its GPU's, or without GPUs its share of the machine's."""
    if config.plan.device_memory_gib:
        return config.plan.device_memory_gib
    if has_gpus(config, stage):
        return machine.gpu_memory_gib or GPU_MEMORY_GIB
    at_once = config.cluster.trainings_at_once if stage == "train" else 1
    return machine.memory_gib / (workers_of(config, stage) * at_once)


def stated_speeds(config: RunConfig, machine: Machine) -> tuple[dict[str, float], list[str]]:
    """Flops per second of each stage, all its workers together, and what was assumed for them in words.

    Workers without GPUs share the machine's cores. Judging is not timed.
    """
    plan, found, said = config.plan, {}, {}
    for stage in (stage for stage in STAGES if stage not in JUDGING):
        on_gpus = has_gpus(config, stage)
        peak = plan.peak_tflops or (GPU_TFLOPS if on_gpus else machine.cores * CORE_TFLOPS)
        mfu = plan.mfu if plan.mfu is not None else GPU_MFU if on_gpus else CPU_MFU
        share = plan.sample_mfu if stage == "sample" else mfu
        found[stage] = max(1.0, peak * 1e12 * share * (devices_of(config, stage) if on_gpus else 1))
        what = "a GPU" if on_gpus else f"of {machine.cores} cores"
        said[on_gpus] = (
            f"speed: {peak:g} TFLOPS {what} (plan.peak_tflops), of which training and scoring reach {mfu:.0%} "
            f"(plan.mfu) and sampling {plan.sample_mfu:.0%} (plan.sample_mfu)"
        )
    return found, list(said.values())
