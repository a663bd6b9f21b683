"""Trainings side by side, as the trials of a Ray Tune run: as many at a time as were asked for and have room."""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from jpo_ray.cluster.resources import await_resources, worker_resources
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError

# A trial whose training starts workers of its own only waits for them.
WAITS = {"CPU": 0.001}

STOP_TIMEOUT_S = 5  # how long Tune gets to end its trials, where the run was interrupted


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
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # what they write is deleted in the end
    from ray import tune

    wanted = worker_resources(ray, config, config.num_workers * config.trainings_at_once)
    await_resources(ray, config, "train", [wanted] * config.num_workers * config.trainings_at_once)

    shutil.rmtree(notes, ignore_errors=True)  # of a run that was killed
    stop = notes / "stop"  # a file, since Tune pickles its settings

    class Told(tune.Stopper):  # type: ignore[misc]
        def __call__(self, *_: Any) -> bool:
            return False

        def stop_all(self) -> bool:
            return stop.exists()

    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, train=train), wanted if config.num_workers == 1 else WAITS),
        param_space={"name": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(max_concurrent_trials=config.trainings_at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(notes.resolve()),
            verbose=0,
            stop=Told(),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
        ),
    )
    # In a thread, since in the main one Tune handles Ctrl-C and SIGUSR1 itself, keeps both for good, and takes what was
    # interrupted for finished.
    outcome: Future[Any] = Future()
    thread = threading.Thread(target=_resolve, args=(outcome, tuner.fit), daemon=True, name="trials")
    thread.start()
    try:
        while not wait([outcome], timeout=1).done:
            show()
        show()
    finally:
        notes.mkdir(parents=True, exist_ok=True)
        stop.touch()
        thread.join(STOP_TIMEOUT_S)
        shutil.rmtree(notes, ignore_errors=True)
    for result in outcome.result():
        if result.error is not None:
            raise result.error
        if result.metrics.get("input_error"):
            raise InputError(result.metrics["input_error"])


def _resolve(outcome: Future[Any], function: Callable[[], Any]) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:
        outcome.set_exception(error)


def _trial(config: dict[str, Any], train: Callable[[str], None]) -> dict[str, Any]:
    try:
        train(config["name"])
    except InputError as error:  # another attempt would meet it again
        return {"input_error": str(error)}
    return {"input_error": ""}
