"""A node that `ray start` started, with nothing set but its token: what it asks for, and what it leaves behind."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import Nodes, ray_nodes

pytestmark = pytest.mark.ray

CONNECTS = """
import sys
from jpo_ray.cluster.session import ray_session
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError

try:
    with ray_session(ClusterConfig(address=sys.argv[1])) as ray:
        print(len(ray.nodes()))
except InputError as error:
    print(error)
"""
KILLS = """
import multiprocessing, os, signal, sys, time
import psutil
from jpo_ray.cluster.session import ray_session
from jpo_ray.config_cluster import ClusterConfig

class Parent:
    def processes(self):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
        return os.getpid(), child.pid

with ray_session(ClusterConfig(address=sys.argv[1])) as ray:
    actor = ray.remote(Parent).options(num_cpus=0).remote()
    parent, child = map(psutil.Process, ray.get(actor.processes.remote()))
    parent.kill()
    left = psutil.wait_procs([child], timeout=20)[1]
    for process in left:
        process.kill()
    print(f"{len(left)} left")
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Nodes]:
    with ray_nodes() as nodes:
        nodes.start_head(1)
        yield nodes


def said(node: Nodes, program: str, **environment: str | None) -> str:
    """The last line of a program that connects to the node with this in its environment too (None: without)."""
    known = node.environment | environment
    done = subprocess.run(
        [sys.executable, "-c", program, node.address], env={name: value for name, value in known.items() if value},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def test_a_token_that_is_missing_or_wrong_is_one_line(node: Nodes, tmp_path: Path) -> None:
    assert said(node, CONNECTS) == "1"
    wrong = tmp_path / "token"
    wrong.write_text(64 * "0")
    expected = (
        f"cluster.address: the Ray cluster at {node.address} asks for a token, and the one here is missing or wrong; "
        "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, the file that the cluster's nodes were started with"
    )
    nowhere = str(tmp_path)  # a home without a token
    assert said(node, CONNECTS, RAY_AUTH_MODE=None, RAY_AUTH_TOKEN_PATH=None, HOME=nowhere) == expected
    assert said(node, CONNECTS, RAY_AUTH_TOKEN_PATH=None, HOME=nowhere) == expected
    assert said(node, CONNECTS, RAY_AUTH_TOKEN_PATH=str(wrong)) == expected


def test_what_a_killed_actor_has_started_ends_with_it(node: Nodes) -> None:
    """As vLLM's engine is a process that its actor has started: one that outlived it would keep the GPU's memory."""
    assert said(node, KILLS) == "0 left"
