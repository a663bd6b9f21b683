"""What the workers of a training tell each other. Alone, a process is rank 0 of one."""

from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=1)


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """In place; every rank must call it."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks, an hour at most: one of them may be writing a large checkpoint, or sending it away."""
    if rank_and_world()[1] > 1:
        dist.barrier(patient_group())


def patient_group() -> Any:
    """All ranks, for what takes longer than the gradients of a step; None for a process that is alone."""
    return _patient(dist.group.WORLD) if rank_and_world()[1] > 1 else None


@cache
def _patient(_world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank; every rank must call it."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=patient_group())
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every rank's value, by rank; every rank must call it."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value, group=patient_group())
    return values
