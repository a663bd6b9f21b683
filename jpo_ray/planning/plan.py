"""What a plan says."""

from dataclasses import asdict, dataclass
from typing import Any

from jpo_ray.planning.costs import StageCost
from jpo_ray.planning.counts import Counts
from jpo_ray.planning.judging import JudgeCost
from jpo_ray.planning.machine import Machine


@dataclass(frozen=True)
class Plan:
    """None stands for what is not known."""

    counts: Counts
    model: str  # for people
    parameters: int | None
    judging: list[JudgeCost]
    stages: list[StageCost]
    machine: Machine
    run_dir_gib: float | None
    hub_gib: float  # of models that are to be downloaded, as far as their sizes are known
    host_memory_gib: float | None
    fine_tunes: bool
    on_cpu: bool
    assumed: list[str]
    missing: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
