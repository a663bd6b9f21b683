"""What the stages of a run ask of the cluster, refused before the first of them starts."""

from collections.abc import Iterator, Sequence
from typing import Any

from jpo_ray.cluster.resources import Bundle, require_resources, task_resources, worker_resources
from jpo_ray.cluster.sampling import choose_engine, engine_bundle
from jpo_ray.config import RunConfig, SampleConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.pipeline.context import Context, stands
from jpo_ray.pipeline.evaluate_stage import evaluation_judge
from jpo_ray.planning.workers import reads_policies

ASKS_NOTHING = ("items", "report")


def check_resources(context: Context, stages: Sequence[str]) -> None:
    """Raise `InputError` where the cluster can never give a stage what it asks for; else that is found after hours.

    Stages that stand already ask for nothing. With `cluster.autoscaling` nobody can say what the cluster may become.
    """
    if context.config.cluster.autoscaling:
        return
    for stage in _not_standing(context, [stage for stage in stages if stage not in ASKS_NOTHING]):
        for bundles in asked(context.ray(), context.config, stage):
            require_resources(context.ray(), stage, bundles)


def asked(ray: Any, config: RunConfig, stage: str) -> Iterator[list[Bundle]]:
    """What the stage asks for, each time at once."""
    if stage in ASKS_NOTHING:
        return
    cluster = config.cluster.of(stage)
    if stage in ("sft", "train"):
        at_once = cluster.trainings_at_once if stage == "train" and config.rounds is None else 1
        workers = cluster.num_workers * at_once
        yield [worker_resources(ray, cluster, workers)] * workers
    elif stage == "sample":
        sample = config.sample or SampleConfig()  # which rounds take
        if choose_engine(sample.engine) == "vllm":
            yield [engine_bundle(cluster, sample.tensor_parallel_size)] * cluster.num_actors
        else:
            yield _pool(ray, cluster)
    elif stage in ("judge", "evaluate"):
        for annotator in _annotators(config, stage):
            if bundles := _of_annotator(ray, cluster, annotator):
                yield bundles
        if reads_policies(config, stage):
            yield _pool(ray, cluster)
    else:
        yield _pool(ray, cluster)
        if stage == "pairs":
            yield [task_resources(cluster)]


def _annotators(config: RunConfig, stage: str) -> list[AnnotatorConfig]:
    if stage == "judge":
        return [config.judge, *config.judge.also]
    return [evaluation_judge(config, config.evaluate)] if config.evaluate else []


def _of_annotator(ray: Any, cluster: ClusterConfig, annotator: AnnotatorConfig) -> list[Bundle]:
    if annotator.annotator == "vllm":
        return [engine_bundle(cluster, annotator.tensor_parallel_size)] * cluster.num_actors
    if annotator.annotator == "reward_model":
        return _pool(ray, cluster)
    return [task_resources(cluster)] * (annotator.actors or 0 if annotator.annotator == "openai" else 0)


def _pool(ray: Any, cluster: ClusterConfig) -> list[Bundle]:
    return [worker_resources(ray, cluster, cluster.num_actors)] * cluster.num_actors


def _not_standing(context: Context, stages: Sequence[str]) -> list[str]:
    """Those of the stages that have something to make; rounds, which are `train`'s, go through most of them."""
    found = [stage for stage in stages if not _stands(context, stage)]
    if context.config.rounds is not None and "train" in found:
        compares = any("reference" in entry.reads for entry in context.config.train)
        found += ["sample", "pairs", "judge", *(["reference"] if compares else [])]
    return list(dict.fromkeys(found))


def _stands(context: Context, stage: str) -> bool:
    try:  # not kept, as `specs_of` keeps them: what a stage is made from may be other artifacts when its turn comes
        return all(stands(context, spec) for spec in context.specs[stage](context))
    except InputError:  # what it is made from is not there yet
        return False
