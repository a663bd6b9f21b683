"""Work on shards as Ray tasks, a few at a time, so that memory does not grow with their number."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jpo_ray.cluster.resources import as_options, await_resources, task_resources, tasks_at_once
from jpo_ray.cluster.session import LARGE_AHEAD, within
from jpo_ray.config_cluster import ClusterConfig

Arguments = Iterable[tuple[Any, ...]]


def map_shards(
    ray: Any, config: ClusterConfig, stage: str, function: Callable[..., Any], arguments: Arguments, *shared: Any
) -> Iterator[Any]:
    """`function(*shared, *each)` of each of the arguments, in their order; what is shared is sent once.

    A task takes a core and the stage's custom resources; as many as the cluster has room for are under way. Arguments
    are taken from the iterable as tasks end. Raises `TimeoutError` where there is no room for one in `config.wait_s`,
    or the next result does not come in `config.actor_timeout_s`. Tasks that are still under way then, or where the
    caller wants no more, are cancelled.
    """
    await_resources(ray, config, stage, [task_resources(config)])
    waiting: deque[Any] = deque()
    results = _in_turn(ray, config, function, arguments, shared, waiting)
    try:
        yield from within(results, config.actor_timeout_s, stage, "cluster.actor_timeout_s", LARGE_AHEAD)
    finally:  # here too: the thread that `within` reads in may wait for one that hangs
        _cancel(ray, waiting)


def _in_turn(
    ray: Any,
    config: ClusterConfig,
    function: Callable[..., Any],
    arguments: Arguments,
    shared: tuple[Any, ...],
    waiting: deque[Any],
) -> Iterator[Any]:
    """`waiting` has the tasks that are under way, the next one to end among them."""
    at_once = tasks_at_once(ray, config)
    task = ray.remote(function).options(**as_options(task_resources(config)))
    known = [ray.put(value) for value in shared]
    try:
        for each in arguments:
            waiting.append(task.remote(*known, *each))
            if len(waiting) >= at_once:
                yield _first(ray, waiting)
        while waiting:
            yield _first(ray, waiting)
    finally:
        _cancel(ray, waiting)


def _first(ray: Any, waiting: deque[Any]) -> Any:
    found = ray.get(waiting[0])
    waiting.popleft()
    return found


def _cancel(ray: Any, waiting: deque[Any]) -> None:
    """By the end of their processes: one that hangs may not listen."""
    for task in list(waiting):
        ray.cancel(task, force=True)
