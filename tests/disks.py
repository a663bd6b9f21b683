"""Small disks of a test's own: a tmpfs that is full soon, and can be made larger or read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    path: Path

    def remount(self, options: str) -> None:
        """Such as `size=8m` or `ro`."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def unmount(self) -> None:
        """As a network disk goes: what is open stays, every name in it is gone."""
        subprocess.run(["umount", "-l", self.path], check=True, stderr=subprocess.DEVNULL)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A tmpfs of `size` at `path`. Skips the test where this process may not mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=False, stderr=subprocess.DEVNULL)
