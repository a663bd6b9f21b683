"""What a model's layers must know of the forward pass that is running, beyond their inputs.

One object per model, which its layers hold and each pass fills in. Layers that run again in backward (gradient
checkpointing) need what their own pass had: `snapshot` before, `restore` then.
"""

import threading
from typing import Any

from torch import Tensor

from jpo_ray.engine.recompute import Recomputed


class PassState(threading.local):
    """What is set here is set for the thread that runs the pass: each lane (`lanes.py`) has its own."""

    def __init__(self) -> None:
        self.tokens_BL: Tensor | None = None  # dropout keys, int32[B, L]
        self.cells: Any = None  # `attention.Cells` of a packed row
        self.recomputed = Recomputed()

    def clear(self) -> None:
        """No pass is running: attention is the model's own again."""
        self.restore((None, None))

    def snapshot(self) -> tuple[Tensor | None, Any]:
        return self.tokens_BL, self.cells

    def restore(self, snapshot: tuple[Tensor | None, Any]) -> None:
        self.tokens_BL, self.cells = snapshot
