"""Work on shards as Ray tasks, a few at a time, so that memory does not grow with their number."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_order(
    ray: Any, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *shared: Any
) -> Iterator[Any]:
    """`function(*shared, *each)` of each of the arguments, in their order; what is shared is sent once.

    As many tasks as the cluster has cores are under way; arguments are taken from the iterable as tasks end.
    """
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
