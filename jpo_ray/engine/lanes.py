"""Lanes: on CPUs micro-batches run side by side, rather than one after another on all cores.

A product that is split over cores waits for the slowest of them at every operation; micro-batches wait for each other
once a step. A lane does its work in one thread, with its share of the cores.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch

LANE_TOKENS = 1024  # a lane has at least so many at a time: products of fewer rows are slow

Result = TypeVar("Result")


def lane_count(cores: int, max_tokens: int) -> int:
    """Lanes of a worker with so many cores that takes `max_tokens` tokens at a time."""
    return max(1, min(cores, max_tokens // LANE_TOKENS))


def side_by_side(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """Results of the functions, each called in a lane of its own; one alone is called here, with all cores.

    Torch's modes (gradients, autocast) are a thread's own: the functions set what they need.
    """
    if len(work) == 1:
        return [work[0]()]
    cores = torch.get_num_threads()
    try:
        pending = [_pool().submit(partial(_with_cores, max(1, cores // len(work)), function)) for function in work]
        return [future.result() for future in pending]
    finally:
        torch.set_num_threads(cores)


def _with_cores(cores: int, function: Callable[[], Result]) -> Result:
    torch.set_num_threads(cores)  # torch counts its threads per thread, its matrix library for the whole process
    return function()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="lane")
