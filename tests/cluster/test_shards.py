"""Work on shards, a few at a time: in order, and no more under way than the cluster has cores."""

from typing import Any

import pytest

from jpo_ray.cluster.shards import in_order

pytestmark = pytest.mark.ray


# By value: workers cannot import this module.
scaled = lambda factor, number, name: (factor * number, name)  # noqa: E731


def test_results_come_in_order_and_arguments_are_taken_as_they_are_needed(ray_cluster: Any) -> None:
    taken = []

    def arguments() -> Any:
        for number in range(8):
            taken.append(number)
            yield number, f"shard {number}"

    found = in_order(ray_cluster, scaled, arguments(), 10)
    assert next(found) == (0, "shard 0")
    assert len(taken) <= int(ray_cluster.cluster_resources()["CPU"])
    assert list(found) == [(10 * number, f"shard {number}") for number in range(1, 8)]


def test_no_shards(ray_cluster: Any) -> None:
    assert list(in_order(ray_cluster, scaled, [], 10)) == []
