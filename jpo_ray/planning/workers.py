"""How many workers or actors each stage has, and with what."""

from jpo_ray.config import RunConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_judge import AnnotatorConfig

TRAINING = ("sft", "train")  # run on workers; the others on actors
JUDGING = ("judge", "evaluate")  # take GPUs only where models judge, or policies are read, on the cluster
STAGES = ("pairs", "judge", "sft", "reference", "train", "sample", "evaluate")
HELD = ("vllm", "reward_model")  # annotators that load a model on the cluster


def cluster_of(config: RunConfig, stage: str) -> ClusterConfig:
    return config.cluster.of(stage)


def workers_of(config: RunConfig, stage: str) -> int:
    cluster = cluster_of(config, stage)
    return cluster.num_workers if stage in TRAINING else cluster.num_actors


def has_gpus(config: RunConfig, stage: str) -> bool:
    runs = stage not in JUDGING or bool(judge_models(config, stage)) or reads_policies(config, stage)
    return runs and cluster_of(config, stage).gpus_per_worker > 0


def devices_of(config: RunConfig, stage: str) -> int:
    """What works at one thing at a time: workers, or the parts that sampling engines are split into."""
    parts = config.sample.tensor_parallel_size if config.sample and stage == "sample" else 1
    return workers_of(config, stage) * parts


def gpus_of(config: RunConfig, stage: str) -> float:
    """All that the stage holds at a time. A vLLM engine takes a whole one for each of its parts."""
    if not has_gpus(config, stage):
        return 0
    at_once = config.cluster.trainings_at_once if stage == "train" else 1
    return devices_of(config, stage) * at_once * _gpus_of_each(config, stage)


def _gpus_of_each(config: RunConfig, stage: str) -> float:
    if stage == "sample":
        return 1
    own = cluster_of(config, stage).gpus_per_worker
    if stage not in JUDGING:
        return own
    found = [judge.tensor_parallel_size if judge.annotator == "vllm" else own for judge in judge_models(config, stage)]
    return max([*found, *([own] if reads_policies(config, stage) else [])])


def judge_models(config: RunConfig, stage: str) -> list[AnnotatorConfig]:
    """Annotators of `judge` or `evaluate` that load a model on the cluster, one after the other."""
    annotators = [config.judge, *config.judge.also]
    if stage == "evaluate":
        annotators = [config.evaluate.judge or config.judge] if config.evaluate else []
    return [annotator for annotator in annotators if annotator.annotator in HELD]


def reads_policies(config: RunConfig, stage: str) -> bool:
    """Whether the stage (`judge` or `evaluate`) scores items under trained models."""
    if stage == "evaluate":
        return config.evaluate is not None and config.evaluate.policies
    return config.judge.selection is not None and config.judge.selection.policy is not None
