"""Training on Ray Train: the engine's loop on n workers.

The engine writes checkpoints of its own into the artifact being built, atomically and with hashes, and resumes from
the newest valid one; so does a worker group that Ray Train restarts. The folder must be visible to all workers, or have
its place on an object store: workers then fetch what they read to where they run, and rank 0 leaves there what it made.
"""

import faulthandler
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpo_ray.cluster.resources import await_most, await_resources, count_fitting, on_this_node, worker_resources
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.engine.checkpoints import fetch_checkpoints
from jpo_ray.engine.loop import SKIPPED_BATCH
from jpo_ray.errors import InputError
from jpo_ray.files import hash_file
from jpo_ray.store import StoreError
from jpo_ray.stored import origins, place_of, pull, push

POLL_S = 0.3
START_TIMEOUT_S = 30.0  # of a worker group that finds no room, where no nodes are to come


@dataclass(frozen=True)
class Work:
    """What each worker runs: `function(out, device, progress, *arguments)`, a function of the engine."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[Path, ...] = ()  # folders that it reads besides those in the arguments


class ProgressBoard:
    """Actor that holds the latest progress of a training run, for the driver to show."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, dict[str, float]] = (0, 0, {})
        self.result: Any = None
        self.input_error: str | None = None
        self._heard = time.monotonic()

    def update(self, done: int, total: int, metrics: dict[str, float]) -> None:
        self.latest = (done, total, metrics)
        self._heard = time.monotonic()

    def silent_s(self) -> float:
        return time.monotonic() - self._heard

    def read(self) -> tuple[int, int, dict[str, float]]:
        return self.latest

    def finish(self, result: Any, input_error: str | None) -> None:
        self.result, self.input_error = result, input_error

    def outcome(self) -> tuple[Any, str | None]:
        return self.result, self.input_error


def run_here(ray: Any, config: ClusterConfig, work: Work, out: Path) -> Any:
    """Run `work` in this process, which has one worker's resources; returns its result."""
    import torch

    wanted = worker_resources(ray, config, config.trainings_at_once)
    torch.set_num_threads(int(wanted["CPU"]))
    fetch_checkpoints(out)
    with _watched(config.progress_timeout_s) as alive:
        return work.function(out, "cuda" if wanted.get("GPU") else "cpu", lambda *_: alive(), *work.arguments)


@contextmanager
def _watched(timeout_s: float) -> Iterator[Callable[[], None]]:
    """End this process, its stacks in the log, where what it is given is not called for `timeout_s`.

    Ray sees a process that stops, not a thread that waits for a disk, a GPU or a lock.
    """

    def alive() -> None:
        faulthandler.dump_traceback_later(timeout_s, exit=True)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_training(
    ray: Any,
    config: ClusterConfig,
    stage: str,
    work: Work,
    out: Path,
    show: Callable[[int, int, dict[str, float]], None],
) -> Any:
    """Run `work` on the configured number of workers; returns rank 0's result. Raises the workers' own error."""
    wanted = worker_resources(ray, config, config.num_workers * config.trainings_at_once)
    await_resources(ray, config, stage, [wanted] * config.num_workers)
    board = ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=on_this_node(ray)).remote()
    storage = (out.parent / f"ray-{out.name}").resolve()  # Ray Train's own notes; our checkpoints are in `out`
    stop = threading.Event()
    shower = threading.Thread(target=_show, args=(ray, board, show, stop), daemon=True)
    shower.start()
    workers = config.num_workers
    try:
        for attempt in itertools.count():
            shutil.rmtree(storage, ignore_errors=True)  # of an attempt that was killed
            failed = _fit(ray, config, stage, work, out, storage, board, wanted, workers)
            result, input_error = ray.get(board.outcome.remote())
            if input_error:
                with suppress(InputError, StoreError):  # the items of skipped steps, which the message speaks of
                    pull(out)
                raise InputError(input_error)
            if failed is None:
                break
            if ray.get(board.silent_s.remote()) >= config.progress_timeout_s:
                raise TimeoutError(
                    f"{stage}: no step for {config.progress_timeout_s:g} s (cluster.progress_timeout_s); the log of "
                    "the worker shows where it waited"
                ) from failed
            may_wait = attempt <= config.max_failures
            workers = _workers_left(ray, config, stage, failed, wanted, workers, may_wait)
    finally:
        stop.set()
        shower.join()
        shutil.rmtree(storage, ignore_errors=True)
    fetch_checkpoints(out)
    (out / SKIPPED_BATCH).unlink(missing_ok=True)  # of an attempt before, where rank 0 is elsewhere now
    pull(out)
    return result


