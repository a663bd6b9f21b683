"""Time, processor time and memory of a piece of work, in this process and in Ray's workers below it."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

MIB = 2**20
LOOK_S = 0.2
NEW_WORKERS_S = 1.0

Row = dict[str, Any]


class Memory:
    """A process that watches this one and its workers: in this one, looking would count as work."""

    def __init__(self) -> None:
        self._watcher = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def since_asked(self) -> dict[str, float]:
        """Since this was asked last: peak private MiB of this process (`driver`) and of its `workers` together, the
        workers' CPU seconds (`busy`).
        """
        assert self._watcher.stdin is not None
        assert self._watcher.stdout is not None
        self._watcher.stdin.write("\n")
        self._watcher.stdin.flush()
        found: dict[str, float] = json.loads(self._watcher.stdout.readline())
        return found

    def close(self) -> None:
        self._watcher.communicate()  # it ends with its input


@contextmanager
def watching() -> Iterator[Memory]:
    memory = Memory()
    try:
        yield memory
    finally:
        memory.close()


@contextmanager
def measured(memory: Memory, row: Row, count: int) -> Iterator[None]:
    memory.since_asked()
    before, started, busy = _private(psutil.Process()), time.perf_counter(), time.process_time()
    yield
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    found = memory.since_asked()
    row |= {"seconds": round(seconds, 2), "us each": 1e6 * seconds / count}
    row |= {"CPU us: driver": 1e6 * busy / count, "workers": 1e6 * found["busy"] / count}
    row |= {"driver MiB": round(found["driver"]), "of it new": round(found["driver"] - before)}
    row |= {"workers MiB": round(found["workers"])}


def watch(process: psutil.Process) -> None:
    """Answer each line of the standard input, until it ends, by what was seen since the last one."""
    seen, workers, looked = {"driver": 0.0, "workers": 0.0}, list[psutil.Process](), 0.0
    busy: dict[int, tuple[float, float]] = {}  # of each worker: CPU seconds at the last line, and as last seen
    while True:
        asked = bool(select.select([sys.stdin], [], [], LOOK_S)[0])
        if asked and not sys.stdin.readline():
            return
        if asked or time.monotonic() - looked > NEW_WORKERS_S:
            workers, looked = [each for each in process.children(recursive=True) if _is_worker(each)], time.monotonic()
        seen["driver"] = max(seen["driver"], _private(process))
        seen["workers"] = max(seen["workers"], sum(map(_private, workers)))
        for each in workers:
            seconds = _cpu_seconds(each)
            busy[each.pid] = busy.get(each.pid, (0.0, 0.0))[0], max(seconds, busy.get(each.pid, (0.0, 0.0))[1])
        if asked:
            spent = sum(last - first for first, last in busy.values())
            print(json.dumps(seen | {"busy": spent}), flush=True)
            seen = {"driver": 0.0, "workers": 0.0}
            busy = {pid: (last, last) for pid, (_, last) in busy.items()}


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::")
    except psutil.Error:
        return False


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.Error:
        return 0.0


def _private(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / MIB
    except psutil.Error:
        return 0.0


if __name__ == "__main__":
    watch(psutil.Process(int(sys.argv[1])))
