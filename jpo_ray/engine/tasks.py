"""The two things that are trained: preferences over items, and supervised fine-tuning on single items."""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jpo_ray.config_training import SFTConfig, TrainConfig
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine import batches
from jpo_ray.engine.batches import Schedule
from jpo_ray.engine.dataset import EdgeList, PreferenceData
from jpo_ray.engine.loop import Metrics, Task
from jpo_ray.engine.memory import tokens_to_keep
from jpo_ray.engine.objective import (
    NO_LINKS,
    batch_rows,
    links,
    loss_of_scores,
    outcome_of,
    preference_metrics,
    weighted_mean,
)
from jpo_ray.engine.reference import check_reference
from jpo_ray.engine.schedules import EdgeSchedule, training_edges, validation_batches, weighted_by_list
from jpo_ray.engine.scoring import Scorer
from jpo_ray.engine.step import Rows, accumulate_gradients, score_all
from jpo_ray.engine.throughput import Meter
from jpo_ray.objectives import ItemScores, Outcome, sft


def preference_task(
    scorer: Scorer, data: PreferenceData, config: TrainConfig, seed: int, total_steps: int | None = None
) -> Task:
    """Train on the edges of `data`. Held out are its validation edges; `total_steps` overrides the epochs."""
    keep_tokens = tokens_to_keep(scorer, data.tokens, config.activation_memory_gib)
    meter = Meter(scorer)
    schedule = EdgeSchedule(data, training_edges(data, config, seed), config, seed)

    def gradients(step: int) -> Metrics:
        batch = schedule.batch(step)
        started = time.monotonic()
        outcome, scores, rows = _preference_gradients(scorer, data, batch, config, step, keep_tokens)
        elapsed = max(time.monotonic() - started, 1e-9)
        return (
            preference_metrics(outcome, scores, batch, rows, config)
            | {
                "tokens": int(data.tokens.lengths[rows].sum()),
                "joint/items": len(rows),
                "joint/edges": len(batch),
                "joint/items_per_second": len(rows) / elapsed,
                "joint/comparisons_per_second": len(batch) / elapsed,
            }
            | meter.speed(data.tokens, rows, elapsed)
        )

    def evaluate() -> Metrics:
        if not len(data.validation):
            return {}
        rows = batch_rows(data, data.validation, config)
        scores = score_all(
            scorer,
            data.tokens,
            rows,
            max_tokens=config.max_micro_batch_tokens,
            instruction="instruction" in config.reads,
        )
        parts = validation_batches(data, config, seed)
        outcome = outcome_of(data, data.validation, parts, rows, scores, config)
        held_out = weighted_by_list(data, data.validation.take(np.concatenate(parts)), config)
        metrics = preference_metrics(outcome, scores, held_out, rows, config)
        return {f"eval_{name}": value for name, value in metrics.items()}

    def items(step: int) -> list[str]:
        rows = batch_rows(data, schedule.batch(step), config)
        return [data.item_ids[row] for row in rows if row < len(data.item_ids)]

    return Task(gradients, evaluate, schedule.steps_per_epoch, total_steps or schedule.total_steps, items)


def check_margins(scorer: Scorer, data: PreferenceData, config: TrainConfig, dtype: str) -> float:
    """Refuse a stale cache: before the first update the policy's log-probs are the reference's (nats per token)."""
    assert data.reference is not None
    scorer.model.eval()  # a model's own dropout would look like another model
    some = training_edges(data, config, config.seed or 0)[0]  # of others the reference may know nothing
    rows = batch_rows(data, some.take(np.arange(min(len(some), config.comparisons_per_step))), config)
    fresh = score_all(scorer, data.tokens, rows, max_tokens=config.max_micro_batch_tokens)
    return check_reference(fresh.cpu().numpy(), data.reference[rows], data.tokens.lengths[rows], dtype)


def _preference_gradients(
    scorer: Scorer, data: PreferenceData, batch: EdgeList, config: TrainConfig, step: int, keep_tokens: int
) -> tuple[Outcome, Tensor, Rows]:
    every = batch_rows(data, batch, config)
    rows = every[every < data.items]
    mismatched = every[len(rows) :]
    scores_K = score_all(
        scorer, data.tokens, mismatched, max_tokens=config.max_micro_batch_tokens, step=step, instruction=False
    )
    evaluate = loss_of_scores(data, batch, every, config)

    def loss(scores: Tensor) -> Tensor:
        return weighted_mean(evaluate(torch.cat([scores, scores_K])).loss_E, batch)

    scores = accumulate_gradients(
        scorer,
        data.tokens,
        rows,
        loss,
        max_tokens=config.max_micro_batch_tokens,
        links=links(data, batch, rows, config),
        keep_tokens=keep_tokens,
        at_least=config.gradient_accumulation_steps,
        step=step,
        instruction="instruction" in config.reads,
    )
    return evaluate(torch.cat([scores, scores_K])), scores, rows


def sft_task(
    scorer: Scorer,
    tokens: TokenizedItems,
    train: Rows,
    validation: Rows,
    config: SFTConfig,
    seed: int,
    item_ids: Sequence[str] = (),
) -> Task:
    """Supervised fine-tuning: the loss is on the response, in nats per token of the batch."""
    keep_tokens = tokens_to_keep(scorer, tokens, config.activation_memory_gib)
    meter = Meter(scorer)

    def epoch_batches(epoch: int, _: int) -> list[Rows]:
        return batches.shuffled(len(train), config.items_per_step, seed, epoch)

    schedule = Schedule(epoch_batches, config.num_train_epochs, [math.ceil(len(train) / config.items_per_step)])

    def gradients(step: int) -> Metrics:
        rows = np.sort(train[schedule.batch(step)[1]])
        response_tokens = int(tokens.response_tokens[rows].sum())
        started = time.monotonic()
        scores = accumulate_gradients(
            scorer,
            tokens,
            rows,
            lambda scores: sft(ItemScores(*scores.T), response_tokens),
            max_tokens=config.max_micro_batch_tokens,
            links=NO_LINKS,
            keep_tokens=keep_tokens,
            at_least=config.gradient_accumulation_steps,
            step=step,
            instruction=False,
        )
        loss = sft(ItemScores(*scores.T), response_tokens)
        metrics = {"loss": float(loss), "tokens": int(tokens.lengths[rows].sum())}
        elapsed = max(time.monotonic() - started, 1e-9)  # the loss is read: the device is done
        return metrics | meter.speed(tokens, rows, elapsed)

    def evaluate() -> Metrics:
        if not len(validation):
            return {}
        scores = score_all(scorer, tokens, validation, max_tokens=config.max_micro_batch_tokens, instruction=False)
        return {"eval_loss": float(sft(ItemScores(*scores.T), int(tokens.response_tokens[validation].sum())))}

    def items(step: int) -> list[str]:
        return [item_ids[row] for row in train[schedule.batch(step)[1]] if row < len(item_ids)]

    return Task(gradients, evaluate, schedule.steps_per_epoch, schedule.total_steps, items)
