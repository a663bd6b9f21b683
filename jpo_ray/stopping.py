"""Being told to stop: SIGTERM (a job that is stopped, a node that goes) ends a command as Ctrl-C does."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Within the block SIGTERM raises `KeyboardInterrupt` in the main thread.

    Ray sets a handler of its own when it starts, so this comes after.
    """
    with _handled(signal.SIGTERM, signal.default_int_handler):
        yield


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Within the block SIGTERM does nothing, and Ctrl-C still cuts it short."""
    with _handled(signal.SIGTERM, signal.SIG_IGN):
        yield


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Ctrl-C within the block counts once the block has ended, the second one at once: what starts several processes,
    and is cut short, leaves some behind.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background
        yield
        return
    told = False

    def wait(*_: Any) -> None:
        nonlocal told
        if told:
            raise KeyboardInterrupt
        told = True

    with _handled(signal.SIGINT, wait):
        try:
            yield
        finally:
            if told:
                raise KeyboardInterrupt


@contextmanager
def no_second_interrupt() -> Iterator[None]:
    """Within the block neither signal does anything: what tidies up is not itself cut short."""
    with _handled(signal.SIGINT, signal.SIG_IGN), sigterm_ignored():
        yield


@contextmanager
def _handled(number: int, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        if before is not None:  # None: a handler that C code installed, which Python cannot put back
            signal.signal(number, before)
