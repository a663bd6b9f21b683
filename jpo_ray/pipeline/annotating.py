"""Annotators by config, and judging with them under a progress bar."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from jpo_ray.cache import cache_folder
from jpo_ray.config import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator, Comparison, label_annotator, score_annotator
from jpo_ray.feedback.judge import judge
from jpo_ray.pipeline.console import Bar

CHUNK = 2000  # comparisons that are judged at a time

Rows = list[dict[str, Any]]


def make_annotator(
    config: AnnotatorConfig, seed: int, labels: pa.Table | None = None, *, proxy: bool = False
) -> Annotator:
    """The configured annotator; `labels` (`records.LABELS`) are what `labels` answers from. Raises `InputError`."""
    if config.annotator == "openai":
        from jpo_ray.feedback.language_model import endpoint_annotator

        return endpoint_annotator(config, cache_folder())
    if config.annotator == "labels":
        if labels is None:
            raise InputError("judge.annotator: labels judge only what they came with; name another annotator")
        return replace(label_annotator(labels, proxy=proxy), name=config.called)
    from jpo_ray.sandbox import quality

    return score_annotator(config.called, quality, noise=config.noise, tie_band=config.tie_band, seed=seed)


def judge_with_bar(comparisons: Sequence[Comparison], annotator: Annotator, bar: Bar) -> Rows:
    """Rows of `records.JUDGMENTS`, in order; the bar, begun by the caller, counts comparisons."""
    rows: Rows = []
    for start in range(0, len(comparisons), CHUNK):
        chunk, before = comparisons[start : start + CHUNK], bar.done

        def show(share: float, note: str, chunk: Sequence[Comparison] = chunk, before: int = before) -> None:
            bar.to(before + int(share * len(chunk)), note=note)

        rows += judge(chunk, annotator, show)
        bar.to(before + len(chunk))
    return rows
