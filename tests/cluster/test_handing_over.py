"""Stages hand resources to each other: what only one can hold goes from stage to stage, and nobody waits for ever."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.tiny import World
from ray import cloudpickle

from cluster import working
from cluster.running import BATON, CLUSTER, NoBar, nothing
from jpo_ray.cluster import tiles
from jpo_ray.cluster.pairing import near_duplicates
from jpo_ray.cluster.reference import reference_scores
from jpo_ray.cluster.resources import await_resources
from jpo_ray.cluster.sampling import generate
from jpo_ray.cluster.session import map_on_actors
from jpo_ray.cluster.training import Work, run_training
from jpo_ray.cluster.trials import run_trials
from jpo_ray.config import JointPairs, SampleConfig
from jpo_ray.errors import InputError
from jpo_ray.evaluation.generation import Request, SampledModel
from jpo_ray.pairs import plans

pytestmark = pytest.mark.ray

# The cluster has one baton: who holds it is the only one to work. Ray counts it as it counts GPUs.
ALONE = CLUSTER.model_copy(update={"custom_resources": {BATON: 1.0}, "num_workers": 1, "wait_s": 60.0})
NOWHERE = Path("/nowhere")
NEAR = JointPairs(strategy="similar", min_similarity=0.99)
TINY_SAMPLES = SampleConfig(engine="transformers", temperatures=[0.0], max_new_tokens=4)


@pytest.fixture(scope="module", autouse=True)
def _by_value() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(working)
    yield
    cloudpickle.unregister_pickle_by_value(working)


def _score(ray: Any, world: World, cache: Path) -> None:
    values, scored = reference_scores(
        ray, ALONE, world.tokens, model=world.model, dtype="float32", load_in_4bit=False, cache=cache,
        key={"of": cache.name}, begin=nothing, advance=nothing,
    )  # fmt: skip
    assert scored == len(values) == 24


def _sample(ray: Any, world: World) -> None:
    requests = [Request(n, SampledModel("sft", world.model, world.model), [1, 5], 0.0, 0) for n in range(3)]
    assert len(list(generate(ray, ALONE, TINY_SAMPLES, "transformers", "float32", requests))) == 3


def test_each_stage_has_let_go_when_the_next_one_asks(ray_cluster: Any, world: World, tmp_path: Path) -> None:
    """Scoring, training, sampling and trainings in turn, on a baton that there is one of."""
    _score(ray_cluster, world, tmp_path / "cache")
    trained = run_training(ray_cluster, ALONE, "train", Work(working.batons_left, ()), tmp_path / "trained", nothing)
    assert trained == 0.0  # it was held while it trained
    _sample(ray_cluster, world)
    run_trials(ray_cluster, ALONE, len, ["one", "two"], tmp_path / "notes", lambda: None)
    await_resources(ray_cluster, ALONE, "last", [{BATON: 1.0}])


@pytest.fixture
def held(ray_cluster: Any) -> Iterator[Any]:
    """An actor of another job, as it were, that holds the baton."""
    holder = ray_cluster.remote(working.Holder).options(num_cpus=0, resources={BATON: 1}).remote()
    ray_cluster.get(holder.ready.remote())
    yield holder
    ray_cluster.kill(holder)


def test_a_stage_waits_for_what_another_holds_but_not_for_ever(ray_cluster: Any, held: Any) -> None:  # noqa: ARG001
    hasty = ALONE.model_copy(update={"wait_s": 0.4})
    started = time.monotonic()
    message = (
        r"^reference: waited 0\.4 s \(cluster\.wait_s\) for 1 x 1 CPU [+] 1 baton; the cluster has \d+ CPU, \d+ GPU, "
        r"1 baton, of which [\d.]+ CPU, \d+ GPU, 0 baton are free$"
    )
    with pytest.raises(TimeoutError, match=message):
        await_resources(ray_cluster, hasty, "reference", [{"CPU": 1.0, BATON: 1.0}])
    assert 0.9 < time.monotonic() - started < 30


def test_it_goes_on_as_soon_as_that_is_free(ray_cluster: Any, held: Any) -> None:
    release = threading.Timer(1.0, ray_cluster.kill, [held])
    release.start()
    started = time.monotonic()
    await_resources(ray_cluster, ALONE, "reference", [{BATON: 1.0}])
    assert 0.9 < time.monotonic() - started < 40
    release.join()


@pytest.mark.parametrize("pool", [2, 16])  # tasks from which they run in actors
def test_tiles_take_what_the_stage_asks_for(
    ray_cluster: Any, held: Any, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is how they keep to the nodes that have it."""
    monkeypatch.setattr(tiles, "POOL_TASKS", pool)
    monkeypatch.setattr(plans, "BLOCK_ROWS", 6)
    every, vectors = np.arange(12), np.eye(12, dtype=np.float16)
    vectors[7] = vectors[2]
    shared = tiles.share(ray_cluster, vectors, ALONE)
    release = threading.Timer(4.0, ray_cluster.kill, [held])
    release.start()
    started = time.monotonic()
    found = near_duplicates(ray_cluster, shared, every, every, NEAR, 8, 0, NoBar(), timeout_s=60.0)
    assert time.monotonic() - started > 4
    assert {tuple(pair) for pair in zip(*(side.tolist() for side in found[:2]), strict=True)} == {(2, 7), (7, 2)}
    release.join()


def test_a_pool_of_few_rows_asks_for_no_more_actors_than_it_starts(ray_cluster: Any) -> None:
    """Two actors would need two batons."""

    class Twice:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"twice": 2 * batch["number"]}

    two = ALONE.model_copy(update={"num_actors": 2})
    assert list(map_on_actors(ray_cluster, two, "judge", [{"number": 4}], Twice)) == [{"twice": 8}]
    with pytest.raises(InputError, match=r"^judge: asks for 2 x 1 CPU [+] 1 baton, but the cluster has"):
        next(map_on_actors(ray_cluster, two, "judge", [{"number": 4}, {"number": 5}], Twice))
    requests = [Request(0, SampledModel("sft", NOWHERE, NOWHERE), [1, 5], 0.0, n) for n in range(65)]
    with pytest.raises(InputError, match=r"^sample: asks for 2 x 1 CPU [+] 1 baton, but the cluster has"):
        list(generate(ray_cluster, two, TINY_SAMPLES, "transformers", "float32", requests))


def test_on_an_autoscaling_cluster_nodes_are_waited_for(ray_cluster: Any) -> None:
    """Nothing says what such a cluster may become, so what no node has yet is not refused at once."""
    wanted = [{"CPU": 1.0, BATON: 2.0}]
    with pytest.raises(InputError, match=r"asks for 1 x 1 CPU [+] 2 baton, but the cluster has \d+ CPU, \d+ GPU, 1 b"):
        await_resources(ray_cluster, ALONE, "train", wanted)
    growing = ALONE.model_copy(update={"autoscaling": True, "wait_s": 0.4})
    with pytest.raises(TimeoutError, match=r"^train: waited 0\.4 s"):
        await_resources(ray_cluster, growing, "train", wanted)


def test_what_was_waited_for_is_left_to_the_stage(ray_cluster: Any) -> None:
    """The placement group that waited is gone: the same can be asked for again and again."""
    for _ in range(3):
        await_resources(ray_cluster, ALONE, "train", [{BATON: 1.0}])
