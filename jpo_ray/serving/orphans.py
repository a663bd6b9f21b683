"""Engine processes that end with their replica, however it ends.

vLLM's engine process notices when its parent leaves in good order, but not when it is killed: it would hold its memory,
gigabytes of it, for ever.
"""

import os
import subprocess

import psutil

WATCH = 'read -r _; sleep 2; kill -9 "$@" 2>/dev/null'  # `read` ends when the replica's end of the pipe closes


def end_children_with_this_process() -> "subprocess.Popen[bytes] | None":
    """Watch the processes below this one; to be called once they all run. The watcher lives as long as they may."""
    below = [str(process.pid) for process in psutil.Process(os.getpid()).children(recursive=True)]
    if not below:
        return None
    return subprocess.Popen(["sh", "-c", WATCH, "sh", *below], stdin=subprocess.PIPE, start_new_session=True)
