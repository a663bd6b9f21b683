"""A real server: `jpo serve` as a user starts it, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

KEY = "sk-canary-0123456789"
BEARER = {"authorization": f"Bearer {KEY}"}
START_TIMEOUT_S = float(os.environ.get("JPO_START_TIMEOUT_S", "280"))  # more on a machine that does other work


@dataclass(frozen=True)
class Endpoint:
    url: str
    run_dir: Path
    process: "subprocess.Popen[str]"
    shown: Path  # what the command printed

    def client(self, **options: Any) -> openai.OpenAI:
        defaults: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=f"{self.url}/v1", **(defaults | options))

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **({"headers": BEARER, "timeout": 60} | options))

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 90) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def serving(run_dir: Path, folder: Path, *overrides: str, keys: bool = True) -> Iterator[Endpoint]:
    """`jpo serve` until the block ends. Raises where it does not start."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "JPO_API_KEYS")}
    environment |= {"JPO_API_KEYS": KEY} if keys else {}
    shown = folder / "shown.txt"
    command = [str(Path(sys.executable).with_name("jpo")), "serve", "--run-dir", str(run_dir), "port=0", *overrides]
    with shown.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment, preexec_fn=_hear_ctrl_c
        )
    try:
        yield Endpoint(_address(process, shown), run_dir, process, shown)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


def _hear_ctrl_c() -> None:
    """What runs in the background ignores SIGINT, and so would whatever it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _address(process: "subprocess.Popen[str]", shown: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if found := re.search(r"(http://\S+)/v1 ", shown.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"jpo serve did not start: {shown.read_text()[-3000:]}")
