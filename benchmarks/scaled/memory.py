"""Time, processor time and memory of a piece of work, in this process and in Ray's workers below it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

MIB = 2**20

Row = dict[str, Any]


class Memory:
    """Peak private memory of this process and of its workers together, in MiB, and the workers' CPU seconds, since the
    last `reset`.
    """

    def __init__(self) -> None:
        self._me = psutil.Process()
        self.driver = self.workers = 0.0
        self._busy: dict[int, tuple[float, float]] = {}  # by process: CPU seconds at the reset, and last seen
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self.driver = self.workers = 0.0
        self._busy = {pid: (last, last) for pid, (_, last) in self._busy.items()}

    @property
    def workers_busy(self) -> float:
        return sum(last - first for first, last in list(self._busy.values()))

    def _watch(self) -> None:
        while True:
            self.driver = max(self.driver, _private(self._me))
            workers = [each for each in self._me.children(recursive=True) if _is_worker(each)]
            self.workers = max(self.workers, sum(map(_private, workers)))
            for each in workers:
                seconds = _cpu_seconds(each)
                self._busy[each.pid] = self._busy.get(each.pid, (seconds, 0.0))[0], seconds
            time.sleep(0.1)


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


@contextmanager
def measured(memory: Memory, row: Row, count: int) -> Iterator[None]:
    memory.reset()
    before, started, busy = _private(psutil.Process()), time.perf_counter(), time.process_time()
    yield
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    row |= {"seconds": round(seconds, 2), "us each": 1e6 * seconds / count}
    time.sleep(0.2)
    row |= {"CPU us: driver": 1e6 * busy / count, "workers": 1e6 * memory.workers_busy / count}
    row |= {"driver MiB": round(memory.driver), "of it new": round(memory.driver - before)}
    row |= {"workers MiB": round(memory.workers)}
