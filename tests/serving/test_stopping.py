"""SIGTERM lets streams finish, sent once or twice. The last test that asks the shared server, since it ends it."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving.endpoint import Endpoint

STREAMS = 16


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.ray
@pytest.mark.vllm
def test_sigterm_lets_streams_finish(endpoint: Endpoint) -> None:
    """All open streams come whole, the command ends by itself, and nothing listens any more."""
    body: dict[str, Any] = {"model": "jpo", "prompt": "Name a fruit.", "max_tokens": 64, "stream": True}
    body |= {"ignore_eos": True}
    whole, begun = [], threading.Barrier(STREAMS + 1, timeout=60)

    def read() -> None:
        with endpoint.http() as client, client.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            first = next(lines)
            begun.wait()
            whole.append([first, *lines])

    readers = [threading.Thread(target=read) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    begun.wait()
    endpoint.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping" in endpoint.shown.read_text())
    assert endpoint.stop(signal.SIGTERM) == 0  # told twice, as some supervisors do
    for reader in readers:
        reader.join()
    assert len(whole) == STREAMS
    assert all(lines[-2] == "data: [DONE]" for lines in whole)
    shown = endpoint.shown.read_text()
    assert "stopping: answers under way are finished first" in shown
    assert "Traceback" not in shown
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoint.url}/health")
