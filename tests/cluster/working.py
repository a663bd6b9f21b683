"""What the tests run inside workers and actors. Sent to them by value, so it imports nothing of the tests."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpo_ray.engine.checkpoints import newest_checkpoint
from jpo_ray.engine.jobs import train_preferences
from jpo_ray.engine.workers import rank_and_world, sum_over_workers
from jpo_ray.errors import InputError


@dataclass(frozen=True)
class Strike:
    """A signal that a rank sends itself, `delay_s` after the first step from `step` on."""

    step: int
    rank: int
    number: int = signal.SIGKILL
    delay_s: float = 0.0


def several(out: Path, device: str, progress: Any, jobs: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Train one after another in the same workers; returns each one's state."""
    return {name: train_preferences(out / name, device, progress, *arguments) for name, arguments in jobs.items()}


def struck(
    out: Path, device: str, progress: Any, notes: Path, strikes: Sequence[Strike], *arguments: Any
) -> dict[str, Any]:
    """Train; the first attempt meets the first strike, the next one the second, and so on.

    In `notes`: a line for each attempt of a rank, each step with its time, and the time of each strike.
    """
    rank, world = rank_and_world()
    newest = newest_checkpoint(out)
    with (notes / f"rank{rank}").open("a+") as file:
        file.seek(0)
        attempt = len(file.readlines())
        file.write(f"{world} workers from {newest.name if newest else 'the start'}\n")
    strike = strikes[attempt] if attempt < len(strikes) else None

    def hit(number: int) -> None:
        with (notes / "strikes").open("a") as file:
            file.write(f"{time.time()}\n")
        os.kill(os.getpid(), number)

    def watched(done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal strike
        with (notes / f"steps{rank}").open("a") as file:
            file.write(f"{time.time()} {attempt} {done}\n")
        if strike is not None and rank == strike.rank and done >= strike.step:
            late = threading.Timer(strike.delay_s, hit, [strike.number]) if strike.delay_s else None
            number, strike = strike.number, None
            if late is None:
                hit(number)
            else:
                late.start()
        progress(done, total, metrics)

    return train_preferences(out, device, watched, *arguments)


def fragile(actor: type, notes: Path, *, calls: int, deaths: int, number: int = signal.SIGKILL) -> type:
    """The actor's class, but that it sends itself a signal at its call number `calls`, `deaths` times in all."""

    class Fragile(actor):  # type: ignore[misc]
        seen = 0

        def __call__(self, batch: dict[str, Any]) -> Any:
            self.seen += 1
            if self.seen == calls and len(list(notes.glob("death-*"))) < deaths:
                (notes / f"death-{os.getpid()}").touch()
                os.kill(os.getpid(), number)
            return super().__call__(batch)

    return Fragile


def slow(actor: type, seconds: float) -> type:
    """The actor's class, but that each call takes so much longer."""

    class Slow(actor):  # type: ignore[misc]
        def __call__(self, batch: dict[str, Any]) -> Any:
            time.sleep(seconds)
            return super().__call__(batch)

    return Slow


def refused(out: Path, device: str, progress: Any, notes: Path, *ranks: int) -> None:  # noqa: ARG001
    """Bad input, which the given ranks alone find (by default all); the others wait for them."""
    import torch

    _note(notes)
    if not ranks or rank_and_world()[0] in ranks:
        raise InputError("data.jsonl line 3: `text` is missing")
    sum_over_workers(torch.zeros(1))


def stuck(out: Path, device: str, progress: Any, notes: Path) -> str:  # noqa: ARG001
    """The first attempt waits for ever after its first step, while its process lives."""
    _note(notes)
    progress(1, 2, {})
    if (notes / "rank0").read_text().count("\n") == 1:
        threading.Event().wait()
    return "done"


def failing(out: Path, device: str, progress: Any, notes: Path) -> None:  # noqa: ARG001
    """Rank 1 fails while rank 0 waits for it."""
    import torch

    _note(notes)
    if rank_and_world()[0] == 1:
        raise FloatingPointError("step 7: loss nan")
    sum_over_workers(torch.zeros(1))


def _note(notes: Path) -> None:
    with (notes / f"rank{rank_and_world()[0]}").open("a") as file:
        file.write("an attempt\n")


class Holder:
    """An actor that holds what it asked for."""

    def ready(self) -> None:
        """Answers once it has it."""


def batons_left(out: Path, device: str, progress: Any) -> float:  # noqa: ARG001
    """What is free of the resource that this worker holds."""
    import ray

    return float(ray.available_resources().get("baton", 0))
