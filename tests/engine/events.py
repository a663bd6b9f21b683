"""TensorBoard's event files, as TensorBoard reads them."""

from pathlib import Path

import pytest


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name."""
    read = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = read.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