def _workers_left(
    ray: Any,
    config: ClusterConfig,
    stage: str,
    failed: Exception,
    wanted: dict[str, float],
    workers: int,
    may_wait: bool,
) -> int:
    """How many workers go on from the newest checkpoint: fewer where a node is lost. Raises `failed` if none do."""
    from ray.train import ControllerError

    if may_wait and isinstance(failed, ControllerError):  # no room: others hold it, or a node is not yet known as dead
        left = await_most(ray, config, stage, wanted, workers)
    elif (left := count_fitting(ray, wanted, workers)) == workers:
        raise failed
    if left == 0:
        raise failed
    return left


def _environment(config: ClusterConfig) -> dict[str, str]:
    """What Ray Train reads from the environment: how long it waits for a worker that hangs, and for room."""
    start_s = config.wait_s if config.autoscaling else START_TIMEOUT_S
    return {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_s),
    }


def _fit(
    ray: Any,
    config: ClusterConfig,
    stage: str,
    work: Work,
    out: Path,
    storage: Path,
    board: Any,
    wanted: dict[str, float],
    workers: int,
) -> Exception | None:
    """Train on so many workers, started again where they fail; returns why it did not end well."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = bool(wanted.get("GPU"))
    os.environ.update(_environment(config))
    settings = {"work": work, "out": out, "board": board, "threads": int(wanted["CPU"]), "gpu": gpu}
    settings |= {"progress_timeout_s": config.progress_timeout_s}
    settings |= {"needs": origins(work.arguments, work.needs), "driver": ray.get_runtime_context().get_node_id()}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings | {"fewer": workers < config.num_workers},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=wanted),
        run_config=RunConfig(
            name=f"{stage}-{out.name}",
            storage_path=str(storage),
            # Workers that find no room fail at once: whether fewer do is for `run_training` to see.
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=0),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(config.collective_timeout_s)),
    )
    # In place of Ray Train's own handler of Ctrl-C, which waits for workers that are just starting and stays for later
    # stages. Workers end with their controller.
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append
    try:
        trainer.fit()
    except KeyboardInterrupt:
        for controller in controllers:
            ray.kill(controller)
        raise
    except Exception as error:
        return error
    return None


def _show(ray: Any, board: Any, show: Callable[..., None], stop: threading.Event) -> None:
    while not stop.wait(POLL_S):
        show(*ray.get(board.read.remote()))
    show(*ray.get(board.read.remote()))


def _worker(settings: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch

    torch.set_num_threads(settings["threads"])
    board, work, out = settings["board"], settings["work"], settings["out"]
    if ray.get(board.outcome.remote())[1]:  # another attempt would meet the same bad input
        return
    context = ray.train.get_context()
    rank = context.get_world_rank()
    fewer = {"workers": float(context.get_world_size())} if settings["fewer"] else {}
    sent = 0.0

    def progress(done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal sent
        alive()
        if rank == 0 and (time.monotonic() - sent > POLL_S or done == total):
            sent = time.monotonic()
            board.update.remote(done, total, metrics | fewer)

    device = "cuda" if settings["gpu"] else "cpu"
    try:
        with _watched(settings["progress_timeout_s"]) as alive:
            for origin in settings["needs"]:
                origin.fetch()
            fetch_checkpoints(out)
            result = work.function(out, device, progress, *work.arguments)
            if rank == 0:
                _hand_over(out, ray.get_runtime_context().get_node_id() == settings["driver"])
    except InputError as error:
        ray.get(board.finish.remote(None, str(error)))
        raise  # or the other workers would wait for this one; the next attempt ends as it starts
    if rank == 0:
        ray.get(board.finish.remote(result, None))


def _hand_over(out: Path, on_drivers_node: bool) -> None:
    """Leave what was trained on the object store, if that is where the run directory is; checkpoints are there."""
    if place_of(out) is None:
        return
    push(out, {path.name: hash_file(path) for path in out.iterdir() if path.is_file()})
    if not on_drivers_node:
        shutil.rmtree(out)
