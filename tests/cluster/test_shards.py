"""Work on shards, a few at a time: in order, and few more under way than the cluster has cores."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.running import BATON
from jpo_ray.cluster import shards
from jpo_ray.cluster.session import LARGE_AHEAD
from jpo_ray.cluster.shards import map_shards
from jpo_ray.config_cluster import ClusterConfig

# By value: workers cannot import this module.
scaled = lambda factor, number, name: (factor * number, name)  # noqa: E731


@pytest.mark.ray
def test_results_come_in_order_and_arguments_are_taken_as_they_are_needed(ray_cluster: Any) -> None:
    taken = []

    def arguments() -> Any:
        for number in range(8):
            taken.append(number)
            yield number, f"shard {number}"

    found = map_shards(ray_cluster, ClusterConfig(), "judge", scaled, arguments(), 10)
    assert next(found) == (0, "shard 0")
    assert len(taken) <= int(ray_cluster.cluster_resources()["CPU"]) + LARGE_AHEAD
    assert list(found) == [(10 * number, f"shard {number}") for number in range(1, 8)]


@pytest.mark.ray
def test_tasks_keep_to_the_nodes_that_the_stage_asks_for(ray_cluster: Any) -> None:
    """Each takes half of the cluster's one baton, which is why no more than two are under way."""
    taken, config = list[int](), ClusterConfig(custom_resources={BATON: 0.5})

    def arguments() -> Any:
        for number in range(6):
            taken.append(number)
            yield (number,)

    def held(_: int) -> Any:
        import ray

        return ray.get_runtime_context().get_assigned_resources()

    found = map_shards(ray_cluster, config, "judge", held, arguments())
    assert next(found) == {"CPU": 1.0, BATON: 0.5}
    assert len(taken) <= 2 + LARGE_AHEAD
    assert list(found) == [{"CPU": 1.0, BATON: 0.5}] * 5


@pytest.mark.ray
@pytest.mark.parametrize("end", ["a task hangs", "one fails", "no more is wanted"])
def test_tasks_under_way_are_cancelled(end: str, ray_cluster: Any) -> None:
    """Those that would take a minute hold no core a few seconds later."""
    config = ClusterConfig(actor_timeout_s=60 if end == "one fails" else 5)

    def work(number: int) -> int:
        if number == 0 and end == "one fails":
            raise ValueError("a shard that cannot be read")
        if number:
            time.sleep(60)
        return number

    found = map_shards(ray_cluster, config, "judge", work, ((number,) for number in range(4)))
    if end == "one fails":
        with pytest.raises(ValueError, match="a shard that cannot be read"):
            next(found)
    else:
        assert next(found) == 0
    if end == "a task hangs":
        with pytest.raises(TimeoutError, match="judge: nothing came for 5 s"):
            next(found)
    found.close()
    until = time.monotonic() + 20
    while ray_cluster.available_resources().get("CPU") != ray_cluster.cluster_resources()["CPU"]:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.ray
def test_no_shards(ray_cluster: Any) -> None:
    assert list(map_shards(ray_cluster, ClusterConfig(), "judge", scaled, [], 10)) == []


def test_a_shard_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run where they are waited for. The stage's core is asked for once, before anything is put."""
    asked: list[Any] = []
    monkeypatch.setattr(shards, "await_resources", lambda _ray, _config, *wanted: asked.append(wanted))
    config = ClusterConfig(actor_timeout_s=0.2)

    def work(factor: int, number: int) -> int:
        if number == 3:
            time.sleep(2)
        return factor * number

    found = map_shards(HERE, config, "judge", work, ((number,) for number in range(9)), 10)
    assert [next(found) for _ in range(3)] == [0, 10, 20]
    CANCELLED.clear()
    with pytest.raises(TimeoutError, match=r"^judge: nothing came for 0\.2 s \(cluster\.actor_timeout_s\)"):
        next(found)
    assert len(CANCELLED) == 2  # the one that hangs, and one behind it
    assert asked == [("judge", [{"CPU": 1.0}])]


def _remote(function: Any) -> Any:
    task = SimpleNamespace(remote=lambda *arguments: lambda: function(*arguments))
    return SimpleNamespace(options=lambda **_: task)


CANCELLED: list[Any] = []
HERE = SimpleNamespace(
    cancel=lambda task, **_: CANCELLED.append(task),
    put=lambda value: value,
    get=lambda wanted: wanted(),
    remote=_remote,
    cluster_resources=lambda: {"CPU": 2},
    nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}],
)
