"""Connecting to Ray, and running rows through a pool of actors."""

import logging
import os
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jpo_ray.cluster.resources import as_options, await_resources, worker_resources
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError
from jpo_ray.stopping import interrupt_later, no_second_interrupt, sigterm_stops
from jpo_ray.stored import origins

Row = TypeVar("Row")
READ_AHEAD = 64  # results that wait for whoever asked for them
LARGE_AHEAD = 2  # of those that may take hundreds of megabytes each
PUMPS = "-results"  # how the names of threads end that read results
PUMPS_END_S = 5.0  # longest wait for one of them, once its pool has ended

# Set before Ray starts, unless the user did.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray Train polls its workers this often
    # How long Ray Train waits until workers have left their process group, before it kills them: one that hangs never
    # does. Ray Train itself waits for 30 s, and gives the variable on to nobody: it reaches local Ray only.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune prints its own summary otherwise
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what they write of side-by-side trainings is deleted in the end
    "RAY_DEDUP_LOGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Cluster:
    """Ray for one command: started when something first asks for it; what runs on it ends with `stack`."""

    ray: Callable[[], Any]
    config: ClusterConfig
    stack: ExitStack
    stage: str  # that it is asked for


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[Any]:
    """A connection to Ray: the one that exists, the cluster at `address` or RAY_ADDRESS, else a local one.

    What this call started it also stops. Raises `InputError` where no cluster answers, or it asks for another token.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    # `local` and not None: Ray would look for the cluster that a file of its own names, which a killed command leaves
    # behind, and try for minutes to reach it.
    options: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        with _quiet_stderr(), nullcontext() if address else interrupt_later():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise InputError(_why_not_connected(address, error)) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray's libraries log each step of theirs, and turn their loggers on again whenever they start; errors still come
    # as exceptions. JPO_DEBUG leaves all of it on.
    logging.disable(logging.NOTSET if os.environ.get("JPO_DEBUG") else logging.WARNING)
    try:
        with sigterm_stops():
            yield ray
    except KeyboardInterrupt:
        # A thread of Ray Data that still runs would start Ray anew.
        ray._private.auto_init_hook.enable_auto_connect = False
        raise
    finally:
        with no_second_interrupt():
            _end_pools()
            ray.shutdown()
        logging.disable(logging.NOTSET)


def _why_not_connected(address: str | None, error: Exception) -> str:
    # A token that the cluster refuses comes as a ConnectionError, with the reason as text somewhere behind it.
    if "AuthenticationError" in "".join(traceback.format_exception(error)):
        cluster = f"the Ray cluster at {address}" if address else "Ray"
        return (
            f"cluster.address: {cluster} asks for a token, and the one here is missing or wrong; export "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, the file that the cluster's nodes were started with"
        )
    return f"cluster.address: no Ray cluster answers at {address} ({error})"


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ core announces its log level on standard error; what fails comes as an exception."""
    if os.environ.get("JPO_DEBUG"):
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def map_on_actors(
    ray: Any,
    config: ClusterConfig,
    stage: str,
    rows: list[dict[str, Any]],
    actor: type,
    *arguments: Any,
    row_per_cpu: bool = False,
    needs: Sequence[Path] = (),
) -> Iterator[dict[str, Any]]:
    """`rows` through a Ray Data pool of `config.num_actors` actors, as they are done; fewer where rows are few.

    `actor(*arguments, device, threads)` gets them one at a time, or with `row_per_cpu` as many as it has CPUs (where it
    has no GPU). `needs` are the folders that it reads. Raises `InputError` where the cluster has no room for the pool.
    """
    wanted = worker_resources(ray, config, config.num_actors)
    threads, gpus = int(wanted["CPU"]), wanted.get("GPU", 0)
    at_once = threads if row_per_cpu and not gpus else 1
    blocks = -(-len(rows) // at_once)
    actors = min(config.num_actors, blocks)
    await_resources(ray, config, stage, [wanted] * actors)
    mapped = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        on_node(actor, needs),
        fn_constructor_args=(*arguments, "cuda" if gpus else "cpu", threads),
        batch_size=at_once,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **as_options(wanted),
    )
    yield from within(mapped.iter_rows(), config.actor_timeout_s, stage, "cluster.actor_timeout_s")


def within(found: Iterator[Row], timeout_s: float, stage: str, key: str, ahead: int = READ_AHEAD) -> Iterator[Row]:
    """Pass `found` on; raise `TimeoutError` where the next one takes longer than `timeout_s`, which the config calls
    `key`. At most `ahead` are asked for, in a thread of its own, beyond the one that comes next.

    Ray starts a dead actor again, but waits for ever for one that hangs.
    """
    waiting: queue.Queue[Row | BaseException | None] = queue.Queue()
    room, ended = threading.Semaphore(ahead), threading.Event()

    def pump() -> None:
        try:
            for row in found:
                waiting.put(row)
                room.acquire()
                if ended.is_set():  # nobody listens any more
                    return
            waiting.put(None)
        except BaseException as error:
            waiting.put(error)
        finally:
            if isinstance(found, Generator):
                found.close()  # before Ray ends: it uses Ray

    threading.Thread(target=pump, daemon=True, name=stage + PUMPS).start()
    try:
        while True:
            try:
                got = waiting.get(timeout=timeout_s)
            except queue.Empty:
                ended.set()
                _end_pools()
                raise TimeoutError(
                    f"{stage}: nothing came for {timeout_s:g} s ({key}): a worker hangs, or the cluster is busy"
                ) from None
            if got is None:
                return
            if isinstance(got, BaseException):
                raise got
            yield got
            room.release()
    finally:
        ended.set()
        room.release()


def _end_pools() -> None:
    """End what Ray Data still runs for this process, actors that hang too.

    They would keep their places, and its threads would use Ray while that shuts down, which kills the process.
    """
    # Ray has no public way to it, and the version is pinned.
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    pools = [thread for thread in threading.enumerate() if isinstance(thread, StreamingExecutor)]
    for pool in pools:
        pool.shutdown(force=True)
    for thread in threading.enumerate() if pools else ():
        if thread.name.endswith(PUMPS) and thread is not threading.current_thread():
            thread.join(PUMPS_END_S)


def on_node(actor: type, needs: Sequence[Path]) -> type:
    """`actor`, made to fetch what it reads of a run directory on an object store to its node before it starts."""
    wanted = origins(*needs)
    if not wanted:
        return actor

    class Fetching(actor):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            for origin in wanted:
                origin.fetch()
            super().__init__(*arguments, **options)

    return Fetching
