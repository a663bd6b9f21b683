"""What a stage asks of the cluster: shared fairly, refused at once where the cluster will never have it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.train import ControllerError

from cluster.running import CLUSTER, NoBar, nothing
from jpo_ray.cluster import resources, training
from jpo_ray.cluster.embedding import embed_texts
from jpo_ray.cluster.reference import reference_scores
from jpo_ray.cluster.resources import (
    await_most,
    await_resources,
    cpus_for_each,
    require_resources,
    worker_resources,
)
from jpo_ray.cluster.sampling import generate
from jpo_ray.cluster.session import ray_session
from jpo_ray.cluster.training import Work, run_training
from jpo_ray.config import PairsConfig, SampleConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.errors import InputError
from jpo_ray.evaluation.generation import Request, SampledModel

Nodes = list[dict[str, float]]
NOWHERE = Path("/nowhere")
ONE_ITEM = TokenizedItems(np.array([1, 2], np.int32), np.array([0, 2]), np.array([1], np.int32), 0)


def cluster_of(*nodes: dict[str, float]) -> Any:
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {}}],
        cluster_resources=lambda: total,
    )


@pytest.mark.parametrize(
    ("nodes", "count", "cpus"),
    [
        ([{"CPU": 8}], 1, 8),
        ([{"CPU": 8}], 3, 2),
        ([{"CPU": 2}], 5, 1),
        ([{"CPU": 8}, {"CPU": 4}], 2, 4),
        ([{"CPU": 8}, {"CPU": 4}], 3, 2),
        ([{"GPU": 1}, {"CPU": 8}], 2, 4),  # a head without CPUs holds no worker
    ],
)
def test_each_worker_gets_a_fair_share_of_the_smallest_node(nodes: Nodes, count: int, cpus: int) -> None:
    assert cpus_for_each(cluster_of(*nodes), ClusterConfig(), count) == cpus


def test_configured_resources_are_taken_as_they_are() -> None:
    config = ClusterConfig(cpus_per_worker=3, gpus_per_worker=0.5)
    assert worker_resources(cluster_of({"CPU": 1}), config, 2) == {"CPU": 3.0, "GPU": 0.5}


def test_workers_must_fit_whole_nodes() -> None:
    """Two nodes of 3 CPUs hold two workers of 2 CPUs, not three, though there are 6 CPUs."""
    cluster = cluster_of({"CPU": 3}, {"CPU": 3})
    require_resources(cluster, "train", [{"CPU": 2}] * 2)
    message = r"^train: asks for 3 x 2 CPU, but the cluster has 6 CPU, 0 GPU on 2 node\(s\); lower cluster\.num_workers"
    with pytest.raises(InputError, match=message):
        require_resources(cluster, "train", [{"CPU": 2}] * 3)


ONE_CPU = {"CPU": 1.0}


def losing(looks: int, *, ready_after: int | None = None) -> Any:
    """Two nodes of one CPU, of which one is dead and counts as alive for so many looks; room comes after some waits."""
    seen = {"looks": 0, "waits": 0, "groups": 0}

    def nodes() -> list[dict[str, Any]]:
        seen["looks"] += 1
        return [{"Alive": alive, "Resources": ONE_CPU} for alive in (True, seen["looks"] <= looks)]

    def wait(_seconds: int) -> bool:
        seen["waits"] += 1
        return ready_after is not None and seen["waits"] > ready_after

    def group(_bundles: Nodes, **_: str) -> Any:
        seen["groups"] += 1
        return SimpleNamespace(wait=wait)

    def remove(_group: Any) -> None:
        seen["groups"] -= 1

    util = SimpleNamespace(placement_group=group, remove_placement_group=remove)
    total = {"CPU": 2.0}
    return SimpleNamespace(
        nodes=nodes, util=util, seen=seen, cluster_resources=lambda: total, available_resources=lambda: ONE_CPU
    )


def test_a_node_that_is_not_yet_known_as_dead_is_waited_for_and_then_done_without() -> None:
    ray = losing(4)
    assert await_most(ray, ClusterConfig(), "train", ONE_CPU, 2) == 1
    assert ray.seen == {"looks": 5, "waits": 4, "groups": 0}


def test_a_stage_is_refused_as_soon_as_a_lost_node_is_known_as_dead() -> None:
    """And not after `wait_s`: what the nodes that are left can never hold is not waited for."""
    ray = losing(3)
    with pytest.raises(InputError, match=r"^sample: asks for 2 x 1 CPU, but the cluster has .* on 1 node\(s\); lower"):
        await_resources(ray, ClusterConfig(), "sample", [ONE_CPU] * 2)
    assert ray.seen == {"looks": 4, "waits": 3, "groups": 0}


def test_room_that_another_holds_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = losing(1000, ready_after=2)
    assert await_most(ray, ClusterConfig(), "train", ONE_CPU, 2) == 2
    assert ray.seen == {"looks": 3, "waits": 3, "groups": 0}
    ray = losing(1000)
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(resources, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    message = r"^train: waited 600 s \(cluster\.wait_s\) for 2 x 1 CPU; the cluster has 2 CPU, 0 GPU, of which 1 CPU"
    with pytest.raises(TimeoutError, match=message):
        await_most(ray, ClusterConfig(), "train", ONE_CPU, 2)
    assert ray.seen == {"looks": 7, "waits": 7, "groups": 0}


def test_only_workers_that_found_no_room_wait_for_it() -> None:
    """Those that failed by themselves go on as fewer where a node is known as lost, and else not at all."""
    no_room, failed = ControllerError(TimeoutError("no room")), ValueError("loss nan")

    def left(ray: Any, error: Exception, may_wait: bool = True) -> int:
        return training._workers_left(ray, ClusterConfig(), "train", error, ONE_CPU, 2, may_wait)

    assert left(losing(3), no_room) == 1
    assert left(losing(1000, ready_after=1), no_room) == 2
    assert left(losing(0), failed) == 1
    with pytest.raises(ValueError, match="loss nan"):
        left(losing(3), failed)
    with pytest.raises(ControllerError):  # after `max_failures` waits
        left(losing(3), no_room, may_wait=False)
    gone = losing(0)
    gone.nodes = lambda: [{"Alive": False, "Resources": ONE_CPU}]
    with pytest.raises(ControllerError):
        left(gone, no_room)


@pytest.mark.parametrize(("autoscaling", "seconds"), [(False, 30), (True, 600)])
def test_workers_wait_for_nodes_that_are_to_come(autoscaling: bool, seconds: float) -> None:
    found = training._environment(ClusterConfig(autoscaling=autoscaling))
    assert float(found["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == seconds


def _embed(ray: Any, config: ClusterConfig, folder: Path) -> Any:
    return embed_texts(ray, config, PairsConfig(embedder=str(folder)), {"id": "text"}, NoBar())


def _reference(ray: Any, config: ClusterConfig, folder: Path) -> Any:
    return reference_scores(
        ray, config, ONE_ITEM, model=NOWHERE, dtype="float32", load_in_4bit=False, cache=folder, key={"test": 1},
        begin=nothing, advance=nothing,
    )  # fmt: skip


def _train(ray: Any, config: ClusterConfig, folder: Path) -> Any:
    return run_training(ray, config, "train", Work(nothing, ()), folder / "out", nothing)


def _sample(engine: str) -> Callable[[Any, ClusterConfig, Path], Any]:
    requests = [Request(0, SampledModel("sft", NOWHERE, NOWHERE), [1], 1.0, 0)]
    return lambda ray, config, _: list(generate(ray, config, SampleConfig(), engine, "float32", requests))


GPU = {"gpus_per_worker": 1.0}
MANY = {"cpus_per_worker": 10_000, "num_workers": 1}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("stage", "act", "asked", "named"),
    [
        ("pairs", _embed, GPU, "1 x 1 CPU [+] 1 GPU"),
        ("pairs", _embed, MANY, "1 x 10000 CPU"),
        ("reference", _reference, GPU, "1 x 1 CPU [+] 1 GPU"),
        ("reference", _reference, MANY, "1 x 10000 CPU"),
        ("train", _train, GPU, "2 x 1 CPU [+] 1 GPU"),
        ("train", _train, MANY, "1 x 10000 CPU"),
        ("sample", _sample("transformers"), GPU, "1 x 1 CPU [+] 1 GPU"),
        ("sample", _sample("transformers"), MANY, "1 x 10000 CPU"),
        ("sample", _sample("vllm"), GPU, "1 x 1 GPU [+] 1 CPU"),
        ("sample", _sample("vllm"), {"num_actors": 10_000}, "10000 x 1 CPU"),  # an engine's bundle is one CPU
    ],
)
def test_every_stage_refuses_at_once_what_the_cluster_will_never_have(
    ray_cluster: Any, tmp_path: Path, stage: str, act: Callable[..., Any], asked: dict[str, Any], named: str
) -> None:
    if asked is GPU and ray_cluster.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    config = CLUSTER.model_copy(update=asked)
    started = time.monotonic()
    with pytest.raises(
        InputError, match=rf"^{stage}: asks for {named}, but the cluster has \d+ CPU, \d+ GPU on 1 node"
    ):
        act(ray_cluster, config, tmp_path)
    assert time.monotonic() - started < 5


@pytest.mark.ray
def test_a_session_that_exists_is_used_and_left_running(ray_cluster: Any) -> None:
    with ray_session(ClusterConfig(address="ignored:1")) as ray:
        assert ray is ray_cluster
    assert ray_cluster.is_initialized()


@pytest.mark.ray
def test_what_a_killed_command_left_behind_is_no_cluster() -> None:
    """Ray notes the address of its last cluster in a file, and would try for minutes to reach one that is gone."""
    code = (
        "from jpo_ray.cluster.session import ray_session; from jpo_ray.config_cluster import ClusterConfig\n"
        "with ray_session(ClusterConfig()) as ray: print(len(ray.nodes()))"
    )
    with tempfile.TemporaryDirectory(prefix="jpo-", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=90
        )
    assert done.stdout.split() == ["1"]
