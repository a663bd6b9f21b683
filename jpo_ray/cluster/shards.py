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
    or the next result does not come in `config.actor_timeout_s`.
    """
    await_resources(ray, config, stage, [task_resources(config)])
    results = _in_turn(ray, config, function, arguments, shared)
    yield from within(results, config.actor_timeout_s, stage, "cluster.actor_timeout_s", LARGE_AHEAD)


def _in_turn(
    ray: Any, config: ClusterConfig, function: Callable[..., Any], arguments: Arguments, shared: tuple[Any, ...]
) -> Iterator[Any]:
    at_once = tasks_at_once(ray, config)
    task = ray.remote(function).options(**as_options(task_resources(config)))
    known = [ray.put(value) for value in shared]
    waiting: deque[Any] = deque()
    for each in arguments:
        waiting.append(task.remote(*known, *each))
        if len(waiting) >= at_once:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())
