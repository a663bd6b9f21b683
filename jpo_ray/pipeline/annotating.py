"""Annotators by config, and judging with them under a progress bar."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from jpo_ray.cache import cache_folder
from jpo_ray.cluster.session import Cluster, ray_session
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import (
    Annotator,
    Comparison,
    ScoreItems,
    given_scores,
    label_annotator,
    one_by_one,
    score_annotator,
)
from jpo_ray.feedback.judge import judge
from jpo_ray.feedback.prompts import load_prompts
from jpo_ray.pipeline.console import Bar

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """What came with the data, for the annotators that answer from it."""

    labels: pa.Table  # records.LABELS
    ratings: pa.Table  # records.RATINGS
    proxy: bool = False  # whether labels of two instructions decide joint pairs too


def annotator_inputs(config: AnnotatorConfig) -> dict[str, str]:
    """Hashes of the files that the annotator's verdicts depend on: prompts, and a model's folder."""
    found = {}
    if config.annotator in ("openai", "vllm"):
        prompts = json.dumps(asdict(load_prompts(config.prompts)))
        found["prompts"] = hashlib.sha256(prompts.encode()).hexdigest()[:16]
    if config.annotator in ("vllm", "reward_model") and (folder := Path(config.model).expanduser()).is_dir():
        from jpo_ray.engine.model import model_hash

        found["model"] = model_hash(folder, cache_folder())
    return {f"{config.called} {name}": digest for name, digest in found.items()}


@contextmanager
def open_annotator(
    config: AnnotatorConfig,
    ray: Callable[[], Any],
    cluster: ClusterConfig,
    seed: int,
    given: Given | None = None,
    stage: str = "judge",
) -> Iterator[Annotator]:
    """The configured annotator; what it starts on the cluster ends with it. Raises `InputError`."""
    with ExitStack() as stack:
        yield _annotator(config, Cluster(ray, cluster, stack, stage), seed, given)


def check_annotator(config: AnnotatorConfig, cluster: ClusterConfig) -> None:
    """Raise `InputError` where a model or a key is missing; nothing starts."""
    if config.annotator not in ("labels", "ratings"):
        with open_file_annotator(config, cluster):
            pass


@contextmanager
def open_file_annotator(
    config: AnnotatorConfig, cluster: ClusterConfig, given: Given | None = None
) -> Iterator[Annotator]:
    """The same without a run: Ray is connected to when the annotator needs it."""
    with ExitStack() as session:
        found: list[Any] = []

        def ray() -> Any:
            if not found:
                found.append(session.enter_context(ray_session(cluster)))
            return found[0]

        with open_annotator(config, ray, cluster, 0, given) as annotator:
            yield annotator


def _annotator(config: AnnotatorConfig, cluster: Cluster, seed: int, given: Given | None) -> Annotator:
    if config.annotator == "openai":
        from jpo_ray.feedback.language_model import endpoint_annotator

        spread = None
        if config.actors:
            from jpo_ray.cluster.judging import spread_endpoint

            spread = partial(spread_endpoint, cluster, config.actors)
        return endpoint_annotator(config, cache_folder(), spread)
    if config.annotator == "vllm":
        from jpo_ray.cluster.judging import vllm_annotator

        return vllm_annotator(config, cache_folder(), cluster)
    if config.annotator == "labels":
        if given is None:
            raise InputError("judge.annotator: labels judge only what they came with; name another annotator")
        if not len(given.labels):
            raise InputError("judge.annotator: labels: the data have none; name another annotator")
        return replace(label_annotator(given.labels, proxy=given.proxy), name=config.called)
    scores = _scores(config, cluster, given)
    return score_annotator(config.called, scores, noise=config.noise, tie_band=config.tie_band, seed=seed)


def _scores(config: AnnotatorConfig, cluster: Cluster, given: Given | None) -> ScoreItems:
    if config.annotator == "reward_model":
        from jpo_ray.cluster.rewards import reward_scores

        return reward_scores(config, cluster)
    if config.annotator == "ratings":
        if given is None:
            raise InputError("judge.annotator: ratings judge only what they came with; name another annotator")
        if not len(given.ratings):
            raise InputError("judge.annotator: ratings: the data have none; docs/data.md names the columns")
        return given_scores(dict(zip(*(column.to_pylist() for column in given.ratings.columns), strict=True)))
    from jpo_ray.sandbox import quality

    return one_by_one(quality)


def judge_with_bar(comparisons: Sequence[Comparison], annotator: Annotator, bar: Bar) -> Rows:
    """Rows of `records.JUDGMENTS`, in order; the bar, begun by the caller, counts comparisons."""
    before = bar.done

    def show(share: float, note: str) -> None:
        bar.to(before + int(share * len(comparisons)), note=note)

    rows = judge(comparisons, annotator, show)
    bar.to(before + len(comparisons))
    return rows


def judging_estimate(config: AnnotatorConfig, comparisons: Sequence[Comparison]) -> str:
    """What judging would take, in one line for people. Nothing is asked."""
    if config.annotator != "openai":
        return f"{config.called}: {len(comparisons):,} comparisons, which cost nothing"
    from jpo_ray.feedback.answer_log import AnswerLog
    from jpo_ray.feedback.language_model import estimate, service_of

    service = service_of(config)
    found = estimate(comparisons, load_prompts(config.prompts), AnswerLog(cache_folder(), service.key()), service)
    priced = config.prompt_price or config.completion_price
    cost = f"${found.cost:.4f}" if priced else "unknown: set judge.prompt_price and judge.completion_price"
    return (
        f"{config.called}: {len(comparisons):,} comparisons in both orders: {found.requests:,} requests to "
        f"{config.model} at {service.base_url}, {found.answered:,} answered already; about {found.tokens:,} tokens; "
        f"cost {cost}"
    )
