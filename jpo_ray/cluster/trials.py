"""Trainings side by side, as the trials of a Ray Tune run: as many at a time as were asked for and have room."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jpo_ray.cluster.resources import await_resources, worker_resources
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError

# A trial whose training starts workers of its own only waits for them.
WAITS = {"CPU": 0.001}


def run_trials(
    ray: Any,
    config: ClusterConfig,
    train: Callable[[str], None],
    names: Sequence[str],
    notes: Path,
    show: Callable[[], None],
) -> None:
    """Call `train(name)` for each name in a process of its own, `config.trainings_at_once` at a time.

    A trial that dies is started again `config.max_failures` times; what it finds in the run directory it goes on with.
    `notes` is a folder for Tune's own notes, deleted in the end; `show` is called every second. Raises what a trial
    raised, once all have ended.
    """
    from ray import tune

    wanted = worker_resources(ray, config, config.num_workers * config.trainings_at_once)
    await_resources(ray, config, "train", [wanted] * config.num_workers * config.trainings_at_once)

    shutil.rmtree(notes, ignore_errors=True)  # of a run that was killed
    stop = threading.Event()
    shower = threading.Thread(target=_every_second, args=(show, stop), daemon=True)
    shower.start()
    try:
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, train=train), wanted if config.num_workers == 1 else WAITS
            ),
            param_space={"name": tune.grid_search(list(names))},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.trainings_at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(notes.resolve()),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
            ),
        ).fit()
    finally:
        stop.set()
        shower.join()
        shutil.rmtree(notes, ignore_errors=True)
    for result in results:
        if result.error is not None:
            raise result.error
        if result.metrics.get("input_error"):
            raise InputError(result.metrics["input_error"])


def _every_second(show: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(1):
        show()


def _trial(config: dict[str, Any], train: Callable[[str], None]) -> dict[str, Any]:
    try:
        train(config["name"])
    except InputError as error:  # another attempt would meet it again
        return {"input_error": str(error)}
    return {"input_error": ""}
