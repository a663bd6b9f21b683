"""One local Ray session for all tests of a pytest session, and the small world that cluster tests train on."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from jpo_ray.cluster.session import ray_session
from jpo_ray.config_cluster import ClusterConfig

NODES_KEY = "sk-canary-0123456789"  # what the nodes of the cluster have in their environment
BATON = "baton"  # a resource that the cluster has one of, as others have one GPU
CLUSTER = ClusterConfig(num_workers=2, cpus_per_worker=1, num_actors=1, collective_timeout_s=60)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray, started once; whatever opens a session meanwhile is given this one."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("JPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        environment.setenv("OPENAI_API_KEY", NODES_KEY)
        environment.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({BATON: 1}))
        with ray_session(ClusterConfig()) as ray:
            environment.delenv("OPENAI_API_KEY")  # the nodes keep theirs
            environment.delenv("RAY_OVERRIDE_RESOURCES")
            logging.disable(logging.NOTSET)  # other tests of this process look at logs
            yield ray


def nothing(*_: Any) -> None:
    """Where progress would be shown."""


class NoBar:
    """Where progress would be shown: it remembers how far it came."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def begin(self, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, count: int) -> None:
        self.to(self.done + count)

    def to(self, done: int) -> None:
        assert self.done <= done <= self.total
        self.done = done
