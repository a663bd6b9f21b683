"""Trainings side by side, as the trials of a Ray Tune run: as many at a time as were asked for and have room."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from jpo_ray.cluster.resources import await_resources, on_this_node, worker_resources
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError

# A trial whose training starts workers of its own only waits for them.
WAITS = {"CPU": 0.001}

STOP_TIMEOUT_S = 5  # how long Tune gets to end its trials, where the run was interrupted
BEATS = 10  # of a trial's process within the time after which it counts as hung


class Pulse:
    """Actor that holds when each trial's process was last heard of, since Tune waits for one that hangs for ever, and
    what is wrong with the input.
    """

    def __init__(self) -> None:
        self.last: dict[str, tuple[float, Any]] = {}
        self.input_errors: list[str] = []

    def beat(self, name: str, trial: Any) -> None:
        self.last[name] = (time.monotonic(), trial)

    def end(self, name: str, input_error: str | None) -> None:
        self.last.pop(name, None)
        if input_error:
            self.input_errors.append(input_error)

    def found(self) -> list[str]:
        return self.input_errors

    def take_silent(self, seconds: float) -> list[Any]:
        """The actors of the trials not heard of for so long, each once."""
        silent = [name for name, (heard, _) in self.last.items() if time.monotonic() - heard > seconds]
        return [self.last.pop(name)[1] for name in silent]


def run_trials(
    ray: Any,
    config: ClusterConfig,
    train: Callable[[str], None],
    names: Sequence[str],
    notes: Path,
    show: Callable[[], None],
) -> None:
    """Call `train(name)` for each name in a process of its own, `config.trainings_at_once` at a time.

    A trial that dies, or whose process is not heard of for `config.collective_timeout_s`, is started again
    `config.max_failures` times; what it finds in the run directory it goes on with. `notes` is a folder for Tune's own
    notes, deleted in the end; `show` is called every second. Raises what a trial raised, once all have ended.
    """
    from ray import tune

    wanted = worker_resources(ray, config, config.num_workers * config.trainings_at_once)
    await_resources(ray, config, "train", [wanted] * config.num_workers * config.trainings_at_once)

    shutil.rmtree(notes, ignore_errors=True)  # of a run that was killed
    pulse = ray.remote(Pulse).options(num_cpus=0, scheduling_strategy=on_this_node(ray)).remote()
    stop = notes / "stop"  # a file, since Tune pickles its settings

    class Told(tune.Stopper):  # type: ignore[misc]
        def __call__(self, *_: Any) -> bool:
            return False

        def stop_all(self) -> bool:
            return stop.exists()

    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, train=train, pulse=pulse, timeout_s=config.collective_timeout_s),
            wanted if config.num_workers == 1 else WAITS,
        ),
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
            for trial in ray.get(pulse.take_silent.remote(config.collective_timeout_s)):
                ray.kill(trial)
        show()
    finally:
        notes.mkdir(parents=True, exist_ok=True)
        stop.touch()
        thread.join(STOP_TIMEOUT_S)
        shutil.rmtree(notes, ignore_errors=True)
    for result in outcome.result():
        if result.error is not None:
            raise result.error
    if input_errors := ray.get(pulse.found.remote()):
        raise InputError(input_errors[0])


def _resolve(outcome: Future[Any], function: Callable[[], Any]) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:
        outcome.set_exception(error)


def _trial(config: dict[str, Any], train: Callable[[str], None], pulse: Any, timeout_s: float) -> None:
    import ray

    name, this, ended = config["name"], ray.get_runtime_context().current_actor, threading.Event()

    def beat() -> None:
        while not ended.wait(timeout_s / BEATS):
            pulse.beat.remote(name, this)

    ray.get(pulse.beat.remote(name, this))
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    input_error = None
    try:
        train(name)
    except InputError as error:  # another attempt would meet it again
        input_error = str(error)
    finally:
        ended.set()
        thread.join()
        ray.get(pulse.end.remote(name, input_error))
