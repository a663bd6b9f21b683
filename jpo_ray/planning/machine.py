"""What this machine has, without starting anything on it."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jpo_ray.config import RunConfig
from jpo_ray.planning.costs import Speed
from jpo_ray.planning.memory import GIB

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
    free_disk_gib: float


def this_machine(run_dir: Path | None) -> Machine:
    """`free_disk_gib` is that of the run directory's file system, or of the current folder's."""
    import psutil

    names, memories = _gpus()
    place = next(path for path in [*(run_dir or Path()).absolute().parents] if path.exists())
    return Machine(
        gpus=len(names),
        gpu_name=names[0] if names else "",
        gpu_memory_gib=min(memories) if memories else None,
        cores=os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / GIB,
        free_disk_gib=shutil.disk_usage(place).free / GIB,
    )


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


def device_memory_gib(config: RunConfig, machine: Machine) -> float:
    """Of a worker: its GPU's, or without GPUs its share of the machine's."""
    if config.plan.device_memory_gib:
        return config.plan.device_memory_gib
    if config.cluster.gpus_per_worker:
        return machine.gpu_memory_gib or GPU_MEMORY_GIB
    return machine.memory_gib / max(config.cluster.num_workers * config.cluster.trainings_at_once, 1)


def stated_speed(config: RunConfig, machine: Machine) -> tuple[Speed, list[str]]:
    """Speeds, and what was assumed for them in words. Workers without GPUs share the machine's cores."""
    plan, cluster = config.plan, config.cluster
    if cluster.gpus_per_worker:
        peak, mfu = plan.peak_tflops or GPU_TFLOPS, GPU_MFU if plan.mfu is None else plan.mfu
        said = (
            f"speed: {peak:g} TFLOPS a GPU (plan.peak_tflops), of which training and scoring reach {mfu:.0%} (plan.mfu)"
        )
        workers, actors = cluster.num_workers, cluster.num_actors
    else:
        peak = plan.peak_tflops or machine.cores * CORE_TFLOPS
        mfu = CPU_MFU if plan.mfu is None else plan.mfu
        said = (
            f"speed: {peak:g} TFLOPS of {machine.cores} cores (plan.peak_tflops), of which training and scoring reach "
            f"{mfu:.0%} (plan.mfu)"
        )
        workers = actors = 1
    flops = peak * 1e12
    speed = Speed(max(flops * mfu, 1.0), max(flops * plan.sample_mfu, 1.0), workers, actors)
    return speed, [f"{said} and sampling {plan.sample_mfu:.0%} (plan.sample_mfu)"]
