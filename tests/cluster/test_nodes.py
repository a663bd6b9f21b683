"""Trainings and pools on a cluster of several real nodes, one of which is lost; and more workers than there are cores.

Each case's driver is a process of its own: a process has one connection to Ray, and one environment.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.nodes import Nodes, ray_nodes
from jpo_ray.files import read_json, write_json

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TOLERANCE = 2e-3  # of the distance that training moved the weights, as in test_training.py


def driver(nodes: Nodes, case: Callable[..., None], *arguments: Any) -> Any:
    """Start `case(ray, *arguments)` in a process that is connected to the nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in nodes.environment.items():
            patch.setenv(name, value)
        process = multiprocessing.get_context("spawn").Process(target=connected, args=(nodes.address, case, arguments))
        process.start()
    return process


def connected(address: str, case: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from ray import cloudpickle

    from cluster import working
    from jpo_ray.cluster.session import ray_session
    from jpo_ray.config_cluster import ClusterConfig

    cloudpickle.register_pickle_by_value(working)  # nodes cannot import the tests
    with ray_session(ClusterConfig(address=address)) as ray:
        case(ray, *arguments)


def ends_well(process: Any) -> None:
    process.join(800)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


def wait_for(process: Any, what: Callable[[], bool]) -> None:
    while not what():
        assert process.is_alive()
        time.sleep(0.02)


def train_on_four(ray: Any, folder: Path, llama: Path) -> None:
    from cluster.running import CLUSTER
    from cluster.test_faults import LONG, assert_equal, trained
    from cluster.working import Strike
    from cluster.world import make_artifacts

    artifacts = make_artifacts(folder, llama)
    four = CLUSTER.model_copy(update={"num_workers": 4, "max_failures": 10})
    recipe = LONG.model_copy(update={"num_train_epochs": 10})  # 30 steps
    whole = trained(ray, four, artifacts, recipe, folder / "whole", [])
    strikes = [Strike(step, rank) for step, rank in ((4, 3), (12, 0), (13, 2), (22, 1))]
    told = trained(ray, four, artifacts, recipe, folder / "struck", strikes)
    write_json(folder / "told.json", [told.repeated, told.recovery_s])
    assert_equal(told.weights, whole.weights)


def test_four_workers_are_one_killed_or_not(llama: Path, tmp_path: Path) -> None:
    """Four times one of four is killed: no bit changes; and one process gives the same within rounding."""
    from cluster.test_faults import LOG, LONG
    from cluster.world import make_artifacts
    from jpo_ray.engine.jobs import train_preferences

    (tmp_path / "four").mkdir()
    with ray_nodes() as nodes:
        nodes.start_head(4)
        ends_well(driver(nodes, train_on_four, tmp_path / "four", llama))
    repeated, seconds = read_json(tmp_path / "four" / "told.json")
    LOG.info("SIGKILL of one of four training workers: repeated steps %s, seconds to the next %s", repeated, seconds)
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


def train_on_nodes(ray: Any, folder: Path, llama: Path) -> None:
    from cluster.running import CLUSTER
    from cluster.test_faults import trained
    from cluster.world import LORA, make_artifacts

    trained(ray, CLUSTER, make_artifacts(folder, llama), LORA, folder / "struck", [])


@pytest.mark.parametrize("spare", [True, False])
def test_a_lost_node_is_replaced_or_done_without(spare: bool, llama: Path, tmp_path: Path) -> None:
    """Two nodes of one CPU train; one is lost. With a third both workers go on, without it one does the whole."""
    from cluster.test_faults import LOG
    from cluster.world import LORA, make_artifacts
    from jpo_ray.engine.jobs import train_preferences

    notes = tmp_path / "struck"
    steps = notes / "steps0"
    with ray_nodes(own_network=True) as nodes:
        nodes.start_head(0)
        for _ in range(3 if spare else 2):
            nodes.add(1)
        process = driver(nodes, train_on_nodes, tmp_path, llama)
        wait_for(process, lambda: steps.exists() and steps.read_text().count("\n") >= 7)
        next(node for node in nodes.nodes[1:] if node.runs("RayTrainWorker")).kill()
        ends_well(process)
        seen = "a network each" if nodes.network else "one network"
    lines = (notes / "rank0").read_text().splitlines()
    pause = max(np.diff([float(line.split()[0]) for line in steps.read_text().splitlines()]))
    LOG.info("node lost, %s spare, %s: %.1f s between two steps, %s", "a" if spare else "no", seen, pause, lines)
    artifacts = make_artifacts(tmp_path, llama)
    train_preferences(tmp_path / "one", "cpu", None, artifacts.inputs, artifacts.model, LORA, None)
    assert_close(load_file(notes / "out" / "adapter_model.safetensors"), tmp_path / "one")
    assert lines[-1].startswith(f"{2 if spare else 1} workers from checkpoint-")


def score_on_nodes(ray: Any, folder: Path, llama: Path) -> None:
    from engine.tiny import make_world

    from cluster import working
    from cluster.running import CLUSTER, nothing
    from jpo_ray.cluster import reference

    reference.PASS_TOKENS = 30
    reference.ReferenceScorer = working.slow(reference.ReferenceScorer, 0.5)  # type: ignore[misc]
    advanced: list[int] = []

    def advance(count: int) -> None:
        advanced.append(count)
        write_json(folder / "advanced.json", [advanced, time.time()])

    values, scored = reference.reference_scores(
        ray, CLUSTER.model_copy(update={"num_actors": 2}), make_world(llama).tokens, model=llama, dtype="float32",
        load_in_4bit=False, cache=folder / "cache", key={"test": 1}, begin=nothing, advance=advance,
    )  # fmt: skip
    assert scored == sum(advanced) == 24
    np.save(folder / "values.npy", values)


def test_a_pool_goes_on_with_the_nodes_that_are_left(llama: Path, tmp_path: Path) -> None:
    """Two actors on two nodes, one of which is lost: each sequence comes once, with its value."""
    from engine.tiny import make_world, plain_scorer

    from cluster.test_faults import LOG
    from jpo_ray.engine.step import score_all

    def scored() -> int:
        return len(read_json(tmp_path / "advanced.json")[0]) if (tmp_path / "advanced.json").exists() else 0

    with ray_nodes(own_network=True) as nodes:
        nodes.start_head(0)
        _, second = nodes.add(1), nodes.add(1)
        process = driver(nodes, score_on_nodes, tmp_path, llama)
        wait_for(process, lambda: scored() >= 3)
        assert second.runs("MapWorker")
        second.kill()
        killed = time.time()
        ends_well(process)
    last = read_json(tmp_path / "advanced.json")[1]
    LOG.info("node of one of two reference actors lost: the rest came %.1f s after", last - killed)
    tokens = make_world(llama).tokens
    plain = score_all(plain_scorer(llama), tokens, np.arange(24), max_tokens=400).numpy()
    assert np.abs(np.load(tmp_path / "values.npy") - plain).max() < 1e-5
