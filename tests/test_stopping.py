"""Signals that end a command."""

import os
import signal
from collections.abc import Iterator

import pytest

from jpo_ray.stopping import interrupt_later


@pytest.fixture(autouse=True)
def _in_the_foreground() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(presses: int, started: list[str], error: OSError | None = None) -> None:
    with interrupt_later():
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        if error:
            raise error
        started.append("all")


def test_ctrl_c_counts_once_all_is_started() -> None:
    started: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        start(1, started)
    assert started == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_counts_at_once() -> None:
    started: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        start(2, started)
    assert started == []


def test_what_ctrl_c_breaks_is_an_interruption_and_no_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        start(1, [], OSError("a process that was told to stop as well"))


def test_without_ctrl_c_nothing_changes() -> None:
    started: list[str] = []
    start(0, started)
    assert started == ["all"]
    with pytest.raises(OSError, match="no room"):
        start(0, started, OSError("no room"))
