"""The configuration of the cluster: what stages may ask of Ray, all alike or each its own."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from jpo_ray.config_base import Count, Positive, Section


def _part_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("must be a whole number, or below 1 a share of a GPU")
    return gpus


GPUs = Annotated[float, Field(ge=0), AfterValidator(_part_or_whole)]
# Such as {"accelerator_type:A100": 0.001}: nodes that have it are the only ones taken.
CustomResources = dict[Annotated[str, Field(min_length=1)], Positive]

TRAINING_STAGES = ("sft", "train")


class StageResources(Section):
    """What one stage asks for instead; null: as the other stages."""

    num_workers: Count | None = None  # of `sft` and `train`
    num_actors: Count | None = None  # of the others
    cpus_per_worker: Count | None = None
    gpus_per_worker: GPUs | None = None
    custom_resources: CustomResources | None = None


class StagesConfig(Section):
    """The stages that run on the cluster."""

    pairs: StageResources | None = None
    judge: StageResources | None = None
    sft: StageResources | None = None
    reference: StageResources | None = None
    train: StageResources | None = None
    sample: StageResources | None = None
    evaluate: StageResources | None = None

    @model_validator(mode="after")
    def _counts_are_of_what_runs(self) -> "StagesConfig":
        for stage in type(self).model_fields:
            own = getattr(self, stage)
            key, other, what = ("num_actors", "num_workers", "training workers")
            if stage not in TRAINING_STAGES:
                key, other, what = ("num_workers", "num_actors", "actors")
            if own is not None and getattr(own, key) is not None:
                raise ValueError(f"{stage}.{key}: the stage has {what}; set {stage}.{other}")
        return self


class ClusterConfig(Section):
    """What Ray may use. Defaults suit one machine."""

    address: str | None = None  # of a running Ray cluster; default: RAY_ADDRESS, else a local one
    num_workers: Count = 1  # training workers
    cpus_per_worker: Count | None = None  # default: the node's CPUs shared among the workers
    gpus_per_worker: GPUs = 0.0
    custom_resources: CustomResources = {}  # that each worker and actor takes too
    num_actors: Count = 1  # embedding, reference and sampling actors
    stages: StagesConfig = StagesConfig()  # what stages ask for instead
    trainings_at_once: Count = 1  # entries of `train` side by side, each on `num_workers` workers
    max_failures: Annotated[int, Field(ge=0)] = 3  # restarts of a training worker group
    # A training worker that keeps the others, or Ray, waiting longer has failed.
    collective_timeout_s: Positive = 300.0
    # One that finishes no step for so long has too: loading, evaluation and checkpoints are between steps.
    progress_timeout_s: Positive = 7200.0
    actor_timeout_s: Positive = 900.0  # longest wait for the next result of actors or tasks, their start included
    wait_s: Positive = 600.0  # longest wait for resources that others hold, or for nodes to come
    lease_wait_s: Annotated[float, Field(ge=0)] = 0.0  # longest wait for another run's hold on the run directory to end
    autoscaling: bool = False  # nodes may come: what the present ones cannot hold is waited for, not refused

    def of(self, stage: str) -> "ClusterConfig":
        """With what the stage asks for in place of what all do."""
        own: StageResources | None = getattr(self.stages, stage)
        update: dict[str, Any] = {} if own is None else own.model_dump(exclude_none=True)
        return self.model_copy(update=update)
