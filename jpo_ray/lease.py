"""The lease of a run directory: one run at a time, and a dead run's hold ends.

The holder touches its file every few seconds. A lease whose process is gone, or that has been silent too long, is taken
over; a holder that wakes up late (a suspended machine) finds that out and stops.
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
from typing import Any

from jpo_ray.errors import InputError

LEASE_EXPIRES_S = 60.0
HEARTBEAT_S = 5.0
INTERRUPT = signal.SIGUSR1  # to the main thread; a run in the background may ignore Ctrl-C's signal


@contextmanager
def hold_lease(path: Path) -> Iterator[None]:
    """Hold the lease file `path` until the block ends.

    Raises `InputError` where another living run holds it, or took it over meanwhile: that interrupts the block as
    Ctrl-C does.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    _acquire(path, owner)
    stop, lost = threading.Event(), threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(INTERRUPT, _interrupt) if in_main else None

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            with _alone(path.parent):
                if _holder(path).get("token") == owner["token"]:
                    os.utime(path)
                    continue
            lost.set()
            if in_main:
                os.kill(os.getpid(), INTERRUPT)
            return

    thread = threading.Thread(target=beat, daemon=True, name="lease-heartbeat")
    thread.start()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if lost.is_set():
            raise InputError(
                f"{path.parent}: another run took it over while this one was silent for more than "
                f"{LEASE_EXPIRES_S:.0f} s (a suspended machine?); this one has stopped"
            ) from interrupt
        raise
    finally:
        stop.set()
        thread.join()
        if handler is not None:  # None: not the main thread, or a handler that Python cannot put back
            signal.signal(INTERRUPT, handler)
        with _alone(path.parent):
            if _holder(path).get("token") == owner["token"]:
                path.unlink(missing_ok=True)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _acquire(path: Path, owner: dict[str, Any]) -> None:
    staged = path.with_name(f".lease-{owner['token']}")
    staged.write_text(json.dumps(owner))
    try:
        with _alone(path.parent):
            _remove_if_dead(path)
            os.link(staged, path)  # atomic, and fails where a lease stands; its content is complete from the start
    except FileExistsError as error:
        raise InputError(f"{path.parent}: taken by another run at the same moment; try again") from error
    finally:
        staged.unlink()


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
    here = holder.get("host") == socket.gethostname()
    gone = here and not _alive(int(holder.get("pid", 0)))
    if gone or silent_s > LEASE_EXPIRES_S:
        path.unlink(missing_ok=True)
        return
    raise InputError(
        f"{path.parent}: in use by another run (process {holder.get('pid')} on {holder.get('host')}); wait for it, "
        f"stop it, or use another --run-dir (a dead run's hold ends after {LEASE_EXPIRES_S:.0f} s)"
    )


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
