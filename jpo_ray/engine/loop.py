"""The training loop: steps, schedule, logging, evaluation and checkpoints. What a step computes is given to it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jpo_ray.config import OptimizerConfig
from jpo_ray.engine.checkpoints import (
    keep_only,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
    store_checkpoints,
)
from jpo_ray.engine.optim import learning_rate, make_optimizer, warmup_steps
from jpo_ray.engine.sharding import whole
from jpo_ray.engine.step import rank_and_world, sum_over_workers, trainable
from jpo_ray.engine.tracking import Tracking, Write, tracked
from jpo_ray.files import write_json

Metrics = dict[str, float]
LOG_ENTRIES = 200  # about so many training entries are kept in the log, each the mean of the steps since the last


@dataclass(frozen=True)
class Task:
    """What is trained: how to compute a step's gradients and the held-out metrics.

    `gradients(step)` fills the parameters' `.grad`, the same on every rank, and returns metrics (`loss` and the step's
    `tokens` among them). `evaluate()` returns metrics named `eval_...`, empty where nothing is held out.
    `steps_per_epoch` converts steps to epochs.
    """

    gradients: Callable[[int], Metrics]
    evaluate: Callable[[], Metrics]
    steps_per_epoch: int
    total_steps: int


Progress = Callable[[int, int, Metrics], None]


def train(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: OptimizerConfig,
    out: Path,
    *,
    progress: Progress | None = None,
    final_dtype: torch.dtype | None = None,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Train `model` in place, resuming from the newest valid checkpoint in `out`; returns the trainer state.

    Leaves in `out` the final weights, `trainer_state.json` and the best and the last checkpoint. Every rank must call
    it; rank 0 writes. The best checkpoint is the one with the lowest `eval_loss`. `final_dtype` is that of the final
    weights, where it differs from training's. Rank 0 hands what it logs to the trackers of `tracking`.
    """
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, config)
    state: dict[str, Any] = {"global_step": 0, "max_steps": task.total_steps, "num_tokens": 0, "log_history": []}
    state |= {"best_metric": None, "best_model_checkpoint": None, "epoch": 0.0}
    state["warmup_steps"] = warmup_steps(config, task.total_steps)
    resumed = newest_checkpoint(out)
    if resumed is not None:
        state = load_checkpoint(resumed, model, optimizer)
    eval_every = config.eval_steps or task.steps_per_epoch
    save_every = config.save_steps or eval_every
    log_every = max(1, task.total_steps // LOG_ENTRIES)
    window: list[Metrics] = []
    model.train()
    with tracked(tracking if rank_and_world()[0] == 0 else None, state["log_history"]) as write:
        for step in range(state["global_step"], task.total_steps):
            metrics = _update(parameters, optimizer, task, config, step)
            state["global_step"] = step + 1
            state["epoch"] = round((step + 1) / task.steps_per_epoch, 4)
            state["num_tokens"] += metrics.pop("tokens")
            window.append(metrics)
            if progress:
                progress(step + 1, task.total_steps, metrics)
            evaluates = (step + 1) % eval_every == 0 or step + 1 == task.total_steps
            saves = evaluates or (step + 1) % save_every == 0
            if saves or (step + 1) % log_every == 0:  # a checkpoint holds all that was logged until then
                _log(state, _mean(window) | {"num_tokens": state["num_tokens"]}, write)
                window = []
            if evaluates:
                _evaluate(model, task, state, write)
            if saves:
                _checkpoint(out, model, tokenizer, optimizer, state)
    _finish(out, model, tokenizer, state, final_dtype)
    return state


def _update(
    parameters: list[torch.nn.Parameter], optimizer: Any, task: Task, config: OptimizerConfig, step: int
) -> Metrics:
    rate = learning_rate(config, step, task.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    metrics = task.gradients(step)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
    if not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
        raise FloatingPointError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}; lower learning_rate or check the data"
        )
    optimizer.step()
    return metrics | {"learning_rate": rate, "grad_norm": norm}


def _evaluate(model: Any, task: Task, state: dict[str, Any], write: Write) -> None:
    model.eval()
    metrics = task.evaluate()
    model.train()
    if not metrics:
        return
    _log(state, metrics, write)
    if state["best_metric"] is None or metrics["eval_loss"] < state["best_metric"]:
        state["best_metric"] = metrics["eval_loss"]
        state["best_model_checkpoint"] = f"checkpoint-{state['global_step']}"


def _checkpoint(out: Path, model: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> None:
    last = save_checkpoint(out, model, tokenizer, optimizer, state)
    if rank_and_world()[0] == 0:
        best = out / state["best_model_checkpoint"] if state["best_model_checkpoint"] else last
        keep_only(out, {last, best})
        store_checkpoints(out)
    _barrier()


def _finish(out: Path, model: Any, tokenizer: Any, state: dict[str, Any], dtype: torch.dtype | None) -> None:
    model.eval()
    save_weights(out, model, tokenizer, dtype)
    if rank_and_world()[0] == 0:
        write_json(out / "trainer_state.json", state)
    _barrier()


def _log(state: dict[str, Any], metrics: Metrics, write: Write) -> None:
    entry = {"step": state["global_step"], "epoch": state["epoch"]}
    entry |= {name: float(f"{value:.6g}") for name, value in metrics.items()}
    state["log_history"].append(entry)
    write(entry)


def _mean(window: list[Metrics]) -> Metrics:
    """Mean of each metric over the steps that have it (a batch without joint edges has no joint accuracy)."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    columns = {name: [metrics[name] for metrics in window if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _barrier() -> None:
    sum_over_workers(torch.zeros(1))
