"""Work on shards as Ray tasks, a few at a time, so that memory does not grow with their number."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jpo_ray.cluster.resources import await_resources
from jpo_ray.cluster.session import LARGE_AHEAD, within
from jpo_ray.config_cluster import ClusterConfig

Arguments = Iterable[tuple[Any, ...]]


def map_shards(
    ray: Any, config: ClusterConfig, stage: str, function: Callable[..., Any], arguments: Arguments, *shared: Any
) -> Iterator[Any]:
    """`function(*shared, *each)` of each of the arguments, in their order; what is shared is sent once.

    As many tasks as the cluster has cores are under way; arguments are taken from the iterable as tasks end. Raises
    `TimeoutError` where no core comes free in `config.wait_s`, or the next result not in `config.actor_timeout_s`.
    """
    await_resources(ray, config, stage, [{"CPU": 1.0}])
    results = _in_turn(ray, function, arguments, shared)
    yield from within(results, config.actor_timeout_s, stage, "cluster.actor_timeout_s", LARGE_AHEAD)


def _in_turn(ray: Any, function: Callable[..., Any], arguments: Arguments, shared: tuple[Any, ...]) -> Iterator[Any]:
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(function).options(num_cpus=1)
    known = [ray.put(value) for value in shared]
    waiting: deque[Any] = deque()
    for each in arguments:
        waiting.append(task.remote(*known, *each))
        if len(waiting) >= at_once:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())
