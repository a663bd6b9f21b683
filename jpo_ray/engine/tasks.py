"""The two things that are trained: preferences over items, and supervised fine-tuning on single items."""

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jpo_ray.config import SFTConfig, TrainConfig
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine import batches
from jpo_ray.engine.batches import Schedule
from jpo_ray.engine.dataset import EdgeList, PreferenceData
from jpo_ray.engine.loop import Metrics, Task
from jpo_ray.engine.memory import tokens_to_keep
from jpo_ray.engine.reference import check_reference
from jpo_ray.engine.scoring import Scorer
from jpo_ray.engine.step import Rows, accumulate_gradients, score_all
from jpo_ray.engine.throughput import Meter
from jpo_ray.objectives import Edges, ItemScores, Outcome, dpo, jpo, kto, sft

NO_LINKS = np.zeros((0, 2), dtype=np.int64)

Objective = Callable[[ItemScores, ItemScores, Edges], Outcome]


def preference_task(
    scorer: Scorer, data: PreferenceData, config: TrainConfig, seed: int, total_steps: int | None = None
) -> Task:
    """Train on the edges of `data`. Held out are its validation edges; `total_steps` overrides the epochs."""
    edges = _first(data.train, config.max_train_comparisons, seed)
    keep_tokens = tokens_to_keep(scorer, data.tokens, config.activation_memory_gib)
    meter = Meter(scorer)
    schedule = preference_schedule(edges, data.tokens.lengths, config, seed)

    def gradients(step: int) -> Metrics:
        batch = edges.take(schedule.batch(step))
        started = time.monotonic()
        outcome, scores, rows = _preference_gradients(scorer, data, batch, config, step, keep_tokens)
        elapsed = max(time.monotonic() - started, 1e-9)
        return (
            preference_metrics(outcome, scores, batch, rows)
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
            instruction=_uses_instruction(config),
        )
        outcome = _loss(data, data.validation, rows, config)(scores)
        metrics = preference_metrics(outcome, scores, data.validation, rows)
        return {f"eval_{name}": value for name, value in metrics.items()}

    return Task(gradients, evaluate, schedule.steps_per_epoch, total_steps or schedule.total_steps)


def preference_schedule(edges: EdgeList, lengths: npt.NDArray[np.int64], config: TrainConfig, seed: int) -> Schedule:
    """Which comparisons each step sees."""
    make = {"pairs": batches.pairs, "graph": batches.graph}[config.batching]
    limits = batches.Limits(config.comparisons_per_step, config.max_batch_tokens, lengths)
    even = config.max_batch_tokens is None  # then all epochs have the same number of batches

    def epoch_batches(epoch: int) -> list[Rows]:
        return make(edges.chosen, edges.rejected, limits, seed, epoch)

    fixed = math.ceil(len(edges) / limits.comparisons) if even else None
    return Schedule(epoch_batches, config.num_train_epochs, fixed)


def check_margins(scorer: Scorer, data: PreferenceData, config: TrainConfig, dtype: str) -> float:
    """Refuse a stale cache: before the first update the policy's log-probs are the reference's (nats per token)."""
    scorer.model.eval()  # a model's own dropout would look like another model
    rows = batch_rows(data, data.train.take(np.arange(min(len(data.train), config.comparisons_per_step))), config)
    fresh = score_all(scorer, data.tokens, rows, max_tokens=config.max_micro_batch_tokens)
    return check_reference(fresh.cpu().numpy(), data.reference[rows], data.tokens.lengths[rows], dtype)


def batch_rows(data: PreferenceData, edges: EdgeList, config: TrainConfig) -> Rows:
    """Rows to score for these edges, each once: their items, and for KTO the items' mismatched ones."""
    rows = np.unique(np.concatenate([edges.chosen, edges.rejected]))
    return np.concatenate([rows, rows + data.items]) if config.objective == "kto" else rows


def _preference_gradients(
    scorer: Scorer, data: PreferenceData, batch: EdgeList, config: TrainConfig, step: int, keep_tokens: int
) -> tuple[Outcome, Tensor, Rows]:
    every = batch_rows(data, batch, config)
    rows = every[every < data.items]
    mismatched = every[len(rows) :]
    scores_K = score_all(
        scorer, data.tokens, mismatched, max_tokens=config.max_micro_batch_tokens, step=step, instruction=False
    )
    evaluate = _loss(data, batch, every, config)
    weights = torch.from_numpy(batch.weight).to(scorer.device)

    def loss(scores: Tensor) -> Tensor:
        outcome = evaluate(torch.cat([scores, scores_K]))
        return (outcome.loss_E * weights).sum() / weights.sum()

    scores = accumulate_gradients(
        scorer,
        data.tokens,
        rows,
        loss,
        max_tokens=config.max_micro_batch_tokens,
        links=_links(config, batch, rows),
        keep_tokens=keep_tokens,
        at_least=config.gradient_accumulation_steps,
        step=step,
        instruction=_uses_instruction(config),
    )
    return evaluate(torch.cat([scores, scores_K])), scores, rows


def _links(config: TrainConfig, edges: EdgeList, rows: Rows) -> Rows:
    """Places of the items that the loss joins. KTO judges each item by itself."""
    if config.objective == "kto":
        return NO_LINKS
    return np.stack([np.searchsorted(rows, edges.chosen), np.searchsorted(rows, edges.rejected)], axis=1)


