"""The lease of a run directory: one run at a time, and a dead run's hold ends.

The holder touches its file every few seconds. A lease whose process is gone, or that has been silent too long, is taken
over; a holder that wakes up late (a suspended machine) finds that out and stops. `store_lease.py` has the same for
object stores.
"""

import fcntl
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from jpo_ray.errors import InputError

LEASE_EXPIRES_S = 60.0
HEARTBEAT_S = 5.0
INTERRUPT = signal.SIGUSR1  # to the main thread; a run in the background may ignore Ctrl-C's signal


class Lease(Protocol):
    """What one run at a time holds."""

    def acquire(self) -> None:
        """Take it. Raises `InputError` where a living run has it."""
        ...

    def beat(self) -> Exception | None:
        """Say that the holder lives; an error where the lease is lost."""
        ...

    def release(self) -> None:
        """Give it back, if it still is the holder's."""
        ...


@contextmanager
def hold_lease(lease: Lease) -> Iterator[None]:
    """Hold a lease until the block ends.

    Raises `InputError` where another living run holds it, or took it over meanwhile: that, or whatever else loses it,
    interrupts the block as Ctrl-C does.
    """
    lease.acquire()
    stop = threading.Event()
    lost: list[Exception] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(INTERRUPT, _interrupt) if in_main else None

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            if (reason := lease.beat()) is not None:
                lost.append(reason)
                if in_main:
                    os.kill(os.getpid(), INTERRUPT)
                return

    thread = threading.Thread(target=beat, daemon=True, name="lease-heartbeat")
    thread.start()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if lost:
            raise lost[0] from interrupt
        raise
    finally:
        stop.set()
        thread.join()
        if handler is not None:  # None: not the main thread, or a handler that Python cannot put back
            signal.signal(INTERRUPT, handler)
        lease.release()


def in_use(name: str, holder: dict[str, Any]) -> InputError:
    return InputError(
        f"{name}: in use by another run (process {holder.get('pid')} on {holder.get('host')}); wait for it, "
        f"stop it, or use another --run-dir (a dead run's hold ends after {LEASE_EXPIRES_S:.0f} s)"
    )


def taken_over(name: str) -> InputError:
    return InputError(
        f"{name}: another run took it over while this one was silent for more than {LEASE_EXPIRES_S:.0f} s "
        "(a suspended machine?); this one has stopped"
    )


def this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}


def is_dead(holder: dict[str, Any], silent_s: float) -> bool:
    """Whether a holder's process on this machine is gone, or it has been silent too long."""
    here = holder.get("host") == socket.gethostname()
    return (here and not _alive(int(holder.get("pid", 0)))) or silent_s > LEASE_EXPIRES_S


class FileLease:
    """A lease file in a folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._owner = path, this_process()
        self.name = str(path.parent)
        self._seen = time.monotonic()

    def acquire(self) -> None:
        path = self._path
        staged = path.with_name(f".lease-{self._owner['token']}")
        try:
            staged.write_text(json.dumps(self._owner))
        except OSError as error:  # a full or read-only disk, somebody else's folder
            with suppress(OSError):
                staged.unlink(missing_ok=True)
            raise InputError(f"{self.name}: cannot be written ({error.strerror})") from error
        try:
            with _alone(path.parent):
                _remove_if_dead(path)
                os.link(staged, path)  # atomic, and fails where a lease stands; its content is complete from the start
        except FileExistsError as error:
            raise InputError(f"{path.parent}: taken by another run at the same moment; try again") from error
        finally:
            staged.unlink()

    def beat(self) -> Exception | None:
        try:
            with _alone(self._path.parent):
                if not self._is_mine():
                    return taken_over(self.name)
                os.utime(self._path)
        except OSError as error:  # a folder that is gone, or a network disk that may come back
            if self._path.parent.is_dir() and time.monotonic() - self._seen < LEASE_EXPIRES_S:
                return None
            return InputError(f"{self.name}: cannot be reached any more ({error.strerror}); this run has stopped")
        self._seen = time.monotonic()
        return None

    def release(self) -> None:
        with suppress(OSError), _alone(self._path.parent):  # it may be gone
            if self._is_mine():
                self._path.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        return bool(_holder(self._path).get("token") == self._owner["token"])


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: of two that find a dead lease, the second could remove the first one's new one."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_if_dead(path: Path) -> None:
    """Remove an expired lease; raise `InputError` where its run lives."""
    try:
        silent_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    holder = _holder(path)
    if not is_dead(holder, silent_s):
        raise in_use(str(path.parent), holder)
    path.unlink(missing_ok=True)


def _holder(path: Path) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return holder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
