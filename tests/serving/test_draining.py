"""Told to stop while answers are under way: they are finished, however long that takes within the limit; Ctrl-C twice
is at once.
"""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.endpoint import Endpoint, serving

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

LONG: dict[str, Any] = {"model": "jpo", "prompt": "a", "n": 8, "max_tokens": 240, "ignore_eos": True, "stream": True}


def streams(endpoint: Endpoint, count: int) -> tuple[list[threading.Thread], list[str]]:
    """So many streams that are read to their end; the last line of each, or why there is none."""
    ends: list[str] = []

    def read() -> None:
        try:
            with endpoint.http(timeout=600) as client, client.stream("POST", "/v1/completions", json=LONG) as reply:
                ends.append([line for line in reply.iter_lines() if line][-1])
        except httpx.HTTPError as error:
            ends.append(type(error).__name__)

    readers = [threading.Thread(target=read) for _ in range(count)]
    for reader in readers:
        reader.start()
    return readers, ends


def test_streams_of_more_than_a_minute_are_finished(served_run: Path, tmp_path: Path) -> None:
    """The engine generates one answer at a time, so that those of a few streams take so long."""
    options = ("max_num_seqs=1", "drain_timeout_s=500", "scoring=null", f"state_dir={tmp_path / 'state'}")
    with serving(served_run, tmp_path, *options) as endpoint:
        readers, ends = streams(endpoint, 1)
        began = time.monotonic()
        readers[0].join()
        one_s = time.monotonic() - began
        count = min(200, int(75 / one_s) + 1)
        readers, ends = streams(endpoint, count)
        time.sleep(3)
        began = time.monotonic()
        assert endpoint.stop(signal.SIGTERM, 500) == 0
        assert time.monotonic() - began > 60
        for reader in readers:
            reader.join()
        assert ends == ["data: [DONE]"] * count
        assert "Traceback" not in endpoint.shown.read_text()


def test_ctrl_c_twice_cuts_answers_off(served_run: Path, tmp_path: Path) -> None:
    options = ("max_num_seqs=1", "drain_timeout_s=500", "scoring=null", f"state_dir={tmp_path / 'state'}")
    with serving(served_run, tmp_path, *options) as endpoint:
        readers, ends = streams(endpoint, 20)
        time.sleep(2)
        endpoint.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 30
        while "stopping" not in endpoint.shown.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        endpoint.stop(signal.SIGINT, 60)
        assert time.monotonic() - began < 30
        for reader in readers:
            reader.join()
        assert any(end != "data: [DONE]" for end in ends)
