"""The lease of a run directory: one run at a time, and a dead run's hold ends.

The holder touches its file every few seconds. A lease whose process is gone, or that has been silent too long, is taken
over; a holder that wakes up late (a suspended machine) finds that out and stops. `store_lease.py` has the same for
object stores.
"""

import fcntl
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from jpo_ray.errors import InputError
from jpo_ray.lease_holder import is_gone, this_process

LOGGER = logging.getLogger(__name__)
LEASE_EXPIRES_S = 60.0
HEARTBEAT_S = 5.0
REPLACED = 100  # times that a lease may be replaced while its lock is waited for
INTERRUPT = signal.SIGUSR1  # to the main thread; a run in the background may ignore Ctrl-C's signal


class InUse(InputError):
    """Another run has the lease."""


class LeaseLost(InputError):
    """The lease is another run's by now, or nobody's."""


class Lease(Protocol):
    """What one run at a time holds."""

    name: str

    def acquire(self) -> None:
        """Take it. Raises `InUse` where a living run has it."""
        ...

    def beat(self) -> None:
        """Say that the holder lives. Raises `LeaseLost`, or anything else where that could not be said this time."""
        ...

    def release(self) -> None:
        """Give it back, if it still is the holder's."""
        ...


@contextmanager
def hold_lease(lease: Lease, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lease until the block ends.

    Raises `InputError` where another living run holds it (for longer than `wait_s`), or took it over meanwhile, and
    `TimeoutError` where nothing could be said to others for nearly as long as they wait before they take it over.
    Either interrupts the block as Ctrl-C does.
    """
    took_s = _acquire(lease, wait_s)
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(INTERRUPT, _interrupt) if in_main else None
    heart = _Heart(lease, took_s, interrupts=in_main)
    try:
        try:
            yield
        finally:
            heart.stop()
        if heart.lost is not None:  # not in the main thread, or just now
            raise heart.lost
    except KeyboardInterrupt as interrupt:
        if heart.lost is not None:
            raise heart.lost from interrupt
        raise
    finally:
        if handler is not None:  # None: not the main thread, or a handler that Python cannot put back
            signal.signal(INTERRUPT, handler)
        if heart.lost is None:
            lease.release()


def _acquire(lease: Lease, wait_s: float) -> float:
    """How many seconds ago the holder began to say that it is there, at most."""
    until_s, told = time.monotonic() + wait_s, False
    while True:
        began_s = time.monotonic()
        try:
            lease.acquire()
            return time.monotonic() - began_s
        except InUse as error:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise
            if not told:
                LOGGER.warning("%s: waiting for up to %.0f s", error, wait_s)
                told = True
        time.sleep(min(left_s, HEARTBEAT_S * random.uniform(0.5, 1.0)))  # two that wait do not come at once each time


class _Heart:
    """Beats in a thread, and sees in another one that they have been silent for too long, since one may hang.

    Whatever goes wrong with a beat, the next may go well: only silence loses the lease, or finding it gone. Silence is
    counted from when the last good beat began, since others may count from there.
    """

    def __init__(self, lease: Lease, silent_s: float, *, interrupts: bool) -> None:
        self.lost: Exception | None = None
        self._lease, self._interrupts = lease, interrupts
        self._error: Exception = TimeoutError("no answer")  # of the last beat that failed
        self._awake_s, self._heard_s = 0.0, -silent_s  # until the watch's last look, and until the last good beat began
        self._ended, self._losing = threading.Event(), threading.Lock()
        self._beats, self._watch = (
            threading.Thread(target=work, daemon=True, name="lease-heartbeat")
            for work in (self._beat, self._wait_for_silence)
        )
        self._beats.start()
        self._watch.start()

    def stop(self) -> None:
        self._ended.set()
        self._watch.join()
        if self.lost is None:  # else a beat may hang
            self._beats.join()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            began_s = self._awake_s
            try:
                self._lease.beat()
                self._heard_s = began_s
            except LeaseLost as lost:
                self._lose(lost)
            except Exception as error:
                self._error = error

    def _wait_for_silence(self) -> None:
        before_s = time.monotonic()
        while not self._ended.wait(HEARTBEAT_S):
            now_s = time.monotonic()
            # A process that was held (SIGSTOP) has not listened either: its next beat tells whether it was replaced.
            self._awake_s += min(now_s - before_s, 2 * HEARTBEAT_S)
            before_s = now_s
            if self._awake_s - self._heard_s > _longest_silence_s():
                self._lose(_silent(self._lease.name, self._error))

    def _lose(self, reason: Exception) -> None:
        with self._losing:  # only once: the second interrupt would cut the tidying up short
            if self._ended.is_set():
                return
            self.lost = reason
            self._ended.set()
        if self._interrupts:
            os.kill(os.getpid(), INTERRUPT)


def _longest_silence_s() -> float:
    """Of a holder: it is looked for every `HEARTBEAT_S`, and must have stopped before others take the lease over."""
    return LEASE_EXPIRES_S - 3 * HEARTBEAT_S


def _silent(name: str, error: Exception) -> Exception:
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    silent = TimeoutError(
        f"{name}: could not be reached for {_longest_silence_s():.0f} s, and another run may soon take it over "
        f"({reason}); this one has stopped"
    )
    silent.__cause__ = error
    return silent


def in_use(name: str, holder: dict[str, Any]) -> InUse:
    return InUse(
        f"{name}: in use by another run (process {holder.get('pid')} on {holder.get('host')}); wait for it, "
        f"stop it, or use another --run-dir (a dead run's hold ends after {LEASE_EXPIRES_S:.0f} s)"
    )


def same_moment(name: str) -> InUse:
    return InUse(f"{name}: taken by another run at the same moment; try again")


def taken_over(name: str) -> LeaseLost:
    return LeaseLost(
        f"{name}: another run took it over while this one was silent for more than {LEASE_EXPIRES_S:.0f} s "
        "(a suspended machine?); this one has stopped"
    )


def gone(name: str) -> LeaseLost:
    return LeaseLost(
        f"{name}: the lease of this run is gone from there (deleted, or taken over by a run that has ended since); "
        "this one has stopped"
    )


def is_dead(holder: dict[str, Any], silent_s: float) -> bool:
    """Whether a holder has been silent too long, or was a process that this one would see, and is gone."""
    return silent_s > LEASE_EXPIRES_S or is_gone(holder)


class FileLease:
    """A lease file in a folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._owner = path, this_process()
        self.name = str(path.parent)

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
            with _alone(path):
                _remove_if_dead(path, staged)
                os.link(staged, path)  # atomic, and fails where a lease stands; its content is complete from the start
        except FileExistsError as error:
            raise same_moment(self.name) from error
        finally:
            staged.unlink()

    def beat(self) -> None:
        try:
            with _alone(self._path):
                self._require_mine()
                os.utime(self._path)
        except FileNotFoundError as error:
            raise LeaseLost(
                f"{self.name}: cannot be reached any more ({error.strerror}); this run has stopped"
            ) from error

    def release(self) -> None:
        with suppress(OSError, LeaseLost), _alone(self._path):  # it may be gone
            self._require_mine()
            self._path.unlink(missing_ok=True)

    def _require_mine(self) -> None:
        found = _read(self._path)
        if found is None and self._path.parent.exists():
            raise gone(self.name)
        if found is not None and found[0].get("token") != self._owner["token"]:
            raise taken_over(self.name)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time with the lease that stands there, if one does.

    Of two that find it dead, the second could else remove the first one's new one; with the lock, it reads that.
    """
    for _ in range(REPLACED):
        try:
            # NFS locks no folders, and only what may be written.
            handle = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        except FileNotFoundError:
            yield
            return
        try:
            with suppress(OSError):  # a file system that locks nothing
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _stands(path, handle):  # else the lock is of one that was removed while this one waited for it
                yield
                return
        finally:
            os.close(handle)
    raise same_moment(str(path.parent))


def _stands(path: Path, handle: int) -> bool:
    """Whether a path still is that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove_if_dead(path: Path, staged: Path) -> None:
    """Remove an expired lease; raise `InUse` where its run lives.

    How long it has been silent is told by one clock, the file system's: that of a server of network disks may differ
    from this machine's. So `staged`, a file beside it, is touched to know what time it is there.
    """
    if (found := _read(path)) is None:
        return
    holder, beaten_s = found
    os.utime(staged)
    if not is_dead(holder, staged.stat().st_mtime - beaten_s):
        raise in_use(str(path.parent), holder)
    path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], float] | None:
    """What a lease says, and when it was last touched. Opened, since network disks tell the newest only then."""
    try:
        with path.open("rb") as file:
            content, touched_s = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        return dict(json.loads(content)), touched_s
    except (ValueError, TypeError):  # damaged, or another program's
        return {}, touched_s
