"""What a model's layers must know of the forward pass that is running, beyond their inputs.

One object per model, which its layers hold and each pass fills in. Layers that run again in backward (gradient
checkpointing) need what their own pass had: `snapshot` before, `restore` then.
"""

import threading
from typing import Any

from torch import Tensor

from jpo_ray.engine.recompute import Recomputed


class _Pass:
    def __init__(self) -> None:
        self.tokens_BL: Tensor | None = None
        self.cells: Any = None
        self.recomputed = Recomputed()


class PassState:
    """What is set here is set for the thread that runs the pass: each lane (`lanes.py`) has its own.

    A thread that runs no pass of its own sees the last thread's that began one. On CUDA, layers run again in autograd's
    thread of the device; there are no lanes there, so that is the only pass there is.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._last = _Pass()

    @property
    def tokens_BL(self) -> Tensor | None:
        """Dropout keys, int32[B, L]."""
        return self._seen().tokens_BL

    @tokens_BL.setter
    def tokens_BL(self, keys_BL: Tensor | None) -> None:
        self._begun().tokens_BL = keys_BL

    @property
    def cells(self) -> Any:
        """`attention.Cells` of a packed row."""
        return self._seen().cells

    @cells.setter
    def cells(self, cells: Any) -> None:
        self._begun().cells = cells

    @property
    def recomputed(self) -> Recomputed:
        return self._seen().recomputed

    def clear(self) -> None:
        """No pass is running: attention is the model's own again."""
        self.restore((None, None))

    def snapshot(self) -> tuple[Tensor | None, Any]:
        return self.tokens_BL, self.cells

    def restore(self, snapshot: tuple[Tensor | None, Any]) -> None:
        self.tokens_BL, self.cells = snapshot

    def _seen(self) -> _Pass:
        found: _Pass = getattr(self._own, "found", self._last)
        return found

    def _begun(self) -> _Pass:
        if not hasattr(self._own, "found"):
            self._own.found = _Pass()
        self._last = self._own.found
        return self._last
