"""Starting `fault_server.py`, and comparisons for it to judge."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jpo_ray.feedback.annotators import Comparison


class Endpoint:
    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def report(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.root}/counts", timeout=30) as response:
            found: dict[str, Any] = json.load(response)
        return found

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.report()["counts"]
        return counts


@contextmanager
def endpoint(**options: Any) -> Iterator[Endpoint]:
    command = [sys.executable, str(Path(__file__).with_name("fault_server.py")), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Endpoint(int(process.stdout.readline()))
        finally:
            process.kill()


def comparisons(count: int) -> list[Comparison]:
    """Joint ones and conditional ones in turn; the longer response is a's in two of three."""
    found = []
    for number in range(count):
        a, b = f"answer {number}" + " long" * (number % 3), f"reply {number}" + " lo" * ((number + 2) % 3)
        other = f"instruction {number}" if number % 2 else f"another instruction {number}"
        found.append(Comparison(f"k{number}", f"a{number}", f"b{number}", f"instruction {number}", a, other, b))
    return found
