"""What the tests run inside training workers. Sent to them by value, so it imports nothing of the tests."""

import os
import signal
from pathlib import Path
from typing import Any

from jpo_ray.engine.checkpoints import newest_checkpoint
from jpo_ray.engine.jobs import train_preferences
from jpo_ray.engine.step import rank_and_world, sum_over_workers
from jpo_ray.errors import InputError


def several(out: Path, device: str, progress: Any, jobs: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Train one after another in the same workers; returns each one's state."""
    return {name: train_preferences(out / name, device, progress, *arguments) for name, arguments in jobs.items()}


def killed_once(out: Path, device: str, progress: Any, notes: Path, at_step: int, *arguments: Any) -> dict[str, Any]:
    """Train, and at the first attempt die without a word in rank 1 after `at_step` steps."""
    rank, world = rank_and_world()
    newest = newest_checkpoint(out)
    with (notes / f"rank{rank}").open("a") as file:
        file.write(f"{world} workers from {newest.name if newest else 'the start'}\n")

    def watched(done: int, total: int, metrics: dict[str, float]) -> None:
        if rank == 1 and done == at_step and not (notes / "killed").exists():
            (notes / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        progress(done, total, metrics)

    return train_preferences(out, device, watched, *arguments)


def refused(out: Path, device: str, progress: Any, notes: Path) -> None:  # noqa: ARG001
    _note(notes)
    raise InputError("data.jsonl line 3: `text` is missing")


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
