"""Who holds a lease, told so that others can see whether that process lives.

Names of machines and process ids alone tell nothing: machines share names, and containers (which may share the name of
their machine) count processes for themselves. So a claim says too which boot of which kernel its process ran under, in
which PID namespace, and when it started.
"""

import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> dict[str, Any]:
    """What a claim of this process says; its token is another one each time."""
    claim = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    return claim | _kernel() | {"token": secrets.token_hex(8)}


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process that this one would see, and that is there no more.

    False where nobody can tell: on another machine, or since this one was started again, in another container, where
    there is no /proc.
    """
    if any(value is None or holder.get(name) != value for name, value in _kernel().items()):
        return False
    pid, started = holder.get("pid"), holder.get("started")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        pass
    now = _started(pid)
    return started is not None and now is not None and now != started  # another process has its id by now


def _kernel() -> dict[str, str | None]:
    found: dict[str, str | None] = {"boot": None, "pid_namespace": None}
    with suppress(OSError):
        found["boot"] = BOOT_ID.read_text().strip()
        found["pid_namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return found


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where that cannot be told."""
    with suppress(OSError, ValueError, IndexError):
        if Path("/proc/self").readlink().name == str(os.getpid()):  # else /proc is that of another PID namespace
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
            return int(after_name.split()[19])  # field 22 of proc(5), the name is field 2
    return None
