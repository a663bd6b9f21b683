"""What one worker process is asked to do and what it gives back."""

from dataclasses import dataclass

import torch

from jpo_ray.engine.model import DTYPES
from throughput.model import FOUR_BIT

BETA = 0.1
LEARNING_RATE = 5e-4  # large enough that a wrong gradient would show in the next loss


@dataclass(frozen=True)
class Job:
    """What one worker process does. `micro_batch` is in comparisons for TRL, in tokens for this engine."""

    contender: str  # jpo or trl
    work: str  # path of the saved work
    model: str  # folder of the model
    shape: str
    device: str
    dtype: str
    micro_batch: int
    warmup: int  # updates that are not timed
    updates: int  # timed updates
    threads: int
    gradient_checkpointing: bool

    @property
    def compute(self) -> torch.dtype:
        return DTYPES["bfloat16" if self.dtype == FOUR_BIT else self.dtype]


@dataclass
class Trace:
    """What a contender leaves behind: one entry per update, warm-up included."""

    losses: list[float]
    grad_norms: list[float]
    seconds: list[float]
    reference_s: float
    reference_comparisons: int  # that the reference pass served
    first_flops: int  # matrix products of the first update
    held_bytes: int
    peak_bytes: int
    parameters: int
