"""Lanes: on CPUs micro-batches run side by side, each on one core, rather than one after another on all of them.

A product that is split over cores waits for the slowest of them at every operation; micro-batches wait for each other
once a step. A lane does its work in one thread, with one core to itself.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


def side_by_side(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """Results of the functions, each called in a lane of its own; one alone is called here, with all cores.

    Torch's modes (gradients, autocast) are a thread's own: the functions set what they need.
    """
    if len(work) == 1:
        return [work[0]()]
    with _one_core_each():
        pending = [_pool().submit(function) for function in work]
        return [future.result() for future in pending]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="lane", initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Torch's own threads are counted per thread, those of its matrix library for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
