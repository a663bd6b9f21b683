"""Optimizers and learning-rate schedules, under TRL's names."""

import math
from typing import Any

import torch
from torch import nn

from jpo_ray.config_training import OptimizerConfig


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> Any:
    """AdamW; 8-bit and paged ones through bitsandbytes (paging needs CUDA, elsewhere state stays in memory)."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=True, **options)
    import bitsandbytes as bnb

    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return kinds[config.optim](parameters, **options)


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps of the linear warm-up; a share is rounded up."""
    share = 0 < config.warmup_steps < 1
    return math.ceil(total_steps * config.warmup_steps) if share else int(config.warmup_steps)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of update `step` (counted from 0): linear warm-up from 0, then the schedule down to 0 at `total_steps`."""
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
