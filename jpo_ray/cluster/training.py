"""Training on Ray Train: the engine's loop on n workers.

The engine writes checkpoints of its own into the artifact being built, atomically and with hashes, and resumes from
the newest valid one; so does a worker group that Ray Train restarts. The folder must be visible to all workers, or have
its place on an object store: workers then fetch what they read to where they run, and rank 0 leaves there what it made.
"""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpo_ray.cluster.resources import await_resources, on_this_node, worker_resources
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.engine.checkpoints import fetch_checkpoints
from jpo_ray.errors import InputError
from jpo_ray.files import hash_file
from jpo_ray.stored import origins, place_of, pull, push

POLL_S = 0.3


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

    def update(self, done: int, total: int, metrics: dict[str, float]) -> None:
        self.latest = (done, total, metrics)

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
    return work.function(out, "cuda" if wanted.get("GPU") else "cpu", lambda *_: None, *work.arguments)


def run_training(
    ray: Any,
    config: ClusterConfig,
    stage: str,
    work: Work,
    out: Path,
    show: Callable[[int, int, dict[str, float]], None],
) -> Any:
    """Run `work` on the configured number of workers; returns rank 0's result. Raises the workers' own error."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    wanted = worker_resources(ray, config, config.num_workers * config.trainings_at_once)
    await_resources(ray, config, stage, [wanted] * config.num_workers)
    board = ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=on_this_node(ray)).remote()
    gpu = bool(wanted.get("GPU"))
    storage = (out.parent / f"ray-{out.name}").resolve()  # Ray Train's own notes; our checkpoints are in `out`
    shutil.rmtree(storage, ignore_errors=True)  # of a run that was killed
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "work": work,
            "needs": origins(work.arguments, work.needs),
            "out": out,
            "driver": ray.get_runtime_context().get_node_id(),
            "board": board,
            "threads": int(wanted["CPU"]),
            "gpu": gpu,
        },
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=gpu, resources_per_worker=wanted),
        run_config=RunConfig(
            name=f"{stage}-{out.name}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(config.collective_timeout_s)),
    )
    stop = threading.Event()
    shower = threading.Thread(target=_show, args=(ray, board, show, stop), daemon=True)
    shower.start()
    try:
        with _own_interrupt():
            trainer.fit()
    except SystemExit as exit:  # Ray Train's own handling of Ctrl-C
        raise KeyboardInterrupt from exit
    finally:
        stop.set()
        shower.join()
        shutil.rmtree(storage, ignore_errors=True)
    result, input_error = ray.get(board.outcome.remote())
    if input_error:
        raise InputError(input_error)
    fetch_checkpoints(out)
    pull(out)
    return result


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ray Train installs a handler for Ctrl-C and leaves it: a later stage could then not be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None:  # None: a handler that C code installed, which Python cannot put back
            signal.signal(signal.SIGINT, before)


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
    rank = ray.train.get_context().get_world_rank()
    sent = 0.0

    def progress(done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal sent
        if rank == 0 and (time.monotonic() - sent > POLL_S or done == total):
            sent = time.monotonic()
            board.update.remote(done, total, metrics)

    device = "cuda" if settings["gpu"] else "cpu"
    result, input_error = None, None
    try:
        for origin in settings["needs"]:
            origin.fetch()
        fetch_checkpoints(out)
        result = work.function(out, device, progress, *work.arguments)
        if rank == 0:
            _hand_over(out, ray.get_runtime_context().get_node_id() == settings["driver"])
    except InputError as error:  # a retry would meet it again
        input_error = str(error)
    if rank == 0 or input_error:
        ray.get(board.finish.remote(result, input_error))


def _hand_over(out: Path, on_drivers_node: bool) -> None:
    """Leave what was trained on the object store, if that is where the run directory is; checkpoints are there."""
    if place_of(out) is None:
        return
    push(out, {path.name: hash_file(path) for path in out.iterdir() if path.is_file()})
    if not on_drivers_node:
        shutil.rmtree(out)