def _uses_instruction(config: TrainConfig) -> bool:
    """DPO and KTO see responses given their instruction; the instruction's own log-prob is then not computed."""
    return config.objective == "jpo"


def _loss(data: PreferenceData, edges: EdgeList, rows: Rows, config: TrainConfig) -> Callable[[Tensor], Outcome]:
    """The objective as a function of the scores float64[len(rows), 2] of `rows`."""
    count = int((rows < data.items).sum())
    reference = torch.from_numpy(data.reference[rows])
    graph = Edges(
        torch.from_numpy(np.searchsorted(rows[:count], edges.chosen)),
        torch.from_numpy(np.searchsorted(rows[:count], edges.rejected)),
        torch.from_numpy(edges.joint),
        torch.from_numpy(edges.probability),
    )

    def evaluate(scores: Tensor) -> Outcome:
        local = reference.to(scores.device)
        objective = _objective(config, scores[count:, 1], local[count:, 1])
        here = Edges(*(part.to(scores.device) for part in graph.__dict__.values()))
        return objective(_items(scores[:count]), _items(local[:count]), here)

    return evaluate


def _objective(config: TrainConfig, mismatched_policy_K: Tensor, mismatched_reference_K: Tensor) -> Objective:
    if config.objective == "kto":
        return partial(
            kto,
            mismatched_policy_K=mismatched_policy_K,
            mismatched_reference_K=mismatched_reference_K,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
    return partial({"jpo": jpo, "dpo": dpo}[config.objective], beta=config.beta)


def _items(scores: Tensor) -> ItemScores:
    return ItemScores(scores[:, 0], scores[:, 1])


def preference_metrics(outcome: Outcome, scores: Tensor, edges: EdgeList, rows: Rows) -> Metrics:
    """TRL's names, and under `joint/` what only comparisons across instructions have."""
    margin = outcome.margin_E
    weights = torch.from_numpy(edges.weight).to(margin.device)
    right = (margin > 0).double()
    joint = torch.from_numpy(edges.joint).to(margin.device)
    whole = scores.sum(dim=1)
    chosen, rejected = (torch.from_numpy(np.searchsorted(rows, side)) for side in (edges.chosen, edges.rejected))
    metrics = {
        "loss": float((outcome.loss_E * weights).sum() / weights.sum()),
        "rewards/chosen": float(outcome.chosen_E.mean()),
        "rewards/rejected": float(outcome.rejected_E.mean()),
        "rewards/accuracies": float(right.mean()),
        "rewards/margins": float(margin.mean()),
        "logps/chosen": float(whole[chosen].mean()),
        "logps/rejected": float(whole[rejected].mean()),
        "joint/margin_instruction": float(outcome.margin_instruction_E.mean()),
        "joint/margin_response": float(outcome.margin_response_E.mean()),
    }
    for name, kind in (("joint/accuracy_joint", joint), ("joint/accuracy_conditional", ~joint)):
        if bool(kind.any()):
            metrics[name] = float(right[kind].mean())
    return metrics


def sft_task(
    scorer: Scorer, tokens: TokenizedItems, train: Rows, validation: Rows, config: SFTConfig, seed: int
) -> Task:
    """Supervised fine-tuning: the loss is on the response, in nats per token of the batch."""
    keep_tokens = tokens_to_keep(scorer, tokens, config.activation_memory_gib)
    meter = Meter(scorer)

    def epoch_batches(epoch: int) -> list[Rows]:
        return batches.shuffled(len(train), config.items_per_step, seed, epoch)

    schedule = Schedule(epoch_batches, config.num_train_epochs, math.ceil(len(train) / config.items_per_step))

    def gradients(step: int) -> Metrics:
        rows = np.sort(train[schedule.batch(step)])
        response_tokens = int(tokens.response_tokens[rows].sum())
        started = time.monotonic()
        scores = accumulate_gradients(
            scorer,
            tokens,
            rows,
            lambda scores: sft(_items(scores), response_tokens),
            max_tokens=config.max_micro_batch_tokens,
            links=NO_LINKS,
            keep_tokens=keep_tokens,
            at_least=config.gradient_accumulation_steps,
            step=step,
            instruction=False,
        )
        metrics = {"loss": float(sft(_items(scores), response_tokens)), "tokens": int(tokens.lengths[rows].sum())}
        elapsed = max(time.monotonic() - started, 1e-9)  # the loss is read: the device is done
        return metrics | meter.speed(tokens, rows, elapsed)

    def evaluate() -> Metrics:
        if not len(validation):
            return {}
        scores = score_all(scorer, tokens, validation, max_tokens=config.max_micro_batch_tokens, instruction=False)
        return {"eval_loss": float(sft(_items(scores), int(tokens.response_tokens[validation].sum())))}

    return Task(gradients, evaluate, schedule.steps_per_epoch, schedule.total_steps)


def _first(edges: EdgeList, limit: int | None, seed: int) -> EdgeList:
    """A seeded subset of `limit` edges; subsets of one seed are nested."""
    if limit is None or limit >= len(edges):
        return edges
    return edges.take(np.random.default_rng([seed, 0xED6E]).permutation(len(edges))[:limit])
