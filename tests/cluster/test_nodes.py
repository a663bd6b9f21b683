"""A cluster of several nodes on this machine, one of which is lost; and more workers than this machine has cores.

Each case runs in a process of its own, since a process has one cluster.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jpo_ray.files import read_json, write_json

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TOLERANCE = 2e-3  # of the distance that training moved the weights, as in test_training.py


def in_a_process(case: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=case, args=arguments)
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


def nodes_of(*cpus: int) -> Any:
    """A cluster of such nodes that this process is connected to."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    from jpo_ray.cluster.session import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    import ray
    from ray.cluster_utils import Cluster

    from cluster import working

    ray.cloudpickle.register_pickle_by_value(working)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0]}, shutdown_at_exit=True)
    others = [cluster.add_node(num_cpus=count) for count in cpus[1:]]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    return ray, cluster, others


def lose(cluster: Any, node: Any, when: Callable[[], bool]) -> threading.Thread:
    """Kill all processes of `node` at once, as soon as `when()`."""

    def watch() -> None:
        while not when():
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def train_on_four(folder: Path, llama: Path) -> None:
    from cluster.running import CLUSTER
    from cluster.test_faults import LONG, assert_equal, say, trained
    from cluster.working import Strike
    from cluster.world import make_artifacts

    ray, cluster, _ = nodes_of(4)
    artifacts = make_artifacts(folder, llama)
    four = CLUSTER.model_copy(update={"num_workers": 4, "max_failures": 10})
    recipe = LONG.model_copy(update={"num_train_epochs": 10})  # 30 steps
    whole = trained(ray, four, artifacts, recipe, folder / "whole", [])
    strikes = [Strike(step, rank) for step, rank in ((4, 3), (12, 0), (13, 2), (22, 1))]
    told = trained(ray, four, artifacts, recipe, folder / "struck", strikes)
    say("SIGKILL of one of four training workers", told)
    assert_equal(told.weights, whole.weights)
    ray.shutdown()
    cluster.shutdown()


def test_four_workers_are_one_killed_or_not(llama: Path, tmp_path: Path) -> None:
    """Four times one of four is killed: no bit changes; and one process gives the same within rounding."""
    from cluster.test_faults import LONG
    from cluster.world import make_artifacts
    from jpo_ray.engine.jobs import train_preferences

    (tmp_path / "four").mkdir()
    in_a_process(train_on_four, tmp_path / "four", llama)
    artifacts = make_artifacts(tmp_path, llama)
    recipe = LONG.model_copy(update={"num_train_epochs": 10})
    train_preferences(tmp_path / "one", "cpu", None, artifacts.inputs, artifacts.model, recipe, None)
    assert_close(load_file(tmp_path / "four" / "struck" / "out" / "adapter_model.safetensors"), tmp_path / "one")


def assert_close(found: dict[str, torch.Tensor], expected: Path) -> None:
    one = load_file(expected / "adapter_model.safetensors")
    moved = sum(float((one[key] - one[key] * ("lora_A" in key)).pow(2).sum()) for key in one) ** 0.5
    apart = sum(float((one[key] - found[key]).pow(2).sum()) for key in one) ** 0.5
    assert moved > 0.02
    assert apart < TOLERANCE * moved


def train_on_nodes(folder: Path, llama: Path, spare: bool) -> None:
    from cluster.running import CLUSTER
    from cluster.test_faults import trained
    from cluster.world import LORA, make_artifacts

    ray, cluster, (second, *_) = nodes_of(1, 1, *([1] if spare else []))
    artifacts = make_artifacts(folder, llama)
    steps = folder / "struck" / "steps0"
    lose(cluster, second, lambda: steps.exists() and steps.read_text().count("\n") >= 7)
    began = time.monotonic()
    trained(ray, CLUSTER, artifacts, LORA, folder / "struck", [])
    lines = (folder / "struck" / "rank0").read_text().splitlines()
    times = [float(line.split()[0]) for line in steps.read_text().splitlines()]
    facts = {"attempts": lines, "pause_s": max(np.diff(times)), "seconds": time.monotonic() - began}
    write_json(folder / "facts.json", facts)
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.parametrize("spare", [True, False])
def test_a_lost_node_is_replaced_or_done_without(spare: bool, llama: Path, tmp_path: Path) -> None:
    """Two nodes of one CPU train; one is lost. With a third both workers go on, without it one does the whole."""
    from cluster.test_faults import LOG
    from cluster.world import LORA, make_artifacts
    from jpo_ray.engine.jobs import train_preferences

    in_a_process(train_on_nodes, tmp_path, llama, spare)
    facts = read_json(tmp_path / "facts.json")
    LOG.info("node lost, %s spare: %s", "a" if spare else "no", facts)
    artifacts = make_artifacts(tmp_path, llama)
    train_preferences(tmp_path / "one", "cpu", None, artifacts.inputs, artifacts.model, LORA, None)
    assert_close(load_file(tmp_path / "struck" / "out" / "adapter_model.safetensors"), tmp_path / "one")
    assert facts["attempts"][-1].startswith(f"{2 if spare else 1} workers from checkpoint-")


def score_on_nodes(folder: Path, llama: Path) -> None:
    from engine.tiny import make_world, plain_scorer

    from cluster import working
    from cluster.running import CLUSTER, nothing
    from jpo_ray.cluster import reference
    from jpo_ray.engine.step import score_all

    ray, cluster, (second,) = nodes_of(1, 1)
    reference.PASS_TOKENS = 30
    reference.ReferenceScorer = working.slow(reference.ReferenceScorer, 0.5)  # type: ignore[misc]
    world, advanced = make_world(llama), list[int]()
    lose(cluster, second, lambda: len(advanced) >= 3)
    values, scored = reference.reference_scores(
        ray, CLUSTER.model_copy(update={"num_actors": 2}), world.tokens, model=llama, dtype="float32",
        load_in_4bit=False, cache=folder / "cache", key={"test": 1}, begin=nothing, advance=advanced.append,
    )  # fmt: skip
    assert scored == sum(advanced) == 24
    assert sum(node["Alive"] for node in ray.nodes()) == 1
    plain = score_all(plain_scorer(llama), world.tokens, np.arange(24), max_tokens=400).numpy()
    assert np.abs(values - plain).max() < 1e-5
    ray.shutdown()
    cluster.shutdown()


def test_a_pool_goes_on_with_the_nodes_that_are_left(llama: Path, tmp_path: Path) -> None:
    in_a_process(score_on_nodes, tmp_path, llama)
