"""How many workers or actors each stage has, and with what."""

from jpo_ray.config import RunConfig
from jpo_ray.config_cluster import ClusterConfig

TRAINING = ("sft", "train")  # run on workers; the others on actors
STAGES = ("pairs", "sft", "reference", "train", "sample")


def cluster_of(config: RunConfig, stage: str) -> ClusterConfig:
    return config.cluster.of(stage)


def workers_of(config: RunConfig, stage: str) -> int:
    cluster = cluster_of(config, stage)
    return cluster.num_workers if stage in TRAINING else cluster.num_actors


def has_gpus(config: RunConfig, stage: str) -> bool:
    return cluster_of(config, stage).gpus_per_worker > 0


def devices_of(config: RunConfig, stage: str) -> int:
    """What works at one thing at a time: workers, or the parts that sampling engines are split into."""
    parts = config.sample.tensor_parallel_size if config.sample and stage == "sample" else 1
    return workers_of(config, stage) * parts


def gpus_of(config: RunConfig, stage: str) -> float:
    """All that the stage holds at a time. A sampling engine takes whole ones."""
    each = cluster_of(config, stage).gpus_per_worker
    at_once = config.cluster.trainings_at_once if stage == "train" else 1
    return devices_of(config, stage) * at_once * (1 if each and stage == "sample" else each)
